//! Connections to one upstream: pooled by hyper's client, opened and counted here.
//!
//! The pool is hyper-util's: it keeps idle connections, hands them out again and sends a request once more where a kept
//! connection turns out to be closed before a byte went out. What it does not do is count, so the connector does: a connection
//! is open from here until it is dropped, and each one carries how often it was used into the responses that it brings.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{Extensions, Uri};
use bytes::Bytes;
use http_body_util::Full;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use pointsman_telemetry::UpstreamMetrics;
use tokio::net::TcpStream;
use tower::Service;

/// Size of the head of a response.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Lines of the head of a response.
const MAX_HEADERS: usize = 100;
/// How long an idle connection is kept; below what servers usually keep theirs, so that this side closes first.
const IDLE: Duration = Duration::from_secs(55);

/// A client with its pool.
pub(super) type Pool = Client<Connector, Full<Bytes>>;

/// Opens connections to one host and port.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    pub(super) host: Arc<str>,
    pub(super) port: u16,
    pub(super) timeout: Duration,
    pub(super) metrics: UpstreamMetrics,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TokioIo<TcpStream>,
    carried: Carried,
    metrics: UpstreamMetrics,
}

/// Responses that a connection has brought.
#[derive(Clone, Debug, Default)]
struct Carried(Arc<AtomicU64>);

impl Connector {
    /// A pool that keeps at most `idle` connections in waiting.
    pub(super) fn pool(self, idle: usize) -> Pool {
        // Its tasks are one per connection; they end with the connection, which ends with the pool.
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(idle)
            .http1_max_buf_size(MAX_HEAD_BYTES)
            .http1_max_headers(MAX_HEADERS)
            .build(self)
    }
}

/// Whether a request failed on a connection that had carried one before: its server may have closed it in the very moment.
pub(super) fn was_kept(error: &Error) -> bool {
    let cause = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
    if cause.is_none_or(hyper::Error::is_parse) {
        return false;
    }
    let mut extensions = Extensions::new();
    error.connect_info().into_iter().for_each(|info| info.get_extras(&mut extensions));
    extensions.get().is_some_and(|Carried(n)| n.load(Ordering::Relaxed) > 0)
}

/// Notes on which connection a response came.
pub(super) fn arrived(extensions: &Extensions, metrics: &UpstreamMetrics) {
    let Some(Carried(n)) = extensions.get() else { return };
    if n.fetch_add(1, Ordering::Relaxed) > 0 {
        metrics.reused.inc();
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
        let Self { host, port, timeout, metrics } = self.clone();
        Box::pin(async move {
            let connecting = TcpStream::connect((&*host, port));
            let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {timeout:?}"));
            let stream = tokio::time::timeout(timeout, connecting).await.map_err(|_| late())??;
            stream.set_nodelay(true)?;
            metrics.opened.inc();
            metrics.connections.inc();
            Ok(Wire { stream: TokioIo::new(stream), carried: Carried::default(), metrics })
        })
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
        Connected::new().extra(self.carried.clone())
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
