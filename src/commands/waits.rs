//! Says what a command waits for on the network, with or without a terminal. In: what the HTTP clients wait for. Out: one line on
//! standard error when that begins to be long, and again while it lasts.

use std::collections::HashMap;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::output::Talk;
use crate::http::{self, Waiting};

/// How often it is looked what is waited for.
const GLANCE: Duration = Duration::from_millis(200);
/// How long between two lines, whatever they are of.
const BETWEEN: Duration = Duration::from_secs(2);
/// How long before something is said again.
const AGAIN: Duration = Duration::from_secs(10);
/// A pause that is as long is said by the log when it begins.
const IN_THE_LOG: Duration = Duration::from_millis(1700);

/// Speaks as long as it lives.
#[derive(Debug)]
pub(super) struct WaitTeller {
    /// Closed when it is to end.
    going_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl WaitTeller {
    /// Begins, unless nothing is to be said. `bar` is what is drawn meanwhile, once it is.
    pub(super) fn start(talk: Talk, bar: Arc<OnceLock<ProgressBar>>) -> Self {
        let (going_on, until) = mpsc::channel();
        let speak = move || {
            let mut telling = Telling::default();
            while until.recv_timeout(GLANCE) == Err(RecvTimeoutError::Timeout) {
                if let Some(line) = telling.next(&http::waiting(), Instant::now()) {
                    let say = || talk.note(format_args!("tarblk: {line}"));
                    bar.get().map_or_else(say, |bar| bar.suspend(say));
                }
            }
        };
        // Without a thread nothing is said, and all else is as it is.
        let thread = (!talk.quiet).then(|| thread::Builder::new().name("tarblk-waits".to_owned()).spawn(speak).ok());
        Self {
            going_on: Some(going_on),
            thread: thread.flatten(),
        }
    }
}

impl Drop for WaitTeller {
    fn drop(&mut self) {
        self.going_on = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What was said and when.
#[derive(Debug, Default)]
struct Telling {
    told: HashMap<String, Instant>,
    last: Option<Instant>,
}

impl Telling {
    /// What is worth saying now.
    fn next(&mut self, waiting: &[Waiting], now: Instant) -> Option<String> {
        let recently = |at: &Instant, span| now.saturating_duration_since(*at) < span;
        for wait in waiting {
            if !self.told.contains_key(&wait.place) && wait.left() >= IN_THE_LOG {
                self.told.insert(wait.place.clone(), now);
            }
        }
        if self.last.is_some_and(|last| recently(&last, BETWEEN)) {
            return None;
        }
        let wait = waiting
            .iter()
            .find(|wait| !self.told.get(&wait.place).is_some_and(|at| recently(at, AGAIN)))?;
        self.told.insert(wait.place.clone(), now);
        self.last = Some(now);
        Some(wait.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_said_once_and_again_when_it_lasts() {
        let began = Instant::now();
        let at = |secs| began + Duration::from_secs(secs);
        let wait = |place: &str, left: Option<u64>| Waiting {
            place: place.to_owned(),
            why: "no answer".to_owned(),
            since: began,
            until: left.map(|left| Instant::now() + Duration::from_secs(left)),
        };
        let mut telling = Telling::default();
        assert_eq!(telling.next(&[], at(1)), None);
        let both = [wait("a", None), wait("b", None)];
        let said: Vec<_> = (2..20)
            .filter_map(|second| Some((second, telling.next(&both, at(second))?)))
            .map(|(second, line)| (second, line.chars().next().unwrap()))
            .collect();
        assert_eq!(said, [(2, 'a'), (4, 'b'), (12, 'a'), (14, 'b')]);
        // What the log has said is not said at once again.
        assert_eq!(telling.next(&[wait("c", Some(30))], at(30)), None);
        assert!(telling.next(&[wait("c", Some(20))], at(40)).is_some());
    }
}
