//! JSON types of the admin plane. The app fills them through the ports; dashboards and the CLI read them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub mod calls;
pub mod decision;

/// A component that a slot may use.
#[derive(Clone, Debug, Serialize)]
pub struct Component {
    /// `sha256:<hex>` of the uploaded bytes.
    pub digest: String,
    /// World that it implements, as in `pointsman:policy/router@0.1.0`.
    pub world: String,
    /// Version of the WIT package that it was built against.
    pub package: String,
    /// Uploaded bytes.
    pub size: u64,
    /// Duration of the compilation; absent for one that was loaded from the cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compile_ms: Option<f64>,
    /// Whether it ships with the host.
    pub builtin: bool,
    /// Name of the key that signed it; absent for one without a good signature, and for a built-in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
    /// Its revision, once a slot has run it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it says that it does, in one line, once a slot has run it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Slots in which it is active, previous or candidate.
    pub used_by: Vec<String>,
}

/// Answer to an upload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UploadedComponent {
    /// `sha256:<hex>` of the uploaded bytes.
    pub digest: String,
    /// World that it implements.
    pub world: String,
    /// Version of the WIT package that it was built against.
    pub package: String,
    /// Uploaded bytes.
    pub size: u64,
    /// Duration of the compilation; 0 when the component was known.
    pub compile_ms: f64,
    /// Name of the key that signed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
}

/// A slot and everything about it.
#[derive(Clone, Debug, Serialize)]
pub struct Slot {
    /// `admission`, `router`, `scheduler`, `kv-retention`, `sampler`, `telemetry.<name>`.
    pub slot: String,
    /// What answers now.
    pub active: SlotRevision,
    /// What a rollback returns to.
    pub previous: Option<SlotRevision>,
    /// What a rollout is trying.
    pub candidate: Option<SlotRevision>,
    /// Whether the active revision may answer.
    pub health: Health,
    /// Of the active revision.
    pub counters: Counters,
}

/// A component with a config, published once.
#[derive(Clone, Debug, Serialize)]
pub struct SlotRevision {
    /// `name@version+digest`, or `native`.
    pub revision: String,
    /// Counter of the slot, +1 at every publish.
    pub generation: u64,
    /// Digest, or `native`.
    pub component: String,
    /// As it was given to `init`.
    pub config: Box<RawValue>,
    /// Namespace of its host-state.
    pub state_namespace: String,
    /// Its own limits, as they were given.
    #[serde(skip_serializing_if = "Budget::is_empty")]
    pub budget: Budget,
    /// Whether it might start without what the policy before it knew.
    #[serde(skip_serializing_if = "Handover::is_cold")]
    pub handover: Handover,
    /// Whether requests go on without it where it faults; of a sampler.
    #[serde(skip_serializing_if = "OnFault::is_open")]
    pub on_fault: OnFault,
    /// The limits that hold; absent for native, which has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// Whether a policy may start without what the one before it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handover {
    /// It starts cold where nothing can be handed over.
    #[default]
    Cold,
    /// It is refused then.
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

/// The limits of a policy, each with where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Time of a decision beyond which it is counted, in microseconds.
    pub soft_us: Limit,
    /// Time at which it is stopped, in milliseconds.
    pub hard_ms: Limit,
    /// Memory of an instance, in MiB.
    pub memory_mib: Limit,
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// In the unit of its name.
    pub value: u64,
    /// Who says so.
    pub from: LimitSource,
}

/// Words for [`Limit::from`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitSource {
    /// The host.
    Default,
    /// `slots.<slot>.budget` of the configuration file.
    Config,
    /// The activation.
    Slot,
}

/// State of a slot's circuit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Whether the guest is asked.
    pub state: HealthState,
    /// The last fault that mattered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When an open circuit tries again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
}

/// Words for [`Health::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthState {
    /// The guest answers.
    Closed,
    /// Too many faults: the native policy answers.
    Open,
    /// One call is being tried.
    HalfOpen,
    /// The slot has no guest.
    Native,
}

/// Counts since the revision was published.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Guest calls.
    pub calls: u64,
    /// Their mean time, in microseconds; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_mean_us: Option<f64>,
    /// Calls over the soft budget.
    pub over_soft: u64,
    /// Faults by kind: timeout, trap, memory, bad-answer, link.
    pub faults: BTreeMap<String, u64>,
    /// Decisions that the native policy took instead.
    pub fallbacks: u64,
    /// Instances that exist, in use or not.
    pub instances: u32,
    /// Its host-state, in bytes of keys and values, and the most that fits.
    pub state_bytes: u64,
    /// See `state_bytes`.
    pub state_limit_bytes: u64,
    /// A scheduler's work beside the device; absent in other slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aside: Option<Aside>,
}

/// A scheduler that is over its soft budget computes aside, and its plans are used a step late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Aside {
    /// Replicas for which it does so now.
    pub replicas: u32,
    /// Plans that were used, late.
    pub plans_used: u64,
    /// Plans that came to nothing: what they were for had passed.
    pub plans_dropped: u64,
}

/// Body of `PUT /admin/v1/slots/{slot}`; parsed by the slots handler, which names unknown members.
#[derive(Clone, Debug)]
pub struct PutSlot {
    /// Digest, `native`, or an `oci://` reference.
    pub component: String,
    /// JSON text for `init`, as the operator wrote it; `{}` when absent.
    pub config: Box<RawValue>,
    /// Refuse unless this generation is active.
    pub if_generation: Option<u64>,
    /// Namespace of its host-state; the slot's name when absent.
    pub state_namespace: Option<String>,
    /// Its own limits.
    pub budget: Budget,
    /// Whether it may start cold.
    pub handover: Handover,
    /// Whether requests go on without it.
    pub on_fault: OnFault,
    /// Prepare it and publish nothing: says what would be wrong.
    pub dry_run: bool,
}

/// Body of `POST /admin/v1/slots/{slot}/rollouts`, in parts.
#[derive(Clone, Debug)]
pub struct StartRollout {
    /// Digest, or `native`.
    pub component: String,
    /// JSON text for `init`, as the operator wrote it; `{}` when absent.
    pub config: Box<RawValue>,
    /// Namespace of its host-state; the slot's name when absent.
    pub state_namespace: Option<String>,
    /// Its own limits.
    pub budget: Budget,
    /// Whether the candidate may start cold.
    pub handover: Handover,
    /// Refuse unless this generation is active.
    pub if_generation: Option<u64>,
    /// Whether requests go on without it.
    pub on_fault: OnFault,
    /// Prepare it and start nothing: says what would be wrong.
    pub dry_run: bool,
    /// The other members: mode, steps, guards and limits, as a JSON object (docs/rollouts.md).
    pub plan: String,
}

/// Body of `POST /admin/v1/aliases/{name}/rollouts`, in parts.
#[derive(Clone, Debug)]
pub struct StartAliasRollout {
    /// The variant that is tried, as in `demo:q8_0`.
    pub candidate: String,
    /// Refuse unless the alias has this generation.
    pub if_generation: Option<u64>,
    /// Start nothing: says what would be wrong.
    pub dry_run: bool,
    /// The other members: mode, steps, guards and limits, as a JSON object (docs/rollouts.md).
    pub plan: String,
}

/// What an operator does with a rollout under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// The candidate for good, or only the next step.
    Promote {
        /// Only the next step.
        step: bool,
    },
    /// Control for good.
    Abort,
    /// Control until it is resumed.
    Pause,
    /// On from where it was.
    Resume,
}

impl Handover {
    fn is_cold(&self) -> bool {
        *self == Self::Cold
    }
}

impl OnFault {
    fn is_open(&self) -> bool {
        *self == Self::Open
    }
}

impl Budget {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Body of `PUT /admin/v1/aliases/{name}`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutAlias {
    /// Weight by variant, 0 to 10,000; one that is not named gets 0, none at all leaves the choice to the router.
    pub weights: BTreeMap<String, u32>,
    /// What stays at one variant.
    #[serde(default)]
    pub sticky: Sticky,
    /// Refuse unless this generation is active.
    pub if_generation: Option<u64>,
    /// Change nothing: says what would be wrong.
    #[serde(default)]
    pub dry_run: bool,
}

/// What stays at one variant of an alias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sticky {
    /// All requests of a tenant.
    Tenant,
    /// All requests of a session; those without one by request.
    #[default]
    Session,
    /// Each request by itself.
    Request,
}

/// The weights of an alias, from the port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weights {
    /// Counter of the alias, +1 at every change; 0 before the first.
    pub generation: u64,
    /// Weight by variant; none where the router chooses.
    pub weights: BTreeMap<String, u32>,
    /// What stays at one variant.
    pub sticky: Sticky,
    /// What is tried there now.
    pub rollout: Option<Trial>,
}

/// A rollout under way between two variants of an alias.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trial {
    /// Its id.
    pub id: String,
    /// The variant that is tried.
    pub candidate: String,
    /// Its share of the requests now; control has the others.
    pub percent: u8,
}

/// An alias and its variants.
#[derive(Clone, Debug, Serialize)]
pub struct Alias {
    /// The model's name.
    pub alias: String,
    /// Counter of the alias, +1 at every change; 0 before the first.
    pub generation: u64,
    /// What stays at one variant; null where the router chooses.
    pub sticky: Option<Sticky>,
    /// In the order in which they are listed.
    pub variants: Vec<AliasVariant>,
    /// What is tried there now; while it is, its share decides and the weights are what the alias returns to.
    pub rollout: Option<Trial>,
}

/// One variant of an alias.
#[derive(Clone, Debug, Serialize)]
pub struct AliasVariant {
    /// As in `demo:f16`.
    pub id: String,
    /// Its weight; null where the router chooses.
    pub weight: Option<u32>,
    /// Replicas that serve it; 0 for a variant that has a weight and is not loaded.
    pub replicas: usize,
}

/// Answer to a publish.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Activated {
    /// What answers now.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
    /// From the request to ready instances.
    pub warm_ms: f64,
    /// The swap itself.
    pub publish_us: f64,
    /// What the policy before it has handed over; absent for one that takes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handover: Option<HandedOver>,
}

/// What a policy was handed by the one before it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HandedOver {
    /// Instances that were handed something.
    pub restored: u32,
    /// How much that was.
    pub bytes: u64,
    /// Whose instances start cold and why, a line each.
    pub cold: Vec<String>,
}

/// Whether every slot is native by one switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SafeMode {
    /// Whether no guest answers.
    pub on: bool,
    /// Whether the host was started so; only a restart ends it then.
    pub since_start: bool,
    /// In the operator's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who switched it on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// When, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_unix_ms: Option<u64>,
}

/// Body of `POST /admin/v1/safe-mode`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutSafeMode {
    /// On or off.
    pub on: bool,
    /// Why, for the journal and for whoever looks at the slots.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A device and what it holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    /// Its index in columns and events.
    pub index: u64,
    /// As in `cpu` or `cuda:0`; an upstream's own.
    pub name: String,
    /// As the driver calls it, or where it is.
    pub description: String,
    /// `up`, `degraded` or `down`.
    pub state: String,
    /// Bytes by owner.
    pub memory: DeviceMemory,
    /// Replicas on it, in the order of their creation.
    pub replicas: Vec<DeviceReplica>,
    /// The most bytes of each KV pool, as an operator has bounded them; absent where nobody has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_pool_bound: Option<u64>,
    /// Share of about the last second in which it computed, 0 to 1: as its monitoring says, else as its replicas that take requests
    /// do, without models for embeddings; absent for upstreams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utilization: Option<f64>,
    /// Degrees Celsius; absent where nobody measures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<u32>,
    /// What it draws now; absent where nobody measures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power_watts: Option<f64>,
}

/// Memory of a device by owner, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// Model weights.
    pub weights: u64,
    /// KV pools.
    pub kv: u64,
    /// Activations and scratch.
    pub workspace: u64,
    /// KV pools, activations and scratch of draft models; absent where there are none. Their weights are those of the models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drafts: Option<u64>,
    /// Captured graphs; absent for the CPU, which has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graphs: Option<u64>,
    /// What nobody holds, this host or another process; absent where the driver's monitor does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// All that the device has; absent for the CPU where the host shares it with others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

impl DeviceMemory {
    /// What models hold of it.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.weights + self.kv + self.workspace + self.drafts.unwrap_or(0) + self.graphs.unwrap_or(0)
    }
}

/// A replica whose prefix cache was cleared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClearedReplica {
    /// As in `demo:f16@cpu`.
    pub name: String,
    /// Blocks that held a prefix.
    pub kv_blocks: u32,
}

/// Body of `PUT /admin/v1/devices/{name}/kv-pools`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundPools {
    /// Most MiB of each pool; `null` for all that it was made with.
    #[serde(deserialize_with = "Option::deserialize")]
    pub mib: Option<u64>,
}

/// One replica's part of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceReplica {
    /// As in `demo:f16@cpu`.
    pub name: String,
    /// As in `demo:f16`.
    pub variant: String,
    /// KV blocks in the pool.
    pub kv_blocks: u32,
    /// KV blocks that the pool was made with, and has again where there is room and no bound.
    pub kv_most_blocks: u32,
    /// Of those, free.
    pub kv_free_blocks: u32,
    /// Of the free ones, those that hold a prefix.
    pub kv_cached_blocks: u32,
    /// Blocks whose prefix was given up for room, in sum.
    pub kv_evicted_blocks: u64,
    /// Places of held blocks in which no token is.
    pub kv_slack_tokens: u32,
    /// Tokens looked up in the prefix cache, in sum.
    pub prefix_query_tokens: u64,
    /// Of those, found there.
    pub prefix_hit_tokens: u64,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that may run at once.
    pub running_limit: u32,
    /// Requests that wait.
    pub waiting: u32,
}

/// Body of `POST /admin/v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadModel {
    /// What it is called, as in `llama`; or `llama:v2` for another variant of a model that is served.
    pub name: String,
    /// Folder or .gguf file on the host's machine.
    pub path: String,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadProgress {
    /// Which step of it.
    pub stage: LoadStage,
    /// Bytes of weights that are packed, each time that they are: once for every precision and device.
    pub bytes: u64,
    /// All of them; 0 until the files have been read.
    pub total_bytes: u64,
    /// Of the whole, 0 to 100.
    pub percent: u8,
}

/// Steps of a load, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoadStage {
    /// Its files are opened and checked.
    Reading,
    /// Its weights are brought into the order in which the device reads them.
    Packing,
    /// Its replicas join their devices.
    Starting,
}

/// A model and what it takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// What `unload` calls it.
    pub name: String,
    /// How it is.
    pub state: ModelState,
    /// How it came.
    pub source: ModelSource,
    /// Where its files are; absent for one in the binary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What requests may call it: for a model that generates its variants, for one of embeddings its name.
    pub variants: Vec<String>,
    /// Its replicas, each with its device.
    pub replicas: Vec<ModelReplica>,
    /// How far its load is, while it is loading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<LoadProgress>,
    /// Why it is not served, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Milliseconds since its last request came; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_ms: Option<u64>,
    /// Devices that serve and cannot serve it, with the reason, as of its load.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unserved: Vec<Unserved>,
}

/// A device that cannot serve a variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unserved {
    /// As in `llama:f16`.
    pub variant: String,
    /// As in `cuda:0`.
    pub device: String,
    /// Why, and what would help.
    pub error: String,
}

/// A replica of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelReplica {
    /// As in `demo:f16@cpu`.
    pub name: String,
    /// As in `cpu`.
    pub device: String,
    /// What it took there.
    pub memory: DeviceMemory,
}

/// How a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelState {
    /// It is not served yet.
    Loading,
    /// It is served.
    Ready,
    /// It finishes what it has and takes no more.
    Draining,
    /// It is loaded on demand, and the next request for it does so.
    Unloaded,
    /// It was to be loaded, by a request or as in an earlier life of the host, and could not be.
    Failed,
}

/// How a model came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelSource {
    /// In the binary.
    Embedded,
    /// By the configuration, which brings it back at the next start.
    Configured,
    /// While a host ran; the next start loads it again.
    Loaded,
    /// By the configuration, when somebody asks for it; it goes when another needs its room.
    OnDemand,
}

/// Answer to an unload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unloaded {
    /// Which.
    pub name: String,
    /// What is served no more.
    pub variants: Vec<String>,
    /// Requests that had not ended in the time that they were given.
    pub ended: u64,
    /// How long the others took.
    pub waited_ms: u64,
    /// What it held, all devices together, and holds no more.
    pub bytes: u64,
}
