//! Policies of the simulation, and the two wrappers around every one of them: `Slot` swaps what is inside in mid-flight,
//! `Audited` mirrors what a policy is told and compares the mirror with the world.
//!
//! A policy that runs as a WebAssembly component implements the same trait; see `operator`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use pointsman_sched::batch::{
    Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, NativeBatch, Plan, Rest, SequenceColumns, View,
};
use pointsman_sched::ids::Micros;

use crate::rng::Rng;

/// The built-in policies of the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Native,
    ShortestFirst,
    Adversary,
    HoldsAll,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Native, Self::ShortestFirst, Self::Adversary, Self::HoldsAll];

    pub(crate) fn policy(self, seed: u64) -> Box<dyn BatchPolicy> {
        match self {
            Self::Native => Box::new(NativeBatch),
            Self::ShortestFirst => Box::new(ShortestFirst::default()),
            Self::Adversary => Box::new(Adversary { rng: Rng::new(!seed), seen: Vec::new(), needs_view: true }),
            Self::HoldsAll => Box::new(HoldsAll { needs_view: true }),
        }
    }
}

// === ShortestFirst: what a platform team would write ===

/// Least work first, by prompt and requested tokens; the longest running ones may be put back.
#[derive(Debug, Default)]
struct ShortestFirst {
    follows: bool,
    waiting: BTreeSet<(u64, u64)>,
    running: BTreeSet<(u64, u64)>,
}

fn work(columns: &SequenceColumns, row: usize) -> (u64, u64) {
    (u64::from(columns.prompt_tokens[row]) + u64::from(columns.max_new_tokens[row]), columns.id[row])
}

fn move_between(from: &mut BTreeSet<(u64, u64)>, to: Option<&mut BTreeSet<(u64, u64)>>, id: u64) {
    let entry = from.iter().copied().find(|&(_, other)| other == id);
    if let Some(entry) = entry {
        from.remove(&entry);
        if let Some(to) = to {
            to.insert(entry);
        }
    }
}

impl BatchPolicy for ShortestFirst {
    fn attend(&mut self, _now: Micros) -> Attention {
        if self.follows { Attention::Following } else { Attention::NeedsView }
    }

    fn generation(&self) -> u64 {
        1
    }

    fn resync(&mut self, view: &View<'_>) {
        self.follows = true;
        self.waiting = (0..view.waiting.len()).map(|row| work(view.waiting, row)).collect();
        self.running = (0..view.running.len()).map(|row| work(view.running, row)).collect();
    }

    fn step(&mut self, _now: Micros, _budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        for &id in &changes.gone {
            move_between(&mut self.waiting, None, id);
            move_between(&mut self.running, None, id);
        }
        for &id in &changes.preempted {
            move_between(&mut self.running, Some(&mut self.waiting), id);
        }
        self.waiting.extend((0..changes.arrived.len()).map(|row| work(&changes.arrived, row)));
        for &id in &changes.admitted {
            move_between(&mut self.waiting, Some(&mut self.running), id);
        }
        plan.admit.extend(self.waiting.iter().map(|&(_, id)| id));
        // Only work that is longer than the next in line makes room for it.
        let next = self.waiting.first().map_or(u64::MAX, |&(work, _)| work);
        let longer = self.running.iter().rev().take_while(|&&(work, _)| work > 2 * next);
        plan.preempt.extend(longer.map(|&(_, id)| id));
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, why: BadPlan) {
        panic!("a correct policy was refused: {why}");
    }
}

// === Adversary: anything the types allow ===

#[derive(Debug)]
struct Adversary {
    rng: Rng,
    /// Every id it was ever shown, gone or not: most of its plans name some of them.
    seen: Vec<u64>,
    needs_view: bool,
}

impl Adversary {
    fn some(&mut self, share_ppm: u64) -> Vec<u64> {
        let newest = self.seen.len().saturating_sub(12);
        let ids = self.seen[newest..].to_vec();
        ids.into_iter().rev().filter(|_| self.rng.chance(share_ppm)).collect()
    }
}

impl BatchPolicy for Adversary {
    fn attend(&mut self, _now: Micros) -> Attention {
        match self.rng.below(50) {
            _ if self.needs_view => Attention::NeedsView,
            0 => Attention::Native,
            1 => Attention::NeedsView,
            _ => Attention::Following,
        }
    }

    fn generation(&self) -> u64 {
        2
    }

    fn wants_progress(&self) -> bool {
        true
    }

    fn resync(&mut self, view: &View<'_>) {
        self.needs_view = false;
        self.seen = view.waiting.id.iter().chain(&view.running.id).copied().collect();
    }

    fn step(&mut self, _now: Micros, _budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        self.seen.extend_from_slice(&changes.arrived.id);
        if self.rng.chance(50_000) {
            return Answer::Native;
        }
        plan.admit = self.some(300_000);
        plan.preempt = self.some(500_000);
        plan.prefill_id = self.some(500_000);
        plan.prefill_tokens = plan.prefill_id.iter().map(|_| self.rng.within(0, 40).saturating_sub(15)).collect();
        plan.rest = if self.rng.chance(600_000) { Rest::Hold } else { Rest::HostOrder };
        if self.rng.chance(20_000) {
            plan.drop = self.some(200_000);
        }
        if self.rng.chance(30_000) {
            plan.admit.push(u64::MAX);
        }
        if self.rng.chance(30_000) {
            plan.prefill_tokens.push(1);
        }
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, _why: BadPlan) {
        self.needs_view = self.rng.chance(500_000);
    }
}

// === HoldsAll: the starvation bound alone lets anything run ===

#[derive(Debug)]
struct HoldsAll {
    needs_view: bool,
}

impl BatchPolicy for HoldsAll {
    fn attend(&mut self, _now: Micros) -> Attention {
        if self.needs_view { Attention::NeedsView } else { Attention::Following }
    }

    fn generation(&self) -> u64 {
        3
    }

    fn resync(&mut self, _view: &View<'_>) {
        self.needs_view = false;
    }

    fn step(&mut self, _now: Micros, _budgets: &Budgets, _changes: &Changes, plan: &mut Plan) -> Answer {
        plan.rest = Rest::Hold;
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, why: BadPlan) {
        panic!("an empty plan was refused: {why}");
    }
}

// === Slot: swaps in mid-flight ===

/// What the control plane of the simulation leaves for the next step boundary.
pub(crate) type Pending = Arc<Mutex<Option<Box<dyn BatchPolicy>>>>;

/// Serves through whatever was published last. A swap is picked up when the scheduler asks it to attend, never between the
/// calls of one decision.
pub(crate) struct Slot {
    inner: Box<dyn BatchPolicy>,
    pending: Pending,
    /// A policy that was just put in has seen nothing, whatever it says itself.
    fresh: bool,
    generation: u64,
}

impl Slot {
    pub(crate) fn new(inner: Box<dyn BatchPolicy>) -> (Self, Pending) {
        let pending = Pending::default();
        (Self { inner, pending: Arc::clone(&pending), fresh: true, generation: 1 }, pending)
    }
}

impl BatchPolicy for Slot {
    fn attend(&mut self, now: Micros) -> Attention {
        if let Some(next) = self.pending.lock().expect("one thread").take() {
            (self.inner, self.fresh, self.generation) = (next, true, self.generation + 1);
        }
        match self.inner.attend(now) {
            Attention::Following if self.fresh => Attention::NeedsView,
            attention => attention,
        }
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn wants_progress(&self) -> bool {
        self.inner.wants_progress()
    }

    fn resync(&mut self, view: &View<'_>) {
        self.fresh = false;
        self.inner.resync(view);
    }

    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        self.inner.step(now, budgets, changes, plan)
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        self.inner.refused(now, why);
    }

    fn stood_in(&mut self) {
        self.inner.stood_in();
    }
}

// === Audited: is what a policy is told true? ===

/// What a policy should be able to rely on, written by the world and read by the mirror.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// Requests that were accepted and have not ended.
    pub(crate) live: BTreeSet<u64>,
    pub(crate) calls: u64,
}

/// Applies every change in the documented order to a mirror of the queues, and compares.
pub(crate) struct Audited {
    inner: Slot,
    truth: Arc<Mutex<Truth>>,
    waiting: BTreeSet<u64>,
    running: Vec<u64>,
    tenants: BTreeSet<u32>,
    /// Generation that saw the last view: a decision must not mix two.
    generation: u64,
}

impl Audited {
    pub(crate) fn new(inner: Slot, truth: Arc<Mutex<Truth>>) -> Self {
        Self { inner, truth, waiting: BTreeSet::new(), running: Vec::new(), tenants: BTreeSet::new(), generation: 0 }
    }

    fn compare(&self) {
        let mirror: BTreeSet<u64> = self.waiting.iter().chain(&self.running).copied().collect();
        assert_eq!(mirror.len(), self.waiting.len() + self.running.len(), "a request waits and runs");
        assert_eq!(mirror, self.truth.lock().expect("one thread").live, "the policy was told of other requests");
    }

    fn leave(&mut self, id: u64) {
        let waited = self.waiting.remove(&id);
        let ran = self.running.iter().position(|&other| other == id).map(|place| self.running.remove(place));
        assert!(waited || ran.is_some(), "{id} is gone and was never shown");
    }

    fn apply(&mut self, changes: &Changes) {
        for (tenant, _) in &changes.new_tenants {
            assert!(self.tenants.insert(*tenant), "tenant {tenant} was named before");
        }
        for &id in &changes.gone {
            self.leave(id);
        }
        for &id in &changes.preempted {
            let place = self.running.iter().position(|&other| other == id);
            self.running.remove(place.expect("what is preempted ran"));
            assert!(self.waiting.insert(id));
        }
        for (row, &id) in changes.arrived.id.iter().enumerate() {
            assert!(self.waiting.insert(id), "{id} arrived twice");
            assert!(self.tenants.contains(&changes.arrived.tenant[row]), "a tenant without a name");
            assert!(changes.arrived.cached_tokens[row] < changes.arrived.prompt_tokens[row]);
        }
        for &id in &changes.admitted {
            assert!(self.waiting.remove(&id), "{id} was admitted and did not wait");
            self.running.push(id);
        }
        for id in &changes.progress_id {
            assert!(self.running.contains(id), "{id} moved and does not run");
        }
    }
}

impl BatchPolicy for Audited {
    fn attend(&mut self, now: Micros) -> Attention {
        self.inner.attend(now)
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn wants_progress(&self) -> bool {
        self.inner.wants_progress()
    }

    fn resync(&mut self, view: &View<'_>) {
        self.generation = self.inner.generation();
        self.waiting = view.waiting.id.iter().copied().collect();
        self.running.clone_from(&view.running.id);
        self.tenants = view.tenants.iter().map(|(tenant, _)| *tenant).collect();
        self.compare();
        self.inner.resync(view);
    }

    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        assert_eq!(self.generation, self.inner.generation(), "it decides on what another generation was told");
        assert_eq!(*plan, Plan::default(), "a plan is empty on entry");
        self.apply(changes);
        self.compare();
        assert!(self.running.len() <= budgets.running as usize);
        self.truth.lock().expect("one thread").calls += 1;
        self.inner.step(now, budgets, changes, plan)
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        assert_eq!(self.generation, self.inner.generation());
        self.inner.refused(now, why);
    }

    fn stood_in(&mut self) {
        self.inner.stood_in();
    }
}
