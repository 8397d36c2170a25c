//! What the fetch thread does with files: reads of local layers, reads of cached chunks, and writing chunks behind.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::request::Request;
use super::write_queue::WriteRun;
use super::{Engine, LayerState};
use crate::cache::chunk::{Chunk, ChunkKey, Slice};
use crate::cache::disk::{LayerCache, RunWriter};
use crate::fetch::runtime::{self, File, sleep};
use crate::fetch::shared::SharedLayer;
use crate::fetch::stats::add;
use crate::fetch::{FetchError, LayerRange, Verifier};
use crate::units::{LayerId, TarRange, len_u64, len_usize};

/// Local reads are cut to this, so that the length asked for never decides how much memory one operation takes.
const LONGEST_LOCAL_READ: u64 = 1 << 20;
/// Chunks that are read back by one job of a worker: all that a reader wants at once, if a checksum is all that they are compared with.
const READ_BACK_AT_ONCE: usize = 32;
/// The same where each is compared with a digest, which several workers do side by side.
const DIGESTED_AT_ONCE: usize = 8;
/// Why a chunk of the cache is not used.
pub(super) const NOT_AS_WRITTEN: &str = "it is not what was written";
/// As long as no more than this waits to be written, the disk keeps up and long runs go past the page cache.
const DIRECT_BACKLOG: u64 = 16 << 20;
/// As long as no more than this waits to be written, writing waits a moment: whoever reads on finds the thread and the CPUs
/// free, and neighbours become one write.
const SMALL_BACKLOG: u64 = 4 << 20;
const WRITE_DELAY: Duration = Duration::from_millis(10);
/// The map is written when so much is not in it yet...
const COMMIT_BYTES: u64 = 128 << 20;
/// ...or so long after the first chunk that is not.
const COMMIT_DELAY: Duration = Duration::from_secs(2);

impl Engine {
    /// Adds the slots of a local range to `request` and starts reading them.
    pub(super) fn read_local(self: &Rc<Self>, request: &Rc<Request>, asked: LayerRange) {
        add(&self.counters.bytes_disk, asked.range.len);
        let mut at = asked.range.start;
        while at < asked.range.end() {
            let len = asked.range.end().since(at).min(LONGEST_LOCAL_READ);
            let range = TarRange::new(at, len);
            let slot = request.expect();
            let (engine, request) = (self.clone(), request.clone());
            self.spawn(async move {
                match engine
                    .read_file(LayerRange {
                        layer: asked.layer,
                        range,
                    })
                    .await
                {
                    Ok(bytes) => request.fill(slot, Slice::new(Arc::new(Chunk::new(bytes)), 0, len)),
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
        let own = file.try_clone().map_err(fail)?;
        File::from(std::fs::File::from(own))
            .read_exact_at(asked.range.start.0, len_usize(asked.range.len))
            .await
            .map_err(fail)
    }

    /// Brings cached chunks to memory. What cannot be read back, or is not what it has to be, is fetched again.
    pub(super) fn read_cached(self: &Rc<Self>, keys: &[ChunkKey]) {
        for of_one_layer in keys.chunk_by(|a, b| a.layer == b.layer) {
            let (Some(state), Some(cache)) = (
                of_one_layer.first().and_then(|key| self.layer(key.layer)),
                of_one_layer.first().and_then(|key| self.cache(key.layer)),
            ) else {
                continue;
            };
            let mut in_file = Vec::with_capacity(of_one_layer.len());
            for key in of_one_layer {
                if let Some(chunk) = state.writer.queued(key.index) {
                    self.deliver(*key, chunk.bytes().to_vec(), false);
                } else if let Some(pieces) = state.verifier.as_ref().and_then(Verifier::pieces) {
                    let (engine, state, pieces, key) = (self.clone(), state.clone(), pieces.clone(), *key);
                    self.spawn(async move { engine.deliver_verified_pieces(&state, &pieces, key).await });
                } else {
                    in_file.push(*key);
                }
            }
            for run in in_file.chunk_by(|a, b| a.index.checked_add(1) == Some(b.index)) {
                let digested = state.verifier.is_some() && !run.iter().all(|key| self.is_verified(*key));
                let at_once = if digested { DIGESTED_AT_ONCE } else { READ_BACK_AT_ONCE };
                for batch in run.chunks(at_once) {
                    let (engine, state, cache) = (self.clone(), state.clone(), cache.clone());
                    let batch = batch.to_vec();
                    self.spawn(async move { engine.read_back(&state, &cache, batch).await });
                }
            }
        }
    }

    /// Reads chunks that lie side by side back and delivers those that are right.
    async fn read_back(self: Rc<Self>, state: &Rc<LayerState>, cache: &Arc<LayerCache>, batch: Vec<ChunkKey>) {
        let checker = ReadBack::new(cache, state, &batch, |key| self.is_verified(key));
        let Some(first) = batch.first().map(|key| key.index) else {
            return;
        };
        let count = u32::try_from(batch.len()).unwrap_or(u32::MAX);
        // A single chunk that a short read waits for is here sooner than another thread is awake, if the page cache has it. What it
        // has of others is read where it is checked.
        let alone = matches!(batch[..], [key] if self.in_flight.has_short_reader(key));
        let mut outcomes = if alone {
            checker.read_at_once(first, count)
        } else {
            let checker = checker.clone();
            let read = self.work((), move |()| checker.read_at_once(first, count));
            read.await.unwrap_or_default()
        };
        let left = batch.len().saturating_sub(outcomes.len());
        if left > 0 {
            // Waiting for the disk takes a thread, but no worker's turn.
            let from = first.saturating_add(u32::try_from(outcomes.len()).unwrap_or(0));
            let left = u32::try_from(left).unwrap_or(u32::MAX);
            let read = runtime::blocking({
                let checker = checker.clone();
                move || checker.read_waiting(from, left)
            });
            outcomes.extend(read.await.unwrap_or_default());
        }
        // What a thread that died has not read is no use.
        let unread = || Err("it could not be read".to_owned());
        let outcomes = outcomes.into_iter().chain(std::iter::repeat_with(unread));
        for (key, outcome) in batch.into_iter().zip(outcomes) {
            self.read_back_ended(state, key, outcome);
        }
    }

    /// Runs `job` on a worker thread, when one is free; none if it died.
    async fn work<T: Send + 'static, R: Send + 'static>(
        &self,
        input: T,
        job: impl FnOnce(T) -> R + Send + 'static,
    ) -> Option<R> {
        let permit = self.workers.clone().acquire_owned().await.ok();
        let job = runtime::blocking(move || {
            let _permit = permit;
            job(input)
        });
        job.await.ok()
    }

    /// A chunk was read back: it is delivered, or fetched again.
    fn read_back_ended(self: &Rc<Self>, state: &Rc<LayerState>, key: ChunkKey, outcome: Result<Vec<u8>, String>) {
        self.count_verified(state);
        match outcome {
            Ok(bytes) => {
                self.mark_verified(key);
                self.deliver(key, bytes, false);
            }
            Err(why) => {
                self.drop_cached(state, key, &why);
                self.fetch_again(key);
            }
        }
    }

    /// A chunk in the cache is no use.
    pub(super) fn drop_cached(&self, state: &Rc<LayerState>, key: ChunkKey, why: &str) {
        let Some(cache) = self.cache(key.layer) else { return };
        if cache.has(key.index) {
            add(&self.counters.chunks_wrong, 1);
            add(&self.counters.cache_damaged, 1);
            let name = state.origin.name();
            let level = if state.told_damage.replace(true) {
                log::Level::Debug
            } else {
                log::Level::Warn
            };
            log::log!(
                level,
                "cache of {name}: chunk {}: {why}; it is fetched again, as all such chunks are when they are wanted",
                key.index
            );
            cache.lost(key.index);
            // In a protected file it cannot be written anew: that is for the next commit.
            Self::commit_later(state, cache);
        }
    }

    /// Whether this process has verified a chunk in the cache: from then on its checksum tells whether it still is the same. Without
    /// digests there is nothing to verify.
    pub(super) fn is_verified(&self, key: ChunkKey) -> bool {
        let checked = self.fetched(key.layer).and_then(|layer| layer.content.checked.as_ref());
        checked.is_none_or(|checked| checked.has(key.index))
    }

    /// A chunk that lies in the cache was verified by this process.
    pub(super) fn mark_verified(&self, key: ChunkKey) {
        if let Some(checked) = self.fetched(key.layer).and_then(|layer| layer.content.checked.as_ref()) {
            checked.set(key.index);
        }
    }

    /// All of a layer lies in the cache and was verified by this process.
    pub(super) fn mark_all_verified(&self, layer: LayerId) {
        if let Some(checked) = self.fetched(layer).and_then(|layer| layer.content.checked.as_ref()) {
            checked.set_all();
        }
    }

    /// Whether a chunk came before any reader asked for it, and is unread.
    fn is_unread(&self, key: ChunkKey) -> bool {
        self.fetched(key.layer)
            .is_some_and(|layer| layer.content.early.is_unread(key.index))
    }

    /// A chunk lies in the disk cache now: memory need not keep it.
    fn note_stored(&self, key: ChunkKey) {
        if let Some(layer) = self.fetched(key.layer) {
            layer.content.memory.stored(key.index);
        }
    }

    pub(super) fn cache(&self, layer: LayerId) -> Option<&Arc<LayerCache>> {
        self.fetched(layer)?.content.cache.get()
    }

    /// Leaves a chunk to be written to the cache, if there is one that takes it; says whether it is there or will be.
    pub(super) fn queue_write(self: &Rc<Self>, key: ChunkKey, chunk: Arc<Chunk>, even_if_behind: bool) -> bool {
        let (Some(state), Some(cache)) = (self.layer(key.layer), self.cache(key.layer)) else {
            return false;
        };
        if cache.has(key.index) || state.writer.queued(key.index).is_some() {
            return true;
        }
        let behind = self.budget.is_disk_behind() && !even_if_behind;
        if behind || !cache.takes_more() || self.stopping.get() {
            return false;
        }
        state.writer.queued.borrow_mut().insert(key.index, chunk.clone());
        self.budget.queue_write(len_u64(chunk.bytes().len()));
        state.writer.queue.borrow_mut().insert(key.index, chunk);
        if !state.writer.running.replace(true) {
            self.spawn(self.clone().write_behind(key));
        }
        true
    }

    /// Writes what is queued for the layer of `key` until nothing is.
    async fn write_behind(self: Rc<Self>, key: ChunkKey) {
        let (Some(state), Some(cache)) = (self.layer(key.layer), self.cache(key.layer)) else {
            return;
        };
        let mut writer = RunWriter::default();
        loop {
            if self.budget.unwritten() < SMALL_BACKLOG && !self.stopping.get() {
                sleep(WRITE_DELAY).await;
            }
            let runs = state.writer.next_runs();
            if runs.is_empty() {
                break;
            }
            // What is still to be read leaves memory for the page cache.
            let is_read = |(index, _): &(u32, Arc<Chunk>)| !self.is_unread(ChunkKey { index: *index, ..key });
            let keeps_up = self.budget.unwritten() <= DIRECT_BACKLOG;
            let runs = runs.into_iter().map(|run| (keeps_up && run.iter().all(is_read), run));
            let runs: Arc<[_]> = runs.collect();
            let outcomes;
            (writer, outcomes) = write_runs(cache.clone(), writer, runs.clone()).await;
            let is_written = outcomes.into_iter().chain(std::iter::repeat(false));
            for ((_, run), is_written) in runs.iter().zip(is_written) {
                self.run_ended(state, cache, key.layer, run, is_written);
            }
            self.verify_if_complete(state, key.layer);
            state.writer.drained.notify_waiters();
        }
        state.writer.running.set(false);
        state.writer.drained.notify_waiters();
        self.pump();
    }

    /// A run of a layer was written, or could not be.
    fn run_ended(
        &self,
        state: &Rc<LayerState>,
        cache: &Arc<LayerCache>,
        layer: LayerId,
        run: &WriteRun,
        is_written: bool,
    ) {
        let bytes = run.iter().map(|(_, chunk)| len_u64(chunk.bytes().len())).sum::<u64>();
        self.budget.end_write(bytes);
        if is_written {
            for (index, _) in run {
                let key = ChunkKey { layer, index: *index };
                self.mark_verified(key);
                self.note_stored(key);
            }
            add(&self.counters.bytes_stored, bytes);
            Self::commit_later(state, cache);
        }
        let mut queued = state.writer.queued.borrow_mut();
        for (index, _) in run {
            queued.remove(index);
        }
    }

    fn commit_later(state: &Rc<LayerState>, cache: &Arc<LayerCache>) {
        let delay = if cache.dirty_bytes() >= COMMIT_BYTES {
            Duration::ZERO
        } else {
            COMMIT_DELAY
        };
        if !state.writer.commit_due.replace(true) {
            let (state, cache) = (state.clone(), cache.clone());
            runtime::spawn(async move {
                sleep(delay).await;
                state.writer.commit_due.set(false);
                commit(cache).await;
            });
        }
    }

    /// Waits for what is queued and puts it in the maps; gives up on disks that take too long.
    pub(super) async fn settle(&self) {
        const PATIENCE: Duration = Duration::from_secs(30);
        for state in self.layers.iter().flatten() {
            let written = async {
                while !state.writer.is_idle() {
                    state.writer.progress().await;
                }
            };
            if runtime::timeout(PATIENCE, written).await.is_err() {
                log::warn!("the cache's disk does not keep up; what it has not taken is forgotten");
            }
        }
        self.write_parts().await;
        for layer in (0..).map(LayerId).take(self.layers.len()) {
            if let Some(cache) = self.cache(layer) {
                commit(cache.clone()).await;
            }
        }
    }
}

/// Reads chunks of a layer's cache and checks them. Goes to worker threads.
#[derive(Clone)]
struct ReadBack {
    cache: Arc<LayerCache>,
    /// None if checksums are enough.
    verifier: Option<Verifier>,
}

impl ReadBack {
    /// For `batch`, chunks of one layer. Those that were verified before are compared with their checksums alone, if all of them were.
    fn new(
        cache: &Arc<LayerCache>,
        state: &LayerState,
        batch: &[ChunkKey],
        is_verified: impl Fn(ChunkKey) -> bool,
    ) -> Self {
        let all_verified = batch.iter().all(|key| is_verified(*key));
        Self {
            cache: Arc::clone(cache),
            verifier: state.verifier.clone().filter(|_| !all_verified),
        }
    }

    /// Of `count` chunks from `first` on those that the page cache has, up to the first that has to be waited for: checked, in this order.
    fn read_at_once(&self, first: u32, count: u32) -> Vec<Result<Vec<u8>, String>> {
        let found = self.cache.read_run(first, count, false).unwrap_or_default();
        (first..)
            .zip(found)
            .map(|(index, bytes)| self.check(index, bytes))
            .collect()
    }

    /// All of `count` chunks from `first` on, checked, in this order. Waits for the disk.
    fn read_waiting(&self, first: u32, count: u32) -> Vec<Result<Vec<u8>, String>> {
        let end = first.saturating_add(count);
        let mut outcomes = Vec::new();
        let mut next = first;
        while next < end {
            match self.cache.read_run(next, end - next, true) {
                Ok(found) if !found.is_empty() => {
                    for bytes in found {
                        outcomes.push(self.check(next, bytes));
                        next += 1;
                    }
                }
                other => {
                    let why = other
                        .err()
                        .map_or_else(|| "the file ends before it".to_owned(), |error| error.to_string());
                    outcomes.push(Err(why));
                    next += 1;
                }
            }
        }
        outcomes
    }

    /// The bytes, if they are chunk `index`: by the digest of the index, if there is one and this process has not compared it yet,
    /// else by the checksum of what was right then.
    fn check(&self, index: u32, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        self.cache.touch(index);
        let right = match &self.verifier {
            Some(Verifier::Chunks(verifier)) => {
                let right = verifier.matches(index, &bytes);
                if right {
                    self.cache.verified(index, &bytes);
                }
                right
            }
            _ => self.cache.matches(index, &bytes),
        };
        if right {
            Ok(bytes)
        } else {
            Err(NOT_AS_WRITTEN.to_owned())
        }
    }
}

/// Commits on a thread that may block. What the disk did not take was said.
async fn commit(cache: Arc<LayerCache>) {
    match runtime::blocking(move || cache.commit()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("{error}"),
        Err(error) => log::warn!("the cache was not committed: {error}"),
    }
}

/// Writes runs of chunks, past the page cache or not, on a thread that may wait for the disk; the writer comes back, and of each run whether
/// it is in the file now.
async fn write_runs(
    cache: Arc<LayerCache>,
    mut writer: RunWriter,
    runs: Arc<[(bool, WriteRun)]>,
) -> (RunWriter, Vec<bool>) {
    let job = runtime::blocking(move || {
        let write = |(direct, run): &(bool, WriteRun)| {
            let chunks: Vec<&[u8]> = run.iter().map(|(_, chunk)| chunk.bytes()).collect();
            run.first()
                .is_some_and(|(first, _)| cache.write(&mut writer, *first, &chunks, *direct))
        };
        let outcomes = runs.iter().map(write).collect();
        (writer, outcomes)
    });
    job.await.unwrap_or_default()
}
