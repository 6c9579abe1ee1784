//! Devices: what they have, and what an operator may take back of it: prefixes in caches, and room in KV pools.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;

use super::guard::Actor;
use super::places::Kind;
use super::slots::from_json;
use super::wire::BoundPools;
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::path::Path;
use crate::state::ServerState;

/// Longest body: a number.
const MAX_BODY_BYTES: usize = 1 << 10;
/// Most MiB that are taken for a number of bytes.
const MAX_MIB: u64 = 1 << 40;

pub(super) async fn devices(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, Kind::Read, |state| Ok(state.models.devices())).await?))
}

pub(super) async fn clear_prefix_caches(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let clear = move |state: &ServerState| state.models.clear_prefix_caches(&name, &actor);
    Ok(list(blocking(&state, Kind::Change, clear).await?))
}

pub(super) async fn bound_kv_pools(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(name): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let BoundPools { mib } = from_json(&read_body(&state, request, MAX_BODY_BYTES).await?)?;
    if mib.is_some_and(|mib| mib == 0 || mib > MAX_MIB) {
        return Err(ApiError::invalid(
            "mib",
            format!("mib is 1 to {MAX_MIB}, or null for all that a pool was made with"),
        ));
    }
    let bound = move |state: &ServerState| state.models.bound_kv_pools(&name, mib.map(|mib| mib << 20), &actor);
    Ok(json(&blocking(&state, Kind::Change, bound).await?))
}
