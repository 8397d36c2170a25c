//! Which bytes of the history a deflate stream reaches back to from a given point on.
//!
//! What follows the point is decoded twice more, with histories that are not what came out but numbers: the byte at
//! place `i` is `i`'s low byte in one and that plus one plus `i / 256` in the other. Where both outputs agree the byte
//! came from the stream, where they differ they name the place in the history it was copied from, however many copies
//! lie between. After 32 KiB nothing reaches back to the history any more. Most of it is not needed by anything; zeros
//! in its place compress well.

use super::super::{Coding, LayerError};
use super::inflate::{Inflate, Stop, WINDOW};

/// Follows a stream from a point on.
#[derive(Debug)]
pub(in crate::layer) struct Tracer {
    history: Vec<u8>,
    low: Side,
    high: Side,
}

#[derive(Debug)]
struct Side {
    inflate: Inflate,
    output: Vec<u8>,
    filled: usize,
    ended: bool,
}

impl Tracer {
    /// From a point where `bits` bits of the byte before, in `value`, come first, and `history` came out before.
    pub(in crate::layer) fn start(bits: u8, value: u8, history: &[u8]) -> Result<Box<Self>, LayerError> {
        let mut low = Vec::with_capacity(history.len());
        let mut high = Vec::with_capacity(history.len());
        for (place, _) in (0_u16..).zip(history) {
            let [first, second] = place.to_le_bytes();
            low.push(first);
            high.push(first.wrapping_add(1).wrapping_add(second));
        }
        Ok(Box::new(Self {
            low: Side::start(bits, value, &low)?,
            high: Side::start(bits, value, &high)?,
            history: history.to_vec(),
        }))
    }

    /// Takes the next bytes of the stream; `false` when no more are of use.
    pub(in crate::layer) fn feed(&mut self, input: &[u8]) -> bool {
        let more = self.low.feed(input);
        self.high.feed(input) && more
    }

    /// The history from the first byte that is needed on, with zeros where it is not needed; empty when nothing is.
    pub(in crate::layer) fn needed(mut self) -> Vec<u8> {
        let mut needed = vec![false; self.history.len()];
        let outputs = self.low.output[..self.low.filled]
            .iter()
            .zip(&self.high.output[..self.high.filled]);
        for (low, high) in outputs.filter(|(low, high)| low != high) {
            let place = u16::from_le_bytes([*low, high.wrapping_sub(*low).wrapping_sub(1)]);
            if let Some(mark) = needed.get_mut(usize::from(place)) {
                *mark = true;
            }
        }
        let Some(first) = needed.iter().position(|needed| *needed) else {
            return Vec::new();
        };
        for (byte, needed) in self.history.iter_mut().zip(&needed) {
            if !needed {
                *byte = 0;
            }
        }
        self.history.split_off(first)
    }
}

impl Side {
    fn start(bits: u8, value: u8, history: &[u8]) -> Result<Self, LayerError> {
        let mut inflate = Inflate::new().ok_or(LayerError::Memory(Coding::Gzip))?;
        if !inflate.enter(bits, value, history) {
            return Err(LayerError::Table("a history that deflate cannot have"));
        }
        Ok(Self {
            inflate,
            output: vec![0; WINDOW],
            filled: 0,
            ended: false,
        })
    }

    fn feed(&mut self, mut input: &[u8]) -> bool {
        while !self.ended && self.filled < WINDOW {
            match self.inflate.run(input, &mut self.output[self.filled..], false) {
                Ok(progress) => {
                    self.filled += progress.produced;
                    self.ended = progress.stop == Stop::End;
                    input = &input[progress.consumed..];
                    if input.is_empty() || progress.consumed + progress.produced == 0 {
                        break;
                    }
                }
                // The stream is damaged, and the decoder of its content reports that.
                Err(_) => self.ended = true,
            }
        }
        !self.ended && self.filled < WINDOW
    }
}
