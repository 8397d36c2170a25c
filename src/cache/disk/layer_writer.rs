//! Writing a whole layer whose length is not known yet. In: the tar's bytes, from the first on. Out: a layer in the disk cache that
//! holds all of them, or nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{FlockOperation, flock};

use super::map::{self, ChunkMap, Identity, Label};
use super::{DiskCache, DiskCacheError, LayerCache, LayerKey, nonce};
use crate::cache::chunk::chunk_count;
use crate::digest::hexadecimal;
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// How many bytes are written before the disk is told to keep them, so that little is left to wait for at the end.
const SYNC_DISTANCE: u64 = 32 << 20;

/// How the name of a layer that is not whole yet begins and ends.
const PART: (&str, &str) = ("filling-", ".part");

/// Whether a file of the disk cache is a layer that is not whole yet, or never will be.
pub(super) fn is_part(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(PART.0) && name.ends_with(PART.1))
}

/// Writes a whole layer from its first byte to its last. Dropped before [`finish`](Self::finish) it leaves nothing.
#[derive(Debug)]
pub struct LayerWriter {
    store: Arc<DiskCache>,
    file: tempfile::NamedTempFile,
    len: u64,
    unsynced: u64,
    syncer: Syncer,
    /// CRC-32C of the chunks that have come whole...
    sums: Vec<u32>,
    /// ...and of what has come of the next one.
    sum: u32,
}

/// A thread that waits for the disk while the layer goes on coming. Ends when dropped.
#[derive(Debug)]
struct Syncer {
    orders: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (orders, inbox) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("tarblk-sync".to_owned())
            .spawn(move || {
                while inbox.recv().is_ok() {
                    // What could not be synced here fails again, and is told, at the end.
                    let _told_later = file.sync_data();
                }
            })?;
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Whether it was free to take the order.
    fn order(&self) -> bool {
        self.orders.as_ref().is_some_and(|orders| orders.try_send(()).is_ok())
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic; if it did, the last sync would still say whether the bytes are there.
            let _ended = thread.join();
        }
    }
}

impl DiskCache {
    /// Begins to take a layer in from its first byte, without knowing its length.
    ///
    /// # Errors
    /// When no file can be made.
    pub fn begin_layer(self: &Arc<Self>) -> Result<LayerWriter, DiskCacheError> {
        let failed = DiskCacheError::new(&self.dir, "make a file in it");
        let file = tempfile::Builder::new()
            .prefix(PART.0)
            .suffix(PART.1)
            .tempfile_in(&self.dir)
            .map_err(failed)?;
        // `DiskCache::trim` sees by it that this is not one that a killed process left.
        if let Err(error) = flock(file.as_file(), FlockOperation::NonBlockingLockExclusive) {
            log::debug!("{}: cannot lock it: {error}", file.path().display());
        }
        let syncer = Syncer::start(file.as_file()).map_err(DiskCacheError::new(file.path(), "start writing"))?;
        Ok(LayerWriter {
            store: Arc::clone(self),
            file,
            len: 0,
            unsynced: 0,
            syncer,
            sums: Vec::new(),
            sum: 0,
        })
    }
}

impl LayerWriter {
    /// Takes the tar's next bytes.
    ///
    /// # Errors
    /// When they cannot be written; then this is of no more use.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DiskCacheError> {
        let written = self.file.as_file_mut().write_all(bytes);
        written.map_err(|error| self.failed("write", error))?;
        self.add_up(bytes);
        self.unsynced += len_u64(bytes.len());
        if self.unsynced >= SYNC_DISTANCE && self.syncer.order() {
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Adds `bytes` to the length and to the checksums.
    fn add_up(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = len_usize(CHUNK_BYTES - self.len % CHUNK_BYTES);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            self.sum = crc32c::crc32c_append(self.sum, now);
            self.len += len_u64(now.len());
            if self.len.is_multiple_of(CHUNK_BYTES) {
                self.sums.push(std::mem::take(&mut self.sum));
            }
            bytes = later;
        }
    }

    /// How many bytes it has taken.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has taken none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of the layer has come, and its digest was compared with what `identity` says: from now on the disk cache has it under
    /// that identity, as [`LayerKey::of_content`] takes it, verified; `name` is for people, without secrets. Does nothing when another process has that layer open, which
    /// then goes on with what it has.
    ///
    /// # Errors
    /// When the disk does not keep it.
    pub fn finish(mut self, name: &str, identity: &str) -> Result<(), DiskCacheError> {
        let size = self.len;
        let Some(count) = chunk_count(size) else {
            return Ok(());
        };
        let key = LayerKey::of_content(identity, size).0;
        let path = self.store.dir.join(format!("{}.data", hexadecimal(&key)));
        let taken =
            File::open(&path).is_ok_and(|other| flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
        if taken {
            return Ok(());
        }
        let nonce = nonce();
        let label = Label::new(name, identity);
        let identity = Identity { size, key, nonce };
        let data = self.file.as_file();
        let ended = LayerCache::end_data(data, &identity).and_then(|()| data.sync_data());
        ended.map_err(|error| self.failed("finish", error))?;
        if !size.is_multiple_of(CHUNK_BYTES) {
            self.sums.push(self.sum);
        }
        let chunks = ChunkMap::new(count);
        for (index, sum) in (0..count).zip(&self.sums) {
            chunks.put(index, *sum);
        }
        let map_path = path.with_extension("map");
        // The old map goes first: it must never speak of the new data, nor the new map of the old.
        match fs::remove_file(&map_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DiskCacheError::new(&map_path, "remove the old map")(error));
            }
            _ => {}
        }
        let map = map::encode(&identity, true, &label, &chunks);
        self.file
            .persist(&path)
            .map_err(|error| DiskCacheError::new(&path, "put the layer in its place")(error.error))?;
        let temporary = map_path.with_extension(format!("map.{}", std::process::id()));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&map)?;
            file.sync_data()?;
            fs::rename(&temporary, &map_path)
        };
        write().map_err(DiskCacheError::new(&map_path, "write"))
    }

    fn failed(&self, doing: &'static str, error: io::Error) -> DiskCacheError {
        let path: PathBuf = self.file.path().to_owned();
        DiskCacheError::new(&path, doing)(error)
    }
}

impl LayerCache {
    /// Puts the block behind a whole layer's bytes that ties them to their map.
    pub(super) fn end_data(data: &File, identity: &Identity) -> io::Result<()> {
        let at = identity.size.next_multiple_of(super::TRAILER_BYTES);
        data.set_len(at + super::TRAILER_BYTES)?;
        let mut trailer = super::TRAILER_MAGIC.to_vec();
        trailer.extend_from_slice(&identity.nonce);
        data.write_all_at(&trailer, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path()).unwrap();
        let bytes: Vec<u8> = (0..5 * CHUNK_BYTES + 77)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        let mut writer = store.begin_layer().unwrap();
        for piece in bytes.chunks(10_007) {
            writer.push(piece).unwrap();
        }
        let len = writer.len();
        writer.finish("layer.tar", "sha256:abc").unwrap();
        let cache = store.layer(LayerKey::of_content("sha256:abc", len), len).unwrap();
        assert!(cache.is_whole());
        assert!(cache.is_sealed(), "it was digested while it passed");
        let mut back = Vec::new();
        cache.read_whole(&mut |_, chunk| {
            back.extend_from_slice(chunk.unwrap());
            true
        });
        assert!(back == bytes);
        drop(cache);
        assert_eq!(
            store
                .layer(LayerKey::of_content("sha256:other", len), len)
                .unwrap()
                .bytes_held(),
            0
        );
    }

    #[test]
    fn what_was_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path()).unwrap();
        let mut writer = store.begin_layer().unwrap();
        writer.push(b"half").unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_layer_that_is_open_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path()).unwrap();
        let open = store.layer(LayerKey::of_content("sha256:abc", 4), 4).unwrap();
        let mut writer = store.begin_layer().unwrap();
        writer.push(b"full").unwrap();
        writer.finish("layer.tar", "sha256:abc").unwrap();
        assert_eq!(open.bytes_held(), 0);
        drop(open);
        assert_eq!(
            store
                .layer(LayerKey::of_content("sha256:abc", 4), 4)
                .unwrap()
                .bytes_held(),
            0
        );
    }
}
