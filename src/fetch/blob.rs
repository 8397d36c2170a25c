//! What the fetcher is told of a layer: where its blob lies, how the tar comes out of it, and what it has to be.
//!
//! Everything here is data; nothing is read until a fetcher starts.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::unproven::UnprovenIndex;
use crate::digest::Digest;
use crate::index::{ChunkDigests, ColdDirectory, PieceDigests};
use crate::layer::SpanTable;
use crate::source::{Blob, LayerSpec};
use crate::units::TarRange;

/// A layer whose bytes this room brings.
#[derive(Debug)]
pub struct LayerSource {
    /// Where its blob is. Its digests are what the whole has to be, checked once the whole has passed by or lies in the cache.
    pub layer: LayerSpec,
    /// How the tar comes out of the blob. Without it the blob is the tar: tar space is its byte space.
    pub coding: Option<Coded>,
    /// What its bytes have to be, range by range. With it no chunk is handed out that was not verified by this process.
    pub verifier: Option<Verifier>,
    /// Its index, if that has to be compared with the layer's headers once all of it is here.
    pub unproven: Option<UnprovenIndex>,
}

impl LayerSource {
    /// The tar's length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.coding {
            Some(coded) => coded.table.tar_len(),
            None => self.layer.blob.len,
        }
    }
}

impl From<Blob> for LayerSource {
    /// A plain tar, taken as it is.
    fn from(blob: Blob) -> Self {
        Self {
            layer: blob.into(),
            coding: None,
            verifier: None,
            unproven: None,
        }
    }
}

/// How a tar comes out of a blob.
#[derive(Clone, Debug)]
pub struct Coded {
    /// Where decoding can begin.
    pub table: SpanTable,
    /// Where the history lies that decoding from there needs.
    pub windows: Windows,
}

/// Where the decoder windows of a span table are: entry n belongs to span n.
#[derive(Clone)]
pub enum Windows {
    /// No span needs one.
    None,
    /// In memory, as they are.
    Memory(Arc<Vec<Vec<u8>>>),
    /// In a local index file.
    File(Arc<OwnedFd>, ColdDirectory),
    /// In an index somewhere else, fetched by range when one is needed.
    Remote(Box<Blob>, ColdDirectory),
    /// The same, with a local file that has the index's hot part and holes: what is fetched is put where it belongs, and looked
    /// for there first. The descriptor can be written to.
    Kept(Arc<OwnedFd>, Box<Blob>, ColdDirectory),
}

impl fmt::Debug for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Memory(windows) => write!(f, "Memory({})", windows.len()),
            Self::File(file, _) => write!(f, "File({file:?})"),
            Self::Remote(blob, _) => write!(f, "Remote({blob:?})"),
            Self::Kept(file, blob, _) => write!(f, "Kept({file:?}, {blob:?})"),
        }
    }
}

/// What a layer's bytes have to be, range by range. A range is checked as a whole before any byte of it is handed out.
#[derive(Clone)]
pub enum Verifier {
    /// Every chunk is a range of its own.
    Chunks(ChunkVerifier),
    /// Ranges of any length (up to [`crate::index::MAX_PIECE`]), which have to lie inside of one span each. What lies in none of
    /// them is nobody's content and handed out as zeros.
    Pieces(PieceDigests),
}

impl Verifier {
    /// Every chunk by itself: asks `matches` for its number and bytes. Called on any thread, for every chunk: whatever it needs
    /// is in memory.
    #[must_use]
    pub fn chunks(matches: impl Fn(u32, &[u8]) -> bool + Send + Sync + 'static) -> Self {
        Self::Chunks(ChunkVerifier(Matches::Asked(Arc::new(matches))))
    }

    /// Every chunk by its digest in an index. Layers that have the same digests can share what is held of them.
    #[must_use]
    pub const fn chunk_digests(digests: ChunkDigests) -> Self {
        Self::Chunks(ChunkVerifier(Matches::Digests(digests)))
    }

    /// The digests, where they are known.
    pub(super) fn digests(&self) -> Option<VerifierDigests> {
        match self {
            Self::Chunks(ChunkVerifier(Matches::Digests(digests))) => Some(VerifierDigests::Chunks(digests.clone())),
            Self::Chunks(ChunkVerifier(Matches::Asked(_))) => None,
            Self::Pieces(pieces) => Some(VerifierDigests::Pieces(pieces.clone())),
        }
    }

    /// The ranges, if they are not simply the chunks.
    pub(crate) const fn pieces(&self) -> Option<&PieceDigests> {
        match self {
            Self::Chunks(_) => None,
            Self::Pieces(pieces) => Some(pieces),
        }
    }

    /// Whether `bytes` are chunk `index`, where that can be told of a chunk alone; of others it was told before there was a chunk.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        match self {
            Self::Chunks(check) => check.matches(index, bytes),
            Self::Pieces(_) => true,
        }
    }

    /// What has to be decoded for `range` to be checked.
    pub(crate) fn widened(&self, range: TarRange) -> TarRange {
        match self {
            Self::Chunks(_) => range,
            Self::Pieces(pieces) => pieces.widened(range),
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunks(_) => f.write_str("Chunks"),
            Self::Pieces(pieces) => write!(f, "Pieces({})", pieces.len()),
        }
    }
}

/// Says of a chunk, by its number and bytes, whether it is what the layer's index says.
#[derive(Clone)]
pub struct ChunkVerifier(Matches);

#[derive(Clone)]
enum Matches {
    Digests(ChunkDigests),
    Asked(Arc<IsRight>),
}

type IsRight = dyn Fn(u32, &[u8]) -> bool + Send + Sync;

impl ChunkVerifier {
    /// Whether `bytes` are chunk `index`.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        match &self.0 {
            Matches::Digests(digests) => digests.check(index.into(), bytes),
            Matches::Asked(is_right) => is_right(index, bytes),
        }
    }
}

impl fmt::Debug for ChunkVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChunkVerifier")
    }
}

/// The digests that a [`Verifier`] compares with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VerifierDigests {
    Chunks(ChunkDigests),
    Pieces(PieceDigests),
}

/// SHA-256 of a whole layer, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WholeDigests {
    /// Of the blob as it lies on the server: the digest in the manifest.
    pub(crate) blob: Option<[u8; 32]>,
    /// Of the tar that comes out of it: the diffID in the image's configuration.
    pub(crate) tar: Option<[u8; 32]>,
}

impl WholeDigests {
    pub(crate) fn of(layer: &LayerSpec) -> Self {
        let sha256 = |digest: &Option<Digest>| digest.as_ref().and_then(Digest::sha256);
        Self {
            blob: sha256(&layer.digest),
            tar: sha256(&layer.diff_id),
        }
    }

    /// Whether there is nothing to compare with.
    pub(crate) fn is_empty(&self) -> bool {
        self.blob.is_none() && self.tar.is_none()
    }
}
