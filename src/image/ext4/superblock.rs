//! The superblock: `struct ext4_super_block`, 1024 bytes at 1024. There is one copy, and no other block of its kind.

use super::bytes::{put_u16, put_u32};
use super::layout::{BLOCKS_PER_GROUP, Layout};

/// Where it starts in block 0.
const START: usize = 1024;

mod compat {
    pub(super) const EXT_ATTR: u32 = 0x8;
    pub(super) const DIR_INDEX: u32 = 0x20;
    /// No backup superblocks but the (at most two) that are named: none.
    pub(super) const SPARSE_SUPER2: u32 = 0x200;
}

mod incompat {
    pub(super) const FILETYPE: u32 = 0x2;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const FLEX_BG: u32 = 0x200;
    pub(super) const EA_INODE: u32 = 0x400;
}

mod ro_compat {
    pub(super) const SPARSE_SUPER: u32 = 0x1;
    pub(super) const LARGE_FILE: u32 = 0x2;
    pub(super) const HUGE_FILE: u32 = 0x8;
    pub(super) const DIR_NLINK: u32 = 0x20;
    pub(super) const EXTRA_ISIZE: u32 = 0x40;
    pub(super) const READ_ONLY: u32 = 0x1000;
}

/// `s_flags`: directory hashes were made of unsigned bytes.
const UNSIGNED_HASH: u32 = 0x2;
/// `s_def_hash_version`.
const HALF_MD4: u8 = 1;
/// `s_default_mount_opts`: user attributes and ACLs.
const XATTR_USER_AND_ACL: u32 = 0xc;

/// What the superblock says beyond the layout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) uuid: [u8; 16],
    pub(super) label: [u8; 16],
    /// Whether any directory has a hash tree.
    pub(super) has_htree: bool,
    /// Whether any attribute's value is in an inode of its own.
    pub(super) has_ea_inodes: bool,
}

/// Writes block 0.
pub(super) fn write(layout: &Layout, identity: &Identity, block: &mut [u8]) {
    let out = &mut block[START..START + 1024];
    put_u32(out, 0x00, layout.inodes());
    put_u32(out, 0x04, layout.blocks);
    put_u32(out, 0x0c, layout.blocks - layout.free);
    put_u32(out, 0x10, layout.inodes() - layout.used_inodes);
    put_u32(out, 0x18, 2); // block size: 1024 << 2
    put_u32(out, 0x1c, 2); // cluster size: the same
    put_u32(out, 0x20, BLOCKS_PER_GROUP);
    put_u32(out, 0x24, BLOCKS_PER_GROUP);
    put_u32(out, 0x28, layout.inodes_per_group);
    put_u16(out, 0x36, 0xffff); // never due for a check by mount count
    put_u16(out, 0x38, 0xef53); // magic
    put_u16(out, 0x3a, 1); // cleanly unmounted
    put_u16(out, 0x3c, 1); // on errors continue
    put_u32(out, 0x4c, 1); // revision with feature flags
    put_u32(out, 0x54, super::FIRST_INODE);
    put_u16(out, 0x58, super::inode_size::SIZE);
    let htree = if identity.has_htree { compat::DIR_INDEX } else { 0 };
    put_u32(out, 0x5c, compat::EXT_ATTR | compat::SPARSE_SUPER2 | htree);
    let ea_inode = if identity.has_ea_inodes { incompat::EA_INODE } else { 0 };
    put_u32(
        out,
        0x60,
        incompat::FILETYPE | incompat::EXTENTS | incompat::FLEX_BG | ea_inode,
    );
    let ro_compat = ro_compat::SPARSE_SUPER
        | ro_compat::LARGE_FILE
        | ro_compat::HUGE_FILE
        | ro_compat::DIR_NLINK
        | ro_compat::EXTRA_ISIZE
        | ro_compat::READ_ONLY;
    put_u32(out, 0x64, ro_compat);
    out[0x68..0x78].copy_from_slice(&identity.uuid);
    out[0x78..0x88].copy_from_slice(&identity.label);
    out[0xec..0xfc].copy_from_slice(&identity.uuid); // the directory hash's seed
    out[0xfc] = HALF_MD4;
    put_u32(out, 0x100, XATTR_USER_AND_ACL);
    put_u16(out, 0x15c, super::inode_size::EXTRA_SIZE);
    put_u16(out, 0x15e, super::inode_size::EXTRA_SIZE);
    put_u32(out, 0x160, UNSIGNED_HASH);
    out[0x174] = 31; // log2 of groups per flex group: all of them
}
