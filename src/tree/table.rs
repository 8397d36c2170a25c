//! All names of a tree while it is built: in which directory, and what they name at the moment.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use super::names;
use crate::units::to_usize;

/// No node, no name.
pub(super) const NONE: u32 = u32::MAX;

/// A name while building. Names stay when what they name is gone (their `node` is then [`NONE`]): whatever replaces it will
/// need the name again.
#[derive(Clone, Copy)]
pub(super) struct Name {
    pub(super) parent: u32,
    pub(super) text: u32,
    pub(super) node: u32,
    /// The next name of the same directory.
    pub(super) next: u32,
    /// Its [`hash`], so that the table grows without reading a million texts again.
    hash: u32,
}

/// Names by number, and found by their directory and text.
pub(super) struct NameTable {
    names: Vec<Name>,
    /// Numbers of names, by their `spread` hash.
    by_name: HashTable<u32>,
    hasher: RandomState,
    /// Where texts lie: a name behind a byte of its length, a link's text as it is.
    text: Vec<u8>,
}

impl NameTable {
    pub(super) fn new() -> Self {
        Self {
            names: Vec::new(),
            by_name: HashTable::new(),
            hasher: RandomState::new(),
            text: Vec::new(),
        }
    }

    pub(super) fn reserve(&mut self, names: usize) {
        self.names.reserve(names);
        let Self {
            by_name, names: known, ..
        } = self;
        by_name.reserve(names, |&at| spread(known[to_usize(at)].hash));
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    /// The name of this number.
    pub(super) fn get(&self, at: u32) -> Name {
        self.names[to_usize(at)]
    }

    /// Lets a name mean another node.
    pub(super) fn set_node(&mut self, at: u32, node: u32) {
        self.names[to_usize(at)].node = node;
    }

    /// The text arena.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// The number of a directory's name, whether it means anything now or not.
    pub(super) fn find(&self, parent: u32, name: &[u8]) -> Option<u32> {
        let hash = hash(&self.hasher, parent, name);
        let found = self.by_name.find(spread(hash), |&at| {
            let known = self.names[to_usize(at)];
            known.hash == hash && known.parent == parent && names::name(&self.text, known.text) == name
        });
        found.copied()
    }

    /// Adds a name that is not there yet; returns its number, or `None` when there is no more room.
    pub(super) fn add(&mut self, parent: u32, name: &[u8], node: u32, next: u32) -> Option<u32> {
        let at = u32::try_from(self.names.len()).ok().filter(|&at| at != NONE)?;
        let text = u32::try_from(self.text.len()).ok()?;
        self.text.push(u8::try_from(name.len()).ok()?);
        self.add_text(name)?;
        let hash = hash(&self.hasher, parent, name);
        self.names.push(Name {
            parent,
            text,
            node,
            next,
            hash,
        });
        let Self { by_name, names, .. } = self;
        by_name.insert_unique(spread(hash), at, |&at| spread(names[to_usize(at)].hash));
        Some(at)
    }

    /// Appends to the text arena: start and length.
    pub(super) fn add_text(&mut self, bytes: &[u8]) -> Option<(u32, u32)> {
        let start = u32::try_from(self.text.len()).ok()?;
        let len = u32::try_from(bytes.len()).ok()?;
        start.checked_add(len)?;
        self.text.extend_from_slice(bytes);
        Some((start, len))
    }

    /// Gives back what only finding and adding need.
    pub(super) fn stop_finding(&mut self) {
        self.by_name = HashTable::new();
    }

    /// The text arena alone: names are no more.
    pub(super) fn into_text(mut self) -> Vec<u8> {
        self.text.shrink_to_fit();
        self.text
    }
}

/// Keyed at random: a layer cannot be made to fill one bucket.
fn hash(hasher: &RandomState, parent: u32, name: &[u8]) -> u32 {
    u32::try_from(hasher.hash_one((parent, name)) >> 32).expect("32 bits are left")
}

/// A hash as the table wants it: in all 64 bits.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
