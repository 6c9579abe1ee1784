//! One connection to an upstream: opened, over TLS where its URL says so, and counted until it is dropped.
//!
//! Counted here and not in the pool, because hyper's pool does not tell of what it opens: a connection is open from here until
//! it is dropped, and each one carries how often it was used into the responses that it brings.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{Extensions, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use pointsman_telemetry::UpstreamMetrics;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::Service;

use super::trust::Trust;

/// Opens connections to one server.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    /// Finds the addresses of a host, and tries them side by side.
    dial: HttpConnector,
    origin: Uri,
    /// For all of it, the handshake too.
    timeout: Duration,
    /// Without it in the clear.
    pub(super) trust: Option<Arc<Trust>>,
    pub(super) metrics: UpstreamMetrics,
}

/// What bytes go over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// One connection.
pub(super) struct Wire {
    stream: TokioIo<Box<dyn Stream>>,
    /// Whether the other side chose HTTP/2 in the handshake.
    is_h2: bool,
    carried: Carried,
    metrics: UpstreamMetrics,
}

/// Responses that a connection has brought.
#[derive(Clone, Debug, Default)]
struct Carried(Arc<AtomicU64>);

/// Whether what these are of came on a connection that had brought a response before.
pub(super) fn was_used(extensions: &Extensions) -> bool {
    extensions.get().is_some_and(|Carried(n)| n.load(Ordering::Relaxed) > 0)
}

/// Notes on which connection a response came.
pub(super) fn arrived(extensions: &Extensions, metrics: &UpstreamMetrics) {
    let Some(Carried(n)) = extensions.get() else { return };
    if n.fetch_add(1, Ordering::Relaxed) > 0 {
        metrics.reused.inc();
    }
}

/// What is behind an error, in its own words.
pub(super) fn cause(error: &(dyn Error + 'static)) -> String {
    error.source().map_or_else(|| error.to_string(), cause)
}

// === impl Connector ===

impl Connector {
    pub(super) fn new(origin: Uri, timeout: Duration, trust: Option<Arc<Trust>>, metrics: UpstreamMetrics) -> Self {
        let mut dial = HttpConnector::new();
        dial.enforce_http(false);
        dial.set_nodelay(true);
        dial.set_connect_timeout(Some(timeout));
        Self { dial, origin, timeout, trust, metrics }
    }

    async fn open(self) -> io::Result<Wire> {
        let Self { mut dial, origin, trust, metrics, .. } = self;
        let stream = dial.call(origin).await.map_err(|error| io::Error::other(cause(&error)))?.into_inner();
        let (stream, is_h2): (Box<dyn Stream>, bool) = match trust {
            None => (Box::new(stream), false),
            Some(trust) => {
                let (stream, is_h2) = trust.shake(stream).await?;
                (Box::new(stream), is_h2)
            }
        };
        metrics.opened.inc();
        metrics.connections.inc();
        Ok(Wire { stream: TokioIo::new(stream), is_h2, carried: Carried::default(), metrics })
    }

    /// Within its time.
    async fn opened(self) -> io::Result<Wire> {
        let timeout = self.timeout;
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {timeout:?}"));
        tokio::time::timeout(timeout, self.open()).await.map_err(|_| late())?
    }

    /// Whether one can be opened.
    pub(super) async fn reach(&self) -> io::Result<()> {
        self.clone().opened().await.map(drop)
    }
}

impl Service<Uri> for Connector {
    type Response = Wire;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Wire>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _origin: Uri) -> Self::Future {
        Box::pin(self.clone().opened())
    }
}

// === impl Wire ===

impl Drop for Wire {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        let connected = Connected::new().extra(self.carried.clone());
        if self.is_h2 { connected.negotiated_h2() } else { connected }
    }
}

impl Read for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
}
