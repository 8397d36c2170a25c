//! One 512-byte header block and the fields that its dialect gives it.
//!
//! The layouts are those of POSIX.1-1988 (ustar), GNU tar's manual ("Basic Tar Format") and star(5). Which dialect a block
//! speaks is told from its magic the way Go's archive/tar tells it, because that decides where a name's prefix lies.

use std::ops::Range;

use super::number;

/// A header block.
pub(super) type Block = [u8; 512];

/// The dialect of a header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Before POSIX: no prefix, no device numbers, directories by a trailing slash.
    V7,
    /// POSIX, and PAX which builds on it: a prefix of 155 bytes.
    Ustar,
    /// Schilling's star: a prefix of 131 bytes, then times.
    Star,
    /// GNU: times and sparse maps where the prefix would be.
    Gnu,
}

/// A sparse map entry in a header block or extension block: twelve bytes of offset, twelve of length.
const SPARSE_ENTRY: usize = 24;

/// The entries in a GNU header's own map, and in each extension block.
const SPARSE_IN_HEADER: usize = 4;
const SPARSE_IN_EXTENSION: usize = 21;

const CHECKSUM: Range<usize> = 148..156;

/// A header block seen through its fields.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header<'a> {
    block: &'a Block,
    pub(super) dialect: Dialect,
}

impl<'a> Header<'a> {
    /// Looks at a block; `None` when its checksum is wrong.
    pub(super) fn new(block: &'a Block) -> Option<Self> {
        let recorded = number::octal(&block[CHECKSUM])?;
        let (unsigned, signed) = checksums(block);
        if recorded != unsigned && recorded != signed {
            return None;
        }
        let dialect = match &block[257..265] {
            b"ustar  \0" => Dialect::Gnu,
            magic if magic.starts_with(b"ustar\0") => {
                if &block[508..512] == b"tar\0" {
                    Dialect::Star
                } else {
                    Dialect::Ustar
                }
            }
            _ => Dialect::V7,
        };
        Some(Self { block, dialect })
    }

    pub(super) fn type_flag(self) -> u8 {
        self.block[156]
    }

    /// The name field alone, without the prefix.
    pub(super) fn name(self) -> &'a [u8] {
        until_nul(&self.block[0..100])
    }

    pub(super) fn link_name(self) -> &'a [u8] {
        until_nul(&self.block[157..257])
    }

    /// What stands before the name with a slash between, empty if nothing does.
    pub(super) fn prefix(self) -> &'a [u8] {
        match self.dialect {
            Dialect::V7 => &[],
            Dialect::Ustar => until_nul(&self.block[345..500]),
            Dialect::Star => until_nul(&self.block[345..476]),
            Dialect::Gnu => self.misplaced_prefix(),
        }
    }

    /// Go's own writer once put a ustar prefix into GNU headers, over the access and change times. Such layers are still
    /// about; they are told by times that are no numbers where the prefix looks like text.
    fn misplaced_prefix(self) -> &'a [u8] {
        let is_time = |field: &[u8]| field[0] == 0 || number::field(field).is_some();
        if is_time(&self.block[345..357]) && is_time(&self.block[357..369]) {
            return &[];
        }
        let prefix = until_nul(&self.block[345..500]);
        if prefix.is_ascii() { prefix } else { &[] }
    }

    pub(super) fn mode(self) -> Option<i64> {
        number::field(&self.block[100..108])
    }

    pub(super) fn uid(self) -> Option<i64> {
        number::field(&self.block[108..116])
    }

    pub(super) fn gid(self) -> Option<i64> {
        number::field(&self.block[116..124])
    }

    pub(super) fn size(self) -> Option<i64> {
        number::field(&self.block[124..136])
    }

    pub(super) fn mtime(self) -> Option<i64> {
        number::field(&self.block[136..148])
    }

    /// Zero in v7, which had no devices.
    pub(super) fn device_major(self) -> Option<i64> {
        if self.dialect == Dialect::V7 {
            Some(0)
        } else {
            number::field(&self.block[329..337])
        }
    }

    pub(super) fn device_minor(self) -> Option<i64> {
        if self.dialect == Dialect::V7 {
            Some(0)
        } else {
            number::field(&self.block[337..345])
        }
    }

    /// A GNU sparse file's length with its holes.
    pub(super) fn sparse_real_size(self) -> Option<i64> {
        number::field(&self.block[483..495])
    }

    /// The GNU sparse map in the header itself.
    pub(super) fn sparse_map(self) -> SparseMap<'a> {
        SparseMap {
            entries: &self.block[386..386 + SPARSE_IN_HEADER * SPARSE_ENTRY],
            continued: self.block[482] != 0,
        }
    }
}

/// One block's share of a GNU sparse map.
#[derive(Clone, Copy, Debug)]
pub(super) struct SparseMap<'a> {
    entries: &'a [u8],
    /// Whether another extension block follows.
    pub(super) continued: bool,
}

impl<'a> SparseMap<'a> {
    /// The map in an extension block.
    pub(super) fn extension(block: &'a Block) -> Self {
        let end = SPARSE_IN_EXTENSION * SPARSE_ENTRY;
        Self {
            entries: &block[..end],
            continued: block[end] != 0,
        }
    }

    /// The (offset, length) pairs up to the first empty one; `None` in place of what is no number.
    pub(super) fn pairs(self) -> impl Iterator<Item = Option<(i64, i64)>> + use<'a> {
        self.entries
            .chunks_exact(SPARSE_ENTRY)
            .take_while(|pair| pair[0] != 0)
            .map(|pair| number::field(&pair[..12]).zip(number::field(&pair[12..])))
    }
}

/// The sums over a block with its checksum field read as spaces: of unsigned bytes, as POSIX has it, and of signed ones,
/// as some old systems wrote it.
fn checksums(block: &Block) -> (i64, i64) {
    // Sums of 32-bit lanes over the whole block, then the checksum field taken out again: a loop the compiler vectorises.
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    let high: u32 = block.iter().map(|b| u32::from(*b >> 7)).sum();
    let field_sum: u32 = block[CHECKSUM].iter().map(|b| u32::from(*b)).sum();
    let field_high: u32 = block[CHECKSUM].iter().map(|b| u32::from(*b >> 7)).sum();
    let unsigned = i64::from(sum - field_sum) + 8 * i64::from(b' ');
    (unsigned, unsigned - 256 * i64::from(high - field_high))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|b| *b == 0).map_or(bytes, |end| &bytes[..end])
}
