//! Drafts in a step: proposed before it, added where it has room, and held against what was chosen after it.
//!
//! They come last, after everything that the policy and the bounds decide about tokens that must be computed, and take only
//! what is left over: of the step's tokens, of the places in which a token can be chosen, and of blocks that are free. Blocks that
//! no token has come to need go back with the step. So nobody is put back, kept out or loses a prefix because somebody guesses;
//! what it costs the others is a longer step, and the places are few for that reason.

use crate::execute::Sampled;
use crate::ids::RequestId;

use super::{InFlight, Scheduler, Slot, count};

impl Scheduler {
    /// Looks for drafts for the decodes that asked for some and that `may` have them: those whose next token depends on
    /// nothing but what the scheduler knows. To be called before [`schedule`](Self::schedule) with the executor's
    /// [places](crate::execute::Executor::draft_places); without it there are none.
    pub fn propose(&mut self, places: u32, may: impl Fn(RequestId) -> bool) {
        self.draft_places = places.min(self.config.max_running);
        if self.draft_places == 0 {
            return;
        }
        let has_places = count(self.running.len()) < self.draft_places;
        for &slot in &self.running {
            let sequence = &mut self.sequences[slot];
            let (request, generated) = (&sequence.request, sequence.generated());
            // The last token is chosen and never computed.
            let mut most = request.draft_tokens.min((request.max_new_tokens - generated).saturating_sub(1));
            if generated < request.min_new_tokens {
                // Stop tokens are forbidden in all of the row's choices, or in none.
                most = most.min(request.min_new_tokens - generated - 1);
            }
            let pays = has_places && most > 0 && sequence.is_decoding() && sequence.drafts.are_worth_it(generated);
            let most = if pays && may(sequence.request.id) { most } else { 0 };
            sequence.drafts.propose(&sequence.tokens, most, &sequence.request.stop_tokens);
        }
    }

    /// Adds drafts to the decodes of this step.
    pub(super) fn lengthen(&mut self) {
        let samples = |&&slot: &&Slot| self.sequences[slot].chunk == self.sequences[slot].remaining();
        let mut places =
            std::mem::take(&mut self.draft_places).saturating_sub(count(self.running.iter().filter(samples).count()));
        let mut n_left = count(self.running.iter().filter(|&&slot| self.sequences[slot].has_drafts()).count());
        for i in 0..self.running.len() {
            let slot = self.running[i];
            let sequence = &self.sequences[slot];
            if places == 0 || !sequence.has_drafts() {
                continue;
            }
            // What one leaves of its share is the others'.
            let share = places.div_ceil(n_left);
            let mut n = count(sequence.drafts.tokens.len()).min(share).min(self.budget);
            let (n_tokens, n_held) = (sequence.n_tokens(), count(sequence.table.len()));
            let missing = self.config.blocks_for(n_tokens + n).saturating_sub(n_held);
            // Never a block that is still good for a prefix.
            if missing.saturating_add(self.headroom()) > self.kv.pool.counts().free {
                n = n.min(n_held * self.config.block_tokens - n_tokens);
            }
            for _ in n_held..self.config.blocks_for(n_tokens + n) {
                self.push_block(slot);
            }
            self.sequences[slot].chunk += n;
            self.budget -= n;
            places -= n;
            n_left -= 1;
        }
    }

    /// How many of a row's drafts are what was chosen in their places; `sampled` and what stands `after` them was.
    pub(super) fn verify(&mut self, row: &InFlight, sampled: &Sampled, after: &[Sampled]) -> usize {
        if row.n_drafts == 0 {
            return 0;
        }
        let sequence = &mut self.sequences[row.slot];
        let chosen = std::iter::once(sampled).chain(after).map(|sampled| sampled.token);
        let same = sequence.drafts.tokens.iter().zip(chosen).take(row.n_drafts as usize);
        let came_true = same.take_while(|(draft, chosen)| **draft == *chosen).count();
        let accepted = count(came_true);
        sequence.drafts.learn(row.n_drafts, accepted, sequence.generated());
        self.counters.draft_tokens += u64::from(row.n_drafts);
        self.counters.accepted_tokens += u64::from(accepted);
        came_true
    }

    /// Gives back what only drafts needed.
    pub(super) fn shorten(&mut self, row: &InFlight) {
        if row.n_drafts == 0 || !self.sequences.holds(row.slot, row.id) {
            return;
        }
        let sequence = &mut self.sequences[row.slot];
        let n_needed = self.config.blocks_for(sequence.n_tokens()) as usize;
        for block in sequence.table.drain(n_needed.min(sequence.table.len())..) {
            self.kv.pool.release(block);
        }
    }
}
