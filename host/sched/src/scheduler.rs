//! The scheduler of one replica: requests in, step plans out, sampled tokens back in.
//!
//! The driver thread turns one crank, and nothing else touches this state:
//!
//! ```text
//! submit / cancel  ->  schedule  ->  (the engine runs the plan)  ->  complete | fail_step  ->  ...
//!                                    [schedule_ahead meanwhile]
//! ```
//!
//! Invariants that a newcomer may lean on:
//!
//! - A request that [`submit`](Scheduler::submit) took ends exactly once: one of `Finished`, `Cancelled` or `Failed`
//!   reaches its sink, and its blocks are back in the pool when that call returns.
//! - Only running sequences hold blocks. A running sequence has blocks for every known token before its first step, so
//!   only the growth of decodes can run out of memory; then the weakest sequence is preempted: its blocks go back, and its
//!   prompt and output are computed again as one longer prefill (mostly found in the prefix cache). Its token stream and
//!   the sampling index go on as if nothing had happened.
//! - One request alone always fits the pool (`submit` refuses others, `resize` leaves room), so the strongest running sequence
//!   always moves.
//! - A step never exceeds `step_tokens`, `max_running`, `prefill_chunk` or the pool, whatever a policy proposes.
//! - A request that has stood still for longer than `starvation_us` (all its waits together, so that it cannot be admitted
//!   and preempted in turn for ever) is *overdue*: it goes before everything in order of age, no policy can hold, pause or
//!   preempt it, and sequences that are not overdue make room for it where that is enough.
//! - A block enters the prefix index only after the step that computed it has succeeded. A draft that did not come true is never
//!   known: it does not count as computed, and the next tokens are written over it.
//!
//! Why not asynchronous, or a thread with locks: the decision takes microseconds and the engine wants the whole plan at
//! once, so a plain `&mut self` is both the fastest and the only form that a simulation can replay.

mod ahead;
mod consult;
mod drafting;
mod ending;
mod resize;
mod review;
mod select;
mod settle;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pointsman_telemetry::{Event, EventKind};

use crate::batch::{BatchPolicy, Plan};
use crate::blocks::Counts;
use crate::config::{Config, ConfigError};
use crate::draft::model::DraftModel;
use crate::execute::StepPlan;
use crate::ids::{BlockId, Micros, RequestId};
use crate::kv::{Kv, Text};
use crate::observe::Observer;
use crate::publish::{PrefixSketch, ReplicaGauges};
use crate::request::{CancelCause, Failure, Request, ResourceExhausted};
pub use crate::sequence::Stage;
use crate::sequence::{Sequence, Slab, Slot, count};
use crate::told::Told;
use crate::waiting::WaitingQueue;
use ahead::Ahead;
use ending::Ending;
use review::Review;

/// What happened since the counters were last taken; for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps that were completed.
    pub steps: u64,
    /// Steps that were planned while the one before them computed.
    pub steps_ahead: u64,
    /// Sequences put back into the queue.
    pub preemptions: u64,
    /// Known tokens at admission of sequences that may use the prefix cache.
    pub prefix_query_tokens: u64,
    /// Of those, found there.
    pub prefix_hit_tokens: u64,
    /// Cached blocks that had to go because memory was needed.
    pub evicted_blocks: u64,
    /// Tokens computed in prefill chunks, recomputation included.
    pub prefill_tokens: u64,
    /// Tokens computed in decode rows.
    pub decode_tokens: u64,
    /// Tokens sampled and emitted.
    pub generated_tokens: u64,
    /// Draft tokens that steps looked at.
    pub draft_tokens: u64,
    /// Of those, the ones that came true.
    pub accepted_tokens: u64,
    /// Of the draft tokens, those of a draft model.
    pub model_draft_tokens: u64,
    /// Of these, the ones that came true.
    pub model_accepted_tokens: u64,
    /// Requests that ended with a stop token.
    pub finished_stop: u64,
    /// Requests that ended at their length.
    pub finished_length: u64,
    /// Requests that failed, dropped ones included.
    pub failed: u64,
    /// Requests cancelled, by [`Stage`]: queued, prefilling, decoding.
    pub cancelled: [u64; 3],
    /// Plans that a policy filled and that were followed.
    pub plans_followed: u64,
    /// Plans refused as a whole.
    pub plans_refused: u64,
    /// Rankings of cached blocks that a policy gave and that are followed.
    pub rankings_followed: u64,
    /// Rankings refused as a whole.
    pub rankings_refused: u64,
}

/// One row of the plan in flight.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    slot: Slot,
    id: RequestId,
    n_tokens: u32,
    n_drafts: u32,
    n_scores: u32,
    samples: bool,
    is_decode: bool,
}

/// What the last completed step took, for policies that size chunks by it.
#[derive(Clone, Copy, Debug, Default)]
struct LastStep {
    took: Micros,
    tokens: u32,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Scheduler {
    /// As it was made, but for `n_blocks`, which is what the pool has now.
    config: Config,
    seed: u64,
    gauges: Arc<ReplicaGauges>,
    kv: Kv,
    review: Review,
    sequences: Slab,
    waiting: WaitingQueue,
    /// In the order of admission.
    running: Vec<Slot>,
    told: Told,
    /// The policy's proposal for this step; empty for the native one.
    plan: Plan,
    /// Entries of `plan.preempt` already looked at in this step.
    preempt_cursor: usize,
    /// Generation that decides this step, 0 for native.
    generation: u64,
    step: StepPlan,
    rows: Vec<InFlight>,
    /// Between a plan and its completion: no second plan, for the engine writes the blocks of the first, but one that follows it.
    in_flight: bool,
    ahead: Ahead,
    step_started: Micros,
    last_step: LastStep,
    /// Tokens left in the step that is being planned.
    budget: u32,
    /// Tokens that this step may choose with drafts in it.
    draft_places: u32,
    /// Drafts for those who ask for it.
    draft_model: Option<DraftModel>,
    n_steps: u64,
    n_submitted: u64,
    n_admissions: u64,
    /// Not after the earliest deadline of a live request; `Micros::MAX` without one.
    deadline_bound: Micros,
    /// Prompt tokens accepted and not yet computed.
    queued_tokens: u64,
    /// Sequences whose sink has closed, which end before the next step.
    n_closed: u32,
    counters: Counters,
    /// Evictions that the counters have told of.
    n_evictions_told: u64,
    // Buffers that live here so that a step allocates nothing.
    found: Vec<BlockId>,
    slots: Vec<Slot>,
    /// By block: the count below when it was last met, so that shared blocks are counted once.
    marks: Vec<u64>,
    n_marks: u64,
}

impl Scheduler {
    /// A scheduler with an empty pool. `gauges` and `sketch` are what routers read of it.
    ///
    /// # Errors
    /// A configuration that [`Config::validate`] refuses.
    pub fn new(
        config: Config,
        seed: u64,
        gauges: Arc<ReplicaGauges>,
        sketch: Arc<PrefixSketch>,
    ) -> Result<Self, ConfigError> {
        config.validate()?;
        let (max_running, max_waiting) = (config.max_running as usize, config.max_waiting as usize);
        let capacity = max_running + max_waiting;
        let scheduler = Self {
            config,
            seed,
            gauges,
            kv: Kv::new(&config, sketch),
            review: Review::new(&config),
            sequences: Slab::new(capacity),
            waiting: WaitingQueue::new(capacity, config.starvation_us),
            running: Vec::with_capacity(max_running),
            told: Told::new(capacity),
            plan: Plan::default(),
            preempt_cursor: 0,
            generation: 0,
            step: StepPlan::with_room(config.max_running, config.step_tokens, config.n_blocks),
            rows: Vec::with_capacity(max_running),
            in_flight: false,
            ahead: Ahead::new(&config),
            step_started: 0,
            last_step: LastStep::default(),
            budget: 0,
            draft_places: 0,
            draft_model: None,
            n_steps: 0,
            n_submitted: 0,
            n_admissions: 0,
            deadline_bound: Micros::MAX,
            queued_tokens: 0,
            n_closed: 0,
            counters: Counters::default(),
            n_evictions_told: 0,
            found: Vec::with_capacity(config.n_blocks as usize),
            slots: Vec::with_capacity(capacity),
            marks: vec![0; config.n_blocks as usize],
            n_marks: 0,
        };
        scheduler.publish_gauges();
        Ok(scheduler)
    }

    /// Takes a request into the queue.
    ///
    /// # Errors
    /// The request, untouched, with the bound that it ran into: the context, the pool, or the queue (in this order: only
    /// the last one passes with time). A request without a prompt, or with the id of a live one, is the host's fault and
    /// comes back as [`Failure::Engine`].
    #[expect(clippy::result_large_err, reason = "a refused request goes back whole, once, off the step path")]
    pub fn submit(&mut self, request: Request, now: Micros) -> Result<(), (Request, Failure)> {
        if let Err(failure) = self.admissible(&request) {
            return Err((request, failure));
        }
        let mut cached = 0;
        if self.kv.is_cacheable(&request) && request.sampling.prompt_logprobs.is_none() {
            let text = Text { tokens: &request.prompt, hashes: &request.block_hashes };
            self.kv.matching(text, &mut self.found);
            cached = count(self.found.len()) * self.config.block_tokens;
        }
        self.told.meet(&request);
        if request.deadline != 0 {
            self.deadline_bound = self.deadline_bound.min(request.deadline);
        }
        self.n_submitted += 1;
        self.queued_tokens += request.prompt.len() as u64;
        let sequence = Sequence::new(request, self.n_submitted, now, cached);
        let slot = self.sequences.insert(sequence);
        self.waiting.insert(slot, &self.sequences[slot]);
        self.told.changed(slot, &mut self.sequences);
        self.publish_gauges();
        Ok(())
    }

    /// Ends a request early, in whatever state it is; its blocks are free when this returns. `None` when it is unknown or
    /// has ended already, else the stage it was in.
    pub fn cancel(
        &mut self,
        id: RequestId,
        cause: CancelCause,
        now: Micros,
        observer: &mut dyn Observer,
    ) -> Option<Stage> {
        let slot = self.sequences.find(id.0)?;
        let stage = self.sequences[slot].stage();
        self.end(slot, Ending::Cancelled(cause), now, observer);
        self.publish_gauges();
        Some(stage)
    }

    /// Ends a request that cannot be served any further; one that has ended already is none.
    pub fn fail(&mut self, id: RequestId, failure: Failure, now: Micros, observer: &mut dyn Observer) {
        if let Some(slot) = self.sequences.find(id.0) {
            self.end(slot, Ending::Failed(failure), now, observer);
            self.publish_gauges();
        }
    }

    /// Decides what the next step computes; `None` when nothing can be computed now. The plan must come back through
    /// [`complete`](Self::complete) or [`fail_step`](Self::fail_step) before the next call.
    pub fn schedule(
        &mut self,
        now: Micros,
        policy: &mut dyn BatchPolicy,
        observer: &mut dyn Observer,
    ) -> Option<&StepPlan> {
        assert!(!self.in_flight, "the step before it is still in flight");
        self.n_steps += 1;
        self.step.clear();
        self.expire(now, observer);
        self.reap(now, observer);
        self.consult(now, policy, observer);
        self.select(now, observer);
        self.lengthen();
        self.build(now);
        self.publish_gauges();
        self.gauges.slack_tokens.store(self.slack_tokens(), Ordering::Relaxed);
        if self.rows.is_empty() {
            return None;
        }
        self.in_flight = true;
        self.step_started = now;
        Some(&self.step)
    }

    /// The step that was planned first of those in flight.
    #[must_use]
    pub fn in_flight(&self) -> Option<&StepPlan> {
        self.in_flight.then_some(&self.step)
    }

    /// Cancels everything that lives.
    pub fn shutdown(&mut self, cause: CancelCause, now: Micros, observer: &mut dyn Observer) {
        self.end_all(|_| true, &Ending::Cancelled(cause), now, observer);
        self.publish_gauges();
    }

    /// Fails everything that lives.
    pub fn fail_all(&mut self, failure: &Failure, now: Micros, observer: &mut dyn Observer) {
        self.end_all(|_| true, &Ending::Failed(failure.clone()), now, observer);
        self.publish_gauges();
    }

    /// The next moment at which [`schedule`](Self::schedule) has something to do without any new input: a deadline passes
    /// or the starvation bound overrules a policy. May lie in the past, and may be early; `None` when time changes nothing.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Micros> {
        let due = |slot: &Slot| self.sequences[*slot].due(self.config.starvation_us);
        let waiting = self.waiting.tickets().iter().map(|ticket| ticket.due).min();
        let running = self.running.iter().filter_map(due).min();
        let starving = waiting.into_iter().chain(running).min().map(|due| due.saturating_add(1));
        let deadline = Some(self.deadline_bound).filter(|&bound| bound != Micros::MAX);
        starving.into_iter().chain(deadline).min()
    }

    /// Requests that have not ended, with the tokens that they have got, in no order.
    pub fn live(&self) -> impl Iterator<Item = (&Request, &[u32])> {
        let said = |sequence: &Sequence| sequence.prompt_tokens() as usize;
        self.sequences
            .iter()
            .map(move |(_, sequence)| (&sequence.request, sequence.tokens.get(said(sequence)..).unwrap_or_default()))
    }

    /// Whether no request lives here.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.len() == 0
    }

    /// The counters since they were last taken.
    pub fn take_counters(&mut self) -> Counters {
        let evicted_blocks = self.kv.n_evicted - std::mem::replace(&mut self.n_evictions_told, self.kv.n_evicted);
        Counters { evicted_blocks, ..std::mem::take(&mut self.counters) }
    }

    /// Who holds the pool's blocks.
    #[must_use]
    pub fn block_counts(&self) -> Counts {
        self.kv.pool.counts()
    }

    /// Number of waiting requests.
    #[must_use]
    pub fn n_waiting(&self) -> u32 {
        count(self.waiting.len())
    }

    /// Number of running requests.
    #[must_use]
    pub fn n_running(&self) -> u32 {
        count(self.running.len())
    }

    /// The configuration it was made with, and the blocks that its pool has now.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The stage of a live request and whether it is overdue at `now`; for tests and for explaining decisions.
    #[must_use]
    pub fn inspect(&self, id: RequestId, now: Micros) -> Option<(Stage, bool)> {
        let sequence = &self.sequences[self.sequences.find(id.0)?];
        Some((sequence.stage(), sequence.is_overdue(now, self.config.starvation_us)))
    }

    /// Asserts every invariant between queues, tables, pool and index, in time linear in all of them. For tests and the
    /// simulation, after every step.
    pub fn assert_consistent(&self) {
        self.kv.assert_consistent();
        if let Some(model) = &self.draft_model {
            model.assert_consistent(|request| self.sequences.find(request.0).is_some());
        }
        let mut references = vec![0u32; self.config.n_blocks as usize];
        let mut queued_tokens = 0;
        for (slot, sequence) in self.sequences.iter() {
            let id = sequence.request.id;
            let queued = self.waiting.tickets().iter().filter(|ticket| ticket.slot == slot).count();
            let running = self.running.iter().filter(|&&other| other == slot).count();
            assert_eq!((queued, running), if sequence.running { (0, 1) } else { (1, 0) }, "{id:?} is not in one queue");
            assert!(
                sequence.running || (sequence.table.is_empty() && sequence.computed == 0),
                "{id:?} waits with blocks"
            );
            let n_blocks = self.config.blocks_for(sequence.computed);
            assert!(n_blocks <= count(sequence.table.len()), "{id:?} has computed beyond its table");
            assert!(sequence.remaining() > 0, "{id:?} lives and has nothing left to compute");
            queued_tokens += u64::from(sequence.prompt_remaining());
            for block in &sequence.table {
                references[block.0 as usize] += 1;
            }
        }
        for (index, &references) in (0u32..).zip(&references) {
            assert_eq!(self.kv.pool.references(BlockId(index)), references, "block {index} is leaked or owned twice");
        }
        assert_eq!(self.sequences.len(), self.waiting.len() + self.running.len());
        assert!(self.running.len() <= self.config.max_running as usize);
        assert_eq!(self.queued_tokens, queued_tokens);
    }

    fn admissible(&self, request: &Request) -> Result<(), Failure> {
        if request.prompt.is_empty() {
            return Err(Failure::Engine("the host submitted it without a prompt".into()));
        }
        if self.sequences.find(request.id.0).is_some() {
            return Err(Failure::Engine("the host submitted its id twice".into()));
        }
        let tokens = count(request.prompt.len()).saturating_add(request.max_new_tokens);
        let limit = self.config.context_tokens;
        if tokens > limit {
            return Err(ResourceExhausted::Context { tokens, limit }.into());
        }
        let (needed, total) = (self.most_blocks_of(request), self.config.n_blocks);
        if needed > total {
            return Err(ResourceExhausted::KvPool { needed, total }.into());
        }
        let (waiting, limit) = (self.n_waiting(), self.config.max_waiting);
        if waiting >= limit {
            return Err(ResourceExhausted::Queue { waiting, limit }.into());
        }
        Ok(())
    }

    /// Blocks that a request comes to hold at most.
    fn most_blocks_of(&self, request: &Request) -> u32 {
        let tokens = count(request.prompt.len()).saturating_add(request.max_new_tokens);
        // The last token that is generated is never computed, so it needs no place.
        self.config.blocks_for(tokens - request.max_new_tokens.min(1))
    }

    /// Cancels what has passed its deadline.
    fn expire(&mut self, now: Micros, observer: &mut dyn Observer) {
        if now < self.deadline_bound {
            return;
        }
        self.end_all(
            |sequence| sequence.request.deadline != 0 && sequence.request.deadline <= now,
            &Ending::Cancelled(CancelCause::Deadline),
            now,
            observer,
        );
        let deadlines = self.sequences.iter().map(|(_, sequence)| sequence.request.deadline);
        self.deadline_bound = deadlines.filter(|&deadline| deadline != 0).min().unwrap_or(Micros::MAX);
    }

    /// Cancels what nobody listens to any more.
    fn reap(&mut self, now: Micros, observer: &mut dyn Observer) {
        if self.n_closed > 0 {
            self.end_all(|sequence| sequence.closed, &Ending::Cancelled(CancelCause::ClientGone), now, observer);
        }
    }

    fn end_all(
        &mut self,
        which: impl Fn(&Sequence) -> bool,
        ending: &Ending,
        now: Micros,
        observer: &mut dyn Observer,
    ) {
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        slots.extend(self.sequences.iter().filter(|(_, sequence)| which(sequence)).map(|(slot, _)| slot));
        for &slot in &slots {
            self.end(slot, ending.clone(), now, observer);
        }
        self.slots = slots;
    }

    /// Puts a running sequence back into the queue, to be computed again.
    fn preempt(&mut self, slot: Slot, now: Micros, observer: &mut dyn Observer) {
        let sequence = &mut self.sequences[slot];
        assert!(sequence.running, "{:?} waits and cannot be preempted", sequence.request.id);
        let freed = self.kv.n_private(&sequence.table);
        self.kv.release_all(&mut sequence.table, now);
        self.budget += std::mem::take(&mut sequence.chunk);
        sequence.drafts.tokens.clear();
        self.queued_tokens -= u64::from(sequence.prompt_remaining());
        sequence.computed = 0;
        self.queued_tokens += u64::from(sequence.prompt_remaining());
        sequence.running = false;
        sequence.preempted_in = self.n_steps;
        sequence.stalls(now);
        self.running.retain(|&other| other != slot);
        self.waiting.insert(slot, &self.sequences[slot]);
        self.told.changed(slot, &mut self.sequences);
        self.counters.preemptions += 1;
        let sequence = &self.sequences[slot];
        let (a, b) = (u64::from(freed), u64::from(sequence.n_tokens()));
        observer.observe(Event { generation: self.generation, ..event(sequence, now, EventKind::Preempted, (a, b)) });
    }

    fn is_overdue(&self, slot: Slot, now: Micros) -> bool {
        self.sequences[slot].is_overdue(now, self.config.starvation_us)
    }

    /// Places in the blocks of running sequences in which no token is; shared blocks are full.
    fn slack_tokens(&self) -> u32 {
        let slack = |slot: &Slot| {
            let sequence = &self.sequences[*slot];
            (count(sequence.table.len()) * self.config.block_tokens).saturating_sub(sequence.n_tokens())
        };
        self.running.iter().map(slack).sum()
    }

    fn publish_gauges(&self) {
        let gauges = &self.gauges;
        gauges.waiting.store(self.n_waiting(), Ordering::Relaxed);
        gauges.running.store(self.n_running(), Ordering::Relaxed);
        gauges.running_limit.store(self.config.max_running, Ordering::Relaxed);
        gauges.queued_tokens.store(u32::try_from(self.queued_tokens).unwrap_or(u32::MAX), Ordering::Relaxed);
        gauges.free_blocks.store(self.kv.pool.available(), Ordering::Relaxed);
        gauges.total_blocks.store(self.config.n_blocks, Ordering::Relaxed);
        gauges.cached_blocks.store(self.kv.pool.counts().cached, Ordering::Relaxed);
        gauges.evicted_blocks.store(self.kv.n_evicted, Ordering::Relaxed);
    }
}

/// An event about a request, stamped with the router generation that sent it here.
fn event(sequence: &Sequence, now: Micros, kind: EventKind, (a, b): (u64, u64)) -> Event {
    let request = &sequence.request;
    Event {
        request: request.id.0,
        generation: request.router_generation,
        tenant: request.tenant,
        a,
        b,
        priority: request.priority as u8,
        prompt_tokens: sequence.prompt_tokens(),
        cached_tokens: sequence.first_admitted.map_or(0, |(_, cached)| cached),
        ..Event::new(now, kind)
    }
}
