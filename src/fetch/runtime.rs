//! The fetch thread's runtime: tasks, timers, files and sockets. In: what the engine and the transport want to wait for. Out: the
//! same, without ever blocking the thread.
//!
//! All of it goes through one `io_uring`, by tokio-uring, and nothing outside of this module names that crate. Tasks run on the
//! fetch thread alone; what would block (name look-ups, decoding, digests, syncing) goes to worker threads by [`blocking`].

mod file;
mod stream;

use std::future::Future;
use std::io;
use std::rc::{Rc, Weak};

use tokio::task::LocalSet;

pub(crate) use self::file::File;
pub(crate) use self::stream::TcpStream;
pub(crate) use tokio::task::spawn_blocking as blocking;
pub(crate) use tokio::time::{sleep, timeout};

/// How many operations the ring takes before it has to be entered.
const RING_ENTRIES: u32 = 512;

/// The runtime of one thread.
pub(crate) struct Runtime(tokio_uring::Runtime);

impl Runtime {
    /// Makes the runtime and its ring. `COOP_TASKRUN` (Linux 5.19) spares the thread interrupts while it runs: it asks often
    /// enough.
    ///
    /// # Errors
    /// When the kernel gives no ring: it may be too old, or `kernel.io_uring_disabled` set.
    pub(crate) fn new() -> io::Result<Self> {
        let mut ring = tokio_uring::uring_builder();
        ring.setup_coop_taskrun();
        let mut builder = tokio_uring::builder();
        builder.entries(RING_ENTRIES);
        tokio_uring::Runtime::new(builder.uring_builder(&ring))
            .or_else(|_| tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES)))
            .map(Self)
    }

    /// Runs `main` to its end, and what it spawns as long as that takes.
    pub(crate) fn block_on<F: Future>(&self, main: F) -> F::Output {
        self.0.block_on(main)
    }
}

/// Whether an operation failed because the machine or the process is short of something that comes back: descriptors, memory,
/// ports, room in a queue.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let short = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::NOBUFS,
        Errno::AGAIN,
        Errno::ADDRNOTAVAIL,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| short.iter().any(|errno| errno.raw_os_error() == code))
}

/// Runs `task` beside the one that calls, on the same thread: in the same [`TaskSet`], and no longer than that.
pub(crate) fn spawn(task: impl Future<Output = ()> + 'static) {
    // Dropping the handle lets it run.
    drop(tokio_uring::spawn(task));
}

/// Tasks that end together, at the latest when this is dropped. One that panics ends alone.
pub(crate) struct TaskSet(Rc<LocalSet>);

impl TaskSet {
    pub(crate) fn new() -> Self {
        Self(Rc::new(LocalSet::new()))
    }

    /// Runs `main` to its end, and as long as that takes, what was spawned into the set.
    pub(crate) async fn run_until<F: Future>(&self, main: F) -> F::Output {
        self.0.run_until(main).await
    }

    /// What spawns into this set, whichever set the task belongs to that calls.
    pub(crate) fn spawner(&self) -> Spawner {
        Spawner(Rc::downgrade(&self.0))
    }
}

/// Spawns into a set of its own choice. Stays on the fetch thread.
#[derive(Clone)]
pub(crate) struct Spawner(Weak<LocalSet>);

impl Spawner {
    /// Runs `task` in the set; drops it if the set is gone.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        if let Some(set) = self.0.upgrade() {
            drop(set.spawn_local(task));
        }
    }
}
