//! `GET /admin/v1/journal`: every decision on deployments, one JSON object per line.
//!
//! Following polls the port a few times a second: the journal grows by hand, and a subscription would be one more thing
//! that the app must keep for readers that may be slow.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::blocking;
use super::places::Kind;
use crate::error::ApiError;
use crate::ports::JournalLine;
use crate::state::ServerState;

/// Lines of one read; a longer journal is read in several.
const LINES: usize = 1_000;
/// How often a follower looks for new lines.
const POLL: Duration = Duration::from_millis(250);
/// Batches that a slow follower may be behind before it is made to wait.
const BATCHES: usize = 4;

#[derive(Debug, Deserialize)]
pub(super) struct Ask {
    /// Lines with a higher sequence number.
    #[serde(default)]
    after: u64,
    /// `true`, or named without a value.
    follow: Option<String>,
}

impl Ask {
    fn follows(&self) -> bool {
        matches!(self.follow.as_deref(), Some("" | "true" | "1"))
    }
}

pub(super) async fn journal(
    State(state): State<Arc<ServerState>>,
    ask: Result<Query<Ask>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(ask) = ask.map_err(|error| ApiError::invalid("after", error.body_text()))?;
    // Before the answer has a status: what cannot be read must not look like an empty journal.
    let first = lines_after(&state, ask.after).await?;
    let (sender, receiver) = mpsc::channel(BATCHES);
    let reader = Arc::clone(&state);
    state.spawn(async move { send(&reader, first, ask.follows(), &sender).await });
    Ok(ndjson(receiver))
}

/// A response whose body is what the channel brings.
pub(super) fn ndjson(receiver: mpsc::Receiver<Bytes>) -> Response {
    body_of(receiver, "application/x-ndjson")
}

/// The same of another type.
pub(super) fn body_of(receiver: mpsc::Receiver<Bytes>, content_type: &'static str) -> Response {
    let body = axum::body::Body::new(Lines { receiver });
    ([(CONTENT_TYPE, content_type)], body).into_response()
}

async fn lines_after(state: &Arc<ServerState>, after: u64) -> Result<Vec<JournalLine>, ApiError> {
    blocking(state, Kind::Read, move |state| Ok(state.policies.journal(after, LINES))).await
}

/// Sends the journal in batches until its end or, following, until the reader is gone.
async fn send(state: &Arc<ServerState>, mut lines: Vec<JournalLine>, follows: bool, sender: &mpsc::Sender<Bytes>) {
    let mut interval = tokio::time::interval(POLL);
    let mut after = 0;
    loop {
        if let Some(last) = lines.last() {
            after = last.sequence;
            if sender.send(batch(&lines)).await.is_err() {
                return;
            }
        } else if follows {
            tokio::select! {
                () = sender.closed() => return,
                _ = interval.tick() => {}
            }
        } else {
            return;
        }
        let Ok(next) = lines_after(state, after).await else { return };
        lines = next;
    }
}

fn batch(lines: &[JournalLine]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        text.push_str(&line.json);
        text.push('\n');
    }
    text.into()
}

/// The batches as a body.
#[derive(Debug)]
struct Lines {
    receiver: mpsc::Receiver<Bytes>,
}

impl http_body::Body for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.receiver.poll_recv(cx).map(|batch| batch.map(|bytes| Ok(Frame::data(bytes))))
    }
}
