//! The tree as a filesystem. In: a tree whose files are byte ranges of layers. Out: an image, block by block.
//!
//! Metadata blocks are computed when they are asked for and never all at once; data blocks are only pointed at. This room
//! knows nothing of HTTP, caches or devices, and must stay a pure function: same tree and options, same bits.

use std::fmt;
use std::ops::ControlFlow;

use crate::units::{LayerId, TarOffset, TarRange};

pub mod export;
pub mod ext4;

/// Where a stretch of the image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Computed: ask [`BlockImage::fill_metadata`].
    Metadata,
    /// Zeros: holes, padding behind a file's end, free space.
    Zero,
    /// Bytes of a layer, from this tar position on.
    Layer(LayerId, TarOffset),
}

/// A stretch of the image with one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its length in bytes. Metadata pieces are whole blocks; the others are as long as they are.
    pub len: u64,
    /// The source of its bytes.
    pub origin: Origin,
}

/// A read-only filesystem image that exists only as arithmetic.
pub trait BlockImage: Send + Sync + fmt::Debug {
    /// The image's length in bytes, a multiple of the block size.
    fn len(&self) -> u64;

    /// Whether there is nothing in it; filesystems never are.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the pieces of `count` blocks from `block` on: in order, without gaps, `count` blocks long in all. Blocks past
    /// the end are zero.
    fn pieces(&self, block: u64, count: u64, out: &mut Vec<Piece>);

    /// Computes one block (`out` is exactly a block long) whose origin is [`Origin::Metadata`]. Anything else is zeros.
    fn fill_metadata(&self, block: u64, out: &mut [u8]);
}

/// A file of the image, by its number in tar order; only regular files with stored bytes have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// A directory that files lie in, by a number that means nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectoryId(pub u32);

/// A file's stored bytes: from its first to its last byte in the tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// The file's number.
    pub file: FileId,
    /// The directory of its first name.
    pub directory: DirectoryId,
    /// The layer that holds it.
    pub layer: LayerId,
    /// The range of that layer's tar, in bytes.
    pub range: TarRange,
}

/// What read-ahead may know of the files behind the blocks, without knowing what a filesystem is.
pub trait FileMap: Send + Sync + fmt::Debug {
    /// The file that holds the byte at `at`, if any does.
    fn file_at(&self, layer: LayerId, at: TarOffset) -> Option<StoredFile>;

    /// Visits the other files of `file`'s directory in tar order, starting behind `file` and wrapping round, until told to
    /// stop.
    fn neighbours(&self, file: FileId, visit: &mut dyn FnMut(StoredFile) -> ControlFlow<()>);

    /// The file that `path` leads to, symbolic links followed: from the root when it begins with `/`, else from
    /// `directory`. None when it leads to nothing, or to no file with stored bytes.
    fn resolve(&self, directory: DirectoryId, path: &[u8]) -> Option<StoredFile>;

    /// The file's path by its first name, with a leading slash.
    fn path(&self, file: FileId) -> Option<Vec<u8>>;
}

/// What a tree holds and a filesystem image cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// More blocks than the format counts.
    #[error(
        "the image would be over 16 TiB, the most that ext4 with 32-bit block numbers can hold: mount fewer layers"
    )]
    TooBig {
        /// How many blocks it would have, as far as they were counted.
        blocks: u64,
    },
    /// A file over the format's limit.
    #[error("{path}: a file of {size} bytes; ext4 can hold 17592186040320")]
    FileTooBig {
        /// The file.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A directory over the format's limit.
    #[error("{path}: a directory of {names} names; ext4 can hold 2 GiB of them")]
    DirectoryTooBig {
        /// The directory.
        path: String,
        /// The number of its names.
        names: usize,
    },
    /// A device number beyond Linux's 12 + 20 bits.
    #[error("{path}: device {major}:{minor}; Linux allows up to 4095:1048575")]
    Device {
        /// The device.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// More extended attributes than fit one inode.
    #[error("{path}: {count} extended attributes, more than the 4 KiB that ext4 has for their names")]
    Xattrs {
        /// The path of the inode that has them.
        path: String,
        /// Their number.
        count: usize,
    },
}
