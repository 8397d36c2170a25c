//! Decoding from the beginning of a span.

use super::gzip::{self, Members};
use super::table::Begins;
use super::zstd::Frames;
use super::{Coding, Idle, LayerError, SpanTable};
use crate::units::TarOffset;

/// The most that is given out at once, in bytes. A multiple of deflate's window, which is copied once each time.
const PIECE: usize = 128 << 10;

/// Decodes from the beginning of a span onwards, across as many following spans as bytes come for, fed with compressed bytes in any pieces.
///
/// Memory: a zstd frame's window (at most 128 MiB; a gzip member's 32 KiB) and a buffer of 128 KiB, whatever comes. It never gives more
/// than the table says there is.
#[derive(Debug)]
pub struct Decoder {
    table: SpanTable,
    state: State,
    output: Vec<u8>,
    /// The next byte to be given.
    at: u64,
    /// Where to stop, in bytes of the tar.
    until: u64,
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
    Gzip(Members),
    Zstd(Frames),
    /// Nothing more is given.
    Done,
}

impl Decoder {
    /// A decoder for what begins at span number `span`, whose history is `window` ([`super::Span::window`] bytes; empty when that is 0). The
    /// first byte to be fed is the first of [`super::Span::blob`].
    ///
    /// # Errors
    /// When there is no such span, the history has the wrong length, or there is no memory.
    pub fn start(table: &SpanTable, span: usize, window: &[u8]) -> Result<Self, LayerError> {
        if span >= table.len() {
            return Err(LayerError::NoSpan(span));
        }
        let begin = table.span(span);
        if u32::try_from(window.len()) != Ok(begin.window) {
            return Err(LayerError::History {
                at: begin.tar.start,
                found: window.len(),
                needs: begin.window,
            });
        }
        let state = match (table.coding(), begin.begins) {
            (Coding::Plain, _) => State::Plain,
            (Coding::Zstd, _) => State::Zstd(Frames::at_frame(begin.blob.start)?),
            (Coding::Gzip, Begins::Whole) => State::Gzip(Members::at_member(begin.blob.start)?),
            (Coding::Gzip, Begins::Block) if begin.bits == 0 => {
                State::Gzip(Members::at_block(begin.blob.start, 0, 0, window)?)
            }
            (Coding::Gzip, Begins::Block) => State::Enter {
                at: begin.blob.start,
                bits: begin.bits,
                window: window.to_vec(),
            },
        };
        Ok(Self {
            table: table.clone(),
            state,
            output: Vec::new(),
            at: begin.tar.start.0,
            until: table.tar_len(),
        })
    }

    /// Makes it stop before byte `end` of the tar: nothing from there on is given, however much is fed.
    #[must_use]
    pub fn until(mut self, end: TarOffset) -> Self {
        self.until = self.until.min(end.0);
        self
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

    /// Takes compressed bytes, which follow those of the call before, and gives what they decode to, in order and in pieces of any size.
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
            self.state = State::Gzip(Members::at_block(at + 1, 8 - bits, first >> bits, window)?);
            input = rest;
        }
        if self.output.is_empty() && !matches!(self.state, State::Plain | State::Done) {
            self.output.resize(PIECE, 0);
        }
        let mut idle = Idle::new(self.table.coding());
        loop {
            let left = usize::try_from(self.until.saturating_sub(self.at)).unwrap_or(usize::MAX);
            if left == 0 {
                return Ok(());
            }
            let room = left.min(PIECE);
            let (consumed, produced, more) = match &mut self.state {
                State::Plain => {
                    let given = &input[..left.min(input.len())];
                    self.at += super::len_u64(given.len());
                    if !given.is_empty() {
                        out(given);
                    }
                    return Ok(());
                }
                State::Gzip(members) if members.is_trailing() => return Ok(()),
                State::Gzip(members) => {
                    let step = members.step(input, &mut self.output[..room], false)?;
                    (step.consumed, step.produced, step.event != gzip::Event::None)
                }
                State::Zstd(frames) => {
                    let step = frames.step(input, &mut self.output[..room])?;
                    (step.consumed, step.produced, frames.has_more())
                }
                State::Enter { .. } | State::Done => return Ok(()),
            };
            input = &input[consumed..];
            if produced > 0 {
                self.at += super::len_u64(produced);
                out(&self.output[..produced]);
            }
            // A full buffer may hide more; without input nothing else can come.
            if input.is_empty() && produced < room && !more {
                return Ok(());
            }
            idle.step(consumed + produced > 0)?;
        }
    }
}
