//! How long a layer may be. In: what a person allows, and a blob. Out: the most that its tar may have in bytes, which bounds the
//! time and the disk that hostile input costs.

use super::OpenError;
use super::prepared::PreparedLayer;
use crate::index::IndexError;
use crate::layer::{Coding, LayerError};
use crate::source::Blob;

/// The most that is decoded or downloaded of a layer by default: the largest that are known, of models and their weights, have
/// half of it, and reading it takes a quarter of an hour.
const LONGEST: u64 = 256 << 30;
/// How much a small blob may decode to: a file system image, a database or a log that was made long ahead of need is zeros, in
/// sparse files as in others, and those of a few gigabytes are in layers.
const ALWAYS: u64 = 4 << 30;
/// Beyond that a layer has to bring something for what it decodes to: real ones are compressed to a fifth or a tenth, source
/// code and logs to a hundredth. gzip packs at most 1032 to one, zstd 30,000.
const RATIO: u64 = 256;

/// The bound on a layer's length. What a person says takes the place of all that holds by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeLimit(Option<u64>);

impl SizeLimit {
    /// No more than `bytes` bytes of a tar, however small its blob is.
    #[must_use]
    pub const fn of(bytes: u64) -> Self {
        Self(Some(bytes))
    }

    /// For a layer whose length is known: that of the default, or so many bytes of the tar if that is more.
    #[must_use]
    pub fn at_least(bytes: u64) -> Self {
        Self(Some(bytes.max(LONGEST)))
    }

    /// The most that may come out of a blob, all of which is read.
    pub(super) fn of_decoded(self, coding: Coding, blob_len: u64) -> u64 {
        let by_ratio = match coding {
            Coding::Plain => u64::MAX,
            Coding::Gzip | Coding::Zstd => ALWAYS.saturating_add(blob_len.saturating_mul(RATIO)),
        };
        self.0.unwrap_or_else(|| by_ratio.min(LONGEST))
    }

    /// Whether a blob may be as long as it is said to be. `is_read` says that all of it will be read; of a tar whose headers are
    /// read the length costs nothing, and only a person limits it.
    ///
    /// # Errors
    /// [`OpenError::TooLong`].
    pub(super) fn check_blob(self, blob: &Blob, is_read: bool) -> Result<(), OpenError> {
        let most = self.0.unwrap_or(if is_read { LONGEST } else { u64::MAX });
        if blob.len <= most {
            return Ok(());
        }
        Err(Self::too_long(blob, most))
    }

    /// Whether a layer may be as long as its index says, however that came to be.
    ///
    /// # Errors
    /// [`OpenError::TooLong`].
    pub(super) fn check(self, layer: &PreparedLayer) -> Result<(), OpenError> {
        let blob = &layer.layer.blob;
        let most = match layer.coding() {
            Coding::Plain => self.0.unwrap_or(u64::MAX),
            coding => self.of_decoded(coding, blob.len),
        };
        if layer.index.summary().tar_bytes <= most {
            return Ok(());
        }
        Err(Self::too_long(blob, most))
    }

    fn too_long(blob: &Blob, most: u64) -> OpenError {
        OpenError::TooLong {
            name: blob.name.clone(),
            most,
            blob_len: blob.len,
        }
    }

    /// The error of reading a blob: that it is too long in these words, all others in theirs.
    pub(super) fn explain(blob: &Blob, error: IndexError) -> OpenError {
        match error {
            IndexError::Layer(LayerError::TooLong { limit, .. }) => Self::too_long(blob, limit),
            source => OpenError::Tar {
                name: blob.name.clone(),
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_grows_with_the_blob() {
        let limit = SizeLimit::default();
        assert_eq!(limit.of_decoded(Coding::Zstd, 0), 4 << 30);
        assert_eq!(limit.of_decoded(Coding::Zstd, 656 << 10), (4 << 30) + (164 << 20));
        assert_eq!(limit.of_decoded(Coding::Gzip, 100 << 20), 29 << 30);
        assert_eq!(limit.of_decoded(Coding::Gzip, 2 << 30), 256 << 30);
        assert_eq!(limit.of_decoded(Coding::Gzip, u64::MAX), 256 << 30);
        assert_eq!(limit.of_decoded(Coding::Plain, 1), 256 << 30);
        let allowed = SizeLimit::of(1 << 50);
        assert_eq!(allowed.of_decoded(Coding::Zstd, 1), 1 << 50);
        assert_eq!(SizeLimit::of(0).of_decoded(Coding::Plain, 1), 0);
    }
}
