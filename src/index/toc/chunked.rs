//! zstd:chunked: where its table of contents is and how it is packed.
//!
//! Behind the tar's frames come skippable ones: the table of contents (JSON as one zstd frame), perhaps what tar-split
//! needs, and a footer of 64 bytes, or of 40 in the older form, which end in a magic text. The same numbers are in the
//! layer's annotations. Written by containers/storage and, in the older form, by containerd's stargz-snapshotter.

use std::collections::BTreeMap;

use super::{Format, MAX_JSON, Place};
use crate::layer::{Coding, Indexer, LayerError, magic};

/// The annotations with the digest of the table of contents, and with its place.
pub(super) const DIGEST: [&str; 2] = [
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-checksum",
];
const POSITION: [&str; 2] = [
    "io.github.containers.zstd-chunked.manifest-position",
    "io.containers.zstd-chunked.manifest-position",
];

/// How the footer ends; once with a capital letter, once without.
const MAGICS: [&[u8; 8]; 2] = [b"GNUlInUx", b"GnUlInUx"];
/// What the footer's frame holds, in its newer and its older form.
const FOOTERS: [usize; 2] = [64, 40];
/// The only kind of table of contents that there is.
const KIND: u64 = 1;

/// What a blob's last bytes say if they are such a footer.
pub(super) fn footer(tail: &[u8]) -> Option<Place> {
    FOOTERS.iter().find_map(|len| {
        let frame = tail.get(tail.len().checked_sub(len + 8)?..)?;
        let (head, content) = frame.split_at(8);
        let len_matches = head[4..] == u32::try_from(*len).ok()?.to_le_bytes();
        let skippable = head[0] & 0xf0 == magic::SKIPPABLE[0] && head[1..4] == magic::SKIPPABLE[1..];
        let magic = MAGICS.iter().any(|magic| content.ends_with(*magic));
        if !(len_matches && skippable && magic) {
            return None;
        }
        let number = |index: usize| {
            Some(u64::from_le_bytes(
                content.get(index * 8..index * 8 + 8)?.try_into().ok()?,
            ))
        };
        place([number(0)?, number(1)?, number(2)?, number(3)?])
    })
}

/// What a layer's annotations say: `offset:compressed length:length:kind`.
pub(super) fn annotated(annotations: &BTreeMap<String, String>) -> Option<Place> {
    let text = POSITION.iter().find_map(|key| annotations.get(*key))?;
    let mut numbers = text.split(':').map(|number| number.parse::<u64>().ok());
    let place = place([numbers.next()??, numbers.next()??, numbers.next()??, numbers.next()??])?;
    numbers.next().is_none().then_some(place)
}

fn place([offset, stored, len, kind]: [u64; 4]) -> Option<Place> {
    if kind != KIND {
        return None;
    }
    Some(Place {
        format: Format::Chunked,
        blob: offset..offset.checked_add(stored)?,
        json_len: Some(len),
    })
}

/// The JSON, unpacked; `len` is how long it is said to be.
pub(super) fn unpack(stored: &[u8], len: u64) -> Result<Vec<u8>, LayerError> {
    let mut json = Vec::new();
    let mut indexer = Indexer::new(Coding::Zstd, u64::MAX).limit(len.min(MAX_JSON));
    for piece in stored.chunks(64 << 10) {
        indexer.feed(piece, &mut |bytes| json.extend_from_slice(bytes))?;
    }
    indexer.finish()?;
    Ok(json)
}
