//! What a layer's files have in common with those of its donors, by digests alone. In: payloads and pieces that donors have. Out: which
//! ranges of the layer lie where in which donor, and which in none.
//!
//! Nothing is read or fetched here, and nothing is believed: the fetcher compares every byte before it is used (`fetch/dedup`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::payloads::KnownPayloads;
use crate::cache::disk::LayerKey;
use crate::fetch::{PROVEN_WHOLE, SharedExtent, SharedPayloads, ShortDigest};
use crate::index::{ContentPieces, Index, Payloads};
use crate::units::{CHUNK_BYTES, TarRange};

/// How many bytes of a layer's blob are fetched in the end if all its files are read, on a machine that has all of `others`.
#[must_use]
pub fn bytes_to_fetch(index: &Index<Vec<u8>>, own: &KnownPayloads, others: &[KnownPayloads]) -> u64 {
    let mut found = Found::default();
    for (donor, other) in others.iter().enumerate() {
        for (number, range) in other.payloads.ranges().iter().enumerate() {
            if let Some(digest) = other.payloads.digest(number) {
                found.note(donor, *range, short(&digest), true);
            }
        }
        for (range, digest) in other.pieces.all() {
            found.note(donor, *range, *digest, true);
        }
    }
    let (used, mut shared) = found.shared_with(&own.payloads, &own.pieces);
    shared.donors = vec![LayerKey::of_content("", 0); used.len()];
    shared.bytes_to_fetch(index.spans(), index.tar_len(), index.chunk_digests().is_some())
}

/// The first twenty bytes of a payload's SHA-256.
pub(super) fn short(digest: &[u8; 32]) -> ShortDigest {
    let mut short = [0; 20];
    short.copy_from_slice(&digest[..20]);
    short
}

/// The pieces at both ends of a payload that a donor has as a whole and that is proven by the layer's chunks, in which other bytes lie, too,
/// where it begins and where it ends.
fn ends(whole: &SharedExtent, pieces: &ContentPieces) -> impl Iterator<Item = SharedExtent> {
    let (range, from) = (whole.range, whole.from);
    let inner = TarRange::new(range.start.plus(CHUNK_BYTES), range.len.saturating_sub(2 * CHUNK_BYTES));
    let parts = if range.len > PROVEN_WHOLE {
        pieces.of(range)
    } else {
        &[]
    };
    let outer = parts
        .iter()
        .filter(move |(part, _)| part.start < inner.start || part.end() > inner.end());
    outer.map(move |(part, digest)| SharedExtent {
        range: *part,
        digest: *digest,
        donor: whole.donor,
        from: from.plus(part.start.since(range.start)),
    })
}

/// Payloads and pieces of them that donors have, by length and digest.
#[derive(Default)]
pub(super) struct Found(HashMap<(u64, ShortDigest), Place>);

struct Place {
    /// The donor's number.
    donor: usize,
    /// Where it lies in the donor's tar.
    range: TarRange,
    /// Whether all of it is here.
    held: bool,
}

impl Found {
    /// A donor has a payload or a piece. One that is here is better than one that may come.
    pub(super) fn note(&mut self, donor: usize, range: TarRange, digest: ShortDigest, held: bool) {
        let place = Place { donor, range, held };
        match self.0.entry((range.len, digest)) {
            Entry::Vacant(free) => drop(free.insert(place)),
            Entry::Occupied(mut taken) => {
                if held && !taken.get().held {
                    taken.insert(place);
                }
            }
        }
    }

    /// What of `own` donors have as a whole, and of the rest what they have by its `pieces`; and which donors these are: extents count them
    /// in that order.
    pub(super) fn shared_with(&self, own: &Payloads, pieces: &ContentPieces) -> (Vec<usize>, SharedPayloads) {
        let (mut used, mut shared) = (Vec::new(), SharedPayloads::default());
        let mut extent = |range: TarRange, digest: ShortDigest| {
            let place = self.0.get(&(range.len, digest))?;
            let donor = used.iter().position(|donor| *donor == place.donor).unwrap_or_else(|| {
                used.push(place.donor);
                used.len() - 1
            });
            Some(SharedExtent {
                range,
                digest,
                donor,
                from: place.range.start,
            })
        };
        for (number, range) in own.ranges().iter().enumerate() {
            let digest = own.digest(number).map(|digest| short(&digest));
            if let Some(whole) = digest.and_then(|digest| extent(*range, digest)) {
                shared.extents.push(whole);
                shared.extents.extend(ends(&whole, pieces));
                continue;
            }
            let parts = pieces.of(*range);
            if parts.is_empty() {
                shared.others.push(*range);
            }
            for (part, digest) in parts {
                match extent(*part, *digest) {
                    Some(extent) => shared.extents.push(extent),
                    None => shared.others.push(*part),
                }
            }
        }
        (used, shared)
    }
}
