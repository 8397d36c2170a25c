//! Flights over compressed layers. In: chunks that are wanted. Out: the spans of the blob that hold them, fetched by one
//! request each way, and every chunk that comes out of them.
//!
//! A span can only be decoded from its beginning, so spans are what flies: whatever lies in one before the last chunk that is wanted
//! of it has been paid for, and comes along. What lies behind that is left out where a profile says what is wanted, or where nothing of it
//! is lacking: the decoder is parked there. A chunk that lies across the border of two flights is put together of
//! what both bring. All here counts bytes of tar space, except where it says blob.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::coded_layer::{BRIDGE, CodedLayer, SpanRequest, WantedSpan, WantedSpans};
use super::flight::{Flight, FlightGuard, Received};
use super::origin::{Body, Trouble};
use super::pipeline::{ChunkOut, Chunker, DecodePipeline};
use super::{Engine, LayerState, MARKED_WHOLE, MARKER_DISTANCE};
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::fetch::FetchError;
use crate::fetch::dedup::LEAST_CUT;
use crate::fetch::stats::add;
use crate::layer::{Coding, Decoder};
use crate::prefetch::{ChunkRange, Planned, PlannedFlight, Presence, Reason};
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange, len_u64};

/// Where it is known what else is wanted, the rest of a span is left out if it takes longer to come than this part of a round trip, which is what
/// asking for it later costs if it is wanted after all, and has [`LEAST_CUT`] bytes.
const WORTH_PART: u64 = 8;

/// An answer of which some may have come before there was a decoder for it.
struct Arriving {
    body: Body,
    /// What has come and was not decoded yet.
    ahead: VecDeque<Bytes>,
}

impl From<Body> for Arriving {
    fn from(body: Body) -> Self {
        Self {
            body,
            ahead: VecDeque::new(),
        }
    }
}

impl Arriving {
    /// The next bytes; none when all that was asked for has come.
    async fn next(&mut self) -> Result<Option<Bytes>, Trouble> {
        match self.ahead.pop_front() {
            Some(piece) => Ok(Some(piece)),
            None => self.body.next().await,
        }
    }

    /// Waits for `other`, and reads the answer meanwhile.
    async fn read_until<T>(&mut self, mut other: impl Future<Output = T> + Unpin) -> Result<T, Trouble> {
        loop {
            let mut done = None;
            let mut coming = pin!(self.body.next());
            // A read that has begun is not broken off: what it has done until then would be lost.
            let piece = loop {
                tokio::select! {
                    biased;
                    output = &mut other, if done.is_none() => done = Some(output),
                    piece = &mut coming => break piece?,
                }
            };
            let is_over = piece.is_none();
            self.ahead.extend(piece);
            match done {
                Some(output) => return Ok(output),
                None if is_over => return Ok(other.await),
                None => {}
            }
        }
    }
}

/// A request for spans on its way.
pub(super) struct CodedFlight {
    coded: Rc<CodedLayer>,
    request: Rc<SpanRequest>,
    /// The chunk that was wrong.
    wrong: Cell<Option<u32>>,
    /// Before a request: the decoder, where the last one left it, or one that was parked.
    pipeline: RefCell<Option<DecodePipeline>>,
    /// How often what was decoded from a block of a zstd frame was wrong.
    block_failures: Cell<u32>,
    /// Since when all has come that is decoded and was not delivered.
    since: Cell<Instant>,
}

impl CodedFlight {
    /// Delivers what came out of the decoder.
    fn deliver(&self, engine: &Rc<Engine>, state: &Rc<LayerState>, out: ChunkOut) {
        if self.wrong.get().is_some() {
            return;
        }
        let layer = self.request.layer;
        match out {
            ChunkOut::Whole { index, bytes, right } => {
                engine.count_verified(state);
                if !right {
                    self.wrong.set(Some(index));
                    return;
                }
                self.request
                    .advance(u64::from(index) * CHUNK_BYTES + len_u64(bytes.len()));
                self.since.set(Instant::now());
                add(&engine.counters.bytes_decoded, len_u64(bytes.len()));
                Engine::digest_matched(state, index);
                engine.deliver(ChunkKey { layer, index }, bytes, true);
            }
            ChunkOut::Wrong { index } => self.wrong.set(Some(index)),
            ChunkOut::Part { at, bytes } => {
                self.request.advance(at + len_u64(bytes.len()));
                self.since.set(Instant::now());
                add(&engine.counters.bytes_decoded, len_u64(bytes.len()));
                engine.deliver_part(&self.coded, layer, at, &bytes);
            }
        }
    }

    /// Asks for what is left and has a decoder for it: the one of the last request, or one that begins at the next span.
    async fn begin(
        &self,
        engine: &Rc<Engine>,
        state: &LayerState,
        demand: bool,
    ) -> Result<(Option<DecodePipeline>, Arriving), Trouble> {
        let (coded, request) = (&*self.coded, &*self.request);
        let kept = self.pipeline.take();
        if let Some(pipeline) = kept {
            let start = pipeline.blob_at;
            if start >= request.asked.get() {
                let _there_is_more_or_it_holds_less = coded.ask_more(request, &pipeline);
            }
            let stop = request.asked.get();
            let asked = if start < stop {
                state.origin.get(&engine.client, start, stop - start, demand).await
            } else {
                Err(holds_less())
            };
            return match asked {
                Ok(body) => Ok((Some(pipeline), body.into())),
                Err(trouble) => {
                    self.pipeline.replace(Some(pipeline));
                    Err(trouble)
                }
            };
        }
        // From here on nothing counts that came before; what is found wrong may also be a window.
        self.since.set(Instant::now());
        let delivered = request.delivered.get();
        let number = coded.table.span_at(TarOffset(delivered));
        let span = coded.table.span(number);
        let start = span.blob.start;
        let len = request.asked.get().saturating_sub(start).max(1);
        // A zstd frame is entered anew at each span.
        let spans = match coded.table.coding() {
            Coding::Zstd => number..coded.table.span_at(TarOffset(request.spans_end.saturating_sub(1))) + 1,
            _ => number..number + 1,
        };
        let mut windows = pin!(engine.windows(&coded.windows, &coded.table, spans, demand));
        let mut asked = pin!(state.origin.get(&engine.client, start, len, demand));
        let mut early = None;
        let body = loop {
            tokio::select! {
                biased;
                found = &mut windows, if early.is_none() => early = Some(found),
                body = &mut asked => break body?,
            }
        };
        let mut arriving = Arriving::from(body);
        if arriving.body.is_whole() {
            return Ok((None, arriving));
        }
        // Invariant: who waits for a connection has none that is not read from. If all connections had answers whose flights wait
        // for windows, and those for a connection, nothing would ever come.
        let windows = match early {
            Some(found) => found,
            None => arriving.read_until(windows).await?,
        };
        let decoder = Decoder::start_with(&coded.table, number, windows?)
            .map_err(|error| Trouble::Wrong(error.to_string()))?
            .until(state.checked_end(TarOffset(request.spans_end)));
        let chunker = Chunker::new(state.size, span.tar.start.0, delivered, request.spans_end);
        let pipeline = DecodePipeline::new(Some(decoder), start, chunker, state.verifier.clone());
        Ok((Some(pipeline), arriving))
    }
}

impl Flight for CodedFlight {
    fn layer(&self) -> LayerId {
        self.request.layer
    }

    fn rest(&self) -> ChunkRange {
        self.request.rest()
    }

    fn progress(&self) -> u64 {
        self.request.delivered.get()
    }

    fn is_done(&self, _engine: &Engine) -> bool {
        // All of it may have come before the connection broke.
        let SpanRequest {
            from, to, delivered, ..
        } = &*self.request;
        delivered.get() >= to.get() && delivered.get() > *from
    }

    fn finish(&self) {
        self.request.advance(self.request.to.get());
    }

    async fn attempt(
        &self,
        engine: &Rc<Engine>,
        state: &Rc<LayerState>,
        guard: &FlightGuard<Self>,
    ) -> Result<Received, Trouble> {
        loop {
            let (pipeline, mut arriving) = Box::pin(self.begin(engine, state, guard.demand)).await?;
            let mut pipeline = match pipeline {
                Some(pipeline) if !arriving.body.is_whole() => pipeline,
                _ => return Ok(Received::WholeBlob(arriving.body)),
            };
            engine.note_head(&arriving.body);
            let mut next = arriving.next().await;
            loop {
                let piece = match next {
                    Ok(Some(piece)) => piece,
                    Ok(None) => break,
                    Err(trouble) => {
                        self.pipeline.replace(Some(pipeline));
                        return Err(trouble);
                    }
                };
                let len = len_u64(piece.len());
                engine.note_arrival(state, len);
                guard.arrived(len);
                let feeding = engine.feed(pipeline, piece, async |out| self.deliver(engine, state, out));
                let (fed, following) = tokio::join!(feeding, arriving.next());
                pipeline = fed.map_err(Trouble::Wrong)?;
                if self.wrong.get().is_some() {
                    return Err(Trouble::Wrong("it is not what the index says".to_owned()));
                }
                engine.pump();
                next = following;
            }
            if self.request.delivered.get() >= self.request.to.get() {
                if pipeline.owes_from() < self.request.spans_end {
                    self.coded.parked.borrow_mut().park(pipeline);
                }
                return Ok(Received::Range);
            }
            if !self.coded.ask_more(&self.request, &pipeline) {
                return Err(holds_less());
            }
            self.pipeline.replace(Some(pipeline));
        }
    }

    /// The decoder begins anew, with its window read anew as well.
    fn mismatched(&self, engine: &Rc<Engine>, state: &LayerState, why: &str) -> Result<Duration, FetchError> {
        self.pipeline.take();
        let layer = self.request.layer;
        let at = TarOffset(self.request.delivered.get());
        let span = self.coded.table.span_at(at);
        if self.coded.is_at_block(span) && self.block_failures.replace(self.block_failures.get() + 1) > 0 {
            // Twice: it may be the window, or what the index says a decoder holds there, and no digest vouches for that. From the
            // frame's beginning it takes neither.
            self.wrong.take();
            log::warn!(
                "{}: {why}, decoded from a block of a zstd frame as its index says: reading all of it in order",
                state.origin.name()
            );
            self.coded.distrust_blocks();
            return Ok(Duration::ZERO);
        }
        let key = match self.wrong.take() {
            Some(index) => ChunkKey { layer, index },
            None => ChunkKey::holding(layer, at),
        };
        self.coded.windows.forget(span);
        engine.digest_mismatched(state, key, self.since.get(), why)
    }

    fn ended(&self, engine: &Rc<Engine>) {
        let mut in_flight = self.coded.in_flight.borrow_mut();
        in_flight.retain(|request| !Rc::ptr_eq(request, &self.request));
        drop(in_flight);
        engine.settle_borders(&self.coded, &self.request);
    }
}

fn holds_less() -> Trouble {
    Trouble::Wrong("a span holds less than the index says".to_owned())
}

impl Engine {
    /// Sends flights for what is absent of `planned`, which are all of one compressed layer.
    pub(super) fn send_coded(
        self: &Rc<Self>,
        state: &Rc<LayerState>,
        coded: &Rc<CodedLayer>,
        planned: &[PlannedFlight],
        demand: bool,
    ) {
        let Some(layer) = planned.first().map(|flight| flight.chunks().layer) else {
            return;
        };
        let is_free =
            |key: ChunkKey| self.look(key) == Presence::Absent && !state.verifying.borrow().contains(&key.index);
        let with_reason = |flight: &PlannedFlight| {
            let keys = flight.chunks().keys().map(|key| (key, flight.reason(key.index)));
            keys.collect::<Vec<_>>()
        };
        // What lies between two others is not worth a span of its own.
        let mut wanted: BTreeMap<ChunkKey, Reason> = planned
            .iter()
            .flat_map(with_reason)
            .filter(|(key, reason)| *reason != Reason::Between && is_free(*key))
            .collect();
        wanted.retain(|key, reason| {
            // Reading all of the layer in order is too much for a guess.
            let is_guess = !matches!(reason, Reason::Demand | Reason::Fill) && !self.in_flight.contains(*key);
            let mut spans = WantedSpans::new();
            coded.want(key.index, false, &mut spans);
            let is_dropped = is_guess && coded.is_within(&spans);
            if is_dropped {
                self.planner.borrow_mut().not_fetched(*key);
            }
            !is_dropped
        });
        // Pieces are checked as a whole, so they have to come whole.
        let may_cut = state
            .verifier
            .as_ref()
            .is_none_or(|verifier| verifier.pieces().is_none());
        let mut spans = WantedSpans::new();
        for (key, reason) in &wanted {
            coded.extend_requests(key.index);
            coded.want(key.index, may_cut && *reason == Reason::Profile, &mut spans);
        }
        if coded.is_within(&spans) {
            // Only who has decoded the frame from its beginning gets there.
            self.start_stream(state, layer, None);
            for flight in planned {
                self.leave_to_stream(flight.chunks());
            }
            return;
        }
        if may_cut {
            for (span, wanted) in &mut spans {
                self.leave_what_is_here(layer, coded.table.span(*span).tar, wanted);
            }
        }
        let least_saving = (self.budget.link().held() / WORTH_PART).max(LEAST_CUT);
        let bridge = self.budget.worth_of_request().max(BRIDGE);
        let requests = coded.requests_for(layer, &spans, least_saving, bridge);
        let all = requests.iter().map(|(request, _)| request);
        coded.in_flight.borrow_mut().extend(all.clone().cloned());
        let mut coming: BTreeSet<ChunkKey> = wanted.keys().copied().collect();
        coming.extend(all.flat_map(|request| request.all().keys()));
        let owner = self.owner_of_request();
        for key in coming {
            let short = requests
                .iter()
                .map(|(request, _)| request.all())
                .any(|all| (all.first..all.end).contains(&key.index) && all.count() <= MARKED_WHOLE);
            // Only if all of it comes.
            if self.look(key) == Presence::Absent && coded.lacking(key.index).is_empty() {
                let reason = wanted.get(&key).copied().unwrap_or(Reason::Bundled);
                self.expect(&owner, key, reason, short || key.index.is_multiple_of(MARKER_DISTANCE));
            }
        }
        for (request, pipeline) in requests {
            let bytes = request.asked_len();
            let flight = CodedFlight {
                coded: coded.clone(),
                request,
                wrong: Cell::new(None),
                pipeline: RefCell::new(pipeline),
                block_failures: Cell::new(0),
                since: Cell::new(Instant::now()),
            };
            let guard = FlightGuard::new(self, state, flight, bytes, demand);
            self.spawn(owner.scope(self.clone().fly(guard)));
        }
    }

    /// Where nothing is lacking at the end of a span, it is not wanted: because donors have it, or it was kept when what is before it was not.
    fn leave_what_is_here(&self, layer: LayerId, span: TarRange, wanted: &mut WantedSpan) {
        if wanted.is_all {
            return;
        }
        let behind = TarRange::new(TarOffset(wanted.tar.end), span.end().0.saturating_sub(wanted.tar.end));
        let is_absent = |key: &ChunkKey| self.look(*key) == Presence::Absent;
        let end = match ChunkRange::of(layer, behind).keys().rev().find(is_absent) {
            Some(last) => TarRange::new(last.start(), CHUNK_BYTES).end().min(span.end()).0,
            None => wanted.tar.end,
        };
        if end < span.end().0 {
            wanted.tar.end = wanted.tar.end.max(end);
            wanted.is_all = true;
        }
    }

    /// A part of a chunk has come.
    fn deliver_part(self: &Rc<Self>, coded: &CodedLayer, layer: LayerId, at: u64, bytes: &[u8]) {
        let key = ChunkKey::holding(layer, TarOffset(at));
        if self.look(key) == Presence::Here {
            return;
        }
        let needed = |index| self.in_flight.contains(ChunkKey { layer, index });
        let len = chunk_len(coded.table.tar_len(), key.index);
        let whole = coded
            .partials
            .borrow_mut()
            .add(key.index, len, at - key.start().0, bytes, &needed);
        if let Some(whole) = whole {
            self.verify_and_deliver(vec![(key, whole.bytes)], whole.since);
        }
    }

    /// A request has ended: chunks at its borders that come with no other are fetched if a reader waits for them.
    fn settle_borders(self: &Rc<Self>, coded: &CodedLayer, request: &SpanRequest) {
        let all = request.all();
        let Some(state) = self.layer(request.layer) else { return };
        if self.stopping.get() || all.is_empty() {
            return;
        }
        if state.streaming.get() {
            // Another flight would only be told the same.
            self.leave_to_stream(all);
            return;
        }
        let mut again = Vec::new();
        for index in [all.first, all.end - 1] {
            let comes = state.verifying.borrow().contains(&index) || coded.lacking(index).is_empty();
            let key = ChunkKey {
                layer: request.layer,
                index,
            };
            if !comes && self.release(key) {
                again.push(Planned::from(key));
            }
        }
        self.launch(&again);
    }
}
