//! The engine of one device, on the fetch thread beside those of other devices. In: reads, left by any thread. Out: each reader
//! told once, with its bytes or why there are none.
//!
//! A read is cut into chunks. A chunk that is neither here nor in flight gets a request of its own; whoever asks for it meanwhile
//! waits for the same request. Readers are told as chunks come, not when a request ends. Demand is sent at once; behind it, as far as
//! the budget has room, goes what the planner thinks is next. Decoding and digests go to worker threads.
//!
//! Invariant: everything here runs on one thread and never blocks it. Every read is answered exactly once, also when the engine
//! stops or a task panics. All tasks of an engine are in a set of their own: they end with it, and it with none of another's.
//!
//! Parts: `pool_state` (what engines share), `peers` (what they tell each other), `layer_state` (a layer here), `request` (a read that waits), `in_flight` (chunks on their way), `budget` (how much may be),
//! `flight` with `plain` and `coded` (requests, retried until they have brought their chunks), `stream` (layers that are read from
//! end to end), `deliver` (chunks to their readers), `deadline` (when readers give up), `origin` and `window` (where bytes come from), `pipeline` and `partial` (how
//! they become chunks), `disk` (local files and the disk cache), `donors` (what other layers have, too), `fill` (the whole layer, while no one reads), `verify`,
//! `verify_piece` and `verify_cached` (digests), `protect` (whole layers that the kernel keeps as they are).

mod budget;
mod coded;
mod coded_layer;
mod deadline;
mod deliver;
mod disk;
mod donors;
mod fill;
mod flight;
mod in_flight;
mod layer_state;
mod origin;
mod parked;
mod partial;
mod peers;
mod pipeline;
mod plain;
mod pool_state;
mod protect;
mod request;
mod stream;
mod verify;
mod verify_cached;
mod verify_piece;
mod window;
mod write_queue;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use self::budget::Budget;
use self::deadline::Alarm;
use self::fill::Filler;
use self::in_flight::{InFlight, Waiter};
use self::layer_state::{LayerState, TakenLayer, take_in};
use self::origin::Origin;
use self::peers::Letter;
pub(crate) use self::pool_state::PoolState;
pub(crate) use self::request::CompleteOnDrop;
use self::request::Request;
use super::content::Contents;
use super::options::OpenOptions;
use super::runtime::{self, TaskSet};
use super::shared::{FetchedLayer, Shared, SharedLayer};
use super::stats::{Counters, add, take};
use super::transport::Client;
use super::{FetchError, LayerRange, LayerSource, StartError};
use crate::cache::chunk::{Chunk, ChunkKey, Slice, chunk_len, pieces};
use crate::cache::disk::DiskCache;
use crate::cache::early::FirstUse;
use crate::image::FileMap;
use crate::prefetch::{ChunkRange, PlanOptions, Planned, PlannedFlight, Planner, Presence, Reason, merge};
use crate::units::{CHUNK_BYTES, LayerId, TarRange, len_usize};

/// A flight is at most this long; longer stretches fly side by side.
const LONGEST_FLIGHT: u32 = 128;
/// In a request for prefetch every so many chunks one tells at once when it is read, so that the planner keeps ahead of
/// readers that find everything in memory.
const MARKER_DISTANCE: u32 = 8;
/// A request for prefetch this short is files, not a part of one: each first read of a file in it says something.
const MARKED_WHOLE: u32 = 32;
/// Servers that answer sooner than this lose nothing by being asked later for what is fetched ahead.
const NEXT_DOOR: Duration = Duration::from_millis(1);
/// Connections opened when the fetcher starts.
const WARM_CONNECTIONS: usize = 4;

pub(crate) enum Command {
    Read {
        ranges: Vec<LayerRange>,
        callback: CompleteOnDrop,
        asked: Instant,
    },
    /// These chunks are read by most starts of the image, in this order.
    Profile(Vec<ChunkRange>),
    Shutdown(mpsc::Sender<()>),
}

struct Engine {
    pool: Rc<PoolState>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    options: OpenOptions,
    client: Client,
    layers: Vec<Option<Rc<LayerState>>>,
    in_flight: InFlight,
    alarm: Alarm,
    /// What other engines have told it, until its main task looks.
    letters: RefCell<Vec<Letter>>,
    budget: Rc<Budget>,
    planner: RefCell<Planner>,
    /// Ranges this close are one request, in chunks between them.
    gap: u32,
    /// See [`PoolState`].
    workers: Arc<Semaphore>,
    /// None: only what is read is fetched.
    filler: Option<RefCell<Filler>>,
    stopping: Cell<bool>,
}

/// A device on its way to the fetch thread.
pub(crate) struct Device {
    shared: Arc<Shared>,
    options: OpenOptions,
    sources: Vec<Option<TakenLayer>>,
    files: Option<Arc<dyn FileMap>>,
    inbox: UnboundedReceiver<Command>,
}

/// Makes of `layers` what the fetch thread needs, what all threads see, and where commands go. Files are opened here.
pub(crate) fn prepare(
    layers: Vec<LayerSource>,
    options: OpenOptions,
    files: Option<Arc<dyn FileMap>>,
    contents: &Contents,
    store: Option<&Arc<DiskCache>>,
) -> Result<(Device, Arc<Shared>, UnboundedSender<Command>), StartError> {
    let mut shared_layers = Vec::new();
    let mut sources = Vec::new();
    for (layer, source) in layers.into_iter().enumerate() {
        let (shared, source) = take_in(layer, source, contents, store)?;
        shared_layers.push(shared);
        sources.push(source);
    }
    let (commands, inbox) = unbounded_channel();
    let shared = Arc::new(Shared::new(shared_layers));
    let device = Device {
        shared: shared.clone(),
        options,
        sources,
        files,
        inbox,
    };
    Ok((device, shared, commands))
}

/// Runs a device's engine from its beginning to its end, which is a command, or its last handle's end. However it ends: no
/// task of it is left then, and every read was answered.
pub(crate) async fn run(device: Device, pool: Rc<PoolState>) {
    /// Fails what still waits, also when the engine panics.
    struct StopOnDrop(Rc<Engine>);
    impl Drop for StopOnDrop {
        fn drop(&mut self) {
            self.0.stop();
            take(&self.0.pool.gauges.devices, 1);
        }
    }
    let tasks = TaskSet::new();
    add(&pool.gauges.devices, 1);
    let (engine, inbox) = Engine::new(device, pool);
    let stop = StopOnDrop(engine.clone());
    let told = tasks.run_until(engine.run(inbox)).await;
    drop((stop, tasks));
    if let Some(tell) = told {
        let _nobody_waits = tell.send(());
    }
}

impl Engine {
    fn new(device: Device, pool: Rc<PoolState>) -> (Rc<Self>, UnboundedReceiver<Command>) {
        let Device {
            shared,
            options,
            sources,
            files,
            inbox,
        } = device;
        // Whatever could be wrong with them was found before.
        let state = |taken: TakenLayer| LayerState::new(taken).ok().map(Rc::new);
        // Reading further ahead would push out of memory what the reader has not read yet: see PlanOptions.
        let largest_read_ahead_bytes = (pool.options.memory_bytes / 4).max(CHUNK_BYTES);
        let defaults = PlanOptions::default();
        let plan = PlanOptions {
            largest_read_ahead_bytes: defaults.largest_read_ahead_bytes.min(largest_read_ahead_bytes),
            ..defaults
        };
        let sizes = shared.layers.iter().map(SharedLayer::size).collect();
        let engine = Rc::new(Self {
            client: Client::new(
                &pool.connections,
                &pool.options,
                options.deadline,
                shared.counters.clone(),
            ),
            layers: sources.into_iter().map(|source| source.and_then(state)).collect(),
            in_flight: InFlight::default(),
            alarm: Alarm::default(),
            letters: RefCell::default(),
            budget: Budget::of(&pool.budget),
            gap: plan.gap_chunks,
            planner: RefCell::new(Planner::new(files, sizes, plan, shared.hints.clone())),
            workers: pool.workers.clone(),
            filler: options.fetch_all.then(|| RefCell::new(Filler::new())),
            stopping: Cell::new(false),
            counters: shared.counters.clone(),
            shared,
            options,
            pool,
        });
        engine.pool.peers.join(&engine);
        (engine, inbox)
    }

    /// Takes commands until there can be no more of them; returns whom to tell that it has ended.
    async fn run(self: Rc<Self>, mut inbox: UnboundedReceiver<Command>) -> Option<mpsc::Sender<()>> {
        const AT_ONCE: usize = 64;
        self.begin();
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
            self.planner.borrow_mut().set_link(self.budget.link());
            let mut short = true;
            for command in batch.drain(..) {
                match command {
                    Command::Read {
                        ranges,
                        callback,
                        asked,
                    } => {
                        short &= ranges.iter().map(|asked| asked.range.len).sum::<u64>() <= CHUNK_BYTES;
                        self.admit(&ranges, callback, asked, &mut now, &mut cached);
                    }
                    Command::Profile(ranges) => self.planner.borrow_mut().follow_profile(&ranges),
                    Command::Shutdown(tell) => told = Some(tell),
                }
            }
            self.read_letters();
            self.read_cached(&cached);
            self.launch(&now);
            let waits = short && !now.is_empty();
            now.clear();
            self.report_first_uses(&mut now);
            self.planner
                .borrow_mut()
                .touched(&|key, show| self.peek(key, show), &mut now);
            self.launch(&now);
            // Next door, what is fetched ahead would get in the way of a block that a reader waits for: it follows when that
            // is here. A reader of long stretches goes on to what is fetched ahead, and waits for nothing.
            if !waits || self.budget.round_trip().is_none_or(|trip| trip >= NEXT_DOOR) {
                self.pump();
            }
        }
        self.stop();
        inbox.close();
        // What is still in the inbox tells its waiters as it is dropped: here, inside the runtime.
        while inbox.try_recv().is_ok() {}
        self.settle().await;
        told
    }

    /// What is done before anybody asks: connections are opened, and what has to be read from end to end is begun.
    fn begin(self: &Rc<Self>) {
        for (layer, state) in (0..).map(LayerId).zip(&self.layers) {
            let Some(state) = state else { continue };
            if let Origin::Http(http) = &state.origin {
                self.client.warm(http, WARM_CONNECTIONS);
            }
            let is_whole = || self.cache(layer).is_some_and(|cache| cache.is_whole());
            if !state.can_seek() && state.size > 0 && !is_whole() {
                self.start_stream(state, layer, None);
            } else {
                self.verify_if_complete(state, layer);
            }
        }
        self.spawn(self.clone().keep_deadlines());
        if self.filler.is_some() {
            self.spawn(self.clone().keep_filling());
        }
    }

    /// Fails what still waits.
    fn stop(&self) {
        self.stopping.set(true);
        self.fail_all();
    }

    /// Fails what still waits, and forgets what was to come.
    fn fail_all(&self) {
        self.end_bringing_all();
        for (key, pending) in self.in_flight.take_all() {
            self.planner.borrow_mut().not_fetched(key);
            for waiter in pending.waiters {
                waiter.request.end(Err(FetchError::Stopped));
            }
        }
    }

    /// Runs `task` beside the others of the engine. If it panics, the reads that are under way fail: it is not known which of them
    /// it would have answered. Those that come later find everything in order. What the task waits for, the device waits for.
    fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        struct FailOnPanic(Rc<Engine>);
        impl Drop for FailOnPanic {
            fn drop(&mut self) {
                if std::thread::panicking() && !self.0.stopping.get() {
                    self.0.fail_all();
                    for state in self.0.layers.iter().flatten() {
                        state.verifying.borrow_mut().clear();
                    }
                }
            }
        }
        let guard = FailOnPanic(self.clone());
        runtime::spawn(self.shared.owner.scope(async move {
            let _guard = guard;
            task.await;
        }));
    }

    /// A chunk, if it is in memory. Not a use.
    fn in_memory(&self, key: ChunkKey) -> Option<Arc<Chunk>> {
        self.fetched(key.layer)?.content.memory.get(key.index)
    }

    /// A chunk is read, wherever it lies: says what that means.
    fn first_use(&self, key: ChunkKey) -> FirstUse {
        self.fetched(key.layer)
            .map_or(FirstUse::No, |layer| layer.content.early.read(key.index))
    }

    /// Whether a chunk is in memory.
    fn holds(&self, key: ChunkKey) -> bool {
        self.fetched(key.layer)
            .is_some_and(|layer| layer.content.memory.holds(key.index))
    }

    fn layer(&self, layer: LayerId) -> Option<&Rc<LayerState>> {
        self.layers.get(usize::try_from(layer.0).ok()?)?.as_ref()
    }

    fn fetched(&self, layer: LayerId) -> Option<&FetchedLayer> {
        match self.shared.layers.get(usize::try_from(layer.0).ok()?)? {
            SharedLayer::Fetched(layer) => Some(layer),
            SharedLayer::Local { .. } => None,
        }
    }

    /// Whether a chunk is in the disk cache, or about to be.
    fn is_stored(&self, key: ChunkKey) -> bool {
        self.cache(key.layer).is_some_and(|cache| cache.has(key.index))
            || self
                .layer(key.layer)
                .is_some_and(|state| state.writer.queued(key.index).is_some())
    }

    /// Where a chunk is.
    fn look(&self, key: ChunkKey) -> Presence {
        if let Some(presence) = self.in_flight.presence(key) {
            return presence;
        }
        let Some(state) = self.layer(key.layer) else {
            return Presence::Here;
        };
        if self.holds(key) || self.is_stored(key) || self.is_at_donors(key) {
            Presence::Here
        } else if state.streaming.get() || self.is_brought(key) {
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
        callback: CompleteOnDrop,
        asked: Instant,
        now: &mut Vec<Planned>,
        cached: &mut Vec<ChunkKey>,
    ) {
        self.pool.last_read.set(asked);
        let request = Request::new(callback, asked, self.counters.clone());
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
    fn join(
        self: &Rc<Self>,
        request: &Rc<Request>,
        asked: LayerRange,
        now: &mut Vec<Planned>,
        cached: &mut Vec<ChunkKey>,
    ) {
        let counters = &self.counters;
        let (mut waits, mut paid, mut found_first) = (false, 0, false);
        for (key, from, len) in pieces(asked.layer, asked.range) {
            let state = self.layer(key.layer);
            let waiting_to_be_written = || state.and_then(|state| state.writer.queued(key.index));
            match self.first_use(key) {
                FirstUse::Yes { prefetched: true, .. } => paid += CHUNK_BYTES,
                FirstUse::Yes { .. } => found_first = true,
                FirstUse::No => {}
            }
            if let Some(chunk) = self.in_memory(key).or_else(waiting_to_be_written) {
                chunk.touch();
                add(&counters.bytes_memory, len);
                request.push(Slice::new(chunk, from, len));
                continue;
            }
            if self.ask_donors(request, key, from, len) {
                found_first = true;
                continue;
            }
            let slot = request.expect();
            let waiter = Waiter {
                request: request.clone(),
                slot,
                from,
                len,
            };
            let found = self.in_flight.wait(key, waiter);
            self.alarm.reader_waits();
            if found.is_new && self.cache(key.layer).is_some_and(|cache| cache.has(key.index)) {
                self.in_flight.set_coming(key);
                add(&counters.bytes_disk, len);
                cached.push(key);
                continue;
            }
            if found.was_prefetched {
                paid += CHUNK_BYTES;
            }
            if state.is_some_and(|state| state.streaming.get()) {
                self.in_flight.set_coming(key);
            } else if found.is_new {
                self.follow(key);
            }
            add(&counters.bytes_network, len);
            waits = true;
        }
        add(&counters.prefetched_used, paid);
        if paid > 0 {
            self.read_by_us(asked.layer, asked.range);
        }
        let mut planner = self.planner.borrow_mut();
        if waits {
            planner.miss(asked.layer, asked.range, &|key| self.look(key), now);
        } else if paid > 0 || found_first {
            planner.hit(asked.layer, asked.range, &|key| self.look(key), now);
        }
    }

    /// Tells the planner what readers found in memory for the first time. Appends to `now` what is to be fetched.
    fn report_first_uses(&self, now: &mut Vec<Planned>) {
        let touches = self.shared.take_touches();
        let mut planner = self.planner.borrow_mut();
        for touch in touches {
            if touch.paid > 0 {
                self.read_by_us(touch.asked.layer, touch.asked.range);
            }
            planner.hit(touch.asked.layer, touch.asked.range, &|key| self.look(key), now);
        }
    }

    /// Shows a chunk that is in memory, or in the disk cache and the kernel's.
    fn peek(&self, key: ChunkKey, show: &mut dyn FnMut(&[u8])) -> bool {
        if let Some(chunk) = self.in_memory(key) {
            show(chunk.bytes());
            return true;
        }
        let layer = self.fetched(key.layer);
        let Some(layer) = layer.filter(|layer| layer.is_on_disk(key.index, key.index.saturating_add(1))) else {
            return false;
        };
        let asked = LayerRange {
            layer: key.layer,
            range: TarRange::new(key.start(), chunk_len(layer.size, key.index)),
        };
        let mut bytes = vec![0; len_usize(asked.range.len)];
        let found = layer.read_at_once(asked, &mut bytes);
        if found {
            show(&bytes);
        }
        found
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
            let Some(room) = self.budget.room().filter(|_| !self.stopping.get()) else {
                return;
            };
            let most = room.min(u64::from(LONGEST_FLIGHT) * CHUNK_BYTES);
            let likely = || self.planner.borrow_mut().next(most, &|key| self.look(key));
            let next = self.options.prefetch.then(likely).flatten();
            let fill = || self.next_to_fill(most).map(|chunks| Reason::Fill.of(chunks));
            let Some(planned) = next.or_else(fill) else {
                return;
            };
            self.send(&[planned.into()], false);
        }
    }

    /// Sends flights for stretches that are absent.
    fn send(self: &Rc<Self>, flights: &[PlannedFlight], demand: bool) {
        for of_one_layer in flights.chunk_by(|a, b| a.chunks().layer == b.chunks().layer) {
            let Some(layer) = of_one_layer.first().map(|flight| flight.chunks().layer) else {
                continue;
            };
            let Some(state) = self.layer(layer) else { continue };
            if !state.can_seek() {
                self.start_stream(state, layer, None);
                for flight in of_one_layer {
                    self.leave_to_stream(flight.chunks());
                }
            } else if let Some(coded) = &state.coded {
                self.send_coded(state, coded, of_one_layer, demand);
            } else {
                for flight in of_one_layer {
                    self.send_plain(state, flight, demand);
                }
            }
        }
    }
}
