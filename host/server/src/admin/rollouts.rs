//! `/admin/v1/slots/{slot}/rollouts`: start one, read its report, steer it.
//!
//! What a plan may say and what a report says is the language of the deployments behind the port; here bodies are only cut
//! into the component, its config as the text that it is, and the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::guard::Actor;
use super::slots::{MAX_PUT_BYTES, budget, config, member};
use super::wire::{StartRollout, Steer};
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::state::ServerState;

/// Longest body that steers.
const MAX_STEER_BYTES: usize = 4_096;

pub(super) async fn start(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(slot): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let start = parse_start(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
    let report = blocking(&state, move |state| state.policies.start_rollout(&slot, start, &actor)).await?;
    Ok((StatusCode::CREATED, json(&report)).into_response())
}

pub(super) async fn rollouts(
    State(state): State<Arc<ServerState>>,
    Path(slot): Path<String>,
) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, move |state| state.policies.rollouts(&slot)).await?))
}

pub(super) async fn rollout(
    State(state): State<Arc<ServerState>>,
    Path((slot, id)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, move |state| state.policies.rollout(&slot, &id)).await?))
}

/// Body of `promote`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Promote {
    /// Only to the next step.
    #[serde(default)]
    step: bool,
}

pub(super) async fn promote(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let body = read_body(&state, request, MAX_STEER_BYTES).await?;
    let Promote { step } = match body.is_empty() {
        true => Promote::default(),
        false => serde_json::from_slice(&body).map_err(ApiError::Json)?,
    };
    steer(state, actor, path, Steer::Promote { step }).await
}

pub(super) async fn abort(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer(state, actor, path, Steer::Abort).await
}

pub(super) async fn pause(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer(state, actor, path, Steer::Pause).await
}

pub(super) async fn resume(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer(state, actor, path, Steer::Resume).await
}

async fn steer(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path((slot, id)): Path<(String, String)>,
    steer: Steer,
) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, move |state| state.policies.steer_rollout(&slot, &id, steer, &actor)).await?))
}

fn parse_start(body: &[u8]) -> Result<StartRollout, ApiError> {
    let mut members: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(ApiError::Json)?;
    let component: Option<String> = member(&members, "component", "a string")?;
    let component = component.ok_or_else(|| {
        let what = "`component` is required: a digest (`sha256:...`), an `oci://` reference or `native`";
        ApiError::invalid("component", what)
    })?;
    let state_namespace = member(&members, "state_namespace", "a string")?;
    let budget = budget(&members)?;
    let config = config(&mut members)?;
    members.retain(|name, _| !matches!(name.as_str(), "component" | "state_namespace" | "budget"));
    let plan = serde_json::to_string(&members).map_err(ApiError::Json)?;
    Ok(StartRollout { component, config, state_namespace, budget, plan })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_a_component_a_config_and_a_plan() {
        let body = br#"{"component": "native", "config": {"b": 1.0, "a": 2}, "mode": "canary", "steps": [1, 5]}"#;
        let start = parse_start(body).expect("good");
        assert_eq!((start.component.as_str(), start.config.get()), ("native", r#"{"b": 1.0, "a": 2}"#));
        assert_eq!(start.plan, r#"{"mode":"canary","steps":[1, 5]}"#);
        for (body, expect) in
            [(&b"{"[..], "not valid JSON"), (b"{}", "`component` is required"), (br#"{"component": 1}"#, "a string")]
        {
            let error = parse_start(body).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
