//! Images that are written on and run without a container engine: `tarblk mount --overlay` and `tarblk run`, from small images with a
//! shell; and what they refuse, or leave when they are killed: nothing.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod containers;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::session::is_mounted;
use containers::Workshop;
use serde_json::json;

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().unwrap().success()
}

/// Waits until no device is attached any more.
fn wait_until_detached(workshop: &Workshop) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while workshop.json(&["ps", "--json"]) != json!([]) {
        assert!(Instant::now() < deadline, "{}", workshop.good(&["ps"]));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The options of what is mounted on a directory.
fn mount_options(dir: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines: Vec<_> = mounts
        .lines()
        .filter(|line| line.split(' ').nth(4) == dir.to_str())
        .collect();
    let [line] = lines[..] else { panic!("{lines:?}") };
    line.split(' ').nth(5).unwrap().to_owned()
}

#[test]
fn what_is_written_on_an_image_is_kept_beside_it() {
    let Some(workshop) = Workshop::new("what_is_written_on_an_image_is_kept_beside_it", &[]) else {
        return;
    };
    let image = workshop.image("one", &json!({}));
    let dir = workshop.path("m");
    fs::create_dir(&dir).unwrap();
    // All that overlayfs' options would stumble over.
    let upper = workshop.path("up, with: a\\ few");
    let mount = || {
        workshop.good(&[
            "mount",
            "--overlay",
            upper.to_str().unwrap(),
            "-o",
            "rw,noexec",
            &image,
            &workshop.at("m"),
        ])
    };
    mount();
    assert_eq!(
        fs::metadata(&dir).unwrap().mode() & 0o7777,
        0o755,
        "as the image's root"
    );
    assert_eq!(mount_options(&dir), "rw,nosuid,nodev,noexec,relatime");
    let listed = workshop.json(&["ps", "--json"]);
    assert_eq!(
        (&listed[0]["mounts"], listed.as_array().unwrap().len()),
        (&json!([dir]), 1)
    );
    assert_eq!(workshop.mounts(), [workshop.at("m")], "nothing else is mounted");
    assert!(
        workshop
            .good(&["stats", &workshop.at("m")])
            .contains(listed[0]["device"].as_str().unwrap())
    );
    fs::write(dir.join("new"), "new").unwrap();
    fs::write(dir.join("dir/above"), "changed").unwrap();
    fs::remove_file(dir.join("etc/group")).unwrap();
    fs::rename(dir.join("etc/passwd"), dir.join("passwd")).unwrap();
    fs::remove_dir_all(dir.join("bin")).unwrap();
    fs::create_dir(dir.join("bin")).unwrap();
    let is_as_written = || {
        assert_eq!(fs::read(dir.join("new")).unwrap(), b"new");
        assert_eq!(fs::read(dir.join("dir/above")).unwrap(), b"changed");
        assert!(!dir.join("etc/group").exists() && !dir.join("etc/passwd").exists());
        assert!(fs::read_to_string(dir.join("passwd")).unwrap().starts_with("root:"));
        assert_eq!(fs::read_dir(dir.join("bin")).unwrap().count(), 0);
    };
    is_as_written();
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
    let mut names: Vec<_> = fs::read_dir(&upper)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["upper", "work"]);
    let whiteout = fs::symlink_metadata(upper.join("upper/etc/group")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    // Again, and unmounted by another program: the device goes with it, also where another service began meanwhile, which took a copy
    // of every mount along.
    mount();
    is_as_written();
    let of_other = |arguments: &[&str]| {
        let mut command = workshop.tarblk(arguments);
        common::succeed(command.env("TARBLK_STATE_DIR", workshop.path("other")))
    };
    let other = String::from_utf8(of_other(&["attach", &image])).unwrap();
    assert!(succeeds("umount", &[&workshop.at("m")]));
    wait_until_detached(&workshop);
    of_other(&["detach", other.trim()]);
    // Detached under a file that is open.
    mount();
    let open = fs::File::open(dir.join("new")).unwrap();
    let device = workshop.json(&["ps", "--json"])[0]["device"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(workshop.bad(&["umount", &workshop.at("m")], 1).contains("is in use by"));
    assert!(workshop.bad(&["detach", &device], 1).contains(&workshop.at("m")));
    workshop.good(&["detach", "--force", &device]);
    assert!(!is_mounted(&dir));
    drop(open);
    wait_until_detached(&workshop);
    // The image is what it was.
    workshop.good(&["mount", &image, &workshop.at("m")]);
    assert_eq!(fs::read(dir.join("dir/above")).unwrap(), b"one");
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
}

#[test]
fn no_overlay_where_others_could_write_or_look() {
    let Some(workshop) = Workshop::new("no_overlay_where_others_could_write_or_look", &[]) else {
        return;
    };
    let image = workshop.image("one", &json!({}));
    for name in ["m", "n", "up", "open", "theirs", "shown"] {
        fs::create_dir(workshop.path(name)).unwrap();
        fs::set_permissions(workshop.path(name), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let mount = |upper: &str, dir: &str| ["mount", "--overlay", upper, &image, dir].map(str::to_owned);
    let refused = |upper: &str| {
        let arguments = mount(&workshop.at(upper), &workshop.at("m"));
        let said = workshop.bad(&arguments.each_ref().map(String::as_str), 1);
        assert_eq!(workshop.json(&["ps", "--json"]), json!([]));
        said
    };
    chown(workshop.path("theirs"), Some(1234), None).unwrap();
    fs::set_permissions(workshop.path("open"), fs::Permissions::from_mode(0o770)).unwrap();
    fs::set_permissions(workshop.path("shown"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("up", workshop.path("link")).unwrap();
    for (upper, why) in [
        ("theirs", "belongs to user 1234"),
        ("theirs/below", "user 1234, who could exchange"),
        ("open", "others may write to it"),
        ("shown", "chmod 700"),
        ("link", "symbolic link"),
        ("m", "lie in each other"),
        ("m/below", "lie in each other"),
    ] {
        let said = refused(upper);
        assert!(said.contains(why), "{upper}: {said}");
    }
    // What is to be directories and is not.
    symlink("/etc", workshop.path("up/upper")).unwrap();
    assert!(refused("up").contains("ot a directory"), "{}", refused("up"));
    fs::remove_file(workshop.path("up/upper")).unwrap();
    // What a killed command left mounted is taken off; two overlays do not write to one directory.
    fs::create_dir(workshop.path("up/lower")).unwrap();
    workshop.good(&["mount", &image, &workshop.at("up/lower")]);
    let arguments = mount(&workshop.at("up"), &workshop.at("m"));
    workshop.good(&arguments.each_ref().map(String::as_str));
    assert_eq!(workshop.mounts(), [workshop.at("m")]);
    let arguments = mount(&workshop.at("up"), &workshop.at("n"));
    let said = workshop.bad(&arguments.each_ref().map(String::as_str), 1);
    assert!(
        said.contains("in use by the overlay on") && said.contains(&workshop.at("m")),
        "{said}"
    );
    workshop.good(&["umount", &workshop.at("m")]);
    workshop.assert_gone();
}
