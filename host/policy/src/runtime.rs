//! The runtime: admits components, prepares generations for slots, and tends the slots.
//!
//! Everything slow happens here, on the caller's thread (an admin request, start-up) or on the maintenance thread:
//! compiling, instantiating, initializing, probing, warming, freeing. What serving threads touch is in the slots.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use pointsman_sched::admit::Verdict;
use pointsman_sched::route::Choice;
use pointsman_telemetry::{Metrics, Micros, Recorder};
use wasmtime::Engine;
use wasmtime::component::Linker;

use crate::admission::{self, AdmissionHook, AdmissionQuestion, AdmissionSlot};
use crate::compile::{CacheError, Compiler};
use crate::component::{Code, Component};
use crate::config::{BudgetChange, BudgetError, Limits, Maintenance, OnFault, RuntimeConfig};
use crate::endings::MAX_ENDINGS;
use crate::engine::{self, Allocation, stopwatch_ns};
use crate::fault::{Call, Fault};
use crate::handover::{Handed, Handover, Inheritance, NotHandedOver, Snapshot};
use crate::host::{Host, LogGate, MetricSink, linker};
use crate::instance::{Hook, Maker, ProbeFault, Ready, StartError, new_store};
use crate::manifest::{Manifest, ManifestError};
use crate::retention::{RetentionHook, RetentionSlot};
use crate::router::{self, RouterHook, RouterQuestion, RouterSlot};
use crate::sampler::{SamplerHook, SamplerSlot};
use crate::scheduler::{SchedulerHook, SchedulerSlot};
use crate::slot::{Prepared, SlotCore, Tend};
use crate::state::{Sharing, StateStore, StateView};
use crate::telemetry::{TelemetryHook, TelemetrySlot};
use crate::ticker::Ticker;
use crate::upload::{Digest, UploadError, World, identify, shorten, to_component};
use crate::versions;

/// Longest configuration of a policy, in bytes.
const MAX_CONFIG: usize = 256 << 10;
/// How often maintenance looks when nobody wakes it: the resolution of respawn times.
const MAINTENANCE_PERIOD: Duration = Duration::from_millis(50);
/// Instances of a telemetry generation: one works, one is the spare.
const TELEMETRY_INSTANCES: u32 = 2;
/// Spares of a generation with one instance per replica, beside those.
const RESIDENT_SPARES: u32 = 1;

/// The clock of the host: microseconds, monotonic, as in every seam.
pub type Clock = Arc<dyn Fn() -> Micros + Send + Sync>;

/// What all parts of the runtime share.
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) ticker: Ticker,
    pub(crate) config: RuntimeConfig,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) recorder: Recorder,
    pub(crate) clock: Clock,
    /// Whether the native policy decides in every slot, whatever is published there.
    pub(crate) bypassed: AtomicBool,
    pub(crate) states: StateStore,
    maintainer: OnceLock<Thread>,
    /// Where maintenance is by hand: what would be done by threads of the runtime.
    chores: Mutex<Vec<Chore>>,
}

/// Does what there is to do; false once nobody can send more.
type Chore = Box<dyn FnMut() -> bool + Send>;

/// Where guests come from. Dropping it ends its threads; slots that are still held keep serving.
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    linker: Linker<Host>,
    compiler: Compiler,
    allocation: Allocation,
    /// Components that someone still holds.
    known: Mutex<HashMap<Digest, Weak<Code>>>,
    slots: Mutex<Vec<Weak<dyn Tend>>>,
}

/// What a slot is asked to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activation {
    /// The slot, as in `router`.
    pub slot: String,
    /// Its next generation.
    pub generation: u64,
    /// JSON text for `init`; `{}` when there is none.
    pub config: String,
    /// Name of the host-state namespace; `None` for the slot's own.
    pub namespace: Option<String>,
    /// What it will be, and so whose host-state its first `init` meets.
    pub role: Role,
    /// What it may take for a decision, where that is not the host's default.
    pub budget: BudgetChange,
    /// Whether it may start without what the active policy knows.
    pub handover: Handover,
    /// Whether requests go on of which it says nothing.
    pub on_fault: OnFault,
}

/// What a generation is prepared for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// To be published: it has the namespace itself.
    #[default]
    Active,
    /// To be staged: it has a copy of the namespace, unless that is one that the operator named.
    Candidate,
    /// To be staged and asked on the side: it reads through (an admission policy has a copy), and what it writes is thrown away,
    /// promoted or not.
    Shadow,
    /// To be thrown away: as a candidate, and nobody who serves is asked to hand over.
    Trial,
}

/// What a component says it is ([`Runtime::inspect`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Of its bytes.
    pub digest: Digest,
    /// Which hook it implements.
    pub world: World,
    /// The package it was built against, as in `pointsman:policy@0.1.0`.
    pub package: Arc<str>,
    /// Interfaces that it imports.
    pub imports: Vec<String>,
}

/// Why the runtime did not start.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// wasmtime refuses this machine or configuration.
    #[error("the wasm engine cannot start: {detail}")]
    Engine {
        /// In its words.
        detail: String,
    },
    /// A value out of its bounds.
    #[error("{key} is {value} and must lie between 1 and {most}")]
    Config {
        /// The key.
        key: &'static str,
        /// Its value.
        value: usize,
        /// The bound.
        most: usize,
    },
    /// The cache directory is not usable.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Why a generation was not prepared. The slot keeps what it has.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The host has no such slot: the caller's fault.
    #[error(
        "there is no slot `{slot}`; slots are admission, router, scheduler, kv-retention, sampler and telemetry.<name>"
    )]
    UnknownSlot {
        /// Its name.
        slot: String,
    },
    /// The component implements another hook: the caller's fault.
    #[error("the slot {slot} runs a {needs}, and the component is a {found}")]
    WrongWorld {
        /// The slot.
        slot: String,
        /// What it runs.
        needs: World,
        /// What the component is.
        found: World,
    },
    /// The configuration is too long: the caller's fault.
    #[error("the configuration has {size} bytes and the limit is {limit}")]
    ConfigTooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The guest refused its configuration, in its own words.
    #[error("the policy refused its configuration: {message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// The manifest is not acceptable: the guest's fault.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The guest faulted while it started.
    #[error("the policy failed in {}: {fault}", .call.as_str())]
    Start {
        /// In which call.
        call: Call,
        /// How.
        fault: Fault,
    },
    /// The guest faulted, or answered nonsense, on made-up inputs.
    #[error("the policy failed the probe `{case}` in {}: {fault}", .call.as_str())]
    Probe {
        /// Which inputs.
        case: &'static str,
        /// In which call.
        call: Call,
        /// How.
        fault: Fault,
    },
    /// The budget is out of bounds: the caller's fault.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// It must not start without what the active policy knows, and has to.
    #[error(
        "the policy was to start with what the active one knows (`handover`: `require`), and cannot: {why}; activate it with \
         `handover`: `cold` to start without"
    )]
    NotHandedOver {
        /// Why.
        why: String,
    },
    /// Another hook has the native policy to fall back to: the caller's fault.
    #[error(
        "`on_fault`: `closed` is for the slot sampler; in the slot {slot} the native policy decides where this one fails"
    )]
    NotClosable {
        /// The slot.
        slot: String,
    },
    /// All host-state namespaces are in use: the host's limit.
    #[error("all host-state namespaces are in use; share one (`state_namespace`) or free a slot")]
    NoNamespace,
}

// === impl Shared ===

impl Shared {
    /// Lets maintenance look now instead of at its next period.
    pub(crate) fn wake(&self) {
        if let Some(thread) = self.maintainer.get() {
            thread.unpark();
        }
    }

    /// Lets a view work on a copy from now on.
    pub(crate) fn fork(&self, view: &StateView) {
        view.fork(self.states.number(), (self.clock)());
    }

    /// Does `work` with what is sent, on a thread of its own that ends with the last sender. At most `bound` things wait.
    /// Where maintenance is by hand there is no thread, and maintenance does it.
    pub(crate) fn hire<T: Send + 'static>(
        &self,
        name: &str,
        bound: usize,
        mut work: impl FnMut(T) + Send + 'static,
    ) -> std::io::Result<SyncSender<T>> {
        let (send, receive) = sync_channel(bound);
        match self.config.maintenance {
            Maintenance::Thread => {
                let run = move || receive.iter().for_each(work);
                std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
            }
            Maintenance::Manual => {
                let chore = move || loop {
                    match receive.try_recv() {
                        Ok(thing) => work(thing),
                        Err(error) => return error == TryRecvError::Empty,
                    }
                };
                self.chores().push(Box::new(chore));
            }
        }
        Ok(send)
    }

    fn chores(&self) -> MutexGuard<'_, Vec<Chore>> {
        self.chores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what was hired for, where maintenance is by hand.
    fn do_chores(&self) {
        let mut chores = std::mem::take(&mut *self.chores());
        chores.retain_mut(|chore| chore());
        self.chores().append(&mut chores);
    }
}

// === impl Runtime ===

impl Runtime {
    /// Starts the engine, its ticker and, if configured, maintenance.
    ///
    /// # Errors
    /// The configuration is out of bounds, the cache directory is not private, or the machine refuses.
    pub fn new(
        config: RuntimeConfig,
        metrics: Arc<Metrics>,
        recorder: Recorder,
        clock: Clock,
    ) -> Result<Self, RuntimeError> {
        check_bounds(&config)?;
        let refused = |error: wasmtime::Error| RuntimeError::Engine { detail: shorten(&format!("{error:#}")) };
        let (engine, allocation) = engine::host(config.max_instances).map_err(refused)?;
        let ticker = Ticker::start(&engine)?;
        let linker = linker(&engine).map_err(refused)?;
        let compiler =
            Compiler::new(&engine, config.compile.clone(), config.cache_dir.as_deref(), config.cache_entries)?;
        let shared = Arc::new(Shared {
            engine,
            ticker,
            config,
            metrics,
            recorder,
            clock,
            bypassed: AtomicBool::new(false),
            states: StateStore::default(),
            maintainer: OnceLock::new(),
            chores: Mutex::default(),
        });
        let inner =
            Arc::new(Inner { linker, compiler, allocation, known: Mutex::default(), slots: Mutex::default(), shared });
        if inner.shared.config.maintenance == Maintenance::Thread {
            start_maintenance(&inner)?;
        }
        Ok(Self { inner })
    }

    /// How instances get their memory on this machine.
    #[must_use]
    pub fn allocation(&self) -> Allocation {
        self.inner.allocation
    }

    /// Checks, compiles and type-checks an upload. Idempotent; blocks for the time of a compilation.
    ///
    /// # Errors
    /// What is wrong with the upload, or that the host is busy; see [`UploadError::is_busy`].
    pub fn admit(&self, bytes: &[u8]) -> Result<Component, UploadError> {
        let started = stopwatch_ns();
        let inner = &*self.inner;
        let mut encoded = to_component(bytes, inner.shared.config.max_upload_bytes)?;
        let digest = Digest::of(bytes);
        let identity = identify(&encoded)?;
        versions::lift(&mut encoded, &identity.outdated_digits);
        let (code, cached) = match inner.known(&digest) {
            Some(code) => (code, true),
            None => {
                let compiled = inner.compiler.compile(&inner.shared.engine, &Digest::of(&encoded), &encoded)?;
                let code = Arc::new(inner.link((identity.world, identity.hands_over), &compiled.component)?);
                inner.remember(&digest, &code);
                (code, compiled.cached)
            }
        };
        Ok(Component {
            digest,
            world: identity.world,
            package: identity.package,
            size: bytes.len() as u64,
            compile_ms: (stopwatch_ns() - started) as f64 * 1e-6,
            cached,
            code,
        })
    }

    /// What a component says it is, without compiling it.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn inspect(&self, bytes: &[u8]) -> Result<Inspected, UploadError> {
        let encoded = to_component(bytes, self.inner.shared.config.max_upload_bytes)?;
        let identity = identify(&encoded)?;
        Ok(Inspected {
            digest: Digest::of(bytes),
            world: identity.world,
            package: identity.package,
            imports: identity.imports,
        })
    }

    /// [`admit`](Self::admit) for bytes from the host's own store: they must still have the digest they were stored under.
    ///
    /// # Errors
    /// As `admit`, or the store is damaged.
    pub fn load(&self, expected: &Digest, bytes: &[u8]) -> Result<Component, UploadError> {
        let found = Digest::of(bytes);
        if found != *expected {
            return Err(UploadError::WrongDigest { expected: expected.clone(), found });
        }
        self.admit(bytes)
    }

    /// Makes a generation ready to be published: instances started, manifest checked, answers probed, everything warm.
    /// Blocks for as long as that takes; nothing that serves is touched.
    ///
    /// # Errors
    /// What the guest or the caller did wrong.
    pub fn prepare(&self, component: &Component, activation: Activation) -> Result<Prepared, ActivateError> {
        let Activation { slot, config, .. } = &activation;
        let needs = World::of_slot(slot).ok_or_else(|| ActivateError::UnknownSlot { slot: slot.clone() })?;
        if needs != component.world {
            return Err(ActivateError::WrongWorld { slot: slot.clone(), needs, found: component.world });
        }
        if activation.on_fault == OnFault::Closed && needs != World::Sampler {
            return Err(ActivateError::NotClosable { slot: slot.clone() });
        }
        if config.len() > MAX_CONFIG {
            return Err(ActivateError::ConfigTooLarge { size: config.len(), limit: MAX_CONFIG });
        }
        // Generations that have drained give their instances back to the pool first.
        self.maintain();
        match needs {
            World::Admission => self.inner.prepare::<AdmissionHook>(component, activation),
            World::Router => self.inner.prepare::<RouterHook>(component, activation),
            World::Scheduler => self.inner.prepare::<SchedulerHook>(component, activation),
            World::Telemetry => self.inner.prepare::<TelemetryHook>(component, activation),
            World::Retention => self.inner.prepare::<RetentionHook>(component, activation),
            World::Sampler => self.inner.prepare::<SamplerHook>(component, activation),
        }
    }

    /// What a router would say to these inputs. It gets a fresh instance, an empty host-state and no metrics, and is thrown
    /// away: nothing that serves, learns or counts is touched.
    ///
    /// # Errors
    /// It does not start, or faults; the same that would keep it from being activated.
    pub fn ask_router(
        &self,
        component: &Component,
        activation: &Activation,
        question: RouterQuestion<'_>,
    ) -> Result<Choice, ActivateError> {
        let log = Arc::new(LogGate::new(activation.slot.as_str().into()));
        let maker = self.inner.maker::<RouterHook>(component, activation, log)?;
        let (mut instance, manifest) = maker.start()?;
        let wants = manifest.check(World::Router, &self.inner.shared.config.replica_labels)?;
        let budget = maker.budgets.route;
        let answer = router::answer(&mut instance, budget.hard, &wants, question);
        answer.map_err(|fault| ActivateError::Start { call: Call::Route, fault })
    }

    /// Asks an admission policy one question, as [`ask_router`](Self::ask_router) does a router.
    ///
    /// # Errors
    /// It does not start, or faults.
    pub fn ask_admission(
        &self,
        component: &Component,
        activation: &Activation,
        question: AdmissionQuestion<'_>,
    ) -> Result<Verdict, ActivateError> {
        let log = Arc::new(LogGate::new(activation.slot.as_str().into()));
        let maker = self.inner.maker::<AdmissionHook>(component, activation, log)?;
        let (mut instance, manifest) = maker.start()?;
        let wants = manifest.check(World::Admission, &self.inner.shared.config.replica_labels)?;
        let budget = maker.budgets.admit;
        let answer = admission::answer(&mut instance, budget.hard, &wants, question);
        answer.map_err(|fault| ActivateError::Start { call: Call::Admit, fault })
    }

    /// An admission slot.
    #[must_use]
    pub fn admission_slot(&self, name: &str) -> Arc<AdmissionSlot> {
        Arc::new(AdmissionSlot {
            core: self.inner.slot::<AdmissionHook>(name),
            endings: ArrayQueue::new(MAX_ENDINGS),
            ledger: Mutex::default(),
            forgotten: AtomicU64::new(0),
        })
    }

    /// A router slot.
    #[must_use]
    pub fn router_slot(&self, name: &str) -> Arc<RouterSlot> {
        Arc::new(RouterSlot { core: self.inner.slot::<RouterHook>(name) })
    }

    /// A scheduler slot.
    #[must_use]
    pub fn scheduler_slot(&self, name: &str) -> Arc<SchedulerSlot> {
        Arc::new(SchedulerSlot { core: self.inner.slot::<SchedulerHook>(name) })
    }

    /// A retention slot.
    #[must_use]
    pub fn retention_slot(&self, name: &str) -> Arc<RetentionSlot> {
        Arc::new(RetentionSlot { core: self.inner.slot::<RetentionHook>(name) })
    }

    /// A sampler slot.
    #[must_use]
    pub fn sampler_slot(&self, name: &str) -> Arc<SamplerSlot> {
        Arc::new(SamplerSlot { core: self.inner.slot::<SamplerHook>(name) })
    }

    /// A telemetry slot.
    #[must_use]
    pub fn telemetry_slot(&self, name: &str) -> Arc<TelemetrySlot> {
        Arc::new(TelemetrySlot { core: self.inner.slot::<TelemetryHook>(name), buffers: Mutex::default() })
    }

    /// What a guest of `world` may take.
    ///
    /// # Errors
    /// The change is out of bounds.
    pub fn limits(&self, world: World, change: BudgetChange) -> Result<Limits, BudgetError> {
        self.inner.shared.config.limits(world, change)
    }

    /// Makes the native policy decide in every slot from the next call on, or lets the published ones decide again. What is
    /// published or staged meanwhile stays warm and waits.
    pub fn bypass(&self, on: bool) {
        self.inner.shared.bypassed.store(on, Ordering::Relaxed);
    }

    /// Frees what has drained and starts what is missing, until there is nothing to do now; for [`Maintenance::Manual`], does
    /// also what the runtime has threads for otherwise. Harmless at any time.
    pub fn maintain(&self) {
        self.inner.maintain();
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Maintenance holds a weak reference: woken, it finds nothing to hold on to and ends.
        self.inner.shared.wake();
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("config", &self.inner.shared.config)
            .field("allocation", &self.inner.allocation)
            .finish_non_exhaustive()
    }
}

fn check_bounds(config: &RuntimeConfig) -> Result<(), RuntimeError> {
    let bounds = [
        ("memory_bytes", config.memory_bytes, RuntimeConfig::MAX_MEMORY_BYTES),
        ("max_instances", config.max_instances as usize, 1 << 16),
        ("router_instances", config.router_instances as usize, crate::generation::MAX_INSTANCES - 1),
        ("max_upload_bytes", config.max_upload_bytes, 1 << 30),
    ];
    let (value, most) = (config.replica_labels.len(), crate::manifest::MAX_LABELS);
    if value > most {
        return Err(RuntimeError::Config { key: "replica_labels", value, most });
    }
    match bounds.into_iter().find(|(_, value, most)| *value == 0 || value > most) {
        Some((key, value, most)) => Err(RuntimeError::Config { key, value, most }),
        None => Ok(()),
    }
}

fn start_maintenance(inner: &Arc<Inner>) -> std::io::Result<()> {
    let weak = Arc::downgrade(inner);
    let thread = std::thread::Builder::new().name("policy-tend".into()).spawn(move || {
        while let Some(inner) = weak.upgrade() {
            inner.maintain();
            drop(inner);
            std::thread::park_timeout(MAINTENANCE_PERIOD);
        }
    })?;
    let _ = inner.shared.maintainer.set(thread.thread().clone());
    Ok(())
}

// === impl Inner ===

impl Inner {
    fn known(&self, digest: &Digest) -> Option<Arc<Code>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(digest)?.upgrade()
    }

    fn remember(&self, digest: &Digest, code: &Arc<Code>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, code| code.strong_count() > 0);
        known.insert(digest.clone(), Arc::downgrade(code));
    }

    /// Checks imports by linking and exports by instantiating once: wasmtime compares their types when it looks them up.
    fn link(
        &self,
        (world, hands_over): (World, bool),
        component: &wasmtime::component::Component,
    ) -> Result<Code, UploadError> {
        let refused = |error: wasmtime::Error| UploadError::Link { detail: shorten(&format!("{error:#}")) };
        let pre = self.linker.instantiate_pre(component).map_err(refused)?;
        let code = Code::new(world, hands_over, pre).map_err(refused)?;
        match world {
            World::Admission => self.try_out::<AdmissionHook>(&code),
            World::Router => self.try_out::<RouterHook>(&code),
            World::Scheduler => self.try_out::<SchedulerHook>(&code),
            World::Telemetry => self.try_out::<TelemetryHook>(&code),
            World::Retention => self.try_out::<RetentionHook>(&code),
            World::Sampler => self.try_out::<SamplerHook>(&code),
        }
        .map_err(refused)?;
        Ok(code)
    }

    fn try_out<H: Hook>(&self, code: &Code) -> wasmtime::Result<()> {
        let Some(linked) = H::linked(code) else { return Ok(()) };
        let now = (self.shared.clock)();
        let log = Arc::new(LogGate::new(H::WORLD.as_str().into()));
        let host = Host::new(RuntimeConfig::MAX_MEMORY_BYTES, log, None, Arc::default(), now);
        linked.instantiate::<H>(&mut new_store::<H>(&self.shared, host)).map(drop)
    }

    fn slot<H: Hook>(&self, name: &str) -> Arc<SlotCore<H>> {
        let slot = Arc::new(SlotCore::new(name.into(), Arc::clone(&self.shared), self.least_instances::<H>()));
        let tended: Arc<dyn Tend> = Arc::clone(&slot) as Arc<dyn Tend>;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|slot| slot.strong_count() > 0);
        slots.push(Arc::downgrade(&tended));
        slot
    }

    /// Instances of a generation, beside those of attached replicas.
    fn least_instances<H: Hook>(&self) -> u32 {
        match H::WORLD {
            World::Admission | World::Router => self.shared.config.router_instances + 1,
            World::Scheduler | World::Retention | World::Sampler => RESIDENT_SPARES,
            World::Telemetry => TELEMETRY_INSTANCES,
        }
    }

    fn slots(&self) -> Vec<Arc<dyn Tend>> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.iter().filter_map(Weak::upgrade).collect()
    }

    fn maintain(&self) {
        self.shared.do_chores();
        let slots = self.slots();
        slots.iter().for_each(|slot| slot.free());
        slots.iter().for_each(|slot| slot.respawn((self.shared.clock)()));
    }

    fn prepare<H: Hook>(&self, component: &Component, activation: Activation) -> Result<Prepared, ActivateError> {
        let started = stopwatch_ns();
        let name: Arc<str> = activation.slot.as_str().into();
        let slot = self.slots().into_iter().find(|slot| *slot.name() == name && slot.world() == H::WORLD);
        let wanted = slot.as_ref().map_or_else(|| self.least_instances::<H>(), |slot| slot.wanted());
        let gate = || Arc::new(LogGate::new(Arc::clone(&name)));
        let log = slot.as_ref().map_or_else(gate, |slot| Arc::clone(slot.log()));
        let mut maker = self.maker::<H>(component, &activation, log)?;
        // The first instance is only asked questions: it has no metrics and a state of its own, and is thrown away.
        let (manifest, wants) = self.probe(&maker)?;
        let revision = manifest.revision(&component.digest);
        let sharing = if activation.namespace.is_some() { Sharing::Named } else { Sharing::Slot };
        let namespace = activation.namespace.map_or_else(|| Arc::clone(&name), Into::into);
        let live = self.shared.states.open(&namespace, manifest.state_schema).ok_or(ActivateError::NoNamespace)?;
        maker.state = Arc::new(StateView::new(live, sharing));
        match activation.role {
            Role::Active => {}
            Role::Candidate | Role::Trial => self.shared.fork(&maker.state),
            // By the time that it is asked, the active policy has counted the request in what an overlay would read.
            Role::Shadow if H::WORLD == World::Admission => {
                maker.state.draft(self.shared.states.number(), (self.shared.clock)());
            }
            Role::Shadow => maker.state.overlay(),
        }
        maker.sink = Some(MetricSink {
            metrics: Arc::clone(&self.shared.metrics),
            slot: Arc::clone(&name),
            revision: Arc::clone(&revision),
        });
        maker.next = AtomicU32::new(0);
        let instances = (0..wanted).map(|_| maker.start_again(&manifest)).collect::<Result<Vec<_>, _>>()?;
        let mut ready = Ready {
            maker,
            manifest,
            wants,
            revision: Arc::clone(&revision),
            instances,
            parked: Vec::new(),
            inherited: None,
        };
        // As late as can be: what the active policy learns from here on is lost.
        ready.inherit(slot.as_deref(), (activation.role, activation.handover))?;
        ready.warm()?;
        let generation = activation.generation;
        let summary = ready.manifest.summary.as_str().into();
        let inherited = ready.inherited.clone();
        let warm_ms = (stopwatch_ns() - started) as f64 * 1e-6;
        Ok(Prepared { slot: name, revision, summary, generation, warm_ms, inherited, ready: H::wrap(ready) })
    }

    /// Starts instances without metrics and with a state of their own.
    fn maker<H: Hook>(
        &self,
        component: &Component,
        activation: &Activation,
        log: Arc<LogGate>,
    ) -> Result<Maker<H>, ActivateError> {
        let Some(linked) = H::linked(&component.code) else {
            return Err(ActivateError::UnknownSlot { slot: activation.slot.clone() });
        };
        Ok(Maker {
            shared: Arc::clone(&self.shared),
            linked: linked.clone(),
            slot: activation.slot.as_str().into(),
            generation: activation.generation,
            config: activation.config.as_str().into(),
            log,
            sink: None,
            state: Arc::default(),
            budgets: self.shared.config.budgets.changed(H::WORLD, activation.budget)?,
            memory_bytes: self.shared.config.memory(activation.budget)?,
            on_fault: activation.on_fault,
            next: AtomicU32::new(0),
        })
    }

    /// Starts an instance, checks its manifest and its answers to made-up inputs.
    fn probe<H: Hook>(&self, maker: &Maker<H>) -> Result<(Manifest, crate::manifest::Wants), ActivateError> {
        let (mut instance, manifest) = maker.start()?;
        let wants = manifest.check(H::WORLD, &self.shared.config.replica_labels)?;
        H::probe(&mut instance, &wants, &maker.budgets, (self.shared.clock)())?;
        Ok((manifest, wants))
    }
}

// === impl Ready ===

impl<H: Hook> Ready<H> {
    /// Has its instances restore what those of the active generation hand over. One that refuses or faults is replaced.
    fn inherit(&mut self, slot: Option<&dyn Tend>, (role, handover): (Role, Handover)) -> Result<(), ActivateError> {
        let refused = |why: String| match handover {
            Handover::Cold | Handover::Soon => Ok(why),
            Handover::Require => Err(ActivateError::NotHandedOver { why }),
        };
        if !self.maker.linked.hands_over() {
            return refused("it does not export pointsman:policy/handover".to_owned()).map(drop);
        }
        if role == Role::Trial {
            return Ok(());
        }
        let now = (self.maker.shared.clock)();
        let mut inherited = Inheritance::default();
        match slot.map_or(Err(NotHandedOver::Native), |slot| slot.hand_over(now, handover.patience_ns())) {
            Err(why) if why.is_harmless() => inherited.cold.push(why.to_string()),
            Err(why) => inherited.cold.push(refused(why.to_string())?),
            Ok(handed) => {
                for Handed { owner, what } in handed {
                    match self.take_over(&owner, what)? {
                        Ok(bytes) => {
                            inherited.restored += 1;
                            inherited.bytes += bytes;
                        }
                        Err(why) if why.is_harmless() => inherited.cold.push(format!("{owner}: {why}")),
                        Err(why) => inherited.cold.push(refused(format!("{owner}: {why}"))?),
                    }
                }
            }
        }
        self.inherited = Some(inherited);
        Ok(())
    }

    /// Restores for one owner: how many bytes, or why it starts cold.
    fn take_over(
        &mut self,
        owner: &Arc<str>,
        what: Result<Snapshot, NotHandedOver>,
    ) -> Result<Result<u64, NotHandedOver>, StartError> {
        let snapshot = match what {
            Ok(snapshot) => snapshot,
            Err(why) => return Ok(Err(why)),
        };
        let hard = self.maker.budgets.init.hard;
        let mut instance = match self.instances.pop() {
            Some(instance) => instance,
            None => self.maker.start_again(&self.manifest)?,
        };
        let why = match instance.restore(hard, (self.maker.shared.clock)(), &snapshot) {
            Ok(Ok(())) => {
                self.parked.push((Arc::clone(owner), instance));
                return Ok(Ok(snapshot.bytes.len() as u64));
            }
            Ok(Err(words)) => NotHandedOver::Refused(words),
            Err(fault) => NotHandedOver::Restore(fault),
        };
        drop(instance);
        self.instances.push(self.maker.start_again(&self.manifest)?);
        Ok(Err(why))
    }

    fn warm(&mut self) -> Result<(), StartError> {
        let Self { maker, wants, instances, parked, .. } = self;
        let parked = parked.iter_mut().map(|(_, instance)| instance);
        instances.iter_mut().chain(parked).try_for_each(|instance| maker.warm(instance, wants))
    }
}

// === impl ActivateError ===

impl From<StartError> for ActivateError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Refused(message) => Self::Refused { message },
            StartError::Fault(call, fault) => Self::Start { call, fault },
        }
    }
}

impl From<ProbeFault> for ActivateError {
    fn from(probe: ProbeFault) -> Self {
        Self::Probe { case: probe.case, call: probe.call, fault: probe.fault }
    }
}
