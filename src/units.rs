//! Positions and lengths, so that a place in the tar cannot be mistaken for a place in the image.
//!
//! Everything is bytes in `u64`. Two coordinate systems meet in this program: *tar space*, the uncompressed tar as its
//! maker wrote it, and *image space*, the block device that the kernel sees. They never mix by accident.

use std::fmt;

/// The block size of every image and device, in bytes. Always 4096: 512-byte blocks do not mount on a device with
/// 4 KiB sectors, and the kernel's page is the unit it asks in.
pub const BLOCK_SIZE: u64 = 4096;

/// The length of a chunk, in bytes of tar space; a layer's last one is shorter. Layers are fetched, verified and cached by the
/// chunk.
///
/// 32 KiB is what one round trip costs to carry on a slow link (20 ms at 13 Mbit/s), holds nine of ten files of a root
/// filesystem whole, and keeps the map of a 100 GB layer at 400 KB. Smaller chunks multiply bookkeeping without saving
/// bytes, since requests are merged anyway; bigger ones fetch neighbours that are not read.
pub const CHUNK_BYTES: u64 = 32 << 10;

/// A position in the uncompressed tar, in bytes from its first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TarOffset(pub u64);

impl TarOffset {
    /// The position `bytes` further on, saturating at the end of the 64-bit space.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// How many bytes lie between `earlier` and this position; zero when `earlier` is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for TarOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A run of bytes in tar space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TarRange {
    /// The first byte.
    pub start: TarOffset,
    /// How many bytes; may be zero.
    pub len: u64,
}

impl TarRange {
    /// The `len` bytes from `start`.
    #[must_use]
    pub const fn new(start: TarOffset, len: u64) -> Self {
        Self { start, len }
    }

    /// The position just past the last byte.
    #[must_use]
    pub const fn end(self) -> TarOffset {
        self.start.plus(self.len)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether `at` is one of its bytes.
    #[must_use]
    pub const fn contains(self, at: TarOffset) -> bool {
        at.0 >= self.start.0 && at.0 - self.start.0 < self.len
    }
}

impl fmt::Display for TarRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start.0, self.len)
    }
}

/// Which of an image's layers, counted from the lowest. A single-layer image has only layer 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u32);

/// A 32-bit index as an index into memory. Arenas keep 32-bit indexes to stay small; Linux machines have at least 32 bits.
#[inline]
pub(crate) fn to_usize(index: u32) -> usize {
    usize::try_from(index).expect("a usize has at least 32 bits")
}

/// A length in memory as the 64-bit number that positions are made of.
pub(crate) fn len_u64(len: usize) -> u64 {
    // On every platform that Linux runs on a usize fits; saturating keeps the function total.
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// A length that is known to fit in memory, as the size of a buffer; saturates where it cannot happen.
#[cfg(feature = "command")]
pub(crate) fn len_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
