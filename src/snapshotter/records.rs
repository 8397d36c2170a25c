//! What is known of snapshots, on disk. In: a snapshot as it is to be from now on. Out: the same after a crash at any instruction.
//!
//! Each snapshot is one small file, `records/ID.json`, put in its place whole: written beside it, synced, renamed, the directory
//! synced. Every change that a call makes is a change of one record, so there is no half of one. containerd keeps a database of its
//! own of what it was told, and what that names and this has lost can neither be used nor pulled again.
//!
//! Invariant: when a method returns, disk and memory say the same; when it fails, memory says what the disk said before.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::messages::{Info, Kind, Labels, Timestamp};
use crate::device::state::{PART, write_whole};
use crate::digest::Digest;
use crate::source::registry::Reference;

/// The form of the files that is written and understood here.
const VERSION: u32 = 1;

/// No record is longer, in bytes: labels are at most 4096 bytes each in containerd.
const LONGEST_RECORD: u64 = 4 << 20;

/// The most images that are remembered to hold one layer.
const MOST_SOURCES: usize = 16;

/// Why a record cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep {path}: {cause}")]
pub struct RecordError {
    /// The file or directory.
    pub path: PathBuf,
    /// What the kernel said.
    #[source]
    pub cause: io::Error,
}

/// A snapshot's number: what its record and its directory are called. Never given out twice while either is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Id(pub(super) u64);

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Its number.
    pub(super) id: Id,
    /// Its name, or the key under which it was made.
    pub(super) name: String,
    /// The name of the one below it.
    pub(super) parent: Option<String>,
    /// What it is.
    pub(super) content: Content,
    /// What clients noted.
    pub(super) labels: Labels,
    /// When it was made, or committed.
    pub(super) created: Moment,
    /// When it was changed the last time.
    pub(super) updated: Moment,
}

/// What a snapshot is, and where its files are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Content {
    /// Read-only, above what is below it; no files of its own.
    View,
    /// Being written into a directory of its own.
    Active,
    /// Finished, in a directory of its own.
    Committed(Usage),
    /// A layer of an image that was not unpacked: it and all below it are one device, attached when something is made above it.
    Remote(RemoteLayer),
}

/// What files take on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Usage {
    /// Bytes, of whole blocks.
    pub(super) bytes: u64,
    /// Files and directories.
    pub(super) inodes: u64,
}

/// A layer that is in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoteLayer {
    /// The layer's blob.
    pub(super) layer: Digest,
    /// Its length in bytes.
    pub(super) bytes: u64,
    /// How many layers it and those below it are.
    pub(super) depth: usize,
    /// The images in which this layer lies on the same ones, the one that came last first; never empty.
    pub(super) sources: Vec<ImageSource>,
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageSource {
    /// Its name as it was pulled, `host/repository:tag`.
    pub(super) reference: String,
    /// Its manifest.
    pub(super) manifest: Digest,
}

impl RemoteLayer {
    /// Notes that this layer is in that image too; false if that was known.
    pub(super) fn learn(&mut self, source: &ImageSource) -> bool {
        if self.sources.first() == Some(source) {
            return false;
        }
        self.sources.retain(|known| known != source);
        self.sources.insert(0, source.clone());
        self.sources.truncate(MOST_SOURCES);
        true
    }
}

/// A moment, in nanoseconds since 1970 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(u64);

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// As it is told.
    #[must_use]
    pub fn told(self) -> Timestamp {
        const SECOND: u64 = 1_000_000_000;
        Timestamp {
            seconds: i64::try_from(self.0 / SECOND).unwrap_or(i64::MAX),
            nanos: i32::try_from(self.0 % SECOND).unwrap_or(0),
        }
    }
}

impl Record {
    /// As it is told.
    #[must_use]
    pub(super) fn info(&self) -> Info {
        let kind = match self.content {
            Content::View => Kind::View,
            Content::Active => Kind::Active,
            Content::Committed(_) | Content::Remote(_) => Kind::Committed,
        };
        Info {
            name: self.name.clone(),
            parent: self.parent.clone().unwrap_or_default(),
            kind: kind.into(),
            created_at: Some(self.created.told()),
            updated_at: Some(self.updated.told()),
            labels: self.labels.clone(),
        }
    }

    /// Whether others may be above it.
    #[must_use]
    pub(super) const fn is_committed(&self) -> bool {
        matches!(self.content, Content::Committed(_) | Content::Remote(_))
    }

    /// The layer, if it was not unpacked.
    #[must_use]
    pub(super) const fn remote(&self) -> Option<&RemoteLayer> {
        match &self.content {
            Content::Remote(layer) => Some(layer),
            Content::View | Content::Active | Content::Committed(_) => None,
        }
    }
}

/// A record's file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    version: u32,
    snapshot: Record,
}

/// All snapshots.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    by_name: BTreeMap<String, Record>,
    /// How many are above one, by its name.
    children: HashMap<String, usize>,
    /// Snapshots whose records make no sense: their directories are not touched.
    damaged: BTreeSet<Id>,
    next: u64,
}

impl Records {
    /// Reads what is in `dir`, which is made if it is not there. A file that makes no sense is left where it is, under another name,
    /// and told of in the log: the others are as good as before. `least` is a number that no snapshot has had.
    ///
    /// # Errors
    /// [`RecordError`] when the directory cannot be made or read, or a file was written by a later version.
    pub(super) fn open(dir: &Path, least: u64) -> Result<Self, RecordError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause| RecordError { path, cause }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed(dir))?;
        let mut records = Self {
            dir: dir.to_owned(),
            by_name: BTreeMap::new(),
            children: HashMap::new(),
            damaged: BTreeSet::new(),
            next: least,
        };
        for entry in fs::read_dir(dir).map_err(failed(dir))? {
            let path = entry.map_err(failed(dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(PART) {
                let _ = fs::remove_file(&path);
            }
            let Some((id, kind)) = name.split_once('.') else {
                continue;
            };
            let Ok(id) = id.parse::<u64>() else { continue };
            records.next = records.next.max(id.saturating_add(1));
            match kind {
                "json" => {}
                DAMAGED => {
                    records.damaged.insert(Id(id));
                    continue;
                }
                _ => continue,
            }
            match read(&path, Id(id)) {
                Ok(record) => match records.by_name.get(&record.name) {
                    None => records.add(record),
                    // There is no way to this but another program's.
                    Some(other) => {
                        log::error!("{}: {} is snapshot {} already", path.display(), record.name, other.id.0);
                        records.damaged.insert(Id(id));
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return Err(failed(&path)(error)),
                Err(error) => {
                    log::error!("{}: not a record of a snapshot: {error}", path.display());
                    let _ = fs::rename(&path, path.with_extension(DAMAGED));
                    records.damaged.insert(Id(id));
                }
            }
        }
        Ok(records)
    }

    fn add(&mut self, record: Record) {
        if let Some(parent) = &record.parent {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        self.by_name.insert(record.name.clone(), record);
    }

    fn take(&mut self, name: &str) {
        let parent = self.by_name.remove(name).and_then(|record| record.parent);
        if let Some(parent) = parent
            && let Some(count) = self.children.get_mut(&parent)
        {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&parent);
            }
        }
    }

    /// The number of a snapshot to come.
    pub(super) fn next_id(&mut self) -> Id {
        let id = Id(self.next);
        self.next += 1;
        id
    }

    /// The snapshot of this name.
    #[must_use]
    pub(super) fn get(&self, name: &str) -> Option<&Record> {
        self.by_name.get(name)
    }

    /// Whether others are above the snapshot of this name.
    #[must_use]
    pub(super) fn has_children(&self, name: &str) -> bool {
        self.children.contains_key(name)
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> impl Iterator<Item = &Record> {
        self.by_name.values()
    }

    /// The numbers of all of them, and of what may be one.
    pub(super) fn ids(&self) -> impl Iterator<Item = Id> {
        self.by_name
            .values()
            .map(|record| record.id)
            .chain(self.damaged.iter().copied())
    }

    /// A snapshot and those below it, down to the first that was not unpacked (all below that are in it) or that nothing is below.
    pub(super) fn lineage<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Record> + use<'a> {
        let mut next = self.by_name.get(name);
        std::iter::from_fn(move || {
            let record = next?;
            next = match (&record.content, &record.parent) {
                (Content::Remote(_), _) | (_, None) => None,
                (_, Some(parent)) => self.by_name.get(parent),
            };
            Some(record)
        })
    }

    /// The layer that was not unpacked and whose device is under the snapshot of this name, if there is one.
    #[must_use]
    pub(super) fn chain_under(&self, name: &str) -> Option<&Record> {
        self.lineage(name).find(|record| record.remote().is_some())
    }

    /// Keeps a snapshot: a new one, or one that has changed, its name perhaps.
    ///
    /// # Errors
    /// [`RecordError`]; then nothing has changed.
    pub(super) fn put(&mut self, record: Record) -> Result<(), RecordError> {
        let path = self.path(record.id);
        let id = record.id;
        let file = RecordFile {
            version: VERSION,
            snapshot: record,
        };
        let written = serde_json::to_vec(&file)
            .map_err(io::Error::from)
            .and_then(|bytes| write_whole(&path, &bytes, true));
        written.map_err(|cause| RecordError { path, cause })?;
        let before = self
            .by_name
            .values()
            .find(|known| known.id == id)
            .map(|known| known.name.clone());
        if let Some(before) = before {
            self.take(&before);
        }
        self.add(file.snapshot);
        Ok(())
    }

    /// Forgets a snapshot.
    ///
    /// # Errors
    /// [`RecordError`]; then nothing has changed.
    pub(super) fn remove(&mut self, name: &str) -> Result<(), RecordError> {
        let Some(record) = self.by_name.get(name) else {
            return Ok(());
        };
        let path = self.path(record.id);
        let removed = fs::remove_file(&path).and_then(|()| File::open(&self.dir)?.sync_all());
        removed.map_err(|cause| RecordError { path, cause })?;
        self.take(name);
        Ok(())
    }

    fn path(&self, id: Id) -> PathBuf {
        self.dir.join(format!("{}.json", id.0))
    }
}

/// The repositories in which each claimed layer was seen, by the records in `dir`, which another process may be writing: those of layers
/// that are claimed meanwhile may be missing.
///
/// # Errors
/// [`RecordError`] when the directory cannot be read.
pub(super) fn repositories(dir: &Path) -> Result<BTreeMap<Digest, Vec<String>>, RecordError> {
    let failed = |cause| RecordError {
        path: dir.to_owned(),
        cause,
    };
    let mut found: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let id = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".json")?.parse().ok());
        let Some(record) = id.and_then(|id| read(&path, Id(id)).ok()) else {
            continue;
        };
        let Some(layer) = record.remote() else { continue };
        for source in &layer.sources {
            let Ok(Reference { host, repository, .. }) = Reference::parse(&source.reference) else {
                continue;
            };
            let known = found.entry(layer.layer.clone()).or_default();
            let repository = format!("{host}/{repository}");
            if !known.contains(&repository) {
                known.push(repository);
            }
        }
    }
    Ok(found)
}

/// What a record that makes no sense is called at the end.
const DAMAGED: &str = "damaged";

fn read(path: &Path, id: Id) -> io::Result<Record> {
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST_RECORD).read_to_end(&mut bytes)?;
    let AnyVersion { version } = serde_json::from_slice(&bytes)?;
    if version > VERSION {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("it is of version {version}, and this tarblk knows {VERSION}: run the newer one"),
        ));
    }
    let RecordFile { snapshot, .. } = serde_json::from_slice(&bytes)?;
    if snapshot.id != id || snapshot.remote().is_some_and(|layer| layer.sources.is_empty()) {
        return Err(io::Error::other("it does not fit its name"));
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(records: &mut Records, name: &str, parent: Option<&str>, content: Content) -> Record {
        Record {
            id: records.next_id(),
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            content,
            labels: Labels::from([("a".to_owned(), name.to_owned())]),
            created: Moment::now(),
            updated: Moment::now(),
        }
    }

    fn remote(depth: usize) -> Content {
        let digest = Digest::of(crate::digest::Algorithm::Sha256, &[u8::try_from(depth).unwrap()]);
        Content::Remote(RemoteLayer {
            layer: digest.clone(),
            bytes: 3,
            depth,
            sources: vec![ImageSource {
                reference: "host/a:b".to_owned(),
                manifest: digest,
            }],
        })
    }

    #[test]
    fn what_was_kept_is_there_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::open(&dir.path().join("r"), 7).unwrap();
        for (name, parent, content) in [
            ("base", None, remote(1)),
            ("above", Some("base"), remote(2)),
            ("key", Some("above"), Content::Active),
            ("gone", None, Content::View),
        ] {
            let record = record(&mut records, name, parent, content);
            records.put(record).unwrap();
        }
        let mut committed = records.get("key").unwrap().clone();
        assert_eq!(committed.id, Id(9));
        committed.name = "name".to_owned();
        committed.content = Content::Committed(Usage { bytes: 5, inodes: 1 });
        records.put(committed).unwrap();
        records.remove("gone").unwrap();
        // What is left of a write that was cut short, and what never was a record.
        fs::write(dir.path().join("r/10.json.part"), b"{").unwrap();
        fs::write(dir.path().join("r/12.json"), b"{\"version\":1}").unwrap();
        let mut again = Records::open(&dir.path().join("r"), 0).unwrap();
        assert_eq!(again.by_name, records.by_name);
        assert_eq!(again.children, records.children);
        assert!(again.has_children("base") && again.has_children("above") && !again.has_children("name"));
        assert_eq!(
            again.next_id(),
            Id(13),
            "no number is used again, also not a damaged record's"
        );
        assert!(dir.path().join("r/12.damaged").exists() && !dir.path().join("r/10.json.part").exists());
        let names = |name| {
            again
                .lineage(name)
                .map(|record| record.name.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(names("name"), ["name", "above"]);
        assert_eq!(again.chain_under("name").unwrap().name, "above");
        assert_eq!(names("none"), [""; 0]);
    }

    #[test]
    fn a_later_version_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("1.json"), b"{\"version\":2,\"other\":true}").unwrap();
        let error = Records::open(dir.path(), 0).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
        assert!(dir.path().join("1.json").exists());
    }

    #[test]
    fn what_cannot_be_written_does_not_change_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::open(&dir.path().join("r"), 0).unwrap();
        let first = record(&mut records, "first", None, Content::Active);
        records.put(first.clone()).unwrap();
        fs::remove_dir_all(dir.path().join("r")).unwrap();
        let second = record(&mut records, "second", Some("first"), Content::View);
        assert!(records.put(second).is_err() && records.remove("first").is_err());
        assert_eq!(records.all().collect::<Vec<_>>(), [&first]);
        assert!(!records.has_children("first"));
    }

    #[test]
    fn the_image_that_came_last_is_the_first() {
        let Content::Remote(mut layer) = remote(1) else {
            unreachable!()
        };
        let source = |n: usize| ImageSource {
            reference: format!("host/{n}"),
            manifest: layer.layer.clone(),
        };
        let sources: Vec<_> = (0..40).map(source).collect();
        for source in &sources {
            assert!(layer.learn(source) && !layer.learn(source));
        }
        assert_eq!(layer.sources.len(), MOST_SOURCES);
        assert_eq!(layer.sources[0], sources[39]);
        assert!(layer.learn(&sources[38]));
        assert_eq!(layer.sources.len(), MOST_SOURCES);
    }
}
