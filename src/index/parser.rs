//! The push-driven header parser: a walker brings bytes, the parser says where it needs the next ones, entries come out.

mod sparse;

use super::entry::{Entry, InImage, Kind, Segment, Timestamp};
use super::error::{ArchiveFault, HeaderFault, IndexError};
use super::header::{Block, Header, SparseMap};
use super::pax::{Globals, Records, Setting};
use super::sink::EntrySink;
use super::sparse::{DecimalMap, MapBuilder};
use super::{TAR_BLOCK, align_up, len_u64};
use crate::layer::{Coding, other_format};
use crate::units::{TarOffset, TarRange};
use sparse::PaxSparse;

/// The longest body of an extension header (`x`, `g`, `L`, `K`), in bytes: the limit of Go's archive/tar and of libarchive.
const MAX_EXTENSION: u64 = 1 << 20;

/// A header block's length as a buffer size.
const BLOCK: usize = 512;

/// Reads a tar's headers from pieces of it.
///
/// Call [`feed`](Self::feed) with bytes that reach the position [`wants`](Self::wants) names, again and again, in pieces of
/// any size; what lies between (payload) need not be brought. At the tar's end call [`finish`](Self::finish). After an error
/// the parser is of no further use.
///
/// # What a header means
/// Two programs read tars that this one has to agree with: containerd (with Go's archive/tar) reads the layers of images, GNU
/// tar reads tars by themselves. They mostly agree; an entry says what GNU tar reads, and where containerd reads something
/// else in the same headers, [`Entry::in_image`] says that. docs/rules.md lists every difference and how it was checked.
/// * Names: ustar and star prefixes; `path` before the header's own name and before a GNU long name (Go: behind it), a
///   sparse file's real name before both. Of several extension headers of a kind the last one counts, and only it.
/// * Types: `0`, `7` and NUL are files; NUL with a trailing slash is a directory (v7). Links, devices, directories and fifos
///   have no payload whatever their size says. Old GNU sparse files (`S`) and dump directories (`D`) are what they are in
///   GNU tar; volume labels (`V`) are passed over; Solaris' `X` is `x`. Every other type is a regular file in GNU tar and
///   refused by containerd, but for a continued file (`M`), which both refuse.
/// * Extension headers longer than 1 MiB, PAX records that are not well formed, numbers that are none, sizes below zero and
///   sparse maps that do not fit the stored bytes are errors. The checksum may be of signed or unsigned bytes.
/// * The end is two zero blocks, or one at the end of the tar, or the end of the tar, with or without the last padding.
///   What follows the end is ignored. One zero block in the middle ends a tar for GNU tar, and containerd refuses it:
///   [`EndOfArchive::LoneZeroBlock`].
/// * Global PAX headers: in GNU tar `uid`, `gid` and `mtime` apply to the entries behind; in containerd nothing does.
///
/// And where it goes its own way, deliberately:
/// * A name, link target, size or sparse map in a global header is ignored: it would be that of many entries, and could only
///   hide or forge entries. A later global header changes only what it names (POSIX; GNU tar forgets the one before). A
///   global header between an extension header and its entry is an error: Go forgets the extension there and others do
///   not, so two readers could see two archives.
/// * `SCHILY.xattr` with an empty value is an attribute with an empty value (containerd and GNU tar agree); every other
///   keyword with an empty value is unset.
/// * Only what is used of a header is checked: nonsense in a file's device numbers does no harm.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// Where the unit begins that is needed next: a header block, an extension's body, a block of a sparse map.
    unit_at: u64,
    /// How long it is.
    unit_len: usize,
    /// What has come of it so far, when it comes in pieces.
    unit: Vec<u8>,
    before: Before,
    globals: Globals,
    entry: Entry,
    map: MapBuilder,
    decimal_map: DecimalMap,
    file: OpenFile,
    /// Where the last entry's stored bytes end.
    payload_end: u64,
}

/// What the next unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    /// A header, or the second zero block.
    AfterZeroBlock,
    Body(Extension),
    /// A block of an old GNU sparse map.
    GnuMap,
    /// A block of a PAX 1.0 sparse map.
    DecimalMap,
    Ended(EndOfArchive),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extension {
    Local,
    Global,
    LongName,
    LongLink,
}

/// The extension headers since the last entry.
#[derive(Debug, Default)]
struct Before {
    /// Where the first of them begins.
    start: Option<u64>,
    records: Option<Records>,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

/// A file whose sparse map is still being read.
#[derive(Clone, Copy, Debug, Default)]
struct OpenFile {
    /// Its header block, for messages.
    header_at: u64,
    /// Where the tar's own payload begins; the stored bytes may begin later.
    payload: TarRange,
    /// Its length when read.
    size: u64,
}

/// Whether a tar has the zero blocks that should end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOfArchive {
    /// Two zero blocks.
    Marked,
    /// The tar just ends, which is common and harmless.
    Missing,
    /// One zero block with something else behind it: the end for GNU tar, while containerd refuses such a layer.
    LoneZeroBlock,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the beginning of a tar.
    #[must_use]
    pub fn new() -> Self {
        Self::starting_at(TarOffset(0))
    }

    /// A parser in the middle of a tar, at what looks like a header ([`looks_like_header`]) of an entry. What it finds is a
    /// guess: the bytes may be those of a tar inside the tar, and global headers before them are not known.
    #[must_use]
    pub fn starting_at(at: TarOffset) -> Self {
        Self {
            state: State::Header,
            unit_at: at.0,
            unit_len: BLOCK,
            unit: Vec::new(),
            before: Before::default(),
            globals: Globals::default(),
            entry: Entry::default(),
            map: MapBuilder::default(),
            decimal_map: DecimalMap::default(),
            file: OpenFile::default(),
            payload_end: 0,
        }
    }

    /// Where the next byte lies that the parser needs; it may be past the tar's end. `None` once the end mark was seen.
    #[must_use]
    pub fn wants(&self) -> Option<TarOffset> {
        (!self.has_ended()).then(|| TarOffset(self.unit_at + len_u64(self.unit.len())))
    }

    /// How many bytes are needed from [`wants`](Self::wants) on, at least, to get any further. Zero after the end.
    #[must_use]
    pub fn wants_len(&self) -> usize {
        if self.has_ended() {
            0
        } else {
            self.unit_len - self.unit.len()
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    /// Whether the next byte needed is the first of an entry (or of its extension headers, or of the end mark).
    #[must_use]
    pub fn between_entries(&self) -> bool {
        self.state == State::Header && self.unit.is_empty() && self.before.start.is_none()
    }

    /// Takes the tar's bytes from `at` on and hands the entries that they complete to `sink`. Bytes before the wanted
    /// position are passed over.
    ///
    /// # Errors
    /// What is wrong with the tar, naming the offset; [`ArchiveFault::Gap`] when `at` lies behind what was wanted; what the
    /// sink returns.
    pub fn feed(
        &mut self,
        at: TarOffset,
        bytes: &[u8],
        sink: &mut (impl EntrySink + ?Sized),
    ) -> Result<(), IndexError> {
        let end = at.0.saturating_add(len_u64(bytes.len()));
        loop {
            let Some(TarOffset(wanted)) = self.wants() else {
                return Ok(());
            };
            if wanted >= end {
                return Ok(());
            }
            let skip = wanted
                .checked_sub(at.0)
                .and_then(|skip| usize::try_from(skip).ok())
                .ok_or(IndexError::Archive {
                    at,
                    fault: ArchiveFault::Gap,
                })?;
            let bytes = &bytes[skip..];
            if self.unit.is_empty() && bytes.len() >= self.unit_len {
                self.take_unit(&bytes[..self.unit_len], sink)?;
                continue;
            }
            let missing = self.unit_len - self.unit.len();
            self.unit.extend_from_slice(&bytes[..missing.min(bytes.len())]);
            if self.unit.len() == self.unit_len {
                let mut unit = std::mem::take(&mut self.unit);
                self.take_unit(&unit, sink)?;
                unit.clear();
                self.unit = unit;
            }
        }
    }

    /// Ends the parse of a tar of `len` bytes.
    ///
    /// # Errors
    /// [`IndexError::Truncated`] when the tar stops in the middle of a header or payload, [`IndexError::NotATar`] when it is
    /// too short to be one.
    pub fn finish(&mut self, len: TarOffset) -> Result<EndOfArchive, IndexError> {
        if let State::Ended(end) = self.state {
            return Ok(end);
        }
        let truncated = |needs, what, path| IndexError::Truncated {
            len,
            needs: TarOffset(needs),
            what,
            path,
        };
        let path = || Some(self.entry.path.clone());
        if self.payload_end > len.0 {
            return Err(truncated(self.payload_end, "the content of a file", path()));
        }
        let unit_end = self.unit_at + len_u64(self.unit_len);
        match self.state {
            State::Header | State::AfterZeroBlock if len.0 <= self.unit_at => match self.before.start {
                None => Ok(EndOfArchive::Missing),
                Some(_) => Err(truncated(
                    unit_end,
                    "the header that an extension header belongs to",
                    None,
                )),
            },
            _ if len.0 >= unit_end => Err(IndexError::Archive {
                at: len,
                fault: ArchiveFault::Gap,
            }),
            State::Header if self.unit_at == 0 => Err(not_even_a_block(&self.unit)),
            State::Header | State::AfterZeroBlock => Err(truncated(unit_end, "a header", None)),
            State::Body(_) => Err(truncated(unit_end, "an extension header", None)),
            State::GnuMap | State::DecimalMap => Err(truncated(unit_end, "a sparse file's map", path())),
            State::Ended(end) => Ok(end),
        }
    }

    fn take_unit(&mut self, unit: &[u8], sink: &mut (impl EntrySink + ?Sized)) -> Result<(), IndexError> {
        match self.state {
            State::Body(extension) => self.take_body(extension, unit),
            State::Ended(_) => Ok(()),
            State::Header | State::AfterZeroBlock | State::GnuMap | State::DecimalMap => {
                // Every unit that is no body is a block.
                let Some(block) = unit.first_chunk::<BLOCK>() else {
                    return Ok(());
                };
                match self.state {
                    State::GnuMap => self.take_gnu_map(SparseMap::extension(block), sink),
                    State::DecimalMap => self.take_decimal_map(block, sink),
                    _ => self.take_header(block, sink),
                }
            }
        }
    }

    /// Waits for a header block at `at`.
    fn expect_header(&mut self, at: u64) {
        self.expect(State::Header, at, BLOCK);
    }

    fn expect(&mut self, state: State, at: u64, len: usize) {
        self.state = state;
        self.unit_at = at;
        self.unit_len = len;
    }

    fn take_header(&mut self, block: &Block, sink: &mut (impl EntrySink + ?Sized)) -> Result<(), IndexError> {
        let at = self.unit_at;
        if block[0] == 0 && block.iter().all(|b| *b == 0) {
            if self.state == State::AfterZeroBlock {
                self.state = State::Ended(EndOfArchive::Marked);
            } else {
                self.expect(State::AfterZeroBlock, at + TAR_BLOCK, BLOCK);
            }
            return Ok(());
        }
        if self.state == State::AfterZeroBlock {
            self.state = State::Ended(EndOfArchive::LoneZeroBlock);
            return Ok(());
        }
        let Some(header) = Header::new(block) else {
            return Err(if at == 0 {
                not_a_tar(block)
            } else {
                // The entry that is known here is the one before.
                header_error(at, None, HeaderFault::Checksum)
            });
        };
        match header.type_flag() {
            b'x' | b'X' => self.begin_extension(Extension::Local, header),
            b'g' => self.begin_extension(Extension::Global, header),
            b'L' => self.begin_extension(Extension::LongName, header),
            b'K' => self.begin_extension(Extension::LongLink, header),
            _ => self.take_entry(header, sink),
        }
    }

    fn begin_extension(&mut self, extension: Extension, header: Header<'_>) -> Result<(), IndexError> {
        let at = self.unit_at;
        self.entry.path.clear();
        if extension == Extension::Global {
            if self.before.start.is_some() {
                return Err(self.fault_at(at, HeaderFault::GlobalBetween));
            }
        } else {
            self.before.start.get_or_insert(at);
        }
        let size = payload_size(header.size()).map_err(|fault| self.fault_at(at, fault))?;
        let too_long = HeaderFault::ExtensionTooLong {
            len: size,
            limit: MAX_EXTENSION,
        };
        if size > MAX_EXTENSION {
            return Err(self.fault_at(at, too_long));
        }
        let len = usize::try_from(size).map_err(|_| self.fault_at(at, too_long))?;
        self.expect(State::Body(extension), at + TAR_BLOCK, len);
        if len == 0 {
            self.take_body(extension, &[])
        } else {
            Ok(())
        }
    }

    fn take_body(&mut self, extension: Extension, body: &[u8]) -> Result<(), IndexError> {
        // The header that announced it lies one block before it.
        let fault_at = |fault| header_error(self.unit_at - TAR_BLOCK, None, fault);
        match extension {
            Extension::Local => self.before.records = Some(Records::parse(body).map_err(fault_at)?),
            Extension::Global => {
                self.globals.update(Records::parse(body).map_err(fault_at)?);
            }
            Extension::LongName => set(&mut self.before.long_name, until_nul(body)),
            Extension::LongLink => set(&mut self.before.long_link, until_nul(body)),
        }
        self.expect_header(align_up(self.unit_at + len_u64(body.len())));
        Ok(())
    }

    fn take_entry(&mut self, header: Header<'_>, sink: &mut (impl EntrySink + ?Sized)) -> Result<(), IndexError> {
        let at = self.unit_at;
        let records = self.before.records.take().unwrap_or_default();
        self.take_names(header, &records);
        let type_flag = header.type_flag();
        let kind = match type_flag {
            b'V' => None,
            _ => match self.kind(type_flag) {
                // What GNU tar extracts as a regular file, and says so.
                Err(HeaderFault::UnknownType(_)) => {
                    in_image(&mut self.entry.in_image).refused_type = Some(type_flag);
                    Some(Kind::File)
                }
                kind => Some(kind.map_err(|fault| self.fault_at(at, fault))?),
            },
        };
        let headers_start = self.before.start.take().unwrap_or(at);
        let stored = match kind {
            None | Some(Kind::File) => true,
            Some(Kind::Directory) => type_flag == b'D',
            Some(_) => false,
        };
        let size = self
            .payload_len(header, &records, stored)
            .map_err(|fault| self.fault_at(at, fault))?;
        let payload = TarRange::new(TarOffset(at + TAR_BLOCK), size);
        self.payload_end = payload.end().0;
        self.expect_header(align_up(self.payload_end));
        let Some(kind) = kind else { return Ok(()) };

        self.entry.kind = kind;
        self.entry.headers = TarRange::new(TarOffset(headers_start), payload.start.since(TarOffset(headers_start)));
        self.take_attributes(header, &records)
            .map_err(|fault| self.fault_at(at, fault))?;
        let size = if kind == Kind::File { size } else { 0 };
        self.file = OpenFile {
            header_at: at,
            payload,
            size,
        };
        if type_flag == b'S' {
            return self.begin_gnu_sparse(header, sink);
        }
        match PaxSparse::of(&records) {
            PaxSparse::No => {}
            _ if kind != Kind::File => {
                return Err(self.fault_at(at, HeaderFault::Sparse("it is the map of something that is no file")));
            }
            version => return self.begin_pax_sparse(version, &records, sink),
        }
        if size > 0 {
            self.entry.segments.push(Segment {
                file_offset: 0,
                tar_offset: payload.start,
                len: size,
            });
        }
        self.entry.size = size;
        sink.entry(&self.entry)
    }

    /// Empties the entry and fills in its name and link target.
    fn take_names(&mut self, header: Header<'_>, records: &Records) {
        self.entry.clear();
        let path = &mut self.entry.path;
        if let Some(name) = records.path.get() {
            path.extend_from_slice(name);
            if !self.before.long_name.is_empty() && self.before.long_name != *name {
                in_image(&mut self.entry.in_image).path = Some(self.before.long_name.clone());
            }
        } else if !self.before.long_name.is_empty() {
            std::mem::swap(path, &mut self.before.long_name);
        } else {
            let prefix = header.prefix();
            if !prefix.is_empty() {
                path.extend_from_slice(prefix);
                path.push(b'/');
            }
            path.extend_from_slice(header.name());
        }
        let link = &mut self.entry.link;
        if let Some(target) = records.linkpath.get() {
            link.extend_from_slice(target);
            if !self.before.long_link.is_empty() && self.before.long_link != *target {
                in_image(&mut self.entry.in_image).link = Some(self.before.long_link.clone());
            }
        } else if !self.before.long_link.is_empty() {
            std::mem::swap(link, &mut self.before.long_link);
        } else {
            link.extend_from_slice(header.link_name());
        }
        self.before.long_name.clear();
        self.before.long_link.clear();
    }

    fn kind(&self, type_flag: u8) -> Result<Kind, HeaderFault> {
        Ok(match type_flag {
            0 if self.entry.path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'M' => return Err(HeaderFault::MultiVolume),
            other => return Err(HeaderFault::UnknownType(other)),
        })
    }

    /// The bytes between this header and the next one, without padding.
    fn payload_len(&self, header: Header<'_>, records: &Records, stored: bool) -> Result<u64, HeaderFault> {
        if !stored {
            return Ok(0);
        }
        // Go looks at the header's own size before it takes the record's.
        let own = payload_size(header.size())?;
        let size = records.size.get().map_or(Ok(own), |size| payload_size(Some(*size)))?;
        let end = self.unit_at.saturating_add(2 * TAR_BLOCK).saturating_add(size);
        if end > i64::MAX.unsigned_abs() {
            return Err(HeaderFault::HugeSize);
        }
        Ok(size)
    }

    fn take_attributes(&mut self, header: Header<'_>, records: &Records) -> Result<(), HeaderFault> {
        /// What a header says, and what it says without global headers where that is something else.
        fn both<T: Copy + PartialEq>(
            record: &Setting<T>,
            global: &Setting<T>,
            field: Option<T>,
            name: &'static str,
        ) -> Result<(T, Option<T>), HeaderFault> {
            let own = record.get().copied().or(field);
            let value = record.over(global).copied().or(field);
            let value = value.ok_or(HeaderFault::Number(name))?;
            Ok((value, own.filter(|own| *own != value)))
        }
        let device = |field: Option<i64>, name| {
            let value = field.ok_or(HeaderFault::Number(name))?;
            u32::try_from(value).map_err(|_| HeaderFault::OutOfRange(name))
        };
        let (entry, globals) = (&mut self.entry, &self.globals);
        let mode = header.mode().ok_or(HeaderFault::Number("mode"))? & 0o7777;
        entry.mode = u16::try_from(mode).map_err(|_| HeaderFault::Number("mode"))?;
        let (uid, uid_in_image) = both(&records.uid, &globals.uid, header.uid(), "uid")?;
        let (gid, gid_in_image) = both(&records.gid, &globals.gid, header.gid(), "gid")?;
        let mtime = header.mtime().map(|secs| Timestamp { secs, nanos: 0 });
        let (mtime, mtime_in_image) = both(&records.mtime, &globals.mtime, mtime, "mtime")?;
        (entry.uid, entry.gid, entry.mtime) = (uid, gid, mtime);
        if uid_in_image.is_some() || gid_in_image.is_some() || mtime_in_image.is_some() {
            let other = in_image(&mut entry.in_image);
            (other.uid, other.gid, other.mtime) = (uid_in_image, gid_in_image, mtime_in_image);
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            entry.device_major = device(header.device_major(), "major device number")?;
            entry.device_minor = device(header.device_minor(), "minor device number")?;
        }
        if !matches!(entry.kind, Kind::Symlink | Kind::Hardlink) {
            entry.link.clear();
            if let Some(other) = &mut entry.in_image {
                other.link = None;
            }
        }
        entry.xattrs.clone_from(&records.xattrs);
        entry.in_image = entry.in_image.take().filter(|other| **other != InImage::default());
        Ok(())
    }

    fn fault_at(&self, at: u64, fault: HeaderFault) -> IndexError {
        header_error(
            at,
            (!self.entry.path.is_empty()).then(|| self.entry.path.clone()),
            fault,
        )
    }
}

/// What containerd reads differently, to be filled in.
fn in_image(slot: &mut Option<Box<InImage>>) -> &mut InImage {
    slot.get_or_insert_default()
}

fn payload_size(size: Option<i64>) -> Result<u64, HeaderFault> {
    let size = size.ok_or(HeaderFault::Number("size"))?;
    u64::try_from(size).map_err(|_| HeaderFault::NegativeSize)
}

fn header_error(at: u64, path: Option<Vec<u8>>, fault: HeaderFault) -> IndexError {
    IndexError::Header {
        at: TarOffset(at),
        path,
        fault,
    }
}

/// Whether a block could be a header of this century: the checksum matches and the magic is that of ustar, PAX or GNU.
#[must_use]
pub fn looks_like_header(block: &[u8]) -> bool {
    // The magic is asked first: it rules out nearly all payload at the cost of one comparison.
    let block = block
        .first_chunk::<BLOCK>()
        .filter(|block| block[257..262] == *b"ustar");
    block.is_some_and(|block| Header::new(block).is_some())
}

/// What the first block is, if it is no tar header.
fn not_a_tar(block: &Block) -> IndexError {
    match (Coding::of_bytes(block), other_format(block)) {
        (Coding::Plain, None) => IndexError::NotATar(OTHER),
        (Coding::Plain, Some((what, command))) => IndexError::OtherFormat { what, command },
        (Coding::Gzip, _) => IndexError::OtherFormat {
            what: "compressed with gzip",
            command: "gzip -d",
        },
        (Coding::Zstd, _) => IndexError::OtherFormat {
            what: "compressed with zstd",
            command: "zstd -d",
        },
    }
}

/// What a file is that ends within its first block.
fn not_even_a_block(start: &[u8]) -> IndexError {
    let mut block = [0; 512];
    if let Some(part) = block.get_mut(..start.len()) {
        part.copy_from_slice(start);
    }
    match not_a_tar(&block) {
        IndexError::NotATar(OTHER) => IndexError::NotATar("it is shorter than one header"),
        compressed => compressed,
    }
}

/// What is said of a first block that looks like nothing known.
const OTHER: &str = "its first block is no tar header (checksum)";

fn set(buffer: &mut Vec<u8>, bytes: &[u8]) {
    buffer.clear();
    buffer.extend_from_slice(bytes);
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|b| *b == 0).map_or(bytes, |end| &bytes[..end])
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
