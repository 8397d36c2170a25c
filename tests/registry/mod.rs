//! Real registries for tests: Debian's `docker-registry` on loopback in every way that people run one, filled by skopeo from
//! the layouts that tools/test-images makes. Everything ends and is removed when its value is dropped, also by a panic.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

pub(crate) mod front;
pub(crate) mod http;
pub(crate) mod keys;
pub(crate) mod token;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::common::{have, skip, succeed};
use keys::Authority;
use token::{SERVICE, TokenServer};

/// Who may read a registry that asks.
pub(crate) const USER: &str = "reader";
pub(crate) const PASSWORD: &str = "p4ss:word-of-a-test";

/// How long a registry may take to answer its first request.
const READY: Duration = Duration::from_secs(60);

/// How a registry lets people in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Plain HTTP, everybody.
    Anonymous,
    /// Plain HTTP, Basic credentials from an htpasswd file.
    Password,
    /// Plain HTTP, tokens of two seconds for [`USER`].
    Token,
    /// The same, and whoever gives no credentials may pull.
    AnonymousToken,
    /// HTTPS with a certificate of a private authority ([`Registry::authority`]), everybody.
    Tls,
    /// The same, only for those with a certificate of that authority.
    ClientCertificate,
}

/// How long a token of [`Access::Token`] is good, in seconds.
pub(crate) const TOKEN_SECONDS: u64 = 2;

/// A running registry.
#[derive(Debug)]
pub(crate) struct Registry {
    dir: tempfile::TempDir,
    child: Child,
    port: u16,
    access: Access,
    authority: Authority,
    tokens: Option<TokenServer>,
}

impl Registry {
    /// Starts an empty one; `None`, having said so, where that cannot be done.
    pub(crate) fn start(test: &str, access: Access) -> Option<Self> {
        for (program, package) in [
            ("docker-registry", "docker-registry"),
            ("skopeo", "skopeo"),
            ("setpriv", "util-linux"),
            ("htpasswd", "apache2-utils"),
        ] {
            if !have(program) {
                skip(
                    test,
                    &format!("no {program} (package {package}): run tools/setup --tests"),
                );
                return None;
            }
        }
        let dir = crate::common::scratch("registry-");
        let authority = Authority::new(&dir.path().join("keys"));
        let tokens = match access {
            Access::Token => Some(TokenServer::start(false)),
            Access::AnonymousToken => Some(TokenServer::start(true)),
            _ => None,
        };
        if let Some(tokens) = &tokens {
            tokens.set_lifetime(TOKEN_SECONDS);
            fs::write(dir.path().join("token-root.crt"), tokens.root()).unwrap();
        }
        fs::write(dir.path().join("auth.json"), auths("127.0.0.1:0")).unwrap();
        // A free port can be somebody else's a moment later.
        for _ in 0..5 {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            write_config(dir.path(), port, access, tokens.as_ref());
            let mut child = launch(dir.path());
            if ready(&mut child, port) {
                fs::write(dir.path().join("auth.json"), auths(&format!("127.0.0.1:{port}"))).unwrap();
                return Some(Self {
                    dir,
                    child,
                    port,
                    access,
                    authority,
                    tokens,
                });
            }
            end(&mut child);
        }
        let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        panic!("docker-registry does not start: {log}");
    }

    /// Starts one that holds images, each written `LAYOUT:TAG` as the layouts are below `images`; in the registry it has the same
    /// name.
    pub(crate) fn with(test: &str, access: Access, images: &Path, names: &[&str]) -> Option<Self> {
        let registry = Self::start(test, access)?;
        for name in names {
            registry.push(images, name);
        }
        Some(registry)
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How `tarblk` and skopeo write an image of this registry.
    pub(crate) fn image(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.host())
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self.access, Access::Tls | Access::ClientCertificate)
    }

    /// With a scheme, without a path.
    pub(crate) fn url(&self) -> String {
        format!("{}://{}", if self.is_tls() { "https" } else { "http" }, self.host())
    }

    /// Certificates and keys of this registry: `ca.crt`, `client.cert`, `client.key`.
    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// A directory as skopeo's `--cert-dir` and containerd's hosts directories want it.
    pub(crate) fn certificates(&self) -> PathBuf {
        self.dir.path().join("keys")
    }

    /// A file as `docker login` and `podman login` write it, with user and password of this registry.
    pub(crate) fn auth_file(&self) -> PathBuf {
        self.dir.path().join("auth.json")
    }

    /// What a command has to be told to get in: credentials, where they are wanted; that there is no TLS, or whom to trust.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec!["--authfile".into(), self.auth_file().into()];
        if self.is_tls() {
            // containerd's layout: a directory named after the host, with certificates in it.
            let hosts = self.dir.path().join("hosts");
            let host = hosts.join(self.host());
            fs::create_dir_all(&host).unwrap();
            for name in ["ca.crt", "client.cert", "client.key"] {
                fs::copy(self.authority.path(name), host.join(name)).unwrap();
            }
            arguments.extend(["--hosts-dir".into(), hosts.into()]);
        } else {
            arguments.push("--plain-http".into());
        }
        arguments
    }

    pub(crate) fn tokens(&self) -> &TokenServer {
        self.tokens.as_ref().expect("a registry with tokens")
    }

    /// A directory that goes with the registry.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Copies an image `LAYOUT:TAG` from below `images`, every byte as it is: not even plain layers are compressed.
    pub(crate) fn push(&self, images: &Path, name: &str) {
        self.skopeo_copy(
            &format!("oci:{}", images.join(name).display()),
            name,
            &["--all", "--preserve-digests"],
        );
    }

    /// Copies an image and makes Docker's manifest (schema 2) of it, under the name `to`.
    pub(crate) fn push_schema2(&self, images: &Path, name: &str, to: &str) {
        self.skopeo_copy(
            &format!("oci:{}", images.join(name).display()),
            to,
            &["--format", "v2s2"],
        );
    }

    fn skopeo_copy(&self, from: &str, to: &str, options: &[&str]) {
        // skopeo believes in tokens for a minute at least, whatever it is told.
        self.tokens.as_ref().inspect(|tokens| tokens.set_lifetime(300));
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet"]).args(options);
        if self.is_tls() {
            command.arg("--dest-cert-dir").arg(self.certificates());
        } else {
            command.arg("--dest-tls-verify=false");
        }
        command.arg("--dest-authfile").arg(self.auth_file());
        succeed(command.arg(from).arg(self.image(to)));
        self.tokens
            .as_ref()
            .inspect(|tokens| tokens.set_lifetime(TOKEN_SECONDS));
    }

    /// Puts a blob into a repository of a registry that asks for nothing; its digest.
    pub(crate) fn put_blob(&self, repository: &str, content: &Path) -> String {
        let digest = String::from_utf8(succeed(Command::new("sha256sum").arg(content))).unwrap();
        let digest = format!("sha256:{}", &digest[..64]);
        let start = format!("{}/v2/{repository}/blobs/uploads/", self.url());
        let mut command = Command::new("curl");
        command.args([
            "-sf",
            "-X",
            "POST",
            "-o",
            "/dev/null",
            "-w",
            "%header{location}",
            &start,
        ]);
        let location = String::from_utf8(succeed(&mut command)).unwrap();
        let mut command = Command::new("curl");
        command.args([
            "-sf",
            "-X",
            "PUT",
            "-H",
            "Content-Type: application/octet-stream",
            "--data-binary",
        ]);
        command
            .arg(format!("@{}", content.display()))
            .arg(format!("{location}&digest={digest}"));
        succeed(&mut command);
        digest
    }

    /// The file in which the registry keeps a blob.
    pub(crate) fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a sha256 digest");
        let blobs = self.dir.path().join("storage/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// Damages a blob where it lies: one bit of one byte.
    pub(crate) fn flip(&self, digest: &str, at: u64) {
        flip(&self.blob_file(digest), at);
    }

    /// How many bytes of a blob it has given, by its access log.
    pub(crate) fn sent(&self, digest: &str) -> u64 {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
        let of_blob = |line: &str| {
            let (request, rest) = line.split_once(" HTTP/1.1\" ")?;
            let asked = request.contains("\"GET ") && request.ends_with(digest);
            asked.then(|| rest.split(' ').nth(1)?.parse::<u64>().ok()).flatten()
        };
        log.lines().filter_map(of_blob).sum()
    }

    /// The requests so far, as the access log has them: `GET /v2/... 206`.
    pub(crate) fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
        log.lines()
            .filter_map(|line| {
                let (_, request) = line.split_once("] \"")?;
                let (request, rest) = request.split_once(" HTTP/1.1\" ")?;
                Some(format!("{request} {}", rest.split(' ').next()?))
            })
            .collect()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// What `docker login` writes for [`USER`].
fn auths(host: &str) -> String {
    json!({ "auths": { host: { "auth": STANDARD.encode(format!("{USER}:{PASSWORD}")) } } }).to_string()
}

fn write_config(dir: &Path, port: u16, access: Access, tokens: Option<&TokenServer>) {
    let keys = dir.join("keys");
    let mut config = json!({
        "version": "0.1",
        "log": { "level": "warn" },
        "storage": { "filesystem": { "rootdirectory": dir.join("storage") }, "delete": { "enabled": true } },
        "http": { "addr": format!("127.0.0.1:{port}"), "secret": "not one" },
    });
    if matches!(access, Access::Tls | Access::ClientCertificate) {
        config["http"]["tls"] = json!({ "certificate": keys.join("server.pem"), "key": keys.join("server-key.pem") });
    }
    if access == Access::ClientCertificate {
        config["http"]["tls"]["clientcas"] = json!([keys.join("ca.crt")]);
    }
    if access == Access::Password {
        let file = dir.join("htpasswd");
        let mut command = Command::new("htpasswd");
        // The lowest cost that there is: every request is checked.
        command.args(["-nbB", "-C", "4", USER, PASSWORD]);
        fs::write(&file, succeed(&mut command)).unwrap();
        config["auth"] = json!({ "htpasswd": { "realm": "a test", "path": file } });
    }
    if let Some(tokens) = tokens {
        config["auth"] = json!({ "token": {
            "realm": tokens.realm(),
            "service": SERVICE,
            "issuer": token::ISSUER,
            "rootcertbundle": dir.join("token-root.crt"),
        } });
    }
    // JSON is YAML.
    fs::write(dir.join("config.yml"), config.to_string()).unwrap();
}

/// Killed by the kernel, too, if this thread ends in a way that runs no destructors.
fn launch(dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
        .arg(dir.join("config.yml"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Waits until it answers; false if it ended instead.
fn ready(child: &mut Child, port: u16) -> bool {
    let deadline = Instant::now() + READY;
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            // A TLS server says something to this as well.
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = (&stream).write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            if matches!(http::read_head(&mut BufReader::new(stream)), Ok(Some(_))) {
                // It could be the one that took the port: ours must still be there.
                thread::sleep(Duration::from_millis(20));
                return child.try_wait().unwrap().is_none();
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Flips a bit of a byte of a file.
pub(crate) fn flip(file: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// What `skopeo inspect --raw` says of an image: its manifest.
pub(crate) fn manifest(registry: &Registry, name: &str) -> Value {
    let mut command = Command::new("skopeo");
    command
        .args(["inspect", "--raw", "--authfile"])
        .arg(registry.auth_file());
    if registry.is_tls() {
        command.arg("--cert-dir").arg(registry.certificates());
    } else {
        command.arg("--tls-verify=false");
    }
    serde_json::from_slice(&succeed(command.arg(registry.image(name)))).unwrap()
}
