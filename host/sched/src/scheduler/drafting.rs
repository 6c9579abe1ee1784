//! Drafts in a step: proposed before it, added where it has room, and held against what was chosen after it.
//!
//! They come last, after everything that the policy and the bounds decide about tokens that must be computed, and take only
//! what is left over: of the step's tokens, of the places in which a token can be chosen, and of blocks that are free. Blocks that
//! no token has come to need go back with the step. So nobody is put back, kept out or loses a prefix because somebody guesses;
//! what it costs the others is a longer step, and the places are few for that reason.

use crate::draft::DraftMethod;
use crate::draft::model::DraftModel;
use crate::execute::Sampled;
use crate::ids::RequestId;
use crate::sequence::Sequence;

use super::{Counters, InFlight, Scheduler, Slot, count};

impl Scheduler {
    /// Has a draft model propose for the requests that ask for [it](DraftMethod::Model).
    pub fn draft_with(&mut self, model: DraftModel) {
        self.draft_model = Some(model);
    }

    /// The draft model, where there is one.
    pub fn draft_model(&mut self) -> Option<&mut DraftModel> {
        self.draft_model.as_mut()
    }

    /// Looks for drafts for the decodes that asked for some and that `may` have them: those whose next token depends on
    /// nothing but what the scheduler knows. To be called before [`schedule`](Self::schedule) with the executor's
    /// [places](crate::execute::Executor::draft_places); without it there are none. A draft model computes meanwhile.
    pub fn propose(&mut self, places: u32, may: impl Fn(RequestId) -> bool) -> bool {
        self.draft_places = places.min(self.config.max_running);
        if self.draft_places == 0 {
            return false;
        }
        let spare = self.draft_places.saturating_sub(count(self.running.len()));
        let mut is_asked = false;
        let Self { draft_model, sequences, running, .. } = self;
        for &slot in running.iter() {
            let sequence = &mut sequences[slot];
            let most = if spare > 0 { sequence.most_drafts() } else { 0 };
            let most = if most > 0 && may(sequence.request.id) { most } else { 0 };
            match sequence.request.draft_method {
                DraftMethod::Ngram => sequence.drafts.propose(&sequence.tokens, most, &sequence.request.stop_tokens),
                DraftMethod::Model => {
                    let (id, n_text) = (sequence.request.id, count(sequence.tokens.len()));
                    let may = |model: &mut DraftModel| model.may_draft(id, n_text);
                    let most = if most > 0 && draft_model.as_mut().is_some_and(may) { most } else { 0 };
                    is_asked |= sequence.drafts.want(most) > 0;
                }
            }
        }
        is_asked && self.ask_model(spare)
    }

    /// Whether the next step may have drafts of those who decode already, where a step has so many
    /// [places](crate::execute::Executor::draft_places): they are looked for when everything is known.
    pub(super) fn seeks_drafts(&self, places: u32) -> bool {
        let seeks = |slot: &Slot| {
            let sequence = &self.sequences[*slot];
            let is_able = sequence.request.draft_method == DraftMethod::Ngram || self.draft_model.is_some();
            is_able && sequence.most_drafts() > 0
        };
        places > count(self.running.len()) && self.running.iter().any(seeks)
    }

    /// Asks the draft model, for no more than steps have places for: its drafts are not for nothing. Texts that it knows come first;
    /// the others are computed beside, where they will have places once they are known. Whether it computed.
    fn ask_model(&mut self, places: u32) -> bool {
        let Self { draft_model: Some(model), sequences, running, .. } = self else { return false };
        model.begin();
        let asks =
            |sequence: &&Sequence| sequence.request.draft_method == DraftMethod::Model && sequence.drafts.wanted > 0;
        let asking = || running.iter().map(|&slot| &sequences[slot]).filter(asks);
        let is_known = |model: &DraftModel, sequence: &Sequence| model.knows(sequence.request.id, sequence.n_tokens());
        let mut spare = places;
        let mut n_left = count(asking().filter(|sequence| is_known(model, sequence)).count());
        for sequence in asking() {
            if spare > 0 && is_known(model, sequence) {
                let n = sequence.drafts.wanted.min(spare.div_ceil(n_left));
                spare -= model.want(&sequence.request, &sequence.tokens, n);
                n_left -= 1;
            }
        }
        for sequence in asking().take(places as usize) {
            if !is_known(model, sequence) {
                spare -= model.want(&sequence.request, &sequence.tokens, sequence.drafts.wanted.min(spare));
            }
        }
        let least_percent = model.least_percent();
        model.draft(|request, tokens| {
            if let Some(slot) = sequences.find(request.0) {
                sequences[slot].drafts.take(tokens, least_percent);
            }
        })
    }

    /// Adds drafts to the decodes of this step.
    pub(super) fn lengthen(&mut self) {
        let n_rows = count(self.running.iter().filter(|&&slot| self.sequences[slot].chunk > 0).count());
        let mut places = std::mem::take(&mut self.draft_places).saturating_sub(n_rows);
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
        let by_model = sequence.request.draft_method == DraftMethod::Model;
        let Counters { draft_tokens, accepted_tokens, model_draft_tokens, model_accepted_tokens, .. } =
            &mut self.counters;
        *draft_tokens += u64::from(row.n_drafts);
        *accepted_tokens += u64::from(accepted);
        if by_model {
            *model_draft_tokens += u64::from(row.n_drafts);
            *model_accepted_tokens += u64::from(accepted);
        }
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
