//! containerd's snapshots, lazily: a proxy plug-in for containerd (and Docker, which has one in it). In: the calls of containerd's
//! snapshots service, on a Unix socket. Out: mounts of the machine, and records on disk that outlive any kill.
//!
//! This process answers, notes and mounts; block devices belong to the machine's service, of which it is a client as `tarblk mount`
//! is. It may be killed at any instruction: what it had answered is on disk, and devices and mounts stay. It starts without asking
//! any server, and unmounts nothing that is in use.
//!
//! Parts: `messages` and `grpc` (what is spoken), `labels` and `filters` (what clients say in it), `records` (what is known),
//! `images` (what can be lazy), `claims` (which layers are not unpacked), `chains` (devices), `snapshots` (containerd's semantics), `usage`,
//! `config`; `image_service` (a kubelet's pulls, for their logins); `content` (layers for those who want them whole) and
//! `setup` (how engines are told), which are commands of their own.

mod chains;
mod claims;
mod config;
pub mod content;
mod filters;
pub mod grpc;
mod image_service;
mod images;
mod labels;
pub mod messages;
mod records;
pub mod setup;
mod snapshots;
mod usage;

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::sync::watch;

pub use chains::{ChainError, Mounter};
pub use config::{CONTAINERD, Config, ConfigError, FILE_NAME, Lazy, RepositoryPolicy};
pub use images::{Declined, Reason, Verdict, verdicts};
pub use records::{Moment, RecordError};

use crate::device::inventory;
use crate::device::state::{StateDir, StateError};
use crate::open::{Cache, OpenError, TrustPolicy, default_cache_dir};
use chains::Chains;
use image_service::ImageService;
use images::Images;
use records::Records;
use snapshots::Snapshots;

/// How often is looked what is idle, at most.
const LOOK_PAUSE: Duration = Duration::from_secs(30);

/// Why the snapshotter does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotterError {
    /// Only root can mount.
    #[error("the snapshotter mounts, which needs root (CAP_SYS_ADMIN)")]
    NotRoot,
    /// Another one has the same root.
    #[error("another tarblk snapshotter uses {0}")]
    Running(PathBuf),
    /// Records cannot be read or kept.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// Device states cannot be kept.
    #[error(transparent)]
    States(#[from] StateError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(Box<OpenError>),
    /// A file, directory or socket cannot be used.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn unusable(path: &Path) -> impl FnOnce(io::Error) -> SnapshotterError {
    let path = path.to_owned();
    move |cause| SnapshotterError::Io { path, cause }
}

/// What the snapshotter is given of the machine.
pub struct Machine {
    /// Where the service of all devices is.
    pub states: StateDir,
    /// How devices are attached by it and mounted.
    pub mounter: Mounter,
    /// Whom indexes beside images are believed.
    pub trust: TrustPolicy,
    /// Sockets that a service manager opened, and holds open while this process is away.
    pub sockets: Vec<UnixListener>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("states", &self.states)
            .field("trust", &self.trust)
            .finish_non_exhaustive()
    }
}

/// Serves until `stop` becomes true. `ready` is called when containerd can call.
///
/// # Errors
/// Why it does not run.
pub fn run(
    config: &Config,
    machine: Machine,
    stop: &watch::Receiver<bool>,
    ready: impl FnOnce(),
) -> Result<(), SnapshotterError> {
    let Machine {
        states,
        mounter,
        trust,
        mut sockets,
    } = machine;
    if !rustix::process::geteuid().is_root() {
        return Err(SnapshotterError::NotRoot);
    }
    // In mount tables directories stand without links and dots.
    make_directory(&config.root)?;
    let root = fs::canonicalize(&config.root).map_err(unusable(&config.root))?;
    let config = &Config {
        root: root.clone(),
        ..config.clone()
    };
    let _lock = lock(&root)?;
    let dir = root.join("snapshots");
    make_directory(&dir)?;
    states.create()?;
    if let Err(error) = inventory::sweep(&states) {
        log::warn!("{error}");
    }
    let cache_dir = config.cache.clone().unwrap_or_else(default_cache_dir);
    let cache = Cache::new(&cache_dir).map_err(|error| SnapshotterError::Cache(Box::new(error)))?;
    let cache = cache.with_limit(config.cache_size);
    let records = Records::open(&root.join("records"), highest(&dir).map_err(unusable(&dir))? + 1)?;
    let images = Arc::new(Images::new(config, trust, cache).map_err(unusable(&root))?);
    let chains = Chains::new(&dir, states, config, Arc::clone(&images), mounter);
    let snapshots = Arc::new(Snapshots::new(&dir, records, images, chains));
    let listener = Listener::open(&config.address, &mut sockets)?;
    let image_service = match &config.image_service {
        Some(address) => {
            let listener = Listener::open(address, &mut sockets)?;
            let service = ImageService::new(&config.containerd, &config.logins());
            let taken = listener.socket.try_clone().map_err(unusable(address))?;
            let serving = service.spawn(taken, stop.clone()).map_err(unusable(address))?;
            log::info!("pulls of images are passed on to {}", config.containerd.display());
            Some((listener, serving))
        }
        None => None,
    };
    for socket in &sockets {
        log::warn!("{socket:?} was handed over and is no socket of this set-up");
    }
    let keeping = keep_tidy(Arc::clone(&snapshots), config.idle, stop.clone());
    ready();
    let calls: Arc<dyn grpc::Calls> = snapshots;
    let socket = listener.socket.try_clone().map_err(unusable(&config.address))?;
    let served = grpc::serve(socket, &calls, stop).map_err(unusable(&config.address));
    drop((keeping, image_service, listener));
    served
}

/// A socket on which calls come.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    /// Its file, which goes with it; none of a socket that a service manager holds.
    own: Option<PathBuf>,
}

impl Listener {
    /// Listens at `address`: on the socket of `handed` that is there, or else on a new one.
    fn open(address: &Path, handed: &mut Vec<UnixListener>) -> Result<Self, SnapshotterError> {
        let is_there = |socket: &UnixListener| {
            let local = socket.local_addr();
            local.is_ok_and(|local| local.as_pathname() == Some(address))
        };
        if let Some(at) = handed.iter().position(is_there) {
            return Ok(Self {
                socket: handed.swap_remove(at),
                own: None,
            });
        }
        Ok(Self {
            socket: listen(address)?,
            own: Some(address.to_owned()),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.own {
            let _ = fs::remove_file(path);
        }
    }
}

fn make_directory(path: &Path) -> Result<(), SnapshotterError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(unusable(path))
}

/// Sees to it that no other process uses the same root; for as long as the value lives.
fn lock(root: &Path) -> Result<File, SnapshotterError> {
    let dir = File::open(root).map_err(unusable(root))?;
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SnapshotterError::Running(root.to_owned())),
        Err(error) => Err(unusable(root)(error.into())),
    }
}

/// The highest number that a snapshot's directory has.
fn highest(dir: &Path) -> io::Result<u64> {
    let numbers = fs::read_dir(dir)?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(numbers.max().unwrap_or(0))
}

fn listen(address: &Path) -> Result<UnixListener, SnapshotterError> {
    let failed = || unusable(address);
    if let Some(parent) = address.parent() {
        make_directory(parent)?;
    }
    // Of a snapshotter that was killed: it had the lock that this process has now.
    if let Err(error) = fs::remove_file(address)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(failed()(error));
    }
    let listener = UnixListener::bind(address).map_err(failed())?;
    fs::set_permissions(address, fs::Permissions::from_mode(0o600)).map_err(failed())?;
    Ok(listener)
}

/// Looks now and then what nothing needs any more, until the snapshotter ends.
fn keep_tidy(snapshots: Arc<Snapshots>, idle: Duration, stop: watch::Receiver<bool>) -> Option<thread::JoinHandle<()>> {
    let pause = LOOK_PAUSE.min(idle / 2).max(Duration::from_millis(100));
    let look = move || {
        while !*stop.borrow() && stop.has_changed().is_ok() {
            snapshots.tidy(idle);
            thread::sleep(pause);
        }
    };
    let spawned = thread::Builder::new().name("tarblk-tidy".to_owned()).spawn(look);
    spawned
        .inspect_err(|error| log::warn!("cannot start a thread: {error}"))
        .ok()
}
