//! Docker on a containerd of a lab's, with everything it makes below the lab's directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::Lab;
use super::containerd::Containerd;
use crate::common::have;

/// How long Docker may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Docker from 24 on leaves images to containerd, if it is told to.
const OLDEST: u32 = 24;

/// The namespace in which Docker has its images.
pub(crate) const NAMESPACE: &str = "moby";

/// Why there is no Docker here that can use a plug-in of containerd's.
pub(crate) fn obstacle() -> Option<String> {
    if !have("dockerd") || !have("docker") {
        return Some("no Docker".to_owned());
    }
    let output = Command::new("dockerd").arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let version = said
        .split_whitespace()
        .nth(2)
        .and_then(|version| version.split('.').next()?.parse().ok());
    let old = version.is_none_or(|version: u32| version < OLDEST);
    old.then(|| {
        format!(
            "{} keeps images itself, from Docker {OLDEST} on containerd can",
            said.trim()
        )
    })
}

pub(crate) struct Docker {
    child: Child,
    host: String,
    home: PathBuf,
}

impl Docker {
    pub(crate) fn start(lab: &Lab, containerd: &Containerd) -> Self {
        let dir = lab.dir().join("docker");
        fs::create_dir_all(&dir).unwrap();
        let host = format!("unix://{}", dir.join("d.sock").display());
        let log = fs::File::create(dir.join("log")).unwrap();
        fs::write(
            dir.join("daemon.json"),
            r#"{"features": {"containerd-snapshotter": true}}"#,
        )
        .unwrap();
        let at = |name: &str| dir.join(name);
        let child = Command::new("dockerd")
            .args([
                "--bridge",
                "none",
                "--iptables=false",
                "--ip6tables=false",
                "--storage-driver",
                "tarblk",
            ])
            .arg("--config-file")
            .arg(at("daemon.json"))
            .arg("--containerd")
            .arg(&containerd.address)
            .arg("--data-root")
            .arg(at("root"))
            .arg("--exec-root")
            .arg(at("exec"))
            .arg("--pidfile")
            .arg(at("pid"))
            .args(["--host", &host])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let docker = Self { child, host, home: dir };
        let deadline = Instant::now() + PATIENCE;
        while !docker.command(&["info"]).status.success() {
            assert!(Instant::now() < deadline, "Docker does not start: {}", docker.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        docker
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.home.join("log")).unwrap_or_default()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        Command::new("docker")
            .args(["--host", &self.host])
            .args(arguments)
            .env("HOME", &self.home)
            .output()
            .unwrap()
    }

    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {arguments:?}: {said}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// The blobs in what `docker save` writes, by their digests' hexadecimal digits.
    pub(crate) fn saved(&self, image: &str, to: &Path) -> Vec<String> {
        self.succeed(&["save", "--output", to.to_str().unwrap(), image]);
        let mut archive = tar::Archive::new(fs::File::open(to).unwrap());
        let paths = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string());
        paths
            .filter_map(|path| Some(path.strip_prefix("blobs/sha256/")?.to_owned()))
            .filter(|hex| !hex.is_empty())
            .collect()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}
