//! What is held of layers, by what they are. In: layers, device by device. Out: for layers that must be the same, byte for byte, one
//! place in memory and one in the disk cache, whatever devices they are of.
//!
//! Invariant: two layers share what is held only if they have the same name (the digest, or who claims it), and every byte of
//! either is held to the same rules ([`ByteRules`]). A device whose index lies has a place of its own: what it takes for right is
//! never read by another one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::blob::{LayerSource, VerifierDigests, WholeDigests};
use super::verified::{self, VerifiedChunks};
use crate::cache::chunk;
use crate::cache::disk::{Bits, DiskCache, DiskCacheError, LayerCache, LayerKey};
use crate::cache::early::EarlyChunks;
use crate::cache::memory::{MemoryCache, MemoryLayer};
use crate::layer::SpanTable;
use crate::source::Place;

/// What is held of a layer, in memory and on disk.
#[derive(Debug)]
pub(crate) struct LayerContent {
    /// Its chunks in memory.
    pub(super) memory: MemoryLayer,
    /// Its chunks, in memory or not, that came before any reader asked for them and are unread.
    pub(super) early: EarlyChunks,
    /// Set at the start, or once the layer has to be streamed.
    pub(super) cache: OnceLock<Arc<LayerCache>>,
    /// The chunks in the cache that this process has verified at some time: from then on their checksums tell whether they are still
    /// the same. None when the layer has no digests: then checksums are all there is.
    pub(super) checked: Option<Bits>,
    /// Whether the disk cache was asked for.
    stored: bool,
    /// None: nothing tells it from other layers, so it has one user.
    rules: Option<ByteRules>,
    /// Whether other layers may have been given it to read what they have in common.
    lent: AtomicBool,
    /// Set once that is over: somebody else writes what is kept under its name from now on, by other rules.
    revoked: AtomicBool,
    users: AtomicUsize,
    /// Held for what is only right as long as there is one user.
    alone: Mutex<()>,
    /// Where it is remembered what was verified, and by what name; none if that would be no use.
    remembered: Option<(LayerKey, Arc<VerifiedChunks>)>,
}

impl Drop for LayerContent {
    fn drop(&mut self) {
        let rules = self.rules.as_ref().and_then(|rules| rules.digests.as_ref());
        if let Some(VerifierDigests::Chunks(digests)) = rules
            && let Some((key, verified)) = self.remembered.take()
            && let (Some(cache), Some(checked)) = (self.cache.get(), self.checked.take())
            && self.is_constant()
        {
            verified.remember(key, digests, cache, checked);
        }
    }
}

impl LayerContent {
    /// Whether bytes of it that were proven once to be another layer's are the same still, wherever they are read from.
    pub(super) fn is_constant(&self) -> bool {
        !self.revoked.load(Ordering::Acquire) && self.cache.get().is_none_or(|cache| !cache.is_poisoned())
    }

    /// Whether each of its chunks has a digest.
    pub(super) fn has_chunk_digests(&self) -> bool {
        let rules = self.rules.as_ref();
        rules.is_some_and(|rules| matches!(rules.digests, Some(VerifierDigests::Chunks(_))))
    }

    /// Whether its chunks are held to digests, or nobody in this process writes any.
    fn stays_constant(&self) -> bool {
        self.has_chunk_digests() || (self.rules.is_none() && self.lent.load(Ordering::Acquire))
    }
}

/// What decides which bytes are taken for the layer's.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ByteRules {
    whole: WholeDigests,
    digests: Option<VerifierDigests>,
    /// How bytes come out of the blob, where there is not a digest for each of them.
    table: Option<SpanTable>,
}

impl ByteRules {
    /// Those of `source`; none if they cannot be compared with others'.
    fn of(source: &LayerSource) -> Option<Self> {
        let digests = match &source.verifier {
            Some(verifier) => Some(verifier.digests()?),
            None => None,
        };
        let by_digests_alone = matches!(digests, Some(VerifierDigests::Chunks(_)));
        let table = source.coding.as_ref().filter(|_| !by_digests_alone);
        Some(Self {
            whole: WholeDigests::of(&source.layer),
            digests,
            table: table.map(|coded| coded.table.clone()),
        })
    }
}

/// One user of a layer's content.
#[derive(Debug)]
pub(crate) struct ContentUse(Arc<LayerContent>);

impl std::ops::Deref for ContentUse {
    type Target = LayerContent;
    fn deref(&self) -> &LayerContent {
        &self.0
    }
}

impl Drop for ContentUse {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ContentUse {
    /// Does something that is only right as long as no other device uses the content: none does meanwhile. Others wait for it
    /// with their opening.
    pub(super) fn if_alone(&self) -> impl FnOnce(&mut dyn FnMut()) + Send + 'static {
        let content = Arc::clone(&self.0);
        move |job| {
            let _no_other_comes = content.alone.lock().unwrap_or_else(PoisonError::into_inner);
            if content.users.load(Ordering::Acquire) == 1 {
                job();
            }
        }
    }

    /// Whether another device uses it.
    pub(super) fn is_shared(&self) -> bool {
        self.0.users.load(Ordering::Acquire) > 1
    }

    /// Whether `other` is the same.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The contents that are in use.
#[derive(Debug)]
pub(crate) struct Contents {
    memory: Arc<MemoryCache>,
    by_key: Mutex<HashMap<LayerKey, Vec<Weak<LayerContent>>>>,
    /// Of those that were in use.
    verified: Arc<VerifiedChunks>,
}

impl Contents {
    /// Of layers whose chunks are kept in `memory`.
    pub(super) fn new(memory: Arc<MemoryCache>) -> Self {
        Self {
            memory,
            by_key: Mutex::default(),
            verified: Arc::default(),
        }
    }

    /// Room in memory for `count` things of at most a chunk's size that one layer needs, and no other reads.
    pub(super) fn room_for(&self, count: u32) -> MemoryLayer {
        self.memory.layer(count)
    }

    /// Bytes of chunks in memory.
    pub(super) fn bytes_in_memory(&self) -> u64 {
        self.memory.bytes_held()
    }

    /// The content of a layer that has to be fetched, decoded or verified. `store` is where it is to be kept.
    pub(super) fn of(&self, source: &LayerSource, store: Option<&Arc<DiskCache>>) -> ContentUse {
        let size = source.size();
        // A plain file is its own store.
        let is_file = matches!(source.layer.blob.place, Place::File(_));
        let store = store.filter(|_| !is_file || source.coding.is_some());
        let key =
            LayerKey::of_layer(&source.layer, source.coding.is_some(), size).filter(|_| store.is_some() || !is_file);
        let Some(key) = key else {
            let cache = store.map(|store| store.unnamed(size));
            return self.make(source, store.is_some(), None, cache, None);
        };
        let rules = ByteRules::of(source);
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        by_key.retain(|_, all| {
            all.retain(|content| content.strong_count() > 0);
            !all.is_empty()
        });
        let all = by_key.entry(key).or_default();
        let in_use: Vec<Arc<LayerContent>> = all.iter().filter_map(Weak::upgrade).collect();
        let same = |content: &&Arc<LayerContent>| {
            let spoiled = content.cache.get().is_some_and(|cache| cache.is_poisoned());
            content.stored == store.is_some() && rules.is_some() && content.rules == rules && !spoiled
        };
        if let Some(content) = in_use.iter().find(same) {
            content.users.fetch_add(1, Ordering::AcqRel);
            drop(content.alone.lock());
            return ContentUse(Arc::clone(content));
        }
        // What no device uses, and is only lent to others, gives way.
        let gives_way = |content: &Arc<LayerContent>| {
            content.lent.load(Ordering::Acquire) && content.users.load(Ordering::Acquire) == 0
        };
        let (given_up, in_use): (Vec<_>, Vec<_>) = in_use.into_iter().partition(gives_way);
        for content in given_up {
            content.revoked.store(true, Ordering::Release);
            all.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(&content)));
        }
        // Files of this name are another content's as long as that is in use.
        let name_taken = in_use.iter().any(|content| content.stored);
        let cache = store.map(|store| {
            if name_taken {
                store.unnamed(size)
            } else {
                cache_of(source, key, store)
            }
        });
        let named = Some(key).filter(|_| store.is_some() && !name_taken);
        let made = self.make(source, store.is_some(), rules, cache, named);
        all.push(Arc::downgrade(&made.0));
        made
    }

    /// What is held of the layer with this key, for other layers to read what they have in common with it; none if nothing is, or what is
    /// held may become something else. `store` is where it may be kept.
    pub(super) fn lend(&self, key: LayerKey, store: Option<&Arc<DiskCache>>) -> Option<Arc<LayerContent>> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let all = by_key.entry(key).or_default();
        let in_use: Vec<Arc<LayerContent>> = all.iter().filter_map(Weak::upgrade).collect();
        if !in_use.is_empty() {
            let lent = in_use
                .into_iter()
                .find(|content| content.is_constant() && content.stays_constant())?;
            lent.lent.store(true, Ordering::Release);
            return Some(lent);
        }
        let kept = store?.kept(key).ok()?;
        let count = chunk::chunk_count(kept.size())?;
        let lent = Arc::new(LayerContent {
            memory: self.memory.layer(count),
            early: EarlyChunks::new(count),
            cache: OnceLock::from(kept),
            checked: None,
            stored: true,
            rules: None,
            lent: AtomicBool::new(true),
            revoked: AtomicBool::new(false),
            users: AtomicUsize::new(0),
            alone: Mutex::default(),
            remembered: None,
        });
        all.push(Arc::downgrade(&lent));
        Some(lent)
    }

    fn make(
        &self,
        source: &LayerSource,
        stored: bool,
        rules: Option<ByteRules>,
        cache: Option<Result<Arc<LayerCache>, DiskCacheError>>,
        named: Option<LayerKey>,
    ) -> ContentUse {
        let cache = match cache {
            Some(Ok(cache)) => OnceLock::from(cache),
            Some(Err(error)) => {
                log::warn!("{error}; going on without a cache");
                OnceLock::new()
            }
            None => OnceLock::new(),
        };
        let count = chunk::chunk_count(source.size()).unwrap_or(u32::MAX);
        let known = match rules.as_ref().map(|rules| &rules.digests).zip(named.zip(cache.get())) {
            Some((Some(VerifierDigests::Chunks(digests)), (key, cache))) => {
                verified::kept(digests, cache, count).or_else(|| self.verified.recall(key, digests, cache))
            }
            _ => None,
        };
        let checked = || known.unwrap_or_else(|| Bits::new(count));
        ContentUse(Arc::new(LayerContent {
            memory: self.memory.layer(count),
            early: EarlyChunks::new(count),
            cache,
            checked: source.verifier.is_some().then(checked),
            stored,
            rules,
            lent: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
            users: AtomicUsize::new(1),
            alone: Mutex::default(),
            remembered: named.map(|key| (key, Arc::clone(&self.verified))),
        }))
    }
}

/// The cache of the layer with this key.
fn cache_of(source: &LayerSource, key: LayerKey, store: &Arc<DiskCache>) -> Result<Arc<LayerCache>, DiskCacheError> {
    let cache = store.layer(key, source.size())?;
    let digest = source.layer.digest.as_ref().map(ToString::to_string);
    cache.describe(&source.layer.blob.name, &digest.unwrap_or_default());
    Ok(cache)
}
