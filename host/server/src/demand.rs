//! The way from a model's name to what serves it, for every route; where the model is loaded on demand, through a wait for it.
//!
//! Most names need one look into the catalog. A model that is loaded on demand is asked for first: that begins its load, or keeps it
//! from being given up while the request is inside. A request that waits holds its place in admission, so those that wait may have
//! half of the places and no more: however slow a load is, the models that are there go on being served. It waits in its handler,
//! which goes when its client does; the load belongs to the host and goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pointsman_sched::ids::Micros;

use crate::admission::Permit;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::ports::{Lease, Want};
use crate::state::ServerState;

/// A place among the requests that wait.
#[derive(Debug)]
struct Waiting<'a>(&'a AtomicU32);

/// Finds what a client named, for a request that came at this time and has so long.
pub(crate) async fn find(
    state: &ServerState,
    name: &str,
    permit: &mut Permit,
    (arrived, timeout_ms): (Micros, u64),
) -> Result<Target, ApiError> {
    let catalog = state.engine.catalog();
    let Some(model) = catalog.demanded(name).cloned() else { return Target::find(&catalog, name) };
    // What it names may go while this waits.
    drop(catalog);
    let limit_ms = state.config.load_wait_ms;
    let passed_ms = state.clock.now().saturating_sub(arrived) / 1_000;
    let left_ms = timeout_ms.saturating_sub(passed_ms);
    let patience = Duration::from_millis(limit_ms.min(left_ms));
    match tokio::time::timeout(patience, bring(state, &model, name)).await {
        Ok(brought) => {
            let (lease, target) = brought?;
            permit.keep(lease);
            Ok(target)
        }
        Err(_) if left_ms <= limit_ms => Err(ApiError::Deadline { limit_ms: timeout_ms }),
        Err(_) => {
            let why = format!("is not there after {limit_ms} ms (engine.load_wait_ms)");
            Err(ApiError::NotYet { model: model.to_string(), why })
        }
    }
}

/// Holds a model and finds the name among what it is served as.
async fn bring(state: &ServerState, model: &Arc<str>, name: &str) -> Result<(Lease, Target), ApiError> {
    let mut is_first = true;
    loop {
        let lease = lease(state, model, is_first).await?;
        let catalog = state.engine.catalog();
        if catalog.unloaded().all(|unloaded| unloaded != model) {
            return Ok((lease, Target::find(&catalog, name)?));
        }
        // An operator has unloaded it since.
        is_first = false;
        tokio::task::yield_now().await;
    }
}

/// Asks for a model until it is there.
async fn lease(state: &ServerState, model: &str, is_first: bool) -> Result<Lease, ApiError> {
    let mut want = state.models.want(model, is_first);
    if is_first {
        let metrics = state.metrics.models();
        if matches!(want, Want::Here(_)) { &metrics.hits } else { &metrics.misses }.inc();
    }
    let mut place = None;
    loop {
        // What it holds on its way it gives up only when it has asked again.
        let (_held, mut changes) = match want {
            Want::Here(lease) => return Ok(lease),
            Want::Failed { why, retry_after_ms } => {
                return Err(ApiError::NotLoaded { model: model.to_owned(), why, retry_after_ms });
            }
            Want::Coming(lease, changes) => (lease, changes),
        };
        if place.is_none() {
            place = Some(Waiting::enter(state, model)?);
        }
        // It ends with the host alone.
        changes.changed().await.map_err(|_| ApiError::Draining)?;
        want = state.models.want(model, false);
    }
}

// === impl Waiting ===

impl<'a> Waiting<'a> {
    fn enter(state: &'a ServerState, model: &str) -> Result<Self, ApiError> {
        let (waiting, most) = (&state.waiting_for_models, (state.config.max_requests / 2).max(1));
        if waiting.fetch_add(1, Ordering::Relaxed) < most {
            return Ok(Self(waiting));
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
        let why = format!("{most} requests wait for models, half of server.max_in_flight and the most at once");
        Err(ApiError::NotYet { model: model.to_owned(), why })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
