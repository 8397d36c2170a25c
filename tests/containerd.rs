//! Debian's containerd and runc with `tarblk snapshotter` as its plug-in: images are pulled through the CRI, as a kubelet pulls them
//! (Debian's `ctr` tells snapshotters nothing of what it pulls), containers run from layers that nobody downloaded, their files are
//! those that containerd's own overlayfs snapshotter makes of the same image, and a removed image leaves nothing.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;
mod snapshots;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{have, skip, tree, unpacked};
use registry::{Access, Registry};
use snapshots::Lab;
use snapshots::client::Client;

/// How long containerd may take to start, and its collector to remove what nothing needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Four gzip layers: a Debian with Python and numpy.
const IMAGE: &str = "debian-python:distribution-gzip";

/// A few files each.
const SMALL: &str = "whiteouts:types-thrice";

/// The name of an image, in the CRI's messages.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
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
struct Containerd {
    child: Child,
    address: PathBuf,
}

impl Containerd {
    fn start(lab: &Lab, registry: &str) -> Self {
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
            [plugins."io.containerd.grpc.v1.cri".registry]
            config_path = "{dir}/hosts"
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "tarblk"
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

    fn ctr(&self, arguments: &[&str]) -> Output {
        Command::new("ctr")
            .arg("--address")
            .arg(&self.address)
            .args(["--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .unwrap()
    }

    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Pulls as a kubelet does.
    fn pull(&self, image: &str) {
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
    fn run(&self, image: &str, name: &str, command: &[&str]) -> String {
        let arguments = [&["run", "--rm", "--snapshotter", "tarblk", image, name], command].concat();
        self.succeed(&arguments)
    }

    /// Shows the files of an image to `look`, as a snapshotter has them.
    fn look<T>(&self, dir: &Path, snapshotter: &str, image: &str, look: impl FnOnce(&Path) -> T) -> T {
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
    fn reconnect(&self) {
        let deadline = Instant::now() + PATIENCE;
        // It asks the snapshotter about each.
        let list = ["snapshots", "--snapshotter", "tarblk", "ls"];
        while !self.ctr(&list).status.success() {
            assert!(Instant::now() < deadline, "containerd does not find the snapshotter");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn layers_here(&self) -> Vec<String> {
        let content = self.succeed(&["content", "ls", "--quiet"]);
        content.lines().map(str::to_owned).collect()
    }

    /// Removes all images, and waits until the collector has been.
    fn remove_images(&self, lab: &Lab) {
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
struct Sleeper<'a> {
    containerd: &'a Containerd,
    name: &'a str,
}

impl<'a> Sleeper<'a> {
    fn start(containerd: &'a Containerd, image: &str, name: &'a str) -> Self {
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

    fn exec(&self, command: &[&str]) -> String {
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

/// A lab and a registry with images; `None`, having said so, where containers cannot be run.
fn laboratory(test: &str, config: &str) -> Option<(Lab, Registry, PathBuf)> {
    for (program, package) in [("containerd", "containerd"), ("ctr", "containerd"), ("runc", "runc")] {
        if !have(program) {
            skip(
                test,
                &format!("no {program} (package {package}): run tools/setup --tests"),
            );
            return None;
        }
    }
    let images = unpacked::images(test)?;
    let lab = Lab::new(test, config)?;
    let registry = Registry::with(test, Access::Anonymous, &images, &[IMAGE, SMALL])?;
    Some((lab, registry, images))
}

#[test]
fn containers_run_from_layers_that_were_not_pulled() {
    let Some((mut lab, registry, images)) = laboratory("containers_run_from_layers_that_were_not_pulled", "") else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host());
    let image = format!("{}/{IMAGE}", registry.host());
    containerd.pull(&image);
    // Four snapshots without a device, and no layer's blob.
    assert_eq!(lab.names().len(), 4);
    let (layout, tag) = IMAGE.split_once(':').unwrap();
    let blobs = unpacked::layers(&images.join(layout), tag);
    let none_came = || containerd.layers_here().iter().all(|here| !blobs.contains(here));
    assert!(none_came());
    let python = ["python3", "-c", "import numpy; print(numpy.arange(5).sum())"];
    assert_eq!(containerd.run(&image, "first", &python), "10\n");
    assert!(none_came());

    // The snapshotter dies under a container, which does not notice; then new ones, and the pull once more.
    let sleeper = Sleeper::start(&containerd, &image, "sleeper");
    lab.kill();
    assert_eq!(sleeper.exec(&python), "10\n");
    lab.start();
    containerd.reconnect();
    assert_eq!(containerd.run(&image, "second", &python), "10\n");
    containerd.pull(&image);
    drop(sleeper);

    // The same tree as containerd's own snapshotter makes, which fetches and unpacks every layer.
    containerd.succeed(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]);
    assert!(!none_came());
    let differences = containerd.look(lab.dir(), "overlayfs", &image, |expected| {
        containerd.look(lab.dir(), "tarblk", &image, |found| {
            let same = tree::differences(expected, found, &[]);
            assert!(tree::count(found) > 10_000);
            same
        })
    });
    assert!(differences.is_empty(), "{differences:#?}");
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

#[test]
fn what_is_declined_containerd_pulls_itself() {
    let config = "lazy = \"never\"\n";
    let Some((lab, registry, images)) = laboratory("what_is_declined_containerd_pulls_itself", config) else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host());
    let image = format!("{}/{SMALL}", registry.host());
    containerd.pull(&image);
    let (layout, tag) = SMALL.split_once(':').unwrap();
    let blobs = unpacked::layers(&images.join(layout), tag);
    let here = containerd.layers_here();
    assert!(blobs.iter().all(|blob| here.contains(blob)));
    containerd.succeed(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]);
    let differences = containerd.look(lab.dir(), "overlayfs", &image, |expected| {
        containerd.look(lab.dir(), "tarblk", &image, |found| {
            tree::differences(expected, found, &[])
        })
    });
    assert!(differences.is_empty(), "{differences:#?}");
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}
