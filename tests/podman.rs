//! Debian's podman and runc with a store that `tarblk podman` keeps: podman runs containers from images that it did not pull, whatever
//! was killed meanwhile, also when the machine is started anew; and what cannot be refuses in one line.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod containers;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::process::Stdio;
use std::time::Duration;

use containers::{Workshop, one_line};
use serde_json::{Value, json};

const PROGRAMS: &[&str] = &["podman", "runc"];

fn config() -> Value {
    json!({"Env": ["PATH=/bin", "FROM=image"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $FROM; cat /dir/*; ls -d /gone"]})
}

/// What a store has that was never used or has been emptied, for podman to find something where storage.conf points.
fn files_of(workshop: &Workshop) -> Vec<String> {
    fn walk(dir: &std::path::Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            found.push(entry.path().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), found);
            }
        }
    }
    let mut found = Vec::new();
    let store = workshop.path("store");
    walk(&store, &mut found);
    let mut names: Vec<_> = found
        .iter()
        .map(|path| path.strip_prefix(&format!("{}/", store.display())).unwrap().to_owned())
        .collect();
    names.sort();
    names
}

const EMPTY: [&str; 9] = [
    "overlay",
    "overlay-images",
    "overlay-images/images.json",
    "overlay-images/images.lock",
    "overlay-layers",
    "overlay-layers/layers.json",
    "overlay-layers/layers.lock",
    "overlay/l",
    "records",
];

#[test]
fn podman_runs_images_that_it_did_not_pull() {
    let Some(workshop) = Workshop::new("podman_runs_images_that_it_did_not_pull", PROGRAMS) else {
        return;
    };
    let store = workshop.at("store");
    let tarblk = |arguments: &[&str]| workshop.good(&[&["podman", "--store", &store], arguments].concat());
    let (one, two) = (
        workshop.image("one", &config()),
        workshop.image("two", &json!({"Cmd": ["/bin/pwd"]})),
    );
    let id = tarblk(&["add", &one]);
    tarblk(&["add", &two, "--name", "example.org/team/two:2"]);
    let listed: Value = serde_json::from_str(&workshop.podman_good(&["images", "--format", "json"])).unwrap();
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|image| image["ReadOnly"] == true));
    assert!(listed.iter().any(|image| image["Id"] == id.trim()));
    // Configuration and tree are the image's: a whiteout and an opaque directory have done their work.
    let ran = workshop.podman(&["run", "--rm", "localhost/app:one"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "image\none");
    assert!(String::from_utf8_lossy(&ran.stderr).contains("/gone: No such file"));
    assert_eq!(workshop.podman_good(&["run", "--rm", "example.org/team/two:2"]), "/\n");
    assert_eq!(
        workshop.podman_good(&["run", "--rm", "--entrypoint", "/bin/cat", id.trim(), "/dir/above"]),
        "one"
    );
    // Once more is nothing new; another name is.
    let before = workshop.json(&["podman", "--store", &store, "ls", "--json"]);
    assert_eq!(tarblk(&["add", &one]), id);
    assert_eq!(before, workshop.json(&["podman", "--store", &store, "ls", "--json"]));
    assert!(
        before
            .as_array()
            .unwrap()
            .iter()
            .all(|line| line["ready"] == true && line["status"] == "serving")
    );
    assert_eq!(tarblk(&["add", &one, "--name", "other:3"]), id);
    assert_eq!(
        workshop.podman_good(&["run", "--rm", "docker.io/library/other:3", "echo word"]),
        "word\n"
    );
    tarblk(&["rm", "docker.io/library/other:3"]);
    assert!(
        !workshop
            .podman(&["image", "exists", "docker.io/library/other:3"])
            .status()
            .unwrap()
            .success()
    );

    // What is in use stays: by a container that runs, and by one that could be started.
    workshop.podman_good(&[
        "run",
        "--detach",
        "--name",
        "sleeper",
        "localhost/app:one",
        "sleep 1000",
    ]);
    let refused = workshop.bad(&["podman", "--store", &store, "rm", "localhost/app:one"], 1);
    assert!(refused.contains("container sleeper is made on it"), "{refused}");
    workshop.podman_good(&["stop", "--time", "0", "sleeper"]);
    let refused = workshop.bad(&["podman", "--store", &store, "rm", &id.trim()[..12]], 1);
    assert!(refused.contains("container sleeper"), "{refused}");
    workshop.podman_good(&["start", "sleeper"]);
    assert_eq!(
        workshop.podman_good(&["exec", "sleeper", "/bin/cat", "/dir/above"]),
        "one"
    );
    // Where podman's files do not tell of the container, the kernel does.
    let hidden = workshop.path("podman/root/overlay-layers");
    fs::rename(&hidden, workshop.path("hidden")).unwrap();
    let refused = workshop.bad(&["podman", "--store", &store, "rm", "localhost/app:one"], 1);
    // A process of podman 5 that clears up after `exec` may have made an empty one.
    drop(fs::remove_dir_all(&hidden));
    fs::rename(workshop.path("hidden"), &hidden).unwrap();
    assert!(refused.contains("a container runs on it"), "{refused}");
    assert_eq!(
        workshop.podman_good(&["run", "--rm", "localhost/app:one", "cat /dir/above"]),
        "one"
    );
    // With force it goes, and what runs goes on.
    tarblk(&["rm", "--force", "localhost/app:one"]);
    assert_eq!(
        workshop.podman_good(&["exec", "sleeper", "/bin/cat", "/dir/above"]),
        "one"
    );
    workshop.podman_good(&["rm", "--force", "--time", "0", "sleeper"]);
    tarblk(&["rm", "--all"]);
    assert_eq!(files_of(&workshop), EMPTY);
    assert_eq!(workshop.podman_good(&["images", "--quiet"]), "");
    workshop.assert_gone();
}

#[test]
fn what_was_killed_or_ended_is_put_right() {
    let Some(workshop) = Workshop::new("what_was_killed_or_ended_is_put_right", PROGRAMS) else {
        return;
    };
    let store = workshop.at("store");
    let tarblk = |arguments: &[&str]| workshop.good(&[&["podman", "--store", &store], arguments].concat());
    let image = workshop.image("one", &config());
    let run = || workshop.podman_good(&["run", "--rm", "localhost/app:one", "cat /dir/above"]);
    let status = || {
        let listed = workshop.json(&["podman", "--store", &store, "ls", "--json"]);
        (
            listed[0]["ready"].as_bool().unwrap(),
            listed[0]["status"].as_str().map(str::to_owned),
        )
    };
    let id = tarblk(&["add", &image, "--deadline", "7s"]);
    assert_eq!(run(), "one");

    // The machine is started anew: podman is told of nothing, until all is restored as it was added.
    workshop.restart_machine();
    assert_eq!(status(), (false, None));
    assert!(tarblk(&["ls"]).contains("not mounted"));
    assert_eq!(workshop.podman_good(&["images", "--quiet"]), "");
    tarblk(&["restore"]);
    assert_eq!(
        (status(), run()),
        ((true, Some("serving".to_owned())), "one".to_owned())
    );
    let options = &workshop.json(&["podman", "--store", &store, "ls", "--json"])[0]["options"];
    assert!(
        options.as_array().unwrap().contains(&json!("--deadline=7000000000ns")),
        "{options}"
    );
    let device = || workshop.json(&["ps", "--json"])[0]["device"].clone();
    let before = device();
    tarblk(&["restore"]);
    assert_eq!(device(), before, "what is served is not touched");

    // All that served is dead, the mount is not: it is put on a new device.
    workshop.kill_servers();
    assert_eq!(status(), (false, Some("dead".to_owned())));
    assert_eq!(tarblk(&["add", &image]), id);
    assert_eq!(
        (status(), run()),
        ((true, Some("serving".to_owned())), "one".to_owned())
    );

    // What a killed command left: half an image, with something mounted, half a file, and a record of what is not there.
    let (layer, gone) = ("a".repeat(64), "b".repeat(64));
    fs::create_dir_all(workshop.path(&format!("store/overlay/{layer}/diff"))).unwrap();
    fs::create_dir_all(workshop.path(&format!("store/overlay-images/{gone}"))).unwrap();
    fs::write(workshop.path(&format!("store/overlay-images/{gone}/manifest")), "{}").unwrap();
    fs::write(workshop.path("store/records/.x.json.1.part"), "{").unwrap();
    symlink("../nowhere/diff", workshop.path("store/overlay/l/NOWHERE")).unwrap();
    workshop.good(&["mount", &image, &workshop.at(&format!("store/overlay/{layer}/diff"))]);
    tarblk(&["rm", "localhost/app:one"]);
    assert_eq!(files_of(&workshop), EMPTY);
    workshop.assert_gone();

    // Killed at any moment, the next one does it.
    for millis in [3, 15, 40, 80, 120, 160, 200] {
        let mut command = workshop.tarblk(&["podman", "--store", &store, "add", &image]);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(tarblk(&["add", &image]), id);
    assert_eq!(run(), "one");
    tarblk(&["rm", "--all"]);
    assert_eq!(files_of(&workshop), EMPTY);
}

#[test]
fn two_at_once_are_one() {
    let Some(workshop) = Workshop::new("two_at_once_are_one", PROGRAMS) else {
        return;
    };
    let store = workshop.at("store");
    let image = workshop.image("one", &config());
    let add = || {
        workshop
            .tarblk(&["podman", "--store", &store, "add", &image])
            .spawn()
            .unwrap()
    };
    let mut both = [add(), add(), add()];
    assert!(both.iter_mut().all(|child| child.wait().unwrap().success()));
    assert_eq!(workshop.json(&["ps", "--json"]).as_array().unwrap().len(), 1);
    // A tag that has moved on takes its name along; the image before stays for containers that are made on it.
    workshop.image("one", &json!({"Cmd": ["/bin/pwd"]}));
    workshop.good(&["podman", "--store", &store, "add", &image]);
    assert_eq!(workshop.podman_good(&["run", "--rm", "localhost/app:one"]), "/\n");
    let listed = workshop.json(&["podman", "--store", &store, "ls", "--json"]);
    let mut names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["names"].to_string())
        .collect();
    names.sort();
    assert_eq!(names, [r#"["localhost/app:one"]"#, "[]"]);
    workshop.good(&["podman", "--store", &store, "rm", "--all"]);
    workshop.assert_gone();
}

#[test]
fn what_cannot_be_is_told_in_one_line() {
    let Some(workshop) = Workshop::new("what_cannot_be_is_told_in_one_line", &[]) else {
        return;
    };
    let image = workshop.image("one", &config());
    let refused = |store: &str, image: &str| workshop.bad(&["podman", "--store", store, "add", image], 1);
    let good = workshop.at("store");
    // Images that are not there, or none.
    let absent = format!("oci:{}:absent", workshop.at("app"));
    assert!(refused(&good, &absent).contains("there is no absent in it"));
    let away = refused(&good, "docker://127.0.0.1:1/app:1");
    assert!(away.contains("127.0.0.1:1"), "{away}");
    let no_image = workshop.bad(&["podman", "--store", &good, "add", "layer.tar"], 2);
    assert!(no_image.contains("podman cannot call an image so"), "{no_image}");
    let unknown = workshop.bad(&["podman", "--store", &good, "rm", "localhost/app:none"], 1);
    assert!(unknown.contains("has no image localhost/app:none"), "{unknown}");
    assert_eq!(files_of(&workshop), EMPTY);

    // Places that another user could have made, or could exchange.
    fs::create_dir(workshop.path("theirs")).unwrap();
    chown(workshop.path("theirs"), Some(1234), None).unwrap();
    assert!(refused(&workshop.at("theirs"), &image).contains("belongs to user 1234"));
    assert!(refused(&workshop.at("theirs/below"), &image).contains("user 1234, who could exchange"));
    assert!(!workshop.path("theirs/below").exists());
    fs::create_dir(workshop.path("open")).unwrap();
    fs::set_permissions(workshop.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(refused(&workshop.at("open"), &image).contains("others may write to it"));
    fs::create_dir(workshop.path("real")).unwrap();
    symlink("real", workshop.path("link")).unwrap();
    assert!(refused(&workshop.at("link"), &image).contains("symbolic link"));
    assert_eq!(fs::read_dir(workshop.path("real")).unwrap().count(), 0);
    assert!(
        workshop
            .bad(&["podman", "--store", &workshop.at("link"), "ls"], 1)
            .contains("symbolic link")
    );

    // Disks that are full or cannot be written, in which nothing is left.
    for pages in [1, 4, 5] {
        let full = format!(
            "mount -t tmpfs -o mode=700,size={}k none $D/real
            $TARBLK podman --store $D/real add --no-cache oci:$D/app:one || status=$?
            left=$(cd $D/real; find records overlay overlay-images -mindepth 1 | grep -v 'overlay/l$\\|images\\.') || exit $status
            echo \"$left\" >&2",
            4 * pages
        );
        let full = one_line(&workshop.apart(&full), 1);
        assert!(full.contains("No space left"), "{pages} pages: {full}");
    }
    let read_only = "$TARBLK podman --store $D/store setup >/dev/null 2>&1; mount --bind $D/store $D/store;
        mount -o remount,bind,ro $D/store; $TARBLK -q podman --store $D/store ls; exec $TARBLK podman --store $D/store add oci:$D/app:one";
    let read_only = one_line(&workshop.apart(read_only), 1);
    assert!(read_only.contains("Read-only file system"), "{read_only}");
    workshop.assert_gone();
}

#[test]
fn podman_is_told_where_the_store_is() {
    let Some(mut workshop) = Workshop::new("podman_is_told_where_the_store_is", &[]) else {
        return;
    };
    let image = workshop.image("one", &config());
    let said = |output: std::process::Output| {
        assert!(output.status.success());
        (
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let run = |workshop: &Workshop, arguments: &[&str]| {
        let store = workshop.at("store");
        said(
            workshop
                .tarblk(&[&["podman", "--store", &store], arguments].concat())
                .output()
                .unwrap(),
        )
    };
    // Where it is named there is nothing to say.
    let (_, told) = run(&workshop, &["add", &image]);
    assert!(!told.contains("setup"), "{told}");
    let (fragment, told) = run(&workshop, &["setup"]);
    assert!(fragment.is_empty() && told.contains("already"), "{told}");
    // Where it is not, what belongs there is told.
    workshop
        .env
        .push(("CONTAINERS_STORAGE_CONF", workshop.at("other.conf")));
    fs::write(workshop.path("other.conf"), "[storage]\ndriver = \"overlay\"\n").unwrap();
    let (_, told) = run(&workshop, &["add", &image]);
    assert!(
        told.contains("tarblk podman setup") && told.contains("other.conf"),
        "{told}"
    );
    let (fragment, _) = run(&workshop, &["setup"]);
    let store = workshop.at("store");
    assert_eq!(
        fragment,
        format!("[storage.options]\nadditionalimagestores = [\"{store}\"]\n")
    );
    run(&workshop, &["rm", "--all"]);
    workshop.assert_gone();
}
