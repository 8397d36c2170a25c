//! The table of chunks in flight. In: readers that wait for a chunk, and requests that are to bring it. Out: of each chunk that
//! comes, or does not come, which readers are to be told.
//!
//! Invariant: a chunk that readers wait for stays in the table until it is taken out to be delivered or given up, so no reader
//! is forgotten. A chunk that is in the table and not `coming` has no request and is asked for by whoever looks next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::request::Request;
use crate::cache::chunk::ChunkKey;
use crate::fetch::FetchError;
use crate::prefetch::{ChunkRange, Presence};
use crate::units::LayerId;

/// A place in a read that a chunk fills.
pub(super) struct Waiter {
    pub(super) request: Rc<Request>,
    /// Which slot of the read.
    pub(super) slot: usize,
    /// The part of the chunk: its first byte, counted from the chunk's, ...
    pub(super) from: u64,
    /// ...and its length in bytes.
    pub(super) len: u64,
}

impl Waiter {
    /// Since when it waits for something that does not come, if something came at `alive`.
    fn since(&self, alive: Option<Instant>) -> Instant {
        alive.map_or(self.request.asked, |alive| alive.max(self.request.asked))
    }
}

/// Why a chunk is fetched. It decides how the chunk is accounted for and where it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A reader waits for it, or has waited.
    #[default]
    Demand,
    /// The planner expects it to be read; no reader has asked for it yet.
    Prefetch,
    /// It lies in a span or request that is fetched for another chunk.
    Bundled,
    /// The whole layer is to be in the disk cache; no reader has asked for it yet.
    Fill,
}

/// A chunk of the table: who waits for it and whether it comes.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) waiters: SmallVec<[Waiter; 1]>,
    pub(super) purpose: Purpose,
    /// Whether its first reader should wake the planner.
    pub(super) marker: bool,
    /// Whether a request or a read of the disk cache brings it.
    coming: bool,
    /// What went wrong last, as its readers are told of it if it does not come in time.
    trouble: Option<Rc<FetchError>>,
}

/// What a reader found that began to wait for a chunk.
pub(super) struct Waited {
    /// The chunk was not in the table before.
    pub(super) is_new: bool,
    /// The chunk was prefetched, which now pays.
    pub(super) was_prefetched: bool,
}

/// What became of a chunk that no request brings any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Released {
    /// Readers wait for it: it has to be asked for again.
    Wanted,
    /// No reader waits for it: it has left the table.
    Dropped(Purpose),
    /// It was not in the table.
    Unknown,
}

/// The table; see the module. For one thread.
#[derive(Default)]
pub(super) struct InFlight {
    chunks: RefCell<HashMap<ChunkKey, Pending>>,
}

impl InFlight {
    /// Whether the chunk comes or would have to be fetched; none if it is not in the table.
    pub(super) fn presence(&self, key: ChunkKey) -> Option<Presence> {
        self.chunks.borrow().get(&key).map(|pending| {
            if pending.coming {
                Presence::Coming
            } else {
                Presence::Absent
            }
        })
    }

    pub(super) fn contains(&self, key: ChunkKey) -> bool {
        self.chunks.borrow().contains_key(&key)
    }

    pub(super) fn contains_any(&self, chunks: ChunkRange) -> bool {
        let all = self.chunks.borrow();
        chunks.keys().any(|key| all.contains_key(&key))
    }

    /// Those of `chunks` that are in the table, in order.
    pub(super) fn keys_in(&self, chunks: ChunkRange) -> Vec<ChunkKey> {
        let all = self.chunks.borrow();
        if all.len() > usize::try_from(chunks.count()).unwrap_or(usize::MAX) {
            return chunks.keys().filter(|key| all.contains_key(key)).collect();
        }
        let within = |key: &&ChunkKey| key.layer == chunks.layer && (chunks.first..chunks.end).contains(&key.index);
        let mut keys: Vec<ChunkKey> = all.keys().filter(within).copied().collect();
        keys.sort_unstable();
        keys
    }

    /// A reader waits for a chunk from now on.
    pub(super) fn wait(&self, key: ChunkKey, waiter: Waiter) -> Waited {
        let mut all = self.chunks.borrow_mut();
        let is_new = !all.contains_key(&key);
        let pending = all.entry(key).or_default();
        pending.waiters.push(waiter);
        Waited {
            is_new,
            was_prefetched: std::mem::take(&mut pending.purpose) == Purpose::Prefetch,
        }
    }

    /// A request brings a chunk, and was planned to or brings it along; says what for.
    pub(super) fn expect(&self, key: ChunkKey, planned: bool, marker: bool) -> Purpose {
        let mut all = self.chunks.borrow_mut();
        let pending = all.entry(key).or_default();
        pending.coming = true;
        pending.marker = marker;
        if !pending.waiters.is_empty() {
            return Purpose::Demand;
        }
        pending.purpose = match pending.purpose {
            _ if !planned => Purpose::Bundled,
            Purpose::Fill => Purpose::Fill,
            _ => Purpose::Prefetch,
        };
        pending.purpose
    }

    /// A chunk that is in the table comes: from the disk cache, or with a stream.
    pub(super) fn set_coming(&self, key: ChunkKey) {
        if let Some(pending) = self.chunks.borrow_mut().get_mut(&key) {
            pending.coming = true;
        }
    }

    /// A chunk that is in the table does not come after all; whoever looks next may ask for it.
    pub(super) fn set_absent(&self, key: ChunkKey) {
        if let Some(pending) = self.chunks.borrow_mut().get_mut(&key) {
            pending.coming = false;
        }
    }

    /// The next request for `chunks` is for the disk cache, except for those that readers wait for.
    pub(super) fn mark_fill(&self, chunks: ChunkRange) {
        let mut all = self.chunks.borrow_mut();
        for key in chunks.keys() {
            let pending = all.entry(key).or_default();
            if pending.waiters.is_empty() {
                pending.purpose = Purpose::Fill;
            }
        }
    }

    /// Takes a chunk out of the table, to be delivered or given up.
    pub(super) fn take(&self, key: ChunkKey) -> Option<Pending> {
        self.chunks.borrow_mut().remove(&key)
    }

    /// Takes all chunks out, in order.
    pub(super) fn take_all(&self) -> impl Iterator<Item = (ChunkKey, Pending)> {
        let mut all: Vec<_> = self.chunks.take().into_iter().collect();
        all.sort_unstable_by_key(|(key, _)| *key);
        all.into_iter()
    }

    /// Takes out the readers of `chunks` that would have waited longer than `deadline` after another `pause`.
    pub(super) fn take_late(&self, chunks: ChunkRange, pause: Duration, deadline: Duration) -> Vec<Waiter> {
        let mut late = Vec::new();
        for key in self.keys_in(chunks) {
            if let Some(pending) = self.chunks.borrow_mut().get_mut(&key) {
                let in_time = |waiter: &Waiter| waiter.request.asked.elapsed().saturating_add(pause) <= deadline;
                let (stay, go): (SmallVec<_>, SmallVec<_>) =
                    std::mem::take(&mut pending.waiters).into_iter().partition(in_time);
                pending.waiters = stay;
                late.extend(go);
            }
        }
        late
    }

    /// The reader that has waited longest: since when. Of a layer for which `alive` has a time, none waits since before that.
    pub(super) fn oldest(&self, alive: impl Fn(LayerId) -> Option<Instant>) -> Option<Instant> {
        let all = self.chunks.borrow();
        let since = all.iter().flat_map(|(key, pending)| {
            let alive = alive(key.layer);
            pending.waiters.iter().map(move |waiter| waiter.since(alive))
        });
        since.min()
    }

    /// Takes out the readers whose patience has ended, by the time since which they wait (as in [`oldest`](Self::oldest)), each with
    /// what went wrong last with its chunk; in the order of the chunks, so that a read that waits for several is always told of the same one.
    pub(super) fn take_ended(
        &self,
        alive: impl Fn(LayerId) -> Option<Instant>,
        is_patient: impl Fn(Instant) -> bool,
    ) -> Vec<(ChunkKey, Waiter, Option<Rc<FetchError>>)> {
        let mut ended = Vec::new();
        for (key, pending) in self.chunks.borrow_mut().iter_mut() {
            let alive = alive(key.layer);
            let (stay, go): (SmallVec<_>, SmallVec<[Waiter; 1]>) = std::mem::take(&mut pending.waiters)
                .into_iter()
                .partition(|waiter| is_patient(waiter.since(alive)));
            pending.waiters = stay;
            ended.extend(go.into_iter().map(|waiter| (*key, waiter, pending.trouble.clone())));
        }
        ended.sort_by_key(|(key, ..)| *key);
        ended
    }

    /// Something went wrong with those of `chunks` that are in the table.
    pub(super) fn note_trouble(&self, chunks: ChunkRange, trouble: &FetchError) {
        let trouble = Rc::new(trouble.clone());
        for key in self.keys_in(chunks) {
            if let Some(pending) = self.chunks.borrow_mut().get_mut(&key) {
                pending.trouble = Some(trouble.clone());
            }
        }
    }

    /// No request brings a chunk any more: it stays if readers wait for it.
    pub(super) fn release(&self, key: ChunkKey) -> Released {
        let mut all = self.chunks.borrow_mut();
        let Some(pending) = all.get_mut(&key) else {
            return Released::Unknown;
        };
        pending.coming = false;
        if !pending.waiters.is_empty() {
            return Released::Wanted;
        }
        all.remove(&key)
            .map_or(Released::Unknown, |pending| Released::Dropped(pending.purpose))
    }

    /// Whether a read of a block or two waits for a chunk.
    pub(super) fn has_short_reader(&self, key: ChunkKey) -> bool {
        let all = self.chunks.borrow();
        all.get(&key)
            .is_some_and(|pending| pending.waiters.iter().any(|waiter| waiter.request.is_short()))
    }

    /// Whether a reader waits for any of `chunks`.
    pub(super) fn has_readers(&self, chunks: ChunkRange) -> bool {
        let all = self.chunks.borrow();
        chunks
            .keys()
            .any(|key| all.get(&key).is_some_and(|pending| !pending.waiters.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::cache::Slice;
    use crate::fetch::ReadCallback;
    use crate::fetch::engine::CompleteOnDrop;

    type Outcome = Result<Vec<Slice>, FetchError>;

    struct Tell(std::sync::mpsc::Sender<Outcome>);

    impl ReadCallback for Tell {
        fn complete(self: Box<Self>, outcome: Outcome) {
            let _reader_is_gone = self.0.send(outcome);
        }
    }

    fn key(index: u32) -> ChunkKey {
        ChunkKey {
            layer: LayerId(0),
            index,
        }
    }

    /// A read of one slot, what it will be told, and the slot as a waiter.
    fn reader(asked: Instant) -> (Receiver<Outcome>, Waiter) {
        let (tell, told) = channel();
        let request = Request::new(CompleteOnDrop::new(Box::new(Tell(tell))), asked, Arc::default());
        let slot = request.expect();
        request.ready();
        let waiter = Waiter {
            request,
            slot,
            from: 0,
            len: 1,
        };
        (told, waiter)
    }

    #[test]
    fn a_chunk_says_what_it_is_fetched_for() {
        let table = InFlight::default();
        assert_eq!(table.presence(key(0)), None);
        assert_eq!(table.expect(key(0), true, false), Purpose::Prefetch);
        assert_eq!(table.expect(key(1), false, false), Purpose::Bundled);
        table.mark_fill(ChunkRange::from(key(2)));
        assert_eq!(table.presence(key(2)), Some(Presence::Absent));
        assert_eq!(table.expect(key(2), true, false), Purpose::Fill);
        assert_eq!(table.presence(key(2)), Some(Presence::Coming));
        let (_told, waiter) = reader(Instant::now());
        let found = table.wait(key(0), waiter);
        assert!(found.was_prefetched && !found.is_new);
        let (_told, waiter) = reader(Instant::now());
        assert!(!table.wait(key(0), waiter).was_prefetched, "it pays once");
        assert_eq!(table.expect(key(0), true, false), Purpose::Demand);
        let (_told, waiter) = reader(Instant::now());
        assert!(table.wait(key(9), waiter).is_new);
    }

    #[test]
    fn what_does_not_come_stays_for_its_readers_alone() {
        let table = InFlight::default();
        let (told, waiter) = reader(Instant::now());
        table.wait(key(0), waiter);
        table.set_coming(key(0));
        table.expect(key(1), true, false);
        assert_eq!(table.release(key(0)), Released::Wanted);
        assert_eq!(table.presence(key(0)), Some(Presence::Absent));
        assert_eq!(table.release(key(1)), Released::Dropped(Purpose::Prefetch));
        assert_eq!(table.release(key(1)), Released::Unknown);
        assert!(told.try_recv().is_err(), "its reader still waits");
        let all = ChunkRange {
            layer: LayerId(0),
            first: 0,
            end: 2,
        };
        assert!(table.has_readers(all));
        assert_eq!(table.keys_in(all), [key(0)]);
        drop(table.take(key(0)));
        assert!(!table.contains_any(all));
        assert!(matches!(told.recv(), Ok(Err(FetchError::Stopped))));
    }

    #[test]
    fn only_late_readers_are_taken_out() {
        let table = InFlight::default();
        let deadline = Duration::from_secs(100);
        let long_ago = Instant::now().checked_sub(Duration::from_secs(90)).unwrap();
        let ((_early, early), (_late, late)) = (reader(Instant::now()), reader(long_ago));
        table.wait(key(3), early);
        table.wait(key(3), late);
        let chunks = ChunkRange::from(key(3));
        assert_eq!(table.take_late(chunks, Duration::ZERO, deadline).len(), 0);
        assert_eq!(table.take_late(chunks, Duration::from_secs(20), deadline).len(), 1);
        assert!(table.has_readers(chunks));
        assert_eq!(table.take_late(chunks, Duration::MAX, deadline).len(), 1);
        assert!(!table.has_readers(chunks));
    }

    #[test]
    fn who_waits_longest_is_the_first_to_give_up() {
        let table = InFlight::default();
        let at = |secs| Instant::now().checked_sub(Duration::from_secs(secs)).unwrap();
        assert_eq!(table.oldest(|_| None), None);
        let (old, young) = (at(90), at(10));
        let ((_old_told, old_waiter), (_young_told, young_waiter)) = (reader(old), reader(young));
        table.wait(key(1), young_waiter);
        table.wait(key(2), old_waiter);
        assert_eq!(table.oldest(|_| None), Some(old));
        // As long as something comes of a layer that is read from end to end, its readers wait for their turn.
        let alive = at(5);
        assert_eq!(table.oldest(|_| Some(alive)), Some(alive));
        assert!(table.take_ended(|_| Some(alive), |since| since > young).is_empty());
        table.note_trouble(ChunkRange::from(key(2)), &FetchError::Stopped);
        let ended = table.take_ended(|_| None, |since| since > old);
        let [(ended, _, trouble)] = &ended[..] else {
            panic!("{} ended", ended.len())
        };
        assert_eq!(*ended, key(2));
        assert!(matches!(trouble.as_deref(), Some(FetchError::Stopped)));
        assert_eq!(table.oldest(|_| None), Some(young));
    }
}
