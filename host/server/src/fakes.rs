//! Fakes of every port, and a small HTTP client, for the crate's tests: no socket, no thread, no engine.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use axum::Router;
use axum::body::Body;
use axum::http::{Request as HttpRequest, Response};
use http_body_util::BodyExt;
use pointsman_sched::admit::{AdmitPolicy, AdmitRequest, Ending, Judged, Load, Verdict};
use pointsman_sched::ids::{Micros, Priority, ReplicaId, RequestId};
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{CancelCause, Drafted, Failure, FinishReason, Request, SinkEvent, SinkState};
use pointsman_sched::route::{Choice, DecidedBy, Fallback, ReplicaColumns, RoutePolicy, RouteRequest, Routed};
use pointsman_telemetry::{Metrics, Names, Recorder};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::admin::wire;
use crate::ports::{
    AdminError, AdminErrorKind, AliasPort, Asker, Assigned, Authors, Catalog, Clock, DeviceState, DoorQuestion,
    EmbedJob, Embedded, Encoder, EnginePort, JournalLine, Lease, LoadReport, ModelAdmin, PolicyAdmin, Question,
    Replica, Shelf, SubmitError, Upload, Uploaded, Variant, Want,
};
use crate::record::Taps;
use crate::text::TextModel;
use crate::{ApiKey, KeyDigest, KeyLimits, ServerConfig, ServerParts, ServerState, admin_router, data_router};

/// What the fake engine does with the next request.
#[derive(Debug)]
pub(crate) enum Play {
    /// Pushes these events while the request is being submitted.
    Now(Vec<SinkEvent>),
    /// Keeps the request for [`FakeEngine::push`].
    Hold,
    Refuse(SubmitError),
}

#[derive(Debug, Default)]
pub(crate) struct FakeEngine {
    catalog: Mutex<Arc<Catalog>>,
    plays: Mutex<VecDeque<Play>>,
    held: Mutex<HashMap<RequestId, Request>>,
    /// Every request that was taken, without its sink.
    pub(crate) taken: Mutex<Vec<Taken>>,
    pub(crate) cancels: Mutex<Vec<(ReplicaId, RequestId, CancelCause)>>,
    /// Jobs that were taken and have no answer yet; the others were answered at once.
    pub(crate) jobs: Mutex<Vec<EmbedJob>>,
    /// Whether it takes requests out of its mailboxes, as drivers do; what stays there counts against the next.
    pub(crate) takes: AtomicBool,
    /// What becomes of the next job.
    pub(crate) embeds: Mutex<VecDeque<EmbedPlay>>,
    /// Whether its drivers have ended.
    pub(crate) is_gone: AtomicBool,
}

/// What the fake engine does with the next embedding; without a word it answers.
#[derive(Debug)]
pub(crate) enum EmbedPlay {
    /// Keeps the job.
    Hold,
    Refuse(SubmitError),
    Fail(Failure),
}

/// What a test wants to know of a submitted request.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) replica: ReplicaId,
    pub(crate) id: RequestId,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) n_hashes: usize,
    pub(crate) max_new_tokens: u32,
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) seed: u64,
    pub(crate) prompt_logprobs: Option<u8>,
    pub(crate) priority: u8,
    pub(crate) deadline: Micros,
    pub(crate) router_generation: u64,
}

/// Tenant, asked and highest priority, prompt and new tokens of a question.
pub(crate) type DoorCall = (String, Priority, Priority, u32, u32);

/// An admission policy that always says the same.
#[derive(Debug, Default)]
pub(crate) struct FakeDoor {
    pub(crate) native: AtomicBool,
    pub(crate) verdict: Mutex<Option<Verdict>>,
    pub(crate) asked: Mutex<Vec<DoorCall>>,
    pub(crate) loads: Mutex<Vec<Load>>,
    pub(crate) endings: Mutex<Vec<Ending>>,
    /// Generation of the shadow that is asked too.
    pub(crate) shadow: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct FakeRouter {
    pub(crate) choice: Mutex<Choice>,
    pub(crate) calls: Mutex<Vec<RouterCall>>,
}

/// Tenant, session, attributes and columns of a call.
pub(crate) type RouterCall = (String, u64, Vec<(String, String)>, ReplicaColumns);

/// Files and batches in memory.
#[derive(Debug, Default)]
pub(crate) struct FakeShelf {
    documents: Mutex<BTreeMap<String, Vec<u8>>>,
    contents: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Whether it takes nothing.
    pub(crate) is_full: AtomicBool,
    /// Whether it does not even cut anything off.
    pub(crate) is_stuck: AtomicBool,
    /// Readers that panic.
    pub(crate) panics: AtomicU32,
    /// Which read from now on fails; 0 for none.
    pub(crate) fails_at: AtomicU32,
}

#[derive(Debug, Default)]
pub(crate) struct FakeClock {
    pub(crate) now: AtomicU64,
    /// Seconds since the epoch of the tests.
    pub(crate) later: AtomicU64,
    random: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct FakeAdmin {
    pub(crate) journal: Mutex<Vec<JournalLine>>,
    pub(crate) weights: Mutex<wire::Weights>,
    pub(crate) refuses_all: AtomicBool,
    pub(crate) authors: Mutex<Authors>,
    /// Uploads and activations wait here.
    pub(crate) gate: Gate,
    /// How the next load gets on; without it the name is taken.
    pub(crate) loads: Mutex<Option<watch::Receiver<LoadReport>>>,
    /// What requests for a model that is loaded on demand hear.
    pub(crate) wants: Mutex<VecDeque<Want>>,
    /// Whether its device is gone, and a model could not be brought back.
    pub(crate) is_degraded: AtomicBool,
    /// How often somebody has asked what its devices hold.
    pub(crate) n_reports: AtomicUsize,
    /// Models that are there on demand, and what counts who has them.
    pub(crate) held: Mutex<HashMap<String, Arc<()>>>,
}

/// Open until a test closes it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    /// Calls that have come to it.
    pub(crate) arrived: AtomicUsize,
}

/// Everything a test holds.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) door: Arc<FakeDoor>,
    pub(crate) router: Arc<FakeRouter>,
    pub(crate) clock: Arc<FakeClock>,
    pub(crate) admin: Arc<FakeAdmin>,
    pub(crate) state: Arc<ServerState>,
}

/// A response, read whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: axum::http::HeaderMap,
    pub(crate) body: String,
}

impl Gate {
    pub(crate) fn close(&self) {
        *self.closed.lock().expect("unpoisoned") = true;
    }

    pub(crate) fn open(&self) {
        *self.closed.lock().expect("unpoisoned") = false;
        self.opened.notify_all();
    }

    fn pass(&self) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let closed = self.closed.lock().expect("unpoisoned");
        drop(self.opened.wait_while(closed, |closed| *closed).expect("unpoisoned"));
    }
}

impl AdmitPolicy for FakeDoor {
    fn is_native(&self) -> bool {
        self.native.load(Ordering::Relaxed)
    }

    fn admit(&self, _now: Micros, request: &AdmitRequest<'_>, load: &Load) -> Judged {
        let AdmitRequest { tenant, priority, highest, prompt_tokens, max_new_tokens, .. } = *request;
        let asked = (tenant.to_owned(), priority, highest, prompt_tokens, max_new_tokens);
        self.asked.lock().expect("unpoisoned").push(asked);
        self.loads.lock().expect("unpoisoned").push(*load);
        let verdict = self.verdict.lock().expect("unpoisoned").clone();
        let fallback = verdict.is_none().then_some(Fallback::Fault("trap"));
        let decided_by = DecidedBy { revision: "d@1+0000".into(), generation: 9 };
        let shadow = self.shadow.load(Ordering::Relaxed);
        Judged { verdict, state: 4, fallback, shadow, ..Judged::native(decided_by) }
    }

    fn ended(&self, ending: Ending) {
        self.endings.lock().expect("unpoisoned").push(ending);
    }
}

// === impl FakeEngine ===

impl FakeEngine {
    pub(crate) fn play(&self, plays: impl IntoIterator<Item = Play>) {
        self.plays.lock().expect("unpoisoned").extend(plays);
    }

    /// Answers whatever comes from now on.
    pub(crate) fn forget_plays(&self) {
        self.plays.lock().expect("unpoisoned").clear();
    }

    /// Pushes an event into a held request's sink.
    pub(crate) fn push(&self, id: RequestId, event: SinkEvent) -> SinkState {
        self.held.lock().expect("unpoisoned").get_mut(&id).expect("held").sink.push(event)
    }

    /// Drops a held request, as a driver does that has ended it.
    pub(crate) fn forget(&self, id: RequestId) {
        self.held.lock().expect("unpoisoned").remove(&id);
    }

    pub(crate) fn last_id(&self) -> RequestId {
        self.taken.lock().expect("unpoisoned").last().expect("a request was taken").id
    }

    pub(crate) fn unload(&self) {
        *self.catalog.lock().expect("unpoisoned") = Arc::default();
    }

    /// Serves texts alone.
    pub(crate) fn forget_encoders(&self) {
        let mut catalog = self.catalog.lock().expect("unpoisoned");
        *catalog = Arc::new(Catalog { encoders: Vec::new(), ..Catalog::clone(&catalog) });
    }

    /// Makes these models known; those of a variant are served.
    pub(crate) fn know(&self, names: &[&str]) {
        let mut catalog = self.catalog.lock().expect("unpoisoned");
        let on_demand = names.iter().map(|&name| name.into()).collect();
        *catalog = Arc::new(Catalog { on_demand, ..Catalog::clone(&catalog) });
    }
}

impl EnginePort for FakeEngine {
    fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.catalog.lock().expect("unpoisoned"))
    }

    fn is_alive(&self) -> bool {
        !self.is_gone.load(Ordering::Relaxed)
    }

    fn submit(&self, replica: ReplicaId, mut request: Request) -> Result<(), (Box<Request>, SubmitError)> {
        let play = self.plays.lock().expect("unpoisoned").pop_front().unwrap_or_else(|| Play::Now(says(&["hello"])));
        let taken = Taken {
            replica,
            id: request.id,
            prompt: Arc::clone(&request.prompt),
            n_hashes: request.block_hashes.len(),
            max_new_tokens: request.max_new_tokens,
            stop_tokens: Arc::clone(&request.stop_tokens),
            seed: request.sampling.seed,
            prompt_logprobs: request.sampling.prompt_logprobs,
            priority: request.priority as u8,
            deadline: request.deadline,
            router_generation: request.router_generation,
        };
        match play {
            Play::Refuse(error) => return Err((Box::new(request), error)),
            Play::Now(events) => {
                for event in events {
                    if request.sink.push(event) == SinkState::Closed {
                        break;
                    }
                }
            }
            Play::Hold => {
                self.held.lock().expect("unpoisoned").insert(request.id, request);
            }
        }
        if self.takes.load(Ordering::Relaxed) {
            let replicas = self.catalog().variants.iter().flat_map(|v| v.replicas.clone()).collect::<Vec<_>>();
            let taker = replicas.iter().find(|found| found.id == replica).expect("a replica");
            taker.gauges.release(u32::try_from(taken.prompt.len()).expect("small"));
        }
        self.taken.lock().expect("unpoisoned").push(taken);
        Ok(())
    }

    /// A vector is its first token, its length and two numbers.
    fn embed(&self, job: EmbedJob) -> Result<(), SubmitError> {
        let vector = |tokens: &Vec<u32>| vec![tokens[0] as f32, tokens.len() as f32, 0.1, -2.0];
        match self.embeds.lock().expect("unpoisoned").pop_front() {
            Some(EmbedPlay::Refuse(error)) => return Err(error),
            Some(EmbedPlay::Hold) => self.jobs.lock().expect("unpoisoned").push(job),
            Some(EmbedPlay::Fail(failure)) => drop(job.reply.send(Err(failure))),
            None => {
                let vectors = job.inputs.iter().map(vector).collect();
                drop(job.reply.send(Ok(Embedded { vectors, queued_us: 7 })));
            }
        }
        Ok(())
    }

    fn cancel(&self, replica: ReplicaId, id: RequestId, cause: CancelCause) {
        self.cancels.lock().expect("unpoisoned").push((replica, id, cause));
    }
}

/// Token ids of a text in the test tokenizer, byte by byte.
pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(|b| u32::from(b) + 3).collect()
}

pub(crate) fn token(id: u32) -> SinkEvent {
    SinkEvent::Token { token: id, logprobs: None, drafted: Drafted::default() }
}

/// Events of a generation that says these texts, one token per byte, and stops.
pub(crate) fn says(texts: &[&str]) -> Vec<SinkEvent> {
    let started = SinkEvent::Started { queued_us: 5, cached_tokens: 2 };
    let tokens = texts.iter().flat_map(|text| bytes(text)).map(token);
    std::iter::once(started).chain(tokens).chain([SinkEvent::Finished(FinishReason::Stop(1))]).collect()
}

// === impl FakeRouter, FakeClock, FakeAdmin ===

impl RoutePolicy for FakeRouter {
    fn route(&self, _now: Micros, request: &RouteRequest<'_>, replicas: &ReplicaColumns) -> Routed {
        let attributes = request.attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let call = (request.tenant.to_owned(), request.session, attributes, replicas.clone());
        self.calls.lock().expect("unpoisoned").push(call);
        let choice = self.choice.lock().expect("unpoisoned").clone();
        Routed { choice, decided_by: DecidedBy { revision: "r@1+0000".into(), generation: 7 }, fallback: None }
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Micros {
        self.now.load(Ordering::Relaxed) + 1
    }

    fn unix_seconds(&self) -> u64 {
        1_700_000_000 + self.later.load(Ordering::Relaxed)
    }

    fn random(&self) -> u64 {
        self.random.fetch_add(1, Ordering::Relaxed)
    }
}

fn raw(value: &serde_json::Value) -> Box<RawValue> {
    RawValue::from_string(value.to_string()).expect("JSON")
}

fn refused(kind: AdminErrorKind, message: &str) -> AdminError {
    AdminError { kind, message: message.into(), param: None }
}

impl PolicyAdmin for FakeAdmin {
    fn upload(&self, upload: Upload, _actor: &str) -> Result<Uploaded, AdminError> {
        self.gate.pass();
        let Upload { bytes, signature } = upload;
        if !bytes.starts_with(b"\0asm") {
            return Err(refused(AdminErrorKind::Invalid, "not a component"));
        }
        let component = wire::UploadedComponent {
            digest: "sha256:00".into(),
            world: "router".into(),
            package: "0.1.0".into(),
            size: bytes.len() as u64,
            compile_ms: 1.5,
            signed_by: signature,
        };
        Ok(Uploaded { component, created: bytes.len() == 8 })
    }

    fn pull(&self, reference: &str, actor: &str) -> Result<Uploaded, AdminError> {
        match reference {
            "oci://host/r" => self.upload(Upload { bytes: b"\0asm".to_vec(), signature: None }, actor),
            _ => Err(refused(AdminErrorKind::Upstream, "no such host")),
        }
    }

    fn sign_component(&self, digest: &str, signature: &[u8], actor: &str) -> Result<(), AdminError> {
        match signature {
            b"good" => self.delete_component(digest, actor),
            _ => Err(refused(AdminErrorKind::Refused, "not signed by a known key")),
        }
    }

    fn components(&self) -> Vec<wire::Component> {
        Vec::new()
    }

    fn delete_component(&self, digest: &str, _actor: &str) -> Result<(), AdminError> {
        match digest {
            "sha256:00" => Ok(()),
            _ => Err(refused(AdminErrorKind::NotFound, "no such component")),
        }
    }

    fn slots(&self) -> Vec<wire::Slot> {
        self.slot("router").into_iter().collect()
    }

    fn slot(&self, slot: &str) -> Result<wire::Slot, AdminError> {
        if slot == "panic" {
            panic!("as asked");
        }
        if slot != "router" {
            return Err(refused(AdminErrorKind::NotFound, "no such slot"));
        }
        let active = wire::SlotRevision {
            revision: "native".into(),
            generation: 3,
            component: "native".into(),
            config: RawValue::from_string("{}".into()).expect("JSON"),
            state_namespace: "router".into(),
            budget: wire::Budget::default(),
            handover: wire::Handover::default(),
            on_fault: wire::OnFault::default(),
            limits: None,
        };
        Ok(wire::Slot {
            slot: slot.into(),
            active,
            previous: None,
            candidate: None,
            health: wire::Health { state: wire::HealthState::Native, reason: None, retry_in_ms: None },
            counters: wire::Counters::default(),
        })
    }

    fn put_slot(&self, slot: &str, request: wire::PutSlot, actor: &str) -> Result<wire::Activated, AdminError> {
        self.gate.pass();
        if request.if_generation.is_some_and(|g| g != 3) {
            return Err(refused(AdminErrorKind::Conflict, "generation 3 is active"));
        }
        let revision = format!("{slot}:{}:{}:{actor}", request.component, request.config.get());
        Ok(wire::Activated { revision, generation: 4, warm_ms: 1.0, publish_us: 2.0, handover: None })
    }

    fn delete_slot(
        &self,
        _slot: &str,
        if_generation: Option<u64>,
        _actor: &str,
    ) -> Result<wire::Activated, AdminError> {
        if if_generation.is_some_and(|g| g != 3) {
            return Err(refused(AdminErrorKind::Conflict, "generation 3 is active"));
        }
        Ok(wire::Activated { revision: "native".into(), generation: 5, warm_ms: 0.0, publish_us: 1.0, handover: None })
    }

    fn rollback(&self, slot: &str, if_generation: Option<u64>, actor: &str) -> Result<wire::Activated, AdminError> {
        match if_generation {
            Some(3) => self.delete_slot(slot, None, actor),
            _ => Err(refused(AdminErrorKind::Conflict, "nothing to roll back to")),
        }
    }

    fn start_rollout(&self, slot: &str, request: wire::StartRollout, actor: &str) -> Result<Box<RawValue>, AdminError> {
        if request.plan.contains("ab") {
            return Err(refused(AdminErrorKind::Invalid, "use switchback"));
        }
        Ok(raw(&serde_json::json!({ "id": format!("{slot}-4"), "component": request.component, "actor": actor })))
    }

    fn rollouts(&self, slot: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        Ok(vec![raw(&serde_json::json!({ "id": format!("{slot}-4") }))])
    }

    fn rollout(&self, _slot: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        match id {
            "router-4" => Ok(raw(&serde_json::json!({ "id": id }))),
            _ => Err(refused(AdminErrorKind::NotFound, "no such rollout")),
        }
    }

    fn steer_rollout(
        &self,
        slot: &str,
        id: &str,
        steer: wire::Steer,
        _actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        PolicyAdmin::rollout(self, slot, id)?;
        Ok(raw(&serde_json::json!({ "steered": format!("{steer:?}") })))
    }

    fn safe_mode(&self) -> wire::SafeMode {
        wire::SafeMode { on: false, since_start: false, reason: None, by: None, since_unix_ms: None }
    }

    fn set_safe_mode(&self, put: wire::PutSafeMode, actor: &str) -> Result<wire::SafeMode, AdminError> {
        Ok(wire::SafeMode { on: put.on, reason: put.reason, by: Some(actor.to_owned()), ..self.safe_mode() })
    }

    fn refuses_all(&self) -> bool {
        self.refuses_all.load(Ordering::Relaxed)
    }

    fn authors(&self) -> Authors {
        *self.authors.lock().expect("unpoisoned")
    }

    fn ask_previous_router(&self, question: &Question<'_>) -> Result<Routed, AdminError> {
        if question.request.prompt_tokens > 9 {
            return Err(refused(AdminErrorKind::Conflict, "the router has no previous policy"));
        }
        let decided_by = DecidedBy { revision: "q@1+0000".into(), generation: 6 };
        Ok(Routed { choice: Choice::Rank(vec![2, 0]), decided_by, fallback: None })
    }

    fn ask_previous_admission(&self, question: &DoorQuestion<'_>) -> Result<Judged, AdminError> {
        if question.request.prompt_tokens > 9 {
            return Err(refused(AdminErrorKind::Conflict, "`admission` has no previous policy"));
        }
        let decided_by = DecidedBy { revision: "e@1+0000".into(), generation: 8 };
        Ok(Judged { verdict: Some(Verdict::AcceptAs(Priority::Low)), ..Judged::native(decided_by) })
    }

    fn shadow_router_said(&self, request: RequestId) -> Option<Routed> {
        let decided_by = DecidedBy { revision: "s@1+0000".into(), generation: 8 };
        (request == RequestId(1)).then_some(Routed { choice: Choice::Pick(1), decided_by, fallback: None })
    }

    fn shadow_admission_said(&self, request: RequestId) -> Option<Judged> {
        let decided_by = DecidedBy { revision: "t@1+0000".into(), generation: 9 };
        (request == RequestId(1)).then(|| Judged { verdict: Some(Verdict::Accept), ..Judged::native(decided_by) })
    }

    fn journal(&self, after: u64, limit: usize) -> Vec<JournalLine> {
        let lines = self.journal.lock().expect("unpoisoned");
        lines.iter().filter(|line| line.sequence > after).take(limit).cloned().collect()
    }
}

impl AliasPort for FakeAdmin {
    fn assign(&self, alias: &str, asker: &Asker<'_>) -> Option<Assigned> {
        assert_eq!(alias, "m", "only an alias with several variants is asked about");
        let weights = self.weights.lock().expect("unpoisoned");
        // The fake's hash is the length of the tenant's name.
        let ids: Vec<&String> = weights.weights.keys().collect();
        let unit = asker.tenant.len();
        (!ids.is_empty()).then(|| Assigned {
            variant: ids[unit % ids.len()].as_str().into(),
            unit: unit as u64,
            is_trial: weights.rollout.is_some(),
        })
    }

    fn weights(&self, _alias: &str) -> wire::Weights {
        self.weights.lock().expect("unpoisoned").clone()
    }

    fn put_alias(&self, alias: &str, request: wire::PutAlias, _actor: &str) -> Result<wire::Weights, AdminError> {
        if request.if_generation.is_some() {
            return Err(refused(AdminErrorKind::Conflict, "another generation is active"));
        }
        let wire::PutAlias { weights, sticky, .. } = request;
        *self.weights.lock().expect("unpoisoned") = wire::Weights { generation: 1, weights, sticky, rollout: None };
        Ok(AliasPort::weights(self, alias))
    }

    fn start_rollout(
        &self,
        alias: &str,
        request: wire::StartAliasRollout,
        actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        let id = format!("alias.{alias}-4");
        Ok(raw(&serde_json::json!({ "id": id, "candidate": request.candidate, "plan": request.plan, "actor": actor })))
    }

    fn rollouts(&self, alias: &str) -> Result<Vec<Box<RawValue>>, AdminError> {
        Ok(vec![raw(&serde_json::json!({ "id": format!("alias.{alias}-4") }))])
    }

    fn rollout(&self, _alias: &str, id: &str) -> Result<Box<RawValue>, AdminError> {
        Ok(raw(&serde_json::json!({ "id": id })))
    }

    fn steer_rollout(
        &self,
        alias: &str,
        id: &str,
        steer: wire::Steer,
        _actor: &str,
    ) -> Result<Box<RawValue>, AdminError> {
        Ok(raw(&serde_json::json!({ "alias": alias, "id": id, "steered": format!("{steer:?}") })))
    }
}

impl ModelAdmin for FakeAdmin {
    fn models(&self) -> Vec<wire::Model> {
        let state = match self.is_degraded.load(Ordering::Relaxed) {
            true => wire::ModelState::Failed,
            false => wire::ModelState::Ready,
        };
        vec![wire::Model { state, ..model("org/m") }]
    }

    /// What a test has put there.
    fn load(&self, load: wire::LoadModel, _actor: &str) -> Result<watch::Receiver<LoadReport>, AdminError> {
        let reports = self.loads.lock().expect("unpoisoned").take();
        reports.ok_or_else(|| refused(AdminErrorKind::Conflict, &format!("`{}` is taken", load.name)))
    }

    fn unload(&self, name: &str, grace_ms: u64, _actor: &str) -> Result<wire::Unloaded, AdminError> {
        let variants = vec![format!("{name}:a")];
        Ok(wire::Unloaded { name: name.to_owned(), variants, ended: 0, waited_ms: grace_ms, bytes: 7 })
    }

    /// What a test has put there, in its order.
    fn want(&self, _name: &str, _is_first: bool) -> Want {
        self.wants.lock().expect("unpoisoned").pop_front().expect("as many as are asked for")
    }

    fn loading(&self, _name: &str) -> Option<watch::Receiver<LoadReport>> {
        self.loads.lock().expect("unpoisoned").clone()
    }

    fn hold(&self, name: &str) -> Option<Lease> {
        self.held.lock().expect("unpoisoned").get(name).map(Lease::of)
    }

    fn state(&self, _name: &str) -> Option<wire::ModelState> {
        Some(wire::ModelState::Unloaded)
    }

    fn clear_prefix_caches(&self, device: &str, _actor: &str) -> Result<Vec<wire::ClearedReplica>, AdminError> {
        Ok(vec![wire::ClearedReplica { name: format!("m:a@{device}"), kv_blocks: 7 }])
    }

    /// The device, of whose memory pools have so much.
    fn bound_kv_pools(&self, device: &str, bytes: Option<u64>, _actor: &str) -> Result<wire::Device, AdminError> {
        if device != "cuda:0" {
            return Err(refused(AdminErrorKind::NotFound, &format!("there is no device `{device}` here")));
        }
        let found = self.devices().remove(0);
        let memory = wire::DeviceMemory { kv: bytes.unwrap_or(u64::MAX), ..found.memory };
        Ok(wire::Device { name: device.to_owned(), memory, ..found })
    }

    fn device_states(&self) -> Vec<DeviceState> {
        let is_up = !self.is_degraded.load(Ordering::Relaxed);
        vec![DeviceState { index: 0, name: "cpu".into(), is_up }]
    }

    fn devices(&self) -> Vec<wire::Device> {
        self.n_reports.fetch_add(1, Ordering::Relaxed);
        vec![wire::Device {
            index: 0,
            name: "cpu".into(),
            description: "a fake".into(),
            state: if self.is_degraded.load(Ordering::Relaxed) { "down" } else { "up" }.into(),
            memory: wire::DeviceMemory::default(),
            replicas: Vec::new(),
            kv_pool_bound: None,
            utilization: None,
            temperature: None,
            power_watts: None,
        }]
    }
}

pub(crate) fn model(name: &str) -> wire::Model {
    wire::Model {
        name: name.to_owned(),
        state: wire::ModelState::Ready,
        source: wire::ModelSource::Loaded,
        path: Some("/m".to_owned()),
        variants: vec![format!("{name}:a")],
        replicas: Vec::new(),
        progress: None,
        error: None,
        idle_ms: None,
        unserved: Vec::new(),
    }
}

// === impl FakeShelf ===

impl FakeShelf {
    /// The name of the largest content whose document is not there.
    pub(crate) fn largest_hidden(&self) -> String {
        let (documents, contents) =
            (self.documents.lock().expect("unpoisoned"), self.contents.lock().expect("unpoisoned"));
        let hidden = contents.iter().filter(|(name, _)| !documents.contains_key(*name));
        hidden.max_by_key(|(_, bytes)| bytes.len()).expect("one is hidden").0.clone()
    }

    fn taking(&self) -> io::Result<()> {
        if self.is_full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Shelf for FakeShelf {
    fn documents(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        Ok(self.documents.lock().expect("unpoisoned").clone().into_iter().collect())
    }

    fn contents(&self) -> io::Result<Vec<(String, u64)>> {
        let contents = self.contents.lock().expect("unpoisoned");
        Ok(contents.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect())
    }

    fn write_document(&self, name: &str, text: &[u8]) -> io::Result<()> {
        self.taking()?;
        self.documents.lock().expect("unpoisoned").insert(name.to_owned(), text.to_vec());
        Ok(())
    }

    fn append(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut contents = self.contents.lock().expect("unpoisoned");
        let content = contents.entry(name.to_owned()).or_default();
        // As a disk does that fills up on the way.
        let taken = self.taking();
        content.extend_from_slice(if taken.is_ok() { bytes } else { &bytes[..bytes.len() / 2] });
        taken
    }

    fn sync(&self, _name: &str) -> io::Result<()> {
        self.taking()
    }

    fn read(&self, name: &str, at: u64, most: usize) -> io::Result<Vec<u8>> {
        let fewer = self.panics.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        assert!(fewer.is_err(), "a reader panics");
        if self.fails_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) == Ok(1) {
            return Err(io::ErrorKind::Other.into());
        }
        let contents = self.contents.lock().expect("unpoisoned");
        let rest = contents.get(name).and_then(|bytes| bytes.get(usize::try_from(at).ok()?..)).unwrap_or_default();
        Ok(rest[..rest.len().min(most)].to_vec())
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        Ok(self.contents.lock().expect("unpoisoned").get(name).map_or(0, |bytes| bytes.len() as u64))
    }

    fn cut(&self, name: &str, length: u64) -> io::Result<()> {
        if self.is_stuck.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Other.into());
        }
        let length = usize::try_from(length).expect("small");
        self.contents.lock().expect("unpoisoned").entry(name.to_owned()).or_default().truncate(length);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.documents.lock().expect("unpoisoned").remove(name);
        self.contents.lock().expect("unpoisoned").remove(name);
        Ok(())
    }
}

// === impl Rig ===

pub(crate) fn replica(id: u32, name: &str) -> Arc<Replica> {
    Arc::new(Replica {
        id: ReplicaId(id),
        key: u64::from(id) * 11,
        name: name.into(),
        device: 0,
        variant: 1,
        weight: AtomicU32::new(1_000),
        health: AtomicU8::new(0),
        max_waiting: 4,
        started: 1,
        labels: [("price".into(), u64::from(id) + 3)].into(),
        upstream: None,
        scores_prompts: id != 2,
        gauges: Arc::new(ReplicaGauges::default()),
        sketch: Arc::new(PrefixSketch::new(64)),
    })
}

fn variant(id: &str, text: &Arc<TextModel>, replicas: Vec<Arc<Replica>>) -> Arc<Variant> {
    Arc::new(Variant {
        id: id.into(),
        alias: id.split(':').next().unwrap_or(id).into(),
        text: Arc::clone(text),
        context_tokens: 64,
        block_tokens: 4,
        draft_model: None,
        created: 1_699_999_999,
        replicas,
    })
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(ServerConfig::default())
    }

    /// Two variants of `m`: `m:a` on replicas 0 and 1, `m:b` on replica 2, which scores no prompts; and an encoder `e`.
    pub(crate) fn with(config: ServerConfig) -> Self {
        Self::on(config, &Arc::default())
    }

    /// The same on a shelf that may hold something.
    pub(crate) fn on(config: ServerConfig, shelf: &Arc<FakeShelf>) -> Self {
        let text = Arc::new(crate::text::tests::model());
        let a = variant("m:a", &text, vec![replica(0, "m:a@x"), replica(1, "m:a@y")]);
        let b = variant("m:b", &text, vec![replica(2, "m:b@x")]);
        let encoder = Arc::new(Encoder {
            name: "e".into(),
            replica: "e@x".into(),
            text: Arc::clone(&text),
            max_tokens: 8,
            dimensions: Some(4),
            created: 1_699_999_998,
            upstreams: Vec::new(),
        });
        let engine = Arc::new(FakeEngine::default());
        *engine.catalog.lock().expect("unpoisoned") =
            Arc::new(Catalog { variants: vec![a, b], encoders: vec![encoder], ..Catalog::default() });
        let router = Arc::new(FakeRouter { choice: Mutex::new(Choice::Pick(0)), calls: Mutex::default() });
        let door = Arc::new(FakeDoor { native: AtomicBool::new(true), ..FakeDoor::default() });
        let clock = Arc::new(FakeClock::default());
        let admin = Arc::new(FakeAdmin::default());
        let state = ServerState::new(ServerParts {
            config,
            engine: Arc::clone(&engine) as _,
            admit: Arc::clone(&door) as _,
            router: Arc::clone(&router) as _,
            policies: Arc::clone(&admin) as _,
            aliases: Arc::clone(&admin) as _,
            models: Arc::clone(&admin) as _,
            clock: Arc::clone(&clock) as _,
            metrics: Arc::new(Metrics::new()),
            recorder: Recorder::new(64),
            names: Arc::new(Names::default()),
            taps: Taps::default(),
            shelf: Arc::clone(shelf) as _,
        });
        Self { engine, door, router, clock, admin, state: state.expect("a good configuration") }
    }

    pub(crate) fn data(&self) -> Router {
        data_router(&self.state)
    }

    pub(crate) fn admin(&self) -> Router {
        admin_router(&self.state)
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send(request("POST", path, &[("content-type", "application/json")], body)).await
    }

    pub(crate) async fn send(&self, request: HttpRequest<Body>) -> Answer {
        Answer::of(self.open(request).await).await
    }

    /// Sends and does not read the body yet.
    pub(crate) async fn open(&self, request: HttpRequest<Body>) -> Response<Body> {
        self.data().oneshot(request).await.expect("routers do not fail")
    }

    pub(crate) async fn ask_admin(&self, request: HttpRequest<Body>) -> Answer {
        Answer::of(self.admin().oneshot(request).await.expect("routers do not fail")).await
    }
}

/// An API key `secret` of the tenant `t-secret`, without limits.
pub(crate) fn key(secret: &str, max_priority: Priority) -> ApiKey {
    let (name, tenant) = (secret.to_owned(), format!("t-{secret}"));
    ApiKey { name, digest: KeyDigest::of(secret), tenant, max_priority, limits: KeyLimits::default() }
}

pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> HttpRequest<Body> {
    let builder = HttpRequest::builder().method(method).uri(path);
    let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
    builder.body(Body::from(body.to_owned())).expect("a good request")
}

// === impl Answer ===

impl Answer {
    pub(crate) async fn of(response: Response<Body>) -> Self {
        let (parts, body) = response.into_parts();
        let body = body.collect().await.expect("bodies do not fail").to_bytes();
        let body = String::from_utf8(body.to_vec()).expect("UTF-8");
        Self { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ascii"))
    }

    /// The payloads of the server-sent events; `[DONE]` as a string.
    pub(crate) fn events(&self) -> Vec<Value> {
        let payload = |frame: &str| {
            let text = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("not a data frame: {frame:?}"));
            serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
        };
        self.body.split_terminator("\n\n").map(payload).collect()
    }

    /// The lines of an NDJSON body.
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.body.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}
