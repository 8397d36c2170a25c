//! What can be typed of `tarblk install` and `tarblk generate`: what is put on a machine.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

/// Arguments of `tarblk install`.
#[derive(Debug, Args)]
#[command(
    after_help = "Settings in /etc/tarblk that are there already stay as they are. Devices and containers go on while another
version takes over.

Examples:
  tarblk install --enable
  tarblk install --root /host --enable --stay      # a container onto its host
  tarblk install --remove"
)]
pub struct InstallArgs {
    /// The root directory of the machine.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, default_value = "/")]
    pub root: PathBuf,
    /// Where programs, man pages and completions go, on that machine.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, default_value = "/usr/local")]
    pub prefix: PathBuf,
    /// Start the units, now and at boot, where systemd runs; those that run go on as this version.
    #[arg(long)]
    pub enable: bool,
    /// Do not end before being told to: for a container that is started again when it ends.
    #[arg(long)]
    pub stay: bool,
    /// Stop the units and take away everything but settings, records and the cache.
    #[arg(long, conflicts_with_all = ["enable", "stay"])]
    pub remove: bool,
}

/// What `tarblk generate` writes.
#[derive(Debug, Subcommand)]
pub enum Generate {
    /// Write a man page for every command into DIR.
    Man {
        /// An existing directory.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print a unit for systemd that mounts a layer.
    Systemd(SystemdArgs),
}

/// Arguments of `tarblk generate systemd`.
#[derive(Debug, Args)]
#[command(after_help = "The first line of the unit names the file that it belongs in.

Example:
  tarblk generate systemd docker://registry.example.org/team/app:1.2 /mnt/app \\
      >/etc/systemd/system/tarblk-mnt-app.service
  systemctl daemon-reload && systemctl enable --now tarblk-mnt-app")]
pub struct SystemdArgs {
    /// What is mounted: a layer or an image, as `tarblk mount` takes it.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: String,
    /// Where.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
    /// Mount options, as `tarblk mount` and, in a mount unit, `mount.tarblk` take them.
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", value_delimiter = ',')]
    pub options: Vec<String>,
    /// A service, which runs `tarblk mount --foreground`; or a mount unit, for which mount(8) has to find `mount.tarblk`.
    #[arg(long, value_enum, default_value_t = UnitKind::Service)]
    pub kind: UnitKind,
}

/// What kind of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum UnitKind {
    /// `tarblk-DIR.service`.
    #[default]
    Service,
    /// `DIR.mount`.
    Mount,
}
