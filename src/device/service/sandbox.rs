//! What the service and its keepers may still do once they run. In: the directories that serving writes to. Out: this process,
//! and every thread and process that it starts from then on, with
//!
//! - `no_new_privs`, and no capability that serving devices does not need ([`KEPT`]), not even in the bounding set;
//! - a seccomp filter that refuses ([`denied_calls`]) what no server of devices ever does;
//! - Landlock, where the kernel has it: files are written, made and removed only beneath the given directories.
//!
//! The filter lists what is refused, not what is allowed. What an allowed list would have to hold is decided by the C library and by
//! libraries of TLS, rings and timers, and changes with their versions; one call too few is a mount that fails. Programs are still
//! executed: the keepers start the service, it starts them and credential helpers. They inherit all of this, and cannot gain
//! anything by being set-user-ID. A filter does not see what io\_uring is asked to do; Landlock and capabilities hold there too.
//!
//! All three are of a thread and inherited by what it starts. Invariant: [`enter`] is called before the process has another thread
//! that outlives the start; keepers and the services that they start inherit everything and do not enter again, so filters do not pile up.
//! A process that inherited can never get more: what needs more (another cache directory, another version) is started by a command.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};

/// The capabilities that serving devices needs:
/// `SYS_ADMIN` to make, configure and remove ublk, FUSE and loop devices;
/// `SYS_RESOURCE` so that a queue's thread does not wait for its own device when memory is short (`PR_SET_IO_FLUSHER`);
/// `IPC_LOCK` to keep the notes of a FUSE connection in memory;
/// `DAC_READ_SEARCH` to read layers, credentials and certificates of the user who called through sudo.
pub(super) const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::DAC_READ_SEARCH);

/// The highest number that a capability may have in a set.
const MOST_CAPABILITIES: u32 = 63;

/// Where devices are opened and set up, beside the state directory. No files are made there: that takes `CAP_MKNOD`, or is refused.
const WRITTEN_TO: [&str; 2] = ["/dev", "/sys/devices/virtual"];

/// Confines this thread and all that it starts: capabilities, system calls, and writing anywhere but beneath `writable`. What this kernel
/// cannot do is logged and goes without.
pub(super) fn enter(writable: &[PathBuf]) {
    let parts: [(&str, io::Result<()>); 4] = [
        (
            "no_new_privs",
            rustix::thread::set_no_new_privs(true).map_err(Into::into),
        ),
        ("Landlock", limit_writes(writable)),
        ("capabilities", drop_capabilities()),
        ("seccomp", filter_calls()),
    ];
    let mut held = Vec::new();
    for (what, done) in parts {
        match done {
            Ok(()) => held.push(what),
            Err(error) => log::warn!("not confined by {what}: {error}; going on without"),
        }
    }
    log::info!("confined by {}", held.join(", "));
}

/// A directory beneath which this process may write. Another one that is made in its place is not: rules are of directories, whatever
/// they are called.
#[derive(Clone, Debug)]
pub(super) struct Writable {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl Writable {
    /// The directory that is called `path` now, if there is one.
    pub(super) fn of(path: &Path) -> Option<Self> {
        Some(Self {
            path: path.to_owned(),
            id: id_of(path)?,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether files can be made in it. False where this process inherited rules from before the directory was there.
    pub(super) fn takes_files(&self) -> bool {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let made = rustix::fs::open(&self.path, flags, Mode::RUSR | Mode::WUSR);
        !matches!(made, Err(Errno::ACCESS | Errno::PERM))
    }

    /// Whether `path`, without links in it, is beneath the directory, and that is still there.
    pub(super) fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.path) && id_of(&self.path) == Some(self.id)
    }
}

fn id_of(path: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Lets go of every capability for now; those of [`KEPT`] come back to a program that this process executes. For a keeper, which holds
/// descriptors and needs none itself.
pub(super) fn rest_capabilities() {
    let rested = rustix::thread::capabilities(None).and_then(|sets| {
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::empty(),
                ..sets
            },
        )
    });
    if let Err(error) = rested {
        log::warn!("a keeper cannot let go of its capabilities: {error}");
    }
}

/// Whether this kernel can limit where a process writes.
pub(crate) fn limits_writes() -> bool {
    ruleset().is_ok()
}

fn drop_capabilities() -> io::Result<()> {
    let mut outcome = Ok(());
    for number in 0..=MOST_CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(capability) {
            continue;
        }
        // The kernel knows those below a number of its own.
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) => {
                if let Err(error) = rustix::thread::remove_capability_from_bounding_set(capability) {
                    outcome = Err(error.into());
                }
            }
            Ok(false) => {}
            Err(_) => break,
        }
    }
    let had = rustix::thread::capabilities(None)?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: had.effective & KEPT,
            permitted: had.permitted & KEPT,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    outcome
}

/// A ruleset for everything that changes what is on disk; an error where the kernel has no Landlock, or one that cannot let files
/// move between directories (before Linux 5.19).
fn ruleset() -> io::Result<Ruleset> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)
        .and_then(|ruleset| {
            ruleset
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_write(ABI::V3))
        })
        .map_err(io::Error::other)
}

fn limit_writes(writable: &[PathBuf]) -> io::Result<()> {
    let changes = AccessFs::from_write(ABI::V3);
    let mut rules = ruleset()?.create().map_err(io::Error::other)?;
    let beneath = writable.iter().map(|path| (path.as_path(), changes));
    let written = WRITTEN_TO.map(|path| (Path::new(path), AccessFs::WriteFile | AccessFs::Truncate));
    for (path, rights) in beneath.chain(written) {
        match PathFd::new(path) {
            Ok(dir) => {
                rules = rules
                    .add_rule(PathBeneath::new(dir, rights))
                    .map_err(io::Error::other)?;
            }
            Err(error) => log::debug!("{error}: nothing is written there"),
        }
    }
    let status = rules.restrict_self().map_err(io::Error::other)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(io::Error::other("this kernel has none"));
    }
    Ok(())
}

/// System calls that are answered with `EPERM`.
fn denied_calls() -> Vec<libc::c_long> {
    let mut calls = vec![
        // Other processes' memory and descriptors.
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        // The kernel itself.
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_syslog,
        // What `CAP_SYS_ADMIN` allows besides devices: mounts, namespaces, quotas, swap, accounting, names, watching files.
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_quotactl,
        libc::SYS_quotactl_fd,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_fanotify_init,
        libc::SYS_open_by_handle_at,
        libc::SYS_vhangup,
        // Keys, clocks.
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
        libc::SYS_clock_adjtime,
        // Device nodes.
        libc::SYS_mknodat,
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_mknod, libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt]);
    calls
}

/// `clone` with any of these makes a namespace.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWCGROUP,
];

fn filter_calls() -> io::Result<()> {
    for program in filters()? {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// The filters, as programs for the kernel.
fn filters() -> io::Result<Vec<BpfProgram>> {
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> =
        denied_calls().into_iter().map(|call| (call, Vec::new())).collect();
    let mut clones = Vec::new();
    for flag in NAMESPACES {
        let flag = u64::from(flag.cast_unsigned());
        let operator = SeccompCmpOp::MaskedEq(flag);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, operator, flag);
        clones.push(SeccompRule::new(vec![condition.map_err(io::Error::other)?]).map_err(io::Error::other)?);
    }
    denied.insert(libc::SYS_clone, clones);
    // Its flags are in memory, where a filter cannot look. The C library does without where it is not there.
    let unknown = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let mut programs = vec![program(denied, libc::EPERM)?, program(unknown, libc::ENOSYS)?];
    if cfg!(target_arch = "x86_64") {
        programs.push(without_x32());
    }
    Ok(programs)
}

/// Answers `calls` with `error` and lets all others pass.
fn program(calls: BTreeMap<i64, Vec<SeccompRule>>, error: libc::c_int) -> io::Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let answer = SeccompAction::Errno(error.cast_unsigned());
    SeccompFilter::new(calls, SeccompAction::Allow, answer, arch)
        .and_then(TryInto::try_into)
        .map_err(io::Error::other)
}

/// On x86-64 every call has a second number, with this bit set (the x32 ABI, where the kernel has it).
const X32_BIT: u32 = 0x4000_0000;

/// Answers all calls by their second numbers with `ENOSYS`.
fn without_x32() -> BpfProgram {
    // linux/bpf_common.h, linux/filter.h; the call's number is the first field of `struct seccomp_data`.
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    vec![
        step(LOAD_WORD, 0, 0, 0),
        step(JUMP_IF_GREATER_OR_EQUAL, 0, 1, X32_BIT),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(call: libc::c_long) -> i32 {
        // SAFETY: no call of these tests does anything with arguments of zero but fail.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(call, 0, 0, 0, 0, 0, 0) };
        assert_eq!(result, -1, "call {call} did not fail");
        io::Error::last_os_error().raw_os_error().unwrap()
    }

    #[test]
    fn what_is_denied_fails_and_the_rest_works() {
        // Filters are a thread's for ever.
        let confined = std::thread::spawn(|| {
            filter_calls().unwrap();
            for call in denied_calls() {
                assert_eq!(errno(call), libc::EPERM, "call {call}");
            }
            assert_eq!(errno(libc::SYS_clone3), libc::ENOSYS);
            if cfg!(target_arch = "x86_64") {
                assert_eq!(errno(i64::from(X32_BIT) | libc::SYS_ptrace), libc::ENOSYS);
            }
            for flag in NAMESPACES {
                // SAFETY: refused before anything is made.
                #[allow(unsafe_code)]
                let result = unsafe { libc::syscall(libc::SYS_clone, flag, 0, 0, 0, 0) };
                assert_eq!(result, -1);
                assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
            }
            // Threads, programs, files, sockets and rings go on working.
            std::thread::spawn(|| ()).join().unwrap();
            assert!(std::process::Command::new("true").status().unwrap().success());
            assert_eq!(std::fs::read("/dev/null").unwrap(), b"");
            std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        });
        confined.join().unwrap();
    }

    #[test]
    fn files_are_written_only_where_they_may() {
        if !limits_writes() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        for path in [&inside, &outside] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join("old"), "old").unwrap();
        }
        let confined = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            limit_writes(std::slice::from_ref(&inside)).unwrap();
            std::fs::write(inside.join("new"), "new").unwrap();
            std::fs::create_dir(inside.join("dir")).unwrap();
            std::fs::rename(inside.join("new"), inside.join("dir/new")).unwrap();
            std::fs::remove_file(inside.join("old")).unwrap();
            assert_eq!(std::fs::read(outside.join("old")).unwrap(), b"old");
            for refused in [
                std::fs::write(outside.join("old"), "new"),
                std::fs::write(outside.join("new"), "new"),
                std::fs::remove_file(outside.join("old")),
                std::fs::rename(inside.join("dir/new"), outside.join("moved")),
                std::fs::create_dir(outside.join("dir")),
                std::os::unix::fs::symlink("old", outside.join("link")),
            ] {
                assert!(refused.is_err());
            }
            std::fs::write("/dev/null", "x").unwrap();
        });
        confined.join().unwrap();
    }
}
