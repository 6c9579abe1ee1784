//! Deployments: where the pure state machine (control), the wasm half (policy) and the data directory (store) meet.
//!
//! One change at a time: `operations` is held from planning to the stored document, so that a generation is published in
//! the order in which it was numbered. Nothing on the serving path takes a lock of this module. A failure before the
//! pointer swap leaves the old policy serving; a failure to store after it is reported, and the next start would then bring
//! the older policy back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use crossbeam_queue::ArrayQueue;
use pointsman_control::{
    ComponentRef, Deployment, Desired, Happened, Journal, PlanError, Planned, SlotName, SlotState, Target, Why,
};
use pointsman_policy::{
    ActivateError, Activation, Component, FaultKind, FaultReport, Health, Published, RouterSlot, Runtime,
    SchedulerSlot, Slot, SlotStatus, TelemetrySlot, UploadError, World,
};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, AdminErrorKind, JournalLine, PolicyAdmin, Uploaded};
use pointsman_telemetry::{Event, EventKind, Metrics, Recorder};

use crate::builtin::BUILTINS;
use crate::clock::SystemClock;
use crate::config::{Config, SlotSection};
use crate::store::Store;

/// Entries of the journal that the admin API can read back.
const JOURNAL_ENTRIES: usize = 4_096;
/// Faults that wait for the observer thread to journal them; the oldest give way (metrics count them all).
const PENDING_FAULTS: usize = 256;
/// Most uploaded components on disk.
const MAX_COMPONENTS: usize = 256;

/// The telemetry hooks by slot.
pub(crate) type TelemetrySlots = BTreeMap<String, Arc<TelemetrySlot>>;

/// Every slot of the host and what is needed to change one.
#[derive(Debug)]
pub(crate) struct Deploy {
    runtime: Runtime,
    store: Arc<Store>,
    clock: Arc<SystemClock>,
    metrics: Arc<Metrics>,
    recorder: Recorder,
    safe_mode: bool,
    operations: Mutex<()>,
    state: Mutex<Deployment>,
    journal: Mutex<Journal>,
    components: Mutex<BTreeMap<String, Known>>,
    faults: FaultQueue,
    last_health: Mutex<BTreeMap<SlotName, &'static str>>,
    /// Chooses replicas.
    pub router: Arc<RouterSlot>,
    /// Orders steps; each replica's driver attaches to it.
    pub scheduler: Arc<SchedulerSlot>,
    /// Watch events; read by the observer thread.
    pub telemetry: ArcSwap<TelemetrySlots>,
}

/// A component that the host knows.
#[derive(Clone, Debug)]
struct Known {
    builtin: Option<&'static str>,
    /// Set once it was validated and compiled in this life of the host.
    component: Option<Component>,
    /// What it calls itself, once it ran.
    revision: Option<String>,
    world: World,
    package: String,
    size: u64,
}

/// What the deployments share with the rest of the host.
#[derive(Clone, Debug)]
pub(crate) struct HostParts {
    /// The clock.
    pub clock: Arc<SystemClock>,
    /// Metric families.
    pub metrics: Arc<Metrics>,
    /// The event ring.
    pub recorder: Recorder,
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === start ===

impl Deploy {
    /// Wires the slots to their runtime. Every slot is native until [`Deploy::start`].
    pub(crate) fn new(runtime: Runtime, store: Arc<Store>, parts: HostParts, safe_mode: bool) -> Arc<Self> {
        let mut journal = Journal::new(JOURNAL_ENTRIES, 0);
        journal.restore(store.journal_tail());
        Arc::new(Self {
            router: runtime.router_slot("router"),
            scheduler: runtime.scheduler_slot("scheduler"),
            telemetry: ArcSwap::default(),
            store,
            clock: parts.clock,
            metrics: parts.metrics,
            recorder: parts.recorder,
            safe_mode,
            operations: Mutex::default(),
            state: Mutex::default(),
            journal: Mutex::new(journal),
            components: Mutex::default(),
            faults: parts.faults,
            last_health: Mutex::default(),
            runtime,
        })
    }

    /// Publishes what the stored documents say, and what the configuration names for slots without one. A policy that
    /// cannot be brought back leaves its slot native and is reported: the host serves either way.
    pub(crate) fn start(&self, config: &Config) {
        self.find_components();
        let _one = lock(&self.operations);
        if self.safe_mode {
            tracing::warn!("safe mode: native policies only; stored deployments are left as they are");
            return;
        }
        for document in self.store.slot_documents() {
            let slot = document.slot.clone();
            let active = document.active.clone();
            let removed = document.removed;
            lock(&self.state).restore(document);
            if !removed {
                self.bring_back(&slot, &active);
                self.compare_with_config(&slot, &active, config);
            }
        }
        for (name, section) in &config.slots {
            match name.parse::<SlotName>() {
                Ok(slot) if self.store.knows(&slot) => {}
                Ok(slot) => self.start_fresh(slot, section),
                Err(error) => tracing::error!("configuration, slots: {error}"),
            }
        }
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
                    let known = Known {
                        builtin,
                        component: None,
                        revision: None,
                        world: found.world,
                        package: found.package.to_string(),
                        size: bytes.len() as u64,
                    };
                    components.insert(found.digest.to_string(), known);
                }
                Err(error) => tracing::error!("a stored component is no longer accepted: {error}"),
            }
        }
    }

    /// Publishes a stored policy again, under its own generation.
    fn bring_back(&self, slot: &SlotName, active: &Target) {
        let desired = Desired {
            component: active.component.clone(),
            config: active.config.clone(),
            state_namespace: active.state_namespace.clone(),
            if_generation: None,
        };
        let planned = Planned { slot: slot.clone(), desired, generation: active.generation };
        if let Err(error) = self.prepare_and_publish(&planned) {
            tracing::error!(%slot, "the stored policy {} cannot be brought back, native serves: {error}", active.revision);
            let what =
                Happened::Refused { slot: slot.clone(), component: active.component.to_string(), error: error.message };
            self.note("startup", what);
        }
    }

    fn compare_with_config(&self, slot: &SlotName, active: &Target, config: &Config) {
        let Some(section) = config.slots.get(&slot.to_string()) else { return };
        let configured = self.resolve(&section.component).unwrap_or(ComponentRef::Digest(section.component.clone()));
        if configured != active.component {
            let (configured, stored) = (section.component.clone(), active.revision.clone());
            tracing::warn!(%slot, "the configuration names {configured}, the stored deployment {stored}; the stored one serves");
            self.note("startup", Happened::Differs { slot: slot.clone(), configured, stored });
        }
    }

    fn start_fresh(&self, slot: SlotName, section: &SlotSection) {
        let config = serde_json::to_string(&section.config).unwrap_or_else(|_| "{}".into());
        let started = self.resolve(&section.component).and_then(|component| {
            let desired = Desired { component, config, state_namespace: None, if_generation: None };
            self.activate(slot.clone(), desired, "startup", Why::Start)
        });
        if let Err(error) = started {
            tracing::error!(%slot, "{} from the configuration cannot start, native serves: {error}", section.component);
        }
    }

    /// A component from a configuration: a built-in's name, a digest, a path or `native`.
    fn resolve(&self, name: &str) -> Result<ComponentRef, AdminError> {
        if name == "native" {
            return Ok(ComponentRef::Native);
        }
        let builtin = lock(&self.components).iter().find(|(_, k)| k.builtin == Some(name)).map(|(d, _)| d.clone());
        if let Some(digest) = builtin {
            return Ok(ComponentRef::Digest(digest));
        }
        if name.starts_with("sha256:") {
            return Ok(ComponentRef::Digest(name.to_owned()));
        }
        let bytes =
            std::fs::read(name).map_err(|e| not_found(format!("no built-in component and no file `{name}`: {e}")))?;
        Ok(ComponentRef::Digest(self.upload(bytes, "startup")?.component.digest))
    }
}

// === activation ===

impl Deploy {
    /// Plans, prepares, publishes and stores. The caller holds `operations`.
    fn activate(&self, slot: SlotName, desired: Desired, actor: &str, why: Why) -> Result<wire::Activated, AdminError> {
        let planned = lock(&self.state).plan(slot, desired).map_err(plan_error)?;
        self.carry_out(planned, actor, why)
    }

    fn carry_out(&self, planned: Planned, actor: &str, why: Why) -> Result<wire::Activated, AdminError> {
        let slot = planned.slot.clone();
        if self.safe_mode {
            return Err(conflict(
                "the host runs in safe mode: native policies only; restart it without --safe-mode".into(),
            ));
        }
        let published = self.prepare_and_publish(&planned).inspect_err(|error| {
            let (component, error) = (planned.desired.component.to_string(), error.message.clone());
            self.note(actor, Happened::Refused { slot: slot.clone(), component, error });
        })?;
        let (document, retired) = {
            let mut state = lock(&self.state);
            let retired = state.slot(&slot).and_then(|s| s.previous.as_ref()).map(|p| p.revision.clone());
            (state.published(planned, published.revision.to_string()), retired)
        };
        let stored = self.store.write_slot(&document);
        let before = document.previous.map(|p| p.revision);
        let keep = [Some(document.active.revision.as_str()), before.as_deref()];
        self.forget_retired(&slot, keep, retired.as_slice());
        self.note(actor, Happened::Published { slot: slot.clone(), target: document.active, before, why });
        stored.map_err(|e| {
            internal(format!(
                "`{slot}` now runs {}, but that could not be stored and a restart would undo it: {e}",
                published.revision
            ))
        })?;
        Ok(wire::Activated {
            revision: published.revision.to_string(),
            generation: published.generation,
            warm_ms: published.warm_ms,
            publish_us: published.publish_us,
        })
    }

    /// Everything up to and including the pointer swap; changes no document.
    fn prepare_and_publish(&self, planned: &Planned) -> Result<Published, AdminError> {
        let Planned { slot, desired, generation } = planned;
        let target = self.slot_for_publish(slot);
        let published = match &desired.component {
            ComponentRef::Native => target.publish_native(*generation),
            ComponentRef::Digest(digest) => {
                let component = self.compiled(digest, slot)?;
                let activation = Activation {
                    slot: slot.to_string(),
                    generation: *generation,
                    config: desired.config.clone(),
                    namespace: desired.state_namespace.clone(),
                };
                let prepared = self.runtime.prepare(&component, activation).map_err(activate_error)?;
                target.publish(prepared)
            }
        };
        let published = published.map_err(|e| internal(e.to_string()))?;
        let now = self.clock.micros();
        let nanos = (published.publish_us * 1e3) as u64;
        self.metrics.published(&slot.to_string(), *generation, published.publish_us * 1e-6);
        self.recorder.record(Event {
            a: *generation,
            b: nanos,
            generation: *generation,
            ..Event::new(now, EventKind::Swap)
        });
        if let ComponentRef::Digest(digest) = &desired.component
            && let Some(known) = lock(&self.components).get_mut(digest)
        {
            known.revision = Some(published.revision.to_string());
        }
        Ok(published)
    }

    /// A component that fits the slot, validated and compiled now if it has not been in this life of the host.
    fn compiled(&self, digest: &str, slot: &SlotName) -> Result<Component, AdminError> {
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
        if let Some(component) = known.component {
            return Ok(component);
        }
        let bytes = match known.builtin.and_then(|name| BUILTINS.iter().find(|b| b.name == name)) {
            Some(builtin) => builtin.bytes.to_vec(),
            None => self
                .store
                .read_component(digest)
                .map_err(|e| internal(format!("the bytes of {digest} are gone: {e}")))?,
        };
        let component = self.runtime.admit(&bytes).map_err(upload_error)?;
        // A built-in of today may be gone from the next version of the host: keep what a document names.
        self.store.write_component(digest, &bytes).map_err(|e| internal(format!("cannot keep {digest}: {e}")))?;
        if let Some(known) = lock(&self.components).get_mut(digest) {
            known.component = Some(component.clone());
        }
        Ok(component)
    }

    fn live_slot(&self, slot: &SlotName) -> Option<Arc<dyn Slot>> {
        match slot {
            SlotName::Router => Some(Arc::clone(&self.router) as Arc<dyn Slot>),
            SlotName::Scheduler => Some(Arc::clone(&self.scheduler) as Arc<dyn Slot>),
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
    fn drop_telemetry(&self, slot: &SlotName) {
        let mut slots = TelemetrySlots::clone(&self.telemetry.load());
        slots.remove(&slot.to_string());
        self.telemetry.store(Arc::new(slots));
    }

    /// Removes the series of every revision of a slot that is neither active nor previous any more.
    fn forget_retired(&self, slot: &SlotName, keep: [Option<&str>; 2], candidates: &[String]) {
        for revision in candidates.iter().filter(|r| !keep.contains(&Some(r.as_str()))) {
            self.metrics.forget_revision(&slot.to_string(), revision);
        }
    }

    /// Numbers an event, keeps it and appends it to the journal file.
    fn note(&self, actor: &str, what: Happened) {
        // Held while the line is written, so that the file has the order of the numbers.
        let mut journal = lock(&self.journal);
        let (_, line) = journal.append(self.clock.unix_millis(), actor, what);
        self.store.append_journal(&line);
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
            let state = health_word(&status);
            let before = lock(&self.last_health).insert(slot.clone(), state);
            if before.is_some_and(|before| before != state) && !status.revision.starts_with("native") {
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
        self.metrics.alert(severity, slot);
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

// === the admin port ===

impl PolicyAdmin for Deploy {
    fn upload(&self, bytes: Vec<u8>, actor: &str) -> Result<Uploaded, AdminError> {
        let component = self.runtime.admit(&bytes).map_err(upload_error)?;
        let digest = component.digest.to_string();
        let (world, package, size) = (component.world, component.package.to_string(), component.size);
        let mut components = lock(&self.components);
        let created = !components.contains_key(&digest);
        if created && components.values().filter(|k| k.builtin.is_none()).count() >= MAX_COMPONENTS {
            return Err(conflict(format!("{MAX_COMPONENTS} components are stored already; delete one first")));
        }
        let compile_ms = if component.cached { 0.0 } else { component.compile_ms };
        let fresh = || Known { builtin: None, component: None, revision: None, world, package: package.clone(), size };
        components.entry(digest.clone()).or_insert_with(fresh).component = Some(component);
        drop(components);
        if created {
            self.store
                .write_component(&digest, &bytes)
                .map_err(|e| internal(format!("the component cannot be stored: {e}")))?;
            self.note(actor, Happened::Uploaded { digest: digest.clone(), world: world.to_string(), size });
        }
        let component = wire::UploadedComponent { digest, world: world.to_string(), package, size, compile_ms };
        Ok(Uploaded { component, created })
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
            name: known.revision.or(known.builtin.map(str::to_owned)),
        };
        let mut listed: Vec<wire::Component> = known.into_iter().map(view).collect();
        listed.sort_by(|a, b| (!a.builtin, &a.name, &a.digest).cmp(&(!b.builtin, &b.name, &b.digest)));
        listed
    }

    fn delete_component(&self, digest: &str, actor: &str) -> Result<(), AdminError> {
        let _one = lock(&self.operations);
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
            return Err(conflict(format!(
                "{digest} is active or previous in {}; activate something else there first",
                used.join(", ")
            )));
        }
        lock(&self.components).remove(digest);
        self.store.delete_component(digest).map_err(|e| internal(format!("the file cannot be removed: {e}")))?;
        self.note(actor, Happened::Deleted { digest: digest.to_owned() });
        Ok(())
    }

    fn slots(&self) -> Vec<wire::Slot> {
        let state = lock(&self.state).clone();
        let fixed = [SlotName::Router, SlotName::Scheduler];
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
        let wire::PutSlot { component, config, if_generation, state_namespace } = request;
        let desired =
            Desired { component: component.into(), config: config.get().to_owned(), state_namespace, if_generation };
        let _one = lock(&self.operations);
        self.activate(slot, desired, actor, Why::Put)
    }

    fn delete_slot(&self, slot: &str, actor: &str) -> Result<wire::Activated, AdminError> {
        let slot = parse_slot(slot)?;
        let _one = lock(&self.operations);
        if !matches!(slot, SlotName::Telemetry(_)) {
            return self.activate(slot, native(), actor, Why::Delete);
        }
        let document = lock(&self.state).removed(&slot).map_err(plan_error)?;
        self.drop_telemetry(&slot);
        self.store.write_slot(&document).map_err(|e| internal(format!("the removal could not be stored: {e}")))?;
        self.note(actor, Happened::Removed { slot: slot.clone() });
        self.forget_retired(&slot, [None, None], &[document.active.revision]);
        Ok(wire::Activated {
            revision: "native".into(),
            generation: document.active.generation,
            warm_ms: 0.0,
            publish_us: 0.0,
        })
    }

    fn rollback(&self, slot: &str, actor: &str) -> Result<wire::Activated, AdminError> {
        let slot = parse_slot(slot)?;
        let _one = lock(&self.operations);
        let planned = lock(&self.state).plan_rollback(&slot).map_err(plan_error)?;
        self.carry_out(planned, actor, Why::Rollback)
    }

    fn journal(&self, after: u64, limit: usize) -> Vec<JournalLine> {
        let journal = lock(&self.journal);
        journal.after(after, limit).map(|e| JournalLine { sequence: e.sequence, json: e.to_json().into() }).collect()
    }
}

impl Deploy {
    fn view(&self, slot: &SlotName, state: Option<&SlotState>) -> wire::Slot {
        let status = self.live_slot(slot).map(|s| s.status());
        let native = Target {
            component: ComponentRef::Native,
            config: "{}".into(),
            state_namespace: None,
            revision: "native".into(),
            generation: 0,
        };
        wire::Slot {
            slot: slot.to_string(),
            active: revision_view(slot, state.map_or(&native, |s| &s.active)),
            previous: state.and_then(|s| s.previous.as_ref()).map(|p| revision_view(slot, p)),
            candidate: None,
            health: status.as_ref().map_or_else(native_health, |s| self.health(s)),
            counters: status.map(|s| counters(&s)).unwrap_or_default(),
        }
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

fn counters(status: &SlotStatus) -> wire::Counters {
    let faults = FaultKind::ALL.iter().zip(status.faults).filter(|(_, n)| *n > 0);
    wire::Counters {
        calls: status.calls,
        faults: faults.map(|(kind, n)| (kind.as_str().to_owned(), n)).collect(),
        fallbacks: status.fallbacks,
    }
}

fn revision_view(slot: &SlotName, target: &Target) -> wire::SlotRevision {
    wire::SlotRevision {
        revision: target.revision.clone(),
        generation: target.generation,
        component: target.component.to_string(),
        config: serde_json::value::RawValue::from_string(target.config.clone()).unwrap_or_default(),
        state_namespace: target.state_namespace.clone().unwrap_or_else(|| slot.to_string()),
    }
}

fn native() -> Desired {
    Desired { component: ComponentRef::Native, config: "{}".into(), state_namespace: None, if_generation: None }
}

fn parse_slot(slot: &str) -> Result<SlotName, AdminError> {
    slot.parse().map_err(|error: pointsman_control::SlotNameError| AdminError {
        param: Some("slot".into()),
        ..not_found(error.to_string())
    })
}

// === errors ===

fn admin_error(kind: AdminErrorKind, message: String) -> AdminError {
    AdminError { kind, message, param: None }
}

fn invalid(message: String) -> AdminError {
    admin_error(AdminErrorKind::Invalid, message)
}

fn not_found(message: String) -> AdminError {
    admin_error(AdminErrorKind::NotFound, message)
}

fn conflict(message: String) -> AdminError {
    admin_error(AdminErrorKind::Conflict, message)
}

fn internal(message: String) -> AdminError {
    admin_error(AdminErrorKind::Internal, message)
}

fn plan_error(error: PlanError) -> AdminError {
    let kind = match &error {
        PlanError::NoSlot(_) => AdminErrorKind::NotFound,
        PlanError::Stale { .. } | PlanError::NothingBefore(_) | PlanError::TooManySlots { .. } => {
            AdminErrorKind::Conflict
        }
    };
    admin_error(kind, error.to_string())
}

fn upload_error(error: UploadError) -> AdminError {
    let kind = match &error {
        UploadError::TooLarge { .. } => AdminErrorKind::TooLarge,
        error if error.is_busy() => AdminErrorKind::Busy,
        error if error.is_host_fault() => AdminErrorKind::Internal,
        _ => AdminErrorKind::Invalid,
    };
    admin_error(kind, error.to_string())
}

fn activate_error(error: ActivateError) -> AdminError {
    let (kind, param) = match &error {
        ActivateError::UnknownSlot { .. } => (AdminErrorKind::NotFound, "slot"),
        ActivateError::WrongWorld { .. } => (AdminErrorKind::Invalid, "component"),
        ActivateError::ConfigTooLarge { .. } => (AdminErrorKind::TooLarge, "config"),
        ActivateError::Refused { .. } => (AdminErrorKind::Refused, "config"),
        ActivateError::NoNamespace => (AdminErrorKind::Conflict, "state_namespace"),
        _ => (AdminErrorKind::Refused, "component"),
    };
    AdminError { param: Some(param.into()), ..admin_error(kind, error.to_string()) }
}
