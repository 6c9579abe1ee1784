//! The device drivers as the server sees them, and what they serve: an immutable snapshot behind one pointer.
//!
//! What is served may change while requests flow, and a request must not see half of a change: it takes one snapshot, and
//! routes, tokenizes and is answered by that. One that comes to a replica which has gone since is refused as by a driver that
//! has stopped, and goes to the next row. A lock around the catalog would be held by every request for as long as it routes.

mod pools;

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use pointsman_engine::cuda::GpuMonitor;
use pointsman_policy::SampledReplica;
use pointsman_sched::ids::{Micros, ReplicaId, RequestId};
use pointsman_sched::request::{CancelCause, Request};
use pointsman_sched::sampler::Desk;
use pointsman_sched::scheduler::Scheduler;
use pointsman_server::admin::wire;
use pointsman_server::ports::{
    Catalog, Clock as _, DeviceState, EmbedJob, Encoder, EnginePort, Replica, SubmitError, Variant,
};

use crate::clock::SystemClock;
use crate::config::Config;
use crate::deploy::Deploy;
use crate::devices::Place;
use crate::driver::{DriverContext, DriverHandle, DriverReplica, Gone};
use crate::encoders::{EncoderTerms, EncodersHandle};
use crate::models::{Loaded, LoadedEncoder, LoadedReplica};
use crate::monitor::Monitor;
use crate::pace::Pace;
use crate::recorded::{TappedRetention, TappedSampler};
use crate::serve::Shared;
use crate::tapped::Tapped;
pub(crate) use pools::{PoolBounds, PoolRefusal};

/// Most cancels on their way to a driver.
const MAX_CANCELS: usize = 1 << 16;

/// The devices, and what they serve.
#[derive(Debug)]
pub(crate) struct Engine {
    served: ArcSwap<Served>,
    clock: Arc<SystemClock>,
    devices: Vec<ServingDevice>,
    encoders: EncodersHandle,
}

/// What is served now.
#[derive(Clone, Debug)]
struct Served {
    catalog: Arc<Catalog>,
    /// Of each replica.
    homes: HashMap<ReplicaId, Home>,
    /// What each model for embeddings took of the CPU, whatever devices serve the others.
    encoders: HashMap<Arc<str>, wire::DeviceMemory>,
}

/// Where a replica is.
#[derive(Clone, Debug)]
struct Home {
    /// Place in the engine's devices.
    device: usize,
    /// What it took there.
    memory: wire::DeviceMemory,
    /// Whether it still takes requests.
    is_open: bool,
    /// When the last one came; 0 before the first.
    used: Arc<AtomicU64>,
    replica: Arc<Replica>,
    /// As in `demo:f16`.
    variant: Arc<str>,
    pool: PoolBounds,
}

/// Replicas with their drivers to which nobody sends requests yet.
#[derive(Debug)]
#[must_use = "they compute for nobody until they are published"]
pub(crate) struct Joined {
    variants: Vec<Arc<Variant>>,
    homes: Vec<(ReplicaId, Home)>,
    encoders: Vec<SeenEncoder>,
}

/// A model for embeddings as the server sees it, and what it took.
type SeenEncoder = (Arc<Encoder>, wire::DeviceMemory);

/// What became of replicas that were to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Requests that were ended for it.
    pub ended: u64,
    /// What they held, all devices together.
    pub bytes: u64,
}

/// What a GPU may take for a step: a hundred times what the longest ones take.
const LONGEST_STEP: Micros = 60_000_000;

/// A device and its driver.
#[derive(Debug)]
struct ServingDevice {
    place: Place,
    driver: DriverHandle,
    /// Of a GPU, where the driver brings one.
    monitor: Option<Monitor>,
    /// The most bytes of each KV pool, as an operator wants it.
    pool_bound: AtomicU64,
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
            longest_step: LONGEST_STEP,
        };
        // One HTTP request may be several engine requests: prompts times choices.
        let in_flight = config.server.max_in_flight as usize;
        let engine_requests = in_flight.saturating_mul(config.server.max_rows as usize);
        let bounds = (in_flight, engine_requests.min(MAX_CANCELS));
        let (handle, own_encoders) = start_encoders(config, shared, loaded.encoders)?;
        let mut left = loaded.replicas;
        let mut homes = HashMap::new();
        let mut devices = Vec::new();
        for place in places {
            let here = |loaded: &LoadedReplica| loaded.replica.device == u64::from(place.index());
            let (own, others): (Vec<_>, Vec<_>) = left.into_iter().partition(here);
            left = others;
            let mut replicas = Vec::new();
            for loaded in own {
                homes.insert(loaded.replica.id, Home::new(devices.len(), &loaded));
                replicas.push(driver_replica(shared, deploy, loaded, &place.name())?);
            }
            let driver = DriverHandle::start((&place.name(), place.index()), replicas, bounds, context.clone())?;
            let monitor = watch(&place, &shared.clock)?;
            devices.push(ServingDevice { place, driver, monitor, pool_bound: AtomicU64::new(u64::MAX) });
        }
        let on_demand = config.on_demand.keys().map(|name| name.as_str().into()).collect();
        let encoders = own_encoders.iter().map(|(encoder, memory)| (Arc::clone(&encoder.name), *memory)).collect();
        let encoder_models = own_encoders.into_iter().map(|(encoder, _)| encoder).chain(loaded.elsewhere).collect();
        let catalog = Arc::new(Catalog { variants: loaded.variants, encoders: encoder_models, on_demand });
        let (served, clock) = (ArcSwap::from_pointee(Served { catalog, homes, encoders }), Arc::clone(&shared.clock));
        Ok(Self { served, clock, devices, encoders: handle })
    }

    /// Hands loaded replicas to their drivers. All join or none does.
    ///
    /// # Errors
    /// A policy's thread cannot be started, or a device serves no more.
    pub(crate) fn join(&self, shared: &Shared, deploy: &Deploy, loaded: Loaded) -> anyhow::Result<Joined> {
        let mut joined = Joined { variants: loaded.variants, homes: Vec::new(), encoders: Vec::new() };
        for LoadedEncoder { model, named, memory } in loaded.encoders {
            self.encoders.join(named)?;
            joined.encoders.push((model, memory));
        }
        for loaded in loaded.replicas {
            let id = loaded.replica.id;
            let here = |device: &ServingDevice| loaded.replica.device == u64::from(device.place.index());
            let entered = self.devices.iter().position(here).context("its device does not serve").and_then(|at| {
                let (device, home) = (&self.devices[at], Home::new(at, &loaded));
                let replica = driver_replica(shared, deploy, loaded, &device.place.name())?;
                device.driver.join(replica)?;
                Ok(home)
            });
            match entered {
                Ok(home) => joined.homes.push((id, home)),
                Err(error) => {
                    self.part(joined, shared);
                    return Err(error);
                }
            }
        }
        Ok(joined)
    }

    /// Serves them from now on.
    pub(crate) fn publish(&self, joined: &Joined) {
        self.served.rcu(|served| {
            let mut catalog = Catalog::clone(&served.catalog);
            catalog.variants.extend(joined.variants.iter().cloned());
            let mut homes = served.homes.clone();
            homes.extend(joined.homes.iter().cloned());
            catalog.encoders.extend(joined.encoders.iter().map(|(encoder, _)| Arc::clone(encoder)));
            let mut encoders = served.encoders.clone();
            encoders.extend(joined.encoders.iter().map(|(encoder, memory)| (Arc::clone(&encoder.name), *memory)));
            Served { catalog: Arc::new(catalog), homes, encoders }
        });
    }

    /// Takes replicas back that were not published.
    pub(crate) fn part(&self, joined: Joined, shared: &Shared) {
        let Joined { variants, homes, encoders } = joined;
        self.take_back(&homes, 0);
        for (encoder, _) in &encoders {
            drop(self.encoders.leave(&encoder.name, 0));
            shared.metrics.forget_replica(&encoder.name, "cpu", 0, 0);
        }
        self.forget(&variants, false, shared);
    }

    /// Sends variants no more requests; what they have goes on.
    pub(crate) fn close(&self, variants: &[Arc<Variant>]) {
        let is_closed = |id: &str| variants.iter().any(|variant| *variant.id == *id);
        self.served.rcu(|served| {
            let mut next = Served::clone(served);
            let mut catalog = Catalog::clone(&served.catalog);
            catalog.variants.retain(|variant| !is_closed(&variant.id));
            next.catalog = Arc::new(catalog);
            for replica in variants.iter().flat_map(|variant| &variant.replicas) {
                next.homes.entry(replica.id).and_modify(|home| home.is_open = false);
            }
            next
        });
    }

    /// The same of a model for embeddings.
    pub(crate) fn close_encoder(&self, encoder: &Encoder) {
        self.served.rcu(|served| {
            let mut catalog = Catalog::clone(&served.catalog);
            catalog.encoders.retain(|served| served.name != encoder.name);
            Served { catalog: Arc::new(catalog), ..Served::clone(served) }
        });
    }

    /// Waits this long for the texts that a closed model for embeddings has, ends the rest, and frees what it held.
    pub(crate) fn clear_encoder(&self, encoder: &Encoder, grace_us: Micros) -> Left {
        let gone = self.encoders.leave(&encoder.name, self.clock.micros().saturating_add(grace_us));
        let ended = gone.as_ref().map_or(0, |gone| gone.ended);
        drop(gone.map(|gone| gone.encoder));
        let bytes = self.served.load().encoders.get(&encoder.name).map_or(0, wire::DeviceMemory::held);
        self.served.rcu(|served| {
            let mut next = Served::clone(served);
            next.encoders.remove(&encoder.name);
            next
        });
        Left { ended, bytes }
    }

    /// Waits this long for what closed variants still run, ends the rest, and frees what they held.
    pub(crate) fn clear(&self, variants: &[Arc<Variant>], grace_us: Micros) -> Left {
        let served = self.served.load_full();
        let replicas = variants.iter().flat_map(|variant| &variant.replicas);
        let homes: Vec<(ReplicaId, Home)> =
            replicas.filter_map(|r| Some((r.id, served.homes.get(&r.id)?.clone()))).collect();
        drop(served);
        let left = self.take_back(&homes, grace_us);
        self.served.rcu(|served| {
            let mut next = Served::clone(served);
            homes.iter().for_each(|(id, _)| drop(next.homes.remove(id)));
            next
        });
        left
    }

    /// Has replicas given back and drops them, on this thread: the memory of a large model takes a while.
    fn take_back(&self, homes: &[(ReplicaId, Home)], grace_us: Micros) -> Left {
        let end = self.clock.micros().saturating_add(grace_us);
        let asked = homes.iter().map(|(id, home)| (id, home, self.devices[home.device].driver.leave(*id)));
        let asked: Vec<_> = asked.collect();
        let mut left = Left::default();
        for (id, home, coming) in asked {
            // A driver that has ended has dropped what it had.
            if let Ok(coming) = coming
                && let Some(gone) = self.await_replica(*id, home, (&coming, end))
            {
                left.ended += gone.ended;
                drop(gone.replica);
            }
            left.bytes += home.memory.held();
        }
        left
    }

    /// Removes the metrics of variants that have gone; of those that may come back what they have counted stays.
    pub(crate) fn forget(&self, variants: &[Arc<Variant>], may_return: bool, shared: &Shared) {
        for variant in variants {
            for replica in &variant.replicas {
                let device = self.devices.iter().find(|d| u64::from(d.place.index()) == replica.device);
                let device = device.map(|device| device.place.name()).unwrap_or_default();
                let n_blocks = replica.gauges.total_blocks.load(Ordering::Relaxed);
                match may_return {
                    true => shared.metrics.forget_gauges(&variant.id, &device, variant.block_tokens, n_blocks),
                    false => shared.metrics.forget_replica(&variant.id, &device, variant.block_tokens, n_blocks),
                }
            }
        }
    }

    /// A replica once it is idle, or at the end of the time.
    fn await_replica(&self, id: ReplicaId, home: &Home, (coming, end): (&Receiver<Gone>, Micros)) -> Option<Gone> {
        let patience = Duration::from_micros(end.saturating_sub(self.clock.micros()));
        match coming.recv_timeout(patience) {
            Ok(gone) => Some(gone),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                self.devices[home.device].driver.end(id).ok()?;
                coming.recv().ok()
            }
        }
    }

    /// Replicas of these variants with what they took, and when the last request came to one of them.
    pub(crate) fn replicas_of(&self, variants: &[Arc<Variant>]) -> (Vec<wire::ModelReplica>, Option<Micros>) {
        let served = self.served.load();
        let replicas = variants.iter().flat_map(|variant| &variant.replicas);
        let homes = replicas.filter_map(|r| Some((r, served.homes.get(&r.id)?)));
        let used = homes.clone().map(|(_, home)| home.used.load(Ordering::Relaxed)).max();
        let replica = |(replica, home): (&Arc<Replica>, &Home)| wire::ModelReplica {
            name: replica.name.to_string(),
            device: self.devices[home.device].place.name(),
            memory: home.memory,
        };
        (homes.map(replica).collect(), used.filter(|used| *used > 0))
    }

    /// The devices that serve still.
    pub(crate) fn places(&self) -> Vec<Place> {
        let alive = |device: &&ServingDevice| device.driver.is_alive();
        self.devices.iter().filter(alive).map(|device| device.place.clone()).collect()
    }

    /// Per device: memory by owner, KV pool, batch, variants. Answers at once, by what monitors said last.
    pub(crate) fn report(&self) -> Vec<wire::Device> {
        let (served, now) = (self.served.load(), self.clock.micros());
        let devices = self.devices.iter().enumerate().map(|(place, device)| device.report(place, &served, now));
        devices.chain(elsewhere(&served.catalog)).collect()
    }

    /// Whether the devices here serve.
    pub(crate) fn states(&self) -> Vec<DeviceState> {
        self.devices.iter().map(ServingDevice::state).collect()
    }

    /// What models hold of the devices at these places.
    pub(crate) fn held(&self, counts: impl Fn(&Place) -> bool) -> u64 {
        let served = self.served.load();
        let counted = |place: usize| self.devices.get(place).is_some_and(|device| counts(&device.place));
        let replicas = served.homes.values().filter(|home| counted(home.device)).map(|home| home.memory.held());
        let are_counted = counts(&Place::Cpu(0));
        let encoders = served.encoders.values().filter(|_| are_counted).map(wire::DeviceMemory::held);
        replicas.chain(encoders).sum()
    }

    /// Ends what still runs and waits for the drivers; for a monitor that hangs, a moment.
    pub(crate) fn stop(&self) {
        self.devices.iter().for_each(|device| device.driver.stop());
        let monitors = || self.devices.iter().filter_map(|device| device.monitor.as_ref());
        monitors().for_each(Monitor::end);
        monitors().for_each(Monitor::stop);
        self.encoders.stop();
    }
}

impl EnginePort for Engine {
    fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.served.load().catalog)
    }

    /// While one device serves: requests for the others are offered to it. Nobody stands in for the encoders.
    fn is_alive(&self) -> bool {
        self.encoders.is_alive() && self.devices.iter().any(|device| device.driver.is_alive())
    }

    fn submit(&self, replica: ReplicaId, request: Request) -> Result<(), (Box<Request>, SubmitError)> {
        match self.served.load().homes.get(&replica).filter(|home| home.is_open) {
            Some(home) => {
                home.used.store(self.clock.micros().max(1), Ordering::Relaxed);
                self.devices[home.device].driver.submit(replica, request)
            }
            None => Err((Box::new(request), SubmitError::Stopped)),
        }
    }

    fn embed(&self, job: EmbedJob) -> Result<(), SubmitError> {
        self.encoders.submit(job)
    }

    fn cancel(&self, replica: ReplicaId, id: RequestId, cause: CancelCause) {
        if let Some(home) = self.served.load().homes.get(&replica) {
            self.devices[home.device].driver.cancel(replica, id, cause);
        }
    }
}

// === impl Home ===

impl Home {
    fn new(device: usize, loaded: &LoadedReplica) -> Self {
        Self {
            device,
            memory: loaded.memory,
            is_open: true,
            used: Arc::default(),
            replica: Arc::clone(&loaded.replica),
            variant: Arc::clone(&loaded.variant),
            pool: loaded.pool,
        }
    }
}

// === impl ServingDevice ===

impl ServingDevice {
    /// Whether it serves, and nothing that would have to be added up.
    fn state(&self) -> DeviceState {
        DeviceState { index: self.place.index().into(), name: self.place.name(), is_up: self.driver.is_alive() }
    }

    /// Of the device at this place among the engine's.
    fn report(&self, place: usize, served: &Served, now: Micros) -> wire::Device {
        let here = u64::from(self.place.index());
        let replicas = served.catalog.variants.iter().flat_map(|v| v.replicas.iter().map(move |r| (v, r)));
        let replicas: Vec<_> = replicas.filter(|(_, replica)| replica.device == here).collect();
        let mut memory = wire::DeviceMemory::default();
        if matches!(self.place, Place::Cpu(_)) {
            served.encoders.values().for_each(|encoder| add_memory(&mut memory, encoder));
        }
        // What a device held that is gone nobody holds.
        let is_alive = self.driver.is_alive();
        let here = served.homes.values().filter(|home| home.device == place && is_alive);
        here.for_each(|home| add_memory(&mut memory, &home.memory));
        let seen = self.monitor.as_ref().map(|monitor| monitor.seen(now)).unwrap_or_default();
        let total = match &self.place {
            Place::Cpu(_) | Place::Null(_) => None,
            Place::Cuda(found) => Some(found.total_bytes),
        };
        // Its replicas compute in turns, so that their shares add up; who is gone leaves its last share behind.
        let replica_of = |variant: &Variant, replica: &Replica| {
            let most = served.homes.get(&replica.id).map(|home| home.pool.most);
            let seen = device_replica(variant, replica);
            wire::DeviceReplica { kv_most_blocks: most.unwrap_or(seen.kv_blocks), ..seen }
        };
        let busy = replicas.iter().map(|(_, replica)| replica.gauges.busy_ppm.load(Ordering::Relaxed));
        let busy = if is_alive { (busy.map(u64::from).sum::<u64>() as f64 / 1e6).min(1.0) } else { 0.0 };
        wire::Device {
            index: self.place.index().into(),
            name: self.place.name(),
            description: self.place.description(),
            state: if is_alive { "up" } else { "down" }.into(),
            memory: wire::DeviceMemory { free: seen.free_bytes, total, ..memory },
            replicas: replicas.into_iter().map(|(variant, replica)| replica_of(variant, replica)).collect(),
            kv_pool_bound: Some(self.pool_bound.load(Ordering::Relaxed)).filter(|bound| *bound < u64::MAX),
            utilization: Some(seen.utilization.unwrap_or(busy)),
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
        kv_most_blocks: load(&replica.gauges.total_blocks),
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
            kv_pool_bound: None,
            utilization: None,
            temperature: None,
            power_watts: None,
        })
    })
}

// === parts ===

/// Watches a device that is a GPU, where the driver brings a monitor.
fn watch(place: &Place, clock: &Arc<SystemClock>) -> std::io::Result<Option<Monitor>> {
    let gpu = match place {
        Place::Cpu(_) | Place::Null(_) => None,
        Place::Cuda(found) => GpuMonitor::open(&found.bus_id),
    };
    gpu.map(|gpu| Monitor::start(&place.name(), Arc::clone(clock), move || gpu.look())).transpose()
}

/// Starts the driver of the models for embeddings; what the server sees of each, and what it took.
fn start_encoders(
    config: &Config,
    shared: &Shared,
    loaded: Vec<LoadedEncoder>,
) -> anyhow::Result<(EncodersHandle, Vec<SeenEncoder>)> {
    let split = |LoadedEncoder { model, named, memory }| ((model, memory), named);
    let (seen, named) = loaded.into_iter().map(split).unzip();
    let terms = EncoderTerms {
        clock: Arc::clone(&shared.clock),
        metrics: Arc::clone(&shared.metrics),
        window: Duration::from_millis(config.engine.embed_window_ms.into()),
        mailbox: config.server.max_in_flight as usize,
    };
    Ok((EncodersHandle::start(named, terms)?, seen))
}

fn driver_replica(
    shared: &Shared,
    deploy: &Deploy,
    loaded: LoadedReplica,
    device: &str,
) -> anyhow::Result<DriverReplica> {
    let LoadedReplica { replica, variant, executor, draft_model, vocabulary, sched, kv_blocks, .. } = loaded;
    let sampled = SampledReplica { name: Arc::clone(&replica.name), variant: Arc::clone(&variant), vocabulary };
    let sampler = TappedSampler::new(deploy.sampler.attach(sampled.clone())?, &shared.taps.sampler, sampled);
    let retention = deploy.retention.attach(&replica.name);
    let (gauges, sketch) = (Arc::clone(&replica.gauges), Arc::clone(&replica.sketch));
    let mut scheduler = Scheduler::new(sched, shared.clock.random(), gauges, sketch)?;
    scheduler.resize(kv_blocks, 0, &mut |_| {});
    draft_model.into_iter().for_each(|model| scheduler.draft_with(model));
    Ok(DriverReplica {
        id: replica.id,
        scheduler,
        executor,
        policy: Box::new(Tapped::new(deploy.scheduler.attach(&replica.name), &shared.taps.scheduler, &replica.name)),
        retention: Box::new(TappedRetention::new(retention, &shared.taps.retention, &replica.name, &shared.names)),
        sampler: Desk::new(Box::new(sampler)),
        gauges: Arc::clone(&replica.gauges),
        metrics: shared.metrics.replica(&variant, device, sched.block_tokens, kv_blocks),
        variant: u32::try_from(replica.variant).unwrap_or(0),
        pace: Pace::new(sched.step_tokens),
        begun: VecDeque::new(),
    })
}

fn add_memory(sum: &mut wire::DeviceMemory, part: &wire::DeviceMemory) {
    sum.weights += part.weights;
    sum.kv += part.kv;
    sum.workspace += part.workspace;
    sum.drafts = sum.drafts.or(part.drafts.map(|_| 0)).map(|drafts| drafts + part.drafts.unwrap_or(0));
    sum.graphs = sum.graphs.or(part.graphs.map(|_| 0)).map(|graphs| graphs + part.graphs.unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use pointsman_engine::cuda::{DeviceInfo, FoundGpu, Seen};
    use pointsman_telemetry::{Metrics, Recorder};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn gpu() -> Place {
        Place::Cuda(FoundGpu {
            ordinal: 1,
            info: DeviceInfo { name: "a GPU".to_owned(), n_sms: 132, capability: (9, 0) },
            total_bytes: 80 << 30,
            bus_id: "0000:01:00.0".to_owned(),
            driver: (12, 8),
        })
    }

    #[test]
    fn reports_read_what_the_monitor_has_said_and_never_ask_it() {
        let clock = Arc::new(SystemClock::start());
        let now = clock.micros();
        let figures =
            Seen { free_bytes: Some(7), utilization: Some(0.25), temperature: Some(40), power_watts: Some(300.5) };
        let n_looks = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_looks);
        let look = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            figures
        };
        let context = DriverContext {
            clock: Arc::clone(&clock),
            recorder: Recorder::new(16),
            metrics: Arc::new(Metrics::new()),
            longest_step: LONGEST_STEP,
        };
        let driver = DriverHandle::start(("test", 3), Vec::new(), (1, 1), context).expect("a thread");
        let monitor = Monitor::start_every(HOUR, "test", clock, look).expect("a thread");
        let device =
            ServingDevice { place: gpu(), driver, monitor: Some(monitor), pool_bound: AtomicU64::new(u64::MAX) };
        let served = Served { catalog: Arc::default(), homes: HashMap::new(), encoders: HashMap::new() };
        // The first look is on its way.
        while device.report(0, &served, now).temperature.is_none() {
            std::thread::yield_now();
        }
        for _ in 0..100 {
            let report = device.report(0, &served, now);
            assert_eq!((report.memory.free, report.memory.total), (Some(7), Some(80 << 30)));
            let shown = (report.utilization, report.temperature, report.power_watts);
            assert_eq!(shown, (Some(0.25), Some(40), Some(300.5)));
            assert_eq!(device.state(), DeviceState { index: 2, name: "cuda:1".to_owned(), is_up: true });
        }
        assert_eq!(n_looks.load(Ordering::Relaxed), 1);
        device.driver.stop();
        assert!(!device.state().is_up);
        // Who has no monitor has the share that its replicas say, and what the device is known to have.
        let device = ServingDevice { monitor: None, ..device };
        let report = device.report(0, &served, now);
        assert_eq!((report.memory.free, report.memory.total), (None, Some(80 << 30)));
        assert_eq!((report.utilization, report.temperature, report.power_watts), (Some(0.0), None, None));
    }
}
