//! What the options about registries mean together.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::path::{self, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use super::UsageError;
use super::cli::{RegistryArgs, TrustArg};
use crate::http::{HttpOptions, RetryPolicy, Secret, Timeouts};
use crate::open::trust::{CONFIG_DIR, PublicKey};
use crate::open::{SizeLimit, TrustPolicy};
use crate::source::registry::{Keyring, Login, RegistryOptions};

/// The most that is read of a file with credentials, in bytes.
const LONGEST_CREDENTIALS: u64 = 64 << 10;

impl RegistryArgs {
    /// The options as the library takes them. Reads the file that `--creds @FILE` names.
    ///
    /// # Errors
    /// When that cannot be read, or what was given is not `user:password`; no message quotes it.
    pub fn options(&self) -> anyhow::Result<RegistryOptions> {
        // Not by the parser of the command line: what comes from the environment would stand in its usage lines.
        let typed = match &self.creds {
            Some(typed) => Some(typed.clone()),
            None => env::var_os("TARBLK_CREDS").map(secret).transpose()?,
        };
        let given = typed.as_ref().filter(|given| !given.reveal().is_empty());
        // A daemon looks there again, from another directory.
        let authfile = self
            .authfile
            .clone()
            .or_else(|| env::var_os("REGISTRY_AUTH_FILE").map(PathBuf::from));
        let authfile = authfile.filter(|path| !path.as_os_str().is_empty());
        Ok(RegistryOptions {
            platform: self.platform.clone(),
            plain_http: self.plain_http,
            keyring: Keyring {
                given: given.map(login).transpose()?,
                authfile: authfile.map(path::absolute).transpose()?,
                usual: None,
                kept: None,
            },
            hosts_dir: self.hosts_dir.clone(),
            http: self.http(),
            pull: self.pull.into(),
            ..RegistryOptions::default()
        })
    }

    /// How long a layer may be.
    #[must_use]
    pub fn size(&self) -> SizeLimit {
        self.max_layer_size.map_or_else(SizeLimit::default, SizeLimit::of)
    }

    /// Whom indexes beside images are believed: what this machine's configuration says, and what was typed.
    ///
    /// # Errors
    /// When a key or the configuration cannot be used.
    pub fn trust(&self) -> anyhow::Result<TrustPolicy> {
        let mut policy = TrustPolicy::of_machine(&config_dir())?;
        if let Some(word) = self.trust {
            policy.registry = word == TrustArg::Registry;
            policy.repositories.clear();
        }
        for path in &self.trust_key {
            policy.keys.extend(PublicKey::of_file(path)?);
        }
        Ok(policy)
    }

    /// How requests are made, to registries and other servers.
    #[must_use]
    pub fn http(&self) -> HttpOptions {
        let mut options = HttpOptions {
            private_redirects: self.allow_private_redirects || is_set("TARBLK_ALLOW_PRIVATE_REDIRECTS"),
            ..HttpOptions::default()
        };
        if let Some(deadline) = self.retry_for {
            options.retry = RetryPolicy {
                tries: u32::MAX,
                deadline,
                ..options.retry
            };
        }
        if let Some(deadline) = self.deadline {
            let Timeouts { connect, head, stall } = options.timeouts;
            options.timeouts = Timeouts {
                connect: connect.min(deadline / 2),
                head: head.min(deadline / 2),
                stall: stall.min(deadline),
            };
            options.retry = RetryPolicy {
                tries: u32::MAX,
                wrong: u32::MAX,
                deadline: deadline.min(self.retry_for.unwrap_or(deadline)),
                ..options.retry
            };
        }
        options
    }

    /// The same, and nothing is waited for longer than `deadline`, if there is one.
    #[must_use]
    pub fn within(&self, deadline: Option<Duration>) -> Self {
        Self {
            deadline,
            ..self.clone()
        }
    }
}

/// The machine's configuration directory: the environment's `TARBLK_CONFIG_DIR` (for tests, and where /etc cannot be written), or
/// /etc/tarblk.
pub(super) fn config_dir() -> PathBuf {
    let dir = env::var_os("TARBLK_CONFIG_DIR").filter(|dir| !dir.is_empty());
    dir.map_or_else(|| PathBuf::from(CONFIG_DIR), PathBuf::from)
}

/// Whether the environment says yes: by anything but nothing, `0`, `no` and `false`.
fn is_set(name: &str) -> bool {
    let no = ["", "0", "no", "false"];
    env::var_os(name).is_some_and(|value| !no.iter().any(|no| value.eq_ignore_ascii_case(no)))
}

/// The environment's credentials.
fn secret(text: OsString) -> anyhow::Result<Secret> {
    let text = text.into_string();
    Ok(Secret::new(
        text.map_err(|_| UsageError("TARBLK_CREDS: it is not UTF-8".to_owned()))?,
    ))
}

fn login(given: &Secret) -> anyhow::Result<Login> {
    let text = match given.reveal().strip_prefix('@') {
        None => given.reveal().to_owned(),
        Some(path) => {
            let cannot = || format!("cannot read credentials from {path}");
            let file = File::open(path).with_context(cannot)?;
            let mut text = String::new();
            file.take(LONGEST_CREDENTIALS)
                .read_to_string(&mut text)
                .with_context(cannot)?;
            text
        }
    };
    Login::parse(&text).map_err(|why| UsageError(format!("--creds: {why}, or @FILE with that in it")).into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::cli::{Cli, Command};
    use super::*;

    fn args(more: &[&str]) -> RegistryArgs {
        let line = ["tarblk", "ls", "docker://host/x"].iter().chain(more);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Ls(args) => args.registry,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn credentials_come_from_the_line_or_a_file_and_are_not_shown() {
        let typed = args(&["--creds", "me:secret"]);
        assert!(!format!("{typed:?}").contains("secret"));
        let options = typed.options().unwrap();
        assert_eq!(options.keyring.given, Some(Login::parse("me:secret").unwrap()));
        assert!(!format!("{options:?}").contains("secret"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("creds");
        std::fs::write(&path, "me:secret\n").unwrap();
        let filed = args(&["--creds", &format!("@{}", path.display())]).options().unwrap();
        assert_eq!(filed.keyring.given, options.keyring.given);
        let error = args(&["--creds", "secret"]).options().unwrap_err();
        assert!(!format!("{error:#} {error:?}").contains("secret"));
        assert!(args(&["--creds", "@/there/is/no/such/file"]).options().is_err());
    }

    #[test]
    fn the_rest_is_as_typed() {
        let options = args(&["--platform", "linux/arm/v7", "--plain-http", "--hosts-dir", "/h"])
            .options()
            .unwrap();
        assert_eq!(options.platform.unwrap().to_string(), "linux/arm/v7");
        assert!(options.plain_http);
        assert_eq!(options.hosts_dir, std::path::Path::new("/h"));
        assert!(Cli::try_parse_from(["tarblk", "ls", "x", "--platform", "linux"]).is_err());
    }
}
