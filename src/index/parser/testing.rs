//! Tars made by hand, block by block, for tests: any field can be what no writer would write.

use crate::index::{Collector, Entry, IndexError, Parser};
use crate::units::TarOffset;

/// A length as a position.
pub(in crate::index) fn at(len: usize) -> u64 {
    u64::try_from(len).unwrap()
}

/// A PAX record with its length worked out.
pub(in crate::index) fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body;
    while body + len.to_string().len() != len {
        len = body + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A header block under construction; a ustar file called `name` to begin with.
#[derive(Clone, Debug)]
pub(in crate::index) struct RawHeader(pub(in crate::index) [u8; 512]);

impl RawHeader {
    pub(in crate::index) fn new(type_flag: u8, name: &[u8], size: u64) -> Self {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name);
        block[156] = type_flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let mut block = Self(block);
        for (at, value) in [(100, 0o644), (108, 1000), (116, 100)] {
            block = block.field(at, format!("{value:07o}\0").as_bytes());
        }
        block
            .field(124, format!("{size:011o}\0").as_bytes())
            .field(136, b"00000000012\0")
    }

    /// Puts bytes at a position.
    pub(in crate::index) fn field(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(in crate::index) fn gnu(self) -> Self {
        self.field(257, b"ustar  \0")
    }

    /// With the checksum of unsigned bytes.
    pub(in crate::index) fn sealed(self) -> Vec<u8> {
        self.sealed_with(i64::from)
    }

    pub(in crate::index) fn sealed_with(mut self, value: impl Fn(u8) -> i64) -> Vec<u8> {
        self.0[148..156].fill(b' ');
        let sum: i64 = self.0.iter().map(|b| value(*b)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.to_vec()
    }
}

/// A header and its padded payload.
pub(in crate::index) fn member(type_flag: u8, name: &[u8], payload: &[u8]) -> Vec<u8> {
    let size = u64::try_from(payload.len()).unwrap();
    [RawHeader::new(type_flag, name, size).gnu().sealed(), padded(payload)].concat()
}

pub(in crate::index) fn padded(payload: &[u8]) -> Vec<u8> {
    let mut padded = payload.to_vec();
    padded.resize(payload.len().next_multiple_of(512), 0);
    padded
}

/// A PAX header with these records.
pub(in crate::index) fn pax(type_flag: u8, records: &[(&str, &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = records
        .iter()
        .flat_map(|(key, value)| pax_record(key.as_bytes(), value))
        .collect();
    let size = u64::try_from(body.len()).unwrap();
    [RawHeader::new(type_flag, b"PaxHeaders/x", size).sealed(), padded(&body)].concat()
}

/// The two zero blocks.
pub(in crate::index) fn end() -> Vec<u8> {
    vec![0; 1024]
}

/// All entries of a tar that is fed in one piece.
pub(in crate::index) fn parse(tar: &[u8]) -> Result<Vec<Entry>, IndexError> {
    let mut all = Collector::default();
    let mut parser = Parser::new();
    parser.feed(TarOffset(0), tar, &mut all)?;
    parser.finish(TarOffset(at(tar.len())))?;
    Ok(all.0)
}

/// The one entry of a tar.
pub(in crate::index) fn parse_one(tar: &[u8]) -> Entry {
    let entries = parse(tar).unwrap();
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.into_iter().next().unwrap()
}

/// A file's content as its segments have it.
pub(in crate::index) fn content(tar: &[u8], entry: &Entry) -> Vec<u8> {
    let place = |at: u64| usize::try_from(at).unwrap();
    let mut content = vec![0; place(entry.size)];
    for segment in &entry.segments {
        let from = &tar[place(segment.tar_offset.0)..][..place(segment.len)];
        content[place(segment.file_offset)..][..from.len()].copy_from_slice(from);
    }
    content
}
