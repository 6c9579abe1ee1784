//! A body that holds something until it has been sent or given up: a place among connections, a load on an upstream.

use std::pin::Pin;
use std::task::{Context, Poll};

use http_body::{Body, Frame, SizeHint};

/// Dropping it gives up the rest of the body, and what is held.
#[derive(Debug)]
pub(crate) struct Held<B, H> {
    body: B,
    _hold: H,
}

impl<B, H> Held<B, H> {
    pub(crate) fn new(body: B, hold: H) -> Self {
        Self { body, _hold: hold }
    }
}

impl<B: Body + Unpin, H: Unpin> Body for Held<B, H> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
