//! `tarblk snapshotter` as containerd sees it: over its socket, with no containerd. First the cases of containerd's own test suite
//! for snapshotters (its package `snapshots/testsuite`), written anew; then claims of layers that are in a registry, what is
//! declined, and kills between and during calls.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;
mod snapshots;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use snapshots::Lab;
use snapshots::client::{ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED};
use tarblk::internals::snapshotter::messages::{
    FieldMask, Info, InfoResponse, KeyRequest, Kind, Mount, SERVICE, UpdateRequest,
};

fn write(at: &Path, name: &str, content: &str) {
    let path = at.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn read(at: &Path, name: &str) -> String {
    fs::read_to_string(at.join(name)).unwrap()
}

fn code<T>(answer: Result<T, snapshots::client::Failed>) -> Option<u32> {
    answer.err().map(|failed| failed.code)
}

// ------------------------------------------------------------------------------------ containerd's own suite

#[test]
fn a_layer_is_prepared_committed_and_built_upon() {
    let Some(mut lab) = Lab::new("a_layer_is_prepared_committed_and_built_upon", "") else {
        return;
    };
    let mounts = lab.prepare("extract-1", "").unwrap();
    assert!(!mounts.is_empty());
    let at = lab.mount(&mounts);
    write(&at, "foo", "foo\n");
    write(&at, "a/b/c/inner", "");
    lab.umount(&at);
    // The same mounts as often as they are asked for.
    assert_eq!(lab.mounts("extract-1").unwrap(), mounts);
    let info = lab.stat("extract-1").unwrap();
    assert_eq!((info.parent.as_str(), info.kind()), ("", Kind::Active));
    lab.commit("first", "extract-1").unwrap();
    let info = lab.stat("first").unwrap();
    assert_eq!(
        (info.name.as_str(), info.parent.as_str(), info.kind()),
        ("first", "", Kind::Committed)
    );
    assert_eq!(code(lab.stat("extract-1")), Some(NOT_FOUND));

    let mounts = lab.prepare("extract-2", "first").unwrap();
    let at = lab.mount(&mounts);
    assert_eq!(read(&at, "foo"), "foo\n");
    write(&at, "bar", "bar\n");
    fs::remove_file(at.join("foo")).unwrap();
    lab.umount(&at);
    assert_eq!(lab.stat("extract-2").unwrap().parent, "first");
    lab.commit("second", "extract-2").unwrap();
    lab.look("second", |at| {
        assert!(!at.join("foo").exists());
        assert_eq!(read(at, "bar"), "bar\n");
        assert!(at.join("a/b/c/inner").exists());
    });
    lab.look("first", |at| assert_eq!(read(at, "foo"), "foo\n"));
    let usage = lab.usage("second").unwrap();
    assert!(usage.size > 0 && usage.inodes >= 3, "{usage:?}");
    for name in ["second", "first"] {
        lab.remove(name).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn names_and_parents_are_checked() {
    let Some(mut lab) = Lab::new("names_and_parents_are_checked", "") else {
        return;
    };
    lab.layer("base", "", |at| write(at, "x", "x"));
    lab.prepare("active", "base").unwrap();
    lab.view("view", "base").unwrap();
    // Twice under one key, whatever it is.
    for key in ["active", "view", "base"] {
        assert_eq!(code(lab.prepare(key, "base")), Some(ALREADY_EXISTS), "{key}");
        assert_eq!(code(lab.view(key, "base")), Some(ALREADY_EXISTS), "{key}");
    }
    // Above what is not committed, or not there.
    for parent in ["active", "view"] {
        assert_eq!(code(lab.prepare("other", parent)), Some(INVALID_ARGUMENT), "{parent}");
        assert_eq!(code(lab.view("other", parent)), Some(INVALID_ARGUMENT), "{parent}");
    }
    assert_eq!(code(lab.prepare("other", "none")), Some(NOT_FOUND));
    assert_eq!(code(lab.view("other", "none")), Some(NOT_FOUND));
    assert_eq!(code(lab.prepare("", "base")), Some(INVALID_ARGUMENT));
    // Of nothing failed nothing is left.
    assert_eq!(code(lab.stat("other")), Some(NOT_FOUND));
    assert_eq!(code(lab.commit("base", "active")), Some(ALREADY_EXISTS));
    assert_eq!(code(lab.commit("name", "view")), Some(FAILED_PRECONDITION));
    assert_eq!(code(lab.commit("name", "base")), Some(FAILED_PRECONDITION));
    assert_eq!(code(lab.commit("name", "none")), Some(NOT_FOUND));
    assert_eq!(code(lab.mounts("none")), Some(NOT_FOUND));
    assert_eq!(code(lab.mounts("base")), Some(FAILED_PRECONDITION));
    assert_eq!(code(lab.usage("none")), Some(NOT_FOUND));
    assert_eq!(code(lab.remove("none")), Some(NOT_FOUND));
    assert_eq!(lab.names(), ["active", "base", "view"]);
    assert_eq!(
        lab.call_unknown("/containerd.services.snapshots.v1.Snapshots/Fly").code,
        UNIMPLEMENTED
    );
    assert_eq!(lab.call_unknown("/other.Service/Prepare").code, UNIMPLEMENTED);
    for key in ["active", "view", "base"] {
        lab.remove(key).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn what_has_children_is_not_removed() {
    let Some(mut lab) = Lab::new("what_has_children_is_not_removed", "") else {
        return;
    };
    lab.layer("1", "", |at| write(at, "1", ""));
    lab.layer("2", "1", |at| write(at, "2", ""));
    lab.layer("3", "2", |at| write(at, "3", ""));
    lab.prepare("active", "3").unwrap();
    lab.view("view", "2").unwrap();
    for name in ["1", "2", "3"] {
        assert_eq!(code(lab.remove(name)), Some(FAILED_PRECONDITION), "{name}");
    }
    lab.remove("active").unwrap();
    lab.remove("3").unwrap();
    assert_eq!(code(lab.remove("2")), Some(FAILED_PRECONDITION));
    lab.remove("view").unwrap();
    lab.remove("2").unwrap();
    lab.remove("1").unwrap();
    lab.assert_gone();
}

#[test]
fn a_view_is_read_only() {
    let Some(mut lab) = Lab::new("a_view_is_read_only", "") else {
        return;
    };
    lab.layer("1", "", |at| write(at, "a", "a"));
    lab.layer("2", "1", |at| write(at, "b", "b"));
    for name in ["1", "2", ""] {
        let mounts = lab.view("view", name).unwrap();
        let at = lab.mount(&mounts);
        let error = fs::write(at.join("new"), "x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{name}: {error}");
        lab.umount(&at);
        lab.remove("view").unwrap();
    }
    lab.look("2", |at| assert_eq!(read(at, "a") + &read(at, "b"), "ab"));
    for name in ["2", "1"] {
        lab.remove(name).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn changes_above_are_not_seen_below() {
    let Some(mut lab) = Lab::new("changes_above_are_not_seen_below", "") else {
        return;
    };
    lab.layer("1", "", |at| {
        write(at, "dir/lower", "lower");
        write(at, "moved/deep/file", "moved");
        write(at, "gone/file", "gone");
        write(at, "file", "one");
        write(at, "owned", "");
        fs::set_permissions(at.join("dir"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("file", at.join("link")).unwrap();
    });
    lab.layer("2", "1", |at| {
        // A file from below, moved; a directory replaced; one that is emptied and made again; owners and modes.
        fs::rename(at.join("dir/lower"), at.join("dir/renamed")).unwrap();
        fs::create_dir(at.join("elsewhere")).unwrap();
        fs::rename(at.join("moved/deep/file"), at.join("elsewhere/file")).unwrap();
        fs::remove_dir_all(at.join("gone")).unwrap();
        write(at, "gone/new", "new");
        write(at, "file", "two");
        chown(at.join("owned"), Some(77), Some(78)).unwrap();
        fs::set_permissions(at.join("owned"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::hard_link(at.join("owned"), at.join("owned-too")).unwrap();
    });
    lab.look("1", |at| {
        assert_eq!(
            read(at, "dir/lower") + &read(at, "gone/file") + &read(at, "file"),
            "lowergoneone"
        );
        assert_eq!(fs::metadata(at.join("owned")).unwrap().uid(), 0);
    });
    lab.look("2", |at| {
        assert_eq!(read(at, "dir/renamed"), "lower");
        assert!(!at.join("dir/lower").exists() && !at.join("moved/deep/file").exists());
        assert_eq!(read(at, "elsewhere/file"), "moved");
        assert!(!at.join("gone/file").exists());
        assert_eq!(read(at, "gone/new") + &read(at, "link"), "newtwo");
        let owned = fs::metadata(at.join("owned")).unwrap();
        assert_eq!(
            (owned.uid(), owned.gid(), owned.mode() & 0o7777, owned.nlink()),
            (77, 78, 0o4711, 2)
        );
        assert_eq!(fs::metadata(at.join("dir")).unwrap().mode() & 0o777, 0o700);
    });
    for name in ["2", "1"] {
        lab.remove(name).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn a_root_directory_belongs_to_whom_the_one_below_does() {
    let Some(mut lab) = Lab::new("a_root_directory_belongs_to_whom_the_one_below_does", "") else {
        return;
    };
    let mode_of = |at: &Path| fs::metadata(at).unwrap().mode() & 0o7777;
    lab.layer("1", "", |at| {
        assert_eq!(mode_of(at), 0o755);
        chown(at, Some(1), Some(2)).unwrap();
    });
    lab.layer("2", "1", |at| {
        let meta = fs::metadata(at).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (1, 2, 0o755));
    });
    for name in ["2", "1"] {
        lab.remove(name).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn layers_may_be_many() {
    const COUNT: usize = 128;
    let Some(mut lab) = Lab::new("layers_may_be_many", "") else {
        return;
    };
    let mut parent = String::new();
    for number in 1..=COUNT {
        let (name, key) = (format!("layer-{number}"), format!("key-{number}"));
        lab.prepare(&key, &parent).unwrap();
        // What an unpacker would have written: making 128 mounts of up to 128 directories takes long.
        let files = lab.dir().join(format!("r/snapshots/{number}/fs"));
        write(&files, &number.to_string(), "here");
        write(&files, "last", &number.to_string());
        lab.commit(&name, &key).unwrap();
        parent = name;
    }
    lab.look(&parent, |at| {
        assert!((1..=COUNT).all(|number| read(at, &number.to_string()) == "here"));
        assert_eq!(read(at, "last"), COUNT.to_string());
    });
    let mounts = lab.prepare("active", &parent).unwrap();
    let at = lab.mount(&mounts);
    write(&at, "last", "0");
    lab.umount(&at);
    lab.remove("active").unwrap();
    for number in (1..=COUNT).rev() {
        lab.remove(&format!("layer-{number}")).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn labels_and_times_are_kept_and_changed() {
    let Some(lab) = Lab::new("labels_and_times_are_kept_and_changed", "") else {
        return;
    };
    let labels = |info: &Info| {
        let all = info.labels.iter().map(|(key, value)| format!("{key}={value}"));
        all.collect::<Vec<_>>().join(" ")
    };
    lab.prepare_with("key", "", &[("a", "1"), ("containerd.io/gc.root", "x")])
        .unwrap();
    let active = lab.stat("key").unwrap();
    assert_eq!(labels(&active), "a=1 containerd.io/gc.root=x");
    assert!(active.created_at.unwrap().seconds > 1_700_000_000);
    lab.commit_with("name", "key", &[("b", "2"), ("c", "3")]).unwrap();
    let committed = lab.stat("name").unwrap();
    assert_eq!(labels(&committed), "b=2 c=3", "those of the commit and no others");
    let update = |info: Info, paths: &[&str]| UpdateRequest {
        snapshotter: "tarblk".to_owned(),
        info: Some(info),
        update_mask: (!paths.is_empty()).then(|| FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
    };
    let wanted = |labels: &[(&str, &str)]| Info {
        name: "name".to_owned(),
        labels: snapshots::labels_of(labels),
        ..Info::default()
    };
    let changed = lab
        .update(&update(wanted(&[("b", "4"), ("d", "5")]), &["labels.b", "labels.c"]))
        .unwrap();
    assert_eq!(labels(&changed), "b=4");
    assert!(changed.updated_at.unwrap().seconds >= committed.updated_at.unwrap().seconds);
    assert_eq!(
        (changed.created_at, changed.kind()),
        (committed.created_at, Kind::Committed)
    );
    let changed = lab.update(&update(wanted(&[("d", "5"), ("e.f", "6")]), &[])).unwrap();
    assert_eq!(labels(&changed), "d=5 e.f=6");
    let changed = lab.update(&update(wanted(&[("e.f", "7")]), &["labels.e.f"])).unwrap();
    assert_eq!(labels(&changed), "d=5 e.f=7");
    let changed = lab.update(&update(wanted(&[]), &["labels"])).unwrap();
    assert_eq!(labels(&changed), "");
    for path in ["name", "parent", "kind", "created"] {
        assert_eq!(
            code(lab.update(&update(wanted(&[]), &[path]))),
            Some(INVALID_ARGUMENT),
            "{path}"
        );
    }
    let nobody = Info {
        name: "none".to_owned(),
        ..Info::default()
    };
    assert_eq!(code(lab.update(&update(nobody, &[]))), Some(NOT_FOUND));
    lab.remove("name").unwrap();
    lab.assert_gone();
}

#[test]
fn lists_are_filtered_and_may_be_long() {
    let Some(lab) = Lab::new("lists_are_filtered_and_may_be_long", "") else {
        return;
    };
    for number in 0..250 {
        let label = format!("{}", number % 2);
        lab.prepare_with(&format!("key-{number:03}"), "", &[("x.y/odd", &label)])
            .unwrap();
    }
    lab.commit_with("base", "key-000", &[("containerd.io/snapshot.ref", "sha256:ab")])
        .unwrap();
    assert_eq!(lab.names().len(), 250);
    let count = |filters: &[&str]| lab.list(filters).unwrap().len();
    assert_eq!(count(&["labels.\"x.y/odd\"==1"]), 125);
    assert_eq!(count(&["kind==committed", "name==key-001"]), 2);
    assert_eq!(
        count(&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\""]),
        1
    );
    assert_eq!(
        count(&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"x\""]),
        0
    );
    assert_eq!(code(lab.list(&["name~=x"])), Some(INVALID_ARGUMENT));
    // Looked at while it is listed, as containerd's collector does.
    for info in lab.list(&[]).unwrap() {
        assert_eq!(lab.stat(&info.name).unwrap(), info);
        lab.remove(&info.name).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn usage_is_counted_as_containerd_counts() {
    let Some(mut lab) = Lab::new("usage_is_counted_as_containerd_counts", "") else {
        return;
    };
    let mounts = lab.prepare("key", "").unwrap();
    let before = lab.usage("key").unwrap();
    let at = lab.mount(&mounts);
    fs::write(at.join("big"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(at.join("big"), at.join("same")).unwrap();
    lab.umount(&at);
    let after = lab.usage("key").unwrap();
    assert_eq!(after.inodes, before.inodes + 1);
    assert!(
        (1 << 20..1 << 21).contains(&(after.size - before.size)),
        "{before:?} {after:?}"
    );
    lab.commit("name", "key").unwrap();
    assert_eq!(lab.usage("name").unwrap(), after);
    // Of what is above only its own.
    lab.prepare("above", "name").unwrap();
    assert!(lab.usage("above").unwrap().size < 1 << 16);
    lab.view("view", "name").unwrap();
    assert_eq!(lab.usage("view").unwrap().size, 0);
    for key in ["above", "view", "name"] {
        lab.remove(key).unwrap();
    }
    lab.assert_gone();
}

#[test]
fn answers_hold_overlay_and_bind_mounts_only() {
    let Some(mut lab) = Lab::new("answers_hold_overlay_and_bind_mounts_only", "") else {
        return;
    };
    let kinds = |mounts: Vec<Mount>| mounts.into_iter().map(|mount| mount.r#type).collect::<Vec<_>>();
    assert_eq!(kinds(lab.prepare("1-key", "").unwrap()), ["bind"]);
    lab.commit("1", "1-key").unwrap();
    assert_eq!(kinds(lab.view("view", "1").unwrap()), ["bind"]);
    assert_eq!(kinds(lab.prepare("2-key", "1").unwrap()), ["overlay"]);
    lab.commit("2", "2-key").unwrap();
    assert_eq!(kinds(lab.view("view-2", "2").unwrap()), ["overlay"]);
    // Above nothing, a view is an empty directory.
    let mounts = lab.view("nothing", "").unwrap();
    let at = lab.mount(&mounts);
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    lab.umount(&at);
    for key in ["nothing", "view-2", "view", "2", "1"] {
        lab.remove(key).unwrap();
    }
    lab.assert_gone();
}

// -------------------------------------------------------------------------------------------------- restarts

#[test]
fn nothing_that_was_answered_is_lost() {
    let Some(mut lab) = Lab::new("nothing_that_was_answered_is_lost", "") else {
        return;
    };
    // A kill after each answer; what the next process says is what this one said.
    let restart = |lab: &mut Lab| {
        let before = lab.list(&[]).unwrap();
        lab.kill();
        lab.start();
        assert_eq!(lab.list(&[]).unwrap(), before);
    };
    let mounts = lab.prepare_with("1-key", "", &[("a", "b")]).unwrap();
    restart(&mut lab);
    assert_eq!(lab.mounts("1-key").unwrap(), mounts);
    let at = lab.mount(&mounts);
    write(&at, "file", "content");
    // Mounts of a container are no business of the process that told of them.
    restart(&mut lab);
    write(&at, "more", "content");
    lab.umount(&at);
    lab.commit("1", "1-key").unwrap();
    restart(&mut lab);
    assert!(lab.usage("1").unwrap().inodes >= 3);
    let mounts = lab.prepare("2-key", "1").unwrap();
    restart(&mut lab);
    assert_eq!(lab.mounts("2-key").unwrap(), mounts);
    let at = lab.mount(&mounts);
    assert_eq!(read(&at, "file") + &read(&at, "more"), "contentcontent");
    lab.umount(&at);
    let own = lab.mount(&lab.view("view", "1").unwrap());
    restart(&mut lab);
    lab.umount(&own);
    for key in ["view", "2-key", "1"] {
        lab.remove(key).unwrap();
        restart(&mut lab);
    }
    lab.assert_gone();
}

#[test]
fn a_kill_during_a_call_leaves_all_or_nothing() {
    let Some(mut lab) = Lab::new("a_kill_during_a_call_leaves_all_or_nothing", "") else {
        return;
    };
    lab.layer("base", "", |at| write(at, "file", "content"));
    for round in 0..30_u64 {
        let pid = rustix::process::Pid::from_raw(i32::try_from(lab.pid()).unwrap()).unwrap();
        // Somewhere in the next few calls.
        let killer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_micros(300 * round));
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        let (key, name) = (format!("key-{round}"), format!("name-{round}"));
        let mut answered = Vec::new();
        answered.push(lab.prepare(&key, "base").is_ok());
        answered.push(answered[0] && lab.commit(&name, &key).is_ok());
        answered.push(answered[1] && lab.prepare(&format!("above-{round}"), &name).is_ok());
        killer.join().unwrap();
        lab.kill();
        lab.start();
        let names = lab.names();
        let has = |name: &str| names.iter().any(|known| known == name);
        // What was answered is there. The call that was cut short happened or did not, and can be made again either way.
        assert!(!answered[0] || has(&key) || has(&name), "{names:?}");
        assert!(!answered[1] || has(&name), "{names:?}");
        assert!(!answered[2] || has(&format!("above-{round}")), "{names:?}");
        if !has(&key) && !has(&name) {
            lab.prepare(&key, "base").unwrap();
        }
        if has(&name) {
            assert!(!has(&key));
        } else {
            lab.commit(&name, &key).unwrap();
        }
        lab.look(&name, |at| assert_eq!(read(at, "file"), "content"));
        for name in [format!("above-{round}"), name] {
            match lab.remove(&name) {
                Ok(()) => {}
                Err(failed) => assert_eq!(failed.code, NOT_FOUND, "{failed:?}"),
            }
        }
        lab.cleanup().unwrap();
    }
    lab.remove("base").unwrap();
    lab.assert_gone();
}

#[test]
fn calls_wait_at_a_socket_that_is_held() {
    let Some(mut lab) = Lab::new("calls_wait_at_a_socket_that_is_held", "") else {
        return;
    };
    lab.layer("base", "", |at| write(at, "file", "content"));
    lab.stop();
    // Its own socket went with it; from now on it gets one.
    assert!(!lab.address().exists());
    lab.hold_socket();
    lab.start();
    assert_eq!(lab.names(), ["base"]);
    let client = snapshots::client::Client::new(&lab.address());
    let stat = move || {
        let request = KeyRequest {
            key: "base".to_owned(),
            ..KeyRequest::default()
        };
        client.call::<InfoResponse>(&format!("{SERVICE}Stat"), &request)
    };
    lab.kill();
    let calling = std::thread::spawn(stat.clone());
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!calling.is_finished());
    lab.start();
    assert_eq!(calling.join().unwrap().unwrap().len(), 1);
    // What holds the socket goes on holding it after an orderly end, too.
    lab.remove("base").unwrap();
    lab.stop();
    assert!(lab.address().exists());
    let calling = std::thread::spawn(stat);
    lab.start();
    assert_eq!(calling.join().unwrap().unwrap_err().code, NOT_FOUND);
    lab.assert_gone();
}

#[test]
fn one_root_has_one_snapshotter() {
    let Some(lab) = Lab::new("one_root_has_one_snapshotter", "") else {
        return;
    };
    let config = lab.dir().join("snapshotter.toml");
    let other = lab.dir().join("other.sock");
    let mut command = lab.command(&[
        "snapshotter",
        "--config",
        config.to_str().unwrap(),
        "--address",
        other.to_str().unwrap(),
    ]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("another tarblk snapshotter uses"), "{said}");
    assert_eq!(lab.names(), [""; 0]);
    lab.assert_gone();
}
