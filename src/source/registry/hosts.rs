//! Which servers stand for a registry. In: the registry's name, containerd's directory of `hosts.toml` files. Out: endpoints
//! in the order in which they are asked: mirrors first, the registry itself last.
//!
//! The format is containerd's (docs/hosts.md there): `DIR/host_port_/hosts.toml`, `DIR/host:port/hosts.toml` or
//! `DIR/_default/hosts.toml`; a directory without that file may hold `*.crt` authorities and `*.cert` with `*.key` for the
//! registry itself.

use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Value;
use url::Url;

use crate::http::tls::Trust;
use crate::source::SourceError;

/// Where containerd keeps them.
pub const DEFAULT_HOSTS_DIR: &str = "/etc/containerd/certs.d";
const LONGEST_FILE: u64 = 1 << 20;
/// The most mirrors that are used; each one that is down costs a wait.
const MOST_MIRRORS: usize = 32;

/// One server that answers for a registry.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Endpoint {
    /// What repositories' names are put behind, with a slash at its end: `https://registry-1.docker.io/v2/`.
    pub(super) base: Url,
    /// May blobs and manifests by digest be read there?
    pub(super) pull: bool,
    /// May tags be believed there?
    pub(super) resolve: bool,
    /// May things be written there?
    pub(super) push: bool,
    /// Sent with every request; may be secret.
    pub(super) headers: Vec<(String, String)>,
    /// Whom to believe, and what to show.
    pub(super) trust: Trust,
    /// The registry that a mirror stands for, which it is told in each request.
    pub(super) stands_for: Option<String>,
    /// Not known yet whether it speaks TLS: the first request finds out.
    pub(super) scheme_unknown: bool,
}

impl Endpoint {
    pub(super) fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// Its host and port, as credentials files name it.
    pub(super) fn host(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        self.base
            .port()
            .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("base", &crate::source::shown_url(&self.base))
            .field("trust", &self.trust)
            .finish_non_exhaustive()
    }
}

/// The endpoints of the registry `host`. `plain_http` is for the registry itself.
///
/// # Errors
/// [`SourceError::Hosts`] when a file is there and makes no sense: a mirror that is silently left out would be worse.
pub(super) fn endpoints(host: &str, dir: &Path, plain_http: bool) -> Result<Vec<Endpoint>, SourceError> {
    let candidates = [
        host.rsplit_once(':').map(|(name, port)| format!("{name}_{port}_")),
        Some(host.to_owned()),
        Some("_default".to_owned()),
    ];
    let found = candidates
        .into_iter()
        .flatten()
        .map(|name| dir.join(name))
        .find(|dir| dir.is_dir());
    let own = registry(host, plain_http);
    let Some(dir) = found else { return Ok(vec![own]) };
    let file = dir.join("hosts.toml");
    let failed = |why: String| SourceError::Hosts {
        path: file.clone(),
        why,
    };
    match fs::File::open(&file) {
        Ok(open) => {
            let mut text = String::new();
            open.take(LONGEST_FILE)
                .read_to_string(&mut text)
                .map_err(|error| failed(error.to_string()))?;
            parse(&text, host, &dir, &own).map_err(failed)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let trust = certificates(&dir).map_err(|error| failed(error.to_string()))?;
            // Certificates for it mean that it speaks TLS.
            let mut own = own;
            if own.scheme_unknown && trust != Trust::default() {
                own = endpoint(&format!("https://{host}"), false)?;
            }
            own.trust = trust;
            Ok(vec![own])
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

/// The registry itself, without any file.
fn registry(host: &str, plain_http: bool) -> Endpoint {
    let name = if host == "docker.io" {
        "registry-1.docker.io"
    } else {
        host
    };
    let loopback = is_loopback(host);
    let scheme = if plain_http || loopback { "http" } else { "https" };
    let mut own = endpoint(&format!("{scheme}://{name}"), false).unwrap_or_else(|_| Endpoint {
        // The name was checked when it was parsed; should it be none after all, no server answers there.
        base: Url::parse("https://invalid.invalid/v2/").unwrap_or_else(|_| unreachable!("a constant")),
        pull: false,
        resolve: false,
        push: false,
        headers: Vec::new(),
        trust: Trust::default(),
        stands_for: None,
        scheme_unknown: false,
    });
    own.scheme_unknown = loopback && !plain_http;
    own
}

/// Whether a host (with or without its port) is this machine.
fn is_loopback(host: &str) -> bool {
    let url = Url::parse(&format!("http://{host}/"));
    match url.as_ref().ok().and_then(Url::host) {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// A host or a URL of a file, as it may be printed: a password can stand in either.
fn shown(text: &str) -> String {
    if text.contains("://") {
        return crate::http::meant_url(text);
    }
    let shown = crate::http::meant_url(&format!("https://{text}"));
    shown.strip_prefix("https://").unwrap_or(&shown).to_owned()
}

/// An endpoint with every right at `text`: a URL, or a host.
fn endpoint(text: &str, override_path: bool) -> Result<Endpoint, SourceError> {
    let bad = |why: &str| SourceError::Unusable {
        source_name: shown(text),
        why: why.to_owned(),
    };
    let with_scheme = if text.contains("://") {
        text.to_owned()
    } else if is_loopback(text) {
        format!("http://{text}")
    } else {
        format!("https://{text}")
    };
    let mut base = Url::parse(&with_scheme).map_err(|error| bad(&format!("not a URL: {error}")))?;
    if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
        return Err(bad("not an http or https URL"));
    }
    if !base.username().is_empty() || base.password().is_some() {
        return Err(bad(
            "credentials do not belong into a URL here: put them into a credentials file",
        ));
    }
    base.set_query(None);
    base.set_fragment(None);
    let path = base.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") {
        format!("{path}/")
    } else {
        format!("{path}/v2/")
    };
    base.set_path(&path);
    Ok(Endpoint {
        base,
        pull: true,
        resolve: true,
        push: true,
        headers: Vec::new(),
        trust: Trust::default(),
        stands_for: None,
        scheme_unknown: false,
    })
}

/// A `hosts.toml`. The order of its hosts counts, which is why it is read as a table that keeps it.
fn parse(text: &str, host: &str, dir: &Path, own: &Endpoint) -> Result<Vec<Endpoint>, String> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        // Not the whole message: it quotes lines, and headers can be secret.
        let place = error
            .span()
            .map_or(0, |span| text.get(..span.start).unwrap_or_default().lines().count());
        format!("not TOML, near line {place}: {}", error.message())
    })?;
    let mut endpoints = Vec::new();
    let none = toml::Table::new();
    let hosts = match table.get("host") {
        Some(Value::Table(hosts)) => hosts,
        Some(_) => return Err("host is not a table".to_owned()),
        None => &none,
    };
    if hosts.len() > MOST_MIRRORS {
        return Err(format!("more than {MOST_MIRRORS} hosts"));
    }
    for (name, settings) in hosts {
        let shown = shown(name);
        let settings = settings
            .as_table()
            .ok_or_else(|| format!("host {shown:?} is not a table"))?;
        let mut mirror = one_host(name, settings, dir).map_err(|why| format!("host {shown:?}: {why}"))?;
        mirror.stands_for = stands_for(&mirror, own, host);
        endpoints.push(mirror);
    }
    let server = table
        .get("server")
        .map(|server| server.as_str().ok_or("server is not a string"));
    let mut last = match server.transpose()? {
        Some(server) if !server.is_empty() => one_host(server, &table, dir)?,
        _ => {
            let mut last = own.clone();
            configure(&mut last, &table, dir)?;
            last
        }
    };
    if last.base.host_str() == Some("docker.io") {
        last.base = own.base.clone();
    }
    last.stands_for = stands_for(&last, own, host);
    endpoints.push(last);
    Ok(endpoints)
}

/// The endpoints of the registry `host` by a file with this text in `dir`.
///
/// # Errors
/// What is wrong with it.
#[cfg(feature = "unstable-internals")]
pub(super) fn of_text(text: &str, host: &str, dir: &Path) -> Result<Vec<Endpoint>, String> {
    parse(text, host, dir, &registry(host, false))
}

/// The registry that an endpoint stands for, if it is another host than the registry itself: it is told so, and gets no
/// credentials but its own. By which scheme the registry is talked to is for the file to say.
fn stands_for(endpoint: &Endpoint, own: &Endpoint, registry: &str) -> Option<String> {
    (endpoint.host() != own.host()).then(|| registry.to_owned())
}

fn one_host(name: &str, settings: &toml::Table, dir: &Path) -> Result<Endpoint, String> {
    let override_path = flag(settings, "override_path")?;
    let mut endpoint = endpoint(name, override_path).map_err(|error| error.to_string())?;
    configure(&mut endpoint, settings, dir)?;
    Ok(endpoint)
}

fn flag(settings: &toml::Table, name: &str) -> Result<bool, String> {
    match settings.get(name) {
        None => Ok(false),
        Some(value) => value
            .as_bool()
            .ok_or_else(|| format!("{name} is neither true nor false")),
    }
}

fn configure(endpoint: &mut Endpoint, settings: &toml::Table, dir: &Path) -> Result<(), String> {
    if let Some(value) = settings.get("capabilities") {
        let list = strings(value).ok_or("capabilities is not a list of strings")?;
        // An empty list takes nothing away.
        let has = |name: &str| list.is_empty() || list.iter().any(|capability| capability.eq_ignore_ascii_case(name));
        (endpoint.pull, endpoint.resolve, endpoint.push) = (has("pull"), has("resolve"), has("push"));
    }
    endpoint.trust.any_certificate = flag(settings, "skip_verify")?;
    let path = |text: String| dir.join(text);
    if let Some(value) = settings.get("ca") {
        let list = strings(value).ok_or("ca is neither a path nor a list of paths")?;
        endpoint.trust.authorities = list.into_iter().map(path).collect();
    }
    if let Some(value) = settings.get("client") {
        endpoint.trust.client = client(value, dir).ok_or("client is neither a path nor a list of paths or pairs")?;
    }
    if let Some(value) = settings.get("header") {
        let table = value.as_table().ok_or("header is not a table")?;
        for (name, value) in table {
            for value in strings(value).ok_or_else(|| format!("header {name} is neither a string nor a list"))? {
                let good = reqwest::header::HeaderName::from_bytes(name.as_bytes()).is_ok()
                    && reqwest::header::HeaderValue::from_str(&value).is_ok();
                if !good {
                    return Err(format!("header {name:?} cannot be sent"));
                }
                endpoint.headers.push((name.clone(), value));
            }
        }
    }
    Ok(())
}

/// A string or a list of strings.
fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(list) => list.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// Client certificates and their keys: a path (both in one file), a list of such, or a list of pairs.
fn client(value: &Value, dir: &Path) -> Option<Vec<(PathBuf, PathBuf)>> {
    let both = |text: &str| (dir.join(text), dir.join(text));
    match value {
        Value::String(text) => Some(vec![both(text)]),
        Value::Array(list) => list
            .iter()
            .map(|item| match item {
                Value::String(text) => Some(both(text)),
                Value::Array(pair) => match pair.as_slice() {
                    [one] => one.as_str().map(both),
                    [certificate, key] => match (certificate.as_str()?, key.as_str()?) {
                        (one, "") => Some(both(one)),
                        (certificate, key) => Some((dir.join(certificate), dir.join(key))),
                    },
                    _ => None,
                },
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

/// A directory of certificates, as Docker has it too.
fn certificates(dir: &Path) -> std::io::Result<Trust> {
    let mut trust = Trust::default();
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => trust.authorities.push(path),
            Some("cert") if path.with_extension("key").exists() => {
                let key = path.with_extension("key");
                trust.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(trust)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, host: &str) -> Result<Vec<Endpoint>, String> {
        parse(text, host, Path::new("/d"), &registry(host, false))
    }

    fn bases(endpoints: &[Endpoint]) -> Vec<&str> {
        endpoints.iter().map(|endpoint| endpoint.base.as_str()).collect()
    }

    #[test]
    fn the_order_of_the_file_is_kept() {
        let text = r#"
            server = "https://docker.io"
            [host."https://z.example"]
            capabilities = ["pull", "resolve"]
            ca = "/etc/z.pem"
            [host."http://a.example:5000/v2"]
            capabilities = ["pull"]
            [host."http://a.example:5000/v2".header]
            x-one = "secret"
            x-two = ["secret", "b"]
            [host."https://h.example/v2/proxy"]
            override_path = true
            skip_verify = true
            client = [["c.cert", "c.key"], ["both.pem", ""]]
        "#;
        let hosts = of(text, "docker.io").unwrap();
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example/v2/",
                "http://a.example:5000/v2/",
                "https://h.example/v2/proxy/",
                "https://registry-1.docker.io/v2/"
            ]
        );
        assert!(hosts[0].pull && hosts[0].resolve && !hosts[0].push);
        assert_eq!(hosts[0].trust.authorities, [PathBuf::from("/etc/z.pem")]);
        assert_eq!(hosts[0].stands_for.as_deref(), Some("docker.io"));
        assert!(hosts[1].pull && !hosts[1].resolve);
        assert_eq!(hosts[1].headers().len(), 3);
        assert!(hosts[2].trust.any_certificate);
        let pairs = [("/d/c.cert", "/d/c.key"), ("/d/both.pem", "/d/both.pem")];
        let pairs = pairs.map(|(a, b)| (PathBuf::from(a), PathBuf::from(b)));
        assert_eq!(hosts[2].trust.client, pairs);
        assert!(hosts[3].push && hosts[3].stands_for.is_none());
        assert!(!format!("{hosts:?}").contains("secret"));
    }

    #[test]
    fn settings_without_a_host_are_the_registrys_own() {
        let hosts = of("ca = [\"own.pem\"]\n", "r.example:5000").unwrap();
        assert_eq!(bases(&hosts), ["https://r.example:5000/v2/"]);
        assert_eq!(hosts[0].trust.authorities, [PathBuf::from("/d/own.pem")]);
        assert_eq!(hosts[0].host(), "r.example:5000");
        assert_eq!(bases(&of("", "localhost:5000").unwrap()), ["http://localhost:5000/v2/"]);
        let secure = of("server = \"https://localhost:5000\"", "localhost:5000").unwrap();
        assert!(!secure[0].scheme_unknown);
        assert_eq!(bases(&secure), ["https://localhost:5000/v2/"]);
    }

    #[test]
    fn whoever_has_another_name_stands_for_the_registry() {
        let stands_for = |text: &str, host: &str| -> Vec<Option<String>> {
            let hosts = of(text, host).unwrap();
            hosts.into_iter().map(|endpoint| endpoint.stands_for).collect()
        };
        let named = |name: &str| Some(name.to_owned());
        assert_eq!(
            stands_for("server = \"https://else.example\"", "r.example"),
            [named("r.example")]
        );
        assert_eq!(stands_for("server = \"https://r.example\"", "r.example"), [None]);
        assert_eq!(stands_for("server = \"https://r.example\"", "r.example:443"), [None]);
        assert_eq!(
            stands_for("server = \"https://registry-1.docker.io\"", "docker.io"),
            [None]
        );
        assert_eq!(stands_for("", "docker.io"), [None]);
        // As people write it who have no TLS: the registry itself, twice.
        let twice = "server = \"http://r.example:5000\"\n[host.\"http://r.example:5000\"]\n";
        assert_eq!(stands_for(twice, "r.example:5000"), [None, None]);
        let mirror = "[host.\"https://r.example:5001\"]\n";
        assert_eq!(stands_for(mirror, "r.example:5000"), [named("r.example:5000"), None]);
    }

    #[test]
    fn capabilities_are_read_as_containerd_does() {
        let of = |list: &str| {
            of(&format!("[host.\"https://x\"]\ncapabilities = {list}"), "r.example")
                .map(|all| (all[0].pull, all[0].resolve, all[0].push))
        };
        assert_eq!(of("[]"), Ok((true, true, true)));
        assert_eq!(of("[\"Pull\", \"PUSH\"]"), Ok((true, false, true)));
    }

    #[test]
    fn nonsense_is_an_error_without_secrets() {
        for bad in [
            "server = ",
            "server = 1",
            "host = 1",
            "[host.\"ftp://x\"]",
            "[host.\"https://u:secret@x\"]",
            "[host.\"https://x\"]\ncapabilities = \"pull\"\nca = 1",
            "[host.\"https://x\"]\nskip_verify = \"yes\"",
            "[host.\"https://x\".header]\nauthorization = \"secret\\n\"",
            "[host.\"https://x\".header]\nauthorization = \"secret",
        ] {
            let error = of(bad, "x").unwrap_err();
            assert!(!error.contains("secret"), "{bad}: {error}");
        }
    }

    #[test]
    fn directories_are_found_as_containerd_does() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            fs::create_dir_all(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let first = |host: &str| bases(&endpoints(host, dir.path(), false).unwrap())[0].to_owned();
        assert_eq!(first("r.example:5000"), "https://r.example:5000/v2/");
        at("_default", "[host.\"https://default.example\"]");
        assert_eq!(first("r.example:5000"), "https://default.example/v2/");
        at("r.example:5000", "[host.\"https://colon.example\"]");
        assert_eq!(first("r.example:5000"), "https://colon.example/v2/");
        at("r.example_5000_", "[host.\"https://low.example\"]");
        assert_eq!(first("r.example:5000"), "https://low.example/v2/");
        fs::create_dir_all(dir.path().join("certs.example")).unwrap();
        for name in ["b.crt", "a.crt", "c.cert", "c.key", "lonely.cert"] {
            fs::write(dir.path().join("certs.example").join(name), "").unwrap();
        }
        let trust = &endpoints("certs.example", dir.path(), false).unwrap()[0].trust;
        assert_eq!(trust.authorities.len(), 2);
        assert_eq!(trust.client.len(), 1);
        assert!(endpoints("127.0.0.2:1", Path::new("/none"), false).unwrap()[0].scheme_unknown);
        assert_eq!(
            endpoints("x:1", Path::new("/none"), true).unwrap()[0].base.scheme(),
            "http"
        );
    }
}
