//! How a layer is compressed, and how its middle is read without its beginning.
//!
//! In: the bytes of a blob as they come, or of a range of it, and a table. Out: the tar's bytes, and the table
//! ([`SpanTable`]): the places from which the blob can be decoded. Every position that the rooms behind this one know
//! is one in the uncompressed tar.
//!
//! ```text
//! the whole blob, once ──> Indexer ──> the tar's bytes, SpanTable, histories
//! a range of the blob, a span's history ──> Decoder ──> the tar's bytes from that span on
//! ```
//!
//! A gzip member can be entered at any of its deflate blocks by who has the up to 32 KiB that came out before it. A zstd frame can
//! be entered at any of its blocks by who has the tables and offsets that a decoder holds there, and of the megabytes that came out
//! before it those bytes that the blocks up to the next entry copy: few, if the block is chosen well.
//!
//! This room does not know what a tar is, and does no I/O. It must never believe a length, give out more than the table or its limit says, keep
//! more than a window and a buffer, or panic, whatever the blob holds.

mod coding;
mod decoder;
mod error;
mod event;
mod gzip;
mod indexer;
pub(crate) mod magic;
mod media_type;
mod number;
mod stream;
pub(crate) mod table;
#[cfg(test)]
mod tests;
mod zstd;

pub use coding::Coding;
pub(crate) use coding::other_format;
pub use decoder::Decoder;
pub use error::LayerError;
pub use indexer::{Indexer, Spans};
pub use media_type::LayerType;
pub use table::{Begins, Span, SpanTable};
