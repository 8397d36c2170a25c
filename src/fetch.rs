//! The bytes that a block needs. In: ranges of layers in tar space. Out: the same ranges as memory, verified as far as the
//! layer allows, or an error with a cause.
//!
//! One fetch thread runs an `io_uring` runtime and does all that waits, for all devices of the process ([`FetchPool`]): local
//! files, the cache file, the network. Threads that answer the kernel only look ([`Fetcher::locate`]) or leave a request ([`Fetcher::read`]); neither ever blocks. This
//! room knows nothing of inodes: what it needs to know of files it asks a [`FileMap`].
//!
//! A blob may be compressed: what is fetched are ranges of the blob, what is handed out are ranges of the tar that comes out
//! of it. What a layer's index vouches for is checked before anybody sees it.
//!
//! Parts: `blob` (what a layer is), `content` (what is held of it), `pool` (the fetch thread), `engine` (a device on it: one flight a chunk), `transport` (ranges
//! over connections), `stats`, `options`, `cost` (what happened before there was a fetcher), `trust` (on whose word), `unproven`
//! (indexes that are compared with headers in the end), `verified` (what need not be compared with digests again), `dedup` (bytes that other layers
//! have, too).

mod blob;
mod content;
mod cost;
mod dedup;
mod deduplicator;
pub mod descriptors;
mod engine;
mod error;
mod options;
mod pool;
mod runtime;
#[cfg(feature = "unstable-internals")]
pub use runtime::simulated;
mod shared;
mod stats;
mod transport;
pub mod trust;
mod unproven;
mod verified;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

pub(crate) use blob::WholeDigests;
pub use blob::{ChunkVerifier, Coded, LayerSource, Verifier, Windows};
pub use cost::{KnownBy, LayerCost, PrepareCost};
pub use dedup::{MOST_DONORS, PROVEN_WHOLE, SharedExtent, SharedPayloads, ShortDigest};
pub use deduplicator::Deduplicator;
pub use error::{FetchError, StartError};
pub use options::{FetchOptions, OpenOptions, PoolOptions, USUAL_CONNECTIONS};
pub use pool::FetchPool;
pub use stats::{BytesByOrigin, FetchStats, HintStats, HintTotal, Percentiles, PoolStats, Wait};
pub use trust::{BytesTrust, IndexTrust, KeyId, LayerTrust};
pub use unproven::UnprovenIndex;

use crate::cache::chunk::pieces;
use crate::cache::{Slice, Slices};
use crate::http::{self, tls};
use crate::prefetch::ChunkRange;
use crate::units::{LayerId, TarRange, len_u64};
use dedup::AtDonors;
use engine::Command;
use shared::{FetchedLayer, FirstUses, Shared, SharedLayer};
use stats::add;

/// Where a range of a layer is right now. Borrowed from the fetcher that said so.
#[derive(Clone, Debug)]
pub enum Located<'a> {
    /// In memory: these slices in order, together as long as the range.
    Memory(Slices),
    /// In a local file that is the layer itself, and that nothing vouches for, from this byte on; a reader with a ring of its own may
    /// read it there.
    File(BorrowedFd<'a>, u64),
    /// In the disk cache, or another layer has it: ask [`Fetcher::read`], which checks what it reads back.
    Disk,
    /// Not here, or not all of it in one place: ask [`Fetcher::read`].
    Elsewhere,
}

/// Told when a read ends; called once, on the fetch thread, inside its runtime. Must not block.
pub trait ReadCallback: Send {
    /// Told before it is called, if some of the bytes came because another device's reader or planner had asked for them.
    fn by_another_device(&mut self) {}

    /// Takes the bytes, range after range in the order asked, or why there are none.
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>);
}

/// A range of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRange {
    /// The layer.
    pub layer: LayerId,
    /// The bytes.
    pub range: TarRange,
}

/// A TLS configuration that believes what this machine believes.
///
/// # Errors
/// When the machine has no certificates to believe in, or none of them can be read.
pub fn default_tls() -> Result<Arc<ClientConfig>, StartError> {
    tls::client_config().map_err(StartError::Certificates)
}

/// A handle on a device's engine on the fetch thread. Cheap to clone; the engine ends when the last handle is gone, and what it
/// held in memory is given back.
#[derive(Clone)]
pub struct Fetcher {
    shared: Arc<Shared>,
    /// The engine runs as long as one of these lives.
    commands: UnboundedSender<Command>,
    /// Keeps the thread.
    pool: FetchPool,
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher")
            .field("layers", &self.shared.layers)
            .finish_non_exhaustive()
    }
}

impl Fetcher {
    /// The pool that it is of.
    #[must_use]
    pub fn pool(&self) -> &FetchPool {
        &self.pool
    }

    /// Why nothing is read of the whole device any more, if that is so: an index of it lies.
    #[must_use]
    pub fn poisoned(&self) -> Option<&FetchError> {
        self.shared.poison.get()
    }

    /// Where `range` is now, without waiting, system calls or long locks. Counts as a use of what it finds.
    #[must_use]
    pub fn locate(&self, asked: LayerRange) -> Located<'_> {
        let shared = &*self.shared;
        let counters = &*shared.counters;
        match shared.layer_of(asked) {
            None => Located::Elsewhere,
            Some(SharedLayer::Local { file, .. }) => {
                add(&counters.reads, 1);
                add(&counters.bytes_disk, asked.range.len);
                Located::File(file.as_fd(), asked.range.start.0)
            }
            Some(SharedLayer::Fetched(layer)) => {
                if layer.poison.get().is_some() {
                    return Located::Elsewhere;
                }
                if let Some(slices) = self.locate_in_memory(layer, asked) {
                    return Located::Memory(slices);
                }
                let stretch = ChunkRange::of(asked.layer, asked.range);
                if layer.is_on_disk(stretch.first, stretch.end) {
                    return Located::Disk;
                }
                match layer.dedup.locate(asked.range) {
                    Some(AtDonors::Memory(slices)) => {
                        add(&counters.reads, 1);
                        add(&counters.bytes_deduplicated, asked.range.len);
                        Located::Memory(slices)
                    }
                    Some(AtDonors::Here) => Located::Disk,
                    None => Located::Elsewhere,
                }
            }
        }
    }

    /// Fills `target` with `range`, of the same length, if the disk cache has it, the page cache has that, and this process knows it to
    /// be right; says whether it did. Then it waited for nothing, and compared every chunk of it. What is not right is found out by
    /// [`Fetcher::read`].
    #[must_use]
    pub fn read_at_once(&self, asked: LayerRange, target: &mut [u8]) -> bool {
        let shared = &*self.shared;
        let Some(SharedLayer::Fetched(layer)) = shared.layer_of(asked) else {
            return false;
        };
        if len_u64(target.len()) != asked.range.len || layer.poison.get().is_some() {
            return false;
        }
        let counter = if layer.read_at_once(asked, target) {
            let mut first_uses = FirstUses::default();
            for key in ChunkRange::of(asked.layer, asked.range).keys() {
                first_uses.add(layer.content.early.read(key.index));
            }
            shared.note_first_uses(asked, first_uses);
            &shared.counters.bytes_disk
        } else if layer.dedup.read_at_once(asked.range, target) {
            &shared.counters.bytes_deduplicated
        } else {
            return false;
        };
        add(&shared.counters.reads, 1);
        add(counter, asked.range.len);
        true
    }

    fn locate_in_memory(&self, layer: &FetchedLayer, asked: LayerRange) -> Option<Slices> {
        let shared = &*self.shared;
        let mut slices = Slices::new();
        let mut first_uses = FirstUses::default();
        for (key, from, len) in pieces(asked.layer, asked.range) {
            let Some(chunk) = layer.content.memory.get(key.index) else {
                slices.clear();
                break;
            };
            chunk.touch();
            first_uses.add(layer.content.early.read(key.index));
            slices.push(Slice::new(chunk, from, len));
        }
        shared.note_first_uses(asked, first_uses);
        if slices.is_empty() && !asked.range.is_empty() {
            return None;
        }
        add(&shared.counters.reads, 1);
        add(&shared.counters.bytes_memory, asked.range.len);
        Some(slices)
    }

    /// Leaves a demand read of `ranges` with the fetch thread and returns at once.
    pub fn read(&self, ranges: Vec<LayerRange>, callback: Box<dyn ReadCallback>) {
        let command = Command::Read {
            ranges,
            callback: engine::CompleteOnDrop::new(callback),
            asked: Instant::now(),
        };
        // When the engine is gone the command comes back and is dropped, and dropping it tells the waiter.
        let _gone = self.commands.send(command);
    }

    /// Fetches `ranges` from now on as far as the link has room, in this order and ahead of every other guess, unless readers turn out to
    /// read other things. Returns at once.
    pub fn follow_profile(&self, ranges: Vec<ChunkRange>) {
        // An engine that is gone fetches nothing.
        let _gone = self.commands.send(Command::Profile(ranges));
    }

    /// Reads `ranges` and waits for them. Not for the threads that answer the kernel.
    ///
    /// # Errors
    /// As a [`ReadCallback`] is told.
    pub fn read_blocking(&self, ranges: Vec<LayerRange>) -> Result<Vec<Slice>, FetchError> {
        struct Channel(mpsc::Sender<Result<Vec<Slice>, FetchError>>);
        impl ReadCallback for Channel {
            fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
                // The reader may be gone.
                let _reader_is_gone = self.0.send(outcome);
            }
        }
        let (give, take) = mpsc::channel();
        self.read(ranges, Box::new(Channel(give)));
        take.recv().unwrap_or(Err(FetchError::Stopped))
    }

    /// What it has done until now.
    #[must_use]
    pub fn stats(&self) -> FetchStats {
        let mut stats = self.shared.counters.snapshot();
        stats.hints = self.shared.hints.snapshot().into_iter().map(HintStats::from).collect();
        stats.poisoned = self.poisoned().map(ToString::to_string);
        for layer in &self.shared.layers {
            if let SharedLayer::Fetched(layer) = layer {
                if stats.poisoned.is_none() {
                    stats.poisoned = layer.poison.get().map(ToString::to_string);
                }
                stats.bytes_layers += layer.size;
                let Some(cache) = layer.content.cache.get() else {
                    continue;
                };
                stats.bytes_held += cache.bytes_held();
                if stats.cache_trouble.is_none() {
                    stats.cache_trouble = cache.trouble();
                }
            }
        }
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        stats.waiting = http::waiting_of(&self.shared.owner)
            .into_iter()
            .map(|waiting| Wait {
                waited_ms: millis(waiting.lasted()),
                left_ms: millis(waiting.left()),
                place: waiting.place,
                why: waiting.why,
            })
            .collect();
        stats
    }

    /// Ends its engine and waits for that: reads in flight fail with [`FetchError::Stopped`]. Safe to call twice.
    pub fn shutdown(&self) {
        let (give, take) = mpsc::channel();
        if self.commands.send(Command::Shutdown(give)).is_ok() {
            // An engine that is gone already has nothing to say.
            let _gone = take.recv();
        }
    }
}
