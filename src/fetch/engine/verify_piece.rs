//! Verifying a run of tar bytes piece by piece. In: the bytes, from a place where no piece is cut. Out: the same bytes, a piece at a
//! time, each after its digest matched; what belongs to no piece comes out as zeros.

use crate::index::PieceDigests;
use crate::units::{TarOffset, len_u64, len_usize};

/// What lies between pieces.
const NOTHING: [u8; 4096] = [0; 4096];

/// Passes on verified pieces. Holds back at most one piece.
#[derive(Debug)]
pub(super) struct PieceVerifier {
    pieces: PieceDigests,
    /// The piece that is coming, or the next to come.
    next: usize,
    /// Where the next byte lies.
    at: u64,
    held: Vec<u8>,
}

impl PieceVerifier {
    /// For bytes that come from `at` on.
    pub(super) fn new(pieces: PieceDigests, at: u64) -> Self {
        Self {
            next: pieces.first_behind(TarOffset(at)),
            pieces,
            at,
            held: Vec::new(),
        }
    }

    /// Takes the next bytes, and gives what is known to be right. The error is where the piece begins that is wrong; what comes
    /// after that is of no use.
    pub(super) fn push(&mut self, mut bytes: &[u8], give: &mut dyn FnMut(&[u8])) -> Result<(), TarOffset> {
        while !bytes.is_empty() {
            let piece = self.pieces.range(self.next);
            let start = if piece.is_empty() { u64::MAX } else { piece.start.0 };
            if self.at < start {
                let between = len_usize(start - self.at).min(bytes.len());
                for zeros in bytes[..between].chunks(NOTHING.len()) {
                    give(&NOTHING[..zeros.len()]);
                }
                self.at += len_u64(between);
                bytes = &bytes[between..];
                continue;
            }
            let left = len_usize(piece.end().0 - self.at);
            let (head, rest) = bytes.split_at(left.min(bytes.len()));
            self.at += len_u64(head.len());
            let ends = head.len() == left;
            if !self.pieces.is_known(self.next) {
                give(head);
            } else if ends && self.held.is_empty() {
                // As a whole it is in the decoder's hands already.
                self.verify(piece.start, head)?;
                give(head);
            } else {
                if self.held.is_empty() {
                    self.held.reserve_exact(len_usize(piece.len));
                }
                self.held.extend_from_slice(head);
                if ends {
                    let whole = std::mem::take(&mut self.held);
                    self.verify(piece.start, &whole)?;
                    give(&whole);
                }
            }
            self.next += usize::from(ends);
            bytes = rest;
        }
        Ok(())
    }

    fn verify(&self, start: TarOffset, bytes: &[u8]) -> Result<(), TarOffset> {
        if self.pieces.check(self.next, bytes) {
            Ok(())
        } else {
            Err(start)
        }
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::units::TarRange;

    /// Content with pieces at places of its own, and what has to come out.
    fn made() -> (Vec<u8>, PieceDigests, Vec<u8>) {
        let content: Vec<u8> = (0..50_000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let places = [(0, 100), (100, 9000), (10_000, 1), (20_000, 20_000), (40_000, 5000)];
        let mut clean = vec![0; content.len()];
        let pieces = places.map(|(start, len)| {
            let (from, to) = (len_usize(start), len_usize(start + len));
            clean[from..to].copy_from_slice(&content[from..to]);
            let digest = (start != 10_000).then(|| Sha256::digest(&content[from..to]).into());
            (TarRange::new(TarOffset(start), len), digest)
        });
        (content, PieceDigests::new(50_000, pieces).unwrap(), clean)
    }

    fn through(pieces: &PieceDigests, at: usize, content: &[u8], step: usize) -> (Vec<u8>, Result<(), TarOffset>) {
        let (mut out, mut pieces_verifier) = (Vec::new(), PieceVerifier::new(pieces.clone(), len_u64(at)));
        for part in content[at..].chunks(step) {
            let passed = pieces_verifier.push(part, &mut |bytes| out.extend_from_slice(bytes));
            if passed.is_err() {
                return (out, passed);
            }
        }
        (out, Ok(()))
    }

    #[test]
    fn what_is_right_passes_whatever_the_steps() {
        let (content, pieces, clean) = made();
        for step in [1, 77, 9100, 20_000, 50_000] {
            for at in [0, 100, 9100, 9500, 20_000, 45_000, 49_999] {
                assert_eq!(
                    through(&pieces, at, &content, step),
                    (clean[at..].to_vec(), Ok(())),
                    "{at} {step}"
                );
            }
        }
    }

    #[test]
    fn nothing_of_a_wrong_piece_passes() {
        let (content, pieces, clean) = made();
        for (flipped, start) in [
            (0, 0),
            (99, 0),
            (100, 100),
            (9099, 100),
            (39_999, 20_000),
            (44_999, 40_000),
        ] {
            let mut bad = content.clone();
            bad[flipped] ^= 1;
            for step in [1, 5000, 50_000] {
                let (out, outcome) = through(&pieces, 0, &bad, step);
                assert_eq!(outcome, Err(TarOffset(start)));
                assert_eq!(out, clean[..len_usize(start)]);
            }
        }
        // A piece without a digest passes as it is, and what lies between pieces never.
        let mut other = content.clone();
        (other[10_000], other[9500], other[45_000]) = (3, 3, 3);
        let (out, outcome) = through(&pieces, 0, &other, 333);
        assert_eq!((out[10_000], out[9500], out[45_000], outcome), (3, 0, 0, Ok(())));
    }
}
