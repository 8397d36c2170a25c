//! A digest of something long, made beside other work. In: bytes in order. Out: the same digest as ever, for less of the caller's
//! time: where there is a second processor, another thread digests while the caller goes on.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use super::{Digest, Hasher};

/// What is handed over at once, in bytes.
const PIECE: usize = 256 << 10;
/// How many pieces may wait; then the caller does.
const WAITING: usize = 4;
/// Shorter things are digested where they are: a thread costs more.
const SHORT: u64 = 4 << 20;

/// A digest being made.
#[derive(Debug)]
pub struct Beside(State);

#[derive(Debug)]
enum State {
    /// By the caller; so many bytes have passed, and a thread is worth one try when they are many.
    Here { hasher: Hasher, passed: u64, tried: bool },
    /// By another thread.
    There(Worker),
}

#[derive(Debug)]
struct Worker {
    full: Vec<u8>,
    pieces: SyncSender<Vec<u8>>,
    /// Pieces that were digested come back, to be filled again.
    empty: Receiver<Vec<u8>>,
    thread: JoinHandle<Hasher>,
}

impl From<Hasher> for Beside {
    fn from(hasher: Hasher) -> Self {
        Self(State::Here {
            hasher,
            passed: 0,
            tried: false,
        })
    }
}

impl Beside {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Here { hasher, passed, tried } => {
                hasher.update(bytes);
                *passed = passed.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                if *passed >= SHORT && !*tried {
                    *tried = true;
                    // Without a second thread the digest is made by the caller's.
                    if let Some(worker) = Worker::start(hasher) {
                        self.0 = State::There(worker);
                    }
                }
            }
            State::There(worker) => worker.take(bytes),
        }
    }

    /// The digest of all of them.
    #[must_use]
    pub fn finish(self) -> Digest {
        match self.0 {
            State::Here { hasher, .. } => hasher.finish(),
            State::There(worker) => worker.finish().finish(),
        }
    }
}

impl Worker {
    fn start(hasher: &Hasher) -> Option<Self> {
        if std::thread::available_parallelism().map_or(1, std::num::NonZero::get) < 2 {
            return None;
        }
        let (pieces, taken) = sync_channel::<Vec<u8>>(WAITING);
        let (give_back, empty) = channel();
        let mut hasher = hasher.clone();
        let thread = std::thread::Builder::new()
            .name("tarblk-digest".to_owned())
            .spawn(move || {
                // It ends when the sender of the pieces is dropped, whichever way.
                for mut piece in taken {
                    hasher.update(&piece);
                    piece.clear();
                    let _filler_has_ended = give_back.send(piece);
                }
                hasher
            })
            .ok()?;
        Some(Self {
            full: Vec::with_capacity(PIECE),
            pieces,
            empty,
            thread,
        })
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.full.len()));
            self.full.extend_from_slice(now);
            bytes = later;
            if self.full.len() == PIECE {
                let next = match self.empty.try_recv() {
                    Ok(empty) => empty,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => Vec::with_capacity(PIECE),
                };
                // A thread that is gone has panicked, which `finish` says.
                let _gone = self.pieces.send(std::mem::replace(&mut self.full, next));
            }
        }
    }

    fn finish(self) -> Hasher {
        let _gone = self.pieces.send(self.full);
        drop(self.pieces);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn it_is_the_digest_of_all_bytes_however_they_come() {
        let short = usize::try_from(SHORT).unwrap();
        let bytes: Vec<u8> = (0..3 * short).map(|n| (n % 251).to_le_bytes()[0]).collect();
        for len in [
            0,
            1,
            short - 1,
            short,
            short + 1,
            short + PIECE - 1,
            short + PIECE,
            short + 9 * PIECE + 77,
            bytes.len(),
        ] {
            for piece in [1000, PIECE, 3 * PIECE + 5, bytes.len()] {
                for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                    let mut made = Beside::from(algorithm.hasher());
                    bytes[..len].chunks(piece).for_each(|piece| made.update(piece));
                    assert_eq!(
                        made.finish(),
                        Digest::of(algorithm, &bytes[..len]),
                        "{len} in pieces of {piece}"
                    );
                }
            }
        }
    }

    #[test]
    fn one_that_is_not_ended_leaves_no_thread() {
        let mut made = Beside::from(Algorithm::Sha256.hasher());
        made.update(&vec![7; usize::try_from(SHORT).unwrap()]);
        made.update(b"more");
        // On one processor there is none anyway.
        if let State::There(worker) = made.0 {
            let Worker { pieces, thread, .. } = worker;
            drop(pieces);
            assert!(thread.join().is_ok());
        }
    }
}
