//! `GET /v1/models` and `GET /v1/models/{id}`: aliases first, then each variant by its own id, then the models for embeddings,
//! then those that are loaded on demand and not there. To look at one of these does not load it.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::json;
use crate::admin::wire::ModelState;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::identity::Caller;
use crate::path::Path;
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
    /// vLLM's name for the context length; nobody knows that of a model that is not loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<u32>,
    /// Numbers of a vector; only models for embeddings have it, and of those this host's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_dimensions: Option<u32>,
    /// Of one that is loaded on demand and not served now.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<ModelState>,
}

fn entry<'a>(id: &'a str, variant: &'a Variant) -> Model<'a> {
    Model {
        id,
        object: "model",
        created: variant.created,
        owned_by: if variant.is_upstream() { "upstream" } else { "pointsman" },
        root: &variant.alias,
        max_model_len: Some(variant.context_tokens),
        embedding_dimensions: None,
        state: None,
    }
}

fn encoder_entry(encoder: &Encoder) -> Model<'_> {
    Model {
        id: &encoder.name,
        object: "model",
        created: encoder.created,
        owned_by: if encoder.upstreams.is_empty() { "pointsman" } else { "upstream" },
        root: &encoder.name,
        max_model_len: Some(encoder.max_tokens),
        embedding_dimensions: encoder.dimensions,
        state: None,
    }
}

/// A model that is loaded when somebody asks for it.
fn unloaded<'a>(state: &ServerState, name: &'a str) -> Model<'a> {
    Model {
        id: name,
        object: "model",
        created: state.started,
        owned_by: "pointsman",
        root: name.split(':').next().unwrap_or(name),
        max_model_len: None,
        embedding_dimensions: None,
        state: state.models.state(name),
    }
}

/// Lists every name that a request may use.
pub(crate) async fn models(State(state): State<Arc<ServerState>>, _caller: Caller) -> Response {
    let catalog = state.engine.catalog();
    let generators = catalog.names().into_iter().map(|(name, variant)| entry(name, variant));
    let encoders = catalog.encoders.iter().map(|encoder| encoder_entry(encoder));
    let data = generators.chain(encoders).chain(catalog.unloaded().map(|name| unloaded(&state, name))).collect();
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
    if catalog.unloaded().any(|name| **name == *id) {
        return Ok(json(&unloaded(&state, &id)));
    }
    let target = Target::find(&catalog, &id)?;
    Ok(json(&entry(&target.name, &target.variants[0])))
}
