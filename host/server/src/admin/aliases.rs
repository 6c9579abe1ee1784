//! Aliases: which variants stand behind a model's name, and with which weights requests are assigned to them.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;

use super::guard::Actor;
use super::places::Kind;
use super::slots::from_json;
use super::wire::{Alias, AliasVariant, PutAlias};
use super::{blocking, list};
use crate::error::ApiError;
use crate::openai::{check_content_type, json, read_body};
use crate::path::Path;
use crate::ports::{AdminError, AdminErrorKind, Catalog, Variant};
use crate::state::ServerState;

/// Longest body of a `PUT`: a few names and numbers.
const MAX_PUT_BYTES: usize = 64 << 10;

pub(super) async fn aliases(State(state): State<Arc<ServerState>>) -> Response {
    let catalog = state.engine.catalog();
    let mut names: Vec<&str> = Vec::new();
    for variant in &catalog.variants {
        if !names.contains(&&*variant.alias) {
            names.push(&variant.alias);
        }
    }
    list(names.into_iter().map(|name| view(&state, &variants(&catalog, name), name)).collect())
}

pub(super) async fn alias(
    State(state): State<Arc<ServerState>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let catalog = state.engine.catalog();
    Ok(json(&view(&state, &variants_of(&catalog, &name).map_err(ApiError::Admin)?, &name)))
}

pub(super) async fn put_alias(
    State(state): State<Arc<ServerState>>,
    Extension(Actor(actor)): Extension<Actor>,
    Path(name): Path<String>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    check_content_type(request.headers())?;
    let put: PutAlias = from_json(&read_body(&state, request, MAX_PUT_BYTES).await?)?;
    let catalog = state.engine.catalog();
    put.weights.keys().try_for_each(|id| check_variant(&catalog, &name, ("weights", id)))?;
    let variants = variants_of(&catalog, &name).map_err(ApiError::Admin)?;
    let alias = name.clone();
    blocking(&state, Kind::Change, move |state| state.aliases.put_alias(&alias, put, &actor)).await?;
    Ok(json(&view(&state, &variants, &name)))
}

fn variants<'a>(catalog: &'a Catalog, name: &str) -> Vec<&'a Variant> {
    catalog.variants.iter().filter(|v| *v.alias == *name).map(|v| &**v).collect()
}

/// The variants of an alias; there is none without.
pub(super) fn variants_of<'a>(catalog: &'a Catalog, name: &str) -> Result<Vec<&'a Variant>, AdminError> {
    let found = variants(catalog, name);
    if found.is_empty() {
        let mut aliases: Vec<String> = catalog.variants.iter().map(|v| format!("`{}`", v.alias)).collect();
        aliases.dedup();
        let message = format!("there is no alias `{name}`; aliases are {}", aliases.join(", "));
        return Err(AdminError { kind: AdminErrorKind::NotFound, message, param: None });
    }
    Ok(found)
}

/// Refuses what `param` names and the alias lacks.
pub(super) fn check_variant(catalog: &Catalog, name: &str, (param, id): (&str, &str)) -> Result<(), ApiError> {
    let variants = variants_of(catalog, name).map_err(ApiError::Admin)?;
    if variants.iter().any(|variant| *variant.id == *id) {
        return Ok(());
    }
    let ids: Vec<String> = variants.iter().map(|v| format!("`{}`", v.id)).collect();
    let problem = format!("`{id}` is not a variant of `{name}`; its variants are {}", ids.join(", "));
    Err(ApiError::invalid(param, problem))
}

fn view(state: &ServerState, variants: &[&Variant], name: &str) -> Alias {
    let weights = state.aliases.weights(name);
    let assigned = !weights.weights.is_empty();
    let weight = |id: &str| assigned.then(|| weights.weights.get(id).copied().unwrap_or(0));
    let served = variants.iter().map(|variant| AliasVariant {
        id: variant.id.to_string(),
        weight: weight(&variant.id),
        replicas: variant.replicas.len(),
    });
    // A stored weight of a model that is not loaded: its requests go to the others, and the operator should see why.
    let gone = weights.weights.keys().filter(|id| !variants.iter().any(|v| *v.id == ***id));
    let gone = gone.map(|id| AliasVariant { id: id.clone(), weight: weight(id), replicas: 0 });
    Alias {
        alias: name.to_owned(),
        generation: weights.generation,
        sticky: assigned.then_some(weights.sticky),
        variants: served.chain(gone).collect(),
        rollout: weights.rollout,
    }
}
