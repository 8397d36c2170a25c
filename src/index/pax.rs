//! PAX extension headers: `length key=value` records.
//!
//! In: the body of an `x` or `g` header. Out: the [`Records`] that mean something here, and the [`Globals`] that stay. Everything else (`atime`, `ctime`,
//! `uname`, `comment`, `SCHILY.dev`, `SCHILY.acl.*`, `LIBARCHIVE.xattr.*` …) is checked for its form and passed over, as container tools do.

use super::entry::{Timestamp, Xattr};
use super::error::HeaderFault;
use super::number;

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

/// What all `g` headers so far say together of the entries behind them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Globals {
    pub(super) uid: Setting<i64>,
    pub(super) gid: Setting<i64>,
    pub(super) mtime: Setting<Timestamp>,
}

impl Globals {
    /// Takes over what a later global header says. Names, link targets, sizes and sparse maps cannot sensibly be those of
    /// many entries: in a global header they are ignored, and extended attributes are as well, as in GNU tar and Go.
    pub(super) fn update(&mut self, later: Records) {
        self.uid.update(later.uid);
        self.gid.update(later.gid);
        self.mtime.update(later.mtime);
    }
}

/// What one extension header says.
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
            ("LIBARCHIVE.xattr.user.b", b"dHc"),
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
        let xattrs: Vec<_> = records.xattrs.iter().map(|x| (&x.name[..], &x.value[..])).collect();
        assert_eq!(xattrs, [(&b"user.a"[..], &b"\0two\n"[..]), (b"user.empty", b"")]);
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
        assert!(Records::parse(&body(&[("GNU.sparse.numbytes", b"1")])).is_err());
    }
}
