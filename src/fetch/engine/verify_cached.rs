//! Verifying chunks of the disk cache by pieces. Where digests are of pieces that reach across chunks, a cached chunk can only be
//! verified together with its neighbours. In: a chunk that the disk cache has. Out: the chunk, if all pieces that lie in it are right.
//!
//! A piece is verified by its own digest, whatever the cache's map says of the chunks that they reach into. That is why in the end also that
//! is left in the data file which came of chunks that did not become whole.

use std::rc::Rc;
use std::sync::Arc;

use super::disk::NOT_AS_WRITTEN;
use super::{Engine, LayerState};
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::cache::disk::LayerCache;
use crate::fetch::Verifier;
use crate::fetch::runtime::{self, File};
use crate::index::PieceDigests;
use crate::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange, len_usize};

/// Why a cached chunk cannot be used.
enum CachedFault {
    /// Not all of its pieces are there.
    Incomplete,
    /// They are, and are something else.
    Unreadable(String),
}

impl Engine {
    /// Delivers a chunk of the disk cache if its pieces match; else it is fetched again.
    pub(super) async fn deliver_verified_pieces(
        self: Rc<Self>,
        state: &Rc<LayerState>,
        pieces: &PieceDigests,
        key: ChunkKey,
    ) {
        match self.read_verified_pieces(state, pieces, key).await {
            Ok(bytes) => return self.deliver(key, bytes, false),
            Err(CachedFault::Unreadable(why)) => self.drop_cached(state, key, &why),
            Err(CachedFault::Incomplete) => {
                if let Some(cache) = self.cache(key.layer) {
                    cache.lost(key.index);
                }
            }
        }
        self.fetch_again(key);
    }

    async fn read_verified_pieces(
        &self,
        state: &Rc<LayerState>,
        pieces: &PieceDigests,
        key: ChunkKey,
    ) -> Result<Vec<u8>, CachedFault> {
        // Neighbours are asked for at the same time and lie in the same pieces: the first one proves them for all.
        let _one_at_a_time = state.verifying_pieces.lock().await;
        let cache = self.cache(key.layer).ok_or(CachedFault::Incomplete)?;
        let chunk = |index| TarRange::new(ChunkKey { index, ..key }.start(), chunk_len(state.size, index));
        let own = chunk(key.index);
        let one = |index: u32| cache.find(index, index.saturating_add(1));
        let place = one(key.index).ok_or(CachedFault::Incomplete)?;
        let read = async |range: TarRange| {
            let file = cache.file_of(key.index);
            match file {
                Ok(file) => {
                    File::from(file)
                        .read_exact_at(range.start.0, len_usize(range.len))
                        .await
                }
                Err(error) => Err(error),
            }
            .map_err(|error| CachedFault::Unreadable(error.to_string()))
        };
        if self.is_verified(key) {
            let bytes = read(own).await?;
            cache.touch(key.index);
            if cache.matches(key.index, &bytes) {
                return Ok(bytes);
            }
            return Err(CachedFault::Unreadable(NOT_AS_WRITTEN.to_owned()));
        }
        let wide = pieces.widened(own);
        let bytes = read(wide).await?;
        self.count_verified(state);
        let permit = self.workers.clone().acquire_owned().await.ok();
        let job = {
            let pieces = pieces.clone();
            runtime::blocking(move || {
                let _permit = permit;
                verify_pieces(&pieces, own, wide, &bytes)
            })
        };
        match job.await {
            Ok(Ok(bytes)) => {
                // Only what lies in the file that was read.
                let (first, last) = (wide.start.0 / CHUNK_BYTES, wide.end().0.div_ceil(CHUNK_BYTES));
                for index in (first..last).filter_map(|index| u32::try_from(index).ok()) {
                    let all = pieces.widened(chunk(index));
                    if all.start >= wide.start && all.end() <= wide.end() && one(index) == Some(place) {
                        self.mark_verified(ChunkKey { index, ..key });
                    }
                }
                Ok(bytes)
            }
            Ok(Err(wrong)) => {
                let first = u32::try_from(wrong.start.0 / CHUNK_BYTES).unwrap_or(u32::MAX);
                let end = u32::try_from(wrong.end().0.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX);
                Err(match cache.find(first, end) {
                    Some(_) => CachedFault::Unreadable("it is not what the layer's table of contents says".to_owned()),
                    None => CachedFault::Incomplete,
                })
            }
            Err(error) => Err(CachedFault::Unreadable(error.to_string())),
        }
    }

    /// Leaves what has come of chunks that did not become whole where their pieces can be proven later. Only when nothing else is
    /// written any more, not by another device either: whole chunks may go past the page cache, and must not meet an older page
    /// of theirs there.
    pub(super) async fn write_parts(&self) {
        for (layer, state) in (0..).map(LayerId).zip(&self.layers) {
            let has_room = |cache: &&Arc<LayerCache>| cache.takes_more() && !cache.is_poisoned();
            let (Some(state), Some(cache), Some(shared)) =
                (state, self.cache(layer).filter(has_room), self.fetched(layer))
            else {
                continue;
            };
            let pieces = state.verifier.as_ref().and_then(Verifier::pieces);
            let (Some(coded), Some(_)) = (&state.coded, pieces) else {
                continue;
            };
            let mut parts = coded.take_parts();
            parts.retain(|(at, _)| !cache.has(ChunkKey::holding(layer, TarOffset(*at)).index));
            let if_alone = shared.content.if_alone();
            let cache = Arc::clone(cache);
            let job = runtime::blocking(move || {
                let mut written = Ok(());
                // What is not there is fetched again.
                if_alone(&mut || written = parts.iter().try_for_each(|(at, bytes)| cache.write_part(*at, bytes)));
                written
            });
            if let Ok(Err(error)) = job.await {
                log::debug!("{}: parts of chunks are not kept: {error}", state.origin.name());
            }
        }
    }
}

/// The chunk at `own` if all pieces in it are right, with zeros between them; else the first one that is not. `bytes` lie at
/// `wide`, which has all of them.
fn verify_pieces(pieces: &PieceDigests, own: TarRange, wide: TarRange, bytes: &[u8]) -> Result<Vec<u8>, TarRange> {
    let part = |range: TarRange| {
        let from = len_usize(range.start.since(wide.start));
        bytes.get(from..)?.get(..len_usize(range.len))
    };
    let mut chunk = vec![0; len_usize(own.len)];
    for n in pieces.overlapping(own) {
        let range = pieces.range(n);
        if pieces.is_known(n) && !part(range).is_some_and(|bytes| pieces.check(n, bytes)) {
            return Err(range);
        }
        let (start, end) = (range.start.max(own.start), range.end().min(own.end()));
        let common = TarRange::new(start, end.since(start));
        let to = len_usize(start.since(own.start));
        if let (Some(from), Some(to)) = (part(common), chunk.get_mut(to..to + len_usize(common.len))) {
            to.copy_from_slice(from);
        }
    }
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn a_chunk_is_proven_by_its_pieces_alone() {
        let content = vec![7_u8; 100_000];
        let piece = |start: usize, len: usize| {
            let range = TarRange::new(TarOffset(start.try_into().unwrap()), len.try_into().unwrap());
            (range, Some(Sha256::digest(&content[start..start + len]).into()))
        };
        let pieces =
            PieceDigests::new(100_000, [piece(10, 40_000), piece(40_100, 20_000), piece(65_000, 900)]).unwrap();
        let own = TarRange::new(TarOffset(CHUNK_BYTES), CHUNK_BYTES);
        let wide = pieces.widened(own);
        assert_eq!((wide.start.0, wide.end().0), (10, 65_900));
        let mut bytes = content[10..65_900].to_vec();
        let chunk = verify_pieces(&pieces, own, wide, &bytes).unwrap();
        let expected: Vec<u8> = (32_768..65_536)
            .map(|at| {
                if (40_010..40_100).contains(&at) || (60_100..65_000).contains(&at) {
                    0
                } else {
                    7
                }
            })
            .collect();
        assert!(chunk == expected);
        // Between the pieces anything may lie; in them, or in what of them lies in other chunks, nothing else.
        bytes[40_020] = 1;
        assert!(verify_pieces(&pieces, own, wide, &bytes).unwrap() == expected);
        for (at, first) in [(0, 10), (39_999, 10), (40_090, 40_100), (65_889, 65_000)] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(verify_pieces(&pieces, own, wide, &bad).unwrap_err().start.0, first);
        }
    }
}
