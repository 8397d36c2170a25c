//! What a service and its keepers may do while they serve, on every back end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tarblk::internals::device::inventory;
use tarblk::internals::device::service;

use super::device_cases::{Images, Lab, daemons, keepers, kill_and_wait, launcher, service_pid, wait_until};
use super::read_all;

/// `SYS_ADMIN`, `SYS_RESOURCE`, `IPC_LOCK`, `DAC_READ_SEARCH` (linux/capability.h).
const KEPT: u64 = 1 << 21 | 1 << 24 | 1 << 14 | 1 << 2;

/// The fields of `/proc/PID/status` of each of a process's threads.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let status = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = |text: String| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect()
    };
    status.map(fields).collect()
}

/// Whether every thread of a process is confined: `effective` are the capabilities that its first thread has at hand. The others
/// may have fewer.
fn is_confined(pid: u32, effective: u64) -> bool {
    let set = |status: &BTreeMap<String, String>, name: &str| u64::from_str_radix(&status[name], 16).unwrap();
    // What this process itself lacks nobody below it has.
    let kept = KEPT & set(&threads(std::process::id())[0], "CapBnd");
    threads(pid).iter().all(|status| {
        let is_first = status["Pid"] == pid.to_string();
        let fits = |name: &str, most: u64| {
            let has = set(status, name);
            if is_first { has == most } else { has & !most == 0 }
        };
        fits("CapEff", effective & kept)
            && fits("CapPrm", kept)
            && fits("CapBnd", kept)
            && set(status, "CapInh") == 0
            && set(status, "CapAmb") == 0
            && status["NoNewPrivs"] == "1"
            && status["Seccomp"] == "2"
    })
}

/// How many filters each process has; the kernel says it since Linux 5.9.
fn filters(lab: &Lab) -> Vec<Option<String>> {
    let mut all: Vec<_> = daemons(lab.path())
        .into_iter()
        .flat_map(threads)
        .map(|status| status.get("Seccomp_filters").cloned())
        .collect();
    all.dedup();
    all
}

pub(crate) fn the_service_and_its_keepers_are_confined() {
    let lab = Lab::new();
    let attached = lab.attach();
    let mut before = None;
    for round in 0..3 {
        wait_until("a confined service and two confined keepers", || {
            let (service, keepers) = (service_pid(&lab), keepers(&lab));
            is_confined(service, KEPT) && keepers.len() == 2 && keepers.iter().all(|pid| is_confined(*pid, 0))
        });
        // Those that are started again inherit it, and do not pile it up.
        let filters = filters(&lab);
        assert_eq!(filters.len(), 1, "{filters:?}");
        assert_eq!(*before.get_or_insert_with(|| filters.clone()), filters);
        if round == 0 {
            kill_and_wait(service_pid(&lab));
        } else {
            for keeper in keepers(&lab) {
                kill_and_wait(keeper);
            }
        }
        assert!(read_all(&attached.state.device) == read_all(&lab.image()));
    }
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

/// What a confined process tries, from within: each by name, with what came of it.
pub(crate) fn attempts() -> Vec<(&'static str, Result<(), rustix::io::Errno>)> {
    let nowhere = "/tarblk-there-is-no-such-directory";
    vec![
        (
            "umount",
            rustix::mount::unmount(nowhere, rustix::mount::UnmountFlags::empty()),
        ),
        (
            "mount",
            rustix::mount::mount_change(nowhere, rustix::mount::MountPropagationFlags::PRIVATE),
        ),
        ("chroot", rustix::process::chroot("/")),
        (
            "sethostname",
            rustix::system::sethostname(rustix::system::uname().nodename().to_bytes()),
        ),
        (
            "mknod",
            rustix::fs::mknodat(
                rustix::fs::CWD,
                std::env::temp_dir().join(format!("tarblk-pipe-{}", std::process::id())),
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR,
                0,
            ),
        ),
        (
            "setns",
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&fs::File::open("/proc/self/ns/uts").unwrap()),
                None,
            ),
        ),
    ]
}

/// The builder runs in the service: it tells in its error what it could do there.
pub(crate) fn forbidden_calls_fail_in_the_service() {
    let told: Vec<_> = {
        let lab = Lab::new();
        let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("try-calls"))).unwrap_err();
        lab.assert_clean();
        error.to_string().split(", ").map(str::to_owned).collect()
    };
    assert_eq!(told.len(), attempts().len(), "{told:?}");
    for line in told {
        assert!(line.ends_with(" EPERM"), "{line}");
    }
}

/// Whether this kernel limits where the service writes.
fn has_landlock() -> bool {
    // The service says in its log what it could not do.
    let lab = Lab::new();
    let attached = lab.attach();
    let log = fs::read_to_string(attached.state.log.as_ref().unwrap()).unwrap();
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
    let is_said = log.contains("not confined by Landlock");
    assert!(log.contains("confined by no_new_privs"), "{log}");
    !is_said
}

/// A device whose files lie elsewhere is served all the same, by a service that may write there; the others pause.
pub(crate) fn another_directory_to_write_to_is_a_pause() {
    let is_limited = has_landlock();
    let lab = Lab::new();
    let first = lab.attach();
    let service = service_pid(&lab);
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("image");
    fs::copy(lab.image(), &file).unwrap();
    let mut spec = lab.spec(Some(1), Some("write"));
    spec.image.file.clone_from(&file);
    spec.image.named.clone_from(&file);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let content = read_all(&lab.image());
    let second = std::thread::scope(|scope| {
        let reader = scope.spawn(|| super::device_cases::read_and_compare(&first.state.device, &content, 3, &stop));
        let second = service::launch::<Images>(&launcher(), &spec);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.join().expect("the reader failed") > 0);
        second.unwrap()
    });
    assert_eq!(service_pid(&lab) != service, is_limited);
    let written = |file: &Path| -> PathBuf { file.with_extension("written") };
    assert!(written(&file).exists());
    // It may still write to the first one's directory, and the next service to both.
    let third = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("write"))).unwrap();
    for file in [&file, &lab.image()] {
        fs::remove_file(written(file)).unwrap();
    }
    wait_until("two keepers", || keepers(&lab).len() == 2);
    kill_and_wait(service_pid(&lab));
    service_pid(&lab);
    for (device, file) in [(&second, &file), (&third, &lab.image())] {
        assert!(read_all(&device.state.device) == content);
        assert!(written(file).exists());
    }
    // And nowhere else.
    let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("write-anywhere")));
    assert_eq!(error.is_err(), is_limited);
    for device in [Some(first), Some(second), Some(third), error.ok()]
        .into_iter()
        .flatten()
    {
        inventory::detach(&lab.states(), &device.state.device).unwrap();
    }
    lab.assert_clean();
}
