//! What a process must know to serve what another one prepared. In: prepared layers. Out: a [`ImageSpec`] that goes through a
//! pipe; from it, in the process that serves, the image and the fetcher.
//!
//! A spec may hold secrets (credentials, signed addresses): it never goes into a file, and its `Debug` shows none.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::dedup::{self, IndexedLayer};
use super::index_cache::read_hot;
use super::profiles::{ImageStart, Profiles, profile_key};
use super::shared::{Fetching, Shared};
use super::{Cache, OpenError, Prepared, open_index};
use crate::cache::disk::LayerKey;
use crate::fetch::{
    Coded, FetchStats, Fetcher, IndexTrust, LayerSource, OpenOptions, PrepareCost, UnprovenIndex, Verifier, Windows,
};
use crate::image::ext4::Ext4Image;
use crate::image::{BlockImage, FileMap};
use crate::index::{ColdPart, Index};
use crate::profile::ProfiledLayer;
use crate::source::{Blob, LayerSpec, Place};
use crate::tree::TreeMode;

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
    /// The files of the image.
    pub files: Arc<dyn FileMap>,
    /// What is known of how the image starts; none where nothing is kept.
    pub start: Option<ImageStart>,
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
        if let (Some(published), Some(profiles)) = (&self.profile, self.profiles())
            && let Err(error) = profiles.keep_published(published)
        {
            log::info!("the published profile is not kept: {error}");
        }
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

    /// The files of this machine that the spec names: of each layer its index, then the layer itself if it is one.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let of_layer = |layer: &ServedLayer| {
            let blob = match &layer.layer.blob.place {
                Place::File(file) => Some(file.path.clone()),
                Place::Url(_) | Place::Registry(_) => None,
            };
            [Some(layer.index.path.clone()), blob]
        };
        self.layers.iter().flat_map(of_layer).flatten().collect()
    }

    /// The same with [`files`](Self::files) at other paths, in the same order: those of descriptors, say, which go on meaning the
    /// same file whatever becomes of its name.
    #[must_use]
    pub fn moved(mut self, paths: &[PathBuf]) -> Self {
        let mut paths = paths.iter();
        for layer in &mut self.layers {
            if let Some(path) = paths.next() {
                layer.index.path.clone_from(path);
            }
            if let Place::File(file) = &mut layer.layer.blob.place
                && let Some(path) = paths.next()
            {
                file.move_to(path);
            }
        }
        self
    }

    /// The directories that serving the image writes to: the cache, as far as there is one.
    #[must_use]
    pub fn writes(&self) -> Vec<PathBuf> {
        let cache = self.store.as_deref().and_then(Path::parent);
        cache.map(Path::to_owned).into_iter().collect()
    }

    /// The same with nothing in it that must not be in a file: credentials, tokens, signed addresses. What is needed of those is
    /// looked up again where it comes from.
    #[must_use]
    pub fn without_secrets(&self) -> Self {
        let mut spec = self.clone();
        for layer in &mut spec.layers {
            layer.layer.blob = layer.layer.blob.without_secrets();
            layer.index.rest = layer.index.rest.as_ref().map(Blob::without_secrets);
        }
        spec
    }

    /// Removes the index files that were lent: when their reader has opened them, or will not.
    pub fn take_back(&self) {
        for path in self.lent() {
            let _ = fs::remove_file(path);
        }
    }

    /// Makes the image and starts the fetcher.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn serve(self, shared: &Shared) -> Result<Opened, OpenError> {
        let indexes: Result<Vec<_>, OpenError> = self.layers.iter().map(|layer| layer.index.read()).collect();
        let indexes = indexes?;
        let made_of: Vec<_> = indexes.iter().map(|(index, _)| index).collect();
        let image = shared.image(&made_of, self.tree, &self.name)?;
        let (mut sources, mut described) = (Vec::new(), Vec::new());
        let trusts = trusts(&self.cost);
        for ((served, (index, file)), trust) in self.layers.into_iter().zip(indexes).zip(trusts) {
            let file: Arc<OwnedFd> = Arc::new(file.into());
            let rest = served.index.rest.clone();
            let indexed_file = (!served.index.lent).then(|| Arc::clone(&file));
            let unproven = trust.and_then(|trust| UnprovenIndex::in_file(trust, &index, &file));
            let windows = match served.index.rest {
                // The file has room for what is fetched of it; one that was lent has lost its name.
                Some(rest) if !served.index.lent => Windows::Kept(file, Box::new(rest), index.cold().clone()),
                Some(rest) => Windows::Remote(Box::new(rest), index.cold().clone()),
                None => Windows::File(file, index.cold().clone()),
            };
            sources.push(LayerSource {
                unproven,
                ..layer_source(served.layer, &index, windows)
            });
            described.push(indexed_layer(sources.last(), index, indexed_file, rest, trust));
        }
        let store = self.store.as_deref();
        start(shared, image, sources, described, store, &self.fetching, self.cost)
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

/// On whose word each layer's index is believed, without end; none where that is not known.
fn trusts(cost: &PrepareCost) -> impl Iterator<Item = Option<IndexTrust>> + use<> {
    let known: Vec<_> = cost.layers.iter().map(|layer| Some(layer.trust?.index)).collect();
    known.into_iter().chain(std::iter::repeat(None))
}

/// What the fetcher is told of a layer.
fn layer_source(layer: LayerSpec, index: &Index<Vec<u8>>, windows: Windows) -> LayerSource {
    let table = index.spans().cloned();
    let has_windows = index.cold().has(ColdPart::windows_of(index.identity().coding));
    let digests = index.chunk_digests().cloned().map(Verifier::chunk_digests);
    let pieces = index.piece_digests().cloned().map(Verifier::Pieces);
    LayerSource {
        layer,
        coding: table.map(|table| Coded {
            table,
            windows: if has_windows { windows } else { Windows::None },
        }),
        verifier: pieces.or(digests),
        unproven: None,
    }
}

/// What is looked at to find bytes that other layers have, too.
fn indexed_layer(
    source: Option<&LayerSource>,
    index: Index<Vec<u8>>,
    file: Option<Arc<OwnedFd>>,
    rest: Option<Blob>,
    trust: Option<IndexTrust>,
) -> IndexedLayer {
    // A plain file is its own store.
    let kept = source.filter(|source| source.layer.blob.is_remote() || source.coding.is_some());
    IndexedLayer {
        key: kept.and_then(|source| LayerKey::of_layer(&source.layer, source.coding.is_some(), source.size())),
        index,
        file,
        rest,
        trust,
    }
}

/// What a profile knows the layer by; none if nothing tells it from others.
fn profiled_layer(source: &LayerSource) -> Option<ProfiledLayer> {
    Some(ProfiledLayer {
        key: profile_key(&source.layer)?,
        size: source.size(),
    })
}

fn start(
    shared: &Shared,
    image: Arc<Ext4Image>,
    layers: Vec<LayerSource>,
    described: Vec<IndexedLayer>,
    store: Option<&Path>,
    fetching: &Fetching,
    cost: PrepareCost,
) -> Result<Opened, OpenError> {
    // A plain local file needs no disk cache.
    let needs_store = |layer: &LayerSource| layer.layer.blob.is_remote() || layer.coding.is_some();
    let pool = shared.pool(store.filter(|_| layers.iter().any(needs_store)), fetching)?;
    let size: u64 = layers.iter().map(LayerSource::size).fold(0, u64::saturating_add);
    let may_have = pool.disk.as_ref().map_or(0, |store| store.limit());
    let room = size <= may_have;
    if fetching.fetch_all && !room {
        log::warn!("not everything is fetched: the layers have {size} bytes, and the cache may have {may_have}");
    }
    let profiles = store.and_then(Path::parent).and_then(|cache| {
        let layers = layers.iter().map(profiled_layer).collect::<Option<Vec<_>>>()?;
        Some(Profiles::new(cache, pool.disk.clone()).of_image(layers))
    });
    let options = OpenOptions {
        deadline: fetching.deadline.unwrap_or(Duration::MAX),
        fetch_all: fetching.fetch_all && room && pool.disk.is_some(),
        ..OpenOptions::default()
    };
    let files: Arc<dyn FileMap> = image.clone();
    let fetcher = pool.fetch.open(layers, options, Some(files.clone()))?;
    if let (Some(disk), Some(store)) = (&pool.disk, store) {
        dedup::begin(&shared.getters, fetcher.deduplicator(), described, disk, store);
    }
    let start = profiles.map(|profiles| ImageStart::new(profiles, fetcher.clone()));
    Ok(Opened {
        image,
        fetcher,
        cost,
        files,
        start,
    })
}

/// Opens what was prepared in this process.
///
/// # Errors
/// [`OpenError`].
pub fn serve_here(prepared: Prepared, fetching: &Fetching) -> Result<Opened, OpenError> {
    let image = Arc::new(prepared.image()?);
    let store = prepared.cache.as_ref().map(Cache::layers);
    let (mut sources, mut described) = (Vec::new(), Vec::new());
    for layer in prepared.layers {
        let rest = layer.rest.clone();
        let file = layer.kept.as_ref().and_then(|path| File::open(path).ok());
        let unproven = UnprovenIndex::in_memory(layer.trust.index, &layer.index);
        let windows = match layer.rest {
            Some(rest) => Windows::Remote(Box::new(rest), layer.index.cold().clone()),
            None => Windows::Memory(Arc::new(all_windows(&layer.index, &prepared.name)?)),
        };
        sources.push(LayerSource {
            unproven,
            ..layer_source(layer.layer, &layer.index, windows)
        });
        let (file, trust) = (file.map(|file| Arc::new(file.into())), Some(layer.trust.index));
        described.push(indexed_layer(sources.last(), layer.index, file, rest, trust));
    }
    start(
        &Shared::default(),
        image,
        sources,
        described,
        store.as_deref(),
        fetching,
        prepared.cost,
    )
}

/// Every decoder window of an index that is whole.
fn all_windows(index: &Index<Vec<u8>>, name: &str) -> Result<Vec<Vec<u8>>, OpenError> {
    let part = ColdPart::windows_of(index.identity().coding);
    let window = |n| {
        let window = index.cold_piece(part, n);
        window.map(Option::unwrap_or_default).map_err(|cause| OpenError::Index {
            name: name.to_owned(),
            cause,
        })
    };
    (0..index.cold().pieces(part)).map(window).collect()
}
