//! Where servers may lead: not from outside to this machine or into private networks, unless a person says so. In a network of
//! its own, whose loopback device has a public address as well.

#![allow(clippy::print_stderr, reason = "the outer test shows what the inner one says")]

mod fetched;
mod lab;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fetched::{joined, quick, range, u};
use lab::{Lab, have, root, skip, text};
use tarblk::internals::fetch::{FetchError, FetchOptions, Fetcher, LayerSource};
use tarblk::internals::source::{Blob, Place, UrlBlob};

const INSIDE: &str = "TARBLK_TEST_NETWORK";
/// An address of documents, which counts as public and is nowhere else.
const PUBLIC: &str = "203.0.113.7";

/// Runs the test `name` in a network and with a /etc/hosts of its own; whether this is that run.
fn in_a_network(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !root(name) {
        return false;
    }
    if !have("unshare") || !have("ip") {
        skip(name, "no unshare or ip");
        return false;
    }
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("hosts");
    fs::write(
        &hosts,
        format!("127.0.0.1 localhost inner.test\n{PUBLIC} public.test both.test\n127.0.0.1 both.test\n"),
    )
    .unwrap();
    let script = format!(
        "set -e; ip link set lo up; ip address add {PUBLIC}/32 dev lo; mount --bind \"$1\" /etc/hosts; shift; exec \"$@\""
    );
    let status = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", &script, "sh"])
        .arg(&hosts)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .envs(
            [
                "http_proxy",
                "https_proxy",
                "all_proxy",
                "HTTP_PROXY",
                "HTTPS_PROXY",
                "ALL_PROXY",
            ]
            .map(|name| (name, "")),
        )
        .status()
        .unwrap();
    assert!(status.success(), "{name}: {status}");
    false
}

/// A server that has a layer, leads wherever its path says, and wants a token for its registry.
struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `realm` is its token server.
    fn start(address: &str, layer: &[u8], realm: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, layer, realm) = (asked.clone(), Arc::new(layer.to_vec()), realm.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, layer, realm) = (log.clone(), layer.clone(), realm.clone());
                std::thread::spawn(move || while answer(stream.as_ref().unwrap(), &log, &layer, &realm).is_some() {});
            }
        });
        Self { port, asked }
    }

    fn asked(&self) -> usize {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.len()
    }
}

/// Answers one request; none at the connection's end.
fn answer(mut stream: &TcpStream, log: &Mutex<Vec<String>>, layer: &[u8], realm: &str) -> Option<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1)?.to_owned();
    log.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
    let (head, body) = if let Some(to) = path.strip_prefix("/to/") {
        (format!("307 Temporary Redirect\r\nLocation: http://{to}"), &[][..])
    } else if path.starts_with("/v2/") {
        let challenge = format!("Bearer realm=\"{realm}\",service=\"test\"");
        (format!("401 Unauthorized\r\nWWW-Authenticate: {challenge}"), &[][..])
    } else if path.starts_with("/token") {
        ("200 OK".to_owned(), &b"{\"token\":\"word\"}"[..])
    } else {
        let lower = head.to_ascii_lowercase();
        let asked = lower
            .split("range: bytes=")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next());
        match asked.and_then(|asked| asked.split_once('-')) {
            Some((from, to)) => {
                let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
                let range = format!(
                    "206 Partial Content\r\nContent-Range: bytes {from}-{to}/{}",
                    layer.len()
                );
                (range, layer.get(from..=to)?)
            }
            None => ("200 OK".to_owned(), layer),
        }
    };
    write!(stream, "HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
    stream.write_all(body).ok()
}

#[test]
fn commands_are_not_led_inside() {
    if !in_a_network("commands_are_not_led_inside") {
        return;
    }
    let lab = Lab::new();
    let layer = fs::read(lab.path("layer.tar")).unwrap();
    let inner = Server::start("127.0.0.1", &layer, "");
    let outer = Server::start(PUBLIC, &layer, &format!("http://inner.test:{}/token", inner.port));
    let other = Server::start(PUBLIC, &layer, "");
    let ls = |name: &str, environment: Option<(&str, &str)>, options: &[&str]| -> Output {
        lab.tarblk()
            .env_remove("TARBLK_ALLOW_PRIVATE_REDIRECTS")
            .envs(environment)
            .args(["ls", name])
            .args(options)
            .output()
            .unwrap()
    };
    let through = |to: &str| format!("http://public.test:{}/to/{to}:{}/layer.tar", outer.port, inner.port);
    for to in ["127.0.0.1", "inner.test", "localhost", "[::ffff:127.0.0.1]", "0x7f.1"] {
        let output = ls(&through(to), None, &[]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{to}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains("public.test") && said.contains("--allow-private-redirects"),
            "{said}"
        );
        let host = reqwest_host(to);
        assert!(said.contains(&host), "{to} ({host}): {said}");
    }
    assert_eq!(inner.asked(), 0, "nothing may be sent inside");
    // Of a name's addresses those that are outside will do; there the connection is refused.
    let said = text(&ls(&through("both.test"), None, &["--retry-for", "0s"]).stderr);
    assert!(said.contains("both.test") && !said.contains("private"), "{said}");
    assert_eq!(inner.asked(), 0, "nothing may be sent inside");
    // Another server outside.
    let elsewhere = format!("http://public.test:{}/to/{PUBLIC}:{}/layer.tar", outer.port, other.port);
    assert!(ls(&elsewhere, None, &[]).status.success());
    // Over it back inside.
    let around = format!(
        "http://public.test:{}/to/public.test:{}/to/inner.test:{}/layer.tar",
        outer.port, other.port, inner.port
    );
    assert_eq!(ls(&around, None, &[]).status.code(), Some(1));
    // A token server is named by a stranger too.
    let image = format!("docker://public.test:{}/image:1", outer.port);
    let output = ls(&image, None, &["--plain-http", "--creds", "me:word"]);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("inner.test"), "{said}");
    assert!(
        said.contains("--allow-private-redirects") && !said.contains("word"),
        "{said}"
    );
    assert_eq!(inner.asked(), 0, "nothing may be sent inside");
    // Unless a person says so.
    assert!(
        ls(&through("inner.test"), None, &["--allow-private-redirects"])
            .status
            .success()
    );
    let said = Some(("TARBLK_ALLOW_PRIVATE_REDIRECTS", "1"));
    assert!(ls(&through("127.0.0.1"), said, &[]).status.success());
    let before = inner.asked();
    ls(&image, None, &["--plain-http", "--allow-private-redirects"]);
    assert!(inner.asked() > before, "the token server was not asked");
    // Or the server that was named lies inside itself.
    let inside = format!("http://inner.test:{}/to/127.0.0.1:{}/layer.tar", inner.port, inner.port);
    assert!(ls(&inside, None, &[]).status.success());
}

/// A host as URLs have it.
fn reqwest_host(host: &str) -> String {
    let url: url::Url = format!("http://{host}/").parse().unwrap();
    url.host_str().unwrap().to_owned()
}

/// The fetch thread has another client, which meets redirects that were not there when the layer was found.
#[test]
fn the_fetcher_is_not_led_inside() {
    if !in_a_network("the_fetcher_is_not_led_inside") {
        return;
    }
    let layer: Vec<u8> = (0..100_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let inner = Server::start("127.0.0.1", &layer, "");
    let outer = Server::start(PUBLIC, &layer, "");
    let read = |host: &str, to: &str, allowed: bool| {
        let port = if host == "inner.test" { inner.port } else { outer.port };
        let url = format!("http://{host}:{port}/to/{to}:{}/layer.tar", inner.port);
        let mut at = UrlBlob::new(&url.parse().unwrap());
        at.private_redirects = allowed;
        let blob = Blob {
            place: Place::Url(at),
            name: url,
            len: u(layer.len()),
        };
        let options = FetchOptions {
            deadline: Duration::from_secs(1),
            ..quick()
        };
        let fetcher = Fetcher::start(vec![LayerSource::from(blob)], options, None).unwrap();
        fetcher.read_blocking(vec![range(4096, 4096)])
    };
    for to in ["127.0.0.1", "inner.test", "localhost"] {
        let error = read("public.test", to, false).unwrap_err();
        let said = error.to_string();
        assert!(matches!(error, FetchError::WrongAnswer { .. }), "{said}");
        assert!(
            said.contains("public.test") && said.contains(&format!("{to}:")),
            "{said}"
        );
        assert!(said.contains("--allow-private-redirects"), "{said}");
    }
    assert_eq!(inner.asked(), 0, "nothing may be sent inside");
    for (host, to, allowed) in [
        ("public.test", "127.0.0.1", true),
        ("public.test", "inner.test", true),
        ("inner.test", "localhost", false),
    ] {
        let bytes = read(host, to, allowed).unwrap_or_else(|error| panic!("{host} {to}: {error}"));
        assert!(joined(&bytes) == layer[4096..8192], "{host} {to}");
    }
}
