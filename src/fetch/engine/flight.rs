//! Requests in flight. In: a [`Flight`], which knows how to ask for its chunks and what of them has come. Out: all of its
//! chunks delivered, or their readers told why not.
//!
//! One guard and one retry loop serve both kinds of flights: [`PlainFlight`](super::plain::PlainFlight) where the blob is the
//! tar, [`CodedFlight`](super::coded::CodedFlight) where it has to be decoded.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::budget::Share;
use super::origin::{Body, Trouble};
use super::{Engine, LayerState};
use crate::fetch::FetchError;
use crate::fetch::runtime::sleep;
use crate::fetch::stats::add;
use crate::http::{self, Kind, RetryPolicy};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// What follows a failure: a server that is away or busy is asked again for as long as readers wait, which their deadlines decide;
/// wrong answers and refusals are worth a few more tries.
const RETRY: RetryPolicy = RetryPolicy {
    tries: u32::MAX,
    wrong: 6,
    refused: 6,
    first_pause: Duration::from_millis(50),
    longest_pause: Duration::from_secs(10),
    deadline: Duration::MAX,
};
/// How often readers that have come meanwhile are looked at during a long pause.
pub(super) const LOOK_AT_READERS: Duration = Duration::from_millis(250);

/// What one request brought.
pub(super) enum Received {
    /// All that was asked for.
    Range,
    /// The beginning of the whole blob: the server does not know ranges.
    WholeBlob(Body),
}

/// [`http::Backoff`] for everything that can go wrong here: the state of one retry loop.
pub(super) struct Backoff(http::Backoff);

impl Backoff {
    pub(super) const fn new() -> Self {
        Self(http::Backoff::new(RETRY))
    }

    /// How long to wait before the next try of `range`, or why there is none.
    pub(super) fn pause(
        &mut self,
        trouble: &Trouble,
        state: &LayerState,
        range: TarRange,
    ) -> Result<Duration, FetchError> {
        let url = state.origin.name();
        let failure = match trouble {
            Trouble::File(error) => {
                return Err(FetchError::File {
                    path: url.into(),
                    range,
                    why: std::sync::Arc::new(std::io::Error::new(error.kind(), error.to_string())),
                });
            }
            // After wrong bytes there is one more try, at once: see `Engine::digest_mismatched`.
            Trouble::Wrong(_) => return Ok(Duration::ZERO),
            Trouble::Net(failure) => failure,
        };
        self.0.pause_after(failure.clone()).map_err(|failure| {
            let why = Trouble::Net(failure.clone()).why(&url);
            match failure.kind() {
                Kind::Changed => FetchError::Changed {
                    url,
                    how: failure.why(),
                },
                Kind::Refused(status) => FetchError::Refused {
                    url,
                    why,
                    status: status.as_u16(),
                },
                _ => FetchError::WrongAnswer { url, range, why },
            }
        })
    }

    /// Something came: whatever goes wrong next is another matter.
    pub(super) fn reset(&mut self) {
        self.0.succeeded();
    }
}

/// What a request is to bring, and how far it is. Everything takes `&self`: a flight is seen by its retry loop and by its guard.
pub(super) trait Flight {
    /// The layer that it is of.
    fn layer(&self) -> LayerId;

    /// The chunks that it has not brought, or not all of.
    fn rest(&self) -> ChunkRange;

    /// A number that grows whenever something of it has come.
    fn progress(&self) -> u64;

    /// Whether nothing is left to ask for.
    fn is_done(&self, engine: &Engine) -> bool;

    /// Nothing more comes of it: from now on nothing is left.
    fn finish(&self);

    /// Sends one request for what is left, and delivers what comes of it.
    async fn attempt(
        &self,
        engine: &Rc<Engine>,
        state: &Rc<LayerState>,
        guard: &FlightGuard<Self>,
    ) -> Result<Received, Trouble>
    where
        Self: Sized;

    /// What came was wrong. An error ends the flight.
    fn mismatched(&self, _engine: &Rc<Engine>, _state: &LayerState, _why: &str) -> Result<(), FetchError> {
        Ok(())
    }

    /// It has ended, and its chunks were delivered or given up.
    fn ended(&self, _engine: &Rc<Engine>) {}
}

/// Keeps the promise of a request in flight: however the request ends, whoever waits for its chunks is told, and its share of
/// the budget is given back.
pub(super) struct FlightGuard<F: Flight> {
    engine: Rc<Engine>,
    state: Rc<LayerState>,
    flight: F,
    share: Share,
    /// Whether a reader waits for it.
    pub(super) demand: bool,
}

impl<F: Flight> FlightGuard<F> {
    /// For a request that will bring `bytes` bytes.
    pub(super) fn new(engine: &Rc<Engine>, state: &Rc<LayerState>, flight: F, bytes: u64, demand: bool) -> Self {
        Self {
            engine: engine.clone(),
            state: state.clone(),
            flight,
            share: engine.budget.request(bytes, demand),
            demand,
        }
    }

    /// So many bytes are not under way any more.
    pub(super) fn arrived(&self, len: u64) {
        self.share.arrived(len);
    }

    /// Nothing more comes: whoever waits for the rest is told `error`.
    fn give_up(&self, error: &FetchError) {
        let rest = self.flight.rest();
        self.flight.finish();
        self.engine.give_up(rest, error);
    }
}

impl<F: Flight> Drop for FlightGuard<F> {
    fn drop(&mut self) {
        self.give_up(&FetchError::Stopped);
        self.flight.ended(&self.engine);
    }
}

impl Engine {
    /// Fetches what a flight is to bring, whatever it takes.
    pub(super) async fn fly<F: Flight>(self: Rc<Self>, guard: FlightGuard<F>) {
        if let Err(error) = self.pursue(&guard).await {
            guard.give_up(&error);
        }
        drop(guard);
        self.pump();
    }

    /// The retry loop.
    async fn pursue<F: Flight>(self: &Rc<Self>, guard: &FlightGuard<F>) -> Result<(), FetchError> {
        let (state, flight) = (&guard.state, &guard.flight);
        let mut backoff = Backoff::new();
        loop {
            if let Some(error) = self.poison_of(flight.layer()) {
                return Err(error);
            }
            if state.streaming.get() {
                self.leave_to_stream(flight.rest());
                flight.finish();
                return Ok(());
            }
            if flight.is_done(self) {
                flight.finish();
                return Ok(());
            }
            let before = flight.progress();
            let trouble = match flight.attempt(self, state, guard).await {
                Ok(Received::Range) => return Ok(()),
                Ok(Received::WholeBlob(body)) => {
                    self.start_stream(state, flight.layer(), Some(body));
                    continue;
                }
                Err(trouble) => trouble,
            };
            if let Trouble::Wrong(why) = &trouble {
                flight.mismatched(self, state, why)?;
            }
            if flight.progress() > before {
                backoff.reset();
            }
            self.back_off(state, flight.rest(), &mut backoff, &trouble).await?;
        }
    }

    /// After something went wrong with `rest`: waits until it is time for another try. An error, when no reader would still
    /// wait then.
    async fn back_off(
        self: &Rc<Self>,
        state: &LayerState,
        rest: ChunkRange,
        backoff: &mut Backoff,
        trouble: &Trouble,
    ) -> Result<(), FetchError> {
        add(&self.counters.errors, 1);
        let url = state.origin.name();
        let range = TarRange::new(TarOffset(u64::from(rest.first) * CHUNK_BYTES), rest.bytes());
        let pause = backoff.pause(trouble, state, range)?;
        let why = trouble.why(&url);
        let late = FetchError::Deadline {
            url: url.clone(),
            range,
            after: self.options.deadline,
            why: why.clone(),
        };
        let mut waiting = None;
        let until = Instant::now().checked_add(pause);
        loop {
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            self.expire(rest, left, &late);
            if !self.in_flight.has_readers(rest) {
                // No reader has asked for it yet, or none any more: the one who does starts afresh.
                log::debug!("{url}: bytes {range}: {why}; no reader waits for them, so they are not asked for again");
                return Err(late);
            }
            if left.is_zero() {
                break;
            }
            if waiting.is_none() {
                log::warn!("{url}: bytes {range}: {why}; asking again in {pause:.1?}");
                waiting = Some(http::stay(&url, &why, pause));
            }
            sleep(left.min(LOOK_AT_READERS)).await;
        }
        add(&self.counters.retries, 1);
        Ok(())
    }

    /// Learns from the time that an answer's head took.
    pub(super) fn note_head(&self, body: &Body) {
        if let Some(took) = body.head_took() {
            self.budget.note_head(took);
        }
    }

    /// Counts bytes of a blob that came, and learns from when they came.
    pub(super) fn note_arrival(&self, state: &LayerState, len: u64) {
        if state.is_local() {
            return;
        }
        add(&self.counters.bytes_fetched, len);
        self.budget.note_arrival(len);
    }
}
