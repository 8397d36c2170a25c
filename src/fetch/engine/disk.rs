//! What the fetch thread does with files: reads of local layers, reads of cached chunks, and writing chunks behind.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::request::Request;
use super::{Engine, LayerState};
use crate::cache::chunk::{Chunk, ChunkKey, Slice, chunk_len};
use crate::cache::disk::{LayerCache, RunWriter};
use crate::fetch::runtime::{self, File, sleep};
use crate::fetch::shared::SharedLayer;
use crate::fetch::stats::add;
use crate::fetch::{FetchError, LayerRange, Verifier};
use crate::units::{LayerId, TarRange, len_u64, len_usize};

/// Local reads are cut to this, so that the length asked for never decides how much memory one operation takes.
const LONGEST_LOCAL_READ: u64 = 1 << 20;
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
            runtime::spawn(async move {
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
        let own = file.try_clone().map_err(fail)?;
        File::from(std::fs::File::from(own))
            .read_exact_at(asked.range.start.0, len_usize(asked.range.len))
            .await
            .map_err(fail)
    }

    /// Brings cached chunks to memory. What cannot be read back, or is not what it has to be, is fetched again.
    pub(super) fn read_cached(self: &Rc<Self>, keys: Vec<ChunkKey>) {
        for key in keys {
            runtime::spawn(self.clone().read_cached_chunk(key));
        }
    }

    async fn read_cached_chunk(self: Rc<Self>, key: ChunkKey) {
        let Some(state) = self.layer(key.layer) else { return };
        if let Some(chunk) = state.writer.queued(key.index) {
            self.deliver(key, chunk.bytes().to_vec(), false);
            return;
        }
        let Some(cache) = self.cache(key.layer) else { return };
        let len = len_usize(chunk_len(state.size, key.index));
        let read = async {
            File::from(cache.file_of(key.index)?)
                .read_exact_at(key.start().0, len)
                .await
        };
        let trusted = self.is_verified(key);
        if let Some(pieces) = state.verifier.as_ref().and_then(Verifier::pieces).filter(|_| !trusted) {
            drop(read);
            return self.clone().deliver_verified_pieces(state, pieces, key).await;
        }
        let why = match read.await {
            Ok(bytes) if trusted => return self.deliver(key, bytes, false),
            Ok(bytes) => {
                let (right, bytes) = self.matches(state, key.index, bytes).await;
                if right {
                    self.mark_verified(key);
                    return self.deliver(key, bytes, false);
                }
                "it is not what the index says".to_owned()
            }
            Err(error) => error.to_string(),
        };
        self.drop_cached(state, key, &why);
        self.fetch_again(key);
    }

    /// A chunk in the cache is no use.
    pub(super) fn drop_cached(&self, state: &LayerState, key: ChunkKey, why: &str) {
        let Some(cache) = self.cache(key.layer) else { return };
        if cache.has(key.index) {
            add(&self.counters.chunks_wrong, 1);
            let name = state.origin.name();
            log::warn!(
                "cache of {name}: chunk {}: {why}; it is fetched again when it is wanted",
                key.index
            );
            cache.lost(key.index);
        }
    }

    /// Whether what lies in the cache of a chunk was checked by this process, or is not to be checked.
    pub(super) fn is_verified(&self, key: ChunkKey) -> bool {
        let checked = self.fetched(key.layer).and_then(|layer| layer.checked.as_ref());
        checked.is_none_or(|checked| checked.has(key.index))
    }

    /// A chunk that lies in the cache was checked by this process.
    pub(super) fn mark_verified(&self, key: ChunkKey) {
        if let Some(checked) = self.fetched(key.layer).and_then(|layer| layer.checked.as_ref()) {
            checked.set(key.index);
        }
    }

    pub(super) fn cache(&self, layer: LayerId) -> Option<&Arc<LayerCache>> {
        self.fetched(layer)?.cache.get()
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
            runtime::spawn(self.clone().write_behind(key));
        }
        true
    }

    /// Writes what is queued for the layer of `key` until nothing is.
    async fn write_behind(self: Rc<Self>, key: ChunkKey) {
        let (Some(state), Some(cache)) = (self.layer(key.layer), self.cache(key.layer)) else {
            return;
        };
        let mut file = cache.writer();
        loop {
            if self.budget.unwritten() < SMALL_BACKLOG && !self.stopping.get() {
                sleep(WRITE_DELAY).await;
            }
            let batch = state.writer.next_run();
            let Some((first, _)) = batch.first() else { break };
            let first = *first;
            let bytes = batch.iter().map(|(_, chunk)| len_u64(chunk.bytes().len())).sum::<u64>();
            let indexes = first..first.saturating_add(u32::try_from(batch.len()).unwrap_or(0));
            let start = ChunkKey {
                layer: key.layer,
                index: first,
            }
            .start()
            .0;
            let direct = self.budget.unwritten() <= DIRECT_BACKLOG;
            let written;
            (file, written) = match file {
                Ok(file) if cache.takes_more() => write_run(file, start, len_usize(bytes), batch, direct).await,
                Ok(file) => (Ok(file), Err(io::ErrorKind::StorageFull.into())),
                Err(error) => {
                    let again = io::Error::new(error.kind(), error.to_string());
                    (Err(error), Err(again))
                }
            };
            self.budget.end_write(bytes);
            match written {
                Ok(()) => {
                    for index in indexes.clone() {
                        self.mark_verified(ChunkKey {
                            layer: key.layer,
                            index,
                        });
                        cache.wrote(index);
                    }
                    add(&self.counters.bytes_stored, bytes);
                    Self::commit_later(state, cache);
                }
                Err(error) => cache.stop_writing(&error),
            }
            indexes.for_each(|index| drop(state.writer.queued.borrow_mut().remove(&index)));
            self.verify_if_complete(state, key.layer);
            state.writer.drained.notify_waiters();
        }
        state.writer.running.set(false);
        state.writer.drained.notify_waiters();
        self.pump();
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

/// Commits on a thread that may block.
async fn commit(cache: Arc<LayerCache>) {
    match runtime::blocking(move || cache.commit()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::warn!("{error}"),
        Err(error) => log::warn!("the cache was not committed: {error}"),
    }
}

/// Writes a run of chunks on a thread that may wait for the disk; the file comes back with how it went.
async fn write_run(
    mut file: RunWriter,
    start: u64,
    len: usize,
    batch: Vec<(u32, Arc<Chunk>)>,
    direct: bool,
) -> (io::Result<RunWriter>, io::Result<()>) {
    let job = runtime::blocking(move || {
        let pieces = batch.iter().map(|(_, chunk)| chunk.bytes());
        let written = file.write(start, len, pieces, direct);
        (file, written)
    });
    match job.await {
        Ok((file, written)) => (Ok(file), written),
        Err(error) => (Err(io::Error::other(error.to_string())), Err(io::Error::other(error))),
    }
}
