//! What can be typed of `tarblk cache`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use crate::quantity::parse_size;

/// Arguments of `tarblk cache`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "LAYER is an image or a URL as `mount` takes it (whose meaning is remembered: no server is asked), a layer's digest, or the
name of its files in the cache; of these two the beginning is enough.

Attached devices may use the cache meanwhile. Layers that they have open can be listed, checked and pinned; what is kept of them
is theirs to give up, which they do by themselves when room is needed.

Examples:
  tarblk cache ls
  tarblk cache pin docker://registry.example.org/team/app:1.2
  tarblk cache gc --to 2GiB
  tarblk cache ls --json | jq -r '.[] | select(.pinned).name'"
)]
pub struct CacheArgs {
    /// The cache directory [default: the environment's `TARBLK_CACHE`, else /var/cache/tarblk, or ~/.cache/tarblk for users].
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub cache: Option<PathBuf>,
    /// What is done and found, as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What is to be done.
    #[command(subcommand)]
    pub action: CacheAction,
}

/// What can be done with the cache.
#[derive(Debug, Subcommand)]
pub enum CacheAction {
    /// List the layers of which something is kept, the last used first.
    #[command(visible_alias = "list")]
    Ls,
    /// Tell how much of the disk the cache takes, and for what.
    Du,
    /// Read what is kept and compare it with its checksums; what is damaged is forgotten, and fetched again when it is wanted.
    #[command(after_help = "The exit status is 1 if something was damaged, whether it could be forgotten or not.")]
    Verify {
        /// Only these layers.
        #[arg(value_name = "LAYER", value_hint = ValueHint::Other)]
        layers: Vec<String>,
    },
    /// Give up what was unused longest until the cache is as small as it has to be, and what killed processes left.
    Gc {
        /// Disk space that all that is kept may take afterwards [default: a tenth of the disk]. What is pinned or in use stays.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        to: Option<u64>,
    },
    /// Keep layers from being given up, whatever else is wanted.
    Pin(CacheLayers),
    /// Let pinned layers be given up again.
    Unpin(CacheLayers),
    /// Remove all that is kept of layers; pinned ones, and those in use, are refused.
    #[command(visible_alias = "remove")]
    Rm {
        /// The layers.
        #[arg(value_name = "LAYER", value_hint = ValueHint::Other, required_unless_present = "all", conflicts_with = "all")]
        layers: Vec<String>,
        /// All layers that are neither pinned nor in use, and all indexes, manifests and names.
        #[arg(long)]
        all: bool,
    },
}

/// Layers of the cache.
#[derive(Debug, Args)]
pub struct CacheLayers {
    /// The layers: images, URLs, digests or names of files in the cache.
    #[arg(value_name = "LAYER", value_hint = ValueHint::Other, required = true)]
    pub layers: Vec<String>,
}
