//! How a pool and its fetchers behave.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

use crate::cache::disk::DiskCache;
use crate::http::Timeouts;

/// What all fetchers of a pool share.
#[derive(Clone)]
pub struct PoolOptions {
    /// The memory cache's bound in bytes, whatever the number of fetchers. Chunks that a [`Slice`](crate::cache::Slice) holds come on
    /// top.
    pub memory_bytes: u64,
    /// Connections per host at most.
    pub connections: usize,
    /// Deadlines of one request.
    pub timeouts: Timeouts,
    /// A body slower than this many bytes a second is given up and asked for again on another connection.
    pub slowest_body: u64,
    /// Where chunks stay when the process goes; none keeps them in memory only.
    pub store: Option<Arc<DiskCache>>,
    /// How https servers are verified; none: as [`default_tls`](super::default_tls) says, from the first one on.
    pub tls: Option<Arc<ClientConfig>>,
}

/// Connections to all servers together at most, unless something else is said.
pub const USUAL_CONNECTIONS: u16 = 16;

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            connections: usize::from(USUAL_CONNECTIONS),
            timeouts: Timeouts {
                connect: Duration::from_secs(10),
                head: Duration::from_secs(15),
                stall: Duration::from_secs(10),
            },
            slowest_body: 4 << 10,
            store: None,
            tls: None,
        }
    }
}

impl fmt::Debug for PoolOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolOptions")
            .field("memory_bytes", &self.memory_bytes)
            .field("connections", &self.connections)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

/// How one fetcher of a pool behaves.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// After this a read fails. Until then everything is tried again. A layer that is read from end to end, because nothing else can be
    /// done, gives its readers so long from when something of it last came.
    pub deadline: Duration,
    /// How long bytes that have a digest must keep coming wrong, asked for anew each time, until the layer is taken to be wrong.
    pub wrong_for: Duration,
    /// Whether anything is fetched before it is asked for.
    pub prefetch: bool,
    /// Whether whole layers are fetched into the disk cache, while no one reads.
    pub fetch_all: bool,
    /// Whether chunks go to the pool's disk cache, where it has one.
    pub cached: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(300),
            wrong_for: Duration::from_secs(30),
            prefetch: true,
            fetch_all: false,
            cached: true,
        }
    }
}

/// How a fetcher behaves that has a pool of its own: all of [`PoolOptions`] and [`OpenOptions`].
#[derive(Clone)]
pub struct FetchOptions {
    /// The memory cache's bound in bytes. Chunks that a [`Slice`](crate::cache::Slice) holds come on top.
    pub memory_bytes: u64,
    /// Connections per host at most.
    pub connections: usize,
    /// Deadlines of one request; none is longer than [`deadline`](Self::deadline).
    pub timeouts: Timeouts,
    /// A body slower than this many bytes a second is given up and asked for again on another connection.
    pub slowest_body: u64,
    /// After this a read fails. Until then everything is tried again.
    pub deadline: Duration,
    /// How long bytes that have a digest must keep coming wrong, asked for anew each time, until the layer is taken to be wrong.
    pub wrong_for: Duration,
    /// Whether anything is fetched before it is asked for.
    pub prefetch: bool,
    /// Whether whole layers are fetched into the disk cache, while no one reads.
    pub fetch_all: bool,
    /// Where chunks stay when the process goes; none keeps them in memory only.
    pub store: Option<Arc<DiskCache>>,
    /// How https servers are verified; none: as [`default_tls`](super::default_tls) says, from the first one on.
    pub tls: Option<Arc<ClientConfig>>,
}

impl FetchOptions {
    /// What of it is the pool's, and what the fetcher's.
    pub(super) fn split(self) -> (PoolOptions, OpenOptions) {
        let pool = PoolOptions {
            memory_bytes: self.memory_bytes,
            connections: self.connections,
            // No single wait may outlast the whole.
            timeouts: self.timeouts.at_most(self.deadline),
            slowest_body: self.slowest_body,
            store: self.store,
            tls: self.tls,
        };
        let open = OpenOptions {
            deadline: self.deadline,
            wrong_for: self.wrong_for,
            prefetch: self.prefetch,
            fetch_all: self.fetch_all,
            cached: true,
        };
        (pool, open)
    }
}

impl Default for FetchOptions {
    fn default() -> Self {
        let (pool, open) = (PoolOptions::default(), OpenOptions::default());
        Self {
            memory_bytes: pool.memory_bytes,
            connections: pool.connections,
            timeouts: pool.timeouts,
            slowest_body: pool.slowest_body,
            deadline: open.deadline,
            wrong_for: open.wrong_for,
            prefetch: open.prefetch,
            fetch_all: open.fetch_all,
            store: pool.store,
            tls: pool.tls,
        }
    }
}

impl fmt::Debug for FetchOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchOptions")
            .field("memory_bytes", &self.memory_bytes)
            .field("connections", &self.connections)
            .field("deadline", &self.deadline)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}
