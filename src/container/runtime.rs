//! The OCI runtime as a process. In: a bundle. Out: the container's exit status; meanwhile signals of this process are the container's.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{self, Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::signal::unix::{SignalKind, signal};

use super::spec::Wanted;
use super::{ContainerError, failed};
use crate::device::wait_until;

/// Whoever asks so often for an end gets one, whatever the container does with the signal.
const ENOUGH: u32 = 3;

/// How long another process of the runtime may take to remove a container that has ended.
const OTHERS_LIMIT: Duration = Duration::from_secs(1);

/// What shells add to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;

/// What leads from a container's directory to the program that runs it.
const LINK: &str = "runtime-program";

/// A program that runs containers, by its full path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime(PathBuf);

impl Runtime {
    /// The one that is named, by its path or as a program on the PATH; if none is, runc or crun, the first that is there.
    ///
    /// # Errors
    /// [`ContainerError::NoRuntime`]; [`ContainerError::Io`] when the one that is named is not there.
    pub fn find(named: Option<&Path>) -> Result<Self, ContainerError> {
        let Some(named) = named else {
            let found = ["runc", "crun"].iter().find_map(|name| on_path(Path::new(name)));
            return found.map(Self).ok_or(ContainerError::NoRuntime);
        };
        let path = if named.file_name() == Some(named.as_os_str()) {
            on_path(named)
        } else {
            path::absolute(named).ok()
        };
        let found = path.filter(|path| path.is_file());
        found
            .map(Self)
            .ok_or_else(|| failed("find", named)(io::ErrorKind::NotFound.into()))
    }

    /// The one that a container's directory names; none if it was never given one, so that nothing was run.
    pub(super) fn of_container(dir: &Path) -> Result<Option<Self>, ContainerError> {
        let link = dir.join(LINK);
        match fs::read_link(&link) {
            Ok(path) => Ok(Some(Self(path))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &link)(error)),
        }
    }

    /// Notes in a container's directory that this one runs it: only it knows how to end what it has begun.
    pub(super) fn note(&self, dir: &Path) -> Result<(), ContainerError> {
        let link = dir.join(LINK);
        std::os::unix::fs::symlink(&self.0, &link).map_err(failed("make", &link))
    }

    /// A command of it, with its files below a container's directory.
    fn command(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.0);
        command.arg("--root").arg(dir.join("runtime"));
        command
    }

    /// Runs the container of the bundle in `dir` to its end; returns its exit status, as a shell has it.
    pub(super) fn run(
        &self,
        dir: &Path,
        id: &str,
        wanted: &Wanted,
        signals: &Signals,
        stop: Signal,
    ) -> Result<u8, ContainerError> {
        let mut command = self.command(dir);
        command.args(["run", "--bundle"]).arg(dir.join("bundle")).arg(id);
        if !wanted.interactive && !wanted.tty {
            command.stdin(Stdio::null());
        }
        if !wanted.tty {
            // A terminal's signals come to this process alone, which passes them on; a container with a terminal gets keys instead.
            command.process_group(0);
        }
        let mut child = command.spawn().map_err(failed("run", &self.0))?;
        let target = Target::new(child.id(), stop, wanted.tty, self.kill(dir, id)).map_err(failed("watch", &self.0))?;
        signals.pass_on(target);
        let ended = child.wait();
        signals.state().target = None;
        let status = ended.map_err(failed("wait for", &self.0))?;
        let code = status
            .code()
            .or_else(|| status.signal().map(|number| SIGNALLED.saturating_add(number)));
        Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
    }

    /// What ends a container at once.
    fn kill(&self, dir: &Path, id: &str) -> Command {
        let mut command = self.command(dir);
        command.args(["kill", id, "KILL"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Ends a container, if there is one, and lets the runtime forget it.
    pub(super) fn delete(&self, dir: &Path, id: &str) -> Result<(), ContainerError> {
        let known = dir.join("runtime").join(id);
        if !known.exists() {
            return Ok(());
        }
        // A runtime that runs on after its command was killed takes the container away itself once that ends, and one of the two
        // finds that files went from under it.
        self.try_delete(dir, id).or_else(|_| {
            if wait_until(OTHERS_LIMIT, || !known.exists()) {
                Ok(())
            } else {
                self.try_delete(dir, id)
            }
        })
    }

    /// Has the runtime end a container that it knows, and forget it.
    fn try_delete(&self, dir: &Path, id: &str) -> Result<(), ContainerError> {
        let mut command = self.command(dir);
        command.args(["delete", "--force", id]).stdin(Stdio::null());
        let output = command.output().map_err(failed("run", &self.0))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it does not say why").to_owned();
        Err(failed("end the container by", &self.0)(io::Error::other(said)))
    }
}

/// Where a program is that is called by its name.
fn on_path(name: &Path) -> Option<PathBuf> {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs)
        // Where administrators' programs are, which is not on everybody's PATH.
        .chain(["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from))
        .filter_map(|dir| path::absolute(dir.join(name)).ok())
        .find(|path| path.is_file())
}

/// The signals of this process, which are a container's once there is one; before that it is only counted how often an end is
/// asked for.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    target: Option<Target>,
    /// How often an end was asked for.
    asked: u32,
}

/// Whose the signals are.
#[derive(Debug)]
struct Target {
    /// The runtime's process, which passes them on itself.
    runtime: OwnedFd,
    /// What an end is asked for by.
    stop: Signal,
    /// Whether the runtime gets signals of the terminal itself.
    has_terminal: bool,
    /// What ends a container that does not end by itself.
    kill: Command,
}

impl Target {
    fn new(pid: u32, stop: Signal, has_terminal: bool, kill: Command) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        Ok(Self {
            runtime: pidfd_open(pid.ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?,
            stop,
            has_terminal,
            kill,
        })
    }

    /// Passes a signal on that came to this process, when an end was asked for `asked` times.
    fn signal(&mut self, number: Signal, asked: u32) {
        if number == Signal::WINCH && self.has_terminal {
            return;
        }
        let number = if number == Signal::TERM { self.stop } else { number };
        // It may have ended a moment ago.
        let _ = pidfd_send_signal(&self.runtime, number);
        if asked == ENOUGH
            && let Err(error) = self.kill.status()
        {
            log::warn!("cannot end the container: {error}");
        }
    }
}

/// What is passed on, and whether it asks for an end.
const PASSED_ON: [(Signal, bool); 7] = [
    (Signal::TERM, true),
    (Signal::INT, true),
    (Signal::HUP, false),
    (Signal::QUIT, false),
    (Signal::USR1, false),
    (Signal::USR2, false),
    (Signal::WINCH, false),
];

impl Signals {
    /// From now on signals do nothing to this process.
    ///
    /// # Errors
    /// When they cannot be caught.
    pub fn catch() -> io::Result<Self> {
        let signals = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let mut streams = Vec::new();
        {
            let _inside = runtime.enter();
            for (number, asks) in PASSED_ON {
                streams.push((number, asks, signal(SignalKind::from_raw(number.as_raw()))?));
            }
        }
        let shared = signals.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async move {
                let each = streams.into_iter().map(|(number, asks, mut stream)| {
                    let shared = shared.clone();
                    async move {
                        while stream.recv().await.is_some() {
                            shared.came(number, asks);
                        }
                    }
                });
                futures_util::future::join_all(each).await;
            });
        })?;
        Ok(signals)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an end was asked for.
    #[must_use]
    pub fn is_end_wanted(&self) -> bool {
        self.state().asked > 0
    }

    fn came(&self, number: Signal, asks: bool) {
        let mut state = self.state();
        if asks {
            state.asked = state.asked.saturating_add(1);
        }
        let asked = state.asked;
        if let Some(target) = &mut state.target {
            target.signal(number, asked);
        }
    }

    /// From now on they are those of `target`. What asked for an end before does so now.
    fn pass_on(&self, mut target: Target) {
        let mut state = self.state();
        if state.asked > 0 {
            target.signal(Signal::TERM, state.asked);
        }
        state.target = Some(target);
    }
}
