//! The identity corpus: one tree of everything a filesystem can hold, packed by every program and dialect at hand, and
//! tars made byte by byte for what those programs do not write.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::noise::noise;
use super::rawtar::{Header, RawTar};
use super::{have, skip, succeed};

/// A tar of the corpus.
#[derive(Debug)]
pub(crate) struct Archive {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Directories that exist in it without being recorded; the empty path is the root.
    pub(crate) implied: Vec<PathBuf>,
}

/// Sizes around every border that a tar or a filesystem has.
const SIZES: [usize; 10] = [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_537, (1 << 20) + 17];

// ---------------------------------------------------------------------------------------------------- made by programs

/// A tree of everything: made on disk, so it needs root.
pub(crate) fn plant(root: &Path) {
    fs::create_dir_all(root).unwrap();
    for size in SIZES {
        fs::write(
            root.join(format!("size-{size}")),
            noise(size, u64::try_from(size).unwrap()),
        )
        .unwrap();
    }
    fs::create_dir(root.join("empty-dir")).unwrap();
    let deep = root.join("a").join("b").join("c").join("d");
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("leaf"), b"deep down\n").unwrap();

    names_and_links(root);
    modes_and_owners(root);
    special_files(root);
    sparse_files(root);
    attributes(root);

    // A directory big enough for an index of its own.
    fs::create_dir(root.join("many")).unwrap();
    for number in 0..1200 {
        fs::write(
            root.join("many").join(format!("entry-number-{number:05}")),
            number.to_string(),
        )
        .unwrap();
    }
    fixed_times(root);
}

fn names_and_links(root: &Path) {
    // Names: long ones, long paths, bytes that are not UTF-8, blanks and line ends, and what containers use as whiteouts.
    let names = root.join("names");
    fs::create_dir(&names).unwrap();
    fs::write(names.join("n".repeat(255)), b"255").unwrap();
    fs::write(names.join("m".repeat(101)), b"101").unwrap();
    fs::write(names.join(OsStr::from_bytes(b"latin-\xe9\xff")), b"bytes").unwrap();
    fs::write(names.join("blank and\nline"), b"blank").unwrap();
    fs::write(names.join("\u{fc}n\u{ef}code \u{1f980}"), b"utf-8").unwrap();
    fs::write(names.join(".wh.gone"), b"").unwrap();
    fs::write(names.join(".wh..wh..opq"), b"").unwrap();
    let mut long = names.clone();
    for part in 0..6 {
        long.push(format!("{part}-{}", "part".repeat(15)));
        fs::create_dir(&long).unwrap();
    }
    fs::write(long.join("file"), b"at the end of a long path").unwrap();

    // Links of both kinds; symbolic ones around the sizes that ext4 stores differently.
    let links = root.join("links");
    fs::create_dir(&links).unwrap();
    for len in [1, 59, 60, 100, 101, 255, 1000] {
        symlink("t".repeat(len), links.join(format!("symlink-{len}"))).unwrap();
    }
    symlink("../size-1", links.join("relative")).unwrap();
    symlink("/etc/passwd", links.join("absolute")).unwrap();
    symlink(OsStr::from_bytes(b"\xff\xfe"), links.join("to-bytes")).unwrap();
    fs::write(links.join("one"), b"one of three").unwrap();
    fs::hard_link(links.join("one"), links.join("two")).unwrap();
    fs::hard_link(links.join("one"), root.join("a/three")).unwrap();
    fs::hard_link(long.join("file"), links.join("to-a-long-path")).unwrap();
}

fn modes_and_owners(root: &Path) {
    for mode in [
        0o000, 0o400, 0o644, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777,
    ] {
        let file = root.join(format!("mode-{mode:04o}"));
        fs::write(&file, b"").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(root.join("sticky")).unwrap();
    fs::set_permissions(root.join("sticky"), Permissions::from_mode(0o1777)).unwrap();
    for (name, uid, gid) in [
        ("small-ids", 1000, 100),
        ("large-ids", 3_000_000_000, 4_000_000_000),
        ("ids", 65_534, 65_536),
    ] {
        fs::write(root.join(name), b"owned").unwrap();
        std::os::unix::fs::chown(root.join(name), Some(uid), Some(gid)).unwrap();
        symlink("owned", root.join(format!("{name}-link"))).unwrap();
        std::os::unix::fs::lchown(root.join(format!("{name}-link")), Some(uid), Some(gid)).unwrap();
    }
}

/// Devices and pipes; 0/0 is a whiteout of overlayfs.
fn special_files(root: &Path) {
    let nodes = root.join("nodes");
    fs::create_dir(&nodes).unwrap();
    for (name, kind, major, minor) in [
        ("null", FileType::CharacterDevice, 1, 3),
        ("whiteout", FileType::CharacterDevice, 0, 0),
        ("big", FileType::BlockDevice, 259, 70_000),
        ("vda", FileType::BlockDevice, 254, 0),
        ("pipe", FileType::Fifo, 0, 0),
    ] {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, nodes.join(name), kind, Mode::from_raw_mode(0o620), device).unwrap();
    }
}

/// Times come last, and those of directories after their content.
fn fixed_times(root: &Path) {
    let fixed = [
        ("size-1", 0, 0),
        ("size-511", 1, 1),
        ("size-512", 1_700_000_000, 999_999_999),
        ("size-513", -1, 500_000_000),
        ("size-4095", -2_000_000_000, 0),
        ("size-4096", 4_294_967_296, 123_456_789),
        ("size-4097", 2_147_483_648, 0),
        ("links/relative", 1_234_567_890, 987_654_321),
        ("nodes/pipe", 86_400, 250_000_000),
        ("names", 1_000_000_000, 1),
        ("links", 1_000_000_000, 2),
        ("many", 999_999_999, 999_999_999),
        ("", 1_600_000_000, 5),
    ];
    for (name, tv_sec, tv_nsec) in fixed {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        let path = if name.is_empty() {
            root.to_owned()
        } else {
            root.join(name)
        };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn sparse_files(root: &Path) {
    let sparse = root.join("sparse");
    fs::create_dir(&sparse).unwrap();
    let all_hole = File::create(sparse.join("all-hole")).unwrap();
    all_hole.set_len(3 << 20).unwrap();
    let pieces = File::create(sparse.join("pieces")).unwrap();
    pieces.set_len((8 << 20) + 777).unwrap();
    for piece in 0..30 {
        pieces.write_all_at(&noise(5000, piece), piece * 262_144).unwrap();
    }
    let tail = File::create(sparse.join("hole-then-data")).unwrap();
    tail.write_all_at(b"at the end", 1 << 20).unwrap();
    let head = File::create(sparse.join("data-then-hole")).unwrap();
    head.write_all_at(b"at the start", 0).unwrap();
    head.set_len(1 << 20).unwrap();
}

/// A POSIX ACL as the kernel's interface has it (`linux/posix_acl_xattr.h`): version 2, then tag, permissions and id of
/// every entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// `cap_net_bind_service=ep` as the kernel stores it: `vfs_cap_data` of revision 2 with the effective bit.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn sample_acl() -> Vec<u8> {
    let nobody = u32::MAX;
    acl(&[
        (1, 6, nobody),
        (2, 4, 1000),
        (2, 6, 70_000),
        (4, 4, nobody),
        (8, 5, 2000),
        (0x10, 6, nobody),
        (0x20, 0, nobody),
    ])
}

fn attributes(root: &Path) {
    let dir = root.join("attributes");
    fs::create_dir(&dir).unwrap();
    let set = |name: &str, attribute: &str, value: &[u8]| {
        let path = dir.join(name);
        if !path.exists() {
            fs::write(&path, name).unwrap();
        }
        rustix::fs::lsetxattr(&path, attribute, value, XattrFlags::empty())
            .unwrap_or_else(|e| panic!("{name}: {attribute}: {e}"));
    };
    set("small", "user.mime_type", b"text/plain");
    set("empty", "user.empty", b"");
    set("binary", "user.binary", b"a\0b\n=\xff");
    set("capable", "security.capability", &CAPABILITY);
    set("trusted", "trusted.overlay.opaque", b"y");
    set("acl", "system.posix_acl_access", &sample_acl());
    set("block", "user.big", &noise(2500, 7));
    set("block", "user.another", &noise(700, 8));
    for number in 0..30 {
        set(
            "many",
            &format!("user.attribute-{number:02}"),
            format!("value {number}").as_bytes(),
        );
    }
    fs::create_dir(dir.join("dir")).unwrap();
    set("dir", "user.on_a_dir", b"yes");
    set("dir", "system.posix_acl_default", &sample_acl());
}

/// Everything planted, packed by every program here in every dialect it has. A dialect that cannot hold something leaves
/// it out; what counts is what then is in the tar.
pub(crate) fn by_programs(tree: &Path, to: &Path) -> Vec<Archive> {
    let mut made = Vec::new();
    let mut add = |name: &str, command: &mut Command| {
        let path = to.join(format!("{name}.tar"));
        command.env("LC_ALL", "C.UTF-8");
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let size = fs::metadata(&path).map_or(0, |found| found.len());
        assert!(
            size > 1 << 20,
            "{command:?} made no tar: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        made.push(Archive {
            name: name.to_owned(),
            path,
            implied: vec![],
        });
    };

    let gnu = |name: &str, options: &[&str]| {
        let mut command = Command::new("tar");
        command.args(["--numeric-owner", "--warning=none"]).args(options);
        command
            .arg("-C")
            .arg(tree)
            .arg("-cf")
            .arg(to.join(format!("{name}.tar")))
            .arg(".");
        command
    };
    for format in ["v7", "oldgnu", "gnu", "ustar"] {
        let name = format!("gnutar-{format}");
        add(&name, &mut gnu(&name, &[&format!("--format={format}")]));
    }
    for format in ["oldgnu", "gnu"] {
        let name = format!("gnutar-{format}-sparse");
        add(&name, &mut gnu(&name, &[&format!("--format={format}"), "--sparse"]));
    }
    for version in ["0.0", "0.1", "1.0"] {
        let name = format!("gnutar-posix-sparse-{version}");
        let version = format!("--sparse-version={version}");
        add(
            &name,
            &mut gnu(
                &name,
                &["--format=posix", "--sparse", &version, "--xattrs", "--xattrs-include=*"],
            ),
        );
    }
    let name = "gnutar-posix-xattrs";
    add(
        name,
        &mut gnu(name, &["--format=posix", "--xattrs", "--xattrs-include=*"]),
    );
    let name = "gnutar-posix-plain";
    add(name, &mut gnu(name, &["--format=posix", "--sort=name"]));

    if have("bsdtar") {
        for format in ["v7", "ustar", "gnutar", "pax"] {
            let name = format!("bsdtar-{format}");
            let mut command = Command::new("bsdtar");
            command
                .args(["--numeric-owner", "--no-acls", &format!("--format={format}"), "-C"])
                .arg(tree);
            add(&name, command.arg("-cf").arg(to.join(format!("{name}.tar"))).arg("."));
        }
    } else {
        skip("corpus of bsdtar", "bsdtar is missing");
    }

    if have("python3") {
        for format in ["USTAR", "GNU", "PAX"] {
            let name = format!("python-{}", format.to_lowercase());
            let mut command = Command::new("python3");
            command
                .args(["-c", PYTHON_PACK, format])
                .arg(tree)
                .arg(to.join(format!("{name}.tar")));
            add(&name, &mut command);
        }
    } else {
        skip("corpus of Python", "python3 is missing");
    }

    // The tar crate writes times before 1970 as numbers that nobody reads.
    let path = to.join("rust-tar.tar");
    succeed(
        Command::new("touch")
            .args(["-d", "@7.5", "size-513", "size-4095"])
            .current_dir(tree),
    );
    let mut builder = tar::Builder::new(File::create(&path).unwrap());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", tree).unwrap();
    builder.finish().unwrap();
    made.push(Archive {
        name: "rust-tar".to_owned(),
        path,
        implied: vec![],
    });
    made
}

/// Adds what the dialect can hold, name by name: a ustar cannot hold all of them.
const PYTHON_PACK: &str = r#"
import os, sys, tarfile
form, tree, to = sys.argv[1:]
os.chdir(tree)
with tarfile.open(to, "w", format=getattr(tarfile, form + "_FORMAT")) as tar:
    tar.add(".", recursive=False)
    for root, dirs, files in os.walk("."):
        for name in sorted(dirs + files):
            try:
                tar.add(os.path.join(root, name), recursive=False)
            except ValueError:
                pass
"#;

// ---------------------------------------------------------------------------------------------------- made by hand

/// Tars made byte by byte. None needs root to be made.
pub(crate) fn by_hand(to: &Path) -> Vec<Archive> {
    let root = PathBuf::new();
    let cases: Vec<(&str, RawTar, Vec<PathBuf>)> = vec![
        ("v7-directories", v7_directories(), vec![root.clone()]),
        ("numbers", numbers(), vec![root.clone()]),
        ("signed-checksum", signed_checksum(), vec![root.clone()]),
        ("duplicates", duplicates(), vec![root.clone()]),
        (
            "missing-parents",
            missing_parents(),
            vec![root.clone(), "a".into(), "a/b".into(), "x".into(), "x/y".into()],
        ),
        ("spellings", spellings(), vec![root.clone(), "implied".into()]),
        ("sparse", sparse_by_hand(), vec![root.clone()]),
        ("global-headers", global_headers(), vec![root.clone()]),
        ("read-otherwise", read_otherwise(), vec![root.clone()]),
        ("links-again", links_again(), vec![root.clone()]),
        ("lone-zero-block", lone_zero_block(), vec![root.clone()]),
        ("times", times(), vec![root.clone()]),
        ("sizes", sizes(), vec![root.clone()]),
        ("gnu-long", gnu_long(), vec![root.clone()]),
        ("pax-long", pax_long(), vec![root.clone()]),
        ("hard-links", hard_links(), vec![root.clone()]),
        ("nodes", nodes(), vec![root.clone()]),
        ("root-entry", root_entry(), vec![]),
        (
            "no-end",
            RawTar::new().file(b"last", b"no zero blocks follow"),
            vec![root.clone()],
        ),
        ("junk-behind-the-end", junk_behind_the_end(), vec![root.clone()]),
        ("junk-in-padding", junk_in_padding(), vec![root.clone()]),
        ("attributes", attributes_by_hand(), vec![root.clone()]),
        ("link-text", link_text(), vec![root.clone()]),
        ("big-directory", big_directory(), vec![root.clone(), "d".into()]),
        ("empty", RawTar::new().end(), vec![root]),
    ];
    cases
        .into_iter()
        .map(|(name, tar, implied)| {
            let path = to.join(format!("hand-{name}.tar"));
            tar.write(&path);
            Archive {
                name: format!("hand-{name}"),
                path,
                implied,
            }
        })
        .collect()
}

fn v7_directories() -> RawTar {
    // V7 has no type for directories: the slash says it.
    RawTar::new()
        .entry(Header::v7(0, b"dir/").mode(0o750).mtime(1_000_000_000), &[])
        .entry(Header::v7(0, b"dir/file").size(5).mtime(1_000_000_001), b"hello")
        .entry(Header::v7(b'1', b"dir/linked").link(b"dir/file"), &[])
        .entry(Header::v7(b'2', b"dir/symlink").link(b"file"), &[])
        .end()
}

fn numbers() -> RawTar {
    RawTar::new()
        .entry(
            Header::gnu(b'0', b"base256-ids")
                .base256(108, 8, 3_000_000_000)
                .base256(116, 8, 4_000_000_000),
            &[],
        )
        .entry(Header::gnu(b'0', b"base256-size").base256(124, 12, 3), b"abc")
        .entry(Header::gnu(b'0', b"base256-before-1970").base256(136, 12, -86_401), &[])
        .entry(Header::gnu(b'0', b"base256-far").base256(136, 12, 10_000_000_000), &[])
        .entry(
            Header::new(b'0', b"spaces")
                .field(108, 8, b"   17 \0")
                .field(116, 8, b"    21 \0")
                .field(124, 12, b"          4 "),
            b"four",
        )
        .entry(
            Header::new(b'0', b"unterminated")
                .field(100, 8, b"00000755")
                .field(136, 12, b"001234567012"),
            &[],
        )
        .entry(Header::new(b'7', b"contiguous").size(3), b"abc")
        .end()
}

fn signed_checksum() -> RawTar {
    let name = b"\xff\xfe\xfd\xe9";
    RawTar::new()
        .signed_entry(Header::new(b'0', name).size(2), b"ok")
        .file(b"after", b"it")
        .end()
}

fn duplicates() -> RawTar {
    RawTar::new()
        .file(b"twice", b"first")
        .file(b"twice", b"the second wins")
        .file(b"old", b"old inode")
        .link(b'1', b"keeps-old", b"old")
        .file(b"old", b"new inode")
        .file(b"becomes-link", b"file")
        .link(b'2', b"becomes-link", b"elsewhere")
        .link(b'2', b"becomes-file", b"twice")
        .file(b"becomes-file", b"a file now")
        .entry(Header::new(b'5', b"dir/").mode(0o700).mtime(5), &[])
        .file(b"dir/inside", b"stays")
        .entry(Header::new(b'5', b"dir/").mode(0o711).uid(7).mtime(6), &[])
        .entry(Header::new(b'6', b"twice-pipe"), &[])
        .entry(Header::new(b'6', b"twice-pipe").mode(0o600), &[])
        .end()
}

fn missing_parents() -> RawTar {
    RawTar::new()
        .file(b"a/b/file", b"nobody recorded a or a/b")
        .link(b'2', b"x/y/symlink", b"../../a")
        .entry(Header::new(b'5', b"x/y/dir/").mode(0o700).mtime(9), &[])
        .link(b'1', b"x/hard", b"a/b/file")
        .end()
}

fn spellings() -> RawTar {
    RawTar::new()
        .file(b"./dot", b"1")
        .file(b"/absolute", b"2")
        .file(b"implied//double", b"3")
        .file(b"implied/./inner-dot", b"4")
        .entry(Header::new(b'5', b"./slashes///").mode(0o700), &[])
        .link(b'1', b"./hard-to-absolute", b"/absolute")
        .link(b'1', b"hard-to-dot", b"./dot")
        .end()
}

/// A map entry of GNU's old sparse headers.
fn sparse_entry(header: Header, slot: usize, offset: u64, len: u64) -> Header {
    header
        .octal(386 + slot * 24, 12, offset)
        .octal(398 + slot * 24, 12, len)
}

fn sparse_by_hand() -> RawTar {
    // Anywhere in the file, but only the last as long as it likes: GNU tar begins every piece at a block of the tar, other
    // readers right behind the one before.
    let pieces = [
        (10, noise(512, 1)),
        (700, noise(1024, 2)),
        (5000, noise(77, 3)),
        (9999, noise(0, 4)),
    ];
    let packed: Vec<u8> = pieces.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    let mut old = Header::gnu(b'S', b"old")
        .size(u64::try_from(packed.len()).unwrap())
        .octal(483, 12, 9999);
    let mut map_0_1 = Vec::new();
    let mut map_1_0 = format!("{}\n", pieces.len());
    for (slot, (offset, bytes)) in pieces.iter().enumerate() {
        let len = u64::try_from(bytes.len()).unwrap();
        old = sparse_entry(old, slot, *offset, len);
        map_0_1.push(format!("{offset},{len}"));
        writeln!(map_1_0, "{offset}\n{len}").unwrap();
    }
    let map_0_1 = map_0_1.join(",");
    let mut with_map = map_1_0.into_bytes();
    with_map.resize(512, 0);
    with_map.extend(&packed);
    let packed_size = u64::try_from(packed.len()).unwrap();
    RawTar::new()
        .entry(old, &packed)
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", b"9999"),
                ("GNU.sparse.numblocks", b"4"),
                ("GNU.sparse.map", map_0_1.as_bytes()),
                ("GNU.sparse.name", b"pax-0.1"),
            ],
        )
        .entry(Header::new(b'0', b"GNUSparseFile.0/x").size(packed_size), &packed)
        .pax(
            b'x',
            &[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"pax-1.0"),
                ("GNU.sparse.realsize", b"9999"),
            ],
        )
        .entry(
            Header::new(b'0', b"GNUSparseFile.0/y").size(512 + packed_size),
            &with_map,
        )
        .file(b"after", b"found its place")
        .end()
}

fn global_headers() -> RawTar {
    RawTar::new()
        .pax(
            b'g',
            &[("comment", b"0123456789"), ("uid", b"12"), ("mtime", b"100.25")],
        )
        .file(b"global", b"")
        .pax(b'x', &[("uid", b"13")])
        .file(b"local-wins", b"")
        .file(b"global-again", b"")
        // Both again: whether a global header takes back the one before is where readers differ.
        .pax(b'g', &[("uid", b"14"), ("mtime", b"200")])
        .file(b"next-global", b"")
        .end()
}

/// What GNU tar reads otherwise than containerd.
fn read_otherwise() -> RawTar {
    let long = |kind, name: &[u8]| {
        (
            Header::gnu(kind, b"././@LongLink").size(u64::try_from(name.len()).unwrap()),
            name.to_vec(),
        )
    };
    let (long_name, name) = long(b'L', b"long\0");
    let (long_link, target) = long(b'K', b"one\0");
    RawTar::new()
        .entry(long_name.clone(), &name)
        .pax(b'x', &[("path", b"pax-behind-gnu")])
        .file(b"short", b"1")
        .pax(b'x', &[("path", b"pax-before-gnu")])
        .entry(long_name, &name)
        .file(b"short", b"2")
        .entry(long_link, &target)
        .pax(b'x', &[("linkpath", b"two")])
        .entry(Header::new(b'2', b"symlink").link(b"three"), &[])
        // Types that nobody knows are files.
        .entry(Header::new(b'A', b"unknown-type").size(3).mode(0o604), b"acl")
        .entry(Header::new(b'9', b"unknown-type-slash/").size(3), b"abc")
        // A slash makes a directory.
        .entry(Header::new(b'0', b"slash/").mode(0o711), &[])
        .file(b"slash/inside", b"3")
        .end()
}

/// Hard links whose headers say something else, and links to themselves.
fn links_again() -> RawTar {
    RawTar::new()
        .entry(Header::new(b'0', b"file").size(2).mode(0o640).uid(1).mtime(5), b"hi")
        .pax(b'x', &[("SCHILY.xattr.user.k", b"v")])
        .entry(
            Header::new(b'1', b"link").link(b"file").mode(0o600).uid(3).mtime(9),
            &[],
        )
        .entry(Header::new(b'1', b"./file").link(b"file").mode(0o600), &[])
        .entry(Header::new(b'2', b"symlink").link(b"file"), &[])
        .entry(Header::new(b'1', b"symlink").link(b"symlink"), &[])
        .entry(Header::new(b'1', b"both").link(b"symlink").uid(9), &[])
        .end()
}

/// GNU tar takes one zero block for the end, whatever follows.
fn lone_zero_block() -> RawTar {
    let mut tar = RawTar::new().file(b"last", b"content");
    tar.0.extend_from_slice(&[0; 512]);
    tar.0.extend_from_slice(&[b'z'; 1024]);
    tar
}

fn times() -> RawTar {
    let times: [(&str, &[u8]); 9] = [
        ("half", b"1.5"),
        ("before", b"-1.5"),
        ("just-before", b"-0.000000001"),
        ("nine-digits", b"1234567890.123456789"),
        ("more-digits", b"1234567890.1234567891234"),
        ("whole", b"1234567890"),
        ("past-2038", b"4102444800.000000001"),
        ("long-ago", b"-2000000000.25"),
        ("trailing-point", b"12."),
    ];
    times
        .iter()
        .fold(RawTar::new(), |tar, (name, time)| {
            tar.pax(b'x', &[("mtime", *time)]).file(name.as_bytes(), b"")
        })
        .end()
}

fn sizes() -> RawTar {
    let tar = SIZES.iter().fold(RawTar::new(), |tar, &size| {
        tar.file(
            format!("size-{size}").as_bytes(),
            &noise(size, u64::try_from(size).unwrap()),
        )
    });
    // PAX's size rules over the header's, which may hold anything.
    tar.pax(b'x', &[("size", b"5")])
        .entry(Header::new(b'0', b"pax-size").size(0), b"12345")
        .file(b"after", b"")
        .end()
}

fn gnu_long() -> RawTar {
    let name = [b"d".repeat(200), b"/".to_vec(), b"f".repeat(255)].concat();
    let dir = [b"d".repeat(200), b"/".to_vec()].concat();
    let target = b"../".repeat(100);
    RawTar::new()
        .gnu_long(b'L', &dir)
        .entry(Header::gnu(b'5', &dir[..100]).mode(0o755), &[])
        .gnu_long(b'L', &name)
        .entry(Header::gnu(b'0', &name[..100]).size(4), b"long")
        .gnu_long(b'K', &target)
        .entry(Header::gnu(b'2', b"symlink").link(&target[..100]), &[])
        .gnu_long(b'K', &name)
        .gnu_long(b'L', b"both")
        .entry(Header::gnu(b'1', b"x").link(&name[..100]), &[])
        .end()
}

fn pax_long() -> RawTar {
    let dir = "p".repeat(150);
    let name = format!("{dir}/{}", "q".repeat(250));
    RawTar::new()
        .pax(b'x', &[("path", format!("{dir}/").as_bytes())])
        .entry(Header::new(b'5', b"short/").mode(0o755), &[])
        .pax(
            b'x',
            &[
                ("path", name.as_bytes()),
                ("uid", b"4000000000"),
                ("gid", b"3000000000"),
            ],
        )
        .file(b"short", b"content")
        // ustar's own way of long names: a prefix.
        .entry(
            Header::new(b'0', b"tail").field(345, 155, dir.as_bytes()).size(6),
            b"prefix",
        )
        .pax(b'x', &[("linkpath", name.as_bytes())])
        .link(b'1', b"hard", b"x")
        .pax(
            b'x',
            &[
                ("linkpath", &b"t".repeat(500)[..]),
                ("path", b"\xe9\xff-bytes"),
                ("hdrcharset", b"BINARY"),
            ],
        )
        .link(b'2', b"soft", b"x")
        .end()
}

fn hard_links() -> RawTar {
    RawTar::new()
        .file(b"file", b"named five times")
        .link(b'1', b"second", b"file")
        .link(b'1', b"third", b"second")
        .dir(b"dir/")
        .link(b'1', b"dir/fourth", b"./third")
        // Some programs record the file's size again; there is no payload behind it.
        .entry(Header::new(b'1', b"dir/fifth").link(b"dir/fourth").size(0), &[])
        .link(b'2', b"symlink", b"file")
        .link(b'1', b"same-symlink", b"symlink")
        .entry(Header::new(b'6', b"pipe"), &[])
        .link(b'1', b"same-pipe", b"pipe")
        .file(b"empty", b"")
        .link(b'1', b"same-empty", b"empty")
        .end()
}

fn nodes() -> RawTar {
    RawTar::new()
        .entry(Header::new(b'3', b"null").mode(0o666).device(1, 3), &[])
        .entry(Header::new(b'3', b"whiteout").mode(0).device(0, 0), &[])
        .entry(Header::new(b'4', b"disk").mode(0o660).gid(6).device(259, 70_000), &[])
        .entry(Header::new(b'4', b"far").device(4095, 0o3_777_777), &[])
        .entry(Header::new(b'6', b"pipe").mode(0o600).mtime(3), &[])
        .file(b".wh.removed", b"")
        .dir(b"opaque/")
        .file(b"opaque/.wh..wh..opq", b"")
        .end()
}

fn root_entry() -> RawTar {
    RawTar::new()
        .pax(b'x', &[("mtime", b"77.5"), ("SCHILY.xattr.user.on_the_root", b"yes")])
        .entry(Header::new(b'5', b"./").mode(0o1751).uid(11).gid(12), &[])
        .file(b"./file", b"below")
        .end()
}

fn junk_behind_the_end() -> RawTar {
    let mut tar = RawTar::new().file(b"kept", b"before the end").end();
    tar = tar.file(b"not-there", b"behind the end");
    tar.0.extend(noise(3000, 9));
    tar
}

/// What fills a payload's last block belongs to nobody and must not show up behind the file's end.
fn junk_in_padding() -> RawTar {
    let mut tar = RawTar::new();
    for size in [1_u64, 100, 511, 4095, 5000] {
        let mut content = noise(usize::try_from(size).unwrap(), size);
        content.resize(content.len().next_multiple_of(512), b'!');
        tar = tar.entry(
            Header::new(b'0', format!("size-{size}").as_bytes()).size(size),
            &content,
        );
    }
    tar.end()
}

fn attributes_by_hand() -> RawTar {
    let big = noise(3000, 5);
    RawTar::new()
        .pax(
            b'x',
            &[
                ("SCHILY.xattr.user.one", b"1"),
                ("SCHILY.xattr.user.two", b"two\nlines\0and a zero"),
            ],
        )
        .file(b"user", b"")
        .pax(b'x', &[("SCHILY.xattr.security.capability", &CAPABILITY)])
        .entry(Header::new(b'0', b"capable").mode(0o755), &[])
        .pax(b'x', &[("SCHILY.xattr.system.posix_acl_access", &sample_acl())])
        .entry(Header::new(b'0', b"acl").mode(0o660), &[])
        .pax(
            b'x',
            &[
                ("SCHILY.xattr.system.posix_acl_access", &sample_acl()),
                ("SCHILY.xattr.system.posix_acl_default", &sample_acl()),
            ],
        )
        .entry(Header::new(b'5', b"acl-dir/").mode(0o660), &[])
        .pax(b'x', &[("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .dir(b"opaque/")
        .pax(b'x', &[("SCHILY.xattr.user.big", &big)])
        .file(b"big", b"with content")
        .link(b'1', b"big-too", b"big")
        .pax(b'x', &[("SCHILY.xattr.security.test", b"on a link")])
        .link(b'2', b"symlink", b"target")
        .pax(b'x', &[("SCHILY.xattr.trusted.on", b"a pipe")])
        .entry(Header::new(b'6', b"pipe"), &[])
        .end()
}

fn link_text() -> RawTar {
    [1, 58, 59, 60, 61, 100, 4095]
        .into_iter()
        .fold(RawTar::new(), |tar, len| {
            tar.pax(b'x', &[("linkpath", &b"z".repeat(len)[..])])
                .link(b'2', format!("text-{len}").as_bytes(), b"x")
        })
        .link(b'2', b"strange", b"\x01\xff ../..//.")
        .end()
}

fn big_directory() -> RawTar {
    (0..3000)
        .fold(RawTar::new(), |tar, number| {
            let mut name = format!("d/{number:04}-").into_bytes();
            name.extend(std::iter::repeat_n(
                b'a' + u8::try_from(number % 26).unwrap(),
                number % 90,
            ));
            name.push(u8::try_from(128 + number % 128).unwrap());
            tar.file(&name, format!("{number}").as_bytes())
        })
        .end()
}

/// Test archives of Go's tar reader, where Debian's package of Go's sources is installed; only those that GNU tar
/// extracts without complaint can be compared with it.
pub(crate) fn of_go() -> BTreeMap<OsString, PathBuf> {
    let Ok(versions) = fs::read_dir("/usr/share") else {
        return BTreeMap::new();
    };
    versions
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().starts_with(b"go-"))
        .map(|entry| entry.path().join("src/archive/tar/testdata"))
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
        .filter(|entry| entry.path().extension() == Some(OsStr::new("tar")))
        .map(|entry| (entry.file_name(), entry.path()))
        .collect()
}

/// Plants the tree and packs it with every program, below `to`.
pub(crate) fn planted(to: &Path) -> Vec<Archive> {
    let tree = to.join("tree");
    plant(&tree);
    let archives = by_programs(&tree, to);
    succeed(Command::new("rm").arg("-rf").arg(&tree));
    archives
}
