//! Control commands for a device that this process did not create: what state it is in, stop it, delete it.
//!
//! libublk's handle on a foreign device prints to stderr when it does not find a file of libublk's own, which tarblk does not
//! write. The three commands that a clean-up needs are small enough to be sent here (`linux/ublk_cmd.h`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use super::CONTROL;

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    /// The process that serves it; negative or zero when there is none.
    pub(super) server: i32,
    /// Whether a process serves it.
    pub(super) live: bool,
}

/// Reads what the driver knows of device `id`.
pub(super) fn info(id: u32) -> io::Result<DeviceInfo> {
    let mut info = Box::new(sys::ublksrv_ctrl_dev_info::default());
    let address = std::ptr::from_mut(&mut *info).expose_provenance();
    send(
        sys::UBLK_U_CMD_GET_DEV_INFO,
        id,
        address,
        size_of::<sys::ublksrv_ctrl_dev_info>(),
    )?;
    Ok(DeviceInfo {
        server: info.ublksrv_pid,
        live: u32::from(info.state) == sys::UBLK_S_DEV_LIVE,
    })
}

/// Takes the block device down. Returns when no request is in flight any more.
pub(super) fn stop(id: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_STOP_DEV, id, 0, 0)
}

/// Deletes a stopped device.
pub(super) fn delete(id: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_DEL_DEV, id, 0, 0)
}

/// Sends a command and waits for its end. The `len` bytes at `address` are the command's buffer, if it has one.
fn send(command: u32, id: u32, address: usize, len: usize) -> io::Result<()> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    match send_encoded(&control, command, id, address, len) {
        // Drivers before 6.4 know the commands by their bare number only.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            send_encoded(&control, command & 0xff, id, address, len)
        }
        result => result,
    }
}

fn send_encoded(control: &File, command: u32, id: u32, address: usize, len: usize) -> io::Result<()> {
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(2)?;
    // struct ublksrv_ctrl_cmd: dev_id, queue_id (none), len, addr, data[1], dev_path_len, pad, reserved.
    let mut body = [0u8; 80];
    body[0..4].copy_from_slice(&id.to_ne_bytes());
    body[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    body[6..8].copy_from_slice(&u16::try_from(len).map_err(io::Error::other)?.to_ne_bytes());
    body[8..16].copy_from_slice(&u64::try_from(address).map_err(io::Error::other)?.to_ne_bytes());
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
