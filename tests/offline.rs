//! Without a server: what a tag or a URL meant is remembered, what is kept is enough, and what is missing is said.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::rawtar::RawTar;
use common::session::Session;
use scripted::TestRegistry;
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::source::registry::OCI_MANIFEST;

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn tar(word: &str) -> Vec<u8> {
    RawTar::new()
        .dir(b"etc/")
        .file(b"etc/word", word.as_bytes())
        .file(b"etc/big", &vec![b'x'; 300_000])
        .end()
        .0
}

/// Puts an image of one plain layer under a tag; its manifest's digest.
fn put_image(registry: &TestRegistry, tag: &str, word: &str) -> Digest {
    let digest = |bytes: &[u8]| Digest::of(Algorithm::Sha256, bytes).to_string();
    let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() });
    let layer = tar(word);
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] } });
    let config = config.to_string().into_bytes();
    registry.put_blob(&config);
    registry.put_blob(&layer);
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"), "layers": [descriptor(&layer, PLAIN)] });
    registry.put_manifest("app", tag, OCI_MANIFEST, manifest.to_string().as_bytes())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `tarblk ls` with options that make it independent of this machine.
fn ls(session: &Session, name: &str, more: &[&str]) -> Output {
    let base = ["ls", name, "--platform", "linux/amd64", "--hosts-dir", "/nonexistent"];
    session.run(&[&base[..], more].concat())
}

#[test]
fn a_tag_means_what_it_meant_when_nobody_can_say_more() {
    let registry = TestRegistry::start();
    let digest = put_image(&registry, "1", "one");
    put_image(&registry, "2", "two");
    let session = Session::new("loop");
    let (name, other) = (registry.name("app:1"), registry.name("app:2"));
    // Nothing is asked, so nothing is there.
    let never = ls(&session, &name, &["--pull", "never"]);
    assert!(
        !never.status.success() && said(&never).contains("not kept here"),
        "{}",
        said(&never)
    );
    assert_eq!(registry.take_log().len(), 0);
    let first = ls(&session, &name, &[]);
    assert!(first.status.success(), "{}", said(&first));
    // Asked each time, unless it need not be.
    registry.take_log();
    for (policy, questions) in [("newer", 1), ("always", 1), ("missing", 0), ("never", 0)] {
        let again = ls(&session, &name, &["--pull", policy]);
        assert_eq!(again.stdout, first.stdout, "{policy}: {}", said(&again));
        assert_eq!(registry.take_log().len(), questions, "{policy}");
    }
    // A tag that moves is followed.
    put_image(&registry, "1", "a longer word");
    assert_ne!(ls(&session, &name, &[]).stdout, first.stdout);
    assert_ne!(ls(&session, &name, &["--pull", "never"]).stdout, first.stdout);
    assert_eq!(put_image(&registry, "1", "one"), digest);
    assert_eq!(ls(&session, &name, &[]).stdout, first.stdout);

    registry.stop();
    let offline = ls(&session, &name, &[]);
    let words = said(&offline);
    assert_eq!(offline.stdout, first.stdout, "{words}");
    let line = words
        .lines()
        .find(|line| line.contains("using what"))
        .unwrap_or_else(|| panic!("{words}"));
    assert!(line.contains("cannot connect") && line.contains(&name), "{words}");
    assert!(line.contains(&digest.to_string()) && line.contains(" UTC, "), "{words}");
    // Its headers alone were read.
    assert!(line.contains("not kept whole"), "{words}");
    let strict = ls(&session, &name, &["--pull", "always"]);
    assert!(!strict.status.success(), "{}", said(&strict));
    // What was never here is not.
    for policy in ["newer", "missing", "never"] {
        let never = ls(&session, &other, &["--pull", policy]);
        assert!(!never.status.success(), "{policy}");
    }
    // Everything in the cache can be deleted.
    session.empty_cache();
    assert!(!ls(&session, &name, &[]).status.success());
}

#[test]
fn an_image_that_is_kept_whole_is_mounted_and_read_without_its_registry() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip(
            "an_image_that_is_kept_whole_is_mounted_and_read_without_its_registry",
            why,
        );
    }
    let registry = TestRegistry::start();
    put_image(&registry, "1", "one");
    let name = registry.name("app:1");
    let mut session = Session::new("loop");
    let more = ["--platform", "linux/amd64", "--hosts-dir", "/nonexistent"].map(Into::into);
    let dir = session.mount_with(&name, &more);
    assert_eq!(std::fs::read(dir.join("etc/big")).unwrap().len(), 300_000);
    assert_eq!(std::fs::read(dir.join("etc/word")).unwrap(), b"one");
    session.umount();
    registry.stop();
    let dir = session.dir().join("again");
    std::fs::create_dir(&dir).unwrap();
    let base = ["mount", &name, dir.to_str().unwrap(), "--backend", "loop"];
    let mounted = session.run(&[&base[..], &["--platform", "linux/amd64", "--hosts-dir", "/nonexistent"]].concat());
    let words = said(&mounted);
    assert!(mounted.status.success(), "{words}");
    assert!(
        words.contains("using what") && words.contains(", kept whole"),
        "{words}"
    );
    assert_eq!(std::fs::read(dir.join("etc/big")).unwrap().len(), 300_000);
    assert_eq!(std::fs::read(dir.join("etc/word")).unwrap(), b"one");
    session.succeed(&[OsStr::new("umount"), dir.as_os_str()]);
}

/// A web server of one file, whose entity tag is its content's digest.
struct WebServer {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
}

impl WebServer {
    fn start(file: Vec<u8>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let stopping = Arc::new(AtomicBool::new(false));
        let (stop, file) = (stopping.clone(), Arc::new(file));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (file, stop) = (file.clone(), stop.clone());
                std::thread::spawn(move || drop(answer(&stream.unwrap(), &file, &stop)));
            }
        });
        Self { address, stopping }
    }

    fn url(&self) -> String {
        format!("http://{}/layer.tar", self.address)
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn answer(stream: &TcpStream, file: &[u8], stop: &AtomicBool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let tag = Digest::of(Algorithm::Sha256, file).to_string();
    loop {
        let mut range = None;
        loop {
            let Some(line) = lines.next() else { return Ok(()) };
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
        }
        if stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let (first, last) = range
            .as_deref()
            .and_then(|range| range.split_once('-'))
            .unwrap_or(("0", ""));
        let first: usize = first.parse().unwrap();
        let end = last
            .parse::<usize>()
            .map_or(file.len(), |last| file.len().min(last + 1));
        let mut stream = stream;
        write!(
            stream,
            "HTTP/1.1 206 X\r\nContent-Length: {}\r\nETag: \"{tag}\"\r\nContent-Range: bytes {first}-{}/{}\r\n\r\n",
            end - first,
            end - 1,
            file.len()
        )?;
        stream.write_all(&file[first..end])?;
    }
}

#[test]
fn a_url_whose_layer_is_kept_needs_no_server() {
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("a_url_whose_layer_is_kept_needs_no_server", why);
    }
    let server = WebServer::start(tar("from the web"));
    let mut session = Session::new("loop");
    let dir = session.mount_with(server.url(), &[]);
    std::fs::read(dir.join("etc/big")).unwrap();
    assert_eq!(std::fs::read(dir.join("etc/word")).unwrap(), b"from the web");
    session.umount();
    server.stop();
    let strict = session.try_mount(server.url(), &["--pull".into(), "always".into()]);
    assert!(said(&strict.unwrap_err()).contains("cannot connect"));
    for policy in ["newer", "missing", "never"] {
        let dir = session.mount_with(server.url(), &["--pull".into(), policy.into()]);
        assert_eq!(std::fs::read(dir.join("etc/word")).unwrap(), b"from the web");
        assert_eq!(std::fs::read(dir.join("etc/big")).unwrap().len(), 300_000);
        session.umount();
    }
    let absent = session.try_mount(format!("{}x", server.url()), &["--pull".into(), "never".into()]);
    assert!(said(&absent.unwrap_err()).contains("not kept here"));
}

#[test]
fn tries_are_told_while_they_last() {
    // Nothing listens there.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let session = Session::new("loop");
    let tried = ls(&session, &format!("docker://{address}/app:1"), &["--retry-for", "5s"]);
    let words = said(&tried);
    assert!(!tried.status.success());
    assert!(
        words
            .lines()
            .filter(|line| line.contains("cannot connect") && line.contains("waiting"))
            .count()
            >= 1,
        "{words}"
    );
    // A server that takes its time is told of as well, once, however many requests wait for it.
    let registry = TestRegistry::start();
    put_image(&registry, "1", "one");
    let name = registry.name("app:1");
    assert!(ls(&session, &name, &[]).status.success());
    registry.rules(|rules| rules.silent = true);
    let patient = ls(&session, &name, &[]);
    let words = said(&patient);
    assert!(patient.status.success(), "{words}");
    assert_eq!(
        words
            .lines()
            .filter(|line| line.contains("has not answered yet; waiting"))
            .count(),
        1,
        "{words}"
    );
    assert!(
        words.contains("no answer within 10s") && words.contains("using what"),
        "{words}"
    );
}
