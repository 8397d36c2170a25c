//! The index file's layout: what the writer and the reader share. docs/index-format.md describes it for everybody else.
//!
//! ```text
//! prologue   magic, version, number of sections, checksum of prologue and table
//! table      one record a section: kind, flags, encoding, place, sizes, checksum
//! sections   back to back, what every reader needs first
//! ```
//!
//! All fixed-width numbers are little-endian. Entries are kept in batches, a column for each property, the columns of all
//! batches in one zstd frame, so that both directions stream.

use super::entry::{Kind, Xattr};
use super::error::IndexFault;
use super::summary::Summary;

/// How an index file begins. The high bit and the line ends tell of transfers that took it for text.
pub const MAGIC: [u8; 8] = *b"\x89tbi\r\n\x1a\n";

/// The version that this program writes and reads.
pub const VERSION: u16 = 1;

/// Prologue: magic, version, section count, CRC-32C.
pub(super) const PROLOGUE: usize = 16;
/// A record of the section table.
pub(super) const RECORD: usize = 40;
/// More sections than these no version of the format will have.
pub(super) const MAX_SECTIONS: usize = 64;

/// Section kinds.
pub(super) const SUMMARY: u32 = 1;
pub(super) const ENTRIES: u32 = 2;

/// A reader that does not know a section with this flag must not use the file.
pub(super) const REQUIRED: u16 = 1;

/// Section encodings.
pub(super) const RAW: u16 = 0;
pub(super) const ZSTD: u16 = 1;

/// A batch is closed when it has this many entries …
pub(super) const BATCH_ENTRIES: usize = 2048;
/// … or its columns together reach this many bytes.
pub(super) const BATCH_BYTES: usize = 1 << 20;
/// No batch is longer than this: the bound above and one entry of the largest that a parser makes.
pub(super) const MAX_BATCH: u64 = 64 << 20;

/// The entries' zstd frame uses a window of at most this many bytes (as a power of two).
pub(super) const WINDOW_LOG: u32 = 21;

/// How many sets of owner and mode, and how many sets of extended attributes, a file can name by number.
pub(super) const MAX_OWNERS: usize = 1 << 16;
pub(super) const MAX_XATTR_SETS: usize = 1 << 12;
/// The most that the numbered sets weigh together; a set that would exceed it gets no number.
pub(super) const MAX_XATTR_WEIGHT: usize = 4 << 20;

/// What a set of attributes counts for against [`MAX_XATTR_WEIGHT`].
pub(super) fn xattr_weight(xattrs: &[Xattr]) -> usize {
    xattrs
        .iter()
        .map(|xattr| 64 + xattr.name.len() + xattr.value.len())
        .sum()
}
/// How many recent times an entry can refer back to.
pub(super) const RECENT_TIMES: usize = 32;

/// An entry's tag: its kind in the low three bits, then these.
pub(super) const TAG_KIND: u8 = 0b0000_0111;
/// Its headers do not begin where the payload before ended, or are not one block long.
pub(super) const TAG_PLACED: u8 = 0b0000_1000;
/// It is a file with a map of segments.
pub(super) const TAG_SPARSE: u8 = 0b0001_0000;
/// It has extended attributes.
pub(super) const TAG_XATTRS: u8 = 0b0010_0000;
/// It has a link text though it is no link, or device numbers though it is no device, or a size though it is no file.
pub(super) const TAG_UNUSED: u8 = 0b1100_0000;

/// The columns of a batch, in their order.
#[derive(Debug, Default)]
pub(super) struct Columns<T> {
    /// A byte an entry.
    pub(super) tags: T,
    /// The owners' numbers.
    pub(super) owners: T,
    /// Owners that are new.
    pub(super) new_owners: T,
    /// How many bytes of the name are those of the name before.
    pub(super) shared: T,
    /// How many bytes are new.
    pub(super) fresh: T,
    /// The new bytes.
    pub(super) names: T,
    /// References to recent times.
    pub(super) times: T,
    /// Times that are new.
    pub(super) new_times: T,
    /// Files' sizes.
    pub(super) sizes: T,
    /// Links' texts, front-coded as names are.
    pub(super) links: T,
    /// All that is rare: places, device numbers, attributes, segments.
    pub(super) rare: T,
}

/// How many columns there are.
pub(super) const COLUMNS: usize = 11;

impl<T> Columns<T> {
    /// All columns in their order.
    pub(super) fn each_mut(&mut self) -> [&mut T; COLUMNS] {
        [
            &mut self.tags,
            &mut self.owners,
            &mut self.new_owners,
            &mut self.shared,
            &mut self.fresh,
            &mut self.names,
            &mut self.times,
            &mut self.new_times,
            &mut self.sizes,
            &mut self.links,
            &mut self.rare,
        ]
    }
}

/// The kinds by their numbers in tags.
pub(super) const KINDS: [Kind; 7] = [
    Kind::File,
    Kind::Directory,
    Kind::Symlink,
    Kind::Hardlink,
    Kind::CharDevice,
    Kind::BlockDevice,
    Kind::Fifo,
];

/// A kind's number in tags.
pub(super) fn kind_number(kind: Kind) -> u8 {
    match kind {
        Kind::File => 0,
        Kind::Directory => 1,
        Kind::Symlink => 2,
        Kind::Hardlink => 3,
        Kind::CharDevice => 4,
        Kind::BlockDevice => 5,
        Kind::Fifo => 6,
    }
}

/// One record of the section table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SectionRecord {
    pub(super) kind: u32,
    pub(super) flags: u16,
    pub(super) encoding: u16,
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// Its length in the file.
    pub(super) stored: u64,
    /// Its length when decoded.
    pub(super) decoded: u64,
    /// Of the stored bytes.
    pub(super) crc: u32,
}

impl SectionRecord {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.kind.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&self.encoding.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.stored.to_le_bytes());
        out.extend_from_slice(&self.decoded.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    pub(super) fn decode(record: &[u8]) -> Result<Self, IndexFault> {
        let mut fields = Fields(record);
        Ok(Self {
            kind: fields.u32()?,
            flags: fields.u16()?,
            encoding: fields.u16()?,
            offset: fields.u64()?,
            stored: fields.u64()?,
            decoded: fields.u64()?,
            crc: fields.u32()?,
        })
    }
}

/// Little-endian numbers from the front of a slice.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], IndexFault> {
        let (head, rest) = self.0.split_first_chunk().ok_or(IndexFault::Truncated)?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, IndexFault> {
        self.array().map(|bytes| u16::from_le_bytes(*bytes))
    }

    pub(super) fn u32(&mut self) -> Result<u32, IndexFault> {
        self.array().map(|bytes| u32::from_le_bytes(*bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, IndexFault> {
        self.array().map(|bytes| u64::from_le_bytes(*bytes))
    }
}

/// The summary section: counts, the end mark, and the SHA-256 of the decoded entries.
pub(super) fn encode_summary(summary: &Summary, digest: &[u8; 32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    for number in [
        summary.tar_bytes,
        summary.entries,
        summary.files,
        summary.directories,
        summary.symlinks,
        summary.hardlinks,
        summary.devices,
        summary.fifos,
        summary.payload_bytes,
        summary.file_bytes,
        summary.header_bytes,
        u64::from(summary.end_marked),
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(digest);
    out
}

/// Reads the summary section; later versions may append to it.
pub(super) fn decode_summary(section: &[u8]) -> Result<(Summary, [u8; 32]), IndexFault> {
    let mut fields = Fields(section);
    let summary = Summary {
        tar_bytes: fields.u64()?,
        entries: fields.u64()?,
        files: fields.u64()?,
        directories: fields.u64()?,
        symlinks: fields.u64()?,
        hardlinks: fields.u64()?,
        devices: fields.u64()?,
        fifos: fields.u64()?,
        payload_bytes: fields.u64()?,
        file_bytes: fields.u64()?,
        header_bytes: fields.u64()?,
        end_marked: fields.u64()? & 1 != 0,
    };
    Ok((summary, *fields.array()?))
}
