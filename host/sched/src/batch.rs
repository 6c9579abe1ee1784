//! The seam to scheduling policies: deltas in, a proposal out. Mirrors `interface scheduler` of wit/policy.wit.
//!
//! The scheduler owns the truth and clamps every plan, so a policy can waste time but cannot over-commit memory, starve a
//! request beyond the bound, or touch a sequence that does not exist. Columns, not records: a guest's list costs one copy.

use std::sync::Arc;

use crate::ids::Micros;
use crate::route::DecidedBy;

/// Requests as columns of one length; see `record sequences` in the WIT package for units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record sequences`, documented there")]
pub struct SequenceColumns {
    pub id: Vec<u64>,
    pub prompt_tokens: Vec<u32>,
    pub cached_tokens: Vec<u32>,
    pub computed_tokens: Vec<u32>,
    pub generated_tokens: Vec<u32>,
    pub max_new_tokens: Vec<u32>,
    pub held_blocks: Vec<u32>,
    pub priority: Vec<u8>,
    pub tenant: Vec<u32>,
    pub arrived: Vec<Micros>,
    pub deadline: Vec<Micros>,
    /// `seq.session` of docs/columns.md.
    pub session: Vec<u64>,
    /// `seq.prefix` of docs/columns.md.
    pub prefix: Vec<u64>,
}

/// What one step may spend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budgets {
    /// Tokens that one step may compute, prefill and decode together.
    pub step_tokens: u32,
    /// Sequences that may run at once.
    pub running: u32,
    /// Blocks that are free, those that only the prefix cache holds included.
    pub free_blocks: u32,
    /// Blocks in the pool.
    pub total_blocks: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Duration of the last step.
    pub last_step: Micros,
    /// Tokens of the last step.
    pub last_step_tokens: u32,
}

/// The net difference between two policy calls; see `record changes` in the WIT package for the order of application.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record changes`, documented there")]
pub struct Changes {
    pub new_tenants: Vec<(u32, Arc<str>)>,
    pub arrived: SequenceColumns,
    pub admitted: Vec<u64>,
    pub preempted: Vec<u64>,
    pub gone: Vec<u64>,
    pub progress_id: Vec<u64>,
    pub progress_computed: Vec<u32>,
    pub progress_generated: Vec<u32>,
    pub progress_blocks: Vec<u32>,
}

/// The whole truth, for a policy that starts or restarts.
#[derive(Debug)]
pub struct View<'a> {
    /// Now.
    pub now: Micros,
    /// Random bits for the policy's own use.
    pub seed: u64,
    /// Current budgets.
    pub budgets: &'a Budgets,
    /// Every tenant named so far.
    pub tenants: &'a [(u32, Arc<str>)],
    /// Waiting requests in the host's order.
    pub waiting: &'a SequenceColumns,
    /// Running requests in the order of admission.
    pub running: &'a SequenceColumns,
}

/// What becomes of waiting requests that `admit` does not name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rest {
    /// They follow in the host's order.
    #[default]
    HostOrder,
    /// They stay, until the starvation bound overrules.
    Hold,
}

/// A proposal for one step. Ids are request ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Waiting requests, first one first.
    pub admit: Vec<u64>,
    /// What happens to the others.
    pub rest: Rest,
    /// Running requests in the order in which they may be put back.
    pub preempt: Vec<u64>,
    /// Waiting requests to refuse now.
    pub drop: Vec<u64>,
    /// Requests whose prefill chunk the policy sets ...
    pub prefill_id: Vec<u64>,
    /// ... to this many tokens; 0 pauses one.
    pub prefill_tokens: Vec<u32>,
}

/// What a policy said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing, or a fault that was already counted: the native plan holds for this step.
    Native,
    /// `plan` was filled.
    Planned,
}

/// Whether the policy is the one that saw the previous changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// The native policy decides this step: no call is made.
    Native,
    /// It follows: deltas suffice.
    Following,
    /// It is new, was replaced or restarted: `resync` first.
    NeedsView,
    /// It follows, and still computes an earlier answer: the native policy decides this step, and what changes is kept for
    /// the policy's next call.
    Busy,
}

/// Why a plan was refused as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPlan {
    /// An id that this replica never showed.
    #[error("request {0} was never shown to this policy")]
    UnknownId(u64),
    /// An id twice in one list.
    #[error("request {0} is named twice")]
    Duplicate(u64),
    /// Parallel lists of different lengths.
    #[error("prefill-id has {ids} entries and prefill-tokens {tokens}")]
    Lengths {
        /// Entries of the first.
        ids: u32,
        /// Entries of the second.
        tokens: u32,
    },
    /// More entries than there are requests.
    #[error("a list has {len} entries and only {limit} requests exist")]
    TooLong {
        /// Its length.
        len: u32,
        /// The bound.
        limit: u32,
    },
}

/// Orders the work of one replica. Owned by the replica's driver thread.
pub trait BatchPolicy: Send {
    /// Asked before every step is planned: picks up a swap, a restart or an open circuit.
    fn attend(&mut self, now: Micros) -> Attention;

    /// Generation that answers now, 0 for native; stamped on events.
    fn generation(&self) -> u64;

    /// The policy behind [`generation`](Self::generation), for recordings.
    fn revision(&self) -> Arc<str> {
        DecidedBy::native(0).revision
    }

    /// Whether [`Changes`] should carry the `progress_*` columns.
    fn wants_progress(&self) -> bool {
        false
    }

    /// Receives the whole view. A guest may be told of it only when it is asked for a plan; a fault then makes the next
    /// [`attend`](Self::attend) say what to do.
    fn resync(&mut self, view: &View<'_>);

    /// Called when there is something to decide: something waits, or memory is short. Fills `plan` (empty on entry). The
    /// plan may come from what an earlier call was told, by a policy that computes aside: ids that have gone since are
    /// skipped like those that ended between a step and its plan.
    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer;

    /// The plan just returned was refused as a whole; counts as a fault of the policy.
    fn refused(&mut self, now: Micros, why: BadPlan);

    /// Whether somebody who listens beside the policy begins here: the whole view is then [shown](Self::show). Asked after a
    /// call of [`step`](Self::step), when the policy has been told everything.
    fn wants_view(&mut self) -> bool {
        false
    }

    /// The whole view, for whoever listens; to the policy it is no news.
    fn show(&mut self, _view: &View<'_>) {}

    /// There was something to decide, and the native policy did, because [`attend`](Self::attend) had said
    /// [`Native`](Attention::Native) or [`Busy`](Attention::Busy).
    fn stood_in(&mut self) {}
}

/// The host's own order as a [`BatchPolicy`]: priority, then arrival. It never makes a call.
#[derive(Debug, Default)]
pub struct NativeBatch;

impl BatchPolicy for NativeBatch {
    fn attend(&mut self, _now: Micros) -> Attention {
        Attention::Native
    }

    fn generation(&self) -> u64 {
        0
    }

    fn resync(&mut self, _view: &View<'_>) {}

    fn step(&mut self, _now: Micros, _budgets: &Budgets, _changes: &Changes, _plan: &mut Plan) -> Answer {
        Answer::Native
    }

    fn refused(&mut self, _now: Micros, _why: BadPlan) {}
}

impl SequenceColumns {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.id.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.id.is_empty()
    }

    /// Drops the rows and keeps the memory.
    pub fn clear(&mut self) {
        let Self {
            id,
            prompt_tokens,
            cached_tokens,
            computed_tokens,
            generated_tokens,
            max_new_tokens,
            held_blocks,
            priority,
            tenant,
            arrived,
            deadline,
            session,
            prefix,
        } = self;
        for column in [id, arrived, deadline, session, prefix] {
            column.clear();
        }
        for column in
            [prompt_tokens, cached_tokens, computed_tokens, generated_tokens, max_new_tokens, held_blocks, tenant]
        {
            column.clear();
        }
        priority.clear();
    }
}

impl Changes {
    /// Empties every list and keeps the memory.
    pub fn clear(&mut self) {
        self.new_tenants.clear();
        self.arrived.clear();
        for ids in [&mut self.admitted, &mut self.preempted, &mut self.gone, &mut self.progress_id] {
            ids.clear();
        }
        for column in [&mut self.progress_computed, &mut self.progress_generated, &mut self.progress_blocks] {
            column.clear();
        }
    }
}

impl Plan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.rest = Rest::default();
        for ids in [&mut self.admit, &mut self.preempt, &mut self.drop, &mut self.prefill_id] {
            ids.clear();
        }
        self.prefill_tokens.clear();
    }
}
