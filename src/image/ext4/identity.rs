//! The image's UUID: a digest of all that decides its bits, so that equal images have equal UUIDs and others do not.

use sha2::{Digest as _, Sha256};

use super::Ext4Options;
use super::number::Numbers;
use crate::tree::{Content, NodeKind, Tree, XattrSetId};

/// Changes whenever the same tree becomes another image.
const FORMAT: &[u8] = b"tarblk ext4 1\n";

/// Digests small fields in big bites.
struct Sink {
    digest: Sha256,
    pending: Vec<u8>,
}

impl Sink {
    const BITE: usize = 16 << 10;

    fn put(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= Self::BITE {
            self.digest.update(&self.pending);
            self.pending.clear();
        }
    }

    fn put_len(&mut self, len: usize) {
        self.put(&u64::try_from(len).unwrap_or(u64::MAX).to_le_bytes());
    }

    fn finish(mut self) -> [u8; 16] {
        self.digest.update(&self.pending);
        let digest = self.digest.finalize();
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        uuid
    }
}

/// The UUID of the image of `tree`.
pub(super) fn uuid(tree: &Tree, numbers: &Numbers, options: &Ext4Options) -> [u8; 16] {
    let mut sink = Sink {
        digest: Sha256::new(),
        pending: Vec::with_capacity(2 * Sink::BITE),
    };
    sink.put(FORMAT);
    sink.put(&options.label);
    sink.put(&tree.name_count().to_le_bytes());
    for position in 0..tree.name_count() {
        let child = tree.name_at(position);
        sink.put(&numbers.ordinal(child.node).to_le_bytes());
        sink.put(&u8::try_from(child.name.len()).unwrap_or(u8::MAX).to_le_bytes());
        sink.put(child.name);
    }
    for set in 0..tree.xattr_set_count() {
        for (name, value) in tree.xattrs(XattrSetId::from_number(set)) {
            sink.put_len(name.len());
            sink.put(name);
            sink.put_len(value.len());
            sink.put(value);
        }
        sink.put(&u64::MAX.to_le_bytes());
    }
    for id in (0..numbers.len()).map(|ordinal| numbers.node(ordinal)) {
        let node = tree.node(id);
        let mut record = [0; 32];
        record[0..2].copy_from_slice(&node.mode().to_le_bytes());
        record[4..8].copy_from_slice(&node.uid().to_le_bytes());
        record[8..12].copy_from_slice(&node.gid().to_le_bytes());
        record[12..20].copy_from_slice(&node.mtime().secs.to_le_bytes());
        record[20..24].copy_from_slice(&node.mtime().nanos.to_le_bytes());
        record[24..28].copy_from_slice(&node.xattr_set().number().to_le_bytes());
        record[28..32].copy_from_slice(&node.layer().0.to_le_bytes());
        sink.put(&record);
        match node.kind() {
            NodeKind::File => {
                sink.put(&node.size().to_le_bytes());
                match tree.content(id) {
                    Content::Whole(start) => sink.put(&start.0.to_le_bytes()),
                    Content::Scattered(segments) => {
                        sink.put(&u64::MAX.to_le_bytes());
                        sink.put_len(segments.len());
                        for segment in segments {
                            sink.put(&segment.file_offset.to_le_bytes());
                            sink.put(&segment.tar_offset.0.to_le_bytes());
                            sink.put(&segment.len.to_le_bytes());
                        }
                    }
                }
            }
            NodeKind::Symlink => {
                sink.put_len(tree.link_text(id).len());
                sink.put(tree.link_text(id));
            }
            NodeKind::CharDevice | NodeKind::BlockDevice => {
                let (major, minor) = node.device();
                sink.put(&major.to_le_bytes());
                sink.put(&minor.to_le_bytes());
            }
            NodeKind::Directory => sink.put_len(tree.children(id).len()),
            NodeKind::Fifo => {}
        }
    }
    sink.finish()
}
