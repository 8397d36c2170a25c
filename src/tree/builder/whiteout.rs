//! Layers over layers: what a whiteout hides.
//!
//! In a [merged](TreeMode::Merged) tree whiteouts work as the OCI image specification has it ("Whiteouts", `layer.md`): on
//! lower layers only, wherever in the layer they stand. Every directory remembers the last layer that touched it, which is
//! one that made something in it or below it (umoci's `upperPaths`). A whiteout takes away what its own layer did not
//! touch, and of a directory that it did touch everything else.
//!
//! Where programs differ:
//!
//! - containerd lets a plain whiteout (not an opaque one) also take what its own layer put there before; the specification
//!   and umoci do not, nor does this.
//! - containerd spares from an opaque whiteout only paths that have entries, umoci also directories that merely lead there;
//!   so does this.
//! - A directory that is hidden and, in the same layer, there again is a new one: what no entry of this layer says of it is
//!   what is said of missing directories, and nothing of the old one is left, in either order. umoci and containerd keep
//!   the old attributes where the whiteout comes last.
//! - Directories that lead to a whiteout and are not there are made, and count as touched (containerd, and what overlayfs
//!   shows of a stack of layers; umoci makes none).
//! - A directory entry over a lower layer's directory replaces its extended attributes (the specification, umoci, and what
//!   overlayfs shows; containerd's plain unpacking adds to them). Within one layer they add up, as containerd has it.
//! - Attributes `trusted.*` are not taken from a layer (containerd): for overlayfs they would be orders.
//! - `.wh.`, `.wh..` and `.wh...` are errors (containerd). `.wh..wh.*` but for the opaque one, and what is below such a
//!   name in the root directory, are AUFS's own and not there (moby). What is in `/.wh..wh.plnk` can be the target of hard
//!   links, which is what AUFS kept it for (containerd, moby).
//!
//! One thing depends on the order: which links an entry's path leads through, because that is the order in which a layer
//! is unpacked everywhere. An entry below a link that a whiteout of the same layer takes away later has followed it.
//!
//! In a tree for [overlayfs](TreeMode::Overlay) whiteouts are what its documentation says ("whiteouts and opaque
//! directories"): 0/0 character devices with the owner and time of the whiteout's header, and the attribute
//! `trusted.overlay.opaque=y`. A name that is hidden and there again needs no whiteout; a directory that is so is opaque.
//! Directories with whiteouts get an empty `trusted.overlay.origin`, without which readdir lists the whiteouts of
//! directories that overlayfs need not merge (Linux's `ovl_get_inode`). Missing directories are 0755, root's, because
//! their attributes are in a layer below: overlayfs then shows that, and not what the lower layer says. An opaque root is
//! marked like any other, but overlayfs does not look at the roots' marks (Linux 6.18): who stacks the layers has to
//! leave out those below.

use std::collections::HashSet;

use super::check::{nanos, too_much};
use super::{TreeBuilder, TreeMode};
use crate::index::{Entry, Kind, Xattr};
use crate::tree::error::show;
use crate::tree::table::NONE;
use crate::tree::{NAME_MAX, NodeKind, TreeError, XattrSetId, pair, type_bits, unpair};
use crate::units::to_usize;

const PREFIX: &[u8] = b".wh.";
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The `place` of a device that a whiteout has become.
const IS_WHITEOUT: u64 = 1;

/// What only the layer that is being built needs to know.
#[derive(Default)]
pub(super) struct Layers {
    /// Whether the builder was told of any layer.
    pub(super) begun: bool,
    /// Names that this layer gave to what lower layers have: hard links.
    pub(super) linked: HashSet<u32>,
}

impl Layers {
    pub(super) fn begin(&mut self) {
        self.begun = true;
        self.linked.clear();
    }
}

/// The directory in which AUFS kept files with several names; it is no part of the layer's tree.
const AUFS_LINKS: &[u8] = b".wh..wh.plnk";

/// A name that is a whiteout: what the last part of an entry's path says in a layer of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteout<'a> {
    /// Hides all that lower layers have in its directory.
    Opaque,
    /// Hides one name.
    Name(&'a [u8]),
    /// One of AUFS's own.
    Ignored,
}

impl<'a> Whiteout<'a> {
    /// The whiteout that a name is, if it is one.
    #[must_use]
    pub fn of(name: &'a [u8]) -> Option<Self> {
        let hidden = name.strip_prefix(PREFIX)?;
        Some(if name == OPAQUE {
            Self::Opaque
        } else if name.starts_with(AUFS_PREFIX) {
            Self::Ignored
        } else {
            Self::Name(hidden)
        })
    }
}

/// Whether a path leads into one of AUFS's own directories, which lie in the root.
pub(super) fn is_aufs_own(path: &[u8]) -> bool {
    let path = from_root(path);
    path.starts_with(AUFS_PREFIX) && !path.starts_with(OPAQUE)
}

/// The name of a file that AUFS kept for hard links, in its path.
fn aufs_link_name(path: &[u8]) -> Option<&[u8]> {
    let name = from_root(path).strip_prefix(AUFS_LINKS)?.strip_prefix(b"/")?;
    (!name.is_empty() && !name.contains(&b'/')).then_some(name)
}

/// A path without what says that it begins at the root.
fn from_root(mut path: &[u8]) -> &[u8] {
    while let Some(rest) = path.strip_prefix(b"/").or_else(|| path.strip_prefix(b"./")) {
        path = rest;
    }
    path
}

impl TreeBuilder {
    /// Takes an entry that is AUFS's own: a file that it kept for hard links is there for them, everything else is not.
    pub(super) fn keep_for_aufs(&mut self, entry: &Entry) -> Result<(), TreeError> {
        let Some(name) = aufs_link_name(&entry.path) else {
            return Ok(());
        };
        if matches!(entry.kind, Kind::Directory | Kind::Hardlink) || name.len() > NAME_MAX {
            return Ok(());
        }
        if self.aufs_links == NONE {
            let directory = Entry {
                kind: Kind::Directory,
                ..Entry::default()
            };
            self.aufs_links = self.make_node(&directory, NONE)?;
        }
        let node = self.make_node(entry, self.aufs_links)?;
        if let Some(at) = self.names.find(self.aufs_links, name) {
            self.names.set_node(at, node);
            return Ok(());
        }
        let added = self.add_name(self.aufs_links, name, node);
        added.map(drop).ok_or_else(|| too_much(entry))
    }

    /// The node that a hard link to a file of AUFS's names, if there is such a file; `None` for every other target.
    #[expect(clippy::option_option, reason = "three outcomes, spelled out above")]
    pub(super) fn aufs_link(&self, target: &[u8], name: &[u8]) -> Option<Option<u32>> {
        if self.mode == TreeMode::Plain || aufs_link_name(target) != Some(name) {
            return None;
        }
        let at = (self.aufs_links != NONE).then(|| self.names.find(self.aufs_links, name));
        Some(at.flatten().map(|at| self.names.get(at).node))
    }

    /// This layer in a directory's marks, where 0 is no layer.
    fn stamp(&self) -> u32 {
        u32::from(self.layer) + 1
    }

    /// The `place` of a new directory. While building, directories keep there which layer last took from them what lower
    /// layers have, and which last touched them.
    pub(super) fn new_directory_place(&self) -> u64 {
        match self.mode {
            TreeMode::Plain => 0,
            TreeMode::Merged | TreeMode::Overlay => pair(self.stamp(), self.stamp()),
        }
    }

    /// Notes that this layer has something in a directory. Directories above a touched one are touched.
    pub(super) fn touch(&mut self, mut directory: u32) {
        let stamp = self.stamp();
        loop {
            let node = &mut self.nodes[to_usize(directory)];
            let (cleared, touched) = unpair(node.place);
            if touched == stamp {
                return;
            }
            node.place = pair(cleared, stamp);
            if directory == 0 {
                return;
            }
            directory = node.parent;
        }
    }

    /// Whether a node is a device that a whiteout has become.
    pub(super) fn is_whiteout(&self, node: u32) -> bool {
        let node = &self.nodes[to_usize(node)];
        self.mode == TreeMode::Overlay && node.kind() == NodeKind::CharDevice && node.place == IS_WHITEOUT
    }

    /// Whether this layer has given a name its meaning, or has something below it.
    fn is_touched(&self, name: u32) -> bool {
        let node = &self.nodes[to_usize(self.names.get(name).node)];
        if node.is_directory() {
            unpair(node.place).1 == self.stamp()
        } else {
            node.layer == self.layer || self.layers.linked.contains(&name)
        }
    }

    /// Takes an entry that is a whiteout, in the directory `parent`.
    pub(super) fn whiteout(&mut self, whiteout: Whiteout<'_>, parent: u32, entry: &Entry) -> Result<(), TreeError> {
        match (self.mode, whiteout) {
            (TreeMode::Plain, _) | (_, Whiteout::Ignored) => Ok(()),
            (_, Whiteout::Name(b"" | b"." | b"..")) => Err(TreeError::Whiteout {
                path: show(&entry.path),
            }),
            (TreeMode::Merged, Whiteout::Opaque) => {
                self.clear(parent, false, entry);
                Ok(())
            }
            (TreeMode::Merged, Whiteout::Name(hidden)) => {
                self.hide(parent, hidden, entry);
                Ok(())
            }
            (TreeMode::Overlay, Whiteout::Opaque) => {
                if parent == 0 {
                    log::warn!(
                        "the layer's root is opaque, which overlayfs does not heed: leave out the layers below it"
                    );
                }
                self.make_opaque(parent, entry)
            }
            (TreeMode::Overlay, Whiteout::Name(hidden)) => self.put_whiteout(parent, hidden, entry),
        }
    }

    /// Takes from a directory's name what lower layers have there.
    fn hide(&mut self, parent: u32, hidden: &[u8], entry: &Entry) {
        let Some(at) = self.names.find(parent, hidden) else {
            return;
        };
        let node = self.names.get(at).node;
        if node == NONE {
            return;
        }
        if !self.is_touched(at) {
            self.names.set_node(at, NONE);
            self.forget_last_directory();
        } else if self.nodes[to_usize(node)].is_directory() {
            self.clear(node, true, entry);
        }
    }

    /// Takes from a directory all that lower layers have in it; `as_new` also its own attributes, if they are a lower
    /// layer's. Once a layer and directory: what comes later in the layer is the layer's own.
    fn clear(&mut self, directory: u32, as_new: bool, entry: &Entry) {
        let stamp = self.stamp();
        let mut pending = vec![(directory, as_new)];
        while let Some((directory, as_new)) = pending.pop() {
            let layer = self.layer;
            let node = &mut self.nodes[to_usize(directory)];
            if as_new && node.layer != layer {
                node.layer = layer;
                node.mode = type_bits::DIRECTORY | 0o755;
                (node.uid, node.gid) = (0, 0);
                node.mtime_secs = entry.mtime.secs;
                node.mtime_nanos = nanos(entry.mtime);
                node.xattrs = XattrSetId::EMPTY;
            }
            let (cleared, touched) = unpair(node.place);
            if cleared == stamp {
                continue;
            }
            node.place = pair(stamp, touched);
            let mut at = unpair(node.detail).0;
            while at != NONE {
                let name = self.names.get(at);
                if name.node != NONE {
                    if !self.is_touched(at) {
                        self.names.set_node(at, NONE);
                    } else if self.nodes[to_usize(name.node)].is_directory() {
                        pending.push((name.node, true));
                    }
                }
                at = name.next;
            }
        }
        self.forget_last_directory();
    }

    /// Puts a device that overlayfs takes for a whiteout where this layer has nothing else.
    fn put_whiteout(&mut self, parent: u32, hidden: &[u8], entry: &Entry) -> Result<(), TreeError> {
        let known = self.names.find(parent, hidden);
        let there = known.map_or(NONE, |at| self.names.get(at).node);
        if there != NONE {
            return if self.nodes[to_usize(there)].is_directory() {
                self.make_opaque(there, entry)
            } else {
                Ok(())
            };
        }
        let device = Entry {
            kind: Kind::CharDevice,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            ..Entry::default()
        };
        let node = self.make_node(&device, parent)?;
        self.nodes[to_usize(node)].place = IS_WHITEOUT;
        match known {
            Some(at) => self.names.set_node(at, node),
            None => {
                self.add_name(parent, hidden, node).ok_or_else(|| too_much(entry))?;
            }
        }
        self.mark(parent, b"trusted.overlay.origin", b"", entry)
    }

    /// Hides from overlayfs what lower layers have in a directory.
    pub(super) fn make_opaque(&mut self, directory: u32, entry: &Entry) -> Result<(), TreeError> {
        self.mark(directory, b"trusted.overlay.opaque", b"y", entry)
    }

    /// Gives a directory an attribute, once.
    fn mark(&mut self, directory: u32, name: &[u8], value: &[u8], entry: &Entry) -> Result<(), TreeError> {
        let old = self.nodes[to_usize(directory)].xattrs;
        if self.xattrs.get(old).any(|(known, _)| known == name) {
            return Ok(());
        }
        let further = [Xattr {
            name: name.to_vec(),
            value: value.to_vec(),
        }];
        let xattrs = self.add_xattrs(old, &further).ok_or_else(|| too_much(entry))?;
        self.nodes[to_usize(directory)].xattrs = xattrs;
        Ok(())
    }
}
