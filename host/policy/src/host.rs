//! What a guest may ask of the host while it runs: log, record metrics, keep state; and what the host watches meanwhile:
//! memory and time. One [`Host`] is the data of one store.
//!
//! Everything is bounded and nothing blocks for longer than a map operation, because a guest calls from a request's thread
//! or from the driver's.

use std::sync::{Arc, Mutex, PoisonError};

use pointsman_telemetry::{Metrics, Micros, PluginMetric, PluginMetricKind, PluginMetricSpec};
use wasmtime::component::{HasSelf, Linker};
use wasmtime::{Engine, ResourceLimiter};

use crate::bindings::router::Router;
use crate::bindings::router::pointsman::policy::{host_log, host_metrics, host_state, types};
use crate::engine::{Deadline, TABLE_ELEMENTS};
use crate::fault::truncate;
use crate::state::{StateFault, StateView};

/// Metric handles of one instance.
const MAX_HANDLES: usize = 64;
/// Longest log line of a guest, in bytes.
const MAX_LOG_BYTES: usize = 2_048;
/// Lines that a slot may log at once, and how often it gets one back.
const LOG_BURST: u64 = 50;
const LOG_INTERVAL_US: Micros = 100_000;
/// What a guest gets for a metric that it may not have; recording to it is ignored.
const NO_HANDLE: u32 = u32::MAX;

/// The data of one store.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) deadline: Deadline,
    pub(crate) memory: MemoryMeter,
    /// Time of the current call.
    pub(crate) now: Micros,
    log: Arc<LogGate>,
    metrics: PluginMetrics,
    state: Arc<StateView>,
}

/// Counts and caps memory and tables.
#[derive(Debug)]
pub(crate) struct MemoryMeter {
    limit: usize,
    /// Linear memory now, in bytes.
    pub(crate) bytes: usize,
}

/// A guest asked for more than its cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the policy asked for {wanted} and may have {limit} (bytes of memory, or table entries)")]
pub(crate) struct MemoryLimit {
    pub(crate) wanted: usize,
    pub(crate) limit: usize,
}

/// Lets a slot log a few lines a second, whatever its instances do.
#[derive(Debug)]
pub(crate) struct LogGate {
    slot: Arc<str>,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: u64,
    filled_at: Micros,
    dropped: u64,
}

/// The metrics of one instance.
#[derive(Debug, Default)]
pub(crate) struct PluginMetrics {
    /// Where they go; `None` for an instance that is only probed.
    sink: Option<MetricSink>,
    handles: Vec<Handle>,
    unknown: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct MetricSink {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) slot: Arc<str>,
    pub(crate) revision: Arc<str>,
}

#[derive(Debug)]
struct Handle {
    name: String,
    kind: PluginMetricKind,
    metric: Option<PluginMetric>,
}

/// A linker that offers the three host interfaces and nothing else.
pub(crate) fn linker(engine: &Engine) -> wasmtime::Result<Linker<Host>> {
    let mut linker = Linker::new(engine);
    Router::add_to_linker::<Host, HasSelf<Host>>(&mut linker, |host| host)?;
    Ok(linker)
}

// === impl Host ===

impl Host {
    pub(crate) fn new(
        memory_limit: usize,
        log: Arc<LogGate>,
        sink: Option<MetricSink>,
        state: Arc<StateView>,
        now: Micros,
    ) -> Self {
        Self {
            deadline: Deadline::default(),
            memory: MemoryMeter { limit: memory_limit, bytes: 0 },
            now,
            log,
            metrics: PluginMetrics { sink, ..PluginMetrics::default() },
            state,
        }
    }
}

impl types::Host for Host {}

impl host_log::Host for Host {
    fn log(&mut self, level: host_log::Level, mut message: String) {
        let Some(dropped) = self.log.admit(self.now) else { return };
        truncate(&mut message, MAX_LOG_BYTES);
        let slot = &*self.log.slot;
        if dropped > 0 {
            tracing::warn!(target: "policy", slot, dropped, "log lines of the policy were dropped");
        }
        match level {
            host_log::Level::Debug => tracing::debug!(target: "policy", slot, "{message}"),
            host_log::Level::Info => tracing::info!(target: "policy", slot, "{message}"),
            host_log::Level::Warn => tracing::warn!(target: "policy", slot, "{message}"),
            host_log::Level::Error => tracing::error!(target: "policy", slot, "{message}"),
        }
    }
}

impl host_metrics::Host for Host {
    fn counter(&mut self, name: String, help: String, label: Option<String>) -> u32 {
        let (label, kind) = (label.as_deref(), PluginMetricKind::Counter);
        self.metrics.register(&PluginMetricSpec { name: &name, help: &help, kind, label, buckets: &[] })
    }

    fn gauge(&mut self, name: String, help: String, label: Option<String>) -> u32 {
        let (label, kind) = (label.as_deref(), PluginMetricKind::Gauge);
        self.metrics.register(&PluginMetricSpec { name: &name, help: &help, kind, label, buckets: &[] })
    }

    fn histogram(&mut self, name: String, help: String, label: Option<String>, buckets: Vec<f64>) -> u32 {
        let (label, kind) = (label.as_deref(), PluginMetricKind::Histogram);
        self.metrics.register(&PluginMetricSpec { name: &name, help: &help, kind, label, buckets: &buckets })
    }

    fn record_value(&mut self, handle: u32, value: f64, label_value: Option<String>) {
        self.metrics.record(handle, value, label_value.as_deref());
    }
}

impl host_state::Host for Host {
    fn get(&mut self, key: String) -> Option<Vec<u8>> {
        self.state.get(&key)
    }

    fn set(&mut self, key: String, value: Vec<u8>) -> Result<(), host_state::Fault> {
        self.state.set(key, value).map_err(host_state::Fault::from)
    }

    fn compare_and_set(
        &mut self,
        key: String,
        expected: Option<Vec<u8>>,
        value: Vec<u8>,
    ) -> Result<bool, host_state::Fault> {
        self.state.compare_and_set(key, expected.as_deref(), value).map_err(host_state::Fault::from)
    }

    fn delete(&mut self, key: String) {
        self.state.delete(&key);
    }
}

impl From<StateFault> for host_state::Fault {
    fn from(fault: StateFault) -> Self {
        match fault {
            StateFault::Full => Self::Full,
            StateFault::TooLarge => Self::TooLarge,
        }
    }
}

// === impl MemoryMeter ===

impl ResourceLimiter for MemoryMeter {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let wanted = self.bytes + desired - current.min(desired);
        if wanted > self.limit {
            return Err(MemoryLimit { wanted, limit: self.limit }.into());
        }
        self.bytes = wanted;
        Ok(true)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        if desired > TABLE_ELEMENTS {
            return Err(MemoryLimit { wanted: desired, limit: TABLE_ELEMENTS }.into());
        }
        Ok(true)
    }
}

// === impl LogGate ===

impl LogGate {
    pub(crate) fn new(slot: Arc<str>) -> Self {
        Self { slot, bucket: Mutex::new(Bucket { tokens: LOG_BURST, filled_at: 0, dropped: 0 }) }
    }

    /// Whether a line may pass now; if so, how many were dropped since the last one that did.
    fn admit(&self, now: Micros) -> Option<u64> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = now.saturating_sub(bucket.filled_at) / LOG_INTERVAL_US;
        if earned > 0 {
            bucket.tokens = (bucket.tokens + earned).min(LOG_BURST);
            bucket.filled_at += earned * LOG_INTERVAL_US;
        }
        if bucket.tokens == 0 {
            bucket.dropped += 1;
            return None;
        }
        bucket.tokens -= 1;
        Some(std::mem::take(&mut bucket.dropped))
    }
}

// === impl PluginMetrics ===

impl PluginMetrics {
    fn register(&mut self, spec: &PluginMetricSpec<'_>) -> u32 {
        let position = self.handles.iter().position(|h| h.name == spec.name && h.kind == spec.kind);
        if position.is_none() && self.handles.len() >= MAX_HANDLES {
            return NO_HANDLE;
        }
        let index = position.unwrap_or_else(|| {
            let metric = self.sink.as_ref().and_then(|sink| sink.metrics.plugin(&sink.slot, &sink.revision, spec));
            self.handles.push(Handle { name: spec.name.to_owned(), kind: spec.kind, metric });
            self.handles.len() - 1
        });
        u32::try_from(index).unwrap_or(NO_HANDLE)
    }

    fn record(&mut self, handle: u32, value: f64, label: Option<&str>) {
        match (self.handles.get(handle as usize), &self.sink) {
            (Some(Handle { metric: Some(metric), .. }), Some(sink)) => {
                sink.metrics.record_plugin(metric, value, label);
            }
            (Some(_), _) => {}
            (None, _) => {
                self.unknown += 1;
                if self.unknown.is_power_of_two() {
                    tracing::debug!(target: "policy", handle, times = self.unknown, "unknown metric handle");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_logs_a_burst_and_then_ten_lines_a_second() {
        let gate = LogGate::new("router".into());
        let passed = |now: Micros, n: usize| (0..n).filter(|_| gate.admit(now).is_some()).count();
        assert_eq!(passed(0, 60), 50);
        assert_eq!(passed(LOG_INTERVAL_US - 1, 5), 0);
        assert_eq!(gate.admit(LOG_INTERVAL_US), Some(15), "dropped lines are told");
        assert_eq!(passed(LOG_INTERVAL_US * 11, 60), 10);
    }

    #[test]
    fn handles_are_bounded_and_stable() {
        let metrics = Arc::new(Metrics::new());
        let sink = MetricSink { metrics: Arc::clone(&metrics), slot: "router".into(), revision: "r@1+0".into() };
        let mut plugin = PluginMetrics { sink: Some(sink), ..PluginMetrics::default() };
        let counter = |p: &mut PluginMetrics, name: &str| {
            let kind = PluginMetricKind::Counter;
            p.register(&PluginMetricSpec { name, help: "Help.", kind, label: None, buckets: &[] })
        };
        for i in 0..MAX_HANDLES {
            assert_eq!(counter(&mut plugin, &format!("m{i}")) as usize, i);
        }
        assert_eq!(counter(&mut plugin, "m3"), 3, "the same name and kind: the same handle");
        assert_eq!(counter(&mut plugin, "one_more"), NO_HANDLE);
        plugin.record(3, 2.0, None);
        plugin.record(NO_HANDLE, 2.0, None);
        let text = metrics.render();
        assert!(text.contains(r#"pointsman_plugin_m3{revision="r@1+0",slot="router"} 2"#), "{text}");
        assert!(!text.contains("one_more"));
    }

    #[test]
    fn memory_over_the_cap_is_an_error_that_says_how_much() {
        let mut meter = MemoryMeter { limit: 100, bytes: 0 };
        assert!(meter.memory_growing(0, 60, None).expect("within"));
        assert!(meter.memory_growing(60, 100, None).expect("within"));
        let error = meter.memory_growing(0, 1, None).expect_err("a second memory counts too");
        assert_eq!(error.downcast_ref::<MemoryLimit>(), Some(&MemoryLimit { wanted: 101, limit: 100 }));
        assert!(meter.table_growing(0, TABLE_ELEMENTS + 1, None).is_err());
    }
}
