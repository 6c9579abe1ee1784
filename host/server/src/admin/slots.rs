//! Components and slots: upload, activate, roll back.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::guard::Actor;
use super::places::Kind;
use super::wire::{Budget, Handover, OnFault, PutSlot};
use super::{blocking, blocking_in, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::path::Path;
use crate::ports::Upload;
use crate::state::ServerState;

/// Members of the body of a `PUT`.
const PUT_MEMBERS: [&str; 8] =
    ["component", "config", "if_generation", "state_namespace", "budget", "handover", "on_fault", "dry_run"];

/// Longest body of a `PUT`: a config of 1 MiB.
pub(super) const MAX_PUT_BYTES: usize = 1 << 20;
/// Longest body of a rollback: a condition.
const MAX_ROLLBACK_BYTES: usize = 4 << 10;
/// 64 bytes in base64, and room for line breaks.
const MAX_SIGNATURE_BYTES: usize = 128;

/// Detached signature of an uploaded component, in base64.
const SIGNATURE: HeaderName = HeaderName::from_static("x-pointsman-signature");

/// The condition of a rollback or a removal.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IfGeneration {
    if_generation: Option<u64>,
}

/// Body of a `POST` that asks the host to fetch a component.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pull {
    /// `oci://host/repository:tag`, with `@sha256:...` to pin the manifest.
    component: String,
}

pub(super) async fn components(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, Kind::Read, |state| Ok(state.policies.components())).await?))
}

/// The body is the component, whatever its content type says; except that JSON names a place to pull it from.
pub(super) async fn upload(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let uploaded = if is_json(request.headers()) {
        let pull: Pull = from_json(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
        blocking(&state, Kind::Change, move |state| state.policies.pull(&pull.component, &actor)).await?
    } else {
        let place = state.places.take(Kind::Upload)?;
        let signature =
            request.headers().get(SIGNATURE).map(|text| String::from_utf8_lossy(text.as_bytes()).into_owned());
        let bytes = read_body(&state, request, state.config.max_component_bytes).await?;
        if bytes.is_empty() {
            return Err(ApiError::invalid("", "the body must hold a WebAssembly component; it is empty"));
        }
        let upload = Upload { bytes: bytes.into(), signature };
        blocking_in(&state, place, move |state| state.policies.upload(upload, &actor)).await?
    };
    let status = if uploaded.created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, json(&uploaded.component)).into_response())
}

/// The body is the detached signature, raw or in base64.
pub(super) async fn sign_component(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(digest): Path<String>,
    request: axum::extract::Request,
) -> Result<StatusCode, ApiError> {
    let signature = read_body(&state, request, MAX_SIGNATURE_BYTES).await?;
    blocking(&state, Kind::Change, move |state| state.policies.sign_component(&digest, &signature, &actor)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn delete_component(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(digest): Path<String>,
) -> Result<StatusCode, ApiError> {
    blocking(&state, Kind::Change, move |state| state.policies.delete_component(&digest, &actor)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn slots(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    Ok(list(blocking(&state, Kind::Read, |state| Ok(state.policies.slots())).await?))
}

pub(super) async fn slot(
    State(state): State<Arc<ServerState>>,
    Path(slot): Path<String>,
) -> Result<Response, ApiError> {
    Ok(json(&blocking(&state, Kind::Read, move |state| state.policies.slot(&slot)).await?))
}

pub(super) async fn put_slot(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(slot): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let put = parse_put(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
    Ok(json(&blocking(&state, Kind::Change, move |state| state.policies.put_slot(&slot, put, &actor)).await?))
}

pub(super) async fn delete_slot(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(slot): Path<String>,
    ask: Result<Query<IfGeneration>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(IfGeneration { if_generation }) =
        ask.map_err(|error| ApiError::invalid("if_generation", error.body_text()))?;
    let delete = move |state: &ServerState| state.policies.delete_slot(&slot, if_generation, &actor);
    Ok(json(&blocking(&state, Kind::Return, delete).await?))
}

pub(super) async fn rollback(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(slot): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let body = read_body(&state, request, MAX_ROLLBACK_BYTES).await?;
    let IfGeneration { if_generation } = match body.is_empty() {
        true => IfGeneration::default(),
        false => from_json(&body)?,
    };
    let back = move |state: &ServerState| state.policies.rollback(&slot, if_generation, &actor);
    Ok(json(&blocking(&state, Kind::Return, back).await?))
}

fn is_json(headers: &HeaderMap) -> bool {
    let text = headers.get(CONTENT_TYPE).and_then(|text| text.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

pub(super) fn from_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(ApiError::Json)
}

/// Reads the body of a `PUT`. The config stays the text that it is: its order and numbers are the guest's business. An
/// unknown member is refused here, unlike on the data plane: a mistyped `if_generation` must not pass for none.
fn parse_put(body: &[u8]) -> Result<PutSlot, ApiError> {
    let mut members: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(ApiError::Json)?;
    if let Some(unknown) = members.keys().find(|name| !PUT_MEMBERS.contains(&name.as_str())) {
        let nearest = PUT_MEMBERS.iter().min_by_key(|known| strsim::damerau_levenshtein(known, unknown));
        let hint = nearest.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
        return Err(ApiError::invalid(unknown.as_str(), format!("`{unknown}` is not a member of this request{hint}")));
    }
    let component: Option<String> = member(&members, "component", "a string")?;
    let component = component.ok_or_else(|| {
        ApiError::invalid(
            "component",
            "`component` is required: a digest (`sha256:...`), an `oci://` reference or `native`",
        )
    })?;
    let if_generation = member(&members, "if_generation", "a generation")?;
    let state_namespace = member(&members, "state_namespace", "a string")?;
    let budget = budget(&members)?;
    let (handover, on_fault) = (handover(&members)?, on_fault(&members)?);
    let dry_run = dry_run(&members)?;
    let config = config(&mut members)?;
    Ok(PutSlot { component, config, if_generation, state_namespace, budget, handover, on_fault, dry_run })
}

/// The policy's own limits; none for `null`.
pub(super) fn budget(members: &BTreeMap<String, Box<RawValue>>) -> Result<Budget, ApiError> {
    let budget: Option<Option<Budget>> = member(members, "budget", "an object of soft_us, hard_ms and memory_mib")?;
    Ok(budget.flatten().unwrap_or_default())
}

/// Whether the policy may start cold; it may for none.
pub(super) fn handover(members: &BTreeMap<String, Box<RawValue>>) -> Result<Handover, ApiError> {
    Ok(member(members, "handover", "`cold` or `require`")?.unwrap_or_default())
}

/// Whether requests go on without a sampler that faults; they do for none.
pub(super) fn on_fault(members: &BTreeMap<String, Box<RawValue>>) -> Result<OnFault, ApiError> {
    Ok(member(members, "on_fault", "`open` or `closed`")?.unwrap_or_default())
}

/// Whether nothing is to change; all of it is for none.
pub(super) fn dry_run(members: &BTreeMap<String, Box<RawValue>>) -> Result<bool, ApiError> {
    Ok(member(members, "dry_run", "true or false")?.unwrap_or(false))
}

/// The config as the text that it is; `{}` for none.
pub(super) fn config(members: &mut BTreeMap<String, Box<RawValue>>) -> Result<Box<RawValue>, ApiError> {
    match members.remove("config").filter(|config| config.get() != "null") {
        Some(config) => Ok(config),
        None => RawValue::from_string("{}".to_owned()).map_err(ApiError::Json),
    }
}

pub(super) fn member<T: DeserializeOwned>(
    members: &BTreeMap<String, Box<RawValue>>,
    name: &str,
    expect: &str,
) -> Result<Option<T>, ApiError> {
    let Some(raw) = members.get(name) else { return Ok(None) };
    serde_json::from_str(raw.get())
        .map_err(|_| ApiError::invalid(name, format!("`{name}` must be {expect}, found {}", raw.get())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_is_kept_as_text() {
        let put = parse_put(br#"{"component": "native", "config": { "b": 1.0, "a": 2 }, "if_generation": 7}"#);
        let put = put.expect("good");
        assert_eq!((put.config.get(), put.if_generation), (r#"{ "b": 1.0, "a": 2 }"#, Some(7)));
        for body in [&br#"{"component": "native"}"#[..], br#"{"component": "native", "config": null}"#] {
            assert_eq!(parse_put(body).expect("good").config.get(), "{}");
        }
    }

    #[test]
    fn a_budget_is_what_is_named_of_it() {
        for (budget, expect) in [
            ("null", Budget::default()),
            ("{}", Budget::default()),
            (
                r#"{"soft_us": 0, "memory_mib": 8}"#,
                Budget { soft_us: Some(0), memory_mib: Some(8), ..Budget::default() },
            ),
            (r#"{"hard_ms": 2}"#, Budget { hard_ms: Some(2), ..Budget::default() }),
        ] {
            let put = parse_put(format!(r#"{{"component": "x", "budget": {budget}}}"#).as_bytes());
            assert_eq!(put.expect("good").budget, expect, "{budget}");
        }
    }

    #[test]
    fn bad_bodies_say_what_to_change() {
        for (body, expect) in [
            (&b"{"[..], "not valid JSON"),
            (b"[]", "not valid JSON"),
            (b"{}", "`component` is required"),
            (br#"{"component": 3}"#, "`component` must be a string, found 3"),
            (br#"{"component": "x", "if_generation": -1}"#, "`if_generation` must be a generation, found -1"),
            (br#"{"component": "x", "if_genration": 1}"#, "did you mean `if_generation`?"),
            (
                br#"{"component": "x", "budget": {"soft": 1}}"#,
                "`budget` must be an object of soft_us, hard_ms and memory_mib",
            ),
            (br#"{"component": "x", "handover": "warm"}"#, "`handover` must be `cold` or `require`, found \"warm\""),
            (br#"{"component": "x", "on_fault": true}"#, "`on_fault` must be `open` or `closed`, found true"),
            (br#"{"component": "x", "budget": {"hard_ms": -1}}"#, "found {\"hard_ms\": -1}"),
        ] {
            let error = parse_put(body).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
