//! The cases that a device has to pass on every back end: daemons that serve an image cut from a plain ext4 file.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tarblk::internals::device::inventory::{self, Status};
use tarblk::internals::device::service::{self, Attached, BuildError, Builder, Launcher, Reach, ServeSpec, Served};
use tarblk::internals::device::state::{State, StateDir};
use tarblk::internals::device::volume::BlobReader;
use tarblk::internals::device::{Backend, BackendChoice, DeviceOptions, users};
use tarblk::internals::mount::{self, MountOptions};

use super::harness::{Case, DAEMON};
use super::{blame_cases, hollow, make_ext4, patchwork, read_all, sandbox_cases};

/// The back end under test.
static BACKEND: OnceLock<BackendChoice> = OnceLock::new();

pub(crate) fn choose(backend: BackendChoice) {
    BACKEND.set(backend).unwrap();
}

pub(crate) const CASES: &[Case] = &[
    ("serves_every_block", serves_every_block),
    ("serves_many_readers_at_once", serves_many_readers_at_once),
    ("refuses_writes", refuses_writes),
    ("mounts_and_unmounts", mounts_and_unmounts),
    ("refuses_to_detach_while_mounted", refuses_to_detach_while_mounted),
    ("refuses_to_unmount_while_in_use", refuses_to_unmount_while_in_use),
    ("finds_a_mount_in_another_namespace", finds_a_mount_in_another_namespace),
    ("sigterm_detaches", sigterm_detaches),
    ("sigterm_waits_for_the_unmount", sigterm_waits_for_the_unmount),
    ("a_killed_service_is_a_pause", a_killed_service_is_a_pause),
    (
        "a_killed_service_comes_back_to_a_mounted_device",
        a_killed_service_comes_back_to_a_mounted_device,
    ),
    ("killed_keepers_are_replaced", killed_keepers_are_replaced),
    (
        "the_service_and_a_keeper_killed_together_are_a_pause",
        the_service_and_a_keeper_killed_together_are_a_pause,
    ),
    (
        "with_nothing_left_a_device_is_dead_or_recovered",
        with_nothing_left_a_device_is_dead_or_recovered,
    ),
    (
        "a_dead_service_of_a_mounted_device_is_cleaned_up",
        a_dead_service_of_a_mounted_device_is_cleaned_up,
    ),
    (
        "a_plain_umount_takes_the_device_along",
        a_plain_umount_takes_the_device_along,
    ),
    ("a_stopped_service_is_told", a_stopped_service_is_told),
    (
        "many_launches_at_once_share_one_service",
        many_launches_at_once_share_one_service,
    ),
    ("an_upgrade_under_load_is_a_pause", an_upgrade_under_load_is_a_pause),
    ("a_broken_upgrade_goes_back", a_broken_upgrade_goes_back),
    (
        "a_device_that_cannot_go_on_is_set_aside",
        a_device_that_cannot_go_on_is_set_aside,
    ),
    (
        "a_stopped_keeper_is_replaced_and_ends",
        a_stopped_keeper_is_replaced_and_ends,
    ),
    (
        "a_name_that_is_given_out_again_is_the_next_ones",
        a_name_that_is_given_out_again_is_the_next_ones,
    ),
    (
        "a_command_that_comes_late_harms_no_other_device",
        a_command_that_comes_late_harms_no_other_device,
    ),
    (
        "a_panicking_builder_harms_no_other_device",
        a_panicking_builder_harms_no_other_device,
    ),
    (
        "reads_that_never_end_do_not_keep_the_device",
        reads_that_never_end_do_not_keep_the_device,
    ),
    (
        "a_builder_that_fails_leaves_nothing",
        a_builder_that_fails_leaves_nothing,
    ),
    (
        "a_daemon_that_dies_young_leaves_nothing",
        a_daemon_that_dies_young_leaves_nothing,
    ),
    (
        "a_broken_image_does_not_mount_and_leaves_nothing",
        a_broken_image_does_not_mount_and_leaves_nothing,
    ),
    ("bad_directories_are_refused", bad_directories_are_refused),
    (
        "what_a_local_file_does_not_give_is_fetched",
        what_a_local_file_does_not_give_is_fetched,
    ),
    ("counts_what_it_serves", counts_what_it_serves),
    ("two_devices_do_not_hold_each_other", two_devices_do_not_hold_each_other),
    (
        "keeps_nothing_mounted_that_it_does_not_need",
        keeps_nothing_mounted_that_it_does_not_need,
    ),
    (
        "a_device_whose_image_crashes_the_service_is_set_aside",
        blame_cases::a_device_whose_image_crashes_the_service_is_set_aside,
    ),
    (
        "a_device_whose_reads_crash_the_service_is_set_aside",
        blame_cases::a_device_whose_reads_crash_the_service_is_set_aside,
    ),
    (
        "the_service_and_its_keepers_are_confined",
        sandbox_cases::the_service_and_its_keepers_are_confined,
    ),
    (
        "forbidden_calls_fail_in_the_service",
        sandbox_cases::forbidden_calls_fail_in_the_service,
    ),
    (
        "another_directory_to_write_to_is_a_pause",
        sandbox_cases::another_directory_to_write_to_is_a_pause,
    ),
];

/// What these tests' builder makes an image of.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct TestImage {
    pub(crate) file: PathBuf,
    /// What it was called before the service had it as a descriptor, whose name another namespace may not show.
    pub(crate) named: PathBuf,
    /// How long far-away bytes take, in milliseconds; for ever, when not given.
    delay_ms: Option<u64>,
    trouble: Option<String>,
}

/// The program as the service or as one of its keepers.
pub(crate) fn daemon_main() -> ExitCode {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let arguments: Vec<_> = std::env::args_os().skip(2).collect();
    service::main(DAEMON, &arguments, Images)
}

/// Whether this was not asked of the image's file before; a mode's bit that means nothing else remembers it.
fn first_time(file: &Path) -> bool {
    // The service knows the file by a descriptor: in its namespace it may have no name.
    let mut mode = fs::metadata(file).unwrap().permissions();
    let is_first = mode.mode() & 0o1000 == 0;
    mode.set_mode(mode.mode() | 0o1000);
    fs::set_permissions(file, mode).unwrap();
    is_first
}

/// Makes images of [`TestImage`].
pub(crate) struct Images;

impl Builder for Images {
    type Image = TestImage;

    fn build(&self, described: TestImage) -> Result<Served, BuildError> {
        match described.trouble.as_deref() {
            Some("fail") => return Err("the index is of another age".into()),
            // Not the first time.
            Some("fail-again") if !first_time(&described.file) => return Err("the index is of another age".into()),
            Some("panic") => panic!("a builder that panics"),
            Some("abort") => std::process::abort(),
            // Not the first time.
            Some("abort-again") if !first_time(&described.file) => std::process::abort(),
            Some("try-calls") => {
                let said = sandbox_cases::attempts().into_iter().map(|(name, done)| match done {
                    Err(rustix::io::Errno::PERM) => format!("{name} EPERM"),
                    other => format!("{name} {other:?}"),
                });
                return Err(said.collect::<Vec<_>>().join(", ").into());
            }
            Some("write") => fs::write(described.named.with_extension("written"), "")?,
            Some("write-anywhere") => {
                let file = PathBuf::from(format!("/tarblk-test-{}", std::process::id()));
                fs::write(&file, "")?;
                fs::remove_file(&file)?;
            }
            _ => {}
        }
        let delay = described.delay_ms.map(Duration::from_millis);
        let (image, bytes) = match described.trouble.as_deref() {
            Some("hollow") => hollow(&described.file, delay),
            Some("abort-on-read") => {
                let (image, bytes) = patchwork(&described.file, delay);
                let sign = described.named.with_extension("sign");
                let bytes: Arc<dyn BlobReader> = Arc::new(blame_cases::Treacherous { bytes, sign });
                (image, bytes)
            }
            _ => patchwork(&described.file, delay),
        };
        Ok(Served {
            image,
            bytes,
            fetch_stats: Box::new(|| tarblk::internals::fetch::FetchStats {
                requests: 7,
                ..Default::default()
            }),
            finish: Box::new(|| log::info!("finished")),
            files: None,
            learner: None,
        })
    }

    fn files(image: &TestImage) -> Vec<PathBuf> {
        vec![image.file.clone()]
    }

    fn moved(image: TestImage, paths: &[PathBuf]) -> TestImage {
        TestImage {
            file: paths[0].clone(),
            ..image
        }
    }

    /// Beside the file a builder notes that it was asked before.
    fn writes(image: &TestImage) -> Vec<PathBuf> {
        image.file.parent().map(Path::to_owned).into_iter().collect()
    }

    fn reach(&self) -> Reach {
        Reach::Paths(Vec::new())
    }

    /// A service ends with its last device, so that it can be looked for.
    fn idle_limit(&self) -> Duration {
        Duration::ZERO
    }
}

/// A place for one test: an ext4 file, a directory of states, a directory to mount on; and the promise that nothing is left.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
    before: Traces,
}

/// What a device may leave behind. Others may have devices, mounts and daemons at the same time, which do not count.
#[derive(Debug)]
struct Traces {
    devices: BTreeSet<String>,
    mounts: Vec<PathBuf>,
    /// Those of the state directory below the test's own.
    processes: BTreeSet<u32>,
}

impl Traces {
    /// Of a test that mounts below `dir`.
    fn now(dir: &Path) -> Self {
        let devices = fs::read_dir("/sys/block")
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap());
        let in_use = |name: &String| {
            name.starts_with("ublkb") || Path::new(&format!("/sys/block/{name}/loop/backing_file")).exists()
        };
        let chars = fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
        let chars = chars.map(|entry| entry.file_name().into_string().unwrap());
        let devices: BTreeSet<String> = devices.filter(in_use).chain(chars).collect();
        // Whoever serves a device has it open. One that was left behind nobody has.
        let of_others = if devices.is_empty() {
            BTreeSet::new()
        } else {
            opened_by_others(dir)
        };
        let mounts = users::mounts().unwrap().into_iter().map(|line| line.point);
        Self {
            devices: devices.difference(&of_others).cloned().collect(),
            mounts: mounts.filter(|point| point.starts_with(dir)).collect(),
            processes: daemons(dir),
        }
    }
}

/// Every process: its number, and its parent's if it has not ended.
fn processes() -> Vec<(u32, u32)> {
    let each = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let lives = fields.next()? != "Z";
        let parent = fields.next()?.parse().ok()?;
        lives.then_some((pid, parent))
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(each).collect()
}

/// The service and the keepers of a state directory below `dir`.
pub(crate) fn daemons(dir: &Path) -> BTreeSet<u32> {
    let is_daemon = |pid: u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments: Vec<&[u8]> = command.split(|&byte| byte == 0).collect();
        arguments.contains(&DAEMON.as_bytes())
            && arguments
                .iter()
                .any(|argument| Path::new(std::ffi::OsStr::from_bytes(argument)).starts_with(dir))
    };
    processes()
        .into_iter()
        .map(|(pid, _)| pid)
        .filter(|pid| is_daemon(*pid))
        .collect()
}

/// The devices that processes have open which are neither this one nor its children; of a ublk device both halves.
fn opened_by_others(dir: &Path) -> BTreeSet<String> {
    let this = std::process::id();
    let mut found = BTreeSet::new();
    let daemons = daemons(dir);
    for (pid, parent) in processes() {
        if pid == this || parent == this || daemons.contains(&pid) {
            continue;
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for target in open.filter_map(|fd| fs::read_link(fd.path()).ok()) {
            let Some(name) = target.strip_prefix("/dev").ok().and_then(Path::to_str) else {
                continue;
            };
            if let Some(number) = name.strip_prefix("ublkc") {
                found.insert(format!("ublkb{number}"));
            }
            found.insert(name.to_owned());
        }
    }
    found
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let before = Traces::now(dir.path());
        make_ext4(&dir.path().join("image"), 16);
        fs::create_dir(dir.path().join("mnt")).unwrap();
        Self { dir, before }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub(crate) fn states(&self) -> StateDir {
        StateDir::new(self.dir.path().join("states"))
    }

    pub(crate) fn spec(&self, delay_ms: Option<u64>, trouble: Option<&str>) -> ServeSpec<TestImage> {
        let image = TestImage {
            file: self.image(),
            named: self.image(),
            delay_ms,
            trouble: trouble.map(str::to_owned),
        };
        ServeSpec {
            options: DeviceOptions {
                backend: *BACKEND.get().unwrap(),
                ..DeviceOptions::default()
            },
            source: "a test".to_owned(),
            states: self.states().path().to_owned(),
            image,
        }
    }

    pub(crate) fn attach(&self) -> Attached {
        service::launch::<Images>(&launcher(), &self.spec(Some(1), None)).unwrap()
    }

    fn mount(&self) -> Attached {
        mount::mount::<Images>(
            &launcher(),
            &self.spec(Some(1), None),
            &self.mnt(),
            &MountOptions::default(),
        )
        .unwrap()
    }

    /// What there is now and was not before, if anything.
    fn left(&self) -> Option<Traces> {
        let mut now = Traces::now(self.dir.path());
        now.devices.retain(|name| !self.before.devices.contains(name));
        now.processes.retain(|pid| !self.before.processes.contains(pid));
        let nothing = now.devices.is_empty() && now.mounts.is_empty() && now.processes.is_empty();
        (!nothing).then_some(now)
    }

    /// No process, device, mount or file is left.
    pub(crate) fn assert_clean(&self) {
        self.assert_nothing_served();
        // The last keeper to end removes the service's files where the service cannot.
        let files = || -> Vec<_> {
            fs::read_dir(self.states().path())
                .into_iter()
                .flatten()
                .flatten()
                .collect()
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !files().is_empty() {
            assert!(Instant::now() < deadline, "files are left: {:?}", files());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// No process, device or mount is left.
    fn assert_nothing_served(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // One look may catch somebody else's device when nobody has it open: what is left is there at every look.
        loop {
            let left = self.left();
            if left.is_none() {
                break;
            }
            assert!(Instant::now() < deadline, "something is left: {left:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Lab {
    /// A test that failed must not spoil the ones after it.
    fn drop(&mut self) {
        for line in users::mounts().unwrap_or_default().iter().rev() {
            if line.point.starts_with(self.dir.path()) {
                let _ = rustix::mount::unmount(&line.point, rustix::mount::UnmountFlags::DETACH);
            }
        }
        // Whichever is looked at last may have been started again meanwhile.
        for _ in 0..10 {
            for pid in daemons(self.dir.path()) {
                kill(pid, rustix::process::Signal::KILL);
            }
        }
        for _ in 0..50 {
            if inventory::sweep(&self.states()).is_ok() && self.left().is_none() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

pub(crate) fn launcher() -> Launcher {
    Launcher::this_program(DAEMON).unwrap()
}

fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn serves_every_block() {
    let lab = Lab::new();
    let attached = lab.attach();
    let expected = match BACKEND.get().unwrap() {
        BackendChoice::Loop => Backend::Loop,
        _ => Backend::Ublk,
    };
    assert_eq!(attached.state.backend, expected);
    assert_eq!(attached.why_not_ublk, None);
    assert!(
        read_all(&attached.state.device) == read_all(&lab.image()),
        "the device differs from the image"
    );
    let (listed, wrong) = inventory::list(&lab.states()).unwrap();
    assert!(wrong.is_empty());
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (&listed[0].state, &listed[0].status),
        (&attached.state, &Status::Serving)
    );
    let log = fs::read_to_string(attached.state.log.as_ref().unwrap()).unwrap();
    assert!(log.contains("serving a test as /dev/"), "log: {log}");
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn serves_many_readers_at_once() {
    let lab = Lab::new();
    let attached = lab.attach();
    let content = read_all(&lab.image());
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let (content, device) = (&content, &attached.state.device);
            scope.spawn(move || {
                let file = File::options().read(true).open(device).unwrap();
                let mut random = reader + 1;
                for _ in 0..200 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let at = usize::try_from(random >> 20).unwrap() % content.len();
                    let len = (usize::try_from(random >> 8 & 0xfff).unwrap() * 100).min(content.len() - at);
                    let mut got = vec![0; len];
                    if random & 1 == 0 {
                        // Makes the kernel ask again.
                        let start = u64::try_from(at).unwrap();
                        let advice = rustix::fs::Advice::DontNeed;
                        rustix::fs::fadvise(
                            &file,
                            start,
                            std::num::NonZeroU64::new(u64::try_from(len).unwrap()),
                            advice,
                        )
                        .unwrap();
                    }
                    file.read_exact_at(&mut got, u64::try_from(at).unwrap()).unwrap();
                    assert!(got == content[at..at + len], "{len} bytes at {at} differ");
                }
            });
        }
    });
    inventory::detach(&lab.states(), Path::new(&attached.state.name)).unwrap();
    lab.assert_clean();
}

fn refuses_writes() {
    let lab = Lab::new();
    let attached = lab.attach();
    let refused = File::options().write(true).open(&attached.state.device);
    let written = refused.and_then(|file| {
        file.write_all_at(&[1; 4096], 0)?;
        file.sync_all()
    });
    assert!(written.is_err(), "a write to a read-only device went through");
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn mounts_and_unmounts() {
    let lab = Lab::new();
    let attached = lab.mount();
    let (listed, _) = inventory::list(&lab.states()).unwrap();
    assert_eq!(listed[0].mounts, [fs::canonicalize(lab.mnt()).unwrap()]);
    compare_with_plain_mount(&lab);
    assert_eq!(inventory::find(&lab.states(), &lab.mnt()).unwrap(), attached.state);
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    lab.assert_clean();
    assert!(matches!(
        mount::unmount(&lab.states(), &lab.mnt()),
        Err(mount::MountError::NotOurs(_))
    ));
}

/// What the mounted device holds is what debugfs finds in the plain file.
fn compare_with_plain_mount(lab: &Lab) {
    for name in ["small", "block", "odd", "big"] {
        let copy = lab.dir.path().join(name);
        let dump = format!("dump /{name} {}", copy.display());
        let dumped = Command::new("debugfs")
            .args(["-R", &dump])
            .arg(lab.image())
            .output()
            .unwrap();
        assert!(dumped.status.success());
        assert!(read_all(&copy) == read_all(&lab.mnt().join(name)), "{name} differs");
    }
    assert_eq!(
        fs::read_link(lab.mnt().join("directory/link")).unwrap(),
        Path::new("small")
    );
}

fn refuses_to_detach_while_mounted() {
    let lab = Lab::new();
    let attached = lab.mount();
    let error = inventory::detach(&lab.states(), &attached.state.device)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&*lab.mnt().to_string_lossy()),
        "the message does not say where: {error}"
    );
    assert_eq!(error.lines().count(), 1);
    assert!(fs::read(lab.mnt().join("small")).is_ok(), "refusing broke the mount");
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    lab.assert_clean();
}

fn refuses_to_unmount_while_in_use() {
    let lab = Lab::new();
    lab.mount();
    let mut open = File::open(lab.mnt().join("odd")).unwrap();
    let error = mount::unmount(&lab.states(), &lab.mnt()).unwrap_err().to_string();
    assert!(
        error.contains(&std::process::id().to_string()),
        "the message does not say by whom: {error}"
    );
    let mut text = Vec::new();
    open.seek(SeekFrom::Start(100_000)).unwrap();
    open.read_to_end(&mut text).unwrap();
    assert_eq!(text.len(), 23_457);
    drop(open);
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    lab.assert_clean();
}

fn finds_a_mount_in_another_namespace() {
    let lab = Lab::new();
    let attached = lab.mount();
    // A namespace of its own has a copy of the mount, which outlives ours.
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 60"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("unshare (util-linux) is needed");
    let _ = elsewhere.stdout.take().unwrap().read_exact(&mut [0]);
    let unmounted = mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    let place = format!(
        "{} in the mount namespace of process {}",
        lab.mnt().display(),
        elsewhere.id()
    );
    let used = unmounted.still_used.unwrap_or_default();
    assert!(used.contains(&place), "the message does not say where: {used}");
    assert!(attached.state.device_exists());
    // The device goes by itself when its last user has gone.
    elsewhere.kill().unwrap();
    elsewhere.wait().unwrap();
    lab.assert_clean();
}

fn sigterm_detaches() {
    let lab = Lab::new();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let attached = lab.attach();
        kill(attached.state.process.pid, signal);
        wait_until("the end of the daemon", || !attached.state.is_alive());
        lab.assert_clean();
    }
}

fn sigterm_waits_for_the_unmount() {
    let lab = Lab::new();
    let attached = lab.mount();
    kill(attached.state.process.pid, rustix::process::Signal::TERM);
    wait_until("a word in the log", || {
        fs::read_to_string(attached.state.log.as_ref().unwrap())
            .unwrap()
            .contains("staying until then")
    });
    compare_with_plain_mount(&lab);
    rustix::mount::unmount(lab.mnt(), rustix::mount::UnmountFlags::empty()).unwrap();
    wait_until("the end of the daemon", || !attached.state.is_alive());
    lab.assert_clean();
}

/// The number of the process that serves a device, whatever it is called by now.
pub(crate) fn service_pid_of(lab: &Lab, attached: &Attached) -> u32 {
    inventory::find(&lab.states(), Path::new(&attached.state.name))
        .unwrap()
        .process
        .pid
}

/// The service's number, once there is one that answers.
pub(crate) fn service_pid(lab: &Lab) -> u32 {
    let mut pid = 0;
    wait_until("a service", || {
        let (listed, _) = inventory::list(&lab.states()).unwrap();
        pid = listed.first().map_or(0, |device| device.state.process.pid);
        listed
            .iter()
            .all(|device| device.status == Status::Serving && device.state.is_alive())
    });
    pid
}

/// The numbers of the keepers that hold the device: the processes of a state directory without its service.
pub(crate) fn keepers(lab: &Lab) -> Vec<u32> {
    let service = service_pid(lab);
    let holds = |pid: &u32| {
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        // One that the service is just starting has the service's descriptors, and its command line, until it becomes a keeper.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == b"keep")
            && open
                .any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file.to_string_lossy().contains("tarblk-record")))
    };
    let all = daemons(lab.dir.path()).into_iter();
    all.filter(|pid| *pid != service).filter(holds).collect()
}

pub(crate) fn kill_and_wait(pid: u32) {
    kill(pid, rustix::process::Signal::KILL);
    wait_until("the end of a process", || {
        !processes().iter().any(|(lives, _)| *lives == pid)
    });
}

/// Reads the device around the page cache, here and there, and compares, until it is told to stop. Returns how often it read.
pub(crate) fn read_and_compare(device: &Path, content: &[u8], seed: u64, stop: &std::sync::atomic::AtomicBool) -> u64 {
    let file = File::options().read(true).open(device).unwrap();
    let (mut random, mut reads) = (seed * 2 + 1, 0);
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let blocks = content.len() / 4096;
        let at = usize::try_from(random >> 33).unwrap() % blocks;
        let count = (usize::try_from(random >> 20 & 31).unwrap() + 1).min(blocks - at);
        let (start, len) = (at * 4096, count * 4096);
        let offset = u64::try_from(start).unwrap();
        let length = std::num::NonZeroU64::new(u64::try_from(len).unwrap());
        rustix::fs::fadvise(&file, offset, length, rustix::fs::Advice::DontNeed).unwrap();
        let mut got = vec![0; len];
        file.read_exact_at(&mut got, offset)
            .unwrap_or_else(|error| panic!("{len} bytes at {start}: {error}"));
        assert!(got == content[start..start + len], "{len} bytes at {start} differ");
        reads += 1;
    }
    reads
}

/// Kills what `victims` names again and again while readers compare every byte.
fn kill_under_load(lab: &Lab, device: &Path, rounds: u32, victims: impl Fn(&Lab, u32) -> Vec<u32>) {
    let content = read_all(&lab.image());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|seed| {
                let (content, stop) = (&content, &stop);
                scope.spawn(move || read_and_compare(device, content, seed, stop))
            })
            .collect();
        let kills = catch_unwind(AssertUnwindSafe(|| {
            for round in 0..rounds {
                // At other moments each time.
                std::thread::sleep(Duration::from_millis(u64::from(round * 37 % 90)));
                for pid in victims(lab, round) {
                    kill(pid, rustix::process::Signal::KILL);
                }
            }
            service_pid(lab);
        }));
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for reader in readers {
            let reads = reader.join().expect("a reader failed");
            assert!(reads > 10, "a reader read {reads} times only");
        }
        kills.unwrap();
    });
}

/// How often something is killed in each case; more by hand.
fn rounds() -> u32 {
    std::env::var("TARBLK_TEST_KILLS").map_or(12, |text| text.parse().unwrap())
}

fn a_killed_service_is_a_pause() {
    let lab = Lab::new();
    let attached = lab.attach();
    kill_under_load(&lab, &attached.state.device, rounds(), |lab, _| vec![service_pid(lab)]);
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn a_killed_service_comes_back_to_a_mounted_device() {
    let lab = Lab::new();
    let attached = lab.mount();
    for _ in 0..3 {
        kill_and_wait(service_pid(&lab));
        // A fresh look: nothing of it is in the page cache.
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        compare_with_plain_mount(&lab);
    }
    assert!(attached.state.device_exists());
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    lab.assert_clean();
}

fn killed_keepers_are_replaced() {
    let lab = Lab::new();
    let attached = lab.attach();
    wait_until("two keepers", || keepers(&lab).len() == 2);
    for _ in 0..3 {
        for keeper in keepers(&lab) {
            kill_and_wait(keeper);
            wait_until("another keeper", || keepers(&lab).len() == 2);
        }
    }
    // What the last ones hold is enough.
    kill_and_wait(service_pid(&lab));
    assert!(read_all(&attached.state.device) == read_all(&lab.image()));
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn the_service_and_a_keeper_killed_together_are_a_pause() {
    let lab = Lab::new();
    let attached = lab.attach();
    kill_under_load(&lab, &attached.state.device, rounds(), |lab, round| {
        wait_until("two keepers", || keepers(lab).len() == 2);
        let keepers = keepers(lab);
        let keeper = keepers[usize::try_from(round).unwrap() % keepers.len()];
        if round % 2 == 0 {
            vec![keeper, service_pid(lab)]
        } else {
            vec![service_pid(lab), keeper]
        }
    });
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

/// Kills everything that serves, as often as it takes until nothing is left to start another.
fn kill_all(lab: &Lab) {
    wait_until("the end of all", || {
        // Stopped first: what is stopped starts nothing.
        let all = daemons(lab.dir.path());
        for signal in [rustix::process::Signal::STOP, rustix::process::Signal::KILL] {
            for pid in &all {
                kill(*pid, signal);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
        daemons(lab.dir.path()).is_empty()
    });
}

fn with_nothing_left_a_device_is_dead_or_recovered() {
    let lab = Lab::new();
    let attached = lab.attach();
    kill_all(&lab);
    let (listed, _) = inventory::list(&lab.states()).unwrap();
    assert_eq!((listed.len(), &listed[0].status), (1, &Status::Dead));
    let error = inventory::stats(&lab.states(), &attached.state.device)
        .unwrap_err()
        .to_string();
    assert!(error.contains("dead"), "{error}");
    // The next service goes on with what the kernel still has, and cleans up the rest.
    let second = lab.attach();
    if attached.state.backend == Backend::Ublk {
        assert!(read_all(&attached.state.device) == read_all(&lab.image()));
        inventory::detach(&lab.states(), &attached.state.device).unwrap();
    }
    inventory::detach(&lab.states(), &second.state.device).unwrap();
    lab.assert_clean();
    // Without another service the dead one's device is cleaned up by name.
    let attached = lab.attach();
    kill_all(&lab);
    inventory::detach(&lab.states(), Path::new(&attached.state.name)).unwrap();
    lab.assert_nothing_served();
}

fn a_dead_service_of_a_mounted_device_is_cleaned_up() {
    let lab = Lab::new();
    let attached = lab.mount();
    kill_all(&lab);
    let error = inventory::detach(&lab.states(), &attached.state.device)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&*lab.mnt().to_string_lossy()),
        "the message does not say where: {error}"
    );
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    lab.assert_nothing_served();
}

fn a_plain_umount_takes_the_device_along() {
    let lab = Lab::new();
    for kill_first in [false, true] {
        let attached = lab.mount();
        compare_with_plain_mount(&lab);
        if kill_first {
            kill_and_wait(service_pid(&lab));
        }
        rustix::mount::unmount(lab.mnt(), rustix::mount::UnmountFlags::empty()).unwrap();
        wait_until("the end of the device", || !attached.state.device_exists());
        lab.assert_clean();
    }
}

fn a_stopped_service_is_told() {
    let lab = Lab::new();
    let attached = lab.attach();
    let pid = service_pid(&lab);
    kill(pid, rustix::process::Signal::STOP);
    let (listed, _) = inventory::list(&lab.states()).unwrap();
    assert_eq!(listed[0].status, Status::Silent);
    kill(pid, rustix::process::Signal::CONT);
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn many_launches_at_once_share_one_service() {
    let lab = Lab::new();
    let devices: Vec<Attached> = std::thread::scope(|scope| {
        let launches: Vec<_> = (0..8).map(|_| scope.spawn(|| lab.attach())).collect();
        launches.into_iter().map(|launch| launch.join().unwrap()).collect()
    });
    let pids: BTreeSet<u32> = devices.iter().map(|device| device.state.process.pid).collect();
    assert_eq!(pids.len(), 1, "{devices:?}");
    let content = read_all(&lab.image());
    std::thread::scope(|scope| {
        for device in &devices {
            let content = &content;
            scope.spawn(move || assert!(read_all(&device.state.device) == *content));
        }
    });
    kill_and_wait(service_pid(&lab));
    for device in &devices {
        assert!(read_all(&device.state.device) == content);
    }
    for device in &devices {
        inventory::detach(&lab.states(), &device.state.device).unwrap();
    }
    lab.assert_clean();
}

/// The same program takes over: all that an upgrade does but for what is new in it.
fn an_upgrade_under_load_is_a_pause() {
    let lab = Lab::new();
    let attached = lab.attach();
    let content = read_all(&lab.image());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_and_compare(&attached.state.device, &content, 5, &stop));
        let upgrades = catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..3 {
                let upgraded = service::upgrade(&lab.states(), &launcher()).unwrap();
                let (before, after) = upgraded.expect("there is a service");
                assert_ne!(before, after);
                assert_eq!(service_pid(&lab), after);
            }
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        upgrades.unwrap();
        assert!(reader.join().expect("the reader failed") > 3);
    });
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

/// A program that does not start is not gone on with: the one before is.
fn a_broken_upgrade_goes_back() {
    let lab = Lab::new();
    let attached = lab.attach();
    let content = read_all(&lab.image());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_and_compare(&attached.state.device, &content, 5, &stop));
        let upgrade = catch_unwind(AssertUnwindSafe(|| {
            let broken = Launcher {
                program: "/bin/false".into(),
                ..launcher()
            };
            let error = service::upgrade(&lab.states(), &broken).unwrap_err().to_string();
            assert!(error.contains("the one before does"), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            // It goes on being the one that is started again.
            kill_and_wait(service_pid(&lab));
            service_pid(&lab);
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        upgrade.unwrap();
        assert!(reader.join().expect("the reader failed") > 3);
    });
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

/// A device whose image cannot be made again is set aside: its reads fail instead of waiting for ever, and nobody else's do.
fn a_device_that_cannot_go_on_is_set_aside() {
    let lab = Lab::new();
    let good = lab.attach();
    let bad = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("fail-again"))).unwrap();
    assert!(read_all(&bad.state.device) == read_all(&lab.image()));
    kill_and_wait(service_pid_of(&lab, &good));
    assert!(read_all(&good.state.device) == read_all(&lab.image()));
    let status = || {
        let (listed, _) = inventory::list(&lab.states()).unwrap();
        let line = listed.into_iter().find(|line| line.state.name == bad.state.name);
        line.expect("it is listed").status
    };
    wait_until(
        "a verdict",
        || matches!(status(), Status::Poisoned { ref why } if why.contains("another age")),
    );
    let mut block = [0; 4096];
    let device = File::open(&bad.state.device).unwrap();
    // The kernel may have kept what was read before.
    rustix::fs::fadvise(&device, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let read = device.read_exact_at(&mut block, 8 << 20);
    assert_eq!(read.unwrap_err().raw_os_error(), Some(5), "EIO");
    drop(device);
    assert!(read_all(&good.state.device) == read_all(&lab.image()));
    for device in [&bad, &good] {
        inventory::detach(&lab.states(), &device.state.device).unwrap();
    }
    lab.assert_clean();
}

/// A keeper that was stopped for so long that it was replaced ends when it goes on, and keeps nothing.
fn a_stopped_keeper_is_replaced_and_ends() {
    let lab = Lab::new();
    let attached = lab.attach();
    wait_until("two keepers", || keepers(&lab).len() == 2);
    let stopped = keepers(&lab)[0];
    kill(stopped, rustix::process::Signal::STOP);
    // What it is to hold does not get there.
    let second = lab.attach();
    wait_until("another keeper", || {
        keepers(&lab).iter().filter(|pid| **pid != stopped).count() == 2
    });
    kill(stopped, rustix::process::Signal::CONT);
    wait_until("the end of the stopped one", || {
        !processes().iter().any(|(lives, _)| *lives == stopped)
    });
    for device in [&attached, &second] {
        assert!(read_all(&device.state.device) == read_all(&lab.image()));
        inventory::detach(&lab.states(), &device.state.device).unwrap();
    }
    lab.assert_clean();
}

/// The kernel gives a number out again at once: whose device goes must not take the next one's name along.
fn a_name_that_is_given_out_again_is_the_next_ones() {
    let lab = Lab::new();
    let content = read_all(&lab.image());
    let keeps_the_service = lab.attach();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let attached = lab.attach();
                    let found = inventory::find(&lab.states(), Path::new(&attached.state.name)).unwrap();
                    assert_eq!(found, attached.state);
                    let mut block = vec![0; 8192];
                    let device = File::open(&attached.state.device).unwrap();
                    device.read_exact_at(&mut block, 4 << 20).unwrap();
                    assert!(block == content[4 << 20..(4 << 20) + 8192]);
                    drop(device);
                    inventory::stats(&lab.states(), &attached.state.device).unwrap();
                    inventory::detach(&lab.states(), &attached.state.device).unwrap();
                }
            });
        }
    });
    let (listed, _) = inventory::list(&lab.states()).unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    inventory::detach(&lab.states(), &keeps_the_service.state.device).unwrap();
    lab.assert_clean();
}

/// What is asked of a device that is gone is not done to the one that has its name now.
fn a_command_that_comes_late_harms_no_other_device() {
    let lab = Lab::new();
    let content = read_all(&lab.image());
    let keeps_the_service = lab.attach();
    let gone = lab.attach().state;
    inventory::detach(&lab.states(), &gone.device).unwrap();
    // Others on this machine may have been given the name in between.
    let mut others = Vec::new();
    let next = loop {
        let next = lab.attach().state;
        if next.name == gone.name || others.len() > 50 {
            break next;
        }
        others.push(next);
    };
    if next.name == gone.name {
        assert_ne!(next.instance, gone.instance);
        service::detach(&lab.states(), &gone).unwrap();
        assert!(service::let_go(&lab.states(), &gone).is_err());
        assert!(service::stats(&lab.states(), &gone).is_err());
        // Also while it is in use.
        let used = File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&next.device)
            .unwrap();
        service::detach(&lab.states(), &gone).unwrap();
        drop(used);
        assert!(read_all(&next.device) == content);
    }
    for state in others.iter().chain([&next]) {
        inventory::detach(&lab.states(), &state.device).unwrap();
    }
    // Nor to another service's.
    let neighbour = Lab::new();
    let theirs = neighbour.attach().state;
    let namesake = State {
        instance: gone.instance,
        ..theirs.clone()
    };
    let used = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&theirs.device)
        .unwrap();
    service::detach(&lab.states(), &namesake).unwrap();
    drop(used);
    assert!(read_all(&theirs.device) == read_all(&neighbour.image()));
    inventory::detach(&neighbour.states(), &theirs.device).unwrap();
    neighbour.assert_clean();
    inventory::detach(&lab.states(), &keeps_the_service.state.device).unwrap();
    lab.assert_clean();
}

fn a_panicking_builder_harms_no_other_device() {
    let lab = Lab::new();
    let attached = lab.attach();
    let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("panic")))
        .unwrap_err()
        .to_string();
    assert!(error.contains("panicked"), "{error}");
    assert_eq!(service_pid(&lab), attached.state.process.pid);
    // One that takes the process along is a pause for the others.
    let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("abort")))
        .unwrap_err()
        .to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(read_all(&attached.state.device) == read_all(&lab.image()));
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn reads_that_never_end_do_not_keep_the_device() {
    let lab = Lab::new();
    let attached = service::launch::<Images>(&launcher(), &lab.spec(None, None)).unwrap();
    let device = attached.state.device.clone();
    let reads = || {
        let stats = inventory::stats(&lab.states(), &attached.state.device).unwrap();
        stats.counters.device.reads
    };
    // How many the kernel has under way at once is its own affair: an older one's loop device has one.
    let before = reads();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        File::open(device).and_then(|mut file| file.read_to_end(&mut all))
    });
    wait_until("a read", || reads() > before);
    std::thread::sleep(Duration::from_millis(100));
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    // A device that goes away under a reader is an error or the device's end to it.
    let read = reader.join().unwrap();
    assert!(
        read.is_err() || read.is_ok_and(|len| len < 16 << 20),
        "bytes that never came were read"
    );
    lab.assert_clean();
}

fn a_builder_that_fails_leaves_nothing() {
    let lab = Lab::new();
    let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("fail")))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "the index is of another age");
    lab.assert_clean();
}

fn a_daemon_that_dies_young_leaves_nothing() {
    let lab = Lab::new();
    let error = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("abort")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the service ended before the device was ready"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1);
    lab.assert_nothing_served();
}

fn a_broken_image_does_not_mount_and_leaves_nothing() {
    let lab = Lab::new();
    fs::write(lab.image(), vec![7u8; 1 << 20]).unwrap();
    let error = mount::mount::<Images>(
        &launcher(),
        &lab.spec(Some(1), None),
        &lab.mnt(),
        &MountOptions::default(),
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("cannot mount /dev/"), "{error}");
    lab.assert_clean();
}

fn bad_directories_are_refused() {
    let lab = Lab::new();
    let full = lab.dir.path().join("full");
    fs::create_dir_all(full.join("something")).unwrap();
    let cases = [
        (lab.dir.path().join("missing"), "does not exist"),
        (lab.image(), "is not a directory"),
        (lab.image().join("below"), "is not a directory"),
        (full, "is not empty"),
    ];
    for (dir, expected) in cases {
        let error = mount::mount::<Images>(&launcher(), &lab.spec(Some(1), None), &dir, &MountOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(expected) && error.contains(&*dir.to_string_lossy()),
            "{error}"
        );
    }
    lab.assert_clean();
}

/// A cache file that was cut short, or a disk that fails: the fetch thread can still have the bytes.
fn what_a_local_file_does_not_give_is_fetched() {
    let lab = Lab::new();
    let attached = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("hollow"))).unwrap();
    assert!(
        read_all(&attached.state.device) == read_all(&lab.image()),
        "the device differs from the image"
    );
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn counts_what_it_serves() {
    let lab = Lab::new();
    let attached = lab.attach();
    let all = read_all(&attached.state.device);
    let stats = inventory::stats(&lab.states(), &attached.state.device)
        .unwrap()
        .counters;
    let bytes = &stats.device.bytes;
    let total = bytes.metadata + bytes.zero + bytes.memory + bytes.disk + bytes.fetched;
    // The kernel may have read some blocks twice: looking for partitions, and for us.
    assert!(total >= u64::try_from(all.len()).unwrap(), "{stats:?}");
    assert!(total < u64::try_from(all.len() * 2).unwrap(), "{stats:?}");
    for (name, count) in [
        ("metadata", bytes.metadata),
        ("memory", bytes.memory),
        ("disk", bytes.disk),
        ("fetched", bytes.fetched),
    ] {
        assert!(count > 100_000, "{name}: {stats:?}");
    }
    assert!(stats.device.latency.max_ns > 1_000_000, "{stats:?}");
    assert_eq!((stats.device.errors, stats.fetch.requests), (0, 7));
    assert!(stats.resident_bytes > 1 << 20);
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    lab.assert_clean();
}

fn two_devices_do_not_hold_each_other() {
    let lab = Lab::new();
    let first = lab.mount();
    // Starts while the first is mounted, and must not keep that mount alive in its own namespace.
    let second = lab.attach();
    assert_ne!(first.state.device, second.state.device);
    mount::unmount(&lab.states(), &lab.mnt()).unwrap();
    assert!(
        !first.state.device_exists(),
        "the second daemon keeps the first one's device"
    );
    inventory::detach(&lab.states(), &second.state.device).unwrap();
    lab.assert_clean();
}

fn keeps_nothing_mounted_that_it_does_not_need() {
    let lab = Lab::new();
    let place = |name: &str| lab.dir.path().join(name);
    let (other, inner, hidden) = (place("other"), place("other/inner"), place("hidden"));
    let tmpfs = |at: &Path| {
        fs::create_dir_all(at).unwrap();
        rustix::mount::mount(
            "none",
            at,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(c"mode=700"),
        )
        .unwrap();
    };
    let undo = |at: &Path| rustix::mount::unmount(at, rustix::mount::UnmountFlags::empty()).unwrap();
    // States on a file system of their own: that one stays.
    tmpfs(lab.states().path());
    tmpfs(&other);
    tmpfs(&inner);
    tmpfs(&hidden);
    tmpfs(&hidden);
    let attached = lab.attach();
    for at in [&inner, &other, &hidden, &hidden] {
        undo(at);
    }
    let pid = attached.state.process.pid;
    let seen = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mounted = |at: &Path| seen.split(' ').any(|field| Path::new(field) == at);
    for at in [&inner, &other, &hidden] {
        assert!(!mounted(at), "the daemon keeps {}: {seen}", at.display());
    }
    assert!(mounted(lab.states().path()) && mounted(Path::new("/proc")), "{seen}");
    assert_eq!(read_all(&attached.state.device), read_all(&lab.image()));
    inventory::detach(&lab.states(), &attached.state.device).unwrap();
    wait_until("the end of the service", || {
        fs::read_dir(lab.states().path()).unwrap().next().is_none()
    });
    // The kernel closes what a process had open a moment after its end.
    let deadline = Instant::now() + Duration::from_secs(10);
    let flags = rustix::mount::UnmountFlags::empty();
    while let Err(error) = rustix::mount::unmount(lab.states().path(), flags) {
        assert!(Instant::now() < deadline, "the states are busy: {error}");
        std::thread::sleep(Duration::from_millis(10));
    }
    lab.assert_clean();
}
