//! The admin port of the server: what operators ask of deployments, and how slots and components look to them.

use pointsman_control::{
    Budget, ComponentRef, Desired, Handover, Happened, OnFault, Removal, SlotName, SlotState, Target, Why,
};
use pointsman_policy::{
    Activation, AdmissionQuestion, Component, Deciding, FaultKind, Health, MAX_NAMESPACE_BYTES, RouterQuestion,
    SlotStatus,
};
use pointsman_sched::admit::Judged;
use pointsman_sched::ids::RequestId;
use pointsman_sched::route::{Choice, DecidedBy, Routed};
use pointsman_server::admin::wire;
use pointsman_server::ports::{
    AdminError, Author, Authors, DoorQuestion, JournalLine, PolicyAdmin, Question, Upload, Uploaded,
};

use serde_json::value::RawValue;

use super::errors::{activate_error, conflict, internal, not_found, plan_error};
use super::intake::Offered;
use super::{Deploy, Failed, Known, budget, handover, lock, on_fault};

impl PolicyAdmin for Deploy {
    fn upload(&self, upload: Upload, actor: &str) -> Result<Uploaded, AdminError> {
        self.take_in(Offered::uploaded(upload)?, actor)
    }

    fn pull(&self, reference: &str, actor: &str) -> Result<Uploaded, AdminError> {
        self.take_in(self.fetch(reference)?, actor)
    }

    fn sign_component(&self, digest: &str, signature: &[u8], actor: &str) -> Result<(), AdminError> {
        let _one = lock(&self.operations);
        self.sign(digest, signature, actor)
    }

    fn components(&self) -> Vec<wire::Component> {
        let known = lock(&self.components).clone();
        let state = lock(&self.state);
        let view = |(digest, known): (String, Known)| wire::Component {
            used_by: state.users_of(&ComponentRef::Digest(digest.clone())).iter().map(ToString::to_string).collect(),
            digest,
            world: known.world.to_string(),
            package: known.package,
            size: known.size,
            compile_ms: known.component.filter(|c| !c.cached).map(|c| c.compile_ms),
            builtin: known.builtin.is_some(),
            signed_by: known.signed_by,
            name: known.revision.or(known.builtin.map(str::to_owned)),
            summary: known.summary,
        };
        let mut listed: Vec<wire::Component> = known.into_iter().map(view).collect();
        listed.sort_by(|a, b| (!a.builtin, &a.name, &a.digest).cmp(&(!b.builtin, &b.name, &b.digest)));
        listed
    }

    fn delete_component(&self, digest: &str, actor: &str) -> Result<(), AdminError> {
        let _one = lock(&self.operations);
        self.check_changeable(None)?;
        let known = lock(&self.components).get(digest).cloned();
        let known = known.ok_or_else(|| not_found(format!("no component {digest}")))?;
        if let Some(name) = known.builtin {
            return Err(conflict(format!("{name} is built in and cannot be deleted")));
        }
        let used: Vec<String> = {
            let state = lock(&self.state);
            state.users_of(&ComponentRef::Digest(digest.to_owned())).iter().map(ToString::to_string).collect()
        };
        if !used.is_empty() {
            let slots = used.join(", ");
            return Err(conflict(format!(
                "{digest} is active, previous or candidate in {slots}; activate something else there first"
            )));
        }
        self.deed(actor, Happened::Deleted { digest: digest.to_owned() }, || {
            // The file first: a map entry without a file would come back as an error, a file without an entry as a component.
            self.store.delete_component(digest)?;
            lock(&self.components).remove(digest);
            Ok(())
        })
        .map_err(|e| internal(format!("the file cannot be removed: {e}")))
    }

    fn slots(&self) -> Vec<wire::Slot> {
        let state = lock(&self.state).clone();
        let fixed =
            [SlotName::Admission, SlotName::Router, SlotName::Scheduler, SlotName::KvRetention, SlotName::Sampler];
        let others = state.slots().map(|(slot, _)| slot.clone()).filter(|slot| !fixed.contains(slot));
        fixed.iter().cloned().chain(others).map(|slot| self.view(&slot, state.slot(&slot))).collect()
    }

    fn slot(&self, slot: &str) -> Result<wire::Slot, AdminError> {
        let slot = parse_slot(slot)?;
        let state = lock(&self.state).slot(&slot).cloned();
        match (&slot, &state) {
            (SlotName::Telemetry(_), None) => Err(not_found(format!("nothing was ever activated in `{slot}`"))),
            _ => Ok(self.view(&slot, state.as_ref())),
        }
    }

    fn put_slot(&self, slot: &str, request: wire::PutSlot, actor: &str) -> Result<wire::Activated, AdminError> {
        let slot = parse_slot(slot)?;
        let wire::PutSlot { component, config, if_generation, state_namespace, budget, handover, on_fault, dry_run } =
            request;
        let component = self.component_of(&component, actor)?;
        let (config, budget, handover) = (config.get().to_owned(), budget::stored(budget), handover::stored(handover));
        let on_fault = on_fault::stored(on_fault);
        let desired = Desired { component, config, state_namespace, budget, handover, on_fault, if_generation };
        self.compile_first(&slot, &desired, (!dry_run).then_some(actor))?;
        let _one = lock(&self.operations);
        if dry_run { self.try_out(slot, desired) } else { self.activate(slot, desired, actor, Why::Put) }
    }

    fn delete_slot(&self, slot: &str, if_generation: Option<u64>, actor: &str) -> Result<wire::Activated, AdminError> {
        let slot = parse_slot(slot)?;
        let _one = lock(&self.operations);
        if !matches!(slot, SlotName::Telemetry(_)) {
            return self.activate(slot, Desired { if_generation, ..native() }, actor, Why::Delete);
        }
        self.check_changeable(Some(&slot))?;
        let mut next = lock(&self.state).clone();
        let before = next.slot(&slot).cloned();
        let Removal { document, forgotten } = next.removed(&slot, if_generation).map_err(plan_error)?;
        self.store_slot(&document)
            .map_err(|e| internal(format!("nothing was removed: the document cannot be stored ({e})")))?;
        *lock(&self.state) = next;
        self.store.forget_slots(&forgotten);
        self.drop_telemetry(&slot);
        lock(&self.failed).remove(&slot);
        lock(&self.last_health).remove(&slot);
        self.metrics.missing(&slot.to_string(), None);
        self.note(actor, Happened::Removed { slot: slot.clone() });
        let revisions = before.into_iter().flat_map(|s| [Some(s.active), s.previous]).flatten().map(|t| t.revision);
        self.forget_retired(&slot, [None, None], &revisions.collect::<Vec<_>>());
        self.metrics.forget_slot(&slot.to_string());
        Ok(wire::Activated {
            revision: "native".into(),
            generation: document.active.generation,
            warm_ms: 0.0,
            publish_us: 0.0,
            handover: None,
        })
    }

    fn rollback(&self, slot: &str, if_generation: Option<u64>, actor: &str) -> Result<wire::Activated, AdminError> {
        let slot = parse_slot(slot)?;
        let plan = || lock(&self.state).plan_rollback(&slot, if_generation).map_err(plan_error);
        self.compile_first(&slot, &plan()?.desired, Some(actor))?;
        let _one = lock(&self.operations);
        let planned = plan()?;
        self.carry_out(planned, actor, Why::Rollback)
    }

    fn safe_mode(&self) -> wire::SafeMode {
        self.safe_mode_view()
    }

    fn set_safe_mode(&self, put: wire::PutSafeMode, actor: &str) -> Result<wire::SafeMode, AdminError> {
        self.switch_safe_mode(put, actor)
    }

    fn refuses_all(&self) -> bool {
        self.sampler.refuses()
    }

    fn authors(&self) -> Authors {
        let author = |Deciding { generation, mark, is_trial }| Author { generation, mark, is_trial };
        Authors { sampler: author(self.sampler.deciding()), router: author(self.router.deciding()) }
    }

    fn ask_previous_router(&self, question: &Question<'_>) -> Result<Routed, AdminError> {
        let (decided_by, guest) = self.previous_policy(&SlotName::Router)?;
        let choice = match guest {
            None => Choice::Abstain,
            Some((component, activation)) => {
                let Question { now, request, replicas } = *question;
                let question = RouterQuestion { now, request, replicas };
                self.runtime.ask_router(&component, &activation, question).map_err(activate_error)?
            }
        };
        Ok(Routed { choice, decided_by, fallback: None })
    }

    fn ask_previous_admission(&self, question: &DoorQuestion<'_>) -> Result<Judged, AdminError> {
        let (decided_by, guest) = self.previous_policy(&SlotName::Admission)?;
        let Some((component, activation)) = guest else { return Ok(Judged::native(decided_by)) };
        let DoorQuestion { now, request, load } = *question;
        let question = AdmissionQuestion { now, request, load };
        let verdict = self.runtime.ask_admission(&component, &activation, question).map_err(activate_error)?;
        Ok(Judged { verdict: Some(verdict), ..Judged::native(decided_by) })
    }

    fn shadow_router_said(&self, request: RequestId) -> Option<Routed> {
        self.router.shadow_said(request)
    }

    fn shadow_admission_said(&self, request: RequestId) -> Option<Judged> {
        self.admission.shadow_said(request)
    }

    fn start_rollout(&self, slot: &str, request: wire::StartRollout, actor: &str) -> Result<Box<RawValue>, AdminError> {
        self.begin_rollout(slot, request, actor)
    }

    fn rollouts(&self, slot: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        Ok(self.last_rollout(slot)?.into_iter().collect())
    }

    fn rollout(&self, slot: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        self.one_rollout(slot, id)
    }

    fn steer_rollout(
        &self,
        slot: &str,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        self.steer(slot, id, steer, actor)
    }

    fn journal(&self, after: u64, limit: usize) -> Vec<JournalLine> {
        let journal = lock(&self.journal);
        journal.after(after, limit).map(|e| JournalLine { sequence: e.sequence, json: e.to_json().into() }).collect()
    }
}

impl Deploy {
    /// What was active in a slot before, and how to start it again. Nothing is published, and nobody need wait for it: a
    /// component that is deleted meanwhile is still what was asked for.
    fn previous_policy(&self, slot: &SlotName) -> Result<(DecidedBy, Option<(Component, Activation)>), AdminError> {
        let previous = lock(&self.state).slot(slot).and_then(|state| state.previous.clone());
        let previous = previous.ok_or_else(|| conflict(format!("the slot `{slot}` has no previous policy")))?;
        let Target { component, config, state_namespace: namespace, budget, revision, generation, .. } = previous;
        let decided_by = DecidedBy { revision: revision.into(), generation };
        let ComponentRef::Digest(digest) = component else { return Ok((decided_by, None)) };
        let component = self.compiled(&digest, slot)?;
        let (name, budget) = (slot.to_string(), self.budget_of(slot, budget));
        let activation = Activation { slot: name, generation, config, namespace, budget, ..Activation::default() };
        Ok((decided_by, Some((component, activation))))
    }

    fn view(&self, slot: &SlotName, state: Option<&SlotState>) -> wire::Slot {
        let status = self.live_slot(slot).map(|s| s.status());
        let native = Target {
            component: ComponentRef::Native,
            config: "{}".into(),
            state_namespace: None,
            budget: Budget::default(),
            handover: Handover::default(),
            on_fault: OnFault::default(),
            revision: "native".into(),
            generation: 0,
        };
        wire::Slot {
            slot: slot.to_string(),
            active: self.revision_view(slot, state.map_or(&native, |s| &s.active)),
            previous: state.and_then(|s| s.previous.as_ref()).map(|p| self.revision_view(slot, p)),
            candidate: state.and_then(SlotState::candidate).map(|c| self.revision_view(slot, c)),
            health: self
                .safe_health(slot, state)
                .or_else(|| self.failed_health(slot))
                .or(status.as_ref().map(|s| self.health(s)))
                .unwrap_or_else(native_health),
            counters: status.map(|s| counters(slot, &s)).unwrap_or_default(),
        }
    }

    fn revision_view(&self, slot: &SlotName, target: &Target) -> wire::SlotRevision {
        wire::SlotRevision {
            revision: target.revision.clone(),
            generation: target.generation,
            component: target.component.to_string(),
            config: RawValue::from_string(target.config.clone()).unwrap_or_default(),
            state_namespace: target.state_namespace.clone().unwrap_or_else(|| slot.to_string()),
            budget: budget::shown(target.budget),
            handover: handover::shown(target.handover),
            on_fault: on_fault::shown(target.on_fault),
            limits: (target.component != ComponentRef::Native).then(|| self.limits(slot, target.budget)).flatten(),
        }
    }

    /// In safe mode no slot runs what is stored for it; one that is to be native does.
    fn safe_health(&self, slot: &SlotName, state: Option<&SlotState>) -> Option<wire::Health> {
        let has_guest =
            |state: &SlotState| state.active.component != ComponentRef::Native || state.candidate().is_some();
        let is_bypassed = state.is_some_and(has_guest) || lock(&self.failed).contains_key(slot);
        let reason = self.safe_reason().filter(|_| is_bypassed)?;
        Some(wire::Health { reason: Some(reason), ..native_health() })
    }

    /// A slot that does not run what is stored for it says why.
    fn failed_health(&self, slot: &SlotName) -> Option<wire::Health> {
        let (Failed::Policy(reason) | Failed::Document(reason)) = lock(&self.failed).get(slot).cloned()?;
        Some(wire::Health { state: wire::HealthState::Open, reason: Some(reason), retry_in_ms: None })
    }

    fn health(&self, status: &SlotStatus) -> wire::Health {
        if &*status.revision == "native" {
            return native_health();
        }
        let (state, retry_in_ms) = match status.health {
            Health::Closed => (wire::HealthState::Closed, None),
            Health::HalfOpen => (wire::HealthState::HalfOpen, None),
            Health::Open { until } => {
                (wire::HealthState::Open, Some(until.saturating_sub(self.clock.micros()) / 1_000))
            }
        };
        let reason =
            status.last_fault.as_ref().map(|f| format!("{} in {}: {}", f.kind.as_str(), f.call.as_str(), f.message));
        wire::Health { state, reason, retry_in_ms }
    }
}

fn native_health() -> wire::Health {
    wire::Health { state: wire::HealthState::Native, reason: None, retry_in_ms: None }
}

fn counters(slot: &SlotName, status: &SlotStatus) -> wire::Counters {
    let faults = FaultKind::ALL.iter().zip(status.faults).filter(|(_, n)| *n > 0);
    wire::Counters {
        calls: status.calls,
        call_mean_us: (status.calls > 0).then(|| status.call_ns as f64 / status.calls as f64 * 1e-3),
        over_soft: status.overruns,
        faults: faults.map(|(kind, n)| (kind.as_str().to_owned(), n)).collect(),
        fallbacks: status.fallbacks,
        instances: status.instances,
        state_bytes: status.state_bytes,
        state_limit_bytes: MAX_NAMESPACE_BYTES as u64,
        aside: (*slot == SlotName::Scheduler).then_some(wire::Aside {
            replicas: status.aside,
            plans_used: status.late_plans,
            plans_dropped: status.dropped_plans,
        }),
    }
}

fn native() -> Desired {
    Desired { config: "{}".into(), ..Desired::default() }
}

pub(super) fn parse_slot(slot: &str) -> Result<SlotName, AdminError> {
    slot.parse().map_err(|error: pointsman_control::SlotNameError| AdminError {
        param: Some("slot".into()),
        ..not_found(error.to_string())
    })
}
