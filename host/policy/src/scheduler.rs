//! `BatchPolicy` with a scheduler guest behind it: one instance per replica, kept by the replica's driver.
//!
//! The driver never compiles, initializes or waits: at a step boundary it finds out by two atomic reads whether its
//! generation is still the current one, and takes a warm instance from the new one if not. The guest holds no truth, so
//! after a swap, a fault or a pause it gets the whole view again.

use std::sync::Arc;

use pointsman_sched::batch::{
    Answer, Attention, BadPlan, BatchPolicy, Budgets as StepBudgets, Changes, Plan, Rest, SequenceColumns, View,
};
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::bindings::scheduler::exports::pointsman::policy::scheduler as wit;
use crate::circuit::Admit;
use crate::config::{Budget, Budgets};
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind};
use crate::generation::{CallContext, Generation};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::{MAX_SEQUENCE_COLUMNS, SequenceColumn, Wants};
use crate::slot::{SlotCore, slot_by_core};
use crate::upload::World;

/// Longest list in a plan; the scheduler compares with what exists, this only bounds the work of doing so.
const MAX_PLAN_IDS: usize = 1 << 17;

/// `world scheduler-policy`.
pub(crate) struct SchedulerHook;

/// The slot `scheduler`.
#[derive(Debug)]
pub struct SchedulerSlot {
    pub(crate) core: Arc<SlotCore<SchedulerHook>>,
}

slot_by_core!(SchedulerSlot);

/// The scheduler guest of one replica, owned by its driver thread.
pub struct SchedulerGuest {
    core: Arc<SlotCore<SchedulerHook>>,
    replica: Arc<str>,
    /// The generation that it is inside of.
    generation: Arc<Generation<SchedulerHook>>,
    instance: Option<Box<Instance<SchedulerHook>>>,
    /// Whether the instance has the view and every change since.
    synced: bool,
    /// Whether its next step decides if the circuit closes.
    trial: bool,
}

// === impl SchedulerSlot ===

impl SchedulerSlot {
    /// A policy for one more replica. Its instance is prepared by maintenance or by the next activation; until then the
    /// native policy decides.
    #[must_use]
    pub fn attach(&self, replica: &str) -> SchedulerGuest {
        self.core.want(1);
        SchedulerGuest {
            generation: self.core.enter_to_stay(),
            core: Arc::clone(&self.core),
            replica: replica.into(),
            instance: None,
            synced: false,
            trial: false,
        }
    }
}

// === impl SchedulerGuest ===

impl SchedulerGuest {
    /// Gives back everything that belongs to the generation and leaves it. It may be asked again: it starts from a view.
    fn leave(&mut self) {
        if let Some(guest) = &self.generation.guest {
            if let Some(instance) = self.instance.take() {
                guest.give_back(instance);
            }
            if std::mem::take(&mut self.trial) {
                guest.trial_withdrawn();
            }
        }
        self.core.leave(&self.generation);
    }

    /// The native policy decides this step.
    fn pause(&mut self) -> Attention {
        self.synced = false;
        Attention::Native
    }

    /// Makes one call and deals with its fault; `None` when there is no answer.
    fn call<R>(
        &mut self,
        call: Call,
        now: Micros,
        budget: Budget,
        work: impl FnOnce(&mut Instance<SchedulerHook>, Micros, &Wants) -> Result<R, Fault>,
    ) -> Option<R> {
        let (Some(guest), Some(instance)) = (&self.generation.guest, &mut self.instance) else { return None };
        let number = guest.begin();
        let started = stopwatch_ns();
        let answer = work(instance, budget.hard, &guest.wants);
        let took_ns = stopwatch_ns() - started;
        guest.took(took_ns, budget.soft);
        match answer {
            Ok(answer) => {
                if call == Call::Step && std::mem::take(&mut self.trial) {
                    guest.trial_passed(number);
                }
                Some(answer)
            }
            Err(fault) => {
                if let Some(poisoned) = self.instance.take() {
                    guest.discard(poisoned);
                }
                (self.synced, self.trial) = (false, false);
                guest.fault(CallContext { call, number, now, took_us: took_ns / 1_000 }, fault);
                None
            }
        }
    }
}

impl BatchPolicy for SchedulerGuest {
    fn attend(&mut self, now: Micros) -> Attention {
        if !self.core.is_current(&self.generation) {
            self.leave();
            self.generation = self.core.enter_to_stay();
            self.synced = false;
        }
        let Some(guest) = &self.generation.guest else { return Attention::Native };
        if !self.trial {
            match guest.admit(now) {
                Admit::Yes => {}
                Admit::Trial => (self.trial, self.synced) = (true, false),
                Admit::No => {
                    guest.fell_back();
                    return self.pause();
                }
            }
        }
        let worn = self.instance.as_deref().is_some_and(|instance| guest.is_worn(instance));
        if (worn || self.instance.is_none())
            && let Some(fresh) = guest.take()
        {
            self.synced = false;
            if let Some(worn) = self.instance.replace(fresh) {
                guest.discard(worn);
            }
        }
        if self.instance.is_none() {
            if std::mem::take(&mut self.trial) {
                guest.trial_withdrawn();
            }
            guest.fell_back();
            return self.pause();
        }
        if self.synced { Attention::Following } else { Attention::NeedsView }
    }

    fn generation(&self) -> u64 {
        if self.instance.is_some() { self.generation.number() } else { 0 }
    }

    fn revision(&self) -> Arc<str> {
        match self.instance {
            Some(_) => Arc::clone(&self.generation.decided_by.revision),
            None => DecidedBy::native(0).revision,
        }
    }

    fn wants_progress(&self) -> bool {
        self.generation.guest.as_ref().is_some_and(|guest| guest.wants.progress)
    }

    fn resync(&mut self, view: &View<'_>) {
        let budget = self.core.shared.config.budgets.resync;
        let done =
            self.call(Call::Resync, view.now, budget, |instance, hard, wants| resync(instance, hard, wants, view));
        self.synced = done.is_some();
    }

    fn step(&mut self, now: Micros, budgets: &StepBudgets, changes: &Changes, plan: &mut Plan) -> Answer {
        let budget = self.core.shared.config.budgets.step;
        if !self.synced {
            return Answer::Native;
        }
        match self.call(Call::Step, now, budget, |instance, hard, wants| {
            step(instance, hard, now, Asked { wants, budgets, changes })
        }) {
            Some(Some(answer)) => {
                fill(plan, answer);
                Answer::Planned
            }
            Some(None) => Answer::Native,
            None => {
                if let Some(guest) = &self.generation.guest {
                    guest.fell_back();
                }
                Answer::Native
            }
        }
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        let Some(guest) = &self.generation.guest else { return };
        if let Some(wrong) = self.instance.take() {
            guest.discard(wrong);
        }
        (self.synced, self.trial) = (false, false);
        let fault = Fault::new(FaultKind::BadAnswer, format!("{}: {why}", self.replica));
        guest.fault(CallContext { call: Call::Step, number: guest.last_number(), now, took_us: 0 }, fault);
        guest.fell_back();
    }
}

impl Drop for SchedulerGuest {
    fn drop(&mut self) {
        if let (Some(guest), Some(instance)) = (&self.generation.guest, self.instance.take()) {
            guest.discard(instance);
        }
        self.leave();
        self.core.want(-1);
    }
}

impl std::fmt::Debug for SchedulerGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SchedulerGuest")
            .field("replica", &self.replica)
            .field("generation", &self.generation)
            .field("synced", &self.synced)
            .finish_non_exhaustive()
    }
}

// === calls ===

/// What a step is asked about.
#[derive(Clone, Copy)]
struct Asked<'a> {
    wants: &'a Wants,
    budgets: &'a StepBudgets,
    changes: &'a Changes,
}

fn resync(instance: &mut Instance<SchedulerHook>, hard: Micros, wants: &Wants, view: &View<'_>) -> Result<(), Fault> {
    let tenants = lower_tenants(view.tenants);
    let (of_waiting, of_running) = (wanted_columns(view.waiting, wants), wanted_columns(view.running, wants));
    let waiting = lower_sequences(view.waiting, &of_waiting[..wants.sequence.len()]);
    let running = lower_sequences(view.running, &of_running[..wants.sequence.len()]);
    let budgets = lower_budgets(view.budgets);
    instance.call(hard, view.now, |guest, store| {
        let scheduler = guest.pointsman_policy_scheduler();
        scheduler.call_resync(store, view.now, view.seed, budgets, &tenants, waiting, running)
    })
}

fn step(
    instance: &mut Instance<SchedulerHook>,
    hard: Micros,
    now: Micros,
    asked: Asked<'_>,
) -> Result<Option<wit::Plan>, Fault> {
    let Asked { wants, budgets, changes } = asked;
    let tenants = lower_tenants(&changes.new_tenants);
    let of_arrived = wanted_columns(&changes.arrived, wants);
    let changes = wit::Changes {
        new_tenants: &tenants,
        arrived: lower_sequences(&changes.arrived, &of_arrived[..wants.sequence.len()]),
        admitted: &changes.admitted,
        preempted: &changes.preempted,
        gone: &changes.gone,
        progress_id: &changes.progress_id,
        progress_computed: &changes.progress_computed,
        progress_generated: &changes.progress_generated,
        progress_blocks: &changes.progress_blocks,
    };
    let budgets = lower_budgets(budgets);
    let plan = instance
        .call(hard, now, |guest, store| guest.pointsman_policy_scheduler().call_step(store, now, budgets, changes))?;
    let Some(plan) = plan else { return Ok(None) };
    let longest = [&plan.admit, &plan.preempt, &plan.drop, &plan.prefill_id].into_iter().map(Vec::len).max();
    if longest.is_some_and(|longest| longest > MAX_PLAN_IDS) {
        let text = format!("a list of the plan has more than {MAX_PLAN_IDS} entries");
        return Err(Fault::new(FaultKind::BadAnswer, text));
    }
    Ok(Some(plan))
}

fn lower_tenants(tenants: &[(u32, Arc<str>)]) -> Vec<(u32, &str)> {
    tenants.iter().map(|(number, name)| (*number, &**name)).collect()
}

fn lower_budgets(budgets: &StepBudgets) -> wit::Budgets {
    wit::Budgets {
        step_tokens: budgets.step_tokens,
        running: budgets.running,
        free_blocks: budgets.free_blocks,
        total_blocks: budgets.total_blocks,
        block_tokens: budgets.block_tokens,
        last_step: budgets.last_step,
        last_step_tokens: budgets.last_step_tokens,
    }
}

/// The extra columns in the order of the manifest, which names each at most once.
fn wanted_columns<'a>(columns: &'a SequenceColumns, wants: &Wants) -> [&'a [u64]; MAX_SEQUENCE_COLUMNS] {
    let mut wanted: [&[u64]; MAX_SEQUENCE_COLUMNS] = [&[]; MAX_SEQUENCE_COLUMNS];
    for (place, column) in wanted.iter_mut().zip(&wants.sequence) {
        *place = match column {
            SequenceColumn::Session => &columns.session,
            SequenceColumn::Prefix => &columns.prefix,
        };
    }
    wanted
}

fn lower_sequences<'a>(columns: &'a SequenceColumns, extra: &'a [&'a [u64]]) -> wit::Sequences<'a> {
    wit::Sequences {
        id: &columns.id,
        prompt_tokens: &columns.prompt_tokens,
        cached_tokens: &columns.cached_tokens,
        computed_tokens: &columns.computed_tokens,
        generated_tokens: &columns.generated_tokens,
        max_new_tokens: &columns.max_new_tokens,
        held_blocks: &columns.held_blocks,
        priority: &columns.priority,
        tenant: &columns.tenant,
        arrived: &columns.arrived,
        deadline: &columns.deadline,
        extra,
    }
}

fn fill(plan: &mut Plan, answer: wit::Plan) {
    plan.admit = answer.admit;
    plan.rest = match answer.rest {
        wit::Rest::HostOrder => Rest::HostOrder,
        wit::Rest::Hold => Rest::Hold,
    };
    plan.preempt = answer.preempt;
    plan.drop = answer.drop;
    plan.prefill_id = answer.prefill_id;
    plan.prefill_tokens = answer.prefill_tokens;
}

// === probe ===

impl Hook for SchedulerHook {
    const WORLD: World = World::Scheduler;
    const MAX_ANSWER_BYTES: usize = 4 << 20;
    type Local = ();
    hook_bindings!(Scheduler, scheduler, SchedulerIndices, Scheduler);

    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        let step_budgets = probe_budgets();
        let (none, three) = (SequenceColumns::default(), probe_sequences(3));
        for (case, waiting) in [("nothing waits", &none), ("three requests wait", &three)] {
            let view =
                View { now, seed: 1, budgets: &step_budgets, tenants: &[(1, "probe".into())], waiting, running: &none };
            resync(instance, budgets.resync.hard, wants, &view).map_err(|fault| ProbeFault {
                case,
                call: Call::Resync,
                fault,
            })?;
            probe_steps(instance, budgets.step.hard, wants, (now, waiting)).map_err(|fault| ProbeFault {
                case,
                call: Call::Step,
                fault,
            })?;
        }
        Ok(())
    }

    /// Empty views leave no trace: the first real call is a resync, which replaces whatever the guest holds.
    fn warm(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), Fault> {
        let (step_budgets, none) = (probe_budgets(), SequenceColumns::default());
        let view = View { now, seed: 0, budgets: &step_budgets, tenants: &[], waiting: &none, running: &none };
        resync(instance, budgets.resync.hard, wants, &view)?;
        let asked = Asked { wants, budgets: &step_budgets, changes: &Changes::default() };
        step(instance, budgets.step.hard, now, asked).map(drop)
    }
}

/// Steps without news, with an arrival, and with what the host made of the plan.
fn probe_steps(
    instance: &mut Instance<SchedulerHook>,
    hard: Micros,
    wants: &Wants,
    (now, waiting): (Micros, &SequenceColumns),
) -> Result<(), Fault> {
    let budgets = probe_budgets();
    let mut shown = waiting.id.clone();
    let mut changes = Changes::default();
    for turn in 0..4 {
        changes.clear();
        match turn {
            1 => {
                changes.arrived = probe_sequences(1);
                changes.arrived.id = vec![100];
                shown.push(100);
            }
            2 => changes.admitted.push(100),
            3 => changes.gone.push(100),
            _ => {}
        }
        if let Some(plan) = step(instance, hard, now, Asked { wants, budgets: &budgets, changes: &changes })? {
            check_probe(&plan, &shown).map_err(|why| Fault::new(FaultKind::BadAnswer, why.to_string()))?;
        }
    }
    Ok(())
}

/// What the scheduler will check of every plan, for the few requests of a probe.
fn check_probe(plan: &wit::Plan, shown: &[u64]) -> Result<(), BadPlan> {
    for list in [&plan.admit, &plan.preempt, &plan.drop, &plan.prefill_id] {
        for (i, id) in list.iter().enumerate() {
            if !shown.contains(id) {
                return Err(BadPlan::UnknownId(*id));
            }
            if list[..i].contains(id) {
                return Err(BadPlan::Duplicate(*id));
            }
        }
    }
    if plan.prefill_id.len() != plan.prefill_tokens.len() {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        return Err(BadPlan::Lengths { ids: count(plan.prefill_id.len()), tokens: count(plan.prefill_tokens.len()) });
    }
    Ok(())
}

fn probe_budgets() -> StepBudgets {
    StepBudgets {
        step_tokens: 2_048,
        running: 16,
        free_blocks: 64,
        total_blocks: 128,
        block_tokens: 16,
        last_step: 5_000,
        last_step_tokens: 100,
    }
}

fn probe_sequences(n: u32) -> SequenceColumns {
    let column = |value: fn(u32) -> u32| (1..=n).map(value).collect::<Vec<u32>>();
    let times = || (1..=u64::from(n)).collect::<Vec<u64>>();
    SequenceColumns {
        id: times(),
        prompt_tokens: column(|i| i * 100),
        cached_tokens: column(|_| 16),
        computed_tokens: column(|_| 16),
        generated_tokens: column(|_| 0),
        max_new_tokens: column(|_| 32),
        held_blocks: column(|_| 1),
        priority: vec![2; n as usize],
        tenant: column(|_| 1),
        arrived: times(),
        deadline: vec![0; n as usize],
        session: times(),
        prefix: times(),
    }
}
