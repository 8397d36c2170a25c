//! The image as a loop device, for kernels without ublk. In: a volume. Out: `/dev/loopN`, served by threads of this process.
//!
//! `export` serves the image as the only file of a FUSE filesystem, and `loop_device` puts a read-only loop device on it that
//! reads around the page cache: many reads in flight, and no block cached twice. The filesystem is never attached to a
//! directory: nothing but the loop device holds its file open, so no one can see it or keep it busy, and it goes with the device.
//!
//! The protocol is spoken here (`protocol`, `channel`, `session`), because a connection must be able to outlive the process
//! that serves it. It does as long as another process holds what [`FuseLoop::held`] gives: the open `/dev/fuse`, the `ledger` of
//! requests that are not answered, and the loop device. A process that comes after goes on with [`FuseLoop::resume`], and
//! reads that waited for the dead one are answered as if nothing had been. Where nobody else holds them, everything ends with this process.

mod channel;
mod export;
mod ledger;
mod loop_device;
mod protocol;
mod session;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::stats::ThreadCounters;
use super::volume::{Found, Scratch, Volume};
use super::{DeviceError, DeviceOptions, STOP_GRACE};
use crate::checksum;
use channel::Channel;
use export::Export;
use ledger::{ImageIdentity, Ledger, MAX_THREADS};
use loop_device::LoopDevice;
use session::Session;

/// How long the kernel may take to let go of a device that no process has open.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// Set in the environment, this keeps the kernel's own resending of requests (Linux 6.9) out of new connections, so that what older
/// kernels do can be tested everywhere.
const NO_RESEND: &str = "TARBLK_FUSE_NO_RESEND";

/// A running loop device over a FUSE file. When it is dropped without [`FuseLoop::stop`], its threads go on as long as the device is
/// open somewhere.
#[derive(Debug)]
pub struct FuseLoop {
    device: LoopDevice,
    volume: Arc<Volume>,
    export: Arc<Export>,
    session: Session,
}

/// What keeps a device and its connection alive when the process that serves them ends.
#[derive(Debug)]
pub struct HeldLoop {
    /// The open `/dev/fuse`.
    pub channel: OwnedFd,
    /// The memfd with the requests that are not answered.
    pub ledger: OwnedFd,
    /// The open `/dev/loopN`; none, when the device is to go with its last user.
    pub device: Option<OwnedFd>,
}

/// Why something with the device failed, for [`Result::map_err`].
fn failed(what: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |error| DeviceError::Loop(format!("cannot {what}: {error}"))
}

/// The devices that the drivers bring, and the modules that they are in.
pub(super) const DRIVERS: [(&str, &str); 2] = [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")];

/// Makes sure that this kernel has FUSE and loop devices; see [`load_drivers`](super::load_drivers).
///
/// # Errors
/// [`DeviceError::NoLoop`] with what is missing.
pub fn preflight() -> Result<(), DeviceError> {
    for (path, module) in DRIVERS {
        OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => "this process may not use it".to_owned(),
                _ => format!("`modprobe {module}` did not bring it"),
            };
            DeviceError::NoLoop(format!("cannot open {path}: {error}; {advice}"))
        })?;
    }
    Ok(())
}

impl FuseLoop {
    /// Serves `volume` as a loop device.
    ///
    /// # Errors
    /// [`DeviceError::NoLoop`] when the kernel lacks FUSE or loop devices, [`DeviceError::Loop`] when it refuses one.
    pub fn start(volume: &Arc<Volume>, options: &DeviceOptions) -> Result<Self, DeviceError> {
        preflight()?;
        let channel = Channel::open().map_err(failed("open /dev/fuse"))?;
        let mount = export::mount_detached(channel.as_fd()).map_err(failed("mount the FUSE file"))?;
        let threads = session_threads(options);
        let (ledger, mut slots) = Ledger::create(threads).map_err(failed("make a ledger of requests"))?;
        ledger.set_image(identity(volume));
        let name = export::file_name(&options.label);
        let export =
            Export::new(Arc::clone(volume), channel, ledger, name.clone()).map_err(failed("start a thread"))?;
        let export = Arc::new(export);
        if let Some(slot) = slots.first_mut() {
            let resend = std::env::var_os(NO_RESEND).is_none();
            Session::begin(&export, slot, resend).map_err(failed("speak FUSE with the kernel"))?;
        }
        let session = Session::start(&export, usize::from(threads), slots, Vec::new());
        let session = session.map_err(failed("start a thread"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = rustix::fs::openat(mount.as_fd(), &*name, flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(failed("open the FUSE file"))?;
        let stat = rustix::fs::fstat(&file)
            .map_err(io::Error::from)
            .map_err(failed("look at the FUSE file"))?;
        export.ledger().set_filesystem(stat.st_dev);
        let device = LoopDevice::attach(&file, &options.label, stat.st_dev).map_err(failed("set up a loop device"))?;
        // From here on the loop device alone holds the file open, and the file the filesystem.
        drop((file, mount));
        super::queue_sysfs(device.path(), options);
        Ok(Self {
            device,
            volume: Arc::clone(volume),
            export,
            session,
        })
    }

    /// Goes on with `/dev/loopN`, N being `number`, whose process is dead. `volume` is the same as that one's, and `held` what
    /// [`FuseLoop::held`] gave. Reads that wait are answered, also those that the dead process had begun to answer.
    ///
    /// # Errors
    /// [`DeviceError::Loop`] when the device is gone or was made of another image, or when what is held belongs to another version
    /// of this program.
    pub fn resume(
        volume: &Arc<Volume>,
        options: &DeviceOptions,
        number: u32,
        held: HeldLoop,
    ) -> Result<Self, DeviceError> {
        let channel = Channel::from(held.channel);
        let threads = session_threads(options);
        let (ledger, slots) =
            Ledger::open(held.ledger, threads).map_err(|error| DeviceError::Loop(error.to_string()))?;
        if channel.has_ended() {
            return Err(DeviceError::Loop(format!("/dev/loop{number} is gone")));
        }
        if !ledger.image().agrees(identity(volume)) {
            let error = format!("/dev/loop{number} was made of another image: its bytes would be wrong");
            return Err(DeviceError::Loop(error));
        }
        let device = LoopDevice::resume(number, held.device, ledger.filesystem());
        let mut left = ledger.left();
        if ledger.negotiated().is_some_and(protocol::Negotiated::resends) {
            match channel.ask_resend() {
                // They all come again by themselves. What is in slots is answered all the same: a process that died inside
                // read(2) may have left a request there that the kernel did not yet count as handed out.
                Ok(()) => left.drain(..).for_each(|(entry, _)| entry.clear()),
                Err(error) => log::warn!("requests do not come again ({error}): answering from the ledger"),
            }
        }
        log::debug!("/dev/loop{number}: {} reads from the ledger", left.len());
        let name = export::file_name(&options.label);
        let export = Export::new(Arc::clone(volume), channel, ledger, name).map_err(failed("start a thread"))?;
        let export = Arc::new(export);
        let session = Session::start(&export, usize::from(threads), slots, left).map_err(failed("start a thread"))?;
        Ok(Self {
            device,
            volume: Arc::clone(volume),
            export,
            session,
        })
    }

    /// What another process has to hold so that this one can be killed without loss: duplicates of this one's descriptors.
    ///
    /// # Errors
    /// When this process may have no more descriptors.
    pub fn held(&self) -> io::Result<HeldLoop> {
        Ok(HeldLoop {
            channel: self.export.channel().as_fd().try_clone_to_owned()?,
            ledger: self.export.ledger().memfd().try_clone_to_owned()?,
            device: self.device.held()?,
        })
    }

    /// Closes this process's descriptor of the loop device, which then goes with its last user: the filesystem mounted on it.
    pub fn let_go(&mut self) {
        self.device.let_go();
    }

    /// The block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.device.path()
    }

    /// The number N of `/dev/loopN`.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.device.number()
    }

    /// Whether the device is still there; another process's `losetup -d` ends it, and its last user where it was let go of.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.export.channel().has_ended() && !self.session.is_finished() && loop_device::is_attached(self.number())
    }

    /// Takes the loop device and the FUSE file down. Reads in flight get a moment to finish, then fail. Where a process has the
    /// device open without a claim on it, the kernel takes it down at their close.
    ///
    /// # Errors
    /// [`DeviceError::Loop`] when the kernel refuses.
    pub fn stop(self) -> Result<(), DeviceError> {
        let Self {
            device,
            volume,
            export,
            session,
        } = self;
        let (number, path) = (device.number(), device.path().display().to_string());
        device
            .detach()
            .map_err(|error| DeviceError::Loop(format!("cannot detach {path}: {error}")))?;
        let began = Instant::now();
        // A filesystem that has ended had no loop device any more, and the number may be another's by now.
        let is_there = || !export.channel().has_ended() && loop_device::is_attached(number);
        while !session.is_finished() || is_there() {
            if began.elapsed() > STOP_GRACE {
                volume.close();
                export.give_up();
            }
            if began.elapsed() > RELEASE_LIMIT {
                log::warn!("{path} is still open in another process; the kernel removes it when it is closed");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// By what the image of `volume` is known again: its length, and its first block as far as that needs no waiting. An ext4 image's has
/// the identity that was made of its layers.
fn identity(volume: &Volume) -> ImageIdentity {
    let mut block = vec![0; 4096];
    let mut scratch = Scratch::default();
    let found = volume.look(0, &mut block, &mut scratch, &ThreadCounters::default());
    let checksum = match found {
        Ok(Found::Zero | Found::Filled) => Some(checksum::crc32c(&block)),
        Ok(Found::Memory(slice)) => Some(checksum::crc32c(&slice)),
        Ok(Found::Gaps) | Err(_) => None,
    };
    ImageIdentity {
        len: volume.len(),
        // Never 0.
        check: checksum.map_or(0, |checksum| u64::from(checksum) | 1 << 32),
    }
}

/// How many threads take the kernel's requests.
fn session_threads(options: &DeviceOptions) -> u16 {
    options.queues.clamp(1, MAX_THREADS)
}

/// Whether loop device `number` has a FUSE file of ours behind it.
#[must_use]
pub fn is_ours(number: u32) -> bool {
    loop_device::backing_file(number)
        .and_then(|file| file.strip_prefix('/').map(|name| name.starts_with(export::NAME_PREFIX)))
        .unwrap_or(false)
}
