//! The admin plane: components, slots, rollouts, requests, models, devices, journal, drain, on a listener of its own.
//!
//! Open on loopback, and so guarded against the browser on the same machine: a page on the web can send requests to
//! 127.0.0.1, but not without an `Origin`, and a rebound DNS name shows in `Host`. Port calls compile, write and fsync:
//! they run on the blocking pool.

mod aliases;
mod devices;
pub(crate) mod guard;
mod journal;
mod models;
pub(crate) mod places;
mod record;
mod requests;
mod rollouts;
mod safe_mode;
mod slots;
mod usage;
pub mod wire;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router, middleware};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tower_http::catch_panic::CatchPanicLayer;

use self::guard::Actor;
use self::places::Kind;
use self::rollouts::{OfAlias, OfSlot};
use crate::data::{Routes, unknown_route, wrong_method};
use crate::error::{ApiError, panicked};
use crate::openai::json;
use crate::ports::AdminError;
use crate::state::ServerState;

/// A list on the wire.
#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    data: Vec<T>,
}

fn list<T: Serialize>(data: Vec<T>) -> Response {
    json(&List { object: "list", data })
}

/// Every route, as a table: the router is built from it and the description is checked against it.
pub(crate) fn routes() -> Routes {
    vec![
        ("/admin/v1/components", &["get", "post"], get(slots::components).post(slots::upload)),
        ("/admin/v1/components/{digest}", &["delete"], delete(slots::delete_component)),
        ("/admin/v1/components/{digest}/signature", &["put"], put(slots::sign_component)),
        ("/admin/v1/slots", &["get"], get(slots::slots)),
        (
            "/admin/v1/slots/{slot}",
            &["get", "put", "delete"],
            get(slots::slot).put(slots::put_slot).delete(slots::delete_slot),
        ),
        ("/admin/v1/slots/{slot}/rollback", &["post"], post(slots::rollback)),
        ("/admin/v1/slots/{slot}/rollouts", &["get", "post"], get(rollouts::rollouts::<OfSlot>).post(rollouts::start)),
        ("/admin/v1/slots/{slot}/rollouts/{id}", &["get"], get(rollouts::rollout::<OfSlot>)),
        ("/admin/v1/slots/{slot}/rollouts/{id}/promote", &["post"], post(rollouts::promote::<OfSlot>)),
        ("/admin/v1/slots/{slot}/rollouts/{id}/abort", &["post"], post(rollouts::abort::<OfSlot>)),
        ("/admin/v1/slots/{slot}/rollouts/{id}/pause", &["post"], post(rollouts::pause::<OfSlot>)),
        ("/admin/v1/slots/{slot}/rollouts/{id}/resume", &["post"], post(rollouts::resume::<OfSlot>)),
        ("/admin/v1/slots/{slot}/record", &["get"], get(record::record)),
        ("/admin/v1/requests", &["get"], get(requests::requests)),
        ("/admin/v1/requests/{id}", &["get"], get(requests::request)),
        ("/admin/v1/aliases", &["get"], get(aliases::aliases)),
        ("/admin/v1/aliases/{name}", &["get", "put"], get(aliases::alias).put(aliases::put_alias)),
        (
            "/admin/v1/aliases/{name}/rollouts",
            &["get", "post"],
            get(rollouts::rollouts::<OfAlias>).post(rollouts::start_variant),
        ),
        ("/admin/v1/aliases/{name}/rollouts/{id}", &["get"], get(rollouts::rollout::<OfAlias>)),
        ("/admin/v1/aliases/{name}/rollouts/{id}/promote", &["post"], post(rollouts::promote::<OfAlias>)),
        ("/admin/v1/aliases/{name}/rollouts/{id}/abort", &["post"], post(rollouts::abort::<OfAlias>)),
        ("/admin/v1/aliases/{name}/rollouts/{id}/pause", &["post"], post(rollouts::pause::<OfAlias>)),
        ("/admin/v1/aliases/{name}/rollouts/{id}/resume", &["post"], post(rollouts::resume::<OfAlias>)),
        ("/admin/v1/safe-mode", &["get", "post"], get(safe_mode::safe_mode).post(safe_mode::switch)),
        ("/admin/v1/usage", &["get"], get(usage::usage)),
        ("/admin/v1/models", &["get", "post"], get(models::models).post(models::load)),
        // Names may hold slashes, as in `org/model`.
        ("/admin/v1/models/{*name}", &["get", "delete"], get(models::model).delete(models::unload)),
        ("/admin/v1/devices", &["get"], get(devices::devices)),
        ("/admin/v1/devices/{name}/prefix-cache", &["delete"], delete(devices::clear_prefix_caches)),
        ("/admin/v1/devices/{name}/kv-pools", &["put"], put(devices::bound_kv_pools)),
        ("/admin/v1/cache", &["get", "delete"], get(cache).delete(clear_cache)),
        ("/admin/v1/journal", &["get"], get(journal::journal)),
        ("/admin/v1/drain", &["post"], post(drain)),
    ]
}

/// The admin plane.
pub fn admin_router(state: &Arc<ServerState>) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, (path, _, route)| router.route(path, route));
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(state), guard::guard))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(Arc::clone(state))
}

/// Runs a port call where it may block.
async fn blocking<T: Send + 'static>(
    state: &Arc<ServerState>,
    kind: Kind,
    call: impl FnOnce(&ServerState) -> Result<T, AdminError> + Send + 'static,
) -> Result<T, ApiError> {
    blocking_in(state, state.places.take(kind)?, call).await
}

/// As [`blocking`], in a place that was taken before. It goes with the work, which goes on when the client hangs up.
async fn blocking_in<T: Send + 'static>(
    state: &Arc<ServerState>,
    place: OwnedSemaphorePermit,
    call: impl FnOnce(&ServerState) -> Result<T, AdminError> + Send + 'static,
) -> Result<T, ApiError> {
    let state = Arc::clone(state);
    let work = move || {
        let _place = place;
        call(&state)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(ApiError::Admin),
        Err(error) => {
            tracing::error!(%error, "an admin call panicked; this is a bug of the host");
            Err(ApiError::Internal)
        }
    }
}

async fn cache(State(state): State<Arc<ServerState>>) -> Response {
    json(&state.cache.stats())
}

async fn clear_cache(State(state): State<Arc<ServerState>>, Extension(Actor(actor)): Extension<Actor>) -> Response {
    let cleared = state.cache.clear();
    tracing::info!(%actor, entries = cleared.entries, bytes = cleared.bytes, "the response cache was cleared");
    json(&cleared)
}

#[derive(Serialize)]
struct Drained {
    /// Whether nothing is in flight any more.
    drained: bool,
    in_flight: u32,
}

/// Stops admitting and waits, within the grace period, until what runs has ended. Asking again goes on waiting.
async fn drain(State(state): State<Arc<ServerState>>) -> Response {
    state.drain();
    let drained = tokio::time::timeout(Duration::from_millis(state.config.grace_ms), state.admission.empty()).await;
    json(&Drained { drained: drained.is_ok(), in_flight: state.in_flight() })
}
