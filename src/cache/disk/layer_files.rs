//! The files that hold a layer's chunks. In: the cache directory, and a layer's key and length. Out: files that fit each other and are this
//! process's to write, or a file without a name beside another process's.
//!
//! Invariant: a file that was ever in use is never emptied: another process may still read what the map said when it came.

use std::io;
use std::sync::OnceLock;

use super::dir::{CacheFile, SafeDir};
use super::files::{data_name, end_data, map_name, read_map};
use super::map::{self, ChunkMap, Identity, Protection};
use super::{DiskCacheError, nonce, verity};
use crate::cache::chunk::chunk_count;

/// The files that hold a layer's chunks.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) identity: Identity,
    pub(super) data: CacheFile,
    pub(super) map: ChunkMap,
    /// Whether the data file has a name in the directory, and its map one.
    pub(super) named: bool,
    /// Set when the kernel keeps the data file as it was when all of it was compared with digests.
    pub(super) protection: OnceLock<Protection>,
    /// What another process's map said when this one came.
    pub(super) others: Option<(CacheFile, ChunkMap)>,
}

impl Files {
    /// The file that holds chunk `index`, and what its map says of it.
    pub(super) fn holder(&self, index: u32) -> (&CacheFile, &ChunkMap) {
        match &self.others {
            Some((file, map)) if !self.map.bits.has(index) && map.bits.has(index) => (file, map),
            _ => (&self.data, &self.map),
        }
    }

    /// Whether the kernel has compared all that is read of chunk `index` with what was right.
    pub(super) fn is_compared(&self, index: u32) -> bool {
        self.protection.get().is_some() && self.map.bits.has(index)
    }

    /// The files of a layer in the cache directory: those that are there, if they fit each other, or new ones.
    /// With `patient` this process has just had them open, and may be about to close them.
    pub(super) fn open(
        dir: &SafeDir,
        key: [u8; 32],
        size: u64,
        patient: bool,
    ) -> Result<(Self, Option<map::Decoded>), DiskCacheError> {
        const ATTEMPTS: u32 = 16;
        const PATIENCE: u32 = 400;
        const GLANCES: u32 = 4;
        let (data_name, map_name) = (data_name(&key), map_name(&key));
        let path = dir.path().join(&data_name);
        let fail = |doing| DiskCacheError::new(&path, doing);
        for _ in 0..ATTEMPTS {
            let data = match dir.open_own(&data_name) {
                Ok(data) => data,
                Err(error) if error.kind() == io::ErrorKind::NotFound => match dir.create_own(&data_name) {
                    Ok(data) => data,
                    // Another process has made it first, or removed it at once.
                    Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                        continue;
                    }
                    Err(error) => return Err(fail("make")(error)),
                },
                Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                    let data = dir.open_file(&data_name).map_err(fail("open"))?;
                    let Some(mut read) = read_map(dir, &data, &key).filter(|read| read.identity.size == size) else {
                        return Err(fail("begin anew")(error));
                    };
                    return Ok((Self::found(data, &mut read), Some(read)));
                }
                Err(error) => return Err(fail("open")(error)),
            };
            let tries = if patient { PATIENCE } else { GLANCES };
            let locked = data.lock() || {
                // It may be a command that makes room or looks at what there is: the one has the directory's turn, the other is
                // done in a moment. How the waiting for the turn ended shows below.
                drop(dir.turn());
                (0..tries).any(|n| {
                    if n > 0 {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    data.lock()
                })
            };
            if !locked {
                let others = read_map(dir, &data, &key).filter(|read| read.identity.size == size);
                let data = data.only_read();
                let nameless = Self::nameless(dir, key, size, others.map(|read| (data, read.map)))?;
                return Ok((nameless, None));
            }
            // Another process may have deleted it between our opening and our locking: then the lock is on a file without a name.
            if !data.is_called(dir, &data_name) {
                continue;
            }
            let fits = |read: &map::Decoded| read.identity.size == size && is_of_use(&data, read);
            if let Some(mut read) = read_map(dir, &data, &key).filter(fits) {
                return Ok((Self::found(data, &mut read), Some(read)));
            }
            // No map that fits: begin anew. Another process may still read what the map said when it came, so a file
            // that was ever in use is never emptied: it loses its name instead, and the next attempt makes another.
            let len = data.file().metadata().map_err(fail("look at"))?.len();
            if len > 0 {
                dir.remove(&data_name).map_err(fail("remove data that no map fits"))?;
                continue;
            }
            // The map goes first, so that it never speaks of the new data.
            dir.remove(&map_name).map_err(DiskCacheError::new(
                &dir.path().join(&map_name),
                "remove a map that does not fit its data",
            ))?;
            let new = Self::begin(data, key, size, None).map_err(fail("set its length"))?;
            return Ok((Self { named: true, ..new }, None));
        }
        Err(fail("lock")(io::Error::other("it is deleted again and again")))
    }

    pub(super) fn found(data: CacheFile, read: &mut map::Decoded) -> Self {
        // A protection that the file does not have, or no longer: it was copied, or a crash took it.
        let claimed = read.about.protection.take();
        let is_real = |claimed: &Protection| matches!(verity::measure(&data), Ok(Some(file)) if file == claimed.file);
        let protection = claimed.filter(is_real).map_or_else(OnceLock::new, OnceLock::from);
        Self {
            identity: read.identity,
            data,
            map: std::mem::replace(&mut read.map, ChunkMap::new(0)),
            named: true,
            protection,
            others: None,
        }
    }

    /// A file that goes with the process.
    pub(super) fn nameless(
        dir: &SafeDir,
        key: [u8; 32],
        size: u64,
        others: Option<(CacheFile, ChunkMap)>,
    ) -> Result<Self, DiskCacheError> {
        let data = dir
            .create_nameless()
            .map_err(DiskCacheError::new(dir.path(), "make a temporary file in it"))?;
        Self::begin(data, key, size, others).map_err(DiskCacheError::new(
            dir.path(),
            "set the length of a temporary file in it",
        ))
    }

    /// An empty data file without a name.
    pub(super) fn begin(
        data: CacheFile,
        key: [u8; 32],
        size: u64,
        others: Option<(CacheFile, ChunkMap)>,
    ) -> io::Result<Self> {
        let identity = Identity {
            size,
            key,
            nonce: nonce(),
        };
        end_data(&data, &identity)?;
        Ok(Self {
            identity,
            data,
            map: ChunkMap::new(chunk_count(size).unwrap_or(u32::MAX)),
            named: false,
            protection: OnceLock::new(),
            others,
        })
    }
}

/// Whether a data file that its map fits can be used: one that cannot be written has to have everything.
pub(super) fn is_of_use(data: &CacheFile, read: &map::Decoded) -> bool {
    data.is_writable() || read.map.bits.is_full()
}
