//! What a restarted service reads of a device. In: a device that was made. Out: in another process, what it is to go on with.
//!
//! There are two copies: one in memory that the keepers hold (`memfd`), with secrets; and one without them in the state directory, for
//! the case that all keepers died as well, which a ublk device survives. The file is written whole or not at all, and checked when it is read.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::counts;
use crate::device::DeviceOptions;
use crate::device::state::{self, State, StateDir, StateError};

/// No record is longer, in bytes: what is big in it (an index) is in a file of its own.
const MAX_RECORD_BYTES: u64 = 16 << 20;

/// A device and how it was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record<I> {
    pub(super) state: State,
    pub(super) options: DeviceOptions,
    /// Whether the device is to go with its last user.
    pub(super) until_unused: bool,
    /// The image's description; in a file, without secrets.
    pub(super) image: I,
}

fn path(states: &StateDir, name: &str) -> PathBuf {
    states.path().join(format!("{name}.spec"))
}

/// The names of all devices that have a file.
pub(super) fn names(states: &StateDir) -> Vec<String> {
    let entries = fs::read_dir(states.path()).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".spec")?.to_owned()))
        .collect()
}

/// Writes the file of a record.
///
/// # Errors
/// [`StateError::File`].
pub(super) fn write<I: Serialize>(states: &StateDir, record: &Record<I>) -> Result<(), StateError> {
    let text = serde_json::to_string(record).map_err(|error| StateError::File {
        path: path(states, &record.state.name),
        cause: error.into(),
    })?;
    state::write_checked(&path(states, &record.state.name), text)
}

/// Reads the file of the record of device `name`.
///
/// # Errors
/// [`StateError`], also for a record of another device.
pub(super) fn read<I: DeserializeOwned>(states: &StateDir, name: &str) -> Result<Record<I>, StateError> {
    let path = path(states, name);
    let mut text = Vec::new();
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .and_then(|file| file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text))
        .map_err(|cause| StateError::File {
            path: path.clone(),
            cause,
        })?;
    let record: Record<I> = state::parse_checked(&text, MAX_RECORD_BYTES, &path)?;
    if record.state.name == name {
        Ok(record)
    } else {
        Err(StateError::Damaged {
            path,
            cause: "it is of another device".to_owned(),
        })
    }
}

/// Removes what is kept of device `name`.
pub(super) fn remove(states: &StateDir, name: &str) {
    let _ = fs::remove_file(path(states, name));
    counts::remove(states, name);
}

/// A record in memory that other processes can be given.
///
/// # Errors
/// What the kernel says.
pub(super) fn to_memory<I: Serialize>(record: &Record<I>) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create("tarblk-record", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = fs::File::from(memory);
    file.write_all(&serde_json::to_vec(record)?)?;
    Ok(file.into())
}

/// Reads a record from memory that a keeper held.
///
/// # Errors
/// What the kernel says, or that it is no record.
pub(super) fn from_memory<I: DeserializeOwned>(memory: &OwnedFd) -> io::Result<Record<I>> {
    let mut file = fs::File::from(memory.try_clone()?);
    file.rewind()?;
    let mut text = Vec::new();
    file.take(MAX_RECORD_BYTES).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
