//! Images at and beyond the edges of what ext4 can hold, by e2fsck and the kernel's driver.

#![allow(clippy::unwrap_used)]

#[path = "common/noise.rs"]
mod noise;
mod oracle;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use noise::noise;
use oracle::{Payload, check_entries, expected, image_of_entries, write_image};
use tarblk::internals::image::ImageError;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::index::{Entry, Kind, Segment, Timestamp, Xattr};
use tarblk::internals::tree::TreeBuilder;
use tarblk::internals::units::TarOffset;

fn entry(path: impl Into<Vec<u8>>, kind: Kind) -> Entry {
    let mtime = Timestamp {
        secs: 1_600_000_000,
        nanos: 123_456_789,
    };
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime,
        ..Entry::default()
    }
}

fn root() -> Entry {
    Entry {
        mode: 0o755,
        ..entry("./", Kind::Directory)
    }
}

/// A file with `size` stored bytes from `at` on.
fn file(path: impl Into<Vec<u8>>, at: u64, size: u64) -> Entry {
    let whole = Segment {
        file_offset: 0,
        tar_offset: TarOffset(at),
        len: size,
    };
    Entry {
        size,
        segments: (size > 0).then_some(whole).into_iter().collect(),
        ..entry(path, Kind::File)
    }
}

fn link(path: impl Into<Vec<u8>>, kind: Kind, to: impl Into<Vec<u8>>) -> Entry {
    Entry {
        link: to.into(),
        ..entry(path, kind)
    }
}

fn plan_error(entries: &[Entry]) -> ImageError {
    let mut builder = TreeBuilder::new();
    for entry in entries {
        builder.push(entry).unwrap();
    }
    Ext4Image::plan(builder.finish(), &Ext4Options::default()).unwrap_err()
}

#[test]
fn nothing_but_a_root() {
    check_entries(&[root()], Payload::Dense);
}

#[test]
fn every_kind_and_every_edge_of_a_file() {
    let mut entries = vec![root()];
    for (at, size) in (0_u64..).zip([0, 1, 511, 4095, 4096, 4097, 100_000, 1 << 20]) {
        entries.push(file(format!("file-{size}"), at * 2_000_003 + 512, size));
    }
    for len in [1, 58, 59, 60, 61, 4094, 4095] {
        entries.push(link(format!("symlink-{len}"), Kind::Symlink, vec![b't'; len]));
    }
    for (kind, major, minor) in [
        (Kind::CharDevice, 0, 0),
        (Kind::CharDevice, 1, 3),
        (Kind::BlockDevice, 259, 70_000),
        (Kind::CharDevice, 4095, 1_048_575),
        (Kind::BlockDevice, 255, 255),
        (Kind::BlockDevice, 0, 256),
    ] {
        let path = format!("device-{major}-{minor}");
        entries.push(Entry {
            device_major: major,
            device_minor: minor,
            ..entry(path, kind)
        });
    }
    entries.push(entry("fifo", Kind::Fifo));
    entries.push(file("lost+found", 512, 3));
    for (name, target) in [
        ("file-l", "file-4097"),
        ("symlink-l", "symlink-60"),
        ("device-l", "device-1-3"),
        ("fifo-l", "fifo"),
    ] {
        entries.push(link(name, Kind::Hardlink, target));
        entries.push(link(format!("{name}-2"), Kind::Hardlink, target));
    }
    for mode in [0, 0o7777, 0o4755, 0o2711, 0o1777] {
        entries.push(Entry {
            mode,
            ..file(format!("mode-{mode:o}"), 512, 5)
        });
        entries.push(Entry {
            mode,
            ..entry(format!("directory-{mode:o}"), Kind::Directory)
        });
    }
    for (uid, gid) in [(65_535, 65_536), (3_000_000_000, 4_000_000_000), (4_294_967_294, 0)] {
        entries.push(Entry {
            uid,
            gid,
            ..file(format!("owner-{uid}"), 512, 5)
        });
    }
    for secs in [
        -0x8000_0000,
        -2,
        -1,
        0,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x2_5000_0000,
        0x3_7fff_ffff,
    ] {
        let nanos = if [-0x8000_0000, 0x3_7fff_ffff].contains(&secs) {
            0
        } else {
            999_999_999
        };
        entries.push(Entry {
            mtime: Timestamp { secs, nanos },
            ..file(format!("time-{secs}"), 512, 5)
        });
    }
    let names: [&[u8]; 6] = [
        b"new\nline",
        b"\xff\xfe",
        "\u{e9}t\u{e9}".as_bytes(),
        b" ",
        b"\\",
        &[b'n'; 255],
    ];
    entries.extend(names.map(|name| file(name, 512, 7)));
    check_entries(&entries, Payload::Dense);
}

#[test]
fn times_beyond_the_format_become_the_nearest() {
    let early = Entry {
        mtime: Timestamp {
            secs: i64::MIN,
            nanos: 7,
        },
        ..file("early", 512, 1)
    };
    let late = Entry {
        mtime: Timestamp {
            secs: i64::MAX,
            nanos: 7,
        },
        ..file("late", 512, 1)
    };
    let image = image_of_entries(&[root(), early, late]);
    let directory = oracle::scratch();
    let path = directory.path().join("image");
    write_image(&image, Payload::Dense, &path);
    oracle::assert_clean(&path);
    let Some(mounted) = oracle::Mounted::new(&path) else {
        return;
    };
    let time = |name: &str| {
        let metadata = fs::metadata(mounted.path().join(name)).unwrap();
        (metadata.mtime(), metadata.mtime_nsec())
    };
    assert_eq!((time("early"), time("late")), ((-0x8000_0000, 0), (0x3_7fff_ffff, 0)));
}

fn xattr(name: &str, value: impl Into<Vec<u8>>) -> Xattr {
    Xattr {
        name: name.into(),
        value: value.into(),
    }
}

fn with_xattrs(path: &str, kind: Kind, mut xattrs: Vec<Xattr>) -> Entry {
    xattrs.sort();
    Entry {
        xattrs,
        mode: 0o644,
        ..entry(path, kind)
    }
}

/// An access control list as the system call has it: owner, user 1000, group, mask, others.
fn acl() -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 7, 1000),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 4, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn extended_attributes_of_every_size_that_fits_one_block() {
    let mut entries = vec![Entry {
        xattrs: vec![xattr("trusted.overlay.opaque", "y")],
        ..root()
    }];
    // 88 bytes behind the inode; 4060 in a block.
    for len in (0..8).chain(60..76).chain([2000]).chain(4030..=4040) {
        entries.push(with_xattrs(
            &format!("one-{len}"),
            Kind::File,
            vec![xattr("user.a", noise(len, 99))],
        ));
    }
    for len in [0, 1, 20, 40, 3900] {
        let several = [
            ("user.a", 1),
            ("user.long_name_of_an_attribute", 9),
            ("trusted.x", len),
            ("security.y", 30),
        ];
        let several = several.map(|(name, len)| xattr(name, noise(len, 99))).to_vec();
        entries.push(with_xattrs(&format!("several-{len}"), Kind::Directory, several));
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    entries.push(with_xattrs(
        "capability",
        Kind::File,
        vec![xattr("security.capability", capability)],
    ));
    entries.push(with_xattrs(
        "non-ascii",
        Kind::File,
        vec![xattr("user.n\u{e4}me", noise(200, 99))],
    ));
    entries.push(with_xattrs(
        "link",
        Kind::Symlink,
        vec![xattr("trusted.overlay.x", "y"), xattr("security.z", noise(300, 99))],
    ));
    entries.last_mut().unwrap().link = vec![b'x'; 100];
    entries.push(with_xattrs("fifo", Kind::Fifo, vec![xattr("trusted.a", "")]));
    entries.push(with_xattrs(
        "with-acl",
        Kind::Directory,
        vec![
            xattr("system.posix_acl_access", acl()),
            xattr("system.posix_acl_default", acl()),
            xattr("user.b", "c"),
        ],
    ));
    let (checked, _) = check_entries(&entries, Payload::Dense);
    drop(checked);
    // Labelled trees: thousands of inodes share one set.
    let labelled = |number| {
        with_xattrs(
            &format!("f{number}"),
            Kind::File,
            vec![xattr("security.selinux", "system_u:object_r:bin_t:s0\0")],
        )
    };
    let entries: Vec<_> = std::iter::once(root()).chain((0..1000).map(labelled)).collect();
    check_entries(&entries, Payload::Dense);
}

#[test]
fn extended_attributes_past_a_block_get_inodes() {
    let mut entries = vec![root()];
    for len in [4041, 4096, 4097, 65_535, 65_536] {
        entries.push(with_xattrs(
            &format!("one-{len}"),
            Kind::File,
            vec![xattr("user.big", noise(len, 99))],
        ));
        entries.push(with_xattrs(
            &format!("same-{len}"),
            Kind::File,
            vec![xattr("user.big", noise(len, 99))],
        ));
    }
    let many = (0..40)
        .map(|number| xattr(&format!("user.number-{number}"), noise(3000 + number, 99)))
        .collect();
    entries.push(with_xattrs("many", Kind::Directory, many));
    let mixed = vec![
        xattr("user.a", "inline"),
        xattr("user.b", noise(1500, 99)),
        xattr("user.c", noise(60_000, 99)),
        xattr("trusted.d", noise(2000, 99)),
    ];
    entries.push(with_xattrs("mixed", Kind::File, mixed.clone()));
    entries.push(with_xattrs("mixed-2", Kind::Directory, mixed));
    check_entries(&entries, Payload::Dense);
}

#[test]
fn extended_attributes_that_linux_would_not_set_are_left_out() {
    let odd = vec![
        xattr("user.a", "1"),
        xattr("system.odd", "2"),
        xattr("btrfs.compression", "zstd"),
        xattr("user.", "3"),
    ];
    let entries = [
        root(),
        with_xattrs("file", Kind::File, odd.clone()),
        Entry {
            link: b"x".to_vec(),
            ..with_xattrs("link", Kind::Symlink, odd)
        },
        with_xattrs(
            "default-on-file",
            Kind::File,
            vec![xattr("system.posix_acl_default", acl())],
        ),
    ];
    let image = image_of_entries(&entries);
    let directory = oracle::scratch();
    let path = directory.path().join("image");
    write_image(&image, Payload::Dense, &path);
    oracle::assert_clean(&path);
    if let Some(mounted) = oracle::Mounted::new(&path) {
        let mut expected = expected(&entries, Payload::Dense);
        expected
            .get_mut(&b"file"[..])
            .unwrap()
            .xattrs
            .retain(|name, _| name == b"user.a");
        expected.get_mut(&b"link"[..]).unwrap().xattrs.clear();
        expected.get_mut(&b"default-on-file"[..]).unwrap().xattrs.clear();
        oracle::assert_same(&oracle::snapshot(mounted.path()), &expected);
    }
    // What the kernel refuses to set is left out.
    let damaged = with_xattrs(
        "d",
        Kind::File,
        vec![
            xattr("system.posix_acl_access", "x"),
            xattr("security.capability", "bad"),
        ],
    );
    image_of_entries(&[damaged]);
    let many = (0..300)
        .map(|number| xattr(&format!("user.{number:0>200}"), "v"))
        .collect();
    assert!(matches!(
        plan_error(&[with_xattrs("m", Kind::File, many)]),
        ImageError::Xattrs { count: 300, .. }
    ));
}

#[test]
fn what_ext4_cannot_hold_is_refused() {
    let device = Entry {
        device_major: 4096,
        ..entry("a", Kind::CharDevice)
    };
    assert_eq!(
        plan_error(&[device]),
        ImageError::Device {
            path: "a".into(),
            major: 4096,
            minor: 0
        }
    );
    let device = Entry {
        device_minor: 1 << 20,
        ..entry("a", Kind::BlockDevice)
    };
    assert!(matches!(plan_error(&[device]), ImageError::Device { .. }));
    let huge = Entry {
        size: (1 << 44) - 4095,
        ..entry("d/huge", Kind::File)
    };
    assert!(
        plan_error(&[huge])
            .to_string()
            .starts_with("d/huge: a file of 17592186040321 bytes")
    );
    assert!(matches!(
        plan_error(&[file("a", 0, (1 << 44) - 4096)]),
        ImageError::TooBig { .. }
    ));
    assert!(matches!(
        plan_error(&[file("a", 0, 1 << 43), file("b", 1 << 43, 1 << 43)]),
        ImageError::TooBig { .. }
    ));
}

#[test]
fn sparse_files() {
    let piece = |file_offset, at, len| Segment {
        file_offset,
        tar_offset: TarOffset(at),
        len,
    };
    let sparse = |path: &str, size, segments| Entry {
        size,
        segments,
        ..entry(path, Kind::File)
    };
    let terabyte = 1 << 40;
    let entries = [
        root(),
        sparse("hole", 10_000_000, vec![]),
        sparse(
            "terabyte",
            terabyte,
            vec![
                piece(0, 1001, 10),
                piece(1 << 39, 1011, 5000),
                piece(terabyte - 4096, 6011, 4096),
            ],
        ),
        sparse("largest", (1 << 44) - 4096, vec![piece((1 << 44) - 4100, 10_001, 4)]),
        sparse(
            "odd",
            20_000,
            vec![
                piece(1, 20_001, 1),
                piece(4095, 20_002, 2),
                piece(5000, 20_004, 7),
                piece(12_288, 20_011, 4096),
            ],
        ),
        sparse("tail-hole", 1 << 30, vec![piece(100, 30_001, 100)]),
        sparse(
            "five",
            100_000,
            (0..5).map(|at| piece(at * 10_000, 40_000 + at, 1)).collect(),
        ),
        // 1,500 extents: a tree of two levels.
        sparse(
            "many",
            20_000_000,
            (0..1500)
                .map(|at| piece(at * 12_288 + 5, 50_001 + at * 3000, 3000))
                .collect(),
        ),
    ];
    let (checked, image) = check_entries(&entries, Payload::Dense);
    if let Some(mounted) = checked.mounted {
        let read = |name: &str, at: u64, len: usize| {
            let mut bytes = vec![0; len];
            fs::File::open(mounted.path().join(name))
                .unwrap()
                .read_exact_at(&mut bytes, at)
                .unwrap();
            bytes
        };
        for entry in &entries[1..] {
            let name = std::str::from_utf8(&entry.path).unwrap();
            for segment in entry.segments.iter().step_by(7) {
                let from = segment.file_offset.saturating_sub(5);
                let len = usize::try_from((segment.len + 10).min(entry.size - from)).unwrap();
                let mut bytes = vec![0; len];
                Payload::Dense.read(entry, from, &mut bytes);
                assert_eq!(read(name, from, len), bytes, "{name} at {from}");
            }
        }
    }
    assert!(
        tarblk::internals::image::BlockImage::len(&image) < 20 << 20,
        "holes take no room"
    );
}

#[test]
fn hundreds_of_gigabytes() {
    const GIB: u64 = 1 << 30;
    // 43 GiB are 344 extents: more than one leaf; 181 GiB need a tree of two levels.
    let entries = [
        root(),
        file("forty", 512, 43 * GIB + 1),
        file("small", 44 * GIB, 10),
        file("more", 45 * GIB + 3, 181 * GIB + 4097),
    ];
    let (checked, image) = check_entries(&entries, Payload::Rare);
    assert!(tarblk::internals::image::BlockImage::len(&image) > 224 * GIB);
    if let Some(mounted) = checked.mounted {
        for entry in &entries[1..] {
            let file = fs::File::open(mounted.path().join(std::str::from_utf8(&entry.path).unwrap())).unwrap();
            // Around every stretch that is not zero.
            let start = entry.segments[0].tar_offset.0;
            for window in (start.next_multiple_of(GIB)..start + entry.size).step_by(usize::try_from(GIB).unwrap()) {
                let at = (window - start).saturating_sub(100);
                let len = usize::try_from((entry.size - at).min(8192)).unwrap();
                let (mut found, mut wanted) = (vec![0; len], vec![0; len]);
                file.read_exact_at(&mut found, at).unwrap();
                Payload::Rare.read(entry, at, &mut wanted);
                assert!(found == wanted, "{:?} at {at}", entry.path);
            }
        }
    }
}

#[test]
fn a_directory_of_a_hundred_thousand_names() {
    let mut entries = vec![
        root(),
        Entry {
            mode: 0o755,
            ..entry("big", Kind::Directory)
        },
    ];
    for number in 0..100_000_u32 {
        let name = match number % 3 {
            0 => format!("big/name-{number}"),
            1 => format!("big/\u{fc}ml\u{e4}ut-{number}-{}", "x".repeat(to_usize(number % 97))),
            _ => format!("big/{:x}", number.wrapping_mul(2_654_435_761)),
        };
        entries.push(link(name, Kind::Symlink, number.to_string()));
    }
    check_entries(&entries, Payload::Dense);
}

#[test]
fn a_directory_whose_hash_tree_has_two_levels() {
    let mut entries = vec![root()];
    let name = |number: u32| format!("{:0>250}", number.wrapping_mul(2_654_435_761));
    entries.extend((0..9000).map(|number| link(name(number), Kind::Symlink, "x")));
    check_entries(&entries, Payload::Dense);
}

#[test]
fn directories_around_every_change_of_form() {
    // One block, several, the last list, the first hash tree.
    for names in [0, 1, 63, 64, 65, 500, 510, 511, 512, 520, 600] {
        let mut entries = vec![
            root(),
            Entry {
                mode: 0o755,
                ..entry("d", Kind::Directory)
            },
        ];
        entries.extend((0..names).map(|number| file(format!("d/{number:0>56}"), 512, 0)));
        check_entries(&entries, Payload::Dense);
    }
}

#[test]
fn more_subdirectories_than_links_can_count() {
    let mut entries = vec![
        root(),
        Entry {
            mode: 0o755,
            ..entry("d", Kind::Directory)
        },
    ];
    entries.extend((0..65_100).map(|number| entry(format!("d/{number}"), Kind::Directory)));
    let (checked, _) = check_entries(&entries, Payload::Dense);
    if let Some(mounted) = checked.mounted {
        assert_eq!(fs::metadata(mounted.path().join("d")).unwrap().nlink(), 1);
        assert_eq!(fs::metadata(mounted.path()).unwrap().nlink(), 3);
    }
}

#[test]
fn more_names_than_links_can_count() {
    let mut entries = vec![root(), file("00000", 777, 5000)];
    entries.extend((1..70_000).map(|number| link(format!("{number:05}"), Kind::Hardlink, "00000")));
    let image = image_of_entries(&entries);
    let directory = oracle::scratch();
    let path = directory.path().join("image");
    write_image(&image, Payload::Dense, &path);
    oracle::assert_clean(&path);
    let Some(mounted) = oracle::Mounted::new(&path) else {
        return;
    };
    let mut content = vec![0; 5000];
    Payload::Dense.read(&entries[1], 0, &mut content);
    // As many names as one inode can count, and a second one with the same content for the rest.
    for (name, links) in [("00000", 65_535), ("65534", 65_535), ("65535", 4465), ("69999", 4465)] {
        let path = mounted.path().join(name);
        assert_eq!((name, fs::metadata(&path).unwrap().nlink()), (name, links));
        assert!(fs::read(&path).unwrap() == content, "{name}");
    }
    assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), 70_000);
}

#[test]
fn as_deep_as_any_path() {
    let deep = "d/".repeat(2047);
    let entries = [
        root(),
        file(format!("{deep}f"), 512, 10),
        file(format!("{}/f", "e/".repeat(100)), 512, 10),
    ];
    let image = image_of_entries(&entries);
    let directory = oracle::scratch();
    let path = directory.path().join("image");
    write_image(&image, Payload::Dense, &path);
    oracle::assert_clean(&path);
}

fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap()
}
