//! ext4, computed. In: a [`Tree`]. Out: a [`BlockImage`] that the kernel's ext4 driver mounts and e2fsck finds clean.
//!
//! Planning passes over the tree a few times and keeps about 30 bytes an inode beside it; every block is then computed
//! when it is asked for, by arithmetic and binary search. The room has one file for each thing on the disk: `layout` says
//! where the parts are, `superblock`, `group`, `bitmap`, `inode`, `extent`, `directory`, `htree`, `xattr` and `acl` write
//! them, `number` gives inodes their numbers and `data` knows which of the layer's bytes a data block is.
//!
//! What is written is what Linux reads since 3.x without options: no journal, 4096-byte blocks, 256-byte inodes, 32-bit
//! block numbers, no checksums (every byte is computed; there is no medium to go bad). Sources: the kernel's
//! `fs/ext4/*.h` and its documentation of the on-disk format.

use std::fmt;
use std::ops::ControlFlow;

use super::{BlockImage, DirectoryId, FileId, FileMap, ImageError, Origin, Piece, StoredFile};
use crate::tree::{Content, NodeId, NodeKind, Tree, XattrSetId, show};
use crate::units::{BLOCK_SIZE, LayerId, TarOffset, to_usize};

mod acl;
mod bitmap;
mod bytes;
mod data;
mod directory;
mod extent;
mod group;
mod htree;
mod identity;
mod inode;
mod inode_size;
mod layout;
mod number;
mod superblock;
mod time;
mod xattr;

use data::Data;
use directory::Directories;
use extent::Extents;
use layout::{Layout, Sizes};
use number::Numbers;
use superblock::Identity;
use xattr::XattrPlan;

/// The first inode number that is not reserved.
const FIRST_INODE: u32 = 11;
/// Device numbers that Linux can hold: 12 bits of major, 20 of minor.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

/// What may differ between two images of one tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ext4Options {
    /// The volume label, padded with NULs.
    pub label: [u8; 16],
}

impl Default for Ext4Options {
    fn default() -> Self {
        Self {
            label: *b"tarblk\0\0\0\0\0\0\0\0\0\0",
        }
    }
}

/// An ext4 image of a tree.
pub struct Ext4Image {
    tree: Tree,
    uuid: [u8; 16],
    label: [u8; 16],
    numbers: Numbers,
    /// By inode ordinal: a directory's number in `directories`, a file's first data block.
    places: Vec<u32>,
    directories: Directories,
    xattrs: XattrPlan,
    /// Inodes with blocks of their own beside data and names, in the order of both inodes and blocks.
    extras: Vec<Extra>,
    /// How many extra blocks inodes have; those of attribute values follow.
    inode_extras: u32,
    data: Data,
    layout: Layout,
    /// How many directories each group has.
    group_directories: Vec<u16>,
}

#[derive(Clone, Copy, Debug)]
struct Extra {
    ordinal: u32,
    /// Counted from the first extra block.
    first: u32,
}

/// An inode's extra blocks, in this order: a symlink's text, attributes, the tree of extents.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    /// The first of them in the image.
    first: u32,
    text: u32,
    xattr: u32,
    tree_blocks: u32,
}

impl Extras {
    const fn count(&self) -> u32 {
        self.text + self.xattr + self.tree_blocks
    }

    const fn xattr_block(&self) -> u32 {
        self.first + self.text
    }

    const fn tree(&self) -> u32 {
        self.first + self.text + self.xattr
    }
}

impl Ext4Image {
    /// Plans the image: a few passes over the tree, no block is made.
    ///
    /// # Errors
    /// What ext4 cannot hold.
    pub fn plan(tree: Tree, options: &Ext4Options) -> Result<Self, ImageError> {
        let numbers = Numbers::of(&tree)?;
        let uuid = identity::uuid(&tree, &numbers, options);
        let directories = Directories::plan(&tree, htree::Seed::of(uuid))?;
        let mut places = vec![0; to_usize(numbers.len())];
        for number in 0..directories.len() {
            let place = u32::try_from(number).map_err(|_| ImageError::TooBig { blocks: u64::MAX })?;
            places[to_usize(numbers.ordinal(directories.node(number)))] = place;
        }
        let data = Data::plan(&tree, &numbers, &mut places)?;
        let xattrs = XattrPlan::of(&tree, (0..numbers.len()).map(|ordinal| numbers.node(ordinal)))?;
        let mut image = Self {
            tree,
            uuid,
            label: options.label,
            numbers,
            places,
            directories,
            xattrs,
            extras: Vec::new(),
            inode_extras: 0,
            data,
            layout: Layout::default(),
            group_directories: Vec::new(),
        };
        image.plan_extras()?;
        let value_inodes = u64::try_from(image.xattrs.values().len()).unwrap_or(u64::MAX);
        image.layout = Layout::new(Sizes {
            inodes: u64::from(FIRST_INODE - 2) + u64::from(image.numbers.len()) + value_inodes,
            directories: image.directories.blocks().into(),
            extras: u64::from(image.inode_extras) + u64::from(image.xattrs.value_blocks()),
            data: image.data.blocks().into(),
        })?;
        image.count_directories();
        Ok(image)
    }

    /// The tree that this is an image of.
    #[must_use]
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The filesystem's UUID, a digest of all that the image is made of.
    #[must_use]
    pub const fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// The inode number that a node has in the image; `None` for what the tar itself replaced.
    #[must_use]
    pub fn inode_number(&self, node: NodeId) -> Option<u32> {
        (node == NodeId::ROOT || self.tree.node(node).links() > 0).then(|| number::number(self.numbers.ordinal(node)))
    }

    /// Finds the inodes that need extra blocks, and refuses devices that have no number.
    fn plan_extras(&mut self) -> Result<(), ImageError> {
        for ordinal in 0..self.numbers.len() {
            let id = self.numbers.node(ordinal);
            let (major, minor) = self.tree.node(id).device();
            if major > MAJOR_MAX || minor > MINOR_MAX {
                return Err(ImageError::Device {
                    path: show(&self.tree.path(id)),
                    major,
                    minor,
                });
            }
            let needed = self.needed_extras(ordinal).count();
            if needed > 0 {
                self.extras.push(Extra {
                    ordinal,
                    first: self.inode_extras,
                });
                self.inode_extras = self
                    .inode_extras
                    .checked_add(needed)
                    .ok_or(ImageError::TooBig { blocks: u64::MAX })?;
            }
        }
        self.extras.shrink_to_fit();
        Ok(())
    }

    /// What extra blocks an inode needs, without their place.
    fn needed_extras(&self, ordinal: u32) -> Extras {
        let id = self.numbers.node(ordinal);
        let node = self.tree.node(id);
        let mut needed = Extras::default();
        match node.kind() {
            NodeKind::Symlink => needed.text = u32::from(self.tree.link_text(id).len() >= inode::FAST_SYMLINK),
            NodeKind::File => needed.tree_blocks = extent::tree_blocks(self.data_extents(ordinal).count()),
            NodeKind::Directory => {
                let (_, blocks) = self.directories.extent(self.directory_of(ordinal));
                needed.tree_blocks = extent::tree_blocks(Extents::Run { start: 0, blocks }.count());
            }
            _ => {}
        }
        if node.xattr_set() != XattrSetId::EMPTY {
            needed.xattr = u32::from(self.xattrs.needs_block(&self.tree, id));
        }
        needed
    }

    /// An inode's extra blocks in the image.
    fn extras_of(&self, ordinal: u32) -> Extras {
        let mut extras = self.needed_extras(ordinal);
        if extras.count() > 0
            && let Ok(at) = self.extras.binary_search_by_key(&ordinal, |extra| extra.ordinal)
        {
            extras.first = self.layout.extras + self.extras[at].first;
        }
        extras
    }

    /// The extents of a file's data.
    fn data_extents(&self, ordinal: u32) -> Extents<'_> {
        let id = self.numbers.node(ordinal);
        let start = self.layout.data + self.places[to_usize(ordinal)];
        match self.tree.content(id) {
            Content::Whole(_) => {
                let blocks = self.tree.node(id).size().div_ceil(BLOCK_SIZE);
                Extents::Run {
                    start,
                    blocks: u32::try_from(blocks).expect("checked when planned"),
                }
            }
            Content::Scattered([]) => Extents::NONE,
            Content::Scattered(_) => Extents::List {
                start,
                extents: self.data.extents(id),
            },
        }
    }

    /// A directory's number among the directories.
    fn directory_of(&self, ordinal: u32) -> usize {
        to_usize(self.places[to_usize(ordinal)])
    }

    /// The first block of attribute values with inodes of their own.
    const fn value_blocks(&self) -> u32 {
        self.layout.extras + self.inode_extras
    }

    fn count_directories(&mut self) {
        self.group_directories = vec![0; to_usize(self.layout.groups)];
        for directory in 0..self.directories.len() {
            let inode = number::number(self.numbers.ordinal(self.directories.node(directory)));
            self.group_directories[to_usize((inode - 1) / self.layout.inodes_per_group)] += 1;
        }
    }

    /// Writes a block of the inode table.
    fn write_inodes(&self, block: u32, out: &mut [u8]) {
        let first = block * inode_size::PER_BLOCK + 1;
        for (out, inode) in out.chunks_exact_mut(inode_size::SIZE.into()).zip(first..) {
            let Some(ordinal) = number::ordinal_of(inode) else {
                continue;
            };
            if ordinal < self.numbers.len() {
                self.write_inode(ordinal, out);
            } else if let Some(value) = self.xattrs.values().get(to_usize(ordinal - self.numbers.len())) {
                self.write_value_inode(value, out);
            }
        }
    }

    /// Writes an extra block, counted from the first.
    fn write_extra(&self, block: u32, out: &mut [u8]) {
        if block >= self.inode_extras {
            return self.xattrs.write_value(&self.tree, block - self.inode_extras, out);
        }
        let extra = self.extras[self.extras.partition_point(|extra| extra.first <= block) - 1];
        let extras = self.extras_of(extra.ordinal);
        let id = self.numbers.node(extra.ordinal);
        let block = self.layout.extras + block;
        if extras.text > 0 && block == extras.first {
            let text = self.tree.link_text(id);
            out[..text.len()].copy_from_slice(text);
        } else if extras.xattr > 0 && block == extras.xattr_block() {
            let first_inode = number::number(self.numbers.len());
            self.xattrs.write_block(&self.tree, id, self.uuid, first_inode, out);
        } else {
            self.extents(extra.ordinal)
                .write_block(extras.tree(), block - extras.tree(), out);
        }
    }

    fn identity(&self) -> Identity {
        Identity {
            uuid: self.uuid,
            label: self.label,
            has_htree: self.directories.any_hashed(),
            has_ea_inodes: !self.xattrs.values().is_empty(),
        }
    }
}

impl BlockImage for Ext4Image {
    fn len(&self) -> u64 {
        u64::from(self.layout.blocks) * BLOCK_SIZE
    }

    fn pieces(&self, block: u64, count: u64, out: &mut Vec<Piece>) {
        let end = block.saturating_add(count);
        let within = |limit: u32, block: u64| u32::try_from(block.min(limit.into())).expect("at most the limit");
        let (metadata, free) = (self.layout.data, self.layout.free);
        let from = within(metadata, block);
        let to = within(metadata, end);
        if from < to {
            out.push(Piece {
                len: u64::from(to - from) * BLOCK_SIZE,
                origin: Origin::Metadata,
            });
        }
        let from = within(free, block).max(metadata);
        let to = within(free, end);
        if from < to {
            self.data.pieces(&self.tree, from - metadata, to - metadata, out);
        }
        let rest = end - block.max(free.into()).min(end);
        if rest > 0 {
            out.push(Piece {
                len: rest.saturating_mul(BLOCK_SIZE),
                origin: Origin::Zero,
            });
        }
    }

    fn fill_metadata(&self, block: u64, out: &mut [u8]) {
        out.fill(0);
        let layout = &self.layout;
        let Ok(block) = u32::try_from(block) else { return };
        match block {
            0 => superblock::write(layout, &self.identity(), out),
            _ if block < layout.block_bitmaps => group::write(layout, &self.group_directories, block - 1, out),
            _ if block < layout.inode_bitmaps => bitmap::write_blocks(layout, block - layout.block_bitmaps, out),
            _ if block < layout.inode_table => bitmap::write_inodes(layout, block - layout.inode_bitmaps, out),
            _ if block < layout.directories => self.write_inodes(block - layout.inode_table, out),
            _ if block < layout.extras => {
                self.directories
                    .write(&self.tree, &self.numbers, block - layout.directories, out);
            }
            _ if block < layout.data => self.write_extra(block - layout.extras, out),
            _ => {}
        }
    }
}

impl FileMap for Ext4Image {
    fn file_at(&self, layer: LayerId, at: TarOffset) -> Option<StoredFile> {
        self.data.file_at(&self.tree, layer, at)
    }

    fn neighbours(&self, file: FileId, visit: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {
        self.data.neighbours(&self.tree, file, visit);
    }

    fn resolve(&self, directory: DirectoryId, path: &[u8]) -> Option<StoredFile> {
        let node = self.tree.resolve(NodeId::from_raw(directory.0), path)?;
        self.data.file_of(&self.tree, node)
    }

    fn path(&self, file: FileId) -> Option<Vec<u8>> {
        let path = self.tree.path(self.data.node_of(file)?);
        Some([b"/", &path[..]].concat())
    }
}

impl fmt::Debug for Ext4Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ext4Image")
            .field("tree", &self.tree)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}
