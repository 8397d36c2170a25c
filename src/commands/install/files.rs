//! Files below a directory that stands for a machine's root. In: paths and contents. Out: whole files. Links are followed as that
//! machine would follow them, and never out of it; where another user could have put one, nothing is written.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat, openat2, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::owned;

/// The end of the name of a file that is being written.
const PART: &str = ".tarblk-part";

/// What became of a file that is only written where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It is new.
    New,
    /// One was there, and stays.
    WasThere,
}

/// A directory that stands for the root of a machine.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

impl Root {
    /// Opens the directory.
    ///
    /// # Errors
    /// When it is none, or not this process's user's alone to write to.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let root = openat(
            CWD,
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        check_owner(&root, Path::new("/"))?;
        Ok(Self(root))
    }

    fn directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        openat2(&self.0, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    }

    /// The directory that a file is in, which is made if `make`, and the file's name. `path` is relative to the root.
    fn place<'p>(&self, path: &'p Path, make: bool) -> io::Result<(OwnedFd, &'p OsStr)> {
        let odd = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file", path.display()));
        let name = path.file_name().ok_or_else(odd)?;
        let (mut reached, mut at) = (PathBuf::new(), self.directory(Path::new(""))?);
        for part in path.parent().into_iter().flat_map(Path::components) {
            let Component::Normal(part) = part else {
                return Err(odd());
            };
            reached.push(part);
            at = match self.directory(&reached) {
                Err(Errno::NOENT) if make => {
                    mkdirat(&at, part, Mode::from_raw_mode(0o755))?;
                    self.directory(&reached)?
                }
                there => there?,
            };
            check_owner(&at, &reached)?;
        }
        Ok((at, name))
    }

    /// Puts a file in its place, whole or not at all, in place of what is there.
    ///
    /// # Errors
    /// What the kernel says; when other users may write to a directory on the way.
    pub(super) fn write(&self, path: &Path, content: &mut dyn Read, mode: u32) -> io::Result<()> {
        let (dir, name) = self.place(path, true)?;
        let mut part = name.to_owned();
        part.push(PART);
        let written = write_part(&dir, &part, content, mode).and_then(|()| Ok(renameat(&dir, &part, &dir, name)?));
        written.inspect_err(|_| {
            let _ = unlinkat(&dir, &part, AtFlags::empty());
        })
    }

    /// Writes a file where there is none.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub(super) fn write_new(&self, path: &Path, content: &[u8], mode: u32) -> io::Result<Written> {
        let (dir, name) = self.place(path, true)?;
        match statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(Written::WasThere),
            Err(Errno::NOENT) => self.write(path, &mut &*content, mode).map(|()| Written::New),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a symbolic link, in place of one that is there.
    ///
    /// # Errors
    /// As [`write`](Self::write); when something else than a link is there.
    pub(super) fn link(&self, path: &Path, target: &Path) -> io::Result<()> {
        let (dir, name) = self.place(path, true)?;
        match rustix::fs::readlinkat(&dir, name, Vec::new()) {
            Ok(_) => unlinkat(&dir, name, AtFlags::empty())?,
            Err(Errno::NOENT) => {}
            Err(Errno::INVAL) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else is there")),
            Err(error) => return Err(error.into()),
        }
        Ok(symlinkat(target, &dir, name)?)
    }

    /// Removes a file or a link; false if there is none.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn remove(&self, path: &Path) -> io::Result<bool> {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let (dir, name) = match self.place(path, false) {
            Err(error) if gone(&error) => return Ok(false),
            found => found?,
        };
        match unlinkat(&dir, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Writes a new file, on disk when this returns.
fn write_part(dir: &OwnedFd, part: &OsStr, content: &mut dyn Read, mode: u32) -> io::Result<()> {
    match unlinkat(dir, part, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(dir, part, flags, Mode::from_raw_mode(0o600))?);
    io::copy(content, &mut file)?;
    file.flush()?;
    fchmod(&file, Mode::from_raw_mode(mode))?;
    file.sync_all()
}

/// Whether only this process's user, who is root, can write to a directory.
fn check_owner(dir: &OwnedFd, path: &Path) -> io::Result<()> {
    let found = File::from(dir.try_clone()?).metadata()?;
    let refused = |why| {
        let why = format!("{}: {why}", Path::new("/").join(path).display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
    };
    owned::why_unsafe(&found).map_or(Ok(()), refused)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn links_lead_where_they_lead_on_that_machine() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        fs::create_dir_all(dir.path().join("usr/sbin")).unwrap();
        symlink("/usr/sbin", dir.path().join("sbin")).unwrap();
        symlink("../../../../usr", dir.path().join("up")).unwrap();
        root.write(Path::new("sbin/a"), &mut &b"a"[..], 0o755).unwrap();
        root.write(Path::new("up/b"), &mut &b"b"[..], 0o644).unwrap();
        assert_eq!(fs::read(dir.path().join("usr/sbin/a")).unwrap(), b"a");
        assert_eq!(fs::read(dir.path().join("usr/b")).unwrap(), b"b");
        let mode = fs::metadata(dir.path().join("usr/sbin/a"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755);
        // A link in the file's own place is replaced, not followed.
        symlink("/usr/b", dir.path().join("usr/c")).unwrap();
        root.write(Path::new("usr/c"), &mut &b"c"[..], 0o644).unwrap();
        assert_eq!(fs::read(dir.path().join("usr/b")).unwrap(), b"b");
        for outside in ["../x", "/x", "a/../../x", ""] {
            root.write(Path::new(outside), &mut &b"x"[..], 0o644).unwrap_err();
        }
    }

    #[test]
    fn nothing_is_written_where_others_may_write() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("open")).unwrap();
        fs::set_permissions(dir.path().join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = root
            .write(Path::new("open/below/file"), &mut &b"x"[..], 0o644)
            .unwrap_err();
        assert_eq!(
            refused.to_string(),
            "/open: others may write to it; `chmod go-w` it if nobody did, or remove it"
        );
        assert_eq!(fs::read_dir(dir.path().join("open")).unwrap().count(), 0);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        Root::open(dir.path()).unwrap_err();
    }

    #[test]
    fn what_is_there_stays_or_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let path = Path::new("etc/tarblk/a.toml");
        assert_eq!(root.write_new(path, b"one", 0o644).unwrap(), Written::New);
        assert_eq!(root.write_new(path, b"two", 0o644).unwrap(), Written::WasThere);
        assert_eq!(fs::read(dir.path().join(path)).unwrap(), b"one");
        root.link(Path::new("sbin/l"), Path::new("/a")).unwrap();
        root.link(Path::new("sbin/l"), Path::new("/b")).unwrap();
        assert_eq!(fs::read_link(dir.path().join("sbin/l")).unwrap(), Path::new("/b"));
        root.link(path, Path::new("/b")).unwrap_err();
        assert!(root.remove(path).unwrap());
        assert!(!root.remove(path).unwrap());
        assert!(!root.remove(Path::new("no/such/place")).unwrap());
        let names: Vec<_> = fs::read_dir(dir.path().join("etc/tarblk")).unwrap().collect();
        assert!(names.is_empty(), "{names:?}");
    }
}
