//! Control commands that libublk does not send as tarblk needs them: what state a device is in, stop it, delete it, and the
//! steps of taking it over.
//!
//! libublk's handle on a foreign device prints to stderr when it does not find a file of libublk's own, which tarblk does not
//! write, and it takes the driver's "busy" for success. The commands are small enough to be sent here (`linux/ublk_cmd.h`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use super::CONTROL;

/// What a device is doing, as the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceState {
    /// It has no block device: it was never started, or it was stopped.
    Dead,
    /// It has a block device and a server, though that may have died a moment ago.
    Live,
    /// Its server is gone, and reads wait for the next one.
    Quiesced,
    /// Its server is gone, and reads fail. tarblk makes no such devices.
    FailIo,
    /// A state that drivers of today do not have.
    Unknown(u16),
}

impl From<u16> for DeviceState {
    fn from(state: u16) -> Self {
        match u32::from(state) {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => Self::FailIo,
            _ => Self::Unknown(state),
        }
    }
}

/// What the driver knows of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    /// The process that serves it, or did so last; negative or zero when there was none.
    pub(super) server: i32,
    pub(super) state: DeviceState,
    /// Hardware queues.
    pub(super) queues: u16,
    /// Requests in flight in each queue.
    pub(super) depth: u16,
    /// The largest request, in bytes.
    pub(super) io_bytes: u32,
    /// Whether another process may take it over, and gets the requests that the one before did not answer.
    pub(super) recoverable: bool,
}

/// Reads what the driver knows of device `id`. Does not wait for anything that the device does.
pub(super) fn info(id: u32) -> io::Result<DeviceInfo> {
    let mut info = Box::new(sys::ublksrv_ctrl_dev_info::default());
    read(sys::UBLK_U_CMD_GET_DEV_INFO, id, &mut *info)?;
    let recovery = u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE);
    Ok(DeviceInfo {
        server: info.ublksrv_pid,
        state: info.state.into(),
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        io_bytes: info.max_io_buf_bytes,
        recoverable: info.flags & recovery == recovery,
    })
}

/// The size and the kind of blocks that device `id` was started with. Waits while the driver puts the device to rest.
pub(super) fn params(id: u32) -> io::Result<sys::ublk_param_basic> {
    let mut params = Box::new(sys::ublk_params {
        len: u32::try_from(size_of::<sys::ublk_params>()).map_err(io::Error::other)?,
        ..Default::default()
    });
    read(sys::UBLK_U_CMD_GET_PARAMS, id, &mut *params)?;
    Ok(params.basic)
}

/// What the driver can do, as `UBLK_F_` bits. Linux 6.5.
pub(super) fn features() -> io::Result<u64> {
    let mut features = Box::new(0u64);
    read(sys::UBLK_U_CMD_GET_FEATURES, u32::MAX, &mut *features)?;
    Ok(*features)
}

/// Takes the block device down. Returns when no request is in flight any more.
pub(super) fn stop(id: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_STOP_DEV, id, 0, 0, 0)
}

/// Deletes a stopped device. From Linux 6.7 on it is not waited for: the driver waits until the device's number is free, and one that
/// another device was given at once is not free before that goes, too. Until its last user has gone the device is still listed.
pub(super) fn delete(id: u32) -> io::Result<()> {
    match send(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, 0, 0, 0) {
        Err(error) if error.raw_os_error() != Some(libc::ENODEV) => send(sys::UBLK_U_CMD_DEL_DEV, id, 0, 0, 0),
        other => other,
    }
}

/// Makes a device ready for another server. Fails with `EBUSY` as long as the one before holds something of it.
pub(super) fn start_recovery(id: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_START_USER_RECOVERY, id, 0, 0, 0)
}

/// Lets process `server`, this one, serve a device. Waits without a limit until every queue has fetched its first requests.
pub(super) fn end_recovery(id: u32, server: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_END_USER_RECOVERY, id, 0, 0, server.into())
}

/// Sends a command that fills `buffer`, and waits for its end.
fn read<T>(command: u32, id: u32, buffer: &mut T) -> io::Result<()> {
    send(
        command,
        id,
        std::ptr::from_mut(buffer).expose_provenance(),
        size_of::<T>(),
        0,
    )
}

/// Sends a command and waits for its end. The `len` bytes at `address` are the command's buffer, if it has one.
fn send(command: u32, id: u32, address: usize, len: usize, data: u64) -> io::Result<()> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    match send_encoded(&control, command, id, address, len, data) {
        // Drivers before 6.4 know the commands by their bare number only.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            send_encoded(&control, command & 0xff, id, address, len, data)
        }
        result => result,
    }
}

fn send_encoded(control: &File, command: u32, id: u32, address: usize, len: usize, data: u64) -> io::Result<()> {
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(2)?;
    // struct ublksrv_ctrl_cmd: dev_id, queue_id (none), len, addr, data[1], dev_path_len, pad, reserved.
    let mut body = [0u8; 80];
    body[0..4].copy_from_slice(&id.to_ne_bytes());
    body[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    body[6..8].copy_from_slice(&u16::try_from(len).map_err(io::Error::other)?.to_ne_bytes());
    body[8..16].copy_from_slice(&u64::try_from(address).map_err(io::Error::other)?.to_ne_bytes());
    body[16..24].copy_from_slice(&data.to_ne_bytes());
    let entry = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), command)
        .cmd(body)
        .build();
    // SAFETY: the buffer at `address` is the caller's and outlives the command, because this waits for its end.
    #[allow(unsafe_code)]
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.map_err(io::Error::other)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        if let Some(done) = ring.completion().next() {
            return match done.result() {
                failed if failed < 0 => Err(io::Error::from_raw_os_error(-failed)),
                _ => Ok(()),
            };
        }
    }
}
