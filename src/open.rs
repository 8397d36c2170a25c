//! A layer, opened: source, index, tree, image and fetcher, put together in the order data walks through them.
//!
//! In: what a person typed, an index perhaps, a cache directory perhaps. Out: in two halves, because they happen in two
//! processes: [`prepare`] finds the layer and its index and can show progress; a [`Recipe`] is what it tells the daemon;
//! [`Recipe::serve`] makes the image and the fetcher of it. [`serve_here`] is both in one process.
//!
//! An index that was read from headers is kept in the cache directory under the layer's identity, which is its name and what
//! tells this state of it from another (a server's entity tag, a file's inode and time of change). A layer without such a
//! mark is never found there again.

mod gather;
mod kept;
mod record;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fetch::store::{Store, StoreError};
use crate::fetch::{self, Blob, FetchOptions, Fetcher, FileLayer, HttpLayer, LayerSource};
use crate::image::ext4::{Ext4Image, Ext4Options};
use crate::image::{FileMap, ImageError};
use crate::index::{Index, IndexBuilder, IndexError, is_index};
use crate::source::{self, LayerBlob, Patience, Place, Source, SourceError};
use crate::tree::TreeBuilder;
use crate::units::TarOffset;
use gather::Gather;

pub use kept::{Cache, default_cache_dir};
pub use record::{Recording, record};

/// No index file is longer: about 100 million entries. What says it is longer is not read.
const MAX_INDEX_BYTES: u64 = 2 << 30;

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The layer cannot be found or its headers not read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The index that was named cannot be used.
    #[error("{name}: {cause}")]
    Index {
        /// Which.
        name: String,
        /// Why.
        cause: IndexError,
    },
    /// The index that was named cannot be read.
    #[error("cannot read index {name}: {cause}")]
    ReadIndex {
        /// Which.
        name: String,
        /// Why.
        cause: io::Error,
    },
    /// The index that was named is another layer's.
    #[error("index {name} is of a tar of {expected} bytes, but {source_name} has {found}: it belongs to another layer")]
    OtherLayer {
        /// Which index.
        name: String,
        /// The tar's length that it was made of.
        expected: u64,
        /// The layer.
        source_name: String,
        /// Its length.
        found: u64,
    },
    /// The layer holds something that no filesystem image can.
    #[error("{name}: {cause}")]
    Tree {
        /// The layer.
        name: String,
        /// What.
        cause: IndexError,
    },
    /// The layer holds something that ext4 cannot.
    #[error("{name}: {cause}")]
    Image {
        /// The layer.
        name: String,
        /// What.
        cause: ImageError,
    },
    /// A local layer is not what it was when its index was read.
    #[error("{0} changed while it was being attached; try again")]
    Changed(String),
    /// The fetcher could not start.
    #[error(transparent)]
    Fetch(#[from] fetch::StartError),
    /// The store of fetched bytes cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something cannot be kept or read in the cache directory.
    #[error("cache {path}: {cause}; name another one with --cache, or use --no-cache")]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// How a layer is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// An index made beforehand, as a path or a URL.
    pub index: Option<String>,
    /// Where indexes and fetched bytes are kept; nowhere if none.
    pub cache: Option<Cache>,
    /// How long to wait for servers.
    pub patience: Patience,
}

/// Told what opening is doing, by whoever shows it.
pub trait Watch {
    /// The headers are being read: the position reached and the tar's length, both in bytes.
    fn headers(&mut self, at: u64, len: u64);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn headers(&mut self, _at: u64, _len: u64) {}
}

/// Where an index came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexOrigin {
    /// It was named.
    Given,
    /// It was in the cache directory.
    Kept,
    /// The headers were read: in this many reads or requests, bringing this many bytes.
    Read {
        /// How many.
        reads: u64,
        /// How many bytes came with them, payload that passed by included.
        bytes: u64,
    },
}

/// A layer that was found, with its index.
#[derive(Debug)]
pub struct Prepared {
    /// The layer.
    pub blob: LayerBlob,
    /// What it holds.
    pub index: Index<Vec<u8>>,
    /// Where the index came from.
    pub origin: IndexOrigin,
    cache: Option<Cache>,
    /// The index in the cache directory, if it is there.
    kept: Option<PathBuf>,
}

/// Finds a layer and its index: the one that was named, or the one in the cache, or by reading the headers.
///
/// # Errors
/// [`OpenError`], in one line for the person.
pub fn prepare(text: &str, options: &OpenOptions, watch: &mut dyn Watch) -> Result<Prepared, OpenError> {
    let source = Source::parse(text)?;
    if let Some(name) = &options.index {
        return prepare_with_index(&source, name, options);
    }
    let blob = source::open(&source, &options.patience)?;
    let identity = blob
        .fingerprint()
        .map(|mark| format!("{source_name}\n{mark}", source_name = full_name(&source)));
    if let (Some(cache), Some(identity)) = (&options.cache, &identity)
        && let Some((path, bytes)) = cache.index(identity)
    {
        match Index::open(bytes) {
            Ok(index) if index.tar_len() == blob.len => {
                let (cache, kept) = (options.cache.clone(), Some(path));
                return Ok(Prepared {
                    blob,
                    index,
                    origin: IndexOrigin::Kept,
                    cache,
                    kept,
                });
            }
            // Damaged, or of another version of this program: it is read again and replaced.
            Ok(_) | Err(_) => log::info!("{}: not usable, reading the headers again", path.display()),
        }
    }
    let (bytes, origin) = read_headers(&blob, options, watch)?;
    let kept = match (&options.cache, &identity) {
        (Some(cache), Some(identity)) => keep_if_there_is_room(cache, identity, &bytes)?,
        _ => None,
    };
    let index = open_index(bytes, &source.to_string())?;
    Ok(Prepared {
        blob,
        index,
        origin,
        cache: options.cache.clone(),
        kept,
    })
}

/// Keeps an index in the cache. A full disk only means that the headers are read again next time.
fn keep_if_there_is_room(cache: &Cache, identity: &str, bytes: &[u8]) -> Result<Option<PathBuf>, OpenError> {
    match cache.keep_index(identity, bytes) {
        Ok(path) => Ok(Some(path)),
        Err(OpenError::Cache { path, cause }) if is_full(&cause) => {
            log::warn!("cannot keep the index in {}: {cause}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether a disk has no more room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Finds the layer and brings its index at the same time.
fn prepare_with_index(source: &Source, name: &str, options: &OpenOptions) -> Result<Prepared, OpenError> {
    let (blob, bytes) = std::thread::scope(|scope| {
        let blob = scope.spawn(|| source::open(source, &options.patience));
        let bytes = load_index(name, &options.patience);
        (blob.join(), bytes)
    });
    let blob = blob.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let index = open_index(bytes?, name)?;
    if index.tar_len() != blob.len {
        return Err(OpenError::OtherLayer {
            name: source::without_secrets(name),
            expected: index.tar_len(),
            source_name: source.to_string(),
            found: blob.len,
        });
    }
    Ok(Prepared {
        blob,
        index,
        origin: IndexOrigin::Given,
        cache: options.cache.clone(),
        kept: None,
    })
}

/// Reads a layer's headers into an index file. Payload of a remote layer that comes with them is put into the store.
fn read_headers(
    blob: &LayerBlob,
    options: &OpenOptions,
    watch: &mut dyn Watch,
) -> Result<(Vec<u8>, IndexOrigin), OpenError> {
    let mut builder = IndexBuilder::new();
    let mut progress = |at: TarOffset, len: u64| watch.headers(at.0, len);
    let mut gather = match (&blob.place, &options.cache) {
        (Place::Http(http), Some(cache)) => {
            let kept = Store::open(cache.layers()).and_then(|store| store.layer(&http_layer(http)));
            match kept {
                Ok(kept) => Some(Gather::new(kept)),
                Err(error) if is_full(&error.source) => {
                    log::warn!("{error}; going on without a cache");
                    None
                }
                Err(error) => return Err(error.into()),
            }
        }
        _ => None,
    };
    let tap = gather.as_mut().map(|gather| -> &mut dyn source::Tap { gather });
    let walked = source::walk(blob, &mut builder, tap, &options.patience, &mut progress)?;
    // The store lets go of the layer here, and the daemon can take it.
    drop(gather);
    let bytes = builder.finish(walked.tar_len, walked.end);
    Ok((
        bytes,
        IndexOrigin::Read {
            reads: walked.reads,
            bytes: walked.bytes_read,
        },
    ))
}

/// Reads an index file, whole, from a path or a URL.
///
/// # Errors
/// [`OpenError::ReadIndex`], [`OpenError::Source`].
pub fn load_index(name: &str, patience: &Patience) -> Result<Vec<u8>, OpenError> {
    let failed = |cause| OpenError::ReadIndex {
        name: source::without_secrets(name),
        cause,
    };
    match Source::parse(name)? {
        Source::Path(path) => {
            let file = File::open(&path).map_err(failed)?;
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(failed(io::Error::other("it is not a regular file")));
            }
            let mut bytes = Vec::new();
            file.take(MAX_INDEX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
            Ok(bytes)
        }
        Source::Url(url) => Ok(source::http::get_whole(&url, MAX_INDEX_BYTES, patience)?),
        Source::Image(_) => Err(failed(io::Error::other("it is an image, not an index"))),
    }
}

/// Opens what may be a layer or an index, for those who only want to know what is in it.
///
/// # Errors
/// [`OpenError`].
pub fn index_of(text: &str, options: &OpenOptions, watch: &mut dyn Watch) -> Result<Index<Vec<u8>>, OpenError> {
    let looks_like_an_index = match Source::parse(text)? {
        Source::Path(path) => {
            let mut start = Vec::new();
            let read = File::open(&path).and_then(|file| file.take(64).read_to_end(&mut start));
            read.is_ok() && is_index(&start)
        }
        Source::Url(url) => url.path().ends_with(".tarblk"),
        Source::Image(_) => false,
    };
    if looks_like_an_index {
        return open_index(load_index(text, &options.patience)?, text);
    }
    Ok(prepare(text, options, watch)?.index)
}

fn open_index(bytes: Vec<u8>, name: &str) -> Result<Index<Vec<u8>>, OpenError> {
    Index::open(bytes).map_err(|cause| OpenError::Index {
        name: source::without_secrets(name),
        cause,
    })
}

/// The source as it tells layers apart; not for messages.
fn full_name(source: &Source) -> String {
    match source {
        Source::Path(path) => path.display().to_string(),
        Source::Url(url) => url.to_string(),
        Source::Image(name) => name.to_string(),
    }
}

impl Prepared {
    /// The filesystem image.
    ///
    /// # Errors
    /// What it cannot hold.
    pub fn image(&self) -> Result<Ext4Image, OpenError> {
        image_of(&self.index, &self.blob.source.to_string())
    }

    /// What another process needs to serve this layer. `lending` is where the index may be put for it if it is not in the
    /// cache; the process removes it from there.
    ///
    /// # Errors
    /// [`OpenError::Cache`] when it cannot be put there.
    pub fn recipe(&self, lending: &Path, fetching: Fetching) -> Result<Recipe, OpenError> {
        let layer = match &self.blob.place {
            Place::File(_) => {
                let Source::Path(path) = &self.blob.source else {
                    unreachable!("files have paths")
                };
                let path = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                Layer::File {
                    path,
                    mark: self.blob.fingerprint().unwrap_or_default(),
                }
            }
            Place::Http(http) => {
                let HttpLayer { url, size, headers, .. } = http_layer(http);
                Layer::Http {
                    url,
                    len: size,
                    validator: http.validator.as_ref().map(Into::into),
                    headers,
                }
            }
        };
        let (index, borrowed) = match &self.kept {
            Some(path) => (path.clone(), false),
            None => (lend(lending, self.index.as_bytes())?, true),
        };
        let store = self.cache.as_ref().map(Cache::layers);
        Ok(Recipe {
            name: self.blob.source.to_string(),
            layer,
            index,
            borrowed,
            store,
            fetching,
        })
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

fn image_of(index: &Index<Vec<u8>>, name: &str) -> Result<Ext4Image, OpenError> {
    let mut tree = TreeBuilder::new();
    index.replay(&mut tree).map_err(|cause| OpenError::Tree {
        name: name.into(),
        cause,
    })?;
    Ext4Image::plan(tree.finish(), &Ext4Options::default()).map_err(|cause| OpenError::Image {
        name: name.into(),
        cause,
    })
}

/// How a served layer's bytes are fetched.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetching {
    /// The memory tier's bound in bytes.
    pub memory_bytes: u64,
    /// Connections per host at most.
    pub connections: u16,
    /// After this a read fails; never if none.
    pub deadline: Option<Duration>,
    /// The disk space that fetched bytes of all layers may take; layers unused longest go first, when a layer is opened.
    pub store_bytes: u64,
}

/// Everything that a process must know to serve a layer. May hold secrets: it goes through pipes, never into files.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// For messages, without secrets.
    name: String,
    layer: Layer,
    /// The index file.
    index: PathBuf,
    /// Whether the index file is to be removed once it was read.
    borrowed: bool,
    /// Where fetched bytes are kept.
    store: Option<PathBuf>,
    fetching: Fetching,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum Layer {
    File {
        path: PathBuf,
        mark: String,
    },
    Http {
        url: String,
        len: u64,
        validator: Option<Mark>,
        headers: Vec<(String, String)>,
    },
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, .. } => write!(f, "File({})", path.display()),
            Self::Http { url, .. } => write!(f, "Http({})", source::without_secrets(url)),
        }
    }
}

/// A validator in a recipe.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Mark {
    ETag(String),
    LastModified(String),
}

impl From<&source::Validator> for Mark {
    fn from(validator: &source::Validator) -> Self {
        match validator {
            source::Validator::ETag(tag) => Self::ETag(tag.clone()),
            source::Validator::LastModified(date) => Self::LastModified(date.clone()),
        }
    }
}

impl From<Mark> for fetch::Validator {
    fn from(mark: Mark) -> Self {
        match mark {
            Mark::ETag(tag) => Self::ETag(tag),
            Mark::LastModified(date) => Self::LastModified(date),
        }
    }
}

/// A layer as an image and the bytes behind it.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The image.
    pub image: Arc<Ext4Image>,
    /// The bytes of its layer.
    pub fetcher: Fetcher,
}

impl Recipe {
    /// The index file that was made for the recipe's reader alone, if there is one.
    #[must_use]
    pub fn lent(&self) -> Option<&Path> {
        self.borrowed.then_some(&self.index)
    }

    /// Makes the image and starts the fetcher.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn serve(self) -> Result<Opened, OpenError> {
        let read = fs::read(&self.index);
        if self.borrowed {
            let _ = fs::remove_file(&self.index);
        }
        let failed = |cause| OpenError::ReadIndex {
            name: self.index.display().to_string(),
            cause,
        };
        let index = open_index(read.map_err(failed)?, &self.index.display().to_string())?;
        let layer = self.layer.clone().open()?;
        let image = Arc::new(image_of(&index, &self.name)?);
        start(image, layer, self.store.as_deref(), &self.fetching)
    }
}

impl Layer {
    fn open(self) -> Result<LayerSource, OpenError> {
        match self {
            Self::File { path, mark } => {
                let blob = source::open(&Source::Path(path), &Patience::default())?;
                if blob.fingerprint().as_deref() != Some(&mark) {
                    return Err(OpenError::Changed(blob.source.to_string()));
                }
                Ok(layer_source(blob))
            }
            Self::Http {
                url,
                len,
                validator,
                headers,
            } => Ok(LayerSource::http(HttpLayer {
                url,
                size: len,
                validator: validator.map(Into::into),
                headers,
                access: None,
            })),
        }
    }
}

fn layer_source(blob: LayerBlob) -> LayerSource {
    match blob.place {
        Place::File(file) => {
            let path = PathBuf::from(blob.source.to_string());
            LayerSource::file(FileLayer {
                path,
                file: file.into(),
                size: blob.len,
            })
        }
        Place::Http(http) => LayerSource::http(http_layer(&http)),
    }
}

/// A found layer as the fetcher is told of it.
fn http_layer(http: &source::HttpBlob) -> HttpLayer {
    let authorization = http.authorization.as_ref().and_then(|value| value.to_str().ok());
    HttpLayer {
        url: http.url.to_string(),
        size: http.len,
        validator: http.validator.as_ref().map(|validator| Mark::from(validator).into()),
        headers: authorization
            .map(|value| ("Authorization".to_owned(), value.to_owned()))
            .into_iter()
            .collect(),
        access: http.access.clone().map(Arc::new),
    }
}

fn start(
    image: Arc<Ext4Image>,
    layer: LayerSource,
    store: Option<&Path>,
    fetching: &Fetching,
) -> Result<Opened, OpenError> {
    let store = match (&layer.blob, store) {
        (Blob::Http(_), Some(dir)) => match Store::open(dir) {
            Ok(store) => Some(store),
            Err(error) if is_full(&error.source) => {
                log::warn!("{error}; going on without a cache");
                None
            }
            Err(error) => return Err(error.into()),
        },
        _ => None,
    };
    if let Some(store) = &store
        && let Err(error) = store.trim(fetching.store_bytes)
    {
        log::warn!("{error}");
    }
    let secure = matches!(&layer.blob, Blob::Http(http) if http.url.starts_with("https:"));
    let options = FetchOptions {
        memory_bytes: fetching.memory_bytes,
        connections: usize::from(fetching.connections),
        deadline: fetching.deadline.unwrap_or(Duration::MAX),
        store,
        tls: if secure { Some(fetch::default_tls()?) } else { None },
        ..FetchOptions::default()
    };
    let files: Arc<dyn FileMap> = image.clone();
    let fetcher = Fetcher::start(vec![layer], options, Some(files))?;
    Ok(Opened { image, fetcher })
}

/// Opens a prepared layer in this process.
///
/// # Errors
/// [`OpenError`].
pub fn serve_here(prepared: Prepared, fetching: &Fetching) -> Result<Opened, OpenError> {
    let image = Arc::new(prepared.image()?);
    let store = prepared.cache.as_ref().map(Cache::layers);
    start(image, layer_source(prepared.blob), store.as_deref(), fetching)
}
