//! Waits in words.

use std::fmt;
use std::time::Duration;

/// A time as a person says it: `3s`, `45min`, `2h`, `365d`, rounded up.
pub(super) struct Span(pub(super) Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_millis().div_ceil(1000);
        match seconds {
            0..120 => write!(f, "{seconds}s"),
            120..7200 => write!(f, "{}min", seconds.div_ceil(60)),
            7200..172_800 => write!(f, "{}h", seconds.div_ceil(3600)),
            _ => write!(f, "{}d", seconds.div_ceil(24 * 3600)),
        }
    }
}
