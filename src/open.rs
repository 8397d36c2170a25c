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
mod dedup;
pub mod discover;
mod error;
mod index_cache;
mod layer;
mod limit;
mod named;
mod names;
mod offline;
mod prepared;
pub mod profiles;
pub mod publish;
mod published;
mod record;
mod serve_spec;
mod shared;
mod signature;
mod toc;
pub mod trust;

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Digest;
use crate::fetch::{IndexTrust, PrepareCost};
use crate::http::{HttpOptions, without_secrets};
use crate::image::ext4::{Ext4Image, Ext4Options};
use crate::index::{ImageArchiveProbe, Index, IndexError, Tee, is_index};
use crate::layer::Coding;
use crate::profile::{Profile, ProfiledLayer};
use crate::source::registry::{Image, ImageName, RegistryOptions, SmallBlobCache};
use crate::source::{self, Blob, Source, registry};
use crate::tree::{Tree, TreeBuilder, TreeMode};
use crate::units::LayerId;
use compare::check_headers;
use cost::CostMeter;
use named::{bytes_of_named, check_pin, hot_of_named, named_index, named_trust, open_index, pinned};
use prepared::FoundLayer;
use published::Outcome;

pub use dedup::{KnownPayloads, bytes_to_fetch};
pub use discover::IndexChoice;
pub use error::{OpenError, PackedImage};
pub use index_cache::{Beside, Cache, default_cache_dir};
pub use limit::SizeLimit;
pub use named::load_index;
pub use offline::recalled_digests;
pub use prepared::PreparedLayer;
pub use profiles::{ImageProfiles, ImageStart, Profiles};
pub use record::{RecordedBlob, Recording, record, record_blob};
pub use serve_spec::{ImageSpec, Opened, serve_here};
pub use shared::{Fetching, Shared};
pub use signature::Signature;
pub use trust::TrustPolicy;

/// The longest index file that is read, in bytes: about 100 million entries.
const MAX_INDEX_BYTES: u64 = 2 << 30;

/// How a layer or an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Where indexes come from.
    pub index: IndexChoice,
    /// Which index, or which artifact with the indexes of an image, by digest; any other is refused.
    pub index_digest: Option<Digest>,
    /// Whom an index is believed that lies beside an image and that nothing else vouches for.
    pub trust: TrustPolicy,
    /// One layer of an image, as overlayfs wants it; all of them as one tree if none.
    pub layer: Option<LayerChoice>,
    /// Where indexes and fetched bytes are kept; nowhere if none.
    pub cache: Option<Cache>,
    /// How long a layer may be.
    pub size: SizeLimit,
    /// How long to wait for servers.
    pub http: HttpOptions,
    /// How registries are talked to.
    pub registry: RegistryOptions,
}

/// One layer of an image, or some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerChoice {
    /// Counted from 1, the lowest.
    Number(usize),
    /// By its digest.
    Digest(Digest),
    /// The lowest so many, as one tree: the image as it was before the others were added.
    Lowest(usize),
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
            Self::Lowest(count) => write!(f, "the lowest {count}"),
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

/// Receives the progress of opening; commands implement it to draw a bar.
pub trait Watch {
    /// Layers are being read: the position reached and their length, both in bytes, of all together. Of layers that are read
    /// in different ways, `what` is the one that takes the most.
    fn reading(&mut self, what: Reading, at: u64, len: u64);
}

/// A [`Watch`] that shows nothing.
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
    /// It was published in the image's registry.
    Published {
        /// The length of its hot part in bytes.
        bytes: u64,
    },
    /// It was made of the layer's own table of contents (eStargz, zstd:chunked).
    Contents {
        /// How many requests that took.
        reads: u64,
        /// How many bytes they brought.
        bytes: u64,
    },
    /// It was made by reading the layer's headers, or all of it.
    Read {
        /// How many reads or requests that took.
        reads: u64,
        /// How many bytes they brought, payload that was passed over included.
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
    /// What is published of how the image starts, if that was met on the way.
    profile: Option<Profile>,
}

/// Finds a layer or an image, and the index of each layer: the one that was named, or the one in the cache, or by reading
/// the headers, or a compressed layer whole. Several layers are read at the same time.
///
/// # Errors
/// [`OpenError`], in one line for the person.
pub fn prepare(text: &str, options: &OpenOptions, watch: &mut dyn Watch) -> Result<Prepared, OpenError> {
    let source = Source::parse(text)?;
    let mut meter = CostMeter::start();
    let mut profile = None;
    let (layers, mode) = match (&source, &options.index) {
        (Source::Image(name), _) => prepare_image(name, options, watch, &mut meter, &mut profile)?,
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
            let (blob, recalled) = offline::find_blob(&source, options)?;
            warn_without_ranges(&blob);
            meter.manifests();
            let options = &offline::options_after(recalled.as_ref(), options);
            let mut layers = prepare_all(vec![blob.into()], options, watch)?;
            meter.layers();
            offline::tell(&source.to_string(), None, recalled.as_ref(), &layers, options);
            for layer in &mut layers {
                check_pin(&layer.index, text, options)?;
                if options.index_digest.is_some() {
                    layer.trust.index = IndexTrust::Pin;
                }
            }
            (layers, TreeMode::Plain)
        }
    };
    layers.iter().try_for_each(|layer| options.size.check(layer))?;
    Ok(Prepared {
        name: source.to_string(),
        cost: meter.finish(&layers),
        layers,
        mode,
        cache: options.cache.clone(),
        profile,
    })
}

/// An image, of its layers only the one that was chosen if one was, and how they become a tree.
fn chosen(mut image: Image, options: &OpenOptions) -> Result<(Image, TreeMode), OpenError> {
    let Some(choice) = &options.layer else {
        return Ok((image, TreeMode::Merged));
    };
    if let LayerChoice::Lowest(count) = choice {
        if !(1..=image.layers.len()).contains(count) {
            return Err(no_such_layer(&image, choice));
        }
        image.layers.truncate(*count);
        return Ok((image, TreeMode::Merged));
    }
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

/// Warns that a layer has to be downloaded whole, because its server does not serve ranges.
fn warn_without_ranges(blob: &Blob) {
    if !blob.answers_ranges() {
        log::warn!(
            "{}: the server does not answer ranges; reading the whole layer once",
            blob.name
        );
    }
}

/// Finds one layer: a tar by itself, or of an image the layer that was chosen or is its only one.
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

/// How the layer `text` is compressed, by its first bytes.
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
    profile: &mut Option<Profile>,
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
    let recalled = found.recalled().cloned();
    let options = &offline::options_after(recalled.as_ref(), options);
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
        let layer = PreparedLayer::new(&found, index, IndexOrigin::Given, named_trust(options), None)?;
        return Ok((vec![layer], mode));
    }
    let (leads, beside) = published?;
    *profile = beside;
    let published = published::fetch(name, &image, leads, options)?;
    meter.indexes();
    let mut found = Vec::new();
    if options.index != IndexChoice::Require {
        published::tell_unbelieved(name, &published);
    }
    for (layer, outcome) in image.layers.iter().zip(published) {
        let unbelieved = matches!(outcome, Outcome::Unbelieved);
        let published = match outcome {
            Outcome::Used(published) => Some(*published),
            Outcome::Nothing | Outcome::Unbelieved => None,
        };
        found.push(FoundLayer {
            published,
            unbelieved,
            ..FoundLayer::of_image(name, layer)?
        });
    }
    let layers = prepare_all(found, options, watch)?;
    meter.layers();
    offline::tell(
        &name.to_string(),
        Some(&image.manifest_digest),
        recalled.as_ref(),
        &layers,
        options,
    );
    if let (ImageName::Registry(_), Some(cache)) = (name, &options.cache) {
        cache.know(&name.to_string());
    }
    Ok((layers, mode))
}

fn find_layer(image: &Image, choice: &LayerChoice) -> Result<usize, OpenError> {
    let found = match choice {
        LayerChoice::Number(number) => (1..=image.layers.len()).contains(number).then(|| number - 1),
        LayerChoice::Digest(digest) => image.layers.iter().position(|layer| layer.descriptor.digest == *digest),
        LayerChoice::Lowest(_) => None,
    };
    found.ok_or_else(|| no_such_layer(image, choice))
}

fn no_such_layer(image: &Image, choice: &LayerChoice) -> OpenError {
    OpenError::NoSuchLayer {
        name: image.name.clone(),
        wanted: choice.to_string(),
        has: match image.layers.len() {
            1 => "it has one".to_owned(),
            count => format!("it has {count}, counted from 1"),
        },
    }
}

/// The lowest layer of an image that could only be opened by reading it: none of the indexes that the options believe is published
/// beside it, in it or kept here. What is found on the way is kept. The snapshotter asks this before it claims an image.
///
/// # Errors
/// [`OpenError::Source`] when the registry could not be asked.
pub fn without_index(name: &ImageName, image: &Image, options: &OpenOptions) -> Result<Option<Digest>, OpenError> {
    for layer in &image.layers {
        let digest = &layer.descriptor.digest;
        let found = FoundLayer::of_image(name, layer)?;
        let is_kept = |cache: &Cache| {
            let claimed = prepared::kept_under(&found.layer).is_some_and(|name| cache.has_index(&name));
            claimed || cache.has_index(&digest.to_string())
        };
        if options.cache.as_ref().is_some_and(is_kept) {
            continue;
        }
        let options = OpenOptions {
            index: IndexChoice::Require,
            layer: Some(LayerChoice::Digest(digest.clone())),
            ..options.clone()
        };
        match prepare(&name.to_string(), &options, &mut Unwatched) {
            Ok(_) => {}
            Err(error @ OpenError::Source(_)) => return Err(error),
            Err(error) => {
                log::info!("{name}, layer {digest}: {error}");
                return Ok(Some(digest.clone()));
            }
        }
    }
    Ok(None)
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
                    // The receiver is gone only when the command is ending.
                    let _ = tell
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
        let blob = scope.spawn(|| offline::find_blob(source, options));
        // A pin may be the digest of the whole file.
        let bytes = match options.index_digest {
            Some(_) => bytes_of_named(name, &options.http).map(|bytes| (bytes, None)),
            None => hot_of_named(name, &options.http),
        };
        (blob.join(), bytes)
    });
    let (blob, recalled) = blob.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    warn_without_ranges(&blob);
    let (bytes, rest) = bytes?;
    let index = pinned(open_index(bytes, name)?, name, options)?;
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
    let mut layer = PreparedLayer::new(&blob.into(), index, IndexOrigin::Given, named_trust(options), None)?;
    layer.rest = rest;
    offline::tell(
        &source.to_string(),
        None,
        recalled.as_ref(),
        std::slice::from_ref(&layer),
        options,
    );
    Ok(layer)
}

/// Whether a disk cannot be written, which costs nothing but the cache.
fn is_of_the_disk(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem) || error.raw_os_error() == Some(libc::EIO)
}

/// The index of what may be a layer or an index file; for commands that only show what is in it.
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

    /// What is known of how it starts; none where nothing is kept, or where nothing tells a layer from others.
    #[must_use]
    pub fn profiles(&self) -> Option<ImageProfiles> {
        let layers = self.layers.iter().map(|layer| {
            Some(ProfiledLayer {
                key: profiles::profile_key(&layer.layer)?,
                size: layer.tar_len(),
            })
        });
        let profiles = Profiles::new(self.cache.as_ref()?.dir(), None);
        Some(profiles.of_image(layers.collect::<Option<_>>()?))
    }

    /// What is published of how the image starts, if it was met on the way.
    #[must_use]
    pub fn published_profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
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
