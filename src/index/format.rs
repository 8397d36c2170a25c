//! The index file's layout: what the writer and the reader share. docs/index-format.md describes it for everybody else.
//!
//! ```text
//! prologue   magic, version, number of sections, checksum of prologue and table, length of the hot part
//! table      one record a section: kind, flags, encoding, place, sizes, checksum
//! sections   back to back: first the hot ones, which every reader needs, then the cold ones, read by range
//! ```
//!
//! All fixed-width numbers are little-endian. Entries are kept in batches, a column for each property, the columns of all
//! batches in one zstd frame, so that both directions stream.

use super::entry::{Kind, Xattr};
use super::error::IndexFault;
use super::len_u64;
use super::summary::Summary;
use crate::checksum;

/// How an index file begins. The high bit and the line ends tell of transfers that took it for text.
pub const MAGIC: [u8; 8] = *b"\x89tbi\r\n\x1a\n";

/// The version that this program writes and reads.
pub const VERSION: u16 = 1;

/// Prologue: magic, version, section count, CRC-32C, length of the hot part.
pub(super) const PROLOGUE: usize = 24;
/// Where the checksum of prologue and table lies in the prologue; it covers everything but itself.
pub(super) const CRC_AT: usize = 12;
/// No hot part is longer: more than a hundred million entries. What says it is longer is not read.
pub(super) const MAX_HOT: u64 = 1 << 30;
/// A record of the section table.
pub(super) const RECORD: usize = 40;
/// More sections than these no version of the format will have.
pub(super) const MAX_SECTIONS: usize = 64;

/// Section kinds.
pub(super) const SUMMARY: u32 = 1;
pub(super) const ENTRIES: u32 = 2;
pub(super) const LAYER: u32 = 3;
pub(super) const CHUNK_DIGESTS: u32 = 4;
pub(super) const SPANS: u32 = 5;
pub(super) const COLD_DIRECTORY: u32 = 6;
pub(super) const PIECE_DIGESTS: u32 = 7;
pub(super) const IN_IMAGE: u32 = 8;
pub(super) const BLOCKS: u32 = 9;
pub(super) const WINDOWS: u32 = 16;
pub(super) const PAYLOAD_DIGESTS: u32 = 17;
pub(super) const HEADERS: u32 = 18;
pub(super) const BLOCK_WINDOWS: u32 = 19;
pub(super) const CONTENT_PIECES: u32 = 20;

/// A reader that does not know a section with this flag must not use the file.
pub(super) const REQUIRED: u16 = 1;
/// A section that is not part of the hot part.
pub(super) const COLD: u16 = 2;

/// Section encodings.
pub(super) const RAW: u16 = 0;
pub(super) const ZSTD: u16 = 1;
/// Pieces, each a zstd frame of its own, which the cold directory lists.
pub(super) const ZSTD_PIECES: u16 = 2;

/// How many bytes of a SHA-256 are kept of chunks and of the cold part's pieces: 160 bits, for
/// which no second input can be found.
pub(super) const DIGEST: usize = 20;
/// How many bytes a piece of the header bytes has before compression, all but the last; and what no piece exceeds.
pub(super) const PIECE: usize = 1 << 20;
/// A piece of payload digests is this long, all but the last.
pub(super) const DIGESTS_PIECE: usize = 64 << 10;
/// A content piece's record in bytes: its length in 4, and its short digest.
pub(super) const PIECE_RECORD: usize = 4 + DIGEST;
/// A piece of the content pieces is this long, all but the last: 2,730 records.
pub(super) const RECORDS_PIECE: usize = 2730 * PIECE_RECORD;
/// Decoded span tables are not longer than this.
pub(super) const MAX_SPANS: u64 = 256 << 20;
/// The longest text in the layer section.
pub(super) const MAX_TEXT: u64 = 512;

/// What a section is called in messages.
pub(super) fn section_name(kind: u32) -> &'static str {
    match kind {
        SUMMARY => "summary",
        ENTRIES => "entry table",
        LAYER => "layer section",
        CHUNK_DIGESTS => "table of chunk digests",
        SPANS => "span table",
        COLD_DIRECTORY => "cold directory",
        PIECE_DIGESTS => "table of piece digests",
        IN_IMAGE => "table of what images read otherwise",
        BLOCKS => "table of blocks",
        BLOCK_WINDOWS => "windows of blocks",
        WINDOWS => "decoder windows",
        PAYLOAD_DIGESTS => "payload digests",
        HEADERS => "header bytes",
        CONTENT_PIECES => "content pieces",
        _ => "section",
    }
}

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

/// What is different for an entry that containerd reads otherwise: which fields a record of that table has, in this order.
pub(super) const OTHER_PATH: u64 = 1;
pub(super) const OTHER_LINK: u64 = 2;
pub(super) const OTHER_UID: u64 = 4;
pub(super) const OTHER_GID: u64 = 8;
pub(super) const OTHER_MTIME: u64 = 16;
pub(super) const REFUSED_TYPE: u64 = 32;
/// The longest name or target in it: what an extension header can hold.
pub(super) const MAX_OTHER_TEXT: u64 = 1 << 20;
/// How many bytes may lie unaccounted for before an entry's headers until it must be assumed that a global header is among
/// them: it takes a block and one of content at least.
pub(super) const GLOBAL_HEADER: u64 = 1024;

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

/// The section table, checked.
#[derive(Clone, Debug)]
pub(super) struct SectionTable {
    pub(super) records: Vec<SectionRecord>,
    /// Where the cold part begins.
    pub(super) hot_len: u64,
    /// How long the whole file is.
    pub(super) file_len: u64,
}

/// How long the hot part is, from the prologue; `None` when that has not come yet. Only the magic and the version are checked.
pub(super) fn hot_len(prefix: &[u8]) -> Result<Option<u64>, IndexFault> {
    let known = prefix.len().min(MAGIC.len());
    if prefix[..known] != MAGIC[..known] {
        return Err(IndexFault::Magic);
    }
    let Some(prologue) = prefix.first_chunk::<PROLOGUE>() else {
        return Ok(None);
    };
    let mut fields = Fields(&prologue[MAGIC.len()..]);
    let version = fields.u16()?;
    if version != VERSION {
        let known = VERSION;
        return Err(IndexFault::Version { found: version, known });
    }
    let (_count, _crc, hot) = (fields.u16()?, fields.u32()?, fields.u64()?);
    if hot > MAX_HOT {
        return Err(IndexFault::TooLarge("hot part"));
    }
    Ok(Some(hot))
}

impl SectionTable {
    /// Reads it from the file's first bytes and checks it: known version, right checksum, sections one behind the other, the
    /// hot ones first, none of them twice.
    pub(super) fn read(file: &[u8]) -> Result<Self, IndexFault> {
        let hot = hot_len(file)?.ok_or(IndexFault::Truncated)?;
        let mut fields = Fields(&file[MAGIC.len()..]);
        let (_version, count, crc) = (fields.u16()?, usize::from(fields.u16()?), fields.u32()?);
        if count > MAX_SECTIONS {
            return Err(IndexFault::TooLarge("section table"));
        }
        let table_end = PROLOGUE + count * RECORD;
        let table = file.get(CRC_AT + 4..table_end).ok_or(IndexFault::Truncated)?;
        if checksum::crc32c_append(checksum::crc32c(&file[..CRC_AT]), table) != crc {
            return Err(IndexFault::Checksum("section table"));
        }
        let records: Vec<_> = file[PROLOGUE..table_end]
            .chunks_exact(RECORD)
            .map(SectionRecord::decode)
            .collect::<Result<_, _>>()?;
        let fault = IndexFault::Malformed("section table");
        let (mut end, mut hot_end) = (len_u64(table_end), len_u64(table_end));
        for (number, record) in records.iter().enumerate() {
            if record.offset != end || records[..number].iter().any(|before| before.kind == record.kind) {
                return Err(fault);
            }
            let behind_cold = hot_end != end;
            end = end.checked_add(record.stored).ok_or(fault)?;
            if record.flags & COLD == 0 {
                if behind_cold {
                    return Err(fault);
                }
                hot_end = end;
            }
        }
        if hot_end != hot {
            return Err(fault);
        }
        Ok(Self {
            records,
            hot_len: hot,
            file_len: end,
        })
    }
}

/// Puts a file together from its sections, hot ones first, working out places and checksums.
pub(super) fn assemble(sections: &mut [(SectionRecord, Vec<u8>)]) -> Vec<u8> {
    let table_end = PROLOGUE + sections.len() * RECORD;
    let mut offset = len_u64(table_end);
    let mut hot = offset;
    let mut table = Vec::new();
    for (record, bytes) in sections.iter_mut() {
        record.offset = offset;
        record.stored = len_u64(bytes.len());
        record.crc = checksum::crc32c(bytes);
        record.encode(&mut table);
        offset += record.stored;
        if record.flags & COLD == 0 {
            hot = offset;
        }
    }
    let mut file = Vec::with_capacity(usize::try_from(offset).unwrap_or(0));
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&u16::try_from(sections.len()).unwrap_or(u16::MAX).to_le_bytes());
    let crc = checksum::crc32c_append(checksum::crc32c(&file), &hot.to_le_bytes());
    let crc = checksum::crc32c_append(crc, &table);
    file.extend_from_slice(&crc.to_le_bytes());
    file.extend_from_slice(&hot.to_le_bytes());
    file.extend_from_slice(&table);
    for (_, bytes) in sections {
        file.append(bytes);
    }
    file
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
        u64::from(summary.end_marked) | u64::from(summary.lone_zero_block) << 1,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(digest);
    out
}

/// Reads the summary section; later versions may append to it.
pub(super) fn decode_summary(section: &[u8]) -> Result<(Summary, [u8; 32]), IndexFault> {
    let mut fields = Fields(section);
    let mut summary = Summary {
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
        ..Summary::default()
    };
    let end = fields.u64()?;
    (summary.end_marked, summary.lone_zero_block) = (end & 1 != 0, end & 3 == 2);
    Ok((summary, *fields.array()?))
}
