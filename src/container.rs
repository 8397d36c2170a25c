//! A container of an image, by an OCI runtime (runc, crun) and nothing else. In: an image's configuration, what a person wants of it, and a
//! directory in which the image can be written on. Out: a bundle (OCI runtime specification), a running container whose exit status is
//! told, and afterwards nothing.
//!
//! Everything of one container lies in a directory of its own, which a lock is held on for as long as the command lives that made it. A
//! directory without that lock is of a command that was killed: the next one ends its container and removes it.
//!
//! It never reads a file of the image by a path that could lead out of it, and never asks a network.
//!
//! Parts: `spec` (the runtime's config.json), `seccomp` (calls that are refused), `user` (names of the image's users, and its programs),
//! `runtime` (the runtime's process and signals).

mod runtime;
mod seccomp;
mod spec;
mod user;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;

pub use runtime::{Runtime, Signals};
pub use spec::{ImageSettings, Network, SystemCalls, Volume, Wanted};

use crate::device::state::{StateDir, write_whole};
use crate::device::{take_turn, users, wait_until};
use crate::digest::{Algorithm, Digest};
use crate::mount::{self, MountError};
use crate::owned::{self, OwnedError};

/// Where containers are while they run, unless a command says otherwise.
pub const DEFAULT_DIR: &str = "/var/lib/tarblk/run";

/// How long the kernel may take to let go of a container's root that has ended.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(10);

/// How long others may look after containers that were left.
const TURN_LIMIT: Duration = Duration::from_secs(60);

/// What a shell says of a command that is not there, and of one that cannot be run.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// Its directory is not root's alone.
    #[error(transparent)]
    Directory(#[from] OwnedError),
    /// Another command has been looking after what was left for too long.
    #[error("another tarblk command keeps {0} locked")]
    Locked(PathBuf),
    /// A file, directory or process around it failed.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The image could not be mounted, or unmounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The image says nothing that could be run, or something that makes no sense; or the command line does.
    #[error("{0}")]
    Settings(String),
    /// There is no such program in the image.
    #[error("the image has no program {0}")]
    NotFound(String),
    /// It is there and is none.
    #[error("{0} is no program that can be executed")]
    NotExecutable(String),
    /// There is no OCI runtime.
    #[error("there is no runc and no crun on this machine's PATH; install one, or say --runtime PATH")]
    NoRuntime,
}

impl ContainerError {
    /// The exit status of a container that ends so before it begins, as shells and engines have it; `None` for what is not
    /// the container's.
    #[must_use]
    pub const fn status(&self) -> Option<u8> {
        match self {
            Self::NotFound(_) => Some(NOT_FOUND),
            Self::NotExecutable(_) => Some(NOT_EXECUTABLE),
            _ => None,
        }
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ContainerError {
    let path = path.to_owned();
    move |cause| ContainerError::Io { what, path, cause }
}

/// The directory of all containers, and how they are ended.
#[derive(Clone, Debug)]
pub struct Containers {
    dir: PathBuf,
    states: StateDir,
}

/// A container's directory. [`Bundle::remove`] takes everything away again.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    id: String,
    /// What runs it; none if its command was killed before that was noted.
    runtime: Option<Runtime>,
    states: StateDir,
    /// Locked as long as it is open.
    _lock: File,
}

impl Containers {
    /// Those in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`ContainerError::Directory`].
    pub fn open(dir: &Path, states: &StateDir) -> Result<Self, ContainerError> {
        Ok(Self {
            dir: owned::directory(dir)?,
            states: states.clone(),
        })
    }

    /// Those in `dir`, if it is there.
    ///
    /// # Errors
    /// [`ContainerError::Directory`].
    pub fn existing(dir: &Path, states: &StateDir) -> Result<Option<Self>, ContainerError> {
        if fs::symlink_metadata(dir).is_err() {
            return Ok(None);
        }
        Self::open(dir, states).map(Some)
    }

    /// Waits for the caller's turn to make or remove directories.
    fn turn(&self) -> Result<File, ContainerError> {
        let turn = take_turn(&self.dir, TURN_LIMIT).map_err(failed("open", &self.dir))?;
        turn.ok_or_else(|| ContainerError::Locked(self.dir.clone()))
    }

    /// A directory for another container, which `runtime` is to run.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn create(&self, runtime: Runtime) -> Result<Bundle, ContainerError> {
        let _turn = self.turn()?;
        let id = new_id();
        let dir = self.dir.join(&id);
        for part in ["", "bundle", "bundle/rootfs", "overlay", "runtime"] {
            let path = dir.join(part);
            DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(failed("make", &path))?;
        }
        let lock = lock(&dir)?.ok_or_else(|| ContainerError::Locked(dir.clone()))?;
        // Invariant: it is noted before anything is run.
        runtime.note(&dir)?;
        Ok(Bundle {
            dir,
            id,
            runtime: Some(runtime),
            states: self.states.clone(),
            _lock: lock,
        })
    }

    /// Ends the containers of commands that were killed, and removes what they left. What cannot be removed is told of and stays.
    ///
    /// # Errors
    /// [`ContainerError`] when the directory cannot be looked through.
    pub fn remove_left(&self) -> Result<(), ContainerError> {
        let _turn = self.turn()?;
        for entry in fs::read_dir(&self.dir).map_err(failed("read", &self.dir))?.flatten() {
            let Some(id) = entry.file_name().to_str().filter(|id| is_id(id)).map(str::to_owned) else {
                continue;
            };
            let dir = entry.path();
            let Some(lock) = lock(&dir)? else { continue };
            let removed = Runtime::of_container(&dir).and_then(|runtime| {
                let left = Bundle {
                    dir,
                    id,
                    runtime,
                    states: self.states.clone(),
                    _lock: lock,
                };
                left.remove()
            });
            if let Err(error) = removed {
                log::warn!("{error}");
            }
        }
        Ok(())
    }
}

/// Locks a container's directory; `None` if a living command has it.
fn lock(dir: &Path) -> Result<Option<File>, ContainerError> {
    let file = match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("open", dir))?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed("lock", dir)(error.into())),
    }
}

/// So many digits has a container's name.
const ID_DIGITS: usize = 12;

fn new_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unique = format!("{} {}", std::process::id(), now.as_nanos());
    Digest::of(Algorithm::Sha256, unique.as_bytes()).hex()[..ID_DIGITS].to_owned()
}

fn is_id(name: &str) -> bool {
    name.len() == ID_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Bundle {
    /// The container's name, and its host name if nothing else is said.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the image is to be mounted, writable.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("bundle/rootfs")
    }

    /// Where it is written to what nobody wants to keep.
    #[must_use]
    pub fn overlay(&self) -> PathBuf {
        self.dir.join("overlay")
    }

    /// Writes down what the runtime is to do, when the image is mounted.
    ///
    /// # Errors
    /// [`ContainerError`]: what `wanted` and the image do not agree upon.
    pub fn prepare(&self, image: &ImageSettings, wanted: &Wanted) -> Result<(), ContainerError> {
        let spec = spec::spec(image, wanted, &self.root(), &self.id)?;
        let path = self.dir.join("bundle/config.json");
        let text = serde_json::to_vec_pretty(&spec).map_err(|error| failed("write", &path)(error.into()))?;
        write_whole(&path, &text, false).map_err(failed("write", &path))
    }

    /// Runs the container to its end; returns its exit status, as a shell has it.
    ///
    /// # Errors
    /// [`ContainerError::Io`] when the runtime cannot be started.
    pub fn run(&self, wanted: &Wanted, signals: &Signals, stop: rustix::process::Signal) -> Result<u8, ContainerError> {
        let runtime = self.runtime.as_ref().ok_or(ContainerError::NoRuntime)?;
        runtime.run(&self.dir, &self.id, wanted, signals, stop)
    }

    /// Ends the container if it runs, unmounts its image and removes all of it.
    ///
    /// # Errors
    /// What stays, and why.
    pub fn remove(self) -> Result<(), ContainerError> {
        if let Some(runtime) = &self.runtime {
            runtime.delete(&self.dir, &self.id)?;
        }
        // The image, and if a command was killed while it mounted, what is under it.
        let mounts = users::mounts().map_err(failed("look below", &self.dir))?;
        let below = mounts.iter().rev().filter(|line| line.point.starts_with(&self.dir));
        for line in below {
            let mut cleared = Ok(());
            // Mounts go with the last process, which may take a moment.
            wait_until(UNMOUNT_LIMIT, || {
                cleared = mount::clear(&self.states, &line.point);
                !matches!(cleared, Err(MountError::Busy { .. }))
            });
            cleared?;
        }
        // Invariant: nothing is mounted below it any more, and links are not followed.
        fs::remove_dir_all(&self.dir).map_err(failed("remove", &self.dir))
    }
}
