//! How long to wait for servers, and what it means when they fail.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::source::{SourceError, shown_url};

/// How long to wait, and how often to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// For an answer to begin, and between two pieces of one.
    pub stall: Duration,
    /// How often the same position is tried before giving up.
    pub tries: u32,
    /// The first pause between tries; doubles each time.
    pub backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(20),
            tries: 6,
            backoff: Duration::from_millis(100),
        }
    }
}

/// The longest pause between tries, also when a server asks for more (`Retry-After`).
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Patience {
    /// The pause before try number `tries` (the first retry is 1): doubling, or what the server wishes.
    pub(in crate::source) fn pause(&self, tries: u32, wished: Option<Duration>) -> Duration {
        let doubled = self.backoff.saturating_mul(1 << tries.saturating_sub(1).min(10));
        doubled.max(wished.unwrap_or_default()).min(LONGEST_PAUSE)
    }
}

/// A failed request.
#[derive(Debug)]
pub(in crate::source) struct Failure {
    /// What to tell the person if it ends here.
    pub(in crate::source) error: SourceError,
    /// Whether another try may succeed.
    pub(in crate::source) passing: bool,
    /// Whether what answered does not speak HTTP, at least not here.
    pub(in crate::source) not_http: bool,
    /// How long the server wishes to be left alone.
    wait: Option<Duration>,
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self::lasting(error)
    }
}

impl Failure {
    pub(in crate::source) fn after(mut self, wait: Option<Duration>) -> Self {
        self.wait = wait;
        self
    }

    pub(in crate::source) fn passing(url: &Url, why: impl Into<String>) -> Self {
        let error = SourceError::Unreachable {
            url: shown_url(url),
            why: why.into(),
            tries: 1,
        };
        Self {
            error,
            passing: true,
            not_http: false,
            wait: None,
        }
    }

    pub(in crate::source) fn lasting(error: SourceError) -> Self {
        Self {
            error,
            passing: false,
            not_http: false,
            wait: None,
        }
    }

    /// An answer that contradicts the question. One bad machine behind a balancer can send it, so it is tried again.
    pub(in crate::source) fn wrong(url: &Url, why: impl Into<String>) -> Self {
        let error = SourceError::WrongAnswer {
            url: shown_url(url),
            why: why.into(),
        };
        Self {
            error,
            passing: true,
            not_http: false,
            wait: None,
        }
    }
}

/// Counts failures since the last success, and pauses between tries.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::source) struct Tries(u32);

impl Tries {
    /// Waits before the next try, or gives up.
    pub(in crate::source) async fn failed(&mut self, failure: Failure, patience: &Patience) -> Result<(), SourceError> {
        self.0 += 1;
        if !failure.passing || self.0 >= patience.tries {
            return Err(match failure.error {
                SourceError::Unreachable { url, why, .. } => SourceError::Unreachable {
                    url,
                    why,
                    tries: self.0,
                },
                other => other,
            });
        }
        let pause = patience.pause(self.0, failure.wait);
        log::debug!("try {} in {pause:?}: {}", self.0 + 1, failure.error);
        tokio::time::sleep(pause).await;
        Ok(())
    }

    pub(in crate::source) fn succeeded(&mut self) {
        self.0 = 0;
    }
}

pub(in crate::source) fn classify(url: &Url, error: &reqwest::Error) -> Failure {
    let why = cause(error);
    if error.is_redirect() || error.is_builder() {
        return Failure::lasting(SourceError::WrongAnswer {
            url: shown_url(url),
            why,
        });
    }
    // What rustls says of an answer that is no TLS.
    let not_tls = url.scheme() == "https" && why.contains("InvalidContentType");
    let why = if not_tls {
        "cannot connect: the server does not speak TLS there; try http:// (--plain-http for a registry)".to_owned()
    } else if error.is_connect() {
        format!("cannot connect: {why}; is the address right, and the server up?")
    } else {
        why
    };
    let mut failure = Failure::passing(url, why.as_str());
    // Neither that nor what certificates say changes by trying again.
    failure.passing = !not_tls && !why.contains("certificate");
    failure.not_http = !error.is_connect() && !error.is_timeout();
    failure
}

/// What an answer means that brings no bytes.
pub(super) fn refused(url: &Url, response: &Response) -> Failure {
    let status = response.status();
    let passing = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY
        );
    if passing {
        let seconds = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let wait = seconds.map(Duration::from_secs);
        return Failure {
            wait,
            ..Failure::passing(url, format!("the server says {status}"))
        };
    }
    let advice = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "; check the address",
        StatusCode::UNAUTHORIZED => "; put user:password@ in front of the host name if you have them",
        StatusCode::FORBIDDEN => "; you may not read it, or the signature in the address has expired",
        StatusCode::RANGE_NOT_SATISFIABLE => "; the layer is shorter than it was: try again",
        _ => "",
    };
    Failure::lasting(SourceError::Status {
        url: shown_url(url),
        status: status.to_string(),
        advice,
    })
}

/// The innermost cause of an error, which says most. reqwest's own message is left out: it holds the URL with its secrets.
pub(in crate::source) fn cause(error: &reqwest::Error) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut last = None;
    while let Some(error) = cause {
        last = Some(error.to_string());
        cause = error.source();
    }
    match last {
        Some(text) => text,
        None if error.is_timeout() => "timed out".to_owned(),
        None if error.is_redirect() => "too many redirects".to_owned(),
        None => "the request failed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end() {
        let patience = Patience::default();
        assert_eq!(patience.pause(1, None), Duration::from_millis(100));
        assert_eq!(patience.pause(3, None), Duration::from_millis(400));
        assert_eq!(patience.pause(99, None), LONGEST_PAUSE);
        assert_eq!(patience.pause(1, Some(Duration::from_secs(3))), Duration::from_secs(3));
        assert_eq!(patience.pause(1, Some(Duration::from_secs(3600))), LONGEST_PAUSE);
    }
}
