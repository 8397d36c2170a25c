//! Sparse files, whose map comes in headers, in extension blocks or in front of the payload. In: what the parser has read of
//! one. Out: its entry, with its segments.

use super::{BLOCK, Parser, State, payload_size, set};
use crate::index::error::{HeaderFault, IndexError};
use crate::index::header::{Block, Dialect, Header, SparseMap};
use crate::index::pax::Records;
use crate::index::sink::EntrySink;
use crate::index::{TAR_BLOCK, align_up};
use crate::units::TarOffset;

/// Where the map of a PAX sparse file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PaxSparse {
    No,
    /// Formats 0.0 and 0.1.
    InRecords,
    /// Format 1.0.
    InPayload,
}

impl PaxSparse {
    pub(super) fn of(records: &Records) -> Self {
        let sparse = &records.sparse;
        match (sparse.major, sparse.minor) {
            (Some(0), Some(0 | 1)) => Self::InRecords,
            (Some(1), Some(0)) => Self::InPayload,
            // The older formats came without a version.
            (None, None) if sparse.map.is_some() => Self::InRecords,
            _ => Self::No,
        }
    }
}

impl Parser {
    pub(super) fn begin_gnu_sparse(
        &mut self,
        header: Header<'_>,
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let at = self.file.header_at;
        if header.dialect != Dialect::Gnu {
            return Err(self.fault_at(at, HeaderFault::Sparse("only GNU headers have such maps")));
        }
        let size = header.sparse_real_size().ok_or(HeaderFault::Number("real size"));
        self.file.size = size
            .and_then(|size| payload_size(Some(size)))
            .map_err(|fault| self.fault_at(at, fault))?;
        self.map.clear();
        // The map's extension blocks lie between the header and the payload, and no size counts them.
        self.unit_at = at;
        self.take_gnu_map(header.sparse_map(), sink)
    }

    pub(super) fn take_gnu_map(
        &mut self,
        map: SparseMap<'_>,
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let next = self.unit_at + TAR_BLOCK;
        for pair in map.pairs() {
            let pushed = match pair {
                Some((offset, len)) => self.map.push(offset, len),
                None => Err(HeaderFault::Sparse("its entries are no numbers")),
            };
            pushed.map_err(|fault| self.fault_at(self.file.header_at, fault))?;
        }
        if map.continued {
            self.expect(State::GnuMap, next, BLOCK);
            return Ok(());
        }
        let stored = self.file.payload.len;
        self.emit_sparse(TarOffset(next), stored, sink)
    }

    pub(super) fn begin_pax_sparse(
        &mut self,
        version: PaxSparse,
        records: &Records,
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let at = self.file.header_at;
        if let Some(name) = &records.sparse.name {
            set(&mut self.entry.path, name);
            if let Some(other) = &mut self.entry.in_image {
                other.path = None;
            }
        }
        if let Some(size) = records.sparse.real_size {
            self.file.size = payload_size(Some(size)).map_err(|fault| self.fault_at(at, fault))?;
        }
        self.map.clear();
        if version == PaxSparse::InPayload {
            self.decimal_map.clear();
            self.expect(State::DecimalMap, self.file.payload.start.0, BLOCK);
            return self.check_map_block();
        }
        let pairs = records.sparse.map.as_deref().unwrap_or_default();
        let announced = records.sparse.blocks.and_then(|blocks| usize::try_from(blocks).ok());
        if announced.and_then(|blocks| blocks.checked_mul(2)) != Some(pairs.len()) {
            return Err(self.fault_at(at, HeaderFault::Sparse("it has not as many pieces as it says")));
        }
        for pair in pairs.chunks_exact(2) {
            self.map
                .push(pair[0], pair[1])
                .map_err(|fault| self.fault_at(at, fault))?;
        }
        let payload = self.file.payload;
        self.emit_sparse(payload.start, payload.len, sink)
    }

    /// The map of format 1.0 is part of the payload and must not reach out of it.
    fn check_map_block(&self) -> Result<(), IndexError> {
        if self.unit_at + TAR_BLOCK > self.file.payload.end().0 {
            let fault = HeaderFault::Sparse("it is longer than the stored bytes");
            return Err(self.fault_at(self.file.header_at, fault));
        }
        Ok(())
    }

    pub(super) fn take_decimal_map(
        &mut self,
        block: &Block,
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let next = self.unit_at + TAR_BLOCK;
        let complete = self.decimal_map.block(block, &mut self.map);
        if complete.map_err(|fault| self.fault_at(self.file.header_at, fault))? {
            let payload_end = self.file.payload.end();
            return self.emit_sparse(TarOffset(next), payload_end.since(TarOffset(next)), sink);
        }
        self.expect(State::DecimalMap, next, BLOCK);
        self.check_map_block()
    }

    /// Hands out a sparse file whose `stored` bytes begin at `start`.
    fn emit_sparse(
        &mut self,
        start: TarOffset,
        stored: u64,
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let segments = &mut self.entry.segments;
        let finished = self.map.finish(self.file.size, start, stored, segments);
        finished.map_err(|fault| self.fault_at(self.file.header_at, fault))?;
        self.payload_end = start.plus(stored).0;
        if self.payload_end > i64::MAX.unsigned_abs() {
            return Err(self.fault_at(self.file.header_at, HeaderFault::HugeSize));
        }
        self.entry.size = self.file.size;
        self.entry.headers.len = start.since(self.entry.headers.start);
        self.expect_header(align_up(self.payload_end));
        sink.entry(&self.entry)
    }
}
