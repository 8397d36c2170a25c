//! Published indexes for an image that is being opened. In: an image whose manifest is here, and what may be
//! used. Out: for each layer the hot part of its index: as it was kept the last time, or else as the registry has it.
//!
//! What is kept is used for the same layer in the same repository only, and under a pin only if the pinned artifact names the same
//! index. What was read on this machine ([`layer`](super::layer)) is no published index, and the reverse.

use std::path::PathBuf;
use std::thread;

use super::discover::{self, FoundBy, FoundIndex};
use super::index_cache::KeptHot;
use super::prepared::Published;
use super::{Cache, IndexChoice, OpenError, OpenOptions, is_of_the_disk};
use crate::fetch::IndexTrust;
use crate::index::Index;
use crate::source::Blob;
use crate::source::registry::{BlobPlace, Image, ImageLayer, ImageName, PullPolicy, Reference, Registry};

/// So many connections bring an image's indexes, and are opened before it is known what they are for: TCP starts slowly, and each
/// connection for itself.
const CONNECTIONS: u64 = 10;

/// What is known of a layer's published index before it is fetched.
#[derive(Debug)]
pub(super) enum Lead {
    /// None is wanted, or none is there.
    Nothing,
    /// Its hot part is here.
    Kept(Box<(KeptHot, Blob)>),
    /// It is there to be fetched.
    Found(Box<FoundIndex>),
}

/// Whether a layer without a published index is an error.
fn required(options: &OpenOptions) -> bool {
    options.index == IndexChoice::Require || options.index_digest.is_some()
}

/// Why an index is believed that was found beside the image.
fn trust_of(options: &OpenOptions) -> IndexTrust {
    if options.index_digest.is_some() {
        IndexTrust::Pin
    } else {
        IndexTrust::Registry
    }
}

/// The name of a repository in the cache.
fn repository(reference: &Reference) -> String {
    format!("{}/{}", reference.host, reference.repository)
}

/// Opens the connections that indexes will need, while the manifest is on its way; none for an image that was here before.
pub(super) fn warm_up(name: &ImageName, options: &OpenOptions) -> Result<(), OpenError> {
    let ImageName::Registry(reference) = name else {
        return Ok(());
    };
    let wanted = matches!(options.index, IndexChoice::Auto | IndexChoice::Require);
    let known = options
        .cache
        .as_ref()
        .is_some_and(|cache| cache.knows(&name.to_string()));
    if wanted && !known && options.registry.pull != PullPolicy::Never {
        let others = usize::try_from(CONNECTIONS - 1).unwrap_or_default();
        Registry::new(reference, &options.registry)?.warm_up(others);
    }
    Ok(())
}

/// Where the published indexes of an image's layers are, as far as they are wanted and there; for each layer one lead.
pub(super) fn find(name: &ImageName, image: &Image, options: &OpenOptions) -> Result<Vec<Lead>, OpenError> {
    let none = || image.layers.iter().map(|_| Lead::Nothing).collect();
    let no_indexes = || OpenError::NoIndexes { name: name.to_string() };
    let required = required(options);
    let ImageName::Registry(reference) = name else {
        let named = matches!(options.index, IndexChoice::Named(_));
        return if required && !named {
            Err(no_indexes())
        } else {
            Ok(none())
        };
    };
    match options.index {
        // A pin allows that index and no other.
        IndexChoice::Ignore | IndexChoice::Build if required => return Err(no_indexes()),
        IndexChoice::Ignore | IndexChoice::Build | IndexChoice::Named(_) => return Ok(none()),
        IndexChoice::Auto | IndexChoice::Require => {}
    }
    let registry = Registry::new(reference, &options.registry)?;
    let place = repository(reference);
    let kept = |layer: &ImageLayer| {
        let kept = options.cache.as_ref()?.hot(&place, &layer.descriptor.digest)?;
        let rest = registry.blob(&kept.digest, kept.index.file_len());
        Some(Box::new((kept, Blob::of_registry(rest))))
    };
    let mut leads = Vec::new();
    let mut asked = Vec::new();
    for layer in &image.layers {
        // What was read on this machine is as good, and here.
        let was_read = |cache: &Cache| {
            let digest = &layer.descriptor.digest;
            let unchecked = match &layer.place {
                BlobPlace::Registry(access) => {
                    cache.has_index(&Blob::of_registry(access.clone()).claimed(digest).unwrap_or_default())
                }
                BlobPlace::File(_) => false,
            };
            unchecked || cache.has_index(&digest.to_string())
        };
        let lead = match kept(layer) {
            _ if !required && options.cache.as_ref().is_some_and(was_read) => Lead::Nothing,
            // A pinned artifact has to say first that it is this one.
            Some(kept) if options.index_digest.is_none() => Lead::Kept(kept),
            _ => {
                asked.push(layer.clone());
                Lead::Nothing
            }
        };
        leads.push((layer, lead));
    }
    // Of a registry that is not to be asked, an artifact that is pinned may be kept.
    let is_silent = options.registry.pull == PullPolicy::Never && options.index_digest.is_none();
    let found = if asked.is_empty() || is_silent {
        Vec::new()
    } else {
        let wanted = Image {
            layers: asked.clone(),
            ..image.clone()
        };
        match discover::find_indexes(&registry, &wanted, options.index_digest.as_ref()) {
            Ok(found) => found,
            // Without them the layers can still be read.
            Err(error) if !required => {
                log::warn!("cannot look for published indexes: {error}");
                Vec::new()
            }
            Err(error) => return Err(error.into()),
        }
    };
    for (layer, found) in asked.iter().zip(found) {
        let (Some(found), Some((_, lead))) = (
            found,
            leads
                .iter_mut()
                .find(|(known, lead)| matches!(lead, Lead::Nothing) && known.descriptor == layer.descriptor),
        ) else {
            continue;
        };
        *lead = match kept(layer) {
            Some(kept) if kept.0.digest == found.listed.digest => Lead::Kept(kept),
            _ => Lead::Found(Box::new(found)),
        };
    }
    // Under `require` without a pin a layer's own table of contents will do as well.
    if options.index_digest.is_some() && leads.iter().any(|(_, lead)| matches!(lead, Lead::Nothing)) {
        return Err(no_indexes());
    }
    Ok(leads.into_iter().map(|(_, lead)| lead).collect())
}

/// Brings the hot parts of published indexes that are not here, all at the same time, and keeps them.
pub(super) fn fetch(
    name: &ImageName,
    image: &Image,
    leads: Vec<Lead>,
    options: &OpenOptions,
) -> Result<Vec<Option<Published>>, OpenError> {
    let required = required(options);
    let found = leads.iter().map(|lead| match lead {
        Lead::Found(found) => Some(&**found),
        Lead::Nothing | Lead::Kept(_) => None,
    });
    let pieces = discover::pieces(found, CONNECTIONS);
    let one = |layer: &ImageLayer, lead: Lead, pieces: u64| match lead {
        Lead::Nothing => Ok(None),
        Lead::Kept(kept) => {
            let (kept, rest) = *kept;
            discover::check_layer(&kept.index, layer).map_err(|cause| OpenError::Index {
                name: kept.path.display().to_string(),
                cause,
            })?;
            Ok(Some(Published {
                index: kept.index,
                rest,
                was_kept: true,
                kept: Some(kept.path),
                trust: trust_of(options),
            }))
        }
        Lead::Found(found) => {
            let (index, found) = match discover::fetch_hot_in(layer, &found, pieces, &options.http) {
                Ok(index) => (index, found),
                Err(error) => by_tag(name, layer, &found, options).ok_or(error)?,
            };
            let kept = keep(name, layer, &index, &found, options)?;
            Ok(Some(Published {
                index,
                rest: Blob::of_registry(found.access.clone()),
                was_kept: false,
                kept,
                trust: trust_of(options),
            }))
        }
    };
    thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = image
            .layers
            .iter()
            .zip(leads)
            .zip(pieces)
            .map(|((layer, lead), pieces)| scope.spawn(move || one(layer, lead, pieces)))
            .collect();
        let outcomes = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        outcomes
            .map(|outcome| match outcome {
                Err(error) if !required && !matches!(error, OpenError::Cache { .. }) => {
                    log::warn!("{error}; going on without it");
                    Ok(None)
                }
                outcome => outcome,
            })
            .collect()
    })
}

/// The index that a layer's tag names, after the one that a list of the image's named could not be used: lists outlive what is in
/// them. Who names an artifact wants what is in that.
fn by_tag(
    name: &ImageName,
    layer: &ImageLayer,
    failed: &FoundIndex,
    options: &OpenOptions,
) -> Option<(Index<Vec<u8>>, Box<FoundIndex>)> {
    let ImageName::Registry(reference) = name else {
        return None;
    };
    if failed.by != FoundBy::Image || options.index_digest.is_some() {
        return None;
    }
    let registry = Registry::new(reference, &options.registry).ok()?;
    let found = discover::find_of_layer(&registry, &layer.descriptor.digest).ok()??;
    let index = discover::fetch_hot(layer, &found, &options.http).ok()?;
    Some((index, Box::new(found)))
}

/// Keeps a hot part that was fetched. A full disk only means that it is fetched again next time.
fn keep(
    name: &ImageName,
    layer: &ImageLayer,
    index: &Index<Vec<u8>>,
    found: &FoundIndex,
    options: &OpenOptions,
) -> Result<Option<PathBuf>, OpenError> {
    let (ImageName::Registry(reference), Some(cache)) = (name, &options.cache) else {
        return Ok(None);
    };
    let place = repository(reference);
    match cache.keep_hot(&place, &layer.descriptor.digest, index, &found.listed.digest) {
        Ok(path) => Ok(Some(path)),
        Err(OpenError::Cache { path, cause }) if is_of_the_disk(&cause) => {
            log::warn!("cannot keep the index in {}: {cause}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
