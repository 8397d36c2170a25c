//! The connection to the server: what is asked for, and what comes how fast. In: positions that explorers want, each going only
//! forward. Out: their bytes, by answers that are read on or asked anew, whichever takes less time.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{BLOCK, len_u64};
use crate::http::{Backoff, Body};
use crate::index::TAR_BLOCK;
use crate::source::{Blob, Place, Requests, SourceError, wait_after};
use crate::units::TarOffset;
use crate::walk::Tap;

/// The shortest and the longest range asked for at once, and the first.
const SHORTEST: u64 = 4 << 10;
const LONGEST: u64 = 8 << 20;
pub(super) const FIRST: u64 = 64 << 10;
/// What dropping an answer costs, in round trips: a new connection, TLS, and finding its speed again.
const RECONNECT: f64 = 3.0;

/// The connection to the server as all readers share it.
pub(super) struct Wire<'a> {
    pub(super) blob: &'a Blob,
    pub(super) requests: Requests,
    pub(super) tap: RefCell<Option<&'a mut (dyn Tap + 'a)>>,
    pub(super) asked: Cell<u64>,
    pub(super) got: Cell<u64>,
    pub(super) link: Link,
}

impl Wire<'_> {
    /// Whether ranges are answered, where that is not known yet.
    pub(super) async fn answers_ranges(&self) -> Result<bool, SourceError> {
        if !matches!(self.blob.place, Place::Registry(_)) {
            return Ok(true);
        }
        let mut backoff = self.requests.backoff();
        loop {
            self.asked.set(self.asked.get() + 1);
            match self.requests.answers_ranges(self.blob).await {
                Ok(answers) => return Ok(answers),
                Err(failure) => wait_after(&mut backoff, failure).await?,
            }
        }
    }

    pub(super) async fn range(&self, at: u64, len: u64) -> Result<Body, SourceError> {
        self.counted(self.requests.range(self.blob, at, len)).await
    }

    pub(super) async fn whole(&self) -> Result<Body, SourceError> {
        self.counted(self.requests.whole(self.blob)).await
    }

    async fn counted(&self, request: impl Future<Output = Result<Body, SourceError>>) -> Result<Body, SourceError> {
        self.asked.set(self.asked.get() + 1);
        let asked = Instant::now();
        let body = request.await?;
        self.link.answered(asked.elapsed());
        Ok(body)
    }

    /// The next piece of an answer, counted and shown to the tap.
    pub(super) async fn piece(&self, body: &mut Body) -> Result<Option<(u64, Bytes)>, SourceError> {
        let waiting = self.link.wait_for_bytes();
        let piece = body.next().await?;
        drop(waiting);
        if let Some((at, bytes)) = &piece {
            self.got.set(self.got.get() + len_u64(bytes));
            self.link.delivered(bytes);
            if let Some(tap) = self.tap.borrow_mut().as_mut() {
                tap.bytes(TarOffset(*at), bytes);
            }
        }
        Ok(piece)
    }
}

/// The link as measured by all readers together: how long an answer takes to begin when nothing else is in its way, how many
/// bytes a second come at best, and how many readers share them.
pub(super) struct Link {
    round_trip: Cell<f64>,
    capacity: Cell<f64>,
    pub(super) readers: Cell<u32>,
    /// When the measurement began that is under way, the bytes that came since, and for how long somebody waited for bytes.
    since: Cell<Instant>,
    bytes: Cell<u64>,
    waited: Cell<Duration>,
    /// How many readers wait for bytes of answers that have begun, and since when any does.
    waiting: Cell<(u32, Instant)>,
}

/// A reader waits for bytes.
struct Waiting<'a>(&'a Link);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let (readers, since) = self.0.waiting.get();
        self.0.waiting.set((readers - 1, since));
        if readers == 1 {
            self.0.count_waiting(since);
        }
    }
}

impl Default for Link {
    fn default() -> Self {
        // Guesses for the first requests: 50 ms, 100 Mbit/s.
        Self {
            round_trip: Cell::new(0.05),
            capacity: Cell::new(12.5e6),
            readers: Cell::new(0),
            since: Cell::new(Instant::now()),
            bytes: Cell::new(0),
            waited: Cell::new(Duration::ZERO),
            waiting: Cell::new((0, Instant::now())),
        }
    }
}

impl Link {
    /// Bytes are counted over this time for one measurement.
    const SPAN: Duration = Duration::from_millis(50);
    /// What a measurement keeps of its worth until the next one, if that tells how much the link holds: links change.
    const FADE: f64 = 0.97;
    /// What a request costs at least, in seconds: on the shortest way it still is work for both sides.
    const LEAST: f64 = 0.001;

    /// How long an answer takes to begin.
    pub(super) fn round_trip(&self) -> Duration {
        Duration::from_secs_f64(self.round_trip.get().clamp(Self::LEAST, 60.0))
    }

    /// An answer began after this time. The shortest counts, because longer ones waited behind other answers.
    fn answered(&self, after: Duration) {
        self.round_trip
            .set((self.round_trip.get() * 1.01).min(after.as_secs_f64()));
    }

    fn wait_for_bytes(&self) -> Waiting<'_> {
        let (readers, since) = self.waiting.get();
        let since = if readers == 0 { Instant::now() } else { since };
        self.waiting.set((readers + 1, since));
        Waiting(self)
    }

    fn count_waiting(&self, since: Instant) {
        let since = since.max(self.since.get());
        self.waited.set(self.waited.get() + since.elapsed());
    }

    fn delivered(&self, bytes: &[u8]) {
        self.bytes.set(self.bytes.get() + len_u64(bytes));
        let took = self.since.get().elapsed();
        if took >= Self::SPAN {
            let (readers, since) = self.waiting.get();
            if readers > 0 {
                self.count_waiting(since);
            }
            let bytes = u32::try_from(self.bytes.replace(0)).unwrap_or(u32::MAX);
            let measured = f64::from(bytes) / took.as_secs_f64();
            // If bytes came as fast as they were wanted, little came because little was asked for. Less would be asked for then, and
            // so on, until every header costs a round trip.
            let was_full = self.waited.replace(Duration::ZERO) >= took / 2;
            let fade = if was_full { Self::FADE } else { 1.0 };
            self.capacity.set((self.capacity.get() * fade).max(measured));
            self.since.set(Instant::now());
        }
    }

    /// The bytes that come to one reader in the time of so many round trips.
    fn bytes_in(&self, round_trips: f64) -> u64 {
        let share = self.capacity.get() / f64::from(self.readers.get().max(1));
        // Bounded on both sides, so counting nanoseconds for bytes is exact enough and never out of range.
        let bounded = (share * self.round_trip.get().max(Self::LEAST) * round_trips).clamp(0.0, f64::from(1_u32 << 30));
        Duration::from_secs_f64(bounded / 1e9)
            .as_nanos()
            .try_into()
            .unwrap_or(u64::MAX)
    }
}

/// Reads the layer at positions that only go forward, deciding what to ask for.
pub(super) struct Reader<'w, 'a> {
    pub(super) wire: &'w Wire<'a>,
    body: Option<Body>,
    /// Failures since something came.
    backoff: Backoff,
    /// Bytes that came and were not taken yet, and where they lie.
    held: (u64, Bytes),
    window: u64,
    /// What was read since the last jump: where it led to, and the last block since.
    run_start: u64,
    run_end: u64,
    mean_run: u64,
}

impl<'w, 'a> Reader<'w, 'a> {
    pub(super) fn new(wire: &'w Wire<'a>) -> Self {
        let held = (0, Bytes::new());
        Self {
            wire,
            body: None,
            backoff: wire.requests.backoff(),
            held,
            window: FIRST,
            run_start: 0,
            run_end: 0,
            mean_run: FIRST,
        }
    }

    /// The end of the bytes that are here.
    fn held_end(&self) -> u64 {
        self.held.0 + len_u64(&self.held.1)
    }

    /// Whether bytes at `at` are here without waiting.
    pub(super) fn has(&self, at: u64) -> bool {
        at >= self.held.0 && at < self.held_end()
    }

    /// Bytes from exactly `at` on: at least one, as many as came together.
    pub(super) async fn read(&mut self, at: u64) -> Result<Bytes, SourceError> {
        loop {
            if self.has(at) {
                let skip = usize::try_from(at - self.held.0).unwrap_or(usize::MAX);
                self.run_end = at + TAR_BLOCK;
                return Ok(self.held.1.slice(skip..));
            }
            let failure = match self.advance(at).await {
                Ok(()) => {
                    self.backoff.came(self.held.1.len());
                    continue;
                }
                Err(failure) => failure,
            };
            self.body = None;
            wait_after(&mut self.backoff, failure).await?;
        }
    }

    /// Like [`read`](Self::read), but a whole block at least, unless the layer ends before.
    pub(super) async fn read_block(&mut self, at: u64) -> Result<Bytes, SourceError> {
        let mut bytes = self.read(at).await?;
        while bytes.len() < BLOCK && at + len_u64(&bytes) < self.wire.blob.len {
            let mut joined = bytes.to_vec();
            joined.extend_from_slice(&self.read(at + len_u64(&bytes)).await?);
            self.held = (at, joined.into());
            bytes = self.held.1.clone();
        }
        Ok(bytes)
    }

    /// One step towards `at`: the next piece of the open answer, or a new answer.
    async fn advance(&mut self, at: u64) -> Result<(), SourceError> {
        let reconnect = self.wire.link.bytes_in(RECONNECT);
        let useful = self.body.as_ref().is_some_and(|body| {
            // What has to be passed over before the answer is of use, or is at its end and its connection free again.
            let useless = body.end().min(at).saturating_sub(body.at());
            body.at() <= at && body.at() < body.end() && useless <= reconnect
        });
        if useful {
            if let Some(body) = &mut self.body {
                if let Some(piece) = self.wire.piece(body).await? {
                    self.held = piece;
                }
                if body.at() == body.end() {
                    // Reading its end as well frees the connection for the next request.
                    self.wire.piece(body).await?;
                    self.body = None;
                }
            }
            return Ok(());
        }
        self.body = None;
        self.choose_window(at);
        self.body = Some(self.wire.range(at, self.window).await?);
        Ok(())
    }

    /// How much to ask for at `at`: twice as much as before while reading on, after a jump as much as was read between jumps
    /// before; never more than a few round trips' worth, because the rest may have to be thrown away.
    fn choose_window(&mut self, at: u64) {
        let longest = self.wire.link.bytes_in(RECONNECT).clamp(SHORTEST, LONGEST);
        if self.run_end == 0 {
            self.run_start = at;
            self.window = FIRST.min(longest);
        } else if at.saturating_sub(self.run_end) <= self.wire.link.bytes_in(1.0) {
            self.window = self.window.saturating_mul(2).min(longest);
        } else {
            self.mean_run = (self.mean_run * 3 + self.run_end.saturating_sub(self.run_start)) / 4;
            self.run_start = at;
            self.window = self.mean_run.clamp(SHORTEST, longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many bytes come, one piece at a time, for six measurements.
    fn deliver(link: &Link, bytes: usize, is_waited_for: bool) {
        let end = Instant::now() + 6 * Link::SPAN + Link::SPAN / 2;
        let bytes = vec![0; bytes];
        while Instant::now() < end {
            let waiting = is_waited_for.then(|| link.wait_for_bytes());
            std::thread::sleep(Duration::from_millis(5));
            drop(waiting);
            link.delivered(&bytes);
        }
    }

    #[test]
    fn a_link_is_not_slow_because_little_is_asked_for() {
        let link = Link::default();
        let before = link.capacity.get();
        deliver(&link, 1, false);
        assert!(link.capacity.get() >= before, "{} < {before}", link.capacity.get());
        // But where bytes are waited for, so few are all that there are.
        deliver(&link, 1, true);
        assert!(
            link.capacity.get() < before * 0.95,
            "{} of {before}",
            link.capacity.get()
        );
        deliver(&link, 1 << 20, true);
        assert!(link.capacity.get() > before, "{} of {before}", link.capacity.get());
    }
}
