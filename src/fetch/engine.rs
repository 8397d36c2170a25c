//! The fetch thread. In: reads, left by any thread. Out: each waiter told once.
//!
//! A read is cut into chunks. A chunk that is neither here nor on its way gets a flight; whoever asks for it while it flies
//! waits for the same flight. Waiters are told as chunks land, not when a flight ends. Demand always flies at once; behind
//! it, as far as the link has room, flies what the planner thinks is next. Everything here runs on one thread and never
//! blocks it: files and sockets go through its ring, decoding and digests to worker threads.
//!
//! Parts: `remote` (a layer here), `request` (who waits for what), `flight` and `coded` (plain and compressed layers), `stream` (layers that are read
//! from end to end), `origin` and `window` (where bytes come from), `pipeline` and `partial` (how they become chunks), `disk`
//! (files and the store), `fill` (the rest, while nobody reads), `trust`, `pieces_verifier` and `proof` (what is believed).

mod coded;
mod disk;
mod fill;
mod flight;
mod origin;
mod partial;
mod pipeline;
mod remote;
mod request;
mod stream;
mod verify;
mod verify_cached;
mod verify_piece;
mod window;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::disk::LARGEST_BACKLOG;
use self::fill::Filler;
use self::origin::Origin;
use self::remote::{LayerState, take_in};
pub(crate) use self::request::CompleteOnDrop;
use self::request::{Pending, Purpose, Request, Waiting};
use super::stats::add;
use super::transport::Client;
use super::{FetchError, FetchOptions, FetchedLayer, LayerRange, LayerSource, Shared, SharedLayer, StartError};
use crate::cache::chunk::{Chunk, ChunkKey, FirstUse, Slice, pieces};
use crate::cache::memory::MemoryCache;
use crate::image::FileMap;
use crate::prefetch::bandwidth::BdpEstimator;
use crate::prefetch::{ChunkRange, PlanOptions, Planned, Planner, Presence, merge};
use crate::units::{CHUNK_BYTES, LayerId, len_u64};

/// A flight is at most this long; longer stretches fly side by side.
const LONGEST_FLIGHT: u32 = 128;
/// In a flight on suspicion every so many chunks one tells at once when it is read, so that the planner keeps ahead of
/// readers that find everything in memory.
const MARKER_DISTANCE: u32 = 8;
/// A flight on suspicion this short is files, not a part of one: each first read of a file in it says something.
const MARKED_WHOLE: u32 = 32;
/// Servers that answer sooner than this lose nothing by being asked later for what is fetched ahead.
const NEXT_DOOR: Duration = Duration::from_millis(1);
/// Connections opened when the fetcher starts.
const WARM_CONNECTIONS: usize = 4;

pub(crate) enum Command {
    Read {
        ranges: Vec<LayerRange>,
        waiter: CompleteOnDrop,
        asked: Instant,
    },
    Shutdown(mpsc::Sender<()>),
}

struct Engine {
    shared: Arc<Shared>,
    options: FetchOptions,
    client: Client,
    remotes: Vec<Option<Rc<LayerState>>>,
    pending: RefCell<HashMap<ChunkKey, Pending>>,
    planner: RefCell<Planner>,
    link: RefCell<BdpEstimator>,
    gap: u32,
    /// Bytes asked for and not here yet.
    outstanding: Cell<u64>,
    /// Flights on suspicion under way.
    prefetching: Cell<usize>,
    /// Bytes that wait to be written to caches.
    backlog: Cell<u64>,
    /// Who may decode or digest: as many at once as there are CPUs.
    workers: Arc<Semaphore>,
    /// When somebody last had to wait for a read.
    last_read: Cell<Instant>,
    /// None: nobody wants all of it.
    filler: Option<RefCell<Filler>>,
    stopping: Cell<bool>,
}

/// What the thread is made of before it runs.
struct Parts {
    shared: Arc<Shared>,
    options: FetchOptions,
    remotes: Vec<Option<LayerSource>>,
    files: Option<Arc<dyn FileMap>>,
}

/// Starts the thread.
pub(crate) fn start(
    layers: Vec<LayerSource>,
    mut options: FetchOptions,
    files: Option<Arc<dyn FileMap>>,
) -> Result<(Arc<Shared>, UnboundedSender<Command>), StartError> {
    // No single wait may outlast the whole.
    options.connect_deadline = options.connect_deadline.min(options.deadline);
    options.head_deadline = options.head_deadline.min(options.deadline);
    options.stall_deadline = options.stall_deadline.min(options.deadline);
    let mut shared_layers = Vec::new();
    let mut remotes = Vec::new();
    for (layer, source) in layers.into_iter().enumerate() {
        let (shared, remote) = take_in(layer, source, &options)?;
        shared_layers.push(shared);
        remotes.push(remote);
    }
    let (commands, inbox) = unbounded_channel();
    let shared = Arc::new(Shared::new(shared_layers, MemoryCache::new(options.memory_bytes)));
    let parts = Parts {
        shared: shared.clone(),
        options,
        remotes,
        files,
    };
    let (ready, started) = mpsc::channel();
    std::thread::Builder::new()
        .name("tarblk-fetch".to_owned())
        .spawn(move || {
            let runtime = match runtime() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _starter_is_gone = ready.send(Err(error));
                    return;
                }
            };
            let _starter_is_gone = ready.send(Ok(()));
            drop(ready);
            runtime.block_on(async move { Engine::new(parts).run(inbox).await });
        })?;
    match started.recv() {
        Ok(Ok(())) => Ok((shared, commands)),
        Ok(Err(error)) => Err(StartError::Thread(error)),
        Err(_) => Err(StartError::Thread(io::Error::other("it ended at once"))),
    }
}

/// The thread's runtime and ring. `COOP_TASKRUN` (Linux 5.19) spares it interrupts while it runs: it asks often enough.
fn runtime() -> io::Result<tokio_uring::Runtime> {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_coop_taskrun();
    let mut builder = tokio_uring::builder();
    builder.entries(512);
    tokio_uring::Runtime::new(builder.uring_builder(&ring))
        .or_else(|_| tokio_uring::Runtime::new(tokio_uring::builder().entries(512)))
}

impl Engine {
    fn new(parts: Parts) -> Rc<Self> {
        let Parts {
            shared,
            options,
            remotes,
            files,
        } = parts;
        // Whatever could be wrong with them was found before.
        let remote = |source: LayerSource| LayerState::new(source).ok().map(Rc::new);
        // More ahead of a reader than this would push out of memory what it has not read yet.
        let largest_window = (options.memory_bytes / 4).max(CHUNK_BYTES);
        let defaults = PlanOptions::default();
        let plan = PlanOptions {
            largest_window: defaults.largest_window.min(largest_window),
            ..defaults
        };
        let sizes = shared.layers.iter().map(SharedLayer::size).collect();
        Rc::new(Self {
            client: Client::new(&options, shared.counters.clone()),
            remotes: remotes.into_iter().map(|source| source.and_then(remote)).collect(),
            pending: RefCell::default(),
            gap: plan.gap,
            planner: RefCell::new(Planner::new(files, sizes, plan)),
            link: RefCell::default(),
            outstanding: Cell::new(0),
            prefetching: Cell::new(0),
            backlog: Cell::new(0),
            workers: Arc::new(Semaphore::new(
                std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
            )),
            last_read: Cell::new(Instant::now()),
            filler: options.fetch_all.then(|| RefCell::new(Filler::new())),
            stopping: Cell::new(false),
            shared,
            options,
        })
    }

    async fn run(self: Rc<Self>, mut inbox: UnboundedReceiver<Command>) {
        const AT_ONCE: usize = 64;
        self.set_out();
        let mut batch = Vec::with_capacity(AT_ONCE);
        let mut told = None;
        while told.is_none() {
            tokio::select! {
                biased;
                count = inbox.recv_many(&mut batch, AT_ONCE) => {
                    if count == 0 {
                        break;
                    }
                }
                () = self.shared.nudge.notified() => {}
            }
            let (mut now, mut cached) = (Vec::new(), Vec::new());
            let mut short = true;
            for command in batch.drain(..) {
                match command {
                    Command::Read { ranges, waiter, asked } => {
                        short &= ranges.iter().map(|asked| asked.range.len).sum::<u64>() <= CHUNK_BYTES;
                        self.admit(&ranges, waiter, asked, &mut now, &mut cached);
                    }
                    Command::Shutdown(tell) => told = Some(tell),
                }
            }
            self.read_cached(cached);
            self.launch(&now);
            let waits = short && !now.is_empty();
            self.hear_touches();
            now.clear();
            self.planner
                .borrow_mut()
                .touched(&|key, show| self.peek(key, show), &mut now);
            self.launch(&now);
            // Next door, what is fetched ahead would get in the way of a block that somebody waits for: it follows when that
            // is here. A reader of long stretches goes on to what is fetched ahead, and waits for nothing.
            if !waits || self.link.borrow().round_trip().is_none_or(|trip| trip >= NEXT_DOOR) {
                self.pump();
            }
        }
        self.stop();
        inbox.close();
        // What is still in the inbox tells its waiters as it is dropped: here, inside the runtime.
        while inbox.try_recv().is_ok() {}
        self.settle().await;
        if let Some(tell) = told {
            let _nobody_waits = tell.send(());
        }
    }

    /// What is done before anybody asks: connections are opened, and what has to be read from end to end is begun.
    fn set_out(self: &Rc<Self>) {
        for (layer, remote) in (0..).map(LayerId).zip(&self.remotes) {
            let Some(remote) = remote else { continue };
            if let Origin::Http(http) = &remote.origin {
                self.client.warm(http, WARM_CONNECTIONS);
            }
            let is_whole = || self.cache(layer).is_some_and(|cache| cache.is_whole());
            if !remote.can_seek() && remote.size > 0 && !is_whole() {
                self.start_stream(remote, layer, None);
            } else {
                self.judge_if_whole(remote, layer);
            }
        }
        if self.filler.is_some() {
            tokio_uring::spawn(self.clone().keep_filling());
        }
    }

    /// Fails what still waits.
    fn stop(&self) {
        self.stopping.set(true);
        let pending = self.pending.take();
        for waiting in pending.into_values().flat_map(|pending| pending.waiters) {
            waiting.request.end(Err(FetchError::Stopped));
        }
    }

    fn remote(&self, layer: LayerId) -> Option<&Rc<LayerState>> {
        self.remotes.get(usize::try_from(layer.0).ok()?)?.as_ref()
    }

    fn brought(&self, layer: LayerId) -> Option<&FetchedLayer> {
        match self.shared.layers.get(usize::try_from(layer.0).ok()?)? {
            SharedLayer::Fetched(layer) => Some(layer),
            SharedLayer::Local { .. } => None,
        }
    }

    /// Whether a chunk is in the store, or about to be.
    fn is_kept(&self, key: ChunkKey) -> bool {
        self.cache(key.layer).is_some_and(|cache| cache.has(key.index))
            || self
                .remote(key.layer)
                .is_some_and(|remote| remote.writer.queued(key.index).is_some())
    }

    /// Where a chunk is.
    fn look(&self, key: ChunkKey) -> Presence {
        if let Some(pending) = self.pending.borrow().get(&key) {
            return if pending.coming {
                Presence::Coming
            } else {
                Presence::Absent
            };
        }
        let Some(remote) = self.remote(key.layer) else {
            return Presence::Here;
        };
        if self.shared.memory.holds(key) || self.is_kept(key) {
            Presence::Here
        } else if remote.streaming.get() {
            Presence::Coming
        } else {
            Presence::Absent
        }
    }

    /// Takes a read in: fills what is in memory, joins what is on its way, adds to `cached` what has to come from disk and
    /// to `now` what has to be fetched.
    fn admit(
        self: &Rc<Self>,
        ranges: &[LayerRange],
        waiter: CompleteOnDrop,
        asked: Instant,
        now: &mut Vec<Planned>,
        cached: &mut Vec<ChunkKey>,
    ) {
        self.last_read.set(asked);
        let request = Request::new(waiter, asked, self.shared.counters.clone());
        for asked in ranges {
            match self.shared.layer_of(*asked) {
                None => {
                    request.end(Err(FetchError::OutOfRange {
                        layer: asked.layer,
                        range: asked.range,
                    }));
                    return;
                }
                Some(SharedLayer::Local { .. }) => self.read_local(&request, *asked),
                Some(SharedLayer::Fetched(layer)) => {
                    if let Some(error) = layer.poison.get() {
                        request.end(Err(error.clone()));
                        return;
                    }
                    self.join(&request, *asked, now, cached);
                }
            }
        }
        request.ready();
    }

    /// Adds the slots of a range that has to be brought to `request`.
    fn join(&self, request: &Rc<Request>, asked: LayerRange, now: &mut Vec<Planned>, cached: &mut Vec<ChunkKey>) {
        let counters = &self.shared.counters;
        let (mut waits, mut paid, mut found_first) = (false, 0, false);
        for (key, from, len) in pieces(asked.layer, asked.range) {
            let remote = self.remote(key.layer);
            let waiting_to_be_written = || remote.and_then(|remote| remote.writer.queued(key.index));
            if let Some(chunk) = self.shared.memory.get(key).or_else(waiting_to_be_written) {
                match chunk.touch() {
                    FirstUse::Yes { suspected: true, .. } => paid += len_u64(chunk.bytes().len()),
                    FirstUse::Yes { .. } => found_first = true,
                    FirstUse::No => {}
                }
                add(&counters.bytes_memory, len);
                request.push(Slice::new(chunk, from, len));
                continue;
            }
            let slot = request.expect();
            let mut all = self.pending.borrow_mut();
            let known = all.contains_key(&key);
            let pending = all.entry(key).or_default();
            pending.waiters.push(Waiting {
                request: request.clone(),
                slot,
                from,
                len,
            });
            if !known && self.cache(key.layer).is_some_and(|cache| cache.has(key.index)) {
                pending.coming = true;
                add(&counters.bytes_disk, len);
                cached.push(key);
                continue;
            }
            if std::mem::take(&mut pending.why) == Purpose::Prefetch {
                paid += CHUNK_BYTES;
            }
            if remote.is_some_and(|remote| remote.streaming.get()) {
                pending.coming = true;
            }
            add(&counters.bytes_network, len);
            waits = true;
        }
        add(&counters.prefetched_used, paid);
        let mut planner = self.planner.borrow_mut();
        planner.paid(paid);
        if waits {
            planner.miss(asked.layer, asked.range, &|key| self.look(key), now);
        } else if paid > 0 || found_first {
            planner.hit(asked.layer, asked.range, &|key| self.look(key));
        }
    }

    /// Tells the planner what readers found in memory for the first time.
    fn hear_touches(&self) {
        let touches = self.shared.take_touches();
        let mut planner = self.planner.borrow_mut();
        for touch in touches {
            planner.paid(touch.paid);
            planner.hit(touch.asked.layer, touch.asked.range, &|key| self.look(key));
        }
    }

    /// Shows a chunk that is in memory.
    fn peek(&self, key: ChunkKey, show: &mut dyn FnMut(&[u8])) -> bool {
        let chunk = self.shared.memory.get(key);
        if let Some(chunk) = &chunk {
            show(chunk.bytes());
        }
        chunk.is_some()
    }

    /// Sends demand flights for what is absent of `stretches`.
    fn launch(self: &Rc<Self>, wants: &[Planned]) {
        if wants.is_empty() {
            return;
        }
        self.send(&merge(wants, self.gap, LONGEST_FLIGHT, &|key| self.look(key)), true);
    }

    /// Sends what is likely next, as far as the link has room behind what was asked for.
    fn pump(self: &Rc<Self>) {
        loop {
            let window = self.link.borrow().window();
            let room = window.saturating_sub(self.outstanding.get());
            let no_room = room < window / 2
                || self.backlog.get() > LARGEST_BACKLOG / 2
                || self.prefetching.get() >= (self.options.connections / 2).max(1)
                || self.stopping.get();
            if no_room {
                return;
            }
            let most = room.min(u64::from(LONGEST_FLIGHT) * CHUNK_BYTES);
            let suspected = || self.planner.borrow_mut().next(most, &|key| self.look(key));
            let next = self.options.prefetch.then(suspected).flatten();
            let Some(stretch) = next.map(|want| want.stretch).or_else(|| self.rest(most)) else {
                return;
            };
            self.send(&[stretch], false);
        }
    }

    /// Sends flights for stretches that are absent.
    fn send(self: &Rc<Self>, flights: &[ChunkRange], demand: bool) {
        for of_one_layer in flights.chunk_by(|a, b| a.layer == b.layer) {
            let Some(layer) = of_one_layer.first().map(|flight| flight.layer) else {
                continue;
            };
            let Some(remote) = self.remote(layer) else { continue };
            if !remote.can_seek() {
                self.start_stream(remote, layer, None);
                for flight in of_one_layer {
                    self.leave_to_stream(*flight);
                }
            } else if let Some(coded) = &remote.coded {
                self.launch_coded(remote, coded, of_one_layer, demand);
            } else {
                for flight in of_one_layer {
                    self.send_plain(*flight, demand);
                }
            }
        }
    }

    fn send_plain(self: &Rc<Self>, flight: ChunkRange, demand: bool) {
        let mut planner = self.planner.borrow_mut();
        let mut all = self.pending.borrow_mut();
        for key in flight.keys() {
            let pending = all.entry(key).or_default();
            pending.coming = true;
            pending.marker =
                flight.count() <= MARKED_WHOLE || (key.index - flight.first).is_multiple_of(MARKER_DISTANCE);
            if pending.waiters.is_empty() && pending.why == Purpose::Fill {
                add(&self.shared.counters.bytes_filled, CHUNK_BYTES);
            } else if pending.waiters.is_empty() {
                pending.why = Purpose::Prefetch;
                planner.suspected(CHUNK_BYTES);
                add(&self.shared.counters.bytes_prefetched, CHUNK_BYTES);
            } else {
                planner.demanded(CHUNK_BYTES);
            }
        }
        if !demand {
            self.prefetching.set(self.prefetching.get() + 1);
        }
        self.outstanding.set(self.outstanding.get() + flight.bytes());
        tokio_uring::spawn(self.clone().fly(flight, demand));
    }

    /// A chunk has come, by a flight or from the cache: it goes to memory, to everybody who waits for it, and to the cache.
    fn bring(self: &Rc<Self>, key: ChunkKey, bytes: Vec<u8>, keep: bool) {
        if self.brought(key.layer).is_none_or(|layer| layer.poison.get().is_some()) {
            return;
        }
        let known = self.pending.borrow_mut().remove(&key);
        if known.is_none() && self.shared.memory.holds(key) {
            return;
        }
        let why = known.as_ref().map_or(Purpose::Bundled, |pending| pending.why);
        let pending = known.unwrap_or_default();
        if why == Purpose::Fill && pending.waiters.is_empty() {
            let _unless_the_store_is_full = self.keep(key, Arc::new(Chunk::along(bytes, false)), false);
            return;
        }
        let chunk = Arc::new(match why {
            Purpose::Demand => Chunk::demanded(bytes),
            Purpose::Prefetch => Chunk::prefetched(bytes, pending.marker),
            Purpose::Bundled | Purpose::Fill => Chunk::along(bytes, pending.marker),
        });
        if let Some(old) = self.shared.memory.insert(key, chunk.clone())
            && old.wasted()
        {
            add(&self.shared.counters.prefetched_unused, len_u64(old.bytes().len()));
        }
        for waiting in pending.waiters {
            waiting
                .request
                .fill(waiting.slot, Slice::new(chunk.clone(), waiting.from, waiting.len));
        }
        let mut now = Vec::new();
        self.planner
            .borrow_mut()
            .landed(key, &|key, show| self.peek(key, show), &mut now);
        self.launch(&now);
        if keep {
            let _in_memory_anyway = self.keep(key, chunk, false);
        }
    }

    /// Chunks that will not come: whoever waits for one is told.
    fn give_up(&self, stretch: ChunkRange, error: &FetchError) {
        for key in self.pending_of(stretch) {
            let Some(pending) = self.pending.borrow_mut().remove(&key) else {
                continue;
            };
            if pending.why == Purpose::Prefetch {
                self.planner.borrow_mut().lost(CHUNK_BYTES);
            }
            for waiting in pending.waiters {
                waiting.request.end(Err(error.clone()));
            }
        }
    }

    /// Fails the reads that would have waited past the deadline after another `pause`.
    fn expire(&self, stretch: ChunkRange, pause: Duration, error: &FetchError) {
        let mut late = Vec::new();
        for key in self.pending_of(stretch) {
            if let Some(pending) = self.pending.borrow_mut().get_mut(&key) {
                let (stay, go): (SmallVec<_>, SmallVec<_>) =
                    std::mem::take(&mut pending.waiters).into_iter().partition(|waiting| {
                        waiting.request.asked.elapsed().saturating_add(pause) <= self.options.deadline
                    });
                pending.waiters = stay;
                late.extend(go);
            }
        }
        for waiting in late {
            waiting.request.end(Err(error.clone()));
        }
    }

    /// The chunks of `stretch` that are not here and that somebody waits for, or that are on their way.
    fn pending_of(&self, stretch: ChunkRange) -> Vec<ChunkKey> {
        let all = self.pending.borrow();
        if all.len() > usize::try_from(stretch.count()).unwrap_or(usize::MAX) {
            return stretch.keys().filter(|key| all.contains_key(key)).collect();
        }
        let within = |key: &&ChunkKey| key.layer == stretch.layer && (stretch.first..stretch.end).contains(&key.index);
        all.keys().filter(within).copied().collect()
    }

    /// Whether a short read waits for a chunk.
    fn is_waited_for_alone(&self, key: ChunkKey) -> bool {
        let all = self.pending.borrow();
        all.get(&key)
            .is_some_and(|pending| pending.waiters.iter().any(|waiting| waiting.request.is_short()))
    }

    fn anybody_waits(&self, stretch: ChunkRange) -> bool {
        let all = self.pending.borrow();
        stretch
            .keys()
            .any(|key| all.get(&key).is_some_and(|pending| !pending.waiters.is_empty()))
    }
}
