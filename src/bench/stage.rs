//! What a benchmark needs around it: an origin, an index, an image, a filled cache, a scratch directory, cold caches.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use super::alternative::{Row, Traffic};
use super::child;
use super::origin::{Link, Origin};
use super::pull::pull;
use super::whiteouts::Whiteouts;
use super::{BenchError, BenchOptions, BenchSource, Watch};
use crate::http::{HttpOptions, without_secrets};
use crate::index::Index;
use crate::interrupt::Interrupt;
use crate::layer::Coding;
use crate::open::load_index;

/// A served file is kept in memory if it takes at most one in this many bytes of what is available.
const MEMORY_SHARE: u64 = 4;

/// Everything that is set up before the first clock starts, and taken down after the last run.
pub(super) struct Stage<'a> {
    pub(super) options: &'a BenchOptions,
    pub(super) interrupt: &'a Interrupt,
    /// What tarblk is given where there is an index: over the same link if there is one.
    pub(super) indexed: MountArguments,
    /// The same without an index.
    pub(super) unindexed: MountArguments,
    /// What there is to download, the lowest first.
    pub(super) layers: Vec<Layer>,
    /// The whole image, where the origin is our own.
    pub(super) image_url: Option<String>,
    /// A cache directory with the whole layer in it, if a row needs one.
    pub(super) full_cache: PathBuf,
    /// A cache directory with the profile of a start in it, if a row needs one.
    pub(super) learned_cache: PathBuf,
    /// The length of all blobs in bytes.
    pub(super) layer_bytes: u64,
    pub(super) client: reqwest::Client,
    /// Which back end tarblk took.
    pub(super) backend: String,
    origin: Option<Origin>,
    /// Served from disk because they are big: read before each run, so that the origin's disk is not measured.
    warm: Vec<PathBuf>,
    scratch: tempfile::TempDir,
}

/// What `tarblk mount` is given: the source and options that go with it.
#[derive(Clone, Debug, Default)]
pub(super) struct MountArguments {
    pub(super) source: String,
    pub(super) options: Vec<OsString>,
}

/// A layer to download.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) url: String,
    /// The lengths of its blob and of the tar in it.
    pub(super) blob_bytes: u64,
    pub(super) tar_bytes: u64,
    /// The option with which tar undoes its compression, if it has one.
    pub(super) decompress: Option<&'static str>,
    /// What it hides of others; none of a tar that is no image's layer, in which whiteouts are files.
    pub(super) whiteouts: Option<Whiteouts>,
}

impl fmt::Debug for Stage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage")
            .field("source", &self.unindexed.source)
            .field("scratch", &self.scratch)
            .finish_non_exhaustive()
    }
}

impl<'a> Stage<'a> {
    /// Sets everything up.
    pub(super) fn set(
        options: &'a BenchOptions,
        interrupt: &'a Interrupt,
        watch: &mut dyn Watch,
    ) -> Result<Self, BenchError> {
        let scratch = tempfile::Builder::new()
            .prefix("tarblk-bench-")
            .tempdir_in(&options.scratch)
            .map_err(BenchError::step(format!(
                "{}: cannot make a directory in it",
                options.scratch.display()
            )))?;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .no_proxy()
            .build()
            .map_err(|e| BenchError::Download {
                url: "anything".into(),
                source: e.into(),
            })?;
        let full_cache = scratch.path().join("full");
        let learned_cache = scratch.path().join("started");
        let mut stage = Self {
            options,
            interrupt,
            indexed: MountArguments::default(),
            unindexed: MountArguments::default(),
            layers: Vec::new(),
            image_url: None,
            full_cache,
            learned_cache,
            layer_bytes: 0,
            client,
            backend: String::new(),
            origin: None,
            warm: Vec::new(),
            scratch,
        };
        match &options.source {
            BenchSource::Local { path, .. } => stage.set_origin(path, watch)?,
            BenchSource::Image { layout, .. } => stage.set_registry(layout, watch)?,
            BenchSource::Registry {
                reference,
                options: registry,
                ..
            } => {
                let dir = stage.scratch().join("image");
                let layout = pull(reference, registry, &dir, interrupt, watch)?;
                stage.set_registry(&layout, watch)?;
            }
            BenchSource::Url { url, index } => stage.use_url(url, index.as_deref(), watch)?,
        }
        Ok(stage)
    }

    /// Serves a local layer, its index and its image.
    fn set_origin(&mut self, layer: &Path, watch: &mut dyn Watch) -> Result<(), BenchError> {
        let origin = Origin::start().map_err(BenchError::step("cannot start an HTTP origin on loopback"))?;
        let index = self.scratch().join("layer.tarblk");
        watch.step("reading the headers", 0, 0);
        self.index(layer.as_ref(), &index, false)?;
        self.serve(&origin, "/layer.tar", layer)?;
        self.serve(&origin, "/layer.tar.tarblk", &index)?;
        self.serve_merged(&origin, layer.as_ref(), watch)?;
        self.layer_bytes = fs::metadata(layer)
            .map_err(BenchError::step(format!("{}: cannot read it", layer.display())))?
            .len();
        self.set_layer(&origin.url("/layer.tar"), origin.url("/layer.tar.tarblk").into())?;
        self.begin(origin);
        Ok(())
    }

    /// Has an index of a layer written, with all that one can hold if it is to be `full`.
    pub(super) fn index(&self, layer: &OsStr, to: &Path, full: bool) -> Result<(), BenchError> {
        let mut make = self.tarblk();
        make.arg("index").arg(layer).arg("-o").arg(to).arg("--quiet");
        if full {
            make.arg("--full");
        }
        if let Some(spacing) = self.options.spacing {
            make.arg("--spacing").arg(spacing.to_string());
        }
        child::run(&mut make, self.scratch(), self.interrupt)?;
        Ok(())
    }

    /// Writes the filesystem of `source` and serves it, if a row downloads it.
    pub(super) fn serve_merged(
        &mut self,
        origin: &Origin,
        source: &OsStr,
        watch: &mut dyn Watch,
    ) -> Result<(), BenchError> {
        if !self.options.rows.contains(&Row::Loop) {
            return Ok(());
        }
        watch.step("writing the whole image", 0, 0);
        let image = self.scratch().join("layer.ext4");
        let mut make = self.tarblk();
        make.arg("image")
            .arg(source)
            .arg("-o")
            .arg(&image)
            .args(["--no-cache", "--quiet"]);
        child::run(&mut make, self.scratch(), self.interrupt)?;
        self.serve(origin, "/layer.ext4", &image)?;
        self.image_url = Some(origin.url("/layer.ext4"));
        Ok(())
    }

    /// Serves a file: from memory, or else from a disk that is warm before each run.
    pub(super) fn serve(&mut self, origin: &Origin, path: &str, file: &Path) -> Result<(), BenchError> {
        let failed = || BenchError::step(format!("{}: cannot serve it", file.display()));
        if let Some(copy) = in_memory(file).map_err(failed())? {
            origin.serve_open_file(path, copy).map_err(failed())
        } else {
            self.warm.push(file.to_owned());
            origin.serve_file(path, file).map_err(failed())
        }
    }

    /// Everything is served: from now on over the link.
    pub(super) fn begin(&mut self, origin: Origin) {
        origin.set_link(self.options.source.link().unwrap_or_default());
        self.origin = Some(origin);
    }

    /// There is one layer, at `url`, and its index at `index`.
    fn set_layer(&mut self, url: &str, index: OsString) -> Result<(), BenchError> {
        let given = |options| MountArguments {
            source: url.into(),
            options,
        };
        let name = index.to_string_lossy();
        let failed = || BenchError::step(format!("{}: cannot read it", without_secrets(&name)));
        let bytes = load_index(&name, &HttpOptions::default()).map_err(|error| failed()(io::Error::other(error)))?;
        let read = Index::open(bytes).map_err(|error| failed()(io::Error::other(error)))?;
        self.layers.push(Layer {
            url: url.into(),
            blob_bytes: read.identity().blob_len,
            tar_bytes: read.summary().tar_bytes,
            decompress: tar_option(read.identity().coding),
            whiteouts: None,
        });
        self.unindexed = given(Vec::new());
        self.indexed = given(vec!["--index".into(), index]);
        Ok(())
    }

    /// Takes a layer from a server that is not this benchmark's.
    fn use_url(&mut self, url: &str, index: Option<&str>, watch: &mut dyn Watch) -> Result<(), BenchError> {
        let index = if let Some(index) = index {
            index.into()
        } else {
            watch.step("reading the headers", 0, 0);
            let index = self.scratch().join("layer.tarblk");
            self.index(url.as_ref(), &index, false)?;
            index.into()
        };
        self.set_layer(url, index)
    }

    pub(super) fn set_link(&self, link: Link) {
        if let Some(origin) = &self.origin {
            origin.set_link(link);
        }
    }

    /// The tarblk to measure, with nothing of this process's own settings, and with a service of its own that ends with its last
    /// device.
    pub(super) fn tarblk(&self) -> Command {
        let mut command = Command::new(&self.options.program);
        command
            .env_remove("TARBLK_CACHE")
            .env("TARBLK_STATE_DIR", self.states())
            .env("TARBLK_SERVICE_IDLE", "0");
        command
    }

    /// Where that service keeps its state.
    fn states(&self) -> PathBuf {
        self.scratch().join("states")
    }

    /// Waits until that service has ended, so that the next run begins with a new one.
    pub(super) fn wait_for_the_service_to_end(&self) {
        const LIMIT: Duration = Duration::from_secs(5);
        let began = Instant::now();
        let is_there = || fs::read_dir(self.states()).is_ok_and(|mut files| files.next().is_some());
        while is_there() && began.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A fresh directory that is removed when it is dropped.
    pub(super) fn directory(&self, name: &str) -> Result<tempfile::TempDir, BenchError> {
        tempfile::Builder::new()
            .prefix(name)
            .tempdir_in(self.scratch())
            .map_err(BenchError::step(format!(
                "{}: cannot make a directory in it",
                self.scratch().display()
            )))
    }

    /// The empty directory that layers are mounted on.
    pub(super) fn mount_point(&self) -> Result<PathBuf, BenchError> {
        let dir = self.scratch().join("mnt");
        fs::create_dir_all(&dir).map_err(BenchError::step(format!("{}: cannot make it", dir.display())))?;
        Ok(dir)
    }

    /// Makes the machine cold: nothing dirty, nothing cached, except what the origin serves and the programs the usual ways
    /// need (a machine that starts containers has tar at hand).
    pub(super) fn drop_caches(&self) -> Result<(), BenchError> {
        self.interrupt.check()?;
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").map_err(BenchError::step("cannot drop page caches"))?;
        for file in &self.warm {
            let mut file = File::open(file).map_err(BenchError::step(format!("{}: cannot read it", file.display())))?;
            io::copy(&mut file, &mut io::sink()).map_err(BenchError::step("cannot read what the origin serves"))?;
        }
        for program in ["tar", "chroot", "mount"] {
            // A missing one is told when it is needed.
            let _ = Command::new(program)
                .arg("--version")
                .stdout(std::process::Stdio::null())
                .status();
        }
        let _ = self
            .tarblk()
            .arg("--version")
            .stdout(std::process::Stdio::null())
            .status();
        Ok(())
    }

    /// Starts the clock of a run, and the origin's log with it.
    pub(super) fn clock(&self) -> Instant {
        if let Some(origin) = &self.origin {
            let _ = origin.take_log();
        }
        Instant::now()
    }

    /// What the origin has sent in the `total` since the clock started; None where the layer comes from another server.
    pub(super) fn traffic(&self, total: Duration) -> Option<Traffic> {
        let log = self.origin.as_ref()?.log();
        let timeline: Vec<_> = log
            .timeline
            .iter()
            .filter(|(at, _)| *at <= total)
            .map(|(at, bytes)| (at.as_secs_f64(), *bytes))
            .collect();
        let bytes = timeline.last().map_or(0, |point| point.1);
        Some(Traffic {
            bytes,
            requests: log.arrived,
            timeline,
        })
    }
}

/// The option with which tar undoes a compression.
pub(super) const fn tar_option(coding: Coding) -> Option<&'static str> {
    match coding {
        Coding::Plain => None,
        Coding::Gzip => Some("--gzip"),
        Coding::Zstd => Some("--zstd"),
    }
}

/// A copy of a file in memory that dropping page caches does not touch; None if it is too big for that.
fn in_memory(path: &Path) -> io::Result<Option<File>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let available = fs::read_to_string("/proc/meminfo")?
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .unwrap_or(0);
    if len > available.saturating_mul(1024) / MEMORY_SHARE {
        return Ok(None);
    }
    let mut copy = File::from(memfd_create("tarblk-origin", MemfdFlags::CLOEXEC)?);
    io::copy(&mut file, &mut copy)?;
    Ok(Some(copy))
}
