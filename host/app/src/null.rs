//! An executor that computes nothing: every other part of the host under load, without a model's time.
//!
//! It answers each row with a plain word of the vocabulary, at once or after a fixed time per step, so that the host's own cost, its
//! queues and its behaviour under overload can be measured on any machine. A step that takes time is computed in halves, as on a
//! GPU. Here and not in the engine: it needs a clock and knows no tensors.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pointsman_sched::execute::{
    ExecuteError, Executor, InHalves, PoolSize, Row, Sample, Sampled, StepOutput, StepPlan,
};
use pointsman_sched::ids::Micros;
use pointsman_sched::request::TokenLogprobs;
use pointsman_sched::sampler::{Edit, EditSource};
use pointsman_server::text::TextModel;

use crate::clock::SystemClock;

/// Answers without computing.
#[derive(Debug)]
pub(crate) struct NullExecutor {
    /// Tokens that it says: text of their own, and the end of nothing.
    words: Vec<u32>,
    vocabulary: u32,
    /// Time of a step.
    step: Micros,
    clock: Arc<SystemClock>,
    /// What steps come to that are not finished, and when they are done.
    begun: VecDeque<(StepOutput, Micros)>,
    /// What the last of them samples.
    sampled: Vec<u32>,
}

impl NullExecutor {
    /// Says words of `text`, each step after `step`.
    pub(crate) fn new(text: &TextModel, step: Micros, clock: Arc<SystemClock>) -> Self {
        let vocabulary = text.vocabulary();
        let is_word = |id: &u32| {
            let bytes = text.token_bytes(*id);
            let letters = bytes.strip_prefix(b" ").unwrap_or(&bytes);
            !letters.is_empty() && letters.iter().all(u8::is_ascii_alphabetic) && !text.stop_tokens().contains(id)
        };
        let mut words: Vec<u32> = (0..vocabulary).filter(is_word).collect();
        if words.is_empty() {
            words.push(0);
        }
        Self { words, vocabulary, step, clock, begun: VecDeque::new(), sampled: Vec::new() }
    }

    /// A word that follows from the last token and its place alone, unless an edit or a ban says otherwise.
    fn choose(&self, last: u32, row: &Row, sample: &Sample, edits: &mut dyn EditSource) -> Option<Sampled> {
        let position = row.position as usize + row.tokens.len();
        let start = position.wrapping_mul(31).wrapping_add(last as usize) % self.words.len();
        let mut words = self.words[start..].iter().chain(&self.words[..start]).copied();
        let banned = |token: u32| sample.banned.as_ref().is_some_and(|banned| banned.contains(&token));
        let token = match edits.edit(row.request).as_deref() {
            // As in the engine, a ban that leaves nothing of what is allowed does not count.
            Some(Edit::Allow(allowed)) => {
                allowed.iter().copied().find(|&token| !banned(token)).or_else(|| allowed.first().copied())
            }
            Some(Edit::Only(set)) => set.tokens().find(|&token| !banned(token)).or_else(|| set.tokens().next()),
            Some(Edit::Forbid(forbidden)) => {
                let free = |token: &u32| !banned(*token) && forbidden.binary_search(token).is_err();
                words.find(free).or_else(|| (0..self.vocabulary).find(free))
            }
            Some(Edit::Bias(_)) | None => words.find(|&token| !banned(token)),
        }?;
        let logprobs = sample.sampling.logprobs.map(|n| Box::new(self.even(n)));
        Some(Sampled { token, logprobs })
    }

    /// Nothing is likelier than anything else.
    fn even(&self, top: u8) -> TokenLogprobs {
        let even = -(self.vocabulary.max(1) as f32).ln();
        TokenLogprobs { chosen: even, top: self.words.iter().take(top.into()).map(|&word| (word, even)).collect() }
    }
}

impl Executor for NullExecutor {
    fn scores_prompts(&self) -> bool {
        true
    }

    fn execute(
        &mut self,
        plan: &StepPlan,
        edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError> {
        self.begin(plan, edits)?;
        self.finish(plan, out)
    }

    fn resize_pool(&mut self, n_blocks: u32) -> Result<Option<PoolSize>, ExecuteError> {
        Ok(Some(PoolSize { n_blocks, bytes: 0, spare: 0 }))
    }

    fn in_halves(&mut self) -> Option<&mut dyn InHalves> {
        if self.step > 0 { Some(self) } else { None }
    }
}

impl InHalves for NullExecutor {
    fn begin(&mut self, plan: &StepPlan, edits: &mut dyn EditSource) -> Result<(), ExecuteError> {
        let before = self.begun.back().map_or(0, |(_, done)| *done);
        let done = self.clock.micros().max(before) + self.step;
        let mut out = StepOutput::default();
        for (at, row) in plan.rows.iter().enumerate() {
            if row.drafts > 0 {
                return Err(ExecuteError::Malformed {
                    what: "a row with drafts, for which this executor has no places",
                });
            }
            if let Some(sample) = &row.sample {
                let follows = plan.follows.get(at).and_then(|&place| self.sampled.get(place as usize));
                let last = follows.or(plan.tokens_of(row).last()).copied().unwrap_or_default();
                let chosen = self.choose(last, row, sample, edits);
                out.sampled.push(chosen.ok_or(ExecuteError::Device { what: "every token is forbidden".into() })?);
            }
        }
        for score in &plan.scores {
            out.scores.extend(score.next.clone().map(|_| self.even(score.top)));
        }
        self.sampled.clear();
        self.sampled.extend(out.sampled.iter().map(|sampled| sampled.token));
        self.begun.push_back((out, done));
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "waiting is what a paced step consists of")]
    fn finish(&mut self, _plan: &StepPlan, out: &mut StepOutput) -> Result<(), ExecuteError> {
        let begun = self.begun.pop_front();
        let (found, done) = begun.ok_or(ExecuteError::Malformed { what: "a step that was not begun" })?;
        (out.sampled, out.scores) = (found.sampled, found.scores);
        out.after_drafts.clear();
        if self.step > 0 {
            std::thread::sleep(Duration::from_micros(done.saturating_sub(self.clock.micros())));
        }
        Ok(())
    }
}
