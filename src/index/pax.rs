//! PAX extension headers: `length key=value` records.
//!
//! In: the body of an `x` or `g` header. Out: the [`Records`] that mean something here. Everything else (`atime`, `ctime`,
//! `uname`, `comment`, `SCHILY.dev`, `SCHILY.acl.*` …) is checked for its form and passed over, as container tools do.

use super::entry::{Timestamp, Xattr};
use super::error::HeaderFault;
use super::number;

/// The most bytes of extended attributes that global headers may give to all entries.
const MAX_GLOBAL_XATTRS: usize = 16 << 10;

/// A keyword's state in one header: PAX lets an empty value take back what a global header said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Setting<T> {
    /// Not mentioned.
    #[default]
    Absent,
    /// Mentioned with an empty value: the header block's own field counts.
    Unset,
    /// Given.
    Set(T),
}

impl<T> Setting<T> {
    /// The value, where there is one.
    pub(super) fn get(&self) -> Option<&T> {
        match self {
            Self::Set(value) => Some(value),
            Self::Absent | Self::Unset => None,
        }
    }

    /// This header's word where it has one, else that of the global header behind it.
    pub(super) fn over<'a>(&'a self, global: &'a Self) -> Option<&'a T> {
        match self {
            Self::Absent => global.get(),
            _ => self.get(),
        }
    }

    /// Takes over what a later global header says.
    fn update(&mut self, later: Self) {
        if !matches!(later, Self::Absent) {
            *self = later;
        }
    }
}

/// The GNU.sparse keywords of one header. The pairs of format 0.0 end up in `map` like those of 0.1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<i64>,
    pub(super) blocks: Option<i64>,
    /// Offsets and lengths in turn, as in the header.
    pub(super) map: Option<Vec<i64>>,
}

/// What one `x` header says, or all `g` headers so far together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Setting<Vec<u8>>,
    pub(super) linkpath: Setting<Vec<u8>>,
    pub(super) size: Setting<i64>,
    pub(super) uid: Setting<i64>,
    pub(super) gid: Setting<i64>,
    pub(super) mtime: Setting<Timestamp>,
    pub(super) sparse: SparseRecords,
    /// From `SCHILY.xattr.*`, sorted, one a name.
    pub(super) xattrs: Vec<Xattr>,
    /// From `LIBARCHIVE.xattr.*`: counts for names that the other spelling does not have.
    pub(super) fallback_xattrs: Vec<Xattr>,
}

impl Records {
    /// Reads the body of an extension header.
    ///
    /// # Errors
    /// [`HeaderFault::PaxRecord`] for what is no record, [`HeaderFault::PaxValue`] for a value of the wrong kind.
    pub(super) fn parse(mut body: &[u8]) -> Result<Self, HeaderFault> {
        let mut records = Self::default();
        let mut pairs = Vec::new();
        while !body.is_empty() {
            let (record, rest) = split_record(body).ok_or(HeaderFault::PaxRecord)?;
            records.take(record, &mut pairs)?;
            body = rest;
        }
        settle(&mut records.xattrs);
        settle(&mut records.fallback_xattrs);
        if !pairs.is_empty() {
            records.sparse.map = Some(pairs);
        }
        Ok(records)
    }

    fn take(&mut self, Record { key, value }: Record<'_>, pairs: &mut Vec<i64>) -> Result<(), HeaderFault> {
        if key.contains(&0) {
            return Err(HeaderFault::PaxRecord);
        }
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.linkpath = text(value)?,
            b"uname" | b"gname" => drop(text(value)?),
            b"size" => self.size = parsed(value, "size", number::decimal)?,
            b"uid" => self.uid = parsed(value, "uid", number::decimal)?,
            b"gid" => self.gid = parsed(value, "gid", number::decimal)?,
            b"mtime" => self.mtime = parsed(value, "mtime", number::pax_time)?,
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.take_sparse(key, value, pairs)?;
                } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push(Xattr {
                        name: name.to_vec(),
                        value: value.to_vec(),
                    });
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let name = url_decoded(name);
                    let value = base64_decoded(value).ok_or(HeaderFault::PaxValue("LIBARCHIVE.xattr"))?;
                    self.fallback_xattrs.push(Xattr { name, value });
                }
            }
        }
        Ok(())
    }

    fn take_sparse(&mut self, key: &[u8], value: &[u8], pairs: &mut Vec<i64>) -> Result<(), HeaderFault> {
        let number = |name| number::decimal(value).ok_or(HeaderFault::PaxValue(name));
        let sparse = &mut self.sparse;
        match key {
            // Format 0.0 repeats these two keywords in turn, which PAX does not foresee.
            b"offset" | b"numbytes" => {
                if pairs.len().is_multiple_of(2) != (key == b"offset") {
                    return Err(HeaderFault::Sparse("offsets and lengths do not alternate"));
                }
                pairs.push(number("GNU.sparse.offset")?);
            }
            _ if value.is_empty() => {}
            b"major" => sparse.major = u64::try_from(number("GNU.sparse.major")?).ok(),
            b"minor" => sparse.minor = u64::try_from(number("GNU.sparse.minor")?).ok(),
            b"name" => sparse.name = text(value)?.get().cloned(),
            b"size" | b"realsize" => sparse.real_size = Some(number("GNU.sparse.realsize")?),
            b"numblocks" => sparse.blocks = Some(number("GNU.sparse.numblocks")?),
            b"map" => {
                let numbers = value.split(|b| *b == b',').map(number::decimal).collect::<Option<_>>();
                sparse.map = Some(numbers.ok_or(HeaderFault::PaxValue("GNU.sparse.map"))?);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes over what a later global header says about the entries behind it. Names, link targets, sizes and sparse maps
    /// cannot sensibly be those of many entries: in a global header they are ignored.
    ///
    /// # Errors
    /// When the attributes for all entries together grow beyond [`MAX_GLOBAL_XATTRS`].
    pub(super) fn update_globals(&mut self, later: Self) -> Result<(), HeaderFault> {
        self.uid.update(later.uid);
        self.gid.update(later.gid);
        self.mtime.update(later.mtime);
        for (known, later) in [
            (&mut self.xattrs, later.xattrs),
            (&mut self.fallback_xattrs, later.fallback_xattrs),
        ] {
            known.extend(later);
            settle(known);
            // Every entry behind it gets a copy.
            if known.iter().map(|x| x.name.len() + x.value.len()).sum::<usize>() > MAX_GLOBAL_XATTRS {
                return Err(HeaderFault::PaxValue("xattr (too much of it in a global header)"));
            }
        }
        Ok(())
    }

    /// The attributes of an entry into `out`: sorted, one a name. This header's go before the global one's, and the raw
    /// spelling goes before libarchive's.
    pub(super) fn collect_xattrs(&self, global: &Self, out: &mut Vec<Xattr>) {
        out.clear();
        let sources = [
            &self.xattrs,
            &self.fallback_xattrs,
            &global.xattrs,
            &global.fallback_xattrs,
        ];
        out.extend(sources.into_iter().flatten().cloned());
        // The sort is stable: of equal names the first stays, which is the one from the stronger source.
        out.sort_by(|a, b| a.name.cmp(&b.name));
        out.dedup_by(|later, first| later.name == first.name);
    }
}

/// Sorts by name and keeps each name's last value.
fn settle(xattrs: &mut Vec<Xattr>) {
    xattrs.reverse();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    xattrs.dedup_by(|earlier, last| earlier.name == last.name);
}

struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// The first record of `body` and what follows it. A record's length counts itself, the space, the pair and the newline.
fn split_record(body: &[u8]) -> Option<(Record<'_>, &[u8])> {
    // More digits than these name no length that an extension header may have.
    const DIGITS: usize = 20;
    let space = body.iter().take(DIGITS + 1).position(|b| *b == b' ')?;
    let len = usize::try_from(number::decimal(&body[..space])?).ok()?;
    let (record, rest) = body.split_at_checked(len)?;
    let pair = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|b| *b == b'=')?;
    let (key, value) = (&pair[..equals], &pair[equals + 1..]);
    (!key.is_empty()).then_some((Record { key, value }, rest))
}

/// A name: NUL bytes in it are a trap for readers that stop there.
fn text(value: &[u8]) -> Result<Setting<Vec<u8>>, HeaderFault> {
    if value.contains(&0) {
        return Err(HeaderFault::PaxRecord);
    }
    Ok(if value.is_empty() {
        Setting::Unset
    } else {
        Setting::Set(value.to_vec())
    })
}

fn parsed<T>(value: &[u8], name: &'static str, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Setting<T>, HeaderFault> {
    if value.is_empty() {
        return Ok(Setting::Unset);
    }
    parse(value).map(Setting::Set).ok_or(HeaderFault::PaxValue(name))
}

/// `%41` is `A`; a per cent sign with anything else behind it stands for itself, as in libarchive.
fn url_decoded(mut text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        let hex = |at: usize| {
            rest.get(at)
                .and_then(|b| char::from(*b).to_digit(16))
                .and_then(|d| u8::try_from(d).ok())
        };
        if let (b'%', Some(high), Some(low)) = (*first, hex(0), hex(1)) {
            out.push(high << 4 | low);
            text = &rest[2..];
        } else {
            out.push(*first);
            text = rest;
        }
    }
    out
}

/// The standard alphabet, padded or not; libarchive writes it without.
pub(crate) fn base64_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.trim_ascii_end();
    let text = text
        .strip_suffix(b"==")
        .or_else(|| text.strip_suffix(b"="))
        .unwrap_or(text);
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 3);
    for group in text.chunks(4) {
        if group.len() == 1 {
            return None;
        }
        let mut bits = 0_u32;
        for place in 0..4 {
            let value = match group.get(place) {
                None => 0,
                Some(c @ b'A'..=b'Z') => c - b'A',
                Some(c @ b'a'..=b'z') => c - b'a' + 26,
                Some(c @ b'0'..=b'9') => c - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                Some(_) => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of records with their lengths worked out.
    fn body(pairs: &[(&str, &[u8])]) -> Vec<u8> {
        pairs
            .iter()
            .flat_map(|(key, value)| crate::index::parser::testing::pax_record(key.as_bytes(), value))
            .collect()
    }

    #[test]
    fn keywords_are_read() {
        let records = Records::parse(&body(&[
            ("path", b"a/b"),
            ("linkpath", b""),
            ("size", b"000000000000000000000999"),
            ("uid", b"4294967295"),
            ("mtime", b"-1.5"),
            ("comment", b"a=b\nc"),
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.user.a", b"\0two\n"),
            ("SCHILY.xattr.user.empty", b""),
            ("LIBARCHIVE.xattr.user.%61", b"b25l"),
            ("LIBARCHIVE.xattr.user.b%20%zz", b"dHc"),
        ]))
        .unwrap();
        assert_eq!(records.path, Setting::Set(b"a/b".to_vec()));
        assert_eq!(records.linkpath, Setting::Unset);
        assert_eq!(records.size, Setting::Set(999));
        assert_eq!(records.uid, Setting::Set(4_294_967_295));
        assert_eq!(records.gid, Setting::Absent);
        assert_eq!(
            records.mtime,
            Setting::Set(Timestamp {
                secs: -2,
                nanos: 500_000_000
            })
        );
        let mut xattrs = Vec::new();
        records.collect_xattrs(&Records::default(), &mut xattrs);
        let xattrs: Vec<_> = xattrs.iter().map(|x| (&x.name[..], &x.value[..])).collect();
        assert_eq!(
            xattrs,
            [
                (&b"user.a"[..], &b"\0two\n"[..]),
                (b"user.b %zz", b"tw"),
                (b"user.empty", b"")
            ]
        );
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"5 a=\n6 b=1"[..],
            b"7 a=b\n",
            b"11 ab=\n",
            b"x a=b\n",
            b"6 a b\n",
            b"6 =bb\n",
            b"-6 a=b\n",
            b"99999999999999999999999 a=b\n",
            b"0 \n",
            b"3 \n",
            b"6",
            b"12 a\0b=xyz1\n",
        ] {
            assert_eq!(
                Records::parse(bad),
                Err(HeaderFault::PaxRecord),
                "{:?}",
                String::from_utf8_lossy(bad)
            );
        }
        assert_eq!(Records::parse(&body(&[("path", b"a\0b")])), Err(HeaderFault::PaxRecord));
        assert_eq!(
            Records::parse(&body(&[("size", b"12x")])),
            Err(HeaderFault::PaxValue("size"))
        );
        assert_eq!(
            Records::parse(&body(&[("mtime", b"1.2.3")])),
            Err(HeaderFault::PaxValue("mtime"))
        );
        assert!(Records::parse(&body(&[("LIBARCHIVE.xattr.a", b"!!")])).is_err());
        assert!(Records::parse(&body(&[("GNU.sparse.numbytes", b"1")])).is_err());
    }

    #[test]
    fn base64_takes_every_length() {
        for (text, value) in [
            ("", ""),
            ("YQ", "a"),
            ("YQ==", "a"),
            ("YWI", "ab"),
            ("YWI=", "ab"),
            ("YWJj", "abc"),
        ] {
            assert_eq!(base64_decoded(text.as_bytes()).as_deref(), Some(value.as_bytes()));
        }
        assert_eq!(base64_decoded(b"Y"), None);
        assert_eq!(base64_decoded(b"Y*=="), None);
    }
}
