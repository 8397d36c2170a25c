//! Ranges of a layer over HTTP/1.1. In: a range. Out: its bytes as they arrive, or what went wrong and whether to try again.
//!
//! hyper speaks the protocol, over `io_uring` sockets. Every wait has a deadline. A byte leaves this module only after the
//! response head was checked against the range asked for (`http::judge`), and never more bytes than that.

pub(crate) mod pool;
mod target;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Incoming;
use hyper::header;
use rustls::ClientConfig;
use tokio::time::Instant;
use url::Url;

pub(crate) use self::pool::HostKey;
use self::pool::{Host, HostLimits, Lease};
use self::target::Endpoint;
pub(crate) use self::target::RemoteLayer;
use super::options::PoolOptions;
use super::runtime::{self, Spawner, timeout};
use super::stats::{Counters, PoolGauges, add};
use crate::http::proxy::Proxies;
use crate::http::tls::{self, Trust};
use crate::http::{
    self, Asked, ByteRange, Error, Pace, Reach, Redirects, Timeouts, USER_AGENT, Verdict, judge, noting, shown_url,
};
use crate::units::len_u64;

/// The connections of all devices, by host. Lives on the fetch thread.
pub(crate) struct Connections {
    /// A host's connections are closed with the last client that has used it.
    hosts: RefCell<HashMap<HostKey, Weak<Host>>>,
    tls: Option<Arc<ClientConfig>>,
    proxies: Proxies,
    limits: HostLimits,
    spawner: Spawner,
    gauges: Arc<PoolGauges>,
}

/// How one device talks to servers. Lives on the fetch thread; clones are the same client.
#[derive(Clone)]
pub(crate) struct Client(Rc<Own>);

struct Own {
    connections: Rc<Connections>,
    /// The hosts that it has used.
    hosts: RefCell<HashMap<HostKey, Rc<Host>>>,
    timeouts: Timeouts,
    slowest_body: u64,
    counters: Arc<Counters>,
}

/// The body of a GET: the range that was asked for, by as many requests as the server makes of it, or the whole blob.
pub(crate) struct Reply {
    /// The time from sending the first request to its response head.
    pub(crate) head_took: Duration,
    /// Whether the body is the whole layer and not the range.
    pub(crate) whole: bool,
    url: Url,
    body: Incoming,
    /// The rest of the range, asked for when this body has ended; where the server gives less than it was asked for.
    rest: Option<Rest>,
    left: u64,
    known_len: bool,
    lease: Option<Lease>,
    stall: Duration,
    pace: Pace,
}

/// A range that is still to be asked for, and where.
struct Rest {
    client: Client,
    layer: Rc<RemoteLayer>,
    range: ByteRange,
    demand: bool,
}

impl Connections {
    /// Connections with the pool's `options`, looked after by tasks of `spawner`.
    pub(crate) fn new(options: &PoolOptions, spawner: Spawner, gauges: Arc<PoolGauges>) -> Rc<Self> {
        Rc::new(Self {
            hosts: RefCell::default(),
            tls: options.tls.clone(),
            proxies: Proxies::default(),
            limits: HostLimits {
                connections: options.connections.max(1),
                connect_timeout: options.timeouts.connect,
            },
            spawner,
            gauges,
        })
    }

    /// The connections of `key`, which is of `url` and `trust`.
    fn host(&self, key: HostKey, url: &Url, trust: &Trust) -> Result<Rc<Host>, Error> {
        if let Some(host) = self.hosts.borrow().get(&key).and_then(Weak::upgrade) {
            return Ok(host);
        }
        let tls = match &self.tls {
            _ if !key.tls => None,
            Some(given) if *trust == Trust::default() => Some(given.clone()),
            _ => Some(tls::client_config_for(trust)?),
        };
        let proxy = self.proxies.of(url).map_err(|why| Error::setup("the proxy", why))?;
        let host = Host::new(
            key.clone(),
            tls,
            proxy,
            self.limits,
            self.spawner.clone(),
            self.gauges.clone(),
        );
        let mut hosts = self.hosts.borrow_mut();
        hosts.retain(|_, host| host.strong_count() > 0);
        hosts.insert(key, Rc::downgrade(&host));
        Ok(host)
    }
}

impl Client {
    /// A client with the pool's `options`, whose requests are counted in `counters`. No single wait outlasts `deadline`.
    pub(crate) fn new(
        connections: &Rc<Connections>,
        options: &PoolOptions,
        deadline: Duration,
        counters: Arc<Counters>,
    ) -> Self {
        Self(Rc::new(Own {
            connections: connections.clone(),
            hosts: RefCell::default(),
            timeouts: options.timeouts.at_most(deadline),
            slowest_body: options.slowest_body,
            counters,
        }))
    }

    /// The connections to a URL's host, under the certificates that its endpoint is to be trusted by, that go no further than
    /// `reach`.
    fn host(&self, url: &Url, trust: &Trust, reach: Reach) -> Result<Rc<Host>, Error> {
        let key =
            HostKey::of(url, trust, reach).ok_or_else(|| Error::wrong(url, "an address that is not http").lasting())?;
        if let Some(host) = self.0.hosts.borrow().get(&key) {
            return Ok(host.clone());
        }
        let host = self.0.connections.host(key.clone(), url, trust)?;
        self.0.hosts.borrow_mut().insert(key, host.clone());
        Ok(host)
    }

    /// Opens a few connections ahead of the first read.
    pub(crate) fn warm(&self, layer: &RemoteLayer, count: usize) {
        if let Some((url, trust)) = layer.first_host()
            && let Ok(host) = self.host(&url, &trust, Reach::Anywhere)
        {
            host.warm(count, &self.0.counters);
        }
    }

    /// Sends a GET for `len` bytes from `start` on (`len` is not 0), follows redirects, renews expired addresses and tokens, and
    /// returns when the response head has passed [`http::judge`].
    pub(crate) async fn get(
        &self,
        layer: &Rc<RemoteLayer>,
        start: u64,
        len: u64,
        demand: bool,
    ) -> Result<Reply, Error> {
        let range = ByteRange { start, len };
        let stall = self.0.timeouts.stall;
        let mut kept = layer.target();
        let mut endpoint = layer.endpoint(None).await?;
        // What one server answers to a Range says nothing of the next.
        let begin = |url: &Url| (Redirects::from(url.clone()), true);
        let (mut chain, mut ranged) = begin(&endpoint.url);
        if let Some((target, reach)) = &kept {
            chain = Redirects::resumed(endpoint.url.clone(), target.clone(), *reach);
        }
        let mut renewed = false;
        // Each turn follows one redirect of the chain, or leaves behind what does not work: where a redirect led before, an
        // endpoint, ranges of this chain.
        loop {
            let url = chain.url().clone();
            let asked = Asked {
                range,
                ranged,
                size: layer.size,
                validator: layer.validator.as_ref(),
                encoding: layer.encoding(),
            };
            let sent = Instant::now();
            let (head, body, lease) = match self.exchange(&endpoint, &chain, asked, demand).await {
                Ok(answer) => answer,
                Err(failure) => {
                    layer.forget_target(&url);
                    if url == endpoint.url && failure.kind() != http::Kind::Stale {
                        layer.doubt(&endpoint);
                    }
                    return Err(failure);
                }
            };
            chain.answered(lease.peer, layer.allows_private_redirects());
            let verdict = judge(head.status, &head.headers, asked);
            match verdict {
                Verdict::Part { .. } | Verdict::Whole => {
                    if url != endpoint.url && kept.is_none() {
                        layer.keep_target(url.clone(), chain.reach());
                    }
                    let part = match verdict {
                        Verdict::Part { len } => Some(len),
                        _ => None,
                    };
                    let rest = part.and_then(|part| self.rest(layer, range, part, demand));
                    let (whole, left) = part.map_or((true, layer.size), |len| (false, len));
                    let reply = self.reply(whole, left, url, sent.elapsed(), (body, lease));
                    return Ok(Reply { rest, ..reply });
                }
                Verdict::Redirect => {
                    drain(body, lease, stall);
                    if let Err(error) = chain.next(head.status, &head.headers) {
                        layer.forget_target(&url);
                        return Err(error);
                    }
                }
                Verdict::NoRanges { .. } => {
                    drain(body, lease, stall);
                    ranged = false;
                }
                Verdict::Status { status, after } => {
                    drain(body, lease, stall);
                    let failure = Error::status(&url, status, None, after);
                    if matches!(failure.kind(), http::Kind::Busy(_)) {
                        layer.forget_target(&url);
                        if url == endpoint.url {
                            layer.doubt(&endpoint);
                        }
                        return Err(failure);
                    }
                    if let Some((target, _)) = kept.take() {
                        // The signature in the redirect's URL has run out: ask the original for a new one.
                        layer.forget_target(&target);
                        (chain, ranged) = begin(&endpoint.url);
                        continue;
                    }
                    if layer.can_move() && url == endpoint.url && !renewed {
                        // The token has run out, or a mirror has lost the blob.
                        renewed = true;
                        endpoint = layer.endpoint(Some(&endpoint)).await?;
                        (chain, ranged) = begin(&endpoint.url);
                        continue;
                    }
                    return Err(failure);
                }
                verdict @ (Verdict::Changed(_) | Verdict::SeemsChanged(_)) => {
                    drain(body, lease, stall);
                    if let Some((target, _)) = kept.take() {
                        // Only where the redirect led before has another layer now: the original may lead elsewhere.
                        layer.forget_target(&target);
                        (chain, ranged) = begin(&endpoint.url);
                        continue;
                    }
                    layer.forget_target(&url);
                    return Err(verdict.into_error(&*layer.name()));
                }
                Verdict::Wrong(why) => {
                    layer.forget_target(&url);
                    return Err(Error::wrong(&url, why));
                }
            }
        }
    }

    /// The rest of `range` behind its first `part` bytes; none when that is all of it.
    fn rest(&self, layer: &Rc<RemoteLayer>, range: ByteRange, part: u64, demand: bool) -> Option<Rest> {
        (part < range.len).then(|| Rest {
            client: self.clone(),
            layer: layer.clone(),
            range: ByteRange {
                start: range.start + part,
                len: range.len - part,
            },
            demand,
        })
    }

    /// The answer with this body, which is to hold `left` bytes.
    fn reply(&self, whole: bool, left: u64, url: Url, head_took: Duration, (body, lease): (Incoming, Lease)) -> Reply {
        Reply {
            head_took,
            whole,
            url,
            left,
            known_len: hyper::body::Body::size_hint(&body).exact().is_some(),
            body,
            rest: None,
            lease: Some(lease),
            stall: self.0.timeouts.stall,
            pace: Pace::new(self.0.timeouts.stall, self.0.slowest_body),
        }
    }

    /// One request to where `chain` leads now, with the endpoint's credentials if it is the endpoint's origin.
    async fn exchange(
        &self,
        endpoint: &Endpoint,
        chain: &Redirects,
        asked: Asked<'_>,
        demand: bool,
    ) -> Result<(hyper::http::response::Parts, Incoming, Lease), Error> {
        let url = chain.url();
        let own = url.origin() == endpoint.url.origin();
        let host = if own {
            self.host(url, &endpoint.trust, chain.reach())?
        } else {
            self.host(url, &endpoint.trust.for_redirects(), chain.reach())?
        };
        let lease = host.take(demand, &self.0.counters).await;
        let mut lease =
            lease.map_err(|error| chain.explain(Error::unreachable(url, error.to_string()).caused_by(error)))?;
        let request = Self::request(endpoint, url, own, &host, asked)?;
        let response = self.send(url, &mut lease, request).await?;
        let (head, body) = response.into_parts();
        Ok((head, body, lease))
    }

    /// Sends `request` and waits for the head of its answer.
    async fn send(
        &self,
        url: &Url,
        lease: &mut Lease,
        request: Request<Empty<Bytes>>,
    ) -> Result<hyper::Response<Incoming>, Error> {
        add(&self.0.counters.requests, 1);
        let reused = lease.reused;
        let Some(sender) = lease.sender() else {
            return Err(Error::unreachable(url, "the connection is gone"));
        };
        let within = self.0.timeouts.head;
        let sent = timeout(within, sender.send_request(request));
        match noting(|| shown_url(url), UNANSWERED, sent).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if reused => Err(Error::stale(url, explain(&error)).caused_by(error)),
            Ok(Err(error)) => Err(Error::not_http(url, explain(&error)).caused_by(error)),
            Err(_) => Err(Error::unreachable(url, format!("no answer in {within:?}"))),
        }
    }

    fn request(
        endpoint: &Endpoint,
        url: &Url,
        own: bool,
        host: &Host,
        asked: Asked<'_>,
    ) -> Result<Request<Empty<Bytes>>, Error> {
        let forwarder = host.forwarder();
        // A proxy that forwards has to be told the whole URL.
        let path = match forwarder {
            Some(_) => &url[url::Position::BeforeScheme..url::Position::AfterQuery],
            None => &url[url::Position::BeforePath..url::Position::AfterQuery],
        };
        let authority = &url[url::Position::BeforeHost..url::Position::AfterPort];
        let mut request = Request::get(path)
            .header(header::HOST, authority)
            .header(header::USER_AGENT, USER_AGENT)
            .header(header::ACCEPT_ENCODING, "identity");
        if asked.ranged {
            request = request.header(header::RANGE, asked.range.to_string());
        }
        if let Some(validator) = asked.validator.filter(|_| asked.ranged)
            && validator.is_strong()
        {
            request = request.header(header::IF_RANGE, validator.value());
        }
        if let Some(value) = forwarder.and_then(|proxy| proxy.authorization.as_ref()) {
            request = request.header(header::PROXY_AUTHORIZATION, value);
        }
        for (name, value) in &endpoint.headers {
            // Credentials are for the host they were given for, not for where it sends us; a registry's other headers too.
            let secret = name == header::AUTHORIZATION || name == header::COOKIE || endpoint.is_of_registry();
            if own || !secret {
                request = request.header(name, value);
            }
        }
        let request = request.body(Empty::new());
        request.map_err(|error| Error::wrong(url, error.to_string()).lasting().caused_by(error))
    }
}

/// Why something is waited for, as [`http::waiting`] has it.
const UNANSWERED: &str = "the server has not answered yet";
const STOPPED: &str = "the server has stopped sending";

/// Reads a refusal's body in the background, if it is short, so that its connection can be used again.
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
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.left == 0 {
                self.finish().await?;
                match self.rest.take() {
                    None => return Ok(None),
                    Some(rest) => self.go_on(rest).await?,
                }
            }
            let asked = Instant::now();
            let coming = timeout(self.stall, self.body.frame());
            let frame = match noting(|| shown_url(&self.url), STOPPED, coming).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Err(self.broken(error)),
                Ok(None) => return Err(self.lost(format!("the body ended {} bytes early", self.left))),
                Err(_) => return Err(self.lost(format!("nothing came for {:?}", self.stall))),
            };
            let Ok(data) = frame.into_data() else { continue };
            let len = len_u64(data.remaining());
            if len > self.left {
                let why = format!("a body that is {} bytes too long", len - self.left);
                return Err(Error::wrong(&self.url, why));
            }
            self.left -= len;
            if (self.left > 0 || self.rest.is_some())
                && let Some(slow) = self.pace.note(asked.elapsed(), len)
            {
                return Err(self.lost(slow));
            }
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }

    /// Requests the rest of the range.
    async fn go_on(&mut self, rest: Rest) -> Result<(), Error> {
        let Rest {
            client,
            layer,
            range,
            demand,
        } = rest;
        let next = client.get(&layer, range.start, range.len, demand).await?;
        if next.whole {
            return Err(Error::wrong(
                &next.url,
                "the whole blob in place of the rest of a range",
            ));
        }
        // Whether it is too slow is measured over all parts.
        *self = Self {
            head_took: self.head_took,
            pace: self.pace.clone(),
            ..next
        };
        Ok(())
    }

    fn lost(&self, why: String) -> Error {
        Error::unreachable(&self.url, why)
    }

    fn broken(&self, error: hyper::Error) -> Error {
        self.lost(explain(&error)).caused_by(error)
    }

    /// Reads to the end of the body: checks that no more comes than was asked for, and frees the connection.
    async fn finish(&mut self) -> Result<(), Error> {
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
                        return Err(Error::wrong(&self.url, "a body that is longer than what was asked for"));
                    }
                }
                Ok(Some(Err(error))) => return Err(self.broken(error)),
                Err(_) => return Err(self.lost("the body does not end".to_owned())),
            }
        }
    }
}
