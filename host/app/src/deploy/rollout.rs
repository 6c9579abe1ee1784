//! Rollouts on real slots: a candidate is staged, the observer thread switches arms and feeds events, decisions become stored
//! documents, journal lines and pointer swaps.
//!
//! The observer must not wait for somebody's activation, which may compile for seconds: what needs `operations` is kept until
//! it is free, while a candidate that harms is taken off at once, by the slot's own pointer. `rollouts` nests inside
//! `operations` and outside `state`. As with every change here the document is stored before the pointer moves.
//!
//! A shadow never moves the pointer: the slot puts decisions to it while its rollout runs, and every look collects how it has
//! answered.

use std::collections::VecDeque;

use pointsman_control::rollout::{
    Answers, Arm, Cause, Command, Decision, Mode, OnRestart, Outcome, Phase, Plan, PolicyCost, Report, Rollout,
    RolloutDocument, Seen, Spec, Split,
};
use pointsman_control::{ComponentRef, Desired, Happened, PlanError, Planned, SlotName, Target, Why};
use pointsman_policy::{Arm as SlotArm, Compared, Handover as Rule, Health, Role, SlotStatus};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, Clock};
use pointsman_telemetry::{ArmMetrics, Event, Metrics};
use serde_json::value::RawValue;

use crate::clock::seconds;

use super::activate::Ready;
use super::admin::parse_slot;
use super::errors::{conflict, internal, invalid, not_found, plan_error};
use super::{Deploy, Failed, budget, handover, lock, on_fault};

/// The actor of what a rollout does by its own rules.
pub(crate) const ACTOR: &str = "rollout";

/// A rollout under way.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) rollout: Rollout,
    /// Of control and candidate.
    arms: [ArmMetrics; 2],
    /// How a shadow has answered, as far as metrics tell.
    told: Answers,
    /// Lines that wait for `operations`, with who did it.
    pub(crate) pending: VecDeque<(String, Happened)>,
}

// === impl Live ===

impl Live {
    fn new(slot: &SlotName, document: RolloutDocument, control: u64, metrics: &Metrics) -> Self {
        let candidate = document.target.as_ref().map_or(0, |target| target.generation);
        let generations = (*slot == SlotName::Router).then_some([control, candidate]);
        Self::of(Rollout::new(document, Split::Time { generations }), metrics)
    }

    pub(crate) fn of(rollout: Rollout, metrics: &Metrics) -> Self {
        let subject = &rollout.document().subject;
        let arms = [Arm::Control, Arm::Candidate].map(|arm| metrics.arm(subject, arm.as_str()));
        Self { rollout, arms, told: Answers::default(), pending: VecDeque::new() }
    }

    /// Shows it what happened since it looked last.
    pub(crate) fn show(&mut self, events: &[Event], dropped: u64) {
        if dropped > 0 {
            self.rollout.lost_events();
        }
        events.iter().for_each(|event| self.take(event));
    }

    /// Whether it is over and all its lines are written.
    pub(crate) fn is_done(&self) -> bool {
        self.rollout.document().phase.is_over() && self.pending.is_empty()
    }

    fn take(&mut self, event: &Event) {
        let Self { rollout, arms, .. } = self;
        rollout.note(event, &mut |Seen { arm, what }| count(&arms[arm as usize], what));
    }

    /// Keeps what is to be journalled, with the numbers of this moment. Returns the arms that are to serve, in order.
    pub(crate) fn keep(&mut self, actor: &str, commands: Vec<Command>) -> Vec<Arm> {
        let document = self.rollout.document();
        let mut serve = Vec::new();
        for command in commands {
            let (id, subject) = (document.id.clone(), document.subject.clone());
            let happened = match command {
                Command::Serve(arm) => {
                    serve.push(arm);
                    continue;
                }
                Command::Observed(period) => Happened::RolloutObserved { id, subject, period },
                Command::Decided(decision) => {
                    let evidence = Box::new(document.evidence());
                    Happened::RolloutDecided { id, subject, decision, evidence }
                }
            };
            self.pending.push_back((actor.to_owned(), happened));
        }
        serve
    }
}

// === what the observer thread does ===

impl Deploy {
    /// Shows events to the rollouts under way.
    pub(crate) fn show_rollouts(&self, events: &[Event], dropped: u64) {
        lock(&self.rollouts).values_mut().for_each(|live| live.show(events, dropped));
    }

    /// Lets every rollout look at the time and at its candidate's health, and does what it says.
    pub(crate) fn tick_rollouts(&self) {
        let mut rollouts = lock(&self.rollouts);
        for (slot, live) in rollouts.iter_mut() {
            if !live.rollout.document().phase.is_over() {
                self.hear(slot, live);
                let now = self.clock.micros();
                let commands = match self.hard_fault(slot) {
                    Some(what) => live.rollout.hard_fault(what, now),
                    None => live.rollout.tick(now),
                };
                self.obey(slot, live, ACTOR, commands);
            }
            if !live.pending.is_empty()
                && let Ok(_one) = self.operations.try_lock()
            {
                self.settle(slot, live);
            }
        }
        rollouts.retain(|_, live| !live.is_done());
    }

    /// What a candidate has done that no experiment outweighs: its circuit has opened, or it is gone.
    fn hard_fault(&self, slot: &SlotName) -> Option<String> {
        let Some(status) = self.live_slot(slot).and_then(|s| s.candidate()) else {
            return Some("the candidate is not staged any more".to_owned());
        };
        let last =
            status.last_fault.as_ref().map(|f| format!("{} in {}: {}", f.kind.as_str(), f.call.as_str(), f.message));
        let n: u64 = status.faults.iter().sum();
        (status.health != Health::Closed)
            .then(|| format!("{n} faults in {} calls; the last: {}", status.calls, last.unwrap_or_default()))
    }

    /// Takes in how a shadow has answered so far.
    fn hear(&self, slot: &SlotName, live: &mut Live) {
        let Some(compared) = self.live_slot(slot).and_then(|s| s.compared()) else { return };
        let answers = answers(compared);
        for (outcome, n) in outcomes(&answers.since(&live.told)) {
            self.metrics.shadow(&slot.to_string(), outcome).inc_by(n);
        }
        live.told = answers.clone();
        live.rollout.answered(answers);
    }

    /// Has decisions put to a shadow while its rollout runs, and none otherwise.
    fn follow(&self, slot: &SlotName, live: &mut Live) {
        let document = live.rollout.document();
        let Some(shadowed) = self.live_slot(slot).filter(|_| document.spec.mode == Mode::Shadow) else { return };
        if document.phase != Phase::Running {
            // A slot that has no candidate any more puts nothing to it either.
            drop(shadowed.shadow(0));
        } else if let Err(error) = shadowed.shadow(document.spec.sample_ppm()) {
            let decision = Decision::Abort { cause: Cause::Host { what: error.to_string() } };
            let commands = live.rollout.decide(decision, self.clock.micros());
            live.keep("host", commands);
        }
    }

    /// Moves the pointer at once and keeps the rest for [`Deploy::settle`].
    fn obey(&self, slot: &SlotName, live: &mut Live, actor: &str, commands: Vec<Command>) {
        if commands.is_empty() {
            return;
        }
        let mut serve = live.keep(actor, commands);
        self.follow(slot, live);
        if matches!(live.rollout.document().phase, Phase::Aborted { .. } | Phase::Completed) {
            serve.push(Arm::Control);
        }
        for arm in serve {
            let served = self.serve(slot, arm);
            let now = self.clock.micros();
            if let Err(what) = served {
                let commands = live.rollout.decide(Decision::Abort { cause: Cause::Host { what } }, now);
                live.keep("host", commands);
                return;
            }
            live.rollout.served(now);
        }
    }

    fn serve(&self, slot: &SlotName, arm: Arm) -> Result<(), String> {
        let live = self.live_slot(slot).ok_or_else(|| format!("the slot `{slot}` is gone"))?;
        let arm = match arm {
            Arm::Control => SlotArm::Control,
            Arm::Candidate => SlotArm::Candidate,
        };
        live.serve(arm).map(drop).map_err(|error| error.to_string())
    }
}

// === what is stored ===

impl Deploy {
    /// Stores the document, ends what is over, and journals what was kept. The caller holds `operations`.
    fn settle(&self, slot: &SlotName, live: &mut Live) {
        let document = live.rollout.document().clone();
        let promoted = document.phase == Phase::Promoted;
        let retired = promoted.then(|| self.previous_of(slot)).flatten();
        if let Err(error) = self.store_rollout(slot, document.clone()) {
            tracing::error!(%slot, rollout = document.id, "the slot's document cannot be stored: {error}");
            if promoted {
                // What is not stored would be undone by a restart: control serves until somebody has looked.
                let why = format!("the candidate was not promoted: the slot's document cannot be stored ({error})");
                let commands = live.rollout.decide(Decision::Pause { why }, self.clock.micros());
                self.obey(slot, live, "host", commands);
            }
        }
        let phase = live.rollout.document().phase.clone();
        for (actor, happened) in live.pending.drain(..) {
            if let Happened::RolloutDecided { decision, id, .. } = &happened {
                tracing::info!(%slot, rollout = id, actor, "rollout: {decision:?}");
            }
            self.note(&actor, happened);
        }
        match phase {
            Phase::Running | Phase::Paused { .. } => {}
            Phase::Promoted => self.promoted(slot, retired, live),
            Phase::Aborted { .. } | Phase::Completed => self.taken_back(slot, live),
        }
    }

    fn previous_of(&self, slot: &SlotName) -> Option<Target> {
        lock(&self.state).slot(slot).and_then(|state| state.previous.clone())
    }

    fn store_rollout(&self, slot: &SlotName, rollout: RolloutDocument) -> std::io::Result<()> {
        let promoted = rollout.phase == Phase::Promoted;
        let mut next = lock(&self.state).clone();
        let Some(document) = next.rolled(slot, rollout) else { return Ok(()) };
        let stored = self.store_slot(&document);
        // An end that the disk did not take holds in this life all the same, or the slot could never be changed again; only a
        // promotion must be stored first.
        if stored.is_ok() || !promoted {
            *lock(&self.state) = next;
        }
        stored
    }

    fn promoted(&self, slot: &SlotName, retired: Option<Target>, live: &Live) {
        let Some(state) = lock(&self.state).slot(slot).cloned() else { return };
        match self.live_slot(slot).map(|s| s.promote()) {
            Some(Ok(_)) => {}
            Some(Err(error)) => tracing::error!(%slot, "the promoted policy does not serve: {error}"),
            None => tracing::error!(%slot, "the slot is gone"),
        }
        let before = state.previous.map(|p| p.revision);
        let keep = [Some(state.active.revision.as_str()), before.as_deref()];
        let retired: Vec<String> = retired.into_iter().map(|t| t.revision).collect();
        self.forget_retired(slot, keep, &retired);
        self.forget_arms(slot, &live.told);
        self.note(ACTOR, Happened::Published { slot: slot.clone(), target: state.active, before, why: Why::Rollout });
    }

    fn taken_back(&self, slot: &SlotName, live: &Live) {
        // A slot that could not take the candidate back has none: control serves either way.
        if let Some(Err(error)) = self.live_slot(slot).map(|s| s.unstage()) {
            tracing::warn!(%slot, "{error}");
        }
        let state = lock(&self.state).slot(slot).cloned();
        let active = state.as_ref().map(|s| s.active.revision.as_str());
        let previous = state.as_ref().and_then(|s| s.previous.as_ref()).map(|p| p.revision.as_str());
        self.forget_retired(slot, [active, previous], std::slice::from_ref(&live.rollout.document().candidate));
        self.forget_arms(slot, &live.told);
    }

    fn forget_arms(&self, slot: &SlotName, told: &Answers) {
        for arm in [Arm::Control, Arm::Candidate] {
            self.metrics.forget_arm(&slot.to_string(), arm.as_str());
        }
        for (outcome, _) in outcomes(told) {
            self.metrics.forget_shadow(&slot.to_string(), outcome);
        }
    }
}

// === what operators ask ===

impl Deploy {
    pub(super) fn begin_rollout(
        &self,
        slot: &str,
        request: wire::StartRollout,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        let slot = parse_slot(slot)?;
        let wire::StartRollout { component, config, state_namespace, budget, handover, on_fault, if_generation, plan } =
            request;
        let plan: Plan = serde_json::from_str(&plan).map_err(|error| invalid(format!("the plan: {error}")))?;
        let spec = plan.spec(self.clock.random());
        spec.check_slot(&slot).and_then(|()| spec.check()).map_err(|error| invalid(error.to_string()))?;
        let component = self.component_of(&component, actor)?;
        let config = config.get().to_owned();
        let (budget, handover) = (budget::stored(budget), handover::stored(handover));
        let on_fault = on_fault::stored(on_fault);
        let desired = Desired { component, config, state_namespace, budget, handover, on_fault, if_generation };
        self.check_measurable().and_then(|()| self.compile_first(&slot, &desired, Some(actor)))?;
        let _one = lock(&self.operations);
        self.check_changeable(Some(&slot)).and_then(|()| self.check_measurable())?;
        if matches!(lock(&self.failed).get(&slot), Some(Failed::Policy(_))) {
            return Err(conflict(format!(
                "`{slot}` does not run what is stored for it; activate something there first"
            )));
        }
        let control = lock(&self.state).slot(&slot).map(|state| state.active.clone());
        let control = control.ok_or_else(|| plan_error(PlanError::NoSlot(slot.clone())))?;
        check_comparable(&slot, &spec, [&control.component, &desired.component])?;
        let planned = lock(&self.state).plan(slot.clone(), desired).map_err(plan_error)?;
        let generation = planned.generation;
        let rule = handover::rule(handover, Why::Rollout);
        let ready = self.prepare_noted(&planned, (role(spec.mode), rule), actor)?;
        let handed = handover::answered(&ready);
        let names = [control.revision, ready.revision()];
        let document = RolloutDocument::new(format!("{slot}-{generation}"), slot.to_string(), names, spec);
        let document = RolloutDocument { target: Some(planned.target(ready.revision())), ..document };
        let mut next = lock(&self.state).clone();
        let stored = next.rolled(&slot, document.clone());
        let stored = stored.ok_or_else(|| plan_error(PlanError::NoSlot(slot.clone())))?;
        self.store_slot(&stored)
            .map_err(|e| internal(format!("nothing was started: the document of `{slot}` cannot be stored ({e})")))?;
        self.stage(&slot, ready, generation).inspect_err(|_| self.store_again(&slot))?;
        *lock(&self.state) = next;
        self.note(actor, Happened::RolloutStarted { rollout: Box::new(document.clone()) });
        self.note_handover(actor, (&slot, generation), handed.as_ref());
        let mut live = Live::new(&slot, document, control.generation, &self.metrics);
        self.follow(&slot, &mut live);
        let report = self.report(&slot, live.rollout.document());
        lock(&self.rollouts).insert(slot, live);
        report
    }

    fn stage(&self, slot: &SlotName, ready: Ready, generation: u64) -> Result<(), AdminError> {
        let target = self.live_slot(slot).ok_or_else(|| plan_error(PlanError::NoSlot(slot.clone())))?;
        let staged = match ready {
            Ready::Native => target.stage_native(generation),
            Ready::Guest(prepared) => target.stage(*prepared),
        };
        staged.map_err(|error| internal(error.to_string()))
    }

    pub(super) fn last_rollout(&self, slot: &str) -> Result<Option<Box<RawValue>>, AdminError> {
        let slot = parse_slot(slot)?;
        if let Some(live) = lock(&self.rollouts).get(&slot) {
            return self.report(&slot, live.rollout.document()).map(Some);
        }
        let last = lock(&self.state).slot(&slot).and_then(|state| state.rollout.clone());
        last.map(|document| self.report(&slot, &document)).transpose()
    }

    pub(super) fn one_rollout(&self, slot: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        let name = parse_slot(slot)?;
        let last = lock(&self.state).slot(&name).and_then(|state| state.rollout.as_ref().map(|r| r.id.clone()));
        match last {
            Some(last) if last == id => self.last_rollout(slot)?.ok_or_else(|| no_rollout(slot, id)),
            _ => Err(no_rollout(slot, id)),
        }
    }

    pub(super) fn steer(
        &self,
        slot: &str,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        self.one_rollout(slot, id)?;
        let name = parse_slot(slot)?;
        self.check_changeable(Some(&name))?;
        let takes_off = matches!(steer, wire::Steer::Abort | wire::Steer::Pause);
        if takes_off {
            // At once, whoever holds the lock; what is stored, and the answer, come after.
            self.decide(&name, id, steer, actor)?;
        }
        let _one = lock(&self.operations);
        if !takes_off {
            self.check_changeable(Some(&name))?;
            if matches!(steer, wire::Steer::Resume) {
                self.check_measurable()?;
            }
            self.decide(&name, id, steer, actor)?;
        }
        let mut rollouts = lock(&self.rollouts);
        // Settled by now where the observer thread was faster.
        if let Some(live) = rollouts.get_mut(&name).filter(|live| !live.pending.is_empty()) {
            self.settle(&name, live);
            if live.rollout.document().phase.is_over() {
                rollouts.remove(&name);
            }
        }
        drop(rollouts);
        self.one_rollout(slot, id)
    }

    /// Decides what was asked for and moves the pointer; the rest is kept for [`Deploy::settle`].
    fn decide(&self, slot: &SlotName, id: &str, steer: wire::Steer, actor: &str) -> Result<(), AdminError> {
        let mut rollouts = lock(&self.rollouts);
        let Some(live) = rollouts.get_mut(slot).filter(|live| live.rollout.document().id == id) else {
            return Err(conflict(format!("rollout {id} is over; start another")));
        };
        let document = live.rollout.document();
        let decision = match steer {
            wire::Steer::Promote { step } => document.ask_promote(step),
            wire::Steer::Abort => document.ask_abort(),
            wire::Steer::Pause => document.ask_pause(),
            wire::Steer::Resume => document.ask_resume(),
        };
        let decision = decision.map_err(|error| conflict(error.to_string()))?;
        let commands = live.rollout.decide(decision, self.clock.micros());
        self.obey(slot, live, actor, commands);
        Ok(())
    }

    /// Pauses every rollout under way: while all slots are native, what is measured says nothing about its arms. The caller
    /// holds `operations`.
    pub(super) fn pause_rollouts(&self, actor: &str) {
        for (slot, live) in lock(&self.rollouts).iter_mut() {
            let Ok(decision) = live.rollout.document().ask_pause() else { continue };
            let commands = live.rollout.decide(decision, self.clock.micros());
            self.obey(slot, live, actor, commands);
            self.settle(slot, live);
        }
    }

    /// Refuses to measure while all slots are native.
    fn check_measurable(&self) -> Result<(), AdminError> {
        match self.safe_reason() {
            Some(reason) => Err(conflict(format!("{reason}; nothing can be measured until it is off"))),
            None => Ok(()),
        }
    }

    /// The report of a rollout, with what its policies cost while both are warm.
    fn report(&self, slot: &SlotName, document: &RolloutDocument) -> Result<Box<RawValue>, AdminError> {
        let mut report = Report::of(document);
        if let Some(live) = self.live_slot(slot).filter(|_| !document.phase.is_over()) {
            report.arm_mut(Arm::Control).policy = Some(cost(&live.status()));
            report.arm_mut(Arm::Candidate).policy = live.candidate().as_ref().map(cost);
        }
        RawValue::from_string(report.to_json()).map_err(|error| internal(error.to_string()))
    }
}

// === after a restart ===

impl Deploy {
    /// Takes up a rollout that was under way when the host died: with its candidate staged again, paused or running as its plan
    /// says. Where that fails, control serves and the rollout is aborted. The caller holds `operations`.
    pub(super) fn restore_rollout(&self, slot: &SlotName, control_serves: bool) {
        let found = lock(&self.state).slot(slot).and_then(|s| Some((s.active.generation, s.rollout.clone()?)));
        let Some((control, document)) = found else { return };
        if document.phase.is_over() {
            return;
        }
        self.note("startup", Happened::RolloutRestored { rollout: Box::new(document.clone()) });
        let staged = match control_serves {
            true => self.stage_again(slot, &document),
            false => Err(internal("the policy that served before cannot be brought back".into())),
        };
        let (is_running, on_restart) = (document.phase == Phase::Running, document.spec.on_restart);
        let mut live = Live::new(slot, document, control, &self.metrics);
        let decision = match staged {
            Err(error) => Some(Decision::Abort { cause: Cause::Host { what: error.message } }),
            Ok(()) if is_running && on_restart == OnRestart::Pause => {
                Some(Decision::Pause { why: "the host was restarted".into() })
            }
            Ok(()) => None,
        };
        if let Some(decision) = decision {
            let commands = live.rollout.decide(decision, self.clock.micros());
            live.keep("startup", commands);
            self.settle(slot, &mut live);
        }
        self.follow(slot, &mut live);
        if !live.rollout.document().phase.is_over() {
            lock(&self.rollouts).insert(slot.clone(), live);
        }
    }

    fn stage_again(&self, slot: &SlotName, document: &RolloutDocument) -> Result<(), AdminError> {
        let target = document.target.clone().ok_or_else(|| internal("its document names no policy".into()))?;
        let generation = target.generation;
        let planned = Planned { slot: slot.clone(), desired: target.into(), generation };
        self.prepare(&planned, role(document.spec.mode), Rule::Cold)
            .and_then(|ready| self.stage(slot, ready, generation))
    }
}

/// Refuses a shadow whose plans have nothing to be compared with.
fn check_comparable(slot: &SlotName, spec: &Spec, policies: [&ComponentRef; 2]) -> Result<(), AdminError> {
    let makes_plans = *slot != SlotName::Scheduler || !policies.contains(&&ComponentRef::Native);
    if spec.mode != Mode::Shadow || makes_plans {
        return Ok(());
    }
    let message =
        "the native scheduler writes no plans that could be compared; `sched-fcfs` orders requests as it does";
    Err(invalid(message.into()))
}

/// Whose host-state the candidate of a mode has.
fn role(mode: Mode) -> Role {
    if mode == Mode::Shadow { Role::Shadow } else { Role::Candidate }
}

fn answers(compared: Compared) -> Answers {
    let Compared { agreed, differed, unanswered, dropped, call_p50_ns, call_p99_ns } = compared;
    let differed = differed.into_iter().map(|(kind, n)| (kind.to_owned(), n)).collect();
    Answers { agreed, differed, unanswered, dropped, call_p50_ns, call_p99_ns }
}

/// As metrics tell them apart.
fn outcomes(answers: &Answers) -> impl Iterator<Item = (&str, u64)> {
    let others = [("agreed", answers.agreed), ("unanswered", answers.unanswered), ("dropped", answers.dropped)];
    others.into_iter().chain(answers.differed.iter().map(|(kind, n)| (kind.as_str(), *n)))
}

fn count(metrics: &ArmMetrics, what: Outcome) {
    match what {
        Outcome::Admitted { prompt_tokens, cached_tokens } => {
            metrics.prompt_tokens.inc_by(prompt_tokens.into());
            metrics.cached_tokens.inc_by(cached_tokens.into());
        }
        Outcome::FirstToken { ttft_us } => metrics.ttft.observe(seconds(ttft_us)),
        Outcome::Finished { e2e_us, itl_us, tokens, good } => {
            metrics.finished.inc();
            metrics.e2e.observe(seconds(e2e_us));
            itl_us.into_iter().for_each(|itl| metrics.itl.observe(seconds(itl)));
            metrics.generated_tokens.inc_by(tokens);
            metrics.good.inc_by(good.into());
        }
        Outcome::Rejected => metrics.rejected.inc(),
        Outcome::Failed => metrics.failed.inc(),
        Outcome::Cancelled => metrics.cancelled.inc(),
    }
}

fn no_rollout(slot: &str, id: &str) -> AdminError {
    not_found(format!(
        "no rollout `{id}` in `{slot}`: GET /admin/v1/slots/{slot}/rollouts has the last one, the journal those before it"
    ))
}

fn cost(status: &SlotStatus) -> PolicyCost {
    PolicyCost {
        calls: status.calls,
        call_mean_us: (status.calls > 0).then(|| status.call_ns as f64 / status.calls as f64 * 1e-3),
        faults: status.faults.iter().sum(),
        fallbacks: status.fallbacks,
    }
}
