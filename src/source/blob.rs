//! A blob: bytes of a known length that lie somewhere else. In: where a layer or an index was found. Out: one value that every
//! room takes, from what was typed to what is fetched; it can be sent to another process, and says by what to recognise the
//! blob later.
//!
//! It may hold secrets (credentials, signed addresses): it is serialised into a pipe and never into a file, and neither
//! `Debug` nor [`Blob::name`] shows them.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use reqwest::header::HeaderValue;
use serde::{Deserialize, Serialize};
use url::Url;

use super::error::SourceError;
use super::registry::BlobAccess;
use crate::digest::Digest;
use crate::http::{Reach, Secret, Validator, shown_url, split_credentials, stable_name};

/// Takes a blob's next bytes; an error ends the stream.
pub type BlobSink<'a, E> = &'a mut dyn FnMut(&[u8]) -> Result<(), E>;

/// A blob that was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// For messages: what was named, and which of its blobs this is. Without secrets.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Where its bytes are.
    pub place: Place,
}

/// Where a blob's bytes are.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In a file of this machine.
    File(LocalFile),
    /// At a URL.
    Url(UrlBlob),
    /// In a repository of a registry. Whether it answers ranges shows when it is asked.
    Registry(BlobAccess),
}

impl Blob {
    /// The file at `path`, as it is now, under the name that a person knows it by.
    ///
    /// # Errors
    /// What the kernel says, also that it is no regular file.
    pub fn of_file(name: String, path: &Path) -> io::Result<Self> {
        let (file, meta) = open_regular(path)?;
        drop(file);
        Ok(Self {
            name,
            len: meta.len(),
            place: Place::File(LocalFile {
                path: std::fs::canonicalize(path).or_else(|_| std::path::absolute(path))?,
                state: FileState::of(&meta),
            }),
        })
    }

    /// A blob of `len` bytes at a URL.
    #[must_use]
    pub fn of_url(url: UrlBlob, len: u64) -> Self {
        Self {
            name: shown_url(&url.url),
            len,
            place: Place::Url(url),
        }
    }

    /// A blob of a repository.
    #[must_use]
    pub fn of_registry(access: BlobAccess) -> Self {
        Self {
            name: access.name(),
            len: access.size(),
            place: Place::Registry(access),
        }
    }

    /// The same blob by another name: of the layer `digest` of what a person calls `source`.
    #[must_use]
    pub fn named(self, source: &impl fmt::Display, digest: &Digest) -> Self {
        Self {
            name: format!("{source}, blob {digest}"),
            ..self
        }
    }

    /// The same blob with nothing in it that must not be in a file. What a server wants to see beside that is looked up anew when
    /// it asks for it; a URL that is itself a secret (signed) no longer works.
    #[must_use]
    pub fn without_secrets(&self) -> Self {
        let place = match &self.place {
            Place::File(file) => Place::File(file.clone()),
            Place::Url(at) => Place::Url(at.without_secrets()),
            Place::Registry(access) => Place::Registry(access.without_secrets()),
        };
        Self { place, ..self.clone() }
    }

    /// Whether it is somewhere else than on this machine.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        !matches!(self.place, Place::File(_))
    }

    /// Whether it can be asked for in ranges, as far as that is known before it is tried.
    #[must_use]
    pub fn answers_ranges(&self) -> bool {
        match &self.place {
            Place::File(_) | Place::Registry(_) => true,
            Place::Url(url) => url.ranges,
        }
    }

    /// Tells one state of the blob from another: a digest, a server's validator, or a file's inode, length and times. None if a
    /// server says nothing of the kind.
    #[must_use]
    pub fn state(&self) -> Option<String> {
        match &self.place {
            Place::File(file) => Some(file.state.to_string()),
            Place::Url(url) => url.validator.as_ref().map(ToString::to_string),
            // What has a digest cannot become something else.
            Place::Registry(access) => Some(access.digest().to_string()),
        }
    }

    /// What a server claims to have under `digest`, as a name that no other server's claim shares: for what was not compared
    /// with the digest. None for a file, which is compared when it is read.
    #[must_use]
    pub fn claimed(&self, digest: &Digest) -> Option<String> {
        let claimant = match &self.place {
            Place::File(_) => return None,
            Place::Url(url) => shown_url(&url.url),
            Place::Registry(access) => access.name(),
        };
        Some(format!("{claimant}\n{digest}"))
    }

    /// A name for the blob in its present state, for what is cached of it: where it lies and [`state`](Self::state). None where
    /// that has none.
    #[must_use]
    pub fn cache_name(&self) -> Option<String> {
        let place = match &self.place {
            Place::File(_) => self.name.clone(),
            Place::Url(url) => url.url.to_string(),
            Place::Registry(access) => access.name(),
        };
        Some(format!("{place}\n{}", self.state()?))
    }
}

/// A regular file of this machine, and the state in which it was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalFile {
    /// Absolute.
    pub path: PathBuf,
    state: FileState,
}

impl LocalFile {
    /// From now on it is opened by another path that leads to the same file. A descriptor's (`/proc/self/fd/N`) goes on doing so when
    /// the file has lost its name, which changes its time of change: that one is no longer compared.
    pub fn move_to(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
        self.state.ctime = None;
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// [`SourceError::File`]; [`SourceError::FileChanged`] when there is another file now, or the same with other contents.
    pub fn open(&self) -> Result<File, SourceError> {
        let (file, meta) = open_regular(&self.path).map_err(|source| SourceError::File {
            path: self.path.clone(),
            source,
        })?;
        if self.state.fits(&FileState::of(&meta)) {
            Ok(file)
        } else {
            Err(SourceError::FileChanged(self.path.clone()))
        }
    }
}

fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    // Asked before opening: a fifo would block, and not every special file is harmless to open.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let file = File::open(path)?;
    let meta = file.metadata()?;
    Ok((file, meta))
}

/// What tells one state of a file from another. The time of change is part of it, because anybody can set the time of the
/// content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileState {
    dev: u64,
    ino: u64,
    len: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    /// None where it says nothing.
    ctime: Option<(i64, i64)>,
}

impl FileState {
    fn of(meta: &Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            len: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: Some((meta.ctime(), meta.ctime_nsec())),
        }
    }

    /// Whether a file in the state `found` is the one in this state, unchanged.
    fn fits(&self, found: &Self) -> bool {
        let ctime = self.ctime.and(found.ctime);
        *found
            == Self {
                ctime: found.ctime,
                ..self.clone()
            }
            && (ctime.is_none() || self.ctime == found.ctime)
    }
}

impl fmt::Display for FileState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dev, ino, len, .. } = self;
        let ((ms, mn), (cs, cn)) = (self.mtime, self.ctime.unwrap_or_default());
        write!(f, "file:{dev}:{ino}:{len}:{ms}.{mn:09}:{cs}.{cn:09}")
    }
}

/// A blob on a web server that is no registry.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UrlBlob {
    /// The URL that was named, without user and password; `http` or `https`.
    pub url: Url,
    /// Where redirects led when it was found; may expire, which [`url`](Self::url) does not.
    pub resolved: Url,
    /// Where redirects of this server may lead, also to [`resolved`](Self::resolved).
    #[serde(default)]
    pub reach: Reach,
    /// Whether a person lets its redirects lead anywhere.
    #[serde(default)]
    pub private_redirects: bool,
    /// The value of `Authorization`, for the host of [`url`](Self::url) and no other.
    pub authorization: Option<Secret>,
    /// Whether the server answers ranges. If not, the blob can only be streamed from its beginning.
    pub ranges: bool,
    /// Tells whether it is still the same, where the server says.
    pub validator: Option<Validator>,
    /// The `Content-Encoding` that the server gave it when it was found.
    pub encoding: Option<String>,
}

impl UrlBlob {
    /// A blob at `named`, whose user and password become its credentials. Nothing else is known of it: it is taken to answer
    /// ranges.
    #[must_use]
    pub fn new(named: &Url) -> Self {
        let (url, authorization) = split_credentials(named);
        let authorization = authorization.and_then(|value| Some(Secret::new(value.to_str().ok()?.to_owned())));
        Self {
            resolved: url.clone(),
            reach: Reach::default(),
            private_redirects: false,
            url,
            authorization,
            ranges: true,
            validator: None,
            encoding: None,
        }
    }

    fn without_secrets(&self) -> Self {
        let url = Url::parse(&stable_name(self.url.as_str())).unwrap_or_else(|_| self.url.clone());
        Self {
            resolved: url.clone(),
            url,
            authorization: None,
            ..self.clone()
        }
    }

    /// The header with its credentials.
    pub(crate) fn authorization_header(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(self.authorization.as_ref()?.reveal()).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for UrlBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UrlBlob")
            .field("url", &shown_url(&self.url))
            .field("ranges", &self.ranges)
            .field("validator", &self.validator)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_another_state_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.tar");
        std::fs::write(&path, "one").unwrap();
        let found = Blob::of_file("layer.tar".to_owned(), &path).unwrap();
        let Place::File(file) = &found.place else {
            panic!("a file")
        };
        assert!(file.open().is_ok());
        let told: Blob = serde_json::from_str(&serde_json::to_string(&found).unwrap()).unwrap();
        assert_eq!((told.state(), told.len), (found.state(), 3));
        std::fs::write(&path, "two").unwrap();
        let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_times(times)
            .unwrap();
        assert!(matches!(file.open(), Err(SourceError::FileChanged(_))));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(file.open(), Err(SourceError::File { .. })));
        std::fs::create_dir(&path).unwrap();
        assert!(Blob::of_file(String::new(), &path).is_err());
    }

    #[test]
    fn neither_name_nor_debug_shows_secrets() {
        let url = Url::parse("https://me:word@host/layer.tar?sig=word").unwrap();
        let blob = Blob::of_url(UrlBlob::new(&url), 7);
        assert_eq!(blob.name, "https://host/layer.tar?…");
        assert!(!format!("{blob:?}").contains("word"));
        let told: Blob = serde_json::from_str(&serde_json::to_string(&blob).unwrap()).unwrap();
        let Place::Url(told) = told.place else { panic!("a URL") };
        assert_eq!(told.authorization_header().unwrap(), "Basic bWU6d29yZA==");
        assert_eq!(told.url.as_str(), "https://host/layer.tar?sig=word");
    }

    #[test]
    fn names_in_the_cache_stay_what_they_were() {
        let url = Url::parse("https://host/layer.tar?a=b").unwrap();
        let mut at = UrlBlob::new(&url);
        assert_eq!(Blob::of_url(at.clone(), 7).cache_name(), None);
        at.validator = Some(Validator::ETag("\"1\"".to_owned()));
        let name = Blob::of_url(at, 7).cache_name();
        assert_eq!(name.as_deref(), Some("https://host/layer.tar?a=b\netag:\"1\""));
        let state = FileState {
            dev: 1,
            ino: 2,
            len: 3,
            mtime: (4, 5),
            ctime: Some((6, 7)),
        };
        assert_eq!(state.to_string(), "file:1:2:3:4.000000005:6.000000007");
    }
}
