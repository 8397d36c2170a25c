//! What entries say of what is there: a directory's attributes, and extended ones.

use std::borrow::Cow;

use super::check::{last_of_each, nanos, owner, too_much};
use super::{TreeBuilder, TreeMode};
use crate::index::{Entry, Xattr};
use crate::tree::{TreeError, XattrSetId, type_bits};
use crate::units::to_usize;

impl TreeBuilder {
    /// Gives a directory that is there the attributes of a further entry. Extended attributes add to those that the same
    /// layer gave it and replace those of lower layers.
    pub(super) fn merge_directory(&mut self, node: u32, entry: &Entry) -> Result<(), TreeError> {
        let same_layer = self.nodes[to_usize(node)].layer == self.layer;
        let xattrs = if same_layer {
            let old = self.nodes[to_usize(node)].xattrs;
            let own = self.own_xattrs(entry);
            self.add_xattrs(old, &own).ok_or_else(|| too_much(entry))?
        } else {
            self.intern(entry)?
        };
        let (uid, gid) = owner(entry)?;
        if self.mode != TreeMode::Plain {
            self.touch(node);
        }
        let layer = self.layer;
        let node = &mut self.nodes[to_usize(node)];
        node.mode = type_bits::DIRECTORY | (entry.mode & 0o7777);
        node.uid = uid;
        node.gid = gid;
        node.mtime_secs = entry.mtime.secs;
        node.mtime_nanos = nanos(entry.mtime);
        node.xattrs = xattrs;
        node.layer = layer;
        Ok(())
    }

    /// A set with further attributes; one with the name of an old one replaces it.
    pub(super) fn add_xattrs(&mut self, old: XattrSetId, further: &[Xattr]) -> Option<XattrSetId> {
        if further.is_empty() {
            return Some(old);
        }
        let mut all = Vec::new();
        all.extend(self.xattrs.get(old).map(|(name, value)| Xattr {
            name: name.to_vec(),
            value: value.to_vec(),
        }));
        all.extend_from_slice(further);
        self.xattrs.intern(&last_of_each(all))
    }

    pub(super) fn intern(&mut self, entry: &Entry) -> Result<XattrSetId, TreeError> {
        if entry.xattrs.is_empty() {
            return Ok(XattrSetId::EMPTY);
        }
        let own = self.own_xattrs(entry);
        let set = if own.is_sorted_by(|a, b| a.name < b.name) {
            self.xattrs.intern(&own)
        } else {
            self.xattrs.intern(&last_of_each(own.into_owned()))
        };
        set.ok_or_else(|| too_much(entry))
    }

    /// The attributes that an entry may give.
    fn own_xattrs<'e>(&self, entry: &'e Entry) -> Cow<'e, [Xattr]> {
        let orders = |xattr: &Xattr| xattr.name.starts_with(b"trusted.");
        if self.mode == TreeMode::Plain || !entry.xattrs.iter().any(orders) {
            return Cow::Borrowed(&entry.xattrs);
        }
        let own = entry.xattrs.iter().filter(|xattr| !orders(xattr));
        Cow::Owned(own.cloned().collect())
    }
}
