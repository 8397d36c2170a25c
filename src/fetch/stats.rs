//! What the fetcher counts. In: events from any thread. Out: a snapshot that serialises.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cost::PrepareCost;
use crate::prefetch::HintCount;
use crate::units::len_u64;

/// Each power of two of microseconds is cut in this many buckets: percentiles are right to an eighth.
const STEPS: u64 = 8;
/// 2^40 µs is twelve days; nothing waits longer.
const BUCKETS: usize = 40 * 8;

/// Latencies by bucket.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
    longest_us: AtomicU64,
}

fn bucket(us: u64) -> usize {
    let us = us.max(STEPS);
    let power = u64::from(us.ilog2());
    let step = (us >> (power - 3)) - STEPS;
    usize::try_from((power - 3) * STEPS + step)
        .unwrap_or(usize::MAX)
        .min(BUCKETS - 1)
}

/// The largest latency that falls into `bucket`.
fn upper_bound_us(bucket: usize) -> u64 {
    let (power, step) = (len_u64(bucket) / STEPS, len_u64(bucket) % STEPS);
    ((STEPS + step + 1) << power) - 1
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: std::iter::repeat_with(|| AtomicU64::new(0)).take(BUCKETS).collect(),
            longest_us: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    pub(crate) fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.longest_us.fetch_max(us, Ordering::Relaxed);
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let counts: Vec<u64> = self.buckets.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let max_us = self.longest_us.load(Ordering::Relaxed);
        let at = |permille: u64| {
            let wanted = (total * permille).div_ceil(1000);
            let mut seen = 0;
            for (bucket, count) in counts.iter().enumerate() {
                seen += count;
                if seen >= wanted && seen > 0 {
                    return upper_bound_us(bucket).min(max_us);
                }
            }
            0
        };
        Percentiles {
            count: total,
            p50_us: at(500),
            p90_us: at(900),
            p99_us: at(990),
            p999_us: at(999),
            max_us,
        }
    }
}

/// How long things took, in microseconds; right to an eighth, the maximum exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Percentiles {
    /// How many were measured.
    pub count: u64,
    /// Half took no longer.
    pub p50_us: u64,
    /// Nine of ten took no longer.
    pub p90_us: u64,
    /// All but one in a hundred took no longer.
    pub p99_us: u64,
    /// All but one in a thousand took no longer.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Bytes handed out, by where they were when they were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BytesByOrigin {
    /// In the memory tier.
    pub memory: u64,
    /// In a local layer or in the cache file.
    pub disk: u64,
    /// Neither, but another layer that is here has the same content.
    pub deduplicated: u64,
    /// None of these: a reader waited for the network.
    pub network: u64,
}

/// Something that does not come, for now: its server failed, wishes to be left alone, or does not answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wait {
    /// What is to be asked for: a blob's name or a URL, without secrets.
    pub place: String,
    /// What happened.
    pub why: String,
    /// How long nothing of it has come, in milliseconds.
    pub waited_ms: u64,
    /// How long until it is asked for again, in milliseconds; 0 while a request is under way.
    pub left_ms: u64,
}

/// What one hint of the planner had fetched ahead of one layer's readers, and how much of that they read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HintStats {
    /// The layer, the lowest being 0.
    pub layer: u32,
    /// Why it was fetched: `rest`, `ahead`, `loader`, `initialiser`, `import`, `neighbour`, `between`, `bundled`.
    pub hint: String,
    /// Bytes of tar that were fetched, in whole chunks.
    pub fetched: u64,
    /// Of those, the bytes of chunks that were read later.
    pub read: u64,
    /// Whether the hint is silent for the layer now, because too little of what it had fetched was read.
    pub silenced: bool,
}

impl From<HintCount> for HintStats {
    fn from(count: HintCount) -> Self {
        Self {
            layer: count.layer.0,
            hint: count.reason.name().to_owned(),
            fetched: count.fetched,
            read: count.read,
            silenced: count.silenced,
        }
    }
}

/// What one hint had fetched of all layers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintTotal<'a> {
    /// As in [`HintStats::hint`].
    pub hint: &'a str,
    /// Bytes of tar that were fetched, in whole chunks.
    pub fetched: u64,
    /// Of those, the bytes of chunks that were read later.
    pub read: u64,
    /// Layers for which the hint is silent now.
    pub silent_layers: u64,
}

/// Adds to `hints` what was counted before.
fn carry_hints(hints: &mut Vec<HintStats>, before: &[HintStats]) {
    for old in before {
        let same = |hint: &&mut HintStats| hint.layer == old.layer && hint.hint == old.hint;
        match hints.iter_mut().find(same) {
            Some(hint) => {
                hint.fetched += old.fetched;
                hint.read += old.read;
            }
            None => hints.push(HintStats {
                silenced: false,
                ..old.clone()
            }),
        }
    }
}

/// What a pool of fetchers holds at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolStats {
    /// Bytes of chunks in the memory cache.
    pub bytes_memory: u64,
    /// Bytes of chunks that wait to be written to the disk cache.
    pub bytes_unwritten: u64,
    /// Connections that are open or being opened.
    pub connections: u64,
    /// Devices whose engines run.
    pub devices: u64,
}

/// The numbers of a pool that the fetch thread alone changes.
#[derive(Debug, Default)]
pub(crate) struct PoolGauges {
    pub(crate) bytes_unwritten: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) devices: AtomicU64,
}

impl PoolGauges {
    pub(crate) fn snapshot(&self) -> PoolStats {
        PoolStats {
            bytes_memory: 0,
            bytes_unwritten: self.bytes_unwritten.load(Ordering::Relaxed),
            connections: self.connections.load(Ordering::Relaxed),
            devices: self.devices.load(Ordering::Relaxed),
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters that any thread adds to.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
            pub(crate) bytes_memory: AtomicU64,
            pub(crate) bytes_disk: AtomicU64,
            pub(crate) bytes_deduplicated: AtomicU64,
            pub(crate) bytes_network: AtomicU64,
            pub(crate) latency: Histogram,
        }

        /// What a fetcher has done since it started, and those before it of the same device. Read from another process it may be
        /// another version's: a counter that is not there is 0.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct FetchStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Bytes of tar in all layers that have to be brought...
            pub bytes_layers: u64,
            /// ...and how many of them are in the disk cache.
            pub bytes_held: u64,
            /// Why the disk cache takes nothing now, if its disk refuses to be written, or has no room for it.
            pub cache_trouble: Option<String>,
            /// Bytes handed out, by where they were.
            pub bytes: BytesByOrigin,
            /// From asking to answer, for reads that were left with the fetch thread of the process that serves the device now.
            pub latency: Percentiles,
            /// What was fetched ahead of need, for each layer and hint, and how much of it was read.
            pub hints: Vec<HintStats>,
            /// What was downloaded before the fetcher began, to find out what the layers hold.
            pub prepared: PrepareCost,
            /// Why a layer, or all of the device, is read no more; none as long as nothing is wrong with it.
            pub poisoned: Option<String>,
            /// What the fetcher waits for on the network, and why; first what is asked for again last.
            pub waiting: Vec<Wait>,
        }

        impl FetchStats {
            /// What each hint had fetched of all layers together, in the order in which they stand there.
            #[must_use]
            pub fn hint_totals(&self) -> Vec<HintTotal<'_>> {
                let mut totals: Vec<HintTotal<'_>> = Vec::new();
                for of_layer in &self.hints {
                    let hint = of_layer.hint.as_str();
                    let place = totals.iter().position(|total| total.hint == hint);
                    let place = place.unwrap_or_else(|| {
                        totals.push(HintTotal { hint, fetched: 0, read: 0, silent_layers: 0 });
                        totals.len() - 1
                    });
                    let total = &mut totals[place];
                    total.fetched += of_layer.fetched;
                    total.read += of_layer.read;
                    total.silent_layers += u64::from(of_layer.silenced);
                }
                totals
            }

            /// Adds what was counted before, by another process. What is not a counter stays as it is.
            pub(crate) fn carry(&mut self, before: &Self) {
                let in_flight = self.in_flight;
                $(self.$name += before.$name;)*
                self.in_flight = in_flight;
                self.bytes.memory += before.bytes.memory;
                self.bytes.disk += before.bytes.disk;
                self.bytes.deduplicated += before.bytes.deduplicated;
                self.bytes.network += before.bytes.network;
                carry_hints(&mut self.hints, &before.hints);
            }

            /// The same with nothing in it but what [`carry`](Self::carry) adds.
            pub(crate) fn only_counters(&self) -> Self {
                let mut counters = Self::default();
                counters.carry(self);
                counters
            }
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> FetchStats {
                FetchStats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    bytes_layers: 0,
                    bytes_held: 0,
                    cache_trouble: None,
                    bytes: BytesByOrigin {
                        memory: self.bytes_memory.load(Ordering::Relaxed),
                        disk: self.bytes_disk.load(Ordering::Relaxed),
                        deduplicated: self.bytes_deduplicated.load(Ordering::Relaxed),
                        network: self.bytes_network.load(Ordering::Relaxed),
                    },
                    latency: self.latency.percentiles(),
                    hints: Vec::new(),
                    prepared: PrepareCost::default(),
                    poisoned: None,
                    waiting: Vec::new(),
                }
            }
        }
    };
}

counters! {
    /// Reads of a range: those that found it at once, and those that were left with the fetch thread.
    reads,
    /// Reads that ended in an error.
    read_errors,
    /// Reads waiting for an answer now.
    in_flight,
    /// Requests sent to servers, retries and followed redirects included.
    requests,
    /// Requests that had to be sent again.
    retries,
    /// Answers that were wrong or missing: refused, cut short, another range, another length, timed out.
    errors,
    /// Connections opened.
    connections,
    /// Body bytes that came over the network.
    bytes_fetched,
    /// Body bytes that were prefetched.
    bytes_prefetched,
    /// Of those, the bytes of chunks that were read later.
    prefetched_used,
    /// Bytes that were fetched for the disk cache alone, because everything is to be there.
    bytes_filled,
    /// Bytes written to the disk cache.
    bytes_stored,
    /// Bytes of tar that came out of decoders, what came along included.
    bytes_decoded,
    /// Chunks checked against the digests of an index.
    chunks_checked,
    /// Of those, chunks that were wrong, and compressed bytes that could not be decoded: counted each time.
    chunks_wrong,
    /// Chunks of the disk cache that could not be read back, or were not what was written: they are fetched again.
    cache_damaged,
    /// Layers that turned out to be damaged or forged, and are read no more.
    layers_poisoned,
}

/// Adds without ordering: counters only.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Takes away without ordering, for gauges.
pub(crate) fn take(counter: &AtomicU64, n: u64) {
    counter.fetch_sub(n, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_close() {
        let mut last = 0;
        for us in 1..100_000u64 {
            let here = bucket(us);
            assert!(
                here == last || here == last + 1,
                "{us} jumps from bucket {last} to {here}"
            );
            assert!(upper_bound_us(here) >= us);
            assert!(upper_bound_us(here) <= us.max(STEPS) + us / STEPS + 1);
            last = here;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn hints_are_carried_over_and_summed_by_name() {
        let hint = |layer, hint: &str, fetched, read, silenced| HintStats {
            layer,
            hint: hint.to_owned(),
            fetched,
            read,
            silenced,
        };
        let before = FetchStats {
            hints: vec![hint(0, "rest", 10, 5, true), hint(1, "import", 7, 7, false)],
            ..FetchStats::default()
        };
        let mut now = FetchStats {
            hints: vec![hint(0, "rest", 3, 1, false), hint(1, "rest", 20, 1, true)],
            ..FetchStats::default()
        };
        now.carry(&before);
        let total = |hint, fetched, read, silent_layers| HintTotal {
            hint,
            fetched,
            read,
            silent_layers,
        };
        assert_eq!(
            now.hint_totals(),
            [total("rest", 33, 7, 1), total("import", 7, 7, 0)],
            "who was silent then is heard again"
        );
    }

    #[test]
    fn percentiles_of_a_known_set() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentiles(), Percentiles::default());
        for ms in 1..=100 {
            histogram.record(Duration::from_millis(ms));
        }
        let found = histogram.percentiles();
        assert_eq!((found.count, found.max_us), (100, 100_000));
        assert!((50_000..57_000).contains(&found.p50_us), "{found:?}");
        assert!((99_000..=100_000).contains(&found.p99_us), "{found:?}");
    }
}
