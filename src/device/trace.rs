//! What was read of a device while it started. In: the reads that were recorded, and a map of the image's files. Out: the same with the
//! files' names, as commands show it, and as a file, for when the device is gone.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::State;
use crate::checksum::crc32c;
use crate::image::{FileId, FileMap, StoredFile};
use crate::profile::{ReadFrom, RecordedRead};
use crate::units::{LayerId, TarOffset, TarRange, len_u64};

/// No trace is longer, in bytes of JSON: what is more than that is left out.
pub const MAX_TRACE_BYTES: u64 = 12 << 20;
/// What a read takes of that at most...
const READ_BYTES: u64 = 200;
/// ...a file, besides its path...
const FILE_BYTES: u64 = 120;
/// ...and all the rest, besides the two names.
const HEAD_BYTES: u64 = 1024;

/// Begins a trace's file, with the version of its form.
const MAGIC: &str = "tarblk trace 1 ";

/// A read goes on with the one before if it begins so soon after it, in microseconds.
const SAME_MOMENT_US: u64 = 1000;

/// What was read of a device while it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
            ..Self::default()
        };
        trace.add(reads, map);
        trace
    }

    /// Adds reads, as far as there is room.
    fn add(&mut self, reads: &[RecordedRead], map: Option<&dyn FileMap>) {
        let mut room = Room(MAX_TRACE_BYTES - HEAD_BYTES);
        room.take(json_len(&self.name) + json_len(&self.source));
        let mut known: HashMap<FileId, u32> = HashMap::new();
        for read in reads {
            let stored = map.and_then(|map| map.file_at(read.layer, read.range.start));
            let number = stored.map(|stored| {
                if let Some(number) = known.get(&stored.file) {
                    return Some(*number);
                }
                let path = map.and_then(|map| map.path(stored.file)).unwrap_or_default();
                let number = self.add_file(stored, &path, &mut room)?;
                known.insert(stored.file, number);
                Some(number)
            });
            let file = match number {
                Some(None) => {
                    self.left_out += 1;
                    continue;
                }
                Some(number) => number,
                None => None,
            };
            let read = TracedRead {
                at_us: micros(read.at),
                file,
                layer: read.layer.0,
                tar_offset: read.range.start.0,
                bytes: read.range.len,
                from: read.from,
                waited_us: read.waited.map(micros),
            };
            if !self.goes_on(&read) {
                if room.take(READ_BYTES) {
                    self.reads.push(read);
                } else {
                    self.left_out += 1;
                }
            }
        }
    }

    /// Adds a file, and returns its number; none if there is no room for it and a read.
    fn add_file(&mut self, stored: StoredFile, path: &[u8], room: &mut Room) -> Option<u32> {
        let path = String::from_utf8_lossy(path).into_owned();
        if !room.take(FILE_BYTES + json_len(&path)) {
            return None;
        }
        let number = u32::try_from(self.files.len()).ok()?;
        self.files.push(TracedFile {
            path,
            layer: stored.layer.0,
            tar_offset: stored.range.start.0,
            size: stored.range.len,
        });
        Some(number)
    }

    /// Whether a read goes on with the last one; then it is added to that.
    fn goes_on(&mut self, read: &TracedRead) -> bool {
        match self.reads.last_mut() {
            Some(last)
                if (last.file, last.layer, last.from) == (read.file, read.layer, read.from)
                    && last.tar_offset + last.bytes == read.tar_offset
                    && (last.waited_us, read.waited_us) == (Some(0), Some(0))
                    && read.at_us.saturating_sub(last.at_us) < SAME_MOMENT_US =>
            {
                last.bytes += read.bytes;
                true
            }
            _ => false,
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

/// So many bytes of JSON are left.
struct Room(u64);

impl Room {
    /// Takes so many of them, if there are.
    fn take(&mut self, bytes: u64) -> bool {
        match self.0.checked_sub(bytes) {
            Some(left) => {
                self.0 = left;
                true
            }
            None => false,
        }
    }
}

/// How long a text is as JSON, with what has to be escaped in it.
fn json_len(text: &str) -> u64 {
    // Texts are always JSON.
    serde_json::to_string(text).map_or(u64::MAX, |json| len_u64(json.len()))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::image::DirectoryId;

    /// A file each 4 KiB, with names that are as long as JSON can make them.
    #[derive(Debug)]
    struct LongNames;

    impl FileMap for LongNames {
        fn file_at(&self, layer: LayerId, at: TarOffset) -> Option<StoredFile> {
            let number = at.0 / 4096;
            Some(StoredFile {
                file: FileId(u32::try_from(number).ok()?),
                directory: DirectoryId(0),
                layer,
                range: TarRange::new(TarOffset(number * 4096), 4096),
            })
        }

        fn neighbours(&self, _: FileId, _: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {}

        fn resolve(&self, _: DirectoryId, _: &[u8]) -> Option<StoredFile> {
            None
        }

        fn path(&self, FileId(number): FileId) -> Option<Vec<u8>> {
            Some([&[1; 4000][..], number.to_string().as_bytes()].concat())
        }
    }

    fn reads(count: u64) -> Vec<RecordedRead> {
        let read = |n| RecordedRead {
            at: Duration::from_secs(n),
            layer: LayerId(u32::MAX),
            range: TarRange::new(TarOffset(n * 4096), 512),
            from: ReadFrom::Memory,
            waited: Some(Duration::from_micros(u64::MAX)),
        };
        (0..count).map(read).collect()
    }

    #[test]
    fn no_layer_makes_a_trace_too_long() {
        let long_names: &dyn FileMap = &LongNames;
        for (count, map) in [(20_000, Some(long_names)), (80_000, None)] {
            let mut trace = Trace::default();
            trace.add(&reads(count), map);
            let bytes = trace.to_bytes().unwrap();
            assert!(len_u64(bytes.len()) <= MAX_TRACE_BYTES, "{} bytes", bytes.len());
            assert!(!trace.reads.is_empty() && trace.left_out > 0);
            assert_eq!(len_u64(trace.reads.len()) + trace.left_out, count);
            assert_eq!(Trace::parse(&bytes), Some(trace));
        }
    }
}
