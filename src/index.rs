//! What a layer holds. In: the tar's bytes, or only its headers. Out: entries, and the index file that keeps them.
//!
//! The header parser is push-driven, so one parser serves a local file, a stream and a remote walk. This room never opens
//! a file or a socket for the parser: walkers bring bytes and ask where the next ones are needed.

pub mod entry;

pub use entry::{Entry, EntrySink, Kind, Segment, Timestamp, Xattr};

/// Why a tar or an index cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The sink of a walk did not take an entry; this is its own error.
    #[error(transparent)]
    Sink(Box<dyn std::error::Error + Send + Sync>),
}
