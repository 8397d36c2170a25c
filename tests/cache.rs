//! `tarblk cache`, as a person types it: lists, sums, checks, pins and removals, beside a process that uses the cache.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod lab;
#[path = "common/wait.rs"]
mod wait;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::PathBuf;

use lab::{Lab, devices, text};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use tarblk::internals::bench::origin::Origin;
use wait::wait_until;

/// A lab with layers that were read through the cache, all of each, from an origin that is still there.
struct Read {
    lab: Lab,
    origin: Origin,
}

impl Read {
    fn layers(names: &[&str]) -> Self {
        let lab = Lab::new();
        let origin = Origin::start().unwrap();
        let read = Self { lab, origin };
        let tar = fs::read(read.lab.path("layer.tar")).unwrap();
        for name in names {
            read.origin.serve_blob(&format!("/{name}"), tar.clone());
            // What the disk is too slow for is not kept.
            wait_until("all of the layer is kept", || {
                read.image(name);
                let layer = read.layer(name);
                layer["held"] == layer["bytes"]
            });
        }
        read
    }

    fn url(&self, name: &str) -> String {
        self.origin.url(&format!("/{name}"))
    }

    /// Reads all of a layer through the cache; what was read.
    fn image(&self, name: &str) -> Vec<u8> {
        let output = self.lab.path("image");
        self.lab
            .good(&["image", &self.url(name), "-o", output.to_str().unwrap()]);
        fs::read(output).unwrap()
    }

    fn list(&self) -> Vec<Value> {
        self.lab.json(&["cache", "ls", "--json"]).as_array().unwrap().clone()
    }

    fn layer(&self, name: &str) -> Value {
        let url = self.url(name);
        let all = self.list();
        let found = all.iter().find(|layer| layer["name"] == url.as_str());
        found.unwrap_or_else(|| panic!("{name} is not in {all:?}")).clone()
    }

    fn data(&self, name: &str) -> PathBuf {
        let key = self.layer(name)["key"].as_str().unwrap().to_owned();
        self.lab.path("cache/layers").join(format!("{key}.data"))
    }

    fn damage(&self, name: &str, at: u64) {
        let file = File::options().write(true).open(self.data(name)).unwrap();
        file.write_all_at(b"!", at).unwrap();
    }
}

#[test]
fn an_empty_cache_is_no_error_and_stays_empty() {
    let lab = Lab::new();
    for command in ["ls", "du", "verify", "gc"] {
        lab.good(&["cache", command]);
        lab.json(&["cache", command, "--json"]);
    }
    assert!(lab.bad(&["cache", "pin", "sha256:abcd"], 1).contains("nothing is kept"));
    lab.bad(&["cache"], 2);
    lab.bad(&["cache", "rm"], 2);
    lab.bad(&["cache", "rm", "--all", "x"], 2);
    assert!(!lab.path("cache").exists(), "looking made something");
}

#[test]
fn layers_are_listed_pinned_and_removed() {
    let read = Read::layers(&["a.tar", "b.tar"]);
    let (a, b) = (read.layer("a.tar"), read.layer("b.tar"));
    for layer in [&a, &b] {
        assert_eq!(layer["bytes"], layer["held"], "{layer}");
        assert_eq!((&layer["usable"], &layer["in_use"]), (&true.into(), &false.into()));
        assert!(layer["disk"].as_u64() >= layer["held"].as_u64());
    }
    let table = read.lab.good(&["cache", "list"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.contains("whole") && table.contains(&read.url("a.tar")), "{table}");

    let usage = read.lab.json(&["cache", "du", "--json"]);
    assert_eq!(usage["layers"], 2);
    let on_disk = common_disk_bytes(&read.lab.path("cache"));
    assert_eq!(usage["total"].as_u64(), Some(on_disk), "{usage}");
    assert!(read.lab.good(&["cache", "du"]).contains("indexes made here"));

    // By its name, by how its key begins; the other stays what it was.
    let key = a["key"].as_str().unwrap();
    let said = read.lab.good(&["cache", "pin", &read.url("a.tar")]);
    assert!(said.contains("pinned") && said.contains("a.tar"), "{said}");
    assert_eq!(read.layer("a.tar")["pinned"], true);
    assert_eq!(read.layer("b.tar")["pinned"], false);
    assert!(read.lab.bad(&["cache", "rm", &key[..8]], 1).contains("pinned"));
    let said = read.lab.json(&["cache", "rm", b["key"].as_str().unwrap(), "--json"]);
    assert!(said[0]["freed"].as_u64() >= b["held"].as_u64(), "{said}");
    assert_eq!(read.list().len(), 1);
    let said = read.lab.json(&["cache", "unpin", &key[..8], "--json"]);
    assert_eq!(said[0]["pinned"], false);
    read.lab.good(&["cache", "rm", "--all"]);
    assert!(read.list().is_empty());
    let usage = read.lab.json(&["cache", "du", "--json"]);
    assert!(
        usage["beside"]
            .as_array()
            .unwrap()
            .iter()
            .all(|part| part["files"] == 0),
        "{usage}"
    );
    // And it is fetched again.
    assert_eq!(read.image("a.tar"), read.image("b.tar"));
}

/// Disk space of all below a directory, in bytes, as du(1) counts it, but for the directory's own block.
fn common_disk_bytes(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0;
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let meta = entry.path().symlink_metadata().unwrap();
        sum += meta.blocks() * 512;
        if meta.is_dir() {
            sum += common_disk_bytes(&entry.path());
        }
    }
    sum
}

#[test]
fn what_is_meant_has_to_be_one_layer() {
    let read = Read::layers(&["a.tar", "b.tar"]);
    let (a, b) = (read.layer("a.tar"), read.layer("b.tar"));
    // A common beginning of two names is forged: no test can wait for two digests that begin alike.
    let long = format!(
        "{}{}",
        &a["key"].as_str().unwrap()[..10],
        &b["key"].as_str().unwrap()[10..]
    );
    let layers = read.lab.path("cache/layers");
    for suffix in ["data", "map"] {
        let from = layers.join(format!("{}.{suffix}", b["key"].as_str().unwrap()));
        fs::rename(from, layers.join(format!("{long}.{suffix}"))).unwrap();
    }
    assert!(
        read.lab
            .bad(&["cache", "rm", &long[..8]], 1)
            .contains("2 layers begin like this")
    );
    // Its map is another layer's: nothing of it is used, and it goes first.
    let table = read.lab.good(&["cache", "ls"]);
    assert!(table.contains("damaged"), "{table}");
    let freed = read.lab.json(&["cache", "gc", "--json"])["freed"].as_u64().unwrap();
    assert!(freed >= b["held"].as_u64().unwrap(), "{freed}");
    assert_eq!(read.list().len(), 1);
    for nothing in [
        "",
        "abc",
        "layer-that-is-not",
        &read.url("c.tar"),
        "docker://127.0.0.1:1/never/seen:1",
    ] {
        read.lab.bad(&["cache", "rm", nothing], 1);
    }
    assert!(read.layer("a.tar")["usable"] == true);
}

#[test]
fn damage_is_found_told_of_and_mended() {
    let read = Read::layers(&["a.tar", "b.tar"]);
    let right = read.image("a.tar");
    assert!(read.lab.good(&["cache", "verify"]).contains("b.tar"));
    for at in [70_000, 1_000_000] {
        read.damage("a.tar", at);
    }
    let held = read.layer("a.tar")["held"].as_u64().unwrap();
    let output = read.lab.run(&["cache", "verify", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("2 damaged chunks"),
        "{}",
        text(&output.stderr)
    );
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |name: &str| {
        let url = read.url(name);
        let all = found.as_array().unwrap().iter();
        all.clone().find(|layer| layer["name"] == url.as_str()).unwrap().clone()
    };
    assert_eq!(
        (&of("a.tar")["damaged"], &of("a.tar")["dropped"]),
        (&2.into(), &true.into())
    );
    assert_eq!(of("b.tar")["damaged"], 0);
    assert_eq!(read.layer("a.tar")["held"].as_u64().unwrap(), held - 2 * 32_768);
    read.lab.good(&["cache", "verify", &read.url("a.tar")]);
    assert!(read.image("a.tar") == right, "wrong bytes");
    assert_eq!(read.layer("a.tar")["held"].as_u64().unwrap(), held);

    // Of a layer in use it is told, and left to whoever has it open.
    read.damage("b.tar", 500_000);
    let user = File::open(read.data("b.tar")).unwrap();
    flock(&user, FlockOperation::NonBlockingLockExclusive).unwrap();
    let output = read.lab.run(&["cache", "verify", &read.url("b.tar")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("in use"), "{}", text(&output.stderr));
    assert!(read.layer("b.tar")["in_use"] == true);
    assert!(
        read.lab
            .bad(&["cache", "rm", &read.url("b.tar")], 1)
            .contains("uses it")
    );
    drop(user);
    assert!(read.image("b.tar") == right, "wrong bytes");
}

#[test]
fn room_is_made_of_what_no_one_uses_or_pinned() {
    let read = Read::layers(&["cold.tar", "pinned.tar", "used.tar", "warm.tar"]);
    read.lab.good(&["cache", "pin", &read.url("pinned.tar")]);
    let user = File::open(read.data("used.tar")).unwrap();
    flock(&user, FlockOperation::NonBlockingLockExclusive).unwrap();
    // Left by a process that was killed while it read a layer from end to end.
    let left = read.lab.path("cache/layers/filling-0123.part");
    fs::write(&left, vec![1; 100_000]).unwrap();
    // When something was used is known to the second.
    let cold = read.layer("cold.tar")["used"].as_u64().unwrap();
    while std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() <= cold {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    read.image("warm.tar");
    let total = |read: &Read| read.lab.json(&["cache", "du", "--json"])["total"].as_u64().unwrap();
    let before = total(&read);
    let said = read
        .lab
        .json(&["cache", "gc", "--to", &(before - 4_000_000).to_string(), "--json"]);
    assert!(!left.exists());
    assert!(said["left"].as_u64().unwrap() <= before - 4_000_000, "{said}");
    assert_eq!(said["left"].as_u64(), Some(total(&read)));
    let held = |name: &str| {
        let url = read.url(name);
        let all = read.list();
        let found = all.iter().find(|layer| layer["name"] == url.as_str());
        found.map_or(0, |layer| layer["held"].as_u64().unwrap())
    };
    let whole = held("used.tar");
    assert!(
        held("cold.tar") < whole && held("warm.tar") > 0,
        "{said} of {before}: {:#?}",
        read.list()
    );
    assert_eq!(held("pinned.tar"), whole);
    // More than that is not to be had: what stays is told of.
    let output = read.lab.run(&["cache", "gc", "--to", "0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("pinned, in use"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!((held("pinned.tar"), held("used.tar")), (whole, whole));
    assert_eq!((held("cold.tar"), held("warm.tar")), (0, 0));
}

#[test]
fn a_directory_of_others_is_refused() {
    let read = Read::layers(&["a.tar"]);
    let cache = read.lab.path("cache");
    let layers = cache.join("layers");
    for (dir, mode) in [(&cache, 0o777), (&layers, 0o722)] {
        let before = fs::metadata(dir).unwrap().permissions();
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
        for command in [&["cache", "ls"][..], &["cache", "gc"], &["cache", "rm", "--all"]] {
            assert!(read.lab.bad(command, 1).contains("others may write"), "{command:?}");
        }
        fs::set_permissions(dir, before).unwrap();
    }
    // A file that became a link is no layer's, and what it leads to stays.
    let victim = read.lab.path("victim");
    fs::write(&victim, "precious").unwrap();
    let data = read.data("a.tar");
    fs::remove_file(&data).unwrap();
    symlink(&victim, &data).unwrap();
    let listed = read.list();
    assert_eq!(listed[0]["usable"], false, "{listed:?}");
    assert!(read.lab.bad(&["cache", "verify"], 1).contains("symbolic link"));
    read.lab.good(&["cache", "gc"]);
    assert!(!data.exists() && read.list().is_empty());
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    fs::rename(&layers, cache.join("moved")).unwrap();
    symlink(cache.join("moved"), &layers).unwrap();
    assert!(read.lab.bad(&["cache", "ls"], 1).contains("symbolic link"));
}

#[test]
fn beside_the_service() {
    let Some(_devices) = devices("cache beside the service") else {
        return;
    };
    let read = Read::layers(&["a.tar", "b.tar"]);
    let device = read.lab.good(&["attach", &read.url("a.tar")]);
    let device = device.trim();
    let all = fs::read(device).unwrap();
    assert!(read.layer("a.tar")["in_use"] == true && read.layer("b.tar")["in_use"] == false);
    assert!(
        read.lab
            .bad(&["cache", "rm", &read.url("a.tar")], 1)
            .contains("uses it")
    );
    read.lab.good(&["cache", "pin", &read.url("a.tar")]);
    read.lab.good(&["cache", "verify"]);
    read.lab.good(&["cache", "rm", "--all"]);
    assert_eq!(read.list().len(), 1);
    assert!(fs::read(device).unwrap() == all, "wrong bytes");
    // A layer that was begun and of which nothing came: not damaged while it is in use, and nothing is left of it.
    read.origin
        .serve_blob("/c.tar", fs::read(read.lab.path("layer.tar")).unwrap());
    let other = read.lab.good(&["attach", &read.url("c.tar")]);
    assert!(!read.lab.good(&["cache", "ls"]).contains("damaged"));
    read.lab.good(&["detach", other.trim()]);
    read.lab.good(&["detach", device]);
    read.lab.assert_nothing_served();
    assert!(read.layer("a.tar")["pinned"] == true && read.layer("a.tar")["in_use"] == false);
    assert!(
        read.list().iter().all(|layer| layer["usable"] == true),
        "{:?}",
        read.list()
    );
}
