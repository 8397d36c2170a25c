//! Reads that wait for chunks.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use tokio::time::Instant;

use crate::cache::chunk::Slice;
use crate::fetch::stats::{Counters, add, take};
use crate::fetch::{FetchError, ReadCallback};

/// A callback that is called exactly once: dropped uncalled, it is called with [`FetchError::Stopped`].
pub(crate) struct CompleteOnDrop(Option<Box<dyn ReadCallback>>);

impl CompleteOnDrop {
    pub(crate) fn new(callback: Box<dyn ReadCallback>) -> Self {
        Self(Some(callback))
    }

    fn complete(mut self, outcome: Result<Vec<Slice>, FetchError>, by_another_device: bool) {
        if let Some(mut callback) = self.0.take() {
            if by_another_device {
                callback.by_another_device();
            }
            callback.complete(outcome);
        }
    }
}

impl Drop for CompleteOnDrop {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            callback.complete(Err(FetchError::Stopped));
        }
    }
}

/// A read that waits for chunks.
pub(super) struct Request {
    /// In the order asked; filled as chunks land.
    slots: RefCell<Vec<Option<Slice>>>,
    missing: Cell<usize>,
    callback: RefCell<Option<CompleteOnDrop>>,
    /// Whether another device's engine brought some of it.
    by_another_device: Cell<bool>,
    pub(super) asked: Instant,
    counters: Arc<Counters>,
}

impl Request {
    /// A read whose slots are still being added: it does not look whole until [`Request::ready`].
    pub(super) fn new(callback: CompleteOnDrop, asked: Instant, counters: Arc<Counters>) -> Rc<Self> {
        add(&counters.reads, 1);
        add(&counters.in_flight, 1);
        Rc::new(Self {
            slots: RefCell::default(),
            missing: Cell::new(1),
            callback: RefCell::new(Some(callback)),
            by_another_device: Cell::new(false),
            asked,
            counters,
        })
    }

    /// Adds a slot that is filled already.
    pub(super) fn push(&self, slice: Slice) {
        self.slots.borrow_mut().push(Some(slice));
    }

    /// Adds a slot to be filled later and says which it is.
    pub(super) fn expect(&self) -> usize {
        let mut slots = self.slots.borrow_mut();
        slots.push(None);
        self.missing.set(self.missing.get() + 1);
        slots.len() - 1
    }

    /// Whether it is a read of a block or two, whose reader probably waits for nothing else.
    pub(super) fn is_short(&self) -> bool {
        self.slots.borrow().len() <= 2
    }

    /// All slots are there.
    pub(super) fn ready(&self) {
        self.one_less();
    }

    pub(super) fn fill(&self, slot: usize, slice: Slice) {
        if let Some(place) = self.slots.borrow_mut().get_mut(slot)
            && place.is_none()
        {
            *place = Some(slice);
        } else {
            return;
        }
        self.one_less();
    }

    fn one_less(&self) {
        self.missing.set(self.missing.get().saturating_sub(1));
        if self.missing.get() == 0 {
            let slices = self.slots.take().into_iter().flatten().collect();
            self.end(Ok(slices));
        }
    }

    /// Tells the waiter; only the first time.
    pub(super) fn end(&self, outcome: Result<Vec<Slice>, FetchError>) {
        let Some(callback) = self.callback.take() else { return };
        take(&self.counters.in_flight, 1);
        self.counters.latency.record(self.asked.elapsed());
        if let Err(error) = &outcome {
            add(&self.counters.read_errors, 1);
            log::error!("read failed: {error}");
        }
        callback.complete(outcome, self.by_another_device.get());
    }

    /// Another device's engine brought some of it.
    pub(super) fn note_another_device(&self) {
        self.by_another_device.set(true);
    }
}
