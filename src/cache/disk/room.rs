//! The limit of the disk cache, kept at every moment. In: how many bytes are about to be written. Out: room for them, or none now.
//!
//! What the files take is what the filesystem says it takes (`st_blocks`), counted anew whenever the room that was found last is
//! used up. Before that, whoever writes takes from this room without asking anybody. Where there is no room left, the groups of
//! chunks that were unused longest are given up, whoever has their layers open in this process, or no one; pinned layers are not.
//!
//! Processes share a directory: what one of them may still write, or has in files without names, is the length of a file
//! (`writer-*.lock`) that it keeps locked, and the others count it as taken.
//!
//! Invariant: bytes on disk, bytes being written and room to write to are never more than the limit together. Pins alone may be more.
//!
//! A disk that refuses to be written (full, read-only, broken) is left alone for a while, ever longer, which is said once.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::dir::{CacheFile, SafeDir, blocks};
use super::files::{
    data_name, groups_of, is_ledger, is_part, key_of, ledger_name, map_name, pin_name, read_map, read_map_alone,
};
use super::reservation::Reservation;
use super::{DiskCache, DiskCacheError, LayerCache, lock, nonce};
use crate::units::CHUNK_BYTES;

/// What writing takes besides the bytes: their last block, and one of the filesystem's own.
const MARGIN: u64 = 2 * 4096;
/// For maps and for what the filesystem takes by itself, beside the largest map.
const SLACK: u64 = 64 << 10;
/// So much of the limit is looked for at once, within the bounds.
const STEPS: u64 = 64;
const SHORTEST_STEP: u64 = 256 << 10;
const LONGEST_STEP: u64 = 64 << 20;
/// After no room was found it is looked for again in so long.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// So long after chunks of an open layer were given up, the cache counts as tight.
const TIGHT_TIME: Duration = Duration::from_secs(600);
/// A disk that failed is tried again in so long, and twice as long each time.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);
/// The part of the filesystem that is left to others: one in so many, but no more than [`MOST_KEPT_FREE`].
const KEPT_FREE: u64 = 20;
/// Bytes that others are left on a large disk: a twentieth of that would be more than whole images take, and a cache that keeps nothing
/// beside them makes every start a first one.
const MOST_KEPT_FREE: u64 = 1 << 30;
/// A temporary map this old belongs to no one.
const LEFTOVER_AGE: u64 = 3600;

/// The room of one process in a cache directory.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Bytes that may be written without asking.
    free: AtomicU64,
    /// Bytes that are being written, and may not have been counted yet.
    writing: Arc<AtomicU64>,
    /// Held while room is looked for.
    search: Mutex<Search>,
    resting: AtomicBool,
    rest: Mutex<Option<Rest>>,
    /// Whether there was not even room for a chunk when it was last looked for.
    full: AtomicBool,
    /// Whether the files' space cannot be given back in part.
    no_holes: AtomicBool,
    /// When an open layer last had to give up chunks, or no room was found, in milliseconds since `begun`; 0 if never.
    tight: AtomicU64,
    begun: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Search {
    /// The file by which other processes know of this one.
    ledger: Option<(CacheFile, String)>,
    /// Not before, after it was in vain.
    again: Option<Instant>,
    /// Whether that was said.
    told: bool,
}

/// A disk that refuses to be written.
#[derive(Debug)]
struct Rest {
    why: String,
    until: Instant,
    pause: Duration,
}

/// What a directory holds.
#[derive(Debug, Default)]
struct Usage {
    /// Bytes of this and the directories beside.
    files: u64,
    /// What other processes may write or have in files without names.
    others: u64,
    /// What this process has in files without names.
    hidden: u64,
}

/// A group of chunks that may be given up.
struct Candidate {
    costly: bool,
    used: u32,
    layer: usize,
    group: u32,
    bytes: u64,
}

/// Whose chunks those are.
enum Holder {
    Open(Arc<LayerCache>),
    Kept([u8; 32]),
    /// A data file that no map fits: it goes as a whole.
    Junk(String),
}

/// How much of a filesystem of `all` bytes is left to others, in bytes, where no one named the cache's size.
pub(super) fn kept_free(all: u64) -> u64 {
    (all / KEPT_FREE).min(MOST_KEPT_FREE)
}

impl Room {
    /// What was found is not to be used any more.
    pub(super) fn close(&self) {
        self.free.store(0, Ordering::Release);
    }
}

impl DiskCache {
    pub(super) fn limit_in(&self, dir: &SafeDir) -> u64 {
        let tenth = || dir.space().map_or(0, |(all, _)| all / 10);
        self.limits().bytes.unwrap_or_else(tenth)
    }

    /// Room for `len` bytes that are about to be written; none if there is none now. May wait for the disk.
    pub(super) fn reserve(self: &Arc<Self>, len: u64) -> Option<Reservation> {
        let cost = len.next_multiple_of(4096).saturating_add(MARGIN);
        if let Some(taken) = self.take(cost) {
            return Some(taken);
        }
        let mut search = lock(&self.room.search);
        if let Some(taken) = self.take(cost) {
            return Some(taken);
        }
        if self.is_resting() || search.again.is_some_and(|again| Instant::now() < again) {
            return None;
        }
        search.again = None;
        match self.find_room(&mut search, cost) {
            Ok(true) => {
                search.told = false;
                self.take(cost)
            }
            Ok(false) => {
                self.note_tight();
                search.again = Instant::now().checked_add(FULL_PAUSE);
                if !std::mem::replace(&mut search.told, true) {
                    log::info!(
                        "the disk cache is full, or its disk is, and nothing can be given up for {len} more bytes; they are not kept"
                    );
                }
                None
            }
            Err(error) => {
                self.failed(&error);
                None
            }
        }
    }

    /// Room for another file of `len` bytes in the same cache, as long as what is returned lives; none if there is none now.
    #[must_use]
    pub fn room_for(self: &Arc<Self>, len: u64) -> Option<impl Drop> {
        self.reserve(len)
    }

    /// The disk is tried again at once.
    #[cfg(test)]
    pub(super) fn end_rest(&self) {
        if let Some(rest) = &mut *lock(&self.room.rest) {
            rest.until = Instant::now();
        }
        self.forget_full();
    }

    /// Looks for room at once, also after it was in vain.
    #[cfg(test)]
    pub(super) fn forget_full(&self) {
        lock(&self.room.search).again = None;
    }

    /// Takes of the room that was found.
    fn take(&self, cost: u64) -> Option<Reservation> {
        let room = &self.room;
        // Counted as being written before it is gone from the room, so that it is never in neither.
        room.writing.fetch_add(cost, Ordering::AcqRel);
        let reservation = Reservation::counted(&room.writing, cost);
        let taken = room
            .free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| free.checked_sub(cost));
        taken.is_ok().then_some(reservation)
    }

    /// Looks for room for at least `cost` bytes, and gives up what is coldest for it. Says whether there is.
    fn find_room(self: &Arc<Self>, search: &mut Search, cost: u64) -> io::Result<bool> {
        let room = &self.room;
        let dir = self.dir_in_place().map_err(io::Error::other)?;
        let _turn = dir.turn()?;
        room.free.store(0, Ordering::Release);
        let limit = self.limit_in(&dir);
        let layers = self.layers();
        let slack = SLACK + layers.iter().map(|layer| layer.map_len()).max().unwrap_or(0);
        let step = (limit / STEPS).clamp(SHORTEST_STEP, LONGEST_STEP);
        let want = cost.saturating_add(step);
        let mut usage = self.usage(&dir, search, &layers)?;
        let (by_limit, by_disk) = self.left(&dir, &usage, limit.saturating_sub(slack))?;
        let lacks = |(left, too_much): (u64, u64), wanted: u64| (wanted + too_much).saturating_sub(left);
        let lacking = lacks(by_limit, want).max(lacks(by_disk, want));
        // A disk that others have filled is not made free by giving up everything.
        let least = lacks(by_disk, cost);
        if lacking > 0 && self.give_up_coldest(&dir, lacking, least)? > 0 {
            usage = self.usage(&dir, search, &layers)?;
        }
        let (by_limit, by_disk) = self.left(&dir, &usage, limit.saturating_sub(slack))?;
        let left = by_limit.0.min(by_disk.0);
        room.full.store(left < CHUNK_BYTES + MARGIN, Ordering::Relaxed);
        let found = left.min(want);
        let is_enough = found >= cost;
        let found = if is_enough { found } else { 0 };
        note_in_ledger(
            &dir,
            search,
            found + usage.hidden + room.writing.load(Ordering::Acquire),
        )?;
        room.free.store(found, Ordering::Release);
        Ok(is_enough)
    }

    /// What is left of `limit` and of the disk: room, or else what is too much.
    fn left(&self, dir: &SafeDir, usage: &Usage, limit: u64) -> io::Result<((u64, u64), (u64, u64))> {
        let writing = self.room.writing.load(Ordering::Acquire);
        let promised = usage.others.saturating_add(writing);
        let taken = usage.files.saturating_add(usage.hidden).saturating_add(promised);
        let (all, available) = dir.space()?;
        // Who names a size has decided how much of the disk this may take.
        let kept_free = if self.limits().bytes.is_none() {
            kept_free(all)
        } else {
            0
        };
        let spared = kept_free.saturating_add(promised);
        let difference = |have: u64, need: u64| (have.saturating_sub(need), need.saturating_sub(have));
        Ok((difference(limit, taken), difference(available, spared)))
    }

    /// Counts what is there.
    fn usage(&self, dir: &SafeDir, search: &Search, layers: &[Arc<LayerCache>]) -> io::Result<Usage> {
        let mut usage = Usage {
            files: dir.own_bytes(),
            ..Usage::default()
        };
        let own = search.ledger.as_ref().map(|(_, name)| name.as_str());
        for name in dir.names()? {
            let Ok(stat) = dir.stat(&name) else { continue };
            usage.files += blocks(&stat);
            if is_ledger(&name) && own != Some(name.as_str()) {
                usage.others += live_ledger(dir, &name);
            }
        }
        for beside in &self.limits().beside {
            usage.files += disk_bytes_in(beside);
        }
        for layer in layers {
            let (bytes, named) = layer.disk_bytes(dir);
            if !named {
                usage.hidden += bytes;
            }
        }
        Ok(usage)
    }

    /// Gives up the groups of chunks that were unused longest, at least `bytes` together if there are so many; nothing if all there is
    /// is less than `least`. Says how much disk space that gave. The caller has the directory's turn.
    fn give_up_coldest(self: &Arc<Self>, dir: &SafeDir, bytes: u64, least: u64) -> io::Result<u64> {
        let names: HashSet<String> = dir.names()?.into_iter().collect();
        // No file is opened meanwhile: one that is looked at here would seem to be another process's.
        let open = lock(&self.open);
        let layers = self.layers();
        let mut holders = Vec::new();
        let mut candidates = Vec::new();
        let known: HashSet<[u8; 32]> = layers.iter().map(|layer| *layer.key()).collect();
        let no_holes = self.room.no_holes.load(Ordering::Relaxed);
        for layer in layers {
            if names.contains(&pin_name(layer.key())) || no_holes {
                continue;
            }
            let holder = holders.len();
            candidates.extend(layer.groups().into_iter().map(|(group, used, bytes)| Candidate {
                costly: layer.is_costly(),
                used,
                layer: holder,
                group,
                bytes,
            }));
            holders.push(Holder::Open(layer));
        }
        for name in &names {
            let Some(key) = key_of(name) else { continue };
            if known.contains(&key) || names.contains(&pin_name(&key)) {
                continue;
            }
            // What another process has open is that one's to give up.
            if dir.open_file(name).is_ok_and(|data| data.is_locked()) {
                continue;
            }
            let holder = holders.len();
            let Ok(stat) = dir.stat(name) else { continue };
            let most = u32::try_from(u64::try_from(stat.st_size).unwrap_or(0) / CHUNK_BYTES + 1);
            let read = read_map_alone(dir, &key, most.unwrap_or(u32::MAX));
            if let Some(read) = read
                && let Some(count) = crate::cache::chunk::chunk_count(read.identity.size)
            {
                let groups = groups_of(&read.map, read.identity.size, count);
                let latest = groups.iter().map(|group| group.1).max().unwrap_or(0);
                let goes_whole = no_holes || read.about.protection.is_some();
                candidates.extend(groups.into_iter().map(|(group, used, bytes)| Candidate {
                    costly: false,
                    // Where a file can go only as a whole, its latest use counts.
                    used: if goes_whole { latest } else { used },
                    layer: holder,
                    group,
                    bytes,
                }));
                holders.push(Holder::Kept(key));
            } else {
                candidates.push(Candidate {
                    costly: false,
                    used: 0,
                    layer: holder,
                    group: 0,
                    bytes: blocks(&stat),
                });
                holders.push(Holder::Junk(name.clone()));
            }
        }
        let all: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
        if all < least {
            return Ok(0);
        }
        candidates
            .sort_unstable_by_key(|candidate| (candidate.costly, candidate.used, candidate.layer, candidate.group));
        let mut chosen: Vec<Vec<u32>> = vec![Vec::new(); holders.len()];
        let mut sum = 0;
        for candidate in &candidates {
            if sum >= bytes {
                break;
            }
            sum += candidate.bytes;
            if let Some(groups) = chosen.get_mut(candidate.layer) {
                groups.push(candidate.group);
            }
        }
        let mut freed = 0;
        for (holder, groups) in holders.into_iter().zip(chosen) {
            if groups.is_empty() {
                continue;
            }
            freed += match holder {
                Holder::Open(layer) => {
                    self.note_tight();
                    self.or_no_holes(layer.give_up(dir, &groups))?
                }
                Holder::Kept(key) => self.give_up_kept(dir, key, &groups, no_holes)?,
                Holder::Junk(name) => remove_unused(dir, &name)?,
            };
        }
        drop(open);
        Ok(freed)
    }

    /// Gives up groups of a layer that no one has open, and its files when nothing is left in them.
    fn give_up_kept(self: &Arc<Self>, dir: &SafeDir, key: [u8; 32], groups: &[u32], whole: bool) -> io::Result<u64> {
        if whole {
            return remove_unused(dir, &data_name(&key));
        }
        let Ok(layer) = LayerCache::open_kept(self, key) else {
            // Another process has it, or it does not fit its map.
            return remove_if_unfit(dir, &key);
        };
        let freed = self.or_no_holes(layer.give_up(dir, groups))?;
        if layer.bytes_held() > 0 {
            return Ok(freed);
        }
        let rest = layer.disk_bytes(dir).0;
        dir.remove(&map_name(&key))?;
        dir.remove(&data_name(&key))?;
        Ok(freed + rest)
    }

    /// Remembers that the filesystem takes space back of whole files only.
    fn or_no_holes(&self, outcome: io::Result<u64>) -> io::Result<u64> {
        match outcome {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.room.no_holes.store(true, Ordering::Relaxed);
                Ok(0)
            }
            other => other,
        }
    }

    /// See [`DiskCache::trim`].
    pub(super) fn trim_to(self: &Arc<Self>, limit: u64) -> io::Result<u64> {
        let search = lock(&self.room.search);
        let dir = self.dir_in_place().map_err(io::Error::other)?;
        let _turn = dir.turn()?;
        let mut freed = 0;
        for name in dir.names()? {
            let is_leftover = is_part(&name)
                || (name.contains(".map.")
                    && dir.stat(&name).is_ok_and(|stat| {
                        let age = i64::from(self.now()).saturating_sub(stat.st_mtime);
                        u64::try_from(age).is_ok_and(|age| age > LEFTOVER_AGE)
                    }));
            if is_leftover {
                freed += remove_unused(&dir, &name)?;
            }
        }
        self.room.free.store(0, Ordering::Release);
        let usage = self.usage(&dir, &search, &self.layers())?;
        // What others may write yet is looked at when they do.
        let too_much = (usage.files + usage.hidden).saturating_sub(limit);
        if too_much > 0 {
            freed += self.give_up_coldest(&dir, too_much, 0)?;
        }
        Ok(freed)
    }

    /// Removes the files of layers that do not fit each other, and whatever else has such a name: none of that is ever used. Says how many
    /// bytes that freed.
    ///
    /// # Errors
    /// When the directory cannot be listed, or a file in it not removed.
    pub fn remove_unusable(&self) -> Result<u64, DiskCacheError> {
        let dir = self.dir();
        let remove = || {
            let _turn = dir.turn()?;
            let names = dir.names()?;
            let keys = names.iter().filter_map(|name| key_of(name));
            keys.map(|key| remove_if_unfit(&dir, &key)).sum::<io::Result<u64>>()
        };
        remove().map_err(DiskCacheError::new(
            dir.path(),
            "remove what is damaged in the cache directory",
        ))
    }

    /// Bytes on disk: of this directory, of those beside, and of files without names.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        let search = lock(&self.room.search);
        let usage = self.usage(&self.dir(), &search, &self.layers());
        usage.map_or(0, |usage| usage.files + usage.hidden)
    }

    fn since_begun(&self) -> u64 {
        let begun = self.room.begun.get_or_init(Instant::now);
        u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn note_tight(&self) {
        self.room.tight.store(self.since_begun(), Ordering::Relaxed);
    }

    /// Whether chunks of open layers had to go lately, or there was no room.
    pub(super) fn is_tight(&self) -> bool {
        let tight = self.room.tight.load(Ordering::Relaxed);
        tight != 0 && Duration::from_millis(self.since_begun().saturating_sub(tight)) < TIGHT_TIME
    }

    /// The disk did not take something: nothing is written for a while.
    pub(super) fn failed(&self, why: &io::Error) {
        let mut rest = lock(&self.room.rest);
        let now = Instant::now();
        let pause = match &*rest {
            Some(rest) if now < rest.until => return,
            Some(rest) => (rest.pause * 2).min(LONGEST_REST),
            None => {
                log::warn!(
                    "{}: the disk cache takes nothing now: {why}; reads go on without it, and it is tried again",
                    self.dir().path().display()
                );
                FIRST_REST
            }
        };
        *rest = now.checked_add(pause).map(|until| Rest {
            why: why.to_string(),
            until,
            pause,
        });
        self.room.resting.store(true, Ordering::Relaxed);
    }

    /// Something was written.
    pub(super) fn worked(&self) {
        if !self.room.resting.load(Ordering::Relaxed) {
            return;
        }
        let mut rest = lock(&self.room.rest);
        if rest.as_ref().is_some_and(|rest| rest.until <= Instant::now()) {
            *rest = None;
            self.room.resting.store(false, Ordering::Relaxed);
            log::info!("{}: the disk cache takes chunks again", self.dir().path().display());
        }
    }

    /// Whether the disk is left alone after it failed.
    pub(super) fn is_resting(&self) -> bool {
        self.room.resting.load(Ordering::Relaxed)
            && lock(&self.room.rest)
                .as_ref()
                .is_some_and(|rest| Instant::now() < rest.until)
    }

    /// Why nothing was taken when it was last tried, if it was not: the disk refused, or there was no room even for a chunk.
    pub(super) fn trouble(&self) -> Option<String> {
        let refused = self.room.resting.load(Ordering::Relaxed).then(|| lock(&self.room.rest));
        let refused = refused.and_then(|rest| Some(rest.as_ref()?.why.clone()));
        let full = || "it is full, or its disk is, and nothing in it can be given up".to_owned();
        refused.or_else(|| self.room.full.load(Ordering::Relaxed).then(full))
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        if let Some((file, name)) = lock(&self.room.search).ledger.take()
            && file.is_called(&self.dir(), &name)
        {
            // If it cannot be removed, it is not locked any more, and counts for nothing.
            let _harmless = self.dir().remove(&name);
        }
    }
}

/// Tells other processes what this one may write.
fn note_in_ledger(dir: &SafeDir, search: &mut Search, bytes: u64) -> io::Result<()> {
    if let Some((file, name)) = &search.ledger
        && file.is_called(dir, name)
    {
        return file.set_len(bytes);
    }
    let name = ledger_name(&nonce());
    let file = dir.create_file(&name)?;
    file.lock();
    file.set_len(bytes)?;
    search.ledger = Some((file, name));
    Ok(())
}

/// What a process that lives may write; the ledger of one that does not is removed.
fn live_ledger(dir: &SafeDir, name: &str) -> u64 {
    let Ok(file) = dir.open_file(name) else { return 0 };
    if file.lock() {
        // Its process is gone. What cannot be removed is looked at again.
        let _again = dir.remove(name);
        return 0;
    }
    file.file().metadata().map_or(0, |meta| meta.len())
}

/// Removes a file, and its map if it is a data file, unless a process has it locked. Says what that gave.
pub(super) fn remove_unused(dir: &SafeDir, name: &str) -> io::Result<u64> {
    let file = match dir.open_file(name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // A link or whatever else was planted: it loses its name, and what it leads to stays.
            dir.remove(name)?;
            return Ok(0);
        }
        Err(_) => return Ok(0),
    };
    // Held until the file has lost its name: whoever opens it meanwhile looks again.
    if !file.lock() || !file.is_called(dir, name) {
        return Ok(0);
    }
    let mut bytes = file.disk_bytes();
    if let Some(key) = key_of(name) {
        bytes += dir.stat(&map_name(&key)).map_or(0, |stat| blocks(&stat));
        dir.remove(&map_name(&key))?;
    }
    dir.remove(name)?;
    Ok(bytes)
}

/// Removes the files of a layer that do not fit each other.
fn remove_if_unfit(dir: &SafeDir, key: &[u8; 32]) -> io::Result<u64> {
    let name = data_name(key);
    match dir.open_file(&name) {
        Ok(data) if read_map(dir, &data, key).is_some() => Ok(0),
        _ => remove_unused(dir, &name),
    }
}

/// Disk space of a directory and of the files in it, in bytes.
fn disk_bytes_in(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let own = std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512);
    let Ok(entries) = std::fs::read_dir(path) else {
        return own;
    };
    let files = entries.flatten().filter_map(|entry| entry.metadata().ok());
    own + files.map(|meta| meta.blocks() * 512).sum::<u64>()
}
