//! The error of building a tree: entries that no Linux filesystem can hold, or that contradict each other.

use crate::excerpt;

/// Why a layer's entries do not make a tree. Every message names the entry; the way out is always the same: such a layer
/// cannot be unpacked by a container runtime either, so it has to be made anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// A name longer than [`NAME_MAX`](super::NAME_MAX).
    #[error("{path}: a name of {len} bytes; Linux allows 255: rename it and make the layer again")]
    NameTooLong {
        /// The entry, shortened.
        path: String,
        /// The name's length in bytes.
        len: usize,
    },
    /// A NUL byte in a name or a link.
    #[error("{path}: a NUL byte in a name or link: the layer is damaged or its maker faulty; make it again")]
    Nul {
        /// The entry.
        path: String,
    },
    /// A file (or device, …) stands where the path needs a directory.
    #[error("{path}: {obstacle} is in the way: it is not a directory; the layer contradicts itself")]
    NotADirectory {
        /// The entry.
        path: String,
        /// The name on the way that is no directory.
        obstacle: String,
    },
    /// Symbolic links that lead round and round, or too far.
    #[error("{path}: more than 255 symbolic links to follow: a loop of links?")]
    TooManyLinks {
        /// The entry.
        path: String,
    },
    /// A hard link whose target is not there (any more).
    #[error("{path}: hard link to {target}, which no entry before it makes: the layer contradicts itself")]
    HardlinkMissing {
        /// The entry.
        path: String,
        /// The target as recorded.
        target: String,
    },
    /// A hard link to a file that, if anything, a lower layer has, while this layer is to stand alone.
    #[error(
        "{path}: hard link to {target}, which is in no entry before it but perhaps in a lower layer: no single layer can hold such a link; use the whole image"
    )]
    HardlinkBelow {
        /// The entry.
        path: String,
        /// The target as recorded.
        target: String,
    },
    /// A whiteout that hides no name, or the directory that it is in or above.
    #[error(
        "{path}: a whiteout without the name that it hides: the layer is damaged or its maker faulty; make it again"
    )]
    Whiteout {
        /// The entry.
        path: String,
    },
    /// Layers that do not come from the lowest up, or a second one where there can be one only. A mistake of the caller.
    #[error("layer {layer} after layer {last}: layers go into a tree in order, and for overlayfs one alone")]
    LayerOrder {
        /// The layer that was begun.
        layer: u32,
        /// The one before it.
        last: u32,
    },
    /// A hard link to its own path, where nothing is.
    #[error("{path}: hard link to itself, and no entry before it makes what it names")]
    HardlinkToItself {
        /// The entry.
        path: String,
    },
    /// A hard link without a target.
    #[error("{path}: hard link that names nothing: the layer is damaged or its maker faulty; make it again")]
    HardlinkToNothing {
        /// The entry.
        path: String,
    },
    /// A hard link to a directory.
    #[error("{path}: hard link to {target}, which is a directory")]
    HardlinkToDirectory {
        /// The entry.
        path: String,
        /// The target as recorded.
        target: String,
    },
    /// A symbolic link with no text, or more than [`LINK_TEXT_MAX`](super::LINK_TEXT_MAX).
    #[error("{path}: symbolic link with a text of {len} bytes; Linux allows 1 to 4095")]
    LinkText {
        /// The entry.
        path: String,
        /// The text's length in bytes.
        len: usize,
    },
    /// A path longer than [`PATH_MAX`](super::PATH_MAX), as recorded or by way of symbolic links.
    #[error("{path}: a path of {len} bytes; Linux allows 4095: shorten it and make the layer again")]
    PathTooLong {
        /// The path's beginning.
        path: String,
        /// Its length in bytes without what cleaning takes away.
        len: usize,
    },
    /// An entry in a layer of an image whose type containerd does not know.
    #[error(
        "{path}: entries of type {:?} cannot be in a layer of an image: container tools refuse it; GNU tar extracts a regular file, and so does this program from a tar by itself",
        char::from(*.flag)
    )]
    UnknownType {
        /// The entry.
        path: String,
        /// Its type flag.
        flag: u8,
    },
    /// Segments that are not what [`Entry::segments`](crate::index::Entry::segments) promises.
    #[error(
        "{path}: its map of stored pieces is not in order or leaves its {size} bytes: the layer or index is damaged"
    )]
    Segments {
        /// The entry.
        path: String,
        /// The file's size in bytes.
        size: u64,
    },
    /// An extended attribute that Linux cannot hold.
    #[error(
        "{path}: extended attribute {name} of {len} bytes; Linux allows names of 1 to 255 and values up to 65536 bytes"
    )]
    Xattr {
        /// The entry.
        path: String,
        /// The attribute.
        name: String,
        /// The value's length in bytes.
        len: usize,
    },
    /// Paths of so many parts that no program made them in good faith.
    #[error("{path}: the layer's paths need millions of directories that it does not have: it is damaged or a bomb")]
    TooManyMissing {
        /// The entry whose path needed one too many.
        path: String,
    },
    /// More than the arena's 32-bit indexes can count.
    #[error(
        "{path}: the layer has more than 4 GiB of names, 1 GiB of extended attributes or 4 billion entries: too much for one tree"
    )]
    TooMuch {
        /// The entry that was one too many.
        path: String,
    },
}

/// The beginning of a long name in a layer as part of a one-line message.
pub(super) fn show_beginning(bytes: &[u8]) -> String {
    const SHOWN: usize = 100;
    let mut shown = show(bytes.get(..SHOWN).unwrap_or(bytes));
    if bytes.len() > SHOWN {
        shown.push('…');
    }
    shown
}

/// A name in a layer as part of a one-line message.
pub(crate) fn show(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "(no name)".to_owned();
    }
    excerpt::of_bytes(bytes)
}
