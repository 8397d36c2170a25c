//! How many files and connections this process may have open (`ulimit -n`). In: what a fetcher is going to need. Out: a limit that
//! is as high as the system lets it be, or an error before anything depends on it.
//!
//! Running out later is no error: what cannot be opened now is tried again, because another request may end.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::StartError;

/// For the device, the log, sockets, rings and what libraries open for a moment.
const SPARE: u64 = 24;
/// A layer's own file, its file in the cache, to be read and to be written, the map of that, and its index.
const OF_A_LAYER: u64 = 5;

/// Raises the limit as far as it may be, which takes no privilege, and returns it. Called at a daemon's start, and by each
/// fetcher's.
#[allow(clippy::must_use_candidate, reason = "what is wanted may be just that it is raised")]
pub fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        log::debug!("cannot raise the limit on open files: {error}");
        return limit.current.unwrap_or(u64::MAX);
    }
    limit.maximum.unwrap_or(u64::MAX)
}

/// Makes sure that `layers` layers can be fetched over up to `connections` connections.
///
/// # Errors
/// [`StartError::Descriptors`] with the limit and what is needed.
pub(super) fn check(layers: usize, connections: usize) -> Result<(), StartError> {
    let limit = raise();
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |open| len(open.count()));
    let needs = open + SPARE + len(layers) * OF_A_LAYER + len(connections);
    if needs <= limit {
        return Ok(());
    }
    Err(StartError::Descriptors { limit, needs })
}

fn len(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
