//! What the images that one process serves have together. In: layers as they are opened. Out: one fetch thread, memory bound and disk
//! cache for all that use the same cache directory, and one image for all that are made of the same indexes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::dedup::Getters;
use super::index_cache::limit_of;
use super::{OpenError, image_of};
use crate::cache::disk::DiskCache;
use crate::fetch::{FetchPool, PoolOptions};
use crate::image::ext4::Ext4Image;
use crate::index::Index;
use crate::tree::TreeMode;

/// Without a bound that was asked for, the memory cache holds this part of the machine's memory at most.
const MEMORY_SHARE: u64 = 16;

/// And never less or more than this, in bytes.
const LEAST_MEMORY: u64 = 64 << 20;
const MOST_MEMORY: u64 = 512 << 20;

/// How served layers' bytes are fetched.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetching {
    /// The most bytes that the memory cache holds; a part of the machine's memory if none.
    pub memory_bytes: Option<u64>,
    /// Connections per host at most.
    pub connections: u16,
    /// Whether all of the layers is fetched into the disk cache in the end, while there are no reads.
    pub fetch_all: bool,
    /// How long a read may wait before it fails; for ever if none.
    pub deadline: Option<Duration>,
    /// The disk space that all that is kept may take, at every moment: what was unused longest goes first. The last that was named
    /// counts for all; a tenth of the disk if none was.
    pub store_bytes: Option<u64>,
}

/// What is shared. One value for a process that serves several images.
#[derive(Debug, Default)]
pub struct Shared {
    pools: Mutex<HashMap<Option<PathBuf>, Pool>>,
    images: Mutex<HashMap<ImageKey, Weak<Ext4Image>>>,
    /// The devices whose layers may get bytes of others' layers.
    pub(super) getters: Arc<Getters>,
}

#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) fetch: FetchPool,
    pub(super) disk: Option<Arc<DiskCache>>,
}

/// SHA-256 of the indexes that an image is made of, and of how.
type ImageKey = [u8; 32];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn trim(disk: &Arc<DiskCache>) {
    if let Err(error) = disk.trim(disk.limit()) {
        log::warn!("{error}");
    }
}

impl Shared {
    /// The pool of the disk cache in `store`, or the one without any. What it is made with is what the first one asks for, but for
    /// the limit of the disk cache.
    pub(super) fn pool(&self, store: Option<&Path>, fetching: &Fetching) -> Result<Pool, OpenError> {
        let mut pools = lock(&self.pools);
        let key = store.map(Path::to_owned);
        if let Some(pool) = pools.get(&key) {
            let pool = pool.clone();
            drop(pools);
            if let (Some(disk), Some(bytes)) = (&pool.disk, fetching.store_bytes)
                && disk.limit() != bytes
            {
                disk.limit_to(bytes);
                trim(disk);
            }
            return Ok(pool);
        }
        pools.retain(|_, pool| pool.fetch.is_in_use());
        let opened = store.map(|dir| DiskCache::open(dir, limit_of(dir, fetching.store_bytes)));
        let disk = match opened {
            Some(Ok(disk)) => Some(disk),
            Some(Err(error)) if error.is_of_the_disk() => {
                log::warn!("{error}; going on without a cache");
                None
            }
            Some(Err(error)) => return Err(error.into()),
            None => None,
        };
        let pool = Pool {
            fetch: FetchPool::start(PoolOptions {
                memory_bytes: fetching.memory_bytes.unwrap_or_else(usual_memory),
                connections: usize::from(fetching.connections),
                store: disk.clone(),
                ..PoolOptions::default()
            })?,
            disk,
        };
        pools.insert(key, pool.clone());
        drop(pools);
        // What killed processes left, and what is too much since the limit was another one. From here on it holds at every moment.
        if let Some(disk) = &pool.disk {
            trim(disk);
        }
        Ok(pool)
    }

    /// The image of `indexes`: one that there is already, if it is made of the same.
    pub(super) fn image(
        &self,
        indexes: &[&Index<Vec<u8>>],
        mode: TreeMode,
        name: &str,
    ) -> Result<Arc<Ext4Image>, OpenError> {
        let mut hash = Sha256::new();
        hash.update(format!("{mode:?}").as_bytes());
        for index in indexes {
            let bytes = index.as_bytes();
            hash.update(bytes.len().to_le_bytes());
            hash.update(bytes);
        }
        let key: ImageKey = hash.finalize().into();
        if let Some(image) = lock(&self.images).get(&key).and_then(Weak::upgrade) {
            return Ok(image);
        }
        let image = Arc::new(image_of(indexes.iter().copied(), mode, name)?);
        let mut images = lock(&self.images);
        images.retain(|_, image| image.strong_count() > 0);
        images.insert(key, Arc::downgrade(&image));
        Ok(image)
    }
}

/// The bound of the memory cache where none was asked for, in bytes.
fn usual_memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: Option<u64> = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    kib.map_or(LEAST_MEMORY, |kib| kib.saturating_mul(1024) / MEMORY_SHARE)
        .clamp(LEAST_MEMORY, MOST_MEMORY)
}
