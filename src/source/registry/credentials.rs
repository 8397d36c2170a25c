//! Credentials where people keep them. In: a registry's host and repository. Out: how to log in there, if one of the places says it.
//!
//! Read, in this order: what was given on the command line; `--authfile` or `REGISTRY_AUTH_FILE`, which then are the only
//! file; containers' `auth.json` (`$XDG_RUNTIME_DIR/containers`, then `$XDG_CONFIG_HOME/containers`); Docker's `config.json`
//! (`$DOCKER_CONFIG`, else `~/.docker`). In each file a helper for the host goes first, then `auths`, then the helper for all
//! (containers-auth.json(5), and docker-credential-helpers for what a helper says). A file is never written, and what is in
//! it never shown. Before all of them, and several for one repository, go logins that came with pulls (`kept`), where those are kept.

use std::collections::HashMap;
use std::env;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::kept::KeptLogins;
use super::lenient::null_is_empty;
use super::login::{Login, LoginParts};
use crate::source::SourceError;

/// What Docker Hub is called in credential files and by helpers.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// No credentials file is longer.
const LONGEST_FILE: u64 = 4 << 20;
/// No helper says more.
const LONGEST_ANSWER: u64 = 256 << 10;
/// A helper may have to ask a cloud, but not a person.
const HELPER_DEADLINE: Duration = Duration::from_secs(20);

/// Whether a server that is named in credentials (`https://index.docker.io/v1/`, `host:port`) is the registry `host`.
#[must_use]
pub fn is_server(named: &str, host: &str) -> bool {
    let named = normal(named);
    named.split('/').next() == Some(host)
}

/// Where to look for credentials; kept, so that they can be looked up again when they no longer work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyring {
    /// For the registry that was named, whatever files say.
    pub given: Option<Login>,
    /// The only file to look into.
    pub authfile: Option<PathBuf>,
    /// The files to look into where none was named; those that the environment of this process leads to, if none.
    pub usual: Option<Vec<PathBuf>>,
    /// The file of logins that came with pulls ([`KeptLogins`]), if they are kept.
    #[serde(default)]
    pub kept: Option<PathBuf>,
}

impl Keyring {
    /// The files that are looked into, first to last.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.named().map_or_else(|| self.usual_files(), |path| vec![path])
    }

    fn named(&self) -> Option<PathBuf> {
        // Whoever says where else to look has asked the environment.
        let from_environment = || self.usual.is_none().then(|| path_of("REGISTRY_AUTH_FILE")).flatten();
        self.authfile.clone().or_else(from_environment)
    }

    fn usual_files(&self) -> Vec<PathBuf> {
        self.usual.clone().unwrap_or_else(usual_files)
    }

    /// The same for a process with another environment and working directory.
    #[must_use]
    pub fn for_others(&self) -> Self {
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Self {
            given: self.given.clone(),
            authfile: self.named().map(absolute),
            usual: Some(self.usual_files().into_iter().map(absolute).collect()),
            kept: self.kept.clone().map(absolute),
        }
    }

    /// The ways to log in that may work, to be tried in this order: [`login`](Self::login), and before it those that came with pulls
    /// of this repository. Never empty.
    ///
    /// # Errors
    /// As of [`login`](Self::login), when no other is known.
    pub fn logins(&self, host: &str, repository: &str) -> Result<Vec<Login>, SourceError> {
        let Some(path) = &self.kept else {
            return Ok(vec![self.login(host, repository)?]);
        };
        let kept = KeptLogins::read(path).unwrap_or_else(|error| {
            log::warn!("{}: {error}; its logins are not used", path.display());
            KeptLogins::default()
        });
        let mut logins = kept.of(host, repository);
        match self.login(host, repository) {
            Ok(login) => logins.push(login),
            Err(error) if logins.is_empty() => return Err(error),
            Err(error) => log::warn!("{error}"),
        }
        // A repository that everybody may read does not close for those whose password is old.
        logins.push(Login::Anonymous);
        let mut seen = Vec::new();
        logins.retain(|login| {
            let is_new = !seen.contains(login);
            seen.push(login.clone());
            is_new
        });
        Ok(logins)
    }

    /// How to log in at `host` (with its port, if it is not the usual one) for `repository`. Waits for helpers, with a
    /// deadline: not for a thread that must not.
    ///
    /// # Errors
    /// [`SourceError::Credentials`] when the file that was named cannot be used, or a helper that a file names fails.
    pub fn login(&self, host: &str, repository: &str) -> Result<Login, SourceError> {
        if let Some(path) = self.named() {
            let file = AuthFile::read(&path).map_err(|why| failed(path.display().to_string(), why))?;
            return Ok(file.login(host, repository)?.unwrap_or_default());
        }
        for path in self.usual_files() {
            match AuthFile::read(&path) {
                Ok(file) => {
                    if let Some(login) = file.login(host, repository)? {
                        return Ok(login);
                    }
                }
                Err(_) if !path.exists() => {}
                Err(why) => log::warn!("{}: {why}; its credentials are not used", path.display()),
            }
        }
        Ok(Login::Anonymous)
    }
}

fn failed(place: String, why: String) -> SourceError {
    SourceError::Credentials { place, why }
}

fn path_of(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn usual_files() -> Vec<PathBuf> {
    let home = path_of("HOME");
    let runtime = path_of("XDG_RUNTIME_DIR").map_or_else(
        || PathBuf::from(format!("/run/containers/{}", rustix::process::getuid().as_raw())),
        |dir| dir.join("containers"),
    );
    let config = path_of("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    let docker = path_of("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
    [
        Some(runtime.join("auth.json")),
        config.map(|dir| dir.join("containers/auth.json")),
        docker.map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Docker's `config.json` and containers' `auth.json`: the same format, with more in it than is read here.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    #[serde(deserialize_with = "null_is_empty")]
    auths: HashMap<String, Option<LoginParts>>,
    creds_store: Option<String>,
    #[serde(deserialize_with = "null_is_empty")]
    cred_helpers: HashMap<String, String>,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: String,
}

impl AuthFile {
    fn read(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        if !file.metadata().is_ok_and(|meta| meta.is_file()) {
            return Err("it is not a regular file".to_owned());
        }
        let mut bytes = Vec::new();
        file.take(LONGEST_FILE)
            .read_to_end(&mut bytes)
            .map_err(|error| error.to_string())?;
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // The parser's own message can quote what it found there.
        serde_json::from_slice(bytes).map_err(|error| {
            format!(
                "not a credentials file: line {}, column {}",
                error.line(),
                error.column()
            )
        })
    }

    #[cfg(feature = "unstable-internals")]
    fn names_helpers(&self) -> bool {
        !self.cred_helpers.is_empty() || self.creds_store.as_ref().is_some_and(|helper| !helper.is_empty())
    }

    fn login(&self, host: &str, repository: &str) -> Result<Option<Login>, SourceError> {
        let mut names = vec![format!("{host}/{repository}")];
        while let Some((shorter, _)) = names.last().and_then(|name| name.rsplit_once('/')) {
            let shorter = shorter.to_owned();
            names.push(shorter);
        }
        for name in &names {
            let helper = self.cred_helpers.iter().find(|(key, _)| normal(key) == *name);
            if let Some((key, helper)) = helper
                && let Some(login) = ask_helper(helper, key)?
            {
                return Ok(Some(login));
            }
        }
        for name in &names {
            let found = self.auths.iter().filter(|(key, _)| normal(key) == *name);
            for (key, auth) in found {
                let Some(auth) = auth else { continue };
                if let Some(login) = Login::of_parts(auth).map_err(|why| failed(format!("the entry {key}"), why))? {
                    return Ok(Some(login));
                }
            }
        }
        let Some(helper) = self.creds_store.as_ref().filter(|helper| !helper.is_empty()) else {
            return Ok(None);
        };
        let key = if host == "docker.io" { HUB_KEY } else { host };
        ask_helper(helper, key)
    }
}

/// How a credentials file says to log in at `host` for `repository`; nothing of one that names helpers, which are not run.
///
/// # Errors
/// What is wrong with the file.
#[cfg(feature = "unstable-internals")]
pub(super) fn login_of_file(bytes: &[u8], host: &str, repository: &str) -> Result<Option<Login>, String> {
    let file = AuthFile::parse(bytes)?;
    if file.names_helpers() {
        return Ok(None);
    }
    file.login(host, repository).map_err(|error| error.to_string())
}

/// A key of `auths` without scheme and API version, Docker Hub's names made one. Of a URL only the host counts; without a
/// scheme a path is a namespace.
fn normal(key: &str) -> String {
    let url = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = url.unwrap_or(key).trim_end_matches('/');
    let (host, rest) = key
        .split_once('/')
        .map_or((key, None), |(host, rest)| (host, Some(rest)));
    let rest = rest.filter(|rest| url.is_none() && !matches!(*rest, "v1" | "v2"));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    rest.map_or_else(|| host.to_owned(), |rest| format!("{host}/{rest}"))
}

/// Asks `docker-credential-HELPER get` for `key`. No login if it has none.
fn ask_helper(helper: &str, key: &str) -> Result<Option<Login>, SourceError> {
    let program = format!("docker-credential-{helper}");
    if !helper.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c)) {
        return Err(failed(
            format!("{program:?}"),
            "it is not the name of a program".to_owned(),
        ));
    }
    let answer = run_helper(&program, key, HELPER_DEADLINE).map_err(|why| failed(program.clone(), why))?;
    let Some(answer) = answer else { return Ok(None) };
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_| failed(program, "its answer makes no sense".to_owned()))?;
    Ok(match (answer.username.as_str(), answer.secret) {
        ("", _) => None,
        (user, secret) => Some(Login::password(user, &secret)),
    })
}

/// What a helper wrote, or nothing if it knows no credentials.
fn run_helper(program: &str, key: &str, deadline: Duration) -> Result<Option<Vec<u8>>, String> {
    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            // It may have ended by itself.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run it: {error}"))?;
    let mut child = Ended(child);
    if let Some(mut stdin) = child.0.stdin.take() {
        // One that does not listen says so by its exit status.
        let _ = stdin.write_all(key.as_bytes());
    }
    let stdout = child.0.stdout.take();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.map_or(Ok(0), |out| out.take(LONGEST_ANSWER).read_to_end(&mut bytes));
        // The receiver is gone when the deadline has passed.
        let _ = tell.send(read.map(|_| bytes));
    });
    let bytes = told
        .recv_timeout(deadline)
        .map_err(|_| format!("it did not answer in {deadline:.0?}"))?
        .map_err(|error| format!("cannot read its answer: {error}"))?;
    let began = std::time::Instant::now();
    let status = loop {
        match child.0.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if began.elapsed() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) => return Err("it does not end".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    };
    if status.success() {
        return Ok(Some(bytes));
    }
    // Helpers say on standard output why they failed; there are no secrets in this one sentence.
    if String::from_utf8_lossy(&bytes).contains("credentials not found") {
        return Ok(None);
    }
    Err(format!("it failed ({status})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Secret;

    fn login(file: &str, host: &str, repository: &str) -> Option<Login> {
        AuthFile::parse(file.as_bytes())
            .unwrap()
            .login(host, repository)
            .unwrap()
    }

    fn password(user: &str, password: &str) -> Login {
        Login::password(user, password)
    }

    #[test]
    fn the_most_specific_entry_counts() {
        // a:b, c:d, e:f
        let file = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "YTpi"},
            "quay.io": {"auth": "Yzpk"},
            "quay.io/team": {"auth": "ZTpm"},
            "localhost:5000": {"username": "u", "password": "p:w"},
            "token.example": {"auth": "YTpi", "identitytoken": "long"},
            "bearer.example": {"registrytoken": "short"},
            "empty.example": {}
        }, "HttpHeaders": {"X": "y"}}"#;
        assert_eq!(login(file, "docker.io", "library/debian"), Some(password("a", "b")));
        assert_eq!(login(file, "quay.io", "other/x"), Some(password("c", "d")));
        assert_eq!(login(file, "quay.io", "team/x/y"), Some(password("e", "f")));
        assert_eq!(login(file, "quay.io", "teams"), Some(password("c", "d")));
        assert_eq!(login(file, "localhost:5000", "x"), Some(password("u", "p:w")));
        assert_eq!(
            login(file, "token.example", "x"),
            Some(Login::Identity(Secret::new("long".into())))
        );
        assert_eq!(
            login(file, "bearer.example", "x"),
            Some(Login::Bearer(Secret::new("short".into())))
        );
        assert_eq!(login(file, "empty.example", "x"), None);
        assert_eq!(login(file, "elsewhere", "x"), None);
    }

    #[test]
    fn keys_are_hosts_or_namespaces() {
        // a:b, c:d, e:f
        let file = r#"{"auths": {
            "quay.io/team/v1": {"auth": "YTpi"},
            "https://old.example/v2/": {"auth": "Yzpk"},
            "https://path.example/some/api": {"auth": "ZTpm"},
            "plain.example/v1/": {"auth": "YTpi"},
            "nothing.example": null
        }, "credHelpers": null, "credsStore": null}"#;
        assert_eq!(login(file, "quay.io", "team/v1/x"), Some(password("a", "b")));
        assert_eq!(login(file, "quay.io", "team/x"), None);
        assert_eq!(login(file, "old.example", "x"), Some(password("c", "d")));
        assert_eq!(login(file, "path.example", "x"), Some(password("e", "f")));
        assert_eq!(login(file, "plain.example", "x"), Some(password("a", "b")));
        assert_eq!(login(file, "nothing.example", "x"), None);
        assert_eq!(login(r#"{"auths": null}"#, "x", "x"), None);
        let nulls = r#"{"auths": {"x": {"auth": "YTpi", "identitytoken": null, "username": null}}}"#;
        assert_eq!(login(nulls, "x", "x"), Some(password("a", "b")));
    }

    #[test]
    fn other_processes_look_into_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        let keyring = Keyring {
            authfile: Some(path.clone()),
            ..Keyring::default()
        };
        assert_eq!(keyring.files(), std::slice::from_ref(&path));
        // Elsewhere the same files are looked into, whatever the environment there says.
        let elsewhere = keyring.for_others();
        assert_eq!(elsewhere.files(), std::slice::from_ref(&path));
        let usual = Keyring::default().for_others();
        assert_eq!(usual.files(), Keyring::default().files());
        assert!(usual.usual.is_some() && usual.files().iter().all(|file| file.is_absolute()));
    }

    #[test]
    fn logins_of_pulls_go_before_files() {
        let dir = tempfile::tempdir().unwrap();
        let (authfile, kept) = (dir.path().join("auth.json"), dir.path().join("kept.json"));
        std::fs::write(&authfile, r#"{"auths": {"host": {"auth": "YTpi"}}}"#).unwrap();
        let mut keyring = Keyring {
            authfile: Some(authfile),
            ..Keyring::default()
        };
        assert_eq!(keyring.logins("host", "x").unwrap(), [password("a", "b")]);
        keyring.kept = Some(kept.clone());
        let usual = [password("a", "b"), Login::Anonymous];
        assert_eq!(keyring.logins("host", "x").unwrap(), usual);
        let mut logins = KeptLogins::default();
        logins.keep("host", "x", &password("old", "1"));
        logins.keep("host", "x", &password("new", "2"));
        logins.keep("host", "x", &password("a", "b"));
        std::fs::write(&kept, logins.to_bytes().unwrap()).unwrap();
        let expected = [
            password("a", "b"),
            password("new", "2"),
            password("old", "1"),
            Login::Anonymous,
        ];
        assert_eq!(keyring.for_others().logins("host", "x").unwrap(), expected);
        // Not of another repository; and without the file of logins the others are as good as before.
        assert_eq!(keyring.logins("host", "y").unwrap(), usual);
        std::fs::write(&kept, "x").unwrap();
        assert_eq!(keyring.logins("host", "x").unwrap(), usual);
    }

    #[test]
    fn servers_are_named_in_several_ways() {
        for (named, host, is_it) in [
            ("https://index.docker.io/v1/", "docker.io", true),
            ("host:5000", "host:5000", true),
            ("https://host:5000/v2/", "host:5000", true),
            ("host/team", "host", true),
            ("other", "host", false),
        ] {
            assert_eq!(is_server(named, host), is_it, "{named}");
        }
    }

    #[test]
    fn broken_files_are_not_quoted() {
        for bad in [
            "secret",
            r#"{"auths": {"h": {"auth": secret}}}"#,
            r#"{"auths": {"h": "secret"}}"#,
        ] {
            let why = AuthFile::parse(bad.as_bytes()).err().unwrap();
            assert!(!why.contains("secret"), "{why}");
        }
        let file = AuthFile::parse(br#"{"auths": {"h": {"auth": "c2VjcmV0"}}}"#).unwrap();
        let error = file.login("h", "x").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"));
        let shown = format!("{:?}", Login::parse("me:secret").unwrap());
        assert!(shown.contains("me") && !shown.contains("secret"));
    }

    #[test]
    fn helpers_have_a_deadline_and_plain_names() {
        let error = ask_helper("../x", "host").unwrap_err().to_string();
        assert!(error.contains("not the name of a program"), "{error}");
        let error = ask_helper("there-is-no-such-helper", "host").unwrap_err().to_string();
        assert!(error.contains("cannot run it"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let long = Duration::from_secs(20);
        let echo = script("echo", "cat; test \"$1\" = get");
        assert_eq!(run_helper(&echo, "a key", long).unwrap().unwrap(), b"a key");
        let none = script("none", "echo 'credentials not found in native keychain'; exit 1");
        assert_eq!(run_helper(&none, "k", long).unwrap(), None);
        let fails = script("fails", "exit 3");
        assert!(run_helper(&fails, "k", long).is_err());
        let hangs = script("hangs", "exec sleep 60");
        assert!(
            run_helper(&hangs, "k", Duration::from_millis(50))
                .unwrap_err()
                .contains("did not answer")
        );
    }
}
