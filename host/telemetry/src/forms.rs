//! Metrics of the compiled forms that are kept: how often one was there, and what they take.
//!
//! A file of its own beside the other families, because the server alone has these handles.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::metrics::registered;

/// Handles of the compiled forms that are kept.
#[derive(Clone, Debug)]
pub struct FormMetrics {
    /// `pointsman_forms_total{outcome="hit"}`.
    pub hits: IntCounter,
    /// `pointsman_forms_total{outcome="joined"}`: another request has it compiled.
    pub joined: IntCounter,
    /// `pointsman_forms_total{outcome="miss"}`.
    pub misses: IntCounter,
    /// `pointsman_forms_kept`.
    pub kept: IntGauge,
    /// `pointsman_forms_kept_bytes`.
    pub bytes: IntGauge,
}

impl FormMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let help = "Forms that requests asked for, by whether they were compiled already.";
        let outcomes = registered(registry, IntCounterVec::new(Opts::new("pointsman_forms_total", help), &["outcome"]));
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help));
        Self {
            hits: outcomes.with_label_values(&["hit"]),
            joined: outcomes.with_label_values(&["joined"]),
            misses: outcomes.with_label_values(&["miss"]),
            kept: gauge("pointsman_forms_kept", "Compiled forms that are kept."),
            bytes: gauge("pointsman_forms_kept_bytes", "Memory of the compiled forms that are kept."),
        }
    }
}
