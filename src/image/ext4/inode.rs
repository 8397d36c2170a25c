//! Inodes: `struct ext4_inode`, 256 bytes, computed from the tree's nodes.

use super::Ext4Image;
use super::bytes::{halves, put_u16, put_u32, words};
use super::extent::Extents;
use super::inode_size::{EXTRA_SIZE, GOOD_OLD_SIZE, SIZE, XATTRS};
use super::time;
use super::xattr::{ValueInode, XattrPlan};
use crate::tree::{NodeId, NodeKind};
use crate::units::BLOCK_SIZE;

/// Symlinks shorter than this stand in the inode.
pub(super) const FAST_SYMLINK: usize = 60;
/// More links than this cannot be counted for a directory; 1 says so (`dir_nlink`).
const DIRECTORY_LINKS_MAX: u32 = 65_000;

const FLAG_INDEX: u32 = 0x1000;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_VALUE: u32 = 0x20_0000;

const SECTORS_PER_BLOCK: u64 = 8;

/// Writes the fields that every inode has.
fn write_common(out: &mut [u8], mode: u16, links: u32, size: u64, blocks: u64, flags: u32) {
    let (size, size_high) = words(size);
    let (sectors, sectors_high) = words(blocks * SECTORS_PER_BLOCK);
    put_u16(out, 0, mode);
    put_u32(out, 4, size);
    put_u16(out, 26, halves(links).0);
    put_u32(out, 28, sectors);
    put_u32(out, 32, flags);
    put_u32(out, 108, size_high);
    put_u16(out, 116, halves(sectors_high).0);
    put_u16(out, usize::from(GOOD_OLD_SIZE), EXTRA_SIZE);
}

impl Ext4Image {
    /// Writes the inode of an ordinal, of which there are [`Numbers::len`](super::number::Numbers::len).
    pub(super) fn write_inode(&self, ordinal: u32, out: &mut [u8]) {
        let id = self.numbers.node(ordinal);
        let node = self.tree.node(id);
        let kind = node.kind();
        let extents = self.extents(ordinal);
        let extras = self.extras_of(ordinal);
        let mut links = self.numbers.links(&self.tree, ordinal);
        let mut flags = FLAG_EXTENTS;
        let mut size = node.size();
        match kind {
            NodeKind::File => {}
            NodeKind::Directory => {
                size = u64::from(extents.blocks()) * BLOCK_SIZE;
                if links > DIRECTORY_LINKS_MAX {
                    links = 1;
                }
                if self.directories.is_hashed(self.directory_of(ordinal)) {
                    flags |= FLAG_INDEX;
                }
            }
            NodeKind::Symlink => {
                let text = self.tree.link_text(id);
                size = u64::try_from(text.len()).expect("at most 4095 bytes");
                if text.len() < FAST_SYMLINK {
                    flags = 0;
                    out[40..40 + text.len()].copy_from_slice(text);
                }
            }
            NodeKind::CharDevice | NodeKind::BlockDevice => {
                flags = 0;
                let (major, minor) = node.device();
                put_u32(out, 44, minor & 0xff | major << 8 | (minor & !0xff) << 12);
            }
            NodeKind::Fifo => flags = 0,
        }
        if flags & FLAG_EXTENTS != 0 {
            extents.write_root(extras.tree(), &mut out[40..100]);
        }
        let charged = u64::from(self.xattrs.charged_blocks(&self.tree, id));
        let blocks = u64::from(extents.blocks()) + u64::from(extras.xattr) + u64::from(extras.tree_blocks) + charged;
        write_common(out, node.mode(), links, size, blocks, flags);
        let (uid, uid_high) = halves(node.uid());
        let (gid, gid_high) = halves(node.gid());
        put_u16(out, 2, uid);
        put_u16(out, 24, gid);
        put_u16(out, 120, uid_high);
        put_u16(out, 122, gid_high);
        // There is one time in a tar: it is every time of the inode.
        let (base, extra) = time::encode(node.mtime());
        for (base_at, extra_at) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
            put_u32(out, base_at, base);
            put_u32(out, extra_at, extra);
        }
        if node.xattr_set() != crate::tree::XattrSetId::EMPTY {
            XattrPlan::write_in_inode(&self.tree, id, &mut out[usize::from(XATTRS)..usize::from(SIZE)]);
            if extras.xattr > 0 {
                put_u32(out, 104, extras.xattr_block());
            }
        }
    }

    /// Writes the inode that only holds an attribute's value.
    pub(super) fn write_value_inode(&self, value: &ValueInode, out: &mut [u8]) {
        const REGULAR_FILE: u16 = 0o100_600;
        write_common(
            out,
            REGULAR_FILE,
            1,
            value.len.into(),
            value.blocks().into(),
            FLAG_EXTENTS | FLAG_VALUE,
        );
        // What ext4 keeps in times and version here: the value's hash, and how many inodes refer to it.
        put_u32(out, 8, XattrPlan::value_hash(&self.tree, self.uuid, value));
        put_u32(out, 36, value.references());
        let run = Extents::Run {
            start: self.value_blocks() + value.first,
            blocks: value.blocks(),
        };
        run.write_root(0, &mut out[40..100]);
    }

    /// A node's extents in the image.
    pub(super) fn extents(&self, ordinal: u32) -> Extents<'_> {
        let id: NodeId = self.numbers.node(ordinal);
        let node = self.tree.node(id);
        match node.kind() {
            NodeKind::Directory => {
                let (first, blocks) = self.directories.extent(self.directory_of(ordinal));
                Extents::Run {
                    start: self.layout.directories + first,
                    blocks,
                }
            }
            NodeKind::File => self.data_extents(ordinal),
            NodeKind::Symlink if self.tree.link_text(id).len() >= FAST_SYMLINK => Extents::Run {
                start: self.extras_of(ordinal).first,
                blocks: 1,
            },
            _ => Extents::NONE,
        }
    }
}
