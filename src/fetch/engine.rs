//! The fetch thread. In: reads, left by any thread. Out: each waiter told once.
//!
//! A read is cut into chunks. A chunk that is neither in memory nor on its way gets a flight; whoever asks for it while it
//! flies waits for the same flight. Waiters are told as chunks land, not when a flight ends. Everything here runs on one
//! thread and never blocks it: files and sockets go through its ring.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::sleep;

use super::chunk::{CHUNK_BYTES, Chunk, ChunkKey, Slice, chunk_count, chunk_len, pieces, to_u64, to_usize};
use super::http::{Client, Failure, RemoteLayer};
use super::stats::{Counters, add, take};
use super::tier::Tier;
use super::{FetchError, FetchOptions, LayerRange, LayerSource, Shared, SharedLayer, StartError, Waiter};
use crate::image::FileMap;
use crate::units::{LayerId, TarOffset, TarRange};

/// Chunks that are wanted this close together are asked for in one request: at 200 Mbit/s the gap costs less than an
/// eighth of a 20 ms round trip.
const GAP_CHUNKS: u32 = 2;
/// A flight is at most this long; longer stretches fly side by side.
const LONGEST_FLIGHT: u32 = 128;
/// Wrong answers and refusals in a row before a read fails.
const PATIENCE_WITH_WRONG: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// Local reads are cut to this, so that the length asked for never decides how much memory one operation takes.
const LONGEST_LOCAL_READ: u64 = 1 << 20;

pub(crate) enum Command {
    Read {
        ranges: Vec<LayerRange>,
        waiter: Owed,
        asked: Instant,
    },
    Shutdown(mpsc::Sender<()>),
}

/// A waiter that is owed an answer: dropped without one it is told that the fetcher has stopped.
pub(crate) struct Owed(Option<Box<dyn Waiter>>);

impl Owed {
    pub(crate) fn new(waiter: Box<dyn Waiter>) -> Self {
        Self(Some(waiter))
    }

    fn pay(mut self, outcome: Result<Vec<Slice>, FetchError>) {
        if let Some(waiter) = self.0.take() {
            waiter.complete(outcome);
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if let Some(waiter) = self.0.take() {
            waiter.complete(Err(FetchError::Stopped));
        }
    }
}

/// A read that waits for chunks.
struct Request {
    /// In the order asked; filled as chunks land.
    slots: RefCell<Vec<Option<Slice>>>,
    missing: Cell<usize>,
    waiter: RefCell<Option<Owed>>,
    asked: Instant,
    counters: Arc<Counters>,
}

impl Request {
    fn fill(&self, slot: usize, slice: Slice) {
        if let Some(place) = self.slots.borrow_mut().get_mut(slot)
            && place.is_none()
        {
            *place = Some(slice);
            self.missing.set(self.missing.get().saturating_sub(1));
        }
        self.answer_if_whole();
    }

    fn answer_if_whole(&self) {
        if self.missing.get() == 0 {
            let slices = self.slots.take().into_iter().flatten().collect();
            self.end(Ok(slices));
        }
    }

    fn end(&self, outcome: Result<Vec<Slice>, FetchError>) {
        let Some(waiter) = self.waiter.take() else { return };
        take(&self.counters.in_flight, 1);
        self.counters.latency.record(self.asked.elapsed());
        if let Err(error) = &outcome {
            add(&self.counters.read_errors, 1);
            log::error!("read failed: {error}");
        }
        waiter.pay(outcome);
    }
}

/// Whom a chunk on its way is for.
#[derive(Default)]
struct Pending {
    waiters: SmallVec<[Waiting; 1]>,
}

struct Waiting {
    request: Rc<Request>,
    slot: usize,
    from: u64,
    len: u64,
}

/// A stretch of chunks fetched by one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flight {
    first: ChunkKey,
    count: u32,
    demand: bool,
}

struct Engine {
    shared: Arc<Shared>,
    options: FetchOptions,
    client: Client,
    remotes: Vec<Option<RemoteLayer>>,
    pending: RefCell<HashMap<ChunkKey, Pending>>,
    _files: Option<Arc<dyn FileMap>>,
}

/// Starts the thread.
pub(crate) fn start(
    layers: Vec<LayerSource>,
    options: FetchOptions,
    files: Option<Arc<dyn FileMap>>,
) -> Result<(Arc<Shared>, UnboundedSender<Command>), StartError> {
    let mut shared_layers = Vec::new();
    let mut remotes = Vec::new();
    for (layer, source) in layers.into_iter().enumerate() {
        let size = source.size();
        if chunk_count(size).is_none() {
            return Err(StartError::TooLong { layer, size });
        }
        match source {
            LayerSource::File(local) => {
                shared_layers.push(SharedLayer::Local {
                    path: local.path,
                    file: local.file,
                    size,
                });
                remotes.push(None);
            }
            LayerSource::Http(remote) => {
                // Checked here, made again on the thread: what lives there cannot move between threads.
                RemoteLayer::new(&remote)?;
                shared_layers.push(SharedLayer::Remote { size });
                remotes.push(Some(remote));
            }
        }
    }
    let (commands, inbox) = unbounded_channel();
    let shared = Arc::new(Shared {
        layers: shared_layers,
        tier: Tier::new(options.memory_bytes),
        counters: Arc::default(),
    });
    let theirs = shared.clone();
    let (ready, started) = mpsc::channel();
    std::thread::Builder::new()
        .name("tarblk-fetch".to_owned())
        .spawn(move || {
            let runtime = match tokio_uring::Runtime::new(tokio_uring::builder().entries(512)) {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _starter_is_gone = ready.send(Err(error));
                    return;
                }
            };
            let _starter_is_gone = ready.send(Ok(()));
            drop(ready);
            let engine = Rc::new(Engine {
                client: Client::new(&options, theirs.counters.clone()),
                remotes: remotes
                    .iter()
                    .map(|r| r.as_ref().and_then(|r| RemoteLayer::new(r).ok()))
                    .collect(),
                shared: theirs,
                options,
                pending: RefCell::default(),
                _files: files,
            });
            runtime.block_on(engine.run(inbox));
        })?;
    match started.recv() {
        Ok(Ok(())) => Ok((shared, commands)),
        Ok(Err(error)) => Err(StartError::Thread(error)),
        Err(_) => Err(StartError::Thread(io::Error::other("it ended at once"))),
    }
}

impl Engine {
    async fn run(self: Rc<Self>, mut inbox: UnboundedReceiver<Command>) {
        const AT_ONCE: usize = 64;
        for remote in self.remotes.iter().flatten() {
            self.client.warm(remote, self.options.connections.min(4));
        }
        let mut batch = Vec::with_capacity(AT_ONCE);
        let mut told = None;
        while told.is_none() && inbox.recv_many(&mut batch, AT_ONCE).await > 0 {
            let mut wanted = Vec::new();
            for command in batch.drain(..) {
                match command {
                    Command::Read { ranges, waiter, asked } => self.admit(&ranges, waiter, asked, &mut wanted),
                    Command::Shutdown(tell) => told = Some(tell),
                }
            }
            self.launch(wanted);
        }
        self.stop();
        inbox.close();
        // What is still in the inbox tells its waiters as it is dropped: here, inside the runtime.
        while inbox.try_recv().is_ok() {}
        if let Some(tell) = told {
            let _nobody_waits = tell.send(());
        }
    }

    /// Fails what still waits.
    fn stop(&self) {
        let pending = self.pending.take();
        for waiting in pending.into_values().flat_map(|pending| pending.waiters) {
            waiting.request.end(Err(FetchError::Stopped));
        }
    }

    fn remote(&self, layer: LayerId) -> Option<&RemoteLayer> {
        self.remotes.get(usize::try_from(layer.0).ok()?)?.as_ref()
    }

    /// Takes a read in: fills what is in memory, joins what is on its way, and adds to `wanted` what has to be fetched.
    fn admit(self: &Rc<Self>, ranges: &[LayerRange], waiter: Owed, asked: Instant, wanted: &mut Vec<ChunkKey>) {
        let counters = &self.shared.counters;
        add(&counters.reads, 1);
        add(&counters.in_flight, 1);
        let request = Rc::new(Request {
            slots: RefCell::default(),
            missing: Cell::new(0),
            waiter: RefCell::new(Some(waiter)),
            asked,
            counters: counters.clone(),
        });
        // While slots are still being added the request must not look whole.
        request.missing.set(1);
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
                Some(SharedLayer::Remote { .. }) => self.join(&request, *asked, wanted),
            }
        }
        request.missing.set(request.missing.get() - 1);
        request.answer_if_whole();
    }

    /// Adds the slots of a remote range to `request`.
    fn join(&self, request: &Rc<Request>, asked: LayerRange, wanted: &mut Vec<ChunkKey>) {
        let counters = &self.shared.counters;
        let mut pending = self.pending.borrow_mut();
        for (key, from, len) in pieces(asked.layer, asked.range) {
            let mut slots = request.slots.borrow_mut();
            if let Some(chunk) = self.shared.tier.get(key) {
                chunk.touch();
                add(&counters.bytes_memory, len);
                slots.push(Some(Slice::new(chunk, from, len)));
                continue;
            }
            add(&counters.bytes_network, len);
            let slot = slots.len();
            slots.push(None);
            request.missing.set(request.missing.get() + 1);
            let entry = pending.entry(key).or_insert_with(|| {
                wanted.push(key);
                Pending::default()
            });
            entry.waiters.push(Waiting {
                request: request.clone(),
                slot,
                from,
                len,
            });
        }
    }

    /// Adds the slots of a local range to `request` and starts reading them.
    fn read_local(self: &Rc<Self>, request: &Rc<Request>, asked: LayerRange) {
        add(&self.shared.counters.bytes_disk, asked.range.len);
        let mut at = asked.range.start;
        while at < asked.range.end() {
            let len = asked.range.end().since(at).min(LONGEST_LOCAL_READ);
            let range = TarRange::new(at, len);
            let slot = request.slots.borrow().len();
            request.slots.borrow_mut().push(None);
            request.missing.set(request.missing.get() + 1);
            let (engine, request) = (self.clone(), request.clone());
            tokio_uring::spawn(async move {
                match engine
                    .read_file(LayerRange {
                        layer: asked.layer,
                        range,
                    })
                    .await
                {
                    Ok(bytes) => request.fill(slot, Slice::new(Arc::new(Chunk::demanded(bytes)), 0, len)),
                    Err(error) => request.end(Err(error)),
                }
            });
            at = at.plus(len);
        }
    }

    async fn read_file(&self, asked: LayerRange) -> Result<Vec<u8>, FetchError> {
        let Some(SharedLayer::Local { path, file, .. }) = self.shared.layer_of(asked) else {
            return Err(FetchError::OutOfRange {
                layer: asked.layer,
                range: asked.range,
            });
        };
        let fail = |why| FetchError::File {
            path: path.clone(),
            range: asked.range,
            why: Arc::new(why),
        };
        // The ring's file type closes its descriptor, so it gets one of its own.
        let own = file.try_clone().map_err(fail)?;
        let ring_file = tokio_uring::fs::File::from_std(std::fs::File::from(own));
        let buffer = Vec::with_capacity(to_usize(asked.range.len));
        let (result, buffer) = ring_file.read_exact_at(buffer, asked.range.start.0).await;
        result.map_err(fail)?;
        Ok(buffer)
    }

    /// Sends flights for `wanted`.
    fn launch(self: &Rc<Self>, mut wanted: Vec<ChunkKey>) {
        wanted.sort_unstable();
        let mut at = 0;
        while at < wanted.len() {
            let first = wanted[at];
            let mut end = at + 1;
            while let Some(next) = wanted.get(end)
                && next.layer == first.layer
                && next.index - wanted[end - 1].index <= 1 + GAP_CHUNKS
                && next.index - first.index < LONGEST_FLIGHT
            {
                end += 1;
            }
            let count = wanted[end - 1].index - first.index + 1;
            at = end;
            // The chunks in the gaps come along, so nobody else needs to fetch them meanwhile.
            let mut pending = self.pending.borrow_mut();
            for n in 0..count {
                pending.entry(first.plus(n)).or_default();
            }
            drop(pending);
            tokio_uring::spawn(self.clone().fly(Flight {
                first,
                count,
                demand: true,
            }));
        }
    }

    /// Fetches a stretch, whatever it takes, until the deadline.
    async fn fly(self: Rc<Self>, flight: Flight) {
        let Some(remote) = self.remote(flight.first.layer) else {
            return;
        };
        let counters = &self.shared.counters;
        let began = Instant::now();
        let mut next = flight.first.index;
        let end = flight.first.plus(flight.count).index;
        let mut backoff = FIRST_BACKOFF;
        let mut wrong = 0;
        loop {
            let before = next;
            let Err(failure) = self.attempt(remote, flight, &mut next).await else {
                return;
            };
            add(&counters.errors, 1);
            if next > before {
                (backoff, wrong) = (FIRST_BACKOFF, 0);
            }
            let range = TarRange::new(
                TarOffset(u64::from(next) * CHUNK_BYTES),
                u64::from(end - next) * CHUNK_BYTES,
            );
            let url = remote.name();
            let pause = match failure {
                Failure::Changed(how) => {
                    return self.fail(flight, next, &FetchError::Changed { url, how });
                }
                Failure::Suspect { why, status } => {
                    wrong += 1;
                    if wrong >= PATIENCE_WITH_WRONG {
                        let error = match status {
                            Some(status) => FetchError::Refused {
                                url,
                                why,
                                status: status.as_u16(),
                            },
                            None => FetchError::WrongAnswer { url, range, why },
                        };
                        return self.fail(flight, next, &error);
                    }
                    log::warn!("{url}: bytes {range}: {why}; asking again");
                    jittered(backoff)
                }
                Failure::Away { stale: true, .. } => Duration::ZERO,
                Failure::Away { why, after, .. } => {
                    let pause = after.unwrap_or_else(|| jittered(backoff));
                    if began.elapsed() + pause > self.options.deadline {
                        let after = self.options.deadline;
                        return self.fail(flight, next, &FetchError::Deadline { url, range, after, why });
                    }
                    log::warn!("{url}: bytes {range}: {why}; asking again in {pause:.1?}");
                    pause
                }
            };
            if !pause.is_zero() {
                sleep(pause).await;
                backoff = (backoff * 2).min(LONGEST_BACKOFF);
            }
            add(&counters.retries, 1);
        }
    }

    /// One request for what is left of a flight. `next` advances over every chunk that landed.
    async fn attempt(&self, remote: &RemoteLayer, flight: Flight, next: &mut u32) -> Result<(), Failure> {
        let end = flight.first.plus(flight.count).index;
        let start = u64::from(*next) * CHUNK_BYTES;
        let stop = (u64::from(end) * CHUNK_BYTES).min(remote.size);
        let mut reply = self
            .client
            .get(remote, start, stop.saturating_sub(start), flight.demand)
            .await?;
        if reply.whole {
            return Err(Failure::Suspect {
                why: "the server answers 200 to a Range".to_owned(),
                status: None,
            });
        }
        let mut chunk = Vec::new();
        while let Some(mut data) = reply.next().await? {
            add(&self.shared.counters.bytes_fetched, to_u64(data.len()));
            while !data.is_empty() {
                let key = ChunkKey {
                    layer: flight.first.layer,
                    index: *next,
                };
                let whole = to_usize(chunk_len(remote.size, *next));
                if chunk.capacity() == 0 {
                    chunk.reserve_exact(whole);
                }
                let part = data.split_to(data.len().min(whole - chunk.len()));
                chunk.extend_from_slice(&part);
                if chunk.len() == whole {
                    self.landed(key, std::mem::take(&mut chunk));
                    *next += 1;
                }
            }
        }
        Ok(())
    }

    /// A chunk has come: it goes to memory and to everybody who waits for it.
    fn landed(&self, key: ChunkKey, bytes: Vec<u8>) {
        let pending = self.pending.borrow_mut().remove(&key).unwrap_or_default();
        let chunk = Arc::new(if pending.waiters.is_empty() {
            Chunk::prefetched(bytes, false)
        } else {
            Chunk::demanded(bytes)
        });
        if let Some(old) = self.shared.tier.insert(key, chunk.clone())
            && old.wasted()
        {
            add(&self.shared.counters.prefetched_unused, to_u64(old.bytes().len()));
        }
        for waiting in pending.waiters {
            waiting
                .request
                .fill(waiting.slot, Slice::new(chunk.clone(), waiting.from, waiting.len));
        }
    }

    /// What is left of a flight will not come.
    fn fail(&self, flight: Flight, next: u32, error: &FetchError) {
        for index in next..flight.first.plus(flight.count).index {
            let gone = self.pending.borrow_mut().remove(&ChunkKey {
                layer: flight.first.layer,
                index,
            });
            for waiting in gone.into_iter().flat_map(|pending| pending.waiters) {
                waiting.request.end(Err(error.clone()));
            }
        }
    }
}

/// Between half and all of `pause`, so that many clients do not come back in step.
fn jittered(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let random = u32::try_from(RandomState::new().hash_one(0) & 0xFFFF).unwrap_or(0);
    pause / 2 + pause / 2 * random / 0xFFFF
}
