//! The layers of a world: as they are on the server, as they come out, and what is known of them.

#[path = "../common/packed.rs"]
mod packed;

use packed::gzip;
use std::sync::Arc;

use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::fetch::{Coded, LayerSource, Verifier, Windows};
use tarblk::internals::http::Validator;
use tarblk::internals::layer::{Begins, Coding, Indexer, Spans};
use tarblk::internals::source::{Blob, LayerSpec, Place, UrlBlob};
use tarblk::internals::units::CHUNK_BYTES;
use zstd::stream::raw::CParameter;

use super::chance::Chance;

/// Between the places that a blob can be decoded from.
const SPACING: u64 = 100_000;
/// What each layer is cut in before it is compressed, where it has several members or frames.
const MEMBER: usize = 150_000;

/// A layer of the laboratory; made once, used by every world.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) kind: &'static str,
    pub(crate) tar: Arc<Vec<u8>>,
    pub(crate) blob: Arc<Vec<u8>>,
    /// None: the blob is the tar.
    spans: Option<Spans>,
}

/// Something between text and noise: compresses to about a third.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        match chance.below(5) {
            0 | 1 => bytes.extend_from_slice(&chance.next().to_le_bytes()),
            2 if bytes.len() > 40_000 => {
                let from = bytes.len() - 1 - chance.index(30_000);
                let again = bytes[from..bytes.len().min(from + 50)].to_vec();
                bytes.extend_from_slice(&again);
            }
            _ => bytes.extend_from_slice(b"a line that comes often\n"),
        }
    }
    bytes.truncate(len);
    bytes
}

fn indexed(mut indexer: Indexer, blob: &[u8]) -> Spans {
    for piece in blob.chunks(100_000) {
        indexer.feed(piece, &mut |_| {}).unwrap();
    }
    indexer.finish().unwrap()
}

/// One of each kind but [`entered_at_blocks`], of different lengths.
pub(crate) fn all() -> Vec<Layer> {
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).unwrap();
    let pieces = |tar: &[u8], code: &dyn Fn(&[u8]) -> Vec<u8>| tar.chunks(MEMBER).flat_map(code).collect::<Vec<u8>>();
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    let coded = |kind, coding, tar: Vec<u8>, blob: Vec<u8>| Layer {
        kind,
        spans: Some(indexed(Indexer::new(coding, SPACING), &blob)),
        tar: Arc::new(tar),
        blob: Arc::new(blob),
    };
    let in_order = |kind, tar: Vec<u8>, blob: Vec<u8>| Layer {
        kind,
        spans: Some(indexed(Indexer::new(Coding::Zstd, SPACING).frames_only(), &blob)),
        tar: Arc::new(tar),
        blob: Arc::new(blob),
    };
    let plain = |kind, tar: Vec<u8>| Layer {
        kind,
        spans: None,
        tar: Arc::new(tar.clone()),
        blob: Arc::new(tar),
    };
    let (one, two, three, four) = (
        content(700_321, 1),
        content(35 * chunk, 2),
        content(900_001, 3),
        content(500_000, 4),
    );
    vec![
        plain("plain", content(40 * chunk + 12_345, 5)),
        plain("short plain", content(70_000, 6)),
        coded("gzip", Coding::Gzip, one.clone(), gzip(&one)),
        coded("gzip members", Coding::Gzip, two.clone(), pieces(&two, &gzip)),
        coded("zstd frames", Coding::Zstd, three.clone(), pieces(&three, &zstd)),
        in_order("one zstd frame", four.clone(), zstd(&four)),
    ]
}

/// The same, and one that is entered at blocks of a zstd frame.
pub(crate) fn with_blocks() -> Vec<Layer> {
    let mut layers = all();
    layers.push(entered_at_blocks());
    layers
}

/// One zstd frame, each of whose spans begins at a block that can be entered.
fn entered_at_blocks() -> Layer {
    let tar = content(1_100_000, 7);
    let mut zstd = zstd::bulk::Compressor::new(3).unwrap();
    // Windows of more than that would be too much beside so small a blob.
    zstd.set_parameter(CParameter::WindowLog(17)).unwrap();
    let blob = zstd.compress(&tar).unwrap();
    let spans = indexed(Indexer::new(Coding::Zstd, SPACING), &blob);
    let begins = |n| spans.table.span(n).begins;
    assert!(spans.table.len() > 3 && (1..spans.table.len()).all(|n| begins(n) == Begins::Block));
    Layer {
        kind: "zstd blocks",
        spans: Some(spans),
        tar: Arc::new(tar),
        blob: Arc::new(blob),
    }
}

impl Layer {
    /// Whether a part of it can be had without all before it.
    pub(crate) fn can_seek(&self) -> bool {
        self.spans.as_ref().is_none_or(|spans| spans.table.seekable())
    }

    /// Whether it may be decoded from blocks of zstd frames.
    pub(crate) fn has_blocks(&self) -> bool {
        self.spans.as_ref().is_some_and(|spans| spans.table.has_blocks())
    }

    /// What a fetcher is told of the layer at `url`. With `digests` each chunk and the whole are known.
    pub(crate) fn source(&self, url: &str, digests: bool) -> LayerSource {
        let len = u64::try_from(self.blob.len()).unwrap();
        let at = UrlBlob {
            validator: Some(Validator::ETag(format!("\"{}\"", self.kind))),
            ..UrlBlob::new(&url.parse().unwrap())
        };
        let blob = Blob::of_url(at, len);
        assert!(matches!(blob.place, Place::Url(_)));
        let digest = |bytes: &[u8]| digests.then(|| Digest::of(Algorithm::Sha256, bytes));
        let tar = self.tar.clone();
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        // The bytes themselves in the place of digests: what is tested is when they are compared.
        let check = move |index: u32, bytes: &[u8]| {
            let from = usize::try_from(index).unwrap() * chunk;
            tar.get(from..(from + chunk).min(tar.len())) == Some(bytes)
        };
        LayerSource {
            coding: self.spans.as_ref().map(|spans| Coded {
                table: spans.table.clone(),
                windows: Windows::Memory(Arc::new(spans.windows.clone())),
            }),
            verifier: digests.then(|| Verifier::chunks(check)),
            unproven: None,
            layer: LayerSpec {
                digest: digest(&self.blob),
                diff_id: digest(&self.tar),
                cached_as: digests.then(|| format!("layer {}", self.kind)),
                ..blob.into()
            },
        }
    }
}
