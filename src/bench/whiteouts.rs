//! What an image's layer hides of those below it, for the usual way to unpack it. In: a layer's index. Out: devices and marks in
//! the layer's own directory, as overlayfs wants them.
//!
//! Nothing is made outside of that directory, whatever the layer's names and links say.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, makedev, mkdirat, mknodat, openat2, setxattr};
use rustix::io::Errno;

use crate::index::{Entry, EntrySink, Index, IndexError};
use crate::tree::Whiteout;

/// What a layer hides of those below it; paths in its own directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Whiteouts {
    gone: Vec<PathBuf>,
    opaque: Vec<PathBuf>,
}

impl EntrySink for Whiteouts {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        let mut path: PathBuf = Path::new(OsStr::from_bytes(&entry.path))
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect();
        let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
        match Whiteout::of(&name) {
            Some(Whiteout::Opaque) => {
                path.pop();
                self.opaque.push(path);
            }
            // What is left of `.wh.` and `.wh...` is no name: tarblk refuses such a layer before this matters.
            Some(Whiteout::Name(b"" | b"." | b"..") | Whiteout::Ignored) | None => {}
            Some(Whiteout::Name(hidden)) => self.gone.push(path.with_file_name(OsStr::from_bytes(hidden))),
        }
        Ok(())
    }
}

impl Whiteouts {
    /// Those of a layer.
    pub(super) fn of<B: AsRef<[u8]>>(index: &Index<B>) -> Result<Self, IndexError> {
        let mut found = Self::default();
        index.replay(&mut found)?;
        Ok(found)
    }

    /// Makes them in the layer's directory as overlayfs wants them: 0/0 devices, and a mark on what is opaque. A name that
    /// the layer itself has hides what is below it anyway; of a directory that takes the mark.
    pub(super) fn make(&self, layer: &Path) -> io::Result<()> {
        for path in &self.gone {
            let parent = directory(layer, path.parent().unwrap_or(Path::new("")))?;
            let name = path.file_name().unwrap_or_default();
            match mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)) {
                Err(Errno::EXIST) => match inside(&parent, name, ResolveFlags::NO_SYMLINKS) {
                    Ok(directory) => make_opaque(&directory)?,
                    Err(Errno::NOTDIR | Errno::LOOP) => {}
                    Err(error) => return Err(error.into()),
                },
                made => made?,
            }
        }
        for path in &self.opaque {
            make_opaque(&directory(layer, path)?)?;
        }
        Ok(())
    }
}

/// A directory below `at`, as if that were the root.
fn inside(at: impl std::os::fd::AsFd, path: impl rustix::path::Arg, how: ResolveFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(at, path, flags, Mode::empty(), how)
}

/// The same, made if it is not there.
fn directory(layer: &Path, path: &Path) -> io::Result<OwnedFd> {
    let root = inside(CWD, layer, ResolveFlags::empty())?;
    let mut reached = PathBuf::new();
    let mut at = inside(&root, ".", ResolveFlags::IN_ROOT)?;
    for part in path.components() {
        reached.push(part);
        at = match inside(&root, &reached, ResolveFlags::IN_ROOT) {
            Err(Errno::NOENT) => {
                mkdirat(&at, part.as_os_str(), Mode::from_raw_mode(0o755))?;
                inside(&root, &reached, ResolveFlags::IN_ROOT)?
            }
            there => there?,
        };
    }
    Ok(at)
}

fn make_opaque(directory: &OwnedFd) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
    setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty()).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

    use std::fs;

    use super::*;

    fn whiteouts(paths: &[&str]) -> Whiteouts {
        let mut found = Whiteouts::default();
        for path in paths {
            let entry = Entry {
                path: path.as_bytes().to_vec(),
                ..Entry::default()
            };
            found.entry(&entry).unwrap();
        }
        found
    }

    #[test]
    fn names_say_what_is_hidden() {
        let found = whiteouts(&[
            "./a/.wh.b",
            "/c/.wh..wh..opq",
            ".wh..wh.plnk",
            "../.wh.d",
            "e.wh.f",
            "g/.wh.",
        ]);
        assert_eq!(found.gone, [Path::new("a/b"), Path::new("d")]);
        assert_eq!(found.opaque, [Path::new("c")]);
    }

    #[test]
    fn nothing_is_made_outside_of_the_layer() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIP: nothing_is_made_outside_of_the_layer: devices need root");
        }
        let dir = tempfile::tempdir().unwrap();
        let (layer, outside) = (dir.path().join("layer"), dir.path().join("outside"));
        fs::create_dir_all(layer.join("again")).unwrap();
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, layer.join("out")).unwrap();
        std::os::unix::fs::symlink("../outside", layer.join("up")).unwrap();
        let found = whiteouts(&["new/.wh.file", ".wh.again", "again/.wh..wh..opq"]);
        match found.make(&layer) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                return eprintln!("SKIP: nothing_is_made_outside_of_the_layer: no trusted attributes here");
            }
            made => made.unwrap(),
        }
        let made = fs::symlink_metadata(layer.join("new/file")).unwrap();
        assert!(made.file_type().is_char_device() && made.rdev() == 0);
        assert!(fs::symlink_metadata(layer.join("again")).unwrap().is_dir());
        for path in ["out/.wh.x", "up/.wh.x"] {
            let _ = whiteouts(&[path]).make(&layer);
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
