//! The bandwidth-delay product of the link to a server. In: when heads and bodies of answers came. Out: how many bytes may be
//! in flight before more would only queue.
//!
//! Pure arithmetic on the times it is told.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::hint::LinkEstimate;

/// Until something is known: what a 20 ms, 100 Mbit/s link holds.
const INITIAL_IN_FLIGHT: u64 = 256 << 10;
/// Below this requests cost more than they carry.
const LEAST_IN_FLIGHT: u64 = 64 << 10;
/// Above this memory fills faster than readers empty it.
const MOST_IN_FLIGHT: u64 = 16 << 20;
/// Round trips are taken to be at least this long: on a local link the bytes of 4 ms delay no read, and keep requests big.
const SHORTEST_TRIP: Duration = Duration::from_millis(4);
/// A rate is measured over at least this long and this many bytes of uninterrupted arrival.
const SAMPLE_TIME: Duration = Duration::from_millis(5);
const SAMPLE_BYTES: u64 = 64 << 10;
/// Samples count this long: a link that became slower is noticed within seconds.
const MEMORY: Duration = Duration::from_secs(4);
const MOST_SAMPLES: usize = 256;

/// Estimates round trip (the shortest recent one) and bandwidth (the highest recent one) of one link, as BBR does.
#[derive(Debug)]
pub struct BdpEstimator {
    trips: VecDeque<(Instant, Duration)>,
    /// Bytes a second.
    rates: VecDeque<(Instant, u64)>,
    /// When the running sample began, its bytes, and the last arrival.
    sample: Option<(Instant, u64, Instant)>,
}

impl Default for BdpEstimator {
    fn default() -> Self {
        Self::new()
    }
}

impl BdpEstimator {
    /// Knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            trips: VecDeque::new(),
            rates: VecDeque::new(),
            sample: None,
        }
    }

    /// A request was answered after `took`.
    pub fn head(&mut self, now: Instant, took: Duration) {
        // Only what may still become the minimum is kept.
        while self.trips.back().is_some_and(|(_, longer)| *longer >= took) {
            self.trips.pop_back();
        }
        self.trips.push_back((now, took));
        forget(&mut self.trips, now);
    }

    /// `bytes` of a body came.
    pub fn arrived(&mut self, now: Instant, bytes: u64) {
        let pause = self.trip() / 2;
        match &mut self.sample {
            // The bytes that end a silence came over a time we do not know.
            None => self.sample = Some((now, 0, now)),
            Some((_, _, last)) if now.saturating_duration_since(*last) > pause => self.sample = Some((now, 0, now)),
            Some((began, sum, last)) => {
                *sum += bytes;
                *last = now;
                let took = now.saturating_duration_since(*began);
                if took >= SAMPLE_TIME && *sum >= SAMPLE_BYTES {
                    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
                    let rate = sum.saturating_mul(1_000_000) / micros;
                    self.sample = Some((now, 0, now));
                    while self.rates.back().is_some_and(|(_, slower)| *slower <= rate) {
                        self.rates.pop_back();
                    }
                    self.rates.push_back((now, rate));
                    forget(&mut self.rates, now);
                }
            }
        }
    }

    /// The shortest recent round trip, or a guess.
    #[must_use]
    pub fn trip(&self) -> Duration {
        self.trips
            .front()
            .map_or(Duration::from_millis(20), |(_, trip)| *trip)
            .max(SHORTEST_TRIP)
    }

    /// The shortest recent round trip as it was measured, once one was.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.trips.front().map(|(_, trip)| *trip)
    }

    /// The highest recent rate in bytes a second, once one was measured.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.rates.front().map(|(_, rate)| *rate)
    }

    /// Both, as the planner wants them.
    #[must_use]
    pub fn estimate(&self) -> LinkEstimate {
        LinkEstimate {
            round_trip: self.round_trip(),
            rate: self.rate(),
        }
    }

    /// How many bytes may be asked for and not yet here: half more than the link holds, so that it never runs dry and a
    /// faster link shows itself.
    #[must_use]
    pub fn in_flight_limit(&self) -> u64 {
        let Some(rate) = self.rate() else {
            return INITIAL_IN_FLIGHT;
        };
        let trip = u64::try_from(self.trip().as_micros()).unwrap_or(u64::MAX);
        let held = rate.saturating_mul(trip) / 1_000_000;
        (held + held / 2).clamp(LEAST_IN_FLIGHT, MOST_IN_FLIGHT)
    }
}

/// Drops what is too old to count, but never the last.
fn forget<T>(samples: &mut VecDeque<(Instant, T)>, now: Instant) {
    while samples.len() > MOST_SAMPLES
        || samples.len() > 1
            && samples
                .front()
                .is_some_and(|(when, _)| now.saturating_duration_since(*when) > MEMORY)
    {
        samples.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `total` bytes arrive at `rate` bytes a second in pieces of 16 KiB.
    fn stream(link: &mut BdpEstimator, mut now: Instant, rate: u64, total: u64) -> Instant {
        for _ in 0..total / (16 << 10) {
            now += Duration::from_micros((16 << 10) * 1_000_000 / rate);
            link.arrived(now, 16 << 10);
        }
        now
    }

    #[test]
    fn finds_the_bandwidth_delay_product() {
        let mut link = BdpEstimator::new();
        assert_eq!(link.in_flight_limit(), INITIAL_IN_FLIGHT);
        let now = Instant::now();
        link.head(now, Duration::from_millis(20));
        stream(&mut link, now, 25_000_000, 2_000_000);
        let rate = link.rate().unwrap();
        assert!((24_000_000..26_000_000).contains(&rate), "{rate}");
        assert!(
            (700_000..800_000).contains(&link.in_flight_limit()),
            "{}",
            link.in_flight_limit()
        );
    }

    #[test]
    fn silence_is_not_slowness() {
        let mut link = BdpEstimator::new();
        let mut now = Instant::now();
        link.head(now, Duration::from_millis(20));
        for _ in 0..10 {
            now = stream(&mut link, now + Duration::from_millis(300), 25_000_000, 400_000);
        }
        assert!(link.rate().unwrap() > 24_000_000);
    }

    #[test]
    fn a_slower_link_is_noticed() {
        let mut link = BdpEstimator::new();
        let now = Instant::now();
        link.head(now, Duration::from_millis(20));
        let now = stream(&mut link, now, 25_000_000, 2_000_000);
        stream(&mut link, now, 2_000_000, 16_000_000);
        assert!(link.rate().unwrap() < 2_200_000);
        assert_eq!(link.in_flight_limit(), LEAST_IN_FLIGHT.max(60_000));
    }

    #[test]
    fn a_longer_trip_replaces_a_short_one_when_that_is_old() {
        let mut link = BdpEstimator::new();
        let now = Instant::now();
        link.head(now, Duration::from_millis(10));
        link.head(now + Duration::from_secs(1), Duration::from_millis(50));
        assert_eq!(link.trip(), Duration::from_millis(10));
        link.head(now + Duration::from_secs(9), Duration::from_millis(50));
        assert_eq!(link.trip(), Duration::from_millis(50));
    }
}
