//! What the fetcher is told of a layer: where its blob lies, how the tar comes out of it, and what it has to be.
//!
//! Everything here is data; nothing is read until a fetcher starts.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{FileLayer, HttpLayer};
use crate::index::{ColdDirectory, PieceDigests};
use crate::layer::SpanTable;
use crate::units::TarRange;

/// A layer whose bytes this room brings.
#[derive(Debug)]
pub struct LayerSource {
    /// Where the blob is.
    pub blob: Blob,
    /// How the tar comes out of the blob. Without it the blob is the tar: tar space is its byte space.
    pub coding: Option<Coded>,
    /// What its bytes have to be. With it no chunk is handed out that was not checked by this process.
    pub digests: Option<Verifier>,
    /// What the whole has to be, checked once the whole has passed by or lies in the store.
    pub whole: WholeDigests,
    /// The store's name for the layer: layers of the same name share what is kept. It has to stay the same as long as the
    /// layer's content does, and no longer: a blob's digest is the best. Without it a layer on a server is named by its URL
    /// and validator, and what is kept of others goes with the process.
    pub identity: Option<String>,
}

impl LayerSource {
    /// A plain tar in a file, taken as it is.
    #[must_use]
    pub fn file(layer: FileLayer) -> Self {
        Blob::File(layer).into()
    }

    /// A plain tar on a web server, taken as it is.
    #[must_use]
    pub fn http(layer: HttpLayer) -> Self {
        Blob::Http(layer).into()
    }

    /// The tar's length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.coding {
            Some(coded) => coded.table.tar_len(),
            None => self.blob.size(),
        }
    }
}

impl From<Blob> for LayerSource {
    fn from(blob: Blob) -> Self {
        Self {
            blob,
            coding: None,
            digests: None,
            whole: WholeDigests::default(),
            identity: None,
        }
    }
}

/// Where a blob is.
#[derive(Debug)]
pub enum Blob {
    /// In a local file.
    File(FileLayer),
    /// On a web server that answers Range requests.
    Http(HttpLayer),
}

impl Blob {
    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::File(layer) => layer.size,
            Self::Http(layer) => layer.size,
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
    /// In an index behind HTTP, fetched by range when one is needed.
    Http(Box<HttpLayer>, ColdDirectory),
    /// The same, with a local file that has the index's hot part and holes: what is fetched is put where it belongs, and looked
    /// for there first. The descriptor can be written to.
    Kept(Arc<OwnedFd>, Box<HttpLayer>, ColdDirectory),
}

impl fmt::Debug for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Memory(windows) => write!(f, "Memory({})", windows.len()),
            Self::File(file, _) => write!(f, "File({file:?})"),
            Self::Http(layer, _) => write!(f, "Http({layer:?})"),
            Self::Kept(file, layer, _) => write!(f, "Kept({file:?}, {layer:?})"),
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
        Self::Chunks(ChunkVerifier(Arc::new(matches)))
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
pub struct ChunkVerifier(Arc<IsRight>);

type IsRight = dyn Fn(u32, &[u8]) -> bool + Send + Sync;

impl ChunkVerifier {
    /// Whether `bytes` are chunk `index`.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        (self.0)(index, bytes)
    }
}

impl fmt::Debug for ChunkVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChunkVerifier")
    }
}

/// SHA-256 of a whole layer, as far as somebody vouches for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WholeDigests {
    /// Of the blob as it lies on the server: the digest in the manifest.
    pub blob: Option<[u8; 32]>,
    /// Of the tar that comes out of it: the diffID in the image's configuration.
    pub tar: Option<[u8; 32]>,
}

impl WholeDigests {
    /// Whether nobody vouches for anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.blob.is_none() && self.tar.is_none()
    }
}
