//! File data: every file's stored blocks lie in one stretch of the image, the files in the tar's order, so that reading
//! the image onwards reads the tar onwards. Sparse files store the blocks that any of their segments touches.
//!
//! A *data block* is counted from the first block of all file data.

use std::ops::ControlFlow;

use super::extent::{EXTENT_BLOCKS_MAX, Extent};
use super::number::Numbers;
use crate::image::{DirectoryId, FileId, ImageError, Origin, Piece, StoredFile};
use crate::index::Segment;
use crate::tree::{Content, NodeId, NodeKind, Tree, show};
use crate::units::{BLOCK_SIZE, LayerId, TarOffset, TarRange, to_usize};

/// ext4 counts a file's blocks in 32 bits, and the last number is not one.
const FILE_BLOCKS_MAX: u64 = 0xffff_ffff;
const NONE: u32 = u32::MAX;

/// All file data of an image.
#[derive(Debug, Default)]
pub(super) struct Data {
    /// Files with stored bytes, in the order of their blocks; those from `originals` on are once more what an inode with
    /// too many names for one holds.
    files: Vec<File>,
    originals: u32,
    /// Sorted by node.
    sparse: Vec<Sparse>,
    extents: Vec<Extent>,
    blocks: u32,
}

#[derive(Clone, Copy, Debug)]
struct File {
    /// Its first data block.
    first: u32,
    node: u32,
    /// The next file of the same directory, the first one behind the last.
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Sparse {
    node: u32,
    first_extent: u32,
    end_extent: u32,
}

/// Where a file's bytes start in the tar; `None` when it stores none.
fn stored_at(tree: &Tree, node: NodeId) -> Option<(LayerId, TarOffset)> {
    let start = match tree.content(node) {
        Content::Whole(start) => start,
        Content::Scattered(segments) => segments.first()?.tar_offset,
    };
    Some((tree.node(node).layer(), start))
}

impl Data {
    /// Lays out the data of all files that have names. Notes in `places`, by inode ordinal, each file's first data block.
    pub(super) fn plan(tree: &Tree, numbers: &Numbers, places: &mut [u32]) -> Result<Self, ImageError> {
        let mut data = Self::default();
        for (node, attributes) in tree.nodes() {
            if attributes.kind() != NodeKind::File || attributes.links() == 0 {
                continue;
            }
            if attributes.size() > FILE_BLOCKS_MAX * BLOCK_SIZE {
                return Err(ImageError::FileTooBig {
                    path: show(&tree.path(node)),
                    size: attributes.size(),
                });
            }
            if stored_at(tree, node).is_some() {
                data.files.push(File {
                    first: 0,
                    node: node.raw(),
                    next: NONE,
                });
            }
        }
        let key = |file: &File| stored_at(tree, NodeId::from_raw(file.node));
        if !data.files.is_sorted_by_key(key) {
            data.files.sort_by_key(key);
        }
        data.originals = narrow(data.files.len())?;
        data.link_directories(tree);
        for at in 0..data.files.len() {
            let node = NodeId::from_raw(data.files[at].node);
            if let Content::Scattered(segments) = tree.content(node) {
                data.plan_extents(node, segments)?;
            }
        }
        data.sparse.sort_unstable_by_key(|sparse| sparse.node);
        for at in 0..data.files.len() {
            let node = NodeId::from_raw(data.files[at].node);
            data.files[at].first = data.place(tree, node)?;
            places[to_usize(numbers.ordinal(node))] = data.files[at].first;
        }
        for ordinal in (0..numbers.len()).filter(|&ordinal| !numbers.is_first(ordinal)) {
            let node = numbers.node(ordinal);
            if stored_at(tree, node).is_some() {
                let first = data.place(tree, node)?;
                places[to_usize(ordinal)] = first;
                data.files.push(File {
                    first,
                    node: node.raw(),
                    next: NONE,
                });
            }
        }
        data.files.shrink_to_fit();
        data.extents.shrink_to_fit();
        Ok(data)
    }

    /// Takes the next data blocks for a file; returns the first.
    fn place(&mut self, tree: &Tree, node: NodeId) -> Result<u32, ImageError> {
        let blocks = match tree.content(node) {
            Content::Whole(_) => narrow(tree.node(node).size().div_ceil(BLOCK_SIZE))?,
            Content::Scattered(_) => self.extents(node).last().map_or(0, |last| last.stored + last.len),
        };
        let first = self.blocks;
        self.blocks = first
            .checked_add(blocks)
            .ok_or(ImageError::TooBig { blocks: u64::MAX })?;
        Ok(first)
    }

    /// Makes the files of each directory a ring.
    fn link_directories(&mut self, tree: &Tree) {
        let mut nearest = vec![NONE; to_usize(tree.node_count())];
        for (at, file) in (0..self.originals).zip(&mut self.files).rev() {
            let parent = tree.node(NodeId::from_raw(file.node)).parent().index();
            file.next = nearest[parent];
            nearest[parent] = at;
        }
        for file in self.files.iter_mut().filter(|file| file.next == NONE) {
            file.next = nearest[tree.node(NodeId::from_raw(file.node)).parent().index()];
        }
    }

    /// Plans a sparse file's extents.
    fn plan_extents(&mut self, node: NodeId, segments: &[Segment]) -> Result<(), ImageError> {
        let first_extent = narrow(self.extents.len())?;
        let mut stored = 0;
        let mut run = 0..0;
        let block = |bytes: u64| u32::try_from(bytes).map_err(|_| ImageError::TooBig { blocks: bytes });
        let mut close = |run: std::ops::Range<u32>| {
            let mut logical = run.start;
            while logical < run.end {
                let len = (run.end - logical).min(EXTENT_BLOCKS_MAX);
                self.extents.push(Extent { logical, stored, len });
                logical += len;
                stored += len;
            }
        };
        for segment in segments {
            let start = block(segment.file_offset / BLOCK_SIZE)?;
            let end = block((segment.file_offset + segment.len).div_ceil(BLOCK_SIZE))?;
            if start > run.end {
                close(run);
                run = start..end;
            } else {
                run.end = run.end.max(end);
            }
        }
        close(run);
        let end_extent = narrow(self.extents.len())?;
        self.sparse.push(Sparse {
            node: node.raw(),
            first_extent,
            end_extent,
        });
        Ok(())
    }

    /// A sparse file's extents.
    pub(super) fn extents(&self, node: NodeId) -> &[Extent] {
        let Ok(at) = self.sparse.binary_search_by_key(&node.raw(), |sparse| sparse.node) else {
            return &[];
        };
        let sparse = self.sparse[at];
        &self.extents[to_usize(sparse.first_extent)..to_usize(sparse.end_extent)]
    }

    /// How many data blocks there are.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Appends the pieces of the data blocks from `block` to `end`.
    pub(super) fn pieces(&self, tree: &Tree, block: u32, end: u32, out: &mut Vec<Piece>) {
        let mut block = block;
        let mut at = self.files.partition_point(|file| file.first <= block);
        while block < end {
            let file = self.files[at - 1];
            let file_end = self.files.get(at).map_or(self.blocks, |next| next.first).min(end);
            self.file_pieces(
                tree,
                NodeId::from_raw(file.node),
                block - file.first,
                file_end - file.first,
                out,
            );
            block = file_end;
            at += 1;
        }
    }

    /// The pieces of a file's stored blocks from `block` to `end`.
    fn file_pieces(&self, tree: &Tree, node: NodeId, block: u32, end: u32, out: &mut Vec<Piece>) {
        let attributes = tree.node(node);
        let layer = attributes.layer();
        let bytes = |block: u32| u64::from(block) * BLOCK_SIZE;
        match tree.content(node) {
            Content::Whole(start) => {
                let data_end = attributes.size().min(bytes(end));
                push(
                    out,
                    data_end - bytes(block),
                    Origin::Layer(layer, start.plus(bytes(block))),
                );
                push(out, bytes(end) - data_end, Origin::Zero);
            }
            Content::Scattered(segments) => {
                let extents = self.extents(node);
                let mut block = block;
                let mut at = extents.partition_point(|extent| extent.stored + extent.len <= block);
                while block < end {
                    let extent = extents[at];
                    let extent_end = (extent.stored + extent.len).min(end);
                    let from = bytes(extent.logical) + bytes(block - extent.stored);
                    segment_pieces(segments, layer, from, from + bytes(extent_end - block), out);
                    block = extent_end;
                    at += 1;
                }
            }
        }
    }

    /// The file with stored bytes that has the byte at `at`.
    pub(super) fn file_at(&self, tree: &Tree, layer: LayerId, at: TarOffset) -> Option<StoredFile> {
        let originals = &self.files[..to_usize(self.originals)];
        let behind =
            originals.partition_point(|file| stored_at(tree, NodeId::from_raw(file.node)) <= Some((layer, at)));
        let file = self.stored_file(tree, behind.checked_sub(1)?);
        (file.layer == layer && file.range.contains(at)).then_some(file)
    }

    /// The file that is `node`, if it stores bytes.
    pub(super) fn file_of(&self, tree: &Tree, node: NodeId) -> Option<StoredFile> {
        if tree.node(node).kind() != NodeKind::File {
            return None;
        }
        let (layer, start) = stored_at(tree, node)?;
        self.file_at(tree, layer, start)
    }

    /// The node that holds a file.
    pub(super) fn node_of(&self, file: FileId) -> Option<NodeId> {
        self.files.get(to_usize(file.0)).map(|file| NodeId::from_raw(file.node))
    }

    /// Visits the other files of the same directory, in the tar's order from `file` on.
    pub(super) fn neighbours(&self, tree: &Tree, file: FileId, visit: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {
        let next = |file: u32| {
            self.files[..to_usize(self.originals)]
                .get(to_usize(file))
                .map_or(NONE, |file| file.next)
        };
        let mut at = next(file.0);
        while at != NONE && at != file.0 {
            if visit(self.stored_file(tree, to_usize(at))).is_break() {
                return;
            }
            at = next(at);
        }
    }

    fn stored_file(&self, tree: &Tree, at: usize) -> StoredFile {
        let node = NodeId::from_raw(self.files[at].node);
        let (start, end) = match tree.content(node) {
            Content::Whole(start) => (start, start.plus(tree.node(node).size())),
            Content::Scattered(segments) => {
                let start = segments.first().map_or(TarOffset(0), |first| first.tar_offset);
                (
                    start,
                    segments.last().map_or(start, |last| last.tar_offset.plus(last.len)),
                )
            }
        };
        let file = FileId(u32::try_from(at).expect("counted in 32 bits"));
        StoredFile {
            file,
            directory: DirectoryId(tree.node(node).parent().raw()),
            layer: tree.node(node).layer(),
            range: TarRange::new(start, end.since(start)),
        }
    }
}

/// The pieces of a sparse file's bytes from `from` to `to`.
fn segment_pieces(segments: &[Segment], layer: LayerId, from: u64, to: u64, out: &mut Vec<Piece>) {
    let mut at = from;
    let first = segments.partition_point(|segment| segment.file_offset + segment.len <= from);
    for segment in &segments[first..] {
        if segment.file_offset >= to {
            break;
        }
        if segment.file_offset > at {
            push(out, segment.file_offset - at, Origin::Zero);
            at = segment.file_offset;
        }
        let end = (segment.file_offset + segment.len).min(to);
        push(
            out,
            end - at,
            Origin::Layer(layer, segment.tar_offset.plus(at - segment.file_offset)),
        );
        at = end;
    }
    push(out, to - at, Origin::Zero);
}

fn push(out: &mut Vec<Piece>, len: u64, origin: Origin) {
    if len > 0 {
        out.push(Piece { len, origin });
    }
}

fn narrow(number: impl TryInto<u32>) -> Result<u32, ImageError> {
    number.try_into().map_err(|_| ImageError::TooBig { blocks: u64::MAX })
}
