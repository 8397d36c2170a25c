//! How much may be under way. In: what requests ask for, when their bytes come, and what waits for the disk. Out: how many
//! bytes may be prefetched now.
//!
//! Demand is never held back. Prefetch goes as far as the link has room behind what was asked for, the disk keeps up, and
//! half of the connections stay free for demand.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::prefetch::bandwidth::BdpEstimator;

/// Chunks that wait to be written are memory, counted in bytes here. Above half of this nothing more is prefetched, above all
/// of it chunks do not go to the disk cache at all.
const MOST_UNWRITTEN: u64 = 64 << 20;

/// The budget of one fetcher; see the module. For one thread.
pub(super) struct Budget {
    bdp: RefCell<BdpEstimator>,
    /// Bytes of blobs asked for and not here yet.
    requested: Cell<u64>,
    /// Requests under way that no reader waited for when they were sent.
    prefetches: Cell<usize>,
    most_prefetches: usize,
    /// Bytes that wait to be written to disk caches.
    unwritten: Cell<u64>,
}

impl Budget {
    /// For `connections` to one host.
    pub(super) fn new(connections: usize) -> Rc<Self> {
        Rc::new(Self {
            bdp: RefCell::default(),
            requested: Cell::new(0),
            prefetches: Cell::new(0),
            most_prefetches: (connections / 2).max(1),
            unwritten: Cell::new(0),
        })
    }

    /// Counts a request for `bytes` bytes as under way, as long as what is returned lives.
    pub(super) fn request(self: &Rc<Self>, bytes: u64, demand: bool) -> Share {
        self.requested.set(self.requested.get().saturating_add(bytes));
        if !demand {
            self.prefetches.set(self.prefetches.get() + 1);
        }
        Share {
            budget: Rc::clone(self),
            owed: Cell::new(bytes),
            demand,
        }
    }

    /// How many bytes may be prefetched now; none if that is too little to be worth a request.
    pub(super) fn room(&self) -> Option<u64> {
        let limit = self.bdp.borrow().in_flight_limit();
        let room = limit.saturating_sub(self.requested.get());
        let has_room = room >= limit / 2
            && self.unwritten.get() <= MOST_UNWRITTEN / 2
            && self.prefetches.get() < self.most_prefetches;
        has_room.then_some(room)
    }

    /// The shortest recent round trip, once one was measured.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.bdp.borrow().round_trip()
    }

    /// An answer's head came `took` after its request.
    pub(super) fn note_head(&self, took: Duration) {
        self.bdp.borrow_mut().head(Instant::now(), took);
    }

    /// `len` bytes of a body came over the network.
    pub(super) fn note_arrival(&self, len: u64) {
        self.bdp.borrow_mut().arrived(Instant::now(), len);
    }

    /// Bytes that wait to be written to disk caches.
    pub(super) fn unwritten(&self) -> u64 {
        self.unwritten.get()
    }

    /// Whether the disk is so far behind that chunks go without it.
    pub(super) fn is_disk_behind(&self) -> bool {
        self.unwritten.get() > MOST_UNWRITTEN
    }

    /// `bytes` more wait to be written.
    pub(super) fn queue_write(&self, bytes: u64) {
        self.unwritten.set(self.unwritten.get() + bytes);
    }

    /// `bytes` do not wait any more.
    pub(super) fn end_write(&self, bytes: u64) {
        self.unwritten.set(self.unwritten.get().saturating_sub(bytes));
    }
}

/// What one request has of the budget; given back when dropped.
pub(super) struct Share {
    budget: Rc<Budget>,
    /// Bytes still counted as under way.
    owed: Cell<u64>,
    demand: bool,
}

impl Share {
    /// `len` bytes are not under way any more.
    pub(super) fn arrived(&self, len: u64) {
        let by = len.min(self.owed.get());
        self.owed.set(self.owed.get() - by);
        let requested = &self.budget.requested;
        requested.set(requested.get().saturating_sub(by));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.arrived(self.owed.get());
        if !self.demand {
            let prefetches = &self.budget.prefetches;
            prefetches.set(prefetches.get().saturating_sub(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_back_whatever_came() {
        let budget = Budget::new(16);
        let all = budget.room().unwrap();
        let half = budget.request(all / 2, true);
        assert_eq!(budget.room(), Some(all - all / 2));
        let rest = budget.request(all, true);
        assert_eq!(budget.room(), None);
        rest.arrived(all / 4);
        // More than was asked for is no credit.
        half.arrived(2 * all);
        drop(half);
        assert_eq!(budget.room(), None);
        drop(rest);
        assert_eq!(budget.room(), Some(all));
    }

    #[test]
    fn half_of_the_connections_are_for_demand() {
        let budget = Budget::new(4);
        let first = budget.request(1, false);
        let second = budget.request(1, false);
        assert_eq!(budget.room(), None);
        let _demand = budget.request(1, true);
        drop((first, second));
        assert!(budget.room().is_some());
    }

    #[test]
    fn a_slow_disk_stops_prefetch_first() {
        let budget = Budget::new(16);
        budget.queue_write(MOST_UNWRITTEN / 2 + 1);
        assert!(budget.room().is_none() && !budget.is_disk_behind());
        budget.queue_write(MOST_UNWRITTEN / 2);
        assert!(budget.is_disk_behind());
        budget.end_write(MOST_UNWRITTEN);
        assert!(budget.room().is_some() && !budget.is_disk_behind());
    }
}
