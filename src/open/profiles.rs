//! Profiles that are kept: what starts of images read, in the cache directory. In: the layers of an image, and what a start read.
//! Out: what the next start is likely to read; a file for the image and one for each of its layers, from which other images with the same
//! layers gain.
//!
//! A file that is damaged, of another version or of other layers is as none: what is learned next takes its place. Each is written
//! whole or not at all; there are at most `MAX_PROFILES`, and those not used the longest go.

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::index_cache::{forget_oldest, read_and_mark};
use super::prepared::is_of_contents;
use crate::cache::disk::DiskCache;
use crate::fetch::Fetcher;
use crate::prefetch::ChunkRange;
use crate::profile::{MAX_PROFILE_BYTES, Profile, ProfileKey, ProfiledLayer, RecordedRead, StartRun};
use crate::source::LayerSpec;
use crate::units::{LayerId, len_u64};

/// How many profiles are kept.
const MAX_PROFILES: usize = 1024;

/// The directory of profiles in a cache directory.
const DIR: &str = "profiles";

/// The file of the trace of the start that was over last.
const LAST_TRACE: &str = "last.trace";

/// A run has so little in common with a profile, in hundredths of the run's chunks, that another one is begun.
const FITS_PERCENT: usize = 25;

/// What profiles know a layer by: the digest of its tar, whatever its blob is; else of its blob; else what the cache knows it by. None
/// if nothing tells it from others.
#[must_use]
pub fn profile_key(layer: &LayerSpec) -> Option<ProfileKey> {
    let made_up = layer.cached_as.as_ref().filter(|name| is_of_contents(name)).cloned();
    let digest = layer.diff_id.as_ref().or(layer.digest.as_ref());
    let identity = made_up
        .or_else(|| digest.map(ToString::to_string))
        .or_else(|| layer.cached_as.clone())
        .or_else(|| layer.blob.cache_name())?;
    Some(ProfileKey::of(&identity))
}

/// Where a profile is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Starts on this machine.
    Learned,
    /// The image's registry.
    Published,
}

/// The profiles of a cache directory.
#[derive(Clone, Debug)]
pub struct Profiles {
    dir: PathBuf,
    /// Makes room for them, where it is in use.
    disk: Option<Arc<DiskCache>>,
}

impl Profiles {
    /// Where they are in the cache directory `cache`.
    #[must_use]
    pub fn dir(cache: &Path) -> PathBuf {
        cache.join(DIR)
    }

    /// Those in the cache directory `cache`. Nothing is made before something is kept.
    #[must_use]
    pub fn new(cache: &Path, disk: Option<Arc<DiskCache>>) -> Self {
        Self {
            dir: Self::dir(cache),
            disk,
        }
    }

    /// Those of an image of these layers, the lowest first.
    #[must_use]
    pub fn of_image(self, layers: Vec<ProfiledLayer>) -> ImageProfiles {
        ImageProfiles { profiles: self, layers }
    }

    fn path(&self, key: ProfileKey, kind: Kind) -> PathBuf {
        match kind {
            Kind::Learned => self.dir.join(key.to_string()),
            Kind::Published => self.dir.join(format!("{key}.published")),
        }
    }

    /// What is kept under a key, if it is a profile.
    fn load(&self, key: ProfileKey, kind: Kind) -> Option<Profile> {
        let path = self.path(key, kind);
        let bytes = read_and_mark(&path, len_u64(MAX_PROFILE_BYTES) + 1)?;
        let parsed = Profile::parse(&bytes);
        parsed
            .inspect_err(|why| log::info!("{}: {why}; learning anew", path.display()))
            .ok()
    }

    /// The trace of the start that was over last, as [`ImageStart::keep_trace`] kept it; no more than `most` bytes of it.
    #[must_use]
    pub fn last_trace(&self, most: u64) -> Option<Vec<u8>> {
        read_and_mark(&self.dir.join(LAST_TRACE), most)
    }

    /// Keeps a profile under a key, in place of the one that is there.
    fn save(&self, key: ProfileKey, kind: Kind, profile: &Profile) -> io::Result<()> {
        self.write(&self.path(key, kind), &profile.to_bytes(MAX_PROFILE_BYTES))
    }

    /// Writes a file, whole or not at all.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let room = self.disk.as_ref().map(|disk| disk.room_for(len_u64(bytes.len())));
        if let Some(None) = room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|error| error.error)?;
        forget_oldest(&self.dir, MAX_PROFILES);
        Ok(())
    }

    /// Removes all profiles; how many that were.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn forget_all(&self) -> io::Result<usize> {
        let mut gone = 0;
        for entry in fs::read_dir(&self.dir).into_iter().flatten() {
            let entry = entry?;
            if entry.file_name() != LAST_TRACE {
                fs::remove_file(entry.path())?;
                gone += 1;
            }
        }
        Ok(gone)
    }

    /// Removes what is kept under a key; whether there was something.
    fn remove(&self, key: ProfileKey, kind: Kind) -> io::Result<bool> {
        match fs::remove_file(self.path(key, kind)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The profiles of one image: its own, and those of its layers.
#[derive(Clone, Debug)]
pub struct ImageProfiles {
    profiles: Profiles,
    layers: Vec<ProfiledLayer>,
}

impl ImageProfiles {
    fn key(&self) -> ProfileKey {
        let keys: Vec<ProfileKey> = self.layers.iter().map(|layer| layer.key).collect();
        ProfileKey::of_image(&keys)
    }

    /// What starts of the image on this machine read.
    #[must_use]
    pub fn own(&self) -> Option<Profile> {
        let profile = self.profiles.load(self.key(), Kind::Learned)?;
        (profile.layers() == self.layers).then_some(profile)
    }

    /// What was published of the image and kept.
    #[must_use]
    pub fn published(&self) -> Option<Profile> {
        let profile = self.profiles.load(self.key(), Kind::Published)?;
        (profile.layers() == self.layers).then_some(profile)
    }

    /// Keeps what is published of the image, if that is not what is kept; whether it is of this image.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn keep_published(&self, profile: &Profile) -> io::Result<bool> {
        let is_own = profile.layers() == self.layers;
        if is_own && self.published().as_ref() != Some(profile) {
            self.profiles.save(self.key(), Kind::Published, profile)?;
        }
        Ok(is_own)
    }

    /// What starts read of one of its layers on this machine, of whatever images.
    #[must_use]
    pub fn of_layer(&self, number: usize) -> Option<Profile> {
        let layer = self.layers.get(number)?;
        let profile = self.profiles.load(layer.key, Kind::Learned)?;
        (profile.layers() == std::slice::from_ref(layer)).then_some(profile)
    }

    /// Its layers, the lowest first.
    #[must_use]
    pub fn layers(&self) -> &[ProfiledLayer] {
        &self.layers
    }

    /// What a start is likely to read, in order: what starts of this image did; if there were none on this machine, what is published of
    /// it; if nothing is, what was read of its layers in other images.
    #[must_use]
    pub fn likely(&self) -> Vec<ChunkRange> {
        if let Some(known) = self.own().or_else(|| self.published()) {
            return known.likely(&self.layers);
        }
        let mut timed: Vec<(u32, ChunkRange)> = Vec::new();
        for number in 0..self.layers.len() {
            if let Some(profile) = self.of_layer(number) {
                timed.extend(profile.likely_with_times(&self.layers));
            }
        }
        timed.sort_unstable();
        timed.into_iter().map(|(_, chunks)| chunks).collect()
    }

    /// Learns from what a start read.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn learn(&self, run: &StartRun) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        // Somebody who only looked into the image does not make it another program's; and what others say counts only as far as it is so.
        let own = self.own().filter(|own| own.is_small(run) || fits(own, run));
        let own = own.or_else(|| self.published().filter(|published| fits(published, run)));
        let mut own = own.unwrap_or_else(|| Profile::new(self.layers.clone()));
        own.learn(run);
        self.profiles.save(self.key(), Kind::Learned, &own)?;
        if self.layers.len() == 1 {
            return Ok(());
        }
        for (number, layer) in self.layers.iter().enumerate() {
            let of_layer = run.of_layer(LayerId(u32::try_from(number).unwrap_or(u32::MAX)));
            if of_layer.is_empty() {
                continue;
            }
            let known = self.of_layer(number);
            let known = known.filter(|known| known.is_small(&of_layer) || fits(known, &of_layer));
            let mut known = known.unwrap_or_else(|| Profile::new(vec![*layer]));
            known.learn(&of_layer);
            self.profiles.save(layer.key, Kind::Learned, &known)?;
        }
        Ok(())
    }

    /// Forgets what is known of the image and of each of its layers; how many profiles that were.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn forget(&self) -> io::Result<usize> {
        let mut keys: Vec<ProfileKey> = self.layers.iter().map(|layer| layer.key).collect();
        keys.push(self.key());
        keys.sort_unstable();
        keys.dedup();
        let mut gone = 0;
        for key in keys {
            for kind in [Kind::Learned, Kind::Published] {
                gone += usize::from(self.profiles.remove(key, kind)?);
            }
        }
        Ok(gone)
    }
}

/// Whether a run and a profile have so much in common that one is learned from the other.
fn fits(profile: &Profile, run: &StartRun) -> bool {
    let likely = profile.likely(profile.layers());
    let known: std::collections::HashSet<_> = likely.iter().flat_map(|range| range.keys()).collect();
    let common = run.touches().iter().filter(|touch| known.contains(&touch.key)).count();
    known.is_empty() || common * 100 >= run.touches().len().min(known.len()) * FITS_PERCENT
}

/// How an image that is served starts: what is known of that, and what fetches it.
#[derive(Clone)]
pub struct ImageStart {
    profiles: ImageProfiles,
    fetcher: Fetcher,
}

impl fmt::Debug for ImageStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageStart")
            .field("profiles", &self.profiles)
            .finish_non_exhaustive()
    }
}

impl ImageStart {
    pub(super) fn new(profiles: ImageProfiles, fetcher: Fetcher) -> Self {
        Self { profiles, fetcher }
    }

    /// Fetches what earlier starts read, ahead of this one's reader.
    pub fn follow(&self) {
        let likely = self.profiles.likely();
        if !likely.is_empty() {
            let bytes: u64 = likely.iter().map(|range| range.bytes()).sum();
            log::info!("earlier starts read {bytes} bytes, which are fetched ahead");
            self.fetcher.follow_profile(likely);
        }
    }

    /// Keeps the trace of the start, in place of the one before. A failure costs nothing but that.
    pub fn keep_trace(&self, bytes: &[u8]) {
        let profiles = &self.profiles.profiles;
        if let Err(error) = profiles.write(&profiles.dir.join(LAST_TRACE), bytes) {
            log::warn!("the trace of the start is not kept: {error}");
        }
    }

    /// Learns from what this start read. A failure costs nothing but that.
    pub fn keep(&self, reads: &[RecordedRead]) {
        if let Err(error) = self.profiles.learn(&StartRun::of(reads)) {
            log::warn!("what the start read is not kept: {error}");
        }
    }
}
