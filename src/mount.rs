//! The device, mounted by the kernel's own driver. In: a directory. Out: the layer's files in it, or nothing changed at all.
//!
//! Mounting is attaching and then mount(2), unmounting is umount(2) and then detaching; what fails halfway is undone. The
//! image has no journal to replay and the device takes no writes, so it is mounted `ro,noload`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::device::daemon::{self, Attached, ControlError, DaemonError, Launcher, Spec};
use crate::device::state::{State, StateDir, StateError};
use crate::device::users;

/// Why a directory could not be mounted on or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The directory is missing.
    #[error("{0} does not exist; make it first: mkdir {0}")]
    Missing(PathBuf),
    /// It is something else.
    #[error("{0} is not a directory")]
    NotDirectory(PathBuf),
    /// It holds files, which the mount would hide.
    #[error("{0} is not empty; mount on an empty directory")]
    NotEmpty(PathBuf),
    /// It cannot be looked at.
    #[error("cannot use {path}: {cause}")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// No device could be attached.
    #[error(transparent)]
    Attach(#[from] DaemonError),
    /// The kernel does not mount the device.
    #[error("cannot mount {device} on {path}: {cause}{advice}")]
    Mount {
        /// The device.
        device: PathBuf,
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
        /// What may help.
        advice: &'static str,
    },
    /// Nothing of ours is mounted there.
    #[error("nothing that tarblk attached is mounted on {0}")]
    NotOurs(PathBuf),
    /// Somebody uses a file below.
    #[error("{path} is in use{by}; end that first")]
    Busy {
        /// The directory.
        path: PathBuf,
        /// Some of the processes that use it.
        by: String,
    },
    /// The kernel does not unmount it.
    #[error("cannot unmount {path}: {cause}")]
    Unmount {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// Its daemon is dead, and the reads that wait for it cannot be ended.
    #[error("cannot unmount {path}: its daemon is dead and its reads do not end: {cause}")]
    Stuck {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: ControlError,
    },
    /// It is unmounted, but the device stays.
    #[error("{path} is unmounted, but its device stays: {cause}")]
    Detach {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: ControlError,
    },
    /// States cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Makes sure that `dir` can be mounted on: it is there, a directory, and empty. Returns its full path.
///
/// # Errors
/// What it is instead.
pub fn check_directory(dir: &Path) -> Result<PathBuf, MountError> {
    let unusable = |cause: io::Error| match cause.kind() {
        io::ErrorKind::NotFound => MountError::Missing(dir.to_owned()),
        io::ErrorKind::NotADirectory => MountError::NotDirectory(dir.to_owned()),
        _ => MountError::Unusable {
            path: dir.to_owned(),
            cause,
        },
    };
    let full = fs::canonicalize(dir).map_err(unusable)?;
    if !fs::metadata(&full).map_err(unusable)?.is_dir() {
        return Err(MountError::NotDirectory(dir.to_owned()));
    }
    if fs::read_dir(&full).map_err(unusable)?.next().is_some() {
        return Err(MountError::NotEmpty(dir.to_owned()));
    }
    Ok(full)
}

/// Attaches what `spec` describes by a daemon and mounts it on `dir`.
///
/// # Errors
/// What went wrong; then nothing is left of it.
pub fn mount(launcher: &Launcher, spec: &Spec, dir: &Path) -> Result<Attached, MountError> {
    let full = check_directory(dir)?;
    let attached = daemon::launch(launcher, spec)?;
    if let Err(error) = mount_device(&attached.state.device, &full) {
        if let Err(left) = daemon::detach(&StateDir::new(&spec.states), &attached.state) {
            log::warn!("{left}");
        }
        return Err(error);
    }
    Ok(attached)
}

/// Mounts the ext4 filesystem on `device` on `dir`, read-only.
///
/// # Errors
/// [`MountError::Mount`] with what the kernel said.
pub fn mount_device(device: &Path, dir: &Path) -> Result<(), MountError> {
    let refused = |error: rustix::io::Errno| MountError::Mount {
        device: device.to_owned(),
        path: dir.to_owned(),
        cause: error.into(),
        advice: match error {
            rustix::io::Errno::NODEV => "; this kernel has no ext4",
            rustix::io::Errno::PERM => "; this needs root (CAP_SYS_ADMIN): try sudo",
            rustix::io::Errno::IO => "; the device's log says why a read failed",
            _ => "; `dmesg` may say more",
        },
    };
    rustix::mount::mount(device, dir, c"ext4", MountFlags::RDONLY, c"noload").map_err(refused)
}

/// Unmounts `dir`, detaches the device that was mounted there, and waits until process, device and files are gone.
///
/// # Errors
/// What kept it.
pub fn unmount(states: &StateDir, dir: &Path) -> Result<State, MountError> {
    let full = fs::canonicalize(dir).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => MountError::Missing(dir.to_owned()),
        _ => MountError::Unusable {
            path: dir.to_owned(),
            cause,
        },
    })?;
    let state = mounted_on(states, &full)?.ok_or_else(|| MountError::NotOurs(dir.to_owned()))?;
    // Where the daemon is dead, umount(2) would wait without end for the reads that nobody answers. They are ended first, but
    // only if nothing uses the mount: its users' reads may still wait for somebody to recover the device. The first of two
    // calls with this flag never unmounts (looking the path up, as above, makes it the first again), and fails with EAGAIN
    // where a real one would not find it busy.
    if !state.is_alive() && rustix::mount::unmount(&full, UnmountFlags::EXPIRE) == Err(rustix::io::Errno::AGAIN) {
        daemon::end_reads(&state).map_err(|cause| MountError::Stuck {
            path: dir.to_owned(),
            cause,
        })?;
    }
    match rustix::mount::unmount(&full, UnmountFlags::empty()) {
        Ok(()) => {}
        Err(rustix::io::Errno::BUSY) => {
            let processes = users::processes_below(&full);
            let by = processes
                .iter()
                .map(|(pid, name)| format!("{name} ({pid})"))
                .collect::<Vec<_>>()
                .join(", ");
            let by = if by.is_empty() {
                String::new()
            } else {
                format!(" by {by}")
            };
            return Err(MountError::Busy {
                path: dir.to_owned(),
                by,
            });
        }
        Err(error) => {
            return Err(MountError::Unmount {
                path: dir.to_owned(),
                cause: error.into(),
            });
        }
    }
    daemon::detach(states, &state).map_err(|cause| MountError::Detach {
        path: dir.to_owned(),
        cause,
    })?;
    Ok(state)
}

/// The device of ours that is mounted on `dir` (a full path), if it is the last thing mounted there.
///
/// # Errors
/// When states or mounts cannot be read.
pub fn mounted_on(states: &StateDir, dir: &Path) -> Result<Option<State>, MountError> {
    let mounts = users::mounts().map_err(|cause| MountError::Unusable {
        path: dir.to_owned(),
        cause,
    })?;
    let Some(top) = mounts.into_iter().rfind(|line| line.point == dir) else {
        return Ok(None);
    };
    let (all, _) = states.list()?;
    Ok(all
        .into_iter()
        .find(|state| users::device_number(&state.device).is_ok_and(|number| number == top.device)))
}
