//! Which device takes the service down. In: crashes, as the keepers see them, and which device the service was going on with. Out: whether
//! the next service goes on with one device after the other, and which ones it sets aside.
//!
//! A service that is killed is nobody's fault. One that crashes (by a signal that says so) [`MOST_CRASHES`] times within [`WHILE`] is most
//! likely taken down by what one of its devices does as soon as it is served again: the read that did it was not answered and comes again.
//! From then on devices are gone on with one after the other, each noted as the suspect for a while before the next; the one that is the
//! suspect at two crashes is set aside. All of this is forgotten when a command starts the service anew, maybe another version.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::device::state::{StateDir, parse_checked, write_checked};

/// So many crashes within [`WHILE`] are not chance.
pub(super) const MOST_CRASHES: usize = 3;

/// Crashes that are longer ago do not count.
const WHILE: Duration = Duration::from_secs(60);

/// How long a device is the suspect after it is gone on with; twice as long after each further crash that was nobody's.
const PROBATION: Duration = Duration::from_millis(300);
const LONGEST_PROBATION: Duration = Duration::from_secs(5);

/// No file of this is longer, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What is known of crashes, in a file of the state directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Blame {
    /// When services crashed, in seconds since 1970 UTC; the latest last.
    crashes: Vec<u64>,
    /// The device that the present service, or the last one, goes on with alone.
    suspect: Option<String>,
    /// Those that were the suspect at a crash.
    suspected: Vec<String>,
    /// Those that were found out.
    set_aside: Vec<String>,
}

fn path(states: &StateDir) -> PathBuf {
    states.path().join("blame")
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs())
}

/// Whether a process ended by its own fault: by a signal that the kernel, or it itself, sends for that.
pub(super) fn is_crash(status: ExitStatus) -> bool {
    matches!(
        status.signal(),
        Some(libc::SIGABRT | libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGSYS | libc::SIGTRAP)
    )
}

impl Blame {
    /// What is known; nothing if that cannot be read.
    pub(super) fn read(states: &StateDir) -> Self {
        let path = path(states);
        let mut text = Vec::new();
        let read = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut text));
        match read {
            Ok(_) => parse_checked(&text, MAX_BYTES, &path).unwrap_or_default(),
            Err(_) => Self::default(),
        }
    }

    fn write(&self, states: &StateDir) {
        let written = serde_json::to_string(self).map(|text| write_checked(&path(states), text));
        if let Ok(Err(error)) = written {
            log::warn!("{error}");
        }
    }

    /// Nothing is known any more.
    pub(super) fn forget(states: &StateDir) {
        let _ = fs::remove_file(path(states));
    }

    /// Notes that the service crashed; who was the suspect for the second time is set aside.
    pub(super) fn note_crash(states: &StateDir) {
        let mut blame = Self::read(states);
        blame.crash(now());
        blame.write(states);
    }

    fn crash(&mut self, now: u64) {
        self.crashes.push(now);
        self.crashes.retain(|at| at.saturating_add(WHILE.as_secs()) > now);
        let Some(name) = self.suspect.take() else { return };
        if self.suspected.contains(&name) {
            // The others are gone on with at once: it may have been all.
            self.set_aside.push(name);
            self.suspected.clear();
            self.crashes.clear();
        } else {
            self.suspected.push(name);
        }
    }

    /// Notes that `name` is gone on with alone, or that none is.
    pub(super) fn suspect(states: &StateDir, name: Option<&str>) {
        let mut blame = Self::read(states);
        blame.suspect = name.map(str::to_owned);
        blame.write(states);
    }

    /// Whether a device was found to take the service down.
    pub(super) fn is_set_aside(&self, name: &str) -> bool {
        self.set_aside.iter().any(|aside| aside == name)
    }

    /// Forgets a device that is gone; its name is another one's next.
    pub(super) fn clear(states: &StateDir, name: &str) {
        let mut blame = Self::read(states);
        if blame.is_set_aside(name) {
            blame.set_aside.retain(|aside| aside != name);
            blame.write(states);
        }
    }

    /// How long each device is to be the suspect; none if all may be gone on with at once.
    pub(super) fn probation(&self) -> Option<Duration> {
        let now = now();
        let recent = self
            .crashes
            .iter()
            .filter(|at| at.saturating_add(WHILE.as_secs()) > now);
        let further = u32::try_from(recent.count().checked_sub(MOST_CRASHES)?).unwrap_or(u32::MAX);
        Some(
            PROBATION
                .saturating_mul(2u32.saturating_pow(further))
                .min(LONGEST_PROBATION),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_the_suspect_at_a_crash_is_set_aside() {
        let mut blame = Blame::default();
        let start = now();
        for second in 0..2 {
            blame.crash(start + second);
            assert_eq!(blame.probation(), None);
        }
        blame.crash(start + 2);
        assert_eq!(blame.probation(), Some(PROBATION));
        blame.crash(start + 3);
        assert_eq!(blame.probation(), Some(2 * PROBATION));
        for name in ["loop1", "loop0", "loop1"] {
            assert!(!blame.is_set_aside("loop1"));
            blame.suspect = Some(name.to_owned());
            blame.crash(start + 4);
        }
        assert!(blame.is_set_aside("loop1") && !blame.is_set_aside("loop0"));
        assert_eq!(blame.probation(), None, "the others are gone on with at once");
        // What was long ago does not count.
        let mut blame = Blame::default();
        for minute in 0..5 {
            blame.crash(start + 60 * minute);
        }
        assert_eq!(blame.crashes.len(), 1);
    }

    #[test]
    fn only_faults_are_crashes() {
        let ended = |script: &str| std::process::Command::new("sh").args(["-c", script]).status().unwrap();
        for (script, expected) in [
            ("kill -KILL $$", false),
            ("kill -TERM $$", false),
            ("exit 1", false),
            ("ulimit -c 0; kill -ABRT $$", true),
            ("ulimit -c 0; kill -SEGV $$", true),
        ] {
            assert_eq!(is_crash(ended(script)), expected, "{script}");
        }
    }
}
