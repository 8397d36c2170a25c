//! Room in the disk cache that is being written to. In: bytes, taken of the room that `room` found. Out: the same number, when the files show
//! what was written.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Room that is being written to; given back when the files show it.
#[derive(Debug)]
pub(super) struct Reservation {
    writing: Arc<AtomicU64>,
    bytes: u64,
}

impl Reservation {
    /// `bytes` that are counted in `writing` already, until this is gone.
    pub(super) fn counted(writing: &Arc<AtomicU64>, bytes: u64) -> Self {
        Self {
            writing: Arc::clone(writing),
            bytes,
        }
    }

    /// Room where there is no limit.
    pub(super) fn unlimited() -> Self {
        Self {
            writing: Arc::default(),
            bytes: 0,
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.writing.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}
