//! The mounted device is what GNU tar extracts: names, types, modes, owners, times, sizes, links, devices, attributes and
//! content, for every dialect that any program writes. Here on the loop back end; on ublk in `guest.rs`.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::corpus::{self, Archive};
use common::session::{Session, leftovers};
use common::{gnu_tar_extract, no_loop_mounts, scratch, skip, tree};

/// Mounts every archive and compares; every difference of every archive is reported, not only the first.
fn compare_all(archives: &[Archive]) {
    let mut complaints = Vec::new();
    let mut session = Session::new("loop");
    for archive in archives {
        let extracted = session.dir().join("extracted");
        gnu_tar_extract(&archive.path, &extracted);
        let mounted = session.mount(archive.path.as_os_str());
        let differences = tree::differences(&extracted, &mounted, &archive.implied);
        eprintln!(
            "{}: {} names, {} differences",
            archive.name,
            tree::count(&mounted),
            differences.len()
        );
        complaints.extend(differences.into_iter().map(|line| format!("{}: {line}", archive.name)));
        session.umount();
        fs::remove_dir_all(&extracted).unwrap();
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert_eq!(leftovers(session.dir()), Vec::<String>::new());
}

#[test]
fn tars_made_by_hand_are_as_gnu_tar_extracts_them() {
    if let Some(why) = no_loop_mounts() {
        return skip("tars_made_by_hand_are_as_gnu_tar_extracts_them", why);
    }
    let work = scratch("by-hand-");
    compare_all(&corpus::by_hand(work.path()));
}

#[test]
fn tars_of_every_program_are_as_gnu_tar_extracts_them() {
    if let Some(why) = no_loop_mounts() {
        return skip("tars_of_every_program_are_as_gnu_tar_extracts_them", why);
    }
    let work = scratch("by-programs-");
    let archives = corpus::planted(work.path());
    assert!(archives.len() > 10, "only {} archives", archives.len());
    compare_all(&archives);
}

#[test]
fn a_debian_root_filesystem_is_as_gnu_tar_extracts_it() {
    const NAME: &str = "a_debian_root_filesystem_is_as_gnu_tar_extracts_it";
    if let Some(why) = no_loop_mounts() {
        return skip(NAME, why);
    }
    let Some(layer) = std::env::var_os("TARBLK_TEST_LAYER") else {
        return skip(NAME, "TARBLK_TEST_LAYER names no layer (tools/debian-layer makes one)");
    };
    let archive = Archive {
        name: "debian".to_owned(),
        path: layer.into(),
        implied: vec![],
    };
    compare_all(&[archive]);
}

/// What makes a copy another tree, under which name, and what the comparer then says.
type Change = (&'static str, fn(&Path), &'static str);

/// The comparer itself: a copy is no different, and every kind of change is seen.
#[test]
fn the_comparer_sees_every_change() {
    if !rustix::process::geteuid().is_root() {
        return skip("the_comparer_sees_every_change", "making devices needs root");
    }
    let work = scratch("comparer-");
    let original = work.path().join("original");
    corpus::plant(&original);
    let copy = |name: &str| -> PathBuf {
        let to = work.path().join(name);
        common::succeed(
            Command::new("cp")
                .arg("-a")
                .arg("--sparse=always")
                .arg(&original)
                .arg(&to),
        );
        to
    };
    assert_eq!(tree::differences(&original, &copy("same"), &[]), Vec::<String>::new());

    let changes: [Change; 9] = [
        (
            "missing",
            |dir| fs::remove_file(dir.join("size-1")).unwrap(),
            "size-1: missing",
        ),
        (
            "extra",
            |dir| fs::write(dir.join("extra"), b"").unwrap(),
            "extra: should not be there",
        ),
        (
            "mode",
            |dir| run("chmod", &["600", "size-1"], dir),
            "size-1: mode is 600, not 644",
        ),
        (
            "owner",
            |dir| run("chown", &["-h", "5:6", "links/absolute"], dir),
            "owner is (5, 6)",
        ),
        (
            "time",
            |dir| run("touch", &["-h", "-d", "@3.000000007", "nodes/pipe"], dir),
            "time is (3, 7)",
        ),
        (
            "content",
            |dir| overwrite(&dir.join("size-1048593"), 1_048_580),
            "content differs from byte 1048580 on",
        ),
        (
            "xattr",
            |dir| run("setfattr", &["-x", "user.empty", "attributes/empty"], dir),
            "xattrs",
        ),
        (
            "links",
            |dir| run("cp", &["-a", "--remove-destination", "links/one", "links/two"], dir),
            "first name",
        ),
        (
            "text",
            |dir| run("ln", &["-sfn", "other", "links/relative"], dir),
            "link text is \"other\"",
        ),
    ];
    for (name, change, expected) in changes {
        let other = copy(name);
        change(&other);
        let lines = tree::differences(&original, &other, &[]).join("\n");
        assert!(lines.contains(expected), "{name}: expected {expected:?} in:\n{lines}");
        fs::remove_dir_all(other).unwrap();
    }
}

fn run(program: &str, arguments: &[&str], dir: &Path) {
    common::succeed(
        Command::new(program)
            .args(arguments.iter().map(OsStr::new))
            .current_dir(dir),
    );
}

/// Changes one byte and leaves the time alone.
fn overwrite(file: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let times = fs::metadata(file).unwrap().modified().unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.set_modified(times).unwrap();
}
