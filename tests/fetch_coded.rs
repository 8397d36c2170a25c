//! The fetcher on compressed layers: the plain file's bytes, whatever the coding, whatever the server does; and never a byte
//! that is not what an index vouches for.

mod fetched;
#[path = "common/noise.rs"]
mod noise;
#[path = "common/wait.rs"]
mod wait;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fetched::{at_origin, hammer, in_file, joined, kept_files, quick, range, read, sha256, u};
use noise::noise;
use tarblk::internals::bench::origin::{Fault, Origin, Request, at_random};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::fetch::{
    Coded, FetchError, FetchOptions, Fetcher, LayerRange, LayerSource, Located, Verifier, Windows,
};
use tarblk::internals::index::{ColdDirectory, ColdPart, EndOfArchive, Index, IndexBuilder, LayerIdentity};
use tarblk::internals::layer::{Begins, Coding, Indexer, Spans};
use tarblk::internals::prefetch::ChunkRange;
use tarblk::internals::source::{Blob, LayerSpec};
use tarblk::internals::units::{CHUNK_BYTES, LayerId, TarOffset};
use wait::wait_until;

const SIZE: usize = 5_000_321;
const SPACING: u64 = 200_000;

/// Something between text and noise: compresses to about a third.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        match random() % 5 {
            0 => bytes.extend_from_slice(&random().to_le_bytes()),
            1 if bytes.len() > 40_000 => {
                let from = bytes.len() - 1 - usize::try_from(random() % 30_000).unwrap();
                let again = bytes[from..bytes.len().min(from + 50)].to_vec();
                bytes.extend_from_slice(&again);
            }
            _ => bytes.extend_from_slice(b"a line that comes often\n"),
        }
    }
    bytes.truncate(len);
    bytes
}

/// Runs a compressor as a filter.
fn through(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{} is needed: {error}", command[0]));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// One of the ways in which layers are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One member.
    Gzip,
    /// Many members.
    Members,
    /// Many frames.
    Frames,
    /// One frame, entered at its blocks.
    Blocks,
    /// One frame, whose index knows none of its blocks: it cannot be entered in the middle.
    OneFrame,
}

const WAYS: [Way; 5] = [Way::Gzip, Way::Members, Way::Frames, Way::Blocks, Way::OneFrame];

/// A layer, compressed and indexed.
struct Made {
    tar: Arc<Vec<u8>>,
    blob: Arc<Vec<u8>>,
    spans: Spans,
}

fn indexed(coding: Coding, blob: &[u8]) -> Spans {
    indexed_by(Indexer::new(coding, SPACING), blob)
}

fn indexed_by(mut indexer: Indexer, blob: &[u8]) -> Spans {
    for piece in blob.chunks(100_000) {
        indexer.feed(piece, &mut |_| {}).unwrap();
    }
    indexer.finish().unwrap()
}

fn make(way: Way) -> Made {
    make_of(way, content(SIZE))
}

fn make_of(way: Way, tar: Vec<u8>) -> Made {
    let pieces = |command: &[&str]| tar.chunks(333_333).flat_map(|piece| through(command, piece)).collect();
    let (coding, blob): (_, Vec<u8>) = match way {
        Way::Gzip => (Coding::Gzip, through(&["gzip", "-6n"], &tar)),
        Way::Members => (Coding::Gzip, pieces(&["gzip", "-6n"])),
        Way::Frames => (Coding::Zstd, pieces(&["zstd", "-q", "-c"])),
        // With a short window, or what repeats here would make windows as long as the blob.
        Way::Blocks => (Coding::Zstd, through(&["zstd", "-q", "-c", "--zstd=wlog=18"], &tar)),
        Way::OneFrame => (Coding::Zstd, through(&["zstd", "-q", "-c"], &tar)),
    };
    let spans = match way {
        Way::OneFrame => indexed_by(Indexer::new(coding, SPACING).frames_only(), &blob),
        Way::Blocks => indexed_by(Indexer::new(coding, 4 * SPACING), &blob),
        _ => indexed(coding, &blob),
    };
    assert_eq!(spans.table.seekable(), way != Way::OneFrame);
    Made {
        tar: Arc::new(tar),
        blob: Arc::new(blob),
        spans,
    }
}

impl Made {
    fn coded(&self) -> Coded {
        Coded {
            table: self.spans.table.clone(),
            windows: Windows::Memory(Arc::new(self.spans.windows.clone())),
        }
    }

    fn check(&self) -> Verifier {
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        let digests: Vec<[u8; 32]> = self.tar.chunks(chunk).map(sha256).collect();
        Verifier::chunks(move |index, bytes| digests.get(usize::try_from(index).unwrap()) == Some(&sha256(bytes)))
    }

    /// What is said of the layer, which is `blob`.
    fn spec(&self, blob: Blob) -> LayerSpec {
        LayerSpec {
            digest: Some(Digest::of(Algorithm::Sha256, &self.blob)),
            diff_id: Some(Digest::of(Algorithm::Sha256, &self.tar)),
            ..blob.into()
        }
    }

    fn over_http(&self, origin: &Origin) -> LayerSource {
        let http = at_origin(origin, "/blob", self.blob.len());
        LayerSource {
            coding: Some(self.coded()),
            verifier: Some(self.check()),
            unproven: None,
            layer: LayerSpec {
                cached_as: Some("sha256:test".to_owned()),
                ..self.spec(http)
            },
        }
    }

    fn in_a_file(&self, path: &Path) -> LayerSource {
        std::fs::write(path, self.blob.as_slice()).unwrap();
        LayerSource {
            coding: Some(self.coded()),
            verifier: Some(self.check()),
            unproven: None,
            layer: self.spec(in_file(path)),
        }
    }

    fn served(&self) -> Origin {
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", self.blob.as_slice());
        origin
    }
}

fn start(layer: LayerSource, options: FetchOptions) -> Fetcher {
    Fetcher::start(vec![layer], options, None).unwrap()
}

#[test]
fn every_way_reads_as_the_plain_file() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let fetcher = start(made.over_http(&origin), quick());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.chunks_wrong),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        assert!(
            stats.chunks_checked > 0 && stats.bytes_decoded + stats.bytes_stored > 0,
            "{way:?}: {stats:?}"
        );
    }
}

#[test]
fn local_blobs_read_as_the_plain_file() {
    let dir = tempfile::tempdir().unwrap();
    for way in WAYS {
        let made = make(way);
        let fetcher = start(made.in_a_file(&dir.path().join(format!("{way:?}"))), quick());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.chunks_wrong),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        assert_eq!((stats.requests, stats.bytes_fetched), (0, 0), "{way:?}: {stats:?}");
    }
}

#[test]
fn a_failing_server_costs_time_and_no_bytes() {
    let mut retries = 0;
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let menu = vec![
            Fault::ResetBefore,
            Fault::ResetWithin(10_000),
            Fault::ShortBody(3000),
            Fault::LongBody(4096),
            Fault::Status(500, None),
            Fault::Status(429, Some(0)),
            Fault::WrongRange(512),
            Fault::ShortRange(512),
            Fault::Delay(Duration::from_millis(20)),
            Fault::Silence,
            Fault::SlowBody(4000),
        ];
        origin.set_faults(at_random(11, 500, menu));
        let dir = tempfile::tempdir().unwrap();
        let options = || FetchOptions {
            store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
            ..quick()
        };
        let fetcher = start(made.over_http(&origin), options());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.layers_poisoned),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        if way != Way::OneFrame {
            assert!(stats.errors > 0, "{way:?}: {stats:?}");
        }
        // Where all that failed was ahead of need, nothing is asked for again.
        retries += stats.retries;
        fetcher.shutdown();
        drop(fetcher);
        // What was kept meanwhile is right as well, and is not fetched again.
        origin.clear_faults();
        let fetcher = start(made.over_http(&origin), options());
        assert!(
            read(&fetcher, 0, SIZE).unwrap() == *made.tar,
            "{way:?}: the store has wrong bytes"
        );
        assert!(
            fetcher.stats().bytes_fetched < u(made.blob.len()),
            "{way:?}: nothing was kept"
        );
    }
    assert!(retries > 0, "no reader ever waited for what failed");
}

/// As [`quick`], with room for all that comes along.
fn roomy() -> FetchOptions {
    FetchOptions {
        memory_bytes: 64 << 20,
        ..quick()
    }
}

/// Has chunks brought as a profile says.
fn follow(fetcher: &Fetcher, from: usize, len: usize) {
    let chunks = ChunkRange::of(LayerId(0), range(from, len).range);
    fetcher.follow_profile(vec![chunks]);
    wait_until("all has come", || {
        let is_here = !matches!(fetcher.locate(range(from, len)), Located::Elsewhere);
        is_here && fetcher.stats().in_flight == 0
    });
}

/// What a profile does not name of a span stays where it is; who wants it later goes on where decoding stands.
#[test]
fn of_a_span_no_more_is_fetched_than_a_profile_names() {
    let tar = content(SIZE);
    for way in [Way::Gzip, Way::OneFrame] {
        let mut made = make_of(way, tar.clone());
        // A long span, and one that is there so that the layer is no stream.
        made.spans = indexed_by(Indexer::new(made.spans.table.coding(), 3_000_000), &made.blob);
        assert_eq!(made.spans.table.len(), 2);
        let origin = made.served();
        let blob = u(made.blob.len());
        let fetcher = start(made.over_http(&origin), roomy());
        follow(&fetcher, 1_000_000, 4096);
        let first = fetcher.stats().bytes_fetched;
        assert!(first < blob / 2, "{way:?}: {first} of {blob}");
        follow(&fetcher, 2_000_000, 4096);
        let second = fetcher.stats().bytes_fetched;
        assert!(first < second && second < blob * 2 / 3, "{way:?}: {second} of {blob}");
        // And each byte once.
        for at in (1_000_000..SIZE).step_by(50_000) {
            let len = 50_000.min(SIZE - at);
            assert!(
                read(&fetcher, at, len).unwrap() == made.tar[at..at + len],
                "{way:?}: {at}"
            );
        }
        wait_until("all has come", || fetcher.stats().in_flight == 0);
        let stats = fetcher.stats();
        assert!(stats.bytes_fetched <= blob, "{way:?}: {stats:?}");
        assert_eq!((stats.chunks_wrong, stats.errors), (0, 0));
    }
}

/// What compresses unequally ends elsewhere in the blob than its share of the span says.
#[test]
fn a_wrong_guess_of_where_something_ends_costs_a_request() {
    let noise = noise(SIZE / 2, 1);
    let mut unequal = noise.clone();
    unequal.resize(SIZE, b'x');
    let mut reverse = vec![b'x'; SIZE - noise.len()];
    reverse.extend(noise);
    for tar in [unequal, reverse] {
        let mut made = make_of(Way::Gzip, tar);
        made.spans = indexed_by(Indexer::new(Coding::Gzip, 3_000_000), &made.blob);
        let origin = made.served();
        for at in [0, 500_000, 1_500_000, 2_400_000, 3_000_000, 4_700_000] {
            let fetcher = start(made.over_http(&origin), roomy());
            follow(&fetcher, at, 70_000);
            assert!(read(&fetcher, at, 70_000).unwrap() == made.tar[at..at + 70_000], "{at}");
            let stats = fetcher.stats();
            assert_eq!((stats.errors, stats.chunks_wrong), (0, 0), "{at}: {stats:?}");
        }
    }
}

#[test]
fn a_server_without_ranges_is_streamed_once() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        origin.set_ranges(false);
        let fetcher = start(made.over_http(&origin), quick());
        hammer(&fetcher, &made.tar, 12);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.layers_poisoned),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        assert!(stats.requests <= 24, "{way:?}: {stats:?}");
    }
}

/// A blob with one byte changed, where every reader comes by.
fn damaged(made: &Made) -> Vec<u8> {
    let mut blob = made.blob.to_vec();
    let middle = blob.len() / 2;
    blob[middle] ^= 0x10;
    blob
}

/// A machine on the way that spoils bytes for a while: they are asked for until they are right.
#[test]
fn bytes_that_are_wrong_for_a_while_are_waited_for() {
    for way in WAYS {
        let made = make(way);
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", damaged(&made));
        let options = FetchOptions {
            wrong_for: Duration::from_secs(60),
            prefetch: false,
            ..quick()
        };
        let fetcher = start(made.over_http(&origin), options);
        let reading = {
            let fetcher = fetcher.clone();
            std::thread::spawn(move || read(&fetcher, 0, SIZE))
        };
        wait_until("four wrong chunks", || {
            fetcher.stats().chunks_wrong >= 4 || reading.is_finished()
        });
        assert!(!reading.is_finished(), "{way:?}: {:?}", reading.join().unwrap().err());
        origin.serve_blob("/blob", made.blob.to_vec());
        let bytes = reading
            .join()
            .unwrap()
            .unwrap_or_else(|error| panic!("{way:?}: {error}"));
        assert!(bytes == *made.tar, "{way:?}");
        let stats = fetcher.stats();
        assert_eq!((stats.read_errors, stats.layers_poisoned), (0, 0), "{way:?}: {stats:?}");
    }
}

/// A part of a chunk that came wrong at first lies here until the rest of the chunk has come: that is as old as it is, and no proof that
/// the server is wrong still.
#[test]
fn an_old_part_of_a_chunk_is_no_new_proof() {
    const WRONG_FOR: Duration = Duration::from_secs(6);
    const FRAME: usize = 333_333;
    let tar = noise(1_000_000, 3);
    // Without checksums of frames, so that nothing but the chunk's digest tells.
    let frames = tar.chunks(FRAME);
    let blob: Vec<u8> = frames
        .flat_map(|frame| through(&["zstd", "-q", "-c", "--no-check"], frame))
        .collect();
    let spans = indexed(Coding::Zstd, &blob);
    let second = spans.table.span(spans.table.span_at(TarOffset(u(FRAME))));
    assert_eq!(second.tar.start, TarOffset(u(FRAME)));
    let border = second.blob.start;
    let made = Made {
        tar: Arc::new(tar),
        blob: Arc::new(blob),
        spans,
    };
    let origin = made.served();
    let began = std::time::Instant::now();
    let asked = [AtomicU32::new(0), AtomicU32::new(0)];
    origin.set_faults(move |request| {
        let range = request
            .header("range")
            .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let Some((Ok(first), Ok(last))) = range.map(|(first, last)| (first.parse::<u64>(), last.parse::<u64>())) else {
            return Vec::new();
        };
        let number = |which: usize, at: u64| {
            (first..=last)
                .contains(&at)
                .then(|| asked[which].fetch_add(1, Ordering::SeqCst))
        };
        let mut faults = Vec::new();
        // The end of the first frame, once.
        if number(0, border - 100) == Some(0) {
            faults.push(Fault::Damage(border - 100));
        }
        // The beginning of the second is no frame at first, and then there is none for a while.
        match number(1, border) {
            Some(0..6) => faults.push(Fault::Damage(border)),
            Some(_) if began.elapsed() < WRONG_FOR + Duration::from_millis(500) => {
                faults.push(Fault::Status(503, None));
            }
            _ => {}
        }
        faults
    });
    let options = FetchOptions {
        wrong_for: WRONG_FOR,
        prefetch: false,
        ..roomy()
    };
    let fetcher = start(made.over_http(&origin), options);
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    let across = FRAME / chunk * chunk;
    assert!(read(&fetcher, across - chunk, chunk).unwrap() == made.tar[across - chunk..across]);
    let bytes = read(&fetcher, across, chunk).unwrap_or_else(|error| panic!("{error}: {:?}", fetcher.stats()));
    assert!(bytes == made.tar[across..across + chunk]);
    let stats = fetcher.stats();
    assert!(began.elapsed() > WRONG_FOR && stats.chunks_wrong == 7, "{stats:?}");
}

#[test]
fn a_flipped_byte_is_never_served() {
    for way in WAYS {
        let made = make(way);
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", damaged(&made));
        let dir = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
            ..quick()
        };
        let fetcher = start(made.over_http(&origin), options.clone());
        let mut failed = None;
        for at in (0..SIZE).step_by(100_000) {
            let len = 100_000.min(SIZE - at);
            match read(&fetcher, at, len) {
                Ok(bytes) => assert!(bytes == made.tar[at..at + len], "{way:?}: wrong bytes at {at}"),
                Err(error) => failed = Some(error),
            }
        }
        let error = failed.unwrap_or_else(|| panic!("{way:?}: nobody noticed"));
        assert!(matches!(error, FetchError::Poisoned { .. }), "{way:?}: {error}");
        let stats = fetcher.stats();
        assert!(
            stats.chunks_wrong >= 2 && stats.layers_poisoned == 1,
            "{way:?}: {stats:?}"
        );
        assert!(
            matches!(fetcher.locate(range(0, 10)), Located::Elsewhere),
            "{way:?}: it is still believed"
        );
        assert!(read(&fetcher, 0, 10).is_err(), "{way:?}: it is still read");
        assert_eq!(kept_files(dir.path()).len(), 0, "{way:?}: the store still has it");
        fetcher.shutdown();
        drop(fetcher);
        // The right blob afterwards is read as if nothing had been.
        origin.serve_blob("/blob", made.blob.as_slice());
        let fetcher = start(made.over_http(&origin), options);
        assert!(read(&fetcher, 0, SIZE).unwrap() == *made.tar);
    }
}

#[test]
fn damage_on_the_way_is_repaired_by_asking_again() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let middle = u(made.blob.len() / 2);
        let times = AtomicU32::new(0);
        origin.set_faults(move |request: &Request| {
            let over_it = request.header("range").is_some_and(|range| {
                let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
                (first.parse().unwrap()..=last.parse().unwrap()).contains(&middle)
            });
            if over_it && times.fetch_add(1, Ordering::Relaxed) == 0 {
                vec![Fault::Damage(middle)]
            } else {
                Vec::new()
            }
        });
        let fetcher = start(made.over_http(&origin), quick());
        assert!(read(&fetcher, 0, SIZE).unwrap() == *made.tar, "{way:?}: wrong bytes");
        let stats = fetcher.stats();
        assert_eq!(
            (stats.chunks_wrong, stats.layers_poisoned),
            (1, 0),
            "{way:?}: {stats:?}"
        );
    }
}

#[test]
fn an_index_of_another_layer_is_no_use() {
    let made = make(Way::Gzip);
    let mut others = made.tar.to_vec();
    others.rotate_left(1_234_567);
    let other = make_of(Way::Gzip, others);
    let origin = other.served();
    // The lengths differ: that is seen at once.
    let layer = LayerSource {
        coding: Some(made.coded()),
        ..other.over_http(&origin)
    };
    assert_ne!(made.blob.len(), other.blob.len());
    let error = Fetcher::start(vec![layer], quick(), None).unwrap_err();
    assert!(error.to_string().contains("belongs to another layer"), "{error}");
    // They do not: then its places are nonsense, and nothing is believed.
    let mut fitted = other.blob.to_vec();
    fitted.resize(made.blob.len(), 0);
    origin.serve_blob("/blob", fitted);
    let fetcher = start(made.over_http(&origin), quick());
    for at in [0, SIZE / 2, SIZE - 4096] {
        let error = read(&fetcher, at, 4096).map(|_| ()).unwrap_err();
        assert!(matches!(error, FetchError::Poisoned { .. }), "{error}");
    }
    // Without digests only what cannot be decoded is seen. It must end, one way or the other.
    let layer = LayerSource {
        verifier: None,
        unproven: None,
        ..made.over_http(&origin)
    };
    let fetcher = start(layer, quick());
    for at in (0..SIZE).step_by(500_000) {
        match read(&fetcher, at, 4096) {
            Ok(bytes) => assert_eq!(bytes.len(), 4096.min(SIZE - at)),
            Err(error) => assert!(matches!(error, FetchError::Poisoned { .. }), "{error}"),
        }
        if SIZE - at < 4096 + 500_000 {
            break;
        }
    }
}

/// An index with nothing but windows, and where they lie in it.
fn cold_part(spans: &Spans) -> (Vec<u8>, ColdDirectory) {
    let mut builder = IndexBuilder::new();
    builder.identity(LayerIdentity {
        coding: spans.table.coding(),
        blob_len: spans.table.blob_len(),
        ..LayerIdentity::default()
    });
    builder.spans(spans.clone());
    let bytes = builder.finish(spans.table.tar_len(), EndOfArchive::Marked);
    let directory = Index::open(bytes.as_slice()).unwrap().cold().clone();
    (bytes, directory)
}

#[test]
fn windows_come_from_an_index_file_or_over_http() {
    let made = make(Way::Gzip);
    let (cold, places) = cold_part(&made.spans);
    let origin = made.served();
    origin.serve_blob("/index", cold.as_slice());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("index"), &cold).unwrap();
    let file = Windows::File(
        Arc::new(File::open(dir.path().join("index")).unwrap().into()),
        places.clone(),
    );
    let index = at_origin(&origin, "/index", cold.len());
    let with = |windows: Windows| LayerSource {
        coding: Some(Coded {
            table: made.spans.table.clone(),
            windows,
        }),
        ..made.over_http(&origin)
    };
    for windows in [file, Windows::Remote(Box::new(index.clone()), places.clone())] {
        let fetcher = start(with(windows), quick());
        hammer(&fetcher, &made.tar, 15);
        assert_eq!(fetcher.stats().chunks_wrong, 0);
    }
    origin.set_ranges(false);
    let fetcher = start(with(Windows::Remote(Box::new(index.clone()), places.clone())), quick());
    hammer(&fetcher, &made.tar, 5);
    origin.set_ranges(true);
    // A damaged window is noticed before it is used.
    let mut damaged = cold.clone();
    for n in 0..places.pieces(ColdPart::Windows) {
        let range = places.piece(ColdPart::Windows, n).unwrap().range;
        if !range.is_empty() {
            damaged[usize::try_from(range.start).unwrap() + 10] ^= 1;
        }
    }
    origin.serve_blob("/index", damaged);
    let fetcher = start(with(Windows::Remote(Box::new(index), places)), quick());
    let error = read(&fetcher, SIZE - 50_000, 4096).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
    assert!(matches!(error, FetchError::Poisoned { .. }), "{error}");
}

/// A flight has a connection for its spans while it looks for their windows in a file and then asks for them, on the same host.
#[test]
fn one_connection_is_enough_for_spans_and_their_windows() {
    let made = make(Way::Gzip);
    let (cold, places) = cold_part(&made.spans);
    let origin = made.served();
    origin.serve_blob("/index", cold.as_slice());
    let index = at_origin(&origin, "/index", cold.len());
    let dir = tempfile::tempdir().unwrap();
    let empty = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(dir.path().join("index"));
    let layer = LayerSource {
        coding: Some(Coded {
            table: made.spans.table.clone(),
            windows: Windows::Kept(Arc::new(empty.unwrap().into()), Box::new(index), places),
        }),
        ..made.over_http(&origin)
    };
    let options = FetchOptions {
        connections: 1,
        deadline: Duration::from_secs(20),
        ..quick()
    };
    let fetcher = start(layer, options);
    hammer(&fetcher, &made.tar, 15);
    assert_eq!(fetcher.stats().read_errors, 0);
}

/// No digest vouches for what an index says of a decoder inside of a zstd frame: chunks tell, and then it is done without.
#[test]
fn what_an_index_says_wrong_of_blocks_costs_time_and_no_bytes() {
    type Lie<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));
    let made = make(Way::Blocks);
    let table = &made.spans.table;
    let entered = (1..table.len()).filter(|n| table.span(*n).begins == Begins::Block && table.span(*n).window > 0);
    assert!(entered.count() + 1 == table.len() && table.len() > 3, "{table:?}");
    let origin = made.served();
    let read_all = |what: &str, spans: &Spans| {
        let source = LayerSource {
            coding: Some(Coded {
                table: spans.table.clone(),
                windows: Windows::Memory(Arc::new(spans.windows.clone())),
            }),
            ..made.over_http(&origin)
        };
        let fetcher = start(source, quick());
        // The last bytes first, and then all.
        for at in (0..SIZE).step_by(500_000).collect::<Vec<_>>().into_iter().rev() {
            let len = 500_000.min(SIZE - at);
            assert!(
                read(&fetcher, at, len).unwrap() == made.tar[at..at + len],
                "{what}: wrong bytes at {at}"
            );
        }
        let stats = fetcher.stats();
        assert_eq!((stats.read_errors, stats.layers_poisoned), (0, 0), "{what}: {stats:?}");
        stats
    };
    assert_eq!(read_all("the truth", &made.spans).errors, 0);
    let lies: [Lie<'_>; 3] = [
        ("windows of other bytes", &|window| {
            let content = window.len() / 2;
            window[content..].iter_mut().for_each(|byte| *byte ^= 0x55);
        }),
        ("windows that are cut short", &|window| {
            window.truncate(window.len() - 1);
        }),
        ("windows of nothing", &|window| *window = vec![0]),
    ];
    for (what, lie) in lies {
        let mut spans = made.spans.clone();
        spans
            .windows
            .iter_mut()
            .filter(|window| !window.is_empty())
            .for_each(lie);
        assert!(read_all(what, &spans).errors > 0, "{what}");
    }
    let mut blocks = Vec::new();
    made.spans.table.encode_blocks(&mut blocks);
    let mut noticed = 0;
    for bit in (0..blocks.len() * 8).step_by(blocks.len() * 8 / 50) {
        let mut other = blocks.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        // Most of them no table can say.
        let Ok(table) = made.spans.table.with_blocks(&other) else {
            continue;
        };
        let spans = Spans {
            table,
            ..made.spans.clone()
        };
        noticed += u32::from(read_all(&format!("bit {bit}"), &spans).errors > 0);
    }
    assert!(noticed > 5, "{noticed} lies were noticed");
}

#[test]
fn windows_that_were_fetched_are_kept_in_the_index_file() {
    let made = make(Way::Gzip);
    let (cold, places) = cold_part(&made.spans);
    let origin = made.served();
    origin.serve_blob("/index", cold.as_slice());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kept.hot");
    // The hot part, and a hole.
    let hot = usize::try_from(tarblk::internals::index::hot_len(&cold).unwrap().unwrap()).unwrap();
    std::fs::write(&path, &cold[..hot]).unwrap();
    let file = || File::options().read(true).write(true).open(&path).unwrap();
    file().set_len(u(cold.len())).unwrap();
    let index = at_origin(&origin, "/index", cold.len());
    let fetcher = || {
        let windows = Windows::Kept(Arc::new(file().into()), Box::new(index.clone()), places.clone());
        let source = LayerSource {
            coding: Some(Coded {
                table: made.spans.table.clone(),
                windows,
            }),
            ..made.over_http(&origin)
        };
        start(source, quick())
    };
    let asked = || {
        let log = origin.take_log();
        log.events.iter().filter(|event| event.path == "/index").count()
    };
    let everything = |fetcher: &Fetcher| {
        for at in (0..SIZE - 4096).step_by(200_000) {
            let bytes = read(fetcher, at, 4096).unwrap();
            assert_eq!(bytes, made.tar[at..][..4096]);
        }
        fetcher.shutdown();
    };
    asked();
    everything(&fetcher());
    assert!(asked() > 0);
    // The next process needs nobody.
    everything(&fetcher());
    assert_eq!(asked(), 0);
    // Only the hot part is believed: what became another since is fetched again.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[hot..].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&path, &bytes).unwrap();
    let damaged = fetcher();
    everything(&damaged);
    assert!(asked() > 0);
    assert_eq!(damaged.stats().chunks_wrong, 0);
    everything(&fetcher());
    assert_eq!(asked(), 0);
}

#[test]
fn what_one_process_kept_another_uses_and_checks() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let dir = tempfile::tempdir().unwrap();
        let options = || FetchOptions {
            store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
            prefetch: false,
            ..quick()
        };
        let fetcher = start(made.over_http(&origin), options());
        assert!(read(&fetcher, 0, SIZE).unwrap() == *made.tar);
        fetcher.shutdown();
        drop(fetcher);
        // Another URL, the same identity: nothing is asked for.
        drop(origin);
        let origin = Origin::start().unwrap();
        let fetcher = start(made.over_http(&origin), options());
        assert!(
            matches!(fetcher.locate(range(0, 4096)), Located::Disk),
            "{way:?}: it is to be read back and checked"
        );
        assert!(read(&fetcher, 0, SIZE).unwrap() == *made.tar, "{way:?}");
        assert!(matches!(
            fetcher.locate(range(1_000_000, 4096)),
            Located::Disk | Located::Memory(_)
        ));
        let stats = fetcher.stats();
        assert_eq!((stats.bytes_fetched, stats.read_errors), (0, 0), "{way:?}: {stats:?}");
        assert!(stats.chunks_checked >= 150, "{way:?}: {stats:?}");
        fetcher.shutdown();
        drop(fetcher);
        // Somebody meddles with what is kept: it is noticed, and fetched again.
        let data = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let data = data
            .into_iter()
            .find(|path| path.extension().is_some_and(|kind| kind == "data"))
            .unwrap();
        let file = File::options().write(true).open(&data).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"forged", 1_234_567).unwrap();
        let origin = made.served();
        let fetcher = start(made.over_http(&origin), options());
        assert!(
            read(&fetcher, 0, SIZE).unwrap() == *made.tar,
            "{way:?}: a forged chunk was believed"
        );
        let stats = fetcher.stats();
        assert_eq!(
            (stats.chunks_wrong, stats.layers_poisoned),
            (1, 0),
            "{way:?}: {stats:?}"
        );
        assert!(stats.bytes_fetched > 0, "{way:?}: {stats:?}");
    }
}

/// Waits until `what` is so; a minute at most.
fn until(what: impl Fn() -> bool) -> bool {
    (0..600).any(|_| {
        let is_so = what();
        if !is_so {
            std::thread::sleep(Duration::from_millis(100));
        }
        is_so
    })
}

/// Whether the map in a store's directory says that its layer is whole and checked.
fn is_sealed(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let map = entries
        .into_iter()
        .find(|path| path.extension().is_some_and(|kind| kind == "map"));
    map.and_then(|map| std::fs::read(map).ok())
        .is_some_and(|map| map[72..76] == [1, 0, 0, 0])
}

#[test]
fn a_whole_layer_is_checked_against_its_own_digest() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let dir = tempfile::tempdir().unwrap();
        let options = || FetchOptions {
            store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
            ..quick()
        };
        // No chunk digests: only the whole can say so.
        let layer = |spec| LayerSource {
            layer: spec,
            verifier: None,
            unproven: None,
            ..made.over_http(&origin)
        };
        let right = made.over_http(&origin).layer;
        let fetcher = start(layer(right.clone()), options());
        assert!(read(&fetcher, 0, SIZE).unwrap() == *made.tar);
        assert!(until(|| is_sealed(dir.path())), "{way:?}: it is not sealed");
        fetcher.shutdown();
        drop(fetcher);
        std::fs::remove_dir_all(dir.path()).unwrap();
        std::fs::create_dir(dir.path()).unwrap();
        let wrong = Digest::of(Algorithm::Sha256, b"another layer");
        let another = LayerSpec {
            digest: (way == Way::OneFrame).then(|| wrong.clone()),
            diff_id: (way != Way::OneFrame).then_some(wrong),
            ..right
        };
        let fetcher = start(layer(another), options());
        let _right_until_it_is_found_out = read(&fetcher, 0, SIZE);
        assert!(
            until(|| fetcher.stats().layers_poisoned == 1),
            "{way:?}: it is not found out"
        );
        let error = read(&fetcher, 0, 4096).map(|_| ()).unwrap_err();
        assert!(matches!(error, FetchError::Poisoned { .. }), "{way:?}: {error}");
        assert_eq!(kept_files(dir.path()).len(), 0, "{way:?}: the store still has it");
    }
}

#[test]
fn plain_layers_are_checked_as_well() {
    let made = make(Way::Gzip);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.tar");
    std::fs::write(&path, made.tar.as_slice()).unwrap();
    let local = || LayerSource {
        verifier: Some(made.check()),
        unproven: None,
        ..in_file(&path).into()
    };
    let origin = Origin::start().unwrap();
    let remote = || LayerSource {
        verifier: Some(made.check()),
        unproven: None,
        ..at_origin(&origin, "/tar", SIZE).into()
    };
    origin.serve_blob("/tar", made.tar.as_slice());
    for layer in [local(), remote()] {
        let fetcher = start(layer, quick());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert!(stats.chunks_checked > 0 && stats.chunks_wrong == 0, "{stats:?}");
    }
    let mut forged = made.tar.to_vec();
    forged[2_000_000] ^= 1;
    std::fs::write(&path, &forged).unwrap();
    origin.serve_blob("/tar", forged);
    for layer in [local(), remote()] {
        let fetcher = start(layer, quick());
        assert!(read(&fetcher, 500_000, 4096).unwrap() == made.tar[500_000..504_096]);
        let error = read(&fetcher, 2_000_000, 10).map(|_| ()).unwrap_err();
        assert!(matches!(error, FetchError::Poisoned { .. }), "{error}");
    }
}

#[test]
fn layers_of_all_kinds_are_read_side_by_side() {
    let mades: Vec<Made> = WAYS.iter().map(|way| make(*way)).collect();
    let origin = Origin::start().unwrap();
    let mut layers = Vec::new();
    for (n, made) in mades.iter().enumerate() {
        origin.serve_blob(&format!("/blob/{n}"), made.blob.as_slice());
        let mut layer = made.over_http(&origin);
        layer.layer.blob = at_origin(&origin, &format!("/blob/{n}"), made.blob.len());
        layer.layer.cached_as = Some(format!("sha256:{n}"));
        layers.push(layer);
    }
    let menu = vec![
        Fault::ResetWithin(30_000),
        Fault::Status(503, Some(0)),
        Fault::Delay(Duration::from_millis(20)),
    ];
    origin.set_faults(at_random(5, 200, menu));
    let dir = tempfile::tempdir().unwrap();
    let options = FetchOptions {
        store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
        ..quick()
    };
    let fetcher = Fetcher::start(layers, options, None).unwrap();
    let mut state = 9u64;
    for n in 0..80 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let start = usize::try_from(state >> 33).unwrap() % (SIZE - 50_000);
        // One read of several layers at once, as the device asks for a block that has files of more than one.
        let of = |n: usize| LayerRange {
            layer: LayerId(u32::try_from(n % WAYS.len()).unwrap()),
            ..range(start, 50_000)
        };
        let bytes = joined(&fetcher.read_blocking(vec![of(n), of(n + 1)]).unwrap());
        let expected = [n, n + 1]
            .map(|n| &mades[n % WAYS.len()].tar[start..start + 50_000])
            .concat();
        assert!(bytes == expected, "wrong bytes at {start} of layers {n} and {n} + 1");
    }
    let done = fetcher.stats();
    assert_eq!(
        (done.read_errors, done.in_flight, done.layers_poisoned),
        (0, 0, 0),
        "{done:?}"
    );
}

#[test]
fn a_stream_under_way_ends_with_the_fetcher() {
    let made = make(Way::OneFrame);
    let origin = made.served();
    origin.set_faults(|_: &_| vec![Fault::SlowBody(50_000)]);
    let fetcher = start(made.over_http(&origin), quick());
    let waiting = {
        let fetcher = fetcher.clone();
        std::thread::spawn(move || fetcher.read_blocking(vec![range(SIZE - 10, 10)]).map(|_| ()))
    };
    std::thread::sleep(Duration::from_millis(300));
    fetcher.shutdown();
    assert!(matches!(waiting.join().unwrap(), Err(FetchError::Stopped)));
}
