//! The image as the only file of a FUSE filesystem that is mounted nowhere.
//!
//! The session's threads never wait: what is in memory they answer at once, a local file they read only as far as the page
//! cache has it, and everything else is answered by the fetch thread when the bytes are there.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{Errno, ReadWriteFlags};

use super::channel::Channel;
use super::ledger::{Entry, Ledger, PendingRead};
use super::protocol::{self, Attributes, Init, Negotiated, Operation, ParseError, ROOT, Request};
use crate::cache::Slice;
use crate::device::stats::{Source, ThreadCounters};
use crate::device::volume::{Found, Gap, GapBytes, ReadError, Scratch, Volume, fill_gaps, to_u64};
use crate::fetch::{FetchError, ReadCallback};

/// Begins the file's name, by which a loop device of ours is known; what it holds follows.
pub(super) const NAME_PREFIX: &str = "tarblk:";

/// No longer name is made, in bytes: each filesystem of the kernel takes this much.
const MOST_NAME: usize = 200;

/// The file's name in the root directory, made of what the device holds as a person named it: mount(8), `losetup` and
/// `findmnt` show it in place of the device. The last part of a path or a URL, whatever of it a terminal and a table can take.
pub(super) fn file_name(label: &str) -> String {
    let whole = label.split('?').next().unwrap_or(label);
    let last = whole.trim_end_matches('/').rsplit('/').next().unwrap_or(whole);
    let shown = last.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' });
    NAME_PREFIX.chars().chain(shown).take(MOST_NAME).collect()
}

/// The file's number in the filesystem.
const FILE: u64 = 2;

/// A directory that only root may list, as stat(2) has it.
const DIRECTORY_MODE: u32 = 0o040_500;

/// A regular file that only root may read.
const FILE_MODE: u32 = 0o100_400;

/// Answers longer than this, in bytes, are copied to the kernel by a thread of their own instead of the fetch thread.
const LONG_ANSWER: usize = 64 << 10;

/// How often a session thread looks for room in a full ledger.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// The filesystem, and the connection that it answers.
#[derive(Debug)]
pub(super) struct Export {
    answers: Arc<Answers>,
    ledger: Arc<Ledger>,
    waiting: Waiting,
    long_answers: mpsc::Sender<Arrived>,
    /// The file's name.
    name: String,
}

/// What it takes to answer a read whose bytes are here.
#[derive(Debug)]
struct Answers {
    volume: Arc<Volume>,
    channel: Channel,
}

/// The reads whose bytes are on the way, by number.
#[derive(Debug, Default)]
struct Waiting {
    reads: Mutex<HashMap<u64, Pending>>,
    next: AtomicU64,
}

impl Waiting {
    fn reads(&self) -> MutexGuard<'_, HashMap<u64, Pending>> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, pending: Pending) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.reads().insert(number, pending);
        number
    }

    fn take(&self, number: u64) -> Option<Pending> {
        self.reads().remove(&number)
    }
}

/// What a session thread reuses from read to read: its lists, its buffer.
#[derive(Debug)]
pub(super) struct ThreadScratch {
    /// Which of the volume's counters are this thread's.
    number: usize,
    scratch: Scratch<'static>,
    buf: Vec<u8>,
}

impl ThreadScratch {
    /// Of session thread `number`.
    pub(super) fn new(number: usize) -> Self {
        Self {
            number,
            scratch: Scratch::default(),
            buf: Vec::new(),
        }
    }
}

/// A read whose bytes are on the way.
#[derive(Debug)]
struct Pending {
    thread: usize,
    unique: u64,
    offset: u64,
    buf: Vec<u8>,
    gaps: Vec<Gap<'static>>,
    gap_bytes: GapBytes,
    began: Instant,
    /// What another process finds if this one is killed.
    entry: Entry,
}

/// A read whose bytes are here but not yet with the kernel.
#[derive(Debug)]
struct Arrived {
    pending: Pending,
    outcome: Result<Vec<Slice>, FetchError>,
}

impl Export {
    /// Serves `volume` as a file called `name` to the kernel behind `channel`, with a thread for long answers that ends with the
    /// filesystem.
    pub(super) fn new(volume: Arc<Volume>, channel: Channel, ledger: Arc<Ledger>, name: String) -> io::Result<Self> {
        let (long_answers, arrivals) = mpsc::channel::<Arrived>();
        let answers = Arc::new(Answers { volume, channel });
        let of_thread = Arc::clone(&answers);
        thread::Builder::new().name("fuse-answers".to_owned()).spawn(move || {
            for arrived in arrivals {
                arrived.pending.finish(&of_thread, arrived.outcome);
            }
        })?;
        Ok(Self {
            answers,
            ledger,
            waiting: Waiting::default(),
            long_answers,
            name,
        })
    }

    /// The connection.
    pub(super) fn channel(&self) -> &Channel {
        &self.answers.channel
    }

    /// What is not answered yet.
    pub(super) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Answers every read that waits for the fetch thread with an error.
    pub(super) fn give_up(&self) {
        let reads = std::mem::take(&mut *self.waiting.reads());
        for pending in reads.into_values() {
            pending.fail(&self.answers, &ReadError::Stopped);
        }
    }

    /// Answers a connection's first request, at the beginning of `bytes`. With `resend` unset the kernel is not asked to keep
    /// requests in order to send them again.
    ///
    /// # Errors
    /// When it is no such request, or of a kernel that is too old.
    pub(super) fn answer_init(&self, bytes: &[u8], resend: bool) -> io::Result<Negotiated> {
        let request = Request::parse(bytes).map_err(io::Error::other)?;
        let Operation::Init(init) = request.operation else {
            return Err(io::Error::other(format!(
                "the kernel begins with {:?}",
                request.operation
            )));
        };
        let agreed = self.agree(request.unique, init, resend);
        agreed.ok_or_else(|| {
            let (major, minor) = (init.major, init.minor);
            io::Error::other(format!(
                "the kernel's FUSE protocol is {major}.{minor}, and 7.23 is the least that will do"
            ))
        })
    }

    fn agree(&self, unique: u64, init: Init, resend: bool) -> Option<Negotiated> {
        let agreed = init.negotiate(resend);
        match agreed {
            Some(agreed) => {
                self.ledger.set_negotiated(agreed);
                self.channel().answer(unique, &init.answer(agreed));
            }
            None => self.channel().refuse(unique, Errno::PROTO),
        }
        agreed
    }

    /// Answers the request at the beginning of `bytes`, or enters it in the ledger to be answered later.
    pub(super) fn handle(self: &Arc<Self>, thread: &mut ThreadScratch, bytes: &[u8]) {
        let channel = self.channel();
        let Request {
            unique,
            node,
            operation,
        } = match Request::parse(bytes) {
            Ok(request) => request,
            Err(error) => {
                log::error!("{error}");
                if let ParseError::Body { unique, .. } = error {
                    channel.refuse(unique, Errno::INVAL);
                }
                return;
            }
        };
        match operation {
            Operation::Read { offset, size } if node == FILE => {
                let read = PendingRead { unique, offset, size };
                self.read(thread, read, None);
            }
            Operation::Lookup { name } if node == ROOT && name == OsStr::new(&self.name) => {
                channel.answer(unique, &protocol::entry(self.attributes(FILE)));
            }
            Operation::Lookup { .. } => channel.refuse(unique, Errno::NOENT),
            Operation::GetAttr => channel.answer(unique, &protocol::attributes(self.attributes(node))),
            Operation::Open if node == FILE => channel.answer(unique, &protocol::opened()),
            Operation::Read { .. } | Operation::Open => channel.refuse(unique, Errno::ISDIR),
            Operation::OpenDir => channel.answer(unique, &protocol::opened()),
            Operation::StatFs => channel.answer(unique, &protocol::statfs(self.answers.volume.len())),
            Operation::Release | Operation::Destroy => channel.answer(unique, &[]),
            Operation::Forget => {}
            // Every read is answered anyway. The kernel tells of no more signals after this.
            Operation::Interrupt | Operation::FlushOrSync | Operation::Other(_) => {
                channel.refuse(unique, Errno::NOSYS);
            }
            // Comes once, before there are session threads.
            Operation::Init(_) => channel.refuse(unique, Errno::INVAL),
        }
    }

    fn attributes(&self, node: u64) -> Attributes {
        let (mode, len) = match node {
            FILE => (FILE_MODE, self.answers.volume.len()),
            _ => (DIRECTORY_MODE, 0),
        };
        Attributes { node, mode, len }
    }

    /// Answers a read now or when its bytes are here. `entry` is the read's place in the ledger, if it has one already.
    pub(super) fn read(self: &Arc<Self>, thread: &mut ThreadScratch, read: PendingRead, entry: Option<Entry>) {
        let mut scratch: Scratch<'_> = std::mem::take(&mut thread.scratch);
        let entry = self.read_with(&mut scratch, thread.number, &mut thread.buf, read, entry);
        thread.scratch = scratch.emptied();
        if let Some(entry) = entry {
            entry.clear();
        }
    }

    /// Answers a read with the lists and the buffer of the calling thread, which is number `thread`. Gives `entry` back when the
    /// read was answered at once.
    fn read_with<'v>(
        self: &'v Arc<Self>,
        scratch: &mut Scratch<'v>,
        thread: usize,
        whole_buf: &mut Vec<u8>,
        read: PendingRead,
        entry: Option<Entry>,
    ) -> Option<Entry> {
        let began = Instant::now();
        let PendingRead { unique, offset, size } = read;
        let Answers { volume, channel } = &*self.answers;
        let counters = volume.counters(thread);
        counters.read();
        let left = volume.len().saturating_sub(offset);
        let len = usize::try_from(left.min(u64::from(size))).unwrap_or(0);
        if whole_buf.len() < len {
            whole_buf.resize(len, 0);
        }
        let buf = &mut whole_buf[..len];
        match volume.look(offset, buf, scratch, counters) {
            Ok(Found::Zero) => {
                buf.fill(0);
                channel.answer(unique, buf);
            }
            Ok(Found::Memory(slice)) => channel.answer(unique, &slice),
            Ok(Found::Filled) => channel.answer(unique, buf),
            Ok(Found::Gaps) => {
                let gaps = &mut scratch.gaps;
                read_cached(gaps, buf, counters);
                if gaps.is_empty() {
                    channel.answer(unique, buf);
                } else {
                    // Without an entry there is no answering later; the slot keeps the read until then.
                    let entry = entry.or_else(|| self.enter(read))?;
                    let pending = Pending {
                        thread,
                        unique,
                        offset,
                        // Only what is here already has to be kept.
                        buf: if covers(gaps, len) { vec![0; len] } else { buf.to_vec() },
                        gaps: gaps.iter().copied().map(Gap::detached).collect(),
                        gap_bytes: GapBytes::of(gaps),
                        began,
                        entry,
                    };
                    let callback = FuseCallback {
                        number: self.waiting.add(pending),
                        export: Arc::clone(self),
                    };
                    volume.fetch(gaps, Box::new(callback));
                    return None;
                }
            }
            Err(error) => self.answers.fail(thread, unique, offset, len, &error),
        }
        counters.took(began.elapsed(), 1);
        entry
    }

    /// Enters `read` in the ledger, waiting for room if need be, which the kernel's bound on requests in flight leaves; `None` when the
    /// filesystem has ended meanwhile.
    fn enter(&self, read: PendingRead) -> Option<Entry> {
        loop {
            let entry = self.ledger.enter(read);
            if entry.is_some() || self.channel().has_ended() {
                return entry;
            }
            thread::sleep(FULL_PAUSE);
        }
    }
}

/// Whether the gaps are all there is of a read of `len` bytes.
fn covers(gaps: &[Gap<'_>], len: usize) -> bool {
    gaps.iter().map(|gap| gap.len).sum::<usize>() == len
}

impl Answers {
    /// Answers read `unique` with an error, on behalf of session thread `thread`.
    fn fail(&self, thread: usize, unique: u64, offset: u64, len: usize, error: &ReadError) {
        self.volume.failed(self.volume.counters(thread), offset, len, error);
        self.channel.refuse(unique, Errno::IO);
    }
}

/// Closes the gaps that lie in local files and whose bytes the page cache holds.
fn read_cached(gaps: &mut Vec<Gap<'_>>, buf: &mut [u8], counters: &ThreadCounters) {
    gaps.retain(|gap| {
        let Some((fd, offset)) = gap.file else { return true };
        let target = &mut buf[gap.at..gap.at + gap.len];
        match read_if_cached(fd, target, offset) {
            Ok(n) if n == gap.len => {
                counters.bytes(Source::Disk, to_u64(gap.len));
                false
            }
            // Not all of it without waiting: the fetch thread reads it, and finds out what is wrong if anything is.
            _ => true,
        }
    });
}

fn read_if_cached(fd: BorrowedFd<'_>, target: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut target = [io::IoSliceMut::new(target)];
    Ok(rustix::io::preadv2(fd, &mut target, offset, ReadWriteFlags::NOWAIT)?)
}

impl Pending {
    /// Answers the kernel.
    fn finish(mut self, answers: &Answers, outcome: Result<Vec<Slice>, FetchError>) {
        let slices = match outcome {
            Ok(slices) => slices,
            Err(error) => return self.fail(answers, &error.into()),
        };
        if let ([gap], [slice]) = (&self.gaps[..], &slices[..])
            && gap.len == self.buf.len()
            && slice.len() == gap.len
        {
            answers.channel.answer(self.unique, slice);
        } else if let Err(error) = fill_gaps(&self.gaps, &slices, &mut self.buf) {
            return self.fail(answers, &error);
        } else {
            answers.channel.answer(self.unique, &self.buf);
        }
        self.entry.clear();
        let counters = answers.volume.counters(self.thread);
        self.gap_bytes.count(counters);
        counters.took(self.began.elapsed(), 1);
    }

    fn fail(self, answers: &Answers, error: &ReadError) {
        answers.fail(self.thread, self.unique, self.offset, self.buf.len(), error);
        self.entry.clear();
    }
}

/// Answers the kernel when the fetch thread has the bytes.
struct FuseCallback {
    number: u64,
    export: Arc<Export>,
}

impl ReadCallback for FuseCallback {
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
        let Some(pending) = self.export.waiting.take(self.number) else {
            return;
        };
        if pending.buf.len() > LONG_ANSWER {
            if let Err(mpsc::SendError(arrived)) = self.export.long_answers.send(Arrived { pending, outcome }) {
                arrived.pending.finish(&self.export.answers, arrived.outcome);
            }
        } else {
            pending.finish(&self.export.answers, outcome);
        }
    }
}

impl Drop for FuseCallback {
    /// A waiter that is dropped untold must not leave the kernel's request hanging.
    fn drop(&mut self) {
        if let Some(pending) = self.export.waiting.take(self.number) {
            pending.fail(&self.export.answers, &ReadError::Stopped);
        }
    }
}

/// Mounts a FUSE filesystem that `channel` (an open `/dev/fuse`) serves, without attaching it anywhere: it has no path, and
/// is gone with the last descriptor on it.
pub(super) fn mount_detached(channel: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, value: &str| rustix::mount::fsconfig_set_string(context.as_fd(), key, value);
    set("source", "tarblk")?;
    set("fd", &std::os::fd::AsRawFd::as_raw_fd(&channel).to_string())?;
    set("rootmode", "40000")?;
    set("user_id", "0")?;
    set("group_id", "0")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_called_after_what_the_device_holds() {
        for (label, name) in [
            ("/layers/debian.tar", "tarblk:debian.tar"),
            ("http://host:5000/a/layer.tar.gz", "tarblk:layer.tar.gz"),
            ("https://host/layer.tar?\u{2026}", "tarblk:layer.tar"),
            ("docker://host:5000/team/app:1.2", "tarblk:app:1.2"),
            ("oci:/images/dir:latest", "tarblk:dir:latest"),
            ("a layer\n\u{1b}[31m(deleted)", "tarblk:a_layer__[31m(deleted)"),
            ("dir/", "tarblk:dir"),
            ("", "tarblk:"),
        ] {
            assert_eq!(file_name(label), name);
        }
        assert_eq!(file_name(&"n".repeat(1000)).len(), MOST_NAME);
    }
}
