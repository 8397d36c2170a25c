//! What a layer holds, counted.

use serde::Serialize;

use super::entry::{Entry, Kind};

/// Counts over a layer's entries. Headers only are counted; names may repeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// All entries.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Hard links.
    pub hardlinks: u64,
    /// Character and block devices.
    pub devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// The bytes stored for files.
    pub payload_bytes: u64,
    /// The bytes that the files have when read, holes included.
    pub file_bytes: u64,
    /// The header blocks' bytes, extension headers included.
    pub header_bytes: u64,
    /// The tar's length.
    pub tar_bytes: u64,
    /// Whether the tar ends with the zero blocks that should end it.
    pub end_marked: bool,
    /// Whether it ends with one zero block that something else follows: the end for GNU tar, while containerd refuses such
    /// a layer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lone_zero_block: bool,
}

impl Summary {
    /// Counts one entry.
    pub fn count(&mut self, entry: &Entry) {
        self.entries += 1;
        match entry.kind {
            Kind::File => self.files += 1,
            Kind::Directory => self.directories += 1,
            Kind::Symlink => self.symlinks += 1,
            Kind::Hardlink => self.hardlinks += 1,
            Kind::CharDevice | Kind::BlockDevice => self.devices += 1,
            Kind::Fifo => self.fifos += 1,
        }
        self.payload_bytes = self.payload_bytes.saturating_add(entry.stored_bytes());
        self.file_bytes = self.file_bytes.saturating_add(entry.size);
        self.header_bytes = self.header_bytes.saturating_add(entry.headers.len);
    }
}
