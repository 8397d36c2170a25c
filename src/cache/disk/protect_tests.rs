//! Layers that the kernel keeps as they are. Most of it needs a filesystem that does: see [`verity::test_dir`].

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;

use super::files::{data_name, map_name};
use super::map::GROUP_CHUNKS;
use super::*;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

const GROUP_BYTES: u64 = CHUNK_BYTES * 32;
const CHUNKS: u32 = 2 * GROUP_CHUNKS + 3;
const SIZE: u64 = 2 * GROUP_BYTES + 2 * CHUNK_BYTES + 777;
const LIMIT: u64 = 32 << 20;
const DIGESTS: [u8; 32] = [7; 32];

fn key(layer: u64) -> LayerKey {
    LayerKey::of_content(&format!("layer {layer}"), SIZE)
}

/// Its blocks of 4 KiB are all different, and no other layer's.
fn whole(layer: u64) -> Vec<u8> {
    (0..SIZE)
        .map(|at| u8::try_from((at * (at / 4096 * 31 + layer * 7 + 1) + at / 251 + layer) % 251).unwrap())
        .collect()
}

fn open(dir: &Path, limit: u64) -> Arc<DiskCache> {
    DiskCache::open(dir, CacheLimit::bytes(limit)).unwrap()
}

fn filled(store: &Arc<DiskCache>, layer: u64) -> Arc<LayerCache> {
    let cache = store.layer(key(layer), SIZE).unwrap();
    cache.put(TarOffset(0), &whole(layer));
    cache.commit().unwrap();
    assert!(cache.is_whole());
    cache
}

/// Has it protected, and says what became of that.
fn protect(cache: &LayerCache, layer: u64) -> Protected {
    let whole = whole(layer);
    let mut seen = 0;
    let outcome = cache.protect(DIGESTS, &mut |index, bytes| {
        assert_eq!(index, seen);
        seen += 1;
        Some(whole.chunks(len_usize(CHUNK_BYTES)).nth(len_usize(index.into())) == Some(bytes))
    });
    outcome.unwrap()
}

/// Every chunk that is there can be read and is right; how many those are.
fn right(cache: &LayerCache, layer: u64) -> u32 {
    let whole = whole(layer);
    let mut buffer = Vec::new();
    let mut target = vec![0; len_usize(CHUNK_BYTES) / 2];
    let there = (0..CHUNKS).filter(|index| cache.has(*index));
    there
        .filter(|index| {
            let at = u64::from(*index) * CHUNK_BYTES;
            let is_read = cache.read_chunk(*index, &mut buffer);
            assert!(!is_read || whole[len_usize(at)..].starts_with(&buffer), "chunk {index}");
            // In the page cache now, which some filesystems read without waiting; not the last one, which is shorter.
            if is_read && index + 1 < CHUNKS && cache.read_checked(at + 100, &mut target) {
                assert!(whole[len_usize(at + 100)..].starts_with(&target), "chunk {index}");
            }
            is_read && cache.matches(*index, &buffer)
        })
        .count()
        .try_into()
        .unwrap()
}

fn data(dir: &Path, layer: u64) -> std::path::PathBuf {
    dir.join(data_name(&key(layer).0))
}

/// Disk space of what is in the cache.
fn on_disk(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap().flatten();
    files.map(|file| file.metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn where_files_cannot_be_protected_nothing_changes() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        return;
    }
    let dir = tempfile::tempdir_in(shm).unwrap();
    let store = open(dir.path(), LIMIT);
    let cache = filled(&store, 0);
    assert!(cache.may_be_protected());
    assert_eq!(protect(&cache, 0), Protected::No);
    // It is not asked for again, not even for other layers.
    assert!(!cache.may_be_protected() && !filled(&store, 1).may_be_protected());
    assert!(cache.protection().is_none() && cache.takes_more());
    cache.lost(3);
    cache.put(TarOffset(0), &whole(0));
    assert_eq!(right(&cache, 0), CHUNKS);
}

#[test]
fn only_what_may_stay_is_protected() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), LIMIT);
    let cache = store.layer(key(0), SIZE).unwrap();
    cache.put(TarOffset(0), &whole(0)[..len_usize(GROUP_BYTES)]);
    assert!(!cache.may_be_protected(), "it is not whole");
    let nameless = store.unnamed(SIZE).unwrap();
    nameless.put(TarOffset(0), &whole(1));
    assert!(
        nameless.is_whole() && !nameless.may_be_protected(),
        "it goes with the process"
    );
    let cache = filled(&store, 0);
    assert!(cache.may_be_protected());
    store.limit_to(3 * SIZE);
    assert!(!cache.may_be_protected(), "it is most of the cache");
    store.limit_to(LIMIT);
    assert!(cache.may_be_protected());
    cache.poison();
    assert!(!cache.may_be_protected());
}

#[test]
fn a_protection_that_the_file_does_not_have_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), LIMIT);
    drop(filled(&store, 0));
    drop(store);
    // As if the directory had been copied: the map says so, the file has nothing.
    let path = dir.path().join(map_name(&key(0).0));
    let mut read = map::decode(&fs::read(&path).unwrap(), crate::cache::chunk::chunk_count).unwrap();
    read.about.protection = Some(map::Protection {
        file: [1; 32],
        digests: DIGESTS,
    });
    fs::write(&path, map::encode(&read.identity, &read.about, &read.map)).unwrap();
    let cache = open(dir.path(), LIMIT).layer(key(0), SIZE).unwrap();
    assert!(cache.protection().is_none() && cache.is_whole() && cache.takes_more());
    assert_eq!(right(&cache, 0), CHUNKS);
}

#[test]
fn the_kernel_keeps_a_whole_layer_as_it_is() {
    let Some((dir, _)) = verity::test_dir() else { return };
    let store = open(dir.path(), LIMIT);
    let cache = filled(&store, 0);
    // While another process is about to write to it, it cannot be; then all is as before.
    let other = fs::OpenOptions::new().write(true).open(data(dir.path(), 0)).unwrap();
    let refused = cache.protect(DIGESTS, &mut |_, _| Some(true));
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
    drop(other);
    cache.lost(3);
    cache.put(TarOffset(0), &whole(0));
    assert_eq!(right(&cache, 0), CHUNKS);
    // Nobody waits for it any more, or it is not right: it is kept by the kernel, and nothing is known of it.
    assert_eq!(cache.protect(DIGESTS, &mut |_, _| None).unwrap(), Protected::No);
    let wrong = cache.protect(DIGESTS, &mut |index, _| Some(index != 5)).unwrap();
    assert_eq!((wrong, cache.protection()), (Protected::Wrong(5), None));
    assert_eq!(protect(&cache, 0), Protected::Yes);
    assert_eq!((cache.protection(), right(&cache, 0)), (Some(DIGESTS), CHUNKS));
    assert!(cache.read_checked(100, &mut vec![0; 50_000]), "it is in the page cache");
    assert!(!cache.may_be_protected() && !cache.takes_more());

    let write = fs::OpenOptions::new().write(true).open(data(dir.path(), 0));
    assert_eq!(write.unwrap_err().raw_os_error(), Some(libc::EPERM));
    let listed = store.list().unwrap();
    assert!(listed[0].protected && listed[0].in_use);
    assert_eq!(store.verify(&listed[0], &mut |_| {}).unwrap().damaged, 0);
    // Another process takes it for another's, and a later one knows what was compared.
    let beside = open(dir.path(), LIMIT).layer(key(0), SIZE).unwrap();
    assert!(beside.is_whole() && beside.protection().is_none());
    drop((beside, cache, store));
    for _ in 0..2 {
        let store = open(dir.path(), LIMIT);
        let cache = store.layer(key(0), SIZE).unwrap();
        assert_eq!((cache.protection(), right(&cache, 0)), (Some(DIGESTS), CHUNKS));
        cache.touch(0);
    }
    // It is removed like any other.
    let store = open(dir.path(), LIMIT);
    let listed = store.list().unwrap();
    assert!(matches!(store.remove(&listed[0]).unwrap(), Removed::Freed(bytes) if bytes >= SIZE));
    assert!(!data(dir.path(), 0).exists());
}

#[test]
fn a_protected_layer_goes_as_a_whole_when_room_is_needed() {
    let Some((dir, _)) = verity::test_dir() else { return };
    for is_open in [true, false] {
        let store = open(dir.path(), 4 * SIZE + (1 << 20));
        let cache = filled(&store, 0);
        assert_eq!(protect(&cache, 0), Protected::Yes, "open: {is_open}");
        let mut held = vec![filled(&store, 1), filled(&store, 2)];
        // One part of it was used last: others go before it, and only then all of it.
        store.clock.store(store.now() + 10, Ordering::Relaxed);
        cache.touch(40);
        let cache = is_open.then_some(cache);
        let is_here = || {
            data(dir.path(), 0)
                .metadata()
                .is_ok_and(|meta| meta.blocks() * 512 >= SIZE)
        };
        store.limit_to(3 * SIZE);
        held.push(filled(&store, 3));
        assert!(is_here() && on_disk(dir.path()) <= 3 * SIZE, "open: {is_open}");
        store.clock.store(store.now() + 10, Ordering::Relaxed);
        for layer in 1..4 {
            // Used later than it, and more than there is room for beside it.
            held.push(filled_again(&store, layer));
        }
        assert!(!is_here() && on_disk(dir.path()) <= 3 * SIZE, "open: {is_open}");
        if let Some(cache) = cache {
            assert!(cache.protection().is_none() && cache.bytes_held() == 0 && cache.takes_more());
            cache.put(TarOffset(0), &whole(0)[..len_usize(2 * CHUNK_BYTES)]);
            assert_eq!(right(&cache, 0), 2);
        }
        drop(held);
        store.trim(0).unwrap();
        assert!(on_disk(dir.path()) < SIZE, "open: {is_open}");
    }
}

fn filled_again(store: &Arc<DiskCache>, layer: u64) -> Arc<LayerCache> {
    let cache = store.layer(key(layer), SIZE).unwrap();
    cache.put(TarOffset(0), &whole(layer));
    for index in 0..CHUNKS {
        cache.touch(index);
    }
    cache
}

#[test]
fn what_is_left_without_its_map_is_begun_anew() {
    let Some((dir, _)) = verity::test_dir() else { return };
    let store = open(dir.path(), LIMIT);
    assert_eq!(protect(&filled(&store, 0), 0), Protected::Yes);
    drop(store);
    fs::remove_file(dir.path().join(map_name(&key(0).0))).unwrap();
    let store = open(dir.path(), LIMIT);
    let cache = store.layer(key(0), SIZE).unwrap();
    assert!(cache.bytes_held() == 0 && cache.takes_more());
    drop(cache);
    // A map that does not speak of all of it: what it lacks could not be written.
    assert_eq!(protect(&filled(&store, 0), 0), Protected::Yes);
    drop(store);
    let path = dir.path().join(map_name(&key(0).0));
    let read = map::decode(&fs::read(&path).unwrap(), crate::cache::chunk::chunk_count).unwrap();
    read.map.bits.clear(9);
    fs::write(&path, map::encode(&read.identity, &read.about, &read.map)).unwrap();
    let cache = open(dir.path(), LIMIT).layer(key(0), SIZE).unwrap();
    assert!(cache.bytes_held() == 0 && cache.takes_more());
}

/// The kernel does not hand out what was spoiled below it; the layer is kept anew then.
#[test]
fn what_is_spoiled_on_the_disk_is_never_read() {
    let Some((dir, image)) = verity::test_dir() else { return };
    let store = open(dir.path(), LIMIT);
    let cache = filled(&store, 0);
    assert_eq!(protect(&cache, 0), Protected::Yes);
    drop(cache);
    drop(store);
    rustix::fs::sync();
    // In chunk 5, and where the filesystem has put it.
    let at = 5 * CHUNK_BYTES + 4096;
    let block = &whole(0)[len_usize(at)..len_usize(at + 4096)];
    let image = fs::OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut bytes = vec![0; 4096];
    let blocks = image.metadata().unwrap().len() / 4096;
    let place = (0..blocks).find(|n| {
        image.read_exact_at(&mut bytes, n * 4096).unwrap();
        bytes == block
    });
    let place = place.expect("the filesystem has it nowhere") * 4096;
    image.write_all_at(&[!block[77]], place + 77).unwrap();
    image.sync_all().unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();

    let store = open(dir.path(), LIMIT);
    let cache = store.layer(key(0), SIZE).unwrap();
    assert_eq!(cache.protection(), Some(DIGESTS));
    assert_eq!(right(&cache, 0), CHUNKS - 1);
    assert!(cache.read_run(5, 1, true).map_or(true, |chunks| chunks.is_empty()));
    cache.lost(5);
    assert!(cache.protection().is_none() && !cache.is_whole());
    cache.commit().unwrap();
    assert!(cache.takes_more(), "what was spoiled is kept for ever");
    cache.put(TarOffset(0), &whole(0));
    assert_eq!(right(&cache, 0), CHUNKS);
    assert_eq!(len_u64(whole(0).len()), SIZE);
    assert_eq!(protect(&cache, 0), Protected::Yes);
}
