//! Filling the disk cache with whole layers. In: which chunks it lacks. Out: ranges of them, in the layers' order, to be fetched while
//! no one reads. In the end the device needs no server any more, and every layer was compared with its digest.
//!
//! Invariant: it never competes. As long as a reader of any device waits, and a while after, nothing is asked for; what it brings goes to the disk
//! cache and not to memory, which belongs to what is read.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::Engine;
use crate::cache::chunk::{ChunkKey, chunk_count};
use crate::fetch::runtime::sleep;
use crate::prefetch::{ChunkRange, Presence};
use crate::units::{CHUNK_BYTES, LayerId};

/// So long after the last read that had to wait, no one is taken to be reading.
const QUIET: Duration = Duration::from_millis(200);
/// After something did not come, it is asked for again in so long; twice as long each time that nothing came.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How far filling is. It walks over all chunks of all layers, again and again until it has met none that is missing.
#[derive(Debug)]
pub(super) struct Filler {
    /// Where it goes on.
    at: ChunkKey,
    /// What was asked for last, until it is known what came of it.
    asked: Option<ChunkRange>,
    /// Whether this walk has met chunks that are on their way, or missing.
    lacking: bool,
    pause: Duration,
    not_before: Option<Instant>,
    done: bool,
}

impl Filler {
    pub(super) const fn new() -> Self {
        Self {
            at: ChunkKey {
                layer: LayerId(0),
                index: 0,
            },
            asked: None,
            lacking: false,
            pause: FIRST_PAUSE,
            not_before: None,
            done: false,
        }
    }

    /// What to ask for next, at most `most` bytes. `chunks` tells how many chunks a layer has, 0 if it is not to be filled;
    /// none if there is no such layer. `see` tells where a chunk is; here means in the disk cache.
    fn next(
        &mut self,
        now: Instant,
        most: u64,
        chunks: &dyn Fn(LayerId) -> Option<u32>,
        see: &dyn Fn(ChunkKey) -> Presence,
    ) -> Option<ChunkRange> {
        if let Some(asked) = self.asked {
            if asked.keys().any(|key| see(key) == Presence::Coming) {
                return None;
            }
            self.asked = None;
            if asked.keys().any(|key| see(key) == Presence::Absent) {
                self.at = asked.keys().next().unwrap_or(self.at);
                self.not_before = now.checked_add(self.pause);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            } else {
                self.pause = FIRST_PAUSE;
            }
        }
        if self.done || self.not_before.is_some_and(|then| now < then) {
            return None;
        }
        self.not_before = None;
        loop {
            let Some(count) = chunks(self.at.layer) else {
                self.done = !self.lacking;
                (self.at, self.lacking) = (Self::new().at, false);
                return None;
            };
            while self.at.index < count {
                match see(self.at) {
                    Presence::Here => {}
                    Presence::Coming => self.lacking = true,
                    Presence::Absent => {
                        let stretch = self.absent_from_here(count, most, see);
                        self.lacking = true;
                        self.at.index = stretch.end;
                        self.asked = Some(stretch);
                        return Some(stretch);
                    }
                }
                self.at.index += 1;
            }
            self.at = ChunkKey {
                layer: LayerId(self.at.layer.0.saturating_add(1)),
                index: 0,
            };
        }
    }

    fn absent_from_here(&self, count: u32, most: u64, see: &dyn Fn(ChunkKey) -> Presence) -> ChunkRange {
        let ChunkKey { layer, index: first } = self.at;
        let longest = u32::try_from(most / CHUNK_BYTES).unwrap_or(u32::MAX).max(1);
        let limit = first.saturating_add(longest).min(count);
        let absent = |index: &u32| see(ChunkKey { layer, index: *index }) == Presence::Absent;
        let end = (first + 1..limit)
            .take_while(absent)
            .last()
            .map_or(first + 1, |last| last + 1);
        ChunkRange { layer, first, end }
    }
}

impl Engine {
    /// Goes on filling whenever that is due; nothing else wakes an engine without reads.
    pub(super) async fn keep_filling(self: Rc<Self>) {
        while self.filler.as_ref().is_some_and(|filler| !filler.borrow().done) {
            if self.stopping.get() {
                return;
            }
            sleep(QUIET).await;
            self.pump();
        }
        log::info!("all that the disk cache takes is in it");
    }

    /// A range of chunks that the disk cache lacks, marked as on its way there, if no one reads.
    pub(super) fn next_to_fill(self: &Rc<Self>, most: u64) -> Option<ChunkRange> {
        let mut filler = self.filler.as_ref()?.borrow_mut();
        if self.pool.last_read.get().elapsed() < QUIET {
            return None;
        }
        let chunks = |layer: LayerId| {
            let state = self.layers.get(usize::try_from(layer.0).ok()?)?;
            let count = state.as_ref().filter(|state| {
                let takes_more = self
                    .cache(layer)
                    .is_some_and(|cache| cache.takes_more() && !cache.is_tight());
                takes_more && state.can_seek() && !state.streaming.get() && self.poison_of(layer).is_none()
            });
            Some(count.and_then(|state| chunk_count(state.size)).unwrap_or(0))
        };
        let stretch = filler.next(Instant::now(), most, &chunks, &|key| self.on_disk(key))?;
        self.in_flight.mark_fill(stretch);
        Some(stretch)
    }

    /// Where a chunk is on its way to the disk cache. One that is in memory alone is sent there. What another layer has is not kept twice.
    fn on_disk(self: &Rc<Self>, key: ChunkKey) -> Presence {
        if self.is_stored(key) || self.is_at_donors(key) {
            return Presence::Here;
        }
        let held = || self.in_memory(key);
        match self.look(key) {
            Presence::Here if held().is_some_and(|chunk| self.queue_write(key, chunk, false)) => Presence::Here,
            // The disk does not keep up.
            Presence::Here => Presence::Coming,
            elsewhere => elsewhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use super::*;

    const MANY: u64 = 1 << 30;

    fn key(layer: u32, index: u32) -> ChunkKey {
        ChunkKey {
            layer: LayerId(layer),
            index,
        }
    }

    /// Two layers, of 5 and 3 chunks, the second of which is not to be filled if `only_first`.
    struct World {
        only_first: bool,
        at: RefCell<HashMap<ChunkKey, Presence>>,
    }

    impl World {
        fn new(only_first: bool, here: &[ChunkKey]) -> Self {
            Self {
                only_first,
                at: RefCell::new(here.iter().map(|key| (*key, Presence::Here)).collect()),
            }
        }

        fn put(&self, stretch: ChunkRange, presence: Presence) {
            self.at.borrow_mut().extend(stretch.keys().map(|key| (key, presence)));
        }

        fn next(&self, filler: &mut Filler, now: Instant, most: u64) -> Option<(u32, u32, u32)> {
            let chunks = |layer: LayerId| match layer.0 {
                0 => Some(5),
                1 => Some(if self.only_first { 0 } else { 3 }),
                _ => None,
            };
            let see = |key| self.at.borrow().get(&key).copied().unwrap_or(Presence::Absent);
            let stretch = filler.next(now, most, &chunks, &see)?;
            self.put(stretch, Presence::Coming);
            Some((stretch.layer.0, stretch.first, stretch.end))
        }

        fn arrive(&self, (layer, first, end): (u32, u32, u32), presence: Presence) {
            let layer = LayerId(layer);
            self.put(ChunkRange { layer, first, end }, presence);
        }
    }

    #[test]
    fn asks_for_what_lacks_one_stretch_at_a_time_and_ends() {
        let (world, now) = (World::new(false, &[key(0, 2)]), Instant::now());
        let mut filler = Filler::new();
        let mut asked = Vec::new();
        for _ in 0..20 {
            if let Some(stretch) = world.next(&mut filler, now, 2 * CHUNK_BYTES) {
                assert_eq!(world.next(&mut filler, now, MANY), None, "two at the same time");
                world.arrive(stretch, Presence::Here);
                asked.push(stretch);
            }
        }
        assert_eq!(asked, [(0, 0, 2), (0, 3, 5), (1, 0, 2), (1, 2, 3)]);
        assert!(filler.done);
    }

    #[test]
    fn what_did_not_come_is_asked_for_again_ever_later() {
        let (world, mut now) = (World::new(true, &[]), Instant::now());
        let mut filler = Filler::new();
        let all = (0, 0, 5);
        assert_eq!(world.next(&mut filler, now, MANY), Some(all));
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            world.arrive(all, Presence::Absent);
            assert_eq!(world.next(&mut filler, now, MANY), None, "at once");
            now += Duration::from_secs(pause);
            assert_eq!(world.next(&mut filler, now, MANY), Some(all), "after {pause} s");
        }
        world.arrive(all, Presence::Here);
        assert_eq!(world.next(&mut filler, now, MANY), None);
        assert_eq!(world.next(&mut filler, now, MANY), None);
        assert!(filler.done);
    }

    #[test]
    fn what_somebody_else_brings_is_looked_at_again() {
        let (world, now) = (World::new(true, &[key(0, 0), key(0, 1), key(0, 4)]), Instant::now());
        world.arrive((0, 2, 4), Presence::Coming);
        let mut filler = Filler::new();
        assert_eq!(world.next(&mut filler, now, MANY), None);
        assert!(!filler.done);
        // It was lost.
        world.arrive((0, 2, 4), Presence::Absent);
        assert_eq!(world.next(&mut filler, now, MANY), Some((0, 2, 4)));
    }

    #[test]
    fn layers_that_are_not_to_be_filled_are_passed_by() {
        let (world, now) = (
            World::new(true, &[0, 1, 2, 3, 4].map(|index| key(0, index))),
            Instant::now(),
        );
        let mut filler = Filler::new();
        assert_eq!(world.next(&mut filler, now, MANY), None);
        assert!(filler.done);
    }
}
