//! What both rooms that use reqwest need of it: a client, requests with deadlines, and bodies that are bounded.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, redirect};
use url::Url;

use super::error::{Error, innermost};
use super::pace::Pace;
use super::proxy::Proxies;
use super::reach::{InsideAddress, PublicNames, Reach};
use super::redact::shown_url;
use super::retry::Timeouts;
use super::tls::{self, Trust};
use super::waits::noting;

/// A client that follows no redirects by itself: whoever follows decides where credentials go. Proxies are taken from the
/// environment. `secure` says whether it will be used for TLS, without which certificates need not be there.
///
/// # Errors
/// [`Kind::Setup`](super::Kind::Setup).
pub(crate) fn build(trust: &Trust, secure: bool, timeouts: &Timeouts) -> Result<Client, Error> {
    finish(builder(trust, secure, timeouts)?)
}

/// A client for what strangers name, which goes no further than `reach`; through no proxy, unless that is
/// [`Reach::Anywhere`]: see [`Reach::unless_proxied`]. Requests for the same trust and reach share it and its connections.
///
/// # Errors
/// [`Kind::Setup`](super::Kind::Setup).
pub(crate) fn client_within(reach: Reach, trust: &Trust, secure: bool, timeouts: &Timeouts) -> Result<Client, Error> {
    /// Few: one for each authority that the machine's configuration names. Those that cannot speak TLS are not kept.
    static CLIENTS: Mutex<Vec<(Reach, Trust, Client)>> = Mutex::new(Vec::new());
    let kept = || CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., client)) = kept().iter().find(|(to, by, _)| *to == reach && by == trust) {
        return Ok(client.clone());
    }
    let builder = builder(trust, secure, timeouts)?;
    let client = finish(match reach {
        Reach::Anywhere => builder,
        Reach::Public => builder.no_proxy().dns_resolver(PublicNames::shared()),
    })?;
    if secure {
        kept().push((reach, trust.clone(), client.clone()));
    }
    Ok(client)
}

/// What all clients have in common.
pub(super) fn builder(trust: &Trust, secure: bool, timeouts: &Timeouts) -> Result<ClientBuilder, Error> {
    let config = match tls::client_config_for(trust) {
        Ok(config) => (*config).clone(),
        Err(error) if secure => return Err(error),
        Err(_) => tls::without_roots()?,
    };
    Ok(Client::builder()
        .tls_backend_preconfigured(config)
        .http1_only()
        .tcp_nodelay(true)
        .redirect(redirect::Policy::none())
        .connect_timeout(timeouts.connect)
        .user_agent(super::USER_AGENT))
}

pub(super) fn finish(builder: ClientBuilder) -> Result<Client, Error> {
    builder
        .build()
        .map_err(|error| Error::setup("the HTTP client", Innermost(error)))
}

/// Sends a request and waits for the head of its answer. `url` is for messages.
///
/// # Errors
/// [`Error`]: no connection, no answer in time, none that is HTTP.
pub(crate) async fn send(url: &Url, request: RequestBuilder, timeouts: &Timeouts) -> Result<Response, Error> {
    let sent = tokio::time::timeout(timeouts.connect + timeouts.head, request.send());
    match noting(|| shown_url(url), "the server has not answered yet", sent).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(classify(url, error)),
        Err(_) => Err(Error::unreachable(url, "the server does not answer")),
    }
}

/// Bytes of bodies that this process received by reqwest, whatever they were for.
static RECEIVED: AtomicU64 = AtomicU64::new(0);

/// How many bytes of bodies came to this process so far through this client: what finding layers costs, as opposed to the
/// fetch thread's own client, which counts for itself.
#[must_use]
pub fn received_bytes() -> u64 {
    RECEIVED.load(Ordering::Relaxed)
}

/// The address that an answer to a request to `url` came from; none if that was a proxy's, or is not known.
pub(crate) fn peer(url: &Url, response: &Response) -> Option<IpAddr> {
    match Proxies::of_environment().of(url) {
        Ok(None) => response.remote_addr().map(|address| address.ip()),
        Ok(Some(_)) | Err(_) => None,
    }
}

/// A body slower than this many bytes a second is a server that does not answer. The worst links that people use bring more than
/// ten times as much.
const SLOWEST_BODY: u64 = 256;

/// A body as it comes. No more is waited for than a stall between two pieces, and a trickle is a stall.
#[derive(Debug)]
struct Coming {
    response: Response,
    stall: Duration,
    pace: Pace,
}

impl Coming {
    fn new(response: Response, stall: Duration) -> Self {
        Self {
            response,
            stall,
            pace: Pace::new(stall, SLOWEST_BODY),
        }
    }

    /// The next piece of the body; none behind the last. Every body goes through here.
    async fn piece(&mut self) -> Result<Option<Bytes>, Error> {
        let (url, asked) = (self.response.url().clone(), Instant::now());
        let next = tokio::time::timeout(self.stall, self.response.chunk());
        let piece = match noting(|| shown_url(&url), "the server has stopped sending", next).await {
            Ok(Ok(Some(piece))) => piece,
            Ok(Ok(None)) => return Ok(None),
            Ok(Err(error)) => {
                let cause = Innermost(error);
                return Err(Error::unreachable(&url, cause.to_string()).caused_by(cause));
            }
            Err(_) => return Err(Error::unreachable(&url, "the server stopped sending")),
        };
        let len = u64::try_from(piece.len()).unwrap_or(u64::MAX);
        RECEIVED.fetch_add(len, Ordering::Relaxed);
        match self.pace.note(asked.elapsed(), len) {
            None => Ok(Some(piece)),
            Some(slow) => Err(Error::unreachable(&url, slow)),
        }
    }
}

/// Reads a whole body that is not longer than `most` bytes.
///
/// # Errors
/// [`Error`]: it is longer, breaks off, stalls or trickles.
pub(crate) async fn receive(url: &Url, response: Response, most: u64, stall: Duration) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let too_long = || Error::wrong(url, format!("more than {most} bytes"));
    if response.content_length().is_some_and(|len| len > most) {
        return Err(too_long());
    }
    let mut coming = Coming::new(response, stall);
    while let Some(piece) = coming.piece().await? {
        bytes.extend_from_slice(&piece);
        if u64::try_from(bytes.len()).is_ok_and(|len| len > most) {
            return Err(too_long());
        }
    }
    Ok(bytes)
}

/// An answer whose head was judged and whose body comes piece by piece, each with its place in the blob.
#[derive(Debug)]
pub(crate) struct Body {
    coming: Coming,
    at: u64,
    end: u64,
}

impl Body {
    /// The body holds the bytes of a blob from `at` up to `end`.
    pub(crate) fn new(response: Response, at: u64, end: u64, stall: Duration) -> Self {
        Self {
            coming: Coming::new(response, stall),
            at,
            end,
        }
    }

    /// Where the next piece lies.
    pub(crate) const fn at(&self) -> u64 {
        self.at
    }

    /// Where the answer ends.
    pub(crate) const fn end(&self) -> u64 {
        self.end
    }

    /// The next piece and where it lies; `None` behind the last.
    ///
    /// # Errors
    /// [`Error`]: it stalls, trickles, breaks off, or is longer than its head said.
    pub(crate) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, Error> {
        match self.coming.piece().await? {
            Some(bytes) => {
                let at = self.at;
                self.at = self.at.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                if self.at > self.end {
                    return Err(Error::wrong(self.coming.response.url(), "more bytes than it announced"));
                }
                Ok(Some((at, bytes)))
            }
            None if self.at < self.end => Err(Error::unreachable(
                self.coming.response.url(),
                "the answer ended too early",
            )),
            None => Ok(None),
        }
    }
}

/// What reqwest's failure means.
fn classify(url: &Url, error: reqwest::Error) -> Error {
    if let Some(inside) = InsideAddress::behind(&error) {
        return Error::wrong(url, format!("it is {inside}")).lasting().caused_by(inside);
    }
    let cause = Innermost(error);
    let (error, why) = (&cause.0, cause.to_string());
    if error.is_builder() {
        return Error::wrong(url, why).lasting().caused_by(cause);
    }
    // What rustls says of an answer that is no TLS.
    if url.scheme() == "https" && why.contains("InvalidContentType") {
        let why = "cannot connect: the server does not speak TLS there; try http:// (--plain-http for a registry)";
        return Error::not_http(url, why).lasting().caused_by(cause);
    }
    let failure = if error.is_connect() {
        let why = format!("cannot connect: {why}; is the address right, and the server up?");
        Error::unreachable(url, why)
    } else if error.is_timeout() {
        Error::unreachable(url, why.as_str())
    } else {
        Error::not_http(url, why.as_str())
    };
    // What certificates say does not change by trying again.
    let failure = if why.contains("certificate") {
        failure.lasting()
    } else {
        failure
    };
    failure.caused_by(cause)
}

/// reqwest's error by its innermost cause, which says most. Its own message is left out: it holds the URL with its secrets.
struct Innermost(reqwest::Error);

impl fmt::Display for Innermost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match innermost(&self.0) {
            Some(text) => f.write_str(&text),
            None if self.0.is_timeout() => f.write_str("timed out"),
            None => f.write_str("the request failed"),
        }
    }
}

impl fmt::Debug for Innermost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Innermost({self})")
    }
}

impl std::error::Error for Innermost {}
