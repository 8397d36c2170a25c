//! The rules of [`TreeBuilder`], one by one.

use super::*;
use crate::index::{Entry, Kind, Xattr};

mod layers;
mod rules;

/// An entry with a mode and time of its own, so that it can be told apart.
fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o640,
        mtime: Timestamp { secs: 7, nanos: 9 },
        ..Entry::default()
    }
}

fn file(path: &str, at: u64) -> Entry {
    let segments = vec![Segment {
        file_offset: 0,
        tar_offset: TarOffset(at),
        len: 3,
    }];
    Entry {
        size: 3,
        segments,
        ..entry(path, Kind::File)
    }
}

fn link(path: &str, kind: Kind, to: &str) -> Entry {
    Entry {
        link: to.into(),
        ..entry(path, kind)
    }
}

fn dir(path: &str) -> Entry {
    entry(path, Kind::Directory)
}

fn build(entries: &[Entry]) -> Result<Tree, TreeError> {
    let mut builder = TreeBuilder::new();
    for entry in entries {
        builder.push(entry)?;
    }
    Ok(builder.finish())
}

fn error(entries: &[Entry]) -> String {
    build(entries).unwrap_err().to_string()
}

fn at(tree: &Tree, path: &str) -> Option<NodeId> {
    path.split('/')
        .filter(|part| !part.is_empty())
        .try_fold(NodeId::ROOT, |node, name| tree.child(node, name.as_bytes()))
}

fn listing(tree: &Tree) -> Vec<String> {
    (0..tree.name_count())
        .map(|position| {
            let Child { name, node } = tree.name_at(position);
            let mark = if tree.node(node).is_directory() { "/" } else { "" };
            format!("{}{mark}", String::from_utf8_lossy(name))
        })
        .collect()
}

#[test]
fn paths_are_cleaned_and_confined() {
    let tree = build(&[
        dir("./"),
        file("./a", 1),
        file("/b", 2),
        file("../../c", 3),
        file("x/../d//e", 4),
        dir("f///"),
    ]);
    assert_eq!(listing(&tree.unwrap()), ["a", "b", "c", "d/", "f/", "e"]);
}

#[test]
fn the_roots_entry_counts() {
    let tree = build(&[
        file("a", 1),
        Entry {
            mode: 0o1700,
            uid: 5,
            ..dir("./")
        },
        entry("/", Kind::File),
    ])
    .unwrap();
    let root = tree.node(NodeId::ROOT);
    assert_eq!((root.mode(), root.uid(), root.mtime().secs), (0o041_700, 5, 7));
}

#[test]
fn missing_parents_are_made() {
    let tree = build(&[Entry {
        uid: 3,
        ..file("a/b/c", 1)
    }])
    .unwrap();
    let made = tree.node(at(&tree, "a/b").unwrap());
    assert_eq!(
        (made.mode(), made.uid(), made.mtime()),
        (0o040_755, 0, Timestamp { secs: 7, nanos: 9 })
    );
    assert_eq!(tree.node(NodeId::ROOT).mtime().secs, 7);
    assert_eq!(tree.node(NodeId::ROOT).links(), 3);
}

#[test]
fn the_last_of_duplicates_wins_and_old_links_keep_the_old() {
    let tree = build(&[file("a", 1), link("b", Kind::Hardlink, "a"), file("a", 2)]).unwrap();
    assert_eq!(tree.content(at(&tree, "a").unwrap()), Content::Whole(TarOffset(2)));
    assert_eq!(tree.content(at(&tree, "b").unwrap()), Content::Whole(TarOffset(1)));
    assert_eq!(tree.node(at(&tree, "b").unwrap()).links(), 1);
}

#[test]
fn directories_merge_and_everything_else_replaces() {
    let xattr = |name: &str, value: &str| Xattr {
        name: name.into(),
        value: value.into(),
    };
    let first = Entry {
        xattrs: vec![xattr("user.a", "1"), xattr("user.b", "1")],
        ..dir("d")
    };
    let second = Entry {
        mode: 0o700,
        gid: 9,
        xattrs: vec![xattr("user.b", "2"), xattr("user.c", "2")],
        ..dir("d/")
    };
    let tree = build(&[first, file("d/f", 1), second]).unwrap();
    let d = at(&tree, "d").unwrap();
    assert_eq!((tree.node(d).mode(), tree.node(d).gid()), (0o040_700, 9));
    let xattrs: Vec<_> = tree.xattrs(tree.node(d).xattr_set()).collect();
    assert_eq!(
        xattrs,
        [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"2"), (b"user.c", b"2")]
    );
    assert!(at(&tree, "d/f").is_some());

    let tree = build(&[file("d/f", 1), file("d", 2), file("e", 1), dir("e"), file("e/g", 2)]).unwrap();
    assert_eq!(listing(&tree), ["d", "e/", "g"]);
    // A directory that comes back is a new one.
    let tree = build(&[file("d/f", 1), link("d", Kind::Symlink, "x"), dir("d"), file("d/g", 2)]).unwrap();
    assert_eq!(listing(&tree), ["d/", "g"]);
}

#[test]
fn linked_parents_are_followed_inside_the_root() {
    let tree = build(&[
        dir("usr/lib"),
        link("lib", Kind::Symlink, "usr/lib"),
        file("lib/a", 1),
        link("usr/up", Kind::Symlink, "../../../usr/./lib/x/.."),
        file("usr/up/b", 2),
        link("abs", Kind::Symlink, "/new"),
        file("abs/c", 3),
        link("usr/lib/h", Kind::Hardlink, "lib/a"),
    ])
    .unwrap();
    assert!(at(&tree, "usr/lib/a").is_some() && at(&tree, "usr/lib/b").is_some() && at(&tree, "new/c").is_some());
    assert_eq!(at(&tree, "usr/lib/h"), at(&tree, "usr/lib/a"));
    // A directory over a link replaces the link itself.
    let tree = build(&[
        link("lib", Kind::Symlink, "usr"),
        file("lib/a", 1),
        dir("lib"),
        file("lib/b", 2),
    ])
    .unwrap();
    assert!(at(&tree, "usr/a").is_some() && at(&tree, "lib/b").is_some());
}

#[test]
fn loops_and_obstacles_are_errors() {
    let looped = [
        link("a", Kind::Symlink, "b"),
        link("b", Kind::Symlink, "a"),
        file("a/x", 1),
    ];
    assert!(error(&looped).contains("a/x: more than 255"));
    let bomb: Vec<_> = (0..300)
        .map(|i| link(&format!("l{i}"), Kind::Symlink, &format!("l{}", i + 1)))
        .collect();
    assert!(error(&[&bomb[..], &[file("l0/x", 1)]].concat()).contains("255"));
    assert!(build(&[&bomb[60..], &[file("l60/x", 1)]].concat()).is_ok());
    assert!(error(&[file("a", 1), file("a/b/c", 2)]).contains("a is in the way"));
    // Growing: every link goes through the one before it twice.
    let grow: Vec<_> = std::iter::once(link("g0", Kind::Symlink, "/"))
        .chain((1..200).map(|i| link(&format!("g{i}"), Kind::Symlink, &format!("g{}/g{}", i - 1, i - 1))))
        .collect();
    assert!(error(&[&grow[..], &[file("g199/x", 1)]].concat()).contains("255"));
}

#[test]
fn hard_links() {
    let tree = build(&[
        link("s", Kind::Symlink, "nowhere"),
        link("s2", Kind::Hardlink, "./s"),
        entry("fifo", Kind::Fifo),
        link("deep/er", Kind::Hardlink, "/fifo"),
        file("old", 1),
        link("old", Kind::Hardlink, "fifo"),
    ])
    .unwrap();
    assert_eq!(at(&tree, "s"), at(&tree, "s2"));
    assert_eq!(tree.node(at(&tree, "deep/er").unwrap()).links(), 3);
    assert!(error(&[link("a", Kind::Hardlink, "b")]).contains("a: hard link to b, which no entry before it makes"));
    assert!(error(&[link("a", Kind::Hardlink, "b/c")]).contains("no entry before it"));
    assert!(error(&[link("./a", Kind::Hardlink, "/a")]).contains("itself"));
    assert!(error(&[dir("d"), link("a", Kind::Hardlink, "d")]).contains("is a directory"));
    assert!(error(&[link("a", Kind::Hardlink, "/")]).contains("is a directory"));
    assert!(error(&[file("d/f", 1), link("d", Kind::Hardlink, "d/f")]).contains("no entry before it"));
}

#[test]
fn what_linux_cannot_hold_is_refused() {
    assert!(error(&[file(&"n".repeat(256), 1)]).contains("256 bytes"));
    assert!(error(&[file(&format!("{}/x", "n".repeat(256)), 1)]).contains("256 bytes"));
    assert!(build(&[file(&"n".repeat(255), 1)]).is_ok());
    assert!(error(&[file("a\0b", 1)]).contains("a\\u{0}b: a NUL"));
    assert!(error(&[link("a", Kind::Symlink, "")]).contains("0 bytes"));
    assert!(error(&[link("a", Kind::Symlink, &"t".repeat(4096))]).contains("4096"));
    assert!(
        error(&[Entry {
            size: 2,
            ..file("a", 1)
        }])
        .contains("map of stored pieces")
    );
    let fat = Xattr {
        name: b"user.a".to_vec(),
        value: vec![0; 65_537],
    };
    assert!(
        error(&[Entry {
            xattrs: vec![fat],
            ..dir("a")
        }])
        .contains("user.a of 65537")
    );
}

#[test]
fn sparse_and_empty_files_keep_their_maps() {
    let piece = |file_offset, at, len| Segment {
        file_offset,
        tar_offset: TarOffset(at),
        len,
    };
    let sparse = Entry {
        size: 100,
        segments: vec![piece(10, 512, 5), piece(90, 517, 10)],
        ..file("s", 0)
    };
    let hole = Entry {
        size: 1 << 40,
        segments: vec![],
        ..file("h", 0)
    };
    let empty = Entry {
        size: 0,
        segments: vec![],
        ..file("e", 0)
    };
    let tree = build(&[sparse.clone(), hole, empty]).unwrap();
    assert_eq!(
        tree.content(at(&tree, "s").unwrap()),
        Content::Scattered(&sparse.segments)
    );
    assert_eq!(tree.content(at(&tree, "h").unwrap()), Content::Scattered(&[]));
    assert_eq!(tree.node(at(&tree, "h").unwrap()).size(), 1 << 40);
    assert_eq!(tree.content(at(&tree, "e").unwrap()), Content::Scattered(&[]));
}

#[test]
fn thousands_of_names_deep() {
    let deep = "d/".repeat(2_047) + "f";
    let tree = build(&[file(&deep, 1), file(&deep, 2)]).unwrap();
    assert_eq!(tree.content(at(&tree, &deep).unwrap()), Content::Whole(TarOffset(2)));
    assert_eq!(tree.path(at(&tree, &deep).unwrap()), deep.as_bytes());
}

#[test]
fn a_wide_directory_is_sorted() {
    let tree = build(
        &(0..5000)
            .rev()
            .map(|i| file(&format!("d/name-{i:05}"), i))
            .collect::<Vec<_>>(),
    )
    .unwrap();
    let names: Vec<_> = tree
        .children(at(&tree, "d").unwrap())
        .map(|child| child.name.to_vec())
        .collect();
    assert!(names.is_sorted() && names.len() == 5000);
    assert_eq!(
        tree.content(at(&tree, "d/name-01234").unwrap()),
        Content::Whole(TarOffset(1234))
    );
}

#[test]
fn paths_lead_through_links_and_stay_inside() {
    let link = |path: &str, text: &str| Entry {
        link: text.as_bytes().to_vec(),
        ..entry(path, Kind::Symlink)
    };
    let tree = build(&[
        file("usr/lib/x/libz.so.1.2", 1),
        link("lib", "usr/lib"),
        link("usr/lib/x/libz.so.1", "libz.so.1.2"),
        link("usr/lib/x/up", "../../../../../lib/./x/libz.so.1"),
        link("abs", "/lib/x/up"),
        link("loop", "loop"),
    ])
    .unwrap();
    let real = at(&tree, "usr/lib/x/libz.so.1.2").unwrap();
    let from = at(&tree, "usr/lib/x").unwrap();
    for path in ["/lib/x/libz.so.1", "libz.so.1", "./up", "/abs", "../x//libz.so.1.2"] {
        assert_eq!(tree.resolve(from, path.as_bytes()), Some(real), "{path}");
    }
    for path in ["/loop", "/nothing", "libz.so.1/x", "/lib/x/libz.so.1.2/.."] {
        assert_ne!(tree.resolve(from, path.as_bytes()), Some(real), "{path}");
    }
    assert_eq!(tree.resolve(from, b"/"), Some(NodeId::ROOT));
}
