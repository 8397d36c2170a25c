//! A layer as the fetch thread sees it. In: what the fetcher was told of it. Out: that in two halves, one of which every thread
//! may look at.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use super::coded::CodedLayer;
use super::disk::Writer;
use super::origin::Origin;
use crate::cache::chunk::chunk_count;
use crate::cache::disk::{DiskCache, DiskCacheError, LayerCache, LayerKey};
use crate::fetch::shared::{FetchedLayer, SharedLayer};
use crate::fetch::transport::RemoteLayer;
use crate::fetch::{Blob, FetchOptions, LayerSource, StartError, Verifier, WholeDigests};
use crate::layer::Coding;
use crate::prefetch::ChunkRange;
use crate::units::{LayerId, TarOffset, TarRange};

/// A layer that has to be brought, as the fetch thread sees it.
pub(super) struct LayerState {
    pub(super) origin: Origin,
    /// The tar's length.
    pub(super) size: u64,
    /// None: the blob is the tar.
    pub(super) coded: Option<Rc<CodedLayer>>,
    pub(super) verifier: Option<Verifier>,
    pub(super) whole: WholeDigests,
    pub(super) writer: Writer,
    /// Whether the layer is being read from end to end.
    pub(super) streaming: Cell<bool>,
    /// Whether that has ended well: what comes out of the blob is what it has to be.
    pub(super) whole_verified: Cell<bool>,
    /// Whether what the store holds is being digested.
    pub(super) verifying_whole: Cell<bool>,
    pub(super) warned: Cell<bool>,
    /// Chunks that are being checked, and chunks that were wrong once.
    pub(super) verifying: RefCell<HashSet<u32>>,
    pub(super) mismatched: RefCell<HashSet<u32>>,
    /// Held by who proves what comes back from the store, which is done once.
    pub(super) verifying_pieces: tokio::sync::Mutex<()>,
}

impl LayerState {
    pub(super) fn new(source: LayerSource) -> Result<Self, StartError> {
        let size = source.size();
        Ok(Self {
            origin: Origin::new(source.blob)?,
            size,
            coded: source.coding.map(CodedLayer::new).transpose()?.map(Rc::new),
            verifier: source.digests,
            whole: source.whole,
            writer: Writer::default(),
            streaming: Cell::new(false),
            whole_verified: Cell::new(false),
            verifying_whole: Cell::new(false),
            warned: Cell::new(false),
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
        self.coded.as_ref().is_none_or(|coded| coded.table.seekable())
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

    /// All its chunks.
    pub(super) fn all(&self, layer: LayerId) -> ChunkRange {
        ChunkRange {
            layer,
            first: 0,
            end: chunk_count(self.size).unwrap_or(u32::MAX),
        }
    }
}

/// The cache of a layer, under the best name that it has. A layer on a server that says neither a digest nor a validator gets one
/// that goes with the process.
fn cache_of(store: &DiskCache, source: &LayerSource) -> Result<Arc<LayerCache>, DiskCacheError> {
    let size = source.size();
    let key = match (&source.identity, &source.blob) {
        (Some(identity), _) => Some(LayerKey::of_content(identity, size)),
        (None, Blob::Http(http)) => http.cache_key().map(|key| match source.coding {
            None => key,
            Some(_) => key.of_decoded(size),
        }),
        (None, Blob::File(_)) => None,
    };
    match key {
        Some(key) => store.layer(key, size),
        None => store.unnamed(size),
    }
}

/// What both sides see of a layer, and what the fetch thread has to know if it has to be brought.
pub(super) fn take_in(
    layer: usize,
    mut source: LayerSource,
    options: &FetchOptions,
) -> Result<(SharedLayer, Option<LayerSource>), StartError> {
    let size = source.size();
    if chunk_count(size).is_none() {
        return Err(StartError::TooLong { layer, size });
    }
    if let Some(coded) = &source.coding {
        let (said, found) = (coded.table.blob_len(), source.blob.size());
        if said != found {
            return Err(StartError::OtherBlob { layer, said, found });
        }
        if coded.table.coding() == Coding::Plain {
            source.coding = None;
        }
    }
    let as_it_is = source.coding.is_none() && source.digests.is_none();
    let brought = FetchedLayer::new(size, source.digests.is_some());
    match &source.blob {
        Blob::File(_) if as_it_is => {
            let Blob::File(local) = source.blob else {
                unreachable!("it is a file")
            };
            let shared = SharedLayer::Local {
                path: local.path,
                file: local.file,
                size,
            };
            return Ok((shared, None));
        }
        Blob::File(local) if source.coding.is_none() => {
            let own = local.file.try_clone()?;
            // It was empty: nobody else has it yet.
            drop(brought.cache.set(Arc::new(LayerCache::borrowed(own.into(), size))));
        }
        blob => {
            if let Blob::Http(http) = blob {
                // Checked here, made again on the thread: what lives there cannot move between threads.
                RemoteLayer::new(http)?;
            }
            if let Some(store) = &options.store {
                match cache_of(store, &source) {
                    Ok(found) => drop(brought.cache.set(found)),
                    Err(error) => log::warn!("{error}; going on without a cache"),
                }
            }
        }
    }
    Ok((SharedLayer::Fetched(brought), Some(source)))
}
