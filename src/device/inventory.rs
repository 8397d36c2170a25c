//! The devices that tarblk has attached on this machine. In: the directory of states. Out: what `ps` lists, the device that a name,
//! path or mount point means, and what dead daemons left cleaned up.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::daemon::{self, ControlError, DaemonStats};
use super::state::{State, StateDir, StateError};
use super::users::{self, User};

/// One line of `ps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// What is known of the device.
    #[serde(flatten)]
    pub state: State,
    /// Whether it is served.
    pub status: Status,
    /// Where it is mounted, as far as this process sees.
    pub mounts: Vec<PathBuf>,
}

/// Whether a device is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is.
    Serving,
    /// Its daemon has died: reads of a ublk device wait, reads of a loop device fail. `detach` cleans up.
    Dead,
}

/// What is attached, served or not, and what is wrong with files that should say so.
///
/// # Errors
/// When the directory of states cannot be read.
pub fn list(states: &StateDir) -> Result<(Vec<Listed>, Vec<StateError>), StateError> {
    let (all, wrong) = states.list()?;
    let listed = all.into_iter().map(|state| Listed {
        status: if state.is_alive() {
            Status::Serving
        } else {
            Status::Dead
        },
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
    pub counters: DaemonStats,
}

/// The counters of the device that `name` means.
///
/// # Errors
/// When there is no such device, or its daemon does not answer.
pub fn stats(states: &StateDir, name: &Path) -> Result<Counted, ControlError> {
    let state = find(states, name)?;
    let counters = daemon::stats(states, &state)?;
    Ok(Counted { state, counters })
}

/// Takes down the device that `name` means; see [`daemon::detach`].
///
/// # Errors
/// When there is no such device, or it is in use.
pub fn detach(states: &StateDir, name: &Path) -> Result<State, ControlError> {
    let state = find(states, name)?;
    daemon::detach(states, &state)?;
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
    for state in all.into_iter().filter(|state| !state.is_alive()) {
        match daemon::bury(states, &state) {
            Ok(()) => log::info!(
                "cleaned up after the dead daemon {} of {}",
                state.process.pid,
                state.name
            ),
            Err(ControlError::InUse { .. }) => {
                let users = users::of(&state.device);
                staying.push((state, users));
            }
            Err(error) => log::warn!("cannot clean up {}: {error}", state.name),
        }
    }
    Ok(staying)
}
