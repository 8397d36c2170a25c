//! Access control lists and capabilities as extended attributes, as far as a mode and they depend on each other. In: a value as
//! `setxattr(2)` takes it. Out: whether the kernel takes it, and what `chmod(2)` makes of it.
//!
//! The rules are Linux's `posix_acl_valid`, `posix_acl_chmod` and `posix_acl_equiv_mode` in `fs/posix_acl.c`,
//! and `cap_convert_nscap` in `security/commoncap.c`.

/// The list that says who may do what.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The list that a directory gives to what is made in it.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";
/// What a program may do although its user may not.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// The version of the form that the system call takes.
const VERSION: u32 = 2;
/// An entry: tag and permissions in 16 bits each, the id in 32.
const ENTRY: usize = 8;

const OWNER: u16 = 0x01;
const NAMED_USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    /// Read, write and execute in the low three bits.
    permissions: u16,
    id: u32,
}

/// A list that the kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Acl(Vec<Entry>);

impl Acl {
    /// Reads a list; `None` for what the kernel refuses. One without entries takes a list away.
    pub(super) fn parse(value: &[u8]) -> Option<Self> {
        if value.is_empty() {
            return Some(Self(Vec::new()));
        }
        let (version, entries) = value.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*version) != VERSION || !entries.len().is_multiple_of(ENTRY) {
            return None;
        }
        let entries = entries.chunks_exact(ENTRY).map(|entry| Entry {
            tag: u16::from_le_bytes([entry[0], entry[1]]),
            permissions: u16::from_le_bytes([entry[2], entry[3]]),
            id: u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]),
        });
        let list = Self(entries.collect());
        list.is_valid().then_some(list)
    }

    /// Whether its entries are in order, complete, and of ids that there are.
    fn is_valid(&self) -> bool {
        if self.0.is_empty() {
            return true;
        }
        // The tag that must come next, unless what may stand before it does.
        let mut due = OWNER;
        let mut named = false;
        for entry in &self.0 {
            if entry.permissions > 7 {
                return false;
            }
            due = match (entry.tag, due) {
                (OWNER, OWNER) => NAMED_USER,
                (NAMED_USER, NAMED_USER) | (NAMED_GROUP, NAMED_GROUP) if entry.id != u32::MAX => {
                    named = true;
                    due
                }
                (GROUP, NAMED_USER) => NAMED_GROUP,
                (MASK, NAMED_GROUP) => OTHER,
                (OTHER, OTHER) => 0,
                (OTHER, NAMED_GROUP) if !named => 0,
                _ => return false,
            };
        }
        due == 0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it says no more than a mode does: the kernel keeps no such list of access.
    pub(super) fn is_a_mode(&self) -> bool {
        self.0.iter().all(|entry| matches!(entry.tag, OWNER | GROUP | OTHER))
    }

    /// The shift of an entry's permissions in the mode, if they stand there: the group's are the mask's where there is one.
    fn shift(&self, tag: u16) -> Option<u32> {
        let has_mask = self.0.iter().any(|entry| entry.tag == MASK);
        match tag {
            OWNER => Some(6),
            GROUP if !has_mask => Some(3),
            MASK => Some(3),
            OTHER => Some(0),
            _ => None,
        }
    }

    /// The low nine bits of the mode that the kernel shows with this list.
    pub(super) fn mode(&self) -> u16 {
        let shown = self
            .0
            .iter()
            .filter_map(|entry| Some(entry.permissions << self.shift(entry.tag)?));
        shown.fold(0, |mode, bits| mode | bits)
    }

    /// What `chmod` to `mode` makes of it.
    pub(super) fn with_mode(mut self, mode: u16) -> Self {
        let shifts: Vec<_> = self.0.iter().map(|entry| self.shift(entry.tag)).collect();
        for (entry, shift) in self.0.iter_mut().zip(shifts) {
            if let Some(shift) = shift {
                entry.permissions = mode >> shift & 7;
            }
        }
        self
    }

    /// The value of the attribute.
    pub(super) fn value(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            value.extend_from_slice(&entry.tag.to_le_bytes());
            value.extend_from_slice(&entry.permissions.to_le_bytes());
            value.extend_from_slice(&entry.id.to_le_bytes());
        }
        value
    }
}

/// Whether the kernel takes a value as a file's capabilities: the two revisions that it still knows, at their lengths.
pub(super) fn is_capability(value: &[u8]) -> bool {
    const EFFECTIVE: u32 = 1;
    let Some((magic, rest)) = value.split_first_chunk::<4>() else {
        return false;
    };
    match (u32::from_le_bytes(*magic) & !EFFECTIVE, rest.len()) {
        (0x0200_0000, 16) => true,
        // With the user whose root it is for, who must be one.
        (0x0300_0000, 20) => rest[16..] != [0xff; 4],
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: u32 = u32::MAX;

    fn value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entries = entries.iter();
        Acl(entries
            .map(|&(tag, permissions, id)| Entry { tag, permissions, id })
            .collect())
        .value()
    }

    #[test]
    fn only_what_the_kernel_takes_is_a_list() {
        let owner = (OWNER, 6, NOBODY);
        let (group, mask, other) = ((GROUP, 4, NOBODY), (MASK, 7, NOBODY), (OTHER, 4, NOBODY));
        for good in [
            &[][..],
            &[owner, group, other],
            &[owner, group, mask, other],
            &[
                owner,
                (NAMED_USER, 7, 9),
                (NAMED_USER, 7, 5),
                group,
                (NAMED_GROUP, 1, 0),
                mask,
                other,
            ],
        ] {
            assert!(Acl::parse(&value(good)).is_some(), "{good:?}");
        }
        for bad in [
            &[owner][..],
            &[owner, group],
            &[group, owner, other],
            &[other, owner, group],
            &[owner, owner, group, other],
            &[owner, (NAMED_USER, 7, 5), group, other],
            &[owner, (NAMED_USER, 7, NOBODY), group, mask, other],
            &[owner, group, (NAMED_USER, 7, 5), mask, other],
            &[owner, group, other, other],
            &[(OWNER, 8, NOBODY), group, other],
            &[owner, group, (9, 0, 0), other],
        ] {
            assert_eq!(Acl::parse(&value(bad)), None, "{bad:?}");
        }
        assert!(Acl::parse(b"").is_some_and(|list| list.is_empty()));
        for bad in [&b"bad"[..], &[3, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(Acl::parse(bad), None);
        }
    }

    #[test]
    fn the_modes_group_bits_are_the_masks_where_there_is_one() {
        let parse = |entries: &[_]| Acl::parse(&value(entries)).unwrap();
        let own = (OWNER, 6, NOBODY);
        let named = parse(&[
            own,
            (NAMED_USER, 7, 5),
            (GROUP, 4, NOBODY),
            (MASK, 7, NOBODY),
            (OTHER, 4, NOBODY),
        ]);
        assert_eq!(named.mode(), 0o674);
        let changed = [
            (OWNER, 7, NOBODY),
            (NAMED_USER, 7, 5),
            (GROUP, 4, NOBODY),
            (MASK, 5, NOBODY),
            (OTHER, 1, NOBODY),
        ];
        assert_eq!(named.with_mode(0o4751), parse(&changed));
        let plain = parse(&[own, (GROUP, 4, NOBODY), (OTHER, 4, NOBODY)]);
        assert!(plain.is_a_mode());
        assert_eq!((plain.mode(), plain.with_mode(0o725).mode()), (0o644, 0o725));
    }

    #[test]
    fn capabilities_have_two_forms() {
        let cap = |magic: u32, len: usize| {
            let mut value = magic.to_le_bytes().to_vec();
            value.resize(len, 0);
            is_capability(&value)
        };
        assert!(cap(0x0200_0000, 20) && cap(0x0200_0001, 20) && cap(0x0300_0001, 24));
        assert!(!cap(0x0100_0000, 12) && !cap(0x0200_0000, 24) && !cap(0x0300_0000, 20) && !cap(0x0200_0003, 20));
        assert!(!is_capability(b"bad") && !is_capability(b""));
    }
}
