//! Taking over a device whose server is gone. In: the device's number. Out: a device that waits for the queues of this
//! process, or why it cannot be had.
//!
//! A device that was made with `USER_RECOVERY` and `USER_RECOVERY_REISSUE` outlives its server: the driver puts it to rest
//! (`QUIESCED`) once the dead process has let go of `/dev/ublkcN`, keeps its requests, and sends those that were not answered
//! to the next server. `START_USER_RECOVERY` makes the driver forget the old queues, the new ones fetch, and
//! `END_USER_RECOVERY` lets requests through.
//!
//! The next server may be killed in the middle of this too. Drivers since Linux 6.16 forget its queues by themselves. Older
//! ones do not: `START_USER_RECOVERY` then fails when no queue was ready, and breaks the kernel when some were and others were
//! not (it drops a reference that the others do not have). So there every queue is made ready first, by a thread that ends at
//! once ([`complete_queues`]).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use libublk::helpers::IoBuf;
use libublk::sys;

use super::control::{self, DeviceInfo, DeviceState};
use crate::device::DeviceError;
use crate::units::BLOCK_SIZE;

/// How long a dead server may take to let go of its device. Drivers before 6.15 may need their request timeout of 30 s: see
/// [`spare_a_tag`].
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// How long a server that seems alive may serve on: it may have been killed a moment ago.
const SERVER_GRACE: Duration = Duration::from_secs(5);

/// How long the driver's own clean-up may take to come after the end of a thread that completed queues.
const SETTLING: Duration = Duration::from_millis(50);

/// What to do about a device that is to be taken over.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Take it over now.
    TakeOver,
    /// The driver has not noticed yet that its server is gone.
    Wait,
    /// It cannot be taken over, now or later.
    Lost(String),
    /// Process so-and-so serves it.
    Served(i32),
}

/// Judges a device by what the driver says. `server_lives` is whether the process that serves it has not ended, `waited` how
/// long this has been asked.
fn judge(info: &DeviceInfo, server_lives: bool, waited: Duration) -> Verdict {
    match info.state {
        DeviceState::Dead => Verdict::Lost("its server ended before it was started, or it was stopped".to_owned()),
        _ if !info.recoverable => Verdict::Lost("it was not made to be taken over".to_owned()),
        DeviceState::FailIo => Verdict::Lost("it was made to fail reads while it has no server".to_owned()),
        DeviceState::Unknown(state) => {
            Verdict::Lost(format!("it is in a state that this program does not know ({state})"))
        }
        DeviceState::Quiesced => Verdict::TakeOver,
        DeviceState::Live if server_lives && waited >= SERVER_GRACE => Verdict::Served(info.server),
        DeviceState::Live => Verdict::Wait,
    }
}

/// Readies device `id` for the queues of this process, once its old server is gone; `size` in bytes is what it has to have.
/// What it was made with: the new queues have to be like the old ones.
///
/// # Errors
/// [`DeviceError::UblkLost`] when it can only be deleted; [`DeviceError::Ublk`] when another process serves it, when it is the
/// device of another image, or when the driver refuses.
pub(super) fn begin(id: u32, size: u64) -> Result<DeviceInfo, DeviceError> {
    let began = Instant::now();
    let mut look = Looks::default();
    let info = loop {
        let info = control::info(id).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => lost(id, "it is gone".to_owned()),
            _ => refused(id, "tell of", &error),
        })?;
        match judge(&info, another_lives(info.server), began.elapsed()) {
            Verdict::TakeOver => break info,
            Verdict::Wait if began.elapsed() < LIMIT => look.pause(),
            Verdict::Wait => {
                return Err(DeviceError::Ublk(format!(
                    "the driver does not notice that the server of device {id} is gone"
                )));
            }
            Verdict::Lost(cause) => return Err(lost(id, cause)),
            Verdict::Served(server) => {
                return Err(DeviceError::Ublk(format!("process {server} serves device {id}")));
            }
        }
    };
    // Before anything is changed: the device of another image is to stay as it is.
    let params = control::params(id).map_err(|error| refused(id, "tell of", &error))?;
    check_params(id, &params, size)?;
    let mut complete = !driver_cleans_up();
    loop {
        let taken = if complete {
            complete_queues(id, &info)
        } else {
            control::start_recovery(id)
        };
        match taken {
            Ok(()) if complete => complete = false,
            Ok(()) => return Ok(info),
            // The dead process has not ended yet, or somebody looks at the device's other half for a moment.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && began.elapsed() < LIMIT => look.pause(),
            Err(error) => return Err(refused(id, "give us", &error)),
        }
    }
}

/// Pauses between looks at a device: short at first, because readers wait.
#[derive(Debug, Default)]
struct Looks(u32);

impl Looks {
    fn pause(&mut self) {
        self.0 += 1;
        thread::sleep(Duration::from_millis(if self.0 < 100 { 1 } else { 20 }));
    }
}

fn lost(id: u32, cause: String) -> DeviceError {
    DeviceError::UblkLost { id, cause }
}

fn refused(id: u32, what: &str, error: &io::Error) -> DeviceError {
    DeviceError::Ublk(format!("the driver did not {what} device {id}: {error}"))
}

/// Makes sure that a device was made for an image of `size` bytes as tarblk makes them.
fn check_params(id: u32, params: &sys::ublk_param_basic, size: u64) -> Result<(), DeviceError> {
    let has = params.dev_sectors.saturating_mul(512);
    let is_ours = params.attrs & sys::UBLK_ATTR_READ_ONLY != 0
        && 1u64.checked_shl(params.logical_bs_shift.into()) == Some(BLOCK_SIZE);
    if has == size && is_ours {
        return Ok(());
    }
    let kind = if is_ours {
        ""
    } else {
        " that can be written to or has other blocks"
    };
    Err(DeviceError::Ublk(format!(
        "device {id} is another image's: it has {has} bytes{kind}, this image has {size}"
    )))
}

/// Whether another process serves a device, for all that can be seen from outside. This one does not: it asks.
fn another_lives(server: i32) -> bool {
    u32::try_from(server) != Ok(std::process::id()) && process_lives(server)
}

/// Whether process `pid` has not ended.
fn process_lives(pid: i32) -> bool {
    if pid <= 0 {
        return false;
    }
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state is the first field after the name, which is in parentheses and may contain any.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// Whether the driver puts a device to rest as soon as its server lets go of it, and forgets its queues (Linux 6.15; the
/// feature asked for came right after).
pub(super) fn driver_cleans_up() -> bool {
    control::features().is_ok_and(|features| features & u64::from(sys::UBLK_F_QUIESCE) != 0)
}

/// Makes every queue of a device ready that is not, and lets go of them again. Fails with `EBUSY` as long as another process
/// has the device open.
///
/// All requests are fetched by one system call, so that a kill leaves all queues ready or none more than before.
fn complete_queues(id: u32, info: &DeviceInfo) -> io::Result<()> {
    let (queues, depth) = (info.queues, info.depth);
    // On a thread of its own, because the driver counts a queue as abandoned only when the thread that fetched has ended.
    let completing = thread::spawn(move || -> io::Result<(bool, IoUring, IoBuf<u8>)> {
        let char_device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/ublkc{id}"))?;
        let total = u32::from(queues) * u32::from(depth);
        let mut ring = IoUring::new(total.next_power_of_two())?;
        // The driver wants an address, to which it writes only what is written to the device.
        let unused = IoBuf::<u8>::new(usize::try_from(BLOCK_SIZE).map_err(io::Error::other)?);
        let address = u64::try_from(unused.as_ptr().expose_provenance()).map_err(io::Error::other)?;
        for queue in 0..queues {
            for tag in 0..depth {
                // struct ublksrv_io_cmd: q_id, tag, result, addr.
                let mut body = [0u8; 16];
                body[0..2].copy_from_slice(&queue.to_ne_bytes());
                body[2..4].copy_from_slice(&tag.to_ne_bytes());
                body[8..16].copy_from_slice(&address.to_ne_bytes());
                let entry = opcode::UringCmd16::new(types::Fd(char_device.as_raw_fd()), sys::UBLK_U_IO_FETCH_REQ)
                    .cmd(body)
                    .build();
                // SAFETY: nothing is ever written to a read-only device, so nobody writes to `unused`.
                #[allow(unsafe_code)]
                let pushed = unsafe { ring.submission().push(&entry) };
                pushed.map_err(io::Error::other)?;
            }
        }
        ring.submit()?;
        // Queues that are ready refuse at once.
        let refused = ring.completion().count();
        Ok((
            refused < usize::try_from(total).map_err(io::Error::other)?,
            ring,
            unused,
        ))
    });
    // The fetches end with the thread: not before that may the ring be closed (see `queue::serve`).
    let (completed, ring, unused) = completing.join().map_err(|_| io::Error::other("a thread panicked"))??;
    drop((ring, unused));
    if completed {
        log::info!("ublk device {id}: its last server ended while it took the device over");
        thread::sleep(SETTLING);
    }
    Ok(())
}

/// How long a device's start waits for [`spare_a_tag`].
const SPARING_LIMIT: Duration = Duration::from_secs(1);

/// Keeps one tag of each queue of depth `depth` free, where the driver learns of its server's end only by what it holds of
/// requests that have not come: with every tag in flight, reads would wait for the request timeout (30 s) first.
///
/// The kernel lets the requests in flight end before it changes this, and holds new ones back meanwhile. So only on a device that
/// has just been started, whose only reader is udev; and by another process, because this one, if it were killed while it waits
/// for requests that it has to answer itself, would never end.
pub(super) fn spare_a_tag(id: u32, depth: u16) {
    if driver_cleans_up() {
        return;
    }
    let (tell, told) = mpsc::channel();
    let sparing = thread::Builder::new().name("ublk-tags".to_owned()).spawn(move || {
        let knob = format!("/sys/block/ublkb{id}/queue/nr_requests");
        let written = Command::new("sh")
            .args(["-c", "echo \"$0\" >\"$1\"", &depth.saturating_sub(1).to_string(), &knob])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !written.is_ok_and(|status| status.success()) {
            log::warn!("cannot set {knob}");
        }
        let _ = tell.send(());
    });
    if sparing.is_ok() && told.recv_timeout(SPARING_LIMIT) == Err(RecvTimeoutError::Timeout) {
        log::warn!("the kernel takes its time to spare a request of device {id}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(state: DeviceState) -> DeviceInfo {
        DeviceInfo {
            server: 7,
            state,
            queues: 2,
            depth: 128,
            io_bytes: 512 << 10,
            recoverable: true,
        }
    }

    #[test]
    fn a_device_at_rest_is_taken_over() {
        for lives in [false, true] {
            // The number of the last server may be another process's by now.
            assert_eq!(
                judge(&info(DeviceState::Quiesced), lives, Duration::ZERO),
                Verdict::TakeOver
            );
        }
    }

    #[test]
    fn a_live_device_is_waited_for_and_left_to_a_server_that_lives_on() {
        let live = info(DeviceState::Live);
        let hour = Duration::from_secs(3600);
        assert_eq!(judge(&live, false, hour), Verdict::Wait);
        assert_eq!(judge(&live, true, Duration::ZERO), Verdict::Wait);
        assert_eq!(judge(&live, true, SERVER_GRACE), Verdict::Served(7));
    }

    #[test]
    fn a_device_that_no_server_can_have_is_lost() {
        for state in [DeviceState::Dead, DeviceState::FailIo, DeviceState::Unknown(9)] {
            assert!(matches!(judge(&info(state), false, Duration::ZERO), Verdict::Lost(_)));
        }
        let foreign = DeviceInfo {
            recoverable: false,
            ..info(DeviceState::Live)
        };
        assert!(matches!(judge(&foreign, false, Duration::ZERO), Verdict::Lost(_)));
    }

    #[test]
    fn only_the_same_image_goes_on() {
        let params = sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_READ_ONLY,
            logical_bs_shift: 12,
            dev_sectors: 80,
            ..Default::default()
        };
        assert!(check_params(3, &params, 40_960).is_ok());
        let error = check_params(3, &params, 45_056).unwrap_err().to_string();
        assert_eq!(
            error,
            "ublk: device 3 is another image's: it has 40960 bytes, this image has 45056"
        );
        let writable = sys::ublk_param_basic { attrs: 0, ..params };
        assert!(check_params(3, &writable, 40_960).is_err());
        let small_blocks = sys::ublk_param_basic {
            logical_bs_shift: 9,
            ..params
        };
        assert!(check_params(3, &small_blocks, 40_960).is_err());
    }

    #[test]
    fn processes_that_ended_are_known() {
        assert!(!process_lives(-1) && !process_lives(0));
        let this = i32::try_from(std::process::id()).unwrap();
        assert!(process_lives(this) && !another_lives(this));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(process_lives(pid));
        child.kill().unwrap();
        // A zombie, until it is waited for.
        while process_lives(pid) {
            thread::sleep(Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert!(!process_lives(pid));
    }
}
