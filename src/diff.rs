//! What differs between two trees, and how many bytes a machine that has the one would fetch for the other. In: two trees
//! with what is known of their layers, all from indexes. Out: a stream of differences, sorted by path part by part.
//!
//! No content is read. Two files of the same length are the same when they are the same bytes of the same layer, or when
//! their digests are known and equal; when neither is known, that is what is said. Nothing is kept of what was told: only
//! names of files with several of them, and digests of payloads, are remembered.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;

use crate::tree::{Content, NodeId, NodeKind, Tree};
use crate::units::{LayerId, TarOffset, TarRange};

mod known;

pub use known::LayerKnowledge;

/// Digests of files' stored bytes, from an index that has them.
pub trait PayloadDigests {
    /// The SHA-256 of the payload that lies in exactly this range of the tar.
    fn payload_digest(&self, range: TarRange) -> Option<[u8; 32]>;
}

/// What is known of a layer of a tree.
#[derive(Clone, Copy, Default)]
pub struct LayerFacts<'a> {
    /// What its bytes are known by (its diffID, the digest of its blob): layers that share one are the same bytes. Empty
    /// when nothing identifies it.
    pub identities: &'a [String],
    /// Digests of its files' payloads.
    pub payloads: Option<&'a dyn PayloadDigests>,
}

impl fmt::Debug for LayerFacts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerFacts")
            .field("identities", &self.identities)
            .field("payloads", &self.payloads.is_some())
            .finish()
    }
}

/// One of the two trees.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The tree.
    pub tree: &'a Tree,
    /// Its layers, by [`LayerId`]; of those that are missing nothing is known.
    pub layers: &'a [LayerFacts<'a>],
}

/// In what two things under one path differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aspect {
    /// One is a file, say, and the other a link. Nothing else is compared then but mode, owner and time.
    Type,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// When the content last changed.
    Time,
    /// A file's length.
    Size,
    /// A file's bytes, its length being the same.
    Content,
    /// A file's bytes, perhaps: they come from different places, and nothing known says that they are equal.
    MaybeContent,
    /// A symbolic link's text.
    Link,
    /// Which other names the file has.
    Names,
    /// A device's number.
    Device,
    /// Extended attributes.
    Xattrs,
}

/// A difference under one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference<'a> {
    /// Only the second tree has it.
    Added(NodeId),
    /// Only the first tree has it.
    Removed(NodeId),
    /// Both have something there.
    Changed {
        /// In the first tree.
        before: NodeId,
        /// In the second tree.
        after: NodeId,
        /// In what they differ, at least in one thing.
        aspects: &'a [Aspect],
    },
}

/// The sums of a comparison, in names and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    /// Paths that only the second tree has.
    pub added: u64,
    /// Paths that only the first tree has.
    pub removed: u64,
    /// Paths under which something is known to differ.
    pub changed: u64,
    /// Paths under which nothing is known to differ but content may: [`Aspect::MaybeContent`] alone.
    pub uncertain: u64,
    /// The bytes stored for all files of the second tree.
    pub payload_bytes: u64,
    /// Those of them that a machine which has all of the first tree's layers would fetch: neither in one of these layers,
    /// nor known by their digest to be the payload of a file of the first tree, or of one counted before. Bytes of the
    /// uncompressed tars.
    pub fetch_bytes: u64,
}

/// What is told of every difference, with its path.
pub type Visit<'v, E> = dyn FnMut(&[u8], Difference<'_>) -> Result<(), E> + 'v;

/// Compares two trees, and hands every difference to `visit` with its path (the root's is empty).
///
/// # Errors
/// The first that `visit` returns.
pub fn compare<E>(a: Side<'_>, b: Side<'_>, visit: &mut Visit<'_, E>) -> Result<Totals, E> {
    let mut comparison = Comparison {
        a,
        b,
        first_paths: [HashMap::new(), HashMap::new()],
        totals: Totals::default(),
        visit,
    };
    comparison.run()?;
    let mut totals = comparison.totals;
    count_bytes(a, b, &mut totals);
    Ok(totals)
}

struct Comparison<'a, 'v, 'f, E> {
    a: Side<'a>,
    b: Side<'a>,
    /// Of files with several names: the first path, in the order of paths. Of either tree.
    first_paths: [HashMap<NodeId, Vec<u8>>; 2],
    totals: Totals,
    visit: &'v mut Visit<'f, E>,
}

/// Names of a directory that are still to be compared, of either tree.
struct Pending {
    a: Range<u32>,
    b: Range<u32>,
    /// How much of the path is the directory's.
    directory_len: usize,
}

impl<E> Comparison<'_, '_, '_, E> {
    fn run(&mut self) -> Result<(), E> {
        let mut path = Vec::new();
        let root = Some(NodeId::ROOT);
        self.name(&path, root, root)?;
        let mut pending = vec![self.directory(root, root, 0)];
        while let Some(directory) = pending.last_mut() {
            let child_a = directory.a.clone().next().map(|at| self.a.tree.name_at(at));
            let child_b = directory.b.clone().next().map(|at| self.b.tree.name_at(at));
            let order = match (child_a, child_b) {
                (None, None) => {
                    pending.pop();
                    continue;
                }
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(a), Some(b)) => a.name.cmp(b.name),
            };
            let child_a = child_a.filter(|_| order != Ordering::Greater);
            let child_b = child_b.filter(|_| order != Ordering::Less);
            directory.a.start += u32::from(child_a.is_some());
            directory.b.start += u32::from(child_b.is_some());
            path.truncate(directory.directory_len);
            if !path.is_empty() {
                path.push(b'/');
            }
            let name = child_a.or(child_b).map(|child| child.name);
            path.extend_from_slice(name.unwrap_or_default());
            let (a, b) = (child_a.map(|child| child.node), child_b.map(|child| child.node));
            self.name(&path, a, b)?;
            let below = self.directory(a, b, path.len());
            if !below.a.is_empty() || !below.b.is_empty() {
                pending.push(below);
            }
        }
        Ok(())
    }

    /// What is below these two; nothing below what is no directory.
    fn directory(&self, a: Option<NodeId>, b: Option<NodeId>, directory_len: usize) -> Pending {
        Pending {
            a: a.map_or(0..0, |a| self.a.tree.child_positions(a)),
            b: b.map_or(0..0, |b| self.b.tree.child_positions(b)),
            directory_len,
        }
    }

    /// Compares what is under one path.
    fn name(&mut self, path: &[u8], a: Option<NodeId>, b: Option<NodeId>) -> Result<(), E> {
        let [known_a, known_b] = &mut self.first_paths;
        let first_a = a.map(|a| first_path(known_a, self.a.tree, a, path));
        let first_b = b.map(|b| first_path(known_b, self.b.tree, b, path));
        let difference = match (a, b) {
            (None, None) => return Ok(()),
            (Some(a), None) => {
                self.totals.removed += 1;
                Difference::Removed(a)
            }
            (None, Some(b)) => {
                self.totals.added += 1;
                Difference::Added(b)
            }
            (Some(before), Some(after)) => {
                let mut aspects = aspects(self.a, before, self.b, after);
                if first_a != first_b && aspects.first() != Some(&Aspect::Type) {
                    aspects.push(Aspect::Names);
                    aspects.sort_unstable();
                }
                match aspects[..] {
                    [] => return Ok(()),
                    [Aspect::MaybeContent] => self.totals.uncertain += 1,
                    _ => self.totals.changed += 1,
                }
                let aspects = &aspects;
                return (self.visit)(path, Difference::Changed { before, after, aspects });
            }
        };
        (self.visit)(path, difference)
    }
}

/// The first path of a file, this one if it is the first.
fn first_path<'p>(known: &'p mut HashMap<NodeId, Vec<u8>>, tree: &Tree, node: NodeId, path: &'p [u8]) -> &'p [u8] {
    let several = tree.node(node).links() > 1 && !tree.node(node).is_directory();
    if several {
        known.entry(node).or_insert_with(|| path.to_vec())
    } else {
        path
    }
}

fn aspects(a: Side<'_>, before: NodeId, b: Side<'_>, after: NodeId) -> Vec<Aspect> {
    let (one, other) = (a.tree.node(before), b.tree.node(after));
    let same_type = one.kind() == other.kind();
    let xattrs = a.tree.xattrs(one.xattr_set());
    let other_xattrs = b.tree.xattrs(other.xattr_set());
    let mut found = Vec::new();
    let mut note = |differs: bool, aspect| {
        if differs {
            found.push(aspect);
        }
    };
    note(!same_type, Aspect::Type);
    note(one.mode() & 0o7777 != other.mode() & 0o7777, Aspect::Mode);
    note((one.uid(), one.gid()) != (other.uid(), other.gid()), Aspect::Owner);
    note(one.mtime() != other.mtime(), Aspect::Time);
    if same_type {
        note(one.size() != other.size(), Aspect::Size);
        if one.kind() == NodeKind::File && one.size() == other.size() {
            match same_content(a, before, b, after) {
                Some(same) => note(!same, Aspect::Content),
                None => note(true, Aspect::MaybeContent),
            }
        }
        note(a.tree.link_text(before) != b.tree.link_text(after), Aspect::Link);
        note(one.device() != other.device(), Aspect::Device);
    }
    note(xattrs.ne(other_xattrs), Aspect::Xattrs);
    found
}

/// Whether two files of the same length have the same bytes, if that is known.
fn same_content(a: Side<'_>, before: NodeId, b: Side<'_>, after: NodeId) -> Option<bool> {
    let (one, other) = (a.tree.content(before), b.tree.content(after));
    let stores_nothing = |content| matches!(content, Content::Scattered([]));
    if stores_nothing(one) && stores_nothing(other) {
        return Some(true);
    }
    let known = a.facts(a.tree.node(before).layer()).identities;
    let others = b.facts(b.tree.node(after).layer()).identities;
    if one == other && known.iter().any(|identity| others.contains(identity)) {
        return Some(true);
    }
    // A digest is of the stored bytes: the same bytes at other places of a sparse file are another content.
    let (Content::Whole(_), Content::Whole(_)) = (one, other) else {
        return None;
    };
    Some(a.digest(before)? == b.digest(after)?)
}

impl<'a> Side<'a> {
    fn facts(&self, layer: LayerId) -> LayerFacts<'a> {
        let number = usize::try_from(layer.0).ok();
        number
            .and_then(|number| self.layers.get(number))
            .copied()
            .unwrap_or_default()
    }

    /// Where a file's stored bytes lie: from the first to the last, sparse files' too.
    fn stored(&self, node: NodeId) -> Option<(TarRange, u64)> {
        match self.tree.content(node) {
            Content::Whole(start) => {
                let len = self.tree.node(node).size();
                Some((TarRange::new(start, len), len))
            }
            Content::Scattered(segments) => {
                let end = |range: &crate::index::Segment| range.tar_offset.plus(range.len);
                let start: TarOffset = segments.first()?.tar_offset;
                let stored = segments.iter().fold(0, |sum: u64, one| sum.saturating_add(one.len));
                Some((TarRange::new(start, end(segments.last()?).since(start)), stored))
            }
        }
    }

    fn digest(&self, node: NodeId) -> Option<[u8; 32]> {
        let (range, _) = self.stored(node)?;
        let payloads = self.facts(self.tree.node(node).layer()).payloads?;
        payloads.payload_digest(range)
    }

    /// The files that have names and store bytes, with how many.
    fn files(&self) -> impl Iterator<Item = (NodeId, u64)> {
        let side = *self;
        side.tree
            .nodes()
            .filter(|(_, node)| node.kind() == NodeKind::File && node.links() > 0)
            .filter_map(move |(id, _)| Some((id, side.stored(id)?.1)))
    }
}

/// Counts the second tree's payload, and what of it the first one's machine lacks.
fn count_bytes(a: Side<'_>, b: Side<'_>, totals: &mut Totals) {
    let here: HashSet<&String> = a.layers.iter().flat_map(|layer| layer.identities).collect();
    let mut payloads = HashSet::new();
    if b.layers.iter().any(|layer| layer.payloads.is_some()) {
        payloads.extend(a.files().filter_map(|(node, _)| a.digest(node)));
    }
    for (node, stored) in b.files() {
        totals.payload_bytes = totals.payload_bytes.saturating_add(stored);
        let identities = b.facts(b.tree.node(node).layer()).identities;
        let known = identities.iter().any(|identity| here.contains(identity))
            || b.digest(node).is_some_and(|digest| !payloads.insert(digest));
        if !known {
            totals.fetch_bytes = totals.fetch_bytes.saturating_add(stored);
        }
    }
}

#[cfg(test)]
mod tests;
