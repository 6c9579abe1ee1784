//! The families of upstreams: servers elsewhere to which requests are sent on. How many there are, the configuration bounds.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::metrics::registered;

/// How a request to an upstream ended, as the label `outcome` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamOutcome {
    /// It answered to the end.
    Answered,
    /// It refused, by a fault of the client (4xx).
    Refused,
    /// It was saturated (429).
    Saturated,
    /// It failed: 5xx, an error of its own in the stream, or what it does not want from this host (401, 403, 404).
    Failed,
    /// No connection could be opened.
    Unreachable,
    /// It was silent for too long.
    Timeout,
    /// It broke off, or said that it had ended, before its answer was whole.
    Broken,
    /// It answered with something else than was asked for, or with too much.
    Garbled,
    /// The client went away, cancelled, or its deadline passed.
    Cancelled,
}

impl UpstreamOutcome {
    const ALL: [Self; 9] = [
        Self::Answered,
        Self::Refused,
        Self::Saturated,
        Self::Failed,
        Self::Unreachable,
        Self::Timeout,
        Self::Broken,
        Self::Garbled,
        Self::Cancelled,
    ];

    /// As the label has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Saturated => "saturated",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Broken => "broken",
            Self::Garbled => "garbled",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Handles of one upstream.
#[derive(Clone, Debug)]
pub struct UpstreamMetrics {
    /// `pointsman_upstream_requests_total`, by outcome.
    requests: [IntCounter; 9],
    /// `pointsman_upstream_retries_total`: requests that were sent elsewhere after it failed them.
    pub retries: IntCounter,
    /// `pointsman_upstream_hedges_total`: requests that were sent to another as well because it was slow.
    pub hedges: IntCounter,
    /// `pointsman_upstream_hedges_won_total`: those of them that the other answered.
    pub hedges_won: IntCounter,
    /// `pointsman_upstream_in_flight`.
    pub in_flight: IntGauge,
    /// `pointsman_upstream_connections_opened_total`.
    pub opened: IntCounter,
    /// `pointsman_upstream_connections_reused_total`: requests and probes on a connection that had carried one before.
    pub reused: IntCounter,
    /// `pointsman_upstream_connections`: those that are open.
    pub connections: IntGauge,
    /// `pointsman_upstream_up`: 1 while it is sent requests.
    pub up: IntGauge,
    /// `pointsman_upstream_probes_total{outcome="good"}`.
    pub probes_good: IntCounter,
    /// `pointsman_upstream_probes_total{outcome="bad"}`.
    pub probes_bad: IntCounter,
}

impl UpstreamMetrics {
    /// Counts a request that has ended.
    pub fn ended(&self, outcome: UpstreamOutcome) {
        self.requests[outcome as usize].inc();
    }
}

#[derive(Debug)]
pub(crate) struct UpstreamFamilies {
    requests: IntCounterVec,
    retries: IntCounterVec,
    hedges: IntCounterVec,
    hedges_won: IntCounterVec,
    in_flight: IntGaugeVec,
    opened: IntCounterVec,
    reused: IntCounterVec,
    connections: IntGaugeVec,
    up: IntGaugeVec,
    probes: IntCounterVec,
}

impl UpstreamFamilies {
    pub(crate) fn new(registry: &Registry) -> Self {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge =
            |name: &str, help: &str| registered(registry, IntGaugeVec::new(Opts::new(name, help), &["upstream"]));
        let (name, by_outcome) = (&["upstream"][..], &["upstream", "outcome"][..]);
        Self {
            requests: counter("pointsman_upstream_requests_total", "Requests to an upstream, by outcome.", by_outcome),
            retries: counter(
                "pointsman_upstream_retries_total",
                "Requests sent elsewhere after the upstream failed them before their first byte.",
                name,
            ),
            hedges: counter(
                "pointsman_upstream_hedges_total",
                "Requests sent to another as well because the upstream was slow to begin.",
                name,
            ),
            hedges_won: counter(
                "pointsman_upstream_hedges_won_total",
                "Hedged requests that the other answered.",
                name,
            ),
            in_flight: gauge("pointsman_upstream_in_flight", "Requests at an upstream."),
            opened: counter("pointsman_upstream_connections_opened_total", "Connections opened.", name),
            reused: counter(
                "pointsman_upstream_connections_reused_total",
                "Requests and probes on a connection that had carried one before.",
                name,
            ),
            connections: gauge("pointsman_upstream_connections", "Connections that are open."),
            up: gauge("pointsman_upstream_up", "1 while an upstream is sent requests."),
            probes: counter("pointsman_upstream_probes_total", "Health probes, by outcome.", by_outcome),
        }
    }

    pub(crate) fn of(&self, upstream: &str) -> UpstreamMetrics {
        let name = &[upstream];
        let ended = |outcome: UpstreamOutcome| self.requests.with_label_values(&[upstream, outcome.as_str()]);
        UpstreamMetrics {
            requests: UpstreamOutcome::ALL.map(ended),
            retries: self.retries.with_label_values(name),
            hedges: self.hedges.with_label_values(name),
            hedges_won: self.hedges_won.with_label_values(name),
            in_flight: self.in_flight.with_label_values(name),
            opened: self.opened.with_label_values(name),
            reused: self.reused.with_label_values(name),
            connections: self.connections.with_label_values(name),
            up: self.up.with_label_values(name),
            probes_good: self.probes.with_label_values(&[upstream, "good"]),
            probes_bad: self.probes.with_label_values(&[upstream, "bad"]),
        }
    }
}
