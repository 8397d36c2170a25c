//! Reading an index file. In: its bytes, or only those of its hot part, from an untrusted source. Out: the summary, the layer's identity, the
//! entries (streamed from the compressed section batch by batch), chunk digests, the span table, and where the cold part's
//! pieces lie; or a fault. What is wrong with a file is found before a length in it is believed.

mod entries;

use sha2::{Digest, Sha256};

use super::cold::{ColdDirectory, ColdPart, decompress};
use super::digests::ChunkDigests;
use super::error::{ArchiveFault, IndexError, IndexFault};
use super::format::{self, SectionRecord, SectionTable};
use super::identity::LayerIdentity;
use super::len_u64;
use super::parser::EndOfArchive;
use super::pieces::PieceDigests;
use super::sink::EntrySink;
use super::summary::Summary;
use crate::checksum;
use crate::digest::{Algorithm, Digest as ContentDigest};
use crate::layer::{Coding, SpanTable};

pub use entries::Entries;

/// An index file in memory, all of it or its hot part, structure and checksums already verified.
#[derive(Clone, Debug)]
pub struct Index<B> {
    bytes: B,
    summary: Summary,
    digest: [u8; 32],
    entries: SectionRecord,
    /// What containerd reads otherwise; missing where nothing can be different, and in older indexes.
    in_image: Option<SectionRecord>,
    identity: LayerIdentity,
    chunk_digests: Option<ChunkDigests>,
    piece_digests: Option<PieceDigests>,
    spans: Option<SpanTable>,
    cold: ColdDirectory,
    hot_len: u64,
    file_len: u64,
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Opens a whole index file: checks magic, version, section table and every section's checksum. The entries themselves are
    /// checked when they are read.
    ///
    /// # Errors
    /// [`IndexError::Index`] with what is wrong.
    pub fn open(bytes: B) -> Result<Self, IndexError> {
        let table = SectionTable::read(bytes.as_ref())?;
        let end = table.file_len;
        Ok(Self::read(bytes, &table, end)?)
    }

    /// Opens an index of which only the hot part is here: the file's first [`hot_len`] bytes. Everything works but for what lies
    /// in the cold part, whose pieces [`cold`](Self::cold) tells how to find and to check.
    ///
    /// # Errors
    /// [`IndexError::Index`] with what is wrong.
    pub fn open_hot(bytes: B) -> Result<Self, IndexError> {
        let table = SectionTable::read(bytes.as_ref())?;
        let end = table.hot_len;
        Ok(Self::read(bytes, &table, end)?)
    }

    /// Opens what is here up to `end`.
    fn read(bytes: B, table: &SectionTable, end: u64) -> Result<Self, IndexFault> {
        let file = bytes.as_ref();
        match end.cmp(&len_u64(file.len())) {
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => return Err(IndexFault::Truncated),
            std::cmp::Ordering::Less => return Err(IndexFault::Malformed("end (something follows it)")),
        }
        let here = |record: &&SectionRecord| record.flags & format::COLD == 0 || end == table.file_len;
        for record in table.records.iter().filter(here) {
            if checksum::crc32c(section(file, record)?) != record.crc {
                return Err(IndexFault::Checksum(format::section_name(record.kind)));
            }
        }
        for record in &table.records {
            let known = match (record.kind, record.flags & format::COLD != 0) {
                (
                    format::SUMMARY
                    | format::LAYER
                    | format::CHUNK_DIGESTS
                    | format::COLD_DIRECTORY
                    | format::PIECE_DIGESTS,
                    false,
                )
                | (format::PAYLOAD_DIGESTS | format::CONTENT_PIECES, true) => record.encoding == format::RAW,
                (format::ENTRIES | format::SPANS | format::IN_IMAGE | format::BLOCKS, false) => {
                    record.encoding == format::ZSTD
                }
                (format::WINDOWS | format::HEADERS | format::BLOCK_WINDOWS, true) => {
                    record.encoding == format::ZSTD_PIECES
                }
                _ => false,
            };
            if !known && record.flags & format::REQUIRED != 0 {
                return Err(IndexFault::UnknownSection(record.kind));
            }
        }
        let find = |kind, encoding| {
            let mut records = table.records.iter();
            records
                .find(|record| record.kind == kind && record.encoding == encoding && record.flags & format::COLD == 0)
        };
        let raw = |kind| find(kind, format::RAW).map(|record| section(file, record)).transpose();
        let missing = |what| IndexFault::Malformed(what);
        let (summary, digest) =
            format::decode_summary(raw(format::SUMMARY)?.ok_or(missing("section table (no summary)"))?)?;
        let entries = find(format::ENTRIES, format::ZSTD).ok_or(missing("section table (no entries)"))?;
        let identity = raw(format::LAYER)?.ok_or(missing("section table (no layer)"))?;
        let identity = LayerIdentity::decode(identity)?;
        let chunk_digests = raw(format::CHUNK_DIGESTS)?
            .map(|digests| ChunkDigests::decode(digests, summary.tar_bytes))
            .transpose()?;
        let piece_digests = raw(format::PIECE_DIGESTS)?
            .map(|digests| PieceDigests::decode(digests, summary.tar_bytes))
            .transpose()?;
        let spans = find(format::SPANS, format::ZSTD)
            .map(|record| read_spans(section(file, record)?, record.decoded))
            .transpose()?;
        check_plan(&summary, &identity, spans.as_ref(), piece_digests.is_some())?;
        // What decodes wrong at a block is told from what decodes right by digests alone.
        let blocks = find(format::BLOCKS, format::ZSTD).filter(|_| chunk_digests.is_some());
        let spans = match (spans, blocks) {
            (Some(table), Some(record)) => Some(with_blocks(&table, section(file, record)?, record.decoded)?),
            (spans, _) => spans,
        };
        let cold = raw(format::COLD_DIRECTORY)?
            .map(|directory| ColdDirectory::decode(directory, table))
            .transpose()?
            .unwrap_or_default();
        check_windows(spans.as_ref(), &cold)?;
        let entries = *entries;
        let in_image = find(format::IN_IMAGE, format::ZSTD).copied();
        Ok(Self {
            bytes,
            summary,
            digest,
            entries,
            in_image,
            identity,
            chunk_digests,
            piece_digests,
            spans,
            cold,
            hot_len: table.hot_len,
            file_len: table.file_len,
        })
    }

    /// What the layer holds, as counted when the index was made.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The tar's length in bytes.
    #[must_use]
    pub fn tar_len(&self) -> u64 {
        self.summary.tar_bytes
    }

    /// Whether the tar's end was marked.
    #[must_use]
    pub fn end(&self) -> EndOfArchive {
        if self.summary.end_marked {
            EndOfArchive::Marked
        } else if self.summary.lone_zero_block {
            EndOfArchive::LoneZeroBlock
        } else {
            EndOfArchive::Missing
        }
    }

    /// The layer that it was made from, as far as its maker knew it. The index does not compare it with anything: its users do.
    #[must_use]
    pub fn identity(&self) -> &LayerIdentity {
        &self.identity
    }

    /// The digests of the tar's chunks, if the index has them.
    #[must_use]
    pub fn chunk_digests(&self) -> Option<&ChunkDigests> {
        self.chunk_digests.as_ref()
    }

    /// The digests of the files' pieces, in an index of a layer's own table of contents.
    #[must_use]
    pub fn piece_digests(&self) -> Option<&PieceDigests> {
        self.piece_digests.as_ref()
    }

    /// Whether it was made from a table of contents that the layer brings along. Then tar space is made up (see
    /// `index::toc`): it is not the index that is made from the layer's tar.
    #[must_use]
    pub fn is_of_contents(&self) -> bool {
        self.piece_digests.is_some()
    }

    /// The places where decoding can begin, if the layer is compressed. The windows that it needs are pieces of
    /// [`ColdPart::Windows`], one for each span.
    #[must_use]
    pub fn spans(&self) -> Option<&SpanTable> {
        self.spans.as_ref()
    }

    /// What lies in the cold part, and where.
    #[must_use]
    pub fn cold(&self) -> &ColdDirectory {
        &self.cold
    }

    /// A piece of the cold part, if it is in memory and the index has it.
    ///
    /// # Errors
    /// [`IndexError::Index`] when only the hot part is here, or the piece is damaged.
    pub fn cold_piece(&self, part: ColdPart, number: usize) -> Result<Option<Vec<u8>>, IndexError> {
        let Some(piece) = self.cold.piece(part, number) else {
            return Ok(None);
        };
        let range = usize::try_from(piece.range.start)
            .ok()
            .zip(usize::try_from(piece.range.end).ok());
        let stored = range.and_then(|(start, end)| self.as_bytes().get(start..end));
        piece.open(stored.ok_or(IndexFault::Truncated)?).map(Some)
    }

    /// How many bytes of the file are its hot part.
    #[must_use]
    pub fn hot_len(&self) -> u64 {
        self.hot_len
    }

    /// How long the whole file is.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Whether the cold part is here as well.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        len_u64(self.as_bytes().len()) == self.file_len
    }

    /// SHA-256 of the hot part: who trusts it can trust all of the index, because the hot part has a digest of every piece of
    /// the cold part.
    #[must_use]
    pub fn hot_digest(&self) -> [u8; 32] {
        let hot = usize::try_from(self.hot_len)
            .ok()
            .and_then(|len| self.as_bytes().get(..len));
        Sha256::digest(hot.unwrap_or_default()).into()
    }

    /// The same by another algorithm.
    #[must_use]
    pub fn hot_digest_of(&self, algorithm: Algorithm) -> ContentDigest {
        let hot = usize::try_from(self.hot_len)
            .ok()
            .and_then(|len| self.as_bytes().get(..len));
        ContentDigest::of(algorithm, hot.unwrap_or_default())
    }

    /// SHA-256 of the decoded entry table: equal for equal layers, whichever version of zstd compressed the table. The
    /// checksums were verified, this digest only by [`verify`](Self::verify).
    #[must_use]
    pub fn content_digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The file's bytes, as far as they are here.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Reads the entries from the first on.
    ///
    /// # Errors
    /// [`IndexError::Index`] when the entry table cannot even be begun.
    pub fn entries(&self) -> Result<Entries<'_>, IndexError> {
        let table =
            |record: &SectionRecord| Ok::<_, IndexFault>((section(self.bytes.as_ref(), record)?, record.decoded));
        let in_image = self.in_image.as_ref().map(table).transpose()?;
        Entries::new(table(&self.entries)?, in_image, self.summary)
    }

    /// Hands every entry to `sink`, as a walk over the tar would.
    ///
    /// # Errors
    /// [`IndexError::Index`] for a malformed table; what the sink returns.
    pub fn replay(&self, sink: &mut (impl EntrySink + ?Sized)) -> Result<(), IndexError> {
        let mut entries = self.entries()?;
        while let Some(entry) = entries.next_entry()? {
            sink.entry(entry)?;
        }
        Ok(())
    }

    /// Whether it may lack what images need of it, because it was made before indexes told what is different in images: then
    /// [`replay_in_image`](Self::replay_in_image) refuses it. Reads all entries where that does not show at once.
    ///
    /// # Errors
    /// [`IndexError::Index`] for a malformed table.
    pub fn is_outdated_for_images(&self) -> Result<bool, IndexError> {
        if self.in_image.is_some() || self.is_of_contents() {
            return Ok(false);
        }
        let mut entries = self.entries()?;
        while entries.next_entry()?.is_some() {}
        Ok(entries.may_lack_in_image())
    }

    /// The same for an image that the layer is of: hands every entry to `sink` with what containerd reads in its place
    /// ([`Entry::in_image`](super::Entry::in_image)), and refuses what containerd does.
    ///
    /// # Errors
    /// As [`replay`](Self::replay); [`ArchiveFault::LoneZeroBlock`]; [`IndexFault::Outdated`] for an index that may lack
    /// something because it was made before indexes told what is different in images.
    pub fn replay_in_image(&self, sink: &mut (impl EntrySink + ?Sized)) -> Result<(), IndexError> {
        let mut entries = self.entries()?;
        while let Some(entry) = entries.next_entry()? {
            sink.entry(entry)?;
        }
        if self.end() == EndOfArchive::LoneZeroBlock {
            return Err(IndexError::Archive {
                at: entries.end(),
                fault: ArchiveFault::LoneZeroBlock,
            });
        }
        if entries.may_lack_in_image() && !self.is_of_contents() {
            return Err(IndexFault::Outdated.into());
        }
        Ok(())
    }

    /// Reads everything that is here and compares the digests.
    ///
    /// # Errors
    /// [`IndexError::Index`] when the table is malformed or has another digest, or a piece of the cold part is damaged.
    pub fn verify(&self) -> Result<(), IndexError> {
        if self.entries()?.read_to_end()? != self.digest {
            return Err(IndexFault::Checksum("entry table").into());
        }
        if self.is_whole() {
            for part in ColdPart::ALL {
                for number in 0..self.cold.pieces(part) {
                    self.cold_piece(part, number)?;
                }
            }
        }
        Ok(())
    }
}

/// How long the hot part of the index is that begins with `prefix`: so many bytes from its beginning are what
/// [`Index::open_hot`] takes. `None` when `prefix` is too short to tell (24 bytes are enough).
///
/// # Errors
/// [`IndexError::Index`] when it is no index, one of another version, or says that it is longer than 1 GiB.
pub fn hot_len(prefix: &[u8]) -> Result<Option<u64>, IndexError> {
    Ok(format::hot_len(prefix)?)
}

/// Whether a file that begins with these bytes is an index (eight of them are enough).
#[must_use]
pub fn is_index(start: &[u8]) -> bool {
    start.starts_with(&format::MAGIC)
}

fn read_spans(frame: &[u8], decoded: u64) -> Result<SpanTable, IndexFault> {
    if decoded > format::MAX_SPANS {
        return Err(IndexFault::TooLarge("span table"));
    }
    let spans = decompress(frame, decoded).filter(|spans| len_u64(spans.len()) == decoded);
    let table = spans.and_then(|spans| SpanTable::decode(&spans).ok());
    table.ok_or(IndexFault::Malformed("span table"))
}

fn with_blocks(table: &SpanTable, frame: &[u8], decoded: u64) -> Result<SpanTable, IndexFault> {
    if decoded > format::MAX_SPANS {
        return Err(IndexFault::TooLarge("table of blocks"));
    }
    let blocks = decompress(frame, decoded).filter(|blocks| len_u64(blocks.len()) == decoded);
    let table = blocks.and_then(|blocks| table.with_blocks(&blocks).ok());
    table.ok_or(IndexFault::Malformed("table of blocks"))
}

/// Whether what is said of the blob in several places is the same.
fn check_plan(
    summary: &Summary,
    identity: &LayerIdentity,
    spans: Option<&SpanTable>,
    of_contents: bool,
) -> Result<(), IndexFault> {
    let fits = match spans {
        None => !of_contents && (identity.coding != Coding::Plain || identity.blob_len == summary.tar_bytes),
        Some(table) => {
            table.coding() == identity.coding
                && table.blob_len() == identity.blob_len
                && table.tar_len() == summary.tar_bytes
                && table.is_whole_tar() != of_contents
        }
    };
    fits.then_some(()).ok_or(IndexFault::Malformed("layer section"))
}

/// Whether there is a window exactly for the spans that need one.
fn check_windows(spans: Option<&SpanTable>, cold: &ColdDirectory) -> Result<(), IndexFault> {
    let fault = IndexFault::Malformed("cold directory");
    let Some(table) = spans else {
        return if cold.has(ColdPart::Windows) {
            Err(fault)
        } else {
            Ok(())
        };
    };
    let gzip = table.coding() == Coding::Gzip;
    let fits = |part| {
        let all = (0..table.len()).all(|number| {
            let piece = cold.piece(part, number);
            piece.is_some_and(|piece| !piece.range.is_empty()) == (table.span(number).window > 0)
        });
        all && cold.pieces(part) <= table.len()
    };
    let windows_fit = if gzip {
        fits(ColdPart::Windows)
    } else {
        (0..cold.pieces(ColdPart::Windows)).all(|number| {
            let piece = cold.piece(ColdPart::Windows, number);
            piece.is_none_or(|piece| piece.range.is_empty())
        })
    };
    // Windows of blocks that are not used are of no interest.
    let blocks_fit = !table.has_blocks() || fits(ColdPart::BlockWindows);
    (windows_fit && blocks_fit).then_some(()).ok_or(fault)
}

fn section<'a>(file: &'a [u8], record: &SectionRecord) -> Result<&'a [u8], IndexFault> {
    let start = usize::try_from(record.offset).map_err(|_| IndexFault::Truncated)?;
    let len = usize::try_from(record.stored).map_err(|_| IndexFault::Truncated)?;
    file.get(start..)
        .and_then(|rest| rest.get(..len))
        .ok_or(IndexFault::Truncated)
}
