//! A directory for one test of whole commands, with a small layer, a cache and a directory of states in it.

#![allow(dead_code, reason = "every test program uses its own part of this")]

#[path = "../common/servers.rs"]
#[allow(
    clippy::duplicate_mod,
    reason = "few programs that have a lab have all that is common, too"
)]
mod servers;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

/// A place for one test, with a small layer in it.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let mut tar = tar::Builder::new(File::create(lab.path("layer.tar")).unwrap());
        let mut add = |name: &str, kind: tar::EntryType, mode: u32, content: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_mtime(1_700_000_000);
            header.set_size(u64::try_from(content.len()).unwrap());
            tar.append_data(&mut header, name, content).unwrap();
        };
        for dir in ["dev/", "proc/", "etc/"] {
            add(dir, tar::EntryType::Directory, 0o755, b"");
        }
        add("etc/hello", tar::EntryType::Regular, 0o644, b"hello, world\n");
        add("etc/big", tar::EntryType::Regular, 0o600, &pattern(3_000_001));
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        tar.append_link(&mut link, "etc/link", "hello").unwrap();
        tar.into_inner().unwrap();
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `tarblk` with its cache and states in here.
    pub(crate) fn tarblk(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tarblk"));
        command
            .current_dir(self.dir.path())
            .env("TARBLK_CACHE", self.path("cache"))
            .env("TARBLK_STATE_DIR", self.path("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.tarblk().args(args).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    pub(crate) fn good(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The one line of a command that must fail with `code`, without those that tell what it waits for meanwhile.
    pub(crate) fn bad(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        let all = text(&output.stderr);
        let said: String = all
            .split_inclusive('\n')
            .filter(|line| !line.contains("; waiting"))
            .collect();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        if code == 1 {
            assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
            assert!(said.starts_with("tarblk: "), "{said}");
            assert!(output.stdout.is_empty(), "{args:?} printed {}", text(&output.stdout));
        }
        said
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.good(args)).unwrap()
    }

    /// Runs a shell script with a mount namespace of its own, in this directory; `$TARBLK` is the command.
    pub(crate) fn apart(&self, script: &str) -> Output {
        let tarblk = self.tarblk();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-ec", script])
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command.env("TARBLK", tarblk.get_program());
        for (name, value) in tarblk.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.output().unwrap()
    }

    /// Waits until nothing serves here any more and the directory of states is empty.
    pub(crate) fn assert_nothing_served(&self) {
        let began = std::time::Instant::now();
        loop {
            let files: Vec<_> = fs::read_dir(self.path("states"))
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            if files.is_empty() && self.servers().is_empty() {
                return;
            }
            let limit = std::time::Duration::from_secs(20);
            assert!(began.elapsed() < limit, "left: {files:?}, {:?}", self.servers());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// The processes that serve devices of this directory of states, the service and its keepers.
    pub(crate) fn servers(&self) -> Vec<i32> {
        servers::below(&self.path("states"))
    }

    /// Kills the service and its keepers, so that nothing is left to start another.
    pub(crate) fn kill_all(&self) {
        servers::kill_below(&self.path("states"));
    }

    /// What is in here, by name.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Lab {
    /// A test that failed leaves no device either.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.run(&["detach", "--all", "--force"]);
            self.kill_all();
        }
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from(((i * 31) ^ (i >> 9)) & 0xff).unwrap())
        .collect()
}

/// Says aloud that a test could not run here; where skipping is forbidden, the test fails.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIP: {test}: {why}");
    assert!(std::env::var_os("TARBLK_TEST_STRICT").is_none(), "{line}");
    eprintln!("{line}");
    if let Some(log) = std::env::var_os("TARBLK_SKIP_LOG") {
        let mut log = File::options().append(true).create(true).open(log).unwrap();
        writeln!(log, "{line}").unwrap();
    }
}

/// Whether a program can be found.
pub(crate) fn have(program: &str) -> bool {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&directories).any(|dir| dir.join(program).is_file())
}

/// Whether this process is root's; skips if not.
pub(crate) fn root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "needs root");
    }
    root
}

/// Whether this process can make block devices; skips if not. While the guard lives no other test of this program makes any,
/// so that what one finds in use is its own.
pub(crate) fn devices(test: &str) -> Option<MutexGuard<'static, ()>> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let root = rustix::process::geteuid().is_root();
    let there = Path::new("/dev/ublk-control").exists()
        || (Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists());
    if !root || !there {
        skip(test, "needs root, and ublk or FUSE and loop devices");
    }
    (root && there).then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner))
}

pub(crate) fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let inside = |line: &&str| {
        line.split(' ')
            .nth(1)
            .is_some_and(|at| at.starts_with(&*dir.to_string_lossy()))
    };
    mounts.lines().filter(inside).map(str::to_owned).collect()
}
