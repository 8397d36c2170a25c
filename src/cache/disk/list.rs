//! What is kept, for people. In: a cache directory. Out: its layers, one by one; checks, pins and removals of them.
//!
//! Layers that a process has open are only read: their files are that process's to write.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use serde::Serialize;

use super::dir::{CacheFile, SafeDir, blocks};
use super::files::{data_name, groups_of, key_of, map_name, pin_name, read_map};
use super::map::Decoded;
use super::room::remove_unused;
use super::{DiskCache, DiskCacheError, LayerCache, LayerKey};
use crate::cache::chunk::{chunk_count, chunk_len};
use crate::digest::hexadecimal;
use crate::units::{CHUNK_BYTES, len_usize};

/// A layer that is kept.
#[allow(
    clippy::struct_excessive_bools,
    reason = "they say what they say, independently of each other, also as JSON"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeptLayer {
    /// The name of its files: 64 hexadecimal digits.
    pub key: String,
    /// Where it was read from, without secrets; empty if unknown.
    pub name: String,
    /// The blob's digest; empty if unknown.
    pub digest: String,
    /// Bytes of the layer's tar; 0 if its files do not fit each other.
    pub bytes: u64,
    /// How many of them are here.
    pub held: u64,
    /// Bytes that its files take on disk.
    pub disk: u64,
    /// When it was last used, in seconds since 1970 UTC.
    pub used: u64,
    /// Whether all of it is here and was checked against its digest.
    pub complete: bool,
    /// Whether the kernel keeps all of it as it was when it was compared with its digests (fs-verity).
    pub protected: bool,
    /// Whether it is never given up.
    pub pinned: bool,
    /// Whether a process has it open.
    pub in_use: bool,
    /// Whether its files fit each other: what does not is not used. In use, it may have been begun just now, and have no map yet.
    pub usable: bool,
}

/// What checking a layer found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Chunks that were read.
    pub chunks: u64,
    /// Those that are not what was written.
    pub damaged: u64,
    /// Whether those are forgotten now; the chunks of a layer in use are when they are read.
    pub dropped: bool,
}

/// What became of a layer that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It is gone, and gave so many bytes back.
    Freed(u64),
    /// A process has it open.
    InUse,
    /// It is pinned.
    Pinned,
}

impl KeptLayer {
    /// The key that it goes by.
    #[must_use]
    pub fn layer_key(&self) -> Option<LayerKey> {
        key(self).map(LayerKey)
    }

    /// Whether a person who types `what` may mean this layer: its name, or how its digest or the name of its files begins.
    #[must_use]
    pub fn is_meant(&self, what: &str) -> bool {
        /// Shorter beginnings mean nothing.
        const SHORTEST: usize = 4;
        let begins = |text: &str| what.len() >= SHORTEST && text.starts_with(what);
        let hex = self.digest.split_once(':').map_or("", |(_, hex)| hex);
        (!what.is_empty() && self.name == what) || begins(&self.digest) || begins(hex) || begins(&self.key)
    }
}

/// The key that a kept layer goes by.
fn key(layer: &KeptLayer) -> Option<[u8; 32]> {
    key_of(&format!("{}.data", layer.key))
}

impl DiskCache {
    /// All layers that are kept, the last used first.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<KeptLayer>, DiskCacheError> {
        let dir = self.dir();
        let names = dir
            .names()
            .map_err(DiskCacheError::new(dir.path(), "list the cache directory"))?;
        let keys = names.iter().filter_map(|name| key_of(name));
        let mut layers: Vec<KeptLayer> = keys.filter_map(|key| look_at(&dir, &key)).collect();
        layers.sort_by(|a, b| (b.used, &a.key).cmp(&(a.used, &b.key)));
        Ok(layers)
    }

    /// Reads all that is kept of a layer and compares it with its checksums; `read` is told of bytes as they are read. Chunks that are not
    /// what was written are forgotten, and fetched again when they are wanted.
    ///
    /// # Errors
    /// When its files cannot be read, or a disk refuses what is to be changed.
    pub fn verify(self: &Arc<Self>, layer: &KeptLayer, read: &mut dyn FnMut(u64)) -> Result<Verified, DiskCacheError> {
        let dir = self.dir();
        let name = format!("{}.data", layer.key);
        let path = dir.path().join(&name);
        let mut verified = Verified {
            dropped: true,
            ..Verified::default()
        };
        let Some(key) = key(layer) else { return Ok(verified) };
        let data = match dir.open_file(&name) {
            Ok(data) => data,
            // Given up meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(verified),
            Err(error) => return Err(DiskCacheError::new(&path, "open")(error)),
        };
        let Some(map) = read_map(&dir, &data, &key) else {
            return Ok(verified);
        };
        let mut buffer = vec![0; len_usize(CHUNK_BYTES)];
        let mut is_right = |map: &Decoded, index: u32| {
            let held = &mut buffer[..len_usize(chunk_len(map.identity.size, index))];
            let done = data.file().read_exact_at(held, u64::from(index) * CHUNK_BYTES);
            read(chunk_len(map.identity.size, index));
            done.is_ok() && map.map.matches(index, held)
        };
        let mut damaged = Vec::new();
        let count = chunk_count(map.identity.size).unwrap_or(0);
        for index in (0..count).filter(|index| map.map.bits.has(*index)) {
            verified.chunks += 1;
            if !is_right(&map, index) {
                damaged.push(index);
            }
        }
        // Whoever has it open may have given them up, or written them anew, since the map was read.
        if let (false, Some(map)) = (damaged.is_empty(), read_map(&dir, &data, &key)) {
            damaged.retain(|index| map.map.bits.has(*index) && !is_right(&map, *index));
        }
        verified.damaged = u64::try_from(damaged.len()).unwrap_or(u64::MAX);
        if damaged.is_empty() {
            return Ok(verified);
        }
        drop(data);
        let _turn = dir
            .turn()
            .map_err(DiskCacheError::new(dir.path(), "lock the cache directory"))?;
        let Ok(own) = LayerCache::open_kept(self, key) else {
            verified.dropped = false;
            return Ok(verified);
        };
        for index in &damaged {
            own.lost(*index);
        }
        own.commit()?;
        Ok(verified)
    }

    /// Keeps a layer from being given up, or no longer.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn set_pinned(&self, layer: &KeptLayer, pinned: bool) -> Result<(), DiskCacheError> {
        let dir = self.dir();
        let Some(key) = key(layer) else { return Ok(()) };
        let name = pin_name(&key);
        let done = if pinned {
            match dir.create_file(&name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                made => made.map(drop),
            }
        } else {
            dir.remove(&name)
        };
        done.map_err(DiskCacheError::new(&dir.path().join(name), "change a pin"))
    }

    /// Removes all that is kept of a layer, unless a process has it open or it is pinned.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn remove(&self, layer: &KeptLayer) -> Result<Removed, DiskCacheError> {
        let dir = self.dir();
        let Some(key) = key(layer) else {
            return Ok(Removed::Freed(0));
        };
        if dir.stat(&pin_name(&key)).is_ok() {
            return Ok(Removed::Pinned);
        }
        let name = data_name(&key);
        let freed = dir
            .turn()
            .and_then(|_turn| remove_unused(&dir, &name))
            .map_err(DiskCacheError::new(&dir.path().join(&name), "remove"))?;
        let is_there = dir.stat(&name).is_ok();
        Ok(if is_there {
            Removed::InUse
        } else {
            Removed::Freed(freed)
        })
    }

    /// Whether all of a layer with this key, whose tar is `size` bytes long, is kept. Opens nothing that is not there.
    #[must_use]
    pub fn holds_whole(&self, key: LayerKey, size: u64) -> bool {
        let dir = self.dir();
        let found = dir.open_file(&data_name(&key.0)).ok();
        let read = found.and_then(|data| read_map(&dir, &data, &key.0));
        read.is_some_and(|read| read.identity.size == size && read.map.bits.is_full())
    }
}

/// What is known of a layer by looking at its files; none if they are gone.
fn look_at(dir: &SafeDir, key: &[u8; 32]) -> Option<KeptLayer> {
    let stat = dir.stat(&data_name(key)).ok()?;
    let map_stat = dir.stat(&map_name(key)).ok();
    let data = dir.open_file(&data_name(key)).ok();
    // In this order: who closes it writes the map first, so one that is not in use any more has its last map.
    let in_use = data.as_ref().is_some_and(CacheFile::is_locked);
    let read = data.as_ref().and_then(|data| read_map(dir, data, key));
    let groups = read.as_ref().map(|read| {
        let count = chunk_count(read.identity.size).unwrap_or(0);
        groups_of(&read.map, read.identity.size, count)
    });
    let groups = groups.unwrap_or_default();
    let seconds = |stat: &rustix::fs::Stat| u64::try_from(stat.st_mtime).unwrap_or(0);
    let opened = map_stat.as_ref().map_or_else(|| seconds(&stat), seconds);
    let read_last = groups.iter().map(|group| u64::from(group.1)).max().unwrap_or(0);
    let label = read.as_ref().map(|read| read.about.label.clone()).unwrap_or_default();
    Some(KeptLayer {
        key: hexadecimal(key),
        name: label.name,
        digest: label.digest,
        bytes: read.as_ref().map_or(0, |read| read.identity.size),
        held: groups.iter().map(|group| group.2).sum(),
        disk: blocks(&stat) + map_stat.as_ref().map_or(0, blocks),
        used: opened.max(read_last),
        complete: read
            .as_ref()
            .is_some_and(|read| read.about.sealed && read.map.bits.is_full()),
        protected: read.as_ref().is_some_and(|read| read.about.protection.is_some()),
        pinned: dir.stat(&pin_name(key)).is_ok(),
        in_use,
        usable: read.is_some(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::disk::CacheLimit;
    use crate::units::TarOffset;

    const SIZE: u64 = 40 * CHUNK_BYTES + 5;

    fn filled(store: &Arc<DiskCache>, name: &str) -> Arc<LayerCache> {
        let cache = store.layer(LayerKey::of_content(name, SIZE), SIZE).unwrap();
        cache.describe(name, &format!("sha256:{}", "ab".repeat(32)));
        cache.put(TarOffset(0), &vec![7; len_usize(30 * CHUNK_BYTES)]);
        cache.commit().unwrap();
        cache
    }

    #[test]
    fn layers_are_listed_checked_pinned_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskCache::open(dir.path(), CacheLimit::bytes(64 << 20)).unwrap();
        drop(filled(&store, "closed"));
        let open = filled(&store, "open");
        // As another process sees it.
        let other = DiskCache::open_existing(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let listed = other.list().unwrap();
        assert_eq!(listed.len(), 2);
        let of = |name: &str| listed.iter().find(|layer| layer.name == name).unwrap().clone();
        let (closed, in_use) = (of("closed"), of("open"));
        assert_eq!((closed.bytes, closed.held), (SIZE, 30 * CHUNK_BYTES));
        assert!(closed.disk >= closed.held && closed.used > 0 && closed.usable);
        assert!(!closed.in_use && in_use.in_use && !closed.complete && !closed.pinned);
        assert!(closed.is_meant("closed") && closed.is_meant("abab") && closed.is_meant("sha256:ab"));
        assert!(closed.is_meant(&closed.key[..8]) && !closed.is_meant("ab") && !closed.is_meant("close"));

        for layer in [&closed, &in_use] {
            let mut bytes = 0;
            let verified = other.verify(layer, &mut |n| bytes += n).unwrap();
            assert_eq!((verified.chunks, verified.damaged, bytes), (30, 0, 30 * CHUNK_BYTES));
            let path = dir.path().join(format!("{}.data", layer.key));
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(b"x", 3 * CHUNK_BYTES + 100).unwrap();
            let verified = other.verify(layer, &mut |_| {}).unwrap();
            assert_eq!((verified.damaged, verified.dropped), (1, !layer.in_use), "{layer:?}");
        }
        assert_eq!(other.verify(&closed, &mut |_| {}).unwrap().chunks, 29);

        other.set_pinned(&closed, true).unwrap();
        other.set_pinned(&closed, true).unwrap();
        assert_eq!(other.remove(&closed).unwrap(), Removed::Pinned);
        assert_eq!(other.trim(0).unwrap(), 0, "a pinned layer, or one in use, was given up");
        other.set_pinned(&closed, false).unwrap();
        assert_eq!(other.remove(&in_use).unwrap(), Removed::InUse);
        assert!(matches!(other.remove(&closed).unwrap(), Removed::Freed(bytes) if bytes >= 29 * CHUNK_BYTES));
        assert_eq!(other.list().unwrap().len(), 1);
        assert!(open.has(29));
    }
}
