//! Flights over compressed layers. In: chunks that are wanted. Out: the spans of the blob that hold them, fetched by one
//! request each way, and every chunk that comes out of them.
//!
//! A span can only be decoded from its beginning, so spans are what flies: whatever lies in one has been paid for with the
//! first chunk that is wanted of it, and comes along. A chunk that lies across the border of two flights is put together of
//! what both bring. All here counts bytes of tar space, except where it says blob.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::rc::Rc;

use super::flight::{Answer, Backoff};
use super::origin::Trouble;
use super::partial::{Partials, Ranges, subtract};
use super::pipeline::{ChunkOut, Chunker, DecodePipeline};
use super::request::Purpose;
use super::window::WindowShelf;
use super::{Engine, LONGEST_FLIGHT, LayerState, MARKED_WHOLE, MARKER_DISTANCE};
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::fetch::stats::add;
use crate::fetch::{Coded, FetchError, StartError};
use crate::layer::{Decoder, SpanTable};
use crate::prefetch::{ChunkRange, Planned, Presence};
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange, len_u64};

/// Spans this far apart, in bytes of the blob, are one request.
const BRIDGE: u64 = 16 << 10;

/// How a layer is decoded, and what is being decoded.
pub(super) struct CodedLayer {
    pub(super) table: SpanTable,
    windows: WindowShelf,
    /// The flights under way.
    in_flight: RefCell<Vec<Rc<SpanRequest>>>,
    partials: RefCell<Partials>,
}

impl CodedLayer {
    pub(super) fn new(coded: Coded) -> Result<Self, StartError> {
        Ok(Self {
            table: coded.table,
            windows: WindowShelf::new(coded.windows)?,
            in_flight: RefCell::default(),
            partials: RefCell::default(),
        })
    }

    /// What has come of chunks that are not whole, and where it lies; it is forgotten here.
    pub(super) fn take_parts(&self) -> Vec<(u64, Vec<u8>)> {
        self.partials.take().into_parts()
    }

    /// What neither is here of chunk `index` nor comes with a flight under way.
    fn lacking(&self, index: u32) -> Ranges {
        let len = chunk_len(self.table.tar_len(), index);
        let start = u64::from(index) * CHUNK_BYTES;
        let mut lacking = self.partials.borrow().lacking(index, len);
        for range in &mut lacking {
            *range = range.start + start..range.end + start;
        }
        for route in &*self.in_flight.borrow() {
            subtract(&mut lacking, &(route.delivered.get()..route.to));
        }
        lacking
    }

    /// Puts spans together to flights: neighbours, none much longer than a flight may be.
    fn routes(&self, layer: LayerId, spans: &BTreeSet<usize>) -> Vec<Rc<SpanRequest>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for &span in spans {
            let joins = groups.last().is_some_and(|group| {
                let (first, last) = (
                    self.table.span(group.start),
                    self.table.span(group.end.saturating_sub(1)),
                );
                let next = self.table.span(span);
                let close = span == group.end || next.blob.start.saturating_sub(last.blob.end) <= BRIDGE;
                close && next.tar.end().since(first.tar.start) <= u64::from(LONGEST_FLIGHT) * CHUNK_BYTES
            });
            match groups.last_mut() {
                Some(group) if joins => group.end = span + 1,
                _ => groups.push(span..span + 1),
            }
        }
        let route = |group: Range<usize>| {
            let (first, last) = (self.table.span(group.start), self.table.span(group.end - 1));
            Rc::new(SpanRequest {
                layer,
                from: first.tar.start.0,
                to: last.tar.end().0,
                blob: first.blob.start..last.blob.end,
                delivered: Cell::new(first.tar.start.0),
            })
        };
        groups.into_iter().map(route).collect()
    }
}

/// What one flight is to bring.
#[derive(Debug)]
struct SpanRequest {
    layer: LayerId,
    from: u64,
    to: u64,
    blob: Range<u64>,
    /// Up to where it has brought it.
    delivered: Cell<u64>,
}

impl SpanRequest {
    fn blob_len(&self) -> u64 {
        self.blob.end.saturating_sub(self.blob.start)
    }

    /// The chunks of which it has brought nothing or a part.
    fn rest(&self) -> ChunkRange {
        let from = self.delivered.get();
        ChunkRange::of(self.layer, TarRange::new(TarOffset(from), self.to - from))
    }

    /// All chunks of which it brings something.
    fn all(&self) -> ChunkRange {
        ChunkRange::of(self.layer, TarRange::new(TarOffset(self.from), self.to - self.from))
    }
}

/// However a flight ends, nobody is left waiting for it.
struct Landing {
    engine: Rc<Engine>,
    remote: Rc<LayerState>,
    route: Rc<SpanRequest>,
    /// Bytes of the blob that it still counts as on their way.
    owed: Cell<u64>,
    /// The chunk that was wrong.
    wrong: Cell<Option<u32>>,
    demand: bool,
}

impl Landing {
    /// So many bytes of the blob are not on their way any more.
    fn arrived(&self, len: u64) {
        let by = len.min(self.owed.get());
        self.owed.set(self.owed.get() - by);
        let engine = &self.engine;
        engine.outstanding.set(engine.outstanding.get().saturating_sub(by));
    }

    /// Takes what came out of the decoder.
    fn land(&self, coded: &CodedLayer, cut: ChunkOut) {
        if self.wrong.get().is_some() {
            return;
        }
        let (engine, remote, layer) = (&self.engine, &self.remote, self.route.layer);
        match cut {
            ChunkOut::Whole { index, bytes, right } => {
                engine.count_checked(remote);
                if !right {
                    self.wrong.set(Some(index));
                    return;
                }
                let end = u64::from(index) * CHUNK_BYTES + len_u64(bytes.len());
                self.advance(end);
                add(&engine.shared.counters.bytes_decoded, len_u64(bytes.len()));
                Engine::found_right(remote, index);
                engine.bring(ChunkKey { layer, index }, bytes, true);
            }
            ChunkOut::Wrong { index } => self.wrong.set(Some(index)),
            ChunkOut::Part { at, bytes } => {
                self.advance(at + len_u64(bytes.len()));
                add(&engine.shared.counters.bytes_decoded, len_u64(bytes.len()));
                engine.bring_part(coded, layer, at, &bytes);
            }
        }
    }

    fn advance(&self, end: u64) {
        self.route
            .delivered
            .set(end.clamp(self.route.delivered.get(), self.route.to));
    }

    /// Nothing more comes: what is waited for is given up with `error`.
    fn give_up(&self, error: &FetchError) {
        let rest = self.route.rest();
        self.advance(self.route.to);
        self.engine.give_up(rest, error);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.arrived(self.owed.get());
        self.give_up(&FetchError::Stopped);
        if !self.demand {
            let prefetching = &self.engine.prefetching;
            prefetching.set(prefetching.get().saturating_sub(1));
        }
        if let Some(coded) = &self.remote.coded {
            coded
                .in_flight
                .borrow_mut()
                .retain(|route| !Rc::ptr_eq(route, &self.route));
            self.engine.settle_borders(coded, &self.route);
        }
    }
}

impl Engine {
    /// Sends flights for what is absent of `stretches`, which are all of one compressed layer.
    pub(super) fn launch_coded(
        self: &Rc<Self>,
        remote: &Rc<LayerState>,
        coded: &CodedLayer,
        stretches: &[ChunkRange],
        demand: bool,
    ) {
        let Some(layer) = stretches.first().map(|stretch| stretch.layer) else {
            return;
        };
        let wanted: HashSet<ChunkKey> = stretches
            .iter()
            .flat_map(|stretch| stretch.keys())
            .filter(|key| self.look(*key) == Presence::Absent && !remote.checking.borrow().contains(&key.index))
            .collect();
        let mut spans = BTreeSet::new();
        for key in &wanted {
            for range in coded.lacking(key.index) {
                let last = coded.table.span_at(TarOffset(range.end.saturating_sub(1)));
                spans.extend(coded.table.span_at(TarOffset(range.start))..=last);
            }
        }
        let routes = coded.routes(layer, &spans);
        for route in &routes {
            coded.in_flight.borrow_mut().push(route.clone());
        }
        let mut coming: BTreeSet<ChunkKey> = wanted.iter().copied().collect();
        coming.extend(routes.iter().flat_map(|route| route.all().keys()));
        for key in coming {
            let short = routes
                .iter()
                .map(|route| route.all())
                .any(|all| (all.first..all.end).contains(&key.index) && all.count() <= MARKED_WHOLE);
            let planned = !demand && wanted.contains(&key);
            self.expect_coded(coded, key, planned, short || key.index.is_multiple_of(MARKER_DISTANCE));
        }
        for route in routes {
            self.outstanding.set(self.outstanding.get() + route.blob_len());
            if !demand {
                self.prefetching.set(self.prefetching.get() + 1);
            }
            let landing = Landing {
                engine: self.clone(),
                remote: remote.clone(),
                owed: Cell::new(route.blob_len()),
                wrong: Cell::new(None),
                route,
                demand,
            };
            tokio_uring::spawn(self.clone().fly_coded(landing));
        }
    }

    /// Notes that a chunk comes, if all of it does.
    fn expect_coded(&self, coded: &CodedLayer, key: ChunkKey, planned: bool, marker: bool) {
        if self.look(key) != Presence::Absent || !coded.lacking(key.index).is_empty() {
            return;
        }
        let mut all = self.pending.borrow_mut();
        let pending = all.entry(key).or_default();
        pending.coming = true;
        pending.marker = marker;
        if !pending.waiters.is_empty() {
            self.planner.borrow_mut().demanded(CHUNK_BYTES);
        } else if planned && pending.why == Purpose::Fill {
            add(&self.shared.counters.bytes_filled, CHUNK_BYTES);
        } else if planned {
            pending.why = Purpose::Prefetch;
            self.planner.borrow_mut().suspected(CHUNK_BYTES);
            add(&self.shared.counters.bytes_prefetched, CHUNK_BYTES);
        } else {
            pending.why = Purpose::Bundled;
        }
    }

    async fn fly_coded(self: Rc<Self>, landing: Landing) {
        if let Some(coded) = &landing.remote.coded
            && let Err(error) = self.pursue_coded(&landing, coded).await
        {
            landing.give_up(&error);
        }
        drop(landing);
        self.pump();
    }

    async fn pursue_coded(self: &Rc<Self>, landing: &Landing, coded: &CodedLayer) -> Result<(), FetchError> {
        let (remote, route) = (&landing.remote, &landing.route);
        let mut patience = Backoff::new();
        let mut pipeline = None;
        loop {
            if let Some(error) = self.poison_of(route.layer) {
                return Err(error);
            }
            if remote.streaming.get() {
                self.leave_to_stream(route.rest());
                landing.advance(route.to);
                return Ok(());
            }
            let before = route.delivered.get();
            if before >= route.to && before > route.from {
                // All of it came before the connection broke.
                return Ok(());
            }
            let trouble = match self.attempt_coded(landing, coded, &mut pipeline).await {
                Ok(Answer::Complete) => return Ok(()),
                Ok(Answer::Whole(body)) => {
                    self.start_stream(remote, route.layer, Some(body));
                    continue;
                }
                Err(trouble) => trouble,
            };
            if let Trouble::Wrong(why) = &trouble {
                // Begin anew, with the window read anew as well.
                pipeline = None;
                let at = TarOffset(route.delivered.get());
                let key = match landing.wrong.take() {
                    Some(index) => ChunkKey {
                        layer: route.layer,
                        index,
                    },
                    None => ChunkKey::holding(route.layer, at),
                };
                coded.windows.forget(coded.table.span_at(at));
                self.found_wrong(remote, key, why)?;
            }
            if route.delivered.get() > before {
                patience.renew();
            }
            self.be_patient(remote, route.rest(), &mut patience, &trouble).await?;
        }
    }

    /// One request for what is left of a flight.
    async fn attempt_coded(
        self: &Rc<Self>,
        landing: &Landing,
        coded: &CodedLayer,
        kept: &mut Option<DecodePipeline>,
    ) -> Result<Answer, Trouble> {
        let (remote, route) = (&landing.remote, &landing.route);
        let stop = route.blob.end;
        let delivered = route.delivered.get();
        let (mut pipeline, mut body) = if let Some(pipeline) = kept.take() {
            let start = pipeline.blob_at;
            let asked = if start < stop {
                remote
                    .origin
                    .get(&self.client, start, stop - start, landing.demand)
                    .await
            } else {
                Err(Trouble::Wrong("a span holds less than the index says".to_owned()))
            };
            match asked {
                Ok(body) => (pipeline, body),
                Err(trouble) => {
                    *kept = Some(pipeline);
                    return Err(trouble);
                }
            }
        } else {
            let number = coded.table.span_at(TarOffset(delivered));
            let span = coded.table.span(number);
            let start = span.blob.start;
            let (window, body) = tokio::join!(
                self.window(&coded.windows, number, span.window, landing.demand),
                remote
                    .origin
                    .get(&self.client, start, stop.saturating_sub(start).max(1), landing.demand),
            );
            let body = body?;
            if body.is_whole() {
                return Ok(Answer::Whole(body));
            }
            let decoder = Decoder::start(&coded.table, number, &window?)
                .map_err(|error| Trouble::Wrong(error.to_string()))?
                .until(remote.checked_end(TarOffset(route.to)));
            let chunker = Chunker::new(remote.size, span.tar.start.0, delivered, route.to);
            (
                DecodePipeline::new(Some(decoder), start, chunker, remote.check.clone()),
                body,
            )
        };
        if body.is_whole() {
            return Ok(Answer::Whole(body));
        }
        self.note_head(&body);
        let mut next = body.next().await;
        loop {
            let piece = match next {
                Ok(Some(piece)) => piece,
                ended => {
                    *kept = Some(pipeline);
                    ended?;
                    break;
                }
            };
            let len = len_u64(piece.len());
            self.note_arrival(remote, len);
            landing.arrived(len);
            let feeding = self.feed(pipeline, piece, async |cut| landing.land(coded, cut));
            let (fed, following) = tokio::join!(feeding, body.next());
            pipeline = fed.map_err(Trouble::Wrong)?;
            if landing.wrong.get().is_some() {
                return Err(Trouble::Wrong("it is not what the index says".to_owned()));
            }
            self.pump();
            next = following;
        }
        if route.delivered.get() < route.to {
            return Err(Trouble::Wrong("a span holds less than the index says".to_owned()));
        }
        Ok(Answer::Complete)
    }

    /// A part of a chunk has come.
    fn bring_part(self: &Rc<Self>, coded: &CodedLayer, layer: LayerId, at: u64, bytes: &[u8]) {
        let key = ChunkKey::holding(layer, TarOffset(at));
        if self.look(key) == Presence::Here {
            return;
        }
        let needed = |index| self.pending.borrow().contains_key(&ChunkKey { layer, index });
        let len = chunk_len(coded.table.tar_len(), key.index);
        let whole = coded
            .partials
            .borrow_mut()
            .add(key.index, len, at - key.start().0, bytes, &needed);
        if let Some(whole) = whole {
            self.bring_checked(vec![(key, whole)]);
        }
    }

    /// A flight has ended: chunks at its borders that come with no flight any more are fetched if somebody waits for them.
    fn settle_borders(self: &Rc<Self>, coded: &CodedLayer, route: &SpanRequest) {
        let all = route.all();
        if self.stopping.get() || all.is_empty() {
            return;
        }
        if self.remote(route.layer).is_some_and(|remote| remote.streaming.get()) {
            // Another flight would only be told the same.
            self.leave_to_stream(all);
            return;
        }
        let mut again = Vec::new();
        for index in [all.first, all.end - 1] {
            let key = ChunkKey {
                layer: route.layer,
                index,
            };
            let checking = self
                .remote(key.layer)
                .is_some_and(|remote| remote.checking.borrow().contains(&index));
            let mut pending = self.pending.borrow_mut();
            let Some(waits) = pending.get_mut(&key) else { continue };
            if checking || coded.lacking(index).is_empty() {
                continue;
            }
            waits.coming = false;
            if waits.waiters.is_empty() {
                if waits.why == Purpose::Prefetch {
                    self.planner.borrow_mut().lost(CHUNK_BYTES);
                }
                pending.remove(&key);
            } else {
                again.push(Planned::from(key));
            }
        }
        self.launch(&again);
    }
}
