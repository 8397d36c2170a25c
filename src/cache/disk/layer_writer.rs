//! Writing a whole layer whose length is not known yet. In: the tar's bytes, from the first on. Out: a layer in the disk cache that
//! holds all of them, or nothing.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::dir::{CacheFile, SafeDir};
use super::files::{data_name, end_data, map_name, part_name, write_new};
use super::map::{self, About, ChunkMap, Identity, Label};
use super::{DiskCache, DiskCacheError, LayerKey, nonce};
use crate::cache::chunk::chunk_count;
use crate::checksum;
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// How many bytes are written before the disk is told to keep them, so that little is left to wait for at the end.
const SYNC_DISTANCE: u64 = 32 << 20;

/// Writes a whole layer from its first byte to its last. Dropped before [`finish`](Self::finish) it leaves nothing.
#[derive(Debug)]
pub struct LayerWriter {
    store: Arc<DiskCache>,
    dir: SafeDir,
    file: CacheFile,
    /// Until it is a data file.
    part: Option<String>,
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
    fn start(file: &CacheFile) -> io::Result<Self> {
        let file = file.again()?;
        let (orders, inbox) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("tarblk-sync".to_owned())
            .spawn(move || {
                while inbox.recv().is_ok() {
                    // What could not be synced here fails again, and is told, at the end.
                    let _told_later = file.sync();
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
    /// Begins to take a layer in from its first byte, without knowing its length; it has at least `least` bytes. None if it can have
    /// no room.
    ///
    /// # Errors
    /// When no file can be made.
    pub fn begin_layer(self: &Arc<Self>, least: u64) -> Result<Option<LayerWriter>, DiskCacheError> {
        if least > self.limit() {
            return Ok(None);
        }
        let dir = self.dir_in_place()?;
        let part = part_name(&nonce());
        let path = dir.path().join(&part);
        let file = dir.create_file(&part).map_err(DiskCacheError::new(&path, "make"))?;
        // `DiskCache::trim` sees by it that this is not one that a killed process left.
        file.lock();
        let syncer = Syncer::start(&file).map_err(DiskCacheError::new(&path, "start writing"))?;
        Ok(Some(LayerWriter {
            store: Arc::clone(self),
            dir,
            file,
            part: Some(part),
            len: 0,
            unsynced: 0,
            syncer,
            sums: Vec::new(),
            sum: 0,
        }))
    }
}

impl LayerWriter {
    /// Takes the tar's next bytes.
    ///
    /// # Errors
    /// When they cannot be written, or there is no room for them; then this is of no more use.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DiskCacheError> {
        let Some(_reserved) = self.store.reserve(len_u64(bytes.len())) else {
            return Err(self.failed("write", io::Error::other("the cache has no room for all of the layer")));
        };
        let written = self.file.write_all_at(bytes, self.len);
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
            self.sum = checksum::crc32c_append(self.sum, now);
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
        let name_of_data = data_name(&key);
        let taken = self.dir.open_file(&name_of_data).is_ok_and(|other| !other.lock());
        if taken {
            return Ok(());
        }
        let nonce = nonce();
        let about = About {
            sealed: true,
            protection: None,
            label: Label::new(name, identity),
        };
        let identity = Identity { size, key, nonce };
        let ended = end_data(&self.file, &identity).and_then(|()| self.file.sync());
        ended.map_err(|error| self.failed("finish", error))?;
        if !size.is_multiple_of(CHUNK_BYTES) {
            self.sums.push(self.sum);
        }
        let chunks = ChunkMap::new(count);
        let now = self.store.now();
        for (index, sum) in (0..count).zip(&self.sums) {
            chunks.uses.set(index / map::GROUP_CHUNKS, now);
            chunks.put(index, *sum);
        }
        // The old map goes first: it must never speak of the new data, nor the new map of the old.
        let placed = self.dir.remove(&map_name(&key)).and_then(|()| {
            let part = self.part.take().unwrap_or_default();
            self.dir.rename(&part, &name_of_data).inspect_err(|_| {
                self.part = Some(part);
            })
        });
        placed.map_err(|error| self.failed("put in its place", error))?;
        let map = map::encode(&identity, &about, &chunks);
        write_new(&self.dir, &map_name(&key), &map).map_err(|error| self.failed("write the map of", error))
    }

    fn failed(&self, doing: &'static str, error: io::Error) -> DiskCacheError {
        let name = self.part.as_deref().unwrap_or_default();
        DiskCacheError::new(&self.dir.path().join(name), doing)(error)
    }
}

impl Drop for LayerWriter {
    fn drop(&mut self) {
        if let Some(part) = &self.part
            && let Err(error) = self.dir.remove(part)
        {
            log::debug!("cannot remove {part}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::CacheLimit;
    use super::*;

    #[test]
    fn what_was_filled_is_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let bytes: Vec<u8> = (0..5 * CHUNK_BYTES + 77)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        let mut writer = store.begin_layer(0).unwrap().unwrap();
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
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let mut writer = store.begin_layer(0).unwrap().unwrap();
        writer.push(b"half").unwrap();
        drop((writer, store));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_layer_that_is_open_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let open = store.layer(LayerKey::of_content("sha256:abc", 4), 4).unwrap();
        let mut writer = store.begin_layer(0).unwrap().unwrap();
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
