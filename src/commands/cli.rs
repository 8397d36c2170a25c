//! What can be typed: every command, option and help text. Man pages and completions are made from these definitions.

mod bench;
mod cache;
mod engines;
mod index;
mod machine;
mod podman;
mod run;
mod start;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};

pub(super) use bench::{BenchArgs, DemoArgs, RowArg};
pub(super) use cache::{CacheAction, CacheArgs};
pub(super) use engines::{ContentCommand, ContentPushArgs, EngineArg, SetupArgs, SnapshotterArgs, SnapshotterCommand};
pub(super) use index::{CopyArgs, IndexAction, IndexArgs, PushArgs, VerifyArgs};
pub(super) use machine::{Generate, InstallArgs, SystemdArgs, UnitKind};
pub(super) use podman::{AddArgs, PodmanAction, PodmanArgs, RmArgs};
pub(super) use run::{NetworkArg, RunArgs, SeccompArg};
pub(super) use start::{ProfileAction, ProfileArgs, ProfileCopyArgs, ProfileRmArgs, ProfileShowArgs, TraceArgs};

use crate::device::BackendChoice;
use crate::digest::Digest;
use crate::fetch::USUAL_CONNECTIONS;
use crate::http::Secret;
use crate::open::{IndexChoice, LayerChoice};
use crate::quantity::{parse_size, parse_time};
use crate::source::registry::{DEFAULT_HOSTS_DIR, Platform, PullPolicy};

/// A container layer as a block device, before it has been downloaded.
///
/// tarblk learns from a tar layer's headers, or from an index of them, what the layer holds, computes a read-only ext4
/// filesystem from that, offers it to the kernel as a block device, and fetches the layer's bytes only when the kernel reads
/// them. Layers may be local files or lie on any web server or registry that answers HTTP range requests, plain or
/// compressed; they are never converted or changed. All layers of an image become one filesystem.
///
/// Exit status: 0 success, 1 failure, 2 wrong usage. `bench` checks the exit status of the command it runs.
#[derive(Debug, Parser)]
#[command(
    name = "tarblk",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_long_help = "Examples:
  tarblk mount https://example.org/layers/debian.tar /mnt
  chroot /mnt python3 -c 'import numpy'
  tarblk umount /mnt

  tarblk mount docker://registry.example.org/team/app:1.2 /mnt
  tarblk stats /mnt
  tarblk umount /mnt

  # Made once, attached in one request ever after.
  tarblk index layer.tar -o layer.tarblk
  tarblk mount https://example.org/layer.tar /mnt \\
      --index https://example.org/layer.tarblk

  tarblk bench layer.tar --rtt 20ms --rate 200mbit --report report.html \\
      -- python3 -c 'import numpy'
  tarblk demo"
)]
pub struct Cli {
    /// What is wanted of all commands.
    #[command(flatten)]
    pub talk: TalkArgs,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// How much is said.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct TalkArgs {
    /// Say nothing but errors, and draw no progress.
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Global options"
    )]
    pub quiet: bool,
    /// Say more; twice, even more. `RUST_LOG` is heeded too.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
}

/// One command each.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read a layer's headers, write the header index, print a summary.
    Index(IndexArgs),
    /// List what a layer holds.
    Ls(LsArgs),
    /// Tell what differs between two layers, and what one would fetch for the other.
    Diff(DiffArgs),
    /// Write a layer's whole filesystem image to a file.
    Image(ImageArgs),
    /// Offer a layer as a block device and print the device's path.
    Attach(AttachArgs),
    /// Attach a layer and mount it, read-only.
    Mount(MountArgs),
    /// Unmount a directory that `mount` mounted, and detach its device.
    #[command(visible_alias = "unmount")]
    Umount(UmountArgs),
    /// Show what is attached.
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Show the counters of an attached device.
    Stats(StatsArgs),
    /// Show what was read of a device while it started, from where, and what waited.
    Trace(TraceArgs),
    /// Show, forget and publish what is learned of how images start.
    Profile(ProfileArgs),
    /// Show the log of what serves a device.
    Logs(LogsArgs),
    /// Find out what keeps tarblk from working on this machine, or from a layer.
    Doctor(DoctorArgs),
    /// Look at what is kept on disk, check it, and decide what goes.
    Cache(CacheArgs),
    /// Detach a device; refused while it is mounted.
    Detach(DetachArgs),
    /// Measure a cold start: a command in a layer that is not there yet, against the usual ways to get it there.
    Bench(BenchArgs),
    /// Show everything on a layer made from this machine's own files.
    Demo(DemoArgs),
    /// Keep the service of all devices up, also without devices, and tell its metrics; ends with Ctrl-C, when the devices stay.
    Service(ServiceArgs),
    /// Let this version of tarblk go on with what an older one serves, without a pause that readers would notice as an error.
    Upgrade,
    /// Run containerd's snapshotter plug-in: images start before they are downloaded.
    Snapshotter(SnapshotterArgs),
    /// What containerd has of images that were pulled lazily.
    #[command(subcommand, disable_help_subcommand = true)]
    Content(ContentCommand),
    /// Give podman and CRI-O images that they need not pull.
    Podman(PodmanArgs),
    /// Run a container of an image by runc, and take everything away afterwards.
    Run(Box<RunArgs>),
    /// What the service of all devices and its keepers run.
    #[command(hide = true)]
    ServeDevices {
        /// For tarblk itself.
        #[arg(hide = true)]
        arguments: Vec<OsString>,
    },
    /// Put this program, its units and settings in their places on a machine; Debian's have a package for that.
    Install(InstallArgs),
    /// Write man pages or shell completions.
    #[command(subcommand, disable_help_subcommand = true)]
    Generate(Generate),
}

/// A layer whose headers may have been read before.
#[derive(Clone, Debug, Args)]
pub struct LayerArgs {
    /// A layer: a tar, plain or compressed with gzip or zstd, as a path, a `file://` URL, or an `http(s)://` URL of a server
    /// that answers Range. Or an image: `docker://HOST/NAME[:TAG|@DIGEST]` in a registry, `oci:DIR[:TAG|@DIGEST]` in a
    /// directory.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: String,
    /// Where the index comes from: the path or URL of one made by `tarblk index`; or `auto`: one that was published in the
    /// registry and is believed, or is kept here, or is the table of contents of an eStargz or zstd:chunked layer, else it is made; `require`: only
    /// a published one will do, or a table of contents whose digest the image's manifest names; `ignore`: one that is made here,
    /// now or before; `build`: it is made anew from all of the layer.
    #[arg(long, value_name = "FILE|URL|WORD", value_hint = ValueHint::FilePath, default_value = "auto", hide_default_value = true)]
    pub index: IndexChoice,
    /// Refuse every index but the one with this digest: of the index, or of an image's artifact with indexes.
    #[arg(long, value_name = "DIGEST")]
    pub index_digest: Option<Digest>,
    /// One layer of an image alone, as overlayfs wants it among others: by its digest, or its number, the lowest being 1.
    #[arg(long, value_name = "DIGEST|N")]
    pub layer: Option<LayerChoice>,
    /// Where indexes and fetched bytes are kept [default: the environment's `TARBLK_CACHE`, else /var/cache/tarblk, or
    /// ~/.cache/tarblk for users].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub cache: Option<PathBuf>,
    /// Keep nothing on disk and use nothing kept.
    #[arg(long)]
    pub no_cache: bool,
    /// Disk space for all that is kept, never exceeded: what was unused longest goes first, of attached layers, too [default: a
    /// tenth of the disk, and never its last twentieth, or its last GiB where that is less].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub cache_size: Option<u64>,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// How registries are talked to.
#[derive(Clone, Debug, Args)]
pub struct RegistryArgs {
    /// Which image of a list for several platforms, as linux/arm64 or linux/arm/v7 [default: Linux on this processor].
    #[arg(long, help_heading = "Registry options", value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<Platform>,
    /// Credentials for the registry, or the file they are in. What is typed here can be seen by `ps`: better is a file, the
    /// environment's `TARBLK_CREDS`, or what `docker login`, `podman login` and `skopeo login` keep, which is found by itself.
    #[arg(
        long,
        help_heading = "Registry options",
        value_name = "USER:PASSWORD|@FILE",
        value_parser = hidden
    )]
    pub creds: Option<Secret>,
    /// The only file with credentials to look into [default: containers' auth.json, then Docker's config.json].
    #[arg(long, help_heading = "Registry options", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub authfile: Option<PathBuf>,
    /// Speak HTTP without TLS to the registry. On this machine's own addresses it is found out which it speaks.
    #[arg(long, help_heading = "Registry options")]
    pub plain_http: bool,
    /// Directories of containerd's `hosts.toml`, with mirrors, certificates and headers.
    #[arg(long, help_heading = "Registry options", value_name = "DIR", default_value = DEFAULT_HOSTS_DIR, value_hint = ValueHint::DirPath)]
    pub hosts_dir: PathBuf,
    /// Refuse a layer whose tar is longer than this [default: 256GiB, and no more than 4GiB and 256 bytes for each byte of a
    /// compressed layer; a plain tar of which only headers are read may have any length].
    #[arg(long, help_heading = "Registry options", value_name = "SIZE", value_parser = parse_size)]
    pub max_layer_size: Option<u64>,
    /// Follow servers on the internet also to addresses of this machine and of private networks: redirects, token servers, places
    /// to upload to. Servers that lie there themselves may always lead there. `TARBLK_ALLOW_PRIVATE_REDIRECTS=1` means the same.
    #[arg(long, help_heading = "Registry options")]
    pub allow_private_redirects: bool,
    /// When the server is asked what a tag or a URL means: `always`; `newer`: always, and if it does not answer, what it meant
    /// the last time is used; `missing`: only if that is not known; `never`: nothing is asked, what is not kept here is not there.
    #[arg(long, help_heading = "Registry options", value_name = "WHEN", value_enum, default_value_t = PullArg::Newer, hide_possible_values = true)]
    pub pull: PullArg,
    /// Go on asking a server that is away or busy for this long [default: 6 tries within 1min]. One that wishes to be left alone for
    /// longer (`Retry-After`) is not waited for.
    #[arg(long, help_heading = "Registry options", value_name = "TIME", value_parser = parse_time)]
    pub retry_for: Option<Duration>,
    /// Whom an index is believed that lies beside an image and that neither the image's manifest names nor a trusted key has signed:
    /// `verified`: nobody, it is not used; `registry`: whoever may write to the repository, until all of the layer is here and its
    /// headers say whether that was right [default: what /etc/tarblk/tarblk.toml says, else `verified`].
    #[arg(
        long,
        help_heading = "Registry options",
        value_name = "WORD",
        value_enum,
        hide_possible_values = true
    )]
    pub trust: Option<TrustArg>,
    /// Believe indexes that the key in this file has signed, besides those in /etc/tarblk/keys.d: a public key of Ed25519 or ECDSA
    /// P-256 in PEM, as cosign and `openssl pkey -pubout` write it. May be given several times.
    #[arg(long, help_heading = "Registry options", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub trust_key: Vec<PathBuf>,
    /// What another option of the command says: see [`RegistryArgs::within`].
    #[arg(skip)]
    pub deadline: Option<Duration>,
}

/// Whom indexes beside images are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrustArg {
    /// Only those that a manifest, a signature or a digest vouches for.
    Verified,
    /// All of them.
    Registry,
}

/// When servers are asked what a name means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PullArg {
    /// Each time, and without an answer there is nothing.
    Always,
    /// Each time; without an answer, what it meant the last time is used.
    #[default]
    Newer,
    /// Only if it is not known what it meant the last time.
    Missing,
    /// Never.
    Never,
}

impl From<PullArg> for PullPolicy {
    fn from(typed: PullArg) -> Self {
        match typed {
            PullArg::Always => Self::Always,
            PullArg::Newer => Self::Newer,
            PullArg::Missing => Self::Missing,
            PullArg::Never => Self::Never,
        }
    }
}

/// Never fails: a message about it would quote it.
#[allow(clippy::unnecessary_wraps)]
fn hidden(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_owned()))
}

/// How a device fetches.
#[derive(Clone, Debug, Args)]
pub struct FetchArgs {
    /// Memory for bytes that may be read again, of all devices together; the first device's counts. What is on disk as well takes a
    /// sixty-fourth of it at most, or 8 MiB [default: a sixteenth of the machine's, at least 64 MiB and at most 512 MiB].
    #[arg(long, help_heading = "Device options", value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Fail a read with an I/O error when its bytes could not be brought for this long [default: wait forever].
    #[arg(long, help_heading = "Device options", value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
    /// Connections to the server at most.
    #[arg(long, help_heading = "Device options", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = USUAL_CONNECTIONS)]
    pub connections: u16,
}

impl Default for FetchArgs {
    fn default() -> Self {
        Self {
            memory: None,
            deadline: None,
            connections: USUAL_CONNECTIONS,
        }
    }
}

/// How a device is made.
#[derive(Clone, Debug, Default, Args)]
pub struct DeviceArgs {
    /// What makes the block device: ublk, or a FUSE file under a loop device where the kernel has no ublk.
    #[arg(long, help_heading = "Device options", value_enum, default_value_t = BackendArg::Auto)]
    pub backend: BackendArg,
    /// Queues of a ublk device [default: one per CPU, up to 4].
    #[arg(long, help_heading = "Device options", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: Option<u16>,
    /// How it fetches.
    #[command(flatten)]
    pub fetch: FetchArgs,
}

/// What makes the block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// ublk where the kernel has it, else loop; says which.
    #[default]
    Auto,
    /// The kernel's userspace block driver (Linux 6.0 and later with `ublk_drv`).
    Ublk,
    /// A FUSE file under a read-only loop device.
    Loop,
}

impl From<BackendArg> for BackendChoice {
    fn from(chosen: BackendArg) -> Self {
        match chosen {
            BackendArg::Auto => Self::Auto,
            BackendArg::Ublk => Self::Ublk,
            BackendArg::Loop => Self::Loop,
        }
    }
}

/// Arguments of `tarblk ls`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tarblk ls layer.tar
  tarblk ls docker://registry.example.org/team/app:1.2 /etc /usr/lib/os-release
  tarblk ls layer.tarblk --json | jq -r 'select(.size > 1000000).path'
  tarblk ls layer.tar --mtree >layer.mtree
  bsdtar -xpf layer.tar -C root && mtree -f layer.mtree -p root")]
pub struct LsArgs {
    /// An image, a layer (path or URL of a tar), or an index made from one.
    #[arg(value_name = "SOURCE|INDEX", value_hint = ValueHint::FilePath)]
    pub source: String,
    /// List only these files, and of directories what is below them. Symbolic links on the way are followed.
    #[arg(value_name = "PATH", value_hint = ValueHint::Other)]
    pub paths: Vec<OsString>,
    /// One JSON object a line.
    #[arg(long, conflicts_with = "mtree")]
    pub json: bool,
    /// BSD mtree form.
    #[arg(long)]
    pub mtree: bool,
    /// One layer of an image alone: by its digest, or its number, the lowest being 1.
    #[arg(long, value_name = "DIGEST|N")]
    pub layer: Option<LayerChoice>,
    /// Fail when nothing has come from a server for this long, whatever it says or does not say [default: 6 tries within 1min, of
    /// some 30s each].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk diff`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints a line for each path: + added, - removed, ~ changed and in what; then how many bytes of files the second
one has, and how many of them a machine that has the first would fetch. Reads headers or indexes, never content: whether
files of one size from different layers are equal is known when both indexes hold digests of files (`tarblk index --full`),
and otherwise told of apart. The exit code says whether it worked, not whether
there are differences.

Examples:
  tarblk diff old.tar new.tar
  tarblk diff old.tarblk new.tarblk --json |
      jq -r 'select(.change == \"added\").after.path'"
)]
pub struct DiffArgs {
    /// What was: an image, a layer (path or URL of a tar), or an index made from one.
    #[arg(value_name = "A", value_hint = ValueHint::FilePath)]
    pub a: String,
    /// What is.
    #[arg(value_name = "B", value_hint = ValueHint::FilePath)]
    pub b: String,
    /// One JSON object a line, the totals last.
    #[arg(long)]
    pub json: bool,
    /// List also files of which only nothing says that their content is the same.
    #[arg(long, conflicts_with = "json")]
    pub uncertain: bool,
    /// Fail when nothing has come from a server for this long, whatever it says or does not say [default: 6 tries within 1min, of
    /// some 30s each].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk image`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  tarblk image layer.tar -o layer.ext4 && mount -o ro,loop layer.ext4 /mnt")]
pub struct ImageArgs {
    /// The layer.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// The file to write; replaced when the image is whole. Sparse where the image is zero.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Fail when nothing has come from a server for this long, whatever it says or does not say [default: 6 tries within 1min for
    /// what the layer holds, 5min for its bytes].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
}

/// Arguments of `tarblk attach`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  device=$(tarblk attach https://example.org/layer.tar)
  mount -o ro $device /mnt; ls /mnt; umount /mnt
  tarblk detach $device")]
pub struct AttachArgs {
    /// The layer.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Fetch everything else as well while no read waits: in the end the device needs no server, and every layer was compared
    /// with its digest.
    #[arg(long, help_heading = "Device options", conflicts_with = "no_cache")]
    pub fetch_all: bool,
    /// Stay in the foreground; SIGINT or SIGTERM detaches as soon as the device is no longer in use, and ends.
    #[arg(long)]
    pub foreground: bool,
    /// The device, its back end, process and log as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tarblk mount`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  tarblk mount https://example.org/layer.tar /mnt
  ls /mnt; ...
  tarblk umount /mnt")]
pub struct MountArgs {
    /// The layer.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// An empty directory to mount it on.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
    /// Mount options as mount(8) takes them. `ro` is what it always is, and `nosuid,nodev` what it is by default, because
    /// strangers make layers: `suid` and `dev` let a layer's set-user-ID programs and device nodes work. `noexec,noatime` and
    /// the like are heeded, what is for fstab's readers (`defaults`, `nofail`, `_netdev`, `x-...`) is passed over, and all
    /// others are ext4's.
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", value_delimiter = ',')]
    pub options: Vec<String>,
    /// Let it be written on, by an overlay. What is written goes below UPPER (UPPER/upper; UPPER/work is the kernel's) and is there
    /// again the next time. UPPER is a directory of root's that no other user may look into, and is made if need be.
    #[arg(long, value_name = "UPPER", value_hint = ValueHint::DirPath)]
    pub overlay: Option<PathBuf>,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Fetch everything else as well while no read waits: in the end the device needs no server, and every layer was compared
    /// with its digest.
    #[arg(long, help_heading = "Device options", conflicts_with = "no_cache")]
    pub fetch_all: bool,
    /// Stay in the foreground; SIGINT or SIGTERM unmounts and ends.
    #[arg(long)]
    pub foreground: bool,
    /// What was mounted as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tarblk umount`.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Where it is mounted.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

/// Arguments of `tarblk service`.
#[derive(Debug, Args)]
pub struct ServiceArgs {
    /// Answer `GET /metrics` there with what `stats --prometheus` prints: a path (of a Unix socket that is made, for root alone), or
    /// HOST:PORT, where whoever connects is answered.
    #[arg(long, value_name = "PATH|HOST:PORT")]
    pub metrics: Option<String>,
}

/// Arguments of `tarblk ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// Only what the other commands take: each device and each place where it is mounted, one a line.
    #[arg(long, conflicts_with = "json")]
    pub names: bool,
    /// Instead of devices, the images that containerd pulled through `tarblk snapshotter`: which are lazy, and why others are not.
    #[arg(long, conflicts_with = "names")]
    pub images: bool,
    /// The snapshotter's set-up, for `--images` [default: /etc/tarblk/snapshotter.toml].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "images")]
    pub config: Option<PathBuf>,
}

/// Arguments of `tarblk stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The device, as `attach` printed it, or where it is mounted.
    #[arg(value_name = "DEVICE|MOUNTPOINT", value_hint = ValueHint::AnyPath, required_unless_present = "prometheus")]
    pub device: Option<PathBuf>,
    /// As JSON; with `--watch` one object a line.
    #[arg(long)]
    pub json: bool,
    /// In the text format that Prometheus scrapes; of all devices, if none is named.
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    pub prometheus: bool,
    /// Show them again and again, until the device is gone [default: every 2s].
    #[arg(long, value_name = "TIME", value_parser = parse_pause, num_args = 0..=1, require_equals = true, default_missing_value = "2s")]
    pub watch: Option<Duration>,
}

/// A time between two looks; a number without a unit is of seconds.
fn parse_pause(text: &str) -> Result<Duration, String> {
    /// Who looks more often sees nothing else.
    const SHORTEST: Duration = Duration::from_millis(100);
    let pause = match text.parse::<u32>() {
        Ok(seconds) => Duration::from_secs(seconds.into()),
        Err(_) => parse_time(text)?,
    };
    if pause < SHORTEST {
        return Err(format!("no less than {SHORTEST:?}"));
    }
    Ok(pause)
}

/// Arguments of `tarblk logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The device, as `attach` printed it, or where it is mounted.
    #[arg(value_name = "DEVICE|MOUNTPOINT", value_hint = ValueHint::AnyPath)]
    pub device: PathBuf,
    /// Print what is added until the device is gone.
    #[arg(short, long)]
    pub follow: bool,
    /// Begin with the last N lines [default: the whole log].
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<usize>,
}

/// Arguments of `tarblk doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each line is ok, a warning (it works, but worse than it could) or a problem (something does not work), with what to
do about it. The exit status is 1 if there is a problem.

Examples:
  tarblk doctor
  tarblk doctor docker://registry.example.org/team/app:1.2
  tarblk doctor --json | jq -r '.checks[] | select(.state != \"ok\").advice'"
)]
pub struct DoctorArgs {
    /// Look also whether this can be mounted lazily: an image or a layer at a URL.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: Option<String>,
    /// The cache directory to look at [default: the environment's `TARBLK_CACHE`, else the usual one].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub cache: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The devices, as `attach` printed them.
    #[arg(value_name = "DEVICE", value_hint = ValueHint::FilePath, required_unless_present = "all")]
    pub devices: Vec<PathBuf>,

    /// All devices. Those that are in use stay, and are told of.
    #[arg(long, conflicts_with = "devices")]
    pub all: bool,

    /// Also what is mounted: its directories are unmounted at once, and the device goes when the last of its files is closed.
    #[arg(long)]
    pub force: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }
}
