//! A way to a server on loopback that is long: a relay that holds back what passes as a real path would. In: a server's address,
//! a round trip. Out: an address to connect to, and a log of the requests that passed.
//!
//! A connection is usable one round trip after it was made. What the client sends arrives half a round trip later. What the
//! server sends leaves as fast as TCP's slow start lets it (RFC 5681, RFC 6928): ten segments at first, and for every segment
//! that is acknowledged, one round trip after it left, one more; from ten segments again after a pause of 200 ms. Each
//! connection has its own window. All of them together go no faster than the link, if it has a rate; its queue is as long as it takes,
//! and nothing is lost. Requests are taken to fit the first window.

// Not every benchmark looks at what passed.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What a segment carries on an Ethernet with time stamps, in bytes.
const SEGMENT: usize = 1448;
/// The initial window, in segments.
const FIRST_WINDOW: usize = 10;
/// A window is forgotten after a pause of this (Linux's shortest retransmission timeout).
const PAUSE: Duration = Duration::from_millis(200);

/// A request that passed.
#[derive(Clone, Debug)]
pub(crate) struct Passed {
    /// Its connection, counted from 0, and when the client made that.
    pub(crate) connection: usize,
    pub(crate) connected: Instant,
    /// The first line without the version.
    pub(crate) what: String,
    /// When the client wrote it, when the answer's first and latest bytes reached the client.
    pub(crate) sent: Instant,
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    /// The answer's status line without the version, and its bytes, head included.
    pub(crate) status: String,
    pub(crate) bytes: usize,
}

impl Passed {
    /// How many round trips it took, from being written until the answer was there.
    pub(crate) fn round_trips(&self, rtt: Duration) -> f64 {
        let took = self
            .last
            .map_or(Duration::ZERO, |last| last.saturating_duration_since(self.sent));
        took.as_secs_f64() / rtt.as_secs_f64()
    }
}

type Log = Arc<Mutex<Vec<Passed>>>;

fn locked(log: &Log) -> std::sync::MutexGuard<'_, Vec<Passed>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A relay. Dropping it ends it for new connections; old ones end with their client or server.
pub(crate) struct Far {
    address: SocketAddr,
    log: Log,
    stopping: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

impl Far {
    /// A way of one `rtt` to `server`.
    pub(crate) fn from(server: SocketAddr, rtt: Duration) -> io::Result<Self> {
        Self::with_rate(server, rtt, None)
    }

    /// The same, over which no more than `rate` bytes come in a second.
    pub(crate) fn with_rate(server: SocketAddr, rtt: Duration, rate: Option<u32>) -> io::Result<Self> {
        let link = Link {
            rate,
            free: Arc::new(Mutex::new(Instant::now())),
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let far = Self {
            address: listener.local_addr()?,
            log: Log::default(),
            stopping: Arc::default(),
            connections: Arc::default(),
        };
        let (log, stopping, count) = (far.log.clone(), far.stopping.clone(), far.connections.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let connected = Instant::now();
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), log) = (stream, log.clone()) else {
                    continue;
                };
                let number = count.fetch_add(1, Ordering::SeqCst);
                let link = link.clone();
                thread::spawn(move || relay(&stream, server, (rtt, &link), Connection { number, connected, log }));
            }
        });
        Ok(far)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The requests and the number of connections since the last time.
    pub(crate) fn take(&self) -> (Vec<Passed>, usize) {
        let mut log = std::mem::take(&mut *locked(&self.log));
        log.sort_by_key(|passed| passed.sent);
        (log, self.connections.swap(0, Ordering::SeqCst))
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes accept(2).
        let _ = TcpStream::connect(self.address);
    }
}

/// What all connections share.
#[derive(Clone)]
struct Link {
    /// Bytes in a second; as many as there are, if none.
    rate: Option<u32>,
    /// From when it is free.
    free: Arc<Mutex<Instant>>,
}

impl Link {
    /// No piece is longer, so that connections take turns.
    const PIECE: usize = 64 << 10;

    /// When `len` bytes that are at its beginning at `at` have passed.
    fn passes(&self, at: Instant, len: usize) -> Instant {
        let Some(rate) = self.rate else { return at };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = at.max(*free) + Duration::from_secs_f64(f64::from(len) / f64::from(rate));
        *free
    }
}

struct Connection {
    number: usize,
    connected: Instant,
    log: Log,
}

impl Connection {
    /// Notes what the client writes: the first line of a request that begins here.
    fn asked(&self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]).into_owned();
        let line = text.lines().next().unwrap_or_default();
        if let Some(what) = line.strip_suffix(" HTTP/1.1") {
            locked(&self.log).push(Passed {
                connection: self.number,
                connected: self.connected,
                what: what.to_owned(),
                sent: Instant::now(),
                first: None,
                last: None,
                status: String::new(),
                bytes: 0,
            });
        }
    }

    /// Notes what reaches the client.
    fn answered(&self, bytes: &[u8]) {
        let mut log = locked(&self.log);
        let Some(passed) = log.iter_mut().rev().find(|passed| passed.connection == self.number) else {
            return;
        };
        let now = Instant::now();
        if passed.first.is_none() {
            passed.first = Some(now);
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]).into_owned();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("HTTP/1.1 ").clone_into(&mut passed.status);
        }
        passed.last = Some(now);
        passed.bytes += bytes.len();
    }
}

fn sleep_until(at: Instant) {
    thread::sleep(at.saturating_duration_since(Instant::now()));
}

fn relay(client: &TcpStream, server: SocketAddr, (rtt, link): (Duration, &Link), connection: Connection) {
    let Ok(server) = TcpStream::connect(server) else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let connection = Arc::new(connection);
    let usable = connection.connected + rtt;
    let half = rtt / 2;
    thread::scope(|scope| {
        let (come, coming) = channel::<(Instant, Vec<u8>)>();
        let (land, landing) = channel::<(Instant, Vec<u8>)>();
        let server = &server;
        let noting = connection.clone();
        scope.spawn(move || {
            pass(client, |bytes| {
                noting.asked(bytes);
                sleep_until(Instant::now().max(usable) + half);
                let mut to = server;
                to.write_all(bytes)
            });
            let _ = server.shutdown(Shutdown::Write);
        });
        scope.spawn(move || {
            pass(server, |bytes| {
                come.send((Instant::now(), bytes.to_vec())).map_err(io::Error::other)
            });
        });
        scope.spawn(move || pace(&coming, &land, rtt, link));
        for (at, bytes) in landing {
            sleep_until(at);
            let mut to = client;
            // Before it is written: the client's next request may be here a moment later.
            connection.answered(&bytes);
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
    });
}

fn pass(mut from: &TcpStream, mut to: impl FnMut(&[u8]) -> io::Result<()>) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(got) = from.read(&mut buffer) {
        if got == 0 || to(&buffer[..got]).is_err() {
            return;
        }
    }
}

/// Slow start: decides when each piece of what the server wrote leaves, and so when it lands.
fn pace(coming: &Receiver<(Instant, Vec<u8>)>, land: &Sender<(Instant, Vec<u8>)>, rtt: Duration, link: &Link) {
    let mut window = FIRST_WINDOW * SEGMENT;
    // What is on its way, and when its acknowledgement will be here.
    let mut flying: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut aloft = 0;
    let mut clock: Option<Instant> = None;
    for (ready, bytes) in coming {
        let mut now = clock.map_or(ready, |clock| clock.max(ready));
        if clock.is_some_and(|clock| ready.saturating_duration_since(clock) > PAUSE) {
            window = FIRST_WINDOW * SEGMENT;
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            // In pieces as long as the window lets them be, since each costs a wake-up here; none shorter than a segment, but the last.
            let shortest = rest.len().min(SEGMENT);
            while let Some((at, gone)) = flying.front().copied()
                && (at <= now || aloft + shortest > window)
            {
                now = now.max(at);
                window += gone;
                aloft -= gone;
                flying.pop_front();
            }
            let len = rest.len().min(window - aloft).min(Link::PIECE);
            let (piece, behind) = rest.split_at(len);
            rest = behind;
            let passed = link.passes(now, len);
            flying.push_back((passed + rtt, len));
            aloft += len;
            if land.send((passed + rtt / 2, piece.to_vec())).is_err() {
                return;
            }
        }
        clock = Some(now);
    }
}
