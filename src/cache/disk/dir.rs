//! The directory that the disk cache lives in, and the files in it. In: names. Out: open files that nobody else could have planted.
//!
//! Root writes here, and what lies here reaches root's programs. So the directory has to belong to the user who uses it, and no one
//! else may write to it; it is opened once and everything in it is opened relative to that, without following links, new files only
//! where there was none. A file that is no regular file, or another user's, is refused.
//!
//! Every change goes through here and `file`, and can be seen by an [`Observer`]: tests record what is written and cut the record at every place.

mod file;

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};

use self::file::Writer;
use super::{DiskCacheError, verity};
use crate::owned;

pub(crate) use self::file::{CacheFile, FileState};

/// Told of every change before it is made, and may refuse it. For tests.
pub(crate) trait Observer: Send + Sync + fmt::Debug {
    /// What is about to be done.
    ///
    /// # Errors
    /// What the disk is to answer instead.
    fn before(&self, change: &Change<'_>) -> io::Result<()>;
}

/// A change of the directory or of a file in it; files go by their inode's number.
#[derive(Debug)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests look"))]
pub(crate) enum Change<'a> {
    Create { file: u64, name: &'a str },
    Write { file: u64, at: u64, bytes: &'a [u8] },
    SetLen { file: u64, len: u64 },
    Punch { file: u64, at: u64, len: u64 },
    Sync { file: u64 },
    Rename { from: &'a str, to: &'a str },
    Remove { name: &'a str },
    SyncDir,
}

/// The directory, open.
#[derive(Clone, Debug)]
pub(crate) struct SafeDir {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    observer: Option<Arc<dyn Observer>>,
}

/// Refuses what another user could have put there or could change.
///
/// # Errors
/// [`DiskCacheError::Unsafe`].
pub(crate) fn check_owner(path: &Path, meta: &fs::Metadata) -> Result<(), DiskCacheError> {
    let path = path.to_owned();
    owned::why_unsafe(meta).map_or(Ok(()), |why| Err(DiskCacheError::Unsafe { path, why }))
}

/// Checks a directory of the cache, if it is there: a directory and no link, this user's, that no one else may write to.
///
/// # Errors
/// [`DiskCacheError::Unsafe`].
pub(crate) fn check_dir(path: &Path) -> Result<(), DiskCacheError> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_symlink() => Err(DiskCacheError::Unsafe {
            path: path.to_owned(),
            why: "it is a symbolic link; remove it, or name the directory itself".to_owned(),
        }),
        Ok(meta) if !meta.is_dir() => Err(DiskCacheError::Unsafe {
            path: path.to_owned(),
            why: "it is not a directory; remove it".to_owned(),
        }),
        Ok(meta) => check_owner(path, &meta),
        // What cannot be looked at is found out by whoever opens it.
        Err(_) => Ok(()),
    }
}

impl SafeDir {
    /// Opens a directory, which is made for its owner alone when it is missing.
    ///
    /// # Errors
    /// When it cannot be made or opened, or others could have written to it.
    pub(crate) fn open(path: &Path) -> Result<Self, DiskCacheError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        if let Err(error) = made
            && fs::symlink_metadata(path).is_err()
        {
            return Err(DiskCacheError::new(path, "make the cache directory")(error));
        }
        Self::open_existing(path)
    }

    /// Opens a directory that is there.
    ///
    /// # Errors
    /// The same; and when it is missing.
    pub(crate) fn open_existing(path: &Path) -> Result<Self, DiskCacheError> {
        check_dir(path)?;
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)
            .map_err(DiskCacheError::new(path, "open the cache directory"))?;
        // Once more, of what was opened: it may have been exchanged meanwhile.
        let meta = file.metadata().map_err(DiskCacheError::new(path, "look at"))?;
        check_owner(path, &meta)?;
        Ok(Self {
            fd: Arc::new(file.into()),
            path: path.to_owned(),
            observer: None,
        })
    }

    /// The same directory, seen by `observer`.
    #[cfg(test)]
    pub(super) fn observed(self, observer: Arc<dyn Observer>) -> Self {
        Self {
            observer: Some(observer),
            ..self
        }
    }

    /// Opens the directory of this path anew, in case this one was deleted.
    pub(crate) fn reopened(&self) -> Result<Self, DiskCacheError> {
        Ok(Self {
            observer: self.observer.clone(),
            ..Self::open(&self.path)?
        })
    }

    /// Where it is, for messages and for what is mounted there.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still leads to it.
    pub(crate) fn is_in_place(&self) -> bool {
        let Ok(own) = rustix::fs::fstat(&self.fd) else {
            return false;
        };
        fs::symlink_metadata(&self.path).is_ok_and(|named| (named.dev(), named.ino()) == (own.st_dev, own.st_ino))
    }

    fn tell(&self, change: &Change<'_>) -> io::Result<()> {
        self.observer
            .as_ref()
            .map_or(Ok(()), |observer| observer.before(change))
    }

    fn own(&self, fd: OwnedFd, writer: Writer) -> io::Result<CacheFile> {
        CacheFile::opened(fd, writer, true, self.observer.clone())
    }

    /// Opens a file that is there to be read. Never waits, as opening a pipe would.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::PermissionDenied`] when it is not a regular file of this user's own.
    pub(crate) fn open_file(&self, name: &str) -> io::Result<CacheFile> {
        let fd = self.open_as(name, OFlags::RDONLY)?;
        CacheFile::opened(fd, Writer::None, false, self.observer.clone())
    }

    /// Opens a file that is there to be changed. One that the kernel keeps from being written ([`verity`]) can be given up and removed.
    ///
    /// # Errors
    /// The same; [`io::ErrorKind::NotFound`] also when another one takes its place meanwhile.
    pub(crate) fn open_own(&self, name: &str) -> io::Result<CacheFile> {
        let read = self.open_as(name, OFlags::RDONLY)?;
        let writer = match self.open_as(name, OFlags::RDWR) {
            Ok(fd) if is_same(&fd, &read)? => Writer::Apart(Arc::new(fd.into())),
            Ok(_) => return Err(io::ErrorKind::NotFound.into()),
            Err(error) if is_protected(&error, &read) => Writer::None,
            Err(error) => return Err(error),
        };
        self.own(read, writer)
    }

    fn open_as(&self, name: &str, access: OFlags) -> io::Result<OwnedFd> {
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map_err(|error| match error {
            rustix::io::Errno::LOOP => refused("a symbolic link"),
            other => other.into(),
        })?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused("not a regular file"));
        }
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(refused("another user's file"));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(refused("a file that others may write to"));
        }
        Ok(fd)
    }

    /// Makes a file, for its owner alone.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::AlreadyExists`] when there is something of this name, whatever it is.
    pub(crate) fn create_file(&self, name: &str) -> io::Result<CacheFile> {
        self.own(self.create(name)?, Writer::Itself)
    }

    /// The same for a file that can be [protected](CacheFile::protect) later.
    ///
    /// # Errors
    /// The same; also when another one takes its place meanwhile.
    pub(crate) fn create_own(&self, name: &str) -> io::Result<CacheFile> {
        let write = self.create(name)?;
        let read = self.open_as(name, OFlags::RDONLY)?;
        if !is_same(&write, &read)? {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.own(read, Writer::Apart(Arc::new(write.into())))
    }

    fn create(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.tell(&Change::Create { file: 0, name })?;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?;
        let file = rustix::fs::fstat(&fd)?.st_ino;
        self.tell(&Change::Create { file, name })?;
        Ok(fd)
    }

    /// Makes a file without a name, which goes with its last descriptor.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn create_nameless(&self) -> io::Result<CacheFile> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::RUSR | Mode::WUSR)?;
        self.own(fd, Writer::Itself)
    }

    /// Puts a file in the place of another.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.tell(&Change::Rename { from, to })?;
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Removes a file; one that is not there is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.tell(&Change::Remove { name })?;
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes durable which names there are.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.tell(&Change::SyncDir)?;
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// What is known of a name, without following a link.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn stat(&self, name: &str) -> io::Result<rustix::fs::Stat> {
        Ok(rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The names in it that are text, in no order.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            if let Ok(name) = entry?.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Disk space that the directory itself takes, in bytes.
    pub(crate) fn own_bytes(&self) -> u64 {
        rustix::fs::fstat(&self.fd).map_or(0, |stat| blocks(&stat))
    }

    /// Bytes of its filesystem: all, and those that this user may still take.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn space(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstatvfs(&self.fd)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok((bytes(stat.f_blocks), bytes(stat.f_bavail)))
    }

    /// Waits for this process's turn to change which files there are and how long they may become, at most about a second;
    /// the turn lasts as long as what is returned.
    pub(crate) fn turn(&self) -> io::Result<File> {
        const TRIES: u32 = 200;
        // A description of its own: a lock on the shared one would be everybody's in this process.
        let own = rustix::fs::openat(
            &self.fd,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        for _ in 0..TRIES {
            match rustix::fs::flock(&own, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(own.into()),
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(std::time::Duration::from_millis(5)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "another process keeps the cache directory locked",
        ))
    }
}

fn is_same(a: impl AsFd, b: impl AsFd) -> io::Result<bool> {
    let (a, b) = (rustix::fs::fstat(a)?, rustix::fs::fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// Whether `error` came of opening a file for writing that the kernel keeps from being written, and that is open as `read`.
fn is_protected(error: &io::Error, read: &OwnedFd) -> bool {
    error.raw_os_error() == Some(libc::EPERM) && verity::measure(read).is_ok_and(|digest| digest.is_some())
}

fn refused(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("it is {what}, and not tarblk's own; remove it"),
    )
}

/// Disk space of a file, in bytes.
pub(crate) fn blocks(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn why(outcome: Result<SafeDir, DiskCacheError>) -> String {
        outcome.expect_err("it was opened").to_string()
    }

    #[test]
    fn a_directory_that_others_could_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/cache");
        SafeDir::open(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().mode() & 0o777,
            0o700,
            "made for others, too"
        );
        for mode in [0o720, 0o702, 0o777, 0o1777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(why(SafeDir::open(&path)).contains("others may write"), "mode {mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        SafeDir::open(&path).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(why(SafeDir::open(&link)).contains("symbolic link"));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(why(SafeDir::open(&file)).contains("not a directory"));
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert!(why(SafeDir::open(&path)).contains("belongs to user 65534"));
        }
    }

    #[test]
    fn planted_files_are_neither_opened_nor_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let cache = SafeDir::open(&dir.path().join("cache")).unwrap();
        let at = |name: &str| dir.path().join("cache").join(name);
        std::os::unix::fs::symlink(&victim, at("link")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), at("dangling")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("open"), "").unwrap();
        fs::set_permissions(at("open"), fs::Permissions::from_mode(0o666)).unwrap();
        for name in ["link", "dangling", "fifo", "dir", "open"] {
            let opened = [cache.open_file(name), cache.open_own(name)];
            assert!(opened.iter().all(Result::is_err), "{name} was opened");
            for made in [cache.create_file(name), cache.create_own(name)] {
                assert_eq!(made.unwrap_err().kind(), io::ErrorKind::AlreadyExists, "{name}");
            }
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert!(!dir.path().join("nowhere").exists());
        if rustix::process::geteuid().is_root() {
            fs::write(at("theirs"), "").unwrap();
            std::os::unix::fs::chown(at("theirs"), Some(65534), None).unwrap();
            assert!(cache.open_file("theirs").is_err());
        }
        let made = cache.create_file("mine").unwrap();
        assert_eq!(fs::metadata(at("mine")).unwrap().mode() & 0o777, 0o600);
        assert!(made.is_called(&cache, "mine") && !made.is_called(&cache, "open"));
        assert!(cache.is_in_place());
        fs::rename(at(""), dir.path().join("moved")).unwrap();
        assert!(!cache.is_in_place());
    }
}
