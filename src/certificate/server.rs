//! A server's certificate with its key, and the authorities of client certificates, read from PEM files for rustls.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{self, RootCertStore};

use super::Validity;

/// A larger file is the wrong file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// What a listener's TLS is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The certificate, and those between it and its authority.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Whose client certificates are taken; None: clients are asked for none.
    pub client_ca: Option<PathBuf>,
    /// A client without one may come in as well.
    pub client_cert_is_optional: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("tls.{key}: {}: {why}", path.display())]
    File {
        key: &'static str,
        path: PathBuf,
        why: String,
    },
    #[error("tls.key: {} is not the key of the certificate {}", key.display(), cert.display())]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("tls: {0}")]
    Setup(String),
}

impl Error {
    /// The key of gateway.toml that it is about.
    pub fn key(&self) -> &'static str {
        match self {
            Error::File { key, .. } => key,
            Error::Mismatch { .. } => "key",
            Error::Setup(_) => "cert",
        }
    }
}

/// All that a listener's TLS needs, and until when its certificate is valid.
pub fn load(files: &Files) -> Result<(ServerConfig, Validity), Error> {
    let (certified, validity) = pair(&files.cert, &files.key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let setup = |e: rustls::Error| Error::Setup(e.to_string());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(setup)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match files.client_cert_is_optional {
                true => verifier.allow_unauthenticated(),
                false => verifier,
            };
            let built = verifier.build();
            builder.with_client_cert_verifier(built.map_err(|e: VerifierBuilderError| Error::Setup(e.to_string()))?)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // Devices that come back spare the signature: what is needed for that is kept by them, encrypted with keys of this process.
    // They are new with each load, so nobody comes back by a certificate that an authority before vouched for.
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(setup)?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 1;
    Ok((config, validity))
}

/// The chain and its key, that belong together.
pub fn pair(cert: &Path, key: &Path) -> Result<(CertifiedKey, Validity), Error> {
    let chain = certificates("cert", cert)?;
    let validity = Validity::of_chain(chain.iter().map(AsRef::as_ref))
        .ok_or_else(|| file("cert", cert, "it contains something that is no certificate"))?;
    let text = read("key", key)?;
    let private = PrivateKeyDer::from_pem_slice(&text).map_err(|e| match e {
        pem::Error::NoItemsFound => file(
            "key",
            key,
            "it contains no private key in PEM that is without a passphrase",
        ),
        other => file("key", key, other.to_string()),
    })?;
    let provider = rustls::crypto::ring::default_provider();
    let certified = CertifiedKey::from_der(chain, private, &provider).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => Error::Mismatch {
            cert: cert.to_owned(),
            key: key.to_owned(),
        },
        rustls::Error::InvalidCertificate(why) => file("cert", cert, why.to_string()),
        other => file("key", key, other.to_string()),
    })?;
    Ok((certified, validity))
}

fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates("client_ca", path)?);
    if added == 0 {
        return Err(file("client_ca", path, "none of its certificates can be used"));
    }
    Ok(roots)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let text = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(file(key, path, "it contains no certificate in PEM")),
        Ok(found) => Ok(found),
        Err(e) => Err(file(key, path, e.to_string())),
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |e: std::io::Error| {
        let why = match e.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
            _ => format!("it cannot be read: {e}"),
        };
        file(key, path, why)
    };
    // Opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(file(key, path, "it is not a file"));
    }
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(path).map_err(failed)?;
    let read = opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(file(key, path, "it is too large for a PEM file"));
    }
    Ok(bytes)
}

fn file(key: &'static str, path: &Path, why: impl Into<String>) -> Error {
    Error::File {
        key,
        path: path.to_owned(),
        why: why.into(),
    }
}
