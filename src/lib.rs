//! A container layer attached as a Linux block device before it has been downloaded.
//!
//! A tar layer's headers say where every byte of its files lies. From the headers alone this crate computes a read-only
//! filesystem image whose data extents are byte ranges of the layer, offers it to the kernel as a block device, and
//! fetches ranges of the layer only when the kernel reads them.
//!
//! The library is the half of that which needs neither network nor kernel: tar headers, the index that keeps them, entry
//! points into gzip and zstd, directory trees and ext4 images. It is all there is without the default feature `command`,
//! which adds the `tarblk` command.
//!
//! # From a tar to a filesystem
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::os::unix::fs::FileExt as _;
//! use tarblk::{BlockImage as _, Ext4Image, Ext4Options, Origin, TreeBuilder, walk_headers};
//!
//! // A tar with one file, of 5 bytes.
//! let mut tar = tar::Builder::new(tempfile::tempfile()?);
//! let mut header = tar::Header::new_gnu();
//! header.set_size(5);
//! header.set_mode(0o644);
//! tar.append_data(&mut header, "greeting", &b"hello"[..])?;
//! let tar = tar.into_inner()?;
//!
//! // Only its headers are read for the layout.
//! let mut builder = TreeBuilder::new();
//! walk_headers(&tar, tar.metadata()?.len(), &mut builder, &mut |_, _| ())?;
//! let image = Ext4Image::plan(builder.finish(), &Ext4Options::default())?;
//!
//! // Blocks are computed when they are asked for; those with the files' data point into the tar.
//! let mut pieces = Vec::new();
//! image.pieces(0, image.len() / tarblk::BLOCK_SIZE, &mut pieces);
//! let stored: Vec<_> = pieces.iter().filter(|it| matches!(it.origin, Origin::Layer(..))).collect();
//! let [piece] = stored[..] else { panic!("one file, so one piece of the tar") };
//! let Origin::Layer(_, at) = piece.origin else { unreachable!() };
//! let mut content = [0; 5];
//! tar.read_exact_at(&mut content, at.0)?;
//! assert_eq!(&content, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! `examples/tar_to_ext4.rs` writes such an image into a file with [`export`].
//!
//! # Where to begin
//!
//! | to | begin at |
//! |---|---|
//! | read headers | [`walk_headers`] for a file, [`Parser`] for bytes from anywhere; both feed an [`EntrySink`] |
//! | keep what they say | [`IndexBuilder`] or, with digests and entry points, [`BlobRecorder`]; [`Index`] reads the file |
//! | read the middle of a compressed layer | [`Indexer`] once over the blob, then [`Decoder`] |
//! | merge an image's layers | [`TreeBuilder`] with [`TreeMode::Merged`] |
//! | have blocks | [`Ext4Image`], a [`BlockImage`] |

// Invariant: rooms are private; what a user of the library needs is re-exported below. With `unstable-internals`, under which
// everything is linted, all of it is reachable for tests; without it these lints would name each item that only rooms or
// tests use.
#![cfg_attr(
    not(feature = "unstable-internals"),
    allow(dead_code, unused_imports, unreachable_pub)
)]
// What is re-exported names no type that is not.
#![cfg_attr(not(feature = "unstable-internals"), warn(unnameable_types))]

mod checksum;
mod diff;
mod digest;
mod excerpt;
mod image;
mod index;
mod layer;
mod tree;
mod units;

#[cfg(feature = "command")]
mod bench;
#[cfg(feature = "command")]
mod cache;
#[cfg(feature = "command")]
mod commands;
#[cfg(feature = "command")]
mod container;
#[cfg(feature = "command")]
mod device;
#[cfg(feature = "command")]
mod fetch;
#[cfg(feature = "command")]
mod http;
#[cfg(feature = "command")]
mod interrupt;
#[cfg(feature = "command")]
mod mount;
#[cfg(feature = "command")]
mod open;
#[cfg(feature = "command")]
mod owned;
#[cfg(feature = "command")]
mod page;
#[cfg(feature = "command")]
mod podman;
#[cfg(feature = "command")]
mod prefetch;
#[cfg(feature = "command")]
mod profile;
#[cfg(feature = "command")]
mod quantity;
#[cfg(feature = "command")]
mod snapshotter;
#[cfg(feature = "command")]
mod source;
#[cfg(feature = "command")]
mod walk;

/// Runs the `tarblk` command on this process's arguments: all that `src/main.rs` does.
#[cfg(feature = "command")]
pub use commands::main as run_command;
pub use digest::{Algorithm, Digest, Hasher, NotADigest};
pub use image::export::{ReadLayer, export};
pub use image::ext4::{Ext4Image, Ext4Options};
pub use image::{BlockImage, DirectoryId, FileId, FileMap, ImageError, Origin, Piece, StoredFile};
pub use index::build::{BlobRecorded, BlobRecorder, Contents, Recorded, Recorder};
pub use index::walk::{Progress, Walked, local as walk_headers};
pub use index::{
    ArchiveFault, ChunkDigests, ColdDirectory, ColdPart, ColdPiece, Collector, EndOfArchive, Entries, Entry, EntrySink,
    HeaderFault, InImage, Index, IndexBuilder, IndexError, IndexFault, Kind, LayerIdentity, MAX_PIECE, Parser, Payload,
    PieceDigests, RebuildError, Segment, Summary, Tee, Timestamp, Xattr, hot_len, is_index, looks_like_header,
    rebuild_tar,
};
pub use layer::{Begins, Coding, Decoder, Indexer, LayerError, LayerType, Span, SpanTable, Spans};
pub use tree::{
    Child, Content, LINK_TEXT_MAX, NAME_MAX, Node, NodeId, NodeKind, PATH_MAX, Tree, TreeBuilder, TreeError, TreeMode,
    XattrSetId, Xattrs,
};
pub use units::{BLOCK_SIZE, CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// Every room with all that is public in it, for this project's own tests, benchmarks, examples and fuzz targets. It changes
/// with every version, also smaller ones: nothing outside of this repository may use it.
#[cfg(feature = "unstable-internals")]
pub mod internals {
    /// Opens rooms by their names.
    macro_rules! rooms {
        ($($(#[$gate:meta])* $room:ident)*) => {$(
            $(#[$gate])*
            #[doc = concat!("All that is public in the room `", stringify!($room), "`.")]
            pub mod $room {
                pub use crate::$room::*;
            }
        )*};
    }

    rooms! { diff digest image index layer tree units }
    rooms! {
        #[cfg(feature = "command")] bench
        #[cfg(feature = "command")] cache
        #[cfg(feature = "command")] commands
        #[cfg(feature = "command")] container
        #[cfg(feature = "command")] device
        #[cfg(feature = "command")] fetch
        #[cfg(feature = "command")] http
        #[cfg(feature = "command")] interrupt
        #[cfg(feature = "command")] mount
        #[cfg(feature = "command")] open
        #[cfg(feature = "command")] owned
        #[cfg(feature = "command")] podman
        #[cfg(feature = "command")] prefetch
        #[cfg(feature = "command")] profile
        #[cfg(feature = "command")] quantity
        #[cfg(feature = "command")] snapshotter
        #[cfg(feature = "command")] source
        #[cfg(feature = "command")] walk
    }
}
