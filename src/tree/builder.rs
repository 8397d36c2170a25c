//! From entries to a tree, by containerd's rules (`pkg/archive/tar.go`, its `applyNaive` and `createTarFile`):
//!
//! - Paths are cleaned, and no `..` leads above the root. Links on the way to an entry's directory are followed, inside the
//!   root only, at most 255 of them. Their own texts are cleaned before they are followed, as `fs.RootPath` does. In a merged
//!   tree these may be links of lower layers: `lib/x` over `lib -> usr/lib` is `usr/lib/x`.
//! - A directory over a directory brings its attributes and leaves the content. Anything else over anything is an unlink
//!   and a new node: a hard link made before keeps the old one, a directory goes with all it holds.
//! - A hard link names what its target is at that moment. In an image the link's own entry gives owner, mode, time and
//!   attributes to the file that it names, as containerd has it; in a tar by itself it does not, as in GNU tar. A hard link
//!   to itself leaves what is there as it is.
//! - Missing directories are made: 0755, root's, with the time of the entry that needed them (containerd and GNU tar: now,
//!   which no image that is to be the same everywhere can use).
//!
//! One rule is not containerd's: it ignores the root's own entry, here (as in GNU tar and umoci) its attributes are the
//! root's. What whiteouts do, and what differs between layers, is told in the module `whiteout`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::error::{show, show_beginning};
use super::names::{self, Dirent};
use super::path;
use super::table::{NONE, Name, NameTable};
use super::xattrs::{XattrSetId, XattrTable};
use super::{NAME_MAX, Node, NodeKind, PATH_MAX, Tree, TreeError, pair, type_bits, unpair};
use crate::index::{Entry, EntrySink, IndexError, Kind, Segment};
use crate::units::{LayerId, to_usize};

mod attributes;
mod check;
mod whiteout;

use attributes::Warnings;
use check::{check, nanos, too_much};
use whiteout::Layers;

pub use whiteout::Whiteout;

/// Links that may be followed on the way to one entry: containerd's number.
const LINKS_MAX: u32 = 255;
/// Parts of link texts that may be walked on the way to one entry. Ordinary ones have a handful; without a bound, 255 links
/// of 4095 bytes would cost half a million steps, entry after entry.
const LINK_PARTS_MAX: usize = 8192;
/// Missing directories that a layer may make us make: this many, and [`MADE_PER_ENTRY`] for each entry. Programs that leave
/// directories out make a few for each file; paths of two thousand parts each, entry after entry, would make gigabytes of
/// directories out of a kilobyte of a compressed layer.
const MADE_MAX: u64 = 1 << 14;
/// See [`MADE_MAX`].
const MADE_PER_ENTRY: u64 = 32;

/// What the entries are, and so by whose rules they become files (docs/rules.md) and what whiteouts among them mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TreeMode {
    /// A tar by itself, which becomes what GNU tar extracts: whiteouts are the files they are.
    #[default]
    Plain,
    /// Layers of an image, the lowest first, which become what containerd makes of them: whiteouts hide what lower layers
    /// have, and are not there themselves.
    Merged,
    /// One layer as overlayfs wants it among others: whiteouts become 0/0 character devices, opaque directories get
    /// `trusted.overlay.opaque`, directories with whiteouts in them `trusted.overlay.origin`.
    Overlay,
}

/// Takes entries in the tar's order and makes them a [`Tree`].
pub struct TreeBuilder {
    mode: TreeMode,
    layer: u16,
    layers: Layers,
    nodes: Vec<Node>,
    names: NameTable,
    segments: Vec<Segment>,
    xattrs: XattrTable,
    /// The directory part of the last entry's path, as recorded, and what it led to: most entries have the same. Emptied
    /// whenever a name changes its meaning.
    last_directory: Vec<u8>,
    last_directory_node: u32,
    /// The length of its path, in bytes.
    last_directory_len: usize,
    /// The directory, with no name in the tree, of what AUFS kept for hard links to it; [`NONE`] where there is none.
    aufs_links: u32,
    warnings: Warnings,
    parts: Vec<Range<usize>>,
    pending: Vec<Part>,
    /// The lengths of the names on the way to where a walk is.
    way: Vec<usize>,
    /// Missing directories that may still be made.
    may_make: u64,
    /// Whether the root's time is still that of no entry at all.
    root_is_untouched: bool,
}

/// A part of a path still to be walked: of the entry's own path, or of a link's text in the arena.
#[derive(Clone)]
enum Part {
    Own(Range<usize>),
    Link(Range<usize>),
}

/// The place that an entry's path leads to.
struct EntryPlace<'e> {
    directory: u32,
    /// The length of the directory's path in bytes, with the slash behind it.
    path_len: usize,
    name: &'e [u8],
}

/// The end of a walk along a path.
enum Walk {
    /// At a directory, and how long its path is in bytes.
    Directory(u32, usize),
    /// A part is not there. Only without `make`.
    Missing,
}

impl Default for TreeBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for TreeBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeBuilder")
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

impl EntrySink for TreeBuilder {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.push(entry).map_err(|error| IndexError::Sink(error.into()))
    }
}

impl TreeBuilder {
    /// A [plain](TreeMode::Plain) tree with nothing but its root: 0755, root's, of 1970 until the first entry comes.
    #[must_use]
    pub fn new() -> Self {
        Self::with_mode(TreeMode::Plain)
    }

    /// The same, for entries that are to be understood as `mode` says.
    #[must_use]
    pub fn with_mode(mode: TreeMode) -> Self {
        let root = Node {
            mtime_secs: 0,
            detail: pair(NONE, 0),
            place: 0,
            uid: 0,
            gid: 0,
            mtime_nanos: 0,
            xattrs: XattrSetId::EMPTY,
            parent: 0,
            links: 0,
            mode: type_bits::DIRECTORY | 0o755,
            layer: 0,
            scattered: false,
        };
        Self {
            mode,
            layer: 0,
            layers: Layers::default(),
            nodes: vec![root],
            names: NameTable::new(),
            segments: Vec::new(),
            xattrs: XattrTable::new(),
            last_directory: Vec::new(),
            last_directory_node: NONE,
            last_directory_len: 0,
            aufs_links: NONE,
            warnings: Warnings::default(),
            way: Vec::new(),
            parts: Vec::new(),
            pending: Vec::new(),
            may_make: MADE_MAX,
            root_is_untouched: true,
        }
    }

    /// Makes room for about `entries` more entries, so that growing does not copy. The caller bounds a number that
    /// comes from a layer or an index.
    pub fn reserve(&mut self, entries: usize) {
        self.nodes.reserve(entries);
        self.names.reserve(entries);
    }

    /// Begins a layer: the coming entries' content is in it. Until this is called they belong to layer 0.
    ///
    /// # Errors
    /// [`TreeError::LayerOrder`] unless layers come in the order of their numbers, each once, and in a tree for overlayfs
    /// one alone; [`TreeError::TooMuch`] past 65,535 layers.
    pub fn begin_layer(&mut self, layer: LayerId) -> Result<(), TreeError> {
        let number = u16::try_from(layer.0).ok().filter(|&number| number < u16::MAX);
        let number = number.ok_or_else(|| TreeError::TooMuch {
            path: format!("layer {}", layer.0),
        })?;
        let first = self.root_is_untouched && !self.layers.begun;
        if !first && (number <= self.layer || self.mode == TreeMode::Overlay) {
            return Err(TreeError::LayerOrder {
                layer: layer.0,
                last: self.layer.into(),
            });
        }
        self.layer = number;
        self.layers.begin();
        if first {
            self.nodes[0].layer = number;
        }
        Ok(())
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// What the tree cannot hold, or what containerd would not unpack either. The builder is then of no more use.
    pub fn push(&mut self, entry: &Entry) -> Result<(), TreeError> {
        if self.mode == TreeMode::Plain {
            let is_directory = entry.kind == Kind::File
                && entry.path.ends_with(b"/")
                && entry.in_image.as_ref().is_none_or(|other| other.refused_type.is_none())
                && path::split_plain(&entry.path).is_some();
            if !is_directory {
                return self.take(entry);
            }
            // GNU tar takes the slash's word for it, whatever the type says; containerd takes the type's.
            let mut directory = entry.clone();
            (directory.kind, directory.size) = (Kind::Directory, 0);
            directory.segments.clear();
            return self.take(&directory);
        }
        if let Some(flag) = entry.in_image.as_ref().and_then(|other| other.refused_type) {
            let path = show(&entry.path);
            return Err(TreeError::UnknownType { path, flag });
        }
        let mut entry = entry.as_in_image();
        if entry.mtime != attributes::bounded(entry.mtime) {
            entry.to_mut().mtime = attributes::bounded(entry.mtime);
        }
        self.take(&entry)
    }

    /// Takes an entry that is as it is to be understood.
    fn take(&mut self, entry: &Entry) -> Result<(), TreeError> {
        check(entry)?;
        self.may_make = self.may_make.saturating_add(MADE_PER_ENTRY);
        if self.root_is_untouched {
            self.root_is_untouched = false;
            self.nodes[0].mtime_secs = entry.mtime.secs;
            self.nodes[0].mtime_nanos = entry.mtime.nanos;
        }
        if self.mode != TreeMode::Plain && whiteout::is_aufs_own(&entry.path) {
            return self.keep_for_aufs(entry);
        }
        let Some(EntryPlace {
            directory: parent,
            path_len,
            name,
        }) = self.place(entry)?
        else {
            if entry.kind == Kind::Directory {
                self.merge_directory(0, entry)?;
            }
            return Ok(());
        };
        if name.len() > NAME_MAX {
            return Err(TreeError::NameTooLong {
                path: show(&entry.path),
                len: name.len(),
            });
        }
        if path_len + name.len() > PATH_MAX {
            return Err(too_long(&entry.path, path_len + name.len()));
        }
        if self.mode != TreeMode::Plain {
            self.touch(parent);
            if let Some(whiteout) = Whiteout::of(name) {
                return self.whiteout(whiteout, parent, entry);
            }
        }
        let known = self.names.find(parent, name);
        let mut replaces = false;
        if let Some(at) = known {
            let old = self.names.get(at).node;
            if old != NONE {
                if entry.kind == Kind::Directory && self.nodes[to_usize(old)].is_directory() {
                    return self.merge_directory(old, entry);
                }
                if entry.kind == Kind::Hardlink && self.is_link_to_itself(entry, parent, name, old)? {
                    return Ok(());
                }
                replaces = true;
                self.names.set_node(at, NONE);
                self.forget_last_directory();
            }
        }
        let node = match entry.kind {
            Kind::Hardlink => {
                let node = self.hardlink_target(entry, parent, name)?;
                if self.mode != TreeMode::Plain {
                    self.relink(node, entry)?;
                }
                node
            }
            _ => self.make_node(entry, parent)?,
        };
        if replaces && entry.kind == Kind::Directory && self.mode == TreeMode::Overlay {
            // What it replaces, a whiteout or anything else, hid what lower layers have there.
            self.make_opaque(node, entry)?;
        }
        let at = match known {
            Some(at) => {
                self.names.set_node(at, node);
                at
            }
            None => self.add_name(parent, name, node).ok_or_else(|| too_much(entry))?,
        };
        if self.mode != TreeMode::Plain && self.nodes[to_usize(node)].layer != self.layer {
            self.layers.linked.insert(at);
        }
        Ok(())
    }

    /// Ends the build. What was replaced or hidden stays in the arena without links and without a name.
    #[must_use]
    pub fn finish(mut self) -> Tree {
        self.warnings.finish();
        self.names.stop_finding();
        self.xattrs.finish();
        let mut dirents: Vec<Dirent> = Vec::with_capacity(self.names.len());
        let mut keyed = Vec::new();
        self.nodes[0].links = 2;
        self.lay_out(0, &mut dirents, &mut keyed);
        // The array is its own queue: directories are laid out in the order in which their names stand in it.
        let mut at = 0;
        while let Some(&Dirent { node, .. }) = dirents.get(at) {
            if self.nodes[to_usize(node)].is_directory() {
                self.lay_out(node, &mut dirents, &mut keyed);
            }
            at += 1;
        }
        self.nodes.shrink_to_fit();

        self.segments.shrink_to_fit();
        dirents.shrink_to_fit();
        Tree {
            nodes: self.nodes,
            dirents,
            text: self.names.into_text(),
            segments: self.segments,
            xattrs: self.xattrs,
        }
    }

    /// Appends a directory's living names, sorted, and counts links.
    fn lay_out(&mut self, directory: u32, dirents: &mut Vec<Dirent>, keyed: &mut Vec<(u64, Dirent)>) {
        let start = dirents.len();
        let mut at = unpair(self.nodes[to_usize(directory)].detail).0;
        while at != NONE {
            let Name { text, node, next, .. } = self.names.get(at);
            if node != NONE {
                dirents.push(Dirent { text, node });
            }
            at = next;
        }
        names::sort(&mut dirents[start..], self.names.text(), keyed);
        let mut subdirectories = 0;
        for dirent in &dirents[start..] {
            let child = &mut self.nodes[to_usize(dirent.node)];
            if child.is_directory() {
                subdirectories += 1;
                child.links = 2;
                child.parent = directory;
            } else {
                if child.links == 0 {
                    child.parent = directory;
                }
                child.links += 1;
            }
        }
        let node = &mut self.nodes[to_usize(directory)];
        node.links += subdirectories;
        let count = u32::try_from(dirents.len() - start).expect("names are counted in 32 bits");
        node.detail = pair(u32::try_from(start).expect("names are counted in 32 bits"), count);
    }

    /// The directory that the entry goes into and its name there; `None` for the root itself.
    fn place<'e>(&mut self, entry: &'e Entry) -> Result<Option<EntryPlace<'e>>, TreeError> {
        if let Some((directory, name)) = path::split_plain(&entry.path).filter(|_| entry.path.len() <= PATH_MAX) {
            if self.last_directory_node != NONE && directory == self.last_directory {
                return Ok(Some(EntryPlace {
                    directory: self.last_directory_node,
                    path_len: self.last_directory_len,
                    name,
                }));
            }
            if let Walk::Directory(node, path_len) = self.walk(&entry.path, directory.len(), entry, true)? {
                self.last_directory.clear();
                self.last_directory.extend_from_slice(directory);
                self.last_directory_node = node;
                self.last_directory_len = path_len;
                return Ok(Some(EntryPlace {
                    directory: node,
                    path_len,
                    name,
                }));
            }
        }
        self.parts.clear();
        path::clean(&entry.path, false, &mut self.parts);
        let len = self
            .parts
            .iter()
            .map(|part| part.len() + 1)
            .sum::<usize>()
            .saturating_sub(1);
        if len > PATH_MAX {
            return Err(too_long(&entry.path, len));
        }
        let Some(last) = self.parts.pop() else { return Ok(None) };
        self.pending.clear();
        self.pending.extend(self.parts.drain(..).rev().map(Part::Own));
        match self.walk_pending(&entry.path, entry, true)? {
            Walk::Directory(directory, path_len) => Ok(Some(EntryPlace {
                directory,
                path_len,
                name: &entry.path[last],
            })),
            Walk::Missing => Ok(None),
        }
    }

    /// Walks the first `len` bytes of `path` from the root.
    fn walk(&mut self, path: &[u8], len: usize, entry: &Entry, make: bool) -> Result<Walk, TreeError> {
        self.parts.clear();
        path::clean(&path[..len], false, &mut self.parts);
        self.pending.clear();
        self.pending.extend(self.parts.drain(..).rev().map(Part::Own));
        self.walk_pending(path, entry, make)
    }

    /// Walks `self.pending` (last part first) from the root, following links; `make`s directories that are missing.
    fn walk_pending(&mut self, path: &[u8], entry: &Entry, make: bool) -> Result<Walk, TreeError> {
        let mut directory = 0;
        let mut links = 0;
        let mut link_parts = 0;
        // The length of the path so far with the slash behind it, and of each name on it.
        let mut walked = 0;
        self.way.clear();
        while let Some(part) = self.pending.pop() {
            let name = match &part {
                Part::Own(range) => &path[range.clone()],
                Part::Link(range) => &self.names.text()[range.clone()],
            };
            if name == b".." {
                directory = self.nodes[to_usize(directory)].parent;
                walked -= self.way.pop().map_or(0, |name| name + 1);
                continue;
            }
            let name_len = name.len();
            if make && walked + name_len > PATH_MAX {
                return Err(too_long(&entry.path, walked + name_len));
            }
            let found = self.names.find(directory, name);
            let node = found.map_or(NONE, |at| self.names.get(at).node);
            if node == NONE {
                if !make {
                    return Ok(Walk::Missing);
                }
                directory = self.make_missing(directory, found, &part, path, entry)?;
                self.way.push(name_len);
                walked += name_len + 1;
                continue;
            }
            match self.nodes[to_usize(node)].kind() {
                NodeKind::Directory => {
                    directory = node;
                    self.way.push(name_len);
                    walked += name_len + 1;
                }
                NodeKind::CharDevice if self.is_whiteout(node) => {
                    if !make {
                        return Ok(Walk::Missing);
                    }
                    // Hidden and there again: the new one must not show what the old one had.
                    directory = self.make_missing(directory, found, &part, path, entry)?;
                    self.make_opaque(directory, entry)?;
                    self.way.push(name_len);
                    walked += name_len + 1;
                }
                NodeKind::Symlink => {
                    links += 1;
                    let (start, len) = unpair(self.nodes[to_usize(node)].detail);
                    let (start, len) = (to_usize(start), to_usize(len));
                    let text = &self.names.text()[start..start + len];
                    let absolute = text.starts_with(b"/");
                    self.parts.clear();
                    path::clean(text, !absolute, &mut self.parts);
                    link_parts += self.parts.len();
                    if links > LINKS_MAX || link_parts > LINK_PARTS_MAX {
                        return Err(TreeError::TooManyLinks {
                            path: show(&entry.path),
                        });
                    }
                    if absolute {
                        directory = 0;
                        walked = 0;
                        self.way.clear();
                    }
                    let moved = |part: Range<usize>| Part::Link(part.start + start..part.end + start);
                    self.pending.extend(self.parts.drain(..).rev().map(moved));
                }
                _ => {
                    return Err(TreeError::NotADirectory {
                        path: show(&entry.path),
                        obstacle: show(name),
                    });
                }
            }
        }
        Ok(Walk::Directory(directory, walked))
    }

    /// Makes a directory that no entry made: its name is `part`, already in the table at `found` or not at all.
    fn make_missing(
        &mut self,
        parent: u32,
        found: Option<u32>,
        part: &Part,
        path: &[u8],
        entry: &Entry,
    ) -> Result<u32, TreeError> {
        self.may_make = self.may_make.checked_sub(1).ok_or_else(|| TreeError::TooManyMissing {
            path: show(&entry.path),
        })?;
        let implicit = Entry {
            kind: Kind::Directory,
            mode: 0o755,
            mtime: entry.mtime,
            ..Entry::default()
        };
        if self.mode != TreeMode::Plain {
            self.touch(parent);
        }
        let node = self.make_node(&implicit, parent).map_err(|_| too_much(entry))?;
        if let Some(at) = found {
            self.names.set_node(at, node);
            return Ok(node);
        }
        let mut copy = [0; NAME_MAX];
        let name = match part {
            Part::Own(range) => &path[range.clone()],
            Part::Link(range) => &self.names.text()[range.clone()],
        };
        let Some(copy) = copy.get_mut(..name.len()) else {
            return Err(TreeError::NameTooLong {
                path: show(&entry.path),
                len: name.len(),
            });
        };
        copy.copy_from_slice(name);
        self.add_name(parent, copy, node).ok_or_else(|| too_much(entry))?;
        Ok(node)
    }

    /// What a hard link names: looked up after the link's own name was cleared, as when unpacking.
    fn hardlink_target(&mut self, entry: &Entry, parent: u32, name: &[u8]) -> Result<u32, TreeError> {
        let overlay = self.mode == TreeMode::Overlay;
        let missing = || {
            let (path, target) = (show(&entry.path), show(&entry.link));
            if overlay {
                TreeError::HardlinkBelow { path, target }
            } else {
                TreeError::HardlinkMissing { path, target }
            }
        };
        let to_directory = || TreeError::HardlinkToDirectory {
            path: show(&entry.path),
            target: show(&entry.link),
        };
        self.parts.clear();
        path::clean(&entry.link, false, &mut self.parts);
        let Some(last) = self.parts.pop() else {
            return Err(to_directory());
        };
        let target_name = &entry.link[last];
        if let Some(node) = self.aufs_link(&entry.link, target_name) {
            return node.ok_or_else(missing);
        }
        self.pending.clear();
        self.pending.extend(self.parts.drain(..).rev().map(Part::Own));
        let Walk::Directory(directory, _) = self.walk_pending(&entry.link, entry, false)? else {
            return Err(missing());
        };
        if directory == parent && target_name == name {
            return Err(TreeError::HardlinkToItself {
                path: show(&entry.path),
            });
        }
        let found = self.names.find(directory, target_name);
        let node = found.map_or(NONE, |at| self.names.get(at).node);
        if node == NONE || self.is_whiteout(node) {
            return Err(missing());
        }
        if self.nodes[to_usize(node)].is_directory() {
            return Err(to_directory());
        }
        Ok(node)
    }

    /// Whether a hard link names itself where something is that it can name: `old`, which stays then.
    fn is_link_to_itself(&mut self, entry: &Entry, parent: u32, name: &[u8], old: u32) -> Result<bool, TreeError> {
        self.parts.clear();
        path::clean(&entry.link, false, &mut self.parts);
        let Some(last) = self.parts.pop() else {
            return Ok(false);
        };
        if &entry.link[last] != name || self.is_whiteout(old) {
            return Ok(false);
        }
        self.pending.clear();
        self.pending.extend(self.parts.drain(..).rev().map(Part::Own));
        let walk = self.walk_pending(&entry.link, entry, false);
        Ok(matches!(walk?, Walk::Directory(directory, _) if directory == parent))
    }

    pub(super) fn make_node(&mut self, entry: &Entry, parent: u32) -> Result<u32, TreeError> {
        let number = u32::try_from(self.nodes.len()).ok().filter(|&number| number < NONE);
        let number = number.ok_or_else(|| too_much(entry))?;
        let (uid, gid) = self.owner(entry);
        let (mode, xattrs) = self.new_attributes(entry, parent)?;
        let mut detail = 0;
        let mut place = 0;
        let mut scattered = false;
        let type_bits = match entry.kind {
            Kind::File | Kind::Hardlink => {
                detail = entry.size;
                match entry.segments[..] {
                    [
                        Segment {
                            file_offset: 0,
                            tar_offset,
                            len,
                        },
                    ] if len == entry.size => place = tar_offset.0,
                    _ => {
                        scattered = true;
                        let start = u32::try_from(self.segments.len()).map_err(|_| too_much(entry))?;
                        self.segments.extend_from_slice(&entry.segments);
                        u32::try_from(self.segments.len()).map_err(|_| too_much(entry))?;
                        place = pair(start, u32::try_from(entry.segments.len()).map_err(|_| too_much(entry))?);
                    }
                }
                type_bits::FILE
            }
            Kind::Directory => {
                detail = pair(NONE, 0);
                place = self.new_directory_place();
                type_bits::DIRECTORY
            }
            Kind::Symlink => {
                let (start, len) = self.names.add_text(&entry.link).ok_or_else(|| too_much(entry))?;
                detail = pair(start, len);
                type_bits::SYMLINK
            }
            Kind::CharDevice => {
                detail = pair(entry.device_major, entry.device_minor);
                type_bits::CHAR
            }
            Kind::BlockDevice => {
                detail = pair(entry.device_major, entry.device_minor);
                type_bits::BLOCK
            }
            Kind::Fifo => type_bits::FIFO,
        };
        self.nodes.push(Node {
            mtime_secs: entry.mtime.secs,
            detail,
            place,
            uid: uid.unwrap_or(0),
            gid: gid.unwrap_or(0),
            mtime_nanos: nanos(entry.mtime),
            xattrs,
            parent,
            links: 0,
            mode: type_bits | mode,
            layer: self.layer,
            scattered,
        });
        Ok(number)
    }

    /// Adds a name to a directory; returns its number.
    fn add_name(&mut self, parent: u32, name: &[u8], node: u32) -> Option<u32> {
        let directory = &mut self.nodes[to_usize(parent)];
        let next = unpair(directory.detail).0;
        let at = self.names.add(parent, name, node, next)?;
        directory.detail = pair(at, 0);
        Some(at)
    }

    fn forget_last_directory(&mut self) {
        self.last_directory_node = NONE;
    }
}

/// That a path is longer than Linux allows.
fn too_long(path: &[u8], len: usize) -> TreeError {
    TreeError::PathTooLong {
        path: show_beginning(path),
        len,
    }
}
