//! Inode numbers: the root has its fixed one, the others stand in the order of their first names, so that the children of
//! one directory are neighbours and `ls -l` reads one or two blocks of the inode table.
//!
//! An *ordinal* counts the inodes in use without the reserved ones: the root is 0, the first other one 1.

use std::collections::BTreeMap;

use super::FIRST_INODE;
use crate::image::ImageError;
use crate::tree::{NodeId, Tree};
use crate::units::to_usize;

/// The root directory's inode number.
pub(super) const ROOT_INODE: u32 = 2;
/// Links one inode can count. The kernel makes at most 65,000, but reads what 16 bits hold.
pub(super) const LINKS_MAX: u32 = 65_535;

const NONE: u32 = u32::MAX;

/// A further inode for a file with more names than one inode can count: the same content again, under other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Clone {
    node: u32,
    /// The first position in the tree whose name means this inode and not an earlier one.
    from: u32,
    ordinal: u32,
}

/// Which node has which inode.
#[derive(Debug)]
pub(super) struct Numbers {
    /// By ordinal.
    nodes: Vec<u32>,
    /// By node.
    ordinals: Vec<u32>,
    /// Sorted.
    clones: Vec<Clone>,
}

impl Numbers {
    pub(super) fn of(tree: &Tree) -> Result<Self, ImageError> {
        let mut ordinals = vec![NONE; to_usize(tree.node_count())];
        let mut nodes = Vec::with_capacity(to_usize(tree.node_count()));
        let mut clones = Vec::new();
        let mut names_seen = BTreeMap::new();
        ordinals[0] = 0;
        nodes.push(0);
        for position in 0..tree.name_count() {
            let node = tree.node_at(position);
            let next = u32::try_from(nodes.len()).map_err(|_| ImageError::TooBig { blocks: u64::MAX })?;
            let ordinal = &mut ordinals[node.index()];
            if *ordinal == NONE {
                *ordinal = next;
                nodes.push(node.raw());
            }
            if tree.node(node).links() > LINKS_MAX && !tree.node(node).is_directory() {
                let seen = names_seen.entry(node).or_insert(0_u32);
                if *seen > 0 && seen.is_multiple_of(LINKS_MAX) {
                    clones.push(Clone {
                        node: node.raw(),
                        from: position,
                        ordinal: next,
                    });
                    nodes.push(node.raw());
                }
                *seen += 1;
            }
        }
        nodes.shrink_to_fit();
        clones.sort_unstable();
        Ok(Self {
            nodes,
            ordinals,
            clones,
        })
    }

    /// The number of inodes.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.nodes.len()).expect("counted in 32 bits")
    }

    /// The node of an inode.
    pub(super) fn node(&self, ordinal: u32) -> NodeId {
        NodeId::from_raw(self.nodes[to_usize(ordinal)])
    }

    /// A node's (first) inode. The node must have a name.
    pub(super) fn ordinal(&self, node: NodeId) -> u32 {
        self.ordinals[node.index()]
    }

    /// The inode number that the name at a position has in its directory.
    pub(super) fn number_at(&self, tree: &Tree, position: u32) -> u32 {
        let node = tree.node_at(position);
        let mut ordinal = self.ordinals[node.index()];
        if !self.clones.is_empty() {
            let after = self
                .clones
                .partition_point(|clone| (clone.node, clone.from) <= (node.raw(), position));
            if let Some(clone) = after
                .checked_sub(1)
                .map(|at| self.clones[at])
                .filter(|clone| clone.node == node.raw())
            {
                ordinal = clone.ordinal;
            }
        }
        number(ordinal)
    }

    /// How many names an inode has; for a directory what its subdirectories make of it.
    pub(super) fn links(&self, tree: &Tree, ordinal: u32) -> u32 {
        let node = self.node(ordinal);
        let links = tree.node(node).links();
        if links <= LINKS_MAX || tree.node(node).is_directory() {
            return links;
        }
        let start = self.clones.partition_point(|clone| clone.node < node.raw());
        let clones = self.clones[start..].iter().take_while(|clone| clone.node == node.raw());
        let (before, all) = clones.fold((0, 0), |(before, all), clone| {
            (before + u32::from(clone.ordinal <= ordinal), all + 1)
        });
        if before < all {
            LINKS_MAX
        } else {
            links - before * LINKS_MAX
        }
    }

    /// Whether an ordinal is a node's first inode.
    pub(super) fn is_first(&self, ordinal: u32) -> bool {
        self.ordinals[to_usize(self.nodes[to_usize(ordinal)])] == ordinal
    }
}

/// The inode number of an ordinal.
pub(super) const fn number(ordinal: u32) -> u32 {
    if ordinal == 0 {
        ROOT_INODE
    } else {
        FIRST_INODE - 1 + ordinal
    }
}

/// The ordinal of an inode number, if it is not a reserved one.
pub(super) const fn ordinal_of(number: u32) -> Option<u32> {
    match number {
        ROOT_INODE => Some(0),
        0..FIRST_INODE => None,
        _ => Some(number - (FIRST_INODE - 1)),
    }
}
