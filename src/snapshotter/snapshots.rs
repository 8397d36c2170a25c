//! What containerd asks of a snapshotter. In: the calls of its snapshots service. Out: its answers, as its own overlayfs snapshotter
//! would give them, but that a layer which an image in a registry has need not be unpacked: `Prepare` then says that it is there
//! already (`AlreadyExists`), after it was noted on disk. Nothing is fetched and no device is made until something is prepared or
//! viewed above it.
//!
//! Answers hold `overlay` and `bind` mounts only, which every containerd can make. Below the root, `snapshots/ID/fs` is a snapshot's
//! own directory (or where a chain's device is mounted) and `snapshots/ID/work` overlayfs' working directory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::chains::{ChainError, Chains};
use super::filters::Filters;
use super::grpc::{Calls, Code, Reply, Status, decode, one};
use super::images::{Images, Reason};
use super::labels::WantedLayer;
use super::messages::{
    CommitRequest, Empty, Info, InfoResponse, KeyRequest, ListRequest, ListResponse, Mount, MountsResponse,
    PrepareRequest, SERVICE, UpdateRequest, UsageResponse,
};
use super::records::{Content, Id, Moment, Record, RecordError, Records, Usage};
use super::usage;
use crate::device::metrics::Kind::{Counter, Gauge};
use crate::device::metrics::{Figure, Text};

/// So many snapshots are in one message of a list.
const LISTED_AT_ONCE: usize = 100;

/// Above what containerd gives as names.
const LONGEST_NAME: usize = 4096;

/// Everything that calls need.
#[derive(Debug)]
pub(super) struct Snapshots {
    dir: PathBuf,
    records: Mutex<Records>,
    pub(super) images: Arc<Images>,
    chains: Chains,
    /// What overlays are told besides their directories.
    overlay: Vec<String>,
    /// Since when nothing is made on a chain's device.
    idle: Mutex<HashMap<Id, Instant>>,
    pub(super) counters: Counters,
}

/// What was done, since the process began.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Layers that were said to be there and were not before.
    pub(super) claimed: AtomicU64,
    /// Layers that were to be pulled as usual.
    pub(super) declined: Mutex<BTreeMap<Reason, u64>>,
    /// Devices that were made, and the milliseconds that took.
    attached: AtomicU64,
    attach_ms: AtomicU64,
    /// Devices that could not be made.
    failed: AtomicU64,
}

/// What is made above another snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Making {
    Active,
    View,
}

impl From<RecordError> for Status {
    fn from(error: RecordError) -> Self {
        Self::new(Code::Internal, error)
    }
}

impl From<ChainError> for Status {
    fn from(error: ChainError) -> Self {
        Self::new(Code::Unavailable, error)
    }
}

pub(super) fn no_snapshot(name: &str) -> Status {
    Status::new(Code::NotFound, format!("snapshot {name} does not exist"))
}

fn cannot(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Status {
    let what = format!("cannot {what} {}", path.display());
    move |error| Status::new(Code::Internal, format!("{what}: {error}"))
}

impl Snapshots {
    /// `dir` is the directory of snapshots' directories.
    pub(super) fn new(dir: &Path, records: Records, images: Arc<Images>, chains: Chains) -> Self {
        // As containerd: what is below changes only when it is not mounted, which `index` would refuse.
        let index = Path::new("/sys/module/overlay/parameters/index").exists();
        Self {
            dir: dir.to_owned(),
            records: Mutex::new(records),
            images,
            chains,
            overlay: index.then(|| "index=off".to_owned()).into_iter().collect(),
            idle: Mutex::default(),
            counters: Counters::default(),
        }
    }

    pub(super) fn records(&self) -> MutexGuard<'_, Records> {
        // Every holder leaves records as they were or as they are to be.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prepare(
        &self,
        request: PrepareRequest,
        making: Making,
        namespace: Option<&str>,
    ) -> Result<MountsResponse, Status> {
        let PrepareRequest {
            key, parent, labels, ..
        } = request;
        check_name(&key)?;
        let parent = Some(parent).filter(|parent| !parent.is_empty());
        if making == Making::Active
            && let Some(wanted) = WantedLayer::of(&labels, namespace)
        {
            match self.claim(&key, parent.as_deref(), &labels, &wanted)? {
                Ok(()) => {
                    let chain = &wanted.chain;
                    return Err(Status::new(Code::AlreadyExists, format!("snapshot {chain} is there")));
                }
                Err(declined) => self.tell_declined(&wanted, &declined),
            }
        }
        let (record, parent_id) = {
            let mut records = self.records();
            if records.get(&key).is_some() {
                return Err(Status::new(Code::AlreadyExists, format!("snapshot {key} is there")));
            }
            let parent_id = match parent.as_deref().map(|parent| (parent, records.get(parent))) {
                None => None,
                Some((_, Some(below))) if below.is_committed() => Some(below.id),
                Some((parent, Some(_))) => {
                    let why = format!("parent {parent} is not committed");
                    return Err(Status::new(Code::InvalidArgument, why));
                }
                Some((parent, None)) => return Err(no_snapshot(parent)),
            };
            let now = Moment::now();
            let record = Record {
                id: records.next_id(),
                name: key.clone(),
                parent: parent.clone(),
                content: match making {
                    Making::Active => Content::Active,
                    Making::View => Content::View,
                },
                labels,
                created: now,
                updated: now,
            };
            self.make_directories(record.id, making)?;
            records.put(record.clone())?;
            (record, parent_id)
        };
        let made = self.ready(&record).and_then(|()| self.take_owner(&record, parent_id));
        if let Err(error) = made {
            // containerd knows nothing of it: it may ask again under the same key.
            let mut records = self.records();
            records.remove(&key)?;
            drop(records);
            self.remove_directory(record.id);
            return Err(error);
        }
        Ok(self.mounts_of(&record))
    }

    fn make_directories(&self, id: Id, making: Making) -> Result<(), Status> {
        let dir = self.dir.join(id.0.to_string());
        let make = |path: &Path, mode: u32| {
            let made = DirBuilder::new().mode(mode).create(path);
            // Of a call that was cut short.
            let made = made.or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(error),
            });
            made.map_err(cannot("make", path))
        };
        make(&dir, 0o700)?;
        make(&dir.join("fs"), 0o755)?;
        if making == Making::Active {
            make(&dir.join("work"), 0o711)?;
        }
        Ok(())
    }

    /// Makes sure that what is below a snapshot can be mounted.
    fn ready(&self, record: &Record) -> Result<(), Status> {
        let chain = self.records().chain_under(&record.name).cloned();
        let Some(chain) = chain else { return Ok(()) };
        let Some(layer) = chain.remote() else { return Ok(()) };
        let began = Instant::now();
        match self.chains.mount(&chain, layer) {
            Ok(false) => Ok(()),
            Ok(true) => {
                let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.counters.attached.fetch_add(1, Ordering::Relaxed);
                self.counters.attach_ms.fetch_add(took, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
                Err(error.into())
            }
        }
    }

    /// The root directory of a snapshot belongs to whom the one below it does, as containerd's overlayfs snapshotter has it.
    fn take_owner(&self, record: &Record, parent: Option<Id>) -> Result<(), Status> {
        let (Some(parent), Content::Active) = (parent, &record.content) else {
            return Ok(());
        };
        let below = self.chains.files(parent);
        let meta = fs::metadata(&below).map_err(cannot("look at", &below))?;
        let own = self.chains.files(record.id);
        std::os::unix::fs::lchown(&own, Some(meta.uid()), Some(meta.gid())).map_err(cannot("change the owner of", &own))
    }

    /// The mounts that make a snapshot's directory. What is below it has to be ready.
    fn mounts_of(&self, record: &Record) -> MountsResponse {
        let below: Vec<String> = self
            .records()
            .lineage(&record.name)
            .skip(1)
            .map(|one| self.chains.files(one.id).display().to_string())
            .collect();
        let own = self.chains.files(record.id).display().to_string();
        let bind = |source: String, access: &str| Mount {
            r#type: "bind".to_owned(),
            source,
            options: vec![access.to_owned(), "rbind".to_owned()],
            ..Mount::default()
        };
        let is_active = record.content == Content::Active;
        let mount = match (&below[..], is_active) {
            ([], true) => bind(own, "rw"),
            ([], false) => bind(own, "ro"),
            ([one], false) => bind(one.clone(), "ro"),
            (below, _) => {
                let mut options = self.overlay.clone();
                if is_active {
                    let work = self.dir.join(record.id.0.to_string()).join("work");
                    options.push(format!("workdir={}", work.display()));
                    options.push(format!("upperdir={own}"));
                }
                options.push(format!("lowerdir={}", below.join(":")));
                Mount {
                    r#type: "overlay".to_owned(),
                    source: "overlay".to_owned(),
                    options,
                    ..Mount::default()
                }
            }
        };
        MountsResponse { mounts: vec![mount] }
    }

    fn mounts(&self, key: &str) -> Result<MountsResponse, Status> {
        let record = self.records().get(key).cloned().ok_or_else(|| no_snapshot(key))?;
        match &record.content {
            Content::Active => self.make_directories(record.id, Making::Active)?,
            Content::View => self.make_directories(record.id, Making::View)?,
            Content::Committed(_) | Content::Remote(_) => {
                let why = format!("snapshot {key} is neither active nor a view");
                return Err(Status::new(Code::FailedPrecondition, why));
            }
        }
        self.ready(&record)?;
        Ok(self.mounts_of(&record))
    }

    fn commit(&self, request: CommitRequest) -> Result<(), Status> {
        let CommitRequest {
            name,
            key,
            labels,
            parent,
            ..
        } = request;
        check_name(&name)?;
        let active = |records: &Records| -> Result<Record, Status> {
            if records.get(&name).is_some() {
                return Err(Status::new(Code::AlreadyExists, format!("snapshot {name} is there")));
            }
            let record = records.get(&key).ok_or_else(|| no_snapshot(&key))?;
            if record.content != Content::Active {
                let why = format!("snapshot {key} is not active");
                return Err(Status::new(Code::FailedPrecondition, why));
            }
            if !parent.is_empty() && record.parent.as_deref() != Some(parent.as_str()) {
                let why = format!("snapshot {key} cannot be put above {parent}");
                return Err(Status::new(Code::Unimplemented, why));
            }
            Ok(record.clone())
        };
        let record = active(&self.records())?;
        let files = self.chains.files(record.id);
        // Counted while others go on.
        let usage = usage::of(&files).map_err(cannot("count", &files))?;
        let mut records = self.records();
        let record = active(&records)?;
        let now = Moment::now();
        records.put(Record {
            name: name.clone(),
            content: Content::Committed(usage),
            labels,
            created: now,
            updated: now,
            ..record
        })?;
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), Status> {
        let record = {
            let mut records = self.records();
            let record = records.get(key).cloned().ok_or_else(|| no_snapshot(key))?;
            if records.has_children(key) {
                let why = format!("snapshot {key} has others above it");
                return Err(Status::new(Code::FailedPrecondition, why));
            }
            records.remove(key)?;
            record
        };
        if let Some(layer) = record.remote() {
            self.chains.unmount(record.id, || true);
            self.chains.forget(record.id);
            for source in &layer.sources {
                let is_named = |other: &Record| other.remote().is_some_and(|layer| layer.sources.contains(source));
                if !self.records().all().any(is_named) {
                    self.images.forget(source);
                }
            }
        }
        self.remove_directory(record.id);
        Ok(())
    }

    /// Removes what a snapshot that is gone had. What cannot be removed yet (its device is in use) is tried again by [`Self::tidy`].
    fn remove_directory(&self, id: Id) {
        let dir = self.dir.join(id.0.to_string());
        if let Err(error) = fs::remove_dir_all(&dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::info!("{} stays for now: {error}", dir.display());
        }
    }

    fn stat(&self, key: &str) -> Result<Info, Status> {
        let records = self.records();
        records.get(key).map(Record::info).ok_or_else(|| no_snapshot(key))
    }

    fn update(&self, request: UpdateRequest) -> Result<Info, Status> {
        let wanted = request.info.unwrap_or_default();
        let mut records = self.records();
        let record = records.get(&wanted.name).ok_or_else(|| no_snapshot(&wanted.name))?;
        let mut record = record.clone();
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        if paths.is_empty() {
            record.labels.clone_from(&wanted.labels);
        }
        for path in &paths {
            match path.split_once('.') {
                Some(("labels", key)) => match wanted.labels.get(key) {
                    Some(value) => drop(record.labels.insert(key.to_owned(), value.clone())),
                    None => drop(record.labels.remove(key)),
                },
                None if path == "labels" => record.labels.clone_from(&wanted.labels),
                _ => {
                    let why = format!("{path} of a snapshot cannot be changed");
                    return Err(Status::new(Code::InvalidArgument, why));
                }
            }
        }
        record.updated = Moment::now();
        let info = record.info();
        records.put(record)?;
        Ok(info)
    }

    fn list(&self, request: &ListRequest) -> Result<Vec<Info>, Status> {
        let filters = Filters::parse(&request.filters).map_err(|why| Status::new(Code::InvalidArgument, why))?;
        let records = self.records();
        let all = records.all().map(Record::info);
        Ok(all.filter(|info| filters.fit(info)).collect())
    }

    fn usage(&self, key: &str) -> Result<Usage, Status> {
        let record = self.records().get(key).cloned().ok_or_else(|| no_snapshot(key))?;
        match &record.content {
            Content::Committed(usage) => Ok(*usage),
            Content::View => Ok(Usage::default()),
            // What it takes at most once all of it was fetched, as it travels: known without looking anywhere.
            Content::Remote(layer) => Ok(Usage {
                bytes: layer.bytes,
                inodes: 0,
            }),
            Content::Active => {
                let files = self.chains.files(record.id);
                usage::of(&files).map_err(cannot("count", &files))
            }
        }
    }

    /// Takes down devices that nothing needs: those of chains that are gone, and those on which nothing was made for `idle`; and
    /// removes what snapshots left that are gone. Called now and then, and by `Cleanup`.
    pub(super) fn tidy(&self, idle: Duration) {
        let mounted = match self.chains.mounted() {
            Ok(mounted) => mounted,
            Err(error) => return log::warn!("cannot read what is mounted: {error}"),
        };
        let used = self.used();
        let now = Instant::now();
        let expired: Vec<Id> = {
            let mut since = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            since.retain(|id, _| mounted.contains(id) && !used.contains(id));
            let idle_ones = mounted.iter().filter(|id| !used.contains(id));
            idle_ones
                .filter(|id| {
                    let is_known = self.records().all().any(|record| record.id == **id);
                    now.duration_since(*since.entry(**id).or_insert(now)) >= idle || !is_known
                })
                .copied()
                .collect()
        };
        for id in expired {
            self.chains.unmount(id, || !self.used().contains(&id));
        }
        self.remove_orphans();
    }

    /// What was done and what there is, as Prometheus reads it.
    fn exposition(&self) -> String {
        let counters = &self.counters;
        let count = |counter: &AtomicU64| Figure::Whole(counter.load(Ordering::Relaxed));
        let declined = counters.declined.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut kinds = BTreeMap::from(["active", "committed", "remote", "view"].map(|kind| (kind, 0_u64)));
        for record in self.records().all() {
            let kind = match record.content {
                Content::View => "view",
                Content::Active => "active",
                Content::Committed(_) => "committed",
                Content::Remote(_) => "remote",
            };
            *kinds.entry(kind).or_default() += 1;
        }
        let devices = self.chains.mounted().map_or(0, |ids| ids.len());
        let devices = Figure::Whole(u64::try_from(devices).unwrap_or(u64::MAX));
        let attach_time = Figure::Millis(counters.attach_ms.load(Ordering::Relaxed));
        let mut out = Text::default();
        let mut single = |name: &str, kind, help: &str, value| {
            out.family(&format!("tarblk_snapshotter_{name}"), kind, help, [(Vec::new(), value)]);
        };
        let claimed = count(&counters.claimed);
        single(
            "layers_claimed_total",
            Counter,
            "Layers that need not be pulled.",
            claimed,
        );
        let attached = count(&counters.attached);
        single("attaches_total", Counter, "Devices that were attached.", attached);
        single(
            "attach_seconds_total",
            Counter,
            "Time that attaching them took.",
            attach_time,
        );
        let failed = count(&counters.failed);
        single(
            "attach_failures_total",
            Counter,
            "Devices that could not be attached.",
            failed,
        );
        single("devices", Gauge, "Devices that are mounted.", devices);
        let declined = declined
            .iter()
            .map(|(reason, count)| (vec![("reason", reason.word())], Figure::Whole(*count)));
        let help = "Layers that were pulled as usual.";
        out.family("tarblk_snapshotter_layers_declined_total", Counter, help, declined);
        let kinds = kinds
            .iter()
            .map(|(kind, count)| (vec![("kind", *kind)], Figure::Whole(*count)));
        let help = "Snapshots; remote ones are layers that were not unpacked.";
        out.family("tarblk_snapshotter_snapshots", Gauge, help, kinds);
        out.into_string()
    }

    /// The chains that something is made on.
    fn used(&self) -> HashSet<Id> {
        let records = self.records();
        let made = records
            .all()
            .filter(|record| matches!(record.content, Content::Active | Content::View));
        made.filter_map(|record| records.chain_under(&record.name))
            .map(|chain| chain.id)
            .collect()
    }

    /// Removes directories of snapshots that are gone.
    fn remove_orphans(&self) {
        let orphans: Vec<Id> = {
            let records = self.records();
            let Ok(entries) = fs::read_dir(&self.dir) else { return };
            let ids = entries
                .flatten()
                .filter_map(|entry| Some(Id(entry.file_name().to_str()?.parse().ok()?)));
            let known: HashSet<Id> = records.ids().collect();
            ids.filter(|id| !known.contains(id)).collect()
        };
        for id in orphans {
            self.chains.unmount(id, || true);
            self.remove_directory(id);
        }
    }
}

fn check_name(name: &str) -> Result<(), Status> {
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err(Status::new(
            Code::InvalidArgument,
            "a snapshot's name is missing or too long",
        ));
    }
    Ok(())
}

impl Calls for Snapshots {
    fn metrics(&self) -> String {
        self.exposition()
    }

    fn call(&self, path: &str, namespace: Option<&str>, request: &[u8]) -> Reply {
        let Some(method) = path.strip_prefix(SERVICE) else {
            return Err(Status::new(Code::Unimplemented, format!("there is no {path} here")));
        };
        let key = || decode::<KeyRequest>(request).map(|request| request.key);
        let reply = match method {
            "Prepare" => self
                .prepare(decode(request)?, Making::Active, namespace)
                .map(|mounts| one(&mounts)),
            "View" => self
                .prepare(decode(request)?, Making::View, namespace)
                .map(|mounts| one(&mounts)),
            "Mounts" => self.mounts(&key()?).map(|mounts| one(&mounts)),
            "Commit" => self.commit(decode(request)?).map(|()| one(&Empty {})),
            "Remove" => self.remove(&key()?).map(|()| one(&Empty {})),
            "Stat" => self.stat(&key()?).map(|info| one(&InfoResponse { info: Some(info) })),
            "Update" => self
                .update(decode(request)?)
                .map(|info| one(&InfoResponse { info: Some(info) })),
            "List" => self.list(&decode(request)?).map(|all| {
                let parts = all.chunks(LISTED_AT_ONCE);
                parts
                    .flat_map(|info| one(&ListResponse { info: info.to_vec() }))
                    .collect()
            }),
            "Usage" => self.usage(&key()?).map(|usage| {
                one(&UsageResponse {
                    size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
                    inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
                })
            }),
            "Cleanup" => {
                self.tidy(Duration::MAX);
                Ok(one(&Empty {}))
            }
            other => Err(Status::new(Code::Unimplemented, format!("there is no {other} here"))),
        };
        match &reply {
            Ok(_) => log::debug!("{method}: done"),
            Err(status) => log::debug!("{method}: {:?}: {status}", status.code),
        }
        reply
    }
}
