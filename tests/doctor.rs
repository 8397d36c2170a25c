//! `tarblk doctor` against a registry that a test can script.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::collections::BTreeMap;
use std::process::Command;

use common::TARBLK;
use common::rawtar::RawTar;
use scripted::{Door, TestRegistry};
use serde_json::Value;
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::source::registry::OCI_MANIFEST;

/// What is said of each thing: its state, and what was found.
fn doctor(arguments: &[&str], creds: &str) -> (BTreeMap<String, (String, String)>, bool) {
    let cache = common::scratch("doctor-");
    let output = Command::new(TARBLK)
        .args(["doctor", "--json"])
        .args(arguments)
        .env("TARBLK_CACHE", cache.path().join("cache"))
        .env("TARBLK_STATE_DIR", cache.path().join("states"))
        .env("TARBLK_CREDS", creds)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {text}"));
    let word = |check: &Value, name: &str| check[name].as_str().unwrap().to_owned();
    let checks = report["checks"].as_array().unwrap().iter();
    let checks: BTreeMap<_, _> = checks
        .map(|check| {
            let state = word(check, "state");
            assert_eq!(check["advice"].is_null(), state == "ok", "{check}");
            (word(check, "name"), (state, word(check, "found")))
        })
        .collect();
    let has_problem = checks.values().any(|(state, _)| state == "problem");
    assert_eq!(output.status.code(), Some(i32::from(has_problem)), "{checks:?} {text}");
    assert!(!text.contains("s3cret") && !String::from_utf8_lossy(&output.stdout).contains("s3cret"));
    (checks, has_problem)
}

#[test]
fn a_machine_is_looked_at() {
    let (checks, _) = doctor(&[], "");
    for name in [
        "kernel",
        "rights",
        "io_uring",
        "ext4",
        "ublk",
        "loop",
        "open files",
        "state directory",
        "cache directory",
    ] {
        assert!(checks.contains_key(name), "{name}: {checks:?}");
    }
    assert_eq!(checks["cache directory"].0, "ok", "{checks:?}");
}

#[test]
fn an_image_is_looked_at() {
    let registry = TestRegistry::start();
    let digest = |bytes: &[u8]| Digest::of(Algorithm::Sha256, bytes).to_string();
    let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() });
    let layer = RawTar::new().file(b"a", b"b").end().0;
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] } });
    let config = config.to_string().into_bytes();
    registry.put_blob(&config);
    let blob = registry.put_blob(&layer);
    registry.rules(|rules| {
        rules.lazy.insert(blob.to_string(), "none".to_owned());
        rules.door = Door::Basic("me:s3cret".to_owned());
    });
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor(&layer, "application/vnd.oci.image.layer.v1.tar")] });
    registry.put_manifest("app", "1", OCI_MANIFEST, manifest.to_string().as_bytes());
    let name = registry.name("app:1");
    let arguments = [&*name, "--platform", "linux/amd64", "--hosts-dir", "/nonexistent"];
    let (checks, _) = doctor(&arguments, "me:s3cret");
    let state = |checks: &BTreeMap<String, (String, String)>, name: &str| checks[name].0.clone();
    assert_eq!(state(&checks, "registry"), "ok", "{checks:?}");
    assert!(checks["credentials"].1.contains(" as me"), "{checks:?}");
    assert_eq!(state(&checks, "ranges"), "ok");
    // It does not say what time it is, and nobody has published an index.
    assert_eq!(
        (state(&checks, "clock"), state(&checks, "indexes")),
        ("warning".into(), "warning".into())
    );
    registry.rules(|rules| rules.ranges = false);
    let (checks, has_problem) = doctor(&arguments, "me:s3cret");
    assert!(has_problem && state(&checks, "ranges") == "problem", "{checks:?}");
    let (checks, has_problem) = doctor(&arguments, "me:wrong");
    assert!(has_problem && state(&checks, "registry") == "problem", "{checks:?}");
    registry.stop();
    let (checks, has_problem) = doctor(&arguments, "me:s3cret");
    assert!(
        has_problem && checks["registry"].1.contains("cannot connect"),
        "{checks:?}"
    );
}
