//! What the server needs from the rest of the host, as traits and plain data that it owns and the app implements.
//!
//! The server depends on the scheduler's seams and on telemetry only: it never sees wasmtime, a device thread or a file.
//! That keeps the wall testable (every handler runs against fakes) and makes each new capability a visible edit here.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};

use pointsman_sched::admit::{AdmitRequest, Judged, Load};
use pointsman_sched::ids::{Micros, ReplicaId, RequestId};
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{CancelCause, Failure, Request};
use pointsman_sched::route::{ReplicaColumns, RouteRequest, Routed};

use serde_json::value::RawValue;
use tokio::sync::{oneshot, watch};

use crate::admin::wire;
use crate::text::TextModel;
use crate::upstream::Upstream;

/// One replica as the dispatcher sees it.
#[derive(Debug)]
pub struct Replica {
    /// Unique within the process, and the number of `name` in the event stream.
    pub id: ReplicaId,
    /// Stable across restarts and hosts: hash of name, variant and device.
    pub key: u64,
    /// For headers and logs, as in `demo:f16@cpu`.
    pub name: Arc<str>,
    /// Column `replica.device`: index of the device.
    pub device: u64,
    /// Column `replica.variant`: number of the variant's name in the event stream.
    pub variant: u64,
    /// Operator's weight, 1000 = normal, 0 = drain.
    pub weight: AtomicU32,
    /// 0 ready, 1 degraded, 2 probing.
    pub health: AtomicU8,
    /// Requests that may wait, in the mailbox and in the queue; the server answers 429 beyond.
    pub max_waiting: u32,
    /// When it was loaded.
    pub started: Micros,
    /// The operator's labels by name, the same names in the same order for every replica;
    /// [`NO_LABEL`](pointsman_sched::route::NO_LABEL) for one that it has not.
    pub labels: Arc<[(Arc<str>, u64)]>,
    /// Where it is, if that is not on this host.
    pub upstream: Option<Arc<Upstream>>,
    /// Whether it can say how likely the tokens of a prompt are.
    pub scores_prompts: bool,
    /// Live load, written by the driver; of an upstream, by those who are sent there.
    pub gauges: Arc<ReplicaGauges>,
    /// Sketch of the prefix cache, written by the driver.
    pub sketch: Arc<PrefixSketch>,
}

/// Weights at one precision, with the replicas that serve them.
#[derive(Debug)]
pub struct Variant {
    /// As in `demo:f16`.
    pub id: Arc<str>,
    /// The model name for which the router chooses among variants, as in `demo`.
    pub alias: Arc<str>,
    /// Tokenizer, template and stop tokens.
    pub text: Arc<TextModel>,
    /// Longest prompt plus output, in tokens.
    pub context_tokens: u32,
    /// Tokens in a KV block: prompts are hashed by this.
    pub block_tokens: u32,
    /// The name of the model that drafts for it, on devices that can; none without.
    pub draft_model: Option<Arc<str>>,
    /// Unix seconds, for `GET /v1/models`.
    pub created: u64,
    /// At least one.
    pub replicas: Vec<Arc<Replica>>,
}

/// A model that turns texts into vectors.
#[derive(Debug)]
pub struct Encoder {
    /// What requests and metrics call it.
    pub name: Arc<str>,
    /// For headers and logs, as in `minilm@cpu`.
    pub replica: Arc<str>,
    /// Its tokenizer.
    pub text: Arc<TextModel>,
    /// Longest input, in tokens.
    pub max_tokens: u32,
    /// Numbers of a vector; none where only upstreams know.
    pub dimensions: Option<u32>,
    /// Unix seconds, for `GET /v1/models`.
    pub created: u64,
    /// Servers elsewhere that have it; empty for one of this host's own.
    pub upstreams: Vec<Elsewhere>,
}

/// An upstream that makes embeddings.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    /// For headers and logs, as in `minilm@east`.
    pub replica: Arc<str>,
    /// The server.
    pub upstream: Arc<Upstream>,
}

/// Every model that is being served. Aliases are the distinct [`Variant::alias`]es, in order of first appearance.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// In the order in which they are listed.
    pub variants: Vec<Arc<Variant>>,
    /// Models for embeddings, listed behind the others; no name is also a variant's or an alias.
    pub encoders: Vec<Arc<Encoder>>,
    /// Models that are loaded when somebody asks for them, whether they are there now or not.
    pub on_demand: Arc<[Arc<str>]>,
}

/// Inputs on their way to an encoder.
#[derive(Debug)]
pub struct EmbedJob {
    /// Its name.
    pub encoder: Arc<str>,
    /// Tokens of each input: one at least, and no more than the encoder takes.
    pub inputs: Vec<Vec<u32>>,
    /// When the request came.
    pub arrived: Micros,
    /// When nobody waits for it any more.
    pub deadline: Micros,
    /// Takes the answer; closed once nobody waits for it.
    pub reply: oneshot::Sender<Result<Embedded, Failure>>,
}

/// What an encoder answers.
#[derive(Debug)]
pub struct Embedded {
    /// One for each input.
    pub vectors: Vec<Vec<f32>>,
    /// From the request's arrival to its first batch.
    pub queued_us: Micros,
}

/// The engine side: bounded mailboxes of the device drivers.
pub trait EnginePort: Send + Sync + Debug {
    /// What is being served now.
    fn catalog(&self) -> Arc<Catalog>;

    /// Whether every driver runs; `/ready` says 503 otherwise.
    fn is_alive(&self) -> bool;

    /// Puts a request into the mailbox of a replica's driver. Never blocks. The caller has reserved on the replica's
    /// gauges; the driver releases when it takes the request, the caller when this fails.
    ///
    /// # Errors
    /// The mailbox is full or the driver is gone; the request comes back.
    fn submit(&self, replica: ReplicaId, request: Request) -> Result<(), (Box<Request>, SubmitError)>;

    /// Puts a job into the mailbox of the encoders' driver. Never blocks. Closing its reply ends it.
    ///
    /// # Errors
    /// The mailbox is full or the driver is gone.
    fn embed(&self, job: EmbedJob) -> Result<(), SubmitError>;

    /// Asks the driver to end a request. Never blocks, never fails: a request that already ended is none.
    fn cancel(&self, replica: ReplicaId, id: RequestId, cause: CancelCause);
}

/// Why a mailbox refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Full: 429.
    #[error("the replica's mailbox is full")]
    Full,
    /// The driver has stopped: 503.
    #[error("the replica is not running")]
    Stopped,
}

/// Time, as an argument of the whole server.
pub trait Clock: Send + Sync + Debug {
    /// Microseconds on the monotonic clock that every crate shares.
    fn now(&self) -> Micros;

    /// Seconds since 1970, for `created` fields.
    fn unix_seconds(&self) -> u64;

    /// Random bits, for request ids, default seeds and tie-breaks.
    fn random(&self) -> u64;
}

/// Slots, components and the journal. Calls may block (they compile, read and write files): the server runs them on its
/// blocking pool.
pub trait PolicyAdmin: Send + Sync + Debug {
    /// Validates and compiles a component or core module. `created` is false when it was known.
    fn upload(&self, upload: Upload, actor: &str) -> Result<Uploaded, AdminError>;
    /// As an upload, of what an `oci://` reference names.
    fn pull(&self, reference: &str, actor: &str) -> Result<Uploaded, AdminError>;
    /// Keeps a detached signature, raw or in base64, of a component that is here.
    fn sign_component(&self, digest: &str, signature: &[u8], actor: &str) -> Result<(), AdminError>;
    /// Built-in and uploaded components.
    fn components(&self) -> Vec<wire::Component>;
    /// Deletes an uploaded component that no slot uses.
    fn delete_component(&self, digest: &str, actor: &str) -> Result<(), AdminError>;
    /// Every slot.
    fn slots(&self) -> Vec<wire::Slot>;
    /// One slot.
    fn slot(&self, slot: &str) -> Result<wire::Slot, AdminError>;
    /// Activates a component (or `native`) with a config; a registry reference is pulled first.
    fn put_slot(&self, slot: &str, request: wire::PutSlot, actor: &str) -> Result<wire::Activated, AdminError>;
    /// Back to native; removes a telemetry slot.
    fn delete_slot(&self, slot: &str, if_generation: Option<u64>, actor: &str) -> Result<wire::Activated, AdminError>;
    /// Back to what was active before.
    fn rollback(&self, slot: &str, if_generation: Option<u64>, actor: &str) -> Result<wire::Activated, AdminError>;
    /// Starts a rollout; its report, as JSON.
    fn start_rollout(&self, slot: &str, request: wire::StartRollout, actor: &str) -> Result<Box<RawValue>, AdminError>;
    /// The report of the rollout under way in a slot, or of the last one; those before it are in the journal.
    fn rollouts(&self, slot: &str) -> Result<Vec<Box<RawValue>>, AdminError>;
    /// One report.
    fn rollout(&self, slot: &str, id: &str) -> Result<Box<RawValue>, AdminError>;
    /// Promotes, aborts, pauses or resumes; the report afterwards.
    fn steer_rollout(&self, slot: &str, id: &str, steer: wire::Steer, actor: &str)
    -> Result<Box<RawValue>, AdminError>;
    /// Whether every slot is native by one switch.
    fn safe_mode(&self) -> wire::SafeMode;
    /// Makes every slot native, or lets the policies answer again.
    fn set_safe_mode(&self, put: wire::PutSafeMode, actor: &str) -> Result<wire::SafeMode, AdminError>;
    /// Whether every request that generates is refused, because a policy that fails closed is missing. Answers at once.
    fn refuses_all(&self) -> bool;
    /// Who has a say now in what requests are answered. Answers at once; asked for each request that may be answered again.
    fn authors(&self) -> Authors;
    /// Asks the router that was active before the present one, off the path; nothing that serves is touched.
    fn ask_previous_router(&self, question: &Question<'_>) -> Result<Routed, AdminError>;
    /// The same of admission.
    fn ask_previous_admission(&self, question: &DoorQuestion<'_>) -> Result<Judged, AdminError>;
    /// What the shadow beside the router said of a request, if there is one and it was asked about that not long ago.
    fn shadow_router_said(&self, request: RequestId) -> Option<Routed>;
    /// The same of admission.
    fn shadow_admission_said(&self, request: RequestId) -> Option<Judged>;
    /// Journal lines (JSON, oldest first) with a sequence number above `after`, at most `limit`.
    fn journal(&self, after: u64, limit: usize) -> Vec<JournalLine>;
}

/// The policies that can change what a request is answered. The others change when it is, or whether.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Authors {
    /// The sampler: it says which tokens a request may get.
    pub sampler: Author,
    /// The router: it says which variant answers, where there are several.
    pub router: Author,
}

impl Authors {
    /// What matters to a request: where no router chooses among variants (`is_open`), its missteps do not.
    pub(crate) fn counting(mut self, is_open: bool) -> Self {
        if !is_open {
            self.router.mark = 0;
        }
        self
    }
}

/// Who decides in a slot. Two that are equal have decided alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Author {
    /// Its generation; none for the native policy.
    pub generation: Option<u64>,
    /// Another number after each swap, fault, and decision taken in the policy's place.
    pub mark: u64,
    /// Whether a candidate is staged beside it.
    pub is_trial: bool,
}

/// What a router once saw.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// When.
    pub now: Micros,
    /// The request.
    pub request: &'a RouteRequest<'a>,
    /// The replicas.
    pub replicas: &'a ReplicaColumns,
}

/// What an admission policy once saw.
#[derive(Clone, Copy, Debug)]
pub struct DoorQuestion<'a> {
    /// When.
    pub now: Micros,
    /// The request.
    pub request: &'a AdmitRequest<'a>,
    /// What the host carried.
    pub load: &'a Load,
}

/// A component on its way in.
#[derive(Debug)]
pub struct Upload {
    /// The component or core module.
    pub bytes: Vec<u8>,
    /// Its detached signature in base64.
    pub signature: Option<String>,
}

/// What an upload came to.
#[derive(Debug)]
pub struct Uploaded {
    /// The component.
    pub component: wire::UploadedComponent,
    /// Whether these bytes were new to the host (201) or known (200).
    pub created: bool,
}

/// One line of the journal.
#[derive(Clone, Debug)]
pub struct JournalLine {
    /// Its sequence number.
    pub sequence: u64,
    /// One JSON object without a line break.
    pub json: Arc<str>,
}

/// Which variant of an alias serves whom, and which one may.
pub trait AliasPort: Send + Sync + Debug {
    /// The variant to which a request is assigned; none where the router chooses. Called for each request of an alias.
    fn assign(&self, alias: &str, asker: &Asker<'_>) -> Option<Assigned>;

    /// The weights of an alias. May block.
    fn weights(&self, alias: &str) -> wire::Weights;

    /// Changes them; the server has checked the names. May block.
    ///
    /// # Errors
    /// A stale generation, a rollout under way, weights that cannot work, or a disk that takes no document.
    fn put_alias(&self, alias: &str, request: wire::PutAlias, actor: &str) -> Result<wire::Weights, AdminError>;

    /// Starts a rollout of a variant; its report, as JSON. The server has checked the names. This and those below may block.
    fn start_rollout(
        &self,
        alias: &str,
        request: wire::StartAliasRollout,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError>;
    /// The report of the rollout under way in an alias, or of the last one.
    fn rollouts(&self, alias: &str) -> Result<Vec<Box<RawValue>>, AdminError>;
    /// One report.
    fn rollout(&self, alias: &str, id: &str) -> Result<Box<RawValue>, AdminError>;
    /// Promotes, aborts, pauses or resumes; the report afterwards.
    fn steer_rollout(
        &self,
        alias: &str,
        id: &str,
        steer: wire::Steer,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError>;
}

/// To which variant a request is assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// As in `demo:f16`.
    pub variant: Arc<str>,
    /// Hash of what stays there: tenant, session or request.
    pub unit: u64,
    /// Whether a rollout assigned it and measures what becomes of it.
    pub is_trial: bool,
}

/// Who asks for an alias.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// Its tenant.
    pub tenant: &'a str,
    /// Hash of its session, 0 without one.
    pub session: u64,
    /// Number of the request.
    pub request: u64,
}

/// A device of this host, and whether it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Its index in columns and events.
    pub index: u64,
    /// As in `cpu` or `cuda:0`.
    pub name: String,
    /// Whether its driver runs.
    pub is_up: bool,
}

/// Models and devices.
pub trait ModelAdmin: Send + Sync + Debug {
    /// Per device, upstreams among them: memory by owner, KV pool, batch, variants. Answers at once: no device is asked for it.
    fn devices(&self) -> Vec<wire::Device>;

    /// Empties the prefix caches of a device here; what each of its replicas had. May block for a step.
    ///
    /// # Errors
    /// There is no such device, or it does not answer.
    fn clear_prefix_caches(&self, device: &str, actor: &str) -> Result<Vec<wire::ClearedReplica>, AdminError>;

    /// Gives each KV pool of a device here at most so many bytes from now on, those of models that come later too, but one full context
    /// at least; without a number all that it was made with, as far as there is room. May block for some steps.
    ///
    /// # Errors
    /// There is no such device, its pools keep their size, it refuses, or a load divides memory.
    fn bound_kv_pools(&self, device: &str, bytes: Option<u64>, actor: &str) -> Result<wire::Device, AdminError>;

    /// The devices here, in the same order. What probes ask, which anybody may send: it adds nothing up.
    fn device_states(&self) -> Vec<DeviceState>;

    /// Every model that is served, comes, goes, or was to be served and cannot be.
    fn models(&self) -> Vec<wire::Model>;

    /// Begins to load a model; how it gets on. It goes on when the reports are dropped. May block.
    ///
    /// # Errors
    /// What can be refused at once: a name that is taken, a path that is not allowed, a bound, another load under way.
    fn load(&self, load: wire::LoadModel, actor: &str) -> Result<watch::Receiver<LoadReport>, AdminError>;

    /// Gives a model no more requests, waits this long for those that it has, ends the rest and frees its memory. Blocks for as
    /// long as that takes.
    ///
    /// # Errors
    /// There is no such model, or it cannot go now; it serves as before.
    fn unload(&self, name: &str, grace_ms: u64, actor: &str) -> Result<wire::Unloaded, AdminError>;

    /// Asks for a model that is loaded on demand, for one request; begins its load where it is not there. Answers at once.
    /// `is_first`: it has not asked before.
    fn want(&self, name: &str, is_first: bool) -> Want;

    /// How the load of a model gets on, if it is under way or waits for its turn. Answers at once.
    fn loading(&self, name: &str) -> Option<watch::Receiver<LoadReport>>;

    /// Keeps a model that is loaded on demand, if it is there and nothing waits for its room. Answers at once.
    fn hold(&self, name: &str) -> Option<Lease>;

    /// How a model is that is loaded on demand. Answers at once.
    fn state(&self, name: &str) -> Option<wire::ModelState>;
}

/// Keeps a model that is loaded on demand from being given up for another, until it is dropped.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    _counted: Arc<()>,
}

impl Lease {
    /// One more of what is counted by this.
    #[must_use]
    pub fn of(counted: &Arc<()>) -> Self {
        Self { _counted: Arc::clone(counted) }
    }
}

/// What a request hears of a model that is loaded on demand.
#[derive(Clone, Debug)]
pub enum Want {
    /// It is served, and stays while the request holds this.
    Here(Lease),
    /// It is on its way, and will not be given up before the request has had it; ask again when this changes.
    Coming(Lease, watch::Receiver<()>),
    /// Its load has failed, and is not tried again before this time is over.
    Failed {
        /// In words for clients.
        why: String,
        /// That time.
        retry_after_ms: u32,
    },
}

/// How the load of a model gets on.
#[derive(Clone, Debug)]
pub enum LoadReport {
    /// Under way.
    Progress(wire::LoadProgress),
    /// It is served.
    Ready(Box<wire::Model>),
    /// It is not, and everything is as before.
    Failed(AdminError),
}

/// Where files and batches are kept: for each name a document, a content, or both. Names are made by the server: letters, digits,
/// `-` and `_`. Every call may block.
pub trait Shelf: Send + Sync + Debug {
    /// Every document, by name.
    fn documents(&self) -> io::Result<Vec<(String, Vec<u8>)>>;
    /// The size of every content, by name.
    fn contents(&self) -> io::Result<Vec<(String, u64)>>;
    /// Stores a document so that it survives a crash; on an error the old one stays.
    fn write_document(&self, name: &str, text: &[u8]) -> io::Result<()>;
    /// Appends to a content, which may begin so.
    fn append(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was appended survive a crash.
    fn sync(&self, name: &str) -> io::Result<()>;
    /// At most so many bytes of a content from a place on; none at its end, and of one that is not there.
    fn read(&self, name: &str, at: u64, most: usize) -> io::Result<Vec<u8>>;
    /// The size of a content; 0 of one that is not there.
    fn length(&self, name: &str) -> io::Result<u64>;
    /// Cuts a content to this size.
    fn cut(&self, name: &str, length: u64) -> io::Result<()>;
    /// Removes document and content; none to remove is fine.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// Why the admin plane refuses, with the HTTP status it becomes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// Class of the error.
    pub kind: AdminErrorKind,
    /// What is wrong and what to change, for the operator.
    pub message: String,
    /// The offending field or name, where there is one.
    pub param: Option<String>,
}

/// Classes of admin errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminErrorKind {
    /// 400: the request or the component is wrong.
    Invalid,
    /// 404.
    NotFound,
    /// 409: stale generation, component in use, nothing to roll back to.
    Conflict,
    /// 413.
    TooLarge,
    /// 422: the component is fine and its own `init` or probe refused.
    Refused,
    /// 429: another compilation or pull is running.
    Busy,
    /// 502: a registry did not do its part.
    Upstream,
    /// 500: the host's fault.
    Internal,
}
