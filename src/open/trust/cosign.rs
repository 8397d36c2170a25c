//! Private keys under a password, as `cosign generate-key-pair` and `import-key-pair` write them. In: PEM and the password. Out: the key
//! in PKCS#8 (DER).
//!
//! The PEM's label is `ENCRYPTED SIGSTORE PRIVATE KEY`, that of older versions `ENCRYPTED COSIGN PRIVATE KEY`; in it is JSON, whose binary values
//! are base64 (the format is that of package `encrypted` of go-securesystemslib):
//!
//! ```json
//! {"kdf": {"name": "scrypt", "params": {"N": 65536, "r": 8, "p": 1}, "salt": "32 bytes"},
//!  "cipher": {"name": "nacl/secretbox", "nonce": "24 bytes"},
//!  "ciphertext": "the key, 16 bytes longer"}
//! ```
//!
//! scrypt (RFC 7914) makes 32 bytes of password and salt, with which secretbox (`XSalsa20` and `Poly1305`) opens the rest. cosign writes
//! this also where there is no password: then it is the empty one.
//!
//! Invariant: a file that asks for more than [`MOST_MEMORY`] or [`MOST_WORK`] is refused before any of it is spent.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crypto_secretbox::aead::{Aead as _, KeyInit as _};
use crypto_secretbox::{Nonce, XSalsa20Poly1305};
use serde::Deserialize;

/// What the PEM is called, by age.
const LABELS: [&str; 2] = ["ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY"];

/// scrypt may take so much memory, in bytes; cosign has it take 64 MiB.
const MOST_MEMORY: u64 = 256 << 20;
/// scrypt may pass over its memory so often.
const MOST_WORK: u32 = 16;

const NONCE_LEN: usize = 24;

/// Why an encrypted key cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CosignFault {
    /// It is damaged, or of a later form.
    Form,
    /// It would take too much memory or time.
    Cost,
    /// The password is not its password.
    Password,
}

#[derive(Deserialize)]
struct Envelope {
    kdf: Kdf,
    cipher: Cipher,
    ciphertext: String,
}

#[derive(Deserialize)]
struct Kdf {
    name: String,
    params: KdfParams,
    salt: String,
}

#[derive(Deserialize)]
struct KdfParams {
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
}

#[derive(Deserialize)]
struct Cipher {
    name: String,
    nonce: String,
}

/// A key that takes a password.
pub(super) struct EncryptedKey {
    parameters: scrypt::Params,
    salt: Vec<u8>,
    nonce: [u8; NONCE_LEN],
    sealed: Vec<u8>,
}

impl EncryptedKey {
    /// The first such key in PEM; `None` if there is none.
    pub(super) fn find(text: &[u8]) -> Option<Result<Self, CosignFault>> {
        let text = std::str::from_utf8(text).ok()?;
        let body = LABELS.iter().find_map(|label| pem_body(text, label))?;
        Some(body.and_then(|body| Self::parse(&body)))
    }

    fn parse(json: &[u8]) -> Result<Self, CosignFault> {
        let Envelope {
            kdf,
            cipher,
            ciphertext,
        } = serde_json::from_slice(json).map_err(|_| CosignFault::Form)?;
        if kdf.name != "scrypt" || cipher.name != "nacl/secretbox" {
            return Err(CosignFault::Form);
        }
        let binary = |text: &str| STANDARD.decode(text).map_err(|_| CosignFault::Form);
        let nonce = binary(&cipher.nonce)?.try_into().map_err(|_| CosignFault::Form)?;
        Ok(Self {
            parameters: kdf.params.check()?,
            salt: binary(&kdf.salt)?,
            nonce,
            sealed: binary(&ciphertext)?,
        })
    }

    /// The key itself, in PKCS#8 (DER).
    pub(super) fn open(&self, password: &[u8]) -> Result<Vec<u8>, CosignFault> {
        let mut key = [0; 32];
        scrypt::scrypt(password, &self.salt, &self.parameters, &mut key).map_err(|_| CosignFault::Form)?;
        let cipher = XSalsa20Poly1305::new(&key.into());
        cipher
            .decrypt(&Nonce::from(self.nonce), self.sealed.as_slice())
            .map_err(|_| CosignFault::Password)
    }
}

impl KdfParams {
    fn check(&self) -> Result<scrypt::Params, CosignFault> {
        if !self.n.is_power_of_two() || self.n < 2 || self.r == 0 || self.p == 0 {
            return Err(CosignFault::Form);
        }
        let memory = self
            .n
            .checked_mul(128)
            .and_then(|bytes| bytes.checked_mul(self.r.into()));
        if self.p > MOST_WORK || memory.is_none_or(|bytes| bytes > MOST_MEMORY) {
            return Err(CosignFault::Cost);
        }
        let log_n = u8::try_from(self.n.trailing_zeros()).map_err(|_| CosignFault::Form)?;
        scrypt::Params::new(log_n, self.r, self.p).map_err(|_| CosignFault::Form)
    }
}

/// The bytes of a PEM with this label; `None` if there is none.
fn pem_body(text: &str, label: &str) -> Option<Result<Vec<u8>, CosignFault>> {
    let (_, rest) = text.split_once(&format!("-----BEGIN {label}-----"))?;
    let Some((lines, _)) = rest.split_once(&format!("-----END {label}-----")) else {
        return Some(Err(CosignFault::Form));
    };
    let digits: String = lines.split_ascii_whitespace().collect();
    Some(STANDARD.decode(digits).map_err(|_| CosignFault::Form))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The password of [`KEYS`].
    pub(in crate::open::trust) const PASSWORD: &[u8] = b"geheim";

    /// Private and public keys made by cosign 3.1.1: `generate-key-pair`, and `import-key-pair` of an Ed25519 key of OpenSSL's.
    pub(in crate::open::trust) const KEYS: [(&str, &str); 2] = [
        (
            "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\neyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6\nOCwicCI6MX0sInNhbHQiOiJsY0Z0ZFdqRDgrbWtXREtJWW84Tk5EaWd4UnBmQ0Yz\nT05yWk1PUS8rVTEwPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94\nIiwibm9uY2UiOiJzTDhpcHRHazhDWnNWamxNYnlVeER5WDA3bnA4cU9VNCJ9LCJj\naXBoZXJ0ZXh0IjoiMEZONWMzQU9MNUtxUWd0ZDJZSisrVlVkRkl5T3hKWUpMQlg2\nb0NzNjlseWUreER2SDBhUEFmWVo0MmN2OXluWUpOVWljWVVBSTZwUlFaS0pKS2Nj\nczR2ZGdMYmVFdmxTUFkyVTBhcTR0YVRnVll4bEJnb0V3MGcvNDhhMGpza0hpbDhW\nUkJURXFzOURIdGFZK2RWZ0ttRldnaTNrcWI3c3RNalFZK3ROdit6aCt1R2oxRGlo\ndGlxa1JLWnE4VzJvSFhpTnBWU1FZZFYvK3c9PSJ9\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEFKkZ267n8nxPoE+mIMF3lB0ZTv4J\n0uCAVfP3j4d1/ai6NuDaOoZGYwdjIKq68PyllujmPmH7hDy9qL5JntIzbA==\n-----END PUBLIC KEY-----\n",
        ),
        (
            "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\neyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6\nOCwicCI6MX0sInNhbHQiOiIzUlAyN3AvOWY1S0t0RnVwMXVGemwzZWJ1QWZtTHJT\nOS9Mckd1eDF2ZDlJPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94\nIiwibm9uY2UiOiJuSnR0WVdQSDdSZGVHR1hvMGNiSEtBOVZxY2RxUzlWcCJ9LCJj\naXBoZXJ0ZXh0IjoiRzlyR2g0WEZLU0pBNGRHTzI4MWlpaEErMTFZMktaZDFEbHFz\nbW1qR0F3K2I4TFhHZzBQRWhQTzN3S05VNEpScGJUYUFRcmlCajhtQldmaUFCNUtu\nWXc9PSJ9\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA/VaDN7LJqxkeUaudvIuk8UZKH0Kr7pFeACHqeVm1uig=\n-----END PUBLIC KEY-----\n",
        ),
    ];

    fn find(text: &str) -> Result<EncryptedKey, CosignFault> {
        EncryptedKey::find(text.as_bytes()).unwrap()
    }

    /// As cosign would write it, with other parameters.
    fn sealed(n: u64, r: u32, p: u32) -> String {
        let (salt, nonce, key) = ([1; 32], [2; NONCE_LEN], b"the key");
        let mut secret = [0; 32];
        let log_n = u8::try_from(n.trailing_zeros()).unwrap();
        if let Ok(parameters) = scrypt::Params::new(log_n, r, p)
            && n < 1 << 17
            && p <= MOST_WORK
        {
            scrypt::scrypt(PASSWORD, &salt, &parameters, &mut secret).unwrap();
        }
        let cipher = XSalsa20Poly1305::new(&secret.into());
        let ciphertext = cipher.encrypt(&Nonce::from(nonce), &key[..]).unwrap();
        let json = serde_json::json!({
            "kdf": {"name": "scrypt", "params": {"N": n, "r": r, "p": p}, "salt": STANDARD.encode(salt)},
            "cipher": {"name": "nacl/secretbox", "nonce": STANDARD.encode(nonce)},
            "ciphertext": STANDARD.encode(ciphertext),
        });
        pem(&json)
    }

    fn pem(json: &serde_json::Value) -> String {
        let [label, _] = LABELS;
        format!(
            "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
            STANDARD.encode(json.to_string())
        )
    }

    fn json(pem: &str) -> serde_json::Value {
        let [label, _] = LABELS;
        serde_json::from_slice(&pem_body(pem, label).unwrap().unwrap()).unwrap()
    }

    #[test]
    fn keys_open_with_their_password_alone() {
        for (private, _) in KEYS {
            let key = find(private).unwrap();
            assert!(!key.open(PASSWORD).unwrap().is_empty());
            for wrong in [&b"Geheim"[..], b"", b"geheim\n"] {
                assert_eq!(key.open(wrong), Err(CosignFault::Password));
            }
        }
        let [(private, _), _] = KEYS;
        let old = private.replace("SIGSTORE", "COSIGN");
        assert_eq!(
            find(&old).unwrap().open(PASSWORD),
            find(private).unwrap().open(PASSWORD)
        );
        for (n, r, p) in [(2, 1, 1), (1 << 15, 8, 1), (1024, 4, 16)] {
            assert_eq!(find(&sealed(n, r, p)).unwrap().open(PASSWORD).unwrap(), b"the key");
        }
        // A bit of what was sealed.
        let mut damaged = json(private);
        let mut sealed = STANDARD.decode(damaged["ciphertext"].as_str().unwrap()).unwrap();
        sealed[40] ^= 1;
        damaged["ciphertext"] = STANDARD.encode(sealed).into();
        assert_eq!(find(&pem(&damaged)).unwrap().open(PASSWORD), Err(CosignFault::Password));
    }

    #[test]
    fn what_costs_too_much_is_refused_before_it_is_spent() {
        let fault = |n, r, p| find(&sealed(n, r, p)).err();
        assert_eq!(fault(1 << 18, 8, 1), None);
        assert_eq!(fault(1 << 19, 8, 1), Some(CosignFault::Cost));
        assert_eq!(fault(1 << 18, 9, 1), Some(CosignFault::Cost));
        assert_eq!(fault(2, 1, MOST_WORK + 1), Some(CosignFault::Cost));
        assert_eq!(fault(1 << 63, u32::MAX, 1), Some(CosignFault::Cost));
        for (n, r, p) in [(3, 8, 1), (0, 8, 1), (1, 8, 1), (65536, 0, 1), (65536, 8, 0)] {
            assert_eq!(fault(n, r, p), Some(CosignFault::Form), "{n} {r} {p}");
        }
    }

    #[test]
    fn what_is_cut_or_unknown_is_no_key() {
        let [(private, _), _] = KEYS;
        assert!(EncryptedKey::find(b"").is_none());
        assert!(EncryptedKey::find(b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n").is_none());
        for len in 0..private.trim_end().len() {
            let found = EncryptedKey::find(&private.as_bytes()[..len]);
            assert!(found.is_none_or(|found| found.is_err()), "{len} bytes");
        }
        let whole = json(private);
        for (place, value) in [
            ("/kdf/name", "argon2".into()),
            ("/kdf/salt", "?".into()),
            ("/kdf/params/N", (-1).into()),
            ("/kdf/params/r", "8".into()),
            ("/cipher/name", "aes".into()),
            ("/cipher/nonce", "AAAA".into()),
            ("/ciphertext", serde_json::Value::Null),
        ] {
            let mut other = whole.clone();
            *other.pointer_mut(place).unwrap() = value;
            assert_eq!(find(&pem(&other)).err(), Some(CosignFault::Form), "{place}");
        }
    }
}
