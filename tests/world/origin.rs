//! A server in memory, and the line to it. In: HTTP requests as the fetcher sends them. Out: what was asked for, or what a server,
//! a proxy or a line makes of it on a bad day.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex};
use tokio::time::{Instant, sleep};

use super::chance::Chance;

/// What can go wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another status, which servers send that are busy, broken, or do not know us for a while.
    Status(u16),
    /// 503 or 429, and when to come back, in seconds.
    Later(u16, u64),
    /// The connection ends before the answer, as a connection ends.
    Closed,
    /// The connection breaks before the answer.
    Reset,
    /// No answer, ever.
    Silence,
    /// Half of a head, then the end.
    HalfHead,
    /// Something that is not HTTP.
    Garbage,
    /// A 206 with another range than was asked for.
    OtherRange,
    /// A 206 that says the whole has another length.
    OtherLength,
    /// A 206 without a Content-Range.
    NoRange,
    /// Less of the range, which is allowed.
    LessRange,
    /// The body ends early.
    ShortBody,
    /// The body breaks.
    BrokenBody,
    /// The body stops, and the connection stays open.
    Stall,
    /// A byte now and then.
    Trickle,
    /// More than was asked for.
    LongBody,
    /// The whole blob, as servers answer that know no ranges.
    Whole,
    /// To another path of the same server.
    Redirect,
    /// A byte is another one.
    Flip,
    /// The bytes of another place, under the right head.
    OtherBytes,
}

/// What is the same, and right, or says of itself that it is not.
pub(crate) const HONEST: &[Fault] = &[
    Fault::Status(500),
    Fault::Status(502),
    Fault::Status(404),
    Fault::Status(403),
    Fault::Later(503, 1),
    Fault::Later(429, 4),
    Fault::Closed,
    Fault::Reset,
    Fault::Silence,
    Fault::HalfHead,
    Fault::Garbage,
    Fault::OtherRange,
    Fault::NoRange,
    Fault::LessRange,
    Fault::ShortBody,
    Fault::BrokenBody,
    Fault::Stall,
    Fault::Trickle,
    Fault::LongBody,
    Fault::Redirect,
];
/// What nothing but a digest tells from the right bytes.
pub(crate) const LIES: &[Fault] = &[Fault::Flip, Fault::OtherBytes];

/// What a server and its line are like.
#[derive(Clone, Debug)]
pub(crate) struct Weather {
    /// Faults that happen, if any does.
    pub(crate) faults: Vec<Fault>,
    /// How often in a thousand answers.
    pub(crate) permille: u64,
    /// How often in a thousand there is no connection.
    pub(crate) unreachable: u64,
    /// One way, in microseconds, at most.
    pub(crate) latency: u64,
    /// Bytes in a millisecond.
    pub(crate) rate: u64,
    /// All is well from then on.
    pub(crate) clears: Instant,
}

/// A blob that is served.
pub(crate) struct Served {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) tag: String,
}

/// The server.
pub(crate) struct Origin {
    pub(crate) weather: Weather,
    pub(crate) blobs: Vec<Served>,
    pub(crate) chance: RefCell<Chance>,
    pub(crate) requests: Cell<u64>,
    /// How often each fault happened.
    pub(crate) happened: RefCell<Vec<Fault>>,
    pub(crate) log: Rc<super::Log>,
}

/// A line that can break: an end in memory that fails once the server says so.
pub(crate) struct Line {
    inner: DuplexStream,
    broken: Rc<Cell<bool>>,
}

impl AsyncRead for Line {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, out);
        let ended = matches!(read, Poll::Ready(Ok(()))) && out.filled().len() == before && out.remaining() > 0;
        if ended && self.broken.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        read
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// What follows an answer.
enum Next {
    Request,
    End,
    Break,
    Hold,
}

impl Origin {
    fn trip(&self) -> Duration {
        Duration::from_micros(1 + self.chance.borrow_mut().below(self.weather.latency.max(1)))
    }

    fn is_clear(&self) -> bool {
        Instant::now() >= self.weather.clears
    }

    /// A new connection.
    pub(crate) async fn connect(self: Rc<Self>) -> io::Result<Line> {
        sleep(self.trip() * 2).await;
        if !self.is_clear() && self.chance.borrow_mut().happens(self.weather.unreachable) {
            let kind = self.chance.borrow_mut().one(&[
                io::ErrorKind::ConnectionRefused,
                io::ErrorKind::HostUnreachable,
                io::ErrorKind::TimedOut,
            ]);
            self.log.say(|| format!("no connection: {kind}"));
            if kind == io::ErrorKind::TimedOut {
                // Longer than any deadline of a connection.
                sleep(Duration::from_secs(120)).await;
            }
            return Err(kind.into());
        }
        let (inner, far) = duplex(64 << 10);
        let broken = Rc::new(Cell::new(false));
        let line = Line {
            inner,
            broken: broken.clone(),
        };
        tokio::task::spawn_local(async move {
            // The other end may go at any time.
            if let Ok(Next::Break) = self.serve(far).await {
                broken.set(true);
            }
        });
        Ok(line)
    }

    async fn serve(&self, far: DuplexStream) -> io::Result<Next> {
        let mut far = Some(far);
        while let Some(line) = &mut far {
            let Some((path, range)) = request(line).await? else {
                break;
            };
            sleep(self.trip()).await;
            match self.answer(line, &path, range).await? {
                Next::Request => {}
                Next::Hold => {
                    // Until the other end gives up.
                    let mut rest = [0; 64];
                    while line.read(&mut rest).await? > 0 {}
                    return Ok(Next::End);
                }
                Next::End => return Ok(Next::End),
                // Told before the line is dropped, so that whoever reads its end knows how it ended.
                Next::Break => return Ok(Next::Break),
            }
        }
        Ok(Next::End)
    }

    fn fault(&self) -> Option<Fault> {
        let mut chance = self.chance.borrow_mut();
        let happens = !self.is_clear() && chance.happens(self.weather.permille);
        (happens && !self.weather.faults.is_empty()).then(|| chance.one(&self.weather.faults))
    }

    #[allow(clippy::too_many_lines, reason = "one arm a fault")]
    async fn answer(&self, line: &mut DuplexStream, path: &str, range: Option<(usize, usize)>) -> io::Result<Next> {
        self.requests.set(self.requests.get() + 1);
        let number = path.rsplit('/').next().and_then(|name| name.parse::<usize>().ok());
        let blob = number
            .and_then(|number| self.blobs.get(number))
            .expect("a path that was given out");
        let fault = self.fault();
        if let Some(fault) = fault {
            self.happened.borrow_mut().push(fault);
        }
        self.log.say(|| format!("GET {path} {range:?}: {fault:?}"));
        let len = blob.bytes.len();
        let (from, to) = range.map_or((0, len), |(from, last)| (from.min(len), (last + 1).min(len)));
        let tag = &blob.tag;
        let part = |from: usize, to: usize, total: usize| {
            format!(
                "HTTP/1.1 206 Partial Content\r\nETag: {tag}\r\nContent-Range: bytes {from}-{}/{total}\r\nContent-Length: {}\r\n\r\n",
                to.max(from + 1) - 1,
                to - from
            )
        };
        let right = if range.is_some() {
            part(from, to, len)
        } else {
            format!("HTTP/1.1 200 OK\r\nETag: {tag}\r\nContent-Length: {len}\r\n\r\n")
        };
        let bytes = &blob.bytes[from..to];
        let some = |most: usize| self.chance.borrow_mut().index(most.max(1));
        let Some(fault) = fault else {
            line.write_all(right.as_bytes()).await?;
            self.send(line, bytes).await?;
            return Ok(Next::Request);
        };
        match fault {
            Fault::Status(status) => {
                let body = "no\n";
                let head = format!(
                    "HTTP/1.1 {status} Status\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                line.write_all(head.as_bytes()).await?;
                return Ok(Next::Request);
            }
            Fault::Later(status, seconds) => {
                let head = format!("HTTP/1.1 {status} Later\r\nRetry-After: {seconds}\r\nContent-Length: 0\r\n\r\n");
                line.write_all(head.as_bytes()).await?;
                return Ok(Next::Request);
            }
            Fault::Closed => return Ok(Next::End),
            Fault::Reset => return Ok(Next::Break),
            Fault::Silence => return Ok(Next::Hold),
            Fault::HalfHead => {
                line.write_all(&right.as_bytes()[..some(right.len())]).await?;
                return Ok(Next::End);
            }
            Fault::Garbage => {
                line.write_all(b"220 mail.example ESMTP\r\n\0\xff\x1b[2J").await?;
                return Ok(Next::End);
            }
            Fault::OtherRange => {
                let by = 1 + some(5000);
                let (from, to) = if to + by <= len {
                    (from + by, to + by)
                } else {
                    (from.saturating_sub(by), to)
                };
                line.write_all(part(from, to, len).as_bytes()).await?;
                self.send(line, &blob.bytes[from..to]).await?;
            }
            Fault::OtherLength => {
                line.write_all(part(from, to, len + 1 + some(1000)).as_bytes()).await?;
                self.send(line, bytes).await?;
            }
            Fault::NoRange => {
                let head = format!(
                    "HTTP/1.1 206 Partial Content\r\nETag: {tag}\r\nContent-Length: {}\r\n\r\n",
                    bytes.len()
                );
                line.write_all(head.as_bytes()).await?;
                self.send(line, bytes).await?;
            }
            Fault::LessRange if range.is_some() => {
                let to = from + (1 + some(bytes.len())).min(bytes.len());
                line.write_all(part(from, to, len).as_bytes()).await?;
                self.send(line, &blob.bytes[from..to]).await?;
            }
            Fault::ShortBody | Fault::BrokenBody => {
                line.write_all(right.as_bytes()).await?;
                self.send(line, &bytes[..some(bytes.len())]).await?;
                return Ok(if fault == Fault::ShortBody {
                    Next::End
                } else {
                    Next::Break
                });
            }
            Fault::Stall => {
                line.write_all(right.as_bytes()).await?;
                self.send(line, &bytes[..some(bytes.len())]).await?;
                return Ok(Next::Hold);
            }
            Fault::Trickle => {
                line.write_all(right.as_bytes()).await?;
                for byte in bytes {
                    sleep(Duration::from_millis(900)).await;
                    line.write_all(&[*byte]).await?;
                }
            }
            Fault::LongBody => {
                // Without a length, so that only counting finds it out.
                let head = right.lines().filter(|line| !line.starts_with("Content-Length"));
                let head = head.flat_map(|line| [line, "\r\n"]).collect::<String>();
                line.write_all(head.as_bytes()).await?;
                self.send(line, bytes).await?;
                self.send(line, &vec![7; 1 + some(5000)]).await?;
                return Ok(Next::End);
            }
            Fault::Whole => {
                let head = format!("HTTP/1.1 200 OK\r\nETag: {tag}\r\nContent-Length: {len}\r\n\r\n");
                line.write_all(head.as_bytes()).await?;
                self.send(line, &blob.bytes).await?;
            }
            Fault::Redirect => {
                // Once: a server that always leads on has no end.
                let to = match path.strip_prefix("/moved") {
                    Some(first) => first.to_owned(),
                    None => format!("/moved{path}"),
                };
                let head = format!("HTTP/1.1 307 Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
                line.write_all(head.as_bytes()).await?;
            }
            Fault::Flip => {
                let mut bad = bytes.to_vec();
                if !bad.is_empty() {
                    let at = some(bad.len());
                    bad[at] ^= 1 << some(8);
                }
                line.write_all(right.as_bytes()).await?;
                self.send(line, &bad).await?;
            }
            Fault::OtherBytes => {
                let by = 1 + some(len);
                let mut bad = bytes.to_vec();
                let by = by % bad.len().max(1);
                bad.rotate_left(by);
                bad.iter_mut().step_by(97).for_each(|byte| *byte ^= 0x55);
                line.write_all(right.as_bytes()).await?;
                self.send(line, &bad).await?;
            }
            Fault::LessRange => {
                line.write_all(right.as_bytes()).await?;
                self.send(line, bytes).await?;
            }
        }
        Ok(Next::Request)
    }

    async fn send(&self, line: &mut DuplexStream, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let most = 1 + self.chance.borrow_mut().index(48 << 10);
            let (piece, behind) = rest.split_at(most.min(rest.len()));
            let took = u64::try_from(piece.len()).unwrap() * 1000 / self.weather.rate;
            sleep(Duration::from_micros(took)).await;
            line.write_all(piece).await?;
            rest = behind;
        }
        Ok(())
    }
}

/// The next request's path and range; none when there is none any more.
async fn request(line: &mut DuplexStream) -> io::Result<Option<(String, Option<(usize, usize)>)>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if line.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("requests are text");
    let path = head.split(' ').nth(1).expect("a request has a path").to_owned();
    let range = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
        name.eq_ignore_ascii_case("range")
            .then(|| (first.parse().unwrap(), last.parse().unwrap()))
    });
    Ok(Some((path, range)))
}
