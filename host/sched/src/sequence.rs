//! A request while it lives in the scheduler, and the slab that holds them all.
//!
//! A slab and slot numbers instead of `Rc<RefCell<_>>` or a map of boxes: queues hold four-byte slots, a look-up is an
//! index, and a slot freed by one request is the next one's without an allocation.

use crate::draft::Drafts;
use crate::hash::IntMap;
use crate::ids::{BlockId, Micros, RequestId};
use crate::kv::{Chain, Text};
use crate::request::{Request, TokenLogprobs};

/// Place of a sequence in the slab; meaningful while the sequence lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(u32);

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waits for its first step, or for its next after a preemption.
    Queued,
    /// Its prompt (and what it had generated before a preemption) is being computed.
    Prefilling,
    /// Generates a token per step.
    Decoding,
}

impl Stage {
    /// The word in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Prefilling => "prefilling",
            Self::Decoding => "decoding",
        }
    }
}

/// What a following policy believes of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Never,
    Waiting,
    Running,
}

/// Columns that move while a sequence runs, as a policy last saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) computed: u32,
    pub(crate) generated: u32,
    pub(crate) blocks: u32,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    /// Number of this request among those submitted: age, without ties.
    pub(crate) order: u64,
    /// Number of its latest admission; meaningful while `running`.
    pub(crate) admission: u64,
    pub(crate) running: bool,
    /// Prompt and output; empty before the first admission, so that a queue of long prompts is stored once.
    pub(crate) tokens: Vec<u32>,
    /// Page `i` holds positions `i * block_tokens ..`; empty unless `running`.
    pub(crate) table: Vec<BlockId>,
    pub(crate) chain: Chain,
    /// Leading tokens whose KV is in the table.
    pub(crate) computed: u32,
    /// Prompt tokens that were in the cache when the request arrived, for policies.
    pub(crate) cached_on_arrival: u32,
    /// Of the first admission: what was reused, and when; `None` before it.
    pub(crate) first_admitted: Option<(Micros, u32)>,
    /// Tokens in the step that is being planned or in flight.
    pub(crate) chunk: u32,
    /// Prompt tokens of which it is known how likely they were, the first not counted; 0 unless that was asked.
    pub(crate) n_scored: u32,
    /// The same in numbers, until all are there.
    pub(crate) scores: Vec<TokenLogprobs>,
    /// What may follow, and is computed with the last token.
    pub(crate) drafts: Drafts,
    /// What the policy's plan wants `chunk` to be; taken when it is planned.
    pub(crate) wish: Option<u32>,
    /// Step in which it was preempted last, so that it is not admitted again at once.
    pub(crate) preempted_in: u64,
    /// Finished waits, in sum.
    pub(crate) stalled_us: Micros,
    /// Start of the wait that goes on; `None` while it is being computed.
    pub(crate) stalled_since: Option<Micros>,
    /// The sink wants no more.
    pub(crate) closed: bool,
    pub(crate) shown: Shown,
    pub(crate) shown_progress: Progress,
    /// In the list of sequences that a policy has not seen as they are.
    pub(crate) dirty: bool,
    /// Number of the last list in which the plan check met it.
    pub(crate) mark: u64,
}

impl Sequence {
    pub(crate) fn new(request: Request, order: u64, now: Micros, cached: u32) -> Self {
        Self {
            request,
            order,
            admission: 0,
            running: false,
            tokens: Vec::new(),
            table: Vec::new(),
            chain: Chain::start(false),
            computed: 0,
            cached_on_arrival: cached,
            first_admitted: None,
            chunk: 0,
            n_scored: 0,
            scores: Vec::new(),
            drafts: Drafts::default(),
            wish: None,
            preempted_in: 0,
            stalled_us: 0,
            stalled_since: Some(now),
            closed: false,
            shown: Shown::Never,
            shown_progress: Progress::default(),
            dirty: false,
            mark: 0,
        }
    }

    pub(crate) fn prompt_tokens(&self) -> u32 {
        count(self.request.prompt.len())
    }

    pub(crate) fn generated(&self) -> u32 {
        count(self.tokens.len().saturating_sub(self.request.prompt.len()))
    }

    /// Everything that is known: the prompt, and what has been generated.
    pub(crate) fn text(&self) -> Text<'_> {
        let tokens = if self.tokens.is_empty() { &self.request.prompt[..] } else { &self.tokens[..] };
        Text { tokens, hashes: &self.request.block_hashes }
    }

    /// As much of it as may be found in the cache: what precedes a token that is still to be scored must be computed.
    pub(crate) fn findable(&self) -> Text<'_> {
        let mut text = self.text();
        if self.scores_left() > 0 {
            text.tokens = &text.tokens[..=self.n_scored as usize];
        }
        text
    }

    /// Prompt tokens of which it is still to be said how likely they were.
    pub(crate) fn scores_left(&self) -> u32 {
        match self.request.sampling.prompt_logprobs {
            None => 0,
            Some(_) => self.prompt_tokens() - 1 - self.n_scored,
        }
    }

    pub(crate) fn n_tokens(&self) -> u32 {
        count(self.text().tokens.len())
    }

    /// Known tokens that are still to be computed, at least one while it lives.
    pub(crate) fn remaining(&self) -> u32 {
        self.n_tokens() - self.computed
    }

    /// Prompt tokens still to be computed.
    pub(crate) fn prompt_remaining(&self) -> u32 {
        self.prompt_tokens().saturating_sub(self.computed)
    }

    /// The one token to compute is the one just generated.
    pub(crate) fn is_decoding(&self) -> bool {
        self.running && self.generated() > 0 && self.remaining() == 1
    }

    /// Tokens that it may have drafted now, 0 where none are asked for or worth it.
    pub(crate) fn most_drafts(&self) -> u32 {
        let (request, generated) = (&self.request, self.generated());
        if !self.is_decoding() || !self.drafts.are_worth_it(generated) {
            return 0;
        }
        // The last token is chosen and never computed.
        let most = request.draft_tokens.min((request.max_new_tokens - generated).saturating_sub(1));
        if generated >= request.min_new_tokens {
            return most;
        }
        // Stop tokens are forbidden in all of the row's choices, or in none.
        most.min(request.min_new_tokens - generated - 1)
    }

    /// Whether this step computes its last token, and there is something to propose after it.
    pub(crate) fn has_drafts(&self) -> bool {
        self.chunk > 0 && self.is_decoding() && !self.drafts.tokens.is_empty()
    }

    /// Of `chunk`, those that are drafts.
    pub(crate) fn n_drafts(&self) -> u32 {
        self.chunk.saturating_sub(self.remaining())
    }

    pub(crate) fn stage(&self) -> Stage {
        match (self.running, self.is_decoding()) {
            (false, _) => Stage::Queued,
            (true, false) => Stage::Prefilling,
            (true, true) => Stage::Decoding,
        }
    }

    /// When it will have stood still for `bound_us`, all waits together; `None` while it is being computed and was not
    /// overdue before.
    pub(crate) fn due(&self, bound_us: Micros) -> Option<Micros> {
        match bound_us.checked_sub(self.stalled_us) {
            None => Some(0),
            Some(left) => self.stalled_since.map(|since| since.saturating_add(left)),
        }
    }

    pub(crate) fn is_overdue(&self, now: Micros, bound_us: Micros) -> bool {
        self.due(bound_us).is_some_and(|due| now > due)
    }

    /// It is computed in this step.
    pub(crate) fn moves(&mut self, now: Micros) {
        if let Some(since) = self.stalled_since.take() {
            self.stalled_us = self.stalled_us.saturating_add(now.saturating_sub(since));
        }
    }

    /// It is not.
    pub(crate) fn stalls(&mut self, now: Micros) {
        self.stalled_since.get_or_insert(now);
    }
}

/// A length as the seams count; prompts and pools are bounded far below.
pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[derive(Debug)]
pub(crate) struct Slab {
    slots: Vec<Option<Sequence>>,
    free: Vec<Slot>,
    by_id: IntMap<u64, Slot>,
}

impl Slab {
    /// A slab that holds `capacity` sequences without allocating.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::with_capacity(capacity),
            free: Vec::with_capacity(capacity),
            by_id: IntMap::with_capacity_and_hasher(2 * (capacity + 1), Default::default()),
        }
    }

    pub(crate) fn insert(&mut self, sequence: Sequence) -> Slot {
        let id = sequence.request.id;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            Slot(count(self.slots.len() - 1))
        });
        self.slots[slot.0 as usize] = Some(sequence);
        let earlier = self.by_id.insert(id.0, slot);
        assert!(earlier.is_none(), "{id:?} was submitted twice");
        slot
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Sequence {
        let Some(sequence) = self.slots[slot.0 as usize].take() else { dead(slot) };
        self.by_id.remove(&sequence.request.id.0);
        self.free.push(slot);
        sequence
    }

    pub(crate) fn find(&self, id: u64) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    /// Whether `slot` still belongs to `id`.
    pub(crate) fn holds(&self, slot: Slot, id: RequestId) -> bool {
        self.slots.get(slot.0 as usize).and_then(Option::as_ref).is_some_and(|sequence| sequence.request.id == id)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Every live sequence, in the order of slots.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Sequence)> {
        (0u32..).zip(&self.slots).filter_map(|(i, entry)| Some((Slot(i), entry.as_ref()?)))
    }
}

impl std::ops::Index<Slot> for Slab {
    type Output = Sequence;

    fn index(&self, slot: Slot) -> &Sequence {
        let Some(sequence) = &self.slots[slot.0 as usize] else { dead(slot) };
        sequence
    }
}

impl std::ops::IndexMut<Slot> for Slab {
    fn index_mut(&mut self, slot: Slot) -> &mut Sequence {
        let Some(sequence) = &mut self.slots[slot.0 as usize] else { dead(slot) };
        sequence
    }
}

#[expect(clippy::panic, reason = "a queue that names a dead sequence is corrupt scheduler state")]
fn dead(slot: Slot) -> ! {
    panic!("{slot:?} is named by a queue and holds no sequence")
}
