//! Models that come and go: how requests find them, and what they take.
//!
//! In a file of its own, as upstreams are: whoever reads how models are loaded on demand finds its families in one place.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::metrics::registered;

/// Handles of the models.
#[derive(Clone, Debug)]
pub struct ModelMetrics {
    /// `pointsman_models_requests_total{outcome="hit"}`: the model was there.
    pub hits: IntCounter,
    /// `pointsman_models_requests_total{outcome="miss"}`: the request waited for it, or was refused.
    pub misses: IntCounter,
    /// `pointsman_models_loads_total{outcome="loaded"}`.
    pub loaded: IntCounter,
    /// `pointsman_models_loads_total{outcome="failed"}`.
    pub failed: IntCounter,
    /// `pointsman_models_evicted_total`.
    pub evicted: IntCounter,
    /// `pointsman_models_bytes`.
    pub bytes: IntGauge,
}

impl ModelMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let counters =
            |name: &str, help: &str| registered(registry, IntCounterVec::new(Opts::new(name, help), &["outcome"]));
        let name = "pointsman_models_requests_total";
        let requests = counters(name, "Requests for models that are loaded on demand, by whether they were there.");
        let loads = counters(
            "pointsman_models_loads_total",
            "Loads of models while the host ran, and of those again at its start that failed, by what they came to.",
        );
        let evicted = IntCounter::new("pointsman_models_evicted_total", "Models given up for room.");
        let bytes = "Weights, KV pools and workspaces of the models that are loaded, all devices together.";
        Self {
            hits: requests.with_label_values(&["hit"]),
            misses: requests.with_label_values(&["miss"]),
            loaded: loads.with_label_values(&["loaded"]),
            failed: loads.with_label_values(&["failed"]),
            evicted: registered(registry, evicted),
            bytes: registered(registry, IntGauge::new("pointsman_models_bytes", bytes)),
        }
    }
}
