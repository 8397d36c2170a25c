//! HTTP as both clients speak it: reqwest, with which blobs are found (`source`), and hyper on `io_uring` sockets, with which
//! they are fetched (`fetch`). In: requests and what servers answer. Out: whether an answer is what was asked for, where a
//! redirect leads, whether and when to ask again, which certificates to trust, which proxy to use, and one [`Error`].
//!
//! A ground room: it imports no other, and nothing here knows what a layer is. It must never put a password, a token or a
//! query string into a message, and never wait without a deadline.
//!
//! Parts: `error`; `redact` and `secret` (what may be printed); `validator`, `range` and `response` (is the answer right);
//! `redirect`; `retry` (deadlines, retries, `Retry-After`); `chance`; `waits` (what is waited for right now); `pace` (trickles); `reach` (whom strangers may name); `expiry` (signed URLs); `tls`;
//! `proxy`; `runtime` (the thread for registries), `client` (what only reqwest needs) and `ahead` (connections before there is a
//! request).

mod ahead;
pub mod chance;
mod client;
mod error;
pub mod expiry;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod pace;
pub(crate) mod proxy;
mod range;
mod reach;
mod redact;
mod redirect;
mod response;
mod retry;
pub(crate) mod runtime;
mod secret;
mod span;
pub mod tls;
mod validator;
mod waits;

pub use client::received_bytes;
pub use error::{Error, Kind, Shown};
pub use reach::Reach;
pub use redact::{excerpt, meant_url, shown_url, stable_name, without_secrets};
pub use redirect::MOST_REDIRECTS;
pub use retry::{HttpOptions, RetryPolicy, Timeouts};
pub use secret::Secret;
pub use validator::Validator;
pub use waits::{Waiting, waiting};

pub(crate) use ahead::{Opener, build_with_opener};
pub(crate) use client::{Body, build, client_within, peer, receive, send};
pub(crate) use pace::Pace;
pub(crate) use range::ByteRange;
pub(crate) use redact::split_credentials;
pub(crate) use redirect::Redirects;
pub(crate) use response::{Asked, Encoding, Found, Verdict, content_length, encoding, judge, judge_first};
pub(crate) use retry::{Backoff, date, retry_after};
pub(crate) use waits::{WaitOwner, noting, waiting_of};

/// `User-Agent` of every request.
pub(crate) const USER_AGENT: &str = concat!("tarblk/", env!("CARGO_PKG_VERSION"));
