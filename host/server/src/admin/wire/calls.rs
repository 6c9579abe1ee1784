//! Calls of the hooks that do not route or schedule, as lines of a recording: admission, kv-retention and sampler.
//!
//! A line says all that its call needs, names of tenants included, so that a recording may begin and have gaps anywhere; what
//! a policy remembers of earlier calls is in the earlier lines, as far as they were recorded. As with the other decisions,
//! definitions stand here and not on the seams' types, because JSON is the server's business.

use std::borrow::Cow;
use std::sync::Arc;

use pointsman_sched::admit::{AdmitRequest, Ending, Load, Outcome, Verdict};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::retention::{BlockColumns, Ranking};
use pointsman_sched::route::{Rejection, RequestNumbers};
use pointsman_sched::sampler::{Edit, Started, Word};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::decision::{PriorityDef, RejectionDef, RequestNumbersDef, cut};

/// One call of the admission policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmissionLine {
    /// The host's clock.
    pub now: Micros,
    /// Which call.
    #[serde(flatten)]
    pub call: AdmissionCall,
    /// `name@version+digest`.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
}

/// The calls of an admission policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "lowercase")]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub enum AdmissionCall {
    /// A request wants to enter. `answer` is null where the policy gave none and the request entered as it was.
    Admit {
        request: DoorSeen,
        #[serde(with = "LoadDef")]
        load: Load,
        answer: Option<VerdictSeen>,
    },
    /// Requests that it accepted have ended. `tenants` has the name of every tenant among them.
    Settle { tenants: Vec<(u32, String)>, endings: Vec<EndingSeen> },
}

/// A request as admission policies see it, [`AdmitRequest`] with texts of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub struct DoorSeen {
    pub id: u64,
    pub model: String,
    pub tenant: String,
    pub tenant_id: u32,
    pub session: u64,
    #[serde(with = "PriorityDef")]
    pub priority: Priority,
    #[serde(with = "PriorityDef")]
    pub highest: Priority,
    pub prompt_tokens: u32,
    pub max_new_tokens: u32,
    pub arrived: Micros,
    pub deadline: Micros,
    pub seed: u64,
    #[serde(with = "RequestNumbersDef")]
    pub numbers: RequestNumbers,
    pub attributes: Vec<(String, String)>,
}

/// What an admission policy said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerdictSeen {
    /// It enters as it is; always true.
    Accept(bool),
    /// It enters with this priority.
    AcceptAs(#[serde(with = "PriorityDef")] Priority),
    /// It does not enter.
    Reject(#[serde(with = "RejectionDef")] Rejection),
}

/// What an accepted request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub struct EndingSeen {
    pub id: u64,
    pub tenant: u32,
    #[serde(with = "OutcomeDef")]
    pub outcome: Outcome,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub generated_tokens: u32,
    pub max_new_tokens: u32,
}

/// One ranking of a replica's cached blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetentionLine {
    /// As in `demo:f16@cpu`: each replica has a cache and an instance of its own.
    pub replica: String,
    /// The host's clock.
    pub now: Micros,
    /// Blocks that the host expects to need before it asks again.
    pub wanted: u32,
    /// Name of every tenant among the blocks.
    pub tenants: Vec<(u32, String)>,
    /// What could be evicted, least recently used first.
    #[serde(with = "BlockColumnsDef")]
    pub blocks: BlockColumns,
    /// What the policy said, before the host checked it; null where it left the order to the host.
    pub answer: Option<RankingSeen>,
    /// `name@version+digest`.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
}

/// A ranking of cached blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RankingSeen(#[serde(with = "RankingDef")] pub Ranking);

/// One batch of a replica's sampler: what happened, in the order of the fields, and what the policy said of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplerLine {
    /// As in `demo:f16@cpu`: each replica has an instance of its own.
    pub replica: String,
    /// Its variant: token ids are those of its tokenizer.
    pub variant: String,
    /// Tokens in its vocabulary.
    pub vocabulary: u32,
    /// When the batch was handed over.
    pub now: Micros,
    /// Words of a policy that took over, on requests that were running; before all others.
    pub renewed: Vec<(u64, WordSeen)>,
    /// Requests that started.
    pub started: Vec<StartedSeen>,
    /// Tokens that were sampled, with their requests.
    pub tokens: Vec<(u64, u32)>,
    /// Requests that ended.
    pub ended: Vec<u64>,
    /// One word per start and per token, a request's own in their order.
    pub words: Vec<(u64, WordSeen)>,
    /// `name@version+digest`.
    pub revision: String,
    /// Its generation.
    pub generation: u64,
}

/// A request as samplers see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the seam, documented there")]
pub struct StartedSeen {
    pub id: u64,
    pub tenant: String,
    pub stop_tokens: Vec<u32>,
    pub prompt_tokens: u32,
    pub max_new_tokens: u32,
    #[serde(default)]
    pub attributes: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub said: Vec<u32>,
}

/// What a sampler said of a request: `"leave"`, `"keep"`, `"free"`, `{"allow": [..]}`, `{"forbid": [..]}` or
/// `{"bias": [[token, bias], ..]}`. Shares the lists with the executor: the thread that records must not copy them.
#[derive(Clone, Debug, PartialEq)]
pub struct WordSeen(pub Word);

// === impl DoorSeen ===

impl DoorSeen {
    /// What an admission policy saw.
    #[must_use]
    pub fn of(request: &AdmitRequest<'_>) -> Self {
        let text = |(name, value): &(&str, &str)| ((*name).to_owned(), cut(value));
        Self {
            id: request.id.0,
            model: request.model.to_owned(),
            tenant: request.tenant.to_owned(),
            tenant_id: request.tenant_id,
            session: request.session,
            priority: request.priority,
            highest: request.highest,
            prompt_tokens: request.prompt_tokens,
            max_new_tokens: request.max_new_tokens,
            arrived: request.arrived,
            deadline: request.deadline,
            seed: request.seed,
            numbers: request.numbers,
            attributes: request.attributes.iter().map(text).collect(),
        }
    }

    /// The attributes, to be lent to a policy.
    #[must_use]
    pub fn texts(&self) -> Vec<(&str, &str)> {
        self.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// The request again, for another policy; `texts` come from [`texts`](Self::texts).
    #[must_use]
    pub fn lend<'a>(&'a self, texts: &'a [(&'a str, &'a str)]) -> AdmitRequest<'a> {
        AdmitRequest {
            id: RequestId(self.id),
            model: &self.model,
            tenant: &self.tenant,
            tenant_id: self.tenant_id,
            session: self.session,
            priority: self.priority,
            highest: self.highest,
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

// === conversions ===

impl From<&Verdict> for VerdictSeen {
    fn from(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Accept => Self::Accept(true),
            Verdict::AcceptAs(priority) => Self::AcceptAs(*priority),
            Verdict::Reject(rejection) => Self::Reject(rejection.clone()),
        }
    }
}

impl From<VerdictSeen> for Verdict {
    fn from(seen: VerdictSeen) -> Self {
        match seen {
            VerdictSeen::Accept(_) => Self::Accept,
            VerdictSeen::AcceptAs(priority) => Self::AcceptAs(priority),
            VerdictSeen::Reject(rejection) => Self::Reject(rejection),
        }
    }
}

impl From<&Ending> for EndingSeen {
    fn from(ending: &Ending) -> Self {
        let Ending { id, tenant, outcome, prompt_tokens, cached_tokens, generated_tokens, max_new_tokens, .. } =
            *ending;
        Self { id: id.0, tenant, outcome, prompt_tokens, cached_tokens, generated_tokens, max_new_tokens }
    }
}

impl From<&Started> for StartedSeen {
    fn from(started: &Started) -> Self {
        Self {
            id: started.id.0,
            tenant: started.tenant.to_string(),
            stop_tokens: started.stop_tokens.to_vec(),
            prompt_tokens: started.prompt_tokens,
            max_new_tokens: started.max_new_tokens,
            attributes: started.attributes.iter().map(|(name, value)| (name.clone(), cut(value))).collect(),
            said: started.said.clone(),
        }
    }
}

impl Serialize for WordSeen {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let text = match &self.0 {
            Word::Leave => WordText::Leave,
            Word::Keep => WordText::Keep,
            Word::Free => WordText::Free,
            Word::End => WordText::End,
            Word::Edit(edit) => match &**edit {
                Edit::Allow(tokens) => WordText::Allow(Cow::Borrowed(tokens)),
                Edit::Forbid(tokens) => WordText::Forbid(Cow::Borrowed(tokens)),
                Edit::Bias(biases) => WordText::Bias(Cow::Borrowed(biases)),
                Edit::Only(set) => WordText::Allow(Cow::Owned(set.tokens().collect())),
            },
        };
        text.serialize(to)
    }
}

impl<'de> Deserialize<'de> for WordSeen {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(match WordText::deserialize(from)? {
            WordText::Leave => Word::Leave,
            WordText::Keep => Word::Keep,
            WordText::Free => Word::Free,
            WordText::End => Word::End,
            WordText::Allow(tokens) => Word::Edit(Arc::new(Edit::Allow(tokens.into_owned().into()))),
            WordText::Forbid(tokens) => Word::Edit(Arc::new(Edit::Forbid(tokens.into_owned().into()))),
            WordText::Bias(biases) => Word::Edit(Arc::new(Edit::Bias(biases.into_owned().into()))),
        }))
    }
}

// === the seams' types in JSON ===

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WordText<'a> {
    Leave,
    Keep,
    Free,
    End,
    Allow(Cow<'a, [u32]>),
    Forbid(Cow<'a, [u32]>),
    Bias(Cow<'a, [(u32, f32)]>),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Load")]
pub(super) struct LoadDef {
    in_flight: u32,
    in_flight_limit: u32,
    queued_tokens: u64,
    queued_tokens_limit: u64,
    tenant_in_flight: u32,
    tenant_queued_tokens: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Outcome", rename_all = "lowercase")]
enum OutcomeDef {
    Finished,
    Failed,
    Cancelled,
    Rejected,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "BlockColumns")]
struct BlockColumnsDef {
    prefix: Vec<u64>,
    depth: Vec<u32>,
    children: Vec<u32>,
    last_used: Vec<Micros>,
    created: Vec<Micros>,
    hits: Vec<u32>,
    tenant: Vec<u32>,
    /// What was new to the policy in this call says nothing to another one: a line names them all.
    #[serde(skip)]
    new_tenants: Vec<(u32, Arc<str>)>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Ranking")]
struct RankingDef {
    evict: Vec<u32>,
    keep: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use pointsman_sched::route::Refusal;

    use super::super::decision::Line;
    use super::*;

    fn door() -> DoorSeen {
        DoorSeen::of(&AdmitRequest {
            id: RequestId(7),
            model: "m",
            tenant: "t",
            tenant_id: 3,
            session: u64::MAX,
            priority: Priority::Normal,
            highest: Priority::High,
            prompt_tokens: 9,
            max_new_tokens: 4,
            arrived: 10,
            deadline: 0,
            seed: u64::MAX - 1,
            numbers: RequestNumbers { choices: 1, ..RequestNumbers::default() },
            attributes: &[("header.x-plan", "gold")],
        })
    }

    fn admission(call: AdmissionCall) -> Line {
        let (now, revision, generation) = (11, "a@1.0.0+00000000".into(), 2);
        Line::Admission(Box::new(AdmissionLine { now, call, revision, generation }))
    }

    fn admit(answer: Option<Verdict>) -> Line {
        let load = Load { in_flight: 3, in_flight_limit: 8, ..Load::default() };
        admission(AdmissionCall::Admit { request: door(), load, answer: answer.as_ref().map(VerdictSeen::from) })
    }

    fn retention(answer: Option<Ranking>) -> Line {
        Line::Retention(Box::new(RetentionLine {
            replica: "m:f16@cpu".into(),
            now: 3,
            wanted: 2,
            tenants: vec![(3, "t".into())],
            blocks: BlockColumns { prefix: vec![u64::MAX], depth: vec![0], tenant: vec![3], ..BlockColumns::default() },
            answer: answer.map(RankingSeen),
            revision: "k@1.0.0+00000000".into(),
            generation: 1,
        }))
    }

    fn sampler() -> Line {
        let word = |edit| WordSeen(Word::Edit(Arc::new(edit)));
        Line::Sampler(Box::new(SamplerLine {
            replica: "m:f16@cpu".into(),
            variant: "m:f16".into(),
            vocabulary: 100,
            now: 3,
            renewed: vec![(6, WordSeen(Word::Free))],
            started: vec![StartedSeen {
                id: 7,
                tenant: "t".into(),
                stop_tokens: vec![2],
                prompt_tokens: 5,
                max_new_tokens: 10,
                attributes: vec![("header.x-plan".into(), "gold".into())],
                said: vec![40],
            }],
            tokens: vec![(6, 40), (5, 41), (4, 42)],
            ended: vec![4],
            words: vec![
                (7, word(Edit::Allow([1, 2].into()))),
                (6, word(Edit::Bias([(9, -0.1)].into()))),
                (5, WordSeen(Word::Keep)),
                (4, WordSeen(Word::Leave)),
                (3, WordSeen(Word::End)),
            ],
            revision: "s@1.0.0+00000000".into(),
            generation: 1,
        }))
    }

    #[test]
    fn lines_are_read_back_as_they_were_written() {
        let rejection = Rejection { reason: Refusal::Quota, retry_after_ms: 5, message: "no".into() };
        let ending = EndingSeen {
            id: 7,
            tenant: 3,
            outcome: Outcome::Cancelled,
            prompt_tokens: 9,
            cached_tokens: 0,
            generated_tokens: 1,
            max_new_tokens: 4,
        };
        let settle = AdmissionCall::Settle { tenants: vec![(3, "t".into())], endings: vec![ending] };
        for (line, holds) in [
            (admit(None), r#"{"slot":"admission","now":11,"call":"admit","request":{"id":7,"model":"m""#),
            (admit(Some(Verdict::Accept)), r#""answer":{"accept":true},"revision":"a@1.0.0+00000000","generation":2}"#),
            (admit(Some(Verdict::AcceptAs(Priority::Low))), r#""answer":{"accept-as":"low"}"#),
            (admit(Some(Verdict::Reject(rejection))), r#""answer":{"reject":{"reason":"quota","retry_after_ms":5"#),
            (
                admission(settle),
                r#""call":"settle","tenants":[[3,"t"]],"endings":[{"id":7,"tenant":3,"outcome":"cancelled""#,
            ),
            (retention(None), r#"{"slot":"kv-retention","replica":"m:f16@cpu","now":3,"wanted":2,"tenants":[[3,"t"]]"#),
            (
                retention(Some(Ranking { evict: vec![], keep: vec![0] })),
                r#""prefix":[18446744073709551615],"depth":[0],"children":[]"#,
            ),
            (sampler(), r#""words":[[7,{"allow":[1,2]}],[6,{"bias":[[9,-0.1]]}],[5,"keep"],[4,"leave"],[3,"end"]]"#),
        ] {
            let text = serde_json::to_string(&line).expect("plain data");
            assert!(text.contains(holds), "{text}");
            assert_eq!(serde_json::from_str::<Line>(&text).expect("its own line"), line);
        }
    }
}
