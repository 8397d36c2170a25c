//! What can be typed of `tarblk podman`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::{DeviceArgs, LayerArgs};
use crate::podman::DEFAULT_DIR;

/// Arguments of `tarblk podman`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "The images lie in a store that podman and CRI-O only read (an additional image store). podman has to be told of it once, by
/etc/containers/storage.conf; `tarblk podman setup` prints what belongs there. Then `podman run IMAGE` starts a container from an
added image without pulling it; what is read is fetched when it is read.

Devices do not outlive the machine's end: until `tarblk podman restore` has made them anew, podman pulls these images as usual.

Examples:
  tarblk podman add docker://registry.example.org/team/app:1.2
  podman run --rm registry.example.org/team/app:1.2
  tarblk podman rm registry.example.org/team/app:1.2"
)]
pub struct PodmanArgs {
    /// The store, a directory of root's alone; made by the first `add`.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_DIR, value_hint = ValueHint::DirPath)]
    pub store: PathBuf,
    /// What is to be done.
    #[command(subcommand)]
    pub action: PodmanAction,
}

/// What can be done with the store.
#[derive(Debug, Subcommand)]
pub enum PodmanAction {
    /// Add an image and print its ID. One that is there gets the name, and a new device if it has lost its own.
    Add(Box<AddArgs>),
    /// Remove images, or names of images that have several. One that containers are made on is refused.
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// List the images of the store.
    #[command(visible_alias = "list")]
    Ls {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Attach and mount again all images that have lost their device, as after a start of the machine.
    Restore,
    /// Print what storage.conf has to say so that podman and CRI-O look into the store.
    Setup,
}

/// Arguments of `tarblk podman add`.
#[derive(Clone, Debug, Args)]
pub struct AddArgs {
    /// The image.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// What podman is to call it [default: its name in the registry; of a layout `localhost/DIR:TAG`].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Fetch everything else as well while no read waits: in the end the image needs no server.
    #[arg(long, help_heading = "Device options", conflicts_with = "no_cache")]
    pub fetch_all: bool,
}

/// Arguments of `tarblk podman rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The images: names as podman or `add` has them, or the beginning of IDs.
    #[arg(value_name = "IMAGE", value_hint = ValueHint::Other, required_unless_present = "all", conflicts_with = "all")]
    pub images: Vec<String>,
    /// All images of the store.
    #[arg(long)]
    pub all: bool,
    /// Also images that containers are made on. Running ones go on; stopped ones cannot be started until the image is added again.
    #[arg(long)]
    pub force: bool,
}
