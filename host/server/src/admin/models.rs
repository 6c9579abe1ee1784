//! Models at run time: what is loaded, loading one with its progress, unloading.
//!
//! A load takes seconds to minutes and belongs to the host: its progress is a value that is overwritten, so that no reader, slow or
//! gone, ever holds it up. What can be refused at once is refused with a status; what fails later is the last event of the stream.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::{ACCEPT, HeaderMap};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::guard::Actor;
use super::journal::body_of;
use super::places::Kind;
use super::slots::from_json;
use super::wire::{LoadModel, Model};
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body, sse, sse_error};
use crate::path::Path;
use crate::ports::{AdminError, AdminErrorKind, LoadReport};
use crate::state::ServerState;

/// Longest body: a name and a path.
const MAX_BODY_BYTES: usize = 16 << 10;
/// Reports that a slow reader may be behind; it gets the latest after those.
const FRAMES: usize = 4;
/// Longest time that requests may be given to end.
const MAX_GRACE_MS: u64 = 3_600_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    grace_ms: Option<u64>,
}

pub(super) async fn models(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, Kind::Read, |state| Ok(state.models.models())).await?))
}

pub(super) async fn model(
    State(state): State<Arc<ServerState>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let found = blocking(&state, Kind::Read, move |state| find(state.models.models(), &name)).await?;
    Ok(json(&found))
}

/// Server-sent events, or, where JSON is asked for, the model once it is served.
pub(super) async fn load(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let waits = wants_json(request.headers());
    let load: LoadModel = from_json(&read_body(&state, request, MAX_BODY_BYTES).await?)?;
    let mut reports = blocking(&state, Kind::Change, move |state| state.models.load(load, &actor)).await?;
    if waits {
        let loaded = outcome(&mut reports).await.map_err(ApiError::Admin)?;
        return Ok((StatusCode::CREATED, json(&loaded)).into_response());
    }
    let (sender, receiver) = mpsc::channel(FRAMES);
    state.spawn(async move { send(reports, &sender).await });
    Ok(body_of(receiver, "text/event-stream"))
}

pub(super) async fn unload(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(name): Path<String>,
    ask: Result<Query<Ask>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(Ask { grace_ms }) = ask.map_err(|error| ApiError::invalid("grace_ms", error.body_text()))?;
    let grace_ms = grace_ms.unwrap_or(state.config.grace_ms);
    if grace_ms > MAX_GRACE_MS {
        return Err(ApiError::invalid("grace_ms", format!("must be at most {MAX_GRACE_MS} (an hour)")));
    }
    // With the work and not after it: that goes on when the client hangs up.
    let work = move |state: &ServerState| {
        let unloaded = state.models.unload(&name, grace_ms, &actor)?;
        state.forget_request_metrics(&unloaded.variants);
        Ok(unloaded)
    };
    let unloaded = blocking(&state, Kind::Unload, work).await?;
    Ok(json(&unloaded))
}

fn find(models: Vec<Model>, name: &str) -> Result<Model, AdminError> {
    let known: Vec<String> = models.iter().map(|model| format!("`{}`", model.name)).collect();
    models.into_iter().find(|model| model.name == name).ok_or_else(|| AdminError {
        kind: AdminErrorKind::NotFound,
        message: format!("there is no model `{name}`; models are {}", known.join(", ")),
        param: None,
    })
}

/// Whether a client asks for JSON and not for events.
fn wants_json(headers: &HeaderMap) -> bool {
    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    accept.contains("application/json") && !accept.contains("text/event-stream")
}

/// What a load comes to.
async fn outcome(reports: &mut watch::Receiver<LoadReport>) -> Result<Model, AdminError> {
    loop {
        match &*reports.borrow_and_update() {
            LoadReport::Ready(model) => return Ok(Model::clone(model)),
            LoadReport::Failed(error) => return Err(error.clone()),
            LoadReport::Progress(_) => {}
        }
        reports.changed().await.map_err(|_| broken_off())?;
    }
}

/// Sends each report that there is time for, the last one always.
async fn send(mut reports: watch::Receiver<LoadReport>, sender: &mpsc::Sender<Bytes>) {
    loop {
        let report = reports.borrow_and_update().clone();
        let is_last = !matches!(report, LoadReport::Progress(_));
        if sender.send(frame(report)).await.is_err() || is_last {
            return;
        }
        let changed = tokio::select! {
            () = sender.closed() => return,
            changed = reports.changed() => changed,
        };
        if changed.is_err() {
            // Where the reader has gone, nobody needs to hear.
            let _ = sender.send(frame(LoadReport::Failed(broken_off()))).await;
            return;
        }
    }
}

#[derive(Serialize)]
struct Ready<'a> {
    stage: &'static str,
    percent: u8,
    model: &'a Model,
}

/// One server-sent event.
fn frame(report: LoadReport) -> Bytes {
    let mut out = Vec::new();
    match report {
        LoadReport::Progress(progress) => sse(&mut out, &progress),
        LoadReport::Ready(model) => sse(&mut out, &Ready { stage: "ready", percent: 100, model: &model }),
        LoadReport::Failed(error) => sse_error(&mut out, &ApiError::Admin(error)),
    }
    out.into()
}

fn broken_off() -> AdminError {
    let message = "the host ended before the model was loaded".to_owned();
    AdminError { kind: AdminErrorKind::Internal, message, param: None }
}
