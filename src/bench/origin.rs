//! An HTTP/1.1 origin on loopback that a test can trust and a benchmark can slow down. In: files, blobs, a link, faults.
//! Out: a URL, counters and a log of what was asked.
//!
//! It answers `GET` and `HEAD` with single ranges, strong entity tags and `If-Range`, keeps connections alive, and serves
//! each one on a thread of its own; unthrottled files leave by `sendfile`. It must never be reachable from elsewhere and
//! answers no path that was not registered.
//!
//! # The simulated link
//! `rtt` is charged where a real path would charge it: a new connection is usable one round trip after it was accepted, and
//! each answer begins one round trip after its request arrived. `rate` is one first-in first-out link that all answers
//! share in small pieces (16 KiB, or 200 µs worth of a fast link), scheduled on a virtual clock: a piece arrives when the
//! link has carried it, late wake-ups are caught up, and nothing spins. A body that its reader drops keeps the link busy
//! for one more round trip, as bytes already under way do. TCP's slow start, packet headers and loss are not modelled.

mod fault;
mod link;
mod respond;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use fault::{Fault, FaultScript, at_random};
pub use link::Link;

use crate::checksum;
use link::Clock;
pub(super) use link::time_for;

/// The longest request head that is read, in bytes.
const MAX_HEAD: u64 = 32 * 1024;

/// How far apart the points of [`Log::timeline`] are at least.
const TIMELINE_STEP: Duration = Duration::from_millis(1);

/// The media type of bytes that nothing else is said of.
const OCTETS: &str = "application/octet-stream";

/// What a path serves.
#[derive(Clone, Debug)]
enum Content {
    Blob {
        bytes: Arc<[u8]>,
        etag: String,
        kind: String,
    },
    File {
        file: Arc<File>,
        len: u64,
        etag: String,
    },
    Redirect {
        to: String,
        valid: Duration,
    },
}

/// A request as a [`FaultScript`] sees it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its number among all requests of this origin, counted from 0 in order of arrival.
    pub number: u64,
    /// The connection it came on, counted from 0.
    pub connection: u64,
    /// `GET`, `HEAD` or whatever was sent.
    pub method: String,
    /// The path without its query.
    pub path: String,
    /// What stands behind the `?`, empty if nothing.
    pub query: String,
    /// The header fields as sent, names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of a header field, by its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// One answered (or broken off) request.
#[derive(Clone, Debug)]
pub struct Event {
    /// When the request had arrived, since the log began.
    pub at: Duration,
    /// When the last byte of its answer had left, or it was broken off.
    pub done: Duration,
    /// The connection, counted from 0.
    pub connection: u64,
    /// `GET`, `HEAD`, …
    pub method: String,
    /// The path without its query.
    pub path: String,
    /// The status that was sent; 0 when the connection was reset before one.
    pub status: u16,
    /// The bytes the answer claims to hold: first, and one past the last. None for answers without content.
    pub range: Option<(u64, u64)>,
    /// The body bytes that left.
    pub bytes: u64,
}

/// What an origin has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub connections: u64,
    /// Requests read, faulty answers included.
    pub requests: u64,
    /// Body bytes sent, those of dropped bodies included.
    pub bytes: u64,
}

/// The log of an origin.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// How many requests have arrived, those included that are not answered yet.
    pub arrived: u64,
    /// The requests in the order in which their answers ended.
    pub events: Vec<Event>,
    /// Body bytes sent in all by the given time since the log began; ascending.
    pub timeline: Vec<(Duration, u64)>,
}

/// What connections share.
struct Shared {
    contents: RwLock<HashMap<String, Content>>,
    clock: Clock,
    script: Mutex<Option<FaultScript>>,
    ranges: AtomicBool,
    stopping: AtomicBool,
    connections: AtomicU64,
    requests: AtomicU64,
    answering: AtomicU64,
    bytes: AtomicU64,
    log: Mutex<Started>,
    open: Mutex<HashMap<u64, TcpStream>>,
    redirects: Mutex<Tokens>,
}

/// The log and when it began.
struct Started {
    began: Instant,
    bytes: u64,
    log: Log,
}

/// The paths behind redirects, and the tokens handed out for them.
#[derive(Default)]
struct Tokens {
    guarded: HashSet<String>,
    issued: HashMap<String, Instant>,
}

/// A running origin. Dropping it closes its connections and ends its threads.
///
/// ```no_run
/// # use tarblk::internals::bench::origin::{Link, Origin};
/// # use std::time::Duration;
/// let origin = Origin::start()?;
/// origin.serve_file("/layer.tar", "layer.tar".as_ref())?;
/// origin.set_link(Link { rtt: Duration::from_millis(20), rate: Some(25_000_000) });
/// println!("curl -r 0-511 {}", origin.url("/layer.tar"));
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Origin {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin")
            .field("address", &self.address)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

impl Origin {
    /// Starts an origin on a free port of 127.0.0.1 that serves nothing yet, over an unlimited link.
    ///
    /// # Errors
    /// When no port or thread can be had.
    pub fn start() -> io::Result<Self> {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// Starts an origin at a given address, so that a test can stop one and start another in its place.
    ///
    /// # Errors
    /// When the address is not of this machine's loopback, in use, or no thread can be had.
    pub fn start_at(address: SocketAddr) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{address} is not a loopback address"),
            ));
        }
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            contents: RwLock::default(),
            clock: Clock::default(),
            script: Mutex::default(),
            ranges: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            answering: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            log: Mutex::new(Started {
                began: Instant::now(),
                bytes: 0,
                log: Log::default(),
            }),
            open: Mutex::default(),
            redirects: Mutex::default(),
        });
        let acceptor = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("origin-accept".into())
                .spawn(move || accept(&listener, &shared))?
        };
        Ok(Self {
            shared,
            address,
            acceptor: Some(acceptor),
        })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of `path`, which begins with a slash.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Serves a file under `path`, as long as it is now.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn serve_file(&self, path: &str, file: &Path) -> io::Result<()> {
        self.serve_open_file(path, File::open(file)?)
    }

    /// Serves an open file under `path`, as long as it is now; its position does not matter.
    ///
    /// # Errors
    /// When it is not a regular file.
    pub fn serve_open_file(&self, path: &str, file: File) -> io::Result<()> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let changed = meta
            .modified()?
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let etag = format!("\"{:x}-{:x}\"", changed.as_nanos(), meta.len());
        self.put(
            path,
            Content::File {
                file: Arc::new(file),
                len: meta.len(),
                etag,
            },
        );
        Ok(())
    }

    /// Serves bytes from memory under `path`.
    pub fn serve_blob(&self, path: &str, bytes: impl Into<Arc<[u8]>>) {
        self.serve_typed(path, OCTETS, bytes);
    }

    /// Serves bytes from memory under `path` as content of the media type `kind`.
    pub fn serve_typed(&self, path: &str, kind: &str, bytes: impl Into<Arc<[u8]>>) {
        let bytes = bytes.into();
        let etag = format!("\"{:08x}-{:x}\"", checksum::crc32c(&bytes), bytes.len());
        let kind = kind.into();
        self.put(path, Content::Blob { bytes, etag, kind });
    }

    /// Answers `path` with a 307 to `to?token=…`; from now on `to` is served only to a token younger than `valid`, to others
    /// it is a 403, as signed URLs of registries are.
    pub fn serve_redirect(&self, path: &str, to: &str, valid: Duration) {
        lock(&self.shared.redirects).guarded.insert(to.into());
        self.put(path, Content::Redirect { to: to.into(), valid });
    }

    /// Makes every token handed out so far invalid.
    pub fn expire_redirects(&self) {
        lock(&self.shared.redirects).issued.clear();
    }

    /// Serves nothing under `path` any more.
    pub fn remove(&self, path: &str) {
        self.shared
            .contents
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(path);
    }

    fn put(&self, path: &str, content: Content) {
        self.shared
            .contents
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.into(), content);
    }

    /// Changes the link for what is asked from now on; bodies under way follow within one piece.
    pub fn set_link(&self, link: Link) {
        self.shared.clock.set(link);
    }

    /// Whether ranges are answered at all. Without, the origin is a server that has never heard of `Range`.
    pub fn set_ranges(&self, on: bool) {
        self.shared.ranges.store(on, Ordering::Relaxed);
    }

    /// Asks `script` before each answer which faults it is to have; replaces any earlier script.
    pub fn set_faults(&self, script: impl Fn(&Request) -> Vec<Fault> + Send + Sync + 'static) {
        *lock(&self.shared.script) = Some(Arc::new(script));
    }

    /// No more faults.
    pub fn clear_faults(&self) {
        *lock(&self.shared.script) = None;
    }

    /// Closes every open connection, as a restarted server would.
    pub fn drop_connections(&self) {
        for stream in lock(&self.shared.open).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// What it has done since it started; see [`Origin::settle`].
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            connections: self.shared.connections.load(Ordering::Relaxed),
            requests: self.shared.requests.load(Ordering::Relaxed),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
        }
    }

    /// The log as it is now, answers under way not included.
    #[must_use]
    pub fn log(&self) -> Log {
        lock(&self.shared.log).log.clone()
    }

    /// Waits until no answer is under way, 50 ms at most: a client may have read an answer to its end a moment before it is
    /// counted and logged.
    pub fn settle(&self) {
        for _ in 0..50 {
            if self.shared.answering.load(Ordering::SeqCst) == 0 {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes the log, settled, and begins a new one at this moment.
    #[must_use]
    pub fn take_log(&self) -> Log {
        self.settle();
        let mut log = lock(&self.shared.log);
        log.began = Instant::now();
        log.bytes = 0;
        std::mem::take(&mut log.log)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.drop_connections();
        // The acceptor sleeps in accept(2): one more connection wakes it.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// A lock that outlives a panicking holder: the data behind these locks is valid at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Accepts connections until told to stop, then waits for their threads.
fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            break;
        }
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, most likely: give the others time to close theirs.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        threads.retain(|thread| !thread.is_finished());
        let number = shared.connections.fetch_add(1, Ordering::Relaxed);
        let usable = Instant::now() + shared.clock.link().rtt;
        let shared = Arc::clone(shared);
        let spawned = thread::Builder::new()
            .name("origin".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let _ = rustix::thread::set_current_timer_slack(Some(core::num::NonZeroU64::MIN));
                if let Ok(twin) = stream.try_clone() {
                    lock(&shared.open).insert(number, twin);
                    if shared.stopping.load(Ordering::SeqCst) {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                    converse(&stream, number, usable, &shared);
                    lock(&shared.open).remove(&number);
                }
            });
        threads.extend(spawned);
    }
    for stream in lock(&shared.open).values() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Answers the requests of one connection until it ends.
fn converse(stream: &TcpStream, connection: u64, usable: Instant, shared: &Shared) {
    let _ = stream.set_nodelay(true);
    let Ok(input) = stream.try_clone() else { return };
    let mut input = BufReader::new(input);
    while let Ok(Some(mut request)) = read_request(&mut input) {
        let arrived = Instant::now();
        request.connection = connection;
        request.number = shared.requests.fetch_add(1, Ordering::Relaxed);
        lock(&shared.log).log.arrived += 1;
        let begin = arrived.max(usable) + shared.clock.link().rtt;
        shared.answering.fetch_add(1, Ordering::SeqCst);
        let after = respond::respond(stream, &request, arrived, begin, shared);
        shared.answering.fetch_sub(1, Ordering::SeqCst);
        match after {
            Ok(respond::After::Keep) => {}
            Ok(respond::After::Close) | Err(_) => break,
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// Reads one request head; None when the peer has closed. Bodies are not expected and would be read as the next request.
fn read_request(input: &mut impl BufRead) -> io::Result<Option<Request>> {
    let mut input = input.take(MAX_HEAD);
    let mut line = String::new();
    if input.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP/1.1 request");
    let mut words = line.split_ascii_whitespace();
    let (method, target) = words.next().zip(words.next()).ok_or_else(bad)?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        number: 0,
        connection: 0,
        method: method.into(),
        path: path.into(),
        query: query.into(),
        headers: Vec::new(),
    };
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Err(bad());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some(request));
        }
        let (name, value) = line.split_once(':').ok_or_else(bad)?;
        request
            .headers
            .push((name.trim().to_ascii_lowercase(), value.trim().into()));
    }
}

impl Shared {
    /// Notes that `bytes` more body bytes have left.
    fn count(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut log = lock(&self.log);
        log.bytes += bytes;
        let (now, total) = (log.began.elapsed(), log.bytes);
        let timeline = &mut log.log.timeline;
        let len = timeline.len();
        // The last point moves on until it is a step away from the one before it.
        if len >= 2 && timeline[len - 1].0 < timeline[len - 2].0 + TIMELINE_STEP {
            timeline[len - 1] = (now, total);
        } else {
            timeline.push((now, total));
        }
    }

    /// Sleeps until `when`, or until the origin stops.
    fn sleep_until(&self, when: Instant) {
        const GLANCE: Duration = Duration::from_millis(50);
        loop {
            let left = when.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopping.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(left.min(GLANCE));
        }
    }

    /// Sleeps until the other side of `stream` has closed, or the origin stops. Whatever it still says is not heard.
    fn sleep_until_gone(&self, mut stream: &TcpStream) {
        let mut ignored = [0; 1024];
        loop {
            match stream.read(&mut ignored) {
                Ok(n) if n > 0 && !self.stopping.load(Ordering::Relaxed) => {}
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests;
