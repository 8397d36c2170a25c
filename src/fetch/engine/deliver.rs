//! Chunks that have come, and chunks that will not. In: a chunk's bytes, verified where they can be, or an error. Out: the
//! readers that waited for it told, the chunk in the memory cache and on its way to the disk cache.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::in_flight::{Purpose, Released, Waiter};
use super::{Engine, LayerState};
use crate::cache::Slice;
use crate::cache::chunk::{Chunk, ChunkKey};
use crate::fetch::FetchError;
use crate::fetch::stats::add;
use crate::http::WaitOwner;
use crate::prefetch::{ChunkRange, Reason};
use crate::units::CHUNK_BYTES;

impl Engine {
    /// A request, whose waits are those of `request`, brings a chunk for this reason.
    pub(super) fn expect(self: &Rc<Self>, request: &WaitOwner, key: ChunkKey, reason: Reason, marker: bool) {
        self.bring(key, request);
        match self.in_flight.expect(key, reason != Reason::Bundled, marker) {
            Purpose::Demand => self.planner.borrow_mut().demanded(),
            Purpose::Prefetch => {
                self.planner.borrow_mut().prefetched(key, reason);
                add(&self.counters.bytes_prefetched, CHUNK_BYTES);
            }
            Purpose::Fill => add(&self.counters.bytes_filled, CHUNK_BYTES),
            Purpose::Bundled => self.planner.borrow_mut().prefetched(key, Reason::Bundled),
        }
    }

    /// A chunk has come, by a request or from the disk cache: it goes to memory and to all readers that wait for it, and with
    /// `store` to the disk cache.
    pub(super) fn deliver(self: &Rc<Self>, key: ChunkKey, bytes: Vec<u8>, store: bool) {
        let Some(layer) = self.fetched(key.layer).filter(|layer| layer.poison.get().is_none()) else {
            return;
        };
        let known = self.in_flight.take(key);
        let is_stored = layer.content.cache.get().is_some_and(|cache| cache.has(key.index));
        if known.is_none() && (is_stored || layer.content.memory.holds(key.index)) {
            return;
        }
        let purpose = known.as_ref().map_or(Purpose::Bundled, |pending| pending.purpose);
        let pending = known.unwrap_or_default();
        if purpose == Purpose::Fill && pending.waiters.is_empty() {
            let chunk = Arc::new(Chunk::new(bytes));
            self.end_bringing(key, Some(&chunk));
            let _unless_the_cache_is_full = self.queue_write(key, chunk, false);
            return;
        }
        let chunk = Arc::new(Chunk::new(bytes));
        if purpose == Purpose::Demand {
            let _its_reader_was_told = layer.content.early.read(key.index);
        } else {
            let prefetched = purpose == Purpose::Prefetch;
            layer.content.early.came(key.index, prefetched, pending.marker);
        }
        layer.content.memory.insert(key.index, chunk.clone(), is_stored);
        tell(pending.waiters, &chunk);
        self.end_bringing(key, Some(&chunk));
        let mut now = Vec::new();
        self.planner
            .borrow_mut()
            .arrived(key, &|key, show| self.peek(key, show), &mut now);
        self.launch(&now);
        if store {
            let _in_memory_anyway = self.queue_write(key, chunk, false);
        }
    }

    /// A chunk of a layer that is read from end to end has come: it goes to the disk cache, and to memory only if a reader waits
    /// for it or the disk cache does not take it.
    pub(super) fn deliver_streamed(self: &Rc<Self>, state: &LayerState, key: ChunkKey, bytes: Vec<u8>) {
        self.count_verified(state);
        let waiters = self
            .in_flight
            .take(key)
            .map(|pending| pending.waiters)
            .unwrap_or_default();
        let chunk = Arc::new(Chunk::new(bytes));
        let stored = self.queue_write(key, chunk.clone(), true);
        if (!waiters.is_empty() || !stored)
            && let Some(layer) = self.fetched(key.layer)
        {
            layer.content.memory.insert(key.index, chunk.clone(), false);
        }
        tell(waiters, &chunk);
        self.end_bringing(key, Some(&chunk));
    }

    /// Chunks that will not come: whoever waits for one is told.
    pub(super) fn give_up(&self, chunks: ChunkRange, error: &FetchError) {
        self.end_bringing_of(chunks);
        for key in self.in_flight.keys_in(chunks) {
            let Some(pending) = self.in_flight.take(key) else {
                continue;
            };
            self.planner.borrow_mut().not_fetched(key);
            for waiter in pending.waiters {
                waiter.request.end(Err(error.clone()));
            }
        }
    }

    /// Fails the reads that would have waited past the deadline after another `pause`.
    pub(super) fn expire(&self, chunks: ChunkRange, pause: Duration, error: &FetchError) {
        for waiter in self.in_flight.take_late(chunks, pause, self.options.deadline) {
            waiter.request.end(Err(error.clone()));
        }
    }

    /// No request brings a chunk any more; says whether readers wait for it, so that it has to be asked for again.
    pub(super) fn release(&self, key: ChunkKey) -> bool {
        let released = self.in_flight.release(key);
        self.end_bringing(key, None);
        if matches!(released, Released::Dropped(_)) {
            self.planner.borrow_mut().not_fetched(key);
        }
        released == Released::Wanted
    }
}

/// Fills a chunk's place in all reads that wait for it.
fn tell(waiters: SmallVec<[Waiter; 1]>, chunk: &Arc<Chunk>) {
    for waiter in waiters {
        let slice = Slice::new(chunk.clone(), waiter.from, waiter.len);
        waiter.request.fill(waiter.slot, slice);
    }
}
