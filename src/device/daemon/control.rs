//! The language of control sockets: one JSON line each way, bounded in length and time. Here is the client's side; `serve`
//! answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::device::state::{Process, State, StateDir, StateError};
use crate::device::stats::DeviceStats;
use crate::device::users::{self, User};
use crate::device::{Backend, DeviceError, ublk, wait_until};
use crate::fetch::FetchStats;

/// No request is longer.
pub(super) const MAX_REQUEST_BYTES: u64 = 4 << 10;

/// No answer is longer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// A client that says nothing for this long is hung up on.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// How long a daemon may take to answer. Taking a device down takes it the longest.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How long others may take to let go of copies of a mount that is gone.
const COPIES_LIMIT: Duration = Duration::from_secs(2);

/// How long a daemon may live on after its device is gone.
const EXIT_LIMIT: Duration = Duration::from_secs(20);

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "ask", deny_unknown_fields)]
pub(super) enum Request {
    /// The counters.
    Stats,
    /// Take the device down and end.
    Detach,
}

/// What the daemon answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// To [`Request::Stats`].
    Stats(Box<DaemonStats>),
    /// To [`Request::Detach`]: the device is gone.
    Detached,
    /// To anything: it cannot be done.
    Refused(String),
}

/// What a daemon has counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonStats {
    /// Of the device.
    pub device: DeviceStats,
    /// Of the fetcher.
    pub fetch: FetchStats,
    /// How long the device has been served, in milliseconds.
    pub up_ms: u64,
    /// The daemon's resident memory in bytes.
    pub resident_bytes: u64,
}

/// Why a daemon could not be asked or would not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No device of ours has this name.
    #[error("{0} is not attached by tarblk; `tarblk ps` lists what is")]
    Unknown(String),
    /// A state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The daemon does not answer as it should.
    #[error("the daemon of {name} (pid {pid}) does not answer: {cause}")]
    Silent {
        /// The device.
        name: String,
        /// Its daemon.
        pid: u32,
        /// What happened instead.
        cause: String,
    },
    /// The daemon is gone.
    #[error("the daemon of {name} (pid {pid}) is dead; `tarblk {cleans_up}` cleans up")]
    Dead {
        /// The device.
        name: String,
        /// The daemon it had.
        pid: u32,
        /// The command that removes what it left: `umount DIR` while it is mounted, else `detach NAME`.
        cleans_up: String,
    },
    /// The device is in use.
    #[error("{device} is in use: {users}; unmount it first")]
    InUse {
        /// The device.
        device: PathBuf,
        /// By whom.
        users: String,
    },
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
    /// The kernel would not let go of a dead daemon's device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Asks the daemon of `state` for its counters.
///
/// # Errors
/// When it is dead or does not answer.
pub fn stats(states: &StateDir, state: &State) -> Result<DaemonStats, ControlError> {
    match ask(states, state, Request::Stats)? {
        Answer::Stats(counted) => Ok(*counted),
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        Answer::Detached => Err(silent(state, "it answered something else")),
    }
}

/// Takes the device of `state` down and waits until its process, device and files are gone. Works for a dead daemon's device
/// as well.
///
/// # Errors
/// [`ControlError::InUse`] when the device is mounted or otherwise in use, or whatever else kept it.
pub fn detach(states: &StateDir, state: &State) -> Result<(), ControlError> {
    if !state.is_alive() {
        return bury(states, state);
    }
    // The daemon will look too, but it sees mounts from its own namespace.
    refuse_if_used_for_long(state)?;
    match ask(states, state, Request::Detach)? {
        Answer::Detached => {
            if !wait_for_end(&state.process) {
                return Err(silent(state, "it took the device down but does not end"));
            }
            // What it could not remove itself.
            states.remove(state);
            Ok(())
        }
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        Answer::Stats(_) => Err(silent(state, "it answered something else")),
    }
}

/// Removes what a dead daemon left: its device, unless that is in use, and its files.
pub(crate) fn bury(states: &StateDir, state: &State) -> Result<(), ControlError> {
    if state.device_exists() {
        refuse_if_used_for_long(state)?;
        match state.backend {
            Backend::Ublk => ublk::delete_dead(state.number, state.process.pid)?,
            // The kernel takes a loop device down at its last close, and somebody has it open still.
            Backend::Loop => {}
        }
    }
    states.remove(state);
    Ok(())
}

/// Ends the reads that wait for a dead daemon, of a device that may be mounted: nobody will answer them any more.
pub(crate) fn end_reads(state: &State) -> Result<(), ControlError> {
    match state.backend {
        Backend::Ublk => Ok(ublk::stop_dead(state.number, state.process.pid)?),
        // Its reads failed when the daemon died.
        Backend::Loop => Ok(()),
    }
}

/// Fails when something uses the device.
pub(super) fn refuse_if_used(state: &State) -> Result<(), ControlError> {
    let users = users::of(&state.device);
    if users.is_empty() {
        return Ok(());
    }
    let users = users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(ControlError::InUse {
        device: state.device.clone(),
        users,
    })
}

/// The same, but not because of a mount that only others see and that they let go of: a process that starts in a mount
/// namespace of its own (another device's daemon, a container) takes a copy of every mount along at first.
fn refuse_if_used_for_long(state: &State) -> Result<(), ControlError> {
    let seen_here = |user: &User| matches!(user, User::Mount(_) | User::Holder(_));
    wait_until(COPIES_LIMIT, || {
        let users = users::of(&state.device);
        users.is_empty() || users.iter().any(seen_here)
    });
    refuse_if_used(state)
}

fn silent(state: &State, cause: &str) -> ControlError {
    ControlError::Silent {
        name: state.name.clone(),
        pid: state.process.pid,
        cause: cause.to_owned(),
    }
}

fn ask(states: &StateDir, state: &State, request: Request) -> Result<Answer, ControlError> {
    if !state.is_alive() {
        let mounted = users::mount_points(&state.device);
        return Err(ControlError::Dead {
            name: state.name.clone(),
            pid: state.process.pid,
            cleans_up: match mounted.last() {
                Some(dir) => format!("umount {}", dir.display()),
                None => format!("detach {}", state.name),
            },
        });
    }
    let ask = || -> io::Result<Answer> {
        let mut stream = UnixStream::connect(states.socket(&state.name))?;
        stream.set_write_timeout(Some(REQUEST_LIMIT))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_line(&mut answer)?;
        if answer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up"));
        }
        Ok(serde_json::from_str(&answer)?)
    };
    ask().map_err(|error| silent(state, &error.to_string()))
}

/// Waits until a process has ended; false when it does not.
fn wait_for_end(process: &Process) -> bool {
    let deadline = Instant::now() + EXIT_LIMIT;
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let Some(fd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
        return !process.is_alive();
    };
    while process.is_alive() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let Ok(timeout) = Timespec::try_from(left) else {
            return false;
        };
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
    }
    true
}
