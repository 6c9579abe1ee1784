//! The data plane's routes and the layers around them.

use std::sync::Arc;

use axum::extract::Request;
use axum::routing::{MethodRouter, delete, get, post};
use axum::{Router, middleware};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

use crate::error::{ApiError, panicked};
use crate::state::ServerState;
use crate::{anthropic, batch, cors, identity, keys, openai, ops};

/// Paths with the methods that they answer, for the description, and with their handlers.
pub(crate) type Routes = Vec<(&'static str, &'static [&'static str], MethodRouter<Arc<ServerState>>)>;

/// Every route, as a table: the router is built from it and the description is checked against it.
pub(crate) fn routes() -> Routes {
    vec![
        ("/v1/chat/completions", &["post"], post(openai::chat)),
        ("/v1/completions", &["post"], post(openai::completions)),
        ("/v1/responses", &["post"], post(openai::responses)),
        ("/v1/messages", &["post"], post(anthropic::messages)),
        ("/v1/messages/count_tokens", &["post"], post(anthropic::count_tokens)),
        ("/v1/embeddings", &["post"], post(openai::embeddings)),
        ("/v1/files", &["get", "post"], get(batch::files).post(batch::upload)),
        ("/v1/files/{id}", &["get", "delete"], get(batch::file).delete(batch::delete_file)),
        ("/v1/files/{id}/content", &["get"], get(batch::content)),
        ("/v1/batches", &["get", "post"], get(batch::batches).post(batch::create_batch)),
        ("/v1/batches/{id}", &["get"], get(batch::batch)),
        ("/v1/batches/{id}/cancel", &["post"], post(batch::cancel_batch)),
        ("/v1/models", &["get"], get(openai::models)),
        // Names may hold slashes, as in `org/model`.
        ("/v1/models/{*id}", &["get"], get(openai::model)),
        ("/v1/requests/{id}/cancel", &["post"], post(openai::cancel)),
        ("/v1/requests/{id}", &["delete"], delete(openai::cancel)),
        ("/tokenize", &["post"], post(openai::tokenize)),
        ("/detokenize", &["post"], post(openai::detokenize)),
        ("/health", &["get"], get(ops::health)),
        ("/ready", &["get"], get(ops::ready)),
        ("/version", &["get"], get(ops::version)),
        ("/metrics", &["get"], get(ops::metrics)),
        ("/openapi.json", &["get"], get(ops::openapi)),
    ]
}

/// The data plane. Every response carries `x-request-id`; unknown routes, wrong methods and panics answer in JSON.
pub fn data_router(state: &Arc<ServerState>) -> Router {
    // One layer of four: a route's service is cloned for each request, whole, and boxed for each layer.
    let layers = ServiceBuilder::new()
        .layer(middleware::from_fn(anthropic::dress))
        .layer(middleware::from_fn_with_state(Arc::clone(state), identity::tag))
        .layer(middleware::from_fn_with_state(Arc::clone(state), keys::meter))
        .layer(CatchPanicLayer::custom(panicked));
    let router = routes().into_iter().fold(Router::new(), |router, (path, _, route)| router.route(path, route));
    let router = router.fallback(unknown_route).method_not_allowed_fallback(wrong_method).layer(layers);
    // Outermost: a browser asks whether it may ask without a key, and must be able to read refusals.
    let router = match cors::layer(&state.config.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.with_state(Arc::clone(state))
}

pub(crate) async fn unknown_route(request: Request) -> ApiError {
    ApiError::UnknownRoute { method: request.method().to_string(), path: request.uri().path().to_owned() }
}

pub(crate) async fn wrong_method(request: Request) -> ApiError {
    ApiError::Method { method: request.method().to_string(), path: request.uri().path().to_owned() }
}
