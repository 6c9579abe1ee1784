//! `/admin/v1/safe-mode`: every slot native with one switch, and back.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;

use super::blocking;
use super::guard::Actor;
use super::places::Kind;
use super::wire::PutSafeMode;
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::state::ServerState;

/// Longest body, and longest reason in it.
const MAX_BODY_BYTES: usize = 4 << 10;
const MAX_REASON: usize = 1_000;

pub(super) async fn safe_mode(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, Kind::Read, |state| Ok(state.policies.safe_mode())).await?))
}

pub(super) async fn switch(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let body = read_body(&state, request, MAX_BODY_BYTES).await?;
    let put: PutSafeMode = serde_json::from_slice(&body).map_err(ApiError::Json)?;
    if put.reason.as_ref().is_some_and(|reason| reason.len() > MAX_REASON) {
        return Err(ApiError::invalid("reason", format!("`reason` must have at most {MAX_REASON} bytes")));
    }
    Ok(json(&blocking(&state, Kind::Rescue, move |state| state.policies.set_safe_mode(put, &actor)).await?))
}
