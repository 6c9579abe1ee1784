//! What a client has still to send when its answer is there.
//!
//! hyper closes a connection whose request was answered before its body was read to the end, and a client that is still sending
//! then sees a broken pipe instead of its answer: that a key is wrong, a path unknown, the host full. So the rest is read first and
//! thrown away, within limits. Nothing is read of a body that its client holds back until it is told to go on. For HTTP/1.1 alone: in
//! HTTP/2 an answer ends a request and nothing else.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::header::EXPECT;
use axum::http::{Request, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use tokio::sync::oneshot;

use crate::config::ServerConfig;

/// Longest that the rest of a body may take.
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
    back: Option<oneshot::Sender<Incoming>>,
}

/// Where the rest of a body comes back to.
#[derive(Debug)]
pub(crate) struct Rest(Option<oneshot::Receiver<Incoming>>);

/// Lends a request's body to whoever answers it.
pub(crate) fn lend(request: Request<Incoming>) -> (Request<Lent>, Rest) {
    let (back, rest) = oneshot::channel();
    let is_held_back = request.headers().contains_key(EXPECT);
    let request = request.map(|body| Lent { body: Some(body), back: Some(back) });
    (request, Rest(Some(rest).filter(|_| !is_held_back)))
}

impl Limits {
    /// A few times what a body may have.
    pub(crate) fn of(config: &ServerConfig) -> Self {
        Self { bytes: config.max_body_bytes.saturating_mul(4), time: PATIENCE.min(config.body_timeout()) }
    }
}

impl Rest {
    /// Reads what came back of a request that was answered so, and throws it away. Not of a client that was too slow already.
    pub(crate) async fn discard(self, answered: StatusCode, limits: Limits) {
        let is_slow = answered == StatusCode::REQUEST_TIMEOUT;
        let Some(mut body) = self.0.filter(|_| !is_slow).and_then(|mut rest| rest.try_recv().ok()) else { return };
        let read = async {
            let mut left = limits.bytes;
            while let Some(Ok(frame)) = body.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    break;
                }
            }
        };
        if tokio::time::timeout(limits.time, read).await.is_err() {
            tracing::debug!("a client is slow to send what nobody reads");
        }
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
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
        let unfinished = self.body.take().filter(|body| !body.is_end_stream());
        if let Some((body, back)) = unfinished.zip(self.back.take()) {
            // Nobody may be waiting for it any more.
            let _ = back.send(body);
        }
    }
}
