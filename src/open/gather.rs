//! Payload that a walk over the headers receives anyway, gathered into whole chunks for the store.
//!
//! A walk reads in many places at once and gets pieces of any length; only whole chunks can be kept. What a piece leaves of
//! a chunk waits here for the piece that follows it.

use std::sync::Arc;

use crate::fetch::CHUNK_BYTES;
use crate::fetch::store::LayerCache;
use crate::source::Tap;
use crate::units::TarOffset;

/// How many places may be read at once; beyond, what waits longest is given up.
const MAX_RUNS: usize = 64;

/// A run is put into the store when it is this long, in bytes.
const PUT_BYTES: usize = 256 << 10;

/// Bytes side by side that are still coming.
#[derive(Debug)]
struct Run {
    start: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn end(&self) -> u64 {
        self.start.saturating_add(len_u64(self.bytes.len()))
    }
}

/// Puts what passes by into a layer's cache.
#[derive(Debug)]
pub(super) struct Gather {
    cache: Arc<LayerCache>,
    /// The one that grew last at the end.
    runs: Vec<Run>,
    broken: bool,
}

impl Gather {
    pub(super) const fn new(cache: Arc<LayerCache>) -> Self {
        Self { cache, runs: Vec::new(), broken: false }
    }

    /// Puts a run's whole chunks into the store and keeps the rest.
    fn put(&mut self, run: &mut Run) {
        if let Err(error) = self.cache.put(TarOffset(run.start), &run.bytes) {
            log::warn!("{error}");
            self.broken = true;
        }
        let rest = run.end() % CHUNK_BYTES;
        let rest = usize::try_from(rest).unwrap_or(0).min(run.bytes.len());
        run.start = run.end() - len_u64(rest);
        run.bytes.drain(..run.bytes.len() - rest);
    }
}

impl Tap for Gather {
    fn bytes(&mut self, at: TarOffset, bytes: &[u8]) {
        if self.broken {
            return;
        }
        let mut run = match self.runs.iter().position(|run| run.end() == at.0) {
            Some(place) => self.runs.remove(place),
            None => Run { start: at.0, bytes: Vec::new() },
        };
        run.bytes.extend_from_slice(bytes);
        if run.bytes.len() >= PUT_BYTES {
            self.put(&mut run);
        }
        self.runs.push(run);
        if self.runs.len() > MAX_RUNS {
            let mut oldest = self.runs.remove(0);
            self.put(&mut oldest);
        }
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        for mut run in std::mem::take(&mut self.runs) {
            self.put(&mut run);
        }
        if let Err(error) = self.cache.commit() {
            log::warn!("{error}");
        }
    }
}

fn len_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::store::Store;
    use crate::fetch::{HttpLayer, Validator};

    #[test]
    fn pieces_of_many_places_become_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let size = 40 * CHUNK_BYTES + 100;
        let layer = HttpLayer {
            url: "http://localhost/layer".into(),
            size,
            validator: Some(Validator::ETag("\"1\"".into())),
            headers: Vec::new(),
        };
        let cache = store.layer(&layer).unwrap();
        let mut gather = Gather::new(Arc::clone(&cache));
        // Two places at once, in pieces that fit nothing: chunks 0..20 and 30..40 with the short last one.
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        let (mut a, mut b) = (0, 30 * CHUNK_BYTES + 7);
        while a < 20 * CHUNK_BYTES || b < size {
            let len = 1000.min(20 * CHUNK_BYTES - a);
            gather.bytes(TarOffset(a), &vec![1; usize::try_from(len).unwrap()]);
            a += len;
            let len = 3000.min(size - b);
            gather.bytes(TarOffset(b), &vec![2; usize::try_from(len).unwrap()]);
            b += len;
        }
        assert!(gather.runs.iter().all(|run| run.bytes.len() < PUT_BYTES + chunk));
        drop(gather);
        assert_eq!(cache.bytes_held(), 20 * CHUNK_BYTES + 9 * CHUNK_BYTES + 100);
    }
}
