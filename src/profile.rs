//! Learned start-up: what earlier starts of an image read, so that the next one has it before it asks. In: the reads of a start, as
//! they happen. Out: a record of them; from records of several starts a [`Profile`] of a few KB, which says what to fetch, in which
//! order.
//!
//! Pure but for [`StartRecorder`], which threads write to at once: no I/O, no clock. Where profiles are kept is `open`'s business, what is
//! done with them `prefetch`'s. docs/profile-format.md describes the file.
//!
//! Invariant: a profile only orders fetches. What it says is believed of no byte, and whatever is in it, what comes of it is bounded:
//! its entries, and ranges that are clipped to the layers as they are.

mod format;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod model;
mod recorder;
mod run;

pub use format::{MAX_PROFILE_BYTES, ProfileFault};
pub use model::{MOST_ENTRIES, Profile, ProfileEntry, ProfiledLayer};
pub use recorder::{ReadFrom, RecordedRead, RecorderLimits, StartRecorder, Waiting};
pub use run::{FirstTouch, StartRun};

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::digest::hexadecimal;

/// The tar space of a layer, by a digest of what identifies it: layers with the same key have the same bytes at the same offsets, in
/// whatever image and however compressed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProfileKey(pub [u8; 32]);

impl ProfileKey {
    /// The key of what `identity` names: the tar's digest, or whatever else tells it from others.
    #[must_use]
    pub fn of(identity: &str) -> Self {
        Self(Sha256::digest(identity.as_bytes()).into())
    }

    /// What an image of these layers, the lowest first, is known by. That of a single layer is the layer's own.
    #[must_use]
    pub fn of_image(layers: &[Self]) -> Self {
        if let [only] = layers {
            return *only;
        }
        let mut hash = Sha256::new();
        hash.update(b"layers of an image\n");
        for layer in layers {
            hash.update(layer.0);
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for ProfileKey {
    /// 64 hexadecimal digits, fit for a file's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal(&self.0))
    }
}

impl fmt::Debug for ProfileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
