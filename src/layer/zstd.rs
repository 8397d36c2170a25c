//! zstd (RFC 8878): frames one after the other, skippable ones among them.
//!
//! A frame needs nothing of what comes before it, so every frame is a place to begin from. Inside of one it is its blocks, for who
//! has what a decoder holds there: see [`entry`]. [`reach`] finds that out, from what [`blocks`] reads beside libzstd.
//! The seek table of the seekable format and zstd:chunked's table of contents are skippable frames, and skipped.

mod blocks;
pub(super) mod entry;
mod fse;
pub(super) mod reach;

use std::sync::atomic::{AtomicU64, Ordering};

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use self::entry::BlockEntry;
use self::reach::FrameFacts;
use super::event::{Event, Step};
use super::magic::{self, is_skippable};
use super::{Coding, LayerError, other_format};
use crate::units::len_u64;

/// The longest history that a frame may ask for, as a power of two: what `zstd --long=30` makes, 1 GiB.
const WINDOW_LOG: u32 = 30;
const MAX_WINDOW: u64 = 1 << WINDOW_LOG;
/// A history of up to this many bytes is what every decoder may have.
const ORDINARY_WINDOW: u64 = 128 << 20;
/// What the histories of all decoders of this process may take beyond that together, in bytes.
const LONG_WINDOWS: u64 = 4 << 30;
/// The part of [`LONG_WINDOWS`] that is taken now, in bytes.
static LONG_WINDOWS_HELD: AtomicU64 = AtomicU64::new(0);
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
    /// What the current frame's header says.
    facts: FrameFacts,
    /// Whether the current frame was entered at one of its blocks.
    is_entered: bool,
    /// How many bytes have come out of it.
    given: u64,
    share: WindowShare,
}

/// What one decoder's history takes of [`LONG_WINDOWS`], given back when it goes.
///
/// libzstd allocates a window when its frame begins, but the kernel gives memory to the part alone that has been written: as
/// much as has come out of the frame, up to the window. That is counted, not what a header says.
#[derive(Debug, Default)]
struct WindowShare(u64);

impl WindowShare {
    /// Takes what a history of so many bytes needs; false if that is more than is left.
    fn grow(&mut self, history: u64) -> bool {
        let needs = history.saturating_sub(ORDINARY_WINDOW);
        let Some(further) = needs.checked_sub(self.0).filter(|further| *further > 0) else {
            return true;
        };
        let before = LONG_WINDOWS_HELD.fetch_add(further, Ordering::Relaxed);
        self.0 = needs;
        before.saturating_add(further) <= LONG_WINDOWS
    }
}

impl Drop for WindowShare {
    fn drop(&mut self) {
        LONG_WINDOWS_HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
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
    /// Behind the last frame: zeros, to the blob's end.
    Padding,
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
        Ok(Self {
            decoder: decoder(None)?,
            stage: Stage::header(),
            at,
            began: at,
            any: false,
            facts: FrameFacts::default(),
            is_entered: false,
            given: 0,
            share: WindowShare::default(),
        })
    }

    /// At a block of a frame, which is byte `at` of the blob, with what a decoder holds there: `piece` has what matters of the last `window`
    /// bytes that came out. Nothing of that can be checked here: if it is wrong, so is what comes out.
    pub(super) fn at_block(at: u64, entry: &BlockEntry, piece: &[u8], window: u32) -> Result<Self, LayerError> {
        let dictionary = entry.dictionary(piece, window)?;
        let mut bytes = [0; MAX_HEADER];
        let header = entry.frame_header();
        bytes[..header.len()].copy_from_slice(&header);
        Ok(Self {
            decoder: decoder(Some(&dictionary))?,
            stage: Stage::Replay {
                bytes,
                from: 0,
                to: header.len(),
            },
            any: true,
            facts: FrameFacts {
                window: entry::window_of(entry.descriptor),
                checksum: entry.checksum,
                content: None,
            },
            is_entered: true,
            ..Self::at_frame(at)?
        })
    }

    /// What the header of the current frame says.
    pub(super) const fn facts(&self) -> FrameFacts {
        self.facts
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
        match &self.stage {
            Stage::Header { have: 0, .. } if self.any => Ok(self.at),
            Stage::Header { bytes, have } if self.any && bytes[..*have].iter().all(|byte| *byte == 0) => Ok(self.began),
            Stage::Padding => Ok(self.began),
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
            Stage::Padding => {
                if let Some(zeros) = input.iter().position(|byte| *byte != 0) {
                    return Err(LayerError::Corrupt {
                        coding: Coding::Zstd,
                        at: self.at + len_u64(zeros),
                        what: "something follows the zeros behind the last zstd frame",
                    });
                }
                step.consumed = input.len();
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
                    if std::mem::take(&mut self.is_entered) {
                        // The dictionary is not for the next frame, and the header that was made up promised no checksum.
                        self.decoder = decoder(None)?;
                        if self.facts.checksum {
                            self.stage = Stage::Skip { left: entry::CHECKSUM };
                        }
                    }
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
            Header::Frame(facts) if facts.window > MAX_WINDOW => {
                return Err(LayerError::Window {
                    coding: Coding::Zstd,
                    at,
                    needs: facts.window,
                    limit: MAX_WINDOW,
                });
            }
            Header::Frame(facts) => {
                self.any = true;
                (self.facts, self.given) = (facts, 0);
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
            // Block devices, tapes and some builders fill up with zeros.
            Header::Unknown if self.any && bytes[..have].iter().all(|byte| *byte == 0) => self.stage = Stage::Padding,
            Header::Unknown => {
                // Skippable frames are lz4's as well as zstd's.
                if let Some((what, command)) = other_format(&bytes[..have]).filter(|_| !self.any) {
                    return Err(LayerError::OtherFormat { at, what, command });
                }
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
        let (consumed, produced) = (from.pos(), to.pos());
        self.given = self.given.saturating_add(len_u64(produced));
        if !self.share.grow(self.given.min(self.facts.window)) {
            return Err(LayerError::Windows {
                at: self.began,
                limit: LONG_WINDOWS,
            });
        }
        Ok((consumed, produced, hint == 0))
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

/// A decoder that begins at a frame's header, with what a dictionary says.
fn decoder(dictionary: Option<&[u8]>) -> Result<Decoder<'static>, LayerError> {
    let memory = |_| LayerError::Memory(Coding::Zstd);
    let mut decoder = match dictionary {
        None => Decoder::new().map_err(memory)?,
        // libzstd says the same of one that it does not understand and of too little memory.
        Some(dictionary) => Decoder::with_dictionary(dictionary)
            .map_err(|_| LayerError::Table("a span begins at a block with a state that no decoder can have"))?,
    };
    decoder
        .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
        .map_err(memory)?;
    Ok(decoder)
}

/// How many bytes of a frame's beginning are needed to go on, as far as `bytes` tell.
fn wanted(bytes: &[u8]) -> usize {
    if bytes.len() < 4 {
        return 4;
    }
    if is_skippable(bytes) {
        return 8;
    }
    let Some(descriptor) = bytes.get(4).filter(|_| bytes.starts_with(&magic::ZSTD)) else {
        return if bytes.starts_with(&magic::ZSTD) { 5 } else { 4 };
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
    Frame(FrameFacts),
    Dictionary,
    Unknown,
}

/// What a header of the length that [`wanted`] asked for says.
fn judge(bytes: &[u8]) -> Header {
    if is_skippable(bytes) {
        let len = bytes.get(4..8).map_or(0, little_endian);
        return Header::Skippable { len };
    }
    let Some(descriptor) = bytes.get(4).copied().filter(|_| bytes.starts_with(&magic::ZSTD)) else {
        return Header::Unknown;
    };
    let fields = Fields::of(descriptor);
    let (window, rest) = bytes[5..].split_at(fields.window);
    let (dictionary, content) = rest.split_at(fields.dictionary);
    if little_endian(dictionary) != 0 {
        return Header::Dictionary;
    }
    // Two bytes tell 256 less than they mean.
    let content = match content.len() {
        0 => None,
        2 => Some(little_endian(content) + 256),
        _ => Some(little_endian(content)),
    };
    let window = match window.first() {
        Some(byte) => entry::window_of(*byte),
        // A single segment: the whole content is the window.
        None => content.unwrap_or(0),
    };
    Header::Frame(FrameFacts {
        window,
        checksum: descriptor & 4 != 0,
        content,
    })
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_histories_share_what_there_is() {
        let mut shares: Vec<_> = (0..3).map(|_| WindowShare::default()).collect();
        for share in &mut shares {
            assert!(share.grow(ORDINARY_WINDOW) && share.grow(0));
            assert_eq!(share.0, 0);
            assert!(share.grow(MAX_WINDOW) && share.grow(MAX_WINDOW) && share.grow(1));
        }
        let mut greedy = WindowShare::default();
        assert!(!greedy.grow(2 * MAX_WINDOW + ORDINARY_WINDOW));
        drop((greedy, shares));
        assert!(WindowShare::default().grow(3 * MAX_WINDOW), "all was given back");
    }
}
