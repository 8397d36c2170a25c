//! Whether an image can be lazy, and why not. In: an image as a client names it. Out: its layers with their chain IDs, once manifest,
//! configuration, credentials and ranges were seen to work; or a [`Declined`], and then containerd pulls the image as usual.
//!
//! It is asked once for each image: what was found is remembered as long as the process lives. Beside that, each image's verdict is a
//! file that `tarblk ps --images` reads. An image that was claimed is warmed: the indexes of its layers are found or made while
//! containerd does the rest of the pull.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};

use super::config::{Config, Lazy};
use super::content::{self, Document};
use super::labels::WantedImage;
use super::records::{ImageSource, Moment};
use crate::device::state::write_whole;
use crate::digest::{Algorithm, Digest};
use crate::excerpt;
use crate::http::HttpOptions;
use crate::open::{self, Cache, LayerChoice, OpenError, OpenOptions, Prepared, TrustPolicy, Unwatched};
use crate::source;
use crate::source::registry::{self, ImageName, Reference, RegistryOptions, SmallBlobCache, Version};

/// So many images are remembered; a node has some dozens.
const MOST_IMAGES: usize = 512;

/// So many images are warmed at the same time; each reads all of its layers at once.
const WARMED_AT_ONCE: usize = 2;

/// The longest reason that is kept, in characters.
const LONGEST_REASON: usize = 400;

/// No verdict's file is longer, in bytes.
const LONGEST_VERDICT: u64 = 64 << 10;

/// Why an image or a layer of it is pulled as usual, in one word for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The set-up says so.
    Policy,
    /// The set-up wants an index, and a layer has none.
    NoIndex,
    /// The client does not say of which image the layer is.
    Unnamed,
    /// What is below the layer was unpacked.
    AboveFiles,
    /// The registry cannot be reached, or refuses.
    Registry,
    /// The registry serves no ranges.
    NoRanges,
    /// The image has a layer that is not in its registry.
    Foreign,
    /// The image is not what the client says of it.
    Mismatch,
    /// It was claimed, and then its layers could not be opened.
    Unusable,
}

impl Reason {
    /// The word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::NoIndex => "no-index",
            Self::Unnamed => "unnamed",
            Self::AboveFiles => "above-files",
            Self::Registry => "registry",
            Self::NoRanges => "no-ranges",
            Self::Foreign => "foreign",
            Self::Mismatch => "mismatch",
            Self::Unusable => "unusable",
        }
    }
}

/// Why it is pulled as usual.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Declined {
    /// In one word.
    pub reason: Reason,
    /// In one sentence.
    pub why: String,
}

impl Declined {
    pub(super) fn new(reason: Reason, why: impl fmt::Display) -> Self {
        Self {
            reason,
            why: excerpt::of_line(&format!("{why}"))
                .chars()
                .take(LONGEST_REASON)
                .collect(),
        }
    }
}

/// An image that can be lazy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LazyImage {
    pub(super) source: ImageSource,
    /// The lowest first.
    pub(super) layers: Vec<LazyLayer>,
}

/// A layer of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LazyLayer {
    /// Of it and all below it.
    pub(super) chain: Digest,
    /// The blob.
    pub(super) digest: Digest,
    /// The blob's length.
    pub(super) bytes: u64,
}

/// What became of an image: what `tarblk ps --images` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The image as it was pulled.
    pub image: String,
    /// Its manifest, as far as it is known.
    pub manifest: Option<Digest>,
    /// Whether its layers are fetched when they are read.
    pub lazy: bool,
    /// In one word why not, if it is not.
    pub reason: Option<Reason>,
    /// The same in a sentence; of a lazy image, where its indexes are from, once that is known.
    pub detail: Option<String>,
    /// When that was found.
    pub at: Moment,
    /// The version of tarblk that found it: another one may be able to do more.
    pub version: String,
}

impl Verdict {
    /// Why the image is not claimed again: its layers could not be opened.
    fn unusable(&self) -> Option<Declined> {
        let is_own = self.reason == Some(Reason::Unusable) && self.version == env!("CARGO_PKG_VERSION");
        is_own.then(|| Declined::new(Reason::Unusable, self.detail.as_deref().unwrap_or_default()))
    }
}

/// Everything about images.
#[derive(Debug)]
pub(super) struct Images {
    config: Config,
    trust: TrustPolicy,
    cache: Cache,
    verdicts: PathBuf,
    known: Mutex<HashMap<ImageSource, Arc<LazyImage>>>,
    warming: Mutex<Warming>,
    warmed: Condvar,
}

/// Images whose indexes are found or made.
#[derive(Debug, Default)]
struct Warming {
    queue: VecDeque<ImageSource>,
    running: HashSet<ImageSource>,
    workers: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Images {
    pub(super) fn new(config: &Config, trust: TrustPolicy, cache: Cache) -> io::Result<Self> {
        let verdicts = config.root.join(VERDICTS);
        DirBuilder::new().recursive(true).mode(0o700).create(&verdicts)?;
        Ok(Self {
            config: config.clone(),
            trust,
            cache,
            verdicts,
            known: Mutex::default(),
            warming: Mutex::default(),
            warmed: Condvar::new(),
        })
    }

    /// What is known of an image, found out if need be: by its registry, within the time that the set-up gives.
    ///
    /// # Errors
    /// Why it is not lazy.
    pub(super) fn lazy(&self, wanted: &WantedImage) -> Result<Arc<LazyImage>, Declined> {
        let found = self.find(wanted);
        match &found {
            Ok(image) => self.judge(&image.source.reference, Some(&image.source.manifest), Ok(None)),
            Err(declined) => self.judge(&wanted.reference, wanted.manifest.as_ref(), Err(declined)),
        }
        found
    }

    fn find(&self, wanted: &WantedImage) -> Result<Arc<LazyImage>, Declined> {
        let reference = Reference::parse(&wanted.reference);
        let mut reference = reference.map_err(|why| Declined::new(Reason::Mismatch, why))?;
        let policy = self.config.lazy(&reference);
        if policy == Lazy::Never {
            return Err(Declined::new(Reason::Policy, "lazy = \"never\" in the set-up"));
        }
        if let Some(manifest) = &wanted.manifest {
            let source = ImageSource {
                reference: wanted.reference.clone(),
                manifest: manifest.clone(),
            };
            if let Some(known) = lock(&self.known).get(&source) {
                return Ok(Arc::clone(known));
            }
            let verdict = read_verdict(&self.verdicts.join(verdict_name(&source.reference, Some(manifest))));
            if let Some(declined) = verdict.and_then(|verdict| verdict.unusable()) {
                return Err(declined);
            }
            reference.version = Version::Digest(manifest.clone());
        }
        let image = Arc::new(self.look(wanted, &ImageName::Registry(reference), policy)?);
        let mut known = lock(&self.known);
        if known.len() >= MOST_IMAGES {
            known.clear();
        }
        known.insert(image.source.clone(), Arc::clone(&image));
        Ok(image)
    }

    /// Asks the registry.
    fn look(&self, wanted: &WantedImage, name: &ImageName, policy: Lazy) -> Result<LazyImage, Declined> {
        let refused = |error: source::SourceError| Declined::new(Reason::Registry, error);
        let mut options = self.options();
        let patience = self.config.claim_timeout;
        options.http.retry.deadline = options.http.retry.deadline.min(patience);
        options.http.timeouts = options.http.timeouts.at_most(patience / 2);
        options.registry.http = options.http;
        if let (Some(namespace), Some(manifest)) = (&wanted.namespace, &wanted.manifest) {
            self.borrow(namespace, manifest);
        }
        let found = registry::find(name, &options.registry).map_err(refused)?;
        let manifest = found.manifest_digest().clone();
        if wanted.manifest.as_ref().is_some_and(|wanted| *wanted != manifest) {
            // The name of an index, where the manifest's own was expected.
            return Err(Declined::new(
                Reason::Mismatch,
                format!("{name} is not an image's manifest"),
            ));
        }
        let early = found.by_manifest();
        let biggest = early.layers.iter().max_by_key(|layer| layer.descriptor.size);
        let ranges = |layer| -> Result<bool, Declined> {
            let blob = source::layer_blob(name, layer).map_err(refused)?;
            source::has_ranges(&blob, &options.http).map_err(refused)
        };
        let (config, has_ranges) = thread::scope(|scope| {
            let config = scope.spawn(|| found.config());
            (config.join(), biggest.map_or(Ok(true), ranges))
        });
        let config = config
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map_err(refused)?;
        if !has_ranges? {
            return Err(Declined::new(
                Reason::NoRanges,
                format!("{name}: its registry does not serve ranges"),
            ));
        }
        let image = found.with(config);
        if let Some(why) = image.layers.iter().find_map(|layer| layer.descriptor.foreign()) {
            return Err(Declined::new(Reason::Foreign, why));
        }
        let mut layers: Vec<LazyLayer> = Vec::new();
        for layer in &image.layers {
            let Some(diff_id) = &layer.diff_id else {
                return Err(Declined::new(
                    Reason::Mismatch,
                    format!("{name}: a layer has no diff ID"),
                ));
            };
            layers.push(LazyLayer {
                chain: chain_id(layers.last().map(|below| &below.chain), diff_id),
                digest: layer.descriptor.digest.clone(),
                bytes: layer.descriptor.size,
            });
        }
        let source = ImageSource {
            reference: wanted.reference.clone(),
            manifest,
        };
        if policy == Lazy::IfIndexed {
            require_indexes(&source, &image, &options)?;
        }
        Ok(LazyImage { source, layers })
    }

    /// Takes an image's manifest and configuration from containerd, which has just fetched them: two round trips to the registry less.
    /// Where it has none, or is another one than the set-up says, the registry is asked.
    fn borrow(&self, namespace: &str, manifest: &Digest) {
        // containerd waits for the answer, and the registry has to be asked within the same time.
        let patience = self.config.claim_timeout / 4;
        match content::documents(&self.config.containerd, namespace, manifest, patience) {
            Ok(documents) => {
                for Document {
                    digest,
                    media_type,
                    bytes,
                } in documents
                {
                    self.cache.put(&digest, &media_type, &bytes);
                }
            }
            Err(error) => log::debug!("{manifest} is not taken from containerd: {error}"),
        }
    }

    fn options(&self) -> OpenOptions {
        let http = HttpOptions::default();
        let small: Arc<dyn SmallBlobCache> = Arc::new(self.cache.clone());
        OpenOptions {
            trust: self.trust.clone(),
            cache: Some(self.cache.clone()),
            http,
            registry: RegistryOptions {
                cache: Some(small),
                ..self.config.registry_options(http)
            },
            ..OpenOptions::default()
        }
    }

    /// The lowest `depth` layers of an image, with their indexes.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(super) fn prepare(&self, source: &ImageSource, depth: usize) -> Result<Prepared, OpenError> {
        self.wait_until_warmed(source);
        let options = OpenOptions {
            layer: Some(LayerChoice::Lowest(depth)),
            ..self.options()
        };
        open::prepare(&by_digest(source), &options, &mut Unwatched)
    }

    /// Finds or makes the indexes of an image's layers, on another thread.
    pub(super) fn warm(self: &Arc<Self>, source: &ImageSource) {
        let mut warming = lock(&self.warming);
        if warming.running.contains(source) || warming.queue.contains(source) {
            return;
        }
        warming.queue.push_back(source.clone());
        if warming.workers == WARMED_AT_ONCE {
            return;
        }
        let images = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("tarblk-warm".to_owned())
            .spawn(move || while images.warm_next() {});
        match spawned {
            Ok(_) => warming.workers += 1,
            // Whoever wants the image does it.
            Err(error) => log::warn!("cannot start a thread: {error}"),
        }
    }

    /// Warms an image of the queue; false if there is none.
    fn warm_next(&self) -> bool {
        let source = {
            let mut warming = lock(&self.warming);
            let Some(source) = warming.queue.pop_front() else {
                warming.workers -= 1;
                return false;
            };
            warming.running.insert(source.clone());
            source
        };
        let prepared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            open::prepare(&by_digest(&source), &self.options(), &mut Unwatched)
        }));
        match prepared {
            Ok(Ok(prepared)) => self.judge(&source.reference, Some(&source.manifest), Ok(Some(origins(&prepared)))),
            // What was claimed stays so, and who makes a container of it is told why there is none. The next pull, after it was removed,
            // is as usual.
            Ok(Err(error)) => {
                log::warn!("{}: {error}", source.reference);
                if error.is_lasting() {
                    let declined = Declined::new(Reason::Unusable, error);
                    lock(&self.known).remove(&source);
                    self.judge(&source.reference, Some(&source.manifest), Err(&declined));
                }
            }
            Err(_) => log::error!("{}: reading its layers panicked", source.reference),
        }
        lock(&self.warming).running.remove(&source);
        self.warmed.notify_all();
        true
    }

    fn wait_until_warmed(&self, source: &ImageSource) {
        let mut warming = lock(&self.warming);
        // One that has not begun is not waited for.
        warming.queue.retain(|queued| queued != source);
        while warming.running.contains(source) {
            warming = self.warmed.wait(warming).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes what became of an image.
    pub(super) fn judge(&self, image: &str, manifest: Option<&Digest>, verdict: Result<Option<String>, &Declined>) {
        let path = self.verdicts.join(verdict_name(image, manifest));
        let before = read_verdict(&path);
        let now = Verdict {
            image: image.to_owned(),
            manifest: manifest.cloned(),
            lazy: verdict.is_ok(),
            reason: verdict.as_ref().err().map(|declined| declined.reason),
            detail: match verdict {
                Ok(Some(indexes)) => Some(indexes),
                Ok(None) => before
                    .as_ref()
                    .filter(|before| before.lazy)
                    .and_then(|before| before.detail.clone()),
                Err(declined) => Some(declined.why.clone()),
            },
            at: Moment::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let same = before.is_some_and(|before| Verdict { at: now.at, ..before } == now);
        if same {
            return;
        }
        let written = serde_json::to_vec(&now).map_err(io::Error::from);
        if let Err(error) = written.and_then(|bytes| write_whole(&path, &bytes, true)) {
            log::warn!("cannot write {}: {error}", path.display());
        }
        forget_oldest(&self.verdicts);
    }

    /// Forgets an image none of whose layers is claimed any more.
    pub(super) fn forget(&self, source: &ImageSource) {
        lock(&self.known).remove(source);
        let path = self
            .verdicts
            .join(verdict_name(&source.reference, Some(&source.manifest)));
        // That it cannot be opened is remembered.
        if read_verdict(&path).is_some_and(|verdict| verdict.lazy) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Where verdicts are, below the root.
const VERDICTS: &str = "images";

fn verdict_name(image: &str, manifest: Option<&Digest>) -> String {
    let manifest = manifest.map(ToString::to_string).unwrap_or_default();
    let name = Digest::of(Algorithm::Sha256, format!("{image}\n{manifest}").as_bytes());
    format!("{}.json", name.hex())
}

fn read_verdict(path: &Path) -> Option<Verdict> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .ok()?
        .take(LONGEST_VERDICT)
        .read_to_end(&mut bytes)
        .ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// What became of the images of a snapshotter, the last first.
///
/// # Errors
/// When its root cannot be read.
pub fn verdicts(root: &Path) -> io::Result<Vec<Verdict>> {
    let mut found: Vec<Verdict> = match fs::read_dir(root.join(VERDICTS)) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| read_verdict(&entry.path()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    found.sort_by(|a, b| b.at.cmp(&a.at).then_with(|| a.image.cmp(&b.image)));
    Ok(found)
}

fn forget_oldest(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let age = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
    let mut all: Vec<_> = entries.flatten().filter_map(age).collect();
    if all.len() > MOST_IMAGES {
        all.sort();
        for (_, path) in &all[..all.len() - MOST_IMAGES] {
            let _ = fs::remove_file(path);
        }
    }
}

/// The chain ID of a layer: of the OCI image specification.
fn chain_id(below: Option<&Digest>, diff_id: &Digest) -> Digest {
    match below {
        None => diff_id.clone(),
        Some(below) => Digest::of(Algorithm::Sha256, format!("{below} {diff_id}").as_bytes()),
    }
}

fn name_of(source: &ImageSource) -> Result<ImageName, Declined> {
    let reference = Reference::parse(&source.reference);
    let reference = reference.map_err(|why| Declined::new(Reason::Mismatch, why))?;
    Ok(ImageName::Registry(Reference {
        version: Version::Digest(source.manifest.clone()),
        ..reference
    }))
}

/// Makes sure that no layer has to be read whole.
fn require_indexes(source: &ImageSource, image: &registry::Image, options: &OpenOptions) -> Result<(), Declined> {
    match open::without_index(&name_of(source)?, image, options) {
        Ok(None) => Ok(()),
        Ok(Some(layer)) => Err(Declined::new(
            Reason::NoIndex,
            format!("layer {layer} has no index, and lazy = \"if-indexed\""),
        )),
        Err(error) => Err(Declined::new(Reason::Registry, error)),
    }
}

/// The image by its manifest, as `open` takes it.
fn by_digest(source: &ImageSource) -> String {
    match name_of(source) {
        Ok(name) => name.to_string(),
        // What was claimed was understood before; `open` says what is wrong with it.
        Err(_) => format!("docker://{}", source.reference),
    }
}

/// Where the indexes of an image are from, in words.
fn origins(prepared: &Prepared) -> String {
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    for layer in &prepared.layers {
        let word = match layer.origin {
            open::IndexOrigin::Given | open::IndexOrigin::Kept => "kept here",
            open::IndexOrigin::Published { .. } => "published",
            open::IndexOrigin::Contents { .. } => "the layers' own tables of contents",
            open::IndexOrigin::Read { .. } => "made by reading",
        };
        match counts.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word, 1)),
        }
    }
    let told: Vec<_> = counts.iter().map(|(word, count)| format!("{count} {word}")).collect();
    format!("indexes: {}", told.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_the_specifications() {
        // Of an image that containerd unpacked.
        let digest = |text: &[u8]| Digest::of(Algorithm::Sha256, text);
        let (a, b) = (digest(b"a"), digest(b"b"));
        assert_eq!(chain_id(None, &a), a);
        let both = format!("{a} {b}");
        assert_eq!(chain_id(Some(&a), &b), digest(both.as_bytes()));
    }

    #[test]
    fn verdicts_are_kept_and_the_last_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            root: dir.path().to_owned(),
            ..Config::default()
        };
        let images = Images::new(
            &config,
            TrustPolicy::default(),
            Cache::new(&dir.path().join("cache")).unwrap(),
        )
        .unwrap();
        let manifest = Digest::of(Algorithm::Sha256, b"m");
        images.judge("host/a:1", Some(&manifest), Ok(None));
        images.judge("host/a:1", Some(&manifest), Ok(Some("indexes: 2 published".to_owned())));
        // A second pull does not know where the indexes were from.
        images.judge("host/a:1", Some(&manifest), Ok(None));
        let declined = Declined::new(Reason::NoRanges, "no\nranges");
        images.judge("host/b:1", None, Err(&declined));
        let found = verdicts(dir.path()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].image.as_str(), found[0].reason),
            ("host/b:1", Some(Reason::NoRanges))
        );
        assert!(!found[0].detail.as_ref().unwrap().contains('\n'));
        assert_eq!(found[1].detail.as_deref(), Some("indexes: 2 published"));
        images.forget(&ImageSource {
            reference: "host/a:1".to_owned(),
            manifest,
        });
        assert_eq!(verdicts(dir.path()).unwrap().len(), 1);
        assert!(verdicts(&dir.path().join("none")).unwrap().is_empty());
    }
}
