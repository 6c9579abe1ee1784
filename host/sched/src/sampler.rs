//! The seam to sampler policies: which tokens a request may get next. Mirrors `interface sampler` of wit/policy.wit.
//!
//! A policy's answer to a token is an edit of the next token's logits, and the device is busy for milliseconds in between. So
//! the policy works on a thread of its own ([`SamplerWorker`]) while the forward pass runs, and the executor asks for the
//! edits ([`EditSource`]) only when the logits are there. [`Desk`] keeps the books in between: who is of interest, which
//! words are still owed, and which edit holds. It is handed tokens that were sampled and nothing else, so no policy sees a
//! placeholder; and a request of no interest, or a host without a sampler, costs one look at an empty map.
//!
//! A request whose word is late beyond the worker's bound gets no token in this step: what was chosen for it is thrown away and
//! its last position is computed again in the next one. So no token is ever chosen before the policy has spoken, or failed to:
//! a word that is lost with its guest leaves the request with the edit that it had, or ends it, as the slot says. Not a call in
//! the middle of the step, and no wait without a bound: one slow policy would then stand in the way of every request of the
//! device.
//!
//! Whoever listens beside the policy (a shadow) is told once per step of the requests that it follows: of their tokens and of the
//! edits that held for them. Nothing is owed to it and nothing waits for it, and it hears also of requests of which the policy
//! hears nothing.

use std::sync::Arc;
use std::time::Duration;

use crate::execute::{StepOutput, StepPlan};
use crate::hash::{IntMap, IntSet};
use crate::ids::{Micros, RequestId};
use crate::mask::{TokenMask, TokenSet, combine};
use crate::request::{Failure, Request};
use crate::route::DecidedBy;
use crate::scheduler::Scheduler;

/// A mask usually takes less than the forward pass. A step waits for those that do not, whatever their number, so many times...
const WAITS: u32 = 8;
/// ... so long: a millisecond in all.
const WAIT: Duration = Duration::from_micros(125);
/// How long a replica computes nothing because every mask is late. Then it tries, which looks at deadlines and at clients that
/// have gone as well.
const STALL: Micros = 100_000;

/// What is done to a request's logits before a token is chosen. Tokens are ascending, and below the vocabulary's size.
#[derive(Clone, Debug, PartialEq)]
pub enum Edit {
    /// Only these tokens, each once, at least one.
    Allow(Box<[u32]>),
    /// Not these tokens, each once.
    Forbid(Box<[u32]>),
    /// These are added to the logits of their tokens; each finite.
    Bias(Box<[(u32, f32)]>),
    /// Only the tokens of this set, at least one: what a request's own mask says.
    Only(TokenSet),
}

/// Why an edit was refused; the policy's fault.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum BadEdit {
    /// Nothing would be left to choose from.
    #[error("`allow` names no token; name at least one, or use `free`")]
    AllowsNothing,
    /// A token that does not exist.
    #[error("token {token} is not in the vocabulary of {vocabulary} tokens")]
    NoSuchToken {
        /// The token.
        token: u32,
        /// How many there are.
        vocabulary: u32,
    },
    /// A bias that is no number.
    #[error("the bias of token {token} is {bias}; it must be finite")]
    NotFinite {
        /// The token.
        token: u32,
        /// Its bias.
        bias: f32,
    },
}

/// What a policy says of one request after a start or a token.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// No interest: it is sampled freely and not shown again.
    Leave,
    /// The edit that it has holds on.
    Keep,
    /// Nothing is limited or biased now.
    Free,
    /// This holds now.
    Edit(Arc<Edit>),
    /// Nobody could say, and it may not go on without: it gets no more token, and [is ended](Desk::take_failed).
    End,
}

/// A request that starts, as a sampler sees it; see `record request` of the interface.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of the interface's `record request`, documented there")]
pub struct Started {
    pub id: RequestId,
    pub tenant: Arc<str>,
    pub stop_tokens: Arc<[u32]>,
    pub prompt_tokens: u32,
    pub max_new_tokens: u32,
    pub attributes: Arc<[(String, String)]>,
    /// Tokens that it has got already: it ran before there was this policy.
    pub said: Vec<u32>,
}

/// What happened since the last batch, in the order of the fields.
#[derive(Debug, Default)]
pub struct Batch {
    /// When it was handed over.
    pub now: Micros,
    /// Requests that start to generate. Each is owed a word.
    pub started: Vec<Started>,
    /// Tokens that were sampled. Each is owed a word.
    pub tokens: Vec<(RequestId, u32)>,
    /// Requests that have ended.
    pub ended: Vec<RequestId>,
    /// There was no policy in between: nothing that was told before is of interest any more.
    pub fresh: bool,
}

/// The words that a batch was owed, and its memory back.
#[derive(Debug, Default)]
pub struct Reply {
    /// Words that nobody was owed, before all others: a policy that took over says what it wants of running requests.
    pub renewed: Vec<(RequestId, Word)>,
    /// One per start and per token, a request's own in their order.
    pub words: Vec<(RequestId, Word)>,
    /// The batch, as it was sent.
    pub spent: Batch,
    /// Whose words they are; none where there was nobody to ask.
    pub decided_by: Option<DecidedBy>,
    /// There was no policy when the batch was worked on, and whoever is there now knows of no request: it went and came back
    /// between two steps.
    pub is_forgotten: bool,
}

/// A token that was chosen for a request that is followed beside the policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// Whose.
    pub request: RequestId,
    /// Which.
    pub token: u32,
    /// The policy's edit that held for it.
    pub edit: Option<Arc<Edit>>,
}

/// What a step came to for the requests that are followed beside the policy, in the order of the fields.
#[derive(Debug, Default)]
pub struct Overheard {
    /// When it was handed over.
    pub now: Micros,
    /// Requests that start.
    pub started: Vec<Started>,
    /// One token each of several requests; another one follows unless the request has `ended`.
    pub chosen: Vec<Chosen>,
    /// Requests that have ended.
    pub ended: Vec<RequestId>,
}

/// Asked by the executor for the edits of rows that it samples, between the forward pass and the choice of tokens.
pub trait EditSource: Send {
    /// What holds for the next token of a request. May wait for a word that is owed, up to a bound per step; a token that is
    /// chosen without it is not used.
    fn edit(&mut self, request: RequestId) -> Option<Arc<Edit>>;
}

/// No edits, for executors that run without a sampler.
#[derive(Debug, Default)]
pub struct NoEdits;

impl EditSource for NoEdits {
    fn edit(&mut self, _request: RequestId) -> Option<Arc<Edit>> {
        None
    }
}

/// Runs a sampler policy away from the driver thread. One batch is in its hands at a time.
pub trait SamplerWorker: Send {
    /// Generation of the active policy, if there is one. Asked before every step: picks up a swap.
    fn attend(&mut self, now: Micros) -> Option<u64>;

    /// Takes a batch, to be answered by one reply sooner or later, whatever happens to the worker. Never blocks.
    ///
    /// # Errors
    /// It has another one, or there is no policy; the batch comes back.
    fn send(&mut self, batch: Batch) -> Result<(), Batch>;

    /// The reply, if it is there.
    fn poll(&mut self) -> Option<Reply>;

    /// The reply, waiting for it up to a bound.
    fn wait(&mut self) -> Option<Reply>;

    /// Whether somebody beside the policy follows a request that starts.
    fn follows(&self, _request: RequestId) -> bool {
        false
    }

    /// Takes what a step came to for whoever follows requests. False where it did not: they are followed no further. Never blocks.
    fn overhear(&mut self, _heard: Overheard) -> bool {
        false
    }
}

impl<W: SamplerWorker + ?Sized> SamplerWorker for Box<W> {
    fn attend(&mut self, now: Micros) -> Option<u64> {
        (**self).attend(now)
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        (**self).send(batch)
    }

    fn poll(&mut self) -> Option<Reply> {
        (**self).poll()
    }

    fn wait(&mut self) -> Option<Reply> {
        (**self).wait()
    }

    fn follows(&self, request: RequestId) -> bool {
        (**self).follows(request)
    }

    fn overhear(&mut self, heard: Overheard) -> bool {
        (**self).overhear(heard)
    }
}

/// No sampler, as a [`SamplerWorker`].
#[derive(Debug, Default)]
pub struct NativeSampler;

impl SamplerWorker for NativeSampler {
    fn attend(&mut self, _now: Micros) -> Option<u64> {
        None
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        Err(batch)
    }

    fn poll(&mut self) -> Option<Reply> {
        None
    }

    fn wait(&mut self) -> Option<Reply> {
        None
    }
}

/// The books between a replica's driver, its executor and its sampler; see the [module documentation](self).
#[derive(Debug)]
pub struct Desk<W> {
    worker: W,
    /// Generation of the policy that there is.
    active: Option<u64>,
    /// Requests that the policy has not left, by id.
    entries: IntMap<u64, Entry>,
    /// What has not been handed over.
    pending: Batch,
    /// Memory for the next one.
    spare: Batch,
    in_flight: bool,
    /// The words of what is in flight are not those of the policy that is there now.
    is_void: bool,
    /// Somebody else was there since the last step: the policy hears nothing until the next one, and then everything.
    is_interrupted: bool,
    /// The worker was waited for in this step, and in vain.
    out_of_patience: bool,
    /// Requests that get no token in this step.
    withheld: Vec<RequestId>,
    /// Masks of requests that must keep a form, by id.
    masks: IntMap<u64, Box<dyn TokenMask>>,
    /// How often this step may still wait for a mask.
    waits: u32,
    /// Those that the last step computed, if it withheld the tokens of all.
    stalled: Vec<RequestId>,
    /// Since when nothing was computed for their sake.
    stalled_since: Option<Micros>,
    /// Requests that cannot go on, until the driver has ended them.
    failed: Vec<(RequestId, Failure)>,
    /// Requests that are followed beside the policy, by id, and what is not told yet.
    followed: IntSet<u64>,
    heard: Overheard,
    /// The policy's edits of those in the step that computes.
    edits_heard: Vec<(RequestId, Option<Arc<Edit>>)>,
}

#[derive(Debug, Default)]
struct Entry {
    edit: Option<Arc<Edit>>,
    /// Words that are still to come.
    owed: u32,
    /// The worker has forgotten it, and is not told again: it is to end.
    is_unknown: bool,
}

// === impl Edit ===

impl Edit {
    /// Only these tokens.
    ///
    /// # Errors
    /// There are none, or one does not exist.
    pub fn allow(tokens: Vec<u32>, vocabulary: u32) -> Result<Self, BadEdit> {
        if tokens.is_empty() {
            return Err(BadEdit::AllowsNothing);
        }
        set(tokens, vocabulary).map(Self::Allow)
    }

    /// All but these tokens.
    ///
    /// # Errors
    /// One does not exist.
    pub fn forbid(tokens: Vec<u32>, vocabulary: u32) -> Result<Self, BadEdit> {
        set(tokens, vocabulary).map(Self::Forbid)
    }

    /// Adds to logits; entries of one token add up.
    ///
    /// # Errors
    /// A token does not exist, or its bias is not finite.
    pub fn bias(mut biases: Vec<(u32, f32)>, vocabulary: u32) -> Result<Self, BadEdit> {
        if let Some(&(token, _)) = biases.iter().find(|(token, _)| *token >= vocabulary) {
            return Err(BadEdit::NoSuchToken { token, vocabulary });
        }
        if let Some(&(token, bias)) = biases.iter().find(|(_, bias)| !bias.is_finite()) {
            return Err(BadEdit::NotFinite { token, bias });
        }
        // Stable: a sum of floats depends on its order.
        biases.sort_by_key(|&(token, _)| token);
        Ok(Self::Bias(biases.into()))
    }
}

fn set(mut tokens: Vec<u32>, vocabulary: u32) -> Result<Box<[u32]>, BadEdit> {
    tokens.sort_unstable();
    tokens.dedup();
    match tokens.last() {
        Some(&token) if token >= vocabulary => Err(BadEdit::NoSuchToken { token, vocabulary }),
        _ => Ok(tokens.into()),
    }
}

impl Started {
    /// What a sampler sees of a request.
    #[must_use]
    pub fn of(request: &Request) -> Self {
        Self {
            id: request.id,
            tenant: Arc::clone(&request.tenant_name),
            stop_tokens: Arc::clone(&request.stop_tokens),
            prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            max_new_tokens: request.max_new_tokens,
            attributes: Arc::clone(&request.attributes),
            said: Vec::new(),
        }
    }

    /// Those texts of the request that are wanted.
    #[must_use]
    pub fn texts(&self, wanted: &[String]) -> Vec<(&str, &str)> {
        let texts = self.attributes.iter().filter(|(name, _)| wanted.contains(name));
        texts.map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

// === impl Overheard ===

impl Overheard {
    fn is_empty(&self) -> bool {
        self.started.is_empty() && self.chosen.is_empty() && self.ended.is_empty()
    }
}

// === impl Batch ===

impl Batch {
    /// Requests that it owes a word, one by one.
    pub fn owed(&self) -> impl Iterator<Item = RequestId> {
        self.started.iter().map(|started| started.id).chain(self.tokens.iter().map(|(id, _)| *id))
    }

    /// Whether there is nothing to hand over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.started.is_empty() && self.tokens.is_empty() && self.ended.is_empty()
    }

    /// Empties it and keeps its memory.
    fn clear(&mut self) {
        self.started.clear();
        self.tokens.clear();
        self.ended.clear();
        self.fresh = false;
    }
}

// === impl Desk ===

impl<W: SamplerWorker> Desk<W> {
    /// A desk in front of `worker`.
    #[must_use]
    pub fn new(worker: W) -> Self {
        Self {
            worker,
            active: None,
            entries: IntMap::default(),
            pending: Batch::default(),
            spare: Batch::default(),
            in_flight: false,
            is_void: false,
            is_interrupted: false,
            out_of_patience: false,
            withheld: Vec::new(),
            masks: IntMap::default(),
            waits: WAITS,
            stalled: Vec::new(),
            stalled_since: None,
            failed: Vec::new(),
            followed: IntSet::default(),
            heard: Overheard::default(),
            edits_heard: Vec::new(),
        }
    }

    /// Before a step is planned: picks up swaps and hands over what has gathered. Without a policy every request is free at once; a
    /// policy that was not there before is told of all requests that it does not know. What a step that computes has been told holds.
    pub fn attend(&mut self, now: Micros, scheduler: &Scheduler) {
        let before = std::mem::replace(&mut self.active, self.worker.attend(now));
        self.receive();
        let is_interrupted = std::mem::take(&mut self.is_interrupted);
        if is_interrupted || self.active != before {
            self.begin_anew(scheduler);
        }
        self.pass_on(now);
    }

    /// Tells whoever is there now of all requests, with what they have got. Of what was said before only the edits are kept, for as
    /// long as nobody can say more: the words of two policies, and tokens that one of them has heard already, are not to be told
    /// apart later.
    fn begin_anew(&mut self, scheduler: &Scheduler) {
        if self.active.is_none() {
            self.failed.retain(|(_, failure)| *failure != Failure::Unanswered);
        }
        let mut before = std::mem::take(&mut self.entries);
        // Whoever was to end ends.
        for (id, _) in self.failed.iter().filter(|(_, failure)| *failure == Failure::Unanswered) {
            self.entries.extend(before.remove(&id.0).map(|entry| (id.0, Entry { is_unknown: true, ..entry })));
        }
        self.pending.clear();
        self.pending.fresh = true;
        self.is_void = self.in_flight;
        if self.is_active() {
            for (request, said) in scheduler.live() {
                self.tell(Started { said: said.to_vec(), ..Started::of(request) });
                let old = before.remove(&request.id.0);
                if let (Some(entry), Some(old)) = (self.entries.get_mut(&request.id.0), old) {
                    entry.edit = old.edit;
                }
            }
        }
    }

    /// Whether there is a policy, which wants to hear of requests that start.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Whether anybody wants to hear of a request that starts.
    #[must_use]
    pub fn hears_of(&self, id: RequestId) -> bool {
        self.is_active() || self.worker.follows(id)
    }

    /// Whether nobody has a word in a request's next token, neither the policy nor a mask, and nobody follows it token by token. Of one
    /// whose token in the step that computes is withheld, the next is that one.
    #[must_use]
    pub fn is_free(&self, id: RequestId) -> bool {
        !self.withheld.contains(&id)
            && !self.entries.contains_key(&id.0)
            && !self.masks.contains_key(&id.0)
            && !self.followed.contains(&id.0)
    }

    /// A request has been accepted.
    pub fn start(&mut self, started: Started) {
        if self.worker.follows(started.id) && self.followed.insert(started.id.0) {
            self.heard.started.push(started.clone());
        }
        self.tell(started);
    }

    fn tell(&mut self, started: Started) {
        if self.is_active() && !self.entries.contains_key(&started.id.0) {
            self.entries.insert(started.id.0, Entry { owed: 1, ..Entry::default() });
            self.pending.started.push(started);
        }
    }

    /// A request has been accepted that may say only what its mask allows.
    pub fn constrain(&mut self, id: RequestId, mut mask: Box<dyn TokenMask>) {
        mask.advance(None);
        self.masks.insert(id.0, mask);
    }

    /// Requests that cannot go on, because their mask has failed or the policy could not be asked about them: the driver
    /// [fails](Scheduler::fail) them.
    #[must_use]
    pub fn take_failed(&mut self) -> Vec<(RequestId, Failure)> {
        std::mem::take(&mut self.failed)
    }

    /// Whether a step would come to nothing: the last one withheld everybody's token because of masks that were late, nobody has
    /// come since, and they are late still. Who has nothing else to do may sleep: a mask [wakes](TokenMask::advance) its thread.
    pub fn is_stalled(&mut self, now: Micros, scheduler: &Scheduler) -> bool {
        let Self { stalled, masks, .. } = self;
        let is_late = |id: &RequestId| masks.get_mut(&id.0).is_some_and(|mask| mask.mask(Duration::ZERO).is_none());
        let is_alone = scheduler.n_waiting() == 0 && scheduler.n_running() as usize == stalled.len();
        if stalled.is_empty() || !is_alone || !stalled.iter().all(is_late) {
            return false;
        }
        now.saturating_sub(*self.stalled_since.get_or_insert(now)) < STALL
    }

    /// What a step has computed: those that got a token are owed a word, and `output` is told whose tokens are withheld. To be
    /// called before the scheduler [completes](Scheduler::complete) the step.
    pub fn sampled(&mut self, plan: &StepPlan, output: &mut StepOutput) {
        output.withheld.append(&mut self.withheld);
        self.stalled.clear();
        self.stalled_since = None;
        if self.entries.is_empty() && self.masks.is_empty() && self.followed.is_empty() {
            return;
        }
        let rows = plan.rows.iter().filter(|row| row.sample.is_some());
        for (row, sampled) in rows.zip(&output.sampled) {
            if output.withheld.contains(&row.request) {
                continue;
            }
            let request = row.request;
            if self.followed.contains(&request.0) {
                let held = self.edits_heard.iter_mut().find(|(id, _)| *id == request);
                let edit = held.and_then(|(_, edit)| edit.take());
                self.heard.chosen.push(Chosen { request, token: sampled.token, edit });
            }
            if let Some(entry) = self.entries.get_mut(&request.0) {
                entry.owed += 1;
                self.pending.tokens.push((row.request, sampled.token));
            }
            if let Some(mask) = self.masks.get_mut(&row.request.0) {
                mask.advance(Some(sampled.token));
            }
        }
        if plan.rows.iter().all(|row| output.withheld.contains(&row.request)) {
            self.stalled.extend(plan.rows.iter().map(|row| row.request));
        }
    }

    /// A request has ended, in whatever way.
    pub fn ended(&mut self, id: RequestId) {
        self.masks.remove(&id.0);
        if self.followed.remove(&id.0) {
            self.heard.ended.push(id);
        }
        if self.entries.remove(&id.0).is_none_or(|entry| entry.is_unknown) {
            return;
        }
        self.pending.tokens.retain(|(of, _)| *of != id);
        let before = self.pending.started.len();
        self.pending.started.retain(|started| started.id != id);
        // The worker knows it only if it was handed over.
        if self.pending.started.len() == before {
            self.pending.ended.push(id);
        }
    }

    /// Gives the worker what has gathered, if its hands are free. Closes a step: the worker goes on while the next one runs.
    pub fn hand_over(&mut self, now: Micros) {
        (self.out_of_patience, self.waits) = (false, WAITS);
        self.withheld.clear();
        self.edits_heard.clear();
        self.pass_on(now);
    }

    fn pass_on(&mut self, now: Micros) {
        self.receive();
        self.send(now);
        if !self.heard.is_empty() && !self.worker.overhear(Overheard { now, ..std::mem::take(&mut self.heard) }) {
            self.followed.clear();
        }
    }

    fn receive(&mut self) {
        while self.in_flight
            && let Some(reply) = self.worker.poll()
        {
            self.take(reply);
        }
    }

    fn send(&mut self, now: Micros) {
        if self.in_flight || self.is_interrupted || self.pending.is_empty() {
            return;
        }
        let mut batch = std::mem::replace(&mut self.pending, std::mem::take(&mut self.spare));
        batch.now = now;
        match self.worker.send(batch) {
            Ok(()) => self.in_flight = true,
            Err(batch) => {
                self.spare = std::mem::replace(&mut self.pending, batch);
            }
        }
    }

    fn take(&mut self, reply: Reply) {
        self.in_flight = false;
        let Reply { mut renewed, mut words, mut spent, decided_by, is_forgotten } = reply;
        let is_void = std::mem::take(&mut self.is_void);
        // A swap there and back is none to whoever looks between steps only. What is owed stays owed until the next step.
        self.is_interrupted |=
            !is_void && (is_forgotten || decided_by.is_some_and(|by| Some(by.generation) != self.active));
        if is_void || self.is_interrupted {
            renewed.clear();
            words.clear();
        }
        let renewed = renewed.into_iter().map(|(id, word)| (id, word, 0));
        for (id, word, paid) in renewed.chain(words.into_iter().map(|(id, word)| (id, word, 1))) {
            let Some(entry) = self.entries.get_mut(&id.0) else { continue };
            entry.owed = entry.owed.saturating_sub(paid);
            match word {
                Word::Leave => drop(self.entries.remove(&id.0)),
                Word::Keep => {}
                Word::Free => entry.edit = None,
                Word::Edit(edit) => entry.edit = Some(edit),
                Word::End => {
                    // Owed for ever: whatever is chosen before it has ended is withheld.
                    entry.owed += 1;
                    self.failed.push((id, Failure::Unanswered));
                }
            }
        }
        spent.clear();
        self.spare = spent;
    }

    /// The policy's edit, waiting for a word that it owes.
    fn policy_edit(&mut self, request: RequestId) -> Option<Arc<Edit>> {
        if self.entries.is_empty() {
            return None;
        }
        while self.owes(request) && self.in_flight && !self.out_of_patience {
            match self.worker.wait() {
                Some(reply) => {
                    let now = reply.spent.now;
                    self.take(reply);
                    self.send(now);
                }
                None => self.out_of_patience = true,
            }
        }
        let entry = self.entries.get(&request.0)?;
        if entry.owed > 0 {
            self.withheld.push(request);
        }
        entry.edit.clone()
    }

    /// What a request's own mask makes of the policy's edit.
    fn masked(&mut self, request: RequestId, policy: Option<Arc<Edit>>) -> Option<Arc<Edit>> {
        let Some(mask) = self.masks.get_mut(&request.0) else { return policy };
        let mut known = mask.mask(Duration::ZERO);
        while known.is_none() && self.waits > 0 {
            self.waits -= 1;
            known = mask.mask(WAIT);
        }
        let Some(known) = known else {
            self.withheld.push(request);
            return None;
        };
        match known.and_then(|mask| combine(mask, policy.as_deref())) {
            Ok(edit) => Some(edit),
            Err(error) => {
                self.withheld.push(request);
                self.failed.push((request, error.into()));
                None
            }
        }
    }

    fn owes(&self, id: RequestId) -> bool {
        self.entries.get(&id.0).is_some_and(|entry| entry.owed > 0)
    }

    /// Whether it keeps nothing of anybody, and everything has been told.
    #[cfg(test)]
    pub(crate) fn is_settled(&self) -> bool {
        let Self { entries, masks, failed, pending, in_flight, .. } = self;
        entries.is_empty() && masks.is_empty() && failed.is_empty() && pending.is_empty() && !in_flight
    }
}

impl<W: SamplerWorker> EditSource for Desk<W> {
    fn edit(&mut self, request: RequestId) -> Option<Arc<Edit>> {
        let policy = self.policy_edit(request);
        if self.followed.contains(&request.0) {
            self.edits_heard.push((request, policy.clone()));
        }
        if self.masks.is_empty() { policy } else { self.masked(request, policy) }
    }
}
