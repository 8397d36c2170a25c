use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use proptest::prelude::*;

use super::*;
use crate::image::{DirectoryId, StoredFile};

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

/// A planner whose every wish comes true at once.
struct World {
    planner: Planner,
    here: RefCell<HashSet<ChunkKey>>,
}

impl World {
    fn new(row: &Arc<Row>) -> Self {
        let planner = Planner::new(Some(row.clone()), vec![row.end()], PlanOptions::default());
        Self {
            planner,
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
            self.planner.hit(LAYER, range, &look);
        } else {
            self.planner.miss(LAYER, range, &look, &mut now);
        }
        let flights = merge(&now, 2, 128, &look);
        let fetched: Vec<u32> = flights.iter().flat_map(|flight| flight.first..flight.end).collect();
        self.here
            .borrow_mut()
            .extend(flights.iter().flat_map(|flight| flight.keys()));
        self.planner.demanded(ChunkRange::of(LAYER, range).bytes());
        fetched
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
            let Some(Planned { chunks: next, .. }) = self.planner.next(1 << 20, &look) else {
                return all;
            };
            assert!(next.bytes() <= 1 << 20);
            self.planner.prefetched(next.bytes());
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
    let widths: Vec<usize> = (1..5)
        .map(|n| world.read((100 * n) * CHUNK, 4096).len() + world.idle().len())
        .collect();
    assert!(
        widths[1] > widths[0] && widths[2] > widths[1] && widths[3] <= 64,
        "{widths:?}"
    );
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
    let mut planner = Planner::new(None, vec![1000 * CHUNK], PlanOptions::default());
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
    let limit = (PlanOptions::default().credit_bytes + 100 * 2 * CHUNK) / CHUNK + 64;
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
        let mut planner = Planner::new(Some(row.clone()), vec![row.end()], PlanOptions::default());
        for n in from..41 {
            let range = TarRange::new(TarOffset(n * CHUNK), CHUNK);
            planner.hit(LAYER, range, &|_| Presence::Absent);
        }
        planner.urgent.iter().map(|want| want.chunks.end).max()
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
    let mut queue: VecDeque<Planned> = all
        .iter()
        .map(|(first, end)| Reason::Import.of(stretch(*first, *end)))
        .collect();
    let look = |key: ChunkKey| {
        if key.index == 45 {
            Presence::Coming
        } else {
            Presence::Absent
        }
    };
    let mut found = take_from(&mut queue, 128, 4, &look).unwrap().chunks;
    assert_eq!(found, stretch(50, 52));
    gather(&mut found, &queue, 128, 4, &look);
    assert_eq!(found, stretch(49, 55), "not over what is coming, nor far away");
    let mut short = stretch(50, 52);
    gather(&mut short, &queue, 3, 4, &look);
    assert_eq!(short, stretch(49, 52));
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
        let flown: Vec<ChunkKey> = flights.iter().flat_map(|flight| flight.keys()).collect();
        let once: BTreeSet<ChunkKey> = flown.iter().copied().collect();
        prop_assert_eq!(flown.len(), once.len());
        prop_assert!(model.is_subset(&once));
        prop_assert!(once.iter().all(|key| look(*key) != Presence::Coming));
        for flight in &flights {
            prop_assert!(flight.count() <= longest && !flight.is_empty());
            let useful = |index| model.contains(&ChunkKey { layer: flight.layer, index });
            prop_assert!(useful(flight.first) && useful(flight.end - 1));
            let mut since = 0;
            for index in flight.first..flight.end {
                since = if useful(index) { 0 } else { since + 1 };
                prop_assert!(since <= gap);
            }
        }
    }
}
