//! `/admin/v1/slots/{slot}/rollouts` and `/admin/v1/aliases/{name}/rollouts`: start one, read its report, steer it.
//!
//! What a plan may say and what a report says is the language of the deployments behind the port; here bodies are only cut
//! into what is tried (a component with its config as the text that it is, or a variant) and the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::aliases::{check_variant, variants_of};
use super::guard::Actor;
use super::places::Kind;
use super::slots::{MAX_PUT_BYTES, budget, config, dry_run, handover, member, on_fault};
use super::wire::{StartAliasRollout, StartRollout, Steer};
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::path::Path;
use crate::ports::AdminError;
use crate::state::ServerState;

/// Longest body that steers.
const MAX_STEER_BYTES: usize = 4_096;

/// Whose rollouts a route is about.
pub(super) trait Subject: 'static {
    fn rollouts(state: &ServerState, name: &str) -> Result<Vec<Box<RawValue>>, AdminError>;
    fn rollout(state: &ServerState, name: &str, id: &str) -> Result<Box<RawValue>, AdminError>;
    fn steer(state: &ServerState, of: (&str, &str), steer: Steer, actor: &str) -> Result<Box<RawValue>, AdminError>;
}

/// A slot's.
pub(super) enum OfSlot {}

/// An alias's.
pub(super) enum OfAlias {}

impl Subject for OfSlot {
    fn rollouts(state: &ServerState, name: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        state.policies.rollouts(name)
    }

    fn rollout(state: &ServerState, name: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        state.policies.rollout(name, id)
    }

    fn steer(
        state: &ServerState,
        (name, id): (&str, &str),
        steer: Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        state.policies.steer_rollout(name, id, steer, actor)
    }
}

impl Subject for OfAlias {
    fn rollouts(state: &ServerState, name: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        variants_of(&state.engine.catalog(), name)?;
        state.aliases.rollouts(name)
    }

    fn rollout(state: &ServerState, name: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        state.aliases.rollout(name, id)
    }

    fn steer(
        state: &ServerState,
        (name, id): (&str, &str),
        steer: Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        state.aliases.steer_rollout(name, id, steer, actor)
    }
}

pub(super) async fn start(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(slot): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let start = parse_start(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
    let status = status(start.dry_run);
    let report =
        blocking(&state, Kind::Change, move |state| state.policies.start_rollout(&slot, start, &actor)).await?;
    Ok((status, json(&report)).into_response())
}

pub(super) async fn start_variant(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(alias): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let start = parse_variant(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
    check_variant(&state.engine.catalog(), &alias, ("candidate", &start.candidate))?;
    let status = status(start.dry_run);
    let report =
        blocking(&state, Kind::Change, move |state| state.aliases.start_rollout(&alias, start, &actor)).await?;
    Ok((status, json(&report)).into_response())
}

/// Of a start that was not refused.
fn status(dry_run: bool) -> StatusCode {
    if dry_run { StatusCode::OK } else { StatusCode::CREATED }
}

pub(super) async fn rollouts<S: Subject>(
    State(state): State<Arc<ServerState>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, Kind::Read, move |state| S::rollouts(state, &name)).await?))
}

pub(super) async fn rollout<S: Subject>(
    State(state): State<Arc<ServerState>>,
    Path((name, id)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, Kind::Read, move |state| S::rollout(state, &name, &id)).await?))
}

/// Body of `promote`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Promote {
    /// Only to the next step.
    #[serde(default)]
    step: bool,
}

pub(super) async fn promote<S: Subject>(
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
    steer::<S>(state, actor, path, Steer::Promote { step }).await
}

pub(super) async fn abort<S: Subject>(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer::<S>(state, actor, path, Steer::Abort).await
}

pub(super) async fn pause<S: Subject>(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer::<S>(state, actor, path, Steer::Pause).await
}

pub(super) async fn resume<S: Subject>(
    state: State<Arc<ServerState>>,
    actor: Extension<Actor>,
    path: Path<(String, String)>,
) -> Result<Response, ApiError> {
    steer::<S>(state, actor, path, Steer::Resume).await
}

async fn steer<S: Subject>(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path((name, id)): Path<(String, String)>,
    steer: Steer,
) -> Result<Response, ApiError> {
    let kind = match steer {
        Steer::Abort | Steer::Pause => Kind::Rescue,
        Steer::Promote { .. } | Steer::Resume => Kind::Change,
    };
    Ok(json(&blocking(&state, kind, move |state| S::steer(state, (&name, &id), steer, &actor)).await?))
}

/// What is not the plan's.
const OWN_MEMBERS: [&str; 7] =
    ["component", "state_namespace", "budget", "handover", "on_fault", "if_generation", "dry_run"];

fn parse_start(body: &[u8]) -> Result<StartRollout, ApiError> {
    let mut members: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(ApiError::Json)?;
    let component: Option<String> = member(&members, "component", "a string")?;
    let component = component.ok_or_else(|| {
        let what = "`component` is required: a digest (`sha256:...`), an `oci://` reference or `native`";
        ApiError::invalid("component", what)
    })?;
    let state_namespace = member(&members, "state_namespace", "a string")?;
    let budget = budget(&members)?;
    let (handover, on_fault) = (handover(&members)?, on_fault(&members)?);
    let if_generation = member(&members, "if_generation", "a generation")?;
    let dry_run = dry_run(&members)?;
    let config = config(&mut members)?;
    members.retain(|name, _| !OWN_MEMBERS.contains(&name.as_str()));
    let plan = serde_json::to_string(&members).map_err(ApiError::Json)?;
    Ok(StartRollout { component, config, state_namespace, budget, handover, on_fault, if_generation, dry_run, plan })
}

fn parse_variant(body: &[u8]) -> Result<StartAliasRollout, ApiError> {
    let mut members: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(ApiError::Json)?;
    let candidate: Option<String> = member(&members, "candidate", "a string")?;
    let what = "`candidate` is required: the variant that is tried, as in `demo:q8_0`";
    let candidate = candidate.ok_or_else(|| ApiError::invalid("candidate", what))?;
    let if_generation = member(&members, "if_generation", "a generation")?;
    let dry_run = dry_run(&members)?;
    members.retain(|name, _| !matches!(name.as_str(), "candidate" | "if_generation" | "dry_run"));
    let plan = serde_json::to_string(&members).map_err(ApiError::Json)?;
    Ok(StartAliasRollout { candidate, if_generation, dry_run, plan })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_a_component_a_config_and_a_plan() {
        let body = br#"{"component": "native", "config": {"b": 1.0, "a": 2}, "if_generation": 7, "mode": "canary", "steps": [1, 5]}"#;
        let start = parse_start(body).expect("good");
        assert!(!start.dry_run);
        assert_eq!((start.component.as_str(), start.config.get()), ("native", r#"{"b": 1.0, "a": 2}"#));
        assert_eq!((start.if_generation, start.plan.as_str()), (Some(7), r#"{"mode":"canary","steps":[1, 5]}"#));
        for (body, expect) in [
            (&b"{"[..], "not valid JSON"),
            (b"{}", "`component` is required"),
            (br#"{"component": 1}"#, "a string"),
            (br#"{"component": "native", "dry_run": 1}"#, "`dry_run` must be true or false"),
        ] {
            let error = parse_start(body).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
        let body = br#"{"mode": "ab", "candidate": "m:b", "if_generation": 2, "dry_run": true}"#;
        let start = parse_variant(body).expect("good");
        assert_eq!((start.candidate.as_str(), start.plan.as_str()), ("m:b", r#"{"mode":"ab"}"#));
        assert_eq!((start.if_generation, start.dry_run), (Some(2), true));
        let error = parse_variant(br#"{"component": "native"}"#).expect_err("no variant").to_string();
        assert!(error.contains("`candidate` is required"), "{error}");
    }
}
