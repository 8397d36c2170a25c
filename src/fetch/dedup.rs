//! Bytes of a layer that other layers have, too. In: which ranges of a layer are said to lie in others (its *donors*), and what proves it.
//! Out: for any range of the layer, where donors have it: in memory, in the disk cache, or not here.
//!
//! What a donor has is a hint and no more: nobody's index is believed for another layer's bytes. *Invariant:* no byte of a donor is handed
//! out before it was compared with a digest of the layer that is read: the payload's, or of bigger files the chunk's. It is compared once;
//! after that the donor's own checks say that it is the same still: its chunks are held to digests that do not change, or nobody writes
//! them ([`LayerContent::is_constant`]).
//!
//! A table is made once, by a thread that no reader waits for, and never changes but for what was proven. Looking something up takes
//! no lock but that of the memory cache, and allocates nothing for reads of up to a few chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use super::Verifier;
use super::content::LayerContent;
use crate::cache::chunk::{ChunkKey, chunk_len, pieces};
use crate::cache::disk::{Bits, LayerKey};
use crate::cache::{Slice, Slices};
use crate::layer::SpanTable;
use crate::prefetch::{ChunkRange, PlanOptions};
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange, len_usize};

/// A payload up to this long, in bytes, is proven as a whole; a longer one chunk by chunk, as far as chunks lie inside of it.
pub const PROVEN_WHOLE: u64 = 1 << 20;
/// The most donors of one table.
pub const MOST_DONORS: usize = 64;
/// The most extents of one table, of 56 bytes each: the longest ones stay.
const MOST_EXTENTS: usize = 1 << 18;
/// The most tables of one layer: one when it is opened, and one for each time that more donors came.
const MOST_TABLES: usize = 8;
/// The end of a span is left out if it has so many bytes of the blob, however little the link holds.
pub(super) const LEAST_CUT: u64 = 16 << 10;
/// The layer number in keys of chunks whose layer is no device's.
const ANY: LayerId = LayerId(0);

/// The first twenty bytes of a payload's SHA-256.
pub type ShortDigest = [u8; 20];

/// A payload that a donor is said to have, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExtent {
    /// Where it lies in the layer.
    pub range: TarRange,
    /// The beginning of its SHA-256, as the layer's own index has it.
    pub digest: ShortDigest,
    /// Which of the donors has it.
    pub donor: usize,
    /// Where it begins there.
    pub from: TarOffset,
}

/// What a layer has in common with others.
#[derive(Clone, Debug, Default)]
pub struct SharedPayloads {
    /// Under which names the cache keeps the donors; at most [`MOST_DONORS`].
    pub donors: Vec<LayerKey>,
    /// In any order; they may overlap, and each byte is served by one of them.
    pub extents: Vec<SharedExtent>,
    /// The layer's other payloads.
    pub others: Vec<TarRange>,
}

impl SharedPayloads {
    /// How many bytes of a layer's blob are fetched in the end if all its files are read and the donors have all of theirs. `table` says how
    /// the layer is compressed, `size` is the tar's length; with `by_chunk` each of its chunks has a digest.
    #[must_use]
    pub fn bytes_to_fetch(&self, table: Option<&SpanTable>, size: u64, by_chunk: bool) -> u64 {
        let wanted = Layout::new(size, self, by_chunk, |donor| donor < self.donors.len()).uncovered;
        let wanted: BTreeSet<u32> = wanted.into_iter().flat_map(chunks).collect();
        // What is close together is one request, with what lies between.
        let mut runs: Vec<std::ops::Range<u32>> = Vec::new();
        let gap = PlanOptions::default().gap_chunks;
        for index in wanted {
            match runs.last_mut() {
                Some(run) if index - run.end <= gap => run.end = index + 1,
                _ => runs.push(index..index + 1),
            }
        }
        let tar = |run: &std::ops::Range<u32>| {
            let start = u64::from(run.start) * CHUNK_BYTES;
            TarRange::new(
                TarOffset(start),
                (u64::from(run.end) * CHUNK_BYTES).min(size).saturating_sub(start),
            )
        };
        let Some(table) = table else {
            return runs.iter().map(|run| tar(run).len).sum();
        };
        // Of each span what lies before the last byte that is wanted of it.
        let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
        for range in runs.iter().map(tar) {
            let last = TarOffset(range.end().0.saturating_sub(1));
            for number in table.span_at(range.start)..=table.span_at(last) {
                let end = range.end().min(table.span(number).tar.end()).0;
                ends.entry(number)
                    .and_modify(|known| *known = end.max(*known))
                    .or_insert(end);
            }
        }
        let blob = ends.into_iter().map(|(number, end)| {
            let span = table.span(number);
            let cut = table.likely_cut(end, (span.tar.start.0, span.blob.start), &span, LEAST_CUT);
            cut.unwrap_or(span.blob.end).saturating_sub(span.blob.start)
        });
        blob.sum()
    }
}

/// Nothing is known of the extent yet.
const UNPROVEN: u8 = 0;
/// It is what it has to be.
const PROVEN: u8 = 1;
/// It is something else: the donor's index lies, or the layer's own.
const REFUTED: u8 = 2;

/// A range of the layer that is served from one donor.
#[derive(Debug)]
struct Extent {
    start: u64,
    len: u64,
    /// Where it begins in the donor.
    from: u64,
    digest: ShortDigest,
    /// What was digested begins so many bytes before it, and ends so many behind it: another extent serves these.
    before: u32,
    behind: u32,
    donor: u16,
    /// Of one that is proven chunk by chunk it never becomes [`PROVEN`].
    state: AtomicU8,
    by_chunk: bool,
}

impl Extent {
    fn range(&self) -> TarRange {
        TarRange::new(TarOffset(self.start), self.len)
    }

    /// What its digest is of.
    fn digested(&self) -> TarRange {
        let (before, behind) = (u64::from(self.before), u64::from(self.behind));
        TarRange::new(TarOffset(self.start - before), before + self.len + behind)
    }

    /// Where a range of the layer lies in the donor, which is inside of what was digested.
    fn in_donor(&self, range: TarRange) -> TarRange {
        // Invariant: what was digested lies in the donor from `from - before` on.
        let begins = self.from - u64::from(self.before);
        TarRange::new(TarOffset(begins + range.start.since(self.digested().start)), range.len)
    }
}

/// A part of a range, and what has to be proven for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    extent: usize,
    /// In the layer.
    pub(super) range: TarRange,
    /// What is proven together with it, in the layer.
    unit: TarRange,
}

/// Where donors have a range.
#[derive(Debug)]
pub(super) enum AtDonors {
    /// All of it in memory, and proven.
    Memory(Slices),
    /// In memory or in the disk cache, or not proven yet.
    Here,
}

/// Why a donor's bytes are of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DonorFault {
    /// They are not there any more.
    Gone,
    /// A chunk of it could not be read back, or is not what was written. It is forgotten.
    Damaged,
    /// They are others than the layer's.
    Other,
}

/// What a layer has in common with its donors; see the module.
pub(super) struct DedupTable {
    donors: Vec<Arc<LayerContent>>,
    /// By place; they do not overlap.
    extents: Box<[Extent]>,
    /// Chunks of the layer that were proven.
    proven: Bits,
    /// Chunks of the layer of which every byte of a file lies in an extent, and which hold one.
    covered: Bits,
}

impl fmt::Debug for DedupTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DedupTable")
            .field("donors", &self.donors.len())
            .field("extents", &self.extents.len())
            .finish_non_exhaustive()
    }
}

/// The whole chunks inside of `range`, of a layer of `size` bytes: the last one may be shorter.
fn whole_chunks(range: TarRange, size: u64) -> TarRange {
    let start = range.start.0.next_multiple_of(CHUNK_BYTES);
    let end = if range.end().0 >= size {
        size
    } else {
        range.end().0 / CHUNK_BYTES * CHUNK_BYTES
    };
    TarRange::new(TarOffset(start), end.saturating_sub(start))
}

/// The numbers of the chunks that a range touches.
fn chunks(range: TarRange) -> std::ops::Range<u32> {
    let touched = ChunkRange::of(ANY, range);
    touched.first..touched.end
}

/// Extents in order, and the payloads, or parts of them, that are in none.
struct Layout {
    extents: Vec<Extent>,
    uncovered: Vec<TarRange>,
}

impl Layout {
    /// Of what a layer of `size` bytes has in common with donors that `are_there`. With `by_chunk` each of the layer's chunks has a digest.
    fn new(size: u64, shared: &SharedPayloads, by_chunk: bool, are_there: impl Fn(usize) -> bool) -> Self {
        let mut wanted: Vec<&SharedExtent> = shared.extents.iter().collect();
        if wanted.len() > MOST_EXTENTS {
            wanted.sort_by_key(|extent| std::cmp::Reverse(extent.range.len));
            wanted.truncate(MOST_EXTENTS);
        }
        // What each may serve. What is proven by chunk goes before: a piece that reaches into it serves what it leaves.
        let mut wanted: Vec<(TarRange, bool, &SharedExtent)> = wanted
            .into_iter()
            .filter_map(|extent| {
                let SharedExtent { range, donor, from, .. } = *extent;
                let whole = range.len <= PROVEN_WHOLE;
                let used = if whole { range } else { whole_chunks(range, size) };
                let there = donor < MOST_DONORS && are_there(donor);
                let fits = range.start.0.checked_add(range.len).is_some_and(|end| end <= size)
                    && from.0.checked_add(range.len).is_some();
                (there && fits && !used.is_empty() && (whole || by_chunk)).then_some((used, !whole, extent))
            })
            .collect();
        wanted.sort_by_key(|(used, by_chunk, _)| (used.start, !by_chunk));
        let by_chunk: Vec<TarOffset> = wanted
            .iter()
            .filter(|(_, by_chunk, _)| *by_chunk)
            .map(|(used, ..)| used.start)
            .collect();
        let mut extents: Vec<Extent> = Vec::with_capacity(wanted.len());
        let mut served = TarOffset(0);
        for (used, is_by_chunk, extent) in wanted {
            let next = by_chunk.get(by_chunk.partition_point(|start| *start <= used.start));
            let start = used.start.max(served);
            let end = next.map_or(used.end(), |next| used.end().min(*next));
            if start >= end || (is_by_chunk && (start, end) != (used.start, used.end())) {
                continue;
            }
            served = end;
            let cut = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
            extents.push(Extent {
                start: start.0,
                len: end.since(start),
                from: extent.from.0 + start.since(extent.range.start),
                digest: extent.digest,
                // Invariant: both are zero or less than `PROVEN_WHOLE`.
                before: if is_by_chunk { 0 } else { cut(start.since(used.start)) },
                behind: if is_by_chunk { 0 } else { cut(used.end().since(end)) },
                donor: u16::try_from(extent.donor).unwrap_or(u16::MAX),
                state: AtomicU8::new(UNPROVEN),
                by_chunk: is_by_chunk,
            });
        }
        let payloads = shared
            .others
            .iter()
            .chain(shared.extents.iter().map(|extent| &extent.range));
        let uncovered = payloads.flat_map(|range| left_of(*range, &extents)).collect();
        Self { extents, uncovered }
    }
}

/// What of `range` none of `extents` serves, which are in order and do not overlap.
fn left_of(range: TarRange, extents: &[Extent]) -> Vec<TarRange> {
    let mut left = Vec::new();
    let mut at = range.start;
    let first = extents.partition_point(|extent| extent.range().end() <= range.start);
    let inside = extents.iter().skip(first).map(Extent::range);
    for served in inside.take_while(|served| served.start < range.end()) {
        if at < served.start {
            left.push(TarRange::new(at, served.start.since(at)));
        }
        at = served.end();
    }
    if at < range.end() {
        left.push(TarRange::new(at, range.end().since(at)));
    }
    left
}

impl DedupTable {
    /// A table for a layer of `size` bytes; of donors those that are `None` are not there. With `by_chunk` each of the layer's chunks has a
    /// digest.
    pub(super) fn new(
        size: u64,
        donors: Vec<Option<Arc<LayerContent>>>,
        shared: &SharedPayloads,
        by_chunk: bool,
    ) -> Self {
        let are_there = |donor: usize| donors.get(donor).is_some_and(Option::is_some);
        let Layout { extents, uncovered } = Layout::new(size, shared, by_chunk, are_there);
        let count = crate::cache::chunk::chunk_count(size).unwrap_or(u32::MAX);
        let covered = Bits::new(count);
        for extent in &extents {
            chunks(extent.range()).for_each(|index| covered.set(index));
        }
        for range in uncovered {
            chunks(range).for_each(|index| covered.clear(index));
        }
        // Numbers of donors stay what they are; what is not there is in no extent.
        let placeholder = donors.iter().flatten().next().cloned();
        let donors = donors
            .into_iter()
            .map_while(|donor| donor.or_else(|| placeholder.clone()));
        Self {
            donors: donors.collect(),
            extents: extents.into(),
            proven: Bits::new(count),
            covered,
        }
    }

    /// The bytes of all extents together.
    pub(super) fn bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// The part of the layer's bytes from `at` on, and before `end`, that is proven and read together; none if no extent has the first
    /// of them, or it was refuted.
    fn part(&self, at: TarOffset, end: TarOffset) -> Option<Part> {
        let number = self
            .extents
            .partition_point(|extent| extent.start <= at.0)
            .checked_sub(1)?;
        let extent = self.extents.get(number)?;
        if !extent.range().contains(at) || extent.state.load(Ordering::Acquire) == REFUTED {
            return None;
        }
        let unit = if extent.by_chunk {
            let start = at.0 / CHUNK_BYTES * CHUNK_BYTES;
            TarRange::new(TarOffset(start), CHUNK_BYTES.min(extent.range().end().0 - start))
        } else {
            extent.digested()
        };
        let len = unit.end().min(extent.range().end()).min(end).since(at);
        Some(Part {
            extent: number,
            range: TarRange::new(at, len),
            unit,
        })
    }

    /// The parts of `range`, in order; ends before the first byte that no extent has.
    fn parts(&self, range: TarRange) -> impl Iterator<Item = Part> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let part = (at < range.end()).then(|| self.part(at, range.end())).flatten()?;
            at = part.range.end();
            Some(part)
        })
    }

    fn is_proven(&self, part: &Part) -> bool {
        let Some(extent) = self.extents.get(part.extent) else {
            return false;
        };
        if extent.by_chunk {
            self.proven.has(ChunkKey::holding(ANY, part.unit.start).index)
        } else {
            extent.state.load(Ordering::Acquire) == PROVEN
        }
    }

    /// The donor of a part, and where it has a range of the same extent; none if what it has may be something else now.
    fn donor(&self, part: &Part, range: TarRange) -> Option<(&LayerContent, TarRange)> {
        let extent = self.extents.get(part.extent)?;
        let donor = self.donors.get(usize::from(extent.donor))?;
        donor.is_constant().then(|| (&**donor, extent.in_donor(range)))
    }

    /// Whether all that has to be read for a part is here.
    fn is_held(&self, part: &Part) -> bool {
        let wanted = if self.is_proven(part) { part.range } else { part.unit };
        self.donor(part, wanted).is_some_and(|(donor, range)| {
            let cache = donor.cache.get();
            chunks(range).all(|index| donor.memory.holds(index) || cache.is_some_and(|cache| cache.has(index)))
        })
    }

    /// Whether donors have all of `range`, which is not empty.
    fn holds(&self, range: TarRange) -> bool {
        let mut at = range.start;
        for part in self.parts(range) {
            if !self.is_held(&part) {
                return false;
            }
            at = part.range.end();
        }
        at == range.end() && !range.is_empty()
    }

    /// Whether donors have all that files have in chunk `index` of a layer of `size` bytes.
    fn holds_chunk(&self, index: u32, size: u64) -> bool {
        if !self.covered.has(index) {
            return false;
        }
        let chunk = TarRange::new(TarOffset(u64::from(index) * CHUNK_BYTES), chunk_len(size, index));
        let first = self
            .extents
            .partition_point(|extent| extent.range().end() <= chunk.start);
        let in_chunk = self.extents.iter().skip(first);
        in_chunk
            .take_while(|extent| extent.start < chunk.end().0)
            .all(|extent| {
                let start = extent.start.max(chunk.start.0);
                let end = extent.range().end().min(chunk.end());
                self.holds(TarRange::new(TarOffset(start), end.since(TarOffset(start))))
            })
    }

    /// Where donors have all of `range`; none if they do not. Waits for nothing.
    fn locate(&self, range: TarRange) -> Option<AtDonors> {
        if !self.holds(range) {
            return None;
        }
        let mut slices = Slices::new();
        for part in self.parts(range) {
            let proven = self.is_proven(&part);
            let Some((donor, there)) = self.donor(&part, part.range).filter(|_| proven) else {
                return Some(AtDonors::Here);
            };
            for (key, from, len) in pieces(ANY, there) {
                let Some(chunk) = donor.memory.get(key.index) else {
                    return Some(AtDonors::Here);
                };
                chunk.touch();
                slices.push(Slice::new(chunk, from, len));
            }
        }
        Some(AtDonors::Memory(slices))
    }

    /// Fills `target` with `range`, of the same length, if donors have all of it proven in the disk cache, and the page cache has that. Waits
    /// for nothing, and compares every chunk.
    fn read_at_once(&self, range: TarRange, target: &mut [u8]) -> bool {
        let (mut rest, mut at) = (target, range.start);
        for part in self.parts(range) {
            let proven = self.is_proven(&part);
            let Some((donor, there)) = self.donor(&part, part.range).filter(|_| proven) else {
                return false;
            };
            let Some((now, later)) = rest.split_at_mut_checked(len_usize(there.len)) else {
                return false;
            };
            let read = donor
                .cache
                .get()
                .is_some_and(|cache| cache.read_checked(there.start.0, now));
            // What was read while somebody else began to write it may be anything.
            if !read || !donor.is_constant() {
                return false;
            }
            (rest, at) = (later, part.range.end());
        }
        at == range.end() && rest.is_empty()
    }

    /// The bytes of a part, proven if that was not done yet. Waits for the disk.
    ///
    /// # Errors
    /// [`DonorFault`]: then the layer itself has to be asked.
    pub(super) fn read(&self, part: &Part, verifier: Option<&Verifier>) -> Result<Vec<u8>, DonorFault> {
        if self.is_proven(part) {
            let (donor, there) = self.donor(part, part.range).ok_or(DonorFault::Gone)?;
            return read_chunks(donor, there);
        }
        let extent = self.extents.get(part.extent).ok_or(DonorFault::Gone)?;
        let (donor, there) = self.donor(part, part.unit).ok_or(DonorFault::Gone)?;
        let mut bytes = read_chunks(donor, there)?;
        if extent.by_chunk {
            let index = ChunkKey::holding(ANY, part.unit.start).index;
            if !verifier.is_some_and(|verifier| verifier.pieces().is_none() && verifier.matches(index, &bytes)) {
                extent.state.store(REFUTED, Ordering::Release);
                return Err(DonorFault::Other);
            }
            self.proven.set(index);
        } else {
            let digest: [u8; 32] = Sha256::digest(&bytes).into();
            if !digest.starts_with(&extent.digest) {
                extent.state.store(REFUTED, Ordering::Release);
                return Err(DonorFault::Other);
            }
            extent.state.store(PROVEN, Ordering::Release);
        }
        let skip = len_usize(part.range.start.since(part.unit.start));
        bytes.drain(..skip);
        bytes.truncate(len_usize(part.range.len));
        Ok(bytes)
    }
}

/// Bytes of what is held of a layer. Waits for the disk.
fn read_chunks(donor: &LayerContent, range: TarRange) -> Result<Vec<u8>, DonorFault> {
    let mut bytes = Vec::with_capacity(len_usize(range.len));
    let mut buffer = Vec::new();
    for (key, from, len) in pieces(ANY, range) {
        let (from, to) = (len_usize(from), len_usize(from + len));
        if let Some(chunk) = donor.memory.get(key.index) {
            bytes.extend_from_slice(chunk.bytes().get(from..to).ok_or(DonorFault::Gone)?);
            continue;
        }
        let cache = donor.cache.get().filter(|cache| cache.has(key.index));
        let cache = cache.ok_or(DonorFault::Gone)?;
        cache.touch(key.index);
        if !cache.read_chunk(key.index, &mut buffer) {
            // It may have been given up just now.
            if cache.has(key.index) {
                cache.lost(key.index);
                return Err(DonorFault::Damaged);
            }
            return Err(DonorFault::Gone);
        }
        bytes.extend_from_slice(buffer.get(from..to).ok_or(DonorFault::Gone)?);
    }
    // What was read while somebody else began to write it may be anything.
    if donor.is_constant() {
        Ok(bytes)
    } else {
        Err(DonorFault::Gone)
    }
}

/// All tables of a layer; a few, each made once.
#[derive(Debug, Default)]
pub(super) struct DedupTables([OnceLock<Box<DedupTable>>; MOST_TABLES]);

impl DedupTables {
    fn all(&self) -> impl Iterator<Item = &DedupTable> {
        self.0.iter().map_while(|place| Some(&**place.get()?))
    }

    /// Takes one more table; false if there are too many.
    pub(super) fn add(&self, table: DedupTable) -> bool {
        let mut table = Some(Box::new(table));
        self.0.iter().any(|place| {
            if place.get().is_none()
                && let Some(new) = table.take()
            {
                table = place.set(new).err();
            }
            table.is_none()
        })
    }

    /// Table number `number`.
    pub(super) fn get(&self, number: usize) -> Option<&DedupTable> {
        self.0.get(number)?.get().map(Box::as_ref)
    }

    /// The parts of `range` at donors that have all of it, and the number of the table that says so.
    pub(super) fn find(&self, range: TarRange) -> Option<(usize, Vec<Part>)> {
        let (number, table) = self.all().enumerate().find(|(_, table)| table.holds(range))?;
        Some((number, table.parts(range).collect()))
    }

    /// Whether donors have all that files have in chunk `index` of a layer of `size` bytes.
    pub(super) fn holds_chunk(&self, index: u32, size: u64) -> bool {
        self.all().any(|table| table.holds_chunk(index, size))
    }

    /// Where donors have all of `range`. Waits for nothing.
    pub(super) fn locate(&self, range: TarRange) -> Option<AtDonors> {
        self.all().find_map(|table| table.locate(range))
    }

    /// See [`DedupTable::read_at_once`].
    pub(super) fn read_at_once(&self, range: TarRange, target: &mut [u8]) -> bool {
        self.all().any(|table| table.read_at_once(range, target))
    }
}

#[cfg(test)]
mod tests;
