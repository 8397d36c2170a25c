//! A layer's headers, wherever the layer is. In: a blob that was found, which is a tar as it is. Out: its entries, in the tar's
//! order, and what the walk cost.
//!
//! Local files are read by [`index::walk`](crate::index::walk); over a network it takes a way of its own (`remote`). Invariant: the
//! parser is never given a byte from another place than it says.

mod error;
mod remote;

pub use error::WalkError;

use crate::http::HttpOptions;
use crate::index::EntrySink;
use crate::index::walk::{Progress, Walked, local};
use crate::source::{Blob, Place};
use crate::units::TarOffset;

/// Takes bytes of the layer that a walk has received anyway, in no particular order, some of them twice.
pub trait Tap {
    /// Takes the bytes from `at` on.
    fn bytes(&mut self, at: TarOffset, bytes: &[u8]);
}

/// Walks the layer's headers and hands its entries to `sink`. Payload that passes anyway goes to `tap`, which local files do not
/// need. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`WalkError`]: what is wrong with the tar, the server or the sink.
pub fn walk<'a>(
    blob: &'a Blob,
    sink: &'a mut dyn EntrySink,
    tap: Option<&'a mut (dyn Tap + 'a)>,
    options: &HttpOptions,
    progress: Progress<'a>,
) -> Result<Walked, WalkError> {
    match &blob.place {
        Place::File(file) => local(&file.open()?, blob.len, sink, progress).map_err(|source| WalkError::Tar {
            name: blob.name.clone(),
            source,
        }),
        Place::Url(_) | Place::Registry(_) => remote::walk(blob, sink, tap, options, progress),
    }
}
