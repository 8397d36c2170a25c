//! Taking ublk devices over: servers are killed at any moment, also in the middle of taking a device over, and hand devices
//! over; readers of a mounted filesystem and of the device itself see neither an error nor a wrong byte.
//!
//! `TARBLK_TEST_KILLS` is how often servers are killed (20), `TARBLK_TEST_SEED` makes the moments others. Where this kernel has
//! no ublk the cases are skipped loudly; `tools/test guest` runs this program in a guest that has.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use libublk::UblkFlags;
use libublk::ctrl::UblkCtrlBuilder;
use support::harness::{self, Case};
use support::wait::wait_until;
use support::{make_ext4, patchwork, read_all};
use tarblk::internals::device::ublk::{self, UblkDevice};
use tarblk::internals::device::volume::{BlobReader, Volume};
use tarblk::internals::device::{DeviceError, DeviceOptions, users};
use tarblk::internals::fetch::{LayerRange, Located, ReadCallback};
use tarblk::internals::image::BlockImage;

const CASES: &[Case] = &[
    (
        "kills_at_any_moment_are_not_noticed",
        kills_at_any_moment_are_not_noticed,
    ),
    ("full_queues_survive_a_kill", full_queues_survive_a_kill),
    ("a_device_is_handed_over", a_device_is_handed_over),
    (
        "reads_that_the_fetch_thread_left_are_for_the_next_server",
        reads_that_the_fetch_thread_left_are_for_the_next_server,
    ),
    ("another_image_is_refused", another_image_is_refused),
    ("a_device_that_is_served_is_refused", a_device_that_is_served_is_refused),
    (
        "a_device_that_was_never_started_is_lost",
        a_device_that_was_never_started_is_lost,
    ),
    ("a_device_that_was_stopped_is_lost", a_device_that_was_stopped_is_lost),
    (
        "a_server_killed_while_it_starts_leaves_a_device_or_none",
        a_server_killed_while_it_starts_leaves_a_device_or_none,
    ),
    (
        "whether_a_dead_device_is_claimed_is_known",
        whether_a_dead_device_is_claimed_is_known,
    ),
];

/// The program as a server, or as one that dies while it makes a device.
const SERVE: &str = "serve";
const HALF: &str = "half";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(SERVE) => return serve(&arguments[1..]),
        Some(HALF) => leave_half_a_device(),
        _ => {}
    }
    harness::run(CASES, support::missing(ublk::preflight().err()))
}

// ---------------------------------------------------------------------------------------------------------- a server

/// `IMAGE DELAY_MS|never|deaf NUMBER|new`: serves a device, a new one or an old one, says which on stdout, and obeys stdin.
fn serve(arguments: &[String]) -> ExitCode {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let [image, delay, number] = arguments else {
        unreachable!()
    };
    let volume = volume(Path::new(image), delay);
    let options = DeviceOptions::default();
    println!("ready");
    let began = Instant::now();
    let device = match number.as_str() {
        "new" => UblkDevice::start(&volume, &options),
        number => UblkDevice::resume(&volume, &options, number.parse().unwrap()),
    };
    let device = match device {
        Ok(device) => device,
        Err(error) => {
            println!("failed: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("serving {} {}", device.id(), began.elapsed().as_micros());
    let mut device = Some(device);
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let device = device.take().unwrap();
        match line.as_str() {
            "hand over" => println!("handed over {}", device.hand_over().unwrap()),
            "stop" => println!("stopped {:?}", device.stop().map_err(|error| error.to_string())),
            _ => unreachable!("{line}"),
        }
    }
    // The test has ended. Nothing is cleaned up: that is its business.
    ExitCode::SUCCESS
}

fn volume(image: &Path, delay: &str) -> Arc<Volume> {
    let (blocks, bytes) = patchwork(image, delay.parse().ok().map(Duration::from_millis));
    let bytes: Arc<dyn BlobReader> = if delay == "deaf" { Arc::new(Deaf(bytes)) } else { bytes };
    let blocks: Arc<dyn BlockImage> = blocks;
    Arc::new(Volume::new(blocks, bytes, 3))
}

/// Bytes whose fetch thread is gone: what is not here is forgotten.
#[derive(Debug)]
struct Deaf(Arc<dyn BlobReader>);

impl BlobReader for Deaf {
    fn locate(&self, range: LayerRange) -> Located<'_> {
        self.0.locate(range)
    }

    fn read(&self, _: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
        drop(waiter);
    }
}

/// Adds a device, says which, and dies before it is started.
fn leave_half_a_device() -> ! {
    let ctrl = UblkCtrlBuilder::default()
        .name("tarblk")
        .nr_queues(2)
        .depth(128)
        .ctrl_flags(u64::from(
            libublk::sys::UBLK_F_USER_RECOVERY | libublk::sys::UBLK_F_USER_RECOVERY_REISSUE,
        ))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .unwrap();
    println!("added {}", ctrl.dev_info().dev_id);
    std::process::abort();
}

/// A server, as the test sees it. Killed when it is dropped.
struct Server {
    child: Child,
    orders: ChildStdin,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Server {
    fn spawn(image: &Path, delay: &str, number: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([SERVE, image.to_str().unwrap(), delay, number])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            orders: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
        }
    }

    /// What it says next.
    fn says(&mut self) -> String {
        self.answers.next().expect("the server said nothing").unwrap()
    }

    fn tell(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.says()
    }

    /// Waits until it has an image, and is about to look for the device.
    fn ready(&mut self) {
        assert_eq!(self.says(), "ready");
    }

    /// Waits until it serves; the device's number.
    fn number(&mut self) -> u32 {
        self.ready();
        self.serving().0
    }

    /// Waits until it serves what it was ready for: the device's number, and how long it took to get it.
    fn serving(&mut self) -> (u32, Duration) {
        let said = self.says();
        let (number, micros) = said
            .strip_prefix("serving ")
            .and_then(|rest| rest.split_once(' '))
            .unwrap_or_else(|| panic!("{said}"));
        (number.parse().unwrap(), Duration::from_micros(micros.parse().unwrap()))
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// ---------------------------------------------------------------------------------------------------------- a place

/// A place for one test: an image, a device that serves it, and the promise that neither is left.
struct Lab {
    dir: tempfile::TempDir,
    content: Arc<Vec<u8>>,
    number: u32,
}

impl Lab {
    /// With a first server, whose far-away bytes take `delay`.
    fn new(delay: &str) -> (Self, Server) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        make_ext4(&image, 16);
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let mut server = Server::spawn(&image, delay, "new");
        let lab = Self {
            content: Arc::new(read_all(&image)),
            number: server.number(),
            dir,
        };
        (lab, server)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.number))
    }

    fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn mount(&self) {
        rustix::mount::mount(
            self.device(),
            self.mnt(),
            "ext4",
            rustix::mount::MountFlags::RDONLY,
            Some(c"noload"),
        )
        .unwrap();
    }

    fn unmount(&self) {
        rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::empty()).unwrap();
    }

    /// Another process that takes the device over.
    fn successor(&self, delay: &str) -> Server {
        Server::spawn(&self.image(), delay, &self.number.to_string())
    }

    /// Compares the whole device with the image.
    fn check_device(&self) {
        let found = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.device())
            .unwrap();
        for at in (0..self.content.len()).step_by(READ_BYTES) {
            check_read(&found, &self.content, at, READ_BYTES.min(self.content.len() - at)).unwrap();
        }
    }

    /// Has its server stop the device, which must be gone then.
    fn finish(self, mut server: Server) {
        assert_eq!(server.tell("stop"), "stopped Ok(())");
        assert!(!ublk::exists(self.number), "the device is left");
    }
}

impl Drop for Lab {
    /// A test that failed must not spoil the ones after it.
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::DETACH);
        if ublk::exists(self.number) {
            let _ = ublk::delete_dead(self.number, 0);
        }
    }
}

const READ_BYTES: usize = 128 << 10;

/// Memory that a direct read can go to.
fn aligned(len: usize) -> libublk::helpers::IoBuf<u8> {
    libublk::helpers::IoBuf::new(len)
}

/// Reads a stretch of a device or file and compares it with what it has to be.
fn check_read(from: &File, content: &[u8], at: usize, len: usize) -> Result<(), String> {
    let mut buf = aligned(len);
    let mut done = 0;
    while done < len {
        let offset = u64::try_from(at + done).unwrap();
        match rustix::io::pread(from, &mut buf.as_mut_slice()[done..len], offset) {
            Ok(0) => return Err(format!("it ends at {offset}")),
            Ok(read) => done += read,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("{len} bytes at {at}: {error}")),
        }
    }
    if buf.as_slice()[..len] == content[at..at + len] {
        Ok(())
    } else {
        Err(format!("{len} bytes at {at} differ"))
    }
}

/// A row of numbers that looks random and is the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

// -------------------------------------------------------------------------------------------------------- readers

/// Readers of a device and of what is mounted on it, who check every byte and never stop reading.
struct Readers {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// Reads of the device itself, which no cache answers.
    direct: AtomicU64,
    files: AtomicU64,
    complaints: Mutex<Vec<String>>,
}

impl Readers {
    fn start(lab: &Lab) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            direct: AtomicU64::new(0),
            files: AtomicU64::new(0),
            complaints: Mutex::default(),
        });
        let mut threads = Vec::new();
        for reader in 0..4 {
            let (shared, content, device) = (Arc::clone(&shared), Arc::clone(&lab.content), lab.device());
            threads.push(thread::spawn(move || {
                let file = File::options()
                    .read(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(device)
                    .unwrap();
                let mut random = Random(reader);
                while !shared.stop.load(Ordering::Relaxed) {
                    let blocks = content.len() / 4096;
                    let at = random.below(blocks);
                    let count = (random.below(64) + 1).min(blocks - at);
                    shared.note(check_read(&file, &content, at * 4096, count * 4096));
                    shared.direct.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        let expected = Arc::new(dump(&lab.image(), lab.dir.path()));
        for reader in 0..2 {
            let (shared, expected, mnt) = (Arc::clone(&shared), Arc::clone(&expected), lab.mnt());
            threads.push(thread::spawn(move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    for (name, content) in expected.iter() {
                        let file = match File::open(mnt.join(name)) {
                            Ok(file) => file,
                            Err(error) => {
                                shared.note(Err(format!("open {name}: {error}")));
                                continue;
                            }
                        };
                        // So that the kernel asks again; the second reader meets the first one's reads.
                        if reader == 0 {
                            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                        }
                        shared
                            .note(check_read(&file, content, 0, content.len()).map_err(|why| format!("{name}: {why}")));
                        shared.files.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }));
        }
        Self { shared, threads }
    }

    fn direct(&self) -> u64 {
        self.shared.direct.load(Ordering::SeqCst)
    }

    /// Waits until a read of the device was answered after `seen` ones; when.
    fn answered_after(&self, seen: u64) -> Instant {
        wait_until("another read of the device", || self.direct() > seen);
        Instant::now()
    }

    /// Ends them; how many reads of the device and of files there were. No read may have failed.
    fn end(self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        let complaints = self.shared.complaints.lock().unwrap();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
        (
            self.shared.direct.load(Ordering::SeqCst),
            self.shared.files.load(Ordering::SeqCst),
        )
    }
}

impl Shared {
    fn note(&self, outcome: Result<(), String>) {
        if let Err(complaint) = outcome {
            eprintln!("a reader: {complaint}");
            self.complaints.lock().unwrap().push(complaint);
        }
    }
}

/// The files of an ext4 image, as debugfs finds them.
fn dump(image: &Path, dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let each = |name: &str| {
        let copy = dir.join(name);
        let order = format!("dump /{name} {}", copy.display());
        let dumped = Command::new("debugfs")
            .args(["-R", &order])
            .arg(image)
            .output()
            .unwrap();
        assert!(dumped.status.success());
        (name.to_owned(), read_all(&copy))
    };
    ["small", "block", "odd", "big"].map(each).into()
}

// ---------------------------------------------------------------------------------------------------------- cases

fn kills_at_any_moment_are_not_noticed() {
    let kills = from_environment("TARBLK_TEST_KILLS", 20);
    let mut random = Random(from_environment("TARBLK_TEST_SEED", 1));
    let (lab, mut server) = Lab::new("4");
    lab.mount();
    let readers = Readers::start(&lab);
    let (mut waits, mut steps) = (Vec::new(), Vec::new());
    let mut killed = 0;
    let mut killed_early = 0;
    while killed < kills {
        thread::sleep(Duration::from_millis(u64::try_from(random.below(120)).unwrap()));
        let began = Instant::now();
        server.kill();
        killed += 1;
        // The next one may not live until it serves, nor the one after it.
        let early = random.below(3);
        for _ in 0..early {
            let mut next = lab.successor("4");
            next.ready();
            thread::sleep(Duration::from_micros(u64::try_from(random.below(12_000)).unwrap()));
            next.kill();
            killed += 1;
            killed_early += 1;
        }
        let seen = readers.direct();
        server = lab.successor("4");
        server.ready();
        let (number, took) = server.serving();
        assert_eq!(number, lab.number);
        let answered = readers.answered_after(seen);
        steps.push(took);
        if early == 0 {
            waits.push(answered.duration_since(began));
        }
    }
    let (direct, files) = readers.end();
    eprintln!(
        "{killed} kills, {killed_early} of them before the server served; {direct} reads of the device, {files} of files; from a \
         kill to the next answer, the next server's start included: {}; taking over alone: {}",
        spread(&mut waits),
        spread(&mut steps)
    );
    assert!(direct > kills && files > 4);
    lab.unmount();
    lab.check_device();
    lab.finish(server);
}

/// Median and maximum.
fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let of = |index: usize| times.get(index).map_or(f64::NAN, Duration::as_secs_f64) * 1e3;
    format!(
        "{:.1} ms median, {:.1} ms at most of {}",
        of(times.len() / 2),
        of(times.len().saturating_sub(1)),
        times.len()
    )
}

/// How many requests the kernel has in flight for a device.
fn in_flight(number: u32) -> usize {
    let text = fs::read_to_string(format!("/sys/block/ublkb{number}/inflight")).unwrap();
    text.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

fn full_queues_survive_a_kill() {
    let (lab, mut server) = Lab::new("never");
    let blocks = lab.content.len() / 4096;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(lab.device())
        .unwrap();
    let file = Arc::new(file);
    let killed = Arc::new(AtomicBool::new(false));
    // Each asks for one block after the other until one does not come; more of them than there are tags.
    let readers: Vec<_> = (0..400)
        .map(|reader| {
            let (file, content, killed) = (Arc::clone(&file), Arc::clone(&lab.content), Arc::clone(&killed));
            thread::spawn(move || {
                let mut random = Random(reader);
                while !killed.load(Ordering::Relaxed) {
                    check_read(&file, &content, random.below(blocks) * 4096, 4096)?;
                }
                Ok::<_, String>(())
            })
        })
        .collect();
    // Where the driver needs it, one tag of each queue is kept free.
    let tags = 2 * usize::from(DeviceOptions::default().depth) - 2;
    let began = Instant::now();
    let mut most = 0;
    while most < tags && began.elapsed() < Duration::from_secs(15) {
        most = most.max(in_flight(lab.number));
        thread::sleep(Duration::from_millis(1));
    }
    let began = Instant::now();
    server.kill();
    killed.store(true, Ordering::Relaxed);
    let mut server = lab.successor("10");
    assert_eq!(server.number(), lab.number);
    eprintln!(
        "{most} reads in flight; served again after {:.0} ms",
        began.elapsed().as_secs_f64() * 1e3
    );
    assert!(most > 100, "only {most} reads in flight");
    for reader in readers {
        reader.join().unwrap().unwrap();
    }
    drop(file);
    lab.check_device();
    lab.finish(server);
}

fn a_device_is_handed_over() {
    let (lab, mut server) = Lab::new("3");
    lab.mount();
    let readers = Readers::start(&lab);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        thread::sleep(Duration::from_millis(30));
        let began = Instant::now();
        assert_eq!(server.tell("hand over"), format!("handed over {}", lab.number));
        let seen = readers.direct();
        let mut next = lab.successor("3");
        assert_eq!(next.number(), lab.number);
        pauses.push(readers.answered_after(seen).duration_since(began));
        // The one before lives on until now, and its end is nobody's business.
        server = next;
    }
    eprintln!("handed over in {pauses:.1?}");
    readers.end();
    lab.unmount();
    lab.check_device();
    lab.finish(server);
}

fn reads_that_the_fetch_thread_left_are_for_the_next_server() {
    let (lab, mut server) = Lab::new("1");
    server.kill();
    let mut server = lab.successor("deaf");
    server.number();
    let (content, device) = (Arc::clone(&lab.content), lab.device());
    let reader = thread::spawn(move || {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(device)
            .unwrap();
        (0..content.len() / READ_BYTES).try_for_each(|part| check_read(&file, &content, part * READ_BYTES, READ_BYTES))
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "a read ended that could not be answered");
    assert_eq!(server.tell("hand over"), format!("handed over {}", lab.number));
    let mut server = lab.successor("1");
    server.number();
    reader.join().unwrap().unwrap();

    // A device whose reads wait like that can be stopped: then they fail.
    server.kill();
    let mut server = lab.successor("deaf");
    server.number();
    let (content, device) = (Arc::clone(&lab.content), lab.device());
    let reader = thread::spawn(move || {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(device)
            .unwrap();
        (0..content.len() / READ_BYTES).try_for_each(|part| check_read(&file, &content, part * READ_BYTES, READ_BYTES))
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "a read ended that could not be answered");
    lab.finish(server);
    assert!(reader.join().unwrap().is_err());
}

fn another_image_is_refused() {
    let (lab, mut server) = Lab::new("1");
    server.kill();
    let other = lab.dir.path().join("other");
    make_ext4(&other, 20);
    let error = UblkDevice::resume(&volume(&other, "1"), &DeviceOptions::default(), lab.number)
        .unwrap_err()
        .to_string();
    assert!(error.contains("another image's"), "{error}");
    assert_eq!(error.lines().count(), 1);
    // It is as it was.
    let mut server = lab.successor("1");
    server.number();
    lab.check_device();
    lab.finish(server);
}

fn a_device_that_is_served_is_refused() {
    let (lab, server) = Lab::new("1");
    let error = UblkDevice::resume(&volume(&lab.image(), "1"), &DeviceOptions::default(), lab.number)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("process {}", server.child.id())), "{error}");
    lab.check_device();
    lab.finish(server);
}

fn is_lost(number: u32, image: &Path) -> bool {
    let resumed = UblkDevice::resume(&volume(image, "1"), &DeviceOptions::default(), number);
    matches!(resumed, Err(DeviceError::UblkLost { id, .. }) if id == number)
}

fn a_device_that_was_never_started_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    make_ext4(&image, 16);
    let output = Command::new(std::env::current_exe().unwrap())
        .arg(HALF)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let number: u32 = said.trim().strip_prefix("added ").unwrap().parse().unwrap();
    assert!(ublk::exists(number));
    assert!(is_lost(number, &image));
    ublk::delete_dead(number, 0).unwrap();
    assert!(!ublk::exists(number));
    // And what does not exist can be nothing else.
    assert!(is_lost(number, &image));
}

fn a_device_that_was_stopped_is_lost() {
    let (lab, mut server) = Lab::new("1");
    let pid = server.child.id();
    server.kill();
    ublk::stop_dead(lab.number, pid).unwrap();
    assert!(ublk::exists(lab.number));
    assert!(is_lost(lab.number, &lab.image()));
    ublk::delete_dead(lab.number, pid).unwrap();
    assert!(!ublk::exists(lab.number));
}

/// The numbers of the devices that the driver has.
fn devices() -> BTreeSet<u32> {
    let entries = fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect()
}

fn a_server_killed_while_it_starts_leaves_a_device_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    make_ext4(&image, 16);
    let content = read_all(&image);
    let mut random = Random(from_environment("TARBLK_TEST_SEED", 1));
    let before = devices();
    // How long a start takes depends on the machine.
    let mut server = Server::spawn(&image, "1", "new");
    server.ready();
    let (_, start_time) = server.serving();
    assert_eq!(server.tell("stop"), "stopped Ok(())");
    drop(server);
    let (mut none, mut lost, mut taken) = (0, 0, 0);
    for _ in 0..from_environment("TARBLK_TEST_KILLS", 20) {
        let mut server = Server::spawn(&image, "1", "new");
        server.ready();
        let micros = usize::try_from(start_time.as_micros()).unwrap();
        thread::sleep(Duration::from_micros(u64::try_from(random.below(micros)).unwrap()));
        server.kill();
        let left: Vec<u32> = devices().difference(&before).copied().collect();
        let [number] = left[..] else {
            assert!(left.is_empty(), "{left:?}");
            none += 1;
            continue;
        };
        match UblkDevice::resume(&volume(&image, "1"), &DeviceOptions::default(), number) {
            Ok(device) => {
                assert!(read_all(device.path()) == content);
                device.stop().unwrap();
                taken += 1;
            }
            Err(DeviceError::UblkLost { .. }) => {
                ublk::delete_dead(number, 0).unwrap();
                lost += 1;
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(devices(), before);
    }
    eprintln!(
        "killed within {start_time:.1?}: {none} times there was no device, {lost} times a lost one, {taken} times one to take over"
    );
}

fn whether_a_dead_device_is_claimed_is_known() {
    let (lab, mut server) = Lab::new("1");
    assert!(!users::is_claimed(&lab.device()).unwrap());
    lab.mount();
    assert!(users::is_claimed(&lab.device()).unwrap());
    server.kill();
    assert!(users::is_claimed(&lab.device()).unwrap());
    // Gone from this namespace, and yet in use.
    let kept: OwnedFd = File::open(lab.mnt()).unwrap().into();
    rustix::mount::unmount(lab.mnt(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(users::is_claimed(&lab.device()).unwrap());
    drop(kept);
    let deadline = Instant::now() + Duration::from_secs(10);
    while users::is_claimed(&lab.device()).unwrap() {
        assert!(Instant::now() < deadline, "claimed for ever");
        thread::sleep(Duration::from_millis(5));
    }
    // A reader that was killed holds what opening the device would have to wait for.
    let mut reader = Command::new("cat")
        .arg(lab.device())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(300));
    reader.kill().unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(!users::is_claimed(&lab.device()).unwrap());
    let mut server = lab.successor("1");
    server.number();
    reader.wait().unwrap();
    lab.check_device();
    lab.finish(server);
}
