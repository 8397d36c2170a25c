//! Ranges of a layer over HTTP/1.1. In: a range. Out: its bytes as they arrive, or what went wrong and whether to try again.
//!
//! hyper speaks the protocol, over `io_uring` sockets. Every wait has a deadline. A byte leaves this module only after the
//! response head was checked against the range asked for ([`answer`]), and never more bytes than that.

pub(crate) mod answer;
pub(crate) mod pool;
mod proxy;
mod target;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header;
use hyper::{Request, StatusCode};
use rustls::ClientConfig;
use url::Url;

use self::answer::{Asked, Verdict, judge};
use self::pool::{Host, HostKey, Lease};
use self::proxy::Proxies;
use self::target::Spot;
pub(crate) use self::target::{RemoteLayer, stable_name, without_secrets};
use super::FetchOptions;
use super::runtime::{self, timeout};
use super::stats::{Counters, add};
use crate::source::tls::{self, Trust};

/// Registry → storage → region → object: four hops are seen in the wild; more is a loop.
const MOST_REDIRECTS: usize = 8;
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

/// All hosts' pools and how to talk to them. Lives on the fetch thread.
pub(crate) struct Client {
    hosts: RefCell<HashMap<HostKey, Rc<Host>>>,
    tls: Option<Arc<ClientConfig>>,
    proxies: Proxies,
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
            proxies: Proxies::default(),
            options: options.clone(),
            counters,
        }
    }

    /// The pool for a URL's host, as it is believed to be that host.
    fn host(&self, url: &Url, trust: &Trust) -> Result<Rc<Host>, Failure> {
        let key =
            HostKey::of(url, trust).ok_or_else(|| Failure::suspect("redirected to something that is not http"))?;
        if let Some(host) = self.hosts.borrow().get(&key) {
            return Ok(host.clone());
        }
        let tls = match &self.tls {
            _ if !key.tls => None,
            Some(given) if *trust == Trust::default() => Some(given.clone()),
            _ => Some(tls::client_config_for(trust).map_err(|error| Failure::suspect(error.to_string()))?),
        };
        let proxy = self.proxies.of(url).map_err(Failure::suspect)?;
        let host = Host::new(
            key.clone(),
            tls,
            proxy,
            self.options.connections,
            self.options.connect_deadline,
            self.counters.clone(),
        );
        self.hosts.borrow_mut().insert(key, host.clone());
        Ok(host)
    }

    /// Opens a few connections ahead of the first read.
    pub(crate) fn warm(&self, layer: &RemoteLayer, count: usize) {
        if let Some((url, trust)) = layer.first_host()
            && let Ok(host) = self.host(&url, &trust)
        {
            host.warm(count);
        }
    }

    /// Sends one GET for `len` bytes from `start` on, follows redirects, asks again for what has expired, and comes back with
    /// the checked head.
    pub(crate) async fn get(&self, layer: &RemoteLayer, start: u64, len: u64, demand: bool) -> Result<Reply, Failure> {
        let mut kept = layer.target();
        let mut spot = layer.spot(None).await?;
        let mut url = kept.clone().unwrap_or_else(|| spot.url.clone());
        let mut renewed = false;
        for _ in 0..=MOST_REDIRECTS {
            let asked = Asked {
                start,
                len,
                size: layer.size,
                validator: layer.validator.as_ref(),
            };
            let sent = Instant::now();
            let (head, body, lease) = match self.exchange(&spot, &url, asked, demand).await {
                Ok(answer) => answer,
                Err(failure) => {
                    layer.forget_target(&url);
                    if url == spot.url && !matches!(failure, Failure::Away { stale: true, .. }) {
                        layer.doubt(&spot);
                    }
                    return Err(failure);
                }
            };
            match judge(&head, asked) {
                verdict @ (Verdict::Partial | Verdict::Whole) => {
                    if url != spot.url && kept.is_none() {
                        layer.keep_target(url);
                    }
                    let whole = verdict == Verdict::Whole;
                    let left = if whole { layer.size } else { len };
                    return Ok(self.reply(whole, left, sent.elapsed(), body, lease));
                }
                Verdict::Redirect(to) => {
                    let next = url
                        .join(&to)
                        .map_err(|e| Failure::suspect(format!("redirected to {:?}: {e}", without_secrets(&to))))?;
                    if url.scheme() == "https" && next.scheme() != "https" {
                        return Err(Failure::suspect("redirected from https to plain http"));
                    }
                    drain(body, lease, self.options.stall_deadline);
                    url = next;
                }
                Verdict::Refused(status) => {
                    let refusal = format!("{} answered {status}", without_secrets(url.as_str()));
                    drain(body, lease, self.options.stall_deadline);
                    if let Some(target) = kept.take() {
                        // The signature in the redirect's URL has run out: ask the original for a new one.
                        layer.forget_target(&target);
                        url = spot.url.clone();
                        continue;
                    }
                    if layer.can_move() && url == spot.url && !renewed {
                        // The token has run out, or a mirror has lost the blob.
                        renewed = true;
                        spot = layer.spot(Some(&spot)).await?;
                        url = spot.url.clone();
                        continue;
                    }
                    return Err(Failure::Suspect {
                        why: refusal,
                        status: Some(status),
                    });
                }
                Verdict::Later { status, after } => {
                    drain(body, lease, self.options.stall_deadline);
                    layer.forget_target(&url);
                    if url == spot.url {
                        layer.doubt(&spot);
                    }
                    let after = after.map(|wanted| wanted.min(LONGEST_RETRY_AFTER));
                    return Err(Failure::Away {
                        why: format!("{} answered {status}", without_secrets(url.as_str())),
                        after,
                        stale: false,
                    });
                }
                Verdict::Changed(how) => {
                    drain(body, lease, self.options.stall_deadline);
                    if let Some(target) = kept.take() {
                        // Only where the redirect led before has another layer now: the original may lead elsewhere.
                        layer.forget_target(&target);
                        url = spot.url.clone();
                        continue;
                    }
                    layer.forget_target(&url);
                    return Err(Failure::Changed(how));
                }
                Verdict::Wrong(why) => {
                    layer.forget_target(&url);
                    return Err(Failure::suspect(format!("{}: {why}", without_secrets(url.as_str()))));
                }
            }
        }
        layer.forget_target(&url);
        Err(Failure::suspect(format!("more than {MOST_REDIRECTS} redirects")))
    }

    /// An answer whose body is to hold `left` bytes.
    fn reply(&self, whole: bool, left: u64, head_took: Duration, body: Incoming, lease: Lease) -> Reply {
        Reply {
            head_took,
            whole,
            left,
            known_len: hyper::body::Body::size_hint(&body).exact().is_some(),
            body,
            lease: Some(lease),
            stall: self.options.stall_deadline,
            slowest: self.options.slowest_body,
            began: Instant::now(),
            came: 0,
        }
    }

    /// One request to `url`, with the spot's credentials if it is the spot's origin.
    async fn exchange(
        &self,
        spot: &Spot,
        url: &Url,
        asked: Asked<'_>,
        demand: bool,
    ) -> Result<(hyper::http::response::Parts, Incoming, Lease), Failure> {
        let own = url.origin() == spot.url.origin();
        let host = if own {
            self.host(url, &spot.trust)?
        } else {
            self.host(url, &spot.trust.elsewhere())?
        };
        let mut lease = host.take(demand).await.map_err(|e| Failure::away(e.to_string()))?;
        let request = Self::request(spot, url, own, &host, asked)?;
        let response = self.send(&mut lease, request).await?;
        let (head, body) = response.into_parts();
        Ok((head, body, lease))
    }

    /// Sends `request` and waits for the head of its answer.
    async fn send(
        &self,
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
            Err(_) => Err(Failure::away(format!("no answer in {:?}", self.options.head_deadline))),
        }
    }

    fn request(
        spot: &Spot,
        url: &Url,
        own: bool,
        host: &Host,
        asked: Asked<'_>,
    ) -> Result<Request<Empty<Bytes>>, Failure> {
        let forwarder = host.forwarder();
        // A proxy that forwards has to be told the whole URL.
        let path = match forwarder {
            Some(_) => &url[url::Position::BeforeScheme..url::Position::AfterQuery],
            None => &url[url::Position::BeforePath..url::Position::AfterQuery],
        };
        let authority = &url[url::Position::BeforeHost..url::Position::AfterPort];
        let mut request = Request::get(path)
            .header(header::HOST, authority)
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
        if let Some(value) = forwarder.and_then(|proxy| proxy.authorization.as_ref()) {
            request = request.header(header::PROXY_AUTHORIZATION, value);
        }
        for (name, value) in &spot.headers {
            // Credentials are for the host they were given for, not for where it sends us; a registry's other headers too.
            let secret = name == header::AUTHORIZATION || name == header::COOKIE || spot.is_of_registry();
            if own || !secret {
                request = request.header(name, value);
            }
        }
        request.body(Empty::new()).map_err(|e| Failure::suspect(e.to_string()))
    }
}

/// Reads the little that follows a refusal, in the background, so that its connection can be used again.
fn drain(mut body: Incoming, lease: Lease, within: Duration) {
    const WORTH_READING: usize = 64 << 10;
    runtime::spawn(async move {
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
            let len = crate::units::len_u64(data.remaining());
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
