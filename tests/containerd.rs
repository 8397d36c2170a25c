//! Debian's containerd and runc with `tarblk snapshotter` as its plug-in: images are pulled through the CRI, as a kubelet pulls them
//! (Debian's `ctr` tells snapshotters nothing of what it pulls), containers run from layers that nobody downloaded, their files are
//! those that containerd's own overlayfs snapshotter makes of the same image, and a removed image leaves nothing.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;
mod snapshots;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{have, skip, tree, unpacked};
use registry::{Access, Registry};
use snapshots::Lab;
use snapshots::containerd::{Containerd, Sleeper};

/// Four gzip layers: a Debian with Python and numpy.
const IMAGE: &str = "debian-python:distribution-gzip";

/// A few files each.
const SMALL: &str = "whiteouts:types-thrice";

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
    let containerd = Containerd::start(&lab, &registry.host(), "tarblk");
    let image = format!("{}/{IMAGE}", registry.host());
    containerd.pull(&image);
    // Four snapshots without a device, and no layer's blob.
    assert_eq!(lab.names().len(), 4);
    let (layout, tag) = IMAGE.split_once(':').unwrap();
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
