//! Chance, where many clients must not do the same at the same time. Not for secrets.

use std::hash::{BuildHasher, RandomState};

#[cfg(feature = "unstable-internals")]
thread_local! {
    static SEEDED: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// Any number; on a thread with a seed the next of its numbers.
pub(crate) fn number() -> u64 {
    #[cfg(feature = "unstable-internals")]
    if let Some(seed) = SEEDED.get() {
        let next = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        SEEDED.set(Some(next));
        return next >> 32;
    }
    RandomState::new().hash_one(0)
}

/// From now on this thread's numbers follow from `seed`, for tests that repeat what happened; without one they are any again.
#[cfg(feature = "unstable-internals")]
pub fn seed(seed: Option<u64>) {
    SEEDED.set(seed);
}
