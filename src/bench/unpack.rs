//! Downloading an image and unpacking it, as fast as that can be done. In: layers that are served. Out: a root directory.
//!
//! All blobs come at the same time, and each goes into a tar of its own while it comes, into a directory of its own; overlayfs
//! makes one tree of the directories, as containerd's usual snapshotter does. containerd waits for a whole blob, checks its
//! digest and unpacks one layer after the other: what is measured here is no slower. Which whiteouts the layers have is known
//! beforehand, so looking for them costs nothing either; making them is inside the clock.
//!
//! Nothing is written outside of a layer's own directory, whatever its names and links say.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, makedev, mkdirat, mknodat, openat2, setxattr};
use rustix::io::Errno;

use super::BenchError;
use super::child::{self, Running};
use super::rows::Unmount;
use super::stage::{Layer, Stage};
use crate::index::{Entry, EntrySink, Index, IndexError};

const PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own, which mean nothing here.
const AUFS: &[u8] = b".wh..wh.";

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
        if name == OPAQUE {
            path.pop();
            self.opaque.push(path);
        } else if let Some(hidden) = name.strip_prefix(PREFIX).filter(|_| !name.starts_with(AUFS)) {
            // What is left of `.wh.` and `.wh...` is no name: tarblk refuses such a layer before this matters.
            if !matches!(hidden, b"" | b"." | b"..") {
                self.gone.push(path.with_file_name(OsStr::from_bytes(hidden)));
            }
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
    fn make(&self, layer: &Path) -> io::Result<()> {
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

/// What came of the downloads.
#[derive(Debug)]
pub(super) struct Unpacked<'a> {
    /// The root directory.
    pub(super) root: PathBuf,
    /// How many bytes came.
    pub(super) bytes: u64,
    /// When the last one had come, since the clock started.
    pub(super) downloaded: Duration,
    /// The stack, if there is one.
    pub(super) _mounted: Option<Unmount<'a>>,
}

impl Stage<'_> {
    /// Downloads and unpacks all layers into `space`; `target` is where a stack of several is mounted.
    pub(super) fn unpack<'a>(
        &self,
        space: &Path,
        target: &'a Path,
        clock: Instant,
    ) -> Result<Unpacked<'a>, BenchError> {
        let directories: Vec<PathBuf> = (0..self.layers.len()).map(|n| space.join(n.to_string())).collect();
        let each: Result<Vec<(u64, Duration)>, BenchError> = thread::scope(|scope| {
            let mut running = Vec::new();
            for (layer, directory) in self.layers.iter().zip(&directories) {
                running.push(scope.spawn(move || self.unpack_layer(layer, directory, clock)));
            }
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let each = each?;
        let (root, mounted) = match &directories[..] {
            [only] => (only.clone(), None),
            _ => (target.to_owned(), Some(self.stack(space, target)?)),
        };
        Ok(Unpacked {
            root,
            bytes: each.iter().map(|(bytes, _)| bytes).sum(),
            downloaded: each.iter().map(|(_, at)| *at).max().unwrap_or_default(),
            _mounted: mounted,
        })
    }

    fn unpack_layer(&self, layer: &Layer, directory: &Path, clock: Instant) -> Result<(u64, Duration), BenchError> {
        let failed = || BenchError::step(format!("{}: cannot unpack there", directory.display()));
        fs::create_dir(directory).map_err(failed())?;
        let mut tar = Command::new("tar");
        tar.arg("-x")
            .args(layer.decompress)
            .arg("--numeric-owner")
            .args(layer.whiteouts.as_ref().map(|_| "--exclude=.wh.*"))
            .arg("-C")
            .arg(directory)
            .stdin(Stdio::piped());
        let mut tar = Running::start(&mut tar, self.scratch())?;
        let mut pipe = tar.child().stdin.take();
        let bytes = match pipe.as_mut() {
            Some(pipe) => self.download(&layer.url, pipe)?,
            None => 0,
        };
        let downloaded = clock.elapsed();
        drop(pipe);
        tar.wait(self.interrupt)?.success()?;
        if let Some(whiteouts) = &layer.whiteouts {
            whiteouts.make(directory).map_err(failed())?;
        }
        Ok((bytes, downloaded))
    }

    /// Stacks the layers' directories in `space`, which are named by number.
    fn stack<'a>(&self, space: &Path, target: &'a Path) -> Result<Unmount<'a>, BenchError> {
        let mut options = OsString::from("ro,lowerdir=");
        let mut lower = String::new();
        for number in (0..self.layers.len()).rev() {
            // Writing to a string cannot fail.
            let _infallible = write!(lower, "{}{number}", if lower.is_empty() { "" } else { ":" });
        }
        options.push(lower);
        let mut mount = Command::new("mount");
        // From within, so that no name of a directory can be taken for a part of the options.
        mount.current_dir(space).args(["-t", "overlay", "overlay", "-o"]);
        mount.arg(options).arg(target);
        child::run(&mut mount, self.scratch(), self.interrupt)?;
        Ok(Unmount(target))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

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
