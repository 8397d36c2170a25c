//! The disk cache: chunks that outlive the process. In: chunks, as they arrive. Out: after a restart, the same chunks.
//!
//! One directory for the machine; per layer a sparse data file in tar space and a map of the chunks it holds. Invariant: a
//! chunk counts only if the map has it, and enters the map only after its data is durable, so a crash at any moment loses at
//! most the latest chunks. Every file can be deleted at any time. A layer's files are locked by the process that writes them; another
//! process reads what the map said when it came, and keeps its own chunks in a file without a name.

#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod layer_writer;
mod map;
mod run;
mod writer;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{FlockOperation, flock};
use rustix::io::{ReadWriteFlags, preadv2};
use sha2::{Digest, Sha256};

pub use self::layer_writer::LayerWriter;
pub(crate) use self::map::Bits;
use self::map::{ChunkMap, Identity, Label};
pub(crate) use self::run::RunWriter;
pub use self::writer::CacheWriter;
use super::chunk::{chunk_count, chunk_len};
use crate::digest::hexadecimal;
use crate::http::stable_name;
use crate::source::{Blob, LayerSpec, Place};
use crate::units::{CHUNK_BYTES, TarOffset, len_usize};

/// Behind the layer's bytes the data file has a block of its own that ties it to its map.
const TRAILER_BYTES: u64 = 4096;
const TRAILER_MAGIC: &[u8; 8] = b"TARBLKDT";

/// Why the disk cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: cannot {doing}: {source}; the cache can be put elsewhere, or deleted at any time")]
pub struct DiskCacheError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub doing: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

impl DiskCacheError {
    fn new(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { path, doing, source }
    }
}

/// A directory of layer caches.
#[derive(Debug)]
pub struct DiskCache {
    dir: PathBuf,
    /// Those open in this process: a lock is a process's own business only as long as it opens each file once.
    open: Mutex<HashMap<[u8; 32], Weak<LayerCache>>>,
}

/// The chunks of one layer that are on disk.
#[derive(Debug)]
pub struct LayerCache {
    identity: Identity,
    count: u32,
    data: File,
    written: ChunkMap,
    /// What a person calls the layer; set once.
    label: Mutex<Label>,
    /// Where the map goes; none when the data file has no name.
    map_path: Option<PathBuf>,
    /// What another process's map said when this one came.
    others: Option<(File, ChunkMap)>,
    /// Bytes written since the map was.
    dirty: AtomicU64,
    full: AtomicBool,
    /// Whether the whole was checked and is what it has to be.
    sealed: AtomicBool,
    /// Whether it was found to be another layer: nothing in it is used any more.
    poisoned: AtomicBool,
    /// Whether it is the layer's own file.
    borrowed: bool,
    committing: Mutex<()>,
}

/// The name of a layer's files in the cache directory: a SHA-256 of what tells it from every other layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKey([u8; 32]);

impl LayerKey {
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

impl DiskCache {
    /// Opens the disk cache in `dir`, which is made when it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Arc<Self>, DiskCacheError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(DiskCacheError::new(&dir, "make the cache directory"))?;
        Ok(Arc::new(Self {
            dir,
            open: Mutex::default(),
        }))
    }

    /// The cache of the layer with this key, whose tar is `size` bytes long; the same value as long as it is held anywhere in
    /// this process.
    ///
    /// # Errors
    /// When its files can neither be opened nor made.
    pub fn layer(&self, key: LayerKey, size: u64) -> Result<Arc<LayerCache>, DiskCacheError> {
        let key = key.0;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cache) = open
            .get(&key)
            .and_then(Weak::upgrade)
            .filter(|cache| !cache.is_poisoned())
        {
            return Ok(cache);
        }
        open.retain(|_, cache| cache.strong_count() > 0);
        let cache = Arc::new(LayerCache::open(&self.dir, key, size)?);
        open.insert(key, Arc::downgrade(&cache));
        Ok(cache)
    }

    /// A cache without a name, which goes with the process: for a layer of which a later process could not tell whether it is
    /// still the same.
    ///
    /// # Errors
    /// When no file can be made in the directory.
    pub fn unnamed(&self, size: u64) -> Result<Arc<LayerCache>, DiskCacheError> {
        Ok(Arc::new(LayerCache::temporary(&self.dir, size)?))
    }

    /// Deletes the caches that were unused longest until no more than `limit` bytes of disk are taken, and before that what
    /// processes left that were killed while they filled one. Those that a process has open stay. Returns how many bytes
    /// were freed.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn trim(&self, limit: u64) -> Result<u64, DiskCacheError> {
        let listing = fs::read_dir(&self.dir).map_err(DiskCacheError::new(&self.dir, "list the cache directory"))?;
        let mut caches = Vec::new();
        let mut freed = 0;
        for entry in listing.flatten() {
            let path = entry.path();
            if layer_writer::is_part(&path) {
                let unused = unused(&path);
                let bytes = entry.metadata().map_or(0, |meta| meta.blocks() * 512);
                if unused.is_some() && fs::remove_file(&path).is_ok() {
                    freed += bytes;
                }
            } else if path.extension().is_some_and(|kind| kind == "data")
                && let Ok(meta) = entry.metadata()
            {
                // The map's time is when the cache was last opened or added to.
                let used = fs::metadata(path.with_extension("map")).and_then(|map| map.modified());
                caches.push((used.unwrap_or(std::time::UNIX_EPOCH), meta.blocks() * 512, path));
            }
        }
        caches.sort_unstable();
        let mut total: u64 = caches.iter().map(|cache| cache.1).sum();
        for (_, bytes, path) in caches {
            if total <= limit {
                break;
            }
            // Held until the file has lost its name: whoever opens it meanwhile looks again.
            let unused = unused(&path);
            if unused.is_some() && fs::remove_file(&path).is_ok() {
                // A map without its data counts for nothing.
                let _harmless = fs::remove_file(path.with_extension("map"));
                total = total.saturating_sub(bytes);
                freed += bytes;
            }
        }
        Ok(freed)
    }
}

/// A file that no process has locked, locked by this one as long as the value lives.
fn unused(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(file)
}

impl LayerCache {
    fn open(dir: &Path, key: [u8; 32], size: u64) -> Result<Self, DiskCacheError> {
        const ATTEMPTS: u32 = 16;
        let path = dir.join(format!("{}.data", hexadecimal(&key)));
        let map_path = path.with_extension("map");
        let count = chunk_count(size).unwrap_or(u32::MAX);
        for _ in 0..ATTEMPTS {
            let data = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(DiskCacheError::new(&path, "open"))?;
            if flock(&data, FlockOperation::NonBlockingLockExclusive).is_err() {
                let others = Self::read_map(&data, &map_path, key, size, count).map(|read| (data, read.map));
                return Self::nameless(dir, key, size, others);
            }
            // Another process may have deleted it between our opening and our locking: then the lock is on a file without a name.
            let ours = data.metadata().map_err(DiskCacheError::new(&path, "look at"))?;
            if fs::metadata(&path).map_or(true, |named| (named.dev(), named.ino()) != (ours.dev(), ours.ino())) {
                continue;
            }
            if let Some(read) = Self::read_map(&data, &map_path, key, size, count) {
                let cache = Self::assemble(read.identity, count, data, read.map, Some(map_path), None);
                cache.sealed.store(read.sealed, Ordering::Relaxed);
                *cache.label() = read.label;
                cache.mark_used();
                return Ok(cache);
            }
            // No map that fits: begin anew. Another process may still read what the map said when it came, so a file
            // that was ever in use is never emptied: it loses its name instead, and the next attempt makes another.
            if ours.len() > 0 {
                fs::remove_file(&path).map_err(DiskCacheError::new(&path, "remove data that no map fits"))?;
                continue;
            }
            // The map goes first, so that it never speaks of the new data.
            match fs::remove_file(&map_path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(DiskCacheError::new(
                        &map_path,
                        "remove a map that does not fit its data",
                    )(error));
                }
                _ => {}
            }
            let identity = Identity {
                size,
                key,
                nonce: nonce(),
            };
            Self::begin(&data, &identity).map_err(DiskCacheError::new(&path, "set its length"))?;
            return Ok(Self::assemble(
                identity,
                count,
                data,
                ChunkMap::new(count),
                Some(map_path),
                None,
            ));
        }
        Err(DiskCacheError::new(&path, "lock")(io::Error::other(
            "it is deleted again and again",
        )))
    }

    /// A cache that goes with the process.
    fn nameless(
        dir: &Path,
        key: [u8; 32],
        size: u64,
        others: Option<(File, ChunkMap)>,
    ) -> Result<Self, DiskCacheError> {
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(dir)
            .map_err(DiskCacheError::new(dir, "make a temporary file in it"))?;
        let identity = Identity {
            size,
            key,
            nonce: nonce(),
        };
        Self::begin(&data, &identity).map_err(DiskCacheError::new(dir, "set the length of a temporary file in it"))?;
        let count = chunk_count(size).unwrap_or(u32::MAX);
        Ok(Self::assemble(
            identity,
            count,
            data,
            ChunkMap::new(count),
            None,
            others,
        ))
    }

    /// A cache in `dir` that has no name and goes with the process, for when there is no store.
    ///
    /// # Errors
    /// When no file can be made there.
    pub(crate) fn temporary(dir: &Path, layer_size: u64) -> Result<Self, DiskCacheError> {
        Self::nameless(dir, [0; 32], layer_size, None)
    }

    /// A layer's own file in the place of a cache: everything is in it, and nothing is ever written.
    pub(crate) fn borrowed(file: File, size: u64) -> Self {
        let count = chunk_count(size).unwrap_or(u32::MAX);
        let all = ChunkMap::new(count);
        (0..count).for_each(|index| all.bits.set(index));
        let identity = Identity {
            size,
            key: [0; 32],
            nonce: nonce(),
        };
        let mut cache = Self::assemble(identity, count, file, all, None, None);
        cache.full = AtomicBool::new(true);
        cache.borrowed = true;
        cache
    }

    fn assemble(
        identity: Identity,
        count: u32,
        data: File,
        written: ChunkMap,
        map_path: Option<PathBuf>,
        others: Option<(File, ChunkMap)>,
    ) -> Self {
        Self {
            identity,
            count,
            data,
            written,
            label: Mutex::default(),
            map_path,
            others,
            dirty: AtomicU64::new(0),
            full: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            borrowed: false,
            committing: Mutex::default(),
        }
    }

    /// What the map says of the data, if it fits it.
    fn read_map(data: &File, map: &Path, key: [u8; 32], size: u64, count: u32) -> Option<map::Decoded> {
        let at = size.next_multiple_of(TRAILER_BYTES);
        if data.metadata().ok()?.len() != at + TRAILER_BYTES {
            return None;
        }
        let mut trailer = [0; 24];
        data.read_exact_at(&mut trailer, at).ok()?;
        let (magic, nonce) = trailer.split_at(TRAILER_MAGIC.len());
        if magic != TRAILER_MAGIC {
            return None;
        }
        let identity = Identity {
            size,
            key,
            nonce: nonce.try_into().ok()?,
        };
        // A map is as long as the layer makes it; whatever else is there is not read.
        let mut bytes = Vec::new();
        let longest = map::longest(count) + 1;
        File::open(map).ok()?.take(longest).read_to_end(&mut bytes).ok()?;
        map::decode(&bytes, chunk_count).filter(|read| read.identity == identity)
    }

    fn begin(data: &File, identity: &Identity) -> io::Result<()> {
        data.set_len(0)?;
        Self::end_data(data, identity)
    }

    /// Where all chunks from `first` up to `end` are together in one file.
    pub(crate) fn find(&self, first: u32, end: u32) -> Option<BorrowedFd<'_>> {
        if self.is_poisoned() {
            return None;
        }
        if self.written.bits.has_all(first, end) {
            return Some(self.data.as_fd());
        }
        let (file, map) = self.others.as_ref()?;
        map.bits.has_all(first, end).then(|| file.as_fd())
    }

    /// Whether chunk `index` is here.
    pub(crate) fn has(&self, index: u32) -> bool {
        self.find(index, index.saturating_add(1)).is_some()
    }

    /// The file that holds chunk `index`, and what its map says of it.
    fn holder(&self, index: u32) -> (&File, &ChunkMap) {
        match &self.others {
            Some((file, map)) if !self.written.bits.has(index) && map.bits.has(index) => (file, map),
            _ => (&self.data, &self.written),
        }
    }

    /// A descriptor of its own for the file that holds chunk `index`.
    pub(crate) fn file_of(&self, index: u32) -> io::Result<File> {
        self.holder(index).0.try_clone()
    }

    /// Reads chunk `index` as far as that needs no waiting; none if it does, or if not all of it is there. What comes is not checked.
    pub(crate) fn read_at_once(&self, index: u32) -> Option<Vec<u8>> {
        let len = len_usize(chunk_len(self.identity.size, index));
        let mut bytes = vec![0; len];
        let at = u64::from(index) * CHUNK_BYTES;
        let (file, _) = self.holder(index);
        let read = preadv2(file, &mut [IoSliceMut::new(&mut bytes)], at, ReadWriteFlags::NOWAIT);
        (read == Ok(len)).then_some(bytes)
    }

    /// Whether `bytes`, read from the file, are what was written as chunk `index`. Nothing is known of a layer's own file.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        self.borrowed || self.holder(index).1.matches(index, bytes)
    }

    /// Writes runs of chunks; tell [`LayerCache::wrote`] after each.
    pub(crate) fn writer(&self) -> io::Result<RunWriter> {
        Ok(RunWriter::new(self.data.try_clone()?))
    }

    /// The same for bytes that are no whole chunk: the map never speaks of them.
    pub(crate) fn parts(&self) -> io::Result<File> {
        self.data.try_clone()
    }

    /// Chunk `index` is in the file now, and has this CRC-32C.
    pub(crate) fn wrote(&self, index: u32, sum: u32) {
        self.written.put(index, sum);
        self.dirty
            .fetch_add(chunk_len(self.identity.size, index), Ordering::Relaxed);
    }

    /// Chunk `index` could not be read back. The map is not to say so any longer, nor that the whole was checked: what comes
    /// in its place was not there then.
    pub(crate) fn lost(&self, index: u32) {
        self.sealed.store(false, Ordering::Relaxed);
        self.dirty.fetch_add(1, Ordering::Relaxed);
        self.written.bits.clear(index);
        if let Some((_, map)) = &self.others {
            map.bits.clear(index);
        }
    }

    /// Whether writing still makes sense.
    pub(crate) fn takes_more(&self) -> bool {
        !self.full.load(Ordering::Relaxed)
    }

    /// Whether all of the layer is here.
    pub(crate) fn is_whole(&self) -> bool {
        let together = || {
            let others = self.others.as_ref();
            others.is_some_and(|(_, map)| map.bits.count_set() > 0) && (0..self.count).all(|index| self.has(index))
        };
        !self.is_poisoned() && (self.written.bits.is_full() || together())
    }

    /// Shows all of the layer, chunk by chunk, until `show` says that it is enough. A chunk that cannot be read, or is not what was
    /// written, is shown as `None`. Waits for the disk.
    pub(crate) fn read_whole(&self, show: &mut dyn FnMut(u32, Option<&[u8]>) -> bool) {
        let mut buffer = vec![0; len_usize(CHUNK_BYTES)];
        for index in 0..self.count {
            let held = &mut buffer[..len_usize(chunk_len(self.identity.size, index))];
            let (file, map) = self.holder(index);
            let read = file.read_exact_at(held, u64::from(index) * CHUNK_BYTES);
            let right = read.is_ok() && (self.borrowed || map.matches(index, held));
            if !show(index, right.then_some(held)) {
                break;
            }
        }
    }

    /// Whether the whole was checked.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Relaxed)
    }

    /// The whole is here and was checked: the map says so from its next writing on.
    pub(crate) fn seal(&self) {
        if !self.sealed.swap(true, Ordering::Relaxed) {
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether it is a layer's own file in the place of a cache.
    pub(crate) fn is_borrowed(&self) -> bool {
        self.borrowed
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// What is here is not the layer: it is forgotten, here and on disk, and never used again. A data file that is
    /// another process's stays, and so do the descriptors that readers hold.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
        self.full.store(true, Ordering::Relaxed);
        let Some(map) = &self.map_path else { return };
        let _no_map_is_written_now = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        for path in [map.clone(), map.with_extension("data")] {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("{}: cannot remove a poisoned cache: {error}", path.display());
            }
        }
    }

    /// Writing failed with `why`; nothing more is written.
    pub(crate) fn stop_writing(&self, why: &io::Error) {
        if !self.full.swap(true, Ordering::Relaxed) {
            log::warn!("the cache takes no more: {why}; reads go on without it");
        }
    }

    /// Bytes written that the map does not know of yet.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Bytes of the layer that are here.
    #[must_use]
    pub fn bytes_held(&self) -> u64 {
        let full = self.written.bits.count_set() * CHUNK_BYTES;
        match self.count.checked_sub(1) {
            Some(last) if self.written.bits.has(last) => full - CHUNK_BYTES + chunk_len(self.identity.size, last),
            _ => full,
        }
    }

    /// Keeps those chunks that lie whole inside `bytes`, which are the layer's from `at` on. Waits for the disk.
    ///
    /// # Errors
    /// When they cannot be written; then nothing more is.
    pub fn put(&self, at: TarOffset, bytes: &[u8]) -> Result<(), DiskCacheError> {
        let size = self.identity.size;
        let mut index = u32::try_from(at.0.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX);
        while index < self.count && self.takes_more() {
            let from = len_usize((u64::from(index) * CHUNK_BYTES).saturating_sub(at.0));
            let len = len_usize(chunk_len(size, index));
            let Some(chunk) = bytes.get(from..).and_then(|rest| rest.get(..len)) else {
                break;
            };
            if !self.has(index) {
                if let Err(error) = self.data.write_all_at(chunk, u64::from(index) * CHUNK_BYTES) {
                    self.stop_writing(&error);
                    return Err(DiskCacheError::new(
                        self.map_path.as_deref().unwrap_or(Path::new("cache")),
                        "write",
                    )(error));
                }
                self.wrote(index, crc32c::crc32c(chunk));
            }
            index += 1;
        }
        Ok(())
    }

    /// Makes what was written durable and puts it in the map. Waits for the disk.
    ///
    /// # Errors
    /// When the disk does not take it; the old map stays.
    pub fn commit(&self) -> Result<(), DiskCacheError> {
        let Some(path) = &self.map_path else { return Ok(()) };
        let _one_at_a_time = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_poisoned() {
            return Ok(());
        }
        let dirty = self.dirty.swap(0, Ordering::Relaxed);
        if dirty == 0 {
            return Ok(());
        }
        self.commit_to(path).inspect_err(|_| {
            self.dirty.fetch_add(dirty, Ordering::Relaxed);
        })
    }

    fn commit_to(&self, path: &Path) -> Result<(), DiskCacheError> {
        // The bits are taken before the data is made durable: those set meanwhile wait for the next time.
        let bytes = map::encode(&self.identity, self.is_sealed(), &self.label(), &self.written);
        self.data
            .sync_data()
            .map_err(DiskCacheError::new(path, "sync the data of"))?;
        let temporary = path.with_extension(format!("map.{}", std::process::id()));
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|error| {
            // It may not have been made at all.
            let _harmless = fs::remove_file(&temporary);
            DiskCacheError::new(path, "write")(error)
        })
    }

    fn label(&self) -> MutexGuard<'_, Label> {
        self.label.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what a person calls the layer, for who lists the cache; `name` holds no secrets. The map has it from its next writing on.
    pub(crate) fn describe(&self, name: &str, digest: &str) {
        let new = Label::new(name, digest);
        let mut label = self.label();
        if *label != new {
            *label = new;
        }
    }

    /// Sets the map's time, by which [`DiskCache::trim`] finds what is cold.
    fn mark_used(&self) {
        if let Some(path) = &self.map_path
            && let Ok(map) = File::open(path)
        {
            // Only trimming suffers when the time cannot be set.
            let _untrimmed = map.set_modified(std::time::SystemTime::now());
        }
    }
}

impl Drop for LayerCache {
    fn drop(&mut self) {
        if let Err(error) = self.commit() {
            log::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests;
