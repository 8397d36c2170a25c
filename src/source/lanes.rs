//! A blob to its end over several connections at once. In: a blob whose server answers ranges. Out: its bytes, in order, each once.
//!
//! One connection often brings less than the link holds: object stores give each of them so much and no more. So the blob is asked for in
//! pieces side by side. What comes of the first is handed on at once, what comes of the others waits in memory until it is their turn. How
//! many pieces come at a time (lanes) is found out: one more, as long as that brings more and whoever takes the bytes waits for them.
//!
//! Invariants: no byte is asked for twice, but what a connection that broke had not brought; a piece whose turn has not come holds no more than
//! [`MOST_WAITING`] bytes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;

use super::blob::{Blob, BlobSink};
use super::error::{SourceError, wait_after};
use super::request::Requests;

/// A piece is so long where there is one lane, whose bytes do not wait, and where there are several.
const LONG_PIECE: u64 = 16 << 20;
const PIECE: u64 = 4 << 20;
/// With so much of a piece left to come the next one is asked for, so that no round trip is lost between them.
const OVERLAP: u64 = 1 << 20;
/// Bytes of a piece that may wait for its turn.
const MOST_WAITING: u64 = 4 << 20;
/// More lanes than this take more memory than they bring.
const MOST_LANES: usize = 4;
/// Pieces that wait for their turn, or are on their way to that, with [`MOST_WAITING`] bytes at most each.
const MOST_BEHIND: usize = 4;

/// Hands the blob's bytes from `from` on to `sink`, and returns how many requests that took.
pub(super) async fn stream<E: From<SourceError>>(
    requests: &Requests,
    blob: &Blob,
    from: u64,
    sink: BlobSink<'_, E>,
) -> Result<u64, E> {
    let arrivals = Arrivals::default();
    let mut lanes = Lanes::new();
    let mut pieces: VecDeque<Rc<Piece>> = VecDeque::new();
    let mut fetching = FuturesUnordered::new();
    let (mut asked, mut reached) = (0, from);
    loop {
        // The first one may turn out to be longer than was asked for.
        reached = pieces.back().map_or(reached, |piece| piece.end.get());
        if reached < blob.len && lanes.has_room(&pieces) {
            let end = reached.saturating_add(lanes.piece_len()).min(blob.len);
            let piece = Rc::new(Piece::new(reached, end, pieces.is_empty()));
            if let Some(before) = pieces.back() {
                before.is_last.set(false);
            }
            pieces.push_back(Rc::clone(&piece));
            fetching.push(piece.fetch(requests, blob, &arrivals));
            continue;
        }
        let Some(head) = pieces.front() else { return Ok(asked) };
        while let Some(bytes) = head.take() {
            sink(&bytes)?;
        }
        if head.is_over() {
            pieces.pop_front();
            if let Some(next) = pieces.front() {
                next.begin_turn();
            }
            continue;
        }
        let since = Instant::now();
        let arrival = pin!(arrivals.any.notified());
        if let Either::Left((Some(ended), _)) = select(fetching.next(), arrival).await {
            asked += ended?;
        }
        lanes.waited(since.elapsed());
        lanes.judge(arrivals.bytes.get());
    }
}

/// What comes on all lanes together.
#[derive(Default)]
struct Arrivals {
    bytes: Cell<u64>,
    any: Notify,
}

/// A part of the blob that is fetched by one request, if that brings all of it.
struct Piece {
    /// The next byte that has not come.
    at: Cell<u64>,
    end: Cell<u64>,
    /// What has come and was not taken, and how many bytes that is.
    came: RefCell<VecDeque<Bytes>>,
    waiting: Cell<u64>,
    /// Whether it is taken as it comes.
    is_first: Cell<bool>,
    /// Whether no piece behind it was asked for.
    is_last: Cell<bool>,
    turn: Notify,
}

impl Piece {
    fn new(start: u64, end: u64, is_first: bool) -> Self {
        Self {
            at: Cell::new(start),
            end: Cell::new(end),
            came: RefCell::default(),
            waiting: Cell::new(0),
            is_first: Cell::new(is_first),
            is_last: Cell::new(true),
            turn: Notify::new(),
        }
    }

    fn left(&self) -> u64 {
        self.end.get() - self.at.get()
    }

    /// Whether all of it has come and was taken.
    fn is_over(&self) -> bool {
        self.left() == 0 && self.waiting.get() == 0
    }

    fn take(&self) -> Option<Bytes> {
        let bytes = self.came.borrow_mut().pop_front()?;
        self.waiting.set(self.waiting.get() - len_u64(&bytes));
        Some(bytes)
    }

    fn begin_turn(&self) {
        self.is_first.set(true);
        self.turn.notify_one();
    }

    /// Fetches it, asking again from where it broke off; how many requests that took.
    async fn fetch(self: Rc<Self>, requests: &Requests, blob: &Blob, arrivals: &Arrivals) -> Result<u64, SourceError> {
        let mut backoff = requests.backoff();
        let mut asked = 0;
        while self.left() > 0 {
            asked += 1;
            let failure = match requests.range(blob, self.at.get(), self.left()).await {
                Ok(mut body) => {
                    self.answered(body.at(), body.end());
                    loop {
                        match body.next().await {
                            Ok(None) => break None,
                            Ok(Some((at, bytes))) => {
                                let fresh = self.fresh(at, &bytes);
                                backoff.came(fresh.len());
                                self.bring(fresh, arrivals);
                            }
                            Err(failure) => break Some(SourceError::from(failure)),
                        }
                        if self.left() == 0 && body.at() < body.end() {
                            // More than was asked for: nobody reads that.
                            break None;
                        }
                        while !self.is_first.get() && self.waiting.get() >= MOST_WAITING && self.left() > 0 {
                            self.turn.notified().await;
                        }
                    }
                }
                Err(failure) => Some(failure),
            };
            if let Some(failure) = failure {
                wait_after(&mut backoff, failure).await?;
            }
        }
        Ok(asked)
    }

    /// An answer has the bytes from `at` to `end`. Where that is more than was asked for, the server has no ranges: all comes in this
    /// answer, and would in every other. What another piece is to bring is left to that one.
    fn answered(&self, at: u64, end: u64) {
        let has_no_ranges = at < self.at.get() || end > self.end.get();
        if has_no_ranges && self.is_first.get() && self.is_last.get() {
            self.end.set(end.max(self.end.get()));
        }
    }

    /// What of `bytes`, which are the blob's from `at` on, is of this piece and has not come.
    fn fresh(&self, at: u64, bytes: &Bytes) -> Bytes {
        let cut = |place: u64| {
            usize::try_from(place.saturating_sub(at))
                .unwrap_or(usize::MAX)
                .min(bytes.len())
        };
        bytes.slice(cut(self.at.get())..cut(self.end.get()))
    }

    fn bring(&self, bytes: Bytes, arrivals: &Arrivals) {
        let len = len_u64(&bytes);
        if len == 0 {
            return;
        }
        self.at.set(self.at.get() + len);
        self.waiting.set(self.waiting.get() + len);
        self.came.borrow_mut().push_back(bytes);
        arrivals.bytes.set(arrivals.bytes.get() + len);
        arrivals.any.notify_one();
    }
}

/// How many pieces come at a time.
struct Lanes {
    count: usize,
    /// Bytes a second that came with one less.
    with_less: f64,
    /// Whether one more was tried, and brought nothing.
    settled: bool,
    /// Whether the last measurement was before the newest lane was there.
    is_warm: bool,
    /// When the measurement began, how much had come by then, and how long was waited since.
    since: Instant,
    bytes: u64,
    waited: Duration,
}

impl Lanes {
    /// A measurement takes so long at least, and as many bytes for each lane.
    const SPAN: Duration = Duration::from_millis(250);
    const SAMPLE: u64 = 1 << 20;
    /// One more of n lanes has to bring this part of an n-th more.
    const LEAST_GAIN: f64 = 0.4;

    fn new() -> Self {
        Self {
            count: 1,
            with_less: 0.0,
            settled: false,
            is_warm: false,
            since: Instant::now(),
            bytes: 0,
            waited: Duration::ZERO,
        }
    }

    fn piece_len(&self) -> u64 {
        if self.count == 1 { LONG_PIECE } else { PIECE }
    }

    /// Whether another piece is to be asked for.
    fn has_room(&self, pieces: &VecDeque<Rc<Piece>>) -> bool {
        let coming = pieces.iter().filter(|piece| piece.left() > 0).count();
        let is_near_its_end = pieces.back().is_none_or(|piece| piece.left() <= OVERLAP);
        pieces.len() <= MOST_BEHIND && (coming < self.count || (coming == self.count && is_near_its_end))
    }

    fn waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// `bytes` have come by now: is one lane more worth it, or was the last one not?
    fn judge(&mut self, bytes: u64) {
        let took = self.since.elapsed();
        let came = bytes - self.bytes;
        let lanes = u32::try_from(self.count).unwrap_or(u32::MAX);
        if self.settled || took < Self::SPAN || came < Self::SAMPLE * u64::from(lanes) {
            return;
        }
        let rate = f64::from(u32::try_from(came >> 10).unwrap_or(u32::MAX)) * 1024.0 / took.as_secs_f64();
        // Who takes the bytes slower than they come needs no more of them.
        let is_wanted = self.waited >= took / 2;
        (self.since, self.bytes, self.waited) = (Instant::now(), bytes, Duration::ZERO);
        if !std::mem::replace(&mut self.is_warm, true) || !is_wanted {
            return;
        }
        let least = 1.0 + Self::LEAST_GAIN / f64::from((lanes - 1).max(1));
        if lanes > 1 && rate < self.with_less * least {
            self.count -= 1;
            self.settled = true;
        } else if self.count < MOST_LANES {
            self.with_less = rate;
            self.count += 1;
            self.is_warm = false;
        }
    }
}

fn len_u64(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_with_everything_is_taken_where_no_other_piece_is_asked_for() {
        let ends = |is_first: bool, is_last: bool, answer: (u64, u64)| {
            let piece = Piece::new(100, 200, is_first);
            piece.is_last.set(is_last);
            piece.answered(answer.0, answer.1);
            piece.end.get()
        };
        assert_eq!(ends(true, true, (0, 1000)), 1000);
        assert_eq!(ends(true, true, (100, 1000)), 1000);
        // Else its bytes would come twice: here, and by the piece behind it.
        assert_eq!(ends(true, false, (0, 1000)), 200);
        assert_eq!(ends(false, true, (0, 1000)), 200);
        // What was asked for, and less.
        assert_eq!(ends(true, true, (100, 200)), 200);
        assert_eq!(ends(true, true, (100, 150)), 200);
        let piece = Piece::new(100, 200, true);
        let all = Bytes::from_static(&[7; 1000]);
        assert_eq!(piece.fresh(0, &all).len(), 100);
        assert_eq!(piece.fresh(150, &all).len(), 50);
    }
}
