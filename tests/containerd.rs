//! Debian's containerd and runc with `tarblk snapshotter` as its plug-in: images are pulled through the CRI, as a kubelet pulls them
//! (Debian's `ctr` tells snapshotters nothing of what it pulls), containers run from layers that nobody downloaded, their files are
//! those that containerd's own overlayfs snapshotter makes of the same image, and a removed image leaves nothing.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;
mod snapshots;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use common::{have, skip, tree, unpacked};
use registry::{Access, PASSWORD, Registry, USER};
use serde_json::Value;
use snapshots::Lab;
use snapshots::client::{Client, UNIMPLEMENTED};
use snapshots::containerd::{Auth, Containerd, Sleeper, is_containerd_2, pull_at};
use snapshots::docker::{self, Docker};
use tarblk::internals::snapshotter::content::messages::{CONTENT, WriteAction, WriteRequest, WriteResponse};
use tarblk::internals::snapshotter::messages::Empty;

/// Four gzip layers: a Debian with Python and numpy.
const IMAGE: &str = "debian-python:distribution-gzip";

/// A few files each.
const SMALL: &str = "whiteouts:types-thrice";

/// A lab and a registry with images; `None`, having said so, where containers cannot be run.
fn laboratory(test: &str, config: &str) -> Option<(Lab, Registry, PathBuf)> {
    laboratory_with(test, config, Access::Anonymous)
}

/// The same, with a registry that lets people in as `access` says.
fn laboratory_with(test: &str, config: &str, access: Access) -> Option<(Lab, Registry, PathBuf)> {
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
    let registry = Registry::with(test, access, &images, &[IMAGE, SMALL])?;
    Some((lab, registry, images))
}

#[test]
fn containers_run_from_layers_that_were_not_pulled() {
    let Some((mut lab, registry, images)) = laboratory("containers_run_from_layers_that_were_not_pulled", "") else {
        return;
    };
    let began = SystemTime::now();
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{IMAGE}", registry.host());
    containerd.pull(&image);
    // Four snapshots without a device, and no layer's blob.
    assert_eq!(lab.names().len(), 4);
    let (layout, tag) = IMAGE.split_once(':').unwrap();
    // What containerd has is not fetched again.
    let (_, manifest) = unpacked::manifest(&images.join(layout), tag);
    let config = manifest["config"]["digest"].as_str().unwrap();
    let asked = registry
        .requests()
        .into_iter()
        .filter(|request| request.starts_with("GET ") && request.contains(config));
    assert_eq!(asked.collect::<Vec<_>>().len(), 1);
    let blobs = unpacked::layers(&images.join(layout), tag);
    let none_came = || containerd.layers_here().iter().all(|here| !blobs.contains(here));
    assert!(none_came());
    let python = ["python3", "-c", "import numpy; print(numpy.arange(5).sum())"];
    assert_eq!(containerd.run("tarblk", &image, "first", &python), "10\n");
    assert!(none_came());

    // The snapshotter dies under a container, which does not notice; then new ones, and the pull once more.
    let sleeper = Sleeper::start(&containerd, &image, "sleeper");
    lab.kill();
    assert_eq!(sleeper.exec(&python), "10\n");
    lab.start();
    containerd.reconnect();
    assert_eq!(containerd.run("tarblk", &image, "second", &python), "10\n");
    containerd.pull(&image);
    drop(sleeper);

    // The same tree as containerd's own snapshotter makes, which fetches and unpacks every layer.
    containerd.succeed(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]);
    assert!(!none_came());
    // No entry makes the root: containerd 2 gives it the time of unpacking.
    let implied = [PathBuf::new()];
    let mut differences = containerd.look(lab.dir(), "overlayfs", &image, |expected| {
        containerd.look(lab.dir(), "tarblk", &image, |found| {
            let same = tree::differences(expected, found, &implied);
            assert!(tree::count(found) > 10_000);
            same
        })
    });
    if is_containerd_2() {
        // The same goes for directories of a lower layer in which an upper one has files.
        differences.retain(|line| !is_time_of_unpacking(line, began));
    }
    assert!(differences.is_empty(), "{differences:#?}");
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

/// Whether a difference is that a directory has the time at which containerd unpacked it, after `began`.
fn is_time_of_unpacking(line: &str, began: SystemTime) -> bool {
    let Some((_, times)) = line.split_once(": time is (") else {
        return false;
    };
    let seconds = times
        .split_once("not (")
        .and_then(|(_, expected)| expected.split_once(','));
    let since = began.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    seconds.is_some_and(|(seconds, _)| seconds.parse::<u64>().unwrap() >= since.as_secs())
}

/// An image whose only program sleeps, as a layout below `dir`: what holds a pod's namespaces.
fn make_pause(dir: &Path) {
    let layout = dir.join("pause");
    let image = format!("{}:pause", layout.display());
    let umoci = |arguments: &[&str]| common::succeed(Command::new("umoci").args(arguments));
    let busybox = common::succeed(Command::new("sh").args(["-c", "command -v busybox"]));
    let busybox = String::from_utf8(busybox).unwrap();
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    umoci(&["insert", "--image", &image, busybox.trim(), "/bin/sleep"]);
    umoci(&[
        "config",
        "--image",
        &image,
        "--config.cmd",
        "/bin/sleep",
        "--config.cmd",
        "1000000",
    ]);
}

#[test]
fn a_pod_runs_as_a_kubelet_makes_it() {
    const NAME: &str = "a_pod_runs_as_a_kubelet_makes_it";
    for program in ["umoci", "busybox"] {
        if !have(program) {
            return skip(NAME, &format!("no {program}: run tools/setup --tests"));
        }
    }
    let Some((lab, registry, _)) = laboratory(NAME, "") else {
        return;
    };
    make_pause(lab.dir());
    registry.push(lab.dir(), "pause:pause");
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{IMAGE}", registry.host());
    // As a person looks whether all is set up.
    let mut check = lab.command(&["snapshotter", "setup", "containerd", "--check", "--config"]);
    check
        .arg(lab.dir().join("snapshotter.toml"))
        .arg("--address")
        .arg(&containerd.address);
    check.arg("--containerd-config").arg(lab.dir().join("containerd.toml"));
    let said = String::from_utf8(common::succeed(&mut check)).unwrap();
    assert!(said.ends_with("it works\n"), "{said}");
    containerd.pull(&image);
    let python = ["python3", "-c", "import numpy; print(numpy.arange(5).sum())"];
    let said = snapshots::pod::run(&containerd.address, &lab.dir().join("logs"), &image, &python);
    assert_eq!(said, "10\n");
    // One device for the pod's sandbox and one for the container, and no layer came.
    assert_eq!(lab.chains().len(), 2);
    assert!(
        lab.get("/metrics")
            .contains("tarblk_snapshotter_layers_claimed_total 5\n")
    );
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

/// containerd 2 pulls by its transfer service, which says of which image a layer is when the plug-in exports that it wants to know.
#[test]
fn the_transfer_service_of_containerd_2_is_understood() {
    const NAME: &str = "the_transfer_service_of_containerd_2_is_understood";
    if have("containerd") && !is_containerd_2() {
        return skip(NAME, "containerd 1 has none; tools/newer-suite has containerd 2");
    }
    let Some((lab, registry, images)) = laboratory(NAME, "") else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{IMAGE}", registry.host());
    containerd.succeed(&["images", "pull", "--plain-http", "--snapshotter", "tarblk", &image]);
    assert_eq!(lab.names().len(), 4, "{}", lab.log());
    let (layout, tag) = IMAGE.split_once(':').unwrap();
    let blobs = unpacked::layers(&images.join(layout), tag);
    assert!(containerd.layers_here().iter().all(|here| !blobs.contains(here)));
    let python = ["python3", "-c", "import numpy; print(numpy.arange(5).sum())"];
    assert_eq!(containerd.run("tarblk", &image, "first", &python), "10\n");
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

/// Docker puts a committed snapshot of its own on a claimed layer, reads mounts of running containers to commit them, and saves and
/// pushes from containerd's content store.
#[test]
fn docker_runs_commits_saves_and_pushes_lazy_images() {
    const NAME: &str = "docker_runs_commits_saves_and_pushes_lazy_images";
    if let Some(why) = docker::obstacle() {
        return skip(NAME, &format!("{why}; tools/newer-suite has one"));
    }
    let Some((lab, registry, images)) = laboratory(NAME, "") else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let docker = Docker::start(&lab, &containerd);
    let image = format!("{}/{IMAGE}", registry.host());
    docker.succeed(&["pull", "--quiet", &image]);
    assert_eq!(lab.names().len(), 4, "{}", lab.log());
    let (layout, tag) = IMAGE.split_once(':').unwrap();
    let blobs = unpacked::layers(&images.join(layout), tag);
    let in_docker = |arguments: &[&str]| {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(&containerd.address)
            .args(["--namespace", docker::NAMESPACE])
            .args(arguments)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let content = || in_docker(&["content", "ls", "--quiet"]);
    assert!(blobs.iter().all(|blob| !content().contains(blob)));
    let run = |arguments: &[&str]| docker.succeed(&[&["run", "--network", "none"], arguments].concat());
    let python = ["python3", "-c", "import numpy; print(numpy.arange(5).sum())"];
    assert_eq!(run(&[&["--rm", &image], &python[..]].concat()), "10\n");

    let write = [
        "--name",
        "writer",
        &image,
        "sh",
        "-c",
        "echo more >/etc/more; rm /etc/mime.types",
    ];
    run(&write);
    let committed = format!("{}/committed:1", registry.host());
    docker.succeed(&["commit", "writer", &committed]);
    let look = [
        "--rm",
        &committed,
        "sh",
        "-c",
        "cat /etc/more; test ! -e /etc/mime.types && echo gone",
    ];
    assert_eq!(run(&look), "more\ngone\n");
    // Without its layers an image is saved without a word of that, and a commit is not pushed.
    let hex = |digest: &String| digest.strip_prefix("sha256:").unwrap().to_owned();
    let tar = lab.dir().join("saved.tar");
    let has_all = |saved: &[String]| blobs.iter().map(hex).all(|digest| saved.contains(&digest));
    assert!(!docker.command(&["push", &committed]).status.success());
    for (image, count) in [(&image, blobs.len()), (&committed, 0)] {
        let pushed = push_content(&lab, &containerd, docker::NAMESPACE, image);
        assert_eq!(
            pushed.iter().filter(|layer| !layer["from"].is_null()).count(),
            count,
            "{pushed:?}"
        );
    }
    assert!(has_all(&docker.saved(&image, &tar)));
    docker.succeed(&["push", "--quiet", &committed]);
    docker.succeed(&["rm", "writer"]);
    docker.succeed(&["rmi", &committed]);
    docker.succeed(&["rmi", &image]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !lab.names().is_empty() || blobs.iter().any(|blob| content().contains(blob)) {
        assert!(Instant::now() < deadline, "{:?} {}", lab.names(), content());
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(docker);
    drop(containerd);
    lab.assert_gone();
}

#[test]
fn what_is_declined_containerd_pulls_itself() {
    let config = "lazy = \"never\"\n";
    let Some((lab, registry, images)) = laboratory("what_is_declined_containerd_pulls_itself", config) else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{SMALL}", registry.host());
    containerd.pull(&image);
    let (layout, tag) = SMALL.split_once(':').unwrap();
    let blobs = unpacked::layers(&images.join(layout), tag);
    let here = containerd.layers_here();
    assert!(blobs.iter().all(|blob| here.contains(blob)));
    containerd.succeed(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]);
    // No entry makes the root: containerd 2 gives it the time of unpacking.
    let implied = [PathBuf::new()];
    let differences = containerd.look(lab.dir(), "overlayfs", &image, |expected| {
        containerd.look(lab.dir(), "tarblk", &image, |found| {
            tree::differences(expected, found, &implied)
        })
    });
    assert!(differences.is_empty(), "{differences:#?}");
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

/// The same without what comes again.
fn different(blobs: &[String]) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for blob in blobs {
        if !seen.contains(blob) {
            seen.push(blob.clone());
        }
    }
    seen
}

/// What `tarblk content push --json` says of the layers of an image.
fn push_content(lab: &Lab, containerd: &Containerd, namespace: &str, image: &str) -> Vec<Value> {
    let mut command = lab.command(&["content", "push", "--json", "--namespace", namespace, image]);
    let config = lab.dir().join("snapshotter.toml");
    command
        .arg("--config")
        .arg(config)
        .arg("--address")
        .arg(&containerd.address);
    serde_json::from_slice(&common::succeed(&mut command)).unwrap()
}

#[test]
fn layers_of_a_lazy_image_are_brought_for_those_who_want_them_whole() {
    const NAME: &str = "layers_of_a_lazy_image_are_brought_for_those_who_want_them_whole";
    let Some((lab, registry, images)) = laboratory(NAME, "") else {
        return;
    };
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{SMALL}", registry.host());
    containerd.pull(&image);
    let (layout, tag) = SMALL.split_once(':').unwrap();
    let layout = images.join(layout);
    let blobs = unpacked::layers(&layout, tag);
    assert!(containerd.layers_here().iter().all(|here| !blobs.contains(here)));
    let blob = |digest: &str| fs::read(layout.join("blobs").join(digest.replace(':', "/"))).unwrap();

    // One layer was half there; of another one nonsense was.
    let half = blob(&blobs[0]).len() / 2;
    for (digest, begun) in [
        (&blobs[0], blob(&blobs[0])[..half].to_vec()),
        (&blobs[1], b"nonsense".to_vec()),
    ] {
        let request = WriteRequest {
            action: WriteAction::Write.into(),
            r#ref: format!("layer-{digest}"),
            data: begun,
            ..WriteRequest::default()
        };
        let answers = Client::new(&containerd.address).call::<WriteResponse>(&format!("{CONTENT}Write"), &request);
        assert!(!answers.unwrap().is_empty());
    }
    // What was begun goes on; what cannot be right is found out by containerd, thrown away, and brought anew.
    let pushed = push_content(&lab, &containerd, "k8s.io", &image);
    let repository = image.rsplit_once(':').unwrap().0;
    let mut seen = Vec::new();
    for (layer, digest) in pushed.iter().zip(different(&blobs)) {
        assert_eq!(
            (layer["layer"].as_str(), layer["from"].as_str()),
            (Some(&*digest), Some(repository))
        );
        let resumed = if digest == blobs[0] { half } else { 0 };
        assert_eq!(layer["resumed"].as_u64(), u64::try_from(resumed).ok());
        seen.push(digest);
    }
    assert_eq!(seen, different(&blobs));
    for layer in push_content(&lab, &containerd, "k8s.io", &image) {
        assert!(layer["from"].is_null(), "{layer}");
    }

    // The collector leaves them alone for as long as the image is there.
    containerd.succeed(&["images", "tag", &image, "another"]);
    containerd.succeed(&["images", "rm", "--sync", "another"]);
    let here = containerd.layers_here();
    assert!(blobs.iter().all(|blob| here.contains(blob)));
    let tar = lab.dir().join("export.tar");
    // By the transfer service, every third export of ctr 2.1.9 is cut or mixed up, on overlayfs too.
    let local: &[&str] = if is_containerd_2() { &["--local"] } else { &[] };
    let export = [&["images", "export"], local, &[tar.to_str().unwrap(), &image]].concat();
    containerd.succeed(&export);
    let mut archive = tar::Archive::new(fs::File::open(&tar).unwrap());
    let mut exported = 0;
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        if let Some(digest) = blobs
            .iter()
            .find(|digest| path == format!("blobs/{}", digest.replace(':', "/")))
        {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            assert_eq!(bytes, blob(digest));
            exported += 1;
        }
    }
    assert_eq!(exported, different(&blobs).len());
    containerd.remove_images(&lab);
    let here = containerd.layers_here();
    assert!(blobs.iter().all(|blob| !here.contains(blob)));
    drop(containerd);
    lab.assert_gone();
}

#[test]
fn logins_of_a_kubelet_are_there_when_layers_are_read() {
    const NAME: &str = "logins_of_a_kubelet_are_there_when_layers_are_read";
    const NEW_PASSWORD: &str = "w0rd-that-came-later";
    let config = "image-service = \"{dir}/i.sock\"\n";
    let Some((mut lab, registry, _)) = laboratory_with(NAME, config, Access::Password) else {
        return;
    };
    // With an index that is believed nothing is read before it is wanted.
    lab.stop();
    fs::create_dir_all(lab.dir().join("etc")).unwrap();
    fs::write(lab.dir().join("etc/tarblk.toml"), "trust = \"registry\"\n").unwrap();
    let mut push = lab.command(&["--quiet", "index", "push"]);
    common::succeed(push.args(registry.arguments()).arg(registry.image(IMAGE)));
    lab.start();
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{IMAGE}", registry.host());
    let kubelet = lab.dir().join("i.sock");
    let auth = |password: &str| {
        Some(Auth {
            username: USER.to_owned(),
            password: password.to_owned(),
        })
    };
    // containerd's own words come back, of methods that nobody knows, too; and other services are not passed on.
    let refused = pull_at(&kubelet, "v1", &image, auth("wrong")).unwrap_err();
    assert!(refused.message.contains(&image), "{refused:?}");
    let unknown = |path: &str| Client::new(&kubelet).call::<Empty>(path, &Empty {}).unwrap_err();
    assert_eq!(unknown("/runtime.v1.ImageService/Nothing").code, UNIMPLEMENTED);
    assert_eq!(unknown(&format!("{CONTENT}Info")).code, UNIMPLEMENTED);
    pull_at(&kubelet, "v1", &image, auth(PASSWORD)).unwrap();
    assert_eq!(lab.names().len(), 4, "{}", lab.log());
    let kept = lab.dir().join("r/logins.json");
    assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);

    // The snapshotter dies; what it knew is on disk.
    lab.kill();
    lab.start();
    containerd.reconnect();
    let sleeper = Sleeper::start(&containerd, &image, "sleeper");

    // The password changes while a container runs; what was not read waits, until a pull brings the new one.
    let change = |password: &str| {
        let mut command = Command::new("htpasswd");
        command.args(["-nbB", "-C", "4", USER, password]);
        fs::write(registry.dir().join("htpasswd"), common::succeed(&mut command)).unwrap();
    };
    change(NEW_PASSWORD);
    let program = ["sha256sum", "/usr/bin/perl"];
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| sleeper.exec(&program));
        let deadline = Instant::now() + Duration::from_secs(60);
        while !registry
            .requests()
            .last()
            .is_some_and(|request| request.ends_with(" 401"))
        {
            assert!(
                Instant::now() < deadline && !reading.is_finished(),
                "{:?}",
                registry.requests()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        // The other version of the API, as long as containerd has it.
        let version = if is_containerd_2() { "v1" } else { "v1alpha2" };
        pull_at(&kubelet, version, &image, auth(NEW_PASSWORD)).unwrap();
        assert!(reading.join().unwrap().ends_with("/usr/bin/perl\n"));
    });
    for (name, text) in [("the log", lab.log()), ("the service's log", service_logs(&lab))] {
        assert!(
            !text.contains(PASSWORD) && !text.contains(NEW_PASSWORD),
            "{name} shows a password"
        );
    }
    drop(sleeper);
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
}

/// What the service wrote, and what it keeps on disk of its devices.
fn service_logs(lab: &Lab) -> String {
    let entries = fs::read_dir(lab.dir().join("states")).unwrap().flatten();
    let files = entries.filter(|entry| entry.path().is_file());
    files
        .map(|entry| String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned())
        .collect()
}
