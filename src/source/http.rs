//! A layer on a web server: what is there, and ranges of it, checked.
//!
//! In: a URL, ranges. Out: exactly the bytes that were asked for, piece by piece, or an error that says whether trying again
//! makes sense. A response is compared with the request before a byte of it is believed (RFC 9110, sections 14 and 15.3.7).

mod failure;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue,
    LAST_MODIFIED, RANGE,
};
use reqwest::{Client, Response, StatusCode, redirect};
use url::Url;

pub use failure::Patience;
use failure::refused;
pub(super) use failure::{Failure, Tries, cause, classify};

use super::registry::BlobAccess;
use super::{SourceError, shown_url, tls};

/// More redirects than these are a loop.
const MOST_REDIRECTS: usize = 10;

/// Tells one state of a layer on a server from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Validator {
    /// The `ETag` header's value, quotes and `W/` included.
    ETag(String),
    /// The `Last-Modified` header's value.
    LastModified(String),
}

impl Validator {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        text(ETAG)
            .map(Self::ETag)
            .or_else(|| text(LAST_MODIFIED).map(Self::LastModified))
    }

    /// Whether `other`, from a later answer, shows that the layer changed. Different kinds cannot be compared: some servers
    /// leave a header out of partial answers.
    fn contradicts(&self, other: Option<&Self>) -> bool {
        match (self, other) {
            (Self::ETag(a), Some(Self::ETag(b))) => a.trim_start_matches("W/") != b.trim_start_matches("W/"),
            (Self::LastModified(a), Some(Self::LastModified(b))) => a != b,
            _ => false,
        }
    }
}

impl fmt::Display for Validator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ETag(tag) => write!(f, "etag:{tag}"),
            Self::LastModified(date) => write!(f, "last-modified:{date}"),
        }
    }
}

/// A layer on a web server that was found there.
#[derive(Clone)]
pub struct HttpBlob {
    /// The URL that was named, without user and password.
    pub url: Url,
    /// Where redirects led in the end; may expire, which [`url`](Self::url) does not.
    pub resolved: Url,
    /// `Authorization`, made from the URL's user and password, for the host of [`url`](Self::url) and no other.
    pub authorization: Option<HeaderValue>,
    /// The layer's length in bytes.
    pub len: u64,
    /// Whether the server answers ranges. If not, the layer can only be streamed from its beginning.
    pub ranges: bool,
    /// Tells whether it is still the same, where the server says.
    pub validator: Option<Validator>,
    /// How it is asked for, if it is a blob of a registry: then [`url`](Self::url) is only its name.
    pub access: Option<BlobAccess>,
}

impl fmt::Debug for HttpBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpBlob")
            .field("url", &self.name())
            .field("len", &self.len)
            .field("ranges", &self.ranges)
            .field("validator", &self.validator)
            .finish_non_exhaustive()
    }
}

impl HttpBlob {
    /// A blob of a registry. Registries that store blobs answer ranges; whether this one does shows when it is asked.
    pub(super) fn of_registry(access: &BlobAccess) -> Result<Self, SourceError> {
        let name = format!("https://{}", access.name());
        let url = Url::parse(&name).map_err(|error| SourceError::Unusable {
            source_name: access.name(),
            why: error.to_string(),
        })?;
        Ok(Self {
            resolved: url.clone(),
            url,
            authorization: None,
            len: access.size(),
            ranges: true,
            validator: None,
            access: Some(access.clone()),
        })
    }

    /// The URL for messages.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.access {
            Some(access) => access.name(),
            None => shown_url(&self.url),
        }
    }
}

/// Requests to one server, with its deadlines.
#[derive(Clone, Debug)]
pub(super) struct Requests {
    client: Client,
    pub(super) patience: Patience,
}

impl Requests {
    pub(super) fn new(url: &Url, patience: Patience) -> Result<Self, SourceError> {
        let config = match tls::client_config() {
            Ok(config) => Arc::unwrap_or_clone(config),
            Err(error) if url.scheme() == "https" => return Err(error),
            Err(_) => tls::trusting_nobody()?,
        };
        let client = Client::builder()
            .tls_backend_preconfigured(config)
            .http1_only()
            .tcp_nodelay(true)
            .connect_timeout(patience.connect)
            // It would tell whoever a redirect leads to the address with its query, where signatures are.
            .referer(false)
            .redirect(redirect::Policy::custom(follow))
            .user_agent(concat!("tarblk/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| SourceError::Setup {
                what: "the HTTP client",
                why: cause(&error),
            })?;
        Ok(Self { client, patience })
    }

    /// Asks for a range of a blob, wherever it is known to be.
    async fn get_of(&self, blob: &HttpBlob, range: &str) -> Result<Response, Failure> {
        if let Some(access) = &blob.access {
            return access.get(range.to_owned()).await;
        }
        let authorization = blob
            .authorization
            .as_ref()
            .filter(|_| blob.resolved.origin() == blob.url.origin());
        let response = self.get(&blob.resolved, authorization, range).await?;
        let expired = matches!(
            response.status(),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::GONE
        );
        if expired && blob.resolved != blob.url {
            // Signed URLs expire; the one that was named leads to a new one.
            return self.get(&blob.url, blob.authorization.as_ref(), range).await;
        }
        Ok(response)
    }

    async fn get(&self, url: &Url, authorization: Option<&HeaderValue>, range: &str) -> Result<Response, Failure> {
        let mut request = self
            .client
            .get(url.clone())
            .header(ACCEPT_ENCODING, "identity")
            .header(RANGE, range);
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        let answer = tokio::time::timeout(self.patience.connect + self.patience.stall, request.send()).await;
        match answer {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(classify(url, &error)),
            Err(_) => Err(Failure::passing(url, "the server does not answer")),
        }
    }

    /// Asks for `len` bytes from `start` on. The answer is checked; its body is not longer than what it announces.
    pub(super) async fn range(&self, blob: &HttpBlob, start: u64, len: u64) -> Result<Body, Failure> {
        let end = start.saturating_add(len).min(blob.len);
        let range = format!("bytes={start}-{}", end.saturating_sub(1));
        let response = self.get_of(blob, &range).await?;
        let status = response.status();
        if status == StatusCode::OK && start == 0 && end == blob.len {
            // Everything was asked for and everything comes.
        } else if status == StatusCode::PARTIAL_CONTENT {
            check_range(blob, response.headers(), start, end)?;
        } else if status == StatusCode::OK {
            return Err(Failure::wrong(
                &blob.url,
                "the whole layer instead of a range, which it answered before",
            ));
        } else {
            return Err(refused(&blob.url, &response));
        }
        check_same(blob, response.headers())?;
        Ok(Body {
            response,
            at: start,
            end,
            stall: self.patience.stall,
        })
    }

    /// Asks for the whole layer as one stream, of a server that answers no ranges.
    pub(super) async fn whole(&self, blob: &HttpBlob) -> Result<Body, Failure> {
        let response = match &blob.access {
            Some(access) => access.get("bytes=0-".to_owned()).await?,
            None => self.get(&blob.url, blob.authorization.as_ref(), "bytes=0-").await?,
        };
        match response.status() {
            StatusCode::OK => check_length(blob, response.headers(), blob.len)?,
            StatusCode::PARTIAL_CONTENT => check_range(blob, response.headers(), 0, blob.len)?,
            _ => return Err(refused(&blob.url, &response)),
        }
        check_same(blob, response.headers())?;
        Ok(Body {
            response,
            at: 0,
            end: blob.len,
            stall: self.patience.stall,
        })
    }
}

/// Whether to go where a server sends us. What was asked for by TLS is not taken from whoever can meddle with plain HTTP.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    if attempt.previous().len() > MOST_REDIRECTS {
        attempt.error("too many redirects")
    } else if stays_secure(attempt.previous(), attempt.url()) {
        attempt.follow()
    } else {
        attempt.error("a redirect from https to plain http")
    }
}

fn stays_secure(previous: &[Url], next: &Url) -> bool {
    next.scheme() == "https" || previous.last().is_none_or(|last| last.scheme() != "https")
}

/// A checked answer, whose bytes come piece by piece.
#[derive(Debug)]
pub(super) struct Body {
    response: Response,
    /// Where the next piece lies.
    pub(super) at: u64,
    /// Where the answer ends.
    pub(super) end: u64,
    stall: Duration,
}

impl Body {
    /// The next piece and where it lies; `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, bytes::Bytes)>, Failure> {
        let piece = tokio::time::timeout(self.stall, self.response.chunk()).await;
        let passing = |why: &str| Failure::passing(self.response.url(), why);
        let piece = piece.map_err(|_| passing("the server stopped sending"))?;
        match piece.map_err(|error| passing(&cause(&error)))? {
            Some(bytes) => {
                let at = self.at;
                self.at = self.at.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                if self.at > self.end {
                    return Err(Failure::wrong(self.response.url(), "more bytes than it announced"));
                }
                Ok(Some((at, bytes)))
            }
            None if self.at < self.end => Err(passing("the answer ended too early")),
            None => Ok(None),
        }
    }
}

/// Asks what is at `url`: its length, whether ranges are answered, how to recognise it again.
///
/// # Errors
/// [`SourceError`]: unreachable, refused, or an answer that makes no sense.
pub fn probe(url: &Url, patience: &Patience) -> Result<HttpBlob, SourceError> {
    let requests = Requests::new(url, *patience)?;
    super::remote::runtime()?.block_on(async {
        let mut tries = Tries::default();
        loop {
            match probe_once(&requests, url).await {
                Ok(blob) => return Ok(blob),
                Err(failure) => tries.failed(failure, patience).await?,
            }
        }
    })
}

/// Brings a small file, whole, in one request.
///
/// # Errors
/// [`SourceError`]; also when it is longer than `most` bytes.
pub fn get_whole(url: &Url, most: u64, patience: &Patience) -> Result<Vec<u8>, SourceError> {
    let requests = Requests::new(url, *patience)?;
    super::remote::runtime()?.block_on(async {
        let mut tries = Tries::default();
        loop {
            match get_whole_once(&requests, url, most).await {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => tries.failed(failure, patience).await?,
            }
        }
    })
}

async fn get_whole_once(requests: &Requests, named: &Url, most: u64) -> Result<Vec<u8>, Failure> {
    let (url, authorization) = split_credentials(named);
    let response = requests.get(&url, authorization.as_ref(), "bytes=0-").await?;
    let end = match response.status() {
        StatusCode::OK => response.content_length(),
        StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
            Some((Some((0, end)), len)) if end == len => Some(len),
            _ => return Err(Failure::wrong(&url, "a part of the file, which was asked for whole")),
        },
        _ => return Err(refused(&url, &response)),
    };
    let end = end.ok_or_else(|| Failure::wrong(&url, "a file without saying how long it is"))?;
    if end > most {
        let why = format!("the file is {end} bytes long, and no more than {most} can be used");
        return Err(Failure::lasting(SourceError::Unusable {
            source_name: shown_url(&url),
            why,
        }));
    }
    let mut body = Body {
        response,
        at: 0,
        end,
        stall: requests.patience.stall,
    };
    let mut whole = Vec::new();
    while let Some((_, bytes)) = body.next().await? {
        whole.extend_from_slice(&bytes);
    }
    Ok(whole)
}

async fn probe_once(requests: &Requests, named: &Url) -> Result<HttpBlob, Failure> {
    let (url, authorization) = split_credentials(named);
    let response = requests.get(&url, authorization.as_ref(), "bytes=0-0").await?;
    let headers = response.headers();
    let wrong = |why| Failure::wrong(&url, why);
    let (len, ranges) = match response.status() {
        StatusCode::PARTIAL_CONTENT => match content_range(headers) {
            Some((Some((0, 1)), len)) if len > 0 => (len, true),
            _ => return Err(wrong("a range that was not asked for")),
        },
        // An empty layer has no first byte.
        StatusCode::RANGE_NOT_SATISFIABLE => match content_range(headers) {
            Some((None, 0)) => (0, true),
            _ => return Err(wrong("it has no first byte, but an unknown length")),
        },
        StatusCode::OK => match content_length(headers) {
            Some(len) => (len, false),
            None => {
                return Err(wrong(
                    "it answers no ranges and tells no length; download the layer first",
                ));
            }
        },
        _ => return Err(refused(&url, &response)),
    };
    check_coding(&url, headers)?;
    Ok(HttpBlob {
        resolved: response.url().clone(),
        validator: Validator::of(headers),
        url,
        authorization,
        len,
        ranges,
        access: None,
    })
}

/// The URL without its user and password, and these as a header.
fn split_credentials(named: &Url) -> (Url, Option<HeaderValue>) {
    let mut url = named.clone();
    if named.username().is_empty() && named.password().is_none() {
        return (url, None);
    }
    // These only fail for URLs that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let decode = |text: &str| percent_decoded(text.as_bytes());
    let mut pair = decode(named.username());
    pair.push(b':');
    pair.extend(decode(named.password().unwrap_or_default()));
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(&pair))).ok();
    if let Some(value) = &mut value {
        value.set_sensitive(true);
    }
    (url, value)
}

fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let pair = tail.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let pair = pair.and_then(|digits| std::str::from_utf8(digits).ok());
        match pair.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if *first == b'%' => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// A `Content-Range`: the range as start and end (behind the last byte), if there is one, and the whole length.
type ContentRange = (Option<(u64, u64)>, u64);

fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, len) = text.strip_prefix("bytes")?.trim_start().split_once('/')?;
    let len = len.trim().parse().ok()?;
    if range.trim() == "*" {
        return Some((None, len));
    }
    let (start, last) = range.split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    Some((Some((start.trim().parse().ok()?, last.checked_add(1)?)), len))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

fn check_range(blob: &HttpBlob, headers: &HeaderMap, start: u64, end: u64) -> Result<(), Failure> {
    match content_range(headers) {
        Some((_, other)) if other != blob.len => Err(changed(blob)),
        Some((Some(range), _)) if range == (start, end) => check_length(blob, headers, end - start),
        _ => {
            let got = headers
                .get(CONTENT_RANGE)
                .and_then(|value| value.to_str().ok())
                .unwrap_or("no range at all");
            let why = format!("{got} instead of bytes {start}-{}/{}", end.saturating_sub(1), blob.len);
            Err(Failure::wrong(&blob.url, why))
        }
    }
}

fn check_length(blob: &HttpBlob, headers: &HeaderMap, expected: u64) -> Result<(), Failure> {
    match content_length(headers) {
        Some(len) if len != expected => Err(Failure::wrong(&blob.url, format!("{len} bytes instead of {expected}"))),
        _ => Ok(()),
    }
}

/// Whether bytes are those of the layer and not of something that was made of it for this answer.
fn check_coding(url: &Url, headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get(CONTENT_ENCODING) {
        Some(coding) if coding != "identity" && !coding.is_empty() => Err(Failure::wrong(
            url,
            "a compressed transfer (Content-Encoding), whose ranges are not those of the layer; have the server send the file as it is",
        )),
        _ => Ok(()),
    }
}

fn check_same(blob: &HttpBlob, headers: &HeaderMap) -> Result<(), Failure> {
    check_coding(&blob.url, headers)?;
    let now = Validator::of(headers);
    match &blob.validator {
        Some(before) if before.contradicts(now.as_ref()) => Err(changed(blob)),
        _ => Ok(()),
    }
}

fn changed(blob: &HttpBlob) -> Failure {
    Failure::lasting(SourceError::Changed { url: blob.name() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_leave_the_url() {
        let (url, value) = split_credentials(&Url::parse("https://us%40er:p%3Aw@host/x?q=1").unwrap());
        assert_eq!(url.as_str(), "https://host/x?q=1");
        let value = value.unwrap();
        assert_eq!(value.to_str().unwrap(), "Basic dXNAZXI6cDp3");
        assert!(value.is_sensitive());
    }

    #[test]
    fn redirects_do_not_leave_tls() {
        let url = |text: &str| Url::parse(text).unwrap();
        for (from, to, good) in [
            ("https://a/x", "https://b/y", true),
            ("http://a/x", "https://a/x", true),
            ("http://a/x", "http://b/x", true),
            ("https://a/x", "http://a/x", false),
        ] {
            assert_eq!(stays_secure(&[url(from)], &url(to)), good, "{from} {to}");
        }
        let back = [url("http://a/x"), url("https://a/x")];
        assert!(!stays_secure(&back, &url("http://b/x")));
    }

    #[test]
    fn only_hexadecimal_digits_are_decoded() {
        assert_eq!(percent_decoded(b"%41%+f%-1%4"), b"A%+f%-1%4");
    }

    #[test]
    fn content_ranges_are_understood() {
        let range = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, HeaderValue::from_str(text).unwrap());
            content_range(&headers)
        };
        assert_eq!(range("bytes 0-0/10"), Some((Some((0, 1)), 10)));
        assert_eq!(range("bytes */0"), Some((None, 0)));
        for bad in [
            "bytes 0-0/*",
            "items 0-0/10",
            "bytes 0/10",
            "bytes a-b/10",
            "bytes 0-18446744073709551615/1",
        ] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }
}
