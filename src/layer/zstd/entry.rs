//! Entering a zstd frame at one of its blocks. In: what a decoder would hold there, and the bytes before it that the span's blocks
//! copy. Out: a dictionary and a frame header, from which libzstd goes on as if it had decoded all that comes before.
//!
//! Nothing here is unusual for libzstd: a dictionary has all that a block takes from the blocks before it, namely the last offsets, the
//! tables, and the content that came out. What it cannot say (a table of one symbol that is used again) makes a block none to enter at.
//! A wrong state decodes to wrong bytes without an error, so who enters compares what comes out with digests.

use std::sync::Arc;

use super::blocks::TABLES;
use super::fse::Kind;
use crate::layer::{LayerError, magic, number};
use crate::units::{len_u64, to_usize};

/// No block is entered of a frame that may refer further back, in bytes: who enters lays out as much.
pub(crate) const MAX_REACH: u64 = 32 << 20;
/// The bytes of the blob's end that are passed over behind the last block of a frame with a checksum: it is of all that came out.
pub(super) const CHECKSUM: u64 = 4;
/// How a dictionary begins (RFC 8878, section 5).
const DICTIONARY: [u8; 4] = 0xec30_a437_u32.to_le_bytes();
/// The dictionary's number. Our frame header names none, so it is never compared.
const ANY_NUMBER: [u8; 4] = 1_u32.to_le_bytes();
/// A Huffman table that no block uses: two symbols of one bit each.
const ANY_HUFFMAN: [u8; 2] = [0x80, 0x10];
/// The longest description of a table.
const LONGEST_TABLE: u64 = 256;
/// The kinds of tables behind the Huffman table, in the order of dictionaries.
const KINDS: [Kind; TABLES - 1] = [Kind::Offsets, Kind::Matches, Kind::Literals];

/// What a decoder holds at a block, besides its window.
///
/// # As bytes
/// Numbers are LEB128. One byte: the frame's window, as in a frame header; one byte: 1 if the frame has a checksum, and 2, 4, 8, 16 for
/// each table that follows; three numbers: the last offsets; then each table, of Huffman codes, offsets, matches' lengths, literals'
/// lengths, as a number of bytes and its description as it is in the blob, or as 0 for the predefined one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockEntry {
    /// The window of a frame header that is at least as long as the frame's own.
    pub(super) descriptor: u8,
    pub(super) checksum: bool,
    pub(super) repeats: [u32; 3],
    /// Those that are used; empty for a predefined one.
    pub(super) tables: [Option<Arc<[u8]>>; TABLES],
}

/// The window that a frame header's byte stands for, in bytes.
pub(super) fn window_of(descriptor: u8) -> u64 {
    let base = 1_u64 << (10 + (descriptor >> 3));
    base + base / 8 * u64::from(descriptor & 7)
}

/// The byte of a frame header for a window of at least so many bytes.
pub(super) fn descriptor_of(window: u64) -> u8 {
    (0..=u8::MAX).find(|byte| window_of(*byte) >= window).unwrap_or(u8::MAX)
}

impl BlockEntry {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.descriptor);
        let there = self.tables.iter().enumerate().filter(|(_, table)| table.is_some());
        let flags = there.fold(u8::from(self.checksum), |flags, (n, _)| flags | 2 << n);
        out.push(flags);
        for repeat in self.repeats {
            number::put(out, u64::from(repeat));
        }
        for table in self.tables.iter().flatten() {
            number::put(out, len_u64(table.len()));
            out.extend_from_slice(table);
        }
    }

    /// Reads what [`BlockEntry::encode`] wrote from the front of `bytes`.
    pub(crate) fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let (&[descriptor, flags], rest) = bytes.split_first_chunk()?;
        *bytes = rest;
        if flags >= 2 << TABLES || window_of(descriptor) > MAX_REACH {
            return None;
        }
        let mut repeats = [0; 3];
        for repeat in &mut repeats {
            let value = number::take(bytes)?;
            if value == 0 || value > MAX_REACH {
                return None;
            }
            *repeat = u32::try_from(value).ok()?;
        }
        let mut tables = [None, None, None, None];
        for (n, table) in tables.iter_mut().enumerate() {
            if flags & 2 << n == 0 {
                continue;
            }
            let len = number::take(bytes)?;
            let (description, rest) = bytes.split_at_checked(usize::try_from(len).ok()?)?;
            *bytes = rest;
            // Huffman tables are never predefined.
            if len > LONGEST_TABLE || len == 0 && n == 0 {
                return None;
            }
            *table = Some(description.into());
        }
        Some(Self {
            descriptor,
            checksum: flags & 1 != 0,
            repeats,
            tables,
        })
    }

    /// A frame's header, behind which the blob's bytes follow from the block on.
    pub(super) fn frame_header(&self) -> [u8; 6] {
        let [a, b, c, d] = magic::ZSTD;
        [a, b, c, d, 0, self.descriptor]
    }

    /// The dictionary for a decoder whose history is the last `len` bytes before the block, of which `piece` has those that matter.
    pub(super) fn dictionary(&self, piece: &[u8], len: u32) -> Result<Vec<u8>, LayerError> {
        let mut out = Vec::new();
        out.extend_from_slice(&DICTIONARY);
        out.extend_from_slice(&ANY_NUMBER);
        let [huffman, others @ ..] = &self.tables;
        out.extend_from_slice(huffman.as_deref().unwrap_or(&ANY_HUFFMAN));
        for (kind, table) in KINDS.into_iter().zip(others) {
            let described = table.as_deref().filter(|table| !table.is_empty());
            out.extend_from_slice(described.unwrap_or_else(|| kind.predefined_description()));
        }
        for repeat in self.repeats {
            out.extend_from_slice(&repeat.to_le_bytes());
        }
        // The content has to be as long as any last offset, used or not; and nothing at all is no content.
        let furthest = self.repeats.iter().fold(len.max(8), |most, repeat| most.max(*repeat));
        let begin = out.len() + to_usize(furthest - len);
        out.resize(begin + to_usize(len), 0);
        lay_out(piece, &mut out[begin..]).ok_or(LayerError::Table("a window is not what its span needs"))?;
        Ok(out)
    }
}

/// Writes the extents of a piece to where they lie in a window that is filled with zeros. The piece must fit.
fn lay_out(mut piece: &[u8], window: &mut [u8]) -> Option<()> {
    if piece.is_empty() {
        return window.is_empty().then_some(());
    }
    let count = usize::try_from(number::take(&mut piece)?).ok()?;
    // Each takes two bytes at least.
    if count > piece.len() / 2 {
        return None;
    }
    let (mut extents, mut at) = (Vec::with_capacity(count), 0_usize);
    for _ in 0..count {
        at = at.checked_add(usize::try_from(number::take(&mut piece)?).ok()?)?;
        let len = usize::try_from(number::take(&mut piece)?).ok()?;
        extents.push((at, len));
        at = at.checked_add(len)?;
    }
    for (at, len) in extents {
        let (bytes, rest) = piece.split_at_checked(len)?;
        window.get_mut(at..)?.get_mut(..len)?.copy_from_slice(bytes);
        piece = rest;
    }
    piece.is_empty().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_smallest_that_do() {
        assert_eq!(
            (window_of(0), window_of(7), window_of(8)),
            (1 << 10, (1 << 10) + 7 * 128, 1 << 11)
        );
        for window in [0, 1, 1024, 1025, 1152, 1153, 8 << 20, (8 << 20) + 1, MAX_REACH] {
            let byte = descriptor_of(window);
            assert!(window_of(byte) >= window, "{window}");
            assert!(byte == 0 || window_of(byte - 1) < window, "{window}");
        }
    }

    #[test]
    fn entries_come_back_and_lies_do_not() {
        let entry = BlockEntry {
            descriptor: 0x58,
            checksum: true,
            repeats: [1, 300, 2 << 20],
            tables: [
                Some(b"\x80\x10"[..].into()),
                None,
                Some(b""[..].into()),
                Some(b"abc"[..].into()),
            ],
        };
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!(BlockEntry::decode(&mut &bytes[..]).as_ref(), Some(&entry));
        for cut in 0..bytes.len() {
            assert_eq!(BlockEntry::decode(&mut &bytes[..cut]), None, "{cut}");
        }
        for (at, byte) in [(0, 0xff), (1, 0x20), (2, 0)] {
            let mut wrong = bytes.clone();
            wrong[at] = byte;
            assert_eq!(BlockEntry::decode(&mut &wrong[..]), None, "byte {at}");
        }
    }

    #[test]
    fn pieces_are_laid_out_exactly_or_not_at_all() {
        let piece = b"\x02\x00\x03\x02\x01abcd";
        let mut window = [0; 6];
        assert_eq!(lay_out(piece, &mut window), Some(()));
        assert_eq!(&window, b"abc\0\0d");
        assert_eq!(lay_out(piece, &mut [0; 5]), None, "it reaches behind the window");
        for cut in 0..piece.len() {
            assert_eq!(lay_out(&piece[..cut], &mut [0; 6]), None, "{cut}");
        }
        assert_eq!(lay_out(b"\x01\x00\x01ab", &mut [0; 6]), None, "something follows");
        assert_eq!(lay_out(&[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0], &mut [0; 6]), None);
        assert_eq!(lay_out(b"", &mut []), Some(()));
    }
}
