//! Directories: which names stand in which block, and the blocks themselves.
//!
//! Small directories are lists in the tree's own order, which is also that of the inode numbers. Beyond eight blocks a
//! directory gets a hash tree, so that looking up one name does not read them all. All directories lie in one stretch of
//! the image, breadth first, so that walking the tree reads them in order. What is kept to write one block without the
//! others is where its names begin.

use super::bytes::{halves, pad4, put_u16, put_u32};
use super::htree::{self, Seed};
use super::number::{Numbers, number};
use crate::image::ImageError;
use crate::tree::{NodeId, NodeKind, Tree, show};
use crate::units::{BLOCK_SIZE, to_usize};

/// Up to here a list is as quick as a tree.
const LINEAR_BLOCKS_MAX: u32 = 8;
/// A directory's size is 31 bits (the kernel's limit without `large_dir`).
const BLOCKS_MAX: u32 = 0x7fff_f000 / 4096;
const BLOCK: usize = 4096;
/// `.` and `..`.
const DOTS: usize = 24;
const NONE: u32 = u32::MAX;

/// All directories of an image.
#[derive(Debug, Default)]
pub(super) struct Directories {
    /// In the order of their blocks.
    list: Vec<Directory>,
    big: Vec<Big>,
    /// For each block but the first of a big linear directory, and each leaf of a hash tree: which of the directory's
    /// names is its first.
    splits: Vec<u32>,
    /// Parallel to `splits`, for hash trees: the leaf's lowest hash. Zero for lists.
    hashes: Vec<u32>,
    /// The names of directories with hash trees, by hash: positions in the tree.
    hashed: Vec<u32>,
    blocks: u32,
}

#[derive(Clone, Copy, Debug)]
struct Directory {
    node: u32,
    /// Its first block, counted from the first block of all directories.
    first: u32,
    /// Its entry in `big`, for those of more than one block.
    big: u32,
}

/// A directory of more than one block.
#[derive(Clone, Copy, Debug)]
struct Big {
    splits: u32,
    splits_end: u32,
    /// Where its names start in `hashed`; [`NONE`] for a list.
    hashed: u32,
}

/// How many bytes a name takes.
fn entry_len(name: &[u8]) -> usize {
    pad4(8 + name.len())
}

impl Directories {
    /// Plans all directories: one pass over all names.
    pub(super) fn plan(tree: &Tree, seed: Seed) -> Result<Self, ImageError> {
        let mut plan = Self::default();
        let mut hash_order = Vec::new();
        let below = (0..tree.name_count()).map(|position| tree.node_at(position));
        for node in std::iter::once(NodeId::ROOT)
            .chain(below)
            .filter(|&node| tree.node(node).is_directory())
        {
            let (big, blocks) = plan.plan_one(tree, node, seed, &mut hash_order)?;
            plan.list.push(Directory {
                node: node.raw(),
                first: plan.blocks,
                big,
            });
            plan.blocks = plan
                .blocks
                .checked_add(blocks)
                .ok_or(ImageError::TooBig { blocks: u64::MAX })?;
        }
        plan.list.shrink_to_fit();
        plan.splits.shrink_to_fit();
        plan.hashes.shrink_to_fit();
        plan.hashed.shrink_to_fit();
        Ok(plan)
    }

    fn plan_one(
        &mut self,
        tree: &Tree,
        node: NodeId,
        seed: Seed,
        hash_order: &mut Vec<(u32, u32, u32)>,
    ) -> Result<(u32, u32), ImageError> {
        let splits = self.splits.len();
        let mut used = DOTS;
        for (at, child) in (0..).zip(tree.children(node)) {
            let len = entry_len(child.name);
            if used + len > BLOCK {
                self.splits.push(at);
                used = 0;
            }
            used += len;
        }
        let mut blocks = narrow(self.splits.len() - splits)? + 1;
        if blocks == 1 {
            return Ok((NONE, 1));
        }
        let mut hashed = NONE;
        self.hashes.resize(self.splits.len(), 0);
        if blocks > LINEAR_BLOCKS_MAX {
            let linear: Vec<u32> = self.splits.drain(splits..).collect();
            self.hashes.truncate(splits);
            hash_order.clear();
            hash_order.extend(tree.child_positions(node).map(|position| {
                let (hash, minor) = seed.hash(tree.name_at(position).name);
                (hash, minor, position)
            }));
            hash_order.sort_unstable();
            let mut used = BLOCK;
            let mut last = None;
            for (at, &(hash, _, position)) in (0..).zip(hash_order.iter()) {
                let len = entry_len(tree.name_at(position).name);
                if used + len > BLOCK {
                    self.splits.push(at);
                    // The lowest bit says that equal hashes began in the leaf before.
                    self.hashes.push(if last == Some(hash) { hash | 1 } else { hash });
                    used = 0;
                }
                used += len;
                last = Some(hash);
            }
            let leaves = narrow(self.splits.len() - splits)?;
            if leaves <= htree::LEAVES_MAX {
                hashed = narrow(self.hashed.len())?;
                self.hashed.extend(hash_order.iter().map(|&(_, _, position)| position));
                blocks = 1 + htree::inner_nodes(leaves) + leaves;
            } else {
                self.splits.truncate(splits);
                self.splits.extend(linear);
                self.hashes.truncate(splits);
                self.hashes.resize(self.splits.len(), 0);
            }
        }
        if blocks > BLOCKS_MAX {
            return Err(ImageError::DirectoryTooBig {
                path: show(&tree.path(node)),
                names: tree.children(node).len(),
            });
        }
        self.big.push(Big {
            splits: narrow(splits)?,
            splits_end: narrow(self.splits.len())?,
            hashed,
        });
        Ok((narrow(self.big.len() - 1)?, blocks))
    }

    /// How many blocks all directories take.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// How many directories there are.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// The node of directory `number`.
    pub(super) fn node(&self, number: usize) -> NodeId {
        NodeId::from_raw(self.list[number].node)
    }

    /// The blocks of directory `number`, counted from the first block of all directories: the first, and how many.
    pub(super) fn extent(&self, number: usize) -> (u32, u32) {
        let first = self.list[number].first;
        let end = self.list.get(number + 1).map_or(self.blocks, |next| next.first);
        (first, end - first)
    }

    /// Whether directory `number` has a hash tree.
    pub(super) fn is_hashed(&self, number: usize) -> bool {
        let big = self.list[number].big;
        big != NONE && self.big[to_usize(big)].hashed != NONE
    }

    /// Whether any directory has a hash tree.
    pub(super) fn any_hashed(&self) -> bool {
        !self.hashed.is_empty()
    }

    /// Writes a block, counted from the first block of all directories.
    pub(super) fn write(&self, tree: &Tree, numbers: &Numbers, block: u32, out: &mut [u8]) {
        let directory = self.list[self.list.partition_point(|directory| directory.first <= block) - 1];
        let node = NodeId::from_raw(directory.node);
        let block = block - directory.first;
        let positions = tree.child_positions(node);
        let mut writer = Writer {
            tree,
            numbers,
            out,
            at: 0,
            last: 0,
        };
        if directory.big == NONE {
            writer.dots(node);
            positions.for_each(|position| writer.name(position));
            return writer.close();
        }
        let big = self.big[to_usize(directory.big)];
        let splits = &self.splits[to_usize(big.splits)..to_usize(big.splits_end)];
        let count = positions.end - positions.start;
        let first_of = |split: u32| splits.get(to_usize(split)).copied().unwrap_or(count);
        if big.hashed == NONE {
            let first = if block == 0 { 0 } else { first_of(block - 1) };
            if block == 0 {
                writer.dots(node);
            }
            (first..first_of(block)).for_each(|at| writer.name(positions.start + at));
            return writer.close();
        }
        let hashes = &self.hashes[to_usize(big.splits)..to_usize(big.splits_end)];
        let inner = htree::inner_nodes(big.splits_end - big.splits);
        if block == 0 {
            writer.dots(node);
            writer.close();
            htree::write_root(hashes, out);
        } else if block <= inner {
            htree::write_inner(hashes, block - 1, out);
        } else {
            let leaf = block - 1 - inner;
            let names = to_usize(big.hashed + first_of(leaf))..to_usize(big.hashed + first_of(leaf + 1));
            self.hashed[names].iter().for_each(|&position| writer.name(position));
            writer.close();
        }
    }
}

fn narrow(number: usize) -> Result<u32, ImageError> {
    u32::try_from(number).map_err(|_| ImageError::TooBig { blocks: u64::MAX })
}

/// Writes one directory block name by name.
struct Writer<'a> {
    tree: &'a Tree,
    numbers: &'a Numbers,
    out: &'a mut [u8],
    at: usize,
    /// Where the last name starts: it spans the rest of the block.
    last: usize,
}

impl Writer<'_> {
    fn dots(&mut self, directory: NodeId) {
        let parent = self.tree.node(directory).parent();
        self.entry(number(self.numbers.ordinal(directory)), b".", NodeKind::Directory);
        self.entry(number(self.numbers.ordinal(parent)), b"..", NodeKind::Directory);
    }

    fn name(&mut self, position: u32) {
        let child = self.tree.name_at(position);
        let inode = self.numbers.number_at(self.tree, position);
        self.entry(inode, child.name, self.tree.node(child.node).kind());
    }

    fn entry(&mut self, inode: u32, name: &[u8], kind: NodeKind) {
        let len = entry_len(name);
        let out = &mut self.out[self.at..self.at + len];
        put_u32(out, 0, inode);
        put_u16(out, 4, u16::try_from(len).expect("a name has 255 bytes"));
        out[6] = u8::try_from(name.len()).expect("a name has 255 bytes");
        out[7] = match kind {
            NodeKind::File => 1,
            NodeKind::Directory => 2,
            NodeKind::CharDevice => 3,
            NodeKind::BlockDevice => 4,
            NodeKind::Fifo => 5,
            NodeKind::Symlink => 7,
        };
        out[8..8 + name.len()].copy_from_slice(name);
        self.last = self.at;
        self.at += len;
    }

    fn close(self) {
        let rest = u32::try_from(BLOCK - self.last).expect("a block has 4096 bytes");
        put_u16(&mut self.out[self.last..], 4, halves(rest).0);
    }
}

const _: () = assert!(BLOCK_SIZE == 4096);
