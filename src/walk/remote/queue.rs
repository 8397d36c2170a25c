//! Which segment an explorer takes next. In: segments, what explorers found out about payloads, and where the parser waits. Out: segments,
//! with the place to begin at.
//!
//! First come those that were left and of which it is known now where a header is, then new ones in their order, then those that were left
//! a while ago: a little more of them is looked at. Invariant: a segment that the parser waits for is handed out, or given up, so that the
//! parser reads it by itself.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::wire::{FIRST, Link};
use super::{MAX_SCAN, SCAN_PART, Segment};

/// A segment in which more is looked at only so many round trips after it was left: by then most payloads' headers were met.
const PATIENCE: u32 = 10;

/// A segment to be explored.
pub(super) struct Work {
    pub(super) segment: Segment,
    /// Where to begin.
    pub(super) at: u64,
    /// Whether a header is there.
    pub(super) is_header: bool,
    /// Whether the segment is given up when its chain breaks off: it is where the parser waits.
    pub(super) is_last_try: bool,
    /// So many bytes may still be looked at for a header.
    pub(super) scan_budget: u64,
}

/// A segment in which no header was found yet.
pub(super) struct Left {
    pub(super) segment: Segment,
    /// There is none before.
    pub(super) at: u64,
    pub(super) scan_budget: u64,
}

/// The segments that nobody explores, and what explorers know together.
pub(super) struct Queue {
    new: RefCell<VecDeque<Segment>>,
    /// By where the segment begins, with the time when it was left.
    left: RefCell<BTreeMap<u64, (Left, Instant)>>,
    /// Those in `left` in which more may be looked at, in the order in which they were left; some are there no longer.
    by_age: RefCell<VecDeque<(Instant, u64)>>,
    /// Those that were left, and of which it is known now where to go on.
    ready: RefCell<VecDeque<Work>>,
    /// Big payloads, in which no explorer needs to look for a header: from start to end.
    payloads: RefCell<BTreeMap<u64, u64>>,
    /// Where the parser waits.
    wanted: Cell<u64>,
    changed: Notify,
}

impl Queue {
    pub(super) fn new(segments: Vec<Segment>) -> Self {
        Self {
            new: RefCell::new(segments.into()),
            left: RefCell::default(),
            by_age: RefCell::default(),
            ready: RefCell::default(),
            payloads: RefCell::default(),
            wanted: Cell::new(0),
            changed: Notify::new(),
        }
    }

    /// There is a payload from `start` to `end`, and a header behind it.
    pub(super) fn payload(&self, start: u64, end: u64) {
        if end - start < FIRST {
            return;
        }
        self.payloads.borrow_mut().insert(start, end);
        let reached: Vec<u64> = {
            let left = self.left.borrow();
            let back = left.range(..=end).rev();
            let inside = back.take_while(|(_, (left, _))| left.segment.end > start);
            let told = inside.filter(|(_, (left, _))| (start..end).contains(&left.at));
            told.map(|(segment, _)| *segment).collect()
        };
        for segment in reached {
            let left = self.left.borrow_mut().remove(&segment);
            if let Some((left, _)) = left {
                self.leave(left);
            }
        }
    }

    /// Where the payload ends that `at` lies in, or `at` itself.
    pub(super) fn past_payload(&self, at: u64) -> u64 {
        match self.payloads.borrow().range(..=at).next_back() {
            Some((_, end)) if *end > at => *end,
            _ => at,
        }
    }

    /// The parser wants the header at `at`, and waits for it.
    pub(super) fn wanted(&self, at: u64) {
        self.wanted.set(at);
        let mut left = self.left.borrow_mut();
        // What it has passed is of no use.
        while left
            .first_key_value()
            .is_some_and(|(_, (left, _))| left.segment.end <= at)
        {
            left.pop_first();
        }
        let first = left.first_key_value().map(|(segment, _)| *segment);
        let awaited = first.filter(|segment| *segment <= at).and_then(|_| left.pop_first());
        drop(left);
        match awaited {
            Some((_, (awaited, _))) => self.leave(awaited),
            None => self.changed.notify_waiters(),
        }
    }

    /// Leaves a segment until it is known where to go on in it.
    pub(super) fn leave(&self, left: Left) {
        let wanted = self.wanted.get();
        let (start, past) = (left.segment.start, self.past_payload(left.at));
        let is_awaited = (start..left.segment.end).contains(&wanted);
        if is_awaited || (left.at < past && past < left.segment.end) {
            self.ready.borrow_mut().push_back(Work {
                at: if is_awaited { wanted } else { past },
                is_header: true,
                is_last_try: is_awaited,
                scan_budget: left.scan_budget,
                segment: left.segment,
            });
        } else if past < left.segment.end {
            let now = Instant::now();
            if left.scan_budget > 0 {
                self.by_age.borrow_mut().push_back((now, start));
            }
            self.left.borrow_mut().insert(start, (left, now));
        }
        // Else it has no header.
        self.changed.notify_waiters();
    }

    /// The next segment; none when there are no more. Waits while nothing is known of those that were left.
    pub(super) async fn next(&self, link: &Link) -> Option<Work> {
        loop {
            let changed = self.changed.notified();
            let patience = link.round_trip() * PATIENCE;
            if let Some(work) = self.take(patience) {
                return Some(work);
            }
            if self.left.borrow().is_empty() {
                return None;
            }
            // Nobody is told of time that passes.
            let _either = tokio::time::timeout(patience, changed).await;
        }
    }

    /// The next segment that can be explored now.
    fn take(&self, patience: Duration) -> Option<Work> {
        let mut ready = self.ready.borrow_mut();
        while let Some(work) = ready.pop_front() {
            if !work.segment.abandoned() {
                return Some(work);
            }
        }
        if let Some(segment) = self.new.borrow_mut().pop_front() {
            return Some(Work {
                at: segment.start,
                is_header: segment.start == 0,
                is_last_try: false,
                scan_budget: ((segment.end - segment.start) / SCAN_PART).min(MAX_SCAN),
                segment,
            });
        }
        let mut by_age = self.by_age.borrow_mut();
        while let Some((since, start)) = by_age.front().copied().filter(|(since, _)| since.elapsed() >= patience) {
            by_age.pop_front();
            let mut all = self.left.borrow_mut();
            let is_it = all.get(&start).is_some_and(|(_, left)| *left == since);
            if let Some((left, _)) = is_it.then(|| all.remove(&start)).flatten() {
                return Some(Work {
                    at: left.at,
                    is_header: false,
                    is_last_try: false,
                    scan_budget: left.scan_budget,
                    segment: left.segment,
                });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SegmentRuns, segments};
    use super::*;

    const MIB: u64 = 1 << 20;
    const LONG: Duration = Duration::from_secs(3600);

    /// Four segments of 4 MiB.
    fn queue() -> (Queue, Vec<SegmentRuns>) {
        let (segments, runs): (Vec<_>, Vec<_>) = segments(16 * MIB).into_iter().unzip();
        assert_eq!(segments.len(), 4);
        (Queue::new(segments), runs)
    }

    fn place(work: &Work) -> (u64, u64, bool) {
        (work.segment.start / MIB, work.at, work.is_header)
    }

    /// Takes all new ones, and leaves all but the first after 1 MiB.
    fn left(queue: &Queue) {
        let first = queue.take(LONG).unwrap();
        assert_eq!(place(&first), (0, 0, true));
        for n in 1..4 {
            let Work {
                segment,
                at,
                scan_budget,
                ..
            } = queue.take(LONG).unwrap();
            assert_eq!((segment.start, at, scan_budget), (n * 4 * MIB, n * 4 * MIB, MIB));
            let (at, scan_budget) = (at + MIB / 2, MIB / 2);
            queue.leave(Left {
                segment,
                at,
                scan_budget,
            });
        }
    }

    #[test]
    fn where_a_payload_ends_a_segment_is_explored() {
        let (queue, _runs) = queue();
        left(&queue);
        assert!(queue.take(LONG).is_none());
        // From the first segment into the third: the second has no header at all.
        queue.payload(2 * MIB, 9 * MIB);
        assert_eq!(place(&queue.take(LONG).unwrap()), (8, 9 * MIB, true));
        assert!(queue.take(LONG).is_none());
        assert_eq!(queue.left.borrow().keys().copied().collect::<Vec<_>>(), [12 * MIB]);
        // In the last one, nobody has met a header: a little more is looked at.
        let work = queue.take(Duration::ZERO).unwrap();
        assert_eq!(
            (place(&work), work.scan_budget),
            ((12, 12 * MIB + MIB / 2, false), MIB / 2)
        );
        let Work { segment, at, .. } = work;
        queue.leave(Left {
            segment,
            at,
            scan_budget: 0,
        });
        assert!(queue.take(Duration::ZERO).is_none(), "it is looked at for ever");
    }

    #[test]
    fn what_the_parser_waits_for_is_explored_at_once() {
        let (queue, mut runs) = queue();
        left(&queue);
        queue.wanted(5 * MIB);
        let work = queue.take(LONG).unwrap();
        assert!(work.is_last_try);
        assert_eq!(place(&work), (4, 5 * MIB, true));
        drop(work);
        assert!(runs[1].received.try_recv().is_err() && runs[1].received.is_closed());
        // The parser has passed the third by itself.
        queue.wanted(12 * MIB + 512);
        assert_eq!(place(&queue.take(LONG).unwrap()), (12, 12 * MIB + 512, true));
        assert!(queue.take(LONG).is_none() && queue.left.borrow().is_empty());
    }
}
