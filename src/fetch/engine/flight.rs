//! One flight: a stretch of chunks by one request at a time, until all have landed or the patience of those who wait is
//! at an end.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::disk::LARGEST_BACKLOG;
use super::{Engine, Remote};
use crate::fetch::chunk::{CHUNK_BYTES, ChunkKey, chunk_len, to_u64, to_usize};
use crate::fetch::http::{Failure, Reply};
use crate::fetch::plan::Stretch;
use crate::fetch::stats::add;
use crate::fetch::store::LayerCache;
use crate::fetch::{FetchError, SharedLayer};
use crate::units::{LayerId, TarOffset, TarRange};

/// Wrong answers and refusals in a row before a read fails.
const PATIENCE_WITH_WRONG: u32 = 6;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// What one request came to.
enum Answer {
    Complete,
    /// The server sends the whole layer whatever is asked.
    Whole(Reply),
}

/// However a flight ends, nobody is left waiting for it.
struct Landing {
    engine: Rc<Engine>,
    stretch: Stretch,
    /// The first chunk that has not landed.
    next: Cell<u32>,
    demand: bool,
}

impl Landing {
    /// Everything before chunk `next` has landed, or is somebody else's business now.
    fn advance(&self, next: u32) {
        let by = u64::from(next.saturating_sub(self.next.replace(next))) * CHUNK_BYTES;
        self.engine
            .outstanding
            .set(self.engine.outstanding.get().saturating_sub(by));
    }

    /// What has not landed.
    fn rest(&self) -> Stretch {
        Stretch {
            first: self.next.get(),
            ..self.stretch
        }
    }

    fn give_up(&self, error: &FetchError) {
        let rest = self.rest();
        self.advance(self.stretch.end);
        self.engine.give_up(rest, error);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.give_up(&FetchError::Stopped);
        if !self.demand {
            self.engine
                .prefetching
                .set(self.engine.prefetching.get().saturating_sub(1));
        }
    }
}

impl Engine {
    /// Fetches a stretch, whatever it takes.
    pub(super) async fn fly(self: Rc<Self>, stretch: Stretch, demand: bool) {
        let landing = Landing {
            engine: self.clone(),
            stretch,
            next: Cell::new(stretch.first),
            demand,
        };
        if let Some(remote) = self.remote(stretch.layer)
            && let Err(error) = self.pursue(remote, &landing).await
        {
            landing.give_up(&error);
        }
        drop(landing);
        self.pump();
    }

    async fn pursue(self: &Rc<Self>, remote: &Rc<Remote>, landing: &Landing) -> Result<(), FetchError> {
        let counters = &self.shared.counters;
        let (mut backoff, mut wrong) = (FIRST_BACKOFF, 0);
        loop {
            if remote.streaming.get() {
                remote.stream_ended.notified().await;
                self.collect(landing);
            }
            let before = landing.next.get();
            if !landing
                .rest()
                .keys()
                .any(|key| self.pending.borrow().contains_key(&key))
            {
                landing.advance(landing.stretch.end);
                return Ok(());
            }
            let failure = match self.attempt(remote, landing).await {
                Ok(Answer::Complete) => return Ok(()),
                Ok(Answer::Whole(_)) if remote.streaming.get() => continue,
                Ok(Answer::Whole(reply)) => match self.stream(remote, landing.stretch.layer, reply).await {
                    Ok(()) => {
                        self.collect(landing);
                        continue;
                    }
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            add(&counters.errors, 1);
            if landing.next.get() > before {
                (backoff, wrong) = (FIRST_BACKOFF, 0);
            }
            let rest = landing.rest();
            let url = remote.layer.name();
            let range = TarRange::new(TarOffset(u64::from(rest.first) * CHUNK_BYTES), rest.bytes());
            let pause = match &failure {
                Failure::Changed(how) => return Err(FetchError::Changed { url, how: how.clone() }),
                Failure::Suspect { why, status } => {
                    wrong += 1;
                    if wrong >= PATIENCE_WITH_WRONG {
                        let why = why.clone();
                        return Err(match status {
                            Some(status) => FetchError::Refused {
                                url,
                                why,
                                status: status.as_u16(),
                            },
                            None => FetchError::WrongAnswer { url, range, why },
                        });
                    }
                    jittered(backoff)
                }
                Failure::Away { stale: true, .. } => Duration::ZERO,
                Failure::Away { after, .. } => after.unwrap_or_else(|| jittered(backoff)),
            };
            let after = self.options.deadline;
            let late = FetchError::Deadline {
                url: url.clone(),
                range,
                after,
                why: failure.to_string(),
            };
            self.expire(rest, pause, &late);
            if !self.anybody_waits(rest) {
                // Nobody has asked for it yet: whoever does starts afresh.
                log::debug!("{url}: bytes {range}: {failure}; not wanted enough to ask again");
                return Err(late);
            }
            if !pause.is_zero() {
                log::warn!("{url}: bytes {range}: {failure}; asking again in {pause:.1?}");
                sleep(pause).await;
                backoff = (backoff * 2).min(LONGEST_BACKOFF);
            }
            add(&counters.retries, 1);
        }
    }

    /// One request for what is left of a flight.
    async fn attempt(self: &Rc<Self>, remote: &Remote, landing: &Landing) -> Result<Answer, Failure> {
        let Stretch { layer, end, .. } = landing.stretch;
        let size = remote.layer.size;
        let start = u64::from(landing.next.get()) * CHUNK_BYTES;
        let stop = (u64::from(end) * CHUNK_BYTES).min(size);
        let mut reply = self
            .client
            .get(&remote.layer, start, stop.saturating_sub(start), landing.demand)
            .await?;
        if reply.whole {
            return Ok(Answer::Whole(reply));
        }
        self.link.borrow_mut().head(Instant::now(), reply.head_took);
        let mut chunk = Vec::new();
        while let Some(mut data) = reply.next().await? {
            let len = to_u64(data.len());
            add(&self.shared.counters.bytes_fetched, len);
            self.link.borrow_mut().arrived(Instant::now(), len);
            while !data.is_empty() {
                let key = ChunkKey {
                    layer,
                    index: landing.next.get(),
                };
                let whole = to_usize(chunk_len(size, key.index));
                if chunk.capacity() == 0 {
                    chunk.reserve_exact(whole);
                }
                let part = data.split_to(data.len().min(whole - chunk.len()));
                chunk.extend_from_slice(&part);
                if chunk.len() == whole {
                    landing.advance(key.index + 1);
                    self.bring(key, std::mem::take(&mut chunk), true);
                }
            }
            self.pump();
        }
        Ok(Answer::Complete)
    }

    /// Reads the whole layer as it comes, once, because the server knows no ranges.
    async fn stream(self: &Rc<Self>, remote: &Rc<Remote>, layer: LayerId, reply: Reply) -> Result<(), Failure> {
        struct Streaming(Rc<Remote>);
        impl Drop for Streaming {
            fn drop(&mut self) {
                self.0.streaming.set(false);
                self.0.stream_ended.notify_waiters();
            }
        }
        remote.streaming.set(true);
        let _ended = Streaming(remote.clone());
        self.make_room_for_stream(remote, layer);
        self.stream_through(remote, layer, reply).await
    }

    async fn stream_through(
        self: &Rc<Self>,
        remote: &Rc<Remote>,
        layer: LayerId,
        mut reply: Reply,
    ) -> Result<(), Failure> {
        let mut key = ChunkKey { layer, index: 0 };
        let mut chunk = Vec::new();
        while let Some(mut data) = reply.next().await? {
            add(&self.shared.counters.bytes_fetched, to_u64(data.len()));
            while !data.is_empty() {
                let whole = to_usize(chunk_len(remote.layer.size, key.index));
                let part = data.split_to(data.len().min(whole.saturating_sub(chunk.len())));
                chunk.extend_from_slice(&part);
                if chunk.len() == whole {
                    self.bring_from_stream(key, std::mem::replace(&mut chunk, Vec::with_capacity(whole)));
                    key = key.plus(1);
                }
            }
            // The stream is as fast as the disk: what it does not keep would have to be streamed again.
            while self.backlog.get() > LARGEST_BACKLOG && !remote.writer.is_idle() {
                remote.writer.progress().await;
            }
        }
        while !remote.writer.is_idle() {
            remote.writer.progress().await;
        }
        Ok(())
    }

    fn make_room_for_stream(&self, remote: &Remote, layer: LayerId) {
        let url = remote.layer.name();
        if !remote.warned.replace(true) {
            log::warn!(
                "{url}: the server answers 200 to a Range: reading all {} bytes once, in order",
                remote.layer.size
            );
        }
        let shared = usize::try_from(layer.0).ok().and_then(|at| self.shared.layers.get(at));
        if let Some(SharedLayer::Remote { cache, size }) = shared
            && cache.get().is_none()
        {
            match LayerCache::temporary(&std::env::temp_dir(), *size) {
                // Nobody else sets it: this is the only thread that does.
                Ok(temporary) => drop(cache.set(Arc::new(temporary))),
                Err(error) => log::warn!("{url}: no place to keep what is streamed: {error}"),
            }
        }
    }

    /// After a stream: what it brought is taken from where it lies now.
    fn collect(self: &Rc<Self>, landing: &Landing) {
        let stretch = landing.stretch;
        let cached: Vec<ChunkKey> = stretch
            .keys()
            .filter(|key| self.pending.borrow().contains_key(key))
            .filter(|key| self.cache(key.layer).is_some_and(|cache| cache.has(key.index)))
            .collect();
        self.read_cached(cached.clone());
        let mut next = landing.next.get();
        while next < stretch.end
            && (cached.contains(&ChunkKey {
                layer: stretch.layer,
                index: next,
            }) || !self.pending.borrow().contains_key(&ChunkKey {
                layer: stretch.layer,
                index: next,
            }))
        {
            next += 1;
        }
        landing.advance(next);
    }
}

/// Between half and all of `pause`, so that many clients do not come back in step.
fn jittered(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let random = u32::try_from(RandomState::new().hash_one(0) & 0xFFFF).unwrap_or(0);
    pause / 2 + pause / 2 * random / 0xFFFF
}
