//! The record of a device's start. In: every read of a layer, from the threads that answer the kernel. Out: a list of them, for whoever
//! asks, at any time.
//!
//! It costs a reader two atomic additions, four stores and a look at the clock while the start lasts, and one relaxed load ever after:
//! no lock, no allocation. Room for all reads is set aside at the beginning; the kernel gives memory only to the part that is written.
//!
//! Invariant: a slot is written by the one thread that took its number. A reader of the list sees a slot whole or not at all.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::units::{LayerId, TarOffset, TarRange, len_u64};

/// When a start is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecorderLimits {
    /// Nothing was read for so long...
    pub pause: Duration,
    /// ...after at least so many bytes had been: until then it is somebody who looks around before the program starts.
    pub least_bytes: u64,
    /// Or it has lasted so long.
    pub longest: Duration,
    /// Or so many bytes were read.
    pub most_bytes: u64,
    /// Or so many reads were made.
    pub most_reads: usize,
}

impl Default for RecorderLimits {
    fn default() -> Self {
        Self {
            pause: Duration::from_secs(3),
            least_bytes: 1 << 20,
            longest: Duration::from_secs(300),
            most_bytes: 1 << 30,
            most_reads: 64 << 10,
        }
    }
}

/// Where the bytes of a read were when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadFrom {
    /// In memory: fetched ahead, or read before.
    Memory,
    /// In the disk cache, or in a local layer.
    Disk,
    /// Nowhere on this machine: the read waited for the layer's server.
    Origin,
    /// On the way, for another device of this machine that has the same layer.
    Peer,
}

impl ReadFrom {
    const ALL: [Self; 4] = [Self::Memory, Self::Disk, Self::Origin, Self::Peer];

    const fn number(self) -> u64 {
        match self {
            Self::Memory => 0,
            Self::Disk => 1,
            Self::Origin => 2,
            Self::Peer => 3,
        }
    }

    fn of_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|from| from.number() == number)
    }
}

/// One read of a layer, as a [`StartRecorder`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedRead {
    /// When it was asked for, counted from the first read.
    pub at: Duration,
    /// The layer.
    pub layer: LayerId,
    /// The bytes.
    pub range: TarRange,
    /// Where they were.
    pub from: ReadFrom,
    /// How long it waited for them, right to a microsecond; none while it still waits, zero if they were at hand.
    pub waited: Option<Duration>,
}

/// Room for one read. All zero: not written yet. Three numbers beside each other in one list of numbers, because only of such is
/// memory to be had that costs nothing until it is written.
#[derive(Clone, Copy, Debug)]
struct Slot<'a> {
    /// The layer in the upper 16 bits, the tar offset in the others.
    place: &'a AtomicU64,
    /// The length in the upper half, the wait in microseconds in the lower: [`STILL_WAITS`] until it is over.
    extent: &'a AtomicU64,
    /// One more than the microseconds since the recorder was made, and in the lowest bits from where. Written last.
    when: &'a AtomicU64,
}

/// Numbers of a slot.
const SLOT: usize = 3;

impl<'a> Slot<'a> {
    fn of(numbers: &'a [AtomicU64]) -> Option<Self> {
        let [place, extent, when] = numbers else { return None };
        Some(Self { place, extent, when })
    }
}

/// Bits of a slot's `when` that say where the bytes were.
const FROM_BITS: u32 = 2;
/// A layer has fewer bytes than two to this.
const OFFSET_BITS: u32 = 48;
/// In place of a wait that is not over.
const STILL_WAITS: u64 = 0xffff_ffff;

/// A read that waits, to be told of when it does no more.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    slot: usize,
    asked_us: u64,
}

/// Records the reads of a device's start, until it is over; see the module.
#[derive(Debug)]
pub struct StartRecorder {
    limits: RecorderLimits,
    made: Instant,
    is_over: AtomicBool,
    /// How many slots were taken; may be more than there are.
    taken: AtomicUsize,
    bytes: AtomicU64,
    /// Reads that wait.
    waiting: AtomicU32,
    /// When the first read was, and when something last happened: microseconds since it was made, plus one; zero if never.
    first_us: AtomicU64,
    last_us: AtomicU64,
    /// Likewise, when the start began: the first read after somebody had only looked around.
    began_us: AtomicU64,
    numbers: Box<[AtomicU64]>,
}

impl StartRecorder {
    /// A recorder of a start that begins with the first read that it is told of.
    #[must_use]
    pub fn new(limits: RecorderLimits) -> Self {
        Self {
            limits,
            made: Instant::now(),
            is_over: AtomicBool::new(false),
            taken: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            first_us: AtomicU64::new(0),
            last_us: AtomicU64::new(0),
            began_us: AtomicU64::new(0),
            numbers: bytemuck::zeroed_slice_box(limits.most_reads.saturating_mul(SLOT)),
        }
    }

    /// Whether the start is over: nothing more is recorded.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// The start is over.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    fn slot(&self, number: usize) -> Option<Slot<'_>> {
        let at = number.checked_mul(SLOT)?;
        Slot::of(self.numbers.get(at..at.checked_add(SLOT)?)?)
    }

    /// How many slots were written, or are being written.
    fn written(&self) -> usize {
        self.taken.load(Ordering::Relaxed).min(self.numbers.len() / SLOT)
    }

    fn micros(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.made).as_micros();
        u64::try_from(since).unwrap_or(u64::MAX >> FROM_BITS).saturating_add(1)
    }

    /// Notes a read whose bytes are at hand.
    pub fn note(&self, layer: LayerId, range: TarRange, from: ReadFrom) {
        if !self.is_over() {
            self.write(layer, range, from, 0);
        }
    }

    /// Notes a read that has to wait; [`StartRecorder::came`] is to be told of its end. None when the start is over.
    pub fn note_waiting(&self, layer: LayerId, range: TarRange, from: ReadFrom) -> Option<Waiting> {
        if self.is_over() {
            return None;
        }
        let (slot, asked_us) = self.write(layer, range, from, STILL_WAITS)?;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Some(Waiting { slot, asked_us })
    }

    /// The bytes have come that a read waited for, `by_another_device`'s request or by its own; or an error has.
    pub fn came(&self, waiting: Waiting, by_another_device: bool) {
        let now = self.micros(Instant::now());
        let waited = now.saturating_sub(waiting.asked_us).min(STILL_WAITS - 1);
        if let Some(slot) = self.slot(waiting.slot) {
            // Nobody else writes it any more.
            let extent = slot.extent.load(Ordering::Relaxed);
            slot.extent.store(extent & !STILL_WAITS | waited, Ordering::Relaxed);
            if by_another_device {
                let when = slot.when.load(Ordering::Relaxed) >> FROM_BITS << FROM_BITS;
                slot.when.store(when | ReadFrom::Peer.number(), Ordering::Release);
            }
        }
        self.last_us.fetch_max(now, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Writes a read down; returns where, and when it was. None if the start was over before.
    fn write(&self, layer: LayerId, range: TarRange, from: ReadFrom, wait: u64) -> Option<(usize, u64)> {
        let now = self.micros(Instant::now());
        if self.ends_by(now) {
            self.end();
            return None;
        }
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        let (Some(slot), Ok(layer), true) = (
            self.slot(number),
            u16::try_from(layer.0),
            range.end().0 >> OFFSET_BITS == 0,
        ) else {
            self.end();
            return None;
        };
        if number == 0 {
            self.first_us.store(now, Ordering::Relaxed);
        }
        if number == 0 || self.has_paused(now) {
            self.began_us.store(now, Ordering::Relaxed);
        }
        self.last_us.fetch_max(now, Ordering::Relaxed);
        let bytes = self.bytes.fetch_add(range.len, Ordering::Relaxed) + range.len;
        if bytes >= self.limits.most_bytes {
            self.end();
        }
        slot.place
            .store(u64::from(layer) << OFFSET_BITS | range.start.0, Ordering::Relaxed);
        let len = range.len.min(u64::from(u32::MAX));
        slot.extent.store(len << 32 | wait, Ordering::Relaxed);
        slot.when.store(now << FROM_BITS | from.number(), Ordering::Release);
        Some((number, now))
    }

    /// Whether by `now`, in microseconds, the start has come to its end: the reader paused, or it is long enough.
    fn ends_by(&self, now: u64) -> bool {
        let began = self.began_us.load(Ordering::Relaxed);
        if began == 0 || self.waiting.load(Ordering::Relaxed) > 0 {
            return false;
        }
        let lasted = Duration::from_micros(now.saturating_sub(began));
        let is_more_than_a_look = self.bytes.load(Ordering::Relaxed) >= self.limits.least_bytes;
        (self.has_paused(now) || lasted >= self.limits.longest) && is_more_than_a_look
    }

    /// Whether by `now` nothing has happened for a while.
    fn has_paused(&self, now: u64) -> bool {
        let last = self.last_us.load(Ordering::Relaxed);
        Duration::from_micros(now.saturating_sub(last)) >= self.limits.pause
    }

    /// Looks at the clock: whether the start is over by now. For who looks after devices from time to time.
    pub fn look(&self) -> bool {
        if !self.is_over() && self.ends_by(self.micros(Instant::now())) {
            self.end();
        }
        self.is_over()
    }

    /// All that was recorded until now, in the order in which it was asked for.
    #[must_use]
    pub fn reads(&self) -> Vec<RecordedRead> {
        let first = self.first_us.load(Ordering::Relaxed);
        let one = |slot: Slot<'_>| {
            let when = slot.when.load(Ordering::Acquire);
            let (place, extent) = (slot.place.load(Ordering::Relaxed), slot.extent.load(Ordering::Relaxed));
            let from = ReadFrom::of_number(when & ((1 << FROM_BITS) - 1))?;
            let wait = extent & STILL_WAITS;
            (when != 0).then(|| RecordedRead {
                at: Duration::from_micros((when >> FROM_BITS).saturating_sub(first)),
                layer: LayerId(u32::try_from(place >> OFFSET_BITS).unwrap_or(u32::MAX)),
                range: TarRange::new(TarOffset(place & ((1 << OFFSET_BITS) - 1)), extent >> 32),
                from,
                waited: (wait != STILL_WAITS).then(|| Duration::from_micros(wait)),
            })
        };
        let mut reads: Vec<RecordedRead> = (0..self.written())
            .filter_map(|number| one(self.slot(number)?))
            .collect();
        reads.sort_by_key(|read| read.at);
        reads
    }

    /// How many reads were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        len_u64(self.written())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> TarRange {
        TarRange::new(TarOffset(start), len)
    }

    fn limits() -> RecorderLimits {
        RecorderLimits {
            most_reads: 100,
            ..RecorderLimits::default()
        }
    }

    #[test]
    fn reads_come_back_as_they_were() {
        let recorder = StartRecorder::new(limits());
        assert!(recorder.reads().is_empty());
        recorder.note(LayerId(3), range(4096, 8192), ReadFrom::Memory);
        let waiting = recorder
            .note_waiting(LayerId(0), range(0, 512), ReadFrom::Origin)
            .unwrap();
        recorder.note(LayerId(65_535), range((1 << OFFSET_BITS) - 4097, 4096), ReadFrom::Disk);
        let reads = recorder.reads();
        let seen: Vec<_> = reads.iter().map(|read| (read.layer.0, read.range, read.from)).collect();
        assert_eq!(
            seen,
            [
                (3, range(4096, 8192), ReadFrom::Memory),
                (0, range(0, 512), ReadFrom::Origin),
                (65_535, range((1 << OFFSET_BITS) - 4097, 4096), ReadFrom::Disk),
            ]
        );
        assert_eq!(reads[0].at, Duration::ZERO);
        assert_eq!((reads[0].waited, reads[1].waited), (Some(Duration::ZERO), None));
        std::thread::sleep(Duration::from_millis(2));
        recorder.came(waiting, true);
        assert_eq!(recorder.reads()[1].from, ReadFrom::Peer);
        let waited = recorder.reads()[1].waited.unwrap();
        assert!(waited >= Duration::from_millis(2), "{waited:?}");
        assert!(!recorder.look());
    }

    #[test]
    fn it_ends_at_each_of_its_bounds() {
        let full = StartRecorder::new(limits());
        for n in 0..150 {
            full.note(LayerId(0), range(n * 4096, 4096), ReadFrom::Disk);
        }
        assert!(full.is_over());
        assert_eq!((full.reads().len(), full.count()), (100, 100));

        let much = StartRecorder::new(RecorderLimits {
            most_bytes: 8192,
            ..limits()
        });
        for n in 0..5 {
            much.note(LayerId(0), range(n * 4096, 4096), ReadFrom::Disk);
        }
        assert_eq!((much.is_over(), much.reads().len()), (true, 2));

        let long = StartRecorder::new(RecorderLimits {
            longest: Duration::from_millis(1),
            least_bytes: 4096,
            ..limits()
        });
        long.note(LayerId(0), range(0, 4096), ReadFrom::Disk);
        std::thread::sleep(Duration::from_millis(3));
        assert!(long.look());
        long.note(LayerId(0), range(0, 4096), ReadFrom::Disk);
        assert_eq!(long.reads().len(), 1);

        let far = StartRecorder::new(limits());
        far.note(LayerId(70_000), range(0, 4096), ReadFrom::Disk);
        assert!(far.is_over() && far.reads().is_empty());
    }

    #[test]
    fn a_pause_counts_after_something_was_read_and_while_nothing_waits() {
        let limits = RecorderLimits {
            pause: Duration::from_millis(2),
            least_bytes: 8192,
            ..limits()
        };
        let wait = || std::thread::sleep(Duration::from_millis(5));
        let recorder = StartRecorder::new(limits);
        wait();
        assert!(!recorder.look(), "it has not begun");
        recorder.note(LayerId(0), range(0, 4096), ReadFrom::Disk);
        wait();
        assert!(!recorder.look(), "somebody looked around");
        let waiting = recorder.note_waiting(LayerId(0), range(0, 4096), ReadFrom::Origin);
        wait();
        assert!(!recorder.look(), "it waits for its server");
        recorder.came(waiting.unwrap(), false);
        assert!(!recorder.look());
        wait();
        recorder.note(LayerId(0), range(0, 4096), ReadFrom::Disk);
        assert_eq!((recorder.is_over(), recorder.reads().len()), (true, 2));
        assert!(
            recorder
                .note_waiting(LayerId(0), range(0, 1), ReadFrom::Origin)
                .is_none()
        );
    }

    #[test]
    fn threads_write_side_by_side() {
        let recorder = StartRecorder::new(RecorderLimits {
            most_reads: 4000,
            ..limits()
        });
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || {
                    for n in 0..1000 {
                        recorder.note(
                            LayerId(thread),
                            range(n * 4096, u64::from(thread) + 1),
                            ReadFrom::Memory,
                        );
                    }
                });
            }
        });
        let reads = recorder.reads();
        assert_eq!(reads.len(), 4000);
        for thread in 0..4 {
            let own: Vec<_> = reads.iter().filter(|read| read.layer == LayerId(thread)).collect();
            assert!(own.iter().all(|read| read.range.len == u64::from(thread) + 1));
            let mut places: Vec<u64> = own.iter().map(|read| read.range.start.0 / 4096).collect();
            places.sort_unstable();
            assert_eq!(places, (0..1000).collect::<Vec<u64>>());
        }
    }
}
