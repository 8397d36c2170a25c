//! gzip (RFC 1952): members one after the other, each a header, a deflate stream, and a checksum with a length.
//!
//! What several programs do differently is done as gzip(1) does it: any number of members, all header flags, the
//! header's own checksum checked, and behind a complete member anything that does not begin like another one is left
//! alone. Padding of zeros and trailing garbage therefore end the layer without an error; a damaged member does not.

pub(super) mod inflate;
pub(super) mod tracer;

use self::inflate::{Inflate, Stop};
use super::event::{Event, Step};
use super::{Coding, LayerError, magic};
use crate::units::len_u64;

const FHCRC: u8 = 1 << 1;
const FEXTRA: u8 = 1 << 2;
const FNAME: u8 = 1 << 3;
const FCOMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0xe0;

/// Reads members.
#[derive(Debug)]
pub(super) struct Members {
    inflate: Inflate,
    stage: Stage,
    /// Position of the next input byte in the blob.
    at: u64,
    /// Where the current member's header began.
    began: u64,
    /// Checksum and length of the member's output so far; not known when it was entered in its middle.
    sums: Option<(u32, u32)>,
    /// Whether a member has been read to its end.
    complete: bool,
}

#[derive(Debug)]
enum Stage {
    Header(Header),
    Body,
    Trailer(Gathered<8>),
    /// Behind the last member: nothing is read any more.
    Trailing,
}

impl Members {
    /// At the header of a member, which is byte `at` of the blob.
    pub(super) fn at_member(at: u64) -> Result<Self, LayerError> {
        Ok(Self {
            inflate: Inflate::new().ok_or(LayerError::Memory(Coding::Gzip))?,
            stage: Stage::Header(Header::default()),
            at,
            began: at,
            sums: None,
            complete: false,
        })
    }

    /// In the middle of a member: `bits` of the byte before `at`, given in `value`, come first; `history` is what came
    /// out last.
    pub(super) fn at_block(at: u64, bits: u8, value: u8, history: &[u8]) -> Result<Self, LayerError> {
        let mut members = Self::at_member(at)?;
        members.stage = Stage::Body;
        if members.inflate.enter(bits, value, history) {
            Ok(members)
        } else {
            Err(LayerError::Table("a history that deflate cannot have"))
        }
    }

    /// Position of the next input byte in the blob.
    pub(super) const fn position(&self) -> u64 {
        self.at
    }

    /// Whether everything from here on is ignored.
    pub(super) const fn is_trailing(&self) -> bool {
        matches!(self.stage, Stage::Trailing)
    }

    /// Where the last complete member ended, if this is behind one, in front of at most the beginning of another.
    pub(super) fn end(&self) -> Result<u64, LayerError> {
        let truncated = |what| LayerError::Truncated {
            coding: Coding::Gzip,
            at: self.at,
            what,
        };
        match &self.stage {
            Stage::Trailing => Ok(self.began),
            // A lone first byte of the magic is garbage like any other.
            Stage::Header(header) if self.complete && header.is_unsure() => Ok(self.began),
            Stage::Header(_) => Err(truncated("a header")),
            Stage::Body => Err(truncated("compressed data")),
            Stage::Trailer(_) => Err(truncated("a checksum")),
        }
    }

    /// Decodes some of `input` into `output`, up to the next thing of note. Takes all of the input before it asks for
    /// more, and gives all that is there before it says that there is nothing.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], at_blocks: bool) -> Result<Step, LayerError> {
        let step = match &mut self.stage {
            Stage::Trailing => Step::took(input.len()),
            Stage::Header(header) => {
                let (consumed, outcome) = header.take(input);
                match outcome {
                    Outcome::More => Step::took(consumed),
                    Outcome::NotOne if self.complete => {
                        // `began` stays where the garbage begins, which may be a byte of the magic before this input.
                        self.stage = Stage::Trailing;
                        Step::took(input.len())
                    }
                    Outcome::NotOne => return Err(self.corrupt("there is no gzip header")),
                    Outcome::Bad(what) => return Err(self.corrupt(what)),
                    Outcome::Method => {
                        return Err(LayerError::Unsupported {
                            coding: Coding::Gzip,
                            at: self.began,
                            what: "a gzip header with a method or flags that are not defined",
                        });
                    }
                    Outcome::Done => {
                        self.inflate.reset();
                        self.sums = Some((0, 0));
                        self.stage = Stage::Body;
                        Step {
                            consumed,
                            produced: 0,
                            event: Event::Begin { at: self.began },
                        }
                    }
                }
            }
            Stage::Body => self.body(input, output, at_blocks)?,
            Stage::Trailer(gathered) => {
                let consumed = gathered.take(input);
                if let Some(bytes) = gathered.full() {
                    let at = self.at + len_u64(consumed);
                    check_sums(self.sums, bytes, at)?;
                    self.began = at;
                    self.complete = true;
                    self.stage = Stage::Header(Header::default());
                    Step {
                        consumed,
                        produced: 0,
                        event: Event::End,
                    }
                } else {
                    Step::took(consumed)
                }
            }
        };
        self.at += len_u64(step.consumed);
        Ok(step)
    }

    fn body(&mut self, input: &[u8], output: &mut [u8], at_blocks: bool) -> Result<Step, LayerError> {
        let progress = self
            .inflate
            .run(input, output, at_blocks)
            .map_err(|what| self.corrupt(what))?;
        if let Some((crc, len)) = &mut self.sums {
            let produced = output.get(..progress.produced).unwrap_or_default();
            *crc = zlib_rs::crc32::crc32(*crc, produced);
            // The trailer holds the length modulo 2^32.
            *len = len.wrapping_add(u32::try_from(progress.produced).unwrap_or(u32::MAX));
        }
        let event = match progress.stop {
            Stop::Buffers => Event::None,
            Stop::Block { bits } => Event::Block { bits },
            Stop::End => {
                self.stage = Stage::Trailer(Gathered::default());
                Event::None
            }
        };
        Ok(Step {
            consumed: progress.consumed,
            produced: progress.produced,
            event,
        })
    }

    fn corrupt(&self, what: &'static str) -> LayerError {
        LayerError::Corrupt {
            coding: Coding::Gzip,
            at: self.at,
            what,
        }
    }
}

/// Compares a member's trailer with what came out of it.
fn check_sums(sums: Option<(u32, u32)>, trailer: [u8; 8], at: u64) -> Result<(), LayerError> {
    let Some((crc, len)) = sums else { return Ok(()) };
    let [c0, c1, c2, c3, l0, l1, l2, l3] = trailer;
    let wrong = |what| LayerError::Checksum {
        coding: Coding::Gzip,
        at,
        what,
    };
    if u32::from_le_bytes([c0, c1, c2, c3]) != crc {
        return Err(wrong("checksum (CRC-32)"));
    }
    if u32::from_le_bytes([l0, l1, l2, l3]) != len {
        return Err(wrong("length"));
    }
    Ok(())
}

/// A few bytes that may come in pieces.
#[derive(Debug)]
struct Gathered<const N: usize> {
    bytes: [u8; N],
    have: usize,
}

impl<const N: usize> Default for Gathered<N> {
    fn default() -> Self {
        Self { bytes: [0; N], have: 0 }
    }
}

impl<const N: usize> Gathered<N> {
    /// Takes what is missing from the front of `input`; returns how much that was.
    fn take(&mut self, input: &[u8]) -> usize {
        let missing = self.bytes.get_mut(self.have..).unwrap_or_default();
        let taken = missing.len().min(input.len());
        missing[..taken].copy_from_slice(&input[..taken]);
        self.have += taken;
        taken
    }

    fn full(&self) -> Option<[u8; N]> {
        (self.have == N).then_some(self.bytes)
    }
}

/// A member's header, read byte by byte as it comes. Nothing of it is kept but its checksum.
#[derive(Debug, Default)]
struct Header {
    field: Field,
    flags: u8,
    crc: u32,
}

/// The part of a header that comes next.
#[derive(Clone, Copy, Debug, Default)]
enum Field {
    #[default]
    Magic,
    Magic2,
    Method,
    Flags,
    /// Time, extra flags and operating system: that many bytes are left.
    Fixed(u8),
    ExtraLen,
    ExtraLen2(u8),
    Extra(u16),
    Name,
    Comment,
    Crc,
    Crc2(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    More,
    Done,
    /// It does not begin like a header.
    NotOne,
    Method,
    Bad(&'static str),
}

impl Header {
    /// Whether it is not known yet to be a header at all.
    const fn is_unsure(&self) -> bool {
        matches!(self.field, Field::Magic | Field::Magic2)
    }

    /// Takes bytes from the front of `input`: how many, and what came of it.
    fn take(&mut self, input: &[u8]) -> (usize, Outcome) {
        for (index, byte) in input.iter().enumerate() {
            let summed = !matches!(self.field, Field::Crc | Field::Crc2(_));
            if summed && self.crc_wanted() {
                self.crc = zlib_rs::crc32::crc32(self.crc, std::slice::from_ref(byte));
            }
            match self.byte(*byte) {
                Outcome::More => {}
                outcome => return (index + 1, outcome),
            }
        }
        (input.len(), Outcome::More)
    }

    /// Before the flags are known the checksum may still be wanted.
    const fn crc_wanted(&self) -> bool {
        self.flags & FHCRC != 0 || matches!(self.field, Field::Magic | Field::Magic2 | Field::Method | Field::Flags)
    }

    fn byte(&mut self, byte: u8) -> Outcome {
        self.field = match self.field {
            Field::Magic if byte == magic::GZIP[0] => Field::Magic2,
            Field::Magic2 if byte == magic::GZIP[1] => Field::Method,
            Field::Magic | Field::Magic2 => return Outcome::NotOne,
            Field::Method if byte == 8 => Field::Flags,
            Field::Method => return Outcome::Method,
            Field::Flags if byte & RESERVED != 0 => return Outcome::Method,
            Field::Flags => {
                self.flags = byte;
                Field::Fixed(6)
            }
            Field::Fixed(left) if left > 1 => Field::Fixed(left - 1),
            Field::Fixed(_) => return self.after(0),
            Field::ExtraLen => Field::ExtraLen2(byte),
            Field::ExtraLen2(low) => match u16::from_le_bytes([low, byte]) {
                0 => return self.after(FEXTRA),
                len => Field::Extra(len),
            },
            Field::Extra(left) if left > 1 => Field::Extra(left - 1),
            Field::Extra(_) => return self.after(FEXTRA),
            Field::Name if byte == 0 => return self.after(FNAME),
            Field::Comment if byte == 0 => return self.after(FCOMMENT),
            same @ (Field::Name | Field::Comment) => same,
            Field::Crc => Field::Crc2(byte),
            Field::Crc2(low) => {
                let [b0, b1, ..] = self.crc.to_le_bytes();
                return if [low, byte] == [b0, b1] {
                    Outcome::Done
                } else {
                    Outcome::Bad("its header's checksum is wrong")
                };
            }
        };
        Outcome::More
    }

    /// Goes on to the first optional field behind the one with flag `done` (0: the fixed part).
    fn after(&mut self, done: u8) -> Outcome {
        let order = [
            (FEXTRA, Field::ExtraLen),
            (FNAME, Field::Name),
            (FCOMMENT, Field::Comment),
            (FHCRC, Field::Crc),
        ];
        let behind = order
            .iter()
            .position(|(flag, _)| *flag == done)
            .map_or(0, |index| index + 1);
        match order[behind..].iter().find(|(flag, _)| self.flags & flag != 0) {
            Some((_, field)) => {
                self.field = *field;
                Outcome::More
            }
            None => Outcome::Done,
        }
    }
}
