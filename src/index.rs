//! What a layer holds. In: the tar's bytes, or only its headers. Out: entries, and the index file that keeps them.
//!
//! The header parser ([`Parser`]) is push-driven, so one parser serves a local file, a stream and a remote walk: walkers
//! bring bytes and ask where the next ones are needed. Entries go to an [`EntrySink`]: the tree that is being built, an
//! [`IndexBuilder`], a listing, or several of them ([`Tee`]). An [`Index`] hands the same entries out again later.
//!
//! This room must never open a socket, never believe a length before it has checked it, and never panic or allocate
//! without bound on what a tar or an index file says. What a header means is written at [`Parser`]; how the index file
//! is laid out at [`mod@format`] and in docs/index-format.md.

pub mod build;
mod cold;
mod compare;
mod content_pieces;
mod digests;
pub mod entry;
mod error;
pub mod format;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod header;
mod identity;
mod image_archive;
pub mod listing;
mod number;
mod parser;
mod pax;
mod payloads;
mod pieces;
mod reader;
mod rebuild;
mod sink;
mod sparse;
mod summary;
pub mod toc;
pub(crate) mod varint;
pub mod walk;
mod writer;

pub use cold::{ColdDirectory, ColdPart, ColdPiece};
#[cfg(feature = "command")]
pub(crate) use compare::says_the_same;
pub use compare::{Difference, EntryCheck, first_difference};
pub use content_pieces::ContentPieces;
pub use digests::{ChunkDigests, ChunkHasher};
pub use entry::{Entry, InImage, Kind, Segment, Timestamp, Xattr};
pub use error::{ArchiveFault, HeaderFault, IndexError, IndexFault};
pub use identity::LayerIdentity;
pub use image_archive::{ImageArchive, ImageArchiveProbe};
pub use parser::{EndOfArchive, Parser, looks_like_header};
pub use payloads::Payloads;
pub use pieces::{MAX_PIECE, PieceDigests};
pub use reader::{Entries, Index, hot_len, is_index};
pub use rebuild::{Payload, RebuildError, rebuild_tar};
pub use sink::{Collector, EntrySink, Tee};
pub use summary::Summary;
pub use writer::IndexBuilder;

/// The size of tar's blocks: headers are made of them, payloads padded to them.
pub const TAR_BLOCK: u64 = 512;

/// A slice's length as the 64-bit number that positions are made of.
fn len_u64(len: usize) -> u64 {
    // On every platform that Linux runs on a usize fits; saturating keeps the function total.
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// `position` moved up to the next multiple of tar's block size, saturating below the end of the 64-bit space.
const fn align_up(position: u64) -> u64 {
    position.saturating_add(TAR_BLOCK - 1) & !(TAR_BLOCK - 1)
}
