//! Requests in flight. In: a [`Flight`], which knows how to ask for its chunks and what of them has come. Out: all of its
//! chunks delivered, or their readers told why not.
//!
//! One guard and one retry loop serve both kinds of flights: [`PlainFlight`](super::plain::PlainFlight) where the blob is the
//! tar, [`CodedFlight`](super::coded::CodedFlight) where it has to be decoded.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::budget::Share;
use super::origin::{Body, Trouble};
use super::{Engine, LayerState};
use crate::fetch::FetchError;
use crate::fetch::runtime::{self, sleep};
use crate::fetch::stats::add;
use crate::http::{self, Kind, RetryPolicy, WaitOwner};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// What follows a failure: whatever a server or a proxy says, it may be well again, so it is asked again for as long as readers
/// wait, which their deadlines decide.
const RETRY: RetryPolicy = RetryPolicy {
    tries: u32::MAX,
    wrong: u32::MAX,
    refused: u32::MAX,
    first_pause: Duration::from_millis(50),
    longest_pause: Duration::from_secs(10),
    deadline: Duration::MAX,
};
/// A change of the layer that only its length shows, or bytes that are not what their digest says, are believed when at least so
/// many answers in a row say so, over at least [`FetchOptions::wrong_for`](crate::fetch::FetchOptions::wrong_for).
pub(super) const PROOF_TRIES: u32 = 6;
/// How long to wait when the machine is short of something that another process, or a request that ends, may give back.
const SHORTAGE: Duration = Duration::from_millis(200);
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
pub(super) struct Backoff {
    pauses: http::Backoff,
    wrong_for: Duration,
    /// Since when every answer says that the layer is another one, and how many have.
    changed: Option<(Instant, u32)>,
}

impl Backoff {
    pub(super) fn new(wrong_for: Duration) -> Self {
        Self {
            pauses: http::Backoff::new(RETRY),
            wrong_for,
            changed: None,
        }
    }

    /// How long to wait before the next try of `range`, or why there is none.
    pub(super) fn pause(
        &mut self,
        failure: &http::Error,
        state: &LayerState,
        range: TarRange,
    ) -> Result<Duration, FetchError> {
        let url = state.origin.name();
        let seems_changed = failure.kind() == Kind::Changed && !failure.is_lasting();
        if seems_changed {
            let (since, answers) = self.changed.get_or_insert((Instant::now(), 0));
            *answers += 1;
            if *answers >= PROOF_TRIES && since.elapsed() >= self.wrong_for {
                return Err(FetchError::Changed {
                    url,
                    how: failure.why(),
                });
            }
        } else {
            self.changed = None;
        }
        let failure = match failure.kind() {
            Kind::Changed | Kind::Setup => failure.clone(),
            _ => failure.clone().passing(),
        };
        self.pauses.pause_after(failure).map_err(|failure| {
            let why = Trouble::Net(failure.clone()).why(&url);
            match failure.kind() {
                Kind::Changed => FetchError::Changed {
                    url,
                    how: failure.why(),
                },
                _ => FetchError::WrongAnswer { url, range, why },
            }
        })
    }

    /// Says what is waited for, until something comes.
    pub(super) fn note(&mut self, name: &str, why: &str, pause: Duration) {
        self.pauses.note(name, why, pause);
    }

    /// Something came: whatever goes wrong next is another matter.
    pub(super) fn reset(&mut self) {
        self.pauses.succeeded();
        self.changed = None;
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

    /// What came was wrong. How long to wait before it is asked for again; an error ends the flight.
    fn mismatched(&self, engine: &Rc<Engine>, state: &LayerState, why: &str) -> Result<Duration, FetchError>;

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
    /// Who waits when a request of this engine waits: the engine's device, and those of other engines that join because the request
    /// brings what they wait for.
    pub(super) fn owner_of_request(&self) -> WaitOwner {
        let owner = WaitOwner::default();
        owner.join(&self.shared.owner);
        owner
    }

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
        let mut backoff = Backoff::new(self.options.wrong_for);
        loop {
            if let Some(error) = self.poison_of(flight.layer()) {
                return Err(error);
            }
            if !state.can_seek() {
                // It could when the flight began.
                self.start_stream(state, flight.layer(), None);
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
            if flight.progress() > before {
                backoff.reset();
            }
            add(&self.counters.errors, 1);
            let rest = flight.rest();
            self.end_bringing_of(rest);
            let range = TarRange::new(TarOffset(u64::from(rest.first) * CHUNK_BYTES), rest.bytes());
            let pause = match &trouble {
                Trouble::Wrong(why) => flight.mismatched(self, state, why)?,
                Trouble::Net(failure) => backoff.pause(failure, state, range)?,
                Trouble::File(error) => Self::pause_for_file(error, state, range)?,
            };
            self.back_off(state, rest, &mut backoff, &trouble, pause).await?;
        }
    }

    /// What a failing local file means: the machine may be short of something, else nothing will help.
    pub(super) fn pause_for_file(
        error: &std::io::Error,
        state: &LayerState,
        range: TarRange,
    ) -> Result<Duration, FetchError> {
        if runtime::is_shortage(error) {
            return Ok(SHORTAGE);
        }
        Err(FetchError::File {
            path: state.origin.name().into(),
            range,
            why: std::sync::Arc::new(std::io::Error::new(error.kind(), error.to_string())),
        })
    }

    /// What readers are told of `range` whose deadline ends while `trouble` lasts.
    pub(super) fn late(&self, state: &LayerState, range: TarRange, trouble: &Trouble) -> FetchError {
        let (url, after) = (state.origin.name(), self.options.deadline);
        let why = trouble.why(&url);
        match trouble {
            Trouble::Net(failure) => match failure.kind() {
                Kind::Refused(status) => FetchError::Refused {
                    url,
                    why,
                    after,
                    status: status.as_u16(),
                },
                Kind::WrongAnswer => FetchError::WrongAnswer { url, range, why },
                _ => FetchError::Deadline { url, range, after, why },
            },
            Trouble::File(_) | Trouble::Wrong(_) => FetchError::Deadline { url, range, after, why },
        }
    }

    /// After something went wrong with `rest`: waits for `pause`, until it is time for another try. An error, when no reader
    /// would still wait then.
    async fn back_off(
        self: &Rc<Self>,
        state: &LayerState,
        rest: ChunkRange,
        backoff: &mut Backoff,
        trouble: &Trouble,
        pause: Duration,
    ) -> Result<(), FetchError> {
        let url = state.origin.name();
        let range = TarRange::new(TarOffset(u64::from(rest.first) * CHUNK_BYTES), rest.bytes());
        let why = trouble.why(&url);
        let late = self.late(state, range, trouble);
        self.in_flight.note_trouble(rest, &late);
        // Whether bytes are wrong for good is found out to the end, whoever waits for them: it is said of the whole layer.
        let for_itself = matches!(trouble, Trouble::Wrong(_));
        let mut is_said = false;
        let until = Instant::now().checked_add(pause);
        loop {
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            self.expire(rest, left, &late);
            if self.stopping.get() {
                return Err(FetchError::Stopped);
            }
            if !for_itself && !self.in_flight.has_readers(rest) {
                // No reader has asked for it yet, or none any more: the one who does starts afresh.
                log::debug!("{url}: bytes {range}: {why}; no reader waits for them, so they are not asked for again");
                return Err(late);
            }
            if left.is_zero() {
                break;
            }
            if !is_said {
                is_said = true;
                log::warn!("{url}: bytes {range}: {why}; asking again in {pause:.1?}");
                backoff.note(&url, &why, pause);
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
