//! The seam to the engine: a step plan goes out, sampled tokens come back.
//!
//! Flat vectors with ranges into them, reused from step to step, instead of a `Vec` per row: a steady step allocates
//! nothing. The executor sees token ids and block ids, never requests' text or users.

use std::ops::Range;
use std::sync::Arc;

use crate::ids::{BlockId, RequestId};
use crate::request::{Sampling, TokenLogprobs};
use crate::sampler::EditSource;

/// Everything one step computes: prefill chunks and decode rows together.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// One row per sequence in this step.
    pub rows: Vec<Row>,
    /// Token ids to compute, row after row ([`Row::tokens`]).
    pub tokens: Vec<u32>,
    /// Block tables, row after row ([`Row::blocks`]): page `i` holds positions `i * block_tokens ..`.
    pub blocks: Vec<BlockId>,
    /// Prompt and output tokens of rows whose sampling needs them ([`Sample::history`]).
    pub history: Vec<u32>,
    /// What is to be said of prompt tokens, in the order of the rows; empty unless the executor
    /// [can](Executor::scores_prompts).
    pub scores: Vec<Score>,
    /// Tokens that [`Score::next`] names.
    pub scored: Vec<u32>,
    /// Of a step that is planned while the one before it computes, where each row's only token stands among the tokens that that
    /// one samples: what `tokens` says of it is void, and it comes after all of the row's history. Else empty.
    pub follows: Vec<u32>,
}

/// How likely a run of prompt tokens was, each after all tokens before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Score {
    /// Range in [`StepPlan::tokens`], within one row: the tokens after which they come.
    pub after: Range<u32>,
    /// Range in [`StepPlan::scored`], of the same length: the tokens themselves. The last one may belong to a later step.
    pub next: Range<u32>,
    /// Report this many most likely tokens beside each.
    pub top: u8,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct Row {
    /// Whose it is; for logs and for matching the output.
    pub request: RequestId,
    /// Range in [`StepPlan::tokens`]; one token for a decode, more for a prefill chunk.
    pub tokens: Range<u32>,
    /// Position of the first of those tokens in its sequence.
    pub position: u32,
    /// Range in [`StepPlan::blocks`]; covers every position up to the last one computed here.
    pub blocks: Range<u32>,
    /// Set when the last token's logits choose the next token; absent in the middle of a prefill.
    pub sample: Option<Sample>,
    /// How many of the last tokens are drafts. `sample` is then for the token before the first of them, and a token is chosen
    /// after each of them as well, as if those before it were known: its index is higher by as many, and its history, which
    /// the drafts follow in [`StepPlan::history`], longer. 0 unless the executor has [places](Executor::draft_places) for them.
    pub drafts: u32,
}

/// How to choose a row's next token.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The request's rules.
    pub sampling: Arc<Sampling>,
    /// Number of tokens generated before this one: the generator's counter.
    pub index: u32,
    /// Range in [`StepPlan::history`], prompt then output; empty unless [`Sampling::needs_history`].
    pub history: Range<u32>,
    /// Of that history, how many tokens are prompt.
    pub history_prompt: u32,
    /// Tokens that must not be chosen now (stop tokens before `min_new_tokens`); `None` for no ban.
    pub banned: Option<Arc<[u32]>>,
}

/// What a step produced.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// One entry per row with a `sample`, in the order of the rows.
    pub sampled: Vec<Sampled>,
    /// What is chosen after each draft, in the order of the rows.
    pub after_drafts: Vec<Sampled>,
    /// One entry per token of [`StepPlan::scored`], in that order: of the logits as they are, whatever the request's rules.
    pub scores: Vec<TokenLogprobs>,
    /// Requests whose token was chosen without a word that the sampler policy owes: it is not used, and its row computed again.
    /// The driver's business; an executor leaves it as it is.
    pub withheld: Vec<RequestId>,
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Set when the sampling asked for it.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Computes step plans. Owned by one driver thread.
pub trait Executor: Send {
    /// Computes `plan`, which follows nothing, and replaces the contents of `out`. `edits` is asked once for every row with a
    /// `sample`, after the forward pass. On an error nothing of the plan counts as computed, and the KV contents of the plan's
    /// blocks are unspecified.
    ///
    /// # Errors
    /// A device or engine fault, in words for the log.
    fn execute(
        &mut self,
        plan: &StepPlan,
        edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError>;

    /// The same in halves, so that a step can be begun while the one before it computes; `None` where a step is computed whole.
    fn in_halves(&mut self) -> Option<&mut dyn InHalves> {
        None
    }

    /// Up to how many rows and drafts of a step, together, are computed for hardly more than the price of one row: none has drafts
    /// beyond it. 0 where rows may not end with drafts.
    fn draft_places(&self) -> u32 {
        0
    }

    /// Whether a plan may ask for [scores](StepPlan::scores).
    fn scores_prompts(&self) -> bool {
        false
    }

    /// Keeps memory for the first so many blocks of the pool, and gives the rest of it back, or takes memory for so many again; what it
    /// has now, which may be less where its device has no more than what it leaves to the driver. `None` where the pool stays as it
    /// was made. Not while a step is begun.
    ///
    /// # Errors
    /// A device fault, in words for the log; it has what it had.
    fn resize_pool(&mut self, _n_blocks: u32) -> Result<Option<PoolSize>, ExecuteError> {
        Ok(None)
    }

    /// Bytes of the pool that are given back and taken at once; 1 where that is as one likes.
    fn pool_piece(&self) -> u64 {
        1
    }

    /// What is worth a line in the log, once: a step took a slower way from now on.
    fn take_note(&mut self) -> Option<String> {
        None
    }

    /// Whether the device is gone for this process, so that no step will ever succeed again.
    fn is_lost(&self) -> bool {
        false
    }
}

/// Computes step plans while their driver does something else: at most two are begun and not finished.
pub trait InHalves {
    /// Begins `plan`, which may [follow](StepPlan::follows) one that is not finished. Edits are asked for as by
    /// [`execute`](Executor::execute). On an error it is not begun; what was begun before it is still to be finished.
    ///
    /// # Errors
    /// A device or engine fault, in words for the log.
    fn begin(&mut self, plan: &StepPlan, edits: &mut dyn EditSource) -> Result<(), ExecuteError>;

    /// Waits for what was begun first, which is `plan`, and replaces the contents of `out`. On an error nothing of it counts as
    /// computed, nor of one that follows it.
    ///
    /// # Errors
    /// A device or engine fault, in words for the log.
    fn finish(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), ExecuteError>;
}

/// What a pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSize {
    /// Blocks that there is memory for, of those that were asked for.
    pub n_blocks: u32,
    /// The memory.
    pub bytes: u64,
    /// What its device could give beyond that.
    pub spare: u64,
}

/// A fault of the engine or its device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecuteError {
    /// The plan breaks a promise of the seam: a bug of the host.
    #[error("the step plan is malformed: {what}")]
    Malformed {
        /// Which promise.
        what: &'static str,
    },
    /// The device or a kernel failed.
    #[error("the device failed: {what}")]
    Device {
        /// In words.
        what: Arc<str>,
    },
    /// The device computes nothing any more.
    #[error("the device serves no more: {what}")]
    Lost {
        /// In words.
        what: Arc<str>,
    },
}

impl Sample {
    /// How to choose the token that many places further on, with the drafts in between.
    #[must_use]
    pub fn ahead(&self, n: u32) -> Self {
        let mut later = self.clone();
        later.index += n;
        if !later.history.is_empty() {
            later.history.end += n;
        }
        later
    }
}

impl StepPlan {
    /// An empty plan with room for so many rows, tokens and blocks.
    pub(crate) fn with_room(rows: u32, tokens: u32, blocks: u32) -> Self {
        Self {
            rows: Vec::with_capacity(rows as usize),
            tokens: Vec::with_capacity(tokens as usize),
            blocks: Vec::with_capacity(blocks as usize),
            follows: Vec::with_capacity(rows as usize),
            ..Self::default()
        }
    }

    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.tokens.clear();
        self.blocks.clear();
        self.history.clear();
        self.scores.clear();
        self.scored.clear();
        self.follows.clear();
    }

    /// Token ids of a row.
    #[must_use]
    pub fn tokens_of(&self, row: &Row) -> &[u32] {
        &self.tokens[row.tokens.start as usize..row.tokens.end as usize]
    }

    /// Block table of a row.
    #[must_use]
    pub fn blocks_of(&self, row: &Row) -> &[BlockId] {
        &self.blocks[row.blocks.start as usize..row.blocks.end as usize]
    }
}
