//! Rollouts on real slots: a candidate is staged, the observer thread switches arms and feeds events, decisions become stored
//! documents, journal lines and pointer swaps.
//!
//! The observer must not wait for somebody's activation, which may compile for seconds: what needs `operations` is kept until
//! it is free, while a candidate that harms is taken off at once, by the slot's own pointer. `rollouts` nests inside
//! `operations` and outside `state`. As with every change here the document is stored before the pointer moves; except that what
//! takes the candidate off holds in this life whatever the disk says, and is stored as soon as the disk takes it.
//!
//! A shadow never moves the pointer: the slot puts decisions to it while its rollout runs, and every look collects how it has
//! answered.

use std::collections::VecDeque;
use std::io;

use pointsman_control::rollout::{
    Answers, Arm, Cause, Command, Decision, Mode, OnRestart, Outcome, Phase, Plan, PolicyCost, Report, Rollout,
    RolloutDocument, Seen, Spec, Split,
};
use pointsman_control::{Deployment, Desired, Happened, PlanError, Planned, SlotName, Target, Why};
use pointsman_policy::{Arm as SlotArm, Compared, Handover as Rule, Health, Role, SlotStatus};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, Clock};
use pointsman_telemetry::{ArmMetrics, Event, Metrics, Micros};
use serde_json::value::RawValue;

use crate::clock::seconds;

use super::activate::Ready;
use super::admin::parse_slot;
use super::errors::{conflict, internal, invalid, not_found, plan_error};
use super::{Deploy, Failed, budget, handover, lock, on_fault};

/// The actor of what a rollout does by its own rules.
pub(crate) const ACTOR: &str = "rollout";
/// Time until a document that the disk has refused is tried again.
const SAVE_AGAIN_US: Micros = 5_000_000;

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
    /// What stands in the way of its document.
    pub(super) unsaved: Option<Unsaved>,
}

/// A document that the disk has refused.
#[derive(Debug)]
pub(super) struct Unsaved {
    error: String,
    /// When it is tried again.
    pub(super) again: Micros,
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
        Self { rollout, arms, told: Answers::default(), pending: VecDeque::new(), unsaved: None }
    }

    /// Shows it what happened since it looked last.
    pub(crate) fn show(&mut self, events: &[Event], dropped: u64) {
        if dropped > 0 {
            self.rollout.lost_events();
        }
        events.iter().for_each(|event| self.take(event));
    }

    /// Whether it is over, stored, and all its lines are written.
    pub(crate) fn is_done(&self) -> bool {
        self.rollout.document().phase.is_over() && self.is_settled()
    }

    /// Whether nothing waits to be stored or written.
    fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.unsaved.is_none()
    }

    /// Whether something waits whose time has come.
    pub(crate) fn is_due(&self, now: Micros) -> bool {
        !self.pending.is_empty() || self.unsaved.as_ref().is_some_and(|unsaved| unsaved.again <= now)
    }

    /// Takes in whether its document was stored.
    pub(crate) fn saved(&mut self, stored: io::Result<()>, now: Micros) {
        self.unsaved = stored.err().map(|error| Unsaved { error: error.to_string(), again: now + SAVE_AGAIN_US });
    }

    /// Whether this holds already and only has to be stored.
    pub(crate) fn is_asked_again(&self, steer: wire::Steer) -> bool {
        let phase = &self.rollout.document().phase;
        let holds = matches!(
            (steer, phase),
            (wire::Steer::Abort, Phase::Aborted { .. }) | (wire::Steer::Pause, Phase::Paused { .. })
        );
        holds && self.unsaved.is_some()
    }

    /// What somebody is told who has taken the candidate off.
    ///
    /// # Errors
    /// It is off, and the disk has not taken that.
    pub(crate) fn check_saved(&self) -> Result<(), AdminError> {
        let Some(Unsaved { error, .. }) = &self.unsaved else { return Ok(()) };
        let RolloutDocument { id, phase, .. } = self.rollout.document();
        let (phase, every) = (phase.as_str(), SAVE_AGAIN_US / 1_000_000);
        Err(internal(format!(
            "rollout {id} is {phase} and control serves, but a restart would take it up again: its document cannot be stored \
             ({error}); make room in the data directory, or mend its permissions; it is tried again every {every} s, and at \
             once when you ask again"
        )))
    }

    /// A promotion that could not be stored has no line: the pause that took its place says why.
    pub(crate) fn forget_promotion(&mut self) {
        self.pending.retain(|(_, happened)| !is_promotion(happened));
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
            if live.is_due(self.clock.micros())
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
    /// Stores the document, ends what is over, and journals what was kept; where all but the first was done, tries that again.
    /// The caller holds `operations`.
    pub(super) fn settle(&self, slot: &SlotName, live: &mut Live) {
        if live.pending.is_empty() {
            let stored = self.write_again(slot);
            return live.saved(stored, self.clock.micros());
        }
        let document = live.rollout.document().clone();
        let (id, promoted) = (document.id.clone(), document.phase == Phase::Promoted);
        let retired = self.previous_of(slot);
        let (next, stored) = self.store_rollout(slot, document);
        if let Err(error) = &stored {
            tracing::error!(%slot, rollout = id, "the slot's document cannot be stored: {error}");
        }
        match &stored {
            Err(error) if promoted => {
                // What is not stored would be undone by a restart: control serves until somebody has looked.
                let why = format!("the candidate was not promoted: the slot's document cannot be stored ({error})");
                let commands = live.rollout.decide(Decision::Pause { why }, self.clock.micros());
                self.obey(slot, live, "host", commands);
                live.forget_promotion();
                drop(lock(&self.state).rolled(slot, live.rollout.document().clone()));
            }
            // An end that the disk did not take holds in this life all the same, or the slot could never be changed again; only
            // a promotion must be stored first.
            _ => *lock(&self.state) = next,
        }
        live.saved(stored, self.clock.micros());
        self.finish(slot, retired, live);
    }

    /// Journals what was kept, and ends what is over.
    fn finish(&self, slot: &SlotName, retired: Option<Target>, live: &mut Live) {
        for (actor, happened) in live.pending.drain(..) {
            if let Happened::RolloutDecided { decision, id, .. } = &happened {
                tracing::info!(%slot, rollout = id, actor, "rollout: {decision:?}");
            }
            self.note(&actor, happened);
        }
        match live.rollout.document().phase {
            Phase::Running | Phase::Paused { .. } => {}
            Phase::Promoted => self.promoted(slot, retired, live),
            Phase::Aborted { .. } | Phase::Completed => self.taken_back(slot, live),
        }
    }

    fn previous_of(&self, slot: &SlotName) -> Option<Target> {
        lock(&self.state).slot(slot).and_then(|state| state.previous.clone())
    }

    /// Stores a slot's document with this state of its rollout. Returns the deployment that it belongs to.
    fn store_rollout(&self, slot: &SlotName, rollout: RolloutDocument) -> (Deployment, io::Result<()>) {
        let mut next = lock(&self.state).clone();
        // A slot that is gone has no document.
        let stored = next.rolled(slot, rollout).map_or(Ok(()), |document| self.store_slot(&document));
        (next, stored)
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
        let dry_run = request.dry_run;
        let (spec, desired) = self.wanted_rollout(&slot, request, actor)?;
        self.check_measurable().and_then(|()| self.compile_first(&slot, &desired, (!dry_run).then_some(actor)))?;
        let _one = lock(&self.operations);
        let (control, planned) = self.plan_rollout(&slot, &spec, desired)?;
        let (generation, rule) = (planned.generation, handover::rule(planned.desired.handover, Why::Rollout));
        let ready = match dry_run {
            true => self.prepare(&planned, Role::Trial, rule)?,
            false => self.prepare_noted(&planned, (role(spec.mode), rule), actor)?,
        };
        let names = [control.revision, ready.revision()];
        let document = RolloutDocument::new(format!("{slot}-{generation}"), slot.to_string(), names, spec);
        let document = RolloutDocument { target: Some(planned.target(ready.revision())), ..document };
        if dry_run {
            return self.report(&slot, &document);
        }
        let handed = handover::answered(&ready);
        let (next, stored) = self.store_rollout(&slot, document.clone());
        stored
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

    /// What somebody wants to try, as far as it can be judged by itself.
    fn wanted_rollout(
        &self,
        slot: &SlotName,
        request: wire::StartRollout,
        actor: &str,
    ) -> Result<(Spec, Desired), AdminError> {
        let wire::StartRollout { component, config, state_namespace, budget, handover, on_fault, .. } = request;
        let plan: Plan = serde_json::from_str(&request.plan).map_err(|error| invalid(format!("the plan: {error}")))?;
        let spec = plan.spec(self.clock.random());
        spec.check_slot(slot).and_then(|()| spec.check()).map_err(|error| invalid(error.to_string()))?;
        let (component, config) = (self.component_of(&component, actor)?, config.get().to_owned());
        let (budget, handover) = (budget::stored(budget), handover::stored(handover));
        let (on_fault, if_generation) = (on_fault::stored(on_fault), request.if_generation);
        Ok((spec, Desired { component, config, state_namespace, budget, handover, on_fault, if_generation }))
    }

    /// What it would be tried against, and what to prepare. The caller holds `operations`.
    fn plan_rollout(&self, slot: &SlotName, spec: &Spec, desired: Desired) -> Result<(Target, Planned), AdminError> {
        self.check_changeable(Some(slot)).and_then(|()| self.check_measurable())?;
        if matches!(lock(&self.failed).get(slot), Some(Failed::Policy(_))) {
            return Err(conflict(format!(
                "`{slot}` does not run what is stored for it; activate something there first"
            )));
        }
        let control = lock(&self.state).slot(slot).map(|state| state.active.clone());
        let control = control.ok_or_else(|| nothing_to_compare_with(slot))?;
        let policies = [&control.component, &desired.component];
        spec.check_answers(slot, policies).map_err(|error| invalid(error.to_string()))?;
        let planned = lock(&self.state).plan(slot.clone(), desired).map_err(plan_error)?;
        Ok((control, planned))
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
        let steered = match steer {
            wire::Steer::Abort | wire::Steer::Pause => self.take_off(&name, id, steer, actor)?,
            wire::Steer::Promote { .. } | wire::Steer::Resume => self.let_on(&name, id, steer, actor)?,
        };
        // Not what is the slot's last rollout by now: that may be another one.
        self.report(&name, &steered)
    }

    /// Takes the candidate off at once, whoever holds `operations`; what is stored, and the answer, come after.
    fn take_off(
        &self,
        slot: &SlotName,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<RolloutDocument, AdminError> {
        let decided = self.decide(slot, id, steer, actor)?;
        let _one = lock(&self.operations);
        let mut rollouts = lock(&self.rollouts);
        // Gone by now, and stored, where the observer thread was faster.
        let live = rollouts.get_mut(slot).filter(|live| live.rollout.document().id == id);
        let Some(live) = live else { return Ok(decided) };
        if !live.is_settled() {
            self.settle(slot, live);
        }
        let (saved, document) = (live.check_saved(), live.rollout.document().clone());
        if live.is_done() {
            rollouts.remove(slot);
        }
        saved.map(|()| document)
    }

    /// Decides what was asked for and moves the pointer; the rest is kept for [`Deploy::settle`].
    fn decide(
        &self,
        slot: &SlotName,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<RolloutDocument, AdminError> {
        let mut rollouts = lock(&self.rollouts);
        let live = under_way(rollouts.get_mut(slot), id)?;
        if !live.is_asked_again(steer) {
            let decision = asked(live.rollout.document(), steer)?;
            let commands = live.rollout.decide(decision, self.clock.micros());
            self.obey(slot, live, actor, commands);
        }
        Ok(live.rollout.document().clone())
    }

    /// Gives the candidate more, once that is stored: until then nothing has changed.
    fn let_on(
        &self,
        slot: &SlotName,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<RolloutDocument, AdminError> {
        let _one = lock(&self.operations);
        self.check_changeable(Some(slot))?;
        if matches!(steer, wire::Steer::Resume) {
            self.check_measurable()?;
        }
        let mut rollouts = lock(&self.rollouts);
        let live = under_way(rollouts.get_mut(slot), id)?;
        let decision = asked(live.rollout.document(), steer)?;
        let mut document = live.rollout.document().clone();
        document.apply(&decision);
        let (phase, retired) = (document.phase.clone(), self.previous_of(slot));
        let (next, stored) = self.store_rollout(slot, document);
        stored
            .map_err(|e| internal(format!("nothing was changed: the document of `{slot}` cannot be stored ({e})")))?;
        *lock(&self.state) = next;
        let commands = live.rollout.decide(decision, self.clock.micros());
        self.obey(slot, live, actor, commands);
        if live.rollout.document().phase == phase {
            live.saved(Ok(()), self.clock.micros());
            self.finish(slot, retired, live);
        } else {
            // The slot did not take the candidate.
            self.settle(slot, live);
        }
        let document = live.rollout.document().clone();
        if live.is_done() {
            rollouts.remove(slot);
        }
        Ok(document)
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
        if !live.is_done() {
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

fn is_promotion(happened: &Happened) -> bool {
    matches!(happened, Happened::RolloutDecided { decision: Decision::Promote, .. })
}

/// The rollout that somebody asks about, where it is under way.
pub(crate) fn under_way<'a>(live: Option<&'a mut Live>, id: &str) -> Result<&'a mut Live, AdminError> {
    let live = live.filter(|live| live.rollout.document().id == id);
    live.ok_or_else(|| conflict(format!("rollout {id} is over; start another")))
}

/// What an operator's wish comes to.
pub(crate) fn asked(document: &RolloutDocument, steer: wire::Steer) -> Result<Decision, AdminError> {
    let decision = match steer {
        wire::Steer::Promote { step } => document.ask_promote(step),
        wire::Steer::Abort => document.ask_abort(),
        wire::Steer::Pause => document.ask_pause(),
        wire::Steer::Resume => document.ask_resume(),
    };
    decision.map_err(|error| conflict(error.to_string()))
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

fn nothing_to_compare_with(slot: &SlotName) -> AdminError {
    let nothing = PlanError::NoSlot(slot.clone());
    not_found(format!("{nothing}: there is no policy to compare with; activate `native` there first"))
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
