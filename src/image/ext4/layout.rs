//! The image's layout: the first block and length of each part, from which every other position is computed.
//!
//! ```text
//! | superblock | descriptors | block bitmaps | inode bitmaps | inode tables | directories | extras | file data ... | free |
//! ```
//! With `flex_bg` the bitmaps and inode tables of all groups may lie anywhere, so they lie here in group order, which makes
//! the inode table one array, and no backup superblock (`sparse_super2` with none named) interrupts the data.

use super::inode_size;
use crate::image::ImageError;

/// Blocks of one group: what one bitmap block can count.
pub(super) const BLOCKS_PER_GROUP: u32 = 32_768;
/// Size of a group descriptor without the `64bit` feature, in bytes.
pub(super) const DESCRIPTOR_SIZE: u32 = 32;
const DESCRIPTORS_PER_BLOCK: u64 = 128;

/// The places of an image's parts, as block numbers; each part ends where the next begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) groups: u32,
    pub(super) inodes_per_group: u32,
    /// Used inodes, the ten reserved ones included; they are the first.
    pub(super) used_inodes: u32,
    pub(super) block_bitmaps: u32,
    pub(super) inode_bitmaps: u32,
    pub(super) inode_table: u32,
    pub(super) directories: u32,
    pub(super) extras: u32,
    pub(super) data: u32,
    /// The first block that nothing uses.
    pub(super) free: u32,
    /// The image's length.
    pub(super) blocks: u32,
}

/// How much there is of each part, in blocks, and of inodes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) inodes: u64,
    pub(super) directories: u64,
    pub(super) extras: u64,
    pub(super) data: u64,
}

impl Layout {
    /// Lays out parts of these sizes.
    pub(super) fn new(sizes: Sizes) -> Result<Self, ImageError> {
        let per_group = u64::from(BLOCKS_PER_GROUP);
        let inodes_per_block = u64::from(inode_size::PER_BLOCK);
        let mut groups = sizes.inodes.div_ceil(per_group).max(1);
        loop {
            let inodes_per_group = sizes.inodes.div_ceil(groups).next_multiple_of(inodes_per_block);
            let block_bitmaps = 1 + groups.div_ceil(DESCRIPTORS_PER_BLOCK);
            let inode_bitmaps = block_bitmaps + groups;
            let inode_table = inode_bitmaps + groups;
            let directories = inode_table + groups * inodes_per_group / inodes_per_block;
            let extras = directories + sizes.directories;
            let data = extras + sizes.extras;
            let free = data + sizes.data;
            let needed = free.div_ceil(per_group);
            if needed > groups {
                groups = needed;
                continue;
            }
            // Groups that only inodes need are whole ones, all free.
            let blocks = if needed == groups { free } else { groups * per_group };
            let narrow = |number: u64| u32::try_from(number).map_err(|_| ImageError::TooBig { blocks });
            narrow(groups * inodes_per_group)?;
            return Ok(Self {
                groups: narrow(groups)?,
                inodes_per_group: narrow(inodes_per_group)?,
                used_inodes: narrow(sizes.inodes)?,
                block_bitmaps: narrow(block_bitmaps)?,
                inode_bitmaps: narrow(inode_bitmaps)?,
                inode_table: narrow(inode_table)?,
                directories: narrow(directories)?,
                extras: narrow(extras)?,
                data: narrow(data)?,
                free: narrow(free)?,
                blocks: narrow(blocks)?,
            });
        }
    }

    /// How many inodes the tables have room for.
    pub(super) fn inodes(&self) -> u32 {
        self.groups * self.inodes_per_group
    }

    /// How many of group `group`'s inodes are used.
    pub(super) fn used_inodes_of(&self, group: u32) -> u32 {
        self.used_inodes
            .saturating_sub(group * self.inodes_per_group)
            .min(self.inodes_per_group)
    }

    /// How many of group `group`'s blocks nothing uses.
    pub(super) fn free_blocks_of(&self, group: u32) -> u32 {
        let start = u64::from(group) * u64::from(BLOCKS_PER_GROUP);
        let end = (start + u64::from(BLOCKS_PER_GROUP)).min(u64::from(self.blocks));
        let free = end.saturating_sub(start.max(u64::from(self.free)));
        u32::try_from(free).expect("a group has 32768 blocks")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(inodes: u64, data: u64) -> Sizes {
        Sizes {
            inodes,
            directories: 1,
            extras: 0,
            data,
        }
    }

    #[test]
    fn small_and_empty() {
        let layout = Layout::new(sizes(10, 0)).unwrap();
        assert_eq!((layout.groups, layout.inodes_per_group, layout.blocks), (1, 16, 6));
        assert_eq!((layout.used_inodes_of(0), layout.free_blocks_of(0)), (10, 0));
    }

    #[test]
    fn inodes_alone_can_need_groups() {
        let layout = Layout::new(sizes(100_000, 5)).unwrap();
        assert_eq!(layout.groups, 4);
        assert_eq!(layout.blocks, 4 * BLOCKS_PER_GROUP);
        let free: u32 = (0..4).map(|group| layout.free_blocks_of(group)).sum();
        assert_eq!(free, layout.blocks - layout.free);
        let used: u32 = (0..4).map(|group| layout.used_inodes_of(group)).sum();
        assert_eq!(used, 100_000);
    }

    #[test]
    fn the_last_group_may_be_short_and_the_most_is_16_tib() {
        let layout = Layout::new(sizes(20, 180 << 18)).unwrap();
        assert_eq!(layout.groups, layout.blocks.div_ceil(BLOCKS_PER_GROUP));
        assert_eq!(layout.free, layout.blocks);
        assert!(Layout::new(sizes(20, (1 << 32) - 1_000_000)).is_ok());
        assert!(Layout::new(sizes(20, (1 << 32) - 10)).is_err());
    }
}
