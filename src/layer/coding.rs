//! The compressions that layers have, and those that they must not have: one table of each.
//!
//! In: a blob's first bytes, a media type's ending, a number in an index. Out: a [`Coding`], or the name of what it is instead
//! and what to do about it.

use super::magic;

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

/// All that is known of a coding but how to undo it, which is `Stream`'s business. A further one is a further line here, and the
/// compiler finds the rest.
struct Row {
    coding: Coding,
    /// As in messages and listings.
    name: &'static str,
    /// In index files and span tables. Never used again for another one.
    number: u8,
    /// How a blob begins; nothing for what is not compressed.
    magic: &'static [u8],
    /// What a layer's media type ends with, behind what all of them begin with.
    endings: &'static [&'static str],
}

const TABLE: [Row; 3] = [
    Row {
        coding: Coding::Plain,
        name: "plain",
        number: 0,
        magic: &[],
        endings: &[""],
    },
    Row {
        coding: Coding::Gzip,
        name: "gzip",
        number: 1,
        magic: &magic::GZIP,
        endings: &["+gzip", ".gzip"],
    },
    Row {
        coding: Coding::Zstd,
        name: "zstd",
        number: 2,
        magic: &magic::ZSTD,
        endings: &["+zstd", ".zstd"],
    },
];

impl Coding {
    /// How many bytes [`Coding::of_bytes`] wants to see.
    pub const TELLING: usize = 4;

    const fn row(self) -> &'static Row {
        match self {
            Self::Plain => &TABLE[0],
            Self::Gzip => &TABLE[1],
            Self::Zstd => &TABLE[2],
        }
    }

    /// What a blob's first bytes say. What is neither gzip nor zstd is taken for plain: the tar's parser is the one to
    /// complain. A skippable frame is taken for zstd's; lz4's are the same, and are found out when another frame follows.
    #[must_use]
    pub fn of_bytes(first: &[u8]) -> Self {
        let compressed = TABLE.iter().filter(|row| !row.magic.is_empty());
        let known = compressed.into_iter().find(|row| first.starts_with(row.magic));
        match known {
            Some(row) => row.coding,
            None if magic::is_skippable(first) => Self::Zstd,
            None => Self::Plain,
        }
    }

    /// How far apart the places are aimed at from which a published index has a layer decoded, in bytes of the tar, unless its maker
    /// says otherwise. What lies between two is what a read fetches; each costs its history, which for a zstd frame grows fast as
    /// they come closer.
    #[must_use]
    pub const fn spacing(self) -> u64 {
        match self {
            Self::Plain | Self::Gzip => 512 << 10,
            Self::Zstd => 2 << 20,
        }
    }

    /// What the ending of a layer's media type says.
    pub(super) fn of_ending(ending: &str) -> Option<Self> {
        TABLE
            .iter()
            .find(|row| row.endings.contains(&ending))
            .map(|row| row.coding)
    }

    /// Its number in index files and span tables.
    pub(crate) const fn number(self) -> u8 {
        self.row().number
    }

    /// The coding of this number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        TABLE.iter().find(|row| row.number == number).map(|row| row.coding)
    }
}

impl std::fmt::Display for Coding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.row().name)
    }
}

/// What files begin with that are no layers, what they are, and the command that makes a tar of them. Longer beginnings first
/// where one begins another.
const OTHERS: [(&[u8], &str, &str); 13] = [
    (b"\xfd7zXZ\0", "compressed with xz", "xz -d"),
    (b"BZh", "compressed with bzip2", "bzip2 -d"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -d"),
    (b"\x02\x21\x4c\x18", "compressed with lz4 (its old format)", "lz4 -d"),
    (b"LZIP", "compressed with lzip", "lzip -d"),
    (b"\x89LZO\0\r\n\x1a\n", "compressed with lzop", "lzop -d"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "gzip -d"),
    (b"\x1f\x1e", "compressed with pack (.z)", "gzip -d"),
    (b"\x1f\xa0", "compressed with SCO compress (.Z)", "gzip -d"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (b"Rar!\x1a\x07", "a rar archive", "unrar x"),
    (b"hsqs", "a squashfs image", "unsquashfs"),
];

/// What a file is that begins so, and the command that undoes it, if it is something that is often met and is no layer.
pub(crate) fn other_format(first: &[u8]) -> Option<(&'static str, &'static str)> {
    if is_lzma(first) {
        return Some(("compressed with lzma", "xz -d --format=lzma"));
    }
    let found = OTHERS.iter().find(|(magic, ..)| first.starts_with(magic));
    found.map(|(_, what, command)| (*what, *command))
}

/// lzma's old format has no magic: the usual properties, a dictionary of a power of two (or one and a half), and a length that is
/// unknown or at most an exbibyte.
fn is_lzma(first: &[u8]) -> bool {
    let Some(([0x5d, dictionary @ ..], rest)) = first.split_first_chunk::<5>() else {
        return false;
    };
    let Some((len, _)) = rest.split_first_chunk::<8>() else {
        return false;
    };
    let (dictionary, len) = (u32::from_le_bytes(*dictionary), u64::from_le_bytes(*len));
    let bits = dictionary.count_ones();
    let usual = dictionary >= 4096
        && (bits == 1 || bits == 2 && dictionary.leading_zeros() + dictionary.trailing_zeros() == 30);
    usual && (len == u64::MAX || len >> 60 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_coding_has_a_row_of_its_own() {
        for row in &TABLE {
            assert_eq!(row.coding.row().number, row.number);
            assert_eq!(Coding::from_number(row.number), Some(row.coding));
            assert_eq!(Coding::of_bytes(row.magic), row.coding);
            assert_eq!(row.coding.to_string(), row.name);
            for ending in row.endings {
                assert_eq!(Coding::of_ending(ending), Some(row.coding));
            }
        }
        assert_eq!((Coding::from_number(3), Coding::of_ending("+xz")), (None, None));
    }

    #[test]
    fn other_formats_are_named() {
        let name = |first: &[u8]| other_format(first).map(|(what, _)| what);
        assert_eq!(name(b"\x04\x22\x4d\x18\x64\x40\xa7"), Some("compressed with lz4"));
        assert_eq!(
            name(b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0"),
            Some("compressed with lzma")
        );
        assert_eq!(
            name(b"\x5d\0\0\x01\0\x05\0\0\0\0\0\0\0\0"),
            Some("compressed with lzma")
        );
        // A tar of a file whose name begins so.
        assert_eq!(name(b"]\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), None);
        assert_eq!(
            (name(b""), name(b"etc/passwd\0\0\0\0"), name(b"\x1f\x8b\x08\0")),
            (None, None, None)
        );
        for (magic, what, command) in OTHERS {
            assert_eq!(other_format(magic), Some((what, command)));
            assert_eq!(Coding::of_bytes(magic), Coding::Plain);
        }
    }
}
