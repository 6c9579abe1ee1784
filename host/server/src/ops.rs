//! What operators and load balancers ask: is it alive, may it get traffic, what is it, how does it do.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use pointsman_sched::request::Failure;
use serde::Serialize;

use crate::admin::wire::HealthState;
use crate::error::ApiError;
use crate::openai::json;
use crate::state::ServerState;

/// The description of both planes' routes; a test compares it with the routers.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

#[derive(Serialize)]
struct Status {
    status: &'static str,
    /// What does not work as it is deployed, as in `slot router` or `device cuda:1`; others stand in for it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    degraded: Vec<String>,
}

#[derive(Serialize)]
struct Version<'a> {
    version: &'a str,
}

/// Alive: the process answers, and has not lost every device. Those come back with a new process alone.
pub(crate) async fn health(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    if !state.engine.is_alive() {
        return Err(ApiError::DriverGone);
    }
    Ok(json(&Status { status: "ok", degraded: degraded(&state) }))
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
    Ok(json(&Status { status: "ready", degraded: degraded(&state) }))
}

/// Slots whose policy does not answer though it should, and devices that are gone.
fn degraded(state: &ServerState) -> Vec<String> {
    let slots = state.policies.slots().into_iter();
    let slots = slots.filter(|slot| slot.health.state != HealthState::Closed && slot.health.reason.is_some());
    let devices = state.models.devices().into_iter().filter(|device| device.state != "up");
    slots.map(|slot| format!("slot {}", slot.slot)).chain(devices.map(|d| format!("device {}", d.name))).collect()
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
