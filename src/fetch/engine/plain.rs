//! Flights over layers whose blob is the tar. In: a range of chunks. Out: those chunks, cut from the blob's bytes as they come.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::flight::{Flight, FlightGuard, Received};
use super::origin::Trouble;
use super::{Engine, LayerState, MARKED_WHOLE, MARKER_DISTANCE};
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::fetch::FetchError;
use crate::prefetch::{ChunkRange, PlannedFlight};
use crate::units::{CHUNK_BYTES, LayerId, len_u64, len_usize};

/// A range of chunks, fetched by one request at a time.
pub(super) struct PlainFlight {
    chunks: ChunkRange,
    /// The first chunk that has not come.
    next: Cell<u32>,
}

impl Flight for PlainFlight {
    fn layer(&self) -> LayerId {
        self.chunks.layer
    }

    fn rest(&self) -> ChunkRange {
        ChunkRange {
            first: self.next.get(),
            ..self.chunks
        }
    }

    fn progress(&self) -> u64 {
        self.next.get().into()
    }

    fn is_done(&self, engine: &Engine) -> bool {
        !engine.in_flight.contains_any(self.rest())
    }

    fn finish(&self) {
        self.next.set(self.chunks.end);
    }

    /// What comes is checked chunk by chunk, apart from the flight; of what the flight itself finds wrong, that goes for its next
    /// chunk.
    fn mismatched(&self, engine: &Rc<Engine>, state: &LayerState, why: &str) -> Result<Duration, FetchError> {
        let key = ChunkKey {
            layer: self.chunks.layer,
            index: self.next.get(),
        };
        engine.digest_mismatched(state, key, Instant::now(), why)
    }

    async fn attempt(
        &self,
        engine: &Rc<Engine>,
        state: &Rc<LayerState>,
        guard: &FlightGuard<Self>,
    ) -> Result<Received, Trouble> {
        let ChunkRange { layer, end, .. } = self.chunks;
        let size = state.size;
        let start = u64::from(self.next.get()) * CHUNK_BYTES;
        let stop = (u64::from(end) * CHUNK_BYTES).min(size);
        let mut body = state
            .origin
            .get(&engine.client, start, stop.saturating_sub(start), guard.demand)
            .await?;
        if body.is_whole() {
            return Ok(Received::WholeBlob(body));
        }
        engine.note_head(&body);
        let mut chunk = Vec::new();
        while let Some(mut data) = body.next().await? {
            engine.note_arrival(state, len_u64(data.len()));
            let mut arrived = Vec::new();
            while !data.is_empty() {
                let key = ChunkKey {
                    layer,
                    index: self.next.get(),
                };
                let whole = len_usize(chunk_len(size, key.index));
                if chunk.capacity() == 0 {
                    chunk.reserve_exact(whole);
                }
                let part = data.split_to(data.len().min(whole - chunk.len()));
                chunk.extend_from_slice(&part);
                if chunk.len() == whole {
                    self.next.set(key.index + 1);
                    guard.arrived(CHUNK_BYTES);
                    arrived.push((key, std::mem::take(&mut chunk)));
                }
            }
            if !arrived.is_empty() {
                engine.verify_and_deliver(arrived, Instant::now());
                engine.pump();
            }
        }
        Ok(Received::Range)
    }
}

impl Engine {
    /// Sends a flight for chunks that are all absent, of a layer whose blob is the tar.
    pub(super) fn send_plain(self: &Rc<Self>, state: &Rc<LayerState>, planned: &PlannedFlight, demand: bool) {
        let chunks = planned.chunks();
        let owner = self.owner_of_request();
        for key in chunks.keys() {
            let marker = chunks.count() <= MARKED_WHOLE || (key.index - chunks.first).is_multiple_of(MARKER_DISTANCE);
            self.expect(&owner, key, planned.reason(key.index), marker);
        }
        let flight = PlainFlight {
            chunks,
            next: Cell::new(chunks.first),
        };
        let guard = FlightGuard::new(self, state, flight, chunks.bytes(), demand);
        self.spawn(owner.scope(self.clone().fly(guard)));
    }
}
