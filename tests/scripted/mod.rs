//! A registry that a test can script: the distribution API as far as it is used here, with a token server and an object
//! storage of its own origin, on loopback. It checks every request as a strict registry would and keeps what it was asked.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::source::registry::OCI_MANIFEST;

/// How the registry wants to be asked.
#[derive(Clone, Debug, Default)]
pub(crate) enum Door {
    /// Anybody may come in.
    #[default]
    Open,
    /// `user:password`.
    Basic(String),
    /// Tokens that live this long.
    Token(Duration),
}

/// What a test may change at any time.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) door: Door,
    /// Who gets tokens: `user:password`, or anybody.
    pub(crate) token_user: Option<String>,
    /// Which identity token is exchanged for others.
    pub(crate) identity: Option<String>,
    /// Blobs are redirected to storage by URLs that live this long.
    pub(crate) signed: Option<Duration>,
    /// Whether the signed URL says when it ends.
    pub(crate) says_when: bool,
    pub(crate) referrers_api: bool,
    /// How many referrers an answer lists at most; the rest is on the next page.
    pub(crate) referrers_page: Option<usize>,
    /// Where the next page is said to be, whatever is asked.
    pub(crate) referrers_next: Option<String>,
    /// Which digest `LazyPull-Digest` names with a blob; its own, if none.
    pub(crate) lazy: HashMap<String, String>,
    /// Every blob is said to be gone.
    pub(crate) lost: bool,
    /// Requests are read and never answered.
    pub(crate) silent: bool,
    /// Whether ranges are answered; if not, everything is sent whole.
    pub(crate) ranges: bool,
    /// A header that every request must have.
    pub(crate) wanted_header: Option<(String, String)>,
    /// What strangers are answered instead of a challenge, but for the question how to be let in.
    pub(crate) hides: Option<u16>,
    /// What requests whose method and path have these parts are answered, whatever they are.
    pub(crate) instead: Vec<Instead>,
    /// What a manifest, a blob and an upload that is begun are taken with.
    pub(crate) taken_with: [u16; 3],
    /// What is said of the digest of what was taken; the truth, if none.
    pub(crate) taken_as: Option<String>,
    /// Whether answers to HEAD say a length.
    pub(crate) head_lengths: bool,
}

/// An answer of which a test knows.
#[derive(Clone, Debug)]
pub(crate) struct Instead {
    pub(crate) method: &'static str,
    pub(crate) path: String,
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            door: Door::Open,
            token_user: None,
            identity: None,
            signed: None,
            says_when: true,
            referrers_api: true,
            referrers_page: None,
            referrers_next: None,
            lazy: HashMap::new(),
            lost: false,
            silent: false,
            ranges: true,
            wanted_header: None,
            hides: None,
            instead: Vec::new(),
            taken_with: [201, 201, 202],
            taken_as: None,
            head_lengths: true,
        }
    }
}

/// A request that came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// Whether storage was asked and not the registry.
    pub(crate) storage: bool,
    pub(crate) status: u16,
    /// How many bytes the answer's body has, if one is sent.
    pub(crate) sent: u64,
}

#[derive(Default)]
struct Held {
    rules: Rules,
    blobs: HashMap<String, Arc<[u8]>>,
    /// By repository and tag or digest.
    manifests: HashMap<(String, String), (String, Vec<u8>)>,
    /// Tokens with their ends and scopes.
    tokens: HashMap<String, (Instant, String)>,
    signatures: HashMap<String, Instant>,
    log: Vec<Asked>,
}

struct Shared {
    held: Mutex<Held>,
    counter: AtomicU64,
    /// How many connections the registry itself has accepted.
    accepted: AtomicU64,
    stopping: AtomicBool,
    registry: String,
    storage: String,
    open: Mutex<Vec<TcpStream>>,
}

/// Dropping it closes everything.
pub(crate) struct TestRegistry {
    shared: Arc<Shared>,
    addresses: [SocketAddr; 2],
}

/// What is served where, TLS included.
type Tls = Option<Arc<rustls::ServerConfig>>;

impl TestRegistry {
    pub(crate) fn start() -> Self {
        Self::start_with(&None, &None)
    }

    /// With TLS configurations, for the registry itself and for its storage.
    pub(crate) fn start_with(own: &Tls, storage: &Tls) -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let addresses = [0, 1].map(|at| listeners[at].local_addr().unwrap());
        let [own_url, storage_url] = [(own, 0), (storage, 1)].map(|(tls, at)| {
            let scheme = if tls.is_some() { "https" } else { "http" };
            format!("{scheme}://{}", addresses[at])
        });
        let shared = Arc::new(Shared {
            held: Mutex::default(),
            counter: AtomicU64::new(1),
            accepted: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            registry: own_url,
            storage: storage_url,
            open: Mutex::default(),
        });
        for (listener, (storage, tls)) in listeners.into_iter().zip([(false, own), (true, storage)]) {
            let (shared, tls) = (shared.clone(), tls.clone());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if shared.stopping.load(Ordering::SeqCst) {
                        return;
                    }
                    let (Ok(stream), shared, tls) = (stream, shared.clone(), tls.clone()) else {
                        continue;
                    };
                    if !storage {
                        shared.accepted.fetch_add(1, Ordering::SeqCst);
                    }
                    thread::spawn(move || {
                        let _ = stream.set_nodelay(true);
                        if let Ok(twin) = stream.try_clone() {
                            lock(&shared.open).push(twin);
                        }
                        // A client that hangs up ends it.
                        let _ = match tls {
                            None => converse(stream, &shared, storage),
                            Some(config) => rustls::ServerConnection::new(config)
                                .map_err(io::Error::other)
                                .and_then(|tls| converse(rustls::StreamOwned::new(tls, stream), &shared, storage)),
                        };
                    });
                }
            });
        }
        Self { shared, addresses }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        self.addresses[0].to_string()
    }

    pub(crate) fn port(&self) -> u16 {
        self.addresses[0].port()
    }

    /// `docker://127.0.0.1:PORT/NAME`.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("docker://{}/{rest}", self.host())
    }

    pub(crate) fn rules(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut lock(&self.shared.held).rules);
    }

    pub(crate) fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, bytes);
        self.put_blob_as(&digest, bytes);
        digest
    }

    /// Serves `bytes` under a digest that need not be theirs.
    pub(crate) fn put_blob_as(&self, digest: &Digest, bytes: &[u8]) {
        lock(&self.shared.held).blobs.insert(digest.to_string(), bytes.into());
    }

    pub(crate) fn remove_blob(&self, digest: &Digest) {
        lock(&self.shared.held).blobs.remove(&digest.to_string());
    }

    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, bytes);
        let mut held = lock(&self.shared.held);
        for version in [tag.to_owned(), digest.to_string()] {
            held.manifests.insert(
                (repository.to_owned(), version),
                (media_type.to_owned(), bytes.to_vec()),
            );
        }
        digest
    }

    /// Puts an image of these layers there, each as its tar, its blob and that one's media type.
    pub(crate) fn put_image(&self, repository: &str, tag: &str, layers: &[(&[u8], &[u8], &str)]) -> Digest {
        let put = |bytes: &[u8], media_type: &str| {
            let digest = self.put_blob(bytes).to_string();
            serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
        };
        let diff_ids: Vec<_> = layers
            .iter()
            .map(|(tar, ..)| Digest::of(Algorithm::Sha256, tar).to_string())
            .collect();
        let rootfs = serde_json::json!({ "type": "layers", "diff_ids": diff_ids });
        // The author, so that images of the same layers are different ones.
        let config =
            serde_json::json!({ "architecture": "amd64", "os": "linux", "author": repository, "rootfs": rootfs });
        let config = put(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        );
        let layers: Vec<_> = layers
            .iter()
            .map(|(_, blob, media_type)| put(blob, media_type))
            .collect();
        let manifest =
            serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        self.put_manifest(repository, tag, OCI_MANIFEST, manifest.to_string().as_bytes())
    }

    /// How many connections came to the registry itself.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Makes all tokens invalid, as a restarted server does.
    pub(crate) fn forget_tokens(&self) {
        lock(&self.shared.held).tokens.clear();
    }

    /// What was asked since the last time, but for the fallback tag of referrers where there is an API: that is asked for beside
    /// the API and nobody waits for it, so that it may come at any later time.
    pub(crate) fn take_log(&self) -> Vec<Asked> {
        std::mem::take(&mut lock(&self.shared.held).log)
    }

    /// Stops answering, closing what is open.
    pub(crate) fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for stream in lock(&self.shared.open).drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        for address in self.addresses {
            // Wakes accept(2).
            let _ = TcpStream::connect(address);
        }
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Arc<[u8]>,
}

fn answer(status: u16, headers: &[(&'static str, &str)], body: &[u8]) -> Answer {
    Answer {
        status,
        headers: headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect(),
        body: body.into(),
    }
}

/// A blob, which is not copied.
fn whole(headers: &[(&'static str, &str)], blob: &Arc<[u8]>) -> Answer {
    Answer {
        body: Arc::clone(blob),
        ..answer(200, headers, b"")
    }
}

fn error(status: u16, code: &str) -> Answer {
    let body = format!(r#"{{"errors":[{{"code":"{code}","message":"no: {code}"}}]}}"#);
    answer(status, &[("Content-Type", "application/json")], body.as_bytes())
}

fn converse<S: Read + Write>(stream: S, shared: &Shared, storage: bool) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default();
        // A proxy is told the whole URL.
        let target = match target.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
            None => target,
        };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let len = headers
            .get("content-length")
            .and_then(|len| len.parse().ok())
            .unwrap_or(0);
        let mut body = vec![0; len];
        stream.read_exact(&mut body)?;
        while lock(&shared.held).rules.silent && !shared.stopping.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        let mut asked = Asked {
            method,
            path: path.to_owned(),
            query: query.to_owned(),
            headers,
            body,
            storage,
            status: 0,
            sent: 0,
        };
        let mut answer = if storage {
            from_storage(&asked, shared)
        } else {
            from_registry(&asked, shared)
        };
        if answer.status == 200 && asked.method == "GET" && lock(&shared.held).rules.ranges {
            cut(&mut answer, asked.headers.get("range"));
        }
        asked.status = answer.status;
        let head_only = asked.method == "HEAD";
        if !head_only {
            asked.sent = u64::try_from(answer.body.len()).unwrap();
        }
        let is_fallback = asked.path.contains("/manifests/sha256-");
        if !is_fallback || !lock(&shared.held).rules.referrers_api {
            lock(&shared.held).log.push(asked);
        }
        let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
        if !head_only || lock(&shared.held).rules.head_lengths {
            let _infallible = write!(head, "Content-Length: {}\r\n", answer.body.len());
        } else {
            head.push_str("Transfer-Encoding: chunked\r\n");
        }
        for (name, value) in &answer.headers {
            let _infallible = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        let stream = stream.get_mut();
        stream.write_all(head.as_bytes())?;
        if !head_only {
            stream.write_all(&answer.body)?;
        }
        stream.flush()?;
    }
}

/// Answers a range of the body.
fn cut(answer: &mut Answer, range: Option<&String>) {
    let Some((first, last)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return;
    };
    let total = answer.body.len();
    let first: usize = first.parse().unwrap();
    let end = last.parse::<usize>().map_or(total, |last| total.min(last + 1));
    if first >= end {
        answer.status = 416;
        answer.headers.push(("Content-Range", format!("bytes */{total}")));
        answer.body = [].into();
        return;
    }
    answer.status = 206;
    answer
        .headers
        .push(("Content-Range", format!("bytes {first}-{}/{total}", end - 1)));
    answer.body = answer.body[first..end].into();
}

fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn from_storage(asked: &Asked, shared: &Shared) -> Answer {
    let held = lock(&shared.held);
    // As real ones do: two ways to be let in at once are a mistake.
    if asked.headers.contains_key("authorization") {
        return error(400, "TWO_AUTHORIZATIONS");
    }
    let signature = parameter(&asked.query, "X-Amz-Signature").unwrap_or_default();
    if held
        .signatures
        .get(&signature)
        .is_none_or(|until| Instant::now() >= *until)
    {
        return error(403, "EXPIRED");
    }
    match held.blobs.get(asked.path.trim_start_matches('/')) {
        Some(bytes) => whole(&[], bytes),
        None => error(404, "GONE"),
    }
}

fn from_registry(asked: &Asked, shared: &Shared) -> Answer {
    let mut held = lock(&shared.held);
    if let Some((name, value)) = &held.rules.wanted_header
        && asked.headers.get(name) != Some(value)
    {
        return error(400, "HEADER");
    }
    if asked.path == "/token" {
        return token(asked, shared, &mut held);
    }
    let Some(path) = asked.path.strip_prefix("/v2/") else {
        return error(404, "PATH");
    };
    let parts = ["/manifests/", "/blobs/", "/referrers/"].iter().find_map(|kind| {
        path.rsplit_once(kind)
            .map(|(repository, rest)| (repository, *kind, rest))
    });
    let write = !matches!(asked.method.as_str(), "GET" | "HEAD");
    let is_meant = |instead: &&Instead| instead.method == asked.method && asked.path.contains(&instead.path);
    if let Some(instead) = held.rules.instead.iter().rfind(is_meant) {
        let kind = [("Content-Type", instead.content_type), ("Location", "/login")];
        return answer(instead.status, &kind, instead.body.as_bytes());
    }
    let repository = parts.map_or("", |(repository, ..)| repository);
    if let (Some(status), true, false) = (
        held.rules.hides,
        parts.is_some(),
        asked.headers.contains_key("authorization"),
    ) {
        return error(status, "HIDDEN");
    }
    if let Some(refusal) = at_the_door(asked, shared, &held, repository, write) {
        return refusal;
    }
    let Some((repository, kind, rest)) = parts else {
        return answer(200, &[], b"{}");
    };
    match (asked.method.as_str(), kind) {
        ("GET" | "HEAD", "/manifests/") => match held.manifests.get(&(repository.to_owned(), rest.to_owned())) {
            Some((media_type, bytes)) => {
                let digest = Digest::of(Algorithm::Sha256, bytes).to_string();
                answer(
                    200,
                    &[("Content-Type", media_type), ("Docker-Content-Digest", &digest)],
                    bytes,
                )
            }
            None => error(404, "MANIFEST_UNKNOWN"),
        },
        ("PUT", "/manifests/") => put_manifest(asked, &mut held, repository, rest),
        ("GET" | "HEAD", "/blobs/") => get_blob(shared, &mut held, rest),
        ("POST", "/blobs/") => match parameter(&asked.query, "mount") {
            Some(mounted) if held.blobs.contains_key(&mounted) => answer(201, &[], b""),
            _ => {
                let place = format!("/v2/{repository}/blobs/uploads/1?state=x%3Dy");
                answer(held.rules.taken_with[2], &[("Location", &place)], b"")
            }
        },
        ("PUT", "/blobs/") => {
            let digest: Digest = parameter(&asked.query, "digest").unwrap().parse().unwrap();
            if !digest.matches(&asked.body) || parameter(&asked.query, "state").as_deref() != Some("x=y") {
                return error(400, "DIGEST_INVALID");
            }
            held.blobs.insert(digest.to_string(), asked.body.as_slice().into());
            let said = held.rules.taken_as.clone().unwrap_or_else(|| digest.to_string());
            answer(held.rules.taken_with[1], &[("Docker-Content-Digest", &said)], b"")
        }
        ("GET", "/referrers/") if held.rules.referrers_api => referrers(&held, repository, rest, &asked.query),
        _ => error(404, "UNSUPPORTED"),
    }
}

fn get_blob(shared: &Shared, held: &mut Held, digest: &str) -> Answer {
    let Some(bytes) = held.blobs.get(digest).filter(|_| !held.rules.lost).cloned() else {
        return error(404, "BLOB_UNKNOWN");
    };
    let lazy = held
        .rules
        .lazy
        .get(digest)
        .cloned()
        .unwrap_or_else(|| digest.to_owned());
    let Some(life) = held.rules.signed else {
        return whole(&[("LazyPull-Digest", &lazy)], &bytes);
    };
    let signature = shared.counter.fetch_add(1, Ordering::Relaxed).to_string();
    held.signatures.insert(signature.clone(), Instant::now() + life);
    let mut place = format!("{}/{digest}?X-Amz-Signature={signature}", shared.storage);
    if held.rules.says_when {
        let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap();
        let date = now.strftime("%Y%m%dT%H%M%SZ");
        place = format!("{place}&X-Amz-Date={date}&X-Amz-Expires={}", life.as_secs());
    }
    answer(307, &[("Location", &place), ("LazyPull-Digest", &lazy)], b"")
}

fn put_manifest(asked: &Asked, held: &mut Held, repository: &str, version: &str) -> Answer {
    let digest = Digest::of(Algorithm::Sha256, &asked.body).to_string();
    if version.contains(':') && version != digest {
        return error(400, "DIGEST_INVALID");
    }
    let media_type = asked.headers["content-type"].clone();
    for version in [version.to_owned(), digest.clone()] {
        held.manifests.insert(
            (repository.to_owned(), version),
            (media_type.clone(), asked.body.clone()),
        );
    }
    let json: serde_json::Value = serde_json::from_slice(&asked.body).unwrap();
    let said = held.rules.taken_as.clone().unwrap_or(digest);
    let mut headers = vec![("Docker-Content-Digest", said)];
    if held.rules.referrers_api && json["subject"].is_object() {
        headers.push(("OCI-Subject", json["subject"]["digest"].as_str().unwrap().to_owned()));
    }
    Answer {
        status: held.rules.taken_with[0],
        headers,
        body: [].into(),
    }
}

fn referrers(held: &Held, repository: &str, subject: &str, query: &str) -> Answer {
    let mut seen = HashSet::new();
    let mut listed = Vec::new();
    for ((name, _), (media_type, bytes)) in &held.manifests {
        let json: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        let digest = Digest::of(Algorithm::Sha256, bytes).to_string();
        if name == repository && json["subject"]["digest"] == subject && seen.insert(digest.clone()) {
            listed.push(
                serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len(),
                "artifactType": json["artifactType"], "annotations": json["annotations"] }),
            );
        }
    }
    listed.sort_by_key(|entry| entry["digest"].to_string());
    let from = parameter(query, "from").map_or(0, |from| from.parse().unwrap());
    let end = held.rules.referrers_page.map_or(listed.len(), |page| from + page);
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": listed[from..end.min(listed.len())] }).to_string();
    let kind = "application/vnd.oci.image.index.v1+json";
    let next = held.rules.referrers_next.clone();
    let next =
        next.or_else(|| (end < listed.len()).then(|| format!("/v2/{repository}/referrers/{subject}?from={end}")));
    match next {
        Some(next) => {
            let link = format!("<{next}>; rel=\"next\"");
            answer(200, &[("Content-Type", kind), ("Link", &link)], index.as_bytes())
        }
        None => answer(200, &[("Content-Type", kind)], index.as_bytes()),
    }
}

/// What to say to somebody who may not come in.
fn at_the_door(asked: &Asked, shared: &Shared, held: &Held, repository: &str, write: bool) -> Option<Answer> {
    let shown = asked.headers.get("authorization").map_or("", String::as_str);
    let challenge = match &held.rules.door {
        Door::Open => return None,
        Door::Basic(pair) => {
            if shown == format!("Basic {}", STANDARD.encode(pair)) {
                return None;
            }
            "Basic realm=\"test\"".to_owned()
        }
        Door::Token(_) => {
            let scope = format!("repository:{repository}:{}", if write { "pull,push" } else { "pull" });
            let token = shown.strip_prefix("Bearer ").and_then(|token| held.tokens.get(token));
            let enough = |granted: &str| granted == scope || granted == format!("repository:{repository}:pull,push");
            if token.is_some_and(|(until, granted)| Instant::now() < *until && enough(granted)) {
                return None;
            }
            format!(
                "Bearer realm=\"{}/token\",service=\"test registry\",scope=\"{scope}\"",
                shared.registry
            )
        }
    };
    let mut refusal = error(401, "UNAUTHORIZED");
    refusal.headers.push(("WWW-Authenticate", challenge));
    Some(refusal)
}

fn token(asked: &Asked, shared: &Shared, held: &mut Held) -> Answer {
    let Door::Token(life) = held.rules.door else {
        return error(404, "NO_TOKENS");
    };
    let posted = String::from_utf8(asked.body.clone()).unwrap();
    let query = if asked.method == "POST" { &posted } else { &asked.query };
    if parameter(query, "service").as_deref() != Some("test registry") {
        return error(400, "SERVICE");
    }
    let shown = asked.headers.get("authorization").map_or("", String::as_str);
    let welcome = match (&held.rules.token_user, &held.rules.identity) {
        (_, Some(identity)) => {
            asked.method == "POST"
                && parameter(query, "grant_type").as_deref() == Some("refresh_token")
                && parameter(query, "refresh_token").as_ref() == Some(identity)
        }
        (Some(pair), None) => shown == format!("Basic {}", STANDARD.encode(pair)),
        (None, None) => shown.is_empty(),
    };
    if !welcome {
        return error(401, "WHO_ARE_YOU");
    }
    let token = format!("secret-token-{}", shared.counter.fetch_add(1, Ordering::Relaxed));
    let scope = parameter(query, "scope").unwrap();
    held.tokens.insert(token.clone(), (Instant::now() + life, scope));
    let body = format!(r#"{{"token":"{token}","expires_in":{}}}"#, life.as_secs());
    answer(200, &[("Content-Type", "application/json")], body.as_bytes())
}
