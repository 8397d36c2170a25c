//! The mounted image of a tar equals GNU tar's extraction of it, whoever made the tar.

#![allow(clippy::unwrap_used)]

#[path = "common/noise.rs"]
mod noise;
mod oracle;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use noise::noise;
use oracle::{Mounted, assert_clean, assert_same, can_mount, extracted, have, image_of, snapshot};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lsetxattr, makedev, mknodat, utimensat,
};
use tarblk::internals::image::export::export;

fn set_time(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec {
        tv_sec: secs,
        tv_nsec: nanos,
    };
    utimensat(
        CWD,
        path,
        &Timestamps {
            last_access: time,
            last_modification: time,
        },
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

/// What every tar dialect can hold: whole seconds, short names, small ids.
fn make_plain(root: &Path) {
    fs::create_dir_all(root.join("usr/share/doc")).unwrap();
    for (number, len) in (0_u64..).zip([0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 300_001]) {
        fs::write(
            root.join(format!("usr/share/file-{len}")),
            noise(len, number * 1_000_003),
        )
        .unwrap();
    }
    symlink("share", root.join("usr/short")).unwrap();
    symlink("../dangling/nowhere", root.join("usr/dangling")).unwrap();
    symlink("t".repeat(59), root.join("s59")).unwrap();
    symlink("t".repeat(60), root.join("s60")).unwrap();
    symlink("t".repeat(99), root.join("s99")).unwrap();
    fs::hard_link(root.join("usr/share/file-513"), root.join("hard")).unwrap();
    fs::hard_link(root.join("usr/share/file-513"), root.join("usr/hard")).unwrap();
    for number in 0..400 {
        fs::write(
            root.join(format!("usr/share/doc/a-name-of-some-length-{number}")),
            number.to_string(),
        )
        .unwrap();
    }
    for (name, mode) in [("setuid", 0o4755), ("nothing", 0), ("setgid", 0o2710)] {
        fs::write(root.join(name), name).unwrap();
        std::os::unix::fs::lchown(root.join(name), Some(1000), Some(65_534)).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let node = |name: &str, kind, major, minor| {
        mknodat(
            CWD,
            root.join(name),
            kind,
            Mode::from_raw_mode(0o640),
            makedev(major, minor),
        )
        .unwrap();
    };
    node("fifo", FileType::Fifo, 0, 0);
    node("null", FileType::CharacterDevice, 1, 3);
    node("whiteout", FileType::CharacterDevice, 0, 0);
    node("disk", FileType::BlockDevice, 259, 70_000);
    fs::hard_link(root.join("fifo"), root.join("fifo-2")).unwrap();
    fs::hard_link(root.join("null"), root.join("null-2")).unwrap();
    for (path, secs) in [
        ("hard", 1),
        ("usr/short", 1_234_567_890),
        ("tmp", 2_000_000_000),
        ("usr", 999_999_999),
        ("", 86_400),
    ] {
        set_time(&root.join(path), secs, 0);
    }
}

/// What takes extension headers.
fn make_rich(root: &Path) {
    let long = "a-directory-with-quite-a-long-name/".repeat(8);
    fs::create_dir_all(root.join(&long)).unwrap();
    fs::write(root.join(&long).join("file"), "deep").unwrap();
    fs::write(root.join("n".repeat(255)), "long").unwrap();
    fs::write(root.join("new\nline and \u{e9}"), "odd").unwrap();
    fs::write(root.join("owner"), "x").unwrap();
    std::os::unix::fs::lchown(root.join("owner"), Some(3_000_000_000), Some(4_000_000_000)).unwrap();
    symlink("t".repeat(101), root.join("s101")).unwrap();
    symlink("t".repeat(4095), root.join("s4095")).unwrap();
    fs::hard_link(root.join(&long).join("file"), root.join("far-hard")).unwrap();
    for (name, secs, nanos) in [
        ("before", -1, 500_000_000),
        ("fine", 1_700_000_000, 123_456_789),
        ("late", 5_000_000_000, 1),
        ("old", -2_000_000_000, 0),
    ] {
        fs::write(root.join(name), name).unwrap();
        set_time(&root.join(name), secs, nanos);
    }
}

fn make_xattrs(root: &Path) {
    let set =
        |path: &str, name: &str, value: &[u8]| lsetxattr(root.join(path), name, value, XattrFlags::empty()).unwrap();
    fs::write(root.join("tagged"), "x").unwrap();
    set("tagged", "user.small", b"value");
    set("tagged", "user.empty", b"");
    set("tagged", "user.binary", &noise(64, 5));
    set("tagged", "trusted.t", b"t");
    fs::write(root.join("capable"), "x").unwrap();
    set(
        "capable",
        "security.capability",
        &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    fs::create_dir(root.join("directory")).unwrap();
    set("directory", "user.big", &noise(3000, 7));
    set("directory", "trusted.overlay.opaque", b"y");
    symlink("x", root.join("tagged-link")).unwrap();
    set("tagged-link", "trusted.l", b"l");
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 7, 1000),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 4, u32::MAX),
    ] {
        list.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        list.extend(id.to_le_bytes());
    }
    fs::write(root.join("listed"), "x").unwrap();
    set("listed", "system.posix_acl_access", &list);
    set("directory", "system.posix_acl_default", &list);
}

fn make_sparse(root: &Path) {
    let sparse = |name: &str, len: u64, pieces: &[(u64, usize)]| {
        let file = File::create(root.join(name)).unwrap();
        file.set_len(len).unwrap();
        for &(at, len) in pieces {
            file.write_all_at(&noise(len, at), at).unwrap();
        }
    };
    sparse("hole", 1 << 20, &[]);
    sparse("middle", 10 << 20, &[(1 << 20, 5000), (5 << 20, 100_000)]);
    sparse("ends", (40 << 20) + 77, &[(0, 10), ((40 << 20) + 70, 7)]);
    let many: Vec<_> = (0..200).map(|at| (at * 50_000, 4097)).collect();
    sparse("many", 10_000_000, &many);
    sparse("huge", 1 << 40, &[(1 << 39, 10)]);
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Compares the image of `tar` with what GNU tar makes of it.
#[track_caller]
fn check(tar: &Path) {
    let work = tempfile::tempdir().unwrap();
    let image = image_of(tar);
    let scratch = oracle::scratch();
    let path = scratch.path().join("image");
    let layer = File::open(tar).unwrap();
    let file = File::create(&path).unwrap();
    export(&image, &file, &mut |_, at, out| layer.read_exact_at(out, at.0)).unwrap();
    assert_clean(&path);
    let extraction = work.path().join("extraction");
    fs::create_dir(&extraction).unwrap();
    if let Some(mounted) = Mounted::new(&path) {
        assert_same(&snapshot(mounted.path()), &extracted(tar, &extraction));
    }
}

/// Makes a tree, then for each way of tarring it (run by `sh` with the tar as `$1`, in the tree) checks the tar.
#[track_caller]
fn check_all(make: &[fn(&Path)], ways: &[&str]) {
    if !can_mount() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for make in make {
        make(&tree);
    }
    let tar = work.path().join("layer.tar");
    for way in ways {
        if !have(way.split(' ').next().unwrap()) {
            continue;
        }
        eprintln!("{way}");
        let _ = fs::remove_file(&tar);
        run(Command::new("sh").args(["-ec", way, "sh"]).arg(&tar).current_dir(&tree));
        check(&tar);
    }
}

const PYTHON: &str = "python3 -c '
import sys, tarfile
with tarfile.open(sys.argv[2], \"w\", format=getattr(tarfile, sys.argv[1])) as tar: tar.add(\".\")
' ";

#[test]
fn plain_trees_in_every_dialect() {
    check_all(
        &[make_plain],
        &[
            "tar --format=gnu -cf $1 .",
            "tar --format=oldgnu -cf $1 .",
            "tar --format=posix -cf $1 .",
            "tar --format=ustar -cf $1 .",
            "tar --format=v7 --exclude=./fifo* --exclude=./null* --exclude=./whiteout --exclude=./disk -cf $1 .",
            "bsdtar --format=pax -cf $1 .",
            "bsdtar --format=gnutar -cf $1 .",
            "bsdtar --format=ustar -cf $1 .",
            &format!("{PYTHON} PAX_FORMAT $1"),
            &format!("{PYTHON} GNU_FORMAT $1"),
            &format!("{PYTHON} USTAR_FORMAT $1"),
        ],
    );
}

#[test]
fn long_names_wide_numbers_and_fine_times() {
    check_all(
        &[make_rich, make_plain],
        &[
            "tar --format=gnu -cf $1 .",
            "tar --format=posix -cf $1 .",
            "bsdtar --format=pax -cf $1 .",
            &format!("{PYTHON} PAX_FORMAT $1"),
            &format!("{PYTHON} GNU_FORMAT $1"),
        ],
    );
}

#[test]
fn extended_attributes() {
    check_all(
        &[make_xattrs],
        &["tar --format=posix --xattrs --xattrs-include=* -cf $1 ."],
    );
}

#[test]
fn sparse_files() {
    check_all(
        &[make_sparse],
        &[
            "tar --format=gnu -Scf $1 .",
            "tar --format=posix -S --sparse-version=0.0 -cf $1 .",
            "tar --format=posix -S --sparse-version=0.1 -cf $1 .",
            "tar --format=posix -S --sparse-version=1.0 -cf $1 .",
        ],
    );
}

/// The tar crate's own way, with entries that replace each other.
#[test]
fn the_tar_crate_and_duplicates() {
    let work = tempfile::tempdir().unwrap();
    let tar = work.path().join("layer.tar");
    let mut builder = tar::Builder::new(File::create(&tar).unwrap());
    let mut add = |kind: tar::EntryType, path: &str, link: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o640 });
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000_000);
        header.set_size(u64::try_from(content.len()).unwrap());
        if link.is_empty() {
            builder.append_data(&mut header, path, content).unwrap();
        } else {
            builder.append_link(&mut header, path, link).unwrap();
        }
    };
    add(tar::EntryType::Directory, "./", "", b"");
    add(tar::EntryType::Directory, "d", "", b"");
    add(tar::EntryType::Regular, "d/one", "", b"first");
    add(tar::EntryType::Link, "d/two", "d/one", b"");
    add(tar::EntryType::Regular, "d/one", "", b"second, other inode");
    add(tar::EntryType::Regular, "file-then-link", "", b"x");
    add(tar::EntryType::Symlink, "file-then-link", "d", b"");
    add(tar::EntryType::Symlink, "link-then-file", "d/one", b"");
    add(tar::EntryType::Regular, "link-then-file", "", b"not through the link");
    add(tar::EntryType::Directory, "d/sub", "", b"");
    add(tar::EntryType::Regular, "d/sub/x", "", b"stays");
    add(tar::EntryType::Directory, "d/sub", "", b"");
    add(tar::EntryType::Regular, &"long-".repeat(30), "", b"long name");
    builder.finish().unwrap();
    drop(builder);
    check(&tar);
}

/// A real layer, where one is named.
#[test]
fn a_layer_of_the_machines_owner() {
    match std::env::var_os("TARBLK_TEST_LAYER") {
        Some(layer) => check(Path::new(&layer)),
        None => eprintln!("SKIP: TARBLK_TEST_LAYER names no layer: no real one compared"),
    }
}
