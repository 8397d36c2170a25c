use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::cache::disk::{CacheLimit, DiskCache, Protected, verity};
use crate::cache::memory::MemoryCache;
use crate::fetch::content::{ContentUse, Contents};
use crate::fetch::{LayerSource, Verifier};
use crate::index::ChunkHasher;
use crate::source::{Blob, LayerSpec, UrlBlob};
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

const NAME: &str = "sha256:layer";
const NONE: [u32; 0] = [];

fn bytes(seed: u8) -> Vec<u8> {
    let byte = |n: usize| u8::try_from((n * 7 + n / 251) % 256).unwrap() ^ seed;
    (0..3 * len_usize(CHUNK_BYTES) + 100).map(byte).collect()
}

fn digests(layer: &[u8]) -> ChunkDigests {
    let mut hasher = ChunkHasher::new();
    hasher.feed(layer);
    hasher.finish()
}

fn source(layer: &[u8]) -> LayerSource {
    let url = UrlBlob::new(&"http://127.0.0.1:1/layer".parse().unwrap());
    LayerSource {
        layer: LayerSpec {
            cached_as: Some(NAME.to_owned()),
            ..Blob::of_url(url, len_u64(layer.len())).into()
        },
        coding: None,
        verifier: Some(Verifier::chunk_digests(digests(layer))),
        unproven: None,
    }
}

/// Something that is done to a data file.
type Change = fn(&Path);

/// A cache that has the layer, and contents of a process.
struct World {
    dir: tempfile::TempDir,
    disk: Arc<DiskCache>,
    contents: Contents,
}

impl World {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let disk = DiskCache::open(dir.path(), CacheLimit::bytes(u64::MAX)).unwrap();
        let contents = Contents::new(Arc::new(MemoryCache::new(1 << 20)));
        Self { dir, disk, contents }
    }

    fn key(layer: &[u8]) -> LayerKey {
        LayerKey::of_content(NAME, len_u64(layer.len()))
    }

    fn attach(&self, layer: &[u8]) -> ContentUse {
        self.contents.of(&source(layer), Some(&self.disk))
    }

    /// A device that keeps all of the layer, having verified chunks 0 and 2, and goes when its file is old enough.
    fn first_device(&self, layer: &[u8]) {
        let content = self.attach(layer);
        let cache = content.cache.get().unwrap();
        cache.put(TarOffset(0), layer);
        cache.commit().unwrap();
        settle(cache);
        verify(&content);
    }

    fn data_file(&self, layer: &[u8]) -> std::path::PathBuf {
        let name = format!("{}.data", Self::key(layer).hex());
        Path::new(self.dir.path()).join(name)
    }
}

fn verify(content: &ContentUse) {
    let checked = content.checked.as_ref().unwrap();
    checked.set(0);
    checked.set(2);
}

fn verified(content: &ContentUse) -> Vec<u32> {
    let checked = content.checked.as_ref().unwrap();
    (0..checked.count()).filter(|index| checked.has(*index)).collect()
}

fn settle(cache: &LayerCache) {
    let start = Instant::now();
    while !cache.file_state().unwrap().is_settled() {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_next_device_need_not_verify_again() {
    let (world, layer) = (World::new(), bytes(0));
    world.first_device(&layer);
    for _ in 0..3 {
        assert_eq!(verified(&world.attach(&layer)), [0, 2]);
    }
    // Two at a time share what is known; it is remembered when both are gone.
    let (one, two) = (world.attach(&layer), world.attach(&layer));
    one.checked.as_ref().unwrap().set(3);
    drop(one);
    assert_eq!(verified(&two), [0, 2, 3]);
    drop(two);
    assert_eq!(verified(&world.attach(&layer)), [0, 2, 3]);
}

#[test]
fn whoever_writes_to_the_file_ends_it() {
    let layer = bytes(0);
    let changes: [(&str, Change); 5] = [
        ("a byte", |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(b"x", 5).unwrap();
        }),
        ("a byte, and its old time", |path| {
            let modified = std::fs::metadata(path).unwrap().modified().unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(b"x", 5).unwrap();
            file.set_modified(modified).unwrap();
        }),
        ("its length", |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            let len = file.metadata().unwrap().len();
            file.set_len(len - 1).unwrap();
            file.set_len(len).unwrap();
        }),
        ("a copy in its place", |path| {
            let copy = path.with_extension("copy");
            std::fs::copy(path, &copy).unwrap();
            std::fs::rename(copy, path).unwrap();
        }),
        ("no file", |path| std::fs::remove_file(path).unwrap()),
    ];
    std::thread::scope(|scope| {
        for (what, change) in changes {
            let layer = &layer;
            scope.spawn(move || {
                let world = World::new();
                world.first_device(layer);
                change(&world.data_file(layer));
                assert_eq!(verified(&world.attach(layer)), NONE, "{what}");
                assert_eq!(verified(&world.attach(layer)), NONE, "{what}, later");
            });
        }
    });
}

#[test]
fn a_file_that_was_just_written_is_verified_again() {
    let (world, layer) = (World::new(), bytes(0));
    let content = world.attach(&layer);
    let cache = content.cache.get().unwrap();
    cache.put(TarOffset(0), &layer);
    cache.commit().unwrap();
    verify(&content);
    assert!(!cache.file_state().unwrap().is_settled());
    drop(content);
    assert_eq!(verified(&world.attach(&layer)), NONE);
}

#[test]
fn other_digests_verify_for_themselves() {
    let (world, layer, other) = (World::new(), bytes(0), bytes(1));
    world.first_device(&layer);
    assert_eq!(verified(&world.attach(&other)), NONE);
    // What one index vouches for was not what the other one did.
    assert_eq!(verified(&world.attach(&layer)), NONE);
}

#[test]
fn another_process_verifies_for_itself() {
    let (world, layer) = (World::new(), bytes(0));
    world.first_device(&layer);
    let other = Contents::new(Arc::new(MemoryCache::new(1 << 20)));
    assert_eq!(verified(&other.of(&source(&layer), Some(&world.disk))), NONE);
    assert_eq!(verified(&world.attach(&layer)), [0, 2]);
}

#[test]
fn a_poisoned_layer_is_forgotten() {
    let (world, layer) = (World::new(), bytes(0));
    world.first_device(&layer);
    let content = world.attach(&layer);
    content.cache.get().unwrap().poison();
    drop(content);
    assert_eq!(verified(&world.attach(&layer)), NONE);
}

#[test]
fn it_takes_no_more_memory_than_it_may() {
    let (world, layer) = (World::new(), bytes(0));
    world.first_device(&layer);
    let content = world.attach(&layer);
    let cache = content.cache.get().unwrap();
    let (all, digests) = (VerifiedChunks::default(), digests(&layer));
    let key = |n: u32| LayerKey::of_content(&n.to_string(), 1);
    let big = || {
        let bits = Bits::new(8 << 20);
        bits.set(7);
        bits
    };
    for n in 0..20 {
        all.remember(key(n), &digests, cache, big());
        all.remember(key(n), &digests, cache, big());
        let inner = all.0.lock().unwrap();
        assert_eq!(inner.order.len(), inner.by_key.len());
        assert_eq!(inner.bytes, inner.by_key.values().map(Entry::bytes).sum::<u64>());
        assert!(inner.bytes <= MOST_BYTES);
    }
    assert!(all.recall(key(0), &digests, cache).is_none());
    assert!(all.recall(key(19), &digests, cache).unwrap().has(7));
    assert!(all.recall(key(19), &digests, cache).is_none());
    // One alone that is too big.
    all.remember(key(30), &digests, cache, Bits::new(u32::MAX));
    assert_eq!(all.0.lock().unwrap().bytes, 7 * (EACH + (1 << 20)) - (EACH + (1 << 20)));
}

/// Where the kernel keeps files as they are ([`verity::test_dir`]).
#[test]
fn what_the_kernel_keeps_another_process_need_not_verify() {
    let Some((dir, _)) = verity::test_dir() else { return };
    let layer = bytes(0);
    let world = World::at(dir);
    world.first_device(&layer);
    let content = world.attach(&layer);
    let cache = content.cache.get().unwrap();
    let all = fingerprint(&digests(&layer));
    assert_eq!(
        cache.protect(all, &mut |_, _| Some(true)).unwrap(),
        Protected::Yes,
        "the filesystem protects nothing"
    );
    drop(content);
    let other = || Contents::new(Arc::new(MemoryCache::new(1 << 20)));
    let again = other().of(&source(&layer), Some(&world.disk));
    assert_eq!(verified(&again), [0, 1, 2, 3]);
    drop(again);
    // Held to other digests, it is what another index says of it that counts.
    let lie = other().of(&source(&bytes(1)), Some(&world.disk));
    assert_eq!(verified(&lie), NONE);
}
