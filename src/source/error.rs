//! Why a layer cannot be had.

use std::path::PathBuf;

use url::Url;

use crate::excerpt;
use crate::http::{self, Backoff, Kind};

/// Why a layer cannot be opened or walked. No variant holds a password or a query string.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The name makes no sense, or names something that is no layer.
    #[error("cannot use {source_name}: {}", excerpt::of_sentence(why))]
    Unusable {
        /// What was named.
        source_name: String,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// A local file cannot be opened or read.
    #[error("cannot open {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A local file is not what it was when it was found.
    #[error("{} changed while it was being read; try again", .0.display())]
    FileChanged(PathBuf),
    /// A local file cannot be read any further.
    #[error("{name}: cannot read at byte {at}: {source}")]
    Read {
        /// The layer.
        name: String,
        /// The position in the file, in bytes.
        at: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// A local file became shorter while it was read.
    #[error("{name}: it was cut short while it was read: it ends at byte {len}, and had {expected} bytes")]
    Shortened {
        /// The layer.
        name: String,
        /// Where it ends now, in bytes.
        len: u64,
        /// How long it was when it was opened.
        expected: u64,
    },
    /// A server that cannot be reached, refuses, or does not answer what was asked.
    #[error(transparent)]
    Http(#[from] http::Error),
    /// An image is not what it should be, or is not there for this machine.
    #[error("{name}: {}", excerpt::of_sentence(why))]
    Image {
        /// Which image, or part of it.
        name: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// Bytes are not those that a digest names.
    #[error("{name}: the {what} is not the one with digest {expected}: it is damaged or was tampered with")]
    Digest {
        /// Where they came from.
        name: String,
        /// What they should be.
        what: &'static str,
        /// The digest.
        expected: String,
    },
    /// A registry or its token server does not let us in.
    #[error(
        "{name}: access denied: {}; log in with a tool that keeps credentials, or use --creds or --authfile",
        excerpt::of_sentence(why)
    )]
    Denied {
        /// The registry or token server.
        name: String,
        /// What it said.
        why: String,
    },
    /// Credentials cannot be found out.
    #[error("cannot use credentials from {place}: {}", excerpt::of_sentence(why))]
    Credentials {
        /// The file or program.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// A `hosts.toml` cannot be used.
    #[error("cannot use {}: {}", path.display(), excerpt::of_sentence(why))]
    Hosts {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl SourceError {
    /// Whether a server said that what was asked for is not there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        self.http().is_some_and(http::Error::is_absence)
    }

    /// Whether another time may bring what a failed request did not.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        let kind = self.http().map(http::Error::kind);
        matches!(
            kind,
            Some(Kind::Unreachable | Kind::NotHttp | Kind::Stale | Kind::Busy(_))
        )
    }

    /// The failed request behind it, if it is one.
    #[must_use]
    pub fn http(&self) -> Option<&http::Error> {
        match self {
            Self::Http(error) => Some(error),
            _ => None,
        }
    }

    /// An answer of `url` that contradicts the question.
    pub(in crate::source) fn wrong(url: &Url, why: impl Into<String>) -> Self {
        http::Error::wrong(url, why).into()
    }
}

/// Waits until it is time to ask again.
///
/// # Errors
/// `failure`, when there is to be no other try.
pub(crate) async fn wait_after(backoff: &mut Backoff, failure: SourceError) -> Result<(), SourceError> {
    match failure {
        SourceError::Http(failure) => Ok(backoff.wait_after(failure).await?),
        lasting => Err(lasting),
    }
}
