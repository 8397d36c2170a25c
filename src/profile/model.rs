//! What several starts read, in one. In: runs, one after the other. Out: for each chunk when it is wanted and how likely, coalesced into
//! ranges.
//!
//! Each chunk has a score, which every run ages and every run that touches the chunk raises ([`Weight`]): so the last few runs count
//! most, what all of them touched has the score that is possible, and what is not touched any more goes after a few runs.

use std::collections::BTreeMap;

use super::{ProfileKey, StartRun};
use crate::cache::chunk::{ChunkKey, chunk_count};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, len_u64};

/// How much a run counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weight {
    /// A score loses this part of it with every run: one of so many...
    ages: u32,
    /// ...and gains so much if the run touched its chunk.
    touched: u32,
}

/// A run of a program like those before.
const FULL: Weight = Weight { ages: 4, touched: 64 };
/// A run that read little of what the others did: somebody who only looked into the image, or another program.
const SMALL: Weight = Weight { ages: 16, touched: 16 };
/// A run is small when it read less than one part of so many of what the others did.
const SMALL_PART: u64 = 4;
/// The highest score.
const MOST_SCORE: u32 = 255;
/// A chunk whose score is so many times smaller than the possible one is forgotten.
const FORGOTTEN: u32 = 8;
/// More entries than this are in no profile: of what is too much the unlikely goes first, then the latest.
pub const MOST_ENTRIES: usize = 4096;
/// More chunks than this, 2 GiB of them, are in no profile: the same goes first.
pub(super) const MOST_CHUNKS: u64 = 64 << 10;
/// More layers than this are in no profile.
pub(super) const MOST_LAYERS: usize = 512;
/// Touches as close as this are one entry, when their chunks lie beside each other.
const SAME_MOMENT_MS: u32 = 50;

/// A layer of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfiledLayer {
    /// Which it is.
    pub key: ProfileKey,
    /// Its tar's length in bytes.
    pub size: u64,
}

/// A range of chunks, when it is wanted, and how likely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileEntry {
    /// When it was first touched in the last run that did: milliseconds since the run's first read.
    pub at_ms: u32,
    /// The chunks; their layer is a number in the profile's own list of layers.
    pub chunks: ChunkRange,
    /// The score of each of them.
    pub score: u8,
}

/// What earlier starts read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The layers that its entries are of, the lowest first.
    pub(super) layers: Vec<ProfiledLayer>,
    /// How many runs it was learned from.
    pub(super) runs: u32,
    /// The score of a chunk that all of them touched.
    pub(super) possible: u8,
    /// In the order of time.
    pub(super) entries: Vec<ProfileEntry>,
}

impl Weight {
    /// A chunk's score after a run.
    fn apply(self, score: u32, touched: bool) -> u32 {
        let gain = if touched { self.touched } else { 0 };
        (score - score / self.ages + gain).min(MOST_SCORE)
    }
}

impl Profile {
    /// A profile that has learned nothing, of these layers.
    #[must_use]
    pub fn new(layers: Vec<ProfiledLayer>) -> Self {
        Self {
            layers,
            runs: 0,
            possible: 0,
            entries: Vec::new(),
        }
    }

    /// Its layers.
    #[must_use]
    pub fn layers(&self) -> &[ProfiledLayer] {
        &self.layers
    }

    /// How many runs it was learned from.
    #[must_use]
    pub const fn runs(&self) -> u32 {
        self.runs
    }

    /// Its entries, in the order of time.
    #[must_use]
    pub fn entries(&self) -> &[ProfileEntry] {
        &self.entries
    }

    /// How likely an entry is read, in hundredths: how much of its possible score it has.
    #[must_use]
    pub fn percent(&self, entry: &ProfileEntry) -> u32 {
        (u32::from(entry.score) * 100 / u32::from(self.possible).max(1)).min(100)
    }

    /// Learns from another run, whose layers are numbered as this profile's.
    pub fn learn(&mut self, run: &StartRun) {
        let weight = if self.is_small(run) { SMALL } else { FULL };
        let mut chunks: BTreeMap<ChunkKey, (u32, u32)> = BTreeMap::new();
        for entry in &self.entries {
            for key in entry.chunks.keys() {
                chunks.insert(key, (entry.at_ms, weight.apply(entry.score.into(), false)));
            }
        }
        for touch in run.touches() {
            if self.holds(touch.key) {
                let (at_ms, score) = chunks.entry(touch.key).or_default();
                (*at_ms, *score) = (touch.at_ms, (*score + weight.touched).min(MOST_SCORE));
            }
        }
        self.runs = self.runs.saturating_add(1);
        let possible = weight.apply(self.possible.into(), true);
        self.possible = score(possible);
        let kept = chunks
            .into_iter()
            .filter(|(_, (_, score))| *score * FORGOTTEN >= possible);
        let entries = kept.map(|(key, (at_ms, of_chunk))| ProfileEntry {
            at_ms,
            chunks: key.into(),
            score: score(of_chunk),
        });
        self.entries = coalesced(entries);
        self.limit_to(MOST_ENTRIES);
    }

    /// Whether a run read little, measured by what is likely.
    #[must_use]
    pub fn is_small(&self, run: &StartRun) -> bool {
        let likely = self.entries.iter().filter(|entry| self.is_likely(entry));
        let likely: u64 = likely.map(|entry| u64::from(entry.chunks.count())).sum();
        len_u64(run.touches().len()).saturating_mul(SMALL_PART) < likely
    }

    /// Whether most of the last runs read an entry's chunks.
    fn is_likely(&self, entry: &ProfileEntry) -> bool {
        2 * u32::from(entry.score) >= u32::from(self.possible)
    }

    /// Whether a chunk lies in one of its layers.
    fn holds(&self, key: ChunkKey) -> bool {
        let layer = usize::try_from(key.layer.0).ok().and_then(|at| self.layers.get(at));
        layer.is_some_and(|layer| chunk_count(layer.size).is_some_and(|count| key.index < count))
    }

    /// Keeps `most` entries, and no more than `MOST_CHUNKS`: the likely ones, of equally likely ones the first.
    pub fn limit_to(&mut self, most: usize) {
        if self.entries.len() <= most && self.chunks() <= MOST_CHUNKS {
            return;
        }
        self.entries.sort_by_key(|entry| std::cmp::Reverse(entry.score));
        self.entries.truncate(most);
        let mut chunks = 0_u64;
        self.entries.retain(|entry| {
            chunks = chunks.saturating_add(entry.chunks.count().into());
            chunks <= MOST_CHUNKS
        });
        self.entries.sort_by_key(in_order);
    }

    /// How many chunks its entries hold.
    pub(super) fn chunks(&self) -> u64 {
        let chunks = self.entries.iter().map(|entry| u64::from(entry.chunks.count()));
        chunks.fold(0, u64::saturating_add)
    }

    /// What is worth fetching ahead, in order: what most of the last runs have read. Layers are numbered as `layers` says, and what is
    /// of none of them, or lies behind a layer's end, is left out.
    #[must_use]
    pub fn likely(&self, layers: &[ProfiledLayer]) -> Vec<ChunkRange> {
        self.likely_with_times(layers).map(|(_, chunks)| chunks).collect()
    }

    /// The same, each with its time in milliseconds.
    pub fn likely_with_times(&self, layers: &[ProfiledLayer]) -> impl Iterator<Item = (u32, ChunkRange)> {
        let number_of = |entry: &ProfileEntry| {
            let own = self.layers.get(usize::try_from(entry.chunks.layer.0).ok()?)?;
            let at = layers.iter().position(|layer| layer == own)?;
            Some((LayerId(u32::try_from(at).ok()?), chunk_count(own.size)?))
        };
        let likely = self.entries.iter().filter(|entry| self.is_likely(entry));
        likely.filter_map(move |entry| {
            let (layer, count) = number_of(entry)?;
            let (first, end) = (entry.chunks.first, entry.chunks.end.min(count));
            (first < end).then_some((entry.at_ms, ChunkRange { layer, first, end }))
        })
    }

    /// What it says of one of its layers alone.
    #[must_use]
    pub fn of_layer(&self, number: usize) -> Self {
        let id = u32::try_from(number).map_or(LayerId(u32::MAX), LayerId);
        let own = self.entries.iter().filter(|entry| entry.chunks.layer == id);
        Self {
            layers: self.layers.get(number).copied().into_iter().collect(),
            runs: self.runs,
            possible: self.possible,
            entries: own
                .map(|entry| ProfileEntry {
                    chunks: ChunkRange {
                        layer: LayerId(0),
                        ..entry.chunks
                    },
                    ..*entry
                })
                .collect(),
        }
    }

    /// Bytes of tar that its entries hold, as if no chunk were short.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.chunks().saturating_mul(CHUNK_BYTES)
    }

    /// How many entries it has.
    #[must_use]
    pub fn count(&self) -> u64 {
        len_u64(self.entries.len())
    }
}

/// A score as entries have it.
fn score(score: u32) -> u8 {
    u8::try_from(score).unwrap_or(u8::MAX)
}

/// The order of entries: by time, then by place.
pub(super) fn in_order(entry: &ProfileEntry) -> (u32, ChunkRange) {
    (entry.at_ms, entry.chunks)
}

/// Entries in order of their places become entries in order of time: those that lie beside each other, are equally likely and were touched
/// in the same moment, are one.
fn coalesced(entries: impl Iterator<Item = ProfileEntry>) -> Vec<ProfileEntry> {
    let mut all: Vec<ProfileEntry> = Vec::new();
    for entry in entries {
        match all.last_mut() {
            Some(last)
                if last.chunks.layer == entry.chunks.layer
                    && last.chunks.end == entry.chunks.first
                    && last.score == entry.score
                    && last.at_ms.abs_diff(entry.at_ms) <= SAME_MOMENT_MS =>
            {
                last.chunks.end = entry.chunks.end;
                last.at_ms = last.at_ms.min(entry.at_ms);
            }
            _ => all.push(entry),
        }
    }
    all.sort_by_key(in_order);
    all
}

#[cfg(test)]
pub(super) mod tests;
