//! One thing that a layer holds, as its headers describe it: the unit between parser, index file and tree.

use std::borrow::Cow;

use crate::units::{TarOffset, TarRange};

/// A point in time as tar and the filesystems hold it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 UTC, rounded towards the past.
    pub secs: i64,
    /// Nanoseconds on top of `secs`, below one thousand million, also for times before 1970.
    pub nanos: u32,
}

/// The kind of file that an entry makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file, sparse or not.
    #[default]
    File,
    /// A directory.
    Directory,
    /// A symbolic link; [`Entry::link`] is its text.
    Symlink,
    /// Another name for the file that [`Entry::link`] names.
    Hardlink,
    /// A character device; whiteouts of overlayfs are 0/0.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// A piece of a file's content: where it lies in the file and where in the tar. Pieces of sparse files are packed back to
/// back in the tar, so neither side is aligned to anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// The position in the tar, in bytes.
    pub tar_offset: TarOffset,
    /// How many bytes; never zero.
    pub len: u64,
}

/// An extended attribute, named as the kernel names it (`user.mime_type`, `security.capability`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    /// Its full name, prefix included.
    pub name: Vec<u8>,
    /// Its value, any bytes.
    pub value: Vec<u8>,
}

/// One entry of a layer. Parser and index reader reuse its buffers from entry to entry, which is why a sink gets `&Entry`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The name exactly as recorded: leading `/` and `./`, `..` and doubled slashes are the tree's business.
    pub path: Vec<u8>,
    /// The kind of file that it makes.
    pub kind: Kind,
    /// Permission bits with set-id and sticky: the low twelve.
    pub mode: u16,
    /// Owner as recorded, which may be below zero or beyond what Linux has: the tree decides what becomes of such ones.
    pub uid: i64,
    /// Group, like `uid`.
    pub gid: i64,
    /// When its content last changed.
    pub mtime: Timestamp,
    /// The file's length in bytes as a reader sees it, holes included. Zero for everything but files.
    pub size: u64,
    /// A symlink's text or a hard link's target, as recorded.
    pub link: Vec<u8>,
    /// Major number of a device.
    pub device_major: u32,
    /// Minor number of a device.
    pub device_minor: u32,
    /// Extended attributes, sorted by name, one per name.
    pub xattrs: Vec<Xattr>,
    /// Where a file's bytes lie: ascending in the file, not overlapping, inside `size`. What no segment covers is zero.
    pub segments: Vec<Segment>,
    /// Its header blocks, extension headers included, payload not.
    pub headers: TarRange,
    /// What containerd reads in the same headers and GNU tar does not; `None` where both read the same, which is nearly
    /// always. The other fields say what GNU tar reads.
    pub in_image: Option<Box<InImage>>,
}

/// What of an [`Entry`] is different when it belongs to a layer of an image, because Go's archive/tar, with which containerd
/// reads layers, reads the same headers otherwise than GNU tar does. What is `None` is the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct InImage {
    /// Its name: a GNU long name goes before a PAX path.
    pub path: Option<Vec<u8>>,
    /// Its link text or target, likewise.
    pub link: Option<Vec<u8>>,
    /// Its owner without what global headers say.
    pub uid: Option<i64>,
    /// Its group, likewise.
    pub gid: Option<i64>,
    /// Its time, likewise.
    pub mtime: Option<Timestamp>,
    /// The type flag for which containerd refuses the layer, while GNU tar extracts a regular file.
    pub refused_type: Option<u8>,
}

impl Entry {
    /// The entry as containerd reads it: this one, with what [`in_image`](Self::in_image) says.
    #[must_use]
    pub fn as_in_image(&self) -> Cow<'_, Self> {
        let Some(other) = &self.in_image else {
            return Cow::Borrowed(self);
        };
        let mut entry = self.clone();
        let InImage {
            path,
            link,
            uid,
            gid,
            mtime,
            refused_type: _,
        } = other.as_ref();
        if let Some(path) = path {
            entry.path.clone_from(path);
        }
        if let Some(link) = link {
            entry.link.clone_from(link);
        }
        entry.uid = uid.unwrap_or(self.uid);
        entry.gid = gid.unwrap_or(self.gid);
        entry.mtime = mtime.unwrap_or(self.mtime);
        Cow::Owned(entry)
    }

    /// How many of its bytes the tar holds: less than `size` for a sparse file, zero for what is no file.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.segments
            .iter()
            .fold(0, |sum, segment| sum.saturating_add(segment.len))
    }

    /// Where its stored bytes lie in the tar: in one piece, right behind its headers, even when it is sparse.
    #[must_use]
    pub fn payload(&self) -> TarRange {
        TarRange::new(self.headers.end(), self.stored_bytes())
    }

    /// Makes it an empty file without a name again, keeping its buffers.
    pub fn clear(&mut self) {
        let Self {
            path,
            link,
            xattrs,
            segments,
            ..
        } = std::mem::take(self);
        *self = Self {
            path,
            link,
            xattrs,
            segments,
            ..Self::default()
        };
        self.path.clear();
        self.link.clear();
        self.xattrs.clear();
        self.segments.clear();
    }
}
