//! Power cuts: everything that the cache does to its directory is recorded, the record is cut at every place, and of what was not yet
//! made durable any part may be there and any part missing. Whatever is found then is opened: it has to be right, or known to be wrong.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::FileExt as _;

use super::dir::{Change, Observer};
use super::*;
use crate::cache::chunk::chunk_len;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

const SIZE: u64 = 70 * CHUNK_BYTES + 777;
const CHUNKS: u32 = 71;
/// Disks write whole sectors, and not always all of them.
const SECTOR: usize = 4096;

/// A change as it was recorded; files by the order in which they were made.
#[derive(Clone, Debug)]
enum Recorded {
    Create { file: usize, name: String },
    Write { file: usize, at: u64, bytes: Vec<u8> },
    SetLen { file: usize, len: u64 },
    Punch { file: usize, at: u64, len: u64 },
    Sync { file: usize },
    Rename { from: String, to: String },
    Remove { name: String },
    SyncDir,
}

#[derive(Debug, Default)]
struct Recorder(Mutex<Record>);

#[derive(Debug, Default)]
struct Record {
    changes: Vec<Recorded>,
    /// Inodes' numbers are used again: the file that each is now.
    files: HashMap<u64, usize>,
    count: usize,
    /// From this change on the disk refuses everything with this error.
    fails: Option<(usize, i32)>,
    seen: usize,
}

impl Observer for Recorder {
    fn before(&self, change: &Change<'_>) -> io::Result<()> {
        let record = &mut *lock(&self.0);
        record.seen += 1;
        if let Some((from, errno)) = record.fails
            && record.seen > from
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if let Change::Create { file, .. } = change
            && *file != 0
        {
            record.files.insert(*file, record.count);
            record.count += 1;
        }
        let known = |file: &u64| record.files.get(file).copied();
        let recorded = match change {
            Change::Create { file, name } => known(file).map(|file| Recorded::Create {
                file,
                name: (*name).to_owned(),
            }),
            Change::Write { file, at, bytes } => known(file).map(|file| Recorded::Write {
                file,
                at: *at,
                bytes: bytes.to_vec(),
            }),
            Change::SetLen { file, len } => known(file).map(|file| Recorded::SetLen { file, len: *len }),
            Change::Punch { file, at, len } => known(file).map(|file| Recorded::Punch {
                file,
                at: *at,
                len: *len,
            }),
            Change::Sync { file } => known(file).map(|file| Recorded::Sync { file }),
            Change::Rename { from, to } => Some(Recorded::Rename {
                from: (*from).to_owned(),
                to: (*to).to_owned(),
            }),
            Change::Remove { name } => Some(Recorded::Remove {
                name: (*name).to_owned(),
            }),
            Change::SyncDir => Some(Recorded::SyncDir),
        };
        record.changes.extend(recorded);
        Ok(())
    }
}

/// Numbers that look random, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What of the changes since the last sync is on disk after a cut.
#[derive(Clone, Copy, Debug)]
enum Survives {
    All,
    Nothing,
    /// Any part.
    Any(u64),
    /// Any part, and of what was synced as well: the disk lies.
    AnyEvenSynced(u64),
}

/// A file's changes in order, each with whether it is durable.
#[derive(Default)]
struct Disk {
    files: Vec<Vec<(Recorded, bool)>>,
    names: Vec<(Recorded, bool)>,
}

impl Disk {
    fn after(changes: &[Recorded]) -> Self {
        let mut disk = Self::default();
        for change in changes {
            match change {
                Recorded::Create { file, .. } => {
                    assert_eq!(*file, disk.files.len());
                    disk.files.push(Vec::new());
                    disk.names.push((change.clone(), false));
                }
                Recorded::Write { file, .. } | Recorded::SetLen { file, .. } | Recorded::Punch { file, .. } => {
                    disk.files[*file].push((change.clone(), false));
                }
                Recorded::Sync { file } => disk.files[*file].iter_mut().for_each(|change| change.1 = true),
                Recorded::Rename { .. } | Recorded::Remove { .. } => disk.names.push((change.clone(), false)),
                Recorded::SyncDir => disk.names.iter_mut().for_each(|change| change.1 = true),
            }
        }
        disk
    }

    /// The files that are found after a cut.
    fn survivors(&self, survives: Survives) -> BTreeMap<String, Vec<u8>> {
        let mut random = Random(match survives {
            Survives::Any(seed) | Survives::AnyEvenSynced(seed) => seed,
            Survives::All | Survives::Nothing => 0,
        });
        let mut is_there = |durable: bool| match survives {
            Survives::All => true,
            Survives::Nothing => durable,
            Survives::Any(_) => durable || random.below(2) == 0,
            Survives::AnyEvenSynced(_) => random.below(8) != 0,
        };
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        for (change, durable) in &self.names {
            if !is_there(*durable) {
                continue;
            }
            match change {
                Recorded::Create { file, name } => drop(names.insert(name, *file)),
                Recorded::Rename { from, to } => {
                    if let Some(file) = names.remove(from.as_str()) {
                        names.insert(to, file);
                    }
                }
                Recorded::Remove { name } => drop(names.remove(name.as_str())),
                _ => {}
            }
        }
        names
            .into_iter()
            .map(|(name, file)| (name.to_owned(), content(&self.files[file], &mut is_there)))
            .collect()
    }
}

fn content(changes: &[(Recorded, bool)], is_there: &mut dyn FnMut(bool) -> bool) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for (change, durable) in changes {
        match change {
            Recorded::SetLen { len, .. } if is_there(*durable) => bytes.resize(len_usize(*len), 0),
            Recorded::Punch { at, len, .. } if is_there(*durable) => {
                let end = len_usize(at + len).min(bytes.len());
                bytes[len_usize(*at)..end].fill(0);
            }
            Recorded::Write { at, bytes: written, .. } => {
                for (n, sector) in written.chunks(SECTOR).enumerate() {
                    if is_there(*durable) {
                        let at = len_usize(*at) + n * SECTOR;
                        if bytes.len() < at + sector.len() {
                            bytes.resize(at + sector.len(), 0);
                        }
                        bytes[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            _ => {}
        }
    }
    bytes
}

fn key(layer: u64) -> LayerKey {
    LayerKey::of_content(&format!("layer {layer}"), SIZE)
}

/// The content of a layer, made once.
fn whole(layer: u64) -> &'static [u8] {
    static LAYERS: [std::sync::OnceLock<Vec<u8>>; 3] = [const { std::sync::OnceLock::new() }; 3];
    LAYERS[len_usize(layer)].get_or_init(|| {
        (0..SIZE)
            .map(|at| u8::try_from((at * (at / CHUNK_BYTES * 31 + layer * 7 + 1) + at / 251) % 251).unwrap())
            .collect()
    })
}

fn chunk(layer: u64, index: u32) -> &'static [u8] {
    let start = len_usize(u64::from(index) * CHUNK_BYTES);
    &whole(layer)[start..start + len_usize(chunk_len(SIZE, index))]
}

fn put(cache: &LayerCache, layer: u64, chunks: std::ops::Range<u32>) {
    let at = TarOffset(u64::from(chunks.start) * CHUNK_BYTES);
    let (start, end) = (len_usize(at.0), len_usize(u64::from(chunks.end) * CHUNK_BYTES));
    cache.put(at, &whole(layer)[start..end.min(len_usize(SIZE))]);
}

fn in_memory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        tempfile::tempdir_in(shm)
    } else {
        tempfile::tempdir()
    }
    .unwrap()
}

fn recorded_store(dir: &Path, recorder: &Arc<Recorder>, limit: u64) -> Arc<DiskCache> {
    let observer: Arc<dyn Observer> = recorder.clone();
    DiskCache::in_dir(SafeDir::open(dir).unwrap().observed(observer), CacheLimit::bytes(limit))
}

/// All that a cache does: writing and committing, chunks that turn out to be wrong, giving up for room, whole layers, poison.
fn work(dir: &Path, recorder: &Arc<Recorder>) {
    let store = recorded_store(dir, recorder, 4 << 20);
    let first = store.layer(key(0), SIZE).unwrap();
    put(&first, 0, 0..20);
    let _may_fail = first.commit();
    put(&first, 0, 30..50);
    first.lost(5);
    let _may_fail = first.commit();
    put(&first, 0, 5..6);
    let second = store.layer(key(1), SIZE).unwrap();
    put(&second, 1, 60..71);
    put(&second, 1, 10..40);
    let _may_fail = second.commit();
    drop(first);
    // More than there is room for: others have to go, of the layer that is closed and of this one.
    put(&second, 1, 0..71);
    let _may_fail = second.commit();
    if let Ok(first) = store.layer(key(0), SIZE) {
        put(&first, 0, 0..71);
        first.seal();
        let _may_fail = first.commit();
    }
    if let Ok(Some(mut writer)) = store.begin_layer(0)
        && whole(2).chunks(100_000).all(|piece| writer.push(piece).is_ok())
    {
        let _may_fail = writer.finish("layer", "layer 2");
    }
    second.poison();
    if let Ok(second) = store.layer(key(1), SIZE) {
        put(&second, 1, 3..9);
    }
    let _may_fail = store.trim(2 << 20);
}

/// Opens what is left of a cache. Says how many chunks it has that are right, and how many that are known to be wrong.
fn reopen(files: &BTreeMap<String, Vec<u8>>, what: &str) -> (u32, u32) {
    let dir = in_memory();
    for (name, bytes) in files {
        let file = fs::File::create(dir.path().join(name)).unwrap();
        file.set_len(len_u64(bytes.len())).unwrap();
        // Holes stay holes.
        for (n, sector) in bytes.chunks(SECTOR).enumerate() {
            if sector != &[0; SECTOR][..sector.len()] {
                file.write_all_at(sector, len_u64(n * SECTOR)).unwrap();
            }
        }
    }
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(64 << 20)).unwrap();
    let (mut right, mut wrong) = (0, 0);
    for layer in 0..3 {
        let cache = store.layer(key(layer), SIZE).unwrap();
        for index in (0..CHUNKS).filter(|index| cache.has(*index)) {
            let mut bytes = vec![0; len_usize(chunk_len(SIZE, index))];
            let file = cache.file_of(index).unwrap();
            let read = file.read_exact_at(&mut bytes, u64::from(index) * CHUNK_BYTES);
            if read.is_ok() && cache.matches(index, &bytes) {
                assert!(
                    bytes == chunk(layer, index),
                    "{what}: layer {layer}, chunk {index} is wrong and believed"
                );
                right += 1;
            } else {
                wrong += 1;
            }
        }
        // And it takes chunks again.
        put(&cache, layer, 0..2);
        assert!(
            cache.has(0) && cache.has(1),
            "{what}: layer {layer} takes nothing any more"
        );
    }
    (right, wrong)
}

#[test]
fn a_cut_at_any_change_leaves_what_is_right_or_known_to_be_wrong() {
    let dir = in_memory();
    let recorder = Arc::new(Recorder::default());
    work(dir.path(), &recorder);
    let changes = std::mem::take(&mut lock(&recorder.0).changes);
    let punched = changes
        .iter()
        .filter(|change| matches!(change, Recorded::Punch { .. }))
        .count();
    assert!(punched >= 3, "nothing was given up: {punched}");
    let (mut most, mut caught) = (0, 0);
    for cut in 0..=changes.len() {
        let disk = Disk::after(&changes[..cut]);
        let seed = len_u64(cut) * 1000;
        let ways = [
            Survives::All,
            Survives::Nothing,
            Survives::Any(seed + 1),
            Survives::Any(seed + 2),
            Survives::AnyEvenSynced(seed + 3),
        ];
        for survives in ways {
            let what = format!("cut at {cut} of {}, {survives:?}", changes.len());
            let (right, wrong) = reopen(&disk.survivors(survives), &what);
            most = most.max(right);
            if matches!(survives, Survives::AnyEvenSynced(_)) {
                caught += wrong;
            } else {
                // A disk that keeps its word has nothing in a map that is not in the data.
                assert_eq!(wrong, 0, "{what}: the map speaks of chunks that are not there");
            }
        }
    }
    assert!(most > 60, "only {most} chunks were ever found again");
    assert!(
        caught > 0,
        "a disk that lies was never found out: the test cuts nothing"
    );
}

#[test]
fn a_disk_that_fails_at_any_change_costs_the_cache_and_nothing_else() {
    // What lasts (no room) and what does not matter to a reader (errors of the medium, a filesystem gone read-only).
    for errno in [libc::ENOSPC, libc::EIO, libc::EROFS] {
        let mut from = 3;
        loop {
            let dir = in_memory();
            let recorder = Arc::new(Recorder::default());
            lock(&recorder.0).fails = Some((from, errno));
            let store = recorded_store(dir.path(), &recorder, 4 << 20);
            let Ok(cache) = store.layer(key(0), SIZE) else {
                from += 1;
                continue;
            };
            put(&cache, 0, 0..40);
            let _may_fail = cache.commit();
            put(&cache, 0, 40..71);
            let _may_fail = cache.commit();
            let failed = lock(&recorder.0).seen > from;
            assert_eq!(store.trouble().is_some(), failed, "change {from}, errno {errno}");
            for index in (0..CHUNKS).filter(|index| cache.has(*index)) {
                let mut bytes = vec![0; len_usize(chunk_len(SIZE, index))];
                let file = cache.file_of(index).unwrap();
                file.read_exact_at(&mut bytes, u64::from(index) * CHUNK_BYTES).unwrap();
                assert!(bytes == chunk(0, index) && cache.matches(index, &bytes));
            }
            if !failed {
                assert!(cache.is_whole());
                break;
            }
            // The disk works again: after a rest, so does the cache.
            lock(&recorder.0).fails = None;
            store.end_rest();
            put(&cache, 0, 0..71);
            cache.commit().unwrap();
            assert!(cache.is_whole(), "change {from}, errno {errno}");
            assert_eq!(store.trouble(), None);
            drop((cache, store));
            let store = DiskCache::open(dir.path(), CacheLimit::bytes(4 << 20)).unwrap();
            assert!(store.layer(key(0), SIZE).unwrap().is_whole());
            from += 1;
        }
        assert!(from > 8, "only {from} changes were seen");
    }
}
