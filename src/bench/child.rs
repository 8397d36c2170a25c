//! Programs that the benchmark runs. In: a command line. Out: its end, its output, or the tail of its complaints.
//!
//! Waiting is exact (a pidfd wakes it) and hears an interrupt; a child that is still there then is asked to end and waited
//! for, so that what it set up is taken down before anything else is.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::BenchError;
use crate::interrupt::{Interrupt, Interrupted};

/// How often a waiting thread looks whether it was interrupted.
const GLANCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// How long a child may take to end when asked to.
const PATIENCE: Duration = Duration::from_secs(15);

/// How much of a failed program's complaints is kept, in bytes.
const TAIL: u64 = 2000;

/// A running child in a process group of its own, its outputs going to files.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    line: String,
    out: File,
    err: File,
    over: bool,
}

/// How a child ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) line: String,
    pub(super) status: ExitStatus,
    /// When its end was noticed.
    pub(super) at: Instant,
    out: File,
    err: File,
}

impl Running {
    /// Starts `command`, its outputs kept in unnamed files in `scratch`.
    pub(super) fn start(command: &mut Command, scratch: &Path) -> Result<Self, BenchError> {
        use std::os::unix::process::CommandExt as _;
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .collect();
        let line = words
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ");
        let unnamed = || {
            let file = rustix::fs::open(
                scratch,
                rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            );
            file.map(File::from).map_err(std::io::Error::from)
        };
        let no_file = |cause| BenchError::Step {
            what: format!("{}: cannot make a file", scratch.display()),
            cause,
        };
        let (out, err) = (unnamed().map_err(no_file)?, unnamed().map_err(no_file)?);
        let twin = |file: &File| file.try_clone().map(Stdio::from).map_err(no_file);
        command.stdout(twin(&out)?).stderr(twin(&err)?).process_group(0);
        let child = command.spawn().map_err(|cause| BenchError::NoProgram {
            program: command.get_program().to_string_lossy().into_owned(),
            cause,
        })?;
        Ok(Self {
            child,
            line,
            out,
            err,
            over: false,
        })
    }

    /// The child, for its standard input.
    pub(super) const fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for its end. What it has left in its process group is killed.
    pub(super) fn wait(mut self, interrupt: &Interrupt) -> Result<Ended, BenchError> {
        let failed = |cause| BenchError::Step {
            what: format!("cannot wait for `{}`", self.line),
            cause,
        };
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
        loop {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&GLANCE)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => break,
                Err(e) => return Err(failed(e.into())),
            }
            if interrupt.is_raised() {
                return Err(Interrupted.into()); // dropping self ends the child
            }
        }
        let at = Instant::now();
        let status = self.child.wait().map_err(failed)?;
        self.over = true;
        let _ = kill_process_group(pid, Signal::KILL);
        let files = (self.out.try_clone(), self.err.try_clone());
        let (Ok(out), Ok(err)) = files else {
            return Err(failed(std::io::Error::other("its output cannot be read")));
        };
        Ok(Ended {
            line: self.line.clone(),
            status,
            at,
            out,
            err,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let pid = Pid::from_child(&self.child);
        drop(self.child.stdin.take());
        let _ = kill_process_group(pid, Signal::TERM);
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > PATIENCE {
                let _ = kill_process_group(pid, Signal::KILL);
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Ended {
    /// What it wrote on standard output.
    pub(super) fn output(&mut self) -> String {
        read_all(&mut self.out)
    }

    /// The end of what it wrote on standard error, on one line.
    pub(super) fn complaint(&mut self) -> String {
        let len = self.err.seek(SeekFrom::End(0)).unwrap_or(0);
        let _ = self.err.seek(SeekFrom::Start(len.saturating_sub(TAIL)));
        let mut bytes = Vec::new();
        let _ = Read::by_ref(&mut self.err).take(TAIL).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes)
            .lines()
            .map(str::trim)
            .collect::<Vec<_>>()
            .join("; ");
        if text.is_empty() {
            "it said nothing".into()
        } else {
            text
        }
    }

    /// Itself, if it ended with 0.
    pub(super) fn success(mut self) -> Result<Self, BenchError> {
        if self.status.success() {
            return Ok(self);
        }
        let said = self.complaint();
        Err(BenchError::Program {
            program: self.line,
            status: self.status.to_string(),
            said,
        })
    }
}

fn read_all(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs a program to its successful end.
pub(super) fn run(command: &mut Command, scratch: &Path, interrupt: &Interrupt) -> Result<Ended, BenchError> {
    Running::start(command.stdin(Stdio::null()), scratch)?
        .wait(interrupt)?
        .success()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        let scratch = tempfile::tempdir().expect("directory");
        let calm = Interrupt::default();
        let mut sh = Command::new("sh");
        let mut good = run(sh.args(["-c", "echo said; echo also >&2"]), scratch.path(), &calm).expect("success");
        assert_eq!(good.output(), "said\n");
        assert_eq!(good.complaint(), "also");
        let mut sh = Command::new("sh");
        let bad = run(sh.args(["-c", "echo why >&2; exit 3"]), scratch.path(), &calm).expect_err("failure");
        assert_eq!(
            bad.to_string(),
            "`sh -c echo why >&2; exit 3` failed (exit status: 3): why"
        );
        let none = run(&mut Command::new("tarblk-no-such-program"), scratch.path(), &calm).expect_err("failure");
        assert!(
            none.to_string().starts_with("cannot run `tarblk-no-such-program`: "),
            "{none}"
        );
    }

    #[test]
    fn an_interrupt_ends_the_child() {
        let scratch = tempfile::tempdir().expect("directory");
        let interrupt = Interrupt::default();
        let running = Running::start(Command::new("sleep").arg("1000"), scratch.path()).expect("start");
        let pid = Pid::from_child(&running.child);
        interrupt.raise();
        assert!(matches!(running.wait(&interrupt), Err(BenchError::Interrupted(_))));
        assert!(rustix::process::test_kill_process(pid).is_err(), "it is gone");
    }
}
