//! From a checked proposal to a feasible step: who decodes, who is preempted, who is admitted, who prefills how much.
//!
//! In this order, so that each line may rely on the ones above it:
//! 1. decodes get their blocks, preempting the weakest while memory is short;
//! 2. overdue requests, oldest first, make room for themselves;
//! 3. running prefills go on;
//! 4. the policy's admissions, then (unless it holds them) the rest in the host's order, up to the first that does not
//!    fit: order is what a queue is for, and small requests slipping past a large one would starve it.
//!
//! Only afterwards are rows built, because a preemption in 2 or 4 may hit a sequence that 1 or 3 had already counted in.

use std::sync::atomic::Ordering;

use crate::batch::Rest;
use crate::execute::{Row, Sample, Score, StepPlan};
use crate::ids::Micros;
use crate::kv::Chain;
use crate::observe::Observer;
use crate::request::{Request, SinkEvent};
use crate::sequence::{Sequence, Slot};

use super::{InFlight, Scheduler, count};

/// Whose sequences may be preempted to make room for an admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MakeRoom {
    /// Nobody's: memory and places that are free must do.
    No,
    /// Those that the policy offered.
    Offered,
    /// Any that is not overdue.
    Any,
}

impl Scheduler {
    /// Sets the `chunk` of every sequence that is part of this step.
    pub(super) fn select(&mut self, now: Micros, observer: &mut dyn Observer) {
        let earlier = self.counters.preemptions;
        self.grow(now, observer);
        let was_short = self.counters.preemptions != earlier;
        let blocked = self.serve_overdue(now, observer);
        for i in 0..self.running.len() {
            self.give_chunk(self.running[i], false);
        }
        if !was_short && !blocked {
            self.admit_in_order(now, observer);
        }
    }

    /// Gives every decode its block and its place in the step.
    fn grow(&mut self, now: Micros, observer: &mut dyn Observer) {
        self.budget = 0;
        while self.growth() > self.kv.pool.available() {
            assert!(self.running.len() > 1, "a request that fits the pool alone does not fit it alone");
            let victim = self.offered_victim(now).or_else(|| self.weakest(now));
            let Some(victim) = victim else { break };
            self.preempt(victim, now, observer);
        }
        self.budget = self.config.step_tokens;
        for i in 0..self.running.len() {
            let slot = self.running[i];
            if !self.sequences[slot].is_decoding() {
                continue;
            }
            self.extend_table(slot);
            self.sequences[slot].chunk = 1;
            assert!(self.budget > 0, "`step_tokens` is at least `max_running`");
            self.budget -= 1;
        }
    }

    /// Admits and advances overdue requests by age. Says whether one of them still waits, so that nobody may pass it.
    fn serve_overdue(&mut self, now: Micros, observer: &mut dyn Observer) -> bool {
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        let waiting = self.waiting.tickets().iter().filter(|ticket| now > ticket.due).map(|ticket| ticket.slot);
        slots.extend(waiting);
        slots.extend(self.running.iter().copied().filter(|&slot| self.is_overdue(slot, now)));
        slots.sort_unstable_by_key(|&slot| self.sequences[slot].order);
        let mut blocked = false;
        for &slot in &slots {
            if self.sequences[slot].running {
                self.give_chunk(slot, true);
            } else if !blocked {
                blocked = !self.admit(slot, MakeRoom::Any, now, observer);
            }
        }
        self.slots = slots;
        blocked
    }

    fn admit_in_order(&mut self, now: Micros, observer: &mut dyn Observer) {
        let room = if self.plan.preempt.is_empty() { MakeRoom::No } else { MakeRoom::Offered };
        for i in 0..self.plan.admit.len() {
            let Some(slot) = self.sequences.find(self.plan.admit[i]) else { continue };
            if self.may_admit(slot) && !self.admit(slot, room, now, observer) {
                return;
            }
        }
        if self.plan.rest == Rest::Hold {
            return;
        }
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        // Places bound how many can be admitted, and those that may not be are few: no need to copy a long queue.
        let places = (self.config.max_running as usize).saturating_sub(self.running.len());
        let candidates = self.waiting.tickets().iter().map(|ticket| ticket.slot);
        slots.extend(candidates.filter(|&slot| self.may_admit(slot)).take(places));
        for &slot in &slots {
            if !self.admit(slot, MakeRoom::No, now, observer) {
                break;
            }
        }
        self.slots = slots;
    }

    /// Waits, was not put back in this very step, the policy does not pause it, and nobody computes its prompt right now.
    fn may_admit(&self, slot: Slot) -> bool {
        let sequence = &self.sequences[slot];
        let is_free = !sequence.running && sequence.preempted_in != self.n_steps && sequence.wish != Some(0);
        is_free && !self.can_share_soon(&sequence.request)
    }

    /// Whether a choice submitted before is still to compute the prompt of this one, which then finds its blocks. Without a
    /// full block there is nothing to share; one that is overdue does not come here.
    fn can_share_soon(&self, request: &Request) -> bool {
        let first = request.fork_of.and_then(|first| self.sequences.find(first.0));
        let finds = request.sampling.prompt_logprobs.is_none();
        first
            .filter(|_| finds)
            .is_some_and(|first| self.sequences[first].generated() == 0 && self.kv.is_cacheable(request))
    }

    /// Admits a waiting sequence with its first chunk, if room can be made.
    fn admit(&mut self, slot: Slot, room: MakeRoom, now: Micros, observer: &mut dyn Observer) -> bool {
        if self.sequences[slot].preempted_in == self.n_steps {
            return false;
        }
        let headroom = if room == MakeRoom::Any { 0 } else { self.headroom() };
        let mut checked = false;
        loop {
            let has_place = self.running.len() < self.config.max_running as usize;
            if has_place && self.budget == 0 {
                return false;
            }
            let (chain, needed) = self.price(slot);
            if has_place && needed.saturating_add(headroom) <= self.kv.pool.available() {
                self.enter(slot, chain, now);
                return true;
            }
            if room == MakeRoom::No || !(checked || self.could_fit(slot, room, headroom, now)) {
                return false;
            }
            checked = true;
            let victim = match room {
                MakeRoom::No => None,
                MakeRoom::Offered => self.offered_victim(now),
                MakeRoom::Any => self.offered_victim(now).or_else(|| self.weakest(now)),
            };
            match victim.filter(|&victim| !self.is_overdue(victim, now)) {
                Some(victim) => self.preempt(victim, now, observer),
                None => return false,
            }
        }
    }

    /// Whether it would fit if everybody whom `room` lets go went; else nobody should. `self.found` is what is cached of it.
    fn could_fit(&mut self, slot: Slot, room: MakeRoom, headroom: u32, now: Micros) -> bool {
        self.n_marks += 1;
        let mut marks = std::mem::take(&mut self.marks);
        let offered = &self.plan.preempt[self.preempt_cursor..];
        let may_go = |slot: Slot| {
            let is_offered = || offered.contains(&self.sequences[slot].request.id.0);
            !self.is_overdue(slot, now) && (room == MakeRoom::Any || is_offered())
        };
        // Blocks of those who stay, shared ones once.
        let (mut n_stay, mut n_kept) = (0, 0);
        for &other in self.running.iter().filter(|&&other| !may_go(other)) {
            n_stay += 1;
            for block in &self.sequences[other].table {
                let before = std::mem::replace(&mut marks[block.0 as usize], self.n_marks);
                n_kept += u32::from(before != self.n_marks);
            }
        }
        let n_shared = self.found.iter().filter(|block| marks[block.0 as usize] == self.n_marks).count();
        let needed = self.config.blocks_for(self.sequences[slot].n_tokens()) - count(n_shared);
        self.marks = marks;
        n_stay < self.config.max_running && n_kept + needed + headroom <= self.config.n_blocks
    }

    /// What is cached of a waiting sequence (left in `self.found`), and how many available blocks admitting it would take.
    fn price(&mut self, slot: Slot) -> (Chain, u32) {
        let sequence = &self.sequences[slot];
        let text = sequence.text();
        self.found.clear();
        let mut chain = Chain::start(false);
        if self.kv.is_cacheable(&sequence.request) {
            chain = self.kv.matching(sequence.findable(), &mut self.found);
        }
        let held = self.found.iter().filter(|&&block| self.kv.pool.references(block) > 0).count();
        (chain, self.config.blocks_for(count(text.tokens.len())) - count(held))
    }

    /// Moves a waiting sequence into the batch, with the blocks in `self.found` and as many of its own as it lacks.
    fn enter(&mut self, slot: Slot, chain: Chain, now: Micros) {
        let sequence = &mut self.sequences[slot];
        let limit = sequence.request.prompt.len() + sequence.request.max_new_tokens as usize;
        if sequence.tokens.is_empty() {
            // All at once: a decode must never have to grow it.
            sequence.tokens.reserve_exact(limit);
            sequence.tokens.extend_from_slice(&sequence.request.prompt);
        }
        let n_blocks = self.config.blocks_for(count(sequence.tokens.len())) as usize;
        sequence.table.reserve_exact(limit.div_ceil(self.config.block_tokens as usize));
        sequence.drafts.reserve(sequence.request.draft_tokens);
        let is_first = sequence.first_admitted.is_none();
        for &block in &self.found {
            self.kv.reuse(block, is_first);
            sequence.table.push(block);
        }
        sequence.chain = chain;
        let cached = count(self.found.len()) * self.config.block_tokens;
        self.queued_tokens -= u64::from(sequence.prompt_remaining());
        sequence.computed = cached;
        self.queued_tokens += u64::from(sequence.prompt_remaining());
        self.n_admissions += 1;
        sequence.admission = self.n_admissions;
        sequence.running = true;
        if self.kv.is_cacheable(&sequence.request) {
            self.counters.prefix_query_tokens += sequence.tokens.len() as u64;
            self.counters.prefix_hit_tokens += u64::from(cached);
            self.gauges.prefix_query_tokens.fetch_add(sequence.tokens.len() as u64, Ordering::Relaxed);
            self.gauges.prefix_hit_tokens.fetch_add(cached.into(), Ordering::Relaxed);
        }
        self.waiting.remove(&self.sequences[slot]);
        self.running.push(slot);
        while self.sequences[slot].table.len() < n_blocks {
            self.push_block(slot);
        }
        self.told.changed(slot, &mut self.sequences);
        if self.sequences[slot].request.sampling.needs_history() {
            self.reserve_history();
        }
        self.start(slot, cached, now);
        self.give_chunk(slot, true);
    }

    /// Makes room for the longest histories that the running sequences can come to, so that no later step has to.
    fn reserve_history(&mut self) {
        let running = self.running.iter().map(|&slot| &self.sequences[slot].request);
        let with_history = running.filter(|request| request.sampling.needs_history());
        let bound = with_history.map(|request| request.prompt.len() + request.max_new_tokens as usize).sum();
        self.step.history.reserve(bound);
        self.ahead.plan.history.reserve(bound);
    }

    /// Tells the sink of the first admission.
    fn start(&mut self, slot: Slot, cached_tokens: u32, now: Micros) {
        let sequence = &mut self.sequences[slot];
        if sequence.first_admitted.is_some() {
            return;
        }
        sequence.first_admitted = Some((now, cached_tokens));
        let queued_us = now.saturating_sub(sequence.request.arrived);
        let state = sequence.request.sink.push(SinkEvent::Started { queued_us, cached_tokens });
        self.heard(slot, state);
    }

    /// Gives a running sequence without one its part of what is left of the step: prefills, and a preempted decode of which
    /// everything but the last token was still cached. `must_move`: a wish of 0 is overruled.
    fn give_chunk(&mut self, slot: Slot, must_move: bool) {
        let sequence = &mut self.sequences[slot];
        if sequence.chunk > 0 {
            return;
        }
        let wish = sequence.wish.take().unwrap_or(self.config.prefill_chunk);
        let wish = if must_move { wish.max(1) } else { wish };
        sequence.chunk = wish.min(self.config.prefill_chunk).min(sequence.remaining()).min(self.budget);
        self.budget -= sequence.chunk;
    }

    /// Blocks to leave for the growth of those that run already, so that an admission is not undone by the next step.
    pub(super) fn headroom(&self) -> u32 {
        count(self.running.len())
    }

    /// The next sequence that the policy offers and that may be taken.
    fn offered_victim(&mut self, now: Micros) -> Option<Slot> {
        while let Some(&id) = self.plan.preempt.get(self.preempt_cursor) {
            self.preempt_cursor += 1;
            if let Some(slot) = self.sequences.find(id)
                && self.sequences[slot].running
                && !self.is_overdue(slot, now)
            {
                return Some(slot);
            }
        }
        None
    }

    /// The host's own victim: not overdue before overdue, then the lowest priority, then the latest.
    fn weakest(&self, now: Micros) -> Option<Slot> {
        let weakness = |slot: &Slot| {
            let sequence = &self.sequences[*slot];
            if self.is_overdue(*slot, now) {
                (false, 0, sequence.order)
            } else {
                (true, sequence.request.priority as u8, sequence.admission)
            }
        };
        self.running.iter().copied().max_by_key(weakness)
    }

    fn extend_table(&mut self, slot: Slot) {
        let n_blocks = self.config.blocks_for(self.sequences[slot].n_tokens()) as usize;
        while self.sequences[slot].table.len() < n_blocks {
            self.push_block(slot);
        }
    }

    pub(super) fn push_block(&mut self, slot: Slot) {
        let block = self.kv.take();
        assert!(block.is_some(), "blocks were counted before they were taken");
        self.sequences[slot].table.extend(block);
    }

    /// Turns the chunks into the step plan: decodes first, then prefills, each in the order of admission.
    pub(super) fn build(&mut self, now: Micros) {
        self.rows.clear();
        for decodes in [true, false] {
            for i in 0..self.running.len() {
                let slot = self.running[i];
                if self.sequences[slot].is_decoding() == decodes {
                    self.build_row(slot, now);
                }
            }
        }
        for id in &self.plan.prefill_id {
            if let Some(slot) = self.sequences.find(*id) {
                self.sequences[slot].wish = None;
            }
        }
    }

    fn build_row(&mut self, slot: Slot, now: Micros) {
        let sequence = &mut self.sequences[slot];
        if sequence.chunk == 0 {
            sequence.stalls(now);
            return;
        }
        sequence.moves(now);
        let n_drafts = sequence.n_drafts();
        let (first, end) = (sequence.computed, sequence.computed + sequence.chunk - n_drafts);
        let drafts = &sequence.drafts.tokens[..n_drafts as usize];
        let step = &mut self.step;
        let mut tokens = append(&mut step.tokens, &sequence.tokens[first as usize..end as usize]);
        tokens.end = append(&mut step.tokens, drafts).end;
        let n_blocks = self.config.blocks_for(end + n_drafts) as usize;
        let blocks = append(&mut step.blocks, &sequence.table[..n_blocks]);
        let samples = end as usize == sequence.tokens.len() && sequence.request.max_new_tokens > 0;
        let sample = samples.then(|| {
            let sample = sample_of(sequence, 0, step);
            if !sample.history.is_empty() {
                append(&mut step.history, drafts);
            }
            sample
        });
        let (id, n_tokens, is_decode) = (sequence.request.id, sequence.chunk, sequence.is_decoding());
        let n_scores = score(sequence, tokens.start, step);
        step.rows.push(Row { request: id, tokens, position: first, blocks, sample, drafts: n_drafts });
        self.rows.push(InFlight { slot, id, n_tokens, n_drafts, n_scores, samples, is_decode });
    }
}

/// How to choose the next token of a sequence, after so many that are not known yet.
pub(super) fn sample_of(sequence: &Sequence, n_unknown: u32, step: &mut StepPlan) -> Sample {
    let request = &sequence.request;
    let index = sequence.generated() + n_unknown;
    let history: &[u32] = if request.sampling.needs_history() { &sequence.tokens } else { &[] };
    let may_stop = index >= request.min_new_tokens || request.stop_tokens.is_empty();
    Sample {
        sampling: request.sampling.clone(),
        index,
        history: append(&mut step.history, history),
        history_prompt: if history.is_empty() { 0 } else { sequence.prompt_tokens() },
        banned: (!may_stop).then(|| request.stop_tokens.clone()),
    }
}

/// Asks for what is to be said of the prompt and can be said after this chunk, whose tokens begin there in the plan.
fn score(sequence: &Sequence, start: u32, step: &mut StepPlan) -> u32 {
    let end = (sequence.computed + sequence.chunk).min(sequence.n_scored + sequence.scores_left());
    let n_scores = end.saturating_sub(sequence.n_scored);
    let Some(top) = sequence.request.sampling.prompt_logprobs.filter(|_| n_scores > 0) else { return 0 };
    let (scored, end) = (sequence.n_scored, end as usize);
    assert!(sequence.computed <= scored, "{:?} skipped tokens that were to be scored", sequence.request.id);
    let after = start + scored - sequence.computed;
    let next = append(&mut step.scored, &sequence.tokens[scored as usize + 1..=end]);
    step.scores.push(Score { after: after..after + n_scores, next, top });
    n_scores
}

/// Appends and says where.
pub(super) fn append<T: Copy>(to: &mut Vec<T>, items: &[T]) -> std::ops::Range<u32> {
    let start = count(to.len());
    to.extend_from_slice(items);
    start..count(to.len())
}
