//! Tables of contents that layers bring along: eStargz ([`stargz`]) and zstd:chunked ([`chunked`]).
//!
//! In: a layer's annotations or its last bytes, then the bytes of its table of contents. Out: the entries in the tar's order, a
//! [`SpanTable`], and digests of what files hold. Whoever fetches a layer's last [`TAIL`] bytes and what [`Place`] names
//! can mount it without having read it.
//!
//! # A tar space of its own
//! Such a table says where in the *blob* a file's bytes begin. How long the headers between files are it does not say, so where in
//! the tar they lie cannot be known from it. Instead there is a layout that follows from the table alone: files' contents in the
//! tar's order, each rounded up to 512 bytes, no headers between them. Its spans begin where the table says that something can be decoded,
//! and only their heads count: what else is decoded from there (padding, the next headers) is not part of it. [`Entry::headers`]
//! is empty, at the place where the content begins. Names, attributes and contents are those of the tar; positions are not, so an index, a
//! cache or chunk digests made from the tar itself do not fit, nor can the tar be rebuilt.
//!
//! # What is not in them
//! eStargz has times in whole seconds, and both have names as JSON texts, in which bytes that are no UTF-8 were replaced by who wrote it.
//!
//! A table of contents is as trustworthy as the digest that the manifest has of it: see [`Contents::digest`].

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::json::{self, Found};
use super::table::{Layout, Point};
use super::{Coding, LayerError, SpanTable, chunked, stargz};
use crate::index::{Entry, EntrySink, IndexError};
use crate::units::TarRange;

/// How many of a blob's last bytes [`Place::of_tail`] wants to see: the longest footer.
pub const TAIL: u64 = 72;
/// The longest table of contents that is read, in compressed bytes.
pub const MAX_STORED: u64 = 64 << 20;
/// The longest after decompression. One of a million entries has about 400 MB in eStargz; half of that is accepted.
pub(super) const MAX_JSON: u64 = 256 << 20;

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

    /// Reads the table of contents from the bytes at [`Place::blob`].
    ///
    /// # Errors
    /// When they do not decompress, or are no table of contents of a blob of `blob_len` bytes.
    pub fn open(&self, stored: &[u8], blob_len: u64) -> Result<Contents, LayerError> {
        if !self.fits(blob_len) || super::len_u64(stored.len()) != self.blob.end - self.blob.start {
            return Err(wrong("it does not lie where the layer says"));
        }
        match self.format {
            Format::Stargz => {
                let (member, json) = stargz::unpack(stored)?;
                let digest = Sha256::digest(&member[json.clone()]).into();
                Contents::new(self, member, json, digest, blob_len)
            }
            Format::Chunked => {
                let json = chunked::unpack(stored, self.json_len.unwrap_or(MAX_JSON))?;
                let all = 0..json.len();
                Contents::new(self, json, all, Sha256::digest(stored).into(), blob_len)
            }
        }
    }
}

/// The digest that a layer's annotations give for its table of contents, to be compared with [`Contents::digest`].
#[must_use]
pub fn annotated_digest(annotations: &BTreeMap<String, String>) -> Option<[u8; 32]> {
    [stargz::DIGEST]
        .iter()
        .chain(&chunked::DIGEST)
        .find_map(|key| json::sha256(annotations.get(*key)?))
}

/// What a layer's table of contents says, checked for making sense.
pub struct Contents {
    format: Format,
    /// What the JSON was unpacked from, or the JSON.
    bytes: Vec<u8>,
    json: Range<usize>,
    /// The table of contents as a file of the layer, where it is one.
    own: Option<json::Own>,
    digest: [u8; 32],
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
    fn new(
        place: &Place,
        bytes: Vec<u8>,
        json: Range<usize>,
        digest: [u8; 32],
        blob_len: u64,
    ) -> Result<Self, LayerError> {
        let own = match place.format {
            Format::Stargz => Some(stargz::own_entry(&bytes, place.blob.start)?),
            Format::Chunked => None,
        };
        let mut points: Vec<Point> = Vec::new();
        let mut entries = 0;
        let mut ends = place.blob.start;
        let laid_out = json::walk(&bytes[json.clone()], own.as_ref(), &mut |found| {
            match found {
                Found::Entry(_) => entries += 1,
                Found::Member { tar, blob } => points.push(Point::whole(tar, blob)),
                Found::Content { .. } => {}
            }
            Ok(())
        })
        .map_err(contents_error)?;
        if let Some(own) = &own {
            // The last member is the table of contents itself.
            ends = own.blob.max(place.blob.end);
        }
        let coding = match place.format {
            Format::Stargz => Coding::Gzip,
            Format::Chunked => Coding::Zstd,
        };
        if points.is_empty() {
            ends = 0;
        }
        let table = SpanTable::new((coding, Layout::Heads), (ends, blob_len), laid_out, points)?;
        Ok(Self {
            format: place.format,
            bytes,
            json,
            own,
            digest,
            table,
            entries,
        })
    }

    /// Of which kind it is.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// The SHA-256 that the manifest's annotation has to name for this to be trusted: of the JSON for eStargz, of its compressed form for
    /// zstd:chunked. See [`annotated_digest`].
    #[must_use]
    pub const fn digest(&self) -> [u8; 32] {
        self.digest
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
            Found::Entry(entry) => sink.entry(entry),
            _ => Ok(()),
        })
    }

    /// Calls with every piece of content whose SHA-256 the table has, ascending: its place in the made-up tar space and the digest.
    pub fn digests(&self, each: &mut dyn FnMut(TarRange, [u8; 32])) {
        let outcome = self.walk(&mut |found| {
            if let Found::Content {
                tar,
                digest: Some(digest),
            } = found
            {
                each(tar, digest);
            }
            Ok(())
        });
        debug_assert!(outcome.is_ok(), "it was walked before");
    }

    fn walk(&self, each: &mut dyn FnMut(Found<'_>) -> Result<(), IndexError>) -> Result<(), IndexError> {
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

/// So that entries can be laid out by anybody who has a [`Contents`].
impl Contents {
    /// A copy of all entries; for listings and tests.
    ///
    /// # Errors
    /// None that the first walk did not have.
    pub fn to_entries(&self) -> Result<Vec<Entry>, IndexError> {
        let mut all = crate::index::Collector::default();
        self.replay(&mut all)?;
        Ok(all.0)
    }
}
