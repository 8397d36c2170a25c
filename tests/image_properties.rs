//! Random trees, tarred, planned and read back, against a plain model of what unpacking does.

#![allow(clippy::unwrap_used)]

mod oracle;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Read};
use oracle::{Item, Kind, Mounted, Snapshot, assert_clean, assert_same, digest, snapshot};
use proptest::prelude::*;
use tarblk::internals::image::export::export;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage, FileMap, Origin, Piece};
use tarblk::internals::index::{Collector, EndOfArchive, Entry, Parser};
use tarblk::internals::tree::{Content, NodeId, NodeKind, Tree, TreeBuilder};
use tarblk::internals::units::{LayerId, TarOffset};

/// One entry to tar.
#[derive(Clone, Debug)]
struct Op {
    path: Vec<u8>,
    kind: tar::EntryType,
    link: Vec<u8>,
    mode: u32,
    owner: (u32, u32),
    mtime: (u64, u32),
    content: Vec<u8>,
    device: (u32, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn part() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        12 => prop::sample::select(vec!["a", "b", "c", "dd"]),
        1 => prop::sample::select(vec![".", "..", "", "\u{e9}", "new\nline", ".wh.a"]),
        1 => Just("a-name-long-enough-that-the-block-of-a-directory-is-full-after-a-few-of-them-a-name-long-enough-that-the-block"),
    ]
}

fn path(parts: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    let start = prop_oneof![4 => Just(""), 1 => Just("./"), 1 => Just("/"), 1 => Just("../")];
    (start, prop::collection::vec(part(), parts)).prop_map(|(start, parts)| {
        let path = format!("{start}{}", parts.join("/"));
        // An empty value would unset the record.
        if path.is_empty() {
            b".".to_vec()
        } else {
            path.into_bytes()
        }
    })
}

/// Whether a name ends with a slash behind something that is a name.
fn has_slash(path: &[u8]) -> bool {
    let mut parts = path.rsplit(|byte| *byte == b'/');
    parts.next() == Some(b"")
        && parts
            .find(|part| !part.is_empty())
            .is_some_and(|last| last != b"." && last != b"..")
}

fn op() -> impl Strategy<Value = Op> {
    use tar::EntryType as Type;
    let kind = prop_oneof![
        6 => Just(Type::Regular),
        5 => Just(Type::Directory),
        3 => Just(Type::Symlink),
        3 => Just(Type::Link),
        1 => Just(Type::Char),
        1 => Just(Type::Block),
        1 => Just(Type::Fifo),
    ];
    let size = prop_oneof![3 => 0_usize..20, 2 => 4090_usize..4103, 1 => 0_usize..50_000];
    let attribute_name = prop::sample::select(vec!["user.a", "user.some_name", "trusted.t", "security.s"]);
    let value = prop_oneof![3 => 0_usize..40, 1 => 0_usize..1500];
    let xattrs = prop::collection::btree_map(attribute_name, value, 0..3);
    // ext4-view cannot read times whose low 32 bits look negative.
    let secs = prop_oneof![4 => 0_u64..1 << 31, 1 => (1_u64 << 32)..(1 << 32) + (1 << 31)];
    (
        path(1..5),
        kind,
        path(1..4),
        0_u32..0o10000,
        (0_u32..100_000, any::<u16>()),
        (secs, 0_u32..1_000_000_000),
        size,
        any::<u64>(),
        xattrs,
    )
        .prop_map(|(path, kind, link, mode, (uid, gid), mtime, size, seed, xattrs)| {
            let mut content = vec![0; if kind == Type::Regular { size } else { 0 }];
            oracle::Payload::Dense.fill(TarOffset(seed >> 8), &mut content);
            let is_plain = matches!(kind, Type::Regular | Type::Directory);
            let xattrs = xattrs
                .into_iter()
                .filter(|(name, _)| is_plain || !name.starts_with("user."));
            let xattrs = xattrs.map(|(name, len)| {
                let mut value = vec![0; len];
                oracle::Payload::Dense.fill(TarOffset(seed >> 9), &mut value);
                (name.as_bytes().to_vec(), value)
            });
            let device = if matches!(kind, Type::Char | Type::Block) {
                (mode & 0xfff, uid)
            } else {
                (0, 0)
            };
            Op {
                path,
                kind,
                link,
                mode,
                owner: (uid, gid.into()),
                mtime,
                content,
                device,
                xattrs: xattrs.collect(),
            }
        })
}

/// Writes a tar; all that may be long goes into extension headers.
fn tar_of(ops: &[Op]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for op in ops {
        let mtime = format!("{}.{:09}", op.mtime.0, op.mtime.1);
        let mut records: Vec<(String, Vec<u8>)> =
            vec![("mtime".into(), mtime.into_bytes()), ("path".into(), op.path.clone())];
        if matches!(op.kind, tar::EntryType::Symlink | tar::EntryType::Link) {
            records.push(("linkpath".into(), op.link.clone()));
        }
        for (name, value) in &op.xattrs {
            records.push((format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), value.clone()));
        }
        builder
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
            .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("x").unwrap();
        header.set_entry_type(op.kind);
        header.set_mode(op.mode);
        header.set_uid(op.owner.0.into());
        header.set_gid(op.owner.1.into());
        header.set_mtime(0);
        header.set_device_major(op.device.0).unwrap();
        header.set_device_minor(op.device.1).unwrap();
        header.set_size(u64::try_from(op.content.len()).unwrap());
        header.set_cksum();
        builder.append(&header, &op.content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Unpacking as plainly as it can be told: inodes, and directories that map names to them.
#[derive(Clone, Default)]
struct Model {
    items: Vec<Item>,
    names: Vec<BTreeMap<Vec<u8>, usize>>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self::default();
        model.add(Item {
            kind: Kind::Directory,
            mode: 0o755,
            ..Item::default()
        });
        model
    }

    fn add(&mut self, item: Item) -> usize {
        self.items.push(item);
        self.names.push(BTreeMap::new());
        self.items.len() - 1
    }

    /// Go's `filepath.Clean`, rooted or not.
    fn clean(path: &[u8], rooted: bool) -> Vec<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for part in path.split(|&byte| byte == b'/') {
            if part == b".." {
                if parts.last().is_some_and(|last| last != b"..") {
                    parts.pop();
                } else if !rooted {
                    parts.push(part.to_vec());
                }
            } else if !part.is_empty() && part != b"." {
                parts.push(part.to_vec());
            }
        }
        parts
    }

    /// The directory that these parts lead to from the directory at the end of `trail`; makes what is missing, if asked.
    fn walk(
        &mut self,
        trail: &mut Vec<usize>,
        parts: &[Vec<u8>],
        made: Option<(u64, u32)>,
        links: &mut u32,
    ) -> Result<(), ()> {
        for part in parts {
            let here = *trail.last().unwrap();
            if part == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let known = self.names[here].get(part).copied();
            let there = match (known, made) {
                (Some(there), _) => there,
                (None, None) => return Err(()),
                (None, Some((secs, nanos))) => {
                    let mtime = (i64::try_from(secs).unwrap(), nanos);
                    let there = self.add(Item {
                        kind: Kind::Directory,
                        mode: 0o755,
                        mtime,
                        ..Item::default()
                    });
                    self.names[here].insert(part.clone(), there);
                    there
                }
            };
            match self.items[there].kind {
                Kind::Directory => trail.push(there),
                Kind::Symlink => {
                    *links += 1;
                    if *links > 255 {
                        return Err(());
                    }
                    let text = self.items[there].link.clone();
                    let rooted = text.starts_with(b"/");
                    if rooted {
                        trail.truncate(1);
                    }
                    let text = Self::clean(&text, rooted);
                    self.walk(trail, &text, made, links)?;
                }
                _ => return Err(()),
            }
        }
        Ok(())
    }

    fn apply(&mut self, op: &Op) -> Result<(), ()> {
        let mtime = (i64::try_from(op.mtime.0).unwrap(), op.mtime.1);
        if self.items.len() == 1 && self.items[0].mtime == (0, 0) {
            self.items[0].mtime = mtime;
        }
        let mut item = Item {
            mode: op.mode & 0o7777,
            owner: op.owner,
            mtime,
            names: 0,
            xattrs: op.xattrs.clone(),
            device: op.device,
            ..Item::default()
        };
        item.kind = match op.kind {
            tar::EntryType::Directory => Kind::Directory,
            tar::EntryType::Symlink => {
                item.link.clone_from(&op.link);
                item.size = u64::try_from(op.link.len()).unwrap();
                item.mode = 0o777;
                if op.link.is_empty() {
                    return Err(());
                }
                Kind::Symlink
            }
            tar::EntryType::Char => Kind::Char,
            tar::EntryType::Block => Kind::Block,
            tar::EntryType::Fifo => Kind::Fifo,
            // GNU tar believes the slash.
            tar::EntryType::Regular if has_slash(&op.path) => Kind::Directory,
            _ => {
                item.size = u64::try_from(op.content.len()).unwrap();
                item.digest = digest(item.size, |at, out| {
                    let at = usize::try_from(at).unwrap();
                    out.copy_from_slice(&op.content[at..at + out.len()]);
                });
                Kind::File
            }
        };
        let mut parts = Self::clean(&op.path, true);
        let Some(name) = parts.pop() else {
            if item.kind == Kind::Directory {
                item.xattrs = std::mem::take(&mut self.items[0].xattrs)
                    .into_iter()
                    .chain(item.xattrs)
                    .collect();
                self.items[0] = item;
            }
            return Ok(());
        };
        let mut trail = vec![0];
        self.walk(&mut trail, &parts, Some(op.mtime), &mut 0)?;
        let parent = *trail.last().unwrap();
        if let Some(&old) = self.names[parent].get(&name) {
            if self.items[old].kind == Kind::Directory && item.kind == Kind::Directory {
                item.xattrs = std::mem::take(&mut self.items[old].xattrs)
                    .into_iter()
                    .chain(item.xattrs)
                    .collect();
                self.items[old] = item;
                return Ok(());
            }
            let mut target = Self::clean(&op.link, true);
            if op.kind == tar::EntryType::Link && target.pop().as_ref() == Some(&name) {
                // A link to itself leaves what is there.
                let mut trail = vec![0];
                let walked = self.walk(&mut trail, &target, None, &mut 0);
                if walked.is_ok() && trail.last() == Some(&parent) {
                    return Ok(());
                }
            }
            self.names[parent].remove(&name);
        }
        let node = if op.kind == tar::EntryType::Link {
            let mut target = Self::clean(&op.link, true);
            let last = target.pop().ok_or(())?;
            let mut trail = vec![0];
            self.walk(&mut trail, &target, None, &mut 0)?;
            let node = *self.names[*trail.last().unwrap()].get(&last).ok_or(())?;
            if self.items[node].kind == Kind::Directory {
                return Err(());
            }
            node
        } else {
            self.add(item)
        };
        self.names[parent].insert(name, node);
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        let mut found = Snapshot::new();
        let mut paths: BTreeMap<usize, BTreeSet<Vec<u8>>> = BTreeMap::new();
        let mut pending = vec![(Vec::new(), 0)];
        while let Some((path, node)) = pending.pop() {
            paths.entry(node).or_default().insert(path.clone());
            for (name, &below) in &self.names[node] {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    [&path[..], name].join(&b'/')
                };
                pending.push((path, below));
            }
            found.insert(path, self.items[node].clone());
        }
        for (node, paths) in paths {
            let names = u64::try_from(paths.len()).unwrap();
            for path in &paths {
                let item = found.get_mut(path).unwrap();
                item.names = if self.items[node].kind == Kind::Directory {
                    0
                } else {
                    names
                };
                if names > 1 {
                    item.first_path.clone_from(paths.first().unwrap());
                }
            }
        }
        found
    }
}

/// The image as a reader of bytes, assembled from its pieces.
struct Reader {
    image: Arc<Ext4Image>,
    tar: Arc<Vec<u8>>,
}

impl Ext4Read for Reader {
    fn read(&mut self, start: u64, out: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let len = u64::try_from(out.len())?;
        let first = start / 4096;
        let count = (start + len).div_ceil(4096) - first;
        let bytes = assemble(&self.image, &self.tar, first, count);
        let skip = usize::try_from(start - first * 4096)?;
        out.copy_from_slice(&bytes[skip..skip + out.len()]);
        Ok(())
    }
}

fn assemble(image: &Ext4Image, tar: &[u8], first: u64, count: u64) -> Vec<u8> {
    let mut pieces = Vec::new();
    image.pieces(first, count, &mut pieces);
    let mut bytes = Vec::new();
    for piece in pieces {
        let len = usize::try_from(piece.len).unwrap();
        let at = bytes.len();
        bytes.resize(at + len, 0);
        match piece.origin {
            Origin::Zero => {}
            Origin::Metadata => {
                let block = first + u64::try_from(at / 4096).unwrap();
                assert!(at.is_multiple_of(4096) && len.is_multiple_of(4096));
                for (block, out) in (block..).zip(bytes[at..].chunks_exact_mut(4096)) {
                    image.fill_metadata(block, out);
                }
            }
            Origin::Layer(layer, from) => {
                assert_eq!(layer, LayerId(0));
                let from = usize::try_from(from.0).unwrap();
                bytes[at..].copy_from_slice(&tar[from..from + len]);
            }
        }
    }
    assert_eq!(bytes.len(), usize::try_from(count * 4096).unwrap());
    bytes
}

/// What ext4-view reads; it knows neither links, attributes nor device numbers.
fn viewed(image: &Arc<Ext4Image>, tar: &Arc<Vec<u8>>) -> Snapshot {
    let ext4 = Ext4::load(Box::new(Reader {
        image: Arc::clone(image),
        tar: Arc::clone(tar),
    }))
    .unwrap();
    let mut found = Snapshot::new();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let full = [&b"/"[..], &path].concat();
        let metadata = ext4.symlink_metadata(&full[..]).unwrap();
        let file_type = metadata.file_type();
        let mut item = Item {
            mode: u32::from(metadata.mode()) & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.modified().seconds(), metadata.modified().nanoseconds()),
            ..Item::default()
        };
        if file_type.is_dir() {
            item.kind = Kind::Directory;
            for entry in ext4.read_dir(&full[..]).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().as_ref().to_vec();
                if name != b"." && name != b".." {
                    pending.push(if path.is_empty() {
                        name
                    } else {
                        [&path[..], &name].join(&b'/')
                    });
                }
            }
        } else if file_type.is_symlink() {
            item.kind = Kind::Symlink;
            item.link = ext4.read_link(&full[..]).unwrap().as_ref().to_vec();
            item.size = metadata.len();
        } else if file_type.is_regular_file() {
            let content = ext4.read(&full[..]).unwrap();
            item.size = metadata.len();
            item.digest = digest(item.size, |at, out| {
                let at = usize::try_from(at).unwrap();
                out.copy_from_slice(&content[at..at + out.len()]);
            });
        } else {
            item.kind = match file_type {
                kind if kind.is_char_dev() => Kind::Char,
                kind if kind.is_block_dev() => Kind::Block,
                _ => Kind::Fifo,
            };
        }
        found.insert(path, item);
    }
    found
}

fn parsed(tar: &[u8]) -> Vec<Entry> {
    let mut entries = Collector::default();
    let mut parser = Parser::new();
    parser.feed(TarOffset(0), tar, &mut entries).unwrap();
    assert_eq!(
        parser.finish(TarOffset(u64::try_from(tar.len()).unwrap())).unwrap(),
        EndOfArchive::Marked
    );
    entries.0
}

fn planned(tar: &[u8]) -> Ext4Image {
    let mut builder = TreeBuilder::new();
    for entry in parsed(tar) {
        builder.push(&entry).unwrap();
    }
    Ext4Image::plan(builder.finish(), &Ext4Options::default()).unwrap()
}

/// Pieces cut at block boundaries and joined inside blocks, so that two ways of telling the same are equal.
fn by_block(pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let mut blocks: Vec<Vec<Piece>> = Vec::new();
    let mut filled = 4096;
    for piece in pieces {
        let mut piece = *piece;
        while piece.len > 0 {
            if filled == 4096 {
                blocks.push(Vec::new());
                filled = 0;
            }
            let len = piece.len.min(4096 - filled);
            blocks.last_mut().unwrap().push(Piece {
                len,
                origin: piece.origin,
            });
            filled += len;
            piece.len -= len;
            if let Origin::Layer(_, at) = &mut piece.origin {
                *at = at.plus(len);
            }
        }
    }
    assert_eq!(filled, 4096);
    blocks
}

fn check_pieces(image: &Ext4Image, ranges: &[(u64, u64)]) {
    let blocks = image.len() / 4096;
    let mut all = Vec::new();
    image.pieces(0, blocks, &mut all);
    let all = by_block(&all);
    assert_eq!(u64::try_from(all.len()).unwrap(), blocks);
    let single = (0..blocks).map(|block| (block, 1));
    for (start, count) in ranges
        .iter()
        .map(|(start, count)| (start % (blocks + 3), count % 70))
        .chain(single)
    {
        let mut pieces = Vec::new();
        image.pieces(start, count, &mut pieces);
        assert!(pieces.iter().all(|piece| piece.len > 0));
        let found = if pieces.is_empty() {
            Vec::new()
        } else {
            by_block(&pieces)
        };
        let zero = vec![Piece {
            len: 4096,
            origin: Origin::Zero,
        }];
        let expected: Vec<_> = (start..start + count)
            .map(|block| all.get(usize::try_from(block).unwrap()).unwrap_or(&zero).clone())
            .collect();
        assert_eq!(found, expected, "{count} blocks from {start}");
    }
}

/// The stored bytes of every named file, by brute force: where, and in which directory.
fn stored(tree: &Tree) -> Vec<(TarOffset, u64, NodeId)> {
    let mut stored: Vec<_> = tree
        .nodes()
        .filter(|(_, node)| node.kind() == NodeKind::File && node.links() > 0)
        .filter_map(|(id, node)| match tree.content(id) {
            Content::Whole(start) => Some((start, node.size(), node.parent())),
            Content::Scattered(_) => None,
        })
        .collect();
    stored.sort();
    stored
}

fn check_file_map(image: &Ext4Image, tar_len: u64) {
    let stored = stored(image.tree());
    for at in (0..tar_len).step_by(256).chain(
        stored
            .iter()
            .flat_map(|(start, len, _)| [start.0, start.0 + len - 1, start.0 + len]),
    ) {
        let at = TarOffset(at);
        let expected = stored
            .iter()
            .find(|(start, len, _)| at >= *start && at.since(*start) < *len);
        let found = image.file_at(LayerId(0), at);
        assert_eq!(
            found.map(|file| (file.range.start, file.range.len)),
            expected.map(|&(start, len, _)| (start, len))
        );
        assert_eq!(image.file_at(LayerId(1), at), None);
        let (Some(file), Some(&(start, _, directory))) = (found, expected) else {
            continue;
        };
        let siblings = || stored.iter().filter(|other| other.2 == directory).map(|other| other.0);
        let ring: Vec<_> = siblings()
            .filter(|other| *other > start)
            .chain(siblings().filter(|other| *other < start))
            .collect();
        let mut visited = Vec::new();
        image.neighbours(file.file, &mut |other| {
            visited.push(other.range.start);
            ControlFlow::Continue(())
        });
        assert_eq!(visited, ring);
        let mut visits = 0;
        image.neighbours(file.file, &mut |_| {
            visits += 1;
            ControlFlow::Break(())
        });
        assert_eq!(visits, ring.len().min(1));
    }
}

/// How many trees: as many as `PROPTEST_CASES` says.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_read_back(ops in prop::collection::vec(op(), 0..60), ranges in prop::collection::vec(any::<(u64, u64)>(), 20)) {
        let mut model = Model::new();
        let mut good: Vec<Op> = Vec::new();
        let all = tar_of(&ops);
        let entries = parsed(&all);
        let mut good_entries: Vec<Entry> = Vec::new();
        for (op, entry) in ops.iter().zip(entries) {
            let mut next = model.clone();
            if next.apply(op).is_ok() {
                (model, good) = (next, [&good[..], std::slice::from_ref(op)].concat());
                good_entries.push(entry);
            } else {
                let mut builder = TreeBuilder::new();
                for entry in &good_entries {
                    builder.push(entry).unwrap();
                }
                prop_assert!(builder.push(&entry).is_err(), "{:?} was taken", op);
            }
        }
        let expected = model.snapshot();
        let tar = Arc::new(tar_of(&good));
        let image = Arc::new(planned(&tar));

        let mut seen = expected.clone();
        for item in seen.values_mut() {
            (item.names, item.device) = (0, (0, 0));
            item.first_path.clear();
            item.xattrs.clear();
        }
        assert_same(&viewed(&image, &tar), &seen);

        let scratch = oracle::scratch();
        let path = scratch.path().join("image");
        let file = std::fs::File::create(&path).unwrap();
        export(&*image, &file, &mut |_, at, out| {
            let at = usize::try_from(at.0).unwrap();
            out.copy_from_slice(&tar[at..at + out.len()]);
            Ok(())
        }).unwrap();
        prop_assert!(std::fs::read(&path).unwrap() == assemble(&image, &tar, 0, image.len() / 4096));
        assert_clean(&path);
        if let Some(mounted) = Mounted::new(&path) {
            assert_same(&snapshot(mounted.path()), &expected);
        }

        check_pieces(&image, &ranges);
        check_file_map(&image, u64::try_from(tar.len()).unwrap());

        let again = planned(&tar);
        prop_assert_eq!(again.uuid(), image.uuid());
        prop_assert!(assemble(&again, &tar, 0, again.len() / 4096) == assemble(&image, &tar, 0, image.len() / 4096));
    }
}
