//! Which blocks of a zstd frame decoding can begin at, and what it takes. In: the blocks of a frame as [`BlockReader`](super::blocks)
//! reads them, and what comes out of it. Out: the entries, about as far apart as was asked for, each with the bytes before it that
//! the blocks up to the next entry copy.
//!
//! What an entry costs is its window, and that differs by a hundred: at most blocks something reaches far back, at some, where one kind
//! of content ends and another begins, hardly anything does. So among the blocks between a half and one and a half of the
//! spacing behind the last entry, that one is taken which the fewest bytes are copied across within half the spacing.
//! This follows from the frame and the spacing alone, whatever the pieces that the blob comes in.
//!
//! It must never keep more than the frame's window, twice the spacing and the matches within that, whatever the frame holds.

use std::collections::VecDeque;
use std::ops::Range;

use super::blocks::{BlockReader, BlockSink, DecoderState, MOST_IN_BLOCK, TABLES, Table, Use};
use super::entry::{BlockEntry, MAX_REACH, descriptor_of};
use crate::layer::number;
use crate::units::{len_u64, to_usize};

/// The closest that entries are aimed at, in bytes of the tar: a block is at most half as long.
const CLOSEST: u64 = 2 * MOST_IN_BLOCK;
/// The furthest, likewise: beyond it no block is entered, because twice the spacing is kept in memory.
const FURTHEST: u64 = 64 << 20;
/// No piece of a window is longer: what needs more is no entry.
const LONGEST_PIECE: usize = 1 << 20;
/// Extents of a window with no more bytes between them are one.
const CLOSED_GAP: u64 = 4;
/// How far what libzstd has given out may be behind the blocks that have been read, in bytes.
const LAG: u64 = 1 << 20;
/// All pieces together are at most so small a part of the blob, before they are compressed: where they would be more, blocks are
/// not entered.
const MOST_OF_BLOB: u64 = 3;

/// What a frame's header says that matters to who enters it.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::layer) struct FrameFacts {
    /// How far back it may refer, in bytes.
    pub(in crate::layer) window: u64,
    /// Whether a checksum follows its last block.
    pub(in crate::layer) checksum: bool,
    /// How much comes out of it, if it says so.
    pub(in crate::layer) content: Option<u64>,
}

/// A block at which a span begins.
#[derive(Debug)]
pub(in crate::layer) struct FoundBlock {
    /// Its first byte in the tar.
    pub(in crate::layer) tar: u64,
    /// Its header in the blob.
    pub(in crate::layer) blob: u64,
    /// What it takes to begin there, unless that is too much.
    pub(in crate::layer) entry: Option<BlockEntry>,
    /// How far back its window reaches.
    pub(in crate::layer) window: u32,
    /// The extents of that which are needed, as they are kept.
    pub(in crate::layer) piece: Vec<u8>,
}

/// Finds the blocks that decoding can begin at.
#[derive(Debug)]
pub(in crate::layer) struct BlockFinder {
    spacing: u64,
    /// The frame that is being read.
    frame: Option<Box<(BlockReader, FrameBlocks)>>,
    /// What came out last.
    history: History,
    found: VecDeque<FoundBlock>,
    /// How long all pieces are.
    pieces_total: u64,
}

impl BlockFinder {
    /// With entries about every `spacing` bytes of the tar; none if that is over [`FURTHEST`].
    pub(in crate::layer) fn new(spacing: u64) -> Self {
        Self {
            spacing: spacing.max(CLOSEST),
            frame: None,
            history: History::default(),
            found: VecDeque::new(),
            pieces_total: 0,
        }
    }

    /// A frame begins at byte `tar` of the tar; its first block is at byte `blob` of the blob.
    pub(in crate::layer) fn begin(&mut self, tar: u64, blob: u64, facts: FrameFacts) {
        let short = facts.content.is_some_and(|content| content < self.spacing);
        self.frame = None;
        if short || self.spacing > FURTHEST || facts.window > MAX_REACH {
            return;
        }
        self.history.restart(facts.window + 2 * self.spacing + LAG);
        self.frame = Some(Box::new((
            BlockReader::new(blob, facts.window),
            FrameBlocks::new(self.spacing, tar, facts),
        )));
    }

    /// Takes the blob's next bytes, which are of the frame.
    pub(in crate::layer) fn feed(&mut self, mut bytes: &[u8]) {
        let Some((reader, blocks)) = self.frame.as_deref_mut() else {
            return;
        };
        // After every block, so that what is chosen does not depend on the pieces in which they come.
        while let Some(rest) = reader.feed(bytes, blocks) {
            bytes = rest;
            while let Some(next) = blocks.next_entry() {
                self.found
                    .extend(blocks.settle(next, &self.history, &mut self.pieces_total));
                blocks.go_on_from(next);
            }
        }
    }

    /// Takes what came out of the frame.
    pub(in crate::layer) fn output(&mut self, bytes: &[u8]) {
        if self.frame.is_some() {
            self.history.push(bytes);
        }
    }

    /// The frame has ended, and all that came out of it has been given.
    pub(in crate::layer) fn end(&mut self) {
        let Some(frame) = self.frame.take() else {
            return;
        };
        let (reader, mut blocks) = *frame;
        if reader.decoded() != Some(self.history.written) {
            // Whatever this is, libzstd read it otherwise.
            debug_assert!(reader.is_lost(), "libzstd and the reader of blocks do not agree");
            blocks.is_lost = true;
        }
        while let Some(next) = blocks.last_entry() {
            self.found
                .extend(blocks.settle(next, &self.history, &mut self.pieces_total));
            blocks.go_on_from(next);
        }
        let all = blocks.notes.len();
        self.found
            .extend(blocks.settle(all, &self.history, &mut self.pieces_total));
    }

    /// The next block at which a span begins, if what it takes is known by now.
    pub(in crate::layer) fn take(&mut self) -> Option<FoundBlock> {
        self.found.pop_front()
    }
}

/// A frame's blocks from the last entry on.
#[derive(Debug)]
struct FrameBlocks {
    spacing: u64,
    /// Where the frame begins in the tar.
    tar: u64,
    facts: FrameFacts,
    /// Where each block begins, in bytes of what comes out of the frame...
    starts: Vec<u64>,
    /// ...and what else is known of it.
    notes: Vec<BlockNote>,
    /// Where the last block ends.
    end: u64,
    /// Of each table: the number of the first block of which it is not known whether it needs it.
    unsettled: [usize; TABLES],
    /// How many bytes are copied across the first block's beginning by blocks that had passed when it became the first.
    carried: u64,
    /// Whether the first block is the frame's, which is entered as a frame.
    at_frame: bool,
    /// Whether the span before cannot be entered.
    is_closed: bool,
    /// Whether the reader has given up.
    is_lost: bool,
}

/// What is known of a block.
#[derive(Debug)]
struct BlockNote {
    /// Its header in the blob.
    blob: u64,
    state: DecoderState,
    needs: [Need; TABLES],
    /// How many more bytes are copied across its beginning than across that of the block before, but for those that end there.
    more: u64,
    /// How many bytes that are counted here are not for the next block.
    less: u64,
    copies: Vec<Copied>,
}

/// Bytes before a block that it copies.
#[derive(Clone, Copy, Debug)]
struct Copied {
    /// How far before the block they begin.
    back: u32,
    len: u32,
}

/// Whether the blocks from one on need a table that came before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Need {
    #[default]
    Unknown,
    Yes,
    No,
}

impl BlockNote {
    /// Whether a dictionary can say what a decoder holds here.
    fn can_be_said(&self) -> bool {
        let mut both = self.needs.iter().zip(&self.state.tables);
        both.all(|(need, table)| *need == Need::No || *table != Table::Single)
    }
}

impl BlockSink for FrameBlocks {
    fn begin(&mut self, tar: u64, blob: u64, state: &DecoderState) {
        self.starts.push(tar);
        self.notes.push(BlockNote {
            blob,
            state: state.clone(),
            needs: [Need::Unknown; TABLES],
            more: 0,
            less: 0,
            copies: Vec::new(),
        });
    }

    #[inline]
    fn copy(&mut self, at: u64, source: u64, len: u64) {
        let Some((note, start)) = self.notes.last_mut().zip(self.starts.last()) else {
            return;
        };
        let (Ok(back), Ok(short)) = (u32::try_from(start - source), u32::try_from(len)) else {
            return;
        };
        note.copies.push(Copied { back, len: short });
        note.less += len;
        let horizon = source.max(at.saturating_sub(self.spacing / 2));
        let first = self.starts.partition_point(|start| *start <= horizon);
        if let Some(note) = self.notes.get_mut(first) {
            note.more += len;
        }
    }

    fn end(&mut self, tar: u64, uses: [Use; TABLES]) {
        self.end = tar;
        for ((n, used), unsettled) in uses.iter().enumerate().zip(&mut self.unsettled) {
            let need = match used {
                Use::None => continue,
                Use::Replaces => Need::No,
                Use::Repeats => Need::Yes,
            };
            for note in &mut self.notes[*unsettled..] {
                note.needs[n] = need;
            }
            *unsettled = self.notes.len();
        }
    }
}

impl FrameBlocks {
    fn new(spacing: u64, tar: u64, facts: FrameFacts) -> Self {
        Self {
            spacing,
            tar,
            facts,
            starts: Vec::new(),
            notes: Vec::new(),
            end: 0,
            unsettled: [0; TABLES],
            carried: 0,
            at_frame: true,
            is_closed: false,
            is_lost: false,
        }
    }

    /// Where the last entry lies.
    fn last(&self) -> u64 {
        self.starts.first().copied().unwrap_or(0)
    }

    /// The block of the next entry, once enough has passed to tell.
    fn next_entry(&self) -> Option<usize> {
        let until = self.last() + self.spacing * 3 / 2;
        if self.end < until + self.spacing / 2 {
            return None;
        }
        self.cheapest(until)
    }

    /// The block of the next entry, when all have passed.
    fn last_entry(&self) -> Option<usize> {
        let rest = self.end.saturating_sub(self.last());
        if self.is_lost || rest < self.spacing {
            return None;
        }
        let until = self.last() + self.spacing * 3 / 2;
        self.cheapest(until.min(self.end - self.spacing / 2 + 1))
    }

    /// Which block it costs the least to begin at, of those that begin half the spacing behind the last entry, and before `until`; the
    /// first of several. One that cannot be entered only if there is no other.
    fn cheapest(&self, until: u64) -> Option<usize> {
        let from = self.last() + self.spacing / 2;
        let mut cost = self.carried;
        let mut best: Option<(bool, u64, usize)> = None;
        for (n, (start, note)) in self.starts.iter().zip(&self.notes).enumerate() {
            cost += note.more;
            if n > 0 && (from..until).contains(start) {
                let offer = (!note.can_be_said(), cost, n);
                best = Some(best.map_or(offer, |best| best.min(offer)));
            }
            cost -= note.less;
        }
        best.map(|(_, _, n)| n)
    }

    /// What the first block takes to be entered, whose span ends where block number `next` begins. Nothing at a frame's beginning, or
    /// where the span before cannot be entered either.
    fn settle(&mut self, next: usize, history: &History, pieces_total: &mut u64) -> Option<FoundBlock> {
        let note = self.notes.first().filter(|_| !self.at_frame)?;
        let can_be_said = !self.is_lost && note.can_be_said();
        let within = |piece: &[u8]| (*pieces_total + len_u64(piece.len())) * MOST_OF_BLOB <= note.blob;
        let window = can_be_said.then(|| self.window(next, history)).flatten();
        let window = window.filter(|(_, piece)| within(piece));
        let found = FoundBlock {
            tar: self.tar + self.last(),
            blob: note.blob,
            entry: window.is_some().then(|| self.entry(note)),
            window: window.as_ref().map_or(0, |(window, _)| *window),
            piece: window.map(|(_, piece)| piece).unwrap_or_default(),
        };
        *pieces_total += len_u64(found.piece.len());
        // One that cannot be entered behind another is one long span.
        let was_closed = std::mem::replace(&mut self.is_closed, found.entry.is_none());
        (found.entry.is_some() || !was_closed).then_some(found)
    }

    fn entry(&self, note: &BlockNote) -> BlockEntry {
        let mut tables = [None, None, None, None];
        let both = note.needs.iter().zip(&note.state.tables);
        for (place, (need, table)) in tables.iter_mut().zip(both) {
            *place = match table {
                Table::Described(bytes) if *need != Need::No => Some(bytes.clone()),
                Table::Predefined if *need != Need::No => Some([].into()),
                _ => None,
            };
        }
        BlockEntry {
            descriptor: descriptor_of(self.facts.window),
            checksum: self.facts.checksum,
            repeats: note.state.repeats,
            tables,
        }
    }

    /// The bytes before the first block that the blocks before number `next` copy: how far back they reach, and the extents that
    /// are needed, as they are kept. Nothing if they are too many.
    fn window(&self, next: usize, history: &History) -> Option<(u32, Vec<u8>)> {
        let start = self.last();
        let reach = self.facts.window.min(start);
        let begin = start - reach;
        let mut marks = Marks::new(usize::try_from(reach).ok()?);
        for (at, note) in self.starts.iter().zip(&self.notes).take(next) {
            for copied in &note.copies {
                let source = at - u64::from(copied.back);
                if source < start {
                    let end = (source + u64::from(copied.len)).min(start);
                    marks.set(to_usize_saturating(source.checked_sub(begin)?)..to_usize_saturating(end - begin));
                }
            }
        }
        let mut extents: Vec<Range<u64>> = Vec::new();
        marks.runs(&mut |run| {
            let run = len_u64(run.start)..len_u64(run.end);
            match extents.last_mut() {
                Some(last) if run.start - last.end <= CLOSED_GAP => last.end = run.end,
                _ => extents.push(run),
            }
        });
        let Some(first) = extents.first().map(|extent| extent.start) else {
            return Some((0, Vec::new()));
        };
        let total: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
        let mut piece = Vec::new();
        number::put(&mut piece, len_u64(extents.len()));
        let mut at = first;
        for extent in &extents {
            number::put(&mut piece, extent.start - at);
            number::put(&mut piece, extent.end - extent.start);
            at = extent.end;
        }
        if len_u64(piece.len()) + total > len_u64(LONGEST_PIECE) {
            return None;
        }
        for extent in &extents {
            history.copy(begin + extent.start..begin + extent.end, &mut piece)?;
        }
        Some((u32::try_from(reach - first).ok()?, piece))
    }

    /// Forgets the blocks before number `next`, at which the next entry lies.
    fn go_on_from(&mut self, next: usize) {
        self.starts.drain(..next);
        for note in self.notes.drain(..next) {
            self.carried = self.carried + note.more - note.less;
        }
        for unsettled in &mut self.unsettled {
            *unsettled = unsettled.saturating_sub(next);
        }
        self.at_frame = false;
    }
}

/// Numbers within a window, which is 32 MiB at most.
fn to_usize_saturating(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Which bytes of a window are needed.
struct Marks(Vec<u64>);

impl Marks {
    fn new(len: usize) -> Self {
        Self(vec![0; len.div_ceil(64)])
    }

    fn set(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let (first, last) = (range.start / 64, (range.end - 1) / 64);
        let head = u64::MAX << (range.start % 64);
        let tail = u64::MAX >> (63 - (range.end - 1) % 64);
        let Some(words) = self.0.get_mut(first..=last) else {
            return;
        };
        match words {
            [] => {}
            [only] => *only |= head & tail,
            [begin, between @ .., end] => {
                *begin |= head;
                between.fill(u64::MAX);
                *end |= tail;
            }
        }
    }

    /// Shows each run of marks.
    fn runs(&self, show: &mut dyn FnMut(Range<usize>)) {
        let mut began = None;
        for (n, word) in self.0.iter().enumerate() {
            let all = if began.is_some() { u64::MAX } else { 0 };
            let mut at = 0;
            // Most words are all or nothing.
            if *word == all {
                continue;
            }
            while at < 64 {
                let rest = word >> at;
                match began {
                    None if rest == 0 => break,
                    None => {
                        at += to_usize(rest.trailing_zeros());
                        began = Some(n * 64 + at);
                    }
                    Some(start) => {
                        let ones = to_usize(rest.trailing_ones());
                        at += ones;
                        if at >= 64 {
                            break;
                        }
                        show(start..n * 64 + at);
                        began = None;
                    }
                }
            }
        }
        if let Some(start) = began {
            show(start..self.0.len() * 64);
        }
    }
}

/// What came out of a frame last.
#[derive(Debug, Default)]
struct History {
    bytes: Vec<u8>,
    /// How many bytes are kept.
    most: usize,
    /// How many came.
    written: u64,
}

impl History {
    fn restart(&mut self, most: u64) {
        self.bytes.clear();
        self.most = usize::try_from(most).unwrap_or(usize::MAX);
        self.written = 0;
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = to_usize_saturating(self.written % len_u64(self.most));
            let taken = (self.most - at).min(bytes.len());
            let (head, rest) = bytes.split_at(taken);
            if self.bytes.len() < self.most {
                // It comes round only when it is full.
                self.bytes.extend_from_slice(head);
            } else {
                self.bytes[at..at + taken].copy_from_slice(head);
            }
            self.written += len_u64(taken);
            bytes = rest;
        }
    }

    /// Appends these bytes of the frame, if all of them have come and are still here.
    fn copy(&self, range: Range<u64>, out: &mut Vec<u8>) -> Option<()> {
        if range.end > self.written || self.written - range.start > len_u64(self.most) {
            return None;
        }
        let mut at = range.start;
        while at < range.end {
            let place = to_usize_saturating(at % len_u64(self.most));
            let len = to_usize_saturating(range.end - at).min(self.most - place);
            out.extend_from_slice(self.bytes.get(place..place + len)?);
            at += len_u64(len);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_shown_as_runs() {
        let cases: [&[(usize, usize)]; 6] = [
            &[],
            &[(0, 1)],
            &[(0, 64), (128, 192)],
            &[(3, 200), (201, 202)],
            &[(5, 6), (63, 65), (255, 256)],
            &[(0, 256)],
        ];
        for ranges in cases {
            let mut marks = Marks::new(256);
            for (start, end) in ranges {
                marks.set(*start..*end);
                marks.set(*start..*start);
            }
            let mut shown = Vec::new();
            marks.runs(&mut |run| shown.push((run.start, run.end)));
            assert_eq!(shown, ranges);
        }
    }

    #[test]
    fn history_has_the_last_bytes_and_no_others() {
        let all: Vec<u8> = (0..1000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut history = History::default();
        for most in [7, 100, 2000] {
            history.restart(most);
            for piece in all.chunks(13) {
                history.push(piece);
            }
            let first = 1000_u64.saturating_sub(most);
            let mut out = Vec::new();
            assert_eq!(history.copy(first..1000, &mut out), Some(()));
            assert!(out == all[to_usize_saturating(first)..]);
            assert_eq!(history.copy(999..1001, &mut out), None);
            if first > 0 {
                assert_eq!(history.copy(first - 1..first, &mut out), None);
            }
        }
    }
}
