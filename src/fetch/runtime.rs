//! The fetch thread's runtime: tasks, timers, files and sockets. In: what the engine and the transport want to wait for. Out: the
//! same, without ever blocking the thread.
//!
//! All of it goes through one `io_uring`, by tokio-uring, and nothing outside of this module names that crate. Tasks run on the
//! fetch thread alone; what would block (name look-ups, decoding, digests, syncing) goes to worker threads by [`blocking`].

mod file;
mod stream;

use std::future::Future;
use std::io;

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

/// Runs `task` beside the one that calls, on the same thread.
pub(crate) fn spawn(task: impl Future<Output = ()> + 'static) {
    // Dropping the handle lets it run.
    drop(tokio_uring::spawn(task));
}
