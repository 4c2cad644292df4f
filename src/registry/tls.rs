//! Whom we trust: one TLS configuration for all connections.

use std::sync::{Arc, Once};

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, RootCertStore};

use super::error::chain;
use super::{RegistryConfig, RegistryError};

/// Makes ring rustls's cryptography for the process, unless the program has chosen one.
fn install_provider() -> Arc<rustls::crypto::CryptoProvider> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error means that there is one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    rustls::crypto::CryptoProvider::get_default().map_or_else(
        || Arc::new(rustls::crypto::ring::default_provider()),
        Arc::clone,
    )
}

/// A client's TLS that trusts the system's authorities and these (DER). No protocol is named (ALPN).
pub(super) fn client(authorities: &[Vec<u8>]) -> Result<ClientConfig, RegistryError> {
    let setup = |error: rustls::Error| RegistryError::Setup {
        source: Arc::new(error),
    };
    let provider = install_provider();
    let ders = || {
        authorities
            .iter()
            .map(|der| CertificateDer::from(der.clone()))
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(setup)?;
    let of_system =
        rustls_platform_verifier::Verifier::new_with_extra_roots(ders(), Arc::clone(&provider));
    let config = match of_system {
        Ok(verifier) => builder
            .dangerous() // rustls's word for any verifier but its own; this one is webpki with the system's store
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth(),
        Err(error) => {
            // A machine without any system certificates still reaches plain hosts and those of the given authorities.
            tracing::warn!(error = %chain(&error), "no certificates of the system can be used");
            let mut roots = RootCertStore::empty();
            for der in ders() {
                roots.add(der).map_err(setup)?;
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
    };
    Ok(config)
}

/// The same with the protocols that are offered to servers (ALPN), best first. Sessions are resumed across all of them.
pub(super) fn offering(tls: &ClientConfig, protocols: &[&str]) -> ClientConfig {
    let mut tls = tls.clone();
    tls.alpn_protocols = protocols
        .iter()
        .map(|protocol| protocol.as_bytes().to_vec())
        .collect();
    tls
}

/// The certificates in the CA files, DER.
pub(super) fn read_authorities(config: &RegistryConfig) -> Result<Vec<Vec<u8>>, RegistryError> {
    let mut authorities = Vec::new();
    for path in &config.ca_files {
        let refuse = |reason: String| RegistryError::CaFile {
            path: path.clone(),
            reason,
        };
        let pem = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let before = authorities.len();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| refuse(error.to_string()))?;
            // Also refuses here what would otherwise fail far from its file.
            RootCertStore::empty()
                .add(certificate.clone())
                .map_err(|error| refuse(error.to_string()))?;
            authorities.push(certificate.to_vec());
        }
        if authorities.len() == before {
            return Err(refuse("it has no PEM certificate".to_owned()));
        }
    }
    Ok(authorities)
}

/// The first flight of a TLS client, for the probe alone: the handshake is never finished, so nothing is trusted.
pub(super) fn client_hello() -> Vec<u8> {
    install_provider();
    let config = ClientConfig::builder()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("localhost is a DNS name");
    let mut hello = Vec::new();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name)
        .expect("a client configuration with defaults is complete");
    connection
        .write_tls(&mut hello)
        .expect("a Vec takes every write");
    hello
}
