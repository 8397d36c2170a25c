//! The simulated link: one virtual clock that every body reserves its pieces on.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

/// The smallest piece of a body that takes its turn on the link, in bytes.
const PIECE: u64 = 16 * 1024;

/// On fast links a piece is this much time worth, so that a thread is not woken for each 16 KiB.
const PIECE_TIME: Duration = Duration::from_micros(200);

/// A sender that wakes up less than this too late keeps its place in time; one that was held up longer (its reader does not
/// read) has no claim on the time that passed.
const CATCH_UP: Duration = Duration::from_millis(5);

/// How far away and how wide the simulated path is. The default is neither: loopback as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// One round trip.
    pub rtt: Duration,
    /// Bytes per second from the origin to all its clients together; None is unlimited.
    pub rate: Option<u64>,
}

/// The link and until when it is reserved.
#[derive(Debug, Default)]
pub(super) struct Clock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    link: Link,
    free: Option<Instant>,
}

/// A body's place on the link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// The earliest moment at which its next piece may start.
    ready: Instant,
}

impl Turn {
    /// A body that is ready to leave at `ready`.
    pub(super) const fn new(ready: Instant) -> Self {
        Self { ready }
    }

    /// The piece that ended at `ended` has been handed over by `now`.
    pub(super) fn sent(&mut self, ended: Instant, now: Instant) {
        self.ready = if now.saturating_duration_since(ended) < CATCH_UP {
            ended
        } else {
            now
        };
    }
}

impl Clock {
    pub(super) fn set(&self, link: Link) {
        *lock(&self.state) = State { link, free: None };
    }

    pub(super) fn link(&self) -> Link {
        lock(&self.state).link
    }

    /// Reserves the link for the next piece of a body with `left` bytes to go. Returns how many bytes the piece may have
    /// and when it will have arrived; all of them at once when the link is unlimited.
    pub(super) fn reserve(&self, turn: Turn, left: u64) -> (u64, Instant) {
        let mut state = lock(&self.state);
        let Some(rate) = state.link.rate else {
            return (left, turn.ready);
        };
        let rate = rate.max(1);
        let piece = left.min(PIECE.max(bytes_in(PIECE_TIME, rate)));
        let start = state.free.map_or(turn.ready, |free| free.max(turn.ready));
        let end = start + time_for(piece, rate);
        state.free = Some(end);
        (piece, end)
    }
}

/// How many bytes a link of `rate` bytes per second carries in `time`.
fn bytes_in(time: Duration, rate: u64) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

/// How long `bytes` take at `rate` bytes per second.
pub(in crate::bench) fn time_for(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_bodies_take_turns() {
        let clock = Clock::default();
        clock.set(Link {
            rtt: Duration::ZERO,
            rate: Some(16 * 1024 * 1000),
        });
        let now = Instant::now();
        let (mut a, mut b) = (Turn::new(now), Turn::new(now));
        for round in 0_u32..10 {
            let (len, end_a) = clock.reserve(a, 1 << 30);
            assert_eq!(len, 16 * 1024);
            assert_eq!(end_a, now + Duration::from_millis(1) * (2 * round + 1));
            let (_, end_b) = clock.reserve(b, 1 << 30);
            assert_eq!(end_b, now + Duration::from_millis(1) * (2 * round + 2));
            a.sent(end_a, end_a + Duration::from_micros(300));
            b.sent(end_b, end_b);
        }
    }

    #[test]
    fn a_reader_that_stood_still_earns_no_credit() {
        let clock = Clock::default();
        clock.set(Link {
            rtt: Duration::ZERO,
            rate: Some(16 * 1024 * 1000),
        });
        let now = Instant::now();
        let mut turn = Turn::new(now);
        let (_, end) = clock.reserve(turn, 1 << 20);
        turn.sent(end, end + Duration::from_secs(1));
        let (_, next) = clock.reserve(turn, 1 << 20);
        assert_eq!(next, end + Duration::from_millis(1001));
    }

    #[test]
    fn an_unlimited_link_gives_everything_at_once() {
        let clock = Clock::default();
        let now = Instant::now();
        assert_eq!(clock.reserve(Turn::new(now), 5 << 30), (5 << 30, now));
    }
}
