//! What a host says on both planes while its models load: that it is alive, and that it serves nothing yet.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::routing::get;
use axum::{Router, middleware};
use pointsman_telemetry::Metrics;
use tokio::sync::watch;

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::serve::{Bounds, GOODBYE, Listeners, Phase, accept};
use crate::{anthropic, cors, ops};

/// Time for the requests of connections that are there when the start ends.
const LAST_REQUEST: Duration = Duration::from_millis(200);

/// Waits for the end of a start, and answers meanwhile: `/health` and `/version` of the data plane with 200, everything else with
/// 503. Connections of that time end with it. Nothing of it is counted, and no answer has an id, because what counts and numbers
/// is not there yet.
pub async fn answer_until<T>(listeners: &Listeners, config: &ServerConfig, started: impl Future<Output = T>) -> T {
    let (phase, phases) = watch::channel(Phase::Serving);
    let bounds = Bounds::new(config, &Arc::new(Metrics::new()));
    let (data, admin) = (bounds.of("data"), bounds.of("admin"));
    let planes = async {
        tokio::join!(
            accept(&listeners.data, probes(config), data, phases.clone(), Phase::Draining),
            accept(&listeners.admin, nothing(), admin, phases.clone(), Phase::Draining),
        )
    };
    let mut planes = pin!(planes);
    let started = tokio::select! {
        started = started => started,
        never = async { planes.as_mut().await; std::future::pending().await } => never,
    };
    // The next connections are the host's. Those that are here may be about to ask.
    for (next, patience) in [(Phase::Draining, LAST_REQUEST), (Phase::Closing, GOODBYE)] {
        let _ = phase.send(next);
        if tokio::time::timeout(patience, planes.as_mut()).await.is_ok() {
            break;
        }
    }
    started
}

fn probes(config: &ServerConfig) -> Router {
    let version: Arc<str> = config.version.as_str().into();
    let version = move || std::future::ready(ops::version_of(&version));
    let router = nothing().route("/health", get(|| std::future::ready(ops::alive()))).route("/version", get(version));
    let router = router.method_not_allowed_fallback(loading).layer(middleware::from_fn(anthropic::dress));
    match cors::layer(&config.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

fn nothing() -> Router {
    Router::new().fallback(loading)
}

async fn loading() -> ApiError {
    ApiError::Loading
}
