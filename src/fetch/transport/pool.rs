//! The connections to one host, of all devices. In: a request that waits to be sent. Out: a connection that carries no other.
//!
//! HTTP/1.1 carries one answer at a time, so parallel requests need parallel connections; they are kept alive, and when
//! the last idle one is taken the next is opened in the background, so that a miss seldom waits for a handshake.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::oneshot;
use tokio::time::Instant;
use url::Url;

use crate::fetch::runtime::{self, Spawner, TcpStream, timeout};
use crate::fetch::stats::{Counters, PoolGauges, add, take};
use crate::http::proxy::Proxy;
use crate::http::tls::Trust;
use crate::http::{Reach, WaitOwner, noting};

/// How long a host's addresses are used before they are looked up again. Short enough for a moved service, long enough to be off
/// the hot path.
const ADDRESSES_KEPT: Duration = Duration::from_secs(60);
/// How long a connection may take to be ready again after the last byte of an answer was read.
const SETTLES: Duration = Duration::from_millis(100);
/// The largest response head that is read, in bytes. Some registries redirect to URLs of several KiB.
const LARGEST_HEAD: usize = 64 << 10;

/// Host, port, TLS and proxy of a pool's connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostKey {
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Connections made under one trust never carry requests under another.
    trust: Trust,
    /// Nor are those that may be made to any address lent to whom strangers lead here.
    reach: Reach,
}

impl HostKey {
    pub(crate) fn of(url: &Url, trust: &Trust, reach: Reach) -> Option<Self> {
        let tls = match url.scheme() {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        Some(Self {
            tls,
            host: url.host_str()?.to_owned(),
            port: url.port_or_known_default()?,
            trust: trust.clone(),
            reach,
        })
    }
}

/// What holds for the connections to each host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostLimits {
    /// How many at most.
    pub(crate) connections: usize,
    /// For the name to resolve, and for each address to accept, TLS included.
    pub(crate) connect_timeout: Duration,
}

/// One host's pool. Lives on the fetch thread.
pub(crate) struct Host {
    key: HostKey,
    tls: Option<Arc<ClientConfig>>,
    proxy: Option<Proxy>,
    limits: HostLimits,
    /// For what outlives the device that asked for it.
    spawner: Spawner,
    gauges: Arc<PoolGauges>,
    idle: RefCell<Vec<Open>>,
    /// Connections idle, lent or being opened.
    count: Cell<usize>,
    opening: Cell<usize>,
    waiting_demand: RefCell<VecDeque<Waiting>>,
    waiting_prefetch: RefCell<VecDeque<Waiting>>,
    /// Who waits for a connection to be opened: all those whose requests wait for one.
    waits_for_opening: WaitOwner,
    addresses: RefCell<Option<(Instant, Vec<SocketAddr>)>>,
}

type Waiting = oneshot::Sender<Result<Free, Arc<io::Error>>>;

/// An open connection.
struct Open {
    sender: SendRequest<Empty<Bytes>>,
    /// The address that it was made to; none if that is a proxy's.
    peer: Option<IpAddr>,
}

/// An idle connection.
struct Free {
    open: Open,
    /// Whether it carried a request before.
    used: bool,
}

/// A connection taken from the pool. Dropping it closes it, unless it was given back.
pub(crate) struct Lease {
    sender: Option<SendRequest<Empty<Bytes>>>,
    /// The address that the connection was made to; none if that is a proxy's.
    pub(crate) peer: Option<IpAddr>,
    host: Rc<Host>,
    /// Of the device that has it.
    counters: Arc<Counters>,
    /// Whether it carried a request before: then it may have died unseen, and a failure says nothing about the server.
    pub(crate) reused: bool,
}

impl Lease {
    pub(crate) fn sender(&mut self) -> Option<&mut SendRequest<Empty<Bytes>>> {
        self.sender.as_mut()
    }

    /// Puts the connection back for the next request. Only after the whole answer was read.
    pub(crate) fn give_back(mut self) {
        if let Some(sender) = self.sender.take() {
            if sender.is_closed() {
                self.host.closed();
                // A waiting request would have taken it.
                self.host.open_for_waiters(&self.counters);
            } else {
                let open = Open {
                    sender,
                    peer: self.peer,
                };
                self.host.offer(Free { open, used: true });
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.sender.take().is_some() {
            self.host.closed();
            self.host.open_for_waiters(&self.counters);
        }
    }
}

/// A place in the queue of waiting requests. A connection that arrives after it was dropped goes to the next.
struct Ticket<'a> {
    take: oneshot::Receiver<Result<Free, Arc<io::Error>>>,
    host: &'a Host,
    /// Whoever made the request.
    owner: WaitOwner,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.host.waits_for_opening.leave(&self.owner);
        self.take.close();
        if let Ok(Ok(free)) = self.take.try_recv() {
            self.host.offer(free);
        }
    }
}

impl Drop for Host {
    /// Closes what is idle; none is on loan any more.
    fn drop(&mut self) {
        take(&self.gauges.connections, crate::units::len_u64(self.count.get()));
    }
}

impl Host {
    pub(crate) fn new(
        key: HostKey,
        tls: Option<Arc<ClientConfig>>,
        proxy: Option<Proxy>,
        limits: HostLimits,
        spawner: Spawner,
        gauges: Arc<PoolGauges>,
    ) -> Rc<Self> {
        Rc::new(Self {
            key,
            tls,
            proxy,
            limits,
            spawner,
            gauges,
            idle: RefCell::default(),
            count: Cell::new(0),
            opening: Cell::new(0),
            waiting_demand: RefCell::default(),
            waiting_prefetch: RefCell::default(),
            waits_for_opening: WaitOwner::default(),
            addresses: RefCell::default(),
        })
    }

    /// Opens connections in the background until `count` exist.
    pub(crate) fn warm(self: &Rc<Self>, count: usize, counters: &Arc<Counters>) {
        while self.count.get() < count.min(self.limits.connections) {
            self.open(counters);
        }
    }

    /// A connection is no more.
    fn closed(&self) {
        self.count.set(self.count.get().saturating_sub(1));
        take(&self.gauges.connections, 1);
    }

    /// Waits for a connection. Demand goes before prefetch. What is opened for it is counted in `counters`.
    pub(crate) async fn take(self: &Rc<Self>, demand: bool, counters: &Arc<Counters>) -> Result<Lease, Arc<io::Error>> {
        while let Some(Open { mut sender, peer }) = self.pop_idle() {
            // One that has just been given back needs a turn of its task to see its answer's end.
            if sender.is_ready() || matches!(timeout(SETTLES, sender.ready()).await, Ok(Ok(()))) {
                if self.idle.borrow().is_empty()
                    && self.opening.get() == 0
                    && self.count.get() < self.limits.connections
                {
                    self.open(counters);
                }
                return Ok(Lease {
                    sender: Some(sender),
                    peer,
                    host: self.clone(),
                    counters: counters.clone(),
                    reused: true,
                });
            }
            self.closed();
        }
        let (give, take) = oneshot::channel();
        if demand {
            self.waiting_demand.borrow_mut().push_back(give);
        } else {
            self.waiting_prefetch.borrow_mut().push_back(give);
        }
        let owner = WaitOwner::current();
        self.waits_for_opening.join(&owner);
        let mut ticket = Ticket {
            take,
            host: self,
            owner,
        };
        self.open_for_waiters(counters);
        match (&mut ticket.take).await {
            Ok(Ok(Free { open, used })) => Ok(Lease {
                sender: Some(open.sender),
                peer: open.peer,
                host: self.clone(),
                counters: counters.clone(),
                reused: used,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Arc::new(io::Error::other("the connection pool is gone"))),
        }
    }

    fn pop_idle(&self) -> Option<Open> {
        self.idle.borrow_mut().pop()
    }

    fn next_waiter(&self) -> Option<Waiting> {
        loop {
            let next = self
                .waiting_demand
                .borrow_mut()
                .pop_front()
                .or_else(|| self.waiting_prefetch.borrow_mut().pop_front())?;
            if !next.is_closed() {
                return Some(next);
            }
        }
    }

    /// Hands an idle connection to the request that waits longest, or keeps it.
    fn offer(&self, mut free: Free) {
        while let Some(waiter) = self.next_waiter() {
            match waiter.send(Ok(free)) {
                Err(Ok(back)) => free = back,
                Ok(()) | Err(Err(_)) => return,
            }
        }
        self.idle.borrow_mut().push(free.open);
    }

    fn open_for_waiters(self: &Rc<Self>, counters: &Arc<Counters>) {
        let waiting = self.waiting_demand.borrow().len() + self.waiting_prefetch.borrow().len();
        while self.opening.get() < waiting && self.count.get() < self.limits.connections {
            self.open(counters);
        }
    }

    fn open(self: &Rc<Self>, counters: &Arc<Counters>) {
        self.count.set(self.count.get() + 1);
        add(&self.gauges.connections, 1);
        self.opening.set(self.opening.get() + 1);
        let (host, counters) = (self.clone(), counters.clone());
        let owner = self.waits_for_opening.clone();
        self.spawner.spawn(owner.scope(async move {
            let opened = host.connect().await;
            host.opening.set(host.opening.get() - 1);
            match opened {
                Ok(open) => {
                    add(&counters.connections, 1);
                    host.offer(Free { open, used: false });
                }
                Err(error) => {
                    host.closed();
                    let error = Arc::new(error);
                    // One failure is one waiter's: the others have their own attempts under way, or get them now.
                    if let Some(waiter) = host.next_waiter() {
                        let _waiter_gone = waiter.send(Err(error));
                    }
                    host.open_for_waiters(&counters);
                }
            }
        }));
    }

    async fn connect(&self) -> io::Result<Open> {
        let addresses = self.resolve().await?;
        let mut last = io::Error::other("the name has no address");
        for address in &addresses {
            let connecting = Box::pin(timeout(self.limits.connect_timeout, self.connect_to(*address)));
            match noting(|| self.place(), "no connection yet", connecting).await {
                Ok(Ok(sender)) => {
                    let peer = self.proxy.is_none().then(|| address.ip());
                    return Ok(Open { sender, peer });
                }
                Ok(Err(error)) => last = io::Error::new(error.kind(), format!("{address}: {error}")),
                Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no connection in time")),
            }
        }
        // Addresses that did not work are looked up again.
        self.addresses.borrow_mut().take();
        Err(last)
    }

    /// For messages.
    fn place(&self) -> String {
        format!("{}:{}", self.key.host, self.key.port)
    }

    /// The proxy that requests are sent to as they are, if it is one that forwards: for plain HTTP.
    pub(crate) fn forwarder(&self) -> Option<&Proxy> {
        self.proxy.as_ref().filter(|_| !self.key.tls)
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<SendRequest<Empty<Bytes>>> {
        let stream = TcpStream::connect(address).await?;
        match &self.proxy {
            None => self.secured(stream).await,
            Some(proxy) if proxy.tls => self.through(proxy, proxy.secured(stream).await?).await,
            Some(proxy) => self.through(proxy, stream).await,
        }
    }

    /// Opens a tunnel (CONNECT, SOCKS) through the proxy that `stream` leads to.
    async fn through<S>(&self, proxy: &Proxy, mut stream: S) -> io::Result<SendRequest<Empty<Bytes>>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
    {
        if self.key.tls {
            proxy.tunnel(&mut stream, &self.key.host, self.key.port).await?;
        }
        self.secured(stream).await
    }

    /// The TLS handshake, for `https`, and the HTTP one.
    async fn secured<S>(&self, stream: S) -> io::Result<SendRequest<Empty<Bytes>>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
    {
        let Some(config) = &self.tls else {
            return Self::handshake(stream).await;
        };
        let name = ServerName::try_from(self.key.host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?;
        let stream = tokio_rustls::TlsConnector::from(config.clone())
            .connect(name, stream)
            .await?;
        Self::handshake(stream).await
    }

    async fn handshake<S>(stream: S) -> io::Result<SendRequest<Empty<Bytes>>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(512 << 10)
            .max_header_size(LARGEST_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        runtime::spawn(async move {
            // A request that waits for an answer on it is told of the failure; an idle one just goes.
            if let Err(error) = connection.await {
                log::debug!("connection ended: {error}");
            }
        });
        Ok(sender)
    }

    /// What of the addresses found may be connected to. Of a host behind a proxy they are the proxy's, which the person named.
    fn within_reach(&self, found: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
        if self.proxy.is_some() {
            return Ok(found);
        }
        self.key.reach.filter(found.into_iter()).map_err(io::Error::other)
    }

    async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        if let Some((when, addresses)) = &*self.addresses.borrow()
            && when.elapsed() < ADDRESSES_KEPT
        {
            return Ok(addresses.clone());
        }
        let (host, port) = match &self.proxy {
            Some(proxy) => (proxy.host.as_str(), proxy.port),
            None => (self.key.host.as_str(), self.key.port),
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let looking = runtime::blocking(move || (host.as_str(), port).to_socket_addrs().map(Vec::from_iter));
        let looking = timeout(self.limits.connect_timeout, looking);
        let addresses = match noting(|| self.place(), "its name has no address yet", looking).await {
            Ok(Ok(found)) => self.within_reach(found?)?,
            Ok(Err(error)) => return Err(io::Error::other(error)),
            Err(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the name was not resolved in time",
                ));
            }
        };
        *self.addresses.borrow_mut() = Some((Instant::now(), addresses.clone()));
        Ok(addresses)
    }
}
