//! Walking through the JSON of a table of contents, entry by entry, laying out contents on the way.
//!
//! Nothing is kept but the entry at hand. What is accepted is bounded in depth (by the JSON reader), in the number of
//! entries and in the number of attributes an entry has.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine as _, alphabet};
use jiff::fmt::temporal::{Pieces, PiecesOffset};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::wrong;
use crate::index::{Entry, IndexError, Kind, Segment, TAR_BLOCK, Timestamp, Xattr};
use crate::layer::LayerError;
use crate::units::{TarOffset, TarRange};

/// More entries than any layer has.
const MAX_ENTRIES: u64 = 1 << 22;
/// More attributes than an inode can have.
const MAX_XATTRS: usize = 1 << 12;

/// An item of a table of contents, in the order of a walk: members and contents before the entry they belong to.
#[derive(Debug)]
pub(super) enum TocItem<'a> {
    /// The beginning of a gzip member or zstd frame: its position in tar space and in the blob, in bytes.
    Member { tar: u64, blob: u64 },
    /// A piece of a file's content, with its SHA-256 where that is known.
    Content { tar: TarRange, digest: Option<[u8; 32]> },
    /// The content of the table of contents itself, where it is a file of the layer.
    Own(TarRange),
    /// An entry, complete.
    Entry(&'a Entry),
}

/// The table of contents as an entry of the layer that it describes.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) entry: Entry,
    /// Where the member that holds it begins in the blob.
    pub(super) blob: u64,
    /// How far into that member's output its content lies.
    pub(super) inner: u64,
}

/// Takes the items of a walk. Its errors end the walk.
type Sink<'a> = dyn FnMut(TocItem<'_>) -> Result<(), IndexError> + 'a;

/// Walks through `json` and then over `own`; returns how long the made-up tar space is.
pub(super) fn walk(json: &[u8], own: Option<&Own>, sink: &mut Sink<'_>) -> Result<u64, IndexError> {
    let mut walker = Walker {
        sink,
        layout: Layout::default(),
        pending: None,
        entries: 0,
        failed: None,
    };
    let mut reader = serde_json::Deserializer::from_slice(json);
    let outcome = Toc(&mut walker).deserialize(&mut reader).and_then(|()| reader.end());
    if let Some(error) = walker.failed.take() {
        return Err(error);
    }
    outcome.map_err(|error| IndexError::sink(wrong(format!("its JSON is wrong: {error}"))))?;
    walker.close().map_err(|error| walker.failed.take().unwrap_or(error))?;
    if let Some(own) = own {
        walker.own(own)?;
    }
    Ok(walker.layout.end())
}

/// One entry as it stands in the JSON. Unknown fields are passed over.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    name: Cow<'a, str>,
    #[serde(default)]
    size: u64,
    #[serde(borrow, default)]
    modtime: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    link_name: Cow<'a, str>,
    #[serde(default)]
    mode: i64,
    #[serde(default)]
    uid: i64,
    #[serde(default)]
    gid: i64,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    inner_offset: u64,
    #[serde(default)]
    dev_major: u32,
    #[serde(default)]
    dev_minor: u32,
    #[serde(borrow, default)]
    xattrs: Option<Xattrs<'a>>,
    #[serde(borrow, default)]
    digest: Cow<'a, str>,
    #[serde(default)]
    chunk_offset: u64,
    #[serde(default)]
    chunk_size: u64,
    #[serde(borrow, default)]
    chunk_digest: Cow<'a, str>,
    #[serde(borrow, default)]
    chunk_type: Cow<'a, str>,
}

/// The standard alphabet, padded or not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Attributes: names with values in base64.
#[derive(Debug, Default)]
struct Xattrs<'a>(Vec<(Cow<'a, str>, Vec<u8>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Xattrs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Vec<(Cow<'de, str>, Vec<u8>)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some((Text(name), Text(value))) = map.next_entry()? {
                    if all.len() == MAX_XATTRS {
                        return Err(A::Error::custom("too many attributes"));
                    }
                    let value = BASE64.decode(value.as_bytes());
                    let value = value.map_err(|_| A::Error::custom("an attribute's value is not base64"))?;
                    all.push((name, value));
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(Pairs).map(Self)
    }
}

/// A text that is borrowed where it can be; `None` where there is none.
#[derive(Debug, Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

struct Walker<'s, 'a> {
    sink: &'s mut Sink<'a>,
    layout: Layout,
    /// The file whose chunks may still follow, and how many bytes of it are known.
    pending: Option<(Entry, u64)>,
    entries: u64,
    /// The sink's error, which the JSON reader cannot carry.
    failed: Option<IndexError>,
}

/// The layout of the made-up tar space: the files' contents, in bytes.
#[derive(Debug, Default)]
struct Layout {
    /// Where the last content ends.
    cursor: u64,
    /// The last member: where it begins in the blob and what that is in tar space.
    member: Option<(u64, u64)>,
}

impl Layout {
    fn end(&self) -> u64 {
        align(self.cursor)
    }

    /// Places `len` bytes that lie `inner` bytes into what is decoded from byte `blob`; `more` when they continue a
    /// file. Where they are in tar space, and the member if it is a new one.
    fn place(&mut self, blob: u64, inner: u64, len: u64, more: bool) -> Result<(u64, Option<(u64, u64)>), LayerError> {
        let from = if more { self.cursor } else { align(self.cursor) };
        let (at, fresh) = match self.member {
            Some((known, base)) if known == blob => {
                let at = base
                    .checked_add(inner)
                    .filter(|at| *at >= from && (!more || *at == from));
                (at.ok_or_else(|| wrong("contents overlap or are not in order"))?, None)
            }
            Some((known, _)) if known > blob => return Err(wrong("contents are not in the tar's order")),
            _ if more && inner != 0 => return Err(wrong("a file's content is not in one piece")),
            _ => {
                self.member = Some((blob, from));
                let at = from
                    .checked_add(inner)
                    .ok_or_else(|| wrong("a position is larger than 64 bits hold"))?;
                (at, Some((blob, from)))
            }
        };
        if !more && at != align(at) {
            return Err(wrong("a file does not begin at a block"));
        }
        self.cursor = at
            .checked_add(len)
            .filter(|end| *end < i64::MAX.unsigned_abs())
            .ok_or_else(|| wrong("a position is larger than 64 bits hold"))?;
        Ok((at, fresh))
    }
}

const fn align(position: u64) -> u64 {
    position.saturating_add(TAR_BLOCK - 1) & !(TAR_BLOCK - 1)
}

impl Walker<'_, '_> {
    fn take(&mut self, raw: &Raw<'_>) -> Result<(), IndexError> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(refused("it has too many entries"));
        }
        if raw.kind == "chunk" {
            let (entry, known) = self
                .pending
                .take()
                .ok_or_else(|| refused("a chunk belongs to no file"))?;
            return self.content(entry, known, raw);
        }
        self.close()?;
        let mut entry = Entry {
            path: if raw.name.is_empty() {
                b"./".to_vec()
            } else {
                raw.name.as_bytes().to_vec()
            },
            mode: u16::try_from(raw.mode & 0o7777).unwrap_or(0),
            uid: raw.uid,
            gid: raw.gid,
            mtime: raw
                .modtime
                .as_deref()
                .map_or(Some(Timestamp::default()), rfc3339)
                .ok_or_else(|| refused("a time is not as RFC 3339 has it"))?,
            headers: TarRange::new(TarOffset(self.layout.end()), 0),
            ..Entry::default()
        };
        if let Some(Xattrs(pairs)) = &raw.xattrs {
            entry.xattrs = pairs
                .iter()
                .map(|(name, value)| Xattr {
                    name: name.as_bytes().to_vec(),
                    value: value.clone(),
                })
                .collect();
            // A name that comes twice keeps what came last, as in every JSON reader.
            entry.xattrs.reverse();
            entry.xattrs.sort_by(|a, b| a.name.cmp(&b.name));
            entry.xattrs.dedup_by(|a, b| a.name == b.name);
        }
        entry.kind = match &*raw.kind {
            "reg" => Kind::File,
            "dir" => Kind::Directory,
            "symlink" => Kind::Symlink,
            "hardlink" => Kind::Hardlink,
            "char" => Kind::CharDevice,
            "block" => Kind::BlockDevice,
            "fifo" => Kind::Fifo,
            _ => return Err(refused("an entry is of an unknown type")),
        };
        match entry.kind {
            Kind::File if raw.size > 0 => {
                entry.size = raw.size;
                return self.content(entry, 0, raw);
            }
            Kind::Symlink | Kind::Hardlink => entry.link = raw.link_name.as_bytes().to_vec(),
            Kind::CharDevice | Kind::BlockDevice => {
                entry.device_major = raw.dev_major;
                entry.device_minor = raw.dev_minor;
            }
            _ => {}
        }
        (self.sink)(TocItem::Entry(&entry))
    }

    /// The next piece of a file: the entry itself brings the first one.
    fn content(&mut self, mut entry: Entry, known: u64, raw: &Raw<'_>) -> Result<(), IndexError> {
        let from = raw.chunk_offset;
        let missing = entry
            .size
            .checked_sub(from)
            .ok_or_else(|| refused("a chunk lies behind its file"))?;
        let len = if raw.chunk_size == 0 { missing } else { raw.chunk_size };
        if from != known || len > missing || len == 0 {
            return Err(refused("a file's chunks are not in order"));
        }
        if raw.chunk_type != "zeros" {
            let more = !entry.segments.is_empty();
            let (at, fresh) = self
                .layout
                .place(raw.offset, raw.inner_offset, len, more)
                .map_err(IndexError::sink)?;
            if let Some((blob, tar)) = fresh {
                (self.sink)(TocItem::Member { tar, blob })?;
            }
            let text = if raw.chunk_digest.is_empty() && len == entry.size {
                &raw.digest
            } else {
                &raw.chunk_digest
            };
            let tar = TarRange::new(TarOffset(at), len);
            (self.sink)(TocItem::Content {
                tar,
                digest: sha256(text),
            })?;
            if !more {
                entry.headers.start = TarOffset(at);
            }
            match entry.segments.last_mut() {
                Some(last) if last.file_offset + last.len == from => last.len += len,
                _ => entry.segments.push(Segment {
                    file_offset: from,
                    tar_offset: TarOffset(at),
                    len,
                }),
            }
        }
        self.pending = Some((entry, from + len));
        Ok(())
    }

    /// Hands on the file whose chunks have come.
    fn close(&mut self) -> Result<(), IndexError> {
        let Some((entry, known)) = self.pending.take() else {
            return Ok(());
        };
        if known != entry.size {
            return Err(refused("a file's chunks do not reach to its end"));
        }
        (self.sink)(TocItem::Entry(&entry))
    }

    fn own(&mut self, own: &Own) -> Result<(), IndexError> {
        let mut entry = own.entry.clone();
        let (at, fresh) = self
            .layout
            .place(own.blob, own.inner, entry.size, false)
            .map_err(IndexError::sink)?;
        if let Some((blob, tar)) = fresh {
            (self.sink)(TocItem::Member { tar, blob })?;
        }
        (self.sink)(TocItem::Own(TarRange::new(TarOffset(at), entry.size)))?;
        entry.headers = TarRange::new(TarOffset(at), 0);
        for segment in &mut entry.segments {
            segment.tar_offset = TarOffset(at);
        }
        (self.sink)(TocItem::Entry(&entry))
    }
}

fn refused(what: &'static str) -> IndexError {
    IndexError::sink(wrong(what))
}

/// The whole document: an object of which only `version` and `entries` count.
struct Toc<'w, 's, 'a>(&'w mut Walker<'s, 'a>);

impl<'de> DeserializeSeed<'de> for Toc<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Toc<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut version, mut seen) = (0_u64, false);
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "version" => version = map.next_value()?,
                "entries" if seen => return Err(A::Error::custom("it has two lists of entries")),
                "entries" => {
                    seen = true;
                    map.next_value_seed(Entries(self.0))?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        // Version 0 are blobs of several parts, whose maker forgets it.
        if version > 1 {
            return Err(A::Error::custom(format_args!(
                "it is of version {version}, and this program reads version 1"
            )));
        }
        Ok(())
    }
}

struct Entries<'w, 's, 'a>(&'w mut Walker<'s, 'a>);

impl<'de> DeserializeSeed<'de> for Entries<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(raw) = list.next_element::<Raw<'de>>()? {
            if let Err(error) = self.0.take(&raw) {
                self.0.failed = Some(error);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// `sha256:` and 64 digits.
pub(super) fn sha256(text: &str) -> Option<[u8; 32]> {
    let digits = text.strip_prefix("sha256:")?.as_bytes();
    let value = |digit: u8| {
        char::from(digit)
            .to_digit(16)
            .and_then(|value| u8::try_from(value).ok())
    };
    let mut out = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(out)
}

/// A time as RFC 3339 writes it, `2024-02-29T12:30:00.25+01:00`; an empty text is 1970.
fn rfc3339(text: &str) -> Option<Timestamp> {
    if text.is_empty() {
        return Some(Timestamp::default());
    }
    // Go writes nine digits of a second at most, and more than these jiff does not read.
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let text = match text.split_once('.') {
        Some((whole, fraction)) if digits(fraction) > 9 => {
            Cow::Owned(format!("{whole}.{}{}", &fraction[..9], &fraction[digits(fraction)..]))
        }
        _ => Cow::Borrowed(text),
    };
    let pieces = Pieces::parse(&*text).ok()?;
    let east = match pieces.offset()? {
        PiecesOffset::Numeric(offset) => offset.offset().seconds(),
        _ => 0,
    };
    let time = pieces.date().to_datetime(pieces.time()?);
    // Years up to 9999 are fewer nanoseconds than 128 bits hold.
    let nanos = time
        .duration_since(jiff::civil::date(1970, 1, 1).at(0, 0, 0, 0))
        .as_nanos();
    let nanos = nanos - i128::from(east) * 1_000_000_000;
    Some(Timestamp {
        secs: i64::try_from(nanos.div_euclid(1_000_000_000)).ok()?,
        nanos: u32::try_from(nanos.rem_euclid(1_000_000_000)).ok()?,
    })
}
