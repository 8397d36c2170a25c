//! Which system calls a container's programs may not make. In: whether there is to be a filter. Out: the `seccomp` part of the runtime's
//! document (OCI runtime specification, "linux.seccomp"), which the runtime makes a filter of.
//!
//! It lists what is refused, which is what engines refuse by default to a container of these capabilities: calls that run the machine, and
//! calls by which kernels were broken into and that programs do without. All others pass, those of newer kernels too. A debugger works.

use serde_json::{Value, json};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
const EAFNOSUPPORT: i32 = 97;

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

/// `CLONE_NEW*` of clone: namespaces of mounts, control groups, names, IPC, users, processes and networks.
const NEW_NAMESPACES: [u64; 7] = [
    0x0002_0000,
    0x0200_0000,
    0x0400_0000,
    0x0800_0000,
    0x1000_0000,
    0x2000_0000,
    0x4000_0000,
];

/// Families of sockets that are the whole machine's: of the kernel's ciphers, and of what runs it if that is a virtual machine.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// Types into a terminal as if a person did (`TIOCSTI`), and pastes into the console (`TIOCLINUX`).
const OF_TERMINALS: [u64; 2] = [0x5412, 0x541c];

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
    let has = |index: u32, mask: u64, bits: u64| json!([{"index": index, "value": mask, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"}]);
    // The kernel reads 32 bits of it.
    let is = |index: u32, value: u64| has(index, 0xffff_ffff, value);
    let mut calls = vec![
        json!({"names": REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM}),
        // Its flags lie in memory, where no filter sees them; C libraries take clone then.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}),
        refused(
            "personality",
            EPERM,
            has(0, ONLY_ASKS | READ_IMPLIES_EXEC, READ_IMPLIES_EXEC),
        ),
    ];
    calls.extend(NEW_NAMESPACES.map(|flag| refused("clone", EPERM, has(FLAGS_OF_CLONE, flag, flag))));
    calls.extend([AF_ALG, AF_VSOCK].map(|family| refused("socket", EAFNOSUPPORT, is(0, family))));
    calls.extend(OF_TERMINALS.map(|request| refused("ioctl", EPERM, is(1, request))));
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
