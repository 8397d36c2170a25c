//! What the files of a cache directory are called, and what is in a data file beside its chunks. In: a key, a directory. Out: names, and
//! a data file's map, if one fits it.

use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;

use super::dir::{CacheFile, SafeDir};
use super::map::{self, ChunkMap, GROUP_CHUNKS, Identity};
use crate::cache::chunk::{chunk_count, chunk_len};
use crate::digest::hexadecimal;
use crate::units::CHUNK_BYTES;

/// Behind the layer's bytes the data file has a block of its own that ties it to its map.
pub(super) const TRAILER_BYTES: u64 = 4096;
pub(super) const TRAILER_MAGIC: &[u8; 8] = b"TARBLKDT";

/// The names of a layer's files.
pub(super) fn data_name(key: &[u8; 32]) -> String {
    format!("{}.data", hexadecimal(key))
}

pub(super) fn map_name(key: &[u8; 32]) -> String {
    format!("{}.map", hexadecimal(key))
}

/// Present while the layer is never to be given up.
pub(super) fn pin_name(key: &[u8; 32]) -> String {
    format!("{}.pin", hexadecimal(key))
}

/// The key in the name of a data file.
pub(super) fn key_of(data_name: &str) -> Option<[u8; 32]> {
    let text = data_name.strip_suffix(".data")?.as_bytes();
    let mut key = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, digits) in key.iter_mut().zip(text.chunks(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    (hexadecimal(&key).as_bytes() == text).then_some(key)
}

/// How the name of a layer that is not whole yet begins and ends.
const PART: (&str, &str) = ("filling-", ".part");

/// The name of a layer that begins to be filled.
pub(super) fn part_name(nonce: &[u8; 16]) -> String {
    format!("{}{}{}", PART.0, hexadecimal(nonce), PART.1)
}

/// Whether a file of the disk cache is a layer that is not whole yet, or never will be.
pub(super) fn is_part(name: &str) -> bool {
    name.starts_with(PART.0) && name.ends_with(PART.1)
}

/// How the name of a process's ledger begins and ends.
const LEDGER: (&str, &str) = ("writer-", ".lock");

/// The name of a new ledger: what its process may write, as the file's length.
pub(super) fn ledger_name(nonce: &[u8; 16]) -> String {
    format!("{}{}{}", LEDGER.0, hexadecimal(nonce), LEDGER.1)
}

pub(super) fn is_ledger(name: &str) -> bool {
    name.starts_with(LEDGER.0) && name.ends_with(LEDGER.1)
}

/// Puts the block behind a whole layer's bytes that ties them to their map.
pub(super) fn end_data(data: &CacheFile, identity: &Identity) -> io::Result<()> {
    let at = identity.size.next_multiple_of(TRAILER_BYTES);
    data.set_len(at + TRAILER_BYTES)?;
    let mut trailer = TRAILER_MAGIC.to_vec();
    trailer.extend_from_slice(&identity.nonce);
    data.write_all_at(&trailer, at)
}

/// What the map of the layer with this key says of the data, if it fits it.
pub(super) fn read_map(dir: &SafeDir, data: &CacheFile, key: &[u8; 32]) -> Option<map::Decoded> {
    let len = data.file().metadata().ok()?.len();
    let at = len.checked_sub(TRAILER_BYTES)?;
    let mut trailer = [0; 24];
    data.file().read_exact_at(&mut trailer, at).ok()?;
    let (magic, nonce) = trailer.split_at(TRAILER_MAGIC.len());
    if magic != TRAILER_MAGIC {
        return None;
    }
    let read = read_map_alone(dir, key, chunk_count(at)?)?;
    let fits = read.identity.nonce == nonce && read.identity.size.next_multiple_of(TRAILER_BYTES) == at;
    fits.then_some(read)
}

/// What the map of the layer with this key says, of at most `most` chunks, whether it fits its data or not.
pub(super) fn read_map_alone(dir: &SafeDir, key: &[u8; 32], most: u32) -> Option<map::Decoded> {
    // A map is as long as the layer makes it; whatever else is there is not read.
    let mut bytes = Vec::new();
    let file = dir.open_file(&map_name(key)).ok()?;
    file.file().take(map::longest(most) + 1).read_to_end(&mut bytes).ok()?;
    map::decode(&bytes, chunk_count).filter(|read| read.identity.key == *key)
}

/// Chunks side by side, in order; and how many bytes of the file they are.
pub(super) fn extent_of_group(size: u64, group: u32) -> (u64, u64) {
    let len = u64::from(GROUP_CHUNKS) * CHUNK_BYTES;
    let start = u64::from(group) * len;
    (
        start,
        size.next_multiple_of(TRAILER_BYTES).saturating_sub(start).min(len),
    )
}

/// Groups of chunks that a map speaks of: the group, when it was last used, and bytes in it.
pub(super) fn groups_of(map: &ChunkMap, size: u64, count: u32) -> Vec<(u32, u32, u64)> {
    let mut groups: Vec<(u32, u32, u64)> = Vec::new();
    for index in (0..count).filter(|index| map.bits.has(*index)) {
        let (group, len) = (index / GROUP_CHUNKS, chunk_len(size, index));
        match groups.last_mut().filter(|last| last.0 == group) {
            Some(last) => last.2 += len,
            None => groups.push((group, map.uses.get(group), len)),
        }
    }
    groups
}

/// Puts a small file in its place, whole or not at all.
pub(super) fn write_new(dir: &SafeDir, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("{name}.{}", std::process::id());
    let write = || {
        let file = match dir.create_file(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Of a process with this number that was killed.
                dir.remove(&temporary)?;
                dir.create_file(&temporary)?
            }
            made => made?,
        };
        file.write_all_at(bytes, 0)?;
        file.sync()?;
        dir.rename(&temporary, name)
    };
    write().inspect_err(|_| {
        // It may not have been made at all.
        let _harmless = dir.remove(&temporary);
    })
}
