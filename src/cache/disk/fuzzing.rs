//! Map files, for fuzzing and tests.

use super::map::{self, About, ChunkMap, Identity, Label, Protection};
use crate::cache::chunk::chunk_count;
use crate::units::CHUNK_BYTES;

/// What a map file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The layer's length in bytes.
    pub size: u64,
    /// The chunks that are there.
    pub held: Vec<u32>,
    /// The same map, written.
    pub again: Vec<u8>,
}

/// A map file of a layer of `count` chunks, of which `held` are there.
#[must_use]
pub fn map(count: u32, held: &[u32], sealed: bool, name: &str, digest: &str) -> Vec<u8> {
    let identity = Identity {
        size: u64::from(count) * CHUNK_BYTES,
        key: [7; 32],
        nonce: [9; 16],
    };
    let map = ChunkMap::new(count);
    for index in held {
        map.put(*index, index.wrapping_mul(77));
    }
    let about = About {
        sealed,
        // A protected one has a digest of its own, made of the layer's here.
        protection: digest
            .bytes()
            .next()
            .filter(|first| *first % 2 == 1)
            .map(|byte| Protection {
                file: [byte; 32],
                digests: [!byte; 32],
            }),
        label: Label::new(name, digest),
    };
    map::encode(&identity, &about, &map)
}

/// Reads a map file, if it is one.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Read> {
    let decoded = map::decode(bytes, chunk_count)?;
    let count = chunk_count(decoded.identity.size)?;
    Some(Read {
        size: decoded.identity.size,
        held: (0..count).filter(|index| decoded.map.bits.has(*index)).collect(),
        again: map::encode(&decoded.identity, &decoded.about, &decoded.map),
    })
}
