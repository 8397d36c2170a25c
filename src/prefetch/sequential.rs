//! What lies ahead of sequential readers: a window as long as what each has read in one go.

use std::collections::VecDeque;

use super::Look;
use super::chunks::ChunkRange;
use super::hint::{Hint, Layers, Touch};
use super::reason::{Planned, Reason};
use super::wishes::Wishes;
use crate::units::{LayerId, TarOffset, TarRange};

/// How many sequential readers are followed at once.
const MOST_STREAMS: usize = 32;
/// A reader that jumps no further than this is still sequential: the kernel's requests overtake each other.
const SLACK: u64 = 128 << 10;
/// One that has read four times as far may jump ahead as far as this: who goes through a table leaves some of it out.
const LONGEST_JUMP: u64 = 1 << 20;

/// A reader that reads a layer in order.
#[derive(Clone, Copy, Debug)]
struct Stream {
    layer: LayerId,
    /// Where the next read is expected.
    at: TarOffset,
    /// Up to where chunks are queued.
    queued: TarOffset,
    /// Where the file in which it was last begins and ends; or the layer, for one that has read a whole file and went on.
    file: TarRange,
    /// Where it began.
    from: TarOffset,
    /// How many bytes it has read in one go.
    run: u64,
}

/// Follows sequential readers; see the module.
#[derive(Debug, Default)]
pub(super) struct Sequential {
    streams: VecDeque<Stream>,
    wishes: Wishes,
}

impl Hint for Sequential {
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, _: &mut Vec<Planned>) {
        let (layer, range) = (touch.layer, touch.range);
        let whole = layers.whole(layer);
        let file = touch.file.map_or(whole, |file| file.range);
        let near = |stream: &Stream| {
            let jump = SLACK.max((stream.run / 4).min(LONGEST_JUMP));
            stream.layer == layer && range.start.plus(SLACK) >= stream.at && range.start <= stream.at.plus(jump)
        };
        let begin = Stream {
            layer,
            at: range.start,
            queued: range.end(),
            file,
            from: range.start,
            run: 0,
        };
        let known = self.streams.iter().position(near);
        let mut stream = known.and_then(|place| self.streams.remove(place)).unwrap_or(begin);
        if range.start >= stream.file.end() {
            // Who has read all of a file and goes on behind it reads a tree; who has not reads here and there.
            if stream.from <= stream.file.start {
                stream.file = whole;
            } else {
                stream = begin;
            }
        }
        stream.run += range.end().since(stream.at).min(range.len);
        stream.at = stream.at.max(range.end());
        let ahead = stream.queued.since(stream.at);
        let window = stream.run.min(layers.options.largest_read_ahead_bytes);
        if window >= layers.options.first_read_ahead_bytes && ahead <= window / 2 {
            let from = stream.queued.max(stream.at);
            let until = stream.at.plus(window).min(stream.file.end());
            if until > from {
                let window = TarRange::new(from, until.since(from));
                self.wishes.push_back(Reason::Ahead.of(ChunkRange::of(layer, window)));
                stream.queued = until;
            }
        }
        self.streams.push_front(stream);
        self.streams.truncate(MOST_STREAMS);
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}
