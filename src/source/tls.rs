//! One TLS configuration for everybody who speaks HTTPS here: ring's cryptography, the machine's own certificates.

use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, RootCertStore};

use super::SourceError;

/// The configuration for clients: TLS 1.2 and 1.3, roots from the system's store or from `SSL_CERT_FILE` and `SSL_CERT_DIR`.
/// Loaded once for the process.
///
/// # Errors
/// [`SourceError::Setup`] when there is not one usable root certificate.
pub fn client_config() -> Result<Arc<ClientConfig>, SourceError> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, String>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| load().map(Arc::new));
    config.clone().map_err(|why| SourceError::Setup { what: "TLS", why })
}

fn load() -> Result<ClientConfig, String> {
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
    builder(roots)
}

fn builder(roots: RootCertStore) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A configuration that trusts nobody, for plain HTTP where no certificates are installed. HTTPS fails with it, and says so.
pub(super) fn trusting_nobody() -> Result<ClientConfig, SourceError> {
    builder(RootCertStore::empty()).map_err(|why| SourceError::Setup { what: "TLS", why })
}
