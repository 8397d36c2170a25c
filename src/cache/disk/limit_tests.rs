//! The limit: kept at every moment, by giving up what is coldest, against a plain model.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::files::pin_name;
use super::map::GROUP_CHUNKS;
use super::*;
use crate::units::{CHUNK_BYTES, TarOffset, len_usize};

const GROUP_BYTES: u64 = CHUNK_BYTES * 32;
/// Each layer has four groups, the last of which is short.
const CHUNKS: u32 = 3 * GROUP_CHUNKS + 7;
const SIZE: u64 = 3 * GROUP_BYTES + 6 * CHUNK_BYTES + 777;
const LAYERS: usize = 4;

fn key(layer: usize) -> LayerKey {
    LayerKey::of_content(&format!("layer {layer}"), SIZE)
}

/// The content of a layer, made once.
fn whole(layer: usize) -> &'static [u8] {
    static LAYERS: [std::sync::OnceLock<Vec<u8>>; 10] = [const { std::sync::OnceLock::new() }; 10];
    LAYERS[layer].get_or_init(|| {
        let salt = u64::try_from(layer).unwrap() * 7 + 1;
        (0..SIZE)
            .map(|at| u8::try_from((at * (at / CHUNK_BYTES * 31 + salt) + at / 251) % 251).unwrap())
            .collect()
    })
}

fn chunks(layer: usize, first: u32, end: u32) -> &'static [u8] {
    let place = |index: u32| len_usize((u64::from(index) * CHUNK_BYTES).min(SIZE));
    &whole(layer)[place(first)..place(end)]
}

fn chunk(layer: usize, index: u32) -> &'static [u8] {
    chunks(layer, index, index + 1)
}

/// Disk space of all files that have a name.
fn on_disk(dir: &Path) -> u64 {
    let own = fs::metadata(dir).unwrap().blocks() * 512;
    let files = fs::read_dir(dir).unwrap().flatten();
    own + files
        .filter_map(|entry| entry.metadata().ok())
        .map(|meta| meta.blocks() * 512)
        .sum::<u64>()
}

/// Whether a chunk that is said to be here can be read back as it was written.
fn is_right(cache: &LayerCache, layer: usize, index: u32) -> bool {
    let mut bytes = vec![0; len_usize(crate::cache::chunk::chunk_len(SIZE, index))];
    let file = cache.file_of(index).unwrap();
    file.read_exact_at(&mut bytes, u64::from(index) * CHUNK_BYTES).unwrap();
    bytes == chunk(layer, index) && cache.matches(index, &bytes)
}

#[derive(Clone, Debug)]
enum Step {
    /// Chunks of a layer come.
    Put(usize, u32, u32),
    /// A chunk is read back.
    Read(usize, u32),
    Close(usize),
    Pin(usize),
    Unpin(usize),
    Commit(usize),
    /// The process ends, and another one begins.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let layer = 0..LAYERS;
    prop_oneof![
        10 => (layer.clone(), 0..CHUNKS, 1..40_u32).prop_map(|(layer, first, count)| Step::Put(layer, first, count)),
        6 => (layer.clone(), 0..CHUNKS).prop_map(|(layer, index)| Step::Read(layer, index)),
        2 => layer.clone().prop_map(Step::Close),
        1 => layer.clone().prop_map(Step::Pin),
        2 => layer.clone().prop_map(Step::Unpin),
        1 => layer.prop_map(Step::Commit),
        1 => Just(Step::Restart),
    ]
}

/// What is known of the cache without looking into it.
struct World {
    dir: tempfile::TempDir,
    limit: u64,
    store: Arc<DiskCache>,
    open: HashMap<usize, Arc<LayerCache>>,
    pinned: Vec<usize>,
    /// When each group was last read or written.
    uses: HashMap<(usize, u32), u32>,
    now: u32,
}

impl World {
    fn new(limit: u64) -> Self {
        // Where a sync costs nothing, if there is such a place.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            tempfile::tempdir_in(shm)
        } else {
            tempfile::tempdir()
        }
        .unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(limit)).unwrap();
        Self {
            dir,
            limit,
            store,
            open: HashMap::new(),
            pinned: Vec::new(),
            uses: HashMap::new(),
            now: 1000,
        }
    }

    fn layer(&mut self, layer: usize) -> Arc<LayerCache> {
        let opened = || self.store.layer(key(layer), SIZE).unwrap();
        self.open.entry(layer).or_insert_with(opened).clone()
    }

    fn pin_path(&self, layer: usize) -> PathBuf {
        self.dir.path().join(pin_name(&key(layer).0))
    }

    /// The groups that hold a chunk, of all layers. Opens those that are closed, and closes them again.
    fn groups(&mut self) -> Vec<(usize, u32)> {
        let mut all = Vec::new();
        for layer in 0..LAYERS {
            let cache = match self.open.get(&layer) {
                Some(cache) => Arc::clone(cache),
                None => self.store.layer(key(layer), SIZE).unwrap(),
            };
            all.extend(cache.groups().into_iter().map(|(group, ..)| (layer, group)));
        }
        all
    }

    fn step(&mut self, step: &Step) {
        self.now += 1;
        self.store.clock.store(self.now, Ordering::Relaxed);
        match *step {
            Step::Put(layer, first, count) => self.put(layer, first, count),
            Step::Read(layer, index) => {
                let cache = self.layer(layer);
                if cache.has(index) {
                    assert!(is_right(&cache, layer, index));
                    cache.touch(index);
                    self.uses.insert((layer, index / GROUP_CHUNKS), self.now);
                }
            }
            Step::Close(layer) => drop(self.open.remove(&layer)),
            Step::Pin(layer) => {
                fs::write(self.pin_path(layer), "").unwrap();
                self.pinned.push(layer);
            }
            Step::Unpin(layer) => {
                let _was_not_pinned = fs::remove_file(self.pin_path(layer));
                self.pinned.retain(|pinned| *pinned != layer);
            }
            Step::Commit(layer) => self.layer(layer).commit().unwrap(),
            Step::Restart => {
                self.open.clear();
                self.store = DiskCache::open(self.dir.path(), CacheLimit::bytes(self.limit)).unwrap();
                self.store.clock.store(self.now, Ordering::Relaxed);
            }
        }
    }

    fn put(&mut self, layer: usize, first: u32, count: u32) {
        let before = self.groups();
        let cache = self.layer(layer);
        let end = (first + count).min(CHUNKS);
        let bytes = chunks(layer, first, end);
        // The search for room is not put off because it was in vain a moment ago.
        self.store.forget_full();
        cache.put(TarOffset(u64::from(first) * CHUNK_BYTES), bytes);
        // What was given up for the first of them and came with the last counts as written now.
        for (group, used, _) in cache.groups() {
            let in_range = (first / GROUP_CHUNKS..=(end - 1) / GROUP_CHUNKS).contains(&group);
            if in_range && used == self.now {
                self.uses.insert((layer, group), self.now);
            }
        }
        let after = self.groups();
        let gone: Vec<_> = before.iter().filter(|group| !after.contains(group)).collect();
        let used = |group: &(usize, u32)| self.uses.get(group).copied().unwrap_or(0);
        assert!(
            gone.iter().all(|(layer, _)| !self.pinned.contains(layer)),
            "a pinned layer gave up {gone:?}"
        );
        // Only what was written just now may be younger than what had to go for it.
        let hottest_gone = gone.iter().map(|group| used(group)).max();
        let coldest_kept = after
            .iter()
            .filter(|group| !self.pinned.contains(&group.0))
            .map(&used)
            .min();
        if let (Some(gone), Some(kept)) = (hottest_gone, coldest_kept) {
            assert!(gone <= kept, "used at {gone} and given up, used at {kept} and kept");
        }
        // There was room, or could have been.
        let pinned = after.iter().filter(|group| self.pinned.contains(&group.0)).count();
        let most_pinned = u64::try_from(pinned).unwrap() * GROUP_BYTES;
        if self.limit > most_pinned + GROUP_BYTES + (1 << 20) {
            assert!((first..end).any(|index| cache.has(index)), "nothing was kept");
        }
    }

    fn check(&mut self) {
        let taken = on_disk(self.dir.path());
        assert!(taken <= self.limit, "{taken} bytes on disk, {} allowed", self.limit);
        for (layer, cache) in &self.open {
            for index in (0..CHUNKS).filter(|index| cache.has(*index)) {
                assert!(is_right(cache, *layer, index), "layer {layer}, chunk {index}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever happens, no more than the limit is on disk, what is kept is right, and what went was the coldest.
    #[test]
    fn the_limit_holds_and_the_coldest_go(
        limit in (2_u64 << 20)..(12 << 20),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut world = World::new(limit);
        for step in &steps {
            world.step(step);
            world.check();
        }
    }
}

/// Two processes fill one directory, four threads each, and a third looks at every moment.
#[test]
fn the_limit_holds_while_many_write() {
    const LIMIT: u64 = 6 << 20;
    let dir = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                // The files are not looked at in one moment: room that one gives another meanwhile is counted twice, but hardly
                // twice in a row.
                most = most.max(on_disk(dir.path()).min(on_disk(dir.path())));
            }
            most
        });
        let writers: Vec<_> = (0..2)
            .map(|process| {
                let store = DiskCache::open(dir.path(), CacheLimit::bytes(LIMIT)).unwrap();
                let threads: Vec<_> = (0..4)
                    .map(|thread| {
                        let store = Arc::clone(&store);
                        scope.spawn(move || {
                            // Two threads share a layer; one layer is open in both processes; one has no name.
                            let layer = [0, 1 + process, 1 + process, 9][thread];
                            let cache = if layer == 9 {
                                store.unnamed(SIZE).unwrap()
                            } else {
                                store.layer(key(layer), SIZE).unwrap()
                            };
                            for round in 0..40_u32 {
                                let first = (round * 29 + u32::try_from(thread).unwrap() * 13) % CHUNKS;
                                let end = (first + 20).min(CHUNKS);
                                let bytes = chunks(layer, first, end);
                                cache.put(TarOffset(u64::from(first) * CHUNK_BYTES), bytes);
                                if round % 5 == 0 {
                                    cache.commit().unwrap();
                                }
                            }
                        })
                    })
                    .collect();
                threads
            })
            .collect();
        for thread in writers.into_iter().flatten() {
            thread.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        let most = watcher.join().unwrap();
        assert!(most <= LIMIT, "{most} bytes on disk, {LIMIT} allowed");
        assert!(most > LIMIT / 2, "hardly anything was kept: {most}");
    });
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(LIMIT)).unwrap();
    for layer in 0..3 {
        let cache = store.layer(key(layer), SIZE).unwrap();
        for index in (0..CHUNKS).filter(|index| cache.has(*index)) {
            assert!(is_right(&cache, layer, index), "layer {layer}, chunk {index}");
        }
    }
}

#[test]
fn a_layer_that_cannot_fit_is_not_begun_and_one_that_grows_too_long_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(4 << 20)).unwrap();
    assert!(store.begin_layer(5 << 20).unwrap().is_none());
    let mut writer = store.begin_layer(1 << 20).unwrap().unwrap();
    let piece = vec![1; 1 << 20];
    assert!((0..8).any(|_| writer.push(&piece).is_err()), "8 MiB fitted");
    assert!(on_disk(dir.path()) <= 4 << 20);
    drop(writer);
    assert!(on_disk(dir.path()) < 1 << 20);
}

#[test]
fn others_are_left_a_twentieth_and_never_more_than_a_gib() {
    for (all, left) in [
        (0, 0),
        (19, 0),
        (8 << 30, (8 << 30) / 20),
        (20 << 30, 1 << 30),
        (1 << 42, 1 << 30),
        (u64::MAX, 1 << 30),
    ] {
        assert_eq!(super::room::kept_free(all), left, "of {all}");
    }
}

/// A cache that can take nothing says so; one that is asked for more than it may ever hold is well.
#[test]
fn a_cache_without_room_for_a_chunk_is_in_trouble() {
    let trouble = |limit: u64, asked: u64| {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(limit)).unwrap();
        assert!(store.room_for(asked).is_none());
        store.trouble()
    };
    assert!(trouble(16 << 10, CHUNK_BYTES).unwrap().contains("full"));
    assert_eq!(trouble(4 << 20, 8 << 20), None);
}

/// Somebody empties the directory, or deletes it, while a layer is used: it is used again, and nothing is kept that is not counted.
#[test]
fn an_emptied_or_deleted_directory_is_filled_again() {
    for delete in [false, true] {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("layers");
        let store = DiskCache::open(&dir, CacheLimit::bytes(16 << 20)).unwrap();
        let cache = store.layer(key(0), SIZE).unwrap();
        let put = |first: u32| {
            let bytes = chunks(0, first, first + 10);
            cache.put(TarOffset(u64::from(first) * CHUNK_BYTES), bytes);
            cache.commit()
        };
        put(0).unwrap();
        if delete {
            fs::remove_dir_all(&dir).unwrap();
        } else {
            for entry in fs::read_dir(&dir).unwrap() {
                fs::remove_file(entry.unwrap().path()).unwrap();
            }
        }
        // Until something is written, what is open is read.
        assert!(cache.has(3) && is_right(&cache, 0, 3));
        put(20).unwrap();
        assert!(!cache.has(3), "what was deleted is still believed");
        put(40).unwrap();
        assert!(cache.has(43) && is_right(&cache, 0, 43));
        assert_eq!(store.trouble(), None);
        drop(cache);
        assert!(store.layer(key(0), SIZE).unwrap().has(43), "deleted: {delete}");
    }
}
