//! Finding published indexes. In: an image in a registry. Out: for each of its layers where its index is, and
//! its hot part, checked against the layer that it is wanted for.
//!
//! What the image's manifest names needs no question. Then is asked, in this order: what refers to the image, by the referrers API and
//! its fallback tag at the same time (where a list says what is in the artifact, that is enough, else it is asked for); each layer's
//! tag; the `LazyPull-Digest` field of HEAD for the layer's blob. Of each index that is found it is told on whose word it is believed,
//! if it is ([`TrustPolicy`]); it says which layer it is of and is refused for another one; `--index-digest` takes one index and no
//! other.

use std::fmt;
use std::str::FromStr;
use std::thread;

use super::artifact::{
    ARTIFACT_TYPE, LAZY_PULL_HEADER, Listed, layer_tag, listed_with, parse, profile_of, profile_with,
};
use super::trust::TrustPolicy;
use super::{MAX_INDEX_BYTES, OpenError};
use crate::digest::{Algorithm, Digest};
use crate::fetch::IndexTrust;
use crate::http::{HttpOptions, without_secrets};
use crate::index::{self, Index, IndexError, IndexFault};
use crate::profile::Profile;
use crate::source::registry::{BlobAccess, Descriptor, Image, ImageLayer, Registry, Version};
use crate::source::{self, Blob, SourceError};

/// Where the index of a layer is to come from.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum IndexChoice {
    /// A published one, if there is a good one; else one that is kept, or the layer's own table of contents as far as it can be
    /// believed; else one that is made.
    #[default]
    Auto,
    /// A published one, or a table of contents of the layer that its manifest vouches for; without it the layer is not
    /// attached.
    Require,
    /// One that was made on this machine from all of the layer, now or before. Nothing published is looked for, in the layer
    /// neither.
    Ignore,
    /// One that is made now from all of the layer, whatever is kept or published.
    Build,
    /// This file or URL.
    Named(String),
}

impl fmt::Debug for IndexChoice {
    /// Without what is secret in a URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "Auto",
            Self::Require => "Require",
            Self::Ignore => "Ignore",
            Self::Build => "Build",
            Self::Named(name) => return write!(f, "Named({:?})", without_secrets(name)),
        })
    }
}

impl IndexChoice {
    /// The words that are no names of files.
    pub const WORDS: [&'static str; 4] = ["auto", "require", "ignore", "build"];

    /// The word that a mistyped one may have meant.
    pub(super) fn nearest_word(text: &str) -> Option<&'static str> {
        const MOST_WRONG: usize = 2;
        let text = text.to_ascii_lowercase();
        let near = |word: &&str| strsim::damerau_levenshtein(&text, word) <= MOST_WRONG;
        Self::WORDS.into_iter().find(near)
    }
}

impl FromStr for IndexChoice {
    type Err = String;

    /// One of the four words, or the name of a file or URL.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Self::Auto,
            "require" => Self::Require,
            "ignore" => Self::Ignore,
            "build" => Self::Build,
            "" => return Err("name a file or a URL, or auto, require, ignore or build".to_owned()),
            name => Self::Named(name.to_owned()),
        })
    }
}

/// How an index was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundBy {
    /// The image's own manifest names it.
    Manifest,
    /// In the image's artifact.
    Image,
    /// By the layer's tag.
    Layer,
    /// In a header field of the layer's blob.
    Header,
}

/// An index that is there to be fetched.
#[derive(Clone, Debug)]
pub struct FoundIndex {
    /// How to ask for its bytes, all or some of them.
    pub access: BlobAccess,
    /// What the manifest says of it.
    pub listed: Listed,
    /// How it was found.
    pub by: FoundBy,
    /// On whose word it is believed; `None` if it is not.
    pub trust: Option<IndexTrust>,
}

/// What is published beside an image.
#[derive(Clone, Debug)]
pub struct FoundBeside {
    /// For each layer, the lowest first, where its index is, if there is one.
    pub indexes: Vec<Option<FoundIndex>>,
    /// What starts of the image read, if that came with the answers. It is nobody's word for anything.
    pub profile: Option<Profile>,
}

impl FoundBeside {
    /// No index was looked for or found.
    pub(super) fn without_indexes(profile: Option<Profile>) -> Self {
        Self {
            indexes: Vec::new(),
            profile,
        }
    }
}

/// Looks for the indexes of an image's layers; one place for each layer, the lowest first. With `pin`, only in the artifact whose
/// manifest has that digest. Of several for a layer the first that is believed is taken, else the first. Waits; must not be called
/// from within a runtime.
///
/// # Errors
/// [`SourceError`] when the registry cannot be asked, or the pinned artifact is not there or holds no indexes. That nothing
/// was published is no error.
pub fn find_indexes(
    registry: &Registry,
    image: &Image,
    pin: Option<&Digest>,
    trust: &TrustPolicy,
) -> Result<Vec<Option<FoundIndex>>, SourceError> {
    Ok(find_beside(registry, image, pin, trust)?.indexes)
}

/// The same, and a profile if one lies there. For that nothing more is asked.
///
/// # Errors
/// As [`find_indexes`].
pub fn find_beside(
    registry: &Registry,
    image: &Image,
    pin: Option<&Digest>,
    trust: &TrustPolicy,
) -> Result<FoundBeside, SourceError> {
    let mut profile = profile_with(&image.annotations);
    let indexes = find_with(registry, image, pin, trust, &mut profile)?;
    Ok(FoundBeside { indexes, profile })
}

/// [`find_indexes`], which notes in `profile` what it meets.
fn find_with(
    registry: &Registry,
    image: &Image,
    pin: Option<&Digest>,
    trust: &TrustPolicy,
    profile: &mut Option<Profile>,
) -> Result<Vec<Option<FoundIndex>>, SourceError> {
    let found = |listed: Listed, by, trust| FoundIndex {
        access: registry.blob(&listed.digest, listed.size),
        listed,
        by,
        trust,
    };
    let layers = &image.layers;
    let pick = |all: &[Listed], by, trust| -> Vec<Option<FoundIndex>> {
        let of = |layer: &ImageLayer| all.iter().find(|listed| listed.layer == layer.descriptor.digest);
        let one = |layer: &ImageLayer| Some(found(of(layer)?.clone(), by, Some(trust)));
        layers.iter().map(one).collect()
    };
    if let Some(pin) = pin {
        let manifest = registry.manifest(&Version::Digest(pin.clone()))?;
        *profile = profile_of(&manifest.bytes).or(profile.take());
        return Ok(pick(
            &indexes_in(registry, pin, &manifest.bytes)?,
            FoundBy::Image,
            IndexTrust::Pin,
        ));
    }
    let named = listed_with(&image.annotations).unwrap_or_default();
    let mut all = pick(&named, FoundBy::Manifest, IndexTrust::Manifest);
    let is_settled = |found: &Option<FoundIndex>| found.as_ref().is_some_and(|found| found.trust.is_some());
    if all.iter().all(is_settled) {
        return Ok(all);
    }
    let repository = registry.name();
    let believes_any = trust.believes_any(&repository);
    published(registry, image, profile, &mut |listed| {
        for (place, layer) in all.iter_mut().zip(layers) {
            let Some(listed) = listed.iter().find(|listed| listed.layer == layer.descriptor.digest) else {
                continue;
            };
            let believed = trust.of_listed(&repository, listed);
            if place.is_none() || (believed.is_some() && !is_settled(place)) {
                *place = Some(found(listed.clone(), FoundBy::Image, believed));
            }
        }
        // What is not believed is looked for only to be told of.
        let enough = |place: &Option<FoundIndex>| is_settled(place) || (place.is_some() && !believes_any);
        all.iter().all(enough)
    })?;
    // A question for each layer that is left, all at the same time.
    let is_left = |known: &Option<FoundIndex>| known.is_none() || (believes_any && !is_settled(known));
    let answers: Vec<_> = thread::scope(|scope| {
        let ask = |(layer, known): (&ImageLayer, &Option<FoundIndex>)| {
            let digest = layer.descriptor.digest.clone();
            is_left(known).then(|| scope.spawn(move || of_layer(registry, &digest)))
        };
        let asked: Vec<_> = layers.iter().zip(&all).map(ask).collect();
        asked
            .into_iter()
            .map(|asked| asked.map(|asked| asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
            .collect()
    });
    for (place, answer) in all.iter_mut().zip(answers) {
        if let Some((listed, by)) = answer.transpose()?.flatten() {
            let believed = trust.of_listed(&repository, &listed);
            if place.is_none() || believed.is_some() {
                *place = Some(found(listed, by, believed));
            }
        }
    }
    Ok(all)
}

/// The indexes in the artifact with this digest.
fn artifact(registry: &Registry, digest: &Digest) -> Result<Vec<Listed>, SourceError> {
    let manifest = registry.manifest(&Version::Digest(digest.clone()))?;
    indexes_in(registry, digest, &manifest.bytes)
}

fn indexes_in(registry: &Registry, digest: &Digest, manifest: &[u8]) -> Result<Vec<Listed>, SourceError> {
    parse(manifest).map_err(|why| SourceError::Image {
        name: format!("{}@{digest}", registry.name()),
        why,
    })
}

/// The artifact with indexes that refers to an image and would be looked at first, and what it lists; none if there is none.
pub(super) fn artifact_of(registry: &Registry, image: &Image) -> Result<Option<(Digest, Vec<Listed>)>, SourceError> {
    let mut referrers = registry.referrers(&image.manifest_digest, Some(ARTIFACT_TYPE))?;
    referrers.sort_by_key(|referrer: &Descriptor| referrer.digest.to_string());
    let Some(first) = referrers.into_iter().next() else {
        return Ok(None);
    };
    let listed = match listed_with(&first.annotations) {
        Some(listed) => listed,
        None => artifact(registry, &first.digest)?,
    };
    Ok(Some((first.digest, listed)))
}

/// So many artifacts that refer to an image are looked at.
const MOST_ARTIFACTS: usize = 16;

/// Hands the indexes in the artifacts that refer to the image to `take`, until it says that it has enough. The one with the lowest
/// digest comes first, so that every machine takes the same. Of profiles that the list has, the one that was learned from the most runs
/// counts.
fn published(
    registry: &Registry,
    image: &Image,
    profile: &mut Option<Profile>,
    take: &mut dyn FnMut(&[Listed]) -> bool,
) -> Result<(), SourceError> {
    let mut referrers = registry.referrers(&image.manifest_digest, Some(ARTIFACT_TYPE))?;
    referrers.sort_by_key(|referrer: &Descriptor| referrer.digest.to_string());
    for found in referrers
        .iter()
        .take(MOST_ARTIFACTS)
        .filter_map(|referrer| profile_with(&referrer.annotations))
    {
        if profile.as_ref().is_none_or(|known| known.runs() < found.runs()) {
            *profile = Some(found);
        }
    }
    if referrers.len() > 1 {
        log::info!(
            "{}: {} artifacts with indexes; taking the first that is believed (--index-digest chooses)",
            image.name,
            referrers.len()
        );
    }
    for referrer in referrers.into_iter().take(MOST_ARTIFACTS) {
        let listed = match listed_with(&referrer.annotations) {
            Some(listed) => listed,
            None => match artifact(registry, &referrer.digest) {
                Ok(listed) => listed,
                // A list may name what is gone, or what anyone with write access put there.
                Err(error) => {
                    log::warn!("{}: cannot use the indexes in {}: {error}", image.name, referrer.digest);
                    continue;
                }
            },
        };
        if take(&listed) {
            break;
        }
    }
    Ok(())
}

/// The same for one layer by its own tag, if that one is believed; after what refers to the image could not be used.
pub(super) fn find_of_layer(
    registry: &Registry,
    layer: &Digest,
    trust: &TrustPolicy,
) -> Result<Option<FoundIndex>, SourceError> {
    let found = of_layer(registry, layer)?;
    Ok(found.and_then(|(listed, by)| {
        let believed = trust.of_listed(&registry.name(), &listed)?;
        Some(FoundIndex {
            access: registry.blob(&listed.digest, listed.size),
            listed,
            by,
            trust: Some(believed),
        })
    }))
}

/// The index of one layer, by its tag or by what a HEAD says; both are asked for at the same time. Either may be answered with
/// anything by a registry that has no such thing, which costs nothing but the index.
fn of_layer(registry: &Registry, layer: &Digest) -> Result<Option<(Listed, FoundBy)>, SourceError> {
    let (tagged, head) = thread::scope(|scope| {
        let head = scope.spawn(|| registry.head_blob(layer));
        let tagged = registry.optional_manifest(&layer_tag(layer));
        let head = head.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (tagged, head)
    });
    let listed = match &tagged {
        Ok(Some(manifest)) => parse(&manifest.bytes).unwrap_or_default(),
        Ok(None) | Err(_) => Vec::new(),
    };
    if let Some(listed) = listed.into_iter().find(|listed| listed.layer == *layer) {
        return Ok(Some((listed, FoundBy::Layer)));
    }
    let named = match &head {
        Ok(Some(head)) => head
            .header(LAZY_PULL_HEADER)
            .and_then(|digest| digest.trim().parse::<Digest>().ok()),
        Ok(None) | Err(_) => None,
    };
    // What it names may be anything; only its length is needed here.
    if let Some(digest) = named
        && let Ok(Some(head)) = registry.head_blob(&digest)
        && let Some(size) = head.size
    {
        let listed = Listed {
            layer: layer.clone(),
            digest,
            size,
            hot: None,
            signatures: Vec::new(),
        };
        return Ok(Some((listed, FoundBy::Header)));
    }
    // A registry that is too busy to say may have it all the same.
    match tagged {
        Err(error) if error.may_pass() => Err(error),
        _ => Ok(None),
    }
}

/// How many bytes are asked for of an index whose hot part's length is not known.
const GUESS: u64 = 256 << 10;

/// Less than this is asked for at once, in bytes: what a new connection brings in its first two round trips.
const SHORTEST_PIECE: u64 = 32 << 10;

/// Brings the hot part of an index, in one request where its length is known, and checks that it is of this layer.
///
/// # Errors
/// [`OpenError::Source`] when it cannot be fetched, [`OpenError::Index`] when it is damaged or of another layer.
pub fn fetch_hot(layer: &ImageLayer, found: &FoundIndex, http: &HttpOptions) -> Result<Index<Vec<u8>>, OpenError> {
    fetch_hot_in(layer, found, 1, http)
}

/// Into how many requests each hot part is cut when all of them are fetched at once, so that `connections` of them bring equally
/// much; one where a length is unknown.
pub(super) fn pieces<'f>(found: impl Iterator<Item = Option<&'f FoundIndex>> + Clone, connections: u64) -> Vec<u64> {
    let hot = |found: Option<&FoundIndex>| found.and_then(|found| Some(found.listed.hot.as_ref()?.0)).unwrap_or(0);
    let lens = found.map(hot);
    let total: u64 = lens.clone().fold(0, u64::saturating_add);
    let mut size = (total / connections.max(1)).max(SHORTEST_PIECE);
    let cut = |size: u64| lens.clone().map(move |len| len.div_ceil(size).max(1));
    // What is left over of each makes a piece of its own: a few more bytes in each, until they are few enough.
    while cut(size).filter(|pieces| *pieces > 1).count() > 0 && cut(size).sum::<u64>() > connections {
        size = size.saturating_add(size.div_ceil(16));
    }
    cut(size).collect()
}

/// The same in several requests at the same time.
pub(super) fn fetch_hot_in(
    layer: &ImageLayer,
    found: &FoundIndex,
    pieces: u64,
    http: &HttpOptions,
) -> Result<Index<Vec<u8>>, OpenError> {
    let name = || format!("index {}", found.access.name());
    let bad = |cause| OpenError::Index { name: name(), cause };
    let blob = Blob::of_registry(found.access.clone());
    let most = blob.len.min(MAX_INDEX_BYTES);
    let first = found.listed.hot.as_ref().map_or(GUESS, |(len, _)| *len).min(most);
    let mut bytes = in_pieces(&blob, first, pieces, http)?;
    let hot = index::hot_len(&bytes)
        .map_err(bad)?
        .ok_or_else(|| bad(IndexFault::Truncated.into()))?;
    if hot > most {
        return Err(bad(IndexFault::Truncated.into()));
    }
    if hot > first {
        bytes.extend(source::read_range(&blob, first..hot, http)?);
    }
    bytes.truncate(usize::try_from(hot).map_err(|_| bad(IndexFault::TooLarge("hot part").into()))?);
    if let Some((_, digest)) = &found.listed.hot
        && !digest.matches(&bytes)
    {
        return Err(bad(IndexFault::Checksum("hot part").into()));
    }
    // A manifest that does not name the hot part's digest vouches for the whole file alone.
    let index = if found.listed.hot.is_none() && found.by != FoundBy::Header {
        let whole = source::read_range(&blob, 0..most, http)?;
        if !found.listed.digest.matches(&whole) {
            return Err(bad(IndexFault::Checksum("file").into()));
        }
        Index::open(whole)
    } else {
        Index::open_hot(bytes)
    };
    let index = index.map_err(bad)?;
    if index.file_len() != found.listed.size {
        return Err(bad(IndexFault::Truncated.into()));
    }
    check_layer(&index, layer).map_err(bad)?;
    Ok(index)
}

/// The first `len` bytes of a blob, by so many requests at the same time.
fn in_pieces(blob: &Blob, len: u64, pieces: u64, http: &HttpOptions) -> Result<Vec<u8>, SourceError> {
    let size = len.div_ceil(pieces.max(1)).max(1);
    let ranges = (0..pieces).map(|number| (number * size).min(len)..((number + 1) * size).min(len));
    let ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    if let [_] = ranges[..] {
        return source::read_range(blob, 0..len, http);
    }
    thread::scope(|scope| {
        let ask = |range| scope.spawn(|| source::read_range(blob, range, http));
        let asked: Vec<_> = ranges.into_iter().map(ask).collect();
        let mut bytes = Vec::new();
        for asked in asked {
            bytes.extend(asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(bytes)
    })
}

/// Whether an index is of this layer. It has to name the blob's digest, and say of everything that both know the same. (How the
/// blob is compressed it knows better than the manifest, whose media type may be wrong.)
///
/// # Errors
/// [`IndexError::OtherLayer`].
pub fn check_layer<B: AsRef<[u8]>>(index: &Index<B>, layer: &ImageLayer) -> Result<(), IndexError> {
    if index.is_of_contents() {
        return Err(IndexFault::MadeUp.into());
    }
    let identity = index.identity();
    let other = |what, found: String, wanted: String| Err(IndexError::OtherLayer { what, found, wanted });
    if identity.blob_len != layer.descriptor.size {
        return other(
            "length",
            identity.blob_len.to_string(),
            layer.descriptor.size.to_string(),
        );
    }
    if identity.blob_digest.is_none() {
        return other("digest", "none".to_owned(), layer.descriptor.digest.to_string());
    }
    let digests = [
        ("digest", &identity.blob_digest, Some(&layer.descriptor.digest)),
        ("diff ID", &identity.diff_id, layer.diff_id.as_ref()),
    ];
    for (what, found, wanted) in digests {
        if let (Some(found), Some(wanted)) = (found, wanted)
            && found.algorithm() == wanted.algorithm()
            && found != wanted
        {
            return other(what, found.to_string(), wanted.to_string());
        }
    }
    Ok(())
}

/// Whether an index is the one that was pinned: by the digest of its hot part, or of the whole file if that is here.
#[must_use]
pub fn is_pinned<B: AsRef<[u8]>>(index: &Index<B>, pin: &Digest) -> bool {
    let hot = usize::try_from(index.hot_len())
        .ok()
        .and_then(|len| index.as_bytes().get(..len));
    hot.is_some_and(|hot| pin.matches(hot)) || index.is_whole() && pin.matches(index.as_bytes())
}

/// The digest by which an index is named where digests are SHA-256.
#[must_use]
pub fn hot_digest<B: AsRef<[u8]>>(index: &Index<B>) -> Digest {
    index.hot_digest_of(Algorithm::Sha256)
}
