//! The fetcher on layers that are checked piece by piece, as tables of contents have them: the pieces' bytes and nothing else,
//! whatever the server does and whatever the store holds.

mod common;
mod fetched;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::chunked::{self, Chunked};
use common::noise::noise;
use fetched::{at_origin, hammer, kept_files, quick, read, u};
use tarblk::internals::bench::origin::{Fault, Origin, at_random};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{Coded, FetchError, FetchOptions, Fetcher, LayerSource, Verifier, Windows};
use tarblk::internals::index::toc::Place;
use tarblk::internals::index::{Index, IndexBuilder, PieceDigests};
use tarblk::internals::source::LayerSpec;

fn s(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// A layer, its tar space, and its pieces.
struct Made {
    layer: Chunked,
    coded: Coded,
    pieces: PieceDigests,
    space: Arc<Vec<u8>>,
}

/// Files of every size, in pieces of every length: shorter than a chunk, longer, many in one, one in many.
fn made() -> Made {
    let mut seed = 7_u64;
    let mut below = |most: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        s((seed >> 33) % most)
    };
    let files: Vec<(String, Vec<Vec<u8>>)> = (0..150)
        .map(|number| {
            let most = [700, 5000, 40_000, 300_000][below(4)];
            let pieces = (0..=below(3))
                .map(|piece| noise(1 + below(most), u(1000 * number + piece)))
                .collect();
            (format!("file-{number}"), pieces)
        })
        .collect();
    let layer = chunked::layer(&files, |_| {});
    let len = u(layer.blob.len());
    let place = Place::of_annotations(&layer.annotations, len).unwrap();
    let stored = &layer.blob[s(place.blob.start)..s(place.blob.end)];
    let contents = place.open(stored, len, &layer.annotations).unwrap();
    assert!(contents.is_vouched() && contents.are_digests_complete());
    let index = Index::open(contents.into_index(IndexBuilder::new()).unwrap()).unwrap();
    let pieces = index.piece_digests().unwrap().clone();
    let mut space = vec![0; s(index.tar_len())];
    for (n, piece) in files.iter().flat_map(|(_, pieces)| pieces).enumerate() {
        let range = pieces.range(n);
        space[s(range.start.0)..s(range.end().0)].copy_from_slice(piece);
    }
    Made {
        layer,
        coded: Coded {
            table: index.spans().unwrap().clone(),
            windows: Windows::None,
        },
        pieces,
        space: Arc::new(space),
    }
}

impl Made {
    fn served(&self) -> Origin {
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", self.layer.blob.as_slice());
        origin
    }

    fn start(&self, origin: &Origin, store: Option<&Path>) -> Fetcher {
        let http = at_origin(origin, "/blob", self.layer.blob.len());
        let layer = LayerSource {
            coding: Some(self.coded.clone()),
            verifier: Some(Verifier::Pieces(self.pieces.clone())),
            unproven: None,
            layer: LayerSpec {
                cached_as: Some("sha256:test and its contents".to_owned()),
                ..http.into()
            },
        };
        let options = FetchOptions {
            prefetch: false,
            store: store.map(|dir| DiskCache::open(dir, CacheLimit::bytes(1 << 40)).unwrap()),
            ..quick()
        };
        Fetcher::start(vec![layer], options, None).unwrap()
    }
}

#[test]
fn a_failing_server_costs_time_and_no_bytes() {
    let made = made();
    let origin = made.served();
    let menu = vec![
        Fault::ResetWithin(10_000),
        Fault::ShortBody(3000),
        Fault::LongBody(4096),
        Fault::Status(500, None),
        Fault::WrongRange(512),
        Fault::ShortRange(512),
        Fault::Delay(Duration::from_millis(20)),
    ];
    origin.set_faults(at_random(11, 350, menu));
    let dir = tempfile::tempdir().unwrap();
    let fetcher = made.start(&origin, Some(dir.path()));
    hammer(&fetcher, &made.space, 20);
    let stats = fetcher.stats();
    assert_eq!(
        (stats.read_errors, stats.in_flight, stats.layers_poisoned),
        (0, 0, 0),
        "{stats:?}"
    );
    assert!(stats.retries > 0 && stats.chunks_checked > 0, "{stats:?}");
    fetcher.shutdown();
    drop(fetcher);
    origin.clear_faults();
    let fetcher = made.start(&origin, Some(dir.path()));
    hammer(&fetcher, &made.space, 20);
    let stats = fetcher.stats();
    assert_eq!((stats.read_errors, stats.chunks_wrong), (0, 0), "{stats:?}");
}

#[test]
fn a_server_without_ranges_is_streamed() {
    let made = made();
    let origin = made.served();
    origin.set_ranges(false);
    let fetcher = made.start(&origin, None);
    hammer(&fetcher, &made.space, 10);
    assert_eq!(fetcher.stats().chunks_wrong, 0);
}

/// Where in the blob the content of piece `n` lies, somewhere inside.
fn inside(made: &Made, n: usize) -> usize {
    let span = made
        .coded
        .table
        .span(made.coded.table.span_at(made.pieces.range(n).start));
    s(span.blob.start) + s(made.pieces.range(n).len) / 2 + 12
}

#[test]
fn a_flipped_byte_is_never_served() {
    for streamed in [false, true] {
        let made = made();
        // A long one, so that chunks come out before its end does.
        let victim = (0..made.pieces.len())
            .max_by_key(|n| made.pieces.range(*n).len)
            .unwrap();
        let mut damaged = made.layer.blob.clone();
        damaged[inside(&made, victim)] ^= 1;
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", damaged);
        origin.set_ranges(!streamed);
        let dir = tempfile::tempdir().unwrap();
        let fetcher = made.start(&origin, Some(dir.path()));
        let wrong = made.pieces.range(victim);
        let mut failed = 0;
        for at in (0..made.space.len()).step_by(10_000) {
            let len = 10_000.min(made.space.len() - at);
            match read(&fetcher, at, len) {
                Ok(bytes) => {
                    assert!(bytes == made.space[at..at + len], "wrong bytes at {at}");
                    assert!(
                        u(at + len) <= wrong.start.0 || u(at) >= wrong.end().0,
                        "{at} lies in what is wrong"
                    );
                }
                Err(error) => {
                    assert!(matches!(error, FetchError::Poisoned { .. }), "{streamed}: {error}");
                    failed += 1;
                }
            }
        }
        assert!(failed > 0, "nobody noticed");
        let stats = fetcher.stats();
        assert!(stats.chunks_wrong >= 2 && stats.layers_poisoned == 1, "{stats:?}");
        assert_eq!(kept_files(dir.path()).len(), 0, "the store still has it");
    }
}

#[test]
fn what_one_process_kept_another_proves() {
    let made = made();
    let origin = made.served();
    let dir = tempfile::tempdir().unwrap();
    let fetcher = made.start(&origin, Some(dir.path()));
    assert!(read(&fetcher, 0, made.space.len()).unwrap() == *made.space);
    fetcher.shutdown();
    drop((fetcher, origin));
    // There is nothing to ask any more.
    let origin = Origin::start().unwrap();
    let fetcher = made.start(&origin, Some(dir.path()));
    hammer(&fetcher, &made.space, 10);
    let stats = fetcher.stats();
    assert_eq!((stats.bytes_fetched, stats.read_errors), (0, 0), "{stats:?}");
    fetcher.shutdown();
    drop(fetcher);
    // Somebody meddles with what is kept: it is noticed, and fetched again.
    let mut files = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let data = files
        .find(|path| path.extension().is_some_and(|kind| kind == "data"))
        .unwrap();
    let victim = made.pieces.len() / 2;
    let file = File::options().write(true).open(data).unwrap();
    let at = made.pieces.range(victim).start.0;
    let other = !made.space[s(at)];
    file.write_all_at(&[other], at).unwrap();
    let origin = made.served();
    let fetcher = made.start(&origin, Some(dir.path()));
    assert!(
        read(&fetcher, 0, made.space.len()).unwrap() == *made.space,
        "a forged piece was believed"
    );
    let stats = fetcher.stats();
    assert!(stats.chunks_wrong >= 1 && stats.layers_poisoned == 0, "{stats:?}");
    assert!(
        stats.bytes_fetched > 0 && stats.bytes_fetched < u(made.layer.blob.len()) / 4,
        "{stats:?}"
    );
}

#[test]
fn what_was_read_here_and_there_is_not_fetched_again() {
    let made = made();
    let origin = made.served();
    let dir = tempfile::tempdir().unwrap();
    let places: Vec<usize> = (0..10).map(|n| n * made.space.len() / 10 + 5000).collect();
    let look = |fetcher: &Fetcher| {
        for at in &places {
            assert!(read(fetcher, *at, 50_000).unwrap() == made.space[*at..at + 50_000]);
        }
    };
    let fetcher = made.start(&origin, Some(dir.path()));
    look(&fetcher);
    // What comes behind the last chunk that somebody waited for may still be on its way.
    let mut before = None;
    for _ in 0..100 {
        let now = fetcher.stats();
        if before.replace(now.clone()) == Some(now) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    fetcher.shutdown();
    let at_first = fetcher.stats().bytes_fetched;
    drop((fetcher, origin));
    // Chunks are proven by pieces that reach into others, of which not all has come.
    let origin = made.served();
    let fetcher = made.start(&origin, Some(dir.path()));
    look(&fetcher);
    let stats = fetcher.stats();
    eprintln!("{at_first} bytes the first time, {} the second", stats.bytes_fetched);
    assert_eq!((stats.bytes_fetched, stats.chunks_wrong), (0, 0), "{stats:?}");
}
