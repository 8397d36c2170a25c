use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use proptest::prelude::*;

use super::wishes::Wishes;
use super::*;
use crate::image::{DirectoryId, StoredFile};
use crate::units::TarOffset;

const LAYER: LayerId = LayerId(0);
const CHUNK: u64 = CHUNK_BYTES;

/// Files back to back; all in one directory.
#[derive(Debug)]
struct Row(Vec<(u64, u64)>);

impl Row {
    fn of(sizes: &[u64]) -> Arc<Self> {
        let mut at = 0;
        let place = |size: &u64| {
            at += size;
            (at - size, *size)
        };
        Arc::new(Self(sizes.iter().map(place).collect()))
    }

    fn stored(&self, number: usize) -> StoredFile {
        let (start, len) = self.0[number];
        let file = FileId(u32::try_from(number).unwrap());
        StoredFile {
            file,
            directory: DirectoryId(0),
            layer: LAYER,
            range: TarRange::new(TarOffset(start), len),
        }
    }

    fn end(&self) -> u64 {
        self.0.last().map_or(0, |(start, len)| start + len)
    }
}

impl FileMap for Row {
    fn file_at(&self, _: LayerId, at: TarOffset) -> Option<StoredFile> {
        (0..self.0.len())
            .map(|number| self.stored(number))
            .find(|file| file.range.contains(at))
    }

    fn resolve(&self, _: DirectoryId, _: &[u8]) -> Option<StoredFile> {
        None
    }

    fn path(&self, _: FileId) -> Option<Vec<u8>> {
        None
    }

    fn neighbours(&self, file: FileId, visit: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {
        let here = usize::try_from(file.0).unwrap();
        for number in (here + 1..self.0.len()).chain(0..here) {
            if visit(self.stored(number)).is_break() {
                return;
            }
        }
    }
}

fn planner_of(row: &Arc<Row>) -> Planner {
    let counts = Arc::new(HintCounts::new(1));
    Planner::new(Some(row.clone()), vec![row.end()], PlanOptions::default(), counts)
}

/// A planner whose every wish comes true at once.
struct World {
    planner: Planner,
    here: RefCell<HashSet<ChunkKey>>,
}

impl World {
    fn new(row: &Arc<Row>) -> Self {
        Self {
            planner: planner_of(row),
            here: RefCell::default(),
        }
    }

    /// Reads and returns the chunks fetched for it, in the demand's flights.
    fn read(&mut self, start: u64, len: u64) -> Vec<u32> {
        let (range, mut now) = (TarRange::new(TarOffset(start), len), Vec::new());
        let here = self.here.borrow().clone();
        let look = |key| {
            if here.contains(&key) {
                Presence::Here
            } else {
                Presence::Absent
            }
        };
        if ChunkRange::of(LAYER, range).keys().all(|key| here.contains(&key)) {
            self.planner.hit(LAYER, range, &look, &mut now);
        } else {
            self.planner.miss(LAYER, range, &look, &mut now);
        }
        let flights = merge(&now, 2, 128, &look);
        for flight in &flights {
            for key in flight.chunks().keys() {
                match flight.reason(key.index) {
                    Reason::Demand => self.planner.demanded(),
                    reason => self.planner.prefetched(key, reason),
                }
            }
        }
        let keys: Vec<ChunkKey> = flights.iter().flat_map(|flight| flight.chunks().keys()).collect();
        self.here.borrow_mut().extend(&keys);
        keys.iter().map(|key| key.index).collect()
    }

    fn is_here(&self, index: u64) -> bool {
        let index = u32::try_from(index).unwrap();
        self.here.borrow().contains(&ChunkKey { layer: LAYER, index })
    }

    /// Fetches what is next until nothing is.
    fn idle(&mut self) -> Vec<u32> {
        let mut all = Vec::new();
        loop {
            let here = self.here.borrow().clone();
            let look = |key| {
                if here.contains(&key) {
                    Presence::Here
                } else {
                    Presence::Absent
                }
            };
            let Some(Planned { chunks: next, reason }) = self.planner.next(1 << 20, &look) else {
                return all;
            };
            assert!(next.bytes() <= 1 << 20);
            next.keys().for_each(|key| self.planner.prefetched(key, reason));
            all.extend(next.first..next.end);
            self.here.borrow_mut().extend(next.keys());
        }
    }
}

#[test]
fn a_small_file_comes_whole_with_its_first_touch() {
    let row = Row::of(&[10 * CHUNK, 8 * CHUNK, 10 * CHUNK]);
    let mut world = World::new(&row);
    assert_eq!(world.read(12 * CHUNK, 4096), (10..18).collect::<Vec<u32>>());
}

#[test]
fn neighbours_follow_nearest_first_and_within_bounds() {
    let row = Row::of(&[CHUNK; 100]);
    let mut world = World::new(&row);
    assert_eq!(world.read(40 * CHUNK, 4096), [40]);
    let next = world.idle();
    assert_eq!(next[..2], [41, 42]);
    assert!(next.len() <= 4, "{} chunks for one that was read", next.len());
    for file in 41..50 {
        world.read(file * CHUNK, 4096);
    }
    assert!(world.idle().len() > next.len(), "who reads more earns more");
}

#[test]
fn a_big_file_is_not_fetched_whole_for_one_touch() {
    let row = Row::of(&[1000 * CHUNK]);
    let mut world = World::new(&row);
    let fetched = world.read(500 * CHUNK, 4096);
    assert!(fetched.contains(&500) && fetched.len() <= 16, "{fetched:?}");
    // Little is read of the windows: they stay as they are. Of others most is read, a chunk here and a chunk there: they grow.
    let lonely: Vec<usize> = (1..5)
        .map(|n| world.read((100 * n) * CHUNK, 4096).len() + world.idle().len())
        .collect();
    assert!(lonely.iter().all(|width| *width <= 16), "{lonely:?}");
    let row = Row::of(&[1000 * CHUNK]);
    let mut world = World::new(&row);
    let widths: Vec<usize> = (1..6)
        .map(|n| {
            let width = world.read((160 * n) * CHUNK, 4096).len() + world.idle().len();
            for chunk in (0..64).step_by(2) {
                if world.is_here(160 * n + chunk) {
                    world.read((160 * n + chunk) * CHUNK, 4096);
                }
            }
            width
        })
        .collect();
    assert!(
        widths[2] > widths[0] && widths[4] > widths[2] && widths[4] <= 64,
        "{widths:?}"
    );
}

/// Next door a window costs more than the wait that it saves; far away on a wide link it is soon paid for.
#[test]
fn surroundings_are_as_wide_as_the_link_makes_them_pay() {
    let width = |micros, mbit: u64| {
        let row = Row::of(&[1000 * CHUNK]);
        let mut world = World::new(&row);
        world.planner.set_link(LinkEstimate {
            round_trip: Some(std::time::Duration::from_micros(micros)),
            rate: Some(mbit * 125_000),
        });
        world.read(500 * CHUNK, 4096).len() + world.idle().len()
    };
    assert_eq!(width(100, 1000), 1, "what is read and nothing else");
    assert_eq!(width(1000, 1000), 2);
    assert!(width(20_000, 1000) >= 32, "{}", width(20_000, 1000));
}

#[test]
fn a_sequential_reader_finds_what_it_needs() {
    let row = Row::of(&[4000 * CHUNK]);
    let mut world = World::new(&row);
    let waits = (0..4000 / 4).filter(|n| {
        let waited = !world.read(n * 4 * CHUNK, 4 * CHUNK).is_empty();
        world.idle();
        waited
    });
    let waits = waits.count();
    assert!(waits <= 8, "{waits} waits");
}

#[test]
fn it_works_without_knowing_files() {
    let counts = Arc::new(HintCounts::new(1));
    let mut planner = Planner::new(None, vec![1000 * CHUNK], PlanOptions::default(), counts);
    let mut now = Vec::new();
    for n in 0..4 {
        let range = TarRange::new(TarOffset(n * 4 * CHUNK), 4 * CHUNK);
        planner.miss(LAYER, range, &|_| Presence::Absent, &mut now);
    }
    let next = planner
        .next(1 << 20, &|key| {
            if key.index < 16 {
                Presence::Here
            } else {
                Presence::Absent
            }
        })
        .unwrap();
    assert_eq!((next.chunks.first, next.reason), (16, Reason::Ahead));
}

#[test]
fn what_nobody_reads_ends_the_guessing() {
    let row = Row::of(&vec![2 * CHUNK; 5000]);
    let mut world = World::new(&row);
    let mut guessed = 0;
    for n in 0..100u64 {
        let fetched = world.read((n * 7919) % 5000 * 2 * CHUNK, 4096).len();
        guessed += world.idle().len();
        assert!(fetched <= 2);
    }
    let budget = PlanOptions::default().budgets.neighbour;
    let limit = budget.room(0, 100 * 2 * CHUNK) / CHUNK + 64;
    assert!(
        u64::try_from(guessed).unwrap() <= limit,
        "{guessed} chunks guessed, {limit} allowed"
    );
}

/// Reads behind a file's end only concern who has read the file.
#[test]
fn only_who_reads_whole_files_is_followed_into_the_next() {
    let row = Row::of(&vec![40 * CHUNK; 50]);
    let ahead = |from: u64| {
        let mut planner = planner_of(&row);
        for n in from..41 {
            let range = TarRange::new(TarOffset(n * CHUNK), CHUNK);
            planner.hit(LAYER, range, &|_| Presence::Absent, &mut Vec::new());
        }
        let wishes = planner.hints.iter_mut().flat_map(|hint| {
            let wishes = hint.wishes().iter().filter(|want| want.reason == Reason::Ahead);
            wishes.map(|want| want.chunks.end).collect::<Vec<_>>()
        });
        wishes.max()
    };
    assert!(ahead(0).unwrap() > 50, "{:?}", ahead(0));
    assert_eq!(ahead(20), Some(40));
}

/// What was wanted at different times and lies close together is one request, however it was wanted.
#[test]
fn wants_close_by_fly_together() {
    let stretch = |first, end| ChunkRange {
        layer: LAYER,
        first,
        end,
    };
    let all = [(50, 52), (10, 12), (49, 50), (54, 55), (80, 81), (40, 44)];
    let mut wishes = Wishes::default();
    for (first, end) in all {
        wishes.push_back(Reason::Import.of(stretch(first, end)));
    }
    let look = |key: ChunkKey| {
        if key.index == 45 {
            Presence::Coming
        } else {
            Presence::Absent
        }
    };
    let may = |_, _| true;
    let mut found = wishes.take(Reason::Import, 128, 4, &may, &look).unwrap().chunks;
    assert_eq!(found, stretch(50, 52));
    wishes.grow(&mut found, 128, 4, &may, &look);
    assert_eq!(found, stretch(49, 55), "not over what is coming, nor far away");
    let mut short = stretch(50, 52);
    assert!(wishes.grow(&mut short, 3, 4, &may, &look));
    assert_eq!(short, stretch(49, 52));
    assert!(!wishes.grow(&mut short, 3, 4, &may, &look));
}

/// Of a layer whose reader jumps about in a big file, surroundings are soon no longer fetched; elsewhere they still are.
#[test]
fn a_hint_that_guesses_badly_falls_silent_for_that_layer() {
    let files = Row::of(&[100_000 * CHUNK]);
    let counts = Arc::new(HintCounts::new(2));
    let sizes = vec![files.end(); 2];
    let mut planner = Planner::new(Some(files), sizes, PlanOptions::default(), counts.clone());
    let mut touch = |layer: LayerId, n: u64| {
        let (range, mut now) = (TarRange::new(TarOffset(n * 7919 % 100_000 * CHUNK), 4096), Vec::new());
        planner.miss(layer, range, &|_| Presence::Absent, &mut now);
        let flights = merge(&now, 0, 128, &|_| Presence::Absent);
        for flight in &flights {
            for key in flight.chunks().keys() {
                match flight.reason(key.index) {
                    Reason::Demand => planner.demanded(),
                    reason => planner.prefetched(key, reason),
                }
            }
        }
        flights.iter().map(|flight| flight.chunks().count()).sum::<u32>()
    };
    let first = touch(LayerId(0), 1);
    let all: u32 = (2..3000).map(|n| touch(LayerId(0), n)).sum();
    let budget = PlanOptions::default().budgets.rest;
    let guessed = u64::from(first + all - 2999) * CHUNK;
    let limit = budget.room(0, 2999 * CHUNK) + PlanOptions::default().widest_touch_bytes;
    assert!(guessed <= limit, "{guessed} bytes guessed, {limit} allowed");
    let counted = |layer| {
        let all = counts.snapshot().into_iter();
        all.filter(|count| count.layer == layer && count.reason == Reason::Rest)
            .map(|count| (count.fetched, count.read, count.silenced))
            .collect::<Vec<_>>()
    };
    assert_eq!(counted(LayerId(0)), [(guessed, 0, true)]);
    assert!(touch(LayerId(1), 2) > 1);
    assert!(matches!(counted(LayerId(1))[..], [(_, 0, false)]));
}

proptest! {
    /// Against a plain model: every absent wanted chunk flies exactly once, nothing that is coming flies again, flights are
    /// in order, no longer than allowed, and bridge only small gaps.
    #[test]
    fn merging(
        wanted in prop::collection::vec((0u32..2, 0u32..200, 0u32..12), 0..20),
        here in prop::collection::hash_set((0u32..2, 0u32..220), 0..100),
        coming in prop::collection::hash_set((0u32..2, 0u32..220), 0..60),
        gap in 0u32..4,
        longest in 1u32..40,
    ) {
        let look = |key: ChunkKey| {
            let plain = (key.layer.0, key.index);
            if coming.contains(&plain) {
                Presence::Coming
            } else if here.contains(&plain) {
                Presence::Here
            } else {
                Presence::Absent
            }
        };
        let wants: Vec<Planned> = wanted
            .iter()
            .map(|(layer, first, count)| ChunkRange { layer: LayerId(*layer), first: *first, end: first + count })
            .map(|stretch| Reason::Rest.of(stretch))
            .collect();
        let model: BTreeSet<ChunkKey> =
            wants.iter().flat_map(|want| want.chunks.keys()).filter(|key| look(*key) == Presence::Absent).collect();
        let flights = merge(&wants, gap, longest, &look);
        let flown: Vec<ChunkKey> = flights.iter().flat_map(|flight| flight.chunks().keys()).collect();
        let once: BTreeSet<ChunkKey> = flown.iter().copied().collect();
        prop_assert_eq!(flown.len(), once.len());
        prop_assert!(model.is_subset(&once));
        prop_assert!(once.iter().all(|key| look(*key) != Presence::Coming));
        for planned in &flights {
            let flight = planned.chunks();
            prop_assert!(flight.count() <= longest && !flight.is_empty());
            let useful = |index| model.contains(&ChunkKey { layer: flight.layer, index });
            prop_assert!(useful(flight.first) && useful(flight.end - 1));
            let mut since = 0;
            for index in flight.first..flight.end {
                prop_assert_eq!(planned.reason(index) == Reason::Between, !useful(index));
                since = if useful(index) { 0 } else { since + 1 };
                prop_assert!(since <= gap);
            }
        }
    }
}
