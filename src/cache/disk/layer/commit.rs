//! The directory's side of a layer's cache. In: what was written, a name, and what is to be given up. Out: a map in the directory that says
//! no more than is durable in the data file; disk space that is free again.
//!
//! Invariant: a bit is gone from the map on disk, durably, before its chunk's space is given back.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::super::dir::SafeDir;
use super::super::files::{data_name, extent_of_group, groups_of, map_name, write_new};
use super::super::layer_files::Files;
use super::super::map::{self, About, GROUP_CHUNKS, Label};
use super::super::{DiskCache, DiskCacheError, lock};
use super::LayerCache;

impl LayerCache {
    /// Makes what was written durable and puts it in the map. Waits for the disk.
    ///
    /// # Errors
    /// When the disk does not take it, which was said; the old map stays.
    pub fn commit(&self) -> Result<(), DiskCacheError> {
        let Some(store) = &self.store else { return Ok(()) };
        let _one_at_a_time = lock(&store.committing);
        let files = self.files();
        if self.is_poisoned() || !files.named || !files.data.is_ours() {
            return Ok(());
        }
        let dirty = self.dirty.swap(0, Ordering::Relaxed);
        if dirty == 0 {
            return Ok(());
        }
        let committed = self.commit_in(store, &files);
        match &committed {
            Ok(()) => store.worked(),
            Err(error) => {
                self.dirty.fetch_add(dirty, Ordering::Relaxed);
                if let DiskCacheError::Io { source, .. } = error {
                    store.failed(source);
                }
            }
        }
        committed
    }

    fn commit_in(&self, store: &Arc<DiskCache>, files: &Files) -> Result<(), DiskCacheError> {
        let dir = store.dir_in_place()?;
        if !files.data.is_called(&dir, &data_name(&self.key)) {
            self.begin_anew(&dir)?;
            log::warn!(
                "{}: the cache was emptied or deleted while it was used; what is fetched from now on is kept again",
                dir.path().display()
            );
            return Ok(());
        }
        if !files.data.is_writable() && !files.map.bits.is_full() {
            // What was spoiled in a protected file cannot be written anew.
            let name = data_name(&self.key);
            let path = dir.path().join(&name);
            self.remove_names(&dir)
                .map_err(DiskCacheError::new(&path, "remove what is damaged in"))?;
            self.begin_anew(&dir)?;
            log::warn!("{}: it was spoiled, and is kept anew", path.display());
            return Ok(());
        }
        // The bits are taken before the data is made durable: those set meanwhile wait for the next time.
        let bytes = self.map_bytes(files);
        let path = dir.path().join(map_name(&self.key));
        files
            .data
            .sync()
            .map_err(DiskCacheError::new(&path, "sync the data of"))?;
        self.write_map(&dir, &bytes)
            .map_err(DiskCacheError::new(&path, "write"))
    }

    fn map_bytes(&self, files: &Files) -> Vec<u8> {
        self.touched.store(false, Ordering::Relaxed);
        let about = About {
            sealed: self.is_sealed(),
            protection: files.protection.get().copied(),
            label: lock(&self.label).clone(),
        };
        map::encode(&files.identity, &about, &files.map)
    }

    /// How long its map is now, in bytes, at most.
    pub(in crate::cache::disk) fn map_len(&self) -> u64 {
        let held = self.files().map.bits.count_set();
        u64::from(self.count).div_ceil(8) + 8 * held + 4096
    }

    fn write_map(&self, dir: &SafeDir, bytes: &[u8]) -> io::Result<()> {
        write_new(dir, &map_name(&self.key), bytes)
    }

    /// The data file has lost its name. What is in the file goes with it; from now on chunks are kept in a new one.
    fn begin_anew(&self, dir: &SafeDir) -> Result<(), DiskCacheError> {
        let _layout = lock(&self.layout);
        self.exchange_files(dir)
    }

    /// The same for who holds the layout. What another process has put in its place meanwhile is not used: whoever reads this takes
    /// chunks for verified that were verified once.
    fn exchange_files(&self, dir: &SafeDir) -> Result<(), DiskCacheError> {
        let (mut files, read) = Files::open(dir, self.key, self.size, false)?;
        if read.is_some() || files.others.is_some() {
            files = Files::nameless(dir, self.key, self.size, None)?;
        }
        self.sealed.store(false, Ordering::Relaxed);
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(files);
        Ok(())
    }

    /// Takes the data file's name and its map away, durably.
    fn remove_names(&self, dir: &SafeDir) -> io::Result<()> {
        dir.remove(&map_name(&self.key))?;
        dir.remove(&data_name(&self.key))?;
        dir.sync()
    }

    /// Groups of chunks that are here, but for a layer's own file: the group, when it was last used, and bytes in it.
    pub(in crate::cache::disk) fn groups(&self) -> Vec<(u32, u32, u64)> {
        let files = self.files();
        if self.borrowed || !files.data.is_ours() {
            return Vec::new();
        }
        let mut groups = groups_of(&files.map, self.size, self.count);
        if !files.data.is_writable() {
            // All of it goes, or nothing.
            let latest = groups.iter().map(|group| group.1).max().unwrap_or(0);
            for group in &mut groups {
                group.1 = latest;
            }
        }
        groups
    }

    /// Disk space that its own file takes, in bytes, and whether the file is found in `dir`.
    pub(in crate::cache::disk) fn disk_bytes(&self, dir: &SafeDir) -> (u64, bool) {
        let files = self.files();
        let named = files.named && files.data.is_called(dir, &data_name(&self.key));
        (files.data.disk_bytes(), named)
    }

    /// Gives groups of chunks up, and their disk space back; says how much that was. In this order: they are not here any more; the
    /// map on disk does not speak of them, durably; their space goes. All of a protected layer goes. Waits for the disk.
    ///
    /// # Errors
    /// When the disk refuses one of these.
    pub(in crate::cache::disk) fn give_up(&self, dir: &SafeDir, groups: &[u32]) -> io::Result<u64> {
        let committing = self.store.as_ref().map(|store| lock(&store.committing));
        let _layout = lock(&self.layout);
        let files = self.files();
        self.sealed.store(false, Ordering::Relaxed);
        if !files.data.is_writable() {
            let bytes = files.data.disk_bytes();
            if files.named && files.data.is_called(dir, &data_name(&self.key)) {
                self.remove_names(dir)?;
            }
            self.exchange_files(dir).map_err(io::Error::other)?;
            return Ok(bytes);
        }
        for group in groups {
            let first = group.saturating_mul(GROUP_CHUNKS);
            (first..first.saturating_add(GROUP_CHUNKS)).for_each(|index| files.map.bits.clear(index));
        }
        if files.named && files.data.is_called(dir, &data_name(&self.key)) {
            // What was written meanwhile may be in it: its data has to be durable first, as ever.
            let bytes = self.map_bytes(&files);
            let written = files.data.sync().and_then(|()| self.write_map(dir, &bytes));
            if let Err(error) = written {
                // A disk that is full to the brim takes no new map. Without one nothing is believed, which is true as well.
                log::debug!("{}: cannot write the map: {error}", map_name(&self.key));
                dir.remove(&map_name(&self.key))?;
                self.dirty.fetch_add(1, Ordering::Relaxed);
            }
            dir.sync()?;
        }
        drop(committing);
        let before = files.data.disk_bytes();
        let mut groups = groups.to_vec();
        groups.sort_unstable();
        for run in groups.chunk_by(|a, b| a.saturating_add(1) == *b) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let (start, _) = extent_of_group(self.size, *first);
            let (last, len) = extent_of_group(self.size, *last);
            files.data.punch(start, last + len - start)?;
        }
        Ok(before.saturating_sub(files.data.disk_bytes()))
    }

    /// Says what a person calls the layer, for who lists the cache; `name` holds no secrets. The map has it from its next writing on.
    pub(crate) fn describe(&self, name: &str, digest: &str) {
        let new = Label::new(name, digest);
        let mut label = lock(&self.label);
        if *label != new {
            *label = new;
        }
    }

    /// Removes files that hold no chunk. They are locked until after that, so no one else has begun to use them.
    fn leave_nothing_empty(&self, dir: &SafeDir) {
        let files = self.files();
        let name = data_name(&self.key);
        if files.named && files.data.is_ours() && files.map.bits.count_set() == 0 && files.data.is_called(dir, &name) {
            let removed = dir.remove(&map_name(&self.key)).and_then(|()| dir.remove(&name));
            if let Err(error) = removed {
                log::debug!("{name}: {error}");
            }
        }
    }

    /// Sets the map's time, which is when the layer was last used.
    pub(super) fn mark_used(&self, dir: &SafeDir) {
        if let Ok(map) = dir.open_file(&map_name(&self.key)) {
            // Only what is shown suffers when the time cannot be set.
            let _unmarked = map.file().set_modified(std::time::SystemTime::now());
        }
    }
}

impl Drop for LayerCache {
    fn drop(&mut self) {
        if self.touched.load(Ordering::Relaxed) {
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
        if let Err(error) = self.commit() {
            log::debug!("{error}");
        }
        if let Some(store) = &self.store {
            self.leave_nothing_empty(&store.dir());
            store.forget(&self.key);
        }
    }
}
