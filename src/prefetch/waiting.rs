//! Files that are read inside, step by step, as their bytes come. In: which parts of a file a step needs, and chunks as they come.
//! Out: the steps whose parts are all in memory.
//!
//! Must never ask for bytes: whoever waits has them fetched, or does not care whether they ever come.

use std::collections::HashMap;

use super::Peek;
use super::chunks::ChunkRange;
use super::elf::loading::Part;
use super::reason::{Planned, Reason};
use crate::cache::chunk::ChunkKey;
use crate::image::StoredFile;
use crate::units::{TarRange, len_u64, len_usize};

/// The most files, and parts of their code, that wait for bytes to be parsed; then all are forgotten.
const MOST_PENDING: usize = 1 << 13;

/// A file that waits for bytes to be parsed.
#[derive(Debug)]
pub(super) struct Pending<S> {
    pub(super) file: StoredFile,
    /// What is read of it next.
    pub(super) step: S,
    /// How many loads lead to it from a file that a reader touched.
    pub(super) hops: u8,
    /// The chunks that have to be in memory before it can be parsed further, the first of them last.
    lacking: Vec<ChunkRange>,
}

/// The files that wait; `S` is what is read of them next. See the module.
#[derive(Debug)]
pub(super) struct Waiting<S> {
    /// Files by a chunk that they wait for.
    by_chunk: HashMap<ChunkKey, Vec<Pending<S>>>,
    /// How many those are.
    len: usize,
    /// Files whose chunks may be here: they are looked at next.
    fresh: Vec<Pending<S>>,
}

impl<S> Default for Waiting<S> {
    fn default() -> Self {
        Self {
            by_chunk: HashMap::new(),
            len: 0,
            fresh: Vec::new(),
        }
    }
}

impl<S> Waiting<S> {
    /// Goes on with a file at `step` when these parts of it are in memory.
    pub(super) fn wait(&mut self, file: StoredFile, step: S, parts: &[Part], hops: u8) {
        let range = |&(at, len): &Part| TarRange::new(file.range.start.plus(at), len);
        let lacking = parts.iter().rev();
        let lacking = lacking.map(|part| ChunkRange::of(file.layer, range(part))).collect();
        self.fresh.push(Pending {
            file,
            step,
            hops,
            lacking,
        });
    }

    /// A chunk has come: those who wait for it are looked at next.
    pub(super) fn came(&mut self, key: ChunkKey) {
        if let Some(waiting) = self.by_chunk.remove(&key) {
            self.len -= waiting.len();
            self.fresh.extend(waiting);
        }
    }

    /// The next of those to be looked at whose bytes are all in memory; the others wait for the next of theirs.
    pub(super) fn ready(&mut self, peek: Peek<'_>) -> Option<Pending<S>> {
        'next: while let Some(mut pending) = self.fresh.pop() {
            while let Some(part) = pending.lacking.last_mut() {
                if part.is_empty() {
                    pending.lacking.pop();
                    continue;
                }
                let key = ChunkKey {
                    layer: part.layer,
                    index: part.first,
                };
                if !peek(key, &mut |_| ()) {
                    if self.len >= MOST_PENDING {
                        self.by_chunk.clear();
                        self.len = 0;
                    }
                    self.by_chunk.entry(key).or_default().push(pending);
                    self.len += 1;
                    continue 'next;
                }
                part.first += 1;
            }
            return Some(pending);
        }
        None
    }
}

/// Parts of a file, cut at its end, as ranges of chunks; those that touch are one.
pub(super) fn planned(file: StoredFile, parts: &[Part], reason: Reason) -> Vec<Planned> {
    let mut all: Vec<Planned> = Vec::new();
    for &(at, len) in parts {
        let len = len.min(file.range.len.saturating_sub(at));
        let range = TarRange::new(file.range.start.plus(at), len);
        let chunks = ChunkRange::of(file.layer, range);
        match all.last_mut() {
            Some(last) if (last.chunks.first..=last.chunks.end).contains(&chunks.first) => {
                last.chunks.end = last.chunks.end.max(chunks.end);
            }
            _ if chunks.is_empty() => {}
            _ => all.push(reason.of(chunks)),
        }
    }
    all
}

/// The `len` bytes of a file at offset `at`; none unless all chunks that hold them are in memory.
pub(super) fn bytes_of(file: StoredFile, at: u64, len: u64, peek: Peek<'_>) -> Option<Vec<u8>> {
    let range = TarRange::new(file.range.start.plus(at), len);
    let mut bytes = Vec::with_capacity(len_usize(len));
    for key in ChunkRange::of(file.layer, range).keys() {
        let from = range.start.0.saturating_sub(key.start().0);
        let to = range.end().0 - key.start().0;
        peek(key, &mut |chunk| {
            let to = to.min(len_u64(chunk.len()));
            bytes.extend_from_slice(chunk.get(len_usize(from)..len_usize(to)).unwrap_or_default());
        });
    }
    (len_u64(bytes.len()) == len).then_some(bytes)
}
