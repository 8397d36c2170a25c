//! A compressed layer on the fetch thread: its span table, the windows at hand, and which spans are being asked for, and how far.
//!
//! A span can only be decoded from its beginning, or from where a decoder stands that was parked in it; but it need not be decoded
//! to its end. Where in the blob what is wanted ends is not known, so a little more than the share of it is asked for.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::LONGEST_FLIGHT;
use super::parked::ParkedDecoders;
use super::partial::{Partials, Ranges, subtract};
use super::pipeline::DecodePipeline;
use super::window::WindowShelf;
use crate::cache::chunk::chunk_len;
use crate::cache::memory::MemoryLayer;
use crate::fetch::{Coded, StartError};
use crate::layer::{Begins, Coding, SpanTable};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// Spans this far apart, in bytes of the blob, are one request; further, where the link carries more while it is asked once more.
pub(super) const BRIDGE: u64 = 16 << 10;

/// What is wanted of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WantedSpan {
    /// From where to where, in bytes of the tar.
    pub(super) tar: Range<u64>,
    /// Whether it is known that what follows in the span is not wanted. Else it is likely enough to come along: it is near, and the
    /// next request would have to wait for this one.
    pub(super) is_all: bool,
}

/// The spans that have something of what is wanted, by their number.
pub(super) type WantedSpans = BTreeMap<usize, WantedSpan>;

/// How a layer is decoded, and what is being decoded.
pub(super) struct CodedLayer {
    pub(super) table: SpanTable,
    pub(super) windows: WindowShelf,
    /// The requests under way.
    pub(super) in_flight: RefCell<Vec<Rc<SpanRequest>>>,
    pub(super) partials: RefCell<Partials>,
    pub(super) parked: RefCell<ParkedDecoders>,
    /// Whether what the index says of blocks of zstd frames was found to be wrong.
    blocks_are_wrong: Cell<bool>,
}

impl CodedLayer {
    pub(super) fn new(coded: Coded, windows: MemoryLayer) -> Result<Self, StartError> {
        Ok(Self {
            windows: WindowShelf::new(coded.table.coding(), coded.windows, windows)?,
            parked: RefCell::new(ParkedDecoders::new(coded.table.coding())),
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
        self.parked.borrow_mut().clear();
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
            subtract(&mut lacking, &(request.delivered.get()..request.to.get()));
        }
        lacking
    }

    /// Has the requests under way bring what they can of chunk `index`: they go on in their last spans.
    pub(super) fn extend_requests(&self, index: u32) {
        for lacking in self.lacking(index) {
            for request in &*self.in_flight.borrow() {
                if lacking.start >= request.to.get() && lacking.start < request.spans_end {
                    let to = lacking.end.next_multiple_of(CHUNK_BYTES).min(request.spans_end);
                    request.to.set(request.to.get().max(to));
                }
            }
        }
    }

    /// Adds to `wanted` what of chunk `index` neither is here nor comes. `is_all`: whether it is known what else is wanted.
    pub(super) fn want(&self, index: u32, is_all: bool, wanted: &mut WantedSpans) {
        for lacking in self.lacking(index) {
            let last = self.table.span_at(TarOffset(lacking.end.saturating_sub(1)));
            for span in self.table.span_at(TarOffset(lacking.start))..=last {
                let tar = self.table.span(span).tar;
                let part = lacking.start.max(tar.start.0)..lacking.end.min(tar.end().0);
                let all = wanted.entry(span).or_insert_with(|| WantedSpan {
                    tar: part.clone(),
                    is_all,
                });
                all.tar = all.tar.start.min(part.start)..all.tar.end.max(part.end);
                all.is_all &= is_all;
            }
        }
    }

    /// Whether one of these spans can only be had by who decodes its zstd frame from the beginning.
    pub(super) fn is_within(&self, wanted: &WantedSpans) -> bool {
        let mut begins = wanted.keys().map(|span| self.table.span(*span).begins);
        begins.any(|begins| begins == Begins::Within)
    }

    /// Whether a span begins at a block of a zstd frame.
    pub(super) fn is_at_block(&self, span: usize) -> bool {
        self.table.coding() == Coding::Zstd && self.table.span(span).begins != Begins::Whole
    }

    /// Puts spans together to flights: those with at most `bridge` bytes of the blob between them, none much longer than a flight may be. The last span of one is asked for only as
    /// far as it is wanted, if that is known and saves `least_saving` bytes of the blob or more, and the first one from where a decoder stands in
    /// it; each comes with that decoder.
    pub(super) fn requests_for(
        &self,
        layer: LayerId,
        wanted: &WantedSpans,
        least_saving: u64,
        bridge: u64,
    ) -> Vec<(Rc<SpanRequest>, Option<DecodePipeline>)> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for &span in wanted.keys() {
            let joins = groups.last().is_some_and(|group| {
                let (first, last) = (
                    self.table.span(group.start),
                    self.table.span(group.end.saturating_sub(1)),
                );
                let next = self.table.span(span);
                let close = span == group.end || next.blob.start.saturating_sub(last.blob.end) <= bridge;
                close && next.tar.end().since(first.tar.start) <= u64::from(LONGEST_FLIGHT) * CHUNK_BYTES
            });
            match groups.last_mut() {
                Some(group) if joins => group.end = span + 1,
                _ => groups.push(span..span + 1),
            }
        }
        let request = |group: Range<usize>| {
            let (first, last) = (self.table.span(group.start), self.table.span(group.end - 1));
            let (first_wanted, last_wanted) = (wanted.get(&group.start)?, wanted.get(&(group.end - 1))?);
            // At a block of a zstd frame a decoder has the histories of the spans that it was made for, and of no more.
            let may_go_on = group.len() == 1 || self.table.coding() == Coding::Gzip;
            let parked = may_go_on.then(|| self.parked.borrow_mut().take(&first, first_wanted.tar.start));
            let mut parked = parked.flatten();
            if let Some(pipeline) = &mut parked {
                pipeline.set_end(last.tar.end().0);
            }
            let (from, blob_start) = match &parked {
                Some(pipeline) => (pipeline.owes_from(), pipeline.blob_at),
                None => (first.tar.start.0, first.blob.start),
            };
            let request = SpanRequest {
                layer,
                from,
                to: Cell::new(last.tar.end().0),
                spans_end: last.tar.end().0,
                last_span: group.end - 1,
                blob: blob_start..last.blob.end,
                asked: Cell::new(last.blob.end),
                asked_to: Cell::new(last.tar.end().0),
                delivered: Cell::new(from),
            };
            // Where decoding is known to stand, before what is wanted of the last span.
            let known = match &parked {
                Some(pipeline) if group.len() == 1 => (pipeline.tar_at(), pipeline.blob_at),
                _ => (last.tar.start.0, last.blob.start),
            };
            let to = last_wanted.tar.end.next_multiple_of(CHUNK_BYTES);
            if last_wanted.is_all
                && let Some(enough) = self.table.likely_cut(to, known, &last, least_saving)
            {
                request.to.set(to);
                request.asked_to.set(to);
                request.asked.set(enough);
            }
            Some((Rc::new(request), parked))
        };
        groups.into_iter().filter_map(request).collect()
    }

    /// All that was asked for has come, and `pipeline` has not given all that is wanted: asks for more of the last span. Says whether there
    /// is more.
    pub(super) fn ask_more(&self, request: &SpanRequest, pipeline: &DecodePipeline) -> bool {
        let to = request.to.get();
        let known = (pipeline.tar_at(), pipeline.blob_at);
        let asked = request.asked.get();
        let enough = if request.asked_to.replace(to) == to {
            // It was a wrong guess: no other one.
            request.blob.end
        } else {
            let span = self.table.span(request.last_span);
            self.table
                .likely_blob_end(to, known, &span)
                .max(asked.saturating_add(1))
        };
        request.asked.set(enough.min(request.blob.end));
        request.asked.get() > asked
    }
}

/// One range request over spans that lie side by side.
///
/// Invariant: `from` < `to` <= `spans_end`, and `to` is a chunk's end unless it is the spans'.
#[derive(Debug)]
pub(super) struct SpanRequest {
    pub(super) layer: LayerId,
    /// The first byte of tar space that it brings...
    pub(super) from: u64,
    /// ...and one past the last; more, when more is wanted while it is under way.
    pub(super) to: Cell<u64>,
    /// The number of its last span.
    last_span: usize,
    /// Where the last of its spans ends in tar space: what comes of that beyond `to` is taken along.
    pub(super) spans_end: u64,
    /// The bytes of the blob that hold all from `from` to the end of the spans...
    pub(super) blob: Range<u64>,
    /// ...of which those before this one are asked for.
    pub(super) asked: Cell<u64>,
    /// What was `to` when that was decided.
    asked_to: Cell<u64>,
    /// Everything before this byte of tar space has been delivered.
    pub(super) delivered: Cell<u64>,
}

impl SpanRequest {
    pub(super) fn asked_len(&self) -> u64 {
        self.asked.get().saturating_sub(self.blob.start)
    }

    /// The chunks of which it has brought nothing or a part.
    pub(super) fn rest(&self) -> ChunkRange {
        let from = self.delivered.get();
        ChunkRange::of(self.layer, TarRange::new(TarOffset(from), self.to.get() - from))
    }

    /// Everything before byte `end` of tar space has been delivered.
    pub(super) fn advance(&self, end: u64) {
        self.delivered.set(end.clamp(self.delivered.get(), self.to.get()));
    }

    /// All chunks of which it brings something.
    pub(super) fn all(&self) -> ChunkRange {
        ChunkRange::of(
            self.layer,
            TarRange::new(TarOffset(self.from), self.to.get() - self.from),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::cache::memory::MemoryCache;
    use crate::fetch::Windows;
    use crate::layer::{Indexer, Spans};

    /// The spans of a layer of 2 MB in zstd frames of 300 KB.
    fn spans() -> Spans {
        let tar: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        let mut indexer = Indexer::new(Coding::Zstd, 128 << 10);
        for frame in tar.chunks(300_000) {
            let frame = zstd::encode_all(frame, 1).unwrap();
            indexer.feed(&frame, &mut |_| {}).unwrap();
        }
        indexer.finish().unwrap()
    }

    fn layer(spans: &Spans) -> CodedLayer {
        assert!(spans.table.len() > 5);
        let coded = Coded {
            table: spans.table.clone(),
            windows: Windows::Memory(Arc::new(spans.windows.clone())),
        };
        CodedLayer::new(coded, Arc::new(MemoryCache::new(1 << 20)).layer(100)).unwrap()
    }

    thread_local!(static SPANS: Spans = spans());

    proptest! {
        /// Whatever is wanted is asked for, of spans that lie side by side, and of the last one as far as it is wanted or to its end.
        #[test]
        fn all_that_is_wanted_is_asked_for(
            chunks in proptest::collection::btree_set(0_u32..61, 1..20),
            least_saving in 0_u64..100_000,
            is_all in any::<bool>(),
        ) {
            let layer = SPANS.with(layer);
            let mut wanted = WantedSpans::new();
            for chunk in &chunks {
                layer.want(*chunk, is_all, &mut wanted);
            }
            let requests = layer.requests_for(LayerId(0), &wanted, least_saving, BRIDGE);
            let mut asked = 0;
            for (request, parked) in &requests {
                prop_assert!(parked.is_none());
                let (first, last) = (layer.table.span_at(TarOffset(request.from)), layer.table.span_at(TarOffset(request.to.get() - 1)));
                let (first, last) = (layer.table.span(first), layer.table.span(last));
                prop_assert_eq!((request.from, request.spans_end), (first.tar.start.0, last.tar.end().0));
                prop_assert_eq!(&request.blob, &(first.blob.start..last.blob.end));
                prop_assert!(request.from < request.to.get() && request.to.get() <= request.spans_end);
                prop_assert!(request.to.get() == request.spans_end || request.to.get() % CHUNK_BYTES == 0);
                let saved = request.blob.end - request.asked.get();
                if request.to.get() == request.spans_end {
                    prop_assert_eq!(saved, 0);
                } else {
                    prop_assert!(is_all && saved >= least_saving, "{saved}");
                }
                asked += request.asked_len();
            }
            prop_assert!(asked <= layer.table.span(layer.table.len() - 1).blob.end);
            for chunk in chunks {
                let len = chunk_len(layer.table.tar_len(), chunk);
                let mut lacking: Ranges = std::iter::once(0..len).collect();
                for (request, _) in &requests {
                    let start = u64::from(chunk) * CHUNK_BYTES;
                    subtract(&mut lacking, &(request.from.saturating_sub(start)..request.to.get().saturating_sub(start)));
                }
                prop_assert!(lacking.is_empty(), "{chunk}: {lacking:?}");
            }
        }
    }
}
