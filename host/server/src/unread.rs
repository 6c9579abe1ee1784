//! What a client has still to send when it is refused.
//!
//! hyper ends a request that was answered before its body was read to the end, and many a client that is still sending then sees a
//! broken pipe, or a stream that was reset, instead of its answer: that a key is wrong, a path unknown, a body too large. So the rest is
//! read first and thrown away, within limits and without a place. Nothing is read of a body whose client waits to be told to go on,
//! nor before an answer that is no refusal. A handler that drops the body and works on does not hear that its client has left.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::header::EXPECT;
use axum::http::{Request, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::config::ServerConfig;
use crate::serve::{Phase, reached};

/// Longest time without a byte.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is read of a body at most, and how long that may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    bytes: usize,
    time: Duration,
}

/// A body that goes back when its reader drops it unfinished.
#[derive(Debug)]
pub(crate) struct Lent {
    body: Option<Incoming>,
    /// Whether its client sends it, unasked or asked.
    is_sent: bool,
    back: Option<oneshot::Sender<Incoming>>,
}

/// Where the rest of a body comes back to.
#[derive(Debug)]
pub(crate) struct Rest(Option<oneshot::Receiver<Incoming>>);

/// Lends a request's body to whoever answers it.
pub(crate) fn lend(request: Request<Incoming>) -> (Request<Lent>, Rest) {
    let is_sent = !request.headers().contains_key(EXPECT);
    let (back, rest) = if request.body().is_end_stream() { None } else { Some(oneshot::channel()) }.unzip();
    (request.map(|body| Lent { body: Some(body), is_sent, back }), Rest(rest))
}

/// Reads to the end, a limit, or that of the host.
pub(crate) async fn discard(mut body: Incoming, limits: Limits, mut phase: watch::Receiver<Phase>) {
    let read = async {
        let mut left = limits.bytes;
        while let Ok(Some(Ok(frame))) = timeout(PATIENCE, body.frame()).await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                break;
            }
        }
    };
    tokio::select! {
        _ = timeout(limits.time, read) => {}
        () = reached(&mut phase, Phase::Closing) => {}
    }
}

impl Limits {
    /// A few times what a body may have.
    pub(crate) fn of(config: &ServerConfig) -> Self {
        let most = config.max_body_bytes.max(config.max_component_bytes);
        Self { bytes: most.saturating_mul(4), time: config.body_timeout() }
    }
}

impl Rest {
    /// What came back of a request that was refused so; not of one whose client was too slow already.
    pub(crate) fn of_refusal(self, answered: StatusCode) -> Option<Incoming> {
        let is_refusal = answered.is_client_error() || answered.is_server_error();
        let is_slow = answered == StatusCode::REQUEST_TIMEOUT;
        self.0.filter(|_| is_refusal && !is_slow).and_then(|mut rest| rest.try_recv().ok())
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.is_sent = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let unfinished = self.body.take().filter(|body| self.is_sent && !body.is_end_stream());
        if let Some((body, back)) = unfinished.zip(self.back.take()) {
            // Nobody may be waiting for it any more.
            let _ = back.send(body);
        }
    }
}
