//! An inode's size, and what follows from it.

use crate::units::BLOCK_SIZE;

/// An inode's size in bytes, which the superblock says. All that depends on it is derived from it.
pub(super) const SIZE: u16 = 256;
/// How many bytes of it are fields behind the first [`GOOD_OLD_SIZE`]; attributes follow.
pub(super) const EXTRA_SIZE: u16 = 32;
/// What an inode took before there were extra fields, in bytes (`EXT4_GOOD_OLD_INODE_SIZE`).
pub(super) const GOOD_OLD_SIZE: u16 = 128;
/// Where attributes start in it, in bytes.
pub(super) const XATTRS: u16 = GOOD_OLD_SIZE + EXTRA_SIZE;
/// How many inodes a block of the inode table holds.
pub(super) const PER_BLOCK: u32 = 4096 / widened(SIZE);

const _: () = assert!(BLOCK_SIZE == 4096 && 4096 % widened(SIZE) == 0, "inodes fill blocks");

/// `u32::from`, for constants.
#[expect(clippy::as_conversions, reason = "a wider type; From is not const")]
const fn widened(value: u16) -> u32 {
    value as u32
}
