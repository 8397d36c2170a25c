//! A writable tree over a device: overlayfs, with a directory of root's for what is written. In: that directory, a device, and a place
//! to mount on. Out: one mount there, with which the device goes.
//!
//! The device's own filesystem is mounted below the directory only until the overlay is there, which holds it from then on. So
//! there is nothing to unmount twice, whoever unmounts it. The overlay's source in mount tables is the device's path.

use std::ffi::CString;
use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::{MountError, MountOptions, clear, mount_device};
use crate::device::state::StateDir;
use crate::device::users;
use crate::owned;

/// The directory for what is written, root's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upper {
    dir: PathBuf,
}

impl Upper {
    /// The directory at `path`, made if it is not there, for an overlay on `dir` (a full path).
    ///
    /// # Errors
    /// [`MountError::Directory`] when another user could write to it or look into it; [`MountError::UpperInUse`].
    pub fn open(path: &Path, dir: &Path) -> Result<Self, MountError> {
        let within = || MountError::UpperWithin {
            upper: path.to_owned(),
            dir: dir.to_owned(),
        };
        // Before it is made.
        if std::path::absolute(path).is_ok_and(|full| full.starts_with(dir)) {
            return Err(within());
        }
        let full = owned::directory(path)?;
        let unusable = |cause| MountError::Unusable {
            path: path.to_owned(),
            cause,
        };
        let meta = fs::symlink_metadata(&full).map_err(unusable)?;
        if meta.mode() & 0o077 != 0 {
            return Err(MountError::UpperOpen(path.to_owned()));
        }
        if dir.starts_with(&full) || full.starts_with(dir) {
            return Err(within());
        }
        let upper = Self { dir: full };
        for part in [upper.written(), upper.work()] {
            if fs::symlink_metadata(&part).is_ok_and(|meta| !meta.is_dir()) {
                return Err(MountError::NotDirectory(part));
            }
        }
        let written = upper.written();
        let mounts = users::mounts().map_err(unusable)?;
        if let Some(line) = mounts.iter().find(|line| line.upper.as_ref() == Some(&written)) {
            return Err(MountError::UpperInUse {
                upper: path.to_owned(),
                dir: line.point.clone(),
            });
        }
        Ok(upper)
    }

    /// Where what is written lies.
    fn written(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// What the kernel needs beside it.
    fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Where the device is mounted for a moment.
    fn lower(&self) -> PathBuf {
        self.dir.join("lower")
    }

    /// Mounts the device and over it the overlay, on `dir` (a full path). `options` are those of both, but for being read-only.
    ///
    /// # Errors
    /// What is wrong; then nothing is mounted.
    pub fn mount(
        &self,
        states: &StateDir,
        device: &Path,
        dir: &Path,
        options: &MountOptions,
    ) -> Result<(), MountError> {
        let lower = self.lower();
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |cause| MountError::Unusable { path, cause }
        };
        // Of a command that was killed.
        clear(states, &lower)?;
        make(&lower).map_err(unusable(&lower))?;
        mount_device(device, &lower, options)?;
        let overlaid = self.overlay(device, dir, options);
        // The overlay has a mount of its own of it. Nothing else was told of this one.
        let unmounted = rustix::mount::unmount(&lower, UnmountFlags::NOFOLLOW);
        let _ = fs::remove_dir(&lower);
        overlaid?;
        unmounted.map_err(|error| {
            let _ = rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW);
            unusable(&lower)(error.into())
        })
    }

    fn overlay(&self, device: &Path, dir: &Path, options: &MountOptions) -> Result<(), MountError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause: io::Error| MountError::Unusable { path, cause }
        };
        let refused = |error: Errno| MountError::Mount {
            device: device.to_owned(),
            path: dir.to_owned(),
            cause: error.into(),
            advice: match error {
                Errno::NODEV => "; this kernel has no overlayfs",
                Errno::INVAL => {
                    "; what is written must lie on a filesystem that can hold it (ext4, XFS, Btrfs, tmpfs; not an overlay, NFS or FUSE)"
                }
                _ => "; `dmesg` may say more",
            },
        };
        let (lower, written, work) = (self.lower(), self.written(), self.work());
        make(&work).map_err(failed(&work))?;
        if make(&written).map_err(failed(&written))? {
            // The overlay's root directory is this one: it is to be as the image's.
            let root = fs::metadata(&lower).map_err(failed(&lower))?;
            be_like(&written, &root).map_err(failed(&written))?;
        }
        // What a layer says of redirections and metadata alone is not heeded: strangers made it.
        let data = [
            &b"lowerdir="[..],
            &escaped(&lower),
            b",upperdir=",
            &escaped(&written),
            b",workdir=",
            &escaped(&work),
            b",index=off,metacopy=off,redirect_dir=nofollow",
        ];
        let data = CString::new(data.concat()).map_err(|_| refused(Errno::INVAL))?;
        let flags = options.flags - MountFlags::RDONLY;
        rustix::mount::mount(device, dir, c"overlay", flags, data.as_c_str()).map_err(refused)
    }
}

/// Makes a directory, if it is not there; returns whether it was not.
fn make(path: &Path) -> io::Result<bool> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

fn be_like(path: &Path, meta: &Metadata) -> io::Result<()> {
    const PERMISSIONS: u32 = 0o7777;
    chown(path, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(path, Permissions::from_mode(meta.mode() & PERMISSIONS))
}

/// A path as overlayfs reads it among its options.
fn escaped(path: &Path) -> Vec<u8> {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b',' | b':') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}
