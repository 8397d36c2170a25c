//! What entries say of what is there: owners, modes, times and extended attributes, and what one of them makes of another.
//!
//! In an image they are set as containerd sets them: owner, extended attributes, mode, time, on whatever the entry's name
//! names, so also on the file of a hard link. In a tar by itself, as GNU tar does. docs/rules.md lists what is different.

use super::{TreeBuilder, TreeMode};
use crate::index::{Entry, Kind, Timestamp, Xattr};
use crate::tree::acl::{self, Acl};
use crate::tree::error::show;
use crate::tree::{NodeKind, TreeError, XattrSetId, Xattrs, type_bits};
use crate::units::to_usize;

use super::check::{last_of_each, nanos, too_much};

/// Warnings that name an entry each, of one tree; more of them are counted only.
const WARNINGS_MAX: u64 = 8;

/// Says what of a layer is left out, without filling a log.
#[derive(Default)]
pub(super) struct Warnings(u64);

impl Warnings {
    fn add(&mut self, entry: &Entry, what: &str) {
        self.0 += 1;
        if self.0 <= WARNINGS_MAX {
            log::warn!("{}: {what}", show(&entry.path));
        }
    }

    /// Says how many more there were.
    pub(super) fn finish(&self) {
        if let Some(more @ 1..) = self.0.checked_sub(WARNINGS_MAX) {
            log::warn!("{more} more entries like these");
        }
    }
}

/// What Linux can hold as an owner: everything but -1, which `chown` takes for "as it is".
fn in_linux(id: i64) -> Option<u32> {
    u32::try_from(id).ok().filter(|&id| id != u32::MAX)
}

/// What containerd hands to `lchown` as an owner: the low 32 bits, and of them all ones leave it as it is.
fn as_lchown_takes_it(id: i64) -> Option<u32> {
    let [a, b, c, d, ..] = id.to_le_bytes();
    in_linux(u32::from_le_bytes([a, b, c, d]).into())
}

/// A time as containerd sets it: what lies outside of what Go's `os.Chtimes` takes (1970 to 2262) becomes 1970.
pub(super) fn bounded(time: Timestamp) -> Timestamp {
    let nanos = i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
    if (0..=i128::from(i64::MAX)).contains(&nanos) {
        time
    } else {
        Timestamp::default()
    }
}

fn owned(set: Xattrs<'_>) -> Vec<Xattr> {
    set.map(|(name, value)| Xattr {
        name: name.to_vec(),
        value: value.to_vec(),
    })
    .collect()
}

impl TreeBuilder {
    /// User and group that an entry gives, `None` where what is there stays.
    pub(super) fn owner(&mut self, entry: &Entry) -> (Option<u32>, Option<u32>) {
        if self.mode != TreeMode::Plain {
            return (as_lchown_takes_it(entry.uid), as_lchown_takes_it(entry.gid));
        }
        for (id, what) in [(entry.uid, "owner"), (entry.gid, "group")] {
            if u32::try_from(id).is_err() {
                let said = format!("{what} {id} is out of range and left as it is, as GNU tar leaves it");
                self.warnings.add(entry, &said);
            }
        }
        (in_linux(entry.uid), in_linux(entry.gid))
    }

    /// Gives a directory that is there the attributes of a further entry. Extended attributes add to those that the same
    /// layer gave it and replace those of lower layers.
    pub(super) fn merge_directory(&mut self, node: u32, entry: &Entry) -> Result<(), TreeError> {
        let same_layer = self.nodes[to_usize(node)].layer == self.layer;
        let old = if same_layer {
            owned(self.xattrs.get(self.nodes[to_usize(node)].xattrs))
        } else {
            Vec::new()
        };
        self.set_attributes(node, old, entry)?;
        if self.mode != TreeMode::Plain {
            self.touch(node);
        }
        self.nodes[to_usize(node)].layer = self.layer;
        Ok(())
    }

    /// Gives a file the attributes of a hard link's entry, as containerd does: it changes owner, attributes, mode and time
    /// of whatever the new name names. `chown` takes capabilities away.
    pub(super) fn relink(&mut self, node: u32, entry: &Entry) -> Result<(), TreeError> {
        let mut old = owned(self.xattrs.get(self.nodes[to_usize(node)].xattrs));
        old.retain(|xattr| xattr.name != acl::CAPABILITY);
        self.set_attributes(node, old, entry)
    }

    /// Gives a node that is there an entry's owner, mode, time, and further extended attributes.
    fn set_attributes(&mut self, node: u32, old: Vec<Xattr>, entry: &Entry) -> Result<(), TreeError> {
        let kind = self.nodes[to_usize(node)].kind();
        let own = self.own_xattrs(entry);
        let mode = match kind {
            NodeKind::Symlink => 0o777,
            _ => self.mode_of(entry, &own),
        };
        let xattrs = self.settle(old, own, kind, mode).ok_or_else(|| too_much(entry))?;
        let (uid, gid) = self.owner(entry);
        let node = &mut self.nodes[to_usize(node)];
        node.mode = node.mode & type_bits::MASK | mode;
        node.uid = uid.unwrap_or(node.uid);
        node.gid = gid.unwrap_or(node.gid);
        node.mtime_secs = entry.mtime.secs;
        node.mtime_nanos = nanos(entry.mtime);
        node.xattrs = xattrs;
        Ok(())
    }

    /// Mode and attributes of a new node in the directory `parent`.
    pub(super) fn new_attributes(&mut self, entry: &Entry, parent: u32) -> Result<(u16, XattrSetId), TreeError> {
        let kind = match entry.kind {
            Kind::File | Kind::Hardlink => NodeKind::File,
            Kind::Directory => NodeKind::Directory,
            Kind::Symlink => NodeKind::Symlink,
            Kind::CharDevice => NodeKind::CharDevice,
            Kind::BlockDevice => NodeKind::BlockDevice,
            Kind::Fifo => NodeKind::Fifo,
        };
        let inherited = self.inherited(parent, kind);
        if inherited.is_empty() && entry.xattrs.is_empty() {
            let mode = if kind == NodeKind::Symlink {
                0o777
            } else {
                entry.mode & 0o7777
            };
            return Ok((mode, XattrSetId::EMPTY));
        }
        let own = self.own_xattrs(entry);
        let mode = match kind {
            NodeKind::Symlink => 0o777,
            _ => self.mode_of(entry, &own),
        };
        let xattrs = self.settle(inherited, own, kind, mode);
        Ok((mode, xattrs.ok_or_else(|| too_much(entry))?))
    }

    /// What a new node gets from its directory's default list. GNU tar sets directories' attributes last, so there it is
    /// nothing.
    fn inherited(&self, parent: u32, kind: NodeKind) -> Vec<Xattr> {
        let set = self
            .nodes
            .get(to_usize(parent))
            .map_or(XattrSetId::EMPTY, |parent| parent.xattrs);
        if self.mode == TreeMode::Plain || kind == NodeKind::Symlink || set == XattrSetId::EMPTY {
            return Vec::new();
        }
        let Some((_, list)) = self.xattrs.get(set).find(|(name, _)| *name == acl::DEFAULT) else {
            return Vec::new();
        };
        let given = |name: &[u8]| Xattr {
            name: name.to_vec(),
            value: list.to_vec(),
        };
        let mut all = vec![given(acl::ACCESS)];
        if kind == NodeKind::Directory {
            all.push(given(acl::DEFAULT));
        }
        all
    }

    /// The mode that an entry gives to what is no symlink. GNU tar sets a list of access after the mode, but for regular
    /// files, and so the list's permissions are what stays.
    fn mode_of(&self, entry: &Entry, own: &[Xattr]) -> u16 {
        let mode = entry.mode & 0o7777;
        if self.mode != TreeMode::Plain || entry.kind == Kind::File {
            return mode;
        }
        let list = own.iter().find(|xattr| xattr.name == acl::ACCESS);
        match list.and_then(|list| Acl::parse(&list.value)) {
            Some(list) if !list.is_empty() => mode & 0o7000 | list.mode(),
            _ => mode,
        }
    }

    /// A set of attributes with further ones, where the last of a name counts and lists of access are as `mode` has them.
    fn settle(&mut self, old: Vec<Xattr>, further: Vec<Xattr>, kind: NodeKind, mode: u16) -> Option<XattrSetId> {
        let mut all = old;
        all.extend(further);
        if !all.is_sorted_by(|a, b| a.name < b.name) {
            all = last_of_each(all);
        }
        all.retain_mut(|xattr| {
            if kind == NodeKind::Symlink || xattr.name != acl::ACCESS && xattr.name != acl::DEFAULT {
                return true;
            }
            let Some(list) = Acl::parse(&xattr.value).filter(|list| !list.is_empty()) else {
                return false;
            };
            if xattr.name == acl::ACCESS {
                if list.is_a_mode() {
                    return false;
                }
                xattr.value = list.with_mode(mode).value();
            }
            true
        });
        self.xattrs.intern(&all)
    }

    /// A set with further attributes that have nothing to do with the mode; one with the name of an old one replaces it.
    pub(super) fn add_xattrs(&mut self, old: XattrSetId, further: &[Xattr]) -> Option<XattrSetId> {
        let mut all = owned(self.xattrs.get(old));
        all.extend_from_slice(further);
        self.xattrs.intern(&last_of_each(all))
    }

    /// The attributes that an entry may give: what the kernel would refuse to set is left out, and said.
    fn own_xattrs(&mut self, entry: &Entry) -> Vec<Xattr> {
        let mut own = Vec::with_capacity(entry.xattrs.len());
        for xattr in &entry.xattrs {
            let refused = match &xattr.name[..] {
                // For overlayfs they would be orders.
                name if self.mode != TreeMode::Plain && name.starts_with(b"trusted.") => continue,
                acl::ACCESS | acl::DEFAULT if Acl::parse(&xattr.value).is_none() => "access control list",
                acl::CAPABILITY if !acl::is_capability(&xattr.value) => "set of capabilities",
                _ => {
                    own.push(xattr.clone());
                    continue;
                }
            };
            let name = String::from_utf8_lossy(&xattr.name);
            let what = format!(
                "{name} is left out: its {} bytes are no {refused} that Linux takes",
                xattr.value.len()
            );
            self.warnings.add(entry, &what);
        }
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_what_lchown_makes_of_them() {
        for (id, given) in [
            (0, Some(0)),
            (-1, None),
            (-2, Some(4_294_967_294)),
            (0xffff_ffff, None),
            (1 << 32, Some(0)),
            ((1 << 32) + 5, Some(5)),
            (i64::MIN, Some(0)),
        ] {
            assert_eq!(as_lchown_takes_it(id), given, "{id}");
        }
        assert_eq!((in_linux(-2), in_linux(1 << 32), in_linux(7)), (None, None, Some(7)));
    }

    #[test]
    fn times_beyond_gos_are_1970() {
        let time = |secs, nanos| Timestamp { secs, nanos };
        for kept in [time(0, 0), time(9_223_372_036, 854_775_807), time(4_102_444_800, 1)] {
            assert_eq!(bounded(kept), kept);
        }
        for lost in [
            time(-1, 999_999_999),
            time(9_223_372_036, 854_775_808),
            time(i64::MAX, 0),
            time(i64::MIN, 0),
        ] {
            assert_eq!(bounded(lost), Timestamp::default());
        }
    }
}
