//! The decoder: from a span's first byte of the blob to the tar's bytes.

use std::collections::VecDeque;

use super::event::Event;
use super::gzip::Members;
use super::stream::{Idle, Stream};
use super::table::{Begins, Layout, Span};
use super::zstd::Frames;
use super::{Coding, LayerError, SpanTable};
use crate::units::{TarOffset, len_u64};

/// The most that is given out at once, in bytes. A multiple of deflate's window, which is copied once each time.
const PIECE: usize = 128 << 10;
/// Less than so much may be missing at the end of a span that counts by its head only: a tar's padding.
const PADDING: u64 = 512;

/// Decodes from the beginning of a span onwards, across as many following spans as bytes come for, fed with compressed
/// bytes in any pieces.
///
/// Memory: a zstd frame's window (at most 1 GiB, of which only what has come out of the frame is real memory, and beyond 128
/// MiB each at most 4 GiB for all decoders of a process; a gzip member's 32 KiB) and a buffer of 128 KiB, whatever comes. It
/// never gives more than the table says there is. Checksums are checked of whatever is decoded from its beginning to
/// its end.
#[derive(Debug)]
pub struct Decoder {
    table: SpanTable,
    state: State,
    output: Vec<u8>,
    /// The next byte to be given.
    at: u64,
    /// Where to stop, in bytes of the tar...
    until: u64,
    /// ...and where it has to stop, because its histories go no further or the tar ends.
    reach: u64,
    /// Where to change from one span to the next, when only their heads count.
    heads: Option<Heads>,
    /// Where to enter a zstd frame anew, when it was entered at a block.
    entered: Option<Entered>,
}

#[derive(Debug)]
enum State {
    Plain,
    /// The first byte of the blob decides how gzip is entered, because a part of it may belong to what comes before.
    Enter {
        at: u64,
        bits: u8,
        window: Vec<u8>,
    },
    Stream(Stream),
    /// On the way to byte `to` of the blob, where span number `span` begins.
    Skip {
        at: u64,
        to: u64,
        span: usize,
    },
    /// Nothing more is given.
    Done,
}

/// The span that is being decoded.
#[derive(Clone, Copy, Debug)]
struct Heads {
    span: usize,
    /// Where it ends, in bytes of the tar.
    end: u64,
}

/// The span of a zstd frame that is being decoded from the block at which it begins. Of the history it has no more than its own blocks
/// need: those of the next span need others.
#[derive(Debug)]
struct Entered {
    span: usize,
    /// Where it ends, in bytes of the tar...
    end: u64,
    /// ...and of the blob.
    blob_end: u64,
    /// The histories of the spans behind it.
    windows: VecDeque<Vec<u8>>,
}

impl Entered {
    fn new(table: &SpanTable, span: usize, windows: VecDeque<Vec<u8>>) -> Self {
        let Span { tar, blob, .. } = table.span(span);
        Self {
            span,
            end: tar.end().0,
            blob_end: blob.end,
            windows,
        }
    }

    /// How far in the tar the histories suffice, span after span.
    fn reach(&self, table: &SpanTable) -> u64 {
        for (number, span) in (0..).zip(self.span + 1..table.len()) {
            let next = table.span(span);
            match next.begins {
                // A frame needs no history.
                Begins::Whole => break,
                Begins::Block if number < self.windows.len() => {}
                Begins::Block | Begins::Within => return next.tar.start.0,
            }
        }
        table.tar_len()
    }
}

/// The stream that begins at span number `span`, whose history is `window`.
fn stream_at(table: &SpanTable, span: usize, window: &[u8]) -> Result<Stream, LayerError> {
    let begin = table.span(span);
    let at = begin.blob.start;
    match (begin.begins, table.block_entry(span)) {
        (Begins::Whole, _) => Stream::at_unit(table.coding(), at),
        (Begins::Block, None) => Members::at_block(at, 0, 0, window).map(Stream::Gzip),
        (Begins::Block, Some(entry)) => Frames::at_block(at, entry, window, begin.window).map(Stream::Zstd),
        (Begins::Within, _) => Err(LayerError::Table("a span begins at a block that cannot be entered")),
    }
}

impl Decoder {
    /// A decoder for what begins at span number `span`, whose history is `window` (what [`super::Spans::windows`] has of
    /// [`super::Span::window`] bytes; empty when that is 0). The first byte to be fed is the first of [`super::Span::blob`].
    ///
    /// One that enters a zstd frame at a block stops where the next block of a frame is a span's first: see
    /// [`start_with`](Self::start_with).
    ///
    /// # Errors
    /// When there is no such span, the history is not what it needs, or there is no memory.
    pub fn start(table: &SpanTable, span: usize, window: &[u8]) -> Result<Self, LayerError> {
        Self::start_with(table, span, vec![window.to_vec()])
    }

    /// The same with the histories of the spans behind it as well, one each: those of a zstd layer that begin at a block of a frame
    /// take their own, because of what lies before `span` it knows no more than `span` needs.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(table: &SpanTable, span: usize, windows: Vec<Vec<u8>>) -> Result<Self, LayerError> {
        if span >= table.len() {
            return Err(LayerError::NoSpan(span));
        }
        let begin = table.span(span);
        let mut windows = VecDeque::from(windows);
        let window = windows.pop_front().unwrap_or_default();
        let is_entered = table.coding() == Coding::Zstd && begin.begins != Begins::Whole;
        let fits = if is_entered {
            // Only the extents of it are here.
            window.is_empty() == (begin.window == 0)
        } else {
            u32::try_from(window.len()) == Ok(begin.window)
        };
        if !fits {
            return Err(LayerError::History {
                at: begin.tar.start,
                found: window.len(),
                needs: begin.window,
            });
        }
        let state = match (table.coding(), begin.begins) {
            (Coding::Plain, _) => State::Plain,
            (Coding::Gzip, Begins::Block) if begin.bits != 0 => State::Enter {
                at: begin.blob.start,
                bits: begin.bits,
                window,
            },
            _ => State::Stream(stream_at(table, span, &window)?),
        };
        let entered = is_entered.then(|| Entered::new(table, span, windows));
        let heads = Heads {
            span,
            end: begin.tar.end().0,
        };
        let reach = entered.as_ref().map_or(table.tar_len(), |entered| entered.reach(table));
        Ok(Self {
            table: table.clone(),
            state,
            output: Vec::new(),
            at: begin.tar.start.0,
            until: reach,
            reach,
            entered,
            heads: (table.layout() == Layout::Heads).then_some(heads),
        })
    }

    /// Makes it stop before byte `end` of the tar: nothing from there on is given, however much is fed.
    #[must_use]
    pub fn until(mut self, end: TarOffset) -> Self {
        self.set_until(end);
        self
    }

    /// Makes it stop before byte `end` of the tar, from now on. Of one that has stopped the bytes of the blob behind its position are
    /// lost: it is not to go on.
    pub fn set_until(&mut self, end: TarOffset) {
        self.until = self.reach.min(end.0);
    }

    /// The position in the tar of the next byte that it will give.
    #[must_use]
    pub const fn position(&self) -> TarOffset {
        TarOffset(self.at)
    }

    /// Whether it has given all that it will: the rest of the blob need not be fed.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.at >= self.until || matches!(self.state, State::Done)
    }

    /// Takes compressed bytes, which follow those of the call before, and gives what they decode to, in order and in
    /// pieces of any size.
    ///
    /// # Errors
    /// When they are no continuation of what came before. The decoder is of no use afterwards.
    pub fn feed(&mut self, input: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        let outcome = self.decode(input, out);
        if outcome.is_err() {
            self.state = State::Done;
        }
        outcome
    }

    fn decode(&mut self, mut input: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        if let State::Enter { at, bits, window } = &self.state {
            let Some((first, rest)) = input.split_first() else {
                return Ok(());
            };
            let members = Members::at_block(at + 1, 8 - bits, first >> bits, window)?;
            self.state = State::Stream(Stream::Gzip(members));
            input = rest;
        }
        let mut idle = Idle::new(self.table.coding());
        while self.at < self.until {
            let entered = self.entered.as_ref().map(|entered| (entered.end, entered.blob_end));
            let end = self.heads.map(|heads| heads.end).or(entered.map(|(end, _)| end));
            let end = end.map_or(self.until, |end| end.min(self.until));
            let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
            match &mut self.state {
                State::Enter { .. } | State::Done => return Ok(()),
                State::Plain => {
                    let given = &input[..left.min(input.len())];
                    self.at += len_u64(given.len());
                    if !given.is_empty() {
                        out(given);
                    }
                    return Ok(());
                }
                State::Skip { at, to, span } => {
                    let skipped = len_u64(input.len()).min(to.saturating_sub(*at));
                    input = input
                        .get(usize::try_from(skipped).unwrap_or(usize::MAX)..)
                        .unwrap_or_default();
                    *at += skipped;
                    if at < to {
                        return Ok(());
                    }
                    let window = self.entered.as_mut().and_then(|entered| entered.windows.pop_front());
                    let stream = stream_at(&self.table, *span, &window.unwrap_or_default())?;
                    self.state = State::Stream(stream);
                }
                State::Stream(stream) if stream.is_trailing() => return Ok(()),
                State::Stream(stream) => {
                    if self.output.is_empty() {
                        self.output.resize(PIECE, 0);
                    }
                    let room = left.min(PIECE);
                    // Of the next span's bytes a decoder of this one would make something else.
                    let bound = entered.map_or(u64::MAX, |(_, blob_end)| blob_end.saturating_sub(stream.position()));
                    let bounded = usize::try_from(bound).map_or(input.len(), |bound| bound.min(input.len()));
                    let step = stream.step(&input[..bounded], &mut self.output[..room], false)?;
                    input = &input[step.consumed..];
                    if step.produced > 0 {
                        self.at += len_u64(step.produced);
                        out(&self.output[..step.produced]);
                    }
                    let position = stream.position();
                    let ended = step.event == Event::End;
                    if let Some(heads) = self.heads.filter(|heads| ended || self.at == heads.end) {
                        self.next_head(heads, out)?;
                        continue;
                    }
                    if let Some((end, blob_end)) = entered {
                        if self.at == end {
                            self.next_entry(position);
                            continue;
                        }
                        if position == blob_end && !step.may_go_on(room) {
                            return Err(LayerError::Corrupt {
                                coding: Coding::Zstd,
                                at: position,
                                what: "less comes out of a span than the layer's table of spans says",
                            });
                        }
                    }
                    // A full buffer may hide more; without input nothing else can come.
                    if input.is_empty() && !step.may_go_on(room) {
                        return Ok(());
                    }
                    idle.step(step, position)?;
                }
            }
        }
        Ok(())
    }

    /// A span of a zstd frame has come that was entered at a block: goes on with the next, whose first bytes are those behind byte
    /// `position` of the blob or later.
    fn next_entry(&mut self, position: u64) {
        let Some(Entered { span, windows, .. }) = self.entered.take() else {
            return;
        };
        let next = self.table.span(span + 1);
        if span + 1 < self.table.len() && next.begins == Begins::Block {
            self.state = State::Skip {
                at: position,
                to: next.blob.start,
                span: span + 1,
            };
            self.entered = Some(Entered::new(&self.table, span + 1, windows));
        }
    }

    /// A span's head has come, or what it is the head of has ended: goes on to where the next span begins.
    fn next_head(&mut self, heads: Heads, out: &mut dyn FnMut(&[u8])) -> Result<(), LayerError> {
        let State::Stream(stream) = &self.state else {
            return Ok(());
        };
        let (coding, position) = (stream.coding(), stream.position());
        let missing = heads.end.saturating_sub(self.at);
        if missing >= PADDING {
            return Err(LayerError::Corrupt {
                coding,
                at: position,
                what: "less comes out of it than the layer's table of contents says",
            });
        }
        let wanted = missing.min(self.until - self.at);
        if wanted > 0 {
            self.at += wanted;
            out(&[0; 512][..usize::try_from(wanted).unwrap_or(0)]);
        }
        let span = heads.span + 1;
        if span >= self.table.len() {
            self.state = State::Done;
            return Ok(());
        }
        let next = self.table.span(span);
        if position > next.blob.start {
            return Err(LayerError::Corrupt {
                coding,
                at: position,
                what: "the layer's table of contents has a file begin inside of another",
            });
        }
        self.state = State::Skip {
            at: position,
            to: next.blob.start,
            span,
        };
        self.heads = Some(Heads {
            span,
            end: next.tar.end().0,
        });
        Ok(())
    }
}
