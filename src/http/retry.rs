//! How long to wait for servers, and when to ask again.

use std::time::{Duration, SystemTime};

use hyper::header::{DATE, HeaderMap, RETRY_AFTER};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::chance;
use super::error::{Error, Kind};
use super::span::Span;
use super::waits::{WORTH_SAYING, Wait};

/// Deadlines of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// For a name to resolve and for each address to accept, TLS included.
    pub connect: Duration,
    /// From a request on an open connection to the head of its answer.
    pub head: Duration,
    /// Between two pieces of a body.
    pub stall: Duration,
}

impl Timeouts {
    /// The same, none of them longer than `most`.
    #[must_use]
    pub fn at_most(self, most: Duration) -> Self {
        Self {
            connect: self.connect.min(most),
            head: self.head.min(most),
            stall: self.stall.min(most),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            head: Duration::from_secs(20),
            stall: Duration::from_secs(20),
        }
    }
}

/// How often to ask for the same again, and how long to wait before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// Requests in a row that a server may leave without an answer, or answer by being busy.
    pub tries: u32,
    /// Answers in a row that may be wrong.
    pub wrong: u32,
    /// Answers in a row that may be refusals.
    pub refused: u32,
    /// The first pause; doubles each time.
    pub first_pause: Duration,
    /// What it doubles up to.
    pub longest_pause: Duration,
    /// From when nothing came any more to the last try. A server that wishes to be left alone for longer is not waited for.
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            tries: 6,
            wrong: 6,
            refused: 1,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
            deadline: Duration::from_secs(60),
        }
    }
}

impl RetryPolicy {
    /// One try and no other: for what is optional.
    #[must_use]
    pub fn once() -> Self {
        Self {
            tries: 1,
            wrong: 1,
            ..Self::default()
        }
    }
}

/// How HTTP requests are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpOptions {
    /// Deadlines of each.
    pub timeouts: Timeouts,
    /// What follows a failure.
    pub retry: RetryPolicy,
    /// Whether servers outside may lead to addresses inside: see [`Reach`](super::Reach).
    #[serde(default)]
    pub private_redirects: bool,
}

/// Failures in a row of asking for one thing. In: each failure. Out: the pause before the next try, or that there is none. From
/// the first failure until something comes it is an entry of [`waiting`](super::waiting).
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: RetryPolicy,
    /// Failures by kind, since something came.
    unanswered: u32,
    wrong: u32,
    refused: u32,
    since: Option<Instant>,
    pause: Duration,
    wait: Option<Wait>,
    /// When it was begun, or something last came.
    began: Instant,
    /// Bytes that came since the last failure.
    came: u64,
}

impl Backoff {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self {
            policy,
            began: Instant::now(),
            came: 0,
            unanswered: 0,
            wrong: 0,
            refused: 0,
            since: None,
            pause: policy.first_pause,
            wait: None,
        }
    }

    /// Something came: whatever goes wrong next is another matter.
    pub(crate) fn succeeded(&mut self) {
        *self = Self::new(self.policy);
    }

    /// So many bytes came. A trickle that breaks off again and again is no success.
    pub(crate) fn came(&mut self, bytes: usize) {
        self.came = self.came.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        if self.came >= PROGRESS {
            self.succeeded();
        }
    }

    /// How long to wait before the next try: what the server wishes, or twice as long as before, give or take chance.
    ///
    /// # Errors
    /// `failure`, when there is to be no other try.
    pub(crate) fn pause_after(&mut self, failure: Error) -> Result<Duration, Error> {
        if failure.is_lasting() {
            return Err(failure.after(self.tries() + 1));
        }
        let (count, most) = match failure.kind() {
            Kind::Stale => return Ok(Duration::ZERO),
            Kind::Refused(_) => (&mut self.refused, self.policy.refused),
            Kind::WrongAnswer | Kind::Changed => (&mut self.wrong, self.policy.wrong),
            _ => (&mut self.unanswered, self.policy.tries),
        };
        *count = count.saturating_add(1);
        let exhausted = *count >= most;
        self.came = 0;
        let since = self.first_failure();
        let pause = jittered(self.pause).max(failure.retry_after().unwrap_or_default());
        if exhausted || since.elapsed().saturating_add(pause) > self.policy.deadline {
            return Err(failure.after(self.tries()));
        }
        self.pause = self.pause.saturating_mul(2).min(self.policy.longest_pause);
        Ok(pause)
    }

    /// Says of `place` that it is asked again after `pause` because of `why`.
    pub(crate) fn note(&mut self, place: &str, why: &str, pause: Duration) {
        let since = self.first_failure();
        let worth = if self.policy.tries == u32::MAX {
            WORTH_SAYING
        } else {
            FEW_TRIES
        };
        let wait = self
            .wait
            .get_or_insert_with(|| Wait::begin(place, why, since.into_std(), worth));
        wait.pause(place, why, pause);
    }

    /// Since when nothing has come. What a reader did with what came before is not laid at the server's door.
    fn first_failure(&mut self) -> Instant {
        let now = Instant::now();
        let began = now
            .checked_sub(LONGEST_TRY)
            .map_or(self.began, |try_began| self.began.max(try_began));
        *self.since.get_or_insert(began)
    }

    fn tries(&self) -> u32 {
        self.unanswered.saturating_add(self.wrong).saturating_add(self.refused)
    }

    /// Waits until it is time for the next try; on tokio's timer.
    ///
    /// # Errors
    /// `failure`, when there is to be no other try.
    pub(crate) async fn wait_after(&mut self, failure: Error) -> Result<(), Error> {
        let (place, why) = (failure.place().to_owned(), failure.why());
        let pause = self.pause_after(failure)?;
        if pause < LONG {
            log::debug!("{place}: {why}; asking again in {pause:.1?}");
        } else {
            log::warn!("{place}: {why}; asking again in {}", Span(pause));
        }
        self.note(&place, &why, pause);
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Between half and all of `pause`, so that many clients do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = u32::try_from(chance::number() & 0xFFFF).unwrap_or(0);
    pause / 2 + pause / 2 * random / 0xFFFF
}

/// A few tries whose pauses are short are over before this, one way or the other.
const FEW_TRIES: Duration = Duration::from_millis(3500);
/// So many bytes in a row are progress; fewer may be a trickle.
const PROGRESS: u64 = 8 << 10;
/// No try takes longer until it fails.
const LONGEST_TRY: Duration = Duration::from_secs(40);

/// Pauses from here on are said in the log; those between our own few tries are shorter.
const LONG: Duration = Duration::from_secs(2);

/// A `Retry-After` counts as no more than this, so that times do not overflow.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long an answer asks us to wait (RFC 9110, section 10.2.3): in seconds, or until a date. A date is measured from the `Date`
/// of the same answer, so that no two clocks have to agree; without one it says nothing.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| Some(headers.get(name)?.to_str().ok()?.trim());
    let wished = text(RETRY_AFTER)?;
    if !wished.is_empty() && wished.bytes().all(|byte| byte.is_ascii_digit()) {
        let seconds = wished.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(seconds).min(LONGEST_RETRY_AFTER));
    }
    let until = http_date(wished)?;
    let now = http_date(text(DATE)?)?;
    Some(until.duration_since(now).unwrap_or_default().min(LONGEST_RETRY_AFTER))
}

/// What the server's clock says, by the `Date` of an answer.
pub(crate) fn date(headers: &HeaderMap) -> Option<SystemTime> {
    http_date(headers.get(DATE)?.to_str().ok()?.trim())
}

/// A date in any of the three forms of RFC 9110, section 5.6.7.
fn http_date(text: &str) -> Option<SystemTime> {
    // The day of the week says nothing that the date does not, and servers get it wrong.
    let (_, fixed) = text.split_once(", ").or_else(|| text.split_once(' '))?;
    let forms = ["%d %b %Y %H:%M:%S GMT", "%d-%b-%y %H:%M:%S GMT", "%b %e %H:%M:%S %Y"];
    let date = forms
        .iter()
        .find_map(|form| DateTime::strptime(form, fixed.trim()).ok())?;
    Some(TimeZone::UTC.to_timestamp(date).ok()?.into())
}

#[cfg(test)]
mod tests {
    use hyper::StatusCode;
    use url::Url;

    use super::*;

    fn url() -> Url {
        Url::parse("http://host/x").unwrap()
    }

    fn lost() -> Error {
        Error::unreachable(&url(), "gone")
    }

    fn status(status: u16, after: Option<u64>) -> Error {
        let status = StatusCode::from_u16(status).unwrap();
        Error::status(&url(), status, None, after.map(Duration::from_secs))
    }

    #[test]
    fn pauses_double_with_jitter_and_end() {
        let mut backoff = Backoff::new(RetryPolicy {
            tries: u32::MAX,
            deadline: Duration::MAX,
            ..RetryPolicy::default()
        });
        for doubled in [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000_u64] {
            let pause = backoff.pause_after(lost()).unwrap();
            let doubled = Duration::from_millis(doubled);
            assert!(pause >= doubled / 2 && pause <= doubled, "{pause:?} {doubled:?}");
        }
        backoff.succeeded();
        assert!(backoff.pause_after(lost()).unwrap() <= Duration::from_millis(100));
        let pauses: std::collections::HashSet<_> = (0..20).map(|_| jittered(Duration::from_secs(1))).collect();
        assert!(pauses.len() > 1, "no two clients in step");
    }

    #[test]
    fn each_kind_has_its_own_count() {
        let policy = RetryPolicy {
            tries: 3,
            wrong: 2,
            refused: 2,
            ..RetryPolicy::default()
        };
        let wrong = || Error::wrong(&url(), "nonsense");
        let tries = |failures: &[Error]| {
            let mut backoff = Backoff::new(policy);
            failures
                .iter()
                .position(|failure| backoff.pause_after(failure.clone()).is_err())
        };
        assert_eq!(tries(&[lost(), lost(), lost()]), Some(2));
        assert_eq!(tries(&[lost(), wrong(), lost(), wrong()]), Some(3));
        assert_eq!(tries(&[status(503, None), lost(), status(429, None)]), Some(2));
        assert_eq!(tries(&[status(404, None), status(404, None)]), Some(1));
        assert_eq!(tries(&[lost().lasting()]), Some(0));
        assert_eq!(tries(&[Error::changed("x", "y")]), Some(0));
        let stale = || Error::stale(&url(), "closed");
        assert_eq!(tries(&[stale(), stale(), stale(), stale()]), None);
        let said = Backoff::new(RetryPolicy::once()).pause_after(lost()).unwrap_err();
        assert_eq!(said.to_string(), "http://host/x: gone");
    }

    #[test]
    fn a_trickle_that_breaks_off_is_no_success() {
        let policy = RetryPolicy {
            tries: 3,
            ..RetryPolicy::default()
        };
        let mut backoff = Backoff::new(policy);
        for _ in 0..2 {
            backoff.came(4000);
            assert!(backoff.pause_after(lost()).is_ok());
        }
        backoff.came(4000);
        assert!(backoff.pause_after(lost()).is_err());
        let mut backoff = Backoff::new(policy);
        for _ in 0..9 {
            (0..3).for_each(|_| backoff.came(4000));
            assert!(backoff.pause_after(lost()).is_ok());
        }
    }

    #[test]
    fn the_deadline_counts_from_when_nothing_came() {
        let mut backoff = Backoff::new(RetryPolicy {
            deadline: Duration::from_millis(50),
            first_pause: Duration::ZERO,
            ..RetryPolicy::default()
        });
        std::thread::sleep(Duration::from_millis(60));
        assert!(backoff.pause_after(lost()).is_err(), "the first try took all of it");
    }

    #[test]
    fn a_wish_is_kept_or_is_the_end() {
        let mut backoff = Backoff::new(RetryPolicy::default());
        assert_eq!(
            backoff.pause_after(status(429, Some(30))).unwrap(),
            Duration::from_secs(30)
        );
        // No hot loop, whatever the server wishes.
        assert!(backoff.pause_after(status(503, Some(0))).unwrap() >= Duration::from_millis(50));
        let error = backoff.pause_after(status(429, Some(3600))).unwrap_err().to_string();
        assert!(
            error.contains("429 Too Many Requests") && error.contains("60min"),
            "{error}"
        );
        let mut backoff = Backoff::new(RetryPolicy {
            deadline: Duration::MAX,
            ..RetryPolicy::default()
        });
        assert_eq!(
            backoff.pause_after(status(429, Some(3600))).unwrap(),
            Duration::from_secs(3600)
        );
    }

    #[test]
    fn spans_are_said_in_the_largest_unit_that_is_exact_enough() {
        let said = |seconds: f64| Span(Duration::from_secs_f64(seconds)).to_string();
        let all = [
            0.0,
            0.2,
            3.0,
            119.5,
            120.5,
            3600.0,
            7199.0,
            7200.0,
            100_000.0,
            31_536_000.0,
        ]
        .map(said);
        assert_eq!(
            all,
            ["0s", "1s", "3s", "2min", "3min", "60min", "120min", "2h", "28h", "365d"]
        );
    }

    #[test]
    fn retry_after_in_both_forms() {
        let date = ("date", "Thu, 15 Jan 2026 10:11:12 GMT");
        for (wished, date, seconds) in [
            ("7", None, Some(7)),
            (" 0 ", None, Some(0)),
            ("99999999999999999999999", None, Some(365 * 24 * 3600)),
            ("Thu, 15 Jan 2026 10:12:12 GMT", Some(date), Some(60)),
            ("Mon, 15 Jan 2026 10:12:12 GMT", Some(date), Some(60)),
            ("Thursday, 15-Jan-26 10:12:12 GMT", Some(date), Some(60)),
            ("Thu Jan 15 10:12:12 2026", Some(date), Some(60)),
            ("Mon Feb  2 10:11:12 2026", Some(date), Some(18 * 24 * 3600)),
            ("Thu, 15 Jan 2026 10:11:12 GMT", Some(date), Some(0)),
            ("Wed, 14 Jan 2026 10:11:12 GMT", Some(date), Some(0)),
            ("Wed, 21 Oct 2099 07:28:00 GMT", Some(date), Some(365 * 24 * 3600)),
            // Without the server's own clock, a date says nothing.
            ("Thu, 15 Jan 2026 10:12:12 GMT", None, None),
            ("Thu, 15 Jan 2026 10:12:12 GMT", Some(("date", "now")), None),
            ("-1", None, None),
            ("1.5", None, None),
            ("", None, None),
            ("soon", Some(date), None),
            ("Thu, 32 Jan 2026 10:12:12 GMT", Some(date), None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, wished.parse().unwrap());
            if let Some((name, value)) = date {
                headers.insert(name, value.parse().unwrap());
            }
            assert_eq!(retry_after(&headers), seconds.map(Duration::from_secs), "{wished:?}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
