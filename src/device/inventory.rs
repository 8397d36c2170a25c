//! The devices that tarblk has attached on this machine. In: the directory of states. Out: what `ps` lists, the device that a name,
//! path or mount point means, and what dead daemons left cleaned up.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::service::{self, Condition, ControlError, ServiceStats};
use super::state::{State, StateDir, StateError};
use super::users::{self, User};

/// One line of `ps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// What is known of the device.
    #[serde(flatten)]
    pub state: State,
    /// How it is.
    #[serde(flatten)]
    pub status: Status,
    /// Where it is mounted, as far as this process sees.
    pub mounts: Vec<PathBuf>,
}

/// How a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "status")]
pub enum Status {
    /// Its reads are answered.
    Serving,
    /// Some of its reads wait for the network.
    Waiting {
        /// For what.
        why: String,
        /// Since when, in milliseconds.
        waited_ms: u64,
        /// Until the next try, in milliseconds; 0 while a request is under way.
        left_ms: u64,
    },
    /// Its reads are answered, but not all is as it should be: the disk cache takes nothing.
    Degraded {
        /// What is wrong.
        why: String,
    },
    /// It was set aside: its reads fail.
    Poisoned {
        /// Why.
        why: String,
    },
    /// Its server lives and does not answer: it was stopped, or the machine is too busy. Reads wait.
    Silent,
    /// Its server has died, and nothing starts it again: reads of a ublk device wait, reads of a loop device fail. `detach` cleans
    /// up.
    Dead,
}

impl From<Condition> for Status {
    fn from(condition: Condition) -> Self {
        match condition {
            Condition::Serving => Self::Serving,
            Condition::Waiting {
                why,
                waited_ms,
                left_ms,
            } => Self::Waiting {
                why,
                waited_ms,
                left_ms,
            },
            Condition::Degraded { why } => Self::Degraded { why },
            Condition::Poisoned { why } => Self::Poisoned { why },
        }
    }
}

/// What is attached, served or not, and what is wrong with files that should say so.
///
/// # Errors
/// When the directory of states cannot be read.
pub fn list(states: &StateDir) -> Result<(Vec<Listed>, Vec<StateError>), StateError> {
    let (all, wrong) = states.list()?;
    let conditions = if all.is_empty() {
        Ok(None)
    } else {
        service::conditions(states)
    };
    let how_is = |state: &State| match &conditions {
        Ok(None) => Status::Dead,
        Ok(Some(known)) => known.get(&state.name).cloned().map_or(Status::Dead, Into::into),
        Err(_) => Status::Silent,
    };
    let listed = all.into_iter().map(|state| Listed {
        status: how_is(&state),
        mounts: users::mount_points(&state.device),
        state,
    });
    Ok((listed.collect(), wrong))
}

/// The device that `name` means: `/dev/ublkb0`, `ublkb0`, or the directory where it is mounted.
///
/// # Errors
/// [`ControlError::Unknown`] when there is none.
pub fn find(states: &StateDir, name: &Path) -> Result<State, ControlError> {
    let (all, wrong) = states.list()?;
    let full = std::fs::canonicalize(name).unwrap_or_else(|_| name.to_owned());
    let is_meant = |state: &State| {
        Path::new(&state.name) == name || state.device == full || users::mount_points(&state.device).contains(&full)
    };
    match all.into_iter().find(is_meant) {
        Some(state) => Ok(state),
        // A damaged file may be the reason why it is not found.
        None => Err(wrong
            .into_iter()
            .next()
            .map_or_else(|| ControlError::Unknown(name.display().to_string()), Into::into)),
    }
}

/// A device and what its daemon has counted: what `stats --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// What is known of the device.
    pub state: State,
    /// What was counted since it is served.
    pub counters: ServiceStats,
}

/// The counters of the device that `name` means.
///
/// # Errors
/// When there is no such device, or its daemon does not answer.
pub fn stats(states: &StateDir, name: &Path) -> Result<Counted, ControlError> {
    let state = find(states, name)?;
    let counters = service::stats(states, &state)?;
    Ok(Counted { state, counters })
}

/// Takes down the device that `name` means; see [`service::detach`].
///
/// # Errors
/// When there is no such device, or it is in use.
pub fn detach(states: &StateDir, name: &Path) -> Result<State, ControlError> {
    let state = find(states, name)?;
    service::detach(states, &state)?;
    Ok(state)
}

/// Cleans up what dead daemons left: files, and devices that are not in use. Every command that changes something does this
/// first. Returns what stays because it is in use, with its users.
///
/// # Errors
/// When the directory of states cannot be read.
pub fn sweep(states: &StateDir) -> Result<Vec<(State, Vec<User>)>, StateError> {
    let (all, wrong) = states.list()?;
    for error in wrong {
        log::warn!("{error}");
    }
    states.remove_leftovers();
    let mut staying = Vec::new();
    // What the service left another one goes on with, or cleans up, as soon as it starts.
    let dead = |state: &State| !state.process.is_of_this_boot() || (!state.is_alive() && !state.device_exists());
    let no_service = !states.service_socket().exists();
    for state in all.into_iter().filter(|state| no_service && dead(state)) {
        match service::bury(states, &state) {
            Ok(()) => log::info!(
                "cleaned up after the dead process {} of {}",
                state.process.pid,
                state.name
            ),
            Err(ControlError::InUse { .. }) => {
                let users = state.users();
                staying.push((state, users));
            }
            Err(error) => log::warn!("cannot clean up {}: {error}", state.name),
        }
    }
    Ok(staying)
}
