//! Walking a tar that lies on a web server, in the time of few bytes and few waits.
//!
//! A tar is a chain: only a header tells where the next one is. Followed link by link it costs a round trip an entry; streamed
//! it costs all of its bytes. So it is cut into segments and the chain is followed in many of them at once. In each, an
//! explorer looks for something that looks like a header, follows the chain from there to the segment's end, and keeps the
//! header blocks it meets; within a segment it reads on through small payloads and asks anew behind big ones, whichever takes
//! less time at the round trip and rate measured so far.
//!
//! A segment that begins in a big payload has its first header far away. It is looked for only for a while; then the segment is
//! left (`queue`) until whoever meets that payload's own header, in a segment before, tells where it ends.
//!
//! What explorers find are guesses: a tar may lie inside the tar. There is one true parser; it starts at byte 0, is fed the
//! blocks that explorers brought wherever it wants exactly those, and fetches for itself whatever is missing. A wrong guess
//! costs bytes, never truth.

mod queue;
mod wire;

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::sync::Arc;

use futures_util::future::{Either, join_all, select};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::Tap;
use super::error::WalkError;
use crate::http::{HttpOptions, runtime};
use crate::index::walk::{Progress, Walked};
use crate::index::{EndOfArchive, Entry, EntrySink, IndexError, Parser, TAR_BLOCK, looks_like_header};
use crate::source::{Blob, Requests, SourceError, wait_after};
use crate::units::TarOffset;
use queue::{Left, Queue, Work};
use wire::{Link, Reader, Wire};

/// At most this many connections, and one for each so many bytes: parallel chains are only worth it on a long way.
const MAX_EXPLORERS: u64 = 32;
const BYTES_PER_EXPLORER: u64 = 4 << 20;
/// A segment is not longer than this, so that what explorers keep until its turn comes stays small …
const MAX_SEGMENT: u64 = 32 << 20;
/// … but there are no more of them than this, however long the server says that the layer is.
const MOST_SEGMENTS: u64 = 1 << 15;
/// How many header bytes may wait to be taken, of all segments together, …
const WAITING: usize = 64 << 20;
/// … and of each beside that, so that the one whose turn it is always goes on.
const WAITING_EACH: usize = RunBuilder::TOGETHER;
/// How far an explorer looks for a header, at most and as a part of its segment, …
const MAX_SCAN: u64 = 4 << 20;
const SCAN_PART: u64 = 4;
/// … and how much of that before it lets others tell where one is.
const SCAN_STEP: u64 = 512 << 10;

/// Walks a layer on a web server.
pub(super) fn walk<'a>(
    blob: &'a Blob,
    sink: &'a mut dyn EntrySink,
    tap: Option<&'a mut (dyn Tap + 'a)>,
    options: &HttpOptions,
    progress: Progress<'a>,
) -> Result<Walked, WalkError> {
    let requests = Requests::of(blob, options)?;
    let keep_all = tap.is_some();
    let wire = Wire {
        blob,
        requests,
        tap: RefCell::new(tap),
        asked: Cell::new(0),
        got: Cell::new(0),
        link: Link::default(),
    };
    let mut main = MainParser {
        parser: Parser::new(),
        sink,
        progress,
        blob,
    };
    let end = runtime::runtime().map_err(SourceError::from)?.block_on(async {
        if blob.len == 0 {
            main.finish()
        } else if blob.answers_ranges() && wire.answers_ranges().await? {
            walk_ranges(&wire, &mut main).await
        } else {
            if blob.answers_ranges() {
                // It said that it does when it was asked how long the layer is.
                log::warn!(
                    "{}: the server does not answer ranges; reading the whole layer once",
                    blob.name
                );
            }
            walk_stream(&wire, &mut main, keep_all).await
        }
    })?;
    Ok(Walked {
        tar_len: blob.len,
        end,
        reads: wire.asked.get(),
        bytes_read: wire.got.get(),
    })
}

/// The one parser that counts, and where its entries go.
struct MainParser<'a> {
    parser: Parser,
    sink: &'a mut dyn EntrySink,
    progress: Progress<'a>,
    blob: &'a Blob,
}

impl MainParser<'_> {
    /// Where it needs a byte next; `None` when it needs no more.
    fn wants(&self) -> Option<u64> {
        self.parser.wants().map(|at| at.0).filter(|at| *at < self.blob.len)
    }

    fn feed(&mut self, at: u64, bytes: &[u8]) -> Result<(), WalkError> {
        let outcome = self.parser.feed(TarOffset(at), bytes, self.sink);
        (self.progress)(self.parser.wants().unwrap_or(TarOffset(self.blob.len)), self.blob.len);
        outcome.map_err(|error| self.bad_tar(error))
    }

    fn finish(&mut self) -> Result<EndOfArchive, WalkError> {
        let end = self
            .parser
            .finish(TarOffset(self.blob.len))
            .map_err(|error| self.bad_tar(error))?;
        (self.progress)(TarOffset(self.blob.len), self.blob.len);
        Ok(end)
    }

    fn bad_tar(&self, error: IndexError) -> WalkError {
        WalkError::Tar {
            name: self.blob.name.clone(),
            source: error,
        }
    }
}

/// Reads the layer from beginning to end, of a server that can do nothing else.
async fn walk_stream(wire: &Wire<'_>, main: &mut MainParser<'_>, keep_all: bool) -> Result<EndOfArchive, WalkError> {
    let mut reached = 0;
    let mut backoff = wire.requests.backoff();
    loop {
        let failure = match wire.whole().await {
            Err(failure) => failure,
            Ok(mut body) => loop {
                match wire.piece(&mut body).await {
                    Ok(None) => return main.finish(),
                    Ok(Some((at, bytes))) => {
                        main.feed(at, &bytes)?;
                        if body.at() > reached {
                            reached = body.at();
                            backoff.came(bytes.len());
                        }
                        if main.wants().is_none() && !keep_all {
                            return main.finish();
                        }
                    }
                    Err(failure) => break failure,
                }
            },
        };
        wait_after(&mut backoff, failure).await?;
    }
}

/// Follows the chain in all segments at once.
async fn walk_ranges(wire: &Wire<'_>, main: &mut MainParser<'_>) -> Result<EndOfArchive, WalkError> {
    let (segments, mut runs): (Vec<_>, Vec<_>) = segments(wire.blob.len).into_iter().unzip();
    let queue = Queue::new(segments);
    let exploring = join_all((0..explorers(wire.blob.len)).map(|_| async {
        while let Some(work) = queue.next(&wire.link).await {
            wire.link.readers.set(wire.link.readers.get() + 1);
            if let Some(left) = work.explore(wire, &queue).await {
                queue.leave(left);
            }
            wire.link.readers.set(wire.link.readers.get() - 1);
        }
    }));
    let verifying = verify(wire, main, &mut runs, &queue);
    match select(pin!(verifying), pin!(exploring)).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right((_, verifying)) => verifying.await,
    }
}

/// Feeds the parser what explorers found, segment by segment, and fetches what they did not find.
async fn verify(
    wire: &Wire<'_>,
    main: &mut MainParser<'_>,
    runs: &mut [SegmentRuns],
    queue: &Queue,
) -> Result<EndOfArchive, WalkError> {
    let mut reader = Reader::new(wire);
    for segment in runs {
        while let Some(wanted) = main.wants().filter(|wanted| *wanted < segment.end) {
            queue.wanted(wanted);
            let Some(run) = segment.received.recv().await else {
                break;
            };
            bridge(&mut reader, main, run.at).await?;
            if main.wants() == Some(run.at) {
                main.feed(run.at, &run.bytes)?;
            }
        }
        // Its explorer stops when the channel is closed.
        segment.received.close();
        bridge(&mut reader, main, segment.end).await?;
    }
    main.finish()
}

/// Follows the chain up to `until` with requests of its own.
async fn bridge(reader: &mut Reader<'_, '_>, main: &mut MainParser<'_>, until: u64) -> Result<(), WalkError> {
    while let Some(wanted) = main.wants().filter(|wanted| *wanted < until) {
        let bytes = reader.read(wanted).await?;
        main.feed(wanted, &bytes)?;
    }
    Ok(())
}

fn explorers(len: u64) -> u64 {
    (len / BYTES_PER_EXPLORER).clamp(1, MAX_EXPLORERS)
}

/// A stretch of the layer and where to send the header blocks found in it.
struct Segment {
    start: u64,
    end: u64,
    runs: mpsc::UnboundedSender<HeaderRun>,
    room: Arc<Semaphore>,
    common_room: Arc<Semaphore>,
}

/// The other end: what an explorer found in the segment that ends at `end`.
struct SegmentRuns {
    end: u64,
    received: mpsc::UnboundedReceiver<HeaderRun>,
}

/// Header blocks that lie together.
struct HeaderRun {
    at: u64,
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

fn segments(len: u64) -> Vec<(Segment, SegmentRuns)> {
    let size = len
        .div_ceil(explorers(len))
        .next_multiple_of(TAR_BLOCK)
        .min(MAX_SEGMENT.max((len / MOST_SEGMENTS).next_multiple_of(TAR_BLOCK)));
    let common_room = Arc::new(Semaphore::new(WAITING));
    let mut start = 0;
    let mut segments = Vec::new();
    while start < len {
        let end = start.saturating_add(size).min(len);
        let (sender, received) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(WAITING_EACH));
        segments.push((
            Segment {
                start,
                end,
                runs: sender,
                room,
                common_room: Arc::clone(&common_room),
            },
            SegmentRuns { end, received },
        ));
        start = end;
    }
    segments
}

impl Work {
    /// Finds the chain in this segment and follows it to the end, again and again if it breaks off. Returns what is left when others may
    /// tell where it goes on. Errors end it quietly: if the bytes matter, the main parser meets the same error.
    async fn explore(self, wire: &Wire<'_>, queue: &Queue) -> Option<Left> {
        let Self {
            segment,
            mut at,
            mut is_header,
            is_last_try,
            mut scan_budget,
        } = self;
        let mut reader = Reader::new(wire);
        while at < segment.end && !segment.abandoned() {
            if !is_header {
                let mut step = scan_budget.min(SCAN_STEP);
                scan_budget -= step;
                match segment.scan(&mut reader, queue, at, &mut step).await {
                    Ok(Scanned::Header(header)) => at = header,
                    Ok(Scanned::Nothing(reached)) if reached < segment.end && !is_last_try => {
                        let at = reached;
                        return Some(Left {
                            segment,
                            at,
                            scan_budget,
                        });
                    }
                    _ => return None,
                }
            }
            is_header = false;
            match segment.follow(&mut reader, queue, at).await {
                Ok(reached) => at = reached,
                Err(error) => {
                    log::debug!("explorer at byte {at}: {error}");
                    return None;
                }
            }
        }
        None
    }
}

/// What was found by looking for a header.
enum Scanned {
    /// The first one is here.
    Header(u64),
    /// There is none before here.
    Nothing(u64),
}

impl Segment {
    fn abandoned(&self) -> bool {
        self.runs.is_closed()
    }

    /// Looks for the first block from `at` on that looks like a header, in at most `left` bytes.
    async fn scan(
        &self,
        reader: &mut Reader<'_, '_>,
        queue: &Queue,
        mut at: u64,
        left: &mut u64,
    ) -> Result<Scanned, SourceError> {
        while at < self.end && !self.abandoned() {
            let past = queue.past_payload(at).next_multiple_of(TAR_BLOCK);
            if past > at {
                at = past;
                continue;
            }
            if *left == 0 {
                break;
            }
            let bytes = reader.read_block(at).await?;
            *left = left.saturating_sub(len_u64(&bytes));
            let blocks = bytes.chunks_exact(BLOCK);
            match blocks.clone().position(looks_like_header) {
                Some(number) => {
                    let before = TAR_BLOCK * u64::try_from(number).unwrap_or(0);
                    return Ok(Scanned::Header(at + before));
                }
                None => at += TAR_BLOCK * u64::try_from(blocks.len()).unwrap_or(0),
            }
            if len_u64(&bytes) < TAR_BLOCK {
                // The layer's end.
                return Ok(Scanned::Nothing(self.end));
            }
        }
        Ok(Scanned::Nothing(at))
    }

    /// Follows the chain from the header at `at`; returns where it leads when the segment is left or it breaks off.
    async fn follow(&self, reader: &mut Reader<'_, '_>, queue: &Queue, at: u64) -> Result<u64, SourceError> {
        let mut parser = Parser::starting_at(TarOffset(at));
        let mut found = RunBuilder {
            segment: self,
            at,
            bytes: Vec::new(),
        };
        let mut payload_from = at;
        while let Some(TarOffset(wanted)) = parser.wants() {
            if wanted > payload_from {
                queue.payload(payload_from, wanted);
            }
            if wanted >= reader.wire.blob.len || self.abandoned() {
                break;
            }
            if wanted >= self.end && parser.between_entries() {
                found.send().await;
                return Ok(wanted);
            }
            if !reader.has(wanted) {
                found.send().await;
            }
            let bytes = reader.read(wanted).await?;
            let unit = &bytes[..bytes.len().min(parser.wants_len())];
            found.add(wanted, unit).await;
            payload_from = wanted + len_u64(unit);
            if parser.feed(TarOffset(wanted), unit, &mut Nothing).is_err() {
                break;
            }
        }
        found.send().await;
        Ok(payload_from)
    }
}

const BLOCK: usize = 512;

fn len_u64(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Header blocks on their way to the parser.
struct RunBuilder<'a> {
    segment: &'a Segment,
    at: u64,
    bytes: Vec<u8>,
}

impl RunBuilder<'_> {
    /// So many bytes are sent together.
    const TOGETHER: usize = 32 << 10;
    /// What a piece weighs at least.
    const LEAST: usize = 1 << 10;

    async fn add(&mut self, at: u64, mut unit: &[u8]) {
        if at != self.at + len_u64(&self.bytes) {
            self.send().await;
            self.at = at;
        }
        while !unit.is_empty() {
            let (now, later) = unit.split_at(unit.len().min(Self::TOGETHER));
            self.bytes.extend_from_slice(now);
            unit = later;
            if self.bytes.len() >= Self::TOGETHER {
                self.send().await;
            }
        }
    }

    /// Sends what is there, as soon as there is room for it.
    async fn send(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut self.bytes);
        let at = self.at;
        self.at += len_u64(&bytes);
        let weight = u32::try_from(bytes.len().max(Self::LEAST)).unwrap_or(u32::MAX);
        let common = Arc::clone(&self.segment.common_room).try_acquire_many_owned(weight);
        let room = match common {
            Ok(room) => Ok(room),
            Err(_) => Arc::clone(&self.segment.room).acquire_many_owned(weight).await,
        };
        if let Ok(room) = room {
            // A closed channel means that it is not needed.
            let _ = self.segment.runs.send(HeaderRun { at, bytes, _room: room });
        }
    }
}

/// Explorers only want to know where the next header is.
struct Nothing;

impl EntrySink for Nothing {
    fn entry(&mut self, _: &Entry) -> Result<(), IndexError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn segments_cover_every_layer_and_stay_few() {
        for len in [1, 511, 4 << 20, (1 << 30) + 5, 1 << 40, u64::MAX - 1, u64::MAX] {
            let mut end = 0;
            let all = segments(len);
            for (segment, runs) in &all {
                assert!(segment.start == end && segment.start < segment.end && segment.end == runs.end);
                assert!(segment.start.is_multiple_of(TAR_BLOCK));
                end = segment.end;
            }
            assert!(end == len && all.len() <= 1 << 16, "{len}: {} segments", all.len());
        }
    }

    /// An explorer goes on while the parser is elsewhere, as long as there is room for all; then only the one whose turn it is does.
    #[tokio::test]
    async fn headers_wait_in_bounded_room() {
        let (all, mut runs): (Vec<_>, Vec<_>) = segments(12 << 20).into_iter().unzip();
        let [first, second, _] = &all[..] else {
            panic!("{} segments", all.len())
        };
        let send = |segment: &Segment, count: usize| {
            let mut found = RunBuilder {
                segment,
                at: segment.start,
                bytes: Vec::new(),
            };
            let mut sent = 0;
            for n in 0..count {
                // Not together, as headers with payloads between them.
                let at = segment.start + 4 * TAR_BLOCK * u64::try_from(n).unwrap();
                let added = async {
                    found.add(at, &[1; BLOCK]).await;
                    found.send().await;
                };
                if added.now_or_never().is_none() {
                    break;
                }
                sent += 1;
            }
            sent
        };
        let room = WAITING / RunBuilder::LEAST;
        let own = WAITING_EACH / RunBuilder::LEAST;
        assert_eq!(
            send(first, 20_000),
            20_000,
            "a segment of small files waits for the parser"
        );
        assert_eq!(send(first, 1 << 20), room - 20_000 + own);
        assert_eq!(send(second, 1 << 20), own);
        let taken = runs[1].received.recv().await.unwrap();
        assert_eq!((taken.at, taken.bytes.len()), (second.start, BLOCK));
        drop(taken);
        assert_eq!(send(second, 10), 1);
    }
}
