//! `tarblk service`: the service is there for as long as this command is, also without devices, and tells its metrics. In: where to listen;
//! what the service manager stored for an earlier run. Out: a service that runs; READY=1 and STOPPING=1 for the service manager, and
//! descriptors for it to store.

use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::fs::Mode;

use super::Session;
use super::attach::{launcher, states, upgrade_other};
use super::cli::ServiceArgs;
use crate::device::service::{self, DescriptorStore, READY, STOPPING, ServiceError, notify};
use crate::interrupt::Interrupt;

/// How often it is looked whether the service is there and this command is to end.
const GLANCE: Duration = Duration::from_millis(200);

/// The pause before a service that cannot be started is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Where metrics are told. A socket's file is removed with it.
#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// `tarblk service`.
pub(super) fn run(args: &ServiceArgs, session: Session) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(ServiceError::NotRoot.into());
    }
    // Before anything else is opened or started.
    let store = Arc::new(DescriptorStore::of_this_process()?);
    crate::fetch::descriptors::raise();
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let listener = args.metrics.as_deref().map(Listener::open).transpose()?;
    if let Some(listener) = &listener {
        session.talk.note(format_args!("metrics are told at {listener}"));
    }
    // What another version serves, this command's unit is to have.
    upgrade_other();
    let mut was_there = false;
    while !interrupt.is_raised() {
        let metrics = listener.as_ref().map(AsFd::as_fd);
        let stay = launcher().and_then(|launcher| service::stay(&launcher, &states(), metrics, &store));
        match stay {
            Ok(stay) => {
                if !was_there {
                    notify(READY);
                }
                was_there = true;
                while stay.is_there() && interrupt.sleep(GLANCE).is_ok() {}
            }
            Err(error) if was_there => {
                log::warn!("{error}");
                let _ = interrupt.sleep(PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    notify(STOPPING);
    Ok(())
}

impl Listener {
    /// `unix:PATH` or a path, else `HOST:PORT`.
    fn open(address: &str) -> anyhow::Result<Self> {
        let path = address
            .strip_prefix("unix:")
            .or(address.starts_with('/').then_some(address));
        let Some(path) = path else {
            let all = address.to_socket_addrs();
            let all: Vec<_> = all
                .with_context(|| format!("`{address}` is no address to listen on"))?
                .collect();
            if all.iter().any(|address| !address.ip().is_loopback()) {
                log::warn!("whoever reaches {address} can read what is attached and how it is used");
            }
            let listener = TcpListener::bind(&*all).with_context(|| format!("cannot listen on {address}"))?;
            return Ok(Self::Tcp(listener));
        };
        let path = std::path::absolute(path).context("the current directory is unknown")?;
        remove_dead(&path)?;
        // Its file is the owner's from the first moment on.
        let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = UnixListener::bind(&path);
        rustix::process::umask(before);
        let listener = bound.with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self::Unix(listener, path))
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_dead(path: &Path) -> anyhow::Result<()> {
    let is_socket = |path| fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => bail!("{} is there already; name another path", path.display()),
    }
}

impl std::fmt::Display for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "http://{address}/metrics"),
                Err(error) => write!(f, "an unknown address ({error})"),
            },
            Self::Unix(_, path) => write!(f, "{} (GET /metrics)", path.display()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = fs::remove_file(path);
        }
    }
}
