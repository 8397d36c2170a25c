//! What can be typed of `tarblk snapshotter` and `tarblk content`: what container engines use.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

/// Arguments of `tarblk snapshotter`.
#[derive(Debug, Args)]
#[command(after_help = "containerd is told of it by a proxy plug-in in its configuration:
  [proxy_plugins.tarblk]
    type = \"snapshot\"
    address = \"/run/tarblk/snapshotter.sock\"

An image is pulled as usual where it cannot be lazy; `tarblk ps --images` says which and why. Containers run on when the
snapshotter ends, is killed or is replaced by another version.

Example:
  tarblk snapshotter &
  ctr images pull --snapshotter tarblk registry.example.org/team/app:1.2")]
#[command(args_conflicts_with_subcommands = true)]
pub struct SnapshotterArgs {
    /// What else is done about it.
    #[command(subcommand)]
    pub what: Option<SnapshotterCommand>,
    /// Its set-up [default: /etc/tarblk/snapshotter.toml, and if that is not there, what every key of it is by default].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// The socket on which containerd calls, instead of the set-up's.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub address: Option<PathBuf>,
    /// Where records are kept and containers write, instead of the set-up's.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub root: Option<PathBuf>,
    /// For Kubernetes: pass a kubelet's pulls on to containerd and keep the logins that come with them, which the layers need
    /// later. The kubelet is told of the socket by `--image-service-endpoint=unix://SOCKET`.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub image_service: Option<PathBuf>,
    /// containerd's own socket, for `--image-service` [default: /run/containerd/containerd.sock].
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub containerd: Option<PathBuf>,
}

/// What is done about the snapshotter besides running it.
#[derive(Debug, Subcommand)]
pub enum SnapshotterCommand {
    /// Print what containerd, Docker, k3s and podman have to be told, in the form that their versions on this machine read.
    Setup(SetupArgs),
}

/// Arguments of `tarblk snapshotter setup`.
#[derive(Debug, Args)]
#[command(after_help = "Nothing is written: what is printed goes into the files that it names.

Examples:
  tarblk snapshotter setup
  tarblk snapshotter setup docker
  tarblk snapshotter setup --check")]
pub struct SetupArgs {
    /// What starts containers here [default: what is installed].
    #[arg(value_name = "ENGINE", value_enum)]
    pub engines: Vec<EngineArg>,
    /// Instead, look whether it works: the snapshotter answers, containerd has the plug-in, and images' names come with their layers.
    #[arg(long)]
    pub check: bool,
    /// containerd's socket [default: the set-up's, or k3s'].
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub address: Option<PathBuf>,
    /// containerd's configuration, for `--check` [default: /etc/containerd/config.toml, or k3s'].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "check")]
    pub containerd_config: Option<PathBuf>,
    /// The snapshotter's set-up [default: /etc/tarblk/snapshotter.toml].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
}

/// A container engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// containerd, by itself or under Kubernetes.
    Containerd,
    /// Docker with containerd's image store.
    Docker,
    /// k3s or RKE2.
    K3s,
    /// podman.
    Podman,
}

/// What is done with containerd's content.
#[derive(Debug, Subcommand)]
pub enum ContentCommand {
    /// Bring the layers of images that were pulled lazily into containerd's content store, as their registries have them.
    Push(ContentPushArgs),
}

/// Arguments of `tarblk content push`.
#[derive(Debug, Args)]
#[command(
    after_help = "What needs layers whole (`ctr images export`, `docker save`, pushing elsewhere, builds) works afterwards.
containerd keeps them for as long as it has the image.

Examples:
  tarblk content push --namespace k8s.io registry.example.org/team/app:1.2
  ctr --namespace k8s.io images export app.tar registry.example.org/team/app:1.2

  tarblk content push --namespace moby docker.io/library/debian:12
  docker save debian:12 >debian.tar"
)]
pub struct ContentPushArgs {
    /// The images, as containerd calls them; Docker's short names are understood.
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<String>,
    /// The namespace that has the images: `k8s.io` is Kubernetes', `moby` Docker's [default: the environment's
    /// `CONTAINERD_NAMESPACE`, else `default`].
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// containerd's socket [default: the environment's `CONTAINERD_ADDRESS`, else the set-up's].
    #[arg(short, long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub address: Option<PathBuf>,
    /// The snapshotter's set-up: its registries and logins are used [default: /etc/tarblk/snapshotter.toml].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// What became of each layer, as JSON.
    #[arg(long)]
    pub json: bool,
}
