//! The sizes of an engine, whatever computes it, and the promises of a plan that every backend relies on.
//!
//! Checked once per step, here, because a kernel that trusted a bad plan would read or write memory of somebody else.

use pointsman_sched::execute::{ExecuteError, Score, StepPlan};

use crate::spec::ModelSpec;

/// Positions in a block are a multiple of this: kernels load that many at once.
const BLOCK_STEP: usize = 16;

/// Sizes of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Blocks of the KV pool.
    pub n_blocks: usize,
    /// Positions in a block; a multiple of 16.
    pub block_tokens: usize,
    /// Tokens that one step may compute.
    pub max_step_tokens: usize,
    /// Rows that one step may have.
    pub max_rows: usize,
    /// Positions that a sequence may have; at most the model's context.
    pub context_tokens: usize,
}

/// A size that an engine cannot have. The configuration is at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A size is zero.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// Blocks that the kernels cannot address.
    #[error("block_tokens is {0}; it must be a multiple of 16")]
    BlockTokens(usize),
    /// More positions than the model was trained for.
    #[error("context_tokens is {asked}, the model was made for {context}; ask for at most that")]
    Context {
        /// What the configuration asks for.
        asked: usize,
        /// What the model has.
        context: usize,
    },
}

// === impl EngineConfig ===

impl EngineConfig {
    pub(super) fn check(&self, spec: &ModelSpec) -> Result<(), ConfigError> {
        let Self { n_blocks, block_tokens, max_step_tokens, max_rows, context_tokens } = *self;
        let sizes = [
            ("n_blocks", n_blocks),
            ("block_tokens", block_tokens),
            ("max_step_tokens", max_step_tokens),
            ("max_rows", max_rows),
            ("context_tokens", context_tokens),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(ConfigError::Zero(name));
        }
        if !block_tokens.is_multiple_of(BLOCK_STEP) {
            return Err(ConfigError::BlockTokens(block_tokens));
        }
        let context = spec.context;
        if context_tokens > context {
            return Err(ConfigError::Context { asked: context_tokens, context });
        }
        Ok(())
    }

    /// Checks every promise of the seam that the kernels rely on.
    pub(super) fn check_plan(&self, plan: &StepPlan, vocab: usize) -> Result<(), ExecuteError> {
        let expect = |holds: bool, what| if holds { Ok(()) } else { Err(ExecuteError::Malformed { what }) };
        expect(plan.rows.len() <= self.max_rows, "more rows than max_rows")?;
        expect(plan.tokens.len() <= self.max_step_tokens, "more tokens than max_step_tokens")?;
        expect(plan.tokens.iter().all(|&token| (token as usize) < vocab), "a token outside the vocabulary")?;
        expect(plan.blocks.iter().all(|&block| (block.0 as usize) < self.n_blocks), "a block outside the pool")?;
        let chosen = plan.rows.iter().filter(|row| row.sample.is_some()).map(|row| 1 + row.drafts as usize);
        expect(chosen.sum::<usize>() <= self.max_rows, "more tokens to choose than max_rows")?;
        let mut next_token = 0;
        for row in &plan.rows {
            let (tokens, blocks) = (&row.tokens, &row.blocks);
            expect(
                tokens.start == next_token && tokens.end > tokens.start,
                "token ranges that leave gaps or are empty",
            )?;
            next_token = tokens.end;
            expect(next_token as usize <= plan.tokens.len(), "a token range beyond the tokens")?;
            expect(
                row.drafts == 0 || row.sample.is_some() && (row.drafts as usize) < tokens.len(),
                "drafts without a token to choose before them",
            )?;
            expect(
                blocks.start <= blocks.end && blocks.end as usize <= plan.blocks.len(),
                "a block range beyond the blocks",
            )?;
            let end = row.position as usize + tokens.len();
            expect(end <= self.context_tokens, "a position beyond the context")?;
            expect(end <= blocks.len() * self.block_tokens, "a position without a block")?;
            if let Some(sample) = &row.sample {
                let history = &sample.history;
                let drafts = if history.is_empty() { 0 } else { row.drafts };
                expect(
                    history.start <= history.end && (history.end + drafts) as usize <= plan.history.len(),
                    "a history range beyond the history",
                )?;
                expect(sample.history_prompt as usize <= history.len(), "more prompt than history")?;
            }
        }
        expect(next_token as usize == plan.tokens.len(), "tokens that belong to no row")?;
        expect(plan.scored.iter().all(|&token| (token as usize) < vocab), "a token to score outside the vocabulary")?;
        let mut next_scored = 0;
        for Score { after, next, .. } in &plan.scores {
            expect(
                next.start == next_scored && next.end > next.start && next.end as usize <= plan.scored.len(),
                "tokens to score that leave gaps or are missing",
            )?;
            next_scored = next.end;
            expect(
                after.len() == next.len() && after.end as usize <= plan.tokens.len(),
                "tokens to score after other tokens than the step has",
            )?;
        }
        expect(next_scored as usize == plan.scored.len(), "tokens to score that nobody asks about")
    }
}
