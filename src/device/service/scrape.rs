//! Metrics by HTTP. In: a listening socket that a command opened, and the devices. Out: to `GET /metrics` what `tarblk stats
//! --prometheus` prints, to everything else an error; never to more than [`MOST_CONNECTIONS`] at once, and to none for longer than
//! [`CONNECTION_LIMIT`].
//!
//! The command opens the socket because the service may not: it has no right to low ports, and writes only to its own directories. Whoever
//! can connect can read; who can is decided by the address, or the permissions of the socket's file.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::AddressFamily;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::sync::Semaphore;

use crate::device::metrics;

/// So many connections are answered at once; more wait for one of them to end.
const MOST_CONNECTIONS: usize = 16;

/// How long a connection may last, however slowly it asks or reads.
const CONNECTION_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// No request's head is longer, in bytes; hyper takes no smaller limit.
const MOST_HEAD_BYTES: usize = 8192;

/// The pause after a connection that could not be accepted, because descriptors or memory are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Makes the text.
type Text = Arc<dyn Fn() -> String + Send + Sync>;

/// Where scrapers connect.
enum Listener {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

/// Answers scrapers that connect to `listener` until the other end of `until` is closed. Blocks its thread.
///
/// # Errors
/// When `listener` is no listening socket, or there is no runtime to be had.
pub(super) fn serve(listener: OwnedFd, until: UnixStream, text: Text) -> io::Result<()> {
    until.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = Listener::new(listener)?;
        let mut until = tokio::net::UnixStream::from_std(until)?;
        // Nothing is said any more on this connection: whatever comes is its end.
        let mut word = [0];
        tokio::select! {
            () = listener.answer_all(text) => {}
            _ = until.read(&mut word) => {}
        }
        Ok(())
    })
}

impl Listener {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        let family = rustix::net::sockopt::socket_domain(&socket)?;
        if family == AddressFamily::UNIX {
            let listener = std::os::unix::net::UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            tokio::net::UnixListener::from_std(listener).map(Self::Unix)
        } else {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener).map(Self::Tcp)
        }
    }

    async fn answer_all(&self, text: Text) {
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            match self.accept(Arc::clone(&text)).await {
                Ok(connection) => {
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    log::debug!("a scraper cannot be answered: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// The next connection, as what is to be done with it.
    async fn accept(&self, text: Text) -> io::Result<Pin<Box<dyn Future<Output = ()> + Send>>> {
        Ok(match self {
            Self::Tcp(listener) => Box::pin(answer(listener.accept().await?.0, text)),
            Self::Unix(listener) => Box::pin(answer(listener.accept().await?.0, text)),
        })
    }
}

/// Answers the requests of one connection.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, text: Text) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &text);
        async { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_LIMIT)
        .max_buf_size(MOST_HEAD_BYTES)
        // A scraper comes again after many seconds: a connection that waits for it would take another one's place.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = served.await {
        log::debug!("a scraper's connection ended: {error}");
    }
}

fn respond(method: &Method, path: &str, text: &Text) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (method, path) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, metrics::CONTENT_TYPE, text()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", String::new()),
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain",
            "there is only /metrics\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::thread;

    use super::*;

    fn ask(stream: &mut (impl io::Read + io::Write), request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn only_metrics_are_told_and_no_connection_holds_others_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let served = thread::spawn(move || serve(listener.into(), there, Arc::new(|| "tarblk_x 1\n".to_owned())));
        let connect = || TcpStream::connect(address).unwrap();
        // Some say nothing, some read nothing.
        let idle: Vec<_> = (1..MOST_CONNECTIONS).map(|_| connect()).collect();
        for (request, status, body) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK", "tarblk_x 1\n"),
            ("GET /metrics?x=y HTTP/1.0\r\n\r\n", "200 OK", "tarblk_x 1\n"),
            ("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK", ""),
            (
                "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
                "405 ",
                "",
            ),
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404 ", "there is only /metrics\n"),
            (
                "GET /../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
                "404 ",
                "there is only /metrics\n",
            ),
        ] {
            let answer = ask(&mut connect(), request);
            assert!(answer.contains(&format!(" {status}")), "{request}: {answer}");
            assert_eq!(answer.split("\r\n\r\n").nth(1), Some(body), "{request}: {answer}");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MOST_HEAD_BYTES));
        assert!(!ask(&mut connect(), &long).contains("200 OK"));
        // One more than there may be is answered when another one's time is over.
        let _more = connect();
        assert!(ask(&mut connect(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").contains("tarblk_x 1"));
        drop(idle);
        here.shutdown(Shutdown::Both).unwrap();
        served.join().unwrap().unwrap();
        assert!(TcpStream::connect(address).is_err());
    }

    #[test]
    fn a_unix_socket_is_listened_to_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let served = thread::spawn(move || serve(listener.into(), there, Arc::new(|| "tarblk_x 1\n".to_owned())));
        let answer = ask(
            &mut UnixStream::connect(&path).unwrap(),
            "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        );
        assert!(answer.ends_with("\r\n\r\ntarblk_x 1\n"), "{answer}");
        drop(here);
        served.join().unwrap().unwrap();
    }
}
