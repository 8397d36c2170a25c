//! What a device has counted, over restarts of the service. In: its counters, again and again. Out: in the next service, the same to
//! count on from.
//!
//! They are in a file of the state directory, written at most once a second, so that a service that is killed takes a second of them
//! along. Latencies are not among them: their percentiles are those of the process that serves the device now.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::device::state::{self, State, StateDir, StateError};
use crate::device::stats::DeviceStats;
use crate::fetch::FetchStats;

/// How often they are written at most.
const PAUSE: Duration = Duration::from_secs(1);

/// No file is longer, in bytes.
const MAX_COUNTS_BYTES: u64 = 64 << 10;

/// What was counted of a device since it was attached, also by services before the present one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceStats {
    /// Of the device.
    pub device: DeviceStats,
    /// Of the fetcher.
    pub fetch: FetchStats,
    /// How long the device has been there, in milliseconds.
    pub up_ms: u64,
    /// Its process's resident memory in bytes.
    pub resident_bytes: u64,
}

/// Counters of a device, up to some moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Counts {
    /// Of which device, as its state has it: names are given out again.
    instance: u64,
    device: DeviceStats,
    fetch: FetchStats,
}

/// The counters of a device from before this process, and when all of them were last written.
#[derive(Debug)]
pub(super) struct CarriedCounts {
    before: Counts,
    /// How long the device was there before, in milliseconds.
    up_ms: u64,
    written: Mutex<(Instant, ServiceStats)>,
}

fn path(states: &StateDir, name: &str) -> PathBuf {
    states.path().join(format!("{name}.counts"))
}

/// Removes what is kept of the counters of device `name`.
pub(super) fn remove(states: &StateDir, name: &str) {
    let _ = fs::remove_file(path(states, name));
}

impl CarriedCounts {
    /// Of a device that begins with nothing.
    pub(super) fn none() -> Self {
        Self::new(Counts::default(), 0)
    }

    fn new(before: Counts, up_ms: u64) -> Self {
        Self {
            before,
            up_ms,
            written: Mutex::new((Instant::now(), ServiceStats::default())),
        }
    }

    /// Those that an earlier service left of the device of `state`. If it left none that can be read, counting begins anew.
    pub(super) fn of_earlier(states: &StateDir, state: &State) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let up = now.saturating_sub(Duration::from_secs(state.since));
        let up_ms = u64::try_from(up.as_millis()).unwrap_or(u64::MAX);
        let path = path(states, &state.name);
        let mut text = Vec::new();
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path);
        let read = file.and_then(|file| file.take(MAX_COUNTS_BYTES + 1).read_to_end(&mut text));
        let counts = match read {
            Ok(_) => state::parse_checked::<Counts>(&text, MAX_COUNTS_BYTES, &path),
            Err(cause) => Err(StateError::File { path, cause }),
        };
        let before = match counts {
            Ok(counts) if counts.instance == state.instance => counts,
            Ok(_) => Counts::default(),
            // It was killed before it wrote any.
            Err(StateError::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Counts::default(),
            Err(error) => {
                log::warn!("{}: counting begins anew: {error}", state.name);
                Counts::default()
            }
        };
        Self::new(before, up_ms)
    }

    /// What this process has counted and what there was before, together.
    pub(super) fn added_to(&self, mut counted: ServiceStats) -> ServiceStats {
        counted.device.carry(&self.before.device);
        counted.fetch.carry(&self.before.fetch);
        counted.up_ms = counted.up_ms.saturating_add(self.up_ms);
        counted
    }

    /// Whether it is time to [`write`](Self::write) them again.
    pub(super) fn are_due(&self) -> bool {
        self.written().0.elapsed() >= PAUSE
    }

    fn written(&self) -> MutexGuard<'_, (Instant, ServiceStats)> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `counted`, all of it, for the next service, unless nothing was counted since that was last done.
    pub(super) fn write(&self, states: &StateDir, state: &State, counted: &ServiceStats) {
        let mut written = self.written();
        written.0 = Instant::now();
        let last = &written.1;
        if (last.device.reads, last.fetch.bytes_fetched, last.fetch.errors)
            == (counted.device.reads, counted.fetch.bytes_fetched, counted.fetch.errors)
        {
            return;
        }
        let counts = Counts {
            instance: state.instance,
            device: counted.device.clone(),
            fetch: counted.fetch.only_counters(),
        };
        let text = serde_json::to_string(&counts).map_err(|error| StateError::File {
            path: path(states, &state.name),
            cause: error.into(),
        });
        if let Err(error) = text.and_then(|text| state::write_checked(&path(states, &state.name), text)) {
            log::debug!("{error}");
        }
        written.1 = counted.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Backend;
    use crate::device::state::{Process, Server};

    fn counted(reads: u64, fetched: u64) -> ServiceStats {
        let mut counted = ServiceStats {
            up_ms: 1000,
            ..ServiceStats::default()
        };
        counted.device.reads = reads;
        counted.device.bytes.fetched = fetched;
        counted.fetch.bytes_fetched = fetched;
        counted.fetch.in_flight = 3;
        counted.fetch.cache_trouble = Some("full".to_owned());
        counted
    }

    #[test]
    fn the_next_service_counts_on() {
        let dir = tempfile::tempdir().unwrap();
        let states = StateDir::new(dir.path());
        let state = State {
            name: "loop7".to_owned(),
            device: "/dev/loop7".into(),
            backend: Backend::Loop,
            number: 7,
            len: 4096,
            source: "x.tar".to_owned(),
            trust: Vec::new(),
            process: Process::unknown(),
            server: Server::Service,
            since: 100,
            instance: 7,
            disk: None,
            log: None,
        };
        let first = CarriedCounts::none();
        assert!(!first.are_due(), "just begun");
        first.write(&states, &state, &first.added_to(counted(7, 100)));
        let second = CarriedCounts::of_earlier(&states, &state);
        let all = second.added_to(counted(2, 30));
        assert_eq!((all.device.reads, all.device.bytes.fetched), (9, 130));
        assert_eq!(all.fetch.bytes_fetched, 130);
        assert!(all.up_ms > 10_000, "it has been there since 1970");
        assert_eq!(all.fetch.in_flight, 3, "that is now");
        second.write(&states, &state, &all);
        let third = CarriedCounts::of_earlier(&states, &state).added_to(ServiceStats::default());
        assert_eq!((third.device.reads, third.fetch.cache_trouble), (9, None));
        // Another device that has the number now, and a file that was damaged.
        let other = State {
            instance: 8,
            ..state.clone()
        };
        let none = |state| CarriedCounts::of_earlier(&states, state).added_to(ServiceStats::default());
        assert_eq!(none(&other).device.reads, 0);
        fs::write(path(&states, "loop7"), "{").unwrap();
        assert_eq!(none(&state).device.reads, 0);
        remove(&states, "loop7");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
