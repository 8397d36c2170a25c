//! Whole layers for the kernel to keep as they are. In: a layer all of which is in the disk cache, and that has digests. Out: the same,
//! protected where the filesystem has that: later processes need not compare it again.
//!
//! It takes reading all of the layer twice, so it is done in the background, once in a layer's life, and not while a program starts.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::disk::NOT_AS_WRITTEN;
use super::{Engine, LayerState};
use crate::cache::chunk::ChunkKey;
use crate::cache::disk::Protected;
use crate::fetch::blob::VerifierDigests;
use crate::fetch::runtime::{self, sleep};
use crate::fetch::verified;
use crate::units::LayerId;

/// So long after all of a layer is here, or a device of it was attached, starting programs have had their turn.
const DELAY: Duration = Duration::from_secs(10);

impl Engine {
    /// Called whenever all of a layer may be in the disk cache.
    pub(super) fn protect_if_complete(self: &Rc<Self>, state: &Rc<LayerState>, layer: LayerId) {
        let is_due = move |engine: &Self| {
            let cache = engine.cache(layer);
            engine.poison_of(layer).is_none() && cache.is_some_and(|cache| cache.may_be_protected())
        };
        let Some(verifier) = state.verifier.clone() else { return };
        let Some(VerifierDigests::Chunks(digests)) = verifier.digests() else {
            return;
        };
        if !is_due(self) || state.protecting.replace(true) {
            return;
        }
        let (engine, state) = (self.clone(), state.clone());
        self.spawn(async move {
            sleep(DELAY).await;
            // One reader of all of it at a time.
            while state.verifying_whole.get() {
                sleep(DELAY).await;
            }
            if is_due(&engine)
                && let Some(cache) = engine.cache(layer).map(Arc::clone)
            {
                let (give, take) = tokio::sync::oneshot::channel();
                let thread = runtime::background("tarblk-protect", move || {
                    let is_wanted = || !give.is_closed();
                    let outcome = cache.protect(verified::fingerprint(&digests), &mut |index, bytes| {
                        is_wanted().then(|| verifier.matches(index, bytes))
                    });
                    // The fetcher may be gone.
                    let _engine_is_gone = give.send(outcome);
                });
                match (thread, take.await) {
                    (Err(error), _) | (_, Ok(Err(error))) => {
                        log::debug!("{}: it cannot be protected: {error}", state.origin.name());
                    }
                    (_, Ok(Ok(Protected::Yes))) => engine.mark_all_verified(layer),
                    (_, Ok(Ok(Protected::Wrong(index)))) => {
                        engine.drop_cached(&state, ChunkKey { layer, index }, NOT_AS_WRITTEN);
                    }
                    (_, Ok(Ok(Protected::No)) | Err(_)) => {}
                }
            }
            state.protecting.set(false);
        });
    }
}
