//! Typed metric families, named as vLLM names them where vLLM has the metric, so that existing dashboards read us unchanged.
//!
//! Components ask once for the handles of their labels ([`Metrics::request`], [`Metrics::replica`], [`Metrics::slot`]) and
//! then only touch atomics. Built on the `prometheus` crate: it can remove the series of a retired revision and register
//! a guest's own metrics at run time, which statically typed exporters cannot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::arms::{ArmFamilies, ArmMetrics};
use crate::devices::{DeviceFamilies, DeviceFigures};
use crate::forms::FormMetrics;
use crate::models::ModelMetrics;
use crate::upstreams::{UpstreamFamilies, UpstreamMetrics};

/// Buckets of `gen_ai.server.time_to_first_token` (seconds).
pub(crate) const TTFT_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Buckets of `gen_ai.server.time_per_output_token` (seconds), with two finer ones for small models.
pub(crate) const ITL_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Buckets of `gen_ai.server.request.duration` (seconds): 0.01 * 2^k.
pub(crate) const E2E_SECONDS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// Policy calls: half a microsecond to ten milliseconds.
const CALL_SECONDS: &[f64] = &[5e-7, 1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 5e-4, 1e-3, 1e-2];
/// Publishing a generation, from pointer swap to a full warm-up.
const SWAP_SECONDS: &[f64] = &[1e-6, 5e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0];
/// Engine steps and their phases.
const STEP_SECONDS: &[f64] = &[1e-5, 2e-5, 5e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.5, 1.0];

/// The host's own part of a step.
const HOST_SECONDS: &[f64] = &[5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0];

/// All families of the host and the registry they live in.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    kv_usage: GaugeVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    kv_evicted: IntCounterVec,
    kv_cached: IntGaugeVec,
    kv_slack: GaugeVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    draft_tokens: IntCounterVec,
    accepted_tokens: IntCounterVec,
    drafts: IntCounterVec,
    drafts_no_room: IntCounterVec,
    preemptions: IntCounterVec,
    success: IntCounterVec,
    ttft: HistogramVec,
    ttft_predicted: HistogramVec,
    ttft_error: HistogramVec,
    itl: HistogramVec,
    e2e: HistogramVec,
    queue_time: HistogramVec,
    cache_config: IntGaugeVec,
    policy_call: HistogramVec,
    policy_faults: IntCounterVec,
    policy_fallbacks: IntCounterVec,
    policy_late_plans: IntCounterVec,
    policy_handovers: IntCounterVec,
    policy_generation: IntGaugeVec,
    policy_missing: IntGaugeVec,
    swap: HistogramVec,
    step: HistogramVec,
    step_host: HistogramVec,
    step_fill: GaugeVec,
    steps_ahead: IntCounterVec,
    tokens: IntCounterVec,
    rejected: IntCounterVec,
    cancelled: IntCounterVec,
    tenant_requests: IntCounterVec,
    tenant_tokens: IntCounterVec,
    alerts: IntCounterVec,
    batches: IntGaugeVec,
    batch_lines: IntCounterVec,
    devices: DeviceFamilies,
    tls_reloads: IntCounterVec,
    tls_until: IntGaugeVec,
    tls_failures: IntCounterVec,
    connections: IntGaugeVec,
    connections_evicted: IntCounterVec,
    safe_mode: IntGauge,
    events_dropped: IntCounter,
    cache: CacheMetrics,
    models: ModelMetrics,
    forms: FormMetrics,
    arms: ArmFamilies,
    upstreams: UpstreamFamilies,
    plugin: Mutex<PluginFamilies>,
}

/// Handles for the requests of one variant (`model_name`).
#[derive(Clone, Debug)]
pub struct RequestMetrics {
    /// `vllm:time_to_first_token_seconds`.
    pub ttft: Histogram,
    /// `pointsman_ttft_predicted_seconds`.
    pub ttft_predicted: Histogram,
    /// `pointsman_ttft_prediction_error_seconds`.
    pub ttft_error: Histogram,
    /// `vllm:inter_token_latency_seconds`.
    pub itl: Histogram,
    /// `vllm:e2e_request_latency_seconds`.
    pub e2e: Histogram,
    /// `vllm:request_queue_time_seconds`.
    pub queue_time: Histogram,
    /// `vllm:request_success_total{finished_reason="stop"}`.
    pub finished_stop: IntCounter,
    /// `vllm:request_success_total{finished_reason="length"}`.
    pub finished_length: IntCounter,
    /// `vllm:request_success_total{finished_reason="abort"}`.
    pub finished_abort: IntCounter,
}

/// Handles for one replica: its variant's vLLM gauges and its device's step metrics.
#[derive(Clone, Debug)]
pub struct ReplicaMetrics {
    /// `vllm:cache_config_info`.
    pub pool: Arc<PoolShape>,
    /// `vllm:num_requests_running`.
    pub running: IntGauge,
    /// `vllm:num_requests_waiting`.
    pub waiting: IntGauge,
    /// `vllm:kv_cache_usage_perc`, 0 to 1.
    pub kv_usage: Gauge,
    /// `vllm:prefix_cache_queries_total`, in tokens.
    pub prefix_queries: IntCounter,
    /// `vllm:prefix_cache_hits_total`, in tokens.
    pub prefix_hits: IntCounter,
    /// `pointsman_kv_evicted_blocks_total`.
    pub kv_evicted: IntCounter,
    /// `pointsman_kv_cached_blocks`.
    pub kv_cached: IntGauge,
    /// `pointsman_kv_slack_ratio`: places of held blocks without a token.
    pub kv_slack: Gauge,
    /// `vllm:prompt_tokens_total`.
    pub prompt_tokens: IntCounter,
    /// `vllm:generation_tokens_total`.
    pub generation_tokens: IntCounter,
    /// `vllm:spec_decode_num_draft_tokens_total`.
    pub draft_tokens: IntCounter,
    /// `vllm:spec_decode_num_accepted_tokens_total`.
    pub accepted_tokens: IntCounter,
    /// Of its drafts, by method.
    pub drafts: DraftMetrics,
    /// `vllm:num_preemptions_total`.
    pub preemptions: IntCounter,
    /// `pointsman_step_seconds{phase="schedule"}`: the host's and the policy's part of a step.
    pub step_schedule: Histogram,
    /// `pointsman_step_seconds{phase="launch"}`: handing a plan to a device that computes on its own.
    pub step_launch: Histogram,
    /// `pointsman_step_seconds{phase="execute"}`: from its plan, or from the end of the step before it, to its end.
    pub step_execute: Histogram,
    /// `pointsman_step_seconds{phase="complete"}`: handing its tokens on.
    pub step_complete: Histogram,
    /// `pointsman_step_host_seconds`: schedule, launch and complete of one step.
    pub step_host: Histogram,
    /// `pointsman_step_fill_ratio`: tokens computed over the step budget.
    pub step_fill: Gauge,
    /// `pointsman_steps_ahead_total`.
    pub steps_ahead: IntCounter,
    /// `pointsman_tokens_total{phase="prefill"}`.
    pub tokens_prefill: IntCounter,
    /// `pointsman_tokens_total{phase="decode"}`.
    pub tokens_decode: IntCounter,
}

/// `vllm:cache_config_info` of one replica, whose labels say what its pool has.
#[derive(Debug)]
pub struct PoolShape {
    family: IntGaugeVec,
    /// Of device, model and tokens in a block.
    labels: [String; 3],
    shown: AtomicU32,
}

impl PoolShape {
    /// The pool has this many blocks, and no other number any more.
    pub fn show(&self, n_blocks: u32) {
        let before = self.shown.swap(n_blocks, Ordering::Relaxed);
        if before == n_blocks {
            return;
        }
        let [device, model_name, block_tokens] = self.labels.each_ref().map(String::as_str);
        let series = |n_blocks: u32| [device, model_name, block_tokens, &n_blocks.to_string()].map(str::to_owned);
        let _ = self.family.remove_label_values(&series(before));
        self.family.with_label_values(&series(n_blocks)).set(1);
    }
}

/// Handles for the drafts of one replica, by how they are found.
#[derive(Clone, Debug)]
pub struct DraftMetrics {
    /// `pointsman_draft_tokens_total{method="ngram",kind="proposed"}`.
    pub ngram_proposed: IntCounter,
    /// ... and `kind="accepted"`.
    pub ngram_accepted: IntCounter,
    /// `pointsman_draft_tokens_total{method="draft_model",kind="proposed"}`.
    pub model_proposed: IntCounter,
    /// ... and `kind="accepted"`.
    pub model_accepted: IntCounter,
    /// `pointsman_draft_no_room_total`.
    pub no_room: IntCounter,
    /// `pointsman_tokens_total{phase="draft"}`: computed by the draft model.
    pub tokens: IntCounter,
    /// `pointsman_step_seconds{phase="draft"}`.
    pub step: Histogram,
}

/// Handles for one model that makes embeddings.
#[derive(Clone, Debug)]
pub struct EncoderMetrics {
    /// `vllm:num_requests_running`.
    pub running: IntGauge,
    /// `vllm:num_requests_waiting`.
    pub waiting: IntGauge,
    /// `vllm:prompt_tokens_total`.
    pub prompt_tokens: IntCounter,
    /// `pointsman_step_seconds{phase="embed"}`: one batch.
    pub step: Histogram,
    /// `pointsman_tokens_total{phase="embed"}`.
    pub tokens: IntCounter,
}

/// Handles for one tenant.
#[derive(Clone, Debug)]
pub struct TenantMetrics {
    /// `pointsman_tenant_requests_total`.
    pub requests: IntCounter,
    /// `pointsman_tenant_tokens_total{kind="prompt"}`, those found in the prefix cache included.
    pub prompt_tokens: IntCounter,
    /// `pointsman_tenant_tokens_total{kind="cached"}`: prompt tokens found in the prefix cache.
    pub cached_tokens: IntCounter,
    /// `pointsman_tenant_tokens_total{kind="completion"}`.
    pub completion_tokens: IntCounter,
}

/// Handles for the connections of one plane.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// `pointsman_connections`.
    pub open: IntGauge,
    /// `pointsman_connections_evicted_total`.
    pub evicted: IntCounter,
}

/// Handles of the response cache.
#[derive(Clone, Debug)]
pub struct CacheMetrics {
    /// `pointsman_response_cache_requests_total{outcome="hit"}`.
    pub hits: IntCounter,
    /// `pointsman_response_cache_requests_total{outcome="miss"}`.
    pub misses: IntCounter,
    /// `pointsman_response_cache_requests_total{outcome="joined"}`.
    pub joined: IntCounter,
    /// `pointsman_response_cache_requests_total{outcome="bypass"}`.
    pub bypassed: IntCounter,
    /// `pointsman_response_cache_stale_total`.
    pub stale: IntCounter,
    /// `pointsman_response_cache_evicted_total`.
    pub evicted: IntCounter,
    /// `pointsman_response_cache_entries`.
    pub entries: IntGauge,
    /// `pointsman_response_cache_bytes`.
    pub bytes: IntGauge,
}

/// Handles for one revision in one slot.
#[derive(Clone, Debug)]
pub struct SlotMetrics {
    /// `pointsman_policy_call_seconds`.
    pub call: Histogram,
    /// `pointsman_policy_fallbacks_total`: decisions that the native policy took instead.
    pub fallbacks: IntCounter,
    /// `pointsman_policy_late_plans_total`: plans that were computed aside and used one step late.
    pub late_plans: IntCounter,
    /// `pointsman_policy_handovers_total{outcome="restored"}`: instances that were handed what another one knew.
    pub handed_over: IntCounter,
    /// `pointsman_policy_handovers_total{outcome="cold"}`: instances that could have been, and were not.
    pub started_cold: IntCounter,
    /// `pointsman_policy_faults_total`, by kind: timeout, trap, memory, bad-answer, link.
    pub faults: [IntCounter; 5],
}

/// Kind of a metric that a guest registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginMetricKind {
    /// Only grows; negative additions are ignored.
    Counter,
    /// Holds the last value.
    Gauge,
    /// Counts observations by bucket.
    Histogram,
}

/// What a guest asks for when it registers a metric.
#[derive(Clone, Copy, Debug)]
pub struct PluginMetricSpec<'a> {
    /// `[a-z0-9_]{1,60}`; exposed as `pointsman_plugin_<name>`.
    pub name: &'a str,
    /// Shown as the family's help text.
    pub help: &'a str,
    /// Counter, gauge or histogram.
    pub kind: PluginMetricKind,
    /// At most one label of the guest's own.
    pub label: Option<&'a str>,
    /// Ascending upper bounds of a histogram, 1 to 64 of them; ignored otherwise.
    pub buckets: &'a [f64],
}

/// A guest's metric, resolved for its slot and revision.
#[derive(Clone, Debug)]
pub struct PluginMetric {
    family: PluginFamily,
    name: String,
    /// Slot and revision.
    owner: (String, String),
    labelled: bool,
}

#[derive(Clone, Debug)]
enum PluginFamily {
    Counter(CounterVec),
    Gauge(GaugeVec),
    Histogram(HistogramVec),
}

#[derive(Debug, Default)]
struct PluginFamilies {
    by_name: BTreeMap<String, (PluginMetricKind, Option<String>, PluginFamily)>,
    /// Series written so far, so that a retired revision's can be removed.
    series: BTreeMap<(String, String), SeriesOfRevision>,
}

/// By family name, the values of the guest's own label (`None` where it has none).
type SeriesOfRevision = BTreeMap<String, BTreeSet<Option<String>>>;

/// Most families that guests may create in the life of a host; the next ones are refused.
const MAX_PLUGIN_FAMILIES: usize = 1_024;
/// Most series of one revision, all its families together; the next label values share `other`.
const MAX_SERIES: usize = 2_000;
/// Bytes of a label value that are kept.
const MAX_LABEL_BYTES: usize = 128;
/// Most values of a guest's own label in one family and revision; the next ones share `other`.
const MAX_LABEL_VALUES: usize = 1_000;

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The beginning of a label value, cut between letters.
fn shortened(label: &str) -> &str {
    let cut = (0..=MAX_LABEL_BYTES.min(label.len())).rev().find(|at| label.is_char_boundary(*at));
    &label[..cut.unwrap_or(0)]
}

/// A family that is registered at once; a name clash is a bug in the list below, found by the first test that runs.
pub(crate) fn registered<C: Collector + Clone + 'static>(registry: &Registry, family: prometheus::Result<C>) -> C {
    let family = family.unwrap_or_else(|error| unreachable!("metric options are constants: {error}"));
    registry
        .register(Box::new(family.clone()))
        .unwrap_or_else(|error| unreachable!("metric names are unique: {error}"));
    family
}

impl CacheMetrics {
    fn new(registry: &Registry) -> Self {
        let name = "pointsman_response_cache_requests_total";
        let help = "Requests by how the response cache served them.";
        let requests = registered(registry, IntCounterVec::new(Opts::new(name, help), &["outcome"]));
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help));
        Self {
            hits: requests.with_label_values(&["hit"]),
            misses: requests.with_label_values(&["miss"]),
            joined: requests.with_label_values(&["joined"]),
            bypassed: requests.with_label_values(&["bypass"]),
            stale: counter("pointsman_response_cache_stale_total", "Misses that found an answer past its time."),
            evicted: counter("pointsman_response_cache_evicted_total", "Answers given up for room."),
            entries: gauge("pointsman_response_cache_entries", "Answers in the response cache."),
            bytes: gauge("pointsman_response_cache_bytes", "Memory of the answers in the response cache."),
        }
    }
}

impl Metrics {
    /// Creates and registers every family.
    #[must_use]
    #[expect(clippy::too_many_lines, reason = "one line per metric family; a split would hide the list")]
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let ratio = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, GaugeVec::new(Opts::new(name, help), labels))
        };
        let histogram = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| {
            registered(&registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
        };
        let model = &["model_name"][..];
        // As vLLM tells its engines apart: a model may have one on every device.
        let engine = &["engine", "model_name"][..];
        Self {
            running: gauge("vllm:num_requests_running", "Requests in the running batch.", engine),
            waiting: gauge("vllm:num_requests_waiting", "Requests accepted and not yet running.", engine),
            kv_usage: ratio("vllm:kv_cache_usage_perc", "Used share of the KV blocks; 1 is full.", engine),
            prefix_queries: counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
                model,
            ),
            prefix_hits: counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", model),
            kv_evicted: counter(
                "pointsman_kv_evicted_blocks_total",
                "Cached KV blocks that were given up for room.",
                model,
            ),
            kv_cached: gauge("pointsman_kv_cached_blocks", "KV blocks that are free and hold a prefix.", engine),
            kv_slack: ratio("pointsman_kv_slack_ratio", "Places of held KV blocks without a token, 0 to 1.", engine),
            prompt_tokens: counter("vllm:prompt_tokens_total", "Prompt tokens computed.", model),
            generation_tokens: counter("vllm:generation_tokens_total", "Tokens generated.", model),
            draft_tokens: counter(
                "vllm:spec_decode_num_draft_tokens_total",
                "Draft tokens that steps looked at.",
                model,
            ),
            accepted_tokens: counter(
                "vllm:spec_decode_num_accepted_tokens_total",
                "Draft tokens that came true.",
                model,
            ),
            drafts: counter(
                "pointsman_draft_tokens_total",
                "Draft tokens that steps looked at (proposed) and that came true (accepted), by how they were found.",
                &["variant", "method", "kind"],
            ),
            drafts_no_room: counter(
                "pointsman_draft_no_room_total",
                "Times that a text had no room in the draft model's KV pool.",
                &["variant"],
            ),
            preemptions: counter(
                "vllm:num_preemptions_total",
                "Requests put back in the queue to be recomputed.",
                model,
            ),
            success: counter(
                "vllm:request_success_total",
                "Requests ended, by reason.",
                &["model_name", "finished_reason"],
            ),
            ttft: histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", model, TTFT_SECONDS),
            ttft_predicted: histogram(
                "pointsman_ttft_predicted_seconds",
                "Arrival to first token, as predicted when the request was routed.",
                model,
                TTFT_SECONDS,
            ),
            ttft_error: histogram(
                "pointsman_ttft_prediction_error_seconds",
                "Between the predicted and the actual first token, either way.",
                model,
                TTFT_SECONDS,
            ),
            itl: histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", model, ITL_SECONDS),
            e2e: histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", model, E2E_SECONDS),
            queue_time: histogram(
                "vllm:request_queue_time_seconds",
                "Arrival to first scheduled.",
                model,
                TTFT_SECONDS,
            ),
            cache_config: gauge(
                "vllm:cache_config_info",
                "Shape of the KV cache; the value is 1.",
                &["engine", "model_name", "block_size", "num_gpu_blocks"],
            ),
            policy_call: histogram(
                "pointsman_policy_call_seconds",
                "Duration of one policy call.",
                &["slot", "revision"],
                CALL_SECONDS,
            ),
            policy_faults: counter(
                "pointsman_policy_faults_total",
                "Guest faults, by kind.",
                &["slot", "revision", "kind"],
            ),
            policy_fallbacks: counter(
                "pointsman_policy_fallbacks_total",
                "Decisions taken by the native policy in place of the slot's.",
                &["slot"],
            ),
            policy_late_plans: counter(
                "pointsman_policy_late_plans_total",
                "Plans of a scheduler over its soft budget, computed aside and used a step late.",
                &["slot"],
            ),
            policy_handovers: counter(
                "pointsman_policy_handovers_total",
                "Instances that took the place of another one, with what it knew or cold.",
                &["slot", "outcome"],
            ),
            policy_generation: gauge("pointsman_policy_generation", "Generation active in the slot.", &["slot"]),
            policy_missing: gauge(
                "pointsman_policy_missing",
                "1 for a slot whose policy could not be brought back at the start, with who decides instead.",
                &["slot", "instead"],
            ),
            swap: histogram(
                "pointsman_swap_seconds",
                "Publishing a generation: the pointer swap alone.",
                &["slot"],
                SWAP_SECONDS,
            ),
            step: histogram("pointsman_step_seconds", "Parts of an engine step.", &["device", "phase"], STEP_SECONDS),
            step_host: histogram(
                "pointsman_step_host_seconds",
                "What the host itself takes for a step: planning it, launching it and handing its tokens on.",
                &["device"],
                HOST_SECONDS,
            ),
            step_fill: ratio(
                "pointsman_step_fill_ratio",
                "Tokens computed in the last step over the step budget.",
                &["device"],
            ),
            steps_ahead: counter(
                "pointsman_steps_ahead_total",
                "Steps that were planned while the step before them computed.",
                &["device"],
            ),
            tokens: counter("pointsman_tokens_total", "Tokens computed.", &["device", "variant", "phase"]),
            rejected: counter("pointsman_rejected_total", "Requests refused, by reason.", &["reason"]),
            cancelled: counter(
                "pointsman_cancelled_total",
                "Requests cancelled, by the stage they were in.",
                &["stage"],
            ),
            tenant_requests: counter("pointsman_tenant_requests_total", "Requests served, by tenant.", &["tenant"]),
            tenant_tokens: counter(
                "pointsman_tenant_tokens_total",
                "Tokens of the requests served, by tenant; cached ones are prompt tokens too.",
                &["tenant", "kind"],
            ),
            alerts: counter("pointsman_alerts_total", "Alerts raised.", &["severity", "source"]),
            batches: gauge("pointsman_batches", "Batches that are kept, by status.", &["status"]),
            batch_lines: counter(
                "pointsman_batch_lines_total",
                "Lines of batches, by what they came to.",
                &["outcome"],
            ),
            devices: DeviceFamilies::new(&registry),
            tls_reloads: {
                let name = "pointsman_tls_reloads_total";
                let reloads =
                    counter(name, "Certificates read again, by plane and by what came of it.", &["plane", "outcome"]);
                // There from the start, so that the first is an increase for who watches.
                for plane in ["data", "admin", "upstreams"] {
                    let _ = reloads.with_label_values(&[plane, "kept_old"]);
                }
                reloads
            },
            tls_until: gauge(
                "pointsman_tls_not_after_timestamp_seconds",
                "Earliest end of a certificate in a plane's chain, in Unix time.",
                &["plane"],
            ),
            tls_failures: counter(
                "pointsman_tls_failures_total",
                "Connections that ended in their TLS handshake, by why.",
                &["reason"],
            ),
            connections: gauge("pointsman_connections", "Open connections, by plane.", &["plane"]),
            connections_evicted: counter(
                "pointsman_connections_evicted_total",
                "Connections closed for new ones: all places were taken, and these had waited longest for a request.",
                &["plane"],
            ),
            safe_mode: registered(
                &registry,
                IntGauge::new("pointsman_safe_mode", "1 while the native policy decides in every slot by one switch."),
            ),
            events_dropped: registered(
                &registry,
                IntCounter::new("pointsman_events_dropped_total", "Events lost to the bound of the ring."),
            ),
            cache: CacheMetrics::new(&registry),
            models: ModelMetrics::new(&registry),
            forms: FormMetrics::new(&registry),
            arms: ArmFamilies::new(&registry),
            upstreams: UpstreamFamilies::new(&registry),
            plugin: Mutex::default(),
            registry,
        }
    }

    /// Whether the native policy decides in every slot by one switch.
    pub fn safe_mode(&self, on: bool) {
        self.safe_mode.set(on.into());
    }

    /// Handles of the compiled forms that are kept.
    #[must_use]
    pub fn forms(&self) -> FormMetrics {
        self.forms.clone()
    }

    /// Handles of the response cache.
    #[must_use]
    pub fn response_cache(&self) -> CacheMetrics {
        self.cache.clone()
    }

    /// Handles of the models that come and go.
    #[must_use]
    pub fn models(&self) -> &ModelMetrics {
        &self.models
    }

    /// Handles of one upstream.
    #[must_use]
    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        self.upstreams.of(name)
    }

    /// The certificate of a plane was read again; whether it is used.
    pub fn tls_reload(&self, plane: &str, is_used: bool) {
        self.tls_reloads.with_label_values(&[plane, if is_used { "used" } else { "kept_old" }]).inc();
    }

    /// The earliest end of a certificate in the chain of a plane, in Unix seconds; none where it does not say so.
    pub fn tls_until(&self, plane: &str, until_s: Option<u64>) {
        match until_s {
            Some(until_s) => self.tls_until.with_label_values(&[plane]).set(until_s.cast_signed()),
            // One that was never written is not there either.
            None => {
                let _ = self.tls_until.remove_label_values(&[plane]);
            }
        }
    }

    /// Shows these devices by name, and no others; what is not said of one is shown no more. For one caller at a time.
    pub fn devices<'a>(&self, devices: impl IntoIterator<Item = (&'a str, DeviceFigures)>) {
        self.devices.show(devices);
    }

    /// A connection ended in its handshake.
    pub fn tls_failure(&self, reason: &str) {
        self.tls_failures.with_label_values(&[reason]).inc();
    }

    /// Handles for the connections of a plane.
    #[must_use]
    pub fn connections(&self, plane: &str) -> ConnectionMetrics {
        ConnectionMetrics {
            open: self.connections.with_label_values(&[plane]),
            evicted: self.connections_evicted.with_label_values(&[plane]),
        }
    }

    /// So many batches have this status.
    pub fn batches(&self, status: &str, n: usize) {
        self.batches.with_label_values(&[status]).set(i64::try_from(n).unwrap_or(i64::MAX));
    }

    /// So many lines of batches were answered, and so many told why not.
    pub fn batch_lines(&self, completed: u32, failed: u32) {
        for (outcome, n) in [("completed", completed), ("failed", failed)] {
            self.batch_lines.with_label_values(&[outcome]).inc_by(n.into());
        }
    }

    /// Handles for the requests of one variant.
    #[must_use]
    pub fn request(&self, model_name: &str) -> RequestMetrics {
        let m = &[model_name];
        RequestMetrics {
            ttft: self.ttft.with_label_values(m),
            ttft_predicted: self.ttft_predicted.with_label_values(m),
            ttft_error: self.ttft_error.with_label_values(m),
            itl: self.itl.with_label_values(m),
            e2e: self.e2e.with_label_values(m),
            queue_time: self.queue_time.with_label_values(m),
            finished_stop: self.success.with_label_values(&[model_name, "stop"]),
            finished_length: self.success.with_label_values(&[model_name, "length"]),
            finished_abort: self.success.with_label_values(&[model_name, "abort"]),
        }
    }

    /// Handles for one replica: a variant on a device. Also publishes `vllm:cache_config_info`.
    #[must_use]
    pub fn replica(&self, model_name: &str, device: &str, block_tokens: u32, total_blocks: u32) -> ReplicaMetrics {
        let (m, engine) = (&[model_name], &[device, model_name]);
        let labels = [device, model_name, &block_tokens.to_string()].map(str::to_owned);
        let pool = PoolShape { family: self.cache_config.clone(), labels, shown: AtomicU32::new(0) };
        pool.show(total_blocks);
        ReplicaMetrics {
            pool: Arc::new(pool),
            running: self.running.with_label_values(engine),
            waiting: self.waiting.with_label_values(engine),
            kv_usage: self.kv_usage.with_label_values(engine),
            prefix_queries: self.prefix_queries.with_label_values(m),
            prefix_hits: self.prefix_hits.with_label_values(m),
            kv_evicted: self.kv_evicted.with_label_values(m),
            kv_cached: self.kv_cached.with_label_values(engine),
            kv_slack: self.kv_slack.with_label_values(engine),
            prompt_tokens: self.prompt_tokens.with_label_values(m),
            generation_tokens: self.generation_tokens.with_label_values(m),
            draft_tokens: self.draft_tokens.with_label_values(m),
            accepted_tokens: self.accepted_tokens.with_label_values(m),
            drafts: self.drafts(model_name, device),
            preemptions: self.preemptions.with_label_values(m),
            step_schedule: self.step.with_label_values(&[device, "schedule"]),
            step_launch: self.step.with_label_values(&[device, "launch"]),
            step_execute: self.step.with_label_values(&[device, "execute"]),
            step_complete: self.step.with_label_values(&[device, "complete"]),
            step_host: self.step_host.with_label_values(&[device]),
            step_fill: self.step_fill.with_label_values(&[device]),
            steps_ahead: self.steps_ahead.with_label_values(&[device]),
            tokens_prefill: self.tokens.with_label_values(&[device, model_name, "prefill"]),
            tokens_decode: self.tokens.with_label_values(&[device, model_name, "decode"]),
        }
    }

    fn drafts(&self, model_name: &str, device: &str) -> DraftMetrics {
        let tokens = |method, kind| self.drafts.with_label_values(&[model_name, method, kind]);
        DraftMetrics {
            ngram_proposed: tokens("ngram", "proposed"),
            ngram_accepted: tokens("ngram", "accepted"),
            model_proposed: tokens("draft_model", "proposed"),
            model_accepted: tokens("draft_model", "accepted"),
            no_room: self.drafts_no_room.with_label_values(&[model_name]),
            tokens: self.tokens.with_label_values(&[device, model_name, "draft"]),
            step: self.step.with_label_values(&[device, "draft"]),
        }
    }

    /// Handles for a model that makes embeddings, on a device.
    #[must_use]
    pub fn encoder(&self, model_name: &str, device: &str) -> EncoderMetrics {
        let engine = &[device, model_name];
        EncoderMetrics {
            running: self.running.with_label_values(engine),
            waiting: self.waiting.with_label_values(engine),
            prompt_tokens: self.prompt_tokens.with_label_values(&[model_name]),
            step: self.step.with_label_values(&[device, "embed"]),
            tokens: self.tokens.with_label_values(&[device, model_name, "embed"]),
        }
    }

    /// Removes every series of a variant whose replica has gone: those of [`Metrics::replica`] with the same arguments, and those
    /// of its requests. Series of the device itself stay.
    pub fn forget_replica(&self, model_name: &str, device: &str, block_tokens: u32, total_blocks: u32) {
        self.forget_gauges(model_name, device, block_tokens, total_blocks);
        let m = &[model_name];
        for counter in [
            &self.prefix_queries,
            &self.prefix_hits,
            &self.kv_evicted,
            &self.prompt_tokens,
            &self.generation_tokens,
            &self.draft_tokens,
            &self.accepted_tokens,
            &self.drafts_no_room,
            &self.preemptions,
        ] {
            let _ = counter.remove_label_values(m);
        }
        let histograms = [&self.ttft, &self.ttft_predicted, &self.ttft_error, &self.itl, &self.e2e, &self.queue_time];
        for histogram in histograms {
            let _ = histogram.remove_label_values(m);
        }
        for reason in ["stop", "length", "abort"] {
            let _ = self.success.remove_label_values(&[model_name, reason]);
        }
        for (method, kind) in ["ngram", "draft_model"].iter().flat_map(|m| [(m, "proposed"), (m, "accepted")]) {
            let _ = self.drafts.remove_label_values(&[model_name, method, kind]);
        }
        for phase in ["prefill", "decode", "draft", "embed"] {
            let _ = self.tokens.remove_label_values(&[device, model_name, phase]);
        }
    }

    /// Removes what says how a replica is now. What it has counted stays, as for one that comes back.
    pub fn forget_gauges(&self, model_name: &str, device: &str, block_tokens: u32, total_blocks: u32) {
        let engine = &[device, model_name];
        // Removing a series that was never written is not an error worth telling.
        for gauge in [&self.running, &self.waiting, &self.kv_cached] {
            let _ = gauge.remove_label_values(engine);
        }
        for ratio in [&self.kv_usage, &self.kv_slack] {
            let _ = ratio.remove_label_values(engine);
        }
        let shape = [device, model_name, &block_tokens.to_string(), &total_blocks.to_string()];
        let _ = self.cache_config.remove_label_values(&shape);
    }

    /// Handles for a tenant; whoever asks bounds how many there are.
    #[must_use]
    pub fn tenant(&self, tenant: &str) -> TenantMetrics {
        let tokens = |kind| self.tenant_tokens.with_label_values(&[tenant, kind]);
        TenantMetrics {
            requests: self.tenant_requests.with_label_values(&[tenant]),
            prompt_tokens: tokens("prompt"),
            cached_tokens: tokens("cached"),
            completion_tokens: tokens("completion"),
        }
    }

    /// Handles for a revision in a slot.
    #[must_use]
    pub fn slot(&self, slot: &str, revision: &str) -> SlotMetrics {
        let fault = |kind| self.policy_faults.with_label_values(&[slot, revision, kind]);
        SlotMetrics {
            call: self.policy_call.with_label_values(&[slot, revision]),
            fallbacks: self.policy_fallbacks.with_label_values(&[slot]),
            late_plans: self.policy_late_plans.with_label_values(&[slot]),
            handed_over: self.policy_handovers.with_label_values(&[slot, "restored"]),
            started_cold: self.policy_handovers.with_label_values(&[slot, "cold"]),
            faults: ["timeout", "trap", "memory", "bad-answer", "link"].map(fault),
        }
    }

    /// Records that a slot published `generation`; the swap itself took `seconds`.
    pub fn published(&self, slot: &str, generation: u64, seconds: f64) {
        self.policy_generation.with_label_values(&[slot]).set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.swap.with_label_values(&[slot]).observe(seconds);
    }

    /// Who decides in the place of a policy that could not be brought back: `native`, `nobody`; `None` once something is
    /// published.
    pub fn missing(&self, slot: &str, instead: Option<&str>) {
        for word in ["native", "nobody"] {
            let _ = self.policy_missing.remove_label_values(&[slot, word]);
        }
        if let Some(instead) = instead {
            self.policy_missing.with_label_values(&[slot, instead]).set(1);
        }
    }

    /// Removes every series of a revision that is neither active, previous nor candidate in the slot.
    pub fn forget_revision(&self, slot: &str, revision: &str) {
        let labels = &[slot, revision];
        // Removing a series that was never written is not an error worth telling.
        let _ = self.policy_call.remove_label_values(labels);
        for kind in ["timeout", "trap", "memory", "bad-answer", "link"] {
            let _ = self.policy_faults.remove_label_values(&[slot, revision, kind]);
        }
        let mut plugin = self.plugin.lock().unwrap_or_else(PoisonError::into_inner);
        let series = plugin.series.remove(&(slot.to_owned(), revision.to_owned())).unwrap_or_default();
        for (name, labels) in series {
            let Some((_, _, family)) = plugin.by_name.get(&name) else { continue };
            for label in labels {
                family.remove(slot, revision, label.as_deref());
            }
        }
    }

    /// Removes the series of a slot that is gone. Its revisions go by [`Metrics::forget_revision`].
    pub fn forget_slot(&self, slot: &str) {
        let _ = self.policy_fallbacks.remove_label_values(&[slot]);
        let _ = self.policy_late_plans.remove_label_values(&[slot]);
        for outcome in ["restored", "cold"] {
            let _ = self.policy_handovers.remove_label_values(&[slot, outcome]);
        }
        let _ = self.policy_generation.remove_label_values(&[slot]);
        let _ = self.swap.remove_label_values(&[slot]);
    }

    /// Handles for an arm (`control`, `candidate`) of the rollout in a slot.
    #[must_use]
    pub fn arm(&self, slot: &str, arm: &str) -> ArmMetrics {
        self.arms.arm(slot, arm)
    }

    /// Removes the series of an arm: its rollout is over.
    pub fn forget_arm(&self, slot: &str, arm: &str) {
        self.arms.forget(slot, arm);
    }

    /// `pointsman_shadow_decisions_total`: decisions put to the shadow in a slot whose answers came to this.
    #[must_use]
    pub fn shadow(&self, slot: &str, outcome: &str) -> IntCounter {
        self.arms.shadow(slot, outcome)
    }

    /// Removes the series of an outcome: the shadow's rollout is over.
    pub fn forget_shadow(&self, slot: &str, outcome: &str) {
        self.arms.forget_shadow(slot, outcome);
    }

    /// Counts a refused request: `queue`, `kv`, `quota`, `deadline` or `policy`.
    pub fn rejected(&self, reason: &str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    /// Counts a cancelled request by its stage: `queued`, `prefilling`, `decoding`.
    pub fn cancelled(&self, stage: &str) {
        self.cancelled.with_label_values(&[stage]).inc();
    }

    /// Counts an alert.
    pub fn alert(&self, severity: &str, source: &str) {
        self.alerts.with_label_values(&[severity, source]).inc();
    }

    /// Counts events that the ring lost.
    pub fn events_dropped(&self, n: u64) {
        self.events_dropped.inc_by(n);
    }

    /// Registers (or finds) a guest's metric for a slot and revision. `None`: the name or label is not
    /// `[a-z0-9_]{1,60}`, the name exists with another kind or label, the buckets do not ascend, or the host has no room.
    #[must_use]
    pub fn plugin(&self, slot: &str, revision: &str, spec: &PluginMetricSpec<'_>) -> Option<PluginMetric> {
        let good_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let good = |s: &str| (1..=60).contains(&s.len()) && s.bytes().all(good_byte);
        if !good(spec.name) || !spec.label.is_none_or(|l| good(l) && !matches!(l, "slot" | "revision" | "le")) {
            return None;
        }
        let mut plugin = self.plugin.lock().unwrap_or_else(PoisonError::into_inner);
        let family = match plugin.by_name.get(spec.name) {
            Some((kind, label, family)) if *kind == spec.kind && label.as_deref() == spec.label => family.clone(),
            Some(_) => return None,
            None if plugin.by_name.len() >= MAX_PLUGIN_FAMILIES => return None,
            None => {
                let family = PluginFamily::register(&self.registry, spec)?;
                let entry = (spec.kind, spec.label.map(str::to_owned), family.clone());
                plugin.by_name.insert(spec.name.to_owned(), entry);
                family
            }
        };
        Some(PluginMetric {
            family,
            name: spec.name.to_owned(),
            owner: (slot.to_owned(), revision.to_owned()),
            labelled: spec.label.is_some(),
        })
    }

    /// Records a value into a guest's metric. `label` is ignored where the metric has none and empty where it is absent;
    /// past 1,000 values of it the rest share `other`. A value that is not finite is ignored.
    pub fn record_plugin(&self, metric: &PluginMetric, value: f64, label: Option<&str>) {
        if !value.is_finite() {
            return;
        }
        let mut label = metric.labelled.then(|| shortened(label.unwrap_or_default()).to_owned());
        let mut plugin = self.plugin.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = plugin.series.get(&metric.owner).and_then(|of_revision| of_revision.get(&metric.name));
        if !labels.is_some_and(|labels| labels.contains(&label)) {
            let of_revision = plugin.series.entry(metric.owner.clone()).or_default();
            let n_series: usize = of_revision.values().map(BTreeSet::len).sum();
            let labels = of_revision.entry(metric.name.clone()).or_default();
            if labels.len() >= MAX_LABEL_VALUES || n_series >= MAX_SERIES {
                label = label.map(|_| "other".to_owned());
            }
            labels.insert(label.clone());
        }
        drop(plugin);
        let (slot, revision) = &metric.owner;
        metric.family.record(slot, revision, label.as_deref(), value);
    }

    /// The text exposition of every family (Prometheus text format 0.0.4).
    #[must_use]
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

// === impl PluginFamily ===

impl PluginFamily {
    fn register(registry: &Registry, spec: &PluginMetricSpec<'_>) -> Option<Self> {
        let name = format!("pointsman_plugin_{}", spec.name);
        let labels: Vec<&str> = ["slot", "revision"].into_iter().chain(spec.label).collect();
        let help = if spec.help.is_empty() { "A policy's own metric." } else { spec.help };
        let family = match spec.kind {
            PluginMetricKind::Counter => Self::Counter(CounterVec::new(Opts::new(name, help), &labels).ok()?),
            PluginMetricKind::Gauge => Self::Gauge(GaugeVec::new(Opts::new(name, help), &labels).ok()?),
            PluginMetricKind::Histogram => {
                let buckets = spec.buckets;
                let ascending = buckets.windows(2).all(|w| w[0] < w[1]) && buckets.iter().all(|b| b.is_finite());
                if buckets.is_empty() || buckets.len() > 64 || !ascending {
                    return None;
                }
                let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
                Self::Histogram(HistogramVec::new(options, &labels).ok()?)
            }
        };
        let collector: Box<dyn Collector> = match &family {
            Self::Counter(f) => Box::new(f.clone()),
            Self::Gauge(f) => Box::new(f.clone()),
            Self::Histogram(f) => Box::new(f.clone()),
        };
        registry.register(collector).ok()?;
        Some(family)
    }

    fn record(&self, slot: &str, revision: &str, label: Option<&str>, value: f64) {
        let labels: Vec<&str> = [slot, revision].into_iter().chain(label).collect();
        match self {
            Self::Counter(f) if value >= 0.0 => f.with_label_values(&labels).inc_by(value),
            Self::Counter(_) => {}
            Self::Gauge(f) => f.with_label_values(&labels).set(value),
            Self::Histogram(f) => f.with_label_values(&labels).observe(value),
        }
    }

    fn remove(&self, slot: &str, revision: &str, label: Option<&str>) {
        let labels: Vec<&str> = [slot, revision].into_iter().chain(label).collect();
        let _ = match self {
            Self::Counter(f) => f.remove_label_values(&labels),
            Self::Gauge(f) => f.remove_label_values(&labels),
            Self::Histogram(f) => f.remove_label_values(&labels),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec<'a>(
        name: &'a str,
        kind: PluginMetricKind,
        label: Option<&'a str>,
        buckets: &'a [f64],
    ) -> PluginMetricSpec<'a> {
        PluginMetricSpec { name, help: "Help.", kind, label, buckets }
    }

    #[test]
    fn series_of_a_retired_revision_disappear() {
        let metrics = Metrics::new();
        for revision in ["a@1+00000000", "b@1+11111111"] {
            metrics.slot("router", revision).call.observe(1e-6);
            let picks = spec("picks", PluginMetricKind::Counter, Some("zone"), &[]);
            let picks = metrics.plugin("router", revision, &picks).expect("a good name");
            metrics.record_plugin(&picks, 1.0, Some("eu"));
        }
        metrics.forget_revision("router", "a@1+00000000");
        let text = metrics.render();
        assert!(!text.contains("a@1+00000000"), "{text}");
        let kept = r#"pointsman_plugin_picks{revision="b@1+11111111",slot="router",zone="eu"} 1"#;
        assert!(text.contains(kept), "{text}");
    }

    #[test]
    fn series_of_a_variant_that_is_gone_disappear() {
        let metrics = Metrics::new();
        for name in ["gone:f16", "kept:f16"] {
            metrics.replica(name, "cpu", 16, 512).tokens_decode.inc();
            metrics.request(name).finished_stop.inc();
        }
        metrics.replica("gone:f16", "cpu", 16, 512).pool.show(500);
        assert!(metrics.render().contains(r#"model_name="gone:f16",num_gpu_blocks="500"} 1"#));
        metrics.forget_replica("gone:f16", "cpu", 16, 500);
        let text = metrics.render();
        assert!(!text.contains("gone:f16"), "{text}");
        assert!(text.contains(r#"pointsman_tokens_total{device="cpu",phase="decode",variant="kept:f16"} 1"#), "{text}");
        assert!(text.contains(r#"pointsman_step_fill_ratio{device="cpu"}"#), "a device's own series stay: {text}");
    }

    #[test]
    fn a_guest_cannot_register_nonsense() {
        let metrics = Metrics::new();
        let kind = PluginMetricKind::Histogram;
        for (name, label, buckets) in [
            ("", None, &[1.0][..]),
            ("Upper", None, &[1.0]),
            ("x", Some("slot"), &[1.0]),
            ("x", None, &[]),
            ("x", None, &[2.0, 1.0]),
            ("x", None, &[f64::NAN]),
        ] {
            let found = metrics.plugin("router", "r@1+0", &spec(name, kind, label, buckets));
            assert!(found.is_none(), "{name:?} {label:?} {buckets:?}");
        }
        assert!(metrics.plugin("router", "r@1+0", &spec("x", kind, None, &[1.0, 2.0])).is_some());
        let other_kind = spec("x", PluginMetricKind::Gauge, None, &[]);
        assert!(metrics.plugin("router", "r@1+0", &other_kind).is_none(), "same name, other kind");
    }

    #[test]
    fn label_values_of_a_guest_are_capped() {
        let metrics = Metrics::new();
        let per_user = spec("x", PluginMetricKind::Counter, Some("user"), &[]);
        let metric = metrics.plugin("router", "r@1+0", &per_user).expect("a good name");
        for i in 0..1_500 {
            metrics.record_plugin(&metric, 1.0, Some(&format!("u{i}")));
        }
        let text = metrics.render();
        assert!(text.contains(r#"user="other"} 500"#));
        assert!(!text.contains(r#"user="u1000"}"#));
        let long = "\u{e9}".repeat(1_000);
        let per_zone = spec("y", PluginMetricKind::Counter, Some("zone"), &[]);
        let metric = metrics.plugin("router", "r@1+0", &per_zone).expect("a good name");
        metrics.record_plugin(&metric, 1.0, Some(&long));
        assert!(metrics.render().contains(&format!("zone=\"{}\"}} 1", "\u{e9}".repeat(64))), "128 bytes are kept");
    }

    #[test]
    fn a_replica_that_is_gone_takes_its_own_gauges_along() {
        let metrics = Metrics::new();
        for device in ["cpu", "cuda:0"] {
            let replica = metrics.replica("m:f16", device, 16, 512);
            replica.running.set(1);
            replica.prompt_tokens.inc();
        }
        metrics.forget_gauges("m:f16", "cpu", 16, 512);
        let text = metrics.render();
        assert!(!text.contains(r#"engine="cpu""#), "{text}");
        for line in [
            r#"vllm:num_requests_running{engine="cuda:0",model_name="m:f16"} 1"#,
            r#"vllm:cache_config_info{block_size="16",engine="cuda:0",model_name="m:f16",num_gpu_blocks="512"} 1"#,
            r#"vllm:prompt_tokens_total{model_name="m:f16"} 2"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn vllm_names_are_exposed_as_they_are() {
        let metrics = Metrics::new();
        metrics.request("demo:f16").ttft.observe(0.015);
        for (device, usage) in [("cpu", 0.25), ("cuda:0", 0.5)] {
            metrics.replica("demo:f16", device, 16, 512).kv_usage.set(usage);
        }
        let text = metrics.render();
        for line in [
            r#"vllm:time_to_first_token_seconds_count{model_name="demo:f16"} 1"#,
            r#"vllm:kv_cache_usage_perc{engine="cpu",model_name="demo:f16"} 0.25"#,
            r#"vllm:kv_cache_usage_perc{engine="cuda:0",model_name="demo:f16"} 0.5"#,
            r#"vllm:cache_config_info{block_size="16",engine="cpu",model_name="demo:f16",num_gpu_blocks="512"} 1"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
