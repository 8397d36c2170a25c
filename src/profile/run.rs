//! What one start read. In: its reads, or a list of ranges. Out: the chunks that it touched, each once, in the order of their first
//! touches.

use std::collections::HashSet;
use std::time::Duration;

use super::RecordedRead;
use crate::cache::chunk::ChunkKey;
use crate::prefetch::ChunkRange;
use crate::units::LayerId;

/// A chunk and when it was first touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstTouch {
    /// The chunk.
    pub key: ChunkKey,
    /// Milliseconds since the first read.
    pub at_ms: u32,
}

/// The chunks that a start touched, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartRun {
    touches: Vec<FirstTouch>,
}

impl StartRun {
    /// Of recorded reads, which are in the order of time.
    #[must_use]
    pub fn of(reads: &[RecordedRead]) -> Self {
        let mut seen = HashSet::new();
        let mut touches = Vec::new();
        for read in reads {
            let at_ms = millis(read.at);
            for key in ChunkRange::of(read.layer, read.range).keys() {
                if seen.insert(key) {
                    touches.push(FirstTouch { key, at_ms });
                }
            }
        }
        Self { touches }
    }

    /// The touches, each chunk once, in order.
    #[must_use]
    pub fn touches(&self) -> &[FirstTouch] {
        &self.touches
    }

    /// What of it was in one layer, as a run of that layer alone.
    #[must_use]
    pub fn of_layer(&self, layer: LayerId) -> Self {
        let own = self.touches.iter().filter(|touch| touch.key.layer == layer);
        let alone = own.map(|touch| FirstTouch {
            key: ChunkKey {
                layer: LayerId(0),
                ..touch.key
            },
            ..*touch
        });
        Self {
            touches: alone.collect(),
        }
    }

    /// Whether nothing was touched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.touches.is_empty()
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::ReadFrom;
    use crate::units::{CHUNK_BYTES, TarOffset, TarRange};

    #[test]
    fn each_chunk_counts_once_and_first() {
        let read = |ms, layer, start, len| RecordedRead {
            at: Duration::from_millis(ms),
            layer: LayerId(layer),
            range: TarRange::new(TarOffset(start), len),
            from: ReadFrom::Memory,
            waited: None,
        };
        let run = StartRun::of(&[
            read(0, 0, CHUNK_BYTES - 1, 2),
            read(3, 1, 0, 1),
            read(5, 0, 0, 3 * CHUNK_BYTES),
            read(6, 1, 5, 0),
        ]);
        let seen: Vec<_> = run
            .touches()
            .iter()
            .map(|touch| (touch.at_ms, touch.key.layer.0, touch.key.index))
            .collect();
        assert_eq!(seen, [(0, 0, 0), (0, 0, 1), (3, 1, 0), (5, 0, 2)]);
    }
}
