//! The devices that one process serves. In: specifications, names, and what an earlier service left. Out: devices made, resumed and
//! taken down, their counters, and whether all is well with them.
//!
//! Every operation on one device takes that device's lock alone: one that is slow holds no other up. `resume` goes on with what an earlier
//! service left.

mod resume;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::blame::Blame;
use super::client::refuse_if_used;
use super::control::{Condition, ControlError, ENDING, Named};
use super::counts::{CarriedCounts, ServiceStats};
use super::held::{Holding, Kind};
use super::holders::Holders;
use super::record::{self, Record};
use super::sandbox::Writable;
use super::start::DeviceStart;
use super::{Attached, Builder, LOG_NAME, ServeSpec, Served, ServiceError, failed};
use crate::device::metrics::{self, DeviceMetrics};
use crate::device::state::{Process, Server, State, StateDir, disk_number};
use crate::device::trace::Trace;
use crate::device::volume::Volume;
use crate::device::{Backend, Device, DeviceError, DeviceOptions, HeldDevice, users, wait_until};
use crate::fetch::{FetchStats, LayerTrust};

pub(super) use self::resume::written_by_found;

/// All devices of this process.
pub(super) struct Table<B: Builder> {
    states: StateDir,
    holders: Holders,
    builder: B,
    entries: Mutex<Entries<B::Image>>,
    /// The directories beneath which this process may write, besides its states; none if anywhere.
    writable: Option<Vec<Writable>>,
    /// Names of devices that this process could not go on with and that are not cleaned up yet.
    lost: Mutex<Vec<String>>,
}

struct Entries<I> {
    by_name: BTreeMap<String, Arc<Entry<I>>>,
    /// Devices being made.
    pending: usize,
    /// No more are made.
    closed: bool,
}

/// One device.
struct Entry<I> {
    volume: Arc<Volume>,
    fetch_stats: Box<dyn Fn() -> FetchStats + Send + Sync>,
    began: Instant,
    counts: CarriedCounts,
    /// None if an earlier process made the device.
    start: Option<DeviceStart>,
    /// As in its state.
    instance: u64,
    /// Whether it was seen in use since it is to go with its last user.
    was_used: AtomicBool,
    inner: Mutex<Inner<I>>,
}

struct Inner<I> {
    /// None once it was taken down.
    device: Option<Device>,
    record: Record<I>,
    /// The local files that the description names. The fetcher knows them by the paths of these descriptors.
    files: Vec<OwnedFd>,
    finish: Option<Box<dyn FnOnce() + Send>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder leaves the value in a state that others can go on with.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device being made: counted, so that the service does not end meanwhile.
struct Pending<'a, B: Builder>(&'a Table<B>);

impl<B: Builder> Drop for Pending<'_, B> {
    fn drop(&mut self) {
        lock(&self.0.entries).pending -= 1;
    }
}

impl<B: Builder> Table<B> {
    pub(super) fn new(states: &StateDir, holders: Holders, builder: B, writable: Option<Vec<Writable>>) -> Self {
        Self {
            states: states.clone(),
            holders,
            builder,
            writable,
            entries: Mutex::new(Entries {
                by_name: BTreeMap::new(),
                pending: 0,
                closed: false,
            }),
            lost: Mutex::default(),
        }
    }

    pub(super) const fn holders(&self) -> &Holders {
        &self.holders
    }

    fn entry(&self, name: &str) -> Option<Arc<Entry<B::Image>>> {
        lock(&self.entries).by_name.get(name).cloned()
    }

    /// The device that is meant, unless it is gone, whoever has its name now.
    fn named(&self, device: &Named) -> Result<Arc<Entry<B::Image>>, ControlError> {
        let entry = self.entry(&device.name);
        let entry = entry.filter(|entry| device.instance == 0 || entry.instance == device.instance);
        entry.ok_or_else(|| ControlError::Unknown(device.name.clone()))
    }

    fn all(&self) -> Vec<(String, Arc<Entry<B::Image>>)> {
        let entries = lock(&self.entries);
        entries
            .by_name
            .iter()
            .map(|(name, entry)| (name.clone(), Arc::clone(entry)))
            .collect()
    }

    /// Whether there is no device and none is being made.
    pub(super) fn is_empty(&self) -> bool {
        let entries = lock(&self.entries);
        entries.by_name.is_empty() && entries.pending == 0 && lock(&self.lost).is_empty()
    }

    /// Makes no more devices, if there is none now; says whether that is so.
    pub(super) fn close(&self) -> bool {
        let mut entries = lock(&self.entries);
        entries.closed = entries.by_name.is_empty() && entries.pending == 0;
        entries.closed
    }

    /// Makes no more devices, and waits until none is being made. If that takes longer than `limit` more are made, and it is false.
    pub(super) fn quiesce(&self, limit: Duration) -> bool {
        let was_closed = std::mem::replace(&mut lock(&self.entries).closed, true);
        let done = wait_until(limit, || lock(&self.entries).pending == 0);
        if !done {
            lock(&self.entries).closed = was_closed;
        }
        done
    }

    /// Whether this process may write to all of `paths` that there are.
    pub(super) fn may_write(&self, paths: &[PathBuf]) -> bool {
        let Some(writable) = &self.writable else { return true };
        let is_beneath = |path: PathBuf| writable.iter().any(|dir| dir.holds(&path));
        paths.iter().filter_map(|path| path.canonicalize().ok()).all(is_beneath)
    }

    /// The directories beneath which this process may write, where that is limited.
    pub(super) fn writable(&self) -> Vec<PathBuf> {
        let writable = self.writable.iter().flatten();
        writable.map(|dir| dir.path().to_owned()).collect()
    }

    /// Makes no more devices.
    pub(super) fn refuse_more(&self) {
        lock(&self.entries).closed = true;
    }

    fn begin(&self) -> Result<Pending<'_, B>, ServiceError> {
        let mut entries = lock(&self.entries);
        if entries.closed {
            return Err(ServiceError::Reported(format!("{ENDING}; try again")));
        }
        entries.pending += 1;
        Ok(Pending(self))
    }

    /// Makes a device. `files` are those that the description names, opened by whoever sent it.
    ///
    /// # Errors
    /// Why there is none; then nothing is left of it.
    pub(super) fn attach(&self, spec: ServeSpec<B::Image>, files: Vec<OwnedFd>) -> Result<Attached, ServiceError> {
        let _pending = self.begin()?;
        let ServeSpec {
            options, source, image, ..
        } = spec;
        let mut served = self.build(image.clone(), &files)?;
        let start = DeviceStart::begin(&mut served);
        let prepared = (served.fetch_stats)().prepared;
        let trust = prepared.layers.iter().filter_map(|layer| layer.trust).collect();
        let volume = Arc::new(volume_of(&served, &options).recorded(start.recorder()));
        let (device, why_not_ublk) = match Device::start(&volume, &options) {
            Ok(started) => started,
            Err(error) => {
                (served.finish)();
                return Err(error.into());
            }
        };
        let state = self.describe(&device, &volume, source, trust);
        log::info!(
            "serving {} as {} ({})",
            state.source,
            state.device.display(),
            state.backend
        );
        if let Some(why) = &why_not_ublk {
            log::info!("not by ublk: {why}");
        }
        let record = Record {
            state: state.clone(),
            options,
            until_unused: false,
            image,
        };
        // One that went with its last user, and that nobody has looked after yet: what is kept of it goes by the same name.
        if let Some(gone) = self.entry(&state.name)
            && let Err(error) = self.take_down(&state.name, &gone)
        {
            log::warn!("{error}");
        }
        let entry = Arc::new(Entry {
            start: Some(start),
            ..Entry::new(volume, served, device, record, files)
        });
        // Before there are files of its name: see `take_down`.
        lock(&self.entries)
            .by_name
            .insert(state.name.clone(), Arc::clone(&entry));
        if let Err(error) = self.publish(&entry) {
            self.take_down(&state.name, &entry)?;
            return Err(error);
        }
        Ok(Attached { state, why_not_ublk })
    }

    /// Calls the builder. It must not take the other devices along when it panics.
    fn build(&self, image: B::Image, files: &[OwnedFd]) -> Result<Served, ServiceError> {
        let paths: Vec<PathBuf> = files
            .iter()
            .map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()).into())
            .collect();
        let image = if paths.is_empty() {
            image
        } else {
            B::moved(image, &paths)
        };
        catch_unwind(AssertUnwindSafe(|| self.builder.build(image)))
            .unwrap_or_else(|_| Err("building the image panicked; the service's log says where".into()))
            .map_err(ServiceError::Build)
    }

    /// Makes a device findable, after what it takes to go on with it is where it outlives this process.
    fn publish(&self, entry: &Entry<B::Image>) -> Result<(), ServiceError> {
        let inner = lock(&entry.inner);
        self.keep(&inner)?;
        let _turn = self.states.turn();
        self.states.write(&inner.record.state)?;
        Ok(())
    }

    /// Gives the keepers and the state directory what it takes to go on with the device.
    fn keep(&self, inner: &Inner<B::Image>) -> Result<(), ServiceError> {
        let Some(device) = &inner.device else { return Ok(()) };
        let on_disk = Record {
            state: inner.record.state.clone(),
            options: inner.record.options.clone(),
            until_unused: inner.record.until_unused,
            image: B::without_secrets(&inner.record.image),
        };
        record::write(&self.states, &on_disk)?;
        let holding = || -> io::Result<Holding> {
            let mut holding = vec![(Kind::Spec, record::to_memory(&inner.record)?)];
            match device.held()? {
                HeldDevice::Ublk => {}
                HeldDevice::Loop(held) => {
                    holding.push((Kind::Channel, held.channel));
                    holding.push((Kind::Ledger, held.ledger));
                    holding.extend(held.device.map(|device| (Kind::Device, device)));
                }
            }
            for file in &inner.files {
                holding.push((Kind::File, file.try_clone()?));
            }
            Ok(holding)
        };
        holding()
            .and_then(|holding| self.holders.hold(&inner.record.state.name, holding))
            .map_err(failed("keep the device"))
    }

    fn describe(&self, device: &Device, volume: &Volume, source: String, trust: Vec<LayerTrust>) -> State {
        let number = device.number();
        let name = match device.backend() {
            Backend::Ublk => format!("ublkb{number}"),
            Backend::Loop => format!("loop{number}"),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        State {
            device: device.path().to_owned(),
            backend: device.backend(),
            number,
            len: volume.len(),
            source,
            trust,
            process: this_process(),
            server: Server::Service,
            since: now.as_secs(),
            instance: u64::try_from(now.as_micros()).unwrap_or(0),
            disk: disk_number(&name),
            log: Some(self.states.path().join(LOG_NAME)),
            name,
        }
    }

    /// Takes a device down, unless it is in use.
    ///
    /// # Errors
    /// [`ControlError::InUse`], [`ControlError::Unknown`], or whatever else kept it.
    pub(super) fn detach(&self, device: &Named) -> Result<(), ControlError> {
        let entry = self.named(device)?;
        refuse_if_used(&lock(&entry.inner).record.state)?;
        Ok(self.take_down(&device.name, &entry)?)
    }

    fn take_down(&self, name: &str, entry: &Entry<B::Image>) -> Result<(), DeviceError> {
        let mut inner = lock(&entry.inner);
        let Some(device) = inner.device.take() else {
            return Ok(());
        };
        if let Some(start) = &entry.start {
            start.keep(&inner.record.state);
        }
        // What a keeper holds keeps the kernel from letting go.
        self.holders.drop(name);
        let stopped = device.stop();
        if let Some(finish) = inner.finish.take() {
            finish();
        }
        // The kernel gives the name out again at once. Whoever has it by now is in the table before there are files of its own.
        let mut entries = lock(&self.entries);
        let is_own = entries
            .by_name
            .get(name)
            .is_some_and(|now| std::ptr::eq(&raw const **now, entry));
        if is_own {
            entries.by_name.remove(name);
        }
        match &stopped {
            Ok(()) if is_own => {
                Blame::clear(&self.states, name);
                record::remove(&self.states, name);
                self.states.remove(&inner.record.state);
            }
            Ok(()) => {}
            // Record and state stay as long as the device may: they say what there is to clean up.
            Err(error) => log::error!("{error}"),
        }
        log::info!("detached {name}");
        stopped
    }

    /// From now on the device goes with its last user.
    ///
    /// # Errors
    /// [`ControlError::Unknown`], or why that could not be noted.
    pub(super) fn let_go(&self, device: &Named) -> Result<(), ControlError> {
        let entry = self.named(device)?;
        let mut inner = lock(&entry.inner);
        inner.record.until_unused = true;
        let used = users::is_claimed(&inner.record.state.device).unwrap_or(true);
        entry.was_used.fetch_or(used, Ordering::Relaxed);
        if let Some(device) = &mut inner.device {
            device.let_go();
        }
        self.keep(&inner)
            .map_err(|error| ControlError::Refused(error.to_string()))
    }

    /// The counters of a device.
    ///
    /// # Errors
    /// [`ControlError::Unknown`].
    pub(super) fn stats(&self, device: &Named) -> Result<ServiceStats, ControlError> {
        let entry = self.named(device)?;
        Ok(entry.stats())
    }

    /// What was read of a device while it started.
    ///
    /// # Errors
    /// [`ControlError::Unknown`]; [`ControlError::Refused`] if that is not known.
    pub(super) fn trace(&self, device: &Named) -> Result<Trace, ControlError> {
        let entry = self.named(device)?;
        let start = entry.start.as_ref().ok_or_else(|| {
            let why = "its start was before this process of the service, which knows nothing of it";
            ControlError::Refused(format!("{}: {why}", device.name))
        })?;
        let state = lock(&entry.inner).record.state.clone();
        Ok(start.trace(&state))
    }

    /// The counters of all devices, for Prometheus. One that is being taken down is left out.
    pub(super) fn exposition(&self) -> String {
        let all = self.all();
        let state = |entry: &Entry<B::Image>| Some(entry.inner.try_lock().ok()?.record.state.clone());
        let counted = all.iter().filter_map(|(_, entry)| Some((state(entry)?, entry.stats())));
        let counted: Vec<_> = counted.collect();
        let devices = counted
            .iter()
            .map(|(state, stats)| DeviceMetrics::new(state, Some(stats)));
        metrics::exposition(&devices.collect::<Vec<_>>())
    }

    /// Whether all is well, of every device.
    pub(super) fn conditions(&self) -> BTreeMap<String, Condition> {
        self.all()
            .into_iter()
            .map(|(name, entry)| (name, entry.condition()))
            .collect()
    }

    /// Cleans up after devices that others took down, and takes down those that are to go with their last user. With `leaving` all
    /// are to go.
    pub(super) fn glance(&self, leaving: bool) {
        self.bury_lost();
        for (name, entry) in self.all() {
            if entry.counts.are_due() {
                self.write_counts(&entry);
            }
            let (gone, until_unused, state) = {
                // One that is being taken down needs no look.
                let Ok(inner) = entry.inner.try_lock() else { continue };
                let gone = inner.device.as_ref().is_some_and(|device| !device.is_running());
                (gone, inner.record.until_unused, inner.record.state.clone())
            };
            if let Some(start) = &entry.start {
                start.glance(&state);
            }
            if gone {
                if !until_unused {
                    log::warn!("another process took {} down", state.device.display());
                }
            } else if leaving || (until_unused && state.backend == Backend::Ublk) {
                // A loop device that is to go with its last user the kernel takes down by itself.
                match users::is_claimed(&state.device) {
                    Ok(false) if leaving || entry.was_used.load(Ordering::Relaxed) => {
                        log::info!("{name} is no longer in use: detaching");
                    }
                    Ok(used) => {
                        entry.was_used.fetch_or(used, Ordering::Relaxed);
                        continue;
                    }
                    Err(_) => continue,
                }
            } else {
                continue;
            }
            if let Err(error) = self.take_down(&name, &entry) {
                log::error!("{error}");
            }
        }
    }

    /// Leaves all counters to the next service, which is about to come. What was read of devices until now is their start.
    pub(super) fn leave_counts(&self) {
        for (_, entry) in self.all() {
            self.write_counts(&entry);
            if let Some(start) = &entry.start {
                start.keep(&lock(&entry.inner).record.state);
            }
        }
    }

    /// Keeps a device's counters for the next service.
    fn write_counts(&self, entry: &Entry<B::Image>) {
        // One that is being taken down needs none.
        if let Ok(inner) = entry.inner.try_lock()
            && inner.device.is_some()
        {
            entry.counts.write(&self.states, &inner.record.state, &entry.stats());
        }
    }

    /// Whether any device is in use: which, for a message.
    pub(super) fn in_use(&self) -> Option<String> {
        self.all().into_iter().find_map(|(_, entry)| {
            let state = lock(&entry.inner).record.state.clone();
            refuse_if_used(&state).err().map(|error| error.to_string())
        })
    }
}

impl<I> Entry<I> {
    fn new(volume: Arc<Volume>, served: Served, device: Device, record: Record<I>, files: Vec<OwnedFd>) -> Self {
        Self {
            volume,
            fetch_stats: served.fetch_stats,
            began: Instant::now(),
            counts: CarriedCounts::none(),
            start: None,
            instance: record.state.instance,
            was_used: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                device: Some(device),
                record,
                files,
                finish: Some(served.finish),
            }),
        }
    }

    fn stats(&self) -> ServiceStats {
        let up = self.began.elapsed().as_millis();
        self.counts.added_to(ServiceStats {
            device: self.volume.stats(),
            fetch: (self.fetch_stats)(),
            up_ms: u64::try_from(up).unwrap_or(u64::MAX),
            resident_bytes: resident_bytes().unwrap_or(0),
        })
    }

    fn condition(&self) -> Condition {
        Condition::of(&(self.fetch_stats)())
    }
}

fn this_process() -> Process {
    Process::current().unwrap_or_else(|error| {
        log::warn!("cannot tell when this process began: {error}");
        Process::unknown()
    })
}

fn volume_of(served: &Served, options: &DeviceOptions) -> Volume {
    let threads = usize::from(options.queues).max(1) + 1;
    Volume::new(Arc::clone(&served.image), Arc::clone(&served.bytes), threads)
}

fn resident_bytes() -> Option<u64> {
    let pages: u64 = fs::read_to_string("/proc/self/statm")
        .ok()?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    Some(pages * u64::try_from(rustix::param::page_size()).ok()?)
}
