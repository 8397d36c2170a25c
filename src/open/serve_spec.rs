//! What a process must know to serve what another one prepared. In: prepared layers. Out: a [`ImageSpec`] that goes through a
//! pipe; from it, in the process that serves, the image and the fetcher.
//!
//! A spec may hold secrets (credentials, signed addresses): it never goes into a file, and its `Debug` shows none.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::index_cache::read_hot;
use super::{Cache, OpenError, Prepared, image_of, is_full, open_index};
use crate::cache::disk::DiskCache;
use crate::fetch::{self, Coded, FetchOptions, FetchStats, Fetcher, LayerSource, PrepareCost, Verifier, Windows};
use crate::image::ext4::Ext4Image;
use crate::image::{BlockImage, FileMap};
use crate::index::{ColdPart, Index};
use crate::source::{Blob, LayerSpec, Place};
use crate::tree::TreeMode;

/// How served layers' bytes are fetched.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetching {
    /// The most bytes that the memory cache holds.
    pub memory_bytes: u64,
    /// Connections per host at most.
    pub connections: u16,
    /// Whether all of the layers is fetched into the disk cache in the end, while there are no reads.
    pub fetch_all: bool,
    /// How long a read may wait before it fails; for ever if none.
    pub deadline: Option<Duration>,
    /// The disk space that fetched bytes of all layers may take; layers unused longest go first, when a layer is opened.
    pub store_bytes: u64,
}

/// Everything that a process must know to serve layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// The image's or layer's name for messages, without secrets.
    name: String,
    layers: Vec<ServedLayer>,
    /// How the layers become one tree.
    tree: TreeMode,
    /// Where fetched bytes are kept.
    store: Option<PathBuf>,
    fetching: Fetching,
    /// What preparing the layers downloaded.
    cost: PrepareCost,
}

/// A layer to be served, and where its index is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServedLayer {
    layer: LayerSpec,
    index: IndexFile,
}

/// An index file that another process wrote for this one to read.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexFile {
    path: PathBuf,
    /// Whether it was written for this spec alone, so that its reader removes it.
    lent: bool,
    /// Where the rest of the index is, if the file holds its hot part alone.
    rest: Option<Blob>,
}

/// Layers as an image and the bytes behind it.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The image.
    pub image: Arc<dyn BlockImage>,
    /// The bytes of its layers.
    pub fetcher: Fetcher,
    /// What preparing the layers downloaded.
    pub cost: PrepareCost,
}

impl Opened {
    /// What the fetcher has counted, and what was downloaded before it.
    #[must_use]
    pub fn stats(&self) -> FetchStats {
        FetchStats {
            prepared: self.cost.clone(),
            ..self.fetcher.stats()
        }
    }
}

impl Prepared {
    /// What another process needs to serve this. `lending` is where indexes may be put for it that are not in the cache; the
    /// process removes them from there.
    ///
    /// # Errors
    /// [`OpenError::Cache`] when they cannot be put there.
    pub fn image_spec(&self, lending: &Path, fetching: Fetching) -> Result<ImageSpec, OpenError> {
        let mut spec = ImageSpec {
            name: self.name.clone(),
            layers: Vec::new(),
            tree: self.mode,
            store: self.cache.as_ref().map(Cache::layers),
            fetching,
            cost: self.cost.clone(),
        };
        for layer in &self.layers {
            let lent = match &layer.kept {
                Some(path) => Ok((path.clone(), false)),
                None => lend(lending, layer.index.as_bytes()).map(|path| (path, true)),
            };
            let (index, borrowed) = lent.inspect_err(|_| spec.take_back())?;
            spec.layers.push(ServedLayer {
                layer: layer.layer.clone(),
                index: IndexFile {
                    path: index,
                    lent: borrowed,
                    rest: layer.rest.clone(),
                },
            });
        }
        Ok(spec)
    }
}

/// Puts an index where another process finds it.
fn lend(dir: &Path, index: &[u8]) -> Result<PathBuf, OpenError> {
    let failed = |cause| OpenError::Cache {
        path: dir.to_owned(),
        cause,
    };
    let mut file = tempfile::Builder::new()
        .prefix("index-")
        .suffix(".tarblk")
        .tempfile_in(dir)
        .map_err(failed)?;
    file.write_all(index).map_err(failed)?;
    let (_, path) = file.keep().map_err(|error| failed(error.error))?;
    Ok(path)
}

impl ImageSpec {
    /// The index files that were made for the spec's reader alone.
    pub fn lent(&self) -> impl Iterator<Item = &Path> {
        let lent = self.layers.iter().filter(|layer| layer.index.lent);
        lent.map(|layer| layer.index.path.as_path())
    }

    /// The files and directories that the server of the spec opens later, when the layers are open; none if programs are
    /// run that could open anything.
    #[must_use]
    pub fn opens_later(&self) -> Option<Vec<PathBuf>> {
        let mut paths: Vec<PathBuf> = self.store.iter().cloned().collect();
        let places = self
            .layers
            .iter()
            .flat_map(|layer| [Some(&layer.layer.blob), layer.index.rest.as_ref()]);
        for place in places.flatten() {
            let Place::Registry(access) = &place.place else {
                continue;
            };
            if access.keyring().names_helpers() {
                return None;
            }
            paths.extend(access.keyring().files());
        }
        Some(paths)
    }

    /// Removes the index files that were lent.
    fn take_back(&self) {
        for path in self.lent() {
            let _ = fs::remove_file(path);
        }
    }

    /// Makes the image and starts the fetcher.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn serve(self) -> Result<Opened, OpenError> {
        let indexes: Result<Vec<_>, OpenError> = self.layers.iter().map(|layer| layer.index.read()).collect();
        self.take_back();
        let indexes = indexes?;
        let image = Arc::new(image_of(indexes.iter().map(|(index, _)| index), self.tree, &self.name)?);
        let mut sources = Vec::new();
        for (served, (index, file)) in self.layers.into_iter().zip(indexes) {
            let windows = match served.index.rest {
                // The file has room for what is fetched of it; one that was lent is gone already.
                Some(rest) if !served.index.lent => {
                    Windows::Kept(Arc::new(file.into()), Box::new(rest), index.cold().clone())
                }
                Some(rest) => Windows::Remote(Box::new(rest), index.cold().clone()),
                None => Windows::File(Arc::new(file.into()), index.cold().clone()),
            };
            sources.push(layer_source(served.layer, &index, windows));
        }
        start(image, sources, self.store.as_deref(), &self.fetching, self.cost)
    }
}

impl IndexFile {
    /// The index, and the file that it was read from.
    fn read(&self) -> Result<(Index<Vec<u8>>, File), OpenError> {
        let failed = |cause| OpenError::ReadIndex {
            name: self.path.display().to_string(),
            cause,
        };
        if self.rest.is_some() {
            let mut file = File::options()
                .read(true)
                .write(!self.lent)
                .open(&self.path)
                .map_err(failed)?;
            let index = read_hot(&mut file).ok_or_else(|| OpenError::Changed(self.path.display().to_string()))?;
            return Ok((index, file));
        }
        // Opened once: another index may be put in its place meanwhile.
        let mut file = File::open(&self.path).map_err(failed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        Ok((open_index(bytes, &self.path.display().to_string())?, file))
    }
}

/// What the fetcher is told of a layer.
fn layer_source(layer: LayerSpec, index: &Index<Vec<u8>>, windows: Windows) -> LayerSource {
    let table = index.spans().cloned();
    let has_windows = index.cold().has(ColdPart::Windows);
    let digests = index.chunk_digests().cloned().map(Verifier::chunk_digests);
    let pieces = index.piece_digests().cloned().map(Verifier::Pieces);
    LayerSource {
        layer,
        coding: table.map(|table| Coded {
            table,
            windows: if has_windows { windows } else { Windows::None },
        }),
        verifier: pieces.or(digests),
    }
}

fn start(
    image: Arc<Ext4Image>,
    layers: Vec<LayerSource>,
    store: Option<&Path>,
    fetching: &Fetching,
    cost: PrepareCost,
) -> Result<Opened, OpenError> {
    // A plain local file needs no disk cache.
    let needs_store = |layer: &LayerSource| layer.layer.blob.is_remote() || layer.coding.is_some();
    let store = match store.filter(|_| layers.iter().any(needs_store)).map(DiskCache::open) {
        Some(Ok(store)) => Some(store),
        Some(Err(error)) if is_full(&error.source) => {
            log::warn!("{error}; going on without a cache");
            None
        }
        Some(Err(error)) => return Err(error.into()),
        None => None,
    };
    if let Some(store) = &store
        && let Err(error) = store.trim(fetching.store_bytes)
    {
        log::warn!("{error}");
    }
    let secure = |layer: &LayerSource| match &layer.layer.blob.place {
        Place::File(_) => false,
        Place::Url(at) => at.url.scheme() == "https",
        Place::Registry(_) => true,
    };
    let size: u64 = layers.iter().map(LayerSource::size).fold(0, u64::saturating_add);
    let room = size <= fetching.store_bytes;
    if fetching.fetch_all && !room {
        log::warn!(
            "not everything is fetched: the layers have {size} bytes, and the cache may have {}",
            fetching.store_bytes
        );
    }
    let options = FetchOptions {
        memory_bytes: fetching.memory_bytes,
        connections: usize::from(fetching.connections),
        deadline: fetching.deadline.unwrap_or(Duration::MAX),
        fetch_all: fetching.fetch_all && room && store.is_some(),
        store,
        tls: if layers.iter().any(secure) {
            Some(fetch::default_tls()?)
        } else {
            None
        },
        ..FetchOptions::default()
    };
    let files: Arc<dyn FileMap> = image.clone();
    let fetcher = Fetcher::start(layers, options, Some(files))?;
    Ok(Opened { image, fetcher, cost })
}

/// Opens what was prepared in this process.
///
/// # Errors
/// [`OpenError`].
pub fn serve_here(prepared: Prepared, fetching: &Fetching) -> Result<Opened, OpenError> {
    let image = Arc::new(prepared.image()?);
    let store = prepared.cache.as_ref().map(Cache::layers);
    let mut sources = Vec::new();
    for layer in prepared.layers {
        let windows = match layer.rest {
            Some(rest) => Windows::Remote(Box::new(rest), layer.index.cold().clone()),
            None => Windows::Memory(Arc::new(all_windows(&layer.index, &prepared.name)?)),
        };
        sources.push(layer_source(layer.layer, &layer.index, windows));
    }
    start(image, sources, store.as_deref(), fetching, prepared.cost)
}

/// Every decoder window of an index that is whole.
fn all_windows(index: &Index<Vec<u8>>, name: &str) -> Result<Vec<Vec<u8>>, OpenError> {
    let window = |n| {
        let window = index.cold_piece(ColdPart::Windows, n);
        window.map(Option::unwrap_or_default).map_err(|cause| OpenError::Index {
            name: name.to_owned(),
            cause,
        })
    };
    (0..index.cold().pieces(ColdPart::Windows)).map(window).collect()
}
