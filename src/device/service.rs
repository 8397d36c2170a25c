//! The process that serves devices, and what keeps it. In: [`ServeSpec`]s, from commands, over a Unix socket. Out: devices that outlive
//! any of the processes; for each a state file, and answers about it.
//!
//! ```text
//! command ──service.sock──> service: all devices of a state directory        started by the first command, ends when idle
//!                              │ descriptors (keeper-0.sock, keeper-1.sock)
//!                           keepers: hold them, start the service again when it dies; the service starts them again
//! ```
//!
//! All of these are this program under a hidden subcommand, which calls [`main`] with a word for the `Role`. What an image is
//! described by is the caller's type: a [`Builder`] makes image and fetcher of it.
//!
//! The parts: `message` (what goes over sockets), `control` (the protocol) and `client` (who asks), `keeper`, `held` and `holders` (both ends of
//! what outlives the service), `manager` and `store` (the service manager, which may hold it too), `record` and `counts` (what a restarted service reads), `table` (the devices of a service), `run` (its life),
//! `blame` (which device takes it down), `nothing` (what is served of a device that cannot be gone on with), `namespace` (what it keeps mounted), `sandbox` (what it may still do), `scrape` (its metrics by HTTP), `start` (what is read while a device starts).
//!
//! Invariant: a device is announced only when every keeper holds what a new service needs to go on with it.

mod blame;
mod client;
mod control;
mod counts;
mod held;
mod holders;
mod keeper;
mod manager;
mod message;
mod namespace;
mod nothing;
mod record;
mod run;
mod sandbox;
mod scrape;
mod start;
mod store;
mod table;

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::{State, StateDir, StateError};
use super::trace::Trace;
use super::volume::BlobReader;
use super::{DeviceError, DeviceOptions};
use crate::fetch::FetchStats;
use crate::image::{BlockImage, FileMap};
use crate::profile::RecordedRead;
pub use client::{Stay, detach, launch, let_go, runs_other, stats, stay, trace, upgrade};
pub(crate) use client::{bury, conditions, end_reads, is_over};
pub(crate) use control::Condition;
pub use control::ControlError;
pub use counts::ServiceStats;
pub use manager::{READY, STOPPING, given, notify};
pub use namespace::Reach;
pub(crate) use sandbox::limits_writes;
pub use store::DescriptorStore;

/// The log of the service and its keepers, in the state directory.
pub(crate) const LOG_NAME: &str = "service.log";

/// The older part of the log, once it was too long.
const OLDER_LOG_NAME: &str = "service.log.1";

/// How long a service without devices stays unless its builder says otherwise.
pub const IDLE_LIMIT: Duration = Duration::from_secs(20);

/// Under this name the keepers hold the service's own socket.
const LISTENER_NAME: &str = "service";

/// What is served: a block device, and the image on it as `I` describes it to the service's [`Builder`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeSpec<I> {
    /// How the device is made.
    pub options: DeviceOptions,
    /// The layer as a person named it, without secrets: shown by lists of devices and kept in the state.
    pub source: String,
    /// Where state, socket and log are kept.
    pub states: PathBuf,
    /// What the builder makes image and fetcher of. Only ever passed through a socket, so secrets may be in it.
    pub image: I,
}

/// What a builder makes.
pub struct Served {
    /// The image.
    pub image: Arc<dyn BlockImage>,
    /// The bytes of its layers.
    pub bytes: Arc<dyn BlobReader>,
    /// What the fetcher has counted.
    pub fetch_stats: Box<dyn Fn() -> FetchStats + Send + Sync>,
    /// Called when the device is gone: ends the fetcher in good order.
    pub finish: Box<dyn FnOnce() + Send>,
    /// The files of the image, for whoever asks what was read.
    pub files: Option<Arc<dyn FileMap>>,
    /// Learns from the device's start; none if nothing is to be learned.
    pub learner: Option<Box<dyn StartLearner>>,
}

/// What knows how an image starts.
pub trait StartLearner: Send + Sync {
    /// A new device is about to be read: what earlier starts read is fetched ahead of its reader from now on.
    fn begin(&self);

    /// The start is over, and this was read; `trace` is the same for people.
    fn learn(&self, reads: &[RecordedRead], trace: &Trace);
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("image", &self.image)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// Whatever kept a builder from building.
pub type BuildError = Box<dyn std::error::Error + Send + Sync>;

/// Makes images and fetchers of their descriptions, in the process that serves them.
pub trait Builder: Send + Sync + 'static {
    /// The description.
    type Image: Serialize + DeserializeOwned + Clone + Send;

    /// Makes image and fetcher. The same description makes the same image, bit for bit, in every process.
    ///
    /// # Errors
    /// Why there is no image.
    fn build(&self, image: Self::Image) -> Result<Served, BuildError>;

    /// The files of this machine that the image is made of or whose bytes it shows. Each is opened by the command and stays open as
    /// long as the device lives, whatever becomes of its name.
    fn files(image: &Self::Image) -> Vec<PathBuf> {
        let _ = image;
        Vec::new()
    }

    /// The same description with each of [`files`](Self::files) at another path.
    fn moved(image: Self::Image, paths: &[PathBuf]) -> Self::Image {
        let _ = paths;
        image
    }

    /// The same description with nothing in it that must not be in a file.
    fn without_secrets(image: &Self::Image) -> Self::Image {
        image.clone()
    }

    /// The directories of this machine that serving the image writes to.
    fn writes(image: &Self::Image) -> Vec<PathBuf> {
        let _ = image;
        Vec::new()
    }

    /// What the service will need of the file system from now on.
    fn reach(&self) -> Reach;

    /// How long a service without devices stays, for the next one to be there at once.
    fn idle_limit(&self) -> Duration {
        IDLE_LIMIT
    }
}

/// A device that is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// What is known of it.
    #[serde(flatten)]
    pub state: State,
    /// Why `auto` did not take ublk.
    pub why_not_ublk: Option<String>,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Only root can make block devices.
    #[error("this makes a block device, which needs root (CAP_SYS_ADMIN): try sudo")]
    NotRoot,
    /// A directory or file of states cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The image or the fetcher could not be built.
    #[error("{0}")]
    Build(BuildError),
    /// The service said why it failed.
    #[error("{0}")]
    Reported(String),
    /// The service ended without a word.
    #[error("the service ended before the device was ready{last_words}")]
    Died {
        /// The last line of its log, if it wrote any.
        last_words: String,
    },
    /// Something around the processes failed.
    #[error("cannot {what}: {cause}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ServiceError {
    move |cause| ServiceError::Io { what, cause }
}

/// What a process of this program is, under the hidden subcommand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Service,
    Keeper,
}

impl Role {
    const fn word(self) -> &'static str {
        match self {
            Self::Service => "serve",
            Self::Keeper => "keep",
        }
    }
}

/// Who started a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// A command: the service has all of root's privileges, in the command's mount namespace, and leaves both.
    First,
    /// A keeper: it inherited what the service before it left itself.
    Again,
}

impl Start {
    const fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Again => "again",
        }
    }
}

/// What the C library is told of memory, unless the environment says something else. It keeps what was given back for each thread and for
/// good once it was large: a service of ten threads, through which a layer comes in pieces of 1 MiB, had 10 MB of that.
const ALLOCATOR: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "2"),
    ("MALLOC_MMAP_THRESHOLD_", "1048576"),
    ("MALLOC_TRIM_THRESHOLD_", "2097152"),
];

/// How to start the service and its keepers: the program and arguments that end in [`main`].
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The directories that the service may write to, besides its states. A device that needs another one has the service started
    /// anew.
    pub writable: Vec<PathBuf>,
}

impl Launcher {
    /// This program under `subcommand`.
    ///
    /// # Errors
    /// When the program's own path cannot be found out.
    pub fn this_program(subcommand: &str) -> Result<Self, ServiceError> {
        // The link stays right when the file has been replaced by a newer version since.
        let program = PathBuf::from("/proc/self/exe");
        fs::metadata(&program).map_err(failed("find this program"))?;
        Ok(Self {
            program,
            arguments: vec![subcommand.into()],
            writable: Vec::new(),
        })
    }

    /// The program in `role`, which is told `word`, with `environment` or else this process's.
    fn command(
        &self,
        role: Role,
        states: &StateDir,
        word: &str,
        environment: Option<Vec<(OsString, OsString)>>,
    ) -> Command {
        let environment = environment.unwrap_or_else(|| std::env::vars_os().collect());
        let mut command = Command::new(&self.program);
        command
            .arg0("tarblk")
            .args(&self.arguments)
            .arg(role.word())
            .arg(states.path())
            .arg(word)
            .args(&self.writable)
            .env_clear()
            .envs(ALLOCATOR)
            .envs(environment)
            // What it needs of that it is told by message; a process's environment is there to be read all its life.
            .env_remove("TARBLK_CREDS")
            // Who starts it speaks with the service manager, if there is one.
            .env_remove("NOTIFY_SOCKET");
        command
    }
}

/// The hidden subcommand: what this process is to be is told by `arguments`, those behind the subcommand. The caller has set up
/// logging to stderr, which is the service's log, and has started no thread.
pub fn main<B: Builder>(subcommand: &str, arguments: &[OsString], builder: B) -> ExitCode {
    // Out of the terminal's reach before anything else. This fails only where there is nothing to leave.
    let _ = rustix::process::setsid();
    let _ = std::env::set_current_dir("/");
    let mut launcher = match Launcher::this_program(subcommand) {
        Ok(launcher) => launcher,
        Err(error) => {
            log::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let [role, states, which, writable @ ..] = arguments else {
        log::error!("this subcommand is for tarblk itself");
        return ExitCode::FAILURE;
    };
    launcher.writable = writable.iter().map(PathBuf::from).collect();
    let states = StateDir::new(Path::new(states));
    match (role.to_str(), which.to_str()) {
        (Some("serve"), Some(which)) => {
            let start = if which == Start::Again.word() {
                Start::Again
            } else {
                Start::First
            };
            match run::service(&states, launcher, builder, start) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    log::error!("{error}");
                    ExitCode::FAILURE
                }
            }
        }
        (Some("keep"), Some(number)) => match number.parse() {
            Ok(number) => keeper::keep(&states, number, launcher),
            Err(_) => ExitCode::FAILURE,
        },
        _ => ExitCode::FAILURE,
    }
}

/// Opens the files that the service gets along with a specification.
fn open_files(paths: &[PathBuf]) -> io::Result<Vec<OwnedFd>> {
    paths.iter().map(|path| Ok(fs::File::open(path)?.into())).collect()
}
