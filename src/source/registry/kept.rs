//! Logins that came with pulls (a kubelet's, by the CRI) and outlive them. In: a repository and a login; a repository. Out: a file that only
//! root reads, written by whoever sees the pulls; from it, in processes that fetch layers, the logins that may work, the newest first.
//!
//! A login is used for the repository it came for and for no other: a tenant's secret never opens what another one's pod wants.
//! *Invariant:* neither `Debug` nor a message shows one.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::login::Login;

/// No file is longer, in bytes.
const LONGEST_FILE: u64 = 8 << 20;

/// So many logins are kept at most: those that came first are forgotten first.
const MOST_LOGINS: usize = 1024;

/// So many of one repository.
const MOST_OF_REPOSITORY: usize = 8;

/// The form of the file that is written and understood here.
const VERSION: u32 = 1;

/// Logins by repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptLogins {
    /// The newest first.
    logins: Vec<KeptLogin>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptLogin {
    host: String,
    repository: String,
    login: Login,
}

#[derive(Serialize, Deserialize)]
struct KeptFile {
    version: u32,
    logins: Vec<KeptLogin>,
}

impl KeptLogins {
    /// Reads a file; none is there where there is no file.
    ///
    /// # Errors
    /// What the kernel says, and that it is no such file; nothing of it is quoted.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => file.take(LONGEST_FILE).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        // The parser's own message can quote what it found there.
        let file: KeptFile = serde_json::from_slice(&bytes)
            .map_err(|error| io::Error::other(format!("it holds no logins (line {})", error.line())))?;
        if file.version != VERSION {
            return Err(io::Error::other("it is of another version of tarblk"));
        }
        Ok(Self { logins: file.logins })
    }

    /// What the file is to hold.
    ///
    /// # Errors
    /// None that can happen.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let file = KeptFile {
            version: VERSION,
            logins: self.logins.clone(),
        };
        serde_json::to_vec(&file).map_err(io::Error::from)
    }

    /// Keeps a login of a repository; false if it was the newest one already.
    pub fn keep(&mut self, host: &str, repository: &str, login: &Login) -> bool {
        let is_of = |kept: &KeptLogin| kept.host == host && kept.repository == repository;
        if self
            .logins
            .iter()
            .find(|kept| is_of(kept))
            .is_some_and(|kept| kept.login == *login)
        {
            return false;
        }
        self.logins.retain(|kept| !is_of(kept) || kept.login != *login);
        let new = KeptLogin {
            host: host.to_owned(),
            repository: repository.to_owned(),
            login: login.clone(),
        };
        self.logins.insert(0, new);
        let mut count = 0;
        self.logins.retain(|kept| {
            count += usize::from(is_of(kept));
            !is_of(kept) || count <= MOST_OF_REPOSITORY
        });
        self.logins.truncate(MOST_LOGINS);
        true
    }

    /// The logins of a repository, the newest first.
    #[must_use]
    pub fn of(&self, host: &str, repository: &str) -> Vec<Login> {
        let of_it = self
            .logins
            .iter()
            .filter(|kept| kept.host == host && kept.repository == repository);
        of_it.map(|kept| kept.login.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(user: &str) -> Login {
        Login::parse(&format!("{user}:word-of-{user}")).unwrap()
    }

    #[test]
    fn the_newest_login_of_a_repository_comes_first() {
        let mut kept = KeptLogins::default();
        assert!(kept.keep("host", "a", &login("one")));
        assert!(!kept.keep("host", "a", &login("one")));
        assert!(kept.keep("host", "b", &login("other")));
        assert!(kept.keep("host", "a", &login("two")));
        assert_eq!(kept.of("host", "a"), [login("two"), login("one")]);
        // It works again.
        assert!(kept.keep("host", "a", &login("one")));
        assert_eq!(kept.of("host", "a"), [login("one"), login("two")]);
        assert_eq!(kept.of("host", "b"), [login("other")]);
        assert!(kept.of("host", "a/b").is_empty() && kept.of("elsewhere", "a").is_empty());
        for number in 0..20 {
            kept.keep("host", "a", &login(&format!("n{number}")));
        }
        assert_eq!(kept.of("host", "a").len(), MOST_OF_REPOSITORY);
        assert_eq!(kept.of("host", "a")[0], login("n19"));
        assert_eq!(kept.of("host", "b").len(), 1);
        for number in 0..MOST_LOGINS {
            kept.keep("host", &format!("r{number}"), &login("x"));
        }
        assert!(kept.of("host", "b").is_empty());
    }

    #[test]
    fn a_file_holds_what_was_kept_and_nothing_shows_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logins.json");
        assert_eq!(KeptLogins::read(&path).unwrap(), KeptLogins::default());
        let mut kept = KeptLogins::default();
        kept.keep("host", "a", &login("one"));
        std::fs::write(&path, kept.to_bytes().unwrap()).unwrap();
        assert_eq!(KeptLogins::read(&path).unwrap(), kept);
        assert!(!format!("{kept:?}").contains("word-of"));
        for bad in [
            "word-of-one",
            r#"{"version":2,"logins":[]}"#,
            r#"{"version":1,"logins":["word-of-one"]}"#,
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(!KeptLogins::read(&path).unwrap_err().to_string().contains("word-of"));
        }
    }
}
