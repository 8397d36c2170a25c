//! What a service manager stores for `tarblk service`: with it a loop device outlives the death of every process of tarblk at once.
//!
//! There is no systemd here: `tests/service_manager.py` does what systemd does with descriptors.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::TARBLK;
use common::noise::noise;
use common::rawtar::RawTar;
use common::servers;
use common::session::{Session, leftovers};
use common::wait::wait_until;

/// The stand-in, which runs `tarblk service`.
struct Manager {
    process: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Manager {
    fn start(session: &Session) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/service_manager.py");
        let mut process = Command::new("python3")
            .arg(script)
            .arg(session.dir().join("notify"))
            .args([TARBLK, "service"])
            .env("TARBLK_CACHE", session.dir().join("cache"))
            .env("TARBLK_STATE_DIR", session.dir().join("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, lines) = (Arc::default(), BufReader::new(process.stdout.take().unwrap()).lines());
        let manager = Self {
            process,
            said: Arc::clone(&said),
        };
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                said.lock().unwrap().push(line);
            }
        });
        manager
    }

    fn has_said(&self, line: &str) -> usize {
        let said = self.said.lock().unwrap();
        said.iter().filter(|said| said.starts_with(line)).count()
    }

    /// The process of `tarblk service`.
    fn command(&self) -> u32 {
        let said = self.said.lock().unwrap();
        let last = said.iter().rev().find_map(|line| line.strip_prefix("started "));
        last.unwrap().split(' ').next().unwrap().parse().unwrap()
    }

    fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Reads a device past the page cache, again and again, and compares it with what it held at first.
struct Reader {
    is_over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<Result<(), String>>>,
}

impl Reader {
    fn start(device: PathBuf) -> Self {
        const STEP: usize = 64 << 10;
        let (is_over, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (over, counted) = (Arc::clone(&is_over), Arc::clone(&rounds));
        let read = move || -> Result<(), String> {
            let right = fs::read(&device).map_err(|error| error.to_string())?;
            let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&device);
            let direct: File = direct.map_err(|error| error.to_string())?;
            // Direct reads want their memory at multiples of a block.
            let mut memory = vec![0; STEP + 4096];
            let begin = memory.as_ptr().align_offset(4096);
            let target = &mut memory[begin..begin + STEP];
            while !over.load(Ordering::Relaxed) {
                for at in (0..right.len() - STEP).step_by(STEP) {
                    let read = direct.read_exact_at(target, u64::try_from(at).unwrap());
                    read.map_err(|error| format!("at {at}: {error}"))?;
                    if target[..] != right[at..at + STEP] {
                        return Err(format!("wrong bytes at {at}"));
                    }
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        Self {
            is_over,
            rounds,
            thread: Some(thread::spawn(read)),
        }
    }

    /// Waits until all was read at least once from now on.
    fn goes_on(&mut self) {
        let before = self.rounds.load(Ordering::Relaxed);
        let failed = || self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished);
        wait_until("reading", || {
            self.rounds.load(Ordering::Relaxed) >= before + 2 || failed()
        });
        if failed() {
            let outcome = self.thread.take().map(thread::JoinHandle::join);
            panic!("reading has failed: {outcome:?}");
        }
    }

    fn end(mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

#[test]
fn a_loop_device_outlives_all_processes_at_once() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("a_loop_device_outlives_all_processes_at_once", why);
    }
    if !common::have("python3") {
        return common::skip("a_loop_device_outlives_all_processes_at_once", "there is no python3");
    }
    let session = Session::new("loop");
    let states = session.dir().join("states");
    let layer = session.dir().join("layer.tar");
    fs::write(&layer, RawTar::new().file(b"noise", &noise(3_000_000, 7)).end().0).unwrap();
    let manager = Manager::start(&session);
    wait_until("the service", || manager.has_said("ready") > 0);
    let attach = ["attach", layer.to_str().unwrap(), "--backend", "loop"];
    let device = PathBuf::from(session.succeed(&attach).trim());
    let name = device.file_name().unwrap().to_str().unwrap().to_owned();
    let channels = || manager.has_said(&format!("stored {name}.channel"));
    wait_until("the device in the store", || channels() > 0);
    // Its file is needed no more.
    fs::remove_file(&layer).unwrap();
    let mut reader = Reader::start(device.clone());
    reader.goes_on();
    // As the service has counted them, once it serves the device.
    let reads = || -> Option<u64> {
        let asked = session.run(&["stats", "--json", device.to_str().unwrap()]);
        let counted: serde_json::Value = serde_json::from_slice(&asked.stdout).ok()?;
        counted["counters"]["device"]["reads"].as_u64()
    };
    for with_command in [false, true, true, false] {
        let before = manager.command();
        let mut all = Vec::new();
        wait_until("that service and keepers serve the device", || {
            all = servers::below(&states);
            all.len() >= 3 && reads().is_some()
        });
        if with_command {
            // Before it can start a service in place of the one that dies.
            all.insert(0, i32::try_from(before).unwrap());
        }
        servers::kill(&all);
        reader.goes_on();
        let is_right = || (manager.command() == before) != with_command;
        wait_until("the command, a new one if it was killed", is_right);
    }
    wait_until("a hundred reads", || reads() > Some(100));
    let listed = session.succeed(&["ps", "--json"]);
    assert!(listed.contains("\"serving\""), "{listed}");
    reader.end();
    // What was counted is counted on.
    let before = reads().unwrap();
    let counts = states.join(format!("{name}.counts"));
    let kept = || fs::read_to_string(&counts).unwrap_or_default();
    wait_until("the counters on disk", || {
        kept().contains(&format!("\\\"reads\\\":{before},"))
    });
    servers::kill(&servers::below(&states));
    wait_until("that it is served again", || reads() >= Some(before));
    // What holds it up was stored once, and stayed: there was no moment at which it could have been lost.
    assert_eq!((channels(), manager.has_said(&format!("removed {name}"))), (1, 0));
    session.succeed(&["detach", device.to_str().unwrap()]);
    // Nothing of it is left with the manager when it is detached.
    assert!(manager.has_said(&format!("removed {name}.device")) > 0);
    assert!(!PathBuf::from(format!("/sys/block/{name}/loop/backing_file")).exists());
    manager.end();
    assert_eq!(leftovers(session.dir()), Vec::<String>::new());
}
