//! Requests made of what is wanted. In: ranges, each with its reason. Out: as few requests as can bring them.

use super::chunks::ChunkRange;
use super::reason::{Planned, Reason};
use super::wishes::may_bridge;
use super::{Look, Presence};
use crate::cache::chunk::ChunkKey;

/// Chunks that one request is to bring, and why each of them comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFlight {
    chunks: ChunkRange,
    /// Of each chunk.
    reasons: Vec<Reason>,
}

impl PlannedFlight {
    /// The chunks.
    #[must_use]
    pub const fn chunks(&self) -> ChunkRange {
        self.chunks
    }

    /// Why chunk `index` comes.
    #[must_use]
    pub fn reason(&self, index: u32) -> Reason {
        let place = index.checked_sub(self.chunks.first).map(crate::units::to_usize);
        let reason = place.and_then(|place| self.reasons.get(place));
        reason.copied().unwrap_or(Reason::Between)
    }

    fn push(&mut self, index: u32, reason: Reason) {
        let len = crate::units::to_usize(index - self.chunks.first);
        self.reasons.resize(len, Reason::Between);
        self.reasons.push(reason);
        self.chunks.end = index + 1;
    }
}

impl From<Planned> for PlannedFlight {
    fn from(Planned { chunks, reason }: Planned) -> Self {
        let reasons = vec![reason; crate::units::to_usize(chunks.count())];
        Self { chunks, reasons }
    }
}

/// Puts the absent chunks of `wanted` together to flights: neighbours over gaps of up to `gap` chunks, none longer than
/// `longest`. A chunk that is wanted for several reasons comes for the most urgent.
#[must_use]
pub fn merge(wanted: &[Planned], gap: u32, longest: u32, look: Look<'_>) -> Vec<PlannedFlight> {
    let mut keys: Vec<(ChunkKey, Reason)> = wanted
        .iter()
        .flat_map(|want| want.chunks.keys().map(|key| (key, want.reason)))
        .filter(|(key, _)| look(*key) == Presence::Absent)
        .collect();
    keys.sort_unstable();
    keys.dedup_by_key(|(key, _)| *key);
    let mut flights: Vec<PlannedFlight> = Vec::new();
    for (key, reason) in keys {
        match flights.last_mut() {
            Some(flight)
                if flight.chunks.layer == key.layer
                    && key.index - flight.chunks.end <= gap
                    && key.index - flight.chunks.first < longest
                    && may_bridge(key.layer, flight.chunks.end, key.index, look) =>
            {
                flight.push(key.index, reason);
            }
            _ => flights.push(reason.of(key.into()).into()),
        }
    }
    flights
}
