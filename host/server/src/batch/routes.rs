//! `/v1/batches`: what a batch is to a client.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value};

use super::job::{Batch, Counts, LineFault, Status};
use super::{Page, Turn};
use crate::entry::Call;
use crate::error::ApiError;
use crate::identity::Caller;
use crate::openai::fields::{Fields, mismatch};
use crate::openai::{json, read_fields};
use crate::path::Path;
use crate::state::ServerState;

/// Batches of one page.
const MAX_PAGE: usize = 100;
/// Longest window.
const MAX_WINDOW: u64 = 30 * 24 * 3_600;
/// Entries of `metadata`, and bytes of a key and a value (`OpenAI`'s bounds).
const MAX_METADATA: (usize, usize, usize) = (16, 64, 512);

#[derive(Serialize)]
struct BatchObject {
    id: String,
    object: &'static str,
    endpoint: String,
    errors: Option<Faults>,
    input_file_id: String,
    completion_window: String,
    status: Status,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
    created_at: u64,
    in_progress_at: Option<u64>,
    expires_at: u64,
    finalizing_at: Option<u64>,
    completed_at: Option<u64>,
    failed_at: Option<u64>,
    expired_at: Option<u64>,
    cancelling_at: Option<u64>,
    cancelled_at: Option<u64>,
    request_counts: Counts,
    metadata: Map<String, Value>,
}

#[derive(Serialize)]
struct Faults {
    object: &'static str,
    data: Vec<LineFault>,
}

impl From<Batch> for BatchObject {
    fn from(batch: Batch) -> Self {
        let ended = |status| batch.ended_as(status);
        let [completed_at, failed_at] = [Status::Completed, Status::Failed].map(ended);
        let [expired_at, cancelled_at] = [Status::Expired, Status::Cancelled].map(ended);
        let errors = (!batch.faults.is_empty()).then_some(Faults { object: "list", data: batch.faults });
        Self {
            id: batch.id,
            object: "batch",
            endpoint: batch.endpoint,
            errors,
            input_file_id: batch.input,
            completion_window: batch.window,
            status: batch.status,
            output_file_id: batch.has_output.then_some(batch.output),
            error_file_id: batch.has_errors.then_some(batch.errors),
            created_at: batch.created_at,
            in_progress_at: batch.in_progress_at,
            expires_at: batch.expires_at,
            finalizing_at: batch.finalizing_at,
            completed_at,
            failed_at,
            expired_at,
            cancelling_at: batch.cancelling_at,
            cancelled_at,
            request_counts: batch.counts,
            metadata: batch.metadata,
        }
    }
}

/// `POST /v1/batches`.
pub(crate) async fn create_batch(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = read_fields(&state, request).await?;
    let input = fields.text("input_file_id")?;
    let endpoint = endpoint(fields.text("endpoint")?)?;
    let window = fields.text("completion_window")?;
    let window_seconds = window_seconds(&window)?;
    let metadata = metadata(&mut fields)?;
    if fields.take("output_expires_after").is_some() {
        return Err(ApiError::unsupported("output_expires_after", "`output_expires_after`"));
    }
    let created = state.batches.work(move |desk| {
        let file = desk.file(&caller.tenant, &input).map_err(|_| {
            let problem = format!("there is no file `{input}`: upload it with the purpose batch first");
            ApiError::invalid("input_file_id", problem)
        })?;
        if file.purpose != "batch" {
            let problem =
                format!("the file `{input}` has the purpose {}, and a batch reads one of batch", file.purpose);
            return Err(ApiError::invalid("input_file_id", problem));
        }
        let now = desk.now();
        desk.create(Batch {
            id: desk.new_id("batch_"),
            tenant: caller.tenant.to_string(),
            key: caller.holder.as_ref().map(|holder| holder.key.name.clone()),
            endpoint,
            input,
            output: desk.new_id("file-"),
            errors: desk.new_id("file-"),
            window,
            metadata,
            status: Status::Validating,
            late: false,
            created_at: now,
            expires_at: now + window_seconds,
            in_progress_at: None,
            finalizing_at: None,
            cancelling_at: None,
            ended_at: None,
            faults: Vec::new(),
            counts: Counts::default(),
            has_output: false,
            has_errors: false,
        })
    });
    Ok(json(&BatchObject::from(created.await??)))
}

fn endpoint(path: String) -> Result<String, ApiError> {
    let known = Call::ALL.map(Call::path);
    if known.contains(&&*path) {
        return Ok(path);
    }
    let problem = format!("`endpoint` must be one of {}, found \"{path}\"", known.join(", "));
    Err(ApiError::invalid("endpoint", problem))
}

/// `24h`, and any other number of seconds, minutes, hours or days.
fn window_seconds(window: &str) -> Result<u64, ApiError> {
    let units = [('s', 1), ('m', 60), ('h', 3_600), ('d', 86_400)];
    let read = units.iter().find_map(|(unit, seconds)| {
        let number = window.strip_suffix(*unit)?;
        let number: u64 = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())??;
        number.checked_mul(*seconds)
    });
    read.filter(|seconds| (1..=MAX_WINDOW).contains(seconds)).ok_or_else(|| {
        let problem = "`completion_window` must be a number of s, m, h or d from 1s to 30d, as in 24h";
        ApiError::invalid("completion_window", format!("{problem}, found \"{}\"", window.escape_debug()))
    })
}

fn metadata(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let (entries, key, value) = MAX_METADATA;
    let good = |(name, text): (&String, &Value)| name.len() <= key && text.as_str().is_some_and(|t| t.len() <= value);
    match fields.take("metadata") {
        None => Ok(Map::new()),
        Some(Value::Object(map)) if map.len() <= entries && map.iter().all(good) => Ok(map),
        Some(other) => {
            let expect = format!("an object of at most {entries} texts of {value} bytes, with names of {key}");
            Err(mismatch("metadata", &expect, &other))
        }
    }
}

/// `GET /v1/batches`.
pub(crate) async fn batches(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    turn: Result<Query<Turn>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(turn) = turn.map_err(|error| ApiError::invalid("limit", error.body_text()))?;
    let batches = state.batches.work(move |desk| desk.batches(&caller.tenant)).await?;
    let batches = batches.into_iter().map(BatchObject::from).collect();
    Ok(json(&Page::of(batches, |batch| &batch.id, &turn, MAX_PAGE)?))
}

/// `GET /v1/batches/{id}`.
pub(crate) async fn batch(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let batch = state.batches.work(move |desk| desk.batch(&caller.tenant, &id)).await??;
    Ok(json(&BatchObject::from(batch)))
}

/// `POST /v1/batches/{id}/cancel`.
pub(crate) async fn cancel_batch(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let cancelled = state.batches.work(move |desk| {
        desk.batch(&caller.tenant, &id)?;
        let now = desk.now();
        let (batch, cancelled) = desk.change(&id, |batch| batch.cancel(now))?;
        cancelled.map_err(|status| ApiError::InUse {
            problem: format!("the batch `{id}` is {} and cannot be cancelled any more", status.as_str()),
        })?;
        Ok::<_, ApiError>(batch)
    });
    Ok(json(&BatchObject::from(cancelled.await??)))
}
