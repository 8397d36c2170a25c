//! How good each hint's guesses are. In: chunks as they are asked for ahead of need and as they are read. Out: for each layer and
//! reason how many bytes were fetched and how many of them were read, and whether the hint has room left in its
//! [`Budget`](super::Budget).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::chunks::ChunkRange;
use super::options::Budgets;
use super::reason::Reason;
use crate::cache::chunk::ChunkKey;
use crate::units::{CHUNK_BYTES, LayerId, TarRange, to_usize};

/// What one hint had fetched of one layer, in bytes as if no chunk were short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintCount {
    /// The layer.
    pub layer: LayerId,
    /// The hint.
    pub reason: Reason,
    /// Bytes that were fetched for this reason before a reader asked for them.
    pub fetched: u64,
    /// Of those, bytes of chunks that were read later.
    pub read: u64,
    /// Whether the hint was silent when it was last asked, because too little of what it had fetched was read.
    pub silenced: bool,
}

#[derive(Debug, Default)]
struct Counted {
    fetched: AtomicU64,
    read: AtomicU64,
    silenced: AtomicBool,
}

/// The counts of one device's hints: the planner writes them, any thread may read them.
#[derive(Debug, Default)]
pub struct HintCounts {
    layers: Vec<[Counted; Reason::ALL.len()]>,
}

impl HintCounts {
    /// For so many layers.
    #[must_use]
    pub fn new(layers: usize) -> Self {
        Self {
            layers: std::iter::repeat_with(Default::default).take(layers).collect(),
        }
    }

    /// Those of which anything was fetched, in the order of layers and reasons.
    #[must_use]
    pub fn snapshot(&self) -> Vec<HintCount> {
        let of_layer = |(layer, counts): (u32, &[Counted; Reason::ALL.len()])| {
            let of_reason = |(reason, counted): (Reason, &Counted)| HintCount {
                layer: LayerId(layer),
                reason,
                fetched: counted.fetched.load(Ordering::Relaxed),
                read: counted.read.load(Ordering::Relaxed),
                silenced: counted.silenced.load(Ordering::Relaxed),
            };
            Reason::ALL.into_iter().zip(counts).map(of_reason).collect::<Vec<_>>()
        };
        let all = (0..).zip(&self.layers).flat_map(of_layer);
        all.filter(|count| count.fetched > 0 || count.silenced).collect()
    }

    fn of(&self, layer: LayerId, reason: Reason) -> Option<&Counted> {
        self.layers.get(to_usize(layer.0))?.get(reason.number())
    }
}

/// Of every chunk that was fetched ahead and not read yet, for what reason it was; see the module.
#[derive(Debug)]
pub(super) struct Precision {
    /// A byte for each chunk of each layer, up to the last that was ever fetched ahead: 0, or the reason's number and 1.
    unread: Vec<Vec<u8>>,
    counts: Arc<HintCounts>,
    /// Bytes that readers got, whatever they were fetched for.
    read: u64,
}

impl Precision {
    pub(super) fn new(layers: usize, counts: Arc<HintCounts>) -> Self {
        Self {
            unread: vec![Vec::new(); layers],
            counts,
            read: 0,
        }
    }

    /// A reader waits for a chunk that was asked for because of that.
    pub(super) fn demanded(&mut self) {
        self.read += CHUNK_BYTES;
    }

    /// A chunk was asked for before any reader asked.
    pub(super) fn fetched(&mut self, key: ChunkKey, reason: Reason) {
        let Some(chunks) = self.unread.get_mut(to_usize(key.layer.0)) else {
            return;
        };
        let index = to_usize(key.index);
        if chunks.len() <= index {
            chunks.resize(index + 1, 0);
        }
        if chunks[index] == 0 {
            chunks[index] = u8::try_from(reason.number()).map_or(0, |number| number + 1);
            if let Some(counted) = self.counts.of(key.layer, reason) {
                counted.fetched.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
            }
        }
    }

    /// Takes the reason from a chunk that was fetched ahead and is unread.
    fn take(&mut self, key: ChunkKey) -> Option<Reason> {
        let chunk = self
            .unread
            .get_mut(to_usize(key.layer.0))?
            .get_mut(to_usize(key.index))?;
        let number = std::mem::take(chunk).checked_sub(1)?;
        Reason::ALL.get(usize::from(number)).copied()
    }

    /// A reader got or waits for a range.
    pub(super) fn read(&mut self, layer: LayerId, range: TarRange) {
        for key in ChunkRange::of(layer, range).keys() {
            if let Some(counted) = self.take(key).and_then(|reason| self.counts.of(layer, reason)) {
                counted.read.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
                self.read += CHUNK_BYTES;
            }
        }
    }

    /// A chunk that was asked for did not come, or another device's reader has read it: it is no guess any more.
    pub(super) fn forget(&mut self, key: ChunkKey) {
        if let Some(counted) = self.take(key).and_then(|reason| self.counts.of(key.layer, reason)) {
            counted.fetched.fetch_sub(CHUNK_BYTES, Ordering::Relaxed);
        }
    }

    /// Whether what is wanted for `reason` may be fetched: the hint's unread bytes of the layer are within its budget.
    pub(super) fn may(&self, budgets: &Budgets, reason: Reason, layer: LayerId) -> bool {
        let Some(counted) = self.counts.of(layer, reason) else {
            return true;
        };
        let (fetched, read) = (
            counted.fetched.load(Ordering::Relaxed),
            counted.read.load(Ordering::Relaxed),
        );
        let may = fetched.saturating_sub(read) <= budgets.of(reason).room(read, self.read);
        counted.silenced.store(!may, Ordering::Relaxed);
        may
    }
}
