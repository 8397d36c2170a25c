//! What can be typed of `tarblk run`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::{DeviceArgs, LayerArgs};
use crate::container::Volume;

/// Arguments of `tarblk run`.
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own")]
#[command(
    after_help = "The container is run by runc (or crun) with what the image's configuration says: entry point, command, environment, user, directory,
stop signal. It has a root, processes, users' names, a network and devices of its own, podman's default capabilities, and a seccomp
filter as engines have (--seccomp none: none). What it writes goes when it ends, unless --overlay says where to keep it. Signals
are passed on; SIGTERM is the image's stop signal; at the third that asks for an end the container is killed. A container whose
command was killed is ended by the next one.

The exit status is the container's; 125 if tarblk fails, 126 if its program cannot be executed, 127 if it is not there.

Examples:
  tarblk run docker://registry.example.org/team/app:1.2
  tarblk run -it docker://debian bash
  tarblk run --network host -v /srv/data:/data:ro \\
      oci:/srv/app:1.2 /usr/bin/app --port 8080"
)]
pub struct RunArgs {
    /// The image.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// The command, instead of the image's own; arguments of the image's entry point, if it has one.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<String>,
    /// A program to run instead of the image's entry point; with an empty one the command alone is run.
    #[arg(long, help_heading = "Container options", value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// A variable of the environment; with a name alone, this command's own.
    #[arg(short, long, help_heading = "Container options", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// A directory or file of this machine that the container sees.
    #[arg(long, help_heading = "Container options", value_name = "HOST:CONTAINER[:ro|rw]")]
    pub volume: Vec<Volume>,
    /// Who runs the program: names of the image, or numbers.
    #[arg(short, long, help_heading = "Container options", value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Where the program begins.
    #[arg(short, long, help_heading = "Container options", value_name = "DIR", value_hint = ValueHint::Other)]
    pub workdir: Option<String>,
    /// What the container takes itself for [default: what the image says, else a name of its own].
    #[arg(long, help_heading = "Container options", value_name = "NAME", value_hint = ValueHint::Other)]
    pub hostname: Option<String>,
    /// Its network.
    #[arg(long, help_heading = "Container options", value_enum, default_value_t = NetworkArg::None)]
    pub network: NetworkArg,
    /// Which system calls it may not make.
    #[arg(long, help_heading = "Container options", value_enum, default_value_t = SeccompArg::Default)]
    pub seccomp: SeccompArg,
    /// Give it this terminal.
    #[arg(short, long, help_heading = "Container options")]
    pub tty: bool,
    /// Let it read standard input.
    #[arg(short, long, help_heading = "Container options")]
    pub interactive: bool,
    /// Let it write nothing.
    #[arg(long, help_heading = "Container options")]
    pub read_only: bool,
    /// Keep what it writes below this directory, as `mount --overlay` does.
    #[arg(long, help_heading = "Container options", value_name = "UPPER", value_hint = ValueHint::DirPath)]
    pub overlay: Option<PathBuf>,
    /// What runs it [default: runc, or crun].
    #[arg(long, help_heading = "Container options", value_name = "PROGRAM", value_hint = ValueHint::CommandName)]
    pub runtime: Option<PathBuf>,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Fetch everything else as well while no read waits.
    #[arg(long, help_heading = "Device options", conflicts_with = "no_cache")]
    pub fetch_all: bool,
}

/// What system calls of a container are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SeccompArg {
    /// What runs the machine, and what kernels were broken into by.
    #[default]
    Default,
    /// Nothing.
    None,
}

/// The network of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NetworkArg {
    /// Its own, with nothing but itself in it.
    #[default]
    None,
    /// This machine's.
    Host,
}
