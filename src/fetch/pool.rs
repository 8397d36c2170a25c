//! One fetch thread for all devices of a process. In: layers, device by device. Out: a [`Fetcher`] for each, whose engine runs on
//! the one thread and shares connections, workers, memory and the estimate of the link with the others.
//!
//! Invariant: what goes wrong with one fetcher (its server, its layers, a panic of one of its tasks) ends no other.

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::content::Contents;
use super::engine::{self, Device, PoolState};
use super::options::{FetchOptions, OpenOptions, PoolOptions};
use super::runtime::{self, TaskSet};
use super::stats::{PoolGauges, PoolStats};
use super::{Fetcher, LayerSource, StartError, descriptors};
use crate::cache::disk::DiskCache;
use crate::cache::memory::MemoryCache;
use crate::image::FileMap;

/// A handle on the fetch thread. Cheap to clone; the thread ends when the last handle and the last [`Fetcher`] are gone.
#[derive(Clone, Debug)]
pub struct FetchPool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    options: PoolOptions,
    contents: Contents,
    gauges: Arc<PoolGauges>,
    /// The thread runs as long as this lives, and as the devices that came by it.
    opened: UnboundedSender<Device>,
}

/// A handle that keeps nothing.
#[derive(Clone, Debug)]
pub(super) struct WeakPool(Weak<Pool>);

impl WeakPool {
    pub(super) fn upgrade(&self) -> Option<FetchPool> {
        self.0.upgrade().map(FetchPool)
    }
}

impl FetchPool {
    pub(super) fn downgrade(&self) -> WeakPool {
        WeakPool(Arc::downgrade(&self.0))
    }

    pub(super) fn contents(&self) -> &Contents {
        &self.0.contents
    }

    /// Where chunks are kept, if anywhere.
    pub(super) fn store(&self) -> Option<&Arc<DiskCache>> {
        self.0.options.store.as_ref()
    }

    /// Starts the fetch thread.
    ///
    /// # Errors
    /// When the thread or its ring cannot be made.
    pub fn start(options: PoolOptions) -> Result<Self, StartError> {
        let contents = Contents::new(Arc::new(MemoryCache::new(options.memory_bytes)));
        let gauges = Arc::new(PoolGauges::default());
        let (opened, devices) = unbounded_channel();
        let (own_options, own_gauges) = (options.clone(), gauges.clone());
        runtime::start("tarblk-fetch", move || run(own_options, own_gauges, devices))?;
        Ok(Self(Arc::new(Pool {
            options,
            contents,
            gauges,
            opened,
        })))
    }

    /// A fetcher for `layers`, numbered in this order. `files` lets read-ahead know which files lie where; without it only
    /// sequential reads are seen coming.
    ///
    /// # Errors
    /// When a layer cannot be fetched by its description, or the thread is gone. Servers are not asked.
    pub fn open(
        &self,
        layers: Vec<LayerSource>,
        options: OpenOptions,
        files: Option<Arc<dyn FileMap>>,
    ) -> Result<Fetcher, StartError> {
        let pool = &*self.0;
        let is_remote = layers.iter().any(|source| source.layer.blob.is_remote());
        descriptors::check(layers.len(), if is_remote { pool.options.connections } else { 0 })?;
        let store = pool.options.store.as_ref().filter(|_| options.cached);
        let (device, shared, commands) = engine::prepare(layers, options, files, &pool.contents, store)?;
        let gone = |_| StartError::Thread(io::Error::other("the fetch thread is gone"));
        pool.opened.send(device).map_err(gone)?;
        Ok(Fetcher {
            shared,
            commands,
            pool: self.clone(),
        })
    }

    /// Whether there is another handle than this one: a fetcher's, or of whoever is about to open one.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// What the pool holds now.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            bytes_memory: self.0.contents.bytes_in_memory(),
            ..self.0.gauges.snapshot()
        }
    }
}

/// The thread's main task: runs each device's engine, until no device can come any more and the last one has ended.
async fn run(options: PoolOptions, gauges: Arc<PoolGauges>, mut opened: UnboundedReceiver<Device>) {
    let tasks = TaskSet::new();
    let state = Rc::new(PoolState::new(&options, gauges, tasks.spawner()));
    let mut devices = JoinSet::new();
    let main = async {
        loop {
            tokio::select! {
                biased;
                device = opened.recv() => match device {
                    Some(device) => drop(devices.spawn_local(engine::run(device, state.clone()))),
                    None => break,
                },
                Some(ended) = devices.join_next() => report(ended),
            }
        }
        while let Some(ended) = devices.join_next().await {
            report(ended);
        }
    };
    tasks.run_until(main).await;
}

/// Says it if an engine did not end well. Its readers were told when it ended.
fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        log::error!("a device's fetcher has ended, and its reads fail: {error}");
    }
}

impl Fetcher {
    /// Starts a pool for one fetcher; see [`FetchPool::open`].
    ///
    /// # Errors
    /// As [`FetchPool::start`] and [`FetchPool::open`].
    pub fn start(
        layers: Vec<LayerSource>,
        options: FetchOptions,
        files: Option<Arc<dyn FileMap>>,
    ) -> Result<Self, StartError> {
        let (pool, open) = options.split();
        FetchPool::start(pool)?.open(layers, open, files)
    }
}
