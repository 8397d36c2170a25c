//! The cold-start benchmark. In: a layer or an image, a link and a command. Out: how long the command takes from nothing, here and by
//! the usual ways, as figures and a report.
//!
//! Everything measured runs as processes of its own: tarblk as the command a person would type, tar, mount, chroot. Only the
//! origin, the downloads and the clock are in this process. [`origin`] is also what tests and benchmarks of other rooms
//! run against. This room measures and must not help: no run may profit from what an earlier one left in a cache, and
//! nothing may be left behind, whatever happens.

mod alternative;
mod child;
mod image;
mod mounted;
pub mod origin;
mod outcome;
mod pull;
mod report;
mod root;
mod rows;
mod stage;
mod unpack;
mod whiteouts;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use crate::http;
use crate::interrupt::{Interrupt, Interrupted};
use crate::source::registry::{LayoutName, Reference, RegistryOptions};
use origin::Link;

pub use alternative::Row;
pub use outcome::{Machine, Outcome, Phase, RowOutcome, Run, Touched};
pub use report::html;
pub use root::ChrootMounts;

/// What is measured.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// The `tarblk` to measure.
    pub program: PathBuf,
    /// The layer or image.
    pub source: BenchSource,
    /// The alternatives, each at most once, in the order of the results.
    pub rows: Vec<Row>,
    /// How often each of them runs.
    pub runs: u32,
    /// Options for `tarblk mount`, as typed: back end, memory, connections.
    pub mount_options: Vec<OsString>,
    /// How far apart entry points of the indexes that are made lie, in bytes of the tar, if not as far as is usual.
    pub spacing: Option<u64>,
    /// A directory for downloads, caches and mount points; a directory of this run's own is made in it and removed.
    pub scratch: PathBuf,
    /// What runs in the layer, with its arguments; never empty.
    pub command: Vec<OsString>,
}

/// Where the measured layer comes from.
#[derive(Clone, Debug)]
pub enum BenchSource {
    /// A local tar, served over a simulated link.
    Local {
        /// The tar.
        path: PathBuf,
        /// The link.
        link: Link,
    },
    /// An image in a layout, served as a registry serves it, over a simulated link.
    Image {
        /// The image.
        layout: LayoutName,
        /// The link.
        link: Link,
    },
    /// An image in a registry, brought here before anything is measured and then served as a registry serves it, over a simulated
    /// link.
    Registry {
        /// The image.
        reference: Reference,
        /// How the registry is talked to.
        options: Box<RegistryOptions>,
        /// The link.
        link: Link,
    },
    /// A tar on a server, over whatever link there is.
    Url {
        /// The tar.
        url: String,
        /// Its index, as a path or a URL; made before the clock starts when not given.
        index: Option<String>,
    },
}

impl BenchSource {
    /// The simulated link, if there is one.
    const fn link(&self) -> Option<Link> {
        match self {
            Self::Local { link, .. } | Self::Image { link, .. } | Self::Registry { link, .. } => Some(*link),
            Self::Url { .. } => None,
        }
    }
}

/// Told what is going on, for a person who waits.
pub trait Watch {
    /// The benchmark now does this. `done` of `all` runs are behind it.
    fn step(&mut self, what: &str, done: u32, all: u32);
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Mounting, dropping caches and chroot(2) are root's.
    #[error("the benchmark mounts filesystems and drops page caches: run it as root")]
    NotRoot,
    /// Something this process did itself.
    #[error("{what}: {cause}")]
    Step {
        /// What was tried, with its object.
        what: String,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
    /// A download broke.
    #[error("cannot download {url}: {source}")]
    Download {
        /// What was downloaded.
        url: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program that the benchmark needs cannot be started.
    #[error("cannot run `{program}`: {cause}; install it, or leave out what needs it (--without)")]
    NoProgram {
        /// Its name.
        program: String,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
    /// A program that the benchmark needs failed.
    #[error("`{program}` failed ({status}): {said}")]
    Program {
        /// The command line.
        program: String,
        /// Exit code or signal.
        status: String,
        /// The end of what it said on standard error.
        said: String,
    },
    /// The measured command failed.
    #[error("the measured command failed in `{row}` ({status}): {said}")]
    Command {
        /// The alternative it failed in.
        row: String,
        /// Exit code or signal.
        status: String,
        /// The end of what it said on standard error.
        said: String,
    },
    /// `tarblk` said something that is not understood.
    #[error("`{program}` printed something unexpected: {cause}")]
    Output {
        /// The command line.
        program: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Ctrl-C, or another signal that asks for the end.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

impl From<http::Error> for BenchError {
    fn from(error: http::Error) -> Self {
        Self::step("cannot wait for a download")(io::Error::other(error))
    }
}

impl BenchError {
    /// For `map_err`: names what was tried.
    fn step(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |cause| Self::Step { what, cause }
    }
}

/// Runs the whole benchmark. Needs root.
///
/// # Errors
/// The first thing that failed; everything that was set up is taken down again, also then.
pub fn run(options: &BenchOptions, interrupt: &Interrupt, watch: &mut dyn Watch) -> Result<Outcome, BenchError> {
    if !rustix::process::geteuid().is_root() {
        return Err(BenchError::NotRoot);
    }
    let mut stage = stage::Stage::set(options, interrupt, watch)?;
    watch.step("filling a cache", 0, 0);
    stage.fill_cache()?;
    if options.rows.contains(&Row::Learned) {
        watch.step("recording a start", 0, 0);
        stage.learn_start()?;
    }
    let all = u32::try_from(options.rows.len())
        .unwrap_or(u32::MAX)
        .saturating_mul(options.runs);
    let mut results: Vec<Vec<Run>> = vec![Vec::new(); options.rows.len()];
    let mut done = 0;
    for _ in 0..options.runs {
        for (row, runs) in options.rows.iter().zip(&mut results) {
            watch.step(row.title(), done, all);
            runs.push(stage.run(*row)?);
            done += 1;
        }
    }
    watch.step("counting what the command touched", done, all);
    let (touched, local) = stage.touched()?;
    let rows = options
        .rows
        .iter()
        .zip(results)
        .map(|(row, runs)| RowOutcome { row: *row, runs })
        .collect();
    Ok(Outcome::new(&stage, rows, touched, local))
}
