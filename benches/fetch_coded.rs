//! What a compressed layer costs: random reads and sequential throughput of a gzip layer of this machine's own files, against
//! the same layer uncompressed and against what gzip itself does with it.
//!
//! `cargo bench --bench fetch_coded [-- random|sequential|local]`. Needs tar, gzip; sizes are bytes of the tar.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tarblk::internals::bench::origin::{Link, Origin};
use tarblk::internals::cache::Slice;
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{
    Coded, FetchError, FetchOptions, Fetcher, LayerRange, LayerSource, Located, ReadCallback, Verifier, Windows,
};
use tarblk::internals::layer::{Coding, Decoder, Indexer, Spans};
use tarblk::internals::source::{Blob, UrlBlob};
use tarblk::internals::units::CHUNK_BYTES;
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

#[path = "support/mod.rs"]
mod support;
use support::{Runs, arguments};

const MIB: u64 = 1 << 20;
const LAYER: u64 = 256 * MIB;

fn u(n: usize) -> u64 {
    u64::try_from(n).expect("a length")
}

struct Layer {
    tar: Vec<u8>,
    gzip: Vec<u8>,
    spans: Spans,
    digests: Verifier,
}

/// A tar of this machine's libraries, gzipped as images are.
fn make(dir: &Path) -> Layer {
    let path = dir.join("layer.tar");
    let made = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "tar -C / -cf - usr/lib usr/bin 2>/dev/null | head -c {LAYER} > {0} && gzip -6nc < {0} > {0}.gz",
            path.display()
        ))
        .status();
    assert!(made.is_ok_and(|status| status.success()), "tar and gzip are needed");
    let tar = std::fs::read(&path).expect("the tar");
    let gzip = std::fs::read(dir.join("layer.tar.gz")).expect("the gzip file");
    let began = Instant::now();
    let mut indexer = Indexer::new(Coding::Gzip, MIB);
    for piece in gzip.chunks(256 << 10) {
        indexer.feed(piece, &mut |_| {}).expect("it is gzip");
    }
    let spans = indexer.finish().expect("it is whole");
    println!(
        "a layer of {} MiB, {} MiB as gzip, {} spans; indexed at {:.0} MB/s",
        u(tar.len()) / MIB,
        u(gzip.len()) / MIB,
        spans.table.len(),
        mb_per_s(u(tar.len()), began.elapsed())
    );
    let digests: Vec<[u8; 32]> = tar
        .chunks(usize::try_from(CHUNK_BYTES).expect("small"))
        .map(|chunk| Sha256::digest(chunk).into())
        .collect();
    let digests = Verifier::chunks(move |index, bytes| {
        usize::try_from(index).is_ok_and(|index| digests.get(index) == Some(&Sha256::digest(bytes).into()))
    });
    Layer {
        tar,
        gzip,
        spans,
        digests,
    }
}

fn mb_per_s(bytes: u64, took: Duration) -> f64 {
    f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) * 1024.0 / took.as_secs_f64() / 1e6
}

impl Layer {
    fn coded(&self) -> Coded {
        Coded {
            table: self.spans.table.clone(),
            windows: Windows::Memory(Arc::new(self.spans.windows.clone())),
        }
    }

    fn served(&self) -> Origin {
        let origin = Origin::start().expect("an origin");
        origin.serve_blob("/tar", self.tar.as_slice());
        origin.serve_blob("/gzip", self.gzip.as_slice());
        origin
    }

    fn gzip_at(&self, origin: &Origin, checked: bool) -> LayerSource {
        let http = blob_at(&origin.url("/gzip"), u(self.gzip.len()));
        LayerSource {
            coding: Some(self.coded()),
            verifier: checked.then(|| self.digests.clone()),
            unproven: None,
            layer: http.into(),
        }
    }

    fn tar_at(&self, origin: &Origin) -> LayerSource {
        LayerSource::from(blob_at(&origin.url("/tar"), u(self.tar.len())))
    }
}

fn blob_at(url: &str, len: u64) -> Blob {
    Blob::of_url(UrlBlob::new(&url.parse().expect("a URL")), len)
}

fn start(layer: LayerSource, options: FetchOptions) -> Fetcher {
    Fetcher::start(vec![layer], options, None).expect("the fetcher starts")
}

fn range(start: u64, len: u64) -> LayerRange {
    LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(start), len),
    }
}

/// Cold reads, one after the other, all over the layer.
fn random(layer: &Layer) {
    let origin = layer.served();
    let size = u(layer.tar.len());
    for rtt_ms in [0, 20] {
        origin.set_link(Link {
            rtt: Duration::from_millis(rtt_ms),
            rate: (rtt_ms > 0).then_some(25_000_000),
        });
        for len in [4u64 << 10, 64 << 10] {
            for (name, source) in [
                ("plain", layer.tar_at(&origin)),
                ("gzip", layer.gzip_at(&origin, false)),
                ("gzip, checked", layer.gzip_at(&origin, true)),
            ] {
                let options = FetchOptions {
                    prefetch: false,
                    memory_bytes: 1 << 20,
                    ..FetchOptions::default()
                };
                let fetcher = start(source, options);
                std::thread::sleep(Duration::from_millis(150));
                let mut state = 7u64;
                let mut times = Vec::new();
                for _ in 0..100 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let at = (state >> 20) % ((size - len) / 512) * 512;
                    let asked = Instant::now();
                    let slices = fetcher.read_blocking(vec![range(at, len)]).expect("an honest origin");
                    times.push(asked.elapsed());
                    assert!(slices.iter().map(|slice| u(slice.len())).sum::<u64>() == len);
                }
                let done = fetcher.stats();
                println!(
                    "random {:>2} KiB, {rtt_ms:>2} ms, {name:>13}: {}; {} KiB fetched and {} requests for 100 reads",
                    len >> 10,
                    Runs::us(&times),
                    done.bytes_fetched >> 10,
                    done.requests,
                );
            }
        }
    }
}

/// Reads the layer from end to end with `depth` reads of 128 KiB under way, as the kernel's read-ahead does.
fn read_through(fetcher: &Fetcher, size: u64, depth: usize) {
    struct Done(mpsc::Sender<Result<Vec<Slice>, FetchError>>);
    impl ReadCallback for Done {
        fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
            let _reader_is_gone = self.0.send(outcome);
        }
    }
    let (give, take) = mpsc::channel();
    let (mut waiting, mut sum) = (0, 0u64);
    let mut consume = |slices: &[Slice]| {
        sum += slices
            .iter()
            .map(|slice| u64::from(slice[slice.len() / 2]))
            .sum::<u64>();
    };
    for at in (0..size).step_by(128 << 10) {
        let asked = range(at, (128 << 10).min(size - at));
        if let Located::Memory(slices) = fetcher.locate(asked) {
            consume(&slices);
        } else {
            fetcher.read(vec![asked], Box::new(Done(give.clone())));
            waiting += 1;
        }
        while waiting >= depth {
            consume(&take.recv().expect("an answer").expect("an honest origin"));
            waiting -= 1;
        }
    }
    for _ in 0..waiting {
        consume(&take.recv().expect("an answer").expect("an honest origin"));
    }
    std::hint::black_box(sum);
}

/// What one core makes of it without any of this, and gzip itself.
fn floor(layer: &Layer, path: &Path) {
    let began = Instant::now();
    let mut decoder = Decoder::start(&layer.spans.table, 0, &[]).expect("a span");
    let mut sum = 0u64;
    for piece in layer.gzip.chunks(256 << 10) {
        decoder
            .feed(piece, &mut |bytes| sum += u(bytes.len()))
            .expect("it is gzip");
    }
    let ours = began.elapsed();
    let began = Instant::now();
    let gzip = Command::new("gzip").arg("-dc").arg(path).stdout(Stdio::null()).status();
    assert!(gzip.is_ok_and(|status| status.success()));
    println!(
        "one decoder: {:.0} MB/s of tar; gzip -dc: {:.0} MB/s",
        mb_per_s(sum, ours),
        mb_per_s(sum, began.elapsed())
    );
}

fn sequential(layer: &Layer, dir: &Path) {
    floor(layer, &dir.join("layer.tar.gz"));
    let origin = layer.served();
    let size = u(layer.tar.len());
    for _ in 0..3 {
        for (name, source, stored) in [
            ("plain", layer.tar_at(&origin), false),
            ("gzip", layer.gzip_at(&origin, false), false),
            ("gzip, checked", layer.gzip_at(&origin, true), false),
            ("gzip, checked and kept", layer.gzip_at(&origin, true), true),
        ] {
            let kept = dir.join("store");
            let options = FetchOptions {
                store: stored.then(|| DiskCache::open(&kept, CacheLimit::bytes(1 << 40)).expect("a store")),
                ..FetchOptions::default()
            };
            let fetcher = start(source, options);
            let began = Instant::now();
            read_through(&fetcher, size, 2);
            let took = began.elapsed();
            let stats = fetcher.stats();
            fetcher.shutdown();
            println!(
                "sequential {name:>22}: {:.0} MB/s of tar; {} requests, {} MiB fetched, {} MiB decoded, p99 {} us",
                mb_per_s(size, took),
                stats.requests,
                stats.bytes_fetched >> 20,
                stats.bytes_decoded >> 20,
                stats.latency.p99_us,
            );
            // Only this bench wrote there.
            let _absent_without_store = std::fs::remove_dir_all(&kept);
        }
    }
}

/// The same from a local blob, and how long others wait meanwhile: a plain layer is read at random while a gzip layer is
/// decoded at full speed beside it.
fn local(layer: &Layer, dir: &Path) {
    let size = u(layer.tar.len());
    let blob = |path: &Path| Blob::of_file("local".to_owned(), path).expect("the file");
    let coded = || LayerSource {
        coding: Some(layer.coded()),
        verifier: Some(layer.digests.clone()),
        unproven: None,
        layer: blob(&dir.join("layer.tar.gz")).into(),
    };
    let fetcher = start(coded(), FetchOptions::default());
    let began = Instant::now();
    read_through(&fetcher, size, 2);
    println!(
        "sequential, local gzip, checked: {:.0} MB/s of tar",
        mb_per_s(size, began.elapsed())
    );
    for busy in [false, true] {
        let layers = vec![coded(), blob(&dir.join("layer.tar")).into()];
        let fetcher = Fetcher::start(layers, FetchOptions::default(), None).expect("the fetcher starts");
        let reader = busy.then(|| {
            let fetcher = fetcher.clone();
            std::thread::spawn(move || read_through(&fetcher, size, 2))
        });
        let mut times = Vec::new();
        for n in 0..200u64 {
            let asked = LayerRange {
                layer: LayerId(1),
                range: TarRange::new(TarOffset(n * 1_048_576 % (size - 4096)), 4096),
            };
            let began = Instant::now();
            fetcher.read_blocking(vec![asked]).expect("a local file");
            times.push(began.elapsed());
            std::thread::sleep(Duration::from_micros(500));
        }
        let runs = Runs::us(&times);
        println!(
            "4 KiB of a plain local layer through the fetch thread{}: {runs}, p99 {:.0} us",
            if busy { ", a gzip layer decoding beside it" } else { "" },
            runs.at(990)
        );
        if let Some(reader) = reader {
            reader.join().expect("it read on");
        }
    }
}

fn main() {
    let wanted = arguments();
    let dir = tempfile::tempdir().expect("a directory");
    let layer = make(dir.path());
    let asked = |part: &str| wanted.is_empty() || wanted.iter().any(|asked| asked == part);
    if asked("random") {
        random(&layer);
    }
    if asked("sequential") {
        sequential(&layer, dir.path());
    }
    if asked("local") {
        local(&layer, dir.path());
    }
}
