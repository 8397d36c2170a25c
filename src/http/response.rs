//! Whether an answer is what was asked for. In: status and headers of an answer, not to be trusted. Out: a verdict; only
//! [`Verdict::Part`] and [`Verdict::Whole`] let bytes through (RFC 9110, sections 14 and 15).
//!
//! Invariant: a body that passes holds the blob's own bytes from a known position on, and its length is known to agree with the
//! blob's wherever the server states one.

use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, HeaderMap, HeaderName};

use super::error::{Error, Shown};
use super::range::{ByteRange, ContentRange, number};
use super::redirect::follows;
use super::retry::retry_after;
use super::validator::Validator;

/// A part that is shorter than what was asked for has at least so many bytes: an answer of a byte each would make a million
/// requests of one.
const SHORTEST_PART: u64 = 4 << 10;

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// What is wanted of the blob; inside it, and not empty.
    pub(crate) range: ByteRange,
    /// Whether the request named the range. Without, the whole blob is what comes.
    pub(crate) ranged: bool,
    /// The blob's whole length in bytes.
    pub(crate) size: u64,
    pub(crate) validator: Option<&'a Validator>,
    pub(crate) encoding: Encoding<'a>,
}

/// Which `Content-Encoding` an answer may have. Many servers label a `.tar.gz` with `gzip` because that is what the file is; its
/// ranges and lengths are then those of the file itself (section 8.4), as it was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Encoding<'a> {
    /// Whatever the server says: a digest decides whether the bytes are right.
    Any,
    /// The same as when the blob was found: another one makes other bytes of it.
    Same(Option<&'a str>),
}

/// What to do with an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The body is the first `len` bytes of the range: all of it, or as much as the server gives at once.
    Part { len: u64 },
    /// The body is the whole blob.
    Whole,
    /// The answer leads elsewhere: [`Redirects`](super::Redirects) says where.
    Redirect,
    /// The server does not serve ranges, and says so with an error: ask again without one.
    NoRanges { status: StatusCode },
    /// Not now, or not to us: see [`Error::status`].
    Status {
        status: StatusCode,
        after: Option<Duration>,
    },
    /// The blob is not what it was, by its validator; what differs.
    Changed(String),
    /// The blob seems not to be what it was, by its length alone; what differs.
    SeemsChanged(String),
    /// The answer does not fit the question; how.
    Wrong(String),
}

impl Verdict {
    /// A verdict other than [`Part`](Self::Part) and [`Whole`](Self::Whole) as an error of `url`.
    pub(crate) fn into_error(self, url: &(impl Shown + ?Sized)) -> Error {
        match self {
            Self::Status { status, after } => Error::status(url, status, None, after),
            Self::NoRanges { status } => Error::status(url, status, None, None),
            Self::Changed(how) => Error::changed(url.shown(), how),
            Self::SeemsChanged(how) => Error::seems_changed(url.shown(), how),
            Self::Wrong(why) => Error::wrong(url, why),
            Self::Redirect => Error::wrong(url, "a redirect that is not followed"),
            Self::Part { .. } | Self::Whole => Error::wrong(url, "bytes that were not asked for"),
        }
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `Content-Length`, if it is a number.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    number(text(headers, CONTENT_LENGTH)?.trim())
}

/// How the server says that the bytes are encoded; none where they are as they are.
pub(crate) fn encoding(headers: &HeaderMap) -> Option<&str> {
    let encoding = text(headers, CONTENT_ENCODING)?.trim();
    (!encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity")).then_some(encoding)
}

/// Judges an answer to `asked` by its head.
pub(crate) fn judge(status: StatusCode, headers: &HeaderMap, asked: Asked<'_>) -> Verdict {
    let part = match status {
        StatusCode::PARTIAL_CONTENT if asked.ranged => true,
        StatusCode::OK => asked.ranged && is_part_all_the_same(headers, asked),
        status if follows(status) => return Verdict::Redirect,
        // What servers say that do not serve ranges at all; what is asked for is there, as far as is known.
        StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED if asked.ranged => return Verdict::NoRanges { status },
        StatusCode::RANGE_NOT_SATISFIABLE if asked.ranged => {
            return match ContentRange::of(headers) {
                Some(ContentRange { total: Some(total), .. }) if total == asked.size => Verdict::NoRanges { status },
                Some(ContentRange { total: Some(total), .. }) => other_length(headers, asked, total),
                _ => Verdict::SeemsChanged(format!("the server has no byte {}", asked.range.start)),
            };
        }
        status if status.is_client_error() || status.is_server_error() => {
            return Verdict::Status {
                status,
                after: retry_after(headers),
            };
        }
        status => return Verdict::Wrong(format!("status {status}")),
    };
    if let Some(before) = asked.validator
        && let Some(now) = before.contradicted_by(headers)
    {
        return Verdict::Changed(format!("its {} was {} and is {now}", before.header(), before.value()));
    }
    if let Encoding::Same(before) = asked.encoding
        && before.map(str::to_ascii_lowercase) != encoding(headers).map(str::to_ascii_lowercase)
    {
        let (was, is) = (before.unwrap_or("identity"), encoding(headers).unwrap_or("identity"));
        return Verdict::Wrong(format!(
            "Content-Encoding {is}, which was {was} before; have the server send the file as it is"
        ));
    }
    let length = match text(headers, CONTENT_LENGTH).map(|length| number(length.trim())) {
        None => None,
        Some(Some(length)) => Some(length),
        Some(None) => return Verdict::Wrong("Content-Length is not a number".to_owned()),
    };
    if part {
        return judge_part(headers, asked, length);
    }
    match length {
        Some(length) if length != asked.size => other_length(headers, asked, length),
        None if encoding(headers).is_some() => unmeasured(headers),
        _ => Verdict::Whole,
    }
}

/// The same for a body that is a part.
fn judge_part(headers: &HeaderMap, asked: Asked<'_>, length: Option<u64>) -> Verdict {
    let wanted = asked.range;
    let Some(stated) = headers.get(hyper::header::CONTENT_RANGE) else {
        return Verdict::Wrong(format!("no Content-Range, asked for {wanted}"));
    };
    let Some(ContentRange {
        range: Some(found),
        total,
    }) = ContentRange::of(headers)
    else {
        return Verdict::Wrong(format!("Content-Range {stated:?}, asked for {wanted}"));
    };
    match total {
        Some(total) if total != asked.size => return other_length(headers, asked, total),
        None if encoding(headers).is_some() => return unmeasured(headers),
        // Section 14.4: the server does not know how long the whole is, and we do.
        _ => {}
    }
    let short = found.len < wanted.len;
    if found.start != wanted.start || found.len > wanted.len || short && found.len < SHORTEST_PART {
        return Verdict::Wrong(format!("{found} of {}, asked for {wanted}", asked.size));
    }
    match length {
        Some(length) if length != found.len => Verdict::Wrong(format!(
            "a body of {length} bytes for the {} of its Content-Range",
            found.len
        )),
        _ => Verdict::Part { len: found.len },
    }
}

/// Whether a 200 is what a 206 should be: a part, by two headers that agree. Some proxies answer so.
fn is_part_all_the_same(headers: &HeaderMap, asked: Asked<'_>) -> bool {
    let Some(ContentRange { range: Some(range), .. }) = ContentRange::of(headers) else {
        return false;
    };
    range.len < asked.size && content_length(headers) == Some(range.len)
}

/// The whole has another length than the blob.
fn other_length(headers: &HeaderMap, asked: Asked<'_>, length: u64) -> Verdict {
    match encoding(headers) {
        Some(encoding) => Verdict::Wrong(format!(
            "{length} bytes with Content-Encoding {encoding} for a blob of {}; have the server send it as it is",
            asked.size
        )),
        None => Verdict::SeemsChanged(format!("it was {} bytes long and is {length}", asked.size)),
    }
}

/// Encoded bytes of no known length are made on the way, in all likelihood.
fn unmeasured(headers: &HeaderMap) -> Verdict {
    Verdict::Wrong(format!(
        "bytes with Content-Encoding {} of unknown length; have the server send the file as it is",
        encoding(headers).unwrap_or_default()
    ))
}

/// What the answer to a first request says of a blob of which nothing is known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It is so long, and the server serves ranges of it, or none.
    Blob { len: u64, ranges: bool },
    /// The server serves ranges and does not say of how much: the answer to a request without a range may tell.
    RangesOfUnknown,
    /// The server does not serve ranges, and says so with an error: ask again without one.
    NoRanges,
    /// All of the blob comes, and neither its length nor ranges of it: who does not take it now learns nothing.
    Unmeasured,
    /// No blob; what the answer is instead.
    Not(Verdict),
}

/// Judges the answer to a request for a blob's first `asked` bytes (at least one), or without them for all of it.
pub(crate) fn judge_first(status: StatusCode, headers: &HeaderMap, asked: Option<u64>) -> Found {
    let wrong = |why: &str| Found::Not(Verdict::Wrong(why.to_owned()));
    let ranged = asked.is_some();
    // A shorter blob's first bytes are all of it.
    let is_first = |range: ByteRange, total: Option<u64>| {
        let len = asked.unwrap_or(0).min(total.unwrap_or(u64::MAX));
        range == ByteRange { start: 0, len }
    };
    let range = ContentRange::of(headers);
    // A 200 that is what a 206 should be: see `is_part_all_the_same`.
    let part_as_whole = range.is_some_and(|said| {
        said.range.is_some_and(|range| {
            is_first(range, said.total) && said.total != Some(range.len) && content_length(headers) == Some(range.len)
        })
    });
    match status {
        StatusCode::PARTIAL_CONTENT | StatusCode::OK
            if ranged && (status == StatusCode::PARTIAL_CONTENT || part_as_whole) =>
        {
            match range {
                Some(ContentRange {
                    range: Some(range),
                    total: Some(len),
                }) if is_first(range, Some(len)) => Found::Blob { len, ranges: true },
                Some(ContentRange {
                    range: Some(range),
                    total: None,
                }) if is_first(range, None) => Found::RangesOfUnknown,
                _ => wrong("a range that was not asked for"),
            }
        }
        // An empty blob has no first byte.
        StatusCode::RANGE_NOT_SATISFIABLE if ranged => match range {
            Some(ContentRange { total: Some(0), .. }) => Found::Blob { len: 0, ranges: true },
            Some(_) => Found::NoRanges,
            None => wrong("it has no first byte, but an unknown length"),
        },
        StatusCode::OK => match (content_length(headers), encoding(headers)) {
            (Some(len), _) => Found::Blob { len, ranges: false },
            (None, Some(_)) => Found::Not(unmeasured(headers)),
            (None, None) => Found::Unmeasured,
        },
        StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED if ranged => Found::NoRanges,
        status if follows(status) => Found::Not(Verdict::Redirect),
        status if status.is_client_error() || status.is_server_error() => Found::Not(Verdict::Status {
            status,
            after: retry_after(headers),
        }),
        status => wrong(&format!("status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        pairs.collect()
    }

    fn verdict_of(range: ByteRange, ranged: bool, status: u16, pairs: &[(&'static str, &'static str)]) -> Verdict {
        let tag = Validator::ETag("\"a\"".to_owned());
        let asked = Asked {
            range,
            ranged,
            size: 100_000,
            validator: Some(&tag),
            encoding: Encoding::Any,
        };
        judge(StatusCode::from_u16(status).unwrap(), &headers(pairs), asked)
    }

    /// Bytes 10000 to 59999 of 100000 were asked for.
    fn verdict(status: u16, pairs: &[(&'static str, &'static str)]) -> Verdict {
        let range = ByteRange {
            start: 10_000,
            len: 50_000,
        };
        verdict_of(range, true, status, pairs)
    }

    const RANGE: (&str, &str) = ("content-range", "bytes 10000-59999/100000");

    #[test]
    fn what_was_asked_for_passes() {
        for right in [
            &[RANGE][..],
            &[RANGE, ("content-length", "50000"), ("etag", "\"a\"")],
            &[RANGE, ("etag", "W/\"a\""), ("content-encoding", "identity")],
            &[("content-range", "Bytes 10000-59999/100000")],
            &[("content-range", "bytes 10000-59999/*")],
            // A label: the lengths are those of the file.
            &[RANGE, ("content-encoding", "gzip"), ("content-length", "50000")],
            &[RANGE, ("content-encoding", "aws-chunked")],
        ] {
            assert_eq!(verdict(206, right), Verdict::Part { len: 50_000 }, "{right:?}");
        }
    }

    #[test]
    fn a_shorter_part_passes_as_such() {
        let part = ("content-range", "bytes 10000-19999/100000");
        assert_eq!(verdict(206, &[part]), Verdict::Part { len: 10_000 });
        assert_eq!(
            verdict(206, &[part, ("content-length", "10000")]),
            Verdict::Part { len: 10_000 }
        );
        for wrong in [
            &[part, ("content-length", "50000")][..],
            &[("content-range", "bytes 10000-10000/100000")],
            &[("content-range", "bytes 10000-14094/100000")],
        ] {
            assert!(matches!(verdict(206, wrong), Verdict::Wrong(_)), "{wrong:?}");
        }
    }

    #[test]
    fn anything_else_does_not() {
        for wrong in [
            &[][..],
            &[("content-length", "50000")],
            &[("content-range", "bytes 10001-60000/100000")],
            &[("content-range", "bytes 10000-60000/100000")],
            &[("content-range", "bytes 0-59999/100000")],
            &[("content-range", "bytes */100000")],
            &[("content-range", "items 10000-59999/100000")],
            &[("content-type", "multipart/byteranges; boundary=B")],
            &[RANGE, ("content-length", "49999")],
            &[RANGE, ("content-length", "x")],
            &[RANGE, ("content-length", "+50000")],
            // Made on the way: nothing says of what length.
            &[("content-range", "bytes 10000-59999/*"), ("content-encoding", "gzip")],
            &[
                ("content-range", "bytes 10000-59999/70000"),
                ("content-encoding", "gzip"),
            ],
        ] {
            assert!(matches!(verdict(206, wrong), Verdict::Wrong(_)), "{wrong:?}");
        }
        let other_length = [("content-range", "bytes 10000-59999/100001")];
        assert!(matches!(verdict(206, &other_length), Verdict::SeemsChanged(_)));
        assert!(matches!(verdict(206, &[RANGE, ("etag", "\"b\"")]), Verdict::Changed(_)));
        assert!(matches!(verdict(204, &[]), Verdict::Wrong(_)));
        assert!(matches!(verdict(304, &[]), Verdict::Wrong(_)));
    }

    #[test]
    fn the_whole_must_be_as_long_as_it_was() {
        assert_eq!(verdict(200, &[("content-length", "100000")]), Verdict::Whole);
        assert_eq!(verdict(200, &[]), Verdict::Whole);
        let label = ("content-encoding", "x-gzip");
        assert_eq!(verdict(200, &[("content-length", "100000"), label]), Verdict::Whole);
        assert!(matches!(
            verdict(200, &[("content-length", "99999"), label]),
            Verdict::Wrong(_)
        ));
        assert!(matches!(verdict(200, &[label]), Verdict::Wrong(_)));
        assert!(matches!(
            verdict(200, &[("content-length", "99999")]),
            Verdict::SeemsChanged(_)
        ));
        assert!(matches!(verdict(200, &[("etag", "\"b\"")]), Verdict::Changed(_)));
    }

    #[test]
    fn an_encoding_that_comes_or_goes_makes_other_bytes() {
        let label = |now: &'static str| headers(&[RANGE, ("content-encoding", now)]);
        for (before, now, right) in [
            (None, "", true),
            (None, "identity", true),
            (Some("gzip"), "gzip", true),
            (Some("gzip"), "GZIP", true),
            (None, "gzip", false),
            (Some("gzip"), "", false),
            (Some("gzip"), "br", false),
        ] {
            let asked = Asked {
                range: ByteRange {
                    start: 10_000,
                    len: 50_000,
                },
                ranged: true,
                size: 100_000,
                validator: None,
                encoding: Encoding::Same(before),
            };
            let verdict = judge(StatusCode::PARTIAL_CONTENT, &label(now), asked);
            assert_eq!(
                verdict == Verdict::Part { len: 50_000 },
                right,
                "{before:?} {now:?}: {verdict:?}"
            );
        }
    }

    #[test]
    fn a_part_may_call_itself_200() {
        let length = ("content-length", "50000");
        assert_eq!(verdict(200, &[RANGE, length]), Verdict::Part { len: 50_000 });
        let other = ("content-range", "bytes 0-49999/100000");
        assert!(matches!(verdict(200, &[other, length]), Verdict::Wrong(_)));
        // Without a length it may be anything, and the whole is what a 200 means.
        assert_eq!(verdict(200, &[RANGE]), Verdict::Whole);
        assert_eq!(verdict(200, &[RANGE, ("content-length", "100000")]), Verdict::Whole);
    }

    #[test]
    fn servers_without_ranges_are_known_by_their_errors() {
        for status in [400, 501] {
            let expected = StatusCode::from_u16(status).unwrap();
            assert_eq!(verdict(status, &[]), Verdict::NoRanges { status: expected });
        }
        let all = ("content-range", "bytes */100000");
        assert!(matches!(verdict(416, &[all]), Verdict::NoRanges { .. }));
        assert!(matches!(
            verdict(416, &[("content-range", "bytes */99999")]),
            Verdict::SeemsChanged(_)
        ));
        assert!(matches!(verdict(416, &[]), Verdict::SeemsChanged(_)));
        // Without a range in the request an error is an error, and a part is nothing that was asked for.
        let whole = ByteRange { start: 0, len: 100_000 };
        for status in [400, 501, 416] {
            let verdict = verdict_of(whole, false, status, &[all]);
            assert!(matches!(verdict, Verdict::Status { .. }), "{status}: {verdict:?}");
        }
        assert!(matches!(verdict_of(whole, false, 206, &[RANGE]), Verdict::Wrong(_)));
        assert_eq!(verdict_of(whole, false, 200, &[]), Verdict::Whole);
    }

    #[test]
    fn refusals_and_delays() {
        for status in [401, 403, 404, 410, 429, 500, 503] {
            let expected = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                verdict(status, &[("retry-after", "7")]),
                Verdict::Status {
                    status: expected,
                    after: Some(Duration::from_secs(7))
                }
            );
        }
        assert_eq!(verdict(302, &[("location", "/x")]), Verdict::Redirect);
    }

    #[test]
    fn more_than_a_first_byte() {
        let first = |status: u16, range: &'static str, len: &'static str| {
            let headers = headers(&[("content-range", range), ("content-length", len)]);
            judge_first(StatusCode::from_u16(status).unwrap(), &headers, Some(100))
        };
        let ranges = |len| Found::Blob { len, ranges: true };
        assert_eq!(first(206, "bytes 0-99/1000", "100"), ranges(1000));
        assert_eq!(first(206, "bytes 0-99/100", "100"), ranges(100));
        assert_eq!(first(206, "bytes 0-8/9", "9"), ranges(9));
        assert_eq!(first(206, "bytes 0-99/*", "100"), Found::RangesOfUnknown);
        assert_eq!(first(200, "bytes 0-99/1000", "100"), ranges(1000));
        assert_eq!(
            first(200, "bytes 0-99/1000", "1000"),
            Found::Blob {
                len: 1000,
                ranges: false
            }
        );
        for (range, len) in [
            ("bytes 0-0/1000", "1"),
            ("bytes 1-100/1000", "100"),
            ("bytes 0-199/1000", "200"),
        ] {
            assert!(
                matches!(first(206, range, len), Found::Not(Verdict::Wrong(_))),
                "{range}"
            );
        }
    }

    #[test]
    fn first_answers() {
        let first = |status: u16, pairs: &[(&'static str, &'static str)]| {
            judge_first(StatusCode::from_u16(status).unwrap(), &headers(pairs), Some(1))
        };
        let ranges = |len| Found::Blob { len, ranges: true };
        let whole = |len| Found::Blob { len, ranges: false };
        assert_eq!(first(206, &[("content-range", "bytes 0-0/9")]), ranges(9));
        assert_eq!(
            first(206, &[("content-range", "BYTES 0-0/9"), ("content-encoding", "gzip")]),
            ranges(9)
        );
        assert_eq!(first(206, &[("content-range", "bytes 0-0/*")]), Found::RangesOfUnknown);
        let one = ("content-length", "1");
        assert_eq!(first(200, &[("content-range", "bytes 0-0/9"), one]), ranges(9));
        assert_eq!(first(200, &[("content-range", "bytes 0-0/1"), one]), whole(1));
        assert_eq!(
            first(200, &[("content-range", "bytes 0-0/9"), ("content-length", "9")]),
            whole(9)
        );
        assert_eq!(first(200, &[]), Found::Unmeasured);
        assert_eq!(first(416, &[("content-range", "bytes */0")]), ranges(0));
        assert_eq!(first(416, &[("content-range", "bytes */9")]), Found::NoRanges);
        assert_eq!(first(400, &[]), Found::NoRanges);
        assert_eq!(first(501, &[]), Found::NoRanges);
        assert_eq!(first(200, &[("content-length", "9")]), whole(9));
        assert_eq!(
            first(200, &[("content-length", "9"), ("content-encoding", "gzip")]),
            whole(9)
        );
        for (status, pairs) in [
            (206, &[][..]),
            (206, &[("content-range", "bytes 0-8/9")]),
            (416, &[]),
            (200, &[("content-encoding", "gzip")]),
            (204, &[]),
        ] {
            let found = first(status, pairs);
            assert!(
                matches!(found, Found::Not(Verdict::Wrong(_))),
                "{status} {pairs:?}: {found:?}"
            );
        }
        for status in [401, 404, 429, 500] {
            assert!(
                matches!(first(status, &[]), Found::Not(Verdict::Status { .. })),
                "{status}"
            );
        }
        let plain = judge_first(StatusCode::BAD_REQUEST, &headers(&[]), None);
        assert!(matches!(plain, Found::Not(Verdict::Status { .. })));
    }
}
