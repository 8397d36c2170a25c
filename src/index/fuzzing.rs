//! Index files with right checksums around arbitrary contents, for fuzzing and tests.

use super::format::{self, SectionRecord};
use super::identity::LayerIdentity;
use super::len_u64;
use super::summary::Summary;

/// An index file with right checksums around an entry table that may be anything: the first two bytes are the number of
/// entries, the next four the tar's length, the rest is the table before compression.
#[must_use]
pub fn index_around(data: &[u8]) -> Vec<u8> {
    let byte = |at: usize| u64::from(data.get(at).copied().unwrap_or(0));
    let table = data.get(6..).unwrap_or_default();
    let summary = Summary {
        entries: byte(0) | byte(1) << 8,
        tar_bytes: byte(2) | byte(3) << 8 | byte(4) << 16 | byte(5) << 24,
        hardlinks: 1,
        ..Summary::default()
    };
    let layer = LayerIdentity {
        blob_len: summary.tar_bytes,
        ..LayerIdentity::default()
    };
    let summary = format::encode_summary(&summary, &[0; 32]);
    let entries = zstd::bulk::compress(table, 1).unwrap_or_default();
    let record = |kind, encoding, decoded| SectionRecord {
        kind,
        flags: format::REQUIRED,
        encoding,
        decoded,
        ..SectionRecord::default()
    };
    let layer = layer.encode();
    format::assemble(&mut [
        (record(format::SUMMARY, format::RAW, len_u64(summary.len())), summary),
        (record(format::ENTRIES, format::ZSTD, len_u64(table.len())), entries),
        (record(format::LAYER, format::RAW, len_u64(layer.len())), layer),
    ])
}

/// An index file with right checksums around sections that may be anything. The data is one section after the other: a byte kind
/// (as in the file), a byte flags in its low half and encoding in its high half, two bytes length, two bytes by which the decoded
/// length is told wrong, the section before compression. Ends where no whole section follows.
#[must_use]
pub fn index_of_sections(mut data: &[u8]) -> Vec<u8> {
    let mut sections = Vec::new();
    while let Some(([kind, how, low, high, lie, _], rest)) = data.split_first_chunk::<6>() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, behind) = rest.split_at(len);
        data = behind;
        let encoding = u16::from(how >> 4);
        let stored = match encoding {
            format::ZSTD => zstd::bulk::compress(body, 1).unwrap_or_default(),
            _ => body.to_vec(),
        };
        let record = SectionRecord {
            kind: u32::from(*kind),
            flags: u16::from(how & 3),
            encoding,
            decoded: len_u64(len).wrapping_add(u64::from(*lie)),
            ..SectionRecord::default()
        };
        sections.push((record, stored));
    }
    sections.truncate(format::MAX_SECTIONS);
    // Hot ones come first in every file.
    sections.sort_by_key(|(record, _)| record.flags & format::COLD);
    format::assemble(&mut sections)
}
