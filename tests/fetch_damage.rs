//! The fetcher above a disk cache whose files are damaged, while it runs and between two runs: whatever is wrong with them is found
//! when it is read back, counted and fetched again, with and without an index's digests.

mod common;
mod fetched;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::noise::noise;
use fetched::{at_origin, hammer, in_state, quick, read, sha256, u};
use tarblk::internals::bench::origin::Origin;
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{FetchOptions, Fetcher, LayerSource, Verifier};
use tarblk::internals::http::Validator;

const SIZE: usize = 5_000_321;
const CHUNK: usize = 32 << 10;

/// A layer behind an origin, in a state that its cache outlives a process in.
struct Served {
    origin: Origin,
    data: Arc<Vec<u8>>,
    digests: bool,
}

impl Served {
    fn new(digests: bool) -> Self {
        let data = Arc::new(noise(SIZE, 3));
        let origin = Origin::start().unwrap();
        origin.serve_blob("/layer.tar", data.as_slice());
        Self { origin, data, digests }
    }

    fn layer(&self) -> LayerSource {
        let blob = in_state(
            at_origin(&self.origin, "/layer.tar", SIZE),
            // Not the origin's own: a request that names it is answered with all of the layer.
            Validator::LastModified("Thu, 01 Jan 2026 00:00:00 GMT".to_owned()),
        );
        let digests: Vec<_> = self.data.chunks(CHUNK).map(sha256).collect();
        let verifier = self
            .digests
            .then(|| Verifier::chunks(move |index, bytes| digests[usize::try_from(index).unwrap()] == sha256(bytes)));
        LayerSource {
            verifier,
            ..LayerSource::from(blob)
        }
    }

    fn start(&self, store: &Path) -> Fetcher {
        let options = FetchOptions {
            store: Some(DiskCache::open(store, CacheLimit::bytes(1 << 40)).unwrap()),
            ..quick()
        };
        Fetcher::start(vec![self.layer()], options, None).unwrap()
    }

    /// A fetcher whose disk cache holds all of the layer.
    fn filled(&self, store: &Path) -> Fetcher {
        let fetcher = self.start(store);
        assert!(read(&fetcher, 0, SIZE).unwrap() == *self.data);
        let whole = (0..600).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            fetcher.stats().bytes_held == u(SIZE)
        });
        assert!(whole, "{:?}", fetcher.stats());
        fetcher
    }
}

fn data_file(store: &Path) -> PathBuf {
    let mut found = std::fs::read_dir(store).unwrap().map(|entry| entry.unwrap().path());
    found
        .find(|path| path.extension().is_some_and(|kind| kind == "data"))
        .unwrap()
}

/// How a data file can be damaged, and how many chunks that spoils.
type Damage = (&'static str, fn(&File) -> u64);

const DAMAGES: [Damage; 5] = [
    ("flipped", |file| {
        // A bit in every third chunk.
        let chunks = (0..SIZE.div_ceil(CHUNK)).step_by(3);
        for chunk in chunks.clone() {
            let at = u((chunk * CHUNK + chunk * 991 % CHUNK).min(SIZE - 1));
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << (chunk % 8))], at).unwrap();
        }
        u(chunks.count())
    }),
    ("truncated", |file| {
        file.set_len(u(40 * CHUNK + 100)).unwrap();
        u(SIZE.div_ceil(CHUNK) - 40)
    }),
    ("emptied", |file| {
        file.set_len(0).unwrap();
        u(SIZE.div_ceil(CHUNK))
    }),
    ("zeroed", |file| {
        file.write_all_at(&vec![0; 10 * CHUNK], u(7 * CHUNK)).unwrap();
        10
    }),
    ("shifted", |file| {
        // Right chunks in wrong places.
        let mut chunk = vec![0; CHUNK];
        for index in (0..20).rev() {
            file.read_exact_at(&mut chunk, u(index * CHUNK)).unwrap();
            file.write_all_at(&chunk, u((index + 1) * CHUNK)).unwrap();
        }
        20
    }),
];

#[test]
fn damage_under_a_running_fetcher_is_found_and_mended() {
    for digests in [true, false] {
        let served = Served::new(digests);
        for (name, harm) in DAMAGES {
            let name = format!("{name}, digests: {digests}");
            let store = tempfile::tempdir().unwrap();
            let fetcher = served.filled(store.path());
            let file = File::options()
                .read(true)
                .write(true)
                .open(data_file(store.path()))
                .unwrap();
            let spoiled = harm(&file);
            hammer(&fetcher, &served.data, 100);
            assert!(read(&fetcher, 0, SIZE).unwrap() == *served.data, "{name}: wrong bytes");
            let stats = fetcher.stats();
            assert_eq!(
                (stats.read_errors, stats.layers_poisoned, stats.in_flight),
                (0, 0, 0),
                "{name}: {stats:?}"
            );
            // Memory holds a fifth of the layer, which was not read back.
            assert!(
                stats.cache_damaged <= spoiled && stats.cache_damaged >= spoiled.saturating_sub(32).max(1),
                "{name}: {spoiled} chunks are damaged: {stats:?}"
            );
            assert!(stats.bytes_fetched > u(SIZE), "{name}: {stats:?}");
        }
    }
}

#[test]
fn damage_between_two_runs_is_found_and_mended() {
    for digests in [true, false] {
        let served = Served::new(digests);
        for (name, harm) in DAMAGES {
            let name = format!("{name}, digests: {digests}");
            let store = tempfile::tempdir().unwrap();
            served.filled(store.path()).shutdown();
            let file = File::options()
                .read(true)
                .write(true)
                .open(data_file(store.path()))
                .unwrap();
            harm(&file);
            let fetcher = served.start(store.path());
            assert!(read(&fetcher, 0, SIZE).unwrap() == *served.data, "{name}: wrong bytes");
            let stats = fetcher.stats();
            assert_eq!((stats.read_errors, stats.layers_poisoned), (0, 0), "{name}: {stats:?}");
            assert!(stats.bytes_fetched > 0, "{name}: {stats:?}");
        }
    }
}

#[test]
fn what_is_right_is_read_back_without_the_origin() {
    for digests in [true, false] {
        let served = Served::new(digests);
        let store = tempfile::tempdir().unwrap();
        served.filled(store.path()).shutdown();
        let fetcher = served.start(store.path());
        hammer(&fetcher, &served.data, 100);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.bytes_fetched, stats.cache_damaged, stats.read_errors),
            (0, 0, 0),
            "digests: {digests}: {stats:?}"
        );
        assert!(stats.bytes.disk > 0, "{stats:?}");
    }
}
