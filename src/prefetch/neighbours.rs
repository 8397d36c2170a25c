//! Prefetch of a directory's other files. In: files as they are read for the first time. Out: the files most likely read next, in
//! proportion to what was read of the directory.
//!
//! Programs read directories in different ways: an interpreter goes through most of a package's modules, a loader takes a
//! single library out of hundreds. Nothing but reading tells which it is, so a directory begins with little credit and
//! earns more with every file that is read in it: what is queued there and unread stays in proportion to what was read.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use super::chunks::ChunkRange;
use super::hint::{Hint, Layers, Touch};
use super::reason::{Planned, Reason};
use super::wishes::Wishes;
use super::{Look, Presence};
use crate::image::{DirectoryId, FileId, StoredFile};

/// How many directories' credit is remembered; past that it is forgotten, and earned anew.
const MOST_DIRECTORIES: usize = 4096;
/// How many neighbours are looked at for one touch; most of a huge directory is never looked at.
const MOST_VISITS: usize = 512;

/// A directory's budget for prefetch, in bytes of its small files.
#[derive(Debug, Default)]
struct Credit {
    /// Bytes of the files that were read.
    read: u64,
    /// Files that were queued and not read yet.
    guessed: HashSet<FileId>,
    /// Their bytes.
    guessed_bytes: u64,
}

/// What directories have earned, and the files of theirs that are to be prefetched; see the module.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    directories: HashMap<DirectoryId, Credit>,
    /// The files to fetch, the latest touch's neighbours first.
    wishes: Wishes,
}

impl Hint for Neighbours {
    /// At a file's first touch its neighbours are queued.
    fn touched(&mut self, touch: Touch, layers: &Layers, look: Look<'_>, _: &mut Vec<Planned>) {
        let (Some(files), Some(file), true) = (&layers.files, touch.file, touch.is_first) else {
            return;
        };
        let options = &layers.options;
        if self.directories.len() >= MOST_DIRECTORIES {
            self.directories.clear();
        }
        let credit = self.directories.entry(file.directory).or_default();
        if file.range.len <= options.small_neighbour_bytes {
            credit.read += file.range.len;
        }
        if credit.guessed.remove(&file.file) {
            credit.guessed_bytes -= file.range.len;
        }
        let limit = options.neighbour_bytes + credit.read / 100 * options.neighbour_percent;
        let mut batch: Vec<Planned> = Vec::new();
        let mut visits = 0;
        files.neighbours(file.file, &mut |next: StoredFile| {
            visits += 1;
            if credit.guessed_bytes >= limit || visits > MOST_VISITS {
                return ControlFlow::Break(());
            }
            let small = next.range.len <= options.small_neighbour_bytes && next.range.len <= limit;
            if !small || next.range.is_empty() || credit.guessed.contains(&next.file) {
                return ControlFlow::Continue(());
            }
            let stretch = ChunkRange::of(next.layer, next.range);
            if stretch.keys().any(|key| look(key) == Presence::Absent) {
                credit.guessed.insert(next.file);
                credit.guessed_bytes += next.range.len;
                match batch.last_mut() {
                    Some(Planned { chunks: last, .. })
                        if last.layer == stretch.layer && (last.first..=last.end).contains(&stretch.first) =>
                    {
                        last.end = last.end.max(stretch.end);
                    }
                    _ => batch.push(Reason::Neighbour.of(stretch)),
                }
            }
            ControlFlow::Continue(())
        });
        self.wishes.push_all_front(batch);
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}
