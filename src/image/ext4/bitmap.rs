//! Bitmaps: what is used comes first, so a bitmap block is a run of ones, a run of zeros, and padding of ones.

use super::layout::{BLOCKS_PER_GROUP, Layout};
use crate::units::to_usize;

/// Writes group `group`'s block bitmap.
pub(super) fn write_blocks(layout: &Layout, group: u32, out: &mut [u8]) {
    let start = u64::from(group) * u64::from(BLOCKS_PER_GROUP);
    let within = |block: u32| {
        let bit = u64::from(block).saturating_sub(start).min(u64::from(BLOCKS_PER_GROUP));
        usize::try_from(bit).expect("a group has 32768 blocks")
    };
    write(out, within(layout.free), within(layout.blocks));
}

/// Writes group `group`'s inode bitmap.
pub(super) fn write_inodes(layout: &Layout, group: u32, out: &mut [u8]) {
    write(
        out,
        to_usize(layout.used_inodes_of(group)),
        to_usize(layout.inodes_per_group),
    );
}

/// Ones below `used`, zeros below `end`, ones to the end of the block: e2fsck insists on the padding.
fn write(out: &mut [u8], used: usize, end: usize) {
    out.fill(0xff);
    let (first, last) = (used.div_ceil(8), end / 8);
    if first <= last {
        out[first..last].fill(0);
        clear(out, used, (first * 8).min(end));
        clear(out, last * 8, end);
    } else {
        clear(out, used, end);
    }
}

fn clear(out: &mut [u8], from: usize, to: usize) {
    for bit in from..to {
        out[bit / 8] &= !(1 << (bit % 8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_is_right() {
        for (used, end) in [
            (0, 0),
            (0, 5),
            (3, 5),
            (8, 8),
            (1, 32_768),
            (9, 23),
            (32_768, 32_768),
            (15, 16),
            (16, 40),
        ] {
            let mut out = [0x55; 4096];
            write(&mut out, used, end);
            for bit in 0..32_768 {
                let set = out[bit / 8] >> (bit % 8) & 1 == 1;
                assert_eq!(set, bit < used || bit >= end, "bit {bit} of {used}..{end}");
            }
        }
    }
}
