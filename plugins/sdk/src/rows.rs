//! Row views: the host passes columns, because a list costs one copy; people think in rows.
//!
//! A row is built on the fly from its columns and is never stored: the optimiser drops the fields that a policy does not
//! read. For that to work a read must not be able to panic, so a missing cell is 0 (the host never leaves one out).

use crate::{Blocks, Endings, Events, Micros, Replicas, Request, RequestId, Sequences};

/// One replica; `record replicas` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record replicas`, documented there")]
pub struct Replica {
    /// What [`Choice`](crate::Choice) names.
    pub row: u32,
    pub id: u32,
    pub key: u64,
    pub health: u8,
    pub weight: u32,
    pub waiting: u32,
    pub running: u32,
    pub running_limit: u32,
    pub queued_tokens: u32,
    pub free_blocks: u32,
    pub total_blocks: u32,
    pub cached_tokens: u32,
}

/// What an accepted request came to; `record endings` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record endings`, documented there")]
pub struct Ending {
    pub id: RequestId,
    pub tenant: u32,
    pub outcome: u8,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub generated_tokens: u32,
    pub max_new_tokens: u32,
}

/// One request as schedulers see it; `record sequences` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record sequences`, documented there")]
pub struct Sequence {
    pub id: RequestId,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub computed_tokens: u32,
    pub generated_tokens: u32,
    pub max_new_tokens: u32,
    pub held_blocks: u32,
    pub priority: u8,
    pub tenant: u32,
    pub arrived: Micros,
    pub deadline: Micros,
}

/// One cached block; `record blocks` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record blocks`, documented there")]
pub struct Block {
    /// What [`Ranking`](crate::Ranking) names.
    pub row: u32,
    pub prefix: u64,
    pub depth: u32,
    pub children: u32,
    pub last_used: Micros,
    pub created: Micros,
    pub hits: u32,
    pub tenant: u32,
}

/// What happened; `events.kind` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kinds are those of `record events`, documented there")]
pub enum EventKind {
    Admitted,
    Routed,
    FirstToken,
    Finished,
    Failed,
    Cancelled,
    Rejected,
    Preempted,
    Step,
    PolicyFault,
    Swap,
    Device,
    /// A kind that is newer than this SDK.
    #[default]
    Unknown,
}

/// One event; `record events` of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record events`, documented there")]
pub struct Event {
    pub at: Micros,
    pub kind: EventKind,
    pub request: RequestId,
    pub replica: u32,
    pub generation: u64,
    pub tenant: u32,
    pub a: u64,
    pub b: u64,
}

impl Replica {
    /// Whether the operator wants traffic here: the weight is not 0.
    #[must_use]
    #[inline]
    pub fn in_service(&self) -> bool {
        self.weight > 0
    }

    /// Prompt tokens ahead of a new request, per normal weight, where each sequence that waits or runs counts as
    /// `sequence_tokens` more. `own` is what the request itself adds. Under 2^60, whatever the columns say.
    #[must_use]
    #[inline]
    pub fn work(&self, own: u64, sequence_tokens: u16) -> u64 {
        let sequences = u64::from(self.waiting) + u64::from(self.running);
        let tokens = u64::from(self.queued_tokens) + own + sequences * u64::from(sequence_tokens);
        tokens * 1_000 / u64::from(self.weight.max(1))
    }
}

impl Sequence {
    /// Prompt tokens still to be computed, if it were admitted now.
    #[must_use]
    #[inline]
    pub fn prefill_left(&self) -> u32 {
        self.prompt_tokens.saturating_sub(self.computed_tokens.max(self.cached_tokens))
    }

    /// Tokens that it may still generate.
    #[must_use]
    #[inline]
    pub fn decode_left(&self) -> u32 {
        self.max_new_tokens.saturating_sub(self.generated_tokens)
    }
}

impl EventKind {
    /// The kind behind a number.
    #[must_use]
    #[inline]
    pub fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Admitted,
            1 => Self::Routed,
            2 => Self::FirstToken,
            3 => Self::Finished,
            4 => Self::Failed,
            5 => Self::Cancelled,
            6 => Self::Rejected,
            7 => Self::Preempted,
            8 => Self::Step,
            9 => Self::PolicyFault,
            10 => Self::Swap,
            11 => Self::Device,
            _ => Self::Unknown,
        }
    }
}

#[inline]
fn cell<T: Copy + Default>(column: &[T], row: usize) -> T {
    column.get(row).copied().unwrap_or_default()
}

impl Blocks {
    /// The blocks, in the host's own order of eviction.
    #[inline]
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Block> {
        (0..self.prefix.len()).map(|i| Block {
            row: i as u32,
            prefix: cell(&self.prefix, i),
            depth: cell(&self.depth, i),
            children: cell(&self.children, i),
            last_used: cell(&self.last_used, i),
            created: cell(&self.created, i),
            hits: cell(&self.hits, i),
            tenant: cell(&self.tenant, i),
        })
    }
}

impl Replicas {
    /// Replicas, in the order in which [`Choice`](crate::Choice) numbers them.
    #[inline]
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Replica> + '_ {
        (0..self.id.len()).map(|row| Replica {
            row: u32::try_from(row).unwrap_or(u32::MAX),
            id: cell(&self.id, row),
            key: cell(&self.key, row),
            health: cell(&self.health, row),
            weight: cell(&self.weight, row),
            waiting: cell(&self.waiting, row),
            running: cell(&self.running, row),
            running_limit: cell(&self.running_limit, row),
            queued_tokens: cell(&self.queued_tokens, row),
            free_blocks: cell(&self.free_blocks, row),
            total_blocks: cell(&self.total_blocks, row),
            cached_tokens: cell(&self.cached_tokens, row),
        })
    }
}

impl Endings {
    /// Endings, oldest first.
    #[inline]
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Ending> + '_ {
        (0..self.id.len()).map(|row| Ending {
            id: cell(&self.id, row),
            tenant: cell(&self.tenant, row),
            outcome: cell(&self.outcome, row),
            prompt_tokens: cell(&self.prompt_tokens, row),
            cached_tokens: cell(&self.cached_tokens, row),
            generated_tokens: cell(&self.generated_tokens, row),
            max_new_tokens: cell(&self.max_new_tokens, row),
        })
    }
}

impl Sequences {
    /// Requests, in the host's order.
    #[inline]
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Sequence> + '_ {
        (0..self.id.len()).map(|row| Sequence {
            id: cell(&self.id, row),
            prompt_tokens: cell(&self.prompt_tokens, row),
            cached_tokens: cell(&self.cached_tokens, row),
            computed_tokens: cell(&self.computed_tokens, row),
            generated_tokens: cell(&self.generated_tokens, row),
            max_new_tokens: cell(&self.max_new_tokens, row),
            held_blocks: cell(&self.held_blocks, row),
            priority: cell(&self.priority, row),
            tenant: cell(&self.tenant, row),
            arrived: cell(&self.arrived, row),
            deadline: cell(&self.deadline, row),
        })
    }
}

impl Replicas {
    /// A wanted column, one value per row, by its place among the `replica.*` names of the manifest; empty where there is none.
    #[must_use]
    #[inline]
    pub fn wanted(&self, place: usize) -> &[u64] {
        self.extra.get(place).map_or(&[], Vec::as_slice)
    }
}

impl Sequences {
    /// A wanted column, one value per row, by its place among the `seq.*` names of the manifest; empty where there is none.
    #[must_use]
    #[inline]
    pub fn wanted(&self, place: usize) -> &[u64] {
        self.extra.get(place).map_or(&[], Vec::as_slice)
    }
}

impl Request {
    /// A wanted number, by its place among the `request.*` names of the manifest; 0 where there is none.
    #[must_use]
    #[inline]
    pub fn wanted(&self, place: usize) -> u64 {
        cell(&self.extra, place)
    }

    /// A wanted text, such as `header.x-plan`; none where the request has none.
    #[must_use]
    #[inline]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, text)| text.as_str())
    }
}

impl Events {
    /// Events, oldest first.
    #[inline]
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Event> + '_ {
        (0..self.kind.len()).map(|row| Event {
            at: cell(&self.at, row),
            kind: EventKind::from_number(cell(&self.kind, row)),
            request: cell(&self.request, row),
            replica: cell(&self.replica, row),
            generation: cell(&self.generation, row),
            tenant: cell(&self.tenant, row),
            a: cell(&self.a, row),
            b: cell(&self.b, row),
        })
    }
}

impl Default for crate::Plan {
    /// Nothing named: everything goes as the host would do it.
    fn default() -> Self {
        Self {
            admit: Vec::new(),
            rest: crate::Rest::HostOrder,
            preempt: Vec::new(),
            drop: Vec::new(),
            prefill_id: Vec::new(),
            prefill_tokens: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{EventKind, Replica, Sequence, testing};

    #[test]
    fn rows_are_what_columns_say() {
        let replicas = testing::replicas([testing::replica(7), testing::replica(9)]);
        let rows: Vec<_> = replicas.rows().map(|r| (r.row, r.id, r.weight)).collect();
        assert_eq!(rows, [(0, 7, 1_000), (1, 9, 1_000)]);

        let busy = Replica { queued_tokens: 100, waiting: 1, running: 2, weight: 500, ..testing::replica(7) };
        assert_eq!([busy.work(0, 0), busy.work(50, 10)], [200, 360]);

        let sequence =
            Sequence { id: 4, prompt_tokens: 10, cached_tokens: 4, max_new_tokens: 3, ..Sequence::default() };
        let sequences = testing::sequences([sequence]);
        assert_eq!(sequences.rows().collect::<Vec<_>>(), [sequence]);
        assert_eq!((sequence.prefill_left(), sequence.decode_left()), (6, 3));
    }

    #[test]
    fn wanted_inputs_are_found_by_place_and_name() {
        let mut replicas = testing::replicas([testing::replica(7), testing::replica(9)]);
        replicas.extra = vec![vec![3, 4]];
        assert_eq!((replicas.wanted(0), replicas.wanted(1)), (&[3, 4][..], &[][..]));
        let mut request = testing::request();
        request.extra = vec![8];
        request.attributes = vec![("header.x-plan".to_owned(), "gold".to_owned())];
        assert_eq!((request.wanted(0), request.wanted(1)), (8, 0));
        assert_eq!((request.text("header.x-plan"), request.text("prompt-head")), (Some("gold"), None));
    }

    #[test]
    fn a_short_column_reads_as_zero() {
        let mut replicas = testing::replicas([testing::replica(7), testing::replica(9)]);
        replicas.weight.truncate(1);
        assert_eq!(replicas.rows().map(|r| r.weight).collect::<Vec<_>>(), [1_000, 0]);
    }

    #[test]
    fn kinds_keep_their_numbers() {
        for number in 0..12 {
            assert_eq!(EventKind::from_number(number) as u8, number);
        }
        assert_eq!(EventKind::from_number(12), EventKind::Unknown);
    }
}
