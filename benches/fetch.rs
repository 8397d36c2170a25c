//! What the fetcher costs: cold 4k reads beyond the origin's own latency, sequential throughput against `curl -o FILE` from
//! nginx on loopback, and a look at memory.
//!
//! `cargo bench --bench fetch [-- locate|cold|sequential]`. The parts that need nginx and curl say so when they skip.

#[path = "../tests/common/noise.rs"]
mod noise;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use noise::noise;
use tarblk::internals::bench::origin::{Link, Origin};
use tarblk::internals::cache::Slice;
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{FetchError, FetchOptions, Fetcher, LayerRange, LayerSource, Located, ReadCallback};
use tarblk::internals::source::{Blob, UrlBlob};
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

const MIB: u64 = 1 << 20;

fn range(start: u64, len: u64) -> LayerRange {
    LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(start), len),
    }
}

fn start(url: &str, size: u64, options: FetchOptions) -> Fetcher {
    let layer = Blob::of_url(UrlBlob::new(&url.parse().expect("a URL")), size);
    Fetcher::start(vec![LayerSource::from(layer)], options, None).expect("the fetcher starts")
}

fn address(origin: &Origin) -> String {
    origin
        .url("/")
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .to_owned()
}

fn float(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

fn percentile(times: &mut [Duration], permille: usize) -> f64 {
    times.sort_unstable();
    times[(times.len() - 1) * permille / 1000].as_secs_f64() * 1e6
}

/// `locate` of random 4 KiB in memory.
fn locate() {
    let origin = Origin::start().expect("an origin");
    let size = 48 * MIB;
    origin.serve_blob("/layer.tar", noise(usize::try_from(size).expect("a size that fits"), 1));
    let fetcher = start(&origin.url("/layer.tar"), size, FetchOptions::default());
    for at in (0..size).step_by(1 << 20) {
        fetcher
            .read_blocking(vec![range(at, MIB)])
            .expect("the origin is honest");
    }
    let (mut found, mut state, looks) = (0u32, 1u64, 2_000_000u32);
    let began = Instant::now();
    for _ in 0..looks {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) % (size / 512 - 8) * 512;
        if let Located::Memory(slices) = fetcher.locate(range(at, 4096)) {
            found += u32::from(slices.iter().map(|slice| slice.len()).sum::<usize>() == 4096);
        }
    }
    let nanos = began.elapsed().as_secs_f64() * 1e9 / f64::from(looks);
    println!("locate, random 4 KiB in memory: {nanos:.0} ns each ({found} of {looks} found)");
}

/// Cold random 4 KiB, one after the other, against the same request made by hand on a kept connection.
fn cold() {
    let origin = Origin::start().expect("an origin");
    let size = 256 * MIB;
    origin.serve_blob("/layer.tar", noise(usize::try_from(size).expect("a size that fits"), 1));
    for rtt_ms in [0, 5] {
        origin.set_link(Link {
            rtt: Duration::from_millis(rtt_ms),
            rate: None,
        });
        let mut bare = Vec::new();
        let mut stream = std::net::TcpStream::connect(address(&origin)).expect("the origin accepts");
        stream.set_nodelay(true).expect("a socket");
        let mut buffer = vec![0; 64 << 10];
        for at in (0..200u64).map(|n| n * MIB) {
            let sent = Instant::now();
            write!(
                stream,
                "GET /layer.tar HTTP/1.1\r\nHost: x\r\nRange: bytes={at}-{}\r\n\r\n",
                at + 32767
            )
            .unwrap();
            let mut got = 0;
            while got < 32768 {
                let n = std::io::Read::read(&mut stream, &mut buffer).unwrap();
                let head = if got == 0 {
                    buffer[..n].windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4
                } else {
                    0
                };
                got += n - head;
            }
            bare.push(sent.elapsed());
        }
        let options = FetchOptions {
            prefetch: false,
            ..FetchOptions::default()
        };
        let fetcher = start(&origin.url("/layer.tar"), size, options);
        std::thread::sleep(Duration::from_millis(100));
        let mut ours = Vec::new();
        for at in (0..200u64).map(|n| n * MIB + 4096) {
            let asked = Instant::now();
            fetcher
                .read_blocking(vec![range(at, 4096)])
                .expect("the origin is honest");
            ours.push(asked.elapsed());
        }
        let (bare_median, median) = (percentile(&mut bare, 500), percentile(&mut ours, 500));
        println!(
            "cold 4 KiB, {rtt_ms} ms round trip: median {median:.0} us, p99 {:.0} us; by hand (32 KiB on a kept \
             connection) {bare_median:.0} us; beyond the origin's own: {:.0} us",
            percentile(&mut ours, 990),
            median - bare_median
        );
    }
}

struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn nginx(dir: &Path) -> Option<(Nginx, String)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .ok()?
        .local_addr()
        .ok()?
        .port();
    let conf = format!(
        "daemon off; master_process off; error_log stderr crit; pid {0}/pid; events {{ worker_connections 256; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;\n\
         client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;\n\
         server {{ listen 127.0.0.1:{port}; root {0}; }} }}\n",
        dir.display()
    );
    fs::write(dir.join("nginx.conf"), conf).ok()?;
    let child = Command::new("nginx")
        .arg("-c")
        .arg(dir.join("nginx.conf"))
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let server = Nginx(child);
    for _ in 0..100 {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some((server, format!("http://127.0.0.1:{port}/layer.tar")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Reads the layer from end to end with `depth` reads of 128 KiB under way, as the kernel's readahead does; in-memory ones
/// are found by looking.
fn read_through(fetcher: &Fetcher, size: u64, depth: usize) {
    struct Done(mpsc::Sender<Result<Vec<Slice>, FetchError>>);
    impl ReadCallback for Done {
        fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
            let _reader_is_gone = self.0.send(outcome);
        }
    }
    let (give, take) = mpsc::channel();
    let (mut waiting, mut sum) = (0, 0u64);
    let mut sink = vec![0u8; 128 << 10];
    let mut consume = |slices: &[Slice]| {
        let mut at = 0;
        for slice in slices {
            sink[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        sum += u64::from(sink[at / 2]);
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
            consume(&take.recv().expect("the fetcher answers").expect("the origin is honest"));
            waiting -= 1;
        }
    }
    for _ in 0..waiting {
        consume(&take.recv().expect("the fetcher answers").expect("the origin is honest"));
    }
    std::hint::black_box(sum);
}

fn sequential() {
    let dir = tempfile::tempdir().expect("a directory");
    let size = 1024 * MIB;
    fs::write(
        dir.path().join("layer.tar"),
        noise(usize::try_from(size).expect("a size that fits"), 1),
    )
    .expect("room for 1 GiB");
    let Some((_server, url)) = nginx(dir.path()) else {
        eprintln!("SKIP: sequential throughput needs nginx");
        return;
    };
    for round in 0..3 {
        let file = dir.path().join("curl.out");
        let began = Instant::now();
        let curl = Command::new("curl").args(["-s", "-o"]).arg(&file).arg(&url).status();
        if !curl.is_ok_and(|status| status.success()) {
            eprintln!("SKIP: sequential throughput needs curl");
            return;
        }
        let curl = began.elapsed();
        fs::remove_file(&file).expect("curl's file");
        for (name, with_store, depth) in [
            ("memory only", false, 2),
            ("memory only, one at a time", false, 1),
            ("with a store", true, 2),
        ] {
            let kept = dir.path().join("store");
            let store = with_store.then(|| DiskCache::open(&kept, CacheLimit::bytes(1 << 40)).expect("a store"));
            let fetcher = start(
                &url,
                size,
                FetchOptions {
                    store,
                    ..FetchOptions::default()
                },
            );
            let began = Instant::now();
            read_through(&fetcher, size, depth);
            let took = began.elapsed();
            let stats = fetcher.stats();
            fetcher.shutdown();
            println!(
                "sequential {name:>27}: {:.2} GB/s; curl -o FILE {:.2} GB/s ({:.0} %); {} requests, {} connections, \
                 {:.0} MiB fetched, {:.0} MiB stored{}",
                float(size >> 10) / took.as_secs_f64() * 1024.0 / 1e9,
                float(size >> 10) / curl.as_secs_f64() * 1024.0 / 1e9,
                curl.as_secs_f64() / took.as_secs_f64() * 100.0,
                stats.requests,
                stats.connections,
                float(stats.bytes_fetched >> 10) / 1024.0,
                float(stats.bytes_stored >> 10) / 1024.0,
                if round == 0 { " (first round)" } else { "" },
            );
            // Only this bench wrote there.
            let _absent_without_store = fs::remove_dir_all(&kept);
        }
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let parts: [(&str, fn()); 3] = [("locate", locate), ("cold", cold), ("sequential", sequential)];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|asked| asked == name) {
            part();
        }
    }
}
