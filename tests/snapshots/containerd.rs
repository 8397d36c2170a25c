//! Debian's containerd with everything it makes below a lab's directory, and the calls of it that tests and benchmarks make: pulls
//! through the CRI as a kubelet makes them, all else by `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::Lab;
use super::client::Client;

/// How long containerd may take to start, and its collector to remove what nothing needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name of an image, in the CRI's messages.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

/// `runtime.v1.PullImageRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// `runtime.v1.PullImageResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// containerd with everything it makes below the lab's directory.
pub(crate) struct Containerd {
    child: Child,
    pub(crate) address: PathBuf,
}

impl Containerd {
    pub(crate) fn start(lab: &Lab, registry: &str, snapshotter: &str) -> Self {
        let dir = lab.dir().display();
        let hosts = lab.dir().join("hosts").join(registry);
        fs::create_dir_all(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), format!("server = \"http://{registry}\"\n")).unwrap();
        let config = format!(
            r#"
            version = 2
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
            [plugins."io.containerd.grpc.v1.cri"]
            restrict_oom_score_adj = true
            disable_apparmor = true
            sandbox_image = "{registry}/pause:pause"
            [plugins."io.containerd.grpc.v1.cri".registry]
            config_path = "{dir}/hosts"
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "{snapshotter}"
            disable_snapshot_annotations = false
            "#,
            address = lab.address().display(),
        );
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
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
        };
        let answers: Result<Vec<PullImageResponse>, _> =
            Client::new(&self.address).call("/runtime.v1.ImageService/PullImage", &request);
        assert!(answers.unwrap()[0].image_ref.starts_with("sha256:"));
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
