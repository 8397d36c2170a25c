//! The lists that podman reads: which images and layers a store has (containers/storage, `images.go` and `layers.go`). In: records. Out:
//! `images.json` and `layers.json`, written whole, under podman's own locks, in a directory that goes when the machine stops.
//!
//! podman reads them at each command; a podman that stays (its service, CRI-O) reads them again when the lock files say that
//! another process wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::record::Record;
use super::{Layout, PodmanError, make_directory, remove, replace_link, unusable};
use crate::device::state::{StateDir, write_whole};
use crate::device::wait_until;
use crate::digest::{Algorithm, Digest};

/// How long to wait for podman to be done with a list. It is replaced whole, so that a reader that does not end keeps no one.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Below the directory of states: what is told to podman.
const TOLD: &str = "podman";

/// An image as podman reads it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ListedImage<'a> {
    id: &'a str,
    /// Of the manifest.
    digest: &'a Digest,
    names: &'a [String],
    /// The ID of its topmost layer.
    layer: String,
    metadata: &'static str,
    created: &'a str,
    big_data_names: [String; 3],
    big_data_sizes: BTreeMap<String, u64>,
    big_data_digests: BTreeMap<String, Digest>,
}

impl<'a> ListedImage<'a> {
    fn of(record: &'a Record) -> Self {
        let names = record.data_names();
        let [manifest, config] = record.lengths;
        let sizes = names.iter().cloned().zip([manifest, manifest, config]);
        let of_config = format!("sha256:{}", record.id).parse::<Digest>().ok();
        let digests = [Some(record.manifest.clone()), Some(record.manifest.clone()), of_config];
        let digests = names.iter().cloned().zip(digests);
        Self {
            id: &record.id,
            digest: &record.manifest,
            names: &record.names,
            layer: record.layer(),
            metadata: "{}",
            created: &record.created,
            big_data_sizes: sizes.collect(),
            big_data_digests: digests.filter_map(|(name, digest)| Some((name, digest?))).collect(),
            big_data_names: names,
        }
    }
}

/// A layer as podman reads it. Without digest and size it says that the image's size is unknown; neither is of a layer that exists.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ListedLayer<'a> {
    id: String,
    created: &'a str,
    diff_digest: String,
    diff_size: u64,
}

impl<'a> ListedLayer<'a> {
    fn of(record: &'a Record) -> Self {
        Self {
            diff_digest: format!("sha256:{}", record.layer()),
            id: record.layer(),
            created: &record.created,
            diff_size: record.bytes,
        }
    }
}

/// What a list is read for again.
#[derive(Deserialize)]
struct OnlyId {
    id: String,
}

/// Both lists of a store.
#[derive(Debug)]
pub(super) struct Lists {
    images: List,
    layers: List,
    /// Where both really are.
    told: PathBuf,
}

/// One list: where podman looks for it, where it is, and its lock.
#[derive(Debug)]
struct List {
    link: PathBuf,
    file: PathBuf,
    lock: PathBuf,
}

impl Lists {
    pub(super) fn new(layout: &Layout, states: &StateDir) -> Self {
        let of_store = Digest::of(Algorithm::Sha256, layout.dir().as_os_str().as_encoded_bytes());
        let told = states.path().join(TOLD).join(&of_store.hex()[..16]);
        let list = |dir: PathBuf, kind: &str| List {
            link: dir.join(format!("{kind}.json")),
            file: told.join(format!("{kind}.json")),
            lock: dir.join(format!("{kind}.lock")),
        };
        Self {
            images: list(layout.images(), "images"),
            layers: list(layout.layers(), "layers"),
            told,
        }
    }

    /// Tells podman that there are the images of `records`, and no others.
    ///
    /// # Errors
    /// [`PodmanError::Io`].
    pub(super) fn write(&self, records: &[&Record]) -> Result<(), PodmanError> {
        for list in [&self.images, &self.layers] {
            // podman does not make them, nor does it go on without.
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o644)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&list.lock)
                .map_err(unusable(&list.lock))?;
            replace_link(&list.file, &list.link)?;
        }
        if !records.is_empty() {
            make_directory(&self.told)?;
        }
        // At no moment an image without its layer: those that go, go before their layers, those that come, come after them.
        let known = self.images.ids();
        let staying: Vec<_> = records.iter().filter(|record| known.contains(&record.id)).collect();
        self.images
            .replace(&staying.iter().map(|record| ListedImage::of(record)).collect::<Vec<_>>())?;
        self.layers
            .replace(&records.iter().map(|record| ListedLayer::of(record)).collect::<Vec<_>>())?;
        self.images
            .replace(&records.iter().map(|record| ListedImage::of(record)).collect::<Vec<_>>())?;
        if records.is_empty() {
            // The links lead nowhere then, which is an empty list. Others' directories may be beside it.
            let _ = fs::remove_dir(&self.told);
            let _ = self.told.parent().map(fs::remove_dir);
        }
        Ok(())
    }
}

impl List {
    /// The IDs that it has now.
    fn ids(&self) -> BTreeSet<String> {
        let read = fs::read(&self.file).ok();
        let ids = read.and_then(|bytes| serde_json::from_slice::<Vec<OnlyId>>(&bytes).ok());
        ids.into_iter().flatten().map(|only| only.id).collect()
    }

    /// Puts other entries into it, or removes it when there are none, and tells processes that have read it.
    fn replace(&self, entries: &[impl Serialize]) -> Result<(), PodmanError> {
        let failed = || unusable(&self.file);
        let text = serde_json::to_vec(entries).map_err(|error| failed()(error.into()))?;
        let now = match fs::read(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            other => Some(other.map_err(failed())?),
        };
        if now.as_ref() == Some(&text) || (now.is_none() && entries.is_empty()) {
            return Ok(());
        }
        let lock = self.lock().map_err(unusable(&self.lock))?;
        if entries.is_empty() {
            remove(&self.file, false)?;
        } else {
            write_whole(&self.file, &text, false).map_err(failed())?;
        }
        lock.write_all_at(token().as_bytes(), 0).map_err(unusable(&self.lock))
    }

    /// podman's lock for writers, held as long as the file is open.
    fn lock(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.lock)?;
        let mine = || rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if !wait_until(LOCK_LIMIT, mine) {
            log::warn!("{} is locked by another process; going on", self.lock.display());
        }
        Ok(file)
    }
}

/// Who wrote last, in 64 bytes that no one has written before.
fn token() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unique = format!("{} {}", std::process::id(), now.as_nanos());
    Digest::of(Algorithm::Sha256, unique.as_bytes()).hex().to_owned()
}

/// The file that holds what is kept of an image under `name`: that, or if there is more in it than digits, small letters and dots,
/// an encoding of it.
pub(super) fn data_file(name: &str) -> String {
    let plain = |byte: u8| byte == b'.' || byte.is_ascii_digit() || byte.is_ascii_lowercase();
    if name.bytes().all(plain) {
        name.to_owned()
    } else {
        format!("={}", STANDARD.encode(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_where_podman_looks_for_it() {
        assert_eq!(data_file("manifest"), "manifest");
        assert_eq!(data_file("sha256:00"), "=c2hhMjU2OjAw");
        assert_ne!(token(), token());
        assert_eq!(token().len(), 64);
    }
}
