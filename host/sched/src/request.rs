//! What enters the scheduler (a request) and what leaves it (events into a sink).
//!
//! Everything a step may need is shared behind `Arc`, so that moving a request through the queues copies pointers only.

use std::sync::Arc;

use crate::draft::DraftMethod;
use crate::ids::{Micros, Priority, RequestId};
use crate::mask::{MaskError, TokenMask};

/// How to choose the next token. Neutral values switch a rule off; `Default` is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it. At most 2 on the HTTP surface.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the most likely one's probability; 0 drops none.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of generated tokens; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of generated tokens; 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits, by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the request's own counter-based generator: token `n` depends on (seed, n) only.
    pub seed: u64,
    /// Report the chosen token's log-probability and those of this many most likely tokens (at most 20).
    pub logprobs: Option<u8>,
    /// Report how likely each prompt token but the first was, with this many most likely tokens beside it (at most 20). Then no
    /// prefix is reused: a token whose keys come from the cache has no logits.
    pub prompt_logprobs: Option<u8>,
}

/// One generation request, tokenized and routed.
#[derive(Debug)]
pub struct Request {
    /// Its identity.
    pub id: RequestId,
    /// Interned tenant (`pointsman_telemetry::Names`).
    pub tenant: u32,
    /// Name behind `tenant`, for policies.
    pub tenant_name: Arc<str>,
    /// Hash of the session, 0 without one.
    pub session: u64,
    /// Urgency.
    pub priority: Priority,
    /// When the host received it.
    pub arrived: Micros,
    /// When it must have ended, 0 for never.
    pub deadline: Micros,
    /// Prompt tokens, at least one.
    pub prompt: Arc<[u32]>,
    /// Chained hash of every full block of the prompt ([`crate::prefix::chain_hashes`]); empty switches caching off.
    pub block_hashes: Arc<[u64]>,
    /// Its blocks leave the cache with the last request that uses them: only other choices of the same prompt find them.
    pub transient: bool,
    /// Draft tokens that a step may look at, at most [`MAX_DRAFTS`](crate::draft::MAX_DRAFTS) count; 0 for none. What is
    /// generated is the same.
    pub draft_tokens: u32,
    /// How they are found.
    pub draft_method: DraftMethod,
    /// Tokens to generate at most; 0 to compute the prompt alone.
    pub max_new_tokens: u32,
    /// Stop tokens are impossible before this many tokens.
    pub min_new_tokens: u32,
    /// Tokens that end the generation; they are reported in [`SinkEvent::Finished`], not emitted.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: Arc<Sampling>,
    /// Texts by name that a sampler may ask for, as for routers.
    pub attributes: Arc<[(String, String)]>,
    /// Another choice of the same prompt, submitted before: its prefill is waited for, because its blocks can then be shared.
    pub fork_of: Option<RequestId>,
    /// What its text may be. The driver's desk takes it; a scheduler without one generates freely.
    pub mask: Option<Box<dyn TokenMask>>,
    /// Generation of the router that chose this replica, 0 for native; stamped on events.
    pub router_generation: u64,
    /// Where tokens go.
    pub sink: Box<dyn TokenSink>,
}

/// Receives what becomes of one request. Called on the driver thread: must not block.
pub trait TokenSink: Send + std::fmt::Debug {
    /// Takes one event. After `Finished`, `Cancelled` or `Failed` nothing follows.
    fn push(&mut self, event: SinkEvent) -> SinkState;

    /// Hears, after each step that computed a part of the prompt and not its end, how many of its tokens are computed or were
    /// cached. After a preemption they may be fewer. Only those who show progress mind, and nothing depends on it.
    fn prefilled(&mut self, _tokens: u32) {}
}

/// What a sink answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkState {
    /// Go on.
    Open,
    /// Nobody listens any more, or the listener is too slow for its buffer: cancel the request.
    Closed,
}

/// What drafts had to do with a token. Not an event of its own: a slow reader has places for so many tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafted {
    /// It was a draft, and came true.
    pub is_draft: bool,
    /// Drafts of its step that did not, at the step's first token; none are told of a step that only ends the text.
    pub rejected: u32,
}

/// One thing that happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum SinkEvent {
    /// First scheduled. `queued_us` counts from arrival; `cached_tokens` came from the prefix cache.
    Started {
        /// Microseconds between arrival and first schedule.
        queued_us: u64,
        /// Prompt tokens that needed no computation.
        cached_tokens: u32,
    },
    /// How likely each prompt token but the first was, once, when the last of them is known: before the first token.
    Scored(Vec<TokenLogprobs>),
    /// A generated token.
    Token {
        /// Its id.
        token: u32,
        /// Set when the request asked for log-probabilities.
        logprobs: Option<Box<TokenLogprobs>>,
        /// What drafts had to do with it.
        drafted: Drafted,
    },
    /// Ended as asked.
    Finished(FinishReason),
    /// Ended early.
    Cancelled(CancelCause),
    /// Ended because it cannot be served.
    Failed(Failure),
}

/// Log-probabilities at one position, natural logarithm. Of generated tokens after penalties, bias and a sampler policy's edit and
/// before temperature; of prompt tokens before all of these.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token, or the one that stands there.
    pub chosen: f32,
    /// The most likely tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended normally.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, given here, was chosen.
    Stop(u32),
    /// `max_new_tokens` or the model's context was reached.
    Length,
}

/// Why a request was ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelCause {
    /// The client disconnected, or its buffer overflowed.
    ClientGone,
    /// A cancel call.
    Asked,
    /// The server found a stop string in the text: a good end, counted and reported as a finished request.
    StopString,
    /// Its deadline passed.
    Deadline,
    /// The host is shutting down and the grace period is over.
    Shutdown,
    /// Its model is being unloaded, and the time that requests had to end is over.
    Unloaded,
}

/// Why a request cannot be served by this replica.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A bound of the replica stands in the way; another replica, or later, may do.
    #[error(transparent)]
    Exhausted(#[from] ResourceExhausted),
    /// The policy dropped it.
    #[error("the scheduling policy dropped the request")]
    DroppedByPolicy,
    /// It must keep a form and cannot.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The sampler policy failed, and its slot says that no request goes on without it; the policy's fault.
    #[error("the policy that says which tokens a request may get has failed, and no request goes on without it")]
    Unanswered,
    /// The executor failed; the host's fault.
    #[error("the engine failed while computing this request: {0}")]
    Engine(Arc<str>),
    /// Its device computes nothing any more; another replica may do.
    #[error("the device that had this request serves no more; retry it")]
    DeviceLost,
}

/// A limit that a request ran into, with the numbers that say what would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourceExhausted {
    /// The waiting queue is full.
    #[error("the queue is full: {waiting} of {limit} requests wait")]
    Queue {
        /// Requests waiting now.
        waiting: u32,
        /// The bound.
        limit: u32,
    },
    /// Can never fit: more blocks than the pool has.
    #[error("the request needs {needed} KV blocks and the pool has {total}")]
    KvPool {
        /// Blocks for prompt and output.
        needed: u32,
        /// Blocks in the pool.
        total: u32,
    },
    /// Prompt and output exceed the context of the model.
    #[error("{tokens} tokens of prompt and output exceed the context of {limit}")]
    Context {
        /// Tokens asked for.
        tokens: u32,
        /// Context length of the model.
        limit: u32,
    },
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl Sampling {
    /// Whether the choice depends on earlier tokens, so that a step must carry them.
    #[must_use]
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
