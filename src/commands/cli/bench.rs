//! What can be typed of `tarblk bench` and `tarblk demo`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::{DeviceArgs, RegistryArgs};
use crate::quantity::{parse_rate, parse_size, parse_time};

/// A way to get from nothing to the command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum RowArg {
    /// tarblk with a ready index, nothing cached.
    Empty,
    /// The same where a start of it was recorded before: nothing else is kept.
    Learned,
    /// tarblk without an index: the headers are read over the link first.
    Walk,
    /// tarblk with everything cached.
    Full,
    /// Download everything and untar.
    Untar,
    /// Download everything and loop-mount the whole image.
    Loop,
}

/// Arguments of `tarblk bench`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:
  tarblk bench layer.tar --rtt 20ms --rate 200mbit --report report.html \\
      -- python3 -c 'import numpy'",
    after_long_help = "Runs COMMAND with the layer as its root directory (chroot; /dev has null, zero, full, random, urandom and tty,
/proc is mounted), each time from a cold cache: page cache dropped, a process of its own, nothing kept. A run's clock
starts with nothing and stops when COMMAND has ended; COMMAND must exit with 0. The runs are interleaved.

An image (oci:DIR[:TAG]) is served as by a registry, over the same kind of link, and mounted by its name there: with
indexes published beside it, and, for `--with walk`, without. Download and untar then means all blobs at the same time,
each into a tar of its own as it comes, and overlayfs over the layers' directories.

The floor is what no system of this kind can beat: the bytes COMMAND touched, as short as they travel (those of a compressed
layer at the ratio of the whole layer), over the rate, two round trips, and the time COMMAND takes when everything is in
memory.

Example:
  tarblk bench layer.tar --rtt 20ms --rate 200mbit --report report.html \\
      -- python3 -c 'import numpy'"
)]
pub struct BenchArgs {
    /// A layer, plain or compressed with gzip or zstd: a path or a `file://` URL, served from an origin of its own over a
    /// simulated link; or an `http(s)://` URL, used as it is. Or an image, in a directory, `oci:DIR[:TAG|@DIGEST]`, or in a registry,
    /// `docker://HOST/NAME[:TAG|@DIGEST]`, from where it is brought first: both are served here as a registry serves them.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: String,
    /// How far apart the places lie from which a compressed layer of a local SOURCE can be decoded by its index, in bytes of the tar
    /// [default: as `tarblk index`].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub spacing: Option<u64>,
    /// The simulated link's round trip, for a local SOURCE.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub rtt: Option<Duration>,
    /// The simulated link's rate, for a local SOURCE, e.g. 200mbit [default: unlimited].
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub rate: Option<u64>,
    /// How often each alternative runs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), default_value = "3")]
    pub runs: u32,
    /// The index to use with a URL, as a path or a URL; made beforehand if not given.
    #[arg(long, value_name = "FILE|URL", value_hint = ValueHint::FilePath)]
    pub index: Option<String>,
    /// Measure this too.
    #[arg(long, value_name = "ROW", value_enum, value_delimiter = ',')]
    pub with: Vec<RowArg>,
    /// Leave this out.
    #[arg(long, value_name = "ROW", value_enum, value_delimiter = ',')]
    pub without: Vec<RowArg>,
    /// The device of the tarblk runs.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The registry from which an image is brought.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// The results as JSON.
    #[arg(long)]
    pub json: bool,
    /// Write a report with charts: one HTML file.
    #[arg(long, value_name = "FILE.html", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
    /// Where downloads, caches and extracted files of the runs are put; removed afterwards [default: $TMPDIR].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub scratch: Option<PathBuf>,
    /// The command to run in the layer, with its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// Arguments of `tarblk demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where the report goes [default: tarblk-demo.html in the current directory].
    #[arg(long, value_name = "FILE.html", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
}
