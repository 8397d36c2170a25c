//! Extended attributes: behind the inode while there is room, then in a block of the inode's own, and values for which the
//! block has no room in inodes of their own (`ea_inode`), which inodes with the same set of attributes share.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::bytes::{halves, pad4, put_u16, put_u32};
use super::{acl, inode_size};
use crate::checksum;
use crate::image::ImageError;
use crate::tree::{NodeId, NodeKind, Tree, XattrSetId, Xattrs, show};
use crate::units::{BLOCK_SIZE, to_usize};

const MAGIC: u32 = 0xea02_0000;
/// What stands before the entries behind an inode, and behind the last one anywhere, in bytes.
const INODE_MAGIC: usize = 4;
const END: usize = 4;
/// Bytes for entries and values behind an inode's fields.
#[expect(clippy::as_conversions, reason = "a wider type; From is not const")]
const IN_INODE: usize = (inode_size::SIZE - inode_size::XATTRS) as usize - INODE_MAGIC - END;
/// The same in a block.
const IN_BLOCK: usize = 4096 - BLOCK_HEADER - END;
const BLOCK_HEADER: usize = 32;
const ENTRY_HEADER: usize = 16;

/// What may hold which attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    File,
    Directory,
    /// Symlinks, devices and fifos: no `user.` attributes, and for lack of one rule for all, no ACLs on symlinks.
    Symlink,
    Special,
}

impl Holder {
    fn of(kind: NodeKind) -> Self {
        match kind {
            NodeKind::File => Self::File,
            NodeKind::Directory => Self::Directory,
            NodeKind::Symlink => Self::Symlink,
            NodeKind::CharDevice | NodeKind::BlockDevice | NodeKind::Fifo => Self::Special,
        }
    }

    const fn number(self) -> usize {
        match self {
            Self::File => 0,
            Self::Directory => 1,
            Self::Symlink => 2,
            Self::Special => 3,
        }
    }
}

/// The place where an attribute's value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Inode,
    Block,
    /// Its entry in the block, its value in an inode of its own.
    OwnInode,
}

/// An attribute as ext4 names and stores it.
#[derive(Debug)]
struct Attribute<'a> {
    /// The number that ext4 has for its name's prefix (`EXT4_XATTR_INDEX_*`).
    prefix: u8,
    /// The rest of its name.
    name: &'a [u8],
    value: Cow<'a, [u8]>,
    home: Home,
}

impl Attribute<'_> {
    fn entry_len(&self) -> usize {
        ENTRY_HEADER + pad4(self.name.len())
    }

    fn len(&self) -> usize {
        self.entry_len()
            + if self.home == Home::OwnInode {
                0
            } else {
                pad4(self.value.len())
            }
    }

    /// `ext4_xattr_hash_entry`, over the name and these bytes.
    fn hash(&self, value: &[u8]) -> u32 {
        let name = self
            .name
            .iter()
            .fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        value.chunks(4).fold(name, |hash, bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// That a set has more attributes than an inode and its block can name.
#[derive(Debug)]
struct TooMany;

/// A set as ext4 has it: what its holder cannot have left out, sorted as blocks are, every attribute with its home.
fn arrange(set: Xattrs<'_>, holder: Holder) -> Result<Vec<Attribute<'_>>, TooMany> {
    let mut attributes = Vec::new();
    for (name, value) in set {
        let Some((prefix, rest)) = prefix_of(name, holder) else {
            continue;
        };
        let mut value = Cow::Borrowed(value);
        if rest.is_empty() {
            match acl::stored(&value) {
                Some(stored) => value = stored.into(),
                None => continue,
            }
        }
        attributes.push(Attribute {
            prefix,
            name: rest,
            value,
            home: Home::Block,
        });
    }
    attributes.sort_by(|a, b| (a.prefix, a.name.len(), a.name).cmp(&(b.prefix, b.name.len(), b.name)));
    let mut room = IN_INODE;
    for attribute in &mut attributes {
        if attribute.len() <= room {
            room -= attribute.len();
            attribute.home = Home::Inode;
        }
    }
    // Values can move, entries cannot; with that, there are at most 200 of them to move.
    let entries = attributes.iter().filter(|attribute| attribute.home != Home::Inode);
    if entries.map(Attribute::entry_len).sum::<usize>() > IN_BLOCK {
        return Err(TooMany);
    }
    loop {
        let in_block = || attributes.iter().filter(|attribute| attribute.home != Home::Inode);
        if in_block().map(Attribute::len).sum::<usize>() <= IN_BLOCK {
            return Ok(attributes);
        }
        // The biggest value goes first: the fewest inodes of their own.
        let movable = attributes.iter_mut().filter(|attribute| attribute.home == Home::Block);
        let biggest = movable
            .max_by_key(|attribute| attribute.value.len())
            .filter(|biggest| !biggest.value.is_empty());
        biggest.ok_or(TooMany)?.home = Home::OwnInode;
    }
}

/// The number of a name's prefix and the rest of the name. `None` for what the kernel would not set on this holder: like
/// unpacking programs, we leave it out.
fn prefix_of(name: &[u8], holder: Holder) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" if holder != Holder::Symlink => return Some((2, b"")),
        b"system.posix_acl_default" if holder == Holder::Directory => return Some((3, b"")),
        _ => {}
    }
    let user = matches!(holder, Holder::File | Holder::Directory).then_some((&b"user."[..], 1));
    let prefixes = [user, Some((b"trusted.", 4)), Some((b"security.", 6))];
    let found = prefixes
        .into_iter()
        .flatten()
        .find_map(|(prefix, number)| Some((number, name.strip_prefix(prefix)?)));
    found.filter(|(_, rest)| !rest.is_empty())
}

/// A value in an inode of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct ValueInode {
    set: XattrSetId,
    holder: Holder,
    /// Which attribute of the arranged set.
    attribute: u32,
    /// How many inodes refer to it.
    references: u32,
    /// Its first block, counted from the first block of all values.
    pub(super) first: u32,
    pub(super) len: u32,
}

impl ValueInode {
    pub(super) fn blocks(&self) -> u32 {
        value_blocks(self.len)
    }

    pub(super) const fn references(&self) -> u32 {
        self.references
    }
}

fn value_blocks(len: u32) -> u32 {
    len.div_ceil(4096)
}

/// What a set needs beyond the inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Needs {
    #[default]
    Unknown,
    /// Nothing stored at all, or nothing beyond the inode.
    Nothing,
    Block,
    BlockAndInodes,
}

/// What each set of attributes needs beyond the inode, by set and holder.
#[derive(Debug)]
pub(super) struct XattrPlan {
    /// By set, four holders each. Empty when no node has attributes.
    needs: Vec<[Needs; 4]>,
    /// Sorted by set, holder and attribute.
    values: Vec<ValueInode>,
    value_blocks: u32,
}

impl XattrPlan {
    /// Looks at the attributes of these nodes, one for every inode that there will be.
    pub(super) fn of(tree: &Tree, inodes: impl Iterator<Item = NodeId>) -> Result<Self, ImageError> {
        let mut plan = Self {
            needs: Vec::new(),
            values: Vec::new(),
            value_blocks: 0,
        };
        if tree.xattr_set_count() == 1 {
            return Ok(plan);
        }
        plan.needs.resize(to_usize(tree.xattr_set_count()), [Needs::Nothing; 4]);
        plan.needs[1..].fill([Needs::Unknown; 4]);
        let mut references: BTreeMap<(XattrSetId, Holder), u32> = BTreeMap::new();
        let mut left_out = None;
        for node in inodes {
            let set = tree.node(node).xattr_set();
            let holder = Holder::of(tree.node(node).kind());
            let needs = &mut plan.needs[to_usize(set.number())][holder.number()];
            if *needs == Needs::Unknown {
                *needs = needs_of(tree, node, set, holder)?;
                for (name, _) in tree.xattrs(set).filter(|(name, _)| prefix_of(name, holder).is_none()) {
                    left_out.get_or_insert((node, name));
                }
            }
            if *needs == Needs::BlockAndInodes {
                *references.entry((set, holder)).or_default() += 1;
            }
        }
        if let Some((node, name)) = left_out {
            let (path, name) = (show(&tree.path(node)), show(name));
            log::warn!("extended attributes that ext4 does not take are left out, the first is {name} of {path}");
        }
        for ((set, holder), references) in references {
            let arranged = arrange(tree.xattrs(set), holder).expect("arranged before");
            for (at, attribute) in (0..)
                .zip(arranged)
                .filter(|(_, attribute)| attribute.home == Home::OwnInode)
            {
                let len = u32::try_from(attribute.value.len()).expect("at most 64 KiB");
                let first = plan.value_blocks;
                plan.values.push(ValueInode {
                    set,
                    holder,
                    attribute: at,
                    references,
                    first,
                    len,
                });
                plan.value_blocks = first
                    .checked_add(value_blocks(len))
                    .ok_or(ImageError::TooBig { blocks: u64::MAX })?;
            }
        }
        Ok(plan)
    }

    /// Whether a node needs an attribute block.
    pub(super) fn needs_block(&self, tree: &Tree, node: NodeId) -> bool {
        matches!(self.needs(tree, node), Needs::Block | Needs::BlockAndInodes)
    }

    fn needs(&self, tree: &Tree, node: NodeId) -> Needs {
        let node = tree.node(node);
        let of_set = self.needs.get(to_usize(node.xattr_set().number()));
        of_set.map_or(Needs::Nothing, |needs| needs[Holder::of(node.kind()).number()])
    }

    /// Values with inodes of their own; theirs follow all other inodes.
    pub(super) fn values(&self) -> &[ValueInode] {
        &self.values
    }

    /// How many blocks these values take.
    pub(super) fn value_blocks(&self) -> u32 {
        self.value_blocks
    }

    /// The blocks of values that are counted as the node's own, as the kernel's quota does.
    pub(super) fn charged_blocks(&self, tree: &Tree, node: NodeId) -> u32 {
        if self.needs(tree, node) != Needs::BlockAndInodes {
            return 0;
        }
        let (set, holder) = (tree.node(node).xattr_set(), Holder::of(tree.node(node).kind()));
        self.values_of(set, holder).map(|(_, value)| value.blocks()).sum()
    }

    fn values_of(&self, set: XattrSetId, holder: Holder) -> impl Iterator<Item = (u32, &ValueInode)> {
        let start = self
            .values
            .partition_point(|value| (value.set, value.holder) < (set, holder));
        let start_number = u32::try_from(start).expect("counted in 32 bits");
        let of_set = self.values[start..]
            .iter()
            .take_while(move |value| (value.set, value.holder) == (set, holder));
        (start_number..).zip(of_set)
    }

    /// The value whose blocks hold `block`, counted from the first block of all values, and which of its blocks it is.
    pub(super) fn write_value(&self, tree: &Tree, block: u32, out: &mut [u8]) {
        let value = self.values[self.values.partition_point(|value| value.first <= block) - 1];
        let bytes = value_bytes(tree, &value);
        let from = to_usize(block - value.first) * out.len();
        let bytes = bytes.get(from..).unwrap_or_default();
        let len = bytes.len().min(out.len());
        out[..len].copy_from_slice(&bytes[..len]);
    }

    /// The hash that a value's inode and the entries that refer to it carry.
    pub(super) fn value_hash(tree: &Tree, uuid: [u8; 16], value: &ValueInode) -> u32 {
        value_hash(uuid, &value_bytes(tree, value))
    }

    /// Writes what stands behind an inode, from byte 160 on.
    pub(super) fn write_in_inode(tree: &Tree, node: NodeId, out: &mut [u8]) {
        let holder = Holder::of(tree.node(node).kind());
        let arranged = arrange(tree.xattrs(tree.node(node).xattr_set()), holder).unwrap_or_default();
        let here = arranged.iter().filter(|attribute| attribute.home == Home::Inode);
        if here.clone().next().is_none() {
            return;
        }
        put_u32(out, 0, MAGIC);
        // Values are found from the first entry on.
        let mut writer = Writer {
            area: &mut out[4..],
            at: 0,
            end: 0,
            base: 0,
        };
        writer.end = writer.area.len();
        here.for_each(|attribute| writer.put(attribute, 0, 0));
    }

    /// Writes a node's attribute block. `first_inode` is the inode number of the first value with an inode of its own.
    pub(super) fn write_block(&self, tree: &Tree, node: NodeId, uuid: [u8; 16], first_inode: u32, out: &mut [u8]) {
        let set = tree.node(node).xattr_set();
        let holder = Holder::of(tree.node(node).kind());
        put_u32(out, 0, MAGIC);
        put_u32(out, 4, 1); // references
        put_u32(out, 8, 1); // blocks
        let mut writer = Writer {
            area: &mut out[BLOCK_HEADER..],
            at: 0,
            end: 0,
            base: BLOCK_HEADER,
        };
        writer.end = writer.area.len();
        let arranged = arrange(tree.xattrs(set), holder).unwrap_or_default();
        for (at, attribute) in (0..).zip(&arranged) {
            match attribute.home {
                Home::Inode => {}
                Home::Block => writer.put(attribute, 0, attribute.hash(&attribute.value)),
                Home::OwnInode => {
                    let value = self.values_of(set, holder).find(|(_, value)| value.attribute == at);
                    let number = value.map_or(0, |(number, _)| first_inode + number);
                    let hash = attribute.hash(&value_hash(uuid, &attribute.value).to_le_bytes());
                    writer.put(attribute, number, hash);
                }
            }
        }
    }
}

fn needs_of(tree: &Tree, node: NodeId, set: XattrSetId, holder: Holder) -> Result<Needs, ImageError> {
    let arranged = arrange(tree.xattrs(set), holder).map_err(|TooMany| ImageError::Xattrs {
        path: show(&tree.path(node)),
        count: tree.xattrs(set).count(),
    })?;
    Ok(if arranged.iter().any(|attribute| attribute.home == Home::OwnInode) {
        Needs::BlockAndInodes
    } else if arranged.iter().any(|attribute| attribute.home == Home::Block) {
        Needs::Block
    } else {
        Needs::Nothing
    })
}

fn value_bytes(tree: &Tree, value: &ValueInode) -> Vec<u8> {
    let mut arranged = arrange(tree.xattrs(value.set), value.holder).unwrap_or_default();
    arranged.swap_remove(to_usize(value.attribute)).value.into_owned()
}

/// `ext4_xattr_inode_hash`: a CRC32C seeded with the UUID's, without the final inversion.
fn value_hash(uuid: [u8; 16], value: &[u8]) -> u32 {
    !checksum::crc32c_append(checksum::crc32c(&uuid), value)
}

/// Writes entries from the front and values from the back of an area.
struct Writer<'a> {
    area: &'a mut [u8],
    at: usize,
    end: usize,
    /// What offsets of values count from lies so far before the area.
    base: usize,
}

impl Writer<'_> {
    fn put(&mut self, attribute: &Attribute<'_>, value_inode: u32, hash: u32) {
        let name = attribute.name;
        let value_len = attribute.value.len();
        let mut offset = 0;
        if value_inode == 0 && value_len > 0 {
            self.end -= pad4(value_len);
            self.area[self.end..self.end + value_len].copy_from_slice(&attribute.value);
            offset = self.base + self.end;
        }
        let entry = &mut self.area[self.at..self.at + attribute.entry_len()];
        entry[0] = u8::try_from(name.len()).expect("at most 255 bytes");
        entry[1] = attribute.prefix;
        put_u16(entry, 2, halves(u32::try_from(offset).expect("inside a block")).0);
        put_u32(entry, 4, value_inode);
        put_u32(entry, 8, u32::try_from(value_len).expect("at most 64 KiB"));
        put_u32(entry, 12, hash);
        entry[ENTRY_HEADER..ENTRY_HEADER + name.len()].copy_from_slice(name);
        self.at += attribute.entry_len();
    }
}

const _: () = assert!(BLOCK_SIZE == 4096);
