//! Everything an index can hold, from one pass over the tar. In: the tar's bytes in order, in pieces of any size. Out: entries
//! as they complete, and at the end an index with chunk digests, payload digests and header bytes.
//!
//! What is kept in memory is what the index will hold, compressed as it comes; never payload.

use std::collections::VecDeque;

use sha2::{Digest as _, Sha256};

use super::cold::{ColdPart, Packed, Packer};
use super::content_pieces::{ContentPieces, PieceCutter};
use super::digests::ChunkHasher;
use super::entry::Entry;
use super::error::IndexError;
use super::identity::LayerIdentity;
use super::parser::{EndOfArchive, Parser};
use super::sink::EntrySink;
use super::summary::Summary;
use super::writer::IndexBuilder;
use super::{format, len_u64};
use crate::digest::{Algorithm, Beside, Digest};
use crate::layer::{Coding, Indexer, SpanTable};
use crate::units::{TarOffset, TarRange};

/// Header bytes that take more than this compressed are not kept: the tar is hostile, or has other data behind its end.
const MAX_HEADERS: usize = 256 << 20;

/// How many bytes are worked on at once, so that all who look at them find them in the nearest cache.
const STRIDE: usize = 32 << 10;

/// What an index holds besides the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a part of its own")]
pub struct Contents {
    /// The digest of each chunk, with which every fetched byte is checked.
    pub chunk_digests: bool,
    /// The digest of the whole tar, which image configurations call diff ID.
    pub diff_id: bool,
    /// The digest of each file's stored bytes.
    pub payload_digests: bool,
    /// All that is no file's stored bytes, so that the exact tar can be rebuilt.
    pub headers: bool,
    /// The digests of content-defined pieces of long files, by which those are found that changed a little.
    pub content_pieces: bool,
}

impl Contents {
    /// All of it.
    pub const FULL: Self = Self {
        chunk_digests: true,
        diff_id: true,
        payload_digests: true,
        headers: true,
        content_pieces: true,
    };
    /// What checking every byte takes, and no more.
    pub const CHECKED: Self = Self {
        payload_digests: false,
        headers: false,
        content_pieces: false,
        ..Self::FULL
    };
    /// The entries alone.
    pub const ENTRIES: Self = Self {
        chunk_digests: false,
        diff_id: false,
        payload_digests: false,
        headers: false,
        content_pieces: false,
    };
}

/// Makes an index from a tar that streams by.
#[derive(Debug)]
pub struct Recorder {
    parser: Parser,
    builder: IndexBuilder,
    at: u64,
    chunks: Option<ChunkHasher>,
    tar: Option<Beside>,
    split: Option<Split>,
}

/// Tells payload from all else.
#[derive(Debug)]
struct Split {
    /// Stored bytes of files that are known and have not passed, in the tar's order.
    payloads: VecDeque<TarRange>,
    headers: Option<Packer>,
    digests: Option<(Sha256, Packer)>,
    pieces: Option<PieceCutter>,
}

impl Split {
    /// Takes the bytes at `at`, whose entries are known.
    fn feed(&mut self, mut at: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let payload = self.payloads.front().copied();
            let until = |position: u64| usize::try_from(position.saturating_sub(at)).unwrap_or(usize::MAX);
            let (inside, len) = match payload {
                None => (false, bytes.len()),
                Some(payload) if payload.start.0 > at => (false, until(payload.start.0).min(bytes.len())),
                Some(payload) => (true, until(payload.end().0).min(bytes.len())),
            };
            let (head, rest) = bytes.split_at(len);
            if inside {
                if let Some((digest, _)) = &mut self.digests {
                    digest.update(head);
                }
                if let Some(pieces) = self
                    .pieces
                    .as_mut()
                    .filter(|_| payload.is_some_and(ContentPieces::is_cut))
                {
                    pieces.feed(head);
                }
            } else if let Some(headers) = &mut self.headers {
                headers.feed(head);
                if headers.stored_len() > MAX_HEADERS {
                    self.headers = None;
                }
            }
            at = at.saturating_add(len_u64(len));
            bytes = rest;
            if payload.is_some_and(|payload| payload.end().0 == at) {
                self.payloads.pop_front();
                if let Some((digest, packer)) = &mut self.digests {
                    packer.feed(&digest.finalize_reset());
                }
                if let Some(pieces) = &mut self.pieces {
                    pieces.end();
                }
            }
        }
    }
}

/// Where entries go: into the index, to a further sink, and their payload's place to the splitter.
struct Spread<'a> {
    builder: &'a mut IndexBuilder,
    also: &'a mut dyn EntrySink,
    payloads: Option<&'a mut VecDeque<TarRange>>,
}

impl EntrySink for Spread<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.builder.entry(entry)?;
        if let Some(payloads) = &mut self.payloads {
            let payload = entry.payload();
            if !payload.is_empty() {
                payloads.push_back(payload);
            }
        }
        self.also.entry(entry)
    }
}

impl Recorder {
    /// At the tar's beginning.
    #[must_use]
    pub fn new(contents: Contents) -> Self {
        let headers = contents.headers.then(|| Packer::new(ColdPart::Headers, format::PIECE));
        let digests = contents.payload_digests.then(|| {
            (
                Sha256::new(),
                Packer::new(ColdPart::PayloadDigests, format::DIGESTS_PIECE),
            )
        });
        let pieces = contents.content_pieces.then(PieceCutter::new);
        Self {
            parser: Parser::new(),
            builder: IndexBuilder::new(),
            at: 0,
            chunks: contents.chunk_digests.then(ChunkHasher::new),
            tar: contents.diff_id.then(|| Algorithm::Sha256.hasher().into()),
            split: (headers.is_some() || digests.is_some() || pieces.is_some()).then(|| Split {
                payloads: VecDeque::new(),
                headers,
                digests,
                pieces,
            }),
        }
    }

    /// Takes the tar's next bytes.
    ///
    /// # Errors
    /// What is wrong with the tar.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.feed_into(bytes, &mut None::<IndexBuilder>)
    }

    /// Takes the tar's next bytes and hands the entries that they complete to `also`.
    ///
    /// # Errors
    /// What is wrong with the tar; what `also` returns.
    pub fn feed_into(&mut self, bytes: &[u8], also: &mut dyn EntrySink) -> Result<(), IndexError> {
        for piece in bytes.chunks(STRIDE) {
            let mut sink = Spread {
                builder: &mut self.builder,
                also,
                payloads: self.split.as_mut().map(|split| &mut split.payloads),
            };
            self.parser.feed(TarOffset(self.at), piece, &mut sink)?;
            if let Some(chunks) = &mut self.chunks {
                chunks.feed(piece);
            }
            if let Some(tar) = &mut self.tar {
                tar.update(piece);
            }
            if let Some(split) = &mut self.split {
                split.feed(self.at, piece);
            }
            self.at = self.at.saturating_add(len_u64(piece.len()));
        }
        Ok(())
    }

    /// How much of the tar has passed.
    #[must_use]
    pub fn position(&self) -> TarOffset {
        TarOffset(self.at)
    }

    /// Whether the mark has passed that ends the tar: no entry will follow.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.parser.wants().is_none()
    }

    /// Ends the tar.
    ///
    /// # Errors
    /// [`IndexError::Truncated`] when it stops in the middle of something, [`IndexError::NotATar`].
    pub fn finish(mut self) -> Result<Recorded, IndexError> {
        let end = self.parser.finish(TarOffset(self.at))?;
        if let Some(chunks) = self.chunks {
            self.builder.chunk_digests(chunks.finish());
        }
        if let Some(split) = self.split {
            if let Some((_, digests)) = split.digests {
                self.builder.cold(digests.finish());
            }
            if let Some(headers) = split.headers {
                self.builder.cold(headers.finish());
            }
            if let Some(pieces) = split.pieces.and_then(PieceCutter::finish) {
                self.builder.cold(pieces);
            }
        }
        Ok(Recorded {
            builder: self.builder,
            tar_len: self.at,
            end,
            diff_id: self.tar.map(Beside::finish),
        })
    }
}

/// A tar that has passed, whole.
#[derive(Debug)]
pub struct Recorded {
    builder: IndexBuilder,
    tar_len: u64,
    end: EndOfArchive,
    diff_id: Option<Digest>,
}

impl Recorded {
    /// What the layer holds.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        self.builder.summary()
    }

    /// The tar's length in bytes.
    #[must_use]
    pub fn tar_len(&self) -> u64 {
        self.tar_len
    }

    /// The tar's digest, if it was asked for.
    #[must_use]
    pub fn diff_id(&self) -> Option<&Digest> {
        self.diff_id.as_ref()
    }

    /// The index of a plain layer, which is its own blob.
    #[must_use]
    pub fn into_plain_index(self) -> Vec<u8> {
        let identity = LayerIdentity {
            blob_len: self.tar_len,
            blob_digest: self.diff_id.clone(),
            ..LayerIdentity::default()
        };
        self.into_index(identity)
    }

    /// The index of a layer that can be entered at its beginning only. Of `identity` the diff ID is filled in.
    #[must_use]
    pub fn into_index(self, identity: LayerIdentity) -> Vec<u8> {
        self.with_spans(identity, None)
    }

    fn with_spans(mut self, identity: LayerIdentity, spans: Option<(SpanTable, Packed)>) -> Vec<u8> {
        let diff_id = self.diff_id.or(identity.diff_id);
        self.builder.identity(LayerIdentity { diff_id, ..identity });
        if let Some((table, windows)) = spans {
            self.builder.packed_spans(table, windows);
        }
        self.builder.finish(self.tar_len, self.end)
    }
}

/// No layer unpacks to more: what does is a bomb.
const MAX_TAR: u64 = 1 << 40;

/// What undoes a blob's compression, and what is kept of that.
#[derive(Debug)]
struct Compressed {
    indexer: Box<Indexer>,
    /// The histories of the spans so far, as the index will hold them: raw they are some 26 KiB for each MiB of the tar.
    windows: Packed,
}

impl Compressed {
    /// Takes the blob's next bytes, which `digest` takes as well.
    fn feed(
        &mut self,
        blob: &[u8],
        digest: &mut Option<Beside>,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), IndexError> {
        for piece in blob.chunks(STRIDE) {
            if let Some(digest) = digest {
                digest.update(piece);
            }
            self.indexer.feed(piece, sink)?;
            for window in self.indexer.take_windows() {
                self.windows.push(&window);
            }
        }
        Ok(())
    }
}

/// Makes an index from a layer's blob that streams by, in whatever coding it is.
#[derive(Debug)]
pub struct BlobRecorder {
    coding: Coding,
    spacing: u64,
    recorder: Recorder,
    /// What undoes the compression.
    compressed: Option<Compressed>,
    /// The blob's digest, where it is not the tar's.
    digest: Option<Beside>,
    blob_len: u64,
}

impl BlobRecorder {
    /// At the beginning of a blob. Entry points into a compressed blob will lie about every `spacing` bytes of the tar.
    #[must_use]
    pub fn new(coding: Coding, spacing: u64, contents: Contents) -> Self {
        let compressed = || {
            let indexer = Indexer::new(coding, spacing).limit(MAX_TAR);
            Compressed {
                indexer: Box::new(if contents.chunk_digests {
                    indexer
                } else {
                    indexer.frames_only()
                }),
                windows: Packed::new(ColdPart::windows_of(coding)),
            }
        };
        Self {
            coding,
            spacing: if coding == Coding::Plain { 0 } else { spacing },
            recorder: Recorder::new(contents),
            compressed: (coding != Coding::Plain).then(compressed),
            digest: (coding != Coding::Plain).then(|| Algorithm::Sha256.hasher().into()),
            blob_len: 0,
        }
    }

    /// Refuses a compressed blob that decodes to more than `bytes` bytes, and never accepts more than 1 TiB. Only before anything
    /// was fed.
    #[must_use]
    pub fn limit(mut self, bytes: u64) -> Self {
        self.compressed = self.compressed.map(|compressed| Compressed {
            indexer: Box::new(compressed.indexer.limit(bytes.min(MAX_TAR))),
            ..compressed
        });
        self
    }

    /// Makes the digests of the blob and of the tar, as far as they are made, by these algorithms instead of SHA-256. Only
    /// before anything was fed.
    #[must_use]
    pub fn algorithms(mut self, blob: Algorithm, tar: Algorithm) -> Self {
        let made = self.digest.is_some() || self.recorder.tar.is_some();
        self.recorder.tar = self.recorder.tar.map(|_| tar.hasher().into());
        let own = made && (self.coding != Coding::Plain || blob != tar);
        self.digest = own.then(|| blob.hasher().into());
        self
    }

    /// Takes the blob's next bytes.
    ///
    /// # Errors
    /// What is wrong with the blob or with the tar in it.
    pub fn feed(&mut self, blob: &[u8]) -> Result<(), IndexError> {
        self.feed_into(blob, &mut None::<IndexBuilder>, &mut |_, _| {})
    }

    /// Takes the blob's next bytes; hands the entries that they complete to `also`, and the tar's bytes to `tap`.
    ///
    /// # Errors
    /// What is wrong with the blob or with the tar in it; what `also` returns.
    pub fn feed_into(
        &mut self,
        blob: &[u8],
        also: &mut dyn EntrySink,
        tap: &mut dyn FnMut(TarOffset, &[u8]),
    ) -> Result<(), IndexError> {
        self.blob_len = self.blob_len.saturating_add(len_u64(blob.len()));
        let recorder = &mut self.recorder;
        let mut take = |tar: &[u8]| {
            tap(recorder.position(), tar);
            recorder.feed_into(tar, also)
        };
        let Some(compressed) = &mut self.compressed else {
            if let Some(digest) = &mut self.digest {
                digest.update(blob);
            }
            return take(blob);
        };
        let mut outcome = Ok(());
        compressed.feed(blob, &mut self.digest, &mut |tar| {
            if outcome.is_ok() {
                outcome = take(tar);
            }
        })?;
        outcome
    }

    /// How much of the tar has passed.
    #[must_use]
    pub fn position(&self) -> TarOffset {
        self.recorder.position()
    }

    /// How much of the blob has passed, in bytes.
    #[must_use]
    pub fn blob_position(&self) -> u64 {
        self.blob_len
    }

    /// Whether the mark has passed that ends the tar: no entry will follow.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.recorder.has_ended()
    }

    /// Ends the blob.
    ///
    /// # Errors
    /// When blob or tar stop in the middle of something, or it is no tar.
    pub fn finish(self) -> Result<BlobRecorded, IndexError> {
        let blob_digest = self.digest.map(Beside::finish);
        let Some(mut compressed) = self.compressed else {
            return Ok(BlobRecorded {
                identity: LayerIdentity {
                    blob_len: self.blob_len,
                    blob_digest,
                    ..LayerIdentity::default()
                },
                recorded: self.recorder.finish()?,
                spans: None,
            });
        };
        let spans = compressed.indexer.finish()?;
        for window in spans.windows {
            compressed.windows.push(&window);
        }
        Ok(BlobRecorded {
            identity: LayerIdentity {
                coding: self.coding,
                blob_len: self.blob_len,
                blob_digest,
                diff_id: None,
                spacing: self.spacing,
            },
            recorded: self.recorder.finish()?,
            spans: Some((spans.table, compressed.windows)),
        })
    }
}

/// A blob that has passed, whole.
#[derive(Debug)]
pub struct BlobRecorded {
    identity: LayerIdentity,
    recorded: Recorded,
    /// Where the blob can be entered, if it is compressed, and the histories for that.
    spans: Option<(SpanTable, Packed)>,
}

impl BlobRecorded {
    /// What passed: digests as far as they were asked for.
    #[must_use]
    pub fn identity(&self) -> LayerIdentity {
        let diff_id = self.recorded.diff_id.clone();
        let plain = self.identity.coding == Coding::Plain;
        LayerIdentity {
            blob_digest: self
                .identity
                .blob_digest
                .clone()
                .or_else(|| diff_id.clone().filter(|_| plain)),
            diff_id,
            ..self.identity.clone()
        }
    }

    /// What the layer holds.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        self.recorded.summary()
    }

    /// The index.
    #[must_use]
    pub fn into_index(self) -> Vec<u8> {
        let identity = self.identity();
        self.recorded.with_spans(identity, self.spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Index;
    use crate::layer::Coding;

    /// A tar of one file whose bytes are words in no order.
    fn tar(len: usize) -> Vec<u8> {
        let words = ["layer", "block", "header", "\n", "device", "chunk", " of ", "the", "17"];
        let mut state = 1_u32;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = usize::try_from(state >> 16).unwrap();
            bytes.extend_from_slice(words[at % words.len()].as_bytes());
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(len_u64(bytes.len()));
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut header, "words", bytes.as_slice()).unwrap();
        tar.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let config = zlib_rs::DeflateConfig {
            window_bits: 31,
            ..zlib_rs::DeflateConfig::default()
        };
        let mut room = vec![0; zlib_rs::compress_bound(bytes.len()) + 100];
        let (blob, code) = zlib_rs::compress_slice(&mut room, bytes, config);
        assert_eq!(code, zlib_rs::ReturnCode::Ok);
        blob.to_vec()
    }

    #[test]
    fn histories_are_packed_while_the_blob_passes() {
        let blob = gzip(&tar(12 << 20));
        let mut indexer = Indexer::new(Coding::Gzip, Coding::Gzip.spacing());
        indexer.feed(&blob, &mut |_| {}).unwrap();
        let spans = indexer.finish().unwrap();
        let raw: usize = spans.windows.iter().map(Vec::len).sum();
        assert!(spans.table.len() > 8, "{} spans", spans.table.len());

        let mut recorder = BlobRecorder::new(Coding::Gzip, Coding::Gzip.spacing(), Contents::FULL);
        let (first, last) = blob.split_at(blob.len() / 2);
        recorder.feed(first).unwrap();
        let packed = recorder.compressed.as_ref().unwrap().windows.stored_len();
        assert!(packed > 0 && packed < raw / 2, "{packed} of {raw}");
        recorder.feed(last).unwrap();
        let index = Index::open(recorder.finish().unwrap().into_index()).unwrap();
        assert_eq!(index.spans(), Some(&spans.table));
        for (n, window) in spans.windows.iter().enumerate() {
            let held = index.cold_piece(ColdPart::Windows, n).unwrap().unwrap_or_default();
            assert!(held == *window, "window {n}");
        }
    }
}
