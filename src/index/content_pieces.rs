//! Long files cut into content-defined pieces, by which two versions of a file are seen to have most of their bytes in common. In: payloads
//! that stream by, or a section of an index. Out: the length and the digest of each piece.
//!
//! The borders are those of `FastCDC` (2020, normalization level 1, no seed) with pieces of 16 to 256 KiB, 64 KiB on average: they follow
//! from the bytes around them, so that bytes put in or taken out change the pieces around the change and no others. Only payloads of more
//! than 1 MiB are cut: shorter ones are found as a whole. Of a payload no more is held than what is fed
//! at once and four of the longest pieces.

use fastcdc::v2020::FastCDC;

use super::cold::{ColdPart, Packed, Packer};
use super::digests::{Short, short};
use super::error::IndexFault;
use super::format::{Fields, PIECE_RECORD, RECORDS_PIECE};
use super::len_u64;
use super::payloads::Payloads;
use crate::units::TarRange;

/// No payload of up to so many bytes is cut.
const UNCUT: u64 = 1 << 20;
/// The lengths of pieces, in bytes; the last one of a payload may be shorter.
const SHORTEST: usize = 16 << 10;
const AVERAGE: usize = 64 << 10;
const LONGEST: usize = 256 << 10;

/// Makes the section: cuts payloads as they pass.
#[derive(Debug)]
pub(super) struct PieceCutter {
    /// The bytes of the payload that are in no piece yet.
    rest: Vec<u8>,
    packer: Packer,
    is_empty: bool,
}

impl PieceCutter {
    pub(super) fn new() -> Self {
        Self {
            rest: Vec::new(),
            packer: Packer::new(ColdPart::ContentPieces, RECORDS_PIECE),
            is_empty: true,
        }
    }

    /// Takes the next bytes of a payload.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        // A cut is where it would be with all of the payload at hand, if the longest piece is.
        if self.rest.len() >= 4 * LONGEST {
            self.cut(LONGEST);
        }
    }

    /// The payload has ended.
    pub(super) fn end(&mut self) {
        self.cut(1);
    }

    /// Cuts off pieces for as long as at least `least` bytes are left.
    fn cut(&mut self, least: usize) {
        let mut at = 0;
        while let Some(rest) = self.rest.get(at..).filter(|rest| rest.len() >= least) {
            let piece = FastCDC::new(rest, SHORTEST, AVERAGE, LONGEST).next();
            let len = piece.map_or(rest.len(), |piece| piece.length.clamp(1, rest.len()));
            let piece = rest.get(..len).unwrap_or(rest);
            self.packer.feed(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
            self.packer.feed(&short(piece));
            self.is_empty = false;
            at += len;
        }
        self.rest.drain(..at);
    }

    /// The section; none if nothing was cut.
    pub(super) fn finish(self) -> Option<Packed> {
        (!self.is_empty).then(|| self.packer.finish())
    }
}

/// The pieces of a layer's long payloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContentPieces(Vec<(TarRange, Short)>);

impl ContentPieces {
    /// Whether a payload is cut into pieces: one that is longer than 1 MiB.
    #[must_use]
    pub const fn is_cut(payload: TarRange) -> bool {
        payload.len > UNCUT
    }

    /// The most bytes that the section has for these payloads: what is longer need not be read.
    #[must_use]
    pub fn longest_section(payloads: &Payloads) -> u64 {
        let cut = payloads.ranges().iter().filter(|payload| Self::is_cut(**payload));
        let records = cut.fold(0, |sum: u64, payload| {
            sum.saturating_add(payload.len.div_ceil(len_u64(SHORTEST)))
        });
        records.saturating_mul(len_u64(PIECE_RECORD))
    }

    /// Reads the section, all of it, of an index with these payloads.
    ///
    /// # Errors
    /// [`IndexFault::Malformed`] when it does not fit them.
    pub fn decode(section: &[u8], payloads: &Payloads) -> Result<Self, IndexFault> {
        let fault = IndexFault::Malformed("table of content pieces");
        let mut records = Fields(section);
        let mut pieces = Vec::with_capacity(section.len() / PIECE_RECORD);
        for payload in payloads.ranges().iter().filter(|payload| Self::is_cut(**payload)) {
            let mut at = payload.start;
            while at < payload.end() {
                let len = u64::from(records.u32().map_err(|_| fault)?);
                let digest: &Short = records.array().map_err(|_| fault)?;
                let rest = payload.end().since(at);
                let is_last = len == rest;
                if len > rest || len > len_u64(LONGEST) || (len < len_u64(SHORTEST) && !is_last) {
                    return Err(fault);
                }
                pieces.push((TarRange::new(at, len), *digest));
                at = at.plus(len);
            }
        }
        records.0.is_empty().then_some(Self(pieces)).ok_or(fault)
    }

    /// Where each piece lies in the tar, ascending where entries are, with the first twenty bytes of its SHA-256.
    #[must_use]
    pub fn all(&self) -> &[(TarRange, [u8; 20])] {
        &self.0
    }

    /// Those of one payload.
    #[must_use]
    pub fn of(&self, payload: TarRange) -> &[(TarRange, [u8; 20])] {
        let first = self.0.partition_point(|(range, _)| range.start < payload.start);
        let end = self.0.partition_point(|(range, _)| range.start < payload.end());
        self.0.get(first..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::build::{Contents, Recorder};
    use crate::index::{Index, LayerIdentity};

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let step = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(step).collect()
    }

    fn indexed(files: &[&[u8]], feed: usize) -> (Vec<u8>, Payloads, ContentPieces) {
        let mut tar = tar::Builder::new(Vec::new());
        for (number, content) in files.iter().enumerate() {
            let mut header = tar::Header::new_gnu();
            header.set_size(len_u64(content.len()));
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("file{number}"), *content).unwrap();
        }
        let tar = tar.into_inner().unwrap();
        let mut recorder = Recorder::new(Contents::FULL);
        for piece in tar.chunks(feed) {
            recorder.feed(piece).unwrap();
        }
        let index = Index::open(recorder.finish().unwrap().into_index(LayerIdentity::default())).unwrap();
        index.verify().unwrap();
        let payloads = Payloads::with_digests(&index).unwrap();
        let section: Vec<u8> = (0..index.cold().pieces(ColdPart::ContentPieces))
            .flat_map(|number| index.cold_piece(ColdPart::ContentPieces, number).unwrap().unwrap())
            .collect();
        let pieces = ContentPieces::decode(&section, &payloads).unwrap();
        (tar, payloads, pieces)
    }

    #[test]
    fn pieces_are_what_fastcdc_cuts_of_the_whole_however_it_passes() {
        let (long, edge, short_one) = (noise(3_000_000, 1), noise(1 << 20, 2), noise(700, 3));
        let just = noise((1 << 20) + 1, 4);
        let files: [&[u8]; 4] = [&long, &edge, &short_one, &just];
        let (tar, payloads, pieces) = indexed(&files, 1 << 20);
        assert_eq!(indexed(&files, 1000).2, pieces);
        let expected: Vec<(usize, usize)> = [&long, &just]
            .iter()
            .flat_map(|file| FastCDC::new(file, SHORTEST, AVERAGE, LONGEST).map(|piece| (piece.offset, piece.length)))
            .collect();
        assert_eq!(pieces.all().len(), expected.len());
        for (range, digest) in pieces.all() {
            let (start, end) = (
                usize::try_from(range.start.0).unwrap(),
                usize::try_from(range.end().0).unwrap(),
            );
            assert_eq!(short(&tar[start..end]), *digest);
        }
        let lens = pieces
            .all()
            .iter()
            .map(|(range, _)| usize::try_from(range.len).unwrap());
        assert!(lens.eq(expected.iter().map(|(_, len)| *len)));
        let first = payloads.ranges()[0];
        assert_eq!(
            pieces.of(first).iter().map(|(range, _)| range.len).sum::<u64>(),
            first.len
        );
        assert!(pieces.of(payloads.ranges()[1]).is_empty());
    }

    #[test]
    fn what_was_not_changed_stays_the_same_pieces() {
        let old = noise(4_000_000, 1);
        let mut new = old.clone();
        new.splice(1_500_000..1_500_010, noise(5000, 9));
        let (a, b) = (indexed(&[&old], 1 << 20).2, indexed(&[&[0; 9], &new], 1 << 20).2);
        let known: std::collections::HashSet<Short> = a.all().iter().map(|(_, digest)| *digest).collect();
        let other = b.all().iter().filter(|(_, digest)| !known.contains(digest));
        let bytes: u64 = other.map(|(range, _)| range.len).sum();
        assert!(bytes < 600_000, "{bytes}");
    }

    #[test]
    fn a_section_that_does_not_fit_is_refused() {
        let (_, payloads, pieces) = indexed(&[&noise(2_000_000, 1)], 1 << 20);
        let record = |len: u32| [&len.to_le_bytes()[..], &[7; 20]].concat();
        let fault = Err(IndexFault::Malformed("table of content pieces"));
        let whole: Vec<u8> = pieces
            .all()
            .iter()
            .flat_map(|(range, digest)| [&u32::try_from(range.len).unwrap().to_le_bytes()[..], digest].concat())
            .collect();
        assert_eq!(ContentPieces::decode(&whole, &payloads), Ok(pieces));
        assert_eq!(ContentPieces::decode(&whole[..whole.len() - 1], &payloads), fault);
        assert_eq!(
            ContentPieces::decode(&[&whole[..], &record(1)].concat(), &payloads),
            fault
        );
        assert_eq!(ContentPieces::decode(&record(0), &payloads), fault);
        assert_eq!(ContentPieces::decode(&record(300_000), &payloads), fault);
        // Only the last one of a payload may be so short.
        assert_eq!(
            ContentPieces::decode(&[record(1), record(200_000)].concat(), &payloads),
            fault
        );
        assert!(len_u64(whole.len()) <= ContentPieces::longest_section(&payloads));
        assert_eq!(
            ContentPieces::decode(&[], &Payloads::default()),
            Ok(ContentPieces::default())
        );
    }
}
