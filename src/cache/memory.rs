//! The memory cache. In: chunks as they arrive. Out: the same to anybody who asks, from any
//! thread, under a lock held for a hash lookup.
//!
//! Bounded by CLOCK: a hand goes round and takes what was not read since it last passed. A chunk on loan in a
//! [`Slice`](super::Slice) outlives its eviction.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

use super::chunk::{Chunk, ChunkKey};
use crate::units::{CHUNK_BYTES, len_usize};

/// Chunks that lie side by side share a shard, so that a read over several of them takes its lock once or twice.
const NEIGHBOURHOOD_BITS: u32 = 3;
const MOST_SHARDS: usize = 16;

/// Chunks in memory, by key, in up to [`MOST_SHARDS`] shards with a lock each.
#[derive(Debug)]
pub(crate) struct MemoryCache {
    shards: Box<[Mutex<Shard>]>,
}

#[derive(Debug)]
struct Shard {
    /// Slot numbers by the hash of their key.
    by_key: HashTable<usize>,
    slots: Vec<(ChunkKey, Arc<Chunk>)>,
    capacity: usize,
    hand: usize,
}

/// Spreads a key over 64 bits. Keys come from the layout of a layer; colliding them harms their own reader alone.
fn hash(key: ChunkKey) -> u64 {
    let mixed = ((u64::from(key.layer.0) << 32) | u64::from(key.index)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 29)
}

impl MemoryCache {
    /// A cache of at most `bytes` bytes, and of at least 8 chunks.
    pub(crate) fn new(bytes: u64) -> Self {
        let chunks = len_usize(bytes / CHUNK_BYTES).max(8);
        let count = (chunks / 64).clamp(1, MOST_SHARDS);
        let shard = || {
            Mutex::new(Shard {
                by_key: HashTable::new(),
                slots: Vec::new(),
                capacity: chunks.div_ceil(count),
                hand: 0,
            })
        };
        Self {
            shards: std::iter::repeat_with(shard).take(count).collect(),
        }
    }

    fn shard(&self, key: ChunkKey) -> MutexGuard<'_, Shard> {
        let spread = hash(ChunkKey {
            layer: key.layer,
            index: key.index >> NEIGHBOURHOOD_BITS,
        }) >> 40;
        let at = len_usize(spread) % self.shards.len();
        // A holder that panicked cannot have left a shard half changed in a way that matters: slots and table are
        // looked at again by key.
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunk, if it is here. Not a use: the caller says so with [`Chunk::touch`].
    pub(crate) fn get(&self, key: ChunkKey) -> Option<Arc<Chunk>> {
        self.shard(key).get(key)
    }

    pub(crate) fn holds(&self, key: ChunkKey) -> bool {
        let shard = self.shard(key);
        shard.slot(key).is_some()
    }

    /// Keeps `chunk` and hands back what had to leave for it. What leaves is dropped by the caller, outside the lock.
    pub(crate) fn insert(&self, key: ChunkKey, chunk: Arc<Chunk>) -> Option<Arc<Chunk>> {
        self.shard(key).insert(key, chunk)
    }
}

impl Shard {
    fn slot(&self, key: ChunkKey) -> Option<usize> {
        self.by_key.find(hash(key), |&slot| self.slots[slot].0 == key).copied()
    }

    fn get(&self, key: ChunkKey) -> Option<Arc<Chunk>> {
        self.slot(key).map(|slot| self.slots[slot].1.clone())
    }

    fn insert(&mut self, key: ChunkKey, chunk: Arc<Chunk>) -> Option<Arc<Chunk>> {
        if let Some(slot) = self.slot(key) {
            return Some(std::mem::replace(&mut self.slots[slot].1, chunk));
        }
        if self.slots.len() < self.capacity {
            let slots = &self.slots;
            self.by_key
                .insert_unique(hash(key), slots.len(), |&slot| hash(slots[slot].0));
            self.slots.push((key, chunk));
            return None;
        }
        let slot = self.victim();
        let old_key = self.slots[slot].0;
        if let Ok(entry) = self.by_key.find_entry(hash(old_key), |&at| at == slot) {
            entry.remove();
        }
        let slots = &self.slots;
        self.by_key.insert_unique(hash(key), slot, |&slot| hash(slots[slot].0));
        Some(std::mem::replace(&mut self.slots[slot], (key, chunk)).1)
    }

    /// The next slot whose chunk went unread for a whole round; after two rounds whatever is under the hand.
    fn victim(&mut self) -> usize {
        for _ in 0..2 * self.slots.len() {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            if !self.slots[slot].1.cool() {
                return slot;
            }
        }
        self.hand
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::LayerId;

    fn key(index: u32) -> ChunkKey {
        ChunkKey {
            layer: LayerId(0),
            index,
        }
    }

    fn chunk(n: u8) -> Arc<Chunk> {
        Arc::new(Chunk::demanded(vec![n; 4]))
    }

    #[test]
    fn holds_no_more_than_its_bound() {
        let memory = MemoryCache::new(16 * CHUNK_BYTES);
        for n in 0..100u8 {
            memory.insert(key(n.into()), chunk(n));
        }
        let held = (0..100).filter(|&n| memory.holds(key(n))).count();
        assert_eq!(held, 16);
        assert!(memory.holds(key(99)));
    }

    #[test]
    fn what_is_read_stays_and_a_scan_passes_by() {
        let memory = MemoryCache::new(16 * CHUNK_BYTES);
        for n in 0..4u8 {
            memory.insert(key(n.into()), chunk(n));
        }
        for n in 4..200u8 {
            for hot in 0..4 {
                memory.get(key(hot)).expect("a chunk in use was evicted").touch();
            }
            memory.insert(key(n.into()), chunk(n));
        }
    }

    #[test]
    fn agrees_with_a_plain_map_while_nothing_is_evicted() {
        let memory = MemoryCache::new(4096 * CHUNK_BYTES);
        for layer in 0..3u32 {
            for index in 0..500u32 {
                let byte = u8::try_from((layer * 7 + index) % 251).unwrap();
                memory.insert(
                    ChunkKey {
                        layer: LayerId(layer),
                        index,
                    },
                    chunk(byte),
                );
            }
        }
        for layer in 0..3u32 {
            for index in 0..500u32 {
                let found = memory
                    .get(ChunkKey {
                        layer: LayerId(layer),
                        index,
                    })
                    .unwrap();
                assert_eq!(u32::from(found.bytes()[0]), (layer * 7 + index) % 251);
            }
        }
        assert!(
            memory
                .get(ChunkKey {
                    layer: LayerId(3),
                    index: 0
                })
                .is_none()
        );
    }

    #[test]
    fn replacing_keeps_one_copy() {
        let memory = MemoryCache::new(16 * CHUNK_BYTES);
        assert!(memory.insert(key(1), chunk(1)).is_none());
        assert_eq!(memory.insert(key(1), chunk(2)).unwrap().bytes()[0], 1);
        assert_eq!(memory.get(key(1)).unwrap().bytes()[0], 2);
    }
}
