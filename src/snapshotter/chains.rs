//! One device for each chain of layers that something is made on: the chain's layers merged, attached by the machine's service and
//! mounted in the directory of the chain's snapshot. In: the record of a layer that was not unpacked. Out: its directory, with the
//! files of that layer and all below it.
//!
//! Devices are the service's, and mounts the kernel's: both outlive this process. What is mounted is read from the kernel, never
//! remembered. *Invariant:* nothing is unmounted that is in use (overlays over it keep a mount of their own), and the device goes
//! with its last user, whoever that is.

use std::collections::HashMap;
use std::fmt;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::config::Config;
use super::images::Images;
use super::records::{Id, ImageSource, Record, RemoteLayer};
use crate::device::DeviceOptions;
use crate::device::service::{Attached, ServeSpec};
use crate::device::state::StateDir;
use crate::device::users;
use crate::mount::{self, MountError, MountOptions};
use crate::open::{Fetching, ImageSpec, OpenError};

/// Attaches and mounts: [`mount::mount`] with a builder, which this room does not know.
pub type Mounter =
    Box<dyn Fn(&ServeSpec<ImageSpec>, &Path, &MountOptions) -> Result<Attached, MountError> + Send + Sync>;

/// The most queues of a device: more only cost memory.
const MOST_QUEUES: usize = 4;

/// Why a chain has no device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// Its layers or their indexes cannot be had.
    #[error("{image} cannot be mounted: {cause}")]
    Open {
        /// The image.
        image: String,
        /// Why.
        #[source]
        cause: Box<OpenError>,
    },
    /// No device could be made or mounted.
    #[error("{image} cannot be mounted: {cause}")]
    Mount {
        /// The image.
        image: String,
        /// Why.
        #[source]
        cause: MountError,
    },
    /// The directory cannot be used.
    #[error("cannot use {path}: {cause}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

/// The devices of chains.
pub(super) struct Chains {
    /// The directory of snapshots' directories.
    dir: PathBuf,
    states: StateDir,
    images: Arc<Images>,
    mounter: Mounter,
    fetching: Fetching,
    options: MountOptions,
    /// One change of a chain's mount at a time.
    turns: Mutex<HashMap<Id, Arc<Mutex<()>>>>,
}

impl fmt::Debug for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chains").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Chains {
    pub(super) fn new(dir: &Path, states: StateDir, config: &Config, images: Arc<Images>, mounter: Mounter) -> Self {
        // A container's programs become others by their mode, and its devices work, as in layers that were unpacked. Nobody but root
        // comes to the directory.
        let options = MountOptions::parse(["suid", "dev"]).unwrap_or_default();
        Self {
            dir: dir.to_owned(),
            states,
            images,
            mounter,
            fetching: Fetching {
                memory_bytes: config.memory,
                connections: config.connections,
                fetch_all: config.fetch_all,
                deadline: config.deadline,
                store_bytes: config.cache_size,
            },
            options,
            turns: Mutex::default(),
        }
    }

    /// Where a snapshot's own files are, or a chain's device is mounted.
    pub(super) fn files(&self, id: Id) -> PathBuf {
        self.dir.join(id.0.to_string()).join("fs")
    }

    fn turn(&self, id: Id) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(id).or_default())
    }

    /// Makes sure that a chain's device is mounted and its reads are answered. Returns whether it had to be attached.
    ///
    /// # Errors
    /// [`ChainError`].
    pub(super) fn mount(&self, chain: &Record, layer: &RemoteLayer) -> Result<bool, ChainError> {
        let turn = self.turn(chain.id);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.files(chain.id);
        let unusable = |cause| ChainError::Directory {
            path: dir.clone(),
            cause,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .or_else(|error| {
                if users::is_mount_point(&dir)? {
                    Ok(())
                } else {
                    Err(error)
                }
            })
            .map_err(unusable)?;
        if users::is_mount_point(&dir).map_err(unusable)? {
            let served = mount::is_served(&self.states, &dir);
            if served.map_err(|cause| mount_error(layer, cause))? {
                return Ok(false);
            }
            log::warn!("the device on {} is dead: attaching another one", dir.display());
            mount::clear(&self.states, &dir).map_err(|cause| mount_error(layer, cause))?;
        }
        let mut failed = None;
        for source in &layer.sources {
            match self.attach(source, layer.depth, &dir) {
                Ok(attached) => {
                    log::info!(
                        "{} layers of {} are {} on {}",
                        layer.depth,
                        source.reference,
                        attached.state.device.display(),
                        dir.display()
                    );
                    return Ok(true);
                }
                Err(error) => {
                    log::warn!("{error}");
                    // What is said of the image that was used last says most.
                    failed = failed.or(Some(error));
                }
            }
        }
        Err(failed.unwrap_or_else(|| unusable(io::ErrorKind::NotFound.into())))
    }

    fn attach(&self, source: &ImageSource, depth: usize, dir: &Path) -> Result<Attached, ChainError> {
        let opened = |cause| ChainError::Open {
            image: source.reference.clone(),
            cause: Box::new(cause),
        };
        let prepared = self.images.prepare(source, depth).map_err(opened)?;
        let image = prepared
            .image_spec(self.states.path(), self.fetching.clone())
            .map_err(opened)?;
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let spec = ServeSpec {
            options: DeviceOptions {
                queues: u16::try_from(cpus.min(MOST_QUEUES)).unwrap_or(1),
                label: prepared.name.clone(),
                ..DeviceOptions::default()
            },
            source: format!("docker://{}", source.reference),
            states: self.states.path().to_owned(),
            image,
        };
        let mounted = (self.mounter)(&spec, dir, &self.options);
        spec.image.take_back();
        mounted.map_err(|cause| ChainError::Mount {
            image: source.reference.clone(),
            cause,
        })
    }

    /// Unmounts a chain's device if `unused` still says that nothing needs it, which is asked when no other change of it can come
    /// between. What the kernel says is in use stays.
    pub(super) fn unmount(&self, id: Id, unused: impl FnOnce() -> bool) {
        let turn = self.turn(id);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.files(id);
        if !unused() || !users::is_mount_point(&dir).unwrap_or(false) {
            return;
        }
        match mount::clear(&self.states, &dir) {
            Ok(()) => log::info!("{} is unmounted: nothing needs it", dir.display()),
            Err(error) => log::warn!("{error}; trying again later"),
        }
    }

    /// Forgets a chain that is gone.
    pub(super) fn forget(&self, id: Id) {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// The chains that have something mounted, by their numbers.
    pub(super) fn mounted(&self) -> io::Result<Vec<Id>> {
        let id = |point: &Path| {
            let rest = point.strip_prefix(&self.dir).ok()?;
            let id = rest.to_str()?.strip_suffix("/fs")?.parse().ok()?;
            Some(Id(id))
        };
        Ok(users::mounts()?.iter().filter_map(|line| id(&line.point)).collect())
    }
}

fn mount_error(layer: &RemoteLayer, cause: MountError) -> ChainError {
    let image = layer.sources.first().map(|source| source.reference.clone());
    ChainError::Mount {
        image: image.unwrap_or_default(),
        cause,
    }
}
