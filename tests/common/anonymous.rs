//! Clients of registries and servers that know nothing of this machine: no credentials of its user, no `hosts.toml`, short waits.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tarblk::internals::http::{HttpOptions, RetryPolicy};
use tarblk::internals::source::registry::{Keyring, RegistryOptions};

/// How a server is talked to: requests are sent `tries` times, 10 ms apart at first.
pub(crate) fn http_options(tries: u32) -> HttpOptions {
    HttpOptions {
        retry: RetryPolicy {
            tries,
            wrong: tries,
            first_pause: Duration::from_millis(10),
            ..RetryPolicy::default()
        },
        ..HttpOptions::default()
    }
}

/// The same for a registry, for linux/amd64.
pub(crate) fn registry_options(tries: u32) -> RegistryOptions {
    RegistryOptions {
        hosts_dir: "/nonexistent".into(),
        keyring: Keyring {
            authfile: Some(empty_authfile()),
            ..Keyring::default()
        },
        platform: Some("linux/amd64".parse().unwrap()),
        http: http_options(tries),
        ..RegistryOptions::default()
    }
}

/// A file of credentials that has none.
pub(crate) fn empty_authfile() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // Put there whole: other tests read it now.
    let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
    file.write_all(b"{}").unwrap();
    let path = dir.join("no-credentials.json");
    file.persist(&path).unwrap();
    path
}
