//! Which system calls a container's programs may not make. In: whether there is to be a filter. Out: the `seccomp` part of the runtime's
//! document (OCI runtime specification, "linux.seccomp"), which the runtime makes a filter of.
//!
//! It lists what is refused, which is what engines refuse by default to a container of these capabilities: calls that run the machine, and
//! calls by which kernels were broken into and that programs do without. All others pass, those of newer kernels too. A debugger works.

use serde_json::{Value, json};

/// Refused whatever is asked. Names that a runtime does not know it passes over.
const REFUSED: &[&str] = &[
    // Mounts and namespaces.
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "open_tree_attr",
    "pivot_root",
    "setns",
    "umount",
    "umount2",
    "unshare",
    // Code in the kernel, and other kernels.
    "bpf",
    "create_module",
    "delete_module",
    "finit_module",
    "get_kernel_syms",
    "init_module",
    "kexec_file_load",
    "kexec_load",
    "query_module",
    "reboot",
    // The machine's settings and devices.
    "_sysctl",
    "acct",
    "clock_settime",
    "clock_settime64",
    "ioperm",
    "iopl",
    "nfsservctl",
    "quotactl",
    "quotactl_fd",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "sysfs",
    "syslog",
    "uselib",
    "vhangup",
    "vm86",
    "vm86old",
    // Files beside their paths, and what other programs do.
    "fanotify_init",
    "lookup_dcookie",
    "open_by_handle_at",
    "perf_event_open",
    "ustat",
    // Keys, which have no namespaces.
    "add_key",
    "keyctl",
    "request_key",
    // Where memory lies, and faults that a program answers for.
    "get_mempolicy",
    "mbind",
    "migrate_pages",
    "move_pages",
    "set_mempolicy",
    "set_mempolicy_home_node",
    "userfaultfd",
    // Operations that pass by every filter of calls.
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
];

/// Flags of clone for namespaces of mounts, control groups, names, IPC, users, processes and networks.
const NEW_NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Families of sockets that are the whole machine's: of the kernel's ciphers, and of what runs it if that is a virtual machine.
const OF_THE_MACHINE: [i32; 2] = [libc::AF_ALG, libc::AF_VSOCK];

/// Types into a terminal as if a person did, and pastes into the console.
const OF_TERMINALS: [libc::Ioctl; 2] = [libc::TIOCSTI, libc::TIOCLINUX];

/// Makes all that can be read executable (`READ_IMPLIES_EXEC`).
const READ_IMPLIES_EXEC: u64 = 0x0040_0000;
/// Set where all bits are: that asks what holds, and sets nothing.
const ONLY_ASKS: u64 = 0x8000_0000;

/// Where the flags of clone are among its arguments.
const FLAGS_OF_CLONE: u32 = if cfg!(target_arch = "s390x") { 1 } else { 0 };

/// The filter.
pub(super) fn filter() -> Value {
    let refused = |name: &str, errno: i32, args: Value| json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args});
    // Of the bits of `mask` in an argument, these are set and no others.
    let has = |index: u32, mask: Value, bits: Value| json!([{"index": index, "value": mask, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"}]);
    // The kernel reads 32 bits of it.
    let is = |index: u32, value: Value| has(index, json!(u32::MAX), value);
    let mut calls = vec![
        json!({"names": REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM}),
        // Its flags lie in memory, where no filter sees them; C libraries take clone then.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}),
        refused(
            "personality",
            libc::EPERM,
            has(0, json!(ONLY_ASKS | READ_IMPLIES_EXEC), json!(READ_IMPLIES_EXEC)),
        ),
    ];
    calls.extend(
        NEW_NAMESPACES.map(|flag| refused("clone", libc::EPERM, has(FLAGS_OF_CLONE, flag.into(), flag.into()))),
    );
    calls.extend(OF_THE_MACHINE.map(|family| refused("socket", libc::EAFNOSUPPORT, is(0, family.into()))));
    calls.extend(OF_TERMINALS.map(|request| refused("ioctl", libc::EPERM, is(1, json!(request)))));
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": architectures(),
        "syscalls": calls,
    })
}

/// The machine's architecture and those that its kernel runs as well: calls of others than these end a program.
fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        "s390x" => &["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
        "powerpc64" if cfg!(target_endian = "little") => &["SCMP_ARCH_PPC64LE"],
        // The runtime's own.
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_call_is_refused_in_one_way() {
        let filter = filter();
        let calls = filter["syscalls"].as_array().unwrap();
        let mut whole = BTreeSet::new();
        let mut by_argument = BTreeSet::new();
        for call in calls {
            assert_eq!(call["action"], "SCMP_ACT_ERRNO");
            for name in call["names"].as_array().unwrap() {
                let name = name.as_str().unwrap();
                if call["args"].is_array() {
                    by_argument.insert(name);
                } else {
                    assert!(whole.insert(name), "{name} twice");
                }
            }
        }
        assert!(whole.is_disjoint(&by_argument));
        assert_eq!(by_argument, BTreeSet::from(["clone", "ioctl", "personality", "socket"]));
        assert!(whole.len() == REFUSED.len() + 1);
    }
}
