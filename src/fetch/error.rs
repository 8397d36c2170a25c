//! Why a fetcher does not start, and why a range cannot be read.
//!
//! Both are one line for a person: what, where, and what to do. A read's error is told to every reader that waits for the same
//! bytes, so it can be cloned. The kernel is told `EIO` whatever it is (see [`ReadError`](crate::device::volume::ReadError)).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::http;
use crate::source::SourceError;
use crate::units::{LayerId, TarRange};

/// Why a fetcher did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A layer's URL or headers cannot be used.
    #[error("{url}: {why}")]
    Url {
        /// Without secrets.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// A layer is longer than chunks can be numbered (128 TiB).
    #[error("layer {layer} is {size} bytes long; more than 128 TiB cannot be fetched")]
    TooLong {
        /// Its number.
        layer: usize,
        /// Its length in bytes.
        size: u64,
    },
    /// A layer's index was made of another blob.
    #[error("layer {layer} is {found} bytes long, but its index is of a blob of {said}: it belongs to another layer")]
    OtherBlob {
        /// Its number.
        layer: usize,
        /// The blob's length in bytes, by the index.
        said: u64,
        /// Its length.
        found: u64,
    },
    /// A layer's file cannot be opened, or is not what it was when it was found.
    #[error(transparent)]
    File(#[from] SourceError),
    /// The machine's certificates cannot be used.
    #[error("{0}")]
    Certificates(#[source] http::Error),
    /// This process may not have so many files open.
    #[error(
        "{limit} files may be open at the same time, and this needs {needs}: raise the limit (ulimit -n, LimitNOFILE=), or use fewer --connections"
    )]
    Descriptors {
        /// The limit, which was raised as far as it may be.
        limit: u64,
        /// What is open already, and what the layers and their connections will need.
        needs: u64,
    },
    /// The fetch thread or its ring could not be made.
    #[error("cannot start the fetch thread: {0}; io_uring may be disabled here (sysctl kernel.io_uring_disabled)")]
    Thread(#[from] io::Error),
}

/// Why a range could not be brought.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The server has another layer now than the one that was attached.
    #[error("{url}: the layer changed on the server: {how}; attach it again")]
    Changed {
        /// Without secrets.
        url: String,
        /// What differs.
        how: String,
    },
    /// The server refused until the deadline.
    #[error("{url}: for {after:.0?} {why}; check the address and the credentials")]
    Refused {
        /// Without secrets.
        url: String,
        /// The last answer.
        why: String,
        /// The deadline.
        after: Duration,
        /// The HTTP status.
        status: u16,
    },
    /// The server's answers did not fit the questions until the deadline.
    #[error("{url}: bytes {range}: {why}")]
    WrongAnswer {
        /// Without secrets.
        url: String,
        /// What was asked for.
        range: TarRange,
        /// The last answer.
        why: String,
    },
    /// The bytes did not come before the deadline.
    #[error("{url}: bytes {range} did not come in {after:.0?}: {why}")]
    Deadline {
        /// Without secrets.
        url: String,
        /// What was asked for.
        range: TarRange,
        /// The deadline.
        after: Duration,
        /// The last thing that went wrong.
        why: String,
    },
    /// A local file could not be read.
    #[error("{path}: cannot read bytes {range}: {why}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        range: TarRange,
        /// What the kernel said, or that the file is shorter than it was. Shared, because every read that waits gets the error.
        #[source]
        why: Arc<io::Error>,
    },
    /// No such layer, or not so long.
    #[error("bytes {range} of layer {} do not exist", layer.0)]
    OutOfRange {
        /// The layer that was named.
        layer: LayerId,
        /// What was asked for.
        range: TarRange,
    },
    /// The layer is not what it has to be: nothing more is read of it.
    #[error("{name}: {why}; the layer or its index is damaged or forged, and nothing more is read of it")]
    Poisoned {
        /// Without secrets.
        name: String,
        /// What was found.
        why: String,
    },
    /// What reads the layers could not be made again after a restart: an answer for good, unlike [`FetchError::Stopped`], which
    /// leaves a read to the next process.
    #[error("{why}; detach the device and attach it again")]
    NotBuilt {
        /// Why not.
        why: String,
    },
    /// The fetcher was shut down.
    #[error("the fetcher was shut down")]
    Stopped,
}
