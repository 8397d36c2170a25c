//! One answer: which status and bytes, with which faults, paced by the link.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use super::fault::Fault;
use super::link::{Turn, time_for};
use super::{Content, Event, OCTETS, Request, Shared, lock};

/// How a slow body is chopped: this many pieces a second, so that it trickles and does not come in lumps.
const TRICKLES_PER_SECOND: u64 = 20;

/// The most that is handed to the kernel in one call, in bytes.
const CALL_BYTES: u64 = 1 << 20;

/// What becomes of the connection.
pub(super) enum After {
    Keep,
    Close,
}

/// Where a body's bytes are.
#[derive(Clone)]
enum Body {
    Blob(Arc<[u8]>),
    File(Arc<File>),
}

/// An answer before it is sent.
struct Answer {
    status: u16,
    headers: String,
    /// How many bytes the content has in all.
    total: u64,
    /// First byte of the answer and one past its last, in the content.
    range: (u64, u64),
    body: Option<Body>,
}

impl Answer {
    const fn without_body(status: u16, headers: String) -> Self {
        Self {
            status,
            headers,
            total: 0,
            range: (0, 0),
            body: None,
        }
    }

    const fn len(&self) -> u64 {
        self.range.1 - self.range.0
    }
}

/// How sending an answer is to go wrong, collected from its faults.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fault of its own")]
struct Spoil {
    delay: Duration,
    silence: bool,
    reset_before: bool,
    /// The body ends after this many bytes.
    cut: Option<u64>,
    /// It ends so by a reset.
    reset: bool,
    extra: u64,
    /// The connection ends behind the answer.
    close: bool,
    slow: Option<u64>,
}

/// Answers `request`, whose answer may not begin before `begin`.
pub(super) fn respond(
    stream: &TcpStream,
    request: &Request,
    arrived: Instant,
    begin: Instant,
    shared: &Shared,
) -> io::Result<After> {
    let script = lock(&shared.script).clone();
    let faults = script.map_or_else(Vec::new, |script| script(request));
    let (answer, spoil) = spoilt_answer(request, &faults, shared);
    let begin = begin + spoil.delay;
    shared.sleep_until(begin);

    let mut sent = 0;
    let result = if spoil.silence {
        shared.sleep_until_gone(stream);
        Ok(After::Close)
    } else if spoil.reset_before {
        reset(stream);
        Ok(After::Close)
    } else {
        send_answer(stream, request, &answer, &spoil, begin, shared, &mut sent)
    };

    let mut log = lock(&shared.log);
    let event = Event {
        at: arrived.saturating_duration_since(log.began),
        done: log.began.elapsed(),
        connection: request.connection,
        method: request.method.clone(),
        path: request.path.clone(),
        status: if spoil.silence || spoil.reset_before {
            0
        } else {
            answer.status
        },
        range: answer.body.as_ref().map(|_| answer.range),
        bytes: sent,
    };
    log.log.events.push(event);
    result
}

/// The answer with the faults that change what it says, and those that change how it is sent.
fn spoilt_answer(request: &Request, faults: &[Fault], shared: &Shared) -> (Answer, Spoil) {
    let whole = faults.contains(&Fault::WholeBody);
    let changed = faults.contains(&Fault::ChangedTag);
    let mut answer = proper_answer(request, shared, whole, changed);
    let mut spoil = Spoil::default();
    for fault in faults {
        match fault {
            Fault::Status(status, retry) => {
                let retry = retry.map_or_else(String::new, |secs| format!("Retry-After: {secs}\r\n"));
                answer = Answer::without_body(*status, retry);
            }
            Fault::Redirect(to) => answer = Answer::without_body(307, format!("Location: {to}\r\n")),
            Fault::WrongRange(shift) if answer.status == 206 => {
                answer.range.0 = (answer.range.0 + shift).min(answer.range.1 - 1);
            }
            Fault::ShortRange(missing) if answer.status == 206 => {
                answer.range.1 = answer.range.1.saturating_sub(*missing).max(answer.range.0 + 1);
            }
            Fault::Delay(time) => spoil.delay += *time,
            Fault::Silence => spoil.silence = true,
            Fault::ResetBefore => spoil.reset_before = true,
            Fault::ResetWithin(after) => {
                spoil.cut = Some(*after);
                spoil.reset = true;
            }
            Fault::ShortBody(missing) => spoil.cut = Some(answer.len().saturating_sub(*missing)),
            Fault::LongBody(extra) => spoil.extra = *extra,
            Fault::Close => spoil.close = true,
            Fault::SlowBody(rate) => spoil.slow = Some((*rate).max(1)),
            Fault::Damage(at) => {
                if let Some(Body::Blob(bytes)) = &mut answer.body
                    && let Some(byte) = usize::try_from(*at)
                        .ok()
                        .and_then(|at| Arc::make_mut(bytes).get_mut(at))
                {
                    *byte ^= 0x10;
                }
            }
            Fault::WrongRange(_) | Fault::ShortRange(_) | Fault::WholeBody | Fault::ChangedTag => {}
        }
    }
    (answer, spoil)
}

/// What a server without fault would say. The range of a 206 is never empty.
fn proper_answer(request: &Request, shared: &Shared, whole: bool, changed: bool) -> Answer {
    if request.method != "GET" && request.method != "HEAD" {
        return Answer::without_body(405, "Allow: GET, HEAD\r\n".into());
    }
    let content = shared
        .contents
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&request.path)
        .cloned();
    let (body, total, mut etag, kind) = match content {
        None => return Answer::without_body(404, String::new()),
        Some(Content::Redirect { to, valid }) => {
            let token = format!("{:x}", request.number + 1);
            lock(&shared.redirects)
                .issued
                .insert(token.clone(), Instant::now() + valid);
            return Answer::without_body(307, format!("Location: {to}?token={token}\r\n"));
        }
        Some(Content::Blob { bytes, etag, kind }) => {
            let total = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            (Body::Blob(bytes), total, etag, kind)
        }
        Some(Content::File { file, len, etag }) => (Body::File(file), len, etag, OCTETS.into()),
    };
    if !token_is_good(request, shared) {
        return Answer::without_body(403, String::new());
    }
    if changed {
        etag.insert_str(1, "changed-");
    }
    let ranges = shared.ranges.load(Ordering::Relaxed);
    let mut headers = format!("ETag: {etag}\r\nContent-Type: {kind}\r\n");
    if ranges {
        headers.push_str("Accept-Ranges: bytes\r\n");
    }
    let names_it = |tags: &str| tags == "*" || tags.split(',').any(|tag| tag.trim() == etag);
    if request.header("if-match").is_some_and(|tags| !names_it(tags)) {
        return Answer::without_body(412, headers);
    }
    if request.header("if-none-match").is_some_and(names_it) {
        return Answer::without_body(304, headers);
    }
    let fresh = request.header("if-range").is_none_or(|tag| tag == etag);
    let asked = request.header("range").filter(|_| ranges && fresh && !whole);
    match asked.map_or(Asked::Everything, |range| parse_range(range, total)) {
        Asked::Everything => Answer {
            status: 200,
            headers,
            total,
            range: (0, total),
            body: Some(body),
        },
        Asked::Part(first, end) => Answer {
            status: 206,
            headers,
            total,
            range: (first, end),
            body: Some(body),
        },
        Asked::Nothing => {
            let _ = write!(headers, "Content-Range: bytes */{total}\r\n");
            Answer::without_body(416, headers)
        }
    }
}

/// Whether a path behind a redirect was reached with a token that still holds.
fn token_is_good(request: &Request, shared: &Shared) -> bool {
    let tokens = lock(&shared.redirects);
    !tokens.guarded.contains(&request.path)
        || request
            .query
            .split('&')
            .filter_map(|pair| pair.strip_prefix("token="))
            .any(|token| tokens.issued.get(token).is_some_and(|until| Instant::now() < *until))
}

/// What a `Range` field asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// Nothing that is understood: the answer is the whole content.
    Everything,
    /// From the first number up to, but without, the second; never empty.
    Part(u64, u64),
    /// What the content does not have.
    Nothing,
}

/// RFC 9110, 14.2. Several ranges in one field are ignored, which the RFC allows.
fn parse_range(field: &str, total: u64) -> Asked {
    let Some((first, last)) = field
        .trim()
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
    else {
        return Asked::Everything;
    };
    let part = |first: u64, end: u64| {
        if first < end {
            Asked::Part(first, end)
        } else {
            Asked::Nothing
        }
    };
    match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if last < first => Asked::Everything,
        (Ok(first), Ok(last)) => part(first, total.min(last.saturating_add(1))),
        (Ok(first), Err(_)) if last.trim().is_empty() => part(first, total),
        (Err(_), Ok(suffix)) if first.trim().is_empty() => part(total - total.min(suffix), total),
        _ => Asked::Everything,
    }
}

/// Sends head and body; `sent` counts the body bytes that left, also when this fails.
fn send_answer(
    stream: &TcpStream,
    request: &Request,
    answer: &Answer,
    spoil: &Spoil,
    begin: Instant,
    shared: &Shared,
    sent: &mut u64,
) -> io::Result<After> {
    let (first, end) = answer.range;
    let close = spoil.close
        || spoil.extra > 0
        || request
            .header("connection")
            .is_some_and(|it| it.eq_ignore_ascii_case("close"));
    let after = if close || spoil.cut.is_some() {
        After::Close
    } else {
        After::Keep
    };
    let head = head_of(answer, close);
    let Some(body) = answer.body.as_ref().filter(|_| request.method == "GET" && end > first) else {
        send(stream, head.as_bytes(), SendFlags::empty())?;
        return Ok(after);
    };
    let stop = spoil.cut.map_or(end, |cut| end.min(first.saturating_add(cut)));
    let mut pacer = Pacer {
        turn: Turn::new(begin),
        slow: spoil.slow,
        shared,
    };
    let mut at = first;
    let mut head = Some(head);
    while at < stop || head.is_some() {
        let (piece, when) = pacer.next(stop - at);
        shared.sleep_until(when);
        let more = if piece > 0 { SendFlags::MORE } else { SendFlags::empty() };
        let handed_over = match head.take() {
            Some(head) => send(stream, head.as_bytes(), more),
            None => Ok(()),
        };
        if let Err(e) = handed_over.and_then(|()| send_piece(stream, body, at, piece, shared, sent)) {
            pacer.drain(stop - at, sent);
            return Err(e);
        }
        at += piece;
        pacer.turn.sent(when, Instant::now());
    }
    if spoil.extra > 0 {
        send(
            stream,
            &vec![b'?'; usize::try_from(spoil.extra).map_err(io::Error::other)?],
            SendFlags::empty(),
        )?;
    }
    if spoil.reset {
        reset(stream);
    }
    Ok(after)
}

/// Status line and header fields.
fn head_of(answer: &Answer, close: bool) -> String {
    let (first, end) = answer.range;
    let mut head = format!(
        "HTTP/1.1 {} {}\r\nServer: tarblk-origin\r\n",
        answer.status,
        reason(answer.status)
    );
    head.push_str(&answer.headers);
    if answer.status != 304 {
        let _ = write!(head, "Content-Length: {}\r\n", answer.len());
    }
    if answer.status == 206 {
        let _ = write!(head, "Content-Range: bytes {first}-{}/{}\r\n", end - 1, answer.total);
    }
    head.push_str(if close { "Connection: close\r\n\r\n" } else { "\r\n" });
    head
}

/// Paces one body: its turn on the link, and its own slowness.
struct Pacer<'a> {
    turn: Turn,
    slow: Option<u64>,
    shared: &'a Shared,
}

impl Pacer<'_> {
    /// The next piece of a body with `left` bytes to go, and when it will have arrived.
    fn next(&self, left: u64) -> (u64, Instant) {
        let Some(rate) = self.slow else {
            return self.shared.clock.reserve(self.turn, left);
        };
        let (piece, when) = self
            .shared
            .clock
            .reserve(self.turn, left.min((rate / TRICKLES_PER_SECOND).max(1)));
        (piece, when + time_for(piece, rate))
    }

    /// The reader is gone, but a real origin would learn of it only when a round trip's worth of bytes was under way: the
    /// link carries those although they are not read.
    fn drain(&mut self, mut left: u64, sent: &mut u64) {
        let link = self.shared.clock.link();
        if link.rate.is_none() {
            return;
        }
        let until = Instant::now() + link.rtt;
        while left > 0 {
            let (piece, when) = self.next(left);
            if when > until {
                break;
            }
            self.shared.sleep_until(when);
            self.shared.count(piece);
            *sent += piece;
            left -= piece;
            self.turn.sent(when, when);
        }
    }
}

/// Sends `len` bytes of the content from `at` on.
fn send_piece(stream: &TcpStream, body: &Body, at: u64, len: u64, shared: &Shared, sent: &mut u64) -> io::Result<()> {
    let end = at + len;
    let mut at = at;
    while at < end {
        let want = usize::try_from((end - at).min(CALL_BYTES)).map_err(io::Error::other)?;
        let n = match body {
            Body::Blob(bytes) => {
                let from = usize::try_from(at).map_err(io::Error::other)?;
                send(stream, &bytes[from..from + want], SendFlags::empty())?;
                want
            }
            Body::File(file) => {
                let mut from = at;
                match rustix::fs::sendfile(stream, file, Some(&mut from), want) {
                    Err(rustix::io::Errno::INTR) => continue,
                    Ok(0) => {
                        return Err(io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            "the served file has become shorter",
                        ));
                    }
                    other => other?,
                }
            }
        };
        let n = u64::try_from(n).map_err(io::Error::other)?;
        shared.count(n);
        *sent += n;
        at += n;
    }
    Ok(())
}

/// Sends all of `bytes`.
fn send(stream: &TcpStream, mut bytes: &[u8], flags: SendFlags) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(stream, bytes, flags | SendFlags::NOSIGNAL) {
            Ok(n) => bytes = &bytes[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Ends the connection with a reset and not in good order. Dissolving the association does so at once, however many
/// descriptors the socket has.
fn reset(stream: &TcpStream) {
    let _ = rustix::net::connect_unspec(stream);
}

/// The phrase behind a status.
const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        412 => "Precondition Failed",
        416 => "Range Not Satisfiable",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    }
}

#[cfg(test)]
mod tests {
    use super::{Asked, parse_range};

    #[test]
    fn ranges_as_rfc_9110_has_them() {
        assert_eq!(parse_range("bytes=0-0", 10), Asked::Part(0, 1));
        assert_eq!(parse_range("bytes=3-", 10), Asked::Part(3, 10));
        assert_eq!(parse_range("bytes=3-100", 10), Asked::Part(3, 10));
        assert_eq!(parse_range("bytes=-4", 10), Asked::Part(6, 10));
        assert_eq!(parse_range("bytes=-40", 10), Asked::Part(0, 10));
        assert_eq!(parse_range("bytes=10-", 10), Asked::Nothing);
        assert_eq!(parse_range("bytes=-0", 10), Asked::Nothing);
        assert_eq!(parse_range("bytes=5-4", 10), Asked::Everything);
        assert_eq!(parse_range("bytes=0-1,4-5", 10), Asked::Everything);
        assert_eq!(parse_range("lines=0-1", 10), Asked::Everything);
        assert_eq!(parse_range("bytes=0-0", 0), Asked::Nothing);
    }
}
