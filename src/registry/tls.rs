//! Whom we trust: one TLS configuration for all connections.

use std::path::Path;
use std::sync::{Arc, Once};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::certs_d::Trust;
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

/// A client's TLS that trusts the system's authorities and these (DER), and shows who we are where `trust` says so. No protocol is
/// named (ALPN).
pub(super) fn client(
    authorities: &[Vec<u8>],
    trust: &Trust,
) -> Result<ClientConfig, RegistryError> {
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
    if trust.skip_verify {
        let config = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous(provider)));
        return proven(config, trust);
    }
    let of_system =
        rustls_platform_verifier::Verifier::new_with_extra_roots(ders(), Arc::clone(&provider));
    let config = match of_system {
        Ok(verifier) => builder
            .dangerous() // rustls's word for any verifier but its own; this one is webpki with the system's store
            .with_custom_certificate_verifier(Arc::new(verifier)),
        Err(error) => {
            // A machine without any system certificates still reaches plain hosts and those of the given authorities.
            tracing::warn!(error = %chain(&error), "no certificates of the system can be used");
            let mut roots = RootCertStore::empty();
            for der in ders() {
                roots.add(der).map_err(setup)?;
            }
            builder.with_root_certificates(roots)
        }
    };
    proven(config, trust)
}

/// With the first of the client certificates, if there is one.
fn proven(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    trust: &Trust,
) -> Result<ClientConfig, RegistryError> {
    let Some((certificate, key)) = trust.client.first() else {
        return Ok(builder.with_no_client_auth());
    };
    if trust.client.len() > 1 {
        tracing::warn!(used = %certificate.display(), "of several client certificates for a host the first is used");
    }
    let refuse = |path: &Path, reason: String| RegistryError::ClientCertificate {
        path: path.to_owned(),
        reason,
    };
    let read = |path: &Path| std::fs::read(path).map_err(|error| refuse(path, error.to_string()));
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(certificate)?)
        .collect::<Result<_, _>>()
        .map_err(|error| refuse(certificate, error.to_string()))?;
    if chain.is_empty() {
        return Err(refuse(certificate, "it has no PEM certificate".to_owned()));
    }
    let secret = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|_| {
        refuse(
            key,
            "it has no PEM private key without a password".to_owned(),
        )
    })?;
    builder
        .with_client_auth_cert(chain, secret)
        .map_err(|error| refuse(key, error.to_string()))
}

/// Takes any certificate, for `skip_verify`. That the server has its key is still proved.
#[derive(Debug)]
struct Credulous(Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
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
