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
use super::layer::PreparedLayer;
use super::{Cache, OpenError, Prepared, image_of, is_full, open_index};
use crate::cache::disk::DiskCache;
use crate::digest::Digest;
use crate::fetch::{
    self, Blob, Coded, FetchOptions, Fetcher, FileLayer, HttpLayer, LayerSource, Verifier, WholeDigests, Windows,
};
use crate::http::{HttpOptions, Validator, without_secrets};
use crate::image::ext4::Ext4Image;
use crate::image::{BlockImage, FileMap};
use crate::index::{ColdPart, Index};
use crate::source::registry::BlobAccess;
use crate::source::{self, HttpBlob, Place, Source};
use crate::tree::TreeMode;

/// How served layers' bytes are fetched.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetching {
    /// The memory tier's bound in bytes.
    pub memory_bytes: u64,
    /// Connections per host at most.
    pub connections: u16,
    /// Whether everything is brought to the store in the end, while nobody reads.
    pub fetch_all: bool,
    /// After this a read fails; never if none.
    pub deadline: Option<Duration>,
    /// The disk space that fetched bytes of all layers may take; layers unused longest go first, when a layer is opened.
    pub store_bytes: u64,
}

/// Everything that a process must know to serve layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// For messages, without secrets.
    name: String,
    layers: Vec<Layer>,
    /// How the layers become one tree.
    tree: TreeMode,
    /// Where fetched bytes are kept.
    store: Option<PathBuf>,
    fetching: Fetching,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    blob: At,
    digest: Option<Digest>,
    diff_id: Option<Digest>,
    /// The name of its tar space in the store.
    stored_as: Option<String>,
    /// The index file.
    index: PathBuf,
    /// Whether the index file is to be removed once it was read.
    borrowed: bool,
    /// Where the rest of the index is, if the file holds its hot part alone.
    rest: Option<At>,
}

/// Where a blob is.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum At {
    File {
        path: PathBuf,
        mark: String,
    },
    Http {
        url: String,
        len: u64,
        validator: Option<Validator>,
        headers: Vec<(String, String)>,
        access: Option<BlobAccess>,
    },
}

impl std::fmt::Debug for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, .. } => write!(f, "File({})", path.display()),
            Self::Http { url, .. } => write!(f, "Http({})", without_secrets(url)),
        }
    }
}

/// Layers as an image and the bytes behind it.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The image.
    pub image: Arc<dyn BlockImage>,
    /// The bytes of its layers.
    pub fetcher: Fetcher,
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
        };
        for layer in &self.layers {
            let lent = match &layer.kept {
                Some(path) => Ok((path.clone(), false)),
                None => lend(lending, layer.index.as_bytes()).map(|path| (path, true)),
            };
            let (index, borrowed) = lent.inspect_err(|_| spec.take_back())?;
            spec.layers.push(Layer {
                blob: At::of(layer),
                digest: layer.digest.clone(),
                diff_id: layer.diff_id.clone(),
                stored_as: layer.stored_as.clone(),
                index,
                borrowed,
                rest: layer.rest.as_ref().map(At::http),
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

impl At {
    fn of(layer: &PreparedLayer) -> Self {
        match &layer.blob.place {
            Place::File(_) => Self::File {
                path: layer.blob.path.clone().unwrap_or_default(),
                mark: layer.blob.fingerprint().unwrap_or_default(),
            },
            Place::Http(http) => Self::http(http),
        }
    }

    fn http(http: &HttpBlob) -> Self {
        let HttpLayer { url, size, headers, .. } = http_layer(http);
        Self::Http {
            url,
            len: size,
            validator: http.validator.clone(),
            headers,
            access: http.access.clone(),
        }
    }

    fn open(self) -> Result<Blob, OpenError> {
        match self {
            Self::File { path, mark } => {
                let blob = source::open(&Source::Path(path), &HttpOptions::default())?;
                if blob.fingerprint().as_deref() != Some(&mark) {
                    return Err(OpenError::Changed(blob.source.to_string()));
                }
                Ok(blob_of(blob.place, blob.source.to_string().into(), blob.len))
            }
            Self::Http {
                url,
                len,
                validator,
                headers,
                access,
            } => Ok(Blob::Http(HttpLayer {
                url,
                size: len,
                validator,
                headers,
                access: access.map(Arc::new),
            })),
        }
    }
}

fn blob_of(place: Place, path: PathBuf, size: u64) -> Blob {
    match place {
        Place::File(file) => Blob::File(FileLayer {
            path,
            file: file.into(),
            size,
        }),
        Place::Http(http) => Blob::Http(http_layer(&http)),
    }
}

/// A found layer as the fetcher is told of it.
pub(super) fn http_layer(http: &HttpBlob) -> HttpLayer {
    let authorization = http.authorization.as_ref().and_then(|value| value.to_str().ok());
    HttpLayer {
        url: http.url.to_string(),
        size: http.len,
        validator: http.validator.clone(),
        headers: authorization
            .map(|value| ("Authorization".to_owned(), value.to_owned()))
            .into_iter()
            .collect(),
        access: http.access.clone().map(Arc::new),
    }
}

impl ImageSpec {
    /// The index files that were made for the spec's reader alone.
    pub fn lent(&self) -> impl Iterator<Item = &Path> {
        let lent = self.layers.iter().filter(|layer| layer.borrowed);
        lent.map(|layer| layer.index.as_path())
    }

    /// The files and directories that the server of the spec opens later, when the layers are open; none if programs are
    /// run that could open anything.
    #[must_use]
    pub fn opens_later(&self) -> Option<Vec<PathBuf>> {
        let mut paths: Vec<PathBuf> = self.store.iter().cloned().collect();
        let places = self
            .layers
            .iter()
            .flat_map(|layer| [Some(&layer.blob), layer.rest.as_ref()]);
        for place in places.flatten() {
            let At::Http {
                access: Some(access), ..
            } = place
            else {
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
        let indexes: Result<Vec<_>, OpenError> = self.layers.iter().map(Layer::read_index).collect();
        self.take_back();
        let indexes = indexes?;
        let image = Arc::new(image_of(indexes.iter().map(|(index, _)| index), self.tree, &self.name)?);
        let mut sources = Vec::new();
        for (layer, (index, file)) in self.layers.into_iter().zip(indexes) {
            let rest = layer.rest.map(At::open).transpose()?;
            let windows = match rest {
                // The file has room for what is fetched of it; one that was lent is gone already.
                Some(Blob::Http(rest)) if !layer.borrowed => {
                    Windows::Kept(Arc::new(file.into()), Box::new(rest), index.cold().clone())
                }
                Some(Blob::Http(rest)) => Windows::Http(Box::new(rest), index.cold().clone()),
                _ => Windows::File(Arc::new(file.into()), index.cold().clone()),
            };
            let blob = layer.blob.open()?;
            sources.push(layer_source(
                blob,
                &index,
                windows,
                [layer.digest, layer.diff_id],
                layer.stored_as,
            ));
        }
        start(image, sources, self.store.as_deref(), &self.fetching)
    }
}

impl Layer {
    fn read_index(&self) -> Result<(Index<Vec<u8>>, File), OpenError> {
        let failed = |cause| OpenError::ReadIndex {
            name: self.index.display().to_string(),
            cause,
        };
        if self.rest.is_some() {
            let mut file = File::options()
                .read(true)
                .write(!self.borrowed)
                .open(&self.index)
                .map_err(failed)?;
            let index = read_hot(&mut file).ok_or_else(|| OpenError::Changed(self.index.display().to_string()))?;
            return Ok((index, file));
        }
        // Opened once: somebody may put another index in its place meanwhile.
        let mut file = File::open(&self.index).map_err(failed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        Ok((open_index(bytes, &self.index.display().to_string())?, file))
    }
}

/// What the fetcher is told of a layer.
fn layer_source(
    blob: Blob,
    index: &Index<Vec<u8>>,
    windows: Windows,
    [digest, diff_id]: [Option<Digest>; 2],
    identity: Option<String>,
) -> LayerSource {
    let table = index.spans().cloned();
    let has_windows = index.cold().has(ColdPart::Windows);
    let digests = index.chunk_digests().cloned();
    let digests = digests.map(|digests| Verifier::chunks(move |chunk, bytes| digests.check(chunk.into(), bytes)));
    let pieces = index.piece_digests().cloned().map(Verifier::Pieces);
    LayerSource {
        blob,
        coding: table.map(|table| Coded {
            table,
            windows: if has_windows { windows } else { Windows::None },
        }),
        digests: pieces.or(digests),
        whole: WholeDigests {
            blob: digest.and_then(|digest| digest.sha256()),
            tar: diff_id.and_then(|digest| digest.sha256()),
        },
        identity,
    }
}

fn start(
    image: Arc<Ext4Image>,
    layers: Vec<LayerSource>,
    store: Option<&Path>,
    fetching: &Fetching,
) -> Result<Opened, OpenError> {
    // A plain local file is its own store.
    let needs_store = |layer: &LayerSource| matches!(layer.blob, Blob::Http(_)) || layer.coding.is_some();
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
    let secure = |layer: &LayerSource| matches!(&layer.blob, Blob::Http(http) if http.access.is_some() || http.url.starts_with("https:"));
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
    Ok(Opened { image, fetcher })
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
        let identity = layer.stored_as;
        let digests = [layer.digest, layer.diff_id];
        let path = layer.blob.path.clone().unwrap_or_default();
        let windows = match &layer.rest {
            Some(rest) => Windows::Http(Box::new(http_layer(rest)), layer.index.cold().clone()),
            None => Windows::Memory(Arc::new(all_windows(&layer.index, &prepared.name)?)),
        };
        let blob = blob_of(layer.blob.place, path, layer.blob.len);
        sources.push(layer_source(blob, &layer.index, windows, digests, identity));
    }
    start(image, sources, store.as_deref(), fetching)
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
