//! What the threads that read and the fetch thread share. In: chunks, from the fetch thread. Out: the same chunks to threads that
//! may not wait, and their first uses to the planner.
//!
//! Invariant: a chunk that is found here was verified, or cannot be: the fetch thread puts nothing else in. A file may change at any time:
//! what lies in the disk cache is read from here only if its checksum is known to be the right one, and compared each time.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::Notify;

use super::content::ContentUse;
use super::dedup::DedupTables;
use super::stats::{Counters, add};
use super::{FetchError, LayerRange};
use crate::cache::disk::Bits;
use crate::cache::early::FirstUse;
use crate::http::WaitOwner;
use crate::prefetch::{ChunkRange, HintCounts};
use crate::units::CHUNK_BYTES;

/// A layer as every thread sees it.
#[derive(Debug)]
pub(crate) enum SharedLayer {
    /// Lies in a file as it is, and is not verified.
    Local { path: PathBuf, file: OwnedFd, size: u64 },
    /// Has to be fetched, decoded or verified.
    Fetched(FetchedLayer),
}

/// What every thread sees of a layer that has to be fetched, decoded or verified.
#[derive(Debug)]
pub(crate) struct FetchedLayer {
    /// The tar's length.
    pub(super) size: u64,
    /// What is held of it, which other layers may share.
    pub(super) content: ContentUse,
    /// What others have in common with it.
    pub(super) dedup: DedupTables,
    /// Set once, when the layer turns out to be damaged or forged.
    pub(super) poison: OnceLock<FetchError>,
}

impl FetchedLayer {
    pub(super) fn new(size: u64, content: ContentUse) -> Self {
        Self {
            size,
            content,
            dedup: DedupTables::default(),
            poison: OnceLock::new(),
        }
    }

    /// Whether all chunks from `first` up to `end` are in the disk cache.
    pub(super) fn is_on_disk(&self, first: u32, end: u32) -> bool {
        self.content
            .cache
            .get()
            .is_some_and(|cache| cache.find(first, end).is_some())
    }

    /// See [`super::Fetcher::read_at_once`].
    pub(super) fn read_at_once(&self, asked: LayerRange, target: &mut [u8]) -> bool {
        let chunks = ChunkRange::of(asked.layer, asked.range);
        let verified = |checked: &Bits| checked.has_all(chunks.first, chunks.end);
        let Some(cache) = self.content.cache.get() else {
            return false;
        };
        self.content.checked.as_ref().is_none_or(verified)
            && self.poison.get().is_none()
            && cache.read_checked(asked.range.start.0, target)
    }
}

impl SharedLayer {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Local { size, .. } => *size,
            Self::Fetched(layer) => layer.size,
        }
    }
}

/// What all handles on a device's engine and the engine share.
pub(crate) struct Shared {
    pub(super) layers: Vec<SharedLayer>,
    /// Set once, when what the device shows turns out to be a lie: names and modes as much as bytes.
    pub(super) poison: OnceLock<FetchError>,
    pub(super) counters: Arc<Counters>,
    /// How good the planner's guesses are.
    pub(super) hints: Arc<HintCounts>,
    /// Whom the device's tasks work for: itself.
    pub(super) owner: WaitOwner,
    /// First uses of prefetched chunks, for the planner.
    pub(super) touches: Mutex<Vec<Touch>>,
    /// Wakes the fetch thread for them.
    pub(super) nudge: Notify,
}

/// What a read found that no reader had asked for before.
#[derive(Default)]
pub(super) struct FirstUses {
    /// Bytes of chunks that had been prefetched, as if no chunk were short.
    paid: u64,
    /// Whether there was any.
    any: bool,
    /// Whether the planner wants to hear of it at once.
    wake: bool,
}

impl FirstUses {
    pub(super) fn add(&mut self, first: FirstUse) {
        if let FirstUse::Yes { prefetched, marker } = first {
            self.any = true;
            self.wake |= marker;
            self.paid += if prefetched { CHUNK_BYTES } else { 0 };
        }
    }
}

/// A range was found in memory or on disk, some of it for the first time, and `paid` bytes of that had been prefetched.
pub(crate) struct Touch {
    pub(super) asked: LayerRange,
    pub(super) paid: u64,
}

impl Shared {
    pub(super) fn new(layers: Vec<SharedLayer>) -> Self {
        Self {
            hints: Arc::new(HintCounts::new(layers.len())),
            layers,
            poison: OnceLock::new(),
            counters: Arc::default(),
            owner: WaitOwner::default(),
            touches: Mutex::default(),
            nudge: Notify::new(),
        }
    }

    /// Notes what was read for the first time, if anything. No reader waits for the planner: when it does not keep up, it misses some.
    pub(super) fn note_first_uses(&self, asked: LayerRange, FirstUses { paid, any, wake }: FirstUses) {
        const MOST: usize = 4096;
        if !any {
            return;
        }
        add(&self.counters.prefetched_used, paid);
        let touch = Touch { asked, paid };
        {
            let mut touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
            if touches.len() < MOST {
                touches.push(touch);
            }
        }
        if wake {
            self.nudge.notify_one();
        }
    }

    pub(super) fn take_touches(&self) -> Vec<Touch> {
        std::mem::take(&mut *self.touches.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The layer, when `asked` lies inside it.
    pub(super) fn layer_of(&self, asked: LayerRange) -> Option<&SharedLayer> {
        let layer = self.layers.get(usize::try_from(asked.layer.0).ok()?)?;
        let end = asked.range.start.0.checked_add(asked.range.len)?;
        (end <= layer.size()).then_some(layer)
    }
}
