//! A registry as clouds run one: in front of it something that sends those who ask for a blob on to object storage, by a URL
//! whose signature is good for two seconds. Everything else passes through.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufReader, Read, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Registry;
use super::http::{Body, Reply, Request, Server, file_reply, find, read_head};

/// How long a URL is good.
pub(crate) const URL_LIFETIME: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Counts {
    redirects: AtomicU64,
    served: AtomicU64,
    expired: AtomicU64,
    leaks: AtomicU64,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Blob requests that were sent on.
    pub(crate) redirects: u64,
    /// Answers of the storage with bytes.
    pub(crate) served: u64,
    /// Answers 403, to a URL past its time.
    pub(crate) expired: u64,
    /// Requests to the storage that brought an `Authorization` header, which is none of its business. Answered 400, as
    /// S3 does.
    pub(crate) leaks: u64,
}

/// The front and the storage behind it, two servers on two ports; they end when this is dropped.
#[derive(Debug)]
pub(crate) struct Front {
    server: Server,
    _storage: Server,
    counts: Arc<Counts>,
    announced: Announced,
}

/// Which blob is announced as the index of which.
type Announced = Arc<Mutex<HashMap<String, String>>>;

/// Which signatures are good until when, and for what.
type Signatures = Arc<Mutex<HashMap<String, (String, Instant)>>>;

impl Front {
    pub(crate) fn start(registry: &Registry) -> Self {
        assert!(!registry.is_tls(), "the front speaks plain HTTP to what is behind it");
        let counts = Arc::new(Counts::default());
        let signatures = Signatures::default();
        let blobs = registry.dir().join("storage/docker/registry/v2/blobs/sha256");
        let (seen, known) = (Arc::clone(&counts), Arc::clone(&signatures));
        let storage = Server::start(move |request| {
            if request.header("authorization").is_some() {
                seen.leaks.fetch_add(1, Ordering::SeqCst);
                return Reply::new(400, "<Error><Code>InvalidArgument</Code></Error>");
            }
            let signature = request.query("X-Signature").pop().unwrap_or_default();
            let good = known.lock().unwrap().get(&signature).cloned();
            let hex = request.path().trim_start_matches('/').to_owned();
            match good {
                Some((blob, until)) if blob == hex && Instant::now() < until => {
                    seen.served.fetch_add(1, Ordering::SeqCst);
                    match File::open(blobs.join(&hex[..2]).join(&hex).join("data")) {
                        Ok(file) => file_reply(request, file),
                        Err(_) => Reply::new(404, "<Error><Code>NoSuchKey</Code></Error>"),
                    }
                }
                _ => {
                    seen.expired.fetch_add(1, Ordering::SeqCst);
                    Reply::new(
                        403,
                        "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
                    )
                }
            }
        });
        let (behind, storage_host, seen) = (registry.port, storage.host(), Arc::clone(&counts));
        let announced = Announced::default();
        let told = Arc::clone(&announced);
        let server = Server::start(move |request| {
            let blob = request
                .path()
                .rsplit_once("/blobs/sha256:")
                .filter(|_| request.method == "GET")
                .map(|(_, hex)| hex.to_owned());
            let mut reply = pass_on(request, behind);
            if request.method == "HEAD"
                && let Some((_, hex)) = request.path().rsplit_once("/blobs/sha256:")
                && let Some(index) = told.lock().unwrap().get(&format!("sha256:{hex}"))
            {
                reply = reply.with("LazyPull-Digest", index.clone());
            }
            let (Some(hex), 200 | 206) = (blob, reply.status) else {
                return reply;
            };
            let number = seen.redirects.fetch_add(1, Ordering::SeqCst);
            let signature = format!("{number:x}-of-a-test");
            let until = Instant::now() + URL_LIFETIME;
            signatures
                .lock()
                .unwrap()
                .insert(signature.clone(), (hex.clone(), until));
            Reply::new(307, "").with(
                "Location",
                format!("http://{storage_host}/{hex}?X-Expires=2&X-Signature={signature}"),
            )
        });
        Self {
            server,
            _storage: storage,
            counts,
            announced,
        }
    }

    /// `127.0.0.1:PORT`: for clients, the registry.
    pub(crate) fn host(&self) -> String {
        self.server.host()
    }

    /// How `tarblk` writes an image of the registry behind it.
    pub(crate) fn image(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.host())
    }

    /// From now on a `HEAD` of a layer says in its header `LazyPull-Digest` which blob of the same repository is its index.
    pub(crate) fn announce(&self, layer: &str, index: &str) {
        self.announced
            .lock()
            .unwrap()
            .insert(layer.to_owned(), index.to_owned());
    }

    /// What a command has to be told to get in with the credentials of the registry behind it.
    pub(crate) fn arguments(&self, registry: &Registry) -> Vec<OsString> {
        let file = registry.dir().join("front-auth.json");
        std::fs::write(&file, super::auths(&self.host())).unwrap();
        vec!["--authfile".into(), file.into(), "--plain-http".into()]
    }

    pub(crate) fn seen(&self) -> Seen {
        let load = |count: &AtomicU64| count.load(Ordering::SeqCst);
        Seen {
            redirects: load(&self.counts.redirects),
            served: load(&self.counts.served),
            expired: load(&self.counts.expired),
            leaks: load(&self.counts.leaks),
        }
    }
}

/// One request on a connection of its own; the answer as it is.
fn pass_on(request: &Request, port: u16) -> Reply {
    let send = || -> std::io::Result<Reply> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut head = format!(
            "{} {} HTTP/1.1\r\nConnection: close\r\n",
            request.method, request.target
        );
        for (name, value) in &request.headers {
            let hop = ["connection", "content-length", "transfer-encoding", "expect"];
            if !hop.contains(&name.to_ascii_lowercase().as_str()) {
                let _ = write!(head, "{name}: {value}\r\n");
            }
        }
        let _ = write!(head, "Content-Length: {}\r\n\r\n", request.body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(&request.body)?;
        let mut reader = BufReader::new(stream);
        let (start, mut headers) = read_head(&mut reader)?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let status = start
            .split(' ')
            .nth(1)
            .and_then(|word| word.parse().ok())
            .unwrap_or(502);
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("connection"));
        if request.method == "HEAD" || find(&headers, "content-length").is_some() {
            let body = Body::Stream(Box::new(reader));
            if find(&headers, "content-length").is_none() {
                headers.push(("Content-Length".to_owned(), "0".to_owned()));
            }
            return Ok(Reply { status, headers, body });
        }
        // Chunked: only short answers are, and of those only Go's that do not know their length.
        let chunked = find(&headers, "transfer-encoding").is_some();
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("transfer-encoding"));
        let mut body = Vec::new();
        if chunked {
            super::http::read_chunks(&mut reader, &mut body)?;
        } else {
            reader.read_to_end(&mut body)?;
        }
        Ok(Reply {
            status,
            headers,
            body: Body::Bytes(body),
        })
    };
    send().unwrap_or_else(|e| Reply::new(502, e.to_string()))
}
