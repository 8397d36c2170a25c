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
//! the layer is served (`donor` in `names`).
//!
//! Bounds: [`MOST_DONORS`] layers, those used last, of up to [`MOST_PAYLOADS`] files together; [`MOST_DIGESTED`] bytes that are read to be
//! digested. All of it happens on a thread of its own that nobody waits for.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::index_cache::read_hot;
use super::{Cache, MAX_INDEX_BYTES, OpenError, PreparedLayer};
use crate::cache::chunk::pieces;
use crate::cache::disk::{DiskCache, LayerCache, LayerKey};
use crate::fetch::{Deduplicator, IndexTrust, MOST_DONORS, PROVEN_WHOLE, SharedExtent, SharedPayloads, ShortDigest};
use crate::http::HttpOptions;
use crate::index::{ColdPart, Index, Payloads};
use crate::source::{self, Blob};
use crate::units::{LayerId, TarRange, len_u64, len_usize};

/// Files of all donors together at most.
const MOST_PAYLOADS: usize = 4 << 20;
/// Bytes of donors that are read to be digested, at most.
const MOST_DIGESTED: u64 = 1 << 30;
/// Digests are fetched when so many times their length may be spared.
const WORTH: u64 = 4;
/// So long is waited for other processes to close layers, all together.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked whether they have.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// So much in common is worth a table, in bytes.
const LEAST: u64 = 64 << 10;

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

    /// A piece of its payload digests; with `fetch` also from a registry.
    fn digests(&self, number: usize, fetch: bool) -> Option<Vec<u8>> {
        let file = self
            .file
            .as_ref()
            .and_then(|file| file.try_clone().ok())
            .map(File::from);
        digests(&self.index, file, self.rest.as_ref().filter(|_| fetch), number)
    }
}

/// A piece of an index's payload digests: of a hot part that has a `file` from there, or else from where its `rest` is. What comes is
/// checked, and put where the next one finds it.
fn digests(index: &Index<Vec<u8>>, file: Option<File>, rest: Option<&Blob>, number: usize) -> Option<Vec<u8>> {
    if index.is_whole() {
        return index.cold_piece(ColdPart::PayloadDigests, number).ok()?;
    }
    let piece = index.cold().piece(ColdPart::PayloadDigests, number)?;
    let len = len_usize(piece.range.end - piece.range.start);
    if let Some(file) = &file {
        let mut stored = vec![0; len];
        if file.read_exact_at(&mut stored, piece.range.start).is_ok()
            && let Ok(digests) = piece.open(&stored)
        {
            return Some(digests);
        }
    }
    let stored = source::read_range(rest?, piece.range.clone(), &HttpOptions::default());
    let stored = stored
        .inspect_err(|error| log::info!("{error}; going on without what it says of equal files"))
        .ok()?;
    let digests = piece.open(&stored).ok()?;
    if let Some(Err(error)) = file.map(|file| file.write_all_at(&stored, piece.range.start)) {
        log::debug!("payload digests are not kept: {error}");
    }
    Some(digests)
}

/// Where the payloads of a prepared layer lie, with their digests as far as its index has them, which are fetched where they are not here.
///
/// # Errors
/// [`OpenError::Index`] when the index is damaged.
pub fn payloads_of(layer: &PreparedLayer) -> Result<Payloads, OpenError> {
    let bad = |cause| OpenError::Index {
        name: format!("index for {}", layer.layer.blob.name),
        cause,
    };
    let mut payloads = Payloads::of(&layer.index).map_err(bad)?;
    let hot = layer.kept.as_ref().filter(|_| layer.rest.is_some());
    for number in 0..payloads.pieces().count() {
        let file = hot.and_then(|path| File::options().read(true).write(true).open(path).ok());
        if let Some(piece) = digests(&layer.index, file, layer.rest.as_ref(), number) {
            payloads.put_piece(number, piece).map_err(bad)?;
        }
    }
    Ok(payloads)
}

/// How many bytes of a layer's blob are fetched in the end if all its files are read, on a machine that has all of `others`.
#[must_use]
pub fn bytes_to_fetch(index: &Index<Vec<u8>>, own: &Payloads, others: &[Payloads]) -> u64 {
    let mut found = Found::default();
    for (donor, other) in others.iter().enumerate() {
        for (number, range) in other.ranges().iter().enumerate() {
            if let Some(digest) = other.digest(number) {
                found.note(donor, *range, digest, true);
            }
        }
    }
    let (used, mut shared) = found.shared_with(own);
    shared.donors = vec![LayerKey::of_content("", 0); used.len()];
    shared.bytes_to_fetch(index.spans(), index.tar_len(), index.chunk_digests().is_some())
}

/// What the cache notes of a layer that was served: where its index is.
#[derive(Serialize, Deserialize)]
struct DonorRecord {
    /// The file in the cache directory: `index/…` or `hot/…`.
    index: PathBuf,
    /// Where the rest of the index is, without secrets.
    rest: Option<Blob>,
}

fn record_name(key: LayerKey) -> String {
    format!("donor\n{}", key.hex())
}

/// Notes where the index of a layer is, if the cache keeps it.
fn note(cache: &Cache, layer: &IndexedLayer) {
    let (Some(key), Some(file)) = (layer.key, &layer.file) else {
        return;
    };
    let Ok(path) = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
        return;
    };
    let Ok(index) = path.strip_prefix(cache.dir()) else {
        return;
    };
    if index_path(cache, index).is_some() {
        let record = DonorRecord {
            index: index.to_owned(),
            rest: layer.rest.as_ref().map(Blob::without_secrets),
        };
        cache.remember(&record_name(key), &record);
    }
}

/// The file of an index in the cache directory, if `index` names one there.
fn index_path(cache: &Cache, index: &Path) -> Option<PathBuf> {
    let mut parts = index.components();
    let (Some(Component::Normal(dir)), Some(Component::Normal(_)), None) = (parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let path = cache.dir().join(index);
    ((dir == "index" || dir == "hot") && path.is_file()).then_some(path)
}

/// A layer that the cache has, with the index that was noted for it. Nothing is believed of that.
fn recall(cache: &Cache, key: LayerKey) -> Option<IndexedLayer> {
    let record: DonorRecord = cache.recall(&record_name(key))?;
    let path = index_path(cache, &record.index)?;
    let (index, file) = if record.index.starts_with("hot") {
        let mut file = File::options().read(true).write(true).open(&path).ok()?;
        (read_hot(&mut file)?, Some(Arc::new(file.into())))
    } else {
        let whole = fs::metadata(&path).ok().filter(|meta| meta.len() <= MAX_INDEX_BYTES);
        (
            Index::open(fs::read(&path).ok().filter(|_| whole.is_some())?).ok()?,
            None,
        )
    };
    Some(IndexedLayer {
        key: Some(key),
        index,
        file,
        rest: record.rest,
        trust: None,
    })
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
        .filter_map(|layer| Candidate::new(layer, disk, true))
        .collect();
    let own: HashSet<LayerKey> = known.iter().map(|candidate| candidate.key).collect();
    let new = known.len();
    if !getting.is_empty() {
        add_kept(&mut known, disk, cache, &own);
    }
    for (id, key) in getting {
        share(fetcher, id, key, &mut known);
    }
    // Of others only what is new concerns them.
    known.truncate(new);
    for other in others {
        for (id, key) in other.layers.into_iter().filter(|(_, key)| !own.contains(key)) {
            if let Some(layer) = recall(cache, key).and_then(|layer| Candidate::new(layer, disk, true)) {
                known.push(layer);
                share(&other.fetcher, id, key, &mut known);
                known.truncate(new);
            }
        }
    }
}

/// A layer of which something may be had, or that may get something.
struct Candidate {
    key: LayerKey,
    layer: IndexedLayer,
    payloads: Payloads,
    cache: Arc<LayerCache>,
    /// Whether a device may bring what is not here yet.
    is_served: bool,
}

impl Candidate {
    /// None where the cache keeps nothing of it, or its index is damaged.
    fn new(layer: IndexedLayer, disk: &Arc<DiskCache>, is_served: bool) -> Option<Self> {
        let key = layer.key?;
        let cache = disk.kept(key).filter(|cache| cache.size() == layer.index.tar_len())?;
        let payloads = Payloads::of(&layer.index).ok()?;
        Some(Self {
            key,
            layer,
            payloads,
            cache,
            is_served,
        })
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
                && let Some(piece) = self.layer.digests(number, gain >= WORTH * digests)
                && let Err(error) = self.payloads.put_piece(number, piece)
            {
                log::info!("{error}");
            }
        }
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

/// Adds what the cache keeps of layers that are not in `own`, those used last first.
fn add_kept(known: &mut Vec<Candidate>, disk: &Arc<DiskCache>, cache: &Cache, own: &HashSet<LayerKey>) {
    let listed = disk.list().unwrap_or_default();
    let mut patience = PATIENCE;
    let mut payloads: usize = known.iter().map(|candidate| candidate.payloads.len()).sum();
    for kept in listed.into_iter().filter(|kept| kept.held > 0 || kept.in_use) {
        if known.len() >= MOST_DONORS || payloads > MOST_PAYLOADS {
            return;
        }
        let Some(key) = kept.layer_key().filter(|key| !own.contains(key)) else {
            continue;
        };
        // A service that was replaced, or a command, may be about to close it.
        while disk.kept(key).is_none() && kept.in_use && patience > Duration::ZERO {
            std::thread::sleep(LOOK_AGAIN);
            patience = patience.saturating_sub(LOOK_AGAIN);
        }
        if let Some(candidate) = recall(cache, key).and_then(|layer| Candidate::new(layer, disk, kept.in_use)) {
            payloads += candidate.payloads.len();
            known.push(candidate);
        }
    }
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
    if wanted.is_empty() {
        return;
    }
    let mut left = MOST_DIGESTED;
    let mut found = Found::default();
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
                found.note(donor, *range, digest, held);
            }
        }
    }
    let (used, mut shared) = found.shared_with(&own.payloads);
    shared.donors = used.iter().filter_map(|donor| Some(others.get(*donor)?.key)).collect();
    let bytes: u64 = shared.extents.iter().map(|extent| extent.range.len).sum();
    if bytes < LEAST {
        return;
    }
    if let Some(bytes) = fetcher.share(id, &shared) {
        log::info!(
            "layer {}: {bytes} bytes of its files are those of {} other layers in the cache",
            id.0,
            shared.donors.len()
        );
    }
}

/// Payloads that donors have, by what they are.
#[derive(Default)]
struct Found(HashMap<(u64, ShortDigest), Place>);

struct Place {
    donor: usize,
    range: TarRange,
    /// Whether all of it is here.
    held: bool,
}

fn short(digest: &[u8; 32]) -> ShortDigest {
    let mut short = [0; 20];
    short.copy_from_slice(&digest[..20]);
    short
}

impl Found {
    /// A donor has a payload. One that is here is better than one that may come.
    fn note(&mut self, donor: usize, range: TarRange, digest: [u8; 32], held: bool) {
        let place = Place { donor, range, held };
        match self.0.entry((range.len, short(&digest))) {
            std::collections::hash_map::Entry::Vacant(free) => drop(free.insert(place)),
            std::collections::hash_map::Entry::Occupied(mut taken) => {
                if held && !taken.get().held {
                    taken.insert(place);
                }
            }
        }
    }

    /// What of `own` donors have, and which donors these are: extents count them in that order.
    fn shared_with(&self, own: &Payloads) -> (Vec<usize>, SharedPayloads) {
        let (mut used, mut shared) = (Vec::new(), SharedPayloads::default());
        for (number, range) in own.ranges().iter().enumerate() {
            let digest = own.digest(number).map(|digest| short(&digest));
            let place = digest.and_then(|digest| Some((digest, self.0.get(&(range.len, digest))?)));
            let Some((digest, place)) = place else {
                shared.others.push(*range);
                continue;
            };
            let donor = used.iter().position(|donor| *donor == place.donor).unwrap_or_else(|| {
                used.push(place.donor);
                used.len() - 1
            });
            shared.extents.push(SharedExtent {
                range: *range,
                digest,
                donor,
                from: place.range.start,
            });
        }
        (used, shared)
    }
}
