//! What this process waits for on the network right now. In: requests that failed and will be sent again, requests that are not
//! answered, and for whom each was made. Out: a list for progress, messages and statistics, of all of the process or of one
//! device: what, since when, why, and when it is asked again.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::span::Span;

/// What has been waited for this long is said; all that is shorter is how networks are.
pub(crate) const WORTH_SAYING: Duration = Duration::from_millis(1500);
/// A pause that long is said at once.
const LONG_PAUSE: Duration = Duration::from_millis(1900);
/// No pause is said to be longer, so that times do not overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Something that does not come, for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What it is for: a URL or a blob's name, without secrets.
    pub place: String,
    /// Why it has to wait: what went wrong last.
    pub why: String,
    /// Since when nothing of it came.
    pub since: Instant,
    /// When it is asked for again; none while a request is under way that is not answered yet.
    pub until: Option<Instant>,
}

impl Waiting {
    /// How long until it is asked for again; zero while a request is under way.
    #[must_use]
    pub fn left(&self) -> Duration {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        left.unwrap_or_default()
    }

    /// How long nothing of it has come.
    #[must_use]
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }
}

/// A wait, and when it is worth saying.
#[derive(Clone, Debug)]
struct Entry {
    number: u64,
    wait: Waiting,
    /// Shorter waits are not said ...
    worth: Duration,
    /// ... unless it is known that this one will be long.
    is_long: bool,
    owner: WaitOwner,
}

impl Entry {
    fn is_worth_saying(&self) -> bool {
        self.is_long || self.wait.lasted() >= self.worth
    }
}

/// `registry.example/x: the server says 429 Too Many Requests; waiting for 12s, asking again in 30s`.
impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; waiting", self.place, self.why)?;
        if self.lasted() >= WORTH_SAYING {
            write!(f, " for {}", Span(self.lasted()))?;
        }
        match self.left() {
            left if left.is_zero() => Ok(()),
            left => write!(f, ", asking again in {}", Span(left)),
        }
    }
}

/// For whom a task works, and who therefore waits when it waits: a device, or all those that have joined it because the task's
/// request brings something to them too. Clones are the same owner.
#[derive(Clone, Debug, Default)]
pub(crate) struct WaitOwner(Arc<Mutex<Vec<Joined>>>);

/// An owner that has joined another one, as often as this.
#[derive(Debug)]
struct Joined {
    owner: WaitOwner,
    times: usize,
}

tokio::task_local! {
    /// For whom the running task works.
    static WORKS_FOR: WaitOwner;
}

impl WaitOwner {
    /// For whom the running task works; an owner that no other knows if that was not said.
    pub(crate) fn current() -> Self {
        WORKS_FOR.try_with(Self::clone).unwrap_or_default()
    }

    /// Runs `future` for this owner: whatever it waits for, this one waits for, and those that have joined it.
    pub(crate) fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        WORKS_FOR.scope(self.clone(), future)
    }

    /// `other` waits for what this one waits for, from now until it has left as often as it has joined. `other` must not be one that
    /// this one has joined itself.
    pub(crate) fn join(&self, other: &Self) {
        let mut all = self.joined();
        match all.iter_mut().find(|joined| joined.owner.is(other)) {
            Some(joined) => joined.times += 1,
            None => all.push(Joined {
                owner: other.clone(),
                times: 1,
            }),
        }
    }

    /// The opposite of one [`join`](Self::join).
    pub(crate) fn leave(&self, other: &Self) {
        let mut all = self.joined();
        if let Some(at) = all.iter().position(|joined| joined.owner.is(other)) {
            all[at].times -= 1;
            if all[at].times == 0 {
                all.swap_remove(at);
            }
        }
    }

    /// Whether `other` waits when this one does.
    fn includes(&self, other: &Self) -> bool {
        self.is(other) || self.joined().iter().any(|joined| joined.owner.includes(other))
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn joined(&self) -> std::sync::MutexGuard<'_, Vec<Joined>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All waits of this process, and the last one's number.
static WAITS: Mutex<(u64, Vec<Entry>)> = Mutex::new((0, Vec::new()));

fn with<T>(change: impl FnOnce(&mut (u64, Vec<Entry>)) -> T) -> T {
    change(&mut WAITS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What this process waits for and has waited for long enough to be told of it, the same thing once. First what is asked again
/// last, and of what is under way what was begun first.
#[must_use]
pub fn waiting() -> Vec<Waiting> {
    in_order(|_| true)
}

/// Of [`waiting`] what `owner` waits for.
pub(crate) fn waiting_of(owner: &WaitOwner) -> Vec<Waiting> {
    in_order(|entry| entry.owner.includes(owner))
}

/// See [`waiting`], of those that are `meant`.
fn in_order(meant: impl Fn(&Entry) -> bool) -> Vec<Waiting> {
    let worth: Vec<Entry> = with(|(_, waits)| {
        let worth = waits.iter().filter(|entry| entry.is_worth_saying());
        worth.cloned().collect()
    });
    let meant = worth.into_iter().filter(meant);
    let mut all: Vec<Waiting> = meant.map(|entry| entry.wait).collect();
    all.sort_by_key(|wait| (std::cmp::Reverse(wait.left()), wait.since));
    let mut seen = HashSet::new();
    all.retain(|wait| seen.insert((wait.place.clone(), wait.why.clone())));
    all
}

/// An entry of [`waiting`], as long as it lives.
#[derive(Debug)]
pub(crate) struct Wait(u64);

impl Wait {
    /// Notes that nothing of `place` has come since `since`, because of `why`, for whomever the running task works; worth saying when
    /// it has lasted for `worth`.
    pub(crate) fn begin(place: &str, why: &str, since: Instant, worth: Duration) -> Self {
        let wait = Waiting {
            place: place.to_owned(),
            why: why.to_owned(),
            since,
            until: None,
        };
        let owner = WaitOwner::current();
        with(|(last, waits)| {
            *last += 1;
            waits.push(Entry {
                number: *last,
                wait,
                worth,
                is_long: false,
                owner: owner.clone(),
            });
            Self(*last)
        })
    }

    /// It went wrong, for the first time or again: it is asked for again after `pause`.
    pub(crate) fn pause(&self, place: &str, why: &str, pause: Duration) {
        with(|(_, waits)| {
            if let Some(Entry { wait, is_long, .. }) = waits.iter_mut().find(|entry| entry.number == self.0) {
                place.clone_into(&mut wait.place);
                why.clone_into(&mut wait.why);
                wait.until = Instant::now().checked_add(pause.min(LONGEST));
                *is_long = pause >= LONG_PAUSE;
            }
        });
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        with(|(_, waits)| waits.retain(|entry| entry.number != self.0));
    }
}

/// Waits for `future`, which is to bring something of `place`, on tokio's timer; after a moment it is an entry of [`waiting`].
pub(crate) async fn noting<F: Future>(place: impl FnOnce() -> String, why: &str, future: F) -> F::Output {
    noting_after(WORTH_SAYING, place, why, future).await
}

async fn noting_after<F: Future>(moment: Duration, place: impl FnOnce() -> String, why: &str, future: F) -> F::Output {
    let since = Instant::now();
    let mut future = pin!(future);
    if let Ok(output) = tokio::time::timeout(moment, future.as_mut()).await {
        return output;
    }
    let _wait = Wait::begin(&place(), why, since, moment);
    future.await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(place: &str) -> Vec<Waiting> {
        let mut all = waiting();
        all.retain(|wait| wait.place == place);
        all
    }

    #[test]
    fn what_takes_long_is_known_while_it_lasts() {
        let begin = |why, since| Wait::begin("a", why, since, WORTH_SAYING);
        let now = Instant::now();
        let long_ago = now.checked_sub(Duration::from_millis(12_500)).unwrap();
        let (long, again) = (begin("busy", now), begin("busy", now));
        long.pause("a", "busy", Duration::from_secs(30));
        again.pause("a", "busy", Duration::from_secs(10));
        let short = begin("slow", now);
        short.pause("a", "slow", Duration::from_millis(1));
        let other = begin("no answer", long_ago);
        let all = of("a");
        assert_eq!(all.len(), 2, "{all:?}");
        assert!(all[0].left() > Duration::from_secs(20), "{all:?}");
        assert_eq!(all[0].to_string(), "a: busy; waiting, asking again in 30s");
        assert_eq!(all[1].to_string(), "a: no answer; waiting for 13s");
        other.pause("a", "gone", Duration::from_secs(60));
        assert_eq!(of("a")[0].to_string(), "a: gone; waiting for 13s, asking again in 60s");
        drop((long, again, other, short));
        assert!(of("a").is_empty());
    }

    #[test]
    fn who_waits_is_whom_the_task_works_for_and_who_has_joined() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (first, second, third, server) = (
            WaitOwner::default(),
            WaitOwner::default(),
            WaitOwner::default(),
            WaitOwner::default(),
        );
        let waits = |owner: &WaitOwner| waiting_of(owner).len();
        runtime.block_on(server.scope(async {
            let wait = Wait::begin("c", "no connection yet", Instant::now(), Duration::ZERO);
            assert_eq!([&first, &second].map(waits), [0, 0]);
            // A request of the first device waits for the connection; the second waits for what the request brings, twice.
            let request = WaitOwner::default();
            request.join(&first);
            server.join(&request);
            request.join(&second);
            request.join(&second);
            assert_eq!([&first, &second, &third].map(waits), [1, 1, 0]);
            request.leave(&second);
            assert_eq!([&first, &second].map(waits), [1, 1]);
            request.leave(&second);
            assert_eq!([&first, &second].map(waits), [1, 0]);
            // A task for another owner, as those that registries are talked to by.
            let inner = second.scope(async { Wait::begin("d", "busy", Instant::now(), Duration::ZERO) });
            let inner = inner.await;
            assert_eq!([&first, &second].map(waits), [1, 1]);
            assert_eq!(waiting_of(&second)[0].place, "d");
            assert_eq!(of("c").len() + of("d").len(), 2, "all of them are the process's");
            server.leave(&request);
            drop(inner);
            assert_eq!([&first, &second].map(waits), [0, 0]);
            drop(wait);
        }));
        assert!(of("c").is_empty());
    }

    #[test]
    fn an_answer_that_does_not_come_is_known_after_a_moment() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let known = || with(|(_, waits)| waits.iter().filter(|entry| entry.wait.place == "b").count());
        let moment = Duration::from_millis(10);
        runtime.block_on(async {
            let name = || "b".to_owned();
            let quick = async { known() };
            assert_eq!(noting_after(moment, name, "no answer", quick).await, 0);
            let slow = async {
                tokio::time::sleep(moment * 3).await;
                known()
            };
            assert_eq!(noting_after(moment, name, "no answer", slow).await, 1);
            assert_eq!(known(), 0);
        });
    }
}
