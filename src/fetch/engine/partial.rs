//! Chunks that come in pieces, because they lie across the border of two flights. In: pieces. Out: whole chunks.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// So many are kept although no reader waits for them: 8 MiB at most.
const MOST_IDLE: usize = 256;

/// Parts of a line.
pub(super) type Ranges = SmallVec<[Range<u64>; 4]>;

/// Takes `away` from each of `ranges`.
pub(super) fn subtract(ranges: &mut Ranges, away: &Range<u64>) {
    let mut rest = Ranges::new();
    for range in ranges.drain(..) {
        for part in [
            range.start..range.end.min(away.start),
            range.start.max(away.end)..range.end,
        ] {
            if part.start < part.end {
                rest.push(part);
            }
        }
    }
    *ranges = rest;
}

#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    /// What is not there yet, counted from the chunk's start.
    lacking: Ranges,
    /// When its first piece came.
    since: Instant,
}

/// A chunk that came in pieces.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Assembled {
    pub(super) bytes: Vec<u8>,
    /// When its first piece came.
    pub(super) since: Instant,
}

/// The unfinished chunks of one layer.
#[derive(Debug, Default)]
pub(super) struct Partials {
    chunks: HashMap<u32, Partial>,
    /// The oldest first; may name some that are finished.
    order: VecDeque<u32>,
}

impl Partials {
    /// Takes `bytes`, which lie `from` bytes into chunk `index`, whose length is `len`. The chunk, if that completes it.
    /// `needed` says which unfinished chunks must not be forgotten.
    pub(super) fn add(
        &mut self,
        index: u32,
        len: u64,
        from: u64,
        bytes: &[u8],
        needed: &dyn Fn(u32) -> bool,
    ) -> Option<Assembled> {
        if !self.chunks.contains_key(&index) {
            self.make_room(needed);
            self.order.push_back(index);
        }
        let partial = self.chunks.entry(index).or_insert_with(|| Partial {
            bytes: vec![0; len_usize(len)],
            lacking: std::iter::once(0..len).collect(),
            since: Instant::now(),
        });
        let to = from.saturating_add(len_u64(bytes.len()));
        partial
            .bytes
            .get_mut(len_usize(from)..len_usize(to))?
            .copy_from_slice(bytes);
        subtract(&mut partial.lacking, &(from..to));
        if !partial.lacking.is_empty() {
            return None;
        }
        self.order.retain(|other| *other != index);
        let Partial { bytes, since, .. } = self.chunks.remove(&index)?;
        Some(Assembled { bytes, since })
    }

    /// What is not there of chunk `index` of `len` bytes, counted from its start.
    pub(super) fn lacking(&self, index: u32, len: u64) -> Ranges {
        match self.chunks.get(&index) {
            Some(partial) => partial.lacking.clone(),
            None => std::iter::once(0..len).collect(),
        }
    }

    /// All that is there, and where it lies in tar space, in order.
    pub(super) fn into_parts(self) -> Vec<(u64, Vec<u8>)> {
        let mut parts = Vec::new();
        for (index, partial) in self.chunks {
            let start = u64::from(index) * CHUNK_BYTES;
            let mut here: Ranges = std::iter::once(0..len_u64(partial.bytes.len())).collect();
            partial.lacking.iter().for_each(|lacking| subtract(&mut here, lacking));
            for range in here {
                let bytes = partial.bytes.get(len_usize(range.start)..len_usize(range.end));
                parts.push((start + range.start, bytes.unwrap_or_default().to_vec()));
            }
        }
        parts.sort_unstable_by_key(|(at, _)| *at);
        parts
    }

    fn make_room(&mut self, needed: &dyn Fn(u32) -> bool) {
        if self.chunks.len() < MOST_IDLE {
            return;
        }
        if let Some(place) = self.order.iter().position(|index| !needed(*index))
            && let Some(index) = self.order.remove(place)
        {
            self.chunks.remove(&index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacking(partials: &Partials, index: u32, len: u64) -> Vec<(u64, u64)> {
        let ranges = partials.lacking(index, len);
        ranges.into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn pieces_in_any_order_make_a_chunk() {
        let content: Vec<u8> = (0..100).collect();
        let pieces: [Range<usize>; 4] = [50..80, 0..20, 70..100, 15..50];
        let mut partials = Partials::default();
        for (n, piece) in pieces.iter().enumerate() {
            let whole = partials.add(7, 100, len_u64(piece.start), &content[piece.clone()], &|_| false);
            assert_eq!(whole.is_some(), n == 3);
            if let Some(whole) = whole {
                assert_eq!(whole.bytes, content);
            }
        }
        assert_eq!(lacking(&partials, 7, 100), [(0, 100)]);
        assert!(partials.add(7, 100, 90, &[0; 20], &|_| false).is_none(), "too long");
    }

    #[test]
    fn parts_are_given_with_their_places() {
        let mut partials = Partials::default();
        for from in [10, 30, 20] {
            assert!(
                partials
                    .add(2, 100, from, &[u8::try_from(from).unwrap(); 10], &|_| false)
                    .is_none()
            );
        }
        assert!(partials.add(2, 100, 90, &[9; 10], &|_| false).is_none());
        let mut parts = partials.into_parts();
        parts.sort();
        let start = 2 * CHUNK_BYTES;
        let middle = [[10; 10], [20; 10], [30; 10]].concat();
        assert_eq!(parts, [(start + 10, middle), (start + 90, vec![9; 10])]);
    }

    #[test]
    fn what_nobody_needs_is_forgotten() {
        let mut partials = Partials::default();
        for index in 0..2 * u32::try_from(MOST_IDLE).unwrap() {
            assert!(partials.add(index, 10, 0, &[1], &|index| index < 5).is_none());
        }
        assert_eq!(partials.chunks.len(), MOST_IDLE);
        assert_eq!(lacking(&partials, 3, 10), [(1, 10)]);
        assert_eq!(lacking(&partials, 5, 10), [(0, 10)]);
        assert_eq!(lacking(&partials, 511, 10), [(1, 10)]);
    }
}
