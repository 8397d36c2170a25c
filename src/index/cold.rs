//! The cold part of an index: what few readers need, in pieces that are fetched by range. In: the hot part's directory of
//! them, and a piece's bytes from anywhere. Out: the piece's content, only if it is what the hot part says.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use super::digests::{Short, short};
use super::error::{IndexError, IndexFault};
use super::format::{self, Fields, SectionRecord, SectionTable};
use super::len_u64;
use super::varint::{self, Cursor};
use crate::checksum;
use crate::layer::Coding;

/// The parts of the cold part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColdPart {
    /// Decoder windows: the piece of each span of the span table, empty where it needs none.
    Windows,
    /// SHA-256 of the stored bytes of every file that has some, in the order of the entries.
    PayloadDigests,
    /// Everything of the tar that is no file's stored bytes.
    Headers,
    /// The extents of decoder windows that matter at blocks of zstd frames: the piece of each span of the span table, empty where it
    /// needs none.
    BlockWindows,
    /// Length and short digest of every content-defined piece of the stored bytes of every file that has more than 1 MiB, in the
    /// order of the entries.
    ContentPieces,
}

/// How many parts there are.
pub(super) const PARTS: usize = 5;

impl ColdPart {
    pub(super) const ALL: [Self; PARTS] = [
        Self::Windows,
        Self::PayloadDigests,
        Self::Headers,
        Self::BlockWindows,
        Self::ContentPieces,
    ];

    /// The part that has the decoder windows of a layer that is compressed so.
    #[must_use]
    pub const fn windows_of(coding: Coding) -> Self {
        match coding {
            Coding::Plain | Coding::Gzip => Self::Windows,
            Coding::Zstd => Self::BlockWindows,
        }
    }

    pub(super) fn kind(self) -> u32 {
        match self {
            Self::Windows => format::WINDOWS,
            Self::PayloadDigests => format::PAYLOAD_DIGESTS,
            Self::Headers => format::HEADERS,
            Self::BlockWindows => format::BLOCK_WINDOWS,
            Self::ContentPieces => format::CONTENT_PIECES,
        }
    }

    /// Its place among the parts.
    pub(super) fn slot(self) -> usize {
        match self {
            Self::Windows => 0,
            Self::PayloadDigests => 1,
            Self::Headers => 2,
            Self::BlockWindows => 3,
            Self::ContentPieces => 4,
        }
    }

    fn encoding(self) -> u16 {
        match self {
            Self::Windows | Self::Headers | Self::BlockWindows => format::ZSTD_PIECES,
            Self::PayloadDigests | Self::ContentPieces => format::RAW,
        }
    }
}

/// Where a piece lies, and how to tell that it is the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColdPiece {
    /// Its bytes in the index file; may be none.
    pub range: Range<u64>,
    /// CRC-32C of those bytes, for who only wants to notice damage.
    pub crc: u32,
    part: ColdPart,
    digest: Short,
}

impl ColdPiece {
    /// Checks the bytes of [`range`](Self::range) and decodes them: at most 1 MiB.
    ///
    /// # Errors
    /// [`IndexError::Index`] when they are other bytes than the hot part vouches for.
    pub fn open(&self, stored: &[u8]) -> Result<Vec<u8>, IndexError> {
        let name = format::section_name(self.part.kind());
        if len_u64(stored.len()) != self.range.end - self.range.start {
            return Err(IndexFault::Truncated.into());
        }
        if stored.is_empty() {
            return Ok(Vec::new());
        }
        if checksum::crc32c(stored) != self.crc || short(stored) != self.digest {
            return Err(IndexFault::Checksum(name).into());
        }
        if self.part.encoding() == format::RAW {
            return Ok(stored.to_vec());
        }
        Ok(decompress(stored, len_u64(format::PIECE)).ok_or(IndexFault::Malformed(name))?)
    }
}

/// Decodes one zstd frame, and nothing behind it, of at most `most` bytes. Memory grows with what really comes.
pub(super) fn decompress(frame: &[u8], most: u64) -> Option<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).ok()?.single_frame();
    decoder.window_log_max(format::WINDOW_LOG).ok()?;
    let mut out = Vec::new();
    (&mut decoder).take(most.saturating_add(1)).read_to_end(&mut out).ok()?;
    let whole = len_u64(out.len()) <= most && decoder.finish().is_empty();
    whole.then_some(out)
}

/// One piece of a cold section as the index file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StoredPiece {
    /// Its end in the index file, in bytes.
    end: u64,
    crc: u32,
    digest: Short,
}

/// All pieces of one cold section, which lie back to back.
#[derive(Debug, Default, PartialEq, Eq)]
struct StoredPieces {
    /// The first one's beginning in the index file, in bytes.
    start: u64,
    each: Vec<StoredPiece>,
    /// The bytes of all when decoded.
    decoded: u64,
}

/// What lies in an index's cold part, and where. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColdDirectory {
    parts: Arc<[Option<StoredPieces>; PARTS]>,
}

impl ColdDirectory {
    /// Whether the file has this part.
    #[must_use]
    pub fn has(&self, part: ColdPart) -> bool {
        self.of(part).is_some()
    }

    /// How many pieces a part has: of windows one for each span.
    #[must_use]
    pub fn pieces(&self, part: ColdPart) -> usize {
        self.of(part).map_or(0, |pieces| pieces.each.len())
    }

    /// How many bytes a part has when decoded.
    #[must_use]
    pub fn decoded_len(&self, part: ColdPart) -> u64 {
        self.of(part).map_or(0, |pieces| pieces.decoded)
    }

    /// Where a part lies in the file, all of it.
    #[must_use]
    pub fn range(&self, part: ColdPart) -> Option<Range<u64>> {
        let pieces = self.of(part)?;
        Some(pieces.start..pieces.each.last().map_or(pieces.start, |last| last.end))
    }

    /// A piece of a part. Of [`ColdPart::Windows`] the one of span number `number`.
    #[must_use]
    pub fn piece(&self, part: ColdPart, number: usize) -> Option<ColdPiece> {
        let pieces = self.of(part)?;
        let piece = pieces.each.get(number)?;
        let start = match number.checked_sub(1) {
            None => pieces.start,
            Some(before) => pieces.each.get(before)?.end,
        };
        Some(ColdPiece {
            range: start..piece.end,
            crc: piece.crc,
            part,
            digest: piece.digest,
        })
    }

    fn of(&self, part: ColdPart) -> Option<&StoredPieces> {
        self.parts.get(part.slot()).and_then(Option::as_ref)
    }

    /// Reads the section. What it says must fit the section table.
    pub(super) fn decode(section: &[u8], table: &SectionTable) -> Result<Self, IndexFault> {
        let fault = IndexFault::Malformed("cold directory");
        let mut cursor = Cursor::new(section);
        let mut parts = [const { None }; PARTS];
        for _ in 0..cursor.number().map_err(|_| fault)? {
            let kind = cursor.number().map_err(|_| fault)?;
            let (lens, checks) = read_lens(&mut cursor).ok_or(fault)?;
            // Kinds that a later version may have are passed over.
            let Some(part) = ColdPart::ALL.into_iter().find(|part| u64::from(part.kind()) == kind) else {
                continue;
            };
            let record = table.records.iter().find(|record| record.kind == part.kind());
            let record = record.filter(|record| record.flags & format::COLD != 0 && record.encoding == part.encoding());
            let record = record.ok_or(fault)?;
            let placed = place(&lens, checks, record).ok_or(fault)?;
            if parts[part.slot()].replace(placed).is_some() {
                return Err(fault);
            }
        }
        if cursor.remaining() > 0 {
            return Err(fault);
        }
        Ok(Self { parts: Arc::new(parts) })
    }
}

/// The lengths of a part's pieces, and the checks (CRC and digest) of those that are not empty.
fn read_lens<'a>(cursor: &mut Cursor<'a>) -> Option<(Vec<u64>, &'a [u8])> {
    let mut lens = Vec::new();
    // Each takes a byte at least, so what is announced is not believed further than there are bytes.
    for _ in 0..cursor.number().ok()? {
        lens.push(cursor.number().ok()?);
    }
    let filled = lens.iter().filter(|len| **len > 0).count();
    let checks = cursor.bytes(len_u64(filled.checked_mul(4 + format::DIGEST)?)).ok()?;
    Some((lens, checks))
}

fn place(lens: &[u64], checks: &[u8], record: &SectionRecord) -> Option<StoredPieces> {
    let mut checks = Fields(checks);
    let mut end = record.offset;
    let mut pieces = Vec::with_capacity(lens.len());
    for len in lens {
        end = end.checked_add(*len)?;
        let (crc, digest) = if *len == 0 {
            (0, [0; format::DIGEST])
        } else {
            (checks.u32().ok()?, *checks.array().ok()?)
        };
        pieces.push(StoredPiece { end, crc, digest });
    }
    (end == record.offset.checked_add(record.stored)?).then_some(StoredPieces {
        start: record.offset,
        each: pieces,
        decoded: record.decoded,
    })
}

/// How hard zstd tries for pieces.
const LEVEL: i32 = 3;

/// A part that is being made: its pieces one behind the other, encoded.
#[derive(Debug)]
pub(super) struct Packed {
    part: ColdPart,
    stored: Vec<u8>,
    lens: Vec<u64>,
    /// CRC and digest of each piece that is not empty.
    checks: Vec<u8>,
    decoded: u64,
}

impl Packed {
    pub(super) fn new(part: ColdPart) -> Self {
        Self {
            part,
            stored: Vec::new(),
            lens: Vec::new(),
            checks: Vec::new(),
            decoded: 0,
        }
    }

    pub(super) fn part(&self) -> ColdPart {
        self.part
    }

    /// How many bytes it takes in the file, so far.
    pub(super) fn stored_len(&self) -> usize {
        self.stored.len()
    }

    /// Adds a piece; an empty one takes no room.
    pub(super) fn push(&mut self, piece: &[u8]) {
        let before = self.stored.len();
        if piece.is_empty() {
            self.lens.push(0);
            return;
        }
        if self.part.encoding() == format::RAW {
            self.stored.extend_from_slice(piece);
        } else {
            let frame = zstd::bulk::compress(piece, LEVEL).expect("memory for compression");
            self.stored.extend_from_slice(&frame);
        }
        let stored = &self.stored[before..];
        self.lens.push(len_u64(stored.len()));
        self.checks.extend_from_slice(&checksum::crc32c(stored).to_le_bytes());
        self.checks.extend_from_slice(&short(stored));
        self.decoded += len_u64(piece.len());
    }

    /// Its entry in the directory.
    pub(super) fn describe(&self, out: &mut Vec<u8>) {
        varint::put(out, u64::from(self.part.kind()));
        varint::put(out, len_u64(self.lens.len()));
        for len in &self.lens {
            varint::put(out, *len);
        }
        out.extend_from_slice(&self.checks);
    }

    /// Its section.
    pub(super) fn section(self) -> (SectionRecord, Vec<u8>) {
        let record = SectionRecord {
            kind: self.part.kind(),
            flags: format::COLD,
            encoding: self.part.encoding(),
            decoded: self.decoded,
            ..SectionRecord::default()
        };
        (record, self.stored)
    }
}

/// Packs a stream into pieces of equal length, the last one shorter.
#[derive(Debug)]
pub(super) struct Packer {
    packed: Packed,
    piece: Vec<u8>,
    len: usize,
}

impl Packer {
    pub(super) fn new(part: ColdPart, len: usize) -> Self {
        Self {
            packed: Packed::new(part),
            piece: Vec::new(),
            len,
        }
    }

    /// How many bytes it takes in the file, so far.
    pub(super) fn stored_len(&self) -> usize {
        self.packed.stored_len()
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at((self.len - self.piece.len()).min(bytes.len()));
            self.piece.extend_from_slice(head);
            bytes = rest;
            if self.piece.len() == self.len {
                self.packed.push(&self.piece);
                self.piece.clear();
            }
        }
    }

    pub(super) fn finish(mut self) -> Packed {
        if !self.piece.is_empty() {
            self.packed.push(&self.piece);
        }
        self.packed
    }
}
