//! Chunks that wait to be written to the disk cache. In: chunks, in whatever order flights bring them. Out: runs of neighbours, several at a time.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::Notify;

use crate::cache::chunk::Chunk;

/// Chunks written by one job: 2 MiB.
const LONGEST_WRITE: usize = 64;

/// Neighbours, which are written together, with their numbers.
pub(super) type WriteRun = Vec<(u32, Arc<Chunk>)>;

/// The chunks of one layer that wait to be written.
#[derive(Default)]
pub(super) struct WriteQueue {
    /// By number, so that what several flights bring side by side becomes one write.
    pub(super) queue: RefCell<BTreeMap<u32, Arc<Chunk>>>,
    /// The first chunk behind the last write: the next one goes on from there, and begins anew at the end.
    pub(super) next: Cell<u32>,
    /// Those and the ones that are being written, by number: until they are in the file they are read from here.
    pub(super) queued: RefCell<HashMap<u32, Arc<Chunk>>>,
    pub(super) running: Cell<bool>,
    pub(super) commit_due: Cell<bool>,
    pub(super) drained: Notify,
}

impl WriteQueue {
    pub(super) fn is_idle(&self) -> bool {
        !self.running.get()
    }

    /// A chunk that is not in the file yet.
    pub(super) fn queued(&self, index: u32) -> Option<Arc<Chunk>> {
        self.queued.borrow().get(&index).cloned()
    }

    /// The next runs, as many as one job writes: the first from where the last one ended.
    pub(super) fn next_runs(&self) -> Vec<WriteRun> {
        let mut runs: Vec<WriteRun> = Vec::new();
        let mut room = LONGEST_WRITE;
        while room > 0 {
            let run = self.next_run(room);
            if run.is_empty() {
                break;
            }
            room -= run.len();
            runs.push(run);
        }
        runs
    }

    /// The next run of at most so many chunks.
    fn next_run(&self, most: usize) -> WriteRun {
        let mut queue = self.queue.borrow_mut();
        let from = queue.range(self.next.get()..).next().or_else(|| queue.iter().next());
        let Some(mut index) = from.map(|(index, _)| *index) else {
            return Vec::new();
        };
        let mut run = Vec::new();
        while run.len() < most
            && let Some(chunk) = queue.remove(&index)
        {
            run.push((index, chunk));
            index = index.saturating_add(1);
        }
        self.next.set(index);
        run
    }

    /// Resolves after the next batch was written.
    pub(super) async fn progress(&self) {
        self.drained.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_writes_runs_of_neighbours_in_the_order_of_the_file() {
        let writer = WriteQueue::default();
        let fill = |indexes: &[u32]| {
            let mut queue = writer.queue.borrow_mut();
            queue.extend(indexes.iter().map(|index| (*index, Arc::new(Chunk::new(Vec::new())))));
        };
        let next = || -> Vec<Vec<u32>> {
            let numbers = |run: WriteRun| run.into_iter().map(|(index, _)| index).collect();
            writer.next_runs().into_iter().map(numbers).collect()
        };
        fill(&[12, 3, 4, 40, 11, 5]);
        assert_eq!(next(), [vec![3, 4, 5], vec![11, 12], vec![40]]);
        assert!(next().is_empty());
        // It goes on behind the last one, and begins anew at the end.
        fill(&[7, 41, 90, u32::MAX]);
        assert_eq!(next(), [vec![41], vec![90], vec![u32::MAX], vec![7]]);
        // No more than one job writes.
        let long: Vec<u32> = (100..200).collect();
        fill(&long);
        fill(&[8, 9]);
        assert_eq!(next(), [vec![8, 9], (100..162).collect()]);
        assert_eq!(next(), [(162..200).collect::<Vec<u32>>()]);
    }
}
