//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes: for clients that count tokens before they send them.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::chat::conversation;
use super::fields::{Fields, mismatch, token_id};
use super::generate::tokenizing;
use super::{json, read_fields};
use crate::admission::Permit;
use crate::demand::{self, Asking};
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::keys::KeyDigest;
use crate::ports::Variant;
use crate::state::ServerState;
use crate::text::TextModel;

#[derive(Serialize)]
struct Tokenized<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [u32],
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// Of a request, with its API key.
type Id<'a> = (&'a Arc<str>, Option<KeyDigest>);

/// Tokenizer and context of a model of either kind; without a model, of the first one.
async fn target(
    fields: &mut Fields,
    state: &ServerState,
    (permit, id): (&mut Permit, Id<'_>),
) -> Result<(Arc<TextModel>, u32), ApiError> {
    let catalog = state.engine.catalog();
    let named = fields.string("model")?;
    // One that comes and goes by itself is named alone, so that nothing is loaded for a request that named no model.
    let named_by = |variant: &Arc<Variant>| match catalog.on_demand.contains(&variant.id) {
        true => Arc::clone(&variant.id),
        false => Arc::clone(&variant.alias),
    };
    let generator = || catalog.variants.first().map(named_by);
    let encoder = || catalog.encoders.first().map(|encoder| Arc::clone(&encoder.name));
    let first = || generator().or_else(encoder).or_else(|| catalog.on_demand.first().cloned());
    let first = || first().map(|name| name.to_string());
    let name = named.or_else(first).unwrap_or_default();
    let (arrived, timeout_ms) = (state.clock.now(), state.config.default_timeout_ms);
    let catalog = demand::reach(state, &name, permit, Asking { arrived, timeout_ms, id, told: None }).await?;
    let what = "only they have its tokenizer: ask one of them";
    if let Some(encoder) = catalog.encoder(&name) {
        if encoder.text.is_estimate() {
            return Err(ApiError::NotOnward { model: encoder.name.to_string(), what });
        }
        return Ok((Arc::clone(&encoder.text), encoder.max_tokens));
    }
    let target = Target::find(&catalog, &name)?;
    if target.text().is_estimate() {
        return Err(ApiError::NotOnward { model: target.name, what });
    }
    Ok((Arc::clone(target.text()), target.context_tokens(false)))
}

/// Tokenizes a `prompt` or `messages`.
pub(crate) async fn tokenize(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    // Tokenizing is work like any other: it takes a place among the requests in flight.
    let mut permit = state.enter(&caller)?;
    let mut fields = read_fields(&state, request).await?;
    let (text, max_model_len) = target(&mut fields, &state, (&mut permit, (&tag, caller.key))).await?;
    let wants_strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let tokens: Arc<[u32]> = match fields.string("prompt")? {
        None => conversation(&mut fields)?.prompt(&text, state.clock.unix_seconds()).await?.tokens,
        Some(prompt) => {
            let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
            let text = Arc::clone(&text);
            let work = move || text.encode(&prompt, add_special);
            let invalid = |error: crate::text::EncodeError| ApiError::invalid("prompt", error.to_string());
            tokenizing(usize::MAX, move || Ok(work().map_err(invalid)?.into())).await?
        }
    };
    let string = |id: &u32| String::from_utf8_lossy(&text.token_bytes(*id)).into_owned();
    permit.check_cancelled()?;
    Ok(json(&Tokenized {
        count: tokens.len(),
        max_model_len,
        token_strs: wants_strings.then(|| tokens.iter().map(string).collect()),
        tokens: &tokens,
    }))
}

/// Turns `tokens` back into text, special ones included.
pub(crate) async fn detokenize(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let mut permit = state.enter(&caller)?;
    let mut fields = read_fields(&state, request).await?;
    let (text, _) = target(&mut fields, &state, (&mut permit, (&tag, caller.key))).await?;
    let ids = match fields.require("tokens")? {
        Value::Array(ids) => ids,
        other => return Err(mismatch("tokens", "an array of token ids", &other)),
    };
    let vocabulary = text.vocabulary();
    let id = |(i, value): (usize, &Value)| token_id(&format!("tokens[{i}]"), value, vocabulary);
    let tokens: Vec<u32> = ids.iter().enumerate().map(id).collect::<Result<_, _>>()?;
    permit.check_cancelled()?;
    Ok(json(&Detokenized { prompt: text.decode(&tokens, false) }))
}
