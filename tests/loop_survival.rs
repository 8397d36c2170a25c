//! Loop devices whose processes are killed while they are read: whoever holds the connection can have another process go on, and
//! no reader notices. The test program holds it; what serves is the same program, run again.
//!
//! Each case runs with the kernel's resending of requests, where it has that, and without, as on kernels before 6.9.
//! `TARBLK_TEST_KILLS` is how often the loaded device is killed (30).

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use support::wait::wait_until;
use support::{far_away_blocks, harness, make_ext4, patchwork, read_all};
use tarblk::internals::device::fuse_loop::{FuseLoop, HeldLoop, preflight};
use tarblk::internals::device::volume::Volume;
use tarblk::internals::device::{BackendChoice, DeviceOptions};

const BLOCK: usize = 4096;

/// What the server is told.
const LET_GO: &[u8] = b"let go";
const STOP: &[u8] = b"stop";

const CASES: &[harness::Case] = &[
    ("kills_under_load", || both(kills_under_load)),
    ("a_kill_before_the_first_read", || both(a_kill_before_the_first_read)),
    ("kills_with_64_reads_in_flight", || both(kills_with_64_reads_in_flight)),
    ("a_device_that_was_let_go_ends_with_its_mount", || {
        both(a_device_that_was_let_go_ends_with_its_mount);
    }),
    ("a_resumed_device_can_be_stopped", || {
        both(a_resumed_device_can_be_stopped);
    }),
    ("another_image_is_refused", || {
        both(another_image_is_refused);
    }),
    ("nothing_is_left_without_holders", || {
        both(nothing_is_left_without_holders);
    }),
];

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(harness::DAEMON) {
        return serve();
    }
    harness::run(CASES, support::missing(preflight().err()))
}

fn both(case: fn(&mut Lab)) {
    for resend in [true, false] {
        println!("  {} the kernel's resending", if resend { "with" } else { "without" });
        case(&mut Lab::new(resend));
    }
}

/// What a server is to serve.
#[derive(Serialize, Deserialize)]
struct Order {
    file: PathBuf,
    /// How long far-away bytes take, in milliseconds; for ever, when not given.
    delay_ms: Option<u64>,
    queues: u16,
    label: String,
    /// The device that it goes on with; a new one, when not given.
    number: Option<u32>,
}

/// The program as a server: takes an order from the socket that is its stdin, and says the device's number.
fn serve() -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .parse_default_env()
        .init();
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let (order, mut held) = receive(socket.as_fd()).unwrap();
    let order: Order = serde_json::from_slice(&order).unwrap();
    let (image, bytes) = patchwork(&order.file, order.delay_ms.map(Duration::from_millis));
    let volume = Arc::new(Volume::new(image, bytes, usize::from(order.queues) + 1));
    let options = DeviceOptions {
        backend: BackendChoice::Loop,
        queues: order.queues,
        label: order.label,
        ..DeviceOptions::default()
    };
    let began = Instant::now();
    let made = match order.number {
        None => FuseLoop::start(&volume, &options),
        Some(number) => {
            let device = (held.len() > 2).then(|| held.remove(2));
            let (ledger, channel) = (held.remove(1), held.remove(0));
            let held = HeldLoop {
                channel,
                ledger,
                device,
            };
            FuseLoop::resume(&volume, &options, number, held)
        }
    };
    let mut device = match made {
        Ok(device) => device,
        Err(error) => {
            eprintln!("  server: {error}");
            return ExitCode::FAILURE;
        }
    };
    let number = format!("{} {}", device.number(), began.elapsed().as_micros());
    send(socket.as_fd(), number.as_bytes(), &fds(&device.held().unwrap())).unwrap();
    while device.is_running() {
        if !readable(&socket) {
            continue;
        }
        match receive(socket.as_fd()) {
            Ok((word, _)) if word == LET_GO => {
                device.let_go();
                send(socket.as_fd(), b"done", &[]).unwrap();
            }
            Ok((word, _)) if word == STOP => {
                device.stop().unwrap();
                return ExitCode::SUCCESS;
            }
            // The test is gone.
            _ => return ExitCode::FAILURE,
        }
    }
    ExitCode::SUCCESS
}

/// Waits a moment for something to receive.
fn readable(socket: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 5_000_000,
    };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&moment)).unwrap() > 0
}

/// The descriptors of what is held, in order.
fn fds(held: &HeldLoop) -> Vec<BorrowedFd<'_>> {
    let always = [held.channel.as_fd(), held.ledger.as_fd()];
    always
        .into_iter()
        .chain(held.device.as_ref().map(AsFd::as_fd))
        .collect()
}

fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut message = vec![0; BLOCK];
    let mut parts = [IoSliceMut::new(&mut message)];
    let got = rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    message.truncate(got.bytes);
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    Ok((message, fds))
}

/// A process that serves.
struct Server {
    child: Child,
    socket: OwnedFd,
}

impl Server {
    fn start(lab: &Lab, delay_ms: Option<u64>, queues: u16) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(harness::DAEMON).stdin(Stdio::from(theirs));
        if !lab.resend {
            command.env("TARBLK_FUSE_NO_RESEND", "1");
        }
        let child = command.spawn().unwrap();
        let order = Order {
            file: lab.image(),
            delay_ms,
            queues,
            label: lab.label.clone(),
            number: lab.held.as_ref().map(|_| lab.number),
        };
        let held = lab.held.as_ref().map(fds).unwrap_or_default();
        send(ours.as_fd(), &serde_json::to_vec(&order).unwrap(), &held).unwrap();
        Self { child, socket: ours }
    }

    /// The device's number, what holds it, and how long it took to make it or to go on with it, when it is there.
    fn ready(&self) -> (u32, HeldLoop, Duration) {
        let (text, mut fds) = receive(self.socket.as_fd()).expect("the server did not start");
        let device = (fds.len() > 2).then(|| fds.remove(2));
        let (ledger, channel) = (fds.remove(1), fds.remove(0));
        let text = String::from_utf8(text).unwrap();
        let (number, micros) = text.split_once(' ').unwrap();
        let held = HeldLoop {
            channel,
            ledger,
            device,
        };
        let took = Duration::from_micros(micros.parse().unwrap());
        (number.parse().unwrap(), held, took)
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

/// A place for one case: an ext4 file as the image, the device that is made of it, and what keeps that alive.
struct Lab {
    dir: tempfile::TempDir,
    resend: bool,
    label: String,
    number: u32,
    server: Option<Server>,
    held: Option<HeldLoop>,
}

impl Lab {
    fn new(resend: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_ext4(&dir.path().join("image"), 16);
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let label = format!("survival-{}", dir.path().file_name().unwrap().to_str().unwrap());
        Self {
            dir,
            resend,
            label,
            number: 0,
            server: None,
            held: None,
        }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.number))
    }

    /// Makes the device.
    fn start(&mut self, delay_ms: Option<u64>) {
        let server = Server::start(self, delay_ms, 2);
        let (number, held, _) = server.ready();
        (self.number, self.held, self.server) = (number, Some(held), Some(server));
    }

    /// Starts a process that goes on with it.
    fn resume(&mut self, delay_ms: Option<u64>, queues: u16) {
        self.server = Some(Server::start(self, delay_ms, queues));
    }

    /// Waits until the last one that was started goes on, and returns how long it took for that.
    fn wait_ready(&self) -> Duration {
        let (number, _, took) = self.server.as_ref().unwrap().ready();
        assert_eq!(number, self.number);
        took
    }

    fn kill(&mut self) {
        self.server.as_mut().unwrap().kill();
    }

    fn tell(&self, word: &[u8]) {
        send(self.server.as_ref().unwrap().socket.as_fd(), word, &[]).unwrap();
    }

    fn wait_for_the_server_to_end(&mut self) {
        let server = self.server.as_mut().unwrap();
        assert!(server.child.wait().unwrap().success());
    }

    fn mount(&self) {
        use rustix::mount::MountFlags;
        rustix::mount::mount(self.device(), self.mnt(), "ext4", MountFlags::RDONLY, Some(c"noload")).unwrap();
    }

    fn unmount(&self) {
        rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::empty()).unwrap();
    }

    /// Whether the device is still ours.
    fn is_there(&self) -> bool {
        let file = format!("/sys/block/loop{}/loop/backing_file", self.number);
        fs::read_to_string(file).is_ok_and(|file| file.contains(&self.label))
    }

    fn assert_gone(&self) {
        wait_until("the device's end", || !self.is_there());
    }
}

impl Drop for Lab {
    /// A case that failed must leave nothing: without holders its reads fail, and the device goes.
    fn drop(&mut self) {
        self.server = None;
        self.held = None;
        let _ = rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Numbers that look random, the same in every run of a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// Room that direct reads can go to.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new(len: usize) -> Self {
        Self(vec![0; len + BLOCK])
    }

    fn bytes(&mut self, len: usize) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(BLOCK);
        &mut self.0[start..start + len]
    }
}

fn direct(path: &Path) -> File {
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap()
}

fn forget_cached(file: &File, start: u64, len: u64) {
    rustix::fs::fadvise(file, start, NonZeroU64::new(len), rustix::fs::Advice::DontNeed).unwrap();
}

/// Threads that read all the time and compare every byte.
struct Readers {
    stop: Arc<AtomicBool>,
    /// Reads that ended, by reader.
    done: Vec<Arc<AtomicU64>>,
    wrong: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    fn new() -> Self {
        Self {
            stop: Arc::default(),
            done: Vec::new(),
            wrong: Arc::default(),
            threads: Vec::new(),
        }
    }

    /// Adds a thread that calls `read` again and again until it finds something wrong.
    fn add(&mut self, mut read: impl FnMut() -> Result<(), String> + Send + 'static) {
        let done = Arc::new(AtomicU64::new(0));
        self.done.push(Arc::clone(&done));
        let (stop, wrong) = (Arc::clone(&self.stop), Arc::clone(&self.wrong));
        self.threads.push(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Err(what) = read() {
                    wrong.lock().unwrap().push(what);
                    return;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }

    /// A reader of random ranges of a device.
    fn add_device(&mut self, device: &Path, content: &Arc<Vec<u8>>, seed: u64, past_the_cache: bool) {
        let content = Arc::clone(content);
        let file = if past_the_cache {
            direct(device)
        } else {
            File::open(device).unwrap()
        };
        let mut random = Random(seed);
        let mut buffer = Aligned::new(1 << 20);
        self.add(move || {
            let blocks = u64::try_from(content.len() / BLOCK).unwrap();
            // Mostly short ones; now and then one that the kernel cuts into several.
            let longest = if random.below(8) == 0 { 256 } else { 16 };
            let first = random.below(blocks);
            let count = (random.below(longest) + 1).min(blocks - first);
            let (start, len) = (first * 4096, usize::try_from(count).unwrap() * BLOCK);
            if !past_the_cache {
                forget_cached(&file, start, count * 4096);
            }
            let buffer = buffer.bytes(len);
            buffer.fill(0xA5);
            file.read_exact_at(buffer, start)
                .map_err(|error| format!("{len} bytes at {start}: {error}"))?;
            let at = usize::try_from(start).unwrap();
            if buffer[..] != content[at..at + len] {
                return Err(format!("{len} bytes at {start} are wrong"));
            }
            Ok(())
        });
    }

    /// A reader of the file at `path`, whose content is that of `expected`.
    fn add_file(&mut self, path: PathBuf, expected: Vec<u8>) {
        self.add(move || {
            let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            forget_cached(&file, 0, u64::try_from(expected.len()).unwrap());
            let content = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            if content != expected {
                return Err(format!("{} is wrong", path.display()));
            }
            Ok(())
        });
    }

    fn counts(&self) -> Vec<u64> {
        self.done.iter().map(|done| done.load(Ordering::Relaxed)).collect()
    }

    fn total(&self) -> u64 {
        self.counts().iter().sum()
    }

    fn assert_right(&self) {
        let wrong = self.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    /// Waits until every reader has ended another read that began after this call.
    fn wait_for_all(&self) {
        let before = self.counts();
        wait_until("another read of every reader", || {
            self.assert_right();
            self.counts()
                .iter()
                .zip(&before)
                .all(|(now, before)| *now >= before + 2)
        });
    }

    fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        self.assert_right();
        self.total()
    }
}

fn kills_under_load(lab: &mut Lab) {
    let kills = std::env::var("TARBLK_TEST_KILLS").map_or(30, |kills| kills.parse().unwrap());
    lab.start(Some(3));
    lab.mount();
    let content = Arc::new(read_all(&lab.image()));
    let mut readers = Readers::new();
    for seed in 1..=3 {
        readers.add_device(&lab.device(), &content, seed, true);
    }
    readers.add_device(&lab.device(), &content, 4, false);
    for name in ["big", "odd"] {
        let copy = lab.dir.path().join(name);
        let dump = format!("dump /{name} {}", copy.display());
        let dumped = Command::new("debugfs").args(["-R", &dump]).arg(lab.image()).output();
        assert!(dumped.unwrap().status.success());
        readers.add_file(lab.mnt().join(name), read_all(&copy));
    }
    readers.wait_for_all();
    let seed = u64::from(std::process::id()) << 20 | 1;
    println!("  seed {seed}");
    let mut random = Random(seed);
    let (mut to_resume, mut to_answer) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        thread::sleep(Duration::from_micros(random.below(60_000)));
        let killed = Instant::now();
        lab.kill();
        let before = readers.total();
        lab.resume(Some(random.below(6)), u16::try_from(random.below(4)).unwrap() + 1);
        if kill % 3 == 1 && kill + 1 < kills {
            // The next may be killed before it goes on, or while it does.
            continue;
        }
        to_resume.push(lab.wait_ready());
        wait_until("a read", || readers.total() > before);
        to_answer.push(killed.elapsed());
        if kill % 5 == 4 {
            readers.wait_for_all();
        }
    }
    readers.wait_for_all();
    let reads = readers.finish();
    for (what, mut times) in [("to resume", to_resume), ("from kill to a read's end", to_answer)] {
        times.sort();
        let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
        println!("  {kills} kills under {reads} reads; {what}: median {median:.1?}, at most {most:.1?}");
    }
    lab.unmount();
    lab.tell(STOP);
    lab.held = None;
    lab.wait_for_the_server_to_end();
    lab.assert_gone();
}

fn a_kill_before_the_first_read(lab: &mut Lab) {
    lab.start(Some(1));
    lab.kill();
    lab.resume(Some(1), 2);
    assert!(read_all(&lab.device()) == read_all(&lab.image()));
    // One that is killed before it has done anything, and one that comes while reads wait for it.
    lab.wait_ready();
    lab.kill();
    lab.resume(Some(1), 2);
    lab.kill();
    let (device, image) = (lab.device(), lab.image());
    let reader = thread::spawn(move || {
        forget_cached(&File::open(&device).unwrap(), 0, u64::MAX >> 1);
        read_all(&device) == read_all(&image)
    });
    thread::sleep(Duration::from_millis(50));
    lab.resume(Some(1), 2);
    assert!(reader.join().unwrap());
    lab.wait_ready();
    lab.tell(STOP);
    lab.held = None;
    lab.wait_for_the_server_to_end();
    lab.assert_gone();
}

/// Reads that the kernel has in flight on the device.
fn in_flight(lab: &Lab) -> u64 {
    let inflight = fs::read_to_string(format!("/sys/block/loop{}/inflight", lab.number)).unwrap();
    inflight.split_whitespace().next().unwrap().parse().unwrap()
}

fn kills_with_64_reads_in_flight(lab: &mut Lab) {
    lab.start(None);
    let content = Arc::new(read_all(&lab.image()));
    // Far-away blocks, which never come from the first servers. No two are neighbours, which the kernel could ask for at once.
    let mut blocks = far_away_blocks(&lab.image());
    let mut last = None;
    blocks.retain(|&block| {
        let apart = last.is_none_or(|last| last + 1 < block);
        if apart {
            last = Some(block);
        }
        apart
    });
    assert!(blocks.len() >= 64);
    let read = |block: u64| {
        let content = Arc::clone(&content);
        let file = direct(&lab.device());
        move || {
            let mut buffer = Aligned::new(BLOCK);
            file.read_exact_at(buffer.bytes(BLOCK), block * 4096).unwrap();
            let at = usize::try_from(block).unwrap() * BLOCK;
            assert!(
                buffer.bytes(BLOCK)[..] == content[at..at + BLOCK],
                "block {block} is wrong"
            );
        }
    };
    let readers: Vec<JoinHandle<()>> = blocks[..64].iter().map(|&block| thread::spawn(read(block))).collect();
    let all_in_flight = |lab: &Lab| wait_until("64 reads in flight", || in_flight(lab) == 64);
    all_in_flight(lab);
    for round in 0..4 {
        // The first time they may still be on their way to the server, later ones come from a table or again.
        thread::sleep(Duration::from_millis(20 * round));
        lab.kill();
        lab.resume(None, 3);
        lab.wait_ready();
        assert_eq!(in_flight(lab), 64);
    }
    lab.kill();
    let killed = Instant::now();
    lab.resume(Some(0), 2);
    for reader in readers {
        reader.join().unwrap();
    }
    println!("  from kill to the end of all 64 reads: {:.1?}", killed.elapsed());
    lab.wait_ready();
    lab.tell(STOP);
    lab.held = None;
    lab.wait_for_the_server_to_end();
    lab.assert_gone();
}

fn a_device_that_was_let_go_ends_with_its_mount(lab: &mut Lab) {
    lab.start(Some(1));
    lab.mount();
    lab.tell(LET_GO);
    receive(lab.server.as_ref().unwrap().socket.as_fd()).unwrap();
    lab.held.as_mut().unwrap().device = None;
    lab.kill();
    lab.resume(Some(1), 2);
    lab.wait_ready();
    assert_eq!(fs::read(lab.mnt().join("odd")).unwrap().len(), 123_457);
    assert!(lab.is_there());
    lab.unmount();
    lab.assert_gone();
    // The server finds out by itself, though the connection is still held.
    lab.wait_for_the_server_to_end();

    // The same while no server is there to see it.
    let mut lab = Lab::new(lab.resend);
    lab.start(Some(1));
    lab.mount();
    lab.tell(LET_GO);
    receive(lab.server.as_ref().unwrap().socket.as_fd()).unwrap();
    lab.held.as_mut().unwrap().device = None;
    lab.kill();
    lab.unmount();
    lab.assert_gone();
    let mut late = Server::start(&lab, Some(1), 2);
    assert!(
        receive(late.socket.as_fd()).is_err(),
        "a device that is gone was resumed"
    );
    assert!(!late.child.wait().unwrap().success());
}

fn a_resumed_device_can_be_stopped(lab: &mut Lab) {
    // With its descriptor, and after it was let go of.
    for let_go in [false, true] {
        lab.start(None);
        lab.kill();
        if let_go {
            // Its user is this file.
            let user = File::open(lab.device()).unwrap();
            lab.held.as_mut().unwrap().device = None;
            lab.resume(None, 1);
            lab.wait_ready();
            lab.tell(STOP);
            lab.held = None;
            thread::sleep(Duration::from_millis(20));
            drop(user);
        } else {
            lab.resume(None, 1);
            lab.wait_ready();
            lab.held = None;
            lab.tell(STOP);
        }
        lab.wait_for_the_server_to_end();
        lab.assert_gone();
    }
}

/// What was mixed up would be wrong bytes under a mounted filesystem.
fn another_image_is_refused(lab: &mut Lab) {
    lab.start(Some(1));
    lab.kill();
    let image = fs::read(lab.image()).unwrap();
    let refused = |lab: &Lab| {
        let mut server = Server::start(lab, Some(1), 2);
        assert!(receive(server.socket.as_fd()).is_err(), "another image was served");
        assert!(!server.child.wait().unwrap().success());
    };
    fs::write(lab.image(), &image[..image.len() - BLOCK]).unwrap();
    refused(lab);
    // The filesystem's identity.
    let mut other = image.clone();
    other[1024 + 0x68] ^= 1;
    fs::write(lab.image(), &other).unwrap();
    refused(lab);
    fs::write(lab.image(), &image).unwrap();
    lab.resume(Some(1), 2);
    lab.wait_ready();
    assert!(read_all(&lab.device()) == image);
    lab.tell(STOP);
    lab.held = None;
    lab.wait_for_the_server_to_end();
    lab.assert_gone();
}

fn nothing_is_left_without_holders(lab: &mut Lab) {
    lab.start(None);
    let device = lab.device();
    let reader = thread::spawn(move || {
        let mut buffer = Aligned::new(16 * BLOCK);
        let file = direct(&device);
        (0..256).try_for_each(|part| file.read_exact_at(buffer.bytes(16 * BLOCK), part * 65536))
    });
    wait_until("a read", || in_flight(lab) > 0);
    lab.kill();
    thread::sleep(Duration::from_millis(20));
    assert!(lab.is_there() && !reader.is_finished());
    lab.held = None;
    assert!(reader.join().unwrap().is_err(), "a read of nothing went well");
    lab.assert_gone();
}
