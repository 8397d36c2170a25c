//! Payload that a walk over the headers receives anyway, handed to the store.
//!
//! A walk reads in many places at once. A [`Seeder`] follows one of them; here is one for each, found again by where its next
//! byte lies.

use std::sync::Arc;

use crate::cache::disk::{LayerCache, Seeder};
use crate::units::TarOffset;
use crate::walk::Tap;

/// How many places may be read at once; beyond, what waits longest is given up.
const MAX_PLACES: usize = 64;

/// Puts what passes by into a layer's cache.
#[derive(Debug)]
pub(super) struct Gather {
    cache: Arc<LayerCache>,
    /// Where the next byte of each place lies; the one that grew last at the end.
    places: Vec<(TarOffset, Seeder)>,
    broken: bool,
}

impl Gather {
    pub(super) const fn new(cache: Arc<LayerCache>) -> Self {
        Self {
            cache,
            places: Vec::new(),
            broken: false,
        }
    }
}

impl Tap for Gather {
    fn bytes(&mut self, at: TarOffset, bytes: &[u8]) {
        if self.broken {
            return;
        }
        let mut seeder = match self.places.iter().position(|(next, _)| *next == at) {
            Some(place) => self.places.remove(place).1,
            None => Seeder::new(Arc::clone(&self.cache)),
        };
        if let Err(error) = seeder.push(at, bytes) {
            log::warn!("{error}");
            self.broken = true;
        }
        if self.places.len() == MAX_PLACES {
            self.places.remove(0);
        }
        self.places
            .push((at.plus(u64::try_from(bytes.len()).unwrap_or(u64::MAX)), seeder));
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        self.places.clear();
        if let Err(error) = self.cache.commit() {
            log::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::disk::{DiskCache, LayerKey};
    use crate::units::CHUNK_BYTES;

    #[test]
    fn pieces_of_many_places_become_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path()).unwrap();
        let size = 40 * CHUNK_BYTES + 100;
        let cache = store
            .layer(LayerKey::of_url("http://localhost/layer", size, "\"1\""), size)
            .unwrap();
        let mut gather = Gather::new(Arc::clone(&cache));
        // Two places at once, in pieces that fit nothing: chunks 0..20 and 30..40 with the short last one.
        let (mut a, mut b) = (0, 30 * CHUNK_BYTES + 7);
        while a < 20 * CHUNK_BYTES || b < size {
            let len = 1000.min(20 * CHUNK_BYTES - a);
            gather.bytes(TarOffset(a), &vec![1; usize::try_from(len).unwrap()]);
            a += len;
            let len = 3000.min(size - b);
            gather.bytes(TarOffset(b), &vec![2; usize::try_from(len).unwrap()]);
            b += len;
        }
        assert_eq!(gather.places.len(), 2);
        drop(gather);
        assert_eq!(cache.bytes_held(), 20 * CHUNK_BYTES + 9 * CHUNK_BYTES + 100);
    }
}
