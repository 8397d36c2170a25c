//! The door by which a fetcher is told, at any time, what its layers have in common with others. In: payloads and the names of layers
//! that have them. Out: a table that readers look in ([`dedup`](super::dedup)).

use std::fmt;
use std::sync::{Arc, Weak};

use super::Fetcher;
use super::content::LayerContent;
use super::dedup::{DedupTable, MOST_DONORS, SharedPayloads};
use super::pool::{FetchPool, WeakPool};
use super::shared::{Shared, SharedLayer};
use crate::cache::disk::LayerKey;
use crate::units::LayerId;

/// Tells a fetcher what its layers have in common with others, without keeping it.
#[derive(Clone)]
pub struct Deduplicator {
    shared: Weak<Shared>,
    pool: WeakPool,
}

impl fmt::Debug for Deduplicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deduplicator").finish_non_exhaustive()
    }
}

impl Fetcher {
    /// A way to tell it later what its layers have in common with others.
    #[must_use]
    pub fn deduplicator(&self) -> Deduplicator {
        Deduplicator {
            shared: Arc::downgrade(&self.shared),
            pool: self.pool.downgrade(),
        }
    }
}

impl Deduplicator {
    /// Whether the fetcher is gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.strong_count() == 0
    }

    /// From now on a layer's bytes are looked for at its donors as well. Says how many bytes of files that may be; none when the fetcher is
    /// gone, the layer is not fetched, or it was told too often.
    #[must_use]
    pub fn share(&self, layer: LayerId, payloads: &SharedPayloads) -> Option<u64> {
        let (shared, pool) = (self.shared.upgrade()?, self.pool.upgrade()?);
        let Some(SharedLayer::Fetched(fetched)) = shared.layers.get(usize::try_from(layer.0).ok()?) else {
            return None;
        };
        let donors = payloads
            .donors
            .iter()
            .take(MOST_DONORS)
            .map(|key| pool.lend(*key))
            .collect();
        let table = DedupTable::new(fetched.size, donors, payloads, fetched.content.has_chunk_digests());
        let bytes = table.bytes();
        (bytes > 0 && fetched.dedup.add(table)).then_some(bytes)
    }
}

impl FetchPool {
    /// What is held of the layer that the cache knows by this name.
    fn lend(&self, key: LayerKey) -> Option<Arc<LayerContent>> {
        self.contents().lend(key, self.store())
    }
}
