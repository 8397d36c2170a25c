//! The device, mounted by the kernel's own driver. In: a directory. Out: the layer's files in it, or nothing changed at all.
//!
//! Mounting is attaching and then mount(2), unmounting is umount(2) and then detaching; what fails halfway is undone. The
//! image has no journal to replay and the device takes no writes, so it is mounted `ro,noload`. Strangers made the layer, so
//! its set-user-ID programs and device nodes do nothing (`nosuid,nodev`) unless `suid` or `dev` is asked for.

mod overlay;

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::device::service::{self, Attached, Builder, Condition, ControlError, Launcher, ServeSpec, ServiceError};
use crate::device::state::{State, StateDir, StateError};
use crate::device::users;
use crate::owned::OwnedError;

pub use overlay::Upper;

/// Why a directory could not be mounted on or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The directory to mount on is missing.
    #[error("{0} does not exist; make it first: mkdir {0}")]
    Missing(PathBuf),
    /// What is to be unmounted is not there at all.
    #[error("{0} does not exist")]
    Absent(PathBuf),
    /// A device of ours is mounted on it already.
    #[error("{path} already has {source_name} on it{state}; first: tarblk umount {path}")]
    Occupied {
        /// The directory.
        path: PathBuf,
        /// The layer that the device holds.
        source_name: String,
        /// That its daemon is dead, with a separator in front, or nothing.
        state: &'static str,
    },
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
        #[source]
        cause: io::Error,
    },
    /// No device could be attached.
    #[error(transparent)]
    Attach(#[from] ServiceError),
    /// The kernel does not mount the device.
    #[error("cannot mount {device} on {path}: {cause}{advice}")]
    Mount {
        /// The device.
        device: PathBuf,
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
        /// What may help.
        advice: &'static str,
    },
    /// Nothing of ours is mounted there.
    #[error("nothing that tarblk attached is mounted on {0}")]
    NotOurs(PathBuf),
    /// A process uses a file below it.
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
        #[source]
        cause: io::Error,
    },
    /// Its daemon is dead, and the reads that wait for it cannot be ended.
    #[error("cannot unmount {path}: its service is dead and its reads do not end: {cause}")]
    Stuck {
        /// The directory.
        path: PathBuf,
        /// What its daemon or the kernel said.
        #[source]
        cause: ControlError,
    },
    /// It is unmounted, but the device stays.
    #[error("{path} is unmounted, but its device stays: {cause}")]
    Detach {
        /// The directory.
        path: PathBuf,
        /// What its daemon or the kernel said.
        #[source]
        cause: ControlError,
    },
    /// The directory for what is written is not root's alone.
    #[error(transparent)]
    Directory(#[from] OwnedError),
    /// Others may look into the directory for what is written.
    #[error("{0}: others may look into it, where an image's set-user-ID programs would work; `chmod 700` it")]
    UpperOpen(PathBuf),
    /// The directory for what is written and the one to mount on lie in each other.
    #[error("{upper} and {dir} lie in each other; what is written has to lie elsewhere")]
    UpperWithin {
        /// For what is written.
        upper: PathBuf,
        /// To mount on.
        dir: PathBuf,
    },
    /// Another overlay writes to the directory.
    #[error("{upper} is in use by the overlay on {dir}")]
    UpperInUse {
        /// For what is written.
        upper: PathBuf,
        /// Where the other overlay is.
        dir: PathBuf,
    },
    /// States cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Makes sure that `dir` can be mounted on: it is there, a directory, nothing of ours is mounted on it, and it is empty.
/// Returns its full path.
///
/// # Errors
/// What it is instead.
pub fn check_directory(states: &StateDir, dir: &Path) -> Result<PathBuf, MountError> {
    let unusable = |cause: io::Error| match cause.kind() {
        io::ErrorKind::NotFound => MountError::Missing(dir.to_owned()),
        io::ErrorKind::NotADirectory => MountError::NotDirectory(dir.to_owned()),
        _ => MountError::Unusable {
            path: dir.to_owned(),
            cause,
        },
    };
    let full = fs::canonicalize(dir).map_err(unusable)?;
    // Asked before the directory is read: of a device whose daemon is dead that may fail, or wait for ever. Whoever may not see
    // what is attached is told the rest.
    if let Ok(Some(state)) = mounted_on(states, &full) {
        return Err(MountError::Occupied {
            path: dir.to_owned(),
            state: if is_dead(states, &state) {
                " (its service is dead)"
            } else {
                ""
            },
            source_name: state.source,
        });
    }
    if !fs::metadata(&full).map_err(unusable)?.is_dir() {
        return Err(MountError::NotDirectory(dir.to_owned()));
    }
    if fs::read_dir(&full).map_err(unusable)?.next().is_some() {
        return Err(MountError::NotEmpty(dir.to_owned()));
    }
    Ok(full)
}

/// How a device is mounted: read-only and without its journal always, `nosuid` and `nodev` unless told otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    flags: MountFlags,
    /// What the filesystem's own driver is told, joined by commas.
    data: String,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            flags: MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
            data: "noload".to_owned(),
        }
    }
}

impl MountOptions {
    /// Understands options as mount(8) does, in their order. What is meant for readers of fstab is passed over; what is not
    /// known is left to ext4, which refuses what it does not know either. `defaults` keeps `nosuid,nodev`: in fstab it fills a
    /// column and asks for nothing.
    ///
    /// # Errors
    /// What makes no sense for a layer, in words for the person.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut parsed = Self::default();
        for option in options {
            let (on, off) = match option {
                "rw" => {
                    return Err("rw: a layer is read-only; to write, say --overlay DIRECTORY".to_owned());
                }
                "remount" | "bind" | "rbind" | "move" => {
                    return Err(format!("{option}: that is for what is mounted already; use mount(8)"));
                }
                "nosuid" => (MountFlags::NOSUID, MountFlags::empty()),
                "suid" => (MountFlags::empty(), MountFlags::NOSUID),
                "nodev" => (MountFlags::NODEV, MountFlags::empty()),
                "dev" => (MountFlags::empty(), MountFlags::NODEV),
                "noexec" => (MountFlags::NOEXEC, MountFlags::empty()),
                "exec" => (MountFlags::empty(), MountFlags::NOEXEC),
                // Whoever may mount it as a user must not become root by what is in it.
                "user" | "users" => (
                    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                    MountFlags::empty(),
                ),
                "owner" | "group" => (MountFlags::NOSUID | MountFlags::NODEV, MountFlags::empty()),
                "noatime" => (MountFlags::NOATIME, MountFlags::empty()),
                "atime" => (MountFlags::empty(), MountFlags::NOATIME),
                "nodiratime" => (MountFlags::NODIRATIME, MountFlags::empty()),
                "diratime" => (MountFlags::empty(), MountFlags::NODIRATIME),
                "relatime" => (MountFlags::RELATIME, MountFlags::empty()),
                "norelatime" => (MountFlags::empty(), MountFlags::RELATIME),
                "strictatime" => (MountFlags::STRICTATIME, MountFlags::empty()),
                "nostrictatime" => (MountFlags::empty(), MountFlags::STRICTATIME),
                "lazytime" => (MountFlags::LAZYTIME, MountFlags::empty()),
                "nolazytime" => (MountFlags::empty(), MountFlags::LAZYTIME),
                "sync" => (MountFlags::SYNCHRONOUS, MountFlags::empty()),
                "async" => (MountFlags::empty(), MountFlags::SYNCHRONOUS),
                "dirsync" => (MountFlags::DIRSYNC, MountFlags::empty()),
                "silent" => (MountFlags::SILENT, MountFlags::empty()),
                "loud" => (MountFlags::empty(), MountFlags::SILENT),
                "" | "ro" | "defaults" | "noload" | "norecovery" | "auto" | "noauto" | "nouser" | "nofail"
                | "_netdev" => {
                    continue;
                }
                other if other.starts_with("x-") || other.starts_with("X-") || other.starts_with("comment=") => {
                    continue;
                }
                other => {
                    parsed.data.push(',');
                    parsed.data.push_str(other);
                    continue;
                }
            };
            parsed.flags.remove(off);
            parsed.flags.insert(on);
        }
        Ok(parsed)
    }
}

/// Attaches what `spec` describes and mounts it on `dir`; the device goes when it is unmounted.
///
/// # Errors
/// What went wrong; then nothing is left of it.
pub fn mount<B: Builder>(
    launcher: &Launcher,
    spec: &ServeSpec<B::Image>,
    dir: &Path,
    options: &MountOptions,
) -> Result<Attached, MountError> {
    attach_and::<B>(launcher, spec, dir, |_, device, dir| mount_device(device, dir, options))
}

/// The same with an overlay over it that writes to `upper`.
///
/// # Errors
/// What went wrong; then nothing is left of it.
pub fn mount_writable<B: Builder>(
    launcher: &Launcher,
    spec: &ServeSpec<B::Image>,
    dir: &Path,
    options: &MountOptions,
    upper: &Upper,
) -> Result<Attached, MountError> {
    attach_and::<B>(launcher, spec, dir, |states, device, dir| {
        upper.mount(states, device, dir, options)
    })
}

fn attach_and<B: Builder>(
    launcher: &Launcher,
    spec: &ServeSpec<B::Image>,
    dir: &Path,
    mount: impl FnOnce(&StateDir, &Path, &Path) -> Result<(), MountError>,
) -> Result<Attached, MountError> {
    let states = StateDir::new(&spec.states);
    let full = check_directory(&states, dir)?;
    let attached = service::launch::<B>(launcher, spec)?;
    if let Err(error) = mount(&states, &attached.state.device, &full) {
        if let Err(left) = service::detach(&states, &attached.state) {
            log::warn!("{left}");
        }
        return Err(error);
    }
    if let Err(error) = service::let_go(&states, &attached.state) {
        log::warn!(
            "{} stays when it is unmounted: {error}",
            attached.state.device.display()
        );
    }
    Ok(attached)
}

/// Mounts the ext4 filesystem on `device` on `dir`, read-only. Called by `mount` and by this module.
///
/// # Errors
/// [`MountError::Mount`] with what the kernel said.
pub fn mount_device(device: &Path, dir: &Path, options: &MountOptions) -> Result<(), MountError> {
    let refused = |error: rustix::io::Errno| MountError::Mount {
        device: device.to_owned(),
        path: dir.to_owned(),
        cause: error.into(),
        advice: match error {
            rustix::io::Errno::NODEV => "; this kernel has no ext4",
            rustix::io::Errno::PERM => "; this needs root (CAP_SYS_ADMIN): try sudo",
            rustix::io::Errno::IO => "; the device's log says why a read failed",
            rustix::io::Errno::INVAL if *options != MountOptions::default() => {
                "; ext4 may not know one of the options of -o (`dmesg` says which)"
            }
            _ => "; `dmesg` may say more",
        },
    };
    let data = CString::new(options.data.as_str()).map_err(|_| refused(rustix::io::Errno::INVAL))?;
    rustix::mount::mount(device, dir, c"ext4", options.flags, data.as_c_str()).map_err(refused)
}

/// A directory that was unmounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmounted {
    /// The device that was mounted there.
    pub state: State,
    /// By what the device is in use still, if it is: it goes when that is over.
    pub still_used: Option<String>,
}

/// Unmounts `dir`, and waits until the device that was mounted there and its files are gone, unless it is in use elsewhere.
///
/// # Errors
/// Why it is still mounted, or why its device stays.
pub fn unmount(states: &StateDir, dir: &Path) -> Result<Unmounted, MountError> {
    let full = fs::canonicalize(dir).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => MountError::Absent(dir.to_owned()),
        _ => MountError::Unusable {
            path: dir.to_owned(),
            cause,
        },
    })?;
    let state = mounted_on(states, &full)?.ok_or_else(|| MountError::NotOurs(dir.to_owned()))?;
    // Where the daemon is dead, umount(2) would wait without end for the reads that are not answered. They are ended first, but
    // only if nothing uses the mount: its users' reads may still wait for the device to be recovered. The first of two
    // calls with this flag never unmounts (looking the path up, as above, makes it the first again), and fails with EAGAIN
    // where a real one would not find it busy.
    if is_dead(states, &state) && rustix::mount::unmount(&full, UnmountFlags::EXPIRE) == Err(rustix::io::Errno::AGAIN) {
        service::end_reads(&state).map_err(|cause| MountError::Stuck {
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
    let still_used = match service::detach(states, &state) {
        Ok(()) => None,
        // Whoever mounted it let it go with its last user.
        Err(ControlError::InUse { users, .. }) if service::let_go(states, &state).is_ok() => Some(users),
        // That was a moment ago.
        Err(ControlError::InUse { .. }) if service::is_over(states, &state) => None,
        Err(cause) => {
            return Err(MountError::Detach {
                path: dir.to_owned(),
                cause,
            });
        }
    };
    Ok(Unmounted { state, still_used })
}

/// Takes off everything that is mounted on `dir` (a full path), as far as it is not in use, and detaches its devices.
///
/// # Errors
/// Why something is still mounted.
pub fn clear(states: &StateDir, dir: &Path) -> Result<(), MountError> {
    while users::is_mount_point(dir).map_err(|cause| MountError::Unusable {
        path: dir.to_owned(),
        cause,
    })? {
        match unmount(states, dir) {
            Ok(_) => {}
            // A device whose state is lost.
            Err(MountError::NotOurs(_)) => {
                rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW).map_err(|error| MountError::Unmount {
                    path: dir.to_owned(),
                    cause: error.into(),
                })?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Detaches a device that may be mounted: its directories are unmounted at once, whoever has files open in them, and what those
/// files are of goes when the last of them is closed. Returns by what it is in use still, if it is.
///
/// # Errors
/// Why a directory is still mounted, or why the device stays for good.
pub fn detach_used(states: &StateDir, state: &State) -> Result<Option<String>, MountError> {
    // umount(2) would write back through a device that nobody answers for.
    if is_dead(states, state) {
        service::end_reads(state).map_err(|cause| MountError::Detach {
            path: state.device.clone(),
            cause,
        })?;
    }
    for user in state.users() {
        let users::User::Mount(dir) = user else { continue };
        match rustix::mount::unmount(&dir, UnmountFlags::DETACH) {
            // It went with another one.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => {
                return Err(MountError::Unmount {
                    path: dir,
                    cause: error.into(),
                });
            }
        }
    }
    match service::detach(states, state) {
        Ok(()) => Ok(None),
        Err(ControlError::InUse { users, .. }) if service::let_go(states, state).is_ok() => Ok(Some(users)),
        Err(cause) => Err(MountError::Detach {
            path: state.device.clone(),
            cause,
        }),
    }
}

/// Whether what is mounted on `dir` (a full path) is a device of ours whose reads are answered, or will be.
///
/// # Errors
/// When states or mounts cannot be read.
pub fn is_served(states: &StateDir, dir: &Path) -> Result<bool, MountError> {
    let Some(state) = mounted_on(states, dir)? else {
        return Ok(false);
    };
    Ok(match service::conditions(states) {
        Ok(Some(conditions)) => match conditions.get(&state.name) {
            Some(Condition::Serving | Condition::Waiting { .. } | Condition::Degraded { .. }) => true,
            Some(Condition::Poisoned { .. }) | None => false,
        },
        Ok(None) => false,
        // One that is busy will answer.
        Err(_) => true,
    })
}

/// Whether nothing serves the device any more, nor will again.
fn is_dead(states: &StateDir, state: &State) -> bool {
    !state.is_alive() && matches!(service::conditions(states), Ok(None))
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
        .find(|state| users::device_number(&state.device).is_ok_and(|number| top.shows(&state.device, &number))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Result<MountOptions, String> {
        MountOptions::parse(options.split(','))
    }

    #[test]
    fn options_are_those_of_mount() {
        for nothing in [
            "",
            "ro",
            "defaults,ro,nofail,_netdev,x-systemd.automount,comment=a layer,noload",
        ] {
            assert_eq!(parse(nothing), Ok(MountOptions::default()), "{nothing}");
        }
        let flags = |options: &str| parse(options).unwrap().flags - MountFlags::RDONLY;
        let (nosuid, nodev) = (MountFlags::NOSUID, MountFlags::NODEV);
        assert_eq!(flags("noatime,ro"), nosuid | nodev | MountFlags::NOATIME);
        assert_eq!(flags("suid"), nodev);
        assert_eq!(flags("dev"), nosuid);
        assert_eq!(flags("suid,dev"), MountFlags::empty());
        // The last one wins.
        assert_eq!(flags("suid,dev,nosuid"), nosuid);
        assert_eq!(flags("suid,dev,noexec,exec"), MountFlags::empty());
        assert_eq!(flags("suid,dev,user,exec"), nosuid | nodev);
        assert_eq!(
            parse("ro,errors=continue,acl").unwrap().data,
            "noload,errors=continue,acl"
        );
        for refused in ["rw", "ro,rw", "remount", "bind"] {
            let said = parse(refused).unwrap_err();
            assert!(said.starts_with(refused.rsplit(',').next().unwrap()), "{said}");
        }
    }
}
