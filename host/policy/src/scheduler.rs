//! `BatchPolicy` with a scheduler guest behind it: one instance per replica, kept by the replica's driver.
//!
//! What keeping an instance takes is in `resident.rs`; here is what a scheduler has of its own. A guest over its soft budget
//! computes aside (`aside.rs`): its instance travels, its plans come a step late, and whether its circuit closes is known only
//! once a plan of it was checked, at a later boundary.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pointsman_sched::batch::{
    Answer, Attention, BadPlan, BatchPolicy, Budgets as StepBudgets, Changes, Plan, Rest, SequenceColumns, View,
};
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::aside::{Answered, Aside, Gone, OwnedView, Pace, Seat, Task};
use crate::bindings::scheduler::exports::pointsman::policy::scheduler as wit;
use crate::circuit::Admit;
use crate::config::Budgets;
use crate::fault::{Call, Fault, FaultKind};
use crate::generation::{Generation, Guest};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::{MAX_SEQUENCE_COLUMNS, SequenceColumn, Wants};
use crate::resident::Resident;
use crate::shadow::Case;
use crate::slot::{SlotCore, slot_by_core};
use crate::upload::World;
use crate::witness::{Beside, Heard, SchedulerSample, Witnesses, hear};

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
    /// Without an instance while that computes aside; synced where it has the view and every change since.
    resident: Resident<SchedulerHook>,
    pace: Pace,
    trial: Trial,
    /// Where it computes while it is over its soft budget.
    aside: Option<Aside>,
    /// What its next call begins with.
    view: Option<OwnedView>,
    /// What came back from there, for this boundary alone.
    late: Answered,
    /// The shadow, where the slot has one.
    beside: Beside,
}

/// Whether the guest decides if its circuit closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    No,
    /// By its next answer: it is computing aside, or has just come back.
    Asked,
    /// It answered this call. The circuit closes at the next boundary: by then the plan was checked.
    Answered(u64),
}

// === impl SchedulerSlot ===

impl SchedulerSlot {
    /// A policy for one more replica. Its instance is prepared by maintenance or by the next activation; until then the
    /// native policy decides.
    #[must_use]
    pub fn attach(&self, replica: &str) -> SchedulerGuest {
        SchedulerGuest {
            resident: Resident::new(&self.core, &replica.into()),
            pace: Pace::default(),
            trial: Trial::No,
            aside: None,
            view: None,
            late: Answered::Nothing,
            beside: Beside::default(),
        }
    }
}

// === impl SchedulerGuest ===

impl SchedulerGuest {
    /// Leaves the generation for the current one. A task that is out gives its instance back by itself.
    fn move_on(&mut self) {
        self.aside = None;
        self.pace = Pace::default();
        self.end_trial();
        self.forget();
        self.resident.move_on();
    }

    /// Nobody will hear of the answer that its circuit waits for.
    fn end_trial(&mut self) {
        if let Some(guest) = self.resident.guest() {
            match self.trial {
                Trial::No => {}
                Trial::Asked => guest.trial_withdrawn(),
                Trial::Answered(number) => guest.trial_passed(number),
            }
        }
        self.trial = Trial::No;
    }

    /// The guest starts from a view, the next time that it is asked.
    fn forget(&mut self) {
        self.resident.synced = false;
        self.view = None;
        self.beside.lose();
        self.drop_late();
    }

    /// What came back from aside is of no use any more.
    fn drop_late(&mut self) {
        if let Some(guest) = self.resident.guest() {
            self.late.forget(guest);
        }
    }

    /// The native policy decides this step.
    fn pause(&mut self) -> Attention {
        self.forget();
        Attention::Native
    }

    fn is_out(&self) -> bool {
        self.aside.as_ref().is_some_and(Aside::is_out)
    }

    /// Whether a guest answers for this replica.
    fn answers(&self) -> bool {
        self.resident.instance.is_some() || self.is_out()
    }

    fn seat(&mut self) -> Option<Seat<'_>> {
        let (guest, instance) = self.resident.parts()?;
        Some(Seat { guest, instance, pace: &mut self.pace })
    }

    /// Takes back the instance that was out, with its answer.
    fn take_back(&mut self) {
        self.drop_late();
        let Some(aside) = &mut self.aside else { return };
        let mut task = match aside.take() {
            Ok(Some(task)) => task,
            Ok(None) => return,
            Err(Gone) => {
                self.aside = None;
                return self.forget();
            }
        };
        let mut instance = task.instance.take();
        (self.pace, self.late) = (task.pace, std::mem::take(&mut task.answer));
        if task.doomed.swap(false, Ordering::Relaxed)
            && let (Some(guest), Some(wrong)) = (self.resident.guest(), instance.take())
        {
            guest.discard(wrong);
        }
        self.resident.instance = instance;
        self.lose_where_alone();
    }

    /// Without an instance there is no trial, and nothing that it knows.
    fn lose_where_alone(&mut self) {
        if self.resident.instance.is_none() {
            self.trial = Trial::No;
            self.forget();
        }
    }

    /// Answers whoever prepares the next generation, and says whether that took a call.
    fn hand_over(&mut self, now: Micros) -> bool {
        let had_one = self.resident.instance.is_some();
        self.resident.hand_over(now);
        if had_one {
            self.lose_where_alone();
        }
        self.resident.is_spent
    }

    /// Moves a slow guest aside and a quick one back.
    fn choose_side(&mut self) {
        if self.aside.is_some() && self.pace.is_quick() {
            self.aside = None;
        } else if self.aside.is_none() && self.pace.is_slow() {
            match Aside::hire(&self.resident.generation) {
                Ok(aside) => self.aside = Some(aside),
                Err(error) => {
                    tracing::warn!(replica = &*self.resident.owner, "no thread for a slow scheduler: {error}");
                    self.pace = Pace::default();
                }
            }
        }
    }

    /// Sends the instance aside with what is new, and takes what came back from there.
    fn ask_aside(&mut self, now: Micros, budgets: &StepBudgets, changes: &Changes) -> Answered {
        let Self { resident, aside, view, .. } = self;
        // One question at a time, also of a caller who does not look whether it is busy: a second one would lose an instance.
        let Some(aside) = aside.as_mut().filter(|aside| !aside.is_out()) else { return Answered::Nothing };
        aside.send(Task {
            owner: Arc::clone(&resident.owner),
            stay: Arc::clone(&resident.generation),
            instance: resident.instance.take(),
            pace: self.pace,
            view: view.take(),
            now,
            budgets: *budgets,
            changes: changes.clone(),
            answer: Answered::Nothing,
            doomed: aside.doomed(),
        });
        let late = std::mem::take(&mut self.late);
        if let (Answered::Plan(_), Some(guest)) = (&late, resident.guest()) {
            guest.came_late();
        }
        late
    }

    /// Tells the shadow of a step and of what the guest said to it.
    fn tell_shadow(&mut self, heard: Heard<'_>) {
        match self.resident.core.shadowed().filter(|_| self.aside.is_none()) {
            Some(shadow) => self.beside.step(&shadow, &self.resident.owner, heard),
            None => self.beside.lose(),
        }
    }
}

impl BatchPolicy for SchedulerGuest {
    fn attend(&mut self, now: Micros) -> Attention {
        if self.resident.is_outdated() {
            self.move_on();
        }
        self.take_back();
        // One that is out answers at the boundary that finds it back.
        if !self.is_out() && self.hand_over(now) {
            // Nothing else is asked at this boundary: it takes no longer than a decision may.
            return Attention::Busy;
        }
        let Some(guest) = self.resident.guest() else { return Attention::Native };
        match self.trial {
            Trial::Answered(number) => {
                guest.trial_passed(number);
                self.trial = Trial::No;
            }
            // Its answer found nothing to decide, or its thread is gone.
            Trial::Asked if !self.is_out() && matches!(self.late, Answered::Nothing) => {
                guest.trial_withdrawn();
                self.trial = Trial::No;
            }
            Trial::Asked | Trial::No => {}
        }
        if self.trial == Trial::No {
            // Only asked: the trial is for whoever has something to decide.
            match guest.would_admit(now) {
                Admit::Trial if self.view.is_none() => self.forget(),
                Admit::Yes | Admit::Trial => {}
                Admit::No => return self.pause(),
            }
        }
        if self.is_out() {
            return Attention::Busy;
        }
        self.resident.be_seated(now);
        if self.resident.is_spent {
            return Attention::Busy;
        }
        if self.resident.instance.is_none() {
            return self.pause();
        }
        self.choose_side();
        if self.resident.synced { Attention::Following } else { Attention::NeedsView }
    }

    fn generation(&self) -> u64 {
        if self.answers() { self.resident.generation.number() } else { 0 }
    }

    fn revision(&self) -> Arc<str> {
        if self.answers() { Arc::clone(&self.resident.decided_by().revision) } else { DecidedBy::native(0).revision }
    }

    fn wants_progress(&self) -> bool {
        let wants =
            |generation: &Generation<SchedulerHook>| generation.guest.as_ref().is_some_and(|g| g.wants.progress);
        let shadow = || self.resident.core.shadowed();
        wants(&self.resident.generation) || shadow().is_some_and(|shadow| wants(&shadow.case.candidate))
    }

    fn resync(&mut self, view: &View<'_>) {
        self.drop_late();
        self.beside.lose();
        let Some(guest) = self.resident.guest() else { return };
        if self.aside.is_none() && guest.would_admit(view.now) == Admit::Yes {
            self.resident.synced = self.seat().is_some_and(|mut seat| seat.resync(view));
        } else {
            // Told with the next question, which is the trial where one is needed.
            self.view = Some(view.into());
            self.resident.synced = true;
        }
    }

    fn step(&mut self, now: Micros, budgets: &StepBudgets, changes: &Changes, plan: &mut Plan) -> Answer {
        let Some(guest) = self.resident.guest().filter(|_| self.resident.synced) else { return Answer::Native };
        if self.trial == Trial::No {
            match guest.admit(now) {
                Admit::Yes => {}
                Admit::Trial => self.trial = Trial::Asked,
                // Another replica is at its trial.
                Admit::No => {
                    guest.fell_back();
                    self.forget();
                    return Answer::Native;
                }
            }
        }
        let answer = match self.aside {
            Some(_) => self.ask_aside(now, budgets, changes),
            None => {
                let view = self.view.take();
                self.seat().map_or(Answered::Nothing, |mut seat| seat.answer(view, now, (budgets, changes)))
            }
        };
        self.tell_shadow(Heard { now, budgets, changes, answer: &answer });
        if matches!(answer, Answered::Nothing) {
            self.resident.fell_back();
            if self.aside.is_none() {
                (self.resident.synced, self.trial) = (false, Trial::No);
            }
            return Answer::Native;
        }
        if self.trial == Trial::Asked {
            self.trial = Trial::Answered(self.resident.guest().map_or(0, Guest::last_number));
        }
        match answer {
            Answered::Plan(answer) => {
                *plan = answer;
                Answer::Planned
            }
            Answered::NoPlan | Answered::Nothing => Answer::Native,
        }
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        self.aside.iter().for_each(Aside::doom);
        self.trial = Trial::No;
        self.forget();
        self.resident.refused(Call::Step, now, &why);
    }

    fn wants_view(&mut self) -> bool {
        let shadow = self.resident.core.shadowed().filter(|_| self.resident.synced && self.aside.is_none());
        shadow.is_some_and(|shadow| self.beside.wants_view(&shadow))
    }

    fn show(&mut self, view: &View<'_>) {
        if let Some(shadow) = self.resident.core.shadowed() {
            self.beside.show(&shadow, &self.resident.owner, view);
        }
    }

    fn stood_in(&mut self) {
        self.resident.fell_back();
    }
}

impl Drop for SchedulerGuest {
    fn drop(&mut self) {
        self.beside.leave(&self.resident.owner);
        self.end_trial();
        self.drop_late();
    }
}

impl std::fmt::Debug for SchedulerGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SchedulerGuest")
            .field("resident", &self.resident)
            .field("is_out", &self.is_out())
            .finish_non_exhaustive()
    }
}

// === calls ===

/// What a step is asked about.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) wants: &'a Wants,
    pub(crate) budgets: &'a StepBudgets,
    pub(crate) changes: &'a Changes,
}

pub(crate) fn resync(
    instance: &mut Instance<SchedulerHook>,
    hard: Micros,
    wants: &Wants,
    view: &View<'_>,
) -> Result<(), Fault> {
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

pub(crate) fn step(
    instance: &mut Instance<SchedulerHook>,
    hard: Micros,
    now: Micros,
    asked: Asked<'_>,
) -> Result<Option<Plan>, Fault> {
    let Asked { wants, budgets, changes } = asked;
    let tenants = lower_tenants(&changes.new_tenants);
    let of_arrived = wanted_columns(&changes.arrived, wants);
    // Told also where only a shadow wants it.
    let none = Changes::default();
    let progress = if wants.progress { changes } else { &none };
    let changes = wit::Changes {
        new_tenants: &tenants,
        arrived: lower_sequences(&changes.arrived, &of_arrived[..wants.sequence.len()]),
        admitted: &changes.admitted,
        preempted: &changes.preempted,
        gone: &changes.gone,
        progress_id: &progress.progress_id,
        progress_computed: &progress.progress_computed,
        progress_generated: &progress.progress_generated,
        progress_blocks: &progress.progress_blocks,
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
    Ok(Some(lift_plan(plan)))
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

fn lift_plan(plan: wit::Plan) -> Plan {
    Plan {
        admit: plan.admit,
        rest: match plan.rest {
            wit::Rest::HostOrder => Rest::HostOrder,
            wit::Rest::Hold => Rest::Hold,
        },
        preempt: plan.preempt,
        drop: plan.drop,
        prefill_id: plan.prefill_id,
        prefill_tokens: plan.prefill_tokens,
    }
}

// === probe ===

impl Hook for SchedulerHook {
    const WORLD: World = World::Scheduler;
    const MAX_ANSWER_BYTES: usize = 4 << 20;
    type Local = ();
    const DIFFERENCES: &'static [&'static str] =
        &["other-refusal", "other-preemption", "other-admission", "other-prefill"];
    hook_bindings!(Scheduler, scheduler, SchedulerIndices, Scheduler, SchedulerSample, Witnesses, ());

    fn shadow(case: &Case<Self>, witnesses: &mut Witnesses, sample: SchedulerSample) {
        hear(case, witnesses, sample);
    }

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
            check_plan(&plan, &shown.iter().copied().collect())
                .map_err(|why| Fault::new(FaultKind::BadAnswer, why.to_string()))?;
        }
    }
    Ok(())
}

/// What the scheduler checks of every plan, where that is not there to do it: in a probe, and of a shadow.
pub(crate) fn check_plan(plan: &Plan, known: &HashSet<u64>) -> Result<(), BadPlan> {
    for list in [&plan.admit, &plan.preempt, &plan.drop, &plan.prefill_id] {
        let mut named = HashSet::with_capacity(list.len().min(known.len()));
        for id in list {
            if !known.contains(id) {
                return Err(BadPlan::UnknownId(*id));
            }
            if !named.insert(*id) {
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
