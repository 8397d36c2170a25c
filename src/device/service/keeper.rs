//! The keeper: a process that holds what must outlive the service, and starts the service again. In: descriptors, from the service.
//! Out: the same descriptors, to the service that comes after it.
//!
//! The kernel ends a FUSE connection, and with it a mounted device, when no process has it open any more; a ublk device waits, but for
//! somebody to come. So there are two of these beside every service, each with a copy of everything: whichever processes are killed, at
//! whatever moment, what is left starts the others again. A keeper has one thread, no network, and knows nothing of what it
//! holds. Several keepers may find the service dead at once: the service lock says who starts it.
//!
//! A link is a connection of the service to the keeper's socket; its end is the service's.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;

use super::blame::{Blame, is_crash};
use super::held::{Ask, HeldSet, done, hear, holding};
use super::{LOG_NAME, Launcher, Role, Start, sandbox};
use crate::device::state::StateDir;
use crate::device::wait_until;

/// How many keepers stand beside a service.
pub(super) const KEEPERS: usize = 2;

/// How long the other end of a link may take over one message.
pub(super) const LINK_LIMIT: Duration = Duration::from_secs(5);

/// Pauses between looks whether a dead service's lock is free: the first, and the longest.
const SHORTEST_GLANCE: Duration = Duration::from_millis(1);
const LONGEST_GLANCE: Duration = Duration::from_millis(50);
/// The first of a keeper that did not start the dead service, while the one that did may be there.
const OTHERS_GLANCE: Duration = Duration::from_millis(10);

/// How long to wait after the service was started before it is started again: the second time, and at most. In between each
/// wait is four times as long as the one before.
const SHORTEST_BACKOFF: Duration = Duration::from_millis(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// How long a keeper leaves it to a command to start the service with another program.
pub(super) const STAND_BACK: Duration = Duration::from_secs(5);

/// A service that lived this long was no failure at its start: the next one is started at once.
const GOOD_LIFE: Duration = Duration::from_secs(5);

/// The socket of keeper `number`.
pub(super) fn socket(states: &StateDir, number: usize) -> PathBuf {
    states.path().join(format!("keeper-{number}.sock"))
}

/// The file whose lock the service holds for as long as it lives.
pub(super) fn lock_file(states: &StateDir) -> PathBuf {
    states.path().join("service.lock")
}

/// Takes the lock that says who is, or who starts, the service. None while another process has it.
///
/// # Errors
/// When the file cannot be made.
pub(super) fn try_lock(states: &StateDir) -> io::Result<Option<File>> {
    let path = lock_file(states);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // It may have been removed by a service that ended between opening and locking: then this is a lock on nothing.
    let same = fs::metadata(&path).is_ok_and(|named| file.metadata().is_ok_and(|ours| ours.ino() == named.ino()));
    Ok(same.then_some(file))
}

/// Removes what a service left that died without a device; the log stays, to be read. Only while nobody serves; says whether that is so.
pub(super) fn clean_up(states: &StateDir, patience: Duration) -> bool {
    let has_devices = || states.list().is_ok_and(|(all, _)| !all.is_empty());
    if has_devices() {
        return false;
    }
    // A dying process takes a moment to let go of its lock.
    let mut lock = None;
    wait_until(patience, || {
        lock = try_lock(states).ok().flatten();
        lock.is_some()
    });
    if lock.is_some() && !has_devices() {
        for number in 0..KEEPERS {
            // A living keeper would have started another service, or ended.
            let _ = fs::remove_file(socket(states, number));
        }
        remove_files(states);
        return true;
    }
    false
}

fn remove_files(states: &StateDir) {
    let _ = fs::remove_file(states.service_socket());
    let _ = fs::remove_file(lock_file(states));
    Blame::forget(states);
    states.remove_leftovers();
}

/// Opens the log that the service and the keepers write.
pub(super) fn open_log(states: &StateDir) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(states.path().join(LOG_NAME))
}

/// The number of the process that has the service lock, or had it last; none before it noted that.
pub(super) fn holder_of_lock(states: &StateDir) -> Option<u32> {
    fs::read_to_string(lock_file(states)).ok()?.trim().parse().ok()
}

/// Starts a service that has `lock`, as a child of this process; with `environment` in place of this process's.
pub(super) fn start_service(
    launcher: &Launcher,
    states: &StateDir,
    lock: &File,
    start: Start,
    environment: Option<Vec<(OsString, OsString)>>,
) -> io::Result<Child> {
    let mut command = launcher.command(Role::Service, states, start.word(), environment);
    command
        .stdin(lock.try_clone()?)
        .stdout(Stdio::piped())
        .stderr(open_log(states)?);
    if start == Start::Again {
        command.stdout(Stdio::null());
    }
    command.spawn()
}

/// A keeper's life; see the module. Returns when it is told to, or when there is neither a service nor anything to hold.
pub(super) fn keep(states: &StateDir, number: usize, launcher: Launcher) -> ExitCode {
    let path = socket(states, number);
    let listener = fs::remove_file(&path)
        .or_else(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                Ok(())
            } else {
                Err(error)
            }
        })
        .and_then(|()| UnixListener::bind(&path))
        .and_then(|listener| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map(|()| listener));
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            log::error!("keeper {number}: cannot open {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    };
    let mut keeper = Keeper {
        states,
        launcher,
        inode: fs::metadata(&path).map_or(0, |meta| meta.ino()),
        socket: path.clone(),
        stood_back: None,
        held: HeldSet::default(),
        children: Vec::new(),
        link: None,
        linked: Instant::now(),
        glance: SHORTEST_GLANCE,
        backoff: SHORTEST_BACKOFF,
    };
    sandbox::rest_capabilities();
    keeper.work(&listener);
    if keeper.is_known() {
        let _ = fs::remove_file(&path);
    }
    ExitCode::SUCCESS
}

struct Keeper<'a> {
    states: &'a StateDir,
    launcher: Launcher,
    socket: PathBuf,
    /// Of its socket's file, as it made it.
    inode: u64,
    /// Until when a command may start the next service, and the number of the service before it.
    stood_back: Option<(Instant, u32)>,
    held: HeldSet,
    children: Vec<Child>,
    link: Option<UnixStream>,
    /// When the present or the last service called.
    linked: Instant,
    /// Until the next look, while another process has the lock and does not call.
    glance: Duration,
    /// Until the next look after a start.
    backoff: Duration,
}

impl Keeper<'_> {
    fn work(&mut self, listener: &UnixListener) {
        // The service that started this one is about to call, unless it dies first.
        let mut look_at = Instant::now() + LONGEST_GLANCE;
        loop {
            let left = look_at.saturating_duration_since(Instant::now());
            let timeout = if self.link.is_some() {
                None
            } else {
                Timespec::try_from(left).ok()
            };
            let (called, spoke) = {
                let mut waiting = vec![PollFd::new(listener, PollFlags::IN)];
                waiting.extend(self.link.iter().map(|link| PollFd::new(link, PollFlags::IN)));
                match poll(&mut waiting, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        log::error!("a keeper cannot wait: {error}");
                        std::thread::sleep(LONGEST_BACKOFF);
                    }
                }
                let ready = |at: usize| waiting.get(at).is_some_and(|fd| !fd.revents().is_empty());
                (ready(0), ready(1))
            };
            self.reap();
            if spoke {
                match self.answer() {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        if error.kind() != io::ErrorKind::UnexpectedEof {
                            log::warn!("a keeper lost its service: {error}");
                        }
                        self.link = None;
                        self.glance = SHORTEST_GLANCE;
                        if self.linked.elapsed() > GOOD_LIFE {
                            self.backoff = SHORTEST_BACKOFF;
                        }
                        look_at = Instant::now();
                    }
                }
            }
            if called && let Ok((stream, _)) = listener.accept() {
                let limits = stream
                    .set_read_timeout(Some(LINK_LIMIT))
                    .and_then(|()| stream.set_write_timeout(Some(LINK_LIMIT)));
                if limits.is_ok() && is_root(&stream) {
                    self.link = Some(stream);
                    self.linked = Instant::now();
                }
            }
            if self.link.is_none() && Instant::now() >= look_at {
                match self.look() {
                    Look::End => return,
                    Look::Again(after) => look_at = Instant::now() + after,
                }
            }
        }
    }

    /// Notes how the services ended that this keeper started.
    fn reap(&mut self) {
        let states = self.states;
        self.children.retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(ended)) => {
                if is_crash(ended) {
                    log::error!("the service (process {}) crashed: {ended}", child.id());
                    Blame::note_crash(states);
                }
                false
            }
            Err(_) => false,
        });
    }

    /// Whether a service would find this keeper by its socket.
    fn is_known(&self) -> bool {
        fs::metadata(&self.socket).is_ok_and(|meta| meta.ino() == self.inode)
    }

    /// Looks whether the service is gone for good, and starts another one.
    fn look(&mut self) -> Look {
        // Another keeper has its place, because this one was slow for too long, or the state directory is gone.
        if !self.is_known() {
            return Look::End;
        }
        if let Some((until, before)) = self.stood_back {
            // Whoever starts the next one notes itself, or that it failed.
            if Instant::now() < until && holder_of_lock(self.states) == Some(before) {
                return Look::Again(SHORTEST_GLANCE);
            }
            self.stood_back = None;
        }
        // Whoever started the last service knows how it ended, and says so before the next one starts.
        let last = holder_of_lock(self.states);
        if self.children.iter().any(|child| Some(child.id()) == last) {
            wait_until(LONGEST_GLANCE, || {
                self.reap();
                !self.children.iter().any(|child| Some(child.id()) == last)
            });
        } else if self.glance == SHORTEST_GLANCE {
            self.glance = OTHERS_GLANCE;
            return Look::Again(self.glance);
        }
        let lock = match try_lock(self.states) {
            Ok(Some(lock)) => lock,
            // The dead one is not all gone yet, or another keeper was first.
            Ok(None) => {
                self.glance = (self.glance * 2).min(LONGEST_GLANCE);
                return Look::Again(self.glance);
            }
            Err(error) => {
                log::error!("a keeper cannot lock the service: {error}");
                return Look::Again(LONGEST_BACKOFF);
            }
        };
        if !self.held.iter().any(|(name, _)| name != super::LISTENER_NAME) {
            remove_files(self.states);
            return Look::End;
        }
        match start_service(&self.launcher, self.states, &lock, Start::Again, None) {
            Ok(child) => {
                log::warn!("the service has ended; started it again as process {}", child.id());
                self.children.push(child);
            }
            Err(error) => log::error!("cannot start the service again: {error}"),
        }
        let after = self.backoff;
        self.backoff = (self.backoff * 4).min(LONGEST_BACKOFF);
        self.glance = SHORTEST_GLANCE;
        Look::Again(after)
    }

    /// Does what the service asks; false when it is to end.
    fn answer(&mut self) -> io::Result<bool> {
        let Some(link) = &self.link else { return Ok(true) };
        let (ask, descriptors) = hear(link)?;
        match ask {
            Ask::List => {
                self.stood_back = None;
                self.held.tell(link)?;
                return Ok(true);
            }
            Ask::Hold { name, kinds } => self.held.hold(name, holding(kinds, descriptors)?),
            Ask::Drop { name } => self.held.let_go(&name),
            Ask::StandBack => {
                self.stood_back = holder_of_lock(self.states).map(|before| (Instant::now() + STAND_BACK, before));
            }
            Ask::Retire => {
                self.held.clear();
                done(link)?;
                return Ok(false);
            }
        }
        done(link)?;
        Ok(true)
    }
}

enum Look {
    /// There is nothing to keep.
    End,
    /// Look again after this long.
    Again(Duration),
}

/// Whether the other end is root, as this process is.
pub(super) fn is_root(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream.as_fd()).is_ok_and(|peer| peer.uid.is_root())
}
