//! The image as a block device. In: an image and a fetcher. Out: `/dev/ublkbN` or `/dev/loopN`, the process that serves it,
//! and what other commands may know of and ask that process.
//!
//! Knows nothing of tar. [`volume`] is what both back ends serve: [`ublk`] where the kernel has it, else [`fuse_loop`], a
//! FUSE file under a loop device. Threads that answer the kernel never block and never compute anything bigger than a
//! block. A back end that was not asked for is never taken silently.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub mod fuse_loop;
pub mod inventory;
pub mod metrics;
pub mod service;
pub mod state;
pub mod stats;
pub mod trace;
pub mod ublk;
pub mod users;
pub mod volume;

use volume::Volume;

/// How long reads in flight may go on after a device was asked to stop, before they are answered with an error.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Which kernel interface carries a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// ublk: `/dev/ublkbN`.
    Ublk,
    /// A FUSE file under a loop device: `/dev/loopN`.
    Loop,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Loop => "loop",
        })
    }
}

/// Which back end a user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// ublk, and loop where there is no ublk.
    #[default]
    Auto,
    /// ublk or nothing.
    Ublk,
    /// loop or nothing.
    Loop,
}

impl FromStr for BackendChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "ublk" => Ok(Self::Ublk),
            "loop" => Ok(Self::Loop),
            other => Err(format!("`{other}` is no back end; there are auto, ublk and loop")),
        }
    }
}

/// How a device is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceOptions {
    /// Which back end.
    pub backend: BackendChoice,
    /// Hardware queues of a ublk device, session threads of a FUSE file.
    pub queues: u16,
    /// Requests in flight in each queue of a ublk device.
    pub depth: u16,
    /// Whether each queue's thread stays on the CPUs whose requests it gets. Off, it may run beside the program that reads
    /// instead of taking turns with it, which is what the kernel's own loop device does.
    pub pin_queues: bool,
    /// The device's `read_ahead_kb`, in KiB; the kernel's default when not given.
    pub read_ahead_kb: Option<u32>,
    /// What the device holds, as lists of devices may show it.
    pub label: String,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            backend: BackendChoice::Auto,
            queues: 2,
            depth: 128,
            pin_queues: false,
            read_ahead_kb: None,
            label: "tarblk".to_owned(),
        }
    }
}

/// What can go wrong with a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The kernel has no ublk driver, or it may not be used.
    #[error("no ublk: {0}")]
    NoUblk(String),
    /// The ublk driver refused something.
    #[error("ublk: {0}")]
    Ublk(String),
    /// A ublk device that can never be taken over by another server, only deleted.
    #[error("ublk: device {id} cannot be served again: {cause}")]
    UblkLost {
        /// The driver's number of the device.
        id: u32,
        /// What is the matter with it.
        cause: String,
    },
    /// The kernel has no FUSE or no loop devices, or they may not be used.
    #[error("no FUSE under a loop device: {0}")]
    NoLoop(String),
    /// FUSE or the loop driver refused something.
    #[error("loop: {0}")]
    Loop(String),
    /// Neither back end is to be had.
    #[error(
        "no way to make a block device: {ublk}; {fuse_loop}: run it where the kernel has the modules ublk_drv, or fuse and loop (a container needs their devices in its /dev); `tarblk image` needs neither"
    )]
    NoBackend {
        /// Why there is no ublk.
        ublk: Box<DeviceError>,
        /// Why there is no loop device.
        fuse_loop: Box<DeviceError>,
    },
}

/// What must outlive a process for another one to go on with its device.
#[derive(Debug)]
pub enum HeldDevice {
    /// Nothing: the driver keeps the device and its requests.
    Ublk,
    /// The FUSE connection and what belongs to it.
    Loop(fuse_loop::HeldLoop),
}

/// A device that this process serves.
#[derive(Debug)]
pub enum Device {
    /// Through ublk.
    Ublk(ublk::UblkDevice),
    /// Through FUSE and loop.
    Loop(fuse_loop::FuseLoop),
}

impl Device {
    /// Serves `volume` by the back end that `options` ask for. The second value says why `auto` did not take ublk.
    ///
    /// # Errors
    /// Why no device could be made.
    pub fn start(volume: &Arc<Volume>, options: &DeviceOptions) -> Result<(Self, Option<String>), DeviceError> {
        let by_loop = || fuse_loop::FuseLoop::start(volume, options).map(Self::Loop);
        match options.backend {
            BackendChoice::Ublk => Ok((Self::Ublk(ublk::UblkDevice::start(volume, options)?), None)),
            BackendChoice::Loop => Ok((by_loop()?, None)),
            BackendChoice::Auto => match ublk::UblkDevice::start(volume, options) {
                Ok(device) => Ok((Self::Ublk(device), None)),
                Err(ublk) => match by_loop() {
                    Ok(device) => Ok((device, Some(ublk.to_string()))),
                    Err(fuse_loop) => Err(DeviceError::NoBackend {
                        ublk: Box::new(ublk),
                        fuse_loop: Box::new(fuse_loop),
                    }),
                },
            },
        }
    }

    /// Goes on with a device that another process served until it died; its readers wait. `volume` has to be the same image, bit for
    /// bit.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn resume(
        volume: &Arc<Volume>,
        options: &DeviceOptions,
        number: u32,
        held: HeldDevice,
    ) -> Result<Self, DeviceError> {
        match held {
            HeldDevice::Ublk => ublk::UblkDevice::resume(volume, options, number).map(Self::Ublk),
            HeldDevice::Loop(held) => fuse_loop::FuseLoop::resume(volume, options, number, held).map(Self::Loop),
        }
    }

    /// Duplicates of the descriptors by which another process can go on with it.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn held(&self) -> io::Result<HeldDevice> {
        match self {
            Self::Ublk(_) => Ok(HeldDevice::Ublk),
            Self::Loop(device) => device.held().map(HeldDevice::Loop),
        }
    }

    /// Lets the kernel take it down with its last user, where it does that by itself.
    pub fn let_go(&mut self) {
        match self {
            Self::Ublk(_) => {}
            Self::Loop(device) => device.let_go(),
        }
    }

    /// The number in its name.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::Ublk(device) => device.id(),
            Self::Loop(device) => device.number(),
        }
    }

    /// The back end that carries it.
    #[must_use]
    pub fn backend(&self) -> Backend {
        match self {
            Self::Ublk(_) => Backend::Ublk,
            Self::Loop(_) => Backend::Loop,
        }
    }

    /// The block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Ublk(device) => device.path(),
            Self::Loop(device) => device.path(),
        }
    }

    /// Whether it is still served; another process may take a device down.
    #[must_use]
    pub fn is_running(&self) -> bool {
        match self {
            Self::Ublk(device) => device.is_running(),
            Self::Loop(device) => device.is_running(),
        }
    }

    /// Takes it down. The caller has made sure that it is not mounted.
    ///
    /// # Errors
    /// What kept the kernel from letting go.
    pub fn stop(self) -> Result<(), DeviceError> {
        match self {
            Self::Ublk(device) => device.stop(),
            Self::Loop(device) => device.stop(),
        }
    }
}

/// Loads the drivers of the back ends that `choice` allows, as far as they are not there. Takes privileges that the service drops: the
/// command does it before it asks for a device.
pub fn load_drivers(choice: BackendChoice) {
    for (node, module) in missing_drivers(choice) {
        load_module(module, node);
    }
}

/// Begins what [`load_drivers`] does, which then waits for it: a command that has other things to do first need not wait for
/// a driver that is not there.
pub fn begin_to_load_drivers(choice: BackendChoice) {
    if missing_drivers(choice).next().is_some() {
        // Without a thread it is done when it is needed.
        let _unless_it_cannot_start = thread::Builder::new()
            .name("drivers".to_owned())
            .spawn(move || load_drivers(choice));
    }
}

/// Device nodes that are not there, of back ends that `choice` allows, and the modules that bring them.
fn missing_drivers(choice: BackendChoice) -> impl Iterator<Item = (&'static str, &'static str)> {
    let of_ublk = ublk::DRIVERS.iter().filter(move |_| choice != BackendChoice::Loop);
    let of_loop = fuse_loop::DRIVERS.iter().filter(move |_| choice != BackendChoice::Ublk);
    let drivers = of_ublk.chain(of_loop).copied();
    drivers.filter(|(node, _)| !Path::new(node).exists())
}

/// Loads a kernel module and waits a moment for `node`, the device that it brings; not if it was tried a moment ago.
fn load_module(module: &'static str, node: &str) {
    static TRIED: Mutex<BTreeMap<&str, Instant>> = Mutex::new(BTreeMap::new());
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    if tried.get(module).is_some_and(|at| at.elapsed() < MODULE_PAUSE) {
        return;
    }
    let quiet = Stdio::null;
    let loaded = Command::new("modprobe")
        .arg(module)
        .stdin(quiet())
        .stdout(quiet())
        .stderr(quiet())
        .status();
    let patience = if loaded.is_ok_and(|status| status.success()) {
        NODE_LIMIT
    } else {
        Duration::ZERO
    };
    wait_until(patience, || Path::new(node).exists());
    tried.insert(module, Instant::now());
}

/// A module that did not bring its node is tried again after this: somebody may have installed it.
const MODULE_PAUSE: Duration = Duration::from_secs(10);

/// How long a device node may take to appear after its driver was loaded.
const NODE_LIMIT: Duration = Duration::from_secs(1);

/// Looks again and again until `done` or `limit` has passed; returns whether it was done.
pub(crate) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the caller's turn to change what lies in a directory, for as long as `limit`: none if others took longer. The turn lasts until
/// the value is dropped.
///
/// # Errors
/// When the directory cannot be opened.
pub(crate) fn take_turn(dir: &Path, limit: Duration) -> io::Result<Option<fs::File>> {
    let turn = fs::File::open(dir)?;
    let mine = || rustix::fs::flock(&turn, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
    Ok(wait_until(limit, mine).then_some(turn))
}

/// Sets what can only be set on a running device. It works without, so failures are only logged. Not by the queue's own knob,
/// for which some kernels (6.11 to 6.15) wait until no request is in flight.
fn queue_sysfs(device: &Path, options: &DeviceOptions) {
    let (Some(name), Some(kib)) = (device.file_name(), options.read_ahead_kb) else {
        return;
    };
    let knob = Path::new("/sys/block").join(name).join("bdi/read_ahead_kb");
    if let Err(error) = fs::write(&knob, kib.to_string()) {
        log::warn!("cannot set {} to {kib}: {error}", knob.display());
    }
}
