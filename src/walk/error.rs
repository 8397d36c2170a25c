//! Why a layer's headers cannot be read.

use crate::index::IndexError;
use crate::source::SourceError;

/// Why a walk came to no end. No variant holds a password or a query string.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// The bytes cannot be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The tar itself is bad, or the sink refused an entry.
    #[error("{name}: {source}")]
    Tar {
        /// The layer.
        name: String,
        /// What is wrong.
        source: IndexError,
    },
}
