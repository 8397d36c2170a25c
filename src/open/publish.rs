//! Publishing indexes beside an image. In: an image in a registry, and indexes that were made of its layers or taken from
//! another repository. Out: one small tagged manifest for each layer, found by the layer's digest alone, and one artifact for the
//! image, found by who knows the image.
//!
//! Nothing is published that was not checked against the manifest's digests.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use super::artifact::{
    EMPTY_CONFIG, Listed, empty_config, layer_tag, manifest, manifest_descriptor, naming, parse as parse_manifest,
    with_profile,
};
use super::discover::{artifact_of, check_layer, find_beside, find_indexes, hot_digest};
use super::prepared::named_if_foreign;
use super::record::algorithms;
use super::trust::{SigningKey, TrustPolicy};
use super::{MAX_INDEX_BYTES, OpenError, Reading, Recording, SizeLimit, Unwatched, Watch, record_blob};
use crate::digest::{Algorithm, Digest};
use crate::index::build::Contents;
use crate::index::{ColdPart, Index, IndexError};
use crate::profile::Profile;
use crate::source::registry::{
    Image, ImageLayer, ImageName, OCI_MANIFEST, Reference, Registry, RegistryOptions, Version,
};
use crate::source::{self, Blob, SourceError, registry};

/// A layer, what became of its index, and where that is now.
pub type LayerIndex = (ImageLayer, Published, Option<Listed>);

/// So many layers are read at the same time at most.
const MOST_AT_ONCE: usize = 8;

/// What publishing did with one layer's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Published {
    /// It was made from the layer.
    Made,
    /// It was there already.
    Kept,
    /// It was copied from another repository.
    Copied,
    /// The other repository has none.
    Missing,
}

/// Told what publishing is doing. Layers may be read at the same time; how far they are is told of all together.
pub trait PublishWatch: Watch {
    /// Layer `number` of `of` is begun; its blob's digest.
    fn layer(&mut self, number: usize, of: usize, layer: &Digest);
}

impl PublishWatch for Unwatched {
    fn layer(&mut self, _number: usize, _of: usize, _layer: &Digest) {}
}

/// What was published.
#[derive(Clone, Debug)]
pub struct Publication {
    /// The image's own manifest.
    pub image: Digest,
    /// The artifact that refers to it; none when a layer has no index.
    pub artifact: Option<Digest>,
    /// For each layer its blob and what became of its index, the lowest first.
    pub layers: Vec<LayerIndex>,
    /// The tag and the digest of a manifest of the image that names its indexes, if one was written.
    pub into: Option<(String, Digest)>,
    /// The tags that hold all of this in the repository now: one for each different layer that has an index, and the image's
    /// list of referrers where the registry has no API for that.
    pub tags: Vec<String>,
}

/// How indexes are published.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// The distance of entry points into compressed layers, in bytes of the tar; what their compression usually has if none is said.
    pub spacing: Option<u64>,
    /// Whether indexes are made also of layers that have one.
    pub anew: bool,
    /// How long a layer may be.
    pub size: SizeLimit,
    /// What signs them.
    pub sign: Option<Arc<SigningKey>>,
    /// The tag of a manifest of the same image that names them; none is written without.
    pub into: Option<String>,
    /// Whose indexes are taken in place of new ones where this publication vouches for them: where it signs them or an image
    /// names them.
    pub trust: TrustPolicy,
}

impl PushOptions {
    /// With entry points `spacing` bytes apart, or as far as is usual, of layers without an index, which may be as long as layers are.
    #[must_use]
    pub fn new(spacing: impl Into<Option<u64>>) -> Self {
        Self {
            spacing: spacing.into(),
            anew: false,
            size: SizeLimit::default(),
            sign: None,
            into: None,
            trust: TrustPolicy::default(),
        }
    }

    /// Whether the publication says of indexes that they are true, whoever made them.
    fn vouches(&self) -> bool {
        self.sign.is_some() || self.into.is_some()
    }

    /// Whose indexes are taken: those that this key has signed before as well.
    fn policy(&self) -> TrustPolicy {
        let mut policy = self.trust.clone();
        policy.keys.extend(self.sign.as_ref().map(|key| key.public()));
        policy
    }
}

/// Makes indexes of an image's layers, several at the same time, and publishes them in the image's repository. What others have published for a layer is
/// used again, unless it is to be made anew, or this publication would vouch for what nobody believed vouches for: whoever may write to
/// the repository could have put it there.
///
/// # Errors
/// [`OpenError`]: the registry does not take them, or a layer is not what the manifest says.
pub fn push(
    reference: &Reference,
    options: &RegistryOptions,
    how: &PushOptions,
    watch: &mut dyn PublishWatch,
) -> Result<Publication, OpenError> {
    push_indexes(reference, options, how, watch)?.publish(None)
}

/// Indexes that are in an image's repository, each by its layer's tag; nothing refers to the image yet.
#[derive(Debug)]
pub struct PushedIndexes {
    registry: Registry,
    image: Image,
    layers: Vec<LayerIndex>,
    /// The tag of a manifest that is to name them.
    into: Option<String>,
}

impl PushedIndexes {
    /// Puts the artifact into the repository by which the indexes are found, and with them a profile, if there is one.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn publish(self, profile: Option<&Profile>) -> Result<Publication, OpenError> {
        let Self {
            registry,
            image,
            layers,
            into,
        } = self;
        let mut publication = publish(&registry, &image, layers, profile)?;
        if let Some(tag) = &into {
            publication.into = Some(name_in(&registry, &image, tag, &publication.layers, profile)?);
        }
        Ok(publication)
    }
}

/// The first half of [`push`]: the indexes themselves.
///
/// # Errors
/// As [`push`].
pub fn push_indexes(
    reference: &Reference,
    options: &RegistryOptions,
    how: &PushOptions,
    watch: &mut dyn PublishWatch,
) -> Result<PushedIndexes, OpenError> {
    let name = ImageName::Registry(reference.clone());
    let image = registry::resolve(&name, options)?;
    let registry = Registry::new(reference, options)?;
    // An image may have a layer twice; its index is made once.
    let mut wanted: Vec<&ImageLayer> = Vec::new();
    for layer in &image.layers {
        if !wanted
            .iter()
            .any(|known| known.descriptor.digest == layer.descriptor.digest)
        {
            wanted.push(layer);
        }
    }
    let one = |layer: &&ImageLayer, reached: Reached<'_>| {
        let kept = if how.anew {
            None
        } else {
            tagged(&registry, layer, options, how)?
        };
        if let Some(listed) = kept {
            let (listed, is_new) = signed(listed, how)?;
            return Ok((listed, if is_new { Made::Signature } else { Made::Nothing }));
        }
        let index = made_of(&name, layer, options, how, reached)?;
        let (listed, _) = signed(listed(&index, &layer.descriptor.digest), how)?;
        Ok((listed, Made::Index(Box::new(index))))
    };
    let made = at_the_same_time(&wanted, &one, Some(watch))?;
    // Only now: of an image with a layer that is not what its manifest says nothing is published. First what all of it shares:
    // registries that are sent one blob several times at once lose it for a moment.
    put_config(&registry)?;
    let numbered: Vec<_> = wanted.iter().zip(&made).collect();
    at_the_same_time(
        &numbered,
        &|(_, (listed, made)), _| match made {
            Made::Index(index) => Ok(put(&registry, listed, index.as_bytes())?),
            Made::Signature => Ok(put_tag(&registry, listed)?),
            Made::Nothing => Ok(()),
        },
        None,
    )?;
    let mut layers: Vec<LayerIndex> = Vec::new();
    for layer in &image.layers {
        let at = wanted
            .iter()
            .position(|known| known.descriptor.digest == layer.descriptor.digest);
        let made = at.and_then(|at| made.get(at));
        let again = layers
            .iter()
            .any(|(known, ..)| known.descriptor.digest == layer.descriptor.digest);
        if let Some((listed, made)) = made {
            let how = match made {
                Made::Index(_) if !again => Published::Made,
                _ => Published::Kept,
            };
            layers.push((layer.clone(), how, Some(listed.clone())));
        }
    }
    Ok(PushedIndexes {
        registry,
        image,
        layers,
        into: how.into.clone(),
    })
}

/// What was made for a layer.
enum Made {
    Index(Box<Index<Vec<u8>>>),
    /// The index was there, and is signed anew.
    Signature,
    /// All was there.
    Nothing,
}

/// An index with this publication's signature, unless it has that; says whether it is new. Those of others stay.
fn signed(mut listed: Listed, how: &PushOptions) -> Result<(Listed, bool), OpenError> {
    let Some(key) = &how.sign else {
        return Ok((listed, false));
    };
    if TrustPolicy::of_keys(vec![key.public()]).signer(&listed).is_some() {
        return Ok((listed, false));
    }
    let signature = key.sign(&listed)?;
    listed.signatures.retain(|other| other.key != signature.key);
    listed.signatures.push(signature);
    Ok((listed, true))
}

/// Puts a manifest into the repository that is the image's own but for an annotation that names the indexes, under a tag of its own.
fn name_in(
    registry: &Registry,
    image: &Image,
    tag: &str,
    layers: &[LayerIndex],
    profile: Option<&Profile>,
) -> Result<(String, Digest), OpenError> {
    let own = registry.manifest(&Version::Digest(image.manifest_digest.clone()))?;
    let listed: Vec<Listed> = layers.iter().filter_map(|(_, _, listed)| listed.clone()).collect();
    let named = naming(&own.bytes, &listed).and_then(|named| match profile {
        Some(profile) => with_profile(&named, profile),
        None => Ok(named),
    });
    let bytes = named.map_err(|why| SourceError::Image {
        name: image.name.clone(),
        why,
    })?;
    registry.push_manifest(&Version::Tag(tag.to_owned()), &own.media_type, &bytes)?;
    Ok((tag.to_owned(), Digest::of(Algorithm::Sha256, &bytes)))
}

/// A layer, and perhaps something that belongs to it.
trait OfLayer {
    fn layer(&self) -> &ImageLayer;
}

impl OfLayer for &ImageLayer {
    fn layer(&self) -> &ImageLayer {
        self
    }
}

impl<T> OfLayer for (&&ImageLayer, &T) {
    fn layer(&self) -> &ImageLayer {
        self.0
    }
}

/// Told how much of a layer's blob was read, in bytes.
type Reached<'a> = &'a mut dyn FnMut(u64);

/// Does `one` with several layers at a time, as many as there are processors, and tells how far all of them are together. After
/// a failure no other one is begun; of several failures the lowest layer's is returned.
fn at_the_same_time<L: OfLayer + Sync, T: Send>(
    layers: &[L],
    one: &(impl Fn(&L, Reached<'_>) -> Result<T, OpenError> + Sync),
    mut watch: Option<&mut dyn PublishWatch>,
) -> Result<Vec<T>, OpenError> {
    enum Said {
        Began(usize),
        Reached(usize, u64),
    }
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .clamp(1, MOST_AT_ONCE);
    let total = layers
        .iter()
        .fold(0_u64, |sum, layer| sum.saturating_add(layer.layer().descriptor.size));
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let outcomes: Vec<Mutex<Option<Result<T, OpenError>>>> = layers.iter().map(|_| Mutex::default()).collect();
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads.min(layers.len()) {
            let (tell, next, failed, outcomes) = (tell.clone(), &next, &failed, &outcomes);
            scope.spawn(move || {
                // Who listens goes first only when everything ends.
                let say = |said| drop(tell.send(said));
                while !failed.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let (Some(layer), Some(place)) = (layers.get(number), outcomes.get(number)) else {
                        return;
                    };
                    say(Said::Began(number));
                    let outcome = one(layer, &mut |at| say(Said::Reached(number, at)));
                    failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
                    say(Said::Reached(number, layer.layer().descriptor.size));
                    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                }
            });
        }
        drop(tell);
        let mut reached = vec![0; layers.len()];
        for said in told {
            let Some(watch) = watch.as_deref_mut() else { continue };
            match said {
                Said::Began(number) => watch.layer(number, layers.len(), &layers[number].layer().descriptor.digest),
                Said::Reached(number, at) => {
                    reached[number] = at;
                    watch.reading(Reading::Download, reached.iter().sum(), total);
                }
            }
        }
    });
    outcomes
        .into_iter()
        .filter_map(|outcome| outcome.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// The index that a layer's tag names, if it is a good one with everything in it; and one that somebody vouches for who is believed, if
/// this publication is to vouch for it.
fn tagged(
    registry: &Registry,
    layer: &ImageLayer,
    options: &RegistryOptions,
    how: &PushOptions,
) -> Result<Option<Listed>, OpenError> {
    let manifest = match registry.manifest(&layer_tag(&layer.descriptor.digest)) {
        Ok(manifest) => manifest,
        // A registry that is busy has it perhaps, and making it anew is long.
        Err(error) if error.may_pass() => return Err(error.into()),
        Err(_) => return Ok(None),
    };
    let listed = parse_manifest(&manifest.bytes).unwrap_or_default();
    let Some(listed) = listed
        .into_iter()
        .find(|listed| listed.layer == layer.descriptor.digest)
    else {
        return Ok(None);
    };
    if how.vouches() && how.policy().of_listed(&registry.name(), &listed).is_none() {
        log::info!(
            "layer {}: nothing vouches for the index that is there; making a new one",
            listed.layer
        );
        return Ok(None);
    }
    match whole_index(registry, layer, &listed, options) {
        Ok(index) if index.cold().has(ColdPart::Headers) && index.cold().has(ColdPart::PayloadDigests) => {
            Ok(Some(listed))
        }
        Ok(_) => Ok(None),
        Err(error) => {
            log::warn!("{error}; making a new one");
            Ok(None)
        }
    }
}

/// Brings an index whole, checked against its digest and the layer.
fn whole_index(
    registry: &Registry,
    layer: &ImageLayer,
    listed: &Listed,
    options: &RegistryOptions,
) -> Result<Index<Vec<u8>>, OpenError> {
    let access = registry.blob(&listed.digest, listed.size);
    let bad = |cause| OpenError::Index {
        name: format!("index {}", access.name()),
        cause,
    };
    let blob = Blob::of_registry(access.clone());
    if blob.len > MAX_INDEX_BYTES {
        return Err(bad(crate::index::IndexFault::TooLarge("file").into()));
    }
    let bytes = source::read_range(&blob, 0..blob.len, &options.http)?;
    if !listed.digest.matches(&bytes) {
        return Err(SourceError::Digest {
            name: access.name(),
            what: "index",
            expected: listed.digest.to_string(),
        }
        .into());
    }
    let index = Index::open(bytes).map_err(bad)?;
    check_layer(&index, layer).map_err(bad)?;
    index.verify().map_err(bad)?;
    if index.is_outdated_for_images().map_err(bad)? {
        return Err(bad(crate::index::IndexFault::Outdated.into()));
    }
    Ok(index)
}

/// Makes a layer's index by reading all of it.
fn made_of(
    image: &ImageName,
    layer: &ImageLayer,
    options: &RegistryOptions,
    how: &PushOptions,
    reached: Reached<'_>,
) -> Result<Index<Vec<u8>>, OpenError> {
    let blob = source::layer_blob(image, layer)?;
    let recording = Recording {
        contents: Contents::FULL,
        spacing: how.spacing,
        size: how.size,
    };
    let recorded = record_blob(
        &blob,
        &recording,
        algorithms(Some(&layer.descriptor.digest), layer.diff_id.as_ref()),
        &options.http,
        reached,
        &mut |_, _| (),
    )
    .map_err(|error| named_if_foreign(error, &blob.name, layer.descriptor.foreign().as_deref()))?;
    let bad = |cause: IndexError| OpenError::Index {
        name: format!("layer {} of {image}", layer.descriptor.digest),
        cause,
    };
    let index = Index::open(recorded.index).map_err(bad)?;
    // The digest of what was read is the manifest's, or nothing is published.
    check_layer(&index, layer).map_err(bad)?;
    Ok(index)
}

/// How a manifest names the index of the layer whose blob has this digest.
#[must_use]
pub fn listed(index: &Index<Vec<u8>>, layer: &Digest) -> Listed {
    Listed {
        layer: layer.clone(),
        digest: Digest::of(Algorithm::Sha256, index.as_bytes()),
        size: index.file_len(),
        hot: Some((index.hot_len(), hot_digest(index))),
        signatures: Vec::new(),
    }
}

/// Puts the configuration into the registry that all manifests of indexes name.
fn put_config(registry: &Registry) -> Result<(), SourceError> {
    registry.push_blob(&empty_config().digest, EMPTY_CONFIG)
}

/// Puts an index and its layer's tag into the registry.
fn put(registry: &Registry, listed: &Listed, bytes: &[u8]) -> Result<(), SourceError> {
    registry.push_blob(&listed.digest, bytes)?;
    put_tag(registry, listed)
}

fn put_tag(registry: &Registry, listed: &Listed) -> Result<(), SourceError> {
    let manifest = manifest(std::slice::from_ref(listed), None);
    registry.push_manifest(&layer_tag(&listed.layer), OCI_MANIFEST, &manifest)?;
    Ok(())
}

/// Puts the image's artifact into the registry, when all of its layers have indexes.
fn publish(
    registry: &Registry,
    image: &Image,
    layers: Vec<LayerIndex>,
    profile: Option<&Profile>,
) -> Result<Publication, OpenError> {
    let listed: Option<Vec<Listed>> = layers.iter().map(|(_, _, listed)| listed.clone()).collect();
    let mut tags: Vec<String> = Vec::new();
    for (_, _, listed) in &layers {
        let tag = listed.as_ref().map(|listed| layer_tag(&listed.layer).to_string());
        tags.extend(tag.filter(|tag| !tags.contains(tag)));
    }
    let artifact = match listed {
        Some(listed) if !listed.is_empty() => {
            let (digest, listed_by) = put_artifact(registry, image, &listed, profile, None)?;
            tags.extend(listed_by);
            Some(digest)
        }
        _ => None,
    };
    Ok(Publication {
        image: image.manifest_digest.clone(),
        artifact,
        into: None,
        layers,
        tags,
    })
}

/// Puts an image's artifact into the registry, in place of the one with the digest `before`; its digest, and the tag that lists it, if one
/// is needed.
fn put_artifact(
    registry: &Registry,
    image: &Image,
    listed: &[Listed],
    profile: Option<&Profile>,
    before: Option<&Digest>,
) -> Result<(Digest, Option<String>), OpenError> {
    let own = registry.manifest(&Version::Digest(image.manifest_digest.clone()))?;
    let len = u64::try_from(own.bytes.len()).unwrap_or(u64::MAX);
    let mut bytes = manifest(listed, Some((&own.media_type, &own.digest, len)));
    if let Some(profile) = profile {
        bytes = with_profile(&bytes, profile).map_err(|why| SourceError::Image {
            name: image.name.clone(),
            why,
        })?;
    }
    let entry = manifest_descriptor(&bytes);
    let listed_by = registry.replace_referrer(&image.manifest_digest, before, &entry, &bytes)?;
    Ok((entry.digest, listed_by.map(|tag| tag.to_string())))
}

/// What became of a profile that was published.
#[derive(Clone, Debug)]
pub struct PublishedProfile {
    /// The image's own manifest.
    pub image: Digest,
    /// The artifact that holds the profile, beside the indexes of the image if there are any.
    pub artifact: Digest,
    /// How many indexes that are.
    pub indexes: usize,
    /// The tag that lists the artifact, where the registry has no referrers API.
    pub tag: Option<String>,
}

/// Publishes a profile of an image, in the artifact that holds the image's indexes, if there is one: that one is written anew.
///
/// # Errors
/// [`OpenError`].
pub fn push_profile(
    reference: &Reference,
    options: &RegistryOptions,
    profile: &Profile,
) -> Result<PublishedProfile, OpenError> {
    let image = registry::resolve(&ImageName::Registry(reference.clone()), options)?;
    let registry = Registry::new(reference, options)?;
    let before = artifact_of(&registry, &image)?;
    let (digest, indexes) = before.map_or((None, Vec::new()), |(digest, indexes)| (Some(digest), indexes));
    put_config(&registry)?;
    let (artifact, tag) = put_artifact(&registry, &image, &indexes, Some(profile), digest.as_ref())?;
    Ok(PublishedProfile {
        image: image.manifest_digest,
        artifact,
        indexes: indexes.len(),
        tag,
    })
}

/// The profile that is published beside an image, if there is one.
///
/// # Errors
/// [`OpenError`].
pub fn published_profile(reference: &Reference, options: &RegistryOptions) -> Result<Option<Profile>, OpenError> {
    let image = registry::resolve(&ImageName::Registry(reference.clone()), options)?;
    let registry = Registry::new(reference, options)?;
    Ok(find_beside(&registry, &image, None, &TrustPolicy::of_registry())?.profile)
}

/// Publishes for the image `to` the indexes that are published for its layers in the repository of `from`, however they are found
/// there. The image itself is not copied.
///
/// # Errors
/// [`OpenError`]; that there is no index to copy.
pub fn copy(
    from: &Reference,
    to: &Reference,
    options: &RegistryOptions,
    watch: &mut dyn PublishWatch,
) -> Result<Publication, OpenError> {
    let (source_name, name) = (ImageName::Registry(from.clone()), ImageName::Registry(to.clone()));
    let origin = registry::resolve(&source_name, options)?;
    let image = registry::resolve(&name, options)?;
    let (there, here) = (Registry::new(from, options)?, Registry::new(to, options)?);
    // Looked for by the layers of the image that they are for: the two may share only some.
    let wanted = Image {
        layers: image.layers.clone(),
        ..origin
    };
    let found = find_indexes(&there, &wanted, None, &TrustPolicy::of_registry())?;
    if found.iter().any(Option::is_some) {
        put_config(&here)?;
    }
    let mut layers: Vec<LayerIndex> = Vec::new();
    for (number, (layer, found)) in image.layers.iter().zip(found).enumerate() {
        watch.layer(number, image.layers.len(), &layer.descriptor.digest);
        let Some(found) = found else {
            layers.push((layer.clone(), Published::Missing, None));
            continue;
        };
        let index = match whole_index(&there, layer, &found.listed, options) {
            Ok(index) => index,
            // Whoever may write to the repository can have put it there.
            Err(error @ OpenError::Index { .. }) => {
                log::warn!("{error}; not copied");
                layers.push((layer.clone(), Published::Missing, None));
                continue;
            }
            Err(error) => return Err(error),
        };
        // What the other manifest says of it is not passed on, but for signatures of the very same: this one says what the index says.
        let mut listed = listed(&index, &layer.descriptor.digest);
        if found.listed.statement() == listed.statement() {
            listed.signatures = found.listed.signatures;
        }
        if from.host == to.host && here.mount_blob(&listed.digest, from)? {
            put_tag(&here, &listed)?;
        } else {
            put(&here, &listed, index.as_bytes())?;
        }
        layers.push((layer.clone(), Published::Copied, Some(listed)));
    }
    if layers.iter().all(|(_, how, _)| *how == Published::Missing) {
        return Err(OpenError::NoIndexes {
            name: source_name.to_string(),
        });
    }
    publish(&here, &image, layers, None)
}
