//! Reads that other layers answer. In: a part of a chunk that is not here. Out: its bytes as another layer has them, proven to be this
//! one's ([`crate::fetch::dedup`]); where that fails, a chunk that is fetched like any other.

use std::rc::Rc;

use super::Engine;
use super::in_flight::Waiter;
use super::request::Request;
use crate::cache::chunk::{ChunkKey, Slice};
use crate::fetch::dedup::{DonorFault, Part};
use crate::fetch::runtime;
use crate::fetch::shared::SharedLayer;
use crate::fetch::stats::add;
use crate::units::{TarRange, to_usize};

impl Engine {
    /// Whether other layers have all that files have in a chunk.
    pub(super) fn is_at_donors(&self, key: ChunkKey) -> bool {
        self.fetched(key.layer)
            .is_some_and(|layer| layer.dedup.holds_chunk(key.index, layer.size))
    }

    /// Leaves the bytes of a chunk that a read wants to other layers, if they have them and this one's cache does not; says whether it did.
    /// The chunk does not become one that is here: its bytes are kept once.
    pub(super) fn ask_donors(self: &Rc<Self>, request: &Rc<Request>, key: ChunkKey, from: u64, len: u64) -> bool {
        if self.cache(key.layer).is_some_and(|cache| cache.has(key.index)) {
            return false;
        }
        let range = TarRange::new(key.start().plus(from), len);
        let found = self.fetched(key.layer).and_then(|layer| layer.dedup.find(range));
        let Some((table, parts)) = found else { return false };
        let parts: Vec<(usize, Part)> = parts.into_iter().map(|part| (request.expect(), part)).collect();
        let (engine, request) = (self.clone(), request.clone());
        self.spawn(async move { engine.read_donors(&request, key, table, parts).await });
        true
    }

    /// Fills slots of a read with parts of a chunk.
    async fn read_donors(
        self: Rc<Self>,
        request: &Rc<Request>,
        key: ChunkKey,
        table: usize,
        parts: Vec<(usize, Part)>,
    ) {
        let verifier = self.layer(key.layer).and_then(|state| state.verifier.clone());
        for (slot, part) in parts {
            let (shared, verifier) = (self.shared.clone(), verifier.clone());
            // Waiting for the disk takes a thread, but no worker's turn.
            let read = runtime::blocking(move || match shared.layers.get(to_usize(key.layer.0)) {
                Some(SharedLayer::Fetched(layer)) => match layer.dedup.get(table) {
                    Some(table) => table.read(&part, verifier.as_ref()),
                    None => Err(DonorFault::Gone),
                },
                _ => Err(DonorFault::Gone),
            });
            match read.await.unwrap_or(Err(DonorFault::Gone)) {
                Ok(bytes) => {
                    add(&self.counters.bytes_deduplicated, part.range.len);
                    request.fill(slot, Slice::from(bytes));
                }
                Err(fault) => {
                    self.note_fault(key, fault);
                    self.fetch_instead(request, slot, key, part.range);
                }
            }
        }
    }

    fn note_fault(&self, key: ChunkKey, fault: DonorFault) {
        let name = || {
            self.layer(key.layer)
                .map_or_else(String::new, |state| state.origin.name())
        };
        match fault {
            DonorFault::Gone => {}
            DonorFault::Damaged => {
                add(&self.counters.cache_damaged, 1);
                log::warn!(
                    "{}: another layer in the cache that has the same content is damaged; fetching it",
                    name()
                );
            }
            DonorFault::Other => log::warn!(
                "{}: what an index says is the same content in another layer is not; fetching it",
                name()
            ),
        }
    }

    /// What other layers were to bring does not come from there: it is fetched.
    fn fetch_instead(self: &Rc<Self>, request: &Rc<Request>, slot: usize, key: ChunkKey, range: TarRange) {
        if let Some(error) = self.poison_of(key.layer) {
            request.end(Err(error));
            return;
        }
        let from = range.start.since(key.start());
        if let Some(chunk) = self.in_memory(key) {
            add(&self.counters.bytes_memory, range.len);
            request.fill(slot, Slice::new(chunk, from, range.len));
            return;
        }
        let waiter = Waiter {
            request: request.clone(),
            slot,
            from,
            len: range.len,
        };
        let found = self.in_flight.wait(key, waiter);
        self.alarm.reader_waits();
        if found.is_new && self.cache(key.layer).is_some_and(|cache| cache.has(key.index)) {
            self.in_flight.set_coming(key);
            add(&self.counters.bytes_disk, range.len);
            self.read_cached(&[key]);
            return;
        }
        add(&self.counters.bytes_network, range.len);
        if self.layer(key.layer).is_some_and(|state| state.streaming.get()) {
            self.in_flight.set_coming(key);
        } else if !found.is_new || !self.follow(key) {
            self.launch(&[key.into()]);
        }
    }
}
