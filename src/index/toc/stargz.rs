//! eStargz (and its forerunner CRFS): where its table of contents is and how it is packed.
//!
//! The blob ends with an empty gzip member of 51 bytes whose extra field names the byte at which another member begins;
//! what that one holds is the end of the tar, of which `stargz.index.json` is the last entry. The older form of the
//! footer is 47 bytes long, because its extra field is no proper subfield. Described in containerd's
//! stargz-snapshotter, docs/estargz.md.

use std::ops::Range;

use super::{Format, MAX_JSON, Place, wrong};
use crate::index::{Entry, EntrySink, IndexError, Parser};
use crate::layer::{Coding, Indexer, LayerError};
use crate::units::{TarOffset, len_u64};

/// The annotation with the digest of the JSON.
pub(super) const DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// The name that the table of contents has in the tar.
const NAME: &[u8] = b"stargz.index.json";

const FOOTER: usize = 51;
const OLD_FOOTER: usize = 47;

/// What a blob's last bytes say if they are such a footer.
pub(super) fn footer(tail: &[u8], blob_len: u64) -> Option<Place> {
    let last = |len: usize| tail.len().checked_sub(len).and_then(|from| tail.get(from..));
    let (footer_len, offset) = last(FOOTER)
        .and_then(|bytes| Some((FOOTER, extra(bytes, b"\x1a\0SG\x16\0")?)))
        .or_else(|| last(OLD_FOOTER).and_then(|bytes| Some((OLD_FOOTER, extra(bytes, b"\x16\0")?))))?;
    let end = blob_len.checked_sub(len_u64(footer_len))?;
    Some(Place {
        format: Format::Stargz,
        blob: offset..end,
        json_len: None,
    })
}

/// The number in the extra field of a gzip member: ten bytes of header, the field's length and name, then
/// `%016xSTARGZ`.
fn extra(member: &[u8], field: &[u8]) -> Option<u64> {
    let rest = member
        .strip_prefix(b"\x1f\x8b\x08\x04")?
        .get(6..)?
        .strip_prefix(field)?;
    let digits = rest
        .get(..16)
        .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
    rest[16..].starts_with(b"STARGZ").then_some(())?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The member at the end, unpacked, the table of contents as an entry of it, and where in the member the JSON lies.
pub(super) fn unpack(stored: &[u8]) -> Result<(Vec<u8>, Entry, Range<usize>), LayerError> {
    let mut member = Vec::new();
    let mut indexer = Indexer::new(Coding::Gzip, u64::MAX).limit(MAX_JSON);
    for piece in stored.chunks(64 << 10) {
        indexer.feed(piece, &mut |bytes| member.extend_from_slice(bytes))?;
    }
    indexer.finish()?;
    let entry = find(&member)?;
    let payload = entry.payload();
    let bounds = usize::try_from(payload.start.0)
        .ok()
        .zip(usize::try_from(payload.end().0).ok());
    match bounds {
        Some((from, to)) if to <= member.len() && payload.len == entry.size => Ok((member, entry, from..to)),
        _ => Err(wrong("it is cut short")),
    }
}

/// The entry of the table of contents in the last member.
fn find(member: &[u8]) -> Result<Entry, LayerError> {
    /// Keeps the entry with the right name.
    struct Finder(Option<Entry>);
    impl EntrySink for Finder {
        fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
            if entry.path == NAME {
                self.0 = Some(entry.clone());
            }
            Ok(())
        }
    }
    let mut finder = Finder(None);
    let mut parser = Parser::new();
    let outcome = parser
        .feed(TarOffset(0), member, &mut finder)
        .and_then(|()| parser.finish(TarOffset(len_u64(member.len()))));
    match (outcome, finder.0) {
        (Ok(_), Some(entry)) => Ok(entry),
        (Ok(_), None) => Err(wrong("there is no stargz.index.json where the footer says")),
        (Err(error), _) => Err(wrong(error.to_string())),
    }
}
