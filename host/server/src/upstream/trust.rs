//! TLS towards an upstream: whom it must prove to be, to which authorities, and which protocols it may choose.
//!
//! There is no way to leave the check out: an API key and prompts travel on these connections. A server with a certificate of
//! its own is trusted by naming that certificate. The roots can be replaced; open connections stay as they are.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::ring;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, Error as RustlsError, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Protocol;
use crate::tls::{H2, HTTP_1};

/// Who may vouch for an upstream.
#[derive(Clone, Debug, Default)]
pub enum Roots {
    /// The authorities that this machine trusts.
    #[default]
    System,
    /// Those of a text in PEM, and no others.
    Pem(Vec<u8>),
}

/// Roots that cannot be used; the operator's fault.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The text holds none.
    #[error("the file has no `BEGIN CERTIFICATE`: it must hold the authorities to trust, in PEM")]
    None,
    /// The certificates are torn.
    #[error("the file is not PEM")]
    Pem(#[source] PemError),
    /// One is none, or this machine has none.
    #[error("no certificates can be checked with them: {0}")]
    Unusable(#[from] RustlsError),
}

/// How to shake hands with one upstream.
#[derive(Debug)]
pub(super) struct Trust {
    name: ServerName<'static>,
    protocol: Protocol,
    config: RwLock<Arc<ClientConfig>>,
}

fn config(roots: Roots, protocol: Protocol) -> Result<Arc<ClientConfig>, RootsError> {
    // The provider is named, because a process may have another one for its other clients.
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?;
    let builder = match roots {
        Roots::System => builder.with_platform_verifier()?,
        Roots::Pem(pem) => {
            let mut store = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                store.add(certificate.map_err(RootsError::Pem)?)?;
            }
            if store.is_empty() {
                return Err(RootsError::None);
            }
            builder.with_root_certificates(store)
        }
    };
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = match protocol {
        Protocol::Http1 => vec![HTTP_1.to_vec()],
        Protocol::Http2 => vec![H2.to_vec()],
        Protocol::Auto => vec![H2.to_vec(), HTTP_1.to_vec()],
    };
    Ok(Arc::new(config))
}

// === impl Trust ===

impl Trust {
    /// Of a server of this name.
    pub(super) fn new(name: ServerName<'static>, protocol: Protocol, roots: Roots) -> Result<Self, RootsError> {
        Ok(Self { name, protocol, config: RwLock::new(config(roots, protocol)?) })
    }

    /// Takes other roots for the connections to come.
    pub(super) fn replace(&self, roots: Roots) -> Result<(), RootsError> {
        let config = config(roots, self.protocol)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Shakes hands; with whether HTTP/2 was chosen.
    pub(super) async fn shake(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, bool)> {
        let config = Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner));
        let stream = TlsConnector::from(config).connect(self.name.clone(), stream).await?;
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(H2);
        if self.protocol == Protocol::Http2 && !is_h2 {
            return Err(io::Error::other("it does not offer HTTP/2, which `protocol = \"http2\"` asks for"));
        }
        Ok((stream, is_h2))
    }
}
