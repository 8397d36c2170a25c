//! The gate in front of bodies, for fuzzing and tests.

use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::response::{Asked, Encoding, Found, Verdict, judge, judge_first};
use super::{ByteRange, Validator};

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The first byte wanted.
    pub start: u64,
    /// How many, not zero.
    pub len: u64,
    /// The blob's length in bytes.
    pub size: u64,
    /// Whether the request named the range.
    pub ranged: bool,
}

/// What the gate says of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judged {
    /// The body is so many bytes of the range's beginning.
    Part(u64),
    /// The body is the whole blob.
    Whole,
    /// No body comes through; the message for a person, if there is one.
    Shut(Option<String>),
}

/// A status and headers: a line with the number, then lines of `name: value`. Lines that HTTP does not allow are left out, as the
/// client would have refused them before.
fn head(text: &[u8]) -> Option<(StatusCode, HeaderMap)> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let status = StatusCode::from_bytes(lines.next()?).ok()?;
    let mut headers = HeaderMap::new();
    for line in lines.take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            continue;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    Some((status, headers))
}

/// Judges the head of an answer to a request for bytes.
#[must_use]
pub fn judged(text: &[u8], asked: Question) -> Option<Judged> {
    let (status, headers) = head(text)?;
    let validator = Validator::ETag("\"a\"".to_owned());
    let asked = Asked {
        range: ByteRange {
            start: asked.start,
            len: asked.len,
        },
        ranged: asked.ranged,
        size: asked.size,
        validator: Some(&validator),
        encoding: Encoding::Any,
    };
    Some(match judge(status, &headers, asked) {
        Verdict::Part { len } => Judged::Part(len),
        Verdict::Whole => Judged::Whole,
        Verdict::Redirect => Judged::Shut(None),
        shut => Judged::Shut(Some(shut.into_error("http://host/layer").to_string())),
    })
}

/// Judges the head of the first answer: the blob's length and whether there are ranges, or the message that it is none.
#[must_use]
pub fn judged_first(text: &[u8], ranged: bool) -> Option<Result<(u64, bool), String>> {
    let (status, headers) = head(text)?;
    Some(match judge_first(status, &headers, ranged.then_some(1)) {
        Found::Blob { len, ranges } => Ok((len, ranges)),
        Found::Not(verdict) => Err(verdict.into_error("http://host/layer").to_string()),
        other => Err(format!("{other:?}")),
    })
}
