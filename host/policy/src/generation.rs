//! One generation of a slot: a revision with its configuration, its instances, its circuit and its counters.
//!
//! Serving threads take an instance from a lock-free queue and put it back; whoever meets a fault counts it and leaves the
//! rest (replacing, freeing) to maintenance. No lock is held while a guest runs. A generation without a guest is the
//! native policy.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_queue::ArrayQueue;
use pointsman_sched::route::{DecidedBy, Fallback};
use pointsman_telemetry::{Event, EventKind, Metrics, Micros, SlotMetrics};

use crate::circuit::{Admit, Circuit, Health};
use crate::config::{Budget, Budgets};
use crate::drain::Gate;
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind, FaultReport};
use crate::instance::{Hook, Instance, Maker, Ready};
use crate::manifest::{Manifest, Wants};
use crate::state::StateView;

/// Most instances of one generation.
pub(crate) const MAX_INSTANCES: usize = 128;
/// Instances waiting to be freed by maintenance; beyond, whoever lets go frees.
const TRASH: usize = 32;

/// A generation of a slot.
pub(crate) struct Generation<H: Hook> {
    pub(crate) decided_by: DecidedBy,
    pub(crate) gate: Gate,
    pub(crate) guest: Option<Guest<H>>,
    /// Counts the generations of a slot that exist.
    pub(crate) _alive: Arc<()>,
}

/// The guest of a generation.
pub(crate) struct Guest<H: Hook> {
    maker: Maker<H>,
    manifest: Manifest,
    pub(crate) wants: Wants,
    pub(crate) revision: Arc<str>,
    idle: ArrayQueue<Box<Instance<H>>>,
    /// The instance that a world with one caller keeps using, so that what it remembers stays in one place.
    working: Mutex<Option<Box<Instance<H>>>>,
    trash: ArrayQueue<Box<Instance<H>>>,
    /// Instances that serve or could: idle ones and those taken.
    live: AtomicU32,
    respawn_at: AtomicU64,
    /// Whether the circuit is closed: the only part of it that a good call reads.
    closed: AtomicBool,
    circuit: Mutex<Circuit>,
    calls: AtomicU64,
    call_ns: AtomicU64,
    overruns: AtomicU64,
    /// Replicas whose instance computes aside, and the plans that came of it.
    pub(crate) aside: AtomicU32,
    late_plans: AtomicU64,
    dropped_plans: AtomicU64,
    fallbacks: AtomicU64,
    faults: [AtomicU64; 5],
    last_fault: Mutex<Option<FaultReport>>,
    pub(crate) metrics: SlotMetrics,
}

/// What a caller needs to know to report a fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallContext {
    pub(crate) call: Call,
    /// The number that [`Guest::begin`] gave.
    pub(crate) number: u64,
    pub(crate) now: Micros,
    pub(crate) took_us: u64,
}

/// Counters of a guest, for a status.
#[derive(Clone, Debug)]
pub(crate) struct GuestStatus {
    pub(crate) health: Health,
    pub(crate) calls: u64,
    pub(crate) call_ns: u64,
    pub(crate) overruns: u64,
    pub(crate) aside: u32,
    pub(crate) late_plans: u64,
    pub(crate) dropped_plans: u64,
    pub(crate) fallbacks: u64,
    pub(crate) faults: [u64; 5],
    pub(crate) last_fault: Option<FaultReport>,
    pub(crate) instances: u32,
    pub(crate) state_bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Generation ===

impl<H: Hook> Generation<H> {
    pub(crate) fn native(number: u64, alive: Arc<()>) -> Self {
        Self { decided_by: DecidedBy::native(number), gate: Gate::new(), guest: None, _alive: alive }
    }

    pub(crate) fn new(ready: Ready<H>, metrics: &Metrics, alive: Arc<()>) -> Self {
        let decided_by = DecidedBy { revision: Arc::clone(&ready.revision), generation: ready.maker.generation };
        Self { decided_by, gate: Gate::new(), guest: Some(Guest::new(ready, metrics)), _alive: alive }
    }

    pub(crate) fn number(&self) -> u64 {
        self.decided_by.generation
    }
}

impl<H: Hook> fmt::Debug for Generation<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation")
            .field("decided_by", &self.decided_by)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

// === impl Guest ===

impl<H: Hook> Guest<H> {
    fn new(ready: Ready<H>, metrics: &Metrics) -> Self {
        let idle = ArrayQueue::new(MAX_INSTANCES);
        let mut live = 0;
        for instance in ready.instances {
            live += u32::from(idle.push(instance).is_ok());
        }
        Self {
            metrics: metrics.slot(&ready.maker.slot, &ready.revision),
            maker: ready.maker,
            manifest: ready.manifest,
            wants: ready.wants,
            revision: ready.revision,
            idle,
            working: Mutex::new(None),
            trash: ArrayQueue::new(TRASH),
            live: AtomicU32::new(live),
            respawn_at: AtomicU64::new(0),
            closed: AtomicBool::new(true),
            circuit: Mutex::new(Circuit::new()),
            calls: AtomicU64::new(0),
            call_ns: AtomicU64::new(0),
            overruns: AtomicU64::new(0),
            aside: AtomicU32::new(0),
            late_plans: AtomicU64::new(0),
            dropped_plans: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            faults: Default::default(),
            last_fault: Mutex::new(None),
        }
    }

    pub(crate) fn state(&self) -> &StateView {
        &self.maker.state
    }

    /// What its calls may take.
    #[inline]
    pub(crate) fn budgets(&self) -> &Budgets {
        &self.maker.budgets
    }

    /// What [`admit`](Self::admit) would say, for a caller who may not come to make a call.
    #[inline]
    pub(crate) fn would_admit(&self, now: Micros) -> Admit {
        if self.closed.load(Ordering::Acquire) { Admit::Yes } else { lock(&self.circuit).would_admit(now) }
    }

    /// Whether the guest may be asked now, for a caller who then asks.
    #[inline]
    pub(crate) fn admit(&self, now: Micros) -> Admit {
        if self.closed.load(Ordering::Acquire) { Admit::Yes } else { lock(&self.circuit).admit(now) }
    }

    /// An instance for one call or for a driver to keep; give it back or report its fault.
    #[inline]
    pub(crate) fn take(&self) -> Option<Box<Instance<H>>> {
        let instance = self.idle.pop();
        if instance.is_none() {
            self.maker.shared.wake();
        }
        instance
    }

    /// Puts an instance back; a worn one goes when others are there to serve.
    #[inline]
    pub(crate) fn give_back(&self, instance: Box<Instance<H>>) {
        if self.is_worn(&instance) && !self.idle.is_empty() {
            self.discard(instance);
        } else if let Err(instance) = self.idle.push(instance) {
            self.discard(instance);
        }
    }

    /// Has an instance of the pool make one call, and deals with its fault. Where there is no answer, and why, the native
    /// policy decides: that is counted here.
    #[inline]
    pub(crate) fn ask<R>(
        &self,
        now: Micros,
        what: (Call, Budget),
        work: impl FnOnce(&mut Instance<H>, Micros) -> Result<R, Fault>,
    ) -> Result<R, Fallback> {
        let asked = self.consult(now, what, work);
        if asked.is_err() {
            self.fell_back();
        }
        asked
    }

    /// As [`ask`](Self::ask), where nobody needs the answer.
    #[inline]
    pub(crate) fn consult<R>(
        &self,
        now: Micros,
        (call, budget): (Call, Budget),
        work: impl FnOnce(&mut Instance<H>, Micros) -> Result<R, Fault>,
    ) -> Result<R, Fallback> {
        let admit = self.admit(now);
        if admit == Admit::No {
            return Err(Fallback::CircuitOpen);
        }
        let Some(mut instance) = self.take() else {
            if admit == Admit::Trial {
                self.trial_withdrawn();
            }
            return Err(Fallback::NoInstance);
        };
        let number = self.begin();
        let started = stopwatch_ns();
        let answer = work(&mut instance, budget.hard);
        let took_ns = stopwatch_ns() - started;
        self.took(took_ns, budget.soft);
        match answer {
            Ok(answer) => {
                self.give_back(instance);
                if admit == Admit::Trial {
                    self.trial_passed(number);
                }
                Ok(answer)
            }
            Err(fault) => {
                let kind = fault.kind.as_str();
                self.discard(instance);
                self.fault(CallContext { call, number, now, took_us: took_ns / 1_000 }, fault);
                Err(Fallback::Fault(kind))
            }
        }
    }

    /// Puts a fresh instance where there is none or a worn one, if the pool has one; says whether it did.
    pub(crate) fn renew(&self, kept: &mut Option<Box<Instance<H>>>) -> bool {
        let worn = kept.as_deref().is_some_and(|instance| self.is_worn(instance));
        if !worn && kept.is_some() {
            return false;
        }
        let Some(fresh) = self.take() else { return false };
        if let Some(worn) = kept.replace(fresh) {
            self.discard(worn);
        }
        true
    }

    /// The instance that served the last call, else another: for the worlds whose calls come from one thread.
    pub(crate) fn take_working(&self) -> Option<Box<Instance<H>>> {
        let working = lock(&self.working).take();
        working.or_else(|| self.take())
    }

    /// Puts back what [`take_working`](Self::take_working) gave, unless it is worn and there is another.
    pub(crate) fn keep_working(&self, instance: Box<Instance<H>>) {
        if self.is_worn(&instance) && !self.idle.is_empty() {
            self.discard(instance);
        } else {
            *lock(&self.working) = Some(instance);
        }
    }

    #[inline]
    fn is_worn(&self, instance: &Instance<H>) -> bool {
        let config = &self.maker.shared.config;
        instance.is_worn(config.recycle_calls, config.recycle_growth_bytes)
    }

    /// Lets go of an instance that must not serve again; maintenance frees and replaces it.
    #[cold]
    pub(crate) fn discard(&self, instance: Box<Instance<H>>) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        drop(self.trash.push(instance));
        self.maker.shared.wake();
    }

    /// Counts a call and gives it its number.
    #[inline]
    pub(crate) fn begin(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The number of the latest call.
    pub(crate) fn last_number(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Records how long a call took.
    #[inline]
    pub(crate) fn took(&self, ns: u64, soft_us: Micros) {
        self.metrics.call.observe(ns as f64 * 1e-9);
        self.call_ns.fetch_add(ns, Ordering::Relaxed);
        if ns > soft_us * 1_000 {
            self.overruns.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a decision that the native policy takes instead.
    pub(crate) fn fell_back(&self) {
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
        self.metrics.fallbacks.inc();
    }

    /// Counts a plan that was computed aside and is used now.
    pub(crate) fn came_late(&self) {
        self.late_plans.fetch_add(1, Ordering::Relaxed);
        self.metrics.late_plans.inc();
    }

    /// Counts a plan that was computed aside and came to nothing: nobody asked at the boundary that found it.
    pub(crate) fn came_too_late(&self) {
        self.dropped_plans.fetch_add(1, Ordering::Relaxed);
    }

    /// A trial went well.
    pub(crate) fn trial_passed(&self, number: u64) {
        let mut circuit = lock(&self.circuit);
        circuit.trial_passed(number);
        self.closed.store(circuit.health() == Health::Closed, Ordering::Release);
    }

    /// A trial was not made.
    pub(crate) fn trial_withdrawn(&self) {
        lock(&self.circuit).trial_withdrawn();
    }

    /// Counts and reports a fault, and moves the circuit.
    #[cold]
    pub(crate) fn fault(&self, context: CallContext, fault: Fault) {
        let mut circuit = lock(&self.circuit);
        let respawn_at = circuit.fault(context.number, context.now);
        self.moved(circuit, respawn_at);
        self.report(context, fault);
    }

    /// Publishes what the circuit came to.
    fn moved(&self, circuit: MutexGuard<'_, Circuit>, respawn_at: Micros) {
        self.closed.store(circuit.health() == Health::Closed, Ordering::Release);
        self.respawn_at.store(respawn_at, Ordering::Relaxed);
    }

    fn report(&self, context: CallContext, fault: Fault) {
        let kind = fault.kind as usize;
        self.faults[kind].fetch_add(1, Ordering::Relaxed);
        self.metrics.faults[kind].inc();
        let shared = &self.maker.shared;
        let report = FaultReport {
            slot: Arc::clone(&self.maker.slot),
            revision: Arc::clone(&self.revision),
            generation: self.maker.generation,
            call: context.call,
            kind: fault.kind,
            message: fault.message,
            at: context.now,
            took_us: context.took_us,
        };
        shared.recorder.record(Event {
            generation: report.generation,
            a: kind as u64,
            b: report.took_us,
            ..Event::new(context.now, EventKind::PolicyFault)
        });
        if let Some(listener) = &shared.config.on_fault {
            listener(&report);
        }
        *lock(&self.last_fault) = Some(report);
        shared.wake();
    }

    /// Frees discarded instances.
    pub(crate) fn free(&self) {
        while let Some(instance) = self.trash.pop() {
            drop(instance);
        }
    }

    /// Starts missing instances up to `wanted`, and lets go of idle ones beyond: of a replica that left while the other arm
    /// served.
    pub(crate) fn fill(&self, now: Micros, wanted: u32) {
        while self.live.load(Ordering::Relaxed) < wanted
            && now >= self.respawn_at.load(Ordering::Relaxed)
            && self.respawn(now)
        {}
        while self.live.load(Ordering::Relaxed) > wanted
            && let Some(instance) = self.idle.pop()
        {
            self.live.fetch_sub(1, Ordering::Relaxed);
            drop(instance);
        }
    }

    fn respawn(&self, now: Micros) -> bool {
        match self.maker.start_equal(&self.manifest, &self.wants) {
            Ok(instance) => {
                lock(&self.circuit).respawned();
                let kept = self.idle.push(instance).is_ok();
                self.live.fetch_add(u32::from(kept), Ordering::Relaxed);
                kept
            }
            Err(error) => {
                let (call, fault) = error.into_fault();
                let number = self.calls.load(Ordering::Relaxed);
                let mut circuit = lock(&self.circuit);
                let respawn_at = circuit.respawn_failed(number, now);
                self.moved(circuit, respawn_at);
                self.report(CallContext { call, number, now, took_us: 0 }, fault);
                false
            }
        }
    }

    pub(crate) fn status(&self) -> GuestStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GuestStatus {
            health: lock(&self.circuit).health(),
            calls: load(&self.calls),
            call_ns: load(&self.call_ns),
            overruns: load(&self.overruns),
            aside: self.aside.load(Ordering::Relaxed),
            late_plans: load(&self.late_plans),
            dropped_plans: load(&self.dropped_plans),
            fallbacks: load(&self.fallbacks),
            faults: [0, 1, 2, 3, 4].map(|kind: usize| load(&self.faults[kind])),
            last_fault: lock(&self.last_fault).clone(),
            instances: self.live.load(Ordering::Relaxed),
            state_bytes: self.maker.state.bytes() as u64,
        }
    }
}

// A fault's kind indexes the counters of a guest and of `SlotMetrics`.
const _: () = assert!(FaultKind::ALL.len() == 5);
