//! The prefetch planner: which chunks to fetch, and which are likely to be read next. In: the ranges that readers touch. Out:
//! ranges of chunks: some now, with the demand; the rest in the order of their likelihood, for when the link has room.
//!
//! Pure: no clock, no I/O, no chunk data. It knows the files through a [`FileMap`] and what is here through a question it
//! asks.
//!
//! Invariant: it never promises a chunk. What it queues may be dropped at any time.

pub mod bandwidth;
mod elf;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod neighbours;
mod node;
mod programs;
mod python;

use std::collections::VecDeque;
use std::sync::Arc;

use self::neighbours::Neighbours;
use self::programs::{Programs, Wanted};
use crate::cache::chunk::ChunkKey;
use crate::image::{FileId, FileMap};
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

/// Whether a chunk has to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// In memory or in the store.
    Here,
    /// In a flight under way.
    Coming,
    /// It would have to be fetched.
    Absent,
}

/// Tells the planner whether a chunk is here, under way or absent.
pub type Look<'a> = &'a dyn Fn(ChunkKey) -> Presence;

/// Hands the bytes of a chunk to the closure if it is in memory; false if it is not.
pub type Peek<'a> = &'a dyn Fn(ChunkKey, &mut dyn FnMut(&[u8])) -> bool;

/// A range of chunks of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkRange {
    /// The layer.
    pub layer: LayerId,
    /// The first chunk's number.
    pub first: u32,
    /// One past the last.
    pub end: u32,
}

impl Reason {
    /// `chunks` planned for this reason.
    #[must_use]
    pub const fn of(self, chunks: ChunkRange) -> Planned {
        Planned { chunks, reason: self }
    }
}

impl From<ChunkKey> for Planned {
    /// A reader waits for this chunk.
    fn from(key: ChunkKey) -> Self {
        Reason::Demand.of(key.into())
    }
}

impl From<ChunkKey> for ChunkRange {
    fn from(key: ChunkKey) -> Self {
        Self {
            layer: key.layer,
            first: key.index,
            end: key.index.saturating_add(1),
        }
    }
}

impl ChunkRange {
    /// The chunks that hold `range`; none when it is empty.
    #[must_use]
    pub fn of(layer: LayerId, range: TarRange) -> Self {
        let first = ChunkKey::holding(layer, range.start).index;
        if range.is_empty() {
            return Self {
                layer,
                first,
                end: first,
            };
        }
        let last = ChunkKey::holding(layer, TarOffset(range.end().0 - 1)).index;
        Self {
            layer,
            first,
            end: last + 1,
        }
    }

    /// Its chunks in order.
    pub fn keys(self) -> impl Iterator<Item = ChunkKey> {
        (self.first..self.end).map(move |index| ChunkKey {
            layer: self.layer,
            index,
        })
    }

    /// Its length in bytes, as if no chunk were short.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.count()) * CHUNK_BYTES
    }

    /// How many chunks it has.
    #[must_use]
    pub fn count(self) -> u32 {
        self.end.saturating_sub(self.first)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.end <= self.first
    }
}

/// Why a range of chunks is to be fetched, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A reader waits for it.
    Demand,
    /// It belongs with what a reader waits for: the rest of a small file, the surroundings in a big one.
    Rest,
    /// It lies ahead of a sequential reader.
    Ahead,
    /// A loader will read it before a program runs.
    Loader,
    /// A module imports it.
    Import,
    /// A file of its directory was read.
    Neighbour,
}

/// A range of chunks that is to be fetched, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The chunks.
    pub chunks: ChunkRange,
    /// Why they are.
    pub reason: Reason,
}

/// The planner's numbers: `_bytes` are bytes of tar, `_percent` hundredths, `_chunks` chunks of [`CHUNK_BYTES`]. The defaults are what `benches/plan_sim.rs` found best on the traces of a Debian layer.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Files up to this size are fetched whole at their first touch.
    pub small_file_bytes: u64,
    /// Of a small file that does not fit this, only so much goes with the demand; the rest follows behind it.
    pub demand_bytes: u64,
    /// At the first miss in a bigger file the aligned chunks of so much around it is wanted, what lies before it last; at
    /// each further one a chunks of twice as much...
    pub first_touch_bytes: u64,
    /// ...up to this.
    pub widest_touch_bytes: u64,
    /// At the first touch of a file so many bytes of its directory are queued...
    pub neighbour_bytes: u64,
    /// ...and at each further file's so many that what is queued and unread is at most this percentage of what was read
    /// there, and [`neighbour_bytes`](Self::neighbour_bytes) on top: a directory whose files are read one after the other comes
    /// whole, one that is visited for a single file does not.
    pub neighbour_percent: u64,
    /// Files of a directory are neighbours up to this size.
    pub small_neighbour_bytes: u64,
    /// Of a library that a program names and of the parts of a program that its loader reads, at most so much is queued.
    pub program_part_bytes: u64,
    /// Modules are followed so many imports from one that a reader touched.
    pub import_hops: u8,
    /// What the kernel reads on both sides of a fault in a mapped file: half its read-ahead.
    pub fault_around_bytes: u64,
    /// A reader that has read so many bytes in one go is sequential; what is read ahead of it is as long as that...
    pub first_read_ahead_bytes: u64,
    /// ...up to this. The fetcher lowers it to a quarter of its memory cache, so that what is read ahead does not push out of
    /// memory what the reader has not read yet.
    pub largest_read_ahead_bytes: u64,
    /// Neighbours are fetched while the bytes prefetched and unread are at most this...
    pub credit_bytes: u64,
    /// ...plus this percentage of the bytes that were read.
    pub credit_percent: u64,
    /// The rest of files and what lies ahead of sequential readers waits likewise at this percentage.
    pub urgent_percent: u64,
    /// Ranges with at most so many chunks between them are one request.
    pub gap_chunks: u32,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            small_file_bytes: 512 << 10,
            demand_bytes: 512 << 10,
            first_touch_bytes: 256 << 10,
            widest_touch_bytes: 2 << 20,
            neighbour_bytes: 32 << 10,
            neighbour_percent: 50,
            small_neighbour_bytes: 64 << 10,
            program_part_bytes: 512 << 10,
            import_hops: 20,
            fault_around_bytes: 16 << 10,
            first_read_ahead_bytes: 256 << 10,
            largest_read_ahead_bytes: 16 << 20,
            credit_bytes: 1 << 20,
            credit_percent: 50,
            urgent_percent: 1000,
            gap_chunks: 4,
        }
    }
}

/// How many sequential readers are followed at once.
const MOST_STREAMS: usize = 32;
/// A reader that jumps no further than this is still sequential: the kernel's requests overtake each other.
const SLACK: u64 = 128 << 10;

/// A reader that reads a layer in order.
#[derive(Clone, Copy, Debug)]
struct Stream {
    layer: LayerId,
    /// Where the next read is expected.
    at: TarOffset,
    /// Up to where chunks are queued.
    queued: TarOffset,
    /// Where the file in which it was last begins and ends; or the layer, for one that has read a whole file and went on.
    file: TarRange,
    /// Where it began.
    from: TarOffset,
    /// How many bytes it has read in one go.
    run: u64,
}

/// The planner of one fetcher: pure state, without I/O. See the module.
#[derive(Debug)]
pub struct Planner {
    files: Option<Arc<dyn FileMap>>,
    sizes: Vec<u64>,
    options: PlanOptions,
    streams: VecDeque<Stream>,
    /// The rest of files and windows whose readers are known.
    urgent: VecDeque<Planned>,
    neighbours: Neighbours,
    programs: Programs,
    seen: Seen,
    /// How wide the last touch of a big file reached, the latest first.
    touched: VecDeque<(FileId, u64)>,
    /// Bytes that readers got, and bytes prefetched that no reader has read yet.
    read: u64,
    unread: u64,
}

impl Planner {
    /// A planner for layers of `sizes` bytes.
    #[must_use]
    pub fn new(files: Option<Arc<dyn FileMap>>, sizes: Vec<u64>, options: PlanOptions) -> Self {
        Self {
            files,
            sizes,
            options,
            streams: VecDeque::new(),
            urgent: VecDeque::new(),
            neighbours: Neighbours::default(),
            programs: Programs::default(),
            seen: Seen::default(),
            touched: VecDeque::new(),
            read: 0,
            unread: 0,
        }
    }

    fn size(&self, layer: LayerId) -> u64 {
        usize::try_from(layer.0)
            .ok()
            .and_then(|at| self.sizes.get(at))
            .copied()
            .unwrap_or(0)
    }

    /// A reader waits for `range`. Appends to `now` what should be fetched at once: the range's chunks that are absent, and
    /// what belongs with them.
    pub fn miss(&mut self, layer: LayerId, range: TarRange, look: Look<'_>, now: &mut Vec<Planned>) {
        let wanted = ChunkRange::of(layer, range);
        if wanted.keys().all(|key| look(key) != Presence::Absent) {
            // It is on its way, and what belongs with it was thought of when it was asked for.
            self.hit(layer, range, look);
            return;
        }
        let with = self.belonging(layer, range);
        now.push(Reason::Demand.of(wanted));
        if with.bytes() <= self.options.demand_bytes.max(wanted.bytes()) {
            now.push(Reason::Rest.of(with));
        } else {
            // What lies behind the demanded chunks goes with them as far as it may; the rest follows.
            let room = self.options.demand_bytes.saturating_sub(wanted.bytes()) / CHUNK_BYTES;
            let end = wanted
                .end
                .saturating_add(u32::try_from(room).unwrap_or(u32::MAX))
                .min(with.end);
            now.push(Reason::Rest.of(ChunkRange { end, ..wanted }));
            self.want_soon(ChunkRange { first: end, ..with });
            self.want_soon(ChunkRange {
                end: wanted.first.min(with.end),
                ..with
            });
        }
        self.follow(layer, range);
        self.look_around(layer, range, look);
    }

    /// A reader found `range` here, and some of it for the first time.
    pub fn hit(&mut self, layer: LayerId, range: TarRange, look: Look<'_>) {
        self.follow(layer, range);
        self.look_around(layer, range, look);
    }

    /// So many bytes were fetched because a reader waited for them.
    pub fn demanded(&mut self, bytes: u64) {
        self.read += bytes;
    }

    /// So many bytes were asked for before any reader asked.
    pub fn prefetched(&mut self, bytes: u64) {
        self.unread += bytes;
    }

    /// Of those, so many were read.
    pub fn paid(&mut self, bytes: u64) {
        self.read += bytes;
        self.unread = self.unread.saturating_sub(bytes);
    }

    /// Of those, so many never came.
    pub fn not_fetched(&mut self, bytes: u64) {
        self.unread = self.unread.saturating_sub(bytes);
    }

    /// The most likely absent range, at most `room` bytes, for a link that would otherwise be idle.
    pub fn next(&mut self, room: u64, look: Look<'_>) -> Option<Planned> {
        let most = u32::try_from((room / CHUNK_BYTES).max(1)).unwrap_or(u32::MAX);
        if !self.may_prefetch(self.options.urgent_percent) {
            return None;
        }
        if let Some(mut found) = take_from(&mut self.urgent, most, self.options.gap_chunks, look) {
            gather(&mut found.chunks, &self.urgent, most, self.options.gap_chunks, look);
            return Some(found);
        }
        if !self.may_prefetch(self.options.credit_percent) {
            return None;
        }
        self.neighbours.next(most, self.options.gap_chunks, look)
    }

    /// Whether what lies here unread is little enough, measured by what was read.
    fn may_prefetch(&self, percent: u64) -> bool {
        self.unread <= self.options.credit_bytes + self.read / 100 * percent
    }

    /// What belongs with `range`: a small file whole; of a big one the surroundings, wider with every touch.
    fn belonging(&mut self, layer: LayerId, range: TarRange) -> ChunkRange {
        let mut all = ChunkRange::of(layer, range);
        let file_at = |at| self.files.as_ref().and_then(|files| files.file_at(layer, at));
        let begins_in = file_at(range.start);
        let ends_in = file_at(TarOffset(range.end().0.saturating_sub(1))).filter(|last| begins_in != Some(*last));
        for file in begins_in.into_iter().chain(ends_in) {
            let part = if file.range.len <= self.options.small_file_bytes {
                file.range
            } else {
                let widest = self.widen(file.file);
                let start = range.start.max(file.range.start);
                let offset = start.since(file.range.start) / widest * widest;
                let window = file.range.start.plus(offset);
                let end = window.plus(widest).min(file.range.end());
                // What lies before the range would keep its reader waiting: it follows.
                let before = ChunkRange::of(layer, TarRange::new(window, start.since(window)));
                self.want_soon(before);
                TarRange::new(start, end.since(start))
            };
            let part = ChunkRange::of(layer, part);
            all = ChunkRange {
                layer,
                first: all.first.min(part.first),
                end: all.end.max(part.end),
            };
        }
        all
    }

    /// How wide the surroundings of the next touch of a big file are.
    fn widen(&mut self, file: FileId) -> u64 {
        let place = self.touched.iter().position(|(touched, _)| *touched == file);
        let width = match place.and_then(|place| self.touched.remove(place)) {
            Some((_, width)) => (width * 2).min(self.options.widest_touch_bytes),
            None => self.options.first_touch_bytes,
        };
        self.touched.push_front((file, width));
        self.touched.truncate(MOST_STREAMS);
        width
    }

    fn want_soon(&mut self, chunks: ChunkRange) {
        if !chunks.is_empty() {
            self.urgent.push_front(Reason::Rest.of(chunks));
        }
    }

    /// Follows sequential readers: ahead of each a window as long as what it has read in one go.
    fn follow(&mut self, layer: LayerId, range: TarRange) {
        let whole = TarRange::new(TarOffset(0), self.size(layer));
        let files = self.files.as_ref();
        let file = files.map_or(whole, |files| {
            files.file_at(layer, range.start).map_or(whole, |file| file.range)
        });
        let near = |stream: &Stream| {
            stream.layer == layer && range.start.plus(SLACK) >= stream.at && range.start <= stream.at.plus(SLACK)
        };
        let begin = Stream {
            layer,
            at: range.start,
            queued: range.end(),
            file,
            from: range.start,
            run: 0,
        };
        let known = self.streams.iter().position(near);
        let mut stream = known.and_then(|place| self.streams.remove(place)).unwrap_or(begin);
        if range.start >= stream.file.end() {
            // Who has read all of a file and goes on behind it reads a tree; who has not reads here and there.
            if stream.from <= stream.file.start {
                stream.file = whole;
            } else {
                stream = begin;
            }
        }
        stream.run += range.end().since(stream.at).min(range.len);
        stream.at = stream.at.max(range.end());
        let ahead = stream.queued.since(stream.at);
        let window = stream.run.min(self.options.largest_read_ahead_bytes);
        if window >= self.options.first_read_ahead_bytes && ahead <= window / 2 {
            let from = stream.queued.max(stream.at);
            let until = stream.at.plus(window).min(stream.file.end());
            if until > from {
                let window = TarRange::new(from, until.since(from));
                self.urgent.push_back(Reason::Ahead.of(ChunkRange::of(layer, window)));
                stream.queued = until;
            }
        }
        self.streams.push_front(stream);
        self.streams.truncate(MOST_STREAMS);
    }

    /// At a file's first touch: queues its neighbours, and looks into it as soon as its first bytes are here.
    fn look_around(&mut self, layer: LayerId, range: TarRange, look: Look<'_>) {
        let Some(files) = self.files.clone() else { return };
        let Some(file) = files.file_at(layer, range.start) else {
            return;
        };
        if self.seen.first_time(file.file) {
            self.neighbours.touched(&*files, file, &self.options, look);
            self.programs.touched(file);
        }
    }

    /// A chunk has come; `peek` shows it and others. Appends to `now` what it says will be read next: that is no guess, and
    /// is fetched like demand.
    pub fn arrived(&mut self, key: ChunkKey, peek: Peek<'_>, now: &mut Vec<Planned>) {
        if self.programs.awaits(key) {
            self.look_inside(peek, now);
        }
    }

    /// The same for what was touched and had come before.
    pub fn touched(&mut self, peek: Peek<'_>, now: &mut Vec<Planned>) {
        if self.programs.is_fresh() {
            self.look_inside(peek, now);
        }
    }

    fn look_inside(&mut self, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let Some(files) = self.files.clone() else { return };
        let wanted = self.programs.read_on(&*files, &self.options, peek);
        let want = |wanted: &Wanted| wanted.reason.of(ChunkRange::of(wanted.layer, wanted.range));
        now.extend(wanted.iter().filter(|wanted| wanted.certain).map(want));
        // In the tar's order, so that neighbours are one request; before what was wanted earlier, because the latest
        // module's imports are read before those of the ones that import it.
        let mut likely: Vec<Planned> = wanted.iter().filter(|wanted| !wanted.certain).map(want).collect();
        likely.sort_unstable_by_key(|want| want.chunks);
        for want in likely.into_iter().rev() {
            self.urgent.push_front(want);
        }
    }
}

/// Which files were touched: a bit each.
#[derive(Debug, Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Whether it is the first time that this is asked of `file`.
    fn first_time(&mut self, FileId(file): FileId) -> bool {
        let (word, bit) = (crate::units::len_usize(u64::from(file / 64)), 1 << (file % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let first = self.0[word] & bit == 0;
        self.0[word] |= bit;
        first
    }
}

/// Whether the chunks from `from` to `to` may be fetched along: not when one of them is on its way already.
fn may_bridge(layer: LayerId, from: u32, to: u32, look: Look<'_>) -> bool {
    (from..to).all(|index| look(ChunkKey { layer, index }) != Presence::Coming)
}

/// Cuts the next absent chunks of at most `most` chunks from the front of `queue`, merged with what follows closely.
fn take_from(queue: &mut VecDeque<Planned>, most: u32, gap: u32, look: Look<'_>) -> Option<Planned> {
    let mut found: Option<Planned> = None;
    while let Some(Planned { chunks: front, reason }) = queue.front_mut() {
        while front.first < front.end {
            let key = ChunkKey {
                layer: front.layer,
                index: front.first,
            };
            if look(key) == Presence::Absent {
                match &mut found {
                    None => found = Some(reason.of(key.into())),
                    Some(Planned { chunks: so_far, .. }) => {
                        let close = so_far.layer == key.layer
                            && key.index >= so_far.end
                            && key.index - so_far.end <= gap
                            && key.index - so_far.first < most
                            && may_bridge(key.layer, so_far.end, key.index, look);
                        if !close {
                            return found;
                        }
                        so_far.end = key.index + 1;
                    }
                }
                if found.is_some_and(|so_far| so_far.chunks.count() >= most) {
                    front.first += 1;
                    return found;
                }
            }
            front.first += 1;
        }
        queue.pop_front();
    }
    found
}

/// Lets `found` grow by what else is wanted close to it, on both sides, up to `most` chunks: one request instead of two.
fn gather(found: &mut ChunkRange, queue: &VecDeque<Planned>, most: u32, gap: u32, look: Look<'_>) {
    const MOST_LOOKED_AT: usize = 256;
    let absent = |index| {
        look(ChunkKey {
            layer: found.layer,
            index,
        }) == Presence::Absent
    };
    let (mut first, mut end) = (found.first, found.end);
    loop {
        let before = (first, end);
        for Planned { chunks: near, .. } in queue.iter().take(MOST_LOOKED_AT) {
            if near.layer != found.layer || near.is_empty() {
                continue;
            }
            if near.end > end && near.first <= end.saturating_add(gap) {
                let until = near.end.min(first.saturating_add(most));
                if let Some(last) = (end..until).rev().find(|index| absent(*index))
                    && may_bridge(found.layer, end, last, look)
                {
                    end = last + 1;
                }
            }
            if near.first < first && near.end.saturating_add(gap) >= first {
                let from = near.first.max(end.saturating_sub(most));
                if let Some(next) = (from..first).find(|index| absent(*index))
                    && may_bridge(found.layer, next, first, look)
                {
                    first = next;
                }
            }
        }
        if (first, end) == before {
            break;
        }
    }
    (found.first, found.end) = (first, end);
}

/// Puts the absent chunks of `wanted` together to flights: neighbours over gaps of up to `gap` chunks, none longer than
/// `longest`.
pub fn merge(wanted: &[Planned], gap: u32, longest: u32, look: Look<'_>) -> Vec<ChunkRange> {
    let mut keys: Vec<ChunkKey> = wanted
        .iter()
        .flat_map(|want| want.chunks.keys())
        .filter(|key| look(*key) == Presence::Absent)
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let mut flights: Vec<ChunkRange> = Vec::new();
    for key in keys {
        match flights.last_mut() {
            Some(last)
                if last.layer == key.layer
                    && key.index - last.end <= gap
                    && key.index - last.first < longest
                    && may_bridge(key.layer, last.end, key.index, look) =>
            {
                last.end = key.index + 1;
            }
            _ => flights.push(ChunkRange {
                layer: key.layer,
                first: key.index,
                end: key.index + 1,
            }),
        }
    }
    flights
}

#[cfg(test)]
mod tests;
