//! `tarblk install`: what it puts on a machine, what it leaves alone there, and what `--remove` leaves. The machine is a directory.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{scratch, skip};

const TARBLK: &str = env!("CARGO_BIN_EXE_tarblk");

fn install(root: &Path, more: &[&str]) -> Output {
    Command::new(TARBLK)
        .args(["install", "--root"])
        .arg(root)
        .args(more)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "only root can install");
    }
    root
}

/// All files and links below a directory, relative to it.
fn files(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(dir).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_machine_gets_all_and_keeps_its_settings() {
    if !is_root("a_machine_gets_all_and_keeps_its_settings") {
        return;
    }
    let machine = scratch("install-");
    let root = machine.path();
    // As on machines whose /sbin is a link.
    fs::create_dir_all(root.join("usr/sbin")).unwrap();
    symlink("/usr/sbin", root.join("sbin")).unwrap();
    let done = install(root, &["--prefix", "/opt/tarblk"]);
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("systemctl daemon-reload"), "{}", said(&done));

    let program = root.join("opt/tarblk/bin/tarblk");
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o7777, 0o755);
    let version = Command::new(&program).arg("--version").output().unwrap();
    assert_eq!(
        version.stdout,
        Command::new(TARBLK).arg("--version").output().unwrap().stdout
    );
    assert_eq!(
        fs::read_link(root.join("usr/sbin/mount.tarblk")).unwrap(),
        Path::new("/opt/tarblk/bin/tarblk")
    );
    for unit in ["tarblk.service", "tarblk-snapshotter.service"] {
        let text = fs::read_to_string(root.join("etc/systemd/system").join(unit)).unwrap();
        assert!(text.contains("\nExecStart=/opt/tarblk/bin/tarblk "), "{text}");
        assert!(!text.contains("/usr/bin/tarblk"), "{text}");
    }
    for there in [
        "opt/tarblk/share/man/man1/tarblk-install.1",
        "opt/tarblk/share/bash-completion/completions/tarblk",
        "etc/systemd/system/tarblk-snapshotter.socket",
        "etc/tarblk/tarblk.toml",
        "etc/tarblk/snapshotter.toml",
        "etc/tarblk/keys.d/README",
    ] {
        assert!(root.join(there).is_file(), "{there}");
    }

    // Another version in place of this one, while that runs.
    fs::write(root.join("etc/tarblk/tarblk.toml"), "trust = \"registry\"\n").unwrap();
    let before = files(root);
    let again = Command::new(&program)
        .args(["install", "--prefix", "/opt/tarblk", "--root"])
        .arg(root)
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", said(&again));
    assert_eq!(files(root), before);
    assert_eq!(
        fs::read_to_string(root.join("etc/tarblk/tarblk.toml")).unwrap(),
        "trust = \"registry\"\n"
    );

    let removed = install(root, &["--prefix", "/opt/tarblk", "--remove"]);
    assert!(removed.status.success(), "{}", said(&removed));
    let left: Vec<_> = files(root)
        .into_iter()
        .map(|path| path.to_str().unwrap().to_owned())
        .collect();
    let settings = [
        "etc/tarblk/keys.d/README",
        "etc/tarblk/snapshotter.toml",
        "etc/tarblk/tarblk.toml",
    ];
    assert_eq!(left, [&settings[..], &["sbin"]].concat());
    let nothing = install(root, &["--prefix", "/opt/tarblk", "--remove"]);
    assert!(said(&nothing).contains("removed 0 files"), "{}", said(&nothing));
}

#[test]
fn a_machine_without_systemd_is_told_what_to_start() {
    if !is_root("a_machine_without_systemd_is_told_what_to_start") {
        return;
    }
    let machine = scratch("install-");
    let done = install(machine.path(), &["--enable"]);
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("no systemd runs there"), "{}", said(&done));
}

#[test]
fn nothing_is_installed_where_others_could_have_put_a_link() {
    if !is_root("nothing_is_installed_where_others_could_have_put_a_link") {
        return;
    }
    let machine = scratch("install-");
    let root = machine.path();
    fs::create_dir_all(root.join("usr/local")).unwrap();
    fs::set_permissions(root.join("usr/local"), fs::Permissions::from_mode(0o777)).unwrap();
    let refused = install(root, &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said(&refused).contains("/usr/local: others may write to it"),
        "{}",
        said(&refused)
    );
    assert!(files(root).is_empty());

    let nowhere = install(&root.join("none"), &[]);
    assert!(said(&nowhere).contains("No such file"), "{}", said(&nowhere));
    let relative = install(root, &["--prefix", "opt"]);
    assert!(said(&relative).contains("no absolute path"), "{}", said(&relative));
}
