//! The fetcher against servers that fail: right bytes or an error, never wrong ones, and every failure counted.

mod common;
mod fetched;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use common::noise::noise;
use common::wait::wait_until;
use fetched::{at_origin, hammer, in_state, joined, range, u};
use tarblk::internals::bench::origin::{Fault, Origin, Request, at_random};
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::{FetchError, FetchOptions, Fetcher, LayerSource, Located};
use tarblk::internals::http::{Timeouts, Validator};
use tarblk::internals::source::{Blob, Place, UrlBlob};

const SIZE: usize = 3_000_321;

/// Shorter waits still, and bodies that are given up sooner.
fn quick() -> FetchOptions {
    FetchOptions {
        timeouts: Timeouts {
            head: Duration::from_millis(300),
            stall: Duration::from_millis(300),
            ..fetched::quick().timeouts
        },
        slowest_body: 64 << 10,
        ..fetched::quick()
    }
}

/// The same, and readers that wait for a second.
fn impatient() -> FetchOptions {
    FetchOptions {
        deadline: Duration::from_secs(1),
        ..quick()
    }
}

fn layer(origin: &Origin, path: &str) -> Blob {
    at_origin(origin, path, SIZE)
}

fn start(layer: Blob, options: FetchOptions) -> Fetcher {
    Fetcher::start(vec![LayerSource::from(layer)], options, None).unwrap()
}

fn served() -> (Origin, Arc<Vec<u8>>) {
    let data = Arc::new(noise(SIZE, 1));
    let origin = Origin::start().unwrap();
    origin.serve_blob("/layer.tar", data.as_slice());
    (origin, data)
}

/// The entity tag that the origin gives the layer.
fn tag_of(origin: &Origin) -> Validator {
    let address = origin
        .url("")
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .to_owned();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "HEAD /layer.tar HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut head = String::new();
    stream.read_to_string(&mut head).unwrap();
    let line = head
        .lines()
        .find(|line| line.to_ascii_lowercase().starts_with("etag:"))
        .unwrap();
    Validator::ETag(line[5..].trim().to_owned())
}

fn survives(menu: Vec<Fault>) {
    let (origin, data) = served();
    let name = format!("{menu:?}");
    // Rare enough that one request does not meet six wrong answers in a row, whatever order requests come in.
    origin.set_faults(at_random(7, 120, menu));
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    hammer(&fetcher, &data, 24);
    let stats = fetcher.stats();
    assert!(stats.errors > 0, "no failure of {name} was counted: {stats:?}");
    assert_eq!((stats.read_errors, stats.in_flight), (0, 0), "{name}: {stats:?}");
}

#[test]
fn resets_and_cut_bodies() {
    survives(vec![
        Fault::ResetBefore,
        Fault::ResetWithin(10_000),
        Fault::ShortBody(5000),
    ]);
}

#[test]
fn errors_of_the_server() {
    survives(vec![
        Fault::Status(500, None),
        Fault::Status(503, Some(0)),
        Fault::Status(429, Some(0)),
    ]);
}

#[test]
fn wrong_ranges() {
    survives(vec![Fault::WrongRange(512), Fault::ShortRange(512)]);
}

#[test]
fn silence_delays_and_crawling_bodies() {
    survives(vec![
        Fault::Silence,
        Fault::Delay(Duration::from_millis(50)),
        Fault::SlowBody(2000),
    ]);
}

#[test]
fn everything_at_once_with_a_store() {
    let (origin, data) = served();
    let dir = tempfile::tempdir().unwrap();
    let menu = vec![
        Fault::ResetBefore,
        Fault::ResetWithin(20_000),
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
    origin.set_faults(at_random(11, 300, menu));
    let layer = in_state(layer(&origin, "/layer.tar"), tag_of(&origin));
    let options = || FetchOptions {
        store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
        ..quick()
    };
    let fetcher = start(layer.clone(), options());
    hammer(&fetcher, &data, 12);
    let stats = fetcher.stats();
    assert!(stats.errors > 0, "{stats:?}");
    assert_eq!((stats.read_errors, stats.in_flight), (0, 0), "{stats:?}");
    fetcher.shutdown();
    drop(fetcher);
    // What was kept meanwhile is right as well.
    origin.clear_faults();
    let fetcher = start(layer, options());
    let kept = fetcher.read_blocking(vec![range(0, SIZE)]).unwrap();
    assert!(joined(&kept) == *data, "the store has wrong bytes");
    assert!(fetcher.stats().bytes_fetched < u(SIZE), "nothing was kept");
}

#[test]
fn bodies_that_do_not_end_where_they_should() {
    let (origin, data) = served();
    origin.set_faults(at_random(3, 300, vec![Fault::LongBody(4096)]));
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    hammer(&fetcher, &data, 12);
    assert_eq!(fetcher.stats().read_errors, 0);
}

#[test]
fn a_restarted_server_is_a_wait() {
    let (origin, data) = served();
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    for n in 0..20 {
        origin.drop_connections();
        let start = n * 140_000;
        let bytes = joined(&fetcher.read_blocking(vec![range(start, 4096)]).unwrap());
        assert!(bytes == data[start..start + 4096]);
    }
}

#[test]
fn a_server_without_ranges_is_streamed_once() {
    let (origin, data) = served();
    origin.set_ranges(false);
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    hammer(&fetcher, &data, 12);
    let stats = fetcher.stats();
    assert_eq!((stats.read_errors, stats.in_flight), (0, 0), "{stats:?}");
    // Every reader may have asked before the first answer showed what server it is; nobody asks twice.
    assert!(stats.requests <= 16, "{stats:?}");
}

#[test]
fn a_single_whole_body_is_used_as_well() {
    let (origin, data) = served();
    origin.set_faults(at_random(5, 100, vec![Fault::WholeBody]));
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    hammer(&fetcher, &data, 12);
    assert_eq!(fetcher.stats().read_errors, 0);
}

#[test]
fn a_changed_layer_is_an_error_and_no_bytes() {
    let (origin, _) = served();
    let first = layer(&origin, "/layer.tar");
    let stale = in_state(first.clone(), Validator::ETag("\"not-this\"".to_owned()));
    let error = start(stale, quick()).read_blocking(vec![range(0, 4096)]).unwrap_err();
    assert!(matches!(error, FetchError::Changed { .. }), "{error}");
    let longer = Blob {
        len: u(SIZE) + 512,
        ..first
    };
    let error = start(longer, quick()).read_blocking(vec![range(0, 4096)]).unwrap_err();
    assert!(matches!(error, FetchError::Changed { .. }), "{error}");
}

#[test]
fn what_is_not_there_is_refused() {
    let (origin, _) = served();
    let error = start(layer(&origin, "/nothing.tar"), impatient())
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    assert!(matches!(error, FetchError::Refused { status: 404, .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("for 1s the server says 404 Not Found"), "{said}");
}

/// An answer that a machine on the way may have made up, and how it is served.
type Nonsense = (&'static str, fn(&Origin));

fn script(fault: Fault) -> impl Fn(&Request) -> Vec<Fault> + Send + Sync + 'static {
    move |_| vec![fault.clone()]
}

/// Whatever is said on the way to the server, for longer than six tries take: the bytes come when it is over.
#[test]
fn what_may_pass_is_waited_for() {
    let nonsense: &[Nonsense] = &[
        ("a wrong range", |origin| {
            origin.set_faults(script(Fault::WrongRange(512)));
        }),
        ("a range of two bytes", |origin| {
            origin.set_faults(|request: &Request| {
                let asked = named(request).map_or(0, |(start, end)| end - start + 1);
                vec![Fault::ShortRange(asked.saturating_sub(2))]
            });
        }),
        ("400", |origin| origin.set_faults(script(Fault::Status(400, None)))),
        ("401", |origin| origin.set_faults(script(Fault::Status(401, None)))),
        ("403", |origin| origin.set_faults(script(Fault::Status(403, None)))),
        ("404", |origin| origin.set_faults(script(Fault::Status(404, None)))),
        ("407", |origin| origin.set_faults(script(Fault::Status(407, None)))),
        ("416", |origin| origin.set_faults(script(Fault::Status(416, None)))),
        ("451", |origin| origin.set_faults(script(Fault::Status(451, None)))),
        ("501", |origin| origin.set_faults(script(Fault::Status(501, None)))),
        ("505", |origin| origin.set_faults(script(Fault::Status(505, None)))),
        ("a page in place of the layer", |origin| {
            origin.serve_blob("/layer.tar", &b"<html>please log in to this network</html>"[..]);
        }),
        ("a redirect in a circle", |origin| {
            origin.set_faults(script(Fault::Redirect("/layer.tar".to_owned())));
        }),
        ("no redirect for such as us", |origin| {
            origin.set_faults(script(Fault::Redirect("ftp://elsewhere/layer.tar".to_owned())));
        }),
    ];
    std::thread::scope(|scope| {
        for (name, begin) in nonsense {
            scope.spawn(move || {
                let (origin, data) = served();
                begin(&origin);
                let options = FetchOptions {
                    wrong_for: Duration::from_secs(60),
                    ..quick()
                };
                let fetcher = start(layer(&origin, "/layer.tar"), options);
                let reading = {
                    let fetcher = fetcher.clone();
                    std::thread::spawn(move || fetcher.read_blocking(vec![range(4096, 4096)]))
                };
                // Six tries and more: `quick` waits 50 ms and twice as long each time.
                wait_until("eight errors", || fetcher.stats().errors >= 8 || reading.is_finished());
                assert!(!reading.is_finished(), "{name}: {:?}", reading.join());
                let known = fetcher.stats().waiting;
                let address = origin.url("/layer.tar");
                assert!(known.iter().any(|wait| wait.place == address), "{name}: {known:?}");
                origin.clear_faults();
                origin.serve_blob("/layer.tar", data.as_slice());
                let bytes = reading
                    .join()
                    .unwrap()
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(joined(&bytes) == data[4096..8192], "{name}");
                let stats = fetcher.stats();
                assert_eq!((stats.read_errors, stats.in_flight), (0, 0), "{name}: {stats:?}");
            });
        }
    });
}

/// What is no HTTP at all, and heads that never end, are waited out as well.
#[test]
fn garbage_is_waited_out() {
    for garbage in [
        &b"\0\x01\x02 this is no HTTP \xff\xfe\r\n\r\n"[..],
        b"HTTP/9.9 999 \r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-4095/",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let data = noise(SIZE, 1);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (counted, served) = (asked.clone(), data.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, counted, served) = (stream.unwrap(), counted.clone(), served.clone());
                std::thread::spawn(move || {
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") {
                        if stream.read(&mut byte).unwrap_or(0) == 0 {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    if counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 9 {
                        let _ = stream.write_all(garbage);
                        return;
                    }
                    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                    let asked = head
                        .split("range: bytes=")
                        .nth(1)
                        .unwrap()
                        .split("\r\n")
                        .next()
                        .unwrap();
                    let (from, to) = asked.split_once('-').unwrap();
                    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                    let _ = write!(
                        stream,
                        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{SIZE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        to + 1 - from
                    );
                    let _ = stream.write_all(&served[from..=to]);
                });
            }
        });
        let url = format!("http://{address}/layer.tar").parse().unwrap();
        let blob = Blob::of_url(UrlBlob::new(&url), u(SIZE));
        let options = FetchOptions {
            prefetch: false,
            ..quick()
        };
        let fetcher = start(blob, options);
        let bytes = joined(&fetcher.read_blocking(vec![range(4096, 4096)]).unwrap());
        assert!(bytes == data[4096..8192]);
        assert!(fetcher.stats().errors >= 6, "{:?}", fetcher.stats());
    }
}

#[test]
fn wrong_answers_for_ever_are_an_error() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::WrongRange(512)]);
    let error = start(layer(&origin, "/layer.tar"), impatient())
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    assert!(
        matches!(error, FetchError::WrongAnswer { .. } | FetchError::Changed { .. }),
        "{error}"
    );
}

#[test]
fn the_deadline_ends_patience() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::Silence]);
    let options = FetchOptions {
        deadline: Duration::from_millis(400),
        ..quick()
    };
    let error = start(layer(&origin, "/layer.tar"), options)
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
}

#[test]
fn redirects_are_followed_and_asked_for_again_when_they_expire() {
    let (origin, data) = served();
    origin.serve_redirect("/signed", "/layer.tar", Duration::from_secs(60));
    let fetcher = start(layer(&origin, "/signed"), quick());
    for n in 0..20 {
        if n % 5 == 4 {
            origin.expire_redirects();
        }
        let start = n * 140_000;
        let bytes = joined(&fetcher.read_blocking(vec![range(start, 4096)]).unwrap());
        assert!(bytes == data[start..start + 4096]);
    }
    assert_eq!(fetcher.stats().read_errors, 0);
}

/// Some storages say 400 to a token that has run out. That is no word about ranges of where the next redirect leads.
#[test]
fn a_redirect_that_expires_with_a_400_does_not_cost_the_ranges() {
    let (origin, data) = served();
    origin.serve_redirect("/signed", "/layer.tar", Duration::from_secs(60));
    let options = FetchOptions {
        prefetch: false,
        ..quick()
    };
    let fetcher = start(layer(&origin, "/signed"), options);
    assert!(fetcher.read_blocking(vec![range(0, 4096)]).is_ok());
    origin.serve_blob("/moved.tar", data.as_slice());
    origin.serve_redirect("/signed", "/moved.tar", Duration::from_secs(60));
    origin.set_faults(|request: &Request| match request.path.as_str() {
        "/layer.tar" => vec![Fault::Status(400, None)],
        _ => Vec::new(),
    });
    let bytes = joined(&fetcher.read_blocking(vec![range(2_000_000, 4096)]).unwrap());
    assert!(bytes == data[2_000_000..2_004_096]);
    let log = origin.take_log();
    let whole = log
        .events
        .iter()
        .any(|event| event.path == "/moved.tar" && event.range == Some((0, u(SIZE))));
    assert!(!whole, "the whole layer was asked for");
    assert!(fetcher.stats().bytes_fetched < u(SIZE) / 4, "{:?}", fetcher.stats());
}

#[test]
fn a_redirect_loop_ends() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::Redirect("/layer.tar".to_owned())]);
    let error = start(layer(&origin, "/layer.tar"), impatient())
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    assert!(matches!(error, FetchError::WrongAnswer { .. }), "{error}");
}

#[test]
fn a_restart_finds_what_was_kept() {
    let (origin, data) = served();
    let dir = tempfile::tempdir().unwrap();
    let options = || FetchOptions {
        store: Some(DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap()),
        prefetch: false,
        ..quick()
    };
    let layer = in_state(layer(&origin, "/layer.tar"), tag_of(&origin));
    let fetcher = start(layer.clone(), options());
    fetcher.read_blocking(vec![range(0, 2_000_000)]).unwrap();
    fetcher.shutdown();
    drop(fetcher);
    drop(origin);
    let fetcher = start(
        layer,
        FetchOptions {
            deadline: Duration::from_millis(300),
            ..options()
        },
    );
    let slices = fetcher.read_blocking(vec![range(1000, 1_900_000)]).unwrap();
    assert!(joined(&slices) == data[1000..1_901_000]);
    assert!(matches!(
        fetcher.locate(range(65_536, 4096)),
        Located::Disk | Located::Memory(_)
    ));
    let error = fetcher.read_blocking(vec![range(2_500_000, 10)]).unwrap_err();
    assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
}

#[test]
fn shutting_down_answers_everybody() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::Silence]);
    let fetcher = start(layer(&origin, "/layer.tar"), quick());
    let waiting = {
        let fetcher = fetcher.clone();
        std::thread::spawn(move || fetcher.read_blocking(vec![range(0, 4096)]))
    };
    std::thread::sleep(Duration::from_millis(50));
    fetcher.shutdown();
    assert!(matches!(waiting.join().unwrap(), Err(FetchError::Stopped)));
}

/// A server that closes every connection after its answer, and more readers than connections: a connection that ends hands
/// its place to whoever waits for one.
#[test]
fn readers_that_wait_for_a_connection_outlive_its_end() {
    let (origin, data) = served();
    origin.set_faults(|_| vec![Fault::Close]);
    let closing = layer(&origin, "/layer.tar");
    let options = FetchOptions {
        connections: 1,
        prefetch: false,
        ..quick()
    };
    let fetcher = start(closing, options);
    let (tell, told) = std::sync::mpsc::channel();
    for n in 0..12 {
        let (fetcher, tell) = (fetcher.clone(), tell.clone());
        std::thread::spawn(move || {
            let start = n * 240_000;
            let read = fetcher.read_blocking(vec![range(start, 4096)]).unwrap();
            tell.send((start, joined(&read))).unwrap();
        });
    }
    for done in 0..12 {
        let (start, bytes) = told
            .recv_timeout(Duration::from_secs(50))
            .unwrap_or_else(|_| panic!("{done} of 12 reads came back: {:?}", fetcher.stats()));
        assert!(bytes == data[start..start + 4096]);
    }
}

/// Where a redirect led before there is another layer now, but the original leads to the right one.
#[test]
fn a_redirect_that_leads_elsewhere_now_is_asked_for_again() {
    let (origin, data) = served();
    origin.serve_redirect("/signed", "/layer.tar", Duration::from_secs(60));
    let options = FetchOptions {
        prefetch: false,
        ..quick()
    };
    let fetcher = start(layer(&origin, "/signed"), options);
    assert!(fetcher.read_blocking(vec![range(0, 4096)]).is_ok());
    origin.serve_blob("/layer.tar", &b"an error page that calls itself a success"[..]);
    origin.serve_blob("/moved.tar", data.as_slice());
    origin.serve_redirect("/signed", "/moved.tar", Duration::from_secs(60));
    let bytes = joined(&fetcher.read_blocking(vec![range(2_000_000, 4096)]).unwrap());
    assert!(bytes == data[2_000_000..2_004_096]);
}

/// A cache whose disk fills up in the middle of a write takes no more; what is read on is none the worse for it.
#[test]
fn a_full_disk_is_no_end() {
    // More than may wait to be written, of a server that has to be read from end to end.
    const MANY: usize = 72 << 20;
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let flags = rustix::mount::MountFlags::empty();
    if let Err(error) = rustix::mount::mount("none", dir.path(), c"tmpfs", flags, c"size=1m,mode=700") {
        return common::skip("a_full_disk_is_no_end", &format!("cannot mount a small tmpfs: {error}"));
    }
    let small = Mounted(dir);
    let mut data = noise(1 << 20, 1).repeat(MANY >> 20);
    for (n, megabyte) in (0u8..).zip(data.chunks_mut(1 << 20)) {
        megabyte.iter_mut().step_by(4096).for_each(|byte| *byte = n);
    }
    let origin = Origin::start().unwrap();
    origin.serve_blob("/layer.tar", data.as_slice());
    origin.set_ranges(false);
    let options = FetchOptions {
        store: Some(DiskCache::open(small.0.path(), CacheLimit::bytes(1 << 40)).unwrap()),
        ..quick()
    };
    let big = Blob {
        len: u(MANY),
        ..layer(&origin, "/layer.tar")
    };
    let fetcher = start(big, options);
    let (tell, told) = std::sync::mpsc::channel();
    let reader = fetcher.clone();
    std::thread::spawn(move || tell.send(reader.read_blocking(vec![range(MANY - 8192, 8192)])));
    let read = told
        .recv_timeout(Duration::from_secs(100))
        .expect("the stream stands still");
    assert!(joined(&read.unwrap()) == data[MANY - 8192..]);
    fetcher.shutdown();
}

/// The bytes that a request names, if it names any: the first and the last.
fn named(request: &Request) -> Option<(u64, u64)> {
    let (first, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

#[test]
fn a_server_that_refuses_ranges_is_asked_without() {
    for status in [400, 501] {
        let (origin, data) = served();
        origin.set_faults(move |request: &Request| match named(request) {
            Some(_) => vec![Fault::Status(status, None)],
            None => Vec::new(),
        });
        let fetcher = start(layer(&origin, "/layer.tar"), quick());
        hammer(&fetcher, &data, 12);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.retries),
            (0, 0, 0),
            "{status}: {stats:?}"
        );
        // Every reader may have asked before the first answer showed what server it is; the stream is one.
        assert!(stats.bytes_fetched < 2 * u(SIZE), "{status}: {stats:?}");
    }
}

#[test]
fn parts_shorter_than_asked_for_are_used_and_the_rest_is_asked_for() {
    // Not a multiple of a chunk, and less than one; a flight is many of them.
    for most in [40_000, 10_007] {
        let (origin, data) = served();
        origin.set_faults(move |request: &Request| match named(request) {
            Some((first, last)) if last - first >= most => vec![Fault::ShortRange(last + 1 - first - most)],
            _ => Vec::new(),
        });
        let fetcher = start(layer(&origin, "/layer.tar"), quick());
        hammer(&fetcher, &data, 12);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.errors, stats.read_errors, stats.in_flight),
            (0, 0, 0),
            "{most}: {stats:?}"
        );
        assert!(stats.requests > u(SIZE) / 4 / most, "{most}: {stats:?}");
    }
}

#[test]
fn a_server_that_wishes_to_be_left_alone_past_the_deadline_is_an_error_at_once() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::Status(429, Some(3600))]);
    let options = FetchOptions {
        deadline: Duration::from_secs(600),
        ..quick()
    };
    let error = start(layer(&origin, "/layer.tar"), options)
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, FetchError::Deadline { .. }), "{said}");
    assert!(
        said.contains("429 Too Many Requests") && said.contains("60min"),
        "{said}"
    );
}

#[test]
fn what_is_waited_for_stands_in_the_statistics() {
    let (origin, _) = served();
    origin.set_faults(|_: &_| vec![Fault::Status(503, Some(3600))]);
    let options = FetchOptions {
        deadline: Duration::MAX,
        ..quick()
    };
    let fetcher = start(layer(&origin, "/layer.tar"), options);
    let waiting = {
        let fetcher = fetcher.clone();
        std::thread::spawn(move || fetcher.read_blocking(vec![range(0, 4096)]))
    };
    let address = origin.url("/layer.tar");
    // Other tests of this process may wait for something, too.
    let waits = || fetcher.stats().waiting.into_iter().find(|wait| wait.place == address);
    wait_until("that it waits", || waits().is_some());
    let wait = waits().unwrap();
    assert!(wait.why.contains("503 Service Unavailable"), "{wait:?}");
    assert!((3_000_000..=3_600_000).contains(&wait.left_ms), "{wait:?}");
    fetcher.shutdown();
    assert!(matches!(waiting.join().unwrap(), Err(FetchError::Stopped)));
    // The thread answers before it ends.
    wait_until("that nothing waits", || waits().is_none());
}

/// What is at a URL has no digest: an encoding that has come or gone since it was found makes other bytes of it.
#[test]
fn another_encoding_than_the_one_found_is_refused() {
    let (origin, _) = served();
    let found = layer(&origin, "/layer.tar");
    let Place::Url(at) = found.place else { panic!("a URL") };
    let encoded = Blob {
        place: Place::Url(UrlBlob {
            encoding: Some("gzip".to_owned()),
            ..at
        }),
        ..found
    };
    let error = start(encoded, impatient())
        .read_blocking(vec![range(0, 4096)])
        .unwrap_err();
    assert!(matches!(error, FetchError::WrongAnswer { .. }), "{error}");
    assert!(error.to_string().contains("Content-Encoding"), "{error}");
}

/// A process that has no descriptor left for a connection waits for one. Alone in its process, because all others would be without
/// one too.
#[test]
fn a_shortage_of_descriptors_is_a_wait() {
    const NAME: &str = "a_shortage_of_descriptors_is_a_wait";
    if std::env::var_os("TARBLK_TEST_ALONE").is_none() {
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env("TARBLK_TEST_ALONE", "1")
            .status()
            .unwrap();
        assert!(alone.success(), "{alone}");
        return;
    }
    // TCP sockets of this process, listening ones too.
    let sockets = || {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let inodes = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(9));
        let tcp: BTreeSet<String> = inodes.map(|inode| format!("socket:[{inode}]")).collect();
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let files = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        files.filter(|file| tcp.contains(&*file.to_string_lossy())).count()
    };
    let (origin, data) = served();
    let options = FetchOptions {
        prefetch: false,
        ..quick()
    };
    let listening = sockets();
    let fetcher = start(layer(&origin, "/layer.tar"), options);
    assert!(fetcher.read_blocking(vec![range(0, 4096)]).is_ok());
    let limit = rustix::process::Rlimit {
        current: Some(256),
        maximum: Some(256),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let mut taken = Vec::new();
    origin.drop_connections();
    // What the ends of connections give back is taken as well.
    wait_until("that all connections have ended", || sockets() <= listening);
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    let reading = {
        let fetcher = fetcher.clone();
        std::thread::spawn(move || fetcher.read_blocking(vec![range(1_000_000, 4096)]))
    };
    wait_until("three errors", || fetcher.stats().errors >= 3 || reading.is_finished());
    assert!(!reading.is_finished(), "{:?}", reading.join().unwrap().err());
    drop(taken);
    let bytes = joined(&reading.join().unwrap().unwrap());
    assert!(bytes == data[1_000_000..1_004_096]);
    assert_eq!(fetcher.stats().read_errors, 0);
}
