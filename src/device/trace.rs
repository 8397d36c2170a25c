//! What was read of a device while it started. In: the reads that were recorded, and a map of the image's files. Out: the same with the
//! files' names, as commands show it, and as a file, for when the device is gone.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::State;
use crate::checksum::crc32c;
use crate::image::{FileId, FileMap};
use crate::profile::{ReadFrom, RecordedRead};
use crate::units::{LayerId, TarOffset, TarRange, len_u64};

/// No trace is longer, in bytes of JSON: what is more than that is left out, the last first.
pub const MAX_TRACE_BYTES: u64 = 12 << 20;

/// Begins a trace's file, with the version of its form.
const MAGIC: &str = "tarblk trace 1 ";

/// A trace has no more reads than this, which bounds its length.
const MOST_READS: usize = 48 << 10;

/// A read goes on with the one before if it begins so soon after it, in microseconds.
const SAME_MOMENT_US: u64 = 1000;

/// What was read of a device while it started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The device's name.
    pub name: String,
    /// The layer or image, as it was named.
    pub source: String,
    /// Which of the devices that had the name.
    pub instance: u64,
    /// Whether the start is over; else this is what there was until now.
    pub is_over: bool,
    /// The files that were read, in the order of their first reads.
    pub files: Vec<TracedFile>,
    /// The reads, in the order in which they were asked for. What was read on at once, from the same place, is one.
    pub reads: Vec<TracedRead>,
    /// How many more there were.
    pub left_out: u64,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedFile {
    /// Its path in the image, from its root.
    pub path: String,
    /// The layer that holds it, counted from 0, the lowest.
    pub layer: u32,
    /// Where it begins in the layer's tar, in bytes.
    pub tar_offset: u64,
    /// How many bytes of tar from its first to its last.
    pub size: u64,
}

/// A read of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedRead {
    /// When it was asked for: microseconds since the first read.
    pub at_us: u64,
    /// Which of the trace's files; none if no file has these bytes.
    pub file: Option<u32>,
    /// The layer, counted from 0, the lowest.
    pub layer: u32,
    /// Where in the layer's tar it begins, in bytes.
    pub tar_offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// Where they were.
    pub from: ReadFrom,
    /// How long it waited for them, in microseconds; none if it still waits.
    pub waited_us: Option<u64>,
}

impl Trace {
    /// Of the reads of a device, in the order of time.
    #[must_use]
    pub fn new(state: &State, reads: &[RecordedRead], map: Option<&dyn FileMap>, is_over: bool) -> Self {
        let mut trace = Self {
            name: state.name.clone(),
            source: state.source.clone(),
            instance: state.instance,
            is_over,
            files: Vec::new(),
            reads: Vec::new(),
            left_out: 0,
        };
        let mut known: HashMap<FileId, u32> = HashMap::new();
        for read in reads {
            let stored = map.and_then(|map| map.file_at(read.layer, read.range.start));
            let file = stored.map(|stored| {
                *known.entry(stored.file).or_insert_with(|| {
                    let path = map.and_then(|map| map.path(stored.file)).unwrap_or_default();
                    trace.files.push(TracedFile {
                        path: String::from_utf8_lossy(&path).into_owned(),
                        layer: stored.layer.0,
                        tar_offset: stored.range.start.0,
                        size: stored.range.len,
                    });
                    u32::try_from(trace.files.len() - 1).unwrap_or(u32::MAX)
                })
            });
            trace.push(TracedRead {
                at_us: micros(read.at),
                file,
                layer: read.layer.0,
                tar_offset: read.range.start.0,
                bytes: read.range.len,
                from: read.from,
                waited_us: read.waited.map(micros),
            });
        }
        trace
    }

    /// Adds a read, to the last one if it goes on with that.
    fn push(&mut self, read: TracedRead) {
        if let Some(last) = self.reads.last_mut()
            && (last.file, last.layer, last.from) == (read.file, read.layer, read.from)
            && last.tar_offset + last.bytes == read.tar_offset
            && (last.waited_us, read.waited_us) == (Some(0), Some(0))
            && read.at_us.saturating_sub(last.at_us) < SAME_MOMENT_US
        {
            last.bytes += read.bytes;
        } else if self.reads.len() < MOST_READS {
            self.reads.push(read);
        } else {
            self.left_out += 1;
        }
    }

    /// When the last read was over: microseconds since the first.
    #[must_use]
    pub fn lasted_us(&self) -> u64 {
        let ends = self.reads.iter().map(|read| read.at_us + read.waited_us.unwrap_or(0));
        ends.max().unwrap_or(0)
    }

    /// It as a file: a line with a checksum, then JSON.
    ///
    /// # Errors
    /// None that could happen: numbers and names are always JSON.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let json = serde_json::to_string(self)?;
        Ok(format!("{MAGIC}{:08x}\n{json}", crc32c(json.as_bytes())).into_bytes())
    }

    /// What [`to_bytes`](Self::to_bytes) made; none if it is damaged, or of another version.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (line, json) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
        let sum = u32::from_str_radix(line.strip_prefix(MAGIC)?, 16).ok()?;
        (sum == crc32c(json.as_bytes())).then(|| serde_json::from_str(json).ok())?
    }

    /// The reads as they were recorded, as far as the trace has them.
    #[must_use]
    pub fn recorded(&self) -> Vec<RecordedRead> {
        let one = |read: &TracedRead| RecordedRead {
            at: Duration::from_micros(read.at_us),
            layer: LayerId(read.layer),
            range: TarRange::new(TarOffset(read.tar_offset), read.bytes),
            from: read.from,
            waited: read.waited_us.map(Duration::from_micros),
        };
        self.reads.iter().map(one).collect()
    }

    /// How many files were read.
    #[must_use]
    pub fn file_count(&self) -> u64 {
        len_u64(self.files.len())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
