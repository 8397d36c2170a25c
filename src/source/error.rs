//! Why a layer cannot be had.

use std::path::PathBuf;

use crate::index::IndexError;

/// Why a layer cannot be opened or walked. No variant holds a password or a query string.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The name makes no sense, or names something that is no layer.
    #[error("cannot use {source_name}: {why}")]
    Unusable {
        /// What was named.
        source_name: String,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// A local file cannot be opened or read.
    #[error("cannot open {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The tar itself is bad, or whoever takes its entries refused one.
    #[error("{source_name}: {source}")]
    Tar {
        /// Where it is.
        source_name: String,
        /// What is wrong.
        source: IndexError,
    },
    /// The server answered, and will answer so again.
    #[error("{url}: the server says {status}{advice}")]
    Status {
        /// Which URL.
        url: String,
        /// The status line's number and words.
        status: String,
        /// What that means here, with a separator in front, or nothing.
        advice: &'static str,
    },
    /// The server cannot be reached, or stopped answering and did not come back.
    #[error("{url}: {why}{}", Tries(*.tries))]
    Unreachable {
        /// Which URL.
        url: String,
        /// The last failure.
        why: String,
        /// How often it was tried.
        tries: u32,
    },
    /// The server's answer contradicts the request or what it said before.
    #[error("{url}: the server sent something else than was asked for: {why}")]
    WrongAnswer {
        /// Which URL.
        url: String,
        /// How it differs.
        why: String,
    },
    /// The layer is another one than at the beginning.
    #[error("{url}: the layer changed on the server while it was read; try again")]
    Changed {
        /// Which URL.
        url: String,
    },
    /// An image is not what it should be, or is not there for this machine.
    #[error("{name}: {why}")]
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
    #[error("{name}: access denied: {why}; log in with a tool that keeps credentials, or use --creds or --authfile")]
    Denied {
        /// Whom we asked.
        name: String,
        /// What it said.
        why: String,
    },
    /// Credentials cannot be found out.
    #[error("cannot use credentials from {place}: {why}")]
    Credentials {
        /// The file or program.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// A `hosts.toml` cannot be used.
    #[error("cannot use {}: {why}", path.display())]
    Hosts {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// TLS or the runtime cannot be set up.
    #[error("cannot set up {what}: {why}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why not.
        why: String,
    },
}

/// `(after 5 tries)`, for more than one.
struct Tries(u32);

impl std::fmt::Display for Tries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 > 1 {
            write!(f, " (after {} tries)", self.0)
        } else {
            Ok(())
        }
    }
}

impl SourceError {
    /// Whether a server said that what was asked for is not there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Status { status, .. } if status.starts_with("404") || status.starts_with("410"))
    }
}
