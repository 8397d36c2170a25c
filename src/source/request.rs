//! Requests for a blob on a web server or in a registry. In: a blob, ranges of it. Out: its bytes from
//! where they were asked for, piece by piece, or an error that says whether trying again makes sense.
//!
//! No byte leaves this file before the answer's head was judged against the question (`http::judge`).

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, RANGE};
use reqwest::{Client, Response, StatusCode};
use std::time::SystemTime;

use url::Url;

use super::blob::{Blob, Place, UrlBlob};
use super::error::{SourceError, wait_after};
use crate::http::tls::Trust;
use crate::http::{
    self, Asked, Backoff, Body, ByteRange, Encoding, Found, HttpOptions, Kind, Reach, Redirects, Validator, Verdict,
    content_length, encoding, judge, judge_first, runtime, shown_url, split_credentials,
};

/// Requests to one server, with its deadlines.
#[derive(Clone, Debug)]
pub(crate) struct Requests {
    client: Client,
    pub(crate) options: HttpOptions,
}

/// An answer that was judged to hold bytes of a blob.
struct Judged {
    response: Response,
    /// Where the body begins and ends.
    at: u64,
    end: u64,
}

impl Requests {
    pub(crate) fn new(url: &Url, options: &HttpOptions) -> Result<Self, SourceError> {
        let client = http::build(&Trust::default(), url.scheme() == "https", &options.timeouts)?;
        Ok(Self {
            client,
            options: *options,
        })
    }

    /// Requests for one blob, wherever it is.
    pub(crate) fn of(blob: &Blob, options: &HttpOptions) -> Result<Self, SourceError> {
        let secure = matches!(&blob.place, Place::Url(at) if at.url.scheme() == "https");
        let client = http::build(&Trust::default(), secure, &options.timeouts)?;
        Ok(Self {
            client,
            options: *options,
        })
    }

    /// Tries something on a thread of its own runtime until it succeeds or its failures are to be believed.
    fn until_believed<T>(&self, mut attempt: impl AsyncFnMut() -> Result<T, SourceError>) -> Result<T, SourceError> {
        runtime::runtime()?.block_on(async {
            let mut backoff = self.backoff();
            loop {
                match attempt().await {
                    Ok(found) => return Ok(found),
                    Err(failure) => wait_after(&mut backoff, failure).await?,
                }
            }
        })
    }

    /// How failures in a row are counted.
    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::new(self.options.retry)
    }

    /// A GET of `range`, or of everything, with the redirects of `chain` followed. `authorization` goes to `home`'s origin alone.
    /// Also returns the chain, whose URL is the one that gave the answer.
    async fn get(
        &self,
        mut chain: Redirects,
        home: &Url,
        authorization: Option<&HeaderValue>,
        range: Option<ByteRange>,
    ) -> Result<(Response, Redirects), http::Error> {
        loop {
            let url = chain.url().clone();
            let client = match chain.reach().unless_proxied(&url) {
                Reach::Anywhere => self.client.clone(),
                within @ Reach::Public => {
                    let secure = url.scheme() == "https";
                    http::client_within(within, &Trust::default(), secure, &self.options.timeouts)?
                }
            };
            let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(range) = range {
                request = request.header(RANGE, range.to_string());
            }
            if let Some(value) = authorization.filter(|_| url.origin() == home.origin()) {
                request = request.header(AUTHORIZATION, value);
            }
            let sent = http::send(&url, request, &self.options.timeouts).await;
            let response = sent.map_err(|failure| chain.explain(failure))?;
            chain.answered(http::peer(&url, &response), self.options.private_redirects);
            if chain.next(response.status(), response.headers())?.is_none() {
                return Ok((response, chain));
            }
        }
    }

    /// Asks for a range of a blob, or for all of it, wherever it is known to be.
    async fn get_of(&self, blob: &Blob, range: Option<ByteRange>) -> Result<Response, SourceError> {
        let at = match &blob.place {
            Place::Registry(access) => return access.get(range).await,
            Place::Url(at) => at,
            Place::File(_) => {
                return Err(http::Error::wrong(&*blob.name, "a file is not asked for")
                    .lasting()
                    .into());
            }
        };
        let authorization = at.authorization_header();
        let authorization = authorization.as_ref();
        let first = || Redirects::from(at.url.clone());
        let chain = if at.resolved == at.url {
            first()
        } else {
            Redirects::resumed(at.url.clone(), at.resolved.clone(), at.reach)
        };
        let (response, _) = self.get(chain, &at.url, authorization, range).await?;
        let expired = matches!(
            response.status(),
            StatusCode::BAD_REQUEST
                | StatusCode::UNAUTHORIZED
                | StatusCode::FORBIDDEN
                | StatusCode::NOT_FOUND
                | StatusCode::GONE
        );
        if expired && at.resolved != at.url {
            // Signed URLs expire; the one that was named leads to a new one.
            return Ok(self.get(first(), &at.url, authorization, range).await?.0);
        }
        Ok(response)
    }

    /// Asks for a range, or for the whole where `ranged` is false, and judges the answer. None: the server has no ranges, which
    /// it says with an error.
    async fn ask(&self, blob: &Blob, range: ByteRange, ranged: bool) -> Result<Option<Judged>, SourceError> {
        let response = match self.get_of(blob, ranged.then_some(range)).await {
            Ok(response) => response,
            // A registry's refusals come as errors, with what it says of them.
            Err(SourceError::Http(error)) if ranged && error.kind() == Kind::Refused(StatusCode::BAD_REQUEST) => {
                return Ok(None);
            }
            Err(SourceError::Http(error)) if ranged && error.kind() == Kind::Refused(StatusCode::NOT_IMPLEMENTED) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let at = match &blob.place {
            Place::Url(at) => Some(at),
            Place::Registry(_) | Place::File(_) => None,
        };
        let asked = Asked {
            range,
            ranged,
            size: blob.len,
            validator: at.and_then(|at| at.validator.as_ref()),
            encoding: match at {
                Some(at) => Encoding::Same(at.encoding.as_deref()),
                None => Encoding::Any,
            },
        };
        match judge(response.status(), response.headers(), asked) {
            Verdict::Part { len } => Ok(Some(Judged {
                response,
                at: range.start,
                end: range.start + len,
            })),
            Verdict::Whole => Ok(Some(Judged {
                response,
                at: 0,
                end: blob.len,
            })),
            Verdict::NoRanges { .. } => Ok(None),
            refused @ Verdict::Status { status, .. } => {
                Err(refused.into_error(&*blob.name).advising(advice(status)).into())
            }
            wrong => Err(wrong.into_error(&*blob.name).into()),
        }
    }

    fn body(&self, answer: Judged) -> Body {
        Body::new(answer.response, answer.at, answer.end, self.options.timeouts.stall)
    }

    /// Asks for `len` bytes from `start` on. The body begins there; it may end before they do, and then the rest has to be asked
    /// for. A server that is known to answer ranges and sends the whole blob is asked again; of a registry it is not known, and the
    /// body may begin at the blob's beginning.
    pub(crate) async fn range(&self, blob: &Blob, start: u64, len: u64) -> Result<Body, SourceError> {
        let end = start.saturating_add(len).min(blob.len);
        let range = ByteRange {
            start,
            len: end.saturating_sub(start),
        };
        let Some(answer) = self.ask(blob, range, true).await? else {
            return self.whole(blob).await;
        };
        if answer.at != start && matches!(blob.place, Place::Url(_)) {
            let why = "the whole layer instead of a range, which it answered before";
            return Err(http::Error::wrong(&*blob.name, why).into());
        }
        Ok(self.body(answer))
    }

    /// Whether a registry answers ranges of a blob that is not empty, by asking for its first byte.
    pub(crate) async fn answers_ranges(&self, blob: &Blob) -> Result<bool, SourceError> {
        let first = ByteRange { start: 0, len: 1 };
        let answer = self.ask(blob, first, true).await?;
        Ok(answer.is_some_and(|answer| answer.end == 1))
    }

    /// Asks for the whole layer as one stream, of a server that answers no ranges.
    pub(crate) async fn whole(&self, blob: &Blob) -> Result<Body, SourceError> {
        let all = ByteRange {
            start: 0,
            len: blob.len,
        };
        match self.ask(blob, all, false).await? {
            Some(answer) => Ok(self.body(answer)),
            None => Err(http::Error::wrong(&*blob.name, "no answer to a request without a range").into()),
        }
    }
}

/// What to do about a status, for the person.
fn advice(status: StatusCode) -> &'static str {
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "; check the address",
        StatusCode::UNAUTHORIZED => "; put user:password@ in front of the host name if you have them",
        StatusCode::FORBIDDEN => "; you may not read it, or the signature in the address has expired",
        _ => "",
    }
}

/// Asks what is at `url`: its length, whether ranges are answered, how to recognise it again.
///
/// # Errors
/// [`SourceError`]: unreachable, refused, or an answer that makes no sense.
pub fn probe(url: &Url, options: &HttpOptions) -> Result<Blob, SourceError> {
    let requests = Requests::new(url, options)?;
    requests.until_believed(async || probe_once(&requests, url).await)
}

/// What the clock of a URL's server says; none if it does not answer or does not say.
#[must_use]
pub fn server_clock(url: &Url, options: &HttpOptions) -> Option<SystemTime> {
    let requests = Requests::new(url, options).ok()?;
    let (url, _) = split_credentials(url);
    let request = requests.client.head(url.clone());
    let asked = runtime::runtime()
        .ok()?
        .block_on(http::send(&url, request, &options.timeouts));
    http::date(asked.ok()?.headers())
}

/// Whether a blob's server answers ranges, by asking for its first byte.
///
/// # Errors
/// [`SourceError`]: unreachable, refused, or an answer that makes no sense.
pub fn has_ranges(blob: &Blob, options: &HttpOptions) -> Result<bool, SourceError> {
    if !blob.is_remote() || blob.len == 0 {
        return Ok(true);
    }
    let requests = Requests::of(blob, options)?;
    runtime::runtime()?.block_on(requests.answers_ranges(blob))
}

/// Brings a small file, whole, in one request.
///
/// # Errors
/// [`SourceError`]; also when it is longer than `most` bytes.
pub fn get_whole(url: &Url, most: u64, options: &HttpOptions) -> Result<Vec<u8>, SourceError> {
    let requests = Requests::new(url, options)?;
    requests.until_believed(async || get_whole_once(&requests, url, most).await)
}

async fn get_whole_once(requests: &Requests, named: &Url, most: u64) -> Result<Vec<u8>, SourceError> {
    let (url, authorization) = split_credentials(named);
    let chain = Redirects::from(url.clone());
    let (response, _) = requests.get(chain, &url, authorization.as_ref(), None).await?;
    if response.status() != StatusCode::OK {
        return Err(refused(&url, &response).into());
    }
    if let Some(len) = content_length(response.headers())
        && len > most
    {
        return Err(SourceError::Unusable {
            source_name: shown_url(&url),
            why: format!("the file is {len} bytes long, and no more than {most} can be used"),
        });
    }
    Ok(http::receive(&url, response, most, requests.options.timeouts.stall).await?)
}

/// What an answer to a request without a range means that is not a 200.
fn refused(url: &Url, response: &Response) -> http::Error {
    let (status, headers) = (response.status(), response.headers());
    match judge_first(status, headers, None) {
        Found::Not(verdict) => verdict.into_error(url).advising(advice(status)),
        _ => http::Error::wrong(url, format!("status {status}")),
    }
}

/// What is at `url`, as [`probe`] says it, and its beginning, by one request: the first `len` bytes, at least one, or all of it where it is
/// shorter or its server answers no ranges.
///
/// # Errors
/// As [`probe`]; also when all of it comes and is longer than `most` bytes.
pub fn probe_with_beginning(
    url: &Url,
    len: u64,
    most: u64,
    options: &HttpOptions,
) -> Result<(Blob, Vec<u8>), SourceError> {
    let requests = Requests::new(url, options)?;
    requests.until_believed(async || beginning_once(&requests, url, len, most).await)
}

async fn beginning_once(requests: &Requests, named: &Url, len: u64, most: u64) -> Result<(Blob, Vec<u8>), SourceError> {
    let (at, total, response) = ask_first(requests, named, len).await?;
    let is_part = at.ranges && total != content_length(response.headers());
    let want = total.map(|total| if is_part { total.min(len) } else { total });
    if let Some(want) = want.filter(|want| *want > most) {
        return Err(SourceError::Unusable {
            source_name: shown_url(named),
            why: format!("the file is {want} bytes long, and no more than {most} can be used"),
        });
    }
    let (shown, _) = split_credentials(named);
    let bytes = http::receive(&shown, response, want.unwrap_or(most), requests.options.timeouts.stall).await?;
    let got = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if let Some(want) = want.filter(|want| *want != got) {
        return Err(http::Error::wrong(&shown, format!("{got} bytes instead of {want}")).into());
    }
    Ok((Blob::of_url(at, total.unwrap_or(got)), bytes))
}

async fn probe_once(requests: &Requests, named: &Url) -> Result<Blob, SourceError> {
    let (at, total, _) = ask_first(requests, named, 1).await?;
    let (url, _) = split_credentials(named);
    let unmeasured = "it answers no ranges and tells no length; download the layer first";
    let total = total.ok_or_else(|| http::Error::wrong(&url, unmeasured))?;
    Ok(Blob::of_url(at, total))
}

/// Asks for a blob's first `len` bytes, or for all of it where there are no ranges. Where it is, its length if that is told, and the answer
/// with its body.
async fn ask_first(
    requests: &Requests,
    named: &Url,
    len: u64,
) -> Result<(UrlBlob, Option<u64>, Response), SourceError> {
    let (url, authorization) = split_credentials(named);
    let first = ByteRange { start: 0, len };
    let (mut ranged, mut proven) = (true, false);
    loop {
        let range = ranged.then_some(first);
        let chain = Redirects::from(url.clone());
        let (response, chain) = requests.get(chain, &url, authorization.as_ref(), range).await?;
        let (status, headers) = (response.status(), response.headers());
        let (total, seekable) = match judge_first(status, headers, ranged.then_some(len)) {
            Found::Blob { len, ranges } => (Some(len), ranges || proven),
            Found::Unmeasured => (None, false),
            Found::RangesOfUnknown => {
                (ranged, proven) = (false, true);
                continue;
            }
            Found::NoRanges => {
                ranged = false;
                continue;
            }
            Found::Not(verdict) => return Err(verdict.into_error(&url).advising(advice(status)).into()),
        };
        let at = UrlBlob {
            resolved: chain.url().clone(),
            reach: chain.reach(),
            private_redirects: requests.options.private_redirects,
            validator: Validator::of(headers),
            ranges: seekable,
            encoding: encoding(headers).map(str::to_owned),
            ..UrlBlob::new(named)
        };
        return Ok((at, total, response));
    }
}
