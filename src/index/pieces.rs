//! Digests of pieces of files. In: pieces as a layer's own table of contents has them, or a section of an index. Out: an answer
//! to whether bytes are what the layer has there.
//!
//! Pieces are as long as who made the table wished, lie in ascending order, and do not overlap. What lies between them (padding,
//! headers) belongs to no file.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::IndexFault;
use super::len_u64;
use super::varint::{self, Cursor};
use crate::units::{TarOffset, TarRange};

/// The longest piece with a digest, in bytes: it has to be in memory before any of it can be believed. Makers of layers cut files
/// at 4 MiB or less.
pub const MAX_PIECE: u64 = 8 << 20;

/// A piece of a file's content in tar space, in bytes, and its SHA-256 where the table of contents has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentPiece {
    start: u64,
    len: u64,
    digest: Option<[u8; 32]>,
}

/// What of tar space is files' content, piece by piece, and the SHA-256 of each piece where it is known. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct PieceDigests {
    tar_len: u64,
    pieces: Arc<[ContentPiece]>,
}

impl fmt::Debug for PieceDigests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PieceDigests")
            .field("tar_len", &self.tar_len)
            .field("pieces", &self.pieces.len())
            .finish()
    }
}

impl PieceDigests {
    /// These pieces of a tar space of `tar_len` bytes, ascending, with their digests. `None` when they are not in order, reach
    /// behind its end, are empty, or one with a digest is longer than [`MAX_PIECE`].
    #[must_use]
    pub fn new(tar_len: u64, pieces: impl IntoIterator<Item = (TarRange, Option<[u8; 32]>)>) -> Option<Self> {
        let mut at = 0;
        let check = |(range, digest): (TarRange, Option<[u8; 32]>)| {
            let (start, len) = (range.start.0, range.len);
            let end = start.checked_add(len)?;
            let fits = start >= at && len > 0 && end <= tar_len && (digest.is_none() || len <= MAX_PIECE);
            at = end;
            fits.then_some(ContentPiece { start, len, digest })
        };
        let pieces: Option<Vec<ContentPiece>> = pieces.into_iter().map(check).collect();
        Some(Self {
            tar_len,
            pieces: pieces?.into(),
        })
    }

    /// How many pieces there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether the digest of every piece is known.
    #[must_use]
    pub fn are_complete(&self) -> bool {
        self.pieces.iter().all(|piece| piece.digest.is_some())
    }

    /// Where piece number `n` lies; nowhere if there are not so many.
    #[must_use]
    pub fn range(&self, n: usize) -> TarRange {
        self.pieces.get(n).map_or(TarRange::default(), |piece| {
            TarRange::new(TarOffset(piece.start), piece.len)
        })
    }

    /// Whether the digest of piece number `n` is known.
    #[must_use]
    pub fn is_known(&self, n: usize) -> bool {
        self.pieces.get(n).is_some_and(|piece| piece.digest.is_some())
    }

    /// The number of the first piece that ends behind `at`; [`Self::len`] if none does.
    #[must_use]
    pub fn first_behind(&self, at: TarOffset) -> usize {
        self.pieces.partition_point(|piece| piece.start + piece.len <= at.0)
    }

    /// The numbers of the pieces of which bytes lie in `range`.
    #[must_use]
    pub fn overlapping(&self, range: TarRange) -> Range<usize> {
        let first = self.first_behind(range.start);
        let end = self.pieces.partition_point(|piece| piece.start < range.end().0);
        first..end.max(first)
    }

    /// `range`, widened so that it cuts no piece whose digest is known.
    #[must_use]
    pub fn widened(&self, range: TarRange) -> TarRange {
        let (mut start, mut end) = (range.start.0, range.end().0);
        let pieces = self.pieces.get(self.overlapping(range)).unwrap_or_default();
        for piece in [pieces.first(), pieces.last()].into_iter().flatten() {
            if piece.digest.is_some() {
                start = start.min(piece.start);
                end = end.max(piece.start + piece.len);
            }
        }
        TarRange::new(TarOffset(start), end - start)
    }

    /// Whether `bytes` are piece number `n`: all of it, no more and no less. Of one without a digest only the length can be told.
    #[must_use]
    pub fn check(&self, n: usize, bytes: &[u8]) -> bool {
        self.pieces.get(n).is_some_and(|piece| {
            let right = |digest: [u8; 32]| <[u8; 32]>::from(Sha256::digest(bytes)) == digest;
            len_u64(bytes.len()) == piece.len && piece.digest.is_none_or(right)
        })
    }

    /// The section of an index.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.pieces.len() * 36 + 8);
        varint::put(&mut out, len_u64(self.pieces.len()));
        let mut at = 0;
        for piece in &*self.pieces {
            varint::put(&mut out, piece.start - at);
            varint::put(&mut out, piece.len << 1 | u64::from(piece.digest.is_some()));
            at = piece.start + piece.len;
        }
        for digest in self.pieces.iter().filter_map(|piece| piece.digest.as_ref()) {
            out.extend_from_slice(digest);
        }
        out
    }

    /// Reads the section of an index of a tar space of `tar_len` bytes.
    pub(super) fn decode(section: &[u8], tar_len: u64) -> Result<Self, IndexFault> {
        let fault = IndexFault::Malformed("table of piece digests");
        let mut places = Cursor::new(section);
        let count = places.number().map_err(|_| fault)?;
        // Each takes two bytes at least.
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= places.remaining() / 2)
            .ok_or(fault)?;
        let mut pieces = Vec::with_capacity(count);
        let mut at = 0_u64;
        for _ in 0..count {
            let gap = places.number().map_err(|_| fault)?;
            let how = places.number().map_err(|_| fault)?;
            let start = at.checked_add(gap).ok_or(fault)?;
            at = start.checked_add(how >> 1).ok_or(fault)?;
            let range = TarRange::new(TarOffset(start), how >> 1);
            pieces.push((range, (how & 1 == 1).then_some([0; 32])));
        }
        for digest in pieces.iter_mut().filter_map(|(_, digest)| digest.as_mut()) {
            digest.copy_from_slice(places.bytes(32).map_err(|_| fault)?);
        }
        if places.remaining() > 0 {
            return Err(fault);
        }
        Self::new(tar_len, pieces).ok_or(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> TarRange {
        TarRange::new(TarOffset(start), len)
    }

    fn some() -> PieceDigests {
        let digest = |byte: u8| Some(Sha256::digest([byte; 10]).into());
        let pieces = [
            (range(0, 10), digest(1)),
            (range(10, 10), digest(2)),
            (range(512, 1 << 30), None),
            (range(2 << 30, 10), digest(3)),
        ];
        PieceDigests::new(3 << 30, pieces).unwrap()
    }

    #[test]
    fn a_piece_is_known_by_all_of_its_bytes() {
        let pieces = some();
        assert!(pieces.check(0, &[1; 10]) && pieces.check(1, &[2; 10]) && pieces.check(3, &[3; 10]));
        assert!(!pieces.check(0, &[2; 10]) && !pieces.check(0, &[1; 9]) && !pieces.check(4, &[]));
        assert!(!pieces.are_complete() && pieces.is_known(3) && !pieces.is_known(2));
    }

    #[test]
    fn ranges_are_widened_to_what_can_be_checked() {
        let pieces = some();
        assert_eq!(pieces.overlapping(range(0, 3 << 30)), 0..4);
        assert_eq!(pieces.overlapping(range(9, 1)), 0..1);
        assert_eq!(pieces.overlapping(range(9, 2)), 0..2);
        assert_eq!(pieces.overlapping(range(20, 492)), 2..2);
        assert_eq!(pieces.widened(range(5, 1)), range(0, 10));
        assert_eq!(pieces.widened(range(5, 6)), range(0, 20));
        assert_eq!(
            pieces.widened(range(5, 1000)),
            range(0, 1005),
            "what has no digest may be cut"
        );
        assert_eq!(pieces.widened(range(600, 5)), range(600, 5));
        assert_eq!(pieces.widened(range(100, 5)), range(100, 5));
        assert_eq!(pieces.first_behind(TarOffset(10)), 1);
    }

    #[test]
    fn the_section_comes_back_and_nothing_else_is_read() {
        let pieces = some();
        let section = pieces.encode();
        assert_eq!(PieceDigests::decode(&section, 3 << 30), Ok(pieces));
        for len in 0..section.len() {
            assert!(PieceDigests::decode(&section[..len], 3 << 30).is_err());
        }
        assert!(PieceDigests::decode(&section, 2 << 30).is_err(), "behind the end");
        assert!(PieceDigests::decode(&[section, vec![0]].concat(), 3 << 30).is_err());
        assert!(PieceDigests::decode(&[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0], 10).is_err());
        assert!(PieceDigests::new(100, [(range(0, 10), None), (range(9, 10), None)]).is_none());
        assert!(PieceDigests::new(100, [(range(0, 0), None)]).is_none());
        assert!(PieceDigests::new(u64::MAX, [(range(0, MAX_PIECE + 1), Some([0; 32]))]).is_none());
        assert!(PieceDigests::new(u64::MAX, [(range(u64::MAX, 2), None)]).is_none());
    }
}
