//! How a miss comes back. In: the fetch thread's bytes. Out: a completion on the queue's own ring.
//!
//! A queue thread sleeps in `io_uring_enter` and cannot be woken by a waker of another thread. So the fetch thread leaves
//! the bytes in a [`Completion`] and sends a message (`IORING_OP_MSG_RING`) to the queue's ring: the completion carries the
//! `user_data` of a libublk future that was made without an operation of its own.
//!
//! The message is sent on a small ring of the sending thread's own. That costs a system call that the fetch runtime's ring
//! could have batched, but it works on every thread and at every time, also while that runtime is being torn down.
//!
//! The message must be sent exactly once: after the first the future's slot is reused, and a second one would complete
//! another read. [`Completion::settle`] sees to that.

use std::cell::RefCell;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::{IoUring, opcode, types};

use crate::cache::Slice;
use crate::device::volume::ReadError;
use crate::fetch::{FetchError, ReadCallback};

type Outcome = Result<Vec<Slice>, ReadError>;

/// Where the outcome of one miss is left for the queue's task.
#[derive(Debug)]
pub(super) struct Completion {
    outcome: Mutex<Option<Outcome>>,
    settled: AtomicBool,
    ring: RawFd,
    user_data: u64,
}

impl Completion {
    /// A slot whose outcome completes the future `user_data` on the ring `ring`.
    pub(super) fn new(ring: RawFd, user_data: u64) -> Arc<Self> {
        Arc::new(Self {
            outcome: Mutex::new(None),
            settled: AtomicBool::new(false),
            ring,
            user_data,
        })
    }

    /// Takes what has arrived; [`ReadError::Stopped`] when nothing has.
    pub(super) fn take(&self) -> Outcome {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.take().unwrap_or(Err(ReadError::Stopped))
    }

    /// Leaves the outcome and wakes the queue's task, unless that was done before. From any thread.
    fn settle(&self, outcome: Outcome) {
        if self.settled.swap(true, Ordering::AcqRel) {
            return;
        }
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        if let Err(error) = send(self.ring, self.user_data) {
            log::error!("cannot wake a ublk queue: {error}");
        }
    }

    /// Ends the wait without bytes: the device is being taken down.
    pub(super) fn give_up(&self) {
        self.settle(Err(ReadError::Stopped));
    }
}

/// The callback that the fetch thread gets: it puts the outcome into the slot.
#[derive(Debug)]
pub(super) struct RingCallback(pub(super) Arc<Completion>);

impl ReadCallback for RingCallback {
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
        self.0.settle(outcome.map_err(ReadError::from));
    }
}

impl Drop for RingCallback {
    /// A waiter that is dropped untold (its fetch thread ended) must not leave the kernel's request hanging.
    fn drop(&mut self) {
        self.0.give_up();
    }
}

thread_local! {
    /// The ring that this thread sends messages on; made at the first.
    static SENDER: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

/// Posts a completion with `user_data` to the ring `ring`.
fn send(ring: RawFd, user_data: u64) -> io::Result<()> {
    let message = opcode::MsgRingData::new(types::Fd(ring), 0, user_data, None).build();
    SENDER.with_borrow_mut(|sender| {
        let own = match sender {
            Some(own) => own,
            None => sender.insert(IoUring::new(2)?),
        };
        // SAFETY: the operation refers to no memory.
        #[allow(unsafe_code)]
        let pushed = unsafe { own.submission().push(&message) };
        pushed.map_err(io::Error::other)?;
        // The kernel posts the message while it takes the submission, so this does not wait for anything.
        while own.completion().is_empty() {
            match own.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
                _ => {}
            }
        }
        match own.completion().next().map(|cqe| cqe.result()) {
            Some(result) if result < 0 => Err(io::Error::from_raw_os_error(-result)),
            _ => Ok(()),
        }
    })
}
