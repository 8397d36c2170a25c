//! Why chunks are fetched.

use super::chunks::ChunkRange;
use crate::cache::chunk::ChunkKey;

/// Why a range of chunks is to be fetched, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A reader waits for it.
    Demand,
    /// Earlier starts read it.
    Profile,
    /// A loader will read it before a program runs.
    Loader,
    /// A library's initialisers are in it, or refer to it.
    Initialiser,
    /// It belongs with what a reader waits for: the rest of a small file, the surroundings in a big one.
    Rest,
    /// It lies ahead of a sequential reader.
    Ahead,
    /// A module imports it.
    Import,
    /// It is the directory of an archive, or a class that another one uses.
    Archive,
    /// A file of its directory was read.
    Neighbour,
    /// It lies between two ranges that one request brings.
    Between,
    /// It came out of a compressed span that was asked for because of other chunks.
    Bundled,
    /// All of the layer is to be in the disk cache.
    Fill,
}

impl Reason {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Demand,
        Self::Profile,
        Self::Loader,
        Self::Initialiser,
        Self::Rest,
        Self::Ahead,
        Self::Import,
        Self::Archive,
        Self::Neighbour,
        Self::Between,
        Self::Bundled,
        Self::Fill,
    ];

    /// Its name in statistics and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Profile => "profile",
            Self::Rest => "rest",
            Self::Ahead => "ahead",
            Self::Loader => "loader",
            Self::Initialiser => "initialiser",
            Self::Import => "import",
            Self::Archive => "archive",
            Self::Neighbour => "neighbour",
            Self::Between => "between",
            Self::Bundled => "bundled",
            Self::Fill => "fill",
        }
    }

    /// Its place in [`ALL`](Self::ALL).
    pub(super) fn number(self) -> usize {
        Self::ALL.iter().position(|reason| *reason == self).unwrap_or(0)
    }

    /// `chunks` planned for this reason.
    #[must_use]
    pub const fn of(self, chunks: ChunkRange) -> Planned {
        Planned { chunks, reason: self }
    }
}

/// A range of chunks that is to be fetched, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The chunks.
    pub chunks: ChunkRange,
    /// Why they are.
    pub reason: Reason,
}

impl From<ChunkKey> for Planned {
    /// A reader waits for this chunk.
    fn from(key: ChunkKey) -> Self {
        Reason::Demand.of(key.into())
    }
}
