//! What a host says on both planes while its models load: that it is alive, and that it serves nothing yet.

use std::pin::pin;
use std::sync::Arc;

use axum::Router;
use axum::response::IntoResponse;
use axum::routing::get;
use pointsman_telemetry::Metrics;
use tokio::sync::watch;

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::ops;
use crate::serve::{Bounds, GOODBYE, Listeners, Phase, accept};

/// Waits for the end of a start, and answers meanwhile: `/health` with 200, everything else with 503. Connections of that time
/// end with it. Nothing of it is counted, because the host's metrics are not there yet.
pub async fn answer_until<T>(listeners: &Listeners, config: &ServerConfig, started: impl Future<Output = T>) -> T {
    let (phase, phases) = watch::channel(Phase::Serving);
    let bounds = Bounds::new(config, &Arc::new(Metrics::new()));
    let (data, admin) = (bounds.of("data"), bounds.of("admin"));
    let planes = async {
        tokio::join!(
            accept(&listeners.data, probes(&config.version), data, phases.clone()),
            accept(&listeners.admin, nothing(), admin, phases.clone()),
        )
    };
    let mut planes = pin!(planes);
    let started = tokio::select! {
        started = started => started,
        never = async { planes.as_mut().await; std::future::pending().await } => never,
    };
    let _ = phase.send(Phase::Closing);
    let _ = tokio::time::timeout(GOODBYE, planes).await;
    started
}

fn probes(version: &str) -> Router {
    let version: Arc<str> = version.into();
    let version = move || std::future::ready(ops::version_of(&version));
    nothing().route("/health", get(|| std::future::ready(ops::alive()))).route("/version", get(version))
}

fn nothing() -> Router {
    Router::new().fallback(|| std::future::ready(ApiError::Loading.into_response()))
}
