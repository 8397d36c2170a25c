//! Verifying chunks and whole layers. In: chunks as they come, and digests of whole layers. Out: chunks whose digest matches; of a
//! layer that keeps mismatching, nothing any more.
//!
//! Chunk digests are SHA-256 cut to their first 20 bytes, as the index holds them ([`crate::index`]'s `digests`); whole layers and
//! the pieces of tables of contents have all 32.
//!
//! A chunk is checked before anybody sees it: on a worker thread, unless a short read waits for it alone. A wrong one is fetched
//! again, from where the layer comes from and not from where a redirect led before, because machines on the way fail for a while.
//! When it was wrong in several answers over a time (`FetchOptions::wrong_for`), it is the layer (or its index) that is wrong: it
//! is poisoned, reads of it fail, and what the disk cache holds of it is deleted.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::Instant;

use super::disk::NOT_AS_WRITTEN;
use super::flight::{Backoff, LOOK_AT_READERS, PROOF_TRIES};
use super::layer_state::Mismatch;
use super::origin::Trouble;
use super::{Engine, LayerState, Origin};
use crate::cache::chunk::ChunkKey;
use crate::cache::disk::LayerCache;
use crate::fetch::runtime::{self, sleep};
use crate::fetch::shared::SharedLayer;
use crate::fetch::stats::add;
use crate::fetch::{FetchError, Verifier};
use crate::units::{CHUNK_BYTES, LayerId, TarRange};

/// Before a chunk is fetched for the third time; doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// What it doubles up to.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Engine {
    pub(super) fn count_verified(&self, state: &LayerState) {
        if state.verifier.is_some() {
            add(&self.counters.chunks_checked, 1);
        }
    }

    /// Chunks have come as they are, in this order, all of their bytes from `since` on; each is brought once it was checked.
    pub(super) fn verify_and_deliver(self: &Rc<Self>, mut chunks: Vec<(ChunkKey, Vec<u8>)>, since: Instant) {
        let Some(state) = chunks.first().and_then(|(key, _)| self.layer(key.layer)) else {
            return;
        };
        // What is checked piece by piece was checked before it was cut.
        let Some(Verifier::Chunks(check)) = &state.verifier else {
            for (key, bytes) in chunks {
                self.count_verified(state);
                self.deliver(key, bytes, true);
            }
            return;
        };
        // Waking a thread and being woken by it takes longer than a digest, and a short read waits for nothing else.
        let at_once = |(key, _): &&(ChunkKey, Vec<u8>)| self.in_flight.has_short_reader(*key);
        let others = chunks.split_off(chunks.iter().take_while(at_once).count());
        for (key, bytes) in std::mem::replace(&mut chunks, others) {
            self.count_verified(state);
            let right = check.matches(key.index, &bytes);
            self.deliver_if_verified(state, key, right, bytes, since);
        }
        if chunks.is_empty() {
            return;
        }
        let keys: Vec<ChunkKey> = chunks.iter().map(|(key, _)| *key).collect();
        state.verifying.borrow_mut().extend(keys.iter().map(|key| key.index));
        let (engine, state, check) = (self.clone(), state.clone(), check.clone());
        self.spawn(async move {
            let permit = engine.workers.clone().acquire_owned().await.ok();
            let (give, mut take) = unbounded_channel();
            runtime::blocking(move || {
                let _permit = permit;
                for (key, bytes) in chunks {
                    // The engine may be gone.
                    let _gone = give.send((check.matches(key.index, &bytes), bytes));
                }
            });
            for key in keys {
                // In the order that they were given in; a worker that died has found nothing right.
                let (right, bytes) = take.recv().await.unwrap_or_default();
                state.verifying.borrow_mut().remove(&key.index);
                engine.count_verified(&state);
                engine.deliver_if_verified(&state, key, right, bytes, since);
            }
        });
    }

    /// A chunk was checked: it is brought if it was right.
    fn deliver_if_verified(
        self: &Rc<Self>,
        state: &Rc<LayerState>,
        key: ChunkKey,
        right: bool,
        bytes: Vec<u8>,
        since: Instant,
    ) {
        if right {
            Self::digest_matched(state, key.index);
            self.deliver(key, bytes, true);
            return;
        }
        let why = "it is not what the index says";
        match self.digest_mismatched(state, key, since, why) {
            // Poisoned: its readers were told.
            Err(_) => {}
            Ok(Duration::ZERO) => self.fetch_again(key),
            Ok(pause) => {
                let (engine, state) = (self.clone(), state.clone());
                self.spawn(async move {
                    engine.wait_with_readers(&state, key, why, pause).await;
                    engine.fetch_again(key);
                });
            }
        }
    }

    /// Waits for `pause` before a chunk is fetched again that was wrong; readers whose deadline ends meanwhile are told.
    async fn wait_with_readers(self: &Rc<Self>, state: &LayerState, key: ChunkKey, why: &str, pause: Duration) {
        let name = state.origin.name();
        let range = TarRange::new(key.start(), CHUNK_BYTES);
        let late = self.late(state, range, &Trouble::Wrong(why.to_owned()));
        self.in_flight.note_trouble(key.into(), &late);
        let mut backoff = Backoff::new(self.options.wrong_for);
        backoff.note(&name, why, pause);
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            self.expire(key.into(), left, &late);
            if left.is_zero() || self.stopping.get() {
                return;
            }
            sleep(left.min(LOOK_AT_READERS)).await;
        }
    }

    /// Fetches a chunk that was lost on its way.
    pub(super) fn fetch_again(self: &Rc<Self>, key: ChunkKey) {
        self.in_flight.set_absent(key);
        self.end_bringing(key, None);
        if !self.stopping.get() {
            self.launch(&[key.into()]);
        }
    }

    /// Something about a chunk was wrong, all of which came from `came` on. How long to wait before it is fetched again: at first not at
    /// all. When it was wrong for long and in several answers, the layer is poisoned, which is the error; what was wrong came at
    /// `came`, for all that is known, however long it lay here until the rest of its chunk was there. A local file is poisoned the second
    /// time: nothing is between it and its reader that may pass.
    pub(super) fn digest_mismatched(
        self: &Rc<Self>,
        state: &LayerState,
        key: ChunkKey,
        came: Instant,
        why: &str,
    ) -> Result<Duration, FetchError> {
        add(&self.counters.chunks_wrong, 1);
        if let Some(error) = self.poison_of(key.layer) {
            return Err(error);
        }
        let name = state.origin.name();
        let mut mismatched = state.mismatched.borrow_mut();
        let Mismatch { since, answers } = mismatched.entry(key.index).or_insert_with(|| Mismatch::new(came));
        *answers += 1;
        let (over, answers) = (came.saturating_duration_since(*since), *answers);
        drop(mismatched);
        let proven = match &state.origin {
            Origin::File { .. } => answers > 1,
            Origin::Http(layer) => {
                layer.distrust();
                answers >= PROOF_TRIES && over >= self.options.wrong_for
            }
        };
        if proven {
            return Err(self.poison(
                key.layer,
                &format!(
                    "chunk {} was wrong in {answers} answers over {over:.0?}: {why}",
                    key.index
                ),
            ));
        }
        let pause = match answers {
            1 => Duration::ZERO,
            more => LONGEST_PAUSE.min(FIRST_PAUSE.saturating_mul(1_u32.checked_shl(more - 2).unwrap_or(u32::MAX))),
        };
        log::warn!("{name}: chunk {}: {why}; fetching it again in {pause:.1?}", key.index);
        Ok(pause)
    }

    /// A chunk came right.
    pub(super) fn digest_matched(state: &LayerState, index: u32) {
        if !state.mismatched.borrow().is_empty() {
            state.mismatched.borrow_mut().remove(&index);
        }
    }

    pub(super) fn poison_of(&self, layer: LayerId) -> Option<FetchError> {
        self.fetched(layer)?.poison.get().cloned()
    }

    /// Gives up a layer for good: whoever waits for it and whoever will is told why.
    pub(super) fn poison(self: &Rc<Self>, layer: LayerId, why: &str) -> FetchError {
        let name = self.layer(layer).map_or_else(String::new, |state| state.origin.name());
        let error = FetchError::Poisoned {
            name,
            why: why.to_owned(),
        };
        // What is held was right by the digests that other devices go by as well: only this one's server has something else.
        if let Some(shared) = self.fetched(layer)
            && !shared.content.is_shared()
            && let Some(cache) = shared.content.cache.get()
        {
            cache.poison();
        }
        self.poison_as(layer, error)
    }

    /// The same after the whole was found to be something else: what is held of it is let go of, also for other devices.
    fn poison_whole(self: &Rc<Self>, layer: LayerId, why: &str) {
        if let Some(shared) = self.fetched(layer) {
            if let Some(cache) = shared.content.cache.get() {
                cache.poison();
            }
            shared.content.memory.clear();
        }
        let error = self.poison(layer, why);
        self.tell_of_poison(layer, &error);
    }

    /// Gives up a layer for this reason.
    pub(super) fn poison_as(self: &Rc<Self>, layer: LayerId, error: FetchError) -> FetchError {
        let Some(shared) = self.fetched(layer) else {
            return error;
        };
        if shared.poison.set(error.clone()).is_ok() {
            log::error!("{error}");
            add(&self.counters.layers_poisoned, 1);
        }
        if let Some(state) = self.layer(layer) {
            self.give_up(state.all(layer), &error);
        }
        error
    }

    /// The whole layer has passed by: is it what it has to be?
    pub(super) fn verify_whole(
        self: &Rc<Self>,
        state: &LayerState,
        layer: LayerId,
        blob: Option<[u8; 32]>,
        tar: [u8; 32],
    ) {
        let differs = |expected: Option<[u8; 32]>, found| expected.is_some_and(|expected| expected != found);
        let blob_known = blob.is_some() && state.whole.blob.is_some();
        if blob.is_some_and(|blob| differs(state.whole.blob, blob)) {
            self.poison_whole(layer, "the blob's SHA-256 is not the manifest's");
        } else if state.is_whole_tar() && differs(state.whole.tar, tar) {
            self.poison_whole(layer, "the tar's SHA-256 is not the image's diffID");
        } else if (blob_known || (state.is_whole_tar() && state.whole.tar.is_some()))
            && let Some(cache) = self.cache(layer)
            && !state.verifying_whole.get()
        {
            state.whole_verified.set(true);
            if cache.is_whole() {
                cache.seal();
            }
        }
    }

    /// Gives up all of the device: an index of it lies, so what it shows of any layer is not to be believed.
    fn poison_device(self: &Rc<Self>, layer: LayerId, why: &str) {
        let name = self.layer(layer).map_or_else(String::new, |state| state.origin.name());
        let error = FetchError::Poisoned {
            name,
            why: why.to_owned(),
        };
        // First what threads that do not wait look at.
        let _only_once = self.shared.poison.set(error.clone());
        self.poison_as(layer, error.clone());
        for (other, shared) in (0..).map(LayerId).zip(&self.shared.layers) {
            if let (SharedLayer::Fetched(shared), Some(state)) = (shared, self.layer(other))
                && shared.poison.set(error.clone()).is_ok()
            {
                self.give_up(state.all(other), &error);
            }
        }
    }

    /// After something was written, and when a layer is opened or was streamed: when all of it is here, its tar is digested in the
    /// background, once, and compared with its index if nothing but somebody's word stands for that.
    pub(super) fn verify_if_complete(self: &Rc<Self>, state: &Rc<LayerState>, layer: LayerId) {
        let Some(cache) = self.cache(layer) else { return };
        if cache.is_borrowed() || cache.is_poisoned() || !cache.is_whole() || self.poison_of(layer).is_some() {
            return;
        }
        if state.whole_verified.get() && !cache.is_sealed() {
            cache.seal();
        }
        self.protect_if_complete(state, layer);
        // A stream under way will say the digest itself.
        let comes_by_stream = state.streaming.get() && !state.whole_verified.get();
        let is_digested = !cache.is_sealed() && state.whole.tar.is_some() && state.is_whole_tar();
        let unproven = state.unproven.borrow().clone();
        if comes_by_stream || !(is_digested || unproven.is_some()) || state.verifying_whole.replace(true) {
            return;
        }
        let (give, take) = tokio::sync::oneshot::channel();
        let (whole, check) = (Arc::clone(cache), state.verifier.clone());
        let thread = runtime::background("tarblk-seal", move || {
            let verdict = is_digested
                .then(|| digest_whole(&whole, check.as_ref(), &|| give.is_closed()))
                .transpose()
                .and_then(|tar| {
                    let lie = unproven.map(|index| index.compare(&whole)).transpose()?.flatten();
                    Ok((tar, lie))
                });
            // The fetcher may be gone.
            let _engine_is_gone = give.send(verdict);
        });
        if let Err(error) = thread {
            state.verifying_whole.set(false);
            log::warn!("cannot check the whole layer: {error}");
            return;
        }
        let (engine, state) = (self.clone(), state.clone());
        self.spawn(async move {
            let verdict = take.await;
            state.verifying_whole.set(false);
            let (tar, lie) = match verdict {
                Ok(Ok(verdict)) => verdict,
                // What the disk spoiled is not the layer's fault.
                Ok(Err(index)) => return engine.drop_cached(&state, ChunkKey { layer, index }, NOT_AS_WRITTEN),
                Err(_) => return,
            };
            if let Some(tar) = tar {
                engine.verify_whole(&state, layer, None, tar);
            }
            // Of bytes that are not the layer's nothing follows for its index.
            if engine.poison_of(layer).is_some() {
                return;
            }
            let Some(unproven) = state.unproven.take() else { return };
            match lie {
                Some(why) => {
                    unproven.discard();
                    engine.poison_device(layer, &why);
                }
                None => log::info!("{}: its headers say what its index says", state.origin.name()),
            }
        });
    }
}

/// The SHA-256 of all of a layer, as long as it is wanted.
///
/// # Errors
/// The number of a chunk that could not be read, or is not right.
fn digest_whole(whole: &LayerCache, check: Option<&Verifier>, is_unwanted: &dyn Fn() -> bool) -> Result<[u8; 32], u32> {
    let mut hash = Sha256::new();
    let mut wrong = None;
    whole.read_whole(&mut |index, bytes| {
        let right = |bytes: &&[u8]| check.is_none_or(|check| check.matches(index, bytes));
        match bytes.filter(right) {
            Some(bytes) => hash.update(bytes),
            None => wrong = Some(index),
        }
        wrong.is_none() && !is_unwanted()
    });
    wrong.map_or_else(|| Ok(hash.finalize().into()), Err)
}
