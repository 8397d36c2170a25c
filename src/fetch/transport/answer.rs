//! What a response head means for the range that was asked. In: status and headers, from a stranger. Out: a verdict; only
//! [`Verdict::Partial`] and [`Verdict::Whole`] let bytes through.

use std::time::Duration;

use hyper::header::{self, HeaderMap, HeaderName};
use hyper::{StatusCode, http::response};

/// Tells one state of a layer from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Validator {
    /// The `ETag` header's value, quotes and `W/` included.
    ETag(String),
    /// The `Last-Modified` header's value.
    LastModified(String),
}

impl Validator {
    /// The header that carries it.
    pub(crate) fn header(&self) -> HeaderName {
        match self {
            Self::ETag(_) => header::ETAG,
            Self::LastModified(_) => header::LAST_MODIFIED,
        }
    }

    pub(crate) fn value(&self) -> &str {
        match self {
            Self::ETag(value) | Self::LastModified(value) => value,
        }
    }

    /// Whether it may stand in an `If-Range`: weak tags may not.
    pub(crate) fn is_strong(&self) -> bool {
        !matches!(self, Self::ETag(tag) if tag.starts_with("W/"))
    }
}

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) start: u64,
    /// Never zero.
    pub(crate) len: u64,
    /// The layer's whole length.
    pub(crate) size: u64,
    pub(crate) validator: Option<&'a Validator>,
}

/// What to do with a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The body is the range, exactly.
    Partial,
    /// The body is the whole layer.
    Whole,
    /// Ask there.
    Redirect(String),
    /// Not now: ask again, not before this long when the server said so.
    Later {
        status: StatusCode,
        after: Option<Duration>,
    },
    /// The server will not give it to us: a signature may have expired, a token been forgotten.
    Refused(StatusCode),
    /// The layer is not what it was.
    Changed(String),
    /// The answer does not fit the question.
    Wrong(String),
}

/// `bytes START-END/TOTAL`; `*` as the total is refused, because it would leave a changed layer unseen.
/// RFC 9110, section 14.4.
pub(crate) fn parse_content_range(value: &str) -> Option<(u64, u64, u64)> {
    let rest = value.trim().strip_prefix("bytes")?.strip_prefix(' ')?;
    let (range, total) = rest.trim_start().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse::<u64>().ok()).flatten()
    };
    let (first, last, total) = (number(first)?, number(last)?, number(total)?);
    (first <= last && last < total).then_some((first, last, total))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Judges `head` as the answer to `asked`.
pub(crate) fn judge(head: &response::Parts, asked: Asked<'_>) -> Verdict {
    let headers = &head.headers;
    match head.status {
        StatusCode::PARTIAL_CONTENT | StatusCode::OK => {}
        status if status.is_redirection() => {
            return match text(headers, header::LOCATION) {
                Some(location) if !location.is_empty() => Verdict::Redirect(location.to_owned()),
                _ => Verdict::Wrong(format!("{status} without a Location")),
            };
        }
        StatusCode::RANGE_NOT_SATISFIABLE => {
            return Verdict::Changed(format!("the server has no byte {}", asked.start));
        }
        status @ (StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) => {
            return Verdict::Later {
                status,
                after: retry_after(headers),
            };
        }
        status if status.is_server_error() => {
            return Verdict::Later {
                status,
                after: retry_after(headers),
            };
        }
        status if status.is_client_error() => return Verdict::Refused(status),
        status => return Verdict::Wrong(format!("status {status}")),
    }
    if let Some(coding) = headers.get(header::CONTENT_ENCODING)
        && coding.as_bytes() != b"identity"
        && !coding.is_empty()
    {
        return Verdict::Wrong(format!("Content-Encoding {coding:?} instead of the bytes themselves"));
    }
    if let Some(expected) = asked.validator
        && let Some(found) = text(headers, expected.header())
        && weakly(found) != weakly(expected.value())
    {
        return Verdict::Changed(format!("{} was {} and is {found}", expected.header(), expected.value()));
    }
    let length = match text(headers, header::CONTENT_LENGTH).map(str::parse::<u64>) {
        None => None,
        Some(Ok(length)) => Some(length),
        Some(Err(_)) => return Verdict::Wrong("Content-Length is not a number".to_owned()),
    };
    if head.status == StatusCode::OK {
        return match length {
            Some(length) if length != asked.size => {
                Verdict::Changed(format!("it was {} bytes long and is {length}", asked.size))
            }
            _ => Verdict::Whole,
        };
    }
    let Some(stated) = text(headers, header::CONTENT_RANGE) else {
        return Verdict::Wrong("206 without a Content-Range".to_owned());
    };
    let Some((first, last, total)) = parse_content_range(stated) else {
        return Verdict::Wrong(format!("Content-Range {stated:?} is not a range"));
    };
    if total != asked.size {
        return Verdict::Changed(format!("it was {} bytes long and is {total}", asked.size));
    }
    if first != asked.start || last - first + 1 != asked.len {
        return Verdict::Wrong(format!(
            "asked for bytes {}-{}, got {first}-{last}",
            asked.start,
            asked.start + (asked.len - 1)
        ));
    }
    match length {
        Some(length) if length != asked.len => {
            Verdict::Wrong(format!("asked for {} bytes, got a body of {length}", asked.len))
        }
        _ => Verdict::Partial,
    }
}

/// An entity tag without its weakness: a proxy that recompresses weakens tags of bytes that did not change.
fn weakly(tag: &str) -> &str {
    tag.strip_prefix("W/").unwrap_or(tag)
}

/// Only the form in seconds: the form as a date would make us trust two clocks.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    text(headers, header::RETRY_AFTER)?
        .trim()
        .parse()
        .ok()
        .map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, headers: &[(&str, &str)]) -> response::Parts {
        let mut builder = hyper::Response::builder().status(status);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    fn tag() -> Validator {
        Validator::ETag("\"a\"".to_owned())
    }

    fn verdict(status: u16, headers: &[(&str, &str)]) -> Verdict {
        judge(
            &head(status, headers),
            Asked {
                start: 100,
                len: 50,
                size: 1000,
                validator: Some(&tag()),
            },
        )
    }

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 0-0/1"), Some((0, 0, 1)));
        assert_eq!(parse_content_range("bytes 100-149/1000"), Some((100, 149, 1000)));
        for bad in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes 0-0/*",
            "bytes */1000",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes -1-4/10",
            "bytes +1-4/10",
            "items 0-0/1",
            "bytes0-0/1",
            "bytes 0-0/99999999999999999999999",
            "bytes 0-1/2/3",
            "bytes 0-1-1/3",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_exact_range_passes() {
        let range = ("content-range", "bytes 100-149/1000");
        assert_eq!(verdict(206, &[range]), Verdict::Partial);
        assert_eq!(
            verdict(206, &[range, ("content-length", "50"), ("etag", "\"a\"")]),
            Verdict::Partial
        );
        assert_eq!(
            verdict(206, &[range, ("etag", "W/\"a\""), ("content-encoding", "identity")]),
            Verdict::Partial
        );
    }

    #[test]
    fn anything_else_does_not() {
        let range = ("content-range", "bytes 100-149/1000");
        for wrong in [
            &[][..],
            &[("content-range", "bytes 101-150/1000")],
            &[("content-range", "bytes 100-148/1000")],
            &[("content-range", "bytes 100-150/1000")],
            &[range, ("content-length", "49")],
            &[range, ("content-length", "x")],
            &[range, ("content-encoding", "gzip")],
        ] {
            assert!(matches!(verdict(206, wrong), Verdict::Wrong(_)), "{wrong:?}");
        }
        for changed in [
            &[("content-range", "bytes 100-149/1001")][..],
            &[range, ("etag", "\"b\"")],
        ] {
            assert!(matches!(verdict(206, changed), Verdict::Changed(_)), "{changed:?}");
        }
        assert!(matches!(verdict(416, &[]), Verdict::Changed(_)));
        assert!(matches!(verdict(204, &[]), Verdict::Wrong(_)));
    }

    #[test]
    fn the_whole_layer_must_be_as_long_as_it_was() {
        assert_eq!(verdict(200, &[("content-length", "1000")]), Verdict::Whole);
        assert_eq!(verdict(200, &[]), Verdict::Whole);
        assert!(matches!(
            verdict(200, &[("content-length", "999")]),
            Verdict::Changed(_)
        ));
        assert!(matches!(verdict(200, &[("etag", "\"b\"")]), Verdict::Changed(_)));
    }

    #[test]
    fn refusals_and_delays() {
        assert_eq!(
            verdict(429, &[("retry-after", "7")]),
            Verdict::Later {
                status: StatusCode::TOO_MANY_REQUESTS,
                after: Some(Duration::from_secs(7))
            }
        );
        assert_eq!(
            verdict(503, &[("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT")]),
            Verdict::Later {
                status: StatusCode::SERVICE_UNAVAILABLE,
                after: None
            }
        );
        assert_eq!(verdict(403, &[]), Verdict::Refused(StatusCode::FORBIDDEN));
        assert_eq!(verdict(302, &[("location", "/x")]), Verdict::Redirect("/x".to_owned()));
        assert!(matches!(verdict(302, &[]), Verdict::Wrong(_)));
    }
}
