//! Digests of the tar's chunks. In: the tar's bytes in order, or a section of an index. Out: an answer to whether bytes are what
//! the layer has there.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::IndexFault;
use super::format::{DIGEST, Fields};
use super::len_u64;
use crate::units::CHUNK_BYTES;

/// The first twenty bytes of a SHA-256.
pub(super) type Short = [u8; DIGEST];

/// SHA-256 of `bytes`, cut.
pub(super) fn short(bytes: &[u8]) -> Short {
    cut(Sha256::digest(bytes).into())
}

fn cut(digest: [u8; 32]) -> Short {
    let mut short = [0; DIGEST];
    short.copy_from_slice(&digest[..DIGEST]);
    short
}

/// The digest of every chunk of a layer: 20 bytes for each [`CHUNK_BYTES`] of tar space. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkDigests {
    tar_len: u64,
    digests: Arc<[Short]>,
}

impl fmt::Debug for ChunkDigests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkDigests")
            .field("tar_len", &self.tar_len)
            .field("chunks", &self.digests.len())
            .finish()
    }
}

impl ChunkDigests {
    /// Whether `bytes` are what chunk number `chunk` of the layer holds: all of it, no more and no less.
    #[must_use]
    pub fn check(&self, chunk: u64, bytes: &[u8]) -> bool {
        self.digest(chunk)
            .is_some_and(|digest| len_u64(bytes.len()) == self.chunk_len(chunk) && short(bytes) == *digest)
    }

    /// The first twenty bytes of the SHA-256 of chunk number `chunk`, if the layer has so many.
    #[must_use]
    pub fn digest(&self, chunk: u64) -> Option<&[u8; 20]> {
        self.digests.get(usize::try_from(chunk).ok()?)
    }

    /// How many bytes chunk number `chunk` has: [`CHUNK_BYTES`], the layer's last one fewer.
    #[must_use]
    pub fn chunk_len(&self, chunk: u64) -> u64 {
        self.tar_len
            .saturating_sub(chunk.saturating_mul(CHUNK_BYTES))
            .min(CHUNK_BYTES)
    }

    /// How many chunks there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        len_u64(self.digests.len())
    }

    /// Whether the layer is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The length of the tar that they are of, in bytes.
    #[must_use]
    pub fn tar_len(&self) -> u64 {
        self.tar_len
    }

    /// The section of an index.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.digests.len() * DIGEST);
        out.extend_from_slice(&u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&u32::try_from(DIGEST).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(self.digests.as_flattened());
        out
    }

    /// Reads the section of an index of a tar of `tar_len` bytes.
    pub(super) fn decode(section: &[u8], tar_len: u64) -> Result<Self, IndexFault> {
        let fault = IndexFault::Malformed("table of chunk digests");
        let mut fields = Fields(section);
        let (chunk, digest) = (u64::from(fields.u32()?), usize::try_from(fields.u32()?));
        let (digests, rest) = fields.0.as_chunks::<DIGEST>();
        let fits = chunk == CHUNK_BYTES && digest == Ok(DIGEST) && rest.is_empty();
        if !fits || len_u64(digests.len()) != tar_len.div_ceil(CHUNK_BYTES) {
            return Err(fault);
        }
        let digests = digests.into();
        Ok(Self { tar_len, digests })
    }
}

/// Digests chunks as the tar's bytes pass, in pieces of any size.
#[derive(Debug, Default)]
pub struct ChunkHasher {
    chunk: Sha256,
    /// How many bytes of the chunk have passed.
    filled: usize,
    tar_len: u64,
    digests: Vec<Short>,
}

/// A chunk's length as a buffer size.
const CHUNK: usize = 32 << 10;

impl ChunkHasher {
    /// At the tar's beginning.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the tar's next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        self.tar_len = self.tar_len.saturating_add(len_u64(bytes.len()));
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at((CHUNK - self.filled).min(bytes.len()));
            self.chunk.update(piece);
            self.filled += piece.len();
            bytes = rest;
            if self.filled == CHUNK {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.digests.push(cut(self.chunk.finalize_reset().into()));
        self.filled = 0;
    }

    /// The digests of all that passed.
    #[must_use]
    pub fn finish(mut self) -> ChunkDigests {
        if self.filled > 0 {
            self.close();
        }
        ChunkDigests {
            tar_len: self.tar_len,
            digests: self.digests.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_known_by_all_of_its_bytes() {
        let tar: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        for piece in [1000, CHUNK, 100_000] {
            let mut hasher = ChunkHasher::new();
            tar.chunks(piece).for_each(|piece| hasher.feed(piece));
            let digests = hasher.finish();
            assert_eq!((digests.len(), digests.tar_len()), (4, 100_000));
            for (number, chunk) in (0..).zip(tar.chunks(CHUNK)) {
                assert!(digests.check(number, chunk));
                assert!(!digests.check(number, &chunk[1..]) && !digests.check(number + 1, &chunk[1..]));
                let mut other = chunk.to_vec();
                other[5] ^= 1;
                assert!(!digests.check(number, &other));
            }
            assert!(!digests.check(4, b"") && !digests.check(u64::MAX, b""));
            assert_eq!(ChunkDigests::decode(&digests.encode(), 100_000), Ok(digests.clone()));
            let fault = Err(IndexFault::Malformed("table of chunk digests"));
            assert_eq!(ChunkDigests::decode(&digests.encode(), 98_304), fault);
            assert_eq!(ChunkDigests::decode(&digests.encode()[..80], 100_000), fault);
        }
        assert!(ChunkHasher::new().finish().is_empty());
    }
}
