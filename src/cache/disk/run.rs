//! Writing runs of chunks to a data file. In: chunks that lie side by side. Out: the same bytes in the file, not yet durable.
//!
//! Long runs go past the page cache: whoever reads a device has its bytes in the device's own page cache already, and a second
//! copy costs the memory of it and more processor time than everything else about the disk cache. What is shorter, what the file system
//! does not take, what comes faster than the disk takes it, and what is still to be read goes through the page cache.

use std::io;

use super::dir::CacheFile;
use crate::units::len_u64;

/// Where direct writes may begin and end, in the file and in memory: a page, which no disk's blocks are longer than.
const ALIGNMENT: usize = 4096;
/// Shorter runs are cheaper, and find neighbours, in the page cache.
const LONG_RUN: usize = 256 << 10;

/// What a writer of data files keeps from run to run. For one thread at a time that may wait for the disk.
#[derive(Debug, Default)]
pub(crate) struct RunWriter {
    /// Which file was written last, and the same file opened once more for direct writes; none where that is not to be had.
    direct: Option<(u64, Option<CacheFile>)>,
    /// One run in one piece; aligned memory begins somewhere in its first page.
    staging: Vec<u8>,
}

impl RunWriter {
    /// Writes `pieces` to `file`, where they lie side by side from byte `at` on; past the page cache if `direct` is wanted and makes
    /// sense.
    ///
    /// # Errors
    /// When not all of it was written. What was written is not to be used.
    pub(super) fn write(&mut self, file: &CacheFile, at: u64, pieces: &[&[u8]], direct: bool) -> io::Result<()> {
        if let [only] = pieces {
            return file.write_all_at(only, at);
        }
        let len = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        if self.staging.len() < len + ALIGNMENT {
            self.staging = vec![0; len.next_power_of_two() + ALIGNMENT];
        }
        // Memory that cannot be aligned, which only an interpreter has, is found out by the kernel.
        let start = self.staging.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let run = &mut self.staging[start..start + len];
        let mut filled = 0;
        for piece in pieces {
            run[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        }
        let mut done = 0;
        if direct && len >= LONG_RUN {
            if self.direct.as_ref().is_none_or(|(id, _)| *id != file.id()) {
                self.direct = Some((file.id(), file.direct().ok()));
            }
            let most = len - len % ALIGNMENT;
            if let Some((_, direct)) = &mut self.direct
                && let Some(past_the_cache) = direct
            {
                match past_the_cache.write_all_at(&run[..most], at) {
                    Ok(()) => done = most,
                    Err(error) if is_unfit(&error) => *direct = None,
                    Err(error) => return Err(error),
                }
            }
        }
        if done == len {
            return Ok(());
        }
        file.write_all_at(&run[done..], at + len_u64(done))
    }
}

/// Whether it is the way of writing that was refused.
fn is_unfit(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn bytes(len: usize, salt: usize) -> Vec<u8> {
        (0..len).map(|n| u8::try_from((n * 31 + salt) % 251).unwrap()).collect()
    }

    /// Runs of every kind, in an order that is not the file's: all are where they belong, and nothing else is.
    fn runs_end_up_in_place(dir: &std::path::Path) {
        let file = CacheFile::own(tempfile::tempfile_in(dir).unwrap()).unwrap();
        file.set_len(8 << 20).unwrap();
        let mut writer = RunWriter::default();
        let mut expected = vec![0; 8 << 20];
        for (at, len, direct) in [
            (4 << 20, 1 << 20, true),
            (0, 32 << 10, true),
            (1 << 20, LONG_RUN, true),
            (2 << 20, LONG_RUN + 777, true),
            (6 << 20, 1 << 20, false),
            // In the middle of a page: no direct write, but a write.
            ((7 << 20) + 100, LONG_RUN, true),
        ] {
            let run = bytes(len, at);
            let whole = u64::try_from(at).unwrap();
            let pieces: Vec<&[u8]> = run.chunks(10_007).collect();
            writer.write(&file, whole, &pieces, direct).unwrap();
            expected[at..at + len].copy_from_slice(&run);
        }
        let mut found = vec![0; 8 << 20];
        file.file().read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn runs_end_up_in_place_on_disk() {
        runs_end_up_in_place(&std::env::temp_dir());
    }

    #[test]
    fn runs_end_up_in_place_in_memory() {
        // Where direct writes are refused, or are like any other, depending on the kernel.
        let shm = std::path::Path::new("/dev/shm");
        if shm.is_dir() {
            runs_end_up_in_place(shm);
        }
    }
}
