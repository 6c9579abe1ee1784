//! Rollouts between two variants of an alias: the same machine as between two policies, with requests split by hash instead of
//! time.
//!
//! Nothing is staged, both variants serve already: a share is a number that requests read with the weights. As with slots the
//! document is stored before anybody is told, the observer waits for nobody's change, and a candidate that harms loses its
//! share at once, whatever the disk says. Safe mode does not pause them: it makes policies native, in both arms alike.

use std::sync::Arc;

use pointsman_control::rollout::{
    Arm, Cause, Command, Decision, OnRestart, Phase, Plan, Report, Rollout, RolloutDocument, Spec, Split,
};
use pointsman_control::{AliasDocument, DesiredTrial, Happened};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, AdminErrorKind, Clock, Variant};
use pointsman_telemetry::Event;
use serde_json::value::RawValue;

use super::{Aliases, alias_error, unchanged};
use crate::deploy::lock;
use crate::deploy::rollout::{ACTOR, Live, asked, under_way};

// === what the observer thread does ===

impl Aliases {
    /// Shows events to the rollouts under way.
    pub(crate) fn show_rollouts(&self, events: &[Event], dropped: u64) {
        lock(&self.rollouts).values_mut().for_each(|live| live.show(events, dropped));
    }

    /// Lets every rollout look at the time, and does what it says.
    pub(crate) fn tick_rollouts(&self) {
        let mut rollouts = lock(&self.rollouts);
        for (alias, live) in rollouts.iter_mut() {
            if !live.rollout.document().phase.is_over() {
                let commands = live.rollout.tick(self.parts.clock.micros());
                self.obey(alias, live, ACTOR, commands);
            }
            if live.is_due(self.parts.clock.micros())
                && let Ok(_one) = self.operations.try_lock()
            {
                self.settle(alias, live);
            }
        }
        rollouts.retain(|_, live| !live.is_done());
    }

    /// Gives the candidate its share at once and keeps the rest for [`Aliases::settle`].
    fn obey(&self, alias: &str, live: &mut Live, actor: &str, commands: Vec<Command>) {
        // Both arms serve: there is no arm to switch to.
        live.keep(actor, commands);
        let percent = live.rollout.share();
        if self.live.load().share(alias) != percent {
            self.change(|aliases| aliases.set_share(alias, percent));
        }
    }

    /// Stores the document, ends what is over, and journals what was kept; where all but the first was done, tries that again.
    /// The caller holds `operations`.
    fn settle(&self, alias: &str, live: &mut Live) {
        if live.pending.is_empty() {
            let stored = self.parts.store.write_alias(&self.live.load().get(alias));
            return live.saved(stored, self.parts.clock.micros());
        }
        let mut document = self.rolled(alias, live.rollout.document().clone());
        let stored = self.parts.store.write_alias(&document);
        if let Err(error) = &stored {
            let rollout = live.rollout.document();
            tracing::error!(alias, rollout = rollout.id, "the alias's document cannot be stored: {error}");
            // An end that the disk did not take holds in this life all the same.
            if rollout.phase == Phase::Promoted {
                // What is not stored would be undone by a restart: control serves until somebody has looked.
                let why = format!("the candidate was not promoted: the alias's document cannot be stored ({error})");
                let commands = live.rollout.decide(Decision::Pause { why }, self.parts.clock.micros());
                self.obey(alias, live, "host", commands);
                live.forget_promotion();
                document = self.rolled(alias, live.rollout.document().clone());
            }
        }
        live.saved(stored, self.parts.clock.micros());
        self.finish(alias, live, document);
    }

    /// The document of an alias with this state of its rollout.
    fn rolled(&self, alias: &str, rollout: RolloutDocument) -> AliasDocument {
        self.live.load().rolled(alias, rollout, self.parts.deploy.last_line())
    }

    /// Makes a document what requests see, journals what was kept, and ends what is over.
    fn finish(&self, alias: &str, live: &mut Live, document: AliasDocument) {
        self.change(|aliases| aliases.put(document.clone()));
        for (actor, happened) in live.pending.drain(..) {
            if let Happened::RolloutDecided { decision, id, .. } = &happened {
                tracing::info!(alias, rollout = id, actor, "rollout: {decision:?}");
            }
            self.parts.deploy.note(&actor, happened);
        }
        let RolloutDocument { subject, phase, .. } = live.rollout.document();
        if *phase == Phase::Promoted {
            self.note_change(ACTOR, document);
        }
        if phase.is_over() {
            for arm in [Arm::Control, Arm::Candidate] {
                self.parts.metrics.forget_arm(subject, arm.as_str());
            }
        }
    }
}

// === what operators ask ===

impl Aliases {
    pub(super) fn begin_rollout(
        &self,
        alias: &str,
        request: wire::StartAliasRollout,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        let wire::StartAliasRollout { candidate, if_generation, dry_run, plan } = request;
        let _one = lock(&self.operations);
        self.parts.deploy.check_changeable(None)?;
        let desired = DesiredTrial { candidate, spec: self.spec(alias, &plan)?, if_generation };
        let (rollout, document) = self.live.load().plan_rollout(alias, desired).map_err(alias_error)?;
        let split = self.split(&rollout).map_err(|what| refused(AdminErrorKind::Conflict, what))?;
        if dry_run {
            return self.report(&rollout);
        }
        self.parts.store.write_alias(&document).map_err(|error| {
            let what = format!("nothing was started: the document of `{alias}` cannot be stored ({error})");
            refused(AdminErrorKind::Internal, what)
        })?;
        self.change(|aliases| aliases.put(document.clone()));
        self.parts.deploy.note(actor, Happened::RolloutStarted { rollout: Box::new(rollout.clone()) });
        let live = Live::of(Rollout::new(rollout, split), &self.parts.metrics);
        let report = self.report(live.rollout.document());
        lock(&self.rollouts).insert(alias.to_owned(), live);
        report
    }

    fn spec(&self, alias: &str, plan: &str) -> Result<Spec, AdminError> {
        let invalid = |what: String| refused(AdminErrorKind::Invalid, what);
        let plan: Plan = serde_json::from_str(plan).map_err(|error| invalid(format!("the plan: {error}")))?;
        let sticky = self.live.load().get(alias).sticky;
        let spec = plan.or_sticky(sticky).spec(self.parts.clock.random());
        spec.check_alias().and_then(|()| spec.check()).map_err(|error| invalid(error.to_string()))?;
        Ok(spec)
    }

    pub(super) fn last_rollout(&self, alias: &str) -> Result<Option<Box<RawValue>>, AdminError> {
        if let Some(live) = lock(&self.rollouts).get(alias) {
            return self.report(live.rollout.document()).map(Some);
        }
        let last = self.live.load().get(alias).rollout;
        last.map(|document| self.report(&document)).transpose()
    }

    pub(super) fn one_rollout(&self, alias: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        match self.live.load().get(alias).rollout {
            Some(last) if last.id == id => self.last_rollout(alias)?.ok_or_else(|| no_rollout(alias, id)),
            _ => Err(no_rollout(alias, id)),
        }
    }

    pub(super) fn steer(
        &self,
        alias: &str,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        self.one_rollout(alias, id)?;
        let _one = lock(&self.operations);
        self.parts.deploy.check_changeable(None)?;
        let mut rollouts = lock(&self.rollouts);
        let live = under_way(rollouts.get_mut(alias), id)?;
        let steered = match steer {
            wire::Steer::Abort | wire::Steer::Pause => self.take_off(alias, live, steer, actor),
            wire::Steer::Promote { .. } | wire::Steer::Resume => self.let_on(alias, live, steer, actor),
        };
        let document = live.rollout.document().clone();
        if live.is_done() {
            rollouts.remove(alias);
        }
        drop(rollouts);
        steered.and_then(|()| self.report(&document))
    }

    /// Takes the candidate's share away, whatever the disk says.
    fn take_off(&self, alias: &str, live: &mut Live, steer: wire::Steer, actor: &str) -> Result<(), AdminError> {
        if !live.is_asked_again(steer) {
            let decision = asked(live.rollout.document(), steer)?;
            let commands = live.rollout.decide(decision, self.parts.clock.micros());
            self.obey(alias, live, actor, commands);
        }
        self.settle(alias, live);
        live.check_saved()
    }

    /// Gives the candidate more, once that is stored: until then nothing has changed.
    fn let_on(&self, alias: &str, live: &mut Live, steer: wire::Steer, actor: &str) -> Result<(), AdminError> {
        let decision = asked(live.rollout.document(), steer)?;
        let mut rollout = live.rollout.document().clone();
        rollout.apply(&decision);
        let document = self.rolled(alias, rollout);
        self.parts.store.write_alias(&document).map_err(|error| unchanged(alias, &error))?;
        let commands = live.rollout.decide(decision, self.parts.clock.micros());
        self.obey(alias, live, actor, commands);
        live.saved(Ok(()), self.parts.clock.micros());
        self.finish(alias, live, document);
        Ok(())
    }

    fn report(&self, document: &RolloutDocument) -> Result<Box<RawValue>, AdminError> {
        let mut report = Report::of(document);
        let devices = |variant: &str| -> Vec<u64> {
            self.variant(variant).map(|v| v.replicas.iter().map(|r| r.device).collect()).unwrap_or_default()
        };
        let control = devices(&document.control);
        if devices(&document.candidate).iter().any(|device| control.contains(device)) {
            let caveat =
                "both variants run on one device: each slows the other down, so a difference shows smaller than it is";
            report.caveats.push(caveat.to_owned());
        }
        RawValue::from_string(report.to_json()).map_err(|error| refused(AdminErrorKind::Internal, error.to_string()))
    }

    /// The arms as the event stream has them.
    fn split(&self, rollout: &RolloutDocument) -> Result<Split, String> {
        let number = |id: &str| {
            let number = self.variant(id).and_then(|v| u32::try_from(v.replicas.first()?.variant).ok());
            number.ok_or_else(|| format!("the variant `{id}` is not loaded"))
        };
        Ok(Split::Variant([number(&rollout.control)?, number(&rollout.candidate)?]))
    }

    fn variant(&self, id: &str) -> Option<Arc<Variant>> {
        self.parts.engine.catalog().variants.iter().find(|variant| *variant.id == *id).cloned()
    }
}

// === after a restart ===

impl Aliases {
    /// Takes up a rollout that was under way when the host died, paused or running as its plan says. Without one of its
    /// variants it is aborted. In safe mode it is left as it is and control serves.
    pub(super) fn restore_rollout(&self, alias: &str, rollout: RolloutDocument) {
        let _one = lock(&self.operations);
        let deploy = &self.parts.deploy;
        let rollout = rollout.recalled();
        if rollout.phase.is_over() || deploy.check_changeable(None).is_err() {
            return;
        }
        deploy.note("startup", Happened::RolloutRestored { rollout: Box::new(rollout.clone()) });
        let pauses = rollout.phase == Phase::Running && rollout.spec.on_restart == OnRestart::Pause;
        let (split, decision) = match self.split(&rollout) {
            Err(what) => (Split::Variant([0; 2]), Some(Decision::Abort { cause: Cause::Host { what } })),
            Ok(split) => (split, pauses.then(|| Decision::Pause { why: "the host was restarted".into() })),
        };
        let mut live = Live::of(Rollout::new(rollout, split), &self.parts.metrics);
        if let Some(decision) = decision {
            let commands = live.rollout.decide(decision, self.parts.clock.micros());
            self.obey(alias, &mut live, "startup", commands);
            self.settle(alias, &mut live);
        }
        if !live.is_done() {
            lock(&self.rollouts).insert(alias.to_owned(), live);
        }
    }
}

fn refused(kind: AdminErrorKind, message: String) -> AdminError {
    AdminError { kind, message, param: None }
}

fn no_rollout(alias: &str, id: &str) -> AdminError {
    let message = format!(
        "no rollout `{id}` of `{alias}`: GET /admin/v1/aliases/{alias}/rollouts has the last one, the journal those before it"
    );
    refused(AdminErrorKind::NotFound, message)
}
