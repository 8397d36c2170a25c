//! The indexer: reads a blob once, decodes it, and notes where decoding can begin (checkpoints).

use std::collections::VecDeque;

use super::event::Event;
use super::gzip::inflate::WINDOW;
use super::gzip::tracer::Tracer;
use super::stream::{Idle, Stream};
use super::table::{Begins, Layout, Point};
use super::zstd::entry::BlockEntry;
use super::zstd::reach::BlockFinder;
use super::{Coding, LayerError, SpanTable};
use crate::units::{TarOffset, len_u64};

/// Places that need no history are taken so much closer than the spacing.
const CLOSER: u64 = 32;
/// The closest that places are: what a deflate stream reaches back, so that what one needs is known before the next.
const CLOSEST: u64 = 32 << 10;
/// How much is decoded at once, in bytes.
const PIECE: usize = 256 << 10;

/// What reading a blob brought.
#[derive(Clone, Debug)]
pub struct Spans {
    /// The places where decoding can begin.
    pub table: SpanTable,
    /// The history of each span, in the table's order; empty where none is needed. Of a span that begins at a block of a zstd frame
    /// only the extents that matter, as an index has them. Of all spans, if none was taken before with
    /// [`Indexer::take_windows`]; else of the last ones.
    pub windows: Vec<Vec<u8>>,
}

/// Reads a whole blob as it streams by: hands out the tar's bytes and notes entry points about every `spacing` bytes of
/// them.
///
/// Where the points lie depends on the blob and the spacing alone, not on the pieces in which it comes. Checksums in
/// the blob (of gzip members, of zstd frames that have one) are checked. Memory: as a [`super::Decoder`], and up to 32
/// KiB for each entry point whose history was not taken yet.
///
/// All histories together are hardly longer than the blob: where some of it unpacks to so much that they would be, points
/// lie further apart. Otherwise a small blob could make its indexer keep a thousand times as much.
#[derive(Debug)]
pub struct Indexer {
    spacing: u64,
    limit: u64,
    tar: u64,
    blob: u64,
    points: Vec<Point>,
    /// Of the last points: those that were not taken.
    windows: VecDeque<Vec<u8>>,
    /// The length of all histories, also of those that were taken.
    history_total: u64,
    coding: Coding,
    /// What decodes it, once the first bytes have come; nothing for a plain layer.
    stream: Option<Stream>,
    /// History, then what is decoded.
    buffer: Vec<u8>,
    /// How much of `buffer` is filled.
    filled: usize,
    /// How much of what is filled is history of the current member.
    history: usize,
    /// The last byte of the blob that was dealt with.
    last: u8,
    /// Finds out what the last point needs of its history.
    tracer: Option<Box<Tracer>>,
    /// Where the last member or frame begins that is a point, in bytes of the tar.
    last_whole: Option<u64>,
    /// Finds blocks of zstd frames to begin at.
    blocks: Option<BlockFinder>,
    /// What a decoder holds at those that were found.
    entries: Vec<BlockEntry>,
}

impl Indexer {
    /// For a blob that is compressed like that, with entry points about every `spacing` bytes of the tar (at least 32
    /// KiB; inside of zstd frames at least 256 KiB, and none beyond 64 MiB; [`Coding::spacing`] if in doubt).
    #[must_use]
    pub fn new(coding: Coding, spacing: u64) -> Self {
        Self {
            spacing: spacing.max(CLOSEST),
            limit: u64::MAX,
            tar: 0,
            blob: 0,
            points: Vec::new(),
            windows: VecDeque::new(),
            history_total: 0,
            coding,
            stream: None,
            buffer: Vec::new(),
            filled: 0,
            history: 0,
            last: 0,
            tracer: None,
            last_whole: None,
            blocks: (coding == Coding::Zstd).then(|| BlockFinder::new(spacing)),
            entries: Vec::new(),
        }
    }

    /// Looks for no blocks of zstd frames to begin at, only for frames. A wrong history there shows in nothing but wrong bytes, so
    /// who has no digests to compare cannot use them.
    #[must_use]
    pub fn frames_only(mut self) -> Self {
        self.blocks = None;
        self
    }

    /// Refuses a blob that unpacks to more than `bytes`, as soon as it does.
    #[must_use]
    pub fn limit(mut self, bytes: u64) -> Self {
        self.limit = bytes;
        self
    }

    /// How many bytes of the tar have been handed out.
    #[must_use]
    pub const fn position(&self) -> TarOffset {
        TarOffset(self.tar)
    }

    /// How many bytes of the blob have come.
    #[must_use]
    pub const fn blob_position(&self) -> u64 {
        self.blob
    }

    /// Takes the blob's next bytes and gives the tar's, in order and in pieces of any size.
    ///
    /// # Errors
    /// When the blob is damaged, needs what this program does not give, or unpacks to more than the limit. The indexer
    /// is of no use afterwards.
    pub fn feed(&mut self, blob: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        self.blob += len_u64(blob.len());
        if self.coding == Coding::Plain {
            self.tar += len_u64(blob.len());
            self.within_limit()?;
            sink(blob);
            return Ok(());
        }
        if self.stream.is_none() {
            self.stream = Some(Stream::at_unit(self.coding, 0)?);
            self.buffer.resize(WINDOW + PIECE, 0);
        }
        self.unpack(blob, sink)
    }

    /// Hands out the histories that are known by now, each once, in the table's order. Who calls this after every piece
    /// that is fed keeps the indexer from holding more than a few.
    pub fn take_windows(&mut self) -> impl Iterator<Item = Vec<u8>> + '_ {
        // A point behind which nothing has come may yet turn out to be none; what is being traced is not known.
        let first = self.points.len() - self.windows.len();
        let followed = self.points[first..].partition_point(|point| point.tar < self.tar);
        let known = self.windows.len() - usize::from(self.tracer.is_some());
        self.windows.drain(..followed.min(known))
    }

    /// The table, once the whole blob has been fed.
    ///
    /// # Errors
    /// When the blob ends in the middle of something.
    pub fn finish(mut self) -> Result<Spans, LayerError> {
        let coding = self.coding;
        if coding == Coding::Plain {
            return Ok(Spans {
                table: SpanTable::plain(self.blob),
                windows: Vec::new(),
            });
        }
        let nothing = LayerError::Truncated {
            coding,
            at: 0,
            what: "a header",
        };
        let end = self.stream.as_ref().ok_or(nothing)?.end()?;
        self.settle();
        // What begins where nothing follows (BGZF's empty last member) is no place to begin from.
        let useful = self.points.partition_point(|point| point.tar < self.tar);
        self.windows
            .truncate(self.windows.len().saturating_sub(self.points.len() - useful));
        self.points.truncate(useful);
        let ends = (end, self.blob);
        let points = (self.points, self.entries);
        let table = SpanTable::new((coding, Layout::Everything), ends, self.tar, points)?;
        Ok(Spans {
            table,
            windows: self.windows.into(),
        })
    }

    fn within_limit(&self) -> Result<(), LayerError> {
        if self.tar > self.limit {
            return Err(LayerError::TooLong {
                at: self.blob,
                limit: self.limit,
            });
        }
        Ok(())
    }

    /// How far behind the last point this is, in bytes of the tar.
    fn since_point(&self) -> Option<u64> {
        self.points.last().map(|point| self.tar - point.tar)
    }

    /// Takes a place that needs no history, if it is not too close to the one before.
    fn whole_point(&mut self, at: u64) {
        let closest = (self.spacing / CLOSER).max(CLOSEST);
        let last = match self.coding {
            // Blocks inside of frames are no reason to leave out a frame.
            Coding::Zstd => self.last_whole,
            _ => self.points.last().map(|point| point.tar),
        };
        if last.is_none_or(|last| self.tar - last >= closest) {
            self.last_whole = Some(self.tar);
            self.points.push(Point::whole(self.tar, at));
            self.windows.push_back(Vec::new());
        }
    }

    /// Free space behind what is filled, after keeping the history that a point may need.
    fn make_room(&mut self) {
        if self.filled == self.buffer.len() {
            let keep = self.filled - WINDOW;
            self.buffer.copy_within(keep.., 0);
            self.filled = WINDOW;
        }
    }

    fn give(&mut self, produced: usize, sink: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        let from = self.filled;
        self.filled += produced;
        self.history = (self.history + produced).min(WINDOW);
        self.tar += len_u64(produced);
        self.within_limit()?;
        if produced > 0 {
            sink(&self.buffer[from..self.filled]);
        }
        Ok(())
    }

    fn unpack(&mut self, mut input: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        let Some(stream) = &self.stream else { return Ok(()) };
        let mut idle = Idle::new(stream.coding());
        loop {
            self.make_room();
            let free = self.buffer.len() - self.filled;
            // Stopping at blocks costs time, so it is done only from where the next point may lie. One byte before
            // that: whether a block's end that falls on the last byte has been passed depends on the input at hand.
            let before = (self.spacing - 1).saturating_sub(self.since_point().unwrap_or(0));
            let at_blocks = before == 0;
            let room = if at_blocks {
                free
            } else {
                usize::try_from(before).map_or(free, |before| before.min(free))
            };
            let Some(stream) = &mut self.stream else { return Ok(()) };
            let step = stream.step(input, &mut self.buffer[self.filled..self.filled + room], at_blocks)?;
            let (position, frame) = (stream.position(), stream.frame());
            let (taken, rest) = input.split_at(step.consumed);
            self.last = taken.last().copied().unwrap_or(self.last);
            if self.tracer.as_mut().is_some_and(|tracer| !tracer.feed(taken)) {
                self.settle();
            }
            if let Some(blocks) = &mut self.blocks {
                blocks.feed(taken);
                blocks.output(&self.buffer[self.filled..self.filled + step.produced]);
            }
            self.give(step.produced, sink)?;
            self.block_points();
            match step.event {
                Event::None => {}
                Event::Begin { at } => {
                    self.history = 0;
                    self.whole_point(at);
                    if let Some((blocks, frame)) = self.blocks.as_mut().zip(frame) {
                        blocks.begin(self.tar, position, frame);
                    }
                }
                Event::Block { bits } => {
                    if self.since_point().is_some_and(|since| since >= self.spacing) {
                        self.settle();
                        if self.history_total <= position {
                            self.block_point(position, bits)?;
                        }
                    }
                }
                Event::End => {
                    self.settle();
                    if let Some(blocks) = &mut self.blocks {
                        blocks.end();
                    }
                    self.block_points();
                }
            }
            input = rest;
            if input.is_empty() && !step.may_go_on(room) {
                return Ok(());
            }
            idle.step(step, position)?;
        }
    }

    /// Takes the blocks of a zstd frame that are points, as far as that is known.
    fn block_points(&mut self) {
        while let Some(found) = self.blocks.as_mut().and_then(BlockFinder::take) {
            self.points.push(Point {
                tar: found.tar,
                blob: found.blob,
                begins: if found.entry.is_some() {
                    Begins::Block
                } else {
                    Begins::Within
                },
                bits: 0,
                window: found.window,
            });
            self.entries.extend(found.entry);
            self.windows.push_back(found.piece);
        }
    }

    fn block_point(&mut self, position: u64, bits: u8) -> Result<(), LayerError> {
        let (blob, skipped) = if bits == 0 {
            (position, 0)
        } else {
            (position - 1, 8 - bits)
        };
        self.points.push(Point {
            tar: self.tar,
            blob,
            begins: Begins::Block,
            bits: skipped,
            window: 0,
        });
        self.windows.push_back(Vec::new());
        let history = &self.buffer[self.filled - self.history..self.filled];
        self.tracer = Some(Tracer::start(bits, self.last >> skipped, history)?);
        Ok(())
    }

    /// Notes what the last point needs of its history, as far as that is known now: all that could need some has
    /// passed, or the member has ended.
    fn settle(&mut self) {
        let Some(tracer) = self.tracer.take() else { return };
        let window = tracer.needed();
        self.history_total += len_u64(window.len());
        if let (Some(point), Some(place)) = (self.points.last_mut(), self.windows.back_mut()) {
            point.window = u32::try_from(window.len()).unwrap_or(u32::MAX);
            *place = window;
        }
    }
}
