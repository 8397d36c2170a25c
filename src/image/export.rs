//! A whole image as a file, sparse where it is zero. In: an image and a way to read the layer. Out: the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{BlockImage, Origin};
use crate::units::{BLOCK_SIZE, LayerId, TarOffset};

/// How many blocks are looked up and written at a time.
const BATCH_BLOCKS: u64 = 1024;

/// Writes the image into `file`, which should be empty: where the image is zero nothing is written. `read` fills its
/// buffer with a layer's bytes from an offset on. Returns how many bytes were written.
///
/// # Errors
/// What writing the file or `read` reports.
pub fn export(
    image: &dyn BlockImage,
    file: &File,
    read: &mut dyn FnMut(LayerId, TarOffset, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    file.set_len(image.len())?;
    let block_len = usize::try_from(BLOCK_SIZE).expect("a block fits memory");
    let mut pieces = Vec::new();
    let mut batch = Vec::new();
    let mut written = 0;
    let blocks = image.len() / BLOCK_SIZE;
    for first in (0..blocks).step_by(usize::try_from(BATCH_BLOCKS).expect("a thousand")) {
        pieces.clear();
        image.pieces(first, BATCH_BLOCKS.min(blocks - first), &mut pieces);
        let mut at = first * BLOCK_SIZE;
        for piece in &pieces {
            let len = usize::try_from(piece.len).map_err(io::Error::other)?;
            if piece.origin != Origin::Zero {
                batch.clear();
                batch.resize(len, 0);
                match piece.origin {
                    Origin::Layer(layer, offset) => read(layer, offset, &mut batch)?,
                    _ => {
                        for (block, out) in (at / BLOCK_SIZE..).zip(batch.chunks_exact_mut(block_len)) {
                            image.fill_metadata(block, out);
                        }
                    }
                }
                written += write_sparse(file, at, &batch, block_len)?;
            }
            at += piece.len;
        }
    }
    Ok(written)
}

/// Writes the runs of blocks that are not all zero.
fn write_sparse(file: &File, at: u64, bytes: &[u8], block_len: usize) -> io::Result<u64> {
    let mut written = 0;
    let mut start = 0;
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    while start < bytes.len() {
        let block_end = |at: usize| (at + block_len).min(bytes.len());
        let mut end = start;
        while end < bytes.len() && !is_zero(&bytes[end..block_end(end)]) {
            end = block_end(end);
        }
        let position = |offset: usize| at + u64::try_from(offset).expect("a batch is small");
        file.write_all_at(&bytes[start..end], position(start))?;
        written += position(end) - position(start);
        start = end;
        while start < bytes.len() && is_zero(&bytes[start..block_end(start)]) {
            start = block_end(start);
        }
    }
    Ok(written)
}
