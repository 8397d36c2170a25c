//! What commands know of the devices that daemons serve. In and out: one small file for every device under `/run/tarblk`.
//!
//! A file is written once, whole, when its device is ready, and removed when the device is gone. It says which process serves
//! the device (by number *and* time of birth, because numbers are used again), and holds no secrets. Whoever reads it checks
//! it: version, checksum, and that every field is what it should be.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::users::{self, User};
use super::{Backend, fuse_loop, ublk};
use crate::checksum;
use crate::fetch::LayerTrust;

/// Where states are kept unless a command says otherwise.
pub const DEFAULT_DIR: &str = "/run/tarblk";

const VERSION: u32 = 2;

/// No state file is longer; a longer one is not ours.
const MAX_STATE_BYTES: u64 = 64 << 10;

/// How long to wait for others to be done with the files.
const TURN_LIMIT: Duration = Duration::from_secs(5);

/// What can be wrong with the directory or a file in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The directory cannot be used.
    #[error("cannot use {path}: {cause}")]
    Directory {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// A file is not a state, or a damaged one.
    #[error("{path} is damaged ({cause}); remove it if no tarblk service runs")]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// How.
        cause: String,
    },
    /// A file was written by another version of tarblk.
    #[error("{path} is of version {version}, which this tarblk does not know")]
    Version {
        /// The file or directory.
        path: PathBuf,
        /// The version it has.
        version: u32,
    },
}

/// What serves one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The device's name, `ublkb0` or `loop3`; the file is called after it.
    pub name: String,
    /// The block device.
    pub device: PathBuf,
    /// What carries it.
    pub backend: Backend,
    /// The number in its name.
    pub number: u32,
    /// Its length in bytes.
    pub len: u64,
    /// The layer it holds, as a person named it, without secrets.
    pub source: String,
    /// On whose word its layers are what they are shown as, the lowest first; none where that is not known.
    #[serde(default)]
    pub trust: Vec<LayerTrust>,
    /// The process that serves it, or did until it ended: the machine's service is started again.
    pub process: Process,
    /// What that process is.
    pub server: Server,
    /// When it was ready, in seconds since 1970 UTC.
    pub since: u64,
    /// Tells it apart from devices that have its name before and after it, which the kernel gives out again at once: when it was ready, in
    /// microseconds. 0 where an older version wrote it.
    #[serde(default)]
    pub instance: u64,
    /// The kernel's own number of the disk, which it gives out once (`diskseq`, Linux 5.15 and newer): of a server that died the kernel may
    /// have taken the device down and given its name to another's. None where the kernel has no such numbers.
    #[serde(default)]
    pub disk: Option<u64>,
    /// The log of what serves it, if it has one.
    pub log: Option<PathBuf>,
}

/// What serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Server {
    /// The service of the state directory, which serves other devices too and is started again when it dies.
    Service,
}

/// A process, told apart from a later one with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it began, in clock ticks since boot.
    pub born: u64,
    /// The boot that the ticks count from.
    pub boot: String,
}

impl Process {
    /// This process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn current() -> io::Result<Self> {
        let pid = std::process::id();
        let (_, born) = stat(pid)?;
        Ok(Self {
            pid,
            born,
            boot: boot_id()?,
        })
    }

    /// What stands for a process that could not be told apart from others: it is never taken for a living one.
    #[must_use]
    pub fn unknown() -> Self {
        Self {
            pid: std::process::id(),
            born: 0,
            boot: String::new(),
        }
    }

    /// Whether it began since the machine was started the last time.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot)
    }

    /// Whether it still runs. One that has ended but whose parent has not noticed does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot)
            && stat(self.pid).is_ok_and(|(status, born)| born == self.born && !matches!(status, b'Z' | b'X'))
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A process's status letter and time of birth, from `/proc/PID/stat`.
fn stat(pid: u32) -> io::Result<(u8, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, which may hold anything.
    let parse = || {
        let rest = &text[text.iter().rposition(|&byte| byte == b')')? + 1..];
        let mut fields = std::str::from_utf8(rest).ok()?.split_ascii_whitespace();
        let status = *fields.next()?.as_bytes().first()?;
        // Field 22 of the whole line; the status is field 3.
        Some((status, fields.nth(18)?.parse().ok()?))
    };
    parse().ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

/// The file's form: the state as text inside, so that its checksum is of exact bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    version: u32,
    crc32c: u32,
    state: String,
}

/// What a file that is being written is called at the end.
pub(crate) const PART: &str = ".part";

/// Whether a file in the directory was being written by a process that is gone: [`write_whole`] has its number in the name.
fn is_part_of_dead(name: &str) -> bool {
    let written = name.strip_prefix('.').and_then(|name| name.strip_suffix(PART));
    let pid = written.and_then(|name| name.rsplit('.').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| stat(pid).is_err())
}

/// Puts a file in its place, whole or not at all; with `durable` it is on disk when this returns. A killed process leaves a file
/// whose name ends in [`PART`].
///
/// # Errors
/// What the kernel says; then the file is as it was.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let name = path
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let part = path.with_file_name(format!(".{name}.{}{PART}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&part)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&part, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&part);
    })?;
    match path.parent() {
        Some(dir) if durable => File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}

/// Writes `text` in an envelope to `path`, whole or not at all.
///
/// # Errors
/// [`StateError::File`] when it cannot be written.
pub(super) fn write_checked(path: &Path, text: String) -> Result<(), StateError> {
    let envelope = Envelope {
        version: VERSION,
        crc32c: checksum::crc32c(text.as_bytes()),
        state: text,
    };
    let bytes = serde_json::to_vec(&envelope).map_err(io::Error::from);
    bytes
        .and_then(|bytes| write_whole(path, &bytes, false))
        .map_err(|cause| StateError::File {
            path: path.to_owned(),
            cause,
        })
}

/// Understands what [`write_checked`] wrote to `path`; more than `most` bytes are refused.
///
/// # Errors
/// [`StateError::Damaged`], [`StateError::Version`].
pub(super) fn parse_checked<T: serde::de::DeserializeOwned>(
    text: &[u8],
    most: u64,
    path: &Path,
) -> Result<T, StateError> {
    let damaged = |cause: String| StateError::Damaged {
        path: path.to_owned(),
        cause,
    };
    if text.len() > usize::try_from(most).unwrap_or(usize::MAX) {
        return Err(damaged("it is too long".to_owned()));
    }
    let AnyVersion { version } = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
    if version != VERSION {
        return Err(StateError::Version {
            path: path.to_owned(),
            version,
        });
    }
    let envelope: Envelope = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
    if checksum::crc32c(envelope.state.as_bytes()) != envelope.crc32c {
        return Err(damaged("its checksum is wrong".to_owned()));
    }
    serde_json::from_str(&envelope.state).map_err(|error| damaged(error.to_string()))
}

/// The part of the form that no version changes.
#[derive(Deserialize)]
struct AnyVersion {
    version: u32,
}

/// The directory of states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir(PathBuf);

impl Default for StateDir {
    fn default() -> Self {
        Self(PathBuf::from(DEFAULT_DIR))
    }
}

/// No daemon takes longer to start: what is passed on while it does is of no use after this.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

impl StateDir {
    /// States in `path` instead of [`DEFAULT_DIR`].
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory, for the owner's eyes only, or checks that the one that is there is safe.
    ///
    /// # Errors
    /// [`StateError::Directory`] when it cannot be made, or others can write to it.
    pub fn create(&self) -> Result<(), StateError> {
        let refused = |cause: String| StateError::Directory {
            path: self.0.clone(),
            cause,
        };
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(refused(error.to_string())),
        }
        let meta = fs::symlink_metadata(&self.0).map_err(|error| refused(error.to_string()))?;
        if !meta.is_dir() {
            return Err(refused("it is not a directory".to_owned()));
        }
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return Err(refused("others can write to it; remove it".to_owned()));
        }
        Ok(())
    }

    /// The control socket of the service.
    #[must_use]
    pub fn service_socket(&self) -> PathBuf {
        self.0.join("service.sock")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    /// Writes a state, whole or not at all.
    ///
    /// # Errors
    /// [`StateError::File`] when it cannot be written.
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        let path = self.file(&state.name);
        let text = serde_json::to_string(state).map_err(|error| StateError::File {
            path: path.clone(),
            cause: error.into(),
        })?;
        write_checked(&path, text)
    }

    /// Removes the file of the device of `state`. A device's number is given out again at once, so it may be another one's by now:
    /// then it stays.
    pub fn remove(&self, state: &State) {
        let _turn = self.turn();
        if self.read(&state.name).is_ok_and(|found| found.process != state.process) {
            return;
        }
        let path = self.file(&state.name);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }

    /// Removes what processes left that were killed: indexes that commands lent to the service, and files that were not yet given
    /// their name.
    pub fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return;
        };
        let old = |entry: &fs::DirEntry| {
            let changed = entry.metadata().and_then(|meta| meta.modified()).ok();
            changed
                .and_then(|changed| changed.elapsed().ok())
                .is_some_and(|age| age > LEFTOVER_AGE)
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let passing = [("index-", ".tarblk"), (".", PART)];
            let is_passing = passing
                .iter()
                .any(|(start, end)| name.starts_with(start) && name.ends_with(end));
            if (is_passing && old(&entry)) || is_part_of_dead(&name) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Waits for the caller's turn to change a device's files together; it lasts until the value is dropped. A process that
    /// does not give up its turn is passed over after a while, because a device must not hang on it.
    pub(super) fn turn(&self) -> Option<fs::File> {
        let turn = super::take_turn(&self.0, TURN_LIMIT).ok()?;
        if turn.is_none() {
            log::warn!("{} is locked by another process; going on", self.0.display());
        }
        turn
    }

    /// Whether the machine was started since `what` was last asked for here; from then on it was asked for. Kept as an
    /// attribute of the directory, because every file in it belongs to a device. Where that cannot be kept it is always the
    /// first time.
    #[must_use]
    pub fn is_first_since_boot(&self, what: &str) -> bool {
        let Ok(boot) = boot_id() else { return true };
        let name = format!("trusted.tarblk.{what}");
        let mut kept = [0; 64];
        let len = rustix::fs::getxattr(&self.0, &*name, &mut kept).unwrap_or(0);
        if kept.get(..len) == Some(boot.as_bytes()) {
            return false;
        }
        let _ = rustix::fs::setxattr(&self.0, &*name, boot.as_bytes(), rustix::fs::XattrFlags::empty());
        true
    }

    /// Reads the state of device `name`.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(&self, name: &str) -> Result<State, StateError> {
        let path = self.file(name);
        let mut text = Vec::new();
        let read = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| file.take(MAX_STATE_BYTES + 1).read_to_end(&mut text));
        read.map_err(|cause| StateError::File {
            path: path.clone(),
            cause,
        })?;
        parse(&text, name, &path)
    }

    /// All states, in the order of their names, and what is wrong with files that are none.
    ///
    /// # Errors
    /// [`StateError::Directory`] when there is a directory that cannot be read.
    pub fn list(&self) -> Result<(Vec<State>, Vec<StateError>), StateError> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
            Err(error) => {
                let advice = match error.kind() {
                    io::ErrorKind::PermissionDenied => "; what is attached is root's business: try sudo",
                    _ => "",
                };
                return Err(StateError::Directory {
                    path: self.0.clone(),
                    cause: format!("{error}{advice}"),
                });
            }
        };
        let (mut states, mut wrong) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let file = entry.file_name();
            let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".json")) else {
                continue;
            };
            match self.read(name) {
                Ok(state) => states.push(state),
                // Removed since the directory was read.
                Err(StateError::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(error) => wrong.push(error),
            }
        }
        states.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        Ok((states, wrong))
    }
}

fn parse(text: &[u8], name: &str, path: &Path) -> Result<State, StateError> {
    let damaged = |cause: String| StateError::Damaged {
        path: path.to_owned(),
        cause,
    };
    let state: State = parse_checked(text, MAX_STATE_BYTES, path)?;
    let kind = match state.backend {
        Backend::Ublk => "ublkb",
        Backend::Loop => "loop",
    };
    let named = format!("{kind}{}", state.number);
    if state.name != name
        || state.name != named
        || state.device != Path::new("/dev").join(&named)
        || state.process.pid == 0
    {
        return Err(damaged("it contradicts itself".to_owned()));
    }
    Ok(state)
}

impl State {
    /// Whether its daemon still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Whether the kernel still has the device: this one, and not another that has its name by now.
    #[must_use]
    pub fn device_exists(&self) -> bool {
        let is_there = match self.backend {
            Backend::Ublk => ublk::exists(self.number),
            Backend::Loop => fuse_loop::is_ours(self.number),
        };
        let is_another = || match (self.disk, disk_number(&self.name)) {
            (Some(then), Some(now)) => then != now,
            _ => false,
        };
        is_there && !is_another()
    }

    /// Who uses the device; nobody where what is used has only its name.
    #[must_use]
    pub fn users(&self) -> Vec<User> {
        if self.device_exists() {
            users::of(&self.device)
        } else {
            Vec::new()
        }
    }
}

/// The number of the disk that is called `name` now, as [`State::disk`].
pub(super) fn disk_number(name: &str) -> Option<u64> {
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("diskseq")).ok()?;
    text.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{BytesTrust, IndexTrust};

    #[test]
    fn what_the_dead_were_writing_goes_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = child.id();
        child.wait().unwrap();
        let living = std::process::id();
        for name in [
            format!(".loop4.json.{dead}.part"),
            format!(".loop4.json.{living}.part"),
            format!("loop4.json.{dead}"),
            "index-x.tarblk".to_owned(),
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        StateDir::new(dir.path()).remove_leftovers();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let expected = [
            format!(".loop4.json.{living}.part"),
            "index-x.tarblk".to_owned(),
            format!("loop4.json.{dead}"),
        ];
        assert_eq!(left, expected);
    }

    fn example() -> State {
        State {
            name: "loop7".to_owned(),
            device: PathBuf::from("/dev/loop7"),
            backend: Backend::Loop,
            number: 7,
            len: 1 << 20,
            source: "http://example.com/layer.tar".to_owned(),
            trust: vec![LayerTrust {
                index: IndexTrust::Manifest,
                bytes: BytesTrust::EachChunk,
            }],
            process: Process::current().unwrap(),
            server: Server::Service,
            since: 1_700_000_000,
            instance: 1_700_000_000_000_001,
            disk: Some(12),
            log: Some(PathBuf::from("/run/tarblk/service.log")),
        }
    }

    fn dir() -> (tempfile::TempDir, StateDir) {
        let temp = tempfile::tempdir().unwrap();
        let states = StateDir::new(temp.path().join("states"));
        states.create().unwrap();
        (temp, states)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_temp, states) = dir();
        states.write(&example()).unwrap();
        assert_eq!(states.read("loop7").unwrap(), example());
        let (list, wrong) = states.list().unwrap();
        assert_eq!(list, [example()]);
        assert!(wrong.is_empty());
        states.remove(&example());
        assert!(states.list().unwrap().0.is_empty());
    }

    #[test]
    fn the_next_daemon_of_a_number_keeps_its_files() {
        let (_temp, states) = dir();
        let (mut before, next) = (example(), example());
        before.process.born += 1;
        states.write(&before).unwrap();
        states.write(&next).unwrap();
        states.remove(&before);
        assert_eq!(states.read("loop7").unwrap(), next);
        states.remove(&next);
        assert!(states.list().unwrap().0.is_empty());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (_temp, states) = dir();
        states.write(&example()).unwrap();
        let path = states.file("loop7");
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bad).unwrap();
            let read = states.read("loop7");
            assert!(
                read.is_err(),
                "flipped bit {bit} was not noticed: {}",
                String::from_utf8_lossy(&bad)
            );
        }
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        assert!(matches!(states.read("loop7"), Err(StateError::Damaged { .. })));
    }

    #[test]
    fn another_name_or_version_is_refused() {
        let (_temp, states) = dir();
        states.write(&example()).unwrap();
        fs::rename(states.file("loop7"), states.file("loop8")).unwrap();
        assert!(matches!(states.read("loop8"), Err(StateError::Damaged { .. })));
        fs::write(states.file("loop8"), "{\"version\":3,\"new\":true}").unwrap();
        assert!(matches!(
            states.read("loop8"),
            Err(StateError::Version { version: 3, .. })
        ));
        assert_eq!(states.list().unwrap().1.len(), 1);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (_temp, states) = dir();
        assert_eq!(fs::metadata(states.path()).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(states.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(states.create(), Err(StateError::Directory { .. })));
    }

    #[test]
    fn processes_are_told_apart_by_birth() {
        let me = Process::current().unwrap();
        assert!(me.is_alive());
        assert!(
            !Process {
                born: me.born + 1,
                ..me.clone()
            }
            .is_alive()
        );
        assert!(
            !Process {
                boot: "another".to_owned(),
                ..me
            }
            .is_alive()
        );
    }
}
