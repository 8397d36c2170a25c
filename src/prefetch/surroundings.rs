//! What belongs with what a reader waits for: a small file whole; of a big one the surroundings.
//!
//! A window around a touch pays if the waits that it saves take longer than its bytes: of a window of which one chunk in `n`
//! is read later, every `2 * n` chunks save about one round trip (what is read lies in clusters). So how much of the latest
//! windows was read, compared with what the link holds in a round trip, says whether the next one should be wider or
//! narrower. Far away on a wide link almost any window pays; next door hardly one does.

use std::collections::VecDeque;

use super::Look;
use super::chunks::ChunkRange;
use super::hint::{Hint, Layers, Touch};
use super::options::PlanOptions;
use super::reason::{Planned, Reason};
use super::wishes::Wishes;
use crate::image::FileId;
use crate::units::{CHUNK_BYTES, TarOffset, TarRange};

/// How many big files' touches are remembered.
const MOST_FILES: usize = 32;
/// By so many of its latest windows is judged how much is read around a touch of a file.
const MOST_WINDOWS: usize = 4;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Surroundings {
    /// Big files, the one that was touched last first.
    files: VecDeque<BigFile>,
    wishes: Wishes,
}

/// What was fetched around the latest touches of a big file.
#[derive(Debug)]
struct BigFile {
    file: FileId,
    /// How wide the next window is, in bytes.
    width: u64,
    /// The latest first.
    windows: VecDeque<Window>,
}

/// What was fetched around a touch.
#[derive(Debug)]
struct Window {
    chunks: ChunkRange,
    /// How many of its chunks have been touched: a bit each; of more than 64 several share one.
    touched: u64,
}

impl Window {
    fn touch(&mut self, chunks: ChunkRange) {
        let (first, end) = (chunks.first.max(self.chunks.first), chunks.end.min(self.chunks.end));
        for index in first..end {
            self.touched |= 1 << self.bit(index);
        }
    }

    fn bit(&self, index: u32) -> u32 {
        (index - self.chunks.first) / self.chunks.count().div_ceil(64).max(1)
    }

    /// How many bits are set, and how many there are.
    fn density(&self) -> (u32, u32) {
        let bits = self
            .chunks
            .end
            .checked_sub(1)
            .map_or(0, |last| self.bit(last.max(self.chunks.first)) + 1);
        (self.touched.count_ones(), bits)
    }
}

impl BigFile {
    /// Fits the width to what was read of the latest windows: wider where they paid twice, narrower where they did not.
    fn fit(&mut self, held: u64, options: &PlanOptions) {
        let sum = |(read, all): (u32, u32), window: &Window| {
            let (touched, bits) = window.density();
            (read + touched, all + bits)
        };
        let (read, all) = self.windows.iter().fold((0, 0), sum);
        if all == 0 {
            return;
        }
        let widest = (held / 100 * options.widest_touch_percent).next_power_of_two();
        let narrowest = narrowest(held, options);
        let widest = widest.clamp(narrowest, options.widest_touch_bytes);
        // What the chunks between two that are read take on the link, against half a round trip.
        let (gain, cost) = (u64::from(read) * held, u64::from(all) * CHUNK_BYTES);
        if gain >= 2 * cost {
            self.width *= 2;
        } else if gain < cost {
            self.width /= 2;
        }
        self.width = self.width.clamp(narrowest, widest);
    }
}

/// The narrowest window on a link that holds `held` bytes, in bytes: a chunk next door.
fn narrowest(held: u64, options: &PlanOptions) -> u64 {
    held.next_power_of_two()
        .clamp(CHUNK_BYTES, options.narrowest_touch_bytes.max(CHUNK_BYTES))
}

impl Hint for Surroundings {
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, now: &mut Vec<Planned>) {
        if let Some(file) = touch.file
            && let Some(big) = self.files.iter_mut().find(|big| big.file == file.file)
        {
            let chunks = ChunkRange::of(touch.layer, touch.range);
            big.windows.iter_mut().for_each(|window| window.touch(chunks));
        }
        if !touch.waits {
            return;
        }
        let wanted = ChunkRange::of(touch.layer, touch.range);
        let with = self.belonging(touch, layers);
        // Next door even a small file is long to wait for.
        let held = layers.link.held().next_power_of_two();
        let demand = layers
            .options
            .demand_bytes
            .min(held.max(narrowest(held, &layers.options)));
        if with.bytes() <= demand.max(wanted.bytes()) {
            now.push(Reason::Rest.of(with));
            return;
        }
        // What lies behind the demanded chunks goes with them as far as it may; the rest follows.
        let room = demand.saturating_sub(wanted.bytes()) / CHUNK_BYTES;
        let end = wanted
            .end
            .saturating_add(u32::try_from(room).unwrap_or(u32::MAX))
            .min(with.end);
        now.push(Reason::Rest.of(ChunkRange { end, ..wanted }));
        self.want_soon(ChunkRange { first: end, ..with });
        self.want_soon(ChunkRange {
            end: wanted.first.min(with.end),
            ..with
        });
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}

impl Surroundings {
    /// What belongs with a touch: a small file whole; of a big one the surroundings.
    fn belonging(&mut self, touch: Touch, layers: &Layers) -> ChunkRange {
        let (layer, range) = (touch.layer, touch.range);
        let mut all = ChunkRange::of(layer, range);
        let file_at = |at| layers.files.as_ref().and_then(|files| files.file_at(layer, at));
        let ends_in = file_at(TarOffset(range.end().0.saturating_sub(1))).filter(|last| touch.file != Some(*last));
        for file in touch.file.into_iter().chain(ends_in) {
            let part = if file.range.len <= layers.options.small_file_bytes {
                file.range
            } else {
                let width = self.widen(file.file, layers);
                let start = range.start.max(file.range.start);
                let offset = start.since(file.range.start) / width * width;
                let window = file.range.start.plus(offset);
                let end = window.plus(width).min(file.range.end());
                let chunks = ChunkRange::of(layer, TarRange::new(window, end.since(window)));
                self.remember(chunks, all);
                // What lies before the range would keep its reader waiting: it follows.
                let before = ChunkRange::of(layer, TarRange::new(window, start.since(window)));
                self.want_soon(before);
                TarRange::new(start, end.since(start))
            };
            let part = ChunkRange::of(layer, part);
            all = ChunkRange {
                layer,
                first: all.first.min(part.first),
                end: all.end.max(part.end),
            };
        }
        all
    }

    /// How wide the surroundings of this touch of a big file are.
    fn widen(&mut self, file: FileId, layers: &Layers) -> u64 {
        let (held, options) = (layers.link.held(), &layers.options);
        let first = (held / 100 * options.first_touch_percent).next_power_of_two();
        let place = self.files.iter().position(|big| big.file == file);
        let mut big = place.and_then(|place| self.files.remove(place)).unwrap_or(BigFile {
            file,
            width: first.clamp(narrowest(held, options), options.first_touch_bytes),
            windows: VecDeque::new(),
        });
        big.fit(held, options);
        let width = big.width;
        self.files.push_front(big);
        self.files.truncate(MOST_FILES);
        width
    }

    /// Notes what is fetched of the file that was touched last, and what a reader waits for in it.
    fn remember(&mut self, chunks: ChunkRange, waits: ChunkRange) {
        let Some(big) = self.files.front_mut() else { return };
        let mut window = Window { chunks, touched: 0 };
        window.touch(waits);
        big.windows.push_front(window);
        big.windows.truncate(MOST_WINDOWS);
    }

    fn want_soon(&mut self, chunks: ChunkRange) {
        self.wishes.push_front(Reason::Rest.of(chunks));
    }
}
