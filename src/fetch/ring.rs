//! Chunks as buffers for the ring.

use std::sync::Arc;

use tokio_uring::buf::IoBuf;

use super::chunk::Chunk;

/// A chunk on its way to the disk: what the ring reads while it writes the file.
pub(crate) struct ChunkBuffer(pub(crate) Arc<Chunk>);

// SAFETY: the bytes are a `Vec` inside an `Arc` that nothing ever writes to or replaces, so they stay where they are, with
// the same length, as long as this value lives, wherever the value itself is moved.
#[allow(unsafe_code)]
unsafe impl IoBuf for ChunkBuffer {
    fn stable_ptr(&self) -> *const u8 {
        self.0.bytes().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.0.bytes().len()
    }

    fn bytes_total(&self) -> usize {
        self.0.bytes().len()
    }
}
