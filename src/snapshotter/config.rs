//! How the snapshotter is set up. In: a file in TOML, `/etc/tarblk/snapshotter.toml` by default. Out: a [`Config`]; every key has a
//! default, and a key that is not known is an error.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Deserializer};

use crate::http::HttpOptions;
use crate::quantity::{parse_size, parse_time};
use crate::source::registry::{DEFAULT_HOSTS_DIR, Keyring, Reference, RegistryOptions, RepositoryPattern};

/// What the file is called, in the machine's configuration directory.
pub const FILE_NAME: &str = "snapshotter.toml";

/// Where containerd is, if nothing else is said.
pub const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// It is not understood.
    #[error("{path}: {cause}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        cause: String,
    },
}

/// Which images are lazy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lazy {
    /// All that can be. Without an index the first start waits until all of the image was read once, which begins with the pull.
    #[default]
    Always,
    /// Those of whose layers every one has an index: published, in the layer itself, or kept here. Others are pulled as usual.
    IfIndexed,
    /// None: everything is pulled as usual.
    Never,
}

/// Another [`Lazy`] for some images.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RepositoryPolicy {
    /// Which.
    pub pattern: RepositoryPattern,
    /// Whether they are lazy.
    pub lazy: Lazy,
}

/// The set-up.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// Records, and what containers write.
    pub root: PathBuf,
    /// The socket on which containerd calls.
    pub address: PathBuf,
    /// The socket on which a kubelet pulls images, to be passed on to containerd; none without Kubernetes.
    pub image_service: Option<PathBuf>,
    /// containerd's own socket: pulls go on to it, and what it has of an image is not fetched again.
    pub containerd: PathBuf,
    /// Where indexes and fetched bytes are kept; the usual cache directory, if none.
    pub cache: Option<PathBuf>,
    /// Disk space for all that is kept there; a part of the disk, if none.
    #[serde(deserialize_with = "some_size")]
    pub cache_size: Option<u64>,
    /// Memory for bytes that may be read again, of all devices together; a part of the machine's, if none.
    #[serde(deserialize_with = "some_size")]
    pub memory: Option<u64>,
    /// Connections to a server at most.
    pub connections: u16,
    /// How long a read in a container may wait for a server before it fails; for ever, if none.
    #[serde(deserialize_with = "some_time")]
    pub deadline: Option<Duration>,
    /// Whether everything else is fetched as well while no read waits.
    pub fetch_all: bool,
    /// Directories of `hosts.toml`.
    pub hosts_dir: PathBuf,
    /// The only file with credentials to look into; those of docker and podman, if none.
    pub authfile: Option<PathBuf>,
    /// Whether registries that are not on this machine speak HTTP without TLS.
    pub plain_http: bool,
    /// How long it may take to find out whether an image can be lazy.
    #[serde(deserialize_with = "time")]
    pub claim_timeout: Duration,
    /// How long a device stays that nothing is made on any more.
    #[serde(deserialize_with = "time")]
    pub idle: Duration,
    /// Which images are lazy.
    pub lazy: Lazy,
    /// Which are not as all others; the first that fits counts.
    pub repository: Vec<RepositoryPolicy>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/tarblk/snapshotter".into(),
            address: "/run/tarblk/snapshotter.sock".into(),
            image_service: None,
            containerd: CONTAINERD.into(),
            cache: None,
            cache_size: None,
            memory: None,
            connections: 16,
            deadline: None,
            fetch_all: false,
            hosts_dir: DEFAULT_HOSTS_DIR.into(),
            authfile: None,
            plain_http: false,
            claim_timeout: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            lazy: Lazy::default(),
            repository: Vec::new(),
        }
    }
}

impl Config {
    /// Reads a file. With `or_default` one that is not there stands for the defaults.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path, or_default: bool) -> Result<Self, ConfigError> {
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|error| ConfigError::Parse {
                path: path.to_owned(),
                cause: error.to_string().trim_end().to_owned(),
            }),
            Err(error) if or_default && error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(ConfigError::Read {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// The file of logins that came with pulls.
    #[must_use]
    pub fn logins(&self) -> PathBuf {
        self.root.join("logins.json")
    }

    /// How registries are talked to: as the set-up says, with the logins that came with pulls.
    #[must_use]
    pub fn registry_options(&self, http: HttpOptions) -> RegistryOptions {
        RegistryOptions {
            plain_http: self.plain_http,
            keyring: Keyring {
                authfile: self.authfile.clone(),
                kept: Some(self.logins()),
                ..Keyring::default()
            },
            hosts_dir: self.hosts_dir.clone(),
            http,
            ..RegistryOptions::default()
        }
    }

    /// Whether an image is to be lazy.
    #[must_use]
    pub fn lazy(&self, image: &Reference) -> Lazy {
        let name = image.repository_name();
        let own = self.repository.iter().find(|policy| policy.pattern.fits(&name));
        own.map_or(self.lazy, |policy| policy.lazy)
    }
}

fn quantity<'de, D: Deserializer<'de>, T>(
    from: D,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    let text = String::deserialize(from)?;
    parse(&text).map_err(serde::de::Error::custom)
}

fn some_size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    quantity(from, parse_size).map(Some)
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    quantity(from, parse_time)
}

fn some_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    quantity(from, parse_time).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_differs_from_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshotter.toml");
        assert_eq!(Config::read(&path, true).unwrap(), Config::default());
        assert!(Config::read(&path, false).is_err());
        let text = r#"
            root = "/x"
            cache-size = "1GiB"
            deadline = "30s"
            idle = "1min"
            lazy = "if-indexed"
            [[repository]]
            pattern = "docker.io/*"
            lazy = "never"
            [[repository]]
            pattern = "*/base/*"
            lazy = "always"
        "#;
        fs::write(&path, text).unwrap();
        let config = Config::read(&path, true).unwrap();
        assert_eq!(config.root, Path::new("/x"));
        assert_eq!(
            (config.cache_size, config.deadline),
            (Some(1 << 30), Some(Duration::from_secs(30)))
        );
        assert_eq!(config.connections, 16);
        for (image, lazy) in [
            ("debian", Lazy::Never),
            ("docker.io/base/x:1", Lazy::Never),
            ("registry.example.org/base/x:1", Lazy::Always),
            ("registry.example.org/base", Lazy::IfIndexed),
        ] {
            assert_eq!(config.lazy(&Reference::parse(image).unwrap()), lazy, "{image}");
        }
        for bad in [
            "rot = 1",
            "lazy = \"sometimes\"",
            "cache-size = \"much\"",
            "[[repository]]\npattern = \"x\"",
        ] {
            fs::write(&path, bad).unwrap();
            let error = Config::read(&path, true).unwrap_err().to_string();
            assert!(error.contains("snapshotter.toml"), "{error}");
        }
    }

    #[test]
    fn the_readme_shows_every_key() {
        let page = include_str!("../../README.md");
        let (_, page) = page.split_once("`/etc/tarblk/snapshotter.toml`").unwrap();
        let (_, page) = page.split_once("```toml\n").unwrap();
        let (example, _) = page.split_once("```").unwrap();
        // Comments behind values stay comments.
        let lines = example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
        let config: Config = toml::from_str(&lines.collect::<Vec<_>>().join("\n")).unwrap();
        assert_eq!(config.root, Config::default().root);
        assert_eq!(config.address, Config::default().address);
        assert_eq!(config.claim_timeout, Config::default().claim_timeout);
        assert_eq!(config.idle, Config::default().idle);
        assert_eq!((config.lazy, config.repository.len()), (Lazy::Always, 1));
    }
}
