//! `tarblk snapshotter`, and `tarblk ps --images`: what became of images that containerd pulled.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use anyhow::Context as _;
use rustix::net::{AddressFamily, sockopt};
use tokio::sync::watch;

use super::Session;
use super::attach::{mounter, states, upgrade_other};
use super::cli::{PsArgs, SnapshotterArgs};
use super::layer::cache_dir;
use super::output::{Table, print, println};
use super::registry::config_dir;
use crate::device::service::{READY, STOPPING, given, notify};
use crate::interrupt::Interrupt;
use crate::open::TrustPolicy;
use crate::snapshotter::{self, Config, FILE_NAME, Machine};

/// The set-up that is named, or the usual one.
pub(super) fn config(named: Option<&Path>) -> anyhow::Result<Config> {
    let file = named.map_or_else(|| config_dir().join(FILE_NAME), Path::to_owned);
    let mut config = Config::read(&file, named.is_none())?;
    config.cache.get_or_insert_with(cache_dir);
    Ok(config)
}

/// `tarblk snapshotter`.
pub(super) fn run(args: &SnapshotterArgs) -> anyhow::Result<()> {
    let mut config = config(args.config.as_deref())?;
    if let Some(address) = &args.address {
        config.address.clone_from(address);
    }
    if let Some(root) = &args.root {
        config.root.clone_from(root);
    }
    if let Some(socket) = &args.image_service {
        config.image_service = Some(socket.clone());
    }
    if let Some(socket) = &args.containerd {
        config.containerd.clone_from(socket);
    }
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let (stop, stopped) = watch::channel(false);
    thread::spawn(move || {
        interrupt.wait();
        notify(STOPPING);
        // The receiver is gone only when the command is ending.
        let _ = stop.send(true);
    });
    let address = config.address.clone();
    let ready = move || {
        // When it is sure that no other snapshotter uses what this one does.
        upgrade_other();
        log::info!("ready on {}", address.display());
        notify(READY);
    };
    let machine = Machine {
        states: states(),
        mounter: mounter()?,
        trust: TrustPolicy::of_machine(&config_dir())?,
        sockets: handed_over(),
    };
    Ok(snapshotter::run(&config, machine, &stopped, ready)?)
}

/// The sockets that a service manager listens on for this process (`sd_listen_fds(3)`): clients that call while it is away wait
/// and are answered, instead of being refused.
fn handed_over() -> Vec<UnixListener> {
    let mut all = Vec::new();
    for (name, descriptor) in given() {
        let is_socket = sockopt::socket_domain(&descriptor).is_ok_and(|domain| domain == AddressFamily::UNIX)
            && sockopt::socket_acceptconn(&descriptor).is_ok_and(|listens| listens);
        if is_socket {
            all.push(descriptor.into());
        } else {
            log::warn!("the service manager handed over what is no socket to listen on: {name}");
        }
    }
    all
}

/// `tarblk ps --images`.
pub(super) fn images(args: &PsArgs, session: Session) -> anyhow::Result<()> {
    let config = config(args.config.as_deref())?;
    let cannot = || format!("cannot read {}", config.root.display());
    let verdicts = snapshotter::verdicts(&config.root).with_context(cannot)?;
    if args.json {
        return println(serde_json::to_string_pretty(&verdicts)?);
    }
    if verdicts.is_empty() {
        session.talk.note("no image was pulled through tarblk");
        return Ok(());
    }
    let mut table = Table::new(&["IMAGE", "LAZY", "WHY"]);
    for verdict in verdicts {
        table.row([
            verdict.image,
            if verdict.lazy { "yes" } else { "no" }.to_owned(),
            verdict.detail.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    print(table)
}
