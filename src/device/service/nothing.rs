//! What is served of a device that cannot be gone on with. In: its length, and why. Out: an image whose reads all fail, as those of a
//! layer that turned out to be a lie do; never a byte of it.

use std::sync::Arc;

use super::Served;
use crate::cache::Slice;
use crate::device::volume::BlobReader;
use crate::fetch::{FetchError, FetchStats, LayerRange, Located, ReadCallback};
use crate::image::{BlockImage, Origin, Piece};
use crate::units::{BLOCK_SIZE, LayerId, TarOffset};

/// An image of `len` bytes every read of which fails, and says `why`.
pub(super) fn served(len: u64, why: String) -> Served {
    let nothing = Arc::new(Nothing {
        len,
        error: FetchError::NotBuilt { why },
    });
    let stats = FetchStats {
        poisoned: Some(nothing.error.to_string()),
        ..FetchStats::default()
    };
    let image: Arc<dyn BlockImage> = nothing.clone();
    Served {
        image,
        bytes: nothing,
        fetch_stats: Box::new(move || stats.clone()),
        finish: Box::new(|| {}),
        files: None,
        learner: None,
    }
}

#[derive(Debug)]
struct Nothing {
    /// In bytes.
    len: u64,
    error: FetchError,
}

impl BlockImage for Nothing {
    fn len(&self) -> u64 {
        self.len
    }

    fn pieces(&self, block: u64, count: u64, out: &mut Vec<Piece>) {
        out.push(Piece {
            len: count * BLOCK_SIZE,
            origin: Origin::Layer(LayerId(0), TarOffset(block * BLOCK_SIZE)),
        });
    }

    fn fill_metadata(&self, _block: u64, _out: &mut [u8]) {}
}

impl BlobReader for Nothing {
    fn locate(&self, _range: LayerRange) -> Located<'_> {
        Located::Elsewhere
    }

    fn read(&self, _ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
        waiter.complete(Err::<Vec<Slice>, _>(self.error.clone()));
    }

    fn poisoned(&self) -> Option<&FetchError> {
        Some(&self.error)
    }
}
