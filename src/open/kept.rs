//! The cache directory. In: a layer's identity. Out: its index, and where its bytes are kept.
//!
//! Everything in it can be deleted at any time, by anybody, and is checked when it is read. Indexes are kept under a digest
//! of the identity, so that names and URLs (which may hold secrets) do not show.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::{MAX_INDEX_BYTES, OpenError};

/// How many indexes are kept; those not used the longest go.
const MAX_INDEXES: usize = 256;

/// A cache directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    dir: PathBuf,
}

/// Where things are kept when nobody says otherwise: `/var/cache/tarblk` for root, else `$XDG_CACHE_HOME/tarblk` or
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
    /// When the current directory is unknown and `dir` is relative to it.
    pub fn new(dir: &Path) -> Result<Self, OpenError> {
        let absolute = std::path::absolute(dir);
        Ok(Self {
            dir: absolute.map_err(|cause| OpenError::Cache {
                path: dir.to_owned(),
                cause,
            })?,
        })
    }

    /// Where it is; absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where layers' bytes are kept.
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

    /// The index kept for a layer, and where.
    pub(super) fn index(&self, identity: &str) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.index_path(identity);
        let file = File::open(&path).ok()?;
        // Used now: the last to be removed.
        let _ = file.set_modified(SystemTime::now());
        let mut bytes = Vec::new();
        file.take(MAX_INDEX_BYTES).read_to_end(&mut bytes).ok()?;
        Some((path, bytes))
    }

    /// Keeps a layer's index, whole or not at all, and returns where.
    pub(super) fn keep_index(&self, identity: &str, bytes: &[u8]) -> Result<PathBuf, OpenError> {
        let path = self.index_path(identity);
        let keep = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(self.indexes())?;
            let mut file = tempfile::NamedTempFile::new_in(self.indexes())?;
            file.write_all(bytes)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        keep().map_err(|cause| OpenError::Cache {
            path: self.indexes(),
            cause,
        })?;
        self.forget_oldest();
        Ok(path)
    }

    /// Removes the indexes that were not used the longest, when there are too many.
    fn forget_oldest(&self) {
        let Ok(entries) = fs::read_dir(self.indexes()) else {
            return;
        };
        let used = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
        let mut all: Vec<_> = entries.flatten().filter_map(used).collect();
        all.sort();
        for (_, path) in all.iter().take(all.len().saturating_sub(MAX_INDEXES)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// An identity as a file name.
fn digest(identity: &str) -> String {
    use std::fmt::Write as _;
    Sha256::digest(identity.as_bytes())
        .iter()
        .fold(String::with_capacity(64), |mut name, byte| {
            let _ = write!(name, "{byte:02x}");
            name
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_found_by_identity_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(&dir.path().join("not/yet/there")).unwrap();
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
        let cache = Cache::new(dir.path()).unwrap();
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
