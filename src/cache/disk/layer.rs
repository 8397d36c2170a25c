//! The chunks of one layer that are on disk. In: chunks to be kept. Out: the same chunks, and whether they still are what was written.
//!
//! Any thread may ask what is here; writing, committing and giving up wait for the disk. Invariants: a bit is set only after its
//! chunk was written and its checksum noted; a bit is gone from the map on disk, durably, before its chunk's space is given back (`commit`).

mod commit;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use rustix::io::{ReadWriteFlags, preadv2};

use super::dir::{CacheFile, FileState};
use super::files::{data_name, map_name, read_map};
use super::layer_files::{Files, is_of_use};
use super::map::{ChunkMap, GROUP_CHUNKS, Identity, Label};
use super::reservation::Reservation;
use super::{DiskCache, DiskCacheError, NotKept, RunWriter, lock};
use crate::cache::chunk::{chunk_count, chunk_len};
use crate::checksum;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

/// The chunks of one layer that are on disk.
#[derive(Debug)]
pub struct LayerCache {
    /// None: a file in no cache directory, and under no limit.
    store: Option<Arc<DiskCache>>,
    key: [u8; 32],
    /// The layer's length in bytes.
    size: u64,
    count: u32,
    /// Exchanged as a whole when the directory was emptied.
    files: RwLock<Arc<Files>>,
    /// What a person calls the layer.
    label: Mutex<Label>,
    /// Bytes written since the map was, and one for every other change of it.
    dirty: AtomicU64,
    /// Whether a chunk was read since the map was written.
    touched: AtomicBool,
    /// Whether a write failed where there is no cache directory to rest: nothing more is written.
    full: AtomicBool,
    /// Whether the whole was checked and is what it has to be.
    sealed: AtomicBool,
    /// Whether it was found to be another layer: nothing in it is used any more.
    poisoned: AtomicBool,
    /// Whether it is the layer's own file.
    borrowed: bool,
    /// Whether a chunk that is given up costs reading the layer from its beginning.
    costly: AtomicBool,
    /// Held while the bytes of the data file change: a chunk's space is not given back while it is written.
    layout: Mutex<()>,
}

impl LayerCache {
    /// The cache of a layer in a directory.
    pub(super) fn open(
        store: &Arc<DiskCache>,
        key: [u8; 32],
        size: u64,
        patient: bool,
    ) -> Result<Self, DiskCacheError> {
        let dir = store.dir_in_place()?;
        let (files, read) = Files::open(&dir, key, size, patient)?;
        let cache = Self::assemble(Some(Arc::clone(store)), key, size, files);
        if let Some(read) = read {
            cache.sealed.store(read.about.sealed, Ordering::Relaxed);
            *lock(&cache.label) = read.about.label;
            cache.mark_used(&dir);
        }
        Ok(cache)
    }

    /// One that is kept and that no one has open, locked.
    ///
    /// # Errors
    /// [`NotKept`].
    pub(super) fn open_kept(store: &Arc<DiskCache>, key: [u8; 32]) -> Result<Self, NotKept> {
        let dir = store.dir();
        let data = dir.open_own(&data_name(&key)).map_err(|_| NotKept::Nothing)?;
        // One that has just lost its name may have got a successor, which is somebody's.
        if !data.lock() || !data.is_called(&dir, &data_name(&key)) {
            return Err(NotKept::InUse);
        }
        let read = read_map(&dir, &data, &key).filter(|read| is_of_use(&data, read));
        let mut read = read.ok_or(NotKept::Nothing)?;
        let files = Files::found(data, &mut read);
        let cache = Self::assemble(Some(Arc::clone(store)), key, read.identity.size, files);
        cache.sealed.store(read.about.sealed, Ordering::Relaxed);
        *lock(&cache.label) = read.about.label;
        Ok(cache)
    }

    /// A cache that goes with the process.
    pub(super) fn nameless(
        store: &Arc<DiskCache>,
        key: [u8; 32],
        size: u64,
        others: Option<(CacheFile, ChunkMap)>,
    ) -> Result<Self, DiskCacheError> {
        let files = Files::nameless(&store.dir_in_place()?, key, size, others)?;
        Ok(Self::assemble(Some(Arc::clone(store)), key, size, files))
    }

    /// A file in `dir` that has no name and goes with the process, for when there is no cache. Under no limit.
    ///
    /// # Errors
    /// When no file can be made there.
    pub(crate) fn temporary(dir: &Path, size: u64) -> Result<Self, DiskCacheError> {
        let made = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(dir)
            .and_then(CacheFile::own)
            .and_then(|data| Files::begin(data, [0; 32], size, None));
        let files = made.map_err(DiskCacheError::new(dir, "make a temporary file in it"))?;
        Ok(Self::assemble(None, [0; 32], size, files))
    }

    /// A layer's own file in the place of a cache: everything is in it, and nothing is ever written.
    pub(crate) fn borrowed(file: File, size: u64) -> Self {
        let count = chunk_count(size).unwrap_or(u32::MAX);
        let map = ChunkMap::new(count);
        map.bits.set_all();
        let files = Files {
            identity: Identity {
                size,
                key: [0; 32],
                nonce: [0; 16],
            },
            data: CacheFile::borrowed(file),
            map,
            named: false,
            protection: OnceLock::new(),
            others: None,
        };
        let mut cache = Self::assemble(None, [0; 32], size, files);
        cache.borrowed = true;
        cache
    }

    fn assemble(store: Option<Arc<DiskCache>>, key: [u8; 32], size: u64, files: Files) -> Self {
        Self {
            store,
            key,
            size,
            count: chunk_count(size).unwrap_or(u32::MAX),
            files: RwLock::new(Arc::new(files)),
            label: Mutex::default(),
            dirty: AtomicU64::new(0),
            touched: AtomicBool::new(false),
            full: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            borrowed: false,
            costly: AtomicBool::new(false),
            layout: Mutex::default(),
        }
    }

    pub(super) const fn store(&self) -> Option<&Arc<DiskCache>> {
        self.store.as_ref()
    }

    /// Held while the bytes of the data file change.
    pub(super) const fn layout(&self) -> &Mutex<()> {
        &self.layout
    }

    /// The map on disk is to be written anew.
    pub(super) fn changed(&self) {
        self.dirty.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn files(&self) -> Arc<Files> {
        Arc::clone(&self.files.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The layer's length in bytes.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn key(&self) -> &[u8; 32] {
        &self.key
    }

    /// Where all chunks from `first` up to `end` are together: which file, as a number.
    pub(crate) fn find(&self, first: u32, end: u32) -> Option<u64> {
        if self.is_poisoned() {
            return None;
        }
        let files = self.files();
        if files.map.bits.has_all(first, end) {
            return Some(files.data.id());
        }
        let (file, map) = files.others.as_ref()?;
        map.bits.has_all(first, end).then(|| file.id())
    }

    /// Whether chunk `index` is here.
    pub(crate) fn has(&self, index: u32) -> bool {
        self.find(index, index.saturating_add(1)).is_some()
    }

    /// A descriptor of its own for the file that holds chunk `index`.
    pub(crate) fn file_of(&self, index: u32) -> io::Result<File> {
        self.files().holder(index).0.file().try_clone()
    }

    /// Reads up to `count` chunks from `first` on, by one call of the kernel, and returns those that came whole. Without `waits` it reads
    /// what the page cache has. What comes is not checked.
    ///
    /// # Errors
    /// What the kernel says; without `waits` that nothing is there at once.
    pub(crate) fn read_run(&self, first: u32, count: u32, waits: bool) -> io::Result<Vec<Vec<u8>>> {
        let files = self.files();
        let (file, _) = files.holder(first);
        let end = first.saturating_add(count).min(self.count);
        let same_file = |index: &u32| files.holder(*index).0.id() == file.id();
        let mut chunks: Vec<Vec<u8>> = (first..end)
            .take_while(same_file)
            .map(|index| vec![0; len_usize(chunk_len(self.size, index))])
            .collect();
        let mut into: Vec<_> = chunks.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect();
        let flags = if waits {
            ReadWriteFlags::empty()
        } else {
            ReadWriteFlags::NOWAIT
        };
        let mut left = preadv2(file, &mut into, u64::from(first) * CHUNK_BYTES, flags)?;
        let whole = chunks.iter().take_while(|chunk| {
            let is_whole = chunk.len() <= left;
            left = left.saturating_sub(chunk.len());
            is_whole
        });
        let whole = whole.count();
        chunks.truncate(whole);
        Ok(chunks)
    }

    /// What is different whenever somebody has written to the data file; none if it has no name, or is not all that chunks are read from.
    pub(crate) fn file_state(&self) -> Option<FileState> {
        let files = self.files();
        let alone = files.named && files.others.is_none() && !self.is_poisoned();
        alone.then(|| files.data.state().ok()).flatten()
    }

    /// Whether `bytes`, read from the file, are what was written as chunk `index`; of a layer's own file, what was
    /// [`verified`](Self::verified) in it; what the kernel has compared is.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        let files = self.files();
        files.is_compared(index) || files.holder(index).1.matches(index, bytes)
    }

    /// `bytes` were read as chunk `index` and are right, whatever the map's checksum says: from now on it is theirs.
    pub(crate) fn verified(&self, index: u32, bytes: &[u8]) {
        self.files().holder(index).1.sums.set(index, checksum::crc32c(bytes));
    }

    /// Fills `target` with the layer's bytes from `at` on, if all chunks that they lie in are here, in the page cache, and what was
    /// written. Waits for nothing. Says whether it did; what is in `target` otherwise is of no use.
    pub(crate) fn read_checked(&self, at: u64, target: &mut [u8]) -> bool {
        thread_local! {
            /// What of the first chunk and of the last was not asked for.
            static EDGES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let end = at.saturating_add(len_u64(target.len()));
        if target.is_empty() || end > self.size || self.is_poisoned() {
            return false;
        }
        let first = u32::try_from(at / CHUNK_BYTES).unwrap_or(u32::MAX);
        let stop = u32::try_from(end.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX);
        let start = u64::from(first) * CHUNK_BYTES;
        let whole_end = (u64::from(stop) * CHUNK_BYTES).min(self.size);
        let files = self.files();
        let (file, map) = files.holder(first);
        if !map.bits.has_all(first, stop) {
            return false;
        }
        EDGES.with_borrow_mut(|edges| {
            edges.resize(2 * len_usize(CHUNK_BYTES), 0);
            let (before, after) = edges.split_at_mut(len_usize(CHUNK_BYTES));
            let before = &mut before[..len_usize(at - start)];
            let after = &mut after[..len_usize(whole_end - end)];
            let mut into = [IoSliceMut::new(before), IoSliceMut::new(target), IoSliceMut::new(after)];
            // No operation has more than a signed 32-bit number of bytes; what is longer reads short here.
            let read = preadv2(file, &mut into, start, ReadWriteFlags::NOWAIT);
            if read != Ok(len_usize(whole_end - start)) {
                return false;
            }
            if !files.is_compared(first) && !self.match_sums(map, first, [before, target, after]) {
                return false;
            }
            if let Some(store) = &self.store {
                let now = store.now();
                for group in first / GROUP_CHUNKS..=(stop - 1) / GROUP_CHUNKS {
                    map.uses.set(group, now);
                }
                self.touched.store(true, Ordering::Relaxed);
            }
            // Given up or lost while it was read, it may have been anything; but it was right.
            true
        })
    }

    /// Whether the chunks from `first` on, which are `pieces` put together, have the checksums that `map` says.
    fn match_sums(&self, map: &ChunkMap, first: u32, pieces: [&mut [u8]; 3]) -> bool {
        let mut index = first;
        let (mut sum, mut left) = (0, chunk_len(self.size, first));
        for piece in pieces {
            let mut rest = &*piece;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(len_usize(left).min(rest.len()));
                sum = checksum::crc32c_append(sum, now);
                left -= len_u64(now.len());
                rest = later;
                if left == 0 {
                    if map.sums.get(index) != sum {
                        return false;
                    }
                    index += 1;
                    (sum, left) = (0, chunk_len(self.size, index));
                }
            }
        }
        true
    }

    /// Chunk `index` was used now: others are given up before it.
    pub(crate) fn touch(&self, index: u32) {
        if let Some(store) = &self.store {
            self.files().map.uses.set(index / GROUP_CHUNKS, store.now());
            self.touched.store(true, Ordering::Relaxed);
        }
    }

    /// Chunks of this layer are to be given up after all others: a single one cannot be fetched again by itself.
    pub(crate) fn mark_costly(&self) {
        self.costly.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_costly(&self) -> bool {
        self.costly.load(Ordering::Relaxed)
    }

    /// Makes room for `len` bytes; none if there is none now.
    fn reserve(&self, len: u64) -> Option<Reservation> {
        match &self.store {
            Some(store) => store.reserve(len),
            None => Some(Reservation::unlimited()),
        }
    }

    /// Writes `chunks`, which lie side by side from chunk `first` on, past the page cache if `direct`; says whether they are there now.
    /// If not, it is for want of room, or of a disk that works, which was said. Waits for the disk.
    pub(crate) fn write(&self, writer: &mut RunWriter, first: u32, chunks: &[&[u8]], direct: bool) -> bool {
        if !self.takes_more() {
            return false;
        }
        let sums: Vec<u32> = chunks.iter().map(|chunk| checksum::crc32c(chunk)).collect();
        let len: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let Some(_reserved) = self.reserve(len_u64(len)) else {
            return false;
        };
        let _layout = lock(&self.layout);
        let files = self.files();
        if self.is_poisoned() || !files.data.is_writable() {
            return false;
        }
        let at = u64::from(first) * CHUNK_BYTES;
        if let Err(error) = writer.write(&files.data, at, chunks, direct) {
            self.failed(&error);
            return false;
        }
        let now = self.store.as_ref().map_or(0, |store| store.now());
        for (index, sum) in (first..).zip(sums) {
            files.map.uses.set(index / GROUP_CHUNKS, now);
            files.map.put(index, sum);
        }
        self.dirty.fetch_add(len_u64(len), Ordering::Relaxed);
        if let Some(store) = &self.store {
            store.worked();
        }
        true
    }

    /// The disk did not take something.
    fn failed(&self, why: &io::Error) {
        match &self.store {
            Some(store) => store.failed(why),
            None if !self.full.swap(true, Ordering::Relaxed) => {
                log::warn!("a temporary file takes no more: {why}; reads go on without it");
            }
            None => {}
        }
    }

    /// Writes bytes that are no whole chunk: the map never speaks of them.
    pub(crate) fn write_part(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let _reserved = self.reserve(len_u64(bytes.len())).ok_or(io::ErrorKind::StorageFull)?;
        let _layout = lock(&self.layout);
        let written = self.files().data.write_all_at(bytes, at);
        written.inspect_err(|error| self.failed(error))
    }

    /// Chunk `index` could not be read back. The map is not to say so any longer, nor that the whole was checked: what comes
    /// in its place was not there then.
    pub(crate) fn lost(&self, index: u32) {
        self.sealed.store(false, Ordering::Relaxed);
        self.dirty.fetch_add(1, Ordering::Relaxed);
        let files = self.files();
        files.map.bits.clear(index);
        if let Some((_, map)) = &files.others {
            map.bits.clear(index);
        }
    }

    /// Whether writing makes sense now. Later it may again.
    pub(crate) fn takes_more(&self) -> bool {
        let resting = self.store.as_ref().is_some_and(|store| store.is_resting());
        !(resting || self.borrowed || self.is_poisoned() || self.full.load(Ordering::Relaxed))
            && self.files().data.is_writable()
    }

    /// Whether the cache is so full that what is written pushes out what readers of other layers have.
    pub(crate) fn is_tight(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.is_tight())
    }

    /// Why nothing is written now, if something is wrong with the disk.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.store.as_ref()?.trouble()
    }

    /// Whether all of the layer is here.
    pub(crate) fn is_whole(&self) -> bool {
        let files = self.files();
        let together = || {
            let others = files.others.as_ref();
            others.is_some_and(|(_, map)| map.bits.count_set() > 0) && (0..self.count).all(|index| self.has(index))
        };
        !self.is_poisoned() && (files.map.bits.is_full() || together())
    }

    /// Shows all of the layer, chunk by chunk, until `show` says that it is enough. A chunk that cannot be read, or is not what was
    /// written, is shown as `None`. Waits for the disk.
    pub(crate) fn read_whole(&self, show: &mut dyn FnMut(u32, Option<&[u8]>) -> bool) {
        let mut buffer = Vec::with_capacity(len_usize(CHUNK_BYTES));
        for index in 0..self.count {
            let right = self.read_chunk(index, &mut buffer);
            if !show(index, right.then_some(&buffer)) {
                break;
            }
        }
    }

    /// Reads a chunk into `buffer`; whether it could be read and is what was written. Waits for the disk.
    pub(crate) fn read_chunk(&self, index: u32, buffer: &mut Vec<u8>) -> bool {
        buffer.resize(len_usize(chunk_len(self.size, index)), 0);
        let files = self.files();
        let (file, map) = files.holder(index);
        let read = file.file().read_exact_at(buffer, u64::from(index) * CHUNK_BYTES);
        read.is_ok() && (self.borrowed || map.matches(index, buffer))
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
        let Some(store) = &self.store else { return };
        let _no_map_is_written_now = lock(&store.committing);
        let (dir, files) = (store.dir(), self.files());
        if files.named && files.data.is_called(&dir, &data_name(&self.key)) {
            for name in [map_name(&self.key), data_name(&self.key)] {
                if let Err(error) = dir.remove(&name) {
                    log::warn!("{name}: cannot remove a poisoned cache: {error}");
                }
            }
        }
    }

    /// Bytes written that the map does not know of yet.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Bytes of the layer that are here.
    #[must_use]
    pub fn bytes_held(&self) -> u64 {
        let files = self.files();
        let full = files.map.bits.count_set() * CHUNK_BYTES;
        match self.count.checked_sub(1) {
            Some(last) if files.map.bits.has(last) => full - CHUNK_BYTES + chunk_len(self.size, last),
            _ => full,
        }
    }

    /// Keeps those chunks that lie whole inside `bytes`, which are the layer's from `at` on, as far as there is room. Waits for the
    /// disk.
    pub fn put(&self, at: TarOffset, bytes: &[u8]) {
        const TOGETHER: usize = 32;
        let mut writer = RunWriter::default();
        let mut index = u32::try_from(at.0.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX);
        let chunk = |index: u32| {
            let from = len_usize((u64::from(index) * CHUNK_BYTES).checked_sub(at.0)?);
            let whole = bytes.get(from..)?.get(..len_usize(chunk_len(self.size, index)))?;
            (index < self.count).then_some(whole)
        };
        while let Some(first) = chunk(index) {
            if self.has(index) {
                index += 1;
                continue;
            }
            let mut run = vec![first];
            let mut next = index + 1;
            while run.len() < TOGETHER
                && !self.has(next)
                && let Some(chunk) = chunk(next)
            {
                run.push(chunk);
                next += 1;
            }
            if !self.write(&mut writer, index, &run, false) {
                return;
            }
            index = next;
        }
    }
}
