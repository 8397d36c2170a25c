//! Working without servers. In: a name, when its server may be asked, and what is remembered. Out: what the name means, from
//! the server or from memory, and one line that says which, and how much of it is kept.

use std::sync::Arc;

use url::Url;

use super::names::show_time;
use super::{Cache, OpenError, OpenOptions, PreparedLayer};
use crate::cache::disk::{DiskCache, LayerKey};
use crate::digest::Digest;
use crate::layer::Coding;
use crate::source::registry::{self, PullPolicy, Recalled, RegistryOptions, patience_to_spare};
use crate::source::{Blob, Place, Source};

/// A layer by its name, from its server or from memory; in the latter case, that it was.
pub(super) fn find_blob(source: &Source, options: &OpenOptions) -> Result<(Blob, Option<Recalled>), OpenError> {
    let Source::Url(url) = source else {
        return Ok((super::find_blob(source, options)?, None));
    };
    let policy = options.registry.pull;
    let known = match (policy, &options.cache) {
        (PullPolicy::Always, _) | (_, None) => None,
        (_, Some(cache)) => cache.known_url(url),
    };
    let recall = |blob, at, because| Ok((blob, Some(Recalled { at, because })));
    match (policy, known) {
        (PullPolicy::Missing | PullPolicy::Never, Some((blob, at))) => recall(blob, at, None),
        (PullPolicy::Never, None) => Err(OpenError::NotKept {
            name: source.to_string(),
            what: "what lies there",
        }),
        (_, Some((blob, at))) => {
            let mut http = options.http;
            // It need not answer.
            http.retry.deadline = patience_to_spare(&http);
            http.timeouts = http.timeouts.at_most(http.retry.deadline / 2);
            let spare = OpenOptions {
                http,
                ..options.clone()
            };
            match super::find_blob(source, &spare) {
                Err(OpenError::Source(error)) if error.may_pass() => recall(blob, at, Some(error.to_string())),
                found => Ok(remember(url, found?, options)),
            }
        }
        (_, None) => Ok(remember(url, super::find_blob(source, options)?, options)),
    }
}

/// Notes what was found at a URL.
fn remember(url: &Url, blob: Blob, options: &OpenOptions) -> (Blob, Option<Recalled>) {
    if let (Some(cache), Place::Url(at)) = (&options.cache, &blob.place) {
        cache.know_url(url, at, blob.len);
    }
    (blob, None)
}

/// How a layer is prepared after its name was recalled: with no request at all, if there was no answer.
pub(super) fn options_after(recalled: Option<&Recalled>, options: &OpenOptions) -> OpenOptions {
    let is_offline = recalled.is_some_and(|recalled| recalled.because.is_some());
    OpenOptions {
        registry: RegistryOptions {
            pull: if is_offline {
                PullPolicy::Never
            } else {
                options.registry.pull
            },
            ..options.registry.clone()
        },
        ..options.clone()
    }
}

/// The digests of the layers that an image has, from what is remembered of it: no server is asked. None of anything that is no image, nor of
/// an image of which nothing is remembered.
///
/// # Errors
/// When the name makes no sense.
pub fn recalled_digests(text: &str, cache: &Cache) -> Result<Vec<Digest>, OpenError> {
    let Source::Image(name) = Source::parse(text)? else {
        return Ok(Vec::new());
    };
    let found = registry::find(
        &name,
        &RegistryOptions {
            pull: PullPolicy::Never,
            cache: Some(Arc::new(cache.clone())),
            ..RegistryOptions::default()
        },
    );
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            log::info!("{error}");
            return Ok(Vec::new());
        }
    };
    Ok(found.layers().map(|layer| layer.digest.clone()).collect())
}

/// Says that a name was recalled, and whether all that is needed is kept. Nothing is said where nobody was to be asked, unless
/// something is missing.
pub(super) fn tell(
    name: &str,
    digest: Option<&Digest>,
    recalled: Option<&Recalled>,
    layers: &[PreparedLayer],
    options: &OpenOptions,
) {
    let Some(Recalled { at, because }) = recalled else {
        return;
    };
    let digest = digest.map(|digest| format!(", {digest}")).unwrap_or_default();
    let using = format!("using what {name} was at {}{digest}", show_time(*at));
    let kept = show_kept(layers, options.cache.as_ref());
    match because {
        Some(because) => log::warn!("{because}; {using}, {kept}"),
        None => log::info!("{using}, {kept}"),
    }
}

/// How much of the layers is kept, in words.
fn show_kept(layers: &[PreparedLayer], cache: Option<&Cache>) -> String {
    let store = cache.and_then(|cache| cache.store().ok());
    let missing = layers.iter().filter(|layer| !is_whole(layer, store.as_ref())).count();
    match (missing, layers.len()) {
        (0, _) => "kept whole".to_owned(),
        (_, 1) => "not kept whole: reads of what is missing wait until its server can be reached".to_owned(),
        (missing, all) => format!(
            "{missing} of {all} layers are not kept whole: reads of what is missing wait until their server can be reached"
        ),
    }
}

/// Whether all of a layer is on this machine.
fn is_whole(layer: &PreparedLayer, store: Option<&Arc<DiskCache>>) -> bool {
    if !layer.layer.blob.is_remote() {
        return true;
    }
    let coded = layer.coding() != Coding::Plain;
    let len = layer
        .index
        .spans()
        .map_or(layer.layer.blob.len, crate::layer::SpanTable::tar_len);
    let key = LayerKey::of_layer(&layer.layer, coded, len);
    let (Some(store), Some(key)) = (store, key) else {
        return false;
    };
    store.holds_whole(key, len)
}
