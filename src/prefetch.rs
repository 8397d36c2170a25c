//! The prefetch planner: which chunks to fetch, and which are likely to be read next. In: the ranges that readers touch. Out:
//! ranges of chunks: some now, with the demand; the rest in the order of their likelihood, for when the link has room.
//!
//! What is likely is guessed by hints (`hint`), each with a budget. How much of what each had fetched is read is counted, for each
//! layer (`precision`): a hint that guesses badly falls silent there.
//!
//! Pure: no clock, no I/O, no chunk data. It knows the files through a [`FileMap`] and what is here through a question it
//! asks.
//!
//! Invariant: it never promises a chunk. What it queues may be dropped at any time.

mod archives;
pub mod bandwidth;
mod chunks;
mod elf;
mod flights;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod hint;
mod neighbours;
mod node;
mod options;
mod precision;
mod profile;
mod programs;
mod python;
mod reason;
mod scripts;
mod sequential;
mod surroundings;
mod waiting;
mod wishes;

use std::sync::Arc;

use self::archives::Archives;
pub use self::chunks::ChunkRange;
pub use self::flights::{PlannedFlight, merge};
pub use self::hint::LinkEstimate;
use self::hint::{Hint, Layers, Touch};
use self::neighbours::Neighbours;
pub use self::options::{Budget, Budgets, PlanOptions};
use self::precision::Precision;
pub use self::precision::{HintCount, HintCounts};
use self::profile::ProfileHint;
use self::programs::Programs;
pub use self::reason::{Planned, Reason};
use self::sequential::Sequential;
use self::surroundings::Surroundings;
use crate::cache::chunk::ChunkKey;
use crate::image::{FileId, FileMap};
use crate::units::{CHUNK_BYTES, LayerId, TarRange};

/// Whether a chunk has to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// In memory or in the store.
    Here,
    /// In a flight under way.
    Coming,
    /// It would have to be fetched.
    Absent,
}

/// Tells the planner whether a chunk is here, under way or absent.
pub type Look<'a> = &'a dyn Fn(ChunkKey) -> Presence;

/// Hands the bytes of a chunk to the closure if it is in memory; false if it is not.
pub type Peek<'a> = &'a dyn Fn(ChunkKey, &mut dyn FnMut(&[u8])) -> bool;

/// The planner of one fetcher: pure state, without I/O. See the module.
#[derive(Debug)]
pub struct Planner {
    layers: Layers,
    /// Before all hints: what earlier starts read.
    profile: ProfileHint,
    /// The most urgent first.
    hints: Vec<Box<dyn Hint>>,
    precision: Precision,
    seen: Seen,
}

impl Planner {
    /// A planner for layers of `sizes` bytes, which counts in `counts` how good its guesses are.
    #[must_use]
    pub fn new(
        files: Option<Arc<dyn FileMap>>,
        sizes: Vec<u64>,
        options: PlanOptions,
        counts: Arc<HintCounts>,
    ) -> Self {
        Self {
            precision: Precision::new(sizes.len(), counts),
            layers: Layers::new(files, sizes, options),
            profile: ProfileHint::default(),
            hints: vec![
                Box::<Surroundings>::default(),
                Box::<Programs>::default(),
                Box::<Archives>::default(),
                Box::<Sequential>::default(),
                Box::<Neighbours>::default(),
            ],
            seen: Seen::default(),
        }
    }

    /// The link is like this now.
    pub fn set_link(&mut self, link: LinkEstimate) {
        self.layers.link = link;
    }

    /// Follows what most starts of the image read: `ranges`, in the order in which they did.
    pub fn follow_profile(&mut self, ranges: &[ChunkRange]) {
        self.profile.follow(ranges);
    }

    /// A reader waits for `range`. Appends to `now` what should be fetched at once: the range's chunks that are absent, and
    /// what belongs with them.
    pub fn miss(&mut self, layer: LayerId, range: TarRange, look: Look<'_>, now: &mut Vec<Planned>) {
        let wanted = ChunkRange::of(layer, range);
        // If all of it is on its way, what belongs with it was thought of when it was asked for.
        let waits = wanted.keys().any(|key| look(key) == Presence::Absent);
        if waits {
            now.push(Reason::Demand.of(wanted));
        }
        self.touch(layer, range, waits, look, now);
    }

    /// A reader found `range` here, and some of it for the first time. Appends to `now` like [`miss`](Self::miss).
    pub fn hit(&mut self, layer: LayerId, range: TarRange, look: Look<'_>, now: &mut Vec<Planned>) {
        self.touch(layer, range, false, look, now);
    }

    /// Tells all hints of a read.
    fn touch(&mut self, layer: LayerId, range: TarRange, waits: bool, look: Look<'_>, now: &mut Vec<Planned>) {
        self.precision.read(layer, range);
        let first = now.len();
        if self
            .profile
            .touched(ChunkRange::of(layer, range), waits, &self.layers, look, now)
        {
            return self.within_budget(now, first);
        }
        let files = self.layers.files.as_ref();
        let file = files.and_then(|files| files.file_at(layer, range.start));
        let touch = Touch {
            layer,
            range,
            file,
            is_first: file.is_some_and(|file| self.seen.first_time(file.file)),
            waits,
        };
        for hint in &mut self.hints {
            hint.touched(touch, &self.layers, look, now);
        }
        self.within_budget(now, first);
    }

    /// Takes out of `now`, from place `first` on, what its hint has no room for.
    fn within_budget(&self, now: &mut Vec<Planned>, first: usize) {
        let budgets = &self.layers.options.budgets;
        let new = now.split_off(first).into_iter();
        now.extend(new.filter(|want| self.precision.may(budgets, want.reason, want.chunks.layer)));
    }

    /// A chunk was asked for because a reader waits for it.
    pub fn demanded(&mut self) {
        self.precision.demanded();
    }

    /// A chunk was asked for, for this reason, before any reader asked.
    pub fn prefetched(&mut self, key: ChunkKey, reason: Reason) {
        self.precision.fetched(key, reason);
    }

    /// A chunk that was asked for before any reader asked did not come, or was read by another device's reader.
    pub fn not_fetched(&mut self, key: ChunkKey) {
        self.precision.forget(key);
    }

    /// The most likely absent range, at most `room` bytes, for a link that would otherwise be idle.
    pub fn next(&mut self, room: u64, look: Look<'_>) -> Option<Planned> {
        let most = u32::try_from((room / CHUNK_BYTES).max(1)).unwrap_or(u32::MAX);
        let options = &self.layers.options;
        let (gap, precision) = (options.gap_chunks, &self.precision);
        let may = |reason, layer| precision.may(&options.budgets, reason, layer);
        if let Some(found) = self.profile.next(most, &may, look) {
            return Some(found);
        }
        let mut found = Reason::ALL.iter().find_map(|reason| {
            let mut hints = self.hints.iter_mut();
            hints.find_map(|hint| hint.wishes().take(*reason, most, gap, &may, look))
        })?;
        // What several hints want close together is one request.
        while self
            .hints
            .iter_mut()
            .any(|hint| hint.wishes().grow(&mut found.chunks, most, gap, &may, look))
        {}
        Some(found)
    }

    /// A chunk has come; `peek` shows it and others. Appends to `now` what it says will be read next: that is no guess, and
    /// is fetched like demand.
    pub fn arrived(&mut self, key: ChunkKey, peek: Peek<'_>, now: &mut Vec<Planned>) {
        self.look_inside(Some(key), peek, now);
    }

    /// The same for what was touched and had come before.
    pub fn touched(&mut self, peek: Peek<'_>, now: &mut Vec<Planned>) {
        self.look_inside(None, peek, now);
    }

    fn look_inside(&mut self, came: Option<ChunkKey>, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let first = now.len();
        for hint in &mut self.hints {
            hint.look_inside(came, &self.layers, peek, now);
        }
        self.within_budget(now, first);
    }
}

/// Which files were touched: a bit each.
#[derive(Debug, Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Whether it is the first time that this is asked of `file`.
    fn first_time(&mut self, FileId(file): FileId) -> bool {
        let (word, bit) = (crate::units::len_usize(u64::from(file / 64)), 1 << (file % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let first = self.0[word] & bit == 0;
        self.0[word] |= bit;
        first
    }
}

#[cfg(test)]
mod tests;
