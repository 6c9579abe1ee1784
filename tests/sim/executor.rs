//! An engine without tensors. Every KV cell holds the hash of the text up to its position, and a token is a function of the
//! cell before it: reading a wrong block, a stale cache entry or a skipped position changes the answer, and `reference`
//! says what the answer should have been.

use pointsman_sched::execute::{ExecuteError, Executor, Sampled, StepOutput, StepPlan};
use pointsman_sched::prefix::chain_hash;
use pointsman_sched::sampler::EditSource;

#[derive(Debug)]
pub(crate) struct ModelEngine {
    cells: Vec<u64>,
    block_tokens: usize,
    /// Fails the next step, and spoils every block that it could have touched.
    pub(crate) fails_next: bool,
}

impl ModelEngine {
    pub(crate) fn new(n_blocks: u32, block_tokens: u32) -> Self {
        let n_cells = n_blocks as usize * block_tokens as usize;
        Self { cells: vec![0; n_cells], block_tokens: block_tokens as usize, fails_next: false }
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
        if std::mem::take(&mut self.fails_next) {
            self.spoil(plan);
            return Err(ExecuteError::Device { what: "simulated".into() });
        }
        let n = self.block_tokens;
        for row in &plan.rows {
            let table = plan.blocks_of(row);
            let cell = |position: usize| table[position / n].0 as usize * n + position % n;
            let position = row.position as usize;
            let mut state = position.checked_sub(1).map_or(0, |before| self.cells[cell(before)]);
            for (i, &token) in plan.tokens_of(row).iter().enumerate() {
                state = chain_hash(state, &[token]);
                self.cells[cell(position + i)] = state;
            }
            if let Some(sample) = &row.sample {
                let token = next_token(state, sample.banned.as_deref().unwrap_or(&[]));
                out.sampled.push(Sampled { token, logprobs: None });
            }
        }
        Ok(())
    }
}

/// Tokens that the model can say.
const VOCABULARY: u64 = 997;

fn next_token(state: u64, banned: &[u32]) -> u32 {
    let token = u32::try_from(state % VOCABULARY).expect("a small vocabulary");
    (token..).find(|token| !banned.contains(token)).expect("few tokens are banned")
}

/// What the rules of a request make of it when it is alone in the world: tokens, without the stop token.
pub(crate) fn reference(prompt: &[u32], max_new: u32, min_new: u32, stop: &[u32]) -> Vec<u32> {
    let mut state = prompt.iter().fold(0, |state, &token| chain_hash(state, &[token]));
    let mut tokens = Vec::new();
    for index in 0..max_new {
        let token = next_token(state, if index < min_new { stop } else { &[] });
        if stop.contains(&token) {
            break;
        }
        tokens.push(token);
        state = chain_hash(state, &[token]);
    }
    tokens
}
