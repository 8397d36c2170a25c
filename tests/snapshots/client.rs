//! A gRPC client as containerd's: HTTP/2 without TLS over a Unix socket, one call after the other. It is not the server's code
//! turned around: frames and trailers are read as the protocol's page says.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;

/// How a call failed: gRPC's number of it, and the words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) code: u32,
    pub(crate) message: String,
}

pub(crate) const INVALID_ARGUMENT: u32 = 3;
pub(crate) const NOT_FOUND: u32 = 5;
pub(crate) const ALREADY_EXISTS: u32 = 6;
pub(crate) const FAILED_PRECONDITION: u32 = 9;
pub(crate) const UNIMPLEMENTED: u32 = 12;
pub(crate) const UNAVAILABLE: u32 = 14;

pub(crate) type Answer<T> = Result<T, Failed>;

#[derive(Clone, Debug)]
pub(crate) struct Client {
    address: PathBuf,
}

impl Client {
    pub(crate) fn new(address: &Path) -> Self {
        Self {
            address: address.to_owned(),
        }
    }

    /// Calls, and waits for all messages of the answer. A connection that breaks is [`UNAVAILABLE`].
    pub(crate) fn call<A: Message + Default>(&self, path: &str, request: &impl Message) -> Answer<Vec<A>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.converse(path, request.encode_to_vec()))
    }

    async fn converse<A: Message + Default>(&self, path: &str, request: Vec<u8>) -> Answer<Vec<A>> {
        fn broken(error: impl std::fmt::Display) -> Failed {
            Failed {
                code: UNAVAILABLE,
                message: format!("the connection broke: {error}"),
            }
        }
        let stream = tokio::net::UnixStream::connect(&self.address).await.map_err(broken)?;
        let (mut send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(connection);
        let mut body = vec![0];
        body.extend(u32::try_from(request.len()).unwrap().to_be_bytes());
        body.extend(request);
        let request = Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            // Of no meaning to snapshotters.
            .header("containerd-namespace", "k8s.io")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = send.send_request(request).await.map_err(broken)?;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/grpc");
        let headers = response.headers().clone();
        let body = response.into_body().collect().await.map_err(broken)?;
        let trailers = body.trailers().cloned().unwrap_or(headers);
        let text = |name: &str| trailers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let code: u32 = text("grpc-status").expect("a status").parse().unwrap();
        if code != 0 {
            let message = text("grpc-message").unwrap_or_default();
            return Err(Failed { code, message });
        }
        let mut bytes = body.to_bytes();
        let mut answers = Vec::new();
        while !bytes.is_empty() {
            let prefix = bytes.split_to(5);
            assert_eq!(prefix[0], 0, "compressed");
            let len = u32::from_be_bytes(prefix[1..5].try_into().unwrap());
            let message = bytes.split_to(usize::try_from(len).unwrap());
            answers.push(A::decode(message).unwrap());
        }
        Ok(answers)
    }
}
