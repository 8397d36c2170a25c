//! The alternatives: what happens between nothing and the command's end, for each of them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::BenchError;
use super::child::{self, Running};
use super::outcome::{Phase, Run};
use super::root::Dressed;
use super::stage::Stage;

/// One way from nothing to the command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Row {
    /// tarblk with an index that comes over the same link, nothing cached.
    Empty,
    /// tarblk without an index: it reads the headers over the link first.
    Walk,
    /// tarblk with everything in its cache on disk.
    Full,
    /// Download everything and untar it onto the disk as it comes.
    Untar,
    /// Download the whole image to the disk and loop-mount it.
    Loop,
}

impl Row {
    /// What it is called in tables.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Empty => "tarblk, nothing cached",
            Self::Walk => "tarblk, nothing cached, no index",
            Self::Full => "tarblk, all cached",
            Self::Untar => "download and untar",
            Self::Loop => "download image and loop-mount",
        }
    }

    /// Whether it is one of tarblk's.
    #[must_use]
    pub const fn is_tarblk(self) -> bool {
        matches!(self, Self::Empty | Self::Walk | Self::Full)
    }
}

/// What `tarblk mount --json` says.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Mounted {
    pub(super) device: PathBuf,
    pub(super) backend: String,
    /// Seconds until the device was there.
    attach_seconds: f64,
}

/// What `tarblk stats --json` says, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
struct Counted {
    counters: Stats,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Stats {
    pub(super) device: DevicePart,
    pub(super) fetch: FetchPart,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct DevicePart {
    pub(super) reads: u64,
    pub(super) bytes: BytesPart,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct BytesPart {
    pub(super) memory: u64,
    pub(super) disk: u64,
    pub(super) fetched: u64,
}

impl BytesPart {
    /// Bytes of the layer, wherever they were.
    pub(super) const fn of_layer(&self) -> u64 {
        self.memory + self.disk + self.fetched
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct FetchPart {
    pub(super) requests: u64,
    pub(super) bytes_fetched: u64,
}

/// What `tarblk mount` is given: the source and options that go with it.
#[derive(Clone, Debug, Default)]
pub(super) struct Given {
    pub(super) source: String,
    pub(super) options: Vec<OsString>,
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
    pub(super) fn new(stage: &'a Stage<'a>, given: &Given, cache: &Path) -> Result<Self, BenchError> {
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
    pub(super) fn stats(&self) -> Result<Stats, BenchError> {
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
    /// One cold run of one alternative.
    pub(super) fn run(&self, row: Row) -> Result<Run, BenchError> {
        match row {
            Row::Empty => self.run_tarblk(row, &self.indexed, None),
            Row::Walk => self.run_tarblk(row, &self.unindexed, None),
            Row::Full => self.run_tarblk(row, &self.unindexed, Some(&self.full_cache)),
            Row::Untar => self.run_untar(),
            Row::Loop => self.run_loop(),
        }
    }

    fn run_tarblk(&self, row: Row, given: &Given, cache: Option<&Path>) -> Result<Run, BenchError> {
        let fresh = self.directory("cache")?;
        let cache = cache.unwrap_or_else(|| fresh.path());
        self.chill()?;
        let clock = self.clock();
        let mounted = TarblkMount::new(self, given, cache)?;
        let ready = clock.elapsed();
        let dressed = Dressed::new(mounted.dir())?;
        self.run_command(row.title(), mounted.dir())?;
        let total = clock.elapsed();
        let traffic = if let Some(traffic) = self.traffic(total) {
            traffic
        } else {
            let fetch = mounted.stats()?.fetch;
            Traffic {
                bytes: fetch.bytes_fetched,
                requests: fetch.requests,
                timeline: Vec::new(),
            }
        };
        drop(dressed);
        let attached = Duration::try_from_secs_f64(mounted.said.attach_seconds)
            .unwrap_or_default()
            .min(ready);
        mounted.unmount()?;
        Ok(Run::new(
            &[(Phase::Attach, attached), (Phase::Mount, ready), (Phase::Run, total)],
            traffic,
        ))
    }

    fn run_untar(&self) -> Result<Run, BenchError> {
        let (space, target) = (self.directory("root")?, self.mount_point()?);
        self.chill()?;
        let clock = self.clock();
        let unpacked = self.unpack(space.path(), &target, clock)?;
        let ready = clock.elapsed();
        let dressed = Dressed::new(&unpacked.root)?;
        self.run_command(Row::Untar.title(), &unpacked.root)?;
        let total = clock.elapsed();
        drop(dressed);
        let traffic = self.traffic(total).unwrap_or(Traffic {
            bytes: unpacked.bytes,
            requests: 1,
            timeline: Vec::new(),
        });
        Ok(Run::new(
            &[
                (Phase::Download, unpacked.downloaded),
                (Phase::Unpack, ready),
                (Phase::Run, total),
            ],
            traffic,
        ))
    }

    fn run_loop(&self) -> Result<Run, BenchError> {
        let space = self.directory("image")?;
        let dir = self.mount_point()?;
        let image = space.path().join("layer.ext4");
        let create =
            |path: &Path| File::create(path).map_err(BenchError::step(format!("{}: cannot create it", path.display())));
        self.chill()?;
        let clock = self.clock();
        let (bytes, downloaded) = if let Some(url) = &self.image_url {
            (self.download(url, &mut create(&image)?)?, clock.elapsed())
        } else {
            // Nobody serves the image of a layer on somebody else's server: it is made from the downloaded tar.
            let tar = space.path().join("layer.tar");
            let bytes = self.download(&self.unindexed.source, &mut create(&tar)?)?;
            let downloaded = clock.elapsed();
            let mut make = self.tarblk();
            make.arg("image")
                .arg(&tar)
                .arg("-o")
                .arg(&image)
                .args(["--no-cache", "--quiet"]);
            child::run(&mut make, self.scratch(), self.interrupt)?;
            (bytes, downloaded)
        };
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,ro", "-t", "ext4"]).arg(&image).arg(&dir);
        child::run(&mut mount, self.scratch(), self.interrupt)?;
        let mounted = Unmount(&dir);
        let ready = clock.elapsed();
        let dressed = Dressed::new(&dir)?;
        self.run_command(Row::Loop.title(), &dir)?;
        let total = clock.elapsed();
        drop(dressed);
        drop(mounted);
        let traffic = self.traffic(total).unwrap_or(Traffic {
            bytes,
            requests: 1,
            timeline: Vec::new(),
        });
        Ok(Run::new(
            &[
                (Phase::Download, downloaded),
                (Phase::Mount, ready),
                (Phase::Run, total),
            ],
            traffic,
        ))
    }

    /// Runs the measured command with `root` as its root directory; it must succeed. Returns how long it took.
    pub(super) fn run_command(&self, row: &str, root: &Path) -> Result<Duration, BenchError> {
        let mut command = Command::new("chroot");
        command
            .arg(root)
            .args(&self.options.command)
            .stdin(Stdio::null())
            .current_dir("/")
            .env_clear();
        command
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root");
        let began = Instant::now();
        let mut ended = Running::start(&mut command, self.scratch())?.wait(self.interrupt)?;
        if !ended.status.success() {
            let said = ended.complaint();
            return Err(BenchError::Command {
                row: row.into(),
                status: ended.status.to_string(),
                said,
            });
        }
        Ok(ended.at - began)
    }

    /// Streams `url` into `to`; returns how many bytes came. A pipe whose reader has seen enough ends it well: tar stops
    /// reading behind the marked end, and how tar ended says whether it was content.
    pub(super) fn download(&self, url: &str, to: &mut dyn Write) -> Result<u64, BenchError> {
        let failed = |cause: String| BenchError::Download { url: url.into(), cause };
        let answer = self
            .client
            .get(url)
            .send()
            .and_then(reqwest::blocking::Response::error_for_status);
        let mut body = answer.map_err(|e| failed(e.without_url().to_string()))?;
        let mut buffer = vec![0; 256 * 1024];
        let mut total = 0;
        loop {
            self.interrupt.check()?;
            let n = body.read(&mut buffer).map_err(|e| failed(e.to_string()))?;
            if n == 0 {
                return Ok(total);
            }
            to.write_all(&buffer[..n])
                .map_err(|e| failed(format!("cannot write it down: {e}")))?;
            total += u64::try_from(n).unwrap_or(u64::MAX);
        }
    }
}

/// What went over the link during a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes: u64,
    pub(super) requests: u64,
    /// Seconds since the clock started, bytes by then.
    pub(super) timeline: Vec<(f64, u64)>,
}
