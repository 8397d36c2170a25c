//! What this process has verified of layers that no device uses now. In: which chunks of a layer's data file were compared with which digests,
//! when the last device that used it is gone. Out: the same, for the next device that holds the layer to the same digests.
//!
//! Invariant: it speaks only of a data file that nobody has written to since: same inode, same length, same times. Whoever writes to it in
//! whatever way changes those; what spoils the bytes below the filesystem does not, and is found out by the checksum that every read is
//! compared with. Nothing of it is ever on disk: what another process verified is not believed, but for a whole layer that the kernel has
//! kept as it was since ([`LayerCache::protect`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::cache::disk::{Bits, FileState, LayerCache, LayerKey};
use crate::index::ChunkDigests;

/// No more memory is taken for it, in bytes; a layer of 10 GiB takes 40 KiB.
const MOST_BYTES: u64 = 8 << 20;
/// What a layer takes beside its bits, in bytes.
const EACH: u64 = 256;

/// What was verified, by layer.
#[derive(Debug, Default)]
pub(super) struct VerifiedChunks(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    by_key: HashMap<LayerKey, Entry>,
    /// Keys, in the order in which they came; each is in `by_key`.
    order: VecDeque<LayerKey>,
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    /// SHA-256 of the digests.
    digests: [u8; 32],
    file: FileState,
    chunks: Bits,
}

impl Entry {
    fn bytes(&self) -> u64 {
        EACH + u64::from(self.chunks.count()).div_ceil(8)
    }
}

impl Remembered {
    fn forget(&mut self, key: LayerKey) -> Option<Entry> {
        let entry = self.by_key.remove(&key)?;
        self.order.retain(|other| *other != key);
        self.bytes -= entry.bytes();
        Some(entry)
    }
}

impl VerifiedChunks {
    /// `chunks` of the layer with this key lie in `cache` and were compared with `digests`. Nothing is remembered of a file that was written
    /// to a moment ago: another write in the same tick of the clock would leave no trace.
    pub(super) fn remember(&self, key: LayerKey, digests: &ChunkDigests, cache: &LayerCache, chunks: Bits) {
        let Some(file) = cache.file_state().filter(FileState::is_settled) else {
            return;
        };
        if chunks.count_set() == 0 {
            return;
        }
        let digests = fingerprint(digests);
        let entry = Entry { digests, file, chunks };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.forget(key);
        if entry.bytes() > MOST_BYTES {
            return;
        }
        all.bytes += entry.bytes();
        all.by_key.insert(key, entry);
        all.order.push_back(key);
        while all.bytes > MOST_BYTES
            && let Some(oldest) = all.order.front().copied()
        {
            all.forget(oldest);
        }
    }

    /// The chunks of that layer that this process has compared with `digests`, as they lie in `cache`, if it remembers any. They
    /// are remembered no longer.
    pub(super) fn recall(&self, key: LayerKey, digests: &ChunkDigests, cache: &LayerCache) -> Option<Bits> {
        let entry = self.0.lock().unwrap_or_else(PoisonError::into_inner).forget(key)?;
        let same = cache.file_state() == Some(entry.file) && fingerprint(digests) == entry.digests;
        same.then_some(entry.chunks)
    }
}

/// The chunks of a layer that were compared with `digests` by whatever process, as they lie in `cache`, and that the kernel has kept since.
/// `count` chunks, all of the layer's, or none.
pub(super) fn kept(digests: &ChunkDigests, cache: &LayerCache, count: u32) -> Option<Bits> {
    let compared = cache.protection()?;
    (compared == fingerprint(digests)).then(|| {
        let all = Bits::new(count);
        all.set_all();
        all
    })
}

/// What tells these digests from others.
pub(super) fn fingerprint(digests: &ChunkDigests) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(digests.tar_len().to_le_bytes());
    for chunk in 0..digests.len() {
        hash.update(digests.digest(chunk).unwrap_or(&[0; 20]));
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests;
