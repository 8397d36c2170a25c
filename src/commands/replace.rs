//! Output files that are whole or not there. In: a path and something that writes. Out: a file in place of what was there.
//!
//! What is written has no name until it is whole, so that nothing is left of it however this process ends, where the
//! filesystem can do that; else it has a name of its own until then. What is no regular file is never replaced: `-o
//! /dev/full`, typed by root, must not cost the machine a device.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tempfile::NamedTempFile;

/// Begins the names of files that are not whole yet.
const PREFIX: &str = ".tarblk-";

/// How often a name may turn out to be taken.
const NAME_TRIES: u32 = 100;

/// Writes a file that takes the place of `path` when it is whole; when it does not become whole, `path` is as it was.
///
/// # Errors
/// When `path` is something that must not be replaced, what `write` returns, and what the system says.
pub(super) fn replace<T>(path: &Path, write: impl FnOnce(&mut File) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let cannot = || format!("cannot write {}", path.display());
    let path = replaceable(path).with_context(cannot)?;
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let mut part = Part::new(dir).with_context(cannot)?;
    let value = write(part.file())?;
    part.persist(dir, &path).with_context(cannot)?;
    Ok(value)
}

/// The file itself, if there is one behind symbolic links; never a directory, device, pipe or socket.
fn replaceable(path: &Path) -> io::Result<PathBuf> {
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => return Err(error),
    };
    if found.is_dir() {
        return Err(io::Error::other("it is a directory; name a file"));
    }
    if !found.is_file() {
        return Err(io::Error::other(
            "it is not a regular file, and will not be replaced by one",
        ));
    }
    fs::canonicalize(path)
}

/// A file on its way.
enum Part {
    /// Without a name.
    Nameless(File),
    /// With a name that goes when this is dropped.
    Named(NamedTempFile),
}

impl Part {
    fn new(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        match rustix::fs::open(dir, flags, mode) {
            Ok(file) => return Ok(Self::Nameless(file.into())),
            // EISDIR is what kernels say that do not know the flag.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let umask = rustix::process::umask(Mode::empty());
        rustix::process::umask(umask);
        let mode = fs::Permissions::from_mode(0o666 & !umask.bits());
        let mut named = tempfile::Builder::new();
        let named = named.prefix(PREFIX).permissions(mode).tempfile_in(dir);
        named.map(Self::Named).map_err(|error| error.kind().into())
    }

    fn file(&mut self) -> &mut File {
        match self {
            Self::Nameless(file) => file,
            Self::Named(named) => named.as_file_mut(),
        }
    }

    fn persist(self, dir: &Path, path: &Path) -> io::Result<()> {
        match self {
            Self::Nameless(file) => {
                let name = name(&file, dir)?;
                fs::rename(&name, path).inspect_err(|_| {
                    let _ = fs::remove_file(&name);
                })
            }
            Self::Named(named) => named.persist(path).map(drop).map_err(|error| error.error),
        }
    }
}

/// Gives a file without a name one of its own in `dir`.
fn name(file: &File, dir: &Path) -> io::Result<PathBuf> {
    use std::os::fd::AsRawFd as _;
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    for number in 0..NAME_TRIES {
        let name = dir.join(format!("{PREFIX}{}-{number}", std::process::id()));
        match rustix::fs::linkat(CWD, &itself, CWD, &name, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => return Ok(name),
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn files_are_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        for text in ["first", "second"] {
            replace(&path, |file| Ok(file.write_all(text.as_bytes())?)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let failed: anyhow::Result<()> = replace(&path, |file| {
            file.write_all(b"third")?;
            anyhow::bail!("no more")
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        // The link stays one, the file behind it is the new one.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("out", &link).unwrap();
        replace(&link, |file| Ok(file.write_all(b"fourth")?)).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "fourth");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_no_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let never = |_: &mut File| -> anyhow::Result<()> { panic!("it was opened") };
        for path in [&socket, dir.path(), Path::new("/dev/null")] {
            let said = format!("{:#}", replace(path, never).unwrap_err());
            assert!(said.contains("regular file") || said.contains("directory"), "{said}");
        }
        let said = format!("{:#}", replace(&dir.path().join("no/dir"), never).unwrap_err());
        assert!(said.contains("No such file"), "{said}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
