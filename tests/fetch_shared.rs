//! Devices of one pool that have layers in common: what one fetches is there for the other, whoever asks, and what one takes for
//! right by an index that lies is never read by the other.

mod common;
mod fetched;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::noise::noise;
use common::wait::wait_until;
use fetched::{at_origin, hammer, joined, leave, quick, range, read, u};
use tarblk::internals::bench::origin::{Fault, Origin};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache, LayerKey};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::fetch::{FetchError, FetchPool, Fetcher, LayerSource, OpenOptions, PoolOptions, Verifier, Wait};
use tarblk::internals::index::ChunkHasher;
use tarblk::internals::source::LayerSpec;

const SIZE: usize = 3_000_321;
const CHUNK: usize = 32 << 10;

fn pool(memory_bytes: u64, store: Option<&Path>) -> FetchPool {
    let quick = quick();
    FetchPool::start(PoolOptions {
        memory_bytes,
        timeouts: quick.timeouts,
        slowest_body: quick.slowest_body,
        store: store.map(|dir| DiskCache::open(dir, CacheLimit::bytes(1 << 40)).unwrap()),
        ..PoolOptions::default()
    })
    .unwrap()
}

fn roomy() -> FetchPool {
    pool(64 << 20, None)
}

fn open(pool: &FetchPool, layer: LayerSource, prefetch: bool) -> Fetcher {
    let options = OpenOptions {
        deadline: Duration::from_secs(60),
        prefetch,
        ..OpenOptions::default()
    };
    pool.open(vec![layer], options, None).unwrap()
}

/// A layer that is cached under the digest of `named`, at `path` of `origin`, by an index that is right for `right`.
fn layer(origin: &Origin, path: &str, named: &[u8], right: &[u8]) -> LayerSource {
    let mut hasher = ChunkHasher::new();
    hasher.feed(right);
    LayerSource {
        layer: LayerSpec {
            cached_as: Some(Digest::of(Algorithm::Sha256, named).to_string()),
            ..at_origin(origin, path, SIZE).into()
        },
        coding: None,
        verifier: Some(Verifier::chunk_digests(hasher.finish())),
        unproven: None,
    }
}

/// Body bytes that the origin has sent for `path`.
fn sent(origin: &Origin, path: &str) -> u64 {
    origin.settle();
    let events = origin.log().events;
    events
        .iter()
        .filter(|event| event.path == path)
        .map(|event| event.bytes)
        .sum()
}

#[test]
fn a_shared_layer_is_fetched_once_for_three_devices() {
    let (base, own) = (Arc::new(noise(SIZE, 1)), Arc::new(noise(SIZE, 2)));
    let origin = Origin::start().unwrap();
    origin.serve_blob("/base", base.as_slice());
    origin.serve_blob("/own", own.as_slice());
    let pool = roomy();
    let first = open(&pool, layer(&origin, "/base", &base, &base), true);
    let second = open(&pool, layer(&origin, "/base", &base, &base), true);
    let third = open(&pool, layer(&origin, "/own", &own, &own), true);
    std::thread::scope(|scope| {
        for (fetcher, data) in [(&first, &base), (&second, &base), (&third, &own)] {
            scope.spawn(|| hammer(fetcher, data, 30));
        }
    });
    for (fetcher, data) in [(&first, &base), (&second, &base), (&third, &own)] {
        assert!(read(fetcher, 0, SIZE).unwrap() == **data);
        let stats = fetcher.stats();
        assert_eq!((stats.read_errors, stats.in_flight, stats.chunks_wrong), (0, 0, 0));
    }
    // Requests bridge over gaps of chunks that are here; twice would be far more.
    let fetched = sent(&origin, "/base");
    assert!(fetched >= u(SIZE) && fetched < u(SIZE + SIZE / 4), "{fetched}");
    // Once in memory as well.
    assert_eq!(pool.stats().bytes_memory, 2 * u(SIZE));
    drop((first, third));
    wait_until("that one device is left", || pool.stats().devices == 1);
    assert_eq!(
        pool.stats().bytes_memory,
        u(SIZE),
        "what is shared stays for the others"
    );
    assert!(read(&second, 0, SIZE).unwrap() == *base);
    // Who comes later finds all of it.
    let fourth = open(&pool, layer(&origin, "/base", &base, &base), true);
    hammer(&fourth, &base, 10);
    assert_eq!((sent(&origin, "/base"), fourth.stats().requests), (fetched, 0));
}

/// A device of `layer`, which is `data`, that reads all of it chunk by chunk: how many it need not compare with digests, since the process has.
fn known(pool: &FetchPool, layer: LayerSource, data: &[u8]) -> usize {
    let fetcher = open(pool, layer, false);
    let mut known = 0;
    for (at, right) in (0..).step_by(CHUNK).zip(data.chunks(CHUNK)) {
        let mut target = vec![0; right.len()];
        if fetcher.read_at_once(range(at, right.len()), &mut target) {
            known += 1;
        } else {
            target = read(&fetcher, at, right.len()).unwrap();
        }
        assert!(target == right, "chunk at {at}");
    }
    drop(fetcher);
    wait_until("that the device is gone", || pool.stats().devices == 0);
    known
}

#[test]
fn what_one_device_verified_the_next_one_of_the_process_need_not() {
    let data = noise(SIZE, 4);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/layer", data.as_slice());
    let layer = || layer(&origin, "/layer", &data, &data);
    let store = tempfile::tempdir().unwrap();
    let pool_of = || pool(1 << 20, Some(store.path()));
    let all = SIZE.div_ceil(CHUNK);
    {
        let pool = pool_of();
        assert_eq!(known(&pool, layer(), &data), 0, "it comes from the network");
        // Once its file is old enough.
        let is_known = || known(&pool, layer(), &data) == all;
        wait_until("that all is known", is_known);
        let came = sent(&origin, "/layer");
        assert!(is_known());
        // A change ends that, and is found out.
        let name = format!(
            "{}.data",
            LayerKey::of_layer(&layer().layer, false, u(SIZE)).unwrap().hex()
        );
        let path = store.path().join(name);
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1_000_000).unwrap();
        file.write_all_at(&[byte[0] ^ 8], 1_000_000).unwrap();
        assert_eq!(known(&pool, layer(), &data), 0);
        assert!(sent(&origin, "/layer") > came);
        wait_until("that all is known again", is_known);
        // The times are as they were, but for the one that nobody can set.
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(&[byte[0] ^ 8], 1_000_000).unwrap();
        file.set_modified(modified).unwrap();
        assert_eq!(known(&pool, layer(), &data), 0);
        wait_until("that all is known at last", is_known);
        // Other digests are another matter, even if only one chunk is said to be different.
        let mut other = data.clone();
        other[SIZE - 1] ^= 1;
        let lie = self::layer(&origin, "/layer", &data, &other);
        assert_eq!(known(&pool, lie, &data[..SIZE - CHUNK]), 0);
        wait_until("that all is known after all", is_known);
    }
    let came = sent(&origin, "/layer");
    assert_eq!(
        known(&pool_of(), layer(), &data),
        0,
        "another process verifies for itself"
    );
    assert_eq!(sent(&origin, "/layer"), came);
}

#[test]
fn a_chunk_has_one_flight_whichever_device_asks() {
    let data = noise(SIZE, 1);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/base", data.as_slice());
    origin.set_faults(|_| vec![Fault::Delay(Duration::from_millis(300))]);
    let pool = roomy();
    let devices: Vec<_> = (0..5)
        .map(|_| open(&pool, layer(&origin, "/base", &data, &data), false))
        .collect();
    let told: Vec<_> = devices
        .iter()
        .map(|device| leave(device, range(1_000_000, 50_000)))
        .collect();
    for told in told {
        assert!(joined(&told.recv().unwrap().unwrap()) == data[1_000_000..1_050_000]);
    }
    let requests: u64 = devices.iter().map(|device| device.stats().requests).sum();
    assert_eq!((requests, sent(&origin, "/base")), (1, 3 * 32_768));
}

#[test]
fn who_follows_asks_itself_when_the_other_closes_or_fails() {
    let data = noise(SIZE, 1);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/base", data.as_slice());
    for closes in [true, false] {
        let pool = roomy();
        let first = open(&pool, layer(&origin, "/base", &data, &data), false);
        let second = open(&pool, layer(&origin, "/base", &data, &data), false);
        // The first request gets no answer, all others do.
        let (seen, silent) = (origin.counters().requests, Fault::Silence);
        origin.set_faults(move |request| {
            if request.number == seen {
                vec![silent.clone()]
            } else {
                Vec::new()
            }
        });
        let lost = leave(&first, range(70_000, 10));
        wait_until("that the first asks", || origin.counters().requests > seen);
        let follows = leave(&second, range(70_010, 20));
        wait_until("that the second waits", || second.stats().in_flight == 1);
        if closes {
            assert_eq!(origin.counters().requests, seen + 1, "it follows");
            first.shutdown();
            assert!(matches!(lost.recv(), Ok(Err(FetchError::Stopped))));
        }
        assert!(joined(&follows.recv().unwrap().unwrap()) == data[70_010..70_030]);
        if !closes {
            assert!(joined(&lost.recv().unwrap().unwrap()) == data[70_000..70_010]);
        }
    }
}

#[test]
fn no_device_waits_for_the_server_of_another() {
    let data = noise(SIZE, 1);
    let (silent, good) = (Origin::start().unwrap(), Origin::start().unwrap());
    silent.serve_blob("/base", data.as_slice());
    good.serve_blob("/base", data.as_slice());
    silent.set_faults(|_| vec![Fault::Silence]);
    let pool = roomy();
    let first = open(&pool, layer(&silent, "/base", &data, &data), true);
    let waiting: Vec<_> = (0..SIZE / 100_000)
        .map(|n| leave(&first, range(n * 100_000, 100_000)))
        .collect();
    wait_until("that it is asked", || first.stats().requests > 0);
    let second = open(&pool, layer(&good, "/base", &data, &data), true);
    assert!(read(&second, 0, SIZE).unwrap() == data);
    assert_eq!((second.stats().errors, second.stats().retries), (0, 0));
    assert!(waiting.iter().all(|told| told.try_recv().is_err()));
    // What it brought is there for the other one as well.
    assert!(read(&first, 0, SIZE).unwrap() == data);
}

#[test]
fn an_index_that_lies_is_believed_by_its_own_device_alone() {
    let (honest, forged) = (Arc::new(noise(SIZE, 1)), Arc::new(noise(SIZE, 2)));
    let (right, wrong) = (Origin::start().unwrap(), Origin::start().unwrap());
    right.serve_blob("/base", honest.as_slice());
    wrong.serve_blob("/base", forged.as_slice());
    let dir = tempfile::tempdir().unwrap();
    for lies_first in [true, false] {
        // Little memory: what is read comes from the disk cache, again and again.
        let pool = pool(1 << 20, Some(dir.path()));
        let honest_layer = || layer(&right, "/base", &honest, &honest);
        let forged_layer = || layer(&wrong, "/base", &honest, &forged);
        let (believed, deceived) = if lies_first {
            let deceived = open(&pool, forged_layer(), true);
            assert!(read(&deceived, 0, SIZE).unwrap() == *forged);
            (open(&pool, honest_layer(), true), deceived)
        } else {
            let believed = open(&pool, honest_layer(), true);
            assert!(read(&believed, 0, SIZE).unwrap() == *honest);
            (believed, open(&pool, forged_layer(), true))
        };
        std::thread::scope(|scope| {
            scope.spawn(|| hammer(&believed, &honest, 30));
            scope.spawn(|| hammer(&deceived, &forged, 30));
        });
        for _ in 0..2 {
            assert!(read(&deceived, 0, SIZE).unwrap() == *forged);
            assert!(read(&believed, 0, SIZE).unwrap() == *honest);
        }
    }
}

#[test]
fn a_server_that_forges_spoils_its_own_device_alone() {
    let (honest, forged) = (Arc::new(noise(SIZE, 1)), noise(SIZE, 2));
    let (right, wrong) = (Origin::start().unwrap(), Origin::start().unwrap());
    right.serve_blob("/base", honest.as_slice());
    wrong.serve_blob("/base", forged.as_slice());
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(1 << 20, Some(dir.path()));
    let good = open(&pool, layer(&right, "/base", &honest, &honest), true);
    assert!(read(&good, 0, 500_000).unwrap() == honest[..500_000]);
    let options = OpenOptions {
        wrong_for: Duration::from_millis(100),
        ..OpenOptions::default()
    };
    let bad = pool
        .open(vec![layer(&wrong, "/base", &honest, &honest)], options, None)
        .unwrap();
    let outcome = bad.read_blocking(vec![range(2_000_000, 10)]);
    assert!(matches!(outcome, Err(FetchError::Poisoned { .. })), "{outcome:?}");
    hammer(&good, &honest, 20);
    assert!(read(&good, 0, SIZE).unwrap() == *honest);
    let stats = good.stats();
    assert_eq!((stats.read_errors, stats.layers_poisoned), (0, 0));
    // What it keeps is kept.
    wait_until("that all is on disk", || good.stats().bytes_held == u(SIZE));
}

/// What a device waits for is said of it and of those that wait for the same request, and of no other.
#[test]
fn waits_are_those_of_the_devices_that_wait() {
    let base = Arc::new(noise(SIZE, 4));
    let (silent, fine) = (Origin::start().unwrap(), Origin::start().unwrap());
    for origin in [&silent, &fine] {
        origin.serve_blob("/base", base.as_slice());
    }
    silent.set_faults(|_: &_| vec![Fault::Silence]);
    let pool = FetchPool::start(PoolOptions::default()).unwrap();
    let open = |layer| {
        let options = OpenOptions {
            deadline: Duration::MAX,
            prefetch: false,
            ..OpenOptions::default()
        };
        pool.open(vec![layer], options, None).unwrap()
    };
    let waits = |fetcher: &Fetcher| fetcher.stats().waiting;
    let [first, second] = [(), ()].map(|()| open(layer(&silent, "/base", &base, &base)));
    let other = open(layer(&fine, "/base", &base[..1], &base));
    let asked = leave(&first, range(0, 4096));
    wait_until("that the first asks", || silent.counters().requests > 0);
    let followed = leave(&second, range(0, 4096));
    wait_until("that both are said to wait", || {
        [&first, &second].iter().all(|fetcher| !waits(fetcher).is_empty())
    });
    assert_eq!(waits(&first)[0].place, silent.url("/base"));
    assert_eq!(waits(&second)[0].place, silent.url("/base"));
    assert_eq!(second.stats().requests, 0, "it waits for the other's request");
    assert!(read(&other, 0, 4096).unwrap() == base[..4096]);
    assert!(waits(&other).is_empty(), "{:?}", waits(&other));
    // Who is left waits for itself.
    silent.set_faults(|_: &_| vec![Fault::Status(503, Some(3600))]);
    first.shutdown();
    assert!(matches!(asked.recv().unwrap(), Err(FetchError::Stopped)));
    wait_until("that the second asks itself", || {
        let told = |wait: &Wait| wait.why.contains("503") && wait.left_ms > 3_000_000;
        waits(&second).iter().any(told)
    });
    assert!(waits(&first).is_empty(), "{:?}", waits(&first));
    assert!(waits(&other).is_empty(), "{:?}", waits(&other));
    second.shutdown();
    assert!(matches!(followed.recv().unwrap(), Err(FetchError::Stopped)));
}
