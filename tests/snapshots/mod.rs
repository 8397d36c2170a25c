//! A running `tarblk snapshotter` with everything it makes below one directory, a client that calls it as containerd does, and
//! mounts made as containerd makes them.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

pub(crate) mod client;
pub(crate) mod containerd;
pub(crate) mod docker;
pub(crate) mod pod;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use tarblk::internals::snapshotter::messages::{
    CommitRequest, Empty, Info, InfoResponse, KeyRequest, Labels, ListRequest, ListResponse, Mount, MountsResponse,
    PrepareRequest, SERVICE, UpdateRequest, UsageResponse,
};

use crate::common::session::{is_mounted, leftovers};
use crate::common::{TARBLK, no_overlays, scratch, skip};
use client::{Answer, Client, Failed};

/// How long the snapshotter may take to be there.
const READY: Duration = Duration::from_secs(20);

/// A snapshotter and its directory. Whatever it leaves is unmounted and ended when this is dropped.
pub(crate) struct Lab {
    scratch: tempfile::TempDir,
    child: Option<Child>,
    client: Client,
    mounted: Vec<PathBuf>,
    /// The command under test, or a copy of it.
    pub(crate) program: PathBuf,
    /// The socket, when it is held for the snapshotter as systemd holds one.
    held: Option<UnixListener>,
}

impl Lab {
    /// A new one, with these lines more in its set-up, in which `{dir}` is its directory; `None`, having said so, where that cannot be.
    pub(crate) fn new(test: &str, config: &str) -> Option<Self> {
        if let Some(why) = no_overlays() {
            skip(test, why);
            return None;
        }
        let scratch = scratch("snap-");
        let dir = scratch.path();
        let set_up = format!(
            "root = \"{dir}/r\"
address = \"{dir}/s.sock\"
containerd = \"{dir}/c.sock\"
cache = \"{dir}/cache\"
hosts-dir = \"{dir}/hosts\"
{config}",
            dir = dir.display(),
            config = config.replace("{dir}", &dir.display().to_string()),
        );
        fs::write(dir.join("snapshotter.toml"), set_up).unwrap();
        let mut lab = Self {
            client: Client::new(&dir.join("s.sock")),
            scratch,
            child: None,
            mounted: Vec::new(),
            program: TARBLK.into(),
            held: None,
        };
        lab.start();
        Some(lab)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.dir().join("s.sock")
    }

    /// Runs `tarblk` as the snapshotter runs: with the same service.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("TARBLK_CACHE", self.dir().join("cache"))
            .env("TARBLK_STATE_DIR", self.dir().join("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .env("TARBLK_CONFIG_DIR", self.dir().join("etc"))
            .env("RUST_LOG", "tarblk=debug")
            .env_remove("REGISTRY_AUTH_FILE")
            .env("HOME", self.dir());
        command
    }

    /// Starts it; containerd can call when this returns.
    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let config = self.dir().join("snapshotter.toml");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir().join("log"))
            .unwrap();
        let mut command = self.command(&["snapshotter", "--config", config.to_str().unwrap()]);
        if let Some(held) = &self.held {
            // As the third descriptor, of a process that has the number which is said.
            const HAND_OVER: &str = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" \"$@\"";
            let mut shell = Command::new("sh");
            shell
                .args(["-c", HAND_OVER])
                .arg(command.get_program())
                .args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => shell.env(name, value),
                    None => shell.env_remove(name),
                };
            }
            shell.stdin(OwnedFd::from(held.try_clone().unwrap()));
            command = shell;
        } else {
            command.stdin(Stdio::null());
        }
        let child = command
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + READY;
        while std::os::unix::net::UnixStream::connect(self.address()).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "the snapshotter does not start ({ended:?}):\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        // The socket is there before calls are answered.
        self.list(&[]).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// From the next start on its socket is held for it, as systemd holds one. It has to be stopped.
    pub(crate) fn hold_socket(&mut self) {
        self.held = Some(UnixListener::bind(self.address()).unwrap());
    }

    /// Kills it as the kernel would: it is told nothing.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Asks it to end, and waits.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success(), "{}", self.log());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    // ---------------------------------------------------------------------------------------------------- calls

    fn call<A: prost::Message + Default>(&self, method: &str, request: &impl prost::Message) -> Answer<Vec<A>> {
        self.client.call(&format!("{SERVICE}{method}"), request)
    }

    fn one<A: prost::Message + Default>(&self, method: &str, request: &impl prost::Message) -> Answer<A> {
        let mut answers: Vec<A> = self.call(method, request)?;
        assert_eq!(answers.len(), 1, "{method}");
        Ok(answers.remove(0))
    }

    pub(crate) fn prepare_with(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Answer<Vec<Mount>> {
        let request = prepare_request(key, parent, labels);
        self.one::<MountsResponse>("Prepare", &request)
            .map(|answer| answer.mounts)
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.prepare_with(key, parent, &[])
    }

    pub(crate) fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        let request = prepare_request(key, parent, &[]);
        self.one::<MountsResponse>("View", &request).map(|answer| answer.mounts)
    }

    pub(crate) fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        self.one::<MountsResponse>("Mounts", &by_key(key))
            .map(|answer| answer.mounts)
    }

    pub(crate) fn commit_with(&self, name: &str, key: &str, labels: &[(&str, &str)]) -> Answer<()> {
        let request = CommitRequest {
            snapshotter: "tarblk".to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: labels_of(labels),
            parent: String::new(),
        };
        self.one::<Empty>("Commit", &request).map(drop)
    }

    pub(crate) fn commit(&self, name: &str, key: &str) -> Answer<()> {
        self.commit_with(name, key, &[])
    }

    pub(crate) fn remove(&self, key: &str) -> Answer<()> {
        self.one::<Empty>("Remove", &by_key(key)).map(drop)
    }

    pub(crate) fn stat(&self, key: &str) -> Answer<Info> {
        self.one::<InfoResponse>("Stat", &by_key(key))
            .map(|answer| answer.info.unwrap())
    }

    pub(crate) fn update(&self, request: &UpdateRequest) -> Answer<Info> {
        self.one::<InfoResponse>("Update", request)
            .map(|answer| answer.info.unwrap())
    }

    pub(crate) fn usage(&self, key: &str) -> Answer<UsageResponse> {
        self.one("Usage", &by_key(key))
    }

    pub(crate) fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        let request = ListRequest {
            snapshotter: "tarblk".to_owned(),
            filters: filters.iter().map(|text| (*text).to_owned()).collect(),
        };
        let parts: Vec<ListResponse> = self.call("List", &request)?;
        Ok(parts.into_iter().flat_map(|part| part.info).collect())
    }

    /// The names of all snapshots, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.list(&[]).unwrap().into_iter().map(|info| info.name).collect();
        names.sort();
        names
    }

    pub(crate) fn cleanup(&self) -> Answer<()> {
        self.one::<Empty>("Cleanup", &by_key("")).map(drop)
    }

    /// What `curl --unix-socket` gets.
    pub(crate) fn get(&self, path: &str) -> String {
        use std::io::{Read as _, Write as _};
        let mut stream = std::os::unix::net::UnixStream::connect(self.address()).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub(crate) fn call_unknown(&self, path: &str) -> Failed {
        self.client.call::<Empty>(path, &Empty {}).unwrap_err()
    }

    // --------------------------------------------------------------------------------------------------- mounts

    /// Makes mounts as containerd does; where they are then.
    pub(crate) fn mount(&mut self, mounts: &[Mount]) -> PathBuf {
        let at = self.dir().join(format!("m{}", self.mounted.len()));
        fs::create_dir_all(&at).unwrap();
        for mount in mounts {
            mount_one(mount, &at);
        }
        self.mounted.push(at.clone());
        at
    }

    /// Undoes [`Lab::mount`].
    pub(crate) fn umount(&mut self, at: &Path) {
        // A process that another test starts has this one's files until it executes its program.
        let is_free = || rustix::mount::unmount(at, UnmountFlags::empty()) != Err(rustix::io::Errno::BUSY);
        for _ in 0..500 {
            if is_free() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!is_mounted(at), "{} is still mounted", at.display());
        let made = self.mounted.iter().filter(|made| *made == at).count();
        assert_eq!(made, 1, "{} is not of this lab", at.display());
    }

    /// Makes a snapshot of one change above another, as an unpacked layer is made.
    pub(crate) fn layer(&mut self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("{name}-key");
        let mounts = self.prepare(&key, parent).unwrap();
        let at = self.mount(&mounts);
        change(&at);
        self.umount(&at);
        self.commit(name, &key).unwrap();
    }

    /// Shows a snapshot's files to `look`, by a view.
    pub(crate) fn look<T>(&mut self, name: &str, look: impl FnOnce(&Path) -> T) -> T {
        let key = format!("{name}-view-{}", self.mounted.len());
        let mounts = self.view(&key, name).unwrap();
        let at = self.mount(&mounts);
        let seen = look(&at);
        self.umount(&at);
        self.remove(&key).unwrap();
        seen
    }

    /// The directories that the snapshotter has mounted devices on.
    pub(crate) fn chains(&self) -> Vec<PathBuf> {
        let snapshots = fs::canonicalize(self.dir()).unwrap().join("r/snapshots");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        points
            .map(PathBuf::from)
            .filter(|point| point.starts_with(&snapshots))
            .collect()
    }

    /// Whether nothing is left of all snapshots but the snapshotter itself.
    pub(crate) fn assert_empty(&self) {
        assert_eq!(self.names(), [""; 0]);
        self.cleanup().unwrap();
        assert_eq!(self.chains(), [""; 0].map(PathBuf::from));
        for part in ["records", "snapshots"] {
            let left: Vec<_> = fs::read_dir(self.dir().join("r").join(part))
                .unwrap()
                .flatten()
                .collect();
            assert!(left.is_empty(), "{part}: {left:?}\n{}", self.log());
        }
    }

    /// Ends it and makes sure that this machine is as before.
    pub(crate) fn assert_gone(mut self) {
        self.assert_empty();
        self.stop();
        let left = leftovers(self.dir());
        assert!(left.is_empty(), "{left:#?}\n{}", self.log());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        for at in self.mounted.iter().rev() {
            while rustix::mount::unmount(at, UnmountFlags::DETACH).is_ok() {}
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for point in self.chains() {
            let unmounted = self.command(&["umount", point.to_str().unwrap()]).output();
            if !unmounted.is_ok_and(|output| output.status.success()) {
                let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH);
            }
        }
    }
}

fn by_key(key: &str) -> KeyRequest {
    KeyRequest {
        snapshotter: "tarblk".to_owned(),
        key: key.to_owned(),
    }
}

pub(crate) fn labels_of(labels: &[(&str, &str)]) -> Labels {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn prepare_request(key: &str, parent: &str, labels: &[(&str, &str)]) -> PrepareRequest {
    PrepareRequest {
        snapshotter: "tarblk".to_owned(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: labels_of(labels),
    }
}

fn mount_one(mount: &Mount, at: &Path) {
    match mount.r#type.as_str() {
        "bind" => {
            rustix::mount::mount_bind_recursive(&mount.source, at).unwrap();
            rustix::mount::mount_change(at, MountPropagationFlags::PRIVATE).unwrap();
            if mount.options.iter().any(|option| option == "ro") {
                rustix::mount::mount_remount(at, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
            }
        }
        "overlay" => {
            // containerd makes options that are too long for the kernel short by going where the directories are.
            let options = mount.options.join(",");
            let common = options
                .split_once("lowerdir=")
                .and_then(|(_, lower)| Some(lower.split_once("/snapshots/")?.0.to_owned() + "/snapshots/"));
            let (dir, options) = match common {
                Some(common) if options.len() > 4000 => {
                    let (head, lower) = options.split_once("lowerdir=").unwrap();
                    (common.clone(), format!("{head}lowerdir={}", lower.replace(&common, "")))
                }
                _ => ("/".to_owned(), options),
            };
            crate::common::succeed(
                Command::new("mount")
                    .current_dir(dir)
                    .args(["-t", "overlay", &mount.source, "-o", &options])
                    .arg(at),
            );
        }
        other => panic!("containerd 1.6 cannot mount {other}"),
    }
}
