//! The blocks of a zstd frame (RFC 8878, section 3.1.1.2), without what they decode to. In: a frame's bytes behind its header, in pieces
//! of any size. Out: what a decoder holds at the beginning of each block, and which bytes before a block its matches copy.
//!
//! Literals are not decoded: lengths and offsets of matches are in a bit stream of their own, and that is a tenth of the work.
//! libzstd decodes the same blocks beside this, and is the one that says whether they are right: what this reader does not
//! understand it gives up, without an error. It never panics, and keeps one block of at most 128 KiB.

use std::sync::Arc;

use super::fse::{Counts, Fse, Kind};
use crate::units::{len_u64, to_usize};

/// The most that a block decodes to, in bytes.
pub(super) const MOST_IN_BLOCK: u64 = 128 << 10;
/// A block's header.
const HEADER: usize = 3;
/// What a word is read from reaches so far behind the stream, in bytes.
const PADDING: usize = 8;
/// The repeated offsets at a frame's beginning.
const FIRST_REPEATS: [u32; 3] = [1, 4, 8];

/// The number of tables that a decoder holds: of Huffman codes for literals; of offsets, of matches' and of literals' lengths. In
/// the order of dictionaries.
pub(super) const TABLES: usize = 4;
/// The place of the Huffman table among them; the others follow in the order of [`Kind`].
const HUFFMAN: usize = 0;

const fn place(kind: Kind) -> usize {
    match kind {
        Kind::Offsets => 1,
        Kind::Matches => 2,
        Kind::Literals => 3,
    }
}

/// A table that a decoder holds, for who has to give it to another decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Table {
    /// None has come.
    #[default]
    Missing,
    /// The one that the format predefines.
    Predefined,
    /// One symbol that takes no bits. No description says that.
    Single,
    /// As the blob describes it.
    Described(Arc<[u8]>),
}

/// What a decoder holds between two blocks, besides what came out last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DecoderState {
    /// The last offsets.
    pub(super) repeats: [u32; 3],
    pub(super) tables: [Table; TABLES],
}

/// What a block does with a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing: it has no literals or sequences that take one.
    #[default]
    None,
    /// It brings its own, and what came before is of no use any more.
    Replaces,
    /// It takes the one that is there.
    Repeats,
}

/// Takes what a frame's blocks say, in their order.
pub(super) trait BlockSink {
    /// A block begins at byte `tar` of what comes out of the frame and at byte `blob` of the blob, with the decoder in this state.
    fn begin(&mut self, tar: u64, blob: u64, state: &DecoderState);

    /// The block copies `len` bytes from byte `source` of what comes out of the frame, which lies before the block, to `at`.
    fn copy(&mut self, at: u64, source: u64, len: u64);

    /// The block ends at byte `tar` of what comes out, having used its tables so.
    fn end(&mut self, tar: u64, uses: [Use; TABLES]);
}

/// Reads the blocks of one frame.
#[derive(Debug)]
pub(super) struct BlockReader {
    /// The block that is being gathered, with its header.
    held: Vec<u8>,
    /// How many bytes it takes to go on.
    wanted: usize,
    stage: Stage,
    /// Where the block begins in the blob.
    blob: u64,
    /// How much has come out of the frame before it.
    tar: u64,
    /// How far back the frame may refer, in bytes.
    window: u64,
    state: DecoderState,
    /// Offsets, matches, literals.
    tables: [Fse; 3],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// At a block's header.
    Header,
    /// In a block that is not gathered: so many bytes are left of it.
    Passing(usize),
    /// In a compressed block.
    Compressed,
    /// Behind the last block.
    Ended,
    /// It met something that it does not understand.
    Lost,
}

/// The header of a block.
#[derive(Clone, Copy, Debug)]
struct BlockHeader {
    last: bool,
    kind: u8,
    /// Of the block's content, or for a run of one byte how often it comes.
    size: usize,
}

impl BlockHeader {
    fn read(bytes: &[u8]) -> Option<Self> {
        let [a, b, c] = *bytes.first_chunk::<HEADER>()?;
        let bits = u32::from_le_bytes([a, b, c, 0]);
        Some(Self {
            last: bits & 1 == 1,
            kind: a >> 1 & 3,
            size: to_usize(bits >> 3),
        })
    }
}

impl BlockReader {
    /// At a frame's first block, which is at byte `blob` of the blob. The frame may refer `window` bytes back.
    pub(super) fn new(blob: u64, window: u64) -> Self {
        Self {
            held: Vec::new(),
            wanted: HEADER,
            stage: Stage::Header,
            blob,
            tar: 0,
            window,
            state: DecoderState {
                repeats: FIRST_REPEATS,
                tables: Default::default(),
            },
            tables: [Fse::empty(), Fse::empty(), Fse::empty()],
        }
    }

    /// How many bytes come out of the frame, once all of its blocks have passed; nothing if it did not understand one.
    pub(super) fn decoded(&self) -> Option<u64> {
        (self.stage == Stage::Ended).then_some(self.tar)
    }

    /// Whether it has given up.
    pub(super) fn is_lost(&self) -> bool {
        self.stage == Stage::Lost
    }

    /// Takes the frame's next bytes up to the end of a block, and returns what follows that; nothing when no block ends in them.
    /// What follows the last block is passed over.
    pub(super) fn feed<'a>(&mut self, mut input: &'a [u8], sink: &mut impl BlockSink) -> Option<&'a [u8]> {
        loop {
            match self.stage {
                Stage::Ended | Stage::Lost => return None,
                Stage::Passing(left) => {
                    let passed = left.min(input.len());
                    input = &input[passed..];
                    if passed < left {
                        self.stage = Stage::Passing(left - passed);
                        return None;
                    }
                    self.finish_block(sink, 0, [Use::None; TABLES]);
                    return Some(input);
                }
                Stage::Header | Stage::Compressed => {
                    let taken = (self.wanted - self.held.len()).min(input.len());
                    self.held.extend_from_slice(&input[..taken]);
                    input = &input[taken..];
                    if self.held.len() < self.wanted {
                        return None;
                    }
                    let in_block = self.stage == Stage::Compressed;
                    if self.step(sink).is_none() {
                        self.stage = Stage::Lost;
                        return None;
                    }
                    if in_block {
                        return Some(input);
                    }
                }
            }
        }
    }

    /// Deals with what has been gathered.
    fn step(&mut self, sink: &mut impl BlockSink) -> Option<()> {
        let header = BlockHeader::read(&self.held)?;
        if self.stage == Stage::Header {
            sink.begin(self.tar, self.blob, &self.state);
            let most = MOST_IN_BLOCK.min(self.window.max(1 << 10));
            let size = len_u64(header.size);
            if size > most {
                return None;
            }
            match header.kind {
                0 => self.stage = Stage::Passing(header.size),
                1 => self.stage = Stage::Passing(1),
                2 => {
                    self.wanted = HEADER + header.size;
                    self.stage = Stage::Compressed;
                }
                _ => return None,
            }
            return Some(());
        }
        let mut held = std::mem::take(&mut self.held);
        let end = held.len();
        held.resize(end + PADDING, 0);
        let decoded = self.compressed(&held, HEADER..end, sink);
        held.truncate(end);
        self.held = held;
        let (decoded, uses) = decoded?;
        self.finish_block(sink, decoded, uses);
        Some(())
    }

    /// A block has passed. `decoded` bytes come out of it, if it is a compressed one.
    fn finish_block(&mut self, sink: &mut impl BlockSink, decoded: u64, uses: [Use; TABLES]) {
        let Some(header) = BlockHeader::read(&self.held) else {
            return;
        };
        let (decoded, stored) = match header.kind {
            0 => (len_u64(header.size), len_u64(header.size)),
            1 => (len_u64(header.size), 1),
            _ => (decoded, len_u64(header.size)),
        };
        self.tar += decoded;
        self.blob += len_u64(HEADER) + stored;
        sink.end(self.tar, uses);
        self.held.clear();
        self.wanted = HEADER;
        self.stage = if header.last { Stage::Ended } else { Stage::Header };
    }

    /// Reads a compressed block, `range` of `held`, behind which there are at least eight bytes. Returns how many bytes come out
    /// of it.
    fn compressed(
        &mut self,
        held: &[u8],
        range: std::ops::Range<usize>,
        sink: &mut impl BlockSink,
    ) -> Option<(u64, [Use; TABLES])> {
        let mut uses = [Use::None; TABLES];
        let (literals, mut at) = self.literals(held.get(range.clone())?, &mut uses[HUFFMAN])?;
        at += range.start;
        let block = held.get(..range.end)?;
        let count = match *block.get(at)? {
            few @ 0..128 => {
                at += 1;
                usize::from(few)
            }
            some @ 128..255 => {
                at += 2;
                (usize::from(some) - 128) << 8 | usize::from(*block.get(at - 1)?)
            }
            255 => {
                at += 3;
                usize::from(*block.get(at - 2)?) + (usize::from(*block.get(at - 1)?) << 8) + 0x7f00
            }
        };
        let most = MOST_IN_BLOCK.min(self.window.max(1 << 10));
        if count == 0 {
            return (literals <= most).then_some((literals, uses));
        }
        let modes = *block.get(at)?;
        at += 1;
        for (kind, shift) in [(Kind::Literals, 6), (Kind::Offsets, 4), (Kind::Matches, 2)] {
            let mode = modes >> shift & 3;
            let (described, how) = self.table(kind, mode, block.get(at..)?)?;
            at += described;
            uses[place(kind)] = how;
        }
        let decoded = self.sequences(held.get(at..)?, range.end.checked_sub(at)?, (count, literals), sink)?;
        (decoded <= most).then_some((decoded, uses))
    }

    /// Reads the section of literals at a block's beginning: how many there are, and where what follows it begins.
    fn literals(&mut self, block: &[u8], huffman: &mut Use) -> Option<(u64, usize)> {
        let first = *block.first()?;
        let format = first >> 2 & 3;
        let word = {
            let mut word = [0; 8];
            let len = block.len().min(5);
            word[..len].copy_from_slice(&block[..len]);
            u64::from_le_bytes(word)
        };
        if first & 2 == 0 {
            // As they are, or one that repeats.
            let (header, count) = match format {
                0 | 2 => (1, word >> 3 & 0x1f),
                1 => (2, word >> 4 & 0xfff),
                _ => (3, word >> 4 & 0xf_ffff),
            };
            let stored = if first & 1 == 0 {
                usize::try_from(count).ok()?
            } else {
                1
            };
            return Some((count, header + stored));
        }
        let (header, bits) = match format {
            0 | 1 => (3, 10),
            2 => (4, 14),
            _ => (5, 18),
        };
        let mask = (1 << bits) - 1;
        let count = word >> 4 & mask;
        let stored = usize::try_from(word >> (4 + bits) & mask).ok()?;
        let content = block.get(header..)?.get(..stored)?;
        if first & 1 == 0 {
            // The tree comes first.
            let described = match *content.first()? {
                compressed @ 0..128 => usize::from(compressed) + 1,
                direct => usize::from(direct - 127).div_ceil(2) + 1,
            };
            self.state.tables[HUFFMAN] = Table::Described(content.get(..described)?.into());
            *huffman = Use::Replaces;
        } else {
            if self.state.tables[HUFFMAN] == Table::Missing {
                return None;
            }
            *huffman = Use::Repeats;
        }
        Some((count, header + stored))
    }

    /// Reads the description of a table at the beginning of `bytes`, if the mode has one. Returns how long it is.
    fn table(&mut self, kind: Kind, mode: u8, bytes: &[u8]) -> Option<(usize, Use)> {
        let held = &mut self.state.tables[place(kind)];
        let table = &mut self.tables[place(kind) - 1];
        let used = match mode {
            0 => {
                if *held != Table::Predefined {
                    let predefined = kind.predefined();
                    table.log = predefined.log;
                    table.cells.copy_from_slice(&*predefined.cells);
                    *held = Table::Predefined;
                }
                0
            }
            1 => {
                table.single(kind, *bytes.first()?)?;
                *held = Table::Single;
                1
            }
            2 => {
                let (counts, used) = Counts::read(kind, bytes)?;
                table.fill(kind, &counts)?;
                *held = Table::Described(bytes.get(..used)?.into());
                used
            }
            _ => return (*held != Table::Missing).then_some((0, Use::Repeats)),
        };
        Some((used, Use::Replaces))
    }

    /// Reads `count` sequences from the bit stream that is the first `len` bytes of `bytes`, in a block with so many literals. Returns
    /// how many bytes come out of the block.
    fn sequences(
        &mut self,
        bytes: &[u8],
        len: usize,
        (count, mut literals): (usize, u64),
        sink: &mut impl BlockSink,
    ) -> Option<u64> {
        let mut bits = Bits::open(bytes, len)?;
        let [offsets, matches, lengths] = &self.tables;
        let mut literals_state = bits.take(lengths.log)?;
        let mut offsets_state = bits.take(offsets.log)?;
        let mut matches_state = bits.take(matches.log)?;
        let mut repeats = self.state.repeats.map(u64::from);
        let begin = self.tar;
        let mut at = begin;
        for left in (0..count).rev() {
            let offset_cell = offsets.cell(offsets_state);
            let match_cell = matches.cell(matches_state);
            let literal_cell = lengths.cell(literals_state);
            let value = u64::from(offset_cell.base) + bits.take(offset_cell.extra)?;
            let both = bits.take(match_cell.extra + literal_cell.extra)?;
            let match_len = u64::from(match_cell.base) + (both >> literal_cell.extra);
            let literals_len = u64::from(literal_cell.base) + (both & mask(literal_cell.extra));
            if left > 0 {
                let all = bits.take(literal_cell.bits + match_cell.bits + offset_cell.bits)?;
                literals_state = u64::from(literal_cell.next) + (all >> (match_cell.bits + offset_cell.bits));
                matches_state = u64::from(match_cell.next) + ((all >> offset_cell.bits) & mask(match_cell.bits));
                offsets_state = u64::from(offset_cell.next) + (all & mask(offset_cell.bits));
            }
            let distance = repeat(&mut repeats, value, literals_len == 0);
            literals = literals.checked_sub(literals_len)?;
            at += literals_len;
            let source = at.checked_sub(distance)?;
            if source < begin {
                if distance > self.window {
                    return None;
                }
                sink.copy(at, source, match_len);
            } else if distance == 0 {
                return None;
            }
            at += match_len;
        }
        if bits.left > 0 {
            return None;
        }
        for (held, repeat) in self.state.repeats.iter_mut().zip(repeats) {
            *held = u32::try_from(repeat).ok()?;
        }
        Some(at + literals - begin)
    }
}

/// The distance that an offset's value stands for, after which the last offsets are others (section 3.1.1.5).
fn repeat(repeats: &mut [u64; 3], value: u64, no_literals: bool) -> u64 {
    let [first, second, third] = *repeats;
    let (distance, others) = match (value, no_literals) {
        (1, false) => return first,
        (2, false) | (1, true) => (second, [first, third]),
        (3, false) | (2, true) => (third, [first, second]),
        (3, true) => (first.saturating_sub(1), [first, second]),
        _ => (value - 3, [first, second]),
    };
    *repeats = [distance, others[0], others[1]];
    distance
}

const fn mask(bits: u8) -> u64 {
    (1 << bits) - 1
}

impl Fse {
    fn cell(&self, state: u64) -> super::fse::Cell {
        let [low, high, ..] = state.to_le_bytes();
        self.cells[usize::from(u16::from_le_bytes([low, high])) % super::fse::MOST_CELLS]
    }
}

/// A bit stream that is read from its end.
struct Bits<'a> {
    /// The stream and at least eight bytes behind it.
    bytes: &'a [u8],
    /// How many bits have not been read.
    left: usize,
}

impl<'a> Bits<'a> {
    /// The stream that is the first `len` bytes.
    fn open(bytes: &'a [u8], len: usize) -> Option<Self> {
        // The highest bit that is set ends the stream.
        let last = bytes.get(len.checked_sub(1)?)?;
        let left = (len - 1) * 8 + to_usize(last.checked_ilog2()?);
        Some(Self { bytes, left })
    }

    /// The next `count` bits, at most 56.
    #[inline]
    fn take(&mut self, count: u8) -> Option<u64> {
        self.left = self.left.checked_sub(usize::from(count))?;
        let word = self.bytes.get(self.left / 8..)?.first_chunk()?;
        Some((u64::from_le_bytes(*word) >> (self.left % 8)) & mask(count))
    }
}
