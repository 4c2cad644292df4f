//! Whom we trust: one TLS configuration for all connections.

use std::path::Path;
use std::sync::{Arc, Once};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use rustls::sign::CertifiedKey;
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
    #[cfg(test)]
    if super::testing::script::is_playing() {
        // Thousands of clients that speak to nobody need not read the system's certificates.
        let builder = builder.with_root_certificates(RootCertStore::empty());
        return proven(builder, trust);
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

/// With those of the client certificates that the server asks for.
fn proven(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    trust: &Trust,
) -> Result<ClientConfig, RegistryError> {
    if trust.client.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let provider = install_provider();
    let proofs = trust
        .client
        .iter()
        .map(|(certificate, key)| proof(&provider, certificate, key));
    let proofs = Proofs(proofs.collect::<Result<_, _>>()?);
    Ok(builder.with_client_cert_resolver(Arc::new(proofs)))
}

fn proof(
    provider: &CryptoProvider,
    certificate: &Path,
    key: &Path,
) -> Result<Arc<CertifiedKey>, RegistryError> {
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
    CertifiedKey::from_der(chain, secret, provider)
        .map(Arc::new)
        .map_err(|error| refuse(key, error.to_string()))
}

/// Client certificates, the first of which that a server takes is shown to it, as Go's TLS and therefore containerd chooses: one whose chain
/// was issued by an authority that the server names, if it names some, with a key that it can verify. Else none is shown.
#[derive(Debug)]
struct Proofs(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Proofs {
    fn resolve(
        &self,
        authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let is_named = |proof: &CertifiedKey| {
            let mut issuers = proof.cert.iter().filter_map(|der| issuer(der));
            authorities.is_empty() || issuers.any(|issuer| authorities.contains(&issuer))
        };
        let is_good = |proof: &&Arc<CertifiedKey>| {
            proof.key.choose_scheme(schemes).is_some() && is_named(proof)
        };
        self.0.iter().find(is_good).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// The name of who issued a certificate, DER (RFC 5280, section 4.1: version, serial number, signature algorithm, issuer).
fn issuer(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (_, certificate, _) = element(certificate)?;
    let (_, mut rest, _) = element(certificate)?;
    if rest.first() == Some(&VERSION) {
        rest = element(rest)?.2;
    }
    let after_serial = element(rest)?.2;
    let after_algorithm = element(after_serial)?.2;
    let (tag, _, behind) = element(after_algorithm)?;
    let whole = after_algorithm.len() - behind.len();
    (tag == SEQUENCE).then(|| &after_algorithm[..whole])
}

/// The first element of these (X.690, section 8.1): its tag, its content, and what comes behind it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let len = digits
                .iter()
                .fold(0_usize, |len, digit| len << 8 | usize::from(*digit));
            (len, rest)
        }
        _ => return None,
    };
    let (content, behind) = rest.split_at_checked(len)?;
    Some((tag, content, behind))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::testing::{AUTHORITY, CERTIFICATE, KEY};

    fn der(pem: &str) -> Vec<u8> {
        CertificateDer::from_pem_slice(pem.as_bytes())
            .unwrap()
            .to_vec()
    }

    #[test]
    fn the_issuer_of_a_certificate_is_found() {
        let (authority, certificate) = (der(AUTHORITY), der(CERTIFICATE));
        let name = issuer(&certificate).unwrap();
        assert_eq!(Some(name), issuer(&authority), "which signed itself");
        let text = b"ocifs test authority";
        assert!(name.ends_with(text) && name[0] == 0x30);
        for end in 0..certificate.len() {
            // Cut off anywhere, it is no certificate, or one whose issuer is there.
            let found = issuer(&certificate[..end]);
            assert!(found.is_none_or(|found| found == name), "{end}");
        }
        assert_eq!(issuer(&[0x30, 0x85, 1, 1, 1, 1, 1]), None);
        assert_eq!(issuer(&[0x30, 0x84, 255, 255, 255, 255, 1]), None);
    }

    #[test]
    fn the_first_certificate_that_the_server_takes_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), CERTIFICATE).unwrap();
        std::fs::write(path("k"), KEY).unwrap();
        let provider = install_provider();
        let proof = || proof(&provider, &path("a"), &path("k")).unwrap();
        let proofs = Proofs(vec![proof(), proof()]);
        let certificate = der(CERTIFICATE);
        let name = issuer(&certificate).unwrap();
        let schemes = [SignatureScheme::ECDSA_NISTP256_SHA256];
        let chosen = |names: &[&[u8]], schemes: &[SignatureScheme]| {
            let found = proofs.resolve(names, schemes)?;
            proofs.0.iter().position(|proof| Arc::ptr_eq(proof, &found))
        };
        assert_eq!(chosen(&[], &schemes), Some(0));
        assert_eq!(chosen(&[b"other", name], &schemes), Some(0));
        assert_eq!(chosen(&[b"other"], &schemes), None);
        assert_eq!(chosen(&[], &[SignatureScheme::ED25519]), None);
    }
}
