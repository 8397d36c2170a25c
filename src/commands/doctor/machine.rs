//! What this machine has. In: its files, under roots that a test can choose. Out: checks.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::commands::attach::states;
use crate::commands::layer::cache_dir;
use crate::device::inventory::{self, Status};
use crate::device::service;
use crate::device::state::StateDir;
use crate::quantity::show_size;

/// The bit of `CAP_SYS_ADMIN` in a set of capabilities.
const SYS_ADMIN: u32 = 21;
/// With fewer descriptors a device with many layers and connections runs out of them.
const FEW_DESCRIPTORS: u64 = 1024;
/// With less room the cache keeps hardly anything, in bytes.
const LITTLE_ROOM: u64 = 1 << 30;

/// Where to look.
#[derive(Debug)]
pub(super) struct Machine {
    proc: PathBuf,
    dev: PathBuf,
    /// Of the running kernel.
    modules: PathBuf,
    cache: PathBuf,
    states: StateDir,
    /// Whether the kernel can limit where a process writes (Landlock).
    limits_writes: bool,
    /// Whether this process can make a ring; or why not.
    ring: Result<(), String>,
    descriptors: u64,
    is_root: bool,
}

impl Machine {
    /// This one.
    pub(super) fn this(cache: Option<PathBuf>) -> Self {
        let kernel = rustix::system::uname();
        Self {
            proc: "/proc".into(),
            dev: "/dev".into(),
            modules: Path::new("/lib/modules").join(kernel.release().to_string_lossy().as_ref()),
            cache: cache.unwrap_or_else(cache_dir),
            states: states(),
            limits_writes: service::limits_writes(),
            ring: io_uring::IoUring::new(2).map(drop).map_err(|error| error.to_string()),
            descriptors: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            is_root: rustix::process::geteuid().is_root(),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = vec![self.kernel(), self.rights(), self.sandbox(), self.ring(), self.ext4()];
        checks.extend(self.back_ends());
        checks.extend([self.descriptors(), self.states(), self.cache()]);
        checks.extend(self.devices());
        checks
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.proc.join(path)).unwrap_or_default()
    }

    fn kernel(&self) -> Check {
        let release = self.read("sys/kernel/osrelease");
        let release = release.trim();
        let mut numbers = release
            .split(|c: char| !c.is_ascii_digit())
            .map(|part| part.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let found = format!("Linux {release}");
        match version {
            (0..5, _) | (5, 0..10) => Check::problem("kernel", found, "tarblk needs Linux 5.10 or later"),
            (5, _) => Check::warning("kernel", found, "ublk, the faster back end, is in Linux 6.0 and later"),
            _ => Check::ok("kernel", found),
        }
    }

    fn rights(&self) -> Check {
        let name = "rights";
        let status = self.read("self/status");
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective
            .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
            .unwrap_or(0);
        let may_mount = effective >> SYS_ADMIN & 1 == 1;
        match (self.is_root, may_mount) {
            (true, true) => Check::ok(name, "root, with CAP_SYS_ADMIN"),
            (true, false) => Check::problem(
                name,
                "root without CAP_SYS_ADMIN",
                "in a container: run it with --privileged, or tarblk outside and bind-mount what it mounts",
            ),
            (false, _) => Check::warning(
                name,
                "not root: attach, mount and bench will not work; index, ls, diff and image will",
                "use sudo",
            ),
        }
    }

    /// How far the kernel confines the service.
    fn sandbox(&self) -> Check {
        let name = "sandbox";
        let has_filters = self
            .read("self/status")
            .lines()
            .any(|line| line.starts_with("Seccomp:"));
        match (has_filters, self.limits_writes) {
            (true, true) => Check::ok(
                name,
                "the service drops privileges, filters its system calls (seccomp), and writes only to its own directories (Landlock)",
            ),
            (true, false) => Check::warning(
                name,
                "this kernel has no Landlock: the service drops privileges and filters its system calls, but where it writes is not limited",
                "use Linux 5.19 or later with `landlock` in its list of security modules (lsm=)",
            ),
            (false, _) => Check::warning(
                name,
                "this kernel has no seccomp: the service drops privileges, but its system calls are not filtered",
                "use a kernel with CONFIG_SECCOMP_FILTER",
            ),
        }
    }

    fn ring(&self) -> Check {
        let name = "io_uring";
        match &self.ring {
            Ok(()) => Check::ok(name, "can be used"),
            Err(why) => Check::problem(
                name,
                format!("cannot be used: {why}"),
                match self.read("sys/kernel/io_uring_disabled").trim() {
                    "1" | "2" => "allow it: sysctl kernel.io_uring_disabled=0",
                    _ => {
                        "a seccomp filter or container runtime may forbid it; allow io_uring_setup, _enter and _register"
                    }
                },
            ),
        }
    }

    /// Whether the kernel has a filesystem, or a module for it.
    fn has_filesystem(&self, name: &str) -> bool {
        self.read("filesystems")
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name))
            || self.has_module(name)
    }

    /// Whether there is a module of this name, or it is built in.
    fn has_module(&self, name: &str) -> bool {
        let is_listed = |list: &str| {
            let text = fs::read_to_string(self.modules.join(list)).unwrap_or_default();
            text.lines().any(|line| {
                let path = line.split(':').next().unwrap_or_default();
                path.rsplit('/').next().and_then(|file| file.split('.').next()) == Some(name)
            })
        };
        is_listed("modules.dep") || is_listed("modules.builtin")
    }

    fn ext4(&self) -> Check {
        if self.has_filesystem("ext4") {
            Check::ok("ext4", "the kernel has it")
        } else {
            Check::problem(
                "ext4",
                "the kernel has no ext4: devices can be attached but not mounted",
                "load or build ext4",
            )
        }
    }

    /// ublk, and FUSE with loop devices; one of them is enough.
    fn back_ends(&self) -> Vec<Check> {
        let there = |node: &str| self.dev.join(node).exists();
        let ublk = if there("ublk-control") {
            Ok("/dev/ublk-control is there")
        } else if self.has_module("ublk_drv") {
            Ok("the module ublk_drv is there and is loaded when it is needed")
        } else {
            Err("this kernel has no ublk_drv")
        };
        let missing: Vec<&str> = [("fuse", "fuse"), ("loop-control", "loop")]
            .into_iter()
            .filter(|(node, module)| !there(node) && !self.has_module(module))
            .map(|(_, module)| module)
            .collect();
        let by_loop = match missing[..] {
            [] => Ok("FUSE and loop devices are there"),
            _ => Err(format!("the kernel has no {}", missing.join(" and no "))),
        };
        let ublk = match (ublk, &by_loop) {
            (Ok(found), _) => Check::ok("ublk", found),
            (Err(found), Ok(_)) => Check::warning(
                "ublk",
                format!("{found}: FUSE under a loop device is used, which is slower"),
                "use a kernel of 6.0 or later with CONFIG_BLK_DEV_UBLK",
            ),
            (Err(found), Err(_)) => Check::problem(
                "ublk",
                format!("{found}, and no other back end works: nothing can be attached"),
                "load ublk_drv, or fuse and loop; in a container: pass /dev/fuse, /dev/loop-control and /dev/loop* in",
            ),
        };
        let by_loop = match by_loop {
            Ok(found) => Check::ok("loop", found),
            Err(found) => Check::warning(
                "loop",
                found,
                "only ublk can be used: load fuse and loop for the other back end",
            ),
        };
        vec![ublk, by_loop]
    }

    fn descriptors(&self) -> Check {
        let found = match self.descriptors {
            u64::MAX => "unlimited".to_owned(),
            limit => format!("{limit} at most"),
        };
        if self.descriptors < FEW_DESCRIPTORS {
            let advice = format!("raise it: ulimit -n {FEW_DESCRIPTORS}, or LimitNOFILE= of the unit");
            Check::warning("open files", found, advice)
        } else {
            Check::ok("open files", found)
        }
    }

    fn states(&self) -> Check {
        let path = self.states.path();
        match directory(path, "tarblk keeps here what is attached") {
            Err(check) => check("state directory"),
            Ok(found) => Check::ok("state directory", found),
        }
    }

    fn cache(&self) -> Check {
        let name = "cache directory";
        let found = match directory(&self.cache, "what is fetched is kept here") {
            Err(check) => return check(name),
            Ok(found) => found,
        };
        let nearest = nearest(&self.cache);
        let statistics = match rustix::fs::statvfs(&nearest) {
            Ok(statistics) => statistics,
            Err(error) => return Check::problem(name, format!("{found}: {error}"), "name another one with --cache"),
        };
        let free = statistics.f_bavail.saturating_mul(statistics.f_frsize);
        let found = format!("{found}, {} free", show_size(free));
        // What holds no named layer's bytes is a file without a name.
        let unnamed = rustix::fs::open(
            &nearest,
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        );
        match unnamed {
            Err(rustix::io::Errno::ROFS) => Check::warning(
                name,
                format!("{found}: read-only"),
                "nothing is kept; name another one with --cache",
            ),
            Err(error) => Check::warning(
                name,
                format!("{found}: files without a name cannot be made there: {error}"),
                "use a filesystem with O_TMPFILE: ext4, xfs, btrfs or tmpfs",
            ),
            Ok(_) if free < LITTLE_ROOM => Check::warning(name, found, "make room, or name another one with --cache"),
            Ok(_) => Check::ok(name, found),
        }
    }

    fn devices(&self) -> Option<Check> {
        let (listed, damaged) = inventory::list(&self.states).ok()?;
        let dead: Vec<&str> = listed
            .iter()
            .filter(|line| line.status == Status::Dead)
            .map(|line| line.state.name.as_str())
            .collect();
        let name = "devices";
        let served = listed.len() - dead.len();
        Some(match (&dead[..], damaged.first()) {
            ([], None) => Check::ok(name, format!("{served} served")),
            ([], Some(error)) => Check::warning(name, error.to_string(), "remove the damaged file"),
            (dead, _) => Check::problem(
                name,
                format!("{served} served; of {} the service is dead", dead.join(", ")),
                "`tarblk umount DIR` or `tarblk detach DEVICE` cleans up",
            ),
        })
    }
}

/// The directory itself, or what is nearest above it.
fn nearest(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Whether a directory can be trusted and used by this user, or made.
fn directory(path: &Path, purpose: &str) -> Result<String, Box<dyn FnOnce(&'static str) -> Check>> {
    let shown = path.display().to_string();
    let problem = |found: String, advice: String| -> Box<dyn FnOnce(&'static str) -> Check> {
        Box::new(move |name| Check::problem(name, found, advice))
    };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = nearest(path);
            return match rustix::fs::access(&above, rustix::fs::Access::WRITE_OK) {
                Ok(()) => Ok(format!("{shown}, made when it is needed")),
                Err(error) => Err(problem(
                    format!(
                        "{shown} is not there, and {} cannot be written: {error}",
                        above.display()
                    ),
                    format!("make it, owned by this user: {purpose}"),
                )),
            };
        }
        Err(error) => {
            return Err(problem(
                format!("{shown}: {error}"),
                format!("make it usable: {purpose}"),
            ));
        }
    };
    let user = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(problem(
            format!("{shown} is no directory"),
            format!("move it away: {purpose}"),
        ));
    }
    if meta.uid() != user {
        return Err(problem(
            format!("{shown} is owned by user {}", meta.uid()),
            format!(
                "chown {user} {shown}, after a look at what is in it: its owner can change what is read from there"
            ),
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(problem(
            format!("{shown} can be written by others (mode {:o})", meta.mode() & 0o7777),
            format!("chmod go-w {shown}, after a look at what is in it"),
        ));
    }
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::Health;
    use super::*;

    /// A machine on which all is well, in a directory.
    fn well(dir: &Path) -> Machine {
        let put = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("proc/sys/kernel/osrelease", "6.12.41-amd64\n");
        put("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n");
        put("proc/filesystems", "nodev\ttmpfs\n\text4\n");
        put(
            "modules/modules.dep",
            "kernel/drivers/block/ublk_drv.ko.xz:\nkernel/fs/fuse/fuse.ko.xz:\n",
        );
        put("dev/loop-control", "");
        Machine {
            proc: dir.join("proc"),
            dev: dir.join("dev"),
            modules: dir.join("modules"),
            cache: dir.join("cache"),
            states: StateDir::new(dir.join("states")),
            limits_writes: true,
            ring: Ok(()),
            descriptors: 1 << 20,
            is_root: true,
        }
    }

    fn worst(machine: &Machine) -> Vec<(&'static str, Health)> {
        let all = machine.checks();
        assert!(
            all.iter()
                .all(|check| (check.state == Health::Ok) == check.advice.is_none()),
            "{all:?}"
        );
        all.into_iter()
            .filter(|check| check.state != Health::Ok && !check.found.contains(" free"))
            .map(|check| (check.name, check.state))
            .collect()
    }

    /// Something that makes a machine less well.
    type Change = Box<dyn Fn(&mut Machine)>;

    #[test]
    fn what_is_wrong_is_found_and_nothing_else() {
        let (bad, worse) = (Health::Warning, Health::Problem);
        let cases: [(Change, &[(&str, Health)]); 11] = [
            (Box::new(|_| ()), &[]),
            (
                Box::new(|m| fs::write(m.proc.join("sys/kernel/osrelease"), "5.15.0\n").unwrap()),
                &[("kernel", bad)],
            ),
            (
                Box::new(|m| fs::write(m.proc.join("sys/kernel/osrelease"), "4.19.0\n").unwrap()),
                &[("kernel", worse)],
            ),
            (
                Box::new(|m| {
                    fs::write(m.proc.join("self/status"), "CapEff:\t00000000a80425fb\nSeccomp:\t2\n").unwrap();
                }),
                &[("rights", worse)],
            ),
            (Box::new(|m| m.is_root = false), &[("rights", bad)]),
            (Box::new(|m| m.limits_writes = false), &[("sandbox", bad)]),
            (
                Box::new(|m| fs::write(m.proc.join("self/status"), "CapEff:\t000001ffffffffff\n").unwrap()),
                &[("sandbox", bad)],
            ),
            (
                Box::new(|m| m.ring = Err("Operation not permitted".to_owned())),
                &[("io_uring", worse)],
            ),
            (
                Box::new(|m| {
                    fs::write(m.modules.join("modules.dep"), "kernel/fs/fuse/fuse.ko:\n").unwrap();
                    m.descriptors = 28;
                }),
                &[("ublk", bad), ("open files", bad)],
            ),
            (
                Box::new(|m| {
                    fs::remove_file(m.modules.join("modules.dep")).unwrap();
                    fs::write(m.proc.join("filesystems"), "").unwrap();
                }),
                &[("ext4", worse), ("ublk", worse), ("loop", bad)],
            ),
            (
                Box::new(|m| {
                    for dir in [m.cache.as_path(), m.states.path()] {
                        fs::create_dir(dir).unwrap();
                        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
                    }
                }),
                &[("state directory", worse), ("cache directory", worse)],
            ),
        ];
        for (number, (change, found)) in cases.into_iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let mut machine = well(dir.path());
            change(&mut machine);
            assert_eq!(worst(&machine), found, "case {number}");
        }
    }
}
