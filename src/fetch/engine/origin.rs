//! Where a blob's bytes come from, whatever that is. In: a range of the blob. Out: its bytes in pieces.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use crate::fetch::StartError;
use crate::fetch::runtime;
use crate::fetch::transport::{Client, RemoteLayer, Reply};
use crate::http;
use crate::source::Blob;
use crate::units::len_usize;

/// A local blob is read in pieces of this.
const PIECE: u64 = 256 << 10;

/// Why an attempt came to nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The network or the server.
    Net(http::Error),
    /// The local file.
    File(io::Error),
    /// The bytes came, and are not what they have to be.
    Wrong(String),
}

impl From<http::Error> for Trouble {
    fn from(failure: http::Error) -> Self {
        Self::Net(failure)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(failure) => failure.fmt(f),
            Self::File(error) => error.fmt(f),
            Self::Wrong(why) => f.write_str(why),
        }
    }
}

impl Trouble {
    /// What happened, for a message that begins with the blob's `name`.
    pub(super) fn why(&self, name: &str) -> String {
        match self {
            Self::Net(failure) if failure.place() == name => failure.why(),
            other => other.to_string(),
        }
    }
}

/// A blob, or an index file that holds windows.
pub(super) enum Origin {
    Http(Rc<RemoteLayer>),
    File { path: PathBuf, file: File },
}

impl Origin {
    /// A blob on a server. Made on the fetch thread: what lives there cannot move between threads.
    pub(super) fn remote(blob: &Blob) -> Result<Self, StartError> {
        Ok(Self::Http(Rc::new(RemoteLayer::new(blob)?)))
    }

    /// An open file; the path is for messages.
    pub(super) fn file(path: PathBuf, file: File) -> Self {
        Self::File { path, file }
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Http(layer) => layer.name(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }

    /// Asks for `len` bytes from `start` on; `len` is not zero.
    pub(super) async fn get(&self, client: &Client, start: u64, len: u64, demand: bool) -> Result<Body, Trouble> {
        match self {
            Self::Http(layer) => Ok(Body::Http(Box::new(client.get(layer, start, len, demand).await?))),
            Self::File { file, .. } => {
                let own = file.try_clone().map_err(Trouble::File)?;
                Ok(Body::File {
                    file: own.into(),
                    at: start,
                    left: len,
                })
            }
        }
    }
}

/// What was asked for, as it comes.
pub(super) enum Body {
    Http(Box<Reply>),
    File { file: runtime::File, at: u64, left: u64 },
}

impl Body {
    /// Whether it is the whole blob and not the range.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Http(reply) if reply.whole)
    }

    /// From asking to the answer's head, when that says something about a network.
    pub(super) fn head_took(&self) -> Option<Duration> {
        match self {
            Self::Http(reply) => Some(reply.head_took),
            Self::File { .. } => None,
        }
    }

    /// The next bytes; none when all that was asked for has come.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Trouble> {
        match self {
            Self::Http(reply) => Ok(reply.next().await?),
            Self::File { left: 0, .. } => Ok(None),
            Self::File { file, at, left } => {
                let len = PIECE.min(*left);
                let buffer = file.read_exact_at(*at, len_usize(len)).await.map_err(Trouble::File)?;
                *at += len;
                *left -= len;
                Ok(Some(buffer.into()))
            }
        }
    }
}
