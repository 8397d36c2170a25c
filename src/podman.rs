//! Images for podman and CRI-O that are not pulled: a read-only *additional image store* in the layout of containers/storage, in
//! which each image has one layer, and that layer's directory is where the image's device is mounted. In: an image's manifest and
//! configuration, and something that mounts it. Out: the store's directory, which `additionalimagestores` in storage.conf names, and
//! records from which all of it can be made again.
//!
//! ```text
//! STORE/records/IMAGE.json              what was added, and how: outlives the machine's end
//! STORE/overlay/LAYER/diff              where the device is mounted; overlay/LAYER/link, overlay/l/LINK: its short name
//! STORE/overlay-images/IMAGE/           manifest and configuration
//! STORE/overlay-images/images.json  ->  /run/tarblk/podman/…/images.json    what podman is told is there
//! STORE/overlay-layers/layers.json  ->  /run/tarblk/podman/…/layers.json
//! ```
//!
//! Invariant: podman is told only of images whose device was mounted since the machine was started, because the two lists are links
//! into /run: an empty mount point is never taken for an image. An image that is not there podman pulls as usual.
//!
//! Invariant: records say what the store holds, all else follows from them. A command that is killed leaves a record or none; the next
//! one that changes something removes what no record is of, and tells podman what is mounted.
//!
//! It never asks a network, and never writes where another user could have put a link.
//!
//! Parts: `record` (what is kept of an image), `lists` (what podman reads), `config` (podman's storage.conf, and what stands on an image).

mod config;
mod lists;
mod record;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use config::{StorageConfig, StorageConfigError};
pub use record::{Record, podman_name};

use crate::device::inventory::{self, Status};
use crate::device::service::Attached;
use crate::device::state::{PART, State, StateDir, StateError, write_whole};
use crate::device::{take_turn, users};
use crate::mount::{self, MountError, MountOptions};
use crate::owned::{self, OwnedError};
use crate::source::registry::Image;
use lists::Lists;

/// Where the store is unless a command says otherwise.
pub const DEFAULT_DIR: &str = "/var/lib/tarblk/podman";

/// How long to wait for another command that changes the store. Mounting takes it the longest.
const TURN_LIMIT: Duration = Duration::from_secs(120);

/// Why the store is not as it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PodmanError {
    /// Its directory is not root's alone, or cannot be used.
    #[error(transparent)]
    Directory(#[from] OwnedError),
    /// Another command has been changing it for too long.
    #[error("another tarblk podman command is at work on {0}")]
    Locked(PathBuf),
    /// A file or directory in it cannot be used.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// An image's configuration has no SHA-256 digest, which podman takes for the image's ID.
    #[error("{0}: podman knows only images whose configuration has a SHA-256 digest")]
    NoId(String),
    /// The image's device could not be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// States of devices cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// No image of the store is called so.
    #[error("{dir} has no image {wanted}; `tarblk podman ls` lists what it has")]
    Unknown {
        /// The store.
        dir: PathBuf,
        /// What was asked for.
        wanted: String,
    },
    /// The beginning of several images' IDs.
    #[error("{0} may be one of several images; write more of it")]
    Ambiguous(String),
    /// Containers are made on the image.
    #[error("{image} is in use: {by}")]
    InUse {
        /// The image.
        image: String,
        /// By what.
        by: String,
    },
}

fn unusable(path: &Path) -> impl FnOnce(io::Error) -> PodmanError {
    let path = path.to_owned();
    move |cause| PodmanError::Io { path, cause }
}

/// The store, with the right to change it for as long as the value lives.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
    states: StateDir,
    records: Vec<Record>,
    _turn: File,
}

/// An image of the store as it is now.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Listed {
    /// What was added.
    #[serde(flatten)]
    pub record: Record,
    /// The device on its mount point, as far as there is one.
    pub device: Option<PathBuf>,
    /// How that is.
    #[serde(flatten)]
    pub status: Option<Status>,
    /// The directory that podman takes for the image's layer.
    pub mount_point: PathBuf,
}

impl Listed {
    /// Whether podman can use it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        matches!(
            self.status,
            Some(Status::Serving | Status::Waiting { .. } | Status::Degraded { .. } | Status::Silent)
        )
    }
}

/// What became of what was to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Only the name: the image has others.
    Name,
    /// The image.
    Image,
    /// The image; its device is in use, by this, and goes when that is over.
    ImageInUse(String),
}

/// Where the parts of a store are.
#[derive(Clone, Debug)]
struct Layout(PathBuf);

impl Layout {
    fn dir(&self) -> &Path {
        &self.0
    }

    fn records(&self) -> PathBuf {
        self.0.join("records")
    }

    fn images(&self) -> PathBuf {
        self.0.join("overlay-images")
    }

    fn layers(&self) -> PathBuf {
        self.0.join("overlay-layers")
    }

    fn overlay(&self) -> PathBuf {
        self.0.join("overlay")
    }

    /// The directory of layers' short names.
    fn links(&self) -> PathBuf {
        self.overlay().join("l")
    }

    fn layer(&self, record: &Record) -> PathBuf {
        self.overlay().join(record.layer())
    }

    /// Where an image's device is mounted.
    fn diff(&self, record: &Record) -> PathBuf {
        self.layer(record).join("diff")
    }
}

/// The images of the store in `dir`, how each is, by ID. Changes nothing; without a store there are none.
///
/// # Errors
/// When the store is not root's alone or cannot be read.
pub fn list(dir: &Path, states: &StateDir) -> Result<Vec<Listed>, PodmanError> {
    let full = match owned::existing_directory(dir) {
        Ok(full) => full,
        Err(OwnedError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let layout = Layout(full);
    listed(&layout, record::read_all(&layout.records())?, states)
}

fn listed(layout: &Layout, records: Vec<Record>, states: &StateDir) -> Result<Vec<Listed>, PodmanError> {
    let (devices, _) = inventory::list(states)?;
    let look = |record: Record| {
        let mount_point = layout.diff(&record);
        let device = devices.iter().rev().find(|device| device.mounts.contains(&mount_point));
        Listed {
            record,
            device: device.map(|device| device.state.device.clone()),
            status: device.map(|device| device.status.clone()),
            mount_point,
        }
    };
    Ok(records.into_iter().map(look).collect())
}

impl Store {
    /// Opens the store in `dir` to change it, which is made if it is not there, waits for its turn, and puts right what a killed command
    /// left.
    ///
    /// # Errors
    /// [`PodmanError`].
    pub fn open(dir: &Path, states: &StateDir) -> Result<Self, PodmanError> {
        states.create()?;
        let layout = Layout(owned::directory(dir)?);
        let turn = take_turn(layout.dir(), TURN_LIMIT).map_err(unusable(layout.dir()))?;
        let turn = turn.ok_or_else(|| PodmanError::Locked(layout.dir().to_owned()))?;
        for dir in [layout.records(), layout.images(), layout.layers(), layout.links()] {
            make_directory(&dir)?;
        }
        let records = record::read_all(&layout.records())?;
        let store = Self {
            layout,
            states: states.clone(),
            records,
            _turn: turn,
        };
        store.tidy()?;
        store.publish()?;
        Ok(store)
    }

    /// What the store holds.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The image with this ID, if the store has it, and whether its device is mounted and its reads are answered.
    ///
    /// # Errors
    /// When the states of devices cannot be read.
    pub fn find(&self, id: &str) -> Result<Option<Listed>, PodmanError> {
        let record = self.records.iter().filter(|record| record.id == id).cloned();
        Ok(listed(&self.layout, record.collect(), &self.states)?.pop())
    }

    /// Adds an image: `mount` attaches its device and mounts it on the directory that it is given. An image that is there already, also
    /// one whose device is gone, is replaced, and keeps its names.
    ///
    /// # Errors
    /// [`PodmanError`]; then the image is not there, or is as it was.
    pub fn add(
        &mut self,
        record: &Record,
        image: &Image,
        mount: impl FnOnce(&Path) -> Result<Attached, MountError>,
    ) -> Result<Attached, PodmanError> {
        let before = self.records.clone();
        let kept = self.lay_out(record, image).and_then(|diff| {
            self.clear(&diff)?;
            let attached = mount(&diff)?;
            self.keep(record.clone())?;
            Ok(attached)
        });
        if kept.is_err() {
            self.records = before;
            // What went wrong first says most.
            if let Err(error) = self.take_back(record) {
                log::warn!("{error}");
            }
        }
        kept
    }

    /// Makes everything of an image but its mount and its record. Returns where its device is to be mounted.
    fn lay_out(&self, record: &Record, image: &Image) -> Result<PathBuf, PodmanError> {
        let write = |path: &Path, bytes: &[u8]| write_whole(path, bytes, true).map_err(unusable(path));
        let diff = self.layout.diff(record);
        make_directory(&diff)?;
        write(&self.layout.layer(record).join("link"), record.link().as_bytes())?;
        let link = self.layout.links().join(record.link());
        replace_link(&Path::new("..").join(record.layer()).join("diff"), &link)?;
        let data = self.layout.images().join(&record.id);
        make_directory(&data)?;
        for (name, bytes) in record.data(image) {
            write(&data.join(lists::data_file(&name)), bytes)?;
        }
        Ok(diff)
    }

    /// Removes a record that could not be added, if there was none before, and all that is there without one.
    fn take_back(&self, record: &Record) -> Result<(), PodmanError> {
        let records = self.layout.records();
        match self.records.iter().find(|known| known.id == record.id) {
            Some(before) => before.write(&records)?,
            None => remove(&record.file(&records), false)?,
        }
        // First: what is not mounted need not be told, and takes no room.
        self.tidy()?;
        self.publish()
    }

    /// Takes off what is mounted on a layer's directory. A device that nobody answers for may be in use still by containers that
    /// fail: it goes with them.
    fn clear(&self, diff: &Path) -> Result<(), PodmanError> {
        let cleared = mount::clear(&self.states, diff);
        match cleared {
            Err(MountError::Detach { .. }) if !users::is_mount_point(diff).map_err(unusable(diff))? => {
                log::warn!("{}", cleared.err().map_or_else(String::new, |error| error.to_string()));
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Keeps a record, which takes its names from others, and tells podman.
    ///
    /// # Errors
    /// [`PodmanError::Io`].
    pub fn keep(&mut self, mut record: Record) -> Result<(), PodmanError> {
        if let Some(at) = self.records.iter().position(|known| known.id == record.id) {
            let names: BTreeSet<_> = self.records[at].names.iter().chain(&record.names).cloned().collect();
            record.names = names.into_iter().collect();
        }
        for known in &mut self.records {
            if known.id != record.id && known.names.iter().any(|name| record.names.contains(name)) {
                known.names.retain(|name| !record.names.contains(name));
                known.write(&self.layout.records())?;
            }
        }
        record.write(&self.layout.records())?;
        self.records.retain(|known| known.id != record.id);
        self.records.push(record);
        self.records.sort_by(|a, b| a.id.cmp(&b.id));
        self.publish()
    }

    /// Removes the image that `wanted` names, or one of its names if it has several. `dependents` finds what is made on a layer. With
    /// `force` images go that containers are made on; running ones go on.
    ///
    /// # Errors
    /// [`PodmanError`]; one that is in use stays as it is.
    pub fn remove(
        &mut self,
        wanted: &str,
        force: bool,
        dependents: impl Fn(&str) -> Vec<String>,
    ) -> Result<Removed, PodmanError> {
        let (at, name) = self.position(wanted)?;
        let mut record = self.records[at].clone();
        if let Some(name) = name.filter(|_| record.names.len() > 1) {
            record.names.retain(|known| *known != name);
            record.write(&self.layout.records())?;
            self.records[at] = record;
            self.publish()?;
            return Ok(Removed::Name);
        }
        let in_use = |by: String| PodmanError::InUse {
            image: wanted.to_owned(),
            by,
        };
        let made_on_it = dependents(&record.layer());
        if !force && !made_on_it.is_empty() {
            return Err(in_use(format!(
                "{} {} made on it; remove {} first, or use --force",
                made_on_it.join(", "),
                if made_on_it.len() == 1 { "is" } else { "are" },
                if made_on_it.len() == 1 { "it" } else { "them" },
            )));
        }
        // From here on no container can begin on it.
        self.records.remove(at);
        self.publish()?;
        let unmounted = self.unmount(&record, force);
        let removed = match unmounted {
            Ok(removed) => removed,
            Err(error) => {
                self.records.insert(at, record);
                self.publish()?;
                return Err(match error {
                    PodmanError::Mount(MountError::Busy { by, .. }) => in_use(format!("its files are open{by}")),
                    other => other,
                });
            }
        };
        let records = self.layout.records();
        remove(&record.file(&records), false)?;
        let synced = File::open(&records).and_then(|dir| dir.sync_all());
        synced.map_err(unusable(&records))?;
        self.tidy()?;
        Ok(removed)
    }

    /// Unmounts an image's device. Overlays hold it by mounts of their own: unless `force` says otherwise it is mounted again for those.
    fn unmount(&self, record: &Record, force: bool) -> Result<Removed, PodmanError> {
        let diff = self.layout.diff(record);
        if !users::is_mount_point(&diff).map_err(unusable(&diff))? {
            return Ok(Removed::Image);
        }
        let unmounted = match mount::unmount(&self.states, &diff) {
            Ok(unmounted) => unmounted,
            Err(MountError::NotOurs(_) | MountError::Detach { .. }) => {
                self.clear(&diff)?;
                return Ok(Removed::Image);
            }
            Err(error) => return Err(error.into()),
        };
        let Some(users) = unmounted.still_used else {
            return Ok(Removed::Image);
        };
        if force {
            return Ok(Removed::ImageInUse(users));
        }
        self.mount_again(&unmounted.state, &diff)?;
        Err(PodmanError::InUse {
            image: record.names.first().unwrap_or(&record.id).clone(),
            by: "a container runs on it; end that first, or use --force".to_owned(),
        })
    }

    fn mount_again(&self, state: &State, diff: &Path) -> Result<(), PodmanError> {
        mount::mount_device(&state.device, diff, &MountOptions::default())?;
        // The same as before: it goes with its last user.
        if let Err(error) = crate::device::service::let_go(&self.states, state) {
            log::warn!("{} stays when it is unmounted: {error}", state.device.display());
        }
        Ok(())
    }

    /// Which record `wanted` means, and by which of its names, if it is one.
    fn position(&self, wanted: &str) -> Result<(usize, Option<String>), PodmanError> {
        /// What is shorter is no ID that a person means.
        const SHORTEST_ID: usize = 3;
        let name = podman_name(wanted);
        let named = |record: &Record| {
            record
                .names
                .iter()
                .any(|known| known == wanted || Some(known) == name.as_ref())
        };
        if let Some(at) = self.records.iter().position(named) {
            let known = self.records[at].names.iter().find(|known| *known == wanted);
            return Ok((at, known.cloned().or(name)));
        }
        let start = wanted.strip_prefix("sha256:").unwrap_or(wanted);
        let mut fits = self.records.iter().enumerate().filter(|(_, record)| {
            start.len() >= SHORTEST_ID && (record.id.starts_with(start) || record.manifest.hex() == start)
        });
        match (fits.next(), fits.next()) {
            (Some((at, _)), None) => Ok((at, None)),
            (Some(_), Some(_)) => Err(PodmanError::Ambiguous(wanted.to_owned())),
            (None, _) => Err(PodmanError::Unknown {
                dir: self.layout.dir().to_owned(),
                wanted: wanted.to_owned(),
            }),
        }
    }

    /// Tells podman which images are there: those whose device is mounted and answers.
    fn publish(&self) -> Result<(), PodmanError> {
        let mut all = listed(&self.layout, self.records.clone(), &self.states)?;
        all.retain(Listed::is_served);
        let records: Vec<&Record> = all.iter().map(|listed| &listed.record).collect();
        Lists::new(&self.layout, &self.states).write(&records)
    }

    /// Removes what no record is of: what a killed command was adding, or had not quite removed.
    fn tidy(&self) -> Result<(), PodmanError> {
        let layers: BTreeSet<String> = self.records.iter().map(Record::layer).collect();
        let links: BTreeSet<String> = self.records.iter().map(Record::link).collect();
        let overlay = self.layout.overlay();
        for layer in names_in(&overlay)? {
            if layer == "l" || layers.contains(&layer) {
                continue;
            }
            let dir = overlay.join(&layer);
            let diff = dir.join("diff");
            if let Err(error) = self.clear(&diff) {
                log::warn!("{error}");
                continue;
            }
            // Invariant: never what is below a mount point, which an emptying of directories would go down into.
            remove(&diff, true)?;
            for name in names_in(&dir)? {
                remove(&dir.join(name), false)?;
            }
            remove(&dir, true)?;
        }
        for link in names_in(&self.layout.links())? {
            if !links.contains(&link) {
                remove(&self.layout.links().join(link), false)?;
            }
        }
        let images = self.layout.images();
        for image in names_in(&images)? {
            let dir = images.join(&image);
            if record::is_id(&image) && !self.records.iter().any(|record| record.id == image) {
                for name in names_in(&dir)? {
                    remove(&dir.join(name), false)?;
                }
                remove(&dir, true)?;
            }
        }
        for dir in [self.layout.records(), images, self.layout.layers()] {
            for name in names_in(&dir)?.into_iter().filter(|name| name.ends_with(PART)) {
                remove(&dir.join(name), false)?;
            }
        }
        Ok(())
    }
}

fn make_directory(path: &Path) -> Result<(), PodmanError> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if !users::is_mount_point(path).unwrap_or(false) => Err(unusable(path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file or an empty directory that may be gone already.
fn remove(path: &Path, is_directory: bool) -> Result<(), PodmanError> {
    let removed = if is_directory {
        fs::remove_dir(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unusable(path)(error)),
        _ => Ok(()),
    }
}

/// The names in a directory of ours; all that we made are text.
fn names_in(dir: &Path) -> Result<Vec<String>, PodmanError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(unusable(dir))?,
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

/// Sees to it that `link` leads to `target`.
fn replace_link(target: &Path, link: &Path) -> Result<(), PodmanError> {
    if fs::read_link(link).is_ok_and(|now| now == target) {
        return Ok(());
    }
    remove(link, false)?;
    symlink(target, link).map_err(unusable(link))
}
