//! Which chunks of a layer a data file holds, in memory and as the bytes of a map file.
//!
//! After a restart the map file alone says what a data file holds. It is little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `TARBLKMP` |
//! | 4 | version, 2 |
//! | 4 | bytes in a chunk |
//! | 8 | bytes in the layer |
//! | 32 | the layer's key |
//! | 16 | the data file's nonce |
//! | 4 | 1 when the whole layer is there and was checked against its digest, else 0 |
//! | count / 8, rounded up | one bit a chunk, the lowest first; bits past the last are zero |
//! | 4 | CRC-32C of all before it |

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::{CHUNK_BYTES, len_usize};

const MAGIC: &[u8; 8] = b"TARBLKMP";
const VERSION: u32 = 2;
const HEAD: usize = 8 + 4 + 4 + 8 + 32 + 16 + 4;

/// One bit a chunk, set by one thread while others look.
#[derive(Debug)]
pub(crate) struct Bits {
    words: Box<[AtomicU64]>,
    count: u32,
    /// How many are set.
    set: AtomicU64,
}

impl Bits {
    pub(crate) fn new(count: u32) -> Self {
        let words = std::iter::repeat_with(|| AtomicU64::new(0)).take(len_usize(u64::from(count).div_ceil(64)));
        Self {
            words: words.collect(),
            count,
            set: AtomicU64::new(0),
        }
    }

    fn place(index: u32) -> (usize, u64) {
        (len_usize(u64::from(index / 64)), 1 << (index % 64))
    }

    /// Acquire: whoever sees the bit sees what was written before it was set.
    pub(crate) fn has(&self, index: u32) -> bool {
        let (word, bit) = Self::place(index);
        index < self.count && self.words[word].load(Ordering::Acquire) & bit != 0
    }

    pub(crate) fn has_all(&self, first: u32, end: u32) -> bool {
        (first..end).all(|index| self.has(index))
    }

    pub(crate) fn set(&self, index: u32) {
        let (word, bit) = Self::place(index);
        if index < self.count {
            let before = self.words[word].fetch_or(bit, Ordering::Release);
            if before & bit == 0 {
                self.set.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn clear(&self, index: u32) {
        let (word, bit) = Self::place(index);
        if index < self.count {
            let before = self.words[word].fetch_and(!bit, Ordering::Release);
            if before & bit != 0 {
                self.set.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn count_set(&self) -> u64 {
        self.set.load(Ordering::Relaxed)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count_set() >= u64::from(self.count)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())
            .collect();
        bytes.truncate(len_usize(u64::from(self.count).div_ceil(8)));
        bytes
    }

    fn from_bytes(count: u32, bytes: &[u8]) -> Option<Self> {
        if bytes.len() != len_usize(u64::from(count).div_ceil(8)) {
            return None;
        }
        let bits = Self::new(count);
        for (word, bytes) in bits.words.iter().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            let held = u64::from_le_bytes(padded);
            word.store(held, Ordering::Relaxed);
            bits.set.fetch_add(held.count_ones().into(), Ordering::Relaxed);
        }
        let past_the_end = (count..count.next_multiple_of(64)).any(|index| {
            let (word, bit) = Self::place(index);
            bits.words
                .get(word)
                .is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
        });
        (!past_the_end).then_some(bits)
    }
}

/// What a map file says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The layer's length in bytes.
    pub(crate) size: u64,
    /// The layer's key.
    pub(crate) key: [u8; 32],
    /// Which data file.
    pub(crate) nonce: [u8; 16],
}

/// The map file's bytes.
pub(crate) fn encode(identity: &Identity, sealed: bool, bits: &Bits) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + bits.words.len() * 8 + 4);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&identity.size.to_le_bytes());
    out.extend_from_slice(&identity.key);
    out.extend_from_slice(&identity.nonce);
    out.extend_from_slice(&u32::from(sealed).to_le_bytes());
    out.extend_from_slice(&bits.to_bytes());
    let sum = crc32c::crc32c(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Reads a map file for a layer of `count` chunks: whether it is sealed, and its chunks. `None` for anything that is not
/// exactly a map for `identity`.
pub(crate) fn decode(bytes: &[u8], identity: &Identity, count: u32) -> Option<(bool, Bits)> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    if crc32c::crc32c(body).to_le_bytes() != sum {
        return None;
    }
    let (head, bits) = body.split_at_checked(HEAD)?;
    let is = |sealed| head == &encode(identity, sealed, &Bits::new(0))[..HEAD];
    let sealed = is(true);
    if !sealed && !is(false) {
        return None;
    }
    Some((sealed, Bits::from_bytes(count, bits)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        size: 100 * CHUNK_BYTES,
        key: [7; 32],
        nonce: [9; 16],
    };

    fn some() -> Bits {
        let bits = Bits::new(100);
        for index in [0, 5, 63, 64, 99] {
            bits.set(index);
        }
        bits
    }

    #[test]
    fn what_is_written_is_read() {
        assert!(decode(&encode(&IDENTITY, true, &some()), &IDENTITY, 100).unwrap().0);
        let (sealed, back) = decode(&encode(&IDENTITY, false, &some()), &IDENTITY, 100).unwrap();
        assert!(!sealed);
        let set: Vec<u32> = (0..200).filter(|index| back.has(*index)).collect();
        assert_eq!(set, [0, 5, 63, 64, 99]);
        assert_eq!(back.count_set(), 5);
        back.clear(5);
        assert!(!back.has(5));
    }

    #[test]
    fn nothing_else_is_believed() {
        let good = encode(&IDENTITY, false, &some());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(
                decode(&bad, &IDENTITY, 100).is_none(),
                "a flipped bit in byte {at} passed"
            );
            assert!(decode(&good[..at], &IDENTITY, 100).is_none(), "{at} bytes passed");
        }
        assert!(
            decode(
                &good,
                &Identity {
                    nonce: [8; 16],
                    ..IDENTITY
                },
                100
            )
            .is_none()
        );
        assert!(decode(&good, &Identity { size: 1, ..IDENTITY }, 100).is_none());
        assert!(decode(&good, &IDENTITY, 108).is_none());
    }

    #[test]
    fn bits_past_the_last_chunk_are_refused() {
        let wide = Bits::new(104);
        wide.set(102);
        let bytes = encode(&IDENTITY, false, &wide);
        assert!(decode(&bytes, &IDENTITY, 104).is_some());
        assert!(decode(&bytes, &IDENTITY, 100).is_none());
    }
}
