//! docs/rules.md, line by line: the same tar unpacked by containerd (as an image's layer) and by GNU tar (by itself), and both
//! compared with what tarblk makes of it, mounted. What containerd refuses, tarblk refuses in an image.

mod common;
mod layered;
mod oracle;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::rawtar::{Header, RawTar};
use common::{gnu_tar_extract, have, scratch, skip, tree};
use oracle::Mounted;
use tarblk::internals::image::export::export;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::index::Index;
use tarblk::internals::index::build::{Contents, Recorder};
use tarblk::internals::tree::{TreeBuilder, TreeMode};

/// What of a case the programs can be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Both.
    Both,
    /// Both, and containerd refuses it.
    Refused,
    /// GNU tar alone: tarblk goes another way in images on purpose.
    Gnu,
    /// containerd alone: GNU tar says an error, or tarblk goes another way on purpose.
    Containerd,
}

struct Case {
    name: &'static str,
    tar: RawTar,
    ask: Ask,
    /// Directories that no entry makes: their times are anybody's.
    implied: Vec<PathBuf>,
}

fn case(name: &'static str, ask: Ask, tar: RawTar) -> Case {
    Case {
        name,
        tar,
        ask,
        implied: vec![PathBuf::new()],
    }
}

const ACCESS: &str = "SCHILY.xattr.system.posix_acl_access";
const DEFAULT: &str = "SCHILY.xattr.system.posix_acl_default";
const CAPABILITY: &str = "SCHILY.xattr.security.capability";
const CAP: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A list of access: tag, permissions, id.
fn list(entries: &[(u8, u8, u32)]) -> Vec<u8> {
    let entries = entries
        .iter()
        .flat_map(|(tag, permissions, id)| [&[*tag, 0, *permissions, 0][..], &id.to_le_bytes()].concat());
    [2, 0, 0, 0].into_iter().chain(entries).collect()
}

const NO_ID: u32 = u32::MAX;

/// A list with a user of its own and a mask.
fn full() -> Vec<u8> {
    list(&[
        (1, 6, NO_ID),
        (2, 7, 5),
        (4, 4, NO_ID),
        (0x10, 7, NO_ID),
        (0x20, 4, NO_ID),
    ])
}

fn file(name: &[u8]) -> Header {
    Header::new(b'0', name)
}

fn dir(name: &[u8], mode: u64) -> Header {
    Header::new(b'5', name).mode(mode)
}

fn hard(name: &[u8], target: &[u8]) -> Header {
    Header::new(b'1', name).link(target)
}

#[expect(clippy::too_many_lines, reason = "a list")]
fn cases() -> Vec<Case> {
    let new = RawTar::new;
    let with = |records: &[(&str, &[u8])], header: Header| new().pax(b'x', records).entry(header, &[]);
    let owner = |uid: i64| {
        let header = Header::gnu(b'0', b"a").base256(108, 8, uid).base256(116, 8, uid);
        new().entry(header, &[]).end()
    };
    let time = |time: &[u8]| with(&[("mtime", time)], file(b"a")).end();
    let attributes = |value: &[u8], name: &str, header: Header| with(&[(name, value)], header).end();
    let mut all = vec![
        case(
            "hard-link-attributes",
            Ask::Both,
            with(
                &[("SCHILY.xattr.user.k", b"v")],
                file(b"a").mode(0o4711).uid(7).gid(8).mtime(5),
            )
            .pax(b'x', &[("SCHILY.xattr.user.l", b"w"), ("mtime", b"9.25")])
            .entry(hard(b"b", b"a").mode(0o600).uid(3), &[])
            .end(),
        ),
        case(
            "hard-link-capability",
            Ask::Both,
            with(&[(CAPABILITY, &CAP)], file(b"a"))
                .entry(hard(b"b", b"a"), &[])
                .pax(b'x', &[(CAPABILITY, &CAP)])
                .entry(file(b"c"), &[])
                .pax(b'x', &[(CAPABILITY, &CAP)])
                .entry(hard(b"d", b"c"), &[])
                .end(),
        ),
        case(
            "hard-link-kinds",
            Ask::Both,
            new()
                .entry(Header::new(b'2', b"s").link(b"x"), &[])
                .entry(hard(b"s2", b"s").mode(0o600).uid(5).mtime(99), &[])
                .entry(Header::new(b'6', b"p"), &[])
                .entry(hard(b"p2", b"p").mode(0o600).uid(5).mtime(99), &[])
                .end(),
        ),
        case(
            "hard-link-owner-kept",
            Ask::Containerd,
            new()
                .entry(file(b"a").uid(7).gid(8), &[])
                .entry(
                    hard(b"b", b"a").mode(0o600).base256(108, 8, -1).base256(116, 8, -1),
                    &[],
                )
                .end(),
        ),
        case(
            "hard-link-time",
            Ask::Both,
            new()
                .entry(file(b"a").mtime(7), &[])
                .pax(b'x', &[("mtime", b"-3")])
                .entry(hard(b"b", b"a"), &[])
                .end(),
        ),
        case(
            "global-numbers",
            // containerd makes the directory of the global header's name.
            Ask::Gnu,
            new()
                .pax(b'g', &[("uid", b"7"), ("gid", b"8"), ("mtime", b"55.5")])
                .file(b"a", b"1")
                .pax(b'x', &[("uid", b"3")])
                .file(b"b", b"2")
                .end(),
        ),
        case(
            "global-numbers-in-images",
            Ask::Containerd,
            new()
                .dir(b"PaxHeaders/")
                .pax(
                    b'g',
                    &[
                        ("uid", b"7"),
                        ("mtime", b"55.5"),
                        ("SCHILY.xattr.user.g", b"1"),
                        ("path", b"z"),
                    ],
                )
                .dir(b"PaxHeaders/")
                .file(b"a", b"1")
                .pax(b'x', &[("uid", b"3"), ("path", b"b")])
                .file(b"short", b"2")
                .end(),
        ),
        case("time-before-1970", Ask::Both, time(b"-86400.5")),
        case("time-just-before-1970", Ask::Both, time(b"-0.000000001")),
        case("time-last-of-go", Ask::Both, time(b"9223372036.854775807")),
        case("time-behind-gos-last", Ask::Both, time(b"9223372036.854775808")),
        case("time-beyond-ext4", Ask::Both, time(b"20000000000")),
        case("time-long-ago", Ask::Both, time(b"-9999999999")),
        case(
            "time-base-256",
            Ask::Both,
            new().entry(Header::gnu(b'0', b"a").base256(136, 12, -2), &[]).end(),
        ),
        case(
            "gnu-and-pax-name",
            Ask::Both,
            new()
                .pax(b'x', &[("path", b"pax-1")])
                .gnu_long(b'L', b"gnu-1")
                .file(b"a", b"1")
                .gnu_long(b'L', b"gnu-2")
                .pax(b'x', &[("path", b"pax-2")])
                .file(b"b", b"2")
                .end(),
        ),
        case(
            "gnu-and-pax-link",
            Ask::Both,
            new()
                .gnu_long(b'K', b"one")
                .pax(b'x', &[("linkpath", b"two")])
                .link(b'2', b"s", b"three")
                .end(),
        ),
        case(
            "slash",
            Ask::Refused,
            new().entry(file(b"d/").mode(0o711), &[]).file(b"d/a", b"1").end(),
        ),
        case(
            "type-unknown",
            Ask::Refused,
            new()
                .entry(Header::new(b'A', b"a").size(3), b"abc")
                .file(b"b", b"1")
                .end(),
        ),
        case("lone-zero-block", Ask::Refused, {
            let mut tar = new().file(b"a", b"1");
            tar.0.resize(tar.0.len() + 512, 0);
            tar.file(b"b", b"2")
        }),
        case(
            "acl-and-mode",
            Ask::Both,
            attributes(&full(), ACCESS, file(b"a").mode(0o640)),
        ),
        case(
            "acl-without-mask",
            Ask::Both,
            attributes(
                &list(&[(1, 6, NO_ID), (4, 7, NO_ID), (0x20, 4, NO_ID)]),
                ACCESS,
                file(b"a").mode(0o640),
            ),
        ),
        case(
            "acl-with-mask-alone",
            Ask::Both,
            attributes(
                &list(&[(1, 6, NO_ID), (4, 7, NO_ID), (0x10, 7, NO_ID), (0x20, 4, NO_ID)]),
                ACCESS,
                file(b"a").mode(0o640),
            ),
        ),
        case("acl-empty", Ask::Both, attributes(b"", ACCESS, file(b"a"))),
        case(
            "acl-header-alone",
            Ask::Both,
            attributes(&list(&[]), ACCESS, file(b"a")),
        ),
        case(
            "acl-directory",
            Ask::Both,
            with(&[(ACCESS, &full()), (DEFAULT, &full())], dir(b"d/", 0o710)).end(),
        ),
        case(
            "acl-fifo",
            Ask::Both,
            attributes(&full(), ACCESS, Header::new(b'6', b"p").mode(0o640)),
        ),
        case(
            "acl-directory-again",
            // GNU tar's answer depends on --delay-directory-restore.
            Ask::Containerd,
            with(&[(ACCESS, &full())], dir(b"d/", 0o770))
                .entry(dir(b"d/", 0o700), &[])
                .end(),
        ),
        case(
            "acl-and-hard-link",
            Ask::Both,
            with(&[(ACCESS, &full())], file(b"a").mode(0o660))
                .entry(hard(b"b", b"a").mode(0o600), &[])
                .end(),
        ),
        case(
            "acl-symlink",
            Ask::Both,
            attributes(&full(), ACCESS, Header::new(b'2', b"s").link(b"x")),
        ),
        case(
            "capability-revision-3",
            Ask::Both,
            attributes(
                &[&[1, 0, 0, 3][..], &CAP[4..], &1000_u32.to_le_bytes()].concat(),
                CAPABILITY,
                file(b"a"),
            ),
        ),
        case(
            "capability-directory",
            Ask::Both,
            attributes(&CAP, CAPABILITY, dir(b"d/", 0o755)),
        ),
        case(
            "trusted",
            Ask::Both,
            with(
                &[("SCHILY.xattr.trusted.t", b"1"), ("SCHILY.xattr.user.u", b"2")],
                file(b"a"),
            )
            .end(),
        ),
        case(
            "libarchive",
            Ask::Both,
            attributes(b"b25l", "LIBARCHIVE.xattr.user.a", file(b"a")),
        ),
        case(
            "self-link",
            Ask::Gnu,
            new()
                .entry(file(b"a").mode(0o640).uid(7), &[])
                .entry(hard(b"./a", b"/a").mode(0o600), &[])
                .dir(b"d/")
                .entry(hard(b"d", b"d"), &[])
                .link(b'2', b"s", b"a")
                .entry(hard(b"s", b"s"), &[])
                .end(),
        ),
        case(
            "aufs-links",
            Ask::Gnu,
            new()
                .entry(dir(b".wh..wh.plnk/", 0o700), &[])
                .entry(file(b".wh..wh.plnk/1.2").mode(0o640).uid(3), &[])
                .entry(hard(b"one", b".wh..wh.plnk/1.2"), &[])
                .end(),
        ),
        Case {
            implied: vec![PathBuf::new(), "d/m".into()],
            ..case(
                "acl-inherited",
                Ask::Both,
                with(&[(DEFAULT, &full())], dir(b"d/", 0o755))
                    .entry(file(b"d/f").mode(0o640), &[])
                    .entry(dir(b"d/s/", 0o750), &[])
                    .entry(file(b"d/m/x").mode(0o600), &[])
                    .entry(Header::new(b'6', b"d/p").mode(0o640), &[])
                    .entry(Header::new(b'2', b"d/l").link(b"f"), &[])
                    .end(),
            )
        },
    ];
    // GNU tar says an error for what is out of range, and goes on; 4294967295 it takes.
    for (name, uid, ask) in [
        ("owner-minus-1", -1, Ask::Both),
        ("owner-minus-2", -2, Ask::Both),
        ("owner-minus-3", -3, Ask::Both),
        ("owner-last", 0xffff_fffe, Ask::Both),
        ("owner-all-ones", 0xffff_ffff, Ask::Both),
        ("owner-beyond", 1 << 32, Ask::Both),
        ("owner-far-beyond", (1 << 32) + 5, Ask::Both),
        ("owner-far-below", -(1 << 32) - 1, Ask::Both),
    ] {
        all.push(case(name, ask, owner(uid)));
    }
    for (name, value) in [
        ("refused-capability", (CAPABILITY, b"bad".to_vec())),
        ("refused-acl", (ACCESS, b"bad".to_vec())),
        (
            "refused-acl-order",
            (ACCESS, list(&[(0x20, 4, NO_ID), (1, 6, NO_ID), (4, 4, NO_ID)])),
        ),
        (
            "refused-acl-without-mask",
            (
                ACCESS,
                list(&[(1, 6, NO_ID), (2, 7, 5), (4, 4, NO_ID), (0x20, 4, NO_ID)]),
            ),
        ),
    ] {
        all.push(case(name, Ask::Gnu, attributes(&value.1, value.0, file(b"a"))));
    }
    all
}

/// The image that a tar becomes, in a file.
fn image(mode: TreeMode, tar: &[u8], to: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut recorder = Recorder::new(Contents::ENTRIES);
    recorder.feed(tar)?;
    let index = Index::open(recorder.finish()?.into_plain_index())?;
    let mut builder = TreeBuilder::with_mode(mode);
    match mode {
        TreeMode::Plain => index.replay(&mut builder)?,
        TreeMode::Merged | TreeMode::Overlay => index.replay_in_image(&mut builder)?,
    }
    let image = Ext4Image::plan(builder.finish(), &Ext4Options::default())?;
    export(&image, &File::create(to)?, &mut |_, at, buffer| {
        let at = usize::try_from(at.0).unwrap();
        buffer.copy_from_slice(&tar[at..at + buffer.len()]);
        Ok(())
    })?;
    oracle::assert_clean(to);
    Ok(())
}

/// A containerd of the test's own.
struct Containerd {
    process: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    /// `None` if it does not begin to answer.
    fn start() -> Option<Self> {
        let dir = scratch("containerd-");
        let top = dir.path().display();
        let config = format!(
            r#"
version = 2
root = "{top}/root"
state = "{top}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{top}/socket"
"#
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let process = Command::new("containerd")
            .arg("-c")
            .arg(dir.path().join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .ok()?;
        let started = Self { process, dir };
        for _ in 0..600 {
            let answers = started
                .ctr(&["version"])
                .output()
                .is_ok_and(|output| output.status.success());
            if answers {
                return Some(started);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("-a")
            .arg(self.dir.path().join("socket"))
            .args(["-n", "rules"]);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Unpacks an image of one layer, mounted at the returned directory; `None` if it refuses it.
    fn unpack(&self, name: &str, tar: &[u8]) -> Option<PathBuf> {
        let (layout, archive) = (self.dir.path().join(name), self.dir.path().join(format!("{name}.tar")));
        layered::write_oci_layout(&[tar.to_vec()], &layout);
        common::succeed(
            Command::new("tar")
                .arg("-C")
                .arg(&layout)
                .arg("-cf")
                .arg(&archive)
                .arg("."),
        );
        let base = format!("rules.invalid/{name}");
        let mut import = self.ctr(&["images", "import", "--snapshotter", "native", "--base-name", &base]);
        if !import.arg(&archive).output().unwrap().status.success() {
            return None;
        }
        let to = self.dir.path().join(format!("{name}.root"));
        fs::create_dir(&to).unwrap();
        let image = format!("{base}:test");
        common::succeed(
            self.ctr(&["images", "mount", "--snapshotter", "native", &image])
                .arg(&to),
        );
        Some(to)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let mounted = fs::read_dir(self.dir.path()).into_iter().flatten().flatten();
        for entry in mounted.filter(|entry| entry.path().extension().is_some_and(|end| end == "root")) {
            oracle::unmount(&entry.path());
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_tar_by_itself_is_what_gnu_tar_extracts() {
    const NAME: &str = "a_tar_by_itself_is_what_gnu_tar_extracts";
    if !oracle::can_mount() {
        return skip(NAME, "images cannot be mounted here");
    }
    let work = scratch("rules-gnu-");
    let mut complaints = Vec::new();
    for Case {
        name,
        tar,
        ask,
        implied,
    } in cases()
    {
        if ask == Ask::Containerd {
            continue;
        }
        let (path, to) = (work.path().join(format!("{name}.tar")), work.path().join(name));
        tar.write(&path);
        if name.starts_with("owner-") {
            // It complains of owners that Linux has not, and extracts.
            fs::create_dir(&to).unwrap();
            let mut command = Command::new("tar");
            command
                .args(["--numeric-owner", "-p", "-C"])
                .arg(&to)
                .arg("-xf")
                .arg(&path);
            command.output().unwrap();
        } else {
            gnu_tar_extract(&path, &to);
        }
        let file = work.path().join("image");
        image(TreeMode::Plain, &tar.0, &file).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = Mounted::new(&file).unwrap();
        let lines = tree::differences(&to, found.path(), &implied);
        complaints.extend(lines.into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn a_layer_of_an_image_is_what_containerd_makes_of_it() {
    const NAME: &str = "a_layer_of_an_image_is_what_containerd_makes_of_it";
    if !oracle::can_mount() {
        return skip(NAME, "images cannot be mounted here");
    }
    if !have("containerd") || !have("ctr") {
        return skip(NAME, "no containerd");
    }
    let Some(containerd) = Containerd::start() else {
        return skip(NAME, "containerd does not start here");
    };
    let work = scratch("rules-containerd-");
    let mut complaints = Vec::new();
    for Case {
        name,
        tar,
        ask,
        implied,
    } in cases()
    {
        if ask == Ask::Gnu {
            continue;
        }
        let file = work.path().join("image");
        let made = image(TreeMode::Merged, &tar.0, &file);
        let unpacked = containerd.unpack(name, &tar.0);
        assert_eq!(unpacked.is_none(), ask == Ask::Refused, "{name}: what containerd does");
        let Some(unpacked) = unpacked else {
            assert!(made.is_err(), "{name}: containerd refuses it");
            continue;
        };
        made.unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = Mounted::new(&file).unwrap();
        let lines = tree::differences(&unpacked, found.path(), &implied);
        complaints.extend(lines.into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
