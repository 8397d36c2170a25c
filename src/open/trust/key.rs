//! Keys. In: PEM, as `openssl genpkey` and cosign write it: `PUBLIC KEY` (`SubjectPublicKeyInfo`, RFC 5280) and `PRIVATE KEY` (PKCS#8,
//! RFC 5958), of Ed25519 or of ECDSA over P-256 with SHA-256; private ones also under a password
//! ([`cosign`](super::cosign)). Out: whether something was signed, or a signature.
//!
//! Of the DER in a public key there are two forms only, each a prefix of its own and then the key, so nothing is parsed: what is not
//! one of them to the byte is refused.

use std::path::Path;

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ED25519, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    UnparsedPublicKey, VerificationAlgorithm,
};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use sha2::{Digest as _, Sha256};

use super::super::artifact::Listed;
use super::super::signature::Signature;
use super::TrustError;
use super::cosign::{CosignFault, EncryptedKey};
use super::owned::read_owned;
use crate::fetch::KeyId;
use crate::http::Secret;

/// `SubjectPublicKeyInfo` of Ed25519 (RFC 8410) up to the 32 bytes of the key.
const ED25519_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// `SubjectPublicKeyInfo` of P-256 (RFC 5480) up to the 65 bytes of the uncompressed point.
const P256_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const ED25519_LEN: usize = 32;
const P256_LEN: usize = 65;
/// How an uncompressed point begins.
const UNCOMPRESSED: u8 = 4;

/// No file with keys has more of them.
const MOST_KEYS: usize = 64;

/// What is wrong with a file that should hold public keys.
const NO_PUBLIC_KEY: &str =
    "it holds no public key (PEM, `-----BEGIN PUBLIC KEY-----`) of Ed25519 or ECDSA P-256, whole and nothing else";
/// What is wrong with a file that should hold a private key.
const NO_PRIVATE_KEY: &str = "it holds no private key (PEM, `-----BEGIN PRIVATE KEY-----`, PKCS#8 without a password) of Ed25519 or ECDSA \
     P-256, nor one of cosign's; `openssl genpkey -algorithm ed25519` and `cosign generate-key-pair` make one, `openssl pkcs8 -topk8 \
     -nocrypt` writes another form as this one";
/// What is wrong with a file that begins as cosign's do.
const NO_COSIGN_KEY: &str = "it holds a key of cosign's that is damaged, or of a form that is not known here";
const COSTS_TOO_MUCH: &str = "it holds a key of cosign's that takes more memory or time than any that cosign makes";

/// How a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ed25519,
    P256,
}

impl Kind {
    fn verification(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::Ed25519 => &ED25519,
            Self::P256 => &ECDSA_P256_SHA256_ASN1,
        }
    }

    const fn prefix(self) -> &'static [u8] {
        match self {
            Self::Ed25519 => &ED25519_PREFIX,
            Self::P256 => &P256_PREFIX,
        }
    }
}

/// A key whose signatures are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    kind: Kind,
    /// As ring takes it: the key's 32 bytes, or the point's 65.
    key: Vec<u8>,
    id: KeyId,
}

impl PublicKey {
    /// The keys in a file, which nobody but root and this user may be able to write to.
    ///
    /// # Errors
    /// [`TrustError`]: the file cannot be read, another user could have written it, or it holds something else than keys.
    pub fn of_file(path: &Path) -> Result<Vec<Self>, TrustError> {
        let keys = Self::parse(&read_owned(path)?);
        keys.ok_or_else(|| TrustError::Key {
            path: path.to_owned(),
            why: NO_PUBLIC_KEY,
        })
    }

    /// The keys in PEM; `None` if there is none, or something else as well.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Vec<Self>> {
        let found: Result<Vec<(pem::SectionKind, Vec<u8>)>, _> = <(pem::SectionKind, Vec<u8>)>::pem_slice_iter(text)
            .take(MOST_KEYS + 1)
            .collect();
        let found = found.ok()?;
        let is_few = (1..=MOST_KEYS).contains(&found.len());
        let keys: Option<Vec<Self>> = found
            .into_iter()
            .map(|(kind, der)| SubjectPublicKeyInfoDer::from_pem(kind, der).and_then(|der| Self::of_der(&der)))
            .collect();
        keys.filter(|_| is_few)
    }

    /// A key by its `SubjectPublicKeyInfo`.
    fn of_der(der: &[u8]) -> Option<Self> {
        let (kind, key) = match (der.strip_prefix(&ED25519_PREFIX), der.strip_prefix(&P256_PREFIX)) {
            (Some(key), _) if key.len() == ED25519_LEN => (Kind::Ed25519, key),
            (_, Some(key)) if key.len() == P256_LEN && key.first() == Some(&UNCOMPRESSED) => (Kind::P256, key),
            _ => return None,
        };
        Some(Self {
            kind,
            key: key.to_vec(),
            id: KeyId(Sha256::digest(der).into()),
        })
    }

    /// A key as ring has it.
    fn of_raw(kind: Kind, key: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(kind.prefix());
        hash.update(key);
        Self {
            kind,
            key: key.to_vec(),
            id: KeyId(hash.finalize().into()),
        }
    }

    /// By what it is known: SHA-256 of its DER.
    #[must_use]
    pub const fn id(&self) -> KeyId {
        self.id
    }

    /// Whether this key has signed `statement`.
    #[must_use]
    pub(super) fn has_signed(&self, statement: &[u8], signature: &[u8]) -> bool {
        let key = UnparsedPublicKey::new(self.kind.verification(), &self.key);
        key.verify(statement, signature).is_ok()
    }
}

/// A key that signs indexes. Its `Debug` shows the public half.
pub struct SigningKey {
    pair: Pair,
    public: PublicKey,
}

enum Pair {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

impl SigningKey {
    /// The key in a file. `password` is asked for one if the key takes it, and says why there is none.
    ///
    /// # Errors
    /// [`TrustError`]: the file cannot be read, another user could have written it, or it holds no key of a kind that can be used;
    /// there is no password, or another one is right.
    pub fn of_file(path: &Path, password: impl FnOnce() -> Result<Secret, String>) -> Result<Self, TrustError> {
        let text = read_owned(path)?;
        let unusable = |why| TrustError::Key {
            path: path.to_owned(),
            why,
        };
        let refused = |why| TrustError::Password {
            path: path.to_owned(),
            why,
        };
        let fault = |fault| match fault {
            CosignFault::Form => unusable(NO_COSIGN_KEY),
            CosignFault::Cost => unusable(COSTS_TOO_MUCH),
            CosignFault::Password => refused("this one is not it".to_owned()),
        };
        let key = match EncryptedKey::find(&text) {
            Some(encrypted) => {
                let encrypted = encrypted.map_err(fault)?;
                let password = password().map_err(refused)?;
                Self::of_der(&encrypted.open(password.reveal().as_bytes()).map_err(fault)?)
            }
            None => Self::parse(&text),
        };
        key.ok_or_else(|| unusable(NO_PRIVATE_KEY))
    }

    /// The first key in PEM that takes no password.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(text).ok()?;
        Self::of_der(der.secret_pkcs8_der())
    }

    /// A key by its PKCS#8.
    fn of_der(der: &[u8]) -> Option<Self> {
        // OpenSSL writes Ed25519 keys without the public half, which ring would compare.
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            let public = PublicKey::of_raw(Kind::Ed25519, pair.public_key().as_ref());
            return Some(Self {
                pair: Pair::Ed25519(pair),
                public,
            });
        }
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der, &SystemRandom::new()).ok()?;
        let public = PublicKey::of_raw(Kind::P256, pair.public_key().as_ref());
        Some(Self {
            pair: Pair::P256(pair),
            public,
        })
    }

    /// The half by which others check its signatures.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public.clone()
    }

    /// Signs that an index is the layer's.
    ///
    /// # Errors
    /// [`TrustError::Sign`] for an index whose hot part's digest is not known, and when the machine has no random numbers.
    pub fn sign(&self, listed: &Listed) -> Result<Signature, TrustError> {
        let statement = listed
            .statement()
            .ok_or(TrustError::Sign("the digest of the index's hot part is not known"))?;
        let bytes = match &self.pair {
            Pair::Ed25519(pair) => pair.sign(&statement).as_ref().to_vec(),
            Pair::P256(pair) => {
                let signed = pair.sign(&SystemRandom::new(), &statement);
                let signed = signed.map_err(|_| TrustError::Sign("the system gives no random numbers"))?;
                signed.as_ref().to_vec()
            }
        };
        Ok(Signature {
            key: self.public.id,
            bytes,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn pem(kind: &str, der: &[u8]) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        let lines: Vec<&str> = (0..text.len().div_ceil(64))
            .map(|line| &text[line * 64..text.len().min(line * 64 + 64)])
            .collect();
        format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
    }

    pub(in crate::open::trust) fn public_pem(key: &PublicKey) -> String {
        pem("PUBLIC KEY", &[key.kind.prefix(), &key.key].concat())
    }

    pub(in crate::open::trust) fn ed25519() -> SigningKey {
        let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        SigningKey::parse(pem("PRIVATE KEY", der.as_ref()).as_bytes()).unwrap()
    }

    pub(in crate::open::trust) fn p256() -> SigningKey {
        let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).unwrap();
        SigningKey::parse(pem("PRIVATE KEY", der.as_ref()).as_bytes()).unwrap()
    }

    /// Made by OpenSSL 3: `openssl genpkey -algorithm ed25519`, `openssl pkey -pubout`, `openssl pkey -pubout -outform DER | sha256sum`.
    const OPENSSL: [(&str, &str, &str); 2] = [
        (
            "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIHLslPuI0ws63T/wnFNIysw5ImdEIPxtXQi93YEn8H/Z\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA8+lph4aQHW4ptLhVjsxUOKwfLkFzvq2bFR04+PKwSnQ=\n-----END PUBLIC KEY-----\n",
            "b1ca037a09825c3870e693e5ebcd5fefda5119363cdace4dee15e9583a32cdf2",
        ),
        (
            "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgfKC7ceaf1/JFo7ZY\nVU/xBvvz86z7Rz68vjwpHCkJQWShRANCAATL+4wgom0NeBumF+uKtZEHYpdseTxp\n5HMZQeJS+dJQDjSM+U2QzU6inVo6q2ri0ZPqP2rBY8TKYMd1gBmQQ0J+\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEy/uMIKJtDXgbphfrirWRB2KXbHk8\naeRzGUHiUvnSUA40jPlNkM1Oop1aOqtq4tGT6j9qwWPEymDHdYAZkENCfg==\n-----END PUBLIC KEY-----\n",
            "62c1308bcd79c8177e4d6ad8f291fbdc07dbc2bd2e7ecf9a5966002c0608d9c8",
        ),
    ];

    #[test]
    fn keys_of_openssl_are_read_and_belong_together() {
        for (private, public, id) in OPENSSL {
            let key = SigningKey::parse(private.as_bytes()).unwrap();
            let public = PublicKey::parse(public.as_bytes()).unwrap();
            assert_eq!(public, [key.public()]);
            assert_eq!(public[0].id().hex(), id);
        }
    }

    #[test]
    fn keys_that_are_cut_or_of_another_kind_are_none() {
        for key in [ed25519(), p256()] {
            let text = public_pem(&key.public());
            assert_eq!(PublicKey::parse(text.as_bytes()).unwrap(), [key.public()]);
            // Several in one file are several keys; one that is none spoils the file.
            let two = format!("{text}# the other one\n{text}");
            assert_eq!(PublicKey::parse(two.as_bytes()).unwrap().len(), 2);
            for len in 0..text.trim_end().len() {
                assert_eq!(PublicKey::parse(&text.as_bytes()[..len]), None, "{len} bytes");
            }
            let der = [key.public.kind.prefix(), &key.public.key].concat();
            for cut in 0..der.len() {
                assert!(PublicKey::of_der(&der[..cut]).is_none(), "{cut} bytes");
            }
            assert!(PublicKey::of_der(&[&der[..], b"\0"].concat()).is_none());
            // A bit of what says which algorithm it is.
            for bit in 0..key.public.kind.prefix().len() * 8 {
                let mut other = der.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                assert!(PublicKey::of_der(&other).is_none(), "bit {bit}");
            }
        }
        assert!(PublicKey::parse(b"").is_none());
        assert!(PublicKey::parse(pem("CERTIFICATE", b"1234").as_bytes()).is_none());
        assert!(PublicKey::parse(pem("PRIVATE KEY", b"1234").as_bytes()).is_none());
        assert!(PublicKey::parse(public_pem(&ed25519().public()).repeat(MOST_KEYS + 1).as_bytes()).is_none());
    }

    #[test]
    fn keys_of_cosign_take_their_password() {
        use super::super::cosign::tests::{KEYS, PASSWORD};
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("cosign.key");
            std::fs::write(&path, text).unwrap();
            path
        };
        let secret = |text: &str| Ok(Secret::new(text.to_owned()));
        for (private, public) in KEYS {
            let password = std::str::from_utf8(PASSWORD).unwrap();
            let key = SigningKey::of_file(&file(private), || secret(password)).unwrap();
            assert_eq!(PublicKey::parse(public.as_bytes()).unwrap(), [key.public()]);
            let said = |private: &str, password| SigningKey::of_file(&file(private), || password).unwrap_err();
            let wrong = said(private, secret("other"));
            assert!(matches!(wrong, TrustError::Password { .. }), "{wrong}");
            let none = said(private, Err("there is nobody to ask".to_owned()));
            assert!(
                none.to_string()
                    .ends_with("cosign.key takes a password: there is nobody to ask"),
                "{none}"
            );
            let damaged = said(&private.replace("eyJ", "eyA"), secret(password));
            assert!(matches!(damaged, TrustError::Key { .. }), "{damaged}");
        }
        // Nobody is asked where none is needed.
        let [(ed25519, ..), _] = OPENSSL;
        assert!(SigningKey::of_file(&file(ed25519), || unreachable!()).is_ok());
    }

    #[test]
    fn private_keys_that_are_cut_or_encrypted_are_none() {
        let [(ed25519, ..), (p256, ..)] = OPENSSL;
        for text in [ed25519, p256] {
            for len in 0..text.trim_end().len() {
                assert!(SigningKey::parse(&text.as_bytes()[..len]).is_none(), "{len} bytes");
            }
        }
        assert!(SigningKey::parse(super::super::cosign::tests::KEYS[0].0.as_bytes()).is_none());
        assert!(!format!("{:?}", super::tests::ed25519()).contains("pair"));
    }
}
