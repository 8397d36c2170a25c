//! The alternatives: one cold run of each, from nothing to the command's end, and the run that counts what is touched.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::BenchError;
use super::alternative::{Row, Traffic};
use super::child::{self, Running};
use super::mounted::{TarblkMount, Unmount};
use super::origin::Link;
use super::outcome::{Phase, Run, Touched};
use super::root::ChrootMounts;
use super::stage::{MountArguments, Stage};
use crate::http::runtime;

/// So many pieces of a download, as they come from the socket, may wait to be written.
const PIECES_AHEAD: usize = 16;

impl Stage<'_> {
    /// One cold run of one alternative.
    pub(super) fn run(&self, row: Row) -> Result<Run, BenchError> {
        match row {
            Row::Empty => self.run_tarblk(row, &self.indexed, None),
            Row::Learned => {
                let cache = self.directory("learned")?;
                self.take_profiles(cache.path())?;
                self.run_tarblk(row, &self.indexed, Some(cache.path()))
            }
            Row::Walk => self.run_tarblk(row, &self.unindexed, None),
            Row::Full => self.run_tarblk(row, &self.unindexed, Some(&self.full_cache)),
            Row::Untar => self.run_untar(),
            Row::Loop => self.run_loop(),
        }
    }

    fn run_tarblk(&self, row: Row, given: &MountArguments, cache: Option<&Path>) -> Result<Run, BenchError> {
        let fresh = self.directory("cache")?;
        let cache = cache.unwrap_or_else(|| fresh.path());
        self.drop_caches()?;
        let clock = self.clock();
        let mounted = TarblkMount::new(self, given, cache)?;
        let ready = clock.elapsed();
        let mounts = ChrootMounts::new(mounted.dir())?;
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
        drop(mounts);
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
        self.drop_caches()?;
        let clock = self.clock();
        let unpacked = self.unpack(space.path(), &target, clock)?;
        let ready = clock.elapsed();
        let mounts = ChrootMounts::new(&unpacked.root)?;
        self.run_command(Row::Untar.title(), &unpacked.root)?;
        let total = clock.elapsed();
        drop(mounts);
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
        self.drop_caches()?;
        let clock = self.clock();
        let (bytes, downloaded) = if let Some(url) = &self.image_url {
            (self.download(url, &mut create(&image)?)?, clock.elapsed())
        } else {
            // Another server has no image of its layer: it is made from the downloaded tar.
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
        let mounts = ChrootMounts::new(&dir)?;
        self.run_command(Row::Loop.title(), &dir)?;
        let total = clock.elapsed();
        drop(mounts);
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

    /// What the command touches, and how long it takes with everything in memory.
    ///
    /// Touched are the layer's bytes that the kernel reads from the device when it starts with an empty page cache and reads
    /// nothing ahead; a page that it has once it does not read again.
    pub(super) fn touched(&self) -> Result<(Touched, Vec<Duration>), BenchError> {
        self.set_link(Link::default());
        self.drop_caches()?;
        let mounted = TarblkMount::new(self, &self.unindexed, &self.full_cache)?;
        no_read_ahead(&mounted.said.device)?;
        let mounts = ChrootMounts::new(mounted.dir())?;
        let before = mounted.stats()?;
        self.run_command("the counting run", mounted.dir())?;
        let after = mounted.stats()?;
        let bytes = after.device.bytes.of_layers() - before.device.bytes.of_layers();
        let reads = after.device.reads - before.device.reads;
        drop(mounts);
        let mut local = Vec::new();
        for _ in 0..self.options.runs.max(3) {
            // What the run before has left in /tmp is not there.
            let mounts = ChrootMounts::new(mounted.dir())?;
            local.push(self.run_command("the warm run", mounted.dir())?);
            drop(mounts);
        }
        mounted.unmount()?;
        let (blobs, tars) = self.layers.iter().fold((0, 0), |(blobs, tars), layer| {
            (blobs + layer.blob_bytes, tars + layer.tar_bytes)
        });
        let link_bytes = at_ratio(bytes, blobs, tars);
        Ok((
            Touched {
                bytes,
                link_bytes,
                reads,
            },
            local,
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
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BenchError::Download {
            url: url.into(),
            source,
        };
        let (client, address) = (self.client.clone(), url.to_owned());
        let (tell, mut told) = mpsc::channel(PIECES_AHEAD);
        // On the network thread, where connections are: a client has one back before the next download begins.
        runtime::spawn(async move {
            let pieces = async {
                let mut answer = client.get(address).send().await?.error_for_status()?;
                while let Some(piece) = answer.chunk().await? {
                    if tell.send(Ok(piece)).await.is_err() {
                        break;
                    }
                }
                reqwest::Result::Ok(())
            };
            if let Err(error) = pieces.await {
                // It is heard, unless the download was given up.
                let _ = tell.send(Err(error.without_url())).await;
            }
        })?;
        let mut total = 0;
        while let Some(piece) = told.blocking_recv() {
            self.interrupt.check()?;
            let piece = piece.map_err(|e| failed(e.into()))?;
            to.write_all(&piece)
                .map_err(|e| failed(format!("cannot write it down: {e}").into()))?;
            total += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        }
        Ok(total)
    }
}

/// Switches a block device's read-ahead off, for files opened from now on.
fn no_read_ahead(device: &Path) -> Result<(), BenchError> {
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let path = PathBuf::from(format!("/sys/block/{name}/queue/read_ahead_kb"));
    fs::write(&path, "0").map_err(BenchError::step(format!(
        "{}: cannot switch read-ahead off",
        path.display()
    )))
}

/// Bytes of tar as they travel, at the ratio at which `blobs` bytes carry `tars` bytes.
fn at_ratio(bytes: u64, blobs: u64, tars: u64) -> u64 {
    let scaled = (u128::from(bytes) * u128::from(blobs)).checked_div(u128::from(tars));
    scaled.and_then(|scaled| u64::try_from(scaled).ok()).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_travels_shorter() {
        assert_eq!(at_ratio(300, 1000, 1000), 300);
        assert_eq!(at_ratio(300, 1000, 3000), 100);
        assert_eq!(at_ratio(u64::MAX, 1 << 40, 1 << 41), u64::MAX / 2);
        assert_eq!(at_ratio(300, 0, 0), 300);
    }
}
