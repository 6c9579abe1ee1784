//! Draft tokens by a draft model: a smaller model with the same tokenizer says what may come next, a token at a time.
//!
//! It is one more engine behind [`Executor`], so nothing here depends on a device. Its keys and values have a small pool of
//! their own: a text holds blocks there while it is drafted for, of which the beginning is what the text says by now; what
//! was drafted and did not come true is written over. A text that it does not know yet (a new prompt, what came while it was
//! not asked) is computed in chunks, [`DraftTerms::step_tokens`] a step for all texts together, and only then goes on. All
//! texts are drafted for in one plan per token.
//!
//! A draft is chosen by the request's own rule, with the random number that the larger model's choice in that place will have:
//! where the two models agree, so do their draws, at any temperature. Greedy drafts would come true less often. Prefixes are not
//! shared and blocks are not cached: a draft that is late costs nobody an answer.

use std::sync::Arc;

use crate::blocks::{BlockPool, Counts};
use crate::execute::{ExecuteError, Executor, Row, Sample, StepOutput, StepPlan};
use crate::ids::{BlockId, RequestId};
use crate::request::{Request, Sampling};
use crate::sampler::NoEdits;
use crate::sequence::count;

use super::MAX_DRAFTS;

/// Sizes of a draft model, and when it pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftTerms {
    /// Positions in a block.
    pub block_tokens: u32,
    /// Blocks of its pool.
    pub n_blocks: u32,
    /// Texts in a step; more are not drafted for.
    pub max_rows: u32,
    /// Tokens in a step, at least `max_rows`.
    pub step_tokens: u32,
    /// Longest text; longer ones are not drafted for.
    pub context_tokens: u32,
    /// Tokens that both models know: a text with another one is not drafted for.
    pub vocabulary: u32,
    /// Share of its drafts that must come true. What a draft costs is in it.
    pub least_percent: u32,
}

/// Proposes what a smaller model would say. Owned by the scheduler of the replica that it proposes for.
pub struct DraftModel {
    executor: Box<dyn Executor>,
    terms: DraftTerms,
    pool: BlockPool,
    /// Of live requests that it was asked about.
    texts: Vec<DraftText>,
    /// In this step.
    asked: Vec<Asked>,
    /// Number of this step.
    round: u64,
    /// Tokens that this step may still compute.
    budget: u32,
    plan: StepPlan,
    out: StepOutput,
    counters: DraftCounters,
    failure: Option<ExecuteError>,
}

/// What a draft model did since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftCounters {
    /// Forward passes.
    pub steps: u64,
    /// Tokens that they computed.
    pub tokens: u64,
    /// Times that a text had no room in the pool, and so no drafts.
    pub no_room: u64,
}

#[derive(Debug)]
struct DraftText {
    request: RequestId,
    sampling: Arc<Sampling>,
    table: Vec<BlockId>,
    /// Leading tokens of the text that are computed.
    known: u32,
    /// What was proposed last ...
    drafted: Vec<u32>,
    /// ... and how many of these are computed, after what is known.
    n_fed: usize,
    /// The step in which it was asked about last.
    asked_in: u64,
    /// Nothing more is proposed: the model knows not all of its tokens, or could not compute it.
    is_given_up: bool,
}

#[derive(Debug)]
struct Asked {
    /// Place among the texts.
    at: usize,
    /// Known tokens of the text after this step.
    reaches: u32,
    /// Tokens to propose.
    most: usize,
    /// Whether a token is chosen at the end of its row.
    goes_on: bool,
    stop_tokens: Arc<[u32]>,
    /// How its next token is chosen.
    sample: Sample,
}

impl std::fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DraftModel").field("terms", &self.terms).field("texts", &self.texts).finish_non_exhaustive()
    }
}

// === impl DraftModel ===

impl DraftModel {
    /// One that computes with this executor, whose sizes are those of the terms.
    #[must_use]
    pub fn new(executor: Box<dyn Executor>, terms: DraftTerms) -> Self {
        let rows = terms.max_rows as usize;
        let plan = StepPlan::with_room(terms.max_rows, terms.step_tokens, terms.n_blocks);
        let out = StepOutput { sampled: Vec::with_capacity(rows), ..StepOutput::default() };
        Self {
            executor,
            terms,
            pool: BlockPool::new(terms.n_blocks),
            texts: Vec::new(),
            asked: Vec::with_capacity(rows),
            round: 0,
            budget: 0,
            plan,
            out,
            counters: DraftCounters::default(),
            failure: None,
        }
    }

    /// The share of its drafts that must come true, or they pause.
    pub(crate) fn least_percent(&self) -> u32 {
        self.terms.least_percent
    }

    /// Begins a step.
    pub(crate) fn begin(&mut self) {
        self.round += 1;
        self.budget = self.terms.step_tokens;
        self.plan.clear();
    }

    /// Whether so long a text of this request may have drafts at all, as far as can be told before anything is computed.
    pub(crate) fn may_draft(&mut self, request: RequestId, n_text: u32) -> bool {
        let fits = n_text < self.pool_tokens();
        self.counters.no_room += u64::from(!fits);
        let is_given_up = |text: &DraftText| text.request == request && text.is_given_up;
        fits && n_text < self.terms.context_tokens && !self.texts.iter().any(is_given_up)
    }

    /// Whether so long a text is computed but for a few tokens, or was asked about in this step.
    pub(crate) fn knows(&self, request: RequestId, n_text: u32) -> bool {
        let text = self.texts.iter().find(|text| text.request == request);
        let known = text.map_or(0, |text| if text.asked_in == self.round { n_text } else { text.known });
        n_text.saturating_sub(known) <= MAX_DRAFTS + 1
    }

    /// Asks for at most `most` tokens to follow `text`, which only grows from step to step; with 0 it is computed, to be known. How
    /// many may come of it in this step.
    pub(crate) fn want(&mut self, request: &Request, text: &[u32], most: u32) -> u32 {
        let n_text = count(text.len());
        let room = self.pool_tokens().min(self.terms.context_tokens).saturating_sub(n_text);
        let most = most.min(MAX_DRAFTS).min(room);
        if room == 0 || self.asked.len() == self.terms.max_rows as usize {
            return 0;
        }
        let at = self.enter(request);
        let known = self.texts[at].meet(text, self.round);
        let n = (n_text - known).min(self.budget);
        let next = &text[known as usize..(known + n) as usize];
        if next.iter().any(|&token| token >= self.terms.vocabulary) {
            self.give_up(at);
        }
        if n == 0 || self.texts[at].is_given_up || !self.reserve(at, n_text + most) {
            return 0;
        }
        // Without room it has been forgotten, and the next step begins anew.
        self.budget -= n;
        let goes_on = known + n == n_text && most > 0;
        let sample = self.sample(at, request, text, if goes_on { most } else { 0 });
        let stop_tokens = Arc::clone(&request.stop_tokens);
        self.asked.push(Asked { at, reaches: known + n, most: most as usize, goes_on, stop_tokens, sample });
        self.push_row(self.asked.len() - 1, next, known);
        if goes_on { most } else { 0 }
    }

    /// Computes what was asked for since the step began, and hands out what came of it. Whether there was anything to compute.
    pub(crate) fn draft(&mut self, mut found: impl FnMut(RequestId, &[u32])) -> bool {
        let computes = !self.plan.rows.is_empty();
        while !self.plan.rows.is_empty() {
            if let Err(error) = self.executor.execute(&self.plan, &mut NoEdits, &mut self.out) {
                self.failure = Some(error);
                // What their blocks hold is not known any more.
                for i in 0..self.asked.len() {
                    self.give_up(self.asked[i].at);
                }
                break;
            }
            self.counters.steps += 1;
            self.counters.tokens += self.plan.tokens.len() as u64;
            self.go_on();
        }
        for asked in self.asked.drain(..) {
            let text = &self.texts[asked.at];
            if !text.drafted.is_empty() {
                found(text.request, &text.drafted);
            }
        }
        computes
    }

    /// A request has ended.
    pub(crate) fn forget(&mut self, request: RequestId) {
        if let Some(at) = self.texts.iter().position(|text| text.request == request) {
            self.release(at);
            self.texts.swap_remove(at);
        }
    }

    /// What it did since the last look.
    pub fn take_counters(&mut self) -> DraftCounters {
        std::mem::take(&mut self.counters)
    }

    /// Why it could not compute, since the last look; the texts of that step get no more drafts.
    pub fn take_failure(&mut self) -> Option<ExecuteError> {
        self.failure.take()
    }

    /// Who holds the pool's blocks.
    #[must_use]
    pub fn block_counts(&self) -> Counts {
        self.pool.counts()
    }

    /// Asserts that blocks are held by texts of live requests alone.
    pub(crate) fn assert_consistent(&self, lives: impl Fn(RequestId) -> bool) {
        let held: usize = self.texts.iter().map(|text| text.table.len()).sum();
        assert_eq!(self.pool.counts().held, count(held), "blocks of the draft model are leaked");
        for text in &self.texts {
            assert!(lives(text.request), "{:?} has ended and is drafted for", text.request);
            let n_computed = text.known + count(text.n_fed);
            assert!(n_computed <= count(text.table.len()) * self.terms.block_tokens, "{text:?}");
        }
    }

    /// Tokens that the whole pool holds.
    fn pool_tokens(&self) -> u32 {
        self.terms.n_blocks.saturating_mul(self.terms.block_tokens)
    }

    /// The place of a request's text; a new one has room for all that may come.
    fn enter(&mut self, request: &Request) -> usize {
        if let Some(at) = self.texts.iter().position(|text| text.request == request.id) {
            return at;
        }
        let longest = count(request.prompt.len()).saturating_add(request.max_new_tokens) + MAX_DRAFTS;
        let longest = longest.min(self.terms.context_tokens);
        let sampling = match request.sampling.logprobs {
            None => Arc::clone(&request.sampling),
            // Nobody reads those of a draft.
            Some(_) => Arc::new(Sampling { logprobs: None, ..(*request.sampling).clone() }),
        };
        if sampling.needs_history() {
            self.plan.history.reserve((longest * self.terms.max_rows) as usize);
        }
        self.texts.push(DraftText {
            request: request.id,
            sampling,
            table: Vec::with_capacity(longest.div_ceil(self.terms.block_tokens) as usize),
            known: 0,
            drafted: Vec::with_capacity(MAX_DRAFTS as usize),
            n_fed: 0,
            asked_in: 0,
            is_given_up: false,
        });
        self.texts.len() - 1
    }

    /// Takes blocks for so many tokens, from texts that were not asked about lately if need be. Where theirs are too few, they keep
    /// them and the text gives back its own: half of a text is of no use, and another one may need them.
    fn reserve(&mut self, at: usize, n_tokens: u32) -> bool {
        let needed = n_tokens.div_ceil(self.terms.block_tokens);
        let missing = needed.saturating_sub(count(self.texts[at].table.len()));
        let round = self.round;
        let is_idle = |text: &&DraftText| text.asked_in + 1 < round;
        let of_idle: usize = self.texts.iter().filter(is_idle).map(|text| text.table.len()).sum();
        if self.pool.counts().free + count(of_idle) < missing {
            self.release(at);
            self.counters.no_room += 1;
            return false;
        }
        while self.pool.counts().free < missing {
            let has = |text: &&DraftText| is_idle(text) && !text.table.is_empty();
            let idle = (0..self.texts.len()).filter(|&other| has(&&self.texts[other]));
            let Some(idle) = idle.min_by_key(|&other| self.texts[other].asked_in) else { break };
            self.release(idle);
        }
        let taken = (0..missing).filter_map(|_| self.pool.take()).map(|taken| taken.block);
        self.texts[at].table.extend(taken);
        true
    }

    fn release(&mut self, at: usize) {
        let text = &mut self.texts[at];
        text.table.drain(..).for_each(|block| self.pool.release(block));
        (text.known, text.n_fed) = (0, 0);
        text.drafted.clear();
    }

    fn give_up(&mut self, at: usize) {
        self.release(at);
        self.texts[at].is_given_up = true;
    }

    /// How the token after the text is chosen. A history has room behind it for what will be drafted.
    fn sample(&mut self, at: usize, request: &Request, text: &[u32], most: u32) -> Sample {
        let sampling = Arc::clone(&self.texts[at].sampling);
        let n_prompt = count(request.prompt.len());
        let index = count(text.len()) - n_prompt;
        let (start, mut history) = (self.plan.history.len(), 0..0);
        if most > 0 && sampling.needs_history() {
            self.plan.history.extend_from_slice(text);
            history = count(start)..count(self.plan.history.len());
            self.plan.history.resize(self.plan.history.len() + most as usize, 0);
        }
        let history_prompt = if history.is_empty() { 0 } else { n_prompt };
        let may_stop = index >= request.min_new_tokens || request.stop_tokens.is_empty();
        let banned = (!may_stop).then(|| Arc::clone(&request.stop_tokens));
        Sample { sampling, index, history, history_prompt, banned }
    }

    fn push_row(&mut self, asked: usize, tokens: &[u32], position: u32) {
        let Asked { at, goes_on, ref sample, .. } = self.asked[asked];
        let text = &self.texts[at];
        let n_blocks = (position + count(tokens.len())).div_ceil(self.terms.block_tokens) as usize;
        let plan = &mut self.plan;
        let (first, first_block) = (count(plan.tokens.len()), count(plan.blocks.len()));
        plan.tokens.extend_from_slice(tokens);
        plan.blocks.extend_from_slice(&text.table[..n_blocks]);
        plan.rows.push(Row {
            request: text.request,
            tokens: first..count(plan.tokens.len()),
            position,
            blocks: first_block..count(plan.blocks.len()),
            sample: goes_on.then(|| sample.clone()),
            drafts: 0,
        });
    }

    /// Notes what the plan has computed, and makes that of the next token.
    fn go_on(&mut self) {
        // The histories stay.
        self.plan.rows.clear();
        self.plan.tokens.clear();
        self.plan.blocks.clear();
        let mut sampled = std::mem::take(&mut self.out.sampled);
        let mut chosen = sampled.drain(..);
        for i in 0..self.asked.len() {
            let asked = &mut self.asked[i];
            let text = &mut self.texts[asked.at];
            text.known = asked.reaches;
            if !asked.goes_on {
                continue;
            }
            text.n_fed = text.drafted.len();
            let next = chosen.next().map(|sampled| sampled.token);
            let next = next.filter(|next| *next < self.terms.vocabulary && !asked.stop_tokens.contains(next));
            text.drafted.extend(next);
            asked.goes_on = next.is_some() && text.drafted.len() < asked.most;
            if let Some(next) = next.filter(|_| asked.goes_on) {
                let position = text.known + count(text.n_fed);
                if !asked.sample.history.is_empty() {
                    self.plan.history[asked.sample.history.end as usize] = next;
                }
                asked.sample = asked.sample.ahead(1);
                self.push_row(i, &[next], position);
            }
        }
        drop(chosen);
        self.out.sampled = sampled;
    }
}

// === impl DraftText ===

impl DraftText {
    /// Notes what the text says by now; how many of its tokens are computed, of which the last one never counts: something must
    /// be computed for a token to be chosen.
    fn meet(&mut self, text: &[u32], round: u64) -> u32 {
        let came = text.get(self.known as usize..).unwrap_or_default();
        let came_true = self.drafted[..self.n_fed].iter().zip(came).take_while(|(draft, token)| draft == token).count();
        self.known = (self.known + count(came_true)).min(count(text.len()).saturating_sub(1));
        self.n_fed = 0;
        self.drafted.clear();
        self.asked_in = round;
        self.known
    }
}
