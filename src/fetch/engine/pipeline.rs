//! The decode pipeline: decode, verify, cut into chunks. In: compressed bytes as they come. Out: chunks, checked where they can be, and at
//! both ends what is less than a chunk.
//!
//! A pipeline runs on worker threads, one piece at a time, and hands over what comes out through a short channel: however much
//! a few bytes unpack to, no more than that waits in memory.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::Engine;
use super::verify_piece::PieceVerifier;
use crate::cache::chunk::chunk_len;
use crate::fetch::Verifier;
use crate::fetch::runtime;
use crate::layer::Decoder;
use crate::units::{CHUNK_BYTES, TarOffset, len_u64, len_usize};

/// Chunks between a worker and the fetch thread.
const CUTS_ON_THE_WAY: usize = 32;

/// A piece of tar space that came out.
#[derive(Debug)]
pub(super) enum ChunkOut {
    /// A whole chunk, and whether it is what it has to be; `true` where there is no digest.
    Whole { index: u32, bytes: Vec<u8>, right: bool },
    /// What begins in this chunk is not what it has to be. Nothing that matters follows.
    Wrong { index: u32 },
    /// Less than a chunk, from this tar position on: the end or the beginning of one.
    Part { at: u64, bytes: Vec<u8> },
}

/// Cuts a run of tar bytes into chunks.
#[derive(Debug)]
pub(super) struct Chunker {
    /// The tar's length.
    size: u64,
    /// Where the next byte lies.
    at: u64,
    /// What lies before is not wanted.
    begin: u64,
    /// What lies from here on is not wanted.
    to: u64,
    held: Vec<u8>,
}

impl Chunker {
    /// For bytes that come from `at` on, of which those from `begin` to `to` are wanted.
    pub(super) fn new(size: u64, at: u64, begin: u64, to: u64) -> Self {
        Self {
            size,
            at,
            begin,
            to: to.min(size),
            held: Vec::new(),
        }
    }

    fn push(&mut self, mut bytes: &[u8], give: &mut dyn FnMut(u64, u32, Vec<u8>)) {
        let unwanted = len_usize(self.begin.saturating_sub(self.at)).min(bytes.len());
        self.at += len_u64(unwanted);
        bytes = &bytes[unwanted..];
        while !bytes.is_empty() && self.at < self.to {
            let index = u32::try_from(self.at / CHUNK_BYTES).unwrap_or(u32::MAX);
            let start = u64::from(index) * CHUNK_BYTES;
            let stop = (start + chunk_len(self.size, index)).min(self.to);
            if self.held.capacity() == 0 {
                self.held.reserve_exact(len_usize(stop - self.at));
            }
            let take = len_usize(stop - self.at).min(bytes.len());
            self.held.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            self.at += len_u64(take);
            if self.at == stop {
                let held = std::mem::take(&mut self.held);
                give(stop - len_u64(held.len()), index, held);
            }
        }
    }
}

/// What a flight keeps from one request to the next.
pub(super) struct DecodePipeline {
    /// None: the blob is the tar.
    decoder: Option<Decoder>,
    /// The next byte of the blob.
    pub(super) blob_at: u64,
    /// Where in the blob decoding begins.
    begins: u64,
    chunker: Chunker,
    check: Option<Verifier>,
    /// Checks pieces before they are cut.
    pieces_verifier: Option<PieceVerifier>,
    /// Digests of blob and tar, for a pipeline that begins at their beginning.
    hashes: Option<Box<(Sha256, Sha256)>>,
}

impl DecodePipeline {
    /// From byte `blob_at` of the blob on, where no piece that can be checked is cut.
    pub(super) fn new(decoder: Option<Decoder>, blob_at: u64, chunker: Chunker, check: Option<Verifier>) -> Self {
        let pieces = check.as_ref().and_then(Verifier::pieces).cloned();
        Self {
            decoder,
            blob_at,
            pieces_verifier: pieces.map(|pieces| PieceVerifier::new(pieces, chunker.at)),
            chunker,
            check,
            begins: blob_at,
            hashes: None,
        }
    }

    /// Takes the blob from its first byte on, although decoding begins later.
    pub(super) fn fed_from_the_first_byte(mut self) -> Self {
        self.blob_at = 0;
        self
    }

    /// Digests all that comes by.
    pub(super) fn hashing(mut self) -> Self {
        self.hashes = Some(Box::default());
        self
    }

    /// Where the next byte that comes out lies.
    pub(super) fn tar_at(&self) -> u64 {
        self.chunker.at
    }

    /// Everything before this byte of the tar was handed over.
    pub(super) fn owes_from(&self) -> u64 {
        self.chunker.at - len_u64(self.chunker.held.len())
    }

    /// From now on all before byte `end` of the tar is wanted. Not for one that has come to where it was to stop.
    pub(super) fn set_end(&mut self, end: u64) {
        if let Some(decoder) = &mut self.decoder {
            decoder.set_until(TarOffset(end));
        }
        self.chunker.to = end.min(self.chunker.size);
    }

    /// The digests of blob and tar, once all has come by.
    pub(super) fn digests(self) -> Option<([u8; 32], [u8; 32])> {
        let (blob, tar) = *self.hashes?;
        Some((blob.finalize().into(), tar.finalize().into()))
    }

    /// Takes the blob's next bytes.
    fn feed(&mut self, piece: &[u8], give: &mut dyn FnMut(ChunkOut)) -> Result<(), String> {
        let before = len_usize(self.begins.saturating_sub(self.blob_at)).min(piece.len());
        self.blob_at += len_u64(piece.len());
        let size = self.chunker.size;
        let (chunker, check, pieces_verifier) = (&mut self.chunker, self.check.as_ref(), &mut self.pieces_verifier);
        let mut wrong = None;
        let (mut blob_hash, mut tar_hash) = match self.hashes.as_deref_mut() {
            Some((blob, tar)) => (Some(blob), Some(tar)),
            None => (None, None),
        };
        if let Some(hash) = &mut blob_hash {
            hash.update(piece);
        }
        let mut out = |bytes: &[u8]| {
            if let Some(hash) = &mut tar_hash {
                hash.update(bytes);
            }
            let mut cut = |bytes: &[u8]| {
                chunker.push(bytes, &mut |at, index, bytes| {
                    give(if len_u64(bytes.len()) == chunk_len(size, index) {
                        let right = check.is_none_or(|check| check.matches(index, &bytes));
                        ChunkOut::Whole { index, bytes, right }
                    } else {
                        ChunkOut::Part { at, bytes }
                    });
                });
            };
            match pieces_verifier {
                // Whatever follows something wrong is decoded and dropped.
                _ if wrong.is_some() => {}
                Some(pieces_verifier) => wrong = pieces_verifier.push(bytes, &mut cut).err(),
                None => cut(bytes),
            }
        };
        let piece = &piece[before..];
        let fed = if let Some(decoder) = &mut self.decoder {
            decoder.feed(piece, &mut out).map_err(|error| error.to_string())
        } else {
            out(piece);
            Ok(())
        };
        if let Some(TarOffset(at)) = wrong {
            let index = u32::try_from(at / CHUNK_BYTES).unwrap_or(u32::MAX);
            give(ChunkOut::Wrong { index });
        }
        fed
    }
}

impl Engine {
    /// Sends a piece through a pipeline on a worker thread; `land` gets what comes out, in order. The pipeline comes back
    /// unless it broke.
    pub(super) async fn feed(
        &self,
        mut pipeline: DecodePipeline,
        piece: Bytes,
        mut land: impl AsyncFnMut(ChunkOut),
    ) -> Result<DecodePipeline, String> {
        // The semaphore is never closed; without a permit it would only be busier.
        let permit = self.workers.clone().acquire_owned().await.ok();
        let (give, mut take) = runtime::from_worker(CUTS_ON_THE_WAY);
        let job = runtime::blocking(move || {
            let _permit = permit;
            let fed = pipeline.feed(&piece, &mut |cut| {
                // The flight may have ended: then what comes out is dropped.
                let _gone = give.give(cut);
            });
            fed.map(|()| pipeline)
        });
        while let Some(cut) = take.recv().await {
            land(cut).await;
        }
        job.await
            .unwrap_or_else(|error| Err(format!("the decoder ended: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts `at..` of a tar of `size` bytes in pieces of `step`, and returns what came out as ranges.
    fn cut(size: u64, at: u64, begin: u64, to: u64, step: usize) -> Vec<(u64, u64)> {
        let content: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let mut chunker = Chunker::new(size, at, begin, to);
        let mut out = Vec::new();
        for piece in content[len_usize(at)..].chunks(step) {
            chunker.push(piece, &mut |at, index, bytes| {
                let end = at + len_u64(bytes.len());
                assert_eq!(bytes, content[len_usize(at)..len_usize(end)]);
                assert_eq!(u64::from(index), at / CHUNK_BYTES);
                out.push((at, end));
            });
        }
        out
    }

    #[test]
    fn chunks_are_cut_whatever_the_pieces() {
        const C: u64 = CHUNK_BYTES;
        let size = 3 * C + 100;
        for step in [1000, 65_537, 1 << 20] {
            assert_eq!(
                cut(size, 0, 0, size, step),
                [(0, C), (C, 2 * C), (2 * C, 3 * C), (3 * C, size)]
            );
            assert_eq!(
                cut(size, 10, 10, 2 * C + 5, step),
                [(10, C), (C, 2 * C), (2 * C, 2 * C + 5)]
            );
            assert_eq!(cut(size, 10, C + 7, 2 * C, step), [(C + 7, 2 * C)]);
            assert_eq!(cut(size, 0, 0, 0, step), []);
        }
    }
}
