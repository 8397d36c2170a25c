//! Making an index file. In: entries, one after the other. Out: the file's bytes, compressed while entries come in, so that a
//! million of them never lie here uncompressed.

use std::collections::HashMap;
use std::io::Write;

use sha2::{Digest, Sha256};

use super::cold::{ColdPart, PARTS, Packed};
use super::digests::ChunkDigests;
use super::entry::{Entry, InImage, Kind, Segment, Timestamp, Xattr};
use super::error::IndexError;
use super::format::{self, Columns, SectionRecord, assemble};
use super::identity::LayerIdentity;
use super::parser::EndOfArchive;
use super::pieces::PieceDigests;
use super::sink::EntrySink;
use super::summary::Summary;
use super::{TAR_BLOCK, align_up, len_u64, varint};
use crate::layer::{Coding, SpanTable, Spans};
use crate::units::{TarOffset, TarRange};

/// How hard zstd tries. Higher levels save a tenth of the bytes and cost more time than everything else together.
const LEVEL: i32 = 1;

/// The table of what containerd reads otherwise than GNU tar, while it is made: see docs/index-format.md, "Read in images".
struct InImageTable {
    output: zstd::stream::write::Encoder<'static, Vec<u8>>,
    /// Its bytes before compression, so far.
    decoded: u64,
    /// The number of the entry that the last record is of, counted from 1.
    last: u64,
}

impl InImageTable {
    fn new() -> Self {
        let mut output = zstd::stream::write::Encoder::new(Vec::new(), LEVEL).expect("memory for a zstd context");
        output.window_log(format::WINDOW_LOG).expect("a legal window size");
        Self {
            output,
            decoded: 0,
            last: 0,
        }
    }

    /// Adds what is different for the entry of this number, counted from 1.
    fn add(&mut self, number: u64, other: &InImage) {
        let InImage {
            path,
            link,
            uid,
            gid,
            mtime,
            refused_type,
        } = other;
        let mut record = Vec::new();
        varint::put(&mut record, number - self.last);
        self.last = number;
        let fields = [
            (path.is_some(), format::OTHER_PATH),
            (link.is_some(), format::OTHER_LINK),
            (uid.is_some(), format::OTHER_UID),
            (gid.is_some(), format::OTHER_GID),
            (mtime.is_some(), format::OTHER_MTIME),
            (refused_type.is_some(), format::REFUSED_TYPE),
        ];
        let there = fields.iter().filter(|(there, _)| *there);
        varint::put(&mut record, there.fold(0, |sum, (_, field)| sum | field));
        for text in [path, link].into_iter().flatten() {
            varint::put(&mut record, len_u64(text.len()));
            record.extend_from_slice(text);
        }
        for id in [uid, gid].into_iter().flatten() {
            varint::put(&mut record, id.cast_unsigned());
        }
        if let Some(time) = mtime {
            varint::put_signed(&mut record, time.secs);
            varint::put(&mut record, u64::from(time.nanos));
        }
        if let Some(flag) = refused_type {
            varint::put(&mut record, u64::from(*flag));
        }
        self.put(&record);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.decoded += len_u64(bytes.len());
        self.output.write_all(bytes).expect("writing to memory");
    }

    fn section(mut self) -> (SectionRecord, Vec<u8>) {
        self.put(&[0]);
        let record = SectionRecord {
            kind: format::IN_IMAGE,
            flags: format::REQUIRED,
            encoding: format::ZSTD,
            decoded: self.decoded,
            ..SectionRecord::default()
        };
        (record, self.output.finish().expect("writing to memory"))
    }
}

/// Collects a layer's entries into an index file.
pub struct IndexBuilder {
    output: zstd::stream::write::Encoder<'static, Vec<u8>>,
    digest: Sha256,
    /// Bytes of the entries section before compression, so far.
    decoded: u64,
    columns: Columns<Vec<u8>>,
    in_batch: usize,
    summary: Summary,
    state: State,
    xattr_sets: HashMap<Vec<Xattr>, u64>,
    xattr_weight: usize,
    owners: HashMap<Owner, u64>,
    identity: LayerIdentity,
    chunk_digests: Option<ChunkDigests>,
    piece_digests: Option<PieceDigests>,
    spans: Option<SpanTable>,
    /// Where a global header may have been, or an entry is read otherwise in images.
    in_image: Option<InImageTable>,
    /// The parts of the cold part that there are, in their order.
    cold: [Option<Packed>; PARTS],
}

impl std::fmt::Debug for IndexBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexBuilder")
            .field("summary", &self.summary)
            .finish_non_exhaustive()
    }
}

/// What repeats together from entry to entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Owner {
    pub(super) mode: u16,
    pub(super) uid: u64,
    pub(super) gid: u64,
}

/// What coding an entry takes from the ones before; the same on both sides.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    /// Where the next headers begin if nothing unusual lies between.
    pub(super) next: TarOffset,
    pub(super) times: RecentTimes,
}

impl State {
    /// Where an entry's headers lie when it is like most.
    pub(super) fn usual_headers(&self) -> TarRange {
        TarRange::new(self.next, TAR_BLOCK)
    }
}

/// The last different times, the last used first.
#[derive(Debug)]
pub(super) struct RecentTimes {
    times: [Timestamp; format::RECENT_TIMES],
    /// The time that the next new one is told from.
    pub(super) newest: i64,
}

impl Default for RecentTimes {
    fn default() -> Self {
        Self {
            times: [Timestamp::default(); format::RECENT_TIMES],
            newest: 0,
        }
    }
}

impl RecentTimes {
    fn find(&self, time: Timestamp) -> Option<usize> {
        self.times.iter().position(|known| *known == time)
    }

    /// The time at `place`, which becomes the last used.
    pub(super) fn recall(&mut self, place: usize) -> Option<Timestamp> {
        let time = *self.times.get(place)?;
        self.times[..=place].rotate_right(1);
        Some(time)
    }

    /// Puts a new time in front, for the one that was not used the longest.
    pub(super) fn remember(&mut self, time: Timestamp) {
        self.times.rotate_right(1);
        self.times[0] = time;
        self.newest = time.secs;
    }
}

impl IndexBuilder {
    /// An empty index.
    ///
    /// # Panics
    /// When zstd cannot allocate its context.
    #[must_use]
    pub fn new() -> Self {
        let mut output = zstd::stream::write::Encoder::new(Vec::new(), LEVEL).expect("memory for a zstd context");
        output.window_log(format::WINDOW_LOG).expect("a legal window size");
        Self {
            output,
            digest: Sha256::new(),
            decoded: 0,
            columns: Columns::default(),
            in_batch: 0,
            summary: Summary::default(),
            state: State::default(),
            xattr_sets: HashMap::new(),
            xattr_weight: 0,
            owners: HashMap::new(),
            identity: LayerIdentity::default(),
            chunk_digests: None,
            piece_digests: None,
            spans: None,
            in_image: None,
            cold: [const { None }; PARTS],
        }
    }

    /// Says which layer it is of. Without it the index names a layer of unknown digest. Compression and length of the blob are
    /// those of the span table if there is one, and a plain layer's length is the tar's, whatever is said here.
    pub fn identity(&mut self, identity: LayerIdentity) -> &mut Self {
        self.identity = identity;
        self
    }

    /// An index as it was made before indexes told what is different in images.
    #[cfg(test)]
    pub(crate) fn older(mut self) -> Self {
        self.in_image = None;
        self
    }

    /// Adds the digests of the tar's chunks.
    pub fn chunk_digests(&mut self, digests: ChunkDigests) -> &mut Self {
        self.chunk_digests = Some(digests);
        self
    }

    /// Adds the places where decoding can begin, and what of the tar a decoder must know to begin at each of them.
    pub fn spans(&mut self, spans: Spans) -> &mut Self {
        let mut packed = Packed::new(ColdPart::windows_of(spans.table.coding()));
        // Each is let go of as soon as it is packed: there can be many.
        for window in spans.windows {
            packed.push(&window);
        }
        self.packed_spans(spans.table, packed)
    }

    /// The same, with windows that were packed as they came.
    pub(super) fn packed_spans(&mut self, table: SpanTable, windows: Packed) -> &mut Self {
        self.spans = Some(table);
        if windows.stored_len() > 0 {
            self.cold(windows);
        }
        self
    }

    /// Makes it the index of a layer's own table of contents: where decoding can begin in the tar space that was made up for it,
    /// and the digests of the files' pieces there.
    pub fn contents(&mut self, table: SpanTable, pieces: PieceDigests) -> &mut Self {
        self.spans = Some(table);
        self.piece_digests = Some(pieces);
        self
    }

    /// Adds a part of the cold part.
    pub(super) fn cold(&mut self, packed: Packed) -> &mut Self {
        let slot = packed.part().slot();
        self.cold[slot] = Some(packed);
        self
    }

    /// What came in so far.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The finished index file of a tar of `tar_len` bytes.
    ///
    /// # Panics
    /// When there is no memory for it.
    #[must_use]
    pub fn finish(mut self, tar_len: u64, end: EndOfArchive) -> Vec<u8> {
        self.close_batch();
        self.put_batch_head(&[0]);
        let entries = self.output.finish().expect("writing to memory");
        self.summary.tar_bytes = tar_len;
        self.summary.end_marked = end == EndOfArchive::Marked;
        self.summary.lone_zero_block = end == EndOfArchive::LoneZeroBlock;
        let digest: [u8; 32] = self.digest.finalize().into();
        let summary = format::encode_summary(&self.summary, &digest);
        if let Some(table) = &self.spans {
            (self.identity.coding, self.identity.blob_len) = (table.coding(), table.blob_len());
        } else if self.identity.coding == Coding::Plain {
            self.identity.blob_len = tar_len;
        }
        let hot = |kind, flags, encoding, decoded| SectionRecord {
            kind,
            flags,
            encoding,
            decoded,
            ..SectionRecord::default()
        };
        let raw = |kind, flags, bytes: Vec<u8>| (hot(kind, flags, format::RAW, len_u64(bytes.len())), bytes);
        let mut sections = vec![
            raw(format::SUMMARY, format::REQUIRED, summary),
            (
                hot(format::ENTRIES, format::REQUIRED, format::ZSTD, self.decoded),
                entries,
            ),
            raw(format::LAYER, format::REQUIRED, self.identity.encode()),
        ];
        if let Some(digests) = &self.chunk_digests {
            sections.push(raw(format::CHUNK_DIGESTS, 0, digests.encode()));
        }
        if let Some(table) = &self.spans {
            let mut spans = Vec::new();
            table.encode(&mut spans);
            let frame = zstd::bulk::compress(&spans, LEVEL).expect("memory for compression");
            let record = hot(format::SPANS, format::REQUIRED, format::ZSTD, len_u64(spans.len()));
            sections.push((record, frame));
        }
        // What decodes wrong at a block is told from what decodes right by digests alone.
        let blocks = self
            .spans
            .as_ref()
            .filter(|table| table.has_blocks() && self.chunk_digests.is_some());
        if blocks.is_none() {
            self.cold[ColdPart::BlockWindows.slot()] = None;
        }
        let cold: Vec<_> = self.cold.into_iter().flatten().collect();
        if !cold.is_empty() {
            let mut directory = Vec::new();
            varint::put(&mut directory, len_u64(cold.len()));
            for part in &cold {
                part.describe(&mut directory);
            }
            sections.push(raw(format::COLD_DIRECTORY, 0, directory));
        }
        if let Some(pieces) = &self.piece_digests {
            sections.push(raw(format::PIECE_DIGESTS, format::REQUIRED, pieces.encode()));
        }
        // A table of contents has no global headers, whatever lies between its contents.
        let of_contents = self.piece_digests.is_some();
        if let Some(table) = self.in_image.filter(|table| table.last > 0 || !of_contents) {
            sections.push(table.section());
        }
        if let Some(table) = blocks {
            let mut bytes = Vec::new();
            table.encode_blocks(&mut bytes);
            let frame = zstd::bulk::compress(&bytes, LEVEL).expect("memory for compression");
            // Whoever does not know them decodes each frame from its beginning.
            sections.push((hot(format::BLOCKS, 0, format::ZSTD, len_u64(bytes.len())), frame));
        }
        sections.extend(cold.into_iter().map(Packed::section));
        assemble(&mut sections)
    }

    fn put_batch_head(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.decoded += len_u64(bytes.len());
        self.output.write_all(bytes).expect("writing to memory");
    }

    fn close_batch(&mut self) {
        if self.in_batch == 0 {
            return;
        }
        let mut head = Vec::with_capacity(64);
        varint::put(&mut head, len_u64(self.in_batch));
        for column in self.columns.each_mut() {
            varint::put(&mut head, len_u64(column.len()));
        }
        self.put_batch_head(&head);
        for column in self.columns.each_mut() {
            self.digest.update(&column);
            self.decoded += len_u64(column.len());
            self.output.write_all(column).expect("writing to memory");
            column.clear();
        }
        self.in_batch = 0;
    }

    fn put_owner(&mut self, owner: Owner) {
        if let Some(number) = self.owners.get(&owner) {
            varint::put(&mut self.columns.owners, *number);
            return;
        }
        let number = len_u64(self.owners.len());
        varint::put(&mut self.columns.owners, number);
        varint::put(&mut self.columns.new_owners, u64::from(owner.mode));
        varint::put(&mut self.columns.new_owners, owner.uid);
        varint::put(&mut self.columns.new_owners, owner.gid);
        if self.owners.len() < format::MAX_OWNERS {
            self.owners.insert(owner, number);
        }
    }

    fn put_time(&mut self, time: Timestamp) {
        let times = &mut self.state.times;
        if let Some(place) = times.find(time) {
            varint::put(&mut self.columns.times, len_u64(place));
            times.recall(place);
            return;
        }
        varint::put(&mut self.columns.times, len_u64(format::RECENT_TIMES));
        // Wrapping is undone by the reader, so no pair of times is too far apart.
        varint::put_signed(&mut self.columns.new_times, time.secs.wrapping_sub(times.newest));
        varint::put(&mut self.columns.new_times, u64::from(time.nanos));
        times.remember(time);
    }

    fn put_xattrs(&mut self, xattrs: &[Xattr]) {
        let rare = &mut self.columns.rare;
        if let Some(number) = self.xattr_sets.get(xattrs) {
            varint::put(rare, *number);
            return;
        }
        let number = len_u64(self.xattr_sets.len());
        varint::put(rare, number);
        varint::put(rare, len_u64(xattrs.len()));
        for xattr in xattrs {
            for bytes in [&xattr.name, &xattr.value] {
                varint::put(rare, len_u64(bytes.len()));
                rare.extend_from_slice(bytes);
            }
        }
        let weight = self.xattr_weight + format::xattr_weight(xattrs);
        if self.xattr_sets.len() < format::MAX_XATTR_SETS && weight <= format::MAX_XATTR_WEIGHT {
            self.xattr_weight = weight;
            self.xattr_sets.insert(xattrs.to_vec(), number);
        }
    }

    fn put_segments(&mut self, segments: &[Segment]) {
        let rare = &mut self.columns.rare;
        varint::put(rare, len_u64(segments.len()));
        let mut end = 0;
        for segment in segments {
            varint::put(rare, segment.file_offset - end);
            varint::put(rare, segment.len);
            end = segment.file_offset + segment.len;
        }
    }
}

impl Default for IndexBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl EntrySink for IndexBuilder {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        check(entry, self.state.next).map_err(|why| IndexError::Unencodable {
            path: entry.path.clone(),
            why,
        })?;
        let sparse = is_sparse(entry);
        let placed = entry.headers != self.state.usual_headers();
        let mut tag = format::kind_number(entry.kind);
        for (mark, set) in [
            (format::TAG_PLACED, placed),
            (format::TAG_SPARSE, sparse),
            (format::TAG_XATTRS, !entry.xattrs.is_empty()),
        ] {
            tag |= if set { mark } else { 0 };
        }
        self.columns.tags.push(tag);
        self.put_owner(Owner {
            mode: entry.mode,
            uid: entry.uid.cast_unsigned(),
            gid: entry.gid.cast_unsigned(),
        });
        self.put_time(entry.mtime);

        let columns = &mut self.columns;
        let shared = common_prefix(&self.state.path, &entry.path);
        varint::put(&mut columns.shared, len_u64(shared));
        varint::put(&mut columns.fresh, len_u64(entry.path.len() - shared));
        columns.names.extend_from_slice(&entry.path[shared..]);
        if entry.kind == Kind::File {
            varint::put(&mut columns.sizes, entry.size);
        }
        if matches!(entry.kind, Kind::Symlink | Kind::Hardlink) {
            let shared = common_prefix(&self.state.link, &entry.link);
            varint::put(&mut columns.links, len_u64(shared));
            varint::put(&mut columns.links, len_u64(entry.link.len() - shared));
            columns.links.extend_from_slice(&entry.link[shared..]);
            self.state.link.clone_from(&entry.link);
        }
        if placed {
            varint::put(
                &mut columns.rare,
                entry.headers.start.since(self.state.next) / TAR_BLOCK,
            );
            varint::put(&mut columns.rare, entry.headers.len / TAR_BLOCK);
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            varint::put(&mut columns.rare, u64::from(entry.device_major));
            varint::put(&mut columns.rare, u64::from(entry.device_minor));
        }
        if !entry.xattrs.is_empty() {
            self.put_xattrs(&entry.xattrs);
        }
        if sparse {
            self.put_segments(&entry.segments);
        }

        let gap = entry.headers.start.since(self.state.next);
        if gap >= format::GLOBAL_HEADER || entry.in_image.is_some() {
            let table = self.in_image.get_or_insert_with(InImageTable::new);
            if let Some(other) = &entry.in_image {
                table.add(self.summary.entries + 1, other);
            }
        }

        self.state.path.clone_from(&entry.path);
        self.state.next = TarOffset(align_up(entry.payload().end().0));
        self.summary.count(entry);
        self.in_batch += 1;
        let filled: usize = self.columns.each_mut().iter().map(|column| column.len()).sum();
        if self.in_batch == format::BATCH_ENTRIES || filled >= format::BATCH_BYTES {
            self.close_batch();
        }
        Ok(())
    }
}

/// Whether a file needs a map: any but the one run that every other file has.
fn is_sparse(entry: &Entry) -> bool {
    if entry.kind != Kind::File {
        return false;
    }
    match entry.segments.as_slice() {
        [] => entry.size != 0,
        [only] => only.file_offset != 0 || only.len != entry.size,
        _ => true,
    }
}

/// Whether an entry obeys what its type's documentation says and the format relies on.
fn check(entry: &Entry, next: TarOffset) -> Result<(), &'static str> {
    let block = |position: u64| position.is_multiple_of(TAR_BLOCK);
    if entry.headers.start < next || !block(entry.headers.start.0) || !block(entry.headers.len) {
        return Err("its headers are not blocks behind the entry before");
    }
    if entry.mtime.nanos >= 1_000_000_000 {
        return Err("its time has too many nanoseconds");
    }
    let other_nanos = entry
        .in_image
        .as_ref()
        .and_then(|other| other.mtime)
        .map_or(0, |time| time.nanos);
    if other_nanos >= 1_000_000_000 {
        return Err("its time has too many nanoseconds");
    }
    if entry.mode > 0o7777 {
        return Err("its mode has more than twelve bits");
    }
    if entry.kind != Kind::File && (entry.size != 0 || !entry.segments.is_empty()) {
        return Err("it has content and is no file");
    }
    if !matches!(entry.kind, Kind::Symlink | Kind::Hardlink) && !entry.link.is_empty() {
        return Err("it has a link text and is no link");
    }
    if !matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) && (entry.device_major, entry.device_minor) != (0, 0)
    {
        return Err("it has device numbers and is no device");
    }
    if !entry.xattrs.is_sorted_by(|a, b| a.name < b.name) {
        return Err("its attributes are not in order");
    }
    let (mut file, mut tar) = (0, entry.headers.end());
    for segment in &entry.segments {
        if segment.len == 0 || segment.file_offset < file || segment.tar_offset != tar {
            return Err("its segments are not in order, packed behind its headers");
        }
        file = segment.file_offset.saturating_add(segment.len);
        tar = tar.plus(segment.len);
    }
    if file > entry.size || entry.size > i64::MAX.unsigned_abs() || tar.0 > i64::MAX.unsigned_abs() {
        return Err("its segments reach too far");
    }
    Ok(())
}

fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{ArchiveFault, Collector, Index, IndexFault};

    /// An entry whose headers begin at this byte of the tar.
    fn entry_at(at: u64, in_image: Option<InImage>) -> Entry {
        Entry {
            path: b"a".to_vec(),
            uid: -2,
            headers: TarRange::new(TarOffset(at), 512),
            in_image: in_image.map(Box::new),
            ..Entry::default()
        }
    }

    fn index(entries: &[Entry], end: EndOfArchive, older: bool) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::new();
        for entry in entries {
            builder.entry(entry).unwrap();
        }
        if older {
            builder = builder.older();
        }
        Index::open(builder.finish(8192, end)).unwrap()
    }

    #[test]
    fn an_older_index_of_a_tar_with_global_headers_is_told_from_a_new_one() {
        let outcome = |at, older| {
            let index = index(&[entry_at(0, None), entry_at(at, None)], EndOfArchive::Marked, older);
            let mut entries = Collector::default();
            index.replay(&mut entries).unwrap();
            assert_eq!((entries.0.len(), entries.0[1].uid), (2, -2));
            index.replay_in_image(&mut Collector::default())
        };
        // Behind the first entry, with no room for a global header, or room enough.
        for (at, is_outdated) in [(512, false), (1024, false), (1536, true), (4096, true)] {
            assert!(outcome(at, false).is_ok(), "{at}");
            let older = outcome(at, true);
            let fault = matches!(older, Err(IndexError::Index(IndexFault::Outdated)));
            assert_eq!(fault, is_outdated, "{at}");
            let index = |older| index(&[entry_at(0, None), entry_at(at, None)], EndOfArchive::Marked, older);
            assert!(!index(false).is_outdated_for_images().unwrap(), "{at}");
            assert_eq!(index(true).is_outdated_for_images().unwrap(), is_outdated, "{at}");
        }
    }

    #[test]
    fn what_no_image_has_is_refused_there_alone() {
        let lone = index(&[entry_at(0, None)], EndOfArchive::LoneZeroBlock, false);
        assert!(lone.replay(&mut Collector::default()).is_ok());
        assert_eq!(lone.end(), EndOfArchive::LoneZeroBlock);
        let refused = lone.replay_in_image(&mut Collector::default());
        assert!(matches!(
            refused,
            Err(IndexError::Archive {
                at: TarOffset(512),
                fault: ArchiveFault::LoneZeroBlock
            })
        ));
    }

    #[test]
    fn a_table_of_readings_that_is_no_table_is_refused() {
        type Change<'a> = &'a dyn Fn(&mut InImageTable);
        let other = InImage {
            uid: Some(-3),
            ..InImage::default()
        };
        let read = |change: &dyn Fn(&mut InImageTable)| {
            let mut builder = IndexBuilder::new();
            builder.entry(&entry_at(0, None)).unwrap();
            let table = builder.in_image.insert(InImageTable::new());
            change(table);
            Index::open(builder.finish(8192, EndOfArchive::Marked))
                .unwrap()
                .replay(&mut Collector::default())
        };
        assert!(read(&|table| table.add(1, &other)).is_ok());
        let changes: [(&str, Change<'_>); 6] = [
            ("of no entry", &|table| table.add(2, &other)),
            ("nothing different", &|table| table.put(&[1, 0])),
            ("an unknown field", &|table| table.put(&[1, 64])),
            ("a type of two bytes", &|table| table.put(&[1, 32, 0x80, 2])),
            ("an endless name", &|table| {
                table.put(&[1, 1, 0xff, 0xff, 0xff, 0xff, 0x0f]);
            }),
            ("something behind the end", &|table| table.put(&[0])),
        ];
        for (what, change) in changes {
            assert!(matches!(read(change), Err(IndexError::Index(_))), "{what}");
        }
    }
}
