//! Layers that `tarblk snapshotter` says are there, as containerd asks for them: what is claimed, what is declined and why, what is
//! made on claimed layers, and what is left of all that after kills, without registries, and when everything was removed.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;
mod snapshots;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::unpacked::{self, Unpacked, umoci_unpack};
use common::{scratch, skip, tree};
use registry::{Access, Registry};
use rustix::mount::UnmountFlags;
use serde_json::Value;
use snapshots::Lab;
use snapshots::client::{ALREADY_EXISTS, Answer, FAILED_PRECONDITION, Failed, UNAVAILABLE};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::snapshotter::messages::{Kind, Mount};

/// Four small layers, each of which takes something away from those below.
const IMAGE: &str = "whiteouts:types-thrice";

/// An image in a registry, as a client that pulled its manifest knows it.
#[derive(Clone, Debug)]
struct Pulled {
    reference: String,
    manifest: String,
    /// Digest, length and chain ID of each layer, the lowest first.
    layers: Vec<(String, u64, String)>,
}

impl Pulled {
    /// `name` is `LAYOUT:TAG` in the registry, and so it is in the layouts.
    fn of(registry_host: &str, images: &Path, name: &str) -> Self {
        let (layout, tag) = name.split_once(':').unwrap();
        let layout = images.join(layout);
        let (digest, manifest) = unpacked::manifest(&layout, tag);
        let config = fs::read(unpacked::blob(&layout, manifest["config"]["digest"].as_str().unwrap())).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
        let mut chain = String::new();
        let layers = manifest["layers"].as_array().unwrap().iter().zip(diff_ids);
        let layers = layers.map(|(layer, diff_id)| {
            let diff_id = diff_id.as_str().unwrap();
            chain = if chain.is_empty() {
                diff_id.to_owned()
            } else {
                Digest::of(Algorithm::Sha256, format!("{chain} {diff_id}").as_bytes()).to_string()
            };
            let digest = layer["digest"].as_str().unwrap().to_owned();
            (digest, layer["size"].as_u64().unwrap(), chain.clone())
        });
        Self {
            reference: format!("{registry_host}/{name}"),
            manifest: digest,
            layers: layers.collect(),
        }
    }

    fn chain(&self, depth: usize) -> &str {
        &self.layers[depth - 1].2
    }

    fn top(&self) -> &str {
        self.chain(self.layers.len())
    }

    /// The same under another name.
    fn renamed(&self, reference: String) -> Self {
        Self {
            reference,
            ..self.clone()
        }
    }
}

/// Asks for a layer as containerd's CRI plug-in does.
fn ask(lab: &Lab, image: &Pulled, depth: usize, namespace: &str) -> Answer<Vec<Mount>> {
    let (digest, _, chain) = &image.layers[depth - 1];
    let parent = if depth == 1 { "" } else { image.chain(depth - 1) };
    let above: Vec<_> = image.layers[depth - 1..].iter().map(|layer| layer.0.as_str()).collect();
    lab.prepare_with(
        &format!("{namespace}/{depth}/extract-1 {chain}"),
        parent,
        &[
            ("containerd.io/snapshot.ref", chain),
            ("containerd.io/snapshot/cri.image-ref", &image.reference),
            ("containerd.io/snapshot/cri.layer-digest", digest),
            ("containerd.io/snapshot/cri.manifest-digest", &image.manifest),
            ("containerd.io/snapshot/cri.image-layers", &above.join(",")),
        ],
    )
}

/// What containerd makes of the answer: it looks for the snapshot, and only if it finds it the layer is not fetched.
fn is_there(lab: &Lab, image: &Pulled, depth: usize, answer: Answer<Vec<Mount>>) -> bool {
    match answer {
        Err(Failed {
            code: ALREADY_EXISTS, ..
        }) => {}
        Ok(_) => return false,
        Err(failed) => panic!("the pull fails: {failed:?}\n{}", lab.log()),
    }
    let chain = image.chain(depth);
    let parent = if depth == 1 { "" } else { image.chain(depth - 1) };
    let filter = format!("labels.\"containerd.io/snapshot.ref\"=={chain},parent==\"{parent}\"");
    let found = lab.list(&[&filter]).unwrap();
    assert_eq!(found.len(), 1, "{filter}: {found:?}");
    assert_eq!(found[0].kind(), Kind::Committed);
    assert_eq!(lab.stat(&found[0].name).unwrap(), found[0]);
    true
}

/// Pulls an image all layers of which have to be claimed.
fn pull(lab: &Lab, image: &Pulled) {
    for depth in 1..=image.layers.len() {
        let answer = ask(lab, image, depth, "ns");
        assert!(is_there(lab, image, depth, answer), "layer {depth}:\n{}", lab.log());
    }
}

/// The first layer has to be declined; the reason.
fn declined(lab: &Lab, image: &Pulled) -> Value {
    let answer = ask(lab, image, 1, "ns");
    let key = format!("ns/1/extract-1 {}", image.chain(1));
    assert!(!answer.expect("mounts to unpack into").is_empty());
    assert_eq!(lab.stat(&key).unwrap().kind(), Kind::Active);
    lab.remove(&key).unwrap();
    let verdicts = verdicts(lab);
    let of_image = |verdict: &&Value| verdict["image"] == image.reference.as_str();
    let verdict = verdicts.iter().find(of_image).expect("a verdict").clone();
    assert_eq!(verdict["lazy"], false);
    assert!(lab.log().contains("is pulled as usual"));
    verdict
}

/// What `tarblk ps --images` says.
fn verdicts(lab: &Lab) -> Vec<Value> {
    let config = lab.dir().join("snapshotter.toml");
    let json = common::succeed(&mut lab.command(&["ps", "--images", "--json", "--config", config.to_str().unwrap()]));
    serde_json::from_slice::<Vec<Value>>(&json).unwrap()
}

/// A registry with [`IMAGE`], the image, what it is unpacked, and a snapshotter.
struct Bench {
    lab: Lab,
    /// None once it is gone.
    registry: Option<Registry>,
    image: Pulled,
    expected: Unpacked,
    _work: tempfile::TempDir,
}

impl Bench {
    fn new(test: &str, config: &str) -> Option<Self> {
        if let Some(why) = unpacked::no_unpacking() {
            skip(test, why);
            return None;
        }
        let lab = Lab::new(test, config)?;
        let images = unpacked::images(test)?;
        let registry = Registry::with(test, Access::Anonymous, &images, &[IMAGE])?;
        let image = Pulled::of(&registry.host(), &images, IMAGE);
        let work = scratch("unpacked-");
        let (layout, tag) = IMAGE.split_once(':').unwrap();
        let expected = umoci_unpack(&images.join(layout), tag, &work.path().join("u"));
        Some(Self {
            lab,
            registry: Some(registry),
            image,
            expected,
            _work: work,
        })
    }

    fn registry(&self) -> &Registry {
        self.registry.as_ref().unwrap()
    }

    /// Makes a container's directory above the image and compares it with the unpacked one.
    fn container(&mut self, key: &str) -> PathBuf {
        let mounts = self.lab.prepare(key, self.image.top()).unwrap();
        let at = self.lab.mount(&mounts);
        self.compare(&at);
        at
    }

    fn compare(&self, at: &Path) {
        // Above an overlay's root lies what the snapshotter makes for each container.
        let implied = [self.expected.implied.clone(), vec![PathBuf::new()]].concat();
        let differences = tree::differences(&self.expected.root, at, &implied);
        assert!(differences.is_empty(), "{differences:#?}\n{}", self.lab.log());
    }

    /// Removes the image's snapshots as containerd's collector does: from above, and `Cleanup` at the end.
    fn remove_image(&self) {
        for depth in (1..=self.image.layers.len()).rev() {
            self.lab.remove(self.image.chain(depth)).unwrap();
        }
        self.lab.cleanup().unwrap();
    }

    /// Removes these snapshots and the image's: nothing is left of them.
    fn end(self, keys: &[&str]) {
        for key in keys {
            self.lab.remove(key).unwrap();
        }
        self.remove_image();
        self.lab.assert_gone();
    }
}

#[test]
fn a_claimed_image_is_a_record_until_it_is_used() {
    let Some(mut bench) = Bench::new("a_claimed_image_is_a_record_until_it_is_used", "") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    assert_eq!(bench.lab.chains(), Vec::<PathBuf>::new());
    for (_, bytes, chain) in &bench.image.layers {
        let usage = bench.lab.usage(chain).unwrap();
        assert_eq!((u64::try_from(usage.size).unwrap(), usage.inodes), (*bytes, 0));
    }
    let found = verdicts(&bench.lab);
    assert_eq!(
        (found[0]["lazy"].clone(), found[0]["image"].as_str()),
        (true.into(), Some(bench.image.reference.as_str()))
    );
    let at = bench.container("ns/9/one");
    fs::write(at.join("written"), "by the container").unwrap();
    assert_eq!(bench.lab.chains().len(), 1);
    // A second container of the same image shares its device.
    let other = bench.container("ns/10/two");
    assert!(!other.join("written").exists());
    assert_eq!(bench.lab.chains().len(), 1);
    for (at, key) in [(at, "ns/9/one"), (other, "ns/10/two")] {
        bench.lab.umount(&at);
        bench.lab.remove(key).unwrap();
    }
    bench.remove_image();
    assert!(verdicts(&bench.lab).is_empty());
    bench.lab.assert_gone();
}

#[test]
fn ordinary_layers_lie_on_claimed_ones() {
    let Some(mut bench) = Bench::new("ordinary_layers_lie_on_claimed_ones", "") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let top = bench.image.top().to_owned();
    // Docker's layer for /etc/hosts and the like, then a build's, then a container.
    bench
        .lab
        .layer("ID-init", &top, |at| fs::write(at.join("hosts"), "hosts").unwrap());
    bench
        .lab
        .layer("built", "ID-init", |at| fs::write(at.join("built"), "built").unwrap());
    let mounts = bench.lab.prepare("container", "built").unwrap();
    let lower = mounts[0]
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap();
    assert_eq!(
        lower.split(':').count(),
        3,
        "two ordinary layers and one device: {lower}"
    );
    let at = bench.lab.mount(&mounts);
    assert_eq!(
        fs::read_to_string(at.join("hosts")).unwrap() + &fs::read_to_string(at.join("built")).unwrap(),
        "hostsbuilt"
    );
    for name in ["hosts", "built"] {
        fs::remove_file(at.join(name)).unwrap();
    }
    bench.compare(&at);
    bench.lab.umount(&at);
    assert_eq!(bench.lab.remove(&top).unwrap_err().code, FAILED_PRECONDITION);
    // A chain within the image, by itself: what was there before the upper layers took it away.
    let inner = bench.image.chain(1).to_owned();
    let names = bench.lab.look(&inner, |at| {
        let meta = fs::metadata(at).unwrap();
        assert!(fs::write(at.join("x"), "x").is_err());
        (tree::names(at), meta.dev())
    });
    let images = unpacked::images("").unwrap();
    let blob = unpacked::blob(&images.join("whiteouts"), &bench.image.layers[0].0);
    let list = String::from_utf8(common::succeed(Command::new("tar").arg("-tf").arg(&blob))).unwrap();
    let mut expected: Vec<_> = list
        .lines()
        .map(|name| PathBuf::from(name.trim_start_matches("./").trim_end_matches('/')))
        .filter(|name| !name.as_os_str().is_empty())
        .collect();
    expected.sort();
    let mut found: Vec<_> = names
        .0
        .into_iter()
        .filter(|name| !name.as_os_str().is_empty())
        .collect();
    found.sort();
    assert_eq!(found, expected);
    bench.end(&["container", "built", "ID-init"]);
}

#[test]
fn containers_outlive_the_snapshotter_and_the_registry() {
    let Some(mut bench) = Bench::new(
        "containers_outlive_the_snapshotter_and_the_registry",
        "fetch-all = true\n",
    ) else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    let before = bench.lab.list(&[]).unwrap();
    bench.lab.kill();
    // The registry is gone for good.
    drop(bench.registry.take());
    bench.compare(&at);
    bench.lab.start();
    assert_eq!(bench.lab.list(&[]).unwrap(), before);
    bench.compare(&at);
    let again = bench.lab.mounts("one").unwrap();
    // More containers, and the same pull once more.
    let other = bench.container("two");
    pull(&bench.lab, &bench.image);
    bench.lab.umount(&other);
    bench.lab.umount(&at);
    let at = bench.lab.mount(&again);
    bench.lab.umount(&at);
    bench.end(&["one", "two"]);
}

#[test]
fn another_version_goes_on_with_everything() {
    let Some(mut bench) = Bench::new("another_version_goes_on_with_everything", "") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    bench.lab.stop();
    // Another file, as a package puts it in the place of the one before.
    let program = bench.lab.dir().join("tarblk");
    fs::copy(common::TARBLK, &program).unwrap();
    bench.lab.program.clone_from(&program);
    bench.lab.start();
    let run_it = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    let serving = |lab: &Lab| {
        let service = fs::read_to_string(lab.dir().join("states/service.lock")).unwrap();
        service.trim().parse::<u32>().unwrap()
    };
    assert!(run_it(&serving(&bench.lab)), "{}", bench.lab.log());
    bench.compare(&at);
    let other = bench.container("two");
    bench.lab.umount(&other);
    bench.lab.umount(&at);
    for key in ["one", "two"] {
        bench.lab.remove(key).unwrap();
    }
    // The same program starting again replaces nothing.
    let before = serving(&bench.lab);
    let mounts = bench.lab.prepare("three", bench.image.top()).unwrap();
    bench.lab.stop();
    bench.lab.start();
    assert_eq!(bench.lab.mounts("three").unwrap(), mounts);
    assert_eq!(serving(&bench.lab), before);
    bench.end(&["three"]);
}

#[test]
fn what_is_kept_starts_without_a_registry() {
    let Some(mut bench) = Bench::new("what_is_kept_starts_without_a_registry", "fetch-all = true\n") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    let chain = bench.lab.chains().remove(0);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let said = common::succeed(&mut bench.lab.command(&["stats", chain.to_str().unwrap(), "--json"]));
        let said: Value = serde_json::from_slice(&said).unwrap();
        let fetch = &said["counters"]["fetch"];
        if fetch["bytes_held"] == fetch["bytes_layers"] {
            break;
        }
        assert!(Instant::now() < deadline, "{said:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
    bench.lab.umount(&at);
    bench.lab.kill();
    rustix::mount::unmount(&chain, UnmountFlags::empty()).unwrap();
    drop(bench.registry.take());
    bench.lab.start();
    // Attached anew, and every byte of it read.
    let mounts = bench.lab.mounts("one").unwrap();
    let at = bench.lab.mount(&mounts);
    bench.compare(&at);
    bench.lab.umount(&at);
    bench.end(&["one"]);
}

#[test]
fn devices_come_back_after_a_boot() {
    let Some(mut bench) = Bench::new("devices_come_back_after_a_boot", "") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    fs::write(at.join("written"), "before").unwrap();
    bench.lab.umount(&at);
    bench.lab.kill();
    // A boot leaves records and files, and neither mounts nor devices.
    for chain in bench.lab.chains() {
        rustix::mount::unmount(&chain, UnmountFlags::empty()).unwrap();
    }
    bench.lab.start();
    assert_eq!(bench.lab.chains(), Vec::<PathBuf>::new());
    let mounts = bench.lab.mounts("one").unwrap();
    let at = bench.lab.mount(&mounts);
    assert_eq!(fs::read_to_string(at.join("written")).unwrap(), "before");
    fs::remove_file(at.join("written")).unwrap();
    bench.compare(&at);
    bench.lab.umount(&at);
    bench.end(&["one"]);
}

#[test]
fn a_dead_device_is_replaced() {
    let Some(mut bench) = Bench::new("a_dead_device_is_replaced", "") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    bench.lab.umount(&at);
    // Service and keepers at once: what they served is lost.
    let own = bench.lab.pid();
    for pid in processes_of(bench.lab.dir()) {
        if pid != own {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    }
    let other = bench.container("two");
    bench.lab.umount(&other);
    bench.end(&["one", "two"]);
}

/// The processes of `tarblk` whose environment names a directory.
fn processes_of(dir: &Path) -> Vec<u32> {
    let marker = dir.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if String::from_utf8_lossy(&environment).contains(&format!("{marker}/states")) {
            found.push(pid);
        }
    }
    found
}

#[test]
fn idle_devices_go_and_come_back() {
    let Some(mut bench) = Bench::new("idle_devices_go_and_come_back", "idle = \"200ms\"\n") else {
        return;
    };
    pull(&bench.lab, &bench.image);
    let at = bench.container("one");
    std::thread::sleep(Duration::from_millis(600));
    // In use, and a container's files come from it.
    bench.compare(&at);
    assert_eq!(bench.lab.chains().len(), 1);
    bench.lab.umount(&at);
    bench.lab.remove("one").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !bench.lab.chains().is_empty() {
        assert!(Instant::now() < deadline, "{}", bench.lab.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let at = bench.container("two");
    bench.lab.umount(&at);
    bench.end(&["two"]);
}

#[test]
fn namespaces_and_images_share_layers() {
    let Some(mut bench) = Bench::new("namespaces_and_images_share_layers", "") else {
        return;
    };
    let (a, b) = (
        bench.image.clone(),
        bench.image.renamed(bench.registry().host() + "/other:tag"),
    );
    common::succeed(
        Command::new("skopeo")
            .args(["copy", "--quiet", "--all", "--preserve-digests"])
            .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
            .arg(format!("docker://{}", a.reference))
            .arg(format!("docker://{}", b.reference)),
    );
    pull(&bench.lab, &a);
    let names = bench.lab.names();
    for depth in 1..=b.layers.len() {
        let answer = ask(&bench.lab, &b, depth, "other-namespace");
        assert!(is_there(&bench.lab, &b, depth, answer));
        let answer = ask(&bench.lab, &a, depth, "third-namespace");
        assert!(is_there(&bench.lab, &a, depth, answer));
    }
    assert_eq!(bench.lab.names(), names, "one snapshot for all of them");
    // The image that was pulled first and last is deleted, with all that is kept of it; the other one's repository has the layers.
    let (name, _) = a.reference.split_once('/').unwrap().1.split_once(':').unwrap();
    let repositories = bench.registry().dir().join("storage/docker/registry/v2/repositories");
    fs::remove_dir_all(repositories.join(name)).unwrap();
    bench.lab.stop();
    fs::remove_dir_all(bench.lab.dir().join("cache")).unwrap();
    bench.lab.start();
    let at = bench.container("one");
    bench.lab.umount(&at);
    bench.end(&["one"]);
}

#[test]
fn a_client_may_call_at_the_same_time() {
    let Some(mut bench) = Bench::new("a_client_may_call_at_the_same_time", "") else {
        return;
    };
    let (lab, image) = (&bench.lab, &bench.image);
    for depth in 1..=image.layers.len() {
        std::thread::scope(|scope| {
            for namespace in 0..6 {
                scope.spawn(move || {
                    let answer = ask(lab, image, depth, &format!("ns{namespace}"));
                    assert!(is_there(lab, image, depth, answer));
                });
            }
        });
    }
    assert_eq!(lab.names().len(), image.layers.len());
    std::thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || lab.prepare(&format!("container-{number}"), image.top()).unwrap());
        }
    });
    assert_eq!(lab.chains().len(), 1, "one device for all of them");
    let mounts = lab.mounts("container-5").unwrap();
    let at = bench.lab.mount(&mounts);
    bench.compare(&at);
    bench.lab.umount(&at);
    let lab = &bench.lab;
    std::thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || lab.remove(&format!("container-{number}")).unwrap());
        }
    });
    bench.end(&[]);
}

#[test]
fn a_kill_during_a_pull_loses_nothing() {
    let Some(mut bench) = Bench::new("a_kill_during_a_pull_loses_nothing", "") else {
        return;
    };
    for round in 0..16_u64 {
        let pid = rustix::process::Pid::from_raw(i32::try_from(bench.lab.pid()).unwrap()).unwrap();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(4 * round));
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        let mut claimed = Vec::new();
        for depth in 1..=bench.image.layers.len() {
            match ask(&bench.lab, &bench.image, depth, "ns") {
                Err(failed) if failed.code == ALREADY_EXISTS => claimed.push(bench.image.chain(depth).to_owned()),
                Err(failed) if failed.code == UNAVAILABLE => break,
                other => panic!("{other:?}\n{}", bench.lab.log()),
            }
        }
        if claimed.len() == bench.image.layers.len() {
            // Also while a device is being made.
            let _ = bench.lab.prepare("container", bench.image.top());
        }
        killer.join().unwrap();
        bench.lab.kill();
        bench.lab.start();
        let names = bench.lab.names();
        assert!(
            claimed.iter().all(|chain| names.contains(chain)),
            "{claimed:?} {names:?}"
        );
        // The pull is made again, and the container.
        pull(&bench.lab, &bench.image);
        if names.iter().any(|name| name == "container") {
            bench.lab.remove("container").unwrap();
        }
        let at = bench.container("container");
        bench.lab.umount(&at);
        bench.lab.remove("container").unwrap();
        bench.remove_image();
        bench.lab.assert_empty();
        fs::remove_dir_all(bench.lab.dir().join("cache")).unwrap();
    }
    bench.lab.assert_gone();
}

// -------------------------------------------------------------------------------------------------- declined

#[test]
fn what_cannot_be_lazy_is_pulled_as_usual() {
    let Some(mut bench) = Bench::new("what_cannot_be_lazy_is_pulled_as_usual", "claim-timeout = \"2s\"\n") else {
        return;
    };
    let image = bench.image.clone();
    let reason = |lab: &Lab, image: &Pulled| declined(lab, image)["reason"].as_str().unwrap().to_owned();
    let nowhere = image.renamed("127.0.0.1:1/whiteouts:types".to_owned());
    assert_eq!(reason(&bench.lab, &nowhere), "registry");
    let unknown = image.renamed(bench.registry().host() + "/none:tag");
    assert_eq!(reason(&bench.lab, &unknown), "registry");
    // A client that says of a layer what the image does not.
    let mut lying = image.clone();
    lying.layers[0].0.clone_from(&image.layers[1].0);
    assert_eq!(lab_reason(&bench.lab, &lying), "mismatch");
    let mut lying = image.clone();
    lying.layers[0].2.clone_from(&image.layers[1].2);
    assert_eq!(lab_reason(&bench.lab, &lying), "mismatch");
    let nameless = image.renamed("NOT A NAME".to_owned());
    assert_eq!(reason(&bench.lab, &nameless), "mismatch");
    // A client that says nothing of images.
    let chain = image.chain(1);
    let labels = [("containerd.io/snapshot.ref", chain)];
    assert!(!bench.lab.prepare_with("bare", "", &labels).unwrap().is_empty());
    bench.lab.remove("bare").unwrap();
    // What was unpacked is under all above it.
    bench
        .lab
        .layer("unpacked", "", |at| fs::write(at.join("file"), "x").unwrap());
    let (digest, _, chain) = &image.layers[1];
    let labels = [
        ("containerd.io/snapshot.ref", chain.as_str()),
        ("containerd.io/snapshot/cri.image-ref", &image.reference),
        ("containerd.io/snapshot/cri.layer-digest", digest),
        ("containerd.io/snapshot/cri.manifest-digest", &image.manifest),
    ];
    assert!(!bench.lab.prepare_with("above", "unpacked", &labels).unwrap().is_empty());
    for key in ["above", "unpacked"] {
        bench.lab.remove(key).unwrap();
    }
    // After all that, what can be lazy is.
    pull(&bench.lab, &image);
    // A client without labels of images finds what is claimed already.
    let answer = bench
        .lab
        .prepare_with("again", "", &[("containerd.io/snapshot.ref", image.chain(1))]);
    assert!(is_there(&bench.lab, &image, 1, answer));
    let at = bench.container("one");
    let metrics = bench.lab.get("/metrics");
    for line in [
        "HTTP/1.1 200 OK",
        "tarblk_snapshotter_layers_claimed_total 4",
        "tarblk_snapshotter_layers_declined_total{reason=\"registry\"} 2",
        "tarblk_snapshotter_layers_declined_total{reason=\"mismatch\"} 3",
        "tarblk_snapshotter_layers_declined_total{reason=\"unnamed\"} 1",
        "tarblk_snapshotter_layers_declined_total{reason=\"above-files\"} 1",
        "tarblk_snapshotter_attaches_total 1",
        "tarblk_snapshotter_snapshots{kind=\"remote\"} 4",
        "tarblk_snapshotter_snapshots{kind=\"active\"} 1",
        "tarblk_snapshotter_devices 1",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    assert!(bench.lab.get("/other").starts_with("HTTP/1.1 404 "));
    bench.lab.umount(&at);
    bench.end(&["one"]);
}

/// The reason in the log's last line: of lies about an image that is lazy by itself the verdict is the image's own.
fn lab_reason(lab: &Lab, image: &Pulled) -> String {
    let before = lab.log().len();
    let answer = ask(lab, image, 1, "ns");
    assert!(!answer.expect("mounts to unpack into").is_empty());
    lab.remove(&format!("ns/1/extract-1 {}", image.chain(1))).unwrap();
    let said = lab.log()[before..].to_owned();
    if said.contains("has no such layer") {
        "mismatch".to_owned()
    } else {
        said
    }
}

#[test]
fn an_image_that_cannot_be_opened_is_claimed_once() {
    const NAME: &str = "an_image_that_cannot_be_opened_is_claimed_once";
    const LIAR: &str = "hostile:wrong-diff-id";
    let Some(images) = unpacked::images(NAME) else { return };
    let Some(mut lab) = Lab::new(NAME, "") else { return };
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &[LIAR]) else {
        return;
    };
    let image = Pulled::of(&registry.host(), &images, LIAR);
    pull(&lab, &image);
    // Its layers are read meanwhile, and are not what its configuration says.
    let deadline = Instant::now() + Duration::from_secs(60);
    while verdicts(&lab)[0]["lazy"] == true {
        assert!(Instant::now() < deadline, "{}", lab.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let refused = lab.prepare("container", image.top()).unwrap_err();
    assert_eq!(refused.code, UNAVAILABLE);
    assert!(refused.message.contains("has to be"), "{refused:?}");
    assert!(lab.stat("container").is_err());
    let remove = |lab: &Lab| {
        for depth in (1..=image.layers.len()).rev() {
            lab.remove(image.chain(depth)).unwrap();
        }
    };
    remove(&lab);
    // The next pull is containerd's own, also of a later process.
    assert_eq!(declined(&lab, &image)["reason"], "unusable");
    lab.stop();
    lab.start();
    assert_eq!(declined(&lab, &image)["reason"], "unusable");
    lab.assert_gone();
}

#[test]
fn policies_are_by_repository() {
    let config = "lazy = \"never\"\n[[repository]]\npattern = \"*/whiteouts\"\nlazy = \"always\"\n";
    let Some(bench) = Bench::new("policies_are_by_repository", config) else {
        return;
    };
    let other = bench.image.renamed(bench.registry().host() + "/other:tag");
    let verdict = declined(&bench.lab, &other);
    assert_eq!(verdict["reason"], "policy");
    pull(&bench.lab, &bench.image);
    bench.end(&[]);
}

#[test]
fn an_index_can_be_demanded() {
    let Some(bench) = Bench::new("an_index_can_be_demanded", "lazy = \"if-indexed\"\n") else {
        return;
    };
    let verdict = declined(&bench.lab, &bench.image);
    assert_eq!(verdict["reason"], "no-index", "{verdict}");
    // Read once by anybody on this machine, it has them.
    let source = format!("docker://{}", bench.image.reference);
    common::succeed(&mut bench.lab.command(&["ls", &source]));
    pull(&bench.lab, &bench.image);
    bench.end(&[]);
}

#[test]
fn credentials_are_those_of_docker() {
    const NAME: &str = "credentials_are_those_of_docker";
    let Some(images) = unpacked::images(NAME) else { return };
    for access in [Access::Password, Access::Token] {
        let Some(mut lab) = Lab::new(NAME, "") else { return };
        let Some(registry) = Registry::with(NAME, access, &images, &[IMAGE]) else {
            return;
        };
        let image = Pulled::of(&registry.host(), &images, IMAGE);
        let verdict = declined(&lab, &image);
        assert_eq!(verdict["reason"], "registry", "{verdict}");
        // What `docker login` keeps is found without a word, also what it keeps after the start.
        fs::create_dir_all(lab.dir().join(".docker")).unwrap();
        fs::copy(registry.auth_file(), lab.dir().join(".docker/config.json")).unwrap();
        pull(&lab, &image);
        let mounts = lab.prepare("one", image.top()).unwrap();
        let at = lab.mount(&mounts);
        assert!(fs::read_dir(&at).unwrap().count() > 0);
        lab.umount(&at);
        lab.remove("one").unwrap();
        for depth in (1..=image.layers.len()).rev() {
            lab.remove(image.chain(depth)).unwrap();
        }
        assert!(!lab.log().contains(registry::PASSWORD));
        lab.assert_gone();
    }
}

#[test]
fn stargz_labels_are_understood() {
    let Some(mut bench) = Bench::new("stargz_labels_are_understood", "") else {
        return;
    };
    for depth in 1..=bench.image.layers.len() {
        let (digest, _, chain) = &bench.image.layers[depth - 1];
        let parent = if depth == 1 { "" } else { bench.image.chain(depth - 1) };
        let labels = [
            ("containerd.io/snapshot.ref", chain.as_str()),
            ("containerd.io/snapshot/remote/stargz.reference", &bench.image.reference),
            ("containerd.io/snapshot/remote/stargz.digest", digest),
            ("containerd.io/snapshot/remote/stargz.layers", digest),
        ];
        let answer = bench.lab.prepare_with(&format!("default/{depth}/x"), parent, &labels);
        assert!(is_there(&bench.lab, &bench.image, depth, answer));
    }
    let at = bench.container("one");
    bench.lab.umount(&at);
    bench.end(&["one"]);
}
