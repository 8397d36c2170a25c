//! `tarblk run`: a container of an image, with nothing but an OCI runtime.

use std::io::{IsTerminal as _, stdin};
use std::path::PathBuf;

use anyhow::Context as _;

use super::attach::{make_ready, mount_writable, states, upgrade_other};
use super::cli::{NetworkArg, RunArgs};
use super::container_image::ContainerImage;
use super::{Session, UsageError};
use crate::container::{
    Bundle, ContainerError, Containers, DEFAULT_DIR, ImageSettings, Network, Runtime, Signals, Wanted,
};
use crate::interrupt::Interrupted;
use crate::mount::{MountOptions, Upper};

/// The container has ended: with this exit status.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the container ended with status {0}")]
pub(super) struct Ended(pub(super) u8);

/// The exit status when tarblk itself fails, as engines have it: others are the container's.
pub(super) const FAILED: u8 = 125;

/// `tarblk run`. Never returns without an error but when the container ended well.
pub(super) fn run(args: &RunArgs, session: Session) -> anyhow::Result<()> {
    make_ready()?;
    let wanted = wanted(args)?;
    let runtime = Runtime::find(args.runtime.as_deref())?;
    let states = states();
    let containers = Containers::open(&dir(), &states)?;
    containers.remove_left(&runtime)?;
    let found = ContainerImage::find(&args.layer, "run", session)?;
    let settings = ImageSettings::parse(&found.image.config.json)?;
    let (_, request) = found.request(&args.device, args.fetch_all, session)?;
    upgrade_other();
    // From here on there is something to take away.
    let signals = Signals::catch().context("cannot catch signals")?;
    let bundle = containers.create()?;
    let ended = || -> anyhow::Result<u8> {
        let root = bundle.root();
        let upper = args.overlay.clone().unwrap_or_else(|| bundle.overlay());
        let upper = Upper::open(&upper, &root)?;
        // As in a container of any engine programs become others by their mode. Only root comes to where it is mounted.
        let options = MountOptions::parse(["suid", "dev"]).unwrap_or_default();
        mount_writable(&request.spec, &root, &options, &upper)?;
        if let Some(line) = request.line.as_ref().filter(|_| session.talk.verbose) {
            session.talk.note(format_args!("tarblk: {line}"));
        }
        if signals.is_end_wanted() {
            return Err(Interrupted.into());
        }
        bundle.prepare(&settings, &wanted)?;
        Ok(bundle.run(&runtime, &wanted, &signals, settings.stop_signal())?)
    };
    let ended = ended();
    remove(bundle, &runtime);
    match ended? {
        0 => Ok(()),
        other => Err(Ended(other).into()),
    }
}

/// Removes a container; how it ended says more than what is left of it, which the next command tries again.
fn remove(bundle: Bundle, runtime: &Runtime) {
    if let Err(error) = bundle.remove(runtime) {
        log::warn!("{error}");
    }
}

/// Ends the containers of commands that were killed, as far as there are any.
pub(super) fn remove_left() {
    let left = || -> Result<(), ContainerError> {
        let Some(containers) = Containers::existing(&dir(), &states())? else {
            return Ok(());
        };
        containers.remove_left(&Runtime::find(None)?)
    };
    match left() {
        // Without a runtime there was no container.
        Ok(()) | Err(ContainerError::NoRuntime) => {}
        Err(error) => log::warn!("{error}"),
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
    })
}
