//! What gzip members and zstd frames have in common: units one after the other, each decodable on its own.

use super::event::Step;
use super::gzip::Members;
use super::zstd::Frames;
use super::zstd::reach::FrameFacts;
use super::{Coding, LayerError};

/// A compressed stream that is being decoded.
#[derive(Debug)]
pub(super) enum Stream {
    Gzip(Members),
    Zstd(Frames),
}

impl Stream {
    /// At the beginning of a unit, which is byte `at` of the blob.
    pub(super) fn at_unit(coding: Coding, at: u64) -> Result<Self, LayerError> {
        match coding {
            Coding::Plain => Err(LayerError::Table("a plain layer has nothing to decode")),
            Coding::Gzip => Members::at_member(at).map(Self::Gzip),
            Coding::Zstd => Frames::at_frame(at).map(Self::Zstd),
        }
    }

    /// What the header of the current frame says, in a zstd stream.
    pub(super) const fn frame(&self) -> Option<FrameFacts> {
        match self {
            Self::Gzip(_) => None,
            Self::Zstd(frames) => Some(frames.facts()),
        }
    }

    pub(super) const fn coding(&self) -> Coding {
        match self {
            Self::Gzip(_) => Coding::Gzip,
            Self::Zstd(_) => Coding::Zstd,
        }
    }

    /// Position of the next input byte in the blob.
    pub(super) const fn position(&self) -> u64 {
        match self {
            Self::Gzip(members) => members.position(),
            Self::Zstd(frames) => frames.position(),
        }
    }

    /// Whether everything from here on is ignored.
    pub(super) const fn is_trailing(&self) -> bool {
        match self {
            Self::Gzip(members) => members.is_trailing(),
            Self::Zstd(_) => false,
        }
    }

    /// Where the last unit ended, if this is behind one and not in the middle of another.
    pub(super) fn end(&self) -> Result<u64, LayerError> {
        match self {
            Self::Gzip(members) => members.end(),
            Self::Zstd(frames) => frames.end(),
        }
    }

    /// Decodes some of `input` into `output` (which must not be empty), up to the next thing of note; `at_blocks` makes
    /// that the end of a deflate block as well.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], at_blocks: bool) -> Result<Step, LayerError> {
        match self {
            Self::Gzip(members) => members.step(input, output, at_blocks),
            Self::Zstd(frames) => frames.step(input, output),
        }
    }
}

/// Ends a loop in which nothing happens. A decoder may go through a step or two without taking or giving a byte, when
/// all it needs has been taken before; never through many.
pub(super) struct Idle {
    coding: Coding,
    steps: u8,
}

impl Idle {
    pub(super) const fn new(coding: Coding) -> Self {
        Self { coding, steps: 0 }
    }

    /// Counts a step that ended at byte `at` of the blob.
    pub(super) fn step(&mut self, step: Step, at: u64) -> Result<(), LayerError> {
        /// More than any decoder needs.
        const PATIENCE: u8 = 16;
        let progress = step.consumed > 0 || step.produced > 0;
        self.steps = if progress { 0 } else { self.steps + 1 };
        if self.steps < PATIENCE {
            return Ok(());
        }
        Err(LayerError::Corrupt {
            coding: self.coding,
            at,
            what: "its decoder does not go on",
        })
    }
}
