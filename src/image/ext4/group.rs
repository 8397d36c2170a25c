//! Block group descriptors, 32 bytes each: `struct ext4_group_desc` without the `64bit` feature.

use super::bytes::{halves, put_u16, put_u32};
use super::inode_size;
use super::layout::{DESCRIPTOR_SIZE, Layout};
use crate::units::to_usize;

/// Writes block `number` of the descriptor table. `directories` counts each group's directories.
pub(super) fn write(layout: &Layout, directories: &[u16], number: u32, out: &mut [u8]) {
    let size = to_usize(DESCRIPTOR_SIZE);
    let first = number * u32::try_from(out.len() / size).expect("128 a block");
    let tables = layout.inodes_per_group / inode_size::PER_BLOCK;
    for (descriptor, group) in out.chunks_exact_mut(size).zip(first..layout.groups) {
        put_u32(descriptor, 0x00, layout.block_bitmaps + group);
        put_u32(descriptor, 0x04, layout.inode_bitmaps + group);
        put_u32(descriptor, 0x08, layout.inode_table + group * tables);
        put_u16(descriptor, 0x0c, halves(layout.free_blocks_of(group)).0);
        put_u16(
            descriptor,
            0x0e,
            halves(layout.inodes_per_group - layout.used_inodes_of(group)).0,
        );
        put_u16(descriptor, 0x10, directories[to_usize(group)]);
    }
}
