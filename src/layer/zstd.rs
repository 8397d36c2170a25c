//! zstd (RFC 8878): frames one after the other, skippable ones among them.
//!
//! A frame needs nothing of what comes before it, so every frame is a place to begin from; inside of one there is none.
//! The seek table of the seekable format and zstd:chunked's table of contents are skippable frames, and skipped.

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::event::{Event, Step};
use super::{Coding, LayerError};
use crate::units::len_u64;

/// A frame's first four bytes.
pub(crate) const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// A skippable frame's first four bytes, but for the lowest four bits of the first.
pub(crate) const SKIPPABLE: [u8; 4] = 0x184d_2a50_u32.to_le_bytes();
/// The longest history that a frame may ask for, as a power of two: what `zstd --long` makes, 128 MiB.
const WINDOW_LOG: u32 = 27;
const MAX_WINDOW: u64 = 1 << WINDOW_LOG;
/// The longest frame header: magic, descriptor, window, dictionary, content size.
const MAX_HEADER: usize = 18;

/// Reads frames.
pub(super) struct Frames {
    decoder: Decoder<'static>,
    stage: Stage,
    /// Position of the next input byte in the blob.
    at: u64,
    /// Where the current frame began, or where the next one will.
    began: u64,
    /// Whether a frame with content has been met.
    any: bool,
}

enum Stage {
    /// Gathering a frame's header.
    Header {
        bytes: [u8; MAX_HEADER],
        have: usize,
    },
    /// Handing the gathered header to the decoder, which may have something to give before it has taken all.
    Replay {
        bytes: [u8; MAX_HEADER],
        from: usize,
        to: usize,
    },
    Body,
    /// So many bytes of a skippable frame are left.
    Skip {
        left: u64,
    },
}

impl Stage {
    const fn header() -> Self {
        Self::Header {
            bytes: [0; MAX_HEADER],
            have: 0,
        }
    }
}

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frames").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Frames {
    /// At the beginning of a frame, which is byte `at` of the blob.
    pub(super) fn at_frame(at: u64) -> Result<Self, LayerError> {
        let memory = |_| LayerError::Memory(Coding::Zstd);
        let mut decoder = Decoder::new().map_err(memory)?;
        decoder
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
            .map_err(memory)?;
        Ok(Self {
            decoder,
            stage: Stage::header(),
            at,
            began: at,
            any: false,
        })
    }

    /// Position of the next input byte in the blob.
    pub(super) const fn position(&self) -> u64 {
        self.at
    }

    /// Where the last frame ended, if this is between frames.
    pub(super) fn end(&self) -> Result<u64, LayerError> {
        let truncated = |what| LayerError::Truncated {
            coding: Coding::Zstd,
            at: self.at,
            what,
        };
        match self.stage {
            Stage::Header { have: 0, .. } if self.any => Ok(self.at),
            Stage::Header { .. } => Err(truncated("a frame's header")),
            Stage::Replay { .. } | Stage::Body => Err(truncated("a frame")),
            Stage::Skip { .. } => Err(truncated("a skippable frame")),
        }
    }

    /// Decodes some of `input` into `output`, up to the next thing of note. Takes all of the input before it asks for
    /// more, and gives all that is there before it says that there is nothing.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, LayerError> {
        let mut step = Step::took(0);
        match &mut self.stage {
            Stage::Skip { left } => {
                let taken = len_u64(input.len()).min(*left);
                *left -= taken;
                step.consumed = usize::try_from(taken).unwrap_or(input.len());
                if *left == 0 {
                    self.began = self.at + taken;
                    self.stage = Stage::header();
                }
            }
            Stage::Header { bytes, have } => {
                let wanted = wanted(&bytes[..*have]);
                let taken = (wanted - *have).min(input.len());
                bytes[*have..*have + taken].copy_from_slice(&input[..taken]);
                *have += taken;
                step.consumed = taken;
                if *have == wanted && self::wanted(&bytes[..*have]) == wanted {
                    let (bytes, have) = (*bytes, *have);
                    step.event = self.begin(bytes, have)?;
                }
            }
            Stage::Replay { bytes, from, to } => {
                let header = *bytes;
                let (from, to) = (*from, *to);
                let (consumed, produced, ended) = self.decode(&header[from..to], output)?;
                step.produced = produced;
                // No frame is only a header.
                debug_assert!(!ended);
                self.stage = if from + consumed == to {
                    Stage::Body
                } else {
                    Stage::Replay {
                        bytes: header,
                        from: from + consumed,
                        to,
                    }
                };
            }
            Stage::Body => {
                let (consumed, produced, ended) = self.decode(input, output)?;
                step.consumed = consumed;
                step.produced = produced;
                if ended {
                    step.event = Event::End;
                    self.began = self.at + len_u64(consumed);
                    self.stage = Stage::header();
                }
            }
        }
        self.at += len_u64(step.consumed);
        Ok(step)
    }

    fn begin(&mut self, bytes: [u8; MAX_HEADER], have: usize) -> Result<Event, LayerError> {
        let at = self.began;
        match judge(&bytes[..have]) {
            Header::Skippable { len: 0 } => {
                self.began = at + len_u64(have);
                self.stage = Stage::header();
            }
            Header::Skippable { len } => self.stage = Stage::Skip { left: len },
            Header::Frame { window } if window > MAX_WINDOW => {
                return Err(LayerError::Window {
                    coding: Coding::Zstd,
                    at,
                    needs: window,
                    limit: MAX_WINDOW,
                });
            }
            Header::Frame { .. } => {
                self.any = true;
                self.stage = Stage::Replay {
                    bytes,
                    from: 0,
                    to: have,
                };
                return Ok(Event::Begin { at });
            }
            Header::Dictionary => {
                return Err(LayerError::Unsupported {
                    coding: Coding::Zstd,
                    at,
                    what: "a frame that needs a dictionary",
                });
            }
            Header::Unknown => {
                return Err(LayerError::Corrupt {
                    coding: Coding::Zstd,
                    at,
                    what: "there is no zstd frame",
                });
            }
        }
        Ok(Event::None)
    }

    /// Bytes consumed, bytes produced, and whether the frame has ended.
    fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<(usize, usize, bool), LayerError> {
        let mut from = InBuffer::around(input);
        let mut to = OutBuffer::around(output);
        let hint = self
            .decoder
            .run(&mut from, &mut to)
            .map_err(|error| self.error(&error))?;
        Ok((from.pos(), to.pos(), hint == 0))
    }

    /// libzstd's errors have only texts here. They are told apart, because a wrong checksum is another thing than
    /// nonsense.
    fn error(&self, error: &std::io::Error) -> LayerError {
        let (coding, at) = (Coding::Zstd, self.at);
        let text = error.to_string();
        if text.contains("checksum") {
            LayerError::Checksum {
                coding,
                at,
                what: "frame checksum",
            }
        } else if text.contains("llocation") {
            LayerError::Memory(coding)
        } else {
            LayerError::Corrupt {
                coding,
                at,
                what: "the frame does not decode",
            }
        }
    }
}

/// How many bytes of a frame's beginning are needed to go on, as far as `bytes` tell.
fn wanted(bytes: &[u8]) -> usize {
    if bytes.len() < 4 {
        return 4;
    }
    if is_skippable(bytes) {
        return 8;
    }
    let Some(descriptor) = bytes.get(4).filter(|_| bytes.starts_with(&MAGIC)) else {
        return if bytes.starts_with(&MAGIC) { 5 } else { 4 };
    };
    let fields = Fields::of(*descriptor);
    5 + fields.window + fields.dictionary + fields.content
}

/// How long a frame header's optional fields are.
struct Fields {
    window: usize,
    dictionary: usize,
    content: usize,
}

impl Fields {
    fn of(descriptor: u8) -> Self {
        let single = descriptor & 0x20 != 0;
        Self {
            window: usize::from(!single),
            dictionary: [0, 1, 2, 4][usize::from(descriptor & 3)],
            content: [usize::from(single), 2, 4, 8][usize::from(descriptor >> 6)],
        }
    }
}

enum Header {
    Skippable { len: u64 },
    Frame { window: u64 },
    Dictionary,
    Unknown,
}

/// What a header of the length that [`wanted`] asked for says.
fn judge(bytes: &[u8]) -> Header {
    if is_skippable(bytes) {
        let len = bytes.get(4..8).map_or(0, little_endian);
        return Header::Skippable { len };
    }
    let Some(descriptor) = bytes.get(4).copied().filter(|_| bytes.starts_with(&MAGIC)) else {
        return Header::Unknown;
    };
    let fields = Fields::of(descriptor);
    let (window, rest) = bytes[5..].split_at(fields.window);
    let (dictionary, content) = rest.split_at(fields.dictionary);
    if little_endian(dictionary) != 0 {
        return Header::Dictionary;
    }
    let window = match window.first() {
        Some(byte) => {
            let base = 1_u64 << (10 + (byte >> 3));
            base + base / 8 * u64::from(byte & 7)
        }
        // A single segment: the whole content is the window. Two bytes hold 256 less than they mean, which does not
        // matter here.
        None => little_endian(content),
    };
    Header::Frame { window }
}

fn is_skippable(bytes: &[u8]) -> bool {
    bytes.first().is_some_and(|byte| byte & 0xf0 == SKIPPABLE[0]) && bytes.get(1..4) == Some(&SKIPPABLE[1..])
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
