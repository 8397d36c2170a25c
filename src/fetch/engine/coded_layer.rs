//! A compressed layer on the fetch thread: its span table, the windows at hand, and which spans are being asked for.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use super::LONGEST_FLIGHT;
use super::partial::{Partials, Ranges, subtract};
use super::window::WindowShelf;
use crate::cache::chunk::chunk_len;
use crate::cache::memory::MemoryLayer;
use crate::fetch::{Coded, StartError};
use crate::layer::{Begins, Coding, SpanTable};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// Spans this far apart, in bytes of the blob, are one request.
const BRIDGE: u64 = 16 << 10;

/// How a layer is decoded, and what is being decoded.
pub(super) struct CodedLayer {
    pub(super) table: SpanTable,
    pub(super) windows: WindowShelf,
    /// The requests under way.
    pub(super) in_flight: RefCell<Vec<Rc<SpanRequest>>>,
    pub(super) partials: RefCell<Partials>,
    /// Whether what the index says of blocks of zstd frames was found to be wrong.
    blocks_are_wrong: Cell<bool>,
}

impl CodedLayer {
    pub(super) fn new(coded: Coded, windows: MemoryLayer) -> Result<Self, StartError> {
        Ok(Self {
            windows: WindowShelf::new(coded.table.coding(), coded.windows, windows)?,
            table: coded.table,
            in_flight: RefCell::default(),
            partials: RefCell::default(),
            blocks_are_wrong: Cell::new(false),
        })
    }

    /// Whether a read can do without what lies before it.
    pub(super) fn can_seek(&self) -> bool {
        self.table.seekable() && !self.blocks_are_wrong.get()
    }

    /// From now on nothing is decoded from a block of a zstd frame: all of the layer is read in order instead.
    pub(super) fn distrust_blocks(&self) {
        self.blocks_are_wrong.set(true);
    }

    /// What has come of chunks that are not whole, and where it lies; it is forgotten here.
    pub(super) fn take_parts(&self) -> Vec<(u64, Vec<u8>)> {
        self.partials.take().into_parts()
    }

    /// What neither is here of chunk `index` nor comes with a flight under way.
    pub(super) fn lacking(&self, index: u32) -> Ranges {
        let len = chunk_len(self.table.tar_len(), index);
        let start = u64::from(index) * CHUNK_BYTES;
        let mut lacking = self.partials.borrow().lacking(index, len);
        for range in &mut lacking {
            *range = range.start + start..range.end + start;
        }
        for request in &*self.in_flight.borrow() {
            subtract(&mut lacking, &(request.delivered.get()..request.to));
        }
        lacking
    }

    /// The spans that have what of chunk `index` neither is here nor comes.
    pub(super) fn spans_of(&self, index: u32) -> BTreeSet<usize> {
        let spans = |range: Range<u64>| {
            let last = self.table.span_at(TarOffset(range.end.saturating_sub(1)));
            self.table.span_at(TarOffset(range.start))..=last
        };
        self.lacking(index).into_iter().flat_map(spans).collect()
    }

    /// Whether one of `spans` can only be had by who decodes its zstd frame from the beginning.
    pub(super) fn is_within(&self, spans: &BTreeSet<usize>) -> bool {
        let mut begins = spans.iter().map(|span| self.table.span(*span).begins);
        begins.any(|begins| begins == Begins::Within)
    }

    /// Whether a span begins at a block of a zstd frame.
    pub(super) fn is_at_block(&self, span: usize) -> bool {
        self.table.coding() == Coding::Zstd && self.table.span(span).begins != Begins::Whole
    }

    /// Puts spans together to flights: neighbours, none much longer than a flight may be.
    pub(super) fn requests_for(&self, layer: LayerId, spans: &BTreeSet<usize>) -> Vec<Rc<SpanRequest>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for &span in spans {
            let joins = groups.last().is_some_and(|group| {
                let (first, last) = (
                    self.table.span(group.start),
                    self.table.span(group.end.saturating_sub(1)),
                );
                let next = self.table.span(span);
                let close = span == group.end || next.blob.start.saturating_sub(last.blob.end) <= BRIDGE;
                close && next.tar.end().since(first.tar.start) <= u64::from(LONGEST_FLIGHT) * CHUNK_BYTES
            });
            match groups.last_mut() {
                Some(group) if joins => group.end = span + 1,
                _ => groups.push(span..span + 1),
            }
        }
        let request = |group: Range<usize>| {
            let (first, last) = (self.table.span(group.start), self.table.span(group.end - 1));
            Rc::new(SpanRequest {
                layer,
                from: first.tar.start.0,
                to: last.tar.end().0,
                blob: first.blob.start..last.blob.end,
                delivered: Cell::new(first.tar.start.0),
            })
        };
        groups.into_iter().map(request).collect()
    }
}

/// One range request over spans that lie side by side.
#[derive(Debug)]
pub(super) struct SpanRequest {
    pub(super) layer: LayerId,
    /// The first byte of tar space that it brings...
    pub(super) from: u64,
    /// ...and one past the last.
    pub(super) to: u64,
    /// The bytes of the blob that hold them.
    pub(super) blob: Range<u64>,
    /// Everything before this byte of tar space has been delivered.
    pub(super) delivered: Cell<u64>,
}

impl SpanRequest {
    pub(super) fn blob_len(&self) -> u64 {
        self.blob.end.saturating_sub(self.blob.start)
    }

    /// The chunks of which it has brought nothing or a part.
    pub(super) fn rest(&self) -> ChunkRange {
        let from = self.delivered.get();
        ChunkRange::of(self.layer, TarRange::new(TarOffset(from), self.to - from))
    }

    /// Everything before byte `end` of tar space has been delivered.
    pub(super) fn advance(&self, end: u64) {
        self.delivered.set(end.clamp(self.delivered.get(), self.to));
    }

    /// All chunks of which it brings something.
    pub(super) fn all(&self) -> ChunkRange {
        ChunkRange::of(self.layer, TarRange::new(TarOffset(self.from), self.to - self.from))
    }
}
