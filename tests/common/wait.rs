//! Waiting for what comes true by itself, and never for ever: a test that waits without a bound hangs where it should fail.

use std::time::{Duration, Instant};

/// Longer than anything takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until `is_so`.
///
/// # Panics
/// When that is not so within a minute.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what} has not come true in a minute");
        std::thread::sleep(PAUSE);
    }
}
