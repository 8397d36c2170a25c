//! The span table: from which positions of a blob decoding can begin.

use std::ops::Range;
use std::sync::Arc;

use super::gzip::inflate::WINDOW;
use super::number::{put, take};
use super::zstd::entry::{BlockEntry, MAX_REACH};
use super::{Coding, LayerError};
use crate::units::{TarOffset, TarRange, len_u64};

/// How long the spans of an uncompressed layer are said to be, in bytes. Any other length would do: they are computed.
const PLAIN_SPAN: u64 = 32 << 10;
/// A place inside of a span is looked for in the blob as if all of the span were equally compressible; so much of the span behind
/// it (one part of) and so many bytes more are taken along. With real layers it lies further behind once in a hundred times.
const MARGIN_PART: u64 = 8;
const MARGIN_BYTES: u64 = 4 << 10;
/// A zstd decoder gives a block when it has all of it: up to so many bytes of the tar at once.
const ZSTD_BLOCK: u64 = 128 << 10;
/// The shortest that a point can be written, in bytes.
const SHORTEST_POINT: usize = 3;

/// What a decoder finds at the beginning of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// A gzip member's header, a zstd frame, or, in a plain layer, the bytes themselves: no history is needed.
    Whole,
    /// A deflate block inside a gzip member, or a block inside a zstd frame.
    Block,
    /// A block inside a zstd frame at which decoding cannot begin: it takes all of the frame before it.
    Within,
}

/// A piece of the tar and where to decode it from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The bytes of the tar.
    pub tar: TarRange,
    /// The bytes of the blob that yield them, all of them and possibly a few more (the next span's first byte,
    /// headers).
    pub blob: Range<u64>,
    /// What is at the beginning of `blob`.
    pub begins: Begins,
    /// How many of the lowest bits of the first byte belong to what comes before.
    pub bits: u8,
    /// How far back the history reaches that the decoder needs, in bytes; 0 for none, at most 32 KiB in a gzip layer and 32 MiB in
    /// a zstd layer.
    pub window: u32,
}

/// One place to begin from. Sorted by both positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) tar: u64,
    /// The byte in which it begins.
    pub(crate) blob: u64,
    pub(crate) begins: Begins,
    pub(crate) bits: u8,
    pub(crate) window: u32,
}

impl Point {
    pub(crate) const fn whole(tar: u64, blob: u64) -> Self {
        Self {
            tar,
            blob,
            begins: Begins::Whole,
            bits: 0,
            window: 0,
        }
    }
}

/// How decoded bytes and bytes of the tar belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// All that comes out is the tar.
    Everything,
    /// Of what comes out of a span's bytes, only as much as the span is long counts; the rest is not part of tar space.
    /// So it is where a table of contents knows where files lie, but not how long the headers between them are.
    Heads,
}

/// Places from which a blob can be decoded, ascending. Cheap to clone.
///
/// # As bytes
/// [`SpanTable::encode`] writes, numbers being LEB128 (seven bits a byte, the lowest first):
///
/// ```text
/// 1 byte   coding: 0 plain, 1 gzip, 2 zstd; + 4 when only the heads of spans count (tables of contents)
/// number   length of the blob
/// number   length of the tar
/// ```
///
/// and for compressed layers
///
/// ```text
/// number   where in the blob the last span ends, told back from the blob's end: what follows is padding
/// number   how many spans, but for those that begin at a block of a zstd frame
/// per span
///   number   where it begins in the tar, less where the one before does (the first: 0)
///   number   where it begins in the blob, less where the one before does (the first: from the blob's beginning)
///   number   window << 4 | block << 3 | bits
/// ```
///
/// `window` is how many bytes of history the span needs, `block` is 1 when it begins at a deflate block inside a gzip
/// member and 0 when it begins at a member's header or a zstd frame, `bits` is how many of the lowest bits of its first
/// byte belong to what comes before. The same table always yields the same bytes.
///
/// [`SpanTable::encode_blocks`] writes what that leaves out, the spans that begin at blocks of zstd frames: older readers know of none.
///
/// ```text
/// number   how many
/// per span
///   number   where it begins in the tar, less where the one before does (the first: 0)
///   number   where it begins in the blob, less where the one before does (the first: from the blob's beginning)
///   1 byte   1 if decoding can begin there, which takes
///     number   window: how far back the history reaches
///     bytes    what a decoder holds there besides, see `BlockEntry`
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanTable {
    coding: Coding,
    layout: Layout,
    blob_len: u64,
    /// Where the last span ends in the blob.
    blob_end: u64,
    tar_len: u64,
    points: Arc<[Point]>,
    /// What a decoder holds at each [`Begins::Block`] of a zstd layer, in their order, with the number of the span.
    entries: Arc<[(usize, BlockEntry)]>,
}

impl SpanTable {
    /// The table of an uncompressed layer of `len` bytes.
    #[must_use]
    pub fn plain(len: u64) -> Self {
        Self {
            coding: Coding::Plain,
            layout: Layout::Everything,
            blob_len: len,
            blob_end: len,
            tar_len: len,
            points: Arc::new([]),
            entries: Arc::new([]),
        }
    }

    /// A table of these points, and of what a decoder holds at each block of a zstd frame among them, checked.
    pub(crate) fn new(
        (coding, layout): (Coding, Layout),
        (blob_end, blob_len): (u64, u64),
        tar_len: u64,
        (points, entries): (Vec<Point>, Vec<BlockEntry>),
    ) -> Result<Self, LayerError> {
        let blocks = points.iter().enumerate();
        let blocks = blocks.filter(|(_, point)| coding == Coding::Zstd && point.begins == Begins::Block);
        let blocks: Vec<usize> = blocks.map(|(n, _)| n).collect();
        if blocks.len() != entries.len() {
            return Err(LayerError::Table("it has other blocks than entries"));
        }
        let table = Self {
            coding,
            layout,
            blob_len,
            blob_end,
            tar_len,
            points: points.into(),
            entries: blocks.into_iter().zip(entries).collect(),
        };
        table.consistent().map_err(LayerError::Table)?;
        Ok(table)
    }

    /// How the layer is compressed.
    #[must_use]
    pub const fn coding(&self) -> Coding {
        self.coding
    }

    /// How long the tar is, in bytes.
    #[must_use]
    pub const fn tar_len(&self) -> u64 {
        self.tar_len
    }

    /// How long the blob is, in bytes.
    #[must_use]
    pub const fn blob_len(&self) -> u64 {
        self.blob_len
    }

    /// How many spans there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self.coding {
            Coding::Plain => usize::try_from(self.tar_len.div_ceil(PLAIN_SPAN)).unwrap_or(usize::MAX),
            Coding::Gzip | Coding::Zstd => self.points.len(),
        }
    }

    /// Whether there are no spans, because the tar has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a read in the middle can do without everything before it: there is more than one place to begin from.
    #[must_use]
    pub fn seekable(&self) -> bool {
        let entered = self.points.iter().filter(|point| point.begins != Begins::Within);
        self.coding == Coding::Plain || entered.take(2).count() > 1
    }

    /// Whether spans begin at blocks of zstd frames.
    #[must_use]
    pub fn has_blocks(&self) -> bool {
        self.coding == Coding::Zstd && self.points.iter().any(|point| point.begins != Begins::Whole)
    }

    /// The same table without the spans that begin at blocks of zstd frames.
    #[must_use]
    pub fn without_blocks(&self) -> Self {
        if !self.has_blocks() {
            return self.clone();
        }
        let whole = self.points.iter().filter(|point| point.begins == Begins::Whole);
        Self {
            points: whole.copied().collect(),
            entries: Arc::new([]),
            ..self.clone()
        }
    }

    /// What a decoder holds at the beginning of span number `n`, if that is a block of a zstd frame that can be entered.
    pub(super) fn block_entry(&self, n: usize) -> Option<&BlockEntry> {
        let place = self.entries.binary_search_by_key(&n, |(span, _)| *span).ok()?;
        self.entries.get(place).map(|(_, entry)| entry)
    }

    /// Whether tar space is the uncompressed tar itself. It is not where it was made up from a table of contents.
    #[must_use]
    pub fn is_whole_tar(&self) -> bool {
        self.layout == Layout::Everything
    }

    pub(crate) const fn layout(&self) -> Layout {
        self.layout
    }

    /// The number of the span that holds a byte of the tar; of the last one when there is no such byte.
    #[must_use]
    pub fn span_at(&self, tar: TarOffset) -> usize {
        let after = match self.coding {
            Coding::Plain => {
                let number = usize::try_from(tar.0 / PLAIN_SPAN).unwrap_or(usize::MAX);
                return number.min(self.len().saturating_sub(1));
            }
            Coding::Gzip | Coding::Zstd => self.points.partition_point(|point| point.tar <= tar.0),
        };
        after.saturating_sub(1)
    }

    /// Span number `n`; an empty one when there is none.
    #[must_use]
    pub fn span(&self, n: usize) -> Span {
        let end = Point::whole(self.tar_len, self.blob_end);
        let (point, next) = match self.coding {
            Coding::Plain => {
                let start = len_u64(n).saturating_mul(PLAIN_SPAN).min(self.tar_len);
                let next = start.saturating_add(PLAIN_SPAN).min(self.tar_len);
                (Point::whole(start, start), Point::whole(next, next))
            }
            Coding::Gzip | Coding::Zstd => {
                let point = self.points.get(n).copied().unwrap_or(end);
                (point, self.points.get(n.saturating_add(1)).copied().unwrap_or(end))
            }
        };
        // The next one's first byte may hold this one's last bits.
        let blob_end = next.blob + u64::from(next.bits != 0);
        Span {
            tar: TarRange::new(TarOffset(point.tar), next.tar - point.tar),
            blob: point.blob..blob_end,
            begins: point.begins,
            bits: point.bits,
            window: point.window,
        }
    }

    /// Up to which byte of the blob a decoder most likely has to read to give the tar up to `to`, which lies in `span`, when at byte
    /// `known.0` of the tar it is at byte `known.1` of the blob.
    #[must_use]
    pub fn likely_blob_end(&self, to: u64, known: (u64, u64), span: &Span) -> u64 {
        let (tar_at, blob_at) = known;
        let to = match self.coding {
            Coding::Zstd => to.saturating_add(ZSTD_BLOCK),
            Coding::Plain | Coding::Gzip => to,
        };
        let tar_left = u128::from(span.tar.end().0.saturating_sub(tar_at).max(1));
        let blob_left = span.blob.end.saturating_sub(blob_at);
        let likely = u128::from(to.saturating_sub(tar_at)) * u128::from(blob_left) / tar_left;
        let likely = u64::try_from(likely).unwrap_or(u64::MAX);
        let margin = blob_left / MARGIN_PART + MARGIN_BYTES;
        blob_at.saturating_add(likely).saturating_add(margin).min(span.blob.end)
    }

    /// The same, if the tar behind `to` need not come and leaving it out saves at least `least` bytes of the blob.
    #[must_use]
    pub fn likely_cut(&self, to: u64, known: (u64, u64), span: &Span, least: u64) -> Option<u64> {
        let enough = self.likely_blob_end(to, known, span);
        (to < span.tar.end().0 && enough.saturating_add(least) <= span.blob.end).then_some(enough)
    }

    /// Checks that it can belong to a blob of `blob_len` bytes.
    ///
    /// # Errors
    /// When it was made from a blob of another length.
    pub fn check(&self, blob_len: u64) -> Result<(), LayerError> {
        if self.blob_len == blob_len {
            Ok(())
        } else {
            Err(LayerError::Table("it was made from a blob of another length"))
        }
    }

    /// Appends the table as bytes, in the form that is described above.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let heads = if self.layout == Layout::Heads { 4 } else { 0 };
        out.push(self.coding.number() | heads);
        put(out, self.blob_len);
        put(out, self.tar_len);
        if self.coding == Coding::Plain {
            return;
        }
        put(out, self.blob_len - self.blob_end);
        let is_written = |point: &&Point| self.coding != Coding::Zstd || point.begins == Begins::Whole;
        put(out, len_u64(self.points.iter().filter(is_written).count()));
        let mut before = Point::whole(0, 0);
        for point in self.points.iter().filter(is_written) {
            put(out, point.tar - before.tar);
            put(out, point.blob - before.blob);
            let block = u64::from(point.begins == Begins::Block);
            put(out, u64::from(point.window) << 4 | block << 3 | u64::from(point.bits));
            before = *point;
        }
    }

    /// Appends the spans that begin at blocks of zstd frames, in the form that is described above.
    pub fn encode_blocks(&self, out: &mut Vec<u8>) {
        let blocks = || {
            let all = self.points.iter().enumerate();
            all.filter(|(_, point)| self.coding == Coding::Zstd && point.begins != Begins::Whole)
        };
        put(out, len_u64(blocks().count()));
        let mut before = Point::whole(0, 0);
        for (n, point) in blocks() {
            put(out, point.tar - before.tar);
            put(out, point.blob - before.blob);
            let entry = self.block_entry(n);
            out.push(u8::from(entry.is_some()));
            if let Some(entry) = entry {
                put(out, u64::from(point.window));
                entry.encode(out);
            }
            before = *point;
        }
    }

    /// Adds what [`SpanTable::encode_blocks`] wrote of the same layer to a table that [`SpanTable::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are nothing of the kind, or nothing that such a layer can have.
    pub fn with_blocks(&self, bytes: &[u8]) -> Result<Self, LayerError> {
        let short = LayerError::Table("its blocks are cut short or have a number out of range");
        let (blocks, entries) = Self::read_blocks(bytes).ok_or(short)?;
        let mut points = self.without_blocks().points.to_vec();
        points.extend(blocks);
        points.sort_by_key(|point| (point.tar, point.blob));
        let parts = (self.coding, self.layout);
        Self::new(parts, (self.blob_end, self.blob_len), self.tar_len, (points, entries))
    }

    fn read_blocks(mut bytes: &[u8]) -> Option<(Vec<Point>, Vec<BlockEntry>)> {
        let count = usize::try_from(take(&mut bytes)?).ok()?;
        if count > bytes.len() / SHORTEST_POINT {
            return None;
        }
        let (mut points, mut entries) = (Vec::with_capacity(count), Vec::new());
        let mut before = Point::whole(0, 0);
        for _ in 0..count {
            let tar = before.tar.checked_add(take(&mut bytes)?)?;
            let blob = before.blob.checked_add(take(&mut bytes)?)?;
            let (how, rest) = bytes.split_first()?;
            bytes = rest;
            before = Point {
                tar,
                blob,
                begins: Begins::Within,
                bits: 0,
                window: 0,
            };
            match how {
                0 => {}
                1 => {
                    before.begins = Begins::Block;
                    before.window = u32::try_from(take(&mut bytes)?).ok()?;
                    entries.push(BlockEntry::decode(&mut bytes)?);
                }
                _ => return None,
            }
            points.push(before);
        }
        bytes.is_empty().then_some((points, entries))
    }

    /// Reads what [`SpanTable::encode`] wrote, and nothing behind it.
    ///
    /// # Errors
    /// When the bytes are no such table, or one that no layer can have.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayerError> {
        let mut rest = bytes;
        let table = Self::read(&mut rest).ok_or(LayerError::Table("it is cut short or has a number out of range"))?;
        if !rest.is_empty() {
            return Err(LayerError::Table("something follows it"));
        }
        table.consistent().map_err(LayerError::Table)?;
        Ok(table)
    }

    fn read(bytes: &mut &[u8]) -> Option<Self> {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let layout = if first & 4 == 0 {
            Layout::Everything
        } else {
            Layout::Heads
        };
        let coding = Coding::from_number(first & !4)?;
        let blob_len = take(bytes)?;
        let tar_len = take(bytes)?;
        if coding == Coding::Plain {
            return Some(Self {
                layout,
                blob_len,
                ..Self::plain(tar_len)
            });
        }
        let blob_end = blob_len.checked_sub(take(bytes)?)?;
        let count = usize::try_from(take(bytes)?).ok()?;
        if count > bytes.len() / SHORTEST_POINT {
            return None;
        }
        let mut points = Vec::with_capacity(count);
        let mut before = Point::whole(0, 0);
        for _ in 0..count {
            let tar = before.tar.checked_add(take(bytes)?)?;
            let blob = before.blob.checked_add(take(bytes)?)?;
            let how = take(bytes)?;
            let begins = match (how & 8, coding) {
                (0, _) => Begins::Whole,
                (_, Coding::Gzip) => Begins::Block,
                // They are told elsewhere.
                _ => return None,
            };
            let bits = u8::try_from(how & 7).ok()?;
            before = Point {
                tar,
                blob,
                begins,
                bits,
                window: u32::try_from(how >> 4).ok()?,
            };
            points.push(before);
        }
        Some(Self {
            coding,
            layout,
            blob_len,
            blob_end,
            tar_len,
            points: points.into(),
            entries: Arc::new([]),
        })
    }

    /// What is wrong with it, if anything.
    fn consistent(&self) -> Result<(), &'static str> {
        if self.blob_len > i64::MAX.cast_unsigned() || self.tar_len > i64::MAX.cast_unsigned() {
            return Err("no layer is as long as it says");
        }
        if self.coding == Coding::Plain {
            return if self.layout == Layout::Everything
                && self.tar_len == self.blob_len
                && self.blob_end == self.blob_len
            {
                Ok(())
            } else {
                Err("an uncompressed layer is as long as its blob")
            };
        }
        if self.blob_end > self.blob_len {
            return Err("it ends behind the blob");
        }
        match self.points.first() {
            None if self.tar_len > 0 => return Err("it does not say where to begin"),
            Some(first) if first.tar != 0 || first.begins != Begins::Whole => {
                return Err("it does not begin at the beginning");
            }
            _ => {}
        }
        let ends = Point::whole(self.tar_len, self.blob_end);
        let nexts = self.points.iter().skip(1).chain([&ends]);
        for (point, next) in self.points.iter().zip(nexts) {
            let in_block = point.begins != Begins::Whole;
            if next.tar <= point.tar || (next.blob, next.bits) <= (point.blob, point.bits) {
                return Err("its spans are not in order");
            }
            if in_block && self.layout == Layout::Heads || point.begins == Begins::Within && self.coding == Coding::Gzip
            {
                return Err("a span begins inside of something that cannot be entered");
            }
            let longest = match (self.coding, point.begins) {
                (Coding::Gzip, Begins::Block) => len_u64(WINDOW),
                (Coding::Zstd, Begins::Block) => MAX_REACH.min(point.tar),
                _ => 0,
            };
            let may_have_bits = in_block && self.coding == Coding::Gzip;
            if point.bits != 0 && !may_have_bits || u64::from(point.window) > longest {
                return Err("a span has a history that it cannot have");
            }
        }
        Ok(())
    }
}
