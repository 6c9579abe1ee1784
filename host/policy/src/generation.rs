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
use crate::config::{Budget, Budgets, Maintenance, OnFault};
use crate::drain::Gate;
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind, FaultReport};
use crate::handover::{Handed, NotHandedOver, Questions, Snapshot, take_in};
use crate::instance::{Hook, Instance, Maker, Ready};
use crate::manifest::{Manifest, Wants};
use crate::state::StateView;
use crate::upload::World;

/// Most instances of one generation.
pub(crate) const MAX_INSTANCES: usize = 128;
/// Instances waiting to be freed by maintenance; beyond, whoever lets go frees.
const TRASH: usize = 32;

/// A generation of a slot.
pub(crate) struct Generation<H: Hook> {
    pub(crate) decided_by: DecidedBy,
    pub(crate) gate: Gate,
    pub(crate) guest: Option<Guest<H>>,
    /// What becomes of requests of which the guest says nothing, or of which there is none to say something.
    pub(crate) on_fault: OnFault,
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
    /// Of a guest that hands over: instances whose owner is in another generation, or has not come yet.
    parked: Mutex<Vec<Parked<H>>>,
    pub(crate) questions: Questions,
    /// The last question that the one caller of a telemetry hook has answered.
    answered: AtomicU64,
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

/// An instance that waits for its owner.
struct Parked<H: Hook> {
    owner: Arc<str>,
    /// None while it is asked for a snapshot.
    instance: Option<Box<Instance<H>>>,
}

/// What became of an instance that its owner keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewed {
    /// It is the same one, or there is none still.
    Not,
    /// A fresh one.
    Fresh,
    /// A fresh one, which knows what the worn one did, or none: by two calls that together took no longer than a decision may.
    ByCalls,
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
        let (decided_by, gate) = (DecidedBy::native(number), Gate::new());
        Self { decided_by, gate, guest: None, on_fault: OnFault::Open, _alive: alive }
    }

    /// Nobody decides, and nobody goes on without.
    pub(crate) fn refusing(number: u64, alive: Arc<()>) -> Self {
        Self { on_fault: OnFault::Closed, ..Self::native(number, alive) }
    }

    pub(crate) fn new(ready: Ready<H>, metrics: &Metrics, alive: Arc<()>) -> Self {
        let decided_by = DecidedBy { revision: Arc::clone(&ready.revision), generation: ready.maker.generation };
        let on_fault = ready.maker.on_fault;
        Self { decided_by, gate: Gate::new(), guest: Some(Guest::new(ready, metrics)), on_fault, _alive: alive }
    }

    pub(crate) fn number(&self) -> u64 {
        self.decided_by.generation
    }

    /// Whether requests go on, and there is nobody to ask.
    pub(crate) fn serves_without(&self) -> bool {
        self.guest.is_none() && self.on_fault == OnFault::Open
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
        live += u32::try_from(ready.parked.len()).unwrap_or(u32::MAX);
        let metrics = metrics.slot(&ready.maker.slot, &ready.revision);
        if let Some(inherited) = &ready.inherited {
            metrics.handed_over.inc_by(inherited.restored.into());
            metrics.started_cold.inc_by(inherited.cold.len() as u64);
        }
        let mut parked = ready.parked;
        // A hook has one caller, which looks in one place.
        let working = if H::WORLD == World::Telemetry { parked.pop().map(|(_, instance)| instance) } else { None };
        let questions = Questions::default();
        if H::WORLD == World::Telemetry {
            questions.join();
        }
        Self {
            metrics,
            parked: Mutex::new(
                parked.into_iter().map(|(owner, instance)| Parked { owner, instance: Some(instance) }).collect(),
            ),
            questions,
            answered: AtomicU64::new(0),
            maker: ready.maker,
            manifest: ready.manifest,
            wants: ready.wants,
            revision: ready.revision,
            idle,
            working: Mutex::new(working),
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

    /// Whether its circuit is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
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

    /// Has an instance that its owner keeps make one call. A fault is counted, and costs the instance.
    #[inline]
    pub(crate) fn call<R>(
        &self,
        kept: &mut Option<Box<Instance<H>>>,
        now: Micros,
        (call, budget): (Call, Budget),
        work: impl FnOnce(&mut Instance<H>, Micros) -> Result<R, Fault>,
    ) -> Option<R> {
        let instance = kept.as_mut()?;
        let number = self.begin();
        let started = stopwatch_ns();
        let answer = work(instance, budget.hard);
        let took_ns = stopwatch_ns() - started;
        self.took(took_ns, budget.soft);
        match answer {
            Ok(answer) => Some(answer),
            Err(fault) => {
                kept.take().into_iter().for_each(|poisoned| self.discard(poisoned));
                self.fault(CallContext { call, number, now, took_us: took_ns / 1_000 }, fault);
                None
            }
        }
    }

    /// What the last call answered was refused by whoever asked: a fault, in these words, which costs the instance.
    #[cold]
    pub(crate) fn refused(&self, kept: &mut Option<Box<Instance<H>>>, (call, now): (Call, Micros), words: String) {
        kept.take().into_iter().for_each(|wrong| self.discard(wrong));
        let context = CallContext { call, number: self.last_number(), now, took_us: 0 };
        self.fault(context, Fault::new(FaultKind::BadAnswer, words));
    }

    /// Puts an instance where there is none, or a fresh one in the place of a worn one, if there is one. What the worn one
    /// knows goes over.
    #[inline]
    pub(crate) fn renew(&self, kept: &mut Option<Box<Instance<H>>>, owner: &str, now: Micros) -> Renewed {
        match kept {
            Some(instance) if !self.is_worn(instance) => Renewed::Not,
            _ => self.replace(kept, owner, now),
        }
    }

    #[cold]
    fn replace(&self, kept: &mut Option<Box<Instance<H>>>, owner: &str, now: Micros) -> Renewed {
        let Some(fresh) = self.take_for(owner) else { return Renewed::Not };
        match kept.take() {
            Some(worn) if self.hands_over() => {
                *kept = self.succeed(worn, fresh, now);
                return Renewed::ByCalls;
            }
            Some(worn) => self.discard(worn),
            None => {}
        }
        *kept = Some(fresh);
        Renewed::Fresh
    }

    /// The instance that served the last call, else another: for the worlds whose calls come from one thread.
    pub(crate) fn take_working(&self) -> Option<Box<Instance<H>>> {
        let working = lock(&self.working).take();
        working.or_else(|| self.take())
    }

    /// Puts back what [`take_working`](Self::take_working) gave, unless it is worn and there is another.
    pub(crate) fn keep_working(&self, instance: Box<Instance<H>>, now: Micros) {
        let mut kept = Some(instance);
        self.renew(&mut kept, &self.maker.slot, now);
        *lock(&self.working) = kept;
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

    /// Faults, and decisions taken in its place.
    pub(crate) fn missteps(&self) -> u64 {
        let faults: u64 = self.faults.iter().map(|faults| faults.load(Ordering::Relaxed)).sum();
        faults + self.fallbacks.load(Ordering::Relaxed)
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

// === handing over ===

impl<H: Hook> Guest<H> {
    /// Whether its component exports `handover`.
    pub(crate) fn hands_over(&self) -> bool {
        self.maker.linked.hands_over()
    }

    /// Keeps the instance of an owner who leaves for another generation and may come back.
    pub(crate) fn park(&self, owner: &Arc<str>, instance: Box<Instance<H>>) {
        if !self.hands_over() {
            return self.give_back(instance);
        }
        let mut parked = lock(&self.parked);
        if parked.iter().all(|parked| parked.owner != *owner) {
            return parked.push(Parked { owner: Arc::clone(owner), instance: Some(instance) });
        }
        drop(parked);
        self.give_back(instance);
    }

    /// Lets go of what is kept for owners who are gone for good.
    pub(crate) fn forget_all_but(&self, owners: &[Arc<str>]) {
        let gone: Vec<Parked<H>> =
            lock(&self.parked).extract_if(.., |parked| !owners.contains(&parked.owner)).collect();
        gone.into_iter().filter_map(|parked| parked.instance).for_each(|instance| self.discard(instance));
    }

    /// The instance that is kept for an owner, else any; none while the one that is kept is being asked for a snapshot.
    fn take_for(&self, owner: &str) -> Option<Box<Instance<H>>> {
        if self.hands_over() {
            let mut parked = lock(&self.parked);
            if let Some(at) = parked.iter().position(|parked| *parked.owner == *owner) {
                parked[at].instance.as_ref()?;
                return parked.swap_remove(at).instance;
            }
        }
        self.take()
    }

    /// Whether somebody who prepares the next generation has asked since; one atomic read.
    #[inline]
    pub(crate) fn is_asked(&self, answered: u64) -> bool {
        self.questions.asked() != answered
    }

    /// Answers whoever prepares the next generation, if somebody waits for it: one call of the instance that `owner` keeps,
    /// which a fault costs. Says whether it was made.
    pub(crate) fn answer(
        &self,
        kept: &mut Option<Box<Instance<H>>>,
        owner: &Arc<str>,
        answered: &mut u64,
        now: Micros,
    ) -> bool {
        let Some(to) = self.questions.take(answered) else { return false };
        let has_instance = kept.is_some();
        let what = self.snapshot(kept, self.hard(), now);
        // Nobody waits for one that is late.
        drop(to.try_send(Handed { owner: Arc::clone(owner), what }));
        has_instance
    }

    /// The same for the instance of a world with one caller.
    pub(crate) fn answer_working(&self, now: Micros) {
        let mut answered = self.answered.load(Ordering::Relaxed);
        if self.is_asked(answered) {
            let mut kept = self.take_working();
            self.answer(&mut kept, &self.maker.slot, &mut answered, now);
            self.answered.store(answered, Ordering::Relaxed);
            *lock(&self.working) = kept;
        }
    }

    /// Everything that its instances hand over, for the next generation; owners may take so long to come to a boundary.
    /// `bypassed`: no owner comes, the native policy decides.
    pub(crate) fn hand_over(&self, now: Micros, patience_ns: u64, bypassed: bool) -> Vec<Handed> {
        let mut handed = Vec::new();
        self.ask_parked(now, &mut handed);
        if bypassed {
            let mut kept = lock(&self.working).take();
            if kept.is_some() {
                let what = self.snapshot(&mut kept, self.hard(), now);
                *lock(&self.working) = kept;
                handed.push(Handed { owner: Arc::clone(&self.maker.slot), what });
            }
            return handed;
        }
        // Where maintenance is by hand there is one thread, and nobody answers while it waits.
        let by_hand = self.maker.shared.config.maintenance == Maintenance::Manual;
        let (answers, late) = self.questions.ask(if by_hand { 0 } else { patience_ns });
        // Whoever came for its instance meanwhile has spoken for it, and whoever left one behind has not.
        answers.into_iter().for_each(|answer| take_in(&mut handed, answer));
        self.ask_parked(now, &mut handed);
        if late > 0 {
            handed.push(Handed { owner: Arc::clone(&self.maker.slot), what: Err(NotHandedOver::Late(late)) });
        }
        handed
    }

    /// Asks those instances that wait for owners who have not spoken yet.
    fn ask_parked(&self, now: Micros, handed: &mut Vec<Handed>) {
        let owners: Vec<Arc<str>> = lock(&self.parked).iter().map(|parked| Arc::clone(&parked.owner)).collect();
        for owner in owners {
            if handed.iter().all(|handed| handed.owner != owner) {
                handed.extend(self.ask_one_parked(owner, now));
            }
        }
    }

    fn ask_one_parked(&self, owner: Arc<str>, now: Micros) -> Option<Handed> {
        let place = |parked: &[Parked<H>]| parked.iter().position(|parked| parked.owner == owner);
        let mut kept = {
            let mut parked = lock(&self.parked);
            let at = place(&parked)?;
            parked[at].instance.take()
        };
        kept.as_ref()?;
        let what = self.snapshot(&mut kept, self.hard(), now);
        let mut parked = lock(&self.parked);
        let orphan = match (place(&parked), kept) {
            (Some(at), Some(instance)) => {
                parked[at].instance = Some(instance);
                None
            }
            (Some(at), None) => parked.swap_remove(at).instance,
            // Its owner went for good meanwhile.
            (None, kept) => kept,
        };
        drop(parked);
        orphan.into_iter().for_each(|orphan| self.discard(orphan));
        Some(Handed { owner, what })
    }

    /// The fresh instance with what the worn one knows, on the thread of their owner: half the hard limit for each. Where that
    /// fails neither goes on; maintenance starts a third one, cold.
    fn succeed(&self, worn: Box<Instance<H>>, mut fresh: Box<Instance<H>>, now: Micros) -> Option<Box<Instance<H>>> {
        let half = self.hard() / 2;
        let mut kept = Some(worn);
        let handed = self.snapshot(&mut kept, half, now);
        kept.into_iter().for_each(|worn| self.discard(worn));
        let Ok(snapshot) = handed else {
            self.metrics.started_cold.inc();
            return Some(fresh);
        };
        match fresh.restore(half, now, &snapshot) {
            Ok(Ok(())) => {
                self.metrics.handed_over.inc();
                return Some(fresh);
            }
            Ok(Err(words)) => {
                tracing::warn!(target: "policy", slot = &*self.maker.slot, "an instance refused what the one before it knew: {words}");
            }
            Err(fault) => {
                let number = self.last_number();
                self.fault(CallContext { call: Call::Restore, number, now, took_us: 0 }, fault);
            }
        }
        self.discard(fresh);
        self.metrics.started_cold.inc();
        None
    }

    fn hard(&self) -> Micros {
        self.maker.budgets.decisions(H::WORLD).hard
    }

    fn snapshot(
        &self,
        kept: &mut Option<Box<Instance<H>>>,
        hard: Micros,
        now: Micros,
    ) -> Result<Snapshot, NotHandedOver> {
        let instance = kept.as_mut().ok_or(NotHandedOver::NoInstance)?;
        let started = stopwatch_ns();
        match instance.take_snapshot(hard, now) {
            Ok(snapshot) => snapshot.ok_or(NotHandedOver::Nothing),
            Err(fault) => {
                kept.take().into_iter().for_each(|poisoned| self.discard(poisoned));
                let took_us = (stopwatch_ns() - started) / 1_000;
                let context = CallContext { call: Call::TakeSnapshot, number: self.last_number(), now, took_us };
                // Told, but not counted against the circuit: a refused swap must not cost the policy that serves.
                self.report(context, fault.clone());
                Err(NotHandedOver::Snapshot(fault))
            }
        }
    }
}

// A fault's kind indexes the counters of a guest and of `SlotMetrics`.
const _: () = assert!(FaultKind::ALL.len() == 5);
