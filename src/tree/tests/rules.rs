//! Where a layer of an image and a tar by itself become different things: each case as containerd 1.6.20 and GNU tar 1.34 were
//! seen to have it (docs/rules.md).

use super::*;
use crate::index::InImage;
use crate::tree::acl::Acl;

/// What one layer becomes by the rules of tars and by those of images.
fn both(entries: &[Entry]) -> [Tree; 2] {
    [TreeMode::Plain, TreeMode::Merged].map(|mode| tree(mode, entries).unwrap())
}

fn tree(mode: TreeMode, entries: &[Entry]) -> Result<Tree, TreeError> {
    let mut builder = TreeBuilder::with_mode(mode);
    for entry in entries {
        builder.push(entry)?;
    }
    Ok(builder.finish())
}

fn node<'t>(tree: &'t Tree, path: &str) -> &'t Node {
    tree.node(at(tree, path).unwrap())
}

/// Permissions, owner, group and second of what is at `path`.
fn said(tree: &Tree, path: &str) -> (u16, u32, u32, i64) {
    let node = node(tree, path);
    (node.mode() & 0o7777, node.uid(), node.gid(), node.mtime().secs)
}

fn with_xattrs(entry: Entry, xattrs: &[(&str, &[u8])]) -> Entry {
    let mut xattrs: Vec<_> = xattrs
        .iter()
        .map(|(name, value)| Xattr {
            name: name.as_bytes().to_vec(),
            value: value.to_vec(),
        })
        .collect();
    xattrs.sort();
    Entry { xattrs, ..entry }
}

fn xattr(tree: &Tree, path: &str, name: &str) -> Option<Vec<u8>> {
    let mut set = tree.xattrs(node(tree, path).xattr_set());
    set.find(|(known, _)| *known == name.as_bytes())
        .map(|(_, value)| value.to_vec())
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const CAPABILITY: &str = "security.capability";
const CAP: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A list: owner, user 5 as `rwx`, group, mask and others.
fn list(owner: u8, mask: u8, other: u8) -> Vec<u8> {
    let none = [0xff; 4];
    let entries = [
        (1, owner, none),
        (2, 7, [5, 0, 0, 0]),
        (4, 4, none),
        (0x10, mask, none),
        (0x20, other, none),
    ];
    let entries = entries
        .iter()
        .flat_map(|(tag, permissions, id)| [&[*tag, 0, *permissions, 0][..], id].concat());
    [2, 0, 0, 0].into_iter().chain(entries).collect()
}

#[test]
fn a_hard_links_header_counts_in_images() {
    let first = Entry {
        uid: 7,
        gid: 8,
        ..with_xattrs(file("a", 1), &[("user.k", b"v"), (CAPABILITY, &CAP)])
    };
    let second = Entry {
        mode: 0o4600,
        uid: 3,
        gid: -1,
        mtime: Timestamp { secs: 99, nanos: 0 },
        ..with_xattrs(link("b", Kind::Hardlink, "a"), &[("user.l", b"w")])
    };
    let [tar, image] = both(&[first.clone(), second.clone()]);
    assert_eq!(said(&tar, "a"), (0o640, 7, 8, 7));
    assert_eq!(said(&image, "a"), (0o4600, 3, 8, 99));
    assert_eq!(at(&image, "a"), at(&image, "b"));
    // chown takes capabilities away, and leaves the rest.
    assert_eq!(xattr(&tar, "a", CAPABILITY), Some(CAP.to_vec()));
    assert_eq!(xattr(&image, "a", CAPABILITY), None);
    assert_eq!(xattr(&image, "a", "user.k"), Some(b"v".to_vec()));
    assert_eq!(
        (xattr(&tar, "a", "user.l"), xattr(&image, "a", "user.l")),
        (None, Some(b"w".to_vec()))
    );
    let again = with_xattrs(second, &[(CAPABILITY, &CAP)]);
    let [_, image] = both(&[first.clone(), again.clone()]);
    assert_eq!(xattr(&image, "a", CAPABILITY), Some(CAP.to_vec()));
    // Across layers as well.
    let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
    for (layer, entry) in [(0, &first), (1, &again)] {
        builder.begin_layer(LayerId(layer)).unwrap();
        builder.push(entry).unwrap();
    }
    let tree = builder.finish();
    assert_eq!(
        (said(&tree, "a"), node(&tree, "a").layer()),
        ((0o4600, 3, 8, 99), LayerId(0))
    );
    // A symbolic link has a mode of its own.
    let entries = [
        link("s", Kind::Symlink, "x"),
        Entry {
            uid: 5,
            ..link("h", Kind::Hardlink, "s")
        },
    ];
    assert_eq!(said(&both(&entries)[1], "s"), (0o777, 5, 0, 7));
}

#[test]
fn owners_that_linux_has_not() {
    for (id, in_tar, in_image) in [
        (-1, 0, 0),
        (-2, 0, 4_294_967_294),
        (4_294_967_294, 4_294_967_294, 4_294_967_294),
        (4_294_967_295, 0, 0),
        (1 << 32, 0, 0),
        ((1 << 32) + 5, 0, 5),
    ] {
        let entry = Entry {
            uid: id,
            gid: id,
            ..file("a", 1)
        };
        let found = both(&[entry]).map(|tree| (node(&tree, "a").uid(), node(&tree, "a").gid()));
        assert_eq!(found, [(in_tar, in_tar), (in_image, in_image)], "{id}");
    }
    // Where something is, -1 leaves it.
    let further = Entry {
        uid: -1,
        gid: 4,
        mode: 0o700,
        ..dir("d")
    };
    for tree in both(&[
        Entry {
            uid: 7,
            gid: 8,
            ..dir("d")
        },
        further,
    ]) {
        assert_eq!(said(&tree, "d"), (0o700, 7, 4, 7));
    }
}

#[test]
fn times_that_go_has_not() {
    let time = |secs, nanos| Timestamp { secs, nanos };
    for (mtime, in_image) in [
        (time(-1, 999_999_999), time(0, 0)),
        (time(9_223_372_036, 854_775_807), time(9_223_372_036, 854_775_807)),
        (time(9_223_372_036, 854_775_808), time(0, 0)),
        (time(20_000_000_000, 0), time(0, 0)),
    ] {
        for path in ["a", "made/by/it"] {
            let entry = Entry { mtime, ..dir(path) };
            let found = both(&[entry]).map(|tree| node(&tree, path).mtime());
            assert_eq!(found, [mtime, in_image]);
        }
    }
}

#[test]
fn what_is_read_otherwise_counts_in_images_alone() {
    let other = InImage {
        path: Some(b"long".to_vec()),
        uid: Some(1),
        mtime: Some(Timestamp { secs: 3, nanos: 0 }),
        ..InImage::default()
    };
    let entry = Entry {
        uid: 12,
        in_image: Some(other.into()),
        ..file("short", 1)
    };
    let [tar, image] = both(&[entry]);
    assert_eq!(
        (listing(&tar), listing(&image)),
        (vec!["short".to_owned()], vec!["long".to_owned()])
    );
    assert_eq!(
        (said(&tar, "short"), said(&image, "long")),
        ((0o640, 12, 0, 7), (0o640, 1, 0, 3))
    );
    let unknown = InImage {
        refused_type: Some(b'A'),
        ..InImage::default()
    };
    let entry = Entry {
        in_image: Some(unknown.into()),
        ..file("a/", 1)
    };
    assert_eq!(
        node(&tree(TreeMode::Plain, std::slice::from_ref(&entry)).unwrap(), "a").size(),
        3
    );
    let refused = tree(TreeMode::Overlay, &[entry]).unwrap_err().to_string();
    assert!(refused.starts_with("a/: entries of type 'A'"), "{refused}");
}

#[test]
fn a_slash_behind_a_files_name_is_believed_in_tars() {
    let entries = [file("d/", 1), file("d/a", 2)];
    assert_eq!(listing(&tree(TreeMode::Plain, &entries).unwrap()), ["d/", "a"]);
    assert!(
        tree(TreeMode::Merged, &entries)
            .unwrap_err()
            .to_string()
            .contains("in the way")
    );
}

#[test]
fn a_hard_link_to_itself_leaves_what_is_there() {
    let again = |path, to| Entry {
        mode: 0o600,
        uid: 4,
        ..link(path, Kind::Hardlink, to)
    };
    let entries = [
        file("a", 1),
        again("./a", "/a"),
        link("s", Kind::Symlink, "d"),
        dir("d"),
        file("d/f", 2),
        again("s/f", "d/f"),
        again("s", "s"),
        again("d", "d"),
    ];
    for tree in both(&entries) {
        assert_eq!(
            (said(&tree, "a"), said(&tree, "d/f")),
            ((0o640, 0, 0, 7), (0o640, 0, 0, 7))
        );
        assert_eq!(
            (node(&tree, "a").links(), node(&tree, "s").kind()),
            (1, NodeKind::Symlink)
        );
        assert_eq!(tree.content(at(&tree, "a").unwrap()), Content::Whole(TarOffset(1)));
    }
    // Not through the entry that it would replace: d/x is gone with d.
    let gone = [file("d/x", 1), link("d", Kind::Hardlink, "d/x")];
    assert!(tree(TreeMode::Plain, &gone).is_err());
    let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
    builder.begin_layer(LayerId(0)).unwrap();
    builder.push(&file("a", 1)).unwrap();
    builder.begin_layer(LayerId(1)).unwrap();
    builder.push(&again("a", "a")).unwrap();
    assert_eq!(said(&builder.finish(), "a"), (0o640, 0, 0, 7));
}

#[test]
fn links_to_what_aufs_kept_are_its_files() {
    let kept = Entry {
        uid: 3,
        ..file(".wh..wh.plnk/1.2", 1)
    };
    let entries = [
        dir(".wh..wh.plnk"),
        kept,
        file("./.wh..wh.aufs", 2),
        file(".wh..wh.plnk/deeper/still", 3),
        Entry {
            uid: 4,
            ..link("bin/one", Kind::Hardlink, ".wh..wh.plnk/1.2")
        },
        link("two", Kind::Hardlink, "/.wh..wh.plnk/1.2"),
    ];
    let image = tree(TreeMode::Merged, &entries).unwrap();
    assert_eq!(listing(&image), ["bin/", "two", "one"]);
    assert_eq!(
        (node(&image, "two").links(), said(&image, "bin/one")),
        (2, (0o640, 0, 0, 7))
    );
    assert_eq!(image.content(at(&image, "two").unwrap()), Content::Whole(TarOffset(1)));
    assert_eq!(image.path(at(&image, "two").unwrap()), b"two");
    assert!(tree(TreeMode::Overlay, &entries).is_ok());
    // To a tar by itself these are names like any others.
    let tar = tree(TreeMode::Plain, &entries).unwrap();
    assert_eq!(node(&tar, "two").links(), 3);
    for missing in [".wh..wh.plnk/9.9", ".wh..wh.plnk/deeper/still", ".wh..wh.aufs"] {
        let entries = [&entries[..], &[link("three", Kind::Hardlink, missing)]].concat();
        let outcome = tree(TreeMode::Merged, &entries).unwrap_err().to_string();
        assert!(outcome.contains("no entry before it makes"), "{outcome}");
    }
}

#[test]
fn paths_are_as_long_as_the_kernels() {
    let long = |len: usize| {
        format!(
            "{}{}",
            "d/".repeat(len / 2 - 1),
            if len.is_multiple_of(2) { "ff" } else { "fff" }
        )
    };
    for mode in [TreeMode::Plain, TreeMode::Merged, TreeMode::Overlay] {
        let outcome = |entries: &[Entry]| tree(mode, entries).map(drop).map_err(|error| error.to_string());
        assert_eq!(outcome(&[file(&long(4095), 1)]), Ok(()));
        let refused = outcome(&[file(&long(4096), 1)]).unwrap_err();
        assert!(
            refused.starts_with("d/d/d/") && refused.contains("4096 bytes"),
            "{refused}"
        );
        assert!(refused.len() < 300, "{refused}");
        // What cleaning takes away does not count.
        assert_eq!(outcome(&[file(&format!("./{}", long(4095)), 1)]), Ok(()));
        assert_eq!(outcome(&[file(&format!("{}x", "q/../".repeat(2000)), 1)]), Ok(()));
        assert!(outcome(&[file(&format!("{}/", long(4096)), 1)]).is_err());
        // Nor do links lead further.
        let way = long(4000);
        let entries = [
            dir(&way),
            link("l", Kind::Symlink, &way),
            file(&format!("l/{}", "x".repeat(94)), 1),
        ];
        assert_eq!(outcome(&entries), Ok(()));
        for path in [
            format!("l/{}", "x".repeat(95)),
            format!("l/{}/y", "x".repeat(93)),
            format!("l/{}", long(200)),
        ] {
            let outcome = outcome(&[&entries[..], &[file(&path, 1)]].concat());
            assert!(outcome.unwrap_err().contains("Linux allows 4095"), "{path}");
        }
        assert_eq!(
            outcome(&[&entries[..], &[file(&format!("l/../../l/{}", "x".repeat(94)), 1)]].concat()),
            Ok(())
        );
    }
    // A kilobyte of a compressed layer makes no gigabytes of directories.
    let many: Vec<_> = (0..100).map(|n| file(&format!("{n:02}/{}", long(4000)), 1)).collect();
    assert!(matches!(build(&many), Err(TreeError::TooManyMissing { .. })));
}

#[test]
fn the_mode_is_the_lists_mask() {
    let entry = |mode| Entry {
        mode,
        ..with_xattrs(file("a", 1), &[(ACCESS, &list(6, 7, 4))])
    };
    for tree in both(&[entry(0o640)]) {
        assert_eq!(xattr(&tree, "a", ACCESS), Some(list(6, 4, 0)));
        assert_eq!(said(&tree, "a").0, 0o640);
    }
    // Whatever changes the mode later changes the list.
    let again = Entry {
        mode: 0o700,
        ..link("b", Kind::Hardlink, "a")
    };
    assert_eq!(
        xattr(&both(&[entry(0o640), again])[1], "a", ACCESS),
        Some(list(7, 0, 0))
    );
    let directory = |mode| Entry {
        mode,
        ..with_xattrs(dir("d"), &[(ACCESS, &list(6, 7, 4)), (DEFAULT, &list(6, 7, 4))])
    };
    let [tar, image] = both(&[directory(0o2710)]);
    // GNU tar sets a directory's list last.
    assert_eq!(
        (said(&tar, "d").0, xattr(&tar, "d", ACCESS)),
        (0o2674, Some(list(6, 7, 4)))
    );
    assert_eq!(
        (said(&image, "d").0, xattr(&image, "d", ACCESS)),
        (0o2710, Some(list(7, 1, 0)))
    );
    assert_eq!(xattr(&image, "d", DEFAULT), Some(list(6, 7, 4)));
    let plain = Entry {
        mode: 0o700,
        ..dir("d")
    };
    for tree in both(&[directory(0o770), plain]) {
        assert_eq!(
            (said(&tree, "d").0, xattr(&tree, "d", ACCESS)),
            (0o700, Some(list(7, 0, 0)))
        );
    }
    // A list that says no more than a mode is none.
    let plain = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 7, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255, 255, 255,
    ];
    assert!(Acl::parse(&plain).is_some());
    for none in [&plain[..], &[2, 0, 0, 0], &[]] {
        for tree in both(&[with_xattrs(file("a", 1), &[(ACCESS, none)])]) {
            assert_eq!((xattr(&tree, "a", ACCESS), said(&tree, "a").0), (None, 0o640));
        }
    }
}

#[test]
fn what_is_made_in_a_directory_with_a_default_list_has_it_in_images() {
    let entries = [
        with_xattrs(dir("d"), &[(DEFAULT, &list(6, 7, 4))]),
        file("d/f", 1),
        Entry {
            mode: 0o750,
            ..dir("d/s")
        },
        file("d/made/x", 2),
        link("d/l", Kind::Symlink, "f"),
        with_xattrs(file("d/none", 3), &[(ACCESS, b"")]),
    ];
    let [tar, image] = both(&entries);
    for path in ["d/f", "d/s", "d/made", "d/made/x", "d/l", "d/none"] {
        assert_eq!(
            (xattr(&tar, path, ACCESS), xattr(&tar, path, DEFAULT)),
            (None, None),
            "{path}"
        );
    }
    let lists = |path| (xattr(&image, path, ACCESS), xattr(&image, path, DEFAULT));
    assert_eq!(lists("d/f"), (Some(list(6, 4, 0)), None));
    assert_eq!(lists("d/s"), (Some(list(7, 5, 0)), Some(list(6, 7, 4))));
    assert_eq!(lists("d/made"), (Some(list(7, 5, 5)), Some(list(6, 7, 4))));
    assert_eq!(lists("d/made/x"), (Some(list(6, 4, 0)), None));
    assert_eq!((lists("d/l"), lists("d/none")), ((None, None), (None, None)));
}

#[test]
fn lists_and_capabilities_that_linux_refuses_are_left_out() {
    let bad = with_xattrs(
        file("a", 1),
        &[
            (ACCESS, b"bad"),
            (CAPABILITY, b"bad"),
            ("user.k", b"v"),
            (DEFAULT, &[1, 2]),
        ],
    );
    for tree in both(&[bad]) {
        let left: Vec<_> = tree
            .xattrs(node(&tree, "a").xattr_set())
            .map(|(name, _)| name)
            .collect();
        assert_eq!(left, [b"user.k"]);
    }
}

#[test]
fn a_name_that_is_empty_is_called_so() {
    assert!(error(&[link("b", Kind::Hardlink, "")]).starts_with("b: hard link that names nothing"));
    let nameless = with_xattrs(file("a", 1), &[("", b"v")]);
    assert!(error(&[nameless]).starts_with("a: extended attribute (no name) of 1 bytes"));
}
