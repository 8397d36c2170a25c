//! Why a request brought nothing, or the wrong thing.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use url::Url;

use super::redact::shown_url;
use super::span::Span;
use crate::excerpt;

/// What a failed request means for the next try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// No connection, no answer in time, or an answer that broke off.
    Unreachable,
    /// Something answered, and not in HTTP: it closed the connection or sent what cannot be read.
    NotHttp,
    /// A connection kept from an earlier request had ended unseen. Says nothing about the server.
    Stale,
    /// The server is overloaded or broken: 408, 425, 429 or 5xx.
    Busy(StatusCode),
    /// The server will not give it: any other 4xx.
    Refused(StatusCode),
    /// The answer does not fit the question.
    WrongAnswer,
    /// What is there now is another blob than the one that was there before.
    Changed,
    /// TLS, a client or a runtime cannot be set up on this machine.
    Setup,
}

/// What a failure's message names.
pub trait Shown {
    /// Without secrets.
    fn shown(&self) -> String;
}

impl Shown for Url {
    fn shown(&self) -> String {
        shown_url(self)
    }
}

impl Shown for str {
    /// A name that holds no secrets.
    fn shown(&self) -> String {
        self.to_owned()
    }
}

/// A failed request. Its message is one line with the URL (without secrets), what happened, and what to do about it.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Kind,
    /// The redacted URL; for [`Kind::Setup`] what is set up.
    place: String,
    why: String,
    /// What to do, with a separator in front, or nothing.
    advice: &'static str,
    /// Whether another try gives the same, whatever the kind says.
    lasting: bool,
    retry_after: Option<Duration>,
    tries: u32,
    cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Both may have a server's text in them.
    fn new(kind: Kind, place: &str, why: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            place: excerpt::of_sentence(place),
            why: excerpt::of_sentence(&why.into()),
            advice: "",
            lasting: false,
            retry_after: None,
            tries: 1,
            cause: None,
        }))
    }

    /// Nothing came from `url`, or not all; it may come yet.
    #[must_use]
    pub fn unreachable(url: &Url, why: impl Into<String>) -> Self {
        Self::new(Kind::Unreachable, &shown_url(url), why)
    }

    /// What answers at `url` does not speak HTTP, or not to its end.
    #[must_use]
    pub fn not_http(url: &Url, why: impl Into<String>) -> Self {
        Self::new(Kind::NotHttp, &shown_url(url), why)
    }

    /// An answer of `url` that contradicts the question. One bad machine behind a balancer can send it, so it may be asked
    /// again.
    #[must_use]
    pub fn wrong(url: &(impl Shown + ?Sized), why: impl Into<String>) -> Self {
        Self::new(Kind::WrongAnswer, &url.shown(), why)
    }

    /// A failure of a kept connection to `url` that is to be repeated on another at once.
    #[must_use]
    pub fn stale(url: &Url, why: impl Into<String>) -> Self {
        Self::new(Kind::Stale, &shown_url(url), why)
    }

    /// The blob `name` is another one now, which no other try will change; `how` says what differs.
    #[must_use]
    pub fn changed(name: impl Into<String>, how: impl Into<String>) -> Self {
        Self::new(Kind::Changed, &name.into(), how).lasting()
    }

    /// The blob `name` seems to be another one, by a sign that a machine on the way may have made up: a length alone. `how` says
    /// what differs.
    #[must_use]
    pub fn seems_changed(name: impl Into<String>, how: impl Into<String>) -> Self {
        Self::new(Kind::Changed, &name.into(), how)
    }

    /// An answer of `url` that brings no bytes: [`Kind::Busy`] or [`Kind::Refused`] by its status. `said` is what the server
    /// gives as a reason, in one line.
    #[must_use]
    pub fn status(
        url: &(impl Shown + ?Sized),
        status: StatusCode,
        said: Option<&str>,
        retry_after: Option<Duration>,
    ) -> Self {
        let kind = if busy(status) {
            Kind::Busy(status)
        } else {
            Kind::Refused(status)
        };
        let why = said.map_or_else(|| status.to_string(), |said| format!("{status}: {said}"));
        let mut error = Self::new(kind, &url.shown(), why);
        error.0.retry_after = retry_after;
        error
    }

    /// The blob `name` is refused by its servers; `cause` is what they say, in one line.
    #[must_use]
    pub fn refused(name: &str, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        let why = cause.to_string();
        Self::new(Kind::Refused(StatusCode::FORBIDDEN), name, why).caused_by(cause)
    }

    /// `what` cannot be set up here.
    #[must_use]
    pub fn setup(what: &str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        let mut error = Self::new(Kind::Setup, what, cause.to_string());
        error.0.cause = Some(Arc::from(cause));
        error
    }

    /// The same with its cause, whose text is already part of the message.
    #[must_use]
    pub fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.cause = Some(Arc::new(cause));
        self
    }

    /// The same with what to do about it; begins with its separator (`; try again`).
    #[must_use]
    pub fn advising(mut self, advice: &'static str) -> Self {
        self.0.advice = advice;
        self
    }

    /// The same, and no other try will change it.
    #[must_use]
    pub fn lasting(mut self) -> Self {
        self.0.lasting = true;
        self
    }

    /// The same, and another try may change it: for whoever can wait for longer than a person.
    #[must_use]
    pub fn passing(mut self) -> Self {
        self.0.lasting = false;
        self
    }

    /// The same of `place`: for what has a better name than its URL.
    #[must_use]
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.0.place = excerpt::of_sentence(&place.into());
        self
    }

    /// The same, after so many tries.
    #[must_use]
    pub fn after(mut self, tries: u32) -> Self {
        self.0.tries = tries;
        self
    }

    /// What it means.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The URL without secrets; for [`Kind::Setup`] what was set up.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.0.place
    }

    /// What happened, without the URL.
    #[must_use]
    pub fn why(&self) -> String {
        match self.0.kind {
            Kind::Busy(_) => match self.0.retry_after.filter(|wish| !wish.is_zero()) {
                Some(wish) => format!(
                    "the server says {}, and not to ask again for {}{}",
                    self.0.why,
                    Span(wish),
                    self.0.advice
                ),
                None => format!("the server says {}{}", self.0.why, self.0.advice),
            },
            Kind::Refused(_) => format!("the server says {}{}", self.0.why, self.0.advice),
            Kind::WrongAnswer => format!(
                "the server sent something else than was asked for: {}{}",
                self.0.why, self.0.advice
            ),
            _ => format!("{}{}", self.0.why, self.0.advice),
        }
    }

    /// The status, where one is at fault.
    #[must_use]
    pub fn status_code(&self) -> Option<StatusCode> {
        match self.0.kind {
            Kind::Busy(status) | Kind::Refused(status) => Some(status),
            _ => None,
        }
    }

    /// Whether a server said that what was asked for is not there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        matches!(self.0.kind, Kind::Refused(StatusCode::NOT_FOUND | StatusCode::GONE))
    }

    /// Whether no other try can change it, whatever its kind.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        self.0.lasting || self.0.kind == Kind::Setup
    }

    /// Whether another try of one server with unchanged credentials may succeed.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        !self.is_lasting() && !matches!(self.0.kind, Kind::Refused(_))
    }

    /// How long the server wishes to be left alone.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }
}

/// Whether a status says that the same request may succeed later. 501 and 505 are 5xx that will not.
pub(crate) fn busy(status: StatusCode) -> bool {
    match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => true,
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => false,
        status => status.is_server_error(),
    }
}

/// The text of an error's innermost cause, which says most; none of an error without causes.
pub(crate) fn innermost(error: &dyn std::error::Error) -> Option<String> {
    let mut last = error.source()?;
    while let Some(inner) = last.source() {
        last = inner;
    }
    Some(last.to_string())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            kind,
            place,
            why,
            advice,
            tries,
            ..
        } = &*self.0;
        match kind {
            Kind::Setup => return write!(f, "cannot set up {place}: {why}"),
            Kind::Changed => {
                return write!(
                    f,
                    "{place}: the layer changed on the server while it was read ({why}); try again"
                );
            }
            _ => write!(f, "{place}: {}", self.why())?,
        }
        // Advice ends a sentence: how often it was tried is said of what can be waited for, which has none.
        if *tries > 1 && advice.is_empty() {
            write!(f, " (after {tries} tries)")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, {self})", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let cause = self.0.cause.as_deref()?;
        Some(cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_sorted_by_what_another_try_gives() {
        for (status, passes) in [
            (408, true),
            (425, true),
            (429, true),
            (500, true),
            (502, true),
            (503, true),
            (504, true),
            (501, false),
            (505, false),
            (400, false),
            (401, false),
            (403, false),
            (404, false),
            (410, false),
            (416, false),
        ] {
            let url = Url::parse("http://me:word@host/x?sig=secret").unwrap();
            let error = Error::status(&url, StatusCode::from_u16(status).unwrap(), None, None);
            assert_eq!(error.may_pass(), passes, "{error}");
            assert_eq!(error.is_absence(), matches!(status, 404 | 410));
            let said = format!("{error} {error:?}");
            assert!(!said.contains("secret") && !said.contains("word@"), "{said}");
        }
    }

    #[test]
    fn causes_are_kept_and_not_said_twice() {
        let url = Url::parse("http://host/x").unwrap();
        let cause = std::io::Error::other("no route");
        let error = Error::unreachable(&url, "cannot connect: no route").caused_by(cause);
        assert_eq!(error.to_string(), "http://host/x: cannot connect: no route");
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "no route");
        assert!(error.may_pass() && !error.clone().lasting().may_pass());
        assert_eq!(
            error.after(3).to_string(),
            "http://host/x: cannot connect: no route (after 3 tries)"
        );
    }
}
