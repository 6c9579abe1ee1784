//! TLS of a plane: rustls, with a certificate that can be replaced while connections are open, and the handshake.
//!
//! In the host, and not left to a proxy, because API keys and prompts travel on these connections and a host on a machine of
//! its own has nothing in front. A connection is made with the certificate of its moment and keeps it. The files are the
//! app's; here are bytes. HTTP/2 and HTTP/1.1 are offered, as they are without TLS.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::ring;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error as RustlsError, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What is said to a client that speaks HTTP on a port that speaks TLS.
const PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 131\r\nconnection: close\r\n\r\n\
{\"error\":{\"message\":\"this port speaks TLS: use an https:// URL\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"tls_required\"}}";

/// HTTP/2 and HTTP/1.1, as ALPN names them.
pub(crate) const H2: &[u8] = b"h2";
pub(crate) const HTTP_1: &[u8] = b"http/1.1";

/// What a client has chosen of what is offered; one that chooses nothing speaks HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    Http1,
    Http2,
}

/// The certificate of a plane.
#[derive(Debug)]
pub struct Tls(RwLock<Arc<ServerConfig>>);

/// When certificates are valid, in Unix seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From then on, ...
    pub from_s: u64,
    /// ... until then.
    pub until_s: u64,
}

/// Why a certificate and its key cannot be used; the operator's fault.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The text holds none.
    #[error(
        "the certificate file has no `BEGIN CERTIFICATE`: it must hold the chain in PEM, the host's own certificate first"
    )]
    NoCertificate,
    /// The certificates are torn.
    #[error("the certificate file is not PEM")]
    Certificate(#[source] PemError),
    /// There is no key, or it is torn.
    #[error("the key file has no private key in PEM (PKCS #8, PKCS #1 or SEC 1, not encrypted)")]
    Key(#[source] PemError),
    /// They do not fit together, or are of a kind that is not known.
    #[error("the certificate and the key cannot be used together")]
    Pair(#[from] RustlsError),
}

/// Why a connection ended before its first request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unshaken {
    #[error("the client speaks HTTP without TLS")]
    Plain,
    #[error("the TLS handshake took too long")]
    Slow,
    #[error("the TLS handshake failed: {0}")]
    Failed(#[from] io::Error),
}

fn config(chain: &[u8], key: &[u8]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>().map_err(TlsError::Certificate)?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
    // The provider is named, because a process may have another one for its clients.
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![H2.to_vec(), HTTP_1.to_vec()];
    Ok(Arc::new(config))
}

/// When all certificates of a text in PEM are valid; none where there is none, or one does not say it in a way that is known.
///
/// rustls reads certificates and has no word for it, but says it of one that is not valid: so each is checked at the beginning of
/// Unix time and at the end of all times that a certificate can name, 9999-12-31.
#[must_use]
pub fn validity(pem: &[u8]) -> Option<Validity> {
    let of = |certificate: &CertificateDer<'_>| {
        let certificate = ParsedCertificate::try_from(certificate).ok()?;
        let fault_at = |s| {
            let (nobody, at) = (RootCertStore::empty(), UnixTime::since_unix_epoch(Duration::from_secs(s)));
            match verify_server_cert_signed_by_trust_anchor(&certificate, &nobody, &[], at, &[]) {
                Err(RustlsError::InvalidCertificate(fault)) => Some(fault),
                _ => None,
            }
        };
        let from_s = match fault_at(0) {
            Some(CertificateError::NotValidYetContext { not_before, .. }) => not_before.as_secs(),
            _ => 0,
        };
        match fault_at(253_402_300_800) {
            Some(CertificateError::ExpiredContext { not_after, .. }) => {
                Some(Validity { from_s, until_s: not_after.as_secs() })
            }
            _ => None,
        }
    };
    let each = CertificateDer::pem_slice_iter(pem).map(|certificate| of(&certificate.ok()?));
    let both =
        |a: Validity, b: Validity| Validity { from_s: a.from_s.max(b.from_s), until_s: a.until_s.min(b.until_s) };
    each.collect::<Option<Vec<_>>>()?.into_iter().reduce(both)
}

// === impl Tls ===

impl Tls {
    /// A certificate chain and its key, in PEM.
    ///
    /// # Errors
    /// One of them is none, or they do not belong together.
    pub fn new(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        Ok(Self(RwLock::new(config(chain, key)?)))
    }

    /// Takes another certificate for the connections to come.
    ///
    /// # Errors
    /// As for [`new`](Self::new); the certificate stays what it was.
    pub fn replace(&self, chain: &[u8], key: &[u8]) -> Result<(), TlsError> {
        let config = config(chain, key)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Shakes hands over what `wrap` makes of the socket. Who speaks HTTP is told what to change.
    pub(crate) async fn shake<S>(
        &self,
        socket: TcpStream,
        wrap: impl FnOnce(TcpStream) -> S,
    ) -> Result<(TlsStream<S>, Chosen), Unshaken>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut first = [0];
        if socket.peek(&mut first).await? == 1 && first[0].is_ascii_uppercase() {
            // What is unread when a socket closes takes the answer with it.
            socket.try_read(&mut [0; 8 << 10])?;
            socket.writable().await?;
            socket.try_write(PLAIN)?;
            return Err(Unshaken::Plain);
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)));
        let stream = acceptor.accept(wrap(socket)).await?;
        let chosen = if stream.get_ref().1.alpn_protocol() == Some(H2) { Chosen::Http2 } else { Chosen::Http1 };
        Ok((stream, chosen))
    }
}

// === impl Unshaken ===

impl Unshaken {
    /// For the metric.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Plain => "plain_http",
            Self::Slow => "slow",
            Self::Failed(_) => "handshake",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_plain_http_is_as_long_as_it_says() {
        let text = std::str::from_utf8(PLAIN).expect("UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).expect("JSON")["error"]["code"], "tls_required");
    }
}
