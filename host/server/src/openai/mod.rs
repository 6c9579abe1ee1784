//! The OpenAI shapes: chat completions, completions, responses, embeddings, models, and vLLM's tokenize and detokenize.
//!
//! Each route parses its own body; everything after that is the same for every kind of generation, Anthropic's too: a
//! `conversation` is rendered, `generate` dispatches. Errors of any kind are `ApiError`; nothing here knows a status code.

pub(crate) mod blocks;
mod calls;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod conversation;
mod elsewhere;
pub(crate) mod embeddings;
mod errand;
pub(crate) mod fields;
pub(crate) mod format;
pub(crate) mod generate;
mod inputs;
mod loading;
mod logprobs;
mod marked;
mod models;
mod ndjson;
pub(crate) mod params;
mod progress;
mod progressive;
mod relayed;
pub(crate) mod responses;
pub(crate) mod speculation;
mod tokenize;
pub(crate) mod tools;

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Collected, LengthLimitError, Limited};
use serde::Serialize;

pub(crate) use self::chat::chat;
pub(crate) use self::completions::completions;
pub(crate) use self::embeddings::embeddings;
pub(crate) use self::models::{model, models};
pub(crate) use self::responses::responses;
pub(crate) use self::tokenize::{detokenize, tokenize};

use crate::error::ApiError;
use crate::identity::Caller;
use crate::path::Path;
use crate::state::ServerState;
use crate::stream::Totals;
use fields::Fields;

/// `usage`, on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokens,
    /// Where drafts were looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokens>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct CompletionTokens {
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct PromptTokens {
    cached_tokens: u32,
}

impl From<Totals> for Usage {
    fn from(totals: Totals) -> Self {
        Self {
            prompt_tokens: totals.prompt,
            completion_tokens: totals.completion,
            total_tokens: totals.prompt.saturating_add(totals.completion),
            prompt_tokens_details: PromptTokens { cached_tokens: totals.cached },
            completion_tokens_details: (totals.accepted + totals.rejected > 0).then_some(CompletionTokens {
                accepted_prediction_tokens: totals.accepted,
                rejected_prediction_tokens: totals.rejected,
            }),
        }
    }
}

/// Reads a JSON body within the bounds on size and time.
pub(crate) async fn read_fields(state: &ServerState, request: axum::extract::Request) -> Result<Fields, ApiError> {
    Fields::parse(&read_json(state, request).await?)
}

/// Reads what says that it is JSON, within the same bounds.
pub(crate) async fn read_json(state: &ServerState, request: axum::extract::Request) -> Result<Bytes, ApiError> {
    check_content_type(request.headers())?;
    read_body(state, request, state.config.max_body_bytes).await
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read_body(
    state: &ServerState,
    request: axum::extract::Request,
    limit: usize,
) -> Result<Bytes, ApiError> {
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(ApiError::TooLarge { limit });
    }
    let read = async {
        let collected = Limited::new(request.into_body(), limit).collect().await;
        collected.map(Collected::to_bytes).map_err(|error| match error.is::<LengthLimitError>() {
            true => ApiError::TooLarge { limit },
            false => ApiError::BodyBroken,
        })
    };
    let timeout = ApiError::BodyTimeout { limit_ms: state.config.body_timeout_ms };
    tokio::time::timeout(state.config.body_timeout(), read).await.unwrap_or(Err(timeout))
}

/// A body without a type is taken for JSON. None is unpacked: how large it becomes is not known before.
pub(crate) fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        return Err(ApiError::ContentEncoding { found: String::from_utf8_lossy(encoding.as_bytes()).into_owned() });
    }
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
    let essence = text.split(';').next().unwrap_or_default().trim();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::ContentType { found: essence.to_owned() })
}

/// Appends a server-sent event.
pub(crate) fn sse<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(b"data: ");
    if let Err(error) = serde_json::to_writer(&mut *out, value) {
        tracing::error!(%error, "a chunk could not be written as JSON; this is a bug of the host");
    }
    out.extend_from_slice(b"\n\n");
}

/// Appends a server-sent event that has a name.
pub(crate) fn sse_named<T: Serialize>(out: &mut Vec<u8>, name: &str, value: &T) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    sse(out, value);
}

/// An error after the first byte: one frame with the error object, then the end.
pub(crate) fn sse_error(out: &mut Vec<u8>, error: &ApiError) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(error.json().as_bytes());
    out.extend_from_slice(b"\n\n");
}

fn sse_done(out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: [DONE]\n\n");
}

/// A JSON response.
pub(crate) fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "a response could not be written as JSON; this is a bug of the host");
            ApiError::Internal.into_response()
        }
    }
}

/// `POST /v1/requests/{id}/cancel` and `DELETE /v1/requests/{id}`.
pub(crate) async fn cancel(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Cancelled<'a> {
        id: &'a str,
        object: &'static str,
        cancelled: bool,
    }
    if !state.registry.cancel(&id, caller.key, &*state.engine) {
        return Err(ApiError::UnknownRequest { id });
    }
    Ok(json(&Cancelled { id: &id, object: "request", cancelled: true }))
}
