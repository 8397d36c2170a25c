//! Chunks: the unit in which layers are fetched, kept and counted. In: bytes as they arrive. Out: immutable pieces of tar
//! space that many readers hold at once.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange, len_u64, len_usize};

/// Which chunk of which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The layer.
    pub layer: LayerId,
    /// The chunk's number, counted from the layer's first byte.
    pub index: u32,
}

impl ChunkKey {
    /// The chunk that holds the byte at `at`. Layers are refused at the start when they have more chunks than fit a `u32`,
    /// so positions inside a layer never saturate.
    pub(crate) fn holding(layer: LayerId, at: TarOffset) -> Self {
        Self {
            layer,
            index: u32::try_from(at.0 / CHUNK_BYTES).unwrap_or(u32::MAX),
        }
    }

    /// Its first byte.
    pub(crate) fn start(self) -> TarOffset {
        TarOffset(u64::from(self.index) * CHUNK_BYTES)
    }
}

/// How many chunks a layer of `size` bytes has, when they can be numbered.
pub(crate) fn chunk_count(size: u64) -> Option<u32> {
    u32::try_from(size.div_ceil(CHUNK_BYTES)).ok()
}

/// How long chunk `index` of a layer of `size` bytes is.
pub(crate) fn chunk_len(size: u64, index: u32) -> u64 {
    size.saturating_sub(u64::from(index) * CHUNK_BYTES).min(CHUNK_BYTES)
}

/// Immutable bytes in memory.
pub(crate) struct Chunk {
    bytes: Vec<u8>,
    /// Read since the memory cache's hand last passed.
    recent: AtomicBool,
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk")
            .field("len", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl Chunk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            recent: AtomicBool::new(false),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Notes a use.
    pub(crate) fn touch(&self) {
        // Looked at first: a line that many threads read is written by none of them again.
        if !self.recent.load(Ordering::Relaxed) {
            self.recent.store(true, Ordering::Relaxed);
        }
    }

    /// Takes back the mark of recent use and says whether it was there.
    pub(crate) fn cool(&self) -> bool {
        self.recent.swap(false, Ordering::Relaxed)
    }
}

/// Bytes of a layer that are in memory, kept there as long as this lives.
#[derive(Clone, Debug)]
pub struct Slice {
    chunk: Arc<Chunk>,
    start: u32,
    len: u32,
}

impl Slice {
    /// The part of `chunk` from `start` on, at most `len` bytes long.
    pub(crate) fn new(chunk: Arc<Chunk>, start: u64, len: u64) -> Self {
        let held = len_u64(chunk.bytes.len());
        let start = start.min(held);
        let len = len.min(held - start);
        Self {
            chunk,
            start: u32::try_from(start).unwrap_or(u32::MAX),
            len: u32::try_from(len).unwrap_or(0),
        }
    }
}

impl Slice {
    /// The part of it from `start` on, at most `len` bytes long.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Self {
        Self::new(
            Arc::clone(&self.chunk),
            u64::from(self.start) + len_u64(start),
            len_u64(len.min(self.len().saturating_sub(start))),
        )
    }
}

impl From<Vec<u8>> for Slice {
    /// Bytes that come from somewhere else: for whoever stands in for a fetcher.
    fn from(bytes: Vec<u8>) -> Self {
        let len = len_u64(bytes.len());
        Self::new(Arc::new(Chunk::new(bytes)), 0, len)
    }
}

impl Deref for Slice {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = len_usize(self.start.into());
        &self.chunk.bytes[start..start + len_usize(self.len.into())]
    }
}

/// A few slices: a read of up to 32 KiB needs no more than two, and then no memory is allocated for the list.
pub type Slices = SmallVec<[Slice; 2]>;

/// The pieces of `range` chunk by chunk: which chunk, from where in it, how many bytes.
pub(crate) fn pieces(layer: LayerId, range: TarRange) -> impl Iterator<Item = (ChunkKey, u64, u64)> {
    let mut at = range.start;
    let end = range.end();
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let key = ChunkKey::holding(layer, at);
        let inside = at.since(key.start());
        let len = (CHUNK_BYTES - inside).min(end.since(at));
        at = at.plus(len);
        Some((key, inside, len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_tile_the_range() {
        let range = TarRange::new(TarOffset(CHUNK_BYTES - 512), CHUNK_BYTES + 1024);
        let all: Vec<_> = pieces(LayerId(0), range)
            .map(|(key, from, len)| (key.index, from, len))
            .collect();
        assert_eq!(all, [(0, CHUNK_BYTES - 512, 512), (1, 0, CHUNK_BYTES), (2, 0, 512)]);
        assert_eq!(pieces(LayerId(0), TarRange::new(TarOffset(7), 0)).count(), 0);
    }

    #[test]
    fn the_last_chunk_is_short() {
        assert_eq!(chunk_count(0), Some(0));
        assert_eq!(chunk_count(CHUNK_BYTES + 1), Some(2));
        assert_eq!(chunk_count(u64::MAX), None);
        assert_eq!(chunk_len(CHUNK_BYTES + 1, 0), CHUNK_BYTES);
        assert_eq!(chunk_len(CHUNK_BYTES + 1, 1), 1);
    }

    #[test]
    fn a_use_is_recent_once() {
        let chunk = Chunk::new(vec![0; 8]);
        assert!(!chunk.cool());
        chunk.touch();
        assert!(chunk.cool());
        assert!(!chunk.cool());
    }

    #[test]
    fn a_slice_never_leaves_its_chunk() {
        let chunk = Arc::new(Chunk::new(vec![1, 2, 3]));
        assert_eq!(&*Slice::new(chunk.clone(), 1, 100), [2, 3]);
        assert!(Slice::new(chunk, 9, 1).is_empty());
    }
}
