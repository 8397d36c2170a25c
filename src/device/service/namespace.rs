//! The daemon's mount namespace. In: what the daemon will need of the file system. Out: a namespace that holds that, and
//! keeps nothing else mounted.
//!
//! A new namespace begins with copies of all mounts. One that is shared outside is undone inside when it is undone
//! outside, so it keeps nobody waiting. The others (in containers, under private directories, and everywhere on machines
//! without systemd) would keep disks, images and other devices busy for as long as the daemon lives: they go, but for
//! those on the way to something that it needs.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::device::state::StateDir;
use crate::device::users::{self, MountLine};
use crate::device::{fuse_loop, ublk};

/// What a daemon needs of the file system once its layers are open, besides its states, devices and programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Anything, because it runs programs that others wrote: all mounts stay but those of other devices.
    Everything,
    /// These files and directories, some of which may not be there yet.
    Paths(Vec<PathBuf>),
}

/// The kernel's interfaces. What is mounted below them keeps nothing busy that anybody waits for, and undoing each takes the
/// kernel a millisecond.
const KERNEL: &[&str] = &["/dev", "/proc", "/sys"];

/// What every daemon may open by name besides: how names are resolved and certificates checked, and modules. Mounts in these
/// directories are not needed for that, unless they are on the list themselves.
const ALWAYS: &[&str] = &[
    "/run",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/ssl/certs",
    "/etc/pki/tls/certs",
    "/lib/modules",
    "/usr/lib/modules",
    "/lib64",
    "/usr/lib64",
];

/// Gives this process a mount namespace of its own. Were it the last of one in which its device is mounted, its end would
/// unmount the device, which would wait for reads that only it could answer.
///
/// Mounts made or undone outside show up inside too, where the outside shares them. Returns whether it worked.
pub(super) fn leave() -> bool {
    users::remember_namespace();
    // SAFETY: only unsharing the table of open files would be unsafe.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    if let Err(error) = unshared {
        log::warn!("cannot leave the mount namespace: {error}");
        return false;
    }
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    if let Err(error) = rustix::mount::mount_change("/", flags) {
        log::warn!("cannot keep this process's mounts to itself: {error}");
        return false;
    }
    true
}

/// Undoes, in this process's own namespace, the mounts that it would keep busy for nothing. Call it when the layers are
/// open: until then one may lie in another device.
pub(super) fn tidy(states: &StateDir, reach: &Reach) {
    let mounts = users::mounts().unwrap_or_default();
    let devices = of_other_devices(&mounts, states);
    let unneeded = match reach {
        Reach::Everything => BTreeSet::new(),
        Reach::Paths(paths) => {
            let needed = needed(states, paths);
            not_on_the_way(&mounts, &needed)
        }
    };
    // The latest first: a mount may lie on top of an earlier one.
    for line in mounts.iter().rev() {
        let other = devices.contains(&line.id) && line.point != Path::new("/");
        if other || unneeded.contains(&line.id) {
            undo(line);
        }
    }
}

/// Undoes a mount, if it is what its path leads to: it may be hidden by another one that stays.
fn undo(line: &MountLine) {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(found) = rustix::fs::open(&line.point, flags, Mode::empty()) else {
        return;
    };
    // Asking the file system itself for the number could wait for one that does not answer.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", found.as_raw_fd())).unwrap_or_default();
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    drop(found);
    if id == Some(line.id) {
        let _ = rustix::mount::unmount(&line.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// Other devices' mounts, and overlays that stand on them. Other devices are those that are known, and those that look
/// like ours, because commands may keep their states elsewhere.
fn of_other_devices(mounts: &[MountLine], states: &StateDir) -> BTreeSet<u64> {
    let (others, _) = states.list().unwrap_or_default();
    let known: Vec<_> = others
        .iter()
        .filter_map(|other| users::device_number(&other.device).ok())
        .collect();
    // What is written on is an overlay, which has the device's name.
    let is_other = |line: &MountLine| {
        known.contains(&line.device) || ((line.read_only || line.upper.is_some()) && looks_like_ours(&line.source))
    };
    let others: Vec<&Path> = mounts
        .iter()
        .filter(|line| is_other(line))
        .map(|line| line.point.as_path())
        .collect();
    // An overlay keeps what it stands on, wherever else that is undone.
    let stands_on_one = |line: &MountLine| {
        line.lower
            .iter()
            .any(|dir| others.iter().any(|other| dir.starts_with(other)))
    };
    mounts
        .iter()
        .filter(|line| is_other(line) || stands_on_one(line))
        .map(|line| line.id)
        .collect()
}

fn looks_like_ours(device: &Path) -> bool {
    let number = |name: &str| device.to_str()?.strip_prefix(name)?.parse().ok();
    number("/dev/ublkb").is_some_and(ublk::exists) || number("/dev/loop").is_some_and(fuse_loop::is_ours)
}

/// Everything that this daemon may open by name from now on.
fn needed(states: &StateDir, paths: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut all: BTreeSet<PathBuf> = ALWAYS.iter().map(PathBuf::from).collect();
    all.insert(states.path().to_owned());
    all.extend(paths.iter().cloned());
    all.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    all.insert(env::temp_dir());
    all.extend(
        ["SSL_CERT_FILE", "SSL_CERT_DIR"]
            .into_iter()
            .filter_map(env::var_os)
            .map(Into::into),
    );
    // Beside the libraries that are loaded lie those that the C library loads when a name is looked up.
    all.extend(mapped_files());
    all.iter().flat_map(|path| places(path)).collect()
}

/// The files that are mapped into this process.
fn mapped_files() -> BTreeSet<PathBuf> {
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    let path = |line: &[u8]| {
        let at = line.iter().position(|byte| *byte == b'/')?;
        Some(PathBuf::from(OsString::from_vec(line[at..].to_vec())))
    };
    maps.split(|byte| *byte == b'\n').filter_map(path).collect()
}

/// A path, and every place that symbolic links on the way lead through. What is not there counts as it is written.
fn places(path: &Path) -> Vec<PathBuf> {
    /// As many links as the kernel follows.
    const LINKS: usize = 40;
    let mut found = vec![path.to_owned()];
    let mut rest = path.to_owned();
    for _ in 0..LINKS {
        let mut at = PathBuf::from("/");
        let mut parts = rest.components();
        parts.next();
        let mut led = None;
        for part in parts.by_ref() {
            at.push(part);
            if let Ok(target) = fs::read_link(&at) {
                at.pop();
                led = Some(at.join(target));
                break;
            }
        }
        let Some(led) = led else { break };
        rest = plain(&led.join(parts.as_path()));
        found.push(rest.clone());
    }
    found
}

/// A path without `..`, as it is written.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

/// Mounts that are on the way to nothing that is needed, and that nobody but this process would undo.
fn not_on_the_way(mounts: &[MountLine], needed: &BTreeSet<PathBuf>) -> BTreeSet<u64> {
    let follows: HashMap<u64, bool> = mounts.iter().map(|line| (line.id, line.follows)).collect();
    mounts
        .iter()
        // What is undone outside is undone here if what it was mounted on follows the outside.
        .filter(|line| !follows.get(&line.parent).copied().unwrap_or(true))
        .filter(|line| !KERNEL.iter().any(|path| line.point.starts_with(path)))
        .filter(|line| !needed.iter().any(|path| path.starts_with(&line.point)))
        .map(|line| line.id)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: u64, parent: u64, point: &str, follows: bool) -> MountLine {
        MountLine {
            id,
            parent,
            point: point.into(),
            follows,
            device: "0:1".to_owned(),
            source: "none".into(),
            read_only: false,
            lower: Vec::new(),
            upper: None,
        }
    }

    #[test]
    fn only_what_nothing_needed_lies_behind_goes() {
        let mounts = [
            line(1, 0, "/", false),
            line(2, 1, "/home", false),
            line(3, 2, "/home/me/usb", false),
            line(4, 1, "/mnt", true),
            line(5, 4, "/mnt/shared", false),
            line(6, 1, "/var/cache", false),
            line(7, 6, "/var/cache/tarblk", false),
            line(8, 1, "/hom", false),
            line(9, 1, "/dev", false),
            line(10, 9, "/dev/shm", false),
        ];
        let needed = BTreeSet::from(["/home/me/.docker/config.json".into(), "/var/cache/tarblk".into()]);
        let go = not_on_the_way(&mounts, &needed);
        // /mnt/shared is undone by whoever undoes it outside.
        assert_eq!(go, BTreeSet::from([3, 4, 8]));
    }

    #[test]
    fn links_are_followed_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("../b/two", at.join("a/one")).unwrap();
        std::os::unix::fs::symlink(at.join("c"), at.join("b/two")).unwrap();
        let found = places(&at.join("a/one/file"));
        assert_eq!(found, [at.join("a/one/file"), at.join("b/two/file"), at.join("c/file")]);
        std::os::unix::fs::symlink("loop", at.join("loop")).unwrap();
        assert!(places(&at.join("loop/x")).len() < 50);
    }

    #[test]
    fn the_c_library_is_needed() {
        assert!(
            mapped_files()
                .iter()
                .any(|path| path.to_string_lossy().contains("libc"))
        );
    }
}
