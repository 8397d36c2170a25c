//! The history that a decoder needs to begin in the middle. In: a span's number. Out: its window, from memory, from a local
//! index file or from the cold part of an index behind HTTP. Whatever a local file holds is checked against the hot part before
//! it is used: where it has a hole, the registry is asked.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Engine;
use super::origin::{Origin, Trouble};
use crate::cache::chunk::Chunk;
use crate::cache::memory::MemoryLayer;
use crate::fetch::runtime;
use crate::fetch::stats::add;
use crate::fetch::{StartError, Windows};
use crate::index::{ColdDirectory, ColdPart, ColdPiece};
use crate::layer::{Coding, SpanTable};
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// The longest that is kept of a window: gzip's have 32 KiB, and of a zstd frame's the extents that matter are a piece of the index.
const LONGEST: u32 = 1 << 20;

/// So many bytes of an index are read at once where one window is missing: those of the next spans come along, which are wanted next as
/// often as not, and are short.
const AT_ONCE: u64 = 48 << 10;

enum Place {
    Nowhere,
    Memory(Arc<Vec<Vec<u8>>>),
    Index(Box<Origin>, ColdDirectory),
    /// A file with holes, and where the whole is.
    Kept(Box<[Origin; 2]>, ColdDirectory),
}

/// An index in a file.
fn local(file: &Arc<OwnedFd>) -> Result<Origin, StartError> {
    let own = file.try_clone().map_err(StartError::Thread)?;
    Ok(Origin::file("the index".into(), own.into()))
}

/// The windows of one layer.
pub(super) struct WindowShelf {
    place: Place,
    /// The part of an index that has them.
    part: ColdPart,
    /// In the memory cache, as chunks of a layer of their own.
    kept: MemoryLayer,
}

impl WindowShelf {
    /// Of a layer that is compressed so. Windows that were read are kept in `kept`.
    pub(super) fn new(coding: Coding, windows: Windows, kept: MemoryLayer) -> Result<Self, StartError> {
        let place = match windows {
            Windows::None => Place::Nowhere,
            Windows::Memory(windows) => Place::Memory(windows),
            Windows::File(file, directory) => Place::Index(Box::new(local(&file)?), directory),
            Windows::Remote(blob, directory) => Place::Index(Box::new(Origin::remote(&blob)?), directory),
            Windows::Kept(file, blob, directory) => {
                let origins = [local(&file)?, Origin::remote(&blob)?];
                Place::Kept(Box::new(origins), directory)
            }
        };
        Ok(Self {
            place,
            part: ColdPart::windows_of(coding),
            kept,
        })
    }

    /// Window `n` may be damaged: it is read again the next time.
    pub(super) fn forget(&self, n: usize) {
        if let Ok(index) = u32::try_from(n) {
            self.kept.forget(index);
        }
    }

    fn find(&self, n: usize) -> Option<Vec<u8>> {
        let kept = self.kept.get(u32::try_from(n).ok()?)?;
        kept.touch();
        Some(kept.bytes().to_vec())
    }

    /// Adds the windows that lie behind the missing ones, as far as one request is to reach.
    fn add_next(&self, missing: &mut Vec<(usize, ColdPiece)>, directory: &ColdDirectory, table: &SpanTable) {
        let Some((start, last)) = missing
            .first()
            .zip(missing.last())
            .map(|((_, first), (n, _))| (first.range.start, *n))
        else {
            return;
        };
        for n in last + 1..table.len() {
            if table.span(n).window == 0 {
                continue;
            }
            let piece = piece_of(directory, self.part, n, LONGEST).ok();
            let near = piece.filter(|piece| piece.range.start >= start && piece.range.end - start <= AT_ONCE);
            match near {
                Some(piece) if self.find(n).is_none() => missing.push((n, piece)),
                _ => return,
            }
        }
    }

    fn keep(&self, n: usize, window: &[u8]) {
        // What is longer than a chunk would break the cache's bound.
        if let Ok(index) = u32::try_from(n)
            && len_u64(window.len()) <= CHUNK_BYTES
        {
            self.kept.insert(index, Arc::new(Chunk::new(window.to_vec())), false);
        }
    }
}

/// Where window `n` lies in the index, or what is wrong with that.
fn piece_of(directory: &ColdDirectory, part: ColdPart, n: usize, longest: u32) -> Result<ColdPiece, &'static str> {
    let piece = directory.piece(part, n);
    let piece = piece.filter(|piece| !piece.range.is_empty()).ok_or("is missing")?;
    // A frame of what does not compress is a little longer than that.
    if piece.range.end - piece.range.start > u64::from(longest.saturating_add(longest / 8 + 1024)) {
        return Err("is stored in more bytes than it can need");
    }
    Ok(piece)
}

/// Puts what was fetched where it is looked for the next time. Without it everything goes on.
async fn keep_frame(file: &Origin, at: u64, frame: Vec<u8>) {
    let Origin::File { file, .. } = file else { return };
    let written = match file.try_clone() {
        Ok(own) => runtime::File::from(own).write_all_at(at, frame).await,
        Err(error) => Err(error),
    };
    if let Err(error) = written {
        log::debug!("a decoder window is not kept: {error}");
    }
}

/// Window `n` of the index, of which something is wrong.
fn wrong(n: usize, why: &str) -> Trouble {
    Trouble::Wrong(format!("decoder window {n} of the index {why}"))
}

impl Engine {
    /// The windows of these spans of a layer's table, in order. What is not at hand is asked for in one request: in an index they lie side by side.
    pub(super) async fn windows(
        &self,
        source: &WindowShelf,
        table: &SpanTable,
        spans: Range<usize>,
        demand: bool,
    ) -> Result<Vec<Vec<u8>>, Trouble> {
        let mut windows = Vec::with_capacity(spans.len());
        let mut missing = Vec::new();
        for n in spans.clone() {
            // Of a gzip member's window all is kept, of a zstd frame's what matters.
            let longest = match (source.part, table.span(n).window) {
                (_, 0) => {
                    windows.push(Vec::new());
                    continue;
                }
                (ColdPart::Windows, len) => len,
                _ => LONGEST,
            };
            let (here, place) = match &source.place {
                Place::Nowhere => return Err(wrong(n, "is missing")),
                Place::Memory(all) => (all.get(n).cloned(), None),
                Place::Index(_, directory) | Place::Kept(_, directory) => (source.find(n), Some(directory)),
            };
            if let Some(directory) = place.filter(|_| here.is_none()) {
                let piece = piece_of(directory, source.part, n, longest).map_err(|why| wrong(n, why))?;
                missing.push((n, piece));
            }
            windows.push(here.unwrap_or_default());
        }
        if let Place::Index(_, directory) | Place::Kept(_, directory) = &source.place {
            source.add_next(&mut missing, directory, table);
        }
        for (n, window) in self.read_windows(source, missing, demand).await? {
            source.keep(n, &window);
            if let Some(place) = n.checked_sub(spans.start).and_then(|at| windows.get_mut(at)) {
                *place = window;
            }
        }
        Ok(windows)
    }

    /// Reads windows from the index, those that come first in it first.
    async fn read_windows(
        &self,
        source: &WindowShelf,
        mut missing: Vec<(usize, ColdPiece)>,
        demand: bool,
    ) -> Result<Vec<(usize, Vec<u8>)>, Trouble> {
        let mut found = Vec::with_capacity(missing.len());
        let (origin, file) = match &source.place {
            Place::Nowhere | Place::Memory(_) => return Ok(found),
            Place::Index(origin, _) => (&**origin, None),
            Place::Kept(origins, _) => {
                let [file, rest] = &**origins;
                if let Ok(frames) = self.frames(file, &missing, demand).await {
                    let mut frames = frames.into_iter();
                    missing.retain(|(n, piece)| {
                        let window = frames.next().and_then(|frame| piece.open(&frame).ok());
                        let is_here = window.is_some();
                        found.extend(window.map(|window| (*n, window)));
                        !is_here
                    });
                }
                (rest, Some(file))
            }
        };
        let frames = self.frames(origin, &missing, demand).await?;
        for ((n, piece), frame) in missing.into_iter().zip(frames) {
            let window = piece.open(&frame).map_err(|_| wrong(n, "is damaged"))?;
            if let Some(file) = file {
                keep_frame(file, piece.range.start, frame).await;
            }
            found.push((n, window));
        }
        Ok(found)
    }

    /// The bytes of these pieces, by one request for all that lies between the first and the last.
    async fn frames(
        &self,
        origin: &Origin,
        pieces: &[(usize, ColdPiece)],
        demand: bool,
    ) -> Result<Vec<Vec<u8>>, Trouble> {
        let starts = pieces.iter().map(|(_, piece)| piece.range.start);
        let ends = pieces.iter().map(|(_, piece)| piece.range.end);
        let Some((start, end)) = starts.min().zip(ends.max()) else {
            return Ok(Vec::new());
        };
        let len = len_usize(end - start);
        let mut body = origin.get(&self.client, start, end - start, demand).await?;
        let mut skip = if body.is_whole() { start } else { 0 };
        let mut bytes = Vec::with_capacity(len);
        while let Some(piece) = body.next().await? {
            if body.head_took().is_some() {
                add(&self.counters.bytes_fetched, len_u64(piece.len()));
            }
            let skipped = len_usize(skip).min(piece.len());
            skip -= len_u64(skipped);
            let piece = &piece[skipped..];
            bytes.extend_from_slice(&piece[..piece.len().min(len - bytes.len())]);
            if bytes.len() == len && body.is_whole() {
                break;
            }
        }
        let cut = |range: &Range<u64>| bytes.get(len_usize(range.start - start)..len_usize(range.end - start));
        let all = pieces.iter();
        Ok(all
            .map(|(_, piece)| cut(&piece.range).unwrap_or_default().to_vec())
            .collect())
    }
}
