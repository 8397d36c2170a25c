//! The rules between layers, one by one.

use super::*;
use crate::units::LayerId;

fn whiteout(path: &str) -> Entry {
    entry(path, Kind::File)
}

fn xattr(name: &str, value: &str) -> Xattr {
    Xattr {
        name: name.into(),
        value: value.into(),
    }
}

fn try_layers(mode: TreeMode, layers: &[&[Entry]]) -> Result<Tree, TreeError> {
    let mut builder = TreeBuilder::with_mode(mode);
    for (number, layer) in (0..).zip(layers) {
        builder.begin_layer(LayerId(number))?;
        for entry in *layer {
            builder.push(entry)?;
        }
    }
    Ok(builder.finish())
}

fn merge(layers: &[&[Entry]]) -> Tree {
    try_layers(TreeMode::Merged, layers).unwrap()
}

fn overlay(layer: &[Entry]) -> Tree {
    try_layers(TreeMode::Overlay, &[layer]).unwrap()
}

/// The last layer's entries in every order of a handful make the same names.
fn merge_any_order(lower: &[Entry], upper: &[Entry]) -> Vec<String> {
    let mut orders = vec![upper.to_vec()];
    for at in 0..upper.len() {
        let mut rotated = upper.to_vec();
        rotated.rotate_left(at);
        orders.push(rotated.clone());
        rotated.reverse();
        orders.push(rotated);
    }
    let listings: Vec<_> = orders.iter().map(|order| listing(&merge(&[lower, order]))).collect();
    assert!(listings.iter().all(|one| *one == listings[0]), "{listings:#?}");
    listings.into_iter().next().unwrap()
}

fn xattrs_of(tree: &Tree, path: &str) -> Vec<(String, String)> {
    let set = tree.node(at(tree, path).unwrap()).xattr_set();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    tree.xattrs(set)
        .map(|(name, value)| (text(name), text(value)))
        .collect()
}

#[test]
fn whiteouts_hide_what_lower_layers_have_only() {
    let lower = [file("a", 1), file("b", 2), file("d/x", 3), file("d/y", 4), dir("e/f")];
    let upper = [
        whiteout(".wh.a"),
        whiteout("d/.wh.x"),
        whiteout(".wh.e"),
        whiteout(".wh.no"),
    ];
    assert_eq!(merge_any_order(&lower, &upper), ["b", "d/", "y"]);
    // In their own layer, before or behind: spared.
    let upper = [whiteout(".wh.a"), file("a", 9), whiteout(".wh.d"), file("d/z", 8)];
    assert_eq!(merge_any_order(&lower, &upper), ["a", "b", "d/", "e/", "z", "f/"]);
    let tree = merge(&[&lower, &upper]);
    assert_eq!(tree.content(at(&tree, "a").unwrap()), Content::Whole(TarOffset(9)));
    assert_eq!(tree.node(at(&tree, "a").unwrap()).layer(), LayerId(1));
    assert_eq!(tree.node(at(&tree, "b").unwrap()).layer(), LayerId(0));
    // In the lowest layer they hide nothing and are nothing.
    let tree = merge(&[&[
        whiteout(".wh.a"),
        file("a", 1),
        whiteout(".wh..wh..opq"),
        whiteout("d/.wh..wh..opq"),
    ]]);
    assert_eq!(listing(&tree), ["a", "d/"]);
    // In a tar like any other they are files.
    let tree = build(&[whiteout(".wh.a"), whiteout("d/.wh..wh..opq"), file("a", 1)]).unwrap();
    assert_eq!(listing(&tree), [".wh.a", "a", "d/", ".wh..wh..opq"]);
}

#[test]
fn opaque_directories_show_their_own_layer_only() {
    let lower = [
        file("d/a", 1),
        file("d/s/old", 2),
        file("d/t/old", 3),
        file("d/deep/er/old", 4),
        file("e", 5),
    ];
    let upper = [
        whiteout("d/.wh..wh..opq"),
        file("d/s/new", 6),
        file("d/deep/er/new", 7),
        file("d/b", 8),
        whiteout("d/.wh..wh..opq"),
    ];
    assert_eq!(
        merge_any_order(&lower, &upper),
        ["d/", "e", "b", "deep/", "s/", "er/", "new", "new"]
    );
    assert_eq!(
        merge_any_order(&lower, &[whiteout(".wh..wh..opq"), file("n", 1)]),
        ["n"]
    );
    // What the layer between put there goes too, and what comes above stays.
    let middle = [file("d/middle", 1), whiteout("d/.wh.a")];
    let top = [file("d/a", 9)];
    let tree = merge(&[&lower, &middle, &upper, &top]);
    assert_eq!(
        listing(&tree),
        ["d/", "e", "a", "b", "deep/", "s/", "er/", "new", "new"]
    );
    assert_eq!(tree.node(at(&tree, "d/a").unwrap()).layer(), LayerId(3));
}

#[test]
fn a_directory_that_is_hidden_and_there_again_is_new() {
    let old = Entry {
        mode: 0o700,
        uid: 5,
        xattrs: vec![xattr("user.old", "1")],
        ..dir("d")
    };
    let lower = [
        old.clone(),
        file("d/old", 1),
        Entry {
            path: b"d/s".into(),
            ..old
        },
        file("d/s/old", 1),
    ];
    for upper in [
        [whiteout(".wh.d"), file("d/s/new", 2)],
        [file("d/s/new", 2), whiteout(".wh.d")],
    ] {
        let tree = merge(&[&lower, &upper]);
        assert_eq!(listing(&tree), ["d/", "s/", "new"]);
        for path in ["d", "d/s"] {
            let node = tree.node(at(&tree, path).unwrap());
            assert_eq!((node.mode(), node.uid()), (0o040_755, 0), "{path}");
            assert_eq!(xattrs_of(&tree, path), []);
        }
    }
    let again = Entry {
        uid: 9,
        xattrs: vec![xattr("user.new", "2")],
        ..dir("d")
    };
    for upper in [
        [whiteout(".wh.d"), again.clone(), file("d/x", 1)],
        [file("d/x", 1), again.clone(), whiteout(".wh.d")],
        [file("d/x", 1), whiteout(".wh.d"), again.clone()],
    ] {
        let tree = merge(&[&lower, &upper]);
        assert_eq!(listing(&tree), ["d/", "x"]);
        let node = tree.node(at(&tree, "d").unwrap());
        assert_eq!((node.mode(), node.uid()), (0o040_640, 9));
        assert_eq!(xattrs_of(&tree, "d"), [("user.new".into(), "2".into())]);
    }
}

#[test]
fn directories_take_the_upper_layers_attributes() {
    let with = |path: &str, uid, name: &str| Entry {
        uid,
        xattrs: vec![xattr(name, "1"), xattr("trusted.overlay.redirect", "/etc")],
        ..dir(path)
    };
    let lower = [with("d", 1, "user.a"), file("d/f", 1)];
    // Replaced by an entry, kept where the directory merely leads somewhere, added to within a layer.
    let tree = merge(&[
        &lower,
        &[file("d/g", 2), with("d", 2, "user.b"), with("d", 3, "user.c")],
    ]);
    assert_eq!(tree.node(at(&tree, "d").unwrap()).uid(), 3);
    assert_eq!(tree.node(at(&tree, "d").unwrap()).layer(), LayerId(1));
    let named = |name: &str| (name.to_owned(), "1".to_owned());
    assert_eq!(xattrs_of(&tree, "d"), [named("user.b"), named("user.c")]);
    let tree = merge(&[&lower, &[file("d/g", 2)]]);
    assert_eq!(tree.node(at(&tree, "d").unwrap()).uid(), 1);
    assert_eq!(xattrs_of(&tree, "d"), [named("user.a")]);
    assert_eq!(listing(&tree), ["d/", "f", "g"]);
    // The root like any other.
    let tree = merge(&[&[with("./", 7, "user.a")], &[with("/", 8, "user.b")], &[file("x", 1)]]);
    assert_eq!(tree.node(NodeId::ROOT).uid(), 8);
    assert_eq!(xattrs_of(&tree, ""), [named("user.b")]);
}

#[test]
fn types_replace_each_other_across_layers() {
    let lower = [
        file("d/f", 1),
        file("f", 2),
        link("l", Kind::Symlink, "d"),
        entry("p", Kind::Fifo),
    ];
    let upper = [
        file("d", 3),
        dir("f"),
        file("f/x", 4),
        dir("l"),
        link("p", Kind::Symlink, "f"),
    ];
    let tree = merge(&[&lower, &upper]);
    assert_eq!(listing(&tree), ["d", "f/", "l/", "p", "x"]);
    // What was replaced stays in the arena without links.
    let replaced = tree.nodes().filter(|(_, node)| node.links() == 0).count();
    assert_eq!(replaced, 5);
}

#[test]
fn hard_links_reach_into_lower_layers() {
    let lower = [file("a", 1), file("b", 2), file("c", 3)];
    let upper = [
        link("l", Kind::Hardlink, "a"),
        link("m", Kind::Hardlink, "b"),
        link("c", Kind::Hardlink, "b"),
    ];
    let tree = merge(&[&lower, &upper, &[whiteout(".wh.b"), file("a", 9)]]);
    assert_eq!(listing(&tree), ["a", "c", "l", "m"]);
    let node = |path| tree.node(at(&tree, path).unwrap());
    assert_eq!(tree.content(at(&tree, "l").unwrap()), Content::Whole(TarOffset(1)));
    assert_eq!((node("l").links(), node("l").layer()), (1, LayerId(0)));
    assert_eq!(at(&tree, "m"), at(&tree, "c"));
    assert_eq!(node("m").links(), 2);
    // A link is its layer's own, whatever it names.
    assert_eq!(
        merge_any_order(
            &lower,
            &[
                link("l", Kind::Hardlink, "a"),
                whiteout(".wh.l"),
                link("b", Kind::Hardlink, "a"),
                whiteout(".wh.b")
            ]
        ),
        ["a", "b", "c", "l"]
    );
    let gone = try_layers(
        TreeMode::Merged,
        &[&lower, &[whiteout(".wh.a"), link("l", Kind::Hardlink, "a")]],
    );
    assert!(gone.unwrap_err().to_string().contains("no entry before it"));
}

#[test]
fn links_of_lower_layers_lead_on() {
    let lower = [
        link("lib", Kind::Symlink, "usr/lib"),
        file("usr/lib/a", 1),
        file("usr/lib/b", 2),
    ];
    let tree = merge(&[&lower, &[file("lib/c", 3), whiteout("lib/.wh.a")]]);
    assert_eq!(listing(&tree), ["lib", "usr/", "lib/", "b", "c"]);
    // A directory entry replaces the link, and what is in it hides nothing elsewhere.
    let tree = merge(&[&lower, &[dir("lib"), whiteout("lib/.wh.a"), file("lib/c", 3)]]);
    assert_eq!(listing(&tree), ["lib/", "usr/", "c", "lib/", "a", "b"]);
    let tree = merge(&[&lower, &[whiteout("lib/.wh..wh..opq"), file("lib/c", 3)]]);
    assert_eq!(listing(&tree), ["lib", "usr/", "lib/", "c"]);
}

#[test]
fn whiteouts_need_a_directory() {
    // Made where it is missing, as overlayfs would show it; and touched, so hidden and there again.
    assert_eq!(listing(&merge(&[&[], &[whiteout("x/y/.wh.z")]])), ["x/", "y/"]);
    let lower = [file("x/y", 1), file("x/z", 2)];
    assert_eq!(
        merge_any_order(&lower, &[whiteout(".wh.x"), whiteout("x/.wh.y")]),
        ["x/"]
    );
    for path in [".wh.", "d/.wh..", ".wh..."] {
        for mode in [TreeMode::Merged, TreeMode::Overlay] {
            let error = try_layers(mode, &[&[whiteout(path)]]).unwrap_err().to_string();
            assert!(error.contains("without the name"), "{error}");
        }
    }
    let aufs = [
        whiteout(".wh..wh.aufs"),
        dir(".wh..wh.plnk"),
        file("./.wh..wh.plnk/1.2", 1),
        whiteout("d/.wh..wh.orph"),
    ];
    assert_eq!(listing(&merge(&[&aufs])), ["d/"]);
    assert_eq!(listing(&overlay(&aufs)), ["d/"]);
}

#[test]
fn overlayfs_gets_devices_and_marks() {
    let owned = |path: &str| Entry {
        uid: 3,
        gid: 4,
        ..whiteout(path)
    };
    let tree = overlay(&[
        owned("d/.wh.a"),
        whiteout("e/.wh..wh..opq"),
        Entry {
            xattrs: vec![xattr("user.e", "1"), xattr("trusted.overlay.metacopy", "")],
            ..dir("e")
        },
        whiteout("e/.wh.b"),
    ]);
    let node = tree.node(at(&tree, "d/a").unwrap());
    assert_eq!(
        (node.kind(), node.device(), node.mode() & 0o7777),
        (NodeKind::CharDevice, (0, 0), 0)
    );
    assert_eq!((node.uid(), node.gid(), node.mtime().secs), (3, 4, 7));
    let set = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(xattrs_of(&tree, "d"), set(&[("trusted.overlay.origin", "")]));
    let all = [
        ("trusted.overlay.opaque", "y"),
        ("trusted.overlay.origin", ""),
        ("user.e", "1"),
    ];
    assert_eq!(xattrs_of(&tree, "e"), set(&all));
    assert_eq!(listing(&tree), ["d/", "e/", "a", "b"]);
}

#[test]
fn overlayfs_needs_no_whiteout_for_what_is_there_again() {
    let opaque = [("trusted.overlay.opaque".to_owned(), "y".to_owned())];
    for upper in [
        [
            whiteout(".wh.f"),
            file("f", 1),
            whiteout(".wh.d"),
            file("d/x", 2),
            whiteout(".wh.e"),
            dir("e"),
        ],
        [
            file("f", 1),
            whiteout(".wh.f"),
            file("d/x", 2),
            whiteout(".wh.d"),
            dir("e"),
            whiteout(".wh.e"),
        ],
    ] {
        let tree = overlay(&upper);
        assert_eq!(listing(&tree), ["d/", "e/", "f", "x"]);
        assert_eq!(tree.node(at(&tree, "f").unwrap()).kind(), NodeKind::File);
        assert_eq!(xattrs_of(&tree, "d"), opaque);
        assert_eq!(xattrs_of(&tree, "e"), opaque);
    }
}

#[test]
fn one_layer_alone_holds_no_links_into_others() {
    for entries in [
        vec![link("a", Kind::Hardlink, "below")],
        vec![link("a", Kind::Hardlink, "d/below")],
        vec![whiteout(".wh.b"), link("a", Kind::Hardlink, "b")],
        vec![whiteout(".wh.d"), link("a", Kind::Hardlink, "d/b")],
    ] {
        let error = try_layers(TreeMode::Overlay, &[&entries]).unwrap_err().to_string();
        assert!(error.contains("perhaps in a lower layer"), "{error}");
    }
}

#[test]
fn layers_come_in_order() {
    let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
    builder.begin_layer(LayerId(3)).unwrap();
    assert!(builder.begin_layer(LayerId(3)).is_err() && builder.begin_layer(LayerId(2)).is_err());
    builder.begin_layer(LayerId(4)).unwrap();
    assert!(builder.begin_layer(LayerId(65_535)).is_err());
    let mut builder = TreeBuilder::with_mode(TreeMode::Overlay);
    builder.begin_layer(LayerId(2)).unwrap();
    builder.push(&file("a", 1)).unwrap();
    assert!(builder.begin_layer(LayerId(3)).is_err());
}

#[test]
fn many_whiteouts_cost_little() {
    // A wide directory, all of it touched, made opaque over and over: walked once.
    let lower: Vec<_> = (0..20_000).map(|i| dir(&format!("d/{i}"))).collect();
    let mut upper = lower.clone();
    upper.extend((0..20_000).map(|_| whiteout("d/.wh..wh..opq")));
    upper.extend((0..20_000).map(|_| whiteout(".wh.d")));
    let tree = merge(&[&lower, &upper]);
    assert_eq!(tree.name_count(), 20_001);
}

#[test]
fn a_tree_is_listed() {
    use crate::index::listing::Format;
    use crate::index::listing::Selection;
    use crate::tree::listing::write_tree;

    let lower = [
        dir("./"),
        file("d/f", 512),
        link("s", Kind::Symlink, "d"),
        entry("gone", Kind::Fifo),
    ];
    let device = Entry {
        device_major: 1,
        device_minor: 3,
        xattrs: vec![xattr("user.x", "y")],
        ..entry("null", Kind::CharDevice)
    };
    let tree = merge(&[
        &lower,
        &[link("hard", Kind::Hardlink, "d/f"), whiteout(".wh.gone"), device],
    ]);
    let listed = |format| {
        let mut out = Vec::new();
        write_tree(&tree, &Selection::everything(), format, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    let plain = "\
drw-r----- 0/0               0 1970-01-01 00:00 ./
drwxr-xr-x 0/0               0 1970-01-01 00:00 d/
-rw-r----- 0/0               3 1970-01-01 00:00 d/f
hrw-r----- 0/0               0 1970-01-01 00:00 hard link to d/f
crw-r----- 0/0             1,3 1970-01-01 00:00 null
lrwxrwxrwx 0/0               0 1970-01-01 00:00 s -> d
";
    assert_eq!(listed(Format::Plain), plain);
    let mtree = "\
#mtree
. type=dir mode=640 uid=0 gid=0 time=7.000000009
./d type=dir mode=755 uid=0 gid=0 time=7.000000009
./d/f type=file mode=640 uid=0 gid=0 size=3 time=7.000000009
./hard type=file mode=640 uid=0 gid=0 size=3 time=7.000000009
./null type=char mode=640 uid=0 gid=0 time=7.000000009 device=native,1,3
./s type=link mode=777 uid=0 gid=0 time=7.000000009 link=d
";
    assert_eq!(listed(Format::Mtree), mtree);
    let json: Vec<serde_json::Value> = listed(Format::Json)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(json.len(), 6);
    assert_eq!(
        (&json[2]["layer"], &json[2]["segments"]),
        (&0.into(), &serde_json::json!([[0, 512, 3]]))
    );
    assert_eq!(
        (&json[3]["type"], &json[3]["link"]),
        (&"hardlink".into(), &"d/f".into())
    );
    assert_eq!(
        (&json[4]["layer"], &json[4]["xattrs"]["user.x"]),
        (&1.into(), &"eQ==".into())
    );
    assert!(json.iter().all(|line| line.get("headers").is_none()));
}
