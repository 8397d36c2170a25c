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
