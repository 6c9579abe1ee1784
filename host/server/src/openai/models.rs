//! `GET /v1/models` and `GET /v1/models/{id}`: aliases first, then each variant by its own id, then the models for embeddings.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde::Serialize;

use super::json;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::identity::Caller;
use crate::ports::{Encoder, Variant};
use crate::state::ServerState;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The alias that a variant belongs to (as in vLLM, `root` is what stands behind a name).
    root: &'a str,
    /// vLLM's name for the context length.
    max_model_len: u32,
    /// Numbers of a vector; only models for embeddings have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_dimensions: Option<u32>,
}

fn entry<'a>(id: &'a str, variant: &'a Variant) -> Model<'a> {
    Model {
        id,
        object: "model",
        created: variant.created,
        owned_by: if variant.is_upstream() { "upstream" } else { "pointsman" },
        root: &variant.alias,
        max_model_len: variant.context_tokens,
        embedding_dimensions: None,
    }
}

fn encoder_entry(encoder: &Encoder) -> Model<'_> {
    Model {
        id: &encoder.name,
        object: "model",
        created: encoder.created,
        owned_by: "pointsman",
        root: &encoder.name,
        max_model_len: encoder.max_tokens,
        embedding_dimensions: Some(encoder.dimensions),
    }
}

/// Lists every name that a request may use.
pub(crate) async fn models(State(state): State<Arc<ServerState>>, _caller: Caller) -> Response {
    let catalog = state.engine.catalog();
    let generators = catalog.names().into_iter().map(|(name, variant)| entry(name, variant));
    let data = generators.chain(catalog.encoders.iter().map(|encoder| encoder_entry(encoder))).collect();
    json(&List { object: "list", data })
}

/// Shows one name.
pub(crate) async fn model(
    State(state): State<Arc<ServerState>>,
    _caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let catalog = state.engine.catalog();
    if let Some(encoder) = catalog.encoder(&id) {
        return Ok(json(&encoder_entry(encoder)));
    }
    let target = Target::find(&catalog, &id)?;
    Ok(json(&entry(&target.name, &target.variants[0])))
}
