//! One layer, found, and what it holds. In: a blob, and what is known of it. Out: the same with its index: the one kept for
//! it, or one made by reading the headers of a plain layer, or all of a compressed one.

use std::path::PathBuf;
use std::sync::Arc;

use super::prepared::{
    FoundLayer, PreparedLayer, Published, kept_as, kept_under, made_here, named_if_foreign, of_contents,
};
use super::record::{Recording, algorithms, coding_of, record_blob};
use super::{Cache, IndexChoice, IndexOrigin, OpenError, OpenOptions, Reading, is_of_the_disk, open_index, toc};
use crate::cache::disk::{CacheWriter, DiskCache, DiskCacheError, LayerKey};
use crate::index::build::Contents;
use crate::index::{Index, IndexBuilder, IndexFault};
use crate::layer::Coding;
use crate::source::registry::PullPolicy;
use crate::source::{LayerSpec, SourceError};
use crate::units::{CHUNK_BYTES, TarOffset};
use crate::walk;

/// The index that is kept for a layer, and where. What is damaged, of another version of this program, older than what an image
/// needs, or kept under a digest that it was not compared with, is none: it is made again and replaced.
fn kept(cache: &Cache, layer: &LayerSpec) -> Option<(PathBuf, Index<Vec<u8>>)> {
    let digest = layer.digest.as_ref().map(ToString::to_string);
    let other = kept_under(layer).filter(|name| digest.as_ref() != Some(name));
    [(digest, true), (other, false)]
        .into_iter()
        .find_map(|(name, checked)| {
            let (path, bytes) = cache.index(&name?)?;
            match Index::open(bytes) {
                Ok(index)
                    if index.identity().blob_len == layer.blob.len
                        && !index.is_of_contents()
                        && (!checked || index.identity().blob_digest == layer.digest)
                        && serves(layer, &index) =>
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

/// Whether an index is new enough for what the layer is of. Only layers of images have a digest before their index is known.
fn serves(layer: &LayerSpec, index: &Index<Vec<u8>>) -> bool {
    layer.digest.is_none() || index.is_outdated_for_images().is_ok_and(|outdated| !outdated)
}

/// Told how the blob is read and how far that is, in bytes.
pub(super) type Reached<'a> = &'a mut (dyn FnMut(Reading, u64) + Send);

/// Nothing that long can be read or kept: the chunks of a layer are numbered in 32 bits.
const TOO_LONG: u64 = CHUNK_BYTES << 32;

/// Finds the index of a layer, or makes it.
pub(super) fn prepare(
    found: &FoundLayer,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<PreparedLayer, OpenError> {
    let named = |error| named_if_foreign(error, &found.layer.blob.name, found.foreign.as_deref());
    find_index(found, options, reached).map_err(named)
}

fn find_index(found: &FoundLayer, options: &OpenOptions, reached: Reached<'_>) -> Result<PreparedLayer, OpenError> {
    let blob = &found.layer.blob;
    if blob.len >= TOO_LONG {
        let why = format!("it is said to be {} bytes long, which no layer is", blob.len);
        let source_name = blob.name.clone();
        return Err(SourceError::Unusable { source_name, why }.into());
    }
    options
        .size
        .check_blob(blob, blob.is_remote() && !blob.answers_ranges())?;
    if let Some(Published {
        index,
        rest,
        was_kept,
        kept,
        trust,
    }) = &found.published
        && is_usable(found, index, options)?
    {
        let origin = if *was_kept {
            IndexOrigin::Kept
        } else {
            IndexOrigin::Published { bytes: index.hot_len() }
        };
        let mut layer = PreparedLayer::new(found, index.clone(), origin, *trust, kept.clone())?;
        // The file that a hot part is kept in is no index file, even if there is nothing but the hot part.
        layer.rest = (kept.is_some() || !index.is_whole()).then(|| rest.clone());
        return Ok(layer);
    }
    let mut under = kept_under(&found.layer);
    let cache = options.cache.as_ref();
    if options.index != IndexChoice::Build
        && let Some(cache) = cache
        && let Some((path, index)) = kept(cache, &found.layer)
    {
        let trust = made_here(blob, &index);
        return PreparedLayer::new(found, index, IndexOrigin::Kept, trust, Some(path));
    }
    // A pinned index has to be one that is made alike everywhere.
    let takes_contents = matches!(options.index, IndexChoice::Auto | IndexChoice::Require)
        && options.index_digest.is_none()
        && toc::may_be_used(found);
    let contents_under = kept_as(found).filter(|_| takes_contents);
    if let (Some(cache), Some(under)) = (cache, &contents_under)
        && let Some((path, bytes)) = cache.index(under)
    {
        match Index::open(bytes) {
            Ok(index) if index.identity().blob_len == blob.len && index.is_of_contents() => {
                return PreparedLayer::new(found, index, IndexOrigin::Kept, of_contents(found), Some(path));
            }
            Ok(_) | Err(_) => log::info!("{}: not usable, reading the layer again", path.display()),
        }
    }
    if options.registry.pull == PullPolicy::Never && blob.is_remote() {
        return Err(OpenError::NotKept {
            name: blob.name.clone(),
            what: "its index",
        });
    }
    // The first bytes decide. Of a blob in a registry they are not asked for by themselves: what its media type says is tried,
    // and when the first bytes come along and say something else, they are followed.
    let coding = match found.coding {
        Some(said) if blob.is_remote() => said,
        _ => coding_of(blob, &options.http)?,
    };
    if takes_contents && let Some((bytes, origin)) = toc::fetch(found, coding, &options.http) {
        let kept = match (cache, &contents_under) {
            (Some(cache), Some(under)) => keep_if_there_is_room(cache, under, &bytes)?,
            _ => None,
        };
        let index = open_index(bytes, &blob.name)?;
        return PreparedLayer::new(found, index, origin, of_contents(found), kept);
    }
    if options.index == IndexChoice::Require {
        let name = blob.name.clone();
        return Err(if found.unbelieved {
            OpenError::Unbelieved { name }
        } else {
            OpenError::NoIndexes { name }
        });
    }
    // A file at hand that has to have a digest is read whole: it takes little, and damage is found before anybody reads it.
    let must_check = found.layer.digest.is_some() && !blob.is_remote();
    let by_headers = if coding == Coding::Plain && options.index != IndexChoice::Build && !must_check {
        read_headers(found, options, reached)?
    } else {
        None
    };
    let (bytes, origin) = match by_headers {
        Some(made) => made,
        None => read_all(found, coding, options, reached)?,
    };
    let index = open_index(bytes, &blob.name)?;
    if found.layer.digest.is_some() && index.identity().blob_digest == found.layer.digest {
        under = found.layer.digest.as_ref().map(ToString::to_string);
    }
    let kept = match (cache, &under) {
        (Some(cache), Some(under)) => keep_if_there_is_room(cache, under, index.as_bytes())?,
        _ => None,
    };
    let trust = made_here(blob, &index);
    PreparedLayer::new(found, index, origin, trust, kept)
}

/// Whether a published index is new enough. One that is required and is not is an error; without it the layer is read.
fn is_usable(found: &FoundLayer, index: &Index<Vec<u8>>, options: &OpenOptions) -> Result<bool, OpenError> {
    if serves(&found.layer, index) {
        return Ok(true);
    }
    let error = OpenError::Index {
        name: format!("published index for {}", found.layer.blob.name),
        cause: IndexFault::Outdated.into(),
    };
    if options.index == IndexChoice::Require || options.index_digest.is_some() {
        return Err(error);
    }
    log::warn!("{error}; going on without it");
    Ok(false)
}

/// Reads a plain layer's headers into an index file; `None` when its first bytes say that it is compressed. Payload of a remote
/// layer that comes with them is put into the store.
fn read_headers(
    found: &FoundLayer,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<Option<(Vec<u8>, IndexOrigin)>, OpenError> {
    let blob = &found.layer.blob;
    let mut builder = IndexBuilder::new();
    let reading = if blob.answers_ranges() {
        Reading::Headers
    } else {
        Reading::Download
    };
    let mut progress = |at: TarOffset, _: u64| reached(reading, at.0);
    let claimed = found.layer.digest.as_ref().and_then(|digest| blob.claimed(digest));
    let key = match claimed {
        Some(claimed) => Some(LayerKey::of_content(&claimed, blob.len)),
        None => LayerKey::of_blob(blob),
    };
    let cache = |store: Arc<DiskCache>| match key {
        Some(key) => store.layer(key, blob.len),
        None => store.unnamed(blob.len),
    };
    let cache_writer = match &options.cache {
        Some(kept) if blob.is_remote() => going_on_without(kept.store().and_then(cache))?.map(CacheWriter::new),
        _ => None,
    };
    let mut beginning = Beginning::new(cache_writer);
    let tap: Option<&mut dyn walk::Tap> = if blob.is_remote() { Some(&mut beginning) } else { None };
    let walked = walk::walk(blob, &mut builder, tap, &options.http, &mut progress);
    if let Some(coding) = beginning.coding()
        && coding != Coding::Plain
    {
        log::info!(
            "{}: its media type says that it is not compressed, and it is {coding}",
            blob.name
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
    cache_writer: Option<CacheWriter>,
}

impl Beginning {
    const fn new(cache_writer: Option<CacheWriter>) -> Self {
        Self {
            first: Vec::new(),
            waiting: Vec::new(),
            coding: None,
            cache_writer,
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
        let Some(cache_writer) = &mut self.cache_writer else {
            return;
        };
        match self.coding {
            Some(Coding::Plain) => {
                for (at, bytes) in std::mem::take(&mut self.waiting) {
                    cache_writer.push(at, &bytes);
                }
                cache_writer.push(at, bytes);
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
    found: &FoundLayer,
    coding: Coding,
    options: &OpenOptions,
    reached: Reached<'_>,
) -> Result<(Vec<u8>, IndexOrigin), OpenError> {
    let LayerSpec {
        blob, digest, diff_id, ..
    } = &found.layer;
    let recording = Recording {
        contents: Contents::CHECKED,
        spacing: None,
        size: options.size,
    };
    // A plain tar in a file is its own store.
    let is_its_own = coding == Coding::Plain && !blob.is_remote();
    let mut filling = match &options.cache {
        Some(cache) if !is_its_own => {
            going_on_without(cache.store().and_then(|store| store.begin_layer(blob.len)))?.flatten()
        }
        _ => None,
    };
    let mut keep = |_: TarOffset, bytes: &[u8]| {
        if let Some(open) = &mut filling
            && let Err(error) = open.push(bytes)
        {
            log::info!("{error}; going on without a cache");
            filling = None;
        }
    };
    let reading = Reading::all_of(blob);
    let mut progress = |at| reached(reading, at);
    let recorded = record_blob(
        blob,
        &recording,
        algorithms(digest.as_ref(), diff_id.as_ref()),
        &options.http,
        &mut progress,
        &mut keep,
    )?;
    let told = [
        ("blob", digest, &recorded.identity.blob_digest),
        ("tar", diff_id, &recorded.identity.diff_id),
    ];
    for (what, expected, found) in told {
        if let (Some(expected), Some(found)) = (expected, found)
            && expected != found
        {
            return Err(OpenError::Digest {
                source_name: blob.name.clone(),
                what,
                expected: expected.to_string(),
                found: found.to_string(),
            });
        }
    }
    let name = digest.clone().or(recorded.identity.blob_digest);
    if let (Some(filling), Some(name)) = (filling, name) {
        going_on_without(filling.finish(&blob.name, &name.to_string()))?;
    }
    let origin = IndexOrigin::Read {
        reads: recorded.reads,
        bytes: blob.len,
    };
    Ok((recorded.index, origin))
}

/// A disk that cannot be written costs nothing but the cache.
fn going_on_without<T>(outcome: Result<T, DiskCacheError>) -> Result<Option<T>, OpenError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_of_the_disk() => {
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
        Err(OpenError::Cache { path, cause }) if is_of_the_disk(&cause) => {
            log::warn!("cannot keep the index in {}: {cause}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;
    use crate::fetch::IndexTrust;
    use crate::index::{EndOfArchive, LayerIdentity};
    use crate::source::Blob;

    /// A tar with a global header of its own (as `git archive` writes) before its only file.
    fn tar_with_global_header() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        let record = b"15 comment=abc\n";
        header.set_entry_type(tar::EntryType::XGlobalHeader);
        header.set_path("pax_global_header").unwrap();
        header.set_size(u64::try_from(record.len()).unwrap());
        header.set_cksum();
        tar.append(&header, &record[..]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, "f", &b"abc"[..]).unwrap();
        tar.into_inner().unwrap()
    }

    /// A layer of an image in a file, and its index as an older program made it.
    fn layer_and_older_index(dir: &std::path::Path) -> (FoundLayer, Vec<u8>) {
        let tar = tar_with_global_header();
        let path = dir.join("layer.tar");
        std::fs::write(&path, &tar).unwrap();
        let digest = crate::digest::Digest::of(Algorithm::Sha256, &tar);
        let mut found = FoundLayer::from(Blob::of_file("layer".to_owned(), &path).unwrap());
        found.layer.digest = Some(digest.clone());
        let mut builder = IndexBuilder::new();
        builder.identity(LayerIdentity {
            blob_len: found.layer.blob.len,
            blob_digest: Some(digest),
            ..LayerIdentity::default()
        });
        let walked = walk::walk(
            &found.layer.blob,
            &mut builder,
            None,
            &crate::http::HttpOptions::default(),
            &mut |_, _| (),
        );
        let older = builder.older().finish(walked.unwrap().tar_len, EndOfArchive::Marked);
        assert!(Index::open(older.clone()).unwrap().is_outdated_for_images().unwrap());
        (found, older)
    }

    fn origin(found: &FoundLayer, options: &OpenOptions) -> Result<IndexOrigin, OpenError> {
        let prepared = prepare(found, options, &mut |_, _| ())?;
        let is_new = found.layer.digest.is_none() || !prepared.index.is_outdated_for_images().unwrap();
        assert!(is_new, "{:?}", prepared.origin);
        Ok(prepared.origin)
    }

    #[test]
    fn a_cached_index_that_is_too_old_for_an_image_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut found, older) = layer_and_older_index(dir.path());
        let options = OpenOptions {
            cache: Some(Cache::new(&dir.path().join("cache")).unwrap().with_limit(Some(1 << 30))),
            ..OpenOptions::default()
        };
        let digest = found.layer.digest.clone().unwrap();
        let cache = options.cache.as_ref().unwrap();
        cache.keep_index(&digest.to_string(), &older).unwrap();
        assert!(matches!(origin(&found, &options), Ok(IndexOrigin::Read { .. })));
        assert!(matches!(origin(&found, &options), Ok(IndexOrigin::Kept)));
        // A tar by itself does not need what is missing.
        found.layer.digest = None;
        cache
            .keep_index(&found.layer.blob.cache_name().unwrap(), &older)
            .unwrap();
        assert!(matches!(origin(&found, &options), Ok(IndexOrigin::Kept)));
    }

    #[test]
    fn a_published_index_that_is_too_old_is_done_without_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut found, older) = layer_and_older_index(dir.path());
        found.published = Some(Published {
            index: Index::open(older).unwrap(),
            rest: found.layer.blob.clone(),
            was_kept: false,
            kept: None,
            trust: IndexTrust::Registry,
        });
        let mut options = OpenOptions::default();
        assert!(matches!(origin(&found, &options), Ok(IndexOrigin::Read { .. })));
        options.index = IndexChoice::Require;
        let error = origin(&found, &options).unwrap_err();
        assert!(error.to_string().contains("an older program made it"), "{error}");
    }
}
