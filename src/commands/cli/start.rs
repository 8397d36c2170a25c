//! What can be typed of `tarblk trace` and `tarblk profile`: what starts read, and what is learned from it.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::{LayerArgs, RegistryArgs};

/// Arguments of `tarblk trace`.
#[derive(Debug, Args)]
#[command(
    after_help = "What is read is recorded from a device's first read on, until nothing was read for 3 s (after the first MiB), or for 5
minutes, a GiB or 65,536 reads. Of filesystem metadata nothing is: it is computed.

A read at hand came from memory: it was fetched ahead, or read before. One from the disk came from the disk cache or a local layer. One
from the origin waited for the layer's server; from a peer, for what another device of this machine had asked for already.

Examples:
  tarblk trace /mnt
  tarblk trace --last --report start.html
  tarblk trace /mnt --json | jq -c '.files[] | [.waited_us, .path]' | sort -V"
)]
pub struct TraceArgs {
    /// The device, as `attach` printed it, or where it is mounted.
    #[arg(value_name = "DEVICE|MOUNTPOINT", value_hint = ValueHint::AnyPath, required_unless_present = "last", conflicts_with = "last")]
    pub device: Option<PathBuf>,
    /// The last start that there was, also of a device that is gone.
    #[arg(long)]
    pub last: bool,
    /// Draw it, as one page that needs nothing from outside: files down, time to the right, coloured by where the bytes were.
    #[arg(long, value_name = "FILE.html", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
    /// Where the last start is kept, for `--last` [default: the environment's `TARBLK_CACHE`, else /var/cache/tarblk, or ~/.cache/tarblk
    /// for users].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "last")]
    pub cache: Option<PathBuf>,
    /// All files; else those that were waited for the longest, where there are many.
    #[arg(long)]
    pub all: bool,
    /// All files and all reads as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tarblk profile`.
#[derive(Debug, Args)]
#[command(
    subcommand_value_name = "ACTION",
    disable_help_subcommand = true,
    after_help = "Every start of an image is recorded (`tarblk trace` shows it), and what most of the last starts read is fetched ahead of the
next one's reader, in the order in which it was read. Nothing has to be done for that. What is learned is kept in the cache directory, by
image and by layer, so that other images with the same layers gain as well.

A profile only orders fetches. Nobody believes it for content, so it needs no signature, and one that does not fit costs little: where
less than a quarter of what is read is in it, it is not followed.

Examples:
  tarblk profile show docker://registry.example.org/team/app:1.2
  tarblk profile push docker://registry.example.org/team/app:1.2
  tarblk profile rm --all"
)]
pub struct ProfileArgs {
    /// What is to be done.
    #[command(subcommand)]
    pub action: ProfileAction,
}

/// What can be done with profiles.
#[derive(Debug, Subcommand)]
pub enum ProfileAction {
    /// Show what is known of how an image or a layer starts.
    Show(ProfileShowArgs),
    /// Forget what is known, of an image and each of its layers, or of everything.
    Rm(ProfileRmArgs),
    /// Publish what starts of an image on this machine read, beside it, for everybody who mounts it.
    Push(ProfileCopyArgs),
    /// Bring what is published of how an image starts; mounting it does that as well.
    Pull(ProfileCopyArgs),
}

/// Arguments of `tarblk profile show`.
#[derive(Debug, Args)]
pub struct ProfileShowArgs {
    /// The image or layer, as it is mounted.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// List the files of which something is fetched ahead, in order.
    #[arg(long)]
    pub files: bool,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tarblk profile rm`.
#[derive(Debug, Args)]
pub struct ProfileRmArgs {
    /// The image or layer, as it is mounted.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath, required_unless_present = "all", conflicts_with = "all")]
    pub source: Option<String>,
    /// Of all images and layers.
    #[arg(long)]
    pub all: bool,
    /// Where profiles are kept [default: the environment's `TARBLK_CACHE`, else /var/cache/tarblk, or ~/.cache/tarblk for users].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub cache: Option<PathBuf>,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk profile push` and `tarblk profile pull`.
#[derive(Debug, Args)]
pub struct ProfileCopyArgs {
    /// The image, `docker://host/repository:tag`.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// What was done as JSON.
    #[arg(long)]
    pub json: bool,
}
