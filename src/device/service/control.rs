//! The language of control sockets: one message each way, bounded in length and time. Here is what is said; `client` asks and `run`
//! answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::counts::ServiceStats;
use super::{Attached, ServeSpec, held};
use crate::device::DeviceError;
use crate::device::state::{State, StateError};
use crate::device::trace::Trace;
use crate::fetch::FetchStats;

/// No request is longer, in bytes: what is big in a specification (an index) is passed as a file.
pub(super) const MAX_REQUEST_BYTES: u64 = 16 << 20;

/// A client that says nothing for this long is hung up on.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// How a request travels: as text inside, so that one of another version is told from a damaged one.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Call {
    /// The program's version.
    pub(super) version: String,
    /// A [`Request`] as JSON.
    pub(super) request: String,
}

/// One device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    pub(super) name: String,
    /// Which of those that had the name, as [`State::instance`]; 0: whichever has it now.
    #[serde(default, skip_serializing_if = "is_unknown")]
    pub(super) instance: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
const fn is_unknown(instance: &u64) -> bool {
    *instance == 0
}

impl Named {
    pub(super) fn of(state: &State) -> Self {
        Self {
            name: state.name.clone(),
            instance: state.instance,
        }
    }
}

/// What a client asks for. `I` describes an image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request<I> {
    /// A device of this; the files that the description names are sent along, opened, and come in its order.
    Attach(Box<ServeSpec<I>>),
    /// The counters of a device.
    Stats(Named),
    /// What was read of a device while it started.
    Trace(Named),
    /// Whether all is well, of every device.
    Conditions,
    /// Take a device down.
    Detach(Named),
    /// Take it down as soon as nothing uses it any more.
    LetGo(Named),
    /// Stay, also without devices, and tell metrics on the listening socket that may be sent along, until the caller hangs up.
    Stay,
    /// Have the caller hold what the keepers hold, and ask it as they are asked, until it hangs up.
    Store,
    /// End, and let a service that the caller starts go on with all devices.
    HandOver,
}

/// What the service answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// To [`Request::Attach`].
    Attached(Box<Attached>),
    /// To [`Request::Stats`].
    Stats(Box<ServiceStats>),
    /// To [`Request::Trace`].
    Trace(Box<Trace>),
    /// To [`Request::Conditions`].
    Conditions(BTreeMap<String, Condition>),
    /// To [`Request::Attach`]: it would write to a directory that this service may not write to, which are all but these.
    Confined(Vec<PathBuf>),
    /// It is done.
    Done,
    /// To anything: it cannot be done.
    Refused(String),
}

/// How a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "condition")]
pub enum Condition {
    /// Its reads are answered.
    Serving,
    /// Some wait for the network.
    Waiting {
        /// For what.
        why: String,
        /// Since when, in milliseconds; 0 from a service that does not say.
        #[serde(default)]
        waited_ms: u64,
        /// Until the next try, in milliseconds; 0 while a request is under way.
        left_ms: u64,
    },
    /// Its reads are answered, but not all is as it should be.
    Degraded {
        /// What is wrong.
        why: String,
    },
    /// It was set aside: its reads fail.
    Poisoned {
        /// Why.
        why: String,
    },
}

impl Condition {
    /// How a device is whose fetcher says this. What is worst is said.
    pub(crate) fn of(fetch: &FetchStats) -> Self {
        if let Some(why) = fetch.poisoned.clone() {
            return Self::Poisoned { why };
        }
        if let Some(wait) = fetch.waiting.first() {
            return Self::Waiting {
                why: format!("{}: {}", wait.place, wait.why),
                waited_ms: wait.waited_ms,
                left_ms: wait.left_ms,
            };
        }
        match fetch.cache_trouble.clone() {
            Some(why) => Self::Degraded {
                why: format!("the disk cache takes nothing: {why}"),
            },
            None => Self::Serving,
        }
    }

    /// Its name, as lists and metrics have it.
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Waiting { .. } => "waiting",
            Self::Degraded { .. } => "degraded",
            Self::Poisoned { .. } => "poisoned",
        }
    }
}

/// Why a daemon could not be asked or would not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No device of ours has this name.
    #[error("{0} is not attached by tarblk; `tarblk ps` lists what is")]
    Unknown(String),
    /// A state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The daemon does not answer as it should.
    #[error("the service of {name} (pid {pid}) does not answer: {cause}")]
    Silent {
        /// The device.
        name: String,
        /// Its daemon.
        pid: u32,
        /// What happened instead.
        cause: String,
    },
    /// The daemon is gone.
    #[error("the service of {name} (pid {pid}) is dead; `tarblk {cleans_up}` cleans up")]
    Dead {
        /// The device.
        name: String,
        /// The daemon it had.
        pid: u32,
        /// The command that removes what it left: `umount DIR` while it is mounted, else `detach NAME`.
        cleans_up: String,
    },
    /// The device is in use.
    #[error("{device} is in use: {users}; unmount it first")]
    InUse {
        /// The device.
        device: PathBuf,
        /// By whom.
        users: String,
    },
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
    /// The kernel would not let go of a dead daemon's device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Begins the refusal of a service that is about to end.
pub(super) const ENDING: &str = "the service is ending";

/// Understands a request.
///
/// # Errors
/// One sentence for the person, which names the versions if they differ.
pub(super) fn parse<I: DeserializeOwned>(call: &Call) -> Result<Request<I>, String> {
    let other = call.version != held::version();
    match serde_json::from_str(&call.request) {
        Ok(Request::Attach(_)) | Err(_) if other => Err(other_version(&call.version)),
        Ok(request) => Ok(request),
        Err(error) => Err(error.to_string()),
    }
}

fn other_version(theirs: &str) -> String {
    format!(
        "the service is tarblk {} and this command is {theirs}; `tarblk upgrade` makes them one",
        held::version()
    )
}
