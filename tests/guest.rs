//! The ublk side, on a kernel that has ublk: natively as root where this machine's does, else under Debian's 6.12 kernel in a
//! virtual machine (`tools/guest`), where this program runs the named test again. And the loop back end under an older kernel.
//!
//! Ignored by a plain `cargo test`, because a guest without KVM takes minutes: `tools/test guest` runs them, or
//! `cargo test --test guest -- --ignored --nocapture NAME`. A machine that can do neither says so and skips.

mod common;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::corpus::{self, Archive};
use common::images::{compare as compare_image, none, oci};
use common::noise::noise;
use common::rawtar::RawTar;
use common::servers;
use common::session::{Session, device, is_mounted, leftovers};
use common::unpacked::{self, Unpacked, umoci_unpack};
use common::wait::wait_until;
use common::{gnu_tar_extract, have, scratch, skip, succeed, tree};
use tarblk::internals::bench::origin::{Fault, Link, Origin, at_random};
use tarblk::internals::device::ublk;

// ------------------------------------------------------------------------------------------------------------ where

/// Set in the guest: the directory that a test may fill.
const INSIDE: &str = "TARBLK_GUEST_DIR";

/// The guest's only place to write to that has room.
const GUEST_DIR: &str = "/run";

/// The series of Debian's kernels that has ublk.
const UBLK_KERNEL: &str = "6.12";

/// Debian 12's own: no ublk, no resending of a FUSE request that a killed server had taken.
const OLDER_KERNEL: &str = "6.1";

/// Memory of the guest in MiB; what is extracted in it lies in memory too.
const GUEST_MIB: &str = "3072";

/// Runs `test` where there is ublk, with a directory that it may fill; else skips `name`.
fn on_ublk(name: &str, seconds: u32, test: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return test(Path::new(&dir));
    }
    if rustix::process::geteuid().is_root() && ublk::preflight().is_ok() {
        // They look for devices that are left, of whomever.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        return test(scratch("on-ublk-").path());
    }
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", name, "--ignored", "--nocapture"].map(OsStr::new);
    in_guest(name, seconds, &program, &arguments);
}

fn tools_guest() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/guest"))
}

/// Why there can be no guest here, if so.
fn no_guest() -> Option<String> {
    let checked = tools_guest().arg("--check").output().unwrap();
    let said = String::from_utf8_lossy(&checked.stderr).trim().to_owned();
    (!checked.status.success()).then_some(said)
}

/// Runs a program in the guest, which has to succeed; what it skips is skipped here.
fn in_guest(name: &str, seconds: u32, program: &Path, arguments: &[&OsStr]) {
    in_guest_of(UBLK_KERNEL, name, seconds, program, arguments);
}

/// As `in_guest`, under a kernel of Debian's of that series.
fn in_guest_of(kernel: &str, name: &str, seconds: u32, program: &Path, arguments: &[&OsStr]) {
    if let Some(why) = no_guest() {
        return skip(name, &why);
    }
    let mut command = tools_guest();
    command.args(["--kernel", kernel, "--timeout", &seconds.to_string()]);
    command.args(["--memory", GUEST_MIB]);
    command.arg("--env").arg(format!("{INSIDE}={GUEST_DIR}"));
    for name in [
        "TARBLK_TEST_LAYER",
        "TARBLK_TEST_IMAGES",
        "TARBLK_TEST_EVERY",
        "TARBLK_TEST_KILLS",
        "TARBLK_TEST_SEED",
    ] {
        if let Some(value) = std::env::var_os(name) {
            let mut variable = OsString::from(format!("{name}="));
            variable.push(&value);
            command.arg("--env").arg(variable);
        }
    }
    let mut child = command
        .arg("--")
        .arg(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // By lines, since another guest may be writing.
    let output = BufReader::new(child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || output.lines().for_each(|line| println!("{}", line.unwrap())));
    let mut skipped = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        eprintln!("{line}");
        if let Some((test, why)) = line.strip_prefix("SKIP: ").and_then(|rest| rest.split_once(": ")) {
            skipped.push((test.to_owned(), why.to_owned()));
        }
    }
    reader.join().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{name} failed in the guest: {status}");
    for (test, why) in skipped {
        skip(&test, &format!("in the guest: {why}"));
    }
}

// -------------------------------------------------------------------------------------------------- the device's cases

/// `device_ublk` runs natively with the other tests where it can; here it is the program of its own that it is.
#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn cases_of_a_device_pass_on_ublk() {
    const NAME: &str = "cases_of_a_device_pass_on_ublk";
    if rustix::process::geteuid().is_root() && ublk::preflight().is_ok() {
        return eprintln!("{NAME}: this kernel has ublk, so device_ublk has run them");
    }
    let program = built_test("device_ublk");
    in_guest(NAME, 800, &program, &[]);
}

/// As `cases_of_a_device_pass_on_ublk`: servers that are killed and followed by others.
#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn devices_are_taken_over_from_killed_servers() {
    const NAME: &str = "devices_are_taken_over_from_killed_servers";
    if rustix::process::geteuid().is_root() && ublk::preflight().is_ok() {
        return eprintln!("{NAME}: this kernel has ublk, so ublk_recovery has run them");
    }
    let program = built_test("ublk_recovery");
    in_guest(NAME, 500, &program, &[]);
}

/// The loop back end under the kernel that Debian 12 comes with, as `device_loop` natively.
#[test]
#[ignore = "a virtual machine: tools/test older"]
fn older_kernels_pass_the_cases_of_a_device_on_loop() {
    let program = built_test("device_loop");
    in_guest_of(
        OLDER_KERNEL,
        "older_kernels_pass_the_cases_of_a_device_on_loop",
        1500,
        &program,
        &[],
    );
}

/// Servers killed under readers that check every byte, where the kernel has no way to resend what they had taken.
#[test]
#[ignore = "a virtual machine: tools/test older"]
fn older_kernels_lose_nothing_with_a_server() {
    let program = built_test("loop_survival");
    in_guest_of(
        OLDER_KERNEL,
        "older_kernels_lose_nothing_with_a_server",
        1500,
        &program,
        &[],
    );
}

/// Where cargo has put another test program of this package.
fn built_test(name: &str) -> PathBuf {
    built(&["--test", name], name)
}

/// Where cargo has put the test program `target`, which `what` chooses.
fn built(what: &[&str], target: &str) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["test", "--locked", "--no-run", "--message-format=json"]);
    // What cargo tells this program of itself: build scripts that look at it would run anew, and half of the crates after them.
    for (name, _) in std::env::vars_os() {
        let is_said = |prefix| name.to_str().is_some_and(|name| name.starts_with(prefix));
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].into_iter().any(is_said) {
            cargo.env_remove(name);
        }
    }
    let messages = succeed(cargo.args(what).current_dir(env!("CARGO_MANIFEST_DIR")));
    let found = String::from_utf8(messages).unwrap().lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == target && message["profile"]["test"] == true;
        is_it
            .then(|| message["executable"].as_str().map(PathBuf::from))
            .flatten()
    });
    found.unwrap_or_else(|| panic!("cargo built no test program {target}"))
}

// ---------------------------------------------------------------------------------------------------------- fs-verity

/// Set where there is one: a directory on a filesystem that protects files. The filesystem lies in the file beside it that ends in `.img`.
const VERITY_DIR: &str = "TARBLK_TEST_VERITY_DIR";

/// Makes such a filesystem, and runs there the library's tests that ask for it, and this program's. In one line.
const ON_VERITY: &str = concat!(
    "set -eu; units=$1 own=$2 name=$3; export TARBLK_TEST_VERITY_DIR=/run/verity; ",
    "truncate -s 512M /run/verity.img; mkfs.ext4 -q -O verity /run/verity.img; ",
    "mkdir /run/verity; mount -o loop /run/verity.img /run/verity; ",
    // A name that no test has any more would pass.
    r#"[ "$("$units" --list protect_tests:: what_the_kernel_keeps | grep -c ': test$')" -ge 8 ]; "#,
    r#""$units" --test-threads=2 protect_tests:: what_the_kernel_keeps; "#,
    r#""$own" --exact "$name" --ignored --nocapture; umount /run/verity"#,
);

/// Debian's kernel has fs-verity, whether or not the one that runs this has.
#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn whole_layers_are_kept_by_the_kernel_as_they_are() {
    const NAME: &str = "whole_layers_are_kept_by_the_kernel_as_they_are";
    if let Some(dir) = std::env::var_os(VERITY_DIR) {
        return compared_once(Path::new(&dir));
    }
    let (units, own) = (built(&["--lib"], "tarblk"), std::env::current_exe().unwrap());
    let arguments = [
        OsStr::new("-c"),
        OsStr::new(ON_VERITY),
        OsStr::new("sh"),
        units.as_os_str(),
        own.as_os_str(),
        OsStr::new(NAME),
    ];
    in_guest(NAME, 300, Path::new("/bin/sh"), &arguments);
}

/// A layer with digests that is fetched as a whole: from then on no process compares it again, not even one that has just begun.
fn compared_once(dir: &Path) {
    let mut session = Session::below(dir, "ublk");
    let file = noise(900_000, 3);
    let layer = session.dir().join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&layer).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(900_000);
    header.set_mode(0o644);
    tar.append_data(&mut header, "file", &*file).unwrap();
    tar.finish().unwrap();
    let index = session.dir().join("index");
    session.succeed(&[
        OsStr::new("index"),
        layer.as_os_str(),
        OsStr::new("-o"),
        index.as_os_str(),
    ]);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &layer).unwrap();
    let kept = |session: &Session| -> Vec<serde_json::Value> {
        let said = session.succeed(&["cache", "ls", "--json"]);
        serde_json::from_str(&said).unwrap()
    };
    for round in 0..2 {
        let options = ["--index".into(), index.clone().into(), "--fetch-all".into()];
        let mounted = session.mount_with(origin.url("/layer.tar"), &options);
        assert!(fs::read(mounted.join("file")).unwrap() == file, "round {round}");
        wait_until("the kernel to keep the layer as it is", || {
            kept(&session).iter().any(|layer| layer["protected"] == true)
        });
        assert!(fs::read(mounted.join("file")).unwrap() == file, "round {round}");
        let counted = stats(&session, &mounted);
        assert_eq!(counted["device"]["errors"], 0, "{counted}");
        let fetched = counted["fetch"]["bytes_fetched"].as_u64().unwrap();
        assert_eq!(fetched > 0, round == 0, "round {round}: {counted}");
        // The service goes with its last device: the next one is another process.
        session.umount();
        assert_eq!(leftovers(session.dir()), Vec::<String>::new());
    }
    // Nothing can be written to it, and yet it can be given up.
    session.succeed(&["cache", "rm", "--all"]);
    assert!(kept(&session).is_empty());
}

// ------------------------------------------------------------------------------------------------------------ identity

/// Mounts every archive on ublk and compares it with GNU tar's extraction.
fn compare_all(dir: &Path, archives: &[Archive]) {
    let complaints = Mutex::new(Vec::new());
    let waiting = Mutex::new(archives.iter());
    // Two at a time: starting programs is most of the work, and the guest has two processors.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut session = Session::below(dir, "ublk");
                while let Some(archive) = { waiting.lock().unwrap().next() } {
                    let found = compare(&mut session, archive);
                    complaints.lock().unwrap().extend(found);
                }
                assert_eq!(leftovers(session.dir()), Vec::<String>::new());
            });
        }
    });
    let complaints = complaints.into_inner().unwrap();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert_no_devices();
}

fn compare(session: &mut Session, archive: &Archive) -> Vec<String> {
    let extracted = session.dir().join("extracted");
    gnu_tar_extract(&archive.path, &extracted);
    let mounted = session.mount(archive.path.as_os_str());
    assert!(device(&mounted).starts_with("/dev/ublkb"));
    let differences = tree::differences(&extracted, &mounted, &archive.implied);
    eprintln!("{}: {} differences", archive.name, differences.len());
    session.umount();
    fs::remove_dir_all(&extracted).unwrap();
    differences
        .into_iter()
        .map(|line| format!("{}: {line}", archive.name))
        .collect()
}

/// The driver has no device, neither a block device nor a half of one.
fn assert_no_devices() {
    let mut left: BTreeSet<String> = BTreeSet::new();
    for dir in ["/sys/class/ublk-char", "/sys/block", "/run/tarblk"] {
        let names = fs::read_dir(dir).into_iter().flatten().flatten();
        left.extend(
            names
                .map(|entry| entry.file_name().into_string().unwrap())
                .filter(|name| name.contains("ublk")),
        );
    }
    assert_eq!(left, BTreeSet::new(), "left behind");
}

#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn tars_made_by_hand_are_on_ublk_as_gnu_tar_extracts_them() {
    on_ublk("tars_made_by_hand_are_on_ublk_as_gnu_tar_extracts_them", 400, |dir| {
        let work = tempfile::tempdir_in(dir).unwrap();
        compare_all(dir, &corpus::by_hand(work.path()));
    });
}

#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn tars_of_every_program_are_on_ublk_as_gnu_tar_extracts_them() {
    on_ublk(
        "tars_of_every_program_are_on_ublk_as_gnu_tar_extracts_them",
        500,
        |dir| {
            let work = tempfile::tempdir_in(dir).unwrap();
            let archives = corpus::planted(work.path());
            assert!(archives.len() > 10, "only {} archives", archives.len());
            // `tests/identity.rs` has them all natively; emulated, each takes seconds.
            let all = std::env::var_os("TARBLK_TEST_EVERY").is_some();
            let some: Vec<Archive> = archives.into_iter().step_by(if all { 1 } else { 2 }).collect();
            compare_all(dir, &some);
        },
    );
}

/// The layer that `TARBLK_TEST_LAYER` names.
fn debian() -> Option<Archive> {
    Some(Archive {
        name: "debian".to_owned(),
        path: std::env::var_os("TARBLK_TEST_LAYER")?.into(),
        implied: vec![],
    })
}

const NO_LAYER: &str = "TARBLK_TEST_LAYER names no layer (tools/debian-layer makes one)";

#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn a_debian_root_filesystem_is_on_ublk_as_gnu_tar_extracts_it() {
    const NAME: &str = "a_debian_root_filesystem_is_on_ublk_as_gnu_tar_extracts_it";
    let Some(archive) = debian() else {
        return skip(NAME, NO_LAYER);
    };
    on_ublk(NAME, 400, |dir| compare_all(dir, &[archive]));
}

// -------------------------------------------------------------------------------------------------------------- images

/// Whole images that are small, by what their layers do to each other.
const SMALL_IMAGES: [&str; 3] = ["many-layers", "types", "opaque-nested"];

/// The layer of debian-python that is compared in every coding: small, with programs, libraries and links.
const REAL_LAYER: usize = 4;

#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn images_are_on_ublk_as_others_unpack_them() {
    const NAME: &str = "images_are_on_ublk_as_others_unpack_them";
    if std::env::var_os("TARBLK_TEST_IMAGES").is_none() {
        return skip(
            NAME,
            "TARBLK_TEST_IMAGES names no images (tools/test-images makes them)",
        );
    }
    let Some(images) = unpacked::images(NAME) else { return };
    if let Some(why) = unpacked::no_unpacking() {
        return skip(NAME, why);
    }
    on_ublk(NAME, 500, |dir| {
        let work = tempfile::tempdir_in(dir).unwrap();
        let mut session = Session::below(dir, "ublk");
        let mut complaints = Vec::new();
        let whiteouts = images.join("whiteouts");
        let mut expected = None;
        for tag in SMALL_IMAGES {
            let unpacked = umoci_unpack(&whiteouts, tag, &work.path().join(tag));
            let source = oci(&images, "whiteouts", tag);
            complaints.extend(compare_image(&mut session, tag, &source, &[], &unpacked));
            expected = Some(unpacked).filter(|_| tag == SMALL_IMAGES[0]).or(expected);
        }
        if have("docker-registry") && have("skopeo") {
            let registry = DockerRegistry::start(dir);
            let source = registry.hold(&whiteouts, SMALL_IMAGES[0]);
            let found = compare_image(&mut session, "docker://", &source, &[], &expected.unwrap());
            complaints.extend(found);
        } else {
            skip(&format!("{NAME}, registry"), "docker-registry or skopeo is missing");
        }
        // gzip and zstd hold the same tar; the makers of the others add names of their own to it.
        for tags in [&["gzip", "zstd"][..], &["estargz"], &["zstdchunked"]] {
            complaints.extend(compare_codings(dir, &images, tags));
        }
        none(&complaints);
        assert_eq!(leftovers(session.dir()), Vec::<String>::new());
        drop(session);
        assert_no_devices();
    });
}

/// Mounts a layer of an image in several codings that hold the same tar, and compares it with GNU tar's extraction.
fn compare_codings(dir: &Path, images: &Path, tags: &[&str]) -> Vec<String> {
    let mut session = Session::below(dir, "ublk");
    let layout = images.join("debian-python");
    let blob = unpacked::blob(&layout, &unpacked::layers(&layout, tags[0])[REAL_LAYER - 1]);
    let root = session.dir().join("layer");
    gnu_tar_extract(&blob, &root);
    let implied = unpacked::parents_without_entry(&blob);
    let extracted = Unpacked { root, implied };
    let options = ["--layer".into(), REAL_LAYER.to_string().into()];
    let mut complaints = Vec::new();
    for tag in tags {
        let source = oci(images, "debian-python", tag);
        complaints.extend(compare_image(&mut session, tag, &source, &options, &extracted));
    }
    fs::remove_dir_all(&extracted.root).unwrap();
    assert_eq!(leftovers(session.dir()), Vec::<String>::new());
    complaints
}

/// Debian's registry, on loopback, empty.
struct DockerRegistry {
    process: Child,
    address: std::net::SocketAddr,
    dir: tempfile::TempDir,
}

impl DockerRegistry {
    fn start(dir: &Path) -> Self {
        let dir = tempfile::tempdir_in(dir).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let configuration = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: '{}'}}}}\nhttp: {{addr: '{address}'}}\n",
            dir.path().join("store").display()
        );
        let file = dir.path().join("registry.yml");
        fs::write(&file, configuration).unwrap();
        // It tells of every name that it was asked for in vain.
        let log = fs::File::create(dir.path().join("registry.log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let registry = Self { process, address, dir };
        wait_until("an answer of docker-registry", || {
            std::net::TcpStream::connect(address).is_ok()
        });
        registry
    }

    /// Puts an image of a layout into it; the image's name there.
    fn hold(&self, layout: &Path, tag: &str) -> OsString {
        let name = format!("docker://{}/image:{tag}", self.address);
        let policy = self.dir.path().join("policy.json");
        fs::write(&policy, r#"{"default": [{"type": "insecureAcceptAnything"}]}"#).unwrap();
        let mut copy = Command::new("skopeo");
        copy.arg("--policy").arg(policy);
        copy.args(["copy", "--quiet", "--dest-tls-verify=false"]);
        succeed(copy.arg(format!("oci:{}:{tag}", layout.display())).arg(&name));
        name.into()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ------------------------------------------------------------------------------------------------------- over HTTP

/// A regular file of a layer, and where its bytes are in the tar.
struct Part {
    path: PathBuf,
    at: u64,
    len: usize,
}

/// Every twelfth regular file of a tar and the four biggest: enough to be everywhere in it, little enough for an emulated
/// processor.
fn sample(tar: &Path) -> Vec<Part> {
    let mut archive = tar::Archive::new(File::open(tar).unwrap());
    let mut files: Vec<Part> = Vec::new();
    for entry in archive.entries_with_seek().unwrap() {
        let entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            files.push(Part {
                path: entry
                    .path()
                    .unwrap()
                    .components()
                    .filter(|part| matches!(part, Component::Normal(_)))
                    .collect(),
                at: entry.raw_file_position(),
                len: usize::try_from(entry.size()).unwrap(),
            });
        }
    }
    let mut sizes: Vec<usize> = files.iter().map(|part| part.len).collect();
    sizes.sort_unstable();
    let big = sizes[sizes.len() - 4];
    let mut number = 0;
    files.retain(|part| {
        number += 1;
        u32::is_multiple_of(number, 12) || part.len >= big
    });
    files
}

/// Reads the parts from `root` by eight readers, each in an order of its own, and compares them with the tar.
fn read_at_once(root: &Path, tar: &Path, parts: &[Part]) {
    let tar = File::open(tar).unwrap();
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let tar = &tar;
            scope.spawn(move || {
                let (mut wanted, mut found) = (Vec::new(), Vec::new());
                // Odd readers go backwards, so that they meet others in the middle; each leaves half of the files out.
                for step in 0..parts.len() {
                    let step = (step + reader * parts.len() / 8) % parts.len();
                    let part = &parts[if reader % 2 == 0 { step } else { parts.len() - 1 - step }];
                    if (step + reader / 2).is_multiple_of(2) {
                        continue;
                    }
                    wanted.resize(part.len, 0);
                    tar.read_exact_at(&mut wanted, part.at).unwrap();
                    found.clear();
                    let path = root.join(&part.path);
                    let mut file = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                    file.read_to_end(&mut found)
                        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                    assert!(wanted == found, "{} differs", path.display());
                }
            });
        }
    });
}

/// What `tarblk stats` says of the device under a mount.
fn stats(session: &Session, mounted: &Path) -> serde_json::Value {
    let said = session.succeed(&["stats", "--json", &device(mounted)]);
    serde_json::from_str::<serde_json::Value>(&said).unwrap()["counters"].take()
}

/// Mounts a URL on ublk and reads it by many at once; the device's counters afterwards.
fn read_over_http(dir: &Path, url: &str, tar: &Path, parts: &[Part]) -> serde_json::Value {
    let mut session = Session::below(dir, "ublk");
    let mounted = session.mount(OsStr::new(url));
    assert!(device(&mounted).starts_with("/dev/ublkb"));
    read_at_once(&mounted, tar, parts);
    let counted = stats(&session, &mounted);
    session.umount();
    assert_eq!(leftovers(session.dir()), Vec::<String>::new());
    assert_eq!(counted["device"]["errors"], 0, "{counted}");
    let fetched = counted["fetch"]["bytes_fetched"]
        .as_u64()
        .unwrap_or_else(|| panic!("{counted}"));
    assert!(fetched > 1 << 20, "so little came over the network: {counted}");
    counted
}

#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn a_layer_over_http_is_read_by_many_at_once() {
    const NAME: &str = "a_layer_over_http_is_read_by_many_at_once";
    let Some(Archive { path: tar, .. }) = debian() else {
        return skip(NAME, NO_LAYER);
    };
    on_ublk(NAME, 500, |dir| {
        let parts = sample(&tar);
        assert!(parts.len() > 100, "only {} files", parts.len());
        let origin = Origin::start().unwrap();
        origin.serve_file("/layer.tar", &tar).unwrap();
        origin.set_link(Link {
            rtt: Duration::from_millis(5),
            rate: None,
        });
        origin.set_faults(at_random(
            11,
            100,
            vec![
                Fault::ResetBefore,
                Fault::ResetWithin(30_000),
                Fault::Status(503, None),
                Fault::ShortBody(100),
            ],
        ));
        let counted = read_over_http(dir, &origin.url("/layer.tar"), &tar, &parts);
        eprintln!("a failing origin: {}", counted["fetch"]);

        if !have("nginx") {
            return skip(&format!("{NAME}, nginx"), "nginx is missing");
        }
        let server = Nginx::start(dir, &tar);
        let counted = read_over_http(dir, &server.url, &tar, &parts);
        eprintln!("nginx: {}", counted["fetch"]);
        drop(server);
        assert_no_devices();
    });
}

/// A web server nobody here wrote, on loopback.
struct Nginx {
    process: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Nginx {
    fn start(dir: &Path, tar: &Path) -> Self {
        let dir = tempfile::tempdir_in(dir).unwrap();
        std::os::unix::fs::symlink(tar, dir.path().join("layer.tar")).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let configuration = format!(
            "daemon off; master_process off; user root; error_log stderr crit; pid {0}/pid; events {{}}\n\
             http {{ access_log off; client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c;\n\
             uwsgi_temp_path {0}/d; scgi_temp_path {0}/e; server {{ listen {address}; root {0}; }} }}\n",
            dir.path().display()
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, configuration).unwrap();
        let process = Command::new("nginx").arg("-c").arg(&file).spawn().unwrap();
        let server = Self {
            process,
            url: format!("http://{address}/layer.tar"),
            _dir: dir,
        };
        let answers = || std::net::TcpStream::connect(address).is_ok();
        wait_until("an answer of nginx", answers);
        server
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---------------------------------------------------------------------------------------------- a daemon that is killed

/// A program that reads a file to its end.
struct Reader(Child);

impl Reader {
    fn start(file: &Path) -> Self {
        let reader = Command::new("cat")
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(reader)
    }

    /// How it ended, if it has.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `kill -9` of the daemon with reads in flight: they wait instead of failing, because the device can be recovered and its
/// requests are issued again (`USER_RECOVERY`, `USER_RECOVERY_REISSUE`); `ps` says what happened, nothing is taken away that
/// is in use, and then nothing is left: no device, no number, no file. Three times over, because a lost device would show in
/// the next one's number.
#[test]
#[ignore = "a virtual machine: tools/test guest"]
fn a_killed_daemon_leaves_no_lost_device() {
    on_ublk("a_killed_daemon_leaves_no_lost_device", 250, |dir| {
        let work = tempfile::tempdir_in(dir).unwrap();
        let tar = work.path().join("layer.tar");
        let content = noise(4 << 20, 3);
        let layer = RawTar::new().file(b"small", b"a word").file(b"big", &content).end();
        fs::write(&tar, &layer.0).unwrap();
        let devices: BTreeSet<String> = (0..3).map(|_| kill_while_reading(dir, &tar)).collect();
        assert_eq!(devices.len(), 1, "a device was lost: {devices:?}");
    });
}

/// Kills what serves a device and cleans up; which device it was.
fn kill_while_reading(dir: &Path, tar: &Path) -> String {
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", tar).unwrap();
    let mut session = Session::below(dir, "ublk");
    let mounted = session.mount(OsStr::new(&origin.url("/layer.tar")));
    let device = device(&mounted);
    let size = fs::metadata(mounted.join("big")).unwrap().size();
    assert_eq!(size, 4 << 20);

    // From now on no byte comes, so what is read next is in flight when the daemon dies.
    let before = origin.counters().requests;
    origin.set_faults(|_: &_| vec![Fault::Silence]);
    let mut reader = Reader::start(&mounted.join("big"));
    wait_until("a request", || origin.counters().requests > before);
    let listed = ps(&session);
    assert_eq!(
        (&listed["device"], &listed["status"]),
        (&device.clone().into(), &"serving".into())
    );
    servers::kill_below(session.dir());
    wait_until("the service's death", || ps(&session)["status"] == "dead");

    // The kernel takes a moment to notice.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(reader.ended(), None, "a read ended that nobody answered");
    assert!(Path::new(&device).exists(), "the device is gone under its mount");
    let refused = session.run(&["detach", &device]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    assert!(why.contains(mounted.to_str().unwrap()), "it does not say where: {why}");
    let refused = session.run(&[OsStr::new("umount"), mounted.as_os_str()]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{why}");
    assert!(
        why.contains(&reader.0.id().to_string()),
        "it does not say by whom: {why}"
    );
    assert_eq!(reader.ended(), None, "a refusal ended a read");

    // The reader can be ended, but its read cannot: only taking the device down ends that.
    drop(reader);
    session.umount();
    assert!(!is_mounted(&mounted));
    assert_eq!(leftovers(session.dir()), Vec::<String>::new());
    assert_no_devices();
    device
}

/// The only line of `tarblk ps`.
fn ps(session: &Session) -> serde_json::Value {
    let said = session.succeed(&["ps", "--json"]);
    let mut listed: Vec<serde_json::Value> = serde_json::from_str(&said).unwrap();
    assert_eq!(listed.len(), 1, "{said}");
    listed.remove(0)
}
