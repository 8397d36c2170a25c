//! The index that a layer brings along: the table of contents of eStargz and zstd:chunked layers, fetched by range. In: a layer
//! without another index, and what its image's manifest says of it. Out: an index of the tar space that the table makes up
//! ([`crate::index::toc`]), or nothing, and then the layer is read like any other.
//!
//! What is trusted: a layer of an image has a digest, and nothing else vouches for its bytes. There a table
//! counts only if the manifest names its digest and if it has the digest of every piece of every file; all that is then read
//! of the layer is checked. A file on a web server has no digest: nothing vouches for it, whichever way it is read, and its
//! table is as good as its headers. What cannot be used is no error, because reading the whole layer (whose digest is then checked) can:
//! manifests keep annotations of layers that were compressed anew, and a forged layer is found out by its digest.
//!
//! What a table cannot be held to without reading the whole layer is its own tar: a maker of images can have the two say different
//! things, both under the manifest's digests, and then the table's are mounted. `--index ignore` and `build` take the tar's.

use std::borrow::Cow;
use std::ops::Range;

use super::IndexOrigin;
use super::prepared::FoundLayer;
use crate::http::HttpOptions;
use crate::index::toc::{self, TAIL};
use crate::index::{IndexBuilder, LayerIdentity};
use crate::layer::Coding;
use crate::source::{self, Blob, SourceError};

/// How much of a blob's end is asked for where its table is likely to lie: a hundredth of the blob within these bounds, in bytes.
/// A table takes about that much, and what is too much of it costs less than a second question.
const SHORTEST_END: u64 = 64 << 10;
const LONGEST_END: u64 = 1 << 20;

/// Whether the layer's own table of contents may be asked for.
pub(super) fn may_be_used(found: &FoundLayer) -> bool {
    let vouched = found.layer.digest.is_none() || toc::promised(&found.annotations).is_some();
    // A file at hand is read whole; so is what its server does not give in parts.
    vouched && found.layer.blob.is_remote() && found.layer.blob.answers_ranges()
}

/// Brings the layer's table of contents as an index, if it has one that can be believed as far as the layer itself.
pub(super) fn fetch(found: &FoundLayer, coding: Coding, http: &HttpOptions) -> Option<(Vec<u8>, IndexOrigin)> {
    if coding == Coding::Plain || !may_be_used(found) {
        return None;
    }
    let mut reader = Reader {
        blob: &found.layer.blob,
        http,
        reads: 0,
        bytes: 0,
    };
    match index(&mut reader, found) {
        Ok(index) => index.map(|index| {
            let (reads, bytes) = (reader.reads, reader.bytes);
            (index, IndexOrigin::Contents { reads, bytes })
        }),
        Err(why) => {
            log::warn!("{}: {why}", found.layer.blob.name);
            None
        }
    }
}

/// What the registry or server was asked for.
struct Reader<'b> {
    blob: &'b Blob,
    http: &'b HttpOptions,
    reads: u64,
    bytes: u64,
}

impl Reader<'_> {
    fn read(&mut self, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        self.reads += 1;
        self.bytes += range.end.saturating_sub(range.start);
        source::read_range(self.blob, range, self.http)
    }
}

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Layer(#[from] crate::layer::LayerError),
    #[error(transparent)]
    Index(#[from] crate::index::IndexError),
    #[error("the manifest promises a table of contents, and the layer has none")]
    Missing,
    #[error("the layer's table of contents does not have the digests of all files")]
    Incomplete,
}

fn index(reader: &mut Reader<'_>, found: &FoundLayer) -> Result<Option<Vec<u8>>, Unusable> {
    let len = reader.blob.len;
    let promised = toc::promised(&found.annotations).is_some();
    let (place, end) = if let Some(place) = toc::Place::of_annotations(&found.annotations, len) {
        (place, None)
    } else {
        let guess = (len / 100).clamp(SHORTEST_END, LONGEST_END);
        let start = len - guess.max(TAIL).min(len);
        let end = reader.read(start..len)?;
        match toc::Place::of_tail(&end, len) {
            Some(place) => (place, Some((start, end))),
            None if promised => return Err(Unusable::Missing),
            None => return Ok(None),
        }
    };
    let stored = match &end {
        // What of it came with the end, and what lies before that.
        Some((start, end)) => {
            let (from, here) = already_here(&place.blob, *start, end);
            if place.blob.start < *start {
                let mut all = reader.read(place.blob.start..from)?;
                all.extend_from_slice(here);
                Cow::Owned(all)
            } else {
                Cow::Borrowed(here)
            }
        }
        None => Cow::Owned(reader.read(place.blob.clone())?),
    };
    let contents = place.open(&stored, len, &found.annotations)?;
    if found.layer.digest.is_some() && !(contents.is_vouched() && contents.are_digests_complete()) {
        return Err(Unusable::Incomplete);
    }
    let mut builder = IndexBuilder::new();
    builder.identity(LayerIdentity {
        blob_digest: found.layer.digest.clone(),
        diff_id: found.layer.diff_id.clone(),
        ..LayerIdentity::default()
    });
    Ok(Some(contents.into_index(builder)?))
}

/// What of the bytes at `wanted` lies in `end`, which begins at byte `start`, and where that begins: at the end of what is wanted,
/// if nothing does.
fn already_here<'e>(wanted: &Range<u64>, start: u64, end: &'e [u8]) -> (u64, &'e [u8]) {
    let from = wanted.start.max(start).min(wanted.end);
    let bound = |at: u64| {
        usize::try_from(at.saturating_sub(start))
            .unwrap_or(usize::MAX)
            .min(end.len())
    };
    (from, end.get(bound(from)..bound(wanted.end)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_may_lie_before_the_end_that_was_read() {
        let end = b"0123456789";
        for (wanted, from, here) in [
            (100..110, 100, &end[..]),
            (95..103, 100, b"012"),
            (104..106, 104, b"45"),
            // Something longer than the end that was read lies between it and the footer.
            (50..60, 60, b""),
            (50..100, 100, b""),
        ] {
            assert_eq!(already_here(&wanted, 100, end), (from, here), "{wanted:?}");
        }
    }

    #[test]
    fn every_digest_that_could_count_is_in_the_name() {
        let named = |pairs: &[(&str, &str)]| {
            let own = |(key, digest): &(&str, &str)| ((*key).to_owned(), (*digest).to_owned());
            toc::promised(&pairs.iter().map(own).collect())
        };
        let chunked = "io.github.containers.zstd-chunked.manifest-checksum";
        let stargz = "containerd.io/snapshot/stargz/toc.digest";
        let honest = named(&[(chunked, "sha256:a")]);
        assert!(honest.is_some() && named(&[]).is_none());
        // One of the other kind beside it is another promise.
        assert_ne!(named(&[(chunked, "sha256:a"), (stargz, "sha256:b")]), honest);
        assert_ne!(named(&[(stargz, "sha256:a")]), honest);
    }
}
