//! Extents: which of a file's blocks are where, as a tree of any depth whose blocks are computed one by one.
//!
//! Up to four extents stand in the inode. More stand in blocks of 340, completely filled from the left; the blocks of one
//! level are indexed by the next, until four entries are enough. The blocks of a tree lie level after level, leaves first.

use super::bytes::{halves, put_u16, put_u32};
use crate::units::to_usize;

/// The longest extent, in blocks.
pub(super) const EXTENT_BLOCKS_MAX: u32 = 32_768;
/// Entries in an inode's root.
const IN_INODE: u32 = 4;
/// Entries in a 4 KiB block; room for the checksum tail that we do not write stays.
const IN_BLOCK: u32 = 340;
const MAGIC: u16 = 0xf30a;
const HEADER: usize = 12;
const ENTRY: usize = 12;
/// 4 x 340^4 is more than 2^32: no file needs more levels of blocks.
const LEVELS_MAX: usize = 5;

/// One extent of a sparse file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its first block in the file.
    pub(super) logical: u32,
    /// Its first block among the file's stored blocks.
    pub(super) stored: u32,
    /// How many blocks, at most [`EXTENT_BLOCKS_MAX`].
    pub(super) len: u32,
}

/// A file's extents.
#[derive(Clone, Copy, Debug)]
pub(super) enum Extents<'a> {
    /// `blocks` blocks from `start` on, none left out.
    Run {
        /// The first block in the image.
        start: u32,
        /// The number of blocks.
        blocks: u32,
    },
    /// A sparse file's, its stored blocks from `start` on.
    List {
        /// The first stored block in the image.
        start: u32,
        /// The extents.
        extents: &'a [Extent],
    },
}

impl Extents<'_> {
    /// Nothing at all: an empty file.
    pub(super) const NONE: Self = Self::Run { start: 0, blocks: 0 };

    /// The number of extents.
    pub(super) fn count(&self) -> u32 {
        match self {
            Self::Run { blocks, .. } => blocks.div_ceil(EXTENT_BLOCKS_MAX),
            Self::List { extents, .. } => u32::try_from(extents.len()).expect("counted in 32 bits when planned"),
        }
    }

    /// How many blocks they map.
    pub(super) fn blocks(&self) -> u32 {
        match self {
            Self::Run { blocks, .. } => *blocks,
            Self::List { extents, .. } => extents.last().map_or(0, |last| last.stored + last.len),
        }
    }

    /// Extent `number`, and the block of the image that `stored` counts from.
    fn get(&self, number: u32) -> (Extent, u32) {
        match *self {
            Self::Run { start, blocks } => {
                let first = number * EXTENT_BLOCKS_MAX;
                (
                    Extent {
                        logical: first,
                        stored: first,
                        len: (blocks - first).min(EXTENT_BLOCKS_MAX),
                    },
                    start,
                )
            }
            Self::List { start, extents } => (extents[to_usize(number)], start),
        }
    }

    /// Writes the root into an inode's 60 bytes; `tree` is the first of the tree's blocks.
    pub(super) fn write_root(&self, tree: u32, root: &mut [u8]) {
        let levels = Levels::of(self.count());
        self.write_node(&levels, levels.depth, 0, IN_INODE, tree, root);
    }

    /// Writes block `number` of the tree whose first block is `tree`.
    pub(super) fn write_block(&self, tree: u32, number: u32, block: &mut [u8]) {
        let levels = Levels::of(self.count());
        let mut first = 0;
        for level in 0..levels.depth {
            if number - first < levels.blocks[level] {
                return self.write_node(&levels, level, number - first, IN_BLOCK, tree, block);
            }
            first += levels.blocks[level];
        }
    }

    /// Writes node `number` of `level` (0: leaves), which has room for `room` entries.
    fn write_node(&self, levels: &Levels, level: usize, number: u32, room: u32, tree: u32, out: &mut [u8]) {
        let all = if level == 0 {
            self.count()
        } else {
            levels.blocks[level - 1]
        };
        let first = number * IN_BLOCK;
        let entries = (all - first).min(room);
        put_u16(out, 0, MAGIC);
        put_u16(out, 2, halves(entries).0);
        put_u16(out, 4, halves(room).0);
        put_u16(out, 6, u16::try_from(level).expect("five levels"));
        let below: u32 = levels.blocks[..level.saturating_sub(1)].iter().sum();
        // How many extents one entry of this level spans.
        let span = (0..level).fold(1_u32, |span, _| span.saturating_mul(IN_BLOCK));
        for (entry, number) in out[HEADER..].chunks_exact_mut(ENTRY).zip(first..first + entries) {
            if level == 0 {
                let (extent, start) = self.get(number);
                put_u32(entry, 0, extent.logical);
                put_u16(entry, 4, halves(extent.len).0);
                put_u16(entry, 6, 0);
                put_u32(entry, 8, start + extent.stored);
            } else {
                put_u32(entry, 0, self.get(number * span).0.logical);
                put_u32(entry, 4, tree + below + number);
                put_u32(entry, 8, 0);
            }
        }
    }
}

/// How many blocks a tree of so many extents needs.
pub(super) fn tree_blocks(extents: u32) -> u32 {
    Levels::of(extents).blocks.iter().sum()
}

/// The shape of a tree: blocks of each level, leaves first.
struct Levels {
    blocks: [u32; LEVELS_MAX],
    depth: usize,
}

impl Levels {
    fn of(extents: u32) -> Self {
        let mut levels = Self {
            blocks: [0; LEVELS_MAX],
            depth: 0,
        };
        let mut entries = extents;
        while entries > IN_INODE {
            entries = entries.div_ceil(IN_BLOCK);
            levels.blocks[levels.depth] = entries;
            levels.depth += 1;
        }
        levels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field16(bytes: &[u8], at: usize) -> u32 {
        u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
    }

    fn field32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// Reads the tree back as the kernel would: every extent in order, as (logical, length, block).
    fn read(extents: &Extents, tree: u32) -> (Vec<(u32, u32, u32)>, u32) {
        let mut found = Vec::new();
        let mut root = vec![0; 60];
        extents.write_root(tree, &mut root);
        let depth = field16(&root, 6);
        let mut nodes = vec![(depth, 0, root)];
        while let Some((level, first_logical, node)) = nodes.pop() {
            assert_eq!((field16(&node, 0), field16(&node, 6)), (0xf30a, level));
            let entries = field16(&node, 2);
            assert!(entries <= field16(&node, 4) && (entries > 0 || extents.count() == 0));
            let mut below = Vec::new();
            for entry in node[12..].chunks_exact(12).take(to_usize(entries)) {
                if level == 0 {
                    found.push((field32(entry, 0), field16(entry, 4), field32(entry, 8)));
                } else {
                    let mut block = vec![0; 4096];
                    extents.write_block(tree, field32(entry, 4) - tree, &mut block);
                    below.push((level - 1, field32(entry, 0), block));
                }
            }
            let first = below.first().map_or_else(|| field32(&node, 12), |(_, first, _)| *first);
            assert!(entries == 0 || level == depth || first == first_logical);
            nodes.extend(below.into_iter().rev());
        }
        (found, depth)
    }

    #[test]
    fn runs_of_every_depth_read_back() {
        for (blocks, depth) in [
            (0, 0),
            (1, 0),
            (4 * 32_768, 0),
            (4 * 32_768 + 1, 1),
            (1360 * 32_768, 1),
            (1361 * 32_768, 2),
            (u32::MAX - 1, 2),
        ] {
            let run = Extents::Run { start: 1000, blocks };
            let (found, found_depth) = read(&run, 77);
            assert_eq!(found_depth, depth, "{blocks} blocks");
            let mut at = 0;
            for (logical, len, block) in found {
                assert_eq!((logical, block), (at, 1000_u32.wrapping_add(at)));
                at += len;
            }
            assert_eq!(at, blocks);
        }
    }

    #[test]
    fn sparse_lists_read_back() {
        for count in [1, 5, 341, 1361, 500_000] {
            let extents: Vec<_> = (0..count)
                .map(|i| Extent {
                    logical: i * 3,
                    stored: i * 2,
                    len: 2,
                })
                .collect();
            let list = Extents::List {
                start: 50,
                extents: &extents,
            };
            assert_eq!(list.blocks(), count * 2);
            let (found, depth) = read(&list, 9);
            assert_eq!(
                depth,
                match count {
                    0..=4 => 0,
                    5..=1360 => 1,
                    1361..=462_400 => 2,
                    _ => 3,
                }
            );
            assert!(found.iter().copied().eq((0..count).map(|i| (i * 3, 2, 50 + i * 2))));
        }
    }
}
