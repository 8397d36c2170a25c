//! The state of a layer on the fetch thread. In: what the fetcher was told of it. Out: that in two halves, one of which every thread
//! may look at.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use tokio::time::Instant;

use super::coded_layer::CodedLayer;
use super::origin::Origin;
use super::write_queue::WriteQueue;
use crate::cache::chunk::chunk_count;
use crate::cache::disk::{DiskCache, LayerCache};
use crate::cache::memory::MemoryLayer;
use crate::fetch::content::Contents;
use crate::fetch::shared::{FetchedLayer, SharedLayer};
use crate::fetch::transport::{HostKey, RemoteLayer};
use crate::fetch::{LayerSource, StartError, UnprovenIndex, Verifier, WholeDigests};
use crate::http::Reach;
use crate::layer::Coding;
use crate::prefetch::ChunkRange;
use crate::source::Place;
use crate::units::{LayerId, TarOffset, TarRange};

/// A layer that has to be brought, as the fetch thread sees it.
pub(super) struct LayerState {
    pub(super) origin: Origin,
    /// The server that is asked first; none for a file.
    pub(super) server: Option<Rc<HostKey>>,
    /// The tar's length.
    pub(super) size: u64,
    /// None: the blob is the tar.
    pub(super) coded: Option<Rc<CodedLayer>>,
    pub(super) verifier: Option<Verifier>,
    pub(super) whole: WholeDigests,
    /// Its index, as long as nothing but somebody's word stands for it.
    pub(super) unproven: RefCell<Option<UnprovenIndex>>,
    pub(super) writer: WriteQueue,
    /// Whether the layer is being read from end to end.
    pub(super) streaming: Cell<bool>,
    /// How far that has come, in bytes of the blob...
    pub(super) streamed_to: Cell<u64>,
    /// ...and when it last came further.
    pub(super) streamed_at: Cell<Instant>,
    /// Whether that has ended well: what comes out of the blob is what it has to be.
    pub(super) whole_verified: Cell<bool>,
    /// Whether what the disk cache holds is being digested.
    pub(super) verifying_whole: Cell<bool>,
    /// Whether it is being protected, or is about to be.
    pub(super) protecting: Cell<bool>,
    pub(super) warned: Cell<bool>,
    /// Whether it was said that its cache is damaged.
    pub(super) told_damage: Cell<bool>,
    /// Chunks that are being checked.
    pub(super) verifying: RefCell<HashSet<u32>>,
    /// Chunks that came wrong and have not come right since.
    pub(super) mismatched: RefCell<HashMap<u32, Mismatch>>,
    /// Held while pieces of the disk cache are verified: neighbours ask for the same ones at the same time.
    pub(super) verifying_pieces: tokio::sync::Mutex<()>,
}

impl LayerState {
    pub(super) fn new(taken: TakenLayer) -> Result<Self, StartError> {
        let TakenLayer { source, file, windows } = taken;
        let size = source.size();
        let origin = match file {
            Some((path, file)) => Origin::file(path, file),
            None => Origin::remote(&source.layer.blob)?,
        };
        let server = match &origin {
            Origin::Http(layer) => layer.first_host(),
            Origin::File { .. } => None,
        };
        let server = server.and_then(|(url, trust)| HostKey::of(&url, &trust, Reach::Anywhere));
        // What decodes wrong inside of a zstd frame is told from what decodes right by digests alone.
        let is_checked = source.verifier.is_some();
        let coding = source.coding.map(|mut coded| {
            if !is_checked {
                coded.table = coded.table.without_blocks();
            }
            coded
        });
        Ok(Self {
            origin,
            server: server.map(Rc::new),
            size,
            coded: coding
                .map(|coded| CodedLayer::new(coded, windows))
                .transpose()?
                .map(Rc::new),
            whole: WholeDigests::of(&source.layer),
            verifier: source.verifier,
            unproven: RefCell::new(source.unproven),
            writer: WriteQueue::default(),
            streaming: Cell::new(false),
            streamed_to: Cell::new(0),
            streamed_at: Cell::new(Instant::now()),
            whole_verified: Cell::new(false),
            verifying_whole: Cell::new(false),
            protecting: Cell::new(false),
            warned: Cell::new(false),
            told_damage: Cell::new(false),
            verifying: RefCell::default(),
            mismatched: RefCell::default(),
            verifying_pieces: tokio::sync::Mutex::default(),
        })
    }

    pub(super) fn is_local(&self) -> bool {
        matches!(self.origin, Origin::File { .. })
    }

    /// Whether a read can do without what lies before it.
    pub(super) fn can_seek(&self) -> bool {
        self.coded.as_ref().is_none_or(|coded| coded.can_seek())
    }

    /// Whether tar space is the tar, byte for byte, so that its digest means something.
    pub(super) fn is_whole_tar(&self) -> bool {
        self.coded.as_ref().is_none_or(|coded| coded.table.is_whole_tar())
    }

    /// How far to decode so that everything before `end` can be checked.
    pub(super) fn checked_end(&self, end: TarOffset) -> TarOffset {
        let last = TarRange::new(TarOffset(end.0.saturating_sub(1)), 1);
        self.verifier
            .as_ref()
            .map_or(end, |check| check.widened(last).end().max(end))
    }

    /// The blob's length.
    pub(super) fn blob_size(&self) -> u64 {
        self.coded.as_ref().map_or(self.size, |coded| coded.table.blob_len())
    }

    /// The blob's bytes have come up to `to`, read from end to end: again, or for the first time.
    pub(super) fn note_streamed(&self, to: u64) {
        if to > self.streamed_to.get() {
            self.streamed_to.set(to);
            self.streamed_at.set(Instant::now());
        }
    }

    /// All its chunks.
    pub(super) fn all(&self, layer: LayerId) -> ChunkRange {
        ChunkRange {
            layer,
            first: 0,
            end: chunk_count(self.size).unwrap_or(u32::MAX),
        }
    }
}

/// A chunk that came wrong and has not come right since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mismatch {
    /// When it came wrong first.
    pub(super) since: Instant,
    /// How many answers had it wrong.
    pub(super) answers: u32,
}

impl Mismatch {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, answers: 0 }
    }
}

/// A layer that has to be fetched, on its way to the fetch thread.
pub(super) struct TakenLayer {
    source: LayerSource,
    /// Its blob, if it is a file of this machine: its path, and the file, open.
    file: Option<(PathBuf, File)>,
    /// Room in memory for its decoder windows.
    windows: MemoryLayer,
}

/// What both sides see of a layer, and what the fetch thread has to know if it has to be fetched. Files are opened here, once:
/// later they may be out of reach.
pub(super) fn take_in(
    layer: usize,
    mut source: LayerSource,
    contents: &Contents,
    store: Option<&Arc<DiskCache>>,
) -> Result<(SharedLayer, Option<TakenLayer>), StartError> {
    let size = source.size();
    if chunk_count(size).is_none() {
        return Err(StartError::TooLong { layer, size });
    }
    if let Some(coded) = &source.coding {
        let (said, found) = (coded.table.blob_len(), source.layer.blob.len);
        if said != found {
            return Err(StartError::OtherBlob { layer, said, found });
        }
        if coded.table.coding() == Coding::Plain {
            source.coding = None;
        }
    }
    let mut file = match &source.layer.blob.place {
        Place::File(local) => Some((local.path.clone(), local.open()?)),
        Place::Url(_) | Place::Registry(_) => {
            // Checked here, made again on the thread: what lives there cannot move between threads.
            RemoteLayer::new(&source.layer.blob)?;
            None
        }
    };
    if let Some((path, file)) = file.take_if(|_| source.coding.is_none() && source.verifier.is_none()) {
        let file = file.into();
        return Ok((SharedLayer::Local { path, file, size }, None));
    }
    let fetched = FetchedLayer::new(size, contents.of(&source, store));
    if let Some((_, file)) = file.as_ref().filter(|_| source.coding.is_none()) {
        let own = file.try_clone()?;
        // It was empty: a plain file's content is not shared.
        drop(fetched.content.cache.set(Arc::new(LayerCache::borrowed(own, size))));
    }
    let spans = source.coding.as_ref().map_or(0, |coded| coded.table.len());
    let windows = contents.room_for(u32::try_from(spans).unwrap_or(u32::MAX));
    Ok((
        SharedLayer::Fetched(fetched),
        Some(TakenLayer { source, file, windows }),
    ))
}
