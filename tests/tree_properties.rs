//! Random layers, whiteouts anywhere in them, against a plain model of what the OCI image specification says: a layer's
//! whiteouts first, on what is below, then its entries. And the image of such a tree: every byte from the right layer.
//!
//! No path of these layers leads through a symbolic link: that is the one thing that depends on the order of entries.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;

use proptest::prelude::*;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage as _, FileMap as _, Origin};
use tarblk::internals::index::{Entry, Kind, Segment, Timestamp, Xattr};
use tarblk::internals::tree::{Content, Node, NodeId, NodeKind, Tree, TreeBuilder, TreeMode};
use tarblk::internals::units::{LayerId, TarOffset};

/// One entry of a layer.
#[derive(Clone, Debug)]
struct Op {
    path: Vec<&'static str>,
    what: What,
    seed: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    File(u64),
    Directory,
    Symlink,
    Fifo,
    Link(Vec<&'static str>),
    Hide,
    Opaque,
}

fn path(parts: std::ops::Range<usize>) -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(vec!["a", "b"]), parts)
}

fn op() -> impl Strategy<Value = Op> {
    let what = prop_oneof![
        5 => prop::sample::select(vec![0_u64, 1, 4096, 5000, 9000]).prop_map(What::File),
        4 => Just(What::Directory),
        1 => Just(What::Symlink),
        1 => Just(What::Fifo),
        2 => path(1..4).prop_map(What::Link),
        3 => Just(What::Hide),
        2 => Just(What::Opaque),
    ];
    (path(0..4), what, any::<u16>()).prop_map(|(path, what, seed)| Op { path, what, seed })
}

impl Op {
    /// The directory that it needs.
    fn parent(&self) -> &[&'static str] {
        match self.what {
            What::Opaque => &self.path,
            _ => &self.path[..self.path.len().saturating_sub(1)],
        }
    }

    fn entry(&self, number: usize) -> Entry {
        let mut path = self.path.join("/");
        match self.what {
            What::Opaque => path += "/.wh..wh..opq",
            What::Hide => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
                path = format!("{parent}/.wh.{name}");
            }
            _ => {}
        }
        let mut entry = Entry {
            path: path.into_bytes(),
            mode: self.seed & 0o7777,
            uid: i64::from(self.seed),
            mtime: Timestamp {
                secs: i64::from(self.seed) * 3,
                nanos: u32::from(self.seed),
            },
            ..Entry::default()
        };
        match &self.what {
            What::File(size) => {
                entry.size = *size;
                // The same offsets in every layer, so that mixing layers up would be noticed.
                let tar_offset = TarOffset(u64::try_from(number).unwrap() * 16_384 + 512);
                entry.segments.extend((*size > 0).then_some(Segment {
                    file_offset: 0,
                    tar_offset,
                    len: *size,
                }));
            }
            What::Directory => {
                entry.kind = Kind::Directory;
                let name = ["user.a", "user.b", "trusted.overlay.opaque"][usize::from(self.seed % 3)];
                entry.xattrs.push(Xattr {
                    name: name.into(),
                    value: self.seed.to_string().into_bytes(),
                });
            }
            What::Symlink => (entry.kind, entry.link) = (Kind::Symlink, b"a/b".to_vec()),
            What::Fifo => entry.kind = Kind::Fifo,
            What::Link(to) => (entry.kind, entry.link) = (Kind::Hardlink, to.join("/").into_bytes()),
            What::Hide | What::Opaque => {}
        }
        entry
    }
}

type Path = Vec<&'static str>;

#[derive(Clone, Debug, Default)]
struct Inode {
    entry: Entry,
    layer: u32,
    /// A directory that no entry of its layer made: its time is nobody's promise.
    implied: bool,
}

#[derive(Clone, Debug)]
struct Model {
    inodes: Vec<Inode>,
    names: BTreeMap<Path, usize>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            inodes: Vec::new(),
            names: BTreeMap::new(),
        };
        model.imply(Vec::new(), 0);
        model
    }

    fn imply(&mut self, path: Path, layer: u32) {
        let entry = Entry {
            kind: Kind::Directory,
            mode: 0o755,
            ..Entry::default()
        };
        self.inodes.push(Inode {
            entry,
            layer,
            implied: true,
        });
        self.names.insert(path, self.inodes.len() - 1);
    }

    fn kind(&self, path: &[&str]) -> Option<Kind> {
        self.names.get(path).map(|&inode| self.inodes[inode].entry.kind)
    }

    fn remove_below(&mut self, path: &[&str]) {
        self.names
            .retain(|other, _| !(other.len() > path.len() && other.starts_with(path)));
    }

    /// What the layer hides of what is there.
    fn hide(&mut self, op: &Op) {
        let parents = (0..=op.parent().len()).map(|len| &op.path[..len]);
        if parents
            .map(|parent| self.kind(parent))
            .any(|kind| kind != Some(Kind::Directory))
        {
            return;
        }
        self.remove_below(&op.path);
        if op.what == What::Hide {
            self.names.remove(&op.path);
        }
    }

    /// What the layer adds; false if it cannot.
    fn add(&mut self, op: &Op, number: usize, layer: u32, lower: &Self) -> bool {
        for len in 0..=op.parent().len() {
            let parent = &op.path[..len];
            match self.kind(parent) {
                Some(Kind::Directory) => {}
                // Hidden by a whiteout that may come later.
                None if lower.kind(parent).is_none_or(|kind| kind == Kind::Directory) => {
                    self.imply(parent.to_vec(), layer);
                }
                _ => return false,
            }
        }
        let mut entry = op.entry(number);
        entry.xattrs.retain(|xattr| !xattr.name.starts_with(b"trusted."));
        match &op.what {
            What::Hide | What::Opaque => {}
            What::Directory if self.kind(&op.path) == Some(Kind::Directory) => {
                let inode = &mut self.inodes[self.names[&op.path]];
                if inode.layer == layer {
                    let old = std::mem::take(&mut inode.entry.xattrs);
                    let all: BTreeMap<_, _> = old
                        .into_iter()
                        .chain(entry.xattrs)
                        .map(|xattr| (xattr.name, xattr.value))
                        .collect();
                    entry.xattrs = all.into_iter().map(|(name, value)| Xattr { name, value }).collect();
                }
                *inode = Inode {
                    entry,
                    layer,
                    implied: false,
                };
            }
            what => {
                self.remove_below(&op.path);
                self.names.remove(&op.path);
                let inode = if let What::Link(to) = what {
                    match self.names.get(to) {
                        Some(&inode) if self.inodes[inode].entry.kind != Kind::Directory => {
                            // The link's own header counts for the file, but for what is of no use to a link.
                            let file = &mut self.inodes[inode].entry;
                            (file.mode, file.uid, file.mtime) = (entry.mode, entry.uid, entry.mtime);
                            inode
                        }
                        _ => return false,
                    }
                } else {
                    self.inodes.push(Inode {
                        entry,
                        layer,
                        implied: false,
                    });
                    self.inodes.len() - 1
                };
                self.names.insert(op.path.clone(), inode);
            }
        }
        true
    }

    /// Applies a layer; leaves out of it what cannot be.
    fn apply(&mut self, layer: u32, ops: &mut Vec<(usize, Op)>) {
        let lower = self.clone();
        'again: loop {
            *self = lower.clone();
            for (_, op) in ops
                .iter()
                .filter(|(_, op)| matches!(op.what, What::Hide | What::Opaque))
            {
                self.hide(op);
            }
            for at in 0..ops.len() {
                let (number, op) = &ops[at];
                let mut next = self.clone();
                if next.add(op, *number, layer, &lower) {
                    *self = next;
                } else {
                    ops.remove(at);
                    continue 'again;
                }
            }
            return;
        }
    }
}

fn names(tree: &Tree) -> BTreeMap<Vec<u8>, NodeId> {
    let mut found = BTreeMap::from([(Vec::new(), NodeId::ROOT)]);
    let mut pending = vec![(Vec::new(), NodeId::ROOT)];
    while let Some((path, directory)) = pending.pop() {
        for child in tree.children(directory) {
            let path = if path.is_empty() {
                child.name.to_vec()
            } else {
                [&path[..], child.name].join(&b'/')
            };
            pending.push((path.clone(), child.node));
            found.insert(path, child.node);
        }
    }
    found
}

fn check_tree(tree: &Tree, model: &Model) {
    let found = names(tree);
    let expected: BTreeMap<Vec<u8>, usize> = model
        .names
        .iter()
        .map(|(path, &inode)| (path.join("/").into_bytes(), inode))
        .collect();
    assert!(
        found.keys().eq(expected.keys()),
        "{:?}\n{:?}",
        found.keys(),
        expected.keys()
    );
    let mut nodes = HashMap::new();
    for (path, &inode) in &expected {
        let id = found[path];
        let path = String::from_utf8_lossy(path);
        assert_eq!(*nodes.entry(inode).or_insert(id), id, "{path}: another file");
        let (node, Inode { entry, layer, implied }) = (tree.node(id), &model.inodes[inode]);
        let kind = match node.kind() {
            NodeKind::File => Kind::File,
            NodeKind::Directory => Kind::Directory,
            NodeKind::Symlink => Kind::Symlink,
            NodeKind::CharDevice => Kind::CharDevice,
            NodeKind::BlockDevice => Kind::BlockDevice,
            NodeKind::Fifo => Kind::Fifo,
        };
        let mode = if kind == Kind::Symlink { 0o777 } else { entry.mode };
        assert_eq!((kind, node.mode() & 0o7777), (entry.kind, mode), "{path}");
        assert_eq!((i64::from(node.uid()), node.layer().0), (entry.uid, *layer), "{path}");
        if !implied {
            assert_eq!(node.mtime(), entry.mtime, "{path}");
        }
        let xattrs: Vec<_> = tree
            .xattrs(node.xattr_set())
            .map(|(name, value)| Xattr {
                name: name.to_vec(),
                value: value.to_vec(),
            })
            .collect();
        assert_eq!(xattrs, entry.xattrs, "{path}");
        if kind != Kind::Directory {
            let links = expected.values().filter(|&&other| other == inode).count();
            assert_eq!(usize::try_from(node.links()).unwrap(), links, "{path}");
        }
        let at = entry.segments.first().map(|segment| segment.tar_offset);
        let found = match tree.content(id) {
            Content::Whole(at) => Some(at),
            Content::Scattered(_) => None,
        };
        assert_eq!((node.size(), found), (entry.size, at), "{path}");
    }
    let distinct: BTreeSet<_> = nodes.values().collect();
    assert_eq!(distinct.len(), nodes.len(), "two files became one");
}

/// Every byte of every file is in the image once, from its own layer, and the file map finds it.
fn check_image(image: &Ext4Image) {
    let tree = image.tree();
    let mut files: Vec<_> = tree
        .nodes()
        .filter(|(_, node)| node.links() > 0)
        .filter_map(|(id, node)| match tree.content(id) {
            Content::Whole(at) => Some((node.layer(), at, node.size(), node.parent())),
            Content::Scattered(_) => None,
        })
        .collect();
    files.sort_unstable();
    let mut pieces = Vec::new();
    image.pieces(0, image.len() / 4096, &mut pieces);
    let mut block = [0; 4096];
    let mut at = 0;
    let mut found: BTreeMap<(LayerId, TarOffset), u64> = BTreeMap::new();
    for piece in pieces {
        match piece.origin {
            Origin::Metadata => {
                for number in at / 4096..(at + piece.len) / 4096 {
                    image.fill_metadata(number, &mut block);
                }
            }
            Origin::Layer(layer, start) => {
                let file = image.file_at(layer, start).unwrap();
                assert_eq!(file.layer, layer);
                *found.entry((layer, file.range.start)).or_default() += piece.len;
            }
            Origin::Zero => {}
        }
        at += piece.len;
    }
    let expected = files.iter().map(|&(layer, at, size, _)| ((layer, at), size)).collect();
    assert_eq!(found, expected);
    for &(layer, at, size, directory) in &files {
        for at in [at, at.plus(size - 1)] {
            let file = image.file_at(layer, at).unwrap();
            assert_eq!(file.range.len, size);
        }
        let end = at.plus(size);
        assert!(image.file_at(layer, end).is_none_or(|file| file.range.start >= end));
        assert_eq!(image.file_at(LayerId(99), at), None);
        let here = (layer, at);
        let siblings = || {
            files
                .iter()
                .filter(|other| other.3 == directory)
                .map(|other| (other.0, other.1))
        };
        let ring: Vec<_> = siblings()
            .filter(|other| *other > here)
            .chain(siblings().filter(|other| *other < here))
            .collect();
        let mut visited = Vec::new();
        image.neighbours(image.file_at(layer, at).unwrap().file, &mut |other| {
            visited.push((other.layer, other.range.start));
            ControlFlow::Continue(())
        });
        assert_eq!(visited, ring);
    }
}

/// How many images: as many as `PROPTEST_CASES` says.
fn cases() -> u32 {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    cases.unwrap_or(500)
}

/// What is in one directory of a stack of trees, as overlayfs sees it: directories of that name, the highest first, down to
/// an opaque one or something else.
type Merged = Vec<(usize, NodeId)>;

/// What overlayfs shows of single layers, the highest last: by path the layer and node that its attributes come from.
fn stacked(trees: &[Tree]) -> BTreeMap<Vec<u8>, (usize, NodeId)> {
    let is_whiteout = |layer: usize, id| {
        let node: &Node = trees[layer].node(id);
        node.kind() == NodeKind::CharDevice && node.device() == (0, 0)
    };
    let is_opaque = |layer: usize, id| {
        let tree: &Tree = &trees[layer];
        tree.xattrs(tree.node(id).xattr_set())
            .any(|found| found == (b"trusted.overlay.opaque", b"y"))
    };
    // Marks on roots are not looked at, so these layers have none.
    let roots: Merged = (0..trees.len()).rev().map(|layer| (layer, NodeId::ROOT)).collect();
    let mut found = BTreeMap::from([(Vec::new(), roots[0])]);
    let mut pending: Vec<(Vec<u8>, Merged)> = vec![(Vec::new(), roots)];
    while let Some((path, directories)) = pending.pop() {
        let names: BTreeSet<&[u8]> = directories
            .iter()
            .flat_map(|&(layer, id)| trees[layer].children(id).map(|child| child.name))
            .collect();
        for name in names {
            let mut merged = Merged::new();
            for &(layer, id) in &directories {
                let Some(id) = trees[layer].child(id, name) else {
                    continue;
                };
                let directory = trees[layer].node(id).is_directory();
                if directory || merged.is_empty() && !is_whiteout(layer, id) {
                    merged.push((layer, id));
                }
                if !directory || is_opaque(layer, id) {
                    break;
                }
            }
            let Some(&(layer, id)) = merged.first() else { continue };
            let path = if path.is_empty() {
                name.to_vec()
            } else {
                [&path[..], name].join(&b'/')
            };
            found.insert(path.clone(), (layer, id));
            if trees[layer].node(id).is_directory() {
                pending.push((path, merged));
            }
        }
    }
    found
}

/// Every directory with a whiteout is marked, so that the kernel does not list the whiteout.
fn check_marks(tree: &Tree) {
    for (id, node) in tree.nodes().filter(|(_, node)| node.is_directory() && node.links() > 0) {
        let whiteouts = tree
            .children(id)
            .any(|child| tree.node(child.node).kind() == NodeKind::CharDevice);
        let marked = tree
            .xattrs(node.xattr_set())
            .any(|found| found == (b"trusted.overlay.origin", b""));
        assert!(marked || !whiteouts, "{}", String::from_utf8_lossy(&tree.path(id)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn merged_layers_are_what_the_specification_says(
        layers in prop::collection::vec(prop::collection::vec(op(), 0..25), 1..5),
    ) {
        let mut model = Model::new();
        let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
        for (number, ops) in (0_u32..).zip(layers) {
            let mut ops: Vec<_> = ops
                .into_iter()
                .filter(|op| !op.path.is_empty() || matches!(op.what, What::Directory | What::Opaque))
                .enumerate()
                .collect();
            model.apply(number, &mut ops);
            builder.begin_layer(LayerId(number)).unwrap();
            for (at, op) in &ops {
                builder.push(&op.entry(*at)).unwrap();
            }
        }
        let tree = builder.finish();
        check_tree(&tree, &model);
        check_image(&Ext4Image::plan(tree, &Ext4Options::default()).unwrap());
    }

    #[test]
    fn single_layers_stacked_are_the_merged_tree(
        layers in prop::collection::vec(prop::collection::vec(op(), 0..25), 1..5),
    ) {
        let mut model = Model::new();
        let mut merged = TreeBuilder::with_mode(TreeMode::Merged);
        let mut trees = Vec::new();
        for (number, ops) in (0_u32..).zip(layers) {
            // Links across layers are errors, and overlayfs does not heed an opaque root.
            let possible = |op: &Op| match op.what {
                What::Link(_) => false,
                What::Directory => true,
                _ => !op.path.is_empty(),
            };
            let mut ops: Vec<_> = ops.into_iter().filter(possible).enumerate().collect();
            model.apply(number, &mut ops);
            merged.begin_layer(LayerId(number)).unwrap();
            let mut alone = TreeBuilder::with_mode(TreeMode::Overlay);
            alone.begin_layer(LayerId(number)).unwrap();
            for (at, op) in &ops {
                merged.push(&op.entry(*at)).unwrap();
                alone.push(&op.entry(*at)).unwrap();
            }
            let tree = alone.finish();
            check_marks(&tree);
            trees.push(tree);
        }
        let merged = merged.finish();
        let (found, expected) = (stacked(&trees), names(&merged));
        prop_assert!(found.keys().eq(expected.keys()), "{:?}\n{:?}", found.keys(), expected.keys());
        for (path, (layer, id)) in found {
            let (one, other) = (trees[layer].node(id), merged.node(expected[&path]));
            let path = String::from_utf8_lossy(&path);
            prop_assert_eq!(one.kind(), other.kind(), "{}", path);
            if !one.is_directory() {
                prop_assert_eq!((one.layer(), one.mtime(), one.uid()), (other.layer(), other.mtime(), other.uid()), "{}", path);
                let contents = (trees[layer].content(id), merged.content(expected[path.as_bytes()]));
                prop_assert_eq!(contents.0, contents.1, "{}", path);
            } else if one.layer() == other.layer() {
                prop_assert_eq!((one.mode(), one.uid()), (other.mode(), other.uid()), "{}", path);
            }
        }
    }
}
