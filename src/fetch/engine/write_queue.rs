//! Chunks that wait to be written to the disk cache. In: chunks, in whatever order flights bring them. Out: runs of neighbours.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::Notify;

use crate::cache::chunk::Chunk;

/// Chunks written by one operation: 2 MiB.
const LONGEST_WRITE: usize = 64;
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

    /// The next run of neighbours: the first from where the last one ended.
    pub(super) fn next_run(&self) -> Vec<(u32, Arc<Chunk>)> {
        let mut queue = self.queue.borrow_mut();
        let from = queue.range(self.next.get()..).next().or_else(|| queue.iter().next());
        let Some(mut index) = from.map(|(index, _)| *index) else {
            return Vec::new();
        };
        let mut run = Vec::new();
        while run.len() < LONGEST_WRITE
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
