//! The image as a loop device, for kernels without ublk. In: a volume. Out: `/dev/loopN`, served by threads of this process.
//!
//! `export` serves the image as the only file of a FUSE filesystem, and `loop_device` puts a read-only loop device on it that
//! reads around the page cache: many reads in flight, and no block cached twice. The filesystem is never attached to a
//! directory. It exists only behind descriptors of this process, so no one can see it or keep it busy, and when the
//! process ends, however it ends, nothing of it is left.

mod export;
mod loop_device;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{Session, SessionACL};
use rustix::fs::{Mode, OFlags};

use super::volume::Volume;
use super::{DeviceError, DeviceOptions, STOP_GRACE};
use export::{Export, Waiting};
use loop_device::LoopDevice;

/// How long the kernel may take to let go of a device that no process has open.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// A running loop device over a FUSE file. When it is dropped without [`FuseLoop::stop`], both end with the process.
#[derive(Debug)]
pub struct FuseLoop {
    device: LoopDevice,
    volume: Arc<Volume>,
    waiting: Arc<Waiting>,
    mount: OwnedFd,
    session: JoinHandle<io::Result<()>>,
}

/// Makes sure that this kernel has FUSE and loop devices, loading their drivers if need be.
///
/// # Errors
/// [`DeviceError::NoLoop`] with what is missing.
pub fn preflight() -> Result<(), DeviceError> {
    for (path, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
        if !Path::new(path).exists() {
            super::load_module(module, path);
        }
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
        let failed = |what: &'static str| move |error: io::Error| DeviceError::Loop(format!("cannot {what}: {error}"));
        let channel = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(failed("open /dev/fuse"))?;
        let mount = export::mount_detached(channel.as_fd()).map_err(failed("mount the FUSE file"))?;
        let mut config = fuser::Config::default();
        config.n_threads = Some(usize::from(options.queues.max(1)));
        config.clone_fd = true;
        let waiting = Arc::new(Waiting::default());
        let name = export::file_name(&options.label);
        let export = Export::new(Arc::clone(volume), Arc::clone(&waiting), &name).map_err(failed("start a thread"))?;
        let session = Session::from_fd(export, channel.into(), SessionACL::Owner, config)
            .map_err(failed("speak FUSE with the kernel"))?;
        let session = thread::Builder::new()
            .name("fuse-session".to_owned())
            .spawn(move || session.run())
            .map_err(failed("start a thread"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = rustix::fs::openat(mount.as_fd(), &*name, flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(failed("open the FUSE file"))?;
        let device = LoopDevice::attach(&file, &options.label).map_err(failed("set up a loop device"))?;
        // From here on the loop device alone holds the file open.
        drop(file);
        super::queue_sysfs(device.path(), options);
        Ok(Self {
            device,
            volume: Arc::clone(volume),
            waiting,
            mount,
            session,
        })
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

    /// Whether the device is still ours; another process's `losetup -d` ends it.
    #[must_use]
    pub fn is_running(&self) -> bool {
        loop_device::is_attached(self.device.number())
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
            waiting,
            mount,
            session,
        } = self;
        let (number, path) = (device.number(), device.path().display().to_string());
        device
            .detach()
            .map_err(|error| DeviceError::Loop(format!("cannot detach {path}: {error}")))?;
        drop(mount);
        let began = Instant::now();
        while loop_device::is_attached(number) || !session.is_finished() {
            if began.elapsed() > STOP_GRACE {
                volume.close();
                waiting.give_up();
            }
            if began.elapsed() > RELEASE_LIMIT {
                log::warn!("{path} is still open in another process; the kernel removes it when it is closed");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        match session.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!("the FUSE session ended with: {error}"),
            Err(_) => log::error!("a FUSE session thread panicked"),
        }
        Ok(())
    }
}

/// Whether loop device `number` has a FUSE file of ours behind it.
#[must_use]
pub fn is_ours(number: u32) -> bool {
    loop_device::backing_file(number)
        .and_then(|file| file.strip_prefix('/').map(|name| name.starts_with(export::NAME_PREFIX)))
        .unwrap_or(false)
}
