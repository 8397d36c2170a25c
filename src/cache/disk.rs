//! The disk cache: chunks that outlive the process. In: chunks, as they arrive. Out: after a restart, the same chunks.
//!
//! One directory for the machine; per layer a sparse data file in tar space and a map of the chunks it holds. Invariant: a
//! chunk counts only if the map has it, and enters the map only after its data is durable, so a crash at any moment loses at
//! most the latest chunks. Every file can be deleted at any time. A layer's files are locked by the process that writes them; another
//! process reads what the map said when it came, and keeps its own chunks in a file without a name.
//!
//! Parts: `dir` (the directory, and who may have written to it), `files` (what is called how in it), `map` (which chunks there are),
//! `layer_files` (the files of one layer) and `layer` (the chunks in them), `layer_protect` and `verity` (whole layers that the kernel keeps
//! as they are), `room` and `reservation` (the limit, what is given up for it, and disks that take nothing), `list` (what is there, for people), `run`, `writer` and
//! `layer_writer` (ways to write).

mod dir;
mod files;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod layer;
mod layer_files;
mod layer_protect;
mod layer_writer;
mod list;
mod map;
mod reservation;
mod room;
mod run;
pub(crate) mod verity;
mod writer;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use self::dir::SafeDir;
pub(crate) use self::dir::{FileState, check_dir};
pub use self::layer::LayerCache;
pub(crate) use self::layer_protect::Protected;
pub use self::layer_writer::LayerWriter;
pub use self::list::{KeptLayer, Removed, Verified};
pub(crate) use self::map::Bits;
use self::room::Room;
pub(crate) use self::run::RunWriter;
pub use self::writer::CacheWriter;
use crate::digest::hexadecimal;
use crate::http::stable_name;
use crate::source::{Blob, LayerSpec, Place};

/// Why the disk cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskCacheError {
    /// The kernel refused something.
    #[error("{path}: cannot {doing}: {source}; the cache can be put elsewhere, or deleted at any time")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Others could have put something there for this user to believe or to write through.
    #[error(
        "the cache directory {path} is not safe: {why}; or name another one with --cache, or keep nothing (--no-cache)"
    )]
    Unsafe {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
}

impl DiskCacheError {
    fn new(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }

    /// Whether one can go on without a cache: something is wrong with the disk, not with whom the directory belongs to.
    #[must_use]
    pub const fn is_of_the_disk(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// How much of a disk the cache may take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheLimit {
    /// Bytes on disk at most, kept at every moment. If none, a tenth of the filesystem, of which the last twentieth is left to others, or the
    /// last GiB where that is less.
    pub bytes: Option<u64>,
    /// Directories whose files are counted, too: what else is in the same cache.
    pub beside: Vec<PathBuf>,
}

impl CacheLimit {
    /// So many bytes, nothing beside.
    #[must_use]
    pub const fn bytes(bytes: u64) -> Self {
        Self {
            bytes: Some(bytes),
            beside: Vec::new(),
        }
    }
}

/// A directory of layer caches.
#[derive(Debug)]
pub struct DiskCache {
    dir: RwLock<SafeDir>,
    limit: RwLock<CacheLimit>,
    /// Those with a name that are open in this process: a lock is a process's own business only as long as it opens each file once.
    /// Held while a file of the directory is opened and locked.
    open: Mutex<HashMap<[u8; 32], Weak<LayerCache>>>,
    /// All that are open in this process, with a name or without.
    all: Mutex<Vec<Weak<LayerCache>>>,
    /// Held while a map is written, so that only one is on disk twice.
    committing: Mutex<()>,
    room: Room,
    /// Whether it is known that files cannot be protected here.
    unprotectable: AtomicBool,
    /// For tests: seconds since 1970 instead of the system's, unless zero.
    clock: AtomicU32,
}

/// Why what is kept of a layer cannot be read now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotKept {
    /// Nothing is kept, or nothing that fits the layer's map.
    Nothing,
    /// Another process has the layer's files open, or this one is about to close them: later it may be read.
    InUse,
}

/// The name of a layer's files in the cache directory: a SHA-256 of what tells it from every other layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKey([u8; 32]);

impl LayerKey {
    /// The name of the layer's files, without what tells one from the other.
    #[must_use]
    pub fn hex(self) -> String {
        hexadecimal(&self.0)
    }

    /// A plain layer at a URL: `name` is the URL without passwords and signatures, `size` its length in bytes, and `validator`
    /// the value of its `ETag` or `Last-Modified` header.
    #[must_use]
    pub fn of_url(name: &str, size: u64, validator: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"tarblk layer 1\0");
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update(size.to_le_bytes());
        hash.update(validator.as_bytes());
        Self(hash.finalize().into())
    }

    /// A plain layer at a URL, if its server says by what a later process can tell whether it is still the same.
    #[must_use]
    pub fn of_blob(blob: &Blob) -> Option<Self> {
        match &blob.place {
            Place::Url(at) => {
                let validator = at.validator.as_ref()?;
                Some(Self::of_url(&stable_name(at.url.as_str()), blob.len, validator.value()))
            }
            Place::File(_) | Place::Registry(_) => None,
        }
    }

    /// A layer's tar of `tar_len` bytes, `coded` if its blob is compressed, under the best name that it has. None where a later
    /// process could not tell whether it is still the same.
    #[must_use]
    pub fn of_layer(layer: &LayerSpec, coded: bool, tar_len: u64) -> Option<Self> {
        match &layer.cached_as {
            Some(name) => Some(Self::of_content(name, tar_len)),
            None => Self::of_blob(&layer.blob).map(|key| if coded { key.of_decoded(tar_len) } else { key }),
        }
    }

    /// A tar of `tar_len` bytes whose content has a name, `identity`: a digest, or whatever else means this content alone.
    #[must_use]
    pub fn of_content(identity: &str, tar_len: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"tarblk layer 2\0");
        hash.update(identity.as_bytes());
        hash.update([0]);
        hash.update(tar_len.to_le_bytes());
        Self(hash.finalize().into())
    }

    /// The tar of `tar_len` bytes that is decoded from the compressed blob with this key.
    #[must_use]
    pub fn of_decoded(self, tar_len: u64) -> Self {
        Self::of_content(&hexadecimal(&self.0), tar_len)
    }
}

fn nonce() -> [u8; 16] {
    use std::hash::{BuildHasher, RandomState};
    let (a, b) = (
        RandomState::new().hash_one(std::process::id()),
        RandomState::new().hash_one(1),
    );
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&a.to_le_bytes());
    nonce[8..].copy_from_slice(&b.to_le_bytes());
    nonce
}

/// A lock whose holder cannot have left anything half changed in a way that matters, should it have panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskCache {
    /// Opens the disk cache in `dir`, which is made when it is missing, and keeps it within `limit`.
    ///
    /// # Errors
    /// When the directory cannot be made, or others can write to it.
    pub fn open(dir: impl AsRef<Path>, limit: CacheLimit) -> Result<Arc<Self>, DiskCacheError> {
        Ok(Self::in_dir(SafeDir::open(dir.as_ref())?, limit))
    }

    /// The same for a directory that is there already.
    ///
    /// # Errors
    /// The same.
    pub fn open_existing(dir: impl AsRef<Path>, limit: CacheLimit) -> Result<Arc<Self>, DiskCacheError> {
        Ok(Self::in_dir(SafeDir::open_existing(dir.as_ref())?, limit))
    }

    fn in_dir(dir: SafeDir, limit: CacheLimit) -> Arc<Self> {
        Arc::new(Self {
            dir: RwLock::new(dir),
            limit: RwLock::new(limit),
            open: Mutex::default(),
            all: Mutex::default(),
            committing: Mutex::default(),
            room: Room::default(),
            unprotectable: AtomicBool::new(false),
            clock: AtomicU32::new(0),
        })
    }

    /// From now on it may take so many bytes on disk. What is too much goes before the next write, or by [`DiskCache::trim`].
    pub fn limit_to(&self, bytes: u64) {
        self.limit.write().unwrap_or_else(PoisonError::into_inner).bytes = Some(bytes);
        self.room.close();
    }

    fn limits(&self) -> CacheLimit {
        self.limit.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory as it is open now.
    fn dir(&self) -> SafeDir {
        self.dir.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory, opened anew if it was deleted or exchanged.
    fn dir_in_place(&self) -> Result<SafeDir, DiskCacheError> {
        let dir = self.dir();
        if dir.is_in_place() {
            return Ok(dir);
        }
        let new = dir.reopened()?;
        *self.dir.write().unwrap_or_else(PoisonError::into_inner) = new.clone();
        Ok(new)
    }

    /// Seconds since 1970 UTC.
    fn now(&self) -> u32 {
        let set = self.clock.load(Ordering::Relaxed);
        if set != 0 {
            return set;
        }
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX))
    }

    /// The layers that are open in this process.
    fn layers(&self) -> Vec<Arc<LayerCache>> {
        let mut all = lock(&self.all);
        all.retain(|layer| layer.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }

    fn remember(&self, layer: &Arc<LayerCache>) {
        let mut all = lock(&self.all);
        all.retain(|layer| layer.strong_count() > 0);
        all.push(Arc::downgrade(layer));
    }

    /// The cache of the layer with this key, whose tar is `size` bytes long; the same value as long as it is held anywhere in
    /// this process.
    ///
    /// # Errors
    /// When its files can neither be opened nor made.
    pub fn layer(self: &Arc<Self>, key: LayerKey, size: u64) -> Result<Arc<LayerCache>, DiskCacheError> {
        let key = key.0;
        let mut open = lock(&self.open);
        let known = open.get(&key).map(Weak::upgrade);
        if let Some(Some(cache)) = &known
            && !cache.is_poisoned()
        {
            return Ok(Arc::clone(cache));
        }
        let closing = matches!(known, Some(None));
        let cache = Arc::new(LayerCache::open(self, key, size, closing)?);
        open.insert(key, Arc::downgrade(&cache));
        self.remember(&cache);
        Ok(cache)
    }

    /// The cache of a layer of which something is kept. Makes nothing, and waits for nobody.
    ///
    /// # Errors
    /// [`NotKept`].
    pub(crate) fn kept(self: &Arc<Self>, key: LayerKey) -> Result<Arc<LayerCache>, NotKept> {
        let key = key.0;
        let mut open = lock(&self.open);
        if let Some(cache) = open.get(&key).and_then(Weak::upgrade) {
            return if cache.is_poisoned() {
                Err(NotKept::Nothing)
            } else {
                Ok(cache)
            };
        }
        let cache = Arc::new(LayerCache::open_kept(self, key)?);
        open.insert(key, Arc::downgrade(&cache));
        self.remember(&cache);
        Ok(cache)
    }

    /// A layer was closed. Called by whoever held it last, who may be this very cache: then it is found out later.
    fn forget(&self, key: &[u8; 32]) {
        if let Ok(mut open) = self.open.try_lock()
            && open.get(key).is_some_and(|cache| cache.strong_count() == 0)
        {
            open.remove(key);
        }
    }

    /// A cache without a name, which goes with the process: for a layer of which a later process could not tell whether it is
    /// still the same.
    ///
    /// # Errors
    /// When no file can be made in the directory.
    pub fn unnamed(self: &Arc<Self>, size: u64) -> Result<Arc<LayerCache>, DiskCacheError> {
        let cache = Arc::new(LayerCache::nameless(self, [0; 32], size, None)?);
        self.remember(&cache);
        Ok(cache)
    }

    /// Gives up the coldest chunks until no more than `limit` bytes of disk are taken, and before that what processes left that were
    /// killed. What other processes have open stays. Returns how many bytes were freed.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn trim(self: &Arc<Self>, limit: u64) -> Result<u64, DiskCacheError> {
        self.trim_to(limit)
            .map_err(DiskCacheError::new(self.dir().path(), "trim the cache directory"))
    }

    /// The most that this may take on disk, in bytes, pinned layers included.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit_in(&self.dir())
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod limit_tests;
#[cfg(test)]
mod protect_tests;
#[cfg(test)]
mod tests;
