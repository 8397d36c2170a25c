//! One layer, found, and what it holds. In: a blob, and what is known of it. Out: the same with its index: the one kept for
//! it, or one made by reading the headers of a plain layer, or all of a compressed one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::gather::Gather;
use super::record::{Recording, algorithms, coding_of, record_blob};
use super::serve_spec::http_layer;
use super::{Cache, IndexChoice, IndexOrigin, OpenError, OpenOptions, Reading, is_full, open_index, toc};
use crate::cache::disk::{DiskCache, DiskCacheError, LayerKey};
use crate::digest::Digest;
use crate::index::build::Contents;
use crate::index::{Index, IndexBuilder, IndexError, IndexFault};
use crate::layer::{Coding, SPACING};
use crate::source::registry::ImageLayer;
use crate::source::{HttpBlob, LayerBlob, Place, Source, SourceError};
use crate::units::{CHUNK_BYTES, TarOffset};
use crate::walk;

/// What is known of a layer before it is read.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// The blob's digest, from a manifest.
    pub(super) digest: Option<Digest>,
    /// The tar's digest, from an image's configuration.
    pub(super) diff_id: Option<Digest>,
    /// How its media type says that it is compressed. Its first bytes know better.
    pub(super) coding: Option<Coding>,
    /// What else a manifest says of it.
    pub(super) annotations: BTreeMap<String, String>,
    /// Why a registry may not have it, of a foreign layer.
    pub(super) foreign: Option<String>,
    /// An index that somebody has published.
    pub(super) published: Option<Published>,
}

impl Facts {
    /// What an image says of a layer.
    pub(super) fn of(layer: &ImageLayer) -> Self {
        Self {
            digest: Some(layer.descriptor.digest.clone()),
            diff_id: layer.diff_id.clone(),
            coding: layer.kind.coding,
            annotations: layer.descriptor.annotations.clone(),
            foreign: layer.descriptor.foreign(),
            published: None,
        }
    }
}

/// An index that somebody has published.
#[derive(Clone, Debug)]
pub(super) struct Published {
    /// Its hot part.
    pub(super) index: Index<Vec<u8>>,
    /// Where all of it is.
    pub(super) rest: HttpBlob,
    /// Whether it came from the cache directory.
    pub(super) was_kept: bool,
    /// Where it is there now.
    pub(super) kept: Option<PathBuf>,
}

/// A layer that was found, with its index.
#[derive(Debug)]
pub struct PreparedLayer {
    /// The layer.
    pub blob: LayerBlob,
    /// How it is compressed.
    pub coding: Coding,
    /// What it holds.
    pub index: Index<Vec<u8>>,
    /// Where the index came from.
    pub origin: IndexOrigin,
    /// The blob's digest, if a manifest or an index tells it.
    pub digest: Option<Digest>,
    /// The digest of the tar in it, likewise.
    pub diff_id: Option<Digest>,
    /// The index in the cache directory, if it is there: all of it, or if there is a `rest`, its hot part.
    pub(super) kept: Option<PathBuf>,
    /// What the store knows the layer's tar space by, if it has a name.
    pub(super) stored_as: Option<String>,
    /// Where the rest of the index is, if what is here is its hot part alone.
    pub(super) rest: Option<HttpBlob>,
}

impl PreparedLayer {
    /// A layer and its index, as far as they fit each other.
    pub(super) fn new(
        blob: LayerBlob,
        facts: &Facts,
        index: Index<Vec<u8>>,
        origin: IndexOrigin,
        kept: Option<PathBuf>,
    ) -> Result<Self, OpenError> {
        let identity = index.identity();
        let (expected, found) = (identity.blob_len, blob.len);
        let bad = |cause| OpenError::Index {
            name: format!("index for {}", blob.name()),
            cause,
        };
        let digest = identity.blob_digest.clone();
        if expected != found {
            return Err(OpenError::OtherLayer {
                name: format!("of {}", blob.name()),
                expected,
                source_name: facts.digest.as_ref().map_or_else(|| blob.name(), ToString::to_string),
                found,
            });
        }
        if let (Some(found), Some(wanted)) = (&digest, &facts.digest)
            && found.algorithm() == wanted.algorithm()
            && found != wanted
        {
            return Err(bad(IndexError::OtherLayer {
                what: "digest",
                found: found.to_string(),
                wanted: wanted.to_string(),
            }));
        }
        // A blob that is not compressed is the tar. Of what a table of contents makes up there is no digest.
        let of_tar = match identity.coding {
            _ if index.is_of_contents() => None,
            Coding::Plain => identity.diff_id.as_ref().or(facts.digest.as_ref()),
            Coding::Gzip | Coding::Zstd => identity.diff_id.as_ref(),
        };
        if let (Some(found), Some(wanted)) = (of_tar, &facts.diff_id)
            && found.algorithm() == wanted.algorithm()
            && found != wanted
        {
            return Err(OpenError::Digest {
                source_name: blob.name(),
                what: "tar",
                expected: wanted.to_string(),
                found: found.to_string(),
            });
        }
        // Without them what is compressed would be taken for the tar.
        if identity.coding != Coding::Plain && index.spans().is_none() {
            return Err(bad(IndexFault::Missing("span table").into()));
        }
        let digest = facts.digest.clone().or(digest);
        let stored_as = match (&blob.place, &digest) {
            _ if index.is_of_contents() => toc::kept_as(&blob, facts),
            (Place::Http(http), Some(digest)) if index.chunk_digests().is_none() => {
                Some(unchecked(&http.name(), digest))
            }
            (_, digest) => digest.as_ref().map(ToString::to_string),
        };
        Ok(Self {
            coding: identity.coding,
            stored_as,
            digest,
            diff_id: facts.diff_id.clone().or_else(|| identity.diff_id.clone()),
            blob,
            index,
            origin,
            kept,
            rest: None,
        })
    }
}

/// What is known under a digest that a server, named `place`, says it has, and that nobody compared with it: headers that were
/// read, bytes that nothing vouches for until all of them have come. Another server may have something else.
pub(super) fn unchecked(place: &str, digest: &Digest) -> String {
    format!("{place}\n{digest}")
}

/// What the cache knows a layer by, and its tar, before it was compared with its digest: that, and who said so; or its name and
/// the state that it is in.
pub(super) fn kept_under(blob: &LayerBlob, facts: &Facts) -> Option<String> {
    if let Some(digest) = &facts.digest {
        return Some(match &blob.place {
            Place::Http(http) => unchecked(&http.name(), digest),
            Place::File(_) => digest.to_string(),
        });
    }
    let name = match &blob.source {
        Source::Path(path) => path.display().to_string(),
        Source::Url(url) => url.to_string(),
        Source::Image(name) => name.to_string(),
    };
    blob.fingerprint().map(|mark| format!("{name}\n{mark}"))
}

/// The index that is kept for a layer, and where. What is damaged, of another version of this program, or kept under a digest
/// that it was not compared with, is none: it is made again and replaced.
fn kept(cache: &Cache, blob: &LayerBlob, facts: &Facts) -> Option<(PathBuf, Index<Vec<u8>>)> {
    let digest = facts.digest.as_ref().map(ToString::to_string);
    let other = kept_under(blob, facts).filter(|name| digest.as_ref() != Some(name));
    [(digest, true), (other, false)]
        .into_iter()
        .find_map(|(name, checked)| {
            let (path, bytes) = cache.index(&name?)?;
            match Index::open(bytes) {
                Ok(index)
                    if index.identity().blob_len == blob.len
                        && !index.is_of_contents()
                        && (!checked || index.identity().blob_digest == facts.digest) =>
                {
                    Some((path, index))
                }
                Ok(_) | Err(_) => {
                    log::info!("{}: not usable, reading the layer again", path.display());
                    None
                }
            }
        })
}

/// Told how the blob is read and how far that is, in bytes.
pub(super) type Reached<'a> = &'a mut (dyn FnMut(Reading, u64) + Send);

/// Nothing that long can be read or kept: the chunks of a layer are numbered in 32 bits.
const TOO_LONG: u64 = CHUNK_BYTES << 32;

/// Finds the index of a layer, or makes it.
pub(super) fn prepare(
    blob: LayerBlob,
    facts: &Facts,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<PreparedLayer, OpenError> {
    let name = blob.name();
    find_index(blob, facts, options, reached).map_err(|error| named_if_foreign(error, name, facts.foreign.as_deref()))
}

/// Of a foreign layer that is not there: that it is one, and who has it.
pub(super) fn named_if_foreign(error: OpenError, name: String, foreign: Option<&str>) -> OpenError {
    match (&error, foreign) {
        (OpenError::Source(absence), Some(why)) if absence.is_absence() => {
            let why = why.to_owned();
            SourceError::Image { name, why }.into()
        }
        _ => error,
    }
}

fn find_index(
    blob: LayerBlob,
    facts: &Facts,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<PreparedLayer, OpenError> {
    if blob.len >= TOO_LONG {
        let why = format!("it is said to be {} bytes long, which no layer is", blob.len);
        let source_name = blob.name();
        return Err(SourceError::Unusable { source_name, why }.into());
    }
    if let Some(Published {
        index,
        rest,
        was_kept,
        kept,
    }) = &facts.published
    {
        let origin = if *was_kept {
            IndexOrigin::Kept
        } else {
            IndexOrigin::Published { bytes: index.hot_len() }
        };
        let mut layer = PreparedLayer::new(blob, facts, index.clone(), origin, kept.clone())?;
        // The file that a hot part is kept in is no index file, even if there is nothing but the hot part.
        layer.rest = (kept.is_some() || !index.is_whole()).then(|| rest.clone());
        return Ok(layer);
    }
    let mut under = kept_under(&blob, facts);
    let cache = options.cache.as_ref();
    if options.index != IndexChoice::Build
        && let Some(cache) = cache
        && let Some((path, index)) = kept(cache, &blob, facts)
    {
        return PreparedLayer::new(blob, facts, index, IndexOrigin::Kept, Some(path));
    }
    // Who pins an index means one that everybody makes alike.
    let takes_contents = matches!(options.index, IndexChoice::Auto | IndexChoice::Require)
        && options.index_digest.is_none()
        && toc::may_be_used(&blob, facts);
    let contents_under = toc::kept_as(&blob, facts).filter(|_| takes_contents);
    if let (Some(cache), Some(under)) = (cache, &contents_under)
        && let Some((path, bytes)) = cache.index(under)
    {
        match Index::open(bytes) {
            Ok(index) if index.identity().blob_len == blob.len && index.is_of_contents() => {
                return PreparedLayer::new(blob, facts, index, IndexOrigin::Kept, Some(path));
            }
            Ok(_) | Err(_) => log::info!("{}: not usable, reading the layer again", path.display()),
        }
    }
    // The first bytes decide. Of a blob in a registry they are not asked for by themselves: what its media type says is tried,
    // and when the first bytes come along and say something else, they are followed.
    let coding = match (&blob.place, facts.coding) {
        (Place::Http(_), Some(said)) => said,
        (Place::File(_), _) | (Place::Http(_), None) => coding_of(&blob, &options.http)?,
    };
    if takes_contents && let Some((bytes, origin)) = toc::fetch(&blob, coding, facts, &options.http) {
        let kept = match (cache, &contents_under) {
            (Some(cache), Some(under)) => keep_if_there_is_room(cache, under, &bytes)?,
            _ => None,
        };
        let index = open_index(bytes, &blob.name())?;
        return PreparedLayer::new(blob, facts, index, origin, kept);
    }
    if options.index == IndexChoice::Require {
        return Err(OpenError::NoIndexes {
            name: blob.source.to_string(),
        });
    }
    // A file at hand that has to have a digest is read whole: it takes little, and damage is found before anybody reads it.
    let must_check = facts.digest.is_some() && matches!(blob.place, Place::File(_));
    let by_headers = if coding == Coding::Plain && options.index != IndexChoice::Build && !must_check {
        read_headers(&blob, facts, options, reached)?
    } else {
        None
    };
    let (bytes, origin) = match by_headers {
        Some(made) => made,
        None => read_all(&blob, coding, facts, options, reached)?,
    };
    let index = open_index(bytes, &blob.name())?;
    if facts.digest.is_some() && index.identity().blob_digest == facts.digest {
        under = facts.digest.as_ref().map(ToString::to_string);
    }
    let kept = match (cache, &under) {
        (Some(cache), Some(under)) => keep_if_there_is_room(cache, under, index.as_bytes())?,
        _ => None,
    };
    PreparedLayer::new(blob, facts, index, origin, kept)
}

/// Reads a plain layer's headers into an index file; `None` when its first bytes say that it is compressed. Payload of a remote
/// layer that comes with them is put into the store.
fn read_headers(
    blob: &LayerBlob,
    facts: &Facts,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<Option<(Vec<u8>, IndexOrigin)>, OpenError> {
    let mut builder = IndexBuilder::new();
    let reading = match &blob.place {
        Place::Http(http) if !http.ranges => Reading::Download,
        Place::Http(_) | Place::File(_) => Reading::Headers,
    };
    let mut progress = |at: TarOffset, _: u64| reached(reading, at.0);
    let cache = |store: Arc<DiskCache>| match (&facts.digest, &blob.place) {
        (Some(digest), Place::Http(http)) => store.layer(
            LayerKey::of_content(&unchecked(&http.name(), digest), blob.len),
            blob.len,
        ),
        (None, Place::Http(http)) => match http_layer(http).cache_key() {
            Some(key) => store.layer(key, blob.len),
            None => store.unnamed(blob.len),
        },
        (_, Place::File(_)) => unreachable!("only layers on servers are gathered"),
    };
    let gather = match (&blob.place, &options.cache) {
        (Place::Http(_), Some(kept)) => {
            going_on_when_full(DiskCache::open(kept.layers()).and_then(cache))?.map(Gather::new)
        }
        _ => None,
    };
    let mut beginning = Beginning::new(gather);
    let walked = match &blob.place {
        Place::Http(_) => walk::walk(blob, &mut builder, Some(&mut beginning), &options.http, &mut progress),
        Place::File(_) => walk::walk(blob, &mut builder, None, &options.http, &mut progress),
    };
    if let Some(coding) = beginning.coding()
        && coding != Coding::Plain
    {
        log::info!(
            "{}: its media type says that it is not compressed, and it is {coding}",
            blob.name()
        );
        return Ok(None);
    }
    let walked = walked?;
    // The store lets go of the layer here, and the daemon can take it.
    drop(beginning);
    let bytes = builder.finish(walked.tar_len, walked.end);
    let (reads, bytes_read) = (walked.reads, walked.bytes_read);
    Ok(Some((
        bytes,
        IndexOrigin::Read {
            reads,
            bytes: bytes_read,
        },
    )))
}

/// So much that comes before a blob's first bytes waits for them, in bytes.
const MOST_WAITING: usize = 4 << 20;

/// Sees the first bytes of a blob among what a walk receives, and lets what passes go on to the store only when they are a tar's.
struct Beginning {
    /// The first bytes, as far as they came without a gap, until they tell the coding.
    first: Vec<u8>,
    /// What came before they told it, and where it belongs.
    waiting: Vec<(TarOffset, Vec<u8>)>,
    coding: Option<Coding>,
    gather: Option<Gather>,
}

impl Beginning {
    const fn new(gather: Option<Gather>) -> Self {
        Self {
            first: Vec::new(),
            waiting: Vec::new(),
            coding: None,
            gather,
        }
    }

    /// What the first bytes say, if they came.
    const fn coding(&self) -> Option<Coding> {
        self.coding
    }
}

impl walk::Tap for Beginning {
    fn bytes(&mut self, at: TarOffset, bytes: &[u8]) {
        if self.coding.is_none() {
            let reached = self.first.len();
            let known = u64::try_from(reached)
                .ok()
                .and_then(|reached| reached.checked_sub(at.0));
            let new = known.and_then(|known| bytes.get(usize::try_from(known).ok()?..));
            let new = new.unwrap_or_default();
            let missing = Coding::TELLING - reached;
            self.first.extend_from_slice(&new[..new.len().min(missing)]);
            if self.first.len() == Coding::TELLING {
                self.coding = Some(Coding::of_bytes(&self.first));
            }
        }
        let Some(gather) = &mut self.gather else { return };
        match self.coding {
            Some(Coding::Plain) => {
                for (at, bytes) in std::mem::take(&mut self.waiting) {
                    gather.bytes(at, &bytes);
                }
                gather.bytes(at, bytes);
            }
            Some(_) => self.waiting.clear(),
            None => {
                let waiting: usize = self.waiting.iter().map(|(_, bytes)| bytes.len()).sum();
                if waiting + bytes.len() <= MOST_WAITING {
                    self.waiting.push((at, bytes.to_vec()));
                }
            }
        }
    }
}

/// Reads all of a layer once, into an index file; what comes out of it is put into the store. How it is compressed its first bytes
/// say; `coding` is what is expected.
fn read_all(
    blob: &LayerBlob,
    coding: Coding,
    facts: &Facts,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<(Vec<u8>, IndexOrigin), OpenError> {
    let recording = Recording {
        contents: Contents::CHECKED,
        spacing: SPACING,
    };
    // A plain tar in a file is its own store.
    let is_its_own = coding == Coding::Plain && matches!(blob.place, Place::File(_));
    let mut filling = match &options.cache {
        Some(cache) if !is_its_own => {
            going_on_when_full(DiskCache::open(cache.layers()).and_then(|store| store.fill()))?
        }
        _ => None,
    };
    let mut keep = |_: TarOffset, bytes: &[u8]| {
        if let Some(open) = &mut filling
            && let Err(error) = open.push(bytes)
        {
            log::warn!("{error}; going on without a cache");
            filling = None;
        }
    };
    let reading = Reading::all_of(blob);
    let mut progress = |at| reached(reading, at);
    let recorded = record_blob(
        blob,
        &recording,
        algorithms(facts.digest.as_ref(), facts.diff_id.as_ref()),
        &options.http,
        &mut progress,
        &mut keep,
    )?;
    let told = [
        ("blob", &facts.digest, &recorded.identity.blob_digest),
        ("tar", &facts.diff_id, &recorded.identity.diff_id),
    ];
    for (what, expected, found) in told {
        if let (Some(expected), Some(found)) = (expected, found)
            && expected != found
        {
            return Err(OpenError::Digest {
                source_name: blob.name(),
                what,
                expected: expected.to_string(),
                found: found.to_string(),
            });
        }
    }
    let name = facts.digest.clone().or(recorded.identity.blob_digest);
    if let (Some(filling), Some(name)) = (filling, name) {
        going_on_when_full(filling.finish(&name.to_string()))?;
    }
    let origin = IndexOrigin::Read {
        reads: recorded.reads,
        bytes: blob.len,
    };
    Ok((recorded.index, origin))
}

/// A full disk costs nothing but the cache.
fn going_on_when_full<T>(outcome: Result<T, DiskCacheError>) -> Result<Option<T>, OpenError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_full(&error.source) => {
            log::warn!("{error}; going on without a cache");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Keeps an index in the cache. A full disk only means that the layer is read again next time.
fn keep_if_there_is_room(cache: &Cache, under: &str, bytes: &[u8]) -> Result<Option<PathBuf>, OpenError> {
    match cache.keep_index(under, bytes) {
        Ok(path) => Ok(Some(path)),
        Err(OpenError::Cache { path, cause }) if is_full(&cause) => {
            log::warn!("cannot keep the index in {}: {cause}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
