//! How much may be under way. In: what requests ask for, when their bytes come, and what waits for the disk. Out: how many
//! bytes may be prefetched now.
//!
//! Demand is never held back. Prefetch goes as far as the link has room behind what was asked for, the disk keeps up, and
//! half of the connections stay free for demand. There is one link for all devices; each that asks has its part of it for
//! certain, and all of what the others leave: a device whose server does not answer, or that fetches everything, takes from no
//! other one the room to read ahead.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use crate::fetch::stats::{PoolGauges, add, take};
use crate::prefetch::LinkEstimate;
use crate::prefetch::bandwidth::BdpEstimator;
use crate::units::{len_u64, len_usize};

/// Chunks that wait to be written are memory, counted in bytes here. Above half of this nothing more is prefetched, above all
/// of it chunks do not go to the disk cache at all.
const MOST_UNWRITTEN: u64 = 64 << 20;

/// What all devices have under way together; see the module. For one thread.
pub(super) struct PoolBudget {
    bdp: RefCell<BdpEstimator>,
    /// Bytes of blobs asked for and not here yet.
    requested: Cell<u64>,
    /// Devices that have asked for such bytes.
    asking: Cell<u64>,
    /// Requests under way that no reader waited for when they were sent.
    prefetches: Cell<usize>,
    most_prefetches: usize,
    connections: usize,
    /// Where the bytes are counted that wait to be written to disk caches.
    gauges: Arc<PoolGauges>,
}

impl PoolBudget {
    /// For `connections` to one host.
    pub(super) fn new(connections: usize, gauges: Arc<PoolGauges>) -> Rc<Self> {
        Rc::new(Self {
            bdp: RefCell::default(),
            requested: Cell::new(0),
            asking: Cell::new(0),
            prefetches: Cell::new(0),
            most_prefetches: (connections / 2).max(1),
            connections: connections.max(1),
            gauges,
        })
    }
}

/// The budget of one device; see the module.
pub(super) struct Budget {
    pool: Rc<PoolBudget>,
    /// As in [`PoolBudget`], of this device alone.
    requested: Cell<u64>,
    prefetches: Cell<usize>,
}

impl Budget {
    /// A device's part of `pool`.
    pub(super) fn of(pool: &Rc<PoolBudget>) -> Rc<Self> {
        Rc::new(Self {
            pool: Rc::clone(pool),
            requested: Cell::new(0),
            prefetches: Cell::new(0),
        })
    }

    /// Counts a request for `bytes` bytes as under way, as long as what is returned lives.
    pub(super) fn request(self: &Rc<Self>, bytes: u64, demand: bool) -> Share {
        let pool = &self.pool;
        if self.requested.get() == 0 && bytes > 0 {
            pool.asking.set(pool.asking.get() + 1);
        }
        self.requested.set(self.requested.get() + bytes);
        pool.requested.set(pool.requested.get() + bytes);
        if !demand {
            self.prefetches.set(self.prefetches.get() + 1);
            pool.prefetches.set(pool.prefetches.get() + 1);
        }
        Share {
            budget: Rc::clone(self),
            owed: Cell::new(bytes),
            demand,
        }
    }

    /// How many bytes may be prefetched now; none if that is too little to be worth a request.
    pub(super) fn room(&self) -> Option<u64> {
        let pool = &self.pool;
        let limit = pool.bdp.borrow().in_flight_limit();
        let devices = (pool.asking.get() + u64::from(self.requested.get() == 0)).max(1);
        let left_over = limit.saturating_sub(pool.requested.get());
        let own = (limit / devices).saturating_sub(self.requested.get());
        let room = left_over.max(own);
        let own_prefetches = (pool.most_prefetches / len_usize(devices)).max(1);
        let has_room = room >= limit / 2 / devices
            && self.unwritten() <= MOST_UNWRITTEN / 2
            && (pool.prefetches.get() < pool.most_prefetches || self.prefetches.get() < own_prefetches);
        has_room.then_some(room)
    }

    /// The shortest recent round trip, once one was measured.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.pool.bdp.borrow().round_trip()
    }

    /// The bytes that come meanwhile when one of all connections waits for an answer's head: so much is worth one request less.
    pub(super) fn worth_of_request(&self) -> u64 {
        self.link().held() / len_u64(self.pool.connections)
    }

    /// What is known of the link.
    pub(super) fn link(&self) -> LinkEstimate {
        self.pool.bdp.borrow().estimate()
    }

    /// An answer's head came `took` after its request.
    pub(super) fn note_head(&self, took: Duration) {
        self.pool.bdp.borrow_mut().head(Instant::now().into_std(), took);
    }

    /// `len` bytes of a body came over the network.
    pub(super) fn note_arrival(&self, len: u64) {
        self.pool.bdp.borrow_mut().arrived(Instant::now().into_std(), len);
    }

    /// Bytes that wait to be written to disk caches.
    pub(super) fn unwritten(&self) -> u64 {
        self.pool.gauges.bytes_unwritten.load(Ordering::Relaxed)
    }

    /// Whether the disk is so far behind that chunks go without it.
    pub(super) fn is_disk_behind(&self) -> bool {
        self.unwritten() > MOST_UNWRITTEN
    }

    /// `bytes` more wait to be written.
    pub(super) fn queue_write(&self, bytes: u64) {
        add(&self.pool.gauges.bytes_unwritten, bytes);
    }

    /// `bytes` do not wait any more.
    pub(super) fn end_write(&self, bytes: u64) {
        take(&self.pool.gauges.bytes_unwritten, bytes);
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
        if by == 0 {
            return;
        }
        self.owed.set(self.owed.get() - by);
        let (own, pool) = (&self.budget.requested, &self.budget.pool);
        own.set(own.get() - by);
        pool.requested.set(pool.requested.get() - by);
        if own.get() == 0 {
            pool.asking.set(pool.asking.get() - 1);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.arrived(self.owed.get());
        if !self.demand {
            let (own, pool) = (&self.budget.prefetches, &self.budget.pool.prefetches);
            own.set(own.get() - 1);
            pool.set(pool.get() - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_connections(count: usize) -> Rc<Budget> {
        Budget::of(&PoolBudget::new(count, Arc::default()))
    }

    #[test]
    fn what_one_device_asks_for_leaves_the_others_their_part() {
        let pool = PoolBudget::new(4, Arc::default());
        let [first, second, third] = [(); 3].map(|()| Budget::of(&pool));
        let limit = first.room().unwrap();
        let stuck = first.request(10 * limit, true);
        let waits = [first.request(1, false), first.request(1, false)];
        assert_eq!((first.room(), second.room()), (None, Some(limit / 2)));
        // What it has is counted against its own part.
        let own = second.request(limit / 2, false);
        assert_eq!((second.room(), third.room()), (None, Some(limit / 3)));
        drop((stuck, waits));
        assert_eq!(first.room(), Some(limit - limit / 2));
        drop(own);
        assert_eq!(third.room(), Some(limit));
        assert_eq!(
            (pool.asking.get(), pool.requested.get(), pool.prefetches.get()),
            (0, 0, 0)
        );
    }

    #[test]
    fn a_share_is_given_back_whatever_came() {
        let budget = of_connections(16);
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
        let budget = of_connections(4);
        let first = budget.request(1, false);
        let second = budget.request(1, false);
        assert_eq!(budget.room(), None);
        let _demand = budget.request(1, true);
        drop((first, second));
        assert!(budget.room().is_some());
    }

    #[test]
    fn a_slow_disk_stops_prefetch_first() {
        let budget = of_connections(16);
        budget.queue_write(MOST_UNWRITTEN / 2 + 1);
        assert!(budget.room().is_none() && !budget.is_disk_behind());
        budget.queue_write(MOST_UNWRITTEN / 2);
        assert!(budget.is_disk_behind());
        budget.end_write(MOST_UNWRITTEN + 1);
        assert!(budget.room().is_some() && !budget.is_disk_behind());
    }
}
