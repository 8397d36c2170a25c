//! What must hold of everything that reads what strangers, files and crashes have written, whatever the bytes are. Each target takes
//! any bytes; the fuzzer (`fuzz/fuzz_targets`) looks for those that break it for as long as it is let, and `tests/fuzz_inputs.rs` tries a
//! bounded number that follow from a seed, beginning at the same seeds.

#![allow(dead_code, reason = "a fuzz target uses one of them")]

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Write as _;
use std::time::Duration;

use serde_json::value::RawValue;
use tarblk::internals::cache::disk::fuzzing as cache;
use tarblk::internals::device::state::StateDir;
use tarblk::internals::http::fuzzing::{Judged, Question, judged, judged_first};
use tarblk::internals::layer::{Begins, Coding, Decoder, Indexer, LayerError};
use tarblk::internals::open::Signature;
use tarblk::internals::open::artifact::{LIST_ANNOTATION, Listed, listed_with, naming};
use tarblk::internals::open::trust::{PublicKey, SigningKey};
use tarblk::internals::prefetch::fuzzing as prefetch;
use tarblk::internals::profile::fuzzing::sealed;
use tarblk::internals::profile::{
    MAX_PROFILE_BYTES, Profile, ProfileKey, ProfiledLayer, ReadFrom, RecordedRead, StartRun,
};
use tarblk::internals::source::registry::fuzzing as registry;
use tarblk::{CHUNK_BYTES, LayerId, TarOffset, TarRange};
use zstd::stream::raw::CParameter;

/// No message is longer than this, in characters: whatever a stranger wrote, an excerpt of it is enough, though it may stand there twice,
/// and escaped.
const LONGEST_MESSAGE: usize = 8192;

/// A target: its name, inputs to begin with, and what must hold of any.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    pub(crate) check: fn(&[u8]),
}

/// The program of a target for the fuzzer: it begins at the target's seeds, which take the place of an empty input and, now and then,
/// of another.
#[cfg(fuzzing)]
macro_rules! fuzz {
    ($name:literal) => {
        fn target() -> &'static fuzzed::Target {
            fuzzed::TARGETS
                .iter()
                .find(|target| target.name == $name)
                .expect("a target of this name")
        }
        libfuzzer_sys::fuzz_target!(|data: &[u8]| (target().check)(data));
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            let mut size = size;
            if size <= 1 || seed % 50 == 0 {
                let seeds = (target().seeds)();
                let begin = &seeds[seed as usize / 50 % seeds.len()];
                size = begin.len().min(max_size).min(data.len());
                data[..size].copy_from_slice(&begin[..size]);
            }
            libfuzzer_sys::fuzzer_mutate(data, size, max_size)
        });
    };
}
#[cfg(fuzzing)]
pub(crate) use fuzz;

/// All of them, in the order of the alphabet but for the last, which needs a compressor.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "cache_map",
        seeds: cache_map_seeds,
        check: cache_map,
    },
    Target {
        name: "credentials",
        seeds: credentials_seeds,
        check: credentials,
    },
    Target {
        name: "hosts",
        seeds: hosts_seeds,
        check: hosts,
    },
    Target {
        name: "manifest",
        seeds: manifest_seeds,
        check: manifest,
    },
    Target {
        name: "profile",
        seeds: profile_seeds,
        check: profile,
    },
    Target {
        name: "programs",
        seeds: programs_seeds,
        check: programs,
    },
    Target {
        name: "response",
        seeds: response_seeds,
        check: response,
    },
    Target {
        name: "state",
        seeds: state_seeds,
        check: state,
    },
    Target {
        name: "token",
        seeds: token_seeds,
        check: token,
    },
    Target {
        name: "trust",
        seeds: trust_seeds,
        check: trust,
    },
    Target {
        name: "zstd_blocks",
        seeds: zstd_blocks_seeds,
        check: zstd_blocks,
    },
];

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// A message is short; that no control character of it reaches a terminal is for who prints it, that it has no line of its own, too.
fn message(text: &str) {
    let len = text.chars().count();
    assert!(len <= LONGEST_MESSAGE, "a message of {len} characters: {text:.300}");
}

/// The first byte is taken off as a choice.
fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

// ------------------------------------------------------------------------------------------------------ the gate

fn response_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "\u{1}206\ncontent-range: bytes 10000-59999/100000\ncontent-length: 50000\netag: \"a\"",
        "\u{1}206\ncontent-range: bytes 10000-19999/*",
        "\u{1}206\ncontent-range: bytes 10000-59999/100000\ncontent-encoding: gzip\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT",
        "\u{1}200\ncontent-length: 100000\netag: W/\"a\"",
        "\u{1}200\ncontent-range: bytes 10000-59999/100000\ncontent-length: 50000",
        "\u{1}416\ncontent-range: bytes */100000",
        "\u{1}503\nretry-after: 120",
        "\u{1}429\nretry-after: Wed, 21 Oct 2015 07:28:00 GMT\ndate: Wed, 21 Oct 2015 07:27:00 GMT",
        "\u{1}307\nlocation: http://elsewhere/",
        "\u{0}200\ncontent-length: 0",
        "\u{0}206\ncontent-range: bytes 0-0/18446744073709551615",
    ])
}

/// Whether a `Content-Range` of the head has just this range, by a reading of its own.
fn states(text: &[u8], start: u64, len: u64, size: u64) -> bool {
    text.split(|byte| *byte == b'\n').skip(1).any(|line| {
        let line = String::from_utf8_lossy(line).to_ascii_lowercase();
        let words: String = line.chars().filter(|c| !c.is_whitespace()).collect();
        let last = start + len - 1;
        let range = |total: String| words == format!("content-range:bytes{start}-{last}/{total}");
        // Leading zeros are allowed: compare as numbers then.
        let numbers = || {
            let rest = words.strip_prefix("content-range:bytes")?;
            let (range, total) = rest.split_once('/')?;
            let (first, end) = range.split_once('-')?;
            let total_fits = total == "*" || total.parse::<u64>().ok()? == size;
            Some(first.parse::<u64>().ok()? == start && end.parse::<u64>().ok()? == last && total_fits)
        };
        range("*".to_owned()) || range(size.to_string()) || numbers() == Some(true)
    })
}

fn response(data: &[u8]) {
    let (how, text) = choice(data);
    let asked = Question {
        start: 10_000,
        len: 50_000,
        size: 100_000,
        ranged: how & 1 == 1,
    };
    match judged(text, asked) {
        Some(Judged::Part(len)) => {
            assert!(asked.ranged, "a part that was not asked for");
            assert!(
                len == asked.len || (4096..asked.len).contains(&len),
                "{len} bytes for {asked:?}"
            );
            assert!(states(text, asked.start, len, asked.size), "no header says so");
        }
        Some(Judged::Whole) => assert!(text.starts_with(b"200"), "the whole by another status"),
        Some(Judged::Shut(why)) => why.iter().for_each(|why| message(why)),
        None => {}
    }
    if let Some(first) = judged_first(text, asked.ranged) {
        match first {
            Ok((_, ranges)) => assert!(!ranges || asked.ranged),
            Err(why) => message(&why),
        }
    }
}

// ------------------------------------------------------------------------------------------------------ registries

fn token_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "\u{0}Bearer realm=\"https://auth.example/token\",service=\"registry.example\",scope=\"repository:x/y:pull\"",
        "\u{0}Basic realm=\"x\", Bearer realm=/token; service=a",
        "\u{0}Bearer realm=\"https://auth.example/\\\"x\\\"\" error=\"insufficient_scope\"",
        "\u{1}{\"token\":\"abcdefgh.ijkl\",\"expires_in\":300,\"issued_at\":\"2020-01-01T00:00:00Z\"}",
        "\u{1}{\"access_token\":\"abcdefgh.ijkl\",\"expires_in\":\"60.5\",\"refresh_token\":null}",
        "\u{1}\u{feff}{\"token\":\"abcdefghijkl\",\"expires_in\":1e300}",
    ])
}

fn token(data: &[u8]) {
    const DAY: u64 = 24 * 60 * 60;
    let (how, data) = choice(data);
    if how & 1 == 0 {
        if let Some(realm) = registry::challenge(data).filter(|realm| !realm.is_empty()) {
            assert!(
                realm.starts_with("http://") || realm.starts_with("https://"),
                "a token server at {realm:?}"
            );
        }
    } else if let Some((secret, shown, life)) = registry::token(data) {
        assert!(
            !secret.is_empty() && secret.bytes().all(|byte| byte.is_ascii_graphic()),
            "{secret:?} cannot be sent"
        );
        assert!(life.as_secs() <= DAY, "good for {life:?}");
        assert!(
            shown.starts_with("Token { secret: Secret, until: "),
            "a token is shown: {shown}"
        );
    }
}

fn credentials_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"auths":{"registry.example":{"auth":"dXNlcjpodW50ZXIyaHVudGVyMg=="}}}"#,
        r#"{"auths":{"https://registry.example/v1/":{"username":"user","password":"hunter2hunter2"}}}"#,
        r#"{"auths":{"registry.example/x":{"identitytoken":"hunter2hunter2"},"registry.example":null}}"#,
        r#"{"auths":{"registry.example":{"registrytoken":"hunter2hunter2"}},"credsStore":""}"#,
        r#"{"auths":{"registry.example":{"auth":"!"}},"credHelpers":null}"#,
        r#"{"credHelpers":{"registry.example":"pass"}}"#,
        // Secrets that are a part of how a login is shown.
        r#"{"auths":{"registry.example/x":{"identitytoken":"dentity(Secret"},"registry.example":null}}"#,
    ])
}

fn credentials(data: &[u8]) {
    match registry::login(data, "registry.example", "x/y") {
        Ok(Some((shown, secret))) => {
            // Whatever the secret is: it may be a part of these words by chance.
            let hides = matches!(&*shown, "Anonymous" | "Identity(Secret)" | "Bearer(Secret)")
                || (shown.starts_with("Password { user: ") && shown.ends_with(", password: Secret }"));
            assert!(hides, "{secret:?} is shown: {shown}");
        }
        Ok(None) => {}
        Err(why) => {
            message(&why);
            // A message may name an entry, and say what is wrong with it, in words of its own.
            let known = [
                "not a credentials file",
                "auth is not base64",
                "auth is not text",
                "credentials are written user:password",
            ];
            assert!(
                known.iter().any(|known| why.contains(known)),
                "an unknown message: {why}"
            );
        }
    }
}

fn hosts_seeds() -> Vec<Vec<u8>> {
    texts(&[
        "server = \"https://registry.example\"\n[host.\"https://mirror.example\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"https://mirror.example\".header]\nAuthorization = [\"Basic hunter2hunter2\"]\n",
        "[host.\"http://127.0.0.1:5000/v2/cache\"]\noverride_path = true\nskip_verify = true\nca = [\"/x.pem\", \"y.pem\"]\nclient = [[\"a.cert\", \"a.key\"], \"b.pem\"]\n",
        "server = \"registry.example:5000\"\nca = \"x\"\n[header]\nx-token = \"hunter2hunter2\"\n",
        "[host.\"https://user:hunter2hunter2@mirror.example?sig=hunter2hunter2\"]\n",
        "[host]\n[host.\"ftp://x\"]\n",
        "server = \"registry.example\"\n[host.\"https://mirror.example\"]\nca = [\"Basic hunter2hunter2\"]\n",
    ])
}

fn hosts(data: &[u8]) {
    /// A password in the seeds; the fuzzer does not make another of it.
    const SECRET: &str = "hunter2hunter2";
    let Ok(text) = std::str::from_utf8(data) else { return };
    match registry::hosts(text) {
        Ok(endpoints) => {
            assert!(!endpoints.is_empty(), "no endpoint, not even the registry itself");
            // A header's value is secret; the same words in a path are not.
            for (shown, without_headers) in endpoints {
                assert_eq!(shown, without_headers);
            }
        }
        Err(why) => {
            message(&why);
            // In front of the host it is a password; behind a slash it is a path.
            for (at, _) in why.match_indices(&format!(":{SECRET}@")) {
                let word = why[..at].rsplit([' ', '"']).next().unwrap_or_default();
                let behind_scheme = word.split_once("://").map_or(word, |(_, rest)| rest);
                assert!(behind_scheme.contains('/'), "a password is shown: {why}");
            }
        }
    }
}

fn manifest_seeds() -> Vec<Vec<u8>> {
    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let config = format!(r#"{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{D}","size":2}}"#);
    let layer = format!(
        r#"{{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip","digest":"{D}","size":3,"urls":["https://u:p@x.example/?sig=1"],"annotations":null}}"#
    );
    vec![
        format!("\u{0}{{\"schemaVersion\":2,\"config\":{config},\"layers\":[{layer},{layer}]}}").into_bytes(),
        format!("\u{1}{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"x\",\"digest\":\"{D}\",\"size\":3.0,\"platform\":{{\"os\":\"linux\",\"architecture\":\"amd64\",\"variant\":\"v2\"}}}}]}}").into_bytes(),
        format!("\u{1}{{\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"manifests\":[{layer},{config}]}}").into_bytes(),
        format!("\u{2}{{\"schemaVersion\":2,\"config\":{config},\"layers\":[{layer}],\"artifactType\":\"a/b\"}}").into_bytes(),
        format!("\u{2}{{\"schemaVersion\":2,\"config\":{config},\"layers\":[{layer}]}}").replace("https://", "https:/(/").into_bytes(),
        b"\x02{\"schemaVersion\":1,\"fsLayers\":[{}]}".to_vec(),
        format!("\u{3}{{\"os\":\"linux\",\"architecture\":\"amd64\",\"rootfs\":{{\"diff_ids\":[\"{D}\"]}},\"config\":{{\"Env\":[\"PASSWORD=hunter2hunter2\"]}}}}").into_bytes(),
    ]
}

fn manifest(data: &[u8]) {
    const TYPES: [&str; 3] = [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/json; charset=utf-8",
    ];
    let (how, json) = choice(data);
    let outcome = if how & 3 == 3 {
        let shown = registry::config(json, 1);
        if let Ok(shown) = &shown {
            assert!(
                !shown.contains("hunter2hunter2") || !shown.contains("PASSWORD"),
                "the environment is shown: {shown}"
            );
        }
        shown.map(|_| Vec::new())
    } else {
        registry::manifest(json, TYPES[usize::from(how & 3)])
    };
    match outcome {
        Ok(shown) => {
            // What is a secret in its place is a name like others in a path or a media type.
            let text = String::from_utf8_lossy(json);
            let whole = text.matches("\"https://u:p@x.example/?sig=1\"").count();
            let secrets_are_whole = whole == text.matches("u:p@").count() && whole == text.matches("?sig=").count();
            for text in shown {
                message(&text);
                assert!(
                    !secrets_are_whole || !(text.contains("u:p@x.example") || text.contains("x.example/?sig=1")),
                    "a secret of a URL is shown: {text}"
                );
            }
        }
        Err(why) => message(&why),
    }
}

// ------------------------------------------------------------------------------------------------------ files of our own

fn cache_map_seeds() -> Vec<Vec<u8>> {
    vec![
        cache::map(40, &[0, 5, 31, 39], true, "https://host/layer.tar", "sha256:00"),
        cache::map(1, &[0], false, "", ""),
        cache::map(70, &[], false, "x", ""),
    ]
}

fn cache_map(data: &[u8]) {
    let as_it_is = cache::read(data);
    // The checksum would keep all of it from what is behind.
    let mut sealed = data.to_vec();
    sealed.truncate(sealed.len().saturating_sub(4));
    sealed.extend_from_slice(&crc32c::crc32c(&sealed).to_le_bytes());
    for (bytes, read) in [(data, as_it_is), (&sealed, cache::read(&sealed))] {
        let Some(read) = read else { continue };
        assert!(read.held.len() <= bytes.len() * 8, "more chunks than the file has bits");
        assert!(read.held.iter().all(|index| u64::from(*index) * (32 << 10) < read.size));
        assert!(read.again == bytes, "what was read is written differently");
    }
}

fn state_seeds() -> Vec<Vec<u8>> {
    const COMMON: &str = r#""name":"loop7","device":"/dev/loop7","backend":"loop","number":7,"len":1048576,"source":"http://example.com/layer.tar","process":{"pid":4711,"born":12345,"boot":"00000000-0000-0000-0000-000000000000"},"since":1700000000,"log":"/run/tarblk/loop7.log""#;
    vec![
        format!("{{{COMMON}}}").into_bytes(),
        format!("{{{COMMON},\"server\":\"service\"}}").into_bytes(),
        br#"{"version":1,"crc32c":0,"state":""}"#.to_vec(),
        br#"{"version":99}"#.to_vec(),
    ]
}

/// The bytes as a file, and as the state inside of one with a right checksum, of each version that there may be.
fn state(data: &[u8]) {
    thread_local! {
        static DIR: tempfile::TempDir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a scratch directory");
    }
    DIR.with(|dir| {
        let states = StateDir::new(dir.path());
        let file = dir.path().join("loop7.json");
        let text = String::from_utf8_lossy(data);
        let wrapped = (1..4).map(|version| {
            let sum = crc32c::crc32c(text.as_bytes());
            serde_json::json!({"version": version, "crc32c": sum, "state": text})
                .to_string()
                .into_bytes()
        });
        for bytes in std::iter::once(data.to_vec()).chain(wrapped) {
            let mut open = fs::File::create(&file).expect("a scratch file");
            open.write_all(&bytes).expect("it can be written");
            match states.read("loop7") {
                Ok(state) => {
                    assert_eq!(
                        (state.name.as_str(), state.number),
                        ("loop7", 7),
                        "another device's state"
                    );
                    assert_eq!(state.device, std::path::Path::new("/dev/loop7"));
                    states.write(&state).expect("it can be written");
                    assert_eq!(states.read("loop7").expect("what is written is read"), state);
                }
                // Root writes these files: a message may say what is in them.
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------------ profile

/// The layers that a device has, of which a profile may speak.
fn profiled_layers() -> Vec<ProfiledLayer> {
    [("base", 40 << 20), ("app", 100_000)]
        .map(|(name, size)| ProfiledLayer {
            key: ProfileKey::of(name),
            size,
        })
        .to_vec()
}

fn profiled_run(chunks: u64, step: u64) -> StartRun {
    let read = |n: u64| RecordedRead {
        at: Duration::from_millis(n * 7),
        layer: LayerId(u32::try_from(n % 2).expect("0 or 1")),
        range: TarRange::new(TarOffset(n * step), 4096),
        from: ReadFrom::Memory,
        waited: None,
    };
    StartRun::of(&(0..chunks).map(read).collect::<Vec<_>>())
}

fn profile_seeds() -> Vec<Vec<u8>> {
    let mut learned = Profile::new(profiled_layers());
    learned.learn(&profiled_run(20, 100_000));
    let first = learned.to_bytes(MAX_PROFILE_BYTES);
    learned.learn(&profiled_run(30, 50_000));
    let second = learned.to_bytes(MAX_PROFILE_BYTES);
    // The body alone, which gets its checksum when it is tried.
    let body = |file: &[u8]| [&[1][..], &file[16..]].concat();
    vec![[&[0][..], &first].concat(), body(&first), body(&second)]
}

fn profile(data: &[u8]) {
    let (how, bytes) = choice(data);
    let bytes = if how & 1 == 0 { bytes.to_vec() } else { sealed(bytes) };
    let mut parsed = match Profile::parse(&bytes) {
        Ok(parsed) => parsed,
        Err(why) => return message(&why.to_string()),
    };
    let (layers, most) = (profiled_layers(), 2 << 30);
    for range in parsed.likely(&layers) {
        let layer = &layers[usize::try_from(range.layer.0).expect("a layer of the device")];
        assert!(
            u64::from(range.end) <= layer.size.div_ceil(CHUNK_BYTES),
            "behind the layer's end"
        );
        assert!(range.first < range.end);
    }
    assert!(parsed.bytes() <= most, "{} bytes", parsed.bytes());
    let again = parsed.to_bytes(MAX_PROFILE_BYTES);
    assert_eq!(Profile::parse(&again).expect("what is written can be read"), parsed);
    let short = Profile::parse(&parsed.to_bytes(200)).expect("so can what is cut");
    assert!(short.count() <= parsed.count());
    parsed.learn(&profiled_run(10, 70_000));
    assert!(parsed.bytes() <= most);
    Profile::parse(&parsed.to_bytes(MAX_PROFILE_BYTES)).expect("what was learned from it can be read");
}

// ------------------------------------------------------------------------------------------------------ programs

/// A little-endian ELF file of 64 bits with these program headers, `(type, flags, offset, address, length)`, and this behind them.
fn elf(headers: &[(u32, u32, u64, u64, u64)], behind: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(32, 0);
    file.extend_from_slice(&64_u64.to_le_bytes());
    file.resize(54, 0);
    file.extend_from_slice(&56_u16.to_le_bytes());
    file.extend_from_slice(&u16::try_from(headers.len()).expect("a few").to_le_bytes());
    file.resize(64, 0);
    for (kind, flags, offset, address, len) in headers {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        for word in [*offset, *address, *address, *len, *len, 4096] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    file.extend_from_slice(behind);
    file
}

fn programs_seeds() -> Vec<Vec<u8>> {
    let at = 64 + 4 * 56;
    let mut behind = b"/lib64/ld-linux-x86-64.so.2\0\0\0\0\0libc.so.6\0$ORIGIN/../lib:/opt\0\0".to_vec();
    behind.resize(64, 0);
    for (tag, value) in [(1_u64, 32_u64), (29, 42), (5, at), (10, 64), (0, 0)] {
        behind.extend_from_slice(&tag.to_le_bytes());
        behind.extend_from_slice(&value.to_le_bytes());
    }
    let program = elf(
        &[
            (1, 4, 0, 0, 1000),
            (1, 5, 1000, 5000, 100),
            (3, 4, at, at, 28),
            (2, 6, at + 64, at + 64, 80),
        ],
        &behind,
    );
    // CPython 3.11: a header, and a code object cut short behind its constants.
    let mut module = vec![0xa7, 0x0d, b'\r', b'\n'];
    module.resize(16, 0);
    module.extend_from_slice(b"\xe3\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\xf3\x0a\0\0\0d\0d\x01l\0Z\0d\x01S\0)\x02\xe9\0\0\0\0N)\x01\xda\x02os)\x01r\x02\0\0\0");
    let choose = |how: u8, bytes: &[u8]| [&[how][..], bytes].concat();
    vec![
        choose(0, &program),
        choose(0, b"#! /usr/bin/env python3 -x\n"),
        choose(4, &program),
        choose(1, &module),
        choose(1, b"????\r\n0123456789z\x02osz\x04json"),
        choose(
            2,
            b"const a = require('./a'), b = require(\"@s/b/c\"); import x from '..'; import('d')",
        ),
        choose(3, b"{\"name\": \"x\", \"main\" : \"lib/x\"}"),
        choose(8, b"require 'a/b'\nclass C\n  require_relative 'd'\n  def e\n    require 'f'\n  end\nend\n"),
        choose(9, b"package A::B;\nuse strict; use parent qw(C D);\nsub e {\n  require F;\n}\nXSLoader::load();\n=pod\n\n=cut\n"),
        choose(10, b"<?php\nnamespace A\\B;\nuse C\\{D, E as F};\nrequire __DIR__ . '/..' . '/g.php';\nclass H extends I implements J {\n"),
        choose(11, b"extension=dom.so\nextension_dir = \"/usr/lib/php\"\n"),
        choose(
            12,
            b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\x07\0\0\0\x07\0\0\0\x07\0\0\0A.class\xca\xfe\xba\xbe\0\0\0PK\x01\x02\x14\0\x14\0\0\0\0\0\
            \0\0\0\0\0\0\0\0\x07\0\0\0\x07\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0A.classPK\x05\x06\0\0\0\0\x01\0\x01\0\x35\0\0\0\x2c\0\0\0\0\0",
        ),
        choose(12, b"\xca\xfe\xba\xbe\0\0\0\x3d\0\x03\x07\0\x02\x01\0\x03a/B"),
        choose(12, b"Manifest-Version: 1.0\nMain-Class: a.B\nClass-Path: c.jar d/\n e.jar\n"),
    ]
}

/// Says of a path whether there is a file.
type ChoosesPath<'f> = dyn Fn(&[u8]) -> bool + 'f;

fn programs(data: &[u8]) {
    /// More names than any reader takes from a file.
    const MOST: usize = 20_000;
    let (how, file) = choice(data);
    let all = |_: &[u8]| true;
    let none = |_: &[u8]| false;
    let some = |path: &[u8]| path.len().is_multiple_of(3);
    if how & 8 != 0 {
        return scripts_and_archives(how, file);
    }
    match how & 3 {
        0 => {
            let here = |at: u64| how & 4 == 0 || at < 64;
            let (names, parts, lacking) = prefetch::program(file, &here);
            assert!(
                names.iter().map(Vec::len).sum::<usize>() <= 64 * 64 * 300,
                "names without end"
            );
            assert!(names.len() + parts.len() + lacking.len() <= 64 * 71 + 320);
            let len = u64::try_from(file.len()).expect("it is in memory");
            assert!(
                lacking.iter().all(|(at, part)| at + part <= len),
                "bytes behind the end are asked for"
            );
            assert!(lacking.is_empty() || how & 4 != 0, "all of it is here");
            // Each bit of a packed table is a page, and each byte of code may begin a reference.
            assert!(prefetch::loaded(file).len() <= 16 * file.len() + 64);
        }
        1 => {
            let path = b"/usr/lib/python3.11/json/__pycache__/decoder.cpython-311.pyc";
            let ways: [&ChoosesPath<'_>; 3] = [&all, &none, &some];
            for exists in ways {
                let found = prefetch::python(path, file, exists);
                assert!(
                    found.len() <= MOST + file.len(),
                    "{} modules of {} bytes",
                    found.len(),
                    file.len()
                );
            }
            assert!(prefetch::python(path, file, &none).is_empty());
        }
        kind => {
            let path: &[u8] = if kind == 2 {
                b"/app/node_modules/x/lib/a.js"
            } else {
                b"/app/package.json"
            };
            let ways: [&ChoosesPath<'_>; 3] = [&all, &none, &some];
            for exists in ways {
                let found: HashSet<Vec<u8>> = prefetch::node(path, file, exists);
                assert!(found.len() <= 512, "{} modules", found.len());
            }
            assert!(prefetch::node(path, file, &none).is_empty());
        }
    }
}

fn scripts_and_archives(how: u8, file: &[u8]) {
    if how & 4 != 0 {
        let (entries, longest, names) = prefetch::archive(file);
        assert!(
            entries <= file.len() / 46 && longest <= 256 << 10,
            "{entries} entries, {longest} bytes"
        );
        assert!(names <= file.len().max(longest), "{names} names");
        return;
    }
    let path: &[u8] = match how & 3 {
        0 => b"/usr/lib/ruby/3.1.0/json/a.rb",
        1 => b"/usr/share/perl5/A/B.pm",
        2 => b"/app/vendor/composer/autoload_static.php",
        _ => b"/etc/php/8.2/mods-available/dom.ini",
    };
    let ways: [&ChoosesPath<'_>; 3] = [&|_| true, &|_| false, &|path| path.len().is_multiple_of(3)];
    for exists in ways {
        let found = prefetch::script(path, file, exists);
        assert!(found.len() <= 2 * 256 + 2048, "{} files", found.len());
    }
    assert!(prefetch::script(path, file, &|_| false).is_empty());
}

// ------------------------------------------------------------------------------------------------------ whom an index is believed

/// A digest, a key and a signature as they are written down.
const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const KEY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const SIGNATURE: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw==";

fn trust_seeds() -> Vec<Vec<u8>> {
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{DIGEST}","size":2}},"layers":[],"annotations":{{"a":"b"}}}}"#
    );
    texts(&[
        &format!("\0{KEY}:{SIGNATURE}"),
        &format!("\0{KEY}:{SIGNATURE};{KEY}:{SIGNATURE}"),
        &format!("\u{1}{DIGEST} {DIGEST} 1000 900 {DIGEST}"),
        &format!("\u{1}{DIGEST} {DIGEST} 1000 900 {DIGEST} {KEY}:{SIGNATURE},{DIGEST} {DIGEST} 5"),
        &format!("\u{2}{manifest}"),
        "\u{2}{\"annotations\":null}",
        "\u{3}-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA8+lph4aQHW4ptLhVjsxUOKwfLkFzvq2bFR04+PKwSnQ=\n-----END PUBLIC KEY-----\n",
        "\u{3}-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEy/uMIKJtDXgbphfrirWRB2KXbHk8\naeRzGUHiUvnSUA40jPlNkM1Oop1aOqtq4tGT6j9qwWPEymDHdYAZkENCfg==\n-----END PUBLIC KEY-----\n",
        "\u{4}-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIHLslPuI0ws63T/wnFNIysw5ImdEIPxtXQi93YEn8H/Z\n-----END PRIVATE KEY-----\n",
        "\u{4}-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgfKC7ceaf1/JFo7ZY\nVU/xBvvz86z7Rz68vjwpHCkJQWShRANCAATL+4wgom0NeBumF+uKtZEHYpdseTxp\n5HMZQeJS+dJQDjSM+U2QzU6inVo6q2ri0ZPqP2rBY8TKYMd1gBmQQ0J+\n-----END PRIVATE KEY-----\n",
    ])
}

fn trust(data: &[u8]) {
    let (kind, data) = choice(data);
    match kind % 5 {
        0 => {
            let text = String::from_utf8_lossy(data);
            let signatures = Signature::parse_all(&text);
            // What is read is what was written, so that two readers see the same.
            if !signatures.is_empty() {
                assert_eq!(Signature::all_to_text(&signatures), text);
                assert!(signatures.len() <= 16 && signatures.iter().all(|one| one.bytes.len() <= 132));
            }
        }
        1 => {
            let text = String::from_utf8_lossy(data).into_owned();
            let annotations = BTreeMap::from([(LIST_ANNOTATION.to_owned(), text.clone())]);
            let Some(listed) = listed_with(&annotations) else {
                return;
            };
            assert_eq!(listed.len(), text.split(',').count());
            // Who writes it anew names the same indexes.
            let named = naming(b"{}", &listed).unwrap();
            let document: serde_json::Value = serde_json::from_slice(&named).unwrap();
            let again = document["annotations"][LIST_ANNOTATION].as_str().unwrap().to_owned();
            let again = listed_with(&BTreeMap::from([(LIST_ANNOTATION.to_owned(), again)])).unwrap();
            let unsigned = |listed: Listed| Listed {
                signatures: Vec::new(),
                ..listed
            };
            assert_eq!(again, listed.into_iter().map(unsigned).collect::<Vec<_>>());
        }
        2 => match naming(data, &[]) {
            Ok(named) => {
                let others = |bytes: &[u8]| {
                    let document: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(bytes).unwrap();
                    let text = document.into_iter().map(|(key, value)| (key, value.get().to_owned()));
                    text.filter(|(key, _)| key != "annotations").collect::<Vec<_>>()
                };
                assert_eq!(others(data), others(&named), "everything else stays");
            }
            Err(why) => message(&why),
        },
        3 => {
            for key in PublicKey::parse(data).unwrap_or_default() {
                assert!(!format!("{:?}", key.id()).is_empty());
            }
        }
        _ => {
            if let Some(key) = SigningKey::parse(data) {
                assert!(!format!("{key:?}").contains("pair"));
            }
        }
    }
}

/// Frames by several levels and windows, of what repeats near and far, is random, or is one byte: a few blocks each.
fn zstd_blocks_seeds() -> Vec<Vec<u8>> {
    let mut state = 1_u64;
    let mut content = Vec::new();
    while content.len() < 400_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let far = usize::try_from(state >> 20).unwrap_or(0) % content.len().max(1);
        match state >> 60 {
            0 => content.extend(state.to_le_bytes()),
            1 => content.extend([0; 700]),
            4.. if content.len() > 3000 => {
                // Short frames are changed the most: copies of copies are many bytes of few.
                let again = content[far..content.len().min(far + 2500)].to_vec();
                content.extend(again);
            }
            _ => content.extend(format!("line {} of many\n", state >> 52).bytes()),
        }
    }
    let frame = |level, window, checksum, content: &[u8]| {
        let mut encoder = zstd::stream::raw::Encoder::new(level).expect("a level");
        for parameter in [CParameter::WindowLog(window), CParameter::ChecksumFlag(checksum)] {
            encoder.set_parameter(parameter).expect("a parameter");
        }
        let mut writer = zstd::stream::zio::Writer::new(Vec::new(), encoder);
        writer
            .write_all(content)
            .and_then(|()| writer.finish())
            .expect("memory");
        writer.into_inner().0
    };
    // Blocks of one byte that comes often, and blocks that repeat a table of one symbol, which no dictionary can say.
    let runs = [&b"\x28\xb5\x2f\xfd\0\x50"[..], &b"\x02\0\x10a".repeat(5), b"\x03\0\0a"].concat();
    let first = b"\x20abcd\x01\x54\x04\x00\x34\xfe\xff\x00\x01";
    let block = |content: &[u8]| {
        let size = u32::try_from(content.len()).unwrap_or(0);
        [&(size << 3 | 4).to_le_bytes()[..3], content].concat()
    };
    let again = b"\x20abcd\x01\xfc\x00\x80\x01";
    let singles = [
        b"\x28\xb5\x2f\xfd\0\x50".to_vec(),
        block(first),
        block(again).repeat(8),
        b"\x01\0\0".to_vec(),
    ];
    let all = vec![
        frame(1, 17, false, &content),
        frame(3, 19, true, &content),
        frame(19, 18, true, &content[..300_000]),
        [frame(3, 17, true, &content), frame(1, 10, false, &content[..20_000])].concat(),
        runs,
        singles.concat(),
    ];
    assert!(all.iter().all(|seed| seed.len() < 8 << 10), "inputs are not longer");
    all
}

/// Any bytes as a zstd layer: libzstd and the reader of blocks say the same of its length, where it was said nothing of the pieces does
/// it depend on them, and from each block that decoding can begin at the same comes out.
fn zstd_blocks(data: &[u8]) {
    const LIMIT: u64 = 2 << 20;
    let index = |piece: usize| {
        let mut indexer = Indexer::new(Coding::Zstd, 0).limit(LIMIT);
        let mut tar = Vec::new();
        for bytes in data.chunks(piece) {
            indexer.feed(bytes, &mut |out| tar.extend_from_slice(out))?;
        }
        Ok::<_, LayerError>((indexer.finish()?, tar))
    };
    let (whole, pieces) = (index(usize::MAX), index(997));
    assert_eq!(whole.is_ok(), pieces.is_ok(), "pieces make a difference");
    let (Ok((spans, tar)), Ok((same, _))) = (whole, pieces) else {
        return;
    };
    assert!(
        spans.table == same.table && spans.windows == same.windows,
        "pieces make a difference"
    );
    let mut blocks = Vec::new();
    spans.table.encode_blocks(&mut blocks);
    let read = spans.table.without_blocks().with_blocks(&blocks);
    assert_eq!(read.as_ref(), Ok(&spans.table), "what was written is read");
    for n in (0..spans.table.len()).filter(|n| spans.table.span(*n).begins == Begins::Block) {
        let span = spans.table.span(n);
        let [from, to] = [span.blob.start, span.blob.end].map(|at| usize::try_from(at).expect("it is in memory"));
        let [start, end] = [span.tar.start.0, span.tar.end().0].map(|at| usize::try_from(at).expect("it is in memory"));
        let mut decoder = Decoder::start(&spans.table, n, &spans.windows[n]).expect("our own table");
        let mut out = Vec::new();
        let fed = decoder.feed(&data[from..to], &mut |bytes| out.extend_from_slice(bytes));
        fed.expect("it decoded before");
        assert!(out == tar[start..end], "span {n} is another from its block");
    }
}
