//! What every handler shares: the ports, the bounds, the registry and a few caches. One `Arc` of it is the routers' state.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use pointsman_sched::admit::AdmitPolicy;
use pointsman_sched::ids::{Micros, RequestId};
use pointsman_sched::route::RoutePolicy;
use pointsman_telemetry::{DeviceFigures, Metrics, Names, Recorder, RequestMetrics};
use tokio::task::JoinSet;

use crate::admin::places::Places;
use crate::admin::wire;
use crate::admission::{Admission, Bounds, Permit};
use crate::batch::Desk;
use crate::cache::ResponseCache;
use crate::config::{ConfigError, ServerConfig};
use crate::error::ApiError;
use crate::grammar::GrammarDesk;
use crate::identity::Caller;
use crate::keys::{ApiKey, Keys};
use crate::ports::{AliasPort, Clock, EnginePort, ModelAdmin, PolicyAdmin, Shelf};
use crate::record::Taps;
use crate::registry::Registry;
use crate::trace::Traces;
use crate::usage::{Bill, Usage};

/// Rendering `/metrics` walks every series; scrapers that poll every 50 ms, several at once, cost one rendering per
/// interval and see values at most this old, which is what their own interval promises them anyway.
const SCRAPE_MICROS: Micros = 50_000;

/// Begins the names of the families that name tenants.
const TENANT_FAMILIES: &str = "pointsman_tenant_";

/// What the app hands to the server.
#[derive(Debug)]
pub struct ServerParts {
    /// Bounds and keys.
    pub config: ServerConfig,
    /// The device drivers.
    pub engine: Arc<dyn EnginePort>,
    /// The admission slot.
    pub admit: Arc<dyn AdmitPolicy>,
    /// The router slot.
    pub router: Arc<dyn RoutePolicy>,
    /// Slots, components, journal.
    pub policies: Arc<dyn PolicyAdmin>,
    /// Aliases with weights.
    pub aliases: Arc<dyn AliasPort>,
    /// Models and devices.
    pub models: Arc<dyn ModelAdmin>,
    /// Time and randomness.
    pub clock: Arc<dyn Clock>,
    /// Metric families.
    pub metrics: Arc<Metrics>,
    /// The event ring.
    pub recorder: Recorder,
    /// Interned tenants.
    pub names: Arc<Names>,
    /// Where decisions can be recorded.
    pub taps: Taps,
    /// Files and batches.
    pub shelf: Arc<dyn Shelf>,
}

/// Shared by every handler of both planes.
#[derive(Debug)]
pub struct ServerState {
    pub(crate) config: ServerConfig,
    pub(crate) engine: Arc<dyn EnginePort>,
    pub(crate) router: Arc<dyn RoutePolicy>,
    pub(crate) policies: Arc<dyn PolicyAdmin>,
    pub(crate) aliases: Arc<dyn AliasPort>,
    pub(crate) models: Arc<dyn ModelAdmin>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) recorder: Recorder,
    pub(crate) names: Arc<Names>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) traces: Traces,
    pub(crate) taps: Taps,
    pub(crate) grammars: GrammarDesk,
    pub(crate) cache: ResponseCache,
    /// In place of `config.api_keys`, which are those of the start.
    pub(crate) keys: Keys,
    pub(crate) usage: Usage,
    /// Unix seconds.
    pub(crate) started: u64,
    pub(crate) batches: Arc<Desk>,
    /// Requests for embeddings that are inside, but for those of the lowest priority.
    pub(crate) embeddings: Arc<AtomicU32>,
    /// Requests that wait for a model that is loaded on demand.
    pub(crate) waiting_for_models: AtomicU32,
    request_numbers: AtomicU64,
    request_metrics: RwLock<HashMap<Arc<str>, Arc<RequestMetrics>>>,
    scrape: Mutex<Option<(Micros, Bytes)>>,
    tasks: Mutex<JoinSet<()>>,
    /// Of calls of the admin plane.
    pub(crate) places: Places,
}

impl ServerState {
    /// Checks the configuration and builds the shared state.
    ///
    /// # Errors
    /// The first configuration value that cannot work.
    pub fn new(parts: ServerParts) -> Result<Arc<Self>, ConfigError> {
        let ServerParts {
            config,
            engine,
            admit,
            router,
            policies,
            aliases,
            models,
            clock,
            metrics,
            recorder,
            names,
            taps,
            shelf,
        } = parts;
        config.validate()?;
        let bounds = Bounds {
            requests: config.max_requests,
            queued_tokens: config.max_queued_tokens,
            scores_mib: config.prompt_scores_mib,
        };
        Ok(Arc::new(Self {
            admission: Arc::new(Admission::new(bounds, admit)),
            registry: Arc::default(),
            traces: Traces::new(config.explain_requests),
            taps,
            grammars: GrammarDesk::new(config.max_grammar_bytes).keeping(
                config.kept_forms,
                config.kept_form_bytes,
                metrics.forms(),
            ),
            cache: ResponseCache::new(&config, metrics.response_cache()),
            keys: Keys::new(config.api_keys.clone())?,
            usage: Usage::default(),
            started: clock.unix_seconds(),
            batches: Arc::new(Desk::open(shelf, config.batch, &clock, &metrics)),
            embeddings: Arc::default(),
            waiting_for_models: AtomicU32::new(0),
            request_numbers: AtomicU64::new(1),
            request_metrics: RwLock::default(),
            scrape: Mutex::default(),
            tasks: Mutex::default(),
            places: Places::default(),
            config,
            engine,
            router,
            policies,
            aliases,
            models,
            clock,
            metrics,
            recorder,
            names,
        }))
    }

    /// Stops admitting requests; what runs goes on. `/ready` answers 503 from now on.
    pub fn drain(&self) {
        self.admission.drain();
    }

    /// Takes other API keys in the place of those it has; requests in flight go on.
    ///
    /// # Errors
    /// The first key that cannot work, or none at all; the keys stay what they were.
    pub fn replace_keys(&self, keys: Vec<ApiKey>) -> Result<(), ConfigError> {
        self.keys.replace(keys)
    }

    /// Counts that a plane's certificate was read again, and whether it is used from now on.
    pub fn certificate_read(&self, plane: &str, is_used: bool) {
        self.metrics.tls_reload(plane, is_used);
    }

    /// Shows until when a plane's chain can be used, in Unix seconds; none where it does not say so.
    pub fn certificate_until(&self, plane: &str, until_s: Option<u64>) {
        self.metrics.tls_until(plane, until_s);
    }

    /// Lets a request in, within the limits of the host and of its caller's key.
    pub(crate) fn enter(&self, caller: &Caller) -> Result<Permit, ApiError> {
        let mut permit = self.admission.enter()?;
        let place = caller.holder.as_ref().map(|holder| holder.enter(self.clock.now())).transpose()?;
        permit.bill(Bill::new(self.usage.account(caller.tenant_id, &self.names, &self.metrics), place));
        Ok(permit)
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.admission.in_flight()
    }

    /// The device drivers.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn EnginePort> {
        Arc::clone(&self.engine)
    }

    /// An identity for an engine request.
    pub(crate) fn next_request(&self) -> RequestId {
        RequestId(self.request_numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// Metric handles of a variant, resolved once.
    pub(crate) fn request_metrics(&self, variant: &Arc<str>) -> Arc<RequestMetrics> {
        let known = self.request_metrics.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(handles) = known.get(variant) {
            return Arc::clone(handles);
        }
        drop(known);
        let mut known = self.request_metrics.write().unwrap_or_else(PoisonError::into_inner);
        let handles = known.entry(Arc::clone(variant)).or_insert_with(|| Arc::new(self.metrics.request(variant)));
        Arc::clone(handles)
    }

    /// Lets go of the handles of variants that are gone.
    pub(crate) fn forget_request_metrics(&self, variants: &[String]) {
        let mut known = self.request_metrics.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|variant, _| !variants.iter().any(|gone| **gone == **variant));
    }

    /// The text of `/metrics`, rendered at most once per interval.
    pub(crate) fn scrape(&self) -> Bytes {
        let now = self.clock.now();
        let mut last = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, text)) = &*last
            && now.saturating_sub(*at) < SCRAPE_MICROS
        {
            return text.clone();
        }
        self.show_devices();
        let mut text = self.metrics.render();
        if self.keys.are_needed() {
            // The plane of those who have keys must not tell them of one another; the admin plane has the accounts.
            text = text.split_inclusive('\n').filter(|line| !line.contains(TENANT_FAMILIES)).collect();
        }
        let text = Bytes::from(text);
        *last = Some((now, text.clone()));
        text
    }

    /// Gauges of the devices here. Upstreams are listed among them, and have names that no device has.
    fn show_devices(&self) {
        let (catalog, devices) = (self.engine.catalog(), self.models.devices());
        let is_here = |device: &&wire::Device| catalog.upstreams().all(|(_, u)| **u.name() != *device.name);
        self.metrics.devices(devices.iter().filter(is_here).map(|device| (&*device.name, figures(device))));
    }

    /// Runs a task that shutdown aborts; must be called inside the runtime.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Ends the tasks of [`spawn`](Self::spawn).
    pub(crate) async fn stop_tasks(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }
}

/// What the gauges of a device show of its report.
fn figures(device: &wire::Device) -> DeviceFigures {
    let wire::DeviceMemory { weights, kv, workspace, drafts, graphs, free, total } = device.memory;
    DeviceFigures {
        is_up: device.state == "up",
        weights_bytes: weights,
        kv_bytes: kv,
        workspace_bytes: workspace,
        drafts_bytes: drafts,
        graphs_bytes: graphs,
        free_bytes: free,
        total_bytes: total,
        utilization: device.utilization,
        temperature_celsius: device.temperature,
        power_watts: device.power_watts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_show_all_that_a_report_says() {
        let memory = wire::DeviceMemory {
            weights: 1,
            kv: 2,
            workspace: 3,
            drafts: Some(4),
            graphs: Some(5),
            free: Some(6),
            total: Some(7),
        };
        let device = wire::Device {
            index: 1,
            name: "cuda:0".to_owned(),
            description: "a GPU".to_owned(),
            state: "up".to_owned(),
            memory,
            replicas: Vec::new(),
            kv_pool_bound: None,
            utilization: Some(0.5),
            temperature: Some(40),
            power_watts: Some(300.5),
        };
        let metrics = Metrics::new();
        metrics.devices([("cuda:0", figures(&device))]);
        let text = metrics.render();
        let owners = [("weights", 1), ("kv", 2), ("workspace", 3), ("drafts", 4), ("graphs", 5)];
        let of = |owner: &str| format!("memory_bytes{{device=\"cuda:0\",owner=\"{owner}\"}}");
        let held = owners.map(|(owner, bytes)| (of(owner), f64::from(bytes)));
        let others = [
            ("up", 1.0),
            ("memory_free_bytes", 6.0),
            ("memory_total_bytes", 7.0),
            ("utilization_ratio", 0.5),
            ("temperature_celsius", 40.0),
            ("power_watts", 300.5),
        ];
        let others = others.map(|(family, value)| (format!("{family}{{device=\"cuda:0\"}}"), value));
        for (series, value) in held.into_iter().chain(others) {
            assert!(text.contains(&format!("pointsman_device_{series} {value}\n")), "{series} {value}\n{text}");
        }
    }
}
