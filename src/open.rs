//! A layer or an image, opened: source, layer, index, tree, image and fetcher, put together in the order data walks through
//! them.
//!
//! In: what a person typed, an index perhaps, a cache directory perhaps. Out: in two halves, because they happen in two
//! processes: [`prepare`] finds the layers and their indexes and can show progress; a [`ImageSpec`] is what it tells the daemon;
//! [`ImageSpec::serve`] makes the image and the fetcher of it. [`serve_here`] is both in one process.
//!
//! An index that was made is kept in the cache directory under the layer's identity: its digest, or else its name and what
//! tells this state of it from another (a server's entity tag, a file's inode and time of change). A layer without such a
//! mark is never found there again. Under the digest alone there is only what was compared with it; headers that a server
//! sent, and bytes that nothing vouches for until all have come, are kept under the server's and repository's name as well,
//! because another one may send something else.

pub mod artifact;
mod compare;
mod cost;
pub mod discover;
mod index_cache;
mod layer;
mod prepared;
pub mod publish;
mod published;
mod record;
mod serve_spec;
mod toc;

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::disk::DiskCacheError;
use crate::digest::Digest;
use crate::fetch::{self, PrepareCost};
use crate::http::{HttpOptions, without_secrets};
use crate::image::ImageError;
use crate::image::ext4::{Ext4Image, Ext4Options};
use crate::index::{ImageArchiveProbe, Index, IndexError, IndexFault, Tee, hot_len, is_index};
use crate::layer::Coding;
use crate::source::registry::{Image, ImageName, RegistryOptions, SmallBlobCache};
use crate::source::{self, Blob, Source, SourceError, registry};
use crate::tree::{Tree, TreeBuilder, TreeMode};
use crate::units::LayerId;
use crate::walk::WalkError;
use compare::check_headers;
use cost::CostMeter;
use prepared::FoundLayer;

pub use discover::IndexChoice;
pub use index_cache::{Cache, default_cache_dir};
pub use prepared::PreparedLayer;
pub use record::{RecordedBlob, Recording, record, record_blob};
pub use serve_spec::{Fetching, ImageSpec, Opened, serve_here};

/// No index file is longer: about 100 million entries. What says it is longer is not read.
const MAX_INDEX_BYTES: u64 = 2 << 30;

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The layer cannot be found or its headers not read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The tar itself is bad, or its compression, or it holds what no index can.
    #[error("{name}: {source}")]
    Tar {
        /// The layer.
        name: String,
        /// What is wrong.
        source: IndexError,
    },
    /// A layer by itself has no bytes, or none when its compression is undone.
    #[error(
        "{name} is empty ({len}): no tar is, whose end alone takes 1,024 bytes; was it written and downloaded to its end?"
    )]
    Empty {
        /// The layer.
        name: String,
        /// Its length of 0 bytes, and where that is.
        len: &'static str,
    },
    /// The index that was named cannot be used.
    #[error("{name}: {cause}")]
    Index {
        /// Which.
        name: String,
        /// Why.
        #[source]
        cause: IndexError,
    },
    /// The index that was named cannot be read.
    #[error("cannot read index {name}: {cause}")]
    ReadIndex {
        /// Which.
        name: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// What was named as an index is neither a file nor one of the words.
    #[error("cannot read index {name}: No such file or directory; name a file, a URL, or one of {words}{meant}")]
    NoSuchIndex {
        /// What was named.
        name: String,
        /// The words that mean a choice.
        words: String,
        /// The word that is nearest, with a separator in front, or nothing.
        meant: String,
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
    /// What was named as a layer is a whole image, packed.
    #[error("{0}")]
    ImageArchive(PackedImage),
    /// The layer holds something that no filesystem image can.
    #[error("{name}: {cause}")]
    Tree {
        /// The layer.
        name: String,
        /// What.
        #[source]
        cause: IndexError,
    },
    /// The layer holds something that ext4 cannot.
    #[error("{name}: {cause}")]
    Image {
        /// The layer.
        name: String,
        /// What.
        #[source]
        cause: ImageError,
    },
    /// A layer's bytes are not those that its image means.
    #[error("{source_name}: the {what} of a layer is {found} and has to be {expected}: it was damaged or exchanged")]
    Digest {
        /// The image or layer.
        source_name: String,
        /// Which digest: of the blob, or of the tar in it.
        what: &'static str,
        /// What it has to be.
        expected: String,
        /// What came.
        found: String,
    },
    /// The image has no such layer.
    #[error("{name} has no layer {wanted}: {has}")]
    NoSuchLayer {
        /// The image.
        name: String,
        /// What was asked for.
        wanted: String,
        /// What it has.
        has: String,
    },
    /// One layer is wanted of an image that has several.
    #[error("{0} has several layers, and an index is of one; choose it with --layer")]
    OneIndex(String),
    /// Nobody has published indexes of an image.
    #[error(
        "{name} has no published indexes, nor tables of contents in all layers that its manifest vouches for; `tarblk index push` makes indexes"
    )]
    NoIndexes {
        /// The image.
        name: String,
    },
    /// A local layer is not what it was when its index was read.
    #[error("{0} changed while it was being attached; try again")]
    Changed(String),
    /// The fetcher could not start.
    #[error(transparent)]
    Fetch(#[from] fetch::StartError),
    /// The store of fetched bytes cannot be used.
    #[error(transparent)]
    DiskCache(#[from] DiskCacheError),
    /// Something cannot be kept or read in the cache directory.
    #[error("cache {path}: {cause}; name another one with --cache, or use --no-cache")]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl From<WalkError> for OpenError {
    fn from(error: WalkError) -> Self {
        match error {
            WalkError::Source(error) => Self::Source(error),
            WalkError::Tar { name, source } => Self::Tar { name, source },
        }
    }
}

/// A tar that holds an image in place of a layer's files: what `docker save` or `skopeo copy … oci-archive:` writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedImage {
    /// The tar, as it was named.
    name: String,
    /// What skopeo calls such an archive.
    transport: &'static str,
}

impl PackedImage {
    /// No archive of an image has more entries: three for each of at most some hundred layers.
    const MOST_ENTRIES: u64 = 10_000;

    /// Whether a tar's index is that of an archive; for commands that show what a tar holds, whatever it is.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn find<B: AsRef<[u8]>>(name: &str, index: &Index<B>) -> Result<Option<Self>, IndexError> {
        if index.summary().entries > Self::MOST_ENTRIES {
            return Ok(None);
        }
        let mut probe = ImageArchiveProbe::default();
        index.replay(&mut probe)?;
        Ok(probe.found().map(|archive| Self {
            name: without_secrets(name),
            transport: archive.transport(),
        }))
    }
}

impl std::fmt::Display for PackedImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, transport } = self;
        // skopeo reads such archives from files alone.
        let (first, file) = match name.rsplit_once('/') {
            Some((_, last)) if name.contains("://") => ("download it and unpack it", last.trim_end_matches("?…")),
            _ => ("unpack it first", name.as_str()),
        };
        write!(
            f,
            "{name} is an image packed into a tar ({transport}), not a layer: {first} with `skopeo copy {transport}:{file} \
             oci:DIR:latest`, then use oci:DIR:latest"
        )
    }
}

/// How a layer or an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Where indexes come from.
    pub index: IndexChoice,
    /// Which index, or which artifact with the indexes of an image, by digest; any other is refused.
    pub index_digest: Option<Digest>,
    /// One layer of an image, as overlayfs wants it; all of them as one tree if none.
    pub layer: Option<LayerChoice>,
    /// Where indexes and fetched bytes are kept; nowhere if none.
    pub cache: Option<Cache>,
    /// How long to wait for servers.
    pub http: HttpOptions,
    /// How registries are talked to.
    pub registry: RegistryOptions,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerChoice {
    /// Counted from 1, the lowest.
    Number(usize),
    /// By its digest.
    Digest(Digest),
}

impl std::str::FromStr for LayerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse::<usize>() {
            return match number {
                0 => Err("layers are counted from 1".to_owned()),
                number => Ok(Self::Number(number)),
            };
        }
        text.parse()
            .map(Self::Digest)
            .map_err(|error| format!("{error}; or a number from 1"))
    }
}

impl std::fmt::Display for LayerChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// What is read of layers while they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reading {
    /// Headers; payload is passed over where that saves something.
    Headers,
    /// All bytes, of local files.
    Whole,
    /// All bytes, from a server.
    Download,
}

impl Reading {
    /// Reading all of a blob.
    fn all_of(blob: &Blob) -> Self {
        if blob.is_remote() { Self::Download } else { Self::Whole }
    }
}

/// Told what opening is doing, by whoever shows it.
pub trait Watch {
    /// Layers are being read: the position reached and their length, both in bytes, of all together. Of layers that are read
    /// in different ways, `what` is the one that takes the most.
    fn reading(&mut self, what: Reading, at: u64, len: u64);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn reading(&mut self, _what: Reading, _at: u64, _len: u64) {}
}

/// Where an index came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum IndexOrigin {
    /// It was named.
    Given,
    /// It was in the cache directory.
    Kept,
    /// Somebody has published it: its hot part had this many bytes.
    Published {
        /// How many.
        bytes: u64,
    },
    /// The layer brought it along: its own table of contents, in this many requests, bringing this many bytes.
    Contents {
        /// How many.
        reads: u64,
        /// How many bytes came with them.
        bytes: u64,
    },
    /// The headers were read, or the whole layer: in this many reads or requests, bringing this many bytes.
    Read {
        /// How many.
        reads: u64,
        /// How many bytes came with them, payload that passed by included.
        bytes: u64,
    },
}

impl std::fmt::Display for IndexOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Given => f.write_str("the one that was named"),
            Self::Kept => f.write_str("kept here"),
            Self::Published { bytes } => write!(f, "published, {bytes} bytes"),
            Self::Contents { reads, bytes } => {
                write!(
                    f,
                    "the layer's own table of contents, {bytes} bytes in {reads} requests"
                )
            }
            Self::Read { reads, bytes } => write!(f, "made by reading {bytes} bytes in {reads} requests"),
        }
    }
}

/// A layer or an image that was found, with the index of each of its layers.
#[derive(Debug)]
pub struct Prepared {
    /// What was named, without secrets.
    pub name: String,
    /// The lowest first; at least one.
    pub layers: Vec<PreparedLayer>,
    /// How they become one tree.
    pub mode: TreeMode,
    /// What finding the layers and their indexes downloaded.
    pub cost: PrepareCost,
    cache: Option<Cache>,
}

/// Finds a layer or an image, and the index of each layer: the one that was named, or the one in the cache, or by reading
/// the headers, or a compressed layer whole. Several layers are read at the same time.
///
/// # Errors
/// [`OpenError`], in one line for the person.
pub fn prepare(text: &str, options: &OpenOptions, watch: &mut dyn Watch) -> Result<Prepared, OpenError> {
    let source = Source::parse(text)?;
    let mut meter = CostMeter::start();
    let (layers, mode) = match (&source, &options.index) {
        (Source::Image(name), _) => prepare_image(name, options, watch, &mut meter)?,
        (_, IndexChoice::Named(index)) => (
            vec![prepare_with_index(&source, index, options, &mut meter)?],
            TreeMode::Plain,
        ),
        (_, IndexChoice::Require) => {
            return Err(OpenError::NoIndexes {
                name: source.to_string(),
            });
        }
        (_, IndexChoice::Auto | IndexChoice::Ignore | IndexChoice::Build) => {
            let blob = find_blob(&source, options)?;
            warn_without_ranges(&blob);
            meter.manifests();
            let layers = prepare_all(vec![blob.into()], options, watch)?;
            meter.layers();
            for layer in &layers {
                check_pin(&layer.index, text, options)?;
            }
            (layers, TreeMode::Plain)
        }
    };
    Ok(Prepared {
        name: source.to_string(),
        cost: meter.finish(&layers),
        layers,
        mode,
        cache: options.cache.clone(),
    })
}

/// An image, of its layers only the one that was chosen if one was, and how they become a tree.
fn chosen(mut image: Image, options: &OpenOptions) -> Result<(Image, TreeMode), OpenError> {
    let Some(choice) = &options.layer else {
        return Ok((image, TreeMode::Merged));
    };
    let chosen = find_layer(&image, choice)?;
    image.layers = vec![image.layers.swap_remove(chosen)];
    Ok((image, TreeMode::Overlay))
}

/// Finds a layer that is no image's. An image may have empty layers (old versions of Docker pushed blobs of 0 bytes, and
/// containerd unpacks them to nothing); of a layer alone it means that something went wrong before.
fn find_blob(source: &Source, options: &OpenOptions) -> Result<Blob, OpenError> {
    let blob = source::open(source, &options.http)?;
    if blob.len == 0 {
        return Err(OpenError::Empty {
            name: source.to_string(),
            len: "0 bytes",
        });
    }
    Ok(blob)
}

/// Says that a layer's server makes it impossible to read parts of it.
fn warn_without_ranges(blob: &Blob) {
    if !blob.answers_ranges() {
        log::warn!(
            "{}: the server does not answer ranges; reading the whole layer once",
            blob.name
        );
    }
}

/// Finds one layer: what was named, or of an image the one that was chosen or is its only one.
fn find_one(text: &str, options: &OpenOptions) -> Result<FoundLayer, OpenError> {
    let source = Source::parse(text)?;
    let Source::Image(name) = &source else {
        return Ok(find_blob(&source, options)?.into());
    };
    let (image, _) = chosen(registry::resolve(name, &options.registry)?, options)?;
    match &image.layers[..] {
        [layer] => Ok(FoundLayer::of_image(name, layer)?),
        _ => Err(OpenError::OneIndex(image.name)),
    }
}

/// How the layer that is meant is compressed, by its first bytes.
///
/// # Errors
/// [`OpenError`] when it cannot be found or read.
pub fn coding_of(text: &str, options: &OpenOptions) -> Result<Coding, OpenError> {
    record::coding_of(&find_one(text, options)?.layer.blob, &options.http)
}

fn prepare_image(
    name: &ImageName,
    options: &OpenOptions,
    watch: &mut dyn Watch,
    meter: &mut CostMeter,
) -> Result<(Vec<PreparedLayer>, TreeMode), OpenError> {
    let options = &OpenOptions {
        registry: RegistryOptions {
            cache: options
                .cache
                .clone()
                .map(|cache| -> Arc<dyn SmallBlobCache> { Arc::new(cache) }),
            ..options.registry.clone()
        },
        ..options.clone()
    };
    published::warm_up(name, options)?;
    let found = registry::find(name, &options.registry)?;
    // Whether indexes are published can be asked while the configuration is on its way.
    let (early, _) = chosen(found.by_manifest(), options)?;
    let (config, published) = std::thread::scope(|scope| {
        let config = scope.spawn(|| found.config());
        let published = published::find(name, &early, options);
        (config.join(), published)
    });
    let config = config.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let (image, mode) = chosen(found.with(config), options)?;
    meter.manifests();
    if let IndexChoice::Named(index) = &options.index {
        if image.layers.len() > 1 {
            return Err(OpenError::OneIndex(image.name));
        }
        let (index, index_name) = (named_index(index, options)?, without_secrets(index));
        meter.indexes();
        let layer = &image.layers[0];
        let found = FoundLayer::of_image(name, layer)?;
        if index.identity().blob_len == found.layer.blob.len {
            check_headers(&index, &index_name, &found.layer.blob, &options.http)?;
        }
        meter.layers();
        let layer = PreparedLayer::new(&found, index, IndexOrigin::Given, None)?;
        return Ok((vec![layer], mode));
    }
    let published = published::fetch(name, &image, published?, options)?;
    meter.indexes();
    let mut found = Vec::new();
    for (layer, published) in image.layers.iter().zip(published) {
        found.push(FoundLayer {
            published,
            ..FoundLayer::of_image(name, layer)?
        });
    }
    let layers = prepare_all(found, options, watch)?;
    meter.layers();
    if let (ImageName::Registry(_), Some(cache)) = (name, &options.cache) {
        cache.know(&name.to_string());
    }
    Ok((layers, mode))
}

fn find_layer(image: &Image, choice: &LayerChoice) -> Result<usize, OpenError> {
    let found = match choice {
        LayerChoice::Number(number) => (1..=image.layers.len()).contains(number).then(|| number - 1),
        LayerChoice::Digest(digest) => image.layers.iter().position(|layer| layer.descriptor.digest == *digest),
    };
    found.ok_or_else(|| OpenError::NoSuchLayer {
        name: image.name.clone(),
        wanted: choice.to_string(),
        has: match image.layers.len() {
            1 => "it has one".to_owned(),
            count => format!("it has {count}, counted from 1"),
        },
    })
}

/// Finds or makes the indexes of several layers at the same time.
fn prepare_all(
    found: Vec<FoundLayer>,
    options: &OpenOptions,
    watch: &mut dyn Watch,
) -> Result<Vec<PreparedLayer>, OpenError> {
    let total = found
        .iter()
        .fold(0_u64, |sum, found| sum.saturating_add(found.layer.blob.len));
    let (tell, told) = std::sync::mpsc::channel();
    let mut reached = vec![0; found.len()];
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, found) in found.into_iter().enumerate() {
            let tell = Mutex::new(tell.clone());
            threads.push(scope.spawn(move || {
                let mut reached = |what: Reading, at: u64| {
                    // Who listens goes first only when everything ends.
                    let _nobody_listens = tell
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .send((number, what, at));
                };
                layer::prepare(&found, options, &mut reached)
            }));
        }
        drop(tell);
        let mut reading = Reading::Headers;
        for (number, what, at) in told {
            reading = reading.max(what);
            reached[number] = at;
            let sum = reached.iter().fold(0_u64, |sum, at| sum.saturating_add(*at));
            watch.reading(reading, sum, total);
        }
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<PreparedLayer, OpenError>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

/// Finds the layer and brings its index at the same time.
fn prepare_with_index(
    source: &Source,
    name: &str,
    options: &OpenOptions,
    meter: &mut CostMeter,
) -> Result<PreparedLayer, OpenError> {
    let (blob, bytes) = std::thread::scope(|scope| {
        let blob = scope.spawn(|| find_blob(source, options));
        let bytes = bytes_of_named(name, &options.http);
        (blob.join(), bytes)
    });
    let blob = blob.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    warn_without_ranges(&blob);
    let index = pinned(open_index(bytes?, name)?, name, options)?;
    meter.indexes();
    let expected = index.identity().blob_len;
    if expected != blob.len {
        return Err(OpenError::OtherLayer {
            name: without_secrets(name),
            expected,
            source_name: source.to_string(),
            found: blob.len,
        });
    }
    check_headers(&index, &without_secrets(name), &blob, &options.http)?;
    meter.layers();
    PreparedLayer::new(&blob.into(), index, IndexOrigin::Given, None)
}

/// The bytes of an index that was named where a word might have stood.
fn bytes_of_named(name: &str, http: &HttpOptions) -> Result<Vec<u8>, OpenError> {
    load_index(name, http).map_err(|error| match error {
        OpenError::ReadIndex { name, cause } if cause.kind() == io::ErrorKind::NotFound => OpenError::NoSuchIndex {
            words: IndexChoice::WORDS.join(", "),
            meant: IndexChoice::nearest_word(&name)
                .map(|word| format!("; did you mean {word}?"))
                .unwrap_or_default(),
            name,
        },
        other => other,
    })
}

/// An index that was named, and is the one that it has to be.
fn named_index(name: &str, options: &OpenOptions) -> Result<Index<Vec<u8>>, OpenError> {
    pinned(open_index(bytes_of_named(name, &options.http)?, name)?, name, options)
}

fn pinned(index: Index<Vec<u8>>, name: &str, options: &OpenOptions) -> Result<Index<Vec<u8>>, OpenError> {
    if index.is_of_contents() {
        return Err(OpenError::Index {
            name: without_secrets(name),
            cause: IndexFault::MadeUp.into(),
        });
    }
    check_pin(&index, name, options).map(|()| index)
}

/// Whether an index is the one that it has to be, if one was named.
fn check_pin(index: &Index<Vec<u8>>, name: &str, options: &OpenOptions) -> Result<(), OpenError> {
    match &options.index_digest {
        Some(pin) if !discover::is_pinned(index, pin) => Err(OpenError::Digest {
            source_name: without_secrets(name),
            what: "index",
            expected: pin.to_string(),
            found: discover::hot_digest(index).to_string(),
        }),
        _ => Ok(()),
    }
}

/// Whether a disk has no more room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Reads an index file, whole, from a path or a URL.
///
/// # Errors
/// [`OpenError::ReadIndex`], [`OpenError::Source`].
pub fn load_index(name: &str, http: &HttpOptions) -> Result<Vec<u8>, OpenError> {
    let failed = |cause| OpenError::ReadIndex {
        name: without_secrets(name),
        cause,
    };
    match Source::parse(name)? {
        Source::Path(path) => {
            // Asked before opening: a pipe would be waited for.
            if !std::fs::metadata(&path).map_err(failed)?.is_file() {
                return Err(failed(io::Error::other("it is not a regular file")));
            }
            let file = File::open(&path).map_err(failed)?;
            let mut bytes = Vec::new();
            file.take(MAX_INDEX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
            Ok(bytes)
        }
        Source::Url(url) => Ok(source::get_whole(&url, MAX_INDEX_BYTES, http)?),
        Source::Image(_) => Err(failed(io::Error::other("it is an image, not an index"))),
    }
}

/// Opens what may be a layer or an index, for those who only want to know what is in it.
///
/// # Errors
/// [`OpenError`].
pub fn index_of(text: &str, options: &OpenOptions, watch: &mut dyn Watch) -> Result<Index<Vec<u8>>, OpenError> {
    let looks_like_an_index = match Source::parse(text)? {
        Source::Path(path) if path.is_file() => {
            let mut start = Vec::new();
            let read = File::open(&path).and_then(|file| file.take(64).read_to_end(&mut start));
            read.is_ok() && is_index(&start)
        }
        Source::Url(url) => url.path().ends_with(".tarblk"),
        Source::Path(_) | Source::Image(_) => false,
    };
    if looks_like_an_index {
        return open_index(load_index(text, &options.http)?, text);
    }
    Ok(prepare(text, options, watch)?.into_only()?.index)
}

/// Opens an index file, or the hot part of one.
fn open_index(bytes: Vec<u8>, name: &str) -> Result<Index<Vec<u8>>, OpenError> {
    let is_hot = hot_len(&bytes).is_ok_and(|hot| hot == u64::try_from(bytes.len()).ok());
    let opened = if is_hot {
        Index::open_hot(bytes)
    } else {
        Index::open(bytes)
    };
    opened.map_err(|cause| OpenError::Index {
        name: without_secrets(name),
        cause,
    })
}

/// The tree of layers by their indexes, the lowest first.
fn tree_of<'i>(
    indexes: impl IntoIterator<Item = &'i Index<Vec<u8>>>,
    mode: TreeMode,
    name: &str,
) -> Result<Tree, OpenError> {
    let failed = |index: &Index<Vec<u8>>, cause| OpenError::Tree {
        name: match (&index.identity().blob_digest, mode) {
            (Some(digest), TreeMode::Merged | TreeMode::Overlay) => format!("{name}, blob {digest}"),
            _ => name.into(),
        },
        cause,
    };
    let mut tree = TreeBuilder::with_mode(mode);
    for (number, index) in (0..).zip(indexes) {
        tree.begin_layer(LayerId(number))
            .map_err(|error| failed(index, IndexError::Sink(error.into())))?;
        let failed = |cause| failed(index, cause);
        match mode {
            TreeMode::Plain => {
                let mut probe = ImageArchiveProbe::default();
                let outcome = index.replay(&mut Tee(&mut probe, &mut tree));
                if let Some(archive) = probe.found() {
                    let (name, transport) = (name.to_owned(), archive.transport());
                    return Err(OpenError::ImageArchive(PackedImage { name, transport }));
                }
                outcome.map_err(failed)?;
            }
            TreeMode::Merged | TreeMode::Overlay => index.replay_in_image(&mut tree).map_err(failed)?,
        }
    }
    Ok(tree.finish())
}

fn image_of<'i>(
    indexes: impl IntoIterator<Item = &'i Index<Vec<u8>>>,
    mode: TreeMode,
    name: &str,
) -> Result<Ext4Image, OpenError> {
    Ext4Image::plan(tree_of(indexes, mode, name)?, &Ext4Options::default()).map_err(|cause| OpenError::Image {
        name: name.into(),
        cause,
    })
}

impl Prepared {
    /// The tree of all layers.
    ///
    /// # Errors
    /// What no tree can hold.
    pub fn tree(&self) -> Result<Tree, OpenError> {
        tree_of(self.layers.iter().map(|layer| &layer.index), self.mode, &self.name)
    }

    /// The filesystem image.
    ///
    /// # Errors
    /// What it cannot hold.
    pub fn image(&self) -> Result<Ext4Image, OpenError> {
        image_of(self.layers.iter().map(|layer| &layer.index), self.mode, &self.name)
    }

    /// The layer, if it is one alone.
    ///
    /// # Errors
    /// [`OpenError::OneIndex`] when there are several.
    pub fn into_only(mut self) -> Result<PreparedLayer, OpenError> {
        match (self.layers.pop(), self.layers.len()) {
            (Some(layer), 0) => Ok(layer),
            _ => Err(OpenError::OneIndex(self.name)),
        }
    }

    /// How many bytes of files all layers store.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| layer.index.summary().payload_bytes)
            .fold(0, u64::saturating_add)
    }
}
