//! A directory made fit to chroot into. In: a mounted or extracted layer. Out: the same with /dev, /proc and /tmp.
//!
//! Only directories that the layer has are used, because it may be read-only; what it lacks, the command lacks too. Dropping
//! a [`ChrootMounts`] unmounts everything again.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::BenchError;

/// The devices that any program may expect: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// A root directory with what programs expect mounted in it.
#[derive(Debug)]
pub struct ChrootMounts {
    mounts: Vec<PathBuf>,
}

impl ChrootMounts {
    /// Mounts /proc, a /dev of its own and an empty /tmp in `root`, as far as it has these directories.
    ///
    /// # Errors
    /// When something cannot be mounted.
    pub fn new(root: &Path) -> Result<Self, BenchError> {
        let mut mounts = Self { mounts: Vec::new() };
        let careful = MountFlags::NOSUID | MountFlags::NOEXEC;
        if mounts.mount(root, "proc", "proc", careful | MountFlags::NODEV, c"")? {
            log::debug!("{}: /proc is mounted", root.display());
        }
        if mounts.mount(root, "dev", "tmpfs", careful, c"mode=755,size=1m")? {
            let dev = root.join("dev");
            make_devices(&dev).map_err(BenchError::step(format!("{}: cannot make devices", dev.display())))?;
        }
        mounts.mount(
            root,
            "tmp",
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            c"mode=1777",
        )?;
        Ok(mounts)
    }

    /// Mounts a filesystem on `root/name`; false when there is no such directory (a link is none: it may lead out of root).
    fn mount(
        &mut self,
        root: &Path,
        name: &str,
        kind: &str,
        flags: MountFlags,
        data: &std::ffi::CStr,
    ) -> Result<bool, BenchError> {
        let target = root.join(name);
        if !target.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            return Ok(false);
        }
        mount(kind, &target, kind, flags, Some(data))
            .map_err(io::Error::from)
            .map_err(BenchError::step(format!("{}: cannot mount a {kind}", target.display())))?;
        self.mounts.push(target);
        Ok(true)
    }
}

fn make_devices(dev: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    for (name, major, minor) in DEVICES {
        let path = dev.join(name);
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        )?;
        // The process's umask has taken its share.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        std::os::unix::fs::symlink(target, dev.join(name))?;
    }
    Ok(())
}

impl Drop for ChrootMounts {
    fn drop(&mut self) {
        for target in self.mounts.drain(..).rev() {
            if unmount(&target, UnmountFlags::NOFOLLOW).is_err() {
                // Something the command has left running sits in it: it goes when that goes.
                let _ = unmount(&target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
            }
        }
    }
}
