//! An engine without tensors. Every KV cell holds the hash of the text up to its position, and a token is a function of the
//! cell before it: reading a wrong block, a stale cache entry or a skipped position changes the answer, and `reference`
//! says what the answer should have been. A text that has come to [`CIRCLE`] repeats itself for a while, so that drafts can
//! come true.

use pointsman_sched::execute::{ExecuteError, Executor, Sampled, StepOutput, StepPlan};
use pointsman_sched::prefix::chain_hash;
use pointsman_sched::sampler::EditSource;

#[derive(Debug)]
pub(crate) struct ModelEngine {
    cells: Vec<u64>,
    block_tokens: usize,
    /// What the last step sampled.
    sampled: Vec<u32>,
    /// Fails the next step, and spoils every block that it could have touched.
    pub(crate) fails_next: bool,
}

impl ModelEngine {
    pub(crate) fn new(n_blocks: u32, block_tokens: u32) -> Self {
        let n_cells = n_blocks as usize * block_tokens as usize;
        Self { cells: vec![0; n_cells], block_tokens: block_tokens as usize, sampled: Vec::new(), fails_next: false }
    }

    fn spoil(&mut self, plan: &StepPlan) {
        for block in &plan.blocks {
            let start = block.0 as usize * self.block_tokens;
            self.cells[start..start + self.block_tokens].fill(0xdead);
        }
    }
}

impl Executor for ModelEngine {
    fn execute(
        &mut self,
        plan: &StepPlan,
        _edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError> {
        out.sampled.clear();
        out.after_drafts.clear();
        out.scores.clear();
        if std::mem::take(&mut self.fails_next) {
            self.spoil(plan);
            // What follows it goes on from anything.
            self.sampled = vec![1; plan.rows.len()];
            return Err(ExecuteError::Device { what: "simulated".into() });
        }
        let n = self.block_tokens;
        let follows: Vec<u32> = plan.follows.iter().map(|&place| self.sampled[place as usize]).collect();
        assert!(follows.is_empty() || follows.len() == plan.tokens.len(), "each row follows with one token");
        let all = if follows.is_empty() { &plan.tokens } else { &follows };
        for row in &plan.rows {
            let table = plan.blocks_of(row);
            let cell = |position: usize| table[position / n].0 as usize * n + position % n;
            let position = row.position as usize;
            let mut state = position.checked_sub(1).map_or(0, |before| self.cells[cell(before)]);
            let tokens = &all[row.tokens.start as usize..row.tokens.end as usize];
            let n_known = tokens.len() - row.drafts as usize;
            for (i, &token) in tokens.iter().enumerate() {
                state = chain_hash(state, &[token]);
                self.cells[cell(position + i)] = state;
                let Some(sample) = row.sample.as_ref().filter(|_| i + 1 >= n_known) else { continue };
                let token = next_token((state, token), sample.banned.as_deref().unwrap_or(&[]));
                let chosen = if i + 1 == n_known { &mut out.sampled } else { &mut out.after_drafts };
                chosen.push(Sampled { token, logprobs: None });
            }
        }
        self.sampled.clear();
        self.sampled.extend(out.sampled.iter().map(|sampled| sampled.token));
        Ok(())
    }
}

/// Tokens that the model can say, besides those of the circle.
const VOCABULARY: u64 = 997;
/// A text whose last token is one of these goes round the first five of them, but for one of the others now and then.
pub(crate) const CIRCLE: std::ops::Range<u32> = 60_000..60_008;

/// What follows a text: its state, and its last token.
fn next_token((state, last): (u64, u32), banned: &[u32]) -> u32 {
    let some = |n: u64| u32::try_from(state / 12 % n).expect("small");
    let token = match last.checked_sub(CIRCLE.start) {
        Some(0..8) if state.is_multiple_of(12) => CIRCLE.start + 5 + some(3),
        Some(at @ 0..5) => CIRCLE.start + (at + 1) % 5,
        Some(5..8) => CIRCLE.start + some(5),
        _ => u32::try_from(state % VOCABULARY).expect("a small vocabulary"),
    };
    (token..).find(|token| !banned.contains(token)).expect("few tokens are banned")
}

/// What the rules of a request make of it when it is alone in the world: tokens, without the stop token.
pub(crate) fn reference(prompt: &[u32], max_new: u32, min_new: u32, stop: &[u32]) -> Vec<u32> {
    let mut state = prompt.iter().fold(0, |state, &token| chain_hash(state, &[token]));
    let mut last = prompt.last().copied().unwrap_or_default();
    let mut tokens = Vec::new();
    for index in 0..max_new {
        let token = next_token((state, last), if index < min_new { stop } else { &[] });
        if stop.contains(&token) {
            break;
        }
        tokens.push(token);
        state = chain_hash(state, &[token]);
        last = token;
    }
    tokens
}
