//! Chunks for the disk cache out of bytes that pass by. In: pieces of a layer, from many places at once and cut anyhow. Out: the
//! chunks that lie whole in them, in the layer's cache.
//!
//! A walk over a layer's headers receives payload anyway, and reads in many places at once: each place is found again by where
//! its next byte lies. What stays less than a chunk is forgotten.

use std::sync::Arc;

use super::LayerCache;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

/// How many places are followed at once; beyond, the one that has waited longest is given up.
const MOST_PLACES: usize = 64;

/// A place where the layer is being read.
#[derive(Debug)]
struct Place {
    /// The next byte that continues it.
    next: TarOffset,
    /// The start of a chunk...
    start: TarOffset,
    /// ...and what has come from there on, always less than a chunk between two pieces.
    held: Vec<u8>,
}

/// Writes what passes by into a layer's cache, and commits it when dropped.
#[derive(Debug)]
pub struct CacheWriter {
    cache: Arc<LayerCache>,
    /// The one that grew last at the end.
    places: Vec<Place>,
}

impl CacheWriter {
    /// A writer into `cache`.
    #[must_use]
    pub const fn new(cache: Arc<LayerCache>) -> Self {
        Self {
            cache,
            places: Vec::new(),
        }
    }

    /// Takes the layer's bytes from `at` on. Waits for the disk. What there is no room for is not kept.
    pub fn push(&mut self, at: TarOffset, bytes: &[u8]) {
        let mut place = match self.places.iter().position(|place| place.next == at) {
            Some(known) => self.places.remove(known),
            None => Place {
                next: at,
                start: at,
                held: Vec::new(),
            },
        };
        self.extend(&mut place, bytes);
        if self.places.len() == MOST_PLACES {
            self.places.remove(0);
        }
        self.places.push(place);
    }

    /// Adds `bytes` to a place and writes the chunks that are whole now.
    fn extend(&self, place: &mut Place, mut bytes: &[u8]) {
        let at = place.next;
        place.next = at.plus(len_u64(bytes.len()));
        if place.held.is_empty() {
            place.start = TarOffset(at.0.next_multiple_of(CHUNK_BYTES));
            let skipped = len_usize(place.start.since(at)).min(bytes.len());
            bytes = &bytes[skipped..];
        }
        place.held.extend_from_slice(bytes);
        let held = len_u64(place.held.len());
        let whole = if place.start.plus(held).0 >= self.cache.size() {
            held
        } else {
            held / CHUNK_BYTES * CHUNK_BYTES
        };
        if whole > 0 {
            self.cache.put(place.start, &place.held[..len_usize(whole)]);
            place.held.drain(..len_usize(whole));
            place.start = place.start.plus(whole);
        }
    }
}

impl Drop for CacheWriter {
    fn drop(&mut self) {
        if let Err(error) = self.cache.commit() {
            log::debug!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CacheLimit, DiskCache, LayerKey};
    use super::*;

    #[test]
    fn pieces_of_many_places_become_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let size = 40 * CHUNK_BYTES + 100;
        let key = LayerKey::of_url("http://localhost/layer", size, "\"1\"");
        let cache = store.layer(key, size).unwrap();
        let mut writer = CacheWriter::new(Arc::clone(&cache));
        // Two places at once, in pieces that fit nothing: chunks 0..20 and 30..40 with the short last one.
        let (mut a, mut b) = (0, 30 * CHUNK_BYTES + 7);
        while a < 20 * CHUNK_BYTES || b < size {
            let len = 1000.min(20 * CHUNK_BYTES - a);
            writer.push(TarOffset(a), &vec![1; len_usize(len)]);
            a += len;
            let len = 3000.min(size - b);
            writer.push(TarOffset(b), &vec![2; len_usize(len)]);
            b += len;
        }
        assert_eq!(writer.places.len(), 2);
        drop(writer);
        assert_eq!(cache.bytes_held(), 20 * CHUNK_BYTES + 9 * CHUNK_BYTES + 100);
    }

    #[test]
    fn only_so_many_places_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let size = 1000 * CHUNK_BYTES;
        let cache = store.unnamed(size).unwrap();
        let mut writer = CacheWriter::new(Arc::clone(&cache));
        let begin = |n: u64| TarOffset(n * CHUNK_BYTES);
        for n in 0..100 {
            writer.push(begin(n), &[1; 10]);
        }
        assert_eq!(writer.places.len(), MOST_PLACES);
        // The latest first, because each of the others gives up one more.
        for n in (0..100).rev() {
            writer.push(begin(n).plus(10), &vec![1; len_usize(CHUNK_BYTES - 10)]);
        }
        assert!(!cache.has(35) && cache.has(36) && cache.has(99));
    }
}
