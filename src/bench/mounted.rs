//! What is mounted during a benchmark: a layer by `tarblk mount`, as a process of its own, or an image by mount(8). Both are
//! unmounted when dropped, also after an error or a signal.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::origin::Link;
use super::root::ChrootMounts;
use super::stage::{MountArguments, Stage};
use super::{BenchError, child};
use crate::device::inventory::Counted;
use crate::device::service::ServiceStats;
use crate::open::Profiles;

/// What `tarblk mount --json` says.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Mounted {
    pub(super) device: PathBuf,
    pub(super) backend: String,
    /// Seconds until the device was there.
    pub(super) attach_seconds: f64,
}

/// A layer mounted by `tarblk mount`; unmounted when dropped.
#[derive(Debug)]
pub(super) struct TarblkMount<'a> {
    stage: &'a Stage<'a>,
    dir: PathBuf,
    /// Whether it is (or may be) still there.
    there: bool,
    pub(super) said: Mounted,
}

impl<'a> TarblkMount<'a> {
    /// Mounts the layer on the stage's mount point.
    pub(super) fn new(stage: &'a Stage<'a>, given: &MountArguments, cache: &Path) -> Result<Self, BenchError> {
        let dir = stage.mount_point()?;
        let mut command = stage.tarblk();
        command
            .arg("mount")
            .arg(&given.source)
            .arg(&dir)
            .arg("--cache")
            .arg(cache)
            .args(["--json", "--quiet"]);
        command.args(&stage.options.mount_options).args(&given.options);
        let mut ended = child::run(&mut command, stage.scratch(), stage.interrupt)?;
        let output = ended.output();
        let said = serde_json::from_str(&output).map_err(|e| BenchError::Output {
            program: ended.line.clone(),
            cause: format!("{e} in {output:?}"),
        });
        let mut mounted = Self {
            stage,
            dir,
            there: true,
            said: Mounted {
                device: PathBuf::new(),
                backend: String::new(),
                attach_seconds: 0.0,
            },
        };
        mounted.said = said?;
        Ok(mounted)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The device's counters now.
    pub(super) fn stats(&self) -> Result<ServiceStats, BenchError> {
        let mut command = self.stage.tarblk();
        command.arg("stats").arg(&self.said.device).arg("--json");
        let mut ended = child::run(&mut command, self.stage.scratch(), self.stage.interrupt)?;
        let output = ended.output();
        let counted: Result<Counted, _> = serde_json::from_str(&output);
        counted.map(|counted| counted.counters).map_err(|e| BenchError::Output {
            program: ended.line,
            cause: format!("{e} in {output:?}"),
        })
    }

    /// Unmounts it and waits until the device is gone.
    pub(super) fn unmount(mut self) -> Result<(), BenchError> {
        self.there = false;
        child::run(
            self.stage.tarblk().arg("umount").arg(&self.dir),
            self.stage.scratch(),
            self.stage.interrupt,
        )?;
        self.stage.wait_for_the_service_to_end();
        Ok(())
    }
}

impl Drop for TarblkMount<'_> {
    fn drop(&mut self) {
        if !self.there {
            return;
        }
        // No interrupt may stop the cleaning up after an interrupt. What is busy for a moment is tried again, and the last
        // try says on standard error what is left.
        for last in [false, false, false, true] {
            let mut command = self.stage.tarblk();
            command.arg("umount").arg(&self.dir).stdout(Stdio::null());
            if !last {
                command.stderr(Stdio::null());
            }
            if command.status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

/// What `mount` has mounted here; unmounted when dropped, with its loop device if it has one.
#[derive(Debug)]
pub(super) struct Unmount<'a>(pub(super) &'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-d")
            .arg(self.0)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

impl Stage<'_> {
    /// Starts the command once with a cache directory that stays, over an unlimited link, so that what a start reads is known.
    pub(super) fn learn_start(&mut self) -> Result<(), BenchError> {
        let link = self.options.source.link().unwrap_or_default();
        self.set_link(Link::default());
        self.drop_caches()?;
        let mounted = TarblkMount::new(self, &self.indexed, &self.learned_cache)?;
        let mounts = ChrootMounts::new(mounted.dir())?;
        self.run_command("the start that is recorded", mounted.dir())?;
        drop(mounts);
        mounted.unmount()?;
        self.set_link(link);
        Ok(())
    }

    /// Puts what is known of the start, and nothing else, into another cache directory.
    pub(super) fn take_profiles(&self, cache: &Path) -> Result<(), BenchError> {
        let (from, to) = (Profiles::dir(&self.learned_cache), Profiles::dir(cache));
        let copy = || -> std::io::Result<()> {
            std::fs::DirBuilder::new().mode(0o700).create(&to)?;
            for entry in std::fs::read_dir(&from)? {
                let entry = entry?;
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
            Ok(())
        };
        copy().map_err(BenchError::step(format!(
            "{}: cannot copy what was learned",
            from.display()
        )))
    }

    /// Reads the whole device once with a cache directory that stays, over an unlimited link.
    pub(super) fn fill_cache(&mut self) -> Result<(), BenchError> {
        let link = self.options.source.link().unwrap_or_default();
        self.set_link(Link::default());
        let mounted = TarblkMount::new(self, &self.unindexed, &self.full_cache)?;
        let device = mounted.said.device.clone();
        let mut file =
            File::open(&device).map_err(BenchError::step(format!("{}: cannot open it", device.display())))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            self.interrupt.check()?;
            if file
                .read(&mut buffer)
                .map_err(BenchError::step(format!("{}: cannot read it", device.display())))?
                == 0
            {
                break;
            }
        }
        drop(file);
        let backend = mounted.said.backend.clone();
        mounted.unmount()?;
        self.backend = backend;
        self.set_link(link);
        Ok(())
    }
}
