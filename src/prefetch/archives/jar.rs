//! What a Java archive and the classes in it say. In: bytes of a zip file (APPNOTE.TXT of PKWARE, 4.3), of a manifest, of a class (The
//! Java Virtual Machine Specification, chapter 4). Out: where entries lie, and what they name. Pure.
//!
//! Must never hold or unpack more than its limits, whatever the bytes say.

use crate::units::{len_u64, len_usize};
use zlib_rs::{Inflate, InflateFlush};

/// The end record, in bytes, if it has no comment.
pub(super) const END_LEN: u64 = 22;
/// The part of an entry in front of its name, in bytes, beside the entry and in the directory.
const LOCAL_LEN: usize = 30;
const ENTRY_LEN: usize = 46;
/// What an entry may have more beside it than in the directory, in bytes: times with access times.
const SLACK: u64 = 16;
/// The most bytes of an entry that are unpacked. A class names others in its beginning.
const MOST_UNPACKED: usize = 64 << 10;

/// The end record of a zip file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// Where the record itself begins, in bytes from the beginning of what was searched.
    pub(super) at: u64,
    /// The directory's length in bytes; it ends where this record begins.
    pub(super) directory_len: u64,
    /// Where the directory begins, in bytes from the beginning of the archive.
    pub(super) directory_at: u64,
}

/// The last end record in `tail`; none in an archive that is too big for its numbers.
pub(super) fn end(tail: &[u8]) -> Option<End> {
    let at = tail.windows(4).rposition(|window| window == b"PK\x05\x06")?;
    let record = tail.get(at..)?;
    let (directory_len, directory_at) = (number(record, 12, 4)?, number(record, 16, 4)?);
    let fits = directory_len < u64::from(u32::MAX) && directory_at < u64::from(u32::MAX);
    (fits && len_u64(record.len()) >= END_LEN).then_some(End {
        at: len_u64(at),
        directory_len,
        directory_at,
    })
}

/// An entry of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    /// Where the entry begins, in bytes from the beginning of the archive.
    pub(super) at: u64,
    /// Its length in bytes, as it is stored, with what is in front of its content.
    pub(super) len: u64,
    /// Whether its content is stored as it is.
    pub(super) plain: bool,
}

/// The entries of a directory, up to the first that is malformed.
pub(super) fn entries(directory: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    let mut rest = directory;
    std::iter::from_fn(move || {
        let record = rest.strip_prefix(b"PK\x01\x02").map(|_| rest)?;
        let (name, extra, comment) = (number(record, 28, 2)?, number(record, 30, 2)?, number(record, 32, 2)?);
        let name_ends = ENTRY_LEN + len_usize(name);
        rest = record.get(name_ends + len_usize(extra + comment)..)?;
        Some(Entry {
            name: record.get(ENTRY_LEN..name_ends)?,
            at: number(record, 42, 4)?,
            len: len_u64(LOCAL_LEN) + name + extra + SLACK + number(record, 20, 4)?,
            plain: number(record, 10, 2)? == 0,
        })
    })
}

/// The content of an entry of which these bytes are the beginning, or the beginning of it.
pub(super) fn content(entry: &[u8]) -> Option<Vec<u8>> {
    entry.strip_prefix(b"PK\x03\x04")?;
    let in_front = number(entry, 26, 2)? + number(entry, 28, 2)?;
    let packed = entry.get(LOCAL_LEN + len_usize(in_front)..)?;
    match number(entry, 8, 2)? {
        0 => Some(packed[..packed.len().min(MOST_UNPACKED)].to_vec()),
        8 => {
            // Eight times is what is usual at most.
            let mut room = vec![0; packed.len().saturating_mul(8).clamp(1 << 12, MOST_UNPACKED)];
            let mut inflate = Inflate::new(false, 15);
            inflate.decompress(packed, &mut room, InflateFlush::SyncFlush).ok()?;
            room.truncate(usize::try_from(inflate.total_out()).ok()?);
            Some(room)
        }
        _ => None,
    }
}

/// What a manifest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Manifest {
    /// The class that runs, and the one that it starts, as Spring Boot has it.
    pub(super) main: Vec<Vec<u8>>,
    /// Other archives, by paths relative to this one's directory.
    pub(super) class_path: Vec<Vec<u8>>,
}

/// The most archives that are taken from a class path.
const MOST_PATHS: usize = 512;

/// Parses a manifest (the JAR file specification): lines `Key: value`, of which those that begin with a blank go on.
pub(super) fn manifest(text: &[u8]) -> Manifest {
    let mut manifest = Manifest::default();
    let mut whole: Vec<u8> = Vec::with_capacity(text.len());
    for line in text.split(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(rest) = line.strip_prefix(b" ") {
            whole.extend_from_slice(rest);
        } else {
            whole.push(b'\n');
            whole.extend_from_slice(line);
        }
    }
    for line in whole.split(|&byte| byte == b'\n') {
        let value = |key: &[u8]| line.strip_prefix(key).map(<[u8]>::trim_ascii);
        if let Some(class) = value(b"Main-Class:").or_else(|| value(b"Start-Class:")) {
            let mut class = class.to_vec();
            class
                .iter_mut()
                .filter(|byte| **byte == b'.')
                .for_each(|byte| *byte = b'/');
            manifest.main.push(class);
        } else if let Some(paths) = value(b"Class-Path:") {
            let paths = paths.split(|&byte| byte == b' ').filter(|path| !path.is_empty());
            manifest.class_path.extend(paths.take(MOST_PATHS).map(<[u8]>::to_vec));
        }
    }
    manifest.main.truncate(2);
    manifest
}

/// The classes that a class names, as far as these bytes of it go.
pub(super) fn classes(class: &[u8]) -> Vec<&[u8]> {
    let mut texts: Vec<(u64, &[u8])> = Vec::new();
    let mut names: Vec<u64> = Vec::new();
    let mut read = || {
        class.strip_prefix(b"\xca\xfe\xba\xbe")?;
        let count = big(class, 8, 2)?;
        let (mut at, mut index) = (10, 1);
        while index < count {
            let len = match *class.get(at)? {
                1 => {
                    let len = len_usize(big(class, at + 1, 2)?);
                    texts.push((index, class.get(at + 3..at + 3 + len)?));
                    3 + len
                }
                7 => {
                    names.push(big(class, at + 1, 2)?);
                    3
                }
                8 | 16 | 19 | 20 => 3,
                15 => 4,
                3 | 4 | 9..=12 | 17 | 18 => 5,
                // These count twice.
                5 | 6 => {
                    index += 1;
                    9
                }
                _ => return None,
            };
            at += len;
            index += 1;
        }
        Some(())
    };
    let _cut_off = read().is_none();
    let text = |index| {
        texts
            .binary_search_by_key(&index, |(at, _)| *at)
            .ok()
            .map(|at| texts[at].1)
    };
    let names = names.into_iter().filter_map(text);
    names.map(element).collect()
}

/// The class of an array's elements; another class is itself.
fn element(name: &[u8]) -> &[u8] {
    let Some(array) = name.strip_prefix(b"[") else {
        return name;
    };
    let brackets = array.iter().take_while(|byte| **byte == b'[').count();
    let array = &array[brackets..];
    array
        .strip_prefix(b"L")
        .and_then(|name| name.strip_suffix(b";"))
        .unwrap_or_default()
}

/// A number of `len` bytes at offset `at`, little-endian.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    Some(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// The same, big-endian.
fn big(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    Some(field.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests;
