//! TLS configurations for both HTTP clients: ring's cryptography, and the machine's own certificate authorities or those that are
//! named for one server.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::{Deserialize, Serialize};

use super::error::Error;

/// How a server proves who it is, and what certificate the client shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Trust {
    /// Files with certificate authorities (PEM), beside the machine's own.
    pub authorities: Vec<PathBuf>,
    /// Files with a client certificate and its key (PEM); the first pair is shown.
    pub client: Vec<(PathBuf, PathBuf)>,
    /// Whether any certificate will do (`skip_verify`). Who is on the way can then read and change what passes.
    pub any_certificate: bool,
}

impl Trust {
    /// What of it holds for servers that such a server redirects to: its authorities, as in containerd, because an organisation
    /// with authorities of its own has storage under them. No client certificate is shown there, and certificates are checked.
    #[must_use]
    pub fn for_redirects(&self) -> Self {
        Self {
            authorities: self.authorities.clone(),
            ..Self::default()
        }
    }
}

/// The configuration for clients: TLS 1.2 and 1.3, roots from the system's store or from `SSL_CERT_FILE` and `SSL_CERT_DIR`.
/// Loaded once for the process.
///
/// # Errors
/// [`Kind::Setup`](super::Kind::Setup) when there is not one usable root certificate.
pub fn client_config() -> Result<Arc<ClientConfig>, Error> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, String>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| builder(roots()?).map(Arc::new));
    config.clone().map_err(|why| Error::setup("TLS", why))
}

/// The configuration for a server with a trust of its own; made once for each, so that connections can be shared.
///
/// # Errors
/// [`Kind::Setup`](super::Kind::Setup), naming the file that cannot be used.
pub fn client_config_for(trust: &Trust) -> Result<Arc<ClientConfig>, Error> {
    static CONFIGS: OnceLock<Mutex<HashMap<Trust, Arc<ClientConfig>>>> = OnceLock::new();
    if *trust == Trust::default() {
        return client_config();
    }
    let mut configs = CONFIGS
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(config) = configs.get(trust) {
        return Ok(config.clone());
    }
    let config = load(trust).map_err(|why| Error::setup("TLS", why))?;
    let config = Arc::new(config);
    configs.insert(trust.clone(), config.clone());
    Ok(config)
}

fn roots() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let cause = found
            .errors
            .first()
            .map(|error| format!(" ({error})"))
            .unwrap_or_default();
        return Err(format!(
            "no root certificates found{cause}; install the package ca-certificates or set SSL_CERT_FILE"
        ));
    }
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn builder(roots: RootCertStore) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let mut config = builder
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn load(trust: &Trust) -> Result<ClientConfig, String> {
    let mut roots = match roots() {
        Ok(roots) => roots,
        // Named authorities are enough.
        Err(_) if !trust.authorities.is_empty() || trust.any_certificate => RootCertStore::empty(),
        Err(error) => return Err(error),
    };
    for path in &trust.authorities {
        let unusable = |why: String| format!("cannot use the certificate authorities in {}: {why}", path.display());
        let certificates = CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
        let mut usable = 0;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
            usable += 1;
        }
        if usable == 0 {
            return Err(unusable("there is no certificate in it".to_owned()));
        }
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = if trust.any_certificate {
        let verifier = Arc::new(AnyCertificate(provider()));
        builder.dangerous().with_custom_certificate_verifier(verifier)
    } else {
        builder.with_root_certificates(roots)
    };
    let mut config = match trust.client.first() {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let unusable =
                |path: &PathBuf, why: String| format!("cannot use the client certificate {}: {why}", path.display());
            let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)
                .map_err(|error| unusable(certificate, error.to_string()))?
                .collect();
            let chain = chain.map_err(|error| unusable(certificate, error.to_string()))?;
            let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, error.to_string()))?;
            builder
                .with_client_auth_cert(chain, private)
                .map_err(|error| unusable(certificate, error.to_string()))?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A configuration without authorities, for plain HTTP where no certificates are installed. HTTPS fails with it, and says so.
pub(super) fn without_roots() -> Result<ClientConfig, Error> {
    builder(RootCertStore::empty()).map_err(|why| Error::setup("TLS", why))
}

/// Takes any certificate; signatures must still fit it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
