//! The history that a decoder needs to begin in the middle. In: a span's number. Out: its window, from memory, from a local
//! index file or from the cold part of an index behind HTTP. Whatever a local file holds is checked against the hot part before
//! it is used: where it has a hole, the registry is asked.

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
use crate::units::{CHUNK_BYTES, len_u64, len_usize};

/// No window is longer: gzip's have 32 KiB, and no more than zstd's usual 8 MiB is taken.
const LONGEST: u32 = 8 << 20;

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
    /// In the memory cache, as chunks of a layer of their own.
    kept: MemoryLayer,
}

impl WindowShelf {
    /// Windows that were read are kept in `kept`.
    pub(super) fn new(windows: Windows, kept: MemoryLayer) -> Result<Self, StartError> {
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
        Ok(Self { place, kept })
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

    fn keep(&self, n: usize, window: &[u8]) {
        // What is longer than a chunk would break the cache's bound.
        if let Ok(index) = u32::try_from(n)
            && len_u64(window.len()) <= CHUNK_BYTES
        {
            drop(self.kept.insert(index, Arc::new(Chunk::demanded(window.to_vec()))));
        }
    }
}

/// Where window `n` of `len` bytes lies in the index, or what is wrong with that.
fn piece_of(directory: &ColdDirectory, n: usize, len: u32) -> Result<ColdPiece, &'static str> {
    let piece = directory.piece(ColdPart::Windows, n);
    let piece = piece.filter(|piece| !piece.range.is_empty()).ok_or("is missing")?;
    // A frame of what does not compress is a little longer than that.
    if piece.range.end - piece.range.start > u64::from(len.saturating_add(len / 8 + 1024)) {
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

impl Engine {
    /// Window `n`, which has `len` bytes.
    pub(super) async fn window(
        &self,
        windows: &WindowShelf,
        n: usize,
        len: u32,
        demand: bool,
    ) -> Result<Vec<u8>, Trouble> {
        let wrong = |why: &str| Trouble::Wrong(format!("decoder window {n} of the index {why}"));
        if len == 0 {
            return Ok(Vec::new());
        }
        if len > LONGEST {
            return Err(wrong("is longer than any this version decodes with (8 MiB)"));
        }
        if let Some(window) = windows.find(n) {
            return Ok(window);
        }
        let window = match &windows.place {
            Place::Nowhere => return Err(wrong("is missing")),
            Place::Memory(all) => all.get(n).cloned().unwrap_or_default(),
            Place::Index(origin, directory) => {
                let piece = piece_of(directory, n, len).map_err(wrong)?;
                let frame = self.frame(origin, &piece, demand).await?;
                piece.open(&frame).map_err(|_| wrong("is damaged"))?
            }
            Place::Kept(origins, directory) => {
                let [file, rest] = &**origins;
                let piece = piece_of(directory, n, len).map_err(wrong)?;
                let here = self.frame(file, &piece, demand).await.ok();
                if let Some(window) = here.and_then(|frame| piece.open(&frame).ok()) {
                    window
                } else {
                    let frame = self.frame(rest, &piece, demand).await?;
                    let window = piece.open(&frame).map_err(|_| wrong("is damaged"))?;
                    keep_frame(file, piece.range.start, frame).await;
                    window
                }
            }
        };
        if len_u64(window.len()) != u64::from(len) {
            return Err(wrong("has another length than the span table says"));
        }
        if !matches!(windows.place, Place::Memory(_)) {
            windows.keep(n, &window);
        }
        Ok(window)
    }

    async fn frame(&self, origin: &Origin, piece: &ColdPiece, demand: bool) -> Result<Vec<u8>, Trouble> {
        let (start, stored) = (piece.range.start, piece.range.end - piece.range.start);
        let len = len_usize(stored);
        let mut body = origin.get(&self.client, start, stored, demand).await?;
        let mut skip = if body.is_whole() { start } else { 0 };
        let mut frame = Vec::with_capacity(len);
        while let Some(piece) = body.next().await? {
            if body.head_took().is_some() {
                add(&self.counters.bytes_fetched, len_u64(piece.len()));
            }
            let skipped = len_usize(skip).min(piece.len());
            skip -= len_u64(skipped);
            let piece = &piece[skipped..];
            frame.extend_from_slice(&piece[..piece.len().min(len - frame.len())]);
            if frame.len() == len && body.is_whole() {
                break;
            }
        }
        Ok(frame)
    }
}
