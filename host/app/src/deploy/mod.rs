//! Deployments: where the pure state machine (control), the wasm half (policy) and the data directory (store) meet.
//!
//! One change at a time: `operations` is held from planning to the pointer swap, so that generations are published in the
//! order in which they were numbered. The document is stored before the swap: a crash in between activates, at the next
//! start, what was asked for, and a generation that anybody has seen is never given again. Nothing on the serving path
//! takes a lock of this module. Locks nest in this order: `operations`, `rollouts`, then one of `state` and `components`,
//! then `journal`.

mod activate;
mod admin;
pub(crate) mod budget;
mod deed;
mod errors;
mod handover;
mod intake;
mod on_fault;
pub(crate) mod rollout;
mod safe_mode;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use crossbeam_queue::ArrayQueue;
use pointsman_control::{
    AliasDocument, Budget, ComponentRef, Deployment, Desired, Happened, Journal, OnFault, Planned, SafeModeDocument,
    SlotDocument, SlotName, Target, Why,
};
use pointsman_policy::{
    AdmissionSlot, Component, FaultReport, Handover as Rule, Health, RetentionSlot, Role, RouterSlot, Runtime,
    SamplerSlot, SchedulerSlot, SlotStatus, TelemetrySlot, World,
};
use pointsman_telemetry::Metrics;

use crate::builtin::BUILTINS;
use crate::clock::SystemClock;
use crate::config::{Config, RegistrySection, SlotSection};
use crate::reference::OCI_SCHEME;
use crate::store::{Store, Unreadable};
use crate::trust::KeyRing;

/// What follows for requests where the policy of a slot that fails closed is missing, for whoever reads why.
const REFUSED: &str = "; `on_fault` is `closed`, so every request is refused until something is activated in the slot";
/// Entries of the journal that the admin API can read back.
const JOURNAL_ENTRIES: usize = 4_096;
/// Faults that wait for the observer thread to journal them; the oldest give way (metrics count them all).
const PENDING_FAULTS: usize = 256;

/// The telemetry hooks by slot.
pub(crate) type TelemetrySlots = BTreeMap<String, Arc<TelemetrySlot>>;

/// Every slot of the host and what is needed to change one.
#[derive(Debug)]
pub(crate) struct Deploy {
    runtime: Runtime,
    store: Arc<Store>,
    clock: Arc<SystemClock>,
    metrics: Arc<Metrics>,
    trust: KeyRing,
    /// Limits that the configuration sets for whatever policy a slot has.
    budgets: BTreeMap<SlotName, Budget>,
    registries: BTreeMap<String, RegistrySection>,
    /// Started in safe mode: no guest is instantiated.
    safe_mode: bool,
    /// Switched to safe mode since: every guest is bypassed.
    switched: Mutex<Option<SafeModeDocument>>,
    operations: Mutex<()>,
    /// Held while a registry is asked.
    pulling: Mutex<()>,
    state: Mutex<Deployment>,
    journal: Mutex<Journal>,
    components: Mutex<BTreeMap<String, Known>>,
    /// Rollouts under way; the observer thread looks after them.
    rollouts: Mutex<BTreeMap<SlotName, rollout::Live>>,
    faults: FaultQueue,
    /// Slot, generation and the last health that was journalled.
    last_health: Mutex<BTreeMap<SlotName, (u64, &'static str)>>,
    /// Slots whose stored policy or document could not be used at the start, and why.
    failed: Mutex<BTreeMap<SlotName, Failed>>,
    /// Lets requests in.
    pub admission: Arc<AdmissionSlot>,
    /// Chooses replicas.
    pub router: Arc<RouterSlot>,
    /// Orders steps; each replica's driver attaches to it.
    pub scheduler: Arc<SchedulerSlot>,
    /// Ranks cached blocks; each replica's driver attaches to it.
    pub retention: Arc<RetentionSlot>,
    /// Limits tokens; each replica's driver attaches to it.
    pub sampler: Arc<SamplerSlot>,
    /// Watch events; read by the observer thread.
    pub telemetry: ArcSwap<TelemetrySlots>,
}

/// Why a slot does not run what is stored for it.
#[derive(Clone, Debug)]
enum Failed {
    /// The policy could not be brought back; native serves until the next activation, or nobody.
    Policy(String),
    /// The document cannot be read; the slot takes no activation until somebody has looked at the file.
    Document(String),
}

/// A component that the host knows.
#[derive(Clone, Debug)]
struct Known {
    builtin: Option<&'static str>,
    /// Set once it was validated and compiled in this life of the host.
    component: Option<Component>,
    /// What it calls itself, once it ran.
    revision: Option<String>,
    /// What it says that it does, in one line, once it ran.
    summary: Option<String>,
    world: World,
    package: String,
    size: u64,
    /// Name of the key in the ring that signed it.
    signed_by: Option<String>,
}

/// What the deployments share with the rest of the host.
#[derive(Clone, Debug)]
pub(crate) struct HostParts {
    /// The clock.
    pub clock: Arc<SystemClock>,
    /// Metric families.
    pub metrics: Arc<Metrics>,
    /// Whose components are taken.
    pub trust: KeyRing,
    /// Limits that the configuration sets for whatever policy a slot has.
    pub budgets: BTreeMap<SlotName, Budget>,
    /// How registries are reached, by host.
    pub registries: BTreeMap<String, RegistrySection>,
    /// What guests did wrong, from whatever thread noticed to the observer thread: the journal's file must not hold up a
    /// request or a step.
    pub faults: FaultQueue,
}

/// A bounded queue of faults.
pub(crate) type FaultQueue = Arc<ArrayQueue<FaultReport>>;

/// An empty queue.
#[must_use]
pub(crate) fn fault_queue() -> FaultQueue {
    Arc::new(ArrayQueue::new(PENDING_FAULTS))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === start ===

impl Deploy {
    /// Wires the slots to their runtime. Every slot is native until [`Deploy::start`].
    pub(crate) fn new(runtime: Runtime, store: Arc<Store>, parts: HostParts, safe_mode: bool) -> Arc<Self> {
        let mut journal = Journal::new(JOURNAL_ENTRIES, 0);
        journal.restore(store.journal_tail());
        Arc::new(Self {
            admission: runtime.admission_slot("admission"),
            router: runtime.router_slot("router"),
            scheduler: runtime.scheduler_slot("scheduler"),
            retention: runtime.retention_slot("kv-retention"),
            sampler: runtime.sampler_slot("sampler"),
            telemetry: ArcSwap::default(),
            store,
            clock: parts.clock,
            metrics: parts.metrics,
            trust: parts.trust,
            budgets: parts.budgets,
            registries: parts.registries,
            safe_mode,
            switched: Mutex::default(),
            operations: Mutex::default(),
            pulling: Mutex::default(),
            state: Mutex::default(),
            journal: Mutex::new(journal),
            components: Mutex::default(),
            rollouts: Mutex::default(),
            faults: parts.faults,
            last_health: Mutex::default(),
            failed: Mutex::default(),
            runtime,
        })
    }

    /// Publishes what the stored documents say, and what the configuration names for slots without one. A policy that
    /// cannot be brought back leaves its slot native and is reported: the host serves either way. Only where requests were not
    /// to go on without it, they are refused.
    pub(crate) fn start(&self, config: &Config) {
        self.find_components();
        let _one = lock(&self.operations);
        self.metrics.safe_mode(self.safe_mode);
        self.recall_safe_mode();
        self.recall_deed();
        for (slot, document) in self.store.slot_documents() {
            match document {
                Ok(document) => {
                    let (active, removed) = (document.active.clone(), document.removed);
                    self.catch_up(&document);
                    lock(&self.state).restore(document);
                    if !removed && !self.safe_mode {
                        let serves = self.bring_back(&slot, &active);
                        self.restore_rollout(&slot, serves);
                        if serves {
                            self.compare_with_config(&slot, &active, config);
                        }
                    }
                }
                Err(unreadable) => self.go_without_document(slot, unreadable),
            }
        }
        if self.safe_mode {
            tracing::warn!("safe mode: native policies only; stored deployments are left as they are");
            return;
        }
        for (name, section) in &config.slots {
            match name.parse::<SlotName>() {
                Ok(slot) if section.component.is_empty() || self.store.knows(&slot) => {}
                Ok(slot) => self.start_fresh(slot, section),
                Err(error) => tracing::error!("configuration, slots: {error}"),
            }
        }
        if self.safe_reason().is_some() {
            self.pause_rollouts("startup");
        }
    }

    /// A document is stored before its journal line: a host that died in between left the line to be written now.
    fn catch_up(&self, document: &SlotDocument) {
        let untold = {
            let mut journal = lock(&self.journal);
            journal.go_on_after(document.journal_before);
            journal.untold(document)
        };
        untold.into_iter().for_each(|what| self.note("startup", what));
    }

    /// As [`catch_up`](Self::catch_up), for an alias.
    pub(crate) fn catch_up_alias(&self, document: &AliasDocument) {
        let untold = {
            let mut journal = lock(&self.journal);
            journal.go_on_after(document.journal_before.max(document.ended_before));
            journal.untold_of_alias(document)
        };
        untold.into_iter().for_each(|what| self.note("startup", what));
    }

    /// Lists built-ins and the components on disk, so that they can be named; nothing is compiled here.
    fn find_components(&self) {
        let mut components = lock(&self.components);
        let stored = self.store.component_digests().into_iter().filter_map(|digest| {
            let bytes = self.store.read_component(&digest).ok()?;
            Some((None, bytes))
        });
        let builtin = BUILTINS.iter().map(|b| (Some(b.name), b.bytes.to_vec()));
        for (builtin, bytes) in stored.chain(builtin) {
            match self.runtime.inspect(&bytes) {
                Ok(found) => {
                    let digest = found.digest.to_string();
                    let signature = self.store.read_signature(&digest);
                    let signer = signature.and_then(|signature| self.trust.signer(&digest, &signature));
                    let known = Known {
                        builtin,
                        component: None,
                        revision: None,
                        summary: None,
                        world: found.world,
                        package: found.package.to_string(),
                        size: bytes.len() as u64,
                        signed_by: signer.map(str::to_owned),
                    };
                    components.insert(digest, known);
                }
                Err(error) => tracing::error!("a stored component is no longer accepted: {error}"),
            }
        }
    }

    /// Publishes a stored policy again, under its own generation; native, or nobody, where that fails.
    fn bring_back(&self, slot: &SlotName, active: &Target) -> bool {
        let again = Planned { slot: slot.clone(), desired: active.clone().into(), generation: active.generation };
        let published = self
            .prepare(&again, Role::Active, Rule::Cold)
            .and_then(|ready| self.publish(slot, ready, active.generation));
        let Err(error) = published else { return true };
        tracing::error!(%slot, "the stored policy {} cannot be brought back: {error}", active.revision);
        // Generations only grow, so the number of the lost policy is now native's.
        if let Err(error) = self.publish(slot, activate::Ready::Native, active.generation) {
            tracing::error!(%slot, "native cannot be published: {error}");
        }
        let is_closed = active.on_fault == OnFault::Closed;
        let error = error.message + if is_closed { REFUSED } else { "" };
        self.go_without(slot, is_closed, Failed::Policy(error.clone()));
        let component = active.component.to_string();
        self.note("startup", Happened::Refused { slot: slot.clone(), component, error });
        false
    }

    /// A slot cannot have its policy at this start: native decides in its place, or nobody, and says so.
    fn go_without(&self, slot: &SlotName, is_closed: bool, failed: Failed) {
        if is_closed {
            self.sampler.refuse();
        }
        let instead = if is_closed { "nobody" } else { "native" };
        self.metrics.missing(&slot.to_string(), Some(instead));
        tracing::error!(%slot, "{instead} decides in the place of its policy");
        lock(&self.failed).insert(slot.clone(), failed);
    }

    fn go_without_document(&self, slot: SlotName, Unreadable { why, may_be_closed }: Unreadable) {
        let is_closed = slot == SlotName::Sampler && may_be_closed && !self.safe_mode;
        let why = why + if is_closed { "; it may say `closed`, so every request is refused" } else { "" };
        tracing::error!(%slot, "nothing can be activated there: {why}");
        self.go_without(&slot, is_closed, Failed::Document(why.clone()));
        if is_closed {
            self.note("startup", Happened::Refused { slot, component: "unknown".into(), error: why });
        }
    }

    fn compare_with_config(&self, slot: &SlotName, active: &Target, config: &Config) {
        let Some(section) = config.slots.get(&slot.to_string()) else { return };
        if section.component.is_empty() || section.component.starts_with(OCI_SCHEME) {
            // What a tag means today is not worth a start that waits for a registry.
            return;
        }
        // Only looked at: a file that nobody activates is not worth keeping.
        let found = self.look_up(&section.component).map(|(component, _)| component);
        if found.unwrap_or(ComponentRef::Digest(section.component.clone())) != active.component {
            let (configured, stored) = (section.component.clone(), active.revision.clone());
            tracing::warn!(%slot, "the configuration names {configured}, the stored deployment {stored}; the stored one serves");
            self.note("startup", Happened::Differs { slot: slot.clone(), configured, stored });
        }
    }

    fn start_fresh(&self, slot: SlotName, section: &SlotSection) {
        let config = serde_json::to_string(&section.config).unwrap_or_else(|_| "{}".into());
        let started = self.resolve(&section.component).and_then(|component| {
            let desired = Desired { component, config, on_fault: section.on_fault, ..Desired::default() };
            self.activate(slot.clone(), desired, "startup", Why::Start)
        });
        if let Err(error) = started {
            tracing::error!(%slot, "{} from the configuration cannot start: {error}", section.component);
            let is_closed = section.on_fault == OnFault::Closed && slot == SlotName::Sampler;
            let why = error.message + if is_closed { REFUSED } else { "" };
            self.go_without(&slot, is_closed, Failed::Policy(why));
        }
    }
}

impl Deploy {
    /// Stores a slot's document, with where the journal is: the line that tells of it comes after.
    ///
    /// # Errors
    /// The disk does not take it; the old document stays.
    fn store_slot(&self, document: &SlotDocument) -> std::io::Result<()> {
        self.store.write_slot(&SlotDocument { journal_before: self.last_line(), ..document.clone() })
    }

    /// The number of the journal's last line.
    pub(crate) fn last_line(&self) -> u64 {
        lock(&self.journal).last()
    }

    /// Numbers an event, keeps it and appends it to the journal file.
    pub(crate) fn note(&self, actor: &str, what: Happened) {
        // Held while the line is written, so that the file has the order of the numbers.
        let mut journal = lock(&self.journal);
        let (_, line) = journal.append(self.clock.unix_millis(), actor, what);
        self.store.append_journal(line);
    }
}

// === what guests do ===

impl Deploy {
    /// Journals what guests did and every change of a slot's health; called by the observer thread.
    pub(crate) fn journal_faults(&self) {
        while let Some(fault) = self.faults.pop() {
            let Ok(slot) = fault.slot.parse::<SlotName>() else { continue };
            tracing::warn!(%slot, revision = %fault.revision, kind = fault.kind.as_str(), "policy fault: {}", fault.message);
            let (revision, kind) = (fault.revision.to_string(), fault.kind.as_str().to_owned());
            let detail = format!("{}: {}", fault.call.as_str(), fault.message);
            self.note("host", Happened::Fault { slot, revision, generation: fault.generation, kind, detail });
        }
        let names: Vec<SlotName> = lock(&self.state).slots().map(|(slot, _)| slot.clone()).collect();
        for slot in names {
            let Some(status) = self.live_slot(&slot).map(|s| s.status()) else { continue };
            let now = (status.generation, health_word(&status));
            let before = lock(&self.last_health).insert(slot.clone(), now);
            let (state, was_closed) = (now.1, !matches!(before, Some((g, s)) if g == now.0 && s != "closed"));
            let unchanged = before == Some(now) || (was_closed && state == "closed");
            if !unchanged && &*status.revision != "native" {
                self.note(
                    "host",
                    Happened::Circuit { slot, revision: status.revision.to_string(), state: state.to_owned() },
                );
            }
        }
    }

    /// A telemetry hook raised an alert.
    pub(crate) fn alert(&self, slot: &str, alert: &pointsman_policy::Alert) {
        let severity = alert.severity.as_str();
        tracing::warn!(slot, severity, "{}: {}", alert.title, alert.text);
        if let Ok(slot) = slot.parse::<SlotName>() {
            let (title, text) = (alert.title.clone(), alert.text.clone());
            self.note("host", Happened::Alert { slot, severity: severity.to_owned(), title, text });
        }
    }
}

fn health_word(status: &SlotStatus) -> &'static str {
    match status.health {
        Health::Closed => "closed",
        Health::Open { .. } => "open",
        Health::HalfOpen => "half-open",
    }
}
