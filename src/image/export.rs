//! A whole image as a file, sparse where it is zero. In: an image and a way to read the layer. Out: the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{BlockImage, Origin};
use crate::units::{BLOCK_SIZE, LayerId, TarOffset};

const BLOCK: usize = 4096;
/// How many blocks are assembled and written at a time.
const BATCH_BLOCKS: usize = 1024;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Fills its buffer with a layer's bytes from an offset on.
pub type ReadLayer<'a> = &'a mut dyn FnMut(LayerId, TarOffset, &mut [u8]) -> io::Result<()>;

/// Writes the image into `file`, which should be empty: where the image is zero nothing is written. Returns how many
/// bytes were written.
///
/// # Errors
/// What writing the file or `read` reports.
pub fn export(image: &dyn BlockImage, file: &File, read: ReadLayer<'_>) -> io::Result<u64> {
    file.set_len(image.len())?;
    let mut pieces = Vec::new();
    let mut batch = vec![0; BATCH_BLOCKS * BLOCK];
    let mut written = 0;
    let blocks = image.len() / BLOCK_SIZE;
    for first in (0..blocks).step_by(BATCH_BLOCKS) {
        let count = (blocks - first).min(len_u64(BATCH_BLOCKS));
        pieces.clear();
        image.pieces(first, count, &mut pieces);
        if pieces.iter().all(|piece| piece.origin == Origin::Zero) {
            continue;
        }
        let mut at = 0;
        for piece in &pieces {
            let len = usize::try_from(piece.len).map_err(io::Error::other)?;
            let out = &mut batch[at..at + len];
            match piece.origin {
                Origin::Zero => out.fill(0),
                Origin::Layer(layer, offset) => read(layer, offset, out)?,
                Origin::Metadata => {
                    for (block, out) in (first + len_u64(at / BLOCK)..).zip(out.chunks_exact_mut(BLOCK)) {
                        image.fill_metadata(block, out);
                    }
                }
            }
            at += len;
        }
        written += write_sparse(file, first * BLOCK_SIZE, &batch[..at])?;
    }
    Ok(written)
}

/// Writes the runs of blocks that are not all zero.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    let mut blocks = bytes
        .chunks(BLOCK)
        .map(|block| *block == ZEROS[..block.len()])
        .enumerate()
        .peekable();
    while let Some((start, is_zero)) = blocks.next() {
        if is_zero {
            continue;
        }
        let mut end = start + 1;
        while blocks.next_if(|(_, is_zero)| !is_zero).is_some() {
            end += 1;
        }
        let run = &bytes[start * BLOCK..bytes.len().min(end * BLOCK)];
        file.write_all_at(run, at + len_u64(start * BLOCK))?;
        written += len_u64(run.len());
    }
    Ok(written)
}

fn len_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
