//! Debian's containerd with everything it makes below a lab's directory, and the calls of it that tests and benchmarks make: pulls
//! through the CRI as a kubelet makes them, all else by `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::Lab;
use super::client::{Answer, Client};

/// How long containerd may take to start, and its collector to remove what nothing needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name of an image, in the CRI's messages.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

/// `runtime.v1.AuthConfig`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Auth {
    #[prost(string, tag = "1")]
    pub(crate) username: String,
    #[prost(string, tag = "2")]
    pub(crate) password: String,
}

/// `runtime.v1.PullImageRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    pub(crate) auth: Option<Auth>,
    /// No version of the API has it: who passes calls on does not know it.
    #[prost(string, tag = "9999")]
    pub(crate) unknown: String,
}

/// `runtime.v1.PullImageResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Whether containerd is of version 2 or later.
pub(crate) fn is_containerd_2() -> bool {
    let output = Command::new("containerd").arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let version = said.split_whitespace().nth(2).unwrap_or_default();
    !version.trim_start_matches('v').starts_with("1.")
}

/// containerd's configuration, in the form that its version reads.
fn configuration(lab: &Lab, registry: &str, snapshotter: &str) -> String {
    let (dir, address) = (lab.dir().display(), lab.address());
    let address = address.display();
    let common = format!(
        r#"
        root = "{dir}/c/root"
        state = "{dir}/c/state"
        disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
            "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
        [grpc]
        address = "{dir}/c.sock"
        [ttrpc]
        address = "{dir}/t.sock"
        [plugins."io.containerd.internal.v1.opt"]
        path = "{dir}/c/opt"
        [proxy_plugins.tarblk]
        type = "snapshot"
        address = "{address}"
        "#
    );
    let own = if is_containerd_2() {
        let unpack = ["tarblk", "overlayfs"].map(|snapshotter| {
            format!(
                r#"
                [[plugins."io.containerd.transfer.v1.local".unpack_config]]
                platform = "linux/{}"
                snapshotter = "{snapshotter}"
                differ = "walking"
                "#,
                architecture()
            )
        });
        format!(
            r#"
            [proxy_plugins.tarblk.exports]
            root = "{dir}/r"
            enable_remote_snapshot_annotations = "true"
            {}
            [plugins."io.containerd.cri.v1.images"]
            snapshotter = "{snapshotter}"
            [plugins."io.containerd.cri.v1.images".pinned_images]
            sandbox = "{registry}/pause:pause"
            [plugins."io.containerd.cri.v1.images".registry]
            config_path = "{dir}/hosts"
            [plugins."io.containerd.cri.v1.runtime"]
            restrict_oom_score_adj = true
            disable_apparmor = true
            "#,
            unpack.concat(),
        )
    } else {
        format!(
            r#"
            [plugins."io.containerd.grpc.v1.cri"]
            restrict_oom_score_adj = true
            disable_apparmor = true
            sandbox_image = "{registry}/pause:pause"
            [plugins."io.containerd.grpc.v1.cri".registry]
            config_path = "{dir}/hosts"
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "{snapshotter}"
            disable_snapshot_annotations = false
            "#
        )
    };
    format!("version = {}\n{common}{own}", if is_containerd_2() { 3 } else { 2 })
}

/// As image platforms name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// containerd with everything it makes below the lab's directory.
pub(crate) struct Containerd {
    child: Child,
    pub(crate) address: PathBuf,
}

impl Containerd {
    pub(crate) fn start(lab: &Lab, registry: &str, snapshotter: &str) -> Self {
        let hosts = lab.dir().join("hosts").join(registry);
        fs::create_dir_all(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), format!("server = \"http://{registry}\"\n")).unwrap();
        let config = configuration(lab, registry, snapshotter);
        let file = lab.dir().join("containerd.toml");
        fs::write(&file, config).unwrap();
        let log = fs::File::create(lab.dir().join("containerd.log")).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Self {
            child,
            address: lab.dir().join("c.sock"),
        };
        let deadline = Instant::now() + PATIENCE;
        while !containerd.ctr(&["version"]).status.success() {
            let log = fs::read_to_string(lab.dir().join("containerd.log")).unwrap();
            assert!(Instant::now() < deadline, "containerd does not start: {log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    pub(crate) fn ctr(&self, arguments: &[&str]) -> Output {
        Command::new("ctr")
            .arg("--address")
            .arg(&self.address)
            .args(["--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .unwrap()
    }

    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Pulls as a kubelet does.
    pub(crate) fn pull(&self, image: &str) {
        pull_at(&self.address, "v1", image, None).unwrap();
    }

    /// Runs a command in a new container to its end; its standard output.
    pub(crate) fn run(&self, snapshotter: &str, image: &str, name: &str, command: &[&str]) -> String {
        let arguments = [&["run", "--rm", "--snapshotter", snapshotter, image, name], command].concat();
        self.succeed(&arguments)
    }

    /// Shows the files of an image to `look`, as a snapshotter has them.
    pub(crate) fn look<T>(&self, dir: &Path, snapshotter: &str, image: &str, look: impl FnOnce(&Path) -> T) -> T {
        let at = dir.join(format!("mount-{snapshotter}"));
        fs::create_dir_all(&at).unwrap();
        self.succeed(&[
            "images",
            "mount",
            "--snapshotter",
            snapshotter,
            image,
            at.to_str().unwrap(),
        ]);
        let seen = look(&at);
        self.succeed(&[
            "images",
            "unmount",
            "--rm",
            "--snapshotter",
            snapshotter,
            at.to_str().unwrap(),
        ]);
        seen
    }

    /// Waits until containerd looks for a snapshotter again that was away: a second or two, in which it refuses what needs one.
    pub(crate) fn reconnect(&self) {
        let deadline = Instant::now() + PATIENCE;
        // It asks the snapshotter about each.
        let list = ["snapshots", "--snapshotter", "tarblk", "ls"];
        while !self.ctr(&list).status.success() {
            assert!(Instant::now() < deadline, "containerd does not find the snapshotter");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn layers_here(&self) -> Vec<String> {
        let content = self.succeed(&["content", "ls", "--quiet"]);
        content.lines().map(str::to_owned).collect()
    }

    /// Removes all images, and waits until the collector has been.
    pub(crate) fn remove_images(&self, lab: &Lab) {
        let names = self.succeed(&["images", "ls", "--quiet"]);
        let names: Vec<&str> = names.lines().collect();
        self.succeed(&[&["images", "rm", "--sync"], &names[..]].concat());
        let deadline = Instant::now() + PATIENCE;
        while !lab.names().is_empty() {
            assert!(Instant::now() < deadline, "{:?} stay: {}", lab.names(), lab.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Pulls at another socket than containerd's own, by a version of the API, with what a kubelet knows of logging in.
pub(crate) fn pull_at(address: &Path, version: &str, image: &str, auth: Option<Auth>) -> Answer<()> {
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
        }),
        auth,
        unknown: "x".to_owned(),
    };
    let path = format!("/runtime.{version}.ImageService/PullImage");
    let answers: Vec<PullImageResponse> = Client::new(address).call(&path, &request)?;
    assert!(answers[0].image_ref.starts_with("sha256:"));
    Ok(())
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A container that is there until it is dropped.
pub(crate) struct Sleeper<'a> {
    containerd: &'a Containerd,
    name: &'a str,
}

impl<'a> Sleeper<'a> {
    pub(crate) fn start(containerd: &'a Containerd, image: &str, name: &'a str) -> Self {
        containerd.succeed(&[
            "run",
            "--detach",
            "--snapshotter",
            "tarblk",
            image,
            name,
            "sleep",
            "1000",
        ]);
        Self { containerd, name }
    }

    pub(crate) fn exec(&self, command: &[&str]) -> String {
        let arguments = [&["tasks", "exec", "--exec-id", "e", self.name], command].concat();
        self.containerd.succeed(&arguments)
    }
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        self.containerd.ctr(&["tasks", "rm", "--force", self.name]);
        self.containerd.ctr(&["containers", "rm", self.name]);
    }
}
