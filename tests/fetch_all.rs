//! `fetch_all`: while nobody reads, everything comes; then no server is needed, and a layer that is not what it has to be is
//! found out.

mod fetched;
#[path = "common/packed.rs"]
mod packed;

use packed::gzip;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fetched::{at_origin, joined, kept_files, quick, range, u};
use tarblk::internals::bench::origin::{Fault, Origin};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::fetch::{Coded, FetchError, FetchOptions, FetchStats, Fetcher, LayerSource, Windows};
use tarblk::internals::layer::{Coding, Indexer};
use tarblk::internals::source::LayerSpec;

const SIZE: usize = 6_000_321;

/// Lines with random numbers: compresses to about a half.
fn content() -> Vec<u8> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut bytes = Vec::with_capacity(SIZE + 64);
    while bytes.len() < SIZE {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        writeln!(bytes, "a line that comes often, with {state}").unwrap();
    }
    bytes.truncate(SIZE);
    bytes
}

/// What a fetcher is told of the blob that the origin has.
fn source(origin: &Origin, blob: &[u8], [digest, diff_id]: [Option<Digest>; 2], coding: Option<Coded>) -> LayerSource {
    LayerSource {
        layer: LayerSpec {
            digest,
            diff_id,
            cached_as: Some("sha256:test".to_owned()),
            ..at_origin(origin, "/blob", blob.len()).into()
        },
        coding,
        verifier: None,
        unproven: None,
    }
}

/// Leaves the read with the fetch thread, whatever is here.
fn read(fetcher: &Fetcher, start: usize, len: usize) -> Result<Vec<u8>, FetchError> {
    Ok(joined(&fetcher.read_blocking(vec![range(start, len)])?))
}

fn start(layer: LayerSource, store: &Path) -> Fetcher {
    let options = FetchOptions {
        fetch_all: true,
        store: Some(DiskCache::open(store, CacheLimit::bytes(1 << 40)).unwrap()),
        ..quick()
    };
    Fetcher::start(vec![layer], options, None).unwrap()
}

/// Waits until `is_so`, for a minute at most.
fn wait_until(fetcher: &Fetcher, what: &str, is_so: impl Fn(&FetchStats) -> bool) -> FetchStats {
    let began = Instant::now();
    loop {
        let stats = fetcher.stats();
        if is_so(&stats) {
            return stats;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{what}: {stats:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn all_held(stats: &FetchStats) -> bool {
    stats.bytes_held == stats.bytes_layers
}

#[test]
fn in_the_end_no_server_is_needed() {
    let tar = content();
    let zipped = gzip(&tar);
    let mut indexer = Indexer::new(Coding::Gzip, 200_000);
    indexer.feed(&zipped, &mut |_| {}).unwrap();
    let spans = indexer.finish().unwrap();
    let coded = Coded {
        table: spans.table,
        windows: Windows::Memory(Arc::new(spans.windows)),
    };
    for (blob, coding) in [(&tar, None), (&zipped, Some(coded))] {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", blob.as_slice());
        let whole = [blob, &tar].map(|bytes: &Vec<u8>| Some(Digest::of(Algorithm::Sha256, bytes)));
        let fetcher = start(source(&origin, blob, whole.clone(), coding.clone()), dir.path());
        // Somebody reads meanwhile.
        assert!(read(&fetcher, 1_000_000, 300_000).unwrap() == tar[1_000_000..1_300_000]);
        let stats = wait_until(&fetcher, "not everything has come", all_held);
        assert_eq!(stats.bytes_layers, u(SIZE));
        // How much of it came with what the reader wanted is a matter of time.
        assert!(stats.bytes_filled > 0, "{stats:?}");
        // Nothing came twice but what lies around the places where decoding begins.
        assert!(stats.bytes_fetched < u(blob.len() * 5 / 4), "{stats:?}");
        origin.remove("/blob");
        origin.drop_connections();
        let asked = fetcher.stats().requests;
        assert!(read(&fetcher, 0, SIZE).unwrap() == tar);
        fetcher.shutdown();
        assert_eq!(fetcher.stats().requests, asked);
        drop(fetcher);
        // Nor by the next.
        let fetcher = start(source(&origin, blob, whole, coding), dir.path());
        assert!(read(&fetcher, 0, SIZE).unwrap() == tar);
        assert_eq!(fetcher.stats().requests, 0);
    }
}

#[test]
fn a_plain_layer_that_nobody_vouched_for_is_found_out() {
    let tar = content();
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().unwrap();
    let mut other = tar.clone();
    other[SIZE - 10] ^= 1;
    origin.serve_blob("/blob", other);
    let whole = [&tar, &tar].map(|bytes: &Vec<u8>| Some(Digest::of(Algorithm::Sha256, bytes)));
    let fetcher = start(source(&origin, &tar, whole, None), dir.path());
    let stats = wait_until(&fetcher, "nobody noticed", |stats| stats.layers_poisoned > 0);
    assert_eq!(stats.read_errors, 0, "{stats:?}");
    let error = read(&fetcher, 0, 4096).unwrap_err();
    assert!(matches!(error, FetchError::Poisoned { .. }), "{error}");
    fetcher.shutdown();
    let kept = kept_files(dir.path());
    assert!(kept.is_empty(), "{kept:?}");
}

#[test]
fn a_server_that_is_away_is_left_in_peace() {
    let tar = content();
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_blob("/blob", tar.as_slice());
    origin.set_faults(|_| vec![Fault::Status(503, None)]);
    let fetcher = start(source(&origin, &tar, [None, None], None), dir.path());
    wait_until(&fetcher, "nothing was asked", |stats| stats.requests > 0);
    std::thread::sleep(Duration::from_millis(2500));
    // One at once, one after a second, one after three: whatever the machine is busy with, there are never more.
    let stats = fetcher.stats();
    assert!(stats.requests <= 3, "{stats:?}");
    origin.clear_faults();
    wait_until(&fetcher, "it is not asked again", all_held);
    assert!(read(&fetcher, 0, SIZE).unwrap() == tar);
}
