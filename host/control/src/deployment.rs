//! Which policy works in which slot, which worked there before, and what the next generation is called.
//!
//! An activation takes two calls: [`Deployment::plan`] decides what to prepare and under which generation, then, once the
//! host has prepared and published it, [`Deployment::published`] makes it the truth. A preparation that fails changes
//! nothing. The desired state of a slot is one small document ([`SlotDocument`]), so that a restart, or another node, can
//! apply it alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::rollout::{Phase, RolloutDocument, RolloutFormatError};
use crate::slot::{ComponentRef, SlotName};

/// Limits that a slot's policy has of its own; what is absent stays as the host has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// Time of a decision beyond which it is counted, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_us: Option<u64>,
    /// Time at which it is stopped, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard_ms: Option<u64>,
    /// Memory of an instance, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
}

/// Whether a policy may start without what the one before it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handover {
    /// It starts cold where nothing can be handed over.
    #[default]
    Cold,
    /// It is not activated then.
    Require,
}

/// What becomes of requests of which a sampler says nothing, because it has faulted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFault {
    /// They go on.
    #[default]
    Open,
    /// They are ended with an error.
    Closed,
}

/// What an operator wants in a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The component.
    pub component: ComponentRef,
    /// JSON text for its `init`.
    pub config: String,
    /// Namespace of its host-state; the slot's own when absent.
    pub state_namespace: Option<String>,
    /// Its own limits.
    pub budget: Budget,
    /// Whether it may start cold.
    pub handover: Handover,
    /// Whether requests go on without it; of a sampler.
    pub on_fault: OnFault,
    /// Only if the slot's active generation is this one.
    pub if_generation: Option<u64>,
}

/// A policy that was published in a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The component.
    pub component: ComponentRef,
    /// JSON text that its `init` got.
    pub config: String,
    /// Namespace of its host-state, when it is not the slot's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_namespace: Option<String>,
    /// Its own limits.
    #[serde(default, skip_serializing_if = "Budget::is_empty")]
    pub budget: Budget,
    /// Whether it might start cold.
    #[serde(default, skip_serializing_if = "Handover::is_cold")]
    pub handover: Handover,
    /// Whether requests go on without it.
    #[serde(default, skip_serializing_if = "OnFault::is_open")]
    pub on_fault: OnFault,
    /// `name@version+<8 hex>`, or `native`.
    pub revision: String,
    /// The generation under which it was published.
    pub generation: u64,
}

/// One slot.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotState {
    /// What works there now.
    pub active: Target,
    /// What worked there before; rollback returns to it.
    pub previous: Option<Target>,
    /// What is being tried there, or was last.
    pub rollout: Option<RolloutDocument>,
}

/// The stored form of a slot's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotDocument {
    /// Version of this layout: 1.
    pub format: u32,
    /// Which slot.
    pub slot: SlotName,
    /// What works there.
    pub active: Target,
    /// What worked there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Target>,
    /// What is being tried there, or was last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutDocument>,
    /// The highest generation ever given there, when it is not the active one's: a candidate's that was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<u64>,
    /// Whether the slot was removed; the document stays so that its generations are never reused.
    #[serde(default)]
    pub removed: bool,
    /// The journal's last line when this was stored: the line that tells of it comes after. 0 from older hosts.
    #[serde(default)]
    pub journal_before: u64,
    /// The highest generation of removed slots whose documents are gone: a new telemetry slot goes on from it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub forgotten: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A telemetry slot that was removed.
#[derive(Clone, Debug, PartialEq)]
pub struct Removal {
    /// What to store.
    pub document: SlotDocument,
    /// Slots removed earlier, whose documents are to be deleted once this one is stored.
    pub forgotten: Vec<SlotName>,
}

/// A document that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not the JSON of a slot document.
    #[error("not a slot document: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Written by a newer host.
    #[error("slot document format {found}; this host reads format 1")]
    Format {
        /// The number in the document.
        found: u32,
    },
    /// Its rollout was written by a newer host.
    #[error(transparent)]
    Rollout(#[from] RolloutFormatError),
}

impl DocumentError {
    /// Whether this host reads documents of a format.
    pub(crate) fn check(format: u32) -> Result<(), Self> {
        if format == 1 { Ok(()) } else { Err(Self::Format { found: format }) }
    }
}

/// A document as it is stored: JSON, for people too.
pub(crate) fn stored(document: &impl Serialize) -> String {
    serde_json::to_string_pretty(document).unwrap_or_else(|error| unreachable!("a document is plain data: {error}"))
}

/// What to prepare and publish next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The slot.
    pub slot: SlotName,
    /// What to activate.
    pub desired: Desired,
    /// Under this generation.
    pub generation: u64,
}

/// Why nothing will be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Somebody was faster.
    #[error("the active generation of `{slot}` is {active}, not {expected}; read the slot again and decide anew")]
    Stale {
        /// The slot.
        slot: SlotName,
        /// Its active generation.
        active: u64,
        /// What the caller expected.
        expected: u64,
    },
    /// There is no such slot yet.
    #[error("nothing was ever activated in `{0}`")]
    NoSlot(SlotName),
    /// Nothing to return to.
    #[error("`{0}` has no previous policy to roll back to")]
    NothingBefore(SlotName),
    /// Too many telemetry slots.
    #[error("there are {limit} telemetry slots already; delete one first")]
    TooManySlots {
        /// The bound.
        limit: usize,
    },
    /// The name of a slot is that slot's own namespace.
    #[error(
        "`{namespace}` is the namespace that the slot `{namespace}` has by itself; for `{slot}` leave it out, and to let slots \
         share one give each of them the same other name, such as `shared`"
    )]
    NamespaceOfSlot {
        /// Whose policy asked.
        slot: SlotName,
        /// The slot that has it.
        namespace: SlotName,
    },
    /// A rollout is under way there.
    #[error(
        "rollout {id} is under way in `{slot}`; promote or abort it first (POST /admin/v1/slots/{slot}/rollouts/{id}/abort)"
    )]
    RollingOut {
        /// The slot.
        slot: SlotName,
        /// The rollout.
        id: String,
    },
}

/// Most telemetry slots at once.
const MAX_TELEMETRY_SLOTS: usize = 16;
/// Most removed ones that are remembered by name; of the others one number is.
const MAX_REMOVED_SLOTS: usize = 64;

/// Every slot of a host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Deployment {
    slots: BTreeMap<SlotName, SlotState>,
    /// Highest generation ever given, removed slots included.
    generations: BTreeMap<SlotName, u64>,
    /// Nobody who is not in there was given a higher one.
    forgotten: u64,
}

// === impl Deployment ===

impl Deployment {
    /// Every slot with its state, by name.
    pub fn slots(&self) -> impl Iterator<Item = (&SlotName, &SlotState)> {
        self.slots.iter()
    }

    /// One slot.
    #[must_use]
    pub fn slot(&self, slot: &SlotName) -> Option<&SlotState> {
        self.slots.get(slot)
    }

    /// Slots whose active, previous or candidate policy is this component.
    #[must_use]
    pub fn users_of(&self, component: &ComponentRef) -> Vec<&SlotName> {
        let uses = |state: &SlotState| {
            let others = state.previous.iter().chain(state.candidate());
            state.active.component == *component || others.into_iter().any(|t| t.component == *component)
        };
        self.slots.iter().filter(|(_, state)| uses(state)).map(|(slot, _)| slot).collect()
    }

    /// Decides what to prepare for a wish.
    ///
    /// # Errors
    /// A stale `if_generation`, a rollout under way, another slot's namespace, or one telemetry slot too many.
    pub fn plan(&self, slot: SlotName, desired: Desired) -> Result<Planned, PlanError> {
        self.not_rolling_out(&slot)?;
        self.not_stale(&slot, desired.if_generation)?;
        let of_slot = desired.state_namespace.as_deref().and_then(|name| name.parse::<SlotName>().ok());
        if let Some(namespace) = of_slot.filter(|of| *of != slot) {
            return Err(PlanError::NamespaceOfSlot { slot, namespace });
        }
        let telemetry = self.slots.keys().filter(|s| matches!(s, SlotName::Telemetry(_))).count();
        let is_new = matches!(slot, SlotName::Telemetry(_)) && !self.slots.contains_key(&slot);
        if is_new && telemetry >= MAX_TELEMETRY_SLOTS {
            return Err(PlanError::TooManySlots { limit: MAX_TELEMETRY_SLOTS });
        }
        let generation = self.next_generation(&slot);
        Ok(Planned { slot, desired, generation })
    }

    /// Decides what to prepare for a return to the policy before the active one.
    ///
    /// # Errors
    /// A stale `if_generation`, nothing was active before, or a rollout is under way.
    pub fn plan_rollback(&self, slot: &SlotName, if_generation: Option<u64>) -> Result<Planned, PlanError> {
        self.not_rolling_out(slot)?;
        self.not_stale(slot, if_generation)?;
        let state = self.slots.get(slot).ok_or_else(|| PlanError::NoSlot(slot.clone()))?;
        let before = state.previous.clone().ok_or_else(|| PlanError::NothingBefore(slot.clone()))?;
        Ok(Planned { slot: slot.clone(), desired: before.into(), generation: self.next_generation(slot) })
    }

    /// Makes a published plan the truth; returns the document to store. The policy that was active becomes the previous
    /// one, so that rolling back twice returns to where one began.
    pub fn published(&mut self, planned: Planned, revision: String) -> SlotDocument {
        let (slot, generation) = (planned.slot.clone(), planned.generation);
        let active = planned.target(revision);
        let (previous, rollout) = match self.slots.remove(&slot) {
            Some(state) => (Some(state.active), state.rollout),
            None => (None, None),
        };
        self.generations.insert(slot.clone(), generation);
        self.put(slot, SlotState { active, previous, rollout })
    }

    /// Puts a rollout's state into its slot: a new one, or one that has changed. One that is promoted makes its candidate the
    /// active policy. Returns the document to store; nothing where the slot is gone.
    pub fn rolled(&mut self, slot: &SlotName, rollout: RolloutDocument) -> Option<SlotDocument> {
        let SlotState { active, previous, .. } = self.slots.get(slot)?.clone();
        let candidate = rollout.target.clone()?;
        let newest = self.generations.entry(slot.clone()).or_default();
        *newest = candidate.generation.max(*newest);
        let promoted = rollout.phase == Phase::Promoted && active.generation < candidate.generation;
        let (active, previous) = if promoted { (candidate, Some(active)) } else { (active, previous) };
        Some(self.put(slot.clone(), SlotState { active, previous, rollout: Some(rollout) }))
    }

    fn put(&mut self, slot: SlotName, state: SlotState) -> SlotDocument {
        self.slots.insert(slot.clone(), state.clone());
        self.document_of(slot, state)
    }

    fn not_rolling_out(&self, slot: &SlotName) -> Result<(), PlanError> {
        match self.slots.get(slot).and_then(SlotState::rolling_out) {
            Some(rollout) => Err(PlanError::RollingOut { slot: slot.clone(), id: rollout.id.clone() }),
            None => Ok(()),
        }
    }

    /// Only the generation that the caller has seen.
    fn not_stale(&self, slot: &SlotName, if_generation: Option<u64>) -> Result<(), PlanError> {
        let active = self.slots.get(slot).map_or(0, |state| state.active.generation);
        match if_generation.filter(|expected| *expected != active) {
            Some(expected) => Err(PlanError::Stale { slot: slot.clone(), active, expected }),
            None => Ok(()),
        }
    }

    /// Removes a telemetry slot. Its document stays, so that its generations are not given again; names are an operator's, who
    /// may use many, so that only some are remembered.
    ///
    /// # Errors
    /// A stale `if_generation`, no such slot, or a rollout under way there.
    pub fn removed(&mut self, slot: &SlotName, if_generation: Option<u64>) -> Result<Removal, PlanError> {
        self.not_rolling_out(slot)?;
        self.not_stale(slot, if_generation)?;
        let state = self.slots.remove(slot).ok_or_else(|| PlanError::NoSlot(slot.clone()))?;
        let forgotten = self.forget_removed(slot);
        let last = SlotState { active: state.active, previous: None, rollout: None };
        let document = SlotDocument { removed: true, ..self.document_of(slot.clone(), last) };
        Ok(Removal { document, forgotten })
    }

    /// Forgets the removed slots beyond the bound, those with the lowest generations first, but never this one.
    fn forget_removed(&mut self, last: &SlotName) -> Vec<SlotName> {
        let is_removed = |slot: &SlotName| matches!(slot, SlotName::Telemetry(_)) && !self.slots.contains_key(slot);
        let removed = self.generations.iter().filter(|(slot, _)| is_removed(slot) && *slot != last);
        let mut removed: Vec<(u64, SlotName)> = removed.map(|(slot, newest)| (*newest, slot.clone())).collect();
        removed.sort();
        removed.truncate((removed.len() + 1).saturating_sub(MAX_REMOVED_SLOTS));
        for (newest, slot) in &removed {
            self.generations.remove(slot);
            self.forgotten = self.forgotten.max(*newest);
        }
        removed.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Takes a stored document as the truth: at start, before anything is published.
    pub fn restore(&mut self, document: SlotDocument) {
        let SlotDocument { slot, active, previous, rollout, newest, removed, forgotten, .. } = document;
        self.forgotten = self.forgotten.max(forgotten);
        self.generations.insert(slot.clone(), newest.unwrap_or(0).max(active.generation));
        if !removed {
            self.slots.insert(slot, SlotState { active, previous, rollout });
        }
    }

    /// The document of a slot as it stands.
    #[must_use]
    pub fn document(&self, slot: &SlotName) -> Option<SlotDocument> {
        Some(self.document_of(slot.clone(), self.slots.get(slot)?.clone()))
    }

    fn document_of(&self, slot: SlotName, state: SlotState) -> SlotDocument {
        let SlotState { active, previous, rollout } = state;
        let newest = self.generations.get(&slot).copied().filter(|newest| *newest != active.generation);
        let (removed, journal_before, forgotten) = (false, 0, self.forgotten);
        SlotDocument { format: 1, slot, active, previous, rollout, newest, removed, journal_before, forgotten }
    }

    fn next_generation(&self, slot: &SlotName) -> u64 {
        let unknown = if matches!(slot, SlotName::Telemetry(_)) { self.forgotten } else { 0 };
        self.generations.get(slot).copied().unwrap_or(unknown) + 1
    }
}

// === impl Planned ===

impl Planned {
    /// What is published once it is prepared and has said what it is.
    #[must_use]
    pub fn target(self, revision: String) -> Target {
        let Desired { component, config, state_namespace, budget, handover, on_fault, if_generation: _ } = self.desired;
        let generation = self.generation;
        Target { component, config, state_namespace, budget, handover, on_fault, revision, generation }
    }
}

// === impl Budget ===

impl Budget {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// With `other`'s limits where it has none of its own.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            soft_us: self.soft_us.or(other.soft_us),
            hard_ms: self.hard_ms.or(other.hard_ms),
            memory_mib: self.memory_mib.or(other.memory_mib),
        }
    }
}

// === impl Handover ===

impl Handover {
    fn is_cold(&self) -> bool {
        *self == Self::Cold
    }
}

// === impl OnFault ===

impl OnFault {
    /// Whether they go on.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self == Self::Open
    }
}

// === impl Desired ===

impl From<Target> for Desired {
    /// The same again.
    fn from(target: Target) -> Self {
        let Target { component, config, state_namespace, budget, handover, on_fault, .. } = target;
        Self { component, config, state_namespace, budget, handover, on_fault, if_generation: None }
    }
}

// === impl SlotState ===

impl SlotState {
    /// The rollout that is under way.
    #[must_use]
    pub fn rolling_out(&self) -> Option<&RolloutDocument> {
        self.rollout.as_ref().filter(|rollout| !rollout.phase.is_over())
    }

    /// What the rollout under way tries.
    #[must_use]
    pub fn candidate(&self) -> Option<&Target> {
        self.rolling_out()?.target.as_ref()
    }
}

// === impl SlotDocument ===

impl SlotDocument {
    /// Reads a stored document.
    ///
    /// # Errors
    /// It is not one, or a newer host wrote it.
    pub fn parse(json: &[u8]) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(json)?;
        document.rollout.as_ref().map_or(Ok(()), RolloutDocument::check)?;
        DocumentError::check(document.format).map(|()| document)
    }

    /// Its stored form: JSON, for people too.
    #[must_use]
    pub fn to_json(&self) -> String {
        stored(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::{Cause, Decision, Mode, Spec};

    fn desired(component: &str, if_generation: Option<u64>) -> Desired {
        let component = ComponentRef::from(component.to_owned());
        Desired { component, config: "{}".into(), if_generation, ..Desired::default() }
    }

    fn activate(deployment: &mut Deployment, slot: &SlotName, component: &str) -> SlotDocument {
        let planned = deployment.plan(slot.clone(), desired(component, None)).expect("no condition");
        deployment.published(planned, format!("{component}@1"))
    }

    #[test]
    fn generations_grow_and_survive_removal() {
        let mut deployment = Deployment::default();
        let slot = SlotName::Telemetry("x".into());
        assert_eq!(activate(&mut deployment, &slot, "sha256:a").active.generation, 1);
        assert_eq!(activate(&mut deployment, &slot, "sha256:a").active.generation, 2);
        let Removal { document, forgotten } = deployment.removed(&slot, None).expect("it exists");
        assert_eq!(forgotten, []);
        let mut restored = Deployment::default();
        restored.restore(SlotDocument::parse(document.to_json().as_bytes()).expect("it was just written"));
        assert_eq!(restored, deployment);
        assert_eq!(activate(&mut restored, &slot, "sha256:b").active.generation, 3);
    }

    #[test]
    fn removed_slots_are_remembered_up_to_a_bound_and_their_generations_for_ever() {
        let mut deployment = Deployment::default();
        let mut stored: BTreeMap<SlotName, SlotDocument> = BTreeMap::new();
        let mut given = Vec::new();
        let slot = |n: usize| SlotName::Telemetry(format!("t{n}"));
        stored.insert(SlotName::Router, activate(&mut deployment, &SlotName::Router, "native"));
        for n in 0..3 * MAX_REMOVED_SLOTS {
            // Some are put several times before they go.
            for _ in 0..=n % 5 {
                stored.insert(slot(n), activate(&mut deployment, &slot(n), "native"));
            }
            given.push(stored[&slot(n)].active.generation);
            let Removal { document, forgotten } = deployment.removed(&slot(n), None).expect("it exists");
            stored.insert(slot(n), document);
            forgotten.iter().for_each(|slot| drop(stored.remove(slot)));
            assert_eq!(stored.len(), 1 + (n + 1).min(MAX_REMOVED_SLOTS));
            let mut restored = Deployment::default();
            stored.values().for_each(|document| {
                restored.restore(SlotDocument::parse(document.to_json().as_bytes()).expect("it was just written"));
            });
            assert_eq!(restored, deployment);
        }
        for (n, given) in given.iter().enumerate() {
            let again = activate(&mut deployment.clone(), &slot(n), "native").active.generation;
            assert!(again > *given, "{n}: {given}, {again}");
        }
        assert_eq!(activate(&mut deployment, &SlotName::Router, "native").active.generation, 2);
    }

    #[test]
    fn a_namespace_is_the_slots_own_or_nobodys() {
        for (namespace, fits) in
            [("router", true), ("shared", true), ("scheduler", false), ("telemetry.x", false), ("telemetry.X!", true)]
        {
            let desired = Desired { state_namespace: Some(namespace.into()), ..desired("native", None) };
            let planned = Deployment::default().plan(SlotName::Router, desired);
            assert_eq!(planned.is_ok(), fits, "{namespace}: {planned:?}");
            let said = planned.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(fits || said.contains("give each of them the same other name"), "{said}");
        }
    }

    #[test]
    fn rollback_swaps_active_and_previous() {
        let mut deployment = Deployment::default();
        let slot = SlotName::Router;
        assert_eq!(deployment.plan_rollback(&slot, None), Err(PlanError::NoSlot(slot.clone())));
        activate(&mut deployment, &slot, "sha256:a");
        assert_eq!(deployment.plan_rollback(&slot, None), Err(PlanError::NothingBefore(slot.clone())));
        activate(&mut deployment, &slot, "sha256:b");
        for (expect, generation) in [("sha256:a", 3), ("sha256:b", 4)] {
            let planned = deployment.plan_rollback(&slot, None).expect("there is a previous one");
            assert_eq!((planned.desired.component.to_string().as_str(), planned.generation), (expect, generation));
            deployment.published(planned, "r".into());
        }
    }

    #[test]
    fn a_stale_condition_plans_nothing() {
        let mut deployment = Deployment::default();
        activate(&mut deployment, &SlotName::Router, "sha256:a");
        for (if_generation, good) in [(None, true), (Some(1), true), (Some(0), false), (Some(2), false)] {
            let planned = deployment.plan(SlotName::Router, desired("native", if_generation));
            assert_eq!(planned.is_ok(), good, "{if_generation:?}");
            let back = deployment.plan_rollback(&SlotName::Router, if_generation).expect_err("nothing before");
            assert_eq!(matches!(back, PlanError::Stale { .. }), !good, "{if_generation:?}");
            assert_eq!(deployment.clone().removed(&SlotName::Router, if_generation).is_ok(), good);
        }
    }

    #[test]
    fn a_document_of_a_newer_host_is_refused() {
        let mut deployment = Deployment::default();
        let document = activate(&mut deployment, &SlotName::Router, "native").to_json();
        let newer = document.replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(SlotDocument::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
        let unknown = document.replace("\"removed\": false", "\"removed\": false, \"x\": 1");
        assert!(matches!(SlotDocument::parse(unknown.as_bytes()), Err(DocumentError::Malformed(_))));
    }

    fn roll_out(deployment: &mut Deployment, component: &str) -> RolloutDocument {
        let planned = deployment.plan(SlotName::Router, desired(component, None)).expect("no condition");
        let (id, revision) = (format!("router-{}", planned.generation), format!("{component}@1"));
        let names = ["a".into(), revision.clone()];
        let rollout = RolloutDocument::new(id, "router".into(), names, Spec::of(Mode::Canary, 1));
        let rollout = RolloutDocument { target: Some(planned.target(revision)), ..rollout };
        deployment.rolled(&SlotName::Router, rollout.clone()).expect("the slot is there");
        rollout
    }

    #[test]
    fn a_rollout_keeps_its_slot_until_it_is_over() {
        let slot = SlotName::Router;
        for (decision, active, next) in
            [(Decision::Abort { cause: Cause::Asked }, ("sha256:a", 1), 3), (Decision::Promote, ("sha256:b", 2), 3)]
        {
            let mut deployment = Deployment::default();
            activate(&mut deployment, &slot, "sha256:a");
            let mut rollout = roll_out(&mut deployment, "sha256:b");
            let refused = PlanError::RollingOut { slot: slot.clone(), id: "router-2".into() };
            assert_eq!(deployment.plan(slot.clone(), desired("native", None)), Err(refused.clone()));
            assert_eq!(deployment.plan_rollback(&slot, None), Err(refused.clone()));
            assert_eq!(deployment.removed(&slot, None), Err(refused));
            assert_eq!(deployment.users_of(&ComponentRef::from("sha256:b".to_owned())), [&slot]);
            rollout.apply(&decision);
            let document = deployment.rolled(&slot, rollout).expect("the slot is there");
            let mut restored = Deployment::default();
            restored.restore(SlotDocument::parse(document.to_json().as_bytes()).expect("it was just written"));
            assert_eq!(restored, deployment);
            assert_eq!(restored.document(&slot), Some(document.clone()));
            let Target { component, generation, .. } = document.active;
            assert_eq!((component.to_string().as_str(), generation), active, "{decision:?}");
            let planned = restored.plan(slot.clone(), desired("native", None)).expect("the rollout is over");
            assert_eq!(planned.generation, next, "the candidate's generation is never given again");
        }
    }

    #[test]
    fn components_in_use_are_known() {
        let mut deployment = Deployment::default();
        activate(&mut deployment, &SlotName::Router, "sha256:a");
        activate(&mut deployment, &SlotName::Router, "sha256:b");
        activate(&mut deployment, &SlotName::Router, "sha256:c");
        let users = |c: &str| deployment.users_of(&ComponentRef::from(c.to_owned())).len();
        assert_eq!([users("sha256:a"), users("sha256:b"), users("sha256:c")], [0, 1, 1]);
    }
}
