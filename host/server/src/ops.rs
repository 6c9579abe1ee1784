//! What operators and load balancers ask: is it alive, may it get traffic, what is it, how does it do.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use pointsman_sched::request::Failure;
use serde::Serialize;

use crate::admin::wire::{HealthState, ModelSource, ModelState};
use crate::error::ApiError;
use crate::openai::json;
use crate::ports::{Catalog, DeviceState};
use crate::state::ServerState;

/// The description of both planes' routes; a test compares it with the routers.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

#[derive(Serialize)]
struct Status {
    status: &'static str,
    /// What does not work as it is deployed, as in `slot router`, `device cuda:1`, `upstream east` or `model llama`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    degraded: Vec<String>,
}

/// What was built.
#[derive(Serialize)]
struct Version<'a> {
    version: &'a str,
    /// As in `x86_64-linux`.
    target: String,
    /// Where the builder said it.
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<&'static str>,
}

/// Alive: the process answers, and has not lost every device. Those come back with a new process alone.
pub(crate) async fn health(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    if !state.engine.is_alive() {
        return Err(ApiError::DriverGone);
    }
    let degraded = degraded(&state, &state.engine.catalog(), &state.models.device_states());
    Ok(json(&Status { status: "ok", degraded }))
}

/// May get traffic: a model is served by a device or an upstream that works, or would be loaded for a request, nothing drains, and
/// no policy is missing without which nothing goes on.
pub(crate) async fn ready(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    if state.admission.is_draining() {
        return Err(ApiError::Draining);
    }
    let catalog = state.engine.catalog();
    if catalog.is_empty() {
        return Err(ApiError::Loading);
    }
    if !state.engine.is_alive() {
        return Err(ApiError::DriverGone);
    }
    if state.policies.refuses_all() {
        return Err(ApiError::Failed(Failure::Unanswered));
    }
    let devices = state.models.device_states();
    let degraded = degraded(&state, &catalog, &devices);
    match can_serve(&catalog, &devices) {
        true => Ok(json(&Status { status: "ready", degraded })),
        false => Err(ApiError::Unserved { degraded: degraded.join(", ") }),
    }
}

/// Whether a request for some model would find a device or an upstream that takes it, or bring its model.
fn can_serve(catalog: &Catalog, devices: &[DeviceState]) -> bool {
    let is_up = |index: u64| devices.iter().all(|device| device.index != index || device.is_up);
    let mut replicas = catalog.variants.iter().flat_map(|variant| &variant.replicas);
    let serves_texts = replicas.any(|replica| match &replica.upstream {
        Some(upstream) => upstream.is_up(),
        None => is_up(replica.device),
    });
    // The driver of the encoders here is alive, or the host was not.
    let mut encoders = catalog.encoders.iter().map(|encoder| &encoder.upstreams);
    let serves_inputs = encoders.any(|all| all.is_empty() || all.iter().any(|elsewhere| elsewhere.upstream.is_up()));
    serves_texts || serves_inputs || !catalog.on_demand.is_empty()
}

/// Slots whose policy does not answer though it should, devices that are gone, upstreams that are sent nothing, models that a start
/// could not bring back, and replicas that a device does not hold.
fn degraded(state: &ServerState, catalog: &Catalog, devices: &[DeviceState]) -> Vec<String> {
    let slots = state.policies.slots().into_iter();
    let slots = slots.filter(|slot| slot.health.state != HealthState::Closed && slot.health.reason.is_some());
    let upstreams: Vec<(&str, bool)> = catalog.upstreams().map(|(_, u)| (&**u.name(), u.is_up())).collect();
    let devices = devices.iter().filter(|device| !device.is_up);
    let all = state.models.models();
    let models = all.iter().filter(|model| model.state == ModelState::Failed && model.source == ModelSource::Loaded);
    let unserved = all.iter().flat_map(|model| &model.unserved);
    let down = upstreams.iter().filter(|(_, is_up)| !is_up);
    let named = slots.map(|slot| format!("slot {}", slot.slot)).chain(devices.map(|d| format!("device {}", d.name)));
    let named = named.chain(down.map(|(name, _)| format!("upstream {name}")));
    let named = named.chain(models.map(|model| format!("model {}", model.name)));
    named.chain(unserved.map(|one| format!("replica {}@{}", one.variant, one.device))).collect()
}

pub(crate) async fn version(State(state): State<Arc<ServerState>>) -> Response {
    version_of(&state.config.version)
}

pub(crate) fn version_of(version: &str) -> Response {
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let commit = option_env!("POINTSMAN_COMMIT").filter(|commit| !commit.is_empty());
    json(&Version { version, target, commit })
}

/// What `/health` says of a host that has nothing to complain of.
pub(crate) fn alive() -> Response {
    json(&Status { status: "ok", degraded: Vec::new() })
}

pub(crate) async fn metrics(State(state): State<Arc<ServerState>>) -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.scrape()).into_response()
}

pub(crate) async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}
