//! The cache directory. In: a layer's identity. Out: its index, and where its bytes are kept.
//!
//! `index` holds whole indexes of what was read on this machine. `hot` holds hot parts of published indexes: each
//! file is as long as the index and has its cold pieces as they are fetched, holes for the others, and behind all that the index
//! file's digest and the signatures that came with it: whether it is believed is decided anew each time that it is wanted. Which of them is which is told by where it lies, never by what is in it. `small` holds manifests and
//! configurations of images, by their digests; `names` what tags and URLs meant (see `names`), and where the indexes of layers are that were served (see `dedup`);
//! `profiles` what starts of images read (see `profiles`).
//!
//! Everything in it can be deleted at any time and is checked when it is read. Indexes are kept under a digest
//! of the identity, so that names and URLs (which may hold secrets) do not show.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::artifact::Listed;
use super::signature::Signature;
use super::{MAX_INDEX_BYTES, OpenError};
use crate::cache::disk::{CacheLimit, DiskCache, DiskCacheError, check_dir};
use crate::digest::{Algorithm, Digest as ContentDigest, hexadecimal};
use crate::index::{Index, hot_len};
use crate::source::registry::{KnownTag, SmallBlobCache};
use crate::units::len_u64;

/// How many indexes are kept, of each kind; those not used the longest go.
const MAX_INDEXES: usize = 256;
/// How many manifests and configurations are kept.
const MAX_SMALL: usize = 1024;
/// How many tags and URLs are remembered.
const MAX_NAMES: usize = 1024;
/// The longest of these entries in bytes.
const LONGEST_NAME: u64 = 16 << 10;
/// The longest manifest or configuration in bytes.
const LONGEST_SMALL: u64 = 8 << 20;

/// The most bytes that are read behind a kept hot part: longer than any digest and its signatures.
const LONGEST_TRAILER: u64 = 8 << 10;

/// The hot part of an index that was published, as it is kept.
#[derive(Debug)]
pub(super) struct KeptHot {
    /// The file in the cache.
    pub(super) path: PathBuf,
    /// The hot part; it was checked against its own checksums.
    pub(super) index: Index<Vec<u8>>,
    /// The digest of the whole index file, by which the registry knows it; compared with the file only as far as the registry's
    /// manifest was.
    pub(super) digest: ContentDigest,
    /// The signatures that came with it.
    pub(super) signatures: Vec<Signature>,
}

impl KeptHot {
    /// What a manifest says of it.
    pub(super) fn listed(&self, layer: &ContentDigest) -> Listed {
        Listed {
            layer: layer.clone(),
            digest: self.digest.clone(),
            size: self.index.file_len(),
            hot: Some((self.index.hot_len(), self.index.hot_digest_of(Algorithm::Sha256))),
            signatures: self.signatures.clone(),
        }
    }

    /// Whether it is the index that a manifest means, byte for byte.
    pub(super) fn is(&self, listed: &Listed) -> bool {
        let is_hot = |(len, digest): &(u64, ContentDigest)| {
            *len == self.index.hot_len() && *digest == self.index.hot_digest_of(digest.algorithm())
        };
        self.digest == listed.digest && self.index.file_len() == listed.size && listed.hot.as_ref().is_some_and(is_hot)
    }
}

/// A cache directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    dir: PathBuf,
    /// Bytes on disk at most; a tenth of the disk if none.
    limit: Option<u64>,
}

/// The directories of a cache, beside that of the layers' bytes.
const BESIDE: [&str; 5] = ["index", "hot", "small", "names", "profiles"];

/// One directory of a cache that holds no layers' bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Beside {
    /// What it is called: `index`, `hot`, `small`, `names` or `profiles`.
    pub name: &'static str,
    /// Files in it.
    pub files: u64,
    /// Disk space that they take, in bytes.
    pub bytes: u64,
}

/// The limit of the disk cache in `layers`, which is a part of a cache directory: all of that counts.
pub(super) fn limit_of(layers: &Path, bytes: Option<u64>) -> CacheLimit {
    let beside = layers.parent().map(|dir| BESIDE.map(|name| dir.join(name)).to_vec());
    CacheLimit {
        bytes,
        beside: beside.unwrap_or_default(),
    }
}

/// The default cache directory: `/var/cache/tarblk` for root, else `$XDG_CACHE_HOME/tarblk` or
/// `~/.cache/tarblk`.
#[must_use]
pub fn default_cache_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/cache/tarblk");
    }
    let set = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("tarblk")
}

impl Cache {
    /// The cache in `dir`, which is made when something is kept.
    ///
    /// # Errors
    /// When the current directory is unknown and `dir` is relative to it, or when others could have put something there for this
    /// user to believe.
    pub fn new(dir: &Path) -> Result<Self, OpenError> {
        let dir = std::path::absolute(dir).map_err(|cause| OpenError::Cache {
            path: dir.to_owned(),
            cause,
        })?;
        check_dir(&dir)?;
        for part in BESIDE {
            check_dir(&dir.join(part))?;
        }
        let cache = Self { dir, limit: None };
        check_dir(&cache.layers())?;
        Ok(cache)
    }

    /// The same, which may take so many bytes on disk; a tenth of the disk if none.
    #[must_use]
    pub fn with_limit(self, limit: Option<u64>) -> Self {
        Self { limit, ..self }
    }

    /// The disk cache of layers' bytes in it.
    ///
    /// # Errors
    /// Those of [`DiskCache::open`].
    pub fn store(&self) -> Result<Arc<DiskCache>, DiskCacheError> {
        let layers = self.layers();
        DiskCache::open(&layers, limit_of(&layers, self.limit))
    }

    /// The disk cache of layers' bytes in it, if there is one. Makes nothing.
    ///
    /// # Errors
    /// Those of [`DiskCache::open_existing`].
    pub fn existing_store(&self) -> Result<Option<Arc<DiskCache>>, DiskCacheError> {
        let layers = self.layers();
        match fs::symlink_metadata(&layers) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            _ => DiskCache::open_existing(&layers, limit_of(&layers, self.limit)).map(Some),
        }
    }

    /// What it takes on disk besides layers' bytes, by directory.
    #[must_use]
    pub fn beside(&self) -> Vec<Beside> {
        let of = |name| {
            let mut sum = Beside {
                name,
                files: 0,
                bytes: 0,
            };
            for entry in fs::read_dir(self.dir.join(name)).into_iter().flatten().flatten() {
                if let Ok(meta) = entry.metadata() {
                    sum.files += 1;
                    sum.bytes += meta.blocks() * 512;
                }
            }
            sum
        };
        BESIDE.map(of).to_vec()
    }

    /// Removes all indexes, manifests and names that are kept. Devices have what they need of these open, or copies of it. Says how
    /// many bytes of disk that gave back.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn forget_beside(&self) -> Result<u64, OpenError> {
        let mut freed = 0;
        for name in BESIDE {
            let dir = self.dir.join(name);
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let bytes = entry.metadata().map_or(0, |meta| meta.blocks() * 512);
                match fs::remove_file(entry.path()) {
                    Ok(()) => freed += bytes,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(cause) => {
                        return Err(OpenError::Cache {
                            path: entry.path(),
                            cause,
                        });
                    }
                }
            }
        }
        Ok(freed)
    }

    /// The directory; absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of layers' bytes.
    #[must_use]
    pub fn layers(&self) -> PathBuf {
        self.dir.join("layers")
    }

    fn indexes(&self) -> PathBuf {
        self.dir.join("index")
    }

    fn index_path(&self, identity: &str) -> PathBuf {
        self.indexes().join(format!("{}.tarblk", digest(identity)))
    }

    /// Whether an index is kept for a layer. It may turn out to be damaged.
    pub(super) fn has_index(&self, identity: &str) -> bool {
        self.index_path(identity).is_file()
    }

    /// The index kept for a layer, and where.
    pub(super) fn index(&self, identity: &str) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.index_path(identity);
        let bytes = read_and_mark(&path, MAX_INDEX_BYTES)?;
        Some((path, bytes))
    }

    /// Keeps a layer's index, whole or not at all, and returns where.
    pub(super) fn keep_index(&self, identity: &str, bytes: &[u8]) -> Result<PathBuf, OpenError> {
        let path = self.index_path(identity);
        self.keep(&path, MAX_INDEXES, len_u64(bytes.len()), |file| file.write_all(bytes))?;
        Ok(path)
    }

    fn hot_path(&self, repository: &str, layer: &ContentDigest) -> PathBuf {
        let name = digest(&format!("{repository}\n{layer}"));
        self.dir.join("hot").join(format!("{name}.hot"))
    }

    /// The hot part that is kept for a layer and was published in this repository.
    pub(super) fn hot(&self, repository: &str, layer: &ContentDigest) -> Option<KeptHot> {
        let path = self.hot_path(repository, layer);
        let mut file = File::open(&path).ok()?;
        let index = read_hot(&mut file)?;
        file.seek(SeekFrom::Start(index.file_len())).ok()?;
        let mut trailer = String::new();
        file.take(LONGEST_TRAILER).read_to_string(&mut trailer).ok()?;
        let (digest, signatures) = read_trailer(&trailer)?;
        mark_used(&path);
        Some(KeptHot {
            path,
            index,
            digest,
            signatures,
        })
    }

    /// Notes signatures that an index was found with, after it was kept.
    pub(super) fn note_signatures(kept: &KeptHot, listed: &Listed) {
        let noted = || -> io::Result<()> {
            let mut file = File::options().write(true).open(&kept.path)?;
            file.set_len(kept.index.file_len())?;
            file.seek(SeekFrom::Start(kept.index.file_len()))?;
            file.write_all(trailer(listed).as_bytes())
        };
        if let Err(error) = noted() {
            log::info!("{}: {error}", kept.path.display());
        }
    }

    /// Keeps the hot part of an index that was published in this repository, with what was said of it there, and returns where.
    pub(super) fn keep_hot(
        &self,
        repository: &str,
        index: &Index<Vec<u8>>,
        listed: &Listed,
    ) -> Result<PathBuf, OpenError> {
        let path = self.hot_path(repository, &listed.layer);
        let hot = usize::try_from(index.hot_len())
            .ok()
            .and_then(|len| index.as_bytes().get(..len));
        self.keep(&path, MAX_INDEXES, index.hot_len(), |file| {
            file.write_all(hot.unwrap_or_default())?;
            // A hole, for what is fetched later.
            file.as_file().set_len(index.file_len())?;
            file.seek(SeekFrom::Start(index.file_len()))?;
            file.write_all(trailer(listed).as_bytes())
        })?;
        Ok(path)
    }

    fn small_path(&self, identity: &str) -> PathBuf {
        self.dir.join("small").join(digest(identity))
    }

    /// Whether an image of this name was attached before, with everything about it kept.
    pub(super) fn knows(&self, image: &str) -> bool {
        self.small_path(&format!("name\n{image}")).is_file()
    }

    /// Notes that everything about the image of this name is kept now.
    pub(super) fn know(&self, image: &str) {
        let path = self.small_path(&format!("name\n{image}"));
        if let Err(error) = self.keep(&path, MAX_SMALL, 0, |_| Ok(())) {
            log::info!("{error}");
        }
    }

    fn name_path(&self, what: &str) -> PathBuf {
        self.dir.join("names").join(digest(what))
    }

    /// What was noted under a name. An entry that is damaged, or another name's, is none.
    pub(super) fn recall<T: DeserializeOwned>(&self, what: &str) -> Option<T> {
        let text = String::from_utf8(read_and_mark(&self.name_path(what), LONGEST_NAME)?).ok()?;
        let (checksum, json) = text.split_once('\n')?;
        (checksum == digest(&format!("{what}\n{json}"))).then(|| serde_json::from_str(json).ok())?
    }

    /// Notes something under a name; a failure costs nothing but the note.
    pub(super) fn remember<T: Serialize>(&self, what: &str, value: &T) {
        let Ok(json) = serde_json::to_string(value) else { return };
        let checksum = digest(&format!("{what}\n{json}"));
        let noted = self.keep(&self.name_path(what), MAX_NAMES, len_u64(json.len()), |file| {
            write!(file, "{checksum}\n{json}")
        });
        if let Err(error) = noted {
            log::info!("{error}");
        }
    }

    /// Puts a file of `len` bytes in its place, whole or not at all, and removes those of the same kind that were not used the longest.
    fn keep(
        &self,
        path: &Path,
        most: usize,
        len: u64,
        write: impl FnOnce(&mut tempfile::NamedTempFile) -> io::Result<()>,
    ) -> Result<(), OpenError> {
        let dir = path.parent().unwrap_or(&self.dir);
        let kept = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            // Chunks of layers make room for it.
            let store = self.store().map_err(io::Error::other)?;
            let _room = store.room_for(len).ok_or(io::ErrorKind::StorageFull)?;
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            write(&mut file)?;
            file.persist(path).map_err(|error| error.error)?;
            Ok(())
        };
        kept().map_err(|cause| OpenError::Cache {
            path: dir.to_owned(),
            cause,
        })?;
        forget_oldest(dir, most);
        Ok(())
    }
}

impl SmallBlobCache for Cache {
    fn get(&self, digest: &ContentDigest) -> Option<(String, Vec<u8>)> {
        let mut bytes = read_and_mark(&self.small_path(&digest.to_string()), LONGEST_SMALL)?;
        let line = bytes.iter().position(|byte| *byte == b'\n')?;
        let media_type = String::from_utf8(bytes.drain(..=line).collect()).ok()?;
        Some((media_type.trim_end().to_owned(), bytes))
    }

    fn put(&self, digest: &ContentDigest, media_type: &str, bytes: &[u8]) {
        // From a registry: made one line, because the file's first line is this.
        let media_type = media_type.lines().next().unwrap_or_default();
        let path = self.small_path(&digest.to_string());
        let kept = self.keep(&path, MAX_SMALL, len_u64(bytes.len()), |file| {
            writeln!(file, "{media_type}")?;
            file.write_all(bytes)
        });
        if let Err(error) = kept {
            log::info!("{error}");
        }
    }

    fn tag(&self, name: &str) -> Option<KnownTag> {
        self.known_tag(name)
    }

    fn put_tag(&self, name: &str, digest: &ContentDigest) {
        self.know_tag(name, digest);
    }
}

/// What stands behind a hot part: the index file's digest, then the signatures if there are any.
fn trailer(listed: &Listed) -> String {
    if listed.signatures.is_empty() {
        return listed.digest.to_string();
    }
    format!("{} {}", listed.digest, Signature::all_to_text(&listed.signatures))
}

fn read_trailer(text: &str) -> Option<(ContentDigest, Vec<Signature>)> {
    let Some((digest, signatures)) = text.split_once(' ') else {
        return Some((text.parse().ok()?, Vec::new()));
    };
    let signatures = Signature::parse_all(signatures);
    // Cut short: it is not known what else is missing.
    (!signatures.is_empty()).then_some((digest.parse().ok()?, signatures))
}

/// Reads the hot part at the beginning of a file, and no more.
pub(super) fn read_hot(file: &mut File) -> Option<Index<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(24).read_to_end(&mut bytes).ok()?;
    let rest = hot_len(&bytes).ok()??.checked_sub(24)?;
    file.take(rest).read_to_end(&mut bytes).ok()?;
    Index::open_hot(bytes).ok()
}

pub(super) fn read_and_mark(path: &Path, most: u64) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    mark_used(path);
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Marks a file as used now, so that it is removed last.
fn mark_used(path: &Path) {
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes the files of a directory that were not used the longest, when there are too many.
pub(super) fn forget_oldest(dir: &Path, most: usize) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let used = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
    let mut all: Vec<_> = entries.flatten().filter_map(used).collect();
    all.sort();
    for (_, path) in all.iter().take(all.len().saturating_sub(most)) {
        let _ = fs::remove_file(path);
    }
}

/// The file name for an identity: a digest of it.
fn digest(identity: &str) -> String {
    hexadecimal(&Sha256::digest(identity.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_found_by_identity_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(&dir.path().join("not/yet/there")).unwrap();
        let cache = cache.with_limit(Some(1 << 30));
        assert!(cache.index("a").is_none());
        let path = cache.keep_index("a", b"one").unwrap();
        cache.keep_index("b", b"two").unwrap();
        assert_eq!(cache.index("a"), Some((path, b"one".to_vec())));
        assert_eq!(cache.index("b").unwrap().1, b"two");
        cache.keep_index("a", b"three").unwrap();
        assert_eq!(cache.index("a").unwrap().1, b"three");
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path()).unwrap().with_limit(Some(1 << 30));
        for i in 0..MAX_INDEXES {
            let path = cache.keep_index(&i.to_string(), b"x").unwrap();
            let age = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(i).unwrap());
            File::open(path).unwrap().set_modified(age).unwrap();
        }
        assert!(cache.index("0").is_some(), "used again");
        cache.keep_index("new", b"x").unwrap();
        assert!(cache.index("0").is_some() && cache.index("new").is_some() && cache.index("2").is_some());
        assert!(cache.index("1").is_none(), "now the oldest");
    }
}
