//! The layers of real images in every coding: read as a stream they are the tar that the image's config names, and so is
//! what is decoded from the places found on the way.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::unpacked::{self, images};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tarblk::layer::{Coding, Decoder, Indexer, Spans};
use tarblk::units::TarOffset;

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

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let hexadecimal: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hexadecimal}")
}

/// The whole and some twenty spans of one layer.
fn check(what: &str, media_type: &str, blob: &[u8], diff_id: &str) {
    let coding = Coding::of_media_type(media_type).unwrap();
    assert_eq!(Coding::of_bytes(blob), coding, "{what}");
    let (spans, tar) = index(coding, blob);
    assert_eq!(sha256(&tar), diff_id, "{what}");
    let count = spans.table.len();
    eprintln!(
        "{what}: {media_type}, {} bytes, {} of tar, {count} places",
        blob.len(),
        tar.len()
    );
    for n in (0..count).step_by(count.div_ceil(20)) {
        let span = spans.table.span(n);
        let window = spans.windows.get(n).map_or(&[][..], Vec::as_slice);
        let mut decoder = Decoder::start(&spans.table, n, window).unwrap().until(span.tar.end());
        let mut decoded = Vec::new();
        let [from, to] = [span.blob.start, span.blob.end].map(|at| usize::try_from(at).unwrap());
        decoder
            .feed(&blob[from..to], &mut |bytes| decoded.extend_from_slice(bytes))
            .unwrap();
        let [from, to] = [span.tar.start, span.tar.end()].map(|TarOffset(at)| usize::try_from(at).unwrap());
        assert!(decoded == tar[from..to], "{what}: from place {n} of {count}");
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
