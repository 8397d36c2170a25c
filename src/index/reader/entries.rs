//! The entries of an index, decoded batch by batch. In: the entry table's zstd frame. Out: one entry after the other, each lent.
//! No length in the table is believed before it is checked, and memory grows with what comes.

use std::io::Read;

use sha2::{Digest, Sha256};

use crate::index::entry::{Entry, InImage, Kind, Segment, Timestamp, Xattr};
use crate::index::error::{IndexError, IndexFault};
use crate::index::format::{self, Columns};
use crate::index::summary::Summary;
use crate::index::varint::{self, Cursor};
use crate::index::writer::{Owner, State};
use crate::index::{TAR_BLOCK, align_up, len_u64};
use crate::units::{TarOffset, TarRange};

/// The entry table while it is decoded: a bounded reader that may digest what passes.
struct Stream<'a> {
    frame: zstd::stream::read::Decoder<'static, &'a [u8]>,
    left: u64,
    digest: Option<Sha256>,
}

impl Stream<'_> {
    /// Appends exactly `len` bytes. Grows as bytes really come, not by what was announced.
    fn read(&mut self, len: u64, out: &mut Vec<u8>) -> Result<(), IndexFault> {
        self.left = self
            .left
            .checked_sub(len)
            .ok_or(IndexFault::Malformed("entry table (its length)"))?;
        let before = out.len();
        let got = (&mut self.frame).take(len).read_to_end(out);
        if got.ok().map(len_u64) != Some(len) {
            return Err(IndexFault::Malformed("entry table (compression)"));
        }
        if let Some(digest) = &mut self.digest {
            digest.update(&out[before..]);
        }
        Ok(())
    }

    fn number(&mut self) -> Result<u64, IndexFault> {
        let mut bytes = Vec::with_capacity(10);
        loop {
            self.read(1, &mut bytes)?;
            if bytes.last().is_none_or(|last| last & 0x80 == 0) || bytes.len() == 10 {
                return Cursor::new(&bytes).number();
            }
        }
    }
}

/// The table of what containerd reads otherwise, while it is decoded.
struct InImageTable<'a> {
    stream: Stream<'a>,
    /// The entry that the next record is of, counted from 1; `None` behind the last one.
    next: Option<u64>,
}

/// All fields that a record can have.
const KNOWN: u64 = 2 * format::REFUSED_TYPE - 1;
const IN_IMAGE_FAULT: IndexFault = IndexFault::Malformed("table of what images read otherwise");

impl InImageTable<'_> {
    /// Reads which entry the next record is of.
    fn advance(&mut self, last: u64) -> Result<(), IndexFault> {
        let further = self.stream.number()?;
        self.next = match further {
            0 if self.stream.left > 0 => return Err(IN_IMAGE_FAULT),
            0 => None,
            further => Some(last.checked_add(further).ok_or(IN_IMAGE_FAULT)?),
        };
        Ok(())
    }

    /// What is different for the entry of this number, counted from 1.
    fn take(&mut self, number: u64) -> Result<Option<Box<InImage>>, IndexFault> {
        if self.next != Some(number) {
            return Ok(None);
        }
        let stream = &mut self.stream;
        let fields = stream.number()?;
        if fields == 0 || fields & !KNOWN != 0 {
            return Err(IN_IMAGE_FAULT);
        }
        let has = |field: u64| fields & field != 0;
        let mut other = Box::<InImage>::default();
        for (field, text) in [
            (format::OTHER_PATH, &mut other.path),
            (format::OTHER_LINK, &mut other.link),
        ] {
            if has(field) {
                let len = stream.number()?;
                if len > format::MAX_OTHER_TEXT {
                    return Err(IndexFault::TooLarge("table of what images read otherwise"));
                }
                stream.read(len, text.get_or_insert_default())?;
            }
        }
        for (field, id) in [(format::OTHER_UID, &mut other.uid), (format::OTHER_GID, &mut other.gid)] {
            if has(field) {
                *id = Some(stream.number()?.cast_signed());
            }
        }
        if has(format::OTHER_MTIME) {
            let secs = varint::unzigzag(stream.number()?);
            let nanos = u32::try_from(stream.number()?)
                .ok()
                .filter(|nanos| *nanos < 1_000_000_000);
            other.mtime = Some(Timestamp {
                secs,
                nanos: nanos.ok_or(IN_IMAGE_FAULT)?,
            });
        }
        if has(format::REFUSED_TYPE) {
            let flag = u8::try_from(stream.number()?).map_err(|_| IN_IMAGE_FAULT)?;
            other.refused_type = Some(flag);
        }
        self.advance(number)?;
        Ok(Some(other))
    }
}

fn open_frame(body: &[u8], left: u64) -> Result<Stream<'_>, IndexFault> {
    let unusable = |_| IndexFault::Malformed("entry table (compression)");
    let mut frame = zstd::stream::read::Decoder::with_buffer(body)
        .map_err(unusable)?
        .single_frame();
    frame.window_log_max(format::WINDOW_LOG).map_err(unusable)?;
    Ok(Stream {
        frame,
        left,
        digest: None,
    })
}

/// The entries of an index, lent one at a time.
pub struct Entries<'a> {
    stream: Stream<'a>,
    in_image: Option<InImageTable<'a>>,
    /// Whether bytes lie before an entry that could be a global header's, and the index does not say what one would have
    /// changed: it was made before indexes said so.
    may_lack_in_image: bool,
    summary: Summary,
    batch: Vec<u8>,
    /// Where each column continues in `batch`, and where it ends.
    columns: Columns<(usize, usize)>,
    in_batch: u64,
    done: u64,
    ended: bool,
    state: State,
    owners: Vec<Owner>,
    xattr_sets: XattrSets,
    entry: Entry,
}

impl std::fmt::Debug for Entries<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entries")
            .field("done", &self.done)
            .field("of", &self.summary.entries)
            .finish_non_exhaustive()
    }
}

impl<'a> Entries<'a> {
    /// Of the entry table's bytes in the file and its decoded length, and the same of the table of what images read otherwise.
    pub(super) fn new(
        (body, decoded): (&'a [u8], u64),
        in_image: Option<(&'a [u8], u64)>,
        summary: Summary,
    ) -> Result<Self, IndexError> {
        let in_image = in_image.map(|(body, decoded)| {
            let mut table = InImageTable {
                stream: open_frame(body, decoded)?,
                next: None,
            };
            table.advance(0)?;
            Ok::<_, IndexFault>(table)
        });
        Ok(Self {
            stream: open_frame(body, decoded)?,
            in_image: in_image.transpose()?,
            may_lack_in_image: false,
            summary,
            batch: Vec::new(),
            columns: Columns::default(),
            in_batch: 0,
            done: 0,
            ended: false,
            state: State::default(),
            owners: Vec::new(),
            xattr_sets: XattrSets::default(),
            entry: Entry::default(),
        })
    }

    /// The next entry, valid until the one after it is asked for; `None` behind the last.
    ///
    /// # Errors
    /// [`IndexError::Index`] when the table is malformed. It gives no further entries after that.
    pub fn next_entry(&mut self) -> Result<Option<&Entry>, IndexError> {
        if self.in_batch == 0 && !self.ended {
            self.open_batch()?;
        }
        if self.ended {
            return Ok(None);
        }
        self.decode()?;
        self.in_batch -= 1;
        self.done += 1;
        if self.in_batch == 0 && self.columns.each_mut().iter().any(|(at, end)| at != end) {
            return Err(IndexFault::Malformed("entry table (a column is too long)").into());
        }
        Ok(Some(&self.entry))
    }

    /// Where the last entry's content and its padding end.
    pub(super) fn end(&self) -> TarOffset {
        self.state.next
    }

    /// Whether what was read so far may be different in an image without the index saying so: it is of a tar that may have
    /// global headers, and was made before indexes told of them.
    pub(super) fn may_lack_in_image(&self) -> bool {
        self.may_lack_in_image
    }

    /// Reads what is left and returns the SHA-256 of all that is decoded from here on.
    pub(super) fn read_to_end(mut self) -> Result<[u8; 32], IndexError> {
        self.stream.digest = Some(Sha256::new());
        while self.next_entry()?.is_some() {}
        Ok(self.stream.digest.unwrap_or_default().finalize().into())
    }

    fn open_batch(&mut self) -> Result<(), IndexFault> {
        self.in_batch = self.stream.number()?;
        if self.in_batch == 0 {
            self.ended = true;
            if self.done != self.summary.entries || self.stream.left != 0 {
                return Err(IndexFault::Malformed("entry table (not as many entries as announced)"));
            }
            if self.in_image.as_ref().is_some_and(|table| table.next.is_some()) {
                return Err(IN_IMAGE_FAULT);
            }
            return Ok(());
        }
        if self.in_batch > len_u64(format::BATCH_ENTRIES) || self.in_batch > self.summary.entries - self.done {
            return Err(IndexFault::Malformed("entry table (more entries than announced)"));
        }
        let mut end = 0_u64;
        for place in self.columns.each_mut() {
            let start = end;
            end = end.saturating_add(self.stream.number()?);
            if end > format::MAX_BATCH {
                return Err(IndexFault::TooLarge("entry table"));
            }
            let position = |at| usize::try_from(at).map_err(|_| IndexFault::TooLarge("entry table"));
            *place = (position(start)?, position(end)?);
        }
        self.batch.clear();
        self.stream.read(end, &mut self.batch)
    }

    fn decode(&mut self) -> Result<(), IndexFault> {
        let mut columns = Columns::<Cursor<'_>>::default();
        for (cursor, (at, end)) in columns.each_mut().into_iter().zip(self.columns.each_mut()) {
            *cursor = Cursor::new(&self.batch[*at..*end]);
        }
        let tag = columns.tags.byte()?;
        if tag & format::TAG_UNUSED != 0 {
            return Err(IndexFault::Malformed("entry table (a tag)"));
        }
        let kind = format::KINDS.get(usize::from(tag & format::TAG_KIND));
        let entry = &mut self.entry;
        entry.clear();
        entry.kind = *kind.ok_or(IndexFault::Malformed("entry table (a kind)"))?;

        let owner = read_owner(&mut columns, &mut self.owners)?;
        entry.mode = owner.mode;
        (entry.uid, entry.gid) = (owner.uid.cast_signed(), owner.gid.cast_signed());
        entry.mtime = read_time(&mut columns, &mut self.state)?;

        let (shared, fresh) = (columns.shared.number()?, columns.fresh.number()?);
        front_decode(&mut self.state.path, shared, columns.names.bytes(fresh)?)?;
        entry.path.extend_from_slice(&self.state.path);
        if entry.kind == Kind::File {
            entry.size = columns.sizes.number()?;
            if entry.size > i64::MAX.unsigned_abs() {
                return Err(IndexFault::Malformed("entry table (a size)"));
            }
        }
        if matches!(entry.kind, Kind::Symlink | Kind::Hardlink) {
            let (shared, fresh) = (columns.links.number()?, columns.links.number()?);
            front_decode(&mut self.state.link, shared, columns.links.bytes(fresh)?)?;
            entry.link.extend_from_slice(&self.state.link);
        }
        let rare = &mut columns.rare;
        entry.headers = self.state.usual_headers();
        if tag & format::TAG_PLACED != 0 {
            entry.headers = read_place(rare, self.state.next)?;
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            let mut number =
                || u32::try_from(rare.number()?).map_err(|_| IndexFault::Malformed("entry table (a device number)"));
            (entry.device_major, entry.device_minor) = (number()?, number()?);
        }
        if tag & format::TAG_XATTRS != 0 {
            read_xattrs(rare, &mut self.xattr_sets, &mut entry.xattrs)?;
        }
        if tag & format::TAG_SPARSE != 0 {
            read_segments(rare, entry)?;
        } else if entry.size > 0 {
            entry.segments.push(Segment {
                file_offset: 0,
                tar_offset: entry.headers.end(),
                len: entry.size,
            });
        }
        let end = entry.payload().end();
        if end.0 > self.summary.tar_bytes {
            return Err(IndexFault::Malformed("entry table (content beyond the tar's end)"));
        }
        if let Some(table) = &mut self.in_image {
            entry.in_image = table.take(self.done + 1)?;
        } else {
            let gap = entry.headers.start.since(self.state.next);
            self.may_lack_in_image |= gap >= format::GLOBAL_HEADER;
        }
        self.state.next = TarOffset(align_up(end.0));

        let consumed = columns.each_mut().map(|cursor| cursor.remaining());
        for ((at, end), rest) in self.columns.each_mut().into_iter().zip(consumed) {
            *at = *end - rest;
        }
        Ok(())
    }
}

/// The sets of attributes that have numbers.
#[derive(Debug, Default)]
struct XattrSets {
    known: Vec<Vec<Xattr>>,
    weight: usize,
}

fn read_owner(columns: &mut Columns<Cursor<'_>>, known: &mut Vec<Owner>) -> Result<Owner, IndexFault> {
    let number = columns.owners.number()?;
    if let Some(owner) = usize::try_from(number).ok().and_then(|number| known.get(number)) {
        return Ok(*owner);
    }
    let fields = &mut columns.new_owners;
    let mode = u16::try_from(fields.number()?).ok().filter(|mode| *mode <= 0o7777);
    let mode = mode.ok_or(IndexFault::Malformed("entry table (a mode)"))?;
    let owner = Owner {
        mode,
        uid: fields.number()?,
        gid: fields.number()?,
    };
    if number != len_u64(known.len()) {
        return Err(IndexFault::Malformed("entry table (an owner's number)"));
    }
    if known.len() < format::MAX_OWNERS {
        known.push(owner);
    }
    Ok(owner)
}

fn read_time(columns: &mut Columns<Cursor<'_>>, state: &mut State) -> Result<Timestamp, IndexFault> {
    let fault = IndexFault::Malformed("entry table (a time)");
    let place = usize::try_from(columns.times.number()?).map_err(|_| fault)?;
    if let Some(time) = state.times.recall(place) {
        return Ok(time);
    }
    if place != format::RECENT_TIMES {
        return Err(fault);
    }
    let secs = state.times.newest.wrapping_add(columns.new_times.signed()?);
    let nanos = u32::try_from(columns.new_times.number()?)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)
        .ok_or(fault)?;
    let time = Timestamp { secs, nanos };
    state.times.remember(time);
    Ok(time)
}

/// Keeps the first `shared` bytes and appends the fresh ones.
fn front_decode(text: &mut Vec<u8>, shared: u64, fresh: &[u8]) -> Result<(), IndexFault> {
    let shared = usize::try_from(shared).ok().filter(|shared| *shared <= text.len());
    text.truncate(shared.ok_or(IndexFault::Malformed("entry table (a name)"))?);
    text.extend_from_slice(fresh);
    Ok(())
}

fn read_place(rare: &mut Cursor<'_>, next: TarOffset) -> Result<TarRange, IndexFault> {
    let mut blocks = || {
        let bytes = rare
            .number()?
            .checked_mul(TAR_BLOCK)
            .filter(|bytes| *bytes <= i64::MAX.unsigned_abs());
        bytes.ok_or(IndexFault::Malformed("entry table (a place)"))
    };
    Ok(TarRange::new(next.plus(blocks()?), blocks()?))
}

fn read_xattrs(rare: &mut Cursor<'_>, sets: &mut XattrSets, out: &mut Vec<Xattr>) -> Result<(), IndexFault> {
    let fault = IndexFault::Malformed("entry table (attributes)");
    let number = rare.number()?;
    if let Some(set) = usize::try_from(number).ok().and_then(|number| sets.known.get(number)) {
        out.extend_from_slice(set);
        return Ok(());
    }
    if number != len_u64(sets.known.len()) {
        return Err(fault);
    }
    for _ in 0..rare.number()? {
        let len = rare.number()?;
        let name = rare.bytes(len)?.to_vec();
        let len = rare.number()?;
        let value = rare.bytes(len)?.to_vec();
        out.push(Xattr { name, value });
    }
    if out.is_empty() || !out.is_sorted_by(|a, b| a.name < b.name) {
        return Err(fault);
    }
    let weight = sets.weight + format::xattr_weight(out);
    if sets.known.len() < format::MAX_XATTR_SETS && weight <= format::MAX_XATTR_WEIGHT {
        sets.weight = weight;
        sets.known.push(out.clone());
    }
    Ok(())
}

fn read_segments(rare: &mut Cursor<'_>, entry: &mut Entry) -> Result<(), IndexFault> {
    let fault = IndexFault::Malformed("entry table (segments)");
    let mut end = 0_u64;
    let mut tar_offset = entry.headers.end();
    for _ in 0..rare.number()? {
        let file_offset = end.checked_add(rare.number()?).ok_or(fault)?;
        let len = rare.number()?;
        end = file_offset
            .checked_add(len)
            .filter(|end| *end <= entry.size)
            .ok_or(fault)?;
        if len == 0 {
            return Err(fault);
        }
        entry.segments.push(Segment {
            file_offset,
            tar_offset,
            len,
        });
        tar_offset = tar_offset.plus(len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::fuzzing::index_around;
    use crate::index::{Collector, Index};

    /// Reads a table of `entries` entries of a tar of 4 GiB: the fault, if there is one.
    fn read(entries: u8, table: &[u8]) -> Result<Vec<Entry>, IndexFault> {
        let data = [&[entries, 0, 0, 0, 0, 0xff][..], table].concat();
        let mut all = Collector::default();
        let index = Index::open(index_around(&data)).unwrap();
        match index.replay(&mut all) {
            Ok(()) => Ok(all.0),
            Err(IndexError::Index(fault)) => Err(fault),
            Err(other) => panic!("{other}"),
        }
    }

    /// A batch of one entry: a directory `d` of root's, mode 0, at second 0, with these changes to its columns.
    fn batch(change: impl Fn(&mut Columns<Vec<u8>>)) -> Vec<u8> {
        let mut columns = Columns {
            tags: vec![1],
            owners: vec![0],
            new_owners: vec![0, 0, 0],
            shared: vec![0],
            fresh: vec![1],
            names: b"d".to_vec(),
            times: vec![0],
            ..Columns::default()
        };
        change(&mut columns);
        let mut table = vec![1];
        for column in columns.each_mut() {
            table.push(u8::try_from(column.len()).unwrap());
        }
        for column in columns.each_mut() {
            table.append(column);
        }
        table.push(0);
        table
    }

    #[test]
    fn a_table_made_by_hand_is_read() {
        let entries = read(1, &batch(|_| {})).unwrap();
        assert_eq!((entries[0].kind, &entries[0].path[..]), (Kind::Directory, &b"d"[..]));
        let file = read(1, &batch(|c| (c.tags, c.sizes) = (vec![0], vec![5]))).unwrap();
        assert_eq!(
            file[0].segments,
            [Segment {
                file_offset: 0,
                tar_offset: TarOffset(512),
                len: 5
            }]
        );
    }

    #[test]
    fn tables_that_make_no_sense_are_faults() {
        type Change = fn(&mut Columns<Vec<u8>>);
        let changes: [(&str, Change); 19] = [
            ("no kind", |c| c.tags = vec![7]),
            ("unused tag bits", |c| c.tags = vec![0x81]),
            ("a column too long", |c| c.names.push(b'x')),
            ("a column too short", |c| c.fresh = vec![2]),
            ("more shared than there is", |c| c.shared = vec![1]),
            ("an owner out of turn", |c| c.owners = vec![5]),
            ("a mode of thirteen bits", |c| c.new_owners = vec![0x80, 0x40, 0, 0]),
            ("a time that is not there", |c| c.times = vec![33]),
            ("too many nanoseconds", |c| {
                (c.times, c.new_times) = (vec![32], vec![0, 0x80, 0x94, 0xeb, 0xdc, 0x03]);
            }),
            ("attributes out of turn", |c| (c.tags, c.rare) = (vec![0x21], vec![3])),
            ("a set of no attributes", |c| {
                (c.tags, c.rare) = (vec![0x21], vec![0, 0]);
            }),
            ("the same attribute twice", |c| {
                (c.tags, c.rare) = (vec![0x21], vec![0, 2, 1, b'a', 0, 1, b'a', 0]);
            }),
            ("an endless attribute", |c| {
                (c.tags, c.rare) = (vec![0x21], vec![0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f]);
            }),
            ("a segment beyond the size", |c| {
                (c.tags, c.sizes, c.rare) = (vec![0x10], vec![5], vec![1, 2, 4]);
            }),
            ("a segment of no bytes", |c| {
                (c.tags, c.sizes, c.rare) = (vec![0x10], vec![5], vec![1, 0, 0]);
            }),
            ("a wide device number", |c| {
                (c.tags, c.rare) = (vec![4], vec![0xff, 0xff, 0xff, 0xff, 0x10, 0]);
            }),
            ("content beyond the tar", |c| {
                (c.tags, c.sizes) = (vec![0], vec![0x80, 0x80, 0x80, 0x80, 0x20]);
            }),
            ("a huge size", |c| {
                (c.tags, c.sizes) = (vec![0], vec![0xff; 9].into_iter().chain([1]).collect());
            }),
            ("a place beyond the tar", |c| {
                (c.tags, c.rare) = (vec![0x09], vec![0xff, 0xff, 0xff, 0xff, 0x0f, 1]);
            }),
        ];
        for (what, change) in changes {
            let fault = read(1, &batch(change));
            assert!(matches!(fault, Err(IndexFault::Malformed(_))), "{what}: {fault:?}");
        }
        let one = batch(|_| {});
        assert!(read(2, &one).is_err(), "fewer entries than announced");
        assert!(read(0, &one).is_err(), "more entries than announced");
        assert!(read(1, &one[..one.len() - 1]).is_err(), "no end");
        assert!(read(1, &[&one[..], &[0]].concat()).is_err(), "something behind the end");
        assert!(read(1, &[]).is_err());
        let huge = [&[1, 0xff, 0xff, 0xff, 0xff, 0x0f][..], &[0; 10]].concat();
        assert_eq!(read(1, &huge), Err(IndexFault::TooLarge("entry table")));
    }
}
