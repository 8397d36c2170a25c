//! Images as all kinds of tools have written them and all kinds of registries hand them out: what other container runtimes
//! accept is accepted, cold and warm alike, and what it holds is decided by bytes and digests and by nothing that is said.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::path::Path;

use common::anonymous::{http_options, registry_options};
use common::noise::noise;
use common::packed::{gzip, through};
use common::rawtar::{Header, RawTar};
use common::sha256;
use scripted::TestRegistry;
use tarblk::internals::digest::Digest;
use tarblk::internals::index::build::{BlobRecorder, Contents};
use tarblk::internals::index::{Collector, Index, IndexBuilder};
use tarblk::internals::layer::Coding;
use tarblk::internals::open::{Cache, IndexChoice, OpenOptions, Prepared, TrustPolicy, Unwatched, prepare};
use tarblk::internals::source::registry::{DOCKER_MANIFEST, OCI_MANIFEST};

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

fn options(cache: Option<&Path>) -> OpenOptions {
    OpenOptions {
        cache: cache.map(|dir| Cache::new(dir).unwrap()),
        http: http_options(2),
        registry: registry_options(2),
        ..OpenOptions::default()
    }
}

fn open(name: &str, options: &OpenOptions) -> Result<Prepared, String> {
    prepare(name, options, &mut Unwatched).map_err(|error| error.to_string())
}

fn tar(seed: u64) -> Vec<u8> {
    RawTar::new()
        .dir(b"etc/")
        .file(b"etc/noise", &noise(300_000, seed))
        .end()
        .0
}

/// A layer as a manifest has it.
struct Layer<'b> {
    blob: &'b [u8],
    diff_id: Digest,
    descriptor: serde_json::Value,
}

impl<'b> Layer<'b> {
    fn new(blob: &'b [u8], tar: &[u8], media_type: &str) -> Self {
        Self {
            blob,
            diff_id: sha256(tar),
            descriptor: serde_json::json!({ "mediaType": media_type, "digest": sha256(blob), "size": blob.len() }),
        }
    }
}

/// An image of one layer: its manifest and its configuration.
fn image(layer: &Layer<'_>) -> [Vec<u8>; 2] {
    let config =
        serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": [layer.diff_id] } });
    let config = config.to_string();
    let manifest = serde_json::json!({ "schemaVersion": 2,
        "config": { "mediaType": CONFIG, "digest": sha256(config.as_bytes()), "size": config.len() },
        "layers": [layer.descriptor] });
    [manifest.to_string().into_bytes(), config.into_bytes()]
}

/// Puts it under the tag `t`; returns its name.
fn in_registry(registry: &TestRegistry, layer: &Layer<'_>) -> String {
    let [manifest, config] = image(layer);
    registry.put_blob(&config);
    registry.put_blob(layer.blob);
    registry.put_manifest("some/image", "t", OCI_MANIFEST, &manifest);
    registry.name("some/image:t")
}

/// Makes a layout of it; returns its name.
fn in_layout(dir: &Path, layer: &Layer<'_>) -> String {
    let [manifest, config] = image(layer);
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for blob in [&manifest, &config, layer.blob] {
        std::fs::write(blobs.join(sha256(blob).hex()), blob).unwrap();
    }
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let entry = serde_json::json!({ "mediaType": OCI_MANIFEST, "digest": sha256(&manifest), "size": manifest.len(),
        "annotations": { "org.opencontainers.image.ref.name": "t" } });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [entry] });
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    format!("oci:{}:t", dir.display())
}

fn names(prepared: &Prepared) -> Vec<String> {
    let mut entries = Collector::default();
    prepared.layers[0].index.replay(&mut entries).unwrap();
    entries
        .0
        .iter()
        .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
        .collect()
}

/// The blob's first bytes say how it is compressed, whatever its media type says; from a registry and from a layout, when it
/// is read, when its index is kept, and when its index is published.
#[test]
fn the_first_bytes_decide() {
    let tar = tar(1);
    let blobs = [
        (Coding::Plain, tar.clone()),
        (Coding::Gzip, gzip(&tar)),
        (Coding::Zstd, through(&["zstd", "-qc"], &tar)),
    ];
    for (coding, blob) in &blobs {
        for said in [PLAIN, GZIP, ZSTD, "application/octet-stream", ""] {
            let layer = Layer::new(blob, &tar, said);
            let registry = TestRegistry::start();
            let scratch = common::scratch("first-bytes");
            let layout = scratch.path().join("layout");
            for (name, place) in [
                (in_registry(&registry, &layer), "registry"),
                (in_layout(&layout, &layer), "layout"),
            ] {
                let cache = scratch.path().join(place);
                let options = options(Some(&cache));
                for time in ["cold", "warm"] {
                    registry.take_log();
                    let prepared = open(&name, &options).unwrap();
                    assert_eq!(
                        prepared.layers[0].coding(),
                        *coding,
                        "{coding} as {said:?}, {place}, {time}"
                    );
                    assert_eq!(
                        names(&prepared),
                        ["etc/", "etc/noise"],
                        "{coding} as {said:?}, {place}, {time}"
                    );
                    let path = format!("/v2/some/image/blobs/{}", sha256(blob));
                    let asked = registry.take_log().iter().any(|asked| asked.path == path);
                    assert_eq!(
                        asked,
                        place == "registry" && time == "cold",
                        "{coding} as {said:?}, {place}, {time}"
                    );
                }
            }
            // What comes out of it still has to be right, also where the right image was before.
            let wrong = Layer::new(blob, b"another tar", said);
            let layout = scratch.path().join("wrong");
            let here = [scratch.path().join("registry"), scratch.path().join("layout")];
            for (name, cache) in [
                (in_layout(&layout, &wrong), None),
                (in_layout(&layout, &wrong), Some(&here[1])),
                (in_registry(&registry, &wrong), None),
                (in_registry(&registry, &wrong), Some(&here[0])),
            ] {
                let error = open(&name, &options(cache.map(std::path::PathBuf::as_path))).unwrap_err();
                assert!(
                    error.contains("tar of a layer") && error.contains(&sha256(blob).to_string()),
                    "{error}"
                );
            }
        }
    }
}

/// A published index is enough: not one byte of the layer is asked for to see what it is.
#[test]
fn a_published_index_says_what_a_blob_is() {
    let tar = tar(2);
    for (blob, said, coding) in [(tar.clone(), GZIP, Coding::Plain), (gzip(&tar), PLAIN, Coding::Gzip)] {
        let registry = TestRegistry::start();
        let name = in_registry(&registry, &Layer::new(&blob, &tar, said));
        let reference =
            tarblk::internals::source::registry::Reference::parse(name.strip_prefix("docker://").unwrap()).unwrap();
        let options = options(None);
        tarblk::internals::open::publish::push(
            &reference,
            &options.registry,
            &tarblk::internals::open::publish::PushOptions::new(1 << 20),
            &mut Unwatched,
        )
        .unwrap();
        registry.take_log();
        let prepared = open(
            &name,
            &OpenOptions {
                index: IndexChoice::Require,
                trust: TrustPolicy::of_registry(),
                ..options
            },
        )
        .unwrap();
        assert_eq!(prepared.layers[0].coding(), coding);
        let path = format!("/v2/some/image/blobs/{}", sha256(&blob));
        assert!(!registry.take_log().iter().any(|asked| asked.path == path));
    }
}

/// What is a tar to who looks for headers and gzip to who looks at its first bytes is gzip, for everybody.
#[test]
fn two_formats_at_once_are_the_one_that_the_first_bytes_name() {
    let inside = tar(3);
    let compressed = gzip(&inside);
    // gzip's header with an extra field over the rest of a tar header, whose file is the stream behind it.
    let payload = compressed[10..].to_vec();
    let mut header = Header::new(b'0', b"\x1f\x8b\x08\x04\0\0\0\0\0\x03");
    header = header
        .field(10, 2, &500_u16.to_le_bytes())
        .size(u64::try_from(payload.len()).unwrap());
    let mut blob = RawTar::new().entry(header, b"").0;
    blob.extend_from_slice(&payload);
    for said in [PLAIN, GZIP] {
        let registry = TestRegistry::start();
        let name = in_registry(&registry, &Layer::new(&blob, &inside, said));
        for cache in [None, Some(common::scratch("polyglot"))] {
            let prepared = open(&name, &options(cache.as_ref().map(tempfile::TempDir::path))).unwrap();
            assert_eq!(prepared.layers[0].coding(), Coding::Gzip, "{said}");
            assert_eq!(names(&prepared), ["etc/", "etc/noise"], "{said}");
        }
    }
}

#[test]
fn blobs_of_few_bytes_are_empty_layers() {
    for said in [PLAIN, GZIP, ZSTD] {
        for (blob, tar) in [
            (Vec::new(), Vec::new()),
            (gzip(b""), Vec::new()),
            (gzip(&[0; 1024]), vec![0; 1024]),
        ] {
            let layer = Layer::new(&blob, &tar, said);
            let registry = TestRegistry::start();
            let scratch = common::scratch("few-bytes");
            for name in [in_registry(&registry, &layer), in_layout(scratch.path(), &layer)] {
                let prepared = open(&name, &options(None)).unwrap_or_else(|error| panic!("{said}: {error}"));
                assert!(names(&prepared).is_empty());
            }
        }
    }
}

/// A foreign layer is used where it is; where it is not, the person is told which one it is and who has it.
#[test]
fn foreign_layers_are_used_where_they_are() {
    let tar = tar(4);
    let blob = gzip(&tar);
    let mut layer = Layer::new(&blob, &tar, FOREIGN);
    layer.descriptor["urls"] = serde_json::json!(["https://me:secret@layers.test.invalid/base?key=secret"]);
    let registry = TestRegistry::start();
    let scratch = common::scratch("foreign");
    let all = [in_registry(&registry, &layer), in_layout(scratch.path(), &layer)];
    for name in &all {
        assert_eq!(names(&open(name, &options(None)).unwrap()), ["etc/", "etc/noise"]);
    }
    std::fs::remove_file(scratch.path().join("blobs/sha256").join(sha256(&blob).hex())).unwrap();
    registry.remove_blob(&sha256(&blob));
    for name in &all {
        let error = open(name, &options(None)).unwrap_err();
        for word in [
            &sha256(&blob).to_string(),
            "foreign",
            "https://layers.test.invalid/base",
        ] {
            assert!(error.contains(word), "{error}");
        }
        assert!(!error.contains("secret"), "{error}");
    }
    // One that everybody has to have is only missing, and no name is wrong.
    let layer = Layer::new(&blob, &tar, GZIP);
    let name = in_registry(&registry, &layer);
    registry.remove_blob(&sha256(&blob));
    let error = open(&name, &options(None)).unwrap_err();
    assert!(error.contains("404") && error.contains("not complete"), "{error}");
    assert!(
        !error.contains("foreign") && !error.contains("check the name"),
        "{error}"
    );
    let name = in_layout(scratch.path(), &layer);
    std::fs::remove_file(scratch.path().join("blobs/sha256").join(sha256(&blob).hex())).unwrap();
    let error = open(&name, &options(None)).unwrap_err();
    assert!(
        error.contains("not complete") && !error.contains("foreign layer"),
        "{error}"
    );
}

/// Proxies and old registries call a manifest other than it calls itself.
#[test]
fn what_a_manifest_is_delivered_as_may_differ() {
    let tar = tar(5);
    let layer = Layer::new(&tar, &tar, PLAIN);
    let [manifest, config] = image(&layer);
    let text = String::from_utf8(manifest).unwrap();
    for (said, delivered) in [
        (DOCKER_MANIFEST, OCI_MANIFEST),
        (OCI_MANIFEST, DOCKER_MANIFEST),
        (OCI_MANIFEST, "text/plain; charset=utf-8"),
        (DOCKER_MANIFEST, "text/html"),
        (OCI_MANIFEST, ""),
    ] {
        let registry = TestRegistry::start();
        registry.put_blob(&config);
        registry.put_blob(&tar);
        let manifest = text.replacen('{', &format!(r#"{{"mediaType":"{said}","#), 1);
        registry.put_manifest("some/image", "t", delivered, manifest.as_bytes());
        let prepared = open(&registry.name("some/image:t"), &options(None)).unwrap();
        assert_eq!(names(&prepared), ["etc/", "etc/noise"], "{said} as {delivered}");
    }
}

/// The digests of a layer's bytes, beside entries that its headers do not have: found out where the layer is at hand.
#[test]
fn a_named_index_that_says_other_than_the_headers_is_refused() {
    let layer = |mode: u64, more: bool| {
        let tool = Header::new(b'0', b"bin/tool").mode(mode).size(9);
        let tar = RawTar::new().entry(tool, b"#!/bin/sh");
        let tar = if more { tar.file(b"etc/more", b"more") } else { tar };
        tar.end().0
    };
    let recorded = |blob: &[u8]| {
        let mut recorder = BlobRecorder::new(Coding::Plain, 1 << 20, Contents::CHECKED);
        recorder.feed(blob).unwrap();
        Index::open(recorder.finish().unwrap().into_index()).unwrap()
    };
    let good = layer(0o755, true);
    let honest = recorded(&good);
    let forged = |from: &Index<Vec<u8>>| {
        let mut builder = IndexBuilder::new();
        from.replay(&mut builder).unwrap();
        builder.chunk_digests(honest.chunk_digests().unwrap().clone());
        builder.identity(honest.identity().clone());
        builder.finish(honest.tar_len(), honest.end())
    };
    let scratch = common::scratch("forged");
    let path = scratch.path().join("good.tar");
    std::fs::write(&path, &good).unwrap();
    let image = in_layout(&scratch.path().join("layout"), &Layer::new(&good, &good, GZIP));
    let index = scratch.path().join("named.tarblk");
    let opened = |name: &str| {
        let options = OpenOptions {
            index: IndexChoice::Named(index.display().to_string()),
            ..options(None)
        };
        open(name, &options)
    };
    for name in [path.to_str().unwrap(), image.as_str()] {
        std::fs::write(&index, honest.as_bytes()).unwrap();
        opened(name).unwrap();
        // Made anew of what it says it is the same.
        std::fs::write(&index, forged(&honest)).unwrap();
        opened(name).unwrap();
        for (evil, word) in [
            (layer(0o4755, true), "mode 4755"),
            (layer(0o755, false), "of entry none"),
        ] {
            std::fs::write(&index, forged(&recorded(&evil))).unwrap();
            let error = opened(name).unwrap_err();
            assert!(error.contains(word) && error.contains("named.tarblk"), "{error}");
        }
    }
}
