//! The span table: from which positions of a blob decoding can begin.

use std::ops::Range;
use std::sync::Arc;

use super::gzip::inflate::WINDOW;
use super::{Coding, LayerError};
use crate::units::{TarOffset, TarRange, len_u64};

/// How long the spans of an uncompressed layer are said to be, in bytes. Any other length would do: they are computed.
const PLAIN_SPAN: u64 = 32 << 10;
/// The shortest that a point can be written, in bytes.
const SHORTEST_POINT: usize = 3;

/// What a decoder finds at the beginning of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// A gzip member's header, a zstd frame, or, in a plain layer, the bytes themselves: no history is needed.
    Whole,
    /// A deflate block inside a gzip member.
    Block,
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
    /// How many bytes of history the decoder needs; 0 for none, at most 32 KiB.
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
    pub(crate) window: u16,
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
/// number   how many spans
/// per span
///   number   where it begins in the tar, less where the one before does (the first: 0)
///   number   where it begins in the blob, less where the one before does (the first: from the blob's beginning)
///   number   window << 4 | block << 3 | bits
/// ```
///
/// `window` is how many bytes of history the span needs, `block` is 1 when it begins at a deflate block inside a gzip
/// member and 0 when it begins at a member's header or a zstd frame, `bits` is how many of the lowest bits of its first
/// byte belong to what comes before. The same table always yields the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanTable {
    coding: Coding,
    layout: Layout,
    blob_len: u64,
    /// Where the last span ends in the blob.
    blob_end: u64,
    tar_len: u64,
    points: Arc<[Point]>,
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
        }
    }

    /// A table of these points, checked.
    pub(crate) fn new(
        (coding, layout): (Coding, Layout),
        (blob_end, blob_len): (u64, u64),
        tar_len: u64,
        points: Vec<Point>,
    ) -> Result<Self, LayerError> {
        let table = Self {
            coding,
            layout,
            blob_len,
            blob_end,
            tar_len,
            points: points.into(),
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
        self.coding == Coding::Plain || self.points.len() > 1
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
            window: point.window.into(),
        }
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
        put(out, len_u64(self.points.len()));
        let mut before = Point::whole(0, 0);
        for point in &*self.points {
            put(out, point.tar - before.tar);
            put(out, point.blob - before.blob);
            let block = u64::from(point.begins == Begins::Block);
            put(out, u64::from(point.window) << 4 | block << 3 | u64::from(point.bits));
            before = *point;
        }
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
            let begins = if how & 8 == 0 { Begins::Whole } else { Begins::Block };
            let bits = u8::try_from(how & 7).ok()?;
            before = Point {
                tar,
                blob,
                begins,
                bits,
                window: u16::try_from(how >> 4).ok()?,
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
            let in_block = point.begins == Begins::Block;
            if next.tar <= point.tar || (next.blob, next.bits) <= (point.blob, point.bits) {
                return Err("its spans are not in order");
            }
            if in_block && (self.coding != Coding::Gzip || self.layout == Layout::Heads) {
                return Err("a span begins inside of something that cannot be entered");
            }
            if !in_block && (point.bits != 0 || point.window != 0) || usize::from(point.window) > WINDOW {
                return Err("a span has a history that it cannot have");
            }
        }
        Ok(())
    }
}

/// Appends a number, one to ten bytes.
fn put(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Takes a number from the front, in the one form that [`put`] writes.
fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 || *byte == 0 && shift > 0 {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
