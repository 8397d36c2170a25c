//! Chunks that came before any reader asked for them. In: chunks as they come, and as they are read. Out: of each read whether it was the
//! first one of such a chunk, wherever the chunk lies by then.
//!
//! Beside the caches and not in them: a chunk that has left memory for the disk is as much a guess that came true as one that has not.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::units::{len_usize, to_usize};

/// Chunks of a page: those of 128 MiB. What no chunk came early of takes no memory.
const PAGE: u32 = 4096;

/// It came early.
const EARLY: u8 = 1;
/// It was asked for, not knowing whether a reader would; else it came with what was asked for, and cost nothing of its own.
const PREFETCHED: u8 = 2;
/// The planner wants to hear at once when it is first read.
const MARKER: u8 = 4;

/// What a read of a chunk meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstUse {
    /// It had been read before, or was demanded from the start.
    No,
    /// It came before a reader needed it.
    Yes {
        /// It was prefetched, which now pays; else it came along with what was asked for.
        prefetched: bool,
        /// The planner asked to be told at once.
        marker: bool,
    },
}

/// Which chunks of a layer came early and are unread. For any thread.
#[derive(Debug)]
pub(crate) struct EarlyChunks {
    pages: Box<[OnceLock<Box<[AtomicU8]>>]>,
}

impl EarlyChunks {
    /// For a layer of `count` chunks.
    pub(crate) fn new(count: u32) -> Self {
        let pages = len_usize(u64::from(count.div_ceil(PAGE)));
        Self {
            pages: std::iter::repeat_with(OnceLock::new).take(pages).collect(),
        }
    }

    /// Chunk `index` comes, and no reader waits for it. Before any reader can find it.
    pub(crate) fn came(&self, index: u32, prefetched: bool, marker: bool) {
        let Some(page) = self.pages.get(to_usize(index / PAGE)) else {
            return;
        };
        let page = page.get_or_init(|| std::iter::repeat_with(AtomicU8::default).take(to_usize(PAGE)).collect());
        let mark = |is_set: bool, mark: u8| if is_set { mark } else { 0 };
        let marks = EARLY | mark(prefetched, PREFETCHED) | mark(marker, MARKER);
        page[to_usize(index % PAGE)].store(marks, Ordering::Relaxed);
    }

    fn marks(&self, index: u32) -> Option<&AtomicU8> {
        self.pages
            .get(to_usize(index / PAGE))?
            .get()?
            .get(to_usize(index % PAGE))
    }

    /// Chunk `index` is read, or comes because a reader waits for it.
    pub(crate) fn read(&self, index: u32) -> FirstUse {
        let Some(marks) = self.marks(index).filter(|marks| marks.load(Ordering::Relaxed) != 0) else {
            return FirstUse::No;
        };
        match marks.swap(0, Ordering::Relaxed) {
            0 => FirstUse::No,
            marks => FirstUse::Yes {
                prefetched: marks & PREFETCHED != 0,
                marker: marks & MARKER != 0,
            },
        }
    }

    /// Whether chunk `index` came early and is unread.
    pub(crate) fn is_unread(&self, index: u32) -> bool {
        self.marks(index)
            .is_some_and(|marks| marks.load(Ordering::Relaxed) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_use_is_told_once() {
        let early = EarlyChunks::new(2 * PAGE);
        assert_eq!(early.read(PAGE), FirstUse::No);
        early.came(PAGE, true, true);
        assert!(early.is_unread(PAGE) && !early.is_unread(PAGE - 1) && !early.is_unread(PAGE + 1));
        let first = FirstUse::Yes {
            prefetched: true,
            marker: true,
        };
        assert_eq!(early.read(PAGE), first);
        assert_eq!(early.read(PAGE), FirstUse::No);
        assert!(!early.is_unread(PAGE));
        early.came(7, false, false);
        let bundled = FirstUse::Yes {
            prefetched: false,
            marker: false,
        };
        assert_eq!(early.read(7), bundled);
        assert_eq!(early.read(7), FirstUse::No);
    }

    /// A layer that is said to be as long as can be takes no memory for it.
    #[test]
    fn what_is_not_there_is_not_early() {
        let early = EarlyChunks::new(u32::MAX);
        early.came(u32::MAX, true, false);
        assert!(early.is_unread(u32::MAX));
        let early = EarlyChunks::new(5);
        early.came(PAGE, true, false);
        assert_eq!(early.read(PAGE), FirstUse::No);
    }
}
