//! The fetch thread's runtime: tasks, timers, files and sockets. In: what the engine and the transport want to wait for. Out: the
//! same, without ever blocking the thread.
//!
//! All of it goes through one `io_uring`, by tokio-uring, and nothing outside of this module names that crate. Tasks run on the
//! fetch thread alone; what would block (name look-ups, decoding, digests, syncing) goes to worker threads by [`blocking`].
//!
//! Tests put a simulated world in the place of threads, sockets, disks, clock and chance (`simulated`); then all of it runs on the
//! thread that asks for it, and the same again for the same seed.

mod file;
#[cfg(feature = "unstable-internals")]
pub mod simulated;
mod stream;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::{JoinHandle, LocalSet};

pub(crate) use self::file::File;
pub(crate) use self::stream::TcpStream;
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

/// Runs `main` on a new thread with a runtime of its own.
///
/// # Errors
/// When there is no thread to be had, or no ring.
pub(crate) fn start<F: Future<Output = ()> + 'static>(
    name: &str,
    main: impl FnOnce() -> F + Send + 'static,
) -> io::Result<()> {
    #[cfg(feature = "unstable-internals")]
    if simulated::is_entered() {
        drop(tokio::task::spawn_local(main()));
        return Ok(());
    }
    let (ready, started) = std::sync::mpsc::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let runtime = match Runtime::new() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _starter_is_gone = ready.send(Err(error));
                return;
            }
        };
        let _starter_is_gone = ready.send(Ok(()));
        drop(ready);
        runtime.block_on(main());
    })?;
    match started.recv() {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::other("it ended at once")),
    }
}

/// Runs `job`, which may block, on a worker thread.
pub(crate) fn blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(feature = "unstable-internals")]
    if simulated::is_entered() {
        return simulated::work(job);
    }
    tokio::task::spawn_blocking(job)
}

/// Runs `job`, which takes long and is in no hurry, on a thread of its own.
///
/// # Errors
/// When there is no thread to be had.
pub(crate) fn background(name: &str, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
    #[cfg(feature = "unstable-internals")]
    if simulated::is_entered() {
        drop(simulated::work(job));
        return Ok(());
    }
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // On Linux this is the thread's own; if it cannot be had, it is only less polite.
        let _not_so_nice = rustix::process::nice(19);
        job();
    })?;
    Ok(())
}

/// Where files go that end with the process.
pub(crate) fn temporary_dir() -> PathBuf {
    #[cfg(feature = "unstable-internals")]
    if let Some(dir) = simulated::temporary_dir() {
        return dir;
    }
    std::env::temp_dir()
}

/// How many jobs may be under way at once: as many as there are CPUs.
pub(crate) fn workers() -> usize {
    #[cfg(feature = "unstable-internals")]
    if simulated::is_entered() {
        return simulated::WORKERS;
    }
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}

/// A worker's end of a channel to the fetch thread.
pub(crate) struct ToFetchThread<T>(Sender<T>);

impl<T> ToFetchThread<T> {
    /// Hands `item` over, and waits while there is no room for it. Says whether there is still a receiver.
    pub(crate) fn give(&self, item: T) -> bool {
        #[cfg(feature = "unstable-internals")]
        if simulated::is_entered() {
            return self.0.try_send(item).is_ok();
        }
        self.0.blocking_send(item).is_ok()
    }
}

/// A channel from a worker to the fetch thread, in which no more than `most` items wait.
pub(crate) fn from_worker<T>(most: usize) -> (ToFetchThread<T>, Receiver<T>) {
    #[cfg(feature = "unstable-internals")]
    let most = if simulated::is_entered() {
        simulated::MOST_HANDED_OVER
    } else {
        most
    };
    let (give, take) = channel(most);
    (ToFetchThread(give), take)
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
