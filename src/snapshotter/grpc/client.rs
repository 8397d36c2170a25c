//! Calls of containerd's services, over its Unix socket. In: messages. Out: answers, or the status with which the call ended.
//!
//! A connection belongs to the thread that uses it: its methods wait, with deadlines, and are not for threads that run a runtime.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::Stream as FuturesStream;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::{NAMESPACE, PREFIX_BYTES, framed};

/// How long containerd may take to answer a command of a person.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The longest answer in bytes: what containerd itself sends at most.
const LONGEST_ANSWER: usize = 16 << 20;

/// gRPC's number of "there is none".
pub const NOT_FOUND: u32 = 5;
/// gRPC's number of "it is there already".
pub const ALREADY_EXISTS: u32 = 6;
/// gRPC's number of "not now".
pub const UNAVAILABLE: u32 = 14;

/// How a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The socket does not lead to a server.
    #[error("cannot reach {}: {cause}", address.display())]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The connection broke, or what came is not gRPC.
    #[error("{}: {cause}", address.display())]
    Broken {
        /// The socket.
        address: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// No answer came in time.
    #[error("{} does not answer within {after:?}", address.display())]
    Silent {
        /// The socket.
        address: PathBuf,
        /// How long was waited for it.
        after: Duration,
    },
    /// The server ended the call with a status that is no success.
    #[error("{message}")]
    Refused {
        /// gRPC's number of it.
        code: u32,
        /// The server's words.
        message: String,
    },
}

impl CallError {
    /// gRPC's number of the status that the server gave, if it gave one.
    #[must_use]
    pub const fn code(&self) -> Option<u32> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Silent { .. } => None,
        }
    }
}

/// Connects to a gRPC server's socket.
///
/// # Errors
/// [`CallError::Unreachable`], [`CallError::Broken`].
pub async fn connect<B>(address: &Path) -> Result<SendRequest<B>, CallError>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connected = tokio::net::UnixStream::connect(address).await;
    let stream = connected.map_err(|cause| CallError::Unreachable {
        address: address.to_owned(),
        cause,
    })?;
    let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| CallError::Broken {
            address: address.to_owned(),
            cause: error.to_string(),
        })?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            log::debug!("the connection ended: {error}");
        }
    });
    Ok(send)
}

type Frames = Pin<Box<dyn FuturesStream<Item = Result<Frame<Bytes>, Infallible>> + Send>>;
type Requests = StreamBody<Frames>;

/// A connection to containerd, for one of its namespaces.
#[derive(Debug)]
pub struct Connection {
    runtime: Runtime,
    send: SendRequest<Requests>,
    address: PathBuf,
    namespace: String,
    /// How long an answer of one message may take.
    patience: Duration,
}

/// A call with several messages: those that are sent, and those that come.
#[derive(Debug)]
pub struct Conversation<'a> {
    connection: &'a Connection,
    /// Gone when no more is sent.
    outgoing: Option<mpsc::UnboundedSender<Bytes>>,
    head: Option<Head>,
    body: Option<Incoming>,
    buffer: BytesMut,
    /// Of an answer that consists of nothing else.
    status: HeaderMap,
}

type Head = tokio::task::JoinHandle<hyper::Result<hyper::Response<Incoming>>>;

impl Connection {
    /// Connects to containerd, which may take as long as `patience` to answer a [`call`](Self::call).
    ///
    /// # Errors
    /// [`CallError`].
    pub fn open(address: &Path, namespace: &str, patience: Duration) -> Result<Self, CallError> {
        let broken = |cause: String| CallError::Broken {
            address: address.to_owned(),
            cause,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| broken(error.to_string()))?;
        let send = runtime.block_on(connect(address))?;
        Ok(Self {
            runtime,
            send,
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            patience,
        })
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn broken(&self, cause: impl std::fmt::Display) -> CallError {
        CallError::Broken {
            address: self.address.clone(),
            cause: cause.to_string(),
        }
    }

    /// Calls with one message, and waits for the one message of the answer.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call<A: Message + Default>(&self, path: &str, request: &impl Message) -> Result<A, CallError> {
        let mut answer = None;
        self.call_for_all(path, request, |message| answer = Some(message))?;
        answer.ok_or_else(|| self.broken(format!("{path} was answered by nothing")))
    }

    /// Calls with one message, and hands every message of the answer to `take`.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_for_all<A: Message + Default>(
        &self,
        path: &str,
        request: &impl Message,
        mut take: impl FnMut(A),
    ) -> Result<(), CallError> {
        let mut conversation = self.converse(path)?;
        conversation.send(request)?;
        conversation.outgoing = None;
        while let Some(message) = conversation.receive(self.patience)? {
            take(message);
        }
        Ok(())
    }

    /// Begins a call with several messages.
    ///
    /// # Errors
    /// [`CallError::Broken`].
    pub fn converse(&self, path: &str) -> Result<Conversation<'_>, CallError> {
        let (outgoing, mut queue) = mpsc::unbounded_channel::<Bytes>();
        let frames: Frames = Box::pin(stream::poll_fn(move |context| {
            let next = queue.poll_recv(context);
            next.map(|next| next.map(|data| Ok(Frame::data(data))))
        }));
        let namespace = HeaderValue::from_str(&self.namespace).map_err(|error| self.broken(error))?;
        let request = Request::post(format!("http://localhost{path}"))
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .header(NAMESPACE, namespace)
            .body(StreamBody::new(frames))
            .map_err(|error| self.broken(error))?;
        let mut send = self.send.clone();
        let head = self.runtime.spawn(async move {
            send.ready().await?;
            send.send_request(request).await
        });
        Ok(Conversation {
            connection: self,
            outgoing: Some(outgoing),
            head: Some(head),
            body: None,
            buffer: BytesMut::new(),
            status: HeaderMap::new(),
        })
    }

    fn within<T>(&self, patience: Duration, what: impl Future<Output = T>) -> Result<T, CallError> {
        let waiting = async { tokio::time::timeout(patience, what).await };
        self.runtime.block_on(waiting).map_err(|_| CallError::Silent {
            address: self.address.clone(),
            after: patience,
        })
    }
}

impl Conversation<'_> {
    /// That what comes makes no sense, because of `cause`.
    #[must_use]
    pub fn broken(&self, cause: impl std::fmt::Display) -> CallError {
        self.connection.broken(cause)
    }

    /// Sends a message; it is on its way when [`Self::receive`] waits.
    ///
    /// # Errors
    /// [`CallError::Broken`] when the call has ended.
    pub fn send(&mut self, message: &impl Message) -> Result<(), CallError> {
        let frame = framed(&message.encode_to_vec());
        let sent = self.outgoing.as_ref().map(|outgoing| outgoing.send(frame));
        match sent {
            Some(Ok(())) => Ok(()),
            // Why it has ended is in what comes.
            _ => Err(self.connection.broken("the call has ended")),
        }
    }

    /// The next message that comes; none when the call has ended well.
    ///
    /// # Errors
    /// [`CallError`]: nothing came for `patience`; the status with which the server ended the call.
    pub fn receive<A: Message + Default>(&mut self, patience: Duration) -> Result<Option<A>, CallError> {
        let connection = self.connection;
        let next = connection.within(patience, self.next())?;
        let Some(message) = next? else { return Ok(None) };
        A::decode(message).map(Some).map_err(|error| connection.broken(error))
    }

    async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        let connection = self.connection;
        if let Some(head) = self.head.take() {
            let response = head.await.map_err(|error| connection.broken(error))?;
            let response = response.map_err(|error| connection.broken(error))?;
            if response.status() != StatusCode::OK {
                return Err(connection.broken(format!("it answers with HTTP status {}", response.status())));
            }
            self.status = response.headers().clone();
            self.body = Some(response.into_body());
        }
        loop {
            if let Some(message) = self.whole_message()? {
                return Ok(Some(message));
            }
            let frame = match &mut self.body {
                Some(body) => body.frame().await,
                None => None,
            };
            match frame.transpose().map_err(|error| connection.broken(error))? {
                None => {
                    self.body = None;
                    return outcome(&self.status).map_or_else(
                        || Err(connection.broken("the call has no status")),
                        |status| status.map(|()| None),
                    );
                }
                Some(frame) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            self.status = trailers;
                        }
                    }
                },
            }
        }
    }

    /// The next message, if all of it has come.
    fn whole_message(&mut self) -> Result<Option<Bytes>, CallError> {
        let Some([compressed, a, b, c, d]) = self.buffer.first_chunk::<PREFIX_BYTES>().copied() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if compressed != 0 || len > LONGEST_ANSWER {
            return Err(self
                .connection
                .broken("it sends a message that is compressed or too long"));
        }
        if self.buffer.len() - PREFIX_BYTES < len {
            return Ok(None);
        }
        self.buffer.advance(PREFIX_BYTES);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }
}

/// How a call ended, by the fields of its status; none if they do not say.
fn outcome(status: &HeaderMap) -> Option<Result<(), CallError>> {
    let text = |name: &str| status.get(name)?.to_str().ok();
    let code: u32 = text("grpc-status")?.parse().ok()?;
    if code == 0 {
        return Some(Ok(()));
    }
    let message = percent_decoded(text("grpc-message").unwrap_or_default());
    let message = if message.is_empty() {
        format!("the call failed with gRPC's status {code}")
    } else {
        message
    };
    Some(Err(CallError::Refused { code, message }))
}

/// The inverse of [`super::percent_encoded`].
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let escaped = (*first == b'%').then(|| behind.get(..2)).flatten();
        let byte = escaped
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &behind[2..] } else { behind };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::percent_encoded;
    use super::*;

    #[test]
    fn messages_come_back() {
        for text in ["50% of \u{fc}\n", "", "%", "%4", "plain"] {
            assert_eq!(percent_decoded(&percent_encoded(text)), text);
        }
        assert_eq!(percent_decoded("a%zzb%"), "a%zzb%");
    }

    #[test]
    fn a_status_is_an_outcome() {
        let status = |fields: &[(&'static str, &'static str)]| {
            let all = fields
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
            outcome(&all.collect::<HeaderMap>())
        };
        assert!(status(&[("grpc-status", "0")]).unwrap().is_ok());
        assert!(status(&[]).is_none());
        assert!(status(&[("grpc-status", "x")]).is_none());
        let error = status(&[("grpc-status", "5"), ("grpc-message", "no%20such")])
            .unwrap()
            .unwrap_err();
        assert_eq!(
            (error.code(), error.to_string()),
            (Some(NOT_FOUND), "no such".to_owned())
        );
        let error = status(&[("grpc-status", "2")]).unwrap().unwrap_err();
        assert!(error.to_string().contains("status 2"));
    }
}
