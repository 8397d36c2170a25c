//! The memory cache. In: chunks of any layer, as they arrive. Out: the same to anybody who asks, from any
//! thread, under a lock held for a hash lookup.
//!
//! One for all devices of a process, with one bound, and a smaller one for chunks that the disk cache has as well: those leave
//! first, because the kernel keeps in its page cache what is read of them, and memory that it can take back is better than ours. Bounded
//! by CLOCK: a hand goes round and takes what was not read since it last passed. A chunk on loan in a [`Slice`](super::Slice) outlives its
//! eviction. Each layer has a handle, [`MemoryLayer`], and its chunks leave with it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

use super::chunk::Chunk;
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// Chunks that lie side by side share a shard, so that a read over several of them takes its lock once or twice.
const NEIGHBOURHOOD_BITS: u32 = 3;
const MOST_SHARDS: usize = 16;
/// What chunks that the disk has as well may take, where the whole is this or more...
const STORED_BYTES: u64 = 8 << 20;
/// ...and not so many times as much.
const STORED_SHARE: u64 = 64;

/// A layer's number in the memory cache. Every [`MemoryLayer`] has another one, whatever its device calls the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryLayerId(u32);

/// Which chunk of which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryKey {
    layer: MemoryLayerId,
    index: u32,
}

/// Chunks in memory, by key, in up to [`MOST_SHARDS`] shards with a lock each.
#[derive(Debug)]
pub(crate) struct MemoryCache {
    shards: Box<[Mutex<Shard>]>,
    next_layer: AtomicU32,
}

/// A layer's chunks in memory. Dropping it gives back what they take.
#[derive(Debug)]
pub(crate) struct MemoryLayer {
    memory: Arc<MemoryCache>,
    id: MemoryLayerId,
    /// How many chunks it has.
    count: u32,
}

#[derive(Debug)]
struct Shard {
    /// Slot numbers by the hash of their key.
    by_key: HashTable<usize>,
    slots: Vec<Slot>,
    /// The most slots.
    capacity: usize,
    /// How many slots hold a chunk that the disk has as well...
    stored: usize,
    /// ...and how many may.
    stored_capacity: usize,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    key: MemoryKey,
    chunk: Arc<Chunk>,
    /// Whether the disk has it as well, or had it.
    stored: bool,
}

/// Spreads a key over 64 bits. Keys come from the layout of a layer; colliding them harms its own readers most.
fn hash(key: MemoryKey) -> u64 {
    let mixed = ((u64::from(key.layer.0) << 32) | u64::from(key.index)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 29)
}

impl MemoryCache {
    /// A cache of at most `bytes` bytes, and of at least 8 chunks.
    pub(crate) fn new(bytes: u64) -> Self {
        let chunks = len_usize(bytes / CHUNK_BYTES).max(8);
        let stored = len_usize((bytes / STORED_SHARE).max(STORED_BYTES) / CHUNK_BYTES).min(chunks);
        let count = (chunks / 64).clamp(1, MOST_SHARDS);
        let shard = || {
            Mutex::new(Shard {
                by_key: HashTable::new(),
                slots: Vec::new(),
                capacity: chunks.div_ceil(count),
                stored: 0,
                stored_capacity: stored.div_ceil(count),
                hand: 0,
            })
        };
        Self {
            shards: std::iter::repeat_with(shard).take(count).collect(),
            next_layer: AtomicU32::new(0),
        }
    }

    /// A place for the chunks of a layer that has `count` of them.
    pub(crate) fn layer(self: &Arc<Self>, count: u32) -> MemoryLayer {
        MemoryLayer {
            memory: Arc::clone(self),
            id: MemoryLayerId(self.next_layer.fetch_add(1, Ordering::Relaxed)),
            count,
        }
    }

    /// The bytes of all chunks that are here.
    pub(crate) fn bytes_held(&self) -> u64 {
        let of_shard = |shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = shard.slots.iter().map(|slot| len_u64(slot.chunk.bytes().len()));
            bytes.sum::<u64>()
        };
        self.shards.iter().map(of_shard).sum()
    }

    fn shard(&self, key: MemoryKey) -> MutexGuard<'_, Shard> {
        let spread = hash(MemoryKey {
            layer: key.layer,
            index: key.index >> NEIGHBOURHOOD_BITS,
        }) >> 40;
        let at = len_usize(spread) % self.shards.len();
        // A holder that panicked cannot have left a shard half changed in a way that matters: slots and table are
        // looked at again by key.
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryLayer {
    fn key(&self, index: u32) -> MemoryKey {
        MemoryKey { layer: self.id, index }
    }

    /// Its number: no other layer of the process has had it.
    pub(crate) fn number(&self) -> u32 {
        self.id.0
    }

    /// Chunk `index`, if it is here. Not a use: the caller says so with [`Chunk::touch`].
    pub(crate) fn get(&self, index: u32) -> Option<Arc<Chunk>> {
        let key = self.key(index);
        self.memory.shard(key).get(key)
    }

    /// Whether chunk `index` is here.
    pub(crate) fn holds(&self, index: u32) -> bool {
        let key = self.key(index);
        let shard = self.memory.shard(key);
        shard.slot(key).is_some()
    }

    /// Keeps `chunk`, which the disk has as well if it is `stored`. Another one may have to leave for it.
    pub(crate) fn insert(&self, index: u32, chunk: Arc<Chunk>, stored: bool) {
        let key = self.key(index);
        // Dropped behind the lock.
        let _gone = self.memory.shard(key).insert(key, chunk, stored);
    }

    /// The disk has chunk `index` as well from now on. If it is here, it or another such one may have to leave.
    pub(crate) fn stored(&self, index: u32) {
        let key = self.key(index);
        // Dropped behind the lock.
        let _gone = self.memory.shard(key).set_stored(key);
    }

    /// Lets go of chunk `index`.
    pub(crate) fn forget(&self, index: u32) {
        let key = self.key(index);
        // Dropped behind the lock.
        let _gone = self.memory.shard(key).remove(key);
    }

    /// Lets go of all its chunks.
    pub(crate) fn clear(&self) {
        let held = |shard: &Mutex<Shard>| shard.lock().unwrap_or_else(PoisonError::into_inner).slots.len();
        let slots: usize = self.memory.shards.iter().map(held).sum();
        let mut gone = Vec::new();
        if len_u64(slots) < u64::from(self.count) {
            for shard in &self.memory.shards {
                let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                let own = |slot: &Slot| (slot.key.layer == self.id).then_some(slot.key);
                let keys: Vec<MemoryKey> = shard.slots.iter().filter_map(own).collect();
                gone.extend(keys.into_iter().filter_map(|key| shard.remove(key)));
            }
        } else {
            let keys = (0..self.count).map(|index| self.key(index));
            gone.extend(keys.filter_map(|key| self.memory.shard(key).remove(key)));
        }
        // Dropped here, outside the locks.
        drop(gone);
    }
}

impl Drop for MemoryLayer {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Shard {
    fn slot(&self, key: MemoryKey) -> Option<usize> {
        self.by_key
            .find(hash(key), |&slot| self.slots[slot].key == key)
            .copied()
    }

    fn get(&self, key: MemoryKey) -> Option<Arc<Chunk>> {
        self.slot(key).map(|slot| self.slots[slot].chunk.clone())
    }

    /// Keeps a chunk and hands back what leaves: the one with the same key, or one that there is no room for.
    fn insert(&mut self, key: MemoryKey, chunk: Arc<Chunk>, stored: bool) -> Option<Arc<Chunk>> {
        let same = self.remove(key);
        let full = self.slots.len() >= self.capacity || (stored && self.stored >= self.stored_capacity);
        let gone = if full { self.evict() } else { None };
        let slots = &self.slots;
        self.by_key
            .insert_unique(hash(key), slots.len(), |&slot| hash(slots[slot].key));
        self.slots.push(Slot { key, chunk, stored });
        self.stored += usize::from(stored);
        same.or(gone)
    }

    /// Notes that the disk has a chunk as well, and hands back what leaves.
    fn set_stored(&mut self, key: MemoryKey) -> Option<Arc<Chunk>> {
        let slot = self.slot(key)?;
        if !std::mem::replace(&mut self.slots[slot].stored, true) {
            self.stored += 1;
        }
        if self.stored > self.stored_capacity {
            self.evict()
        } else {
            None
        }
    }

    fn remove(&mut self, key: MemoryKey) -> Option<Arc<Chunk>> {
        let number = match self.by_key.find_entry(hash(key), |&slot| self.slots[slot].key == key) {
            Ok(entry) => entry.remove().0,
            Err(_) => return None,
        };
        let gone = self.slots.swap_remove(number);
        self.stored -= usize::from(gone.stored);
        // What was last has its number now.
        if let Some(moved) = self.slots.get(number)
            && let Some(its) = self.by_key.find_mut(hash(moved.key), |&its| its == self.slots.len())
        {
            *its = number;
        }
        if self.hand >= self.slots.len() {
            self.hand = 0;
        }
        Some(gone.chunk)
    }

    /// Takes out the next chunk that went unread for a whole round, or after two rounds whatever is under the hand: among those
    /// that the disk has as well, if there are any.
    fn evict(&mut self) -> Option<Arc<Chunk>> {
        let only_stored = self.stored > 0;
        let mut last = None;
        for _ in 0..2 * self.slots.len() {
            let number = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &self.slots[number];
            if only_stored && !slot.stored {
                continue;
            }
            last = Some(slot.key);
            if !slot.chunk.cool() {
                break;
            }
        }
        self.remove(last?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(chunks: u64) -> Arc<MemoryCache> {
        Arc::new(MemoryCache::new(chunks * CHUNK_BYTES))
    }

    fn chunk(n: u8) -> Arc<Chunk> {
        Arc::new(Chunk::new(vec![n; 4]))
    }

    #[test]
    fn holds_no_more_than_its_bound() {
        let layer = memory(16).layer(100);
        for n in 0..100u8 {
            layer.insert(n.into(), chunk(n), false);
        }
        let held = (0..100).filter(|&n| layer.holds(n)).count();
        assert_eq!(held, 16);
        assert!(layer.holds(99));
    }

    #[test]
    fn what_is_read_stays_and_a_scan_passes_by() {
        let layer = memory(16).layer(200);
        for n in 0..4u8 {
            layer.insert(n.into(), chunk(n), false);
        }
        for n in 4..200u8 {
            for hot in 0..4 {
                layer.get(hot).expect("a chunk in use was evicted").touch();
            }
            layer.insert(n.into(), chunk(n), false);
        }
    }

    #[test]
    fn agrees_with_a_plain_map_while_nothing_is_evicted() {
        let memory = memory(4096);
        let layers = [0u8, 7, 14].map(|first| (first, memory.layer(500)));
        for (first, layer) in &layers {
            for index in 0..500u32 {
                let byte = u8::try_from((u32::from(*first) + index) % 251).unwrap();
                layer.insert(index, chunk(byte), false);
            }
        }
        for (first, layer) in &layers {
            for index in 0..500u32 {
                let found = layer.get(index).unwrap();
                assert_eq!(u32::from(found.bytes()[0]), (u32::from(*first) + index) % 251);
            }
        }
        assert!(memory.layer(500).get(0).is_none());
    }

    #[test]
    fn replacing_keeps_one_copy() {
        let layer = memory(16).layer(2);
        for stored in [false, true, false] {
            layer.insert(1, chunk(1), stored);
            layer.insert(1, chunk(2), !stored);
            assert_eq!(layer.get(1).unwrap().bytes()[0], 2);
            assert_eq!(layer.memory.bytes_held(), 4);
        }
    }

    #[test]
    fn what_the_disk_has_leaves_first() {
        let layer = memory(16).layer(100);
        for n in 0..16u8 {
            layer.insert(n.into(), chunk(n), n % 2 == 0);
            layer.get(n.into()).unwrap().touch();
        }
        // However recently it was read.
        for n in 16..24u8 {
            layer.insert(n.into(), chunk(n), false);
        }
        for n in 0..24 {
            assert_eq!(layer.holds(n), n % 2 == 1 || n >= 16, "{n}");
        }
        // Then any.
        layer.insert(99, chunk(99), false);
        assert_eq!((0..24).filter(|&n| layer.holds(n)).count(), 15);
    }

    #[test]
    fn what_the_disk_has_takes_no_more_than_its_own_bound() {
        let bound = u32::try_from(STORED_BYTES / CHUNK_BYTES).unwrap();
        let layer = memory(8 * u64::from(bound)).layer(8 * bound);
        let held = |layer: &MemoryLayer| (0..8 * bound).filter(|&n| layer.holds(n)).count();
        for n in 0..4 * bound {
            layer.insert(n, chunk(0), false);
        }
        assert_eq!(held(&layer), len_usize(u64::from(4 * bound)));
        // Half of them are written; some of that was read just now.
        for n in 0..2 * bound {
            if n % 8 == 0 {
                layer.get(n).unwrap().touch();
            }
            layer.stored(n);
        }
        assert!((2 * bound..4 * bound).all(|n| layer.holds(n)), "it is nowhere else");
        assert_eq!(held(&layer), len_usize(u64::from(3 * bound)));
        // What is read back from the disk is bounded as well, and what is forgotten makes room.
        for n in 4 * bound..6 * bound {
            layer.insert(n, chunk(0), true);
        }
        assert_eq!(held(&layer), len_usize(u64::from(3 * bound)));
        layer.clear();
        for n in 0..bound {
            layer.insert(n, chunk(0), true);
        }
        // The shards do not share evenly.
        assert!(held(&layer) > len_usize(u64::from(bound / 2)), "{}", held(&layer));
        // What is not here is no matter.
        layer.stored(7 * bound);
    }

    /// Layers come and go while chunks do, and what is found is always what a plain map has, or nothing.
    #[test]
    fn a_layer_takes_its_chunks_with_it_and_no_others() {
        for (chunks, count) in [(32, 200u32), (2048, 40)] {
            let memory = memory(chunks);
            let mut state = 88_172_645_463_325_252_u64;
            let mut random = |below: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                len_usize(state % len_u64(below))
            };
            let mut layers: Vec<MemoryLayer> = (0..6).map(|_| memory.layer(count)).collect();
            let mut model = std::collections::HashMap::new();
            for _ in 0..20_000 {
                let at = random(layers.len());
                let index = u32::try_from(random(len_usize(count.into()))).unwrap();
                let layer = &layers[at];
                match random(100) {
                    0 => {
                        model.retain(|(owner, _), _| *owner != layer.id.0);
                        layers[at] = memory.layer(count);
                        assert!((0..count).all(|index| !layers[at].holds(index)));
                    }
                    1..50 => {
                        let byte = u8::try_from(random(256)).unwrap();
                        layer.insert(index, chunk(byte), byte % 5 == 0);
                        if byte % 7 == 0 {
                            layer.stored(index);
                        }
                        model.insert((layer.id.0, index), byte);
                        assert_eq!(layer.get(index).unwrap().bytes()[0], byte);
                    }
                    _ => {
                        if let Some(found) = layer.get(index) {
                            assert_eq!(model.get(&(layer.id.0, index)), Some(&found.bytes()[0]));
                            found.touch();
                        } else if chunks > 1000 {
                            assert!(!model.contains_key(&(layer.id.0, index)), "it was lost");
                        }
                    }
                }
                assert!(memory.bytes_held() <= chunks * 4);
            }
            drop(layers);
            assert_eq!(memory.bytes_held(), 0);
        }
    }
}
