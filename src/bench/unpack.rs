//! Downloading an image and unpacking it, as fast as that can be done. In: layers that are served. Out: a root directory.
//!
//! All blobs come at the same time, and each goes into a tar of its own while it comes, into a directory of its own; overlayfs
//! makes one tree of the directories, as containerd's usual snapshotter does. containerd waits for a whole blob, checks its
//! digest and unpacks one layer after the other: what is measured here is no slower. Which whiteouts the layers have is known
//! beforehand, so looking for them costs nothing either; making them is inside the clock.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::BenchError;
use super::child::{self, Running};
use super::mounted::Unmount;
use super::stage::{Layer, Stage};

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
