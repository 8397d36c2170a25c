//! The image as a ublk block device. In: a volume. Out: `/dev/ublkbN`, served by threads of this process.
//!
//! libublk stays inside this module and its parts: its next version changes everything. `queue` answers the kernel,
//! `completion` brings back what the fetch thread found, and here is what creates, starts, stops and deletes the device.
//!
//! The device is privileged (an unprivileged one has its server killed when a read takes 30 seconds, and reads over a
//! network may), read-only, of 4096-byte blocks, and recoverable: when this process dies without notice, reads wait
//! instead of failing. Control commands run on a thread of their own under a time limit, because some kernels (6.18.4,
//! 6.18.5, some 6.17) never come back from `ADD_DEV`.

mod completion;
mod control;
mod queue;
mod recovery;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use io_uring::IoUring;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};
use rustix::thread::CapabilitySet;

use super::volume::Volume;
use super::{DeviceError, DeviceOptions, STOP_GRACE, wait_until};
use crate::units::BLOCK_SIZE;
use control::DeviceState;
use queue::{QueueControl, StartLine};

const CONTROL: &str = "/dev/ublk-control";

/// How long the kernel may take to add or start a device before we call it stuck.
const CREATION_LIMIT: Duration = Duration::from_secs(30);

/// The largest read the kernel may send in one request, in bytes.
const MAX_IO_BYTES: u32 = 512 << 10;

/// A running ublk device. Dropping it without [`UblkDevice::stop`] leaves its threads serving; when the process ends, however
/// it does, the device stays, and reads wait until [`UblkDevice::resume`] in another process.
#[derive(Debug)]
pub struct UblkDevice {
    id: u32,
    path: PathBuf,
    volume: Arc<Volume>,
    queues: Queues,
    control: JoinHandle<()>,
    ended: mpsc::Receiver<()>,
}

/// What this process shares with the threads of a device's queues.
type Queues = Vec<Arc<QueueControl>>;

/// What the control thread tells while it gets the device.
enum Progress {
    /// There is a device that is not served yet.
    Added(u32, Queues),
    Started,
    Failed(DeviceError),
}

/// The device that the driver brings, and the module that it is in.
pub(super) const DRIVERS: [(&str, &str); 1] = [(CONTROL, "ublk_drv")];

/// Makes sure that this kernel can do ublk; see [`load_drivers`](super::load_drivers).
///
/// # Errors
/// [`DeviceError::NoUblk`] with what is missing.
pub fn preflight() -> Result<(), DeviceError> {
    if !Path::new(CONTROL).exists() {
        let kernel = rustix::system::uname();
        return Err(DeviceError::NoUblk(format!(
            "{CONTROL} is missing and `modprobe ublk_drv` did not bring it (kernel {})",
            kernel.release().to_string_lossy()
        )));
    }
    match fs::OpenOptions::new().read(true).write(true).open(CONTROL) {
        Ok(_) => Ok(()),
        Err(error) => Err(DeviceError::NoUblk(format!("cannot open {CONTROL}: {error}"))),
    }
}

impl UblkDevice {
    /// Adds a device that serves `volume` and starts it.
    ///
    /// # Errors
    /// [`DeviceError::NoUblk`] when there is no driver, [`DeviceError::Ublk`] when it refuses or does not come back.
    pub fn start(volume: &Arc<Volume>, options: &DeviceOptions) -> Result<Self, DeviceError> {
        preflight()?;
        let (shared, chosen) = (Arc::clone(volume), options.clone());
        let device = Self::launch(volume, CREATION_LIMIT, move |tell| create(&shared, &chosen, tell))
            .map_err(|failure| failure.unwrap_or_else(|| stuck("add or start a device", CREATION_LIMIT)))?;
        if !wait_until(Duration::from_secs(5), || is_block_device(&device.path)) {
            let path = device.path.display().to_string();
            let _ = device.stop();
            return Err(DeviceError::Ublk(format!(
                "{path} did not appear; is devtmpfs mounted on /dev?"
            )));
        }
        recovery::spare_a_tag(device.id, options.depth);
        super::queue_sysfs(&device.path, options);
        Ok(device)
    }

    /// Takes over device `id`, whose server is gone or about to be: `volume`, which must be the image that it was started
    /// with, answers the reads that wait. The device keeps its queues and the size of its requests, whatever `options` say.
    ///
    /// # Errors
    /// [`DeviceError::UblkLost`] when the device can only be deleted ([`delete_dead`]). [`DeviceError::Ublk`] when another
    /// process serves it, when it is another image's, or when the driver refuses or does not come back: then the device is as
    /// it was, and reads wait on.
    pub fn resume(volume: &Arc<Volume>, options: &DeviceOptions, id: u32) -> Result<Self, DeviceError> {
        preflight()?;
        let (shared, chosen) = (Arc::clone(volume), options.clone());
        let limit = recovery::LIMIT + CREATION_LIMIT;
        Self::launch(volume, limit, move |tell| take_over(&shared, &chosen, id, tell))
            .map_err(|failure| failure.unwrap_or_else(|| stuck(&format!("give us device {id}"), limit)))
    }

    /// Runs `control` on a thread of its own, which gets a device and serves it to its end. Fails with nothing when that takes
    /// longer than `limit`; the thread then gives its device up as soon as it has it.
    fn launch(
        volume: &Arc<Volume>,
        limit: Duration,
        control: impl FnOnce(&mpsc::Sender<Progress>) -> Result<(), DeviceError> + Send + 'static,
    ) -> Result<Self, Option<DeviceError>> {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let control = thread::Builder::new()
            .name("ublk-control".to_owned())
            .spawn(move || {
                if let Err(error) = control(&tell) {
                    let _ = tell.send(Progress::Failed(error));
                }
                drop(end);
            })
            .map_err(|error| DeviceError::Ublk(format!("cannot start a thread: {error}")))?;
        let mut added = None;
        let deadline = Instant::now() + limit;
        let (id, queues) = loop {
            match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Progress::Added(id, queues)) => added = Some((id, queues)),
                Ok(Progress::Failed(error)) => return Err(Some(error)),
                Ok(Progress::Started) => {
                    break added
                        .take()
                        .ok_or_else(|| DeviceError::Ublk("the driver started a device without a number".to_owned()))?;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Some(DeviceError::Ublk("its control thread died".to_owned())));
                }
                Err(RecvTimeoutError::Timeout) => return Err(None),
            }
        };
        Ok(Self {
            id,
            path: path_of(id),
            volume: Arc::clone(volume),
            queues,
            control,
            ended,
        })
    }

    /// The block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The driver's number of the device.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether its threads still serve; they end when another process stops or deletes the device.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !matches!(self.ended.try_recv(), Err(mpsc::TryRecvError::Disconnected))
    }

    /// Stops and deletes the device. Reads in flight get a moment to finish, then fail.
    ///
    /// # Errors
    /// [`DeviceError::Ublk`] when the driver does not let go in time.
    pub fn stop(self) -> Result<(), DeviceError> {
        let id = self.id;
        // The number is given out again at once, maybe to another thread of this process.
        let node = node(id);
        for queue in &self.queues {
            queue.stop();
        }
        // STOP_DEV returns once every request is answered, so it may not run on a thread that has to see to that.
        thread::Builder::new()
            .name("ublk-stop".to_owned())
            .spawn(move || {
                if let Err(error) = control::stop(id) {
                    log::warn!("ublk device {id} does not stop: {error}");
                }
            })
            .map_err(|error| DeviceError::Ublk(format!("cannot start a thread: {error}")))?;
        let deadline = Instant::now() + CREATION_LIMIT;
        let mut grace = Instant::now() + STOP_GRACE;
        while let Err(RecvTimeoutError::Timeout) =
            self.ended.recv_timeout(grace.saturating_duration_since(Instant::now()))
        {
            self.volume.close();
            for queue in &self.queues {
                queue.give_up();
            }
            grace = Instant::now() + Duration::from_millis(200);
            if Instant::now() > deadline {
                return Err(DeviceError::Ublk(format!("the driver does not let go of device {id}")));
            }
        }
        let _ = self.control.join();
        wait_until_gone(id, node)
    }

    /// Stops serving without stopping the device, for the process that is to go on with it ([`UblkDevice::resume`]): its number.
    /// Reads that are not answered yet wait.
    ///
    /// # Errors
    /// [`DeviceError::Ublk`] when the queues do not end in time; when this process ends they will.
    pub fn hand_over(self) -> Result<u32, DeviceError> {
        for queue in &self.queues {
            queue.leave();
        }
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(CREATION_LIMIT) {
            return Err(DeviceError::Ublk(format!(
                "the queues of device {} do not end",
                self.id
            )));
        }
        let _ = self.control.join();
        let at_rest = || control::info(self.id).is_ok_and(|info| info.state != DeviceState::Live);
        if !wait_until(STOP_GRACE, at_rest) {
            log::warn!("the driver takes its time to put device {} to rest", self.id);
        }
        Ok(self.id)
    }
}

fn stuck(what: &str, limit: Duration) -> DeviceError {
    DeviceError::Ublk(format!(
        "the driver did not {what} within {} s; kernels 6.18.4, 6.18.5 and some 6.17 hang here and need an update, and until \
         the next boot `--backend loop`",
        limit.as_secs()
    ))
}

/// Deletes a device that its server, process `server`, left behind.
///
/// # Errors
/// [`DeviceError::Ublk`] when another process serves a device of this number, or the driver refuses or does not come back.
pub fn delete_dead(id: u32, server: u32) -> Result<(), DeviceError> {
    let node = node(id);
    of_dead(id, server, "delete", move || {
        // A device that stopped halfway is deleted all the same.
        let stopped = control::stop(id);
        control::delete(id).or(stopped)
    })?;
    wait_until_gone(id, node)
}

/// Stops a device that its server, process `server`, left behind: reads that wait for an answer fail. It may be mounted.
///
/// # Errors
/// As [`delete_dead`].
pub fn stop_dead(id: u32, server: u32) -> Result<(), DeviceError> {
    of_dead(id, server, "stop", move || control::stop(id))
}

/// Does something to a device whose server is gone, on a thread of its own and under a time limit.
fn of_dead(
    id: u32,
    server: u32,
    what: &str,
    command: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), DeviceError> {
    if !exists(id) {
        return Ok(());
    }
    let info = control::info(id).map_err(|error| DeviceError::Ublk(format!("cannot ask for device {id}: {error}")))?;
    // The driver says -1 for a server that is gone.
    if info.state == DeviceState::Live && u32::try_from(info.server).is_ok_and(|now| now != 0 && now != server) {
        return Err(DeviceError::Ublk(format!(
            "device {id} belongs to process {} now",
            info.server
        )));
    }
    let (tell, told) = mpsc::channel();
    thread::Builder::new()
        .name(format!("ublk-{what}"))
        .spawn(move || {
            let _ = tell.send(command());
        })
        .map_err(|error| DeviceError::Ublk(format!("cannot start a thread: {error}")))?;
    match told.recv_timeout(CREATION_LIMIT) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(DeviceError::Ublk(format!("cannot {what} device {id}: {error}"))),
        Err(_) => Err(DeviceError::Ublk(format!("the driver does not let go of device {id}"))),
    }
}

/// Whether the driver knows device `id`.
#[must_use]
pub fn exists(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
        || Path::new(&format!("/sys/block/ublkb{id}")).exists()
}

/// What tells the device that has a number now apart from others that had it, or will: the inode of its directory in sysfs. None if there is
/// no such device.
fn node(id: u32) -> Option<u64> {
    let dir = fs::metadata(format!("/sys/class/ublk-char/ublkc{id}")).ok()?;
    Some(dir.ino())
}

/// Waits until the driver has forgotten device `id`, which was deleted and had this `node`; another device may have its number by then.
fn wait_until_gone(id: u32, node_before: Option<u64>) -> Result<(), DeviceError> {
    let is_another = || node_before.is_some() && node(id).is_some_and(|now| Some(now) != node_before);
    if wait_until(Duration::from_secs(5), || !exists(id) || is_another()) {
        Ok(())
    } else {
        Err(DeviceError::Ublk(format!(
            "device {id} was stopped but is still listed"
        )))
    }
}

fn path_of(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The control thread of a new device: creates it, starts it, and serves it to its end.
fn create(volume: &Arc<Volume>, options: &DeviceOptions, tell: &mpsc::Sender<Progress>) -> Result<(), DeviceError> {
    // Until it is disowned, dropping this deletes the device.
    let ctrl = UblkCtrlBuilder::default()
        .name("tarblk")
        .nr_queues(options.queues)
        .depth(options.depth)
        .io_buf_bytes(MAX_IO_BYTES)
        .ctrl_flags(u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| failure("add", &error))?;
    let id = ctrl.dev_info().dev_id;
    let served = Served::open(ctrl, volume, options, tell)?;
    let started = match served.ctrl.start_dev(&served.dev) {
        // libublk takes "busy" for success.
        Ok(code) if code < 0 => Err(failure("start", &UblkError::OtherError(code))),
        Ok(_) => Ok(()),
        Err(error) => Err(failure("start", &error)),
    };
    if started.is_ok() && tell.send(Progress::Started).is_ok() {
        served.ctrl.disown();
        log::debug!("ublk device {id} is started");
    } else {
        // It is of no use: this ends the queues, which wait for requests that will never come.
        let _ = served.ctrl.kill_dev();
    }
    served.serve_out();
    started
}

/// The control thread of a device that another process started: takes it over and serves it to its end.
fn take_over(
    volume: &Arc<Volume>,
    options: &DeviceOptions,
    id: u32,
    tell: &mpsc::Sender<Progress>,
) -> Result<(), DeviceError> {
    let info = recovery::begin(id, volume.len())?;
    let ctrl = UblkCtrlBuilder::default()
        .name("tarblk")
        .id(i32::try_from(id).map_err(|_| DeviceError::Ublk(format!("there is no device {id}")))?)
        .nr_queues(info.queues)
        .depth(info.depth)
        .io_buf_bytes(info.io_bytes)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(|error| failure("give us", &error))?;
    let served = Served::open(ctrl, volume, options, tell)?;
    let started = control::end_recovery(id, std::process::id())
        .map_err(|error| DeviceError::Ublk(format!("the driver did not give us device {id}: {error}")));
    if started.is_err() || tell.send(Progress::Started).is_err() {
        served.leave();
    }
    served.serve_out();
    started
}

/// A device that this process serves, as its control thread has it.
struct Served {
    ctrl: UblkCtrl,
    dev: Arc<UblkDev>,
    controls: Queues,
    /// What a thread returns is to be kept until it has ended, and no longer.
    threads: Vec<JoinHandle<Option<IoUring>>>,
}

impl Served {
    /// Opens the device of `ctrl`, and starts its queues.
    fn open(
        ctrl: UblkCtrl,
        volume: &Arc<Volume>,
        options: &DeviceOptions,
        tell: &mpsc::Sender<Progress>,
    ) -> Result<Self, DeviceError> {
        let info = ctrl.dev_info();
        let controls: Queues = (0..info.nr_hw_queues)
            .map(|_| QueueControl::new(info.queue_depth))
            .collect();
        let _ = tell.send(Progress::Added(info.dev_id, controls.clone()));
        let size = volume.len();
        let dev = UblkDev::new("tarblk".to_owned(), |dev| describe(dev, size), &ctrl)
            .map_err(|error| failure("open", &error))?;
        let mut served = Self {
            ctrl,
            dev: Arc::new(dev),
            controls,
            threads: Vec::new(),
        };
        let start_line = StartLine::new(served.controls.len());
        match served.start_queues(volume, options.pin_queues, &start_line) {
            Ok(()) => Ok(served),
            Err(error) => {
                start_line.call_off();
                served.leave();
                served.serve_out();
                Err(error)
            }
        }
    }

    /// Starts the queue threads and waits until each has its first requests ready: only then may `START_DEV` or
    /// `END_USER_RECOVERY` be called, which wait for them without a limit.
    fn start_queues(
        &mut self,
        volume: &Arc<Volume>,
        pin: bool,
        start_line: &Arc<StartLine>,
    ) -> Result<(), DeviceError> {
        let (tell, told) = mpsc::channel();
        for (id, control) in (0u16..).zip(&self.controls) {
            let (dev, volume, control, start_line, tell) = (
                Arc::clone(&self.dev),
                Arc::clone(volume),
                Arc::clone(control),
                Arc::clone(start_line),
                tell.clone(),
            );
            let thread = thread::Builder::new().name(format!("ublk-queue-{id}")).spawn(move || {
                // Marks the thread as one that memory reclaim waits for, so that it never waits for reclaim itself.
                let tid = UblkCtrl::init_queue_thread();
                give_up_administration();
                queue::serve(id, &dev, &volume, &control, &start_line, |ready| {
                    let _ = tell.send((id, tid, ready));
                })
            });
            self.threads
                .push(thread.map_err(|error| DeviceError::Ublk(format!("cannot start a thread: {error}")))?);
        }
        drop(tell);
        for _ in 0..self.threads.len() {
            let (id, tid, ready) = told
                .recv()
                .map_err(|_| DeviceError::Ublk("a queue thread died".to_owned()))?;
            ready.map_err(|error| failure("set up a queue of", &error))?;
            if pin {
                self.ctrl.set_thread_affinity(id, tid);
            }
        }
        Ok(())
    }

    /// Ends the queues without stopping the device.
    fn leave(&self) {
        for control in &self.controls {
            control.leave();
        }
    }

    /// Waits until the queues end, and deletes the device if that is because it was stopped.
    fn serve_out(self) {
        let Self { ctrl, dev, threads, .. } = self;
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a ublk queue thread panicked");
            }
        }
        let id = ctrl.dev_info().dev_id;
        // The driver deletes a device only after its last user is gone, and `dev` holds it open.
        drop(dev);
        drop(ctrl);
        match control::info(id) {
            Ok(info) if info.state == DeviceState::Dead => {
                if let Err(error) = control::delete(id) {
                    log::debug!("ublk device {id} is deleted by another process: {error}");
                }
            }
            Ok(info) => log::info!("ublk device {id} is left to another server ({:?})", info.state),
            Err(_) => {}
        }
    }
}

/// Takes `CAP_SYS_ADMIN` from a queue's thread. The driver does not trust the device of such a thread, so that nobody looks for
/// partitions in it: a server that is killed while the kernel does that in its name would never end, and the rest of what it
/// serves could not be served again.
fn give_up_administration() {
    let dropped = rustix::thread::capabilities(None).and_then(|mut sets| {
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        sets.permitted.remove(CapabilitySet::SYS_ADMIN);
        sets.inheritable.remove(CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets)
    });
    if let Err(error) = dropped {
        log::warn!("a ublk queue keeps CAP_SYS_ADMIN: {error}");
    }
}

/// The parameters of the device: read-only, blocks of 4096 bytes, and no volatile cache, because there is nothing to flush.
fn describe(dev: &mut UblkDev, size: u64) -> Result<(), UblkError> {
    let shift = u8::try_from(BLOCK_SIZE.ilog2()).map_err(|_| UblkError::InvalidVal)?;
    dev.tgt.dev_size = size;
    dev.tgt.params = sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_READ_ONLY,
            logical_bs_shift: shift,
            physical_bs_shift: shift,
            io_opt_shift: shift,
            io_min_shift: shift,
            max_sectors: dev.dev_info.max_io_buf_bytes >> 9,
            dev_sectors: size >> 9,
            ..Default::default()
        },
        ..Default::default()
    };
    Ok(())
}

/// libublk's errors carry numbers that its messages leave out.
fn failure(what: &str, error: &UblkError) -> DeviceError {
    let code = match error {
        UblkError::OtherError(code) | UblkError::UringIOError(code) => Some(code.saturating_neg()),
        UblkError::IOError(error) => error.raw_os_error(),
        _ => None,
    };
    let cause = code.map_or_else(
        || error.to_string(),
        |code| std::io::Error::from_raw_os_error(code).to_string(),
    );
    let advice = match code {
        Some(libc::EACCES) => {
            "; the driver's limit on devices may be reached: `modprobe -r ublk_drv; modprobe ublk_drv ublks_max=4096`"
        }
        Some(libc::EPERM) => "; this needs CAP_SYS_ADMIN",
        _ => "",
    };
    DeviceError::Ublk(format!("the driver did not {what} the device: {cause}{advice}"))
}

fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() != 0)
}
