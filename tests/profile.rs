//! Starts that were recorded: what the next one asks for ahead of its reader, what other images gain from it, what a damaged or hostile
//! profile does (nothing), how it goes to a registry and comes back, and whether a trace says what was read.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod containers;
mod scripted;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::noise::noise;
use common::packed::gzip;
use common::rawtar::RawTar;
use common::servers;
use common::session::Session;
use common::wait::wait_until;
use containers::Workshop;
use scripted::TestRegistry;
use serde_json::{Value, json};
use tarblk::internals::bench::origin::{Link, Origin};
use tarblk::internals::profile::{MAX_PROFILE_BYTES, Profile};

/// A chunk, by which layers are fetched.
const CHUNK: u64 = 32 << 10;
/// Files of a layer, each of several chunks, and the ones that a start reads.
const FILES: u64 = 40;
const READ: [u64; 5] = [31, 7, 8, 25, 20];
const FILE_BYTES: usize = 400_000;

/// A layer of files that no read-ahead connects: each in a directory of its own.
fn tar(seed: u64) -> Vec<u8> {
    let mut tar = RawTar::new();
    for n in 0..FILES {
        tar = tar
            .dir(format!("layer{seed}-{n}/").as_bytes())
            .file(name(seed, n).as_bytes(), &content(seed, n));
    }
    tar.end().0
}

fn name(seed: u64, n: u64) -> String {
    format!("layer{seed}-{n}/file")
}

fn content(seed: u64, n: u64) -> Vec<u8> {
    noise(FILE_BYTES, seed * 1000 + n)
}

/// Reads files of a mounted layer and compares them.
fn start(dir: &Path, seed: u64, files: &[u64]) {
    for n in files {
        assert!(
            fs::read(dir.join(name(seed, *n))).unwrap() == content(seed, *n),
            "file {n}"
        );
    }
}

/// The chunks of a plain layer that lie in ranges that a server was asked for.
fn chunks(ranges: impl IntoIterator<Item = (u64, u64)>) -> BTreeSet<u64> {
    ranges
        .into_iter()
        .flat_map(|(first, end)| first / CHUNK..end.div_ceil(CHUNK))
        .collect()
}

/// A session with a layer on a web server, and the layer's index.
struct Lab {
    session: Session,
    origin: Origin,
    url: String,
    index: PathBuf,
}

impl Lab {
    fn new(test: &str) -> Option<Self> {
        if let Some(why) = common::no_loop_mounts() {
            common::skip(test, why);
            return None;
        }
        let session = Session::new("loop");
        let layer = session.dir().join("layer.tar");
        fs::write(&layer, tar(1)).unwrap();
        let index = session.dir().join("layer.tarblk");
        session.succeed(&["index", layer.to_str().unwrap(), "-o", index.to_str().unwrap()]);
        let origin = Origin::start().unwrap();
        origin.serve_file("/layer.tar", &layer).unwrap();
        origin.set_link(Link {
            rtt: Duration::from_millis(5),
            rate: None,
        });
        let url = origin.url("/layer.tar");
        Some(Self {
            session,
            origin,
            url,
            index,
        })
    }

    fn mount(&mut self) -> PathBuf {
        let options = ["--index", self.index.to_str().unwrap()].map(OsString::from);
        self.session.mount_with(&self.url, &options)
    }

    fn profiles(&self) -> PathBuf {
        self.session.dir().join("cache/profiles")
    }

    /// One start from a cold cache in which only profiles are; the chunks that were asked for.
    fn start(&mut self, files: &[u64]) -> BTreeSet<u64> {
        self.forget_bytes();
        drop(self.origin.take_log());
        let dir = self.mount();
        start(&dir, 1, files);
        self.session.umount();
        self.asked()
    }

    /// Nothing is kept but profiles.
    fn forget_bytes(&self) {
        for entry in fs::read_dir(self.session.dir().join("cache")).into_iter().flatten() {
            let entry = entry.unwrap();
            if entry.file_name() != "profiles" {
                fs::remove_dir_all(entry.path())
                    .or_else(|_| fs::remove_file(entry.path()))
                    .unwrap();
            }
        }
    }

    fn asked(&self) -> BTreeSet<u64> {
        self.origin.settle();
        let log = self.origin.log();
        chunks(
            log.events
                .iter()
                .filter(|event| event.method == "GET")
                .filter_map(|event| event.range),
        )
    }

    /// The profiles that are kept, but for the trace.
    fn kept(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.profiles()).into_iter().flatten();
        let all = entries.map(|entry| entry.unwrap().path());
        all.filter(|path| path.extension().is_none()).collect()
    }
}

#[test]
fn what_a_start_reads_the_next_one_has_before_it_asks() {
    let Some(mut lab) = Lab::new("what_a_start_reads_the_next_one_has_before_it_asks") else {
        return;
    };
    let first = lab.start(&READ);
    let [kept] = &lab.kept()[..] else {
        panic!("one profile of one layer: {:?}", lab.kept())
    };
    let bytes = fs::read(kept).unwrap();
    assert!(bytes.len() < 1000, "{} bytes", bytes.len());
    let profile = Profile::parse(&bytes).unwrap();
    assert_eq!(profile.runs(), 1);

    // Mounted, and nothing is read: all of it comes, and nothing else.
    lab.forget_bytes();
    drop(lab.origin.take_log());
    let dir = lab.mount();
    let stats = |lab: &Lab| -> Value {
        serde_json::from_str(&lab.session.succeed(&["stats", "--json", dir.to_str().unwrap()])).unwrap()
    };
    wait_until("that what the profile names is there", || {
        stats(&lab)["counters"]["fetch"]["bytes_fetched"].as_u64().unwrap() >= profile.bytes()
    });
    let ahead = lab.asked();
    assert!(ahead.is_subset(&first), "{ahead:?} {first:?}");
    // No smaller than half of what a link may hold that is not known yet.
    let requests = lab.origin.log().events.len();
    assert!(requests <= 24, "{requests} requests for {} chunks", ahead.len());
    // Whoever reads now waits for nothing.
    start(&dir, 1, &READ);
    assert_eq!(lab.asked(), ahead, "nothing is missing");
    let trace: Value = serde_json::from_str(&lab.session.succeed(&["trace", "--json", dir.to_str().unwrap()])).unwrap();
    let from: BTreeSet<&str> = trace["reads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|read| read["from"].as_str().unwrap())
        .collect();
    assert!(!from.contains("origin"), "{from:?}");
    lab.session.umount();
    assert_eq!(Profile::parse(&fs::read(kept).unwrap()).unwrap().runs(), 2);
}

#[test]
fn it_follows_what_starts_read_now() {
    let Some(mut lab) = Lab::new("it_follows_what_starts_read_now") else {
        return;
    };
    let other = [1, 33, 37, 12, 28, 16];
    lab.start(&READ);
    let both = lab.start(&other);
    // The first program's files came ahead and were of no use: little more than they is lost.
    assert!(both.len() < 160, "{} chunks", both.len());
    for _ in 0..4 {
        lab.start(&other);
    }
    let now = lab.start(&other);
    let of = |files: &[u64]| -> usize { files.len() * (FILE_BYTES / 32_768 + 2) };
    assert!(
        now.len() <= of(&other),
        "{} chunks for {} files",
        now.len(),
        other.len()
    );
    let mut session = lab.session;
    let shown = session.succeed(&[
        "profile",
        "show",
        &lab.url,
        "--index",
        lab.index.to_str().unwrap(),
        "--files",
    ]);
    for n in other {
        assert!(shown.contains(&format!("/{}", name(1, n))), "{shown}");
    }
    assert!(!shown.contains(&format!("/{}", name(1, READ[0]))), "{shown}");
    session.succeed(&["profile", "rm", "--all"]);
    let shown = session.succeed(&["profile", "show", &lab.url, "--index", lab.index.to_str().unwrap()]);
    assert!(shown.contains("learned    nothing"), "{shown}");
    let dir = session.mount(lab.url.as_ref());
    drop(dir);
    session.umount();
}

#[test]
fn damaged_and_hostile_profiles_do_nothing() {
    let Some(mut lab) = Lab::new("damaged_and_hostile_profiles_do_nothing") else {
        return;
    };
    let honest = lab.start(&READ);
    let kept = lab.kept().pop().unwrap();
    let good = fs::read(&kept).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    // Everything in a layer whose length is a lie, a thousand times.
    let lie = Profile::parse(&good).unwrap();
    let mut lies = vec![
        ("a flipped bit", flipped),
        ("cut short", good[..good.len() / 2].to_vec()),
    ];
    lies.push(("nothing", Vec::new()));
    lies.push(("noise", noise(MAX_PROFILE_BYTES + 1, 1)));
    lies.push(("another layer's", other_layers(&lie).to_bytes(MAX_PROFILE_BYTES)));
    for (what, bytes) in lies {
        fs::write(&kept, bytes).unwrap();
        let asked = lab.start(&READ);
        assert!(asked.len() <= honest.len() + 70, "{what}: {} chunks", asked.len());
        let now = Profile::parse(&fs::read(&kept).unwrap()).unwrap();
        assert_eq!(now.runs(), 1, "{what}: learned anew");
    }
    // A link or a directory in its place is no profile either, and nothing is written through it.
    let elsewhere = lab.session.dir().join("elsewhere");
    fs::write(&elsewhere, "mine").unwrap();
    fs::remove_file(&kept).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &kept).unwrap();
    lab.start(&READ);
    assert_eq!(fs::read(&elsewhere).unwrap(), b"mine");
    assert!(fs::symlink_metadata(&kept).unwrap().is_file());
}

/// The same of a layer that is longer than any, so that nothing of it fits.
fn other_layers(profile: &Profile) -> Profile {
    let mut layers = profile.layers().to_vec();
    for layer in &mut layers {
        layer.size = u64::from(u32::MAX) * CHUNK;
    }
    Profile::new(layers)
}

#[test]
fn a_trace_says_what_was_read() {
    let Some(mut lab) = Lab::new("a_trace_says_what_was_read") else {
        return;
    };
    let trace = |lab: &Lab, arguments: &[&str]| -> Value {
        serde_json::from_str(&lab.session.succeed(&[&["trace", "--json"], arguments].concat())).unwrap()
    };
    let nothing = lab.session.run(&["trace", "--last"]);
    assert!(!nothing.status.success());
    let dir = lab.mount();
    let mounted = dir.to_str().unwrap().to_owned();
    start(&dir, 1, &READ);
    let live = trace(&lab, &[&mounted]);
    let paths: Vec<&str> = live["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["path"].as_str().unwrap())
        .collect();
    let wanted: Vec<String> = READ.iter().map(|n| format!("/{}", name(1, *n))).collect();
    assert_eq!(paths, wanted, "in the order in which they were read");
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value}"));
    let blocks = u64::try_from(FILE_BYTES).unwrap().next_multiple_of(4096);
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    let mut last = 0;
    for read in live["reads"].as_array().unwrap() {
        *sums.entry(number(&read["file"])).or_default() += number(&read["bytes"]);
        assert!(number(&read["at_us"]) >= last);
        last = number(&read["at_us"]);
    }
    for (file, sum) in &live["files"]
        .as_array()
        .unwrap()
        .iter()
        .zip(0..)
        .map(|(file, n)| (file, sums[&n]))
        .collect::<Vec<_>>()
    {
        assert_eq!(number(&file["size"]), u64::try_from(FILE_BYTES).unwrap());
        assert!(
            (u64::try_from(FILE_BYTES).unwrap()..=blocks).contains(sum),
            "{file}: {sum}"
        );
        assert_eq!(
            number(&file["memory"]) + number(&file["disk"]) + number(&file["origin"]),
            *sum
        );
    }
    let is_slow = |file: &Value| number(&file["origin"]) > 0 && number(&file["longest_wait_us"]) >= 5000;
    assert!(
        live["files"].as_array().unwrap().iter().all(is_slow),
        "a round trip is 5 ms: {live:#}"
    );
    // Nothing is read twice from the device, and the text says the same.
    let text = lab.session.succeed(&["trace", &mounted]);
    assert!(wanted.iter().all(|path| text.contains(path.as_str())), "{text}");
    let report = lab.session.dir().join("start.html");
    lab.session
        .succeed(&["trace", &mounted, "--report", report.to_str().unwrap()]);
    let page = fs::read_to_string(&report).unwrap();
    assert!(page.contains(&wanted[0]) && page.contains("class=\"origin\"") && !page.contains("<script"));
    lab.session.umount();
    // The device is gone, the trace of its start is not.
    let gone = trace(&lab, &["--last"]);
    assert_eq!(gone["files"], live["files"]);
    assert_eq!((&gone["is_over"], &live["is_over"]), (&json!(true), &json!(false)));
    // Again, with everything in the disk cache.
    let dir = lab.mount();
    start(&dir, 1, &READ);
    let again = trace(&lab, &[dir.to_str().unwrap()]);
    assert!(
        again["files"]
            .as_array()
            .unwrap()
            .iter()
            .all(|file| number(&file["origin"]) == 0),
        "{again:#}"
    );
    assert_eq!(
        trace(&lab, &["--last"])["files"],
        again["files"],
        "the last is the one that is attached"
    );
    lab.session.umount();
}

#[test]
fn a_service_that_was_killed_knows_no_start_and_takes_no_harm() {
    let Some(mut lab) = Lab::new("a_service_that_was_killed_knows_no_start_and_takes_no_harm") else {
        return;
    };
    lab.start(&READ);
    let kept = lab.kept().pop().unwrap();
    let before = fs::read(&kept).unwrap();
    lab.forget_bytes();
    let dir = lab.mount();
    start(&dir, 1, &READ[..1]);
    let service = fs::read_to_string(lab.session.dir().join("states/service.lock")).unwrap();
    servers::kill(&[service.trim().parse().unwrap()]);
    start(&dir, 1, &READ);
    let refused = lab.session.run(&["trace", dir.to_str().unwrap()]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("its start was before this process"), "{said}");
    lab.session.umount();
    assert_eq!(fs::read(&kept).unwrap(), before, "half a start is none");
    assert!(lab.start(&READ).len() < 100);
}

/// Puts an image into a registry.
fn put_image(registry: &TestRegistry, name: &str, tars: &[Vec<u8>]) {
    let blobs: Vec<Vec<u8>> = tars.iter().map(|tar| gzip(tar)).collect();
    let both = tars.iter().zip(&blobs);
    let layers: Vec<_> = both
        .map(|(tar, blob)| (&**tar, &**blob, "application/vnd.oci.image.layer.v1.tar+gzip"))
        .collect();
    registry.put_image(name, "latest", &layers);
}

/// How this test talks to its registry, and whom it believes.
const REGISTRY: [&str; 6] = [
    "--platform",
    "linux/amd64",
    "--hosts-dir",
    "/nonexistent",
    "--trust",
    "registry",
];

fn options() -> Vec<OsString> {
    REGISTRY.iter().map(OsString::from).collect()
}

/// Waits until so many bytes came out of decoders, though nothing was read, and nothing more comes.
fn until_here(bytes: u64, stats: impl Fn() -> Value) {
    let counted = |name: &str| stats()["counters"]["fetch"][name].as_u64().unwrap();
    let mut last = None;
    for _ in 0..600 {
        let fetched = counted("bytes_fetched");
        if counted("bytes_decoded") >= bytes && last == Some(fetched) {
            return;
        }
        last = Some(fetched);
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("it does not come: {}", stats());
}

/// The bytes of ranges of a layer's blob that were asked for, once each.
fn ranges(registry: &TestRegistry) -> u64 {
    registry
        .take_log()
        .iter()
        .filter(|asked| asked.path.contains("/blobs/") && asked.headers.contains_key("range"))
        .map(|asked| asked.sent)
        .sum()
}

#[test]
fn images_that_share_layers_learn_from_each_other() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("images_that_share_layers_learn_from_each_other", why);
    }
    let registry = TestRegistry::start();
    let (base, one, other) = (tar(1), tar(2), tar(3));
    put_image(&registry, "one", &[base.clone(), one]);
    put_image(&registry, "other", &[base, other]);
    let mut session = Session::new("loop");
    for image in ["one", "other"] {
        let name = registry.name(&format!("{image}:latest"));
        session.succeed(&[&["index", "push", &name, "--spacing", "64KiB"], &REGISTRY[..4]].concat());
    }
    let dir = session.mount_with(registry.name("one:latest"), &options());
    start(&dir, 1, &READ);
    start(&dir, 2, &[3]);
    session.umount();
    let kept = fs::read_dir(session.dir().join("cache/profiles")).unwrap().count();
    assert_eq!(kept, 4, "of the image, of each of its layers, and the trace");
    for part in ["layers", "hot"] {
        fs::remove_dir_all(session.dir().join("cache").join(part)).unwrap();
    }
    // What comes of the shared layer comes before anything is read.
    let dir = session.mount_with(registry.name("other:latest"), &options());
    let mounted = dir.to_str().unwrap().to_owned();
    let hints = || -> Value { serde_json::from_str(&session.succeed(&["stats", "--json", &mounted])).unwrap() };
    let wanted = u64::try_from(READ.len() * FILE_BYTES).unwrap();
    until_here(wanted, hints);
    registry.take_log();
    start(&dir, 1, &READ);
    assert_eq!(ranges(&registry), 0, "all of it is here");
    session.umount();
}

#[test]
fn a_published_profile_comes_with_the_index() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("a_published_profile_comes_with_the_index", why);
    }
    for referrers_api in [true, false] {
        let registry = TestRegistry::start();
        registry.rules(|rules| rules.referrers_api = referrers_api);
        put_image(&registry, "app", &[tar(1), tar(2)]);
        let name = registry.name("app:latest");
        let mut session = Session::new("loop");
        let run = |session: &Session, arguments: &[&str]| session.succeed(&[arguments, &REGISTRY[..]].concat());
        session.succeed(&[&["index", "push", &name, "--spacing", "64KiB"], &REGISTRY[..4]].concat());
        // Without a start there is nothing to publish.
        let early = session.run(&[&["profile", "push", &name], &REGISTRY[..]].concat());
        assert!(
            String::from_utf8(early.stderr)
                .unwrap()
                .contains("no start of it was recorded")
        );
        let early = session.run(&[&["profile", "pull", &name], &REGISTRY[..]].concat());
        assert!(
            String::from_utf8(early.stderr)
                .unwrap()
                .contains("no profile is published")
        );

        session.empty_cache();
        registry.take_log();
        let dir = session.mount_with(&name, &options());
        // What the device's fetcher asks for is not what finding things takes.
        let finding = |registry: &TestRegistry| {
            let log = registry.take_log();
            log.iter()
                .filter(|asked| !asked.path.contains("/blobs/") || asked.method == "HEAD")
                .count()
        };
        let before = finding(&registry);
        start(&dir, 1, &READ);
        start(&dir, 2, &[9]);
        session.umount();
        let pushed: Value = serde_json::from_str(&run(&session, &["profile", "push", &name, "--json"])).unwrap();
        assert!(pushed["file_bytes"].as_u64().unwrap() < 2000, "{pushed}");
        // A second time changes nothing.
        let again: Value = serde_json::from_str(&run(&session, &["profile", "push", &name, "--json"])).unwrap();
        assert_eq!(pushed["artifact"], again["artifact"]);

        // Another machine.
        session.empty_cache();
        registry.take_log();
        let dir = session.mount_with(&name, &options());
        let mounted = dir.to_str().unwrap().to_owned();
        let stats = || -> Value { serde_json::from_str(&session.succeed(&["stats", "--json", &mounted])).unwrap() };
        let wanted = u64::try_from((READ.len() + 1) * FILE_BYTES).unwrap();
        until_here(wanted, stats);
        let after = finding(&registry);
        assert!(
            after <= before,
            "{after} requests to find everything, {before} without a profile"
        );
        start(&dir, 1, &READ);
        start(&dir, 2, &[9]);
        assert_eq!(ranges(&registry), 0, "all of it was here");
        session.umount();
        session.empty_cache();
        run(&session, &["profile", "pull", &name]);
        let shown = run(&session, &["profile", "show", &name]);
        assert!(shown.contains("published  from 1 start"), "{shown}");
        // What indexes are pinned by is the artifact that has both.
        let artifact = pushed["artifact"].as_str().unwrap();
        let dir = session.mount_with(
            &name,
            &[&options()[..], &["--index-digest".into(), artifact.into()]].concat(),
        );
        start(&dir, 1, &READ);
        session.umount();
    }
}

#[test]
fn a_published_lie_costs_little() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("a_published_lie_costs_little", why);
    }
    let registry = TestRegistry::start();
    put_image(&registry, "app", &[tar(1)]);
    let name = registry.name("app:latest");
    let mut session = Session::new("loop");
    session.succeed(&[&["index", "push", &name, "--spacing", "64KiB"], &REGISTRY[..4]].concat());
    // The one who publishes reads everything but what others read.
    let others: Vec<u64> = (0..FILES).filter(|n| !READ.contains(n)).collect();
    let dir = session.mount_with(&name, &options());
    start(&dir, 1, &others);
    session.umount();
    session.succeed(&[&["profile", "push", &name], &REGISTRY[..]].concat());
    session.empty_cache();
    let dir = session.mount_with(&name, &options());
    start(&dir, 1, &READ);
    session.umount();
    // What was learned here counts from now on.
    let shown = session.succeed(&[&["profile", "show", &name, "--files"], &REGISTRY[..]].concat());
    assert!(shown.contains("learned    from 1 start"), "{shown}");
    assert!(READ.iter().all(|n| shown.contains(&name_of(*n))), "{shown}");
    assert!(!shown.contains(&name_of(others[0])), "{shown}");
}

fn name_of(n: u64) -> String {
    format!("/{}\n", name(1, n))
}

#[test]
fn indexes_are_pushed_with_what_a_command_reads() {
    let Some(workshop) = Workshop::new("indexes_are_pushed_with_what_a_command_reads", &["runc"]) else {
        return;
    };
    let registry = TestRegistry::start();
    let program = common::succeed(std::process::Command::new("sh").args(["-c", "cat \"$(command -v busybox)\""]));
    let shell = RawTar::new()
        .dir(b"bin/")
        .entry(
            common::rawtar::Header::new(b'0', b"bin/sh")
                .mode(0o755)
                .size(u64::try_from(program.len()).unwrap()),
            &program,
        )
        .end()
        .0;
    put_image(&registry, "app", &[shell, tar(1)]);
    let name = registry.name("app:latest");
    let command = format!(
        "read -r line </{0}; read -r line </{1}; true",
        name_of(31).trim(),
        name_of(8).trim()
    );
    let command = command.replace("//", "/");
    let failed = workshop
        .tarblk(&[&["index", "push", &name, "--run", "exit 3"], &REGISTRY[..4]].concat())
        .output()
        .unwrap();
    assert!(
        String::from_utf8(failed.stderr)
            .unwrap()
            .contains("ended with status 3")
    );
    let pushed = workshop.json(&[&["index", "push", &name, "--run", &command, "--json"], &REGISTRY[..4]].concat());
    assert!(pushed["artifact"].is_string(), "{pushed}");
    let shown = workshop.json(
        &[
            &["profile", "show", &name, "--json", "--cache", &workshop.at("other")],
            &REGISTRY[..],
        ]
        .concat(),
    );
    assert_eq!(shown["published"]["runs"], 1, "{shown}");
    let pulled = workshop.json(
        &[
            &["profile", "pull", &name, "--json", "--cache", &workshop.at("other")],
            &REGISTRY[..],
        ]
        .concat(),
    );
    assert!(pulled["bytes"].as_u64().unwrap() > 0, "{pulled}");
    let shown = workshop.json(
        &[
            &["profile", "show", &name, "--json", "--cache", &workshop.at("other")],
            &REGISTRY[..],
        ]
        .concat(),
    );
    let files: Vec<&str> = shown["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["path"].as_str().unwrap())
        .collect();
    for wanted in ["/bin/sh", name_of(31).trim(), name_of(8).trim()] {
        assert!(files.contains(&wanted), "{files:?}");
    }
    assert!(!files.contains(&name_of(20).trim()), "{files:?}");
    workshop.assert_gone();
}
