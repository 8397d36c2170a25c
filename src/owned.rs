//! Directories that this process's user writes to and reads back from. In: a path. Out: the directory, made if need be, in which
//! no other user could have put a link or a file; or who could have.
//!
//! A directory is its owner's alone if no other user may write to it, *and* if no other user could exchange a directory on the way
//! to it. A sticky directory (`/tmp`), in which users can make files and not touch each other's, may be on the way.
//!
//! A ground room: it imports no other.

use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

/// So many symbolic links on the way to a directory are followed, as the kernel has it.
const MOST_LINKS: usize = 40;

/// Why a directory is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnedError {
    /// Another user could put something into it, or something else in its place.
    #[error("{path} is not safe to write to: {why}")]
    Unsafe {
        /// The directory, or one on the way to it.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// It cannot be made or looked at.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// The directory, or one on the way to it.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn unusable(path: &Path) -> impl FnOnce(io::Error) -> OwnedError {
    let path = path.to_owned();
    move |cause| OwnedError::Io { path, cause }
}

/// Why what `meta` is of could have been written by another user, in words for the person; `None` if it could not.
pub(crate) fn why_unsafe(meta: &Metadata) -> Option<String> {
    if meta.uid() != rustix::process::geteuid().as_raw() {
        let user = meta.uid();
        return Some(format!(
            "it belongs to user {user}, who could put anything there; remove it"
        ));
    }
    (meta.mode() & 0o022 != 0).then(|| "others may write to it; `chmod go-w` it if nobody did, or remove it".to_owned())
}

/// Why another user could exchange what lies in the directory that `meta` is of; `None` if none could.
fn why_no_way(meta: &Metadata) -> Option<String> {
    const STICKY: u32 = 0o1000;
    let owner = meta.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Some(format!(
            "it belongs to user {owner}, who could exchange what lies in it; use a directory elsewhere"
        ));
    }
    (meta.mode() & 0o022 != 0 && meta.mode() & STICKY == 0).then(|| {
        "others may exchange what lies in it; `chmod go-w` it if nobody did, or use a directory elsewhere".to_owned()
    })
}

/// Makes the directory at `path` if it is not there, and those on the way to it that are missing, for their owner alone, and checks
/// that no other user could write to it or exchange it. Returns its path without links and dots. The last part of `path` must be no
/// link.
///
/// # Errors
/// [`OwnedError`].
pub fn directory(path: &Path) -> Result<PathBuf, OwnedError> {
    walk(path, true)
}

/// The same of a directory that has to be there.
///
/// # Errors
/// [`OwnedError`].
pub fn existing_directory(path: &Path) -> Result<PathBuf, OwnedError> {
    walk(path, false)
}

fn walk(path: &Path, make: bool) -> Result<PathBuf, OwnedError> {
    let full = std::path::absolute(path).map_err(unusable(path))?;
    let mut at = PathBuf::from("/");
    let mut parts: Vec<_> = parts_of(&full);
    let mut links = 0;
    while let Some(part) = parts.pop() {
        let Part::Named(name) = part else {
            at.pop();
            continue;
        };
        // Asked before what lies in it is looked at: from here on only this user or root can exchange that.
        let meta = fs::symlink_metadata(&at).map_err(unusable(&at))?;
        refuse(&at, why_no_way(&meta))?;
        at.push(name);
        let meta = match fs::symlink_metadata(&at) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound && make => {
                match DirBuilder::new().mode(0o700).create(&at) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(unusable(&at)(error)),
                    _ => fs::symlink_metadata(&at).map_err(unusable(&at))?,
                }
            }
            Err(error) => return Err(unusable(&at)(error)),
        };
        if !meta.is_symlink() {
            continue;
        }
        links += 1;
        let owner = meta.uid();
        let why = if parts.is_empty() {
            Some("it is a symbolic link; remove it, or name the directory itself".to_owned())
        } else if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            Some(format!("it is a symbolic link of user {owner}"))
        } else {
            (links > MOST_LINKS).then(|| "symbolic links without end".to_owned())
        };
        refuse(&at, why)?;
        let target = fs::read_link(&at).map_err(unusable(&at))?;
        at.pop();
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        parts.extend(parts_of(&target));
    }
    let meta = fs::symlink_metadata(&at).map_err(unusable(&at))?;
    if !meta.is_dir() {
        return Err(unusable(&at)(io::ErrorKind::NotADirectory.into()));
    }
    refuse(&at, why_unsafe(&meta))?;
    Ok(at)
}

fn refuse(path: &Path, why: Option<String>) -> Result<(), OwnedError> {
    let path = path.to_owned();
    why.map_or(Ok(()), |why| Err(OwnedError::Unsafe { path, why }))
}

/// A part of a path that leads somewhere else than here.
enum Part {
    Named(std::ffi::OsString),
    Up,
}

/// The parts of a path, the last first.
fn parts_of(path: &Path) -> Vec<Part> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(Part::Named(name.to_owned())),
        Component::ParentDir => Some(Part::Up),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().rev().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn why(path: &Path) -> String {
        directory(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_missing_is_made_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        let made = directory(&dir.path().join("a/./b/../c")).unwrap();
        assert_eq!(made, real.join("a/c"));
        for part in ["a", "a/b", "a/c"] {
            assert_eq!(fs::metadata(real.join(part)).unwrap().mode() & 0o777, 0o700);
        }
        assert_eq!(existing_directory(&made).unwrap(), made);
        let absent = existing_directory(&made.join("x")).unwrap_err();
        assert!(matches!(absent, OwnedError::Io { .. }) && !made.join("x").exists());
        fs::write(made.join("file"), "").unwrap();
        assert!(matches!(directory(&made.join("file")), Err(OwnedError::Io { .. })));
        assert!(matches!(
            directory(&made.join("file/below")),
            Err(OwnedError::Io { .. })
        ));
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let made = directory(&dir.path().join("a")).unwrap();
        for mode in [0o770, 0o707, 0o1777] {
            chmod(&made, mode);
            assert!(why(&made).contains("others may write to it"), "{mode:o}");
        }
        // On the way a sticky one is good, another is not.
        assert!(directory(&made.join("b")).is_ok());
        chmod(&made, 0o777);
        assert!(why(&made.join("b")).contains("others may exchange"));
        assert!(why(&made.join("new")).contains("others may exchange") && !made.join("new").exists());
    }

    #[test]
    fn a_link_on_the_way_is_followed_and_one_at_the_end_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let real = directory(&dir.path().join("real/dir")).unwrap();
        let link = dir.path().join("link");
        symlink("real", &link).unwrap();
        assert_eq!(directory(&link.join("dir")).unwrap(), real);
        assert!(why(&link).contains("symbolic link"));
        let around = dir.path().join("around");
        symlink("around/x", &around).unwrap();
        assert!(why(&around.join("y")).contains("without end"));
        // What it leads through counts.
        chmod(real.parent().unwrap(), 0o777);
        assert!(why(&link.join("dir")).contains("others may exchange"));
    }

    #[test]
    fn what_another_user_has_is_refused() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: what_another_user_has_is_refused: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let theirs = directory(&dir.path().join("theirs")).unwrap();
        let below = directory(&theirs.join("below")).unwrap();
        chown(&theirs, Some(1234), None).unwrap();
        assert!(why(&theirs).contains("belongs to user 1234"));
        assert!(why(&below).contains("user 1234, who could exchange"));
        let link = dir.path().join("link");
        symlink(dir.path(), &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(1234), None).unwrap();
        assert!(why(&link.join("x")).contains("a symbolic link of user 1234"));
    }
}
