//! The service manager that runs this process, as systemd does: it is told how far a command is (`sd_notify(3)`), and keeps
//! descriptors over its restarts (`FDSTORE=1`, "File Descriptor Store" in systemd's documentation). In: the socket that it names in the
//! environment, and the descriptors that it gave this process. Out: datagrams, some with a descriptor.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;

use super::message::send_with;

/// The device is there, or it is mounted.
pub const READY: &str = "READY=1";
/// It is being taken down.
pub const STOPPING: &str = "STOPPING=1";

/// How long the manager may take to read a message.
const SEND_LIMIT: Duration = Duration::from_secs(3);

/// How long it may take to do what it was told.
const DONE_LIMIT: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };

/// The first descriptor that a manager gives a process (`SD_LISTEN_FDS_START`).
const FIRST_GIVEN: i32 = 3;

/// Tells the service manager `state`, if one wants to know. One that does not listen is no reason to fail.
pub fn notify(state: &str) {
    let Some(manager) = Manager::of_this_process() else {
        return;
    };
    if let Err(error) = manager.and_then(|manager| manager.tell(state)) {
        log::warn!("cannot tell the service manager {state}: {error}");
    }
}

/// A service manager that wants to be told things.
#[derive(Clone, Debug)]
pub(super) struct Manager(SocketAddr);

impl Manager {
    /// The one that runs this process, or why it cannot be told anything; none if there is none.
    pub(super) fn of_this_process() -> Option<io::Result<Self>> {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty())?;
        Some(Self::at(socket.as_encoded_bytes()))
    }

    pub(super) fn at(socket: &[u8]) -> io::Result<Self> {
        match socket {
            // A name in the abstract namespace.
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            [b'/', ..] => SocketAddr::from_pathname(OsStr::from_bytes(socket)),
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "NOTIFY_SOCKET is neither a path nor abstract",
            )),
        }
        .map(Self)
    }

    /// Sends `state`.
    ///
    /// # Errors
    /// What the socket says.
    pub(super) fn tell(&self, state: &str) -> io::Result<()> {
        self.tell_with(state, &[])
    }

    fn tell_with(&self, state: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_LIMIT))?;
        socket.connect_addr(&self.0)?;
        send_with(&socket, IoSlice::new(state.as_bytes()), descriptors).map(drop)
    }

    /// Has `descriptor` kept under `name`, beside others of that name. It is given back when this process is started again. The manager
    /// does not look whether it is hung up: that is for whom it is kept to say.
    ///
    /// # Errors
    /// What the socket says. Whether the manager keeps descriptors for this process it does not say.
    pub(super) fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.tell_with(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[descriptor])
    }

    /// Has what is kept under `name` closed.
    ///
    /// # Errors
    /// What the socket says.
    pub(super) fn drop(&self, name: &str) -> io::Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"))
    }

    /// Waits until the manager has done what it was told before.
    ///
    /// # Errors
    /// What the socket says; [`io::ErrorKind::TimedOut`].
    pub(super) fn wait_until_done(&self) -> io::Result<()> {
        // It closes what comes with this message, also where it is too old to know the word.
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        self.tell_with("BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        match poll(&mut [PollFd::new(&ours, PollFlags::empty())], Some(&DONE_LIMIT))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

/// The descriptors that the service manager gave this process, by their names (`sd_listen_fds_with_names(3)`); once: later there are none.
/// To be called before the process starts another.
#[must_use]
pub fn given() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let said = |name: &str| std::env::var(name).ok();
    let is_for_us = said("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string());
    if !is_for_us || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let count: usize = said("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    let names = said("LISTEN_FDNAMES").unwrap_or_default();
    let is_open = |number: i32| std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
    let take = |(number, name): (i32, &str)| {
        // SAFETY: it is open, and it was before this process's first instruction: LISTEN_PID says that it is among those that the manager
        // left open for this process. So nothing here has opened it and owns it, but for an earlier call, which `TAKEN` excludes.
        #[allow(unsafe_code)]
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        // What this process starts is not to have it.
        let closes = rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC);
        closes.is_ok().then(|| (name.to_owned(), descriptor))
    };
    (FIRST_GIVEN..)
        // Those that were given no names have this one, says sd_listen_fds_with_names(3).
        .zip(
            names
                .split(':')
                .filter(|name| !name.is_empty())
                .chain(std::iter::repeat("unknown")),
        )
        .take(count)
        .filter(|(number, _)| is_open(*number))
        .filter_map(take)
        .collect()
}

/// Whether two descriptors are of one open file, which a manager keeps once, under its first name.
///
/// # Errors
/// When the kernel does not say.
pub(super) fn are_one_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    /// `KCMP_FILE`.
    const FILES: libc::c_int = 0;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: kcmp(2) compares what two numbers stand for, and takes no pointers.
    #[allow(unsafe_code)]
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, FILES, one.as_raw_fd(), other.as_raw_fd()) };
    match order {
        0 => Ok(true),
        1..=3 => Ok(false),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

    use super::*;

    #[test]
    fn both_kinds_of_sockets_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("tarblk-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, text) in [
            (&by_path, path.to_str().unwrap().to_owned()),
            (&by_name, format!("@{name}")),
        ] {
            Manager::at(text.as_bytes()).unwrap().tell(READY).unwrap();
            let mut buffer = [0; 64];
            let len = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"READY=1");
        }
        assert!(Manager::at(b"vsock:2:1").is_err());
        assert!(Manager::at(b"/nonexistent/socket").unwrap().tell(READY).is_err());
    }

    #[test]
    fn descriptors_come_along_and_their_end_is_waited_for() {
        let name = format!("tarblk-store-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let manager = Manager::at(format!("@{name}").as_bytes()).unwrap();
        let file = tempfile::tempfile().unwrap();
        manager.keep("loop0.spec.0", file.as_fd()).unwrap();
        manager.drop("loop0.spec.0").unwrap();
        let hear = || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut text = [0; 256];
            let mut target = [io::IoSliceMut::new(&mut text)];
            let len = rustix::net::recvmsg(&socket, &mut target, &mut control, RecvFlags::CMSG_CLOEXEC)
                .unwrap()
                .bytes;
            let given = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut given) => given.next(),
                _ => None,
            });
            (String::from_utf8(text[..len].to_vec()).unwrap(), given)
        };
        let (text, given) = hear();
        assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=loop0.spec.0");
        assert!(given.is_some());
        assert_eq!(hear().0, "FDSTOREREMOVE=1\nFDNAME=loop0.spec.0");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| manager.wait_until_done());
            let (text, given) = hear();
            assert_eq!(text, "BARRIER=1");
            assert!(!waits.is_finished());
            drop(given.unwrap());
            waits.join().unwrap().unwrap();
        });
    }
}
