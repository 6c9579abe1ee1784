//! `SamplerWorker` with a guest behind it: one instance and one thread per replica. The driver hands over what was sampled and
//! goes on to the next forward pass; the thread asks the guest and answers with words.
//!
//! A guest may keep a state per request, and its instance may go at any moment. So the thread remembers, for every request
//! that the guest has not left, how it started and which tokens it got, and tells a fresh instance all of it again: the new
//! guest, or the next generation, is where the old one was.
//!
//! A panic here is the host's own fault, and nobody may wait for its words for ever: the thread catches it, says of the batch
//! at hand what the slot's `on_fault` says, and goes on with a fresh instance. Should the thread be lost all the same, the port
//! says it in its place.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pointsman_sched::batch::Attention;
use pointsman_sched::ids::RequestId;
use pointsman_sched::sampler::{Batch, Edit, Overheard, Reply, SamplerWorker, Started, Word};
use pointsman_telemetry::Micros;

use crate::bindings::sampler::exports::pointsman::policy::sampler as wit;
use crate::config::{Budgets, OnFault};
use crate::fault::{Call, Fault, FaultKind};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::listener::{self, Listener, SamplerSample};
use crate::manifest::Wants;
use crate::resident::Resident;
use crate::shadow::{Case, Shadow};
use crate::slot::{Deciding, SlotCore, slot_by_core};
use crate::upload::World;

/// `world sampler-policy`.
pub(crate) struct SamplerHook;

/// The slot `sampler`.
#[derive(Debug)]
pub struct SamplerSlot {
    pub(crate) core: Arc<SlotCore<SamplerHook>>,
}

slot_by_core!(SamplerSlot);

/// What a sampler must know of the replica that it works for.
#[derive(Clone, Debug)]
pub struct SampledReplica {
    /// Its name, for threads and messages.
    pub name: Arc<str>,
    /// Id of its variant.
    pub variant: Arc<str>,
    /// Tokens in its vocabulary.
    pub vocabulary: u32,
}

/// The driver's end of a sampler thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct SamplerPort {
    core: Arc<SlotCore<SamplerHook>>,
    errands: SyncSender<Errand>,
    replies: Receiver<Reply>,
    /// The last generation, and question of whoever prepares the next one, that the thread was told to look at.
    seen: (u64, u64),
    /// How long a step waits for a reply.
    patience: Duration,
    /// Whose words the thread owes.
    owed: Vec<RequestId>,
    on_fault: OnFault,
    beside: Beside,
}

/// What a driver knows of the shadow of its replica.
#[derive(Debug)]
struct Beside {
    replica: SampledReplica,
    /// Whom it tells.
    shadow: Weak<Shadow<SamplerHook>>,
    /// Something was not told: the shadow is to forget the requests of this replica.
    is_lost: bool,
    /// Where the last edit of each request is, to tell whether the next one takes room of its own.
    edits: HashMap<u64, Option<usize>>,
}

#[derive(Debug)]
enum Errand {
    Batch(Batch),
    /// There may be another generation: let go of the old one.
    Look(Micros),
}

struct Thread {
    resident: Resident<SamplerHook>,
    replica: SampledReplica,
    /// Requests that the guest has not left, by id.
    live: BTreeMap<u64, Live>,
    /// Whether there is a guest to ask, as of the batch at hand.
    may_ask: bool,
}

struct Live {
    started: Started,
    tokens: Vec<u32>,
}

// === impl SamplerSlot ===

impl SamplerSlot {
    /// A worker for one more replica, on a thread of its own.
    ///
    /// # Errors
    /// The system refuses to start a thread.
    pub fn attach(&self, replica: SampledReplica) -> std::io::Result<SamplerPort> {
        // A batch and a nudge, or the next one's nudge.
        let (errands, inbox) = sync_channel(2);
        let (outbox, replies) = sync_channel(1);
        let name = format!("sampler-{}", replica.name);
        let beside = Beside::of(replica.clone());
        let resident = Resident::new(&self.core, &replica.name);
        let thread = Thread { resident, replica, live: BTreeMap::new(), may_ask: false };
        std::thread::Builder::new().name(name).spawn(move || thread.serve(&inbox, &outbox))?;
        Ok(SamplerPort::new(&self.core, (errands, replies), beside))
    }

    /// Lets no request go on here, as where a policy that fails closed cannot be brought back, until something is published.
    pub fn refuse(&self) {
        self.core.refuse();
    }

    /// Who says what requests may get.
    #[must_use]
    pub fn deciding(&self) -> Deciding {
        self.core.deciding_now()
    }

    /// Whether no request goes on here, because there is no policy that could say so.
    #[must_use]
    pub fn refuses(&self) -> bool {
        let generation = self.core.enter();
        generation.guest.is_none() && generation.on_fault == OnFault::Closed
    }
}

// === impl Beside ===

impl Beside {
    fn of(replica: SampledReplica) -> Self {
        Self { replica, shadow: Weak::new(), is_lost: false, edits: HashMap::new() }
    }

    fn follows(&self, shadow: &Shadow<SamplerHook>, request: RequestId) -> bool {
        shadow.case.samples(request.0) && (!self.is_lost || shadow.case.is_at_leisure())
    }

    /// Whether it was told.
    fn tell(&mut self, shadow: &Arc<Shadow<SamplerHook>>, heard: Overheard) -> bool {
        if !std::ptr::eq(self.shadow.as_ptr(), Arc::as_ptr(shadow)) {
            // It knows nothing of what was followed for another one, and leaves that alone.
            (self.shadow, self.is_lost) = (Arc::downgrade(shadow), false);
            self.edits.clear();
        }
        let (n_chosen, n_ids) = (heard.chosen.len() as u64, self.n_ids(&heard));
        let (replica, fresh) = (self.replica.clone(), self.is_lost);
        let told = shadow.offer(n_ids, || SamplerSample { replica, fresh, heard });
        self.is_lost = !told;
        if !told {
            self.edits.clear();
            shadow.case.drop_some(n_chosen);
        }
        told
    }

    /// Numbers in a copy, those of an edit once.
    fn n_ids(&mut self, heard: &Overheard) -> usize {
        let mut n_ids = heard.started.len() + heard.chosen.len() + heard.ended.len();
        for chosen in &heard.chosen {
            let place = chosen.edit.as_ref().map(|edit| Arc::as_ptr(edit).addr());
            if self.edits.insert(chosen.request.0, place) != Some(place) {
                n_ids += chosen.edit.as_deref().map_or(0, n_tokens);
            }
        }
        for id in &heard.ended {
            self.edits.remove(&id.0);
        }
        n_ids
    }
}

fn n_tokens(edit: &Edit) -> usize {
    match edit {
        Edit::Allow(tokens) | Edit::Forbid(tokens) => tokens.len(),
        Edit::Bias(biases) => biases.len(),
        Edit::Only(_) => 0,
    }
}

// === impl SamplerPort ===

impl SamplerPort {
    fn new(
        core: &Arc<SlotCore<SamplerHook>>,
        (errands, replies): (SyncSender<Errand>, Receiver<Reply>),
        beside: Beside,
    ) -> Self {
        // A batch is up to four calls, whose limits count the guest's own time and not that of others on its processor.
        let patience = Duration::from_micros(core.shared.config.budgets.edit.hard.saturating_mul(4));
        let (core, owed, on_fault) = (Arc::clone(core), Vec::new(), OnFault::Open);
        Self { core, errands, replies, seen: (0, 0), patience, owed, on_fault, beside }
    }

    /// What is said in the place of a thread that is lost.
    fn instead(&mut self) -> Reply {
        let word = forsaken(self.on_fault);
        Reply { words: self.owed.drain(..).map(|id| (id, word.clone())).collect(), ..Reply::default() }
    }
}

/// What holds for a request whose words are lost, by a fault of the host: nobody knows what it was to get.
fn forsaken(on_fault: OnFault) -> Word {
    match on_fault {
        OnFault::Open => Word::Leave,
        OnFault::Closed => Word::End,
    }
}

impl SamplerWorker for SamplerPort {
    fn attend(&mut self, now: Micros) -> Option<u64> {
        let generation = self.core.enter();
        let asked = generation.guest.as_ref().map_or(0, |guest| guest.questions.asked());
        if (generation.number(), asked) != self.seen {
            self.seen = (generation.number(), asked);
            // When the inbox is full, what is in it makes the thread look.
            let _ = self.errands.try_send(Errand::Look(now));
        }
        self.on_fault = generation.on_fault;
        let has_say = generation.guest.is_some() || generation.on_fault == OnFault::Closed;
        has_say.then_some(self.seen.0)
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        self.owed.clear();
        self.owed.extend(batch.owed());
        match self.errands.try_send(Errand::Batch(batch)) {
            Err(TrySendError::Full(Errand::Batch(batch))) => Err(batch),
            // Where the thread is lost, what it owes is said when it is asked for.
            Ok(()) | Err(TrySendError::Disconnected(_) | TrySendError::Full(Errand::Look(_))) => Ok(()),
        }
    }

    fn poll(&mut self) -> Option<Reply> {
        match self.replies.try_recv() {
            Ok(reply) => Some(reply),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(self.instead()),
        }
    }

    fn wait(&mut self) -> Option<Reply> {
        match self.replies.recv_timeout(self.patience) {
            Ok(reply) => Some(reply),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.instead()),
        }
    }

    fn follows(&self, request: RequestId) -> bool {
        self.core.shadowed().is_some_and(|shadow| self.beside.follows(&shadow, request))
    }

    fn overhear(&mut self, heard: Overheard) -> bool {
        let Some(shadow) = self.core.shadowed() else {
            self.beside.is_lost = true;
            self.beside.edits.clear();
            return false;
        };
        self.beside.tell(&shadow, heard)
    }
}

// === impl Thread ===

/// `None` for a panic, which the panic hook has told of.
fn caught<R>(work: impl FnOnce() -> R) -> Option<R> {
    // What a panic leaves half done is thrown away: the instance, and what is known of the requests at hand.
    catch_unwind(AssertUnwindSafe(work)).ok()
}

impl Thread {
    /// Works until the port is dropped.
    fn serve(mut self, inbox: &Receiver<Errand>, outbox: &SyncSender<Reply>) {
        for errand in inbox {
            let is_well = match errand {
                Errand::Look(now) => caught(|| self.attend(now)).is_some(),
                Errand::Batch(batch) => {
                    let reply = caught(|| self.work(&batch));
                    let is_well = reply.is_some();
                    let reply = reply.unwrap_or_else(|| self.forsake(&batch));
                    if outbox.send(Reply { spent: batch, ..reply }).is_err() {
                        break;
                    }
                    is_well
                }
            };
            if !is_well {
                tracing::error!(target: "policy", slot = &*self.resident.core.name, replica = &*self.replica.name,
                    "the host failed while it asked the policy; a fresh instance goes on");
                self.resident.fell_back();
                self.resident.let_go();
            }
        }
    }

    /// The words of a batch at which the host failed. Nobody knows how far it came, so its requests are forgotten.
    fn forsake(&mut self, batch: &Batch) -> Reply {
        if batch.fresh {
            self.live.clear();
        }
        batch.owed().chain(batch.ended.iter().copied()).for_each(|id| drop(self.live.remove(&id.0)));
        let generation = self.resident.core.enter();
        let (word, is_forgotten) = (forsaken(generation.on_fault), generation.serves_without());
        Reply { words: batch.owed().map(|id| (id, word.clone())).collect(), is_forgotten, ..Reply::default() }
    }

    /// Everything that a batch is owed.
    fn work(&mut self, batch: &Batch) -> Reply {
        let now = batch.now;
        let mut reply = Reply::default();
        let attention = self.attend(now);
        self.may_ask = attention != Attention::Native;
        if batch.fresh {
            let gone: Vec<RequestId> = self.live.keys().map(|&id| RequestId(id)).collect();
            if attention == Attention::Following { self.end(now, &gone) } else { self.live.clear() }
        }
        match attention {
            Attention::Native if self.resident.guest().is_none() => self.live.clear(),
            Attention::NeedsView => self.tell_again(now, &mut reply),
            Attention::Native | Attention::Following | Attention::Busy => {}
        }
        self.take_in(now, &batch.started, &mut reply.words);
        self.round(now, &batch.tokens, &mut reply.words);
        // An instance that fails is replaced at once, if there is a spare: nobody suffers because the first one was unlucky.
        if self.may_ask && !self.resident.synced && self.attend(now) == Attention::NeedsView {
            self.tell_again(now, &mut reply);
        }
        self.end(now, &batch.ended);
        reply.is_forgotten = self.resident.generation.serves_without();
        reply.decided_by = self.resident.guest().is_some().then(|| self.resident.decided_by().clone());
        reply
    }

    /// Attends. A guest that is left is told first that all requests have ended for it: what it has learned is kept for when it
    /// comes back, as another arm or after safe mode, and what it knew of requests is not true any more by then.
    fn attend(&mut self, now: Micros) -> Attention {
        if self.resident.is_outdated() && self.resident.synced && !self.live.is_empty() {
            let ids: Vec<u64> = self.live.keys().copied().collect();
            self.call_ended(now, &ids);
        }
        self.resident.attend(now)
    }

    /// Requests that start, or that ran before there was this guest.
    fn take_in(&mut self, now: Micros, started: &[Started], words: &mut Vec<(RequestId, Word)>) {
        for one in started {
            let mut tokens = Vec::with_capacity(one.max_new_tokens as usize);
            tokens.extend_from_slice(&one.said);
            self.live.insert(one.id.0, Live { started: one.clone(), tokens });
        }
        words.extend(self.tell(now, &started.iter().map(|one| one.id.0).collect::<Vec<_>>()));
    }

    /// One token each of several requests.
    fn round(&mut self, now: Micros, round: &[(RequestId, u32)], words: &mut Vec<(RequestId, Word)>) {
        let mut known = Vec::with_capacity(round.len());
        for &(id, token) in round {
            match self.live.get_mut(&id.0) {
                Some(live) => {
                    live.tokens.push(token);
                    known.push((id, token));
                }
                None => words.push((id, Word::Leave)),
            }
        }
        let answer = self.next(now, &known);
        for ((id, _), word) in known.into_iter().zip(answer) {
            if word == Word::Leave {
                self.live.remove(&id.0);
            }
            words.push((id, word));
        }
    }

    /// Tells a fresh instance of all requests that live. Its words stand before those of the one before it.
    fn tell_again(&mut self, now: Micros, reply: &mut Reply) {
        let ids: Vec<u64> = self.live.keys().copied().collect();
        let renewed = self.tell(now, &ids);
        if self.resident.synced {
            reply.renewed = renewed;
            let stale = reply.words.iter_mut().map(|(_, word)| word).filter(|word| **word != Word::Leave);
            stale.for_each(|word| *word = Word::Keep);
        }
    }

    /// Tells the guest how requests started and, token by token, what they got since; its last word on each, in their order.
    /// One that fails on the way has said nothing of any.
    fn tell(&mut self, now: Micros, ids: &[u64]) -> Vec<(RequestId, Word)> {
        let started: Vec<Started> = ids.iter().filter_map(|id| Some(self.live.get(id)?.started.clone())).collect();
        let mut last: BTreeMap<u64, Word> = BTreeMap::new();
        let words = self.start(now, &started);
        // To keep what nobody has said is to be free.
        let word = |word| if word == Word::Keep { Word::Free } else { word };
        last.extend(started.iter().map(|started| started.id.0).zip(words.into_iter().map(word)));
        let longest = ids.iter().filter_map(|id| Some(self.live.get(id)?.tokens.len())).max().unwrap_or(0);
        for i in 0..longest {
            if !self.resident.synced {
                break;
            }
            let stays = ids.iter().filter(|id| last.get(id).is_some_and(|word| *word != Word::Leave));
            let token = |id: &u64| Some((RequestId(*id), *self.live.get(id)?.tokens.get(i)?));
            let round: Vec<(RequestId, u32)> = stays.filter_map(token).collect();
            for ((id, _), word) in round.iter().zip(self.next(now, &round)) {
                if word != Word::Keep {
                    last.insert(id.0, word);
                }
            }
        }
        if !self.resident.synced {
            return ids.iter().map(|&id| (RequestId(id), self.unanswered())).collect();
        }
        self.live.retain(|id, _| last.get(id) != Some(&Word::Leave));
        ids.iter().filter_map(|id| Some((RequestId(*id), last.remove(id)?))).collect()
    }

    /// The guest's words on requests that start.
    fn start(&mut self, now: Micros, started: &[Started]) -> Vec<Word> {
        if started.is_empty() {
            return Vec::new();
        }
        let (replica, wanted) = (self.replica.clone(), self.resident.wanted_attributes().to_vec());
        let start =
            |instance: &mut Instance<SamplerHook>, hard| start(instance, (hard, now), (&replica, &wanted), started);
        self.ask(Call::Start, now, started.len(), start)
    }

    fn next(&mut self, now: Micros, round: &[(RequestId, u32)]) -> Vec<Word> {
        if round.is_empty() {
            return Vec::new();
        }
        let vocabulary = self.replica.vocabulary;
        self.ask(Call::Next, now, round.len(), |instance, hard| next(instance, (hard, now), vocabulary, round))
    }

    /// `n` words: the guest's, or what holds without an answer.
    fn ask(
        &mut self,
        call: Call,
        now: Micros,
        n: usize,
        work: impl FnOnce(&mut Instance<SamplerHook>, Micros) -> Result<Vec<Word>, Fault>,
    ) -> Vec<Word> {
        let budget = self.resident.budgets().edit;
        let answer = if self.may_ask { self.resident.call(call, now, budget, work) } else { None };
        self.resident.synced = answer.is_some();
        answer.unwrap_or_else(|| {
            // It has missed something: what it knows of requests is not true any more.
            self.resident.let_go();
            self.resident.fell_back();
            vec![self.unanswered(); n]
        })
    }

    /// What holds for a request of which the guest has said nothing: it keeps what it has (nothing, where it starts), or ends.
    fn unanswered(&self) -> Word {
        if self.resident.generation.on_fault == OnFault::Closed { Word::End } else { Word::Keep }
    }

    fn end(&mut self, now: Micros, ended: &[RequestId]) {
        let ids: Vec<u64> = ended.iter().map(|id| id.0).filter(|id| self.live.remove(id).is_some()).collect();
        if !ids.is_empty() && self.may_ask {
            self.call_ended(now, &ids);
        }
    }

    fn call_ended(&mut self, now: Micros, ids: &[u64]) {
        let budget = self.resident.budgets().edit;
        let told =
            self.resident.call(Call::Ended, now, budget, |instance, hard| ended_call(instance, (hard, now), ids));
        if told.is_none() {
            self.resident.let_go();
        }
    }
}

// === calls ===

pub(crate) fn start(
    instance: &mut Instance<SamplerHook>,
    (hard, now): (Micros, Micros),
    (replica, wanted): (&SampledReplica, &[String]),
    started: &[Started],
) -> Result<Vec<Word>, Fault> {
    let texts: Vec<Vec<(&str, &str)>> = started.iter().map(|started| started.texts(wanted)).collect();
    let requests: Vec<wit::Request<'_>> = started
        .iter()
        .zip(&texts)
        .map(|(started, texts)| wit::Request {
            id: started.id.0,
            tenant: &started.tenant,
            variant: &replica.variant,
            vocabulary: replica.vocabulary,
            stop_tokens: &started.stop_tokens,
            prompt_tokens: started.prompt_tokens,
            max_new_tokens: started.max_new_tokens,
            attributes: texts,
        })
        .collect();
    let edits =
        instance.call(hard, now, |guest, store| guest.pointsman_policy_sampler().call_start(store, now, &requests))?;
    lift(edits, started.len(), replica.vocabulary)
}

pub(crate) fn next(
    instance: &mut Instance<SamplerHook>,
    (hard, now): (Micros, Micros),
    vocabulary: u32,
    round: &[(RequestId, u32)],
) -> Result<Vec<Word>, Fault> {
    let ids: Vec<u64> = round.iter().map(|(id, _)| id.0).collect();
    let tokens: Vec<u32> = round.iter().map(|(_, token)| *token).collect();
    let edits = instance
        .call(hard, now, |guest, store| guest.pointsman_policy_sampler().call_next(store, now, &ids, &tokens))?;
    lift(edits, round.len(), vocabulary)
}

pub(crate) fn ended_call(
    instance: &mut Instance<SamplerHook>,
    (hard, now): (Micros, Micros),
    ids: &[u64],
) -> Result<(), Fault> {
    instance.call(hard, now, |guest, store| guest.pointsman_policy_sampler().call_ended(store, ids))
}

/// Checks an answer as a whole.
fn lift(edits: Vec<wit::Edit>, n: usize, vocabulary: u32) -> Result<Vec<Word>, Fault> {
    let bad = |text: String| Fault::new(FaultKind::BadAnswer, text);
    if edits.len() != n {
        return Err(bad(format!("{} edits for {n} requests; answer one each, in order", edits.len())));
    }
    let word = |edit| {
        Ok(match edit {
            wit::Edit::Leave => Word::Leave,
            wit::Edit::Keep => Word::Keep,
            wit::Edit::Free => Word::Free,
            wit::Edit::Allow(tokens) => Word::Edit(Arc::new(Edit::allow(tokens, vocabulary)?)),
            wit::Edit::Forbid(tokens) => Word::Edit(Arc::new(Edit::forbid(tokens, vocabulary)?)),
            wit::Edit::Bias(biases) => Word::Edit(Arc::new(Edit::bias(biases, vocabulary)?)),
        })
    };
    let words: Result<_, pointsman_sched::sampler::BadEdit> = edits.into_iter().map(word).collect();
    words.map_err(|why| bad(why.to_string()))
}

// === probe ===

impl Hook for SamplerHook {
    const WORLD: World = World::Sampler;
    const MAX_ANSWER_BYTES: usize = 8 << 20;
    type Local = ();
    const DIFFERENCES: &'static [&'static str] = &["would-edit", "would-free", "other-edit"];
    hook_bindings!(Sampler, sampler, SamplerIndices, Sampler, SamplerSample, Option<Listener>, ());

    fn shadow(case: &Case<Self>, listener: &mut Option<Listener>, sample: SamplerSample) {
        listener::hear(case, listener, &sample);
    }

    fn shadow_paused(case: &Case<Self>, listener: &mut Option<Listener>, sample: SamplerSample) {
        case.skipped(listener, sample.heard.chosen.len() as u64);
    }

    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        let clock = (budgets.edit.hard, now);
        let replica = SampledReplica { name: "probe".into(), variant: "probe:f16".into(), vocabulary: 32_000 };
        let started = probe_requests(wants);
        let case = "two requests start";
        let words = start(instance, clock, (&replica, &wants.attributes), &started).map_err(|fault| ProbeFault {
            case,
            call: Call::Start,
            fault,
        })?;
        let mut live: Vec<RequestId> = started.iter().map(|started| started.id).collect();
        let stays = |live: Vec<RequestId>, words: Vec<Word>| -> Vec<RequestId> {
            live.into_iter().zip(words).filter(|(_, word)| *word != Word::Leave).map(|(id, _)| id).collect()
        };
        live = stays(live, words);
        for token in [7, 8] {
            let round: Vec<(RequestId, u32)> = live.iter().map(|&id| (id, token)).collect();
            let case = "each gets a token";
            let words = next(instance, clock, replica.vocabulary, &round).map_err(|fault| ProbeFault {
                case,
                call: Call::Next,
                fault,
            })?;
            live = stays(live, words);
        }
        let ids: Vec<u64> = live.iter().map(|id| id.0).collect();
        ended_call(instance, clock, &ids).map_err(|fault| ProbeFault { case: "they end", call: Call::Ended, fault })
    }

    /// Nobody starts, gets a token or ends: no trace.
    fn warm(instance: &mut Instance<Self>, _wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), Fault> {
        let clock = (budgets.edit.hard, now);
        next(instance, clock, 1, &[])?;
        ended_call(instance, clock, &[])
    }
}

fn probe_requests(wants: &Wants) -> [Started; 2] {
    let attributes: Arc<[_]> = wants.attributes.iter().map(|name| (name.clone(), "probe".to_owned())).collect();
    let request = |id, tenant: &str| Started {
        id: RequestId(id),
        tenant: tenant.into(),
        stop_tokens: Arc::from([2]),
        prompt_tokens: 5,
        max_new_tokens: 10,
        attributes: Arc::clone(&attributes),
        said: Vec::new(),
    };
    [request(1, "probe"), request(2, "other")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_lost_leaves_nobody_waiting() {
        let (metrics, recorder) = (pointsman_telemetry::Metrics::new(), pointsman_telemetry::Recorder::new(8));
        let config = crate::config::RuntimeConfig::default();
        let runtime = crate::runtime::Runtime::new(config, Arc::new(metrics), recorder, Arc::new(|| 1_u64));
        let slot = runtime.unwrap().sampler_slot("sampler");
        let batch = |tokens: &[u64]| Batch {
            tokens: tokens.iter().map(|&id| (RequestId(id), 5)).collect(),
            ended: vec![RequestId(9)],
            ..Batch::default()
        };
        for (on_fault, expect) in [(OnFault::Open, Word::Leave), (OnFault::Closed, Word::End)] {
            let (errands, inbox) = sync_channel(2);
            let (outbox, replies) = sync_channel(1);
            let replica = SampledReplica { name: "r".into(), variant: "v".into(), vocabulary: 8 };
            let mut port = SamplerPort::new(&slot.core, (errands, replies), Beside::of(replica));
            port.on_fault = on_fault;
            // The first with a batch in its hands, the others by then.
            port.send(batch(&[1, 2])).unwrap();
            assert_eq!(port.poll().map(|reply| reply.words), None, "{on_fault:?}: it works");
            drop((inbox.recv(), inbox, outbox));
            for ids in [vec![1, 2], vec![3], vec![]] {
                if ids != [1, 2] {
                    port.send(batch(&ids)).unwrap();
                }
                let said = if ids == [3] { port.poll() } else { port.wait() };
                let expect: Vec<_> = ids.into_iter().map(|id| (RequestId(id), expect.clone())).collect();
                assert_eq!(said.map(|reply| reply.words), Some(expect), "{on_fault:?}");
            }
        }
    }

    #[test]
    fn an_answer_is_good_as_a_whole() {
        use wit::Edit::{Allow, Bias, Forbid, Free, Keep, Leave};
        let words = lift(vec![Leave, Keep, Free, Allow(vec![3, 1, 3]), Forbid(vec![])], 5, 10).unwrap();
        assert_eq!(words[3], Word::Edit(Arc::new(Edit::Allow([1, 3].into()))));
        for (edits, n, expect) in [
            (vec![Keep], 2, "1 edits for 2 requests"),
            (vec![Keep, Allow(vec![])], 2, "names no token"),
            (vec![Allow(vec![10])], 1, "token 10 is not in the vocabulary of 10"),
            (vec![Forbid(vec![0, 99])], 1, "token 99"),
            (vec![Bias(vec![(1, f32::NAN)])], 1, "must be finite"),
        ] {
            let fault = lift(edits, n, 10).unwrap_err();
            assert_eq!(fault.kind, FaultKind::BadAnswer);
            assert!(fault.message.contains(expect), "{}", fault.message);
        }
    }
}
