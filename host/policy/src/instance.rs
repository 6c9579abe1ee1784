//! One running guest: a store, its bindings, and the rules of every call into it.
//!
//! Also the seam between the three worlds and everything that does not care which one it is: [`Hook`]. An instance that
//! faulted is never called again: a trap leaves its memory in the middle of something.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pointsman_telemetry::Micros;
use wasmtime::Store;

use crate::bindings::handover::exports::pointsman::policy::handover as wit;
use crate::component::{Code, Exports, Linked};
use crate::config::{Budgets, OnFault};
use crate::fault::{Call, Fault, FaultKind, truncate};
use crate::handover::{Inheritance, MAX_SNAPSHOT_BYTES, Snapshot};
use crate::host::{Host, LogGate, MetricSink};
use crate::manifest::{Manifest, Wants};
use crate::runtime::Shared;
use crate::shadow::Case;
use crate::state::StateView;
use crate::ticker::Ticker;
use crate::upload::World;

/// Longest message of a guest that refuses its configuration, or what it is handed, in bytes.
const MAX_REFUSAL: usize = 1_024;

/// What the worlds differ in.
pub(crate) trait Hook: Sized + Send + Sync + 'static {
    const WORLD: World;
    /// Bytes that one call may move from the guest to the host: a longer list is refused before it is copied.
    const MAX_ANSWER_BYTES: usize;
    /// Where a component has the interface of this world.
    type Indices: Clone + Send + Sync;
    /// The interface of an instance.
    type Bindings: Send;
    /// What the host keeps per instance.
    type Local: Default + Send;
    /// What a shadow is told: the inputs of a decision, with the answer that was used.
    type Sample: Send + 'static;
    /// What the shadow's thread keeps between samples.
    type Memory: Default + Send + 'static;
    /// An answer of a shadow that is kept for whoever asks about the request.
    type Answer: Clone + Send + 'static;
    /// The ways in which a shadow's answer may differ; none where the slot takes no shadow.
    const DIFFERENCES: &'static [&'static str] = &[];

    fn linked(code: &Code) -> Option<&Linked<Self::Indices>>;
    fn load(
        indices: &Self::Indices,
        store: &mut Store<Host>,
        instance: &wasmtime::component::Instance,
    ) -> wasmtime::Result<Self::Bindings>;
    /// Calls the hook with made-up inputs and checks its answers.
    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault>;
    /// Touches what the first real call would touch, where that leaves no trace in the guest.
    fn warm(_instance: &mut Instance<Self>, _wants: &Wants, _budgets: &Budgets, _now: Micros) -> Result<(), Fault> {
        Ok(())
    }
    /// Has a candidate answer what the active policy has decided, and compares.
    fn shadow(_case: &Case<Self>, _memory: &mut Self::Memory, _sample: Self::Sample) {}
    /// The same while nothing is to be asked: what came before says nothing any more of what comes after.
    fn shadow_paused(case: &Case<Self>, memory: &mut Self::Memory, _sample: Self::Sample) {
        case.skipped(memory, 1);
    }
    fn wrap(ready: Ready<Self>) -> AnyReady;
    fn unwrap(ready: AnyReady) -> Option<Ready<Self>>;
}

/// What `init` answered: a manifest, or the guest's words for why not.
pub(crate) type Initialized = wasmtime::Result<Result<Manifest, String>>;

/// Arguments of `init`.
pub(crate) struct InitInfo<'a> {
    pub(crate) config: &'a str,
    pub(crate) slot: &'a str,
    pub(crate) generation: u64,
    pub(crate) instance: u32,
    pub(crate) columns: &'a [&'a str],
}

/// Made-up inputs showed a fault.
#[derive(Debug)]
pub(crate) struct ProbeFault {
    /// Which inputs.
    pub(crate) case: &'static str,
    pub(crate) call: Call,
    pub(crate) fault: Fault,
}

/// A running guest.
pub(crate) struct Instance<H: Hook> {
    store: Store<Host>,
    ticker: Ticker,
    exports: Exports<H::Bindings>,
    pub(crate) local: H::Local,
    pub(crate) calls: u64,
    pub(crate) number: u32,
    /// Linear memory when it was ready, in bytes.
    ready_bytes: usize,
}

/// Makes the instances of one generation.
pub(crate) struct Maker<H: Hook> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) linked: Linked<H::Indices>,
    pub(crate) slot: Arc<str>,
    pub(crate) generation: u64,
    pub(crate) config: Arc<str>,
    pub(crate) log: Arc<LogGate>,
    pub(crate) sink: Option<MetricSink>,
    pub(crate) state: Arc<StateView>,
    /// Those of the host, with what the activation changed.
    pub(crate) budgets: Budgets,
    /// Of one instance, the same.
    pub(crate) memory_bytes: usize,
    pub(crate) on_fault: OnFault,
    pub(crate) next: AtomicU32,
}

/// Why an instance did not start.
#[derive(Debug)]
pub(crate) enum StartError {
    Fault(Call, Fault),
    /// `init` returned an error.
    Refused(String),
}

/// A generation's guest before it is published.
pub(crate) struct Ready<H: Hook> {
    pub(crate) maker: Maker<H>,
    pub(crate) manifest: Manifest,
    pub(crate) wants: Wants,
    pub(crate) revision: Arc<str>,
    pub(crate) instances: Vec<Box<Instance<H>>>,
    /// Those that were handed something, by whose they will be.
    pub(crate) parked: Vec<(Arc<str>, Box<Instance<H>>)>,
    pub(crate) inherited: Option<Inheritance>,
}

/// The same, of any world.
pub(crate) enum AnyReady {
    Admission(Box<Ready<crate::admission::AdmissionHook>>),
    Router(Box<Ready<crate::router::RouterHook>>),
    Scheduler(Box<Ready<crate::scheduler::SchedulerHook>>),
    Telemetry(Box<Ready<crate::telemetry::TelemetryHook>>),
    Retention(Box<Ready<crate::retention::RetentionHook>>),
    Sampler(Box<Ready<crate::sampler::SamplerHook>>),
}

// === impl Instance ===

impl<H: Hook> Instance<H> {
    /// Calls into the guest: at most `hard` microseconds of CPU time, the time `now` for its log lines.
    #[inline]
    pub(crate) fn call<R>(
        &mut self,
        hard: Micros,
        now: Micros,
        call: impl FnOnce(&H::Bindings, &mut Store<Host>) -> wasmtime::Result<R>,
    ) -> Result<R, Fault> {
        self.calls += 1;
        self.start_clock(hard, now);
        call(&self.exports.hook, &mut self.store).map_err(|error| Fault::of_call(&error))
    }

    fn init(&mut self, hard: Micros, now: Micros, info: &InitInfo<'_>) -> Result<Result<Manifest, String>, Fault> {
        self.start_clock(hard, now);
        self.exports.lifecycle.init(&mut self.store, info).map_err(|error| Fault::of_call(&error))
    }

    /// What it hands over, if its component exports that and there is something.
    pub(crate) fn take_snapshot(&mut self, hard: Micros, now: Micros) -> Result<Option<Snapshot>, Fault> {
        self.start_clock(hard, now);
        let Some(handover) = &self.exports.handover else { return Ok(None) };
        // The bound of this one call: what may be handed over and a little more, so that it is known how much there was.
        self.store.set_hostcall_fuel(4 * MAX_SNAPSHOT_BYTES);
        let answer = handover.pointsman_policy_handover().call_take_snapshot(&mut self.store);
        self.store.set_hostcall_fuel(H::MAX_ANSWER_BYTES);
        let Some(wit::SnapshotResult { schema, bytes }) = answer.map_err(|error| Fault::of_call(&error))? else {
            return Ok(None);
        };
        if bytes.len() > MAX_SNAPSHOT_BYTES {
            let text = format!("a snapshot of {} bytes; at most {MAX_SNAPSHOT_BYTES} are possible", bytes.len());
            return Err(Fault::new(FaultKind::BadAnswer, text));
        }
        Ok(Some(Snapshot { schema, bytes }))
    }

    /// Hands it what another one gave. It may refuse, in its own words.
    pub(crate) fn restore(
        &mut self,
        hard: Micros,
        now: Micros,
        snapshot: &Snapshot,
    ) -> Result<Result<(), String>, Fault> {
        self.start_clock(hard, now);
        let Some(handover) = &self.exports.handover else { return Ok(Ok(())) };
        let snapshot = wit::SnapshotParam { schema: snapshot.schema, bytes: &snapshot.bytes };
        let answer = handover.pointsman_policy_handover().call_restore(&mut self.store, snapshot);
        let mut answer = answer.map_err(|error| Fault::of_call(&error))?;
        self.ready_bytes = self.store.data().memory.bytes;
        if let Err(words) = &mut answer {
            truncate(words, MAX_REFUSAL);
        }
        Ok(answer)
    }

    #[inline]
    fn start_clock(&mut self, hard: Micros, now: Micros) {
        let host = self.store.data_mut();
        host.now = now;
        host.deadline.start(hard);
        self.store.set_epoch_deadline(1);
        self.ticker.heard();
    }

    /// Whether a fresh instance should take over: it served long enough, or its memory grew too far.
    pub(crate) fn is_worn(&self, recycle_calls: u64, recycle_growth: usize) -> bool {
        // Staggered, so that the instances of a pool that serve in turn do not all wear out in the same moment.
        let turn = u64::from(self.number % 8) * (recycle_calls / 16);
        self.calls >= recycle_calls.saturating_add(turn)
            || self.store.data().memory.bytes > self.ready_bytes.saturating_add(recycle_growth)
    }
}

impl<H: Hook> fmt::Debug for Instance<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("number", &self.number).field("calls", &self.calls).finish_non_exhaustive()
    }
}

// === impl Maker ===

impl<H: Hook> Maker<H> {
    /// Instantiates and initializes one more instance, within the init budget.
    pub(crate) fn start(&self) -> Result<(Box<Instance<H>>, Manifest), StartError> {
        let shared = &self.shared;
        let now = (shared.clock)();
        let host = Host::new(self.memory_bytes, Arc::clone(&self.log), self.sink.clone(), Arc::clone(&self.state), now);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut store = new_store::<H>(shared, host);
        let exports = self
            .linked
            .instantiate::<H>(&mut store)
            .map_err(|error| StartError::Fault(Call::Instantiate, Fault::of_instantiation(&error)))?;
        let (ticker, local) = (shared.ticker.clone(), H::Local::default());
        let mut instance = Box::new(Instance { store, ticker, exports, local, calls: 0, number, ready_bytes: 0 });
        let columns = crate::manifest::known_names(H::WORLD, &shared.config.replica_labels);
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let info = InitInfo {
            config: &self.config,
            slot: &self.slot,
            generation: self.generation,
            instance: number,
            columns: &columns,
        };
        let manifest = match instance.init(self.budgets.init.hard, now, &info) {
            Ok(Ok(manifest)) => manifest,
            Ok(Err(mut words)) => {
                truncate(&mut words, MAX_REFUSAL);
                return Err(StartError::Refused(words));
            }
            Err(fault) => return Err(StartError::Fault(Call::Init, fault)),
        };
        instance.ready_bytes = instance.store.data().memory.bytes;
        Ok((instance, manifest))
    }

    /// Like [`start`](Self::start), for a generation whose manifest is known: it must say the same again.
    pub(crate) fn start_equal(&self, manifest: &Manifest, wants: &Wants) -> Result<Box<Instance<H>>, StartError> {
        let mut instance = self.start_again(manifest)?;
        self.warm(&mut instance, wants)?;
        Ok(instance)
    }

    /// The same without warming it, because there is something to restore before.
    pub(crate) fn start_again(&self, manifest: &Manifest) -> Result<Box<Instance<H>>, StartError> {
        let (instance, again) = self.start()?;
        if again != *manifest {
            let text = format!("two instances of one generation returned different manifests: {manifest:?}, {again:?}");
            return Err(StartError::Fault(Call::Init, Fault::new(FaultKind::BadAnswer, text)));
        }
        Ok(instance)
    }

    pub(crate) fn warm(&self, instance: &mut Instance<H>, wants: &Wants) -> Result<(), StartError> {
        let now = (self.shared.clock)();
        H::warm(instance, wants, &self.budgets, now).map_err(|fault| StartError::Fault(Call::Init, fault))?;
        instance.calls = 0;
        Ok(())
    }
}

/// A store with its limits, whose epoch callback counts CPU time.
pub(crate) fn new_store<H: Hook>(shared: &Shared, host: Host) -> Store<Host> {
    let mut store = Store::new(&shared.engine, host);
    store.limiter(|host| &mut host.memory);
    store.set_hostcall_fuel(H::MAX_ANSWER_BYTES);
    let ticker = shared.ticker.clone();
    store.epoch_deadline_callback(move |mut store| {
        ticker.heard();
        Ok(store.data_mut().deadline.tick())
    });
    // Start functions run under the same budget as `init`.
    store.data_mut().deadline.start(shared.config.budgets.init.hard);
    store.set_epoch_deadline(1);
    shared.ticker.heard();
    store
}

// === impl StartError ===

impl StartError {
    /// The fault that it amounts to, for a generation that is already published.
    pub(crate) fn into_fault(self) -> (Call, Fault) {
        match self {
            Self::Fault(call, fault) => (call, fault),
            Self::Refused(words) => {
                (Call::Init, Fault::new(FaultKind::BadAnswer, format!("init refused its configuration: {words}")))
            }
        }
    }
}

/// Implements the parts of [`Hook`] that the generated bindings of every world have under their own names.
macro_rules! hook_bindings {
    ($variant:ident, $interface:ident, $indices:ident, $bindings:ident) => {
        crate::instance::hook_bindings!($variant, $interface, $indices, $bindings, std::convert::Infallible, (), ());
    };
    ($variant:ident, $interface:ident, $indices:ident, $bindings:ident, $sample:ty, $memory:ty, $answer:ty) => {
        type Sample = $sample;
        type Memory = $memory;
        type Answer = $answer;
        type Indices = crate::bindings::$interface::$indices;
        type Bindings = crate::bindings::$interface::$bindings;

        fn linked(code: &crate::component::Code) -> Option<&crate::component::Linked<Self::Indices>> {
            match code {
                crate::component::Code::$variant(linked) => Some(linked),
                _ => None,
            }
        }

        fn load(
            indices: &Self::Indices,
            store: &mut wasmtime::Store<crate::host::Host>,
            instance: &wasmtime::component::Instance,
        ) -> wasmtime::Result<Self::Bindings> {
            indices.load(store, instance)
        }

        fn wrap(ready: crate::instance::Ready<Self>) -> crate::instance::AnyReady {
            crate::instance::AnyReady::$variant(Box::new(ready))
        }

        fn unwrap(ready: crate::instance::AnyReady) -> Option<crate::instance::Ready<Self>> {
            match ready {
                crate::instance::AnyReady::$variant(ready) => Some(*ready),
                _ => None,
            }
        }
    };
}
pub(crate) use hook_bindings;
