//! The tar, rebuilt from its index and its payload. In: an index that has the header bytes, and a way to read stored bytes of
//! files. Out: the tar, bit for bit as its maker wrote it.

use std::io::{self, Write};

use super::cold::ColdPart;
use super::digests::ChunkDigests;
use super::error::{IndexError, IndexFault};
use super::reader::Index;
use super::{format, len_u64};
use crate::units::{CHUNK_BYTES, TarOffset};

/// Why a tar cannot be rebuilt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebuildError {
    /// The index cannot be used.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The index does not have what is between files.
    #[error("the index does not have the tar's header bytes; make one with `tarblk index --full`")]
    NoHeaders,
    /// The index's header bytes are not as many as there are between files.
    #[error("the index contradicts itself: its header bytes do not fit its entries")]
    Headers,
    /// Payload cannot be read.
    #[error("cannot read the layer at byte {at} of the tar: {source}")]
    Payload {
        /// The position in the tar, in bytes.
        at: TarOffset,
        /// The reader's error.
        source: io::Error,
    },
    /// What came together is not what the index's digests are of.
    #[error("bytes {at} to {} of the tar are not those that the index was made from", .at.plus(CHUNK_BYTES))]
    Mismatch {
        /// The first byte of the chunk.
        at: TarOffset,
    },
    /// The tar cannot be written.
    #[error("cannot write the tar: {0}")]
    Write(io::Error),
}

/// Reads stored bytes of files: fills the buffer with the tar's bytes from a position on.
pub type Payload<'a> = &'a mut dyn FnMut(TarOffset, &mut [u8]) -> io::Result<()>;

/// Writes the tar that `index` was made from to `out`. `index` must be whole; where it has chunk digests, nothing is written
/// that does not match them.
///
/// # Errors
/// [`RebuildError`].
pub fn rebuild_tar<B: AsRef<[u8]>>(
    index: &Index<B>,
    payload: Payload<'_>,
    out: &mut dyn Write,
) -> Result<(), RebuildError> {
    if index.is_of_contents() {
        return Err(IndexError::from(IndexFault::MadeUp).into());
    }
    if !index.cold().has(ColdPart::Headers) {
        return Err(RebuildError::NoHeaders);
    }
    let mut headers = Headers {
        index,
        next: 0,
        piece: Vec::new(),
        used: 0,
    };
    let mut tar = Checked {
        out,
        digests: index.chunk_digests(),
        number: 0,
        chunk: Vec::new(),
    };
    let mut at = 0;
    let mut buffer = vec![0; 1 << 18];
    let mut entries = index.entries()?;
    while let Some(entry) = entries.next_entry()? {
        let range = entry.payload();
        if range.is_empty() {
            continue;
        }
        headers.copy(range.start.since(TarOffset(at)), &mut tar)?;
        at = range.start.0;
        while at < range.end().0 {
            let len = usize::try_from(range.end().0 - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let piece = &mut buffer[..len];
            payload(TarOffset(at), piece).map_err(|source| RebuildError::Payload {
                at: TarOffset(at),
                source,
            })?;
            tar.put(piece)?;
            at += len_u64(len);
        }
    }
    headers.copy(index.tar_len() - at, &mut tar)?;
    headers.end()?;
    tar.flush()
}

/// The header bytes, a piece at a time.
struct Headers<'a, B> {
    index: &'a Index<B>,
    next: usize,
    piece: Vec<u8>,
    used: usize,
}

impl<B: AsRef<[u8]>> Headers<'_, B> {
    fn copy(&mut self, mut len: u64, tar: &mut Checked<'_>) -> Result<(), RebuildError> {
        while len > 0 {
            if self.used == self.piece.len() && !self.turn()? {
                return Err(RebuildError::Headers);
            }
            let rest = &self.piece[self.used..];
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            tar.put(&rest[..part])?;
            self.used += part;
            len -= len_u64(part);
        }
        Ok(())
    }

    /// Goes to the next piece; false behind the last one.
    fn turn(&mut self) -> Result<bool, RebuildError> {
        let Some(piece) = self.index.cold_piece(ColdPart::Headers, self.next)? else {
            return Ok(false);
        };
        // All but the last are full, so that no empty ones go round here for ever.
        let last = self.next + 1 == self.index.cold().pieces(ColdPart::Headers);
        if piece.is_empty() || !last && piece.len() != format::PIECE {
            return Err(RebuildError::Headers);
        }
        self.next += 1;
        self.piece = piece;
        self.used = 0;
        Ok(true)
    }

    fn end(mut self) -> Result<(), RebuildError> {
        if self.used < self.piece.len() || self.turn()? {
            return Err(RebuildError::Headers);
        }
        Ok(())
    }
}

/// Lets through whole chunks that match their digests.
struct Checked<'a> {
    out: &'a mut dyn Write,
    digests: Option<&'a ChunkDigests>,
    number: u64,
    chunk: Vec<u8>,
}

impl Checked<'_> {
    fn put(&mut self, mut bytes: &[u8]) -> Result<(), RebuildError> {
        const CHUNK: usize = 32 << 10;
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at((CHUNK - self.chunk.len()).min(bytes.len()));
            self.chunk.extend_from_slice(head);
            bytes = rest;
            if self.chunk.len() == CHUNK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RebuildError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        if self
            .digests
            .is_some_and(|digests| !digests.check(self.number, &self.chunk))
        {
            return Err(RebuildError::Mismatch {
                at: TarOffset(self.number.saturating_mul(CHUNK_BYTES)),
            });
        }
        self.out.write_all(&self.chunk).map_err(RebuildError::Write)?;
        self.chunk.clear();
        self.number += 1;
        Ok(())
    }
}
