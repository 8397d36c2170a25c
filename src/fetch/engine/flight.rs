//! One flight: a stretch of chunks by one request at a time, until all have landed or the patience of those who wait is
//! at an end. Here the blob is the tar; `coded` has the flights of compressed layers.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::origin::{Body, Trouble};
use super::{Engine, LayerState};
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::fetch::FetchError;
use crate::fetch::stats::add;
use crate::fetch::transport::Failure;
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, TarOffset, TarRange, len_u64, len_usize};

/// Wrong answers and refusals in a row before a read fails.
const PATIENCE_WITH_WRONG: u32 = 6;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// What one request came to.
pub(super) enum Answer {
    Complete,
    /// The server sends the whole blob whatever is asked.
    Whole(Body),
}

/// How often and how long something is tried again.
pub(super) struct Backoff {
    backoff: Duration,
    wrong: u32,
}

impl Backoff {
    pub(super) const fn new() -> Self {
        Self {
            backoff: FIRST_BACKOFF,
            wrong: 0,
        }
    }

    /// How long to wait before the next try, or why there is none.
    pub(super) fn pause(
        &mut self,
        trouble: &Trouble,
        remote: &LayerState,
        range: TarRange,
    ) -> Result<Duration, FetchError> {
        let url = remote.origin.name();
        let pause = match trouble {
            Trouble::File(error) => {
                return Err(FetchError::File {
                    path: url.into(),
                    range,
                    why: std::sync::Arc::new(std::io::Error::new(error.kind(), error.to_string())),
                });
            }
            Trouble::Net(Failure::Changed(how)) => return Err(FetchError::Changed { url, how: how.clone() }),
            Trouble::Net(Failure::Suspect { why, status }) => {
                self.wrong += 1;
                if self.wrong >= PATIENCE_WITH_WRONG {
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
                jittered(self.backoff)
            }
            // Who tries again after wrong bytes has decided so.
            Trouble::Wrong(_) | Trouble::Net(Failure::Away { stale: true, .. }) => Duration::ZERO,
            Trouble::Net(Failure::Away { after, .. }) => after.unwrap_or_else(|| jittered(self.backoff)),
        };
        if !pause.is_zero() {
            self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        }
        Ok(pause)
    }

    /// Something came: whatever goes wrong next is another matter.
    pub(super) const fn renew(&mut self) {
        *self = Self::new();
    }
}

/// However a flight ends, nobody is left waiting for it.
struct Landing {
    engine: Rc<Engine>,
    stretch: ChunkRange,
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
    fn rest(&self) -> ChunkRange {
        ChunkRange {
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
    pub(super) async fn fly(self: Rc<Self>, stretch: ChunkRange, demand: bool) {
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

    async fn pursue(self: &Rc<Self>, remote: &Rc<LayerState>, landing: &Landing) -> Result<(), FetchError> {
        let mut patience = Backoff::new();
        loop {
            if remote.streaming.get() {
                self.leave_to_stream(landing.rest());
                landing.advance(landing.stretch.end);
                return Ok(());
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
            let trouble = match self.attempt(remote, landing).await {
                Ok(Answer::Complete) => return Ok(()),
                Ok(Answer::Whole(body)) => {
                    self.start_stream(remote, landing.stretch.layer, Some(body));
                    continue;
                }
                Err(trouble) => trouble,
            };
            if landing.next.get() > before {
                patience.renew();
            }
            self.be_patient(remote, landing.rest(), &mut patience, &trouble).await?;
        }
    }

    /// After something went wrong with `rest`: waits until it is time for another try. An error, when nobody has the
    /// patience for that.
    pub(super) async fn be_patient(
        self: &Rc<Self>,
        remote: &LayerState,
        rest: ChunkRange,
        patience: &mut Backoff,
        trouble: &Trouble,
    ) -> Result<(), FetchError> {
        let counters = &self.shared.counters;
        add(&counters.errors, 1);
        let url = remote.origin.name();
        let range = TarRange::new(TarOffset(u64::from(rest.first) * CHUNK_BYTES), rest.bytes());
        let pause = patience.pause(trouble, remote, range)?;
        let late = FetchError::Deadline {
            url: url.clone(),
            range,
            after: self.options.deadline,
            why: trouble.to_string(),
        };
        self.expire(rest, pause, &late);
        if !self.anybody_waits(rest) {
            // Nobody has asked for it yet: whoever does starts afresh.
            log::debug!("{url}: bytes {range}: {trouble}; not wanted enough to ask again");
            return Err(late);
        }
        if !pause.is_zero() {
            log::warn!("{url}: bytes {range}: {trouble}; asking again in {pause:.1?}");
            sleep(pause).await;
        }
        add(&counters.retries, 1);
        Ok(())
    }

    /// One request for what is left of a flight.
    async fn attempt(self: &Rc<Self>, remote: &LayerState, landing: &Landing) -> Result<Answer, Trouble> {
        let ChunkRange { layer, end, .. } = landing.stretch;
        let size = remote.size;
        let start = u64::from(landing.next.get()) * CHUNK_BYTES;
        let stop = (u64::from(end) * CHUNK_BYTES).min(size);
        let mut body = remote
            .origin
            .get(&self.client, start, stop.saturating_sub(start), landing.demand)
            .await?;
        if body.is_whole() {
            return Ok(Answer::Whole(body));
        }
        self.note_head(&body);
        let mut chunk = Vec::new();
        while let Some(mut data) = body.next().await? {
            self.note_arrival(remote, len_u64(data.len()));
            let mut landed = Vec::new();
            while !data.is_empty() {
                let key = ChunkKey {
                    layer,
                    index: landing.next.get(),
                };
                let whole = len_usize(chunk_len(size, key.index));
                if chunk.capacity() == 0 {
                    chunk.reserve_exact(whole);
                }
                let part = data.split_to(data.len().min(whole - chunk.len()));
                chunk.extend_from_slice(&part);
                if chunk.len() == whole {
                    landing.advance(key.index + 1);
                    landed.push((key, std::mem::take(&mut chunk)));
                }
            }
            if !landed.is_empty() {
                self.bring_checked(landed);
                self.pump();
            }
        }
        Ok(Answer::Complete)
    }

    /// Learns from the time that an answer's head took.
    pub(super) fn note_head(&self, body: &Body) {
        if let Some(took) = body.head_took() {
            self.link.borrow_mut().head(Instant::now(), took);
        }
    }

    /// Counts bytes of a blob that came, and learns from when they came.
    pub(super) fn note_arrival(&self, remote: &LayerState, len: u64) {
        if remote.is_local() {
            return;
        }
        add(&self.shared.counters.bytes_fetched, len);
        self.link.borrow_mut().arrived(Instant::now(), len);
    }
}

/// Between half and all of `pause`, so that many clients do not come back in step.
fn jittered(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let random = u32::try_from(RandomState::new().hash_one(0) & 0xFFFF).unwrap_or(0);
    pause / 2 + pause / 2 * random / 0xFFFF
}
