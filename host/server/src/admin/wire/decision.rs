//! Decisions on the wire: what a router or a scheduler was shown and what it said, as the lines of a recording and as the
//! answer to "why did my request go there".
//!
//! Definitions beside the seams' types and not derives on them, because JSON is the server's business; the compiler holds the
//! two together. They are read back as well: a recording is what other policies are tried on. Numbers of 64 bits are written
//! as JSON integers, exactly: a reader that turns them into floats loses the low bits of keys, sessions and seeds.

use std::sync::Arc;

use pointsman_sched::admit::Load;
use pointsman_sched::batch::{Budgets, Changes, Plan, Rest, SequenceColumns};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::route::{Choice, Refusal, Rejection, ReplicaColumns, RequestNumbers, RouteRequest};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::calls::{AdmissionLine, DoorSeen, LoadDef, RetentionLine, SamplerLine, VerdictSeen};

/// Longest text that is kept of an attribute, in bytes; headers may be long and are remembered a thousand times.
const MAX_TEXT: usize = 256;

/// One line of a recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "slot", rename_all = "lowercase")]
pub enum Line {
    /// A routing decision.
    Router(Box<RouterLine>),
    /// A call of a replica's scheduler.
    Scheduler(Box<SchedulerLine>),
    /// A call of the admission policy.
    Admission(Box<AdmissionLine>),
    /// A ranking of a replica's cached blocks.
    #[serde(rename = "kv-retention")]
    Retention(Box<RetentionLine>),
    /// A batch of a replica's sampler.
    Sampler(Box<SamplerLine>),
}

/// The last line of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastLine {
    /// Decisions that the recording lacks, because its reader was too slow.
    pub dropped: u64,
}

/// One routing decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub struct RouterLine {
    pub now: Micros,
    pub request: RequestSeen,
    #[serde(with = "ReplicaColumnsDef")]
    pub replicas: ReplicaColumns,
    pub answer: Answer,
    pub revision: String,
    pub generation: u64,
    /// Whether the native policy stood in for a guest that failed or is off.
    pub fallback: bool,
    /// The row that got the request; none when it was refused.
    pub chosen: Option<u32>,
}

/// One call of a scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SchedulerLine {
    /// As in `demo:f16@cpu`: each replica has a scheduler of its own, and their calls are interleaved.
    pub replica: String,
    /// The host's clock.
    pub now: Micros,
    /// What the step may spend.
    #[serde(with = "BudgetsDef")]
    pub budgets: Budgets,
    /// Which call.
    #[serde(flatten)]
    pub call: SchedulerCall,
}

/// The calls of a scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "lowercase")]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub enum SchedulerCall {
    /// The whole view. A recording of a replica begins with one; so does what follows a gap.
    Resync {
        seed: u64,
        tenants: Vec<(u32, String)>,
        #[serde(with = "SequenceColumnsDef")]
        waiting: SequenceColumns,
        #[serde(with = "SequenceColumnsDef")]
        running: SequenceColumns,
    },
    /// A decision. `answer` is null where the policy left it to the host.
    Step {
        #[serde(with = "ChangesDef")]
        changes: Changes,
        answer: Option<PlanSeen>,
        revision: String,
        generation: u64,
    },
}

/// A request as routers see it, [`RouteRequest`] with texts of its own. The text of the prompt is never kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub struct RequestSeen {
    pub id: u64,
    pub model: String,
    pub tenant: String,
    pub tenant_id: u32,
    pub session: u64,
    pub prefix: u64,
    #[serde(with = "PriorityDef")]
    pub priority: Priority,
    pub prompt_tokens: u32,
    pub max_new_tokens: u32,
    pub arrived: Micros,
    pub deadline: Micros,
    pub seed: u64,
    #[serde(with = "RequestNumbersDef", default)]
    pub numbers: RequestNumbers,
    pub attributes: Vec<(String, String)>,
}

/// What a router said, before the host looked for room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// No opinion; always true.
    Abstain(bool),
    /// This row.
    Pick(u32),
    /// These rows, best first.
    Rank(Vec<u32>),
    /// Refused.
    Reject(#[serde(with = "RejectionDef")] Rejection),
}

/// A scheduler's proposal, before the host clamped it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PlanSeen(#[serde(with = "PlanDef")] pub Plan);

/// Why a request went where it went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// `x-request-id`.
    pub id: String,
    /// Where it is: `running`, `finished`, `failed`, `cancelled` or `rejected`.
    pub state: State,
    /// `stop` or `length`, or what went wrong; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish: Option<String>,
    /// When it reached each stage.
    pub stages_us: Stages,
    /// Prompt tokens that needed no computation.
    pub cached_tokens: u32,
    /// Tokens generated so far.
    pub generated_tokens: u32,
    /// What the admission policy saw and said; absent when there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admission: Option<Admission>,
    /// What the router saw and said for its first prompt; absent when it did not get that far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// Upstreams that it was sent to, one after the other; absent where it was sent to none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<Tried>,
    /// What the policy before the active one says to the same inputs; asked now, off the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// What the shadow beside the router said when the decision was put to it; absent where it was not, or the rollout is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Previous>,
}

/// An upstream that a request was sent to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tried {
    /// As in `demo:remote@east`.
    pub replica: String,
    /// `answered` once its first event was there, else what went wrong.
    pub outcome: String,
    /// When that was known, in microseconds since the request came.
    pub at_us: u64,
}

/// Words for [`Explained::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not over.
    Running,
    /// Ended as asked.
    Finished,
    /// Ended by a fault of the host or a bound of it.
    Failed,
    /// Ended by the client, a cancel or a deadline.
    Cancelled,
    /// Refused before any work.
    Rejected,
}

/// Microseconds from arrival to each stage; null for one that was not reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stages {
    /// Read, tokenized and admitted.
    pub admitted: Option<Micros>,
    /// In the mailbox of a replica.
    pub routed: Option<Micros>,
    /// Out of the queue: its first chunk of prefill begins.
    pub scheduled: Option<Micros>,
    /// Prefill is over.
    pub first_token: Option<Micros>,
    /// Over.
    pub ended: Option<Micros>,
}

/// A routing decision, explained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// What the router saw of the request.
    pub request: RequestSeen,
    /// What the router saw of the replicas.
    #[serde(with = "ReplicaColumnsDef")]
    pub replicas: ReplicaColumns,
    /// The replica behind each row, as in `demo:f16@cpu`.
    pub rows: Vec<String>,
    /// `name@version+digest`, or `native`.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
    /// What it said.
    pub answer: Answer,
    /// How long it took to say so.
    pub call_us: u64,
    /// Why the native policy stood in for it: a kind of fault, `circuit-open` or `no-instance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<&'static str>,
    /// What the host did to the answer, in words; empty when it was followed.
    pub clamps: Vec<String>,
    /// Where it went; absent when it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
}

/// A decision at the door, explained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Admission {
    /// What the policy saw of the request.
    pub request: DoorSeen,
    /// What it saw of the host.
    #[serde(with = "LoadDef")]
    pub load: Load,
    /// `name@version+digest`.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
    /// What it said; null where it gave no answer.
    pub answer: Option<VerdictSeen>,
    /// How long it took to say so.
    pub call_us: u64,
    /// Why it gave none: a kind of fault, `circuit-open` or `no-instance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<&'static str>,
    /// What the host did without an answer, in words.
    pub clamps: Vec<String>,
    /// What the policy before the active one says to the same inputs; asked now, off the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousVerdict>,
    /// What the shadow said when the decision was put to it; absent where it was not, or the rollout is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadow: Option<PreviousVerdict>,
}

/// What another admission policy would have said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum PreviousVerdict {
    /// It was asked.
    Said {
        /// `name@version+digest`, or `native`.
        revision: String,
        /// The generation under which it worked.
        generation: u64,
        /// What it says; null for native, which lets in whoever is within the host's limits.
        answer: Option<VerdictSeen>,
    },
    /// It cannot be asked.
    Unavailable {
        /// Why.
        unavailable: String,
    },
}

/// The replica that got a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// Its row.
    pub row: u32,
    /// As in `demo:f16@cpu`.
    pub replica: String,
    /// As in `demo:f16`.
    pub variant: String,
}

/// What another policy would have said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Previous {
    /// It was asked.
    Said {
        /// `name@version+digest`, or `native`.
        revision: String,
        /// The generation under which it worked.
        generation: u64,
        /// What it says.
        answer: Answer,
        /// The row to which that comes, as far as the recorded load tells; null where no row has room, or it refuses.
        row: Option<u32>,
    },
    /// It cannot be asked.
    Unavailable {
        /// Why.
        unavailable: String,
    },
}

/// A line of `GET /admin/v1/requests`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestSummary {
    /// `x-request-id`.
    pub id: String,
    /// Where it is.
    pub state: State,
    /// `stop` or `length`, or what went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish: Option<String>,
    /// As the client wrote it.
    pub model: Option<String>,
    /// Whose it is.
    pub tenant: Option<String>,
    /// Where it went.
    pub replica: Option<String>,
    /// Who was asked.
    pub revision: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// When it reached each stage.
    pub stages_us: Stages,
    /// Tokens generated so far.
    pub generated_tokens: u32,
}

/// The beginning of a text that may be long.
pub(super) fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}

// === impl RequestSeen ===

impl RequestSeen {
    /// What a router saw, without the text of the prompt.
    #[must_use]
    pub fn of(request: &RouteRequest<'_>) -> Self {
        let texts = request.attributes.iter().filter(|(name, _)| *name != "prompt-head");
        Self {
            id: request.id.0,
            model: request.model.to_owned(),
            tenant: request.tenant.to_owned(),
            tenant_id: request.tenant_id,
            session: request.session,
            prefix: request.prefix,
            priority: request.priority,
            prompt_tokens: request.prompt_tokens,
            max_new_tokens: request.max_new_tokens,
            arrived: request.arrived,
            deadline: request.deadline,
            seed: request.seed,
            numbers: request.numbers,
            attributes: texts.map(|(name, value)| ((*name).to_owned(), cut(value))).collect(),
        }
    }

    /// The attributes, to be lent to a router.
    #[must_use]
    pub fn texts(&self) -> Vec<(&str, &str)> {
        self.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// The request again, for another router; `texts` come from [`texts`](Self::texts).
    #[must_use]
    pub fn lend<'a>(&'a self, texts: &'a [(&'a str, &'a str)]) -> RouteRequest<'a> {
        RouteRequest {
            id: RequestId(self.id),
            model: &self.model,
            tenant: &self.tenant,
            tenant_id: self.tenant_id,
            session: self.session,
            prefix: self.prefix,
            priority: self.priority,
            prompt_tokens: self.prompt_tokens,
            max_new_tokens: self.max_new_tokens,
            arrived: self.arrived,
            deadline: self.deadline,
            seed: self.seed,
            numbers: self.numbers,
            attributes: texts,
        }
    }
}

// === impl Answer ===

impl From<&Choice> for Answer {
    fn from(choice: &Choice) -> Self {
        match choice {
            Choice::Abstain => Self::Abstain(true),
            Choice::Pick(row) => Self::Pick(*row),
            Choice::Rank(rows) => Self::Rank(rows.clone()),
            Choice::Reject(rejection) => Self::Reject(rejection.clone()),
        }
    }
}

impl From<Answer> for Choice {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Abstain(_) => Self::Abstain,
            Answer::Pick(row) => Self::Pick(row),
            Answer::Rank(rows) => Self::Rank(rows),
            Answer::Reject(rejection) => Self::Reject(rejection),
        }
    }
}

// === the seams' types in JSON ===

#[derive(Serialize, Deserialize)]
#[serde(remote = "Priority", rename_all = "lowercase")]
pub(super) enum PriorityDef {
    Critical,
    High,
    Normal,
    Low,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Refusal", rename_all = "kebab-case")]
enum RefusalDef {
    Overloaded,
    Quota,
    NotAllowed,
    CannotMeetDeadline,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Rejection")]
pub(super) struct RejectionDef {
    #[serde(with = "RefusalDef")]
    reason: Refusal,
    retry_after_ms: u32,
    message: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RequestNumbers")]
pub(super) struct RequestNumbersDef {
    choices: u64,
    temperature_ppm: u64,
    stream: u64,
    min_new_tokens: u64,
    cache_prompt: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ReplicaColumns")]
struct ReplicaColumnsDef {
    id: Vec<u32>,
    key: Vec<u64>,
    health: Vec<u8>,
    weight: Vec<u32>,
    waiting: Vec<u32>,
    running: Vec<u32>,
    running_limit: Vec<u32>,
    queued_tokens: Vec<u32>,
    free_blocks: Vec<u32>,
    total_blocks: Vec<u32>,
    cached_tokens: Vec<u32>,
    #[serde(default)]
    device: Vec<u64>,
    #[serde(default)]
    variant: Vec<u64>,
    #[serde(default)]
    load: Vec<u64>,
    #[serde(default)]
    errors: Vec<u64>,
    #[serde(default)]
    age: Vec<u64>,
    #[serde(default)]
    predicted_ttft: Vec<u64>,
    #[serde(default)]
    kind: Vec<u64>,
    /// As pairs of name and column, in the host's order.
    #[serde(default, serialize_with = "write_labels", deserialize_with = "read_labels")]
    labels: Vec<(Arc<str>, Vec<u64>)>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "SequenceColumns")]
struct SequenceColumnsDef {
    id: Vec<u64>,
    prompt_tokens: Vec<u32>,
    cached_tokens: Vec<u32>,
    computed_tokens: Vec<u32>,
    generated_tokens: Vec<u32>,
    max_new_tokens: Vec<u32>,
    held_blocks: Vec<u32>,
    priority: Vec<u8>,
    tenant: Vec<u32>,
    arrived: Vec<Micros>,
    deadline: Vec<Micros>,
    #[serde(default)]
    session: Vec<u64>,
    #[serde(default)]
    prefix: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Budgets")]
struct BudgetsDef {
    step_tokens: u32,
    running: u32,
    free_blocks: u32,
    total_blocks: u32,
    block_tokens: u32,
    last_step: Micros,
    last_step_tokens: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Changes")]
struct ChangesDef {
    #[serde(serialize_with = "write_names", deserialize_with = "read_names")]
    new_tenants: Vec<(u32, Arc<str>)>,
    #[serde(with = "SequenceColumnsDef")]
    arrived: SequenceColumns,
    admitted: Vec<u64>,
    preempted: Vec<u64>,
    gone: Vec<u64>,
    progress_id: Vec<u64>,
    progress_computed: Vec<u32>,
    progress_generated: Vec<u32>,
    progress_blocks: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Rest", rename_all = "kebab-case")]
enum RestDef {
    HostOrder,
    Hold,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Plan")]
struct PlanDef {
    admit: Vec<u64>,
    #[serde(with = "RestDef")]
    rest: Rest,
    preempt: Vec<u64>,
    drop: Vec<u64>,
    prefill_id: Vec<u64>,
    prefill_tokens: Vec<u32>,
}

/// Names and columns.
type Labels = Vec<(Arc<str>, Vec<u64>)>;

fn write_labels<S: Serializer>(labels: &[(Arc<str>, Vec<u64>)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(labels.iter().map(|(name, column)| (&**name, column)))
}

fn read_labels<'de, D: Deserializer<'de>>(from: D) -> Result<Labels, D::Error> {
    let labels = Vec::<(String, Vec<u64>)>::deserialize(from)?;
    Ok(labels.into_iter().map(|(name, column)| (name.into(), column)).collect())
}

fn write_names<S: Serializer>(names: &[(u32, Arc<str>)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(names.iter().map(|(number, name)| (number, &**name)))
}

fn read_names<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(u32, Arc<str>)>, D::Error> {
    let names = Vec::<(u32, String)>::deserialize(from)?;
    Ok(names.into_iter().map(|(number, name)| (number, name.into())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas() -> ReplicaColumns {
        ReplicaColumns {
            id: vec![4],
            key: vec![u64::MAX],
            health: vec![0],
            weight: vec![1_000],
            waiting: vec![1],
            running: vec![2],
            running_limit: vec![8],
            queued_tokens: vec![30],
            free_blocks: vec![5],
            total_blocks: vec![9],
            cached_tokens: vec![16],
            device: vec![0],
            variant: vec![1],
            load: vec![500_000],
            errors: vec![0],
            age: vec![7],
            predicted_ttft: vec![12_000],
            kind: vec![0],
            labels: vec![("price".into(), vec![3])],
        }
    }

    #[test]
    fn lines_are_read_back_as_they_were_written() {
        let request = RouteRequest {
            id: RequestId(7),
            model: "m",
            tenant: "t",
            tenant_id: 3,
            session: u64::MAX - 1,
            prefix: 1,
            priority: Priority::High,
            prompt_tokens: 9,
            max_new_tokens: 4,
            arrived: 10,
            deadline: 0,
            seed: u64::MAX,
            numbers: RequestNumbers { choices: 1, ..RequestNumbers::default() },
            attributes: &[("header.x-plan", "gold"), ("prompt-head", "secret")],
        };
        let router = |answer| {
            Line::Router(Box::new(RouterLine {
                now: 11,
                request: RequestSeen::of(&request),
                replicas: replicas(),
                answer,
                revision: "r@1.0.0+00000000".into(),
                generation: 2,
                fallback: false,
                chosen: Some(0),
            }))
        };
        let rejection = Rejection { reason: Refusal::CannotMeetDeadline, retry_after_ms: 5, message: "no time".into() };
        let scheduler = |call| {
            let budgets = Budgets { step_tokens: 512, ..Budgets::default() };
            Line::Scheduler(Box::new(SchedulerLine { replica: "m:f16@cpu".into(), now: 3, budgets, call }))
        };
        let view = SchedulerCall::Resync {
            seed: u64::MAX,
            tenants: vec![(3, "t".into())],
            waiting: SequenceColumns { id: vec![u64::MAX], ..SequenceColumns::default() },
            running: SequenceColumns::default(),
        };
        let changes = Changes { new_tenants: vec![(4, "u".into())], gone: vec![9], ..Changes::default() };
        let plan = Plan { admit: vec![2, 1], rest: Rest::Hold, ..Plan::default() };
        let step = |answer| SchedulerCall::Step {
            changes: changes.clone(),
            answer,
            revision: "s@1.0.0+00000000".into(),
            generation: 1,
        };
        for (line, holds) in [
            (router(Answer::Abstain(true)), r#"{"slot":"router","now":11,"request":{"id":7,"model":"m""#),
            (router(Answer::Pick(0)), r#""priority":"high""#),
            (router(Answer::Rank(vec![0])), r#""answer":{"rank":[0]}"#),
            (router(Answer::Reject(rejection)), r#"{"reject":{"reason":"cannot-meet-deadline","retry_after_ms":5"#),
            (scheduler(view), r#""call":"resync","seed":18446744073709551615,"tenants":[[3,"t"]]"#),
            (scheduler(step(None)), r#""answer":null"#),
            (scheduler(step(Some(PlanSeen(plan)))), r#""answer":{"admit":[2,1],"rest":"hold""#),
        ] {
            let text = serde_json::to_string(&line).expect("plain data");
            assert!(text.contains(holds), "{text}");
            assert!(!text.contains("secret"), "the prompt is not recorded: {text}");
            assert_eq!(serde_json::from_str::<Line>(&text).expect("its own line"), line);
        }
    }
}
