//! What the host says about itself: a closed event vocabulary, a bounded recorder, and typed metric families.
//!
//! This crate is a leaf: it depends on nothing else of ours, so every other crate can record without a cycle. It never
//! blocks and, once a metric handle is resolved, never allocates; what does not fit is dropped and counted. It is not a
//! logging facade (that is `tracing`) and not an exporter (the server renders `/metrics` from [`Metrics::render`]).
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod arms;
mod devices;
mod event;
mod forms;
mod metrics;
mod models;
mod names;
mod recorder;
mod upstreams;

pub use arms::ArmMetrics;
pub use devices::DeviceFigures;
pub use event::{Event, EventKind, Micros};
pub use forms::FormMetrics;
pub use metrics::{
    CacheMetrics, ConnectionMetrics, DraftMetrics, EncoderMetrics, Metrics, PluginMetric, PluginMetricKind,
    PluginMetricSpec, PoolShape, ReplicaMetrics, RequestMetrics, SlotMetrics, TenantMetrics,
};
pub use models::ModelMetrics;
pub use names::{NameKind, Names};
pub use recorder::{Drained, Recorder};
pub use upstreams::{UpstreamMetrics, UpstreamOutcome};
