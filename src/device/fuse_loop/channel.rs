//! One connection to the kernel: an open `/dev/fuse`. In: answers. Out: the same bytes with a header, and whether the
//! filesystem is still there.
//!
//! There is one descriptor for all threads, not a clone for each (`FUSE_DEV_IOC_CLONE`): what was read from a clone ends with
//! the clone's last holder, and what was read from this one stays for whoever holds it next.

use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::protocol;

/// An open `/dev/fuse`.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// A new one, which no filesystem belongs to yet.
    pub(super) fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        Ok(Self(file.into()))
    }

    /// Answers request `unique` with `data`.
    pub(super) fn answer(&self, unique: u64, data: &[u8]) {
        self.write(unique, data, None);
    }

    /// Answers request `unique` with an error.
    pub(super) fn refuse(&self, unique: u64, error: Errno) {
        self.write(unique, &[], Some(error));
    }

    fn write(&self, unique: u64, data: &[u8], error: Option<Errno>) {
        bring_in(data);
        let header = protocol::out_header(unique, data.len(), error);
        match rustix::io::writev(&self.0, &[IoSlice::new(&header), IoSlice::new(data)]) {
            // NOENT: the kernel waits no more, or has the answer already. NODEV: nor is there a filesystem.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(error) => log::error!("the kernel does not take the answer to request {unique:#x}: {error}"),
        }
    }

    /// Makes the kernel send every request again that was read and is not answered yet, under a new number.
    pub(super) fn ask_resend(&self) -> io::Result<()> {
        rustix::io::write(&self.0, &protocol::resend())?;
        Ok(())
    }

    /// Whether the filesystem is gone: unmounted, with nothing on it open any more, or its connection aborted.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&at_once)) {
            Ok(_) => fds[0].revents().contains(PollFlags::ERR),
            Err(_) => false,
        }
    }
}

/// How far apart bytes may be that lie on neighbouring pages, on any machine.
const PAGE: usize = 4096;

/// Reads a byte of each of `data`'s pages, so that the kernel finds all of them. One that was swapped out it would bring in itself, but not
/// for a process that is being killed: then it ends the request with an error that the reader gets, instead of leaving it to the next process.
fn bring_in(data: &[u8]) {
    let last = data.last().copied();
    std::hint::black_box(
        data.iter()
            .step_by(PAGE)
            .copied()
            .chain(last)
            .fold(0, |all, byte| all ^ byte),
    );
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}
