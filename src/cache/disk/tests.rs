use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use super::files::{TRAILER_BYTES, TRAILER_MAGIC};
use super::*;
use crate::cache::chunk::chunk_len;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

const SIZE: u64 = 10 * CHUNK_BYTES + 777;
const NONE: [u32; 0] = [];

fn layer() -> LayerKey {
    LayerKey::of_url("https://host/layer.tar", SIZE, "\"1\"")
}

fn content() -> Vec<u8> {
    (0..SIZE)
        .map(|at| u8::try_from((at * 31 + at / 257) % 251).unwrap())
        .collect()
}

fn held(cache: &LayerCache) -> Vec<u32> {
    (0..=11).filter(|index| cache.has(*index)).collect()
}

/// Every chunk that the cache claims must be the layer's.
fn check(cache: &LayerCache) {
    let content = content();
    for index in held(cache) {
        let start = len_usize(u64::from(index) * CHUNK_BYTES);
        let len = len_usize(chunk_len(SIZE, index));
        let mut bytes = vec![0; len];
        cache
            .file_of(index)
            .unwrap()
            .read_exact_at(&mut bytes, u64::from(index) * CHUNK_BYTES)
            .unwrap();
        assert!(bytes == content[start..start + len], "chunk {index} is not the layer's");
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn the_file(dir: &Path, kind: &str) -> PathBuf {
    let mut found = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    found
        .find(|path| path.extension().is_some_and(|extension| extension == kind))
        .unwrap()
}

#[test]
fn chunks_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let cache = store.layer(layer(), SIZE).unwrap();
    let all = content();
    // From the middle of chunk 1 to the middle of chunk 4, and the short last one.
    let from = len_usize(CHUNK_BYTES + 100);
    cache.put(
        TarOffset(CHUNK_BYTES + 100),
        &all[from..from + len_usize(3 * CHUNK_BYTES)],
    );
    cache.put(TarOffset(10 * CHUNK_BYTES), &all[len_usize(10 * CHUNK_BYTES)..]);
    assert_eq!(held(&cache), [2, 3, 10]);
    assert_eq!(cache.bytes_held(), 2 * CHUNK_BYTES + 777);
    assert!(Arc::ptr_eq(&cache, &store.layer(layer(), SIZE).unwrap()));
    drop(cache);
    let cache = store.layer(layer(), SIZE).unwrap();
    assert_eq!(held(&cache), [2, 3, 10]);
    check(&cache);
}

#[test]
fn what_another_process_has_open_may_be_had_once_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let [store, others] = [(), ()].map(|()| DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap());
    assert_eq!(store.kept(layer()).err(), Some(NotKept::Nothing));
    let theirs = others.layer(layer(), SIZE).unwrap();
    theirs.put(TarOffset(0), &content());
    assert_eq!(store.kept(layer()).err(), Some(NotKept::InUse));
    drop(theirs);
    let kept = store.kept(layer()).unwrap();
    assert_eq!(held(&kept).len(), 11);
    check(&kept);
    assert_eq!(others.kept(layer()).err(), Some(NotKept::InUse));
}

#[test]
fn without_a_commit_nothing_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let cache = store.layer(layer(), SIZE).unwrap();
    cache.put(TarOffset(0), &content()[..len_usize(CHUNK_BYTES)]);
    let crashed = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), crashed.path());
    let after = DiskCache::open(crashed.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&after), NONE);
}

/// Kills the writer between any two steps: what is found afterwards is either not believed or right.
#[test]
fn a_crash_loses_only_the_latest() {
    let dir = tempfile::tempdir().unwrap();
    let crashes = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let cache = store.layer(layer(), SIZE).unwrap();
    let all = content();
    let mut shots: Vec<(PathBuf, Vec<u32>)> = Vec::new();
    let mut committed = Vec::new();
    let shoot = |committed: &Vec<u32>, shots: &mut Vec<(PathBuf, Vec<u32>)>| {
        let to = crashes.path().join(shots.len().to_string());
        copy_dir(dir.path(), &to);
        shots.push((to, committed.clone()));
    };
    for index in [4u32, 0, 10, 7] {
        let start = len_usize(u64::from(index) * CHUNK_BYTES);
        let len = len_usize(chunk_len(SIZE, index));
        shoot(&committed, &mut shots);
        // Half a chunk on disk, as a write that was cut off leaves it.
        File::options()
            .write(true)
            .open(the_file(dir.path(), "data"))
            .unwrap()
            .write_all_at(&all[start..start + len / 2], u64::from(index) * CHUNK_BYTES)
            .unwrap();
        shoot(&committed, &mut shots);
        cache.put(TarOffset(u64::from(index) * CHUNK_BYTES), &all[start..start + len]);
        shoot(&committed, &mut shots);
        // The new map, half written beside the old one.
        fs::write(the_file(dir.path(), "data").with_extension("map.1"), [1, 2, 3]).unwrap();
        shoot(&committed, &mut shots);
        cache.commit().unwrap();
        committed.push(index);
        committed.sort_unstable();
        shoot(&committed, &mut shots);
    }
    assert_eq!(shots.len(), 20);
    for (dir, expected) in shots {
        let after = DiskCache::open(dir, CacheLimit::bytes(1 << 40))
            .unwrap()
            .layer(layer(), SIZE)
            .unwrap();
        assert_eq!(held(&after), expected);
        check(&after);
    }
}

/// A map of one moment beside a data file of another, a truncated file, a flipped bit: never a wrong byte.
#[test]
fn files_that_do_not_belong_together_are_discarded() {
    let damage: [fn(&Path); 6] = [
        |dir| fs::remove_file(the_file(dir, "data")).unwrap(),
        |dir| fs::remove_file(the_file(dir, "map")).unwrap(),
        |dir| {
            File::options()
                .write(true)
                .open(the_file(dir, "data"))
                .unwrap()
                .set_len(5 * CHUNK_BYTES)
                .unwrap();
        },
        |dir| {
            let map = the_file(dir, "map");
            let mut bytes = fs::read(&map).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            fs::write(map, bytes).unwrap();
        },
        |dir| {
            // The data file of another life.
            let data = the_file(dir, "data");
            let len = fs::metadata(&data).unwrap().len();
            let file = File::create(data).unwrap();
            file.set_len(len).unwrap();
            let trailer = [&TRAILER_MAGIC[..], &[0; 16]].concat();
            file.write_all_at(&trailer, SIZE.next_multiple_of(TRAILER_BYTES))
                .unwrap();
        },
        |dir| fs::write(the_file(dir, "map"), []).unwrap(),
    ];
    for (number, harm) in damage.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let cache = store.layer(layer(), SIZE).unwrap();
        cache.put(TarOffset(0), &content());
        drop(cache);
        harm(dir.path());
        let cache = store.layer(layer(), SIZE).unwrap();
        assert_eq!(held(&cache), NONE, "damage {number} was believed");
        // And it works again.
        cache.put(TarOffset(0), &content());
        drop(cache);
        let cache = store.layer(layer(), SIZE).unwrap();
        assert_eq!(held(&cache).len(), 11);
        check(&cache);
    }
}

#[test]
fn a_second_process_reads_what_is_mapped_and_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let all = content();
    let first = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    first.put(TarOffset(0), &all[..len_usize(2 * CHUNK_BYTES)]);
    first.commit().unwrap();
    first.put(
        TarOffset(2 * CHUNK_BYTES),
        &all[len_usize(2 * CHUNK_BYTES)..len_usize(3 * CHUNK_BYTES)],
    );
    // Another store does not know of the first one's handles, as another process does not.
    let second = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&second), [0, 1]);
    second.put(
        TarOffset(5 * CHUNK_BYTES),
        &all[len_usize(5 * CHUNK_BYTES)..len_usize(6 * CHUNK_BYTES)],
    );
    assert_eq!(held(&second), [0, 1, 5]);
    check(&second);
    assert!(second.find(0, 2).is_some());
    assert!(second.find(4, 6).is_none());
    second.commit().unwrap();
    drop(second);
    drop(first);
    let later = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&later), [0, 1, 2]);
    check(&later);
}

#[test]
fn another_state_of_the_layer_is_another_layer() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    store.layer(layer(), SIZE).unwrap().put(TarOffset(0), &content());
    let newer = LayerKey::of_url("https://host/layer.tar", SIZE, "\"2\"");
    assert_eq!(held(&store.layer(newer, SIZE).unwrap()), NONE);
    // Without a key nothing outlives the process.
    let cache = store.unnamed(SIZE).unwrap();
    cache.put(TarOffset(0), &content());
    assert_eq!(held(&cache).len(), 11);
    drop(cache);
    assert_eq!(held(&store.unnamed(SIZE).unwrap()), NONE);
}

#[test]
fn a_writer_takes_pieces_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let cache = store.layer(layer(), SIZE).unwrap();
    let all = content();
    let mut writer = CacheWriter::new(cache.clone());
    let mut at = 1000;
    for step in [1, 40_000, 7, 99_999, 3, 70_000].into_iter().cycle() {
        if at >= all.len() {
            break;
        }
        let end = (at + step).min(all.len());
        // The walk skips some.
        if at > 120_000 && at < 230_000 {
            at = 240_000;
            continue;
        }
        writer.push(TarOffset(len_u64(at)), &all[at..end]);
        at = end;
    }
    check(&cache);
    assert!(
        cache.has(1) && cache.has(8) && cache.has(10) && !cache.has(0) && !cache.has(5),
        "{:?}",
        held(&cache)
    );
}

#[test]
fn trimming_spares_what_other_processes_use() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let other = LayerKey::of_url("https://host/other.tar", SIZE, "\"1\"");
    for layer in [layer(), other] {
        store.layer(layer, SIZE).unwrap().put(TarOffset(0), &content());
    }
    // Another store does not know of the first one's handles, as another process does not.
    let process = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let in_use = process.layer(other, SIZE).unwrap();
    assert!(store.trim(0).unwrap() > 0);
    assert_eq!(held(&store.layer(layer(), SIZE).unwrap()), NONE);
    assert_eq!(held(&in_use).len(), 11);
    check(&in_use);
    // Its own it gives up, used or not.
    assert!(process.trim(0).unwrap() > 0);
    assert_eq!(held(&in_use), NONE);
    in_use.put(TarOffset(0), &content());
    drop(in_use);
    assert_eq!(held(&store.layer(other, SIZE).unwrap()).len(), 11);
    assert_eq!(store.trim(u64::MAX).unwrap(), 0);
}

/// A process that came while another wrote reads the other's file as long as it lives, whatever becomes of that file's map.
#[test]
fn a_file_that_is_read_is_never_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let first = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    first.put(TarOffset(0), &content());
    first.commit().unwrap();
    let second = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&second).len(), 11);
    drop(first);
    fs::remove_file(the_file(dir.path(), "map")).unwrap();
    let third = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&third), NONE);
    assert_eq!(held(&second).len(), 11);
    check(&second);
    // The third one has the name now.
    third.put(TarOffset(0), &content());
    drop((second, third));
    let later = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40))
        .unwrap()
        .layer(layer(), SIZE)
        .unwrap();
    assert_eq!(held(&later).len(), 11);
    check(&later);
}

#[test]
fn what_killed_processes_were_filling_is_trimmed() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let left = dir.path().join("filling-Ab12Cd.part");
    fs::write(&left, content()).unwrap();
    let mut writer = store.begin_layer(0).unwrap().unwrap();
    writer.push(&content()).unwrap();
    assert!(store.trim(u64::MAX).unwrap() > 0);
    assert!(!left.exists());
    writer.finish("layer.tar", "sha256:abc").unwrap();
    assert!(
        store
            .layer(LayerKey::of_content("sha256:abc", SIZE), SIZE)
            .unwrap()
            .is_whole()
    );
}

#[test]
fn what_could_not_be_read_back_is_not_believed_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
    let cache = store.layer(layer(), SIZE).unwrap();
    cache.put(TarOffset(0), &content());
    cache.seal();
    cache.commit().unwrap();
    cache.lost(3);
    drop(cache);
    let cache = store.layer(layer(), SIZE).unwrap();
    assert!(!cache.has(3) && !cache.is_sealed());
    assert_eq!(held(&cache).len(), 10);
}

/// A device takes a chunk for verified that it has verified once. What comes into the directory behind its back is not that.
#[test]
fn what_others_put_in_the_place_of_lost_files_is_not_read() {
    let all = content();
    let chunk = |index: u64| {
        let start = len_usize(index * CHUNK_BYTES);
        (
            TarOffset(index * CHUNK_BYTES),
            &all[start..start + len_usize(CHUNK_BYTES)],
        )
    };
    for is_open in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let open = || DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let cache = open().layer(layer(), SIZE).unwrap();
        let (at, bytes) = chunk(1);
        cache.put(at, bytes);
        cache.commit().unwrap();
        for file in fs::read_dir(dir.path()).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
        // Another process keeps what it takes for the layer.
        let theirs = open().layer(layer(), SIZE).unwrap();
        theirs.put(TarOffset(0), &vec![1; len_usize(3 * CHUNK_BYTES)]);
        theirs.commit().unwrap();
        let theirs = is_open.then_some(theirs);
        let (at, bytes) = chunk(4);
        cache.put(at, bytes);
        cache.commit().unwrap();
        assert_eq!(held(&cache), NONE, "open: {is_open}");
        cache.put(at, bytes);
        assert_eq!(held(&cache), [4], "open: {is_open}");
        check(&cache);
        drop(cache);
        drop(theirs);
        let later = open().layer(layer(), SIZE).unwrap();
        assert_eq!(
            held(&later),
            [0, 1, 2],
            "what another one keeps is gone; open: {is_open}"
        );
    }
}
