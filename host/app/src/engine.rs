//! The device drivers as the server sees them, and what they serve: an immutable snapshot behind one pointer.
//!
//! What is served may change while requests flow, and a request must not see half of a change: it takes one snapshot, and
//! routes, tokenizes and is answered by that. One that comes to a replica which has gone since is refused as by a driver that
//! has stopped, and goes to the next row. A lock around the catalog would be held by every request for as long as it routes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use pointsman_engine::cuda::GpuMonitor;
use pointsman_policy::SampledReplica;
use pointsman_sched::ids::{ReplicaId, RequestId};
use pointsman_sched::request::{CancelCause, Request};
use pointsman_sched::sampler::Desk;
use pointsman_sched::scheduler::Scheduler;
use pointsman_server::admin::wire;
use pointsman_server::ports::{
    Catalog, Clock as _, EmbedJob, Encoder, EnginePort, ModelAdmin, Replica, SubmitError, Variant,
};

use crate::config::Config;
use crate::deploy::Deploy;
use crate::devices::Place;
use crate::driver::{DriverContext, DriverHandle, DriverReplica};
use crate::encoders::{EncoderTerms, EncodersHandle};
use crate::models::{Loaded, LoadedEncoder, LoadedReplica};
use crate::pace::Pace;
use crate::recorded::{TappedRetention, TappedSampler};
use crate::serve::Shared;
use crate::tapped::Tapped;

/// Most cancels on their way to a driver.
const MAX_CANCELS: usize = 1 << 16;

/// The devices, and what they serve.
#[derive(Debug)]
pub(crate) struct Engine {
    served: ArcSwap<Served>,
    devices: Vec<ServingDevice>,
    /// Where there are any.
    encoders: Option<EncodersHandle>,
}

/// What is served now.
#[derive(Debug)]
struct Served {
    catalog: Arc<Catalog>,
    /// Of each replica.
    homes: HashMap<ReplicaId, Home>,
}

/// Where a replica is.
#[derive(Clone, Copy, Debug)]
struct Home {
    /// Place in the engine's devices.
    device: usize,
    /// What it took there.
    memory: wire::DeviceMemory,
}

/// A device and its driver.
#[derive(Debug)]
struct ServingDevice {
    place: Place,
    driver: DriverHandle,
    /// What all but the replicas take.
    memory: wire::DeviceMemory,
    /// Of a GPU, where the driver brings one.
    monitor: Option<GpuMonitor>,
}

// === impl Engine ===

impl Engine {
    /// Starts a driver for each device, with the replicas that were loaded for it.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(crate) fn start(
        config: &Config,
        shared: &Shared,
        deploy: &Deploy,
        (places, loaded): (Vec<Place>, Loaded),
    ) -> anyhow::Result<Self> {
        let context = DriverContext {
            clock: Arc::clone(&shared.clock),
            recorder: shared.recorder.clone(),
            metrics: Arc::clone(&shared.metrics),
        };
        // One HTTP request may be several engine requests: prompts times choices.
        let in_flight = config.server.max_in_flight as usize;
        let engine_requests = in_flight.saturating_mul(config.server.max_rows as usize);
        let bounds = (in_flight, engine_requests.min(MAX_CANCELS));
        let (encoders, encoder_models, encoder_memory) = start_encoders(config, shared, loaded.encoders)?;
        let mut left = loaded.replicas;
        let mut homes = HashMap::new();
        let mut devices = Vec::new();
        for place in places {
            let here = |loaded: &LoadedReplica| loaded.replica.device == u64::from(place.index());
            let (own, others): (Vec<_>, Vec<_>) = left.into_iter().partition(here);
            left = others;
            let mut replicas = Vec::new();
            for loaded in own {
                homes.insert(loaded.replica.id, Home { device: devices.len(), memory: loaded.memory });
                replicas.push(driver_replica(shared, deploy, loaded, &place.name())?);
            }
            let driver = DriverHandle::start(&place.name(), replicas, bounds, context.clone())?;
            let (memory, monitor) = match &place {
                Place::Cpu(_) => (encoder_memory, None),
                Place::Null(_) => (wire::DeviceMemory::default(), None),
                Place::Cuda(found) => (wire::DeviceMemory::default(), GpuMonitor::open(&found.bus_id)),
            };
            devices.push(ServingDevice { place, driver, memory, monitor });
        }
        let catalog = Arc::new(Catalog { variants: loaded.variants, encoders: encoder_models });
        Ok(Self { served: ArcSwap::from_pointee(Served { catalog, homes }), devices, encoders })
    }

    /// Ends what still runs and waits for the drivers.
    pub(crate) fn stop(&self) {
        self.devices.iter().for_each(|device| device.driver.stop());
        self.encoders.iter().for_each(EncodersHandle::stop);
    }

    fn driver_of(&self, replica: ReplicaId) -> Option<&DriverHandle> {
        let home = *self.served.load().homes.get(&replica)?;
        Some(&self.devices[home.device].driver)
    }
}

impl EnginePort for Engine {
    fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.served.load().catalog)
    }

    /// While one device serves: requests for the others are offered to it. Nobody stands in for the encoders.
    fn is_alive(&self) -> bool {
        let encoders = self.encoders.as_ref().is_none_or(EncodersHandle::is_alive);
        encoders && self.devices.iter().any(|device| device.driver.is_alive())
    }

    fn submit(&self, replica: ReplicaId, request: Request) -> Result<(), (Box<Request>, SubmitError)> {
        match self.driver_of(replica) {
            Some(driver) => driver.submit(replica, request),
            None => Err((Box::new(request), SubmitError::Stopped)),
        }
    }

    fn embed(&self, job: EmbedJob) -> Result<(), SubmitError> {
        self.encoders.as_ref().map_or(Err(SubmitError::Stopped), |encoders| encoders.submit(job))
    }

    fn cancel(&self, replica: ReplicaId, id: RequestId, cause: CancelCause) {
        if let Some(driver) = self.driver_of(replica) {
            driver.cancel(replica, id, cause);
        }
    }
}

impl ModelAdmin for Engine {
    fn devices(&self) -> Vec<wire::Device> {
        let served = self.served.load();
        let devices = self.devices.iter().enumerate().map(|(place, device)| device.report(place, &served));
        devices.chain(elsewhere(&served.catalog)).collect()
    }
}

// === impl ServingDevice ===

impl ServingDevice {
    /// Of the device at this place among the engine's.
    fn report(&self, place: usize, served: &Served) -> wire::Device {
        let here = u64::from(self.place.index());
        let replicas = served.catalog.variants.iter().flat_map(|v| v.replicas.iter().map(move |r| (v, r)));
        let replicas = replicas.filter(|(_, replica)| replica.device == here);
        let mut memory = self.memory;
        let here = served.homes.values().filter(|home| home.device == place);
        here.for_each(|home| add_memory(&mut memory, &home.memory));
        let seen = self.monitor.as_ref().map(GpuMonitor::look).unwrap_or_default();
        let total = match &self.place {
            Place::Cpu(_) | Place::Null(_) => None,
            Place::Cuda(found) => Some(found.total_bytes),
        };
        wire::Device {
            index: self.place.index().into(),
            name: self.place.name(),
            description: self.place.description(),
            state: if self.driver.is_alive() { "up" } else { "down" }.into(),
            memory: wire::DeviceMemory { free: seen.free_bytes, total, ..memory },
            replicas: replicas.map(|(variant, replica)| device_replica(variant, replica)).collect(),
            utilization: seen.utilization,
            temperature: seen.temperature,
            power_watts: seen.power_watts,
        }
    }
}

/// What a replica has of its device.
fn device_replica(variant: &Variant, replica: &Replica) -> wire::DeviceReplica {
    let load = |gauge: &AtomicU32| gauge.load(Ordering::Relaxed);
    let sum = |gauge: &AtomicU64| gauge.load(Ordering::Relaxed);
    wire::DeviceReplica {
        name: replica.name.to_string(),
        variant: variant.id.to_string(),
        kv_blocks: load(&replica.gauges.total_blocks),
        kv_free_blocks: load(&replica.gauges.free_blocks),
        kv_cached_blocks: load(&replica.gauges.cached_blocks),
        kv_evicted_blocks: sum(&replica.gauges.evicted_blocks),
        kv_slack_tokens: load(&replica.gauges.slack_tokens),
        prefix_query_tokens: sum(&replica.gauges.prefix_query_tokens),
        prefix_hit_tokens: sum(&replica.gauges.prefix_hit_tokens),
        block_tokens: variant.block_tokens,
        running: load(&replica.gauges.running),
        running_limit: load(&replica.gauges.running_limit),
        waiting: load(&replica.gauges.waiting),
    }
}

/// Upstreams, as the devices that they are to the router.
fn elsewhere(catalog: &Catalog) -> impl Iterator<Item = wire::Device> + '_ {
    let replicas = catalog.variants.iter().flat_map(|v| v.replicas.iter().map(move |r| (v, r)));
    replicas.filter_map(|(variant, replica)| {
        let upstream = replica.upstream.as_ref()?;
        Some(wire::Device {
            index: replica.device,
            name: upstream.name().to_string(),
            description: format!("upstream at {}", upstream.url()),
            state: if upstream.is_up() { "up" } else { "down" }.into(),
            memory: wire::DeviceMemory::default(),
            replicas: vec![device_replica(variant, replica)],
            utilization: None,
            temperature: None,
            power_watts: None,
        })
    })
}

// === parts ===

/// Starts the driver of the models for embeddings, if there are any; what the server sees of them, and their memory.
fn start_encoders(
    config: &Config,
    shared: &Shared,
    loaded: Vec<LoadedEncoder>,
) -> anyhow::Result<(Option<EncodersHandle>, Vec<Arc<Encoder>>, wire::DeviceMemory)> {
    let (mut models, mut named, mut memory) = (Vec::new(), Vec::new(), wire::DeviceMemory::default());
    for encoder in loaded {
        add_memory(&mut memory, &encoder.memory);
        models.push(encoder.model);
        named.push(encoder.named);
    }
    let terms = EncoderTerms {
        clock: Arc::clone(&shared.clock),
        metrics: Arc::clone(&shared.metrics),
        window: Duration::from_millis(config.engine.embed_window_ms.into()),
        mailbox: config.server.max_in_flight as usize,
    };
    let handle = if named.is_empty() { None } else { Some(EncodersHandle::start(named, terms)?) };
    Ok((handle, models, memory))
}

fn driver_replica(
    shared: &Shared,
    deploy: &Deploy,
    loaded: LoadedReplica,
    device: &str,
) -> anyhow::Result<DriverReplica> {
    let LoadedReplica { replica, variant, executor, vocabulary, sched, .. } = loaded;
    let sampled = SampledReplica { name: Arc::clone(&replica.name), variant: Arc::clone(&variant), vocabulary };
    let sampler = TappedSampler::new(deploy.sampler.attach(sampled.clone())?, &shared.taps.sampler, sampled);
    let retention = deploy.retention.attach(&replica.name);
    let (gauges, sketch) = (Arc::clone(&replica.gauges), Arc::clone(&replica.sketch));
    Ok(DriverReplica {
        id: replica.id,
        scheduler: Scheduler::new(sched, shared.clock.random(), gauges, sketch)?,
        executor,
        policy: Box::new(Tapped::new(deploy.scheduler.attach(&replica.name), &shared.taps.scheduler, &replica.name)),
        retention: Box::new(TappedRetention::new(retention, &shared.taps.retention, &replica.name, &shared.names)),
        sampler: Desk::new(Box::new(sampler)),
        gauges: Arc::clone(&replica.gauges),
        metrics: shared.metrics.replica(&variant, device, sched.block_tokens, sched.n_blocks),
        variant: u32::try_from(replica.variant).unwrap_or(0),
        pace: Pace::new(sched.step_tokens),
    })
}

fn add_memory(sum: &mut wire::DeviceMemory, part: &wire::DeviceMemory) {
    sum.weights += part.weights;
    sum.kv += part.kv;
    sum.workspace += part.workspace;
    sum.graphs = sum.graphs.or(part.graphs.map(|_| 0)).map(|graphs| graphs + part.graphs.unwrap_or(0));
}
