//! Ranges of chunks: what is planned, asked for and fetched.

use crate::cache::chunk::ChunkKey;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// A range of chunks of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkRange {
    /// The layer.
    pub layer: LayerId,
    /// The first chunk's number.
    pub first: u32,
    /// One past the last.
    pub end: u32,
}

impl From<ChunkKey> for ChunkRange {
    fn from(key: ChunkKey) -> Self {
        Self {
            layer: key.layer,
            first: key.index,
            end: key.index.saturating_add(1),
        }
    }
}

impl ChunkRange {
    /// The chunks that hold `range`; none when it is empty.
    #[must_use]
    pub fn of(layer: LayerId, range: TarRange) -> Self {
        let first = ChunkKey::holding(layer, range.start).index;
        if range.is_empty() {
            return Self {
                layer,
                first,
                end: first,
            };
        }
        let last = ChunkKey::holding(layer, TarOffset(range.end().0 - 1)).index;
        Self {
            layer,
            first,
            end: last + 1,
        }
    }

    /// Its chunks in order.
    #[must_use]
    pub fn keys(self) -> impl DoubleEndedIterator<Item = ChunkKey> {
        (self.first..self.end).map(move |index| ChunkKey {
            layer: self.layer,
            index,
        })
    }

    /// Its length in bytes, as if no chunk were short.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.count()) * CHUNK_BYTES
    }

    /// How many chunks it has.
    #[must_use]
    pub fn count(self) -> u32 {
        self.end.saturating_sub(self.first)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.end <= self.first
    }
}
