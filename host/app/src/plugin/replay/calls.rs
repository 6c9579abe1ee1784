//! Recorded calls of admission, retention and sampler policies, asked again.
//!
//! What such a policy remembers comes from earlier calls, so everything that its slot was told is told again, in the numbers
//! and names of this process: tenants are numbered anew, and a policy hears of the ends of those requests that it let in
//! itself. Edits are compared by what holds for a request after the batch: `keep` means another thing after another edit.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use pointsman_policy::{
    AdmissionSlot, RetentionGuest, RetentionSlot, Runtime, SampledReplica, SamplerPort, SamplerSlot,
};
use pointsman_sched::admit::{Accepted, AdmitPolicy, AdmitRequest, Ending, Load, Verdict};
use pointsman_sched::batch::Attention;
use pointsman_sched::ids::{Micros, RequestId};
use pointsman_sched::retention::{BlockColumns, Ranking, RetentionPolicy, check_ranking};
use pointsman_sched::route::Refusal;
use pointsman_sched::sampler::{Batch, SamplerWorker, Started, Word};
use pointsman_server::admin::wire::calls::{
    AdmissionCall, AdmissionLine, DoorSeen, EndingSeen, RetentionLine, SamplerLine, StartedSeen, WordSeen,
};
use pointsman_telemetry::{NameKind, Names};
use serde_json::{Value, json};

use super::{Decision, ids};

/// Waits of a sampler's port, of tens of milliseconds each, for a reply.
const PATIENCE: u32 = 1_000;

/// The slots of one side, and what their policies were told.
#[derive(Debug)]
pub(super) struct Calls {
    /// Slot `admission`.
    pub admission: Arc<AdmissionSlot>,
    /// Slot `kv-retention`.
    pub retention: Arc<RetentionSlot>,
    /// Slot `sampler`.
    pub sampler: Arc<SamplerSlot>,
    tenants: Arc<Names>,
    inside: HashMap<u64, Accepted>,
    caches: HashMap<String, Cache>,
    ports: HashMap<String, SamplerPort>,
    held: Held,
}

/// The retention guest of a replica of the recording.
#[derive(Debug)]
struct Cache {
    guest: RetentionGuest,
    /// Tenants whose names it knows.
    named: BTreeSet<u32>,
}

/// The edits that hold, by replica and request; a request without one is not there.
#[derive(Debug, Default)]
pub(super) struct Held(HashMap<String, HashMap<u64, Value>>);

// === impl Calls ===

impl Calls {
    pub(super) fn new(runtime: &Runtime) -> Self {
        Self {
            admission: runtime.admission_slot("admission"),
            retention: runtime.retention_slot("kv-retention"),
            sampler: runtime.sampler_slot("sampler"),
            tenants: Arc::default(),
            inside: HashMap::new(),
            caches: HashMap::new(),
            ports: HashMap::new(),
            held: Held::default(),
        }
    }

    /// A call of the admission policy; its decision if it was about a request. The outer one is none where nothing is decided.
    pub(super) fn admission(&mut self, line: &AdmissionLine) -> Option<Option<Decision>> {
        match &line.call {
            AdmissionCall::Admit { request, load, .. } => Some(self.admit(line.now, request, load)),
            AdmissionCall::Settle { tenants, endings } => {
                self.settle(line.now, tenants, endings);
                None
            }
        }
    }

    fn admit(&mut self, now: Micros, seen: &DoorSeen, load: &Load) -> Option<Decision> {
        let texts = seen.texts();
        let tenant_id = self.tenants.intern(NameKind::Tenant, &seen.tenant);
        let judged = self.admission.admit(now, &AdmitRequest { tenant_id, ..seen.lend(&texts) }, load);
        self.inside.extend(judged.accepted(now).map(|accepted| (seen.id, accepted)));
        judged.fallback.is_none().then(|| judge(judged.verdict.as_ref()))
    }

    fn settle(&mut self, now: Micros, names: &[(u32, String)], endings: &[EndingSeen]) {
        for seen in endings {
            let Some(accepted) = self.inside.remove(&seen.id) else { continue };
            let name = names.iter().find(|(number, _)| *number == seen.tenant).map_or("", |(_, name)| name);
            let EndingSeen { outcome, prompt_tokens, cached_tokens, generated_tokens, max_new_tokens, .. } = *seen;
            let tenant = self.tenants.intern(NameKind::Tenant, name);
            let id = RequestId(seen.id);
            self.admission.ended(Ending {
                id,
                tenant,
                outcome,
                prompt_tokens,
                cached_tokens,
                generated_tokens,
                max_new_tokens,
                accepted,
                shadow: 0,
            });
        }
        self.admission.settle(now, &self.tenants, &mut |_, _| ());
    }

    /// A ranking of cached blocks; none for a fault.
    pub(super) fn rank(&mut self, line: &RetentionLine) -> Option<Decision> {
        let attach = || Cache { guest: self.retention.attach(&line.replica.as_str().into()), named: BTreeSet::new() };
        let Cache { guest, named } = self.caches.entry(line.replica.clone()).or_insert_with(attach);
        match guest.attend(line.now) {
            Attention::Native | Attention::Busy => return None,
            Attention::NeedsView => named.clear(),
            Attention::Following => {}
        }
        let news = line.tenants.iter().filter(|(number, _)| named.insert(*number));
        let new_tenants = news.map(|(number, name)| (*number, name.as_str().into())).collect();
        let blocks = BlockColumns { new_tenants, ..line.blocks.clone() };
        let mut ranking = Ranking::default();
        if !guest.rank(line.now, line.wanted, &blocks, &mut ranking) {
            return (guest.attend(line.now) == Attention::Following).then(|| rank(None, line));
        }
        match check_ranking(&ranking, blocks.len(), &mut Vec::new()) {
            Ok(()) => Some(rank(Some(&ranking), line)),
            Err(why) => {
                guest.refused(line.now, why);
                None
            }
        }
    }

    /// A batch of a sampler; none for a fault.
    pub(super) fn sample(&mut self, line: &SamplerLine) -> Option<Decision> {
        let port = match self.ports.entry(line.replica.clone()) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(
                self.sampler
                    .attach(SampledReplica {
                        name: line.replica.as_str().into(),
                        variant: line.variant.as_str().into(),
                        vocabulary: line.vocabulary,
                    })
                    .ok()?,
            ),
        };
        let fallbacks = || pointsman_policy::Slot::status(&*self.sampler).fallbacks;
        let before = fallbacks();
        port.attend(line.now)?;
        port.send(batch(line)).ok()?;
        let reply = (0..PATIENCE).find_map(|_| port.wait())?;
        let words = reply.renewed.iter().chain(&reply.words).map(|(id, word)| (id.0, word));
        let decision = self.held.speak(line, words);
        (fallbacks() == before).then_some(decision)
    }
}

fn batch(line: &SamplerLine) -> Batch {
    let started = |seen: &StartedSeen| Started {
        id: RequestId(seen.id),
        tenant: seen.tenant.as_str().into(),
        stop_tokens: seen.stop_tokens.as_slice().into(),
        prompt_tokens: seen.prompt_tokens,
        max_new_tokens: seen.max_new_tokens,
        attributes: seen.attributes.as_slice().into(),
        said: seen.said.clone(),
    };
    Batch {
        now: line.now,
        started: line.started.iter().map(started).collect(),
        tokens: line.tokens.iter().map(|&(id, token)| (RequestId(id), token)).collect(),
        ended: line.ended.iter().copied().map(RequestId).collect(),
        fresh: false,
    }
}

// === what answers come to ===

/// A verdict; none where nobody gave one, and the request entered as it was.
pub(super) fn judge(verdict: Option<&Verdict>) -> Decision {
    match verdict {
        None | Some(Verdict::Accept) => Decision { said: "accept".into(), comes_to: json!("accept") },
        Some(Verdict::AcceptAs(priority)) => {
            let said = format!("accept as {}", format!("{priority:?}").to_lowercase());
            Decision { comes_to: json!(said), said }
        }
        Some(Verdict::Reject(rejection)) => {
            let reason = match rejection.reason {
                Refusal::Overloaded => "overloaded",
                Refusal::Quota => "quota",
                Refusal::NotAllowed => "not-allowed",
                Refusal::CannotMeetDeadline => "cannot-meet-deadline",
            };
            Decision {
                said: format!("reject, {reason}: {}", rejection.message),
                comes_to: json!(format!("reject, {reason}")),
            }
        }
    }
}

/// A ranking; none for the host's order. It comes to the rows that go first, as many as the host wants.
pub(super) fn rank(ranking: Option<&Ranking>, line: &RetentionLine) -> Decision {
    let (evict, keep) = ranking.map_or((&[][..], &[][..]), |ranking| (&ranking.evict, &ranking.keep));
    let named: BTreeSet<u32> = evict.iter().chain(keep).copied().collect();
    let rows = u32::try_from(line.blocks.len()).unwrap_or(u32::MAX);
    let order = evict.iter().copied().chain((0..rows).filter(|row| !named.contains(row))).chain(keep.iter().copied());
    let first: Vec<u32> = order.take(line.wanted as usize).collect();
    let list = |rows: &[u32]| ids(rows.iter().copied().map(u64::from).collect());
    let said = match (evict, keep) {
        ([], []) => "the host's order".to_owned(),
        ([], keep) => format!("keep {}", list(keep)),
        (evict, []) => format!("evict {}", list(evict)),
        (evict, keep) => format!("evict {} keep {}", list(evict), list(keep)),
    };
    Decision { said, comes_to: json!(first) }
}

impl Held {
    /// What the words of a batch come to: the edit of each request that it is about, null for none.
    pub(super) fn speak<'a>(&mut self, line: &SamplerLine, words: impl Iterator<Item = (u64, &'a Word)>) -> Decision {
        let held = self.0.entry(line.replica.clone()).or_default();
        let mut about: BTreeMap<u64, Value> = BTreeMap::new();
        let [mut free, mut edited] = [0_usize; 2];
        for (id, word) in words {
            match word {
                Word::Leave | Word::Free => drop(held.remove(&id)),
                Word::Keep => {}
                Word::End => drop(held.insert(id, json!({ "end": [] }))),
                Word::Edit(_) => drop(held.insert(id, json!(WordSeen(word.clone())))),
            }
            about.insert(id, held.get(&id).cloned().unwrap_or_default());
        }
        let mut shown = Vec::new();
        for (id, edit) in &about {
            match edit.as_object().and_then(|edit| edit.iter().next()) {
                Some((kind, tokens)) => {
                    edited += 1;
                    shown.push(format!("{id} {kind} {}", tokens.as_array().map_or(0, Vec::len)));
                }
                None => free += 1,
            }
        }
        line.ended.iter().for_each(|id| drop(held.remove(id)));
        let list = if shown.is_empty() { String::new() } else { format!(": {}", shown.join(", ")) };
        Decision { said: format!("{free} free, {edited} edited{list}"), comes_to: json!(about) }
    }
}

/// No edits, as without a sampler.
pub(super) fn unedited(line: &SamplerLine) -> Decision {
    Held::default().speak(line, line.words.iter().map(|(id, _)| (*id, &Word::Free)))
}
