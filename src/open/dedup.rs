//! What layers that are served have in common with others that the cache holds. In: the indexes of the layers of a device. Out: a fetcher
//! that knows which of their files' bytes lie in other layers too, some time after it has begun to serve.
//!
//! Files are the same whose payload digests are. They are in the cold part of an index, so first it is looked how long files are: digests
//! are fetched, by the piece of 64 KiB, only where enough bytes may be had for them. Of a layer whose index has none the files that are
//! here are digested.
//!
//! Whose index is believed decides whose layer *gets* bytes: one that has to be compared with the layer's headers in the end gets none, since
//! the layer would never be here as a whole. Whose index names a *donor's* bytes does not matter: the fetcher compares them with what the
//! index of the layer that gets them says (`fetch/dedup`). What a donor's index is, and where the rest of it is, is noted in the cache when
//! the layer is served (`donor` in `names`), if the cache has it: one that was named is no hint later. A layer that is served without digests of
//! its chunks is no donor meanwhile, since what is kept of it may become something else.
//!
//! Long files that are nowhere as a whole are looked for by their content-defined pieces, if that may spare more than fetching the pieces'
//! digests costs.
//!
//! A donor that another process has open, or this one is about to close, is looked for again later, with pauses.
//!
//! Bounds: [`MOST_DONORS`] layers, those used last, of up to [`MOST_PAYLOADS`] files together; [`MOST_DIGESTED`] bytes that are read to be
//! digested; [`LOOKED_FOR`]. All of it happens on a thread of its own that nobody waits for.

mod donor_record;
mod in_common;
mod payloads;

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use self::donor_record::{note, recall};
use self::in_common::{Found, short};
use self::payloads::{cold_piece, content_pieces};
use super::Cache;
use crate::cache::chunk::pieces;
use crate::cache::disk::{DiskCache, LayerCache, LayerKey, NotKept};
use crate::fetch::{Deduplicator, IndexTrust, MOST_DONORS, PROVEN_WHOLE};
use crate::index::{ColdPart, ContentPieces, Index, Payloads};
use crate::source::Blob;
use crate::units::{CHUNK_BYTES, LayerId, TarRange, len_u64, len_usize};

pub use self::in_common::bytes_to_fetch;
pub use self::payloads::KnownPayloads;

/// Files of all donors together at most.
const MOST_PAYLOADS: usize = 4 << 20;
/// Bytes of donors that are read to be digested, at most.
const MOST_DIGESTED: u64 = 1 << 30;
/// Digests are fetched when so many times their length may be spared.
const WORTH: u64 = 4;
/// So much in common is worth a table, in bytes.
const LEAST: u64 = 64 << 10;
/// Donors that were in use elsewhere are looked for again after so long; each time the pause is twice as long, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long they are looked for.
const LOOKED_FOR: Duration = Duration::from_secs(600);

/// A layer that is served, and its index.
#[derive(Debug)]
pub(super) struct IndexedLayer {
    /// What the cache knows it by; none if it keeps nothing of it.
    pub(super) key: Option<LayerKey>,
    pub(super) index: Index<Vec<u8>>,
    /// A file that begins with the hot part. With `rest` it has room for what is fetched of that.
    pub(super) file: Option<Arc<OwnedFd>>,
    /// Where the rest of the index is, if not here.
    pub(super) rest: Option<Blob>,
    /// On whose word the index is believed, where that is known.
    pub(super) trust: Option<IndexTrust>,
}

impl IndexedLayer {
    /// Whether the layer may be given bytes on its index's word.
    fn may_get(&self) -> bool {
        self.trust.is_some_and(|trust| !trust.is_to_be_compared()) && !self.index.is_of_contents()
    }

    /// A piece of its index's cold part; with `fetch` also from a registry.
    fn cold_piece(&self, part: ColdPart, number: usize, fetch: bool) -> Option<Vec<u8>> {
        let own = self.file.as_ref().and_then(|file| file.try_clone().ok());
        let rest = self.rest.as_ref().filter(|_| fetch);
        cold_piece(&self.index, own.map(File::from), rest, part, number)
    }
}

/// A device whose layers may get bytes of others.
#[derive(Debug)]
struct Getter {
    fetcher: Deduplicator,
    /// Those that may, with their numbers.
    layers: Vec<(LayerId, LayerKey)>,
}

/// The devices of one process.
#[derive(Debug, Default)]
pub(super) struct Getters(Mutex<Vec<Getter>>);

impl Getters {
    /// Takes a device in, and gives those that were there before.
    fn join(&self, new: Getter) -> Vec<Getter> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|getter| !getter.fetcher.is_over());
        let before = all.iter().map(Getter::again).collect();
        all.push(new);
        before
    }
}

impl Getter {
    fn again(&self) -> Self {
        Self {
            fetcher: self.fetcher.clone(),
            layers: self.layers.clone(),
        }
    }
}

/// Finds out what a device's layers have in common with others, and tells its fetcher; and what others that are served have in common with
/// it. On a thread of its own. `layers` are all of the device's, in order.
pub(super) fn begin(
    getters: &Arc<Getters>,
    fetcher: Deduplicator,
    layers: Vec<IndexedLayer>,
    disk: &Arc<DiskCache>,
    layers_dir: &Path,
) {
    let Some(cache) = layers_dir.parent().map(Cache::new).and_then(Result::ok) else {
        return;
    };
    let (getters, disk) = (Arc::clone(getters), Arc::clone(disk));
    let job = move || run(&getters, &fetcher, layers, &disk, &cache);
    if let Err(error) = std::thread::Builder::new().name("tarblk-dedup".to_owned()).spawn(job) {
        log::warn!("cannot look for what other layers have too: {error}");
    }
}

fn run(getters: &Getters, fetcher: &Deduplicator, layers: Vec<IndexedLayer>, disk: &Arc<DiskCache>, cache: &Cache) {
    for layer in &layers {
        note(cache, layer);
    }
    let numbered = || (0..).map(LayerId).zip(&layers);
    let getting: Vec<_> = numbered()
        .filter_map(|(id, layer)| Some((id, layer.key.filter(|_| layer.may_get())?)))
        .collect();
    let others = getters.join(Getter {
        fetcher: fetcher.clone(),
        layers: getting.clone(),
    });
    let mut known: Vec<Candidate> = layers
        .into_iter()
        .filter_map(|layer| Candidate::served(layer, disk))
        .collect();
    let own: HashSet<LayerKey> = known.iter().map(|candidate| candidate.key).collect();
    let new = known.len();
    let in_use = if getting.is_empty() {
        Vec::new()
    } else {
        add_kept(&mut known, disk, cache, &own)
    };
    for (id, key) in &getting {
        share(fetcher, *id, *key, &mut known);
    }
    // Of others only what is new concerns them.
    known.truncate(new);
    for other in others {
        for (id, key) in other.layers.into_iter().filter(|(_, key)| !own.contains(key)) {
            if let Some(layer) = recall(cache, key).and_then(|layer| Candidate::served(layer, disk)) {
                known.push(layer);
                share(&other.fetcher, id, key, &mut known);
                known.truncate(new);
            }
        }
    }
    if !in_use.is_empty() {
        let own = known.into_iter().map(Candidate::close).collect();
        share_when_free(fetcher, &getting, own, in_use, disk, cache);
    }
}

/// Tells a fetcher what the layers that it is `getting` bytes for have in common with donors that were `in_use` elsewhere when its device
/// came, as they become free: until none is left, the device is gone or [`LOOKED_FOR`] is over. `own` are the device's layers.
///
/// Invariant: nothing is held open between two looks, so that neither the device's layers nor the donors are kept from others.
fn share_when_free(
    fetcher: &Deduplicator,
    getting: &[(LayerId, LayerKey)],
    mut own: Vec<IndexedLayer>,
    mut in_use: Vec<LayerKey>,
    disk: &Arc<DiskCache>,
    cache: &Cache,
) {
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    while !in_use.is_empty() && began.elapsed() < LOOKED_FOR {
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
        if fetcher.is_over() {
            return;
        }
        let mut free = Vec::new();
        in_use.retain(|key| match disk.kept(*key) {
            Ok(kept) => {
                free.extend(recall(cache, *key).and_then(|layer| Candidate::new(layer, kept, false)));
                false
            }
            Err(why) => why == NotKept::InUse,
        });
        if free.is_empty() {
            continue;
        }
        for (id, key) in getting {
            let at = own.iter().position(|layer| layer.key == Some(*key));
            if let Some(layer) = at.and_then(|at| Candidate::served(own.swap_remove(at), disk)) {
                free.push(layer);
                share(fetcher, *id, *key, &mut free);
                own.extend(free.pop().map(Candidate::close));
            }
        }
    }
}

/// A layer of which something may be had, or that may get something; open in the cache for as long as the value lives.
struct Candidate {
    key: LayerKey,
    layer: IndexedLayer,
    payloads: Payloads,
    cache: Arc<LayerCache>,
    /// Whether a device may bring what is not here yet.
    is_served: bool,
}

impl Candidate {
    /// None where `cache`, which is what is kept of it, is another layer's, or its index is damaged.
    fn new(layer: IndexedLayer, cache: Arc<LayerCache>, is_served: bool) -> Option<Self> {
        let key = layer.key?;
        let payloads = Payloads::of(&layer.index).ok()?;
        (cache.size() == layer.index.tar_len()).then_some(Self {
            key,
            layer,
            payloads,
            cache,
            is_served,
        })
    }

    /// One that a device of this process has; none where the cache keeps nothing of it.
    fn served(layer: IndexedLayer, disk: &Arc<DiskCache>) -> Option<Self> {
        let kept = disk.kept(layer.key?).ok()?;
        Self::new(layer, kept, true)
    }

    /// Lets go of what is kept of it.
    fn close(self) -> IndexedLayer {
        self.layer
    }

    /// Whether all of a payload is here.
    fn has(&self, range: TarRange) -> bool {
        pieces(LayerId(0), range).all(|(key, ..)| self.cache.has(key.index))
    }

    /// Whether a payload may be had, now or later: a long one in part.
    fn may_have(&self, range: TarRange) -> bool {
        self.is_served || range.len > PROVEN_WHOLE || self.has(range)
    }

    /// Sees to the digests of payloads whose length `is_wanted`, as far as they are worth it.
    fn bring_digests(&mut self, is_wanted: &dyn Fn(u64) -> bool) {
        for (number, payloads) in self.payloads.pieces().enumerate().collect::<Vec<_>>() {
            if self.payloads.has_piece(number) {
                continue;
            }
            let digests = len_u64(payloads.len()) * 32;
            let wanted = self.payloads.ranges()[payloads]
                .iter()
                .filter(|range| is_wanted(range.len));
            let gain = wanted.fold(0, |sum: u64, range| sum.saturating_add(range.len));
            if gain > 0
                && let Some(piece) = self
                    .layer
                    .cold_piece(ColdPart::PayloadDigests, number, gain >= WORTH * digests)
                && let Err(error) = self.payloads.put_piece(number, piece)
            {
                log::info!("{error}");
            }
        }
    }

    /// Whether it has long payloads and an index with their content-defined pieces.
    fn has_content_pieces(&self) -> bool {
        let mut ranges = self.payloads.ranges().iter();
        self.layer.index.cold().has(ColdPart::ContentPieces) && ranges.any(|range| ContentPieces::is_cut(*range))
    }

    /// The content-defined pieces of its long payloads, if its index has them: fetched if they are not here and take no more than
    /// `affordable` bytes, of which what they took is taken away.
    fn content_pieces(&self, affordable: &mut u64) -> Option<ContentPieces> {
        let layer = &self.layer;
        let read = |fetch| {
            let piece = |number| layer.cold_piece(ColdPart::ContentPieces, number, fetch);
            content_pieces(&layer.index, &self.payloads, &piece)
        };
        read(false).or_else(|| {
            let cost = layer.index.cold().decoded_len(ColdPart::ContentPieces);
            *affordable = affordable.checked_sub(cost)?;
            read(true)
        })
    }

    /// The SHA-256 of a payload that is here. Waits for the disk.
    fn digest_held(&self, range: TarRange) -> Option<[u8; 32]> {
        let (mut hash, mut buffer) = (Sha256::new(), Vec::new());
        for (key, from, len) in pieces(LayerId(0), range) {
            let right = self.cache.has(key.index) && self.cache.read_chunk(key.index, &mut buffer);
            hash.update(buffer.get(len_usize(from)..len_usize(from + len)).filter(|_| right)?);
        }
        Some(hash.finalize().into())
    }
}

/// Adds what the cache keeps of layers that are not in `own`, those used last first; gives those that cannot be looked at now because
/// another process has them open, or this one is about to close them.
fn add_kept(
    known: &mut Vec<Candidate>,
    disk: &Arc<DiskCache>,
    cache: &Cache,
    own: &HashSet<LayerKey>,
) -> Vec<LayerKey> {
    let listed = disk.list().unwrap_or_default();
    let mut in_use = Vec::new();
    let mut payloads: usize = known.iter().map(|candidate| candidate.payloads.len()).sum();
    for kept in listed.into_iter().filter(|kept| kept.held > 0 || kept.in_use) {
        if known.len() + in_use.len() >= MOST_DONORS || payloads > MOST_PAYLOADS {
            break;
        }
        let Some(key) = kept.layer_key().filter(|key| !own.contains(key)) else {
            continue;
        };
        match disk.kept(key) {
            Ok(cached) => {
                let layer = recall(cache, key);
                if let Some(candidate) = layer.and_then(|layer| Candidate::new(layer, cached, kept.in_use)) {
                    payloads += candidate.payloads.len();
                    known.push(candidate);
                }
            }
            Err(NotKept::InUse) => in_use.push(key),
            Err(NotKept::Nothing) => {}
        }
    }
    in_use
}

/// Tells a fetcher what its layer `id`, which `key` names, has in common with all others that are known.
fn share(fetcher: &Deduplicator, id: LayerId, key: LayerKey, known: &mut [Candidate]) {
    let Some(at) = known.iter().position(|candidate| candidate.key == key) else {
        return;
    };
    if fetcher.is_over() {
        return;
    }
    let (before, rest) = known.split_at_mut(at);
    let Some((own, behind)) = rest.split_first_mut() else {
        return;
    };
    let mut others: Vec<&mut Candidate> = before
        .iter_mut()
        .chain(behind)
        .filter(|other| other.key != key)
        .collect();
    let mut found = Found::default();
    find_payloads(own, &mut others, &mut found);
    let pieces = find_pieces(own, &others, &mut found);
    let (used, mut shared) = found.shared_with(&own.payloads, &pieces);
    shared.donors = used.iter().filter_map(|donor| Some(others.get(*donor)?.key)).collect();
    let bytes: u64 = shared.extents.iter().map(|extent| extent.range.len).sum();
    if bytes < LEAST {
        return;
    }
    if let Some(bytes) = fetcher.share(id, &shared) {
        log::info!(
            "layer {}: {bytes} bytes of its files are in other layers of the cache, too ({})",
            id.0,
            shared.donors.len()
        );
    }
}

/// Notes which of the payloads that are as long as one of `own` other layers have.
fn find_payloads(own: &mut Candidate, others: &mut [&mut Candidate], found: &mut Found) {
    let lens: HashSet<u64> = others
        .iter()
        .flat_map(|other| {
            let held = other.payloads.ranges().iter().filter(|range| other.may_have(**range));
            held.map(|range| range.len)
        })
        .collect();
    own.bring_digests(&|len| lens.contains(&len));
    let digested = (0..own.payloads.len()).filter(|number| own.payloads.digest(*number).is_some());
    let wanted: HashSet<u64> = digested
        .filter_map(|number| Some(own.payloads.ranges().get(number)?.len))
        .collect();
    let mut left = MOST_DIGESTED;
    for (donor, other) in others.iter_mut().enumerate() {
        other.bring_digests(&|len| wanted.contains(&len));
        let has_digests = other.layer.index.cold().has(ColdPart::PayloadDigests);
        for (number, range) in other.payloads.ranges().iter().enumerate() {
            if !wanted.contains(&range.len) || !other.may_have(*range) {
                continue;
            }
            let held = other.has(*range);
            let digest = other.payloads.digest(number).or_else(|| {
                let affordable = !has_digests && held && range.len <= left;
                left -= if affordable { range.len } else { 0 };
                affordable.then(|| other.digest_held(*range)).flatten()
            });
            if let Some(digest) = digest {
                found.note(donor, *range, short(&digest), held);
            }
        }
    }
}

/// Notes what other layers have of the long payloads of `own` that none was `found` to have as a whole; gives all pieces of `own`, which prove
/// the ends of those that one has, too. None where nothing is gained by them.
fn find_pieces(own: &Candidate, others: &[&mut Candidate], found: &mut Found) -> ContentPieces {
    let none = ContentPieces::default();
    if !own.has_content_pieces() {
        return none;
    }
    let are_sought = others.iter().any(|other| other.has_content_pieces());
    let (_, whole) = found.shared_with(&own.payloads, &none);
    let long = || {
        let others = whole.others.iter().filter(|_| are_sought);
        others.filter(|range| ContentPieces::is_cut(**range))
    };
    let ends = whole.extents.iter().filter(|extent| extent.range.len > PROVEN_WHOLE);
    let ends = len_u64(ends.count()) * 2 * CHUNK_BYTES;
    let mut affordable = long().fold(ends, |sum: u64, range| sum.saturating_add(range.len)) / WORTH;
    if affordable == 0 {
        return none;
    }
    let Some(cut) = own.content_pieces(&mut affordable) else {
        return none;
    };
    if long().next().is_none() {
        return cut;
    }
    let wanted: HashSet<_> = long()
        .flat_map(|range| cut.of(*range))
        .map(|(range, digest)| (range.len, *digest))
        .collect();
    for (donor, other) in others
        .iter()
        .enumerate()
        .filter(|(_, other)| other.has_content_pieces())
    {
        let theirs = other.content_pieces(&mut affordable).unwrap_or_default();
        for (range, digest) in theirs.all() {
            let is_wanted = wanted.contains(&(range.len, *digest));
            let held = is_wanted && other.has(*range);
            if held || (is_wanted && other.is_served) {
                found.note(donor, *range, *digest, held);
            }
        }
    }
    cut
}
