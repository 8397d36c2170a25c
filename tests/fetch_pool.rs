//! Fetchers of one pool: they share a thread, connections and memory, and nothing that goes wrong.

mod common;
mod fetched;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::noise::noise;
use common::wait::wait_until;
use fetched::{Outcome, at_origin, hammer, joined, leave, quick, range, read, u};
use tarblk::internals::bench::origin::{Fault, Origin};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{
    FetchError, FetchPool, Fetcher, HintStats, LayerRange, LayerSource, OpenOptions, PoolOptions, ReadCallback,
    Verifier,
};
use tarblk::internals::image::{DirectoryId, FileId, FileMap, StoredFile};
use tarblk::internals::prefetch::ChunkRange;
use tarblk::internals::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

const SIZE: usize = 3_000_321;

/// Threads and memory are the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options() -> PoolOptions {
    let quick = quick();
    PoolOptions {
        memory_bytes: quick.memory_bytes,
        timeouts: quick.timeouts,
        slowest_body: quick.slowest_body,
        ..PoolOptions::default()
    }
}

fn patient() -> OpenOptions {
    OpenOptions {
        deadline: Duration::from_secs(3600),
        ..OpenOptions::default()
    }
}

fn open(pool: &FetchPool, layers: Vec<LayerSource>) -> Fetcher {
    pool.open(layers, patient(), None).unwrap()
}

fn served(origin: &Origin, path: &str, seed: u64) -> (LayerSource, Arc<Vec<u8>>) {
    let data = Arc::new(noise(SIZE, seed));
    origin.serve_blob(path, data.as_slice());
    (at_origin(origin, path, SIZE).into(), data)
}

fn fetch_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    tasks
        .filter_map(name)
        .filter(|name| name.trim_end() == "tarblk-fetch")
        .count()
}

/// Memory of this process that no file backs, in bytes.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn a_hundred_devices_are_one_thread_and_little_memory() {
    const DEVICES: u64 = 100;
    let _alone = alone();
    wait_until("that other tests' threads have ended", || fetch_threads() == 0);
    let origin = Origin::start().unwrap();
    let (layer, data) = served(&origin, "/layer", 1);
    let pool = FetchPool::start(options()).unwrap();
    // What the first one brings is there for all.
    let first = open(&pool, vec![at_origin(&origin, "/layer", SIZE).into()]);
    assert!(read(&first, 0, SIZE).unwrap() == *data);
    let before = anonymous();
    let fetchers: Vec<Fetcher> = (0..DEVICES)
        .map(|_| {
            let layers = (0..10).map(|_| LayerSource::from(layer.layer.blob.clone()));
            open(&pool, layers.collect())
        })
        .collect();
    for fetcher in &fetchers {
        assert!(read(fetcher, 5000, 100_000).unwrap() == data[5000..105_000]);
    }
    let each = anonymous().saturating_sub(before) / DEVICES;
    assert!(each < 1 << 20, "{each} bytes for each device");
    assert_eq!(fetch_threads(), 1);
    assert_eq!(pool.stats().devices, DEVICES + 1);
    // Connections are the host's.
    assert!(pool.stats().connections <= u(PoolOptions::default().connections));
    drop((fetchers, first));
    wait_until("that all engines have ended", || pool.stats().devices == 0);
    assert_eq!(fetch_threads(), 1, "the pool keeps the thread");
    assert_eq!(
        pool.stats().connections,
        0,
        "the last user of a host closes its connections"
    );
    drop(pool);
    wait_until("that the thread has ended", || fetch_threads() == 0);
}

#[test]
fn the_bound_of_memory_holds_over_all_devices() {
    let _alone = alone();
    let origin = Origin::start().unwrap();
    let pool = FetchPool::start(options()).unwrap();
    let most = options().memory_bytes;
    let devices: Vec<_> = (0..4)
        .map(|seed| {
            let (layer, data) = served(&origin, &format!("/layer{seed}"), seed);
            (open(&pool, vec![layer]), data)
        })
        .collect();
    std::thread::scope(|scope| {
        let readers: Vec<_> = devices
            .iter()
            .map(|(fetcher, data)| scope.spawn(|| hammer(fetcher, data, 20)))
            .collect();
        while !readers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            assert!(pool.stats().bytes_memory <= most, "{:?}", pool.stats());
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let full = pool.stats().bytes_memory;
    assert!(full > most / 2 && full <= most, "{full}");
    let mut devices = devices.into_iter();
    let (last, data) = devices.next().unwrap();
    drop(devices);
    wait_until("that the others have ended", || pool.stats().devices == 1);
    assert!(read(&last, 0, 200_000).unwrap() == data[..200_000]);
    drop(last);
    wait_until("that the last has ended", || pool.stats().devices == 0);
    assert_eq!(pool.stats().bytes_memory, 0, "what a device held is given back");
}

#[test]
fn closing_one_ends_its_reads_and_no_others() {
    let _alone = alone();
    let origin = Origin::start().unwrap();
    let (silent, _) = served(&origin, "/silent", 1);
    let (slow, data) = served(&origin, "/slow", 2);
    origin.set_faults(|request| match request.path.as_str() {
        "/silent" => vec![Fault::Silence],
        _ => vec![Fault::Delay(Duration::from_millis(200))],
    });
    let pool = FetchPool::start(options()).unwrap();
    for by_dropping in [false, true] {
        let closed = open(&pool, vec![silent.layer.blob.clone().into()]);
        let other = open(&pool, vec![slow.layer.blob.clone().into()]);
        let (lost, kept) = (leave(&closed, range(0, 100)), leave(&other, range(7, 100_000)));
        wait_until("that both were asked for", || {
            closed.stats().requests > 0 && other.stats().requests > 0
        });
        if by_dropping {
            drop(closed);
        } else {
            closed.shutdown();
            assert!(matches!(
                closed.read_blocking(vec![range(0, 1)]),
                Err(FetchError::Stopped)
            ));
        }
        assert!(matches!(lost.recv(), Ok(Err(FetchError::Stopped))));
        assert!(joined(&kept.recv().unwrap().unwrap()) == data[7..100_007]);
        assert_eq!((other.stats().in_flight, other.stats().read_errors), (0, 0));
        wait_until("that one is left", || pool.stats().devices == 1);
    }
}

#[test]
fn a_server_that_fails_delays_no_other_device() {
    let _alone = alone();
    let (bad, good) = (Origin::start().unwrap(), Origin::start().unwrap());
    let (never, _) = served(&bad, "/layer", 1);
    let (layer, data) = served(&good, "/layer", 2);
    let faults = [Fault::Silence, Fault::Status(500, Some(1)), Fault::ShortBody(1 << 30)];
    for fault in faults {
        bad.set_faults(move |_| vec![fault.clone()]);
        let pool = FetchPool::start(options()).unwrap();
        let waits = open(&pool, vec![never.layer.blob.clone().into()]);
        let waiting: Vec<_> = (0..40).map(|n| leave(&waits, range(n * 70_000, 10))).collect();
        wait_until("that the bad server was asked", || waits.stats().requests > 0);
        let other = open(&pool, vec![layer.layer.blob.clone().into()]);
        let mut at = 0;
        while at < SIZE {
            let len = 65_536.min(SIZE - at);
            assert!(read(&other, at, len).unwrap() == data[at..at + len]);
            at += len;
        }
        let stats = other.stats();
        assert!(stats.bytes_prefetched > 0, "nothing was read ahead of it: {stats:?}");
        assert_eq!((stats.errors, stats.retries), (0, 0));
        assert!(waiting.iter().all(|told| told.try_recv().is_err()));
    }
}

#[test]
fn whole_layers_are_fetched_only_while_no_device_reads() {
    let _alone = alone();
    let origin = Origin::start().unwrap();
    let (filled, _) = served(&origin, "/filled", 1);
    let (layer, data) = served(&origin, "/read", 2);
    for _attempt in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let store = Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap());
        let pool = FetchPool::start(PoolOptions { store, ..options() }).unwrap();
        let reads = open(&pool, vec![layer.layer.blob.clone().into()]);
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        let mut read_on = |times: usize| {
            for n in 0..times {
                let at = n * 37_000 % (SIZE - 1000);
                let slices = reads.read_blocking(vec![range(at, 1000)]).unwrap();
                assert!(joined(&slices) == data[at..at + 1000]);
                longest = longest.max(last.elapsed());
                last = Instant::now();
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        read_on(1);
        let fetch_all = OpenOptions {
            fetch_all: true,
            ..patient()
        };
        let fills = pool
            .open(vec![filled.layer.blob.clone().into()], fetch_all, None)
            .unwrap();
        read_on(300);
        let filled_meanwhile = fills.stats().bytes_filled;
        wait_until("that all is there", || fills.stats().bytes_held == u(SIZE));
        assert!(fills.stats().bytes_filled >= u(SIZE));
        // On a machine so busy that the reader itself paused it says nothing.
        if longest < Duration::from_millis(150) {
            assert_eq!(filled_meanwhile, 0);
            return;
        }
    }
    panic!("the machine is too busy to tell");
}

/// A map of files that panics when it is asked.
#[derive(Debug)]
struct BadMap(Arc<AtomicBool>);

impl FileMap for BadMap {
    fn file_at(&self, _: LayerId, _: TarOffset) -> Option<StoredFile> {
        assert!(!self.0.load(Ordering::Relaxed), "a test's panic: the file map");
        None
    }

    fn neighbours(&self, _: FileId, _: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {}

    fn resolve(&self, _: DirectoryId, _: &[u8]) -> Option<StoredFile> {
        None
    }

    fn path(&self, _: FileId) -> Option<Vec<u8>> {
        None
    }
}

/// A device beside which another one panics.
struct Bystander {
    fetcher: Fetcher,
    data: Arc<Vec<u8>>,
    origin: Origin,
}

impl Bystander {
    fn new(pool: &FetchPool) -> Self {
        let origin = Origin::start().unwrap();
        let (layer, data) = served(&origin, "/bystander", 9);
        origin.set_faults(|_| vec![Fault::Delay(Duration::from_millis(300))]);
        Self {
            fetcher: open(pool, vec![layer]),
            data,
            origin,
        }
    }

    /// Has a read in flight while `other` does what it does, and reads on.
    fn beside(&self, other: impl FnOnce()) {
        let asked = LayerRange {
            layer: LayerId(0),
            range: TarRange::new(TarOffset(1_000_000), 50_000),
        };
        let told = leave(&self.fetcher, asked);
        other();
        assert!(joined(&told.recv().unwrap().unwrap()) == self.data[1_000_000..1_050_000]);
        self.origin.clear_faults();
        hammer(&self.fetcher, &self.data, 5);
        assert_eq!(self.fetcher.stats().read_errors, 0);
    }
}

#[test]
fn an_engine_that_panics_ends_alone() {
    let _alone = alone();
    let pool = FetchPool::start(options()).unwrap();
    let bystander = Bystander::new(&pool);
    let origin = Origin::start().unwrap();
    let (layer, data) = served(&origin, "/layer", 1);
    let panics = Arc::new(AtomicBool::new(false));
    let map = Arc::new(BadMap(panics.clone()));
    let fetcher = pool
        .open(vec![layer.layer.blob.clone().into()], patient(), Some(map))
        .unwrap();
    assert!(read(&fetcher, 0, 1000).unwrap() == data[..1000]);
    origin.set_faults(|_| vec![Fault::Silence]);
    let waits = leave(&fetcher, range(2_000_000, 10));
    wait_until("that it is asked for", || fetcher.stats().requests > 1);
    bystander.beside(|| {
        panics.store(true, Ordering::Relaxed);
        let outcome = fetcher.read_blocking(vec![range(1_000_000, 1000)]);
        assert!(matches!(outcome, Err(FetchError::Stopped)), "{outcome:?}");
        assert!(matches!(waits.recv(), Ok(Err(FetchError::Stopped))));
        assert!(matches!(
            fetcher.read_blocking(vec![range(0, 2_000_000)]),
            Err(FetchError::Stopped)
        ));
    });
    assert_eq!(pool.stats().devices, 1);
    fetcher.shutdown();
    // The layer is as good as before.
    origin.clear_faults();
    let anew = open(&pool, vec![layer]);
    assert!(read(&anew, 0, SIZE).unwrap() == *data);
}

#[test]
fn a_task_that_panics_fails_its_own_reads() {
    let _alone = alone();
    let pool = FetchPool::start(options()).unwrap();
    let bystander = Bystander::new(&pool);
    let origin = Origin::start().unwrap();
    let (layer, data) = served(&origin, "/layer", 1);
    let layer = LayerSource {
        unproven: None,
        verifier: Some(Verifier::chunks(|index, _| {
            assert!(index != 40, "a test's panic: the verifier");
            true
        })),
        ..layer
    };
    let options = OpenOptions {
        prefetch: false,
        ..patient()
    };
    let fetcher = pool.open(vec![layer], options, None).unwrap();
    bystander.beside(|| {
        let outcome = fetcher.read_blocking(vec![range(40 * 32_768, 10)]);
        assert!(matches!(outcome, Err(FetchError::Stopped)), "{outcome:?}");
        // It goes on with what is right.
        assert!(read(&fetcher, 0, 1_000_000).unwrap() == data[..1_000_000]);
    });
    assert_eq!(pool.stats().devices, 2);
}

#[test]
fn a_callback_that_panics_costs_no_other_device_anything() {
    struct Panics;
    impl ReadCallback for Panics {
        fn complete(self: Box<Self>, _: Outcome) {
            panic!("a test's panic: the callback");
        }
    }
    let _alone = alone();
    let pool = FetchPool::start(options()).unwrap();
    let bystander = Bystander::new(&pool);
    let origin = Origin::start().unwrap();
    let (layer, _) = served(&origin, "/layer", 1);
    let fetcher = open(&pool, vec![layer]);
    bystander.beside(|| {
        fetcher.read(vec![range(0, 10)], Box::new(Panics));
        wait_until("that it has come", || fetcher.stats().in_flight == 0);
    });
}

/// What is fetched ahead leaves memory for the disk before it is read, and is found there: no byte is asked for again, and the guess is
/// counted as one that came true, whoever finds it.
#[test]
fn what_came_early_may_wait_on_the_disk() {
    let _alone = alone();
    let origin = Origin::start().unwrap();
    for by_fetch_thread in [false, true] {
        let (layer, data) = served(&origin, "/layer", 40);
        let store = tempfile::tempdir().unwrap();
        let pool = FetchPool::start(PoolOptions {
            // Eight chunks.
            memory_bytes: 1,
            store: Some(DiskCache::open(store.path(), CacheLimit::bytes(1 << 40)).unwrap()),
            ..options()
        })
        .unwrap();
        let fetcher = open(&pool, vec![layer]);
        let chunks = u32::try_from(u(SIZE).div_ceil(CHUNK_BYTES)).unwrap();
        fetcher.follow_profile(vec![ChunkRange {
            layer: LayerId(0),
            first: 0,
            end: chunks,
        }]);
        wait_until("that all of it is on disk", || fetcher.stats().bytes_stored == u(SIZE));
        assert!(pool.stats().bytes_memory <= 8 * CHUNK_BYTES);
        let requests = fetcher.stats().requests;
        let step = usize::try_from(CHUNK_BYTES).unwrap();
        for (at, right) in (0..).step_by(step).zip(data.chunks(step)) {
            let mut target = vec![0; right.len()];
            if by_fetch_thread || !fetcher.read_at_once(range(at, right.len()), &mut target) {
                target = read(&fetcher, at, right.len()).unwrap();
            }
            assert!(target == right, "chunk at {at}");
        }
        let counted = || {
            let hints = fetcher.stats().hints;
            let sum = |of: fn(&HintStats) -> u64| hints.iter().map(of).sum::<u64>();
            (sum(|hint| hint.fetched), sum(|hint| hint.read))
        };
        // The planner hears of them with whatever the fetch thread is told next.
        fetcher.follow_profile(Vec::new());
        let all = u64::from(chunks) * CHUNK_BYTES;
        wait_until("that the planner knows", || counted() == (all, all));
        let stats = fetcher.stats();
        assert_eq!(stats.requests, requests, "something was asked for again");
        assert_eq!((stats.prefetched_used, stats.read_errors), (all, 0));
    }
}
