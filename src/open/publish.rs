//! Publishing indexes beside an image. In: an image in a registry, and indexes that were made of its layers or taken from
//! another repository. Out: one small tagged manifest for each layer, found by the layer's digest alone, and one artifact for the
//! image, found by who knows the image.
//!
//! Nothing is published that was not checked against the manifest's digests.

use super::artifact::{
    EMPTY_CONFIG, Listed, empty_config, layer_tag, manifest, manifest_descriptor, parse as parse_manifest,
};
use super::discover::{check_layer, find_indexes, hot_digest};
use super::record::{algorithms, coding_of};
use super::{MAX_INDEX_BYTES, OpenError, Recording, Watch, record_blob};
use crate::digest::{Algorithm, Digest};
use crate::index::build::Contents;
use crate::index::{ColdPart, Index, IndexError};
use crate::source::registry::{
    Image, ImageLayer, ImageName, OCI_MANIFEST, Reference, Registry, RegistryOptions, Version,
};
use crate::source::{self, SourceError, registry};

/// A layer, what became of its index, and where that is now.
pub type LayerIndex = (ImageLayer, Published, Option<Listed>);

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

/// Told what publishing is doing, layer by layer.
pub trait PublishWatch: Watch {
    /// Layer `number` of `of` is next; its blob's digest.
    fn layer(&mut self, number: usize, of: usize, layer: &Digest);
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
}

/// Makes indexes of an image's layers and publishes them in the image's repository. What others have published for a layer is
/// used again, unless `anew`.
///
/// # Errors
/// [`OpenError`]: the registry does not take them, or a layer is not what the manifest says.
pub fn push(
    reference: &Reference,
    options: &RegistryOptions,
    spacing: u64,
    anew: bool,
    watch: &mut dyn PublishWatch,
) -> Result<Publication, OpenError> {
    let name = ImageName::Registry(reference.clone());
    let image = registry::resolve(&name, options)?;
    let registry = Registry::new(reference, options)?;
    let mut layers: Vec<LayerIndex> = Vec::new();
    for (number, layer) in image.layers.iter().enumerate() {
        let digest = &layer.descriptor.digest;
        watch.layer(number, image.layers.len(), digest);
        let same = layers.iter().find(|(known, ..)| known.descriptor.digest == *digest);
        if let Some((_, _, listed)) = same {
            layers.push((layer.clone(), Published::Kept, listed.clone()));
            continue;
        }
        let kept = if anew {
            None
        } else {
            tagged(&registry, &name, layer, options)?
        };
        let (listed, how) = match kept {
            Some(listed) => (listed, Published::Kept),
            None => (
                push_made(&registry, &name, layer, options, spacing, watch)?,
                Published::Made,
            ),
        };
        layers.push((layer.clone(), how, Some(listed)));
    }
    publish(&registry, &image, layers)
}

/// The index that a layer's tag names, if it is a good one with everything in it.
fn tagged(
    registry: &Registry,
    image: &ImageName,
    layer: &ImageLayer,
    options: &RegistryOptions,
) -> Result<Option<Listed>, OpenError> {
    let manifest = match registry.manifest(&layer_tag(&layer.descriptor.digest)) {
        Ok(manifest) => manifest,
        Err(error) if error.is_absence() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let listed = parse_manifest(&manifest.bytes).unwrap_or_default();
    let Some(listed) = listed
        .into_iter()
        .find(|listed| listed.layer == layer.descriptor.digest)
    else {
        return Ok(None);
    };
    match whole_index(registry, image, layer, &listed, options) {
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
    image: &ImageName,
    layer: &ImageLayer,
    listed: &Listed,
    options: &RegistryOptions,
) -> Result<Index<Vec<u8>>, OpenError> {
    let access = registry.blob(&listed.digest, listed.size);
    let bad = |cause| OpenError::Index {
        name: format!("index {}", access.name()),
        cause,
    };
    let blob = source::open_registry_blob(image, &access)?;
    if blob.len > MAX_INDEX_BYTES {
        return Err(bad(crate::index::IndexFault::TooLarge("file").into()));
    }
    let bytes = source::read_range(&blob, 0..blob.len, &options.patience)?;
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
    Ok(index)
}

/// Makes a layer's index by reading all of it, and puts it and the layer's tag into the registry.
fn push_made(
    registry: &Registry,
    image: &ImageName,
    layer: &ImageLayer,
    options: &RegistryOptions,
    spacing: u64,
    watch: &mut dyn PublishWatch,
) -> Result<Listed, OpenError> {
    let blob = source::open_layer(image, layer)?;
    let recording = Recording {
        contents: Contents::FULL,
        spacing,
    };
    let coding = coding_of(&blob, &options.patience)?;
    let mut reached = |at| watch.headers(at, blob.len);
    let recorded = record_blob(
        &blob,
        coding,
        &recording,
        algorithms(Some(&layer.descriptor.digest), layer.diff_id.as_ref()),
        &options.patience,
        &mut reached,
        &mut |_, _| (),
    )?;
    let bad = |cause: IndexError| OpenError::Index {
        name: format!("layer {} of {image}", layer.descriptor.digest),
        cause,
    };
    let index = Index::open(recorded.index).map_err(bad)?;
    // The digest of what was read is the manifest's, or nothing is published.
    check_layer(&index, layer).map_err(bad)?;
    let listed = listed(&index, &layer.descriptor.digest);
    put(registry, &listed, index.as_bytes())?;
    Ok(listed)
}

/// How a manifest names the index of the layer whose blob has this digest.
#[must_use]
pub fn listed(index: &Index<Vec<u8>>, layer: &Digest) -> Listed {
    Listed {
        layer: layer.clone(),
        digest: Digest::of(Algorithm::Sha256, index.as_bytes()),
        size: index.file_len(),
        hot: Some((index.hot_len(), hot_digest(index))),
    }
}

/// Puts an index and its layer's tag into the registry.
fn put(registry: &Registry, listed: &Listed, bytes: &[u8]) -> Result<(), SourceError> {
    registry.push_blob(&listed.digest, bytes)?;
    put_tag(registry, listed)
}

fn put_tag(registry: &Registry, listed: &Listed) -> Result<(), SourceError> {
    registry.push_blob(&empty_config().digest, EMPTY_CONFIG)?;
    let manifest = manifest(std::slice::from_ref(listed), None);
    registry.push_manifest(&layer_tag(&listed.layer), OCI_MANIFEST, &manifest)?;
    Ok(())
}

/// Puts the image's artifact into the registry, when all of its layers have indexes.
fn publish(registry: &Registry, image: &Image, layers: Vec<LayerIndex>) -> Result<Publication, OpenError> {
    let listed: Option<Vec<Listed>> = layers.iter().map(|(_, _, listed)| listed.clone()).collect();
    let artifact = match listed {
        Some(listed) if !listed.is_empty() => {
            registry.push_blob(&empty_config().digest, EMPTY_CONFIG)?;
            let own = registry.manifest(&Version::Digest(image.manifest_digest.clone()))?;
            let len = u64::try_from(own.bytes.len()).unwrap_or(u64::MAX);
            let bytes = manifest(&listed, Some((&own.media_type, &own.digest, len)));
            let entry = manifest_descriptor(&bytes);
            registry.push_referrer(&image.manifest_digest, &entry, &bytes)?;
            Some(entry.digest)
        }
        _ => None,
    };
    Ok(Publication {
        image: image.manifest_digest.clone(),
        artifact,
        layers,
    })
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
    let found = find_indexes(&there, &wanted, None)?;
    let mut layers: Vec<LayerIndex> = Vec::new();
    for (number, (layer, found)) in image.layers.iter().zip(found).enumerate() {
        watch.layer(number, image.layers.len(), &layer.descriptor.digest);
        let Some(found) = found else {
            layers.push((layer.clone(), Published::Missing, None));
            continue;
        };
        let index = match whole_index(&there, &source_name, layer, &found.listed, options) {
            Ok(index) => index,
            // Anybody may have put it there.
            Err(error @ OpenError::Index { .. }) => {
                log::warn!("{error}; not copied");
                layers.push((layer.clone(), Published::Missing, None));
                continue;
            }
            Err(error) => return Err(error),
        };
        // What the other manifest says of it is not passed on: this one says what the index says.
        let listed = listed(&index, &layer.descriptor.digest);
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
    publish(&here, &image, layers)
}
