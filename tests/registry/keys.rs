//! Certificates that nobody else has, and tokens signed with them.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

/// A certificate authority for one test, with what it has signed, as PEM files in a directory: `ca.crt`, `client.cert` and
/// `client.key` (names that skopeo and containerd look for), `server.pem` and `server-key.pem` for 127.0.0.1 and localhost.
#[derive(Debug)]
pub(crate) struct Authority {
    dir: PathBuf,
}

impl Authority {
    pub(crate) fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority of a test");
        let certificate = params.self_signed(&key).unwrap();
        fs::write(dir.join("ca.crt"), pem("CERTIFICATE", certificate.der())).unwrap();
        let issuer = Issuer::new(params, key);
        let server = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        for (file, key_file, hosts) in [
            ("server.pem", "server-key.pem", server),
            ("client.cert", "client.key", vec![]),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(hosts).unwrap();
            params.distinguished_name.push(DnType::CommonName, file);
            let certificate = params.signed_by(&key, &issuer).unwrap();
            fs::write(dir.join(file), pem("CERTIFICATE", certificate.der())).unwrap();
            fs::write(dir.join(key_file), pem("PRIVATE KEY", &key.serialize_der())).unwrap();
        }
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<_> = text
        .as_bytes()
        .chunks(64)
        .map(|line| String::from_utf8_lossy(line))
        .collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Signs JSON Web Tokens (RFC 7519) with ES256; a registry believes them that has the certificate among its roots.
pub(crate) struct Signer {
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
    random: SystemRandom,
}

impl Signer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, "token server of a test");
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &random).unwrap();
        Self {
            key,
            certificate,
            random,
        }
    }

    /// The certificate as PEM.
    pub(crate) fn root(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    pub(crate) fn sign(&self, claims: &Value) -> String {
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&self.certificate)] });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", encode(&header), encode(claims));
        let signature = self.key.sign(&self.random, message.as_bytes()).unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}
