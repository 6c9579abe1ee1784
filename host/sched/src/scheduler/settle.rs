//! What comes back from the engine: tokens, or a failure.
//!
//! A sequence may have been cancelled while its step was in flight; its row is then skipped. Blocks enter the prefix index
//! here and nowhere else, after the step that filled them has succeeded.

use pointsman_telemetry::{Event, EventKind};

use crate::execute::{ExecuteError, Sampled, StepOutput};
use crate::ids::Micros;
use crate::kv::Origin;
use crate::observe::Observer;
use crate::request::{CancelCause, Drafted, Failure, FinishReason, Request, SinkEvent, SinkState, TokenLogprobs};
use crate::sequence::Slot;

use super::ending::Ending;
use super::{InFlight, LastStep, Scheduler, count, event};

/// What a step came to for one of its rows.
enum Chosen<'a> {
    /// It was not sampled.
    Nothing,
    /// The next token, and those after its drafts.
    Token(Sampled, &'a mut [Sampled]),
    /// Its token is not used: the last of its positions counts as not computed.
    Withheld,
}

impl Scheduler {
    /// Applies the output of the step in flight: emits tokens, ends what is done. `out` is left empty. An output that does
    /// not match the plan fails the step like an [`ExecuteError`].
    pub fn complete(&mut self, now: Micros, out: &mut StepOutput, observer: &mut dyn Observer) {
        let n_drafts: usize = self.rows.iter().map(|row| row.n_drafts as usize).sum();
        let n_scores: usize = self.rows.iter().map(|row| row.n_scores as usize).sum();
        let n_samples = self.rows.iter().filter(|row| row.samples).count();
        if (out.sampled.len(), out.after_drafts.len(), out.scores.len()) != (n_samples, n_drafts, n_scores) {
            out.sampled.clear();
            out.after_drafts.clear();
            out.scores.clear();
            out.withheld.clear();
            let what = "the output has another number of tokens than the plan has rows to sample and tokens to score";
            return self.fail_step(now, &ExecuteError::Malformed { what }, observer);
        }
        let rows = self.land();
        let mut sampled = out.sampled.drain(..).peekable();
        let mut scores = out.scores.drain(..);
        let withheld = &out.withheld;
        let mut after_drafts = &mut out.after_drafts[..];
        let mut tokens = 0;
        for row in &rows {
            let after = after_drafts.split_off_mut(..row.n_drafts as usize).unwrap_or_default();
            let chosen = match sampled.next_if(|_| row.samples) {
                None => Chosen::Nothing,
                Some(_) if withheld.contains(&row.id) => {
                    assert!(!self.ahead.computes(row.id), "{:?} goes on from a token that is withheld", row.id);
                    Chosen::Withheld
                }
                Some(sampled) => Chosen::Token(sampled, after),
            };
            tokens += row.n_tokens;
            let phase =
                if row.is_decode { &mut self.counters.decode_tokens } else { &mut self.counters.prefill_tokens };
            *phase += u64::from(row.n_tokens);
            let scores = scores.by_ref().take(row.n_scores as usize);
            if self.sequences.holds(row.slot, row.id) {
                self.take_scores(row.slot, scores);
                self.settle(row, chosen, now, observer);
            } else {
                scores.for_each(drop);
            }
        }
        drop(scores);
        out.withheld.clear();
        out.after_drafts.clear();
        self.rows = rows;
        self.rows.clear();
        self.last_step = LastStep { took: now.saturating_sub(self.step_started), tokens };
        self.counters.steps += 1;
        let (a, b) = (self.last_step.took, u64::from(tokens));
        observer.observe(Event { generation: self.generation, a, b, ..Event::new(now, EventKind::Step) });
        self.take_off(now);
        self.publish_gauges();
    }

    /// The step in flight has failed: its sequences fail once, and nothing that its blocks hold is trusted again. Others
    /// that share such a block are put back into the queue. Of a step that follows it nothing is used: its sequences are among them.
    pub fn fail_step(&mut self, now: Micros, error: &ExecuteError, observer: &mut dyn Observer) {
        let mut rows = self.land();
        let failure = match error {
            ExecuteError::Lost { .. } => Failure::DeviceLost,
            other => Failure::Engine(other.to_string().into()),
        };
        let mut spoiled = std::mem::take(&mut self.found);
        spoiled.clear();
        spoiled.extend_from_slice(&self.step.blocks);
        spoiled.sort_unstable();
        for &block in &spoiled {
            self.kv.forget(block);
        }
        for row in rows.drain(..) {
            if self.sequences.holds(row.slot, row.id) {
                self.end(row.slot, Ending::Failed(failure.clone()), now, observer);
            }
        }
        self.rows = rows;
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        let shares = |slot: &Slot| self.sequences[*slot].table.iter().any(|block| spoiled.binary_search(block).is_ok());
        slots.extend(self.running.iter().copied().filter(shares));
        for &slot in &slots {
            self.preempt(slot, now, observer);
        }
        (self.found, self.slots) = (spoiled, slots);
        self.take_off(now);
        self.publish_gauges();
    }

    /// The rows of the step in flight, which it ends.
    fn land(&mut self) -> Vec<InFlight> {
        assert!(std::mem::replace(&mut self.in_flight, false), "no step is in flight");
        std::mem::take(&mut self.rows)
    }

    fn settle(&mut self, row: &InFlight, chosen: Chosen<'_>, now: Micros, observer: &mut dyn Observer) {
        let sequence = &mut self.sequences[row.slot];
        assert_eq!(sequence.chunk, row.n_tokens, "{:?} changed while its step was in flight", row.id);
        sequence.chunk = 0;
        let known = row.n_tokens - row.n_drafts;
        self.advance(row.slot, known - u32::from(matches!(chosen, Chosen::Withheld)), now);
        let sequence = &mut self.sequences[row.slot];
        if sequence.closed {
            // Whoever closed it had time to say why.
            self.end(row.slot, Ending::Cancelled(CancelCause::ClientGone), now, observer);
        } else if matches!(chosen, Chosen::Nothing) && sequence.generated() == 0 {
            if sequence.request.max_new_tokens == 0 && sequence.computed == sequence.prompt_tokens() {
                return self.end(row.slot, Ending::Finished(FinishReason::Length), now, observer);
            }
            sequence.request.sink.prefilled(sequence.computed);
        } else if let Chosen::Token(sampled, after) = chosen {
            let came_true = self.verify(row, &sampled, after);
            let drafted = Drafted { is_draft: came_true > 0, rejected: row.n_drafts - count(came_true) };
            self.emit(row.slot, (sampled, drafted), now, observer);
            for (i, next) in after[..came_true].iter_mut().enumerate() {
                if !self.sequences.holds(row.slot, row.id) || self.sequences[row.slot].closed {
                    break;
                }
                self.advance(row.slot, 1, now);
                let sampled = Sampled { token: next.token, logprobs: next.logprobs.take() };
                // The last one is what the model goes on with.
                let drafted = Drafted { is_draft: i + 1 < came_true, rejected: 0 };
                self.emit(row.slot, (sampled, drafted), now, observer);
            }
            self.shorten(row);
        }
    }

    /// Keeps what a step said of a prompt, and hands all of it to the sink when nothing is missing. A preemption does not lose it.
    fn take_scores(&mut self, slot: Slot, scores: impl Iterator<Item = TokenLogprobs>) {
        let sequence = &mut self.sequences[slot];
        let n_left = sequence.scores_left();
        if n_left == 0 {
            return;
        }
        sequence.scores.reserve_exact(n_left as usize);
        let n_before = sequence.scores.len();
        sequence.scores.extend(scores);
        sequence.n_scored += count(sequence.scores.len() - n_before);
        if sequence.scores_left() > 0 {
            return;
        }
        let told = SinkEvent::Scored(std::mem::take(&mut sequence.scores));
        let state = sequence.request.sink.push(told);
        self.heard(slot, state);
    }

    /// The next `n` tokens of a sequence are computed.
    fn advance(&mut self, slot: Slot, n: u32, now: Micros) {
        let sequence = &mut self.sequences[slot];
        self.queued_tokens -= u64::from(sequence.prompt_remaining());
        sequence.computed += n;
        self.queued_tokens += u64::from(sequence.prompt_remaining());
        let mut chain = sequence.chain;
        let Request { tenant, transient, .. } = sequence.request;
        let origin = Origin { tenant, now, transient };
        self.kv.publish(sequence.text(), (&sequence.table, sequence.computed), &mut chain, origin);
        sequence.chain = chain;
    }

    /// Appends a token to its sequence and hands it to the sink; ends the sequence if that was the last one.
    fn emit(&mut self, slot: Slot, (sampled, drafted): (Sampled, Drafted), now: Micros, observer: &mut dyn Observer) {
        let Sampled { token, logprobs } = sampled;
        let sequence = &mut self.sequences[slot];
        if sequence.request.stop_tokens.contains(&token) {
            return self.end(slot, Ending::Finished(FinishReason::Stop(token)), now, observer);
        }
        sequence.tokens.push(token);
        self.counters.generated_tokens += 1;
        if sequence.generated() == 1 {
            let arrived = sequence.request.arrived;
            let admitted = sequence.first_admitted.map_or(now, |(at, _)| at);
            let numbers = (now.saturating_sub(arrived), admitted.saturating_sub(arrived));
            observer.observe(event(sequence, now, EventKind::FirstToken, numbers));
        }
        let state = sequence.request.sink.push(SinkEvent::Token { token, logprobs, drafted });
        if sequence.generated() >= sequence.request.max_new_tokens {
            self.end(slot, Ending::Finished(FinishReason::Length), now, observer);
        } else {
            self.heard(slot, state);
        }
    }

    /// What a sink answers to anything but the last word. One that wants no more ends before the next step and not at once: whoever
    /// closed it may have said why, and that lies in the driver's mailbox still.
    pub(super) fn heard(&mut self, slot: Slot, state: SinkState) {
        let sequence = &mut self.sequences[slot];
        if state == SinkState::Closed && !std::mem::replace(&mut sequence.closed, true) {
            self.n_closed += 1;
        }
    }
}
