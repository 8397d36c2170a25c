//! Whom an index is believed. In: what a machine's configuration and a command say, and an index that was found beside an image. Out: on
//! whose word it is believed ([`IndexTrust`]), or that it is not.
//!
//! An index decides what a layer's files are: names, modes, which bytes are which file's. Whoever may write to a repository can put
//! one beside an image that has right digests of all bytes and lies about everything else, so lying there says nothing for it. It
//! takes a signature by a trusted key, a digest in the image's manifest, a digest that was asked for, or that somebody said in so
//! many words that the registry is to be believed.
//!
//! Parts: `key` (public and private keys in PEM), `cosign` (private keys under a password), `machine` (keys and words of the machine's
//! configuration directory), `owned` (files that nobody else may write to).
//!
//! Invariant: nothing is asked of any server here; a signature is right or wrong by the key and the bytes alone.

mod cosign;
mod key;
mod machine;
mod owned;

use std::io;
use std::path::PathBuf;

use super::artifact::Listed;
use crate::fetch::{IndexTrust, KeyId};
use crate::source::registry::RepositoryPattern;

pub use key::{PublicKey, SigningKey};
pub use machine::CONFIG_DIR;

/// Which indexes are believed that lie beside an image, whose manifest does not name them, and that nothing pins.
#[derive(Clone, Debug, Default)]
pub struct TrustPolicy {
    /// All of them: whoever may write to the repository is believed (`--trust registry`).
    pub registry: bool,
    /// The same for some repositories; the first whose pattern fits counts.
    pub repositories: Vec<RepositoryTrust>,
    /// Those that one of these keys has signed.
    pub keys: Vec<PublicKey>,
}

/// Whether indexes are believed that lie beside images in some repositories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryTrust {
    /// Which repositories.
    pub pattern: RepositoryPattern,
    /// Whether whoever may write there is believed.
    pub registry: bool,
}

impl TrustPolicy {
    /// Believes whatever lies beside an image.
    #[must_use]
    pub fn of_registry() -> Self {
        Self {
            registry: true,
            ..Self::default()
        }
    }

    /// Believes what one of these keys has signed.
    #[must_use]
    pub fn of_keys(keys: Vec<PublicKey>) -> Self {
        Self {
            keys,
            ..Self::default()
        }
    }

    /// On whose word an index is believed that was found beside an image in `repository` ([`Reference::repository_name`]); `None` if
    /// it is not.
    ///
    /// [`Reference::repository_name`]: crate::source::registry::Reference::repository_name
    #[must_use]
    pub fn of_listed(&self, repository: &str, listed: &Listed) -> Option<IndexTrust> {
        self.signer(listed)
            .map(|key| IndexTrust::Key { key })
            .or_else(|| self.believes_registry(repository).then_some(IndexTrust::Registry))
    }

    /// The key that has signed an index, of those that are believed.
    pub(super) fn signer(&self, listed: &Listed) -> Option<KeyId> {
        listed.signatures.iter().find_map(|signature| {
            let key = self.keys.iter().find(|key| key.id() == signature.key)?;
            key.has_signed(&listed.statement()?, &signature.bytes)
                .then_some(signature.key)
        })
    }

    /// Whether any index could be believed that lies beside an image in `repository`.
    #[must_use]
    pub fn believes_any(&self, repository: &str) -> bool {
        !self.keys.is_empty() || self.believes_registry(repository)
    }

    /// Whether whoever may write to `repository` is believed.
    fn believes_registry(&self, repository: &str) -> bool {
        let own = self.repositories.iter().find(|own| own.pattern.fits(repository));
        own.map_or(self.registry, |own| own.registry)
    }
}

/// Why a key, a signature or the machine's configuration cannot be used. Each message is one line that names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// Another user could have written it.
    #[error(
        "{path} is not used: {why}; who can write it decides whom indexes are believed, so it has to be root's or yours, and writable by its owner alone (chmod go-w)"
    )]
    Unsafe {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with its owner or mode.
        why: String,
    },
    /// A file holds no key that can be used.
    #[error("{path}: {why}")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        why: &'static str,
    },
    /// A private key takes a password, and it is not there or another one.
    #[error("{path} takes a password: {why}")]
    Password {
        /// The file.
        path: PathBuf,
        /// What was wrong with it, or why there is none.
        why: String,
    },
    /// The machine's configuration makes no sense.
    #[error("{path}: {why}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A signature could not be made.
    #[error("cannot sign: {0}")]
    Sign(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{Algorithm, Digest};

    const REPOSITORY: &str = "registry.example.org/team/app";

    fn listed(name: &str) -> Listed {
        let digest = |what: &str| Digest::of(Algorithm::Sha256, format!("{name} {what}").as_bytes());
        Listed {
            layer: digest("layer"),
            digest: digest("index"),
            size: 1234,
            hot: Some((1000, digest("hot"))),
            signatures: Vec::new(),
        }
    }

    fn signed(listed: &Listed, keys: &[&SigningKey]) -> Listed {
        let mut signed = listed.clone();
        signed.signatures = keys.iter().map(|key| key.sign(listed).unwrap()).collect();
        signed
    }

    #[test]
    fn what_is_signed_is_believed_by_the_key_alone() {
        for key in [key::tests::ed25519(), key::tests::p256()] {
            let other = key::tests::ed25519();
            let policy = |keys: &[&SigningKey]| TrustPolicy::of_keys(keys.iter().map(|key| key.public()).collect());
            let good = signed(&listed("a"), &[&key]);
            let believed = Some(IndexTrust::Key { key: key.public().id() });
            assert_eq!(policy(&[&key]).of_listed(REPOSITORY, &good), believed);
            assert_eq!(policy(&[&other, &key]).of_listed(REPOSITORY, &good), believed);
            // No key, another key, no signature, another one's signature.
            assert_eq!(TrustPolicy::default().of_listed(REPOSITORY, &good), None);
            assert_eq!(policy(&[&other]).of_listed(REPOSITORY, &good), None);
            assert_eq!(policy(&[&key]).of_listed(REPOSITORY, &listed("a")), None);
            assert_eq!(
                policy(&[&key]).of_listed(REPOSITORY, &signed(&listed("a"), &[&other])),
                None
            );
            // Of several one is enough.
            let both = signed(&listed("a"), &[&other, &key]);
            assert_eq!(policy(&[&key]).of_listed(REPOSITORY, &both), believed);
            // A signature says it under another key's name.
            let mut named = signed(&listed("a"), &[&other]);
            named.signatures[0].key = key.public().id();
            assert_eq!(policy(&[&key]).of_listed(REPOSITORY, &named), None);
            // The registry's word is asked for last.
            let registry = TrustPolicy {
                registry: true,
                ..policy(&[&key])
            };
            assert_eq!(registry.of_listed(REPOSITORY, &good), believed);
            assert_eq!(registry.of_listed(REPOSITORY, &listed("a")), Some(IndexTrust::Registry));
        }
    }

    #[test]
    fn a_registry_is_believed_by_repository() {
        let own = |pattern: &str, registry| RepositoryTrust {
            pattern: RepositoryPattern::new(pattern),
            registry,
        };
        let mut policy = TrustPolicy {
            repositories: vec![
                own("registry.example.org/team/mirror/*", false),
                own("registry.example.org/team/*", true),
            ],
            ..TrustPolicy::default()
        };
        let believed = |policy: &TrustPolicy, repository: &str| {
            let found = policy.of_listed(repository, &listed("a"));
            assert_eq!(policy.believes_any(repository), found.is_some(), "{repository}");
            found == Some(IndexTrust::Registry)
        };
        for (repository, expected) in [
            (REPOSITORY, true),
            ("registry.example.org/team/mirror/app", false),
            ("registry.example.org/other/app", false),
            ("docker.io/library/debian", false),
        ] {
            assert_eq!(believed(&policy, repository), expected, "{repository}");
        }
        policy.registry = true;
        assert!(believed(&policy, "docker.io/library/debian"));
        assert!(!believed(&policy, "registry.example.org/team/mirror/app"));
    }

    #[test]
    fn a_signature_is_of_one_layer_and_one_index() {
        let key = key::tests::ed25519();
        let policy = TrustPolicy::of_keys(vec![key.public()]);
        let good = signed(&listed("a"), &[&key]);
        let other = listed("b");
        let replayed: [&dyn Fn(&mut Listed); 7] = [
            &|listed| listed.layer = other.layer.clone(),
            &|listed| listed.digest = other.digest.clone(),
            &|listed| listed.size += 1,
            &|listed| listed.hot = other.hot.clone(),
            &|listed| listed.hot = Some((999, listed.hot.clone().unwrap().1)),
            &|listed| listed.hot = None,
            &|listed| listed.signatures[0].bytes[10] ^= 1,
        ];
        for replay in replayed {
            let mut wrong = good.clone();
            replay(&mut wrong);
            assert_eq!(policy.of_listed(REPOSITORY, &wrong), None, "{wrong:?}");
        }
    }
}
