//! What runs without a person: mount(8)'s helper, units of systemd, and what is scraped and watched.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::TARBLK;
use common::rawtar::RawTar;
use common::session::{Session, is_mounted};
use serde_json::Value;

fn layer(session: &Session) -> PathBuf {
    let path = session.dir().join("layer.tar");
    fs::write(&path, RawTar::new().file(b"word", b"here").end().0).unwrap();
    path
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What mount(8) would run for the type `tarblk`.
struct Helper {
    program: PathBuf,
    cache: PathBuf,
}

impl Helper {
    fn new(session: &Session) -> Self {
        let program = session.dir().join("mount.tarblk");
        symlink(TARBLK, &program).unwrap();
        Self {
            program,
            cache: session.dir().join("cache"),
        }
    }

    fn run(&self, arguments: &[&OsStr]) -> Output {
        Command::new(&self.program)
            .args(arguments)
            .env("TARBLK_CACHE", &self.cache)
            .env("TARBLK_STATE_DIR", self.cache.with_file_name("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .output()
            .unwrap()
    }
}

#[test]
fn mount_has_a_helper() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("mount_has_a_helper", why);
    }
    let session = Session::new("loop");
    let (helper, layer) = (Helper::new(&session), layer(&session));
    let dir = session.dir().join("m");
    fs::create_dir(&dir).unwrap();
    let base = [layer.as_os_str(), dir.as_os_str()];
    let run = |more: &[&str]| {
        let more = more.iter().map(OsStr::new);
        helper.run(&base.into_iter().chain(more).collect::<Vec<_>>())
    };
    // Only looked at.
    assert!(run(&["-f"]).status.success() && !is_mounted(&dir));
    // As mount(8) calls it for a line of fstab, and by hand.
    let line = "rw,noexec,nofail,_netdev,x-systemd.automount,backend=loop,deadline=1min";
    let mounted = run(&["-o", line]);
    assert!(mounted.status.success(), "{}", said(&mounted));
    assert_eq!(fs::read(dir.join("word")).unwrap(), b"here");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let own = mounts
        .lines()
        .find(|line| line.contains(dir.to_str().unwrap()))
        .unwrap();
    assert!(own.contains(" ro,") && own.contains("noexec"), "{own}");
    // mount(8)'s statuses: 32 for a mount that fails, 1 for wrong usage.
    let again = run(&["-o", "backend=loop"]);
    assert_eq!(again.status.code(), Some(32), "{}", said(&again));
    session.succeed(&[OsStr::new("umount"), dir.as_os_str()]);
    for wrong in [&["-x"][..], &["-o", "deadline=soon"], &["-o", "remount"], &["extra"]] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {}", said(&output));
        assert!(!is_mounted(&dir));
    }
}

/// A command in the foreground that is told where to say how far it is.
fn in_foreground(session: &Session, socket: &str, arguments: &[&str]) -> Child {
    Command::new(TARBLK)
        .args(arguments)
        .args(["--foreground", "--backend", "loop"])
        .env("TARBLK_CACHE", session.dir().join("cache"))
        .env("TARBLK_STATE_DIR", session.dir().join("states"))
        .env("NOTIFY_SOCKET", socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn hear(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let len = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}

#[test]
fn the_service_manager_hears_when_it_is_ready_and_when_it_ends() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("the_service_manager_hears_when_it_is_ready_and_when_it_ends", why);
    }
    let session = Session::new("loop");
    let layer = layer(&session);
    let layer = layer.to_str().unwrap();
    let dir = session.dir().join("m");
    fs::create_dir(&dir).unwrap();
    let path = session.dir().join("notify");
    let by_path = UnixDatagram::bind(&path).unwrap();
    let name = format!("tarblk-test-{}", std::process::id());
    let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mut mounting = in_foreground(
        &session,
        path.to_str().unwrap(),
        &["mount", layer, dir.to_str().unwrap()],
    );
    assert_eq!(hear(&by_path), "READY=1");
    assert_eq!(fs::read(dir.join("word")).unwrap(), b"here");
    terminate(&mounting);
    assert_eq!(hear(&by_path), "STOPPING=1");
    assert!(mounting.wait().unwrap().success() && !is_mounted(&dir));
    let mut attaching = in_foreground(&session, &format!("@{name}"), &["attach", layer]);
    assert_eq!(hear(&by_name), "READY=1");
    // What serves it is confined as what serves all others.
    let listed: Value = serde_json::from_str(&session.succeed(&["ps", "--json"])).unwrap();
    let server = listed[0]["process"]["pid"].as_u64().unwrap();
    assert_ne!(server, u64::from(attaching.id()));
    let status = fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    let confined = ["NoNewPrivs:\t1", "Seccomp:\t2"];
    assert!(confined.iter().all(|line| status.contains(line)), "{status}");
    terminate(&attaching);
    assert_eq!(hear(&by_name), "STOPPING=1");
    assert!(attaching.wait().unwrap().success());
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

/// systemd itself reads the units.
#[test]
fn units_are_what_systemd_takes() {
    let session = Session::new("loop");
    for (source, dir, kind) in [
        ("docker://registry.example.org/team/app:1.2", "/mnt/app", "service"),
        ("docker://registry.example.org/team/app:1.2", "/mnt/my app", "mount"),
        ("/var/lib/100% of $it/layer \"x\".tar", "/mnt/it's", "service"),
        ("/var/lib/100%/layer.tar", "/mnt/b", "mount"),
    ] {
        let unit = session.succeed(&["generate", "systemd", source, dir, "--kind", kind, "-o", "noexec,nodev"]);
        let file = unit
            .lines()
            .next()
            .unwrap()
            .strip_prefix("# /etc/systemd/system/")
            .unwrap();
        assert_eq!(Path::new(file).extension(), Some(OsStr::new(kind)));
        let path = session.dir().join(file);
        fs::write(&path, &unit).unwrap();
        if common::have("systemd-analyze") {
            let verified = Command::new("systemd-analyze")
                .args(["verify", "--man=no"])
                .arg(&path)
                .env("SYSTEMD_LOG_LEVEL", "warning")
                .output()
                .unwrap();
            let words = [said(&verified), String::from_utf8_lossy(&verified.stdout).into_owned()].concat();
            // Other units of this machine may be wrong.
            let ours: Vec<&str> = words.lines().filter(|line| line.contains(file)).collect();
            assert!(ours.is_empty(), "{unit}\n{words}");
        } else {
            common::skip("units_are_what_systemd_takes", "there is no systemd-analyze");
        }
    }
    for secret in ["https://me:word@host/x.tar", "https://host/x.tar?sig=word"] {
        let refused = session.run(&["generate", "systemd", secret, "/mnt"]);
        assert!(
            !refused.status.success() && !said(&refused).contains("word"),
            "{}",
            said(&refused)
        );
    }
}

/// What a unit is limited to is enough for what it runs.
#[test]
fn the_rights_of_a_unit_are_enough() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("the_rights_of_a_unit_are_enough", why);
    }
    if !common::have("setpriv") {
        return common::skip("the_rights_of_a_unit_are_enough", "there is no setpriv");
    }
    let session = Session::new("loop");
    let layer = layer(&session);
    let dir = session.dir().join("mnt");
    fs::create_dir(&dir).unwrap();
    let unit = session.succeed(&["generate", "systemd", layer.to_str().unwrap(), dir.to_str().unwrap()]);
    assert!(unit.contains("\nNoNewPrivileges=yes\n"), "{unit}");
    let set = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .unwrap();
    let set: String = set
        .split(' ')
        .map(|name| name.replace("CAP_", ",+").to_lowercase())
        .collect();
    let limited = |arguments: &[&OsStr]| {
        let done = Command::new("setpriv")
            .args(["--no-new-privs", "--bounding-set"])
            .arg(format!("-all{set}"))
            .arg(TARBLK)
            .args(arguments)
            .env("TARBLK_CACHE", session.dir().join("cache"))
            .env("TARBLK_STATE_DIR", session.dir().join("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", said(&done));
    };
    limited(&["mount".as_ref(), layer.as_os_str(), dir.as_os_str()]);
    assert_eq!(fs::read(dir.join("word")).unwrap(), b"here");
    limited(&["umount".as_ref(), dir.as_os_str()]);
    assert!(!is_mounted(&dir));
}

#[test]
fn devices_are_scraped_and_watched() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("devices_are_scraped_and_watched", why);
    }
    let mut session = Session::new("loop");
    let layer = layer(&session);
    let dir = session.mount(layer.as_os_str());
    fs::read(dir.join("word")).unwrap();
    let mounted = dir.to_str().unwrap();
    let state: Value = serde_json::from_str(&session.succeed(&["stats", "--json", mounted])).unwrap();
    let (name, reads) = (
        state["state"]["name"].as_str().unwrap(),
        &state["counters"]["device"]["reads"],
    );
    let (one, all) = (
        session.succeed(&["stats", "--prometheus", mounted]),
        session.succeed(&["stats", "--prometheus"]),
    );
    for text in [&one, &all] {
        let line = format!("tarblk_device_up{{device=\"{name}\"}} 1\n");
        assert!(text.contains(&line), "{text}");
        assert!(text.contains(&format!("source=\"{}\"", layer.display())), "{text}");
    }
    assert_eq!(one.matches("tarblk_device_info{").count(), 1);
    let metric = format!("tarblk_reads_total{{device=\"{name}\"}} ");
    let scraped = one.lines().find_map(|line| line.strip_prefix(&metric)).unwrap();
    assert!(scraped.parse::<u64>().unwrap() >= reads.as_u64().unwrap());
    // Watched until it is gone.
    let mut watching = Command::new(TARBLK)
        .args(["stats", "--watch=0.1s", "--json", mounted])
        .env("TARBLK_STATE_DIR", session.dir().join("states"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(line["state"]["name"], name);
    }
    let text = Command::new("timeout")
        .args(["1", TARBLK, "stats", "--watch=0.2s", mounted])
        .env("TARBLK_STATE_DIR", session.dir().join("states"))
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("\nnow ") && text.contains(" reads/s, ") && !text.contains('\u{1b}'),
        "{text}"
    );
    session.umount();
    assert!(!watching.wait().unwrap().success());
    for wrong in [
        &["stats"][..],
        &["stats", "--watch=0", mounted],
        &["stats", "--watch=5s", "--prometheus", mounted],
    ] {
        assert_eq!(session.run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn logs_are_for_programs_where_these_ask() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("logs_are_for_programs_where_these_ask", why);
    }
    let session = Session::new("loop");
    let layer = layer(&session);
    let dir = session.dir().join("m");
    fs::create_dir(&dir).unwrap();
    let states = session.dir().join("states");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(TARBLK);
        command
            .args(arguments)
            .env("TARBLK_CACHE", session.dir().join("cache"))
            .env("TARBLK_STATE_DIR", &states)
            .env("TARBLK_SERVICE_IDLE", "0")
            .env("TARBLK_LOG_FORMAT", "json");
        common::succeed(&mut command)
    };
    let mounted = dir.to_str().unwrap();
    run(&["mount", layer.to_str().unwrap(), mounted, "--backend", "loop"]);
    let log = String::from_utf8(run(&["logs", mounted])).unwrap();
    run(&["umount", mounted]);
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty());
    for line in &lines {
        assert!(
            ["time", "level", "target", "message"]
                .iter()
                .all(|field| line[field].is_string()),
            "{line}"
        );
    }
}

/// What the service answers to a request for its metrics; none while nothing listens.
fn scraped(socket: &Path) -> Option<String> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200 OK\r\n").then_some(answer)
}

/// The service tells its metrics for as long as it is asked to stay, also after it was killed.
#[test]
fn metrics_are_told_by_the_service() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("metrics_are_told_by_the_service", why);
    }
    let mut session = Session::new("loop");
    let layer = layer(&session);
    let socket = session.dir().join("metrics.sock");
    let mut staying = Command::new(TARBLK)
        .args(["service", "--metrics"])
        .arg(&socket)
        .env("TARBLK_CACHE", session.dir().join("cache"))
        .env("TARBLK_STATE_DIR", session.dir().join("states"))
        .env("TARBLK_SERVICE_IDLE", "0")
        .spawn()
        .unwrap();
    let wait_until = |what: &str, done: &dyn Fn(Option<&str>) -> bool| {
        let began = std::time::Instant::now();
        loop {
            let text = scraped(&socket);
            if done(text.as_deref()) {
                return text.unwrap_or_default();
            }
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "{what}: {text:?}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    wait_until("a service without devices", &|text| text.is_some());
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let dir = session.mount(layer.as_os_str());
    fs::read(dir.join("word")).unwrap();
    let up = |text: Option<&str>| text.is_some_and(|text| text.contains("tarblk_device_up{device=\"loop"));
    let text = wait_until("the device's metrics", &up);
    let families = |text: &str| -> Vec<String> {
        let types = text.lines().filter(|line| line.starts_with("# TYPE "));
        types.map(str::to_owned).collect()
    };
    let printed = session.succeed(&["stats", "--prometheus"]);
    assert_eq!(families(&text), families(&printed));
    // The same socket goes on with the next service.
    let state: Value = serde_json::from_str(&session.succeed(&["stats", "--json", dir.to_str().unwrap()])).unwrap();
    let pid = state["state"]["process"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_until("the end of the old one's metrics", &|text| {
        text.is_some_and(|text| text.contains("tarblk_served_seconds") && up(Some(text)))
    });
    session.umount();
    // Without a device it stays all the same.
    std::thread::sleep(std::time::Duration::from_millis(500));
    wait_until("a service that stays", &|text| text.is_some_and(|text| !up(Some(text))));
    terminate(&staying);
    assert!(staying.wait().unwrap().success());
    assert!(!socket.exists());
    let began = std::time::Instant::now();
    while session.dir().join("states/service.sock").exists() {
        assert!(
            began.elapsed() < std::time::Duration::from_secs(60),
            "the service stays"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// What a process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    mounts: usize,
}

impl Holdings {
    fn of(pid: u64) -> Self {
        let entries = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        Self {
            descriptors: entries("fd"),
            threads: entries("task"),
            mounts: fs::read_to_string(format!("/proc/{pid}/mountinfo"))
                .unwrap()
                .lines()
                .count(),
        }
    }
}

/// In KiB.
fn resident(pid: u64) -> i64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Loop devices over a layer of this name.
fn loop_devices(name: &str) -> usize {
    let all = fs::read_dir("/sys/block").unwrap().flatten();
    let files = all.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    files.filter(|file| file.contains(name)).count()
}

/// The service and its keepers hold after many rounds what they held before. So many rounds as `TARBLK_TEST_ROUNDS` says.
#[test]
fn rounds_of_attach_and_detach_leave_nothing() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("rounds_of_attach_and_detach_leave_nothing", why);
    }
    let rounds: usize = std::env::var("TARBLK_TEST_ROUNDS").map_or(12, |text| text.parse().unwrap());
    let mut session = Session::new("loop");
    let layer = layer(&session);
    let origin = tarblk::internals::bench::origin::Origin::start().unwrap();
    let name = format!("rounds-{}.tar", std::process::id());
    origin.serve_file(&format!("/{name}"), &layer).unwrap();
    let url = origin.url(&format!("/{name}"));
    // It stays, and the service with it.
    let kept = session.dir().join("kept.tar");
    fs::write(&kept, RawTar::new().file(b"kept", &[7; 10_000]).end().0).unwrap();
    let kept = session.mount(kept.as_os_str());
    let state: Value = serde_json::from_str(&session.succeed(&["stats", "--json", kept.to_str().unwrap()])).unwrap();
    let service = state["state"]["process"]["pid"].as_u64().unwrap();
    let mut processes = vec![service];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let is_keeper = line.split(|byte| *byte == 0).any(|word| word == b"keep");
        let states = session.dir().join("states");
        if is_keeper && String::from_utf8_lossy(&line).contains(states.to_str().unwrap()) {
            processes.push(entry.file_name().to_str().unwrap().parse().unwrap());
        }
    }
    assert_eq!(processes.len(), 3, "the service and two keepers");
    let round = || {
        let device = session.succeed(&["attach", &url, "--backend", "loop"]);
        let bytes = fs::read(device.trim()).unwrap();
        assert!(bytes.windows(4).any(|word| word == b"here"));
        session.succeed(&["detach", device.trim()]);
    };
    // What is made once is not what is looked for.
    for _ in 0..rounds.min(20) {
        round();
    }
    // Threads and connections end a while after what they were for.
    let settled = || {
        let look = || processes.iter().map(|pid| Holdings::of(*pid)).collect::<Vec<_>>();
        let mut least = look();
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            for (least, now) in least.iter_mut().zip(look()) {
                least.descriptors = least.descriptors.min(now.descriptors);
                least.threads = least.threads.min(now.threads);
                least.mounts = least.mounts.min(now.mounts);
            }
        }
        least
    };
    let memory = || -> Vec<i64> { processes.iter().map(|pid| resident(*pid)).collect() };
    let (before, memory_before) = (settled(), memory());
    for _ in 0..rounds {
        round();
    }
    let (after, memory_after) = (settled(), memory());
    println!("{rounds} rounds: {before:?}, {memory_before:?} KiB resident; then {after:?}, {memory_after:?} KiB");
    for (before, after) in before.iter().zip(&after) {
        assert_eq!((before.descriptors, before.mounts), (after.descriptors, after.mounts));
        // Those of pools come and go; one left by each round would be more.
        assert!(
            after.threads < before.threads + rounds.min(6),
            "{before:?} became {after:?}"
        );
    }
    assert_eq!(loop_devices(&name), 0, "devices are left");
    for (before, after) in memory_before.iter().zip(&memory_after) {
        assert!(after - before < 4096, "{before} KiB became {after} KiB");
    }
    let files = fs::read_dir(session.dir().join("states")).unwrap().flatten();
    let specs = files.filter(|entry| entry.path().extension() == Some(OsStr::new("spec")));
    assert_eq!(specs.count(), 1);
}
