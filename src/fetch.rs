//! The bytes that a block needs. In: ranges of layers in tar space. Out: the same ranges as memory, verified as far as the
//! layer allows, or an error with a cause.
//!
//! One fetch thread runs an io_uring runtime and does all that waits: local files, the cache file, the network. Threads
//! that answer the kernel only look ([`Fetcher::locate`]) or leave a request ([`Fetcher::read`]); neither ever blocks. This
//! room knows nothing of inodes: what it needs to know of files it asks a [`FileMap`](crate::image::FileMap).

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::units::{LayerId, TarRange};

/// Bytes of a layer that are in memory, kept there as long as this lives.
#[derive(Clone, Debug)]
pub struct Slice {
    bytes: Arc<[u8]>,
    start: usize,
    len: usize,
}

impl Slice {
    /// The part of it from `start` on, at most `len` bytes long.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        Self { bytes: Arc::clone(&self.bytes), start: self.start + start, len: len.min(self.len - start) }
    }
}

impl From<Vec<u8>> for Slice {
    fn from(bytes: Vec<u8>) -> Self {
        Self { start: 0, len: bytes.len(), bytes: bytes.into() }
    }
}

impl std::ops::Deref for Slice {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

/// Where a range of a layer is right now.
#[derive(Clone, Debug)]
pub enum Located {
    /// In memory: these slices in order, together as long as the range.
    Memory(Vec<Slice>),
    /// In a local file (the layer itself, or its cache file) from this offset on; a reader with a ring of its own may read
    /// it there. The descriptor stays open as long as the fetcher.
    File(RawFd, u64),
    /// Not here, or not all of it in one place: ask [`Fetcher::read`].
    Elsewhere,
}

/// Told when a read ends; called once, on the fetch thread, inside its runtime. Must not block.
pub trait Waiter: Send {
    /// Takes the bytes, range after range in the order asked, or why there are none.
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>);
}

/// A range of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRange {
    /// The layer.
    pub layer: LayerId,
    /// The bytes.
    pub range: TarRange,
}

/// Why a range could not be brought.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {}

/// A handle on the fetch thread. Cheap to clone; the thread ends when the last handle is gone.
#[derive(Clone, Debug)]
pub struct Fetcher {}

impl Fetcher {
    /// Where `range` is now, without waiting, system calls or long locks. Counts as a use of what it finds.
    #[must_use]
    pub fn locate(&self, _range: LayerRange) -> Located {
        unimplemented!()
    }

    /// Leaves a demand read of `ranges` with the fetch thread and returns at once.
    pub fn read(&self, _ranges: Vec<LayerRange>, _waiter: Box<dyn Waiter>) {
        unimplemented!()
    }
}
