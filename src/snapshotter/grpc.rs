//! gRPC over a Unix socket: HTTP/2 by hyper, and by hand the five bytes before each message and the trailers behind the last one. In: a
//! listener and what answers calls. Out: answers; no call ends without a status.
//!
//! There is no more of gRPC here than containerd's snapshots service uses: one message in, one or several out, no compression, no
//! TLS. tonic brings a router, a balancer, a code generator and their crates for the same; hyper is here already, so that this takes
//! `h2`, `httpdate` and prost. `client` is the other side, for containerd's own services.
//!
//! Calls run on threads of their own, since they wait for disks, kernels and networks; the thread of connections never does.
//!
//! `GET /metrics` on the same socket, by HTTP/1 or 2, gives metrics as Prometheus reads them.

pub mod client;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::sync::watch;

/// The longest request in bytes: gRPC's own default.
const LONGEST_REQUEST: usize = 4 << 20;

/// The header field of containerd's namespaces.
const NAMESPACE: &str = "containerd-namespace";

/// A message's length and whether it is compressed stand before it.
const PREFIX_BYTES: usize = 5;

/// How long calls may go on after the server was asked to end.
const LAST_CALLS: Duration = Duration::from_secs(30);

/// How long to wait when no connection can be accepted (too many descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a call failed, as gRPC numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request makes no sense.
    InvalidArgument,
    /// There is no such snapshot.
    NotFound,
    /// It is there already. Of a layer that is wanted: nothing need be fetched.
    AlreadyExists,
    /// Not as things are.
    FailedPrecondition,
    /// There is no such call.
    Unimplemented,
    /// The server is at fault.
    Internal,
    /// Another try may bring it.
    Unavailable,
}

/// How a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// What kind of a failure.
    pub code: Code,
    /// What the client shows to a person, in one line.
    pub message: String,
}

impl Status {
    /// A failure, in words.
    pub fn new(code: Code, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

/// What a call brings: its messages, encoded.
pub type Reply = Result<Vec<Vec<u8>>, Status>;

/// The reply of one message.
pub fn one(message: &impl Message) -> Vec<Vec<u8>> {
    vec![message.encode_to_vec()]
}

/// Understands a request.
///
/// # Errors
/// [`Code::InvalidArgument`].
pub fn decode<M: Message + Default>(request: &[u8]) -> Result<M, Status> {
    M::decode(request).map_err(|error| Status::new(Code::InvalidArgument, error))
}

/// What answers calls; each on a thread where it may wait.
pub trait Calls: Send + Sync + 'static {
    /// Answers the call of this path, `/package.Service/Method`. `namespace` is containerd's, of which a client says that it calls for it.
    ///
    /// # Errors
    /// The status that the client gets.
    fn call(&self, path: &str, namespace: Option<&str>, request: &[u8]) -> Reply;

    /// What is answered to `GET /metrics`.
    fn metrics(&self) -> String;
}

/// Answers calls until `stop` becomes true, then waits for those that have begun.
///
/// # Errors
/// When the listener cannot be used.
pub fn serve(listener: UnixListener, calls: &Arc<dyn Calls>, stop: &watch::Receiver<bool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .thread_name("tarblk-calls")
        .build()?;
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let stream = tokio::select! {
                stream = accepted(&listener) => stream,
                Some(_) = connections.join_next() => continue,
                () = raised(stop.clone()) => break,
            };
            connections.spawn(converse(stream, Arc::clone(calls), stop.clone()));
        }
        let all_end = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_CALLS, all_end).await.is_err() {
            log::warn!("calls that have not ended within {} s are left", LAST_CALLS.as_secs());
        }
        Ok::<(), io::Error>(())
    })?;
    // What still waits for a server is not waited for.
    runtime.shutdown_background();
    Ok(())
}

/// The next connection.
pub(super) async fn accepted(listener: &tokio::net::UnixListener) -> tokio::net::UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                log::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Ends when `stop` becomes true.
pub(super) async fn raised(mut stop: watch::Receiver<bool>) {
    // Whoever would raise it may be gone.
    if stop.wait_for(|raised| *raised).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// One client's connection, until it or the server ends.
async fn converse(stream: tokio::net::UnixStream, calls: Arc<dyn Calls>, stop: watch::Receiver<bool>) {
    let service = service_fn(move |request| answer(request, Arc::clone(&calls)));
    let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = raised(stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        log::debug!("a connection ended: {error}");
    }
}

type Frames = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

async fn answer(request: Request<Incoming>, calls: Arc<dyn Calls>) -> Result<Response<Frames>, Infallible> {
    if request.method() != Method::POST {
        return Ok(page(&request, calls).await);
    }
    let reply = reply_to(request, calls).await;
    let mut frames = Vec::new();
    let mut status = HeaderMap::new();
    match reply {
        Ok(messages) => {
            frames.extend(messages.into_iter().map(|message| Ok(Frame::data(framed(&message)))));
            status.insert("grpc-status", HeaderValue::from_static("0"));
        }
        Err(Status { code, message }) => {
            status.insert("grpc-status", HeaderValue::from(number(code)));
            if let Ok(message) = HeaderValue::from_str(&percent_encoded(&message)) {
                status.insert("grpc-message", message);
            }
        }
    }
    frames.push(Ok(Frame::trailers(status)));
    let mut response = Response::new(StreamBody::new(stream::iter(frames)));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// The answer to what is no call.
async fn page(request: &Request<Incoming>, calls: Arc<dyn Calls>) -> Response<Frames> {
    let is_asked = request.method() == Method::GET && request.uri().path() == "/metrics";
    let text = if is_asked {
        tokio::task::spawn_blocking(move || calls.metrics()).await.ok()
    } else {
        None
    };
    let (status, text) = match text {
        Some(text) => (StatusCode::OK, text),
        None => (StatusCode::NOT_FOUND, "there is /metrics here\n".to_owned()),
    };
    let mut response = Response::new(StreamBody::new(stream::iter(vec![Ok(Frame::data(text.into()))])));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

async fn reply_to(request: Request<Incoming>, calls: Arc<dyn Calls>) -> Reply {
    let path = request.uri().path().to_owned();
    let namespace = request.headers().get(NAMESPACE);
    let namespace = namespace.and_then(|value| value.to_str().ok()).map(str::to_owned);
    let body = Limited::new(request.into_body(), LONGEST_REQUEST).collect().await;
    let body = body
        .map_err(|error| Status::new(Code::InvalidArgument, error))?
        .to_bytes();
    let called = tokio::task::spawn_blocking(move || calls.call(&path, namespace.as_deref(), message_of(&body)?));
    // A panic is this program's fault, and other calls go on.
    called
        .await
        .unwrap_or_else(|_| Err(Status::new(Code::Internal, "the call panicked; the log says where")))
}

/// The only message of a request's body.
pub(super) fn message_of(body: &[u8]) -> Result<&[u8], Status> {
    let bad = |why: &str| Status::new(Code::InvalidArgument, why);
    let (prefix, message) = body
        .split_at_checked(PREFIX_BYTES)
        .ok_or_else(|| bad("the request has no message"))?;
    let [compressed, a, b, c, d] = *prefix else {
        return Err(bad("the request has no message"));
    };
    if compressed != 0 {
        return Err(Status::new(
            Code::Unimplemented,
            "compressed messages are not understood",
        ));
    }
    let len = usize::try_from(u32::from_be_bytes([a, b, c, d]));
    if len != Ok(message.len()) {
        return Err(bad("the request is not one message"));
    }
    Ok(message)
}

fn framed(message: &[u8]) -> Bytes {
    let mut frame = vec![0];
    // Answers are bounded by the snapshots in one of them.
    frame.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(message);
    frame.into()
}

const fn number(code: Code) -> u16 {
    match code {
        Code::InvalidArgument => 3,
        Code::NotFound => 5,
        Code::AlreadyExists => 6,
        Code::FailedPrecondition => 9,
        Code::Unimplemented => 12,
        Code::Internal => 13,
        Code::Unavailable => 14,
    }
}

/// As gRPC wants messages in its trailers: printable ASCII, all else and `%` as `%XX`.
pub(super) fn percent_encoded(message: &str) -> String {
    let mut encoded = String::new();
    for byte in message.bytes() {
        match byte {
            b'%' => encoded.push_str("%25"),
            b' '..=b'~' => encoded.push(char::from(byte)),
            _ => encoded.extend(["%".to_owned(), format!("{byte:02X}")]),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_hold_one_message() {
        assert_eq!(message_of(b"\0\0\0\0\x03abc").unwrap(), b"abc");
        assert_eq!(message_of(b"\0\0\0\0\0").unwrap(), b"");
        for (bad, code) in [
            (&b""[..], Code::InvalidArgument),
            (b"\0\0\0\0", Code::InvalidArgument),
            (b"\0\0\0\0\x04abc", Code::InvalidArgument),
            (b"\0\0\0\0\x02abc", Code::InvalidArgument),
            (b"\0\xff\xff\xff\xffabc", Code::InvalidArgument),
            (b"\x01\0\0\0\x03abc", Code::Unimplemented),
        ] {
            assert_eq!(message_of(bad).unwrap_err().code, code, "{bad:?}");
        }
        assert_eq!(message_of(&framed(b"xyz")).unwrap(), b"xyz");
    }

    #[test]
    fn messages_are_ascii() {
        assert_eq!(percent_encoded("50% of \u{fc}\n"), "50%25 of %C3%BC%0A");
    }
}
