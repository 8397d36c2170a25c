//! A tree as text, or as entries again. In: a tree. Out: lines, one a name, sorted by path part by part.
//!
//! The lines are those of [`index::listing`](crate::index::listing): of several names of one file all but the first are
//! hard links to it, and in JSON a layer stands where an index has headers.

use std::io::{self, Write};

use super::{Content, NodeId, NodeKind, Tree};
use crate::index::listing::text::Vis;
use crate::index::listing::{Format, Line, Selection, json, mtree, plain};
use crate::index::{Entry, Kind, Segment, Xattr};

impl Tree {
    /// Visits every name, the root (an empty path) first, directories before what they hold, until an error.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn walk<E>(&self, mut visit: impl FnMut(&[u8], NodeId) -> Result<(), E>) -> Result<(), E> {
        let mut path = Vec::new();
        visit(&path, NodeId::ROOT)?;
        let mut pending = vec![(self.child_positions(NodeId::ROOT), 0)];
        while let Some((positions, directory_len)) = pending.last_mut() {
            let Some(position) = positions.next() else {
                pending.pop();
                continue;
            };
            let child = self.name_at(position);
            path.truncate(*directory_len);
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(child.name);
            visit(&path, child.node)?;
            if self.node(child.node).is_directory() {
                pending.push((self.child_positions(child.node), path.len()));
            }
        }
        Ok(())
    }

    /// Fills `entry` with what an entry for this node would say. Its path is left as it is and its headers are nowhere.
    pub(crate) fn describe(&self, id: NodeId, entry: &mut Entry) {
        let node = self.node(id);
        entry.kind = match node.kind() {
            NodeKind::File => Kind::File,
            NodeKind::Directory => Kind::Directory,
            NodeKind::Symlink => Kind::Symlink,
            NodeKind::CharDevice => Kind::CharDevice,
            NodeKind::BlockDevice => Kind::BlockDevice,
            NodeKind::Fifo => Kind::Fifo,
        };
        entry.mode = node.mode() & 0o7777;
        (entry.uid, entry.gid) = (node.uid().into(), node.gid().into());
        entry.mtime = node.mtime();
        entry.size = node.size();
        entry.link.clear();
        entry.link.extend_from_slice(self.link_text(id));
        (entry.device_major, entry.device_minor) = node.device();
        entry.xattrs.clear();
        entry
            .xattrs
            .extend(self.xattrs(node.xattr_set()).map(|(name, value)| Xattr {
                name: name.to_vec(),
                value: value.to_vec(),
            }));
        entry.segments.clear();
        match self.content(id) {
            Content::Whole(tar_offset) => entry.segments.push(Segment {
                file_offset: 0,
                tar_offset,
                len: node.size(),
            }),
            Content::Scattered(segments) => entry.segments.extend_from_slice(segments),
        }
    }
}

/// Writes the names of a tree that are wanted.
///
/// # Errors
/// The output's.
pub fn write_tree(tree: &Tree, selection: &Selection, format: Format, out: &mut dyn Write) -> io::Result<()> {
    // By node: the path that was written first, of files that have others.
    let mut first_paths = std::collections::HashMap::new();
    let mut entry = Entry::default();
    let mut line = String::new();
    if format == Format::Mtree {
        writeln!(out, "#mtree")?;
    }
    tree.walk(|path, id| {
        if !selection.takes(path) {
            return Ok(());
        }
        let node = tree.node(id);
        entry.path.clear();
        entry.path.extend_from_slice(path);
        tree.describe(id, &mut entry);
        if format == Format::Mtree {
            line.clear();
            mtree::attributes(&entry, &mut line);
            let name = if path.is_empty() { "." } else { "./" };
            return writeln!(out, "{name}{}{line}", Vis(path));
        }
        if path.is_empty() {
            entry.path.push(b'.');
        }
        if node.is_directory() {
            entry.path.push(b'/');
        } else if node.links() > 1 {
            if let Some(first) = first_paths.get(&id) {
                entry.kind = Kind::Hardlink;
                entry.link.clone_from(first);
                entry.size = 0;
                entry.segments.clear();
            } else {
                first_paths.insert(id, path.to_vec());
            }
        }
        match format {
            Format::Plain => plain(&entry, out),
            _ => json(&Line::in_layer(&entry, node.layer().0), out),
        }
    })?;
    out.flush()
}
