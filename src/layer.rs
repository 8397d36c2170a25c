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
//! A gzip member can be entered at any of its deflate blocks by who has the up to 32 KiB that came out before it; a
//! zstd frame only at its beginning. A zstd layer of one frame, as builders make it, therefore has one span, and
//! whoever wants its end has to read it all.
//!
//! This room does not know what a tar is, and does no I/O. It must never believe a length, give out more than the table or its limit says, keep
//! more than a window and a buffer, or panic, whatever the blob holds.

mod decoder;
mod error;
mod event;
mod gzip;
mod indexer;
mod media_type;
mod stream;
pub(crate) mod table;
#[cfg(test)]
mod tests;
pub(crate) mod zstd;

pub use decoder::Decoder;
pub use error::LayerError;
pub use indexer::{Indexer, SPACING, Spans};
pub use media_type::LayerType;
pub use table::{Begins, Span, SpanTable};

/// How a layer's blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    /// Not at all: the blob is the tar.
    Plain,
    /// gzip, one or many members.
    Gzip,
    /// zstd, one or many frames.
    Zstd,
}

impl Coding {
    /// How many bytes [`Coding::of_bytes`] wants to see.
    pub const TELLING: usize = 4;

    /// What a blob's first bytes say. What is neither gzip nor zstd is taken for plain: the tar's parser is the one to
    /// complain.
    #[must_use]
    pub fn of_bytes(first: &[u8]) -> Self {
        let skippable = first.first().is_some_and(|byte| byte & 0xf0 == zstd::SKIPPABLE[0])
            && first.get(1..4) == Some(&zstd::SKIPPABLE[1..]);
        if first.starts_with(&gzip::MAGIC) {
            Self::Gzip
        } else if first.starts_with(&zstd::MAGIC) || skippable {
            Self::Zstd
        } else {
            Self::Plain
        }
    }

    /// What a layer's media type says, if it says something ([`LayerType`]). What the blob is its first bytes tell.
    #[must_use]
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        LayerType::parse(media_type).ok()?.coding
    }

    const fn number(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Plain),
            1 => Some(Self::Gzip),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

impl std::fmt::Display for Coding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}
