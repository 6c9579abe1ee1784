//! A step that is planned while the one before it computes, so that the device need not wait for the host in between.
//!
//! Only where nothing is to be decided: everybody who runs gets a token by the step in flight, nobody waits or looks for drafts,
//! nobody's time is up and memory suffices. Then the next step is known but for the tokens, which stay on the device: the same sequences, one token
//! further. A policy is not asked in such a step anyway, and where there is something to decide, it is decided as ever, with
//! everything known. What turns out to have ended with the step in flight is computed once for nothing, and whoever comes before
//! that one's end waits for a decode step more: so the driver calls shortly before it.

use std::sync::atomic::Ordering;

use crate::batch::BatchPolicy;
use crate::config::Config;
use crate::execute::{Row, StepPlan};
use crate::ids::{Micros, RequestId};

use super::select::{append, sample_of};
use super::{InFlight, Scheduler, Slot, count};

/// The step behind the one in flight.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    pub(super) plan: StepPlan,
    /// Empty where none is planned.
    rows: Vec<InFlight>,
}

impl Ahead {
    pub(super) fn new(config: &Config) -> Self {
        let Config { max_running, step_tokens, n_blocks, .. } = *config;
        let plan = StepPlan::with_room(max_running, step_tokens, n_blocks);
        Self { plan, rows: Vec::with_capacity(max_running as usize) }
    }

    /// Whether it computes a token of a request.
    pub(super) fn computes(&self, id: RequestId) -> bool {
        self.rows.iter().any(|row| row.id == id)
    }
}

impl Scheduler {
    /// Plans the step after the one in flight, which it [follows](StepPlan::follows), where there is nothing to decide; `None` where
    /// there is, or where one is planned already. `may` says whose tokens depend on nothing but what the scheduler knows; `places`
    /// are the executor's for [drafts](crate::execute::Executor::draft_places). To be called after
    /// [`review_cache`](Self::review_cache), like [`schedule`](Self::schedule).
    pub fn schedule_ahead(
        &mut self,
        now: Micros,
        policy: &mut dyn BatchPolicy,
        places: u32,
        may: impl Fn(RequestId) -> bool,
    ) -> Option<&StepPlan> {
        if !self.may_go_ahead(now, places, may) {
            return None;
        }
        self.attend(now, policy);
        let missing = self.follow().map(|(slot, _)| self.missing_ahead(slot)).sum::<u32>();
        if missing > self.kv.pool.available() {
            return None;
        }
        self.build_ahead();
        self.n_steps += 1;
        self.counters.steps_ahead += 1;
        self.publish_gauges();
        self.gauges.slack_tokens.store(self.slack_tokens(), Ordering::Relaxed);
        Some(&self.ahead.plan)
    }

    /// Whether [`schedule_ahead`](Self::schedule_ahead) has something to plan, if there is memory for it.
    #[must_use]
    pub fn may_go_ahead(&self, now: Micros, places: u32, may: impl Fn(RequestId) -> bool) -> bool {
        let is_first = self.in_flight && self.ahead.rows.is_empty();
        let is_due = self.n_closed > 0 || now >= self.deadline_bound;
        let is_free = is_first && self.waiting.is_empty() && !is_due && !self.seeks_drafts(places);
        is_free && self.all_sample(may) && self.follow().next().is_some()
    }

    /// Whether everybody who runs gets a token by the step in flight that nobody else has a word in.
    fn all_sample(&self, may: impl Fn(RequestId) -> bool) -> bool {
        let lives = |row: &&InFlight| self.sequences.holds(row.slot, row.id);
        let samples = |row: &InFlight| row.samples && row.n_drafts == 0 && row.n_scores == 0 && may(row.id);
        let mut n_alive = 0;
        self.rows.iter().filter(lives).inspect(|_| n_alive += 1).all(samples) && n_alive == self.running.len()
    }

    /// Whoever goes on after the step in flight, as far as is known, and the place of its token there.
    fn follow(&self) -> impl Iterator<Item = (Slot, u32)> + '_ {
        let sampling = self.rows.iter().filter(|row| row.samples).zip(0..);
        let goes_on = |slot| {
            let sequence = &self.sequences[slot];
            sequence.generated() + 1 < sequence.request.max_new_tokens
        };
        let here = sampling.filter(move |(row, _)| self.sequences.holds(row.slot, row.id) && goes_on(row.slot));
        here.map(|(row, place)| (row.slot, place))
    }

    /// Blocks that it needs beyond its table for the token that it is about to get.
    fn missing_ahead(&self, slot: Slot) -> u32 {
        let sequence = &self.sequences[slot];
        self.config.blocks_for(sequence.n_tokens() + 1).saturating_sub(count(sequence.table.len()))
    }

    fn build_ahead(&mut self) {
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.plan.clear();
        for (slot, place) in self.follow() {
            let id = self.sequences[slot].request.id;
            let row = InFlight { slot, id, n_tokens: 1, n_drafts: 0, n_scores: 0, samples: true, is_decode: true };
            ahead.rows.push(row);
            ahead.plan.follows.push(place);
        }
        for row in &ahead.rows {
            for _ in 0..self.missing_ahead(row.slot) {
                self.push_block(row.slot);
            }
            let (sequence, plan) = (&self.sequences[row.slot], &mut ahead.plan);
            let position = sequence.n_tokens();
            let n_blocks = self.config.blocks_for(position + 1) as usize;
            let blocks = append(&mut plan.blocks, &sequence.table[..n_blocks]);
            let tokens = append(&mut plan.tokens, &[0]);
            let sample = Some(sample_of(sequence, 1, plan));
            plan.rows.push(Row { request: row.id, tokens, position, blocks, sample, drafts: 0 });
        }
        self.ahead = ahead;
    }

    /// The step behind the one that has landed is now the one in flight.
    pub(super) fn take_off(&mut self, now: Micros) {
        if self.ahead.rows.is_empty() {
            return;
        }
        std::mem::swap(&mut self.step, &mut self.ahead.plan);
        std::mem::swap(&mut self.rows, &mut self.ahead.rows);
        for row in &self.rows {
            if self.sequences.holds(row.slot, row.id) {
                self.sequences[row.slot].chunk = row.n_tokens;
            }
        }
        (self.in_flight, self.step_started, self.generation) = (true, now, 0);
    }
}
