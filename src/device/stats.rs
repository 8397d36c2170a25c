//! What a device counts while it serves. In: one call per read. Out: a snapshot with percentiles.
//!
//! Counting must cost next to nothing on the threads that answer the kernel: every such thread has a [`ThreadCounters`] of its own,
//! made of relaxed atomics on cache lines that no other thread writes, and only a snapshot ever adds them up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where a byte that was served came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Computed filesystem metadata.
    Metadata,
    /// Zeros, which are kept nowhere.
    Zero,
    /// Layer bytes that were in memory already.
    Memory,
    /// Layer bytes read from a local file: the layer itself or its cache file.
    Disk,
    /// Layer bytes that the fetch thread had to bring; over HTTP that is the network.
    Fetched,
}

/// Counters of one thread. Shared by reference; see the module's comment for why there are several.
#[derive(Debug)]
#[repr(align(128))]
pub struct ThreadCounters {
    reads: AtomicU64,
    errors: AtomicU64,
    refused: AtomicU64,
    metadata: AtomicU64,
    zero: AtomicU64,
    memory: AtomicU64,
    disk: AtomicU64,
    fetched: AtomicU64,
    latency: Histogram,
}

impl Default for ThreadCounters {
    fn default() -> Self {
        Self {
            reads: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            metadata: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            disk: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            latency: Histogram::default(),
        }
    }
}

impl ThreadCounters {
    /// Counts one read, whatever becomes of it.
    pub fn read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a read that ended with an error.
    pub fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that a read-only device does not take.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts `bytes` of a read as coming from `source`.
    pub fn bytes(&self, source: Source, bytes: u64) {
        let counter = match source {
            Source::Metadata => &self.metadata,
            Source::Zero => &self.zero,
            Source::Memory => &self.memory,
            Source::Disk => &self.disk,
            Source::Fetched => &self.fetched,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Records that `count` reads took about `latency` each. Reads that need no waiting are measured by sample, because
    /// two looks at the clock can cost more than the read.
    pub fn took(&self, latency: Duration, count: u64) {
        self.latency.record(latency, count);
    }

    fn add_to(&self, total: &mut DeviceStats, latency: &mut [u64; BUCKETS]) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        total.reads += get(&self.reads);
        total.errors += get(&self.errors);
        total.refused += get(&self.refused);
        total.bytes.metadata += get(&self.metadata);
        total.bytes.zero += get(&self.zero);
        total.bytes.memory += get(&self.memory);
        total.bytes.disk += get(&self.disk);
        total.bytes.fetched += get(&self.fetched);
        for (sum, bucket) in latency.iter_mut().zip(&self.latency.buckets) {
            *sum += get(bucket);
        }
    }
}

/// A snapshot of a device's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Read requests of the kernel.
    pub reads: u64,
    /// Reads that ended with an error.
    pub errors: u64,
    /// Requests other than reads that a read-only device refuses: writes, discards.
    pub refused: u64,
    /// Bytes served, by where they came from.
    pub bytes: BytesBySource,
    /// How long reads took, from the kernel's request to the answer: those that the process has answered that serves the device
    /// now.
    pub latency: Latency,
}

impl DeviceStats {
    /// Adds what was counted before, by another process. Latencies stay this one's.
    pub(crate) fn carry(&mut self, before: &Self) {
        self.reads += before.reads;
        self.errors += before.errors;
        self.refused += before.refused;
        self.bytes.metadata += before.bytes.metadata;
        self.bytes.zero += before.bytes.zero;
        self.bytes.memory += before.bytes.memory;
        self.bytes.disk += before.bytes.disk;
        self.bytes.fetched += before.bytes.fetched;
    }
}

/// Bytes served, by where they came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesBySource {
    /// Computed filesystem metadata.
    pub metadata: u64,
    /// Zeros: holes, padding and free space.
    pub zero: u64,
    /// Layer bytes that were in memory.
    pub memory: u64,
    /// Layer bytes read from a local file.
    pub disk: u64,
    /// Layer bytes that the fetch thread brought.
    pub fetched: u64,
}

impl BytesBySource {
    /// Bytes of layers, wherever they were.
    #[must_use]
    pub const fn of_layers(&self) -> u64 {
        self.memory + self.disk + self.fetched
    }
}

/// Percentiles of a latency, in nanoseconds, each within a fifth of the truth.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many reads the figures describe.
    pub count: u64,
    /// Half of the reads were at most this slow.
    pub p50_ns: u64,
    /// Nine of ten.
    pub p90_ns: u64,
    /// Ninety-nine of a hundred.
    pub p99_ns: u64,
    /// The slowest.
    pub max_ns: u64,
}

/// Adds up `threads`.
pub(super) fn snapshot<'a>(threads: impl Iterator<Item = &'a ThreadCounters>) -> DeviceStats {
    let mut total = DeviceStats::default();
    let mut latency = [0; BUCKETS];
    for counters in threads {
        counters.add_to(&mut total, &mut latency);
    }
    total.latency = summarise(&latency);
    total
}

/// Four buckets to every power of two of nanoseconds.
const BUCKETS: usize = 256;

/// A histogram of durations that any thread may add to at any time.
#[derive(Debug)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

impl Histogram {
    fn record(&self, duration: Duration, count: u64) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanos)].fetch_add(count, Ordering::Relaxed);
    }
}

/// The bucket of `value`: its power of two, and the two bits below the highest.
fn bucket_of(value: u64) -> usize {
    let value = value.max(4);
    let power = value.ilog2();
    let quarter = (value >> (power - 2)) & 3;
    usize::try_from(u64::from(power - 2) * 4 + quarter).map_or(BUCKETS - 1, |bucket| bucket.min(BUCKETS - 1))
}

/// The largest value that falls into `bucket`.
fn top_of(bucket: usize) -> u64 {
    let power = bucket / 4 + 2;
    let quarter = u128::try_from(bucket % 4).unwrap_or(0);
    let end = (1u128 << power) + (quarter + 1) * (1u128 << (power - 2));
    u64::try_from(end - 1).unwrap_or(u64::MAX)
}

fn summarise(buckets: &[u64; BUCKETS]) -> Latency {
    let count: u64 = buckets.iter().sum();
    let at = |per_mille: u64| {
        let rank = (u128::from(count) * u128::from(per_mille)).div_ceil(1000).max(1);
        let mut seen = 0u128;
        for (bucket, &n) in buckets.iter().enumerate() {
            seen += u128::from(n);
            if seen >= rank {
                return top_of(bucket);
            }
        }
        0
    };
    Latency {
        count,
        p50_ns: at(500),
        p90_ns: at(900),
        p99_ns: at(990),
        max_ns: at(1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        let mut values: Vec<u64> = (0..64).filter_map(|power| (1u64 << power).checked_sub(1)).collect();
        values.extend((0..64).map(|power| 1u64 << power));
        values.extend([5, 100, 1500, 123_456_789, u64::MAX]);
        for value in values {
            let bucket = bucket_of(value);
            assert!(top_of(bucket) >= value, "{value} is above the top of its bucket");
            assert!(bucket == 0 || top_of(bucket - 1) < value, "{value} belongs lower");
            assert!(
                u128::from(top_of(bucket)) <= u128::from(value.max(6)) * 5 / 4 + 1,
                "{value} is far below"
            );
        }
    }

    #[test]
    fn percentiles_of_a_known_mix() {
        let counters = ThreadCounters::default();
        counters.took(Duration::from_micros(10), 900);
        counters.took(Duration::from_millis(20), 100);
        counters.read();
        counters.bytes(Source::Disk, 4096);
        let stats = snapshot([&counters, &ThreadCounters::default()].into_iter());
        assert_eq!((stats.reads, stats.bytes.disk, stats.latency.count), (1, 4096, 1000));
        assert!((10_000..13_000).contains(&stats.latency.p50_ns));
        assert!((10_000..13_000).contains(&stats.latency.p90_ns));
        assert!((20_000_000..26_000_000).contains(&stats.latency.p99_ns));
        assert!((20_000_000..26_000_000).contains(&stats.latency.max_ns));
    }

    #[test]
    fn an_idle_device_has_no_latency() {
        assert_eq!(snapshot([ThreadCounters::default()].iter()), DeviceStats::default());
    }
}
