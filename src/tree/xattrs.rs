//! Sets of extended attributes, equal sets kept once: in a labelled layer a handful of sets covers every file.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use crate::index::Xattr;
use crate::units::to_usize;

/// A set of extended attributes of a [`Tree`](super::Tree).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XattrSetId(u32);

impl XattrSetId {
    /// The set without attributes, which most nodes have.
    pub const EMPTY: Self = Self(0);

    /// The set's number, below [`Tree::xattr_set_count`](super::Tree::xattr_set_count).
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    pub(crate) const fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// The most bytes that all sets take together. Directories that come again and again, with one attribute more each time,
/// would otherwise make much memory of few bytes.
const BYTES_MAX: u32 = 1 << 30;

/// All sets. Each is encoded as, per attribute: name length (1 byte), value length (4 bytes, native order), name, value.
pub(super) struct XattrTable {
    bytes: Vec<u8>,
    /// Where each set starts; one more at the end.
    starts: Vec<u32>,
    known: HashTable<u32>,
    hasher: RandomState,
}

impl XattrTable {
    pub(super) fn new() -> Self {
        let mut table = Self {
            bytes: Vec::new(),
            starts: vec![0],
            known: HashTable::new(),
            hasher: RandomState::new(),
        };
        table.intern(&[]);
        table
    }

    /// The set of these attributes, which must be sorted by name, with names of at most 255 bytes. `None` when there is
    /// no more room.
    pub(super) fn intern(&mut self, xattrs: &[Xattr]) -> Option<XattrSetId> {
        let start = self.bytes.len();
        for xattr in xattrs {
            self.bytes.push(u8::try_from(xattr.name.len()).ok()?);
            self.bytes
                .extend_from_slice(&u32::try_from(xattr.value.len()).ok()?.to_ne_bytes());
            self.bytes.extend_from_slice(&xattr.name);
            self.bytes.extend_from_slice(&xattr.value);
        }
        let Some(end) = u32::try_from(self.bytes.len()).ok().filter(|&end| end <= BYTES_MAX) else {
            self.bytes.truncate(start);
            return None;
        };
        let Self {
            bytes,
            starts,
            known,
            hasher,
        } = self;
        let encoded = |set: u32| &bytes[to_usize(starts[to_usize(set)])..to_usize(starts[to_usize(set) + 1])];
        let hash = hasher.hash_one(&bytes[start..]);
        if let Some(&set) = known.find(hash, |&set| encoded(set) == &bytes[start..]) {
            bytes.truncate(start);
            return Some(XattrSetId(set));
        }
        let set = u32::try_from(starts.len() - 1).ok()?;
        known.insert_unique(hash, set, |&set| hasher.hash_one(encoded(set)));
        starts.push(end);
        Some(XattrSetId(set))
    }

    pub(super) fn get(&self, set: XattrSetId) -> Xattrs<'_> {
        let set = to_usize(set.0);
        Xattrs {
            encoded: &self.bytes[to_usize(self.starts[set])..to_usize(self.starts[set + 1])],
        }
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.starts.len() - 1).unwrap_or(u32::MAX)
    }

    /// Gives back what only [`Self::intern`] needs.
    pub(super) fn finish(&mut self) {
        self.known = HashTable::new();
        self.bytes.shrink_to_fit();
        self.starts.shrink_to_fit();
    }
}

/// The attributes of one set in the order of their names, as name and value.
#[derive(Clone, Debug)]
pub struct Xattrs<'a> {
    encoded: &'a [u8],
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&name_len, rest) = self.encoded.split_first()?;
        let (value_len, rest) = rest.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(usize::from(name_len))?;
        let (value, rest) = rest.split_at_checked(to_usize(u32::from_ne_bytes(*value_len)))?;
        self.encoded = rest;
        Some((name, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_are_one() {
        let set = |pairs: &[(&str, &str)]| -> Vec<Xattr> {
            pairs
                .iter()
                .map(|(name, value)| Xattr {
                    name: name.as_bytes().into(),
                    value: value.as_bytes().into(),
                })
                .collect()
        };
        let mut table = XattrTable::new();
        let one = table.intern(&set(&[("user.a", "1"), ("user.b", "")])).unwrap();
        let two = table.intern(&set(&[("user.a", "2")])).unwrap();
        assert_eq!(table.intern(&set(&[("user.a", "1"), ("user.b", "")])), Some(one));
        assert_eq!(table.intern(&[]), Some(XattrSetId::EMPTY));
        assert_ne!(one, two);
        assert_eq!(table.len(), 3);
        let read: Vec<_> = table.get(one).collect();
        assert_eq!(read, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"")]);
        assert_eq!(table.get(XattrSetId::EMPTY).count(), 0);
    }
}
