//! Chunks for a cache out of bytes that pass by. In: pieces of a layer, cut anyhow. Out: the chunks that lie whole in them.

use std::sync::Arc;

use super::{DiskCacheError, LayerCache};
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

/// Puts bytes that pass by into a cache, chunk after chunk, however they are cut.
#[derive(Debug)]
pub struct Seeder {
    cache: Arc<LayerCache>,
    /// Where `held` begins: always the start of a chunk.
    at: TarOffset,
    held: Vec<u8>,
}

impl Seeder {
    /// A seeder for `cache`.
    #[must_use]
    pub fn new(cache: Arc<LayerCache>) -> Self {
        Self {
            cache,
            at: TarOffset(0),
            held: Vec::new(),
        }
    }

    /// Takes the layer's bytes from `at` on. They need not follow what came before; then what was incomplete is forgotten.
    ///
    /// # Errors
    /// When a chunk cannot be written; then nothing more is, and going on is harmless.
    pub fn push(&mut self, at: TarOffset, mut bytes: &[u8]) -> Result<(), DiskCacheError> {
        if at != self.at.plus(len_u64(self.held.len())) || self.held.is_empty() {
            self.held.clear();
            self.at = TarOffset(at.0.next_multiple_of(CHUNK_BYTES));
            let skipped = len_usize(self.at.since(at)).min(bytes.len());
            bytes = &bytes[skipped..];
        }
        self.held.extend_from_slice(bytes);
        let end = self.at.plus(len_u64(self.held.len()));
        let whole = if end.0 >= self.cache.identity.size {
            self.held.len()
        } else {
            len_usize(len_u64(self.held.len()) / CHUNK_BYTES * CHUNK_BYTES)
        };
        if whole == 0 {
            return Ok(());
        }
        let written = self.cache.put(self.at, &self.held[..whole]);
        self.held.drain(..whole);
        self.at = self.at.plus(len_u64(whole));
        written
    }
}
