//! Where the stored bytes of a layer's files lie, and their digests. In: an index, and pieces of its payload digests from wherever its cold
//! part is. Out: for each file of which the tar stores something, in the order of the entries, its range and the SHA-256 of that.

use super::cold::ColdPart;
use super::error::{IndexError, IndexFault};
use super::len_u64;
use super::reader::Index;
use crate::units::TarRange;

/// A digest's length in bytes.
const DIGEST: usize = 32;

/// How many digests a piece of the section has, the last one fewer: 64 KiB.
const PER_PIECE: usize = 2048;

/// The payloads of a layer. Takes 16 bytes a file, and 32 more for those whose digests are here.
#[derive(Clone, Debug, Default)]
pub struct Payloads {
    ranges: Vec<TarRange>,
    /// The digests, as far as they are here, in pieces of [`PER_PIECE`].
    pieces: Vec<Option<Vec<u8>>>,
}

impl Payloads {
    /// Those of an index, without their digests.
    ///
    /// # Errors
    /// A damaged index; [`IndexFault::Malformed`] when its payload digests are not as many as its files.
    pub fn of<B: AsRef<[u8]>>(index: &Index<B>) -> Result<Self, IndexError> {
        let mut ranges = Vec::new();
        let mut entries = index.entries()?;
        while let Some(entry) = entries.next_entry()? {
            let range = entry.payload();
            if !range.is_empty() {
                ranges.push(range);
            }
        }
        let cold = index.cold();
        let expected = len_u64(ranges.len()).saturating_mul(len_u64(DIGEST));
        if cold.has(ColdPart::PayloadDigests) && cold.decoded_len(ColdPart::PayloadDigests) != expected {
            return Err(IndexFault::Malformed("table of payload digests").into());
        }
        let pieces = vec![None; ranges.len().div_ceil(PER_PIECE)];
        Ok(Self { ranges, pieces })
    }

    /// The same with all digests, of an index that is whole and has them.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn with_digests<B: AsRef<[u8]>>(index: &Index<B>) -> Result<Self, IndexError> {
        let mut payloads = Self::of(index)?;
        for number in 0..payloads.pieces.len() {
            let piece = index.cold_piece(ColdPart::PayloadDigests, number)?;
            payloads.put_piece(number, piece.ok_or(IndexFault::Truncated)?)?;
        }
        Ok(payloads)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether no file stores anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Where they lie, in the order of the entries.
    #[must_use]
    pub fn ranges(&self) -> &[TarRange] {
        &self.ranges
    }

    /// Their pieces of [`ColdPart::PayloadDigests`]: which payloads each has the digests of.
    pub fn pieces(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let count = self.ranges.len();
        (0..self.pieces.len()).map(move |number| number * PER_PIECE..((number + 1) * PER_PIECE).min(count))
    }

    /// Whether a piece's digests are here.
    #[must_use]
    pub fn has_piece(&self, number: usize) -> bool {
        self.pieces.get(number).is_some_and(Option::is_some)
    }

    /// Takes a piece of [`ColdPart::PayloadDigests`], which was checked.
    ///
    /// # Errors
    /// [`IndexFault::Truncated`] when it has not as many digests as it should.
    pub fn put_piece(&mut self, number: usize, digests: Vec<u8>) -> Result<(), IndexError> {
        let expected = self.pieces().nth(number).map(|payloads| payloads.len() * DIGEST);
        if expected != Some(digests.len()) {
            return Err(IndexFault::Truncated.into());
        }
        self.pieces[number] = Some(digests);
        Ok(())
    }

    /// The SHA-256 of payload number `number`, if it is here.
    #[must_use]
    pub fn digest(&self, number: usize) -> Option<[u8; DIGEST]> {
        let piece = self.pieces.get(number / PER_PIECE)?.as_ref()?;
        piece.get(number % PER_PIECE * DIGEST..)?.first_chunk().copied()
    }
}
