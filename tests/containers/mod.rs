//! Small images with a shell, and what runs them: `tarblk`, podman and runc with all that they make below one directory of root's, of
//! which nothing is left at the end.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::packed::gzip;
use crate::common::rawtar::{Header, RawTar};
use crate::common::servers;
use crate::common::session::leftovers;
use crate::common::{TARBLK, have, no_overlays, sha256, skip, succeed};

/// The directory of a test. Below `/tmp`: what tarblk writes to as root has to be root's all the way, which a checkout may not be.
pub(crate) struct Workshop {
    dir: tempfile::TempDir,
    /// More of the environment.
    pub(crate) env: Vec<(&'static str, String)>,
}

impl Workshop {
    /// A new one, if each of `programs` is here and devices can be mounted; `None`, having said so, if not.
    pub(crate) fn new(test: &str, programs: &[&str]) -> Option<Self> {
        if let Some(why) = no_overlays() {
            skip(test, why);
            return None;
        }
        for program in programs.iter().chain(&["busybox"]) {
            if !have(program) {
                skip(test, &format!("no {program}: run tools/setup --tests"));
                return None;
            }
        }
        let dir = tempfile::Builder::new().prefix("workshop-").tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"{dir}/podman/run\"\ngraphroot = \"{dir}/podman/root\"\n\
             [storage.options]\nadditionalimagestores = [\"{dir}/store\"]\n",
            dir = dir.path().display()
        );
        fs::write(dir.path().join("storage.conf"), storage).unwrap();
        Some(Self { dir, env: Vec::new() })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A path as text.
    pub(crate) fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn environment(&self, command: &mut Command) {
        command
            .env("TARBLK_CACHE", self.path("cache"))
            .env("TARBLK_STATE_DIR", self.path("states"))
            .env("TARBLK_CONFIG_DIR", self.path("etc"))
            .env("TARBLK_RUN_DIR", self.path("run"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .env("CONTAINERS_STORAGE_CONF", self.path("storage.conf"))
            .env("HOME", self.dir())
            .env_remove("REGISTRY_AUTH_FILE")
            .env_remove("RUST_LOG")
            .envs(self.env.iter().cloned())
            .current_dir(self.dir())
            .stdin(Stdio::null());
    }

    pub(crate) fn tarblk(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(TARBLK);
        self.environment(&mut command);
        command.args(arguments);
        command
    }

    /// Standard output of a command that has to succeed.
    pub(crate) fn good(&self, arguments: &[&str]) -> String {
        String::from_utf8(succeed(&mut self.tarblk(arguments))).unwrap()
    }

    /// The one line of a command that has to fail with `status`.
    pub(crate) fn bad(&self, arguments: &[&str], status: i32) -> String {
        one_line(&self.tarblk(arguments).output().unwrap(), status)
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.good(arguments)).unwrap()
    }

    /// A shell script in a mount namespace of its own; `$TARBLK` is the command, `$D` the directory.
    pub(crate) fn apart(&self, script: &str) -> Output {
        let mut command = Command::new("unshare");
        self.environment(&mut command);
        command
            .args(["--mount", "sh", "-ec", script])
            .env("TARBLK", TARBLK)
            .env("D", self.dir());
        command.output().unwrap()
    }

    /// `podman COMMAND ARGUMENTS` with a store, containers and settings of its own.
    pub(crate) fn podman(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        self.environment(&mut command);
        command.args([
            "--runtime",
            "runc",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "none",
        ]);
        let (first, rest) = arguments.split_first().unwrap();
        command.arg(first);
        if matches!(*first, "run" | "create") {
            // Limits are not raised, which takes a capability that not every root has.
            command.args([
                "--network",
                "none",
                "--ulimit",
                "nofile=1024:1024",
                "--ulimit",
                "nproc=1024:1024",
            ]);
        }
        command.args(rest);
        command
    }

    /// What podman prints that has to succeed.
    pub(crate) fn podman_good(&self, arguments: &[&str]) -> String {
        String::from_utf8(succeed(&mut self.podman(arguments))).unwrap()
    }

    /// Writes an image of two gzip layers with busybox into the layout `app`, whose configuration says `config`; how tarblk names it.
    pub(crate) fn image(&self, tag: &str, config: &Value) -> String {
        write_image(&self.path("app"), tag, config);
        format!("oci:{}:{tag}", self.at("app"))
    }

    /// What serves devices of this directory, whatever its states are called.
    pub(crate) fn servers(&self) -> Vec<i32> {
        servers::below(self.dir())
    }

    /// Kills the service and its keepers, as an end of the machine does.
    pub(crate) fn kill_servers(&self) {
        servers::kill_below(self.dir());
    }

    /// Everything is as after a start of the machine: nothing runs, nothing is mounted, and what was in /run is gone.
    pub(crate) fn restart_machine(&self) {
        self.kill_servers();
        for point in self.mounts() {
            let _ = Command::new("umount").arg("-l").arg(point).output();
        }
        assert_eq!(self.mounts(), [""; 0]);
        fs::remove_dir_all(self.path("states")).unwrap();
    }

    /// What is mounted below the directory, the last first.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let mut inside: Vec<_> = points
            .filter(|point| Path::new(point).starts_with(self.dir()))
            .map(str::to_owned)
            .collect();
        inside.reverse();
        inside
    }

    /// No process, mount, device or state is left; what podman keeps mounted for itself is.
    pub(crate) fn assert_gone(&self) {
        let own = self.at("podman/root/overlay");
        let left: Vec<_> = leftovers(self.dir())
            .into_iter()
            .filter(|line| !line.contains(&format!(" {own} ")))
            .collect();
        assert!(left.is_empty(), "{left:#?}");
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if self.path("podman").exists() {
            let _ = self.podman(&["rm", "--all", "--force", "--time", "0"]).output();
        }
        let _ = self
            .tarblk(&["podman", "--store", &self.at("store"), "rm", "--all", "--force"])
            .output();
        for point in self.mounts() {
            let _ = Command::new("umount").arg("-l").arg(point).output();
        }
        let _ = self.tarblk(&["detach", "--all", "--force"]).output();
        self.kill_servers();
    }
}

/// A failure as a person should see it: its one line, and nothing on standard output.
pub(crate) fn one_line(output: &Output, status: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.starts_with("tarblk: ") && said.lines().count() == 1, "{said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    said
}

/// The programs of busybox that images have.
const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "env", "grep", "hostname", "id", "kill", "ls", "mkdir", "mount", "ping", "pwd", "rm", "sleep",
    "stat", "stty", "touch", "true", "tty", "wc",
];

/// Writes the image, beside what is in the layout already.
fn write_image(layout: &Path, tag: &str, config: &Value) {
    let busybox = succeed(Command::new("sh").args(["-c", "cat \"$(command -v busybox)\""]));
    let size = u64::try_from(busybox.len()).unwrap();
    let program = Header::new(b'0', b"bin/busybox").mode(0o755).size(size);
    let mut base = RawTar::new().dir(b"bin/").entry(program, &busybox);
    for applet in APPLETS {
        base = base.link(b'2', format!("bin/{applet}").as_bytes(), b"busybox");
    }
    let base = base
        .file(
            b"etc/passwd",
            b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:,,,:/srv:/bin/sh\n",
        )
        .file(
            b"etc/group",
            b"root:x:0:\nstaff:x:1001:\naudio:x:29:web,other\nlogs:x:40:web\n",
        )
        .file(b"gone", b"by the layer above")
        .dir(b"dir/")
        .file(b"dir/below", b"hidden")
        .end()
        .0;
    let above = RawTar::new()
        .file(b".wh.gone", b"")
        .dir(b"dir/")
        .file(b"dir/.wh..wh..opq", b"")
        .file(b"dir/above", tag.as_bytes())
        .file(b"bin/not-executable", b"#!")
        .end()
        .0;
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let blob = |bytes: &[u8], kind: &str| {
        let digest = sha256(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len()})
    };
    let tars = [base, above];
    let layers: Vec<_> = tars.iter().map(|tar| blob(&gzip(tar), "layer.v1.tar+gzip")).collect();
    let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2024-02-03T04:05:06Z", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": "first"}, {"created_by": "second"}],
    });
    let config = blob(config.to_string().as_bytes(), "config.v1+json");
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers});
    let mut listed = blob(manifest.to_string().as_bytes(), "manifest.v1+json");
    listed["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
    let path = layout.join("index.json");
    let mut index: Value = match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
        Err(_) => json!({"schemaVersion": 2, "manifests": []}),
    };
    let manifests = index["manifests"].as_array_mut().unwrap();
    manifests.retain(|other| other["annotations"] != listed["annotations"]);
    manifests.push(listed);
    fs::write(path, index.to_string()).unwrap();
}
