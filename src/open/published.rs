//! Published indexes for an image that is being opened. In: an image whose manifest is here, and what may be
//! used. Out: for each layer the hot part of its index, if there is one that is believed: as it was kept the last time, or else as the
//! registry has it.
//!
//! What is kept is used for the same layer in the same repository only, and under a pin or for a manifest that names an index only if
//! it is that one. On whose word it came is not kept as such, because that changes: it is decided anew each time, by what the manifest
//! names, the signatures that came with it, and whom this command believes. So what was believed on the registry's word is not believed
//! later without it. What was read on this machine ([`layer`](super::layer)) is no published index, and the reverse.

use std::path::PathBuf;
use std::thread;

use super::artifact::{listed_with, profile_with};
use super::discover::{self, FoundBeside, FoundBy, FoundIndex};
use super::error::HOW_TO_BELIEVE;
use super::index_cache::KeptHot;
use super::prepared::Published;
use super::{Cache, IndexChoice, OpenError, OpenOptions, is_of_the_disk};
use crate::digest::Digest;
use crate::fetch::IndexTrust;
use crate::index::Index;
use crate::profile::Profile;
use crate::source::Blob;
use crate::source::registry::{BlobPlace, Image, ImageLayer, ImageName, PullPolicy, Registry};

/// So many connections bring an image's indexes, and are opened before it is known what they are for: TCP starts slowly, and each
/// connection for itself.
const CONNECTIONS: u64 = 10;

/// What is known of a layer's published index before it is fetched.
#[derive(Debug)]
pub(super) enum Lead {
    /// None is wanted, or none is there.
    Nothing,
    /// Its hot part is here.
    Kept(Box<KeptIndex>),
    /// It is there to be fetched, and believed then.
    Found(Box<FoundIndex>, IndexTrust),
    /// There is one that nothing vouches for.
    Unbelieved,
}

/// An index whose hot part is here.
#[derive(Debug)]
pub(super) struct KeptIndex {
    hot: KeptHot,
    /// Where all of it is.
    rest: Blob,
    /// On whose word it is believed.
    trust: IndexTrust,
}

/// What became of the published index of a layer.
#[derive(Debug)]
pub(super) enum Outcome {
    /// None is wanted, none is there, or it cannot be used.
    Nothing,
    /// It is used.
    Used(Box<Published>),
    /// There is one that nothing vouches for.
    Unbelieved,
}

/// Whether a layer without a published index is an error.
fn required(options: &OpenOptions) -> bool {
    options.index == IndexChoice::Require || options.index_digest.is_some()
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

/// Where the published indexes of an image's layers are, as far as they are wanted and there; for each layer one lead. And a profile of the
/// image, if one lies beside it and was met on the way.
pub(super) fn find(
    name: &ImageName,
    image: &Image,
    options: &OpenOptions,
) -> Result<(Vec<Lead>, Option<Profile>), OpenError> {
    let none = || (image.layers.iter().map(|_| Lead::Nothing).collect(), None);
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
    let place = reference.repository_name();
    let kept = |layer: &ImageLayer| options.cache.as_ref()?.hot(&place, &layer.descriptor.digest);
    let lead_to = |hot: KeptHot, trust| {
        let rest = Blob::of_registry(registry.blob(&hot.digest, hot.index.file_len()));
        Lead::Kept(Box::new(KeptIndex { hot, rest, trust }))
    };
    let named = listed_with(&image.annotations).unwrap_or_default();
    // Of what is kept, on whose word it is believed now.
    let believed = |layer: &ImageLayer, hot: &KeptHot| {
        let named = named.iter().find(|listed| listed.layer == layer.descriptor.digest);
        match named {
            Some(named) => hot.is(named).then_some(IndexTrust::Manifest),
            None => options.trust.of_listed(&place, &hot.listed(&layer.descriptor.digest)),
        }
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
        let lead = if !required && options.cache.as_ref().is_some_and(was_read) {
            Lead::Nothing
        } else {
            let kept = kept(layer).and_then(|hot| {
                // A pinned artifact has to say first that it is this one.
                let trust = believed(layer, &hot).filter(|_| options.index_digest.is_none())?;
                Some(lead_to(hot, trust))
            });
            kept.unwrap_or_else(|| {
                asked.push(layer.clone());
                Lead::Nothing
            })
        };
        leads.push((layer, lead));
    }
    // Of a registry that is not to be asked, an artifact that is pinned may be kept.
    let is_silent = options.registry.pull == PullPolicy::Never && options.index_digest.is_none();
    let found = if asked.is_empty() || is_silent {
        FoundBeside::without_indexes(profile_with(&image.annotations))
    } else {
        let wanted = Image {
            layers: asked.clone(),
            ..image.clone()
        };
        match discover::find_beside(&registry, &wanted, options.index_digest.as_ref(), &options.trust) {
            Ok(found) => found,
            // Without them the layers can still be read.
            Err(error) if !required => {
                log::warn!("cannot look for published indexes: {error}");
                FoundBeside::without_indexes(None)
            }
            Err(error) => return Err(error.into()),
        }
    };
    for (layer, found) in asked.iter().zip(found.indexes) {
        let (Some(found), Some((_, lead))) = (
            found,
            leads
                .iter_mut()
                .find(|(known, lead)| matches!(lead, Lead::Nothing) && known.descriptor == layer.descriptor),
        ) else {
            continue;
        };
        *lead = match (found.trust, kept(layer)) {
            (None, _) => Lead::Unbelieved,
            (Some(trust), Some(hot)) if hot.is(&found.listed) => {
                if hot.signatures != found.listed.signatures {
                    Cache::note_signatures(&hot, &found.listed);
                }
                lead_to(hot, trust)
            }
            (Some(trust), _) => Lead::Found(Box::new(found), trust),
        };
    }
    // Under `require` without a pin a layer's own table of contents will do as well.
    if options.index_digest.is_some() && leads.iter().any(|(_, lead)| matches!(lead, Lead::Nothing)) {
        return Err(no_indexes());
    }
    Ok((leads.into_iter().map(|(_, lead)| lead).collect(), found.profile))
}

/// Brings the hot parts of published indexes that are not here, all at the same time, and keeps them.
pub(super) fn fetch(
    name: &ImageName,
    image: &Image,
    leads: Vec<Lead>,
    options: &OpenOptions,
) -> Result<Vec<Outcome>, OpenError> {
    let required = required(options);
    let found = leads.iter().map(|lead| match lead {
        Lead::Found(found, _) => Some(&**found),
        Lead::Nothing | Lead::Kept(_) | Lead::Unbelieved => None,
    });
    let pieces = discover::pieces(found, CONNECTIONS);
    let one = |layer: &ImageLayer, lead: Lead, pieces: u64| match lead {
        Lead::Nothing => Ok(Outcome::Nothing),
        Lead::Unbelieved => Ok(Outcome::Unbelieved),
        Lead::Kept(kept) if !can_be_found_out(layer, kept.trust) => Ok(Outcome::Unbelieved),
        Lead::Found(_, trust) if !can_be_found_out(layer, trust) => Ok(Outcome::Unbelieved),
        Lead::Kept(kept) => {
            let KeptIndex { hot, rest, trust } = *kept;
            discover::check_layer(&hot.index, layer).map_err(|cause| OpenError::Index {
                name: hot.path.display().to_string(),
                cause,
            })?;
            Ok(Outcome::Used(Box::new(Published {
                index: hot.index,
                rest,
                was_kept: true,
                kept: Some(hot.path),
                trust,
            })))
        }
        Lead::Found(found, trust) => {
            let (index, found, trust) = match discover::fetch_hot_in(layer, &found, pieces, &options.http) {
                Ok(index) => (index, found, trust),
                Err(error) => by_tag(name, layer, &found, options).ok_or(error)?,
            };
            let kept = keep(name, &index, &found, options)?;
            Ok(Outcome::Used(Box::new(Published {
                index,
                rest: Blob::of_registry(found.access.clone()),
                was_kept: false,
                kept,
                trust,
            })))
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
                    Ok(Outcome::Nothing)
                }
                outcome => outcome,
            })
            .collect()
    })
}

/// Whether a lie would be found out in the end: what the registry merely says is believed only of a layer whose tar has a digest that
/// it will be compared with.
fn can_be_found_out(layer: &ImageLayer, trust: IndexTrust) -> bool {
    trust != IndexTrust::Registry || layer.diff_id.as_ref().and_then(Digest::sha256).is_some()
}

/// Says that there are indexes which are not used because nothing vouches for them, and what would.
pub(super) fn tell_unbelieved(name: &ImageName, outcomes: &[Outcome]) {
    let count = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Outcome::Unbelieved))
        .count();
    if count > 0 {
        log::warn!(
            "{name}: {count} of {} layers have indexes beside the image that nothing vouches for: going on without them; \
             {HOW_TO_BELIEVE}",
            outcomes.len()
        );
    }
}

/// The index that a layer's tag names, after the one that a list of the image's named could not be used: lists outlive what is in
/// them. Who names an artifact wants what is in that.
fn by_tag(
    name: &ImageName,
    layer: &ImageLayer,
    failed: &FoundIndex,
    options: &OpenOptions,
) -> Option<(Index<Vec<u8>>, Box<FoundIndex>, IndexTrust)> {
    let ImageName::Registry(reference) = name else {
        return None;
    };
    if failed.by != FoundBy::Image || options.index_digest.is_some() {
        return None;
    }
    let registry = Registry::new(reference, &options.registry).ok()?;
    let found = discover::find_of_layer(&registry, &layer.descriptor.digest, &options.trust).ok()??;
    let index = discover::fetch_hot(layer, &found, &options.http).ok()?;
    let trust = found.trust?;
    Some((index, Box::new(found), trust))
}

/// Keeps a hot part that was fetched. A full disk only means that it is fetched again next time.
fn keep(
    name: &ImageName,
    index: &Index<Vec<u8>>,
    found: &FoundIndex,
    options: &OpenOptions,
) -> Result<Option<PathBuf>, OpenError> {
    let (ImageName::Registry(reference), Some(cache)) = (name, &options.cache) else {
        return Ok(None);
    };
    let place = reference.repository_name();
    match cache.keep_hot(&place, index, &found.listed) {
        Ok(path) => Ok(Some(path)),
        Err(OpenError::Cache { path, cause }) if is_of_the_disk(&cause) => {
            log::warn!("cannot keep the index in {}: {cause}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
