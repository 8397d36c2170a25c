//! What a hint is: one way to guess what will be read next. In: what readers touch, and chunks as they come. Out: ranges of chunks
//! that it would have fetched.
//!
//! A hint decides nothing: the planner asks them in the order of their urgency, and gives each what its budget allows, which
//! [`precision`](super::precision) measures. To add one: a [`Reason`](super::Reason) of its own, a budget in
//! [`Budgets`](super::Budgets), and its place in the planner's list.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::options::PlanOptions;
use super::reason::Planned;
use super::wishes::Wishes;
use super::{Look, Peek};
use crate::cache::chunk::ChunkKey;
use crate::image::{FileMap, StoredFile};
use crate::units::{LayerId, TarRange};

/// A read, as hints are told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Touch {
    /// The layer that is read.
    pub(super) layer: LayerId,
    /// What of it.
    pub(super) range: TarRange,
    /// The file in which it begins, if that is known.
    pub(super) file: Option<StoredFile>,
    /// Whether nothing of that file was read before.
    pub(super) is_first: bool,
    /// Whether its reader waits for chunks that have to be fetched.
    pub(super) waits: bool,
}

/// The link to where the layers are, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkEstimate {
    /// The shortest recent round trip.
    pub round_trip: Option<Duration>,
    /// The highest recent rate in bytes a second.
    pub rate: Option<u64>,
}

impl LinkEstimate {
    /// Until it is known: 20 ms, 200 Mbit/s.
    const USUAL: (Duration, u64) = (Duration::from_millis(20), 25_000_000);

    /// The bytes that come in one round trip.
    #[must_use]
    pub fn held(self) -> u64 {
        let micros = self.round_trip.unwrap_or(Self::USUAL.0).as_micros();
        let rate = self.rate.unwrap_or(Self::USUAL.1);
        u64::try_from(micros).unwrap_or(u64::MAX).saturating_mul(rate) / 1_000_000
    }
}

/// What hints know of the layers. They see it, and change nothing there.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    /// The files; none where only blocks are known.
    pub(super) files: Option<Arc<dyn FileMap>>,
    /// Each layer's length in bytes.
    sizes: Vec<u64>,
    pub(super) options: PlanOptions,
    pub(super) link: LinkEstimate,
}

impl Layers {
    pub(super) fn new(files: Option<Arc<dyn FileMap>>, sizes: Vec<u64>, options: PlanOptions) -> Self {
        Self {
            files,
            sizes,
            options,
            link: LinkEstimate::default(),
        }
    }

    /// All of a layer.
    pub(super) fn whole(&self, layer: LayerId) -> TarRange {
        let size = usize::try_from(layer.0).ok().and_then(|at| self.sizes.get(at));
        TarRange::new(crate::units::TarOffset(0), size.copied().unwrap_or(0))
    }
}

/// One way to guess what will be read next; see the module.
pub(super) trait Hint: fmt::Debug {
    /// A reader got or waits for a range, and some of it for the first time. Appends to `now` what should be fetched together
    /// with what the reader waits for.
    fn touched(&mut self, touch: Touch, layers: &Layers, look: Look<'_>, now: &mut Vec<Planned>);

    /// A chunk has come, or with none what was touched may have been here before: `peek` shows what is in memory. Appends to `now`
    /// what is as certain as if a reader waited for it.
    fn look_inside(&mut self, _came: Option<ChunkKey>, _layers: &Layers, _peek: Peek<'_>, _now: &mut Vec<Planned>) {}

    /// What it would have fetched, the most likely first.
    fn wishes(&mut self) -> &mut Wishes;
}
