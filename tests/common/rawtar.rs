//! Tars made byte by byte, for what no program writes any more, or never should have. Fields are as POSIX.1-2017 (`pax`,
//! ustar interchange format) and the GNU tar manual (Basic Tar Format) have them.

use std::fs;
use std::path::Path;

pub(crate) const BLOCK: usize = 512;

/// One header block, its checksum still open.
#[derive(Clone)]
pub(crate) struct Header(pub(crate) [u8; BLOCK]);

impl Header {
    /// A ustar header: mode 644, owner 0/0, time 0, size 0.
    pub(crate) fn new(kind: u8, name: &[u8]) -> Self {
        let mut header = Self([0; BLOCK]);
        header.put(0, 100, name);
        header.0[156] = kind;
        header.put(257, 8, b"ustar\x0000");
        header.mode(0o644).uid(0).gid(0).mtime(0).size(0)
    }

    /// A header of Unix V7: no magic, and so no prefix, device numbers or names of users.
    pub(crate) fn v7(kind: u8, name: &[u8]) -> Self {
        Self::new(kind, name).field(257, 8, &[])
    }

    /// A header with GNU's magic, whose end is free for GNU's own fields.
    pub(crate) fn gnu(kind: u8, name: &[u8]) -> Self {
        Self::new(kind, name).field(257, 8, b"ustar  \0")
    }

    fn put(&mut self, at: usize, len: usize, value: &[u8]) {
        assert!(value.len() <= len, "{value:?} does not fit {len} bytes");
        self.0[at..at + len].fill(0);
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    /// Fills the `len` bytes at `at` with a value, the rest of them with zeros.
    pub(crate) fn field(mut self, at: usize, len: usize, value: &[u8]) -> Self {
        self.put(at, len, value);
        self
    }

    /// The octal digits of a number, all but the last byte of the field.
    pub(crate) fn octal(self, at: usize, len: usize, value: u64) -> Self {
        let digits = format!("{value:0width$o}", width = len - 1);
        self.field(at, len, digits.as_bytes())
    }

    /// GNU's base-256 numbers: big-endian two's complement, the first bit set.
    pub(crate) fn base256(mut self, at: usize, len: usize, value: i64) -> Self {
        let fill = if value < 0 { 0xff } else { 0 };
        self.0[at..at + len].fill(fill);
        self.0[at + len - 8..at + len].copy_from_slice(&value.to_be_bytes());
        self.0[at] |= 0x80;
        self
    }

    pub(crate) fn mode(self, mode: u64) -> Self {
        self.octal(100, 8, mode)
    }

    pub(crate) fn uid(self, uid: u64) -> Self {
        self.octal(108, 8, uid)
    }

    pub(crate) fn gid(self, gid: u64) -> Self {
        self.octal(116, 8, gid)
    }

    pub(crate) fn size(self, size: u64) -> Self {
        self.octal(124, 12, size)
    }

    pub(crate) fn mtime(self, mtime: u64) -> Self {
        self.octal(136, 12, mtime)
    }

    pub(crate) fn link(self, target: &[u8]) -> Self {
        self.field(157, 100, target)
    }

    pub(crate) fn device(self, major: u64, minor: u64) -> Self {
        self.octal(329, 8, major).octal(337, 8, minor)
    }

    /// The block with its checksum, over unsigned bytes as everybody does it, or over signed ones as old programs did.
    fn sealed(mut self, signed: bool) -> [u8; BLOCK] {
        self.0[148..156].fill(b' ');
        let sum: i64 = self
            .0
            .iter()
            .map(|&byte| {
                if signed {
                    i64::from(byte.cast_signed())
                } else {
                    i64::from(byte)
                }
            })
            .sum();
        let digits = format!("{sum:06o}\0 ");
        self.0[148..156].copy_from_slice(digits.as_bytes());
        self.0
    }
}

/// A tar that is being made.
#[derive(Default)]
pub(crate) struct RawTar(pub(crate) Vec<u8>);

impl RawTar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A header whose size field is already right, and its payload.
    pub(crate) fn entry(mut self, header: Header, payload: &[u8]) -> Self {
        self.0.extend(header.sealed(false));
        self.payload(payload)
    }

    /// The same with a checksum over signed bytes.
    pub(crate) fn signed_entry(mut self, header: Header, payload: &[u8]) -> Self {
        self.0.extend(header.sealed(true));
        self.payload(payload)
    }

    /// Bytes and their padding.
    pub(crate) fn payload(mut self, payload: &[u8]) -> Self {
        self.0.extend(payload);
        let padded = self.0.len().next_multiple_of(BLOCK);
        self.0.resize(padded, 0);
        self
    }

    /// A regular file.
    pub(crate) fn file(self, name: &[u8], content: &[u8]) -> Self {
        let size = u64::try_from(content.len()).unwrap();
        self.entry(Header::new(b'0', name).size(size), content)
    }

    /// A directory, mode 755.
    pub(crate) fn dir(self, name: &[u8]) -> Self {
        self.entry(Header::new(b'5', name).mode(0o755), &[])
    }

    /// A link, symbolic (`'2'`) or hard (`'1'`).
    pub(crate) fn link(self, kind: u8, name: &[u8], target: &[u8]) -> Self {
        self.entry(Header::new(kind, name).mode(0o777).link(target), &[])
    }

    /// A PAX header for the next entry (`'x'`) or for all that follow (`'g'`).
    pub(crate) fn pax(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            body.extend(format!("{length} {key}=").bytes());
            body.extend(*value);
            body.push(b'\n');
        }
        let size = u64::try_from(body.len()).unwrap();
        self.entry(Header::new(kind, b"PaxHeaders/x").size(size), &body)
    }

    /// GNU's long name (`'L'`) or long link (`'K'`) for the next entry.
    pub(crate) fn gnu_long(self, kind: u8, name: &[u8]) -> Self {
        let mut body = name.to_vec();
        body.push(0);
        let size = u64::try_from(body.len()).unwrap();
        self.entry(Header::gnu(kind, b"././@LongLink").size(size), &body)
    }

    /// The two zero blocks at the end.
    pub(crate) fn end(mut self) -> Self {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self
    }

    pub(crate) fn write(&self, to: &Path) {
        fs::write(to, &self.0).unwrap();
    }
}
