//! What a machine believes, by its configuration directory (`/etc/tarblk`). In: `tarblk.toml`, and a public key in each file of
//! `keys.d`. Out: a [`TrustPolicy`].
//!
//! ```toml
//! # Believe indexes that lie beside images, whoever may write there.
//! trust = "registry"
//! # Keys besides those in keys.d.
//! trust-keys = ["/usr/share/keys/team.pub"]
//! # Another word for some repositories; the first pattern that fits counts.
//! [[repository]]
//! pattern = "registry.example.org/team/*"
//! trust = "verified"
//! ```
//!
//! Invariant: nothing is read of a file or directory that another user than root and this process's own could have written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::key::PublicKey;
use super::owned::{check_owner, read_owned};
use super::{RepositoryTrust, TrustError, TrustPolicy};
use crate::source::registry::RepositoryPattern;

/// Where the machine's configuration is.
pub const CONFIG_DIR: &str = "/etc/tarblk";
/// The file of general settings in it.
const CONFIG_NAME: &str = "tarblk.toml";
/// The directory of keys in it.
const KEYS_NAME: &str = "keys.d";
/// So many files with keys are read.
const MOST_FILES: usize = 1024;

/// The settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Config {
    #[serde(default)]
    trust: Trust,
    #[serde(default)]
    trust_keys: Vec<PathBuf>,
    #[serde(default)]
    repository: Vec<RepositoryConfig>,
}

/// Another word for some repositories.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RepositoryConfig {
    pattern: RepositoryPattern,
    trust: Trust,
}

/// The words of `trust`, which are those of `--trust`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Trust {
    #[default]
    Verified,
    Registry,
}

impl TrustPolicy {
    /// What the configuration in `dir` says; nothing is believed where there is none. A key that cannot be used is left out with a
    /// warning: without it less is believed, not more.
    ///
    /// # Errors
    /// [`TrustError`] for settings that cannot be read, make no sense, or that another user could have written.
    pub fn of_machine(dir: &Path) -> Result<Self, TrustError> {
        let path = dir.join(CONFIG_NAME);
        let config = match read_owned(&path) {
            Ok(text) => parse(&text).map_err(|why| TrustError::Config { path, why })?,
            Err(TrustError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Config::default(),
            Err(error) => return Err(error),
        };
        let mut keys: Vec<PublicKey> = Vec::new();
        for file in config.trust_keys.into_iter().chain(key_files(&dir.join(KEYS_NAME))) {
            match PublicKey::of_file(&file) {
                Ok(found) => keys.extend(found),
                Err(error) => log::warn!("{error}"),
            }
        }
        let repositories = config.repository.into_iter().map(|own| RepositoryTrust {
            pattern: own.pattern,
            registry: own.trust == Trust::Registry,
        });
        Ok(Self {
            registry: config.trust == Trust::Registry,
            repositories: repositories.collect(),
            keys,
        })
    }
}

fn parse(text: &[u8]) -> Result<Config, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    toml::from_str(text).map_err(|error| error.message().lines().collect::<Vec<_>>().join(" "))
}

/// The files of a directory of keys, in the order of their names. Hidden ones and what editors leave are not meant.
fn key_files(dir: &Path) -> Vec<PathBuf> {
    let read = || -> Result<Vec<PathBuf>, TrustError> {
        let failed = |cause| TrustError::Read {
            path: dir.to_owned(),
            cause,
        };
        let meta = fs::metadata(dir).map_err(failed)?;
        check_owner(dir, &meta)?;
        let entries = fs::read_dir(dir).map_err(failed)?.flatten();
        let mut files: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| is_meant(path))
            .collect();
        files.sort();
        if files.len() > MOST_FILES {
            log::warn!("{}: only the first {MOST_FILES} keys are used", dir.display());
            files.truncate(MOST_FILES);
        }
        Ok(files)
    };
    match read() {
        Ok(files) => files,
        Err(TrustError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            log::warn!("{error}");
            Vec::new()
        }
    }
}

fn is_meant(path: &Path) -> bool {
    let is_key = path.extension().is_some_and(|end| end == "pub" || end == "pem");
    let name = path.file_name().and_then(|name| name.to_str());
    is_key && name.is_some_and(|name| !name.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown};

    use super::super::key::tests::{ed25519, p256, public_pem};
    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn keys_are_read_that_no_other_user_could_have_written() {
        let dir = tempfile::tempdir().unwrap();
        let keys = |dir: &Path| TrustPolicy::of_machine(dir).unwrap().keys;
        let none: [PublicKey; 0] = [];
        assert_eq!(keys(dir.path()), none);
        let keys_d = dir.path().join(KEYS_NAME);
        fs::create_dir(&keys_d).unwrap();
        mode(&keys_d, 0o755);
        let (a, b) = (ed25519().public(), p256().public());
        let (first, second) = (keys_d.join("a.pub"), keys_d.join("b.pem"));
        fs::write(&first, public_pem(&a)).unwrap();
        fs::write(&second, public_pem(&b)).unwrap();
        for ignored in [".hidden.pub", "c.pub~", "README"] {
            fs::write(keys_d.join(ignored), public_pem(&ed25519().public())).unwrap();
        }
        mode(&first, 0o644);
        mode(&second, 0o644);
        assert_eq!(keys(dir.path()), [a.clone(), b.clone()]);
        for writable in [0o664, 0o646] {
            mode(&first, writable);
            assert_eq!(keys(dir.path()), std::slice::from_ref(&b), "{writable:o}");
            assert!(matches!(PublicKey::of_file(&first), Err(TrustError::Unsafe { .. })));
        }
        mode(&first, 0o644);
        if rustix::process::geteuid().is_root() {
            chown(&first, Some(1234), None).unwrap();
            assert_eq!(keys(dir.path()), std::slice::from_ref(&b));
            chown(&first, Some(0), None).unwrap();
        }
        // What is no key, or half of one, is left out; the others stay.
        fs::write(&first, &public_pem(&a)[..40]).unwrap();
        assert_eq!(keys(dir.path()), std::slice::from_ref(&b));
        fs::remove_file(&first).unwrap();
        fs::create_dir(&first).unwrap();
        assert_eq!(keys(dir.path()), [b]);
        mode(&keys_d, 0o777);
        assert_eq!(keys(dir.path()), none);
    }

    #[test]
    fn the_file_that_is_installed_shows_every_key() {
        let file = include_str!("../../../packaging/config/tarblk.toml");
        assert!(matches!(parse(file.as_bytes()).unwrap().trust, Trust::Verified));
        let shown = file.lines().filter_map(|line| line.strip_prefix("# "));
        let settings = shown.filter(|line| line.starts_with("[[") || line.contains(" = "));
        let config = parse(settings.collect::<Vec<_>>().join("\n").as_bytes()).unwrap();
        assert_eq!((config.trust_keys.len(), config.repository.len()), (1, 1));
    }

    #[test]
    fn the_registry_is_believed_by_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG_NAME);
        let policy = |text: &str| {
            fs::write(&path, text).unwrap();
            mode(&path, 0o644);
            TrustPolicy::of_machine(dir.path())
        };
        assert!(!policy("").unwrap().registry);
        assert!(!policy("trust = \"verified\"").unwrap().registry);
        assert!(policy("trust = \"registry\"").unwrap().registry);
        let key = ed25519().public();
        let file = dir.path().join("team.pub");
        fs::write(&file, public_pem(&key)).unwrap();
        mode(&file, 0o644);
        let named = format!("trust-keys = [{:?}, \"/nonexistent\"]", file.display().to_string());
        assert_eq!(policy(&named).unwrap().keys, [key]);
        let own = policy("[[repository]]\npattern = \"docker.io/*\"\ntrust = \"registry\"").unwrap();
        assert!(own.believes_any("docker.io/library/debian") && !own.believes_any("quay.io/library/debian"));
        for wrong in [
            "trust = \"all\"",
            "trust = true",
            "trsut = \"registry\"",
            "trust",
            "[[repository]]\npattern = \"*\"",
            "[[repository]]\ntrust = \"registry\"",
            "[[repository]]\npattern = \"*\"\ntrust = \"registry\"\nlazy = \"never\"",
        ] {
            let said = policy(wrong).unwrap_err();
            assert!(matches!(said, TrustError::Config { .. }), "{wrong}: {said}");
            assert_eq!(said.to_string().lines().count(), 1, "{said}");
        }
        assert!(policy("trust = \"registry\"").unwrap().registry);
        mode(&path, 0o666);
        let said = TrustPolicy::of_machine(dir.path()).unwrap_err();
        assert!(matches!(said, TrustError::Unsafe { .. }), "{said}");
    }
}
