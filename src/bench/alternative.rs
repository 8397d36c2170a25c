//! The alternatives that are compared, and what a run of one of them sent over the link.

use serde::{Deserialize, Serialize};

/// One way from nothing to the command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Row {
    /// tarblk with an index that comes over the same link, nothing cached.
    Empty,
    /// The same where a start of it was recorded before: nothing is cached but what that read.
    Learned,
    /// tarblk without an index: it reads the headers over the link first.
    Walk,
    /// tarblk with everything in its cache on disk.
    Full,
    /// Download everything and untar it onto the disk as it comes.
    Untar,
    /// Download the whole image to the disk and loop-mount it.
    Loop,
}

impl Row {
    /// What it is called in tables.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Empty => "tarblk, nothing cached",
            Self::Learned => "tarblk, nothing cached, started before",
            Self::Walk => "tarblk, nothing cached, no index",
            Self::Full => "tarblk, all cached",
            Self::Untar => "download and untar",
            Self::Loop => "download image and loop-mount",
        }
    }

    /// Whether it is one of tarblk's.
    #[must_use]
    pub const fn is_tarblk(self) -> bool {
        matches!(self, Self::Empty | Self::Learned | Self::Walk | Self::Full)
    }
}

/// What went over the link during a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes: u64,
    pub(super) requests: u64,
    /// Seconds since the clock started, bytes by then.
    pub(super) timeline: Vec<(f64, u64)>,
}
