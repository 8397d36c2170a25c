//! What a mount says that it downloaded is what the server sent: before the device was there and since, of images with indexes
//! and without.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::ffi::OsString;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::anonymous::registry_options;
use common::noise::noise;
use common::packed::gzip;
use common::rawtar::RawTar;
use common::session::Session;
use common::wait::wait_until;
use scripted::{Asked, TestRegistry};
use serde_json::Value;
use tarblk::internals::bench::origin::Origin;
use tarblk::internals::fetch::{KnownBy, PrepareCost};
use tarblk::internals::open::publish::{PushOptions, push};
use tarblk::internals::open::{Cache, IndexChoice, OpenOptions, TrustPolicy, Unwatched, prepare};
use tarblk::internals::source::registry::Reference;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// What comes is counted for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tar(seed: u64) -> Vec<u8> {
    let lines: Vec<String> = (0..40_000).map(|n| format!("line {n} of layer {seed}\n")).collect();
    RawTar::new()
        .dir(format!("layer{seed}/").as_bytes())
        .file(format!("layer{seed}/text").as_bytes(), lines.concat().as_bytes())
        .file(format!("layer{seed}/noise").as_bytes(), &noise(2_000_000, seed))
        .end()
        .0
}

/// Puts an image into a registry; its blobs' lengths together.
fn put_image(registry: &TestRegistry, name: &str, tars: &[Vec<u8>], kind: &str) -> u64 {
    let blobs: Vec<Vec<u8>> = tars
        .iter()
        .map(|tar| if kind == GZIP { gzip(tar) } else { tar.clone() })
        .collect();
    let both = tars.iter().zip(&blobs);
    let layers: Vec<_> = both.map(|(tar, blob)| (&**tar, &**blob, kind)).collect();
    registry.put_image(name, "latest", &layers);
    blobs.iter().map(|blob| u64::try_from(blob.len()).unwrap()).sum()
}

/// Where there is a referrers API, the question for its fallback is not waited for, and its answer comes at any time.
/// A registry whose fallback tag is waited for, so that its answer is in the costs and in the log.
fn without_referrers_api() -> TestRegistry {
    let registry = TestRegistry::start();
    registry.rules(|rules| rules.referrers_api = false);
    registry
}

fn publish(registry: &TestRegistry, name: &str) {
    let reference = Reference::parse(&format!("{}/{name}:latest", registry.host())).unwrap();
    push(
        &reference,
        &registry_options(2),
        &PushOptions::new(64 << 10),
        &mut Unwatched,
    )
    .unwrap();
    registry.take_log();
}

fn options(cache: Option<&Path>, index: IndexChoice) -> OpenOptions {
    OpenOptions {
        index,
        cache: cache.map(|dir| Cache::new(dir).unwrap()),
        trust: TrustPolicy::of_registry(),
        registry: registry_options(2),
        ..OpenOptions::default()
    }
}

/// The bytes of all bodies that a server has sent.
fn sent<'a>(asked: impl IntoIterator<Item = &'a Asked>) -> u64 {
    asked.into_iter().map(|asked| asked.sent).sum()
}

fn kinds(cost: &PrepareCost) -> Vec<KnownBy> {
    cost.layers.iter().map(|layer| layer.known_by).collect()
}

#[test]
fn what_preparing_costs_is_what_the_server_sent() {
    let _alone = alone();
    let registry = without_referrers_api();
    let tars = [tar(1), tar(2)];
    let all = put_image(&registry, "app", &tars, GZIP);
    let name = registry.name("app:latest");
    let cost_of = |options: &OpenOptions| {
        registry.take_log();
        let prepared = prepare(&name, options, &mut Unwatched).unwrap();
        (prepared.cost, registry.take_log())
    };
    // Without an index anywhere all of it comes.
    let (cost, log) = cost_of(&options(None, IndexChoice::Auto));
    let layers = sent(log.iter().filter(|asked| asked.sent > 1_000_000));
    assert_eq!(kinds(&cost), [KnownBy::WholeDownload; 2]);
    assert_eq!((cost.bytes_layers, cost.remote_bytes()), (all, all));
    // The header field of a blob that is no index was followed, in vain.
    assert!(cost.bytes_indexes < all, "{cost:?}");
    assert_eq!(cost.layers.iter().map(|layer| layer.downloaded).sum::<u64>(), layers);
    assert_eq!(cost.downloaded(), sent(&log), "{log:#?}");
    // With published indexes, hardly anything; and that is called what it is.
    publish(&registry, "app");
    let cache = common::scratch("cost-");
    let (cost, log) = cost_of(&options(Some(cache.path()), IndexChoice::Auto));
    assert_eq!(kinds(&cost), [KnownBy::PublishedIndex; 2]);
    let ranges = sent(log.iter().filter(|asked| asked.headers.contains_key("range")));
    assert_eq!((cost.bytes_indexes, cost.bytes_layers), (ranges, 0));
    assert_eq!(cost.bytes_manifests, sent(&log) - ranges);
    assert!(cost.downloaded() < all / 10, "{cost:?}");
    // Kept here, only the tag is asked for.
    let (cost, log) = cost_of(&options(Some(cache.path()), IndexChoice::Auto));
    assert_eq!(kinds(&cost), [KnownBy::CachedIndex; 2]);
    assert_eq!((cost.bytes_indexes, cost.bytes_layers), (0, 0));
    assert_eq!((cost.bytes_manifests, log.len()), (sent(&log), 1));
}

#[test]
fn plain_layers_are_read_by_their_headers() {
    let _alone = alone();
    let registry = without_referrers_api();
    put_image(&registry, "plain", &[tar(3)], PLAIN);
    let name = registry.name("plain:latest");
    let prepared = prepare(&name, &options(None, IndexChoice::Auto), &mut Unwatched).unwrap();
    let cost = prepared.cost;
    assert_eq!(kinds(&cost), [KnownBy::Headers]);
    assert!(
        cost.bytes_layers > 0 && cost.bytes_layers < cost.remote_bytes(),
        "{cost:?}"
    );
    // A server may have sent what was hung up on.
    assert!(cost.downloaded() <= sent(&registry.take_log()));
}

/// The bytes of a tar's files that a device serves are told apart from those that travelled, and both from those that came
/// before the device.
#[test]
fn stats_tell_from_the_first_byte() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("stats_tell_from_the_first_byte", why);
    }
    let _alone = alone();
    let registry = without_referrers_api();
    let tars = [tar(4), tar(5)];
    let all = put_image(&registry, "app", &tars, GZIP);
    let name = registry.name("app:latest");
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value}"));
    let more = |more: &[&str]| -> Vec<OsString> {
        let registry = ["--platform", "linux/amd64", "--hosts-dir", "/nonexistent"];
        registry.iter().chain(more).map(OsString::from).collect()
    };
    for published in [false, true] {
        if published {
            publish(&registry, "app");
        }
        registry.take_log();
        let mut session = Session::new("loop");
        let dir = session.mount_with(&name, &more(&["--fetch-all", "--trust", "registry"]));
        let mounted = dir.to_str().unwrap().to_owned();
        std::fs::read(dir.join("layer4/text")).unwrap();
        let stats = || -> Value { serde_json::from_str(&session.succeed(&["stats", "--json", &mounted])).unwrap() };
        let mut report = Value::Null;
        wait_until("that all is there", || {
            report = stats();
            report["counters"]["fetch"]["bytes_held"] == report["counters"]["fetch"]["bytes_layers"]
        });
        let log = registry.take_log();
        // One byte is asked for to find out whom to ask.
        let real = || log.iter().filter(|asked| asked.sent != 1);
        let downloaded = &report["downloaded"];
        assert_eq!(number(&downloaded["bytes"]), sent(real()), "{downloaded} {log:#?}");
        assert_eq!(number(&downloaded["of_bytes"]), all);
        assert_eq!(
            number(&downloaded["bytes"]),
            number(&downloaded["to_mount"]["bytes"]) + number(&downloaded["since"])
        );
        assert_eq!(report["lazy"]["lazy"], published);
        let since = number(&downloaded["since"]);
        assert_eq!(
            since >= all,
            published,
            "what is not there yet comes later: {downloaded}"
        );
        let text = session.succeed(&["stats", &mounted]);
        let lines: Vec<&str> = text.lines().take(2).collect();
        let word = if published {
            "yes: indexes of all 2 layers were published"
        } else {
            "no: no index for 2 of 2 layers, so"
        };
        assert!(lines[0].starts_with("lazy ") && lines[0].contains(word), "{text}");
        assert!(
            lines[1].starts_with("downloaded ") && lines[1].contains(" to mount, "),
            "{text}"
        );
        // What is kept is counted as it comes out of the layers.
        assert_eq!(
            number(&report["counters"]["fetch"]["bytes_held"]),
            tars.iter().map(|tar| u64::try_from(tar.len()).unwrap()).sum::<u64>()
        );
        session.umount();
    }
}

#[test]
fn mount_says_in_one_line_what_it_took() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("mount_says_in_one_line_what_it_took", why);
    }
    let _alone = alone();
    let registry = without_referrers_api();
    put_image(&registry, "app", &[tar(6)], GZIP);
    publish(&registry, "app");
    let name = registry.name("app:latest");
    let session = Session::new("loop");
    let dir = session.dir().join("m");
    std::fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    for (more, is_said) in [(&[][..], true), (&["-q"][..], false)] {
        session.empty_cache();
        registry.take_log();
        let base = [
            "mount",
            &name,
            dir,
            "--backend",
            "loop",
            "--json",
            "--platform",
            "linux/amd64",
            "--hosts-dir",
            "/no",
            "--trust",
            "registry",
        ];
        let output = session.run(&[&base[..], more].concat());
        let sent = sent(&registry.take_log());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        session.succeed(&["umount", dir]);
        let lazy: Vec<&str> = said.lines().filter(|line| line.contains("lazy")).collect();
        assert_eq!(lazy.len(), usize::from(is_said), "{said}");
        if is_said {
            let line = "tarblk: lazy yes: the index of the layer was published beside the image; downloaded ";
            assert!(lazy[0].starts_with(line), "{said}");
        }
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        // The device's fetcher may have asked for something already.
        let before = report["downloaded"]["to_mount"]["bytes"].as_u64().unwrap();
        assert!(before > 0 && before <= sent, "{report}");
        assert_eq!(report["lazy"]["lazy"], true);
    }
}

#[test]
fn what_nothing_vouches_for_is_called_unchecked() {
    let _alone = alone();
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("what_nothing_vouches_for_is_called_unchecked", why);
    }
    let session = Session::new("loop");
    let layer = session.dir().join("layer.tar");
    std::fs::write(&layer, tar(8)).unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &layer).unwrap();
    let remote = origin.url("/layer.tar");
    let index = session.dir().join("layer.tarblk");
    session.succeed(&["index", layer.to_str().unwrap(), "-o", index.to_str().unwrap()]);
    // An index that was made of all of it has digests of every part.
    for (source, index, is_unchecked) in [
        (remote.as_str(), None, true),
        (remote.as_str(), Some(&index), false),
        (layer.to_str().unwrap(), None, false),
    ] {
        session.empty_cache();
        let dir = session.dir().join("m");
        std::fs::create_dir_all(&dir).unwrap();
        let dir = dir.to_str().unwrap();
        let mut arguments = vec!["mount", source, dir, "--backend", "loop"];
        if let Some(index) = index {
            arguments.extend(["--index", index.to_str().unwrap()]);
        }
        let output = session.run(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        let (ps, stats) = (session.succeed(&["ps"]), session.succeed(&["stats", dir]));
        let listed: Value = serde_json::from_str(&session.succeed(&["ps", "--json"])).unwrap();
        let counted: Value = serde_json::from_str(&session.succeed(&["stats", "--json", dir])).unwrap();
        session.succeed(&["umount", dir]);
        for text in [&said, &ps, &stats] {
            assert_eq!(text.contains("unchecked"), is_unchecked, "{source}: {text}");
        }
        for trust in [&listed[0]["trust"][0], &counted["state"]["trust"][0]] {
            assert_eq!(trust["bytes"] == "unchecked", is_unchecked, "{source}: {trust}");
        }
    }
}
