//! Which chunks of a layer a data file holds, and what they have to be: in memory and as the bytes of a map file.
//!
//! After a restart the map file alone says what a data file holds. `docs/cache-format.md` describes it, and the rest of the cache
//! directory, for those who read it with other programs. It is little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `TARBLKMP` |
//! | 4 | version, 3 |
//! | 4 | bytes in a chunk |
//! | 8 | bytes in the layer |
//! | 32 | the layer's key |
//! | 16 | the data file's nonce |
//! | 4 | flags; bit 0: the whole layer is there and was checked against its digest; bit 1: the data file is protected; the others are zero |
//! | 2 + n | the layer's name, UTF-8, behind its length in bytes; may be empty |
//! | 2 + n | the layer's digest, likewise |
//! | 32, 32 | of a protected data file: its fs-verity digest; the SHA-256 of the chunk digests that all of it was compared with |
//! | count / 8, rounded up | one bit a chunk, the lowest first; bits past the last are zero |
//! | 4 for each bit that is set | CRC-32C of that chunk |
//! | 4 for each group of 32 chunks that holds one | when the group was last read or written, in seconds since 1970 UTC |
//! | 4 | CRC-32C of all before it |

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::checksum;
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

const MAGIC: &[u8; 8] = b"TARBLKMP";
const VERSION: u32 = 3;
/// Up to the flags.
const HEAD: usize = 8 + 4 + 4 + 8 + 32 + 16;
/// All that is whole and was checked.
const SEALED: u32 = 1;
/// The data file is protected, and how.
const PROTECTED: u32 = 2;
/// No name and no digest is longer, in bytes.
const LONGEST_LABEL: usize = 1024;

/// Chunks whose last use is kept together, and which are given up together: 1 MiB.
pub(crate) const GROUP_CHUNKS: u32 = 32;

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

    pub(crate) fn set_all(&self) {
        (0..self.count).for_each(|index| self.set(index));
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

    /// How many there are, set or not.
    pub(crate) const fn count(&self) -> u32 {
        self.count
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
        bytes.truncate(bitmap_len(self.count));
        bytes
    }

    fn from_bytes(count: u32, bytes: &[u8]) -> Option<Self> {
        if bytes.len() != bitmap_len(count) {
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

fn bitmap_len(count: u32) -> usize {
    len_usize(u64::from(count).div_ceil(8))
}

/// How many groups `count` chunks are.
pub(crate) const fn group_count(count: u32) -> u32 {
    count.div_ceil(GROUP_CHUNKS)
}

/// A number of 32 bits for each chunk or group. Takes memory only where one was ever set, a page at a time.
#[derive(Debug)]
pub(crate) struct Numbers {
    pages: Box<[OnceLock<Box<[AtomicU32; PAGE]>>]>,
}

/// Numbers in a page: 4 KiB.
const PAGE: usize = 1024;

impl Numbers {
    pub(crate) fn new(count: u32) -> Self {
        let pages = std::iter::repeat_with(OnceLock::new).take(len_usize(u64::from(count)).div_ceil(PAGE));
        Self { pages: pages.collect() }
    }

    /// The number of `index`; 0 if none was set.
    pub(crate) fn get(&self, index: u32) -> u32 {
        let index = len_usize(u64::from(index));
        let page = self.pages.get(index / PAGE).and_then(OnceLock::get);
        page.map_or(0, |page| page[index % PAGE].load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, index: u32, value: u32) {
        let index = len_usize(u64::from(index));
        if let Some(page) = self.pages.get(index / PAGE) {
            let page = page.get_or_init(|| Box::new([const { AtomicU32::new(0) }; PAGE]));
            page[index % PAGE].store(value, Ordering::Relaxed);
        }
    }
}

/// What a map says of each chunk.
#[derive(Debug)]
pub(crate) struct ChunkMap {
    /// Which are there.
    pub(crate) bits: Bits,
    /// Their CRC-32C, written before the bit is set.
    pub(crate) sums: Numbers,
    /// When each group was last read or written, in seconds since 1970.
    pub(crate) uses: Numbers,
}

impl ChunkMap {
    /// For `count` chunks, none of which is there.
    pub(crate) fn new(count: u32) -> Self {
        Self {
            bits: Bits::new(count),
            sums: Numbers::new(count),
            uses: Numbers::new(group_count(count)),
        }
    }

    /// Chunk `index` is there, and has this CRC-32C.
    pub(crate) fn put(&self, index: u32, sum: u32) {
        self.sums.set(index, sum);
        self.bits.set(index);
    }

    /// Whether `bytes` are what was written as chunk `index`.
    pub(crate) fn matches(&self, index: u32, bytes: &[u8]) -> bool {
        self.sums.get(index) == checksum::crc32c(bytes)
    }
}

/// What a map file says about its data file: each has to be the same for the map to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The layer's length in bytes.
    pub(crate) size: u64,
    /// The layer's key.
    pub(crate) key: [u8; 32],
    /// Which data file.
    pub(crate) nonce: [u8; 16],
}

/// What a person calls the layer of a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Label {
    /// Where it was read from, without secrets; empty if unknown.
    pub(crate) name: String,
    /// The blob's digest; empty if unknown.
    pub(crate) digest: String,
}

impl Label {
    /// A label of at most [`LONGEST_LABEL`] bytes each.
    pub(crate) fn new(name: &str, digest: &str) -> Self {
        let cut = |text: &str| {
            let mut end = text.len().min(LONGEST_LABEL);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text[..end].to_owned()
        };
        Self {
            name: cut(name),
            digest: cut(digest),
        }
    }
}

/// What was compared with digests in a data file that the kernel keeps as it was then: all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protection {
    /// The fs-verity digest of the data file: what the kernel compares it with.
    pub(crate) file: [u8; 32],
    /// SHA-256 of the layer's chunk digests, as the caller makes it.
    pub(crate) digests: [u8; 32],
}

/// What a map says of the layer beside its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct About {
    /// Whether all of it was checked.
    pub(crate) sealed: bool,
    pub(crate) protection: Option<Protection>,
    pub(crate) label: Label,
}

/// A map file as it was read.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) identity: Identity,
    pub(crate) about: About,
    pub(crate) map: ChunkMap,
}

/// No map of a layer of `count` chunks is longer, in bytes.
pub(crate) fn longest(count: u32) -> u64 {
    let labels = 2 * (2 + LONGEST_LABEL);
    let count = u64::from(count);
    len_u64(HEAD + 4 + labels + 64 + 4) + count.div_ceil(8) + 4 * count + 4 * count.div_ceil(u64::from(GROUP_CHUNKS))
}

/// The map file's bytes.
pub(crate) fn encode(identity: &Identity, about: &About, map: &ChunkMap) -> Vec<u8> {
    // Looked at once: what is set while this runs is not in it.
    let bits = map.bits.to_bytes();
    let set = || set_in(&bits);
    let mut out = Vec::with_capacity(HEAD + 4096 + bits.len() + 5 * set().count());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&identity.size.to_le_bytes());
    out.extend_from_slice(&identity.key);
    out.extend_from_slice(&identity.nonce);
    let flags = [(about.sealed, SEALED), (about.protection.is_some(), PROTECTED)];
    let flags = flags.map(|(is_set, flag)| u32::from(is_set) * flag).iter().sum::<u32>();
    out.extend_from_slice(&flags.to_le_bytes());
    for text in [&about.label.name, &about.label.digest] {
        let len = u16::try_from(text.len())
            .ok()
            .filter(|len| usize::from(*len) <= LONGEST_LABEL);
        out.extend_from_slice(&len.unwrap_or(0).to_le_bytes());
        out.extend_from_slice(if len.is_some() { text.as_bytes() } else { &[] });
    }
    if let Some(protection) = &about.protection {
        out.extend_from_slice(&protection.file);
        out.extend_from_slice(&protection.digests);
    }
    out.extend_from_slice(&bits);
    for index in set() {
        out.extend_from_slice(&map.sums.get(index).to_le_bytes());
    }
    for group in groups_of(set()) {
        out.extend_from_slice(&map.uses.get(group).to_le_bytes());
    }
    let sum = checksum::crc32c(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// The numbers of the bits that are set in a bitmap.
fn set_in(bitmap: &[u8]) -> impl Iterator<Item = u32> {
    (0_u32..).zip(bitmap).flat_map(|(n, byte)| {
        let byte = *byte;
        (0..8)
            .filter(move |bit| byte & (1 << bit) != 0)
            .map(move |bit| n * 8 + bit)
    })
}

/// The groups of `chunks`, which come in order, each once.
fn groups_of(chunks: impl Iterator<Item = u32>) -> impl Iterator<Item = u32> {
    let mut last = None;
    chunks.filter_map(move |index| {
        let group = index / GROUP_CHUNKS;
        (last.replace(group) != Some(group)).then_some(group)
    })
}

/// Bytes that are taken from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        if len > LONGEST_LABEL {
            return None;
        }
        String::from_utf8(self.take(len)?.to_vec()).ok()
    }
}

/// Reads a map file of a layer with as many chunks as `count` says for its size. `None` for anything that is not exactly a map of
/// this version. The caller compares the identity.
pub(crate) fn decode(bytes: &[u8], count: impl Fn(u64) -> Option<u32>) -> Option<Decoded> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    if checksum::crc32c(body).to_le_bytes() != sum {
        return None;
    }
    let mut reader = Reader(body);
    if reader.take(MAGIC.len())? != MAGIC || reader.u32()? != VERSION || u64::from(reader.u32()?) != CHUNK_BYTES {
        return None;
    }
    let identity = Identity {
        size: u64::from_le_bytes(reader.array()?),
        key: reader.array()?,
        nonce: reader.array()?,
    };
    let flags = reader.u32()?;
    if flags & !(SEALED | PROTECTED) != 0 {
        return None;
    }
    let label = Label {
        name: reader.text()?,
        digest: reader.text()?,
    };
    let mut protection = || {
        Some(Protection {
            file: reader.array()?,
            digests: reader.array()?,
        })
    };
    let protection = if flags & PROTECTED != 0 {
        Some(protection()?)
    } else {
        None
    };
    let count = count(identity.size)?;
    // Before memory is taken for so many chunks: the file has a bit for each.
    let bitmap = reader.take(bitmap_len(count))?;
    let map = ChunkMap {
        bits: Bits::from_bytes(count, bitmap)?,
        ..ChunkMap::new(count)
    };
    for index in set_in(bitmap) {
        map.sums.set(index, reader.u32()?);
    }
    for group in groups_of(set_in(bitmap)) {
        map.uses.set(group, reader.u32()?);
    }
    reader.0.is_empty().then_some(Decoded {
        identity,
        about: About {
            sealed: flags & SEALED != 0,
            protection,
            label,
        },
        map,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        size: 100 * CHUNK_BYTES,
        key: [7; 32],
        nonce: [9; 16],
    };

    fn some() -> ChunkMap {
        let map = ChunkMap::new(100);
        for index in [0, 5, 63, 64, 99] {
            map.put(index, 1000 + index);
            map.uses.set(index / GROUP_CHUNKS, 77 + index / GROUP_CHUNKS);
        }
        map
    }

    fn label() -> Label {
        Label::new("https://host/layer.tar", "sha256:00")
    }

    fn about() -> About {
        About {
            label: label(),
            ..About::default()
        }
    }

    fn read(bytes: &[u8], count: u32) -> Option<Decoded> {
        decode(bytes, |_| Some(count))
    }

    #[test]
    fn what_is_written_is_read() {
        let protection = Some(Protection {
            file: [3; 32],
            digests: [4; 32],
        });
        for (sealed, protection) in [(true, None), (true, protection), (false, protection)] {
            let about = About {
                sealed,
                protection,
                label: label(),
            };
            let bytes = encode(&IDENTITY, &about, &some());
            assert!(len_u64(bytes.len()) <= longest(100));
            assert_eq!(read(&bytes, 100).unwrap().about, about);
        }
        let bytes = encode(&IDENTITY, &about(), &some());
        let back = read(&bytes, 100).unwrap();
        assert_eq!((back.identity, &back.about), (IDENTITY, &about()));
        let set: Vec<u32> = (0..200).filter(|index| back.map.bits.has(*index)).collect();
        assert_eq!(set, [0, 5, 63, 64, 99]);
        assert_eq!(back.map.bits.count_set(), 5);
        let sums: Vec<u32> = set.iter().map(|index| back.map.sums.get(*index)).collect();
        assert_eq!(sums, [1000, 1005, 1063, 1064, 1099]);
        let uses: Vec<u32> = (0..4).map(|group| back.map.uses.get(group)).collect();
        assert_eq!(uses, [77, 78, 79, 80]);
        back.map.bits.clear(5);
        assert!(!back.map.bits.has(5));
    }

    #[test]
    fn nothing_else_is_believed() {
        let good = encode(&IDENTITY, &about(), &some());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(read(&bad, 100).is_none(), "a flipped bit in byte {at} passed");
            assert!(read(&good[..at], 100).is_none(), "{at} bytes passed");
        }
        assert!(read(&good, 108).is_none());
        assert!(decode(&good, |_| None).is_none());
        let resealed = |at: usize, value: u8| {
            let mut bad = good[..good.len() - 4].to_vec();
            bad[at] = value;
            let sum = checksum::crc32c(&bad);
            bad.extend_from_slice(&sum.to_le_bytes());
            bad
        };
        // A right checksum over something wrong: another version, unknown flags, labels that are too long or no text.
        assert!(read(&resealed(0, b'T'), 100).is_some());
        for (at, value) in [
            (8, 2),
            (8, 4),
            (12, 1),
            // A protection that is not there: something else is read as one.
            (HEAD, 2),
            (HEAD, 4),
            (HEAD + 4, 255),
            (HEAD + 5, 255),
            (HEAD + 6, 0xff),
        ] {
            assert!(read(&resealed(at, value), 100).is_none(), "byte {at} = {value} passed");
        }
    }

    #[test]
    fn bits_past_the_last_chunk_are_refused() {
        let wide = ChunkMap::new(104);
        wide.put(102, 1);
        let bytes = encode(&IDENTITY, &about(), &wide);
        assert!(read(&bytes, 104).is_some());
        assert!(read(&bytes, 100).is_none());
    }

    #[test]
    fn long_labels_are_cut_between_characters() {
        let label = Label::new(&"\u{e4}".repeat(3000), "");
        assert_eq!(label.name.len(), LONGEST_LABEL);
        let about = About {
            label: label.clone(),
            ..About::default()
        };
        let bytes = encode(&IDENTITY, &about, &some());
        assert_eq!(read(&bytes, 100).unwrap().about.label, label);
    }

    #[test]
    fn numbers_take_memory_where_they_are_set() {
        let numbers = Numbers::new(10_000);
        numbers.set(5_000, 7);
        numbers.set(20_000, 7);
        assert_eq!((numbers.get(5_000), numbers.get(4_999), numbers.get(20_000)), (7, 0, 0));
        assert_eq!(numbers.pages.iter().filter(|page| page.get().is_some()).count(), 1);
    }
}
