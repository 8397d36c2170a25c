//! A file of the disk cache. In: a file that [`SafeDir`] has opened, or one of the caller's own. Out: its bytes, its state, and whether it
//! was changed; changes, each of which an [`Observer`] is told of first.
//!
//! Invariant: what is only to be read is never written, whoever asks; and what is to be protected by the kernel has no descriptor left that
//! could write to it.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, FlockOperation};

use super::super::verity;
use super::{Change, Observer, SafeDir, blocks};

/// A file in the cache's directory, open; or one that is dealt with as such.
#[derive(Debug)]
pub(crate) struct CacheFile {
    file: File,
    /// Its inode's number.
    id: u64,
    /// Whether it was opened to be changed: written, given up, removed.
    ours: bool,
    writer: RwLock<Writer>,
    observer: Option<Arc<dyn Observer>>,
}

/// What a file is written by.
#[derive(Clone, Debug)]
pub(super) enum Writer {
    /// By the descriptor that it is read by.
    Itself,
    /// By one of its own: the other one is for reading alone, and is what is locked.
    Apart(Arc<File>),
    /// It is not written.
    None,
}

/// What is different about a file whenever somebody has written to it: where it is, how long, and its times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileState {
    device: u64,
    inode: u64,
    len: u64,
    modified: i128,
    changed: i128,
}

impl FileState {
    /// The coarsest clock that a filesystem has, twice.
    const TICK: Duration = Duration::from_secs(2);

    fn of(meta: &Metadata) -> Self {
        let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            len: meta.len(),
            modified: time(meta.mtime(), meta.mtime_nsec()),
            changed: time(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether whoever writes to it from now on changes its times.
    pub(crate) fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let age = now.ok().and_then(|now| {
            let now = i128::try_from(now.as_nanos()).ok()?;
            u128::try_from(now - self.changed).ok()
        });
        age.is_some_and(|age| age >= Self::TICK.as_nanos())
    }
}

impl CacheFile {
    /// A file that was opened in the directory; `ours` if it was to be changed.
    pub(super) fn opened(
        fd: OwnedFd,
        writer: Writer,
        ours: bool,
        observer: Option<Arc<dyn Observer>>,
    ) -> io::Result<Self> {
        let file = File::from(fd);
        let id = file.metadata()?.ino();
        Ok(Self {
            file,
            id,
            ours,
            writer: RwLock::new(writer),
            observer,
        })
    }

    /// A file that is not in the cache directory, and is only read.
    pub(crate) fn borrowed(file: File) -> Self {
        Self {
            file,
            id: 0,
            ours: false,
            writer: RwLock::new(Writer::None),
            observer: None,
        }
    }

    /// A file of this process's own, in whatever place.
    pub(crate) fn own(file: File) -> io::Result<Self> {
        let id = file.metadata()?.ino();
        Ok(Self {
            file,
            id,
            ours: true,
            writer: RwLock::new(Writer::Itself),
            observer: None,
        })
    }

    fn tell(&self, change: &Change<'_>) -> io::Result<()> {
        self.observer
            .as_ref()
            .map_or(Ok(()), |observer| observer.before(change))
    }

    /// The open file, to be read.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Tells it from other files.
    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    /// Whether it was opened to be changed: it can be given up and removed, if not written.
    pub(crate) const fn is_ours(&self) -> bool {
        self.ours
    }

    /// Whether it can be written.
    pub(crate) fn is_writable(&self) -> bool {
        !matches!(self.writer(), Writer::None)
    }

    /// The same file as one that is another process's.
    pub(in crate::cache::disk) fn only_read(self) -> Self {
        Self {
            ours: false,
            writer: RwLock::new(Writer::None),
            ..self
        }
    }

    fn writer(&self) -> Writer {
        self.writer.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it is written by.
    fn to_write(&self) -> io::Result<Written<'_>> {
        match self.writer() {
            Writer::Itself => Ok(Written::Itself(&self.file)),
            Writer::Apart(file) => Ok(Written::Apart(file)),
            Writer::None => Err(rustix::io::Errno::PERM.into()),
        }
    }

    /// Gives up writing to it, so that it can be [protected](Self::protect).
    ///
    /// # Errors
    /// What the kernel says: that it or the filesystem does not protect files ([`verity::is_unsupported`]).
    pub(in crate::cache::disk) fn end_writing(&self) -> io::Result<()> {
        verity::measure(&self.file)?;
        let mut writer = self.writer.write().unwrap_or_else(PoisonError::into_inner);
        if let Writer::Apart(_) = *writer {
            *writer = Writer::None;
        }
        Ok(())
    }

    /// Has the kernel keep it as it is, and compare what is read from now on with one digest, which is returned. Reads all of it, unless it
    /// is protected already. When that fails it can be written as before.
    ///
    /// # Errors
    /// What the kernel says; that somebody has it open for writing.
    pub(in crate::cache::disk) fn protect(&self) -> io::Result<[u8; 32]> {
        if let Some(digest) = verity::measure(&self.file)? {
            return Ok(digest);
        }
        let protected = self.protect_patiently().and_then(|()| verity::measure(&self.file));
        match protected {
            Ok(Some(digest)) => Ok(digest),
            other => {
                let again = OpenOptions::new().read(true).write(true).open(self.path());
                if let Ok(again) = again {
                    *self.writer.write().unwrap_or_else(PoisonError::into_inner) = Writer::Apart(Arc::new(again));
                }
                Err(other.err().unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
            }
        }
    }

    /// Whoever looks whether a file is in use may have it open for writing for a moment.
    fn protect_patiently(&self) -> io::Result<()> {
        const TRIES: u32 = 10;
        for _ in 1..TRIES {
            match verity::protect(&self.file) {
                Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other,
            }
        }
        verity::protect(&self.file)
    }

    /// By it the very same file can be opened once more, whatever it is called.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// The same open file once more.
    pub(crate) fn again(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            id: self.id,
            ours: self.ours,
            writer: RwLock::new(self.writer()),
            observer: self.observer.clone(),
        })
    }

    /// The same file opened for writes past the page cache.
    pub(crate) fn direct(&self) -> io::Result<Self> {
        // A file without a name can be opened anew only through the descriptor; and the flags are to differ.
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.path())?;
        Ok(Self {
            file,
            id: self.id,
            ours: true,
            writer: RwLock::new(Writer::Itself),
            observer: self.observer.clone(),
        })
    }

    /// Writes all of `bytes` from byte `at` on.
    pub(crate) fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.tell(&Change::Write {
            file: self.id,
            at,
            bytes,
        })?;
        self.to_write()?.write_all_at(bytes, at)
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.tell(&Change::SetLen { file: self.id, len })?;
        self.to_write()?.set_len(len)
    }

    /// Gives the disk space of `len` bytes from `at` on back; they read as zeros from then on.
    pub(crate) fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.tell(&Change::Punch { file: self.id, at, len })?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&*self.to_write()?, mode, at, len)?)
    }

    /// Makes its bytes durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.tell(&Change::Sync { file: self.id })?;
        self.file.sync_data()
    }

    /// Locks it for this process alone, if no one has it locked.
    pub(crate) fn lock(&self) -> bool {
        rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok()
    }

    /// Whether a process has it locked for itself. Looking takes a lock that others may take as well, for a moment.
    pub(crate) fn is_locked(&self) -> bool {
        let taken = rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockShared);
        if taken.is_ok() {
            // Gone with the descriptor otherwise.
            let _unlocked = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        }
        taken.is_err()
    }

    /// What is different whenever somebody has written to it.
    pub(crate) fn state(&self) -> io::Result<FileState> {
        Ok(FileState::of(&self.file.metadata()?))
    }

    /// Disk space that it takes, in bytes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        rustix::fs::fstat(&self.file).map_or(0, |stat| blocks(&stat))
    }

    /// Whether `name` in `dir` is this very file.
    pub(crate) fn is_called(&self, dir: &SafeDir, name: &str) -> bool {
        let own = rustix::fs::fstat(&self.file);
        let named = dir.stat(name);
        matches!((own, named), (Ok(own), Ok(named)) if (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino))
    }
}

/// What a file is written by, held.
enum Written<'a> {
    Itself(&'a File),
    Apart(Arc<File>),
}

impl std::ops::Deref for Written<'_> {
    type Target = File;
    fn deref(&self) -> &File {
        match self {
            Self::Itself(file) => file,
            Self::Apart(file) => file,
        }
    }
}

impl AsFd for CacheFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
