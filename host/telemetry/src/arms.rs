//! Metric families of rollouts: the same few numbers for control and candidate, side by side.
//!
//! Families of their own and not one more label on the vLLM ones: those are read by dashboards that must not see a request
//! twice. Series exist while a rollout is under way and are removed when it is over.

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

use crate::metrics::{E2E_SECONDS, ITL_SECONDS, TTFT_SECONDS, registered};

/// What becomes of a request, as the label `outcome`.
const OUTCOMES: [&str; 4] = ["finished", "failed", "rejected", "cancelled"];
/// Kinds of tokens, as the label `kind`.
const TOKENS: [&str; 3] = ["prompt", "cached", "generated"];

/// The families.
#[derive(Debug)]
pub(crate) struct ArmFamilies {
    ttft: HistogramVec,
    itl: HistogramVec,
    e2e: HistogramVec,
    requests: IntCounterVec,
    good: IntCounterVec,
    tokens: IntCounterVec,
    shadow: IntCounterVec,
}

/// Handles for one arm of a rollout.
#[derive(Clone, Debug)]
pub struct ArmMetrics {
    /// `pointsman_rollout_ttft_seconds`.
    pub ttft: Histogram,
    /// `pointsman_rollout_itl_seconds`: mean time between the tokens of a request.
    pub itl: Histogram,
    /// `pointsman_rollout_e2e_seconds`.
    pub e2e: Histogram,
    /// `pointsman_rollout_requests_total{outcome="finished"}`.
    pub finished: IntCounter,
    /// `pointsman_rollout_requests_total{outcome="failed"}`.
    pub failed: IntCounter,
    /// `pointsman_rollout_requests_total{outcome="rejected"}`.
    pub rejected: IntCounter,
    /// `pointsman_rollout_requests_total{outcome="cancelled"}`.
    pub cancelled: IntCounter,
    /// `pointsman_rollout_good_total`: finished within both SLOs of the rollout.
    pub good: IntCounter,
    /// `pointsman_rollout_tokens_total{kind="prompt"}`.
    pub prompt_tokens: IntCounter,
    /// `pointsman_rollout_tokens_total{kind="cached"}`: of those, expected in the prefix cache.
    pub cached_tokens: IntCounter,
    /// `pointsman_rollout_tokens_total{kind="generated"}`.
    pub generated_tokens: IntCounter,
}

// === impl ArmFamilies ===

impl ArmFamilies {
    pub(crate) fn new(registry: &Registry) -> Self {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            registered(registry, HistogramVec::new(options, &["slot", "arm"]))
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        Self {
            ttft: histogram("pointsman_rollout_ttft_seconds", "Time to first token, by arm.", TTFT_SECONDS),
            itl: histogram(
                "pointsman_rollout_itl_seconds",
                "Mean time between a request's tokens, by arm.",
                ITL_SECONDS,
            ),
            e2e: histogram("pointsman_rollout_e2e_seconds", "End-to-end time, by arm.", E2E_SECONDS),
            requests: counter(
                "pointsman_rollout_requests_total",
                "Requests ended, by arm.",
                &["slot", "arm", "outcome"],
            ),
            good: counter(
                "pointsman_rollout_good_total",
                "Requests served within both SLOs, by arm.",
                &["slot", "arm"],
            ),
            tokens: counter("pointsman_rollout_tokens_total", "Tokens, by arm.", &["slot", "arm", "kind"]),
            shadow: counter(
                "pointsman_shadow_decisions_total",
                "Decisions put to a shadow, by what its answer came to.",
                &["slot", "outcome"],
            ),
        }
    }

    pub(crate) fn shadow(&self, slot: &str, outcome: &str) -> IntCounter {
        self.shadow.with_label_values(&[slot, outcome])
    }

    pub(crate) fn forget_shadow(&self, slot: &str, outcome: &str) {
        // As below.
        let _ = self.shadow.remove_label_values(&[slot, outcome]);
    }

    pub(crate) fn arm(&self, slot: &str, arm: &str) -> ArmMetrics {
        let labels = &[slot, arm];
        let [finished, failed, rejected, cancelled] =
            OUTCOMES.map(|outcome| self.requests.with_label_values(&[slot, arm, outcome]));
        let [prompt_tokens, cached_tokens, generated_tokens] =
            TOKENS.map(|kind| self.tokens.with_label_values(&[slot, arm, kind]));
        ArmMetrics {
            ttft: self.ttft.with_label_values(labels),
            itl: self.itl.with_label_values(labels),
            e2e: self.e2e.with_label_values(labels),
            finished,
            failed,
            rejected,
            cancelled,
            good: self.good.with_label_values(labels),
            prompt_tokens,
            cached_tokens,
            generated_tokens,
        }
    }

    pub(crate) fn forget(&self, slot: &str, arm: &str) {
        // Removing a series that was never written is not an error worth telling.
        for family in [&self.ttft, &self.itl, &self.e2e] {
            let _ = family.remove_label_values(&[slot, arm]);
        }
        let _ = self.good.remove_label_values(&[slot, arm]);
        for outcome in OUTCOMES {
            let _ = self.requests.remove_label_values(&[slot, arm, outcome]);
        }
        for kind in TOKENS {
            let _ = self.tokens.remove_label_values(&[slot, arm, kind]);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Metrics;

    #[test]
    fn the_series_of_an_arm_come_and_go() {
        let metrics = Metrics::new();
        for arm in ["control", "candidate"] {
            let handles = metrics.arm("router", arm);
            handles.ttft.observe(0.1);
            handles.good.inc();
        }
        metrics.forget_arm("router", "candidate");
        let text = metrics.render();
        assert!(text.contains(r#"pointsman_rollout_good_total{arm="control",slot="router"} 1"#), "{text}");
        assert!(!text.contains("candidate"), "{text}");
        metrics.forget_arm("router", "control");
        metrics.shadow("router", "agreed").inc_by(7);
        let shadowed = r#"pointsman_shadow_decisions_total{outcome="agreed",slot="router"} 7"#;
        assert!(metrics.render().contains(shadowed));
        metrics.forget_shadow("router", "agreed");
        assert!(!metrics.render().contains("outcome=\"agreed\""));
        assert!(!metrics.render().contains("arm="), "a rollout that is over leaves no series");
    }
}
