//! Byte ranges in requests and in answers (RFC 9110, section 14).

use std::fmt;

use hyper::header::{CONTENT_RANGE, HeaderMap};

/// Bytes to ask for: `len` of them, never zero, from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl ByteRange {
    /// The last byte of it.
    pub(crate) const fn last(self) -> u64 {
        self.start.saturating_add(self.len.saturating_sub(1))
    }
}

/// As it stands in a `Range` header.
impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes={}-{}", self.start, self.last())
    }
}

/// What a `Content-Range` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The bytes that the body holds; none in a 416.
    pub(crate) range: Option<ByteRange>,
    /// The length of the whole; none where the server writes `*`.
    pub(crate) total: Option<u64>,
}

impl ContentRange {
    /// That of an answer, if it has one and it makes sense.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(CONTENT_RANGE)?.to_str().ok()?)
    }

    /// `bytes FIRST-LAST/TOTAL`, where `TOTAL` may be `*`, or `bytes */TOTAL`. Units are compared without regard to case
    /// (section 14.1). Nothing that contradicts itself is taken.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (unit, rest) = value.trim().split_once([' ', '\t'])?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.split_once('/')?;
        let (range, total) = (range.trim(), total.trim());
        let total = match total {
            "*" => None,
            digits => Some(number(digits)?),
        };
        if range == "*" {
            return total.map(|_| Self { range: None, total });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last) = (number(first.trim_end())?, number(last.trim_start())?);
        if first > last || last == u64::MAX || total.is_some_and(|total| last >= total) {
            return None;
        }
        let len = last - first + 1;
        Some(Self {
            range: Some(ByteRange { start: first, len }),
            total,
        })
    }
}

/// Digits and nothing else: `str::parse` would take a sign.
pub(super) fn number(digits: &str) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let range = |start, len, total| {
            Some(ContentRange {
                range: Some(ByteRange { start, len }),
                total,
            })
        };
        assert_eq!(ContentRange::parse("bytes 0-0/1"), range(0, 1, Some(1)));
        assert_eq!(ContentRange::parse("bytes 100-149/1000"), range(100, 50, Some(1000)));
        assert_eq!(ContentRange::parse("Bytes 100-149/1000"), range(100, 50, Some(1000)));
        assert_eq!(
            ContentRange::parse("BYTES  100 - 149 / 1000 "),
            range(100, 50, Some(1000))
        );
        assert_eq!(ContentRange::parse("bytes 0-9/*"), range(0, 10, None));
        let none = |total| Some(ContentRange { range: None, total });
        assert_eq!(ContentRange::parse("bytes */1000"), none(Some(1000)));
        assert_eq!(ContentRange::parse("bytes */0"), none(Some(0)));
        for bad in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes */*",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes -1-4/10",
            "bytes +1-4/10",
            "items 0-0/1",
            "bytes0-0/1",
            "bytes=0-0/1",
            "bytes 0/10",
            "bytes a-b/10",
            "bytes 0-0/99999999999999999999999",
            "bytes 0-1/2/3",
            "bytes 0-1-1/3",
            "bytes 0-18446744073709551615/*",
            "bytes 0-18446744073709551615/1",
        ] {
            assert_eq!(ContentRange::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn ranges_as_they_are_sent() {
        assert_eq!(ByteRange { start: 5, len: 1 }.to_string(), "bytes=5-5");
        assert_eq!(ByteRange { start: 0, len: 512 }.to_string(), "bytes=0-511");
    }
}
