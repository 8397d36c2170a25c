//! A world for tests in the place of the kernel and of other threads. In: a [`World`] that a test has made. Out: the fetch thread's
//! tasks, workers, connections and files as that world has them.
//!
//! A thread that has [`enter`]ed a world runs everything itself: what would be a thread of its own is a task, a job of a worker
//! runs in one piece after a time that the world chooses, a connection is a stream in memory. With tokio's clock paused, and chance
//! seeded ([`crate::http::chance`]), what happens follows from the world alone, and happens again the same.
//!
//! The caller is inside of a `LocalSet` of a runtime of one thread.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Jobs of workers at once, whatever the machine has.
pub(super) const WORKERS: usize = 2;
/// A job that runs in one piece cannot wait for its receiver: so much may wait.
pub(super) const MOST_HANDED_OVER: usize = 1 << 16;

/// A connection.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// What comes later.
pub type Later<T> = Pin<Box<dyn Future<Output = T>>>;

/// What kernel, machine and network do.
pub trait World {
    /// A connection to `address`, or why there is none.
    fn connect(&self, address: SocketAddr) -> Later<io::Result<Box<dyn Stream>>>;

    /// How long a job waits for its worker.
    fn worker_delay(&self) -> Duration;

    /// How long a read or write of a file takes that goes past the page cache.
    fn file_delay(&self) -> Duration;

    /// Whether that read fails.
    ///
    /// # Errors
    /// What the read is answered with.
    fn before_read(&self) -> io::Result<()>;

    /// Where files go that end with the process. Whether a page cache has a file is no world's to say: a file system in memory
    /// always has it.
    fn temporary_dir(&self) -> PathBuf;
}

thread_local! {
    static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
}

/// A world that this thread is in, as long as the value lives.
#[derive(Debug)]
pub struct Entered(());

impl Drop for Entered {
    fn drop(&mut self) {
        WORLD.take();
    }
}

/// Enters a world: from now on this thread is in it.
#[must_use]
pub fn enter(world: Rc<dyn World>) -> Entered {
    WORLD.set(Some(world));
    Entered(())
}

fn world() -> Option<Rc<dyn World>> {
    WORLD.with_borrow(Clone::clone)
}

pub(super) fn is_entered() -> bool {
    WORLD.with_borrow(Option::is_some)
}

pub(super) fn temporary_dir() -> Option<PathBuf> {
    Some(world()?.temporary_dir())
}

/// Connects in the world of this thread, if it is in one.
pub(super) fn connect(address: SocketAddr) -> Option<Later<io::Result<Box<dyn Stream>>>> {
    Some(world()?.connect(address))
}

/// Runs a worker's job.
pub(super) fn work<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let delay = world().map_or(Duration::ZERO, |world| world.worker_delay());
    tokio::task::spawn_local(async move {
        sleep(delay).await;
        job()
    })
}

/// A file that takes time.
pub(crate) struct SlowFile(std::fs::File);

impl From<std::fs::File> for SlowFile {
    fn from(file: std::fs::File) -> Self {
        Self(file)
    }
}

impl SlowFile {
    pub(super) async fn read_exact_at(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        if let Some(world) = world() {
            sleep(world.file_delay()).await;
            world.before_read()?;
        }
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    pub(super) async fn write_all_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(world) = world() {
            sleep(world.file_delay()).await;
        }
        self.0.write_all_at(bytes, at)
    }
}
