//! How fast a body comes. In: how long each piece was waited for, and its length. Out: whether that is a server that answers.
//!
//! A byte every few seconds is no silence, and brings nothing to anybody: a trickle counts as a stall. What counts is the time
//! that was spent waiting, so that a reader that takes its time is not laid at the server's door.

use std::time::Duration;

/// The pace of one body, or of several that are one range.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// How long may pass before it is looked at: the first bytes may have to wait for a disk.
    window: Duration,
    /// Bytes per second at least.
    slowest: u64,
    /// In this window: the time waited, and the bytes that came.
    waited: Duration,
    came: u64,
}

impl Pace {
    /// A body that has to bring `slowest` bytes a second, looked at each time when `window` was spent waiting for it.
    pub(crate) const fn new(window: Duration, slowest: u64) -> Self {
        Self {
            window,
            slowest,
            waited: Duration::ZERO,
            came: 0,
        }
    }

    /// After `waited` so many bytes came, and more have to. What is wrong, in words, if they come too slowly.
    pub(crate) fn note(&mut self, waited: Duration, len: u64) -> Option<String> {
        self.waited = self.waited.saturating_add(waited);
        self.came = self.came.saturating_add(len);
        if self.waited <= self.window {
            return None;
        }
        let Self { waited, came, .. } = std::mem::replace(self, Self::new(self.window, self.slowest));
        let least = u128::from(self.slowest) * waited.as_millis() / 1000;
        (u128::from(came) < least).then(|| format!("only {came} bytes came in {waited:.0?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_found_whatever_came_before() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(second * 10, 100);
        assert_eq!(pace.note(Duration::ZERO, 1 << 30), None);
        let seconds = (1..=25).find(|_| pace.note(second, 1).is_some());
        // The window with the fast bytes, and one more.
        assert_eq!(seconds, Some(22));
    }

    #[test]
    fn what_is_slow_and_steady_goes_on() {
        let mut pace = Pace::new(Duration::from_secs(10), 100);
        assert!((0..1000).all(|_| pace.note(Duration::from_millis(500), 60).is_none()));
        assert!((0..1000).any(|_| pace.note(Duration::from_millis(500), 40).is_some()));
        // One piece that takes long and brings much.
        let mut pace = Pace::new(Duration::from_millis(300), 64 << 10);
        assert_eq!(pace.note(Duration::from_millis(400), 30_000), None);
        let said = pace.note(Duration::from_millis(600), 100).unwrap();
        assert_eq!(said, "only 100 bytes came in 600ms");
    }
}
