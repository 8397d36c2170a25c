//! Walking a tar that is here: small reads at the headers, as few bytes of payload as possible.
//!
//! In: a local file. Out: its entries into a sink, and what it cost. Payload is never read but for what lies within a window
//! of a header, and that window follows the layer: wide where files are small, one header's worth where they are big.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::error::IndexError;
use super::len_u64;
use super::parser::{EndOfArchive, Parser};
use super::sink::EntrySink;
use crate::units::TarOffset;

/// What a walk did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// The tar's length in bytes.
    pub tar_len: u64,
    /// Whether the end was marked.
    pub end: EndOfArchive,
    /// How many reads or requests it took.
    pub reads: u64,
    /// The bytes that came with them.
    pub bytes_read: u64,
}

/// Told how far a walk has come: the position reached and the tar's length, both in bytes, zero for an unknown length. Called
/// often; must be quick.
pub type Progress<'a> = &'a mut dyn FnMut(TarOffset, u64);

/// The narrowest and the widest window, in bytes. A system call costs about as much as copying 4 KiB.
const NARROW: usize = 2 << 10;
const WIDE: usize = 128 << 10;

/// A payload that reaches no further than this behind a window is no jump.
const NEAR: u64 = 1 << 10;

/// How often progress is told, in windows.
const PROGRESS_EVERY: u64 = 256;

/// Walks the tar in `file`, whose length is `len` bytes.
///
/// # Errors
/// What is wrong with the tar, what the system says when it cannot be read, what the sink returns.
pub fn local(
    file: &File,
    len: u64,
    sink: &mut (impl EntrySink + ?Sized),
    progress: Progress<'_>,
) -> Result<Walked, IndexError> {
    let mut parser = Parser::new();
    let mut buffer = vec![0; WIDE];
    let mut window = NARROW;
    let mut walked = Walked {
        tar_len: len,
        end: EndOfArchive::Missing,
        reads: 0,
        bytes_read: 0,
    };
    let mut window_end = 0;
    while let Some(at) = parser.wants() {
        if at.0 >= len {
            break;
        }
        // Reading on near the end of the last window means that headers lie close together; a jump means they do not.
        let near = at.0 - window_end <= NEAR;
        window = if near {
            (window * 2).min(WIDE)
        } else {
            (window / 2).max(NARROW)
        };
        let room = usize::try_from(len - at.0).unwrap_or(usize::MAX);
        let want = window.max(parser.wants_len()).min(room).min(WIDE);
        let got = loop {
            match file.read_at(&mut buffer[..want], at.0) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                outcome => break outcome.map_err(|source| IndexError::Read { at, source })?,
            }
        };
        if got == 0 {
            // Somebody cut the file while it was read.
            parser.finish(at)?;
            return Err(IndexError::Truncated {
                len: at,
                needs: TarOffset(len),
                what: "the file",
                path: None,
            });
        }
        walked.reads += 1;
        walked.bytes_read += len_u64(got);
        parser.feed(at, &buffer[..got], sink)?;
        window_end = at.0 + len_u64(got);
        if walked.reads.is_multiple_of(PROGRESS_EVERY) {
            progress(at, len);
        }
    }
    walked.end = parser.finish(TarOffset(len))?;
    progress(TarOffset(len), len);
    Ok(walked)
}
