//! The image as the only file of a FUSE filesystem that is mounted nowhere.
//!
//! The session's threads never wait: what is in memory they answer at once, a local file they read only as far as the page
//! cache has it, and everything else is answered by the fetch thread when the bytes are there.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};
use rustix::io::ReadWriteFlags;

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

const FILE: INodeNo = INodeNo(2);

/// Nothing about the file ever changes, so the kernel may keep what it knows for good.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// Requests the kernel may have in flight before it holds more back; reads through a loop device count as background.
const MAX_BACKGROUND: u16 = 512;

/// Answers longer than this are copied to the kernel by a thread of their own instead of the fetch thread.
const LONG_ANSWER: usize = 64 << 10;

/// The filesystem.
#[derive(Debug)]
pub(super) struct Export {
    volume: Arc<Volume>,
    next_thread: AtomicUsize,
    waiting: Arc<Waiting>,
    long_answers: mpsc::Sender<Arrived>,
    /// The file's name.
    name: OsString,
}

/// The reads whose bytes are on the way, by number.
#[derive(Debug, Default)]
pub(super) struct Waiting {
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

    /// Answers every read that waits for the fetch thread with an error.
    pub(super) fn give_up(&self) {
        let reads = std::mem::take(&mut *self.reads());
        for pending in reads.into_values() {
            pending.give_up();
        }
    }
}

thread_local! {
    /// What a session thread reuses from read to read: its lane's number, its lists, its buffer.
    static THREAD_SCRATCH: std::cell::RefCell<Option<ThreadScratch>> = const { std::cell::RefCell::new(None) };
}

#[derive(Debug)]
struct ThreadScratch {
    /// Which of the volume's counters are this thread's.
    number: usize,
    scratch: Scratch<'static>,
    buf: Vec<u8>,
}

/// A read whose bytes are on the way.
#[derive(Debug)]
struct Pending {
    volume: Arc<Volume>,
    thread: usize,
    offset: u64,
    buf: Vec<u8>,
    gaps: Vec<Gap<'static>>,
    gap_bytes: GapBytes,
    began: Instant,
    reply: ReplyData,
}

/// A read whose bytes are here but not yet with the kernel.
#[derive(Debug)]
struct Arrived {
    pending: Pending,
    outcome: Result<Vec<Slice>, FetchError>,
}

impl Export {
    /// Serves `volume` as a file called `name`, with a thread for long answers that ends with the filesystem.
    pub(super) fn new(volume: Arc<Volume>, waiting: Arc<Waiting>, name: &str) -> io::Result<Self> {
        let (long_answers, arrivals) = mpsc::channel::<Arrived>();
        std::thread::Builder::new()
            .name("fuse-answers".to_owned())
            .spawn(move || {
                for arrived in arrivals {
                    arrived.pending.finish(arrived.outcome);
                }
            })?;
        Ok(Self {
            volume,
            next_thread: AtomicUsize::new(0),
            waiting,
            long_answers,
            name: name.into(),
        })
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) = match ino {
            FILE => (FileType::RegularFile, 0o400, self.volume.len()),
            _ => (FileType::Directory, 0o500, 0),
        };
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn serve(&self, thread: &mut ThreadScratch, offset: u64, size: u32, reply: ReplyData) {
        let mut scratch: Scratch<'_> = std::mem::take(&mut thread.scratch);
        self.serve_with(&mut scratch, thread.number, &mut thread.buf, offset, size, reply);
        thread.scratch = scratch.emptied();
    }

    /// Answers a read of `size` bytes, with the lists and the buffer of the calling thread, which is number `thread`.
    fn serve_with<'v>(
        &'v self,
        scratch: &mut Scratch<'v>,
        thread: usize,
        whole_buf: &mut Vec<u8>,
        offset: u64,
        size: u32,
        reply: ReplyData,
    ) {
        let began = Instant::now();
        let counters = self.volume.counters(thread);
        counters.read();
        let left = self.volume.len().saturating_sub(offset);
        let len = usize::try_from(left.min(u64::from(size))).unwrap_or(0);
        if whole_buf.len() < len {
            whole_buf.resize(len, 0);
        }
        let buf = &mut whole_buf[..len];
        match self.volume.look(offset, buf, scratch, counters) {
            Ok(Found::Zero) => {
                buf.fill(0);
                reply.data(buf);
            }
            Ok(Found::Memory(slice)) => reply.data(&slice),
            Ok(Found::Filled) => reply.data(buf),
            Ok(Found::Gaps) => {
                let gaps = &mut scratch.gaps;
                read_cached(gaps, buf, counters);
                if gaps.is_empty() {
                    reply.data(buf);
                } else {
                    let pending = Pending {
                        volume: Arc::clone(&self.volume),
                        thread,
                        offset,
                        // Only what is here already has to be kept.
                        buf: if covers(gaps, len) { vec![0; len] } else { buf.to_vec() },
                        gaps: gaps.iter().copied().map(Gap::detached).collect(),
                        gap_bytes: GapBytes::of(gaps),
                        began,
                        reply,
                    };
                    let (waiting, long_answers) = (Arc::clone(&self.waiting), self.long_answers.clone());
                    let callback = FuseCallback {
                        number: waiting.add(pending),
                        waiting,
                        long_answers,
                    };
                    return self.volume.fetch(gaps, Box::new(callback));
                }
            }
            Err(error) => fail(&self.volume, thread, offset, len, &error, reply),
        }
        counters.took(began.elapsed(), 1);
    }
}

/// Whether the gaps are all there is of a read of `len` bytes.
fn covers(gaps: &[Gap<'_>], len: usize) -> bool {
    gaps.iter().map(|gap| gap.len).sum::<usize>() == len
}

fn fail(volume: &Volume, thread: usize, offset: u64, len: usize, error: &ReadError, reply: ReplyData) {
    volume.failed(volume.counters(thread), offset, len, error);
    reply.error(Errno::EIO);
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
    fn finish(mut self, outcome: Result<Vec<Slice>, FetchError>) {
        let slices = match outcome {
            Ok(slices) => slices,
            Err(error) => return self.fail(&error.into()),
        };
        if let ([gap], [slice]) = (&self.gaps[..], &slices[..])
            && gap.len == self.buf.len()
            && slice.len() == gap.len
        {
            self.reply.data(slice);
        } else if let Err(error) = fill_gaps(&self.gaps, &slices, &mut self.buf) {
            return self.fail(&error);
        } else {
            self.reply.data(&self.buf);
        }
        let counters = self.volume.counters(self.thread);
        self.gap_bytes.count(counters);
        counters.took(self.began.elapsed(), 1);
    }

    fn fail(self, error: &ReadError) {
        fail(
            &self.volume,
            self.thread,
            self.offset,
            self.buf.len(),
            error,
            self.reply,
        );
    }

    fn give_up(self) {
        self.fail(&ReadError::Stopped);
    }
}

/// Answers the kernel when the fetch thread has the bytes.
struct FuseCallback {
    number: u64,
    waiting: Arc<Waiting>,
    long_answers: mpsc::Sender<Arrived>,
}

impl ReadCallback for FuseCallback {
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
        let Some(pending) = self.waiting.take(self.number) else {
            return;
        };
        if pending.buf.len() > LONG_ANSWER {
            if let Err(mpsc::SendError(arrived)) = self.long_answers.send(Arrived { pending, outcome }) {
                arrived.pending.finish(arrived.outcome);
            }
        } else {
            pending.finish(outcome);
        }
    }
}

impl Drop for FuseCallback {
    /// A waiter that is dropped untold must not leave the kernel's request hanging.
    fn drop(&mut self) {
        if let Some(pending) = self.waiting.take(self.number) {
            pending.give_up();
        }
    }
}

impl Filesystem for Export {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each of these makes reads faster where the kernel has it, and none is needed.
        for capability in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_MAX_PAGES,
        ] {
            let _ = config.add_capabilities(capability);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        // The length of a read is bounded by that of a write, which never happens.
        let _ = config.set_max_write(1 << 20);
        if let Err(most) = config.set_max_readahead(1 << 20) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == self.name {
            reply.entry(&FOR_EVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino == INodeNo::ROOT || ino == FILE {
            reply.attr(&FOR_EVER, &self.attributes(ino));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn open(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if ino == FILE {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    /// Nothing is ever written, so there is nothing to flush. The kernel asks no more after this answer.
    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    /// As for flush: the caller is told that all is well, and the kernel asks no more.
    fn fsync(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        THREAD_SCRATCH.with_borrow_mut(|thread| {
            let thread = thread.get_or_insert_with(|| ThreadScratch {
                number: self.next_thread.fetch_add(1, Ordering::Relaxed),
                scratch: Scratch::default(),
                buf: Vec::new(),
            });
            self.serve(thread, offset, size, reply);
        });
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
