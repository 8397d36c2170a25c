//! Ranges of a layer over HTTP/1.1. In: a range. Out: its bytes as they arrive, or what went wrong and whether to try again.
//!
//! hyper speaks the protocol, over `io_uring` sockets. Every wait has a deadline. A byte leaves this module only after the
//! response head was checked against the range asked for ([`answer`]), and never more bytes than that.

pub(crate) mod answer;
pub(crate) mod pool;
pub(crate) mod stream;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Request, StatusCode};
use rustls::ClientConfig;
use tokio::time::timeout;
use url::Url;

use self::answer::{Asked, Validator, Verdict, judge};
use self::pool::{Host, HostKey, Lease};
use super::stats::{Counters, add};
use super::{FetchOptions, HttpLayer, StartError};

/// Registry → storage → region → object: four hops are seen in the wild; more is a loop.
const MOST_REDIRECTS: usize = 8;
/// How long a redirect's target is used without asking the original again. Signed URLs live at least some minutes.
const REDIRECT_KEPT: Duration = Duration::from_secs(60);
/// We never wait longer than this because a server says so.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Why a request brought nothing, or not all.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The source is away or busy: worth trying until the deadline.
    Away {
        /// For the log and, at the deadline, the error.
        why: String,
        /// What the server asked us to wait.
        after: Option<Duration>,
        /// A kept connection had died: try again at once, on another.
        stale: bool,
    },
    /// The answer was wrong or refused: worth a few more tries, not patience.
    Suspect { why: String, status: Option<StatusCode> },
    /// The layer is another one now.
    Changed(String),
}

impl Failure {
    fn away(why: impl Into<String>) -> Self {
        Self::Away {
            why: why.into(),
            after: None,
            stale: false,
        }
    }

    fn suspect(why: impl Into<String>) -> Self {
        Self::Suspect {
            why: why.into(),
            status: None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away { why, .. } | Self::Suspect { why, .. } | Self::Changed(why) => f.write_str(why),
        }
    }
}

/// A layer on a server.
pub(crate) struct RemoteLayer {
    url: Url,
    headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) size: u64,
    validator: Option<Validator>,
    /// Where the last redirect led, and when.
    target: RefCell<Option<(Instant, Url)>>,
}

impl RemoteLayer {
    pub(crate) fn new(layer: &HttpLayer) -> Result<Self, StartError> {
        let bad = |why: String| StartError::Url {
            url: without_secrets(&layer.url),
            why,
        };
        let url = Url::parse(&layer.url).map_err(|e| bad(e.to_string()))?;
        HostKey::of(&url).ok_or_else(|| bad("only http:// and https:// can be fetched".to_owned()))?;
        let mut headers = Vec::new();
        for (name, value) in &layer.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|e| bad(format!("header {name:?}: {e}")))?;
            let mut value = HeaderValue::from_str(value).map_err(|e| bad(format!("value of header {name}: {e}")))?;
            value.set_sensitive(true);
            headers.push((name, value));
        }
        Ok(Self {
            url,
            headers,
            size: layer.size,
            validator: layer.validator.clone(),
            target: RefCell::default(),
        })
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        without_secrets(self.url.as_str())
    }

    fn current(&self) -> Url {
        match &*self.target.borrow() {
            Some((when, url)) if when.elapsed() < REDIRECT_KEPT => url.clone(),
            _ => self.url.clone(),
        }
    }

    fn forget_target(&self) -> bool {
        self.target.borrow_mut().take().is_some()
    }
}

/// A URL fit for messages and logs: no password, no signed query.
pub(crate) fn without_secrets(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut parsed) => {
            let query = parsed.query().is_some();
            parsed.set_query(None);
            parsed.set_fragment(None);
            // These fail only for URLs that cannot hold them.
            let _cannot_have_one = parsed.set_password(None);
            let _cannot_have_one = parsed.set_username("");
            if query {
                format!("{parsed}?…")
            } else {
                parsed.to_string()
            }
        }
        Err(_) => url.split(['?', '@']).next().unwrap_or_default().to_owned(),
    }
}

/// What of a URL stays the same when passwords and signatures change: the store's name for it. Everything else of the
/// query stays, because it may be what tells one layer from another.
pub(crate) fn stable_name(url: &str) -> String {
    const SIGNATURES: [&str; 17] = [
        "signature",
        "expires",
        "key-pair-id",
        "policy",
        "sig",
        "se",
        "sp",
        "st",
        "sv",
        "sr",
        "spr",
        "skoid",
        "sktid",
        "skt",
        "ske",
        "token",
        "access_token",
    ];
    let Ok(mut parsed) = Url::parse(url) else {
        return url.to_owned();
    };
    let passing = |name: &str| {
        let name = name.to_ascii_lowercase();
        name.starts_with("x-amz-") || name.starts_with("x-goog-") || SIGNATURES.contains(&name.as_str())
    };
    let kept: Vec<(String, String)> = parsed
        .query_pairs()
        .filter(|(name, _)| !passing(name))
        .map(|(a, b)| (a.into(), b.into()))
        .collect();
    parsed.set_query(None);
    if !kept.is_empty() {
        parsed.query_pairs_mut().extend_pairs(kept);
    }
    parsed.set_fragment(None);
    // These fail only for URLs that cannot hold them.
    let _cannot_have_one = parsed.set_password(None);
    let _cannot_have_one = parsed.set_username("");
    parsed.to_string()
}

impl HostKey {
    fn of(url: &Url) -> Option<Self> {
        let tls = match url.scheme() {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        Some(Self {
            tls,
            host: url.host_str()?.to_owned(),
            port: url.port_or_known_default()?,
        })
    }
}

/// All hosts' pools and how to talk to them. Lives on the fetch thread.
pub(crate) struct Client {
    hosts: RefCell<HashMap<HostKey, Rc<Host>>>,
    tls: Option<Arc<ClientConfig>>,
    options: FetchOptions,
    counters: Arc<Counters>,
}

/// What came back from a GET.
pub(crate) struct Reply {
    /// From sending the request to the response head.
    pub(crate) head_took: Duration,
    /// Whether the body is the whole layer and not the range.
    pub(crate) whole: bool,
    body: Incoming,
    left: u64,
    known_len: bool,
    lease: Option<Lease>,
    stall: Duration,
    slowest: u64,
    /// When the body began, and what came of it until now.
    began: Instant,
    came: u64,
}

impl Client {
    pub(crate) fn new(options: &FetchOptions, counters: Arc<Counters>) -> Self {
        Self {
            hosts: RefCell::default(),
            tls: options.tls.clone(),
            options: options.clone(),
            counters,
        }
    }

    fn host(&self, url: &Url) -> Result<Rc<Host>, Failure> {
        let key = HostKey::of(url).ok_or_else(|| Failure::suspect("redirected to something that is not http"))?;
        if key.tls && self.tls.is_none() {
            return Err(Failure::suspect("https is needed and no TLS configuration was given"));
        }
        let tls = if key.tls { self.tls.clone() } else { None };
        let mut hosts = self.hosts.borrow_mut();
        let host = hosts.entry(key.clone()).or_insert_with(|| {
            Host::new(
                key,
                tls,
                self.options.connections,
                self.options.connect_deadline,
                self.counters.clone(),
            )
        });
        Ok(host.clone())
    }

    /// Opens a few connections ahead of the first read.
    pub(crate) fn warm(&self, layer: &RemoteLayer, count: usize) {
        if let Ok(host) = self.host(&layer.url) {
            host.warm(count);
        }
    }

    /// Sends one GET for `len` bytes from `start` on, follows redirects, and comes back with the checked head.
    pub(crate) async fn get(&self, layer: &RemoteLayer, start: u64, len: u64, demand: bool) -> Result<Reply, Failure> {
        let mut url = layer.current();
        let mut redirected = url != layer.url;
        for _ in 0..=MOST_REDIRECTS {
            let asked = Asked {
                start,
                len,
                size: layer.size,
                validator: layer.validator.as_ref(),
            };
            let mut lease = self
                .host(&url)?
                .take(demand)
                .await
                .map_err(|e| Failure::away(e.to_string()))?;
            let request = Self::request(layer, &url, asked)?;
            let sent = Instant::now();
            let response = self.send(layer, &mut lease, request).await?;
            let (head, body) = response.into_parts();
            match judge(&head, asked) {
                verdict @ (Verdict::Partial | Verdict::Whole) => {
                    if redirected && layer.target.borrow().is_none() {
                        *layer.target.borrow_mut() = Some((Instant::now(), url));
                    }
                    let whole = verdict == Verdict::Whole;
                    return Ok(Reply {
                        head_took: sent.elapsed(),
                        whole,
                        left: if whole { layer.size } else { len },
                        known_len: hyper::body::Body::size_hint(&body).exact().is_some(),
                        body,
                        lease: Some(lease),
                        stall: self.options.stall_deadline,
                        slowest: self.options.slowest_body,
                        began: Instant::now(),
                        came: 0,
                    });
                }
                Verdict::Redirect(to) => {
                    let next = url
                        .join(&to)
                        .map_err(|e| Failure::suspect(format!("redirected to {to:?}: {e}")))?;
                    if url.scheme() == "https" && next.scheme() != "https" {
                        return Err(Failure::suspect("redirected from https to plain http"));
                    }
                    drain(body, lease, self.options.stall_deadline);
                    url = next;
                    redirected = true;
                }
                Verdict::Refused(status) => {
                    let refusal = format!("{} answered {status}", without_secrets(url.as_str()));
                    drain(body, lease, self.options.stall_deadline);
                    if layer.forget_target() {
                        // The signature in the redirect's URL has run out: ask the original for a new one.
                        url = layer.url.clone();
                        redirected = false;
                        continue;
                    }
                    return Err(Failure::Suspect {
                        why: refusal,
                        status: Some(status),
                    });
                }
                Verdict::Later { status, after } => {
                    drain(body, lease, self.options.stall_deadline);
                    layer.forget_target();
                    let after = after.map(|wanted| wanted.min(LONGEST_RETRY_AFTER));
                    return Err(Failure::Away {
                        why: format!("{} answered {status}", without_secrets(url.as_str())),
                        after,
                        stale: false,
                    });
                }
                Verdict::Changed(how) => return Err(Failure::Changed(how)),
                Verdict::Wrong(why) => {
                    layer.forget_target();
                    return Err(Failure::suspect(format!("{}: {why}", without_secrets(url.as_str()))));
                }
            }
        }
        layer.forget_target();
        Err(Failure::suspect(format!("more than {MOST_REDIRECTS} redirects")))
    }

    /// Sends `request` and waits for the head of its answer.
    async fn send(
        &self,
        layer: &RemoteLayer,
        lease: &mut Lease,
        request: Request<Empty<Bytes>>,
    ) -> Result<hyper::Response<Incoming>, Failure> {
        add(&self.counters.requests, 1);
        let stale = lease.reused;
        let Some(sender) = lease.sender() else {
            return Err(Failure::away("the connection is gone"));
        };
        match timeout(self.options.head_deadline, sender.send_request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure::Away {
                why: explain(&error),
                after: None,
                stale,
            }),
            Err(_) => {
                // A redirect's target that no longer answers is not asked again.
                layer.forget_target();
                Err(Failure::away(format!("no answer in {:?}", self.options.head_deadline)))
            }
        }
    }

    fn request(layer: &RemoteLayer, url: &Url, asked: Asked<'_>) -> Result<Request<Empty<Bytes>>, Failure> {
        let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
        let host = &url[url::Position::BeforeHost..url::Position::AfterPort];
        let mut request = Request::get(path)
            .header(header::HOST, host)
            .header(header::USER_AGENT, concat!("tarblk/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT_ENCODING, "identity")
            .header(
                header::RANGE,
                format!("bytes={}-{}", asked.start, asked.start + (asked.len - 1)),
            );
        if let Some(validator) = asked.validator
            && validator.is_strong()
        {
            request = request.header(header::IF_RANGE, validator.value());
        }
        let same_host = HostKey::of(url) == HostKey::of(&layer.url);
        for (name, value) in &layer.headers {
            // Credentials are for the host they were given for, not for where it sends us.
            if same_host || !(name == header::AUTHORIZATION || name == header::COOKIE) {
                request = request.header(name, value);
            }
        }
        request.body(Empty::new()).map_err(|e| Failure::suspect(e.to_string()))
    }
}

/// Reads the little that follows a refusal, in the background, so that its connection can be used again.
fn drain(mut body: Incoming, lease: Lease, within: Duration) {
    const WORTH_READING: usize = 64 << 10;
    tokio_uring::spawn(async move {
        let read = timeout(within, async {
            let mut seen = 0;
            while let Some(frame) = body.frame().await {
                seen += frame.ok()?.into_data().map_or(0, |data| data.len());
                if seen > WORTH_READING {
                    return None;
                }
            }
            Some(())
        });
        if let Ok(Some(())) = read.await {
            lease.give_back();
        }
    });
}

/// hyper's errors name the cause only in their source.
fn explain(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

impl Reply {
    /// The next bytes of the body; `None` when all that was asked for has come. A body that ends early, is too long, or
    /// crawls is a failure.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            if self.left == 0 {
                self.finish().await?;
                return Ok(None);
            }
            let frame = match timeout(self.stall, self.body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Err(Failure::away(explain(&error))),
                Ok(None) => return Err(Failure::away(format!("the body ended {} bytes early", self.left))),
                Err(_) => return Err(Failure::away(format!("nothing came for {:?}", self.stall))),
            };
            let Ok(data) = frame.into_data() else { continue };
            let len = super::chunk::to_u64(data.remaining());
            if len > self.left {
                return Err(Failure::suspect(format!(
                    "the body is {} bytes too long",
                    len - self.left
                )));
            }
            self.left -= len;
            self.came += len;
            let took = self.began.elapsed();
            if took > self.stall && self.left > 0 && self.came < self.slowest.saturating_mul(took.as_secs()) {
                return Err(Failure::away(format!("only {} bytes came in {took:.0?}", self.came)));
            }
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }

    /// Sees the body's end, so that nothing follows what was asked for and the connection is free again.
    async fn finish(&mut self) -> Result<(), Failure> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        if self.known_len {
            // hyper ends such a body itself, exactly there.
            lease.give_back();
            return Ok(());
        }
        loop {
            match timeout(self.stall, self.body.frame()).await {
                Ok(None) => {
                    lease.give_back();
                    return Ok(());
                }
                Ok(Some(Ok(frame))) => {
                    if frame.into_data().is_ok_and(|data| !data.is_empty()) {
                        return Err(Failure::suspect("the body is longer than what was asked for"));
                    }
                }
                Ok(Some(Err(error))) => return Err(Failure::away(explain(&error))),
                Err(_) => return Err(Failure::away("the body does not end")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_no_secrets() {
        assert_eq!(
            without_secrets("https://me:word@host/a/b?X-Amz-Signature=1#f"),
            "https://host/a/b?…"
        );
        assert_eq!(without_secrets("http://host:81/a"), "http://host:81/a");
        assert!(!without_secrets("http://[broken/?secret=1").contains("secret"));
    }

    #[test]
    fn a_name_survives_a_new_signature_and_nothing_else() {
        let name = stable_name("https://u:p@host/layer?blob=7&X-Amz-Signature=1&X-Amz-Date=2");
        assert_eq!(name, stable_name("https://host/layer?blob=7&X-Amz-Signature=3"));
        assert_ne!(name, stable_name("https://host/layer?blob=8&X-Amz-Signature=1"));
        assert_ne!(name, stable_name("https://host/layer2?blob=7"));
        assert!(!name.contains(':') || !name.contains("u:p"));
    }
}
