//! What belongs with what a reader waits for: a small file whole; of a big one the surroundings, wider with every touch.

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

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Surroundings {
    /// How wide the last touch of a big file reached, the latest first.
    widths: VecDeque<(FileId, u64)>,
    wishes: Wishes,
}

impl Hint for Surroundings {
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, now: &mut Vec<Planned>) {
        if !touch.waits {
            return;
        }
        let wanted = ChunkRange::of(touch.layer, touch.range);
        let with = self.belonging(touch, layers);
        if with.bytes() <= layers.options.demand_bytes.max(wanted.bytes()) {
            now.push(Reason::Rest.of(with));
            return;
        }
        // What lies behind the demanded chunks goes with them as far as it may; the rest follows.
        let room = layers.options.demand_bytes.saturating_sub(wanted.bytes()) / CHUNK_BYTES;
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
                let widest = self.widen(file.file, &layers.options);
                let start = range.start.max(file.range.start);
                let offset = start.since(file.range.start) / widest * widest;
                let window = file.range.start.plus(offset);
                let end = window.plus(widest).min(file.range.end());
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

    /// How wide the surroundings of the next touch of a big file are.
    fn widen(&mut self, file: FileId, options: &PlanOptions) -> u64 {
        let place = self.widths.iter().position(|(touched, _)| *touched == file);
        let width = match place.and_then(|place| self.widths.remove(place)) {
            Some((_, width)) => (width * 2).min(options.widest_touch_bytes),
            None => options.first_touch_bytes,
        };
        self.widths.push_front((file, width));
        self.widths.truncate(MOST_FILES);
        width
    }

    fn want_soon(&mut self, chunks: ChunkRange) {
        self.wishes.push_front(Reason::Rest.of(chunks));
    }
}
