//! Images that are written on and run without a container engine: `tarblk mount --overlay` and `tarblk run`, from small images with a
//! shell; and what they refuse, or leave when they are killed: nothing.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod containers;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::session::is_mounted;
use containers::Workshop;
use serde_json::json;

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().unwrap().success()
}

/// Waits until no device is attached any more.
fn wait_until_detached(workshop: &Workshop) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while workshop.json(&["ps", "--json"]) != json!([]) {
        assert!(Instant::now() < deadline, "{}", workshop.good(&["ps"]));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The options of what is mounted on a directory.
fn mount_options(dir: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines: Vec<_> = mounts
        .lines()
        .filter(|line| line.split(' ').nth(4) == dir.to_str())
        .collect();
    let [line] = lines[..] else { panic!("{lines:?}") };
    line.split(' ').nth(5).unwrap().to_owned()
}

#[test]
fn what_is_written_on_an_image_is_kept_beside_it() {
    let Some(workshop) = Workshop::new("what_is_written_on_an_image_is_kept_beside_it", &[]) else {
        return;
    };
    let image = workshop.image("one", &json!({}));
    let dir = workshop.path("m");
    fs::create_dir(&dir).unwrap();
    // All that overlayfs' options would stumble over.
    let upper = workshop.path("up, with: a\\ few");
    let mount = || {
        workshop.good(&[
            "mount",
            "--overlay",
            upper.to_str().unwrap(),
            "-o",
            "rw,noexec",
            &image,
            &workshop.at("m"),
        ])
    };
    mount();
    assert_eq!(
        fs::metadata(&dir).unwrap().mode() & 0o7777,
        0o755,
        "as the image's root"
    );
    assert_eq!(mount_options(&dir), "rw,nosuid,nodev,noexec,relatime");
    let listed = workshop.json(&["ps", "--json"]);
    assert_eq!(
        (&listed[0]["mounts"], listed.as_array().unwrap().len()),
        (&json!([dir]), 1)
    );
    assert_eq!(workshop.mounts(), [workshop.at("m")], "nothing else is mounted");
    assert!(
        workshop
            .good(&["stats", &workshop.at("m")])
            .contains(listed[0]["device"].as_str().unwrap())
    );
    fs::write(dir.join("new"), "new").unwrap();
    fs::write(dir.join("dir/above"), "changed").unwrap();
    fs::remove_file(dir.join("etc/group")).unwrap();
    fs::rename(dir.join("etc/passwd"), dir.join("passwd")).unwrap();
    fs::remove_dir_all(dir.join("bin")).unwrap();
    fs::create_dir(dir.join("bin")).unwrap();
    let is_as_written = || {
        assert_eq!(fs::read(dir.join("new")).unwrap(), b"new");
        assert_eq!(fs::read(dir.join("dir/above")).unwrap(), b"changed");
        assert!(!dir.join("etc/group").exists() && !dir.join("etc/passwd").exists());
        assert!(fs::read_to_string(dir.join("passwd")).unwrap().starts_with("root:"));
        assert_eq!(fs::read_dir(dir.join("bin")).unwrap().count(), 0);
    };
    is_as_written();
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
    let mut names: Vec<_> = fs::read_dir(&upper)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["upper", "work"]);
    let whiteout = fs::symlink_metadata(upper.join("upper/etc/group")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    // Again, and unmounted by another program: the device goes with it, also where another service began meanwhile, which took a copy
    // of every mount along.
    mount();
    is_as_written();
    let of_other = |arguments: &[&str]| {
        let mut command = workshop.tarblk(arguments);
        common::succeed(command.env("TARBLK_STATE_DIR", workshop.path("other")))
    };
    let other = String::from_utf8(of_other(&["attach", &image])).unwrap();
    assert!(succeeds("umount", &[&workshop.at("m")]));
    wait_until_detached(&workshop);
    of_other(&["detach", other.trim()]);
    // Detached under a file that is open.
    mount();
    let open = fs::File::open(dir.join("new")).unwrap();
    let device = workshop.json(&["ps", "--json"])[0]["device"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(workshop.bad(&["umount", &workshop.at("m")], 1).contains("is in use by"));
    assert!(workshop.bad(&["detach", &device], 1).contains(&workshop.at("m")));
    workshop.good(&["detach", "--force", &device]);
    assert!(!is_mounted(&dir));
    drop(open);
    wait_until_detached(&workshop);
    // The image is what it was.
    workshop.good(&["mount", &image, &workshop.at("m")]);
    assert_eq!(fs::read(dir.join("dir/above")).unwrap(), b"one");
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
}

#[test]
fn no_overlay_where_others_could_write_or_look() {
    let Some(workshop) = Workshop::new("no_overlay_where_others_could_write_or_look", &[]) else {
        return;
    };
    let image = workshop.image("one", &json!({}));
    for name in ["m", "n", "up", "open", "theirs", "shown"] {
        fs::create_dir(workshop.path(name)).unwrap();
        fs::set_permissions(workshop.path(name), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let mount = |upper: &str, dir: &str| ["mount", "--overlay", upper, &image, dir].map(str::to_owned);
    let refused = |upper: &str| {
        let arguments = mount(&workshop.at(upper), &workshop.at("m"));
        let said = workshop.bad(&arguments.each_ref().map(String::as_str), 1);
        assert_eq!(workshop.json(&["ps", "--json"]), json!([]));
        said
    };
    chown(workshop.path("theirs"), Some(1234), None).unwrap();
    fs::set_permissions(workshop.path("open"), fs::Permissions::from_mode(0o770)).unwrap();
    fs::set_permissions(workshop.path("shown"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("up", workshop.path("link")).unwrap();
    for (upper, why) in [
        ("theirs", "belongs to user 1234"),
        ("theirs/below", "user 1234, who could exchange"),
        ("open", "others may write to it"),
        ("shown", "chmod 700"),
        ("link", "symbolic link"),
        ("m", "lie in each other"),
        ("m/below", "lie in each other"),
    ] {
        let said = refused(upper);
        assert!(said.contains(why), "{upper}: {said}");
    }
    // What is to be directories and is not.
    symlink("/etc", workshop.path("up/upper")).unwrap();
    assert!(refused("up").contains("ot a directory"), "{}", refused("up"));
    fs::remove_file(workshop.path("up/upper")).unwrap();
    // What a killed command left mounted is taken off; two overlays do not write to one directory.
    fs::create_dir(workshop.path("up/lower")).unwrap();
    workshop.good(&["mount", &image, &workshop.at("up/lower")]);
    let arguments = mount(&workshop.at("up"), &workshop.at("m"));
    workshop.good(&arguments.each_ref().map(String::as_str));
    assert_eq!(workshop.mounts(), [workshop.at("m")]);
    let arguments = mount(&workshop.at("up"), &workshop.at("n"));
    let said = workshop.bad(&arguments.each_ref().map(String::as_str), 1);
    assert!(
        said.contains("in use by the overlay on") && said.contains(&workshop.at("m")),
        "{said}"
    );
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
}

/// What runs containers: each test of them is made with both.
#[derive(Clone, Copy)]
enum Runtime {
    Runc,
    Crun,
}

impl Runtime {
    const fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }

    /// A workshop for the test `name`, if it and `programs` are here.
    fn workshop(self, name: &str, programs: &[&str]) -> Option<Workshop> {
        let name = format!("{name}_by_{}", self.program());
        Workshop::new(&name, &[&[self.program()], programs].concat())
    }

    /// `tarblk run`.
    fn run(self, workshop: &Workshop, arguments: &[&str]) -> Command {
        workshop.tarblk(&[&["-q", "run", "--runtime", self.program()], arguments].concat())
    }
}

/// Where control groups of both versions are mounted, crun refuses every container as soon as the second one has a controller. There the
/// test `name` is run once more by itself, in a mount namespace that has the first version alone, and is not to be run here.
fn has_plain_groups(name: &str) -> bool {
    const SECOND: &str = "/sys/fs/cgroup/unified";
    if !is_mounted(Path::new(SECOND)) {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", "umount \"$0\"; exec \"$@\"", SECOND]);
    command.arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name, "--nocapture"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    print!("{said}{errors}");
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{name}: {}",
        output.status
    );
    false
}

/// Has a test run once with each [`Runtime`].
macro_rules! with_both {
    ($test:ident) => {
        mod $test {
            use super::Runtime;

            #[test]
            fn by_runc() {
                super::$test(Runtime::Runc);
            }

            #[test]
            fn by_crun() {
                if super::has_plain_groups(concat!(stringify!($test), "::by_crun")) {
                    super::$test(Runtime::Crun);
                }
            }
        }
    };
}

/// A container with a directory for what it is made of; what it ended with and what it said.
fn run(runtime: Runtime, workshop: &Workshop, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = runtime.run(workshop, arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Nothing of any container is left.
fn assert_none_left(workshop: &Workshop) {
    assert_eq!(fs::read_dir(workshop.path("run")).unwrap().count(), 0);
    workshop.assert_gone();
}

const SETTINGS: &str = r#"{"Env": ["PATH=/bin", "FROM=image"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $FROM $HOME; pwd; id"],
    "User": "web", "WorkingDir": "/dir", "StopSignal": "SIGUSR1", "Hostname": "box"}"#;

with_both!(a_container_is_what_its_image_says);
fn a_container_is_what_its_image_says(runtime: Runtime) {
    let Some(workshop) = runtime.workshop("a_container_is_what_its_image_says", &[]) else {
        return;
    };
    let image = workshop.image("one", &serde_json::from_str(SETTINGS).unwrap());
    let good = |arguments: &[&str]| {
        let (status, out, err) = run(runtime, &workshop, arguments);
        assert_eq!(status, Some(0), "{arguments:?}: {err}");
        out
    };
    assert_eq!(
        good(&[&image]),
        "image /srv\n/dir\nuid=1000(web) gid=1001(staff) groups=29(audio),40(logs),1001(staff)\n"
    );
    // What is wanted goes before what the image says.
    let said = good(&[
        "--user",
        "0",
        "--workdir",
        "/bin",
        "--env",
        "FROM=here",
        "--hostname",
        "other",
        &image,
        "echo $FROM; pwd; id -u; hostname",
    ]);
    assert_eq!(said, "here\n/bin\n0\nother\n");
    assert_eq!(good(&["--entrypoint", "/bin/cat", &image, "above"]), "one");
    assert_eq!(good(&["--entrypoint", "", &image, "hostname"]), "box\n");
    // It has a network, processes and powers of its own, and sees the machine only where it is told to.
    let probe =
        "grep CapEff /proc/self/status; echo $$; ls /sys/class/net; ls /gone; cat /proc/kcore; mount -t tmpfs x /dir";
    let (_, out, err) = run(runtime, &workshop, &["--user", "root", &image, probe]);
    assert_eq!(out, "CapEff:\t00000000800405fb\n1\nlo\n");
    assert!(err.contains("/gone: No such file") && err.contains("mount"), "{err}");
    fs::create_dir(workshop.path("shared")).unwrap();
    let volume = format!("{}:/shared", workshop.at("shared"));
    good(&["--user", "0", "--volume", &volume, &image, "echo word >/shared/file"]);
    assert_eq!(fs::read(workshop.path("shared/file")).unwrap(), b"word\n");
    let (status, _, err) = run(
        runtime,
        &workshop,
        &[
            "--user",
            "0",
            "--volume",
            &format!("{volume}:ro"),
            &image,
            "echo more >/shared/file",
        ],
    );
    assert!(status == Some(1) && err.contains("Read-only"), "{err}");
    let links = fs::read_dir("/sys/class/net").unwrap().count();
    let seen = good(&["--network", "host", &image, "ls /sys/class/net | wc -l"]);
    assert_eq!(seen.trim(), links.to_string());
    // What it writes is gone, or kept where it is said to be, or it cannot.
    let write = "echo $FROM >>/dir/new; cat /dir/new";
    for expected in ["image\n", "image\n"] {
        assert_eq!(good(&["--user", "0", &image, write]), expected);
    }
    let kept = workshop.at("kept");
    assert_eq!(good(&["--user", "0", "--overlay", &kept, &image, write]), "image\n");
    assert_eq!(
        good(&["--user", "0", "--overlay", &kept, &image, write]),
        "image\nimage\n"
    );
    let (status, _, err) = run(
        runtime,
        &workshop,
        &["--user", "0", "--read-only", &image, "echo >/new"],
    );
    assert!(status == Some(1) && err.contains("Read-only"), "{err}");
    // Statuses, and standard input.
    assert_eq!(run(runtime, &workshop, &[&image, "exit 7"]).0, Some(7));
    assert_eq!(
        run(runtime, &workshop, &[&image, "kill -9 $$; sleep 1"]).0,
        Some(0),
        "the first process is not killed by its own"
    );
    let reading = |interactive: &[&str]| {
        let mut command = runtime.run(&workshop, &[interactive, &[&image, "cat"]].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"typed").unwrap();
        child.wait_with_output().unwrap().stdout
    };
    assert_eq!((reading(&["-i"]), reading(&[])), (b"typed".to_vec(), Vec::new()));
    assert_none_left(&workshop);
}

#[cfg(target_arch = "x86_64")]
/// What a program of the container makes of calls, each by its number: names and the errors that they end with.
const CALLS: &str = r"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
page = ctypes.create_string_buffer(4096)
def call(name, number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(number, *(ctypes.c_long(a) for a in arguments))
    print(name, 0 if result >= 0 else ctypes.get_errno())
    return result
at = ctypes.addressof(page)
call('keyctl', 250, 0, -3, 1)
call('io_uring_setup', 425, 1, at)
call('bpf', 321, 0, at, 0)
call('userfaultfd', 323, 1)
call('unshare', 272, 0x10000000)
child = call('clone', 56, 0x10000011, 0, 0, 0, 0)
if child == 0: os._exit(0)
call('clone3', 435, 0, 0)
call('personality', 135, 0x400000)
call('personality?', 135, 0xffffffff)
call('ADDR_NO_RANDOMIZE', 135, 0x40000)
call('AF_ALG', 41, 38, 5, 0)
call('AF_VSOCK', 41, 40, 1, 0)
call('AF_UNIX', 41, 1, 1, 0)
call('TIOCSTI', 16, 0, 0x5412, at)
import threading, subprocess
thread = threading.Thread(target=lambda: print('thread'))
thread.start(); thread.join()
print(subprocess.run(['/bin/sh', '-c', 'echo child'], capture_output=True, text=True).stdout.strip())
";

#[cfg(target_arch = "x86_64")]
with_both!(what_runs_the_machine_is_refused);
#[cfg(target_arch = "x86_64")]
fn what_runs_the_machine_is_refused(runtime: Runtime) {
    let Some(workshop) = runtime.workshop("what_runs_the_machine_is_refused", &["/usr/bin/python3"]) else {
        return;
    };
    let image = workshop.image("one", &json!({}));
    fs::create_dir(workshop.path("calls")).unwrap();
    fs::write(workshop.path("calls/calls.py"), CALLS).unwrap();
    let calls = |more: &[&str]| {
        // The machine's own python3, with what it loads.
        let own = format!("{}:/calls:ro", workshop.at("calls"));
        let mut arguments = more.to_vec();
        for volume in [own.as_str(), "/usr:/usr:ro", "/lib:/lib:ro", "/lib64:/lib64:ro"] {
            arguments.extend(["--volume", volume]);
        }
        arguments.extend([image.as_str(), "/usr/bin/python3", "/calls/calls.py"]);
        let (status, out, err) = run(runtime, &workshop, &arguments);
        assert_eq!(status, Some(0), "{err}");
        out.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (eperm, enosys, eafnosupport) = (1, 38, 97);
    let expected = [
        ("keyctl", eperm),
        ("io_uring_setup", eperm),
        ("bpf", eperm),
        ("userfaultfd", eperm),
        ("unshare", eperm),
        ("clone", eperm),
        ("clone3", enosys),
        ("personality", eperm),
        ("personality?", 0),
        ("ADDR_NO_RANDOMIZE", 0),
        ("AF_ALG", eafnosupport),
        ("AF_VSOCK", eafnosupport),
        ("AF_UNIX", 0),
        ("TIOCSTI", eperm),
    ];
    let mut lines: Vec<String> = expected.iter().map(|(name, error)| format!("{name} {error}")).collect();
    lines.extend(["thread".to_owned(), "child".to_owned()]);
    assert_eq!(calls(&[]), lines);
    // Without the filter the kernel answers for itself.
    let open = calls(&["--seccomp", "none"]);
    for passed in ["clone3 22", "personality 0", "keyctl 0"] {
        assert!(open.iter().any(|line| line == passed), "{open:?}");
    }
    assert!(!open.contains(&"io_uring_setup 1".to_owned()), "{open:?}");
    assert_none_left(&workshop);
}

/// A container that has said that it is ready.
struct Running(std::process::Child);

impl Running {
    fn start(runtime: Runtime, workshop: &Workshop, arguments: &[&str]) -> Self {
        let mut command = runtime.run(workshop, arguments);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        assert_eq!(&ready, b"ready\n");
        Self(child)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn end(self) -> Output {
        self.0.wait_with_output().unwrap()
    }
}

with_both!(signals_are_the_containers_and_a_kill_leaves_nothing);
fn signals_are_the_containers_and_a_kill_leaves_nothing(runtime: Runtime) {
    use rustix::process::Signal;
    let Some(workshop) = runtime.workshop("signals_are_the_containers_and_a_kill_leaves_nothing", &[]) else {
        return;
    };
    let image = workshop.image("one", &serde_json::from_str(SETTINGS).unwrap());
    let script =
        "for s in USR1 USR2 INT HUP; do trap \"echo $s; exit 5\" $s; done; echo ready; while :; do sleep 0.05; done";
    // SIGTERM is the image's stop signal.
    for (sent, heard) in [
        (Signal::TERM, "USR1\n"),
        (Signal::USR2, "USR2\n"),
        (Signal::INT, "INT\n"),
        (Signal::HUP, "HUP\n"),
    ] {
        let running = Running::start(runtime, &workshop, &[&image, script]);
        running.signal(sent);
        let ended = running.end();
        assert_eq!(
            (ended.status.code(), ended.stdout.as_slice()),
            (Some(5), heard.as_bytes())
        );
    }
    // One that does not listen is killed at the third time.
    let deaf = "trap '' INT TERM USR1; echo ready; while :; do sleep 0.05; done";
    let running = Running::start(runtime, &workshop, &[&image, deaf]);
    for _ in 0..3 {
        running.signal(Signal::INT);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(running.end().status.code(), Some(137));
    assert_none_left(&workshop);

    // A command that is killed leaves its container to the next one; another's is left alone.
    let mut killed = Running::start(runtime, &workshop, &[&image, deaf]);
    let living = Running::start(runtime, &workshop, &[&image, script]);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    let there_are = || fs::read_dir(workshop.path("run")).unwrap().count();
    assert_eq!(there_are(), 2);
    let next = workshop.tarblk(&["run", &image, "echo $FROM"]).output().unwrap();
    assert_eq!(next.stdout, b"image\n");
    assert_eq!(there_are(), 1, "{}", String::from_utf8_lossy(&next.stderr));
    living.signal(Signal::TERM);
    assert_eq!(living.end().status.code(), Some(5));
    // Or to detach, which takes the device too.
    let mut killed = Running::start(runtime, &workshop, &[&image, deaf]);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    let detached = workshop.tarblk(&["detach", "--all"]).output().unwrap();
    assert!(
        detached.status.success() && there_are() == 0,
        "{}",
        String::from_utf8_lossy(&detached.stderr)
    );
    assert_none_left(&workshop);
}

#[test]
fn what_cannot_run_says_why_in_one_line() {
    let Some(workshop) = Workshop::new("what_cannot_run_says_why_in_one_line", &["runc"]) else {
        return;
    };
    let image = |tag: &str, config: &serde_json::Value| workshop.image(tag, config);
    let refused = |arguments: &[&str], status: i32| workshop.bad(&[&["-q", "run"], arguments].concat(), status);
    let plain = image("plain", &json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}));
    let long = format!("A={}", "x".repeat(200_000));
    for (config, why, status) in [
        (
            json!({"Cmd": ["sh"], "User": "no such\u{1b}[31m\n"}),
            "has no user",
            125,
        ),
        (json!({"Cmd": ["sh"], "User": "root:none"}), "has no group none", 125),
        (json!({"Cmd": ["missing"]}), "has no program missing", 127),
        (
            json!({"Entrypoint": ["/bin/not-executable"]}),
            "no program that can be executed",
            126,
        ),
        (json!({}), "says no command", 125),
        (json!({"Cmd": "sh"}), "makes no sense", 125),
        (json!({"Cmd": ["sh"], "Env": [long]}), "too long for a program", 125),
    ] {
        let said = refused(&[&image("odd", &config)], status);
        assert!(said.contains(why) && !said.contains('\u{1b}'), "{config:.80}: {said}");
    }
    for (arguments, why) in [
        (
            &["--volume", "/nowhere/at/all:/x", &plain][..],
            "/nowhere/at/all does not exist",
        ),
        (&["--tty", &plain], "not a terminal"),
        (&["layer.tar"], "takes images"),
        (&["--runtime", "/nowhere/runc", &plain], "cannot find /nowhere/runc"),
        (&["--runtime", "no-such-runtime", &plain], "cannot find no-such-runtime"),
        (
            &[&format!("oci:{}:absent", workshop.at("app"))],
            "there is no absent in it",
        ),
        (&["docker://127.0.0.1:1/app:1"], "127.0.0.1:1"),
    ] {
        let said = refused(arguments, 125);
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
    chown(workshop.path("run"), Some(1234), None).unwrap();
    assert!(refused(&[&plain], 125).contains("belongs to user 1234"));
    chown(workshop.path("run"), Some(0), None).unwrap();
    assert_none_left(&workshop);
}
