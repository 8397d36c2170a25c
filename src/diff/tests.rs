//! What is told of two small trees.

use super::*;
use crate::index::{Entry, Kind, Segment, Timestamp, Xattr};
use crate::tree::{TreeBuilder, TreeMode};

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        mtime: Timestamp { secs: 7, nanos: 9 },
        ..Entry::default()
    }
}

fn file(path: &str, at: u64, len: u64) -> Entry {
    Entry {
        size: len,
        segments: vec![Segment {
            file_offset: 0,
            tar_offset: TarOffset(at),
            len,
        }],
        ..entry(path, Kind::File)
    }
}

fn link(path: &str, kind: Kind, to: &str) -> Entry {
    Entry {
        link: to.into(),
        ..entry(path, kind)
    }
}

fn tree(layers: &[&[Entry]]) -> Tree {
    let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
    for (number, layer) in (0..).zip(layers) {
        builder.begin_layer(LayerId(number)).unwrap();
        for entry in *layer {
            builder.push(entry).unwrap();
        }
    }
    builder.finish()
}

/// Layers known by these names.
fn named(identities: &[String]) -> Vec<LayerFacts<'_>> {
    let facts = |identity| LayerFacts {
        identities: std::slice::from_ref(identity),
        payloads: None,
    };
    identities.iter().map(facts).collect()
}

fn texts<const N: usize>(texts: [&str; N]) -> [String; N] {
    texts.map(str::to_owned)
}

/// The differences as lines, and the totals.
fn told(a: Side<'_>, b: Side<'_>) -> (Vec<String>, Totals) {
    let mut lines = Vec::new();
    let totals = compare::<()>(a, b, &mut |path, difference| {
        let path = String::from_utf8_lossy(path);
        lines.push(match difference {
            Difference::Added(_) => format!("+{path}"),
            Difference::Removed(_) => format!("-{path}"),
            Difference::Changed { aspects, .. } => format!("~{path} {aspects:?}"),
        });
        Ok(())
    })
    .unwrap();
    (lines, totals)
}

#[test]
fn every_aspect_is_told_of() {
    let base = [
        file("mode", 1, 1),
        file("owner", 1, 1),
        file("time", 1, 1),
        file("size", 1, 1),
        file("elsewhere", 1, 1),
        link("link", Kind::Symlink, "a"),
        entry("device", Kind::CharDevice),
        entry("xattr", Kind::Fifo),
        entry("type", Kind::Fifo),
        file("same", 1, 1),
        file("empty", 1, 1),
        file("x", 1, 1),
        link("y", Kind::Hardlink, "x"),
    ];
    let mut other = base.clone();
    other[0].mode = 0o600;
    other[1].gid = 1;
    other[2].mtime.nanos = 8;
    other[3] = file("size", 1, 2);
    other[4] = file("elsewhere", 2, 1);
    other[5].link = b"b".to_vec();
    other[6].device_minor = 1;
    other[7].xattrs.push(Xattr {
        name: b"user.a".to_vec(),
        value: b"1".to_vec(),
    });
    other[8] = file("type", 9, 3);
    other[12] = file("y", 1, 1);
    let (a, b) = (tree(&[&base]), tree(&[&other]));
    let layer = texts(["layer"]);
    let facts = named(&layer);
    let side = |tree| Side { tree, layers: &facts };
    let (lines, totals) = told(side(&a), side(&b));
    assert_eq!(
        lines,
        [
            "~device [Device]",
            "~elsewhere [MaybeContent]",
            "~link [Link]",
            "~mode [Mode]",
            "~owner [Owner]",
            "~size [Size]",
            "~time [Time]",
            "~type [Type]",
            "~xattr [Xattrs]",
            "~y [Names]",
        ]
    );
    assert_eq!(
        (totals.changed, totals.uncertain, totals.added, totals.removed),
        (9, 1, 0, 0)
    );
    assert_eq!(told(side(&a), side(&a)).0, [""; 0]);
}

#[test]
fn directories_come_and_go_with_what_they_hold() {
    let a = tree(&[&[
        file("a/b/c", 1, 1),
        file("a.b", 1, 1),
        file("d", 1, 1),
        file("e/f", 1, 1),
    ]]);
    let b = tree(&[&[file("a", 1, 1), file("d/g", 1, 1), file("e/a", 1, 1), file("e/f", 1, 1)]]);
    let layer = texts(["layer"]);
    let facts = named(&layer);
    let side = |tree| Side { tree, layers: &facts };
    let (lines, totals) = told(side(&a), side(&b));
    let expected = [
        "~a [Type, Mode]",
        "-a/b",
        "-a/b/c",
        "-a.b",
        "~d [Type, Mode]",
        "+d/g",
        "+e/a",
    ];
    assert_eq!(lines, expected);
    assert_eq!((totals.changed, totals.added, totals.removed), (2, 2, 3));
}

#[test]
fn shared_layers_are_not_fetched() {
    let base = [file("lib", 1000, 10), file("old", 2000, 20)];
    let a = tree(&[&base, &[file("app", 1, 300)]]);
    let b = tree(&[
        &base,
        &[
            entry(".wh.old", Kind::File),
            file("app", 1, 300),
            file("new", 500, 4000),
        ],
    ]);
    let (known_a, known_b) = (texts(["base", "one"]), texts(["base", "two"]));
    let (facts_a, facts_b) = (named(&known_a), named(&known_b));
    let (sides, reverse) = (
        (
            Side {
                tree: &a,
                layers: &facts_a,
            },
            Side {
                tree: &b,
                layers: &facts_b,
            },
        ),
        Side { tree: &a, layers: &[] },
    );
    let (lines, totals) = told(sides.0, sides.1);
    assert_eq!(lines, ["~app [MaybeContent]", "+new", "-old"]);
    assert_eq!((totals.payload_bytes, totals.fetch_bytes), (4310, 4300));
    // What nothing is known of is fetched; and the same position of two unknown layers is not known to be the same.
    let (lines, totals) = told(reverse, reverse);
    assert_eq!(
        lines,
        ["~app [MaybeContent]", "~lib [MaybeContent]", "~old [MaybeContent]"]
    );
    assert_eq!(totals.fetch_bytes, 330);
}

/// The payload at a place is known by the place, a thousand times over the same.
struct ByPlace;

impl PayloadDigests for ByPlace {
    fn payload_digest(&self, range: TarRange) -> Option<[u8; 32]> {
        let mut digest = [0; 32];
        digest[0] = u8::try_from(range.start.0 % 1000 % 256).ok()?;
        digest[1] = u8::try_from(range.len % 256).ok()?;
        (range.start.0 % 1000 != 99).then_some(digest)
    }
}

#[test]
fn digests_tell_what_is_equal() {
    let a = tree(&[&[
        file("a", 1001, 5),
        file("b", 1002, 5),
        file("c", 99, 5),
        file("moved", 7, 50),
    ]]);
    let b = tree(&[&[
        file("a", 5001, 5),
        file("b", 5003, 5),
        file("c", 99, 5),
        file("here", 3007, 50),
        file("twice", 8, 70),
        file("twice-too", 9008, 70),
    ]]);
    let facts = || {
        [LayerFacts {
            identities: &[],
            payloads: Some(&ByPlace),
        }]
    };
    let (one, other) = (facts(), facts());
    let (lines, totals) = told(
        Side { tree: &a, layers: &one },
        Side {
            tree: &b,
            layers: &other,
        },
    );
    let expected = [
        "~b [Content]",
        "~c [MaybeContent]",
        "+here",
        "-moved",
        "+twice",
        "+twice-too",
    ];
    assert_eq!(lines, expected);
    assert_eq!(totals.payload_bytes, 5 + 5 + 5 + 50 + 70 + 70);
    // `b` has another digest, of `c` there is none, `twice` is fetched once.
    assert_eq!(totals.fetch_bytes, 5 + 5 + 70);
}

#[test]
fn an_error_of_the_visitor_ends_it() {
    let (a, b) = (tree(&[&[]]), tree(&[&[file("a", 1, 1), file("b", 1, 1)]]));
    let side = |tree| Side { tree, layers: &[] };
    let mut seen = 0;
    let ended = compare(side(&a), side(&b), &mut |path, _| {
        seen += 1;
        if path == b"a" { Err("enough") } else { Ok(()) }
    });
    assert_eq!((ended, seen > 0), (Err("enough"), true));
}
