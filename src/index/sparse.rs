//! Sparse files' maps: which runs of a file are stored. In: (offset, length) pairs as the four formats give them. Out:
//! segments, checked, with their places in the tar.
//!
//! The four formats: GNU's own header and extension blocks (type `S`), and three in PAX records: 0.0 (pairs of repeated
//! keywords), 0.1 (one keyword) and 1.0 (decimal lines in front of the stored bytes). In all of them the runs are stored back
//! to back without padding, so a segment begins at any byte.

use super::entry::Segment;
use super::error::HeaderFault;
use crate::units::TarOffset;

/// The most runs that one file's map may have. More than any file system's own map of a real file; a hostile tar's 8 GiB of map
/// must not be kept.
pub(super) const MAX_RUNS: usize = 1 << 20;

/// A map that is being read.
#[derive(Debug, Default)]
pub(super) struct MapBuilder {
    runs: Vec<(u64, u64)>,
    /// Where the last run ends in the file.
    end: u64,
    stored: u64,
}

impl MapBuilder {
    pub(super) fn clear(&mut self) {
        *self = Self {
            runs: std::mem::take(&mut self.runs),
            ..Self::default()
        };
        self.runs.clear();
    }

    /// Adds a run.
    ///
    /// # Errors
    /// When it is negative, out of order, overlapping, beyond 63 bits or one too many.
    pub(super) fn push(&mut self, offset: i64, len: i64) -> Result<(), HeaderFault> {
        let fault = HeaderFault::Sparse;
        let offset = u64::try_from(offset).map_err(|_| fault("an offset is negative"))?;
        let len = u64::try_from(len).map_err(|_| fault("a length is negative"))?;
        if offset < self.end {
            return Err(fault("its pieces overlap or are out of order"));
        }
        // Both are below 2^63, so their sum fits.
        let end = offset + len;
        if end > i64::MAX.unsigned_abs() {
            return Err(fault("it reaches too far"));
        }
        self.stored += len; // The runs do not overlap, so their sum is at most `end`.
        let full = self.runs.len() == MAX_RUNS;
        match self.runs.last_mut() {
            _ if len == 0 => {}
            // GNU tar cuts long runs; stored back to back they are one.
            Some((start, known)) if *start + *known == offset => *known += len,
            _ if full => return Err(fault("it has too many pieces")),
            _ => self.runs.push((offset, len)),
        }
        self.end = end;
        Ok(())
    }

    /// Puts the map of a file of `size` bytes, whose `stored` bytes begin at `start`, into `out`.
    ///
    /// # Errors
    /// When it reaches beyond the file, or the tar holds more or fewer bytes than it speaks of.
    pub(super) fn finish(
        &self,
        size: u64,
        start: TarOffset,
        stored: u64,
        out: &mut Vec<Segment>,
    ) -> Result<(), HeaderFault> {
        if self.end > size {
            return Err(HeaderFault::Sparse("it reaches beyond the file's end"));
        }
        if self.stored != stored {
            return Err(HeaderFault::Sparse(
                "the tar does not hold as many bytes as it speaks of",
            ));
        }
        let mut at = start;
        out.extend(self.runs.iter().map(|&(file_offset, len)| {
            let segment = Segment {
                file_offset,
                tar_offset: at,
                len,
            };
            at = at.plus(len);
            segment
        }));
        Ok(())
    }
}

/// The decimal lines of format 1.0: how many runs, then an offset and a length for each.
#[derive(Debug, Default)]
pub(super) struct DecimalMap {
    /// The line that is being read.
    line: Vec<u8>,
    /// Numbers still to come; `None` before the first line.
    missing: Option<u64>,
    /// An offset that waits for its length.
    offset: Option<i64>,
}

impl DecimalMap {
    pub(super) fn clear(&mut self) {
        self.line.clear();
        self.missing = None;
        self.offset = None;
    }

    /// Takes one block of the map; true when it was the last, whose rest is padding.
    pub(super) fn block(&mut self, block: &[u8], map: &mut MapBuilder) -> Result<bool, HeaderFault> {
        // A number of 63 bits with zeros in front has room in this.
        const LONGEST_LINE: usize = 64;
        let fault = HeaderFault::Sparse("its lines are no numbers");
        for &byte in block {
            if byte != b'\n' {
                if self.line.len() == LONGEST_LINE {
                    return Err(fault);
                }
                self.line.push(byte);
                continue;
            }
            let number = super::number::decimal(&self.line).ok_or(fault)?;
            self.line.clear();
            let left = match (self.missing, self.offset.take()) {
                (None, _) => {
                    let runs = u64::try_from(number).map_err(|_| fault)?;
                    runs.checked_mul(2).ok_or(fault)?
                }
                (Some(left), None) => {
                    self.offset = Some(number);
                    left - 1
                }
                (Some(left), Some(offset)) => {
                    map.push(offset, number)?;
                    left - 1
                }
            };
            self.missing = Some(left);
            if left == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
