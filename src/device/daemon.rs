//! The process that serves one device. In: a [`ServeSpec`], as JSON on its stdin. Out: a line on its stdout that says that the
//! device is ready or why it is not; then a state file, a control socket and a log, for as long as it lives.
//!
//! [`launch`] starts one: this program again, under a hidden subcommand, so that it has no threads, locks or buffers of its
//! parent's. The subcommand calls [`main`], which detaches from the terminal and serves; [`serve`] does the same in the
//! foreground. What an image is described by is the caller's type: it hands over a builder that makes image and fetcher of
//! it. The parts: `control` (the socket's protocol and its client), `namespace` (what the daemon keeps mounted), `serve` (the
//! daemon's life).

mod control;
mod namespace;
mod serve;

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, thread};

use serde::{Deserialize, Serialize};

use super::state::{State, StateDir, StateError};
use super::volume::BlobReader;
use super::{DeviceError, DeviceOptions};
use crate::fetch::FetchStats;
use crate::image::BlockImage;
pub use control::{ControlError, DaemonStats, detach, stats};
pub(crate) use control::{bury, end_reads};
pub use namespace::Reach;
pub use serve::{main, serve};

/// No spec is longer: what is big in it (an index) is passed by the path of a file.
const MAX_SPEC_BYTES: u64 = 16 << 20;

/// How long a daemon that has failed may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// No report is longer.
const MAX_REPORT_BYTES: u64 = 64 << 10;

/// What a daemon serves: a block device, and the image on it as `I` describes it to the daemon's builder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeSpec<I> {
    /// How the device is made.
    pub options: DeviceOptions,
    /// The layer as a person named it, without secrets: shown by lists of devices and kept in the state.
    pub source: String,
    /// Where state, socket and log are kept.
    pub states: PathBuf,
    /// What the builder makes image and fetcher of. Only ever passed through a pipe, so secrets may be in it.
    pub image: I,
}

/// What a builder makes.
pub struct Served {
    /// The image.
    pub image: Arc<dyn BlockImage>,
    /// The bytes of its layers.
    pub bytes: Arc<dyn BlobReader>,
    /// What the fetcher has counted.
    pub fetch_stats: Box<dyn Fn() -> FetchStats>,
    /// Called when the device is gone: ends the fetcher in good order.
    pub finish: Box<dyn FnOnce()>,
    /// What it will need of the file system from now on.
    pub reach: Reach,
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

/// A device that is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// What is known of it.
    #[serde(flatten)]
    pub state: State,
    /// Why `auto` did not take ublk.
    pub why_not_ublk: Option<String>,
}

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
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
    /// The daemon said why it failed.
    #[error("{0}")]
    Reported(String),
    /// The daemon ended without a word.
    #[error("the daemon ended before the device was ready ({status}){last_words}")]
    Died {
        /// How it ended.
        status: String,
        /// The last line of its log, if it wrote any.
        last_words: String,
    },
    /// Something around the process failed.
    #[error("cannot {what}: {cause}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |cause| DaemonError::Io { what, cause }
}

/// What a daemon says on its stdout, once.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Report {
    Ready(Box<Attached>),
    Failed(String),
}

/// How to start a daemon: the program and arguments that end in [`main`].
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Launcher {
    /// This program under `subcommand`.
    ///
    /// # Errors
    /// When the program's own path cannot be found out.
    pub fn this_program(subcommand: &str) -> Result<Self, DaemonError> {
        // The link stays right when the file has been replaced by a newer version since.
        let program = PathBuf::from("/proc/self/exe");
        fs::metadata(&program).map_err(failed("find this program"))?;
        Ok(Self {
            program,
            arguments: vec![subcommand.into()],
        })
    }
}

/// Starts a daemon and waits until its device is ready.
///
/// # Errors
/// Why there is no device; then nothing is left of the daemon either.
pub fn launch<I: Serialize>(launcher: &Launcher, spec: &ServeSpec<I>) -> Result<Attached, DaemonError> {
    if !rustix::process::geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    let states = StateDir::new(&spec.states);
    states.create()?;
    let log =
        states.log(&format!("starting-{}-{:?}", std::process::id(), thread::current().id()).replace(['(', ')'], ""));
    let attached = launch_logging_to(launcher, spec, &log);
    // A daemon that is ready has given its log the device's name.
    let _ = fs::remove_file(&log);
    attached
}

fn launch_logging_to<I: Serialize>(
    launcher: &Launcher,
    spec: &ServeSpec<I>,
    log: &Path,
) -> Result<Attached, DaemonError> {
    let log_file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(log)
        .map_err(failed("write a log"))?;
    let mut child = Command::new(&launcher.program)
        .args(&launcher.arguments)
        // What it needs of that it is told through the pipe; a process's environment is there to be read all its life.
        .env_remove("TARBLK_CREDS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(failed("start the daemon"))?;
    let told = tell_and_listen(&mut child, spec, log);
    match told {
        Ok(Some(Report::Ready(attached))) => {
            // Whoever launches without ending soon after would otherwise keep the dead daemon's entry in the process table.
            thread::spawn(move || child.wait());
            Ok(*attached)
        }
        Ok(Some(Report::Failed(message))) => {
            let _ = child.wait();
            Err(DaemonError::Reported(message))
        }
        Ok(None) => {
            let status = child.wait().map_or_else(|error| error.to_string(), describe);
            Err(DaemonError::Died {
                status,
                last_words: last_words(log),
            })
        }
        Err(error) => {
            // It takes its device down on this signal.
            if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap_or(0)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            end(child);
            Err(error)
        }
    }
}

/// Waits a while for the end of a daemon that has failed. One whose thread is stuck in the kernel never ends, and must not
/// keep us from saying so.
fn end(mut child: Child) -> Option<ExitStatus> {
    let mut status = None;
    super::wait_until(END_LIMIT, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    });
    if status.is_none() {
        leave(child);
    }
    status
}

/// Lets a daemon live on. Whoever launches and does not end soon after would otherwise keep its entry in the process table
/// when it has died.
fn leave(mut child: Child) {
    thread::spawn(move || child.wait());
}

/// Hands the spec over and waits for the report; none means that the daemon ended without one.
fn tell_and_listen<I: Serialize>(
    child: &mut Child,
    spec: &ServeSpec<I>,
    log: &Path,
) -> Result<Option<Report>, DaemonError> {
    let order = Order {
        spec,
        log: Some(log.to_owned()),
    };
    let text = serde_json::to_vec(&order).map_err(|error| failed("write the daemon's order")(error.into()))?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(&text)
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        return Err(failed("talk to the daemon")(error));
    }
    let Some(stdout) = child.stdout.take() else {
        return Ok(None);
    };
    for line in BufReader::new(stdout.take(MAX_REPORT_BYTES)).lines() {
        // Anything else on stdout is not for us.
        if let Some(report) = line.map_err(failed("listen to the daemon"))?.strip_prefix(REPORT_MARK) {
            let report = serde_json::from_str(report).map_err(|error| failed("understand the daemon")(error.into()))?;
            return Ok(Some(report));
        }
    }
    Ok(None)
}

/// Begins the line of the report.
const REPORT_MARK: &str = "tarblk-report ";

/// What goes through the daemon's stdin: a [`ServeSpec`], lent or owned, and the log file that its stderr is.
#[derive(Serialize, Deserialize)]
struct Order<S> {
    spec: S,
    log: Option<PathBuf>,
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => status.to_string(),
    }
}

/// The end of a log, for a message of one line.
fn last_words(log: &Path) -> String {
    const MOST: usize = 500;
    let mut text = String::new();
    let read = fs::File::open(log).and_then(|file| file.take(1 << 20).read_to_string(&mut text));
    match text.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) if read.is_ok() => format!(
            "; its last words: {}",
            line.trim().chars().take(MOST).collect::<String>()
        ),
        _ => String::new(),
    }
}
