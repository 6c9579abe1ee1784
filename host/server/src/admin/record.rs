//! `GET /admin/v1/slots/{slot}/record`: decisions as they are taken, one JSON object per line, until so many lines or
//! seconds; the last line says how many were lost.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::journal::ndjson;
use super::wire::decision::LastLine;
use crate::error::ApiError;
use crate::path::Path;
use crate::ports::{AdminError, AdminErrorKind};
use crate::record::Recording;
use crate::state::ServerState;

/// Lines and seconds of a recording that names none, and the most of each.
const LINES: u64 = 1_000;
const MAX_LINES: u64 = 1_000_000;
const SECONDS: u64 = 60;
const MAX_SECONDS: u64 = 3_600;
/// Lines that go out together when there are many.
const BATCH: usize = 64;

#[derive(Debug, Deserialize)]
pub(super) struct Ask {
    limit: Option<u64>,
    seconds: Option<u64>,
}

pub(super) async fn record(
    State(state): State<Arc<ServerState>>,
    Path(slot): Path<String>,
    ask: Result<Query<Ask>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(ask) = ask.map_err(|error| ApiError::invalid("limit", error.body_text()))?;
    let limit = bounded("limit", ask.limit.unwrap_or(LINES), MAX_LINES)?;
    let seconds = bounded("seconds", ask.seconds.unwrap_or(SECONDS), MAX_SECONDS)?;
    let tap = match slot.as_str() {
        "router" => &state.taps.router,
        "scheduler" => &state.taps.scheduler,
        "admission" => &state.taps.admission,
        "kv-retention" => &state.taps.retention,
        "sampler" => &state.taps.sampler,
        _ => {
            let can = "admission, router, scheduler, kv-retention and sampler can";
            return Err(refused(AdminErrorKind::NotFound, format!("`{slot}` cannot be recorded; {can}")));
        }
    };
    let recording = tap.start().ok_or_else(|| {
        refused(AdminErrorKind::Conflict, format!("`{slot}` is being recorded already; wait for that recording to end"))
    })?;
    let (sender, receiver) = mpsc::channel(1);
    state.spawn(send(recording, limit, Duration::from_secs(seconds), sender));
    Ok(ndjson(receiver))
}

fn bounded(param: &'static str, found: u64, most: u64) -> Result<u64, ApiError> {
    if (1..=most).contains(&found) {
        return Ok(found);
    }
    Err(ApiError::invalid(param, format!("`{param}` must be 1 to {most}, found {found}")))
}

fn refused(kind: AdminErrorKind, message: String) -> ApiError {
    ApiError::Admin(AdminError { kind, message, param: Some("slot".into()) })
}

/// Writes lines until there are enough, time is up or the reader is gone; then the last line. A reader that stalls is left
/// when time is up as well: nothing is recorded for it any longer.
async fn send(mut recording: Recording, limit: u64, time: Duration, sender: mpsc::Sender<Bytes>) {
    let copied = tokio::time::timeout(time, copy(&mut recording, limit, &sender)).await;
    let last = LastLine { dropped: recording.dropped() };
    drop(recording);
    if copied != Ok(false) {
        let mut text = Vec::new();
        push(&mut text, &last);
        let _ = sender.send(text.into()).await;
    }
}

/// False when the reader has gone.
async fn copy(recording: &mut Recording, limit: u64, sender: &mpsc::Sender<Bytes>) -> bool {
    let mut left = limit;
    let mut lines = Vec::with_capacity(BATCH);
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(BATCH).min(BATCH);
        let taken = tokio::select! {
            taken = recording.take(&mut lines, most) => taken,
            () = sender.closed() => return false,
        };
        left -= taken as u64;
        let mut text = Vec::new();
        for line in lines.drain(..) {
            push(&mut text, &line);
        }
        if sender.send(text.into()).await.is_err() {
            return false;
        }
    }
    true
}

fn push(text: &mut Vec<u8>, line: &impl Serialize) {
    match serde_json::to_writer(&mut *text, line) {
        Ok(()) => text.push(b'\n'),
        Err(error) => tracing::error!(%error, "a recorded line is not JSON; this is a bug of the host"),
    }
}
