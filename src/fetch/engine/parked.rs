//! Decoders that stand where a request ended, inside of a span. In: a decode pipeline of which no more is wanted for now. Out: the same
//! to the next request that wants what follows, which then need not begin at the span's first byte again.
//!
//! A decoder holds its history, so few are kept; those that stand the longest go. What is here is never needed: without it a span is
//! fetched from its beginning.

use std::collections::VecDeque;

use super::pipeline::DecodePipeline;
use crate::layer::{Coding, Span};

/// A gzip decoder takes up to 100 KiB, with the part of a chunk that waits for its rest.
const MOST_GZIP: usize = 16;
/// A zstd decoder takes its frame's window, often 2 MiB.
const MOST_ZSTD: usize = 2;

/// The parked decoders of one layer, the oldest first.
pub(super) struct ParkedDecoders {
    pipelines: VecDeque<DecodePipeline>,
    most: usize,
}

impl ParkedDecoders {
    pub(super) fn new(coding: Coding) -> Self {
        Self {
            pipelines: VecDeque::new(),
            most: match coding {
                Coding::Plain => 0,
                Coding::Gzip => MOST_GZIP,
                Coding::Zstd => MOST_ZSTD,
            },
        }
    }

    /// Keeps a decoder that has taken all bytes of the blob before its own position.
    pub(super) fn park(&mut self, pipeline: DecodePipeline) {
        self.pipelines.push_back(pipeline);
        if self.pipelines.len() > self.most {
            self.pipelines.pop_front();
        }
    }

    /// The decoder that stands the furthest in `span`, but not behind byte `wanted` of the tar.
    pub(super) fn take(&mut self, span: &Span, wanted: u64) -> Option<DecodePipeline> {
        let is_there = |pipeline: &DecodePipeline| {
            let from = pipeline.owes_from();
            from > span.tar.start.0 && from < span.tar.end().0 && from <= wanted
        };
        let all = self.pipelines.iter().enumerate();
        let best = all.filter(|(_, pipeline)| is_there(pipeline));
        let (at, _) = best.max_by_key(|(_, pipeline)| pipeline.owes_from())?;
        self.pipelines.remove(at)
    }

    pub(super) fn clear(&mut self) {
        self.pipelines.clear();
    }
}
