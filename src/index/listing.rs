//! An index as text: what `tarblk ls` prints. In: an index. Out: lines, one an entry, in the tar's order; names that appear
//! twice appear twice.
//!
//! Names may hold any byte but NUL. Plain lines escape what a terminal must not see, mtree encodes as vis(3) does, JSON says
//! what is not UTF-8 a second time in base64.

pub(crate) mod mtree;
mod selection;
pub(crate) mod text;

use std::io::{self, Write};

use serde::Serialize;

use super::entry::{Entry, InImage, Kind};
use super::error::IndexError;
use super::reader::Index;
pub use selection::Selection;
use text::{Base64, DateTime, Escaped, Permissions};

/// How entries are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Like `tar --list --verbose --numeric-owner`, times in UTC.
    #[default]
    Plain,
    /// A JSON object a line.
    Json,
    /// A BSD mtree specification, as libarchive writes and reads it.
    Mtree,
}

/// Why a listing was not finished.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListingError {
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The output takes no more.
    #[error("cannot write the listing: {0}")]
    Write(#[from] io::Error),
}

/// Writes all entries of an index.
///
/// # Errors
/// [`ListingError`]: the index's or the output's.
pub fn write<B: AsRef<[u8]>>(index: &Index<B>, format: Format, out: &mut dyn Write) -> Result<(), ListingError> {
    write_selected(index, &Selection::everything(), format, out)
}

/// Writes the entries of an index that are wanted.
///
/// # Errors
/// Those of [`write()`].
pub fn write_selected<B: AsRef<[u8]>>(
    index: &Index<B>,
    selection: &Selection,
    format: Format,
    out: &mut dyn Write,
) -> Result<(), ListingError> {
    if format == Format::Mtree {
        return mtree::write(index, selection, out);
    }
    let mut entries = index.entries()?;
    while let Some(entry) = entries.next_entry()? {
        if !selection.takes(&entry.path) {
            continue;
        }
        match format {
            Format::Plain => plain(entry, out)?,
            _ => json(&Line::of(entry), out)?,
        }
    }
    Ok(out.flush()?)
}

/// Writes an entry as a plain line.
pub(crate) fn plain(entry: &Entry, out: &mut dyn Write) -> io::Result<()> {
    let size = match entry.kind {
        Kind::CharDevice | Kind::BlockDevice => format!("{},{}", entry.device_major, entry.device_minor),
        _ => entry.size.to_string(),
    };
    let owner = format!("{}/{}", entry.uid, entry.gid);
    let width = 19_usize.saturating_sub(owner.len() + 1);
    let time = DateTime(entry.mtime.secs);
    write!(
        out,
        "{} {owner} {size:>width$} {time} {}",
        Permissions(entry),
        Escaped(&entry.path)
    )?;
    match entry.kind {
        Kind::Symlink => writeln!(out, " -> {}", Escaped(&entry.link)),
        Kind::Hardlink => writeln!(out, " link to {}", Escaped(&entry.link)),
        _ => writeln!(out),
    }
}

/// An entry as JSON has it.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'a> {
    path: std::borrow::Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_base64: Option<String>,
    #[serde(rename = "type")]
    kind: &'static str,
    /// Octal, as people write it.
    mode: String,
    uid: i64,
    gid: i64,
    mtime: i64,
    mtime_nanos: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<std::borrow::Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<[u32; 2]>,
    /// Values in base64.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    xattrs: std::collections::BTreeMap<std::borrow::Cow<'a, str>, String>,
    /// Where the headers begin, and their length. A tree does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<[u64; 2]>,
    /// Of a tree: the layer that it comes from, 0 the lowest.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<u32>,
    /// Offset in the file, offset in the tar, length, each in bytes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    segments: Vec<[u64; 3]>,
    /// What is different where the layer is of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    in_image: Option<InImageLine<'a>>,
}

/// What of an entry containerd reads otherwise, as JSON has it.
#[derive(Debug, Serialize)]
struct InImageLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<std::borrow::Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<std::borrow::Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime_nanos: Option<u32>,
    /// The type's number, for which containerd refuses the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused_type: Option<u8>,
}

impl<'a> InImageLine<'a> {
    fn of(other: &'a InImage) -> Self {
        let text = |text: &'a Option<Vec<u8>>| text.as_ref().map(|text| String::from_utf8_lossy(text));
        Self {
            path: text(&other.path),
            link: text(&other.link),
            uid: other.uid,
            gid: other.gid,
            mtime: other.mtime.map(|time| time.secs),
            mtime_nanos: other.mtime.map(|time| time.nanos),
            refused_type: other.refused_type,
        }
    }
}

impl<'a> Line<'a> {
    pub(crate) fn of(entry: &'a Entry) -> Self {
        let not_utf8 = |bytes: &[u8]| std::str::from_utf8(bytes).is_err().then(|| Base64(bytes).to_string());
        let link = matches!(entry.kind, Kind::Symlink | Kind::Hardlink).then_some(&entry.link);
        let device = matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice);
        Self {
            path: String::from_utf8_lossy(&entry.path),
            path_base64: not_utf8(&entry.path),
            kind: match entry.kind {
                Kind::File => "file",
                Kind::Directory => "directory",
                Kind::Symlink => "symlink",
                Kind::Hardlink => "hardlink",
                Kind::CharDevice => "char",
                Kind::BlockDevice => "block",
                Kind::Fifo => "fifo",
            },
            mode: format!("{:04o}", entry.mode),
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime.secs,
            mtime_nanos: entry.mtime.nanos,
            size: (entry.kind == Kind::File).then_some(entry.size),
            link: link.map(|link| String::from_utf8_lossy(link)),
            link_base64: link.and_then(|link| not_utf8(link)),
            device: device.then_some([entry.device_major, entry.device_minor]),
            xattrs: entry
                .xattrs
                .iter()
                .map(|xattr| (String::from_utf8_lossy(&xattr.name), Base64(&xattr.value).to_string()))
                .collect(),
            headers: Some([entry.headers.start.0, entry.headers.len]),
            layer: None,
            segments: entry
                .segments
                .iter()
                .map(|s| [s.file_offset, s.tar_offset.0, s.len])
                .collect(),
            in_image: entry.in_image.as_deref().map(InImageLine::of),
        }
    }

    /// The same of something in a tree, where there are layers instead of headers.
    pub(crate) fn in_layer(entry: &'a Entry, layer: u32) -> Self {
        Self {
            headers: None,
            layer: Some(layer),
            ..Self::of(entry)
        }
    }
}

/// Writes a JSON object as a line.
pub(crate) fn json(object: &impl Serialize, out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, object)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{EndOfArchive, EntrySink, IndexBuilder, Segment, Timestamp, Xattr};
    use crate::units::{TarOffset, TarRange};

    fn listed(format: Format) -> String {
        let mut builder = IndexBuilder::new();
        let mut at = 0;
        let mut add = |entry: Entry| {
            let mut entry = Entry {
                headers: TarRange::new(TarOffset(at), 512),
                ..entry
            };
            if entry.kind == Kind::File && entry.size > 0 {
                entry.segments = vec![Segment {
                    file_offset: 0,
                    tar_offset: TarOffset(at + 512),
                    len: entry.size,
                }];
            }
            at = entry.headers.end().0 + entry.size.next_multiple_of(512);
            builder.entry(&entry).unwrap();
        };
        let named = |path: &[u8], kind, mode| Entry {
            path: path.to_vec(),
            kind,
            mode,
            ..Entry::default()
        };
        add(Entry {
            mtime: Timestamp { secs: -1, nanos: 5 },
            ..named(b"./", Kind::Directory, 0o1777)
        });
        add(Entry {
            size: 3,
            uid: 1000,
            gid: 100,
            mtime: Timestamp {
                secs: 981_173_106,
                nanos: 123_456_789,
            },
            xattrs: vec![Xattr {
                name: b"user.a".to_vec(),
                value: b"\0b".to_vec(),
            }],
            ..named(b"/d/a b#=*\n\xff\xc3\xa9", Kind::File, 0o4755)
        });
        add(Entry {
            link: b"d/a b#=*\n\xff\xc3\xa9".to_vec(),
            ..named(b"hard", Kind::Hardlink, 0o644)
        });
        add(Entry {
            link: b"gone".to_vec(),
            ..named(b"hard2", Kind::Hardlink, 0o644)
        });
        add(Entry {
            link: b"x y\\z".to_vec(),
            ..named(b"sym", Kind::Symlink, 0o777)
        });
        add(Entry {
            device_major: 5,
            device_minor: 300,
            ..named(b"chr", Kind::CharDevice, 0o600)
        });
        add(Entry {
            device_major: 8,
            device_minor: 1,
            ..named(b"blk", Kind::BlockDevice, 0o600)
        });
        add(named(b"fifo", Kind::Fifo, 0o2010));
        let index = Index::open(builder.finish(at, EndOfArchive::Missing)).unwrap();
        let mut out = Vec::new();
        write(&index, format, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn plain_lines() {
        let expected = "\
drwxrwxrwt 0/0               0 1969-12-31 23:59 ./
-rwsr-xr-x 1000/100          3 2001-02-03 04:05 /d/a b#=*\\n\\377é
hrw-r--r-- 0/0               0 1970-01-01 00:00 hard link to d/a b#=*\\n\\377é
hrw-r--r-- 0/0               0 1970-01-01 00:00 hard2 link to gone
lrwxrwxrwx 0/0               0 1970-01-01 00:00 sym -> x y\\\\z
crw------- 0/0           5,300 1970-01-01 00:00 chr
brw------- 0/0             8,1 1970-01-01 00:00 blk
p-----s--- 0/0               0 1970-01-01 00:00 fifo
";
        assert_eq!(listed(Format::Plain), expected);
    }

    #[test]
    fn json_lines() {
        let lines = listed(Format::Json);
        let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 8);
        assert_eq!(lines[1]["path_base64"], "L2QvYSBiIz0qCv/DqQ==");
        assert_eq!(lines[1]["mode"], "4755");
        assert_eq!(
            (lines[1]["mtime"].as_i64(), lines[1]["mtime_nanos"].as_u64()),
            (Some(981_173_106), Some(123_456_789))
        );
        assert_eq!(lines[1]["xattrs"]["user.a"], "AGI=");
        assert_eq!(lines[1]["segments"], serde_json::json!([[0, 1024, 3]]));
        assert_eq!(lines[4]["link"], "x y\\z");
        assert_eq!(lines[5]["device"], serde_json::json!([5, 300]));
        assert!(lines[0].get("path_base64").is_none() && lines[0].get("size").is_none());
    }

    #[test]
    fn mtree_lines() {
        let expected = "\
#mtree
. type=dir mode=1777 uid=0 gid=0 time=-1.000000005
./d/a\\040b\\043\\075\\052\\012\\377\\303\\251 type=file mode=4755 uid=1000 gid=100 size=3 time=981173106.123456789
./hard type=file mode=4755 uid=1000 gid=100 size=3 time=981173106.123456789
./hard2 type=file mode=644 uid=0 gid=0 time=0.000000000
./sym type=link mode=777 uid=0 gid=0 time=0.000000000 link=x\\040y\\134z
./chr type=char mode=600 uid=0 gid=0 time=0.000000000 device=native,5,300
./blk type=block mode=600 uid=0 gid=0 time=0.000000000 device=native,8,1
./fifo type=fifo mode=2010 uid=0 gid=0 time=0.000000000
";
        assert_eq!(listed(Format::Mtree), expected);
    }
}
