//! From a wish to a published policy: plan, prepare, store, swap.

use std::sync::Arc;

use pointsman_control::{ComponentRef, Desired, Happened, OnFault, Planned, SlotName, Why};
use pointsman_policy::{Activation, Component, Digest, Handover as Rule, Prepared, Published, Role, Slot, World};
use pointsman_server::admin::wire;
use pointsman_server::ports::AdminError;

use super::errors::{activate_error, conflict, internal, invalid, not_found, plan_error, trust_error, upload_error};
use super::{Deploy, Failed, TelemetrySlots, handover, lock, on_fault};
use crate::builtin::BUILTINS;

/// Something that only has to be swapped in.
pub(super) enum Ready {
    /// The host's own policy.
    Native,
    /// Warm instances of a guest.
    Guest(Box<Prepared>),
}

impl Ready {
    pub(super) fn revision(&self) -> String {
        match self {
            Self::Native => "native".to_owned(),
            Self::Guest(prepared) => prepared.revision.to_string(),
        }
    }
}

impl Deploy {
    /// Plans and carries out. The caller holds `operations`.
    pub(super) fn activate(
        &self,
        slot: SlotName,
        desired: Desired,
        actor: &str,
        why: Why,
    ) -> Result<wire::Activated, AdminError> {
        let planned = lock(&self.state).plan(slot, desired).map_err(plan_error)?;
        self.carry_out(planned, actor, why)
    }

    /// Everything that an activation does before it changes something. The caller holds `operations`.
    pub(super) fn try_out(&self, slot: SlotName, desired: Desired) -> Result<wire::Activated, AdminError> {
        let planned = lock(&self.state).plan(slot, desired).map_err(plan_error)?;
        self.check_changeable(Some(&planned.slot))?;
        let rule = handover::rule(planned.desired.handover, Why::Put);
        let ready = self.prepare(&planned, Role::Trial, rule)?;
        let handover = handover::answered(&ready);
        let warm_ms = match &ready {
            Ready::Native => 0.0,
            Ready::Guest(prepared) => prepared.warm_ms,
        };
        let generation = planned.generation;
        Ok(wire::Activated { revision: ready.revision(), generation, warm_ms, publish_us: 0.0, handover })
    }

    /// Prepares, stores, swaps. The caller holds `operations`. Until the document is stored nothing has changed; from then on
    /// the swap is all that is left.
    pub(super) fn carry_out(&self, planned: Planned, actor: &str, why: Why) -> Result<wire::Activated, AdminError> {
        self.check_changeable(Some(&planned.slot))?;
        let (slot, generation) = (planned.slot.clone(), planned.generation);
        let rule = handover::rule(planned.desired.handover, why);
        let ready = self.prepare_noted(&planned, (Role::Active, rule), actor)?;
        let handover = handover::answered(&ready);
        let mut next = lock(&self.state).clone();
        let retired = next.slot(&slot).and_then(|s| s.previous.as_ref()).map(|p| p.revision.clone());
        let document = next.published(planned, ready.revision());
        self.store_slot(&document)
            .map_err(|e| internal(format!("nothing was activated: the document of `{slot}` cannot be stored ({e})")))?;
        let published = self.publish(&slot, ready, generation).inspect_err(|_| self.store_again(&slot))?;
        *lock(&self.state) = next;
        // The end of one that the disk had refused is in this document too.
        lock(&self.rollouts).remove(&slot);
        lock(&self.failed).remove(&slot);
        self.metrics.missing(&slot.to_string(), None);
        let before = document.previous.map(|p| p.revision);
        let keep = [Some(document.active.revision.as_str()), before.as_deref()];
        self.forget_retired(&slot, keep, retired.as_slice());
        self.note(actor, Happened::Published { slot: slot.clone(), target: document.active, before, why });
        self.note_handover(actor, (&slot, generation), handover.as_ref());
        Ok(wire::Activated {
            revision: published.revision.to_string(),
            generation,
            warm_ms: published.warm_ms,
            publish_us: published.publish_us,
            handover,
        })
    }

    /// Compiles what is to be prepared. To be called before `operations` is held: aborts, rollbacks and uploads need not wait
    /// for a compiler. A refusal is journalled under the actor, where there is one; what is refused before it costs nothing.
    pub(super) fn compile_first(
        &self,
        slot: &SlotName,
        desired: &Desired,
        actor: Option<&str>,
    ) -> Result<(), AdminError> {
        lock(&self.state).plan(slot.clone(), desired.clone()).map_err(plan_error)?;
        self.check_changeable(Some(slot))?;
        let ComponentRef::Digest(digest) = &desired.component else { return Ok(()) };
        self.compiled(digest, slot).map(drop).inspect_err(|error| {
            if let Some(actor) = actor {
                self.note_refused(slot, desired, actor, error);
            }
        })
    }

    /// Prepares what was planned; a refusal is journalled.
    pub(super) fn prepare_noted(
        &self,
        planned: &Planned,
        (role, rule): (Role, Rule),
        actor: &str,
    ) -> Result<Ready, AdminError> {
        let Planned { slot, desired, .. } = planned;
        self.prepare(planned, role, rule).inspect_err(|error| self.note_refused(slot, desired, actor, error))
    }

    fn note_refused(&self, slot: &SlotName, desired: &Desired, actor: &str, error: &AdminError) {
        let (component, error) = (desired.component.to_string(), error.message.clone());
        self.note(actor, Happened::Refused { slot: slot.clone(), component, error });
    }

    /// Refuses changes in safe mode, and to a slot whose document cannot be read.
    pub(crate) fn check_changeable(&self, slot: Option<&SlotName>) -> Result<(), AdminError> {
        if self.safe_mode {
            let message =
                "the host runs in safe mode and leaves what is stored as it is; restart it without --safe-mode";
            return Err(conflict(message.to_owned()));
        }
        match slot.and_then(|slot| lock(&self.failed).get(slot).cloned()) {
            Some(Failed::Document(error)) => Err(conflict(format!("{error}; repair or remove the file and restart"))),
            Some(Failed::Policy(_)) | None => Ok(()),
        }
    }

    /// Puts the document back that belongs to the policy that still serves.
    pub(super) fn store_again(&self, slot: &SlotName) {
        if let Err(error) = self.write_again(slot) {
            tracing::error!(%slot, "the stored document names a policy that was not published: {error}");
        }
    }

    /// Stores a slot as it is. Its lines were written before: the document says nothing of where the journal is.
    pub(super) fn write_again(&self, slot: &SlotName) -> std::io::Result<()> {
        let document = lock(&self.state).document(slot);
        document.map_or(Ok(()), |document| self.store.write_slot(&document))
    }

    /// Everything before the pointer swap; changes nothing that serves. A candidate's `init` meets a copy or an overlay of the
    /// host-state.
    pub(super) fn prepare(&self, planned: &Planned, role: Role, rule: Rule) -> Result<Ready, AdminError> {
        let Planned { slot, desired, generation } = planned;
        let ComponentRef::Digest(digest) = &desired.component else {
            let wrong = |param: &str, why: &str| AdminError { param: Some(param.into()), ..invalid(why.into()) };
            return match desired {
                Desired { budget, .. } if !budget.is_empty() => {
                    Err(wrong("budget", "the native policy has no budget; leave it out"))
                }
                Desired { on_fault: OnFault::Closed, .. } => {
                    Err(wrong("on_fault", "the native policy does not fault; leave `on_fault` out"))
                }
                _ => Ok(Ready::Native),
            };
        };
        let component = self.compiled(digest, slot)?;
        let activation = Activation {
            slot: slot.to_string(),
            generation: *generation,
            config: desired.config.clone(),
            // The slot's own namespace by its name is still the slot's own.
            namespace: desired.state_namespace.clone().filter(|name| *name != slot.to_string()),
            role,
            budget: self.budget_of(slot, desired.budget),
            handover: rule,
            on_fault: on_fault::rule(desired.on_fault),
        };
        let prepared = self.runtime.prepare(&component, activation).map_err(activate_error)?;
        if let Some(known) = lock(&self.components).get_mut(digest) {
            known.revision = Some(prepared.revision.to_string());
            known.summary = Some(prepared.summary.to_string()).filter(|summary| !summary.is_empty());
        }
        Ok(Ready::Guest(Box::new(prepared)))
    }

    /// The pointer swap; the policy crate records it.
    pub(super) fn publish(&self, slot: &SlotName, ready: Ready, generation: u64) -> Result<Published, AdminError> {
        let target = self.slot_for_publish(slot);
        let published = match ready {
            Ready::Native => target.publish_native(generation),
            Ready::Guest(prepared) => target.publish(*prepared),
        };
        published.map_err(|error| internal(error.to_string()))
    }

    /// A component that fits the slot, validated and compiled now if it has not been in this life of the host.
    pub(super) fn compiled(&self, digest: &str, slot: &SlotName) -> Result<Component, AdminError> {
        let known = lock(&self.components).get(digest).cloned();
        let known = known.ok_or_else(|| AdminError {
            param: Some("component".into()),
            ..not_found(format!("no component {digest}; upload it first, or look at GET /admin/v1/components"))
        })?;
        if World::of_slot(&slot.to_string()) != Some(known.world) {
            let message =
                format!("{digest} implements the world {}, which does not work in the slot `{slot}`", known.world);
            return Err(AdminError { param: Some("component".into()), ..invalid(message) });
        }
        // At every activation, so at every start too: the ring or the switch may have changed since it was uploaded.
        self.check_trust(digest, None).map_err(trust_error)?;
        if let Some(component) = known.component {
            return Ok(component);
        }
        let builtin = known.builtin.and_then(|name| BUILTINS.iter().find(|b| b.name == name));
        let bytes = match builtin {
            Some(builtin) => builtin.bytes.to_vec(),
            None => self
                .store
                .read_component(digest)
                .map_err(|e| internal(format!("the bytes of {digest} are gone: {e}")))?,
        };
        let expected = Digest::parse(digest).ok_or_else(|| internal(format!("`{digest}` is not a digest")))?;
        let component = self.runtime.load(&expected, &bytes).map_err(upload_error)?;
        if builtin.is_some() {
            // It may be gone from the next version of the host: keep what a document names. An uploaded one is on the disk, or
            // was deleted while it was compiled.
            self.store
                .write_component(digest, &bytes)
                .map_err(|e| internal(format!("nothing was activated: {digest} cannot be kept ({e})")))?;
        }
        if let Some(known) = lock(&self.components).get_mut(digest) {
            known.component = Some(component.clone());
        }
        Ok(component)
    }

    pub(super) fn live_slot(&self, slot: &SlotName) -> Option<Arc<dyn Slot>> {
        match slot {
            SlotName::Admission => Some(Arc::clone(&self.admission) as Arc<dyn Slot>),
            SlotName::Router => Some(Arc::clone(&self.router) as Arc<dyn Slot>),
            SlotName::Scheduler => Some(Arc::clone(&self.scheduler) as Arc<dyn Slot>),
            SlotName::KvRetention => Some(Arc::clone(&self.retention) as Arc<dyn Slot>),
            SlotName::Sampler => Some(Arc::clone(&self.sampler) as Arc<dyn Slot>),
            SlotName::Telemetry(_) => {
                self.telemetry.load().get(&slot.to_string()).map(|s| Arc::clone(s) as Arc<dyn Slot>)
            }
        }
    }

    /// The slot to publish into. A new telemetry slot joins the observer's list at once; it is native until the publish.
    fn slot_for_publish(&self, slot: &SlotName) -> Arc<dyn Slot> {
        self.live_slot(slot).unwrap_or_else(|| {
            let name = slot.to_string();
            let created = self.runtime.telemetry_slot(&name);
            let mut slots = TelemetrySlots::clone(&self.telemetry.load());
            slots.insert(name, Arc::clone(&created));
            self.telemetry.store(Arc::new(slots));
            created
        })
    }

    /// Takes a telemetry slot off the observer's list.
    pub(super) fn drop_telemetry(&self, slot: &SlotName) {
        let mut slots = TelemetrySlots::clone(&self.telemetry.load());
        slots.remove(&slot.to_string());
        self.telemetry.store(Arc::new(slots));
    }

    /// Removes the series of every revision of a slot that is neither active nor previous any more.
    pub(super) fn forget_retired(&self, slot: &SlotName, keep: [Option<&str>; 2], candidates: &[String]) {
        for revision in candidates.iter().filter(|r| !keep.contains(&Some(r.as_str()))) {
            self.metrics.forget_revision(&slot.to_string(), revision);
        }
    }
}
