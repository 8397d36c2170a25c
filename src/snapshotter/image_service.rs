//! A kubelet's pulls, on their way to containerd. In: the calls of the CRI's image service, on a socket that the kubelet is told of
//! (`--image-service-endpoint`). Out: the same bytes to containerd, and its answers back; of each pull the login that came with it is
//! kept, because the layers are fetched long after the pull, by another process, and containerd tells snapshotters no secrets.
//!
//! Calls are passed on as HTTP/2 has them, without being understood: methods and fields that later kubelets add go through, streams
//! too. Of a `PullImage`, in whatever version of the API, only the image's name and the login are decoded. *Invariant:* what is
//! wrong with a login, or with keeping it, never stops a pull, and neither log nor message shows one.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::uri::Builder;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::watch;

use super::grpc::client::{self, UNAVAILABLE};
use super::grpc::{accepted, message_of, percent_encoded, raised};
use crate::device::state::write_whole;
use crate::source::registry::{KeptLogins, Login, LoginParts, Reference, is_server};

/// Only the CRI's services are passed on, in all of their versions.
const SERVICES: &str = "/runtime.";

/// The call of which more is wanted.
const PULL: &str = "ImageService/PullImage";

/// The longest `PullImage` in bytes: what containerd takes.
const LONGEST_PULL: usize = 16 << 20;

/// gRPC's number of "there is no such call".
const UNIMPLEMENTED: u32 = 12;
/// gRPC's number of "the request makes no sense".
const INVALID_ARGUMENT: u32 = 3;

/// `runtime.v1.ImageSpec`, of which everything else is passed over.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// `runtime.v1.AuthConfig`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

/// `runtime.v1.PullImageRequest`; `runtime.v1alpha2`'s is the same.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

/// Passes calls on.
pub(super) struct ImageService {
    /// containerd's socket.
    containerd: PathBuf,
    /// Whatever calls are passed on by; none before the first, and after it broke.
    connection: tokio::sync::Mutex<Option<SendRequest<Outgoing>>>,
    logins: Logins,
}

type Outgoing = Either<Incoming, Full<Bytes>>;
type Answer = Response<Either<Incoming, Empty<Bytes>>>;

/// The logins that came with pulls, on disk.
struct Logins {
    path: PathBuf,
    kept: Mutex<KeptLogins>,
}

impl ImageService {
    pub(super) fn new(containerd: &Path, logins: &Path) -> Self {
        let kept = KeptLogins::read(logins).unwrap_or_else(|error| {
            log::warn!("{}: {error}; pulls bring new ones", logins.display());
            KeptLogins::default()
        });
        Self {
            containerd: containerd.to_owned(),
            connection: tokio::sync::Mutex::default(),
            logins: Logins {
                path: logins.to_owned(),
                kept: Mutex::new(kept),
            },
        }
    }

    /// Passes calls on, on a thread of its own, until `stop` becomes true.
    ///
    /// # Errors
    /// When there is no thread, or the listener cannot be used.
    pub(super) fn spawn(
        self,
        listener: UnixListener,
        stop: watch::Receiver<bool>,
    ) -> io::Result<thread::JoinHandle<()>> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let run = move || {
            runtime.block_on(async {
                match tokio::net::UnixListener::from_std(listener) {
                    Ok(listener) => serve(Arc::new(self), listener, stop).await,
                    Err(error) => log::error!("no image service: {error}"),
                }
            });
            // Pulls that are under way are the kubelet's to repeat.
            runtime.shutdown_background();
        };
        thread::Builder::new().name("tarblk-images".to_owned()).spawn(run)
    }

    async fn pass_on(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        if !path.starts_with(SERVICES) {
            return refusal(UNIMPLEMENTED, &format!("there is no {path} here"));
        }
        let request = if path.ends_with(PULL) {
            let (head, body) = request.into_parts();
            let body = match Limited::new(body, LONGEST_PULL).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => return refusal(INVALID_ARGUMENT, &error.to_string()),
            };
            self.logins.learn(&body);
            Request::from_parts(head, Either::Right(Full::new(body)))
        } else {
            request.map(Either::Left)
        };
        match self.forward(request).await {
            Ok(response) => response.map(Either::Left),
            Err(why) => refusal(UNAVAILABLE, &format!("containerd: {why}")),
        }
    }

    async fn forward(&self, mut request: Request<Outgoing>) -> Result<Response<Incoming>, String> {
        if request.uri().authority().is_none() {
            let path = request.uri().path_and_query().cloned();
            let uri = Uri::builder().scheme("http").authority("localhost");
            let uri = path.into_iter().fold(uri, Builder::path_and_query);
            *request.uri_mut() = uri.build().map_err(|error| error.to_string())?;
        }
        let mut connection = self.connect().await?;
        connection
            .send_request(request)
            .await
            .map_err(|error| error.to_string())
    }

    /// The connection to containerd, made anew if it broke.
    async fn connect(&self) -> Result<SendRequest<Outgoing>, String> {
        let mut connection = self.connection.lock().await;
        if let Some(open) = &mut *connection
            && open.ready().await.is_ok()
        {
            return Ok(open.clone());
        }
        let opened = client::connect(&self.containerd)
            .await
            .map_err(|error| error.to_string())?;
        *connection = Some(opened.clone());
        Ok(opened)
    }
}

async fn serve(service: Arc<ImageService>, listener: tokio::net::UnixListener, stop: watch::Receiver<bool>) {
    loop {
        let stream = tokio::select! {
            stream = accepted(&listener) => stream,
            () = raised(stop.clone()) => return,
        };
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let service = Arc::clone(&service);
                async move { Ok::<_, std::convert::Infallible>(service.pass_on(request).await) }
            });
            let connection = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                log::debug!("a connection ended: {error}");
            }
        });
    }
}

/// An answer without a message.
fn refusal(code: u32, message: &str) -> Answer {
    let mut response = Response::new(Either::Right(Empty::new()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(code));
    if let Ok(message) = HeaderValue::from_str(&percent_encoded(message)) {
        headers.insert("grpc-message", message);
    }
    response
}

impl Logins {
    /// Keeps the login of a `PullImage`, if one came with it.
    fn learn(&self, body: &[u8]) {
        let Ok(request) = message_of(body).and_then(super::grpc::decode::<PullImageRequest>) else {
            // containerd says what is wrong with it.
            return;
        };
        let Some((reference, login)) = login_of(&request) else {
            return;
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.keep(&reference.host, &reference.repository, &login) {
            return;
        }
        let written = kept.to_bytes().and_then(|bytes| write_whole(&self.path, &bytes, true));
        match written {
            Ok(()) => log::info!("a pull brought a login for {}/{}", reference.host, reference.repository),
            Err(error) => log::warn!("cannot write {}: {error}", self.path.display()),
        }
    }
}

/// The repository of a pull, and the login that came with it.
fn login_of(request: &PullImageRequest) -> Option<(Reference, Login)> {
    let reference = Reference::parse(&request.image.as_ref()?.image).ok()?;
    let auth = request.auth.clone()?;
    // containerd does not use it either.
    if !auth.server_address.is_empty() && !is_server(&auth.server_address, &reference.host) {
        return None;
    }
    let auth = LoginParts {
        pair: auth.auth,
        username: auth.username,
        password: auth.password,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    match Login::of_parts(&auth) {
        Ok(login) => Some((reference, login?)),
        Err(why) => {
            log::warn!(
                "the login that came with {}/{}: {why}",
                reference.host,
                reference.repository
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn pull(image: &str, auth: AuthConfig) -> PullImageRequest {
        PullImageRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
            auth: Some(auth),
        }
    }

    fn user() -> AuthConfig {
        AuthConfig {
            username: "me".to_owned(),
            password: "the word".to_owned(),
            ..AuthConfig::default()
        }
    }

    #[test]
    fn a_login_belongs_to_its_repository_and_server() {
        let (reference, login) = login_of(&pull("host:5000/a/b:1", user())).unwrap();
        assert_eq!((&*reference.host, &*reference.repository), ("host:5000", "a/b"));
        assert_eq!(login, Login::parse("me:the word").unwrap());
        let at = |server_address: &str| AuthConfig {
            server_address: server_address.to_owned(),
            ..user()
        };
        assert!(login_of(&pull("host:5000/a", at("https://host:5000"))).is_some());
        assert!(login_of(&pull("busybox", at("https://index.docker.io/v1/"))).is_some());
        assert!(login_of(&pull("host:5000/a", at("elsewhere"))).is_none());
        assert!(login_of(&pull("host:5000/a", AuthConfig::default())).is_none());
        assert!(login_of(&pull("", user())).is_none());
        assert!(login_of(&PullImageRequest::default()).is_none());
    }

    #[test]
    fn logins_are_kept_where_only_root_reads() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logins.json");
        let service = ImageService::new(Path::new("/none"), &path);
        let mut body = vec![0];
        let message = pull("host:5000/a:1", user()).encode_to_vec();
        body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        body.extend(message);
        service.logins.learn(&body[..9]);
        assert!(!path.exists());
        service.logins.learn(&body);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let logins = KeptLogins::read(&path).unwrap().of("host:5000", "a");
        assert_eq!(logins, [Login::parse("me:the word").unwrap()]);
        // Another process goes on with it.
        assert_eq!(
            ImageService::new(Path::new("/none"), &path)
                .logins
                .kept
                .into_inner()
                .unwrap()
                .of("host:5000", "a"),
            logins
        );
    }
}
