//! What operators and load balancers ask: is it alive, may it get traffic, what is it, how does it do.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use pointsman_sched::request::Failure;
use serde::Serialize;

use crate::error::ApiError;
use crate::openai::json;
use crate::state::ServerState;

/// The description of both planes' routes; a test compares it with the routers.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

#[derive(Serialize)]
struct Status {
    status: &'static str,
}

#[derive(Serialize)]
struct Version<'a> {
    version: &'a str,
}

/// Alive: the process answers.
pub(crate) async fn health() -> Response {
    json(&Status { status: "ok" })
}

/// May get traffic: something is loaded, its drivers run, nothing drains, and no policy is missing without which nothing goes
/// on.
pub(crate) async fn ready(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    if state.admission.is_draining() {
        return Err(ApiError::Draining);
    }
    if state.engine.catalog().is_empty() {
        return Err(ApiError::Loading);
    }
    if !state.engine.is_alive() {
        return Err(ApiError::DriverGone);
    }
    if state.policies.refuses_all() {
        return Err(ApiError::Failed(Failure::Unanswered));
    }
    Ok(json(&Status { status: "ready" }))
}

pub(crate) async fn version(State(state): State<Arc<ServerState>>) -> Response {
    json(&Version { version: &state.config.version })
}

pub(crate) async fn metrics(State(state): State<Arc<ServerState>>) -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.scrape()).into_response()
}

pub(crate) async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}
