//! `tarblk run`: a container of an image, with nothing but an OCI runtime.

use std::io::{IsTerminal as _, stdin};
use std::path::PathBuf;

use anyhow::Context as _;

use super::attach::{make_ready, mount_writable, states, upgrade_other};
use super::cli::{BackendArg, DeviceArgs, NetworkArg, RunArgs, SeccompArg};
use super::container_image::ContainerImage;
use super::{Session, UsageError};
use crate::container::{
    Bundle, ContainerError, Containers, DEFAULT_DIR, ImageSettings, Network, Runtime, Signals, SystemCalls, Wanted,
};
use crate::device::state::State;
use crate::interrupt::Interrupted;
use crate::mount::{MountOptions, Upper};
use crate::open::Prepared;

/// The container has ended: with this exit status.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the container ended with status {0}")]
pub(super) struct Ended(pub(super) u8);

/// The exit status when tarblk itself fails, as engines have it: others are the container's.
pub(super) const FAILED: u8 = 125;

/// `tarblk run`. Never returns without an error but when the container ended well.
pub(super) fn run(args: &RunArgs, session: Session) -> anyhow::Result<()> {
    make_ready(args.device.backend)?;
    let wanted = wanted(args)?;
    let runtime = Runtime::find(args.runtime.as_deref())?;
    let containers = Containers::open(&dir(), &states())?;
    containers.remove_left()?;
    let found = ContainerImage::find(&args.layer, "run", session)?;
    let container = ContainerRun {
        runtime,
        containers,
        wanted,
        overlay: args.overlay.clone(),
        fetch_all: args.fetch_all,
    };
    match container.run(&found, &args.device, session, &mut |_, _| ())? {
        0 => Ok(()),
        other => Err(Ended(other).into()),
    }
}

/// A container to be.
pub(super) struct ContainerRun {
    runtime: Runtime,
    containers: Containers,
    wanted: Wanted,
    /// Where it writes; a directory of its own if none, which goes with it.
    overlay: Option<PathBuf>,
    fetch_all: bool,
}

impl ContainerRun {
    /// One that runs a line of a shell in the image, and sees no network.
    ///
    /// # Errors
    /// When there is no runtime, or containers cannot be made here.
    pub(super) fn of_shell(line: &str) -> anyhow::Result<Self> {
        make_ready(BackendArg::default())?;
        let runtime = Runtime::find(None)?;
        let containers = Containers::open(&dir(), &states())?;
        containers.remove_left()?;
        Ok(Self {
            runtime,
            containers,
            wanted: Wanted {
                entrypoint: Some("/bin/sh".to_owned()),
                command: vec!["-c".to_owned(), line.to_owned()],
                ..Wanted::default()
            },
            overlay: None,
            fetch_all: false,
        })
    }

    /// Runs it, and takes everything away afterwards; returns its exit status. `ended` is told what was found and of the device, when the
    /// program has ended and the device is still there.
    ///
    /// # Errors
    /// When there is no container.
    pub(super) fn run(
        self,
        found: &ContainerImage,
        device: &DeviceArgs,
        session: Session,
        ended: &mut dyn FnMut(&Prepared, &State),
    ) -> anyhow::Result<u8> {
        let settings = ImageSettings::parse(&found.image.config.json)?;
        let (prepared, request) = found.request(device, self.fetch_all, session)?;
        upgrade_other();
        // From here on there is something to take away.
        let signals = Signals::catch().context("cannot catch signals")?;
        let bundle = self.containers.create(self.runtime)?;
        let mut run = || -> anyhow::Result<u8> {
            let root = bundle.root();
            let upper = self.overlay.clone().unwrap_or_else(|| bundle.overlay());
            let upper = Upper::open(&upper, &root)?;
            // As in a container of any engine programs become others by their mode. Only root comes to where it is mounted.
            let options = MountOptions::parse(["suid", "dev"]).unwrap_or_default();
            let attached = mount_writable(&request.spec, &root, &options, &upper)?;
            if let Some(line) = request.line.as_ref().filter(|_| session.talk.verbose) {
                session.talk.note(format_args!("tarblk: {line}"));
            }
            if signals.is_end_wanted() {
                return Err(Interrupted.into());
            }
            bundle.prepare(&settings, &self.wanted)?;
            let status = bundle.run(&self.wanted, &signals, settings.stop_signal())?;
            ended(&prepared, &attached.state);
            Ok(status)
        };
        let outcome = run();
        remove(bundle);
        outcome
    }
}

/// Removes a container; how it ended says more than what is left of it, which the next command tries again.
fn remove(bundle: Bundle) {
    if let Err(error) = bundle.remove() {
        log::warn!("{error}");
    }
}

/// Ends the containers of commands that were killed, as far as there are any.
pub(super) fn remove_left() {
    let left = || -> Result<(), ContainerError> {
        let Some(containers) = Containers::existing(&dir(), &states())? else {
            return Ok(());
        };
        containers.remove_left()
    };
    if let Err(error) = left() {
        log::warn!("{error}");
    }
}

/// Where containers are: `TARBLK_RUN_DIR` (for tests, and where /var/lib cannot be written), else the usual place.
fn dir() -> PathBuf {
    let dir = std::env::var_os("TARBLK_RUN_DIR").filter(|dir| !dir.is_empty());
    dir.map_or_else(|| DEFAULT_DIR.into(), PathBuf::from)
}

/// What the options say.
fn wanted(args: &RunArgs) -> anyhow::Result<Wanted> {
    if args.tty && !stdin().is_terminal() {
        return Err(UsageError("--tty: standard input is not a terminal".to_owned()).into());
    }
    let mut env = Vec::new();
    for line in &args.env {
        match line.split_once('=') {
            Some(("", _)) => return Err(UsageError(format!("--env {line}: NAME[=VALUE]")).into()),
            Some(_) => env.push(line.clone()),
            // One that is not set here is not set there.
            None => env.extend(std::env::var(line).ok().map(|value| format!("{line}={value}"))),
        }
    }
    Ok(Wanted {
        command: args.command.clone(),
        entrypoint: args.entrypoint.clone(),
        env,
        volumes: args.volume.clone(),
        user: args.user.clone(),
        workdir: args.workdir.clone(),
        hostname: args.hostname.clone(),
        network: match args.network {
            NetworkArg::None => Network::None,
            NetworkArg::Host => Network::Host,
        },
        tty: args.tty,
        interactive: args.interactive,
        read_only: args.read_only,
        calls: match args.seccomp {
            SeccompArg::Default => SystemCalls::Filtered,
            SeccompArg::None => SystemCalls::All,
        },
    })
}
