//! What earlier starts read, fetched ahead of this one's reader. In: ranges in the order in which they were read, and what this reader
//! touches. Out: few large ranges to fetch, in that order; whether other guesses are needless; and when it is given up.
//!
//! It knows better than any other hint: where it covers what a reader touches, the others are not asked. How far it runs ahead of the
//! reader is its budget's to say, which grows with what is read of it. A reader who turns out to read other things than it says silences
//! it for good.

use std::collections::HashSet;

use super::chunks::ChunkRange;
use super::hint::Layers;
use super::reason::{Planned, Reason};
use super::wishes::{May, Wishes};
use super::{Look, Presence};
use crate::cache::chunk::ChunkKey;
use crate::units::{CHUNK_BYTES, LayerId, len_u64};

/// What is read within so many bytes of it is fetched in the order of place: long ranges are worth more than the exact order.
const BATCH_BYTES: u64 = 2 << 20;
/// Ranges with at most so many chunks between them are one request. Other hints bridge more: what lies between theirs may be read as well.
const GAP_CHUNKS: u32 = 1;
/// Whether it fits is judged whenever a reader has touched so many bytes for the first time...
const JUDGED_BYTES: u64 = 2 << 20;
/// ...and it does not if less than this percentage of them is in it...
const LEAST_PERCENT: u64 = 25;
/// ...or if of what is in it more than this percentage was not even asked for when the reader came: it says what is read, and not when.
const MOST_LATE_PERCENT: u64 = 75;

/// A profile that is followed; see the module. The default knows nothing.
#[derive(Debug, Default)]
pub(super) struct ProfileHint {
    /// All chunks that are in it.
    expected: HashSet<ChunkKey>,
    /// What of it is to be fetched, in order.
    wishes: Wishes,
    /// What was touched since it was last judged.
    touched: Touched,
}

/// Chunks that readers touched.
#[derive(Debug, Default)]
struct Touched {
    chunks: HashSet<ChunkKey>,
    /// How many of them are in the profile.
    expected: u64,
    /// How many of those had not been asked for.
    late: u64,
}

impl ProfileHint {
    /// Follows these ranges, which are in the order in which they will be read.
    pub(super) fn follow(&mut self, ranges: &[ChunkRange]) {
        *self = Self::default();
        self.expected.extend(ranges.iter().flat_map(|range| range.keys()));
        let mut batch: Vec<ChunkRange> = Vec::new();
        let mut bytes = 0;
        for range in ranges {
            batch.push(*range);
            bytes += range.bytes();
            if bytes >= BATCH_BYTES {
                self.push(&mut batch);
                bytes = 0;
            }
        }
        self.push(&mut batch);
    }

    fn push(&mut self, batch: &mut Vec<ChunkRange>) {
        batch.sort_unstable();
        for range in batch.drain(..) {
            self.wishes.push_back(Reason::Profile.of(range));
        }
    }

    /// A reader touches a range; says whether all of it is in the profile, so that nobody else need be asked what comes next. Appends to
    /// `now` what should be fetched together with what the reader waits for.
    pub(super) fn touched(
        &mut self,
        chunks: ChunkRange,
        waits: bool,
        layers: &Layers,
        look: Look<'_>,
        now: &mut Vec<Planned>,
    ) -> bool {
        if self.expected.is_empty() {
            return false;
        }
        self.judge(chunks, waits);
        let covers = !chunks.is_empty() && chunks.keys().all(|key| self.expected.contains(&key));
        if covers && waits {
            let most = u32::try_from(layers.options.demand_bytes / CHUNK_BYTES).unwrap_or(u32::MAX);
            now.push(Reason::Profile.of(self.around(chunks, most, look)));
        }
        covers
    }

    /// Counts what is touched, and gives the profile up where it does not fit.
    fn judge(&mut self, chunks: ChunkRange, waits: bool) {
        for key in chunks.keys() {
            if self.touched.chunks.insert(key) && self.expected.contains(&key) {
                self.touched.expected += 1;
                self.touched.late += u64::from(waits);
            }
        }
        let touched = len_u64(self.touched.chunks.len());
        if touched < JUDGED_BYTES / CHUNK_BYTES {
            return;
        }
        let Touched { expected, late, .. } = std::mem::take(&mut self.touched);
        if expected * 100 < touched * LEAST_PERCENT || late * 100 > expected * MOST_LATE_PERCENT {
            log::info!(
                "of {touched} chunks that were read {expected} are in the profile, and {late} of these had not been asked for: it is not \
                 followed any more"
            );
            *self = Self::default();
        }
    }

    /// What of the profile lies around `wanted` and is absent, at most `most` chunks: one request instead of several.
    fn around(&self, wanted: ChunkRange, most: u32, look: Look<'_>) -> ChunkRange {
        let is_wanted = |layer: LayerId, index: u32| {
            let key = ChunkKey { layer, index };
            self.expected.contains(&key) && look(key) == Presence::Absent
        };
        let mut all = wanted;
        while all.count() < most && is_wanted(all.layer, all.end) {
            all.end += 1;
        }
        while all.count() < most && all.first > 0 && is_wanted(all.layer, all.first - 1) {
            all.first -= 1;
        }
        all
    }

    /// The next of it that is absent, at most `most` chunks.
    pub(super) fn next(&mut self, most: u32, may: May<'_>, look: Look<'_>) -> Option<Planned> {
        self.wishes.take(Reason::Profile, most, GAP_CHUNKS, may, look)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::prefetch::PlanOptions;

    fn range(first: u32, end: u32) -> ChunkRange {
        ChunkRange {
            layer: LayerId(0),
            first,
            end,
        }
    }

    fn layers() -> Layers {
        Layers::new(None, vec![1 << 30], PlanOptions::default())
    }

    fn always(_: Reason, _: LayerId) -> bool {
        true
    }

    /// Everything that it would have fetched, if each range came before the next is asked for.
    fn all(hint: &mut ProfileHint, most: u32) -> Vec<(u32, u32)> {
        let here: RefCell<HashSet<ChunkKey>> = RefCell::default();
        let mut found = Vec::new();
        loop {
            let look = |key: ChunkKey| {
                if here.borrow().contains(&key) {
                    Presence::Here
                } else {
                    Presence::Absent
                }
            };
            let Some(next) = hint.next(most, &always, &look) else {
                return found;
            };
            assert_eq!(next.reason, Reason::Profile);
            here.borrow_mut().extend(next.chunks.keys());
            found.push((next.chunks.first, next.chunks.end));
        }
    }

    #[test]
    fn what_is_read_close_together_is_fetched_in_long_ranges() {
        let mut hint = ProfileHint::default();
        hint.follow(&[range(40, 42), range(10, 12), range(13, 14), range(8, 9), range(42, 44)]);
        // One chunk between two ranges is bridged, more are not.
        assert_eq!(all(&mut hint, 100), [(8, 14), (40, 44)]);
        hint.follow(&[range(0, 10)]);
        assert_eq!(all(&mut hint, 4), [(0, 4), (4, 8), (8, 10)]);
    }

    #[test]
    fn what_is_read_later_is_fetched_later() {
        let mut hint = ProfileHint::default();
        let batch = u32::try_from(BATCH_BYTES / CHUNK_BYTES).unwrap();
        hint.follow(&[range(1000, 1000 + batch), range(5, 6)]);
        assert_eq!(all(&mut hint, 1000), [(1000, 1000 + batch), (5, 6)]);
    }

    #[test]
    fn nobody_else_is_asked_where_it_knows() {
        let (mut hint, layers) = (ProfileHint::default(), layers());
        let absent = |_: ChunkKey| Presence::Absent;
        let mut now = Vec::new();
        assert!(!hint.touched(range(0, 1), true, &layers, &absent, &mut now));
        hint.follow(&[range(4, 8), range(20, 21)]);
        assert!(!hint.touched(range(3, 5), true, &layers, &absent, &mut now) && now.is_empty());
        assert!(hint.touched(range(5, 6), true, &layers, &absent, &mut now));
        assert_eq!(
            now,
            [Reason::Profile.of(range(4, 8))],
            "what the reader waits for, and what lies beside it"
        );
        assert!(hint.touched(range(20, 21), false, &layers, &absent, &mut now) && now.len() == 1);
    }

    fn read(hint: &mut ProfileHint, chunks: ChunkRange, waits: bool) -> bool {
        hint.touched(chunks, waits, &layers(), &|_| Presence::Absent, &mut Vec::new())
    }

    #[test]
    fn who_reads_other_things_silences_it() {
        let absent = |_: ChunkKey| Presence::Absent;
        let mut hint = ProfileHint::default();
        hint.follow(&[range(0, 100)]);
        assert!(read(&mut hint, range(0, 15), false));
        assert!(!read(&mut hint, range(1000, 1049), false));
        assert_eq!(hint.next(1, &always, &absent), None);
        assert!(!read(&mut hint, range(0, 15), false));
        // A quarter is enough.
        hint.follow(&[range(0, 100)]);
        assert!(read(&mut hint, range(0, 16), false));
        assert!(!read(&mut hint, range(1000, 1048), false));
        assert!(hint.next(1, &always, &absent).is_some());
    }

    #[test]
    fn who_reads_it_in_another_order_silences_it() {
        let absent = |_: ChunkKey| Presence::Absent;
        let mut hint = ProfileHint::default();
        hint.follow(&[range(0, 1000)]);
        // What is late, is at its beginning.
        for chunk in 0..64 {
            assert!(read(&mut hint, range(chunk, chunk + 1), chunk < 40));
        }
        for chunk in 64..128 {
            assert!(hint.next(1, &always, &absent).is_some());
            read(&mut hint, range(chunk, chunk + 1), true);
        }
        assert_eq!(hint.next(1, &always, &absent), None);
        assert!(!read(&mut hint, range(500, 501), true));
    }
}
