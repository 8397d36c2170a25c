//! Everything that can be wrong with a tar or with an index file.

use std::fmt;

use super::entry::Kind;
use crate::excerpt;
use crate::units::TarOffset;

/// Why a tar or an index cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The bytes are no tar at all; what they are instead, where that can be told.
    #[error("not a tar: {0}")]
    NotATar(&'static str),

    /// The bytes are another format's.
    #[error(
        "not a tar: it is {what}: make a tar of it first (`{command}`); layers are plain tars, or compressed with gzip or zstd"
    )]
    OtherFormat {
        /// What it is.
        what: &'static str,
        /// The command that undoes it.
        command: &'static str,
    },

    /// A header of the tar cannot be understood.
    #[error("bad tar header at byte {at}{}: {fault}", OfEntry(.path))]
    Header {
        /// Where the header block begins.
        at: TarOffset,
        /// Which entry it describes, as far as it was known.
        path: Option<Vec<u8>>,
        /// What is wrong with it.
        fault: HeaderFault,
    },

    /// The tar ends in the middle of something.
    #[error("the tar is cut short: it ends at byte {len}, but {what} reaches to byte {needs}{}", OfEntry(.path))]
    Truncated {
        /// How long the tar is.
        len: TarOffset,
        /// How long it would have to be at least.
        needs: TarOffset,
        /// What is incomplete.
        what: &'static str,
        /// The entry concerned, if one is.
        path: Option<Vec<u8>>,
    },

    /// The archive as a whole breaks a rule.
    #[error("bad tar at byte {at}: {fault}")]
    Archive {
        /// The position in the tar, in bytes.
        at: TarOffset,
        /// The rule that it breaks.
        fault: ArchiveFault,
    },

    /// Reading the tar failed.
    #[error("cannot read the tar at byte {at}: {source}")]
    Read {
        /// The position in the tar, in bytes.
        at: TarOffset,
        /// The system's error.
        source: std::io::Error,
    },

    /// An index file cannot be used.
    #[error("cannot use the index: {0}; make a new one with `tarblk index`")]
    Index(IndexFault),

    /// The layer's compression cannot be undone.
    #[error(transparent)]
    Layer(#[from] crate::layer::LayerError),

    /// An index is another layer's.
    #[error("it is the index of another layer, of {what} {found} and not {wanted}")]
    OtherLayer {
        /// What tells the two layers apart.
        what: &'static str,
        /// The value in the index.
        found: String,
        /// The layer's value.
        wanted: String,
    },

    /// An entry is of a form that an index file cannot hold. Parsers make no such entries.
    #[error("cannot put {} into an index: {why}", Quoted(.path))]
    Unencodable {
        /// The entry's name.
        path: Vec<u8>,
        /// The rule of the format that it breaks.
        why: &'static str,
    },

    /// The sink that takes the entries refused one, for reasons of its own.
    #[error(transparent)]
    Sink(Box<dyn std::error::Error + Send + Sync>),
}

impl IndexError {
    /// Wraps the error of a sink that takes entries ([`EntrySink`](super::EntrySink)).
    pub fn sink(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Sink(Box::new(error))
    }
}

impl From<IndexFault> for IndexError {
    fn from(fault: IndexFault) -> Self {
        Self::Index(fault)
    }
}

/// What can be wrong with one header or the extension headers before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// The checksum does not match.
    #[error("its checksum is wrong")]
    Checksum,
    /// A numeric field holds no number, or one that does not fit.
    #[error("its {0} field is not a number that fits")]
    Number(&'static str),
    /// A size below zero.
    #[error("its size is negative")]
    NegativeSize,
    /// The payload would end beyond what a 64-bit position can name.
    #[error("its size is larger than 63 bits hold")]
    HugeSize,
    /// A uid, gid or device number below zero or beyond its range.
    #[error("its {0} is out of range")]
    OutOfRange(&'static str),
    /// A type that container tools refuse as well.
    #[error("its type {:?} cannot be extracted", char::from(*.0))]
    UnknownType(u8),
    /// The second or a later part of a file from another volume.
    #[error("it continues a file from another volume: join the volumes first")]
    MultiVolume,
    /// An extension header longer than the limit.
    #[error(
        "it is an extension header of {len} bytes, more than the {limit} that container tools and this program accept"
    )]
    ExtensionTooLong {
        /// Its size in bytes.
        len: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A global header between an extension header and its entry, where no two readers agree.
    #[error("a global header stands between an extension header and its entry")]
    GlobalBetween,
    /// A PAX record that is not `length key=value`.
    #[error("its PAX records are malformed")]
    PaxRecord,
    /// A PAX value that cannot be.
    #[error("its PAX record {0} has a value that is malformed")]
    PaxValue(&'static str),
    /// Sparse file maps: unordered, overlapping, out of the file, or not matching the stored bytes.
    #[error("its sparse map is wrong: {0}")]
    Sparse(&'static str),
}

/// What can be wrong with the archive between its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveFault {
    /// One zero block and then something else: neither an end nor an entry to containerd, and the end to GNU tar.
    #[error(
        "a single zero block is followed by something else, which container tools refuse in a layer (as a tar by itself it can be used: it ends here for GNU tar)"
    )]
    LoneZeroBlock,
    /// The walker brought bytes from behind the place where the parser wanted them.
    #[error("bytes were skipped that are needed")]
    Gap,
}

/// What can be wrong with an index file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexFault {
    /// It is of a tar space that was made up from a layer's own table of contents.
    #[error("it was made of a layer's own table of contents, and can be used by its maker's cache alone")]
    MadeUp,
    /// It does not begin like one.
    #[error("it is not a tarblk index")]
    Magic,
    /// It was written by a newer or an abandoned version of the format.
    #[error("it has format version {found}, and this program reads version {known}")]
    Version {
        /// The file's version.
        found: u16,
        /// This program's.
        known: u16,
    },
    /// It is of a tar with global headers, and was made before indexes told what these do not change in images.
    #[error("an older program made it, which did not tell what global headers change in images")]
    Outdated,
    /// It has a section that must be understood and is not.
    #[error("it has a section of kind {0} that this program must know and does not")]
    UnknownSection(u32),
    /// It is shorter than it says.
    #[error("it is cut short")]
    Truncated,
    /// A checksum does not match.
    #[error("its {0} is damaged (checksum)")]
    Checksum(&'static str),
    /// The checksums match, but what they cover is not what the format allows.
    #[error("its {0} is malformed")]
    Malformed(&'static str),
    /// It lacks something without which it is of no use.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// It wants more memory than anything honest needs.
    #[error("its {0} is larger than this program accepts")]
    TooLarge(&'static str),
}

/// A name from a tar as a person can read it on one line.
pub(crate) struct Quoted<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Longer names are cut in messages, at this many bytes.
        const SHOWN: usize = 200;
        let shown = self.0.get(..SHOWN).unwrap_or(self.0);
        f.write_str("'")?;
        for chunk in shown.utf8_chunks() {
            for c in chunk.valid().chars() {
                if excerpt::is_printable(c) {
                    write!(f, "{c}")?;
                } else {
                    write!(f, "{}", c.escape_default())?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        f.write_str(if shown.len() < self.0.len() { "…'" } else { "'" })
    }
}

/// ` of 'name'`, or nothing when no name is known.
struct OfEntry<'a>(&'a Option<Vec<u8>>);

impl fmt::Display for OfEntry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(path) => write!(f, " ({})", Quoted(path)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
            Self::Hardlink => "hard link",
            Self::CharDevice => "character device",
            Self::BlockDevice => "block device",
            Self::Fifo => "fifo",
        })
    }
}
