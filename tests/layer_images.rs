//! The layers of real images in every coding: read as a stream they are the tar that the image's config names, and so is
//! what is decoded from the places found on the way. The tables of contents that some bring along say the same as the tar.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use common::unpacked::{self, images};
use common::{have, skip};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tarblk::internals::index::toc::{Format, Place, TAIL};
use tarblk::internals::index::{Collector, Kind};
use tarblk::internals::layer::{Begins, Coding, Decoder, Indexer, Spans};
use tarblk::internals::units::TarOffset;

const SPACING: u64 = 2 << 20;

/// So many bytes at a time, as a network gives them.
const PIECE: usize = 64 << 10;

/// What the config says that each layer of an image unpacks to.
fn diff_ids(layout: &Path, manifest: &Value) -> Vec<String> {
    let config = unpacked::blob(layout, manifest["config"]["digest"].as_str().unwrap());
    let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap().iter();
    diff_ids.map(|diff_id| diff_id.as_str().unwrap().to_owned()).collect()
}

fn index(coding: Coding, blob: &[u8]) -> (Spans, Vec<u8>) {
    let (mut indexer, mut tar) = (Indexer::new(coding, SPACING), Vec::new());
    for piece in blob.chunks(PIECE) {
        indexer.feed(piece, &mut |bytes| tar.extend_from_slice(bytes)).unwrap();
    }
    (indexer.finish().unwrap(), tar)
}

/// A digest as manifests write it.
fn written(digest: &[u8]) -> String {
    digest.iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The whole and some twenty spans of one layer.
fn check(what: &str, media_type: &str, blob: &[u8], diff_id: &str) {
    let coding = Coding::of_media_type(media_type).unwrap();
    assert_eq!(Coding::of_bytes(blob), coding, "{what}");
    let (spans, tar) = index(coding, blob);
    assert_eq!(written(&Sha256::digest(&tar)), diff_id, "{what}");
    let count = spans.table.len();
    eprintln!(
        "{what}: {media_type}, {} bytes, {} of tar, {count} places",
        blob.len(),
        tar.len()
    );
    for n in (0..count).step_by(count.div_ceil(20)) {
        let span = spans.table.span(n);
        if span.begins == Begins::Within {
            // Somewhere in what costs too much to enter, which no layer of these is all of.
            assert!(spans.table.seekable(), "{what}");
            continue;
        }
        let window = spans.windows.get(n).map_or(&[][..], Vec::as_slice);
        let mut decoder = Decoder::start(&spans.table, n, window).unwrap().until(span.tar.end());
        let mut found = Vec::new();
        let [from, to] = [span.blob.start, span.blob.end].map(|at| usize::try_from(at).unwrap());
        decoder
            .feed(&blob[from..to], &mut |bytes| found.extend_from_slice(bytes))
            .unwrap();
        let [from, to] = [span.tar.start, span.tar.end()].map(|TarOffset(at)| usize::try_from(at).unwrap());
        assert!(found == tar[from..to], "{what}: from place {n} of {count}");
    }
}

#[test]
fn layers_of_real_images_are_what_their_config_says() {
    let Some(images) = images("layers_of_real_images_are_what_their_config_says") else {
        return;
    };
    let npm = unpacked::tags_if_any(&images.join("npm"));
    let npm = npm
        .iter()
        .filter(|tag| !tag.ends_with("-unpack"))
        .map(|tag| ("npm", tag.as_str()));
    let mut codings = std::collections::BTreeSet::new();
    for (name, tag) in npm.chain([("debian-python", "latest")]) {
        let layout = images.join(name);
        let (_, manifest) = unpacked::manifest(&layout, tag);
        let layers = manifest["layers"].as_array().unwrap();
        for (n, (layer, diff_id)) in layers.iter().zip(diff_ids(&layout, &manifest)).enumerate() {
            let blob = fs::read(unpacked::blob(&layout, layer["digest"].as_str().unwrap())).unwrap();
            let media_type = layer["mediaType"].as_str().unwrap();
            check(&format!("{name}:{tag}, layer {n}"), media_type, &blob, &diff_id);
            codings.insert(media_type.to_owned());
        }
    }
    assert_eq!(codings.len(), 3, "{codings:?}");
}

/// The encoder of `BuildKit` and skopeo is another one than libzstd's: its blocks repeat tables of those before them.
#[test]
fn layers_that_skopeo_compresses_are_entered_at_their_blocks() {
    const NAME: &str = "layers_that_skopeo_compresses_are_entered_at_their_blocks";
    let Some(images) = images(NAME) else {
        return;
    };
    if !have("skopeo") {
        return skip(NAME, "no skopeo");
    }
    let work = tempfile::tempdir().unwrap();
    let [from, to] = [&images.join("debian-python"), work.path()].map(|layout| format!("oci:{}", layout.display()));
    let copied = Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-compress-format", "zstd"])
        .args([format!("{from}:plain"), format!("{to}:zstd")])
        .status();
    assert!(copied.unwrap().success());
    let (_, manifest) = unpacked::manifest(work.path(), "zstd");
    let layers = manifest["layers"].as_array().unwrap();
    for (n, (layer, diff_id)) in layers.iter().zip(diff_ids(work.path(), &manifest)).enumerate() {
        let blob = fs::read(unpacked::blob(work.path(), layer["digest"].as_str().unwrap())).unwrap();
        let media_type = layer["mediaType"].as_str().unwrap();
        assert!(media_type.ends_with("+zstd"), "{media_type}");
        check(&format!("skopeo, layer {n}"), media_type, &blob, &diff_id);
    }
}

/// The files of a tar as the tar crate reads them: content by name, for those that are regular.
fn files(tar: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(tar).entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.insert(bare(&entry.path_bytes()), content);
        }
    }
    found
}

fn bare(path: &[u8]) -> Vec<u8> {
    path.strip_prefix(b"./").unwrap_or(path).to_vec()
}

#[test]
fn tables_of_contents_say_what_the_tar_says() {
    let Some(images) = images("tables_of_contents_say_what_the_tar_says") else {
        return;
    };
    let mut made = vec![("debian-python", "latest", 1), ("debian-python", "latest", 2)];
    for tag in ["estargz", "zstdchunked", "zstdchunked-skopeo"] {
        if !unpacked::tags_if_any(&images.join("npm")).is_empty() {
            made.push(("npm", tag, 0));
        }
    }
    for (name, tag, n) in made {
        let what = format!("{name}:{tag}, layer {n}");
        let layout = images.join(name);
        let layer = unpacked::manifest(&layout, tag).1["layers"][n].clone();
        let blob = fs::read(unpacked::blob(&layout, layer["digest"].as_str().unwrap())).unwrap();
        let length = u64::try_from(blob.len()).unwrap();
        let tail = &blob[blob.len() - usize::try_from(TAIL).unwrap()..];
        let place = Place::of_tail(tail, length).unwrap_or_else(|| panic!("{what}: no footer"));
        let annotations: BTreeMap<String, String> = serde_json::from_value(layer["annotations"].clone()).unwrap();
        if place.format == Format::Chunked {
            assert_eq!(
                Place::of_annotations(&annotations, length).unwrap().blob,
                place.blob,
                "{what}"
            );
        }
        let [from, to] = [place.blob.start, place.blob.end].map(|at| usize::try_from(at).unwrap());
        let contents = place
            .open(&blob[from..to], length, &annotations)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        // By the annotation that is of its format: containerd's zstd:chunked layers have both.
        assert!(contents.is_vouched(), "{what}");

        let coding = Coding::of_bytes(&blob);
        // Of eStargz the table itself is one of the files.
        let right = files(&index(coding, &blob).1);
        let mut seen = 0;
        let mut collector = Collector::default();
        contents.replay(&mut collector).unwrap();
        for entry in collector.0 {
            if entry.kind != Kind::File {
                continue;
            }
            let path = bare(&entry.path);
            let Some(content) = right.get(&path) else {
                panic!("{what}: {} is not in the tar", path.escape_ascii());
            };
            seen += 1;
            assert_eq!(
                entry.size,
                u64::try_from(content.len()).unwrap(),
                "{what}: {}",
                path.escape_ascii()
            );
            // Every seventh file is decoded, and every big one.
            if content.is_empty() || (seen % 7 != 0 && content.len() < 1 << 20) {
                continue;
            }
            let (begin, end) = (entry.payload().start.0, entry.payload().end().0);
            let mut at = begin;
            let mut found = Vec::new();
            while at < end {
                let number = contents.table().span_at(TarOffset(at));
                let span = contents.table().span(number);
                let until = TarOffset(end.min(span.tar.end().0));
                let mut decoder = Decoder::start(contents.table(), number, &[]).unwrap().until(until);
                let skipped = usize::try_from(at - span.tar.start.0).unwrap();
                let mut bytes = Vec::new();
                let [from, to] = [span.blob.start, span.blob.end].map(|at| usize::try_from(at).unwrap());
                decoder
                    .feed(&blob[from..to], &mut |more| bytes.extend_from_slice(more))
                    .unwrap();
                found.extend_from_slice(&bytes[skipped..]);
                at = until.0;
            }
            assert!(found == *content, "{what}: {} differs", path.escape_ascii());
        }
        eprintln!("{what}: {seen} files of {}", right.len());
        assert_eq!(seen, right.len(), "{what}");
    }
}
