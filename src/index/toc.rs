//! Tables of contents that layers bring along: eStargz (`stargz.rs`) and zstd:chunked (`chunked.rs`).
//!
//! In: a layer's annotations or its last bytes, then the bytes of its table of contents. Out: the entries in the tar's
//! order, a [`SpanTable`], and digests of what files hold. Who fetches a layer's last [`TAIL`] bytes and what
//! [`Place`] names can mount it without having read it.
//!
//! # A tar space of its own
//! Such a table says where in the *blob* a file's bytes begin. How long the headers between files are it does not say,
//! so where in the tar they lie cannot be known from it. Instead there is a layout that follows from the table alone:
//! files' contents in the tar's order, each rounded up to 512 bytes, no headers between them. Its spans begin where the
//! table says that something can be decoded, and only their heads count: what else is decoded from there (padding, the
//! next headers) is not part of it. [`crate::index::Entry::headers`] is empty, at the place where the content begins.
//! Names, attributes and contents are those of the tar; positions are not, so an index, a cache or chunk digests made
//! from the tar itself do not fit, nor can the tar be rebuilt.
//!
//! # What is not in them
//! What containerd's converter writes has times in whole seconds, rounded. All of them have names as JSON texts, in which
//! bytes that are no UTF-8 were replaced by who wrote them.
//!
//! A table of contents is as trustworthy as the digest that the manifest has of it: see [`Contents::is_vouched`].

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest, Sha256};

mod chunked;
mod json;
mod stargz;

use self::json::{Own, TocItem};
use crate::index::{EndOfArchive, EntrySink, IndexBuilder, IndexError, PieceDigests};
use crate::layer::table::{Layout, Point};
use crate::layer::{Coding, LayerError, SpanTable};
use crate::units::{TarOffset, TarRange, len_u64};

/// How many of a blob's last bytes [`Place::of_tail`] wants to see: the longest footer.
pub const TAIL: u64 = 72;
/// The longest table of contents that is read, in compressed bytes.
pub const MAX_STORED: u64 = 64 << 20;
/// The longest after decompression. One of a million entries has about 400 MB in eStargz; half of that is accepted.
pub(super) const MAX_JSON: u64 = 256 << 20;

/// The table's own content is checked in pieces of this many bytes.
const OWN_PIECE: usize = 1 << 20;

/// A kind of table of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The JSON is a file at the end of the tar, in a gzip member of its own.
    Stargz,
    /// The JSON is in a skippable frame behind the tar, compressed by zstd.
    Chunked,
}

/// Where in a blob its table of contents is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of which kind it is.
    pub format: Format,
    /// Its bytes in the blob.
    pub blob: Range<u64>,
    /// How long its JSON is, where that is known before.
    pub(super) json_len: Option<u64>,
}

impl Place {
    /// What the last bytes of a blob of `blob_len` bytes say: at least [`TAIL`] of them, or all there are.
    #[must_use]
    pub fn of_tail(tail: &[u8], blob_len: u64) -> Option<Self> {
        let place = stargz::footer(tail, blob_len).or_else(|| chunked::footer(tail))?;
        place.fits(blob_len).then_some(place)
    }

    /// What a layer's annotations say, which saves reading its end. Only zstd:chunked has such annotations.
    #[must_use]
    pub fn of_annotations(annotations: &BTreeMap<String, String>, blob_len: u64) -> Option<Self> {
        let place = chunked::annotated(annotations)?;
        place.fits(blob_len).then_some(place)
    }

    fn fits(&self, blob_len: u64) -> bool {
        let len = self.blob.end.saturating_sub(self.blob.start);
        self.blob.end <= blob_len && (1..=MAX_STORED).contains(&len) && self.json_len.is_none_or(|len| len <= MAX_JSON)
    }

    /// Reads the table of contents from the bytes at [`Place::blob`]. Where the layer's annotations name a digest of
    /// it, it has to have that digest.
    ///
    /// # Errors
    /// When the bytes have another digest, do not decompress, or are no table of contents of a blob of `blob_len`
    /// bytes.
    pub fn open(
        &self,
        stored: &[u8],
        blob_len: u64,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Contents, LayerError> {
        if !self.fits(blob_len) || len_u64(stored.len()) != self.blob.end - self.blob.start {
            return Err(wrong("it does not lie where the layer says"));
        }
        let mut vouched = false;
        let (bytes, json, own) = match self.format {
            Format::Stargz => {
                let (member, entry, json) = stargz::unpack(stored)?;
                let own = Own {
                    inner: entry.payload().start.0,
                    entry,
                    blob: self.blob.start,
                };
                (member, json, Some(own))
            }
            Format::Chunked => {
                vouched |= check(annotations, &chunked::DIGEST, stored)?;
                let json = chunked::unpack(stored, self.json_len.unwrap_or(MAX_JSON))?;
                let all = 0..json.len();
                (json, all, None)
            }
        };
        vouched |= check(annotations, &[stargz::DIGEST], &bytes[json.clone()])?;

        let mut points = Vec::new();
        let mut entries = 0;
        let tar_len = json::walk(&bytes[json.clone()], own.as_ref(), &mut |found| {
            match found {
                TocItem::Entry(_) => entries += 1,
                TocItem::Member { tar, blob } => points.push(Point::whole(tar, blob)),
                TocItem::Content { .. } | TocItem::Own(_) => {}
            }
            Ok(())
        })
        .map_err(contents_error)?;
        let coding = match self.format {
            Format::Stargz => Coding::Gzip,
            Format::Chunked => Coding::Zstd,
        };
        // Behind the last content comes the table itself, which in eStargz is one.
        let end = if own.is_some() { self.blob.end } else { self.blob.start };
        let table = SpanTable::new((coding, Layout::Heads), (end, blob_len), tar_len, (points, Vec::new()))?;
        Ok(Contents {
            format: self.format,
            bytes,
            json,
            own,
            vouched,
            table,
            entries,
        })
    }
}

/// The digests that a layer's annotations name of its table of contents, if they do: all of them, because which one counts is
/// for the layer's end to say.
#[must_use]
pub fn promised(annotations: &BTreeMap<String, String>) -> Option<String> {
    let keys = chunked::DIGEST.iter().chain([&stargz::DIGEST]);
    let named: Vec<_> = keys
        .filter_map(|key| Some(format!("{key} {}", annotations.get(*key)?)))
        .collect();
    (!named.is_empty()).then(|| named.join("\n"))
}

/// Whether one of these annotations names the digest of `bytes`; an error if one names another.
fn check(annotations: &BTreeMap<String, String>, keys: &[&str], bytes: &[u8]) -> Result<bool, LayerError> {
    let Some(named) = keys.iter().find_map(|key| annotations.get(*key)) else {
        return Ok(false);
    };
    let named = json::sha256(named).ok_or_else(|| wrong("the layer's annotations name no SHA-256 of it"))?;
    if named == <[u8; 32]>::from(Sha256::digest(bytes)) {
        Ok(true)
    } else {
        Err(wrong("it has another digest than the layer's annotations name"))
    }
}

/// What a layer's table of contents says, checked for making sense.
pub struct Contents {
    format: Format,
    /// What the JSON was unpacked from, or the JSON.
    bytes: Vec<u8>,
    json: Range<usize>,
    /// The table of contents as a file of the layer, where it is one.
    own: Option<Own>,
    vouched: bool,
    table: SpanTable,
    entries: u64,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents")
            .field("format", &self.format)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl Contents {
    /// Of which kind it is.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Whether the layer's annotations named its digest. Without that it is only as good as the blob's server.
    #[must_use]
    pub const fn is_vouched(&self) -> bool {
        self.vouched
    }

    /// Where the layer can be decoded from, in the made-up tar space.
    #[must_use]
    pub const fn table(&self) -> &SpanTable {
        &self.table
    }

    /// How many entries there are.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.entries
    }

    /// Hands out the entries in the tar's order.
    ///
    /// # Errors
    /// What the sink does not take.
    pub fn replay(&self, sink: &mut dyn EntrySink) -> Result<(), IndexError> {
        self.walk(&mut |found| match found {
            TocItem::Entry(entry) => sink.entry(entry),
            _ => Ok(()),
        })
    }

    /// Calls with every piece of content, ascending: its place in the made-up tar space and its SHA-256, as far as the
    /// table has that. The table's own content, where it is a file, is as good as the table: its digests are made here.
    pub fn digests(&self, each: &mut dyn FnMut(TarRange, Option<[u8; 32]>)) {
        let outcome = self.walk(&mut |found| {
            match found {
                TocItem::Content { tar, digest } => each(tar, digest),
                TocItem::Own(tar) => {
                    let mut at = tar.start.0;
                    for piece in self.bytes[self.json.clone()].chunks(OWN_PIECE) {
                        let len = len_u64(piece.len());
                        each(TarRange::new(TarOffset(at), len), Some(Sha256::digest(piece).into()));
                        at += len;
                    }
                }
                TocItem::Entry(_) | TocItem::Member { .. } => {}
            }
            Ok(())
        });
        debug_assert!(outcome.is_ok(), "it was walked before");
    }

    /// All of it as an index file of the layer, which is what `builder` says of it.
    ///
    /// # Errors
    /// When a piece is too long to be checked ([`crate::index::MAX_PIECE`]), or an entry is of a kind that no index holds.
    pub fn into_index(self, mut builder: IndexBuilder) -> Result<Vec<u8>, IndexError> {
        self.replay(&mut builder)?;
        let mut pieces = Vec::new();
        self.digests(&mut |range, digest| pieces.push((range, digest)));
        let pieces = PieceDigests::new(self.table.tar_len(), pieces)
            .ok_or_else(|| IndexError::sink(wrong("a piece of a file is too long to be checked before it is read")))?;
        let tar_len = self.table.tar_len();
        builder.contents(self.table, pieces);
        Ok(builder.finish(tar_len, EndOfArchive::Marked))
    }

    /// Whether the table has the digest of every piece of content.
    #[must_use]
    pub fn are_digests_complete(&self) -> bool {
        let mut complete = true;
        self.digests(&mut |_, digest| complete &= digest.is_some());
        complete
    }

    fn walk(&self, each: &mut dyn FnMut(TocItem<'_>) -> Result<(), IndexError>) -> Result<(), IndexError> {
        json::walk(&self.bytes[self.json.clone()], self.own.as_ref(), each).map(drop)
    }
}

/// A complaint about a table of contents.
pub(super) fn wrong(what: impl Into<String>) -> LayerError {
    LayerError::Contents(what.into())
}

/// Errors of a walk whose sink has none of its own.
fn contents_error(error: IndexError) -> LayerError {
    match error {
        IndexError::Sink(inner) => match inner.downcast::<LayerError>() {
            Ok(error) => *error,
            Err(other) => wrong(other.to_string()),
        },
        other => wrong(other.to_string()),
    }
}
