//! One directory tree. In: the entries of one or more layers, each in its tar's order. Out: an arena of nodes, each
//! directory's names sorted.
//!
//! [`TreeBuilder`] applies the rules by which containerd unpacks layers; [`Tree`] is what is left in the end, laid out
//! breadth first. This room knows nothing of blocks or inode numbers, never recurses (a path may be thousands of names
//! deep) and never follows a path above the root.
//!
//! Memory is what this room is about: a million entries are ordinary. A node takes 56 bytes, a name 8 and its own bytes
//! (20 more and about 10 of hash table while building); equal sets of extended attributes are kept once.

use std::fmt;

use crate::index::{Segment, Timestamp};
use crate::units::{LayerId, TarOffset, to_usize};

mod acl;
mod builder;
mod error;
pub mod listing;
mod names;
mod path;
mod table;
mod xattrs;

pub use builder::{TreeBuilder, TreeMode, Whiteout};
pub use error::TreeError;
pub use xattrs::{XattrSetId, Xattrs};

pub(crate) use error::show;

use names::Dirent;
use xattrs::XattrTable;

/// The longest name of one directory entry, in bytes: Linux's own limit, whatever the filesystem.
pub const NAME_MAX: usize = 255;

/// The longest text of a symbolic link, in bytes: the kernel's `PATH_MAX` less its closing NUL.
pub const LINK_TEXT_MAX: usize = 4095;

/// The longest path, in bytes: the kernel's `PATH_MAX` less its closing NUL.
pub const PATH_MAX: usize = 4095;

/// A node of a [`Tree`]: an index into its arena. Nodes are numbered in the order in which the tar made them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// The node's place in the arena, below [`Tree::node_count`].
    #[must_use]
    pub fn index(self) -> usize {
        to_usize(self.0)
    }

    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    pub(crate) const fn raw(self) -> u32 {
        self.0
    }
}

/// What a node is. Hard links are not nodes: they are further names of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// A regular file, sparse or not.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// The file type bits of `st_mode`.
mod type_bits {
    pub(super) const MASK: u16 = 0o170_000;
    pub(super) const FIFO: u16 = 0o010_000;
    pub(super) const CHAR: u16 = 0o020_000;
    pub(super) const DIRECTORY: u16 = 0o040_000;
    pub(super) const BLOCK: u16 = 0o060_000;
    pub(super) const FILE: u16 = 0o100_000;
    pub(super) const SYMLINK: u16 = 0o120_000;
}

/// One inode, of whatever kind: its attributes, and by kind where its content is.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    mtime_secs: i64,
    /// By kind: a file's size; a symlink's text as start and length; a directory's dirents as start and count (while
    /// building: its first name); a device's major and minor number. Pairs of `u32`, the first in the high half.
    detail: u64,
    /// Where a file's bytes are: a tar offset, or with `scattered` the start and count of its segments.
    place: u64,
    uid: u32,
    gid: u32,
    mtime_nanos: u32,
    xattrs: XattrSetId,
    /// The directory of the node's first name.
    parent: u32,
    links: u32,
    mode: u16,
    layer: u16,
    scattered: bool,
}

const _: () = assert!(size_of::<Node>() == 56);

/// Two `u32` as one `u64`, the first in the high half.
fn pair(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// The two halves of a [`pair`].
fn unpair(pair: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits");
    (half(pair >> 32), half(pair))
}

impl Node {
    /// The kind of inode that it is.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        match self.mode & type_bits::MASK {
            type_bits::DIRECTORY => NodeKind::Directory,
            type_bits::SYMLINK => NodeKind::Symlink,
            type_bits::CHAR => NodeKind::CharDevice,
            type_bits::BLOCK => NodeKind::BlockDevice,
            type_bits::FIFO => NodeKind::Fifo,
            _ => NodeKind::File,
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & type_bits::MASK == type_bits::DIRECTORY
    }

    /// `st_mode`: the type and the low twelve permission bits.
    #[must_use]
    pub const fn mode(&self) -> u16 {
        self.mode
    }

    /// Owner.
    #[must_use]
    pub const fn uid(&self) -> u32 {
        self.uid
    }

    /// Group.
    #[must_use]
    pub const fn gid(&self) -> u32 {
        self.gid
    }

    /// When its content last changed.
    #[must_use]
    pub const fn mtime(&self) -> Timestamp {
        Timestamp {
            secs: self.mtime_secs,
            nanos: self.mtime_nanos,
        }
    }

    /// How many links: names, or for a directory 2 and its subdirectories. Zero for what was replaced or hidden.
    #[must_use]
    pub const fn links(&self) -> u32 {
        self.links
    }

    /// A file's length in bytes, holes included; zero for everything else.
    #[must_use]
    pub fn size(&self) -> u64 {
        if self.kind() == NodeKind::File { self.detail } else { 0 }
    }

    /// A device's major and minor number; zeros for everything else.
    #[must_use]
    pub fn device(&self) -> (u32, u32) {
        match self.kind() {
            NodeKind::CharDevice | NodeKind::BlockDevice => unpair(self.detail),
            _ => (0, 0),
        }
    }

    /// Its extended attributes: look them up with [`Tree::xattrs`].
    #[must_use]
    pub const fn xattr_set(&self) -> XattrSetId {
        self.xattrs
    }

    /// The directory of its first name; the root's is the root.
    #[must_use]
    pub const fn parent(&self) -> NodeId {
        NodeId(self.parent)
    }

    /// The layer that its content comes from.
    #[must_use]
    pub fn layer(&self) -> LayerId {
        LayerId(u32::from(self.layer))
    }
}

/// Where a file's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// All of them in one run of the tar, from here on, [`Node::size`] bytes long. Never for an empty file.
    Whole(TarOffset),
    /// In these segments, ascending in the file; what none covers is zero. Empty files have none.
    Scattered(&'a [Segment]),
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child<'a> {
    /// The name, 1 to [`NAME_MAX`] bytes, any but `/` and NUL.
    pub name: &'a [u8],
    /// The node that it names.
    pub node: NodeId,
}

/// A whole directory tree. Made by [`TreeBuilder`].
///
/// Names stand in one array: directory after directory in breadth-first order, inside a directory sorted bytewise. A
/// *position* in this tree is an index into that array.
pub struct Tree {
    nodes: Vec<Node>,
    dirents: Vec<Dirent>,
    text: Vec<u8>,
    segments: Vec<Segment>,
    xattrs: XattrTable,
}

impl Tree {
    /// How many nodes the arena has, those included that were replaced or hidden (their [`Node::links`] is zero).
    #[must_use]
    pub fn node_count(&self) -> u32 {
        u32::try_from(self.nodes.len()).unwrap_or(u32::MAX)
    }

    /// How many names there are in all directories.
    #[must_use]
    pub fn name_count(&self) -> u32 {
        u32::try_from(self.dirents.len()).unwrap_or(u32::MAX)
    }

    /// One node.
    #[must_use]
    pub fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.index()]
    }

    /// All nodes by number.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0..).map(NodeId).zip(&self.nodes)
    }

    /// The positions of a directory's names: first and one past the last. Empty for what is not a directory.
    #[must_use]
    pub fn child_positions(&self, directory: NodeId) -> std::ops::Range<u32> {
        let node = self.node(directory);
        if !node.is_directory() {
            return 0..0;
        }
        let (start, count) = unpair(node.detail);
        start..start + count
    }

    /// The name at a position.
    #[must_use]
    pub fn name_at(&self, position: u32) -> Child<'_> {
        let dirent = self.dirents[to_usize(position)];
        Child {
            name: names::name(&self.text, dirent.text),
            node: NodeId(dirent.node),
        }
    }

    /// The node that the name at a position names; cheaper than [`Self::name_at`].
    #[must_use]
    pub fn node_at(&self, position: u32) -> NodeId {
        NodeId(self.dirents[to_usize(position)].node)
    }

    /// A directory's names, sorted.
    #[must_use]
    pub fn children(&self, directory: NodeId) -> impl ExactSizeIterator<Item = Child<'_>> {
        let positions = self.child_positions(directory);
        self.dirents[to_usize(positions.start)..to_usize(positions.end)]
            .iter()
            .map(|dirent| Child {
                name: names::name(&self.text, dirent.text),
                node: NodeId(dirent.node),
            })
    }

    /// What a directory has under `name`. Binary search.
    #[must_use]
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        let positions = self.child_positions(directory);
        let dirents = &self.dirents[to_usize(positions.start)..to_usize(positions.end)];
        let found = dirents
            .binary_search_by(|dirent| names::name(&self.text, dirent.text).cmp(name))
            .ok()?;
        Some(NodeId(dirents[found].node))
    }

    /// What `path` leads to: from the root when it begins with `/`, else from the directory `from`. Symbolic links are
    /// followed inside the tree, also a last one, at most 40 of them (the kernel's number); `..` stays below the root.
    #[must_use]
    pub fn resolve(&self, from: NodeId, path: &[u8]) -> Option<NodeId> {
        const LINKS_MAX: u32 = 40;
        let parts = |path: &[u8]| path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).rev().collect();
        let mut pending: Vec<Vec<u8>> = parts(path);
        let mut at = if path.starts_with(b"/") { NodeId::ROOT } else { from };
        let mut links = 0;
        while let Some(part) = pending.pop() {
            match &part[..] {
                b"" | b"." => {}
                b".." => at = self.node(at).parent(),
                name => {
                    let next = self.child(at, name)?;
                    if self.node(next).kind() != NodeKind::Symlink {
                        at = next;
                        continue;
                    }
                    links += 1;
                    if links > LINKS_MAX {
                        return None;
                    }
                    let text = self.link_text(next);
                    if text.starts_with(b"/") {
                        at = NodeId::ROOT;
                    }
                    let mut further: Vec<Vec<u8>> = parts(text);
                    pending.append(&mut further);
                }
            }
        }
        Some(at)
    }

    /// A symlink's text; empty for everything else.
    #[must_use]
    pub fn link_text(&self, node: NodeId) -> &[u8] {
        let node = self.node(node);
        if node.kind() != NodeKind::Symlink {
            return &[];
        }
        let (start, len) = unpair(node.detail);
        &self.text[to_usize(start)..to_usize(start) + to_usize(len)]
    }

    /// Where a file's bytes are; no segments for everything else.
    #[must_use]
    pub fn content(&self, node: NodeId) -> Content<'_> {
        let node = self.node(node);
        if node.kind() != NodeKind::File || node.detail == 0 {
            Content::Scattered(&[])
        } else if node.scattered {
            let (start, count) = unpair(node.place);
            Content::Scattered(&self.segments[to_usize(start)..to_usize(start) + to_usize(count)])
        } else {
            Content::Whole(TarOffset(node.place))
        }
    }

    /// A set of extended attributes, sorted by name.
    #[must_use]
    pub fn xattrs(&self, set: XattrSetId) -> Xattrs<'_> {
        self.xattrs.get(set)
    }

    /// How many different sets of extended attributes there are, the empty one included.
    #[must_use]
    pub fn xattr_set_count(&self) -> u32 {
        self.xattrs.len()
    }

    /// The node's path by its first name, without a leading slash; for messages.
    #[must_use]
    pub fn path(&self, node: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        while at != NodeId::ROOT {
            let parent = self.node(at).parent();
            let Some(child) = self.children(parent).find(|child| child.node == at) else {
                break;
            };
            names.push(child.name);
            at = parent;
        }
        names.reverse();
        names.join(&b'/')
    }
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree")
            .field("nodes", &self.nodes.len())
            .field("names", &self.dirents.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
